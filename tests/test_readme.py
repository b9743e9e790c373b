"""Nothing in README.md may rot: what it quotes, names, links to, shows and says is compared with the project.

The first words after a fence's backticks say how its text is tested: its language, then

    FILE    these lines stand in that file, in this order, nothing between them
    run     Python that defines a WSGI application
    psql    psql runs it

A `console` fence has commands after `$ ` with what they print; `...` stands for any lines. Figures may differ.
A `sh` fence is for people: only what it names is tested.
"""

import ast
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from itertools import groupby
from typing import NamedTuple
from urllib.parse import quote
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import psycopg
import pytest
from client import get, vote
from conftest import missing, new_database
from gunicorn.config import KNOWN_SETTINGS
from local import ROOT
from local.service import Service

import catvote

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PROCFILE = (ROOT / "Procfile").read_text()
FILES = {
    str(path.relative_to(ROOT)): path.read_text()
    for pattern in ("*", ".env.example", ".gitignore", ".python-version", "views/*", "static/*", "tests/**/*")
    for path in sorted(ROOT.glob(pattern))
    if path.is_file() and path.suffix not in (".png", ".pyc") and path.name not in ("README.md", "test_readme.py")
}
VERBS = {"run", "psql"}


class Fence(NamedTuple):
    """A fenced block: its language, its marks, its text, and the README's line where it begins."""

    language: str
    marks: tuple
    text: str
    line: int


def fences():
    """Return all fenced blocks."""
    blocks = re.finditer(r"^( *)```(\S+)(.*)\n((?:.*\n)*?)\1```$", README, re.MULTILINE)
    return [
        Fence(
            block[2],
            tuple(block[3].split()),
            re.sub(f"^{block[1]}", "", block[4], flags=re.MULTILINE),
            README.count("\n", 0, block.start()) + 1,
        )
        for block in blocks
    ]


FENCES = fences()
PROSE = re.sub(r"^( *)```.*\n(?:.*\n)*?\1```$", "", README, flags=re.MULTILINE)


def marked(*marks):
    """Parametrize a test with all fences that have one of these marks or languages."""
    chosen = [fence for fence in FENCES if {fence.language, *fence.marks} & {*marks}]
    assert chosen
    return pytest.mark.parametrize("fence", chosen, ids=[f"line {fence.line}" for fence in chosen])


def table(heading):
    """Return the rows of the table whose first column has that heading, each as a list of cells."""
    lines = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines.splitlines()]


def plain(text):
    """Return a text's lines without figures, lengths of bars and widths of columns; of equal lines only the first."""
    for pattern, replacement in ((r"\d+(?:[.,]\d+)*", "0"), ("--+", "--"), ("█+", "█"), (" +", " ")):
        text = re.sub(pattern, replacement, text)
    return [line for line, _ in groupby(line.rstrip() for line in text.strip("\n").splitlines())]


def assert_printed(expected, printed):
    """Compare what a fence shows with what a program has printed."""
    pattern = "\n".join(re.escape(line) for line in plain(expected)).replace(r"\.\.\.", "(?:.*\n)*?.*")
    assert re.fullmatch(pattern, "\n".join(plain(printed))), f"expected:\n{expected}\nprinted:\n{printed}"


# What it quotes


def test_fences_are_closed_and_say_how_they_are_tested():
    assert README.count("```") == 2 * len(FENCES)
    for fence in FENCES:
        assert fence.marks or fence.language in ("sh", "console"), fence
        assert all(mark in VERBS or mark in FILES for mark in fence.marks), fence


@marked(*FILES)
def test_an_excerpt_stands_in_its_file(fence):
    for name in {*fence.marks} - VERBS:
        assert "\n" + fence.text in "\n" + FILES[name]


