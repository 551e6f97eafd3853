"""`elastic plan`: what it prints, for people and programs; its picture; and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import exits, units
from cli.main import main

fixed = settings(derandomize=True, deadline=None)
MODEL = ("--params", "10e9", "--peers", "8", "--step-seconds", "0.8")
LINKS = ("--bandwidth", "1Gbit", "--rtt", "80ms")


def plan(*words: str) -> Result:
    return CliRunner().invoke(main, ["plan", *words])


def test_a_person_sees_a_table_and_what_to_do() -> None:
    shown = plan(*MODEL, *LINKS)
    assert shown.exit_code == exits.OK, shown.output
    for words in ("8 peers, 10,000,000,000 parameters", "data-parallel", "DiLoCo", "Streaming", "Eager", "Decoupled",
                  "Delayed", "CO2", "int4, e3m0", "* recommended: elastic.StreamingDiLoCo(model, inner, peer, sync_",
                  "H for", "A newcomer fetches 80.0 GB", "--host-rate"):  # fmt: skip
        assert words in shown.output, shown.output
    rows = [line for line in shown.output.splitlines() if "f32" in line and "%" in line]
    assert len(rows) == 7 and "…" not in shown.output and "\x1b" not in shown.output


def test_a_program_gets_one_json_object_that_agrees() -> None:
    found = json.loads(plan(*MODEL, *LINKS, "--json").output)
    assert len(found["rows"]) == 7 * 4 and found["peers"] == 8
    best = found["recommendation"]
    assert best["reached"] and best["utilisation"] >= found["target"] == 0.95 and len(best["reasons"]) == 5
    (row,) = [row for row in found["rows"] if row["algorithm"] == best["algorithm"] and best["wire"] in row["wires"]]
    for name in ("sync_every", "fragments", "sync_delay", "utilisation", "round_bytes", "memory_bytes"):
        assert row[name] == best[name]
    assert row["needed"] == best["sync_every"] and row["step_bytes"] < row["round_bytes"]
    # 10^9 numbers of 16 fragments: 7/8 there in 4.25 bits and back in 8.25, and the headers of frames.
    payload = 7 / 8 * 10e9 / best["fragments"] * (4.25 + 8.25) / 8
    assert payload < best["round_bytes"] < 1.003 * payload


def test_what_is_given_stays() -> None:
    words = ("--sync-every", "200", "--fragments", "10", "--sync-delay", "7", "--wire", "int8", "--wire", "f32")
    found = json.loads(plan(*MODEL, *LINKS, *words, "--algorithm", "streamingdiloco", "--json").output)
    assert [row["wires"] for row in found["rows"]] == [["f32"], ["int8"]]
    for row in found["rows"]:
        assert [row[name] for name in ("algorithm", "sync_every", "fragments", "sync_delay")] == [
            "Streaming",
            200,
            10,
            7,
        ]


def test_one_slow_site_is_one_kind_of_link() -> None:
    words = (*MODEL, *LINKS, "--link", "us-1=100Mbit,up=50Mbit,rtt=200ms,loss=0.01%", "--json")
    found = json.loads(plan(*words).output)
    slow, rest = sorted(found["links"], key=lambda link: link["peers"])
    assert slow == {"peers": 1, "up": 5e7, "down": 1e8, "rtt": 0.2, "loss": 1e-4}
    assert rest == {"peers": 7, "up": 1e9, "down": 1e9, "rtt": 0.08, "loss": 0.0}
    alone = json.loads(plan(*MODEL, *LINKS, "--json").output)
    by_loop = [{row["algorithm"]: row["round_seconds"] for row in each["rows"]} for each in (found, alone)]
    assert by_loop[0]["DiLoCo"] > 5 * by_loop[1]["DiLoCo"]


def test_all_peers_may_be_named() -> None:
    named = [word for name in "ab" for word in ("--link", f"{name}=200Mbit")]
    shown = plan("--params", "100M", "--peers", "2", "--step-seconds", "0.1", *named)
    assert shown.exit_code == exits.OK and "2 peers, 100,000,000 parameters, steps of 0.1 s; 200 Mbit/s" in shown.output


def test_what_cannot_be_reached_is_said() -> None:
    shown = plan(*MODEL, "--bandwidth", "100Mbit", "--rtt", "80ms", "--wire", "int8")
    assert shown.exit_code == exits.OK and "95 % is not to be had" in shown.output and "recommended" not in shown.output
    assert "It would take links " in shown.output and " times as fast" in shown.output and "; or H " in shown.output
    found = json.loads(plan(*MODEL, "--bandwidth", "100Mbit", "--wire", "int8", "--json").output)["recommendation"]
    assert not found["reached"] and found["faster"] > 1 and found["longer"] > 1000


def test_the_host_counts_if_it_is_given() -> None:
    free, slow = (
        plan(*MODEL, *LINKS, "--sync-every", "200", *more, "--json") for more in ((), ("--host-rate", "350MB/s"))
    )
    waits = [[row["waited_seconds"] for row in json.loads(each.output)["rows"]] for each in (free, slow)]
    # 40 GB at 350 MB/s in all H steps; data-parallel training has no outer step.
    assert [round(b - a, 3) for a, b in zip(*waits, strict=True)] == [0.0] * 4 + [round(40e9 / 350e6, 3)] * 24
    assert "Not counted" not in plan(*MODEL, *LINKS, "--host-rate", "350MB").output


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    shown = plan(*MODEL, *LINKS, "--plot", str(file))
    assert shown.exit_code == exits.OK, shown.output
    assert file.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [file]


def test_a_picture_that_cannot_be_drawn_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = plan(*MODEL, *LINKS, "--json", "--plot", str(tmp_path / "none" / "plan.png"))
    assert shown.exit_code == exits.OUTPUT and shown.stderr.count("\n") == 1 and "cannot be written" in shown.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = plan(*MODEL, *LINKS, "--json", "--plot", str(tmp_path / "plan.png"))
    assert shown.exit_code == exits.FAILED and shown.stderr.count("\n") == 1
    assert "elastic-diloco[plots]" in shown.stderr and json.loads(shown.stdout)["peers"] == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bandwidth", "1"), "'1': write a rate as 1Gbit"),
        (("--bandwidth", "fast"), "'fast' does not begin with a number"),
        (("--bandwidth", "-1Gbit"), "must be above 0"),
        (("--bandwidth", "0Mbit"), "must be above 0"),
        (("--bandwidth", "1Gbit", "--rtt", "80parsec"), "write a time as 80ms"),
        (("--bandwidth", "1Gbit", "--rtt", "-80ms"), "must not be below 0"),
        (("--bandwidth", "1Gbit", "--loss", "120%"), "write a share as 0.1%"),
        (("--bandwidth", "1Gbit", "--loss", "1"), "nor loss reach 1"),
        (("--bandwidth", "1Gbit", "--peers", "0"), "must be above 0"),
        (("--bandwidth", "1Gbit", "--peers", "1"), "at least 2 peers"),
        (("--bandwidth", "1Gbit", "--peers", "2.5"), "no whole number"),
        (("--bandwidth", "1Gbit", "--params", "0"), "must be above 0"),
        (("--bandwidth", "1Gbit", "--params", "1e999"), "does not begin with a number"),
        (("--bandwidth", "1Gbit", "--step-seconds", "0"), "must be above 0"),
        (("--bandwidth", "1Gbit", "--target", "1"), "target is 1"),
        (("--bandwidth", "1Gbit", "--stripes", "many"), "write a number of connections, or auto"),
        (("--bandwidth", "1Gbit", "--stripes", "65"), "choose 1 to 64"),
        (("--bandwidth", "1Gbit", "--algorithm", "FedAvg"), "is none of data-parallel, DiLoCo"),
        (("--bandwidth", "1Gbit", "--wire", "int2"), "int2"),
        (
            ("--bandwidth", "1Gbit", "--sync-every", "10", "--fragments", "8", "--sync-delay", "2"),
            "take 16 steps or more",
        ),
        (("--bandwidth", "1Gbit", "--link", "us-1"), "write it as eu-1=200Mbit"),
        (("--bandwidth", "1Gbit", "--link", "us-1=fast"), "'fast' does not begin with a number"),
        (("--bandwidth", "1Gbit", "--link", "us-1=1Gbit,speed=3"), "'speed' is none of up, down, rtt, loss"),
        (("--bandwidth", "1Gbit", "--link", "us-1=1Gbit,up=-1bit"), "carries nothing"),
        (("--bandwidth", "1Gbit", "--link", "a=1Gbit", "--link", "a=2Gbit"), "names a peer twice"),
        ((), "say what 8 of 8 peers are connected with"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words: tuple[str, ...], said: str) -> None:
    shown = plan(*MODEL, *words)
    assert shown.exit_code == exits.USAGE and said in shown.stderr.splitlines()[-1], shown.output
    assert not shown.stdout and "Traceback" not in shown.output


def test_more_links_than_peers_are_refused() -> None:
    links = [word for index in range(9) for word in ("--link", f"p{index}=1Gbit")]
    shown = plan(*MODEL, *links)
    assert shown.exit_code == exits.USAGE and "names 9 peers, and --peers is 8" in shown.stderr


# --- quantities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (units.rate, "1Gbit", 1e9),
        (units.rate, "200 Mbit/s", 2e8),
        (units.rate, "1.5Gbps", 1.5e9),
        (units.rate, "25MB/s", 2e8),
        (units.rate, "1.5GB", 12e9),
        (units.rate, "100mbit", 1e8),
        (units.rate, "1Gb", 1e9),
        (units.rate, "1MiB/s", 2**23),
        (units.rate, "9600bit", 9600),
        (units.count, "10e9", 1e10),
        (units.count, "10B", 1e10),
        (units.count, "350M", 3.5e8),
        (units.count, "8", 8),
        (units.seconds, "80ms", 0.08),
        (units.seconds, "0.8", 0.8),
        (units.seconds, ".5 s", 0.5),
        (units.seconds, "2min", 120),
        (units.share, "0.1%", 0.001),
        (units.share, "0.95", 0.95),
        (units.share, "95%", 0.95),
    ],
)
def test_quantities_as_people_write_them(read: object, text: str, value: float) -> None:
    assert read(text) == pytest.approx(value)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("read", "text"),
    [(units.rate, "1G"), (units.rate, "1Qbit"), (units.count, "10Gbit"), (units.count, "1Ki"), (units.seconds, "1d"),
     (units.share, "2"), (units.rate, ""), (units.count, "1 2"), (units.seconds, "nan"), (units.rate, "infbit")],
)  # fmt: skip
def test_quantities_that_are_none(read: object, text: str) -> None:
    with pytest.raises(ValueError, match=r"write a|does not begin with a number"):
        read(text)  # type: ignore[operator]


@fixed
@given(st.text(max_size=12))
def test_whatever_is_written_is_a_quantity_or_a_usage_error(text: str) -> None:
    for name in units.READERS:
        try:
            assert units.quantity(name)(text) > 0
        except click.BadParameter as error:
            assert "\n" not in error.message


@fixed
@given(st.floats(1, 1e14))
def test_rates_read_back_what_was_written(bits: float) -> None:
    assert units.rate(units.bits_text(bits)) == pytest.approx(bits, rel=0.006)
