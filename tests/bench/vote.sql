-- What pgbench runs: catvote's statement, for one vote.
INSERT INTO public.votes (vote) VALUES (:vote);
