"""elastic: train one model on machines that come and go, over the ordinary internet.

    with elastic.Peer("tcp://host:29400", run="c4-1b", name="eu-1") as peer:
        with elastic.DiLoCo(model, inner, peer, sync_every=100) as outer:
            ...

Names are imported when they are first used, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

import fault as _below

if TYPE_CHECKING:
    from actors.settings import FailureConfig, RunConfig, ScalingConfig
    from actors.trainer import Result, Trainer
    from collectives import LinkOptions

    from .checkpoints import Checkpoints
    from .config import FaultPolicy, JoinToken, RunPolicy, Timeouts
    from .coordinator import Coordinator
    from .errors import (
        AuthenticationFailed,
        CheckpointMismatch,
        CollectiveError,
        ConfigurationError,
        CoordinatorUnavailable,
        ElasticError,
        Evicted,
        MembershipError,
        NoSource,
        NotEnoughPeers,
        ParityError,
        Quarantined,
        RoundAborted,
        StateError,
        TrainingFailed,
        TransferInterrupted,
        TransportError,
        VersionMismatch,
    )
    from .outer.cadence import Final, Late, Ramp, Seconds, Steps
    from .outer.co2 import CO2
    from .outer.decoupled import DecoupledDiLoCo
    from .outer.delayed import DelayedDiLoCo
    from .outer.diloco import DiLoCo
    from .outer.engine import OuterLoop
    from .outer.feedback import EF21, EControl, ErrorFeedback
    from .outer.optimizers import SGD, Adam, HeavyBall, Nesterov
    from .outer.robust import CoordinateMedian, FlagAggregator, GeometricMedian, Krum, NormClip, TrimmedMean
    from .outer.streaming import StreamingDiLoCo
    from .outer.weighting import Equal, FedBuff, FedFix, Throughput, Tokens
    from .peer import Finished, Gathered, Peer, PeerView, Reduced, Scattered, Work

if not _below.__file__ or _Path(_below.__file__).parents[1] != _Path(__file__).parents[1]:
    raise ImportError(
        f"the folder {next(iter(_below.__path__))} shadows elastic's package 'fault': rename it or move away"
    )

_HOMES = {
    **dict.fromkeys(("FaultPolicy", "JoinToken", "RunPolicy", "Timeouts"), "config"),
    "Checkpoints": "checkpoints",
    "Coordinator": "coordinator",
    **dict.fromkeys(
        (
            "AuthenticationFailed",
            "CheckpointMismatch",
            "CollectiveError",
            "ConfigurationError",
            "CoordinatorUnavailable",
            "ElasticError",
            "Evicted",
            "MembershipError",
            "NoSource",
            "NotEnoughPeers",
            "ParityError",
            "Quarantined",
            "RoundAborted",
            "StateError",
            "TrainingFailed",
            "TransferInterrupted",
            "TransportError",
            "VersionMismatch",
        ),
        "errors",
    ),
    **dict.fromkeys(("Final", "Late", "Ramp", "Seconds", "Steps"), "outer.cadence"),
    "CO2": "outer.co2",
    "DecoupledDiLoCo": "outer.decoupled",
    "DelayedDiLoCo": "outer.delayed",
    "DiLoCo": "outer.diloco",
    "OuterLoop": "outer.engine",
    **dict.fromkeys(("EF21", "EControl", "ErrorFeedback"), "outer.feedback"),
    **dict.fromkeys(("SGD", "Adam", "HeavyBall", "Nesterov"), "outer.optimizers"),
    **dict.fromkeys(
        ("CoordinateMedian", "FlagAggregator", "GeometricMedian", "Krum", "NormClip", "TrimmedMean"), "outer.robust"
    ),
    "StreamingDiLoCo": "outer.streaming",
    **dict.fromkeys(("Equal", "FedBuff", "FedFix", "Throughput", "Tokens"), "outer.weighting"),
    **dict.fromkeys(("Finished", "Gathered", "Peer", "PeerView", "Reduced", "Scattered", "Work"), "peer"),
    "LinkOptions": "peer",
    **dict.fromkeys(("FailureConfig", "RunConfig", "ScalingConfig"), "actors.settings"),
    **dict.fromkeys(("Result", "Trainer"), "actors.trainer"),
}

__all__ = [
    "Adam",
    "AuthenticationFailed",
    "CO2",
    "CheckpointMismatch",
    "Checkpoints",
    "CollectiveError",
    "ConfigurationError",
    "CoordinateMedian",
    "Coordinator",
    "CoordinatorUnavailable",
    "DecoupledDiLoCo",
    "DelayedDiLoCo",
    "DiLoCo",
    "EControl",
    "EF21",
    "ElasticError",
    "Equal",
    "ErrorFeedback",
    "Evicted",
    "FailureConfig",
    "FaultPolicy",
    "FedBuff",
    "FedFix",
    "Final",
    "Finished",
    "FlagAggregator",
    "Gathered",
    "GeometricMedian",
    "HeavyBall",
    "JoinToken",
    "Krum",
    "Late",
    "LinkOptions",
    "MembershipError",
    "Nesterov",
    "NoSource",
    "NormClip",
    "NotEnoughPeers",
    "OuterLoop",
    "ParityError",
    "Peer",
    "PeerView",
    "Quarantined",
    "Ramp",
    "Reduced",
    "Result",
    "RoundAborted",
    "RunConfig",
    "RunPolicy",
    "SGD",
    "ScalingConfig",
    "Scattered",
    "Seconds",
    "StateError",
    "Steps",
    "StreamingDiLoCo",
    "Throughput",
    "Timeouts",
    "Tokens",
    "Trainer",
    "TrainingFailed",
    "TransferInterrupted",
    "TransportError",
    "TrimmedMean",
    "VersionMismatch",
    "Work",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'elastic' has no attribute {name!r}")
    module = home if home.startswith("actors.") else f"{__name__}.{home}"  # Ray is loaded by who asks for it
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
