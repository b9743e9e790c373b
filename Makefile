# What a person does with catvote. Settings come from the environment and .env: see .env.example.

# The first of these that is Python 3.10 or later with venv makes .venv/. Under pyenv the plain name
# fails when the version of .python-version is not installed.
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10 /usr/bin/python3 /usr/local/bin/python3
# What the shell tells other Pythons does not reach ours; PYTHONPATH is for `import catvote` and `import local`.
unexport $(filter PYTHON%,$(.VARIABLES))
export PYTHONPATH = $(CURDIR):$(CURDIR)/tests

# tests/local/target.py tells psql where the database is. Another command, as in make initdb PSQL='heroku pg:psql'
# or PSQL="psql 'host=h dbname=d'", knows that itself, is fed the same SQL, and needs no packages.
ifneq ($(filter command environment,$(origin PSQL)),)
WITH_DATABASE = sh -c
DATABASE = the database of $$PSQL
INITDB = { echo '\set ON_ERROR_STOP on'; cat schema.sql; } | $(PSQL)
else
PSQL = psql -Xq
WITH_DATABASE = .venv/bin/python -m local.target sh -c
DATABASE = database $${PGDATABASE:-of that user} on $${PGHOST:-this machine}
INITDB = .venv/bin/python -m local.initdb
NEEDED = packages
endif

PYTEST = .venv/bin/python -m pytest
AT_ONCE = -n 5 --dist worksteal -m "not alone"

define REPORT
SELECT vote, votes, repeat('█', (40 * votes / greatest(max(votes) OVER (), 1))::int) AS share
FROM public.vote_totals ORDER BY vote;
SELECT day, vote, votes, repeat('█', (40 * votes / max(votes) OVER ())::int) AS share
FROM public.votes_by_day ORDER BY day, vote;
endef

define DROP
\set ON_ERROR_STOP on
DROP VIEW IF EXISTS public.vote_totals, public.votes_by_day, public.votes_by_hour CASCADE;
DROP TABLE IF EXISTS public.votes, public.tally CASCADE;
DROP FUNCTION IF EXISTS public.count_votes(), public.recount_votes() CASCADE;
endef
export REPORT DROP PSQL

.PHONY: help install packages test-packages run dev check test initdb dropdb report bench scale diagrams card clean

help: ## List these verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

install: test-packages ## Install all packages into .venv/; the other verbs install what they need
packages: REQUIREMENTS = tests/local/requirements.txt
test-packages: REQUIREMENTS = tests/local/requirements.txt tests/requirements.txt
packages test-packages:
	@for python in $(PYTHON); do \
	    if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; \
	    then PYTHONPATH=tests exec $$python -m local.install $(REQUIREMENTS); fi; \
	done; \
	$(firstword $(PYTHON)) -c 'import ensurepip, sys; print(sys.version)' 2>&1 | tail -n 1 >&2; \
	echo 'Python 3.10 or later with venv is needed (apt-get install python3-venv); or make PYTHON=/path/to/python3' >&2; \
	exit 1

run: ## Serve on http://127.0.0.1:8000, with a local PostgreSQL unless DATABASE_URL is set
dev: ## The same, with reload on save and Bottle's debug pages
dev: export DEVELOPMENT = 1
run dev: packages
	@.venv/bin/python -m local.service

check: test-packages ## Find out in 20 seconds whether a change is sound: code style, schema, HTTP
	@.venv/bin/ruff check && .venv/bin/ruff format --check
	@exec $(PYTEST) $(AT_ONCE) tests/test_schema.py tests/test_http.py

test: test-packages ## Run all tests: five at a time, then one by one those that depend on time
	@$(PYTEST) $(AT_ONCE) tests; status=$$?; $(PYTEST) -m alone tests && exit $$status

initdb: $(NEEDED) ## Apply schema.sql to the database, again and again if you like
	@$(INITDB)

dropdb: $(NEEDED) ## Drop what schema.sql made, votes and all; asks first
	@exec $(WITH_DATABASE) 'printf "All votes in %s will be lost. Type yes to go on: " "$(DATABASE)"; \
	read answer; [ "$$answer" = yes ] || { echo "Nothing was dropped."; exit 1; }; echo "$$DROP" | eval "$$PSQL"'

report: $(NEEDED) ## Show the votes, in total and by day
	@exec $(WITH_DATABASE) 'echo "$$REPORT" | eval "$$PSQL"'

bench: test-packages ## Measure how much the service bears; make bench BESIDE=FOLDER: beside another checkout
	@exec .venv/bin/python -m bench $(if $(BESIDE),--beside "$(BESIDE)") $(BENCH)

scale: packages ## Serve as make run does, by two services behind nginx
	@.venv/bin/python -m scale.nginx

diagrams: ## Draw static/structure.svg from its source, by Graphviz
	dot -Tsvg -o static/structure.svg static/structure.dot

card: test-packages ## Draw static/card.png, for links in chats, from the two cats
	@.venv/bin/python -m local.card

clean: ## Remove the packages and all caches; the votes, in .postgres/, stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name .postgres -prune -o -name __pycache__ -prune -exec rm -rf {} +
