"""A peer that its supervisor gives up: its place is offered to other sites, and its leases go to whoever lives."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.records import Member
from elastic.config import RunPolicy, Timeouts
from elastic.journal import Record
from elastic.membership import Membership
from elastic.messages import GivenUp, Join, LeaseRequest, Leave, Pong, SiteReport, Vacancy
from elastic.roster import Emit, Persist, Send

RUN = "run"
TIMES = Timeouts(heartbeat=1.0, chunk=3.0, operation=12.0, round=60.0, grace=4.0, evict_after=30.0)


@dataclass
class Supervisor:
    """What a supervisor keeps to. arriving, hosted: guests before and after their lives have joined."""

    incarnation: int
    site: str
    room: int = 0
    given_up: dict[str, GivenUp] = field(default_factory=dict)
    arriving: set[str] = field(default_factory=set)
    hosted: dict[str, int] = field(default_factory=dict)
    inbox: deque[Vacancy] = field(default_factory=deque)

    def report(self, *declined: str) -> SiteReport:
        return SiteReport(
            run=RUN,
            incarnation=self.incarnation,
            site=self.site,
            room=max(0, self.room - len(self.arriving) - len(self.hosted)),
            given_up=tuple(self.given_up.values()),
            taking=tuple(sorted(self.arriving)),
            declined=declined,
        )


class Story:
    """A coordinator, its journal, supervisors and lives of peers; messages arrive when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.journal: list[Record] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.supervisors: dict[int, Supervisor] = {}
        self.pongs = 0
        self._lives = 1000
        self.start()

    def start(self) -> None:
        """The coordinator, or its next life."""
        self.membership = Membership(RUN, RunPolicy(), TIMES)
        self._obey(self.membership.begin(list(self.journal), self.now))

    def _obey(self, effects: list[Any]) -> list[Any]:
        for effect in effects:
            if isinstance(effect, Persist):
                self.journal.append(effect.record)
            elif isinstance(effect, Emit):
                self.events.append((effect.event, effect.fields))
            elif isinstance(effect, Send) and effect.incarnation in self.supervisors:
                assert effect.name == "supervisor"
                if isinstance(effect.message, Vacancy):
                    self.supervisors[effect.incarnation].inbox.append(effect.message)
                else:
                    assert isinstance(effect.message, Pong)
                    self.pongs += 1
        return [effect.message for effect in effects if isinstance(effect, Send)]

    def site(self, name: str, room: int = 0) -> Supervisor:
        own = len(self.supervisors) + 1
        self.supervisors[own] = Supervisor(own, name, room)
        self.hear(self.supervisors[own])
        return self.supervisors[own]

    def hear(self, supervisor: Supervisor, *declined: str) -> None:
        self._obey(self.membership.receive("supervisor", supervisor.report(*declined), self.now))

    def join(self, peer: str, site: str) -> int:
        """A new life of this peer, which holds a shard."""
        self._lives += 1
        member = Member(name=peer, incarnation=self._lives, addresses=())
        join = Join(run=RUN, incarnation=self._lives, member=member, site=site)
        self._obey(self.membership.receive(peer, join, self.now))
        self.lease(peer)
        return self._lives

    def say(self, peer: str, kind: type[Any], **fields: Any) -> list[Any]:
        incarnation = self.membership.members[peer].member.incarnation
        stamp = {"run": RUN, "incarnation": incarnation, "generation": self.membership.generation}
        return self._obey(self.membership.receive(peer, kind(**stamp, **fields), self.now))

    def lease(self, peer: str) -> dict[int, int]:
        holding = tuple(self.shards(peer))
        (leases,) = self.say(peer, LeaseRequest, samples=600, shard_size=6, seed=0, epochs=1, holding=holding)
        shards: dict[int, int] = leases.shards
        return shards

    def shards(self, peer: str) -> list[int]:
        return self.membership.table.held_by(peer) if self.membership.table else []

    def give_up(self, supervisor: Supervisor, peer: str, ended: int) -> None:
        supervisor.hosted.pop(peer, None)
        supervisor.given_up[peer] = GivenUp(name=peer, ended=ended, reason="ended 4 times")
        self.hear(supervisor)

    def offered(self, supervisor: Supervisor) -> list[tuple[str, bool]]:
        """What has reached this supervisor since the last time, each but once."""
        told = list(dict.fromkeys((vacancy.name, vacancy.free) for vacancy in supervisor.inbox))
        supervisor.inbox.clear()
        return told

    def wait(self, seconds: int, *heard: Supervisor) -> None:
        for _ in range(seconds):
            self.now += 1.0
            for name in self.membership.members:
                self.membership.members[name].last_heard = self.now
            for supervisor in heard:
                self.hear(supervisor)
            self._obey(self.membership.tick(self.now))

    def said(self, *names: str) -> list[tuple[str, dict[str, Any]]]:
        return [(event, fields) for event, fields in self.events if event in names]


