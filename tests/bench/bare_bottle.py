"""The ceiling: as little as Bottle can do. A constant for a page, and a form that is read and answered, not stored."""

import os
from pathlib import Path

from bottle import Bottle, HTTPResponse, request

PAGE = Path(os.environ["PAGES"], "page.html").read_bytes()
app = Bottle()


@app.get("/")
def index():
    return PAGE


@app.post("/add")
def add():
    return HTTPResponse(status=303, headers={"Location": f"/?voted={request.forms.vote}"})
