"""The page as visitors meet it: a real browser, the real service, a real database."""

import time
from contextlib import contextmanager

import psycopg
import pytest
from conftest import new_database
from faults import wait_until
from judges import assert_accessible, assert_valid
from local.postgres import ROOT
from local.service import Service
from playwright.sync_api import expect

import catvote

BILLION = 10**9
# Playwright's browsers load the page anew where others show it as it was left, and say so by this event.
BACK = "dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))"
PAGES = ["/", "/?voted=Pita", "/history", "/no-such-page"]


@pytest.fixture(scope="module")
def votes(shared_database):
    """An autocommit connection to the database of this module's service, which has some votes to show."""
    with psycopg.connect(shared_database, autocommit=True) as votes:
        cast(votes, "Gummi", 1234)
        cast(votes, "Pita", 321, "1 hour")
        cast(votes, "Pita", 10, "10 days")
        yield votes


def cast(connection, cat, number=1, age="0"):
    """Store so many votes of that age for a cat."""
    connection.execute(
        "INSERT INTO votes (vote, date_created) SELECT %s, now() - %s::interval FROM generate_series(1, %s)",
        [cat, age, number],
    )


def stored(connection, cat):
    """Return the number of rows for a cat."""
    return connection.execute("SELECT count(*) FROM votes WHERE vote = %s", [cat]).fetchone()[0]


@pytest.fixture(scope="module")
def open_tab(browser, shared_service, votes):
    """A function that opens a blank tab in a browser window of its own, which has the options given."""
    contexts = []

    def open_tab(**options):
        contexts.append(browser.new_context(base_url=shared_service.url, **options))
        contexts[-1].set_default_timeout(30_000)
        return contexts[-1].new_page()

    yield open_tab
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def tabs(open_tab):
    """Two tabs for all tests, without and with a clock: a new one costs more than most tests."""
    plain, with_clock = open_tab(), open_tab()
    with_clock.clock.install(time=0)
    with_clock.clock.pause_at(1000)
    return plain, with_clock


@pytest.fixture
def visit(tabs, shared_service):
    """A function that opens a page of the service in a tab that tests share.

    With a clock, time stands still until the test lets it pass. Routes end with the test; what a test adds
    to each page that comes later belongs in a tab of its own.
    """

    def visit(path="/", url=shared_service.url, clock=False, width=1280, reduced_motion="no-preference"):
        page = tabs[clock]
        page.set_viewport_size({"width": width, "height": 720})
        page.emulate_media(color_scheme="light", forced_colors="none", reduced_motion=reduced_motion)
        page.goto(url + path)
        return page

    yield visit
    for tab in tabs:
        tab.unroute_all()


@pytest.fixture(scope="module")
def closed_service(server):
    """The service on a database that there is not."""
    with Service(server.url("no_such_database"), WEB_CONCURRENCY="1") as service:
        yield service


@pytest.fixture(scope="module")
def other_database(server, template):
    """URL of a database without votes, which may be away for a while."""
    with new_database(server, template) as url:
        yield url


@pytest.fixture(scope="module")
def other_service(other_database):
    """The service on `other_database`."""
    with Service(other_database, WEB_CONCURRENCY="1") as service:
        yield service


@contextmanager
def away(server, database):
    """Keep a database from answering its clients."""
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        yield
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def next_answer(page):
    """Let time pass on a page with a clock until its script asks for the tally, and wait for the answer."""
    with page.expect_response("**/tally.json"), page.expect_request("**/tally.json") as request:
        while not request.is_done():
            page.clock.run_for(500)


def count(page, cat):
    """Return the element that shows the number of votes for a cat."""
    return page.locator(f"[data-votes={cat}]")


def bar(page, cat):
    """Return the element that is a cat's part of the share bar."""
    return page.locator(f".bar [data-bar={cat}]")


def button(page, name):
    """Return the button that votes for the cat of that full name."""
    return page.get_by_role("button", name=f"Vote for {name}")


def thanks(page):
    """Return the element that thanks for a vote."""
    return page.get_by_role("status")


