"""Apply schema.sql, for `make initdb`: to the database of DATABASE_URL or, if that is not set, to the local one."""

from local.processes import as_command
from local.settings import read_dotenv, service_code
from local.target import target


def main() -> None:
    """Apply it, and say where."""
    with as_command():
        read_dotenv()
        with target() as database:
            service_code().initdb(database.url)
            print("schema.sql is applied.")


if __name__ == "__main__":
    main()