@marked("run")
def test_the_smallest_application_is_one(fence, tmp_path):
    module = tmp_path / "smallest.py"
    module.write_text(fence.text)
    application = validator(runpy.run_path(module)["app"])
    environ = {"PATH_INFO": "/x", "SCRIPT_NAME": "", "QUERY_STRING": ""}
    setup_testing_defaults(environ)
    answer = application(environ, lambda status, headers, exc_info=None: print)
    assert b"".join(answer).endswith(b"/x")
    answer.close()


# What it names


def spans():
    """Return all code spans of the prose."""
    return set(re.findall("`` (.+?) ``", PROSE)) | set(re.findall("(?<!`)`([^`\n]+)`(?!`)", PROSE))


# What others make, or the reader might: it is in no file of ours.
FOREIGN = {
    "% if ...:",
    "&lt;",
    "<% ... %>",
    "ALTER TABLE",
    "FORWARDED_ALLOW_IPS",
    "\\d+ votes",
    "gunicorn hello:app",
    "hello.py",
    "heroku apps:destroy",
    "heroku logs --tail",
    "heroku ps:scale web=2:standard-1x",
    "https://cats.example",
    "proxy_set_header Host $http_host",
    'psql "$DATABASE_URL"',
    "{{...}}",
}


def test_all_that_it_names_exists():
    texts = [*FILES.values(), *(fence.text for fence in FENCES)]
    others = {span for span in spans() if not any(span in text for text in texts)}
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir()}
    verbs = {span for span in others if span.startswith("make ")}  # see below
    assert others - folders - verbs - FILES.keys() - set(filter(is_request, others)) <= FOREIGN


def is_request(text):
    """Return whether a text is a request that the service knows, as `GET /`."""
    return any(re.match(f"{method} {pattern}$", text) for method, pattern in routes())


def routes():
    """Return the service's requests, as (method, regular expression)."""
    return [(route.method, re.sub("<.*?>", ".+", route.rule)) for route in catvote.routes.routes]


def test_files_that_it_names_exist():
    suffixes = "py|sql|tpl|svg|png|css|js|txt|dot"
    names = {span for span in spans() if re.fullmatch(rf"[\w./-]+\.(?:{suffixes})", span)}
    assert len(names) > 5
    assert [name for name in names - FOREIGN if not (ROOT / name).exists() and not name.startswith(".")] == []


def test_verbs_that_it_names_exist_and_none_is_left_out():
    verbs = {*re.search(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)[1].split()}
    named = set(re.findall(r"(?:`|^ *(?:\$ )?)make ([a-z]+)", README, re.MULTILINE))
    assert named <= verbs
    assert {verb for verb in verbs if re.search(rf"^{verb}:.*##", MAKEFILE, re.MULTILINE)} == named


def test_requests_that_it_lists_are_those_that_the_service_knows():
    listed = {cells[0].strip("`").replace("...", "<path:path>") for cells in table("request")}
    assert listed == {f"{route.method} {route.rule}" for route in catvote.routes.routes}


# The way of a vote


def steps():
    """Return the texts of the numbered steps."""
    section = PROSE.partition("## The way of a vote")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. (.*\n(?:   .*\n)*)", section, re.MULTILINE)


def functions_of_the_module():
    """Return the names of all functions and methods in catvote.py."""
    tree = ast.parse(FILES["catvote.py"])
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def calls_of(work):
    """Do some work; return the names of the functions of catvote.py that were called, in any thread, in order."""
    names = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename == catvote.__file__:
            names.append(frame.f_code.co_name)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return names


