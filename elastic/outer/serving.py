"""What a peer keeps of an outer loop for others: versions for joiners, results for whoever was left out; and how it
gets the same from them.

A version is served fragment by fragment, under the fragment's own number, so that a round adds one fragment to what is
kept and not a whole model. Of several fragments, the hashes come first: one small blob whose own hash is the state's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from collectives import FetchError, Group, Partial

from ..config import Timeouts
from ..messages import Base, Commit
from .state import HEX, State, Version, part_number

if TYPE_CHECKING:
    from collectives.records import Member

    from ..peer import Peer

PULL_AGAIN_SECONDS = 0.02
MOST_SERVED = 8  # versions, and results, that are kept for those who are fetching older ones
SMALL = 16 << 20  # bytes of old versions, and of results, that are kept in any case: rounds of so little are quick
MOST_SMALL = 128  # and how many


class Shelf:
    """group: of the peer. versions: by number, the keys of what each needs. results: by version, their keys."""

    def __init__(self, group: Group, tag: str) -> None:
        self._group, self._tag = group, tag
        self.versions: dict[int, tuple[str, ...]] = {}
        self.results: dict[int, str] = {}
        self._served: dict[str, str] = {}
        self._size = 0
        self._lock = threading.Lock()
        self._partials: dict[str, Partial] = {}
        self._brought: dict[str, Version] = {}

    # --- giving -------------------------------------------------------------------------------------------------------

    def put(self, state: State) -> None:
        """Serves this version from now on, and no longer those that nobody needs any more."""
        for number in [number for number in self.versions if number > state.number]:
            self._withdraw(number)  # of a line that the run went back from
        for number in [number for number in self.results if number > state.number]:
            self._take_back(self.results.pop(number))
        parts = [(self._part_key(f, part.number), part) for f, part in enumerate(state.parts)]
        keys = [key for key, _ in parts]
        if len(parts) > 1:
            listing = bytearray("".join(part.state_hash for part in state.parts).encode())
            keys.append(self._key("hashes", state.number))
            self._serve(keys[-1], [memoryview(listing)], state.state_hash)
        for key, part in parts:
            self._serve(key, [part.host.parameters, part.host.momentum], part.state_hash)
        self.versions[state.number] = tuple(keys)
        self._size = max(4 * (len(part.parameters) + len(part.momentum)) for part in state.parts)
        self._drop_versions(state.number - 1)

    def _serve(self, key: str, parts: Sequence[memoryview | torch.Tensor], digest: str) -> None:
        if self._served.get(key) != digest:  # what is being fetched stays as it is
            self._group.publish(key, parts, digest)
            self._served[key] = digest

    def offer_result(self, commit: Commit, mean: torch.Tensor) -> None:
        """Serves a committed result at once, also from another thread: whoever was left out may be waiting for it."""
        if commit.version >= 0 and not commit.skipped:
            with self._lock:
                self._serve(self._key("result", commit.version), [mean], commit.digest)

    def keep_result(self, commit: Commit, mean: torch.Tensor, keep: int) -> None:
        """Serves the result that led to a version to whoever was left out, until `keep` newer ones are there."""
        self.offer_result(commit, mean)
        self.results[commit.version] = self._key("result", commit.version)
        self._drop_results(commit.version, keep, 4 * len(mean))

    def make_room(self, version: int, keep: int, elements: int) -> None:
        """The round that leads to this version is applied next: what nobody needs then goes before, not after."""
        self._drop_versions(version - 1)
        self._drop_results(version, keep, 4 * elements)

    def _drop_versions(self, needed: int) -> None:
        for number in self._needless(self.versions, needed, self._size):
            self._withdraw(number)

    def _drop_results(self, version: int, keep: int, size: int) -> None:
        fetched = min(self.versions, default=version)  # who is fetching that one needs the results behind it
        served: dict[int, tuple[str, ...]] = {number: (key,) for number, key in self.results.items()}
        for number in self._needless(served, min(version - keep + 1, fetched + 1), size):
            self._take_back(self.results.pop(number))

    def _key(self, kind: str, version: int) -> str:
        return f"{kind}/{self._tag}/0/{version}"

    def _part_key(self, fragment: int, number: int) -> str:
        return f"state/{self._tag}/{fragment}/{number}"

    def _needless(self, served: dict[int, tuple[str, ...]], needed: int, size: int) -> list[int]:
        """What is older than `needed`, but not what somebody is fetching, nor what leads on from there.

        size: bytes of each. Where it is small, rounds can be so quick that many pass in one step of a slow peer.
        """
        newest, found = max(served, default=0), []
        needed = min(needed, newest + 1 - min(SMALL // max(size, 1), MOST_SMALL))
        for number in sorted(served):
            wanted = any(self._group.wanted(key) for key in served[number])
            if number >= needed or (wanted and number > newest - MOST_SERVED):
                break
            found.append(number)
        return found

    def _withdraw(self, number: int) -> None:
        keys = self.versions.pop(number)
        others = {key for kept in self.versions.values() for key in kept}
        for key in keys:
            if key not in others:
                self._take_back(key)

    def _take_back(self, key: str) -> None:
        self._group.withdraw(key)
        self._served.pop(key, None)

    # --- getting ------------------------------------------------------------------------------------------------------

    def pull(self, commit: Commit, sources: Sequence[Member], timeouts: Timeouts) -> torch.Tensor | None:
        """The result of a committed round; None if nobody gives it."""
        deadline = time.monotonic() + timeouts.chunk
        key = self._key("result", commit.version)
        while sources:
            try:
                data = self._group.fetch(key, sources, digest=commit.digest, timeout=timeouts.operation)
                return torch.frombuffer(data, dtype=torch.float32)
            except FetchError:
                if time.monotonic() > deadline:
                    break
                time.sleep(PULL_AGAIN_SECONDS)  # they publish it when the same commit has reached them
        return None

    def fetch(
        self, base: Base, sources: Sequence[Member], sizes: Sequence[int], own: State | None, peer: Peer
    ) -> State | None:
        """The version that `base` names, from all sources at once; None if they did not last long enough.

        sizes: numbers in each fragment. own: a version from which equal fragments are taken. What has come by then is
        kept for the next sources. Raises CheckpointMismatch for another model's state.
        """
        began = time.monotonic()
        given: dict[str, int] = {}
        try:
            hashes = self._hashes(base, sources, len(sizes), peer.timeouts)
            known = {part.state_hash: part for part in (own.parts if own else ())} | self._brought
            first = base.version % len(sizes)
            order = [*range(first, len(sizes)), *range(first)]  # what the next rounds move comes first
            for f in order:
                number = part_number(base.version, f, len(sizes))
                if hashes[f] not in known:
                    done = (order.index(f), len(order))
                    self._brought[hashes[f]] = self._fetch(f, number, hashes[f], sources, sizes[f], peer, done, given)
        except FetchError as error:
            peer.events.emit("state.interrupted", version=base.version, reason=str(error))
            return None
        known |= self._brought
        parts = [known[each] for each in hashes]
        numbered = (
            part if part.number == part_number(base.version, f, len(sizes)) else _renumbered(part, base, f, len(sizes))
            for f, part in enumerate(parts)
        )
        state = State(tuple(numbered))
        self._partials, self._brought = {}, {}
        peer.events.emit(
            "state.fetched",
            version=base.version,
            bytes=sum(given.values()),
            seconds=round(time.monotonic() - began, 4),
            sources=[member.name for member in sources],
            given=given,
        )
        return state

    def _hashes(self, base: Base, sources: Sequence[Member], fragments: int, timeouts: Timeouts) -> list[str]:
        if fragments == 1:
            return [base.state_hash]
        key = self._key("hashes", base.version)
        text = bytes(self._group.fetch(key, sources, digest=base.state_hash, timeout=timeouts.operation)).decode()
        if len(text) != HEX * fragments:
            raise FetchError(f"{len(text)} bytes of hashes for {fragments} fragments")
        return [text[at : at + HEX] for at in range(0, len(text), HEX)]

    def _fetch(
        self,
        fragment: int,
        number: int,
        state_hash: str,
        sources: Sequence[Member],
        elements: int,
        peer: Peer,
        done: tuple[int, int],
        given: dict[str, int],
    ) -> Version:
        partial = self._partials.setdefault(state_hash, Partial())

        def progress(here: int, size: int) -> None:
            peer.report(state=f"fetching {int(100 * (done[0] + here / max(size, 1)) / done[1])} %")

        data = self._group.fetch(
            self._part_key(fragment, number),
            sources,
            digest=state_hash,
            timeout=peer.timeouts.operation,
            partial=partial,
            progress=progress,
        )
        for name, each in partial.sources.items():
            given[name] = given.get(name, 0) + each.bytes
        return Version.from_bytes(number, data, state_hash, elements)


def _renumbered(part: Version, base: Base, fragment: int, fragments: int) -> Version:
    """The same bits under another number: an outer step that changed nothing."""
    number = part_number(base.version, fragment, fragments)
    return Version(number, part.parameters, part.momentum)
