-- catvote's database on several servers, with Citus 13: for psql on the coordinator, in place of
-- schema.sql; again and again if you like, also while people vote, and once more when a node was added.

\set ON_ERROR_STOP on

BEGIN ISOLATION LEVEL READ COMMITTED;

SET LOCAL client_min_messages = warning;
SET LOCAL search_path = pg_catalog, pg_temp;
SELECT pg_advisory_xact_lock(hashtext('catvote schema'));
-- Votes queue behind a schema that waits for its locks: rather give up than keep them waiting.
SET LOCAL lock_timeout = '1500ms';
-- Later statements need what earlier ones made on each node, so all use one connection to it.
SET LOCAL citus.multi_shard_modify_mode = 'sequential';

-- Rows and counters with the same slot lie on the same node. So a vote changes one node only, and
-- its commit is that of a single server: it needs no agreement among several.
CREATE SEQUENCE IF NOT EXISTS public.votes_row_id_seq;
CREATE TABLE IF NOT EXISTS public.ballots (
    slot         int         NOT NULL,
    row_id       bigint      NOT NULL DEFAULT nextval('public.votes_row_id_seq'),
    date_created timestamptz NOT NULL DEFAULT now(),
    vote         text        NOT NULL,
    CONSTRAINT ballots_primary_key PRIMARY KEY (slot, row_id),
    CONSTRAINT votes_vote_is_a_cat CHECK (vote IN ('Gummi', 'Pita'))
);
CREATE TABLE IF NOT EXISTS public.tally (
    hour  timestamptz NOT NULL,
    vote  text        NOT NULL,
    slot  int         NOT NULL,
    votes bigint      NOT NULL,
    CONSTRAINT tally_primary_key PRIMARY KEY (hour, vote, slot)
) WITH (fillfactor = 50);

SELECT create_distributed_table('public.ballots', 'slot', shard_count => 16)
WHERE NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = 'public.ballots'::regclass);
SELECT create_distributed_table('public.tally', 'slot', colocate_with => 'public.ballots')
WHERE NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = 'public.tally'::regclass);

COMMENT ON TABLE public.ballots IS 'The rows, spread over the nodes by slot; to be changed through votes only.';
COMMENT ON COLUMN public.ballots.slot IS 'Server process or row_id, modulo 32; decides on the node.';
COMMENT ON TABLE public.tally IS 'Counters beside the rows they count, for vote_totals and votes_by_hour.';
COMMENT ON COLUMN public.tally.hour IS 'The first instant of an hour of UTC; -infinity: the total; infinity: rows of no hour.';

-- A cat without votes has its row in vote_totals all the same.
INSERT INTO public.tally (hour, vote, slot, votes)
VALUES ('-infinity', 'Gummi', 0, 0), ('-infinity', 'Pita', 0, 0)
ON CONFLICT (hour, vote, slot) DO NOTHING;

