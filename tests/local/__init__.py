"""What `make run` and its sisters need besides production: a PostgreSQL of one's own, and the service on it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
