"""The report: the facts of a killed peer from events alone, and a report from whatever there is."""

import builtins
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from cli.report import build_report, draw_loss, summary, write_report

PEERS = ("a", "b", "c")


def commit(round_number: int, at: float, contributors: tuple[str, ...] = PEERS, attempt: int = 0) -> dict[str, Any]:
    tokens = dict.fromkeys(contributors, 100)
    fields = {"round": round_number, "attempt": attempt, "contributors": list(contributors), "tokens": tokens}
    return {"event": "round.committed", "time_unix": at, "run": "demo", "version": round_number, **fields}


def killed_run() -> list[dict[str, Any]]:
    """Six rounds, 10 s apart from time 10 on; b is killed at 39.5 in round 4 and contributes again in round 6."""
    joined = [{"event": "peer.joined", "time_unix": 0.0, "peer": peer, "life": 1} for peer in PEERS]
    losses = [
        {"event": "train.loss", "time_unix": 5.0 * k, "peer": p, "loss": 5.0 - k / 4} for k in range(12) for p in PEERS
    ]
    heldout = [{"event": "heldout.evaluated", "round": n, "loss": 5.5 - n / 2, "time_unix": n * 10.0} for n in range(7)]
    return [
        *joined, *losses, *heldout,
        commit(1, 10.0), commit(2, 20.0), commit(3, 30.0),
        {"event": "fault.injected", "time_unix": 39.5, "peer": "b", "round": 4, "kind": "kill"},
        {"event": "round.shrunk", "time_unix": 39.75, "round": 4, "attempt": 1, "lost": ["b"]},
        {"event": "peer.lost", "time_unix": 39.9, "peer": "b", "evidence": "reset"},
        commit(4, 40.0, ("a", "c"), attempt=1),
        {"event": "peer.joined", "time_unix": 45.0, "peer": "b", "life": 2},
        commit(5, 50.0, ("a", "c")), commit(6, 60.0),
    ]  # fmt: skip


FINAL = {peer: {"state_hash": "abcd", "bytes_sent": 1_000_000} for peer in PEERS}


def changed(drop: str = "", **extra: Any) -> dict[str, Any]:
    events = [event for event in killed_run() if event["event"] != drop]
    return build_report(events, FINAL, **extra)


# --- facts ---


def test_kill_is_told_from_the_events() -> None:
    [kill] = changed()["kills"]
    assert kill == {
        "peer": "b",
        "round": 4,
        "time_unix": 39.5,
        "position": 3.95,
        "survivors_finished_round": True,
        "detected_seconds": 0.25,
        "contributed_again_round": 6,
        "contributed_again_seconds": 20.5,
    }


def test_detection_by_membership_counts_when_no_round_shrank() -> None:
    assert changed(drop="round.shrunk")["kills"][0]["detected_seconds"] == 0.4


def test_what_was_lost_before_the_kill_is_no_detection() -> None:
    early = {"event": "peer.lost", "time_unix": 12.0, "peer": "b"}
    assert build_report([early, *killed_run()])["kills"][0]["detected_seconds"] == 0.25


@pytest.mark.parametrize(
    ("events", "finished"),
    [
        ([commit(3, 1.0)], None),
        ([commit(3, 1.0), commit(4, 3.0, ("a", "c"))], True),
        ([commit(3, 1.0), commit(4, 3.0, ("a",))], False),
        ([commit(3, 1.0), commit(4, 3.0)], True),
        ([commit(3, 1.0), commit(5, 3.0, ("a", "c"))], False),
        ([commit(4, 3.0, ("a", "c")), commit(5, 4.0)], True),
    ],
)
def test_survivors_finished_if_all_of_them_committed(events: list[dict[str, Any]], finished: bool | None) -> None:
    kill = {"event": "fault.injected", "time_unix": 2.0, "peer": "b", "round": 4, "kind": "kill"}
    assert build_report([*events, kill])["kills"][0]["survivors_finished_round"] is finished


def test_rounds_and_tokens_are_counted_once_however_often_they_are_told() -> None:
    once, twice = build_report(killed_run(), FINAL), build_report([*killed_run(), *killed_run()[-1:]], FINAL)
    assert once["rounds_committed"] == twice["rounds_committed"] == 6
    assert once["tokens_per_peer"] == twice["tokens_per_peer"] == {"a": 600, "b": 400, "c": 600}
    assert once["tokens_committed"] == 1600
    assert once["contributors_per_round"][3] == {"round": 4, "attempt": 1, "contributors": ["a", "c"]}


