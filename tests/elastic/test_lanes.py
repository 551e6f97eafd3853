"""The lanes of a peer of several ranks: what is cut how, what comes of it, and what holds when a part of it is lost."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from harness import until
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_hexdigest

from collectives import Group, LinkOptions, patterns
from collectives.records import (
    BLOCK,
    Abort,
    Done,
    Failed,
    LinkFailure,
    LinkRecord,
    Member,
    OperationRecord,
    Start,
    WireRun,
    fits,
)
from elastic import errands, lanes
from elastic.errors import ConfigurationError, RoundAborted, TransportError
from elastic.lanes import Lane, LanedGroup, LaneFacts, LaneOffer
from elastic.peer import laned

CHUNK = 1 << 16
BEAT, SILENCE = 0.05, 2.0
ELEMENTS = 3 * lanes.SMALLEST_RANGE + 1000  # no multiple of a block


def members(*counts: int) -> tuple[Member, ...]:
    """Peers with so many lanes beside their leader's links."""
    return tuple(
        Member(
            name=f"p{i}", incarnation=i + 1, addresses=(f"h{i}:1",), lanes=tuple((f"h{i}:{r + 2}",) for r in range(n))
        )
        for i, n in enumerate(counts)
    )


def start_of(contributors: tuple[Member, ...], **fields: Any) -> Start:
    count = len(contributors)
    usual: dict[str, Any] = {
        "run": "r", "generation": 1, "epoch": 1, "tag": "t", "round": 0, "attempt": 0, "fragment": 0,
        "base_version": 0, "shares": (1 / count,) * count, "elements": ELEMENTS, "multipliers": (1.0,) * count,
    }  # fmt: skip
    return Start(**usual | {"contributors": contributors} | fields)


# --- pure functions ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 40), st.integers(1, 16))
def test_ranges_are_whole_blocks_end_to_end_and_even(elements: int, count: int) -> None:
    found = lanes.ranges(elements, count)
    assert len(found) == count and found[0][0] == 0 and found[-1][1] == elements
    assert all(one[1] == other[0] for one, other in pairwise(found))
    assert all(start % BLOCK == 0 for start, _ in found if start < elements)
    sizes = [stop - start for start, stop in found]
    assert max(sizes) - min(sizes) < 2 * BLOCK


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 8), st.integers(0, BLOCK - 1))
def test_runs_of_wires_are_cut_where_ranges_are(blocks: list[int], count: int, rest: int) -> None:
    runs = [WireRun(elements=n * BLOCK, wire=("int4", "f32", "int8")[i % 3]) for i, n in enumerate(blocks)]
    runs[-1] = replace(runs[-1], elements=runs[-1].elements - rest)
    elements = sum(run.elements for run in runs)
    pieces = [lanes.cut_wires(runs, *each) for each in lanes.ranges(elements, count)]
    for (low, high), piece in zip(lanes.ranges(elements, count), pieces, strict=True):
        assert fits(piece, high - low)
    each = [run.wire for piece in pieces for run in piece for _ in range(run.elements)]
    assert each == [run.wire for run in runs for _ in range(run.elements)]


def test_what_is_cut_follows_from_the_start_alone() -> None:
    assert lanes.lanes_of(start_of(members(1, 1))) == 2
    assert lanes.lanes_of(start_of(members(2, 2), op="max")) == 3
    assert lanes.lanes_of(start_of(members(0, 0))) == 1
    assert lanes.lanes_of(start_of(members(1, 0))) == 1
    assert lanes.lanes_of(start_of(members(1, 1), receivers=members(0, 0, 0)[2:])) == 1
    assert lanes.lanes_of(start_of(members(1, 1), receivers=members(0, 0, 1)[2:])) == 2
    assert lanes.lanes_of(start_of(members(1, 1), attempt=1)) == 1, "what has failed once goes the sure way"
    assert lanes.lanes_of(start_of(members(1, 1), elements=2 * lanes.SMALLEST_RANGE - 1)) == 1
    assert lanes.lanes_of(start_of(members(1, 1), op="reduce_scatter", shares=(), segments=(ELEMENTS, 0))) == 1
    assert lanes.lanes_of(start_of(members(1, 1), op="broadcast", shares=(1.0, 0.0))) == 1


