"""The async way: FastAPI and asyncpg, fast as they come. Each page counts all votes, each vote is one INSERT."""

import json
import os
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from urllib.parse import parse_qs

import asyncpg
from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates


@asynccontextmanager
async def lifespan(app):
    async with asyncpg.create_pool(os.environ["DATABASE_URL"]) as app.state.pool:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/static", StaticFiles(directory=Path(__file__).parents[2] / "static"))
templates = Jinja2Templates(os.environ["PAGES"])


async def count():
    votes = await app.state.pool.fetch("SELECT vote, count(*) FROM vote GROUP BY vote")
    return {"Gummi": 0, "Pita": 0, **dict(votes)}


@app.get("/")
async def index(request: Request):
    return templates.TemplateResponse(request, "template.html", {"votes": await count()})


@app.get("/tally.json")
async def tally(request: Request):
    body = json.dumps(await count()).encode()
    headers = {"ETag": f'"{sha256(body).hexdigest()[:16]}"'}
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@app.post("/add")
async def add(request: Request):
    # FastAPI's Form would need python-multipart, which hides catvote's own `multipart`.
    vote = parse_qs((await request.body()).decode())["vote"][0]
    await app.state.pool.execute("INSERT INTO vote (vote) VALUES ($1)", vote)
    return RedirectResponse(f"/?voted={vote}", status_code=303)