# Voting


def test_a_click_on_a_cat_is_a_vote_that_shows(visit, votes):
    gummi, pita = stored(votes, "Gummi"), stored(votes, "Pita")
    page = visit()
    button(page, "Fruit Gummi").locator("img").click()
    expect(thanks(page)).to_be_visible()
    assert (stored(votes, "Gummi"), stored(votes, "Pita")) == (gummi + 1, pita)
    assert count(page, "Gummi").inner_text() == f"{gummi + 1:,}"
    assert count(page, "Pita").inner_text() == f"{pita:,}"


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_a_vote_needs_no_more_than_a_keyboard(visit, votes, key):
    before = stored(votes, "Pita")
    page = visit()
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.value") == "Pita":
            break
    page.keyboard.press(key)
    expect(thanks(page)).to_contain_text("Pita")
    assert stored(votes, "Pita") == before + 1


def test_a_vote_needs_no_javascript(open_tab, votes):
    before = stored(votes, "Pita")
    page = open_tab(java_script_enabled=False)
    page.goto("/")
    button(page, "Pita").click()
    expect(thanks(page)).to_contain_text("Pita")
    expect(count(page, "Pita")).to_have_text(f"{before + 1:,}")


def test_thanks_name_the_cat_and_have_the_focus(visit):
    page = visit()
    button(page, "Fruit Gummi").click()
    expect(thanks(page)).to_contain_text("Fruit Gummi")
    expect(thanks(page)).to_be_focused()


def test_the_address_is_tidy_after_a_vote(visit, shared_service):
    page = visit()
    button(page, "Pita").click()
    expect(thanks(page)).to_be_visible()
    expect(page).to_have_url(f"{shared_service.url}/")


def test_a_double_click_is_one_vote_although_its_second_half_meets_the_next_page(visit, votes):
    before = stored(votes, "Pita")
    page = visit()
    button(page, "Pita").hover()
    page.mouse.down()
    page.mouse.up()
    expect(thanks(page)).to_be_visible()
    page.mouse.down(click_count=2)
    page.mouse.up(click_count=2)
    page.wait_for_timeout(300)
    assert stored(votes, "Pita") == before + 1


def test_another_click_while_a_vote_is_on_its_way_is_no_vote(visit, votes):
    before = stored(votes, "Pita")
    page = visit()
    with votes.transaction():
        votes.execute("LOCK TABLE votes IN SHARE MODE")
        page.evaluate(
            "pita = document.querySelector('[value=Pita]'); pita.click(); setTimeout(() => pita.click(), 200)"
        )
        page.wait_for_timeout(400)
    expect(thanks(page)).to_be_visible()
    page.wait_for_timeout(200)
    assert stored(votes, "Pita") == before + 1


def test_a_press_shows_at_once_and_one_that_was_stopped_can_be_repeated(visit, votes):
    before = stored(votes, "Pita")
    page = visit(clock=True)
    page.route("**/add", lambda route: route.abort("aborted"))  # as the browser's stop button
    button(page, "Pita").click()
    expect(page.locator("form")).to_have_attribute("aria-busy", "true")
    expect(button(page, "Pita")).not_to_have_css("opacity", "1")
    page.unroute("**/add")
    page.clock.run_for(10_000)
    button(page, "Pita").click()
    expect(thanks(page)).to_be_visible()
    assert stored(votes, "Pita") == before + 1


def test_a_reload_is_no_vote(visit, votes):
    page = visit()
    button(page, "Pita").click()
    expect(thanks(page)).to_be_visible()
    before = stored(votes, "Pita")
    page.reload()
    expect(count(page, "Pita")).to_be_visible()
    expect(thanks(page)).to_have_count(0)
    assert stored(votes, "Pita") == before


def test_the_back_button_is_no_vote_and_leads_to_a_page_that_works(visit, votes):
    page = visit()
    button(page, "Pita").click()
    expect(thanks(page)).to_be_visible()
    before = stored(votes, "Pita")
    page.go_back()
    assert stored(votes, "Pita") == before
    page.evaluate("document.forms[0].setAttribute('aria-busy', 'true')")
    page.evaluate(BACK)
    button(page, "Pita").click()
    expect(thanks(page)).to_be_visible()
    assert stored(votes, "Pita") == before + 1


