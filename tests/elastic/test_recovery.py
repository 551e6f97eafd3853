"""A run brought together again from what its peers know: who must answer, and what comes of it."""

from __future__ import annotations

from typing import Any

import pytest

from collectives.records import Member
from elastic.config import RunPolicy, Timeouts
from elastic.journal import Admitted, Leased, Restored
from elastic.membership import Membership
from elastic.messages import Heartbeat, Join, OperationSpec, PeerStatus, Refused, Represent
from elastic.recovery import Recovery
from elastic.roster import Send
from elastic.runstate import LINEAGE, DataState, LoopState, RunState

RUN = "run"
VIEW = {"a": 1, "b": 2, "c": 3}
SPEC = OperationSpec(op="mean", dtype="float32", elements=8, wire="f32", algorithm="diloco")


def state(serial: int = 5, generation: int = 1, run: str = RUN, **data: Any) -> RunState:
    loop = LoopState(tag="outer", spec=SPEC, rounds=serial, versions={0: serial}, hashes={0: ""}, digests={0: "d"})
    fields = {"samples": 60, "shard_size": 6, "next": 2, "committed": 4, "cursors": {0: 2, 1: 2}} | data
    return RunState(run=run, generation=generation, epoch=3, serial=serial, tokens=4.0, elapsed=9.0, loops=(loop,),
                    data=DataState(**fields, holders={0: "a", 1: "b"}))  # fmt: skip


def answer(name: str, generation: int = 1, *, knows: bytes | None = None, epoch: int = 3, **fields: Any) -> Join:
    incarnation = fields.pop("incarnation", VIEW.get(name, 9))
    return Join(run=RUN, generation=generation, incarnation=incarnation, epoch=epoch, site="s",
                member=Member(name=name, incarnation=incarnation), view=fields.pop("view", VIEW),
                state=state().to_bytes() if knows is None else knows, **fields)  # fmt: skip


def told(recovery: Recovery, *answers: Join) -> Recovery:
    """Each peer answers, and once more in the new lineage when it is asked for that."""
    for message in answers:
        recovery.receive(message.member.name, message)
    for message in answers if recovery.generation else ():
        again = Join(**{name: getattr(message, name) for name in message.__slots__} | _common(message, recovery))
        recovery.receive(message.member.name, again)
    return recovery


def _common(message: Join, recovery: Recovery) -> dict[str, Any]:
    return {"run": RUN, "incarnation": message.incarnation, "epoch": message.epoch, "generation": recovery.generation}


def restored(recovery: Recovery) -> Restored:
    record = recovery.records()[0]
    assert isinstance(record, Restored)
    return record


def test_a_majority_of_the_last_view_is_enough_and_less_is_not() -> None:
    assert not Recovery(RUN).ready
    assert not told(Recovery(RUN), answer("a")).ready
    recovery = told(Recovery(RUN), answer("a"), answer("b"))
    assert recovery.ready and recovery.present == ("a", "b") and recovery.view == VIEW
    assert "a, b" in restored(recovery).reason


def test_half_of_a_view_is_no_majority() -> None:
    assert not told(Recovery(RUN), answer("a", view={"a": 1, "b": 2})).ready


def test_answers_count_only_once_they_are_given_in_the_new_lineage() -> None:
    recovery = Recovery(RUN, skipped=0)
    assert recovery.receive("a", answer("a")) == []
    asked = recovery.receive("b", answer("b"))
    assert {(send.name, send.message.generation) for send in asked if isinstance(send, Send)} == {
        ("a", LINEAGE), ("b", LINEAGE)}  # fmt: skip
    assert not recovery.ready, "until then the lost coordinator could come back and commit with them"
    recovery.receive("a", answer("a", LINEAGE))
    assert not recovery.ready
    newer = state(serial=6).to_bytes()  # it has gone on with the old coordinator until it was asked again
    recovery.receive("b", answer("b", LINEAGE, knows=newer))
    assert recovery.ready and restored(recovery).state.serial == 6


def test_a_person_decides_for_a_minority() -> None:
    recovery = told(Recovery(RUN), answer("c"))
    recovery.accept()
    assert recovery.ready and restored(recovery).generation >= LINEAGE
    nobody = Recovery(RUN)
    nobody.accept()
    assert not nobody.ready, "there is nothing to go on from"


