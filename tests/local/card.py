"""Draws static/card.png, which goes with a link to catvote in a chat, from the candidates' pictures: `make card`."""

import base64
import mimetypes
from html import escape
from shutil import which

from playwright.sync_api import sync_playwright

from catvote import CANDIDATES, FOLDER, TITLE

STATIC = FOLDER / "static"


def address_of(picture):
    """Return a data: address with a file of static/; this page may load no other."""
    content_type, _ = mimetypes.guess_type(picture)
    return f"data:{content_type};base64,{base64.b64encode((STATIC / picture).read_bytes()).decode()}"


pictures = [f'<img src="{address_of(candidate.picture)}">' for candidate in CANDIDATES.values()]
PAGE = f"""
<style>
{(STATIC / "catvote.css").read_text()}
header {{ height: 60px; zoom: 1.5 }}
h1 {{ font-size: 76px; margin: 8px 0 }}
main div {{ display: flex; justify-content: space-evenly }}
img {{ min-width: 0; height: 400px; object-fit: contain }}
</style>
<header></header>
<main style="width: auto">
<h1>{escape(TITLE)}</h1>
<div>{"".join(pictures)}</div>
</main>
"""

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=which("chromium"))
    page = browser.new_page(viewport={"width": 1200, "height": 630}, color_scheme="light")
    page.set_content(PAGE)
    page.screenshot(path=STATIC / "card.png")
    browser.close()
