"""The async way: FastAPI and asyncpg, fast as they come. Each page counts all votes, each vote is one INSERT."""

import os
from contextlib import asynccontextmanager
from typing import Annotated

import asyncpg
from fastapi import FastAPI, Form, Request
from fastapi.responses import RedirectResponse
from fastapi.templating import Jinja2Templates


@asynccontextmanager
async def lifespan(app):
    async with asyncpg.create_pool(os.environ["DATABASE_URL"]) as app.state.pool:
        yield


app = FastAPI(lifespan=lifespan)
templates = Jinja2Templates(os.environ["PAGES"])


@app.get("/")
async def index(request: Request):
    votes = await app.state.pool.fetch("SELECT vote, count(*) FROM vote GROUP BY vote")
    return templates.TemplateResponse(request, "index.html", {"votes": dict(votes)})


@app.post("/add")
async def add(vote: Annotated[str, Form()]):
    await app.state.pool.execute("INSERT INTO vote (vote) VALUES ($1)", vote)
    return RedirectResponse(f"/?voted={vote}", status_code=303)
