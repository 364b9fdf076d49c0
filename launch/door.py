"""Who may come in to what this package serves over HTTP, and the threaded server that both pages and forecasts use.

Knows HTTP and nothing of what is served.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from forecasters import ExpectedError

MIN_TOKEN = 16  # characters
MAX_UNREAD = 2**20  # bytes of a refused request that are read, so that its sender reads the answer

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]  # of WSGI


class CannotServe(ExpectedError, ValueError):
    """It cannot be served as asked."""


@dataclass(frozen=True, kw_only=True)
class Door:
    """Who may come in.

    A name that another site's owner lets resolve to this machine is not ours, and neither is another site's page: a
    browser tells both, in Host and in Origin. From other machines only those come in who know the token.
    """

    host: str  # to listen on
    token: str | None
    what: str = "dashboard"  # it is the door of

    def stranger(self, environ: Mapping[str, Any]) -> str | None:
        """Why a request is refused whatever its token, in one line; None: it is not."""
        host, origin = environ.get("HTTP_HOST", ""), environ.get("HTTP_ORIGIN")
        if not self._is_ours(_host_name(host)):
            return f"Host is {host!r}: this {self.what} is http://{self.host}:{environ['SERVER_PORT']}, so ask for that"
        # Behind an HTTPS proxy that passes our Host, only the browser knows whether the page is ours.
        same = environ.get("HTTP_SEC_FETCH_SITE") == "same-origin"
        if origin is not None and not same and origin not in (f"http://{host}", f"https://{host}"):
            return f"Origin is {origin!r}: pages of other sites are not let in"
        return None

    def _is_ours(self, name: str) -> bool:
        if is_loopback(name) or name == self.host.lower():
            return True
        # Listening on every address. No other site's name is an address or this machine's name.
        return self.host in ("0.0.0.0", "::") and (_is_address(name) or name == socket.gethostname().lower())

    def knows(self, token: str) -> bool:
        return self.token is not None and hmac.compare_digest(token.encode(), self.token.encode())

    def cookie(self, port: str) -> str:
        """What a browser keeps in place of the token: other ports' pages share the cookies of a host."""
        return f"studies-{port}={hmac.digest((self.token or '').encode(), port.encode(), 'sha256').hex()}"

    def has_cookie(self, environ: Mapping[str, Any]) -> bool:
        wanted = self.cookie(environ["SERVER_PORT"]).encode()
        return any(
            hmac.compare_digest(part.strip().encode(), wanted) for part in environ.get("HTTP_COOKIE", "").split(";")
        )


def open_door(host: str, token_file: Path | None, *, what: str, danger: str) -> Door:
    """Who may come in at this address. Raises CannotServe where anybody could, and for a bad token.

    danger: what whoever reaches it could do.
    """
    if token_file is None:
        if not is_loopback(host):
            raise CannotServe(
                f"--host {host} lets other machines in, and whoever reaches it could {danger}; give --token-file FILE "
                "with a secret, or leave --host out"
            )
        return Door(host=host, token=None, what=what)
    advice = f"make a token with: openssl rand -hex 16 > {token_file}"
    try:
        token = token_file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise CannotServe(f"{token_file}: {error.strerror}; {advice}") from None
    except UnicodeDecodeError:
        token = ""
    if len(token) < MIN_TOKEN or len(token.split()) != 1:
        raise CannotServe(f"{token_file}: not one word of at least {MIN_TOKEN} ASCII characters; {advice}")
    return Door(host=host, token=token, what=what)


def guarded(pages: Application, door: Door) -> Application:
    """The pages, for those whom the door lets in; others get one line."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def line(status: str, text: str, *headers: tuple[str, str]) -> Iterable[bytes]:
            length = environ.get("CONTENT_LENGTH") or "0"
            environ["wsgi.input"].read(min(int(length), MAX_UNREAD) if length.isdecimal() else 0)
            start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
            return [f"{text}\n".encode()]

        if refusal := door.stranger(environ):
            return line("403 Forbidden", refusal)
        if door.token is None or door.has_cookie(environ):
            return pages(environ, start_response)
        cookie = ("Set-Cookie", f"{door.cookie(environ['SERVER_PORT'])}; Path=/; HttpOnly; SameSite=Strict")
        kind, _, bearer = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if kind.lower() == "bearer" and door.knows(bearer.strip()):
            return pages(environ, lambda status, headers, *more: start_response(status, [*headers, cookie], *more))
        query = parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        if environ["REQUEST_METHOD"] == "GET" and door.knows(dict(query).get("token", "")):
            # Without the token, which neither the address bar nor the history needs to keep.
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            path = "/" + quote(environ["PATH_INFO"].lstrip("/"), encoding="latin-1")
            return line("303 See Other", path, ("Location", f"{path}?{rest}" if rest else path), cookie)
        asked = (
            f"this {door.what} asks for its token: open it once with ?token=TOKEN, or send Authorization: Bearer TOKEN"
        )
        return line("401 Unauthorized", asked, ("WWW-Authenticate", "Bearer"))

    return answer


def _host_name(host: str) -> str:
    """The name in a Host header, in lower case and without its port; "" for what is no name with or without a port."""
    found = re.fullmatch(r"(?:\[([\da-f:]+)\]|([\w.-]+))(?::\d+)?", host.lower())
    return (found[1] or found[2]) if found else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Server(ThreadingMixIn, WSGIServer):
    """A thread a request: a slow one must not hold up the others."""

    daemon_threads = True  # Ctrl-C waits for no page
    request_queue_size = 128  # connections that wait to be taken up; one beyond them is tried again after a second

    def __init__(self, *words: Any, **options: Any) -> None:
        self._in_progress, self._changed = 0, threading.Condition()
        super().__init__(*words, **options)

    def begin(self) -> None:
        """A request has been read."""
        with self._changed:
            self._in_progress += 1

    def end(self) -> None:
        """It has been answered."""
        with self._changed:
            self._in_progress -= 1
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Wait until every request that was read is answered, for so long at most; whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._in_progress, seconds)


class Handler(WSGIRequestHandler):
    """Quiet, and patient with browsers that go away in the middle of a page."""

    timeout = 60  # seconds without a byte
    wbufsize = 2**16  # status, headers and body leave together

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        self.begun = False
        try:
            super().handle()
        except (ConnectionResetError, BrokenPipeError, TimeoutError):
            self.close_connection = True
        finally:
            if self.begun:
                self.server.end()  # pyright: ignore[reportAttributeAccessIssue]

    def parse_request(self) -> bool:
        self.begun = True
        self.server.begin()  # pyright: ignore[reportAttributeAccessIssue]
        return super().parse_request()


class ServerV6(Server):
    address_family = socket.AF_INET6


def bind(pages: Application, door: Door, port: int) -> Server:
    """A server that answers once `serve_forever` runs, those whom the door lets in. Port 0: any free one.

    Raises CannotServe.
    """
    kind = ServerV6 if ":" in door.host else Server
    try:
        return make_server(door.host, port, guarded(pages, door), server_class=kind, handler_class=Handler)
    except OSError as error:
        reason = error.strerror or error
        raise CannotServe(f"{door.host}:{port}: {reason}; name another with --host and --port") from None


def address(server: Server, door: Door) -> str:
    """Where a browser on this machine finds it."""
    host = f"[{door.host}]" if ":" in door.host else door.host
    return f"http://{host}:{server.server_port}/{'?token=TOKEN the first time' if door.token else ''}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
