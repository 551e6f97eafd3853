"""What follows from verdicts: the rules alone, through the membership, and once with real peers."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Run, until
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import OUTER, RUN, TIMES, SimPeer, World
from test_membership import commits, enter, events, exchange, propose, talk, tell, training, wait
from test_watching import STEP, Trainer, anomalies, quiet, watch

from collectives.records import Awaited, Underway
from elastic import selftest
from elastic.config import FaultPolicy
from elastic.errors import ConfigurationError, Evicted, Quarantined
from elastic.isolation import AVOID, END, EVICT, LEAVE_OUT, QUARANTINE, SPARE, Isolation, Measure
from elastic.journal import Barred
from elastic.messages import Heartbeat, Join, OperationSpec, PeerStatus, Refused, SelfTest, Welcome
from elastic.planning import Routes
from fault.records import Crossing, Gave
from fault.verdicts import (
    AMBIGUOUS,
    CORRUPT,
    CRASH,
    DRIFTED,
    FLAPPING,
    GRADIENT,
    HANG,
    LINK,
    SENDER,
    SILENT,
    STALLED,
    STRAGGLER,
    Verdict,
)

AWAKE = ("a", "b", "c", "d", "e")


def verdict(kind: str, *culprits: str, since: float = 0.0, confidence: float = 0.9, **evidence: float) -> Verdict:
    evidence = {"rounds": 2.0, "times": 3.0} | evidence
    return Verdict(kind=kind, culprits=culprits, since=since, confidence=confidence, evidence=evidence)


def isolation(min_peers: int = 1, **policy: Any) -> Isolation:
    return Isolation(FaultPolicy(**policy), min_peers, evict_after=60.0)


def actions(found: Isolation, *verdicts: Verdict, awake: tuple[str, ...] = AWAKE, now: float = 1.0) -> list[Any]:
    return [(each.action, each.culprits, each.begins) for each in found.decide(verdicts, awake, now)]


def carry_out(found: Isolation, measure: Measure, now: float) -> None:
    """As the membership does."""
    (name,) = measure.culprits
    seconds = 0.0 if measure.action == EVICT else measure.seconds
    found.apply(Barred(name=name, seconds=seconds, strikes=found.strikes(name) + 1, reason="x"))
    found.bar(name, now)


# --- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, expected",
    [
        (STRAGGLER, [(LEAVE_OUT, ("b",), True)]),
        (HANG, [(LEAVE_OUT, ("b",), True)]),
        (SENDER, [(AVOID, ("b",), True)]),
        (GRADIENT, [(LEAVE_OUT, ("b",), True), (QUARANTINE, ("b",), True)]),
        (CORRUPT, [(QUARANTINE, ("b",), True)]),
        (FLAPPING, [(QUARANTINE, ("b",), True)]),
        (DRIFTED, [(QUARANTINE, ("b",), True)]),
        (CRASH, []),
        (SILENT, []),
    ],
)
def test_what_follows_from_each_class(kind: str, expected: list[Any]) -> None:
    assert actions(isolation(), verdict(kind, "b")) == expected


def test_links_are_avoided_and_condemn_nobody() -> None:
    found = isolation()
    blamed = [verdict(kind, "a", "b") for kind in (LINK,)] + [verdict(CORRUPT, "c", "d"), verdict(AMBIGUOUS, "d", "e")]
    assert sorted(actions(found, *blamed)) == [(AVOID, pair, True) for pair in (("a", "b"), ("c", "d"), ("d", "e"))]
    assert actions(found, *blamed, now=2.0) == [], "said once"
    assert sorted(actions(found, blamed[0], now=3.0)) == [(AVOID, ("c", "d"), False), (AVOID, ("d", "e"), False)]


def test_a_policy_bounds_what_follows() -> None:
    assert actions(isolation(gradient="observe"), verdict(GRADIENT, "b")) == []
    found = isolation(gradient="leave out")
    assert actions(found, verdict(GRADIENT, "b")) == [(LEAVE_OUT, ("b",), True)] and set(found.spurned) == {"b"}
    assert (EVICT, ("b",), True) in actions(isolation(gradient="evict"), verdict(GRADIENT, "b"))
    assert actions(isolation(confidence=0.95), verdict(GRADIENT, "b")) == [], "not sure enough"


def test_once_is_no_habit() -> None:
    assert actions(isolation(), verdict(GRADIENT, "b", rounds=1.0)) == []
    assert actions(isolation(), verdict(DRIFTED, "b", times=2.0)) == []


def test_a_straggler_is_waited_for_but_what_it_gives_is_taken() -> None:
    found = isolation()
    actions(found, verdict(STRAGGLER, "b"))
    assert set(found.left_out) == {"b"} and not found.spurned
    assert actions(found) == [(LEAVE_OUT, ("b",), False)] and not found.left_out


def test_a_hang_ends_a_life_after_a_while_and_bars_no_name() -> None:
    found = isolation()
    assert actions(found, verdict(HANG, "b", since=-500.0), now=0.0) == [(LEAVE_OUT, ("b",), True)]
    assert actions(found, verdict(HANG, "b", since=-500.0), now=59.0) == []
    assert actions(found, verdict(HANG, "b", since=-500.0), now=61.0) == [(END, ("b",), True)]
    assert not found.barred("b", 62.0) and not found.must_test("b")


@pytest.mark.parametrize("name", ["slow", "straggler", "hang"])
def test_being_slow_or_stuck_alone_condemns_nobody(name: str) -> None:
    with pytest.raises(ConfigurationError, match="condemns nobody"):
        FaultPolicy(**{name: "quarantine"})


@pytest.mark.parametrize("wrong", [{"slow": "kill"}, {"quarantine_seconds": 0}, {"most_out": 2}, {"strikes": -1}])
def test_policies_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        FaultPolicy(**wrong)


def test_never_below_min_peers_and_that_is_said_once() -> None:
    found = isolation(min_peers=3)
    bad = verdict(GRADIENT, "b")
    assert actions(found, bad, awake=("a", "b", "c")) == [(SPARE, ("b",), True)]
    assert actions(found, bad, awake=("a", "b", "c"), now=2.0) == []
    assert (QUARANTINE, ("b",), True) in actions(found, bad, awake=("a", "b", "c", "d"), now=3.0)


def test_never_more_than_half() -> None:
    found = isolation()
    stragglers = [verdict(STRAGGLER, name) for name in "abc"]
    actions(found, *stragglers, awake=("a", "b", "c", "d"))
    first = set(found.left_out)
    assert len(first) == 2
    actions(found, *reversed(stragglers), awake=("a", "b", "c", "d"))
    assert set(found.left_out) == first, "who is left out stays so before another is"


def test_one_removal_at_a_time_and_the_next_only_for_what_remains() -> None:
    found = isolation(calm_seconds=10.0)
    two = [verdict(GRADIENT, "a"), verdict(GRADIENT, "b")]
    removed = [m for m in found.decide(two, AWAKE, 0.0) if m.action == QUARANTINE]
    assert len(removed) == 1
    carry_out(found, removed[0], 0.0)
    (other,) = {"a", "b"} - {*removed[0].culprits}
    left = tuple(name for name in AWAKE if name not in removed[0].culprits)
    rest = verdict(GRADIENT, other)
    assert (QUARANTINE, (other,), True) not in actions(found, rest, awake=left, now=9.0)
    assert (QUARANTINE, (other,), True) in actions(found, rest, awake=left, now=10.5)


def test_quarantines_grow_until_one_does_not_end_and_trust_comes_back() -> None:
    found = isolation(quarantine_seconds=30.0, strikes=3, longest_seconds=100.0, calm_seconds=0.0)
    now, served = 0.0, []
    for _ in range(3):
        (measure,) = (m for m in found.decide([verdict(GRADIENT, "b")], AWAKE, now) if m.action == QUARANTINE)
        carry_out(found, measure, now)
        served.append(found.barred("b", now))
        now += measure.seconds
        assert not found.barred("b", now) and found.must_test("b")
        found.apply_admitted("b")
        found.admitted("b", now)
        assert found.on_probation("b") and not found.must_test("b")
    assert served == [30.0, 60.0, 100.0]
    (measure,) = (m for m in found.decide([verdict(GRADIENT, "b")], AWAKE, now) if m.action == EVICT)
    carry_out(found, measure, now)
    assert found.barred("b", now + 1e9) == math.inf

    well = isolation(calm_seconds=0.0)
    (measure,) = (m for m in well.decide([verdict(GRADIENT, "b")], AWAKE, 0.0) if m.action == QUARANTINE)
    carry_out(well, measure, 0.0)
    well.apply_admitted("b")
    well.admitted("b", 40.0)
    assert well.trusted(69.0) == [] and well.trusted(70.0) == ["b"] and not well.strikes("b")


kinds = st.sampled_from([STRAGGLER, HANG, SENDER, GRADIENT, CORRUPT, FLAPPING, DRIFTED, CRASH])
looks = st.lists(st.sets(st.tuples(kinds, st.sampled_from("abcdef"))), max_size=30)


@settings(max_examples=300)
@given(looks, st.integers(1, 4), st.sampled_from([0.0, 3.0]))
def test_whatever_is_said_the_run_keeps_its_peers(script: list[Any], min_peers: int, calm: float) -> None:
    found = isolation(min_peers, calm_seconds=calm, quarantine_seconds=5.0)
    members, now, last = set("abcdef"), 0.0, -math.inf
    for said in script:
        now += 1.0
        verdicts = [verdict(kind, name, since=now - 100) for kind, name in sorted(said)]
        measures = list(found.decide(verdicts, members, now))
        removed = [m for m in measures if m.action in (QUARANTINE, EVICT, END)]
        assert len(removed) <= 1 and not (removed and now < last + calm)
        for measure in removed:
            gone = {*measure.culprits} & members
            members -= gone
            if measure.action != END:
                carry_out(found, measure, now)
                last = now
        active = members - found.left_out.keys()
        if len(members) >= min_peers and not removed:
            assert len(active) >= min_peers or not found.left_out
        assert len(members) >= min_peers or len(members) == 6
        for name in sorted(set("abcdef") - members):
            if not found.barred(name, now):
                members.add(name)
                found.apply_admitted(name)
                found.admitted(name, now)


# --- through the membership -------------------------------------------------------------------------------------------


def gave(world: World, peers: dict[str, SimPeer], rounds: int, **cosines: float) -> None:
    assert world.membership is not None
    start = getattr(world, "gave_rounds", 0)
    for version in range(start, start + rounds):
        for name, peer in peers.items():
            one = Gave(tag=OUTER, version=version, norm=1.0, cosine=cosines.get(name, 0.4))
            if name in world.membership.members:
                tell(world, peer, Heartbeat, status=PeerStatus(), gave=(one,))
        world.tick(2.5)
        for name, peer in peers.items():
            if name in world.membership.members:
                tell(world, peer, Heartbeat, status=PeerStatus())
    world.gave_rounds = start + rounds  # type: ignore[attr-defined]


def join_of(peer: SimPeer, **fields: Any) -> Join:
    return Join(run=RUN, incarnation=peer.incarnation, member=peer.member, site="s", **fields)


def ask(world: World, peer: SimPeer, **fields: Any) -> Any:
    assert world.membership is not None
    effects = world.membership.receive(peer.name, join_of(peer, **fields), world.now)
    world._obey(effects)
    kinds = (Refused, SelfTest, Welcome)
    answers = [e.message for e in effects if isinstance(getattr(e, "message", None), kinds)]
    return answers[-1]


def quarantined(names: str = "abcde", **policy: Any) -> tuple[World, dict[str, SimPeer]]:
    world, peers = training(names, faults=FaultPolicy(**policy))
    gave(world, peers, 4)
    assert not events(world, "anomaly.confirmed")
    gave(world, peers, 3, b=-0.9)
    return world, peers


def test_a_bad_gradient_puts_its_peer_out_of_the_view_with_the_reason_and_its_shards_go_on() -> None:
    world, _ = quarantined()
    assert world.membership is not None
    (event,) = events(world, "peer.quarantined")
    assert event["culprits"] == ("b",) and event["seconds"] == 30.0 and event["evidence"]["cosine"] == -0.9
    assert "bad gradient" in event["reason"] and "cosine -0.9" in event["reason"]
    assert [e["peer"] for e in events(world, "peer.removed")] == ["b"] and "b" not in world.membership.members
    assert [e["peer"] for e in events(world, "shard.released")] == ["b"]
    assert not events(world, "peer.evicted")
    (barred,) = world.membership.status(world.now).barred
    assert barred.name == "b" and 0 < barred.seconds <= 30 and barred.strikes == 1


def test_who_is_in_quarantine_is_refused_then_tested_then_on_probation_then_trusted() -> None:
    world, peers = quarantined()
    assert world.membership is not None
    fresh = world.start("b")
    refused = ask(world, fresh)
    assert isinstance(refused, Refused) and refused.error == "Quarantined" and 0 < refused.retry_after <= 30
    wait(world, 31, *(peer for name, peer in peers.items() if name != "b"))
    assert isinstance(ask(world, fresh), SelfTest) and "b" not in world.membership.members
    assert isinstance(ask(world, fresh, tested=True), Welcome)
    (report,) = (m for m in world.membership.status(world.now).members if m.name == "b")
    assert report.state == "probation"
    others = [peer for name, peer in peers.items() if name != "b"]
    for _ in range(40):
        tell(world, fresh, Heartbeat, status=PeerStatus())
        wait(world, 1, *others)
    assert [event["peer"] for event in events(world, "peer.trusted")] == ["b"]


def test_who_fails_its_self_test_stays_out_for_twice_as_long() -> None:
    world, peers = quarantined()
    fresh = world.start("b")
    wait(world, 31, *(peer for name, peer in peers.items() if name != "b"))
    refused = ask(world, fresh, tested=True, flaw="arithmetic: 3 of 65536 sums are wrong on cuda:0")
    assert isinstance(refused, Refused) and 59 < refused.retry_after <= 60 and "3 of 65536" in refused.reason
    assert [event["flaw"] for event in events(world, "peer.unfit")]


def test_a_quarantine_outlives_the_coordinator_and_its_end_does_too() -> None:
    world, peers = quarantined()
    fresh = world.start("b")
    world.kill_coordinator()
    world.restart()
    assert isinstance(ask(world, fresh), Refused)
    others = [peer for name, peer in peers.items() if name != "b"]
    talk(world, *others)
    wait(world, 31, *others)
    assert isinstance(ask(world, fresh, tested=True), Welcome)
    world.kill_coordinator()
    world.restart()
    assert world.membership is not None
    assert not world.membership.isolation.in_quarantine(world.now) and world.membership.isolation.on_probation("b")


def test_a_spurned_contribution_is_not_taken_and_not_lost() -> None:
    world, peers = training("abcde", faults=FaultPolicy(gradient="leave out"))
    gave(world, peers, 4)
    gave(world, peers, 3, b=-0.9)
    propose(world, *peers.values())
    talk(world)
    exchange(world)
    (record,) = commits(world)
    assert record.contributors == ("a", "c", "d", "e")
    assert [event["culprits"] for event in events(world, "peer.left_out")] == [("b",)]
    assert not events(world, "peer.quarantined")


def test_rounds_do_not_wait_for_a_straggler() -> None:
    world, peers = training("abcd")
    crossings: tuple[Crossing, ...] = ()
    for windows, factor in ((8, 1.0), (5, 5.0)):
        for _ in range(windows):
            for name, peer in peers.items():
                seconds = 0.1 * (factor if name == "d" else 1.0)
                tell(world, peer, Heartbeat, status=PeerStatus(), crossings=crossings, step_seconds=seconds)
            world.tick(1.0)
    assert [event["culprits"] for event in events(world, "peer.left_out")] == [("d",)]
    propose(world, *(peers[name] for name in "abc"))
    talk(world)
    exchange(world)
    (record,) = commits(world)
    assert record.contributors == ("a", "b", "c"), "at once: no grace has passed"


def stalled(world: World, peers: dict[str, SimPeer], *awaited: str, of: str = "ab") -> None:
    """These report that nothing has come from there for too long; all others are heard of, too."""
    assert world.membership is not None
    operation = world.membership.operations[OUTER]
    waits = tuple(Awaited(peer=peer, what="own", seconds=TIMES.hang + 1) for peer in awaited)
    number = {"tag": OUTER, "round": operation.round, "attempt": operation.attempt}
    underway = (Underway(**number, stage="own", seconds=99.0, awaited=waits),)
    for name, peer in peers.items():
        tell(world, peer, Heartbeat, status=PeerStatus(), underway=underway if name in of else ())
    world.tick(0.1)


def test_an_attempt_that_stands_still_for_one_peer_goes_on_without_it() -> None:
    world, peers = training("abc")
    propose(world, *peers.values())
    talk(world)
    stalled(world, peers, "c")
    assert [(e["kind"], e["culprits"]) for e in events(world, "peer.left_out")] == [(STALLED, ("c",))]
    for _ in range(int(TIMES.chunk) + 2):  # it is heard of, and does not answer
        for peer in peers.values():
            tell(world, peer, Heartbeat, status=PeerStatus())
        talk(world, peers["a"], peers["b"])
        world.tick(1.0)
    talk(world, peers["a"], peers["b"])
    exchange(world, peers["a"], peers["b"])
    (record,) = commits(world)
    assert (record.contributors, record.attempt) == (("a", "b"), 1)
    assert not events(world, "peer.taken_back"), "the stall is over, and it would stall the next one"
    propose(world, peers["a"], peers["b"])
    talk(world, peers["a"], peers["b"])
    exchange(world, peers["a"], peers["b"])
    assert [each.contributors for each in commits(world)] == [("a", "b")] * 2, "nobody waits for it"
    wait(world, 31, *peers.values())
    assert [event["culprits"] for event in events(world, "peer.taken_back")] == [("c",)]
    assert not events(world, "peer.quarantined"), "that it stood still says nothing of its machine"


def test_an_attempt_that_stands_still_for_a_link_goes_around_it_with_all() -> None:
    world, peers = training("abcd")
    propose(world, *peers.values())
    talk(world)
    stalled(world, peers, "c", of="a")
    assert [(e["kind"], e["culprits"]) for e in events(world, "link.avoided")] == [(STALLED, ("c", "a"))]
    talk(world)
    assert world.membership is not None
    start = world.membership.operations[OUTER].start
    assert start is not None and start.attempt == 1
    names = [member.name for member in start.contributors]
    owners = {name for name, share in zip(names, start.shares, strict=True) if share > 0}
    assert names == ["a", "b", "c", "d"] and owners == {"b", "d"}
    exchange(world)
    assert commits(world)[0].contributors == ("a", "b", "c", "d")


def test_who_stalls_again_and_again_is_set_aside_for_longer() -> None:
    found, spans = isolation(quarantine_seconds=10.0, longest_seconds=30.0), []
    now = 0.0
    for _ in range(4):
        actions(found, verdict(STALLED, "b"), now=now)
        began = now
        while "b" in found.left_out:
            assert "b" in found.spurned
            now += 1.0
            actions(found, now=now)
        spans.append(now - began)
    assert spans == [10.0, 20.0, 30.0, 30.0]
    now += 31.0
    actions(found, now=now)
    actions(found, verdict(STALLED, "b"), now=now)
    actions(found, now=now + 9.0)
    assert "b" in found.left_out
    actions(found, now=now + 10.0)
    assert not found.left_out, "it had been well for as long"


def test_a_late_life_joins_a_run_that_has_barred_somebody_else() -> None:
    world, _ = quarantined()
    enter(world, world.start("f"))
    assert world.membership is not None and "f" in world.membership.members


# --- other ways -------------------------------------------------------------------------------------------------------


def test_pairs_with_corrupt_frames_are_planned_around_while_all_can_be_reached() -> None:
    spec = OperationSpec(op="sum", dtype="float32", elements=1 << 20, wire="f32")
    routes = Routes()
    assert min(routes.find(spec, ("a", "b", "c"), ()).shares) > 0
    routes.avoid({("a", "b"): verdict(CORRUPT, "a", "b")})
    around = routes.find(spec, ("a", "b", "c"), ())
    assert dict(zip(around.names, around.shares, strict=True)) == {"a": 0.0, "b": 0.0, "c": 1.0}
    assert routes.find(spec, ("a", "b"), ()).names == ("a", "b"), "there is no other way"
    routes.avoid({})
    assert min(routes.find(spec, ("a", "b", "c"), ()).shares) > 0


def test_where_a_ring_cannot_tell_whose_fault_it_is_all_pairs_are_used_until_it_is_clear() -> None:
    from elastic.messages import LinkReport
    from elastic.planning import FASTEST, LARGE

    spec = OperationSpec(op="sum", dtype="float32", elements=LARGE, wire="f32")
    names = ("a", "b", "c", "d")
    routes = Routes()
    for name in names:
        links = [LinkReport(peer=other, goodput=2 * FASTEST, rtt=1e-4) for other in names if other != name]
        routes.learn(name, links, names)
    assert routes.find(spec, names, ()).pattern == "ring"
    routes.avoid({("a", "b"): verdict(AMBIGUOUS, "a", "b")})
    routes.refresh(0.0)
    assert routes.find(spec, names, ()).pattern == "direct"
    routes.avoid({("b",): verdict("slow receiver", "b")})
    routes.refresh(1.0)
    assert routes.find(spec, names, ()).pattern == "direct", "it is b: as long as that lasts, no ring hides it"
    routes.avoid({})
    routes.refresh(2.0)
    assert routes.find(spec, names, ()).pattern == "ring"


# --- the self-test ----------------------------------------------------------------------------------------------------


def test_a_machine_that_is_well_passes(tmp_path: Path) -> None:
    assert selftest.self_test(tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_a_machine_that_cannot_write_or_calculate_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest.self_test(tmp_path / "missing").startswith("disk: FileNotFoundError")
    to = torch.Tensor.to

    def wrong(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        moved = to(tensor, *args, **options)
        if torch.float32 in args:
            moved[3, 5] += 1
        return moved

    monkeypatch.setattr(torch.Tensor, "to", wrong)
    assert "sums are wrong on cpu" in selftest.self_test(tmp_path)


def test_the_error_pickles_with_its_time() -> None:
    error = pickle.loads(pickle.dumps(Quarantined("out", peer="b", retry_after=12.5)))
    assert isinstance(error, Evicted) and error.retry_after == 12.5 and error.peer == "b" and error.retryable


# --- with real peers --------------------------------------------------------------------------------------------------


def test_a_peer_with_flipped_gradients_goes_into_quarantine_and_comes_back_well(run: Run) -> None:
    back: list[Any] = []
    errors: list[Quarantined] = []

    def act(trainers: list[Trainer]) -> None:
        quiet(run, 20, trainers)
        peer = trainers[2].peer
        operation = peer.operation

        def flipped(proposal: Any, buffers: Any, inbox: Any) -> Any:
            buffers(None)[0].mul_(-1)
            return operation(proposal, buffers, inbox)

        peer.operation = flipped  # type: ignore[method-assign]
        until(lambda: trainers[2].out)
        errors.append(trainers[2].out)  # type: ignore[arg-type]
        rounds = trainers[0].peer.progress.rounds
        with pytest.raises(Quarantined) as refused:
            run.join("p2")
        assert 0 < refused.value.retry_after <= 3
        quiet(run, 5, trainers)
        assert trainers[0].peer.progress.rounds > rounds, "the others go on"
        until(lambda: not run.coordinator.status().barred)  # type: ignore[union-attr]
        back.append(run.join("p2"))

    watch(run, 4, act, FaultPolicy(quarantine_seconds=3.0))
    (error,) = errors
    assert error.retry_after == 3.0 and "bad gradient" in str(error)
    assert back[0].life == 2


def test_a_straggler_that_is_well_again_contributes_again(run: Run) -> None:
    def contributed(name: str, since: int) -> int:
        lines = [json.loads(line) for line in (run.folder / "coordinator.jsonl").read_text().splitlines()]
        rounds = [event for event in lines if event["event"] == "round.committed" and event["round"] >= since]
        return sum(name in event["contributors"] for event in rounds)

    def act(trainers: list[Trainer]) -> None:
        quiet(run, 40, trainers)
        trainers[1].pace = 5 * STEP
        until(lambda: anomalies(run, "peer.left_out"))
        quiet(run, 10, trainers)
        trainers[1].pace = STEP
        until(lambda: anomalies(run, "peer.taken_back"))
        rounds = trainers[0].peer.progress.rounds
        until(lambda: contributed("p1", rounds) >= 5)

    watch(run, 3, act, FaultPolicy())
    assert [event["culprits"] for event in anomalies(run, "peer.left_out")] == [["p1"]]
