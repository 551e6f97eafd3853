"""What can go wrong, for the caller.

    ElasticError
      ConfigurationError(ValueError)     an argument, option or environment variable is wrong; fix it
      MembershipError
        NotEnoughPeers                   fewer peers than the run needs, for longer than it was told to wait
        Evicted                          the run goes on without this life of the peer; start a new one
          Quarantined                    ... after `retry_after` seconds
        CoordinatorUnavailable           no answer from the coordinator; it may come back, then retry
        VersionMismatch                  the two sides speak different protocol versions
        AuthenticationFailed             the key or token was refused
      CollectiveError
        RoundAborted                     the round ended without this peer's contribution; inputs are untouched, retry
        ParityError                      peers disagree on what is computed, or on the result; not retryable
        TransportError                   a link failed in a way that a new round does not mend by itself
      StateError
        NoSource                         nobody alive holds the state that is needed
        TransferInterrupted              every source went away in mid transfer; retry
        CheckpointMismatch               the stored state does not belong to this model or run
      TrainingFailed                     a peer of a Trainer's run has failed for good; how is in its own words

`retryable` says whether the same call, made again, can succeed. All of them pickle, so that Ray can carry them within
a site; nothing received from another site is ever unpickled.
"""

from __future__ import annotations

from typing import Any


class ElasticError(Exception):
    """Base of everything this library raises on purpose.

    peer, round, epoch: where it happened, as far as known; -1 and "" mean not known.
    """

    retryable = False

    def __init__(self, message: str, *, peer: str = "", round: int = -1, epoch: int = -1) -> None:
        super().__init__(message)
        self.peer = peer
        self.round = round
        self.epoch = epoch

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.peer, self.round, self.epoch)


def _rebuild(kind: type[ElasticError], message: str, peer: str, round: int, epoch: int) -> ElasticError:
    return kind(message, peer=peer, round=round, epoch=epoch)


class ConfigurationError(ElasticError, ValueError):
    """An argument, option or environment variable is wrong. The message names it and says what to write."""


class MembershipError(ElasticError):
    """Something about who is in the run."""


class NotEnoughPeers(MembershipError):
    """Fewer peers than needed were there for longer than the timeout. Nothing was lost; retry when peers come."""

    retryable = True


class Evicted(MembershipError):
    """This life of the peer is no longer a member; another may have taken its name. Start a new Peer."""


class Quarantined(Evicted):
    """The detector found something wrong with this peer: its name is barred. Its shards have gone to others.

    retry_after: seconds after which a new Peer of this name may come, and is taken in after a self-test; infinite if
    it never is: then find the fault, and come under another name.
    """

    retryable = True

    def __init__(
        self, message: str, *, peer: str = "", round: int = -1, epoch: int = -1, retry_after: float = 0.0
    ) -> None:
        super().__init__(message, peer=peer, round=round, epoch=epoch)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_quarantined, (str(self), self.peer, self.round, self.epoch, self.retry_after)


def _rebuild_quarantined(message: str, peer: str, round: int, epoch: int, retry_after: float) -> Quarantined:
    return Quarantined(message, peer=peer, round=round, epoch=epoch, retry_after=retry_after)


class CoordinatorUnavailable(MembershipError):
    """The coordinator did not answer in time. Committed rounds are safe; retry once it is back.

    retry_after: seconds. Nothing is wrong with this peer: its supervisor tries again and again, and does not count it.
    """

    retryable = True
    retry_after = 1.0


class VersionMismatch(MembershipError):
    """The two sides speak different protocol versions; both are named."""


class AuthenticationFailed(MembershipError):
    """The key or token was refused."""


class CollectiveError(ElasticError):
    """An exchange between peers did not produce a result here. The input is untouched."""


class RoundAborted(CollectiveError):
    """The round ended without a result for this peer, or without its contribution. Retry: the input is untouched."""

    retryable = True


class ParityError(CollectiveError):
    """Peers disagree about what to compute (both sides are named), or about the bytes of the outcome."""


class TransportError(CollectiveError):
    """A link failed and could not be replaced. The link and the evidence are named."""

    retryable = True


class StateError(ElasticError):
    """Something about the model's shared state."""


class NoSource(StateError):
    """Nobody alive holds the state that is needed."""


class TransferInterrupted(StateError):
    """Every source went away before the state was complete. Nothing was changed; retry."""

    retryable = True


class CheckpointMismatch(StateError):
    """Stored state does not belong to this model, algorithm or run; the difference is named."""


class TrainingFailed(ElasticError):
    """A peer has failed in a way that another life of it does not mend. The first line names it and says why.

    traceback: of its own process, where its training function raised; else the last lines that it printed. It follows
    the first line. The exception itself is the cause (`__cause__`) where its class is known here.
    """

    def __init__(self, message: str, *, peer: str = "", round: int = -1, epoch: int = -1, traceback: str = "") -> None:
        super().__init__(f"{message}\n{traceback}" if traceback else message, peer=peer, round=round, epoch=epoch)
        self.traceback = traceback
        self._message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_failed, (self._message, self.peer, self.round, self.epoch, self.traceback)


def _rebuild_failed(message: str, peer: str, round: int, epoch: int, traceback: str) -> TrainingFailed:
    return TrainingFailed(message, peer=peer, round=round, epoch=epoch, traceback=traceback)
