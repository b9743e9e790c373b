"""The Flask way: what the usual tutorials lead to. Each page counts all votes, each vote is an object of an ORM."""

import os
from pathlib import Path

from flask import Flask, jsonify, redirect, render_template, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import func

STATIC = Path(__file__).parents[2] / "static"
app = Flask(__name__, template_folder=os.environ["PAGES"], static_folder=STATIC)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+psycopg2:")
db = SQLAlchemy(app)


class Vote(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    date_created = db.Column(db.DateTime, server_default=func.now())
    vote = db.Column(db.String(10), nullable=False)


def count():
    votes = db.session.query(Vote.vote, func.count()).group_by(Vote.vote).all()
    return {"Gummi": 0, "Pita": 0, **dict(map(tuple, votes))}


@app.get("/")
def index():
    return render_template("template.html", votes=count())


@app.get("/tally.json")
def tally():
    answer = jsonify(count())
    answer.add_etag()
    return answer.make_conditional(request)


@app.post("/add")
def add():
    vote = request.form["vote"]
    db.session.add(Vote(vote=vote))
    db.session.commit()
    return redirect(f"/?voted={vote}")
