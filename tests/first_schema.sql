-- What the first version's schema.sql made: a tally of totals, hours counted from the rows.
CREATE TABLE public.votes (
    row_id       bigint      GENERATED ALWAYS AS IDENTITY,
    date_created timestamptz NOT NULL DEFAULT now(),
    vote         text        NOT NULL,
    CONSTRAINT votes_primary_key PRIMARY KEY (row_id),
    CONSTRAINT votes_vote_is_a_cat CHECK (vote IN ('Gummi', 'Pita'))
);
CREATE INDEX votes_date_created_brin
ON public.votes USING brin (date_created, date_bin('1 hour', date_created, 'epoch')) WITH (autosummarize = on);

CREATE TABLE public.tally (
    vote  text   NOT NULL,
    slot  int    NOT NULL,
    votes bigint NOT NULL,
    CONSTRAINT tally_primary_key PRIMARY KEY (vote, slot)
) WITH (fillfactor = 50);

CREATE FUNCTION public.count_votes() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    own_slot CONSTANT int := pg_backend_pid() % 32;
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO public.tally AS counter
        SELECT vote, own_slot, count(*) FROM inserted GROUP BY vote ORDER BY vote
        ON CONFLICT (vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO public.tally AS counter
        SELECT vote, own_slot, -count(*) FROM deleted GROUP BY vote ORDER BY vote
        ON CONFLICT (vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO public.tally AS counter
        SELECT vote, own_slot, sum(delta)
        FROM (SELECT vote, 1 FROM inserted UNION ALL SELECT vote, -1 FROM deleted) AS c (vote, delta)
        GROUP BY vote ORDER BY vote
        ON CONFLICT (vote, slot) DO UPDATE SET votes = counter.votes + EXCLUDED.votes;
    ELSE
        TRUNCATE public.tally;
    END IF;
    RETURN NULL;
END
$$;
REVOKE EXECUTE ON FUNCTION public.count_votes() FROM PUBLIC;

CREATE TRIGGER votes_count_insert AFTER INSERT ON public.votes
REFERENCING NEW TABLE AS inserted
FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes();
CREATE TRIGGER votes_count_update AFTER UPDATE ON public.votes
REFERENCING NEW TABLE AS inserted OLD TABLE AS deleted
FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes();
CREATE TRIGGER votes_count_delete AFTER DELETE ON public.votes
REFERENCING OLD TABLE AS deleted
FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes();
CREATE TRIGGER votes_count_truncate AFTER TRUNCATE ON public.votes
FOR EACH STATEMENT EXECUTE FUNCTION public.count_votes();

CREATE VIEW public.vote_totals AS
SELECT vote, coalesce(sum(votes), 0)::bigint AS votes
FROM (VALUES ('Gummi'), ('Pita')) AS cat (vote)
FULL JOIN public.tally USING (vote)
GROUP BY vote
ORDER BY vote;
CREATE VIEW public.votes_by_hour AS
SELECT date_bin('1 hour', date_created, 'epoch') AS hour, vote, count(*) AS votes
FROM public.votes
GROUP BY hour, vote
ORDER BY hour, vote;
