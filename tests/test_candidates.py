"""Candidates of your own: the README's recipe, done on a copy of the project."""

import re

import psycopg
import pytest
from axe_playwright_python.base import AXE_SCRIPT, AxeResults
from checkout import copy_of_project, make
from conftest import new_database
from local.service import Service
from playwright.sync_api import expect

from catvote import Candidate

# The keys and names have what could mean something to SQL, HTML, CSS, JavaScript or a URL, and long words.
CANDIDATES = {
    "Żółw": Candidate("Żółw & Söhne", "icon.svg", 'A cat called "Żółw" <in a bun>.'),
    "O'Hara": Candidate('O\'Hara "<b>the bold</b>"', "screenshot.png", "A photograph, 100% {{real}}."),
    'a b&c=d%41+"/]#': Candidate("% end", "icon.svg", "</button><script>alert(1)</script>"),
    "26": Candidate("Nordseeschwimmkrabbenkönig", "screenshot.png", "A king."),
    "42": Candidate("Donaudampfschifffahrtsgesellschaftskapitän", "icon.svg", "A captain."),
}
TEXTS = {
    "TITLE": "Who <i>wins</i> &amp; loses the Kraftfahrzeughaftpflichtwahl?",
    "QUESTION": 'Which one: <this> or "that"?',
    "SUMMARY": 'Vote & "see".',
}


@pytest.fixture(scope="module")
def folder():
    """A copy of the project that has these candidates."""
    with copy_of_project() as folder:
        entries = "".join(f"    {cat!r}: Candidate{tuple(candidate)!r},\n" for cat, candidate in CANDIDATES.items())
        change(folder / "catvote.py", r"^CANDIDATES = \{\n.*?^\}", "CANDIDATES = {\n" + entries + "}")
        for name, text in TEXTS.items():
            change(folder / "catvote.py", rf"^{name} = .*?$", f"{name} = {text!r}")
        change(folder / "schema.sql", r"CHECK \(vote IN \(.*?\)\)$", f"CHECK (vote IN ({literals()}))")
        change(
            folder / "schema.sql",
            r"\(VALUES .*?\) AS cat \(vote\)",
            f"(SELECT unnest(ARRAY[{literals()}]) AS vote) AS cat",
        )
        yield folder


