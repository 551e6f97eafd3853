"""Records in, verdicts out. Pure: time comes with the records, and nothing here opens a socket or reads a clock.

Each rule is in a file of its own: `slowness` (senders, receivers, links), `stragglers` (steps), `gradients`
(contributions), `hangs` (who stands still). It decides nothing: what follows from a verdict is for the membership to
say.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterator

from collectives.records import Underway

from .delays import Slow
from .gradients import Bad, Contribution, Gradients
from .hangs import Hangs
from .persisting import Patience
from .records import Crossing, Gave, Trainer
from .robust import DEVIATIONS
from .slowness import Slowness
from .stragglers import Straggler, Stragglers
from .verdicts import AMBIGUOUS, GRADIENT, LINK, NODE, RECEIVER, SENDER, STRAGGLER, Verdict, confidence

_MOST_ROUNDS = 256  # whose reports are waited for at once
_KINDS = {"sender": SENDER, "receiver": RECEIVER, "node": NODE, "link": LINK, "ambiguous": AMBIGUOUS}


class Detector:
    """settle_seconds: how long the reports of one round are waited for, from the first of them. hang_seconds: without
    a step, or a byte that is awaited.
    """

    def __init__(
        self, patience: Patience | None = None, *, settle_seconds: float = 2.0, hang_seconds: float = 30.0
    ) -> None:
        self._patience = patience or Patience()
        self._settle = settle_seconds
        self._slowness = Slowness(self._patience)
        self._stragglers = Stragglers(self._patience)
        self._hangs = Hangs(hang_seconds)
        self._gradients: dict[str, Gradients] = defaultdict(Gradients)
        self._steps: dict[str, list[float]] = defaultdict(list)
        self._steps_began: float | None = None
        self._rounds: dict[tuple[str, int], tuple[float, dict[str, Contribution]]] = {}

    # --- in -----------------------------------------------------------------------------------------------------------

    def crossed(self, receiver: str, crossing: Crossing, at: float) -> None:
        self._slowness.observe(crossing.peer, receiver, crossing.bytes, crossing.seconds, at)

    def stepped(self, peer: str, seconds: float, at: float) -> None:
        """The median of its inner steps lately."""
        if not 0 < seconds < math.inf:
            return
        self._steps[peer].append(seconds)
        self._steps_began = at if self._steps_began is None else self._steps_began

    def gave(self, peer: str, gave: Gave, at: float) -> None:
        _, given = self._rounds.setdefault((gave.tag, gave.version), (at, {}))
        if len(self._rounds) > _MOST_ROUNDS:
            del self._rounds[min(self._rounds)]
        norm = gave.norm if gave.norm >= 0 else float("nan")
        given[peer] = Contribution(norm=norm, cosine=gave.cosine, steps=max(0, gave.steps))

    def is_at(self, peer: str, trainer: Trainer, underway: tuple[Underway, ...], at: float) -> None:
        """What its training thread and its exchanges are at."""
        self._hangs.reported(peer, trainer, underway, at)

    def forget(self, peer: str) -> None:
        """It has gone; a later life is another."""
        self._hangs.forget(peer)
        self._slowness.forget(peer)
        self._stragglers.forget(peer)
        self._steps.pop(peer, None)
        for gradients in self._gradients.values():
            gradients.forget(peer)
        for _, given in self._rounds.values():
            given.pop(peer, None)

    # --- out ----------------------------------------------------------------------------------------------------------

    def look(self, at: float, silent: Collection[str] = ()) -> tuple[Verdict, ...]:
        """Time has come to this: all that is confirmed by now. silent: peers that are not heard of."""
        self._slowness.look(at)
        if self._steps_began is not None and at - self._steps_began >= self._patience.window_seconds:
            window = {peer: statistics.median(seconds) for peer, seconds in self._steps.items()}
            self._stragglers.window(window, self._steps_began)
            self._steps.clear()
            self._steps_began = None
        for key in sorted(key for key, (began, _) in self._rounds.items() if at - began >= self._settle):
            began, given = self._rounds.pop(key)
            self._gradients[key[0]].round(given, began)
        standing = self._hangs.look(at, silent)
        return tuple(sorted((*standing, *self._verdicts()), key=lambda verdict: verdict.key))

    @property
    def judging(self) -> bool:
        """Whether more is to be seen of links under the plans that they are used by now."""
        return self._slowness.judging

    def _verdicts(self) -> Iterator[Verdict]:
        for slow, since in self._slowness.slow.values():
            yield _of_slow(slow, since)
        for straggler, since in self._stragglers.slow.values():
            yield _of_straggler(straggler, since)
        for gradients in self._gradients.values():
            for bad, since in gradients.bad.values():
                yield _of_bad(bad, since)


def _of_slow(slow: Slow, since: float) -> Verdict:
    return Verdict(
        kind=_KINDS[slow.kind],
        culprits=slow.culprits,
        since=since,
        confidence=confidence(slow.deviations, DEVIATIONS),
        evidence={"factor": slow.factor, "deviations": slow.deviations},
    )


def _of_straggler(straggler: Straggler, since: float) -> Verdict:
    return Verdict(
        kind=STRAGGLER,
        culprits=(straggler.peer,),
        since=since,
        confidence=confidence(straggler.deviations, DEVIATIONS),
        evidence={"factor": straggler.factor, "step_seconds": straggler.seconds, "usual_seconds": straggler.usual},
    )


def _of_bad(bad: Bad, since: float) -> Verdict:
    sure = 1.0 if bad.why == "not finite" else 0.9
    names = {"not finite": "not_finite", "norm": "norm", "direction": "cosine"}
    value = 1.0 if bad.why == "not finite" else bad.value
    evidence = {names[bad.why]: value, "others": bad.others, "rounds": float(bad.rounds)}
    return Verdict(kind=GRADIENT, culprits=(bad.peer,), since=since, confidence=sure, evidence=evidence)
