"""Nothing in README.md may rot: what it quotes, names, links to and shows is compared with the project.

The words after a fence's backticks say how it is tested. After its language, a file's name means that these lines stand
there, and `psql` that psql runs it, also in tests/scale/README.md. A `console` or `psql` fence has commands after a
prompt, with what they print; `...` stands for any lines. A `sh` fence is for people: only what it names is tested.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from urllib.parse import quote
from xml.etree import ElementTree

import psycopg
import pytest
import sessions
from client import get, vote
from conftest import missing
from local import ROOT
from local.service import Service

import catvote

README = (ROOT / "README.md").read_text()
FILES = {
    str(path.relative_to(ROOT)): path.read_text()
    for pattern in ("*", ".env.example", "views/*", "static/*.[cj]s*", "tests/local/*.py")
    for path in ROOT.glob(pattern)
    if path.is_file() and path.name != "README.md"
}
Fence = namedtuple("Fence", "language marks text")
FENCE = r"(?m)^( *)```(\S+)(.*)\n((?:.*\n)*?)\1```$"


def fences(document):
    """Return all fenced blocks of a document."""
    blocks = re.findall(FENCE, document)
    return [Fence(word, marks.split(), re.sub(f"(?m)^{indent}", "", text)) for indent, word, marks, text in blocks]


FENCES = fences(README)
EXCERPTS = [(name, fence.text) for fence in FENCES for name in fence.marks if name != "psql"]
RECIPES = [each for each in FENCES + fences((ROOT / "tests/scale/README.md").read_text()) if "psql" in each.marks]
TYPED = [fence for fence in FENCES if fence.language in ("console", "psql")]
PROSE = re.sub(FENCE, "", README)


def cells(heading):
    """Return the first cells of the table whose first column has that heading."""
    rows = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)[1]
    return {row.split("|")[1].strip(" `") for row in rows.splitlines()}


# What it quotes and names


def test_every_fence_is_tested():
    tested = [fence for fence in FENCES if fence.marks or fence in TYPED or fence.language == "sh"]
    assert README.count("```") == 2 * len(tested)


@pytest.mark.parametrize(("name", "text"), EXCERPTS)
def test_an_excerpt_stands_in_its_file(name, text):
    assert "\n" + text in "\n" + (ROOT / name).read_text()


def test_names_of_functions_files_and_the_like_exist():
    texts = "\n".join(FILES.values())
    names = {name for name in re.findall(r"`([\w./-]+)`", PROSE) if not (ROOT / name).exists()}
    others_make = {"curl", "www."}
    assert others_make == {name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", texts)}


def test_verbs_that_it_names_are_those_that_exist():
    verbs = set(re.findall(r"^(\w+):.*##", FILES["Makefile"], re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE)) - {"help"} == verbs - {"help"}


def test_requests_that_it_lists_are_those_that_the_service_knows():
    known = {f"{route.method} {route.rule}" for route in catvote.routes.routes}
    assert {request.replace("...", "<:path>") for request in cells("request")} == known


def test_variables_that_it_lists_are_those_that_are_read():
    read = re.findall(r'os\.environ\.get\("(\w+)"', FILES["catvote.py"] + FILES["gunicorn.conf.py"])
    ours = {name for name in read if not name.startswith("PG")} | {"PORT"}  # PG: libpq's own; PORT: read by gunicorn
    assert cells("variable") == ours == set(re.findall(r"(?m)^#([A-Z_]+)=", FILES[".env.example"]))


NUMBERS = [
    (r"everybody for ([\d.]+) seconds", "catvote.py", r"Reader\(TALLY, fresh=([\d.]+)\)"),
    (r"at most (\d+) connections", "catvote.py", r"max_size=(\d+)"),
    (r"up to (\d+) counters", "schema.sql", r"pg_backend_pid\(\) % (\d+)"),
    (r"has (\d+) threads", "gunicorn.conf.py", r"\nthreads = (\d+)"),
]


@pytest.mark.parametrize(("told", "name", "code"), NUMBERS)
def test_a_number_that_it_tells_is_that_of_the_code(told, name, code):
    assert re.findall(told, README.replace("\n", " ")) == [re.search(code, FILES[name])[1]]


def test_links_within_the_project_lead_somewhere():
    for link in re.findall(r"\]\((?!https:)([^)]+)\)", PROSE):
        target, _, anchor = link.partition("#")
        headings = re.findall(b"(?m)^#+ (.*)$", (ROOT / (target or "README.md")).read_bytes())
        assert not anchor or anchor.encode() in [heading.lower().replace(b" ", b"-") for heading in headings]


# The way of a vote


def test_the_steps_name_functions_in_the_order_in_which_a_vote_calls_them(application):
    called = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename == application.catvote.__file__:
            called.append(frame.f_code.co_name)

    def app(environ, start_response):
        sys.setprofile(note)  # of this thread alone
        try:
            return application.catvote.app(environ, start_response)
        finally:
            sys.setprofile(None)

    application.application = app
    assert vote(application).status == 303
    assert get(application, "/?voted=Pita").status == 200
    steps = re.findall(r"^\d+\. (.*\n(?:   .*\n)*)", PROSE.split("\n## ")[1], re.MULTILINE)
    assert len(steps) == 10
    told = dict.fromkeys(re.findall(r"`([a-z_]+)`", "".join(steps)))
    del told["count_votes"]  # which PostgreSQL calls
    rest = iter(called)  # `in` looks on from where it stopped
    assert [name for name in told if name not in rest] == []


def test_the_five_things_to_type_print_what_is_shown(server, database, tmp_path):
    if not shutil.which("curl"):
        missing("no curl: apt-get install curl")
    tag = ""
    with Service(database) as service:
        for fence in TYPED:
            text = fence.text.replace("http://127.0.0.1:8000", service.url)
            if fence.language == "psql":
                commands = "".join(re.findall(r"^catvote=\*?# (.*\n)", text, re.MULTILINE))
                assert_printed(re.sub(r"(?m)^catvote=.*\n", "", text), psql(server, database, commands, tmp_path))
            else:
                for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
                    printed = run(["sh", "-c", re.sub(TAG, tag, command)], tmp_path)
                    assert_printed(output, printed)
                    tag = (re.findall(TAG, printed) or [tag])[-1]
    assert len(TYPED) == 5


TAG = r'"[0-9a-f]{16}"'
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?\+00"


def assert_printed(expected, printed):
    """Compare what a fence shows with what was printed: all but times, tags, widths of columns and numbers of rows."""

    def plain(text):
        for pattern, replacement in ((TAG, "TAG"), (TIME, "TIME"), (r"\(\d+ rows?\)", ""), ("-+", "-"), (" +", " ")):
            text = re.sub(pattern, replacement, text)
        return "\n".join(line.strip() for line in text.splitlines() if line.strip())

    pattern = re.escape(plain(expected)).replace(r"\.\.\.", "(?:.*\n)*?.*")
    assert re.fullmatch(pattern, plain(printed)), f"expected:\n{expected}\nprinted:\n{printed}"


def run(command, folder, text=None):
    """Return what a command prints, which must succeed."""
    options = {"env": {"PATH": os.environ["PATH"], "PGTZ": "UTC", "LC_ALL": "C.UTF-8"}, "cwd": folder, "timeout": 60}
    process = subprocess.run(command, input=text, capture_output=True, text=True, **options)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


def psql(server, url, text, folder):
    """Return what psql prints for that input."""
    return run([server.bindir / "psql", "-X", "--set=ON_ERROR_STOP=1", url], folder, text)


@pytest.fixture
def used(database):
    """URL of a database with votes and the table of the Flask app; a recipe's roles go at the end."""
    with psycopg.connect(database) as connection:
        connection.execute(
            """
            INSERT INTO votes (date_created, vote)
            SELECT hour + number * interval '0.2 seconds', CASE WHEN number < 4 THEN 'Pita' ELSE 'Gummi' END
            FROM generate_series(now() - interval '50 hours', now(), '1 hour') AS hour, generate_series(1, 5) AS number;
            CREATE TABLE model (row_id serial PRIMARY KEY, date_created timestamp DEFAULT now(), vote varchar);
            INSERT INTO model (vote) VALUES ('Pita'), ('Gummi'), ('Pita'), ('Garfield');
            """
        )
    yield database
    with psycopg.connect(database) as connection:
        for (role,) in connection.execute("SELECT rolname FROM pg_roles WHERE rolname ~ '^catvote_'").fetchall():
            connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_in_psql_and_leaves_the_tally_exact(recipe, used, server, tmp_path):
    assert psql(server, used, recipe.text, tmp_path)
    with psycopg.connect(used) as connection:
        assert sessions.inexact(connection) == []