def test_losses_stand_on_the_axis_of_rounds() -> None:
    report = changed()
    assert report["train_loss"]["a"][:3] == [[0.0, 5.0], [0.5, 4.75], [1.0, 4.5]]
    assert report["heldout_loss"][:2] == [[0, 5.5], [1, 5.0]]
    assert (report["heldout_loss_first"], report["heldout_loss_last"]) == (5.5, 2.5)


def test_final_facts_settings_and_versions() -> None:
    report = changed(settings={"out": Path("x")}, sample_text="def f", seed=3, wall_seconds=61.23456)
    assert report["state_hash"] == dict.fromkeys(PEERS, "abcd") and report["state_hashes_equal"] is True
    assert report["bytes_sent_per_peer"] == dict.fromkeys(PEERS, 1_000_000)
    assert report["settings"] == {"out": "x"} and report["seed"] == 3 and report["wall_seconds"] == 61.235
    assert report["peers"] == ["a", "b", "c"] and report["run"] == "demo" and report["interrupted"] is False
    assert report["versions"]["python"] and report["versions"]["numpy"]


@pytest.mark.parametrize(
    ("hashes", "equal"), [(("x", "x"), True), (("x", "y"), False), (("x", None), None), ((), None)]
)
def test_unknown_hashes_are_not_equal(hashes: tuple[str | None, ...], equal: bool | None) -> None:
    final = {str(i): {"state_hash": value} for i, value in enumerate(hashes)}
    assert build_report([], final)["state_hashes_equal"] is equal


# --- from whatever there is ---


def test_a_report_comes_out_wherever_the_run_is_cut(tmp_path: Path) -> None:
    events = sorted(killed_run(), key=lambda event: event["time_unix"])
    for end in range(len(events) + 1):
        report = build_report(events[:end], interrupted=True)
        assert summary(report).startswith("interrupted")
        json.dumps(report, allow_nan=False)
    assert build_report([])["heldout_loss_last"] is None


@pytest.mark.parametrize("value", [None, "x", -1, float("nan"), [1], {"x": None}])
def test_no_field_of_an_event_breaks_the_report(value: Any) -> None:
    events = killed_run()
    for key in {key for event in events for key in event} - {"event"}:
        report = build_report([{**event, key: value} if key in event else event for event in events], FINAL)
        json.dumps(report, allow_nan=False)
        assert summary(report)


# --- files ---


def test_report_is_written_whole_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    report = {"loss": float("nan"), "at": tmp_path, "sample_text": b"caf\xc3\xa9 \xff", "lone": "\ud800", 3: (1, 2)}
    path = write_report(tmp_path, report)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    written = json.loads(path.read_text("utf-8"))
    assert written["loss"] is None and written["3"] == [1, 2] and written["sample_text"] == "café �"


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old")

    def full(path: Path, data: bytes) -> int:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, {})
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.json", "old")]


def test_picture_of_a_run_and_of_nothing(tmp_path: Path) -> None:
    for report in (changed(), build_report([], interrupted=True)):
        path = tmp_path / "loss.png"
        assert draw_loss(path, report) is None
        header = path.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", header[16:]) > (1000, 500)
        assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_picture_marks_the_kill_and_the_return(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append(self) or path.touch())
    draw_loss(tmp_path / "loss.png", changed())
    [axes] = drawn[0].axes
    words = [text.get_text() for text in axes.texts]
    assert words == ["b killed (round 4)", "b contributes again (20.5 s later)"]
    assert "b was killed in round 4; the survivors finished the round" in axes.get_title(loc="left")
    labels = [line.get_label() for line in axes.lines][:4]
    assert labels == ["train, a", "train, b", "train, c", "held out,\nouter parameters"]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imported = builtins.__import__

    def missing(name: str, *rest: Any, **fields: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest, **fields)

    monkeypatch.setattr(builtins, "__import__", missing)
    reason = draw_loss(tmp_path / "loss.png", changed())
    assert reason is not None and "elastic-diloco[plots]" in reason
    assert list(tmp_path.iterdir()) == []


# --- in words ---


def test_summary_says_what_happened() -> None:
    words = summary(changed())
    assert "6 rounds committed by 3 peers (a, b, c) in 60 s" in words
    assert "5.500 -> 2.500 nats/byte (-55%)" in words
    assert "b in round 4: the others finished it; detected after 0.25 s" in words
    assert "it contributed again in round 6, 20.50 s after the kill" in words
    assert "the same on all 3 peers: abcd" in words
    assert "a 1.0 MB" in words and "1,600: a 600, b 400, c 600" in words


def test_summary_shouts_when_states_differ() -> None:
    differing = {**FINAL, "b": {"state_hash": "ffff"}}
    assert "DIFFERS: a abcd, b ffff, c abcd" in summary(build_report(killed_run(), differing))
