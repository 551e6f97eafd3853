"""The membership's rules: one by one in short stories, and all at once in thousands of random schedules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import simulation
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import OUTER, OUTER_SPEC, PLAIN, PLAIN_SPEC, RUN, TIMES, Checkpoint, SimPeer, World

from collectives.records import Awaited, LinkFailure, Member, Underway, WireRun
from collectives.tuning import FINEST
from elastic.config import RunPolicy
from elastic.deciding import TOO_LATE_ONCE_TOO_OFTEN
from elastic.journal import Committed, DatasetRegistered, Leased, Released, StreamEnded, Targeted
from elastic.loops import Offer
from elastic.membership import Membership
from elastic.messages import (
    STREAM,
    Applied,
    AuditReport,
    AuditRequest,
    Base,
    Cancel,
    Commit,
    CommitNote,
    DoneReport,
    Enter,
    Exit,
    FailedReport,
    Gone,
    Heartbeat,
    Join,
    LeaseRequest,
    Leases,
    LinkLost,
    LinkReport,
    Open,
    OperationSpec,
    PeerStatus,
    Propose,
    Recomputed,
    Refused,
    Represent,
    SetTarget,
    StatusRequest,
    Withdraw,
    Witnessed,
)
from elastic.roster import Send
from elastic.runstate import RunState
from fault.records import Crossing, Gave, Health, Trainer
from fault.verdicts import CLOCK, DISK, HANG, STALLED

# --- how the stories are told ---------------------------------------------------------------------------------------


def training(names: str = "abc", **policy: Any) -> tuple[World, dict[str, SimPeer]]:
    """A run whose peers have all begun to train from version 0 and hold a shard each; nothing is proposed yet."""
    world = World(RunPolicy(**policy))
    peers = {name: world.start(name) for name in names}
    for peer in peers.values():
        enter(world, peer)
    return world, peers


def enter(world: World, peer: SimPeer) -> None:
    talk(world, peer)
    world.act(peer, "enter")
    talk(world, peer)
    world.transfer(peer)
    world.act(peer, "lease")
    talk(world, peer)


def talk(world: World, *peers: SimPeer) -> None:
    """Everything that these peers (or all) say and are told arrives, until nobody has anything to say."""
    for _ in range(8):
        for peer in peers or list(world.peers.values()):
            world.deliver_up(peer, 100)
        for peer in peers or list(world.peers.values()):
            world.deliver_down(peer, 100)


def propose(world: World, *peers: SimPeer, read: int = 2) -> None:
    for peer in peers:
        world.act(peer, "read", read)
        world.act(peer, "propose")
        world.deliver_up(peer, 100)


def exchange(world: World, *peers: SimPeer, tag: str = OUTER) -> None:
    for peer in peers or list(world.peers.values()):
        world.exchange(peer, tag)
    talk(world, *peers)


def wait(world: World, seconds: int, *beating: SimPeer) -> None:
    """Time passes; these peers are heard meanwhile."""
    for _ in range(seconds):
        for peer in beating:
            world.act(peer, "beat")
            world.deliver_up(peer, 100)
        world.tick(1.0)


def commits(world: World) -> list[Committed]:
    return [record for record in world.journal if isinstance(record, Committed)]


def events(world: World, name: str) -> list[dict[str, Any]]:
    return [fields for event, fields in world.events if event == name]


def tell(world: World, peer: SimPeer, kind: type[Any], **fields: Any) -> list[Any]:
    """One message straight to the coordinator; returns what it answers to this peer."""
    assert world.membership is not None
    common = {"run": RUN, "generation": world.membership.generation, "incarnation": peer.incarnation}
    effects = world.membership.receive(peer.name, kind(**common | fields), world.now)
    world._obey(effects)
    return [e.message for e in effects if isinstance(e, Send) and e.incarnation == peer.incarnation]


# --- rounds ---------------------------------------------------------------------------------------------------------


def test_three_peers_commit_a_round() -> None:
    world, peers = training()
    propose(world, *peers.values())
    talk(world)
    exchange(world)
    (record,) = commits(world)
    assert (record.round, record.attempt, record.version, record.contributors) == (0, 0, 1, ("a", "b", "c"))
    assert record.tokens == 6 and record.cursors == {0: 2, 1: 2, 2: 2}
    assert {peer.version for peer in peers.values()} == {1}
    assert world.membership.status(world.now).contributors == ("a", "b", "c")  # type: ignore[union-attr]


def test_a_death_in_mid_attempt_costs_one_more_attempt_of_the_same_round_and_no_time() -> None:
    world, peers = training()
    propose(world, *peers.values())
    world.die(peers["c"])
    before = world.now
    talk(world)
    exchange(world)
    exchange(world)
    (record,) = commits(world)
    assert (record.round, record.attempt, record.contributors) == (0, 1, ("a", "b"))
    assert world.now == before and [fields["lost"] for fields in events(world, "round.shrunk")] == [["c"]]


@pytest.fixture
def needs_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of the membership's stories combines so that it needs three contributors."""
    monkeypatch.setattr(simulation, "OUTER_SPEC", replace(OUTER_SPEC, algorithm="diloco, median", needs=3))


def test_a_round_waits_until_as_many_contribute_as_it_needs(needs_three: None) -> None:
    world, peers = training("abcd", quorum=0.4)
    propose(world, peers["a"], peers["b"])
    assert not events(world, "round.short"), "it would not have begun yet"
    wait(world, 5, *peers.values())  # grace is over
    assert not events(world, "round.started")
    propose(world, peers["c"])
    talk(world)
    exchange(world)
    (record,) = commits(world)
    assert record.contributors == ("a", "b", "c")
    (short,) = events(world, "round.short")
    assert (short["contributors"], short["needs"], short["algorithm"]) == (["a", "b"], 3, "diloco, median")


def test_a_round_that_has_shrunk_below_its_need_is_not_committed(needs_three: None) -> None:
    world, peers = training()
    propose(world, *peers.values())
    talk(world)
    world.die(peers["c"])
    exchange(world, peers["a"], peers["b"])
    wait(world, 40, peers["a"], peers["b"])
    talk(world, peers["a"], peers["b"])
    assert events(world, "round.shrunk") and not commits(world)
    assert len(events(world, "round.short")) == 1, "told once"


def test_with_one_link_cut_all_three_contribute() -> None:
    world, peers = training()
    world.cuts = {frozenset("ab")}
    propose(world, *peers.values())
    talk(world)
    while not commits(world):
        exchange(world)
        world.tick(0.5)
    assert commits(world)[0].contributors == ("a", "b", "c")
    start = world.ledger.attempt(1, OUTER, 0, commits(world)[0].attempt)
    assert start.shares == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("wire, names, cuts", [("f32", "abcd", "ac bd ad"), ("int8", "abcde", "ac bd ad ae be ce")])