def test_the_steps_name_functions_in_the_order_in_which_a_vote_calls_them(monkeypatch, database):
    monkeypatch.setenv("DATABASE_URL", database)
    monkeypatch.setattr(catvote, "vote_pool", catvote.Pool("votes", 1))
    monkeypatch.setattr(catvote, "page_pool", catvote.Pool("pages", 1))

    def answer(method, path, query="", body=b""):
        environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "wsgi.input": io.BytesIO(body)}
        environ |= {"CONTENT_TYPE": "application/x-www-form-urlencoded", "CONTENT_LENGTH": str(len(body))}
        setup_testing_defaults(environ)
        return b"".join(catvote.app(environ, lambda status, headers, *error: None))

    def vote_and_look():
        answer("POST", "/add", body=b"vote=Pita")
        assert b'role="status"' in answer("GET", "/", query="voted=Pita")

    called = iter(calls_of(vote_and_look))
    code = dict.fromkeys(name for step in steps() for name in re.findall(r"`(\w+)`", step))  # each once
    told = [name for name in code if name in functions_of_the_module()]
    assert len(steps()) == 10
    assert len(told) > 10
    # `in` an iterator looks on from where it stopped.
    assert [name for name in told if name not in called] == []
    catvote.vote_pool.close()
    catvote.page_pool.close()


# Configuration


def read_from_environment(text):
    """Return the names of the environment's variables that a Python text reads."""
    assert "import environ" not in text and "import getenv" not in text
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
            names.add(node.args[0].value)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            names.add(node.slice.value)
    return names


def test_the_configuration_table_has_what_the_code_reads():
    read = read_from_environment(FILES["catvote.py"]) | read_from_environment(FILES["gunicorn.conf.py"])
    bind = next(setting for setting in KNOWN_SETTINGS if setting.name == "bind")
    assert "``PORT`` environment variable" in bind.desc  # that one gunicorn reads by itself
    assert {cells[0].strip("`") for cells in table("variable")} == read | {"PORT"}


def test_the_example_of_dotenv_has_the_same_variables():
    variables = set(re.findall(r"^#?([A-Z_]+)=", FILES[".env.example"], re.MULTILINE))
    assert variables == {cells[0].strip("`") for cells in table("variable")}


def test_defaults_that_it_tells_are_those_of_the_code():
    defaults = {cells[0].strip("`"): cells[2] for cells in table("variable")}
    assert f'"WEB_CONCURRENCY") or {defaults["WEB_CONCURRENCY"]})' in FILES["gunicorn.conf.py"]
    assert f'"{defaults["PORT"].partition(",")[0]}"' in FILES["tests/local/service.py"]


def test_numbers_that_it_tells_are_those_of_the_code():
    """Others stand in code spans with their names, as `VOTES_A_STATEMENT = 8`: these are in the code, see above."""
    connections = catvote.vote_pool.max_size + catvote.page_pool.max_size
    heroku = 20
    threads = int(re.search(r"^threads = (\d+)$", FILES["gunicorn.conf.py"], re.MULTILINE)[1])
    slots = int(re.search(r"pg_backend_pid\(\) % (\d+)", FILES["schema.sql"])[1])
    assert f"POOLED = {2 * connections} " in FILES["tests/bench/loads.py"]
    true = {"connections": {connections, 2 * connections, heroku}, "threads": {threads}, "counters": {slots}}
    for things, numbers in true.items():
        told = {int(number) for number in re.findall(rf"(\d+) {things}", " ".join(README.split()))}
        assert told == numbers, things


# What it links to


def headings():
    """Return (depth, text) of all headings."""
    return [(len(marks), text) for marks, text in re.findall("^(#+) (.*)$", PROSE, re.MULTILINE)]


