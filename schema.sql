-- catvote's database: each click a row in votes, exact counters beside it, views for psql.
-- Plain SQL for PostgreSQL 14 and later: psql, a hosted console or a driver can apply it, again
-- and again, also while people vote, under any search_path, and to a database of an earlier version.

-- Whatever the database's default is: what follows a lock must see what was committed before it.
BEGIN ISOLATION LEVEL READ COMMITTED;

SET LOCAL client_min_messages = warning;
SET LOCAL search_path = pg_catalog, pg_temp;
-- Two CREATE TABLE IF NOT EXISTS of one table at the same time can fail: take turns.
SELECT pg_advisory_xact_lock(hashtext('catvote schema'));
-- Others queue behind a schema that waits for its locks: rather give up than keep them waiting.
-- An autovacuum in the way gives way after a second (deadlock_timeout).
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

-- The tally is exact whatever SQL changes votes, at one price for ten votes or a billion. A
-- single counter for a cat would make each INSERT wait for the commit of the one before: so a
-- server process adds to a slot of its own. Free space in the page keeps updates off the index.
CREATE TABLE IF NOT EXISTS public.tally (
    vote  text        NOT NULL,
    slot  int         NOT NULL,
    votes bigint      NOT NULL,
    hour  timestamptz NOT NULL DEFAULT '-infinity',
    CONSTRAINT tally_primary_key PRIMARY KEY (hour, vote, slot)
) WITH (fillfactor = 50);

COMMENT ON TABLE public.tally IS 'Counters kept by triggers on votes; to be read through vote_totals and votes_by_hour.';
COMMENT ON COLUMN public.tally.vote IS 'The cat.';
COMMENT ON COLUMN public.tally.slot IS 'Server process modulo 32, so that statements seldom wait; -1 of recount_votes().';
COMMENT ON COLUMN public.tally.votes IS 'Part of a sum; may be negative where another slot''s votes were deleted.';

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

-- No vote may come between the counters and the triggers that keep them.
SET LOCAL lock_timeout = '1s';
LOCK TABLE public.votes IN SHARE ROW EXCLUSIVE MODE;
-- From here on votes wait, and a visitor's patience ends after 2 seconds.
SET LOCAL lock_timeout = '500ms';

-- Rows that came with a row_id of their own leave the sequence behind: without this, each of the
-- next votes would meet a row_id that is taken. A setval outlives a ROLLBACK, which only skips numbers.
SELECT setval(sequence, newest)
FROM (SELECT pg_get_serial_sequence('public.votes', 'row_id')::regclass, max(row_id) FROM public.votes)
    AS numbers (sequence, newest)
WHERE newest > coalesce(pg_sequence_last_value(sequence), 0);

-- Votes lie in the order of their time: a BRIN index serves time ranges for next to nothing.
-- One of the first version indexes the hour as well; to build it anew would keep votes waiting.
CREATE INDEX IF NOT EXISTS votes_date_created_brin
ON public.votes USING brin (date_created) WITH (autosummarize = on);

-- The tally of the first version has totals, but no hours.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'public.tally'::regclass AND attname = 'hour') THEN
        -- Locks this view, then its table, as its readers do: another order would be a deadlock.
        LOCK TABLE public.vote_totals IN ACCESS EXCLUSIVE MODE;
        ALTER TABLE public.tally
            ADD COLUMN hour timestamptz NOT NULL DEFAULT '-infinity',
            DROP CONSTRAINT tally_primary_key,
            ADD CONSTRAINT tally_primary_key PRIMARY KEY (hour, vote, slot);
    END IF;
END
$$;
COMMENT ON COLUMN public.tally.hour IS 'The first instant of an hour of UTC; -infinity for the total.';