def test_along_a_path_all_contribute(wire: str, names: str, cuts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can talk to all others: the numbers go along a tree, as they are, since partial sums are not rounded."""
    monkeypatch.setattr(simulation, "OUTER_SPEC", replace(OUTER_SPEC, wire=wire))
    world, peers = training(names)
    world.cuts = {frozenset(pair) for pair in cuts.split()}
    propose(world, *peers.values())
    talk(world)
    while not commits(world):
        exchange(world)
        world.tick(0.5)
    record = commits(world)[0]
    assert record.contributors == tuple(names)
    start = world.ledger.attempt(1, OUTER, 0, record.attempt)
    assert (start.pattern, start.wire, start.gather_wire) == ("tree", "f32", "")
    assert {event for event, _ in world.events} >= {"link.cut", "plan.changed"}


def test_each_attempt_takes_the_wires_of_its_first_contributor_that_offers_some() -> None:
    world, peers = training()
    short, half, whole = (
        tuple(WireRun(elements=each, wire="int4", gather_wire="int8") for each in lengths)
        for lengths in ((OUTER_SPEC.elements - 1,), (128, OUTER_SPEC.elements - 128), (OUTER_SPEC.elements,))
    )
    for peer, wires in zip(peers.values(), (short, half, whole), strict=True):
        world.act(peer, "read", 2)
        world.act(peer, "propose")
        on_its_way = peer.host.up[peer.incarnation]
        on_its_way[-1] = replace(on_its_way[-1], wires=wires)
        world.deliver_up(peer, 100)
    assert world.ledger.attempt(1, OUTER, 0, 0).wires == half
    world.die(peers["b"])
    talk(world)
    exchange(world)
    exchange(world)
    (record,) = commits(world)
    assert (record.attempt, record.contributors) == (1, ("a", "c"))
    assert world.ledger.attempt(1, OUTER, 0, 1).wires == whole


def test_two_that_can_only_dial_out_are_kept_apart_from_the_first_attempt_on() -> None:
    world = World(hide=True)
    peers = {name: world.start(name) for name in "cde"}
    for peer in peers.values():
        enter(world, peer)
    propose(world, *peers.values())
    talk(world)
    exchange(world)
    (record,) = commits(world)
    assert (record.attempt, record.contributors) == (0, ("c", "d", "e"))
    assert world.ledger.attempt(1, OUTER, 0, 0).shares == (1.0, 0.0, 0.0)


def test_measured_links_change_shares_and_are_told_once() -> None:
    world, peers = training()
    for name, fast in (("a", "bc"), ("b", "a"), ("c", "a")):
        links = tuple(LinkReport(peer=other, goodput=1e8 if other in fast else 2e6, rtt=0.05) for other in "abc")
        tell(world, peers[name], Heartbeat, status=PeerStatus(links=links))
    for number in range(3):
        propose(world, *peers.values())
        talk(world)
        exchange(world)
        world.tick(1.0)
        start = world.ledger.attempt(1, OUTER, number, 0)
        assert start.chunk_bytes == FINEST and start.shares[0] > 0.9
    (told,) = events(world, "plan.changed")
    assert told["shares"]["a"] == round(start.shares[0], 4)


def test_with_the_only_link_cut_one_of_two_goes_on_and_the_other_comes_back() -> None:
    world, _peers = training("ab")
    world.cuts = {frozenset("ab")}
    assert world.run_until(lambda: len(commits(world)) >= 2)
    assert {len(record.contributors) for record in commits(world)} == {1}
    world.heal()
    assert world.run_until(lambda: commits(world)[-1].contributors == ("a", "b"))
    assert len(world.membership.members) == 2  # type: ignore[union-attr]


def test_a_first_break_is_redialled_a_second_is_a_cut() -> None:
    world, peers = training("ab")
    for attempt in range(2):
        propose(world, *peers.values()) if not attempt else None
        talk(world)
        for peer, other in ((peers["a"], peers["b"]), (peers["b"], peers["a"])):
            lost = LinkFailure(peer=other.name, incarnation=other.incarnation, evidence="eof")
            world.act(peer, "failed", peer.slots[OUTER], (lost,))
        assert not world.membership.rounds.cuts  # type: ignore[union-attr]
    talk(world)
    assert set(world.membership.rounds.cuts) == {frozenset("ab")}  # type: ignore[union-attr]


def test_a_silent_contributor_costs_the_round_not_the_membership() -> None:
    world, peers = training()
    propose(world, *peers.values())
    peers["c"].frozen = True
    talk(world)
    wait(world, 5, peers["a"], peers["b"])
    talk(world)
    exchange(world)
    assert commits(world)[0].contributors == ("a", "b") and commits(world)[0].round == 0
    assert events(world, "peer.suspected")[0]["peer"] == "c" and "c" in world.membership.members  # type: ignore[union-attr]
    peers["c"].frozen = False
    assert world.run_until(lambda: "c" in commits(world)[-1].contributors)
    assert world.ledger.samples[2, 0] == 1, "what c had learned before counts, later"


def test_a_death_after_done_undoes_nothing() -> None:
    world, peers = training()
    propose(world, *peers.values())
    talk(world)
    world.exchange(peers["c"], OUTER)
    world.deliver_up(peers["c"], 10)
    world.die(peers["c"])
    world.prove(peers["c"])
    for name in "ab":
        world.act(peers[name], "done", peers[name].slots[OUTER], peers["c"].slots[OUTER].result)
    talk(world)
    (record,) = commits(world)
    assert (record.attempt, record.contributors, record.cursors) == (0, ("a", "b", "c"), {0: 2, 1: 2, 2: 2})


def test_results_that_differ_are_not_committed() -> None:
    world, peers = training()
    propose(world, *peers.values())
    talk(world)
    world.act(peers["c"], "done", peers["c"].slots[OUTER], "other bytes")
    exchange(world)
    assert not commits(world) and events(world, "parity.mismatch")
    exchange(world)
    assert (commits(world)[0].attempt, commits(world)[0].contributors) == (1, ("a", "b", "c"))


def test_a_late_proposal_gets_the_commit_and_contributes_everything_next_time() -> None:
    world, peers = training()
    propose(world, peers["a"], peers["b"])
    wait(world, 5, *peers.values())
    propose(world, peers["c"])
    talk(world)
    exchange(world)
    world.transfer(peers["c"])
    assert commits(world)[0].contributors == ("a", "b") and peers["c"].version == 1
    talk(world)
    propose(world, *peers.values())
    talk(world)
    exchange(world)
    assert commits(world)[1].contributors == ("a", "b", "c") and commits(world)[1].tokens == 2 + 2 + 4


def test_a_quorum_opens_a_round_and_grace_ends_the_wait() -> None:
    world, peers = training()
    propose(world, peers["a"])
    wait(world, 10, *peers.values())
    assert not events(world, "round.started"), "one of three is no quorum"
    propose(world, peers["b"])
    wait(world, int(TIMES.grace) - 1, *peers.values())
    assert not events(world, "round.started")
    wait(world, 1, *peers.values())
    assert events(world, "round.started")[0]["contributors"] == ["a", "b"]


def decoupled(names: str = "abc", grace: float = 0.0, **policy: Any) -> tuple[World, dict[str, SimPeer]]:
    """Peers whose loop opens a round with one of them, and has a grace of its own; the run would wait for all."""
    world, peers = training(names, quorum=1.0, **policy)
    for peer in peers.values():
        peer.quorum, peer.grace = 1, grace
    return world, peers


def test_a_loop_may_have_a_quorum_and_a_grace_of_its_own() -> None:
    world, peers = decoupled(grace=2.0)
    propose(world, peers["b"])
    wait(world, 1, *peers.values())
    assert not events(world, "round.started"), "the grace is not over"
    propose(world, peers["a"])
    wait(world, 1, *peers.values())
    assert events(world, "round.started")[0]["contributors"] == ["a", "b"]


def test_the_shortest_grace_counts_and_min_peers_is_above_a_loops_quorum() -> None:
    world, peers = decoupled(grace=9.0, min_peers=2)
    peers["b"].grace = 1.0
    propose(world, peers["a"])
    wait(world, 20, *peers.values())
    assert not events(world, "round.started"), "one is too few"
    propose(world, peers["b"])
    wait(world, 1, *peers.values())
    assert events(world, "round.started")[0]["contributors"] == ["a", "b"]


def test_who_is_always_too_late_is_waited_for_once() -> None:
    """c proposes for the version that has just been replaced, again and again: then a round waits for it."""
    world, peers = decoupled("ac")

    def round_without_c() -> None:
        world.act(peers["a"], "lease")
        talk(world)
        propose(world, peers["a"], read=1)
        wait(world, 1, *peers.values())
        talk(world)
        exchange(world)
        world.transfer(peers["c"])
        talk(world)

    for late in range(TOO_LATE_ONCE_TOO_OFTEN):
        round_without_c()
        assert commits(world)[-1].contributors == ("a",) and len(commits(world)) == late + 1
        stale = {"tag": OUTER, "sequence": late, "base_version": late, "weight": 1.0, "spec": OUTER_SPEC}
        (answer,) = tell(world, peers["c"], Propose, **stale, cursors={})
        assert isinstance(answer, Commit), "it is told what it has missed"
    world.act(peers["a"], "lease")
    talk(world)
    propose(world, peers["a"], read=1)
    wait(world, int(TIMES.grace) - 1, *peers.values())
    assert len(events(world, "round.started")) == TOO_LATE_ONCE_TOO_OFTEN, "nobody waits for it"
    peers["c"].sequence = TOO_LATE_ONCE_TOO_OFTEN
    propose(world, peers["c"])
    talk(world)
    exchange(world)
    assert commits(world)[-1].contributors == ("a", "c")
    round_without_c()
    assert commits(world)[-1].contributors == ("a",), "once, and not again"


def test_quorum_of_all_still_goes_on_without_the_silent() -> None:
    world, peers = training(quorum=1.0)
    peers["c"].frozen = True
    propose(world, peers["a"], peers["b"])
    wait(world, 3, peers["a"], peers["b"])
    assert not events(world, "round.started")
    wait(world, 1, peers["a"], peers["b"])
    assert events(world, "round.started")[0]["contributors"] == ["a", "b"]


def test_rounds_wait_for_min_peers() -> None:
    world, peers = training("a", min_peers=2)
    propose(world, peers["a"])
    wait(world, 20, peers["a"])
    assert not events(world, "round.started")
    world.start("b")
    assert world.run_until(lambda: bool(commits(world)) and commits(world)[-1].contributors == ("a", "b"))


def test_a_round_without_weight_is_skipped_and_changes_nothing() -> None:
    world, peers = training("ab")
    propose(world, *peers.values(), read=0)
    talk(world)
    (record,) = commits(world)
    assert record.skipped and (record.round, record.version, record.tokens) == (0, 0, 0)
    propose(world, *peers.values())
    talk(world)
    exchange(world)
    assert (commits(world)[1].round, commits(world)[1].version) == (1, 1)


def test_a_peer_that_gives_nothing_gets_the_result() -> None:
    world, peers = training()
    propose(world, peers["c"], read=0)
    propose(world, peers["a"], peers["b"])
    talk(world)
    exchange(world)
    start = world.ledger.attempt(1, OUTER, 0, 0)
    assert [m.name for m in start.receivers] == ["c"] and commits(world)[0].contributors == ("a", "b")
    world.transfer(peers["c"])
    assert peers["c"].version == 1


def test_at_its_target_the_run_is_over_and_who_is_behind_still_gets_the_last_commit() -> None:
    world, peers = training("ab", rounds=1, quorum=0.4)
    peers["b"].frozen = True
    propose(world, peers["a"])
    wait(world, 5, peers["a"])
    talk(world)
    exchange(world)
    assert world.membership.progress.finished  # type: ignore[union-attr]
    world.down[peers["b"].incarnation].clear()  # the broadcast is lost
    peers["b"].frozen = False
    propose(world, peers["b"])
    talk(world)
    world.transfer(peers["b"])
    assert peers["b"].version == 1
    talk(world)
    propose(world, *peers.values())
    talk(world)
    assert len(commits(world)) == 1 and peers["a"].slots[OUTER].proposal is None


def test_after_too_many_attempts_the_round_is_given_up_and_every_input_is_untouched() -> None:
    world, peers = training("ab", max_attempts=2)
    propose(world, *peers.values())
    talk(world)
    for _ in range(2):
        for peer in peers.values():
            world.act(peer, "failed", peer.slots[OUTER], ())
        talk(world)
    assert events(world, "round.failed") and not commits(world)
    propose(world, *peers.values(), read=0)
    talk(world)
    exchange(world)
    assert commits(world)[0].round == 0 and commits(world)[0].tokens == 4


def test_attempts_of_one_round_never_share_an_identity() -> None:
    world, peers = training("ab", max_attempts=1)
    for _ in range(3):
        propose(world, *peers.values())
        talk(world)
        for peer in peers.values():
            world.act(peer, "failed", peer.slots[OUTER], ())
        talk(world)
    assert [fields["attempt"] for fields in events(world, "round.started")] == [0, 1, 2]


def test_an_attempt_that_takes_too_long_is_tried_again() -> None:
    world, peers = training("ab")
    propose(world, *peers.values())
    talk(world)
    wait(world, int(TIMES.operation) + 2, *peers.values())
    talk(world)
    assert [fields["attempt"] for fields in events(world, "round.started")] == [0, 1]


def test_a_newer_proposal_ends_the_attempt_that_has_the_older_one() -> None:
    world, peers = training("ab")
    propose(world, *peers.values())
    talk(world)
    peers["a"].slots[OUTER].close()
    propose(world, peers["a"])
    talk(world)
    exchange(world)
    exchange(world)
    (record,) = commits(world)
    assert record.contributors == ("b",) and record.attempt == 1
    propose(world, peers["b"])
    assert world.run_until(lambda: "a" in commits(world)[-1].contributors)


def test_a_caller_that_no_longer_waits_is_left_out() -> None:
    world, peers = training("ab")
    propose(world, *peers.values())
    talk(world)
    world.act(peers["a"], "give_up", OUTER)
    talk(world)
    exchange(world)
    assert commits(world)[0].contributors == ("b",)


def test_a_withdrawn_late_proposal_does_not_enter_the_next_round() -> None:
    world, peers = training()
    propose(world, peers["a"], peers["b"])
    wait(world, 5, *peers.values())
    propose(world, peers["c"])
    world.act(peers["c"], "give_up", OUTER)
    talk(world)
    assert not world.membership.operations[OUTER].late  # type: ignore[union-attr]


# --- other operations ------------------------------------------------------------------------------------------------

BROADCAST = OperationSpec(op="broadcast", dtype="int64", elements=8, wire="raw", root="b", algorithm="broadcast")
GATHER = OperationSpec(op="all_gather", dtype="int64", elements=8, wire="raw", algorithm="all_gather")


def offer(world: World, peer: SimPeer, spec: OperationSpec, sequence: int = 1) -> list[Any]:
    return tell(world, peer, Propose, tag="t", sequence=sequence, weight=1.0, cursors={}, spec=spec)


def test_a_broadcast_goes_out_from_its_root() -> None:
    world, peers = training()
    for peer in peers.values():
        answers = offer(world, peer, BROADCAST)
    (begin,) = answers
    assert begin.start.op == "broadcast" and begin.start.shares == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("root", ["b", "stranger"])
def test_a_broadcast_whose_root_does_not_come_fails_after_the_grace_and_says_who_is_missing(root: str) -> None:
    world, peers = training()
    spec = replace(BROADCAST, root=root)
    for name in "ac":
        offer(world, peers[name], spec)
    for _ in range(2):  # the second time, b is known to be absent, and waited for all the same
        wait(world, int(TIMES.grace) - 1, *peers.values())
        assert not events(world, "round.failed")
        wait(world, 1, *peers.values())
        (failed,) = events(world, "round.failed")
        assert failed["reason"] == f"its root {root} is not there; there are: a, c"
        if root != "b":
            return
        world.events.clear()
        for name in "ac":
            offer(world, peers[name], spec, sequence=2)


def test_a_broadcast_whose_root_dies_is_over() -> None:
    world, peers = training()
    for peer in peers.values():
        offer(world, peer, BROADCAST)
    world.die(peers["b"])
    world.prove(peers["b"])
    for name in "ac":
        tell(world, peers[name], FailedReport, tag="t", round=0, attempt=0, reason="aborted")
    assert events(world, "round.failed")[0]["reason"] == "its root b is not there; there are: a, c"


def test_what_is_gathered_may_differ_in_length_and_in_nothing_else() -> None:
    world, peers = training()
    for name, elements in zip("ab", (3, 0), strict=True):
        offer(world, peers[name], replace(GATHER, elements=elements))
    (refused,) = offer(world, peers["c"], replace(GATHER, dtype="int8"))
    assert refused.error == "ParityError" and "'int8' on peer c" in refused.reason
    (begin,) = offer(world, peers["c"], replace(GATHER, elements=5), sequence=2)
    assert begin.start.segments == (3, 0, 5) and begin.start.elements == 8


@pytest.mark.parametrize("elements", [-1, 1 << 60])
def test_an_impossible_length_is_refused(elements: int) -> None:
    world, peers = training("a")
    (answer,) = offer(world, peers["a"], replace(GATHER, elements=elements))
    assert answer.error == "ConfigurationError" and not world.membership.operations  # type: ignore[union-attr]


# --- joining, founding, state ---------------------------------------------------------------------------------------


def test_a_joiner_that_never_finishes_delays_nobody() -> None:
    world, _ = training("ab")
    world.start("j").stuck = True
    before, began = len(commits(world)), world.now
    assert world.run_until(lambda: len(commits(world)) >= before + 10)
    alone, _ = training("ab")
    start = alone.now
    assert alone.run_until(lambda: len(commits(alone)) >= 10)
    assert world.now - began == alone.now - start


def test_a_joiner_enters_at_a_boundary_and_contributes() -> None:
    world, _ = training("ab")
    assert world.run_until(lambda: world.ledger.version >= 3)
    joiner = world.start("j")
    assert world.run_until(lambda: "j" in commits(world)[-1].contributors)
    assert joiner.version == world.ledger.version


def test_if_the_founder_dies_before_anybody_has_its_state_the_next_founds() -> None:
    world = World()
    founder, other = world.start("a"), world.start("b")
    talk(world)
    world.act(founder, "enter")
    world.deliver_up(founder, 10)
    world.act(other, "enter")
    talk(world, other)
    assert other.mode == "entering" and other.fetching is None, "the founder is about to hold it"
    world.die(founder)
    world.prove(founder)
    enter(world, other)
    assert other.version == 0 and other.states[0] == other.own_state


def test_a_new_life_under_the_founders_name_is_not_the_founder() -> None:
    world = World()
    first = world.start("a")
    talk(world)
    world.act(first, "enter")
    world.deliver_up(first, 10)
    world.die(first)
    second = world.start("a")
    enter(world, second)
    assert second.version == 0


def test_a_contribution_measured_from_another_founders_state_is_refused() -> None:
    world, peers = training("a")
    stranger = world.start("b")
    talk(world)
    fields = {"tag": OUTER, "sequence": 1, "weight": 1.0, "cursors": {}, "spec": OUTER_SPEC, "base_version": 0}
    (answer,) = tell(world, stranger, Propose, base_hash="another", **fields)
    assert isinstance(answer, Represent), "it has not said what it holds"
    (answer,) = tell(world, stranger, Applied, tag=OUTER, fragment=0, version=0, state_hash="another")
    assert isinstance(answer, Base) and answer.state_hash == peers["a"].states[0]
    assert OUTER not in world.membership.operations  # type: ignore[union-attr]
    assert events(world, "parity.mismatch")[0]["peer"] == "b"


def test_a_peer_that_fetched_something_else_than_the_run_holds_is_named_and_fetches_again() -> None:
    world, peers = training("ab")
    (answer,) = tell(world, peers["b"], Applied, tag=OUTER, fragment=0, version=0, state_hash="drifted")
    assert isinstance(answer, Base) and [member.name for member in answer.sources] == ["a"]
    assert events(world, "parity.mismatch")[0] | {"held": "drifted"} == events(world, "parity.mismatch")[0]
    member = world.membership.members["b"]  # type: ignore[union-attr]
    assert OUTER not in member.trains and member.repaired == 1


def test_results_come_from_those_who_applied_them_when_the_contributors_are_gone() -> None:
    world, peers = training("abcd", quorum=0.4)
    propose(world, peers["a"], peers["b"])
    wait(world, 5, *peers.values())
    talk(world, peers["a"], peers["b"], peers["c"])
    exchange(world, peers["a"], peers["b"], peers["c"])
    world.transfer(peers["c"])
    talk(world, peers["c"])
    for name in "ab":
        world.die(peers[name])
        world.start(name)
    talk(world)
    commit = peers["d"].wanted.get(1)
    assert peers["c"].version == 1 and commit is not None
    world.act(peers["d"], "ask_again")
    talk(world)
    assert [member.name for member in peers["d"].wanted[1].sources] == ["c"]
    world.transfer(peers["d"])
    assert peers["d"].version == 1


def test_a_receiver_whose_own_copy_is_the_last_gets_the_commit() -> None:
    world, peers = training("ab")
    propose(world, peers["b"], read=0)
    propose(world, peers["a"])
    talk(world)
    for peer in peers.values():
        world.exchange(peer, OUTER)
    world.crash = "after"
    world.deliver_up(peers["a"], 10)
    world.die(peers["a"])
    world.prove(peers["a"])
    world.restart()
    assert world.run_until(lambda: peers["b"].version >= 2)


def test_peers_that_are_far_behind_keep_nobody_waiting() -> None:
    world, peers = training("abc", quorum=0.3)
    for name in "bc":
        peers[name].frozen = True
    assert world.run_until(lambda: world.ledger.version >= 6)
    world.heal()
    for name in "bc":
        peers[name].stuck = True
    before = world.ledger.version
    assert world.run_until(lambda: world.ledger.version >= before + 2)


def test_nobody_left_that_holds_the_state_is_said() -> None:
    world, peers = training("a")
    assert world.run_until(lambda: world.ledger.version >= 1)
    world.die(peers["a"])
    world.prove(peers["a"])
    late = world.start("b")
    enter(world, late)
    assert not late.refusals, "others may still come with a checkpoint"
    wait(world, int(TIMES.grace) + 1, late)
    world.act(late, "enter")
    talk(world)
    assert late.refusals[-1].error == "NoSource" and "version 1" in late.refusals[-1].reason


# --- parity, versions, names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field, value", [("op", "sum"), ("elements", 9), ("wire", "int8"), ("algorithm", "noloco")])
def test_a_mismatch_names_both_values(field: str, value: Any) -> None:
    world, _ = training("a")
    peer = world.start("b")
    talk(world)
    spec = replace(OUTER_SPEC, **{field: value})
    (answer,) = tell(world, peer, Enter, tag=OUTER, spec=spec, state_hash="x")
    assert answer.error == "ParityError"
    assert field in answer.reason and repr(value) in answer.reason and repr(getattr(OUTER_SPEC, field)) in answer.reason


def test_a_mismatch_in_a_plain_operation_is_refused_to_the_second() -> None:
    world, peers = training("ab")
    world.act(peers["a"], "reduce")
    talk(world)
    spec = replace(PLAIN_SPEC, elements=3)
    (answer,) = tell(world, peers["b"], Propose, tag=PLAIN, sequence=5, weight=1.0, cursors={}, spec=spec)
    assert (answer.error, answer.tag, answer.sequence) == ("ParityError", PLAIN, 5)


def test_a_tag_is_either_of_a_loop_or_of_plain_operations() -> None:
    world, peers = training("ab")
    fields = {"sequence": 1, "weight": 1.0, "cursors": {}, "spec": OUTER_SPEC}
    (answer,) = tell(world, peers["a"], Propose, tag=OUTER, **fields)
    assert answer.error == "ParityError" and OUTER not in world.membership.operations  # type: ignore[union-attr]


def test_another_protocol_version_is_refused() -> None:
    world, _peers = training("a")
    joiner = SimPeer("n", 77)
    (answer,) = tell(world, joiner, Join, member=joiner.member, site="here", protocol=99)
    assert answer.error == "VersionMismatch" and "99" in answer.reason
    assert "n" not in world.membership.members  # type: ignore[union-attr]


def test_another_run_is_refused() -> None:
    world, peers = training("a")
    before = len(world.journal)
    (answer,) = tell(world, peers["a"], Heartbeat, run="other", status=PeerStatus())
    assert answer.error == "ConfigurationError" and RUN in answer.reason and len(world.journal) == before


@pytest.mark.parametrize("member", [Member(name="other", incarnation=77), Member(name="n", incarnation=78)])
def test_a_join_in_another_name_changes_nothing(member: Member) -> None:
    world, _ = training("a")
    (answer,) = tell(world, SimPeer("n", 77), Join, member=member, site="here")
    assert answer.error == "ConfigurationError" and set(world.membership.members) == {"a"}  # type: ignore[union-attr]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0, 1e300])
def test_an_impossible_weight_is_refused(weight: float) -> None:
    world, peers = training("a")
    fields = {"tag": OUTER, "sequence": 1, "cursors": {}, "spec": OUTER_SPEC, "base_version": 0}
    (answer,) = tell(world, peers["a"], Propose, weight=weight, **fields)
    assert answer.error == "ConfigurationError" and not world.membership.operations  # type: ignore[union-attr]


# --- lives, silence, proof ------------------------------------------------------------------------------------------


def test_silence_ends_a_membership_only_after_evict_after() -> None:
    world, peers = training("ab")
    wait(world, int(TIMES.evict_after), peers["a"])
    assert "b" in world.membership.members  # type: ignore[union-attr]
    wait(world, 1, peers["a"])
    assert "b" not in world.membership.members and "silent" in events(world, "peer.evicted")[0]["evidence"]  # type: ignore[union-attr]
    talk(world)
    assert "silent" in peers["b"].expelled


def test_one_departure_that_uncovers_another_reaches_every_operation() -> None:
    world, peers = training("bce")
    for peer in peers.values():
        world.act(peer, "reduce")
    talk(world)
    propose(world, peers["c"], peers["e"])
    world.die(peers["b"])
    lost = LinkFailure(peer="b", incarnation=peers["b"].incarnation, evidence="refused")
    world.act(peers["e"], "failed", peers["e"].slots[PLAIN], (lost,))
    world.die(peers["c"])
    talk(world, peers["e"])
    world.prove(peers["c"])
    assert set(world.membership.members) == {"e"}  # type: ignore[union-attr]
    talk(world)
    exchange(world, tag=PLAIN)
    exchange(world)
    assert commits(world)[0].contributors == ("e",)


def test_after_a_gap_in_its_own_clock_the_coordinator_blames_nobody() -> None:
    world, _peers = training("ab")
    world.tick(100.0)
    wait(world, int(TIMES.chunk))
    assert not events(world, "peer.suspected") and len(world.membership.members) == 2  # type: ignore[union-attr]


def test_a_new_life_takes_over_and_the_old_one_changes_nothing() -> None:
    world, peers = training("ab")
    old = peers["a"]
    new = world.start("a")
    talk(world, new)
    propose(world, old)  # compared with the durable state before, in `to_coordinator`
    talk(world)
    assert "another life" in old.expelled and world.membership.members["a"].life == 2  # type: ignore[union-attr]
    assert OUTER not in world.membership.operations  # type: ignore[union-attr]


def test_whoever_leaves_a_loop_is_not_waited_for() -> None:
    world, peers = training("ab")
    tell(world, peers["b"], Exit, tag=OUTER)
    propose(world, peers["a"])
    assert events(world, "round.started")[0]["contributors"] == ["a"]


def test_the_status_report_says_who_is_there_and_how() -> None:
    world, peers = training("ab")
    tell(world, peers["a"], Heartbeat, status=PeerStatus(step=7))
    wait(world, 4, peers["a"])
    (report,) = tell(world, SimPeer("anybody", 5), StatusRequest)
    by_name = {member.name: member for member in report.members}
    assert by_name["b"].state == "suspect" and by_name["a"].state == "active" and by_name["a"].version == 0


# --- the coordinator's own lives ------------------------------------------------------------------------------------


def restarted(world: World) -> None:
    world.kill_coordinator()
    world.restart()


def test_a_restart_while_proposals_are_gathered() -> None:
    world, peers = training()
    propose(world, peers["a"], peers["b"])
    restarted(world)
    assert world.run_until(lambda: bool(commits(world)))
    assert commits(world)[0].contributors == ("a", "b", "c") and commits(world)[0].round == 0


def test_a_restart_in_mid_attempt() -> None:
    world, peers = training()
    propose(world, *peers.values())
    talk(world)
    world.exchange(peers["a"], OUTER)
    restarted(world)
    assert world.run_until(lambda: bool(commits(world)))
    assert commits(world)[0].contributors == ("a", "b", "c") and commits(world)[0].tokens == 6


@pytest.mark.parametrize("crash, again", [("after", 0), ("before", 1)])
def test_a_crash_around_the_durable_commit(crash: str, again: int) -> None:
    world, peers = training("ab")
    propose(world, *peers.values())
    talk(world)
    for peer in peers.values():
        world.exchange(peer, OUTER)
    world.deliver_up(peers["a"], 10)
    world.crash = crash
    world.deliver_up(peers["b"], 10)
    assert world.membership is None and len(commits(world)) == 1 - again
    world.restart()
    assert world.run_until(lambda: min(peer.version for peer in peers.values()) >= 1)
    assert commits(world)[0].contributors == ("a", "b") and commits(world)[0].tokens == 4


def test_the_first_to_come_back_does_not_run_a_round_alone() -> None:
    world, peers = training()
    restarted(world)
    world.act(peers["a"], "beat")
    talk(world, peers["a"])
    propose(world, peers["a"])
    world.tick(1.0)
    assert not events(world, "round.started")


def test_after_a_restart_a_joiner_waits_for_members_that_have_not_said_what_they_hold() -> None:
    world, _peers = training("a")
    assert world.run_until(lambda: world.ledger.version >= 1)
    restarted(world)
    joiner = world.start("j")
    talk(world, joiner)
    for _ in range(8):
        world.act(joiner, "enter")
        talk(world, joiner)
        wait(world, 1, joiner)
    assert not joiner.refusals and joiner.mode == "entering"
    assert world.run_until(lambda: joiner.version >= 1)


@pytest.mark.parametrize("order", ["abc", "bca"])
def test_a_plain_operation_in_doubt_is_settled_by_whoever_saw_the_commit(order: str) -> None:
    world, peers = training()
    for peer in peers.values():
        world.act(peer, "reduce")
    talk(world)
    for peer in peers.values():
        world.exchange(peer, PLAIN)
        world.deliver_up(peer, 10)
    world.deliver_down(peers["a"], 10)
    restarted(world)
    for name in order:
        world.act(peers[name], "beat")
        world.deliver_up(peers[name], 10)
        world.deliver_down(peers[name], 10)
        talk(world, peers[name])
    talk(world)
    outcomes = [peer.plain_outcomes[0] for peer in peers.values()]
    assert all(outcome is not None for outcome in outcomes)
    assert len({(outcome.round, outcome.digest) for outcome in outcomes if outcome}) == 1


def test_a_note_about_an_outer_loop_is_no_commit() -> None:
    world, peers = training("ab")
    note = CommitNote(tag=OUTER, round=9, attempt=0, digest="x", contributors=("a",))
    tell(world, peers["a"], Join, member=peers["a"].member, site="here", commits=(note,))
    assert OUTER not in world.membership.rounds.commits  # type: ignore[union-attr]


# --- data -----------------------------------------------------------------------------------------------------------


def leased(world: World, peer: SimPeer, holding: tuple[int, ...] = (), **fields: int) -> Leases:
    data = {"samples": 60, "shard_size": 6, "seed": 3, "epochs": 0} | fields
    (answer,) = tell(world, peer, LeaseRequest, holding=holding, **data)
    assert isinstance(answer, Leases), answer
    return answer


def test_the_next_life_reads_on_from_the_committed_cursor_of_the_same_shard() -> None:
    world, peers = training("ab")
    propose(world, *peers.values())
    talk(world)
    exchange(world)
    propose(world, peers["b"])  # read, proposed, and lost with it
    world.die(peers["b"])
    successor = world.start("b")
    talk(world)
    assert leased(world, successor).shards == {1: 2}


def test_a_departed_peers_shard_goes_to_others_after_evict_after() -> None:
    world, peers = training("ab")
    world.die(peers["b"])
    world.prove(peers["b"])
    assert leased(world, peers["a"], (0,)).shards == {0: 0, 2: 0}
    wait(world, int(TIMES.evict_after) + 1, peers["a"])
    assert [record for record in world.journal if isinstance(record, Released)] == [Released(name="b")]
    assert leased(world, peers["a"], (0, 2)).shards == {0: 0, 1: 0, 2: 0}


def test_the_deadline_of_a_lost_holder_starts_anew_with_the_coordinator() -> None:
    world, peers = training("ab")
    world.die(peers["b"])
    world.prove(peers["b"])
    wait(world, int(TIMES.evict_after) - 1, peers["a"])
    restarted(world)
    talk(world)
    wait(world, int(TIMES.evict_after), peers["a"])
    assert not events(world, "shard.released")
    wait(world, 1, peers["a"])
    assert events(world, "shard.released") == [{"peer": "b", "shards": [1]}]


def test_who_leaves_gives_its_shards_back_at_once() -> None:
    world, peers = training("ab")
    world.act(peers["b"], "leave")
    talk(world)
    assert leased(world, peers["a"], (0,)).shards == {0: 0, 1: 0}


def test_a_shard_waits_until_the_contribution_of_its_last_holder_is_decided() -> None:
    world, peers = training("ab")
    propose(world, *peers.values())
    talk(world)
    world.exchange(peers["b"], OUTER)
    world.act(peers["b"], "leave")
    talk(world, peers["b"])
    assert 1 not in leased(world, peers["a"], (0,)).shards
    exchange(world, peers["a"])
    assert commits(world)[0].contributors == ("a", "b")
    assert leased(world, peers["a"], (0, 2)).shards[1] == 2


def test_what_a_member_proposes_about_its_own_shards_keeps_nobody_from_the_end_of_the_data() -> None:
    """A peer that asked on and on while the others waited for its proposal stopped the run."""
    world = World()
    a, b = world.start("a"), world.start("b")
    talk(world)
    data = {"samples": 10, "shard_size": 5, "epochs": 1}
    assert leased(world, a, **data).shards == {0: 0} and leased(world, b, **data).shards == {1: 0}
    tell(world, a, Propose, tag=PLAIN, sequence=1, weight=1.0, cursors={0: 5}, spec=PLAIN_SPEC)
    assert leased(world, b, (1,), **data).spent


def test_a_finite_number_of_epochs_ends() -> None:
    world = World()
    peer = world.start("a")
    talk(world)
    shards: dict[int, int] = {}
    for _ in range(4):
        answer = leased(world, peer, tuple(shards), samples=10, shard_size=5, epochs=2)
        assert not answer.spent
        shards = answer.shards
    assert shards == {0: 0, 1: 0, 2: 0, 3: 0}
    assert leased(world, peer, tuple(shards), samples=10, shard_size=5, epochs=2).spent


def test_a_run_whose_data_is_spent_is_finished() -> None:
    world, _peers = training("a")
    membership = world.membership
    assert membership is not None and membership.table is not None
    membership.table.epochs, membership.table.committed = 1, 59
    assert not membership.progress.finished
    membership.table.committed = 60
    assert membership.progress.finished


def test_who_trained_and_finds_nobody_else_with_the_state_is_told_so() -> None:
    world, peers = training("abc", quorum=0.3)
    propose(world, peers["a"], peers["b"])
    wait(world, int(TIMES.grace) + 1, *peers.values())
    talk(world, peers["a"], peers["b"])
    exchange(world, peers["a"], peers["b"])
    for name in "ab":
        world.act(peers[name], "leave")
        talk(world, peers[name])
    assert not tell(world, peers["c"], Enter, tag=OUTER, spec=OUTER_SPEC, state_hash="whatever")
    wait(world, int(TIMES.grace) + 1, peers["c"])
    (refused,) = tell(world, peers["c"], Enter, tag=OUTER, spec=OUTER_SPEC, state_hash="whatever")
    assert isinstance(refused, Refused) and refused.error == "NoSource"


def test_asking_again_leases_nothing_more() -> None:
    world = World()
    peer = world.start("a")
    talk(world)
    assert leased(world, peer) == leased(world, peer)
    assert len([record for record in world.journal if isinstance(record, Leased)]) == 1


def test_everything_can_be_handed_back() -> None:
    world, peers = training("ab")
    assert leased(world, peers["a"], samples=0).shards == {}
    assert 0 in leased(world, peers["b"], (1,)).shards


def test_other_data_is_refused_naming_both() -> None:
    world, peers = training("a")
    (answer,) = tell(world, peers["a"], LeaseRequest, samples=61, shard_size=6, seed=3, epochs=0)
    assert answer.error == "ParityError" and "61" in answer.reason and "60" in answer.reason


@pytest.mark.parametrize("samples, shard_size, epochs", [(-2, 6, 0), (60, 0, 0), (60, -1, 0), (60, 6, -1)])
def test_impossible_data_is_refused_and_not_remembered(samples: int, shard_size: int, epochs: int) -> None:
    world = World()
    peer = world.start("a")
    talk(world)
    (answer,) = tell(world, peer, LeaseRequest, samples=samples, shard_size=shard_size, seed=0, epochs=epochs)
    assert answer.error == "ConfigurationError"
    assert not any(isinstance(record, DatasetRegistered) for record in world.journal)


def test_anybody_may_ask_for_the_audit() -> None:
    world, peers = training("ab")
    propose(world, *peers.values())
    talk(world)
    exchange(world)
    assert world.membership is not None
    (send,) = world.membership.receive("inquirer", AuditRequest(run=RUN, incarnation=9), world.now)
    assert isinstance(send, Send) and send.incarnation == 9 and isinstance(send.message, AuditReport)
    (epoch,) = send.message.epochs
    assert (epoch.samples, epoch.committed, send.message.passed) == (60, 4, True)
    assert [(shard.shard, shard.holder, shard.cursor) for shard in epoch.open] == [(0, "a", 2), (1, "b", 2)]


def test_two_contributions_that_claim_the_same_samples_are_found() -> None:
    world, peers = training("ab")
    propose(world, *peers.values())
    talk(world)
    operation = world.membership.operations[OUTER]  # type: ignore[union-attr]
    operation.proposals["b"] = replace(operation.proposals["b"], cursors={0: 2}, starts={0: 0})
    assert world.membership is not None
    world.membership.rounds._decide(operation, digest="d", contributors=("a", "b"), now=world.now)
    report = world.membership.audit()
    assert (report.committed, report.twice, report.passed) == (2, 2, False)


def streamed(world: World, peer: SimPeer, **fields: Any) -> Any:
    data = {"samples": STREAM, "shard_size": 6, "seed": 0, "epochs": 2} | fields
    (answer,) = tell(world, peer, LeaseRequest, **data)
    return answer


def test_the_end_of_a_stream_is_journaled_once_and_told() -> None:
    world = World()
    a, b = world.start("a"), world.start("b")
    talk(world)
    assert streamed(world, a).shards == {0: 0} and streamed(world, b).shards == {1: 0}
    assert streamed(world, b, holding=(1,), ends={0: 9}).shards == {1: 0, 1 << 32: 0}
    answer = streamed(world, a, holding=(0,), ends={0: 9})
    assert answer.ends == {0: 9} and answer.shards == {0: 0, (1 << 32) + 1: 0}
    assert [record for record in world.journal if isinstance(record, StreamEnded)] == [StreamEnded(epoch=0, samples=9)]
    world.check_replay()


@pytest.mark.parametrize("ends", [{0: 8}, {0: 0}, {0: -3}, {1: 3}, {-1: 3}, {0: 1 << 40}, {1 << 30: 9}])
def test_an_end_that_cannot_be_is_refused(ends: dict[int, int]) -> None:
    world = World()
    peer = world.start("a")
    talk(world)
    streamed(world, peer)
    assert streamed(world, peer, holding=(0,)).shards == {0: 0, 1: 0}
    streamed(world, peer, holding=(0, 1), ends={0: 9}) if ends == {0: 8} else None
    answer = streamed(world, peer, holding=(0, 1), ends=ends)
    assert answer.error == "ParityError" and "same on all peers" in answer.reason
    assert leased_stream_ends(world) == ({0: 9} if ends == {0: 8} else {})


def leased_stream_ends(world: World) -> dict[int, int]:
    assert world.membership is not None and world.membership.table is not None
    return world.membership.table.ends


# --- targets --------------------------------------------------------------------------------------------------------


def train_a_round(world: World, *peers: SimPeer) -> None:
    propose(world, *peers)
    talk(world)
    exchange(world)


def finished(world: World) -> bool:
    assert world.membership is not None
    return world.membership.progress.finished


@pytest.mark.parametrize("way", ["policy", "message"])
@pytest.mark.parametrize("target, rounds", [({"rounds": 2}, 2), ({"tokens": 7}, 2), ({"tokens": 4}, 1)])
def test_a_run_ends_at_its_rounds_or_tokens(way: str, target: dict[str, int], rounds: int) -> None:
    world, peers = training("ab", **(target if way == "policy" else {}))
    if way == "message":
        tell(world, peers["a"], SetTarget, **target)
        restarted(world)
        talk(world)
    for number in range(rounds):
        assert not finished(world), f"after {number} rounds"
        train_a_round(world, *peers.values())
        assert world.run_until(lambda number=number: len(commits(world)) > number)  # type: ignore[misc]
    assert finished(world)


def test_a_run_ends_after_its_seconds_which_count_while_a_coordinator_serves_it() -> None:
    world, peers = training("ab", seconds=20.0)
    for _ in range(3):
        train_a_round(world, *peers.values())
        wait(world, 4, *peers.values())
        world.kill_coordinator()
        wait(world, 100)  # nobody serves it: these do not count
        world.restart()
        talk(world)
        assert not finished(world)
        assert world.run_until(lambda: all(peer.joined for peer in peers.values()), turns=2)
    wait(world, 21, *peers.values())
    assert finished(world) and events(world, "run.target_reached")[0]["target"] == "20 s"
    restarted(world)
    assert finished(world), "what is reached is durable"


def test_seconds_do_not_count_before_there_is_anything_to_train() -> None:
    world = World(RunPolicy(seconds=5.0))
    peer = world.start("a")
    talk(world)
    wait(world, 30, peer)
    assert not finished(world)


def test_a_held_out_loss_at_the_target_ends_the_run_for_good() -> None:
    world, peers = training("ab", loss=2.5)
    for loss in (float("nan"), 2.6):
        tell(world, peers["a"], Heartbeat, status=PeerStatus(held_out_loss=loss))
        assert not finished(world)
    tell(world, peers["a"], Heartbeat, status=PeerStatus(held_out_loss=2.5))
    assert finished(world) and "2.5 on a" in events(world, "run.target_reached")[0]["target"]
    restarted(world)
    assert finished(world)
    train_a_round(world, *peers.values())
    assert not commits(world)


def test_a_target_that_is_set_lasts_and_leaves_the_others_as_they_are() -> None:
    world, peers = training("ab", rounds=50)
    tell(world, peers["a"], SetTarget, tokens=99, loss=1.5)
    tell(world, peers["a"], SetTarget, tokens=99)  # nothing new: nothing written
    tell(world, peers["a"], SetTarget, tokens=-1)
    targeted = Targeted(rounds=50, tokens=99, seconds=0.0, loss=1.5)
    assert [record for record in world.journal if isinstance(record, Targeted)] == [targeted]
    restarted(world)
    assert world.membership is not None
    assert world.membership.targets == {"rounds": 50, "tokens": 99, "seconds": 0.0, "loss": 1.5}


def test_who_drains_opens_the_round_at_once() -> None:
    world, peers = training()
    world.act(peers["a"], "read", 2)
    fields = {"tag": OUTER, "sequence": 1, "weight": 2.0, "cursors": {0: 2}, "spec": OUTER_SPEC, "base_version": 0}
    tell(world, peers["a"], Propose, **fields)
    asked = [m for name in "bc" for m in world.down[peers[name].incarnation] if isinstance(m, Open)]
    assert not asked, "one of three is no quorum"
    tell(world, peers["a"], Propose, **fields | {"sequence": 2, "leaving": True})
    asked = [m for name in "bc" for m in world.down[peers[name].incarnation] if isinstance(m, Open)]
    assert [message.round for message in asked] == [0, 0]
    wait(world, int(TIMES.grace), *peers.values())
    assert events(world, "round.started")[0]["contributors"] == ["a"]


# --- parity, void lines, checkpoints --------------------------------------------------------------------------------


def test_the_one_that_drifted_is_named_repaired_and_trains_on_from_the_true_state() -> None:
    world, peers = training()
    world.corrupt(peers["b"])
    train_a_round(world, *peers.values())
    assert [fields["peer"] for fields in events(world, "parity.mismatch")] == ["b"]
    assert world.membership is not None and world.membership.members["b"].repaired == 1
    assert world.run_until(lambda: "b" in commits(world)[-1].contributors and world.ledger.version >= 3)
    assert {peer.states[peer.version] for peer in peers.values() if peer.version == world.ledger.version} == {
        world.ledger.truth
    }


def test_one_against_one_the_one_that_cannot_do_it_again_was_wrong() -> None:
    world, peers = training("ab")
    world.corrupt(peers["a"])
    train_a_round(world, *peers.values())
    assert [fields["peer"] for fields in events(world, "parity.mismatch")] == ["a"]
    assert not events(world, "parity.undecided")


def test_without_a_decision_everybody_stops_and_hears_why() -> None:
    world, peers = training("ab")
    world.corrupt(peers["a"])
    propose(world, *peers.values())
    talk(world)
    for peer in peers.values():
        world.exchange(peer, OUTER)
    for name in "ab":
        peers[name].before = "its previous version is lost"  # nobody can do it again
    talk(world)
    for name, held in (("a", "x"), ("b", "y")):
        tell(world, peers[name], Applied, tag=OUTER, fragment=0, version=1, state_hash=held, computed=True)
        tell(world, peers[name], Recomputed, tag=OUTER, fragment=0, version=1, state_hash="")
    wait(world, int(TIMES.operation) + 2, *peers.values())
    assert events(world, "parity.undecided")
    talk(world)
    assert {peer.mode for peer in peers.values()} == {"stopped"}
    assert all(peer.refusals[-1].error == "ParityError" for peer in peers.values())
    fields = {"tag": OUTER, "sequence": 9, "weight": 1.0, "cursors": {}, "spec": OUTER_SPEC, "base_version": 1}
    (answer,) = tell(world, peers["a"], Propose, **fields)
    assert isinstance(answer, Refused) and answer.error == "ParityError", "whoever missed it hears it when it asks"


def test_claims_of_those_that_are_silent_for_a_moment_count() -> None:
    world, peers = training()
    world.drifted = True
    train_a_round(world, *peers.values())
    membership = world.membership
    assert membership is not None and world.ledger.version == 1
    membership.members["b"].silent = membership.members["c"].silent = True
    tell(world, peers["a"], Applied, tag=OUTER, fragment=0, version=1, state_hash="other", computed=True)
    assert [fields["peer"] for fields in events(world, "parity.mismatch")] == ["a"]


def test_who_computed_it_decides_over_who_fetched_it() -> None:
    world, peers = training()
    world.drifted = True
    train_a_round(world, *peers.values())
    restarted(world)
    for peer in peers.values():
        tell(world, peer, Join, member=peer.member, site="here")
    common = {"tag": OUTER, "fragment": 0, "version": 1}
    tell(world, peers["a"], Applied, state_hash="fetched from one that had drifted", **common)
    true = peers["b"].states[1]
    answers = tell(world, peers["b"], Applied, state_hash=true, computed=True, **common)
    assert not [each for each in answers if isinstance(each, Base)]
    assert [fields["peer"] for fields in events(world, "parity.mismatch")] == ["a"]
    assert world.membership is not None and world.membership.loops[OUTER].hashes[0, 1] == true


@pytest.mark.parametrize("version", [1, 2, 7])
def test_who_holds_a_version_of_a_void_line_is_led_back_and_neither_named_nor_counted(version: int) -> None:
    world, peers = training()
    for _ in range(2):
        train_a_round(world, *peers.values())
    assert world.ledger.version == 2
    void = {"version": version, "state_hash": "void", "computed": True, "digest": "of a round that is void"}
    (answer,) = tell(world, peers["c"], Applied, tag=OUTER, fragment=0, **void)
    assert isinstance(answer, Base) and answer.version == 2 and answer.state_hash == world.ledger.truth
    assert events(world, "peer.led_back")[0]["peer"] == "c" and not events(world, "parity.mismatch")


def test_who_holds_the_result_of_a_round_that_is_over_hears_so() -> None:
    world, peers = training("ab", max_attempts=1)
    propose(world, *peers.values())
    talk(world)
    for peer in peers.values():
        world.act(peer, "failed", peer.slots[OUTER], ())
        world.deliver_up(peer, 10)
    (answer,) = tell(world, peers["a"], DoneReport, tag=OUTER, round=0, attempt=0, digest="held")
    assert isinstance(answer, Cancel) and answer.abort.attempt == 0
    talk(world)
    train_a_round(world, *peers.values())
    assert len(commits(world)) == 1
    (commit,) = tell(world, peers["a"], DoneReport, tag=OUTER, round=0, attempt=1, digest=commits(world)[0].digest)
    assert isinstance(commit, Commit)


def offered(world: World, name: str, kept: Checkpoint) -> SimPeer:
    """A new life of this name, with a checkpoint, that has asked to enter."""
    peer = world.start(name)
    peer.disk = kept
    talk(world, peer)
    world.act(peer, "enter")
    talk(world, peer)
    return peer


def checkpoints(world: World, peers: dict[str, SimPeer], rounds: int) -> list[Checkpoint]:
    kept = []
    for _ in range(rounds):
        train_a_round(world, *peers.values())
        kept.append(peers["a"].saved[peers["a"].version])
    return kept


def test_a_run_resumes_from_its_last_decision_at_once_and_from_an_older_one_after_the_grace() -> None:
    for age, waited in ((1, 0), (2, int(TIMES.grace))):
        world, peers = training("ab")
        kept = checkpoints(world, peers, 2)
        for peer in peers.values():
            world.die(peer)
            world.prove(peer)
        back = offered(world, "a", kept[-age])
        assert (back.mode == "training") is (waited == 0)
        wait(world, waited, back)
        world.act(back, "enter")
        talk(world, back)
        assert back.mode == "training" and back.version == 3 - age == world.ledger.version
        assert len(events(world, "run.rolled_back")) == age - 1


def test_members_that_hold_an_older_version_are_asked_for_it() -> None:
    world, peers = training("ab", quorum=0.3)
    propose(world, peers["a"])
    wait(world, int(TIMES.grace) + 1, *peers.values())
    talk(world, peers["a"])
    exchange(world, peers["a"])
    assert world.ledger.version == 1
    world.die(peers["a"])
    world.prove(peers["a"])
    assert world.run_until(lambda: peers["b"].mode == "training" and len(commits(world)) > 1)
    assert events(world, "run.rolled_back")[0]["version"] == 0


def test_who_is_behind_with_nobody_ahead_is_asked_for_what_it_has() -> None:
    world, peers = training("ab")
    train_a_round(world, *peers.values())
    membership = world.membership
    assert membership is not None
    membership.rounds.commits.clear()
    for name in "ab":
        membership.members[name].held.clear()
    (answer,) = tell(world, peers["a"], Applied, tag=OUTER, fragment=0, version=0, state_hash=peers["a"].before)
    assert isinstance(answer, Base) and answer.version == 1 and answer.sources == ()


def test_a_checkpoint_of_another_line_with_the_same_figures_is_not_the_last_decision() -> None:
    world, peers = training("ab")
    kept = checkpoints(world, peers, 1)[0]
    state = RunState.from_bytes(kept.state)
    other = kept._replace(state=replace(state, serial=state.serial + 5).to_bytes(), state_hash="of a void line")
    membership = world.membership
    assert membership is not None
    offer = Offer("x", 1, 1, other.state_hash, RunState.from_bytes(other.state))
    assert not membership.outer._is_newest(offer, OUTER, 0)
    assert membership.outer._is_newest(replace(offer, state=state), OUTER, 0)


def test_the_checkpoint_of_one_that_drifted_is_outvoted() -> None:
    world, peers = training("abc")
    kept = checkpoints(world, peers, 1)[0]
    restarted(world)
    membership = world.membership
    assert membership is not None
    state = RunState.from_bytes(kept.state)
    membership.outer._offers[OUTER] = {
        name: Offer(name, 1, 1, held, state) for name, held in (("a", "x"), ("b", "x"), ("z", "drifted"))
    }
    best = membership.outer._best_offer(OUTER, 0)
    assert best is not None and best.state_hash == "x"


def test_an_offer_goes_with_its_peer() -> None:
    world, peers = training("ab")
    kept = checkpoints(world, peers, 1)[0]
    fresh = World()
    back = offered(fresh, "a", kept)
    fresh.act(back, "leave")
    talk(fresh, back)
    assert fresh.membership is not None and not any(fresh.membership.outer._offers.values())


def test_what_was_read_under_a_lease_that_is_lost_does_not_count() -> None:
    world, peers = training("ab")
    fields = {"tag": OUTER, "sequence": 1, "weight": 2.0, "spec": OUTER_SPEC, "base_version": 0}
    for cursors in ({1: 2}, {7: 2}):  # another's, and nobody's
        (answer,) = tell(world, peers["a"], Propose, cursors=cursors, **fields)
        assert isinstance(answer, Base) and OUTER not in world.membership.operations  # type: ignore[union-attr]


def test_an_old_life_that_a_new_journal_does_not_know_does_not_throw_out_its_successor() -> None:
    world, peers = training("a")
    old = SimPeer("a", 77)
    assert tell(world, old, Join, member=old.member, site="here") == []
    assert world.membership is not None and world.membership.members["a"].member == peers["a"].member


# --- what no peer says ------------------------------------------------------------------------------------------------


messages = st.one_of(
    st.builds(lambda r, a: (DoneReport, {"tag": OUTER, "round": r, "attempt": a, "digest": "?"}),
              st.integers(-1, 3), st.integers(-1, 2)),
    st.builds(lambda r, a: (FailedReport, {"tag": OUTER, "round": r, "attempt": a, "reason": ""}),
              st.integers(-1, 3), st.integers(-1, 2)),
    st.builds(lambda v: (Applied, {"tag": OUTER, "fragment": 0, "version": v, "state_hash": "?"}), st.integers(-1, 3)),
    st.builds(lambda s: (Withdraw, {"tag": OUTER, "sequence": s}), st.integers(-1, 3)),
    st.builds(lambda s, w, b, f: (Propose, {"tag": OUTER, "sequence": s, "weight": w, "cursors": {0: 99, 7: -1},
                                            "spec": OUTER_SPEC, "base_version": b, "fragment": f}),
              st.integers(-1, 3), st.sampled_from([0.0, 1.0]), st.integers(-1, 2), st.integers(0, 1)),
    st.just((Exit, {"tag": "?"})),
    st.just((Enter, {"tag": OUTER, "spec": OUTER_SPEC, "fragment": 3, "state_hash": "?"})),
)  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lies=st.lists(st.tuples(st.sampled_from("abc"), messages), max_size=20))
def test_nothing_that_a_member_says_takes_the_coordinator_down(lies: list[tuple[str, Any]]) -> None:
    world, peers = training()
    propose(world, peers["a"], peers["b"])
    membership = world.membership
    assert membership is not None
    records: list[Any] = list(world.journal)
    for name, (kind, fields) in lies:
        common = {"run": RUN, "generation": 1, "incarnation": peers[name].incarnation}
        effects = membership.receive(name, kind(**common | fields), world.now)
        effects += membership.tick(world.now)
        records += [effect.record for effect in effects if hasattr(effect, "record")]
    again = Membership(RUN, RunPolicy(), TIMES)
    again.begin(records, world.now)
    assert again.tokens == membership.tokens


# --- what is wrong with whom ------------------------------------------------------------------------------------------


def measured(world: World, peers: dict[str, SimPeer], windows: int, **factors: float) -> None:
    """Windows of telemetry. factors: of delays, by sender; of steps, by "steps_of_" and the peer."""
    for _ in range(windows):
        for receiver in peers:
            crossings = tuple(
                Crossing(peer=sender, bytes=1 << 20, seconds=0.1 * (1 + ord(sender) % 3) * factors.get(sender, 1.0))
                for sender in peers
                if sender != receiver
            )
            steps = 0.1 * factors.get("steps_of_" + receiver, 1.0)
            tell(world, peers[receiver], Heartbeat, status=PeerStatus(), crossings=crossings, step_seconds=steps)
        world.tick(1.0)


def test_a_slow_sender_is_said_once_with_its_numbers_and_when_it_is_over() -> None:
    world, peers = training("abcd")
    measured(world, peers, 8)
    assert not events(world, "anomaly.confirmed")
    measured(world, peers, 6, b=3.0)
    (event,) = events(world, "anomaly.confirmed")
    assert (event["kind"], event["culprits"]) == ("slow sender", ("b",))
    assert event["evidence"]["factor"] == pytest.approx(3.0) and event["confidence"] > 0.5
    assert world.membership is not None
    (report,) = world.membership.status(world.now).verdicts
    assert report.kind == "slow sender" and 4 <= report.lasting_seconds <= 7
    measured(world, peers, 4)
    assert [event["culprits"] for event in events(world, "anomaly.cleared")] == [("b",)]
    assert not world.membership.status(world.now).verdicts


def test_a_straggler_is_named_and_forgotten_when_it_goes() -> None:
    world, peers = training("abcd")
    measured(world, peers, 8)
    measured(world, peers, 5, steps_of_c=4.0)
    assert [(e["kind"], e["culprits"]) for e in events(world, "anomaly.confirmed")] == [("slow peer", ("c",))]
    world.die(peers["c"])
    world.prove(peers["c"])
    world.tick(1.0)
    assert [event["culprits"] for event in events(world, "anomaly.cleared")] == [("c",)]


def test_what_no_member_can_have_measured_is_not_believed() -> None:
    world, peers = training("ab")
    wild = (Crossing(peer="nobody", bytes=1 << 20, seconds=1.0), Crossing(peer="a", bytes=1 << 20, seconds=math.inf))
    for value in (math.inf, math.nan, -1.0):
        gave = (Gave(tag=OUTER, version=1, norm=value, cosine=value),)
        status = {"status": PeerStatus(), "crossings": wild, "step_seconds": value, "gave": gave}
        tell(world, peers["a"], Heartbeat, **status)
        world.tick(3.0)
    assert {event["culprits"] for event in events(world, "anomaly.confirmed")} == {("a",)}, "of its own numbers, yes"


def test_reports_of_rounds_that_never_were_do_not_pile_up() -> None:
    world, peers = training("ab")
    gave = tuple(Gave(tag=OUTER, version=i, norm=1.0, cosine=0.5) for i in range(5000))
    gave += tuple(Gave(tag=f"t{i}", version=i, norm=1.0, cosine=0.5) for i in range(5000))
    tell(world, peers["a"], Heartbeat, status=PeerStatus(), gave=gave)
    assert world.membership is not None
    assert 0 < len(world.membership.watching._detector._rounds) <= 256
    world.tick(5.0)
    assert set(world.membership.watching._detector._gradients) == {OUTER}


def verdicts(world: World) -> set[tuple[str, tuple[str, ...]]]:
    assert world.membership is not None
    return {(each.kind, each.culprits) for each in world.membership.watching.verdicts}


def test_a_death_that_is_proven_is_a_crash_at_once_and_three_of_them_are_flapping() -> None:
    world, peers = training()
    for life in range(3):
        world.die(peers["b"])
        world.prove(peers["b"])
        assert ("crash", ("b",)) in verdicts(world), "not with the next tick: at once"
        assert (("flapping", ("b",)) in verdicts(world)) == (life == 2)
        peers["b"] = world.start("b")
        talk(world)
        wait(world, 10, *peers.values())
    wait(world, 60, *peers.values())
    assert not verdicts(world), "it is told for a minute"
    assert len(events(world, "anomaly.confirmed")) == len(events(world, "anomaly.cleared")) == 2


def test_who_says_good_bye_has_not_crashed() -> None:
    world, peers = training()
    world.act(peers["b"], "leave")
    talk(world)
    wait(world, 2, peers["a"], peers["c"])
    assert "b" not in world.membership.members and not events(world, "anomaly.confirmed")  # type: ignore[union-attr]


def test_silence_is_said_while_it_lasts() -> None:
    world, peers = training()
    wait(world, int(TIMES.chunk) + 1, peers["a"], peers["b"])
    assert verdicts(world) == {("silent", ("c",))}
    (report,) = world.membership.status(world.now).verdicts  # type: ignore[union-attr]
    assert report.confidence == 0.5 and report.lasting_seconds >= TIMES.chunk
    world.act(peers["c"], "beat")
    world.deliver_up(peers["c"], 100)
    assert not verdicts(world)


def witness(world: World, peer: SimPeer, **seen: Any) -> None:
    """What its witness sends, with which anybody may be connected."""
    message = Witnessed(run=RUN, incarnation=77, name=peer.name, watched=peer.incarnation, **seen)
    assert world.membership is not None
    assert not [
        effect for effect in world.membership.receive("witness", message, world.now) if isinstance(effect, Send)
    ]


@pytest.mark.parametrize(
    "seen, kind, stopped",
    [
        ({"state": "T"}, HANG, 1.0),
        ({"state": "S", "cpu_seconds": 2.0}, HANG, 0.0),
        ({"state": "T", "exchanging": True}, STALLED, 1.0),
    ],
)
def test_of_a_silent_peer_its_witness_says_that_it_stands_still(
    seen: dict[str, Any], kind: str, stopped: float
) -> None:
    world, peers = training()
    witness(world, peers["c"], **seen)
    assert not verdicts(world), "as long as it is heard of, that says nothing"
    wait(world, int(TIMES.chunk) + 1, peers["a"], peers["b"])
    assert verdicts(world) == {("silent", ("c",))}, "what a witness said before is old"
    witness(world, peers["c"], **seen, beat_seconds=5.0)
    assert verdicts(world) == {(kind, ("c",))}
    (report,) = world.membership.status(world.now).verdicts  # type: ignore[union-attr]
    assert report.evidence["stopped"] == stopped and report.evidence["beat_seconds"] == 5.0
    assert report.lasting_seconds >= TIMES.chunk and report.confidence >= 0.9
    wait(world, int(TIMES.chunk) + 1, peers["a"], peers["b"])
    assert verdicts(world) == {("silent", ("c",))}, "now the witness is silent, too: its machine may be gone"
    world.act(peers["c"], "beat")
    world.deliver_up(peers["c"], 100)
    assert not verdicts(world)


def test_the_witness_of_another_life_says_nothing_of_this_one() -> None:
    world, peers = training()
    former = peers["c"]
    world.die(former)
    peers["c"] = world.start("c")
    talk(world)
    wait(world, int(TIMES.chunk) + 1, peers["a"], peers["b"])
    witness(world, former, state="T")
    assert (HANG, ("c",)) not in verdicts(world)
    gone = Gone(run=RUN, incarnation=77, name="c", ended=former.incarnation, evidence="its process has ended")
    world.membership.receive("witness", gone, world.now)  # type: ignore[union-attr]
    assert world.membership.members["c"].member.incarnation == peers["c"].incarnation  # type: ignore[union-attr]


def test_a_member_tells_of_its_full_disk_and_its_clock() -> None:
    world, peers = training("ab")

    def beat(free: int, clock: float) -> None:
        health = Health(disk_free=free, disk_bytes=1 << 30, clock=clock)
        tell(world, peers["a"], Heartbeat, status=PeerStatus(health=health))
        world.tick(1.0)

    beat(1 << 29, 1.7e9)
    assert not verdicts(world)
    beat(1 << 20, 1.7e9)
    assert verdicts(world) == {(DISK, ("a",))}
    beat(1 << 29, 1.7e9 - 60)
    assert verdicts(world) == {(CLOCK, ("a",))}
    assert events(world, "anomaly.confirmed")[-1]["evidence"]["seconds"] == -60.0
    world.act(peers["a"], "leave")
    talk(world)
    wait(world, 61, peers["b"])
    assert not verdicts(world)


def test_a_member_that_makes_no_step_hangs_although_it_is_heard_of() -> None:
    world, peers = training("ab")

    def beat(idle: float, **state: Any) -> None:
        trainer = Trainer(**{"steps": 9, "usual_seconds": 0.1, "idle_seconds": idle, "waiting": False} | state)
        tell(world, peers["a"], Heartbeat, status=PeerStatus(trainer=trainer))
        world.tick(0.1)

    beat(TIMES.hang - 1)
    assert not verdicts(world)
    beat(TIMES.hang + 1)
    assert verdicts(world) == {(HANG, ("a",))}
    assert events(world, "anomaly.confirmed")[-1]["evidence"] == {"seconds": TIMES.hang + 1, "usual_seconds": 0.1}
    beat(0.0, waiting=True)
    assert not verdicts(world)


def test_an_exchange_that_stands_still_is_told_of_members_alone() -> None:
    world, peers = training("abc")

    def beat(*awaited: str, seconds: float = TIMES.hang + 1) -> None:
        for name in "ab":
            waits = tuple(Awaited(peer=peer, what="own", seconds=seconds) for peer in awaited)
            attempt = Underway(tag=OUTER, round=0, attempt=0, stage="own", seconds=99.0, awaited=waits)
            tell(world, peers[name], Heartbeat, status=PeerStatus(), underway=(attempt,) if awaited else ())
        world.tick(0.1)

    beat("nobody")
    beat("c", seconds=TIMES.hang - 1)
    assert not verdicts(world)
    beat("c", "nobody")
    assert verdicts(world) == {(STALLED, ("c",))}
    beat()
    assert not verdicts(world)


def test_the_silent_who_are_given_up_are_no_longer_silent() -> None:
    world, peers = training()
    wait(world, int(TIMES.evict_after) + 2, peers["a"], peers["b"])
    assert "c" not in world.membership.members and not verdicts(world)  # type: ignore[union-attr]


def test_frames_that_one_could_not_read_are_the_links_fault_and_those_of_two_the_senders() -> None:
    world, peers = training("abc")

    def unreadable(receiver: str) -> None:
        failure = LinkFailure(peer="a", incarnation=peers["a"].incarnation, evidence="corrupt")
        tell(world, peers[receiver], LinkLost, failure=failure)

    unreadable("b")
    assert verdicts(world) == {("corrupt frames", ("a", "b"))}
    unreadable("b")
    assert ("corrupt frames", ("a",)) not in verdicts(world), "it is still one link"
    unreadable("c")
    assert ("corrupt frames", ("a",)) in verdicts(world)
    former = LinkFailure(peer="a", incarnation=12345, evidence="corrupt")
    before = verdicts(world)
    tell(world, peers["c"], LinkLost, failure=former)
    assert verdicts(world) == before


def lost(world: Any, peers: Any, teller: str, other: str, evidence: str = "timeout") -> None:
    failure = LinkFailure(peer=other, incarnation=peers[other].incarnation, evidence=evidence)
    tell(world, peers[teller], LinkLost, failure=failure)


@pytest.mark.parametrize("evidence", ["timeout", "unreachable"])
def test_a_path_that_both_ends_call_dead_is_cut_though_no_attempt_needs_it(evidence: str) -> None:
    world, peers = training("abc")
    lost(world, peers, "a", "b", evidence)
    world.tick(0.1)
    assert not verdicts(world), "so far one says so"
    lost(world, peers, "b", "a", evidence)
    world.tick(0.1)
    assert verdicts(world) == {("cut", ("a", "b"))}
    assert {frozenset("ab")} == world.membership.rounds.cuts.keys(), "the next attempt goes around it"


@pytest.mark.parametrize("evidence", ["eof", "reset", "corrupt"])
def test_a_link_that_only_broke_is_no_cut_path(evidence: str) -> None:
    world, peers = training("abc")
    lost(world, peers, "a", "b", evidence)
    lost(world, peers, "b", "a", evidence)
    world.tick(0.1)
    assert "cut" not in {kind for kind, _ in verdicts(world)}


def test_what_one_end_said_long_ago_counts_no_more() -> None:
    world, peers = training("abc")
    lost(world, peers, "a", "b")
    wait(world, int(TIMES.chunk) + 1, *peers.values())
    lost(world, peers, "b", "a")
    world.tick(0.1)
    assert not verdicts(world)


def test_who_was_cut_off_from_all_has_no_cut_paths_once_it_is_back() -> None:
    world, peers = training("abc")
    wait(world, int(TIMES.chunk), peers["a"], peers["b"])
    lost(world, peers, "a", "c")
    wait(world, 1, peers["a"], peers["b"])
    assert verdicts(world) == {("silent", ("c",))}
    lost(world, peers, "b", "c")  # a little later than the silence is noticed
    for other in "ab":
        lost(world, peers, "c", other)  # it comes through at last
    lost(world, peers, "b", "c")  # and so does what b has to say
    world.tick(0.1)
    assert not verdicts(world)


def test_a_peer_that_holds_other_bits_has_drifted() -> None:
    world, peers = training("abc")
    tell(world, peers["b"], Applied, tag=OUTER, fragment=0, version=0, state_hash="drifted")
    world.tick(1.0)
    assert verdicts(world) == {("drifted state", ("b",))}