def slug(heading):
    """Return the anchor that code hosts give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_anchors_are_unique():
    anchors = [slug(text) for _, text in headings()]
    assert len(set(anchors)) == len(anchors)


def test_local_links_and_anchors_resolve():
    anchors = {slug(text) for _, text in headings()}
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE)
    assert len(links) > 30
    for link in links:
        target, _, anchor = link.partition("#")
        if link.startswith("#"):
            assert anchor in anchors
        elif not link.startswith("https://"):
            assert (ROOT / target).is_file(), link


def test_the_contents_have_every_heading_in_order():
    contents = PROSE.partition("\n## ")[0]
    assert re.findall(r"\[(.*?)\]\(#(.*?)\)", contents) == [
        (text, slug(text)) for depth, text in headings() if depth > 1
    ]


def test_pictures_are_described_and_small():
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", README)
    assert len(pictures) == 3
    for description, name in pictures:
        assert len(description) > 40
        assert name.endswith((".svg", ".png"))
        assert (ROOT / name).stat().st_size < 150_000


# What it shows


@pytest.fixture(scope="module")
def votes(server, template):
    """Name of a database with votes and a flood, to be copied, and with the table of the Flask app."""
    with new_database(server, template) as url:
        with psycopg.connect(url) as connection:
            connection.execute(
                """
                SET timezone = 'UTC';
                INSERT INTO votes (date_created, vote)
                SELECT hour + number * interval '1 second', CASE WHEN number < 4 THEN 'Pita' ELSE 'Gummi' END
                FROM generate_series(date_trunc('day', now()) - interval '2 days', now(), '1 hour') AS hour,
                     generate_series(1, 5) AS number
                UNION ALL
                SELECT date_trunc('day', now()) - interval '12 hours' + number * interval '0.2 seconds', 'Gummi'
                FROM generate_series(1, 200) AS number
                ORDER BY 1;
                CREATE TABLE model (row_id serial PRIMARY KEY, date_created timestamp DEFAULT now(), vote varchar);
                INSERT INTO model (vote) VALUES ('Pita'), ('Gummi'), ('Pita'), ('Garfield');
                """
            )
        yield url.rpartition("/")[2]


@pytest.fixture
def copy(server, votes):
    """URL of a copy of that database, for one test; afterwards the roles that recipes make are gone, too."""
    with new_database(server, votes) as url:
        yield url
        with psycopg.connect(url, autocommit=True) as connection:
            for (role,) in connection.execute("SELECT rolname FROM pg_roles WHERE rolname ~ '^catvote_'").fetchall():
                connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def environment(server, **variables):
    """Return the environment for commands: no trace of the make that may run the tests, and times in UTC."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}:{server.bindir}"
    return {"PATH": path, "HOME": os.environ.get("HOME", "/"), "LC_ALL": "C.UTF-8", "PGTZ": "UTC", **variables}


def inexact(url):
    """Return the rows where the tally differs from the votes."""
    with psycopg.connect(url) as connection:
        return connection.execute(
            "TABLE vote_totals EXCEPT SELECT vote, count(row_id) FROM vote_totals"
            " LEFT JOIN votes USING (vote) GROUP BY vote"
        ).fetchall()


def psql(server, url, text, folder):
    """Return what psql prints for that input."""
    process = subprocess.run(
        [server.bindir / "psql", "-X", "--set=ON_ERROR_STOP=1", url],
        input=text,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(server),
    )
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


@marked("psql")
def test_a_recipe_runs_in_psql(fence, copy, server, tmp_path):
    assert psql(server, copy, fence.text, tmp_path)
    assert inexact(copy) == []
    for file in re.findall(r"\\copy .* TO '(.*?)'", fence.text):
        assert len((tmp_path / file).read_text().splitlines()) > 2


def test_the_role_that_may_only_vote_is_all_that_the_service_needs(copy, server, tmp_path):
    (recipe,) = [fence.text for fence in FENCES if "CREATE ROLE catvote_service" in fence.text]
    psql(server, copy, recipe, tmp_path)
    password = re.search("PASSWORD '(.*)'", recipe)[1]
    with Service(re.sub("//.*@", f"//catvote_service:{quote(password)}@", copy)) as service:
        assert vote(service).status == 303
        for target in ("/", "/?voted=Pita", "/tally.json", "/history", "/healthz"):
            assert get(service, target).status == 200


@pytest.fixture(scope="module")
def console(server, votes):
    """A function that runs a shell command as a reader would who has `make run` in another terminal."""
    if not shutil.which("curl"):
        missing("no curl: apt-get install curl")
    with new_database(server, votes) as url, Service(url) as service:

        def run(command):
            process = subprocess.run(
                command.replace("http://127.0.0.1:8000", service.url),
                shell=True,
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=environment(server, DATABASE_URL=url),
                stdin=subprocess.DEVNULL,
            )
            assert (process.returncode, process.stderr) == (0, "")
            return process.stdout.replace("\r\n", "\n")

        yield run