@pytest.mark.parametrize("count", [2, 5])
def test_what_ranks_run_is_a_valid_start_of_a_range(count: int) -> None:
    runs = (WireRun(elements=BLOCK * 7, wire="int4"), WireRun(elements=ELEMENTS - BLOCK * 7, wire="f32"))
    both = members(count - 1, count - 1)
    for fields in ({"wire": "int8"}, {"wires": runs}, {"pattern": "ring", "order": (1, 0)}):
        start = start_of(both, **fields)
        parts = [lanes.derived(start, lane, count) for lane in range(count)]
        for lane, part in enumerate(parts):
            patterns.check(part, part.contributors[0], lanes.lane_run("r", lane))
            assert part.contributors[1].addresses == (f"h1:{lane + 1}",) and part.base_version == -1
        assert sum(part.elements for part in parts) == ELEMENTS
        assert len({part.identity for part in parts} | {start.identity}) == count + 1


def test_a_lane_that_broke_neither_proves_nor_cuts_anything() -> None:
    def ended(*lost: tuple[int, str]) -> errands.Ended:
        failures = tuple(LinkFailure(peer=f"p{i}", incarnation=i, evidence=how) for i, how in lost)
        return errands.Ended(done=not lost, lost=failures)

    lost = lanes.lost_in([ended((1, "refused")), ended((1, "timeout"), (2, "refused")), ended()])
    assert [(each.peer, each.evidence) for each in lost] == [("p1", "refused"), ("p2", "reset")]
    assert "rank 1: refused" in lost[1].detail


def test_records_add_up() -> None:
    def record(sent: int, seconds: float) -> OperationRecord:
        link = LinkRecord(peer="b", bytes_sent=sent, bytes_received=1, send_blocked_seconds=0.0, stripes=2, rtt=seconds)
        return OperationRecord(seconds=9.0, wait_ready_seconds=seconds, reduce_seconds=1.0, links=(link,))

    whole = lanes.merged([record(5, 0.3), record(7, 0.2)], 2.0)
    assert (whole.seconds, whole.wait_ready_seconds, len(whole.links)) == (2.0, 0.3, 1)
    assert (whole.links[0].bytes_sent, whole.links[0].stripes, whole.links[0].rtt) == (12, 4, 0.2)


def test_fixed_ports_are_those_above_the_leaders() -> None:
    assert lanes.beside("0.0.0.0:29400,[::1]:7", 2) == "0.0.0.0:29402,[::1]:9"
    assert lanes.beside("127.0.0.1:0", 3) == "127.0.0.1:0"
    assert lanes.beside("", 1) == "" and lanes.beside(None, 1) is None


def test_lanes_are_on_unless_somebody_says_no() -> None:
    assert laned(None, {}) and laned(True, {"ELASTIC_LANES": "0"})
    assert not laned(None, {"ELASTIC_LANES": "0"}) and not laned(False, {"ELASTIC_LANES": "1"})
    with pytest.raises(ConfigurationError, match="ELASTIC_LANES"):
        laned(None, {"ELASTIC_LANES": "no"})


# --- over real sockets, in this process -------------------------------------------------------------------------------


@dataclass
class Crew:
    """The ranks of one peer."""

    name: str
    count: int = 2
    options: LinkOptions = field(default_factory=lambda: LinkOptions(chunk_bytes=CHUNK, shared_memory=False))
    others: list[Lane] = field(default_factory=list)

    def __post_init__(self) -> None:
        shared = {"run": "r", "name": self.name, "incarnation": secrets.randbits(62) | 1, "options": self.options}
        self.leader = LanedGroup(listen="127.0.0.1:0", advertise=None, **shared)
        facts = LaneFacts("tcp://127.0.0.1:1", shared, secrets.token_bytes(32), BEAT)
        offers = []
        for rank in range(1, self.count):
            offer, lane = lanes.open_lane(facts, rank, None, None)
            assert lane is not None
            offers.append(offer)
            self.others.append(lane)
        assert self.leader.lead(offers, facts.secret, SILENCE) == ""

    @property
    def groups(self) -> list[Group]:
        return [self.leader, *(lane.group for lane in self.others)]

    def numbers(self, elements: int = ELEMENTS) -> torch.Tensor:
        return torch.randn(elements, generator=torch.Generator().manual_seed(sum(self.name.encode())))

    def close(self) -> None:
        self.leader.close()
        for lane in self.others:
            lane.close()


