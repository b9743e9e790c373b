-- catvote's database: each click a row in votes, an exact tally beside it, views for psql.
-- Plain SQL in one transaction, for PostgreSQL 14 and later: psql, a hosted console or a
-- driver can apply it, again and again, also while people vote, under any search_path.

-- Whatever the database's default is: the first count must see the votes it waited for.
BEGIN ISOLATION LEVEL READ COMMITTED;

SET LOCAL client_min_messages = warning;
SET LOCAL search_path = pg_catalog, pg_temp;
-- Two CREATE TABLE IF NOT EXISTS of one table at the same time can fail: take turns.
SELECT pg_advisory_xact_lock(hashtext('catvote schema'));
-- Votes queue behind a schema that waits for its locks: rather give up than keep them waiting.
SET LOCAL lock_timeout = '1500ms';

CREATE TABLE IF NOT EXISTS public.votes (
    row_id       bigint      GENERATED ALWAYS AS IDENTITY,
    date_created timestamptz NOT NULL DEFAULT now(),
    vote         text        NOT NULL,
    CONSTRAINT votes_primary_key PRIMARY KEY (row_id),
    CONSTRAINT votes_vote_is_a_cat CHECK (vote IN ('Gummi', 'Pita'))
);

COMMENT ON TABLE public.votes IS 'One row for each click on a cat.';
COMMENT ON COLUMN public.votes.row_id IS 'Grows with time, with gaps where votes were not stored.';
COMMENT ON COLUMN public.votes.date_created IS 'When the vote was stored; set by itself, once for a statement.';
COMMENT ON COLUMN public.votes.vote IS 'The cat; constraint votes_vote_is_a_cat knows them all.';

-- Replacing a view waits for its readers, who may be slow: done before votes are locked.
CREATE OR REPLACE VIEW public.votes_by_day AS
SELECT date_created::date AS day, vote, count(*) AS votes
FROM public.votes
GROUP BY day, vote
ORDER BY day, vote;
COMMENT ON VIEW public.votes_by_day IS 'Votes for each cat and day that has any; reads all of votes.';
COMMENT ON COLUMN public.votes_by_day.day IS 'In your session''s time zone (SHOW timezone).';
COMMENT ON COLUMN public.votes_by_day.vote IS 'The cat.';
COMMENT ON COLUMN public.votes_by_day.votes IS 'Number of votes on that day.';

CREATE OR REPLACE VIEW public.votes_by_hour AS
SELECT date_bin('1 hour', date_created, 'epoch') AS hour, vote, count(*) AS votes
FROM public.votes
GROUP BY hour, vote
ORDER BY hour, vote;
COMMENT ON VIEW public.votes_by_hour IS 'Votes for each cat and hour that has any; reads all of votes or WHERE hour > a time.';
COMMENT ON COLUMN public.votes_by_hour.hour IS 'The first instant of an hour of UTC.';
COMMENT ON COLUMN public.votes_by_hour.vote IS 'The cat.';
COMMENT ON COLUMN public.votes_by_hour.votes IS 'Number of votes in that hour.';

-- No vote may come between the rows, the triggers and the first count.
LOCK TABLE public.votes IN SHARE ROW EXCLUSIVE MODE;
-- Votes lie in the order of their time: a BRIN index serves time ranges for next to nothing.
CREATE INDEX IF NOT EXISTS votes_date_created_brin
ON public.votes USING brin (date_created, date_bin('1 hour', date_created, 'epoch')) WITH (autosummarize = on);

-- The tally is exact whatever SQL changes votes, at one price for ten votes or a billion. A
-- single counter for a cat would make each INSERT wait for the commit of the one before: so a
-- server process adds to a slot of its own. Free space in the page keeps updates off the index.
CREATE TABLE IF NOT EXISTS public.tally (
    vote  text   NOT NULL,
    slot  int    NOT NULL,
    votes bigint NOT NULL,
    CONSTRAINT tally_primary_key PRIMARY KEY (vote, slot)
) WITH (fillfactor = 50);

COMMENT ON TABLE public.tally IS 'Counters kept by triggers on votes; to be read through vote_totals.';
COMMENT ON COLUMN public.tally.vote IS 'The cat.';
COMMENT ON COLUMN public.tally.slot IS 'Server process modulo 32, so that statements seldom wait for each other.';
COMMENT ON COLUMN public.tally.votes IS 'Part of a sum; may be negative where another slot''s votes were deleted.';

-- SECURITY DEFINER lets a role vote that may only INSERT into votes. Deltas are applied in
-- the order of the cats, so that two statements cannot wait for each other in a circle.
CREATE OR REPLACE FUNCTION public.count_votes() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    own_slot CONSTANT int := pg_backend_pid() % 32;
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO public.tally AS counter
        SELECT vote, own_slot, count(*)
        FROM inserted
        GROUP BY vote
        ORDER BY vote
        ON CONFLICT (vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO public.tally AS counter
        SELECT vote, own_slot, -count(*)
        FROM deleted
        GROUP BY vote
        ORDER BY vote
        ON CONFLICT (vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO public.tally AS counter
        SELECT vote, own_slot, sum(delta)
        FROM (SELECT vote, 1 FROM inserted UNION ALL SELECT vote, -1 FROM deleted) AS c (vote, delta)
        GROUP BY vote
        ORDER BY vote
        ON CONFLICT (vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
    ELSE
        TRUNCATE public.tally;
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION public.count_votes() IS 'Adds what a statement changed in votes to tally.';
-- Else any role could tie it to a table of its own and forge the tally.
REVOKE EXECUTE ON FUNCTION public.count_votes() FROM PUBLIC;

-- A trigger with transition tables serves one event only, and TRUNCATE has none.
CREATE OR REPLACE TRIGGER votes_count_insert AFTER INSERT ON public.votes
REFERENCING NEW TABLE AS inserted
FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes();
CREATE OR REPLACE TRIGGER votes_count_update AFTER UPDATE ON public.votes
REFERENCING NEW TABLE AS inserted OLD TABLE AS deleted
FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes();
CREATE OR REPLACE TRIGGER votes_count_delete AFTER DELETE ON public.votes
REFERENCING OLD TABLE AS deleted
FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes();
CREATE OR REPLACE TRIGGER votes_count_truncate AFTER TRUNCATE ON public.votes
FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes();

CREATE OR REPLACE FUNCTION public.recount_votes() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    LOCK TABLE public.votes IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM public.tally;
    INSERT INTO public.tally
    SELECT vote, 0, count(*)
    FROM public.votes
    GROUP BY vote;
END
$$;
COMMENT ON FUNCTION public.recount_votes() IS 'Counts all votes anew, after a restore that went wrong.';

-- A new tally starts from the votes that are there already.
SELECT public.recount_votes() WHERE NOT EXISTS (SELECT FROM public.tally);

CREATE OR REPLACE VIEW public.vote_totals AS
SELECT vote, coalesce(sum(votes), 0)::bigint AS votes
FROM (VALUES ('Gummi'), ('Pita')) AS cat (vote)
FULL JOIN public.tally USING (vote)
GROUP BY vote
ORDER BY vote;
COMMENT ON VIEW public.vote_totals IS 'Votes for each cat, at a price that does not grow with them.';
COMMENT ON COLUMN public.vote_totals.vote IS 'The cat.';
COMMENT ON COLUMN public.vote_totals.votes IS 'Number of rows in votes for this cat, exact.';

COMMIT;
