"""Recomputes a chaos run from what its processes noted, and believes nothing that the run says of itself.

The journal says which attempts were committed; each contributor noted what it put into that attempt. The sums, the
outer steps, the cursors and the tokens follow from these with numpy alone.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from chaos_harness import Chaos
from chaos_worker import LOOPS, LR, MOMENTUM, RUN, SEED, SHARD, TOKENS

from elastic.journal import Admitted, Committed, Journal, LoopFounded, Opened, Restored
from elastic.outer.state import combined
from elastic.shards import Layout

Numbers = np.ndarray[Any, np.dtype[np.float32]]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def digest_of(*arrays: Numbers) -> str:
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


class Account:
    """What a run left behind."""

    def __init__(self, chaos: Chaos) -> None:
        self.chaos, self.folder = chaos, chaos.folder
        self.layout = Layout(chaos.samples, SHARD, SEED)
        self.fragments: int = LOOPS[chaos.loop][1].get("fragments", 1)
        journal = Journal(self.folder / "journal.sqlite", RUN)
        self.records = journal.read()
        journal.close()
        self.given: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
        self.done: dict[tuple[Any, ...], set[str]] = defaultdict(set)
        self.hashes: dict[int, set[str]] = {}
        for life in chaos.lives:
            self._note(life.label, life.events())

    def _note(self, label: str, events: list[dict[str, Any]]) -> None:
        name = label.partition(".")[0]
        for event in events:
            if event["event"] not in ("given", "done"):
                continue
            key = (event["tag"], event["generation"], event["round"], event["attempt"])
            if event["event"] == "given":
                assert name not in self.given[key], f"{label} was in {key} twice"
                self.given[key][name] = event
            else:
                self.done[key].add(event["digest"])

    def check(self) -> dict[str, Any]:
        self.check_processes()
        self.check_rounds()
        self.check_applied()
        plain = self.check_plain()
        commits = [record for record in self.records if isinstance(record, Committed)]
        shapes = Counter(len(record.contributors) for record in commits)
        return {"rounds": len(commits), "contributors": dict(sorted(shapes.items())), "plain": plain}

    # --- processes ---

    def check_processes(self) -> None:
        for life in self.chaos.lives:
            assert life.code == (-9 if life.killed else 0), (life.label, life.code)
            assert (self.folder / f"{life.label}.stderr").read_text() == "", life.label
            if not life.killed:
                last = life.events()[-1]
                assert last["event"] == "left" and last["threads"] == [] and not last.get("error"), last
        assert self.chaos.fired() == self.chaos.struck
        admitted = Counter(record.member.name for record in self.records if isinstance(record, Admitted))
        started = Counter(life.label.partition(".")[0] for life in self.chaos.lives)
        for name in self.chaos.names:
            joined = sum(event["event"] == "joined" for life in self.chaos.lives for event in life.events()
                         if life.label.startswith(name + "."))  # fmt: skip
            assert joined <= admitted[name] <= started[name], name

    # --- outer rounds ---

    def check_rounds(self) -> None:
        """Replays every committed round from the contributions, and every sample from the cursors."""
        n, generation = self.chaos.samples // self.fragments, 0
        state = [(np.zeros(n, np.float32), np.zeros(n, np.float32)) for _ in range(self.fragments)]
        cursors: dict[int, int] = defaultdict(int)
        read: Counter[int] = Counter()
        rounds = 0
        tokens = 0.0
        self.newest = 0
        self.hashes = {0: {combined(digest_of(*part) for part in state)}}
        # of each version, in case the run goes back to it: its only holder may leave before others have its result
        known = {0: (list(state), dict(cursors), Counter(read), tokens)}
        for record in self.records:
            if isinstance(record, Opened):
                generation = record.generation
            elif isinstance(record, LoopFounded):
                assert {record.state_hash} == self.hashes[0] and len(self.hashes) == 1
            elif isinstance(record, Restored):
                loop = record.state.loop("outer")
                assert loop is not None
                self.newest = loop.versions[0]
                parts, positions, counted, tokens = known[self.newest]
                state, cursors, read = list(parts), defaultdict(int, positions), Counter(counted)
            elif isinstance(record, Committed):
                assert record.round == rounds
                rounds += 1
                if not record.skipped:
                    moved = (record.version - 1) % self.fragments
                    state[moved] = self._replay(record, generation, state[moved], moved)
                    self.hashes.setdefault(record.version, set()).add(combined(digest_of(*part) for part in state))
                    self._count(record, generation, cursors, read)
                    self.newest, tokens = record.version, tokens + record.tokens
                    known[self.newest] = (list(state), dict(cursors), Counter(read), tokens)
        assert read == Counter(range(self.chaos.samples)), "every sample counts once"
        assert tokens == self.chaos.samples * TOKENS
        self.tokens = tokens

    def _replay(
        self, record: Committed, generation: int, state: tuple[Numbers, Numbers], moved: int
    ) -> tuple[Numbers, Numbers]:
        key = (record.tag, generation, record.round, record.attempt)
        given = self.given[key]
        assert tuple(sorted(given)) == record.contributors, f"{key}: {sorted(given)} noted, {record.contributors}"
        assert record.version == self.newest + 1
        total: Numbers = np.zeros(0, np.float32)
        for index, name in enumerate(record.contributors):
            event = given[name]
            assert event["base"] == record.version - 1 and event["contributors"] == list(record.contributors)
            numbers: Numbers = np.load(self.folder / event["file"])
            self._check_displacement(key, name, event, numbers, moved)
            term = numbers * np.float32(event["multipliers"][index])
            total = term if index == 0 else total + term
        mean: Numbers = total / np.float32(given[record.contributors[0]]["divisor"])
        assert digest_of(mean) == record.digest, f"{key}: the sum of the contributions is another"
        assert self.done[key] == {record.digest}, f"{key}: {self.done[key]}"
        parameters, momentum = state
        momentum = momentum * np.float32(MOMENTUM) + mean
        update: Numbers = (momentum * np.float32(MOMENTUM) + mean) * np.float32(LR)
        parameters = parameters - update
        return parameters, momentum

    def _check_displacement(self, key: Any, name: str, event: dict[str, Any], numbers: Numbers, moved: int) -> None:
        """The contribution is made of exactly the steps that the peer made since it last counted for the fragment."""
        steps = np.zeros(self.chaos.samples, np.float32)
        np.add.at(steps, event["pending"], np.float32(1))
        steps = steps.reshape(self.fragments, -1)[moved]
        off = np.flatnonzero(np.abs(numbers + steps) > 1e-3)
        assert not off.size, f"{key} {name}: samples {off[:8]} give {numbers[off[:8]]} after {steps[off[:8]]} steps"
        assert event["weight"] == TOKENS * len(event["pending"]), f"{key} {name}: weight {event['weight']}"

    def _count(self, record: Committed, generation: int, cursors: dict[int, int], read: Counter[int]) -> None:
        given = self.given[record.tag, generation, record.round, record.attempt]
        newly: Counter[int] = Counter()
        for shard, position in record.cursors.items():
            newly.update(self.layout.order(shard)[cursors[shard] : position])
            cursors[shard] = max(cursors[shard], position)
        trained = Counter(index for name in record.contributors for index in given[name]["fresh"])
        assert newly == trained, (
            f"round {record.round} {record.contributors}: committed but not trained on: {newly - trained}; "
            f"trained on and not committed: {trained - newly}"
        )
        assert record.tokens == TOKENS * sum(newly.values())
        read.update(newly)

    def check_applied(self) -> None:
        """Whoever applied, fetched or ended with a version had exactly the bytes that the replay has."""
        last = self.newest
        for name in self.chaos.names:
            for event in lines(self.folder / f"{name}.jsonl"):
                if event["event"] == "round.applied":
                    assert event["state_hash"] in self.hashes[event["version"]], (name, event)
        finals = []
        for life in self.chaos.lives:
            for event in life.events():
                if event["event"] in ("entered", "finished"):
                    assert event["state_hash"] in self.hashes[event["version"]], (life.label, event)
            if life in self.chaos.now.values() and not life.label.startswith("coordinator"):
                finals += [event for event in life.events() if event["event"] == "finished"]
        assert len(finals) == len(self.chaos.names)
        assert [event["left"] for event in finals] == [[]] * len(self.chaos.names), "samples that nobody counted"
        assert [event["version"] for event in finals] == [last] * len(self.chaos.names), (
            "who has no data left follows to the end"
        )

    # --- plain operations ---

    def check_plain(self) -> int:
        """Each result is the sum of what the contributors that it names put into one attempt."""
        checked = 0
        for life in self.chaos.lives:
            for event in life.events():
                if event["event"] == "plain":
                    self._check_sum(life.label, event)
                    checked += 1
        return checked

    def _check_sum(self, label: str, event: dict[str, Any]) -> None:
        name, names = label.partition(".")[0], event["contributors"]
        assert event["equal"] and name in names, (label, event)
        sums = [
            sum(given[each]["value"] for each in names)
            for key, given in self.given.items()
            if key[0] == "plain" and key[2] == event["round"] and set(names) <= given.keys()
            if given[name]["contributors"] == names
        ]
        assert event["total"] in sums, (label, event, sums)
