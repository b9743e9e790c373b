"""Draws static/card.png, which goes with a link to catvote in a chat, from the candidates' pictures: `make card`."""

from html import escape
from shutil import which
from urllib.parse import quote

from playwright.sync_api import sync_playwright

from catvote import CANDIDATES, FOLDER, TITLE

STATIC = FOLDER / "static"
PICTURES = "".join(f'<img src="{quote(candidate.picture)}">' for candidate in CANDIDATES.values())
PAGE = f"""
<link rel="stylesheet" href="catvote.css">
<style>
header {{ height: 60px; zoom: 1.5 }}
h1 {{ font-size: 76px; margin: 8px 0 }}
main div {{ display: flex; justify-content: space-evenly }}
img {{ min-width: 0; height: 400px; object-fit: contain }}
</style>
<header></header>
<main style="width: auto">
<h1>{escape(TITLE)}</h1>
<div>{PICTURES}</div>
</main>
"""

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=which("chromium-headless-shell") or which("chromium"))
    page = browser.new_page(viewport={"width": 1200, "height": 630}, color_scheme="light")
    page.goto((STATIC / "catvote.css").as_uri())  # the page that takes its place may load its neighbours
    page.set_content(PAGE)
    page.screenshot(path=STATIC / "card.png")
    browser.close()
