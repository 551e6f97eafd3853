"""What can happen in a run, as lists of (action, number): `play` makes it happen, `finish` heals and goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

from hypothesis import strategies as st
from simulation import GATHER, KEPT, OUTER, SPREAD, SimData, SimPeer, World

from elastic.config import RunPolicy

NAMES = "abcde"
Action = Callable[[World, SimPeer, int], object]
Schedule = list[tuple[str, int]]


def _cut(world: World, peer: SimPeer, number: int) -> None:
    other = NAMES[number % len(NAMES)]
    if other != peer.name:
        world.cuts ^= {frozenset((peer.name, other))}


def _path(world: World, peer: SimPeer, number: int) -> None:
    """Each can talk to its neighbours only."""
    world.cuts = {frozenset(pair) for pair in combinations(NAMES, 2) if abs(ord(pair[0]) - ord(pair[1])) > 1}


def _hop(world: World, peer: SimPeer, number: int) -> None:
    """What a peer has said and what it is told get through."""
    world.deliver_up(peer, 20)
    world.deliver_down(peer, 20)


def _everybody(world: World, peer: SimPeer, number: int) -> None:
    for each in list(world.peers.values()):
        _hop(world, each, number)
    for each in list(world.peers.values()):
        for tag in each.slots:
            world.exchange(each, tag)
        world.transfer(each)


def _train(world: World, peer: SimPeer, number: int) -> None:
    world.act(peer, "lease") if not peer.reader.left() else None
    world.act(peer, "read", number % 5)
    world.act(peer, "propose")


def _freeze(world: World, peer: SimPeer, number: int) -> None:
    peer.frozen = not peer.frozen


def _get_stuck(world: World, peer: SimPeer, number: int) -> None:
    peer.stuck = peer.mode != "training"


def _restart(world: World, peer: SimPeer, number: int) -> None:
    world.kill_coordinator(number % 4)
    world.restart()


def _crash_in_turn(world: World, peer: SimPeer, number: int) -> None:
    world.crash = ("before", "after")[number % 2]


def _recover(world: World, peer: SimPeer, number: int) -> None:
    """A person starts another coordinator; the one before may be lost, or only out of reach."""
    if world.host.recovery is None and len(world.hosts) < HOSTS:
        if number % 2:
            world.lose(world.host)
        world.recover()


def _move(world: World, peer: SimPeer, number: int) -> None:
    world.move(peer, world.hosts[-1 - number // 7 % len(world.hosts)])


def _move_all(world: World, peer: SimPeer, number: int) -> None:
    for each in list(world.peers.values()):
        world.move(each, world.hosts[-1 - number % len(world.hosts)])


def _split(world: World, peer: SimPeer, number: int) -> None:
    """Some peers find the newest coordinator, the others an older one."""
    older = world.hosts[-1 - (1 + number % 2) % len(world.hosts)]
    for place, each in enumerate(p for p in list(world.peers.values()) if p.running):
        world.move(each, world.hosts[-1] if (5 + number) >> place % 4 & 1 else older)


def _meet_again(world: World, peer: SimPeer, number: int) -> None:
    """They go separate ways for a while, and come together at the newest coordinator."""
    _split(world, peer, number)
    for _ in range(6):
        world.turn(seconds=1.0)
    _move_all(world, peer, 0)


def _revive(world: World, peer: SimPeer, number: int) -> None:
    """Any of the coordinators dies, or comes back from its journal."""
    host = world.hosts[-1 - number % len(world.hosts)]
    if number % 3 and host.membership is not None:
        world.kill_coordinator(number % 4, host)
    else:
        world.restart(host)


def _drift(world: World, peer: SimPeer, number: int) -> None:
    world.corrupt(peer, lasting=number % 4 == 3)


def _begin_again(world: World, peer: SimPeer, number: int) -> None:
    """Whoever was told that nobody can say what the state is leaves, and comes back with its checkpoint."""
    for each in list(world.peers.values()):
        if each.running and each.mode == "stopped":
            world.act(each, "leave")
            world.start(each.name)


def _black_out(world: World, peer: SimPeer, number: int) -> None:
    """Everything dies; as many peers as the number says come back."""
    world.black_out(journal=number % 2 == 0)
    for name in NAMES[: 1 + number // 2 % len(NAMES)]:
        world.start(name)


ACTIONS: dict[str, Action] = {
    "life": lambda w, p, n: w.start(NAMES[n % len(NAMES)]),
    "enter": lambda w, p, n: w.act(p, "enter"),
    "train": _train,
    "propose": lambda w, p, n: w.act(p, "propose"),
    "reduce": lambda w, p, n: w.act(p, "reduce"),
    "collect": lambda w, p, n: [w.act(each, "reduce", (SPREAD, GATHER)[n % 2]) for each in list(w.peers.values())],
    "measure": lambda w, p, n: w.act(p, "measure", n),
    "say": lambda w, p, n: w.act(p, "ask_again"),
    "up": lambda w, p, n: w.deliver_up(p, 1 + n % 3),
    "down": lambda w, p, n: w.deliver_down(p, 1 + n % 3),
    "hop": _hop,
    "everybody": _everybody,
    "exchange": lambda w, p, n: w.exchange(p, OUTER),
    "transfer": lambda w, p, n: w.transfer(p),
    "turn": lambda w, p, n: w.turn(read=n % 4),
    "turns": lambda w, p, n: [w.turn(seconds=1.0) for _ in range(1 + n % 5)],
    "tick": lambda w, p, n: w.tick((0.25, 0.5, 1.0)[n % 3]),
    "gap": lambda w, p, n: w.tick(5.0 + n),
    "die": lambda w, p, n: w.die(p, keep=bool(n % 2)),
    "prove": lambda w, p, n: w.prove(p),
    "lose link": lambda w, p, n: w.lose_link(p, w.peers[1000 + n % len(w.peers)]),
    "freeze": _freeze,
    "stuck": _get_stuck,
    "cut": _cut,
    "path": _path,
    "measure all": lambda w, p, n: [w.act(each, "measure", 1) for each in list(w.peers.values())],
    "give up": lambda w, p, n: w.act(p, "give_up", list(p.slots)[n % len(p.slots)]),
    "reset": lambda w, p, n: w.act(p, "reset"),
    "leave": lambda w, p, n: w.act(p, "leave"),
    "kill coordinator": lambda w, p, n: w.kill_coordinator(n % 4),
    "restart": _restart,
    "crash": _crash_in_turn,
    "save": lambda w, p, n: w.save(p),
    "save all": lambda w, p, n: [w.save(each) for each in w.peers.values()],
}
TROUBLES: dict[str, dict[str, Action]] = {
    "": {},
    "drift": {"drift": _drift, "begin again": _begin_again},
    "black out": {"black out": _black_out},
    "faults": {
        "spoil": lambda w, p, n: w.act(p, "spoil", n),
        "spoil all": lambda w, p, n: [w.act(each, "spoil", n) for each in list(w.peers.values())],
        "calm": lambda w, p, n: [w.turn(seconds=2.5) for _ in range(1 + n % 8)],
    },
    "sites": {"hand over": lambda w, p, n: w.hand_over(p, room=n % 3), "die": ACTIONS["die"]},
    "rivals": {
        "recover": _recover,
        "move": _move,
        "move all": _move_all,
        "split": _split,
        "meet again": _meet_again,
        "revive": _revive,
        "accept": lambda w, p, n: w.accept(),
    },
}
COMMON = [
    *("train", "train", "train", "reduce", "hop", "hop", "hop", "up", "down", "exchange", "exchange", "exchange"),
    *("collect", "measure all", "path", "everybody", "everybody", "turn", "tick", "tick", "say", "transfer", "life"),
]

HOSTS = 4  # coordinators in one run
TWINS = RunPolicy(redundancy=2)


@dataclass(frozen=True)
class Scenario:
    """A world for schedules. warm: these peers train already; else they are about to join.

    data, ahead: as for World; with data of so many epochs, the run goes on until it is used up.
    """

    name: str
    names: str = "abc"
    warm: bool = True
    hide: bool = False
    policy: RunPolicy = field(default_factory=RunPolicy)
    trouble: tuple[str, ...] = ()
    often: tuple[str, ...] = ()
    data: SimData | None = None
    ahead: int = 0

    def troubles(self) -> list[str]:
        return [action for trouble in self.trouble for action in TROUBLES[trouble]] * 4

    def schedules(self) -> st.SearchStrategy[Schedule]:
        actions = st.sampled_from([*ACTIONS, *COMMON, *self.troubles(), *self.often * 6])
        return st.lists(st.tuples(actions, st.integers(0, 19)), min_size=20, max_size=90)


EVERYTHING = ACTIONS | {name: action for group in TROUBLES.values() for name, action in group.items()}


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("cold", "ab", warm=False),
        Scenario("warm"),
        Scenario("eager", policy=RunPolicy(quorum=0.3, max_attempts=1)),
        Scenario("patient", policy=RunPolicy(quorum=1.0, max_attempts=3)),
        Scenario("hidden", "abcde", hide=True, often=("measure all", "collect")),
        Scenario("two epochs", data=SimData(epochs=2), ahead=2, often=("train", "reset")),
        Scenario("short stream", data=SimData(epochs=2, stream=18), often=("train",)),
        Scenario("long stream", "ab", warm=False, data=SimData(epochs=2, stream=31), ahead=3, often=("train", "turn")),
        Scenario("sites", "abcd", data=SimData(epochs=2), trouble=("sites",), often=("train", "life")),
        Scenario("twins", "abcd", policy=TWINS, data=SimData(epochs=2), ahead=1, often=("train", "turn")),
        Scenario("twin streams", "abc", policy=TWINS, data=SimData(epochs=2, stream=31), often=("train", "turn")),
        Scenario("drift", "abcd", trouble=("drift",), often=("turn", "train", "save all")),
        Scenario("black out", trouble=("black out",), often=("turns", "save", "turn")),
        Scenario("rivals", "abcd", trouble=("rivals",), often=("turns", "turn", "split")),
        Scenario("faults", "abcd", trouble=("faults",), often=("turns", "life", "spoil", "calm")),
        Scenario("all at once", "abcd", trouble=("drift", "black out", "rivals"), often=("turns", "save")),
        Scenario(
            "twins and all", "abcd", policy=TWINS, trouble=("drift", "black out", "rivals"), often=("turns", "save")
        ),
    )
}


def play(scenario: Scenario, schedule: Schedule) -> World:
    """The number chooses the peer and the variant."""
    world = World(scenario.policy, hide=scenario.hide, data=scenario.data, ahead=scenario.ahead)
    for name in scenario.names:
        world.start(name)
    if scenario.warm:
        assert world.run_until(lambda: world.ledger.version >= 1)
    for action, number in schedule:
        peers = list(world.peers.values())
        EVERYTHING[action](world, peers[-1 - number % min(len(peers), 7)], number)
        if world.membership is None and number % 3 == 0:
            world.restart()
        world.steps += 1
    return world


def finish(world: World) -> World:
    """All trouble ends. Then the run must go on by itself, unless nobody has anything to go on from."""
    world.heal()
    world.start("z")
    if world.host.recovery is not None:
        _recover_at_last(world)
    world.check_replay()
    target = world.ledger.version + KEPT
    alive = world.run_until(lambda: world.over(target))
    assert alive, "nothing is in the way, and yet no round is committed"
    if world.ledger.halted:
        _begin_again(world, next(iter(world.peers.values())), 0)
        world.run_until(lambda: not world.ledger.halted, turns=40)
        assert world.run_until(lambda: world.over(target)), "all have left and come back, and the loop still stands"
    world.check_replay()
    assert world.run_until(world.agreed, turns=50), "peers train on from different states"
    world.check_truth()
    world.check_audit()
    return world


def use_up(world: World) -> World:
    """All trouble ends, and the data does; what nobody can have any more ends the run as well."""
    world.heal()
    for peer in world.peers.values():
        peer.stuck = False
    world.start("z")
    membership = world.membership
    assert membership is not None
    alive = world.run_until(lambda: membership.progress.finished or world.over(1 << 40), turns=400, read=3)
    assert alive, "nothing is in the way, and yet the data is not used up"
    world.check_audit()
    return world


def _recover_at_last(world: World) -> None:
    """With a majority or without; a run that nobody remembers begins from checkpoints, or anew."""
    if world.run_until(lambda: world.host.recovery is None, turns=20):
        return
    world.accept()
    if not world.run_until(lambda: world.host.recovery is None, turns=20):
        remembered = any(peer.view for peer in world.peers.values() if peer.running)
        assert not remembered, "a run that somebody remembers is not recovered"
        world.start_anew()


def run(name: str, schedule: Schedule) -> World:
    world = play(SCENARIOS[name], schedule)
    return use_up(world) if world.data else finish(world)


def written(name: str, schedule: Schedule) -> str:
    """A schedule as one line of regressions.txt."""
    return f"{name} | " + ", ".join(f"{action} {number}" for action, number in schedule)


def read(line: str) -> tuple[str, Schedule]:
    """The inverse of `written`; what it found may follow behind another bar."""
    name, events, *_ = (part.strip() for part in line.split("|"))
    pairs = (event.strip().rpartition(" ") for event in events.split(",") if event.strip())
    return name, [(action, int(number)) for action, _, number in pairs]
