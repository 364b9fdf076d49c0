"""Addresses and TCP ports that the private server listens on."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from ipaddress import ip_address

from storage import DatabaseUnavailable

PORTS = range(15432, 32768)  # below Linux' ephemeral ports, which a passing connection may hold while we are down


def addresses(listen: str) -> str:
    """Postgres' listenaddresses: the loopback is always among them."""
    if is_loopback(listen):
        return "127.0.0.1"
    return listen if listen in ("*", "0.0.0.0") else f"127.0.0.1,{listen}"


def is_of_this_machine(listen: str) -> bool:
    """Whether an address can be listened on here; True for what is no address."""
    try:
        family = socket.AF_INET6 if ip_address(listen).version == 6 else socket.AF_INET
    except ValueError:
        return True  # a name or "*": Postgres says what is wrong with it
    with socket.socket(family) as probe:
        try:
            probe.bind((listen, 0))
        except OSError:
            return False
        return True


def is_loopback(listen: str) -> bool:
    """Whether an address is reached from this machine alone."""
    with suppress(ValueError):
        return ip_address(listen).is_loopback
    return listen == "localhost"


def is_free(port: int, loopback_only: bool) -> bool:
    """Whether nobody listens on a TCP port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Postgres does
        try:
            probe.bind(("127.0.0.1" if loopback_only else "", port))
        except OSError:
            return False
        return True


def free_port(loopback_only: bool) -> int:
    """A random free TCP port of PORTS. Raises DatabaseUnavailable."""
    for port in random.sample(PORTS, 100):
        if is_free(port, loopback_only):
            return port
    raise DatabaseUnavailable(f"no free TCP port between {PORTS.start} and {PORTS.stop - 1} in 100 tries")
