"""Jobs of a running Ray, through its dashboard: what goes along with one, following it to its end, stopping it.

Ray's client does the talking. What it raises, logs and prints comes out as one line that says what to do.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import logging
import os
import platform
import re
import shlex
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from elastic.errors import ConfigurationError, ElasticError

from .packing import UnusableFiles, pack, pack_packages

T = TypeVar("T")

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
OLDEST = {"Ray": (2, 60), "Python": (3, 11)}
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 30.0
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 30.0
LAST_WORDS_SECONDS = 10.0  # how long after a job's end its log is awaited
_ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray lets them win over what it is told


class RayUnavailable(ElasticError):
    """No Ray at the address, or none that takes jobs from here. The message says what to do."""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """A script, and what it needs where it runs.

    folder: that goes along, and in which the script runs; it contains the script. stop_seconds: that the job gets to
    end by itself when it is stopped. installed: the packages that are installed there, instead of those from here.
    python: the command there.
    """

    name: str
    script: Path
    folder: Path
    arguments: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    pip: tuple[str, ...] = ()
    stop_seconds: int = 30
    installed: bool = False
    python: str = "python"

    @property
    def entrypoint(self) -> str:
        """Of Ray's shell nothing may be left: it would die of the first signal, and who waits for the script then, in a
        container without an init, is nobody; to Ray it would seem to run on until it is killed."""
        return "exec " + shlex.join([self.python, self.script.relative_to(self.folder).as_posix(), *self.arguments])


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job has ended. status: SUCCEEDED, FAILED or STOPPED. code: of the script, negative if a signal ended it;
    None if it has none. reason: why the script never ran, if it did not."""

    status: str
    code: int | None
    reason: str = ""


# --- what is wrong can be said before anything is sent ----------------------------------------------------------------


def checked(spec: JobSpec) -> JobSpec:
    """Raises UnusableFiles or ConfigurationError."""
    _check_script(spec.script)
    if not spec.folder.is_dir():
        raise UnusableFiles(f"{spec.folder} is not a folder; choose another --working-dir")
    if not spec.script.is_relative_to(spec.folder):
        raise ConfigurationError(f"{spec.script} is not in {spec.folder}: choose a --working-dir that contains it")
    return spec


def _check_script(script: Path) -> None:
    try:
        tree = ast.parse(script.read_bytes(), filename=str(script))
    except OSError as error:
        raise UnusableFiles(f"cannot read {script}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        where = f"{script}:{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else str(script)
        raise UnusableFiles(f"{where} is not Python: {getattr(error, 'msg', error)}") from None
    if not any(_does_something(statement) for statement in tree.body):
        raise UnusableFiles(
            f"{script} defines things and runs nothing; end it with "
            'if __name__ == "__main__": elastic.Trainer(train, ...).fit()'
        )


def _does_something(statement: ast.stmt) -> bool:
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Expr)):
        return any(isinstance(node, (ast.Call, ast.Await)) for node in ast.walk(statement))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    return not isinstance(statement, definitions)


def dashboard_url(address: str) -> str:
    """As Ray's client wants it. Raises ConfigurationError."""
    url = "http://127.0.0.1:8265" if address == "auto" else address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    with contextlib.suppress(ValueError):
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url.rstrip("/")
    raise ConfigurationError(f"address {address!r} is not that of a dashboard, for example http://127.0.0.1:8265")


def _check_reachable(url: str) -> None:
    """Ray's client has no time limit of its own."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((str(parts.hostname), port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise RayUnavailable(
            f"no Ray at {url}: {why}; start one (ray start --head), or say where its dashboard is (--address)"
        ) from None


def _check_token(environment: Mapping[str, str]) -> None:
    """Ray's own complaint about a missing file is a stack of C++ frames."""
    if environment.get("RAY_AUTH_MODE", "").lower() != "token" or environment.get("RAY_AUTH_TOKEN"):
        return
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        found = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise RayUnavailable(f"cannot read the token in {path}: {_why(error)}; {_SET_TOKEN}") from None
    if not found:
        raise RayUnavailable(f"{path} holds no token; {_SET_TOKEN}")


