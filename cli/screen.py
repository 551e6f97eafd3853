"""Where a command shows a run, and says what it has to say: neither may keep the run from its end.

A standard output that goes away (`| head`) costs what would be shown on it, and nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import click

from elastic.errors import ConfigurationError, CoordinatorUnavailable, ElasticError

from . import exits
from .view import Snapshot, View, clean, make_view


class Screen:
    """The view of `run` on `stream`, as long as somebody is there to see it."""

    def __init__(self, run: str, stream: TextIO | None = None) -> None:
        stream = sys.stdout if stream is None else stream
        # a duplicate, since Ray gets the original
        self._stream = os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding)
        self._view: View | None = None
        self._try(self._open, run)

    def update(self, snapshot: Snapshot) -> None:
        if self._view is not None:
            self._try(self._view.update, snapshot)

    def event(self, event: dict[str, Any]) -> None:
        if self._view is not None:
            self._try(self._view.event, event)

    def close(self) -> None:
        if self._view is not None:
            self._try(self._view.close)

    def _open(self, run: str) -> None:
        self._view = make_view(self._stream, run=run)

    def _try(self, show: Callable[..., None], *what: Any) -> None:
        try:
            show(*what)
        except OSError:
            self._view = None
            _silence(self._stream)


def say(line: str, *, err: bool = False) -> None:
    """Prints a line, if anybody is there to read it."""
    try:
        click.echo(line, err=err)
    except OSError:
        _silence(sys.stderr if err else sys.stdout)


def refuse(command: str, code: int, message: str) -> NoReturn:
    """Prints one line and exits."""
    say(f"elastic {command}: {message}", err=True)
    sys.exit(code)


@contextmanager
def refusing(command: str, wrong: int = exits.USAGE) -> Iterator[None]:
    """What is raised within is said in one line, and ends the command. wrong: the code of a ConfigurationError."""
    try:
        yield
    except CoordinatorUnavailable as error:
        refuse(command, exits.NETWORK, clean(str(error)))
    except ConfigurationError as error:
        refuse(command, wrong, clean(str(error)))
    except ElasticError as error:
        refuse(command, exits.FAILED, clean(str(error)))


def _silence(stream: TextIO) -> None:
    # what the stream has kept goes nowhere, also when Python flushes it at its end
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
