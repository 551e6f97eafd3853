"""One peer in a supervisor's care, what is reported of it, and what its node has to say."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray._private.state import available_resources_per_node
from ray.exceptions import RayError

from elastic.events import EventLog

from .fleet import Node
from .logs import tail
from .peer import Life, PeerSpec, Process, Raised, Trained
from .restarts import FailureConfig, Restarts
from .unit import Unit, on_node
from .unit import nodes as alive

TAIL_SECONDS = 15.0  # for another node to say what the end of a log is
GONE_SECONDS = 20.0  # in which Ray finds out that a node is gone, with its own settings


class Charge:
    """One peer in the supervisor's care.

    state: starting, waiting (no node has had room for it so far), running, restarting, finished or failed.
    incarnation: of the last life that has said that the run has admitted it; 0: none. guest: it was another
    supervisor's before. given_up: why no further life begins here, if the coordinator needs to know. begun: a node has
    had room for it. heard: the number of the last entry that its present life has reported.
    """

    def __init__(self, spec: PeerSpec, policy: FailureConfig, *, guest: bool = False) -> None:
        self.spec, self.guest = spec, guest
        self.state = "starting"
        self.lives = self.incarnation = self.heard = 0
        self.begun = False
        self.life: Life | None = None
        self.process: Process | None = None
        self.log: str | None = None
        self.log_node = ""
        self.unit: Unit | None = None
        self.ended: Unit | None = None
        self.trained: Trained | None = None
        self.raised: Raised | None = None
        self.error = self.given_up = ""
        self.failed_at = 0.0
        self.task: asyncio.Task[None] | None = None
        self.restarts = Restarts(policy)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def done(self) -> bool:
        return self.state in ("finished", "failed")

    @property
    def arriving(self) -> bool:
        """A guest that the run has not admitted yet."""
        return self.guest and not self.incarnation and not self.given_up and not self.done

    def report(self) -> ChargeReport:
        return ChargeReport(
            name=self.name,
            state=self.state,
            lives=self.lives,
            pid=self.process.pid if self.process else 0,
            trained=self.trained,
            error=self.error,
            raised=self.raised,
            node=self.process.node if self.process else "",
        )

    def end(self) -> None:
        """Ends its process, if there is one."""
        if self.unit is not None:
            self.unit.kill()
            self.ended, self.log, self.unit = self.unit, self.unit.log, None

    def stop(self) -> None:
        """Ends its process, and begins no other."""
        if self.task is not None:
            self.task.cancel()
        self.end()

    def dismiss(self, events: EventLog) -> None:
        """Nobody needs it any more."""
        self.stop()
        self.state = "finished"
        events.emit("peer.dismissed", peer=self.name)

    async def last_words(self) -> tuple[str, ...]:
        """The end of what its last life has printed; nothing if that is not known, or its node does not say."""
        log, node = self.log, self.log_node
        if log is None:
            return ()
        if not node or Path(log).exists():
            return await asyncio.to_thread(tail, log)
        try:
            lines: tuple[str, ...] = await on_node(node, TAIL_SECONDS, tail, log)
            return lines
        except Exception:  # a report without them is better than none
            return ()


@dataclass(frozen=True, kw_only=True)
class ChargeReport:
    """A peer's state as its supervisor sees it. trained: what it leaves behind, once finished; None too if it was ended
    because nobody needed it any more.

    error: why it was given up, in the first line; then the last lines of its log, if it has one. raised: the exception
    of its training function, if it was that.
    """

    name: str
    state: str
    lives: int
    pid: int
    trained: Trained | None
    error: str
    raised: Raised | None = None
    node: str = ""

    @property
    def reason(self) -> str:
        return self.error.partition("\n")[0]


def nodes() -> list[Node]:
    """The living nodes, as Ray knows them."""
    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return [
        Node(
            id=name,
            address=node["NodeManagerAddress"],
            total=node["Resources"],
            free=free.get(name, {}),
            labels=node.get("Labels") or {},
        )
        for name, node in alive().items()
    ]


async def answers(node: str) -> bool:
    """Whether this node is there: a process on it says so, in the time that Ray takes to find out that it is not."""
    try:
        await on_node(node, GONE_SECONDS, tail, "")
        return True
    except RayError:
        return False
    except TimeoutError:
        return node in await asyncio.to_thread(alive)


async def awaited(call: Any) -> Any:
    return await call
