"""What can happen in a run, as lists of (action, number): `play` makes it happen, `finish` heals and goes on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

from hypothesis import strategies as st
from simulation import GATHER, KEPT, OUTER, SPREAD, SimPeer, World

NAMES = "abcde"
Action = Callable[[World, SimPeer, int], object]


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
}
COMMON = [
    *("train", "train", "train", "reduce", "hop", "hop", "hop", "up", "down", "exchange", "exchange", "exchange"),
    *("collect", "measure all", "path", "everybody", "everybody", "turn", "tick", "tick", "say", "transfer", "life"),
]

schedules = st.lists(st.tuples(st.sampled_from([*ACTIONS, *COMMON]), st.integers(0, 19)), min_size=20, max_size=90)


def play(world: World, schedule: list[tuple[str, int]], *, warm: bool, names: str = "abc") -> World:
    """warm: these peers train already; else two are about to join. The number chooses the peer and the variant."""
    for name in names if warm else "ab":
        world.start(name)
    if warm:
        assert world.run_until(lambda: world.ledger.version >= 1)
    for action, number in schedule:
        peers = list(world.peers.values())
        ACTIONS[action](world, peers[-1 - number % min(len(peers), 7)], number)
        if world.membership is None and number % 3 == 0:
            world.restart()
        world.steps += 1
    return world


def finish(world: World) -> World:
    """All trouble ends. Then the run must go on by itself, unless the committed state died with its last holder."""
    world.heal()
    world.check_replay()
    world.start("z")
    target = world.ledger.version + KEPT
    alive = world.run_until(lambda: world.ledger.version >= target or not world.obtainable())
    assert alive, "nothing is in the way, and yet no round is committed"
    world.check_replay()
    world.check_agreement()
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
    alive = world.run_until(lambda: membership.progress.finished or not world.obtainable(), turns=400, read=3)
    assert alive, "nothing is in the way, and yet the data is not used up"
    world.check_audit()
    return world
