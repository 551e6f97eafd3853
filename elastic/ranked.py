"""`Peer(..., process_group=pg)`: one member of a run that is several processes, say one for each GPU of a site."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch.distributed as dist

from collectives import Group

from .config import Timeouts, environment
from .data import Data
from .errors import TransportError
from .lanes import Lane, LanedGroup, LaneFacts, open_lane
from .messages import Message, RunProgress
from .peer import SIGTERM_SECONDS, Peer, PeerView, Reduced, Work, open_group
from .ranks import Ranks
from .reports import Reports
from .telemetry import Telemetry

LANE_OPTIONS = ("run", "name", "incarnation", "options")  # what the groups of all ranks have in common
PATIENCE = 1800.0  # seconds that ranks wait for each other at the least: a step, or a round, can be long

P = ParamSpec("P")
R = TypeVar("R")


def _together(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """All ranks call it, the leader does it, all have the outcome."""

    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        outcome: R = self.ranks.together(method.__name__, lambda: method(self, *args, **kwargs))
        return outcome

    update_wrapper(call, method)
    return call


class RankedPeer(Peer):
    """A peer whose ranks are the processes of `process_group`; `Peer` makes it.

    Rank 0 leads: it alone is known to the coordinator and to other peers, and its arguments count. All ranks make the
    same calls in the same order, in the thread that made the peer, and get the same results: `progress`, `stopping` and
    `view` change only within such calls, to the same on all of them. A collective takes the leader's tensor; what is to
    be added up among the ranks first, the script adds up. `report` counts on the leader; `events` are each rank's own.

    The ranks live and die together: if one is lost, the others raise TransportError, and the peer is lost to the run
    as a whole.

    Each rank has links of its own, and exchanges its own range of what travels (`lanes`), if all of them can listen and
    the leader reaches them; else the leader carries it all, and the event `lanes.refused` says why. A fixed port of
    `listen` or `advertise` is the leader's; the rank of number r has the r-th above it.
    """

    ranks: Ranks

    def __init__(self, *args: Any, process_group: dist.ProcessGroup | None = None, **options: Any) -> None:
        assert process_group is not None
        timeouts = options.get("timeouts") or Timeouts()
        self.ranks = Ranks(process_group, max(PATIENCE, 2 * timeouts.round))
        self._seen = RunProgress(), False, PeerView(0, ())
        self.lane: Lane | None = None
        if not self.ranks.leads:
            self._mirror()
            self.ranks.teach("lanes", lambda: self._open_lane(options))
        try:
            facts = self.ranks.together("Peer", lambda: self._lead(args, options))
            if not self.ranks.leads:
                self._follow(*facts, options)
        except BaseException:
            self._close_lane()
            self.ranks.close()
            raise

    def _lead(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        super().__init__(*args, **options)
        self.ranks.on_wanted_end = self.drain
        self._mirror()
        return self.run, self.name, self.site, self.timeouts, self.incarnation, self.life

    # --- links of each rank's own -------------------------------------------------------------------------------------

    def _open_group(self, lanes: bool, coordinator: str, **options: Any) -> Group:
        if not lanes:
            return super()._open_group(lanes, coordinator, **options)
        group = open_group(LanedGroup, **options)
        try:
            self._lead_lanes(group, coordinator, {name: options[name] for name in LANE_OPTIONS})
        except BaseException:
            group.close()
            raise
        return group

    def _lead_lanes(self, group: LanedGroup, coordinator: str, options: dict[str, Any]) -> None:
        """All ranks open theirs; if one cannot, there are none, and the leader has all the links."""
        secret = secrets.token_bytes(32)
        facts = LaneFacts(coordinator, options, secret, self.timeouts.heartbeat)
        self.ranks.order("lanes")
        self.ranks.pass_on(facts)
        offers = self.ranks.gather(None)[1:]
        trouble = self.ranks.pass_on(group.lead(offers, secret, self.timeouts.chunk))
        if trouble:
            self.events.emit("lanes.refused", reason=trouble)

    def _open_lane(self, options: dict[str, Any]) -> None:
        facts = self.ranks.pass_on(None)
        offer, self.lane = open_lane(facts, self.ranks.rank, options.get("listen"), options.get("advertise"))
        self.ranks.gather(offer)
        if self.ranks.pass_on(None):
            self._close_lane()

    def _close_lane(self) -> None:
        if self.lane is not None:
            self.lane.close()

    # --- ranks that do not lead ---------------------------------------------------------------------------------------

    def _follow(self, *facts: Any) -> None:
        self.run, self.name, self.site, self.timeouts, self.incarnation, self.life, options = facts
        self._changed = threading.Condition()
        self._fatal = None
        self._drain_until = self._sigterm = None
        self.when_idle, self.when_leaving, self.recomputes = [], [], {}
        self.reports = Reports()
        self.data, self.telemetry = Data(self), Telemetry()
        folder = options.get("events_dir") or environment().get("ELASTIC_EVENTS_DIR")
        self.events = self._event_log(folder, f"{self.name}.rank{self.ranks.rank}")
        self._drain_on_sigterm(options.get("sigterm_deadline", SIGTERM_SECONDS))

    # --- what all ranks see alike -------------------------------------------------------------------------------------

    def _mirror(self) -> None:
        self.ranks.mirror("peer", self._now, self._see)

    def _now(self) -> tuple[RunProgress, bool, PeerView]:
        return self._progress, self.ending, super().view

    def _see(self, now: tuple[RunProgress, bool, PeerView]) -> None:
        self._seen = now

    @property
    def progress(self) -> RunProgress:
        return self._seen[0]

    @property
    def stopping(self) -> bool:
        return self._seen[1]

    @property
    def view(self) -> PeerView:
        return self._seen[2]

    # --- calls of all ranks -------------------------------------------------------------------------------------------

    def wait_for(self, n: int, timeout: float = 60.0) -> PeerView:
        self.ranks.together("wait_for", lambda: super(RankedPeer, self).wait_for(n, timeout))
        return self.view

    run_until = _together(Peer.run_until)
    statistics = _together(Peer.statistics)
    all_reduce = _together(Peer.all_reduce)
    reduce_scatter = _together(Peer.reduce_scatter)
    broadcast = _together(Peer.broadcast)
    all_gather = _together(Peer.all_gather)
    barrier = _together(Peer.barrier)

    def all_reduce_async(self, *args: Any, **options: Any) -> Work[Reduced]:
        """As for one process; `wait` and `done` are calls of all ranks."""
        work: list[Work[Reduced]] = []  # the leader's

        def begin() -> None:
            work.append(super(RankedPeer, self).all_reduce_async(*args, **options))

        self.ranks.together("all_reduce_async", begin)
        return _RankedWork(self.ranks, work)

    def leave(self, *, drain: bool = True, timeout: float = 30.0) -> None:
        """As for one process. With drain, a call of all ranks; without, each rank's own, and the others are told."""
        if self._fatal is not None or not drain:
            self._leave_alone()
            return
        try:
            self.ranks.together("leave", lambda: super(RankedPeer, self).leave(timeout=timeout))
        finally:
            self._end_own_loops()
            self.close()

    def _leave_alone(self) -> None:
        if self.ranks.leads:
            super().leave(drain=False)
        self.close()

    # --- each rank's own ----------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        return super().draining or self.ranks.wants_end

    def drain(self, timeout: float = 30.0) -> None:
        """As for one process, called on any of the ranks: the leader learns of it in the next call of all."""
        if self.ranks.leads:
            super().drain(timeout)
        else:
            self.ranks.wants_end = True

    def report(self, *, metrics: Mapping[str, Any] | None = None, **status: Any) -> None:
        if self.ranks.leads:
            super().report(metrics=metrics, **status)

    def send(self, message: Message) -> None:
        if self.ranks.leads:
            super().send(message)

    def close(self) -> None:
        if self.ranks.leads:
            super().close()
        else:
            self._close_follower()
        self.ranks.close()

    def _close_follower(self) -> None:
        self._fatal = self._fatal or TransportError("this Peer is closed", peer=self.name)
        self._close_lane()
        self._undo_sigterm()
        self.events.close()


class _RankedWork(Work[Reduced]):
    def __init__(self, ranks: Ranks, work: list[Work[Reduced]]) -> None:
        self._ranks, self._work = ranks, work

    def wait(self, timeout: float | None = None) -> Reduced:
        return self._ranks.together("wait", lambda: self._work[0].wait(timeout))

    def done(self) -> bool:
        return self._ranks.together("done", lambda: self._work[0].done())
