"""What a `Trainer` is told: how many peers of what size, what to do about failures, where the run keeps its things.

The nouns are those of Ray Train. Plain values: Ray is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from elastic.config import RunPolicy, Timeouts, check_endpoint, check_name
from elastic.errors import ConfigurationError

from .restarts import FailureConfig

__all__ = ["FailureConfig", "RunConfig", "ScalingConfig"]

PLACEMENTS = ("spread", "pack")
_RESERVED = {"CPU": "cpus_per_peer", "GPU": "gpus_per_peer", "memory": ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """How many peers there are, and what each of them takes.

    num_peers: so many, or (fewest, most): rounds wait for the fewest, and there are as many up to the most as there is
    room for, at any time. cpus_per_peer, gpus_per_peer, resources: of a whole peer, in Ray's units; its ranks share
    them equally, and a whole number of GPUs each. ranks_per_peer: processes of one torch.distributed group, all on one
    node, that live and die together. placement: "spread" over nodes as evenly as they allow, or "pack" on few.
    labels: of the nodes that peers may run on (Ray's label selectors, `{"market-type": "!spot"}` too).
    """

    num_peers: int | tuple[int, int] = 1
    cpus_per_peer: float = 1.0
    gpus_per_peer: float = 0.0
    ranks_per_peer: int = 1
    resources: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    placement: str = "spread"
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most:
            raise ConfigurationError(f"num_peers is {self.num_peers}: it must be N or (fewest, most), from 1 on")
        if self.ranks_per_peer < 1:
            raise ConfigurationError(f"ranks_per_peer is {self.ranks_per_peer}: it must be at least 1")
        for name in ("cpus_per_peer", "gpus_per_peer"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ConfigurationError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        if self.placement not in PLACEMENTS:
            raise ConfigurationError(f"placement is {self.placement!r}: use {' or '.join(PLACEMENTS)}")
        self._check_resources()

    @property
    def fewest(self) -> int:
        return self.num_peers if isinstance(self.num_peers, int) else self.num_peers[0]

    @property
    def most(self) -> int:
        return self.num_peers if isinstance(self.num_peers, int) else self.num_peers[1]

    def _check_resources(self) -> None:
        for name, amount in self.resources.items():
            if name in _RESERVED:
                hint = f"use {_RESERVED[name]}" if _RESERVED[name] else "it is not handed out"
                raise ConfigurationError(f"resources must not name {name}: {hint}")
            if not amount >= 0:
                raise ConfigurationError(f"resources[{name!r}] is {amount}: it must be 0 or more")
        per_rank = self.gpus_per_peer / self.ranks_per_peer
        if self.ranks_per_peer > 1 and per_rank != int(per_rank):
            raise ConfigurationError(
                f"gpus_per_peer is {self.gpus_per_peer}: {self.ranks_per_peer} ranks need a whole number each"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Which run this is, and where it keeps its things.

    name: of the run; whoever fits the same name on the same Ray attaches to it. storage_path: folder under which the
    run has one of its name (journal, events, logs, checkpoints, metrics); every node that peers run on must see it for
    checkpoints to be of use there. policy: quorum, targets, faults; rounds wait for `ScalingConfig`'s fewest peers at
    least. bind: HOST:PORT of the coordinator; by default loopback if Ray has this one host, else the address that Ray
    has for the coordinator's node. start_seconds: within which the fewest peers must have found room.
    drain_seconds: that peers get to finish their round when the run is asked to stop.
    """

    name: str = "elastic"
    storage_path: str | Path = "~/elastic_results"
    site: str = "local"
    policy: RunPolicy = field(default_factory=RunPolicy)
    timeouts: Timeouts = field(default_factory=Timeouts)
    stripes: int | None = None
    bind: str | None = None
    start_seconds: float = 60.0
    drain_seconds: float = 20.0

    def __post_init__(self) -> None:
        check_name("run", self.name)
        check_name("site", self.site)
        if self.bind is not None:
            check_endpoint("bind", self.bind)
        for name in ("start_seconds", "drain_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}: it must be above 0 seconds")

    @property
    def path(self) -> Path:
        """The run's own folder."""
        return Path(self.storage_path).expanduser().absolute() / self.name