@pytest.fixture
def crews() -> Iterator[Callable[..., list[Crew]]]:
    before = set(threading.enumerate())
    made: list[Crew] = []

    def make(*counts: int) -> list[Crew]:
        made.extend(Crew(name, count) for name, count in zip("abcd", counts, strict=False))
        for crew in made:
            crew.leader.connect([each.leader.member for each in made])
        return made

    yield make
    with ThreadPoolExecutor() as pool:
        list(pool.map(Crew.close, made))
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("elastic")]
    assert not left, f"threads left behind: {left}"


def start_among(crews: list[Crew], **fields: Any) -> Start:
    return start_of(tuple(crew.leader.member for crew in crews), **fields)


def begin(pool: ThreadPoolExecutor, crew: Crew, start: Start) -> tuple[Future[Any], torch.Tensor]:
    contributes = crew.leader.member in start.contributors
    result = torch.zeros(start.elements)
    source = crew.numbers(start.elements) if contributes else None
    return pool.submit(crew.leader.run, start, source, result), result


def run_all(crews: list[Crew], start: Start) -> tuple[list[Any], list[torch.Tensor]]:
    with ThreadPoolExecutor(len(crews)) as pool:
        begun = [begin(pool, crew, start) for crew in crews]
        return [future.result(60) for future, _ in begun], [result for _, result in begun]


RUNS = (
    WireRun(elements=BLOCK * 999, wire="int4", gather_wire="int8"),
    WireRun(elements=BLOCK * 300, wire="bf16"),
    WireRun(elements=ELEMENTS - BLOCK * 1299, wire="f32"),
)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("how", [{"wire": "f32"}, {"wire": "int4", "gather_wire": "int8"}, {"wires": RUNS}])
def test_all_ranks_together_come_to_the_bits_of_the_leader_alone(
    crews: Callable[..., list[Crew]], ranks: int, how: dict[str, Any]
) -> None:
    made = crews(ranks, ranks, ranks)
    how = how | {"multipliers": (1.0, 0.5, 0.25), "divisor": 1.75, "shares": (0.5, 0.3, 0.2)}
    outcomes, laned = run_all(made, start_among(made, **how))
    alone_outcomes, alone = run_all(made, start_among(made, **how, attempt=1))
    for outcome, result in zip(outcomes + alone_outcomes, laned + alone, strict=True):
        assert isinstance(outcome, Done) and torch.equal(result, laned[0]) and result.abs().sum() > 0
        assert outcome.digest == xxh3_128_hexdigest(result.numpy()) == outcomes[0].digest
        assert [link.bytes_received > 0 for link in outcome.record.links] == [True, True]


def test_each_rank_moves_its_own_range(crews: Callable[..., list[Crew]]) -> None:
    made = crews(2, 2)
    outcomes, _ = run_all(made, start_among(made))
    whole = ELEMENTS * 4  # of each range, a peer sends one half as a contribution and the other as a result
    for crew, outcome in zip(made, outcomes, strict=True):
        sent = [Group.statistics(group).bytes_sent for group in crew.groups]
        assert sent == pytest.approx([whole / 2, whole / 2], rel=0.05) and outcome.record.links[0].bytes_sent > whole
        assert crew.leader.statistics().bytes_sent == pytest.approx(whole, rel=0.05)


def test_a_receiver_with_lanes_gets_the_result(crews: Callable[..., list[Crew]]) -> None:
    made = crews(2, 2, 2)
    start = start_among(made[:2], receivers=(made[2].leader.member,), base_version=3)
    outcomes, results = run_all(made, start)
    assert all(isinstance(outcome, Done) for outcome in outcomes)
    assert torch.equal(results[0], made[0].numbers() + made[1].numbers())
    assert torch.equal(results[2], results[0])


