"""The data plane between sites: exact over distance and loss, a cut path told from a slow one, cut pairs avoided.

The sites live in this process: what a thread makes while it is inside a site stays there, and so do the threads and
sockets that come from those.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plane import Outcome, assert_exact, eventually, make_abort, make_start, numbers, together

import elastic
from benchmarks.wan.wan import Wan
from collectives import Failed, Group, LinkFailure, LinkOptions, Progress, Start
from collectives.tuning import FIRST

pytestmark = pytest.mark.wan
ROOT = Path(__file__).parents[2]
MIB = (1 << 20) // 4
OPTIONS = LinkOptions(shared_memory=False)
CUBIC = LinkOptions(shared_memory=False, congestion_control="cubic")


class At:
    """An `observe` hook that tells, once a part of the chunks is here."""

    def __init__(self, part: float) -> None:
        self.part, self.reached = part, threading.Event()

    def __call__(self, progress: Progress) -> None:
        if progress.chunks_received >= self.part * progress.chunks_expected:
            self.reached.set()


def at_sites(wan: Wan, *calls: Callable[[], Any]) -> list[Any]:
    """Call each in a thread of its own, the first one at the first site and so on; raises what they raise."""

    def there(site: str, call: Callable[[], Any]) -> Any:
        with wan.inside(site):
            return call()

    answers = together(*(partial(there, site, call) for site, call in zip(wan.sites, calls, strict=True)))
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


@contextmanager
def groups(
    wan: Wan,
    observe: Callable[[Progress], None] | None = None,
    on_lost: Callable[[LinkFailure], None] | None = None,
    options: LinkOptions = OPTIONS,
) -> Iterator[list[Group]]:
    """One at each site, all in one view; the first one is observed."""
    made: list[Group] = []
    try:
        for index, site in enumerate(wan.sites):
            with wan.inside(site):
                first: dict[str, Any] = {"observe": observe, "on_lost": on_lost} if index == 0 else {}
                listen = f"{wan.addr(site)}:0"
                made.append(
                    Group(run="run", name=site, incarnation=100 + index, listen=listen, options=options, **first)
                )
        for group, site in zip(made, wan.sites, strict=True):
            with wan.inside(site):
                group.connect([each.member for each in made])
        yield made
    finally:
        for group in made:
            group.close()


def sources(made: Sequence[Group], elements: int) -> dict[str, torch.Tensor]:
    return {group.member.name: numbers(elements, seed) for seed, group in enumerate(made)}


class Running:
    """One attempt at all sites at once, in the background. ended: time.monotonic() at which each group came back."""

    def __init__(self, wan: Wan, made: Sequence[Group], start: Start, given: dict[str, torch.Tensor]) -> None:
        self.results = [torch.full((start.elements,), float("nan")) for _ in made]
        self.ended: dict[str, float] = {}
        self.outcomes: list[Outcome] = []
        pairs = zip(made, self.results, strict=True)
        calls = [partial(self._run, group, start, given, result) for group, result in pairs]
        self._thread = threading.Thread(target=lambda: self.outcomes.extend(at_sites(wan, *calls)), daemon=True)
        self._thread.start()

    def _run(self, group: Group, start: Start, given: dict[str, torch.Tensor], result: torch.Tensor) -> Outcome:
        outcome = group.run(start, given[group.member.name], result)
        self.ended[group.member.name] = time.monotonic()
        return outcome

    def wait(self) -> list[Outcome]:
        self._thread.join(100)
        assert len(self.outcomes) == len(self.results), "an attempt failed to return, or raised (see above)"
        return self.outcomes


def states(group: Group) -> dict[str, str]:
    return {link.peer: link.state for link in group.statistics().links}


def drops(wan: Wan, which: str) -> int:
    return sum(int(link[which]) for link in wan.links())


def test_three_sites_reduce_exactly(wan3: Wan) -> None:
    for site in wan3.sites:
        wan3.set(site, loss=0.005)
    with groups(wan3) as made:
        start = make_start([group.member for group in made], 4 * MIB + 77)
        given = sources(made, start.elements)
        running = Running(wan3, made, start, given)
        assert_exact(start, given, running.wait(), running.results)
        assert drops(wan3, "drop_loss") > 0


def test_a_cut_is_found_under_load_and_the_retry_avoids_the_pair(wan3: Wan) -> None:
    seen = At(0.3)
    with groups(wan3, seen) as made:
        members = [group.member for group in made]
        start = make_start(members, 16 * MIB)
        given = sources(made, start.elements)
        running = Running(wan3, made, start, given)
        assert seen.reached.wait(60)
        wan3.cut("site-a", "site-c")
        cut = time.monotonic()
        ends = ("site-a", "site-c")
        eventually(lambda: all(end in running.ended for end in ends), 60)
        made[1].abort(make_abort(start))
        a, b, c = running.wait()
        assert drops(wan3, "drop_cut") > 0
        for outcome, other in ((a, "site-c"), (c, "site-a")):
            assert isinstance(outcome, Failed)
            assert [(lost.peer, lost.evidence) for lost in outcome.lost] == [(other, "timeout")]
        assert isinstance(b, Failed) and not b.lost
        assert max(running.ended[end] for end in ends) - cut < OPTIONS.path_timeout + 1.5
        assert states(made[1]) == {"site-a": "up", "site-c": "up"}

        retry = make_start(members, start.elements, attempt=1, shares=(0.0, 1.0, 0.0))
        again = Running(wan3, made, retry, given)
        assert_exact(retry, given, again.wait(), again.results)
        assert states(made[1]) == {"site-a": "up", "site-c": "up"}, "a good link was not used again"


def test_a_path_that_becomes_slow_is_not_cut_off(wan3: Wan) -> None:
    seen = At(0.4)
    with groups(wan3, seen) as made:
        start = make_start([group.member for group in made], 8 * MIB)
        given = sources(made, start.elements)
        running = Running(wan3, made, start, given)
        assert seen.reached.wait(60)
        wan3.set("site-a", "site-c", rate=2)
        slow = time.monotonic()
        assert_exact(start, given, running.wait(), running.results)
        assert max(running.ended.values()) - slow > OPTIONS.path_timeout, "over before anybody could have given up"
        assert all(set(states(group).values()) == {"up"} for group in made)


@contextmanager
def peers(wan: Wan, observe: Callable[[Progress], None]) -> Iterator[list[elastic.Peer]]:
    """One at each site, with a coordinator at the second one; the first one is observed."""
    with wan.inside("site-b"):
        policy = elastic.RunPolicy(min_peers=3, quorum=1.0)
        coordinator = elastic.Coordinator(f"tcp://{wan.addr('site-b')}:0", run="run", policy=policy)
    made: list[elastic.Peer] = []
    try:
        for site in wan.sites:
            with wan.inside(site):
                hook = observe if site == "site-a" else None
                listen = f"{wan.addr(site)}:0"
                made.append(elastic.Peer(coordinator.address, run="run", name=site, listen=listen, observe=hook))
        for peer in made:
            peer.wait_for(3)
        yield made
    finally:
        for peer in made:
            peer.close()
        coordinator.close()


def reduce(wan: Wan, made: Sequence[elastic.Peer], elements: int) -> list[elastic.Reduced]:
    """All-reduce numbers of each; the sum is checked, and that all are in it."""
    given = [numbers(elements, seed) for seed in range(len(made))]
    calls = [partial(peer.all_reduce, mine, timeout=60) for peer, mine in zip(made, given, strict=True)]
    reduced = at_sites(wan, *calls)
    wanted = given[0] + given[1] + given[2]
    for each in reduced:
        assert each.contributors == tuple(wan.sites)
        assert torch.equal(each.tensor, wanted)
    return reduced


def test_peers_with_a_cut_pair_all_contribute(wan3: Wan) -> None:
    seen = At(0.3)
    with peers(wan3, seen) as made:

        def cut() -> None:
            if seen.reached.wait(60):
                wan3.cut("site-a", "site-c")

        cutting = threading.Thread(target=cut, daemon=True)
        cutting.start()
        assert max(each.attempts for each in reduce(wan3, made, 16 * MIB)) > 1
        cutting.join()
        assert drops(wan3, "drop_cut") > 0
        reduce(wan3, made, MIB)  # still cut
        wan3.heal("site-a", "site-c")
        reduce(wan3, made, MIB)
        assert all(len(peer.view.members) == 3 for peer in made)


def test_the_benchmark_measures_every_side_and_checks_its_sums() -> None:
    options = ["--size", "1", "--repeat", "2", "--settle", "1", "--wires", "f32,bf16", "--gloo-repeat", "1"]
    command = [sys.executable, "-m", "benchmarks.wan_allreduce", "wan3", *options, "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    full, half, gloo = found["samples"]
    assert all(list(sample["cells"]) == found["columns"] for sample in found["samples"])
    assert [len(sample["seconds"]) for sample in (full, half, gloo)] == [2, 2, 1]
    assert full["ideal"] == 2 * half["ideal"] == gloo["ideal"]
    assert full["ideal"] == pytest.approx(2 / 3 * 8 * (1 << 20) / 200e6 * 1500 / 1448)
    for sample in (full, half, gloo):
        for moving, seconds in zip(sample["moving"], sample["seconds"], strict=True):
            assert sample["ideal"] < moving < seconds
    assert {sample["cells"]["cc"] for sample in (full, half, gloo)} == {"cubic"}


def test_stripes_become_more_on_a_lossy_path() -> None:
    with Wan("lossy3.json", name=f"t{os.getpid()}", max_life=300) as wan, groups(wan, options=CUBIC) as made:
        members = [group.member for group in made]
        given = sources(made, 4 * MIB)
        for round_ in range(60):
            start = make_start(members, 4 * MIB, round=round_, chunk_bytes=32 << 10)
            running = Running(wan, made, start, given)
            assert_exact(start, given, running.wait(), running.results)
            links = [link for group in made for link in group.statistics().links]
            if min(link.stripes for link in links) > FIRST:
                break
        assert min(link.stripes for link in links) > FIRST
        assert {link.congestion_control for link in links} == {"cubic"}
        assert all(link.goodput > 0 and 0.09 < link.rtt < 0.15 for link in links), links
        assert all(0 < link.slowest <= link.fastest < 1e10 for link in links), links
        assert sum(link.retransmits for link in links) > 0


def test_idle_links_are_heard_of_by_every_nat_on_the_way_and_a_cut_is_found(wan3: Wan) -> None:
    lost: list[LinkFailure] = []
    with groups(wan3, on_lost=lost.append) as made:
        start = make_start([group.member for group in made], 1000)
        given = sources(made, start.elements)
        running = Running(wan3, made, start, given)
        assert_exact(start, given, running.wait(), running.results)
        before = packets(wan3)
        eventually(lambda: all(now >= before[link] + 2 for link, now in packets(wan3).items()))
        wan3.cut("site-a", "site-c")
        cut = time.monotonic()
        eventually(lambda: bool(lost))
        assert [(failure.peer, failure.evidence) for failure in lost] == [("site-c", "timeout")]
        assert time.monotonic() - cut < OPTIONS.path_timeout + 2.0
        assert states(made[1]) == {"site-a": "up", "site-c": "up"}


def packets(wan: Wan) -> dict[tuple[str, str], int]:
    return {(link["from"], link["to"]): int(link["out_pkts"]) for link in wan.links()}
