-- catvote's database: each click a row in votes, exact counters beside it, views for psql.
-- Plain SQL for PostgreSQL 14 and later: psql, a hosted console or a driver can apply it, again
-- and again, also while people vote, under any search_path, and to a database of an earlier version.

-- Whatever the database's default is: what follows a lock must see what was committed before it.
BEGIN ISOLATION LEVEL READ COMMITTED;

SET LOCAL client_min_messages = warning;
SET LOCAL search_path = pg_catalog, pg_temp;
-- A line that dies must not keep its locks.
SET LOCAL idle_in_transaction_session_timeout = '5s';
-- Two CREATE TABLE IF NOT EXISTS of one table at the same time can fail: take turns.
SELECT pg_advisory_xact_lock(hashtext('catvote schema'));
-- Others queue behind a schema that waits for its locks: rather give up than keep them waiting.
-- An autovacuum in the way gives way after a second (deadlock_timeout).
SET LOCAL lock_timeout = '3s';

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

CREATE OR REPLACE VIEW public.votes_by_day AS
SELECT date_created::date AS day, vote, count(*) AS votes
FROM public.votes
GROUP BY day, vote
ORDER BY day, vote;
COMMENT ON VIEW public.votes_by_day IS 'Votes for each cat and day that has any; reads all of votes.';
COMMENT ON COLUMN public.votes_by_day.day IS 'In your session''s time zone (SHOW timezone).';
COMMENT ON COLUMN public.votes_by_day.vote IS 'The cat.';
COMMENT ON COLUMN public.votes_by_day.votes IS 'Number of votes on that day.';

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

-- SECURITY DEFINER lets a role vote that may only INSERT into votes. One statement adds to the
-- total, under the hour -infinity, and to the hour. Counters change in one order, that of the
-- primary key, so that two statements cannot wait for each other in a circle. Votes dated infinity
-- are in no hour.
CREATE OR REPLACE FUNCTION public.count_votes() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    own_slot CONSTANT int := pg_backend_pid() % 32;
    sign     CONSTANT int := TG_ARGV[0];
BEGIN
    IF TG_OP IN ('INSERT', 'DELETE') THEN
        INSERT INTO public.tally AS counter (hour, vote, slot, votes)
        SELECT coalesce(hour, '-infinity') AS key, vote, own_slot, sign * count(*)
        FROM (SELECT date_trunc('hour', date_created, 'UTC'), vote FROM changed) AS change (hour, vote)
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
        SELECT coalesce(hour, '-infinity'), vote, sum(votes)
        FROM (
            SELECT date_trunc('hour', date_created, 'UTC') AS hour, vote, count(*) AS votes
            FROM public.votes
            GROUP BY hour, vote
        ) AS counted
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

-- What keeps votes or their readers waiting is one statement: psql sends one after the other, and
-- over a slow line each would lengthen the wait by a round trip.
DO $$
DECLARE
    row_ids CONSTANT regclass := pg_get_serial_sequence('public.votes', 'row_id');
BEGIN
    -- These two change nothing but lock the views: before the tally, as readers do (another order
    -- would be a deadlock), and before votes, which then need not wait for slow readers.
    ALTER VIEW IF EXISTS public.votes_by_hour RESET (security_barrier);
    -- Who waits from here on keeps votes waiting, and a visitor's patience ends after 2 seconds.
    SET LOCAL lock_timeout = '1s';
    ALTER VIEW IF EXISTS public.vote_totals RESET (security_barrier);

    -- Whatever is odd about the counters has one cure: an earlier version, a trigger that is missing
    -- or disabled, a table that was dropped and made anew, rows that brought their own row_id. It
    -- locks votes out, for seconds where there are ten million; but a sound database is left alone.
    IF (
        SELECT count(*) < 4
        FROM pg_trigger
        WHERE tgrelid = 'public.votes'::regclass AND tgenabled = 'O' AND (tgname, tgnargs) IN (
            ('votes_count_insert', 1), ('votes_count_delete', 1), ('votes_count_update', 0), ('votes_count_truncate', 0)
        )
    )
    OR NOT EXISTS (SELECT FROM public.tally)
    OR to_regclass('public.votes_date_created_brin') IS NULL
    OR (SELECT max(row_id) FROM public.votes) > coalesce(pg_sequence_last_value(row_ids), 0)
    THEN
        LOCK TABLE public.votes IN SHARE ROW EXCLUSIVE MODE;

        -- Without this, each of the next votes would meet a row_id that is taken. It outlives a ROLLBACK,
        -- which only skips numbers.
        PERFORM setval(row_ids, max(row_id))
        FROM public.votes
        HAVING max(row_id) > coalesce(pg_sequence_last_value(row_ids), 0);

        -- Votes lie in the order of their time: a BRIN index serves time ranges for next to nothing.
        CREATE INDEX IF NOT EXISTS votes_date_created_brin
        ON public.votes USING brin (date_created) WITH (autosummarize = on);

        -- The tally of the first version has totals, but no hours.
        ALTER TABLE public.tally
            ADD COLUMN IF NOT EXISTS hour timestamptz NOT NULL DEFAULT '-infinity',
            DROP CONSTRAINT tally_primary_key,
            ADD CONSTRAINT tally_primary_key PRIMARY KEY (hour, vote, slot);
        COMMENT ON COLUMN public.tally.hour IS 'The first instant of an hour of UTC; -infinity for the total.';

        -- A trigger with transition tables serves one event only, and TRUNCATE has none.
        CREATE OR REPLACE TRIGGER votes_count_insert AFTER INSERT ON public.votes
        REFERENCING NEW TABLE AS changed
        FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes('1');
        CREATE OR REPLACE TRIGGER votes_count_delete AFTER DELETE ON public.votes
        REFERENCING OLD TABLE AS changed
        FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes('-1');
        CREATE OR REPLACE TRIGGER votes_count_update AFTER UPDATE ON public.votes
        REFERENCING NEW TABLE AS inserted OLD TABLE AS deleted
        FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes();
        CREATE OR REPLACE TRIGGER votes_count_truncate AFTER TRUNCATE ON public.votes
        FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes();
        PERFORM public.recount_votes();
    END IF;

    CREATE OR REPLACE VIEW public.vote_totals AS
    SELECT vote, coalesce(sum(votes), 0)::bigint AS votes
    FROM (VALUES ('Gummi'), ('Pita')) AS cat (vote)
    FULL JOIN (SELECT vote, votes FROM public.tally WHERE hour = '-infinity') AS counter USING (vote)
    GROUP BY vote
    ORDER BY vote;
    COMMENT ON VIEW public.vote_totals IS 'Votes for each cat, at a price that does not grow with them.';
    COMMENT ON COLUMN public.vote_totals.vote IS 'The cat.';
    COMMENT ON COLUMN public.vote_totals.votes IS 'Number of rows in votes for this cat, exact.';

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
END
$$;

COMMIT;