def test_a_browser_without_aria_reflection_votes_again_after_the_back_button(open_tab, votes):
    before = stored(votes, "Pita")
    page = open_tab()
    page.add_init_script("delete Element.prototype.ariaBusy")  # as Firefox before 119
    page.goto("/")
    page.route("**/add", lambda route: route.abort("aborted"))
    button(page, "Pita").click()
    expect(page.locator("form")).to_have_attribute("aria-busy", "true")
    page.unroute("**/add")
    page.evaluate(BACK)
    button(page, "Pita").click()
    expect(thanks(page)).to_be_visible()
    assert stored(votes, "Pita") == before + 1


# The live tally


def test_votes_of_others_show_within_three_seconds(visit, votes):
    page = visit()
    page.evaluate("stillTheSamePage = true")
    before = stored(votes, "Pita")
    cast(votes, "Pita")
    expect(count(page, "Pita")).to_have_text(f"{before + 1:,}", timeout=3000)
    assert page.evaluate("stillTheSamePage")


def test_an_unchanged_tally_is_not_sent_again(visit):
    page = visit(clock=True)
    statuses = []
    page.on("response", lambda answer: "tally" in answer.url and statuses.append(answer.status))
    next_answer(page)
    next_answer(page)
    assert statuses == [200, 304]


def test_a_hidden_tab_asks_for_nothing_until_it_is_looked_at(visit):
    page = visit(clock=True)
    page.evaluate("Object.defineProperty(document, 'hidden', { value: true, writable: true })")
    requests = []
    page.on("request", lambda request: requests.append(request.url) if "/static/" not in request.url else None)
    page.clock.run_for(60_000)
    page.wait_for_timeout(100)
    assert not requests
    page.evaluate("document.hidden = false")
    next_answer(page)


def test_the_page_says_when_the_service_is_away_asks_less_often_and_resumes(visit, shared_database):
    with Service(shared_database, WEB_CONCURRENCY="1") as service:
        page = visit(url=service.url, clock=True)
    notice = page.get_by_text("last known votes")
    expect(notice).not_to_be_visible()
    failures = []
    page.on("requestfailed", lambda request: failures.append(request.url))
    for _ in range(60):
        page.clock.run_for(1000)
        page.wait_for_timeout(20)
    expect(notice).to_be_visible()
    assert 3 <= len(failures) <= 6
    with Service(shared_database, PORT=str(service.port), WEB_CONCURRENCY="1"):
        next_answer(page)
        expect(notice).not_to_be_visible()


def test_the_page_says_when_the_database_is_away(visit, server, other_database, other_service):
    page = visit(url=other_service.url, clock=True)
    notice = page.get_by_text("last known votes")
    expect(notice).not_to_be_visible()
    with away(server, other_database):
        wait_until(lambda: next_answer(page) or notice.is_visible(), 30)
        page.reload()
        assert notice.is_visible()
    wait_until(lambda: next_answer(page) or notice.is_hidden(), 30)


def test_a_cat_that_the_page_does_not_show_leaves_the_others_live(visit):
    page = visit(clock=True)
    page.route("**/tally.json", lambda route: route.fulfill(json={"Dog": 7, "Gummi": 3, "Pita": 1}))
    next_answer(page)
    expect(count(page, "Gummi")).to_have_text("3")
    expect(count(page, "Pita")).to_have_text("1")
    expect(page.get_by_text("last known votes")).not_to_be_visible()


# Who leads


