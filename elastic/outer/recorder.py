"""The flight recorder of an outer loop: what is needed to make every outer state of a run once more, and compare.

Beside the event log, a peer that records keeps a folder record/PEER/TAG:

  loop.json                    the algorithm in all its parts, and which parameters are in which fragment
  base-00000012.safetensors    the whole outer state as of a version, from time to time
  round-00000013.safetensors   the committed result by which the next one was made, and what the commit said of it

It holds plain values and vectors, nothing that is executed. It is bounded: of older rounds than the base before last,
nothing is kept. Written by the thread that trains: it costs the time to write a fragment for each round. What cannot be
written ends the recording, never the training (event `record.ended`). `verifying.py` reads it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from collectives.transfer import as_bytes

from ..errors import CheckpointMismatch, ConfigurationError
from ..messages import Commit
from .rule import Facts, Rule
from .state import Layout, Part, State, Version

if TYPE_CHECKING:
    from ..peer import Peer

FORMAT = "elastic-record-1"
# Where a rule's parts may come from: nothing else is looked up by a name in a file.
HOMES = ("rule", "streaming", "co2", "decoupled", "compression", "optimizers", "feedback", "weighting", "robust")
_FILE = re.compile(r"(base|round)-(\d{8,15})\.safetensors")


@dataclass(frozen=True, slots=True)
class Step:
    """One committed round. version: that it made of the one before. digest: of the result, by the commit."""

    version: int
    round: int
    fragment: int
    digest: str
    contributors: tuple[str, ...]
    state_hash: str
    facts: Facts


@dataclass(frozen=True, slots=True)
class Loop:
    """What the states of a loop are and how one follows from the other. parts: without the model's tensors."""

    run: str
    tag: str
    peer: str
    rule: Rule
    parts: tuple[Part, ...]


