"""Draws static/card.png, which goes with a link to catvote in a chat, from the two drawings: `make card`."""

from shutil import which

from local.postgres import ROOT
from playwright.sync_api import sync_playwright

static = ROOT / "static"
PAGE = f"""
<style>
{(static / "catvote.css").read_text()}
header {{ height: 60px; zoom: 1.5 }}
h1 {{ font-size: 76px; margin: 8px 0 }}
svg {{ width: 400px; height: 400px; margin: 0 50px }}
</style>
<header></header>
<main style="width: auto">
<h1>Vote: it's your civic duty</h1>
{(static / "gummi.svg").read_text()}{(static / "pita.svg").read_text()}
</main>
"""

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=which("chromium"))
    page = browser.new_page(viewport={"width": 1200, "height": 630}, color_scheme="light")
    page.set_content(PAGE)
    page.screenshot(path=static / "card.png")
    browser.close()
