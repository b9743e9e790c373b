"""More than one database server: the service on Citus, a coordinator and two workers, as tests/scale/README.md has it.

Skipped where Citus is not installed, in continuous integration, too: it is in no package registry.
"""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from client import get, vote
from faults import kill, sql
from load import Load, assert_kept
from local.postgres import LocalPostgres
from local.processes import wait_until
from local.service import Service
from test_scale import FOLDER, guide

pytestmark = pytest.mark.alone


class Cluster:
    """A coordinator and two workers, set up as the guide says, with citus.sql applied. stop() ends them."""

    def __init__(self):
        self.nodes = []
        for _ in range(3):
            self.start_node()
        addresses = iter(self.nodes)
        self.psql(re.sub(r"'[\w-]+\.example', 5432", lambda _: self.address(next(addresses)), guide("nodes")))
        self.apply_schema()

    def start_node(self):
        """Start one more server with Citus, by itself as yet; return it."""
        # The nodes log in to each other, by a password that they share.
        folder = None
        if self.nodes:
            folder = Path(self.nodes[0].base_dir, f"worker-{len(self.nodes)}")
            folder.mkdir()
            (folder / "password").write_text(self.nodes[0].password)
        options = dict(line.split(" = ") for line in guide("settings").replace("'", "").splitlines())
        # Else a server started by root looks for certificates in root's home, where it may not enter.
        options["citus.node_conninfo"] = "sslmode=disable"
        node = LocalPostgres(base_dir=folder, durable=True, options=options)
        self.nodes.append(node)
        self.psql(guide("every-node").replace("the password", node.password), node)
        return node

    def address(self, node):
        """Return a node's address as arguments of Citus's functions."""
        return f"'127.0.0.1', {node.settings['port']}"

    @property
    def url(self):
        return self.nodes[0].url()

    def psql(self, commands, node=None):
        """Have psql run commands on a node, by default the coordinator; return what it prints."""
        node = node or self.nodes[0]
        command = [node.bindir / "psql", "-XAtq", "--set=ON_ERROR_STOP=1", node.url()]
        program = subprocess.run(command, input=commands, capture_output=True, text=True)
        assert program.returncode == 0, program.stderr
        return program.stdout

    def apply_schema(self):
        self.psql((FOLDER / "citus.sql").read_text())

    def keepers(self):
        """Return the nodes that keep rows of votes, that with most of them first."""
        ports = self.psql("""
            SELECT nodeport FROM run_command_on_placements('public.ballots', 'SELECT count(*) FROM %s')
            GROUP BY nodeport HAVING sum(result::int) > 0 ORDER BY sum(result::int) DESC
        """)
        return [node for port in ports.split() for node in self.nodes if node.settings["port"] == int(port)]

    def stop(self):
        for node in reversed(self.nodes):
            node.stop()


@pytest.fixture(scope="module")
def nodes(server):
    """The Cluster of all tests."""
    if not sql(server.url(), "SELECT 1 FROM pg_available_extensions WHERE name = 'citus'"):
        pytest.skip("no Citus: https://docs.citusdata.com/en/stable/installation/multi_node.html")
    cluster = Cluster()
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(nodes):
    """The Cluster, without votes."""
    for node in nodes.nodes:
        node.start()
    nodes.psql("TRUNCATE public.ballots; SELECT public.recount_votes();")
    return nodes


def totals(url):
    """Return the votes for each cat, by the tally."""
    return dict(sql(url, "SELECT vote, votes FROM public.vote_totals"))


def assert_exact(url):
    """Compare all that is read from counters with the rows."""
    rows = dict(sql(url, "SELECT vote, count(*) FROM public.votes GROUP BY vote"))
    assert totals(url) == {"Gummi": 0, "Pita": 0} | rows
    counted = """
        SELECT date_bin('1 hour', date_created, 'epoch') AS hour, vote, count(*)
        FROM public.votes WHERE isfinite(date_created) GROUP BY hour, vote ORDER BY hour, vote
    """
    assert sql(url, "SELECT hour, vote, votes FROM public.votes_by_hour") == sql(url, counted)