@pytest.mark.parametrize(
    ("gummi", "pita", "shown"),
    [
        (0, 0, "Vote for Fruit Gummi 0 votes 0% Vote for Pita 0 votes 0%"),
        (1, 0, "Vote for Fruit Gummi In the lead 1 vote 100% Vote for Pita 0 votes 0%"),
        (7, 7, "Vote for Fruit Gummi 7 votes 50% Vote for Pita 7 votes 50%"),
        (17, 23, "Vote for Fruit Gummi 17 votes 42% Vote for Pita In the lead 23 votes 58%"),
        (4, 9996, "Vote for Fruit Gummi 4 votes <1% Vote for Pita In the lead 9,996 votes >99%"),
        (BILLION, 1, "Vote for Fruit Gummi In the lead 1,000,000,000 votes >99% Vote for Pita 1 vote <1%"),
    ],
)
def test_server_and_script_show_the_same_and_it_makes_sense(visit, votes, gummi, pita, shown):
    parts = [cat / (gummi + pita or 1) for cat in (gummi, pita)]
    with votes.transaction():
        votes.execute("DELETE FROM tally")
        votes.execute("INSERT INTO tally VALUES ('Gummi', 0, %s), ('Pita', 0, %s)", [gummi, pita])
    page = visit("/?voted=Pita", clock=True, reduced_motion="reduce")
    votes.execute("SELECT recount_votes()")
    expect(page.locator("form")).to_have_text(shown, use_inner_text=True)
    assert shares(page) == pytest.approx(parts, abs=0.01)
    assert page.get_by_text("No votes yet").is_visible() == (gummi + pita == 0)

    page.goto("/?voted=Pita")  # which shows others, counted now
    expect(page.locator("form")).not_to_have_text(shown, use_inner_text=True)
    page.route("**/tally.json", lambda route: route.fulfill(json={"Gummi": gummi, "Pita": pita}))
    next_answer(page)
    expect(page.locator("form")).to_have_text(shown, use_inner_text=True)
    assert shares(page) == pytest.approx(parts, abs=0.01)


def shares(page):
    """Return which part of the share bar each cat has."""
    whole = page.locator(".bar").evaluate("bar => bar.clientWidth")
    return [bar(page, cat).evaluate("bar => bar.getBBox().width") / whole for cat in ("Gummi", "Pita")]


# History


def test_history_shows_each_hour_of_two_days_and_each_day_of_a_month(visit):
    page = visit()
    page.get_by_role("link", name="History").click()
    for unit, rows in ("hour", 48), ("day", 30):
        page.get_by_text(f"Votes per {unit} as a table").click()
        for name in "Fruit Gummi", "Pita":
            expect(page.get_by_role("img", name=f"Votes for {name} per {unit}")).to_be_visible()
        table = page.get_by_role("table").filter(has=page.get_by_role("columnheader", name=unit.capitalize()))
        expect(table.get_by_role("row")).to_have_count(1 + rows)
    expect(table.get_by_role("row").nth(11).get_by_role("cell")).to_have_text(["0", "10"])


def test_history_says_so_when_there_is_none(visit, other_service):
    page = visit("/history", url=other_service.url)
    expect(page.get_by_role("main")).to_contain_text("no vote in the last 30 days")


# When things go wrong


def assert_leads_to_the_cats(page):
    """Check that an error page offers one way on, which leads to the page with the cats."""
    page.get_by_role("main").get_by_role("link").click()
    expect(button(page, "Pita")).to_be_visible()


def test_an_unknown_cat_is_refused_with_a_way_back(visit):
    page = visit()
    page.evaluate("document.querySelector('[value=Pita]').value = 'Dog'")
    button(page, "Pita").click()
    expect(page.get_by_role("main")).to_contain_text("no vote was counted")
    assert_leads_to_the_cats(page)


def test_an_unknown_page_leads_to_the_cats(visit):
    page = visit("/no-such-page")
    expect(page.get_by_role("main")).to_contain_text("no such page")
    assert_leads_to_the_cats(page)


def test_a_vote_while_the_database_is_away_is_said_not_to_count(visit, server, other_database, other_service):
    page = visit(url=other_service.url)
    with away(server, other_database):
        button(page, "Pita").click()
        expect(page.get_by_role("main")).to_contain_text("vote was not counted")
    assert_leads_to_the_cats(page)


