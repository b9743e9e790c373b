-- Makes votes count as they did before there were hours: one counter for each cat and slot, nothing more.
-- For a database of its own, after schema.sql, to see what the hours cost:
--
--    psql -f schema.sql -f tests/bench/without_hours.sql
--    pgbench -n -M prepared -c 8 -T 10 -D vote=Pita -f tests/bench/vote.sql
--
-- beside the same pgbench on a database with schema.sql alone.

BEGIN;

ALTER TABLE public.votes DISABLE TRIGGER USER;

CREATE TABLE public.tally_without_hours (
    vote  text   NOT NULL,
    slot  int    NOT NULL,
    votes bigint NOT NULL,
    CONSTRAINT tally_without_hours_primary_key PRIMARY KEY (vote, slot)
) WITH (fillfactor = 50);

CREATE FUNCTION public.count_votes_without_hours() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    own_slot CONSTANT int := pg_backend_pid() % 32;
BEGIN
    INSERT INTO public.tally_without_hours AS counter
    SELECT vote, own_slot, count(*)
    FROM inserted
    GROUP BY vote
    ORDER BY vote
    ON CONFLICT (vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
    RETURN NULL;
END
$$;

CREATE TRIGGER votes_count_without_hours AFTER INSERT ON public.votes
REFERENCING NEW TABLE AS inserted
FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes_without_hours();

COMMIT;