def test_unequal_peers_leave_it_to_their_leaders(crews: Callable[..., list[Crew]]) -> None:
    made = crews(2, 3)
    outcomes, results = run_all(made, start_among(made))
    assert all(isinstance(outcome, Done) for outcome in outcomes) and torch.equal(*results)
    assert not any(
        link.bytes_received for crew in made for lane in crew.others for link in lane.group.statistics().links
    )


def test_operations_that_begin_in_any_order_do_not_wait_for_each_other(crews: Callable[..., list[Crew]]) -> None:
    made = crews(2, 2)
    starts = [start_among(made, tag=f"t{i}") for i in range(6)]
    with ThreadPoolExecutor(12) as pool:
        begun = [begin(pool, made[0], start) for start in starts]
        begun += [begin(pool, made[1], start) for start in reversed(starts)]
        assert all(isinstance(future.result(60), Done) for future, _ in begun)


def abort_of(start: Start, **fields: Any) -> Abort:
    return Abort(**start.identity._asdict(), reason="enough", **fields)


def test_an_abort_ends_every_rank_and_the_leaders_try_again(crews: Callable[..., list[Crew]]) -> None:
    made = crews(2, 2)
    start = start_among(made)
    with ThreadPoolExecutor(2) as pool:
        future, result = begin(pool, made[0], start)  # the other peer does not come
        lane = made[0].others[0].group
        until(lambda: lane._attempts and made[0].leader._attempts)
        made[0].leader.abort(abort_of(start))
        outcome = future.result(30)
        assert isinstance(outcome, Failed) and outcome.identity == start.identity and not outcome.lost
        assert "enough" in outcome.reason and not lane._attempts
        kept = result.clone()
        outcomes, _ = run_all(made, replace(start, attempt=1))
        assert all(isinstance(each, Done) for each in outcomes) and torch.equal(result, kept)


def test_an_abort_that_comes_first_is_obeyed(crews: Callable[..., list[Crew]]) -> None:
    made = crews(2, 2)
    start = start_among(made)
    made[0].leader.abort(abort_of(start))
    outcome = made[0].leader.run(start, made[0].numbers(), torch.zeros(ELEMENTS))
    assert isinstance(outcome, Failed) and not outcome.lost
    until(lambda: not made[0].others[0].group._attempts)


def test_a_lane_that_is_lost_fails_the_attempt_and_is_shunned(crews: Callable[..., list[Crew]]) -> None:
    made = crews(2, 2)
    assert all(isinstance(outcome, Done) for outcome in run_all(made, start_among(made))[0])
    made[1].others[0].group.close()  # its rank goes on: as if a firewall had closed this way
    outcome = made[0].leader.run(start_among(made, round=1), made[0].numbers(), torch.zeros(ELEMENTS))
    assert isinstance(outcome, Failed) and [(each.peer, each.evidence) for each in outcome.lost] == [("b", "reset")]
    shunned = made[0].leader.run(start_among(made, round=2), made[0].numbers(), torch.zeros(ELEMENTS))
    assert isinstance(shunned, Failed) and shunned.reason == "lanes to it failed lately" and shunned.lost
    outcomes, _ = run_all(made, start_among(made, round=2, attempt=1))
    assert all(isinstance(each, Done) for each in outcomes)


def test_a_rank_that_is_lost_ends_its_peer(crews: Callable[..., list[Crew]]) -> None:
    made = crews(2, 2)
    start = start_among(made)
    with ThreadPoolExecutor(2) as pool:
        future, _ = begin(pool, made[0], start)
        until(lambda: made[0].others[0].group._attempts)
        made[0].others[0].close()
        with pytest.raises(TransportError, match="rank 1 of this peer is lost"):
            future.result(30)
        with pytest.raises(TransportError, match="rank 1"):
            made[0].leader.run(start_among(made, round=1), made[0].numbers(), torch.zeros(ELEMENTS))


