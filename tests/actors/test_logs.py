"""What a process prints is kept to its last word, and is still seen where it went before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from actors.logs import LINES, WIDTH, tail

ROOT = Path(__file__).parents[2]


def told(path: Path, code: str, *, kept: int = 1 << 20) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process that keeps its log in `path`, as `log`."""
    head = "import os, sys, time; from pathlib import Path; from actors.logs import KeptLog\n"
    head += f"log = KeptLog(Path({str(path)!r}), kept={kept})\n"
    return subprocess.run([sys.executable, "-c", head + code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_both_streams_are_in_the_log_in_order_and_seen_outside(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "p.1.log"
    code = "print('one', flush=True); print('two', file=sys.stderr); os.system('echo three'); log.flush()"
    ended = told(path, code)
    assert tail(str(path)) == ("one", "two", "three")
    assert ended.returncode == 0 and ended.stdout == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("os.abort()", "Fatal Python error: Aborted"),
        ("import ctypes; ctypes.string_at(0)", "Fatal Python error: Segmentation fault"),
        ("os._exit(3)", "the last word"),
        ("os.kill(os.getpid(), 9)", "the last word"),
    ],
)
def test_the_last_words_of_a_crash_are_kept(tmp_path: Path, how: str, words: str) -> None:
    path = tmp_path / "p.1.log"
    code = f"print('the last word', flush=True)\ndef crashes():\n    {how}\ncrashes()"
    assert told(path, code).returncode != 0
    said = tail(str(path))
    assert "the last word" in said and words in said
    assert words == "the last word" or any("in crashes" in line for line in said)


def test_a_log_is_bounded_and_loses_nothing_but_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "p.1.log"
    code = """
for i in range(20000):
    print(f"line {i:06}", flush=True)
    if i % 500 == 0:
        log.flush()
log.flush()
"""
    ended = told(path, code, kept=40_000)
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 2 and sum(sizes) < 2 * (40_000 + 500 * 12 + 4096 * 12)
    everything = [f"line {i:06}" for i in range(20000)]
    assert ended.stdout.splitlines() == everything
    kept = ((tmp_path / "p.1.log.1").read_text() + path.read_text()).splitlines()
    assert kept == everything[-len(kept) :] and len(kept) * 12 >= 40_000
    assert list(tail(str(path))) == everything[-LINES:]


def test_a_tail_is_for_people(tmp_path: Path) -> None:
    path = tmp_path / "p.1.log"
    path.write_bytes(
        b":actor_name:PeerHost\n\n\x1b[31mred\x1b[0m alert\r\n 10%|#   |\r 90%|### |\nbell\x07\tand \xff bytes\n"
        + b"x" * 1000
        + b"\n[2026-11-30 10:05:50,480 E 8943 8943] logging.cc:474: *** SIGABRT received ***"
        + b"\nExtension modules: a, b (total: 2)\n"
    )
    said = tail(str(path))
    assert said == ("red alert", " 90%|### |", "bell  and \ufffd bytes", "x" * WIDTH)
    assert tail(str(tmp_path / "none")) == ()
