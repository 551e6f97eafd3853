"""The state machine under thousands of random orders of events, two rival coordinators included.

What is asserted lies in simulation.py: the independent account of each line of the run, and what holds between lines.
A failure is shrunk to a short schedule, and says the line that keeps it in regressions.txt.

What holds: in one line of a run there is one commit per round, made of what its contributors reported with one digest;
no sample is in it twice; rounds, epochs and generations only grow; what an old life says changes nothing; nobody waits
for a joiner. A peer never obeys a lower generation than it has obeyed. A coordinator that recovers begins only with a
majority of the last view that its peers know, or by a person's word, and has every commit that a majority of that view
had heard of. Once the others are gone, all peers are in one line, and its account is exact.

What cannot hold: two lines may both commit a round of the same number, if those who recover do not know that they had
been evicted. The line of the lower generations is void from the fork on: its samples are read again. Epochs grow in a
line, and with the generation; a new line can begin below the last epoch of a line that it has not heard of.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from schedules import SCENARIOS, Schedule, read, run, written

LINES = (Path(__file__).parent / "regressions.txt").read_text().splitlines()
REGRESSIONS = [line for line in LINES if line.strip() and not line.startswith("#")]
USUAL = {"cold": 200, "warm": 200, "eager": 60, "patient": 60, "hidden": 200,
         "two epochs": 120, "short stream": 80, "long stream": 80, "sites": 100, "drift": 150, "black out": 120,
         "rivals": 150, "all at once": 120, "faults": 150, "twins": 150, "twin streams": 80,
         "twins and all": 120}  # fmt: skip
SEEN = {
    "cold": {"loop.founded", "peer.evicted", "run.rolled_back"},
    "warm": {"round.shrunk", "round.aborted", "link.cut", "peer.recovered", "run.rolled_back"},
    "hidden": {"direct sum", "ring sum", "tree sum", "tree broadcast", "direct all_gather"},
    "sites": {"vacancy.filled", "vacancy.closed", "shard.reassigned"},
    "twins": {"peer.paired", "both twins had proposed", "one twin had proposed", "round.shrunk", "run.rolled_back"},
    "drift": {"parity.mismatch", "parity.undecided", "parity.voided"},
    "faults": {"peer.quarantined", "peer.left_out", "peer.taken_back"},
    "black out": {"run.resumed", "run.rolled_back"},
    "rivals": {"rebuilt by a majority", "rebuilt by a person's word", "peer.led_back", "went on beside a higher line"},
}


def play_many(name: str, number: int, new_seed: int | None = None) -> Counter[str]:
    """Random schedules of a scenario; returns what happened, with the number of worlds in which it did."""
    happened: Counter[str] = Counter()

    @settings(max_examples=number, deadline=None, derandomize=new_seed is None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(schedule=SCENARIOS[name].schedules())
    def no_schedule_breaks_a_promise(schedule: Schedule) -> None:
        try:
            happened.update(run(name, schedule).happened())
        except Exception as error:
            error.add_note(f"to keep this in regressions.txt: {written(name, schedule)}")
            raise

    (no_schedule_breaks_a_promise if new_seed is None else seed(new_seed)(no_schedule_breaks_a_promise))()
    return happened


@pytest.mark.parametrize("line", REGRESSIONS)
def test_what_broke_a_promise_once_does_not_again(line: str) -> None:
    name, schedule = read(line)
    assert line.startswith(written(name, schedule))
    run(name, schedule)


@pytest.mark.timeout(600)  # a failure is shrunk, which takes its time
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_schedule_breaks_a_promise_and_the_run_goes_on(name: str) -> None:
    happened = play_many(name, USUAL[name])
    assert happened.keys() >= SEEN.get(name, set()), "the schedules do not reach what they are for"


@pytest.mark.chaos
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", SCENARIOS)
def test_chaos_of_orders(name: str) -> None:
    """CHAOS_ORDERS schedules in all, with new seeds (ORDERS_SEED=N begins with that one)."""
    number = int(os.environ.get("CHAOS_ORDERS", "20000")) // len(SCENARIOS)
    first = int(os.environ.get("ORDERS_SEED", "0")) or int.from_bytes(os.urandom(4))
    happened = play_many(name, number, first)
    print(
        f"\n{name}: {number} schedules from seed {first}; worlds in which it happened: {dict(happened.most_common())}"
    )
