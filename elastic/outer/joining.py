"""The inner optimizer of a peer that begins where it has not trained itself (rule 6 of docs/design.md).

The outer parameters that a joiner fetches have an optimizer's history behind them that it does not have. Adam without
moments makes steps of its full learning rate in the direction of single gradients' signs: the loss rises above that
of the peers that train on, and the joiner's first contributions carry that to all.

| joining | |
|---|---|
| "rewarm" (the default) | for n inner steps the learning rates are k/n of what they are set to, in the k-th |
| "donor" | the moments of a peer that trains, and full learning rates at once; if nobody gives them, re-warmed |
| "fresh" | as the script has made it |

Where the outer parameters are taken anew in mid run (a reset), the moments are this peer's own, if old: they are
re-warmed, too. With "donor", contributors take turns in keeping a copy for others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from collectives import FetchError

from ..errors import ConfigurationError
from ..messages import Base, Commit
from .moments import Unfit, install, pack
from .state import Layout

if TYPE_CHECKING:
    from ..peer import Peer

WAYS = ("rewarm", "donor", "fresh")
KEPT_PERIODS = 4
"""A copy is served for at least so many exchanges of the whole model: a joiner fetches it after the outer state."""


class Rewarm:
    """Scales the learning rates of an optimizer within its steps; outside of them they are as the script has set them.

    steps: how many, from 1/steps to 1 in equal parts.
    """

    def __init__(self, inner: torch.optim.Optimizer, steps: int) -> None:
        self.inner, self.steps = inner, steps
        self.done = steps
        self._scaled: list[tuple[dict[str, Any], Any, Any]] = []
        self._hooks: list[Any] = []

    def begin(self) -> None:
        """From the next step on."""
        self.done = 0

    def attach(self) -> None:
        self._hooks = [
            self.inner.register_step_pre_hook(lambda *_: self._before()),
            self.inner.register_step_post_hook(lambda *_: self._after()),
        ]

    def detach(self) -> None:
        self._restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self) -> None:
        self._restore()  # of a step that raised an error
        if self.done >= self.steps:
            return
        for group in self.inner.param_groups:
            if "lr" in group:
                own = group["lr"]
                group["lr"] = own * ((self.done + 1) / self.steps)
                self._scaled.append((group, own, group["lr"]))

    def _after(self) -> None:
        self._restore()
        self.done = min(self.steps, self.done + 1)

    def _restore(self) -> None:
        for group, own, scaled in self._scaled:
            if group["lr"] is scaled:  # else somebody has set another meanwhile
                group["lr"] = own
        self._scaled.clear()


class Joining:
    """how, steps: as `joining` and `rewarm_steps` of `OuterLoop`. Made by all ranks of a peer; its leader calls.

    restored: the inner optimizer's state is this peer's own, from a checkpoint. digest: of the moments that this peer
    serves; "": none.
    """

    def __init__(
        self, how: str, steps: int, inner: torch.optim.Optimizer, peer: Peer, tag: str, layout: Layout
    ) -> None:
        if how not in WAYS:
            raise ConfigurationError(f"joining is {how!r}: choose one of {', '.join(WAYS)}")
        if not (isinstance(steps, int) and steps >= 1):
            raise ConfigurationError(f"rewarm_steps is {steps!r}: it must be a whole number of at least 1")
        self.how, self.restored, self.digest = how, False, ""
        self._warming = Rewarm(inner, steps)
        self._inner, self._peer, self._tag, self._layout = inner, peer, tag, layout
        self._base: Base | None = None
        peer.ranks.teach(f"{tag}/rewarm", self._warming.begin)
        peer.ranks.teach(f"{tag}/moments", lambda: self._install(peer.ranks.pass_on(None)))

    @property
    def _key(self) -> str:
        return f"moments/{self._tag}"

    def attach(self) -> None:
        self._warming.attach()

    def detach(self) -> None:
        self._warming.detach()
        if self.digest:
            self._peer.group.withdraw(self._key)
            self.digest = ""

    # --- getting ------------------------------------------------------------------------------------------------------

    def told(self, base: Base) -> None:
        """The outer state was taken from there."""
        self._base = base

    def entered(self, version: int) -> None:
        """The model holds this version of the run: what begins it is as everybody's if nothing is committed yet."""
        if version == 0 or self.restored or (self.how == "donor" and self._take_moments()):
            return
        self.rewarm()

    def rewarm(self) -> None:
        if self.how != "fresh":
            self._peer.ranks.order(f"{self._tag}/rewarm")
            self._warming.begin()
            self._peer.events.emit("inner.rewarmed", steps=self._warming.steps)

    def _take_moments(self) -> bool:
        base = self._base
        donors = [each for each in base.donors if each.name != self._peer.name] if base else []
        if base is None or not donors:
            return self._without("nobody serves any")
        try:
            data = self._peer.group.fetch(self._key, donors, digest=base.moments, timeout=self._peer.timeouts.operation)
            self._install(data)
        except (FetchError, Unfit) as error:
            return self._without(str(error), donors[0].name)
        if self._peer.ranks.size > 1:
            self._peer.ranks.order(f"{self._tag}/moments")
            self._peer.ranks.pass_on(torch.frombuffer(data, dtype=torch.uint8))
        self._peer.events.emit("moments.fetched", donor=donors[0].name, bytes=len(data))
        return True

    def _install(self, data: memoryview | torch.Tensor) -> None:
        plain = data.numpy().data if isinstance(data, torch.Tensor) else data
        install(plain, self._inner, self._layout)

    def _without(self, reason: str, donor: str = "") -> bool:
        self._peer.events.emit("moments.refused", reason=reason, donor=donor)
        return False

    # --- giving -------------------------------------------------------------------------------------------------------

    def committed(self, commit: Commit) -> None:
        """A round was applied, between two inner steps: this peer keeps a copy for joiners if it is its turn.

        What is being fetched stays as it is.
        """
        if self.how == "donor" and self._is_turn(commit) and not self._peer.group.wanted(self._key):
            self._serve()

    def _is_turn(self, commit: Commit) -> bool:
        period, rest = divmod(commit.version, len(self._layout.parts))
        turn = period % max(len(commit.contributors), KEPT_PERIODS)
        return rest == 0 and commit.contributors[turn : turn + 1] == (self._peer.name,)

    def _serve(self) -> None:
        try:
            parts, self.digest = pack(self._inner, self._layout)
        except Unfit as error:
            self._peer.group.withdraw(self._key)
            self.digest = ""
            self._peer.events.emit("moments.withheld", reason=str(error))
            return
        self._peer.group.publish(self._key, parts, self.digest)
