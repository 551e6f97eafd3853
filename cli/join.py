"""`elastic join`: this machine joins a run with peers of its own, keeps them alive, and leaves in good order."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from elastic.config import JoinToken, addresses, check_endpoint, check_name, endpoints, environment, is_loopback
from elastic.errors import ConfigurationError, ElasticError
from elastic.events import EventLog

from . import exits
from .logs import Logs
from .screen import Screen, refusing, say
from .script import check_script
from .site import Rows, prepare_out
from .stopping import Signals
from .view import Snapshot

if TYPE_CHECKING:
    from actors.charge import ChargeReport
    from actors.peer import PeerSpec
    from elastic.inquiry import Watch
    from elastic.messages import StatusReport

LOOK_SECONDS = 0.25
STOP_SECONDS = 2.0
AWAY_SECONDS = 5.0  # of a coordinator's silence before that is said
LAST_SECONDS = 10.0  # beyond the drain's own time, for peers to be gone
DONE = ("finished", "failed")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command's options, checked. ray: of a running one; None: one of this machine's own."""

    where: JoinToken
    script: Path
    function: str
    config: dict[str, Any]
    name: str
    peers: int
    room: int
    cpus: float
    gpus: float
    ranks: int
    stripes: str | None
    listen: str
    advertise: str | None
    max_restarts: int
    drain_seconds: float
    ray: str | None
    out: Path

    @property
    def names(self) -> list[str]:
        return [f"{self.name}-{i}" for i in range(self.peers)]

    @property
    def needs(self) -> dict[str, float]:
        """What each peer takes of a node."""
        return {"CPU": self.cpus, "GPU": self.gpus}