-- Citus pushes queries down to the nodes, and refuses what would not work there. A function is where
-- that ends: it asks the nodes, and any SQL may be put round its rows. So each view reads by a function.
CREATE OR REPLACE FUNCTION public.read_votes()
RETURNS TABLE (slot int, row_id bigint, date_created timestamptz, vote text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT ballot.slot, ballot.row_id, ballot.date_created, ballot.vote
    FROM public.ballots AS ballot;
END
$$;

-- Citus has no triggers on distributed tables; PostgreSQL has them on views. So votes is one.
CREATE OR REPLACE VIEW public.votes AS
SELECT row_id, date_created, vote, slot
FROM public.read_votes();
COMMENT ON VIEW public.votes IS 'One row for each click on a cat. To count very many, ask ballots: then the nodes count.';
COMMENT ON COLUMN public.votes.row_id IS 'Unique where set by itself; each node has numbers of its own.';

-- Adds 1 or -1 to the total, under the hour -infinity, and to the hour.
CREATE OR REPLACE FUNCTION public.count_vote(vote text, date_created timestamptz, slot int, delta int) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    hour CONSTANT timestamptz := CASE
        WHEN isfinite(date_created) THEN date_bin('1 hour', date_created, 'epoch')
        ELSE 'infinity'
    END;
BEGIN
    INSERT INTO public.tally AS counter (hour, vote, slot, votes)
    VALUES ('-infinity', vote, slot, delta), (hour, vote, slot, delta)
    ON CONFLICT ON CONSTRAINT tally_primary_key DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
END
$$;

-- SECURITY DEFINER lets a role vote that may only INSERT into votes.
CREATE OR REPLACE FUNCTION public.change_vote() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_OP IN ('UPDATE', 'DELETE') THEN
        DELETE FROM public.ballots AS ballot
        WHERE ballot.slot = OLD.slot
            AND ballot.row_id = OLD.row_id
            AND ballot.date_created = OLD.date_created
            AND ballot.vote = OLD.vote;
        -- Another transaction was faster: to count this change as well would spoil the tally.
        IF NOT FOUND THEN
            RAISE serialization_failure USING MESSAGE = 'a vote to be changed has just been changed: please try again';
        END IF;
        PERFORM public.count_vote(OLD.vote, OLD.date_created, OLD.slot, -1);
    END IF;
    IF TG_OP = 'INSERT' THEN
        -- A visitor's votes go where their server process puts all of its votes: two processes seldom
        -- wait for each other, and one whose node hangs holds up no other. Rows that have a row_id
        -- come by the thousand, from a dump: they spread over all slots, and so over all nodes.
        NEW.slot := coalesce(NEW.row_id, pg_backend_pid()) % 32;
        NEW.row_id := coalesce(NEW.row_id, nextval('public.votes_row_id_seq'));
        NEW.date_created := coalesce(NEW.date_created, now());
    END IF;
    IF TG_OP IN ('INSERT', 'UPDATE') THEN
        INSERT INTO public.ballots (slot, row_id, date_created, vote)
        VALUES (NEW.slot, NEW.row_id, NEW.date_created, NEW.vote);
        PERFORM public.count_vote(NEW.vote, NEW.date_created, NEW.slot, 1);
        RETURN NEW;
    END IF;
    RETURN OLD;
END
$$;
-- Else any role could tie it to a table of its own and forge votes.
REVOKE EXECUTE ON FUNCTION public.change_vote() FROM PUBLIC;

-- What the page shows to everybody, any role may read: it needs no account on the nodes for that.
CREATE OR REPLACE FUNCTION public.read_totals() RETURNS TABLE (vote text, votes bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT counter.vote, sum(counter.votes)::bigint
    FROM public.tally AS counter
    WHERE counter.hour = '-infinity'
    GROUP BY counter.vote;
END
$$;

CREATE OR REPLACE VIEW public.vote_totals AS
SELECT vote, votes
FROM public.read_totals()
ORDER BY vote;
COMMENT ON VIEW public.vote_totals IS 'Votes for each cat, exact, at a price that does not grow with them.';

CREATE OR REPLACE FUNCTION public.read_hours() RETURNS TABLE (hour timestamptz, vote text, votes bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT counter.hour, counter.vote, sum(counter.votes)::bigint
    FROM public.tally AS counter
    WHERE isfinite(counter.hour)
    GROUP BY counter.hour, counter.vote
    HAVING sum(counter.votes) <> 0;
END
$$;

CREATE OR REPLACE VIEW public.votes_by_hour AS
SELECT hour, vote, votes
FROM public.read_hours()
ORDER BY hour, vote;
COMMENT ON VIEW public.votes_by_hour IS 'Votes for each cat and hour of UTC that has any; reads counters, no rows.';

-- The nodes count, each in its own time zone, and do not know the reader's: they have to be told.
CREATE OR REPLACE FUNCTION public.read_days(time_zone text) RETURNS TABLE (day date, vote text, votes bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT (ballot.date_created AT TIME ZONE time_zone)::date, ballot.vote, count(*)
    FROM public.ballots AS ballot
    GROUP BY 1, 2;
END
$$;

CREATE OR REPLACE VIEW public.votes_by_day AS
SELECT day, vote, votes
FROM public.read_days(current_setting('TimeZone'))
ORDER BY day, vote;
COMMENT ON VIEW public.votes_by_day IS 'Votes for each cat and day of your time zone (SHOW timezone); reads all of votes.';

-- Adds the difference between rows and counters. Citus runs this beside the rows, shard by shard, where one
-- snapshot sees both. Votes that come meanwhile change both alike: the difference stays true and none waits.
-- The lock lets votes pass and keeps off a second recount, which would add the same difference again.
CREATE OR REPLACE FUNCTION public.recount_votes() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    LOCK TABLE public.ballots IN SHARE UPDATE EXCLUSIVE MODE;
    INSERT INTO public.tally AS counter (hour, vote, slot, votes)
    SELECT hour, vote, slot, sum(votes)
    FROM (
        SELECT '-infinity'::timestamptz AS hour, vote, slot, 1 AS votes
        FROM public.ballots
        UNION ALL
        SELECT
            CASE WHEN isfinite(date_created) THEN date_bin('1 hour', date_created, 'epoch') ELSE 'infinity' END,
            vote, slot, 1
        FROM public.ballots
        UNION ALL
        SELECT hour, vote, slot, -votes
        FROM public.tally
    ) AS difference
    GROUP BY hour, vote, slot
    HAVING sum(votes) <> 0
    ON CONFLICT (hour, vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
END
$$;

COMMIT;

-- Citus hands on everything but a view's triggers. Every node has them, so that each takes votes.
SELECT nodename, nodeport, success, result
FROM run_command_on_all_nodes($$
    CREATE OR REPLACE TRIGGER votes_change INSTEAD OF INSERT OR UPDATE OR DELETE ON public.votes
    FOR EACH ROW EXECUTE FUNCTION public.change_vote()
$$) JOIN pg_dist_node USING (nodeid);