class Recorder:
    """Records on one peer. every: versions from one base to the next; so many rounds are kept, and up to as many again.

    Raises ConfigurationError if the loop has parts that are not elastic's own, or the folder cannot be made.
    """

    def __init__(self, folder: Path, every: int, peer: Peer, tag: str, rule: Rule, layout: Layout) -> None:
        if every < 1:
            raise ConfigurationError(f"record is {every}: it must be a number of rounds, at least 1")
        self._folder, self._every, self._peer = folder / "record" / peer.name / tag, every, peer
        self._open = True
        loop = Loop(peer.run, tag, peer.name, rule, layout.parts)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._describe(json.dumps(_plain_loop(loop)).encode())
        except OSError as error:
            raise ConfigurationError(f"cannot record in {self._folder}: {error.strerror}") from None

    def _describe(self, loop: bytes) -> None:
        """What is there stays, for it may tell how the life before has ended; unless that was another loop."""
        description = self._folder / "loop.json"
        if not description.exists() or description.read_bytes() != loop:
            for _, path in _files(self._folder):
                path.unlink()
            _put(description, loop)

    def began(self, state: State) -> None:
        """The loop goes on from this state: it has fetched or founded it."""
        if self._open:
            self._guarded(self._begin, state)

    def _begin(self, state: State) -> None:
        for (_, number), path in _files(self._folder):
            if number > state.number:  # the run has gone back: these rounds came to nothing
                path.unlink()
        self._write_base(state)

    def committed(self, commit: Commit, fragment: int, mean: torch.Tensor, facts: Facts, after: State) -> None:
        """A round was applied."""
        if self._open:
            self._guarded(self._write_round, commit, fragment, mean, facts, after)

    def _guarded(self, write: Any, *what: Any) -> None:
        try:
            write(*what)
        except (OSError, SafetensorError) as error:
            self._open = False
            self._peer.events.emit("record.ended", reason=str(error))

    def _write_round(self, commit: Commit, fragment: int, mean: torch.Tensor, facts: Facts, after: State) -> None:
        step = Step(
            version=after.number,
            round=commit.round,
            fragment=fragment,
            digest=commit.digest,
            contributors=tuple(commit.contributors),
            state_hash=after.state_hash,
            facts=facts,
        )
        _save(self._folder / f"round-{after.number:08d}.safetensors", {"mean": mean}, dataclasses.asdict(step))
        if after.number % self._every == 0:
            self._write_base(after)
            self._prune()

    def _write_base(self, state: State) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for index, part in enumerate(state.parts):
            tensors |= {f"parameters.{index}": part.host.parameters, f"momentum.{index}": part.host.momentum}
        numbers = [part.number for part in state.parts]
        about = {"number": state.number, "state_hash": state.state_hash, "numbers": numbers}
        _save(self._folder / f"base-{state.number:08d}.safetensors", tensors, about)

    def _prune(self) -> None:
        bases = sorted(number for (kind, number), _ in _files(self._folder) if kind == "base")
        oldest = bases[-2:][0]
        for (kind, number), path in _files(self._folder):
            if number < oldest or (number == oldest and kind == "round"):
                path.unlink()


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """What one peer has recorded of one loop. Raises CheckpointMismatch for what is not whole."""

    folder: Path
    loop: Loop

    @classmethod
    def at(cls, folder: Path) -> Record:
        try:
            plain = json.loads((folder / "loop.json").read_bytes())
            return cls(folder, _restored_loop(plain))
        except OSError as error:
            raise CheckpointMismatch(f"{folder}: no record there ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointMismatch(f"{folder}/loop.json: {error!r}") from None

    @property
    def bases(self) -> list[int]:
        return sorted(number for (kind, number), _ in _files(self.folder) if kind == "base")

    @property
    def rounds(self) -> list[int]:
        """Versions that rounds have made, in order."""
        return sorted(number for (kind, number), _ in _files(self.folder) if kind == "round")

    def base(self, number: int) -> State:
        tensors, about = _load(self.folder / f"base-{number:08d}.safetensors")
        versions = [
            Version(n, tensors[f"parameters.{index}"], tensors[f"momentum.{index}"])
            for index, n in enumerate(about["numbers"])
        ]
        return State(tuple(versions))

    def step(self, version: int) -> tuple[Step, torch.Tensor]:
        tensors, about = _load(self.folder / f"round-{version:08d}.safetensors")
        facts = Facts(**about.pop("facts"))
        return Step(**about | {"facts": facts, "contributors": tuple(about["contributors"])}), tensors["mean"]


def records(folder: Path) -> Iterator[Record]:
    """All that are below a folder of events."""
    for path in sorted(folder.glob("record/*/*/loop.json")):
        yield Record.at(path.parent)


def _files(folder: Path) -> list[tuple[tuple[str, int], Path]]:
    found = ((_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    return [((match[1], int(match[2])), path) for match, path in found if match]


def _save(path: Path, tensors: dict[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    sealed = json.dumps(dict(about))
    metadata = {"format": FORMAT, "about": sealed, "digest": _digest(whole, sealed)}
    new = path.with_suffix(".new")
    save_file(whole, new, metadata=metadata)
    os.replace(new, path)


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        if _digest(tensors, metadata.get("about", "")) != metadata.get("digest"):
            raise ValueError("its contents are not what was written")
        about: dict[str, Any] = json.loads(metadata["about"])
        return tensors, about
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointMismatch(f"{path}: {error}") from None


def _digest(tensors: Mapping[str, torch.Tensor], about: str) -> str:
    digest = xxhash.xxh3_128(about.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(as_bytes(tensors[name]))
    return digest.hexdigest()


def _put(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(data)
    os.replace(new, path)


# --- a rule as plain values -------------------------------------------------------------------------------------------


def plain_of(value: Any) -> Any:
    """Nested dataclasses of `HOMES` as JSON. Raises ConfigurationError for what is not elastic's own."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value).__name__ not in _classes():
            raise ConfigurationError(f"a {type(value).__name__} cannot be recorded: it is not one of elastic's own")
        fields = {field.name: plain_of(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, "fields": fields}
    if isinstance(value, (list, tuple)):
        return [plain_of(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigurationError(f"{value!r} cannot be recorded: it is no plain value")


def restored(plain: Any) -> Any:
    """The inverse. Raises ValueError for a class that is none of `HOMES`."""
    if isinstance(plain, dict):
        kind = _classes().get(plain["class"])
        if kind is None:
            raise ValueError(f"there is no class {plain['class']!r}")
        return kind(**{name: restored(item) for name, item in plain["fields"].items()})
    return tuple(restored(item) for item in plain) if isinstance(plain, list) else plain


@functools.cache
def _classes() -> dict[str, Any]:
    modules = [importlib.import_module(f".{home}", __package__) for home in HOMES]
    found = (value for module in modules for value in vars(module).values())
    return {each.__name__: each for each in found if isinstance(each, type) and dataclasses.is_dataclass(each)}


def _plain_loop(loop: Loop) -> dict[str, Any]:
    parts = [{"named": part.named, "averaged": part.averaged} for part in loop.parts]
    head = {"format": FORMAT, "run": loop.run, "tag": loop.tag, "peer": loop.peer}
    return head | {"rule": plain_of(loop.rule), "parts": parts}


def _restored_loop(plain: dict[str, Any]) -> Loop:
    if plain["format"] != FORMAT:
        raise ValueError(f"its format is {plain['format']!r}, not {FORMAT!r}")
    rule = restored(plain["rule"])
    if not isinstance(rule, Rule):
        raise ValueError("it names no algorithm")
    return Loop(plain["run"], plain["tag"], plain["peer"], rule, tuple(map(_part, plain["parts"])))


def _part(plain: dict[str, Any]) -> Part:
    named = tuple((str(name), tuple(int(n) for n in shape)) for name, shape in plain["named"])
    sizes = [torch.Size(shape).numel() for _, shape in named]
    return Part(named=named, elements=sum(sizes), averaged=int(plain["averaged"]), tensors=())