def test_a_rank_that_does_not_stop_is_given_up(
    crews: Callable[..., list[Crew]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "ENDING_SECONDS", 0.1)
    made = crews(2, 2)
    start = start_among(made)
    begun, going = threading.Event(), threading.Event()

    def run(*_: Any) -> Failed:
        begun.set()  # from here on it says that it lives, and nothing else
        going.wait(60)
        return Failed(identity=start.identity, reason="late")

    monkeypatch.setattr(made[0].others[0].group, "run", run)
    try:
        with ThreadPoolExecutor(2) as pool:
            future, _ = begin(pool, made[0], start)
            assert begun.wait(30)
            made[0].leader.abort(abort_of(start))
            with pytest.raises(TransportError, match="not stopped"):
                future.result(30)
    finally:
        going.set()


def test_a_rank_that_is_silent_costs_its_peer_the_round(
    crews: Callable[..., list[Crew]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = crews(2, 2)
    made[0].leader.patience = 0.5
    monkeypatch.setattr(made[0].others[0], "_beat", 60.0)
    with pytest.raises(RoundAborted, match="rank 1 of this peer was silent"):
        made[0].leader.run(start_among(made), made[0].numbers(), torch.zeros(ELEMENTS))
    until(lambda: not made[0].others[0].group._attempts)
    outcomes, _ = run_all(made, start_among(made, round=1))
    assert all(isinstance(outcome, Done) for outcome in outcomes)


def test_a_rank_that_is_full_does_not_hold_up_who_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errand lies in the kernel's buffers, and the rank reads nothing: an abort must not wait for it."""
    near, far = socket.socketpair()
    near.settimeout(60)
    call = errands.Call(lambda: near)
    sent = threading.Event()
    monkeypatch.setattr(errands, "give", lambda *_: None)
    monkeypatch.setattr(call, "_all_told", lambda: (setattr(call, "_told", True), stuff(near), sent.set()))
    errand = errands.Errand(start=start_of(members(1, 1)), gives=True)
    with ThreadPoolExecutor(1) as pool, far:
        future = pool.submit(call.make, errand, torch.zeros(1), torch.zeros(1))
        assert sent.wait(30)
        stopping = threading.Thread(target=call.stop, args=(abort_of(errand.start),))
        stopping.start()
        stopping.join(20)
        assert not stopping.is_alive()
        call.cut()
        with pytest.raises(OSError):
            future.result(30)


def stuff(sock: socket.socket) -> None:
    while errands.writable(sock):
        sock.send(bytes(1 << 16))


def test_what_a_rank_cannot_execute_is_raised_where_it_was_ordered(
    crews: Callable[..., list[Crew]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = crews(2, 2)

    def run(*_: Any) -> Failed:
        raise ValueError("no such thing")

    monkeypatch.setattr(made[0].others[0].group, "run", run)
    with pytest.raises(ValueError, match="rank 1: no such thing"):
        made[0].leader.run(start_among(made), made[0].numbers(), torch.zeros(ELEMENTS))
    assert not made[0].leader._attempts


def test_numbers_that_cannot_travel_are_the_ranks_own_fault(crews: Callable[..., list[Crew]]) -> None:
    made = crews(2, 2)
    source = made[0].numbers()
    source[-1] = float("nan")
    start = start_among(made, wire="int8")
    with ThreadPoolExecutor(2) as pool:
        other, _ = begin(pool, made[1], start)
        outcome = made[0].leader.run(start, source, torch.zeros(ELEMENTS))
        assert isinstance(outcome, Failed) and outcome.reason.startswith("rank 1: ") and not outcome.lost
        made[1].leader.abort(abort_of(start))
        assert isinstance(other.result(30), Failed)


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096)])
def test_strangers_do_not_get_through_the_door(crews: Callable[..., list[Crew]], words: bytes) -> None:
    made = crews(2, 2)
    door = made[0].leader._doors[0]
    with contextlib.suppress(ConnectionError), socket.create_connection(door, 20) as sock:
        sock.sendall(words)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):  # what a greeting begins with; then the door is shut
            pass
    with pytest.raises(OSError):
        errands.knock(door, b"guessed")
    assert all(isinstance(outcome, Done) for outcome in run_all(made, start_among(made))[0])


def test_without_a_way_to_a_rank_there_are_no_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"run": "r", "name": "a", "incarnation": 1, "options": LinkOptions()}
    facts = LaneFacts("tcp://127.0.0.1:1", options, b"s", BEAT)
    offer, lane = lanes.open_lane(facts, 1, "nowhere.invalid:0", None)
    assert lane is None and "rank 1" in offer.trouble
    with LanedGroup(listen="127.0.0.1:0", **options) as leader:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            nobody = closed.getsockname()[:2]
        assert "rank 1" in leader.lead([offer], b"s", SILENCE)
        assert "does not reach" in leader.lead([LaneOffer(doors=(nobody,))], b"s", SILENCE)
        assert leader.member.lanes == () and not leader.carried


