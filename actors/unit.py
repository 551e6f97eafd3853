"""The processes of one life of a peer, as one thing: they start, are asked and end together.

What it returns is awaitable; nothing here waits.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .peer import PeerActor, PeerSpec
from .restarts import Place


class Unit:
    """One life. title: unique among all lives and attempts, for Ray frees names late. log: file for what it prints."""

    def __init__(self, spec: PeerSpec, title: str, place: Place, log: str | None) -> None:
        self._actor: Any = PeerActor.options(name=title, **_needs(spec), **_where(spec, place)).remote(spec, log)

    def process(self) -> Any:
        """Where it runs, and how it is: an answer says that it is alive."""
        return self._actor.process.remote()

    def join(self) -> Any:
        """Until the run has admitted it."""
        return self._actor.join.remote()

    def train(self) -> Any:
        """Until the training function has returned."""
        return self._actor.train.remote()

    def drain(self, seconds: float) -> Any:
        """The training function is asked to end, after one last exchange within so many seconds."""
        return self._actor.drain.remote(seconds)

    def kill(self) -> None:
        # a held handle keeps the actor's name taken, and a hung process needs ray.kill to go
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None


def _needs(spec: PeerSpec) -> dict[str, Any]:
    return {"num_cpus": spec.cpus, "num_gpus": spec.gpus, "resources": spec.resources}


def _where(spec: PeerSpec, place: Place) -> dict[str, Any]:
    if place.node:
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(place.node, soft=False)}
    labels = dict(spec.labels)
    if place.avoid:
        labels["ray.io/node-id"] = f"!in({','.join(sorted(place.avoid))})"
    found: dict[str, Any] = {"label_selector": labels} if labels else {}
    return found | ({"scheduling_strategy": "SPREAD"} if spec.spread else {})
