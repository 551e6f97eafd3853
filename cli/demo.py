"""`elastic demo`: peers train a byte-level GPT on real text; one is killed in mid exchange; a report at the end."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from elastic.config import RunPolicy, Timeouts, environment
from elastic.errors import ConfigurationError

from . import exits
from .logs import Logs
from .screen import Screen, refuse, say
from .site import Rows, prepare_out
from .stopping import Signals
from .view import Snapshot

if TYPE_CHECKING:
    from actors.charge import ChargeReport
    from elastic.messages import StatusReport

RUN = "demo"
WIRES = ("f32", "bf16", "f16", "int8", "int4", "e3m0")
LOOK_SECONDS = 0.25
STOP_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The demo's options, checked."""

    data: tuple[str, ...]
    peers: int
    rounds: int
    sync_every: int
    wire: str
    stripes: int | None
    kill: bool
    seed: int
    port: int
    out: Path

    @property
    def names(self) -> list[str]:
        return [f"peer-{i}" for i in range(self.peers)]

    @property
    def victim(self) -> str:
        return random.Random(self.seed).choice(self.names)

    @property
    def kill_round(self) -> int:
        return max(1, self.rounds // 3)


@click.command(epilog="Example: elastic demo --rounds 12 --data ~/texts --out /tmp/demo")
@click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="File or folder of UTF-8 text; repeatable.  [default: the source of Python's standard library]",
)
@click.option(
    "--peers", type=click.IntRange(1, 32), default=3, show_default=True, help="Peers to start on this machine."
)
@click.option("--rounds", type=click.IntRange(1, 100_000), default=36, show_default=True, help="Outer rounds to train.")
@click.option(
    "--sync-every",
    type=click.IntRange(1, 100_000),
    default=25,
    show_default=True,
    metavar="H",
    help="Inner steps between rounds.",
)
@click.option("--wire", type=click.Choice(WIRES), default="f32", show_default=True, help="How numbers travel.")
@click.option("--stripes", type=click.IntRange(1, 64), help="TCP connections per link; by measurement if not given.")
@click.option("--kill/--no-kill", default=True, show_default=True, help="Kill one peer in the middle of an exchange.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Of the model, the data's order and the choice of the victim.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="Port of the coordinator on 127.0.0.1; 0 picks one.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Folder for the results.  [default: elastic-demo-DATE]"
)
def command(**options: Any) -> None:
    """Train a small GPT with three peers on this machine; one is killed on the way.

    A coordinator, a supervisor and the peers run as actors of a Ray of their own. A third of the way through, one peer
    is killed in the middle of an all-reduce: the others finish that round, and its next life comes back.
    Writes report.json, loss.png, model.safetensors and the event logs.
    """
    signals = Signals()
    out = options.pop("out") or Path(f"elastic-demo-{datetime.now():%Y%m%d-%H%M%S}")
    settings = Settings(out=out, **options)
    check_environment()
    check_kill(settings)
    check_data(settings)
    check_port(settings.port)
    out = prepare_out("demo", out, result="report.json")
    sys.exit(Demo(replace(settings, out=out), signals).run())


# --- bad input: one line, an exit code, nothing started -------------------------------------------------------------


def check_environment() -> None:
    try:
        environment()
    except ConfigurationError as error:
        refuse("demo", exits.USAGE, str(error))


def check_kill(settings: Settings) -> None:
    if settings.kill and (settings.peers < 2 or settings.rounds < 3):
        refuse("demo", exits.USAGE, "to kill a peer takes at least 2 peers and 3 rounds: add some, or use --no-kill")


def check_data(settings: Settings) -> None:
    text = example("text")
    try:
        train, _ = text.split(text.load_text([Path(path) for path in settings.data] or None), seed=settings.seed)
        text.ByteDataset(train, 128)
    except text.TextError as error:
        refuse("demo", exits.DATA, str(error))


def check_port(port: int) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            why = f"cannot listen on port {port}: {error.strerror}; choose another --port, or 0"
            refuse("demo", exits.NETWORK, why)


def examples_folder() -> Path:
    """The examples: inside an installed package, beside the packages in a clone."""
    inside = Path(__file__).parent / "examples"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    import importlib

    folder = str(examples_folder())
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


