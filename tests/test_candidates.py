"""Candidates of your own: the README's recipe, done on copies of the project."""

import os
import re
import shutil
import subprocess
import sys

import psycopg
import pytest
from conftest import new_database
from judges import assert_accessible, assert_valid
from local.postgres import ROOT
from local.service import Service
from playwright.sync_api import expect

from catvote import Candidate

# The keys and names have what could mean something to SQL, HTML, CSS, JavaScript or a URL.
TWO = {
    "Żółw": Candidate("Żółw & Söhne", "turtle.svg", 'A turtle called "Żółw" <in a bun>.'),
    "O'Hara": Candidate('O\'Hara "<b>the bold</b>"', "photo.png", "A photograph, 100% {{real}}."),
}
THREE = {**TWO, 'a b&c=d%41+"/]#': Candidate("% end", "turtle.svg", "</button><script>alert(1)</script>")}
PAGES = ["/", "/history", "/no-such-page"]
TEXTS = {"TITLE": "Who <i>wins</i>?", "QUESTION": "Which one: 'this' or \"that\"?", "SUMMARY": "Vote & see."}


def with_candidates(folder, candidates):
    """Make a copy of the project in `folder` and give it other candidates, as the README tells."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    (folder / "static/gummi.svg").unlink()
    (folder / "static/pita.svg").rename(folder / "static/turtle.svg")
    shutil.copy(folder / "static/screenshot.png", folder / "static/photo.png")
    entries = [f"    {cat!r}: Candidate{tuple(candidate)!r},\n" for cat, candidate in candidates.items()]
    change(folder / "catvote.py", r"^CANDIDATES = \{\n.*?^\}", "CANDIDATES = {\n" + "".join(entries) + "}")
    for name, text in TEXTS.items():
        change(folder / "catvote.py", rf"^{name} = .*?$", f"{name} = {text!r}")
    change(folder / "schema.sql", r"CHECK \(vote IN \(.*?\)\)$", f"CHECK (vote IN ({literals(candidates)}))")
    rows = ", ".join(f"({literals([cat])})" for cat in candidates)
    change(folder / "schema.sql", r"^FROM \(VALUES .*\) AS cat \(vote\)$", f"FROM (VALUES {rows}) AS cat (vote)")
    return folder


def change(file, pattern, replacement):
    """Replace the one passage of a file that a pattern describes."""
    text, number = re.subn(pattern, lambda _: replacement, file.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert number == 1, pattern
    file.write_text(text, "utf-8")


def literals(cats):
    """Return names as a list of SQL literals."""
    return ", ".join("'" + cat.replace("'", "''") + "'" for cat in cats)


def run(folder, *arguments, **settings):
    """Run Python in a copy of the project to its end."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{folder}:{folder}/tests", **settings}
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, timeout=60)


def initdb(folder, url):
    """Apply the schema of a copy of the project, as the Procfile's release line does."""
    run(folder, "-c", "import catvote; catvote.initdb()", DATABASE_URL=url)


class Election:
    """A copy of the project with candidates of its own, its database, and its service."""

    def __init__(self, folder, candidates, url):
        self.candidates = candidates
        self.folder = with_candidates(folder, candidates)
        self.url = url
        self.service = Service(url, WEB_CONCURRENCY="1")
        self.service.folder = folder


@pytest.fixture(scope="module", params=[TWO, THREE], ids=["two", "three"])
def election(request, server, tmp_path_factory):
    """An Election that runs, with two and with three candidates."""
    with new_database(server, "template0") as url:
        election = Election(tmp_path_factory.mktemp("election") / "copy", request.param, url)
        initdb(election.folder, url)
        with election.service:
            yield election


@pytest.fixture(scope="module")
def tab(browser, election):
    """A browser's tab for all tests of an election: a new one costs more than most tests."""
    context = browser.new_context(base_url=election.service.url, reduced_motion="reduce")
    context.set_default_timeout(30_000)
    yield context.new_page()
    context.close()


@pytest.fixture
def page(tab):
    """The page of the election."""
    tab.set_viewport_size({"width": 1280, "height": 720})
    tab.emulate_media(color_scheme="light", forced_colors="none")
    tab.goto("/")
    return tab


@pytest.fixture
def votes(election):
    """An autocommit connection to the election's database, which has no votes."""
    with psycopg.connect(election.url, autocommit=True) as votes:
        votes.execute("DELETE FROM votes")
        yield votes


def shown(page):
    """Return the number of votes that the page shows for each candidate."""
    counts = page.locator("[data-votes]").evaluate_all(
        "counts => counts.map(count => [count.dataset.votes, Number(count.textContent)])"
    )
    return dict(counts)


def button(page, candidate):
    """Return the button that votes for a candidate."""
    return page.get_by_role("button").filter(has_text=candidate.name)


