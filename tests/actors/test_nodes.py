"""Several nodes in one Ray: where the next life of a peer begins when its node, or its luck there, is gone."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.config import RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.events import EventReader

pytestmark = pytest.mark.timeout(240)

SCRIPT = """
import os, signal, time

def dies_twice(peer, config):
    print(f"life {peer.life} was here", flush=True)
    if peer.life <= 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"life": peer.life}

def waits_once(peer, config):
    if peer.life == 1:
        time.sleep(1000)
    return {"life": peer.life}
"""


@pytest.fixture
def site(nodes: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a supervisor of one peer that runs `function`, on the head."""
    import ray

    from actors.peer import PeerSpec
    from actors.restarts import FailureConfig
    from actors.supervisor import EventLogSpec, SiteSupervisor

    script = tmp_path / f"script_{os.getpid()}_{secrets.token_hex(4)}.py"
    script.write_text(SCRIPT)
    with Coordinator(run="site", policy=RunPolicy(), timeouts=Timeouts(), events=tmp_path / "events.jsonl") as served:
        started: list[Any] = []

        def start(function: str, ranks: int = 1, **policy: Any) -> Any:
            spec = PeerSpec(
                coordinator=served.address,
                run="site",
                name="p0",
                site="here",
                script=str(script),
                function=function,
                events_dir=str(tmp_path),
                ranks=ranks,
            )
            actor: Any = SiteSupervisor
            log = EventLogSpec(run="site", path=tmp_path / "supervisor.jsonl")
            supervisor = actor.options(resources={"head": 1}).remote([spec], FailureConfig(**policy), log)
            started.append(supervisor)
            ray.get(supervisor.start.remote())
            return supervisor

        yield start
        for supervisor in started:
            ray.get(supervisor.stop.remote())
            ray.kill(supervisor)


def report(supervisor: Any, *states: str) -> Any:
    """What the supervisor says of its peer once that is in one of these states."""
    import ray

    deadline, pause = time.monotonic() + 120, threading.Event()
    while True:
        (said,) = ray.get(supervisor.report.remote())
        if said.state in states:
            return said
        assert time.monotonic() < deadline, said
        pause.wait(0.1)


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in EventReader(folder / "supervisor.jsonl").read() if event["event"] == name]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_node_where_it_died_twice_is_avoided(site: Callable[..., Any], tmp_path: Path, ranks: int) -> None:
    ended = report(site("dies_twice", ranks=ranks, pause_seconds=0.1), "finished", "failed")
    assert (ended.state, ended.lives) == ("finished", 3), ended
    first, second, third = [event["node"] for event in events(tmp_path, "peer.started")]
    assert first == second != third


def test_the_end_of_a_log_comes_from_the_node_that_has_it(site: Callable[..., Any], tmp_path: Path) -> None:
    from actors.logs import tail
    from actors.unit import on_node

    ended = report(site("dies_twice", max_restarts=0), "failed")
    assert ended.error.endswith(f"the last lines of {tmp_path}/logs/p0.1.log:\n  life 1 was here")
    node = events(tmp_path, "peer.started")[0]["node"]
    said = asyncio.run(on_node(node, 60.0, tail, str(tmp_path / "logs" / "p0.1.log")))
    assert said == ("life 1 was here",)


def test_ranks_that_are_one_peer_are_on_one_node_and_peers_on_several(nodes: Any) -> None:
    from actors.peer import PeerSpec
    from actors.restarts import Place
    from actors.unit import NODE_ID, Unit

    about = {"coordinator": "tcp://127.0.0.1:1", "run": "r", "site": "s", "script": "none.py", "cpus": 0.4, "ranks": 2}
    one, other = sorted(node.node_id for node in nodes.worker_nodes)

    async def node_of(title: str, place: Place, **options: Any) -> str:
        unit = Unit(PeerSpec(name=title, **about, **options), title, place, None)
        try:
            process = await asyncio.wait_for(unit.process(), 150)
        finally:
            unit.kill()
        await unit.gone()
        assert len(process.pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in process.pids)
        return process.node

    async def found() -> list[str]:
        spread = [node_of(f"spread-{number}", Place(), spread=True) for number in range(2)]
        kept = node_of("kept-0", Place(node=other), spread=True)
        sent_away = node_of("sent-0", Place(avoid=frozenset({one})), spread=True)
        labelled = node_of("labelled-0", Place(), labels={NODE_ID: other}, spread=True)
        return [*await asyncio.gather(*spread), await kept, await sent_away, await labelled]

    assert asyncio.run(found()) == [one, other, other, other, other]


def test_without_room_anywhere_it_is_given_up_with_the_reason(site: Callable[..., Any], tmp_path: Path) -> None:
    import ray

    @ray.remote(num_cpus=1)
    class Filler:
        def here(self) -> None: ...

    fillers = [Filler.remote() for _ in range(2)]
    ray.get([filler.here.remote() for filler in fillers], timeout=60)
    ended = report(site("dies_twice", place_seconds=2.0), "failed")
    assert ended.error == "no node has had room for it in 2 s" and ended.lives == 1
    for filler in fillers:
        ray.kill(filler)


def test_the_next_life_of_a_peer_whose_node_is_killed_begins_on_the_other(
    site: Callable[..., Any], nodes: Any, tmp_path: Path
) -> None:
    supervisor = site("waits_once")
    home = report(supervisor, "running").node
    (killed,) = [node for node in nodes.worker_nodes if node.node_id == home]
    nodes.remove_node(killed, allow_graceful=False)
    ended = report(supervisor, "finished", "failed")
    assert (ended.state, ended.lives) == ("finished", 2) and ended.trained.result == {"life": 2}
    first, second = [event["node"] for event in events(tmp_path, "peer.started")]
    assert first == home != second
    (lost,) = events(tmp_path, "peer.lost")
    assert lost["node"] == home and lost["evidence"] in ("its node is gone", "its process has ended")
