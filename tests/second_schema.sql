-- What the second version's schema.sql changed in a database of the first: hours beside the totals.
-- (Of its triggers tests need the one for INSERT alone.)
ALTER TABLE public.tally
    ADD COLUMN hour timestamptz NOT NULL DEFAULT '-infinity',
    DROP CONSTRAINT tally_primary_key,
    ADD CONSTRAINT tally_primary_key PRIMARY KEY (hour, vote, slot);

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
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE VIEW public.vote_totals AS
SELECT vote, coalesce(sum(votes), 0)::bigint AS votes
FROM (VALUES ('Gummi'), ('Pita')) AS cat (vote)
FULL JOIN (SELECT vote, votes FROM public.tally WHERE hour = '-infinity') AS counter USING (vote)
GROUP BY vote
ORDER BY vote;
CREATE OR REPLACE VIEW public.votes_by_hour AS
SELECT hour, vote, sum(votes)::bigint AS votes
FROM public.tally
WHERE hour > '-infinity'
GROUP BY hour, vote
HAVING sum(votes) <> 0
ORDER BY hour, vote;