-- SECURITY DEFINER lets a role vote that may only INSERT into votes. One statement adds to the
-- total and to the hour. Counters change in one order, that of the primary key, so that two
-- statements cannot wait for each other in a circle. Votes dated infinity are in no hour.
CREATE OR REPLACE FUNCTION public.count_votes() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    own_slot CONSTANT int := pg_backend_pid() % 32;
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO public.tally AS counter (hour, vote, slot, votes)
        SELECT coalesce(hour, '-infinity') AS key, vote, own_slot, count(*)
        FROM (SELECT date_trunc('hour', date_created, 'UTC'), vote FROM inserted) AS change (hour, vote)
        GROUP BY GROUPING SETS ((vote), (vote, hour))
        HAVING hour IS NULL OR isfinite(hour)
        ORDER BY key, vote
        ON CONFLICT (hour, vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO public.tally AS counter (hour, vote, slot, votes)
        SELECT coalesce(hour, '-infinity') AS key, vote, own_slot, -count(*)
        FROM (SELECT date_trunc('hour', date_created, 'UTC'), vote FROM deleted) AS change (hour, vote)
        GROUP BY GROUPING SETS ((vote), (vote, hour))
        HAVING hour IS NULL OR isfinite(hour)
        ORDER BY key, vote
        ON CONFLICT (hour, vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO public.tally AS counter (hour, vote, slot, votes)
        SELECT coalesce(hour, '-infinity') AS key, vote, own_slot, sum(delta)
        FROM (
            SELECT date_trunc('hour', date_created, 'UTC'), vote, 1 FROM inserted
            UNION ALL
            SELECT date_trunc('hour', date_created, 'UTC'), vote, -1 FROM deleted
        ) AS change (hour, vote, delta)
        GROUP BY GROUPING SETS ((vote), (vote, hour))
        HAVING (hour IS NULL OR isfinite(hour)) AND sum(delta) <> 0
        ORDER BY key, vote
        ON CONFLICT (hour, vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
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

-- Adds the difference between rows and counters, both seen by one snapshot. Votes that come
-- meanwhile change both alike, so the difference stays true and no vote has to wait. The lock
-- lets votes pass and keeps off a second recount, which would add the same difference again.
CREATE OR REPLACE FUNCTION public.recount_votes() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    LOCK TABLE public.votes IN SHARE UPDATE EXCLUSIVE MODE;
    INSERT INTO public.tally AS counter (hour, vote, slot, votes)
    SELECT hour, vote, -1, sum(votes)
    FROM (
        SELECT coalesce(hour, '-infinity'), vote, count(*)
        FROM (SELECT date_trunc('hour', date_created, 'UTC'), vote FROM public.votes) AS counted (hour, vote)
        GROUP BY GROUPING SETS ((vote), (vote, hour))
        HAVING hour IS NULL OR isfinite(hour)
        UNION ALL
        SELECT hour, vote, -votes FROM public.tally
    ) AS difference (hour, vote, votes)
    GROUP BY hour, vote
    HAVING sum(votes) <> 0
    ON CONFLICT (hour, vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
END
$$;
COMMENT ON FUNCTION public.recount_votes() IS 'Counts all votes anew, after a restore that went wrong; nobody waits for it.';

CREATE OR REPLACE VIEW public.vote_totals AS
SELECT vote, coalesce(sum(votes), 0)::bigint AS votes
FROM (VALUES ('Gummi'), ('Pita')) AS cat (vote)
FULL JOIN (SELECT vote, votes FROM public.tally WHERE hour = '-infinity') AS counter USING (vote)
GROUP BY vote
ORDER BY vote;
COMMENT ON VIEW public.vote_totals IS 'Votes for each cat, at a price that does not grow with them.';
COMMENT ON COLUMN public.vote_totals.vote IS 'The cat.';
COMMENT ON COLUMN public.vote_totals.votes IS 'Number of rows in votes for this cat, exact.';

COMMIT;

-- Votes may be older than the counters, or than their hours. From here on each change is counted, so
-- these are, too. It takes seconds for ten million votes: a transaction of its own locks none of them out.
BEGIN ISOLATION LEVEL READ COMMITTED;

SET LOCAL client_min_messages = warning;
SET LOCAL search_path = pg_catalog, pg_temp;
SELECT pg_advisory_xact_lock(hashtext('catvote schema'));
-- Only readers of the chart wait here. An earlier version reads it for 3 seconds at most.
SET LOCAL lock_timeout = '5s';

-- The view comes last, and so tells that this was done: until then an earlier one counts rows.
SELECT public.recount_votes()
WHERE NOT EXISTS (SELECT FROM public.tally WHERE hour > '-infinity')
   OR coalesce(pg_get_viewdef(to_regclass('public.votes_by_hour')), '') NOT LIKE '%tally%';

CREATE OR REPLACE VIEW public.votes_by_hour AS
SELECT hour, vote, sum(votes)::bigint AS votes
FROM public.tally
WHERE hour > '-infinity'
GROUP BY hour, vote
HAVING sum(votes) <> 0
ORDER BY hour, vote;
COMMENT ON VIEW public.votes_by_hour IS 'Votes for each cat and hour that has any; cheap, above all WHERE hour > a time.';
COMMENT ON COLUMN public.votes_by_hour.hour IS 'The first instant of an hour of UTC; votes dated infinity have none.';
COMMENT ON COLUMN public.votes_by_hour.vote IS 'The cat.';
COMMENT ON COLUMN public.votes_by_hour.votes IS 'Number of votes in that hour, exact.';

COMMIT;