@click.command()
@click.argument("arguments", nargs=-1, metavar="[TOKEN] SCRIPT")
@click.option("--name", help="Name of this site; its peers are NAME-0, NAME-1, ...  [default: the host's name]")
@click.option("--peers", type=click.IntRange(1, 1024), default=1, show_default=True, help="Peers to keep here.")
@click.option("--room", type=click.IntRange(0), default=0, help="Peers to take over when other sites give theirs up.")
@click.option("--function", default="train", show_default=True, help="What SCRIPT's function is called.")
@click.option(
    "--config",
    multiple=True,
    metavar="KEY=VALUE",
    help="For the function; VALUE is JSON, or else text. @FILE.json for several; can be given again.",
)
@click.option("--cpus-per-peer", "cpus", type=click.FloatRange(0), default=1.0, show_default=True, help="Of Ray.")
@click.option("--gpus-per-peer", "gpus", type=click.FloatRange(0), default=0.0, show_default=True, help="Of Ray.")
@click.option(
    "--ranks-per-peer",
    "ranks",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that are one peer together; they share its CPUs and GPUs.",
)
@click.option("--stripes", metavar="N|auto", help="TCP connections per link.  [default: by measurement]")
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help='Where peers take connections of other sites; "" only dials out. With a fixed PORT, NAME-0 has it, the others '
    "have the next ones.  [default: a free port, on the address towards the coordinator]",
)
@click.option("--advertise", metavar="HOST:PORT", help="What other sites dial instead; ports count up likewise.")
@click.option("--max-restarts", type=click.IntRange(0), default=3, show_default=True, help="Of a peer, in 10 minutes.")
@click.option(
    "--drain-seconds",
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    show_default=True,
    help="What peers get for one last exchange when this command is told to stop.",
)
@click.option(
    "--ray", metavar="ADDRESS", help='HOST:PORT of a running Ray to use, or "auto".  [default: one of its own]'
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds to wait for the coordinator before anything is started.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for events and logs.  [default: elastic-NAME-DATE]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end; progress goes to stderr.")
def command(arguments: tuple[str, ...], timeout: float, as_json: bool, **options: Any) -> None:
    """Join the run that TOKEN names, with peers on this machine that run SCRIPT's function (peer, config).

    TOKEN is elastic://HOST:PORT/RUN or @FILE; without it, ELASTIC_JOIN counts. A supervisor starts dead or stuck peers
    again, also while the coordinator is away. Ends with 0 at the run's end, or when others ask this site to leave
    (elastic leave NAME); with 1 if a peer failed for good. Ctrl-C or SIGTERM: every peer makes one last exchange and
    leaves (130, 143); a second Ctrl-C ends them at once.

    \b
    Example:
      elastic join elastic://192.0.2.10:29400/c4-1b train.py --name eu --peers 2 --config lr=0.001
      elastic join @c4-1b.token train.py --name us --listen 0.0.0.0:29500 --advertise 203.0.113.5:29500
    """
    signals = Signals(exits.told_by)
    with refusing("join"):
        settings = check(arguments, options)
        report = look(settings, timeout)
    if report.progress.finished:
        say(f"elastic join: run {settings.where.run} is over ({report.progress.rounds} rounds): there is nothing to do")
        sys.exit(exits.OK)
    prepare_out("join", settings.out, result="ray.log")
    sys.exit(Site(settings, signals, as_json=as_json).run())


# --- bad input: one line, an exit code, nothing started -------------------------------------------------------------


def check(arguments: tuple[str, ...], options: dict[str, Any]) -> Settings:
    """Raises ConfigurationError."""
    env = environment()
    token, script = _arguments(arguments, env)
    where = JoinToken.parse(token)
    name = check_name("site", options.pop("name") or socket.gethostname().partition(".")[0])
    check_name("peer", f"{name}-{options['peers'] - 1}")
    out = options.pop("out") or Path(f"elastic-{name}-{datetime.now():%Y%m%d-%H%M%S}")
    listen, advertise = _listening(where, options.pop("listen"), options.pop("advertise"), env, options["room"])
    return Settings(
        where=where,
        script=check_script(Path(script), options["function"]),
        config=_config(options.pop("config")),
        name=name,
        listen=listen,
        advertise=advertise,
        stripes=_stripes(options.pop("stripes")),
        out=out.absolute(),
        **options,
    )


def _arguments(arguments: tuple[str, ...], env: dict[str, str]) -> tuple[str, str]:
    """Where the run is, and the script; of one argument alone, whichever of the two it is not."""
    if len(arguments) == 2:
        return arguments[0], arguments[1]
    if len(arguments) > 2:
        raise ConfigurationError(f"too many arguments: {' '.join(arguments[2:])}; say elastic join TOKEN SCRIPT")
    if not arguments or arguments[0].startswith(("@", "elastic://")):
        raise ConfigurationError("say which script to run: elastic join TOKEN SCRIPT")
    if "ELASTIC_JOIN" not in env:
        raise ConfigurationError("say which run: elastic join TOKEN SCRIPT, or set ELASTIC_JOIN")
    return env["ELASTIC_JOIN"], arguments[0]


def _listening(
    where: JoinToken, listen: str | None, advertise: str | None, env: dict[str, str], room: int
) -> tuple[str, str | None]:
    """Beyond loopback only if the coordinator is."""
    if listen is None and "ELASTIC_LISTEN" not in env:
        listen = _towards(where)
    listen, advertise = endpoints(where.coordinator, listen, advertise, env)
    named = [each for each in f"{listen},{advertise or ''}".split(",") if each]
    if room > 1 and any(check_endpoint("listen", each)[1] for each in named):
        raise ConfigurationError(f"--room is {room}, and so many guests cannot share a fixed port: use PORT 0")
    return listen, advertise


def _towards(where: JoinToken) -> str:
    """A free port on the address that this machine has on the way to the coordinator."""
    host, port = check_endpoint("coordinator", addresses(where.coordinator)[0].removeprefix("tcp://"))
    if is_loopback(host):
        return "127.0.0.1:0"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigurationError(f"no way to the coordinator at {host}: {error.strerror or error}") from None
    return f"[{own}]:0" if ":" in own else f"{own}:0"


def _stripes(wanted: str | None) -> str | None:
    if wanted is not None and wanted != "auto" and not (wanted.isdecimal() and 1 <= int(wanted) <= 64):
        raise ConfigurationError(f"--stripes is {wanted!r}: it must be auto, or a number from 1 to 64")
    return wanted


def _config(items: tuple[str, ...]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for item in items:
        key, separator, value = item.partition("=")
        if item.startswith("@"):
            config |= _config_file(Path(item[1:]))
        elif not key or not separator:
            raise ConfigurationError(f"--config {item!r} is neither KEY=VALUE nor @FILE.json")
        else:
            config[key] = _value(value)
    return config


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _config_file(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, too
        raise ConfigurationError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path} holds no JSON object, which --config needs")
    return found


def look(settings: Settings, timeout: float) -> StatusReport:
    """The run as it is before this site joins. Raises ElasticError if it cannot."""
    from elastic.inquiry import check_version, inquire
    from elastic.messages import StatusReport, StatusRequest

    if settings.ray is None:  # of a Ray of its own that much is known before it is there
        _check_room(settings, {"CPU": settings.cpus}, [{"CPU": float(own_cpus())}])
    report = inquire(settings.where, StatusRequest, StatusReport, timeout)
    check_version(report)
    taken = [m.name for m in report.members if m.name in settings.names and m.state != "suspect"]
    if taken:
        raise ConfigurationError(f"{', '.join(taken)} is in the run already: choose another --name, or end that first")
    return report


def _check_room(settings: Settings, needs: dict[str, float], nodes: list[dict[str, float]]) -> None:
    from actors.room import shortage

    missing = shortage(needs, settings.peers + settings.room, nodes)
    if missing:
        raise ConfigurationError(f"{missing}: lower --peers, --room or what each of them takes")


def own_cpus() -> int:
    return len(os.sched_getaffinity(0))


# --- the site -------------------------------------------------------------------------------------------------------


class Site:
    """This machine's part in the run. `run` returns the exit code, and says how it ended."""

    def __init__(self, settings: Settings, signals: Signals, *, as_json: bool) -> None:
        self.settings, self.signals, self.as_json = settings, signals, as_json
        self.failures: list[str] = []
        self.charges: list[ChargeReport] = []
        self.report: StatusReport | None = None
        self._began = time.monotonic()
        self._events = EventLog(settings.out / "events" / "join.jsonl", run=settings.where.run)
        self._logs = Logs([settings.out / "events"])
        self._rows = Rows()
        self._supervisor: Any = None
        self._away = 0.0
        self._code = exits.FAILED  # should there be failures

    @property
    def _stream(self) -> TextIO:
        """For progress."""
        return sys.stderr if self.as_json else sys.stdout

    def run(self) -> int:
        from elastic.inquiry import Watch

        self._say(f"events and logs go to {self.settings.out}; {self._choice()} ...")
        screen = Screen(self.settings.where.run, self._stream)
        try:
            with Watch(self.settings.where) as watch:
                self.signals.raise_once()
                self._run_in_ray(watch, screen)
        except KeyboardInterrupt:
            self.signals.interrupted = True
        except SystemExit:  # of the handler that Ray has for SIGTERM while it starts
            self.signals.interrupted, self.signals.number = True, self.signals.number or signal.SIGTERM
        except Exception as error:
            self._note_failure(error)
        finally:
            self.signals.ignore()  # what there is to say is said whatever comes
            screen.close()
            self._events.close()
        self._look_once_more()
        return self._conclude()

    def _choice(self) -> str:
        if self.settings.ray is not None:
            return f"using the Ray at {self.settings.ray}"
        unused = " (RAY_ADDRESS is set, and would be used with --ray auto)" if os.environ.get("RAY_ADDRESS") else ""
        return f"starting a Ray of its own{unused}"

    def _run_in_ray(self, watch: Watch, screen: Screen) -> None:
        with self._ray():
            try:
                self.signals.raise_once()  # Ray has put its own handlers there
                self._start()
                self.signals.note_first()
                self._follow(watch, screen)
            finally:
                self.signals.ignore()
                self._stop()
                self._read_events(screen)

    def _ray(self) -> AbstractContextManager[None]:
        from actors.local_ray import local_ray, running_ray

        log = self.settings.out / "ray.log"
        if self.settings.ray is not None:
            return running_ray(self.settings.ray, log=log)
        return local_ray(num_cpus=own_cpus(), log=log)

    def _start(self) -> None:
        import ray
        from ray.exceptions import ActorAlreadyExistsError

        from actors.restarts import FailureConfig
        from actors.supervisor import EventLogSpec, SiteSupervisor
        from actors.unit import nodes

        s = self.settings
        _check_room(s, s.needs, [node["Resources"] for node in nodes().values()])
        actor: Any = SiteSupervisor
        log = EventLogSpec(run=s.where.run, path=s.out / "events" / "supervisor.jsonl")
        specs = [self._spec(name, number) for number, name in enumerate(s.names)]
        guest, policy = self._spec(f"{s.name}-guest", s.peers), FailureConfig(max_restarts=s.max_restarts)
        try:
            self._supervisor = actor.options(name=f"{s.where.run}.{s.name}.supervisor").remote(
                specs, policy, log, room=s.room, template=guest
            )
        except ActorAlreadyExistsError:
            raise ConfigurationError(
                f"another command keeps a site {s.name!r} on this Ray: choose another --name"
            ) from None
        ray.get(self._supervisor.start.remote())

    def _spec(self, name: str, number: int) -> PeerSpec:
        from actors.peer import PeerSpec
        from elastic.lanes import beside

        s = self.settings
        return PeerSpec(
            coordinator=s.where.coordinator,
            run=s.where.run,
            name=name,
            site=s.name,
            script=str(s.script),
            function=s.function,
            config=s.config,
            stripes=int(s.stripes) if s.stripes and s.stripes.isdecimal() else s.stripes,
            listen=beside(s.listen, number * s.ranks),  # each rank has a port
            advertise=beside(s.advertise, number * s.ranks),
            events_dir=str(s.out / "events"),
            logs_dir=str(s.out / "logs"),
            ranks=s.ranks,
            cpus=s.cpus,
            gpus=s.gpus,
        )

    def _follow(self, watch: Watch, screen: Screen) -> None:
        import ray

        ends_at = float("inf")
        while True:
            self.charges = ray.get(self._supervisor.report.remote())
            self._look(watch)
            self._read_events(screen)
            screen.update(self._snapshot())
            if all(charge.state in DONE for charge in self.charges):
                return
            if self.signals.number and ends_at == float("inf"):
                ends_at = time.monotonic() + self.settings.drain_seconds + LAST_SECONDS
                self._supervisor.drain.remote(self.settings.drain_seconds)
            if time.monotonic() > ends_at:
                self._note_late()
                return
            time.sleep(LOOK_SECONDS)

    def _note_late(self) -> None:
        names = ", ".join(charge.name for charge in self.charges if charge.state not in DONE)
        self.failures.append(f"{names}: not gone after {self.settings.drain_seconds:g} s, and ended at once")

    def _stop(self) -> None:
        if self._supervisor is None:
            return
        import ray

        with contextlib.suppress(Exception):  # it may be dead, and the processes are ended anyhow
            ray.wait([self._supervisor.stop.remote()], timeout=STOP_SECONDS)
        with contextlib.suppress(Exception):
            ray.kill(self._supervisor)

    def _note_failure(self, error: Exception) -> None:
        from actors.local_ray import error_line

        if isinstance(error, ConnectionError):
            self._code = exits.NETWORK
        elif isinstance(error, ConfigurationError):
            self._code = exits.USAGE
        if not self.signals.interrupted:  # else it is what a library made of the interruption
            self.failures.append(str(error) if self._code == exits.NETWORK else error_line(error))

    # --- what is seen -----------------------------------------------------------------------------------------------

    def _look(self, watch: Watch) -> None:
        """The coordinator may be away for long: that is said, and nothing follows from it here."""
        self.report = watch.report
        silence = watch.silence
        if not self._away and silence > AWAY_SECONDS:
            self._away = time.monotonic() - silence
            self._events.emit("coordinator.lost", seconds=round(silence, 1))
        elif self._away and silence <= AWAY_SECONDS:
            self._events.emit("coordinator.found", seconds=round(time.monotonic() - self._away, 1))
            self._away = 0.0
        self._rows.note(self.charges, self.report.members if self.report else (), {})

    def _look_once_more(self) -> None:
        """What was last told may be of a moment before the end."""
        from elastic.inquiry import inquire
        from elastic.messages import StatusReport, StatusRequest

        if not self._away:
            with contextlib.suppress(ElasticError):
                self.report = inquire(self.settings.where, StatusRequest, StatusReport, STOP_SECONDS)

    def _read_events(self, screen: Screen) -> None:
        for event in self._logs.read():
            screen.event(event)

    def _snapshot(self) -> Snapshot:
        report = self.report
        return Snapshot(
            elapsed_seconds=time.monotonic() - self._began,
            round=report.progress.rounds if report else 0,
            rounds_target=int(report.progress.targets.get("rounds", 0)) if report else 0,
            contributors=report.contributors if report else (),
            epoch=report.epoch if report else 0,
            heldout_loss=None,
            peers=tuple(self._rows.by_name.values()),
        )

    # --- the end ----------------------------------------------------------------------------------------------------

    def _conclude(self) -> int:
        self.failures += _failures(self.charges)
        code = self._exit_code()
        if self.as_json:
            say(json.dumps(self._summary(code)))
        for line in self._words(code):
            self._say(line)
        for failure in self.failures:
            say(f"elastic join: {failure}", err=True)
        return code

    def _exit_code(self) -> int:
        if self.signals.number or self.signals.interrupted:
            return exits.told_by(self.signals.number)
        return self._code if self.failures else exits.OK

    def _words(self, code: int) -> Iterator[str]:
        rounds = self.report.progress.rounds if self.report else 0
        over = "is over" if self.report and self.report.progress.finished else "goes on"
        if code == exits.OK:
            yield f"site {self.settings.name} has left; run {self.settings.where.run} {over}, after {rounds} rounds"
        elif code in (exits.INTERRUPTED, exits.TERMINATED):
            left = [charge.name for charge in self.charges if charge.state == "finished"]
            yield f"interrupted; {', '.join(left) or 'nobody'} left in good order"

    def _summary(self, code: int) -> dict[str, Any]:
        progress = self.report.progress if self.report else None
        peers = [
            {"name": charge.name, "state": charge.state, "lives": charge.lives, "reason": charge.reason}
            for charge in self.charges
        ]
        return {
            "run": self.settings.where.run,
            "site": self.settings.name,
            "exit_code": code,
            "finished": progress.finished if progress else False,
            "rounds": progress.rounds if progress else 0,
            "tokens": progress.tokens if progress else 0,
            "peers": peers,
            "failures": self.failures,
            "seconds": round(time.monotonic() - self._began, 3),
            "out": str(self.settings.out),
        }

    def _say(self, line: str) -> None:
        say(line, err=self.as_json)


def _failures(charges: list[ChargeReport]) -> list[str]:
    """Why peers were given up, with the last words of one of them: what befell all of them alike is said once."""
    alike: dict[str, list[ChargeReport]] = {}
    for charge in charges:
        if charge.state == "failed":
            alike.setdefault(charge.reason.replace(charge.name, "*"), []).append(charge)
    return [f"{', '.join(charge.name for charge in each)}: {_words(each[0])}" for each in alike.values()]


def _words(charge: ChargeReport) -> str:
    """Whose they are is said before them."""
    return charge.error.removeprefix(f"peer {charge.name}: ")
