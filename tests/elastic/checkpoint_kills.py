"""Writers of checkpoints that are killed, each a process of its own; run as a script: see the modes below.

Whatever is found wrong is raised here, so that the exit code tells it. The script forks, which is safe as it has one
thread, and spares each writer the import of torch.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch

from elastic.checkpoints import Refusal, Snapshot, Store
from elastic.checkpoints.writer import Writer
from elastic.errors import CheckpointMismatch
from elastic.outer.state import Version

ALGORITHM, FINGERPRINT = "DiLoCo(test)", "0123456789abcdef"
SIZE = 50_000
STEPS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def snapshot(number: int) -> Snapshot:
    parameters = torch.arange(SIZE, dtype=torch.float32) + number
    return Snapshot(
        algorithm=ALGORITHM,
        fingerprint=FINGERPRINT,
        versions=(Version(number, parameters, -parameters),),
        parameters=((("weight", (SIZE // 10, 10)),),),
        run_state=f"cursors of {number}".encode(),
    )


def store_at(root: str) -> Store:
    return Store(root, "run", "outer", keep=2)


def save(root: str, number: int) -> None:
    store_at(root).save(snapshot(number), peer="a", state={"number": number, "tensor": torch.full((1000,), number)})


def newest(root: str) -> int:
    """The newest number, after everything about it has been checked; 0 if there is none."""
    refused: list[Refusal] = []
    outer = store_at(root).newest(algorithm=ALGORITHM, fingerprint=FINGERPRINT, refused=refused.append)
    number = outer.entry.number if outer else 0
    assert all((r.file, r.reason) == ("manifest.json", "is missing") or is_needless(r, number) for r in refused), (
        refused
    )
    if outer is None:
        return 0
    expected = snapshot(number)
    assert outer.versions[0].state_hash == expected.versions[0].state_hash
    assert outer.manifest.run_state == expected.run_state
    part = outer.entry.peer("a")
    assert part is not None and part["number"] == number and bool((part["tensor"] == number).all())
    return number


def is_needless(refusal: Refusal, newest: int) -> bool:
    """One that a writer had begun to remove, two newer ones being there, while the other was about to write it."""
    return int(Path(refusal.checkpoint).name[1:9]) <= newest - 2


def die_at(step: int) -> None:
    """From here on, this process is killed when it begins its step-th access to a file."""
    left = step

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in STEPS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def at_every_step(root: str) -> int:
    """Kills a writer at its first access to a file, another at its second, until one comes through."""
    for step in count(1):
        place = f"{root}/{step}"
        for number in (1, 2):
            save(place, number)  # so that the third has something to remove
        pid = os.fork()
        if pid == 0:
            die_at(step)
            save(place, 3)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        found = newest(place)
        assert not any(entry.problems() for entry in store_at(place).entries() if entry.finished)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and found == 3
            return step - 1
        assert os.WTERMSIG(status) == signal.SIGKILL and found in (2, 3)
        save(place, 3)
        assert newest(place) == 3
    raise AssertionError


def write_on(root: str, report: int) -> None:
    for number in count(newest_if_any(root) + 1):
        save_beside_others(root, number)
        os.write(report, b"%d " % number)


def newest_if_any(root: str) -> int:
    # one that is being removed by the other writer is refused with other reasons than a missing manifest
    outer = store_at(root).newest(algorithm=ALGORITHM, fingerprint=FINGERPRINT)
    return outer.entry.number if outer else 0


def save_beside_others(root: str, number: int) -> None:
    """The other writer may be some checkpoints ahead, and remove what this one is about to write."""
    try:
        save(root, number)
    except OSError:
        if newest_if_any(root) < number:
            raise


def at_any_moment(root: str, lives: int, seed: int) -> int:
    """Kills two writers of the same checkpoints, again and again; what had been reported as written must be there."""
    chance = random.Random(seed)
    for _ in range(lives):
        reader, report = os.pipe()
        pids = []
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                write_on(root, report)
            pids.append(pid)
        os.close(report)
        time.sleep(chance.uniform(0.0, 0.08))  # the moment of the fault; nothing waits for it
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        with os.fdopen(reader, "rb") as file:
            reported = [int(number) for number in file.read().split()]
        assert newest(root) >= max(reported, default=0)
    last = newest(root)
    save(root, last + 1)
    assert newest(root) == last + 1
    return last


def no_space(root: str) -> dict[str, object]:
    """Files may not grow beyond a limit for a while, as if the disk were full."""
    save(root, 1)
    errors: list[Exception] = []
    writer = Writer(on_error=errors.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, resource.RLIM_INFINITY))
    writer.submit(lambda: store_at(root).write_outer(snapshot(2)))
    assert writer.flush()
    big = {"tensor": torch.zeros(SIZE)}
    writer.submit(lambda: store_at(root).write_peer(*snapshot(2).identity, "a", big))
    assert writer.flush()
    during = newest(root)
    left = [path.name for path in Path(root).rglob("*.part")]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.submit(
        lambda: store_at(root).save(snapshot(2), peer="a", state={"number": 2, "tensor": torch.full((9,), 2)})
    )
    assert writer.close()
    statistics = writer.statistics()
    return {
        "during": during,
        "left": left,
        "after": newest(root),
        "written": statistics.written,
        "failed": statistics.failed,
        "last_error": statistics.last_error,
        "told": [type(error).__name__ for error in errors],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    MODES = {"every-step": at_every_step, "any-moment": at_any_moment, "no-space": no_space}
    mode, root, *numbers = sys.argv[1:]
    try:
        print(json.dumps(MODES[mode](root, *map(int, numbers))))  # type: ignore[operator]
    except CheckpointMismatch as error:
        sys.exit(f"refused: {error}")
