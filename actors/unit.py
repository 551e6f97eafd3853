"""The processes of one life of a peer, as one thing: they start, are asked and end together.

A peer of one rank is one actor. One of several ranks is an actor for each, in a placement group, which Ray puts on one
node or nowhere. What is returned is awaitable; nothing here waits.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from .fleet import selected
from .local_ray import NAMESPACE
from .peer import Life, PeerActor, PeerSpec, Process, Raised, Trained
from .restarts import Place

NODE_ID = "ray.io/node-id"  # the label by which Ray selects a node
GRACE_SECONDS = 2.0  # for the other ranks to say what they know, once one has failed
GONE_SECONDS = 20.0  # Ray itself gives a process five to end, and kills it then


class Unit:
    """One life. title: unique among all lives and attempts, for Ray frees names late. log: file for what it prints.

    log: afterwards, of the rank that has failed. node: where it runs, once it has said so.
    """

    def __init__(self, spec: PeerSpec, title: str, place: Place, log: str | None) -> None:
        self.log, self.node = log, ""
        self._logs = [_log_of(log, rank) for rank in range(spec.ranks)]
        self._pids: tuple[int, ...] = ()
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        try:
            self._begin(spec, title, place)
        except BaseException:
            self.kill()
            raise

    def _begin(self, spec: PeerSpec, title: str, place: Place) -> None:
        if spec.ranks == 1:
            options = _needs(spec) | _where(spec, place)
            self._actors.append(_named(title, options).remote(spec, self.log))
            return
        self._group = _room(spec, place)
        for rank, log in enumerate(self._logs):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            options = _needs(spec) | {"scheduling_strategy": strategy}
            self._actors.append(_named(f"{title}.r{rank}", options).remote(spec, log, rank))

    def process(self, heard: int = 0) -> Awaitable[Process]:
        """Where it runs, and how it is: an answer says that all of it is alive. heard: as in `PeerHost.process`."""
        return self._process([actor.process.remote(heard) for actor in self._actors])

    async def _process(self, calls: list[Any]) -> Process:
        ranks: list[Process] = await asyncio.gather(*calls)
        self.node, self._pids = ranks[0].node, tuple(rank.pid for rank in ranks)
        return replace(ranks[0], pids=self._pids)

    def join(self) -> Awaitable[Life]:
        """Until the run has admitted it."""
        seats = [actor.sit.remote() for actor in self._actors] if self._group else []
        return self._outcome([actor.join.remote(*seats) for actor in self._actors])

    def train(self) -> Awaitable[Trained | Raised]:
        """Until the training function has returned."""
        return self._outcome([actor.train.remote() for actor in self._actors])

    async def _outcome(self, calls: list[Any]) -> Any:
        """What the leader answers, once all have; or, once one has failed, the failure that explains the others."""
        answers = [asyncio.ensure_future(call) for call in calls]
        waiting = set(answers)
        while waiting and min(map(_blame, answers)) > _DIED:
            hurry = GRACE_SECONDS if any(map(_failed, answers)) else None  # who waits for the lost may never end
            done, waiting = await asyncio.wait(waiting, timeout=hurry, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
        told = min(answers, key=_blame)  # of equals, the first: the leader if none has failed
        if _failed(told):
            self.log = self._logs[answers.index(told)]
        return told.result()

    def drain(self, seconds: float) -> Awaitable[Any]:
        """The training function is asked to end, after one last exchange within so many seconds."""
        leader = self._actors[:1]  # the other ranks learn it from it; nobody, once killed
        return asyncio.gather(*(actor.drain.remote(seconds) for actor in leader))

    def kill(self) -> None:
        # a held handle keeps the actor's name taken, and a hung process needs ray.kill to go
        try:
            while self._actors:
                ray.kill(self._actors.pop())
        finally:
            if self._group is not None:
                remove_placement_group(self._group)
                self._group = None

    async def gone(self) -> None:
        """Once killed: until none of its processes is left, as far as their node can still be asked."""
        try:
            if self.node in await asyncio.to_thread(nodes):
                await on_node(self.node, GONE_SECONDS, _outlive, self._pids)
        except Exception:  # a node that does not answer must not hold the next life up for good
            return


# --- failures of ranks ------------------------------------------------------------------------------------------------

_DIED, _RAISED, _FAILED, _WELL = range(4)


def _blame(answer: asyncio.Future[Any]) -> int:
    """The less, the more it explains: the other ranks of a process that died, or raised, only say that it is lost."""
    if not answer.done():
        return _WELL
    error = answer.exception()
    if error is None:
        return _RAISED if isinstance(answer.result(), Raised) else _WELL
    return _DIED if isinstance(error, RayActorError) else _FAILED


def _failed(answer: asyncio.Future[Any]) -> bool:
    return _blame(answer) < _WELL


# --- room -------------------------------------------------------------------------------------------------------------


def _room(spec: PeerSpec, place: Place) -> PlacementGroup:
    """Asks Ray for a node with room for all ranks. It gets it now, later or never."""
    labels = {NODE_ID: place.node} if place.node else _labels(spec, place)
    needs = _needs(spec)
    bundle = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"], **needs["resources"]}
    bundle = {name: amount for name, amount in bundle.items() if amount} or {"memory": 1}  # Ray refuses empty ones
    group: PlacementGroup = placement_group(
        [bundle] * spec.ranks,
        strategy="STRICT_PACK",
        bundle_label_selector=[labels] * spec.ranks,
        _soft_target_node_id=_spread(spec, bundle, labels) if spec.spread else None,
    )
    return group


def _named(title: str, options: dict[str, Any]) -> Any:
    return PeerActor.options(name=title, namespace=NAMESPACE, **options)


def _needs(spec: PeerSpec) -> dict[str, Any]:
    """What one rank takes."""
    resources = {name: _share(amount, spec.ranks) for name, amount in spec.resources.items()}
    return {
        "num_cpus": _share(spec.cpus, spec.ranks),
        "num_gpus": _share(spec.gpus, spec.ranks),
        "resources": resources,
    }


def _share(amount: float, ranks: int) -> float:
    return math.floor(amount / ranks * 10_000 + 1e-6) / 10_000  # Ray's precision: rounded up, all would not fit


def _where(spec: PeerSpec, place: Place) -> dict[str, Any]:
    if place.node:
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(place.node, soft=False)}
    labels = _labels(spec, place)
    found: dict[str, Any] = {"label_selector": labels} if labels else {}
    return found | ({"scheduling_strategy": "SPREAD"} if spec.spread else {})


def _labels(spec: PeerSpec, place: Place) -> dict[str, str]:
    avoided = {NODE_ID: f"!in({','.join(sorted(place.avoid))})"} if place.avoid else {}
    return dict(spec.labels) | avoided


def _spread(spec: PeerSpec, bundle: dict[str, float], labels: dict[str, str]) -> str | None:
    """The node to prefer: Ray by itself packs such groups, so the peers of a site take turns, by their numbers."""
    fit = [
        name
        for name, node in sorted(nodes().items())
        if all(node["Resources"].get(kind, 0) >= amount * spec.ranks for kind, amount in bundle.items())
        and all(selected(node["Labels"].get(label), wanted) for label, wanted in labels.items())
    ]
    number = re.search(r"\d*$", spec.name)
    return fit[int(number[0] or 0) % len(fit)] if fit and number else None


# --- nodes ------------------------------------------------------------------------------------------------------------


def nodes() -> dict[str, dict[str, Any]]:
    """The nodes that Ray takes for alive, by name."""
    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node for node in known if node["Alive"]}


async def on_node(node: str, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns there. Raises if the node does not say so within so many seconds."""
    if node == ray.get_runtime_context().get_node_id():
        return await asyncio.to_thread(function, *arguments)
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)

    async def answer() -> Any:
        return await task.options(scheduling_strategy=there).remote(*arguments)

    return await asyncio.wait_for(answer(), seconds)


def _outlive(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + GONE_SECONDS
    while any(map(_runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _log_of(log: str | None, rank: int) -> str | None:
    return str(Path(log).with_suffix(f".rank{rank}.log")) if log and rank else log
