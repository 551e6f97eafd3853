"""The flight recorder: every outer state of a run is made once more from it, and who held another one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from harness import Run, until

import elastic
from cli import exits
from cli.main import main
from elastic.config import RunPolicy
from elastic.errors import CheckpointMismatch, ConfigurationError
from elastic.events import EventReader
from elastic.outer import co2, decoupled, delayed, diloco, streaming
from elastic.outer.compression import Compression
from elastic.outer.engine import OuterLoop
from elastic.outer.feedback import EF21, EControl, ErrorFeedback
from elastic.outer.optimizers import SGD, Adam, HeavyBall
from elastic.outer.recorder import Record, plain_of, records, restored
from elastic.outer.robust import TrimmedMean
from elastic.outer.rule import Rule
from elastic.outer.verifying import verify
from elastic.outer.weighting import Equal, FedBuff
from elastic.peer import Peer

ROUNDS = 8
Loop = Callable[..., OuterLoop]


def model_of() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3)))


def flipped(tensor: torch.Tensor) -> None:
    """The lowest bit of the first number."""
    tensor.view(torch.int32)[0] ^= 1


def trained(run: Run, kind: Loop, before: Callable[[Peer, OuterLoop, int], None] | None = None, **options: Any) -> None:
    """Three peers train to the end, of which p0 records, unless `options` say otherwise."""
    run.policy = RunPolicy(rounds=ROUNDS, min_peers=3, quorum=1.0)

    def part(peer: Peer) -> None:
        model = model_of()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        drawn = torch.Generator().manual_seed(int(peer.name[1:]))
        record = {"record": 100 if peer.name == "p0" else 0} | options
        with kind(model, inner, peer, sync_every=3, **record) as loop:
            seen = -1
            while not loop.finished:
                if before is not None and loop.version.number != seen:
                    seen = loop.version.number
                    before(peer, loop, seen)
                inner.zero_grad()
                (model(torch.randn(4, 6, generator=drawn)) - 1).square().mean().backward()
                inner.step()

    run.together(part, run.several(3))


def replay(*words: Any) -> Result:
    return CliRunner().invoke(main, ["replay", *map(str, words), "--verify"])


def events_in(folder: Path) -> list[dict[str, Any]]:
    return [event for file in folder.glob("*.jsonl") for event in EventReader(file).read()]


LOOPS: dict[str, tuple[Loop, dict[str, Any]]] = {
    "diloco": (elastic.DiLoCo, {}),
    "int4": (elastic.DiLoCo, {"wire": "int4", "rotate": True, "feedback": ErrorFeedback()}),
    "streaming": (elastic.StreamingDiLoCo, {"fragments": 3, "sync_delay": 1}),
    "delayed": (elastic.DelayedDiLoCo, {"eager": True}),
    "decoupled": (elastic.DecoupledDiLoCo, {"fragments": 2, "quorum": 3, "sync_delay": 1}),
    "robust": (elastic.DiLoCo, {"combine": TrimmedMean(byzantine=1)}),
    "adam": (elastic.DiLoCo, {"outer": Adam(lr=0.1)}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_every_state_of_a_run_follows_from_its_record(run: Run, name: str) -> None:
    kind, options = LOOPS[name]
    trained(run, kind, **options)
    (record,) = records(run.folder)
    found = verify(record, events_in(run.folder))
    assert found.passed and not found.gap, found
    assert (found.first, found.last) == (0, ROUNDS)
    assert found.compared == dict.fromkeys(("p0", "p1", "p2"), ROUNDS)


@pytest.mark.parametrize("victim", ["p0", "p1"])
def test_one_flipped_bit_is_found_where_it_happened(run: Run, victim: str) -> None:
    flips: list[int] = []

    def before(peer: Peer, loop: OuterLoop, version: int) -> None:
        if peer.name == victim and version >= 3 and not flips:
            flips.append(version)
            flipped(loop.replica.state.parts[0].parameters)

    trained(run, elastic.DiLoCo, before)
    (record,) = records(run.folder)
    found = verify(record, events_in(run.folder))
    assert flips and not found.passed
    first = found.divergences[0]
    assert (first.peer, first.version) == (victim, flips[0] + 1)
    result = replay(run.folder)
    assert result.exit_code == exits.DATA
    assert f"first divergence: round {first.round}, version {first.version}, {victim} held" in result.output


def test_a_checkpoint_can_be_the_beginning(run: Run) -> None:
    where = elastic.Checkpoints(str(run.folder / "checkpoints"), every=4, keep=9)
    trained(run, elastic.DiLoCo, checkpoints=where)
    result = replay(run.folder, "--checkpoint", f"{where.url}/test/outer")
    assert result.exit_code == exits.OK, result.output
    assert "versions 4 to 8 recomputed; states compared: p0 4, p1 4, p2 4" in result.output
    assert "every peer held the state that follows" in result.output


def test_a_record_is_bounded(run: Run) -> None:
    trained(run, elastic.DiLoCo, record=3)
    for record in records(run.folder):
        assert record.bases == [3, 6] and record.rounds == [4, 5, 6, 7, 8]
    found = [verify(record, events_in(run.folder)) for record in records(run.folder)]
    assert [(each.first, each.last, each.passed) for each in found] == [(3, 8, True)] * 3


def test_the_next_life_goes_on_with_the_record_of_the_one_before(run: Run) -> None:
    def before(peer: Peer, loop: OuterLoop, version: int) -> None:
        if peer.name == "p0" and version == 3:
            raise KeyError("the first life is over")

    run.policy = RunPolicy(rounds=ROUNDS, min_peers=2)
    peers = run.several(3)
    ended = []

    def part(peer: Peer, lives: int) -> None:
        model = model_of()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            with elastic.DiLoCo(model, inner, peer, sync_every=3, record=100 * (peer.name == "p0")) as loop:
                until(lambda: len(peer.view.names) == 3 or ended)
                while not loop.finished:
                    if lives == 1:
                        before(peer, loop, loop.version.number)
                    elif peer.name != "p0" and loop.version.number == 5:
                        until(lambda: "p0" in peer.view.names and len(ended) > 1)
                    inner.zero_grad()
                    (model(torch.ones(4, 6)) - 1).square().mean().backward()
                    inner.step()
        except KeyError:
            peer.close()
            ended.append(peer)

    def lives(peer: Peer) -> None:
        part(peer, 1 if peer.name == "p0" else 2)
        if peer.name == "p0":
            again = run.join("p0")
            ended.append(again)
            part(again, 2)

    run.together(lives, peers)
    (record,) = records(run.folder)
    assert len(record.bases) == 2 and record.bases[0] == 0
    found = verify(record, events_in(run.folder))
    assert found.passed and found.last == ROUNDS and found.compared["p1"] >= ROUNDS - 3


# --- what cannot be recorded, or read ---------------------------------------------------------------------------------


def test_without_an_event_log_there_is_no_record(run: Run) -> None:
    run.open()
    with Peer(f"tcp://127.0.0.1:{run.port}", run="test", name="p0", timeouts=run.timeouts) as peer:
        model = model_of()
        with pytest.raises(ConfigurationError, match="set events_dir"):
            elastic.DiLoCo(model, torch.optim.SGD(model.parameters(), lr=0.1), peer, record=3)


def test_the_environment_says_how_much(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_RECORD", "5")
    trained(run, elastic.DiLoCo, record=None)
    assert len(list(records(run.folder))) == 3
    monkeypatch.setenv("ELASTIC_RECORD", "much")
    with pytest.raises(ConfigurationError, match="ELASTIC_RECORD is 'much'"):
        model = model_of()
        elastic.DiLoCo(model, torch.optim.SGD(model.parameters(), lr=0.1), run.peers[0])


def test_a_full_disk_ends_the_record_and_nothing_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def before(peer: Peer, loop: OuterLoop, version: int) -> None:
        if (peer.name, version) == ("p0", 4):
            monkeypatch.setattr("elastic.outer.recorder.save_file", full)

    trained(run, elastic.DiLoCo, before)
    (event,) = [each for each in events_in(run.folder) if each["event"] == "record.ended"]
    assert "No space left" in event["reason"] and event["peer"] == "p0"
    (record,) = records(run.folder)
    assert verify(record, events_in(run.folder)).last == 4


def test_a_file_that_was_changed_is_refused_by_name(run: Run) -> None:
    trained(run, elastic.DiLoCo)
    (record,) = records(run.folder)
    file = record.folder / "round-00000005.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = replay(run.folder)
    assert result.exit_code == exits.DATA and result.output.count("\n") == 1
    assert str(file) in result.output and "not what was written" in result.output


def test_where_nothing_was_recorded_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "p0.jsonl").write_text(json.dumps({"event": "peer.joined", "time_unix": 1.0}) + "\n")
    result = replay(tmp_path)
    assert result.exit_code == exits.DATA and "set ELASTIC_RECORD" in result.output and result.output.count("\n") == 1


def test_a_round_that_is_missing_is_a_gap(run: Run) -> None:
    trained(run, elastic.DiLoCo)
    (record,) = records(run.folder)
    (record.folder / "round-00000004.safetensors").unlink()
    found = verify(record, events_in(run.folder))
    assert found.passed and found.last == 3 and found.gap == "version 4 is not in the record"


# --- rules as plain values --------------------------------------------------------------------------------------------

RULES = [
    diloco.rule(SGD(lr=0.5)),
    diloco.rule(HeavyBall(lr=0.5), compression=Compression(wire="int4", rotate=True), feedback=EF21()),
    diloco.rule(feedback=EControl(), weighting=Equal()),
    diloco.rule(robust=TrimmedMean(byzantine=1), weighting=Equal()),
    streaming.rule(sync_delay=2, merge_alpha=0.25),
    delayed.rule(eager=True),
    co2.rule(),
    decoupled.rule(weighting=FedBuff()),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.description)
def test_a_rule_is_the_same_after_it_was_plain(rule: Rule) -> None:
    again = restored(json.loads(json.dumps(plain_of(rule))))
    assert again == rule and again.description == rule.description and type(again) is type(rule)


def test_only_elastics_own_classes_are_looked_up(tmp_path: Path) -> None:
    for name in ("Popen", "Path", "OuterLoop", "Layout"):
        with pytest.raises(ValueError, match="there is no class"):
            restored({"class": name, "fields": {}})
    (tmp_path / "loop.json").write_text(json.dumps({"format": "elastic-record-1", "rule": {"class": "Popen"}}))
    with pytest.raises(CheckpointMismatch, match=r"loop\.json"):
        Record.at(tmp_path)


def test_a_part_of_the_scripts_own_cannot_be_recorded() -> None:
    class Own(SGD):
        pass

    with pytest.raises(ConfigurationError, match="Own cannot be recorded"):
        plain_of(diloco.rule(Own(lr=0.5)))
