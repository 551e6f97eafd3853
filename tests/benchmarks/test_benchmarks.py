"""The loopback benchmarks run as they are documented, with tiny sizes: complete JSON, and only right results.

A worker compares every result with the exact sum, and the benchmark fails if one is wrong.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def report(name: str, *arguments: str) -> dict[str, Any]:
    """What `python -m benchmarks.NAME ... --json -` prints, after a look at what every report has."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["name"] == name and found["command"].startswith(f"python -m benchmarks.{name} ")
    assert {"cores", "kernel", "torch", "system_congestion_control", "date"} <= found["machine"].keys()
    for sample in found["samples"]:
        assert list(sample["cells"]) == found["columns"]
    return found


def test_allreduce() -> None:
    found = report("allreduce", "--sizes", "0.0625,0.5", "--repeat", "2", "--warm", "1", "--cc", "reno")
    sides = {(sample["side"], sample["elements"]): sample for sample in found["samples"]}
    for elements in (16384, 131072):
        for side in ("gloo", "gloo-cc", "group", "peer"):
            assert len(sides[side, elements]["seconds"]) == 2
            assert min(sides[side, elements]["seconds"]) > 0
    assert {sides[side, 16384]["cc"] for side in ("gloo-cc", "group", "peer")} == {"reno"}
    assert sides["gloo", 16384]["cc"] == found["machine"]["system_congestion_control"]
    assert sum("round protocol adds" in note for note in found["notes"]) == 2


def test_recovery() -> None:
    (sample,) = report("recovery", "--size", "32", "--repeat", "1", "--faults", "SIGKILL")["samples"]
    assert len(sample["recovered"]) == len(sample["undisturbed"]) == 1
    assert min(sample["recovered"] + sample["undisturbed"]) > 0


def test_memory() -> None:
    samples = report("memory", "--sizes", "32", "--repeat", "1", "--wires", "f32,int8")["samples"]
    cells = [sample["cells"] for sample in samples]
    assert {(cell["side"], cell["wire"]) for cell in cells} == {
        (side, wire) for side in ("group", "peer") for wire in ("f32", "int8")
    }
    for sample in samples:
        assert len(sample["extra_bytes"]) == 2
        assert 0 < max(sample["extra_bytes"]) < 64 << 20


def test_plan(tmp_path: Path) -> None:
    """On reports of measurements that are made up, a loop that waits 1.5 s in 32 steps and a bare exchange; and on the
    table in the docs.
    """
    ends = [0.1 * step + (1.5 if step == 32 else 0.0) for step in range(33)]
    answer = {"ends": ends, "exchanges": [[1.5, 0.1]], "sent": 8_400_000}
    algorithm = {"title": "DiLoCo", "loop": "DiLoCo", "wire": "f32", "fragments": 1, "delay": 0}
    loop = {"algorithm": algorithm, "rate": 50.0, "period": 32, "seconds": 0.1, "answers": [answer, answer]}
    cells = {"side": "group, stripes auto", "wire": "int4+int8"}
    bare = [{"cells": {**cells, "wire": wire}, "seconds": [2.0], "elements": 1 << 26} for wire in ("f32", "int4")]
    files = []
    for name, words, samples in (("overlap", "--rates 50", [loop]), ("wan_allreduce", "wan3 --size 256", bare)):
        files.append(tmp_path / name)
        found = {"name": name, "command": f"python -m benchmarks.{name} {words}", "samples": samples}
        files[-1].write_text(json.dumps(found))
    found = report("plan", *map(str, files), "docs/benchmarks.md")
    trained, exchanged, *table = (sample["cells"] for sample in found["samples"])
    assert trained["utilisation %: measured"] == "68.1" and trained["MB a peer sends: measured"] == "8.400"
    assert 60 < float(trained["predicted"]) < 75 and 8.39 < float(trained["predicted MB"]) < 8.5
    assert exchanged["wire"] == "f32", "results of int4 that come back in int4 are not what is predicted"
    # 358 MB at 400 Mbit/s, of which headers leave 96.5 % and links fill 93 %, and 1.5 round trips of 0.1 s.
    assert float(exchanged["predicted s"]) == pytest.approx(358e6 / (50e6 * 0.965 * 0.93) + 0.15, rel=0.01)
    assert exchanged["error"] == f"{100 * (float(exchanged['predicted s']) / 2 - 1):+.0f} %"
    assert len(table) == 21 and {row["Mbit/s"] for row in table} == {"1000", "200", "50"}