def vacant(*sites: tuple[str, int]) -> tuple[Story, Supervisor, list[Supervisor]]:
    """Peer p of site `home` is given up; q lives. Both have a shard. Other sites have so much room."""
    story = Story()
    home = story.site("home")
    others = [story.site(name, room) for name, room in sites]
    ended = story.join("p", "home")
    story.join("q", "home")
    story.give_up(home, "p", ended)
    return story, home, others


# --- stories --------------------------------------------------------------------------------------------------------


def test_without_room_anywhere_the_leases_go_to_survivors_at_once() -> None:
    story, _, _ = vacant(("far", 0))
    assert list(story.membership.members) == ["q"]
    assert story.said("vacancy.opened", "vacancy.closed", "shard.released") == [
        ("vacancy.opened", {"peer": "p", "site": "home", "reason": "ended 4 times"}),
        ("vacancy.closed", {"peer": "p", "reason": "no site has room for it"}),
        ("shard.released", {"peer": "p", "shards": [0]}),
    ]
    assert story.lease("q") == {0: 0, 1: 0} and story.now == 0.0
    (reassigned,) = story.said("shard.reassigned")
    assert reassigned[1] == {"shard": 0, "peer": "q", "before": "p", "cursor": 0}


def test_a_place_is_offered_to_its_own_site_first_and_then_to_the_one_with_most_room() -> None:
    story, _, (far, near, wide) = vacant(("far", 1), ("home", 1), ("wide", 5))
    assert (story.offered(far), story.offered(near), story.offered(wide)) == ([], [("p", True)], [])
    story.hear(near, "p")
    assert (story.offered(far), story.offered(near), story.offered(wide)) == ([], [], [("p", True)])
    story.hear(wide, "p")
    assert story.offered(far) == [("p", True)] and not story.said("vacancy.closed")
    assert story.shards("p") == [0], "it is still to come back"
    story.hear(far, "p")
    assert story.said("vacancy.closed") and story.shards("p") == []
    assert [fields["site"] for _, fields in story.said("vacancy.offered")] == ["home", "wide", "far"]


def test_the_next_life_at_another_site_has_the_leases_of_the_last() -> None:
    story, _, (far,) = vacant(("far", 1))
    far.arriving.add("p")
    story.hear(far)
    story.join("p", "far")
    assert story.said("vacancy.filled") == [("vacancy.filled", {"peer": "p", "site": "far"})]
    assert story.shards("p") == [0, 2] and not story.said("shard.released", "vacancy.closed")
    story.hear(far)
    assert story.offered(far) == [("p", True)], "its own life has joined: it is not told to stop"


def test_a_site_that_does_not_answer_is_not_waited_for() -> None:
    story, home, (far, wide) = vacant(("far", 1), ("wide", 2))
    assert story.offered(wide) == [("p", True)]
    story.wait(7, home, far)
    assert story.offered(far) == [("p", True)]


def test_an_offer_is_repeated_until_it_is_answered() -> None:
    story, _, (far,) = vacant(("far", 1))
    far.inbox.clear()
    story.hear(far)
    assert story.offered(far) == [("p", True)]
    far.arriving.add("p")
    story.hear(far)
    assert story.offered(far) == []


def test_who_has_taken_it_and_cannot_start_it_makes_way() -> None:
    story, _, (far, wide) = vacant(("far", 1), ("wide", 2))
    wide.arriving.add("p")
    story.hear(wide)
    wide.arriving.clear()
    story.hear(wide)
    assert story.offered(far) == [("p", True)]


def test_a_taker_that_falls_silent_makes_way() -> None:
    story, home, (far, wide) = vacant(("far", 1), ("wide", 2))
    wide.arriving.add("p")
    story.hear(wide)
    story.wait(11, home, far)
    assert story.offered(far) == []
    story.wait(3, home, far)
    assert story.offered(far) == [("p", True)]


def test_a_place_that_is_not_taken_up_in_time_is_closed_and_its_taker_told() -> None:
    story, home, (far,) = vacant(("far", 1))
    far.arriving.add("p")
    story.wait(int(TIMES.evict_after), home, far)
    far.inbox.clear()
    assert not story.said("vacancy.closed") and story.shards("p") == [0]
    story.wait(2, home, far)
    assert story.said("vacancy.closed")[0][1]["reason"] == "nobody has taken it up in time"
    assert story.offered(far) == [("p", False)] and story.shards("p") == []


def test_where_another_life_came_first_the_taker_is_told_to_leave_it_alone() -> None:
    story, _, (far,) = vacant(("far", 1))
    far.arriving.add("p")
    story.hear(far)
    story.join("p", "home")
    far.inbox.clear()
    story.hear(far)
    assert story.offered(far) == [("p", False)]


def test_a_site_where_it_failed_is_not_asked_again() -> None:
    story, home, (far,) = vacant(("far", 1))
    home.room = 1
    far.arriving.add("p")
    story.hear(far)
    second = story.join("p", "far")
    far.arriving.clear()
    story.give_up(far, "p", second)
    assert story.offered(home) == [] and len(story.said("vacancy.closed")) == 1
    assert story.said("shard.released") == [("shard.released", {"peer": "p", "shards": [0, 2]})]


