"""Serve optuna-dashboard over the studies. Knows HTTP; what the pages show is storage/board.py and notes.py."""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from forecasters import ExpectedError
from storage import DatabaseUnavailable, board
from storage.retrying import RetryingStorage

PAGE_WAIT_S = 20.0  # that a page waits for a database that is away; a browser asks again every ten seconds


class PortTaken(ExpectedError, ValueError):
    """The address to serve on cannot be had."""


class DashboardServer(ThreadingMixIn, WSGIServer):
    """A thread a request, as optuna-dashboard's own command has it: a slow page must not hold up the others."""

    daemon_threads = True  # Ctrl-C waits for no page


class Handler(WSGIRequestHandler):
    """Quiet, and patient with browsers that go away in the middle of a page."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionResetError, BrokenPipeError):
            self.close_connection = True


class ServerV6(DashboardServer):
    address_family = socket.AF_INET6


def bind(storage: RetryingStorage, folder: Path, host: str, port: int) -> DashboardServer:
    """A server that answers once `serve_forever` runs. Port 0: any free one. Raises PortTaken."""
    storage.wait_s = min(storage.wait_s, PAGE_WAIT_S)
    logging.getLogger("optuna_dashboard._bottle_util").addFilter(_in_one_line)
    kind = ServerV6 if ":" in host else DashboardServer
    try:
        return make_server(host, port, board.application(storage, folder), server_class=kind, handler_class=Handler)
    except OSError as error:
        raise PortTaken(f"{host}:{port}: {error.strerror or error}; name another with --host and --port") from None


def _in_one_line(record: logging.LogRecord) -> bool:
    """optuna-dashboard logs a traceback for a page that failed; that the database is away takes no traceback."""
    error = sys.exc_info()[1]
    if isinstance(error, DatabaseUnavailable):
        record.msg, record.args = str(error), ()
    return True


def serve(server: DashboardServer, host: str, *, say: Callable[[str], None]) -> None:
    """Answer until KeyboardInterrupt, which is passed on."""
    port = server.server_port
    if not is_loopback(host):
        say(
            f"warning: {host} is open to other machines and there is no login: whoever reaches port {port} can edit "
            "and delete studies; keep it behind a proxy, or leave --host out"
        )
    say(f"http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C ends it)")
    try:
        server.serve_forever()
    finally:
        server.server_close()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