_SET_TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the token that Ray was started with"


# --- a Ray that takes jobs --------------------------------------------------------------------------------------------


class Jobs:
    """The jobs of the Ray whose dashboard is at `address`. Raises ConfigurationError if that is none.

    All of it raises RayUnavailable when the dashboard does not answer, or not as it should. versions: of Ray and Python
    there. They need not be those from here: nothing that is pickled comes from here or goes here.
    """

    def __init__(self, address: str) -> None:
        self.address = dashboard_url(address)
        _check_reachable(self.address)
        _check_token(os.environ)
        _quiet()
        with _said(self.address), _without(_ADDRESS_VARIABLES):
            self._client: Any = _limited(lambda: JobSubmissionClient(self.address), ANSWER_SECONDS)
            self.versions = _limited(self._versions, ANSWER_SECONDS)
        self._check_versions()

    def differences(self) -> list[str]:
        """What is there in another version than here."""
        here = {"Ray": ray.__version__, "Python": platform.python_version()}
        known = {what: theirs for what, theirs in self.versions.items() if theirs}
        return [
            f"{what} {theirs} instead of {here[what]}"
            for what, theirs in known.items()
            if _numbers(theirs) != _numbers(here[what])
        ]

    def submit(self, spec: JobSpec, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """Packs, uploads, submits. unless: asked at the last moment; if so nothing is submitted, and it is False."""
        with _said(self.address):
            if self._details(spec.name) is not None:
                raise ConfigurationError(_taken(spec.name))
            environment = self._runtime_environment(spec)
            if unless():
                return False
            self._submit(spec, environment)
            return True

    def _submit(self, spec: JobSpec, environment: dict[str, Any]) -> None:
        try:
            self._client.submit_job(entrypoint=spec.entrypoint, submission_id=spec.name, runtime_env=environment)
        except RuntimeError as error:
            if "already exists" in str(error):  # somebody was faster
                raise ConfigurationError(_taken(spec.name)) from None
            raise

    def stop(self, name: str) -> bool:
        """Asks it to end: SIGTERM, and SIGKILL after its `stop_seconds`. False if it has ended."""
        with _said(self.address):
            return bool(_limited(lambda: self._client.stop_job(name), ANSWER_SECONDS))

    async def follow(self, name: str, write: Callable[[str], None]) -> Ended:
        """Writes its log as it comes, until it has ended. `write` must not raise."""
        log = asyncio.create_task(self._copy_log(name, write))
        try:
            ended = await self._end_of(name)
            await asyncio.wait({log}, timeout=LAST_WORDS_SECONDS)
            return ended
        finally:
            log.cancel()

    async def _copy_log(self, name: str, write: Callable[[str], None]) -> None:
        written = 0
        while True:
            with contextlib.suppress(Exception):  # a lost connection: whether that matters, `_end_of` finds out
                async with contextlib.aclosing(self._client.tail_job_logs(name)) as log:
                    position = 0  # Ray always begins at the beginning
                    async for text in log:
                        write(text[max(0, written - position) :])
                        position += len(text)
                        written = max(written, position)
                if await in_thread(lambda: self.ended(name)):
                    return
            await asyncio.sleep(POLL_SECONDS)

    async def _end_of(self, name: str) -> Ended:
        heard = time.monotonic()
        while True:
            try:
                ended = await in_thread(lambda: self.ended(name))
                heard = time.monotonic()
                if ended is not None:
                    return ended
            except RayUnavailable:
                if time.monotonic() - heard > PATIENCE_SECONDS:
                    raise
            await asyncio.sleep(POLL_SECONDS)

    def ended(self, name: str) -> Ended | None:
        """None while it has not."""
        with _said(self.address):
            found = _limited(lambda: self._details(name), ANSWER_SECONDS)
        if found is None:
            raise RayUnavailable(f"{self.address} knows no job {name}: it is another Ray, or has been started anew")
        status, ran = str(found.status.value), found.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR"
        if status not in ("SUCCEEDED", "FAILED", "STOPPED"):
            return None
        reason = _last_line(found.message or "") if status == "FAILED" and not ran else ""
        return Ended(status=status, code=found.driver_exit_code, reason=reason)

    def _details(self, name: str) -> Any:
        """None if there is no such job."""
        try:
            return self._client.get_job_info(name)
        except RuntimeError as error:
            if "status code 404" in str(error):
                return None
            raise

    def _runtime_environment(self, spec: JobSpec) -> dict[str, Any]:
        names, folder = self._uploaded(lambda file: pack(spec.folder, spec.excludes, file))
        script = spec.script.relative_to(spec.folder).as_posix()
        if script not in names:
            raise UnusableFiles(f"{script} would not go along: a .gitignore, .rayignore or --exclude leaves it out")
        found = {"working_dir": folder, "env_vars": {STOP_WAIT: str(spec.stop_seconds), **spec.environment}}
        if not (spec.installed or "elastic/__init__.py" in names):  # a checkout brings its own
            found["py_modules"] = [self._uploaded(pack_packages)[1]]
        return found | ({"pip": list(spec.pip)} if spec.pip else {})

    def _uploaded(self, write: Callable[[Any], T]) -> tuple[T, str]:
        """What `write` returns, and where Ray finds what it has written. Ray is sent nothing that it has."""
        with tempfile.NamedTemporaryFile(prefix="elastic-", suffix=".zip") as file:
            written = write(file)
            file.flush()
            uri: str = self._client._upload_package_if_needed(file.name, include_gitignore=False, is_file=True)
            return written, uri

    def _versions(self) -> dict[str, str]:
        found = self._client._do_request("GET", "/api/version").json()
        more = self._client._do_request("GET", "/api/v0/cluster_metadata")
        data = more.json().get("data", {}) if more.status_code == 200 else {}
        return {"Ray": str(found["ray_version"]), "Python": str(data.get("pythonVersion", ""))}

    def _check_versions(self) -> None:
        for what, oldest in OLDEST.items():
            theirs = self.versions[what]
            if theirs and _numbers(theirs) < oldest:
                needed = ".".join(map(str, oldest))
                raise RayUnavailable(f"{self.address} has {what} {theirs}: elastic needs {needed} or newer there")


async def in_thread(call: Callable[[], T]) -> T:
    """What it returns or raises. Nobody waits for the thread when the process ends."""
    return await asyncio.wrap_future(_begun(call))


def _limited(call: Callable[[], T], seconds: float) -> T:
    """For calls without a time limit. Raises TimeoutError."""
    return _begun(call).result(seconds)


def _begun(call: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()  # from here on nobody can cancel it
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="elastic-job", daemon=True).start()
    return future


@contextlib.contextmanager
def _said(url: str) -> Iterator[None]:
    """What Ray's client raises, as one line."""
    try:
        yield
    except ElasticError:
        raise
    except AuthenticationError as error:
        wrong = "does not accept this token" if "invalid" in str(error).lower() else "wants a token"
        raise RayUnavailable(f"the Ray at {url} {wrong}; {_SET_TOKEN}") from None
    except TimeoutError:
        raise RayUnavailable(f"what listens at {url} does not answer; is it Ray's dashboard?") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RayUnavailable(f"what listens at {url} does not answer as Ray's dashboard: {_why(error)}") from None


def _taken(name: str) -> str:
    return f"there is a job {name} already: choose another --name"


def _why(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _last_line(str(error)) or type(error).__name__


def _last_line(text: str) -> str:
    """Where a server's traceback says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip().strip(".")]
    return lines[-1][:300] if lines else ""


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _quiet() -> None:
    """What its client has to say is said by this command."""
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.CRITICAL + 1)