def test_membership() -> None:
    churn = ("--between", "10", "--crashes", "10", "--leaves", "10")
    found = report("membership", "--peers", "40", "--seconds", "60", *churn, "--sockets", "12", "--turns", "2")
    joined, training, real = found["samples"]
    assert len(real["views"]) == 4 and real["beats"] > 0
    assert len(joined["views"]) == 39, "each but the first is told of by a view"
    ends = int(training["cells"]["crashes"]) + int(training["cells"]["leaves"])
    assert ends > 3 and len(training["views"]) > ends, "all heard of each end, and of those who came back"
    assert training["sent"]["Begin"] > 40 and training["sent"]["Commit"] > 40
    assert any(" rounds committed" in note and not note.startswith("0 ") for note in found["notes"])


ROWS = [
    *("data-parallel", "alone", "alone-long", "diloco", "diloco-gentle", "diloco-low", "eager-low", "delayed", "eager"),
    *("delayed-fast", "delayed-plain", "co2"),
    *("streaming", "streaming-int4", "streaming-e3m0", "streaming-lost10", "streaming-lost30", "decoupled"),
]


def test_detector() -> None:
    found = report("detector", "--quick")
    assert not [note for note in found["notes"] if "FAILED" in note]
    assert [note for note in found["notes"] if note.startswith("500 clean windows") and ": 0 alarms in " in note]
    gated = [sample for sample in found["samples"] if sample["cells"]["peers"] == "16"]
    measured = {"slow sender", "slow receiver", "slow link", "slow peer", "bad gradient"}
    assert {sample["cells"]["fault"] for sample in gated} == measured | {"two delays", "any two"}
    assert all(0.9 <= sample[key] <= 1 for sample in found["samples"] for key in ("recall", "precision"))


def test_telemetry() -> None:
    found = report("telemetry", "--quick", "--size", "1")
    assert not [note for note in found["notes"] if "FAILED" in note]
    *parts, whole = found["samples"]
    assert [sample["cells"]["part"] for sample in parts] == ["collecting", "beating", "witness", "marks"]
    assert all(sample["seconds"] > 0 and sample["beats"] > 3 for sample in parts) and 0 < whole["share"] < 0.02


def test_what_so_few_alarms_leave_possible() -> None:
    from benchmarks.detector import upper

    assert upper(0) == pytest.approx(-math.log(0.05)) and upper(1) == pytest.approx(4.744, abs=0.001)
    assert upper(10) == pytest.approx(16.962, abs=0.001)


def test_a_recorded_run_is_replayed_as_it_was(tmp_path: Path) -> None:
    """A trace in which one peer becomes slow, and one without."""
    from benchmarks.detector import alarms, recorded, replayed

    for factor, expected in ((1.0, {}), (4.0, {"slow peer": 1})):
        lines = [
            [at / 2, name, [], 0.1 * (factor if name == "b" and at > 90 else 1.0) + 0.001 * (at % 3), []]
            for at in range(119)
            for name in "abc"
        ]
        path = tmp_path / f"{factor}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        beats = recorded(path)
        assert len(beats) == 357 and beats[0].name == "a"
        assert dict(alarms(replayed(beats, 60, np.random.default_rng(1)))) == expected


def test_quality() -> None:
    found = report("quality", "--quick")
    rows = {sample["row"]: sample for sample in found["samples"]}
    assert list(rows) == ROWS
    for row in rows.values():
        first, second = row["loss"]
        assert math.isfinite(first) and math.isfinite(second) and first != second
        assert first < math.log(256), "worse than an untrained model"
    sent = {name: row["sent"][0] for name, row in rows.items()}
    assert sent["data-parallel"] == 16 * sent["diloco"] == 16 * sent["decoupled"], "H = 16"
    assert sent["streaming"] == sent["diloco"] > 7 * sent["streaming-int4"] == 7 * sent["streaming-e3m0"]
    assert sent["alone"] == sent["alone-long"] == 0
    arrived = {name: sum(row["arrived"]) / 2 for name, row in rows.items()}
    assert 0.5 < arrived["streaming-lost30"] < arrived["streaming-lost10"] < arrived["streaming"] == 1
    assert sent["streaming-lost30"] < sent["streaming"]
    assert sum(note.startswith(("holds", "FAILS")) for note in found["notes"]) == 4


def test_the_quality_of_an_unknown_row_is_refused_in_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks.quality", "--rows", "magic"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 1 and done.stderr.startswith("benchmark: no row is called magic: choose from ")
    assert done.stderr.count("\n") == 1