def test_a_vote_that_could_not_be_confirmed_is_not_said_to_be_lost():
    page = catvote.render("error", status=503, message=None, trouble=catvote.Trouble.UNCERTAIN, voting=True)
    assert "vote could not be confirmed" in page
    assert "not counted" not in page


# What a page costs, and for whom it works


def test_a_cold_load_is_six_requests_and_40_kilobytes_at_most(open_tab, shared_service):
    page = open_tab()
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto("/", wait_until="networkidle")
    # This browser shows no icon, so it asks for none.
    addresses = {*requests, shared_service.url + page.locator("link[rel=icon]").get_attribute("href")}
    answers = [page.request.get(address) for address in addresses]
    assert len(requests) == len(set(requests)) and len(answers) <= 6
    head = sum(len(f"{name}: {value}\r\n") for answer in answers for name, value in answer.headers.items())
    assert head + sum(len(answer.body()) for answer in answers) <= 40_000


def test_nothing_moves_by_itself(open_tab):
    def late(route):
        time.sleep(0.1)
        route.continue_()

    page = open_tab()
    page.clock.install()
    page.route("**/*.svg?*", late)
    page.add_init_script("""
        moves = [];
        new PerformanceObserver((list) => moves.push(...list.getEntries().map((move) => move.value)))
            .observe({ type: "layout-shift", buffered: true });
    """)
    for path in reversed(PAGES):
        page.goto(path)
        page.wait_for_timeout(100)
        assert page.evaluate("moves") == [], path
    page.route("**/tally.json", lambda route: route.fulfill(json={"Gummi": 99, "Pita": 98}))
    next_answer(page)
    expect(count(page, "Gummi")).to_have_text("99")
    page.route("**/tally.json", lambda route: route.fulfill(json={"Gummi": 99, "Pita": BILLION}, headers={"Age": "9"}))
    next_answer(page)
    expect(count(page, "Pita")).to_have_text(f"{BILLION:,}")
    expect(page.get_by_text("last known votes")).to_be_visible()
    page.wait_for_timeout(500)
    assert page.evaluate("moves") == []


def test_the_bar_moves_only_for_those_who_like_motion(visit):
    for motion, moves in ("no-preference", True), ("reduce", False):
        page = visit(clock=True, reduced_motion=motion)
        page.route("**/tally.json", lambda route: route.fulfill(json={"Gummi": 1, "Pita": 99}))
        page.evaluate("moved = false; document.addEventListener('transitionrun', () => { moved = true })")
        next_answer(page)
        expect(count(page, "Pita")).to_have_text("99")
        page.wait_for_timeout(300)
        assert page.evaluate("moved") == moves, motion


def test_nothing_is_complained_about_and_nobody_else_is_asked(open_tab, shared_service):
    page = open_tab()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(shared_service.url) or complaints.append(request.url))
    page.goto("/")
    button(page, "Pita").click()
    with page.expect_response("/tally.json"):
        pass
    page.goto("/history")
    page.get_by_text("Votes per hour as a table").click()
    assert not complaints


@pytest.mark.parametrize("path", [*PAGES, "closed"])
def test_people_with_disabilities_can_use_every_page_in_any_size_and_colour(visit, closed_service, path):
    page = visit("/", url=closed_service.url) if path == "closed" else visit(path)
    assert_accessible(page)


def test_the_largest_numbers_fit_on_the_smallest_screen(visit):
    page = visit(width=320)
    for cat in "Gummi", "Pita":
        count(page, cat).evaluate(f"count => count.textContent = '{BILLION:,}'")
    for cat in "Gummi", "Pita":
        assert count(page, cat).evaluate("count => count.scrollWidth <= count.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_all_pages_the_stylesheet_and_the_pictures_are_valid(visit, closed_service, tmp_path):
    request = visit().request
    for number, path in enumerate([*PAGES, closed_service.url]):
        (tmp_path / f"{number}.html").write_bytes(request.get(path).body())
    assert_valid(*tmp_path.iterdir(), *(ROOT / "static").glob("*.css"), *(ROOT / "static").glob("*.svg"))