def test_names_pictures_and_texts_show_as_they_are_written(election, page):
    expect(page).to_have_title(TEXTS["TITLE"])
    expect(page.get_by_role("heading", level=1)).to_have_text(TEXTS["TITLE"])
    expect(page.get_by_text(TEXTS["QUESTION"], exact=True)).to_be_visible()
    assert page.locator("meta[name=description]").get_attribute("content") == TEXTS["SUMMARY"]
    expect(page.get_by_role("button").locator("strong")).to_have_text([c.name for c in election.candidates.values()])
    for candidate in election.candidates.values():
        picture = page.get_by_role("img", name=candidate.description, exact=True)
        assert candidate.picture in picture.get_attribute("src")


def test_each_candidate_gets_the_votes_that_are_cast_for_it(election, page, votes):
    expected = dict.fromkeys(election.candidates, 0)
    for number, (cat, candidate) in enumerate(election.candidates.items(), start=1):
        for _ in range(number):
            button(page, candidate).click()
            expect(page.get_by_role("status")).to_contain_text(candidate.name)
            expected[cat] += 1
            assert shown(page) == expected
            page.goto("/")
    assert dict(votes.execute("SELECT vote, count(*) FROM votes GROUP BY vote")) == expected
    assert dict(votes.execute("SELECT vote, votes FROM vote_totals")) == expected


def test_the_tally_for_scripts_has_every_candidate(election, page, votes):
    page.wait_for_timeout(1000)  # so old a tally may be
    assert page.request.get("/tally.json").json() == dict.fromkeys(election.candidates, 0)


def test_the_page_follows_votes_of_others(election, page, votes):
    cast = {cat: number for number, cat in enumerate(election.candidates, start=1)}
    for cat, number in cast.items():
        votes.execute("INSERT INTO votes (vote) SELECT %s FROM generate_series(1, %s)", [cat, number])
    *_, last = election.candidates
    expect(page.locator("[data-votes]").last).to_have_text(str(cast[last]))
    assert shown(page) == cast
    expect(page.get_by_text("In the lead").locator("visible=true")).to_have_count(1)
    width = page.locator(".bar").evaluate("bar => bar.clientWidth")
    parts = page.locator("[data-bar]").evaluate_all(
        "parts => parts.map(part => part.getBBox()).map(b => [b.x, b.width])"
    )
    left = 0
    for (x, part), number in zip(parts, cast.values(), strict=True):
        assert (x, part) == pytest.approx((left, width * number / sum(cast.values())), abs=1)
        left += part


def test_history_has_a_chart_and_a_column_for_each(election, page, votes):
    for cat in election.candidates:
        votes.execute("INSERT INTO votes (vote) VALUES (%s)", [cat])
    page.goto("/history")
    for candidate in election.candidates.values():
        expect(page.get_by_role("figure").filter(has_text=candidate.name).get_by_role("img")).to_have_count(2)
    page.get_by_text("as a table").first.click()
    table = page.get_by_role("table")
    names = [candidate.name for candidate in election.candidates.values()]
    expect(table.get_by_role("columnheader")).to_have_text(["Hour", *names])
    expect(table.get_by_role("row").nth(1).get_by_role("cell")).to_have_text(["1"] * len(names))


def test_no_vote_for_the_cats_of_before_counts(election, page, votes):
    assert page.request.post("/add", form={"vote": "Pita"}).status == 400
    with pytest.raises(psycopg.errors.CheckViolation):
        votes.execute("INSERT INTO votes (vote) VALUES ('Pita')")


def test_every_page_is_valid_and_for_everybody(election, page, votes, tmp_path):
    for cat in election.candidates:
        votes.execute("INSERT INTO votes (vote) VALUES (%s)", [cat])
    for number, path in enumerate(PAGES):
        answer = page.goto(path)
        (tmp_path / f"{number}.html").write_bytes(answer.body())
        assert_accessible(page)
        assert all(page.locator("img").evaluate_all("pictures => pictures.map(picture => picture.naturalWidth)"))
    assert_valid(*tmp_path.iterdir())


@pytest.mark.parametrize("election", [THREE], ids=["three"], indirect=True)
def test_the_card_for_chats_is_drawn_from_their_pictures(election):
    before = (election.folder / "static/card.png").read_bytes()
    run(election.folder, "tests/card.py")
    assert (election.folder / "static/card.png").read_bytes() != before


def test_a_database_with_votes_takes_a_third_candidate(database, tmp_path):
    cats = ["Gummi", "Pita", "Mia"]
    copy = with_candidates(tmp_path / "copy", {cat: Candidate(cat, "turtle.svg", "A cat.") for cat in cats})
    with psycopg.connect(database, autocommit=True) as votes:
        votes.execute("INSERT INTO votes (vote) VALUES ('Pita')")
        votes.execute(f"""
            ALTER TABLE public.votes
                DROP CONSTRAINT votes_vote_is_a_cat,
                ADD CONSTRAINT votes_vote_is_a_cat CHECK (vote IN ({literals(cats)}))
        """)
        initdb(copy, database)
        votes.execute("INSERT INTO votes (vote) VALUES ('Mia')")
        assert dict(votes.execute("TABLE vote_totals")) == {"Gummi": 0, "Mia": 1, "Pita": 1}