def test_the_role_that_may_only_vote_is_all_that_the_service_needs(used, server, tmp_path):
    (recipe,) = [recipe.text for recipe in RECIPES if "CREATE ROLE catvote_service" in recipe.text]
    psql(server, used, recipe, tmp_path)
    password = quote(re.search("PASSWORD '(.*)'", recipe)[1])
    with Service(re.sub("//.*@", f"//catvote_service:{password}@", used)) as service:
        assert vote(service).status == 303
        assert [get(service, path).status for path in ("/?voted=Pita", "/history", "/healthz")] == [200] * 3


# The diagrams


def labels(name):
    """Return the texts of an SVG file."""
    return [" ".join(node.itertext()).strip() for node in ElementTree.parse(ROOT / name).iterfind(".//{*}text")]


def test_the_structure_is_drawn_from_its_source():
    source = re.findall(r'label="([^"]*)"', (ROOT / "static/structure.dot").read_text())
    lines = [line.strip() for label in source for line in label.split(r"\l") if line.strip()]
    assert sorted(labels("static/structure.svg")) == sorted(lines)


@pytest.mark.parametrize("name", ["static/structure.svg", "static/logic.svg"])
def test_names_in_a_diagram_exist(name):
    names = set(re.findall(r"\w+_\w+|\b[\w.]+\.(?:py|sql|tpl)\b|\w+/(?!\w)(?:\w+/)?", "\n".join(labels(name))))
    known = "\n".join([*FILES, *FILES.values()])
    assert [each for each in names if each not in known and not (ROOT / each).exists()] == []


# The table of guards


def test_each_test_that_the_table_of_guards_names_exists():
    named = set(re.findall(r"`(test_\w+)[`[]", (ROOT / "tests/README.md").read_text()))
    tests = "".join(file.read_text() for file in ROOT.glob("tests/test_*.py"))
    written = set(re.findall(r"def (test_\w+)", tests))
    assert len(named) > 200
    assert named <= written