def change(file, pattern, replacement):
    """Replace the one passage of a file that a pattern describes."""
    text, number = re.subn(pattern, lambda _: replacement, file.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert number == 1, pattern
    file.write_text(text, "utf-8")


def literals():
    """Return the candidates' keys as a list of SQL literals."""
    return ", ".join("'" + cat.replace("'", "''") + "'" for cat in CANDIDATES)


@pytest.fixture(scope="module")
def shared_database(server, folder):
    """URL of a database that takes these candidates."""
    with new_database(server) as url:
        with psycopg.connect(url, autocommit=True, client_encoding="UTF8") as connection:
            connection.execute((folder / "schema.sql").read_text("utf-8"))
        yield url


@pytest.fixture(scope="module")
def tab(browser, shared_database, folder):
    """A small tab for all tests, on the service of the copy."""
    # 320 pixels are also 1280 enlarged to 400 %.
    small = {"viewport": {"width": 320, "height": 800}, "is_mobile": True, "reduced_motion": "reduce"}
    with (
        Service(shared_database, folder=folder) as service,
        browser.new_page(base_url=service.url, **small) as tab,
    ):
        yield tab


@pytest.fixture
def page(tab, shared_connection):
    """The page with the candidates, who have no votes."""
    tab.emulate_media(color_scheme="light", forced_colors="none")
    tab.goto("/")
    return tab


@pytest.fixture(params=["/?voted=42", "/history", "/no-such-page"])
def each_page(request, page, shared_connection):
    """Each page in turn, while every candidate has a vote."""
    cast(shared_connection, [*CANDIDATES])
    page.goto(request.param)
    return page


def cast(connection, votes):
    """Store votes. For a while the service knows an older history, so all tests of that page cast the same."""
    connection.execute("INSERT INTO votes (vote) SELECT unnest(%s::text[])", [votes])


def test_names_pictures_and_texts_show_as_they_are_written(page):
    expect(page).to_have_title(TEXTS["TITLE"])
    expect(page.get_by_role("heading", level=1)).to_have_text(TEXTS["TITLE"])
    expect(page.get_by_text(TEXTS["QUESTION"], exact=True)).to_be_visible()
    assert page.locator("meta[name=description]").get_attribute("content") == TEXTS["SUMMARY"]
    expect(page.get_by_role("button").locator("strong")).to_have_text([c.name for c in CANDIDATES.values()])
    for candidate in CANDIDATES.values():
        picture = page.get_by_role("img", name=candidate.description, exact=True)
        assert candidate.picture in picture.get_attribute("src")
        shape = picture.evaluate("picture => picture.width / picture.height")
        assert shape == pytest.approx(picture.evaluate("picture => picture.naturalWidth / picture.naturalHeight"), 0.02)


def test_the_history_has_their_names_as_they_are_written(page, shared_connection):
    cast(shared_connection, [*CANDIDATES])
    page.goto("/history")
    days = page.locator("section").last
    names = [candidate.name for candidate in CANDIDATES.values()]
    expect(days.locator("figcaption strong")).to_have_text(names)
    expect(days.locator("thead th")).to_have_text(["Day", *names])
    for name in names:
        expect(days.get_by_role("img", name=f"Votes for {name} per day")).to_be_visible()


def test_a_swatch_keeps_its_colour_where_a_visitors_own_replace_ours(page, shared_connection):
    cast(shared_connection, [*CANDIDATES])
    page.goto("/history")
    page.emulate_media(forced_colors="active")
    colours = page.locator(".swatch").evaluate_all(
        "swatches => swatches.map((swatch) => getComputedStyle(swatch).borderLeftColor)"
    )
    assert len({*colours}) == len(CANDIDATES)


def test_each_candidate_gets_the_votes_that_are_cast_for_it_by_keyboard(page, take_votes):
    for candidate in CANDIDATES.values():
        page.get_by_role("button").filter(has_text=candidate.name).press("Enter")
        expect(page.get_by_role("status")).to_contain_text(candidate.name)
    assert take_votes() == list(CANDIDATES)


def test_the_page_follows_votes_of_others(page, shared_connection):
    cast(shared_connection, [cat for number, cat in enumerate(CANDIDATES, start=1) for _ in range(number)])
    expect(page.locator("[data-votes]")).to_have_text(["1", "2", "3", "4", "5"])
    expect(page.get_by_text("In the lead").locator("visible=true")).to_have_count(1)


RULES = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
RULES_OF_COLOUR = {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}
# The other rules judge what all looks share: once is enough.
LOOKS = [
    ({"color_scheme": "light"}, RULES),
    ({"color_scheme": "dark"}, RULES_OF_COLOUR),
    ({"color_scheme": "dark", "forced_colors": "active"}, RULES_OF_COLOUR),
]


def test_people_with_disabilities_can_use_every_page_in_any_colour(each_page):
    each_page.evaluate(AXE_SCRIPT)
    for look, rules in LOOKS:
        each_page.emulate_media(**look)
        options = {"runOnly": rules, "resultTypes": ["violations"]}
        result = AxeResults(each_page.evaluate("options => axe.run(options)", options))
        assert not result.violations_count, f"{look}: {result.generate_report()}"


LIGHTNESS = """labels => labels.map((label) => {
    const [red, green, blue] = getComputedStyle(label).backgroundColor.match(/\\d+/g).map(Number);
    return red + green + blue;
})"""


def test_by_night_all_icings_but_the_pink_one_are_lighter(page):
    labels = page.get_by_role("button").locator("span")
    by_day = labels.evaluate_all(LIGHTNESS)
    page.emulate_media(color_scheme="dark")
    by_night = labels.evaluate_all(LIGHTNESS)
    assert [night > day for night, day in zip(by_night, by_day, strict=True)] == [False, True, True, True, True]


def test_a_visitors_own_colours_replace_ours(page):
    page.emulate_media(forced_colors="active")
    canvas, ink = page.locator("body").evaluate("""body => {
        const { backgroundColor, color } = getComputedStyle(body);
        return [backgroundColor, color];
    }""")
    expect(page.locator(".bar")).to_have_css("background-color", canvas)
    expect(page.locator(".bar")).to_have_css("border-color", ink)
    expect(page.get_by_text("No votes yet")).to_have_css("fill", ink)
    expect(page.get_by_role("banner")).to_have_css("background-image", "none")


def test_where_a_visitors_own_colours_replace_ours_borders_show_what_colours_did(page):
    page.emulate_media(forced_colors="active")
    button = page.get_by_role("button").first
    expect(button.locator("span")).to_have_css("border-style", "solid")
    expect(button).to_have_css("border-width", "2px")
    button.hover()
    expect(button).to_have_css("border-width", "1px")


def test_nothing_is_wider_than_the_window_and_no_number_or_time_is_broken(each_page):
    each_page.evaluate("""
        document.querySelectorAll("[data-votes]").forEach((count) => { count.textContent = "1,000,000,000"; });
        document.querySelectorAll("figcaption span").forEach((peak) => { peak.textContent += ",000,000,000"; });
        document.querySelectorAll("details").forEach((details) => { details.open = true; });
    """)
    assert each_page.evaluate("document.documentElement.scrollWidth") <= 320
    assert max(lines(each_page, "[data-votes], figcaption span, tbody th"), default=1) == 1


def lines(page, selector):
    """Return on how many lines the text of each of these elements is."""
    return page.locator(selector).evaluate_all("""elements => elements.map((element) => {
        const range = document.createRange();
        range.selectNodeContents(element);
        return new Set([...range.getClientRects()].map((line) => line.top)).size;
    })""")


@pytest.mark.usefixtures("browser")  # `make card` draws by the same program
def test_the_card_for_chats_is_drawn_from_their_pictures(folder):
    picture, cards = folder / "static/icon.svg", []
    for text in (
        picture.read_text(),
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><path d="M0 0 9 9 9 0"/></svg>',
    ):
        picture.write_text(text)
        assert make(folder, "card").returncode == 0
        cards.append((folder / "static/card.png").read_bytes())
    assert cards[0] != cards[1]
