-- What pgbench runs: one vote, stored as plainly as can be.
INSERT INTO public.votes (vote) VALUES (:vote);