def held(**losses: list[float]) -> dict[str, bool | None]:
    """Which gates of benchmarks.quality hold for these; names have _ for -."""
    from benchmarks.quality import Outcome, Results, gates

    results = Results(4, {name.replace("_", "-"): [Outcome(loss) for loss in each] for name, each in losses.items()})
    return {gate.name.removeprefix("M = 4, "): gate.holds for gate in gates(results, limit=3.0)}


def test_the_gates_of_quality() -> None:
    sound, near, drops, order = held(streaming=[2.0, 2.1])
    assert held(streaming=[2.0, 2.1]) == {sound: True, near: None, drops: None, order: None}
    assert not held(diloco=[2.0, 3.1])[sound] and not held(diloco=[math.nan, 2.0])[sound]
    assert held(streaming=[2.0, 2.1], streaming_e3m0=[2.1, 2.2])[near]
    assert not held(streaming=[2.0, 2.1], streaming_e3m0=[2.2, 2.3])[near]
    some = {"streaming": [2.0, 2.1], "streaming_lost10": [2.1, 2.3], "streaming_lost30": [2.2, 2.2]}
    assert held(**some)[drops], "30 % are no better than by chance"
    assert not held(**some | {"streaming_lost30": [2.0, 2.2001]})[drops]
    late = {"diloco_low": [2.0, 2.1], "eager_low": [2.2, 2.1], "delayed": [2.3, 2.4]}
    assert held(**late)[order]
    assert held(streaming=[2.0, 2.1], delayed_fast=[9.0, 9.0])[sound], "which is there to be seen to diverge"
    assert not held(**late | {"eager_low": [2.0, 2.0]})[order] and not held(**late | {"delayed": [2.0, 2.1]})[order]


