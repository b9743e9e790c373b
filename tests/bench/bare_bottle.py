"""The ceiling: as little as Bottle can do. Constants for pages, and a form that is read and answered, not stored."""

import os
from pathlib import Path

from bottle import Bottle, HTTPResponse, request, response, static_file

PAGES = Path(os.environ["PAGES"])
PAGE = PAGES.joinpath("page.html").read_bytes()
HISTORY = PAGES.joinpath("history.html").read_bytes()
TALLY = PAGES.joinpath("tally.json").read_bytes()
STATIC = Path(__file__).parents[2] / "static"
app = Bottle()


@app.get("/")
def index():
    return PAGE


@app.get("/history")
def history():
    return HISTORY


@app.get("/tally.json")
def tally():
    response.content_type = "application/json"
    return TALLY


@app.get("/static/<path:path>")
def static(path):
    return static_file(path, root=STATIC)


@app.post("/add")
def add():
    return HTTPResponse(status=303, headers={"Location": f"/?voted={request.forms.vote}"})
