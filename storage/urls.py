"""URLs of a Postgres database: checked, shown without the password, handed to a child process."""

from __future__ import annotations

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from storage import DatabaseUnavailable


def parse_url(url: str) -> URL:
    """A checked Postgres URL for SQLAlchemy. Raises DatabaseUnavailable, without the password."""
    try:
        parsed = make_url(url)
        is_a_port = parsed.port is None or 0 < parsed.port < 65536
    except (ArgumentError, ValueError):  # a ValueError is of a port that is no number
        raise DatabaseUnavailable(
            "the storage is not a URL; write postgresql://USER@HOST:PORT/DATABASE (--storage, OPTUNA_STORAGE)"
        ) from None
    if not is_a_port:
        raise DatabaseUnavailable(f"{without_password(parsed)}: a port is a number from 1 to 65535")
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise DatabaseUnavailable(
            f"{parsed.get_backend_name()}: studies live in Postgres; write postgresql://USER@HOST:PORT/DATABASE"
        )
    return parsed.set(drivername="postgresql+psycopg2")


def without_password(url: URL) -> str:
    """The URL as it may be shown, in the form that psql reads too: no driver, no password."""
    query = {key: value for key, value in url.query.items() if key != "password"}
    return URL.create("postgresql", url.username, None, url.host, url.port, url.database, query).render_as_string()


def hand_over(url: URL) -> tuple[str, dict[str, str]]:
    """The URL without its password and the environment that carries it, for a child process."""
    query_password = url.query.get("password")
    password = url.password or (query_password if isinstance(query_password, str) else None)
    return without_password(url), {} if password is None else {"PGPASSWORD": str(password)}
