"""Asks a run's coordinator, as a peer would reach it."""

from __future__ import annotations

import dataclasses
import socket
import time

from collectives.sockets import evidence_of

from ..config import JoinToken, addresses, check_endpoint
from ..errors import CoordinatorUnavailable, ElasticError
from ..inquiry import inquire
from ..messages import StatusReport, StatusRequest
from .facts import Address, Call

KNOCKS = 3
WHY = {
    "refused": "the connection is refused: nobody listens on that port",
    "timeout": "no answer: a firewall drops the packets, or the host is down",
    "unreachable": "there is no way to that host",
    "reset": "the connection was cut off",
    "eof": "the other side hung up",
}


def call(where: JoinToken, timeout: float) -> Call:
    """timeout: seconds for each address to accept a connection, and for the coordinator to answer."""
    found = Call(run=where.run, addresses=tuple(reach(each, timeout) for each in addresses(where.coordinator)))
    if all(each.error for each in found.addresses):
        return dataclasses.replace(found, silent="none of its addresses can be reached")
    began = time.monotonic()
    try:
        report = inquire(where, StatusRequest, StatusReport, timeout)
    except CoordinatorUnavailable as error:
        return dataclasses.replace(found, silent=str(error))
    except ElasticError as error:
        return dataclasses.replace(found, refused=str(error))
    return dataclasses.replace(
        found,
        answered=time.monotonic() - began,
        protocol=report.protocol,
        generation=report.generation,
        members=len(report.members),
    )


def reach(address: str, timeout: float) -> Address:
    """address: tcp://HOST:PORT. Looks its name up, connects a few times, and hangs up."""
    host, port = check_endpoint("coordinator address", address.removeprefix("tcp://"))
    began = time.monotonic()
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return Address(address=address, error=f"the name {host} is not found: {error.strerror or error}")
    looked_up = time.monotonic() - began
    known = Address(address=address, found=tuple(dict.fromkeys(str(where[0]) for *_, where in entries)))
    try:
        knocks = [_connect(host, port, timeout) for _ in range(KNOCKS)]
    except OSError as error:
        return dataclasses.replace(known, looked_up=looked_up, error=WHY[evidence_of(error)])
    connected, local = min(knocks)
    return dataclasses.replace(known, looked_up=looked_up, connected=connected, local=local)


def _connect(host: str, port: int, timeout: float) -> tuple[float, str]:
    began = time.monotonic()
    with socket.create_connection((host, port), timeout) as sock:
        return time.monotonic() - began, str(sock.getsockname()[0])
