"""`elastic submit`: a training script as a job of a running Ray, with all that it needs; followed to its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from elastic.config import check_name
from elastic.errors import ConfigurationError, ElasticError

from . import exits

if TYPE_CHECKING:
    from actors.jobs import Ended, Jobs, JobSpec

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_KEPT = 8192
_MISSING = re.compile(r"^ModuleNotFoundError: No module named '(\w+)", re.MULTILINE)


@click.command(
    epilog="Example: elastic submit train.py --name gpt-1 --exclude data --env HF_HOME=/data/hf -- --lr 3e-4"
)
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--address",
    envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
    default=DEFAULT_ADDRESS,
    show_default=True,
    metavar="URL",
    help="Of Ray's dashboard; RAY_API_SERVER_ADDRESS or RAY_ADDRESS say it, too.",
)
@click.option("--name", "--submission-id", help="Of the job.  [default: the script's, and some digits]")
@click.option(
    "--working-dir",
    type=click.Path(path_type=Path),
    help="Folder that goes along, without what .gitignore and .rayignore name.  [default: the script's]",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="... nor this, as in a .gitignore; repeatable.")
@click.option("--env", "environment", multiple=True, metavar="KEY=VALUE", help="For the job and its peers; repeatable.")
@click.option("--pip", multiple=True, metavar="REQUIREMENT", help="Installed for the job, by Ray; repeatable.")
@click.option(
    "--stop-seconds",
    type=click.IntRange(1),
    default=30,
    show_default=True,
    help="That the job gets to leave and to save when it is stopped, before it is killed.",
)
@click.option("--installed", is_flag=True, help="Use the elastic that is installed there, not the one from here.")
@click.option("--python", default="python", show_default=True, metavar="COMMAND", help="That runs the script there.")
@click.option("--no-wait", is_flag=True, help="Return once it is submitted.")
@click.option("--json", "as_json", is_flag=True, help="Print facts alone, as JSON; the log goes to standard error.")
def command(no_wait: bool, as_json: bool, **options: Any) -> None:
    """Run a training script as a job of a running Ray.

    The script, its folder and elastic itself go along: elastic need not be installed there. Its log is shown until it
    ends, and this command ends with the script's exit code. Ctrl-C or SIGTERM stop the job: its peers finish their
    round, save and leave; once more leaves it alone. If this command is killed, the job goes on.

    For a Ray with authentication: RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE.
    """
    try:
        from actors.jobs import Jobs, checked

        spec = checked(_spec(options))
        submission = Submission(Jobs(options["address"]), spec, as_json=as_json)
        sys.exit(asyncio.run(submission.run(wait=not no_wait)))
    except ElasticError as error:
        _refuse(error)
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)


def _refuse(error: ElasticError) -> NoReturn:
    from actors.packing import UnusableFiles

    click.echo(f"elastic submit: {error}", err=True)
    if isinstance(error, ConfigurationError):
        sys.exit(exits.USAGE)
    sys.exit(exits.DATA if isinstance(error, UnusableFiles) else exits.NETWORK)


def _spec(options: dict[str, Any]) -> JobSpec:
    from actors.jobs import JobSpec

    script = Path(os.path.abspath(options["script"]))  # links stay what they are: the folder is the one that was named
    folder = Path(os.path.abspath(options["working_dir"] or script.parent))
    stem = re.sub(r"[^A-Za-z0-9]+", "-", script.stem).strip("-")[:40] or "job"
    return JobSpec(
        name=check_name("job", options["name"] or f"{stem}-{secrets.token_hex(4)}"),
        script=script,
        folder=folder,
        excludes=options["exclude"],
        environment=dict(_pair(text) for text in options["environment"]),
        **{each: options[each] for each in ("arguments", "pip", "stop_seconds", "installed", "python")},
    )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key):
        raise ConfigurationError(f"--env {text!r} is not KEY=VALUE")
    return key, value


class Submission:
    """One job, from here to its end. `run` returns the exit code."""

    def __init__(self, jobs: Jobs, spec: JobSpec, *, as_json: bool) -> None:
        self._jobs, self._spec, self._as_json = jobs, spec, as_json
        self._log = sys.stderr if as_json else sys.stdout
        self._began = time.monotonic()
        self._told: list[signal.Signals] = []
        self._once, self._twice = asyncio.Event(), asyncio.Event()
        self._stopped_at = float("inf")
        self._last_words = ""

    async def run(self, *, wait: bool) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._tell, number)
        job, left = asyncio.create_task(self._submitted(wait)), asyncio.create_task(self._twice.wait())
        await asyncio.wait({job, left}, return_when=asyncio.FIRST_COMPLETED)
        if job.done():
            return job.result()
        self._say(f"{self._spec.name} is left alone; {self._commands()}")
        return self._facts("LEFT", 128 + self._told[0])

    def _tell(self, number: signal.Signals) -> None:
        (self._twice if self._told else self._once).set()
        self._told.append(number)

    async def _submitted(self, wait: bool) -> int:
        from actors.jobs import in_thread

        if different := self._jobs.differences():
            self._say(f"there it runs with {' and '.join(different)}")
        if not await in_thread(lambda: self._jobs.submit(self._spec, unless=lambda: bool(self._told))):
            self._say("stopped before anything was submitted")
            return self._facts("UNSENT", 128 + self._told[0])
        if wait or self._told:
            self._say(f"submitted to {self._jobs.address} as {self._spec.name}; Ctrl-C stops it")
            return await self._followed()
        self._say(f"submitted to {self._jobs.address} as {self._spec.name}; {self._commands()}")
        return self._facts("PENDING", exits.OK)

    async def _followed(self) -> int:
        from actors.jobs import RayUnavailable

        stopping = asyncio.create_task(self._stop())
        try:
            ended = await self._jobs.follow(self._spec.name, self._write)
        except RayUnavailable as error:
            raise RayUnavailable(f"{error}; {self._spec.name} may well go on. {self._commands()}") from None
        finally:
            stopping.cancel()
        code = self._code(ended)
        self._say(self._account(ended, code))
        return self._facts(ended.status, code)

    async def _stop(self) -> None:
        """Once told to."""
        from actors.jobs import RayUnavailable, in_thread

        await self._once.wait()
        seconds = self._spec.stop_seconds
        self._say(f"stopping {self._spec.name}: it has {seconds} s to leave and to save; once more leaves it alone")
        try:
            self._stopped_at = time.monotonic()
            await in_thread(lambda: self._jobs.stop(self._spec.name))
        except RayUnavailable as error:
            self._say(f"it could not be stopped: {error}; {self._commands()}")

    def _code(self, ended: Ended) -> int:
        if ended.status == "SUCCEEDED":
            return exits.OK
        if ended.status == "STOPPED":
            return 128 + (self._told[0] if self._told else signal.SIGTERM)
        if ended.code is not None and ended.code < 0:
            return 128 - ended.code
        return ended.code or exits.FAILED

    def _account(self, ended: Ended, code: int) -> str:
        name = self._spec.name
        if ended.status == "STOPPED":
            seconds = self._spec.stop_seconds
            over = time.monotonic() - self._stopped_at > seconds
            late = f"; its {seconds} s were over: what it had not saved is lost" if over else ""
            return f"{name} was stopped{late}"
        if ended.status == "SUCCEEDED":
            return f"{name} succeeded"
        return f"{name} failed: {ended.reason or f'exit code {code}'}{self._hint(code)}"

    def _hint(self, code: int) -> str:
        if code == 127:
            return f"; there may be no command {self._spec.python!r} where Ray runs: say which --python"
        missing = _MISSING.findall(self._last_words)
        if not missing:
            return ""
        ours = self._spec.installed and missing[-1] == "elastic"
        return f"; {missing[-1]} is not installed there: " + ("leave out --installed" if ours else "name it with --pip")

    def _commands(self) -> str:
        where = f"--address {self._jobs.address} {self._spec.name}"
        return f"to follow it: ray job logs --follow {where}; to stop it: ray job stop {where}"

    # --- what is shown, as long as somebody is there to see it -------------------------------------------------------

    def _write(self, text: str) -> None:
        self._last_words = (self._last_words + text)[-_KEPT:]
        try:
            self._log.write(text)
            self._log.flush()
        except OSError:
            _silence(self._log.fileno())

    def _say(self, line: str) -> None:
        try:
            click.echo(f"elastic submit: {line}", err=True)
        except OSError:
            _silence(sys.stderr.fileno())

    def _facts(self, status: str, code: int) -> int:
        """Prints them, if asked to; returns `code`."""
        if self._as_json:
            facts = {"name": self._spec.name, "address": self._jobs.address, "status": status, "exit_code": code}
            seconds = round(time.monotonic() - self._began, 3)
            with contextlib.suppress(OSError):
                click.echo(json.dumps(facts | {"seconds": seconds}))
        return code


def _silence(descriptor: int) -> None:
    # what the stream has kept goes nowhere, also when Python flushes it at its end
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)