def test_old_news_of_a_life_that_has_a_successor_change_nothing() -> None:
    story, home, _ = vacant()
    story.join("p", "elsewhere")
    events = len(story.events)
    story.hear(home)
    assert len(story.events) == events and sorted(story.membership.members) == ["p", "q"]


def test_a_restarted_coordinator_hears_of_it_again() -> None:
    story, home, (far,) = vacant(("far", 1))
    far.inbox.clear()
    story.start()
    assert story.shards("p") == [0]
    story.hear(far)
    story.hear(home)
    assert story.offered(far) == [("p", True)]
    ended = story.join("p", "far")
    story.say("p", Leave)
    story.start()
    story.hear(home)
    assert story.membership.latest["p"] == ended and not story.said("vacancy.opened")[2:], "that life is over and done"


def test_one_place_at_a_time_where_there_is_room_for_one() -> None:
    story, home, (far,) = vacant(("far", 1))
    story.give_up(home, "q", story.membership.latest["q"])
    assert story.offered(far) == [("p", True)]
    assert story.said("vacancy.closed") == [("vacancy.closed", {"peer": "q", "reason": "no site has room for it"})]


def test_a_peer_that_never_joined_has_a_place_too_and_a_finished_run_has_none() -> None:
    story, home, (far,) = vacant(("far", 3))
    story.give_up(home, "new", 0)
    assert ("new", True) in story.offered(far)
    story.membership.reached = "30 s"
    story.give_up(home, "q", story.membership.latest["q"])
    assert story.said("vacancy.closed") == [("vacancy.closed", {"peer": "q", "reason": "the run is over"})]


# --- any order ------------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("report"), st.integers(0, 3)),
        st.tuples(st.just("answer"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("arrive"), st.integers(0, 3)),
        st.tuples(st.just("fail"), st.integers(0, 3)),
        st.tuples(st.just("lose"), st.integers(0, 3)),
        st.tuples(st.just("time"), st.integers(1, 20)),
        st.tuples(st.just("restart")),
    ),
    max_size=60,
)


class Random(Story):
    """Supervisors that keep to the rules, messages that get lost, coordinators that restart."""

    def answer(self, supervisor: Supervisor, willing: bool) -> None:
        while supervisor.inbox:
            vacancy = supervisor.inbox.popleft()
            if not vacancy.free:
                supervisor.arriving.discard(vacancy.name)
            elif vacancy.name in supervisor.arriving:
                continue
            elif willing and vacancy.name not in supervisor.hosted and supervisor.report().room:
                supervisor.given_up.pop(vacancy.name, None)
                supervisor.arriving.add(vacancy.name)
            else:
                self.hear(supervisor, vacancy.name)
        self.hear(supervisor)

    def arrive(self, supervisor: Supervisor) -> None:
        for peer in sorted(supervisor.arriving):
            supervisor.arriving.discard(peer)
            supervisor.hosted[peer] = self.join(peer, supervisor.site)

    def fail(self, supervisor: Supervisor) -> None:
        for peer, life in sorted(supervisor.hosted.items()):
            if self.membership.latest[peer] == life:
                self.give_up(supervisor, peer, life)
            supervisor.hosted.pop(peer, None)

    def take(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("time", seconds):
                self.wait(seconds)
            case ("restart",):
                self.start()
            case (what, which, *more):
                supervisor = list(self.supervisors.values())[which]
                if what == "lose":
                    supervisor.inbox.clear()
                else:
                    {"report": self.hear, "answer": self.answer, "arrive": self.arrive, "fail": self.fail}[what](
                        supervisor, *more
                    )


@settings(derandomize=True, deadline=None, max_examples=300)
@given(steps=STEPS, rooms=st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_whatever_happens_every_place_is_filled_or_closed_and_no_lease_is_kept_for_nobody(
    steps: list[tuple[Any, ...]], rooms: list[int]
) -> None:
    story = Random()
    sites = [story.site(name, 0) for name in ("a", "a", "b", "c")]
    for number, supervisor in enumerate(sites):
        supervisor.hosted[f"p{number}"] = story.join(f"p{number}", supervisor.site)
        supervisor.room = rooms[number] + 1  # its own is among those that are hosted
    for step in steps:
        story.take(step)
        assert all(len(s.arriving) + len(s.hosted) <= s.room for s in sites), "more than there is room for"
    for _ in range(4):  # then all goes well for long enough: nobody takes a place any more that it does not fill
        for supervisor in sites:
            story.answer(supervisor, True)
            story.arrive(supervisor)
        story.wait(int(TIMES.evict_after) // 2, *sites)
    opened, closed = story.said("vacancy.opened"), story.said("vacancy.filled", "vacancy.closed")
    assert not story.membership._vacancies._openings and len(closed) <= len(opened)
    living = set(story.membership.members)
    assert set(story.membership.table.holders.values()) <= living, "shards are kept for a peer that does not come"
    homes = [peer for supervisor in sites for peer in supervisor.hosted if story.membership.latest[peer] ==
             supervisor.hosted[peer]]  # fmt: skip
    assert len(homes) == len(set(homes)) and set(homes) == living, "each that lives has one home"