# --- the run --------------------------------------------------------------------------------------------------------


class Demo:
    """One run of the demo. `run` returns the exit code; a report is written however it ends."""

    def __init__(self, settings: Settings, signals: Signals) -> None:
        self.settings = settings
        self.signals = signals
        self.events: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._began = time.monotonic()
        self._logs = Logs([settings.out / "events"])
        self._rows = Rows()
        self._held: dict[str, tuple[int, str]] = {}
        self._sent: dict[tuple[str, int], int] = {}
        self._sample: str | None = None
        self._heldout: float | None = None
        self._supervisor: Any = None
        self._coordinator: Any = None

    def run(self) -> int:
        say(f"results go to {self.settings.out}; starting Ray ...")
        screen = Screen(RUN)
        try:
            self.signals.raise_once()
            self._run_in_ray(screen)
        except (KeyboardInterrupt, SystemExit):  # SystemExit: of the handler that Ray has while it starts
            self.signals.interrupted = True
        except Exception as error:
            self._note_failure(error)
        finally:
            self.signals.ignore()  # the report is written whatever comes
            screen.close()
        return self._conclude()

    def _run_in_ray(self, view: Screen) -> None:
        from actors.local_ray import local_ray

        with local_ray(num_cpus=self.settings.peers + 1, log=self.settings.out / "ray.log"):
            try:
                self.signals.raise_once()  # Ray has put its own handlers there
                self._start_actors()
                self._watch(view)
            finally:
                self.signals.ignore()
                self._stop_actors()
                self._read_events(view)

    def _note_failure(self, error: Exception) -> None:
        from actors.local_ray import error_line

        if not self.signals.interrupted:  # else it is what a library made of the interruption
            self.failures.append(f"the run ended early: {error_line(error)}")

    def _start_actors(self) -> None:
        import ray

        from actors.coordinator import CoordinatorActor
        from actors.restarts import FailureConfig
        from actors.supervisor import EventLogSpec, SiteSupervisor

        s, log = self.settings, self.settings.out / "events"
        policy = RunPolicy(min_peers=max(1, s.peers - 1), rounds=s.rounds)
        actor: Any = CoordinatorActor
        self._coordinator = actor.options(name=f"{RUN}.coordinator").remote(
            f"tcp://127.0.0.1:{s.port}", RUN, policy, Timeouts(), s.out / "journal.sqlite", log / "coordinator.jsonl"
        )
        address = ray.get(self._coordinator.address.remote())
        specs = [self._spec(name, address) for name in s.names]
        supervisor: Any = SiteSupervisor
        self._supervisor = supervisor.options(name=f"{RUN}.supervisor", lifetime="detached").remote(
            specs, FailureConfig(), EventLogSpec(run=RUN, path=log / "supervisor.jsonl")
        )
        ray.get(self._supervisor.start.remote())

    def _spec(self, name: str, address: str) -> Any:
        from actors.peer import PeerSpec
        from fault.inject import Injection

        s = self.settings
        # at its first chunk, the victim cannot have reduced its own share: the others have to finish without it
        fault = Injection(kind="kill", tag="outer", round=s.kill_round, fraction=0.0)
        config = {
            "peers": s.peers,
            "rounds": s.rounds,
            "data": tuple(str(Path(path).absolute()) for path in s.data),  # peers have a working folder of their own
            "sync_every": s.sync_every,
            "wire": s.wire,
            "seed": s.seed,
            "out": str(s.out),
        }
        return PeerSpec(
            coordinator=address,
            run=RUN,
            name=name,
            site="local",
            script=str(examples_folder() / "train_gpt.py"),
            config=config,
            stripes=s.stripes,
            events_dir=str(s.out / "events"),
            logs_dir=str(s.out / "logs"),
            fault=fault if s.kill and name == s.victim else None,
            fault_log=str(s.out / "events" / "faults.jsonl"),
        )

    def _watch(self, view: Screen) -> None:
        import ray

        while True:
            self.signals.check()
            status, charges = ray.get([self._coordinator.status.remote(), self._supervisor.report.remote()])
            self._read_events(view)
            self._note(status, charges)
            view.update(self._snapshot(status))
            self.failures = [said for charge in charges if (said := _failure(charge))]
            if all(charge.state in ("finished", "failed") for charge in charges):
                return
            time.sleep(LOOK_SECONDS)

    def _stop_actors(self) -> None:
        import ray

        for actor, method in ((self._supervisor, "stop"), (self._coordinator, "close")):
            if actor:
                with contextlib.suppress(Exception):  # it may be dead, and the processes are ended anyhow
                    ray.wait([getattr(actor, method).remote()], timeout=STOP_SECONDS)
                with contextlib.suppress(Exception):
                    ray.kill(actor)

    # --- what is seen -----------------------------------------------------------------------------------------------

    def _read_events(self, view: Screen) -> None:
        for event in self._logs.read():
            self.events.append(event)
            view.event(event)
            if event["event"] == "heldout.evaluated":
                self._heldout = event["loss"]

    def _note(self, status: StatusReport, charges: list[ChargeReport]) -> None:
        members = {member.name: member for member in status.members}
        self._rows.note(charges, status.members, {name: version for name, (version, _) in self._held.items()})
        for charge in charges:
            row, member = self._rows.by_name[charge.name], members.get(charge.name)
            self._sent[charge.name, charge.lives] = max(row.bytes_sent, self._sent.get((charge.name, charge.lives), 0))
            if member is not None and member.state_hash:
                self._held[charge.name] = (member.version, member.state_hash)
            if charge.trained is not None:
                self._note_trained(charge)

    def _note_trained(self, charge: ChargeReport) -> None:
        assert charge.trained is not None
        self._sent[charge.name, charge.lives] = charge.trained.bytes_sent
        facts = charge.trained.result
        self._held[charge.name] = (facts["version"], facts["state_hash"])
        self._sample = facts.get("sample_text", self._sample)

    def _snapshot(self, status: StatusReport) -> Snapshot:
        return Snapshot(
            elapsed_seconds=time.monotonic() - self._began,
            round=status.progress.rounds,
            rounds_target=self.settings.rounds,
            contributors=status.contributors,
            epoch=status.epoch,
            heldout_loss=self._heldout,
            peers=tuple(self._rows.by_name[name] for name in self.settings.names),
        )

    # --- the end ----------------------------------------------------------------------------------------------------

    def _conclude(self) -> int:
        from .report import build_report, draw_loss, summary, write_report

        s = self.settings
        final = {name: self._facts(name) for name in s.names}
        report = build_report(
            self.events,
            final,
            settings=_public(s),
            sample_text=self._sample,
            interrupted=self.signals.interrupted,
            seed=s.seed,
            wall_seconds=time.monotonic() - self._began,
        )
        report["failures"] = self.failures
        write_report(s.out, report)
        no_picture = draw_loss(s.out / "loss.png", report)
        say(summary(report))
        for line in (no_picture, *self.failures):
            if line:
                say(f"elastic demo: {line}", err=True)
        say(f"report, picture, weights and events: {s.out}")
        return self._exit_code(report)

    def _facts(self, name: str) -> dict[str, Any]:
        """state_hash: of the newest version that any peer holds; None for a peer that was not that far."""
        newest = max((version for version, _ in self._held.values()), default=-1)
        version, state_hash = self._held.get(name, (-1, ""))
        return {
            "state_hash": state_hash if version == newest >= 0 else None,
            "bytes_sent": sum(sent for (peer, _), sent in self._sent.items() if peer == name),
        }

    def _exit_code(self, report: dict[str, Any]) -> int:
        if self.signals.interrupted:
            return exits.INTERRUPTED
        complete = report["rounds_committed"] >= self.settings.rounds and report["state_hashes_equal"]
        killed = bool(report["kills"]) or not self.settings.kill
        return exits.OK if complete and killed and not self.failures else exits.FAILED


def _failure(charge: ChargeReport) -> str:
    """Why the run is not a success for this peer, and what it said last; empty if it is one."""
    if charge.state == "failed":
        return f"{charge.name}: {charge.error}"
    if charge.trained is not None and charge.trained.result["version"] < 0:
        return f"{charge.name}: the run ended before it could fetch the state, which is not known there"
    return ""


def _public(settings: Settings) -> dict[str, Any]:
    from dataclasses import asdict

    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