# What does not change


def test_the_service_runs_unchanged(cluster):
    sql(cluster.url, "TRUNCATE public.ballots, public.tally")
    cluster.apply_schema()
    assert totals(cluster.url) == {"Gummi": 0, "Pita": 0}
    with Service(cluster.url) as service:
        assert get(service, "/").votes == {"Gummi": 0, "Pita": 0}
        voted = vote(service)
        assert (voted.status, voted.headers["Location"]) == (303, "/?voted=Pita")
        assert get(service, "/?voted=Pita").votes == {"Gummi": 0, "Pita": 1}
        assert get(service, "/history").status == get(service, "/healthz").status == 200


def test_only_cats_are_stored(cluster):
    with pytest.raises(psycopg.errors.CheckViolation, match="votes_vote_is_a_cat"):
        sql(cluster.url, "INSERT INTO public.votes (vote) SELECT unnest('{Pita,Bella}'::text[])")
    assert_exact(cluster.url)
    assert totals(cluster.url) == {"Gummi": 0, "Pita": 0}


def test_days_are_those_of_the_reader(cluster):
    sql(cluster.url, "INSERT INTO public.votes (vote, date_created) VALUES ('Pita', '2026-03-01 18:40+00')")
    with psycopg.connect(cluster.url) as connection:
        for zone, day in ("UTC", "2026-03-01"), ("Asia/Kolkata", "2026-03-02"):
            connection.execute(f"SET TIME ZONE '{zone}'")
            assert connection.execute("SELECT day::text, vote, votes FROM public.votes_by_day").fetchall() == [
                (day, "Pita", 1)
            ]


