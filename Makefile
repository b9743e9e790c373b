# What a person does with catvote. Settings come from the environment and .env: see .env.example.

PYTHON ?= python3
BIN = .venv/bin
# For `import catvote` and `import local`, whatever the shell says.
export PYTHONPATH = $(CURDIR):$(CURDIR)/tests

# The environment wins over .env, whose values python-dotenv keeps whole: make would expand their $.
DOTENV = $(if $(wildcard .env),$(BIN)/dotenv run --no-override --)

# tests/local/postgres.py tells psql where the database is. Another command, as in
# make initdb PSQL='heroku pg:psql', knows that itself and is fed the same SQL.
ifneq ($(filter command environment,$(origin PSQL)),)
WITH_PSQL = sh -c
DATABASE = the database of $(PSQL)
else
PSQL = psql -Xq
WITH_PSQL = $(DOTENV) $(BIN)/python -m local.postgres sh -c
DATABASE = database $${PGDATABASE:-of that user} on $${PGHOST:-this machine}
NEEDED = install
endif

define REPORT
SELECT vote, votes, repeat('█', (40 * votes / greatest(max(votes) OVER (), 1))::int) AS share
FROM public.vote_totals ORDER BY vote;
SELECT day, vote, votes, repeat('█', (40 * votes / max(votes) OVER ())::int) AS share
FROM public.votes_by_day ORDER BY day, vote;
endef

define DROP
\set ON_ERROR_STOP on
BEGIN;
DROP VIEW IF EXISTS public.vote_totals, public.votes_by_day, public.votes_by_hour CASCADE;
DROP TABLE IF EXISTS public.votes, public.tally CASCADE;
DROP FUNCTION IF EXISTS public.count_votes(), public.recount_votes() CASCADE;
COMMIT;
endef
export REPORT DROP

.PHONY: help install run dev test initdb dropdb report bench diagrams card clean

help: ## List these verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

install: .venv/installed ## Install the packages, into .venv/
.venv/installed: requirements.txt tests/local/requirements.txt tests/requirements.txt
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	{ echo '$(PYTHON) must be Python 3.10 or later with venv: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

run: ## Serve on http://127.0.0.1:8000, with a local PostgreSQL unless DATABASE_URL is set
dev: ## The same, with reload on save and Bottle's debug pages
dev: export DEVELOPMENT = 1
run dev: install
	@exec $(DOTENV) $(BIN)/python -m local.service

test: install ## Run all tests
	@exec $(BIN)/python -m pytest -n 2 --dist loadfile tests

initdb: $(NEEDED) ## Apply schema.sql to the database, again and again if you like
	@exec $(WITH_PSQL) "{ echo '\set ON_ERROR_STOP on'; cat schema.sql; } | $(PSQL)"

dropdb: $(NEEDED) ## Drop what schema.sql made, votes and all; asks first
	@exec $(WITH_PSQL) 'printf "All votes in %s will be lost. Type yes to go on: " "$(DATABASE)"; \
	read answer; [ "$$answer" = yes ] || { echo "Nothing was dropped."; exit 1; }; echo "$$DROP" | $(PSQL)'

report: $(NEEDED) ## Show the votes, in total and by day
	@exec $(WITH_PSQL) 'echo "$$REPORT" | $(PSQL)'

bench: install ## Measure how much the service bears
	@exec $(BIN)/python tests/bench.py

.PHONY: scale
scale: install ## Serve as make run does, by two services behind nginx
	@exec $(DOTENV) $(BIN)/python -m scale.nginx

diagrams: ## Draw static/structure.svg from its source, by Graphviz
	dot -Tsvg -o static/structure.svg static/structure.dot

card: install ## Draw static/card.png, for links in chats, from the two cats
	@exec $(BIN)/python tests/card.py

clean: ## Remove the packages and all caches; the votes, in .postgres/, stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__
