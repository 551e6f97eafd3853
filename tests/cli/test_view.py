"""The views: what a person reads, and that nothing from another machine gets through as an escape code."""

import io
from typing import Any

import pytest
from rich.console import Console

from cli.view import LiveView, LogView, PeerRow, Snapshot, describe, human_bytes, make_view, sparkline


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def peer(name: str = "a", **changed: Any) -> PeerRow:
    fields = {"life": 1, "state": "training", "step": 1200, "loss": 2.345, "tokens_per_second": 7800.0}
    return PeerRow(**{"name": name, "round": 3, "bytes_sent": 4_000_000, **fields, **changed})


def snapshot(*peers: PeerRow, **changed: Any) -> Snapshot:
    fields = {"elapsed_seconds": 9.0, "round": 3, "rounds_target": 40, "contributors": ("a", "b"), "epoch": 2}
    return Snapshot(**{**fields, "heldout_loss": 2.5, "peers": peers or (peer(),), **changed})


def log_view() -> tuple[LogView, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return LogView(stream, run="demo", clock=clock), stream, clock


def live_picture(view: LiveView, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view._render())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def live() -> Any:
    view = LiveView(Console(file=Terminal(), force_terminal=True, width=120), run="demo")
    yield view
    view.close()


# --- which view ---


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm"}, LiveView),
        ({"TERM": "dumb"}, LogView),
        ({}, LogView),
        ({"TERM": "xterm", "NO_COLOR": "1"}, LogView),
        ({"TERM": "xterm", "NO_COLOR": ""}, LiveView),
    ],
)
def test_a_live_view_needs_a_terminal_that_can(
    environment: dict[str, str], expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    view = make_view(Terminal(), run="demo")
    assert type(view) is expected
    view.close()
    assert type(make_view(io.StringIO())) is LogView


# --- the live view ---


def test_live_view_shows_run_peers_and_events(live: LiveView) -> None:
    live.update(snapshot(peer("a"), peer("b", state="killed", loss=None, note="killed in round 3")))
    live.event({"event": "round.shrunk", "round": 3, "attempt": 1, "lost": ["b"]})
    live.event({"event": "round.short", "round": 3, "contributors": ["a"], "needs": 3})
    live.event({"event": "train.loss", "peer": "a", "loss": 1.0})
    picture = live_picture(live)
    for words in ("demo", "round 3/40", "contributors: a, b", "held-out loss 2.500", "1,200", "7,800", "4.0 MB"):
        assert words in picture
    assert "killed in round 3" in picture and "round 3 goes on without b" in picture
    assert "round 3 waits: it needs 3 contributors, and has a" in picture
    assert "train.loss" not in picture


def test_live_view_draws_before_the_first_snapshot(live: LiveView) -> None:
    live.event({"event": "peer.joined", "peer": "a", "life": 1})
    assert "starting" in live_picture(live) and "a joined (life 1)" in live_picture(live)


def test_live_view_keeps_the_last_six_events(live: LiveView) -> None:
    for n in range(9):
        live.event({"event": "peer.killed", "peer": f"peer-{n}"})
    picture = live_picture(live)
    assert "peer-2" not in picture
    assert all(f"peer-{n} was killed" in picture for n in range(3, 9))


def test_live_view_shows_names_as_they_are_and_obeys_none(live: LiveView) -> None:
    live.update(snapshot(peer("[red]x[/red]"), peer("y\x1b[2J", note="\x07bell")))
    live.event({"event": "peer.lost", "peer": "y\x1b[2J", "evidence": "said\r\nnothing"})
    picture = live_picture(live)
    assert "[red]x[/red]" in picture and "y?[2J" in picture and "said??nothing" in picture
    assert "\x1b" not in picture and "\x07" not in picture


def test_live_view_draws_any_width_and_closes_twice(live: LiveView) -> None:
    live.update(snapshot(peer("a", loss=float("nan"), tokens_per_second=None), heldout_loss=float("nan")))
    live.update(snapshot(rounds_target=0, contributors=(), heldout_loss=None))
    assert all(live_picture(live, width) for width in (20, 60, 200))
    live.close()
    live.close()


# --- the log ---


def test_log_has_a_line_per_event_and_no_escape_codes() -> None:
    view, stream, clock = log_view()
    clock.now += 2.5
    view.event({"event": "round.committed", "round": 1, "contributors": ["a", "b"], "tokens": {"a": 5000, "b": 1}})
    view.event({"event": "peer.joined", "peer": "c\x1b[31m\n", "life": 2})
    view.event({"event": "heldout.evaluated", "round": 1, "loss": 2.0})
    assert stream.getvalue().splitlines() == [
        "demo     2.5s  round 1 committed by a, b (5,001 tokens)",
        "demo     2.5s  c?[31m? joined (life 2)",
    ]


def test_log_tells_the_status_every_ten_seconds() -> None:
    view, stream, clock = log_view()
    for _ in range(100):
        clock.now += 0.25
        view.update(snapshot())
    assert stream.getvalue().count("\n") == 2
    assert "round 3/40  held-out 2.500  a: training step 1200 loss 2.345" in stream.getvalue()


def test_log_survives_a_stream_in_ascii() -> None:
    raw = io.BytesIO()
    view = LogView(io.TextIOWrapper(raw, encoding="ascii"), clock=Clock())
    view.event({"event": "peer.killed", "peer": "zürich"})
    assert raw.getvalue() == b"    0.0s  z?rich was killed\n"


def test_nothing_is_logged_after_close() -> None:
    view, stream, _ = log_view()
    view.close()
    view.event({"event": "peer.killed", "peer": "a"})
    view.close()
    assert stream.getvalue() == ""


# --- words ---


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            {"event": "round.committed", "round": 4, "attempt": 1, "contributors": ["a"], "tokens": {"a": 10}},
            "round 4 committed by a (10 tokens, attempt 1)",
        ),
        ({"event": "fault.injected", "peer": "b", "round": 4, "kind": "kill"}, "SIGKILL to b in the middle of round 4"),
        ({"event": "peer.evicted", "peer": "b", "evidence": "gone"}, "b was evicted: gone"),
        (
            {"event": "state.fetched", "peer": "b", "bytes": 3_400_000, "seconds": 0.123, "sources": ["a", "c"]},
            "b fetched 3.4 MB from a, c in 0.12 s",
        ),
        ({"event": "run.rolled_back", "run": "demo", "time_unix": 1.0, "version": 3}, "run.rolled_back version=3"),
        ({}, "?"),
    ],
)
def test_events_in_words(event: dict[str, Any], words: str) -> None:
    assert describe(event) == words


@pytest.mark.parametrize("name", ["round.committed", "round.shrunk", "fault.injected", "peer.joined", "state.fetched"])
@pytest.mark.parametrize("value", [None, 3, "x", {"y": None}, [None]])
def test_no_field_of_an_event_breaks_the_view(name: str, value: Any) -> None:
    fields = ("peer", "round", "attempt", "contributors", "tokens", "lost", "kind", "life", "sources", "seconds")
    assert describe({"event": name, **dict.fromkeys((*fields, "bytes", "version"), value)})
    assert describe({"event": name})


def test_sparkline_and_sizes() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▄▁"
    assert sparkline([1.0, float("nan"), 1.0]) == "▁ ▁"
    assert sparkline([]) == sparkline([float("inf")]) == ""
    assert [human_bytes(n) for n in (0, 999, 1500, 2.5e6, 3e9, 4e12)] == [
        "0 B", "999 B", "1.5 kB", "2.5 MB", "3.0 GB", "4.0 TB",
    ]  # fmt: skip