def test_ranks_of_several_machines_find_each_other() -> None:
    options = {"run": "r", "name": "a", "incarnation": 1, "options": LinkOptions()}
    elsewhere = LaneFacts("tcp://127.0.0.1:1", options, b"s", BEAT, machine=("another",), hosts=("127.0.0.1",))
    offer, lane = lanes.open_lane(elsewhere, 1, None, None)
    assert lane is not None and offer.doors[0][0] == "127.0.0.1"
    try:
        with LanedGroup(listen="127.0.0.1:0", **options) as leader:
            assert leader.lead([offer], b"s", SILENCE) == "" and leader.member.lanes == (offer.addresses,)
    finally:
        lane.close()


def test_a_closed_leader_leaves_no_attempt_behind(crews: Callable[..., list[Crew]]) -> None:
    made = crews(2, 2)
    with ThreadPoolExecutor(2) as pool:
        future, _ = begin(pool, made[0], start_among(made))
        lane = made[0].others[0].group
        until(lambda: lane._attempts)
        made[0].leader.close()
        assert isinstance(future.result(30), Failed)
        until(lambda: not lane._attempts)


class Orders:
    """What a coordinator would do, and no more: if somebody fails, all others hear of it."""

    def __init__(self, crews: list[Crew], start: Start) -> None:
        self.crews, self.start = crews, start
        self.results = [torch.zeros(ELEMENTS) for _ in crews]

    def run(self, crew: Crew) -> Any:
        try:
            outcome = crew.leader.run(self.start, crew.numbers(), self.results[self.crews.index(crew)])
        except (TransportError, ValueError):  # it is ended, as a peer or as a group
            outcome = None
        if not isinstance(outcome, Done):
            for other in self.crews:
                other.leader.abort(abort_of(self.start))
        return outcome


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_lost_and_whenever_everybody_has_an_answer(crews: Callable[..., list[Crew]], seed: int) -> None:
    random = Random(seed)
    made = crews(2, 2, 2)
    orders = [Orders(made, start_among(made, tag=f"t{i}")) for i in range(4)]
    expected = sum((crew.numbers() for crew in made[1:]), made[0].numbers())
    left = random.randrange(60)
    hit, struck = random.choice(made), threading.Event()
    strike: Callable[[], None] = random.choice([
        hit.others[0].close, hit.leader.close, hit.others[0].group.close,
        lambda: hit.leader.abort(abort_of(orders[0].start)),
    ])  # fmt: skip

    def observe(_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            struck.set()

    for group in hit.groups:
        group.observer = observe
    with ThreadPoolExecutor(13) as pool:
        begun = [(each, [pool.submit(each.run, crew) for crew in random.sample(made, 3)]) for each in orders]
        struck.wait(10)
        strike()
        for order, futures in begun:
            outcomes = [future.result(60) for future in futures]
            digests = {outcome.digest for outcome in outcomes if isinstance(outcome, Done)}
            assert len(digests) <= 1 and all(
                torch.equal(result, expected)
                for result in order.results
                if xxh3_128_hexdigest(result.numpy()) in digests
            )
