"""All-reduce among groups of this process: exact values, whoever takes part and however the work is shared."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from plane import SMALL, assert_exact, expected, groups, make_abort, make_start, numbers, run_all, together

from collectives import Done, Failed, Group, LinkOptions, Member, Progress
from collectives.wires import WIRES, round_trip


def sources_of(made: list[Group], elements: int) -> dict[str, torch.Tensor]:
    return {group.member.name: numbers(elements, index) for index, group in enumerate(made)}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("elements", [0, 1, 17, 1009, 30_011])
def test_exact_sums_in_member_order(count: int, elements: int) -> None:
    with groups(count) as made:
        start = make_start([group.member for group in made], elements)
        sources = sources_of(made, elements)
        kept = {name: source.clone() for name, source in sources.items()}
        outcomes, results = run_all(made, start, sources)
        assert_exact(start, kept, outcomes, results)
        assert all(torch.equal(sources[name], kept[name]) for name in kept)


@pytest.mark.parametrize("stripes", [1, 4])
@pytest.mark.parametrize("pool_bytes", [0, 4096, 32 << 20])
def test_early_parts_wait_without_deadlock(stripes: int, pool_bytes: int) -> None:
    options = LinkOptions(chunk_bytes=1024, stripes=stripes, pool_bytes=pool_bytes)
    with groups(4, options) as made:
        for round_ in range(3):
            start = make_start([group.member for group in made], 50_000, round=round_)
            sources = sources_of(made, 50_000)
            assert_exact(start, sources, *run_all(made, start, sources))


@pytest.mark.parametrize("multipliers", [(1.0, 2.5, 0.1), (0.3, 1.0, 0.0), (-1.5, 0.7, 1.0)])
@pytest.mark.parametrize("divisor", [1.0, 3.0])
def test_weights_and_divisor_are_rounded_once_each(multipliers: tuple[float, ...], divisor: float) -> None:
    with groups(3) as made:
        start = make_start([g.member for g in made], 5003, multipliers=multipliers, divisor=divisor)
        sources = sources_of(made, 5003)
        assert_exact(start, sources, *run_all(made, start, sources))


@pytest.mark.parametrize("shares", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.7, 0.3, 0.0), (0.0, 0.9, 0.1)])
def test_unequal_shares_and_pairs_that_never_talk(shares: tuple[float, ...]) -> None:
    with groups(3) as made:
        start = make_start([group.member for group in made], 20_000, shares=shares)
        sources = sources_of(made, 20_000)
        assert_exact(start, sources, *run_all(made, start, sources))
        for index, group in enumerate(made):
            talks = {each.peer for each in group.statistics().links}
            wanted = {f"p{k}" for k in range(3) if k != index and shares[k] + shares[index] > 0}
            assert talks == wanted


@pytest.mark.parametrize("wire", ["bf16", "f16"])
@pytest.mark.parametrize("multipliers", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.3)])
def test_lossy_wires_quantise_each_part_and_the_sum_once(wire: str, multipliers: tuple[float, ...]) -> None:
    with groups(3) as made:
        start = make_start([g.member for g in made], 9001, wire=wire, multipliers=multipliers, divisor=3.0)
        sources = sources_of(made, 9001)
        outcomes, results = run_all(made, start, sources)
        scratch = memoryview(bytearray(4 * 9001))
        rounded = {name: torch.empty(9001) for name in sources}
        for name, source in sources.items():
            round_trip(WIRES[wire], source.numpy(), scratch, rounded[name].numpy())
        wanted = expected(start, rounded)
        round_trip(WIRES[wire], wanted, scratch, wanted)
        assert len({outcome.digest for outcome in outcomes if isinstance(outcome, Done)}) == 1
        for result in results:
            np.testing.assert_array_equal(result.numpy(), wanted)


def test_special_values_are_the_same_bits_everywhere() -> None:
    with groups(3) as made:
        start = make_start([group.member for group in made], 4)
        values = ([float("inf"), -0.0, 1e-45, float("nan")], [float("-inf"), -0.0, 1e-45, 1.0], [0.0, -0.0, 0.0, 1.0])
        sources = {f"p{i}": torch.tensor(value) for i, value in enumerate(values)}
        _, results = run_all(made, start, sources)
        bits = [result.numpy().view(np.uint32).tolist() for result in results]
        assert bits[0] == bits[1] == bits[2]
        assert results[0][1].item() == 0 and torch.signbit(results[0][1])


@pytest.mark.parametrize("contributors", [1, 2, 3])
def test_receivers_get_the_same_bytes(contributors: int) -> None:
    with groups(5) as made:
        givers, takers = made[:contributors], made[contributors:]
        start = make_start([g.member for g in givers], 30_000, receivers=tuple(g.member for g in takers))
        sources = sources_of(givers, 30_000)
        assert_exact(start, sources, *run_all(made, start, sources))
        assert all(group.settle(start.identity, 30) for group in made)
        assert all(group.statistics().serving == 0 for group in made)


def test_a_receiver_that_never_comes_delays_nobody_and_may_come_late() -> None:
    with groups(4) as made:
        absent = Member(name="nobody", incarnation=999, addresses=("127.0.0.1:1",))
        start = make_start([g.member for g in made[:2]], 30_000, receivers=(*(g.member for g in made[2:]), absent))
        sources = sources_of(made[:2], 30_000)
        assert_exact(start, sources, *run_all(made[:3], start, sources))
        late = torch.empty(30_000)
        assert isinstance(made[3].run(start, None, late), Done)
        np.testing.assert_array_equal(late.numpy(), expected(start, sources))
        assert not made[0].settle(start.identity, 0.0)
        assert made[0].statistics().serving == 0


def test_several_tags_at_once_in_any_order() -> None:
    with groups(3, LinkOptions(chunk_bytes=1024, pool_bytes=4096)) as made:
        starts = [make_start([g.member for g in made], 20_000 + tag, tag=f"tag{tag}") for tag in range(4)]
        sources = [{f"p{i}": numbers(20_000 + tag, 10 * tag + i) for i in range(3)} for tag in range(4)]
        outcomes = together(*(lambda s=s, x=x: run_all(made, s, x) for s, x in zip(starts, sources, strict=True)))
        for start, source, outcome in zip(starts, sources, outcomes, strict=True):
            assert_exact(start, source, *outcome)


def test_tags_run_in_opposite_orders_do_not_block_each_other() -> None:
    """p0 runs b before a, the others a and b at once: parts of a that wait for p0 must not keep b from finishing."""
    with groups(3, LinkOptions(chunk_bytes=1024, pool_bytes=2048)) as made:
        a, b = (make_start([g.member for g in made], 50_000, tag=tag) for tag in "ab")
        sources = sources_of(made, 50_000)

        def run(group: Group, *starts: Any) -> list[Any]:
            return [group.run(start, sources[group.member.name], torch.empty(50_000)) for start in starts]

        calls = [(made[0], b, a), *((group, start) for group in made[1:] for start in (a, b))]
        answers = together(*(lambda call=call: run(*call) for call in calls))
        assert all(isinstance(outcome, Done) for answer in answers for outcome in answer)


def test_many_rounds_reuse_the_links_and_count_bytes() -> None:
    with groups(3) as made:
        for group in made:
            group.connect([each.member for each in made])
        for round_ in range(20):
            start = make_start([group.member for group in made], 3000, round=round_)
            sources = sources_of(made, 3000)
            outcomes, results = run_all(made, start, sources)
            assert_exact(start, sources, outcomes, results)
        for group, outcome in zip(made, outcomes, strict=True):
            statistics = group.statistics()
            assert statistics.done == 20 and statistics.failed == 0 and statistics.stale_frames == 0
            assert [link.state for link in statistics.links] == ["up", "up"]
            assert isinstance(outcome, Done)
            for link in outcome.record.links:
                assert link.bytes_sent > 0 and 0 < link.waited_seconds <= outcome.record.seconds


def test_frames_of_older_attempts_and_generations_are_dropped_and_counted() -> None:
    """p1 alone aborts attempt 0; what p0 still sends for it arrives during attempt 1 of the next generation."""
    stopped = threading.Event()

    def observe(progress: Progress) -> None:
        if progress.identity.attempt == 0 and not stopped.is_set():
            stopped.set()
            made[1].abort(make_abort(first))
            made[0].abort(make_abort(first))

    with groups(2, LinkOptions(chunk_bytes=256, stripes=3), observe=observe) as made:
        first = make_start([group.member for group in made], 200_000)
        again = replace(first, attempt=1, generation=2)
        sources = sources_of(made, 200_000)
        outcomes, _ = run_all(made, first, sources)
        assert all(isinstance(outcome, Failed) for outcome in outcomes)
        assert_exact(again, sources, *run_all(made, again, sources))
        assert sum(group.statistics().stale_frames for group in made) > 0
        assert all(link.state == "up" for group in made for link in group.statistics().links)


def test_abort_before_during_and_without_a_run() -> None:
    with groups(2) as made:
        start = make_start([group.member for group in made], 1000)
        source, result = numbers(1000, 0), torch.empty(1000)
        made[0].abort(make_abort(start, "early"))
        failed = made[0].run(start, source, result)
        assert isinstance(failed, Failed) and "early" in failed.reason and failed.lost == ()
        waiting = replace(start, attempt=1)
        thread_answers: list[Any] = []
        thread = threading.Thread(target=lambda: thread_answers.append(made[0].run(waiting, source, result)))
        thread.start()
        made[0].abort(make_abort(waiting, "meanwhile"))
        thread.join(30)
        assert isinstance(thread_answers[0], Failed) and "meanwhile" in thread_answers[0].reason
        final = replace(start, attempt=2)
        sources = {"p0": source, "p1": numbers(1000, 1)}
        assert_exact(final, sources, *run_all(made, final, sources))


@pytest.mark.parametrize("at", [1, 7, 30])
def test_the_tensors_are_free_after_an_abort(at: int) -> None:
    """What the caller writes into source and result after Failed reaches nobody, and breaks no link."""
    fired = threading.Event()

    def observe(progress: Progress) -> None:
        if progress.identity.attempt == 0 and progress.chunks_received == at and not fired.is_set():
            fired.set()
            together(*(lambda group=group: group.abort(make_abort(start)) for group in made))

    with groups(3, observe=observe) as made:
        start = make_start([group.member for group in made], 100_000)
        sources = sources_of(made, 100_000)
        scrap = {name: source.clone() for name, source in sources.items()}
        results = [torch.empty(100_000) for _ in made]

        def attempt(index: int) -> Any:
            outcome = made[index].run(start, scrap[f"p{index}"], results[index])
            scrap[f"p{index}"].fill_(7.0)
            results[index].fill_(8.0)
            return outcome

        outcomes = together(*(lambda index=index: attempt(index) for index in range(3)))
        again = replace(start, attempt=1)
        assert_exact(again, sources, *run_all(made, again, sources))
        for outcome, result in zip(outcomes, results, strict=True):
            assert isinstance(outcome, Failed) and bool((result == 8.0).all())
        assert all(group.statistics().corrupt_frames == 0 for group in made)


def test_a_raising_observer_fails_the_attempt() -> None:
    def observe(progress: Progress) -> None:
        if progress.identity.attempt == 0:
            raise RuntimeError("boom")

    with groups(2, observe=observe) as made:
        start = make_start([group.member for group in made], 1000)
        sources = sources_of(made, 1000)

        def attempt(group: Group) -> Done | Failed:
            outcome = group.run(start, sources[group.member.name], torch.empty(1000))
            for other in made:  # as a coordinator would: a member that has failed sends no more
                other.abort(make_abort(start))
            return outcome

        outcomes = together(*(partial(attempt, group) for group in made))
        assert any(isinstance(outcome, Failed) and "boom" in outcome.reason for outcome in outcomes)


def test_wrong_arguments_are_refused_in_one_line() -> None:
    with groups(2, SMALL) as made:
        start = make_start([group.member for group in made], 10)
        ten = torch.zeros(10)
        cases: list[tuple[Any, Any, str]] = [
            (None, ten, "contributors pass a source"),
            (ten, torch.zeros(11), "10 elements"),
            (ten, ten, "different memory"),
            (ten, torch.zeros(2, 5), "flat"),
        ]
        for source, result, message in cases:
            with pytest.raises(ValueError, match=message) as caught:
                made[0].run(start, source, result)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"listen": "nowhere"}, "host:port"),
        ({"listen": "0.0.0.0:0"}, "advertise"),
        ({"listen": "", "advertise": "a:1"}, "listener"),
        ({"incarnation": 0}, "63-bit"),
        ({"name": ""}, "name"),
    ],
)
def test_a_group_that_nobody_could_use_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Group(**{"run": "run", "name": "a", "incarnation": 1, **arguments})


@pytest.mark.parametrize(
    "options", [{"stripes": 0}, {"chunk_bytes": 100}, {"chunk_bytes": 1 << 30}, {"connect_timeout": 0}, {"servers": 0}]
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        LinkOptions(**options)


def test_an_unknown_congestion_control_is_refused() -> None:
    with pytest.raises(ValueError, match="not available"):
        Group(run="run", name="a", incarnation=1, options=LinkOptions(congestion_control="nonsense"))


def test_a_closed_group_says_so() -> None:
    group = Group(run="run", name="a", incarnation=1)
    group.close()
    group.close()
    with pytest.raises(ValueError, match="closed"):
        group.connect([])


def test_dial_only_peers_take_part() -> None:
    with groups(1) as made, Group(run="run", name="q", incarnation=7, listen="", options=SMALL) as hidden:
        assert hidden.addresses == ()
        both = [made[0], hidden]
        start = make_start([group.member for group in both], 10_000)
        sources = {"p0": numbers(10_000, 0), "q": numbers(10_000, 1)}
        assert_exact(start, sources, *run_all(both, start, sources))


def test_advertised_address_may_leave_the_port_to_the_listener() -> None:
    with Group(run="run", name="a", incarnation=1, listen="0.0.0.0:0", advertise="localhost:0") as group:
        host, port = group.addresses[0].rsplit(":", 1)
        assert host == "localhost" and int(port) > 0