def test_the_latest_decision_wins_and_a_higher_generation_is_later() -> None:
    knows = [state(9, 1), state(7, 2), state(8, 2)]
    answers = [answer(n, 2, knows=s.to_bytes()) for n, s in zip("abc", knows, strict=True)]
    assert restored(told(Recovery(RUN), *answers)).state.serial == 8


def test_the_last_view_is_that_of_the_highest_generation() -> None:
    old = answer("a", 1, epoch=9, view={"a": 1})
    recovery = told(Recovery(RUN), old, answer("b", 2, epoch=4))
    assert recovery.view == VIEW and recovery.ready


def test_another_life_of_a_name_is_not_of_the_view() -> None:
    recovery = told(Recovery(RUN), answer("a"), answer("b", incarnation=77), answer("c", incarnation=78))
    assert recovery.present == ("a",) and not recovery.ready


def test_the_new_generation_is_above_all_that_anybody_followed_and_epochs_go_on() -> None:
    recovery = told(Recovery(RUN, skipped=0), answer("a", 5), answer("b", 3 * LINEAGE + 1, epoch=12))
    record = restored(recovery)
    assert record.generation == 4 * LINEAGE and record.state.epoch == 12


def test_rivals_draw_different_lineages() -> None:
    drawn = {restored(told(Recovery(RUN), answer("a"), answer("b"))).generation for _ in range(8)}
    assert len(drawn) > 1


def test_a_higher_lineage_than_the_one_asked_for_is_outbid() -> None:
    recovery = told(Recovery(RUN, skipped=0), answer("a"), answer("b"))
    recovery.receive("c", answer("c", 7 * LINEAGE))
    assert recovery.generation == 8 * LINEAGE and not recovery.ready


def test_shards_leased_since_the_last_commit_stay_with_their_holders() -> None:
    a, b = answer("a", holding=(0, 2, 4)), answer("b", holding=(1, 4, 5))
    leases = [record for record in told(Recovery(RUN), a, b).records() if isinstance(record, Leased)]
    assert leases == [Leased(name="a", shards=(2, 4)), Leased(name="b", shards=(5,))]


def test_a_shard_that_nobody_here_holds_is_free_again() -> None:
    membership = Membership(RUN, RunPolicy(), Timeouts())
    membership.begin(told(Recovery(RUN), answer("a", holding=(3,)), answer("b", holding=(5,))).records(), 0.0)
    table = membership.table
    assert table is not None and table.free == {2, 4} and table.next == 6
    assert table.cursors == {0: 2, 1: 2, 2: 0, 3: 0, 4: 0, 5: 0}


def test_who_answered_is_a_member_from_the_start_and_is_waited_for() -> None:
    recovery = told(Recovery(RUN), answer("a"), answer("b"))
    admitted = [record.member.name for record in recovery.records() if isinstance(record, Admitted)]
    membership = Membership(RUN, RunPolicy(), Timeouts())
    membership.begin(recovery.records(), 0.0)
    assert admitted == ["a", "b"] == sorted(membership.members)
    assert membership.generation == restored(recovery).generation + 1


def test_newcomers_wait_and_members_are_asked() -> None:
    recovery = Recovery(RUN)
    newcomer = Join(run=RUN, incarnation=9, member=Member(name="z", incarnation=9), site="s")
    assert recovery.receive("z", newcomer) == []
    (send,) = recovery.receive("a", Heartbeat(run=RUN, generation=4, incarnation=1, status=PeerStatus()))
    assert isinstance(send, Send) and (send.name, send.incarnation) == ("a", 1)
    assert isinstance(send.message, Represent) and send.message.recall and send.message.generation == 4


def test_members_that_know_no_run_state_yet_count_too() -> None:
    recovery = told(Recovery(RUN), answer("a", knows=b""), answer("b", knows=b""))
    assert recovery.ready and restored(recovery).state.loops == ()


def test_another_run_is_refused() -> None:
    (send,) = Recovery(RUN).receive("a", Heartbeat(run="other", generation=1, incarnation=1, status=PeerStatus()))
    assert isinstance(send, Send) and isinstance(send.message, Refused) and RUN in send.message.reason


@pytest.mark.parametrize("knows", [b"garbage", state(run="other").to_bytes()])
def test_what_is_no_run_state_of_this_run_is_no_answer(knows: bytes) -> None:
    assert told(Recovery(RUN), answer("a", knows=knows), answer("b", knows=knows)).present == ()


def test_nobody_answers_in_another_name() -> None:
    recovery = Recovery(RUN)
    recovery.receive("b", answer("a"))
    assert recovery.present == ()