def test_intervals_of_quality_are_of_differences_within_seeds() -> None:
    from benchmarks.quality import Difference

    found = Difference.of([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert found.mean == 2 and found.half == pytest.approx(4.303 / math.sqrt(3))


def test_a_wrong_sum_fails_the_benchmark() -> None:
    from benchmarks.common import BenchmarkError, gather

    class Liar:
        name = "w0"

        def hear(self) -> dict[str, Any]:
            return {"began": 0.0, "ended": 1.0, "right": False}

    with pytest.raises(BenchmarkError, match="w0 has a wrong result"):
        gather([Liar()])  # type: ignore[list-item]


# --- overlap: what needs no network; the rest is tests/wan/test_overlap.py --------------------------------------------


def overlap_result(title: str, rate: float, *ends: list[float]) -> Any:
    """Two periods of two steps of a second, as the peers saw them."""
    from benchmarks import overlap

    found = {each.title: each for each in overlap.algorithms(8, 4)}[title]
    answers = [{"ends": each, "hash": "h"} for each in ends]
    return overlap.Result(found, rate, period=2, seconds=1.0, answers=answers)


def test_overlap_counts_nominal_steps_of_the_peer_that_computes_least() -> None:
    result = overlap_result("DiLoCo", 50, [0, 1, 2, 3, 4], [10, 11, 13, 14, 15])
    assert result.measured == pytest.approx(80)
    assert result.shares(result.worst) == pytest.approx([200 / 3, 100])


def test_overlap_models_the_bytes_that_travel() -> None:
    from benchmarks import overlap
    from collectives.wires import WIRES

    arguments = overlap.arguments_of(["--size", "8"])
    usable = 50e6 * 1448 / 1500
    models = {each.title: overlap.timing(each, 50, arguments) for each in overlap.algorithms(8, 4)}
    assert models["DiLoCo"].exchange_seconds == pytest.approx(8 * 8 * 2**20 / usable)
    assert models["Streaming"].exchange_seconds == pytest.approx(8 * 2**20 / usable)
    there, back = (WIRES[wire].size(2**17) for wire in ("int4", "int8"))  # half a fragment, both ways
    assert models["Streaming int4"].exchange_seconds == pytest.approx(8 * (there + back) / usable)
    assert models["data-parallel"].utilisation == pytest.approx(0.1 / (0.1 + models["DiLoCo"].exchange_seconds))
    assert models["DiLoCo"].utilisation < 0.8 and models["Streaming"].utilisation == models["Delayed"].utilisation == 1


def test_overlap_says_where_it_is_shown() -> None:
    from benchmarks import overlap

    slow, quick = [0, 1, 3, 4, 6], [0, 1, 2, 3, 4.1]
    rows = [overlap_result("DiLoCo", 1000, quick), overlap_result("Streaming", 1000, quick)]
    assert overlap.verdicts(rows) == ["DiLoCo was nowhere below 80 %: nothing is shown"]
    rows += [overlap_result("DiLoCo", 50, slow, quick), overlap_result("Streaming", 50, quick)]
    [line] = overlap.verdicts(rows)
    assert "on 50 Mbit/s" in line and "97.6 %" in line and line.endswith("reached")


def test_overlap_fails_where_peers_differ() -> None:
    from benchmarks import overlap
    from benchmarks.common import BenchmarkError

    result = overlap_result("Eager", 50, [0, 1], [0, 1])
    overlap.check(result)
    result.answers[1]["hash"] = "other"
    with pytest.raises(BenchmarkError, match="Eager: the peers hold different versions"):
        overlap.check(result)


# --- faults; cuts and slow links of sites are in tests/wan/test_faults.py ---------------------------------------------

QUICK = ("--loopback", "--size", "0.5", "--step-ms", "30", "--sync-every", "12")


def test_faults_of_real_processes_are_named() -> None:
    found = report("faults", *QUICK, "--repeat", "1", "--kinds", "kill,slow peer,scaled gradient,corrupt frame")
    *kinds, whole = found["samples"]
    named = {each["cells"]["fault"]: each["injections"] for each in kinds}
    assert {kind: [one["named"] for one in injections] for kind, injections in named.items()} == {
        "kill": ["crash"], "slow peer": ["slow peer"], "scaled gradient": ["bad gradient"],
        "corrupt frame": ["corrupt frames"],
    }  # fmt: skip
    assert named["kill"][0]["again"] > 0, "its shard trains again"
    assert whole["rounds"] > 10 and whole["lost"] == whole["twice"] == whole["missing"] == 0


def test_goodput_under_kills() -> None:
    found = report("faults", *QUICK, "--goodput", "--seconds", "6", "--every", "4", "--repeat", "1")
    undisturbed, disturbed, whole = found["samples"]
    assert undisturbed["tokens"][0] > 0 and disturbed["tokens"][0] > 0
    assert any(note.startswith("1 kills, ") for note in found["notes"])
    assert whole["lost"] == whole["twice"] == whole["missing"] == 0


def test_what_a_log_says_of_faults(tmp_path: Path) -> None:
    from benchmarks.faults import Watch

    def commit(at: float, number: int, **cursors: int) -> dict[str, Any]:
        each = {name: {"7" if name in "ax" else "8": cursor} for name, cursor in cursors.items()}
        return {"event": "round.committed", "monotonic": at, "round": number, "skipped": False,
                "contributors": list(cursors), "cursors": each}  # fmt: skip

    told = {"event": "anomaly.confirmed", "kind": "crash", "culprits": ["a"]}
    path = tmp_path / "events.jsonl"
    events = [
        {"event": "peer.joined", "monotonic": 0.5, "peer": "a"},
        commit(1.0, 1, a=10, b=10),
        told | {"monotonic": 2.0},
        {"event": "peer.evicted", "monotonic": 2.0, "peer": "a"},
        commit(3.0, 2, a=20, b=20),  # it was proposed before the death
        commit(4.0, 4, b=30),
        {"event": "peer.joined", "monotonic": 5.0, "peer": "a"},
        commit(6.0, 5, a=20, b=40),
        commit(7.0, 6, a=30, b=50),
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    watch = Watch(path)
    watch.look()
    assert watch.standing == {("crash", ("a",))} and watch.verdicts(2.5) == []
    assert watch.joined("a") == 5.0 and watch.rounds_of("a", 0.0) == 2
    assert watch.lost_rounds() == 1, "number 3"
    assert watch.again("a", 1.5) == pytest.approx(4.5), "its next life goes beyond what was committed"
    assert watch.carries("a") and watch.rounds_of_plan() == 5
    plans = (
        {"pattern": "direct", "shares": {"a": 0.9, "b": 0.1}},
        {"pattern": "tree", "shares": {"a": 1.0, "b": 0.0}, "parents": {"a": "", "b": "a"}},
    )
    for number, (plan, links) in enumerate(zip(plans, ([True, False], [False, False]), strict=True)):
        with path.open("a") as log:
            log.write(json.dumps({"event": "plan.changed", "monotonic": 6.5 + number} | plan) + "\n")
        watch.look()
        assert [watch.carries(name) for name in "ab"] == links, "of a tree nobody times single links"
        assert watch.rounds_of_plan() == 1 - number
