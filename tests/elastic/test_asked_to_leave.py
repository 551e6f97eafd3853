"""Who is asked to leave from outside: the rules as short stories, and a script that knows nothing of it."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import Run, until
from simulation import RUN, TIMES, SimPeer, World

from collectives.records import Member
from elastic.config import RunPolicy
from elastic.errors import ConfigurationError, VersionMismatch
from elastic.events import EventReader
from elastic.inquiry import Watch, check_version, inquire
from elastic.membership import Membership
from elastic.messages import (
    PROTOCOL,
    Drain,
    Heartbeat,
    Join,
    Leave,
    LeaveAsked,
    LeaveRequest,
    PeerStatus,
    Refused,
    SiteReport,
    StatusReport,
    StatusRequest,
)
from elastic.outer.diloco import DiLoCo
from elastic.roster import Emit, Persist, Send

# --- the rules --------------------------------------------------------------------------------------------------------


class Story:
    """A coordinator and whoever talks to it; `told` is all that it has sent, by whom to: (name, message)."""

    def __init__(self) -> None:
        self.membership = Membership(RUN, RunPolicy(), TIMES)
        self.told: list[tuple[str, Any]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.durable = 0
        self._take(self.membership.begin([], 0.0))

    def _take(self, effects: list[Any]) -> list[Any]:
        sent = [(effect.name, effect.message) for effect in effects if isinstance(effect, Send)]
        self.told += sent
        self.events += [(effect.event, effect.fields) for effect in effects if isinstance(effect, Emit)]
        self.durable += sum(isinstance(effect, Persist) for effect in effects)
        return sent

    def say(self, sender: str, kind: type[Any], incarnation: int, /, **fields: Any) -> list[Any]:
        stamp = {"run": RUN, "incarnation": incarnation, "generation": self.membership.generation}
        return self._take(self.membership.receive(sender, kind(**stamp, **fields), 1.0))

    def join(self, name: str, site: str, incarnation: int) -> None:
        self.say(name, Join, incarnation, member=Member(name=name, incarnation=incarnation, addresses=()), site=site)

    def beat(self, name: str) -> list[Any]:
        return self.say(name, Heartbeat, self.membership.members[name].member.incarnation, status=PeerStatus())

    def ask(self, name: str, seconds: float = 20.0) -> Any:
        """The answer to somebody who asks for this."""
        (answer,) = [message for to, message in self.say("inquirer", LeaveRequest, 99, name=name, seconds=seconds)
                     if to == "inquirer"]  # fmt: skip
        return answer

    def drained(self) -> list[tuple[str, float]]:
        """Who was asked since the last time, and what time it was given."""
        told, self.told = self.told, []
        return [(name, message.seconds) for name, message in told if isinstance(message, Drain)]


@pytest.fixture
def story() -> Story:
    """Two peers at one site, one at another."""
    story = Story()
    for number, (name, site) in enumerate((("eu-0", "eu"), ("eu-1", "eu"), ("us-0", "us"))):
        story.join(name, site, 11 + number)
    story.drained()
    story.durable = 0
    return story


def test_a_peer_is_asked_and_no_other(story: Story) -> None:
    answer = story.ask("eu-1")
    assert isinstance(answer, LeaveAsked) and answer.lives == {"eu-1": 1} and not answer.supervisors
    assert story.drained() == [("eu-1", 20.0)]
    asked = [fields for event, fields in story.events if event == "peer.asked_to_leave"]
    assert asked == [{"peer": "eu-1", "life": 1, "seconds": 20.0}]
    assert story.durable == 0, "whoever asks sees what becomes of it: the journal need not know"


def test_it_is_said_again_until_the_peer_has_left_and_told_once(story: Story) -> None:
    story.ask("eu-1")
    story.ask("eu-1", seconds=5.0)
    story.beat("eu-1")
    story.beat("eu-0")
    assert story.drained() == [("eu-1", 20.0)] * 3, "the first word on the time counts"
    assert [event for event, _ in story.events].count("peer.asked_to_leave") == 1
    story.say("eu-1", Leave, 12)
    assert "eu-1" not in story.membership.members
    story.join("eu-1", "eu", 22)
    story.beat("eu-1")
    assert not story.drained(), "its next life was not asked"


def test_a_site_is_all_of_its_peers_and_its_supervisors(story: Story) -> None:
    for own, site in ((31, "eu"), (32, "us")):
        story.say("supervisor", SiteReport, own, site=site)
    answer = story.ask("eu")
    assert answer.lives == {"eu-0": 1, "eu-1": 1} and answer.supervisors == 1
    assert story.drained() == [("eu-0", 20.0), ("eu-1", 20.0), ("supervisor", 20.0)]
    story.say("supervisor", SiteReport, 31, site="eu")
    story.say("supervisor", SiteReport, 32, site="us")
    assert story.drained() == [("supervisor", 20.0)], "its word may have been lost"


def test_a_site_whose_peers_are_between_two_lives_is_asked_through_its_supervisor(story: Story) -> None:
    story.say("supervisor", SiteReport, 33, site="asia")
    answer = story.ask("asia")
    assert (answer.lives, answer.supervisors) == ({}, 1) and story.drained() == [("supervisor", 20.0)]


def test_a_name_of_a_peer_wins_over_that_of_a_site(story: Story) -> None:
    story.join("eu", "us", 14)
    story.say("supervisor", SiteReport, 31, site="eu")
    assert story.ask("eu").lives == {"eu": 1} and story.drained() == [("eu", 20.0)]


def test_who_is_not_there_is_told_apart_from_who_is(story: Story) -> None:
    answer = story.ask("ue")
    assert isinstance(answer, Refused) and answer.error == "ConfigurationError"
    assert answer.reason == (
        "there is no peer and no site 'ue' in run 'run': peers are eu-0, eu-1, us-0; sites are eu, us"
    )
    empty = Story().ask("ue")
    assert empty.reason.endswith("in run 'run': nobody is there")
    for number in range(10):
        story.join(f"as-{number}", "as", 50 + number)
    assert "as-7 and 5 more; sites are as, eu, us" in story.ask("ue").reason
    assert not story.drained()


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_time_that_is_none_is_refused(story: Story, seconds: float) -> None:
    assert story.ask("eu", seconds).reason == f"seconds is {seconds}: it must be above 0"
    assert not story.drained()


def test_asking_changes_nothing_that_lasts_and_no_round() -> None:
    """`World.to_coordinator` compares the durable state before and after."""
    world = World(RunPolicy())
    peer = world.start("a")
    world.deliver_up(peer, 100)
    world.deliver_down(peer, 100)
    world.to_coordinator("inquirer", LeaveRequest(run=RUN, incarnation=5, name="a", seconds=9.0))
    told = world.host.down[peer.incarnation]
    assert [message.seconds for message in told if isinstance(message, Drain)] == [9.0]
    world.kill_coordinator()
    world.restart()
    assert world.membership is not None and world.membership.members["a"].leaving is None
    assert isinstance(peer, SimPeer) and not peer.expelled


# --- a script that knows nothing of it --------------------------------------------------------------------------------


def events(run: Run, name: str, log: str = "coordinator") -> list[dict[str, Any]]:
    return [event for event in EventReader(run.folder / f"{log}.jsonl").read() if event["event"] == name]


def test_a_plain_script_ends_as_if_it_had_drained_itself(run: Run) -> None:
    run.policy = RunPolicy(quorum=1.0)
    peers, samples, under_way = run.several(2), {"p0": 0, "p1": 0}, threading.Barrier(3)

    def script(peer: Any) -> None:
        model = torch.nn.Linear(1, 1)
        inner = torch.optim.SGD(model.parameters(), lr=1e-9)
        with peer, DiLoCo(model, inner, peer, sync_every=10**9):
            for batch in peer.shards(torch.arange(4000.0), batch_size=5, shard_size=20):
                model(batch[:, None]).sum().backward()
                samples[peer.name] += len(batch)
                inner.step()
                inner.zero_grad()
                if samples[peer.name] == 50:
                    under_way.wait(60)

    threads = [threading.Thread(target=script, args=(peer,)) for peer in peers]
    for thread in threads:
        thread.start()
    under_way.wait(60)
    assert run.coordinator is not None
    where = run.coordinator.token
    asked = inquire(where, LeaveRequest, LeaveAsked, 30.0, name="p1", seconds=20.0)
    assert asked.lives == {"p1": 1}
    threads[1].join(60)
    until(lambda: bool(events(run, "peer.left")))
    assert [event["peer"] for event in events(run, "peer.left")] == ["p1"] and not events(run, "peer.evicted")
    (committed,) = events(run, "round.committed")
    assert committed["tokens"]["p1"] == samples["p1"], "what it learned is in no round"
    assert threads[0].is_alive()
    inquire(where, LeaveRequest, LeaveAsked, 30.0, name="local", seconds=20.0)
    threads[0].join(60)
    assert not threads[0].is_alive()
    report = run.coordinator.audit()
    assert report.passed and report.committed == sum(samples.values())


def test_a_request_that_nobody_can_follow_is_an_error_of_who_asks(run: Run) -> None:
    run.join("p0")
    assert run.coordinator is not None
    with pytest.raises(
        ConfigurationError, match="no peer and no site 'p1' in run 'test': peers are p0; sites are local"
    ):
        inquire(run.coordinator.token, LeaveRequest, LeaveAsked, 30.0, name="p1", seconds=20.0)


# --- who watches a run ------------------------------------------------------------------------------------------------


def test_a_watch_outlives_the_coordinator(run: Run) -> None:
    first = run.open()
    with Watch(first.token, every=0.05) as watch:
        until(lambda: watch.report is not None)
        assert watch.report is not None and watch.report.generation == 1 and not watch.report.members
        first.close()
        until(lambda: watch.silence > 0.5)
        run.open()
        run.join("p0")
        until(lambda: watch.report is not None and len(watch.report.members) == 1)
        assert watch.report.generation == 2 and watch.silence < 30


def test_another_protocol_is_named_with_our_own(run: Run) -> None:
    report = inquire(run.open().token, StatusRequest, StatusReport, 30.0)
    check_version(report)
    other = replace(report, protocol=PROTOCOL + 1)
    with pytest.raises(VersionMismatch, match=f"protocol {PROTOCOL + 1}, this installation speaks {PROTOCOL}: install"):
        check_version(other)
