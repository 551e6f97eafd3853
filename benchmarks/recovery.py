"""One of three peers is killed or frozen in the middle of an all-reduce: how long until the others hold the right sum?

The victim does it to itself, once it has received half of its chunks, and says when. The survivors' time runs from then
to the return of the last one. Right after it, in the same processes, they reduce without any disturbance; then the
victim comes back as a new life, and another one is the victim.

    python -m benchmarks.recovery --json recovery.json
    python -m benchmarks.recovery --size 4 --repeat 2                      # a quick look
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

from benchmarks import common
from benchmarks.allreduce import known
from benchmarks.common import BenchmarkError, Report, Team

PEERS = 3
SIDE = "peer"
TARGETS = {
    "SIGKILL": "at most 0.15 s more than an undisturbed operation of the survivors",
    "SIGSTOP": "less than 3 s",
}


@dataclass
class Times:
    """Seconds. recovered: from the fault to the last survivor's return; undisturbed: survivors alone, after it."""

    recovered: list[float] = field(default_factory=list)
    undisturbed: list[float] = field(default_factory=list)


def disturb(team: Team, victim: int, fault: str, elements: int) -> tuple[float, float]:
    """One operation that the victim does not survive, and one of the survivors alone; seconds of each."""
    survivors = [worker for index, worker in enumerate(team.workers) if index != victim]
    at = time.monotonic() + common.LEAD_TIME
    for index, worker in enumerate(team.workers):
        fatal = {"fatal": [0.5, fault]} if index == victim else {}
        worker.tell(do="run", name=SIDE, elements=elements, at=at, **fatal)
    fell = team.workers[victim].hear()
    if "fatal" not in fell:
        raise BenchmarkError(f"the victim finished: {fell}")
    sample = common.gather(survivors)
    for answer in sample.answers:
        if answer["contributors"] != [worker.name for worker in survivors] or answer["attempts"] < 2:
            raise BenchmarkError(f"the fault came too late to disturb this operation: {answer}")
    alone = common.operate(survivors, SIDE, elements)
    return sample.ended - fell["fatal"], alone.seconds


def measure(team: Team, coordinator: str, fault: str, arguments: argparse.Namespace) -> Times:
    times = Times()
    links = known(shared_memory=False, stripes=arguments.stripes)
    for turn in range(arguments.repeat):
        team.operate(SIDE, arguments.size[0])
        victim = turn % PEERS
        recovered, undisturbed = disturb(team, victim, fault, arguments.size[0])
        common.progress(f"{fault} of w{victim}: {recovered:.3f} s, undisturbed {undisturbed:.3f} s")
        times.recovered.append(recovered)
        times.undisturbed.append(undisturbed)
        team.replace(victim, SIDE, coordinator, links=links)
    return times


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=common.sizes, default=common.sizes("256"), help="MiB of float32")
    parser.add_argument("--faults", default="SIGKILL,SIGSTOP")
    parser.add_argument("--stripes", type=int, help="TCP connections per link (default: ours)")
    arguments = parser.parse_args()
    with common.one_line_errors():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    columns = ("fault", "size", "s to the right result", "s undisturbed", "s more", "to reach")
    report = Report("recovery", f"One of {PEERS} peers is lost in the middle of an all-reduce, loopback", columns)
    with common.local_team(PEERS) as team:
        coordinator = team.coordinate({"min_peers": 2, "quorum": 1.0})
        team.add_peers(SIDE, coordinator, links=known(shared_memory=False, stripes=arguments.stripes))
        report.machine["cc"] = team.settle(SIDE)
        for fault in arguments.faults.split(","):
            times = measure(team, coordinator, fault, arguments)
            more = [slow - fast for slow, fast in zip(times.recovered, times.undisturbed, strict=True)]
            cells = [common.spread(each, 1, 3) for each in (times.recovered, times.undisturbed, more)]
            size = common.mib(arguments.size[0])
            report.add((fault, size, *cells, TARGETS[fault]), fault=fault, elements=arguments.size[0], **vars(times))
    common.publish(report, arguments)


if __name__ == "__main__":
    main()
