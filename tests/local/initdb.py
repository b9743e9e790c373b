"""Apply schema.sql, for `make initdb`: to the database of DATABASE_URL or, if that is not set, to the local one."""

from local.postgres import apply_schema, as_command, read_dotenv, target


def main() -> None:
    """Apply it, and say where."""
    with as_command():
        read_dotenv()
        with target() as database:
            apply_schema(database.url)
            print(f"schema.sql is applied to {database.name}.")


if __name__ == "__main__":
    main()