def test_a_role_may_be_allowed_to_vote_and_no_more(cluster):
    cluster.psql(guide("role"))
    forged = "CREATE TRIGGER forged BEFORE DELETE ON mine FOR EACH ROW EXECUTE FUNCTION public.change_vote()"
    for node in cluster.nodes:
        url = node.url().replace(f"postgres:{node.password}", "voter:another password".replace(" ", "%20"))
        with Service(url) as service:
            assert vote(service).status == 303
            assert get(service, "/?voted=Pita").votes == totals(cluster.url)
            assert get(service, "/history").status == 200
        assert sql(url, "SELECT sum(votes) FROM public.votes_by_day") == [(sum(totals(cluster.url).values()),)]
        for forbidden in (
            "DELETE FROM public.votes",
            "INSERT INTO public.tally VALUES (now(), 'Pita', 1, 1000)",
            f"CREATE TEMP TABLE mine (vote text); {forged}",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                sql(url, forbidden)
    assert totals(cluster.url) == {"Gummi": 0, "Pita": 3}


# SQL that changes votes


def test_update_delete_and_copy_keep_the_tally_at_any_node(cluster):
    for node in cluster.nodes:
        with psycopg.connect(node.url(), autocommit=True) as connection:
            with connection.cursor().copy("COPY public.votes (date_created, vote) FROM STDIN") as rows:
                for hour in range(10):
                    rows.write_row((f"2026-03-01 {hour}:30+00", "Pita"))
                rows.write_row(("infinity", "Pita"))
                rows.write_row(("-infinity", "Gummi"))
            for change in (
                "UPDATE public.votes SET vote = 'Gummi' WHERE date_created < '2026-03-01 02:00+00'",
                "UPDATE public.votes SET date_created = date_created + interval '1 day'",
                "DELETE FROM public.votes WHERE vote = 'Pita'",
            ):
                assert connection.execute(change).rowcount > 0
                assert_exact(cluster.url)
            assert connection.execute("DELETE FROM public.votes").rowcount == 3
            assert totals(cluster.url) == {"Gummi": 0, "Pita": 0}


def test_a_vote_that_was_changed_after_another_had_read_it_is_counted_once(cluster):
    sql(cluster.url, "INSERT INTO public.votes (vote) VALUES ('Gummi'), ('Pita')")
    with ThreadPoolExecutor() as threads, psycopg.connect(cluster.url) as first:
        first.execute("DELETE FROM public.votes WHERE vote = 'Gummi'")
        second = threads.submit(sql, cluster.nodes[1].url(), "DELETE FROM public.votes")
        wait_until(lambda: somebody_waits(cluster))
        sql(cluster.url, "UPDATE public.votes SET date_created = now() - interval '1 day' WHERE vote = 'Pita'")
        first.rollback()
        with pytest.raises(psycopg.errors.SerializationFailure, match="please try again"):
            second.result()
    assert_exact(cluster.url)


def somebody_waits(cluster):
    """Return whether a server process of some node waits for a lock."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    return any(sql(node.url(), waiting) for node in cluster.nodes)


def test_a_connection_keeps_to_one_slot_of_its_own(cluster):
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute("INSERT INTO public.votes (vote) VALUES ('Gummi'), ('Pita')")
        slots = connection.execute("SELECT DISTINCT slot FROM public.ballots").fetchall()
        assert slots == [(connection.info.backend_pid % 32,)]


def test_a_dump_of_one_server_is_loaded(cluster, server, database):
    sql(database, "INSERT INTO votes (vote) SELECT unnest('{Gummi,Pita,Pita}'::text[]) FROM generate_series(1, 400)")
    sql(database, "DELETE FROM votes WHERE row_id BETWEEN 100 AND 200")
    variables = {**os.environ, "OLD": database, "NEW": cluster.url, "PATH": f"{os.environ['PATH']}:{server.bindir}"}
    shell = subprocess.run(["sh", "-ec", guide("dump")], env=variables, capture_output=True, text=True)
    assert (shell.returncode, shell.stderr) == (0, "")
    rows = "SELECT row_id, date_created, vote FROM votes ORDER BY row_id"
    assert sql(cluster.url, rows) == sql(database, rows)
    assert_exact(cluster.url)
    # Rows have spread over both nodes, and the next vote gets the next number.
    assert len(cluster.keepers()) == 2
    sql(cluster.url, "INSERT INTO votes (vote) VALUES ('Pita')")
    assert sql(cluster.url, "SELECT max(row_id) FROM votes") == [(1201,)]


def test_two_recounts_take_turns_and_no_vote_waits_for_them(cluster):
    past_the_view = "INSERT INTO public.ballots (slot, row_id, vote) VALUES (99, 1, 'Pita')"
    sql(cluster.url, past_the_view)
    with ThreadPoolExecutor() as threads, psycopg.connect(cluster.url) as first:
        first.execute("SELECT public.recount_votes()")
        second = threads.submit(sql, cluster.nodes[1].url(), "SELECT public.recount_votes()")
        wait_until(lambda: somebody_waits(cluster))
        sql(cluster.url, "SET lock_timeout = '5s'; INSERT INTO public.votes (vote) VALUES ('Pita')")
        first.commit()
        second.result()
    assert_exact(cluster.url)
    assert totals(cluster.url)["Pita"] == 2


# Nodes


def test_no_vote_is_lost_when_a_node_is_killed_and_pages_go_on(cluster):
    with Service(cluster.url) as service, Load(service) as load:
        wait_until(lambda: len(load.acknowledged) > 100)
        node = cluster.keepers()[0]
        kill(node)
        wait_until(lambda: any(each.path == "/" and each.outdated for each in load.answers))
        node.start()
        before = len(load.votes)
        wait_until(lambda: len(load.votes) > before + 40 and {each.status for each in load.votes[-20:]} == {303})
    assert_kept(load, service)
    assert {page.status for page in load.answers if page.path == "/"} == {200}
    assert_exact(cluster.url)
