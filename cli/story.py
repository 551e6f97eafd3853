"""What a run looked like at any moment of its event logs: a pure fold of events into the snapshots that views show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .logs import Event
from .view import PeerRow, Snapshot

STATES = {
    "peer.suspected": "suspect",
    "peer.recovered": "training",
    "peer.evicted": "lost",
    "peer.removed": "lost",
    "peer.quarantined": "left out",
    "peer.left_out": "left out",
    "peer.taken_back": "training",
    "peer.draining": "leaving",
    "peer.left": "finished",
    "peer.lost": "lost",
    "peer.killed": "killed",
    "peer.failed": "dead",
}
"""Of a peer, after such an event about it."""


class Story:
    """`tell` it the events in their order; `now` is the state after the last."""

    def __init__(self) -> None:
        self._began = self._last = 0.0
        self._round = self._target = self._epoch = 0
        self._contributors: tuple[str, ...] = ()
        self._heldout: float | None = None
        self._peers: dict[str, PeerRow] = {}

    def tell(self, event: Event) -> None:
        self._began = self._began or event["time_unix"]
        self._last = event["time_unix"]
        self._epoch = _whole(event.get("epoch"), self._epoch)
        name = event["event"]
        if name == "round.committed":
            self._committed(event)
        elif name == "run.target_set":
            self._target = _whole(event.get("rounds"), self._target)
        elif name == "heldout.evaluated":
            self._heldout = _real(event.get("loss"), self._heldout)
        elif isinstance(event.get("peer"), str):
            self._befell(event["peer"], name, event)

    def _committed(self, event: Event) -> None:
        self._round += not event.get("skipped")
        names = event.get("contributors")
        self._contributors = tuple(map(str, names)) if isinstance(names, list) else ()
        for each in self._contributors:
            self._put(each, state="training", round=_whole(event.get("version"), self._round))

    def _befell(self, peer: str, name: str, event: Event) -> None:
        if name == "peer.joined":
            self._put(peer, state="joining", life=_whole(event.get("life"), 1), note="")
        elif name == "train.loss":
            self._put(peer, step=_whole(event.get("step"), 0), loss=_real(event.get("loss"), None))
        elif name == "round.applied":
            self._put(peer, round=_whole(event.get("version"), 0))
        elif name == "state.fetched":
            self._put(peer, state="training", note=f"fetched version {event.get('version', '?')}")
        elif name in STATES:
            self._put(peer, state=STATES[name], note=str(event.get("evidence") or event.get("reason") or ""))

    def _put(self, name: str, **fields: Any) -> None:
        new = PeerRow(
            name=name, life=1, state="starting", step=0, loss=None, tokens_per_second=None, round=0, bytes_sent=0
        )
        self._peers[name] = replace(self._peers.get(name, new), **fields)

    def now(self) -> Snapshot:
        """elapsed_seconds: from the first event to the last."""
        return Snapshot(
            elapsed_seconds=self._last - self._began,
            round=self._round,
            rounds_target=self._target,
            contributors=self._contributors,
            epoch=self._epoch,
            heldout_loss=self._heldout,
            peers=tuple(self._peers[name] for name in sorted(self._peers)),
        )


def _whole(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _real(value: object, otherwise: float | None) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else otherwise
