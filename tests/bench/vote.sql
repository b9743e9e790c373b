-- What pgbench runs: catvote's own statement.
INSERT INTO public.votes (vote) VALUES (:vote);