@marked("console")
def test_a_command_prints_what_is_shown(fence, console):
    for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", fence.text, re.MULTILINE):
        assert_printed(output, console(command))


# The diagrams


def labels(name):
    """Return the texts of an SVG file."""
    root = ET.fromstring(FILES[name])
    return [" ".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_structure_is_drawn_from_its_source():
    written = re.findall(r'label="([^"]*)"', FILES["static/structure.dot"])
    lines = [line.strip() for label in written for line in re.split(r"\\l", label) if line.strip()]
    assert sorted(labels("static/structure.svg")) == sorted(lines)


# Words of the diagrams that are neither code nor files.
TITLES = {"browser", "pool", "PostgreSQL", "psql", "HTTP", ".env, or Heroku's config vars", "outside", "ours"}


def test_names_in_the_structure_exist():
    names = [label for label in labels("static/structure.svg") if re.fullmatch(r"[\w.]+/?", label)]
    assert len(names) > 10
    texts = "\n".join(FILES.values())
    assert [name for name in names if name not in TITLES and not (ROOT / name).exists() and name not in texts] == []


def test_edges_of_the_structure_exist():
    edges = set(re.findall(r"^  (\w+ -> \w+) \[label", FILES["static/structure.dot"], re.MULTILINE))
    module, local = FILES["catvote.py"], FILES["tests/local/postgres.py"] + FILES["tests/local/service.py"]
    evidence = {
        "makefile -> local": "-m local.service" in MAKEFILE,
        "makefile -> psql": "PSQL = psql" in MAKEFILE,
        "local -> postgres": "class LocalPostgres" in local,
        "local -> module": "initdb" in local,
        "procfile -> gunicorn": "web: gunicorn" in PROCFILE,
        "procfile -> module": "catvote.initdb()" in PROCFILE,
        "browser -> gunicorn": True,
        # PORT is read by gunicorn itself.
        "environment -> gunicorn": read_from_environment(FILES["gunicorn.conf.py"])
        == {"WEB_CONCURRENCY", "DEVELOPMENT"},
        "environment -> module": {"DATABASE_URL", "SITE_URL"} <= read_from_environment(module),
        "gunicorn -> conf": "threads" in FILES["gunicorn.conf.py"],
        "gunicorn -> module": "def app(environ, start_response)" in module,
        "module -> views": 'render("' in module,
        "views -> static": "static_url(" in FILES["views/index.tpl"],
        "module -> static": "STATIC_FILES" in module,
        "module -> postgres": "vote_pool = Pool(" in module,
        "module -> schema": '"schema.sql"' in module,
        "schema -> postgres": "CREATE OR REPLACE TRIGGER" in FILES["schema.sql"],
        "psql -> postgres": "$(PSQL)" in MAKEFILE,
    }
    assert edges == evidence.keys()
    assert [edge for edge, found in evidence.items() if not found] == []


def test_requests_and_names_in_the_logic_exist():
    text = "\n".join(labels("static/logic.svg"))
    requests = re.findall(r"(GET|POST) (/[\w.]*)", text)
    assert len(requests) == 3
    for method, path in requests:
        assert is_request(f"{method} {path}")
    names = re.findall(r"\b\w+_\w+\b|\b\w+\.tpl\b|\b\w+\.py\b", text)
    assert len(names) > 8
    known = "\n".join([*FILES, FILES["catvote.py"], FILES["schema.sql"]])
    assert [name for name in names if name not in known] == []


@pytest.mark.parametrize("name", ["static/structure.svg", "static/logic.svg"])
def test_diagrams_are_legible_on_any_background_and_load_nothing(name):
    assert "#fdf3e3" in FILES[name]  # a ground of their own
    assert not re.search(r"(?:href|src|url)[=(]\W*(?:https?:|//|data:)", FILES[name])
