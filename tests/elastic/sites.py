"""A peer of several processes, for tests: each runs a scenario of rank_worker.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Run, until

WORKER = Path(__file__).with_name("rank_worker.py")


class Site:
    """The processes of one peer."""

    def __init__(self, folder: Path, run: Run, scenario: str, *, size: int = 2, **order: Any) -> None:
        folder.mkdir()
        if run.coordinator is None:
            run.open()
        self.folder = folder
        order |= {"scenario": scenario, "address": f"tcp://127.0.0.1:{run.port}", "folder": str(folder), "size": size}
        order = {"name": "site"} | order | {"timeouts": asdict(run.timeouts)}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(order | {"rank": rank})],
                stderr=(folder / f"{rank}.err").open("w"),
                env=environment,
            )
            for rank in range(size)
        ]

    def facts(self, codes: tuple[int, ...] = (0, 0)) -> list[dict[str, Any]]:
        """What the ranks have found, once they have ended with these codes; {} for one that was killed."""
        for rank, (process, code) in enumerate(zip(self.processes, codes, strict=True)):
            assert self.end_of(process) == code, (self.folder / f"{rank}.err").read_text()
        files = [self.folder / f"{rank}.json" for rank in range(len(self.processes))]
        return [json.loads(file.read_text()) if file.exists() else {} for file in files]

    def end_of(self, process: subprocess.Popen[bytes]) -> int:
        """The code that it ends with. If it does not end, says where all of them stand."""
        try:
            return process.wait(90)
        except subprocess.TimeoutExpired:
            for each in self.processes:
                each.send_signal(signal.SIGUSR1)
            time.sleep(1)
            said = [
                path.read_text()[-10_000:] for path in sorted([*self.folder.glob("*.err"), *self.folder.glob("*l")])
            ]
            raise AssertionError("\n---\n".join(said)) from None

    def ready(self) -> None:
        for rank, process in enumerate(self.processes):
            file = self.folder / f"{rank}.ready"
            until(lambda file=file, process=process: file.exists() or process.poll() is not None)  # type: ignore[misc]
            assert file.exists(), (self.folder / f"{rank}.err").read_text()

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
