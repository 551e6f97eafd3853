"""Outer loops as the coordinator knows them: which state each one stands at, who holds it, and who is right about it.

A peer enters a loop and is told what to begin from: the state of whoever holds it, its own as version 0, or a
checkpoint. What it then says it holds is compared with what the others claim (rules 2, 5 and 9 of docs/design.md).

Pure, like all parts of the membership: it touches the loops and what members are known to hold, speaks through the
Roster, and asks of the rounds under way only what `OpenRounds` says.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Protocol

from . import rounds
from .config import Timeouts
from .errors import CheckpointMismatch
from .journal import Committed, Halted, LoopFounded, Opened, Restored
from .messages import (
    Applied,
    Base,
    Commit,
    Enter,
    Message,
    OperationSpec,
    Propose,
    Recompute,
    Recomputed,
    Refused,
    Represent,
)
from .parity import Claims
from .roster import MemberState, Roster
from .rounds import KEPT_COMMITS
from .runstate import LINEAGE, LoopState, RunState, above


@dataclass(frozen=True, slots=True)
class Offer:
    """What a peer that enters has from a checkpoint."""

    name: str
    incarnation: int
    version: int
    state_hash: str
    state: RunState


@dataclass
class Loop:
    """An outer loop: its contract and how far each fragment is (durable), and what is open about its state.

    digests: of the results that led to the latest versions. claims: of what the newest ones are.
    founders: lives that were told to begin with what they have. halted: why the loop cannot go on (durable).
    void: of each fragment, the last version that stayed undecided, and the digest that led to it (durable).
    parameters: a line for each tensor of its state, if known (durable).
    """

    spec: OperationSpec
    versions: dict[int, int] = field(default_factory=dict)
    hashes: dict[tuple[int, int], str] = field(default_factory=dict)
    digests: dict[tuple[int, int], str] = field(default_factory=dict)
    rounds: int = 0
    founders: set[int] = field(default_factory=set)
    claims: dict[int, Claims] = field(default_factory=dict)
    halted: str = ""
    void: dict[int, tuple[int, str]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()


class OpenRounds(Protocol):
    """The rounds under way, as far as the state of a loop decides about them."""

    def disqualify(self, name: str, tag: str, fragment: int, now: float) -> None:
        """What this peer has proposed must not count, not even in a running attempt."""

    def reconsider(self, tag: str, now: float) -> None:
        """A dispute is over that the next round may have waited for."""

    def discard(self, tag: str) -> None:
        """The round comes to nothing: the loop is halted."""

    def result_for(self, tag: str, fragment: int, version: int) -> Commit | None:
        """The commit that led to this version, as of now, if it is among the last ones."""


class RunFacts(Protocol):
    """How far the whole run is. serial counts its durable decisions."""

    @property
    def tokens(self) -> float: ...

    @property
    def serial(self) -> int: ...

    def state(self) -> RunState:
        """The small run state, as of now: it goes with every base."""


class OuterLoops:
    """All outer loops of a run, by tag.

    offers: checkpoints of members that have asked to enter. entering: who waits until a holder has said so. vacant:
    since when nobody holds the state. rounds is set by whoever makes both: each of the two asks the other.
    """

    rounds: OpenRounds

    def __init__(self, roster: Roster, timeouts: Timeouts, run: RunFacts) -> None:
        self._roster, self._timeouts, self._run = roster, timeouts, run
        self.loops: dict[str, Loop] = {}
        self._offers: dict[str, dict[str, Offer]] = {}
        self._entering: dict[str, set[str]] = {}
        self._vacant: dict[str, float] = {}

    # --- entering, founding, going on from a checkpoint -------------------------------------------------------------

    def enter(self, name: str, message: Enter, now: float) -> None:
        """The peer wants to take part: it is told what to begin from, or why it cannot."""
        loop = self.loops.get(message.tag)
        if loop is not None and self._mismatch(name, message, loop.spec, message.spec):
            return
        if loop is not None and message.fragment not in loop.versions:
            reason = f"{message.tag} has no fragment {message.fragment}; it has {sorted(loop.versions)}"
            self._roster.refuse(name, message, "ParityError", reason, tag=message.tag)
            return
        if loop is not None and loop.halted:
            self._enter_halted(name, message, loop, now)
            return
        self._roster.members[name].entered.add(message.tag)
        self._roster.members[name].exited.discard(message.tag)
        self._roster.members[name].trains.discard(message.tag)  # who asks has nothing to train from
        self._roster.members[name].held.pop((message.tag, message.fragment), None)
        self._roster.members[name].moments.pop(message.tag, None)
        if loop is not None:
            loop.founders.discard(message.incarnation)
        if not self._take_offer(name, message):
            return
        if loop is None or not self._begun(message.tag):
            self._enter_new(name, message, now)
        elif self.holders(message.tag, message.fragment):
            self.send_base(name, message.tag, message.fragment)
        elif self._nobody_will_hold(name, message.tag, loop):
            self._enter_unheld(name, message, now)
        else:  # whoever holds it is about to say so
            self._entering.setdefault(message.tag, set()).add(name)

    def _enter_halted(self, name: str, message: Enter, loop: Loop, now: float) -> None:
        """The newest version is void: once nobody is in the loop any more, an earlier checkpoint may take its place."""
        tag, members = message.tag, self._roster.members
        members[name].entered.discard(tag)  # who asks has left it before
        if any(tag in state.entered for state in members.values()):
            self._roster.refuse(name, message, "ParityError", loop.halted, tag=tag)
        elif not self._roster.returning and self._take_offer(name, message):  # who is still to come back may be in it
            self._enter_unheld(name, message, now)

    def _begun(self, tag: str) -> bool:
        """Whether a round of the loop has changed anything."""
        return any(self.loops[tag].versions.values())

    def _enter_new(self, name: str, message: Enter, now: float) -> None:
        """Nothing is committed yet: a checkpoint is gone on from, if one is offered; else the first peer founds."""
        if self._offers.get(message.tag):
            self._wait_for_offers(name, message, now)
        elif message.tag in self.loops and self.holders(message.tag, message.fragment):
            self.send_base(name, message.tag, message.fragment)
        elif message.tag not in self.loops or self._nobody_will_hold(name, message.tag, self.loops[message.tag]):
            self._found(name, message)  # no founder, or it went away before anybody had its state: nothing is lost

    def _nobody_will_hold(self, asker: str, tag: str, loop: Loop) -> bool:
        """Whether no member holds the state or is about to. After a restart, any that has not yet said so may.

        The asker itself would not ask if it could have it, whatever it was before.
        """
        others = [state for name, state in self._roster.members.items() if name != asker]
        busy = any(state.member.incarnation in loop.founders or tag in state.trains for state in others)
        return not busy and not self._roster.returning

    def _enter_unheld(self, name: str, message: Enter, now: float) -> None:
        """The committed state died with its last holder: a checkpoint takes its place, or there is nothing left."""
        if self._wait_for_offers(name, message, now):
            return
        loop = self.loops[message.tag]
        unheld = f"no living peer holds version {loop.versions[message.fragment]} of {message.tag}"
        reason = f"{loop.halted or unheld}, and no checkpoint was offered"
        self._roster.refuse(name, message, "NoSource", reason, tag=message.tag)

    def _take_offer(self, name: str, message: Enter) -> bool:
        """Remembers what the peer has from a checkpoint; False if that is refused."""
        offers = self._offers.setdefault(message.tag, {})
        offers.pop(name, None)
        if message.offered < 0:
            return True
        try:
            state = RunState.from_bytes(message.state)
            loop = state.loop(message.tag)
            if state.run != self._roster.run or loop is None or loop.versions.get(message.fragment) != message.offered:
                raise CheckpointMismatch(f"its run state is not that of version {message.offered} of {message.tag}")
            if self._is_halted_at(loop):
                if self.holders(message.tag, message.fragment):
                    return True  # it is given what they hold
                raise CheckpointMismatch(f"version {message.offered} is void; remove it to offer an earlier one")
        except CheckpointMismatch as error:
            reason = f"the checkpoint that peer {name} offers cannot be used: {error}"
            self._roster.refuse(name, message, "CheckpointMismatch", reason, tag=message.tag)
            return False
        if not self._mismatch(name, message, loop.spec, message.spec):
            offers[name] = Offer(name, message.incarnation, message.offered, message.offered_hash, state)
        return name in offers

    def _wait_for_offers(self, name: str, message: Enter, now: float) -> bool:
        """Goes on from the newest checkpoint that is offered; False if there is none after waiting for the others'."""
        tag = message.tag
        since = self._vacant.setdefault(tag, now)
        best = self._best_offer(tag, message.fragment)
        if not (best and self._is_newest(best, tag, message.fragment)) and now - since < self._timeouts.grace:
            return True
        del self._vacant[tag]
        if best is None:
            return False
        self._restore(best, tag, message.fragment)
        return True

    def _best_offer(self, tag: str, fragment: int) -> Offer | None:
        """Of the latest decision; if its checkpoints differ, as the run held it, or as most of them say."""
        offers = self._offers[tag].values()
        votes = Counter((offer.state.generation, offer.state.serial, offer.state_hash) for offer in offers)
        agreed = self.loops[tag].hashes if tag in self.loops else {}

        def rank(offer: Offer) -> tuple[int, int, bool, int, str]:
            order = (offer.state.generation, offer.state.serial)
            held = self._is_newest(offer, tag, fragment) and agreed.get((fragment, offer.version)) == offer.state_hash
            return (*order, held, votes[(*order, offer.state_hash)], offer.name)

        return max(offers, key=rank, default=None)

    def _is_newest(self, offer: Offer, tag: str, fragment: int) -> bool:
        """Whether it is of the run's last decision: nothing that is committed is missing, and nothing else is in it."""
        loop = self.loops.get(tag)
        theirs = offer.state.generation // LINEAGE, offer.state.serial, offer.version, offer.state.tokens
        version = loop.versions[fragment] if loop else -1
        return theirs == (self._roster.generation // LINEAGE, self._run.serial, version, self._run.tokens)

    def _restore(self, offer: Offer, tag: str, fragment: int) -> None:
        """The run goes on from this checkpoint. Of what was committed later nothing is left: that is said."""
        if not self._is_newest(offer, tag, fragment):
            self._roll_back(offer, tag, fragment)
        loop = self.loops[tag]
        loop.hashes[fragment, offer.version] = offer.state_hash
        loop.claims.pop(fragment, None)
        for state in self._roster.members.values():
            state.held.pop((tag, fragment), None)
            state.wrong.pop((tag, fragment), None)  # it may be right from here on
            state.trains.discard(tag)
        for name, each in self._offers.pop(tag).items():
            if (each.version, each.state_hash) == (offer.version, offer.state_hash):
                loop.founders.add(each.incarnation)
                self.send_base(name, tag, fragment)

    def _roll_back(self, offer: Offer, tag: str, fragment: int) -> None:
        loop = self.loops.get(tag)
        before, tokens = loop.versions.get(fragment, 0) if loop else 0, self._run.tokens
        theirs = (offer.state.generation, offer.state.serial)
        ours = (self._roster.generation, self._run.serial)
        foreign = theirs > ours  # of a journal that this coordinator does not have
        generation = above(offer.state.generation) if foreign else self._roster.generation
        halted = loop is not None and loop.halted
        void = f"; version {before} of {tag} is void" if halted else ""
        reason = f"checkpoint of version {offer.version} offered by {offer.name}{void}"
        self._roster.record(Restored(state=offer.state, generation=generation, reason=reason))
        self._roster.emit(
            "run.rolled_back" if before > offer.version else "run.resumed",
            tag=tag,
            version=offer.version,
            peer=offer.name,
            versions_lost=max(0, before - offer.version),
            tokens_lost=max(0, int(tokens - offer.state.tokens)),
        )
        if halted:
            self._roster.emit("parity.voided", tag=tag, version=before, peer=offer.name)
        if foreign:
            self._roster.record(Opened(generation=self._roster.generation + 1))
            self._roster.broadcast(self._roster.stamp(Represent))

    def _found(self, name: str, message: Enter) -> None:
        if not message.state_hash:  # it has not looked at its own yet, since most who come find one to fetch
            nothing: Base = self._roster.stamp(
                Base, tag=message.tag, fragment=message.fragment, version=0, state_hash="", sources=()
            )
            self._roster.send(name, nothing)
            return
        record = LoopFounded(
            tag=message.tag,
            spec=message.spec,
            fragment=message.fragment,
            state_hash=message.state_hash,
            parameters=message.parameters,
        )
        self._roster.record(record)
        self.loops[message.tag].founders.add(message.incarnation)
        self._roster.emit("loop.founded", peer=name, tag=message.tag, state_hash=message.state_hash)
        self._roster.send(name, self._base(message.tag, message.fragment, found=True))

    def send_base(self, name: str, tag: str, fragment: int) -> None:
        """The peer is to begin from what the run holds."""
        self._roster.send(name, self._base(tag, fragment))

    def _base(self, tag: str, fragment: int, *, found: bool = False) -> Message:
        loop = self.loops[tag]
        version = loop.versions[fragment]
        sources = () if found else rounds.members_of(self.holders(tag, fragment), self._roster.identities())
        state_hash = loop.hashes.get((fragment, version), "")
        donor, moments = self._donor(tag)
        base: Base = self._roster.stamp(
            Base,
            tag=tag,
            fragment=fragment,
            version=version,
            state_hash=state_hash,
            sources=sources,
            state=self._run.state().to_bytes(),
            digest=loop.digests.get((fragment, version), ""),
            donors=rounds.members_of(donor, self._roster.identities()),
            moments=moments,
        )
        return base

    def _donor(self, tag: str) -> tuple[list[str], str]:
        """Who serves the newest moments of an inner optimizer, and their hash."""
        served = [
            (*state.moments[tag], name)
            for name, state in self._roster.members.items()
            if tag in state.moments and not state.silent
        ]
        _, moments, donor = max(served, default=(0, "", ""))
        return [donor] if donor else [], moments

    # --- who holds what ---------------------------------------------------------------------------------------------

    def holders(self, tag: str, fragment: int) -> list[str]:
        """Living members that hold the current version of the fragment."""
        version = self.loops[tag].versions.get(fragment)
        return [
            name
            for name, state in self._roster.members.items()
            if not state.silent and state.held.get((tag, fragment), (-1, ""))[0] == version
        ]

    def applied(self, name: str, message: Applied, now: float) -> bool:
        """The peer says what it holds. Returns whether that is the newest version."""
        loop = self.loops.get(message.tag)
        newest = loop.versions.get(message.fragment, -1) if loop else -1
        if loop is None or message.version < 0 or newest < 0:
            return False
        if loop.halted:
            self._roster.members[name].entered.add(message.tag)  # it is in the loop, until it says that it has left
            self._roster.refuse(name, message, "ParityError", loop.halted, tag=message.tag)
            return False
        if self._is_void(loop, message, newest):
            self._lead_back(name, message.tag, message.fragment, now)
            return False
        state = self._roster.members[name]
        if self._known_wrong(name, message, message.state_hash):
            return False
        if not self._agrees(name, message, loop, newest, now):
            return False
        state.wrong.pop((message.tag, message.fragment), None)
        state.held[message.tag, message.fragment] = (message.version, message.state_hash)
        state.entered.add(message.tag)
        self._note_moments(state, message)
        (state.trains.discard if message.receiving else state.trains.add)(message.tag)
        self._vacant.pop(message.tag, None)
        if message.version < newest:
            self.catch_up(name, message.tag, message.fragment, message.version)
            return False
        self._judge(message.tag, message.fragment, now)
        for waiting in self._entering.pop(message.tag, set()) - {name}:
            self.send_base(waiting, message.tag, message.fragment)
        return True

    def _note_moments(self, state: MemberState, message: Applied) -> None:
        if not message.moments:
            state.moments.pop(message.tag, None)
        elif message.moments != state.moments.get(message.tag, (0, ""))[1]:
            state.moments[message.tag] = (message.version, message.moments)

    def _is_void(self, loop: Loop, message: Applied, newest: int) -> bool:
        """Whether what the peer holds belongs to rounds that the run has left behind, or never knew."""
        led_to = loop.digests.get((message.fragment, message.version), "")
        return message.version > newest or ("" not in (message.digest, led_to) and message.digest != led_to)

    def _lead_back(self, name: str, tag: str, fragment: int, now: float) -> None:
        """The peer is to take the state that the run holds; if nobody holds it, to say what it has instead."""
        state = self._roster.members[name]
        state.held.pop((tag, fragment), None)
        state.trains.discard(tag)
        self.rounds.disqualify(name, tag, fragment, now)
        self._roster.emit("peer.led_back", peer=name, tag=tag, version=self.loops[tag].versions[fragment])
        self.send_base(name, tag, fragment)

    def catch_up(self, name: str, tag: str, fragment: int, version: int) -> None:
        """Rule 5: sends the next commit that the peer missed, or, if nobody gives its result, the state itself."""
        commit = self.rounds.result_for(tag, fragment, version + 1)
        held = self.holders(tag, fragment)
        if commit and (commit.sources or not held):  # without sources, the peer itself may still have the result
            self._roster.send(name, commit)
        elif held or not self._roster.returning:  # nobody has it: the peer is to say what it has itself
            self.send_base(name, tag, fragment)

    def exit(self, name: str, tag: str) -> None:
        """The peer's script has left the loop; the peer stays a member."""
        self._roster.members[name].trains.discard(tag)
        self._roster.members[name].entered.discard(tag)
        self._roster.members[name].moments.pop(tag, None)
        self._roster.members[name].exited.add(tag)

    def behind(self) -> int:
        """How many members of a loop do not hold its newest version; later lives are on their way into it."""
        return sum(
            state.held.get((tag, fragment), (-1, ""))[0] < version
            for tag, loop in self.loops.items()
            for fragment, version in loop.versions.items()
            for state in self._roster.members.values()
            if tag in state.entered or (state.life > 1 and tag not in state.exited)
        )

    # --- parity -----------------------------------------------------------------------------------------------------

    def postpone(self, seconds: float) -> None:
        """The coordinator itself stood still for so long: nobody's time ran."""
        for tag in self._vacant:
            self._vacant[tag] += seconds

    def judge_all(self, now: float) -> None:
        """Time has passed, or somebody has gone: a dispute can be over."""
        for tag, loop in self.loops.items():
            for fragment in loop.claims:
                self._judge(tag, fragment, now)

    def forget(self, name: str) -> None:
        """The member has departed: neither its offers nor its claims count any more."""
        for offers in self._offers.values():
            offers.pop(name, None)
        for loop in self.loops.values():
            for claims in loop.claims.values():
                claims.forget(name)

    def _agrees(self, name: str, message: Applied, loop: Loop, newest: int, now: float) -> bool:
        """Takes note of what the peer holds; False if that is not what the run holds, and is decided."""
        key = (message.fragment, message.version)
        claims = loop.claims.get(message.fragment)
        if claims is None or claims.version != newest:
            claims = loop.claims[message.fragment] = Claims(newest)
        agreed = loop.hashes.setdefault(key, message.state_hash)
        loop.hashes.pop((message.fragment, message.version - KEPT_COMMITS), None)
        if message.computed and message.version == newest:
            claims.claim(name, message.state_hash, now)
        elif agreed != message.state_hash and not (claims.disputed and message.version == newest):
            self._repair(name, message.tag, message.fragment, message.version, message.state_hash, now)
            return False
        return True

    def _known_wrong(self, name: str, message: Applied | Propose, held: str) -> bool:
        """Whether these bits are what the peer was told to drop: that is decided, and it is told again."""
        known = self._roster.members[name].wrong.get((message.tag, message.fragment), "") == held != ""
        if known:
            self.send_base(name, message.tag, message.fragment)
        return known

    def _judge(self, tag: str, fragment: int, now: float) -> None:
        """Finds out which of several claims about the newest version is right, and repairs whoever holds another.

        Whoever has computed it decides over those who have fetched it from somebody.
        """
        loop = self.loops[tag]
        claims = loop.claims[fragment]
        key = (fragment, claims.version)
        if loop.halted or not (claims.disputed or claims.unanimous not in ("", loop.hashes.get(key))):
            return
        members = self._roster.members
        voters = claims.claimed.keys() | {name for name in self._roster.awake() if tag in members[name].trains}
        right = claims.unanimous or claims.majority(voters) or self._proven(tag, fragment, voters, now)
        if not right:
            return
        loop.hashes[key] = right
        claims.settle(right)
        for name, state in list(self._roster.members.items()):
            version, held = state.held.get((tag, fragment), (-1, ""))
            if version == claims.version and held != right:
                self._repair(name, tag, fragment, version, held, now)
        self.rounds.reconsider(tag, now)

    def _proven(self, tag: str, fragment: int, voters: set[str], now: float) -> str:
        """Rule 9: without a majority, each side works it out again."""
        claims = self.loops[tag].claims[fragment]
        assert claims.since is not None, "a dispute has begun"
        if claims.asked is None and (claims.all_heard(voters) or now - claims.since > self._timeouts.chunk):
            claims.asked = now
            question = self._roster.stamp(Recompute, tag=tag, fragment=fragment, version=claims.version)
            for name in claims.claimed:
                self._roster.send(name, question)
        if claims.asked is None:
            return ""
        waited = now - claims.asked
        awake = {name for name in claims.claimed if not self._roster.members[name].silent}
        if not claims.recomputed(awake) and waited <= self._timeouts.operation:
            return ""
        right = claims.proven()
        if not right:
            self._halt(tag, fragment, claims)
        return right

    def recomputed(self, name: str, message: Recomputed, now: float) -> None:
        """The answer to Recompute: what the peer gets when it computes a disputed version again."""
        loop = self.loops.get(message.tag)
        claims = loop.claims.get(message.fragment) if loop else None
        if claims and claims.version == message.version and claims.asked is not None and name in claims.claimed:
            claims.reproduced[name] = message.state_hash
            self._judge(message.tag, message.fragment, now)

    def _repair(self, name: str, tag: str, fragment: int, version: int, held: str, now: float) -> None:
        """The peer holds other bits than the run: it fetches the state anew, and reads its samples again."""
        state, loop = self._roster.members[name], self.loops[tag]
        if state.wrong.get((tag, fragment)) != held:
            state.wrong[tag, fragment] = held
            state.repaired += 1
            agreed = loop.hashes.get((fragment, version), "")
            self._roster.emit("parity.mismatch", peer=name, tag=tag, version=version, held=held, agreed=agreed)
        state.held.pop((tag, fragment), None)
        state.trains.discard(tag)
        self.rounds.disqualify(name, tag, fragment, now)
        self.send_base(name, tag, fragment)

    def _halt(self, tag: str, fragment: int, claims: Claims) -> None:
        """Nobody can say what the state is: better to stop than to train on."""
        held = ", ".join(f"{name} holds {state_hash}" for name, state_hash in sorted(claims.claimed.items()))
        undecided = f"{tag}: no majority and no proof for version {claims.version}: {held}"
        reason = f"{undecided}; when all have left the loop, enter with a checkpoint of an earlier version"
        self._roster.record(Halted(tag=tag, fragment=fragment, version=claims.version, reason=reason))
        self._roster.emit("parity.undecided", tag=tag, version=claims.version, held=dict(claims.claimed))
        self.rounds.discard(tag)
        self._offers.pop(tag, None)  # they may be of that version
        self._vacant.pop(tag, None)
        self._entering.pop(tag, None)
        refused = self._roster.stamp(Refused, error="ParityError", reason=reason, tag=tag)
        for name, state in self._roster.members.items():
            if tag in state.entered:
                self._roster.send(name, refused)

    def disputed(self, tag: str, fragment: int) -> bool:
        """Whether claims about the newest version differ: the next round waits for the decision."""
        loop = self.loops.get(tag)
        claims = loop.claims.get(fragment) if loop else None
        return claims is not None and claims.disputed

    # --- proposals --------------------------------------------------------------------------------------------------

    def is_current(self, name: str, message: Propose) -> bool:
        """Whether it is of this loop and its newest version; if not, the peer is told how to get there."""
        loop = self.loops.get(message.tag)
        if loop is None or message.fragment not in loop.versions:
            self._roster.send(name, self._roster.stamp(Represent))
            return False
        if message.base_version != loop.versions[message.fragment]:
            self.catch_up(name, message.tag, message.fragment, message.base_version)
            return False
        if loop.halted:
            self._roster.refuse(name, message, "ParityError", loop.halted, tag=message.tag, sequence=message.sequence)
            return False
        return not self._mismatch(name, message, loop.spec, message.spec)

    def same_base(self, name: str, message: Propose, now: float) -> bool:
        """Whether it was measured from what the run holds; if that is disputed, the round waits for the decision."""
        loop = self.loops[message.tag]
        agreed = loop.hashes.get((message.fragment, message.base_version), "")
        said = self._roster.members[name].held.get((message.tag, message.fragment))
        if self._known_wrong(name, message, message.base_hash):
            return False
        if message.base_hash and said != (message.base_version, message.base_hash):
            # it has not said what it holds, or is being led back
            self._roster.send(name, self._roster.stamp(Represent))
            return False
        if agreed and message.base_hash not in ("", agreed) and not self.disputed(message.tag, message.fragment):
            self._repair(name, message.tag, message.fragment, message.base_version, message.base_hash, now)
            return False
        return True

    def _mismatch(self, name: str, message: Propose | Enter, ours: OperationSpec, theirs: OperationSpec) -> bool:
        """Rule 10: names the first difference between what the run does and what the peer wants."""
        reason = rounds.difference(message.tag, name, ours, theirs)
        if reason and replace(theirs, elements=ours.elements, fingerprint=ours.fingerprint) == ours:
            reason = self._other_model(name, message) or reason
        if reason:
            sequence = message.sequence if isinstance(message, Propose) else -1
            self._roster.refuse(name, message, "ParityError", reason, tag=message.tag, sequence=sequence)
        return bool(reason)

    def _other_model(self, name: str, message: Propose | Enter) -> str:
        """The first tensor that this peer's model has otherwise than the run's, with both; "" if there is none."""
        loop = self.loops.get(message.tag)
        if not (isinstance(message, Enter) and loop and loop.parameters and message.parameters):
            return ""
        for ours, theirs in zip_longest(loop.parameters, message.parameters, fillvalue="nothing"):
            if ours != theirs:
                return f"{message.tag}: the models differ: {ours} in the run, {theirs} on peer {name}"
        return ""

    # --- durable state ----------------------------------------------------------------------------------------------

    def apply_founded(self, record: LoopFounded) -> None:
        before = self.loops.get(record.tag, Loop(record.spec))
        loop = self.loops[record.tag] = Loop(record.spec, rounds=before.rounds, void=before.void)
        loop.parameters = record.parameters
        loop.versions[record.fragment] = 0
        loop.hashes[record.fragment, 0] = record.state_hash

    def apply_committed(self, record: Committed) -> None:
        loop = self.loops[record.tag]
        loop.versions[record.fragment] = record.version
        loop.rounds = record.round + 1
        if not record.skipped:
            loop.founders.clear()
            loop.digests[record.fragment, record.version] = record.digest
            loop.digests.pop((record.fragment, record.version - KEPT_COMMITS), None)

    def apply_halted(self, record: Halted) -> None:
        loop, at = self.loops[record.tag], (record.fragment, record.version)
        loop.halted = record.reason
        loop.void[record.fragment] = (record.version, loop.digests.get(at, ""))

    def _is_halted_at(self, state: LoopState) -> bool:
        """Whether a fragment of it is the version of which nobody could say what it is."""
        void = self.loops[state.tag].void if state.tag in self.loops else {}
        return any(void.get(f) == (version, state.digests.get(f, "")) for f, version in state.versions.items())

    def apply_restored(self, states: tuple[LoopState, ...]) -> None:
        for each in states:
            before = self.loops.get(each.tag, Loop(each.spec))
            loop = self.loops[each.tag] = Loop(each.spec, rounds=max(each.rounds, before.rounds), void=before.void)
            loop.parameters = before.parameters
            loop.halted = before.halted if self._is_halted_at(each) else ""
            loop.versions.update(each.versions)
            loop.hashes.update({(f, each.versions[f]): held for f, held in each.hashes.items() if held})
            loop.digests.update({(f, each.versions[f]): led_to for f, led_to in each.digests.items()})

    def states(self) -> tuple[LoopState, ...]:
        return tuple(
            LoopState(
                tag=tag,
                spec=loop.spec,
                rounds=loop.rounds,
                versions=dict(loop.versions),
                hashes={fragment: loop.hashes.get((fragment, v), "") for fragment, v in loop.versions.items()},
                digests={fragment: loop.digests.get((fragment, v), "") for fragment, v in loop.versions.items()},
            )
            for tag, loop in self.loops.items()
        )
