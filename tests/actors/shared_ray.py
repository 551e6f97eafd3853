"""A Ray that tests share, and what they need to wait for something in it."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.local_ray import NAMESPACE, OBJECT_STORE_BYTES, _adopt_orphans, _authenticate, _children, _end, _reap

# How soon Ray calls a node dead: some two seconds after it was killed, instead of a quarter of a minute. One that only
# does not answer has more time, for a node that shares two cores with a test may take a while.
QUICK = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 4000,
    "health_check_failure_threshold": 3,
    "health_check_initial_delay_ms": 1000,
    "timeout_ms_task_wait_for_death_info": 100,
}
COMMON = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}


def until(ready: Callable[[], Any], seconds: float = 120.0) -> Any:
    """The first answer that is true. An assertion fails if there is none in time."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not (answer := ready()):
        assert time.monotonic() < deadline, "it has not come to pass"
        pause.wait(0.1)
    return answer


class SharedRay:
    """A head without CPUs, which holds supervisors and coordinators, and nodes with so many CPUs each."""

    def __init__(self) -> None:
        self.before = _children()
        self._cpus: dict[Any, int] = {}
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self.folder = Path(f"/tmp/elastic-{secrets.token_hex(4)}")
        self.folder.mkdir(mode=0o700)
        (self.folder / "ray").mkdir()
        # the cluster notes its address there, and not where others would find it
        os.environ["RAY_TMPDIR"] = str(self.folder)
        _adopt_orphans()
        _authenticate(self.folder)
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "resources": {"head": 9}, "_system_config": QUICK} | COMMON
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=self.cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")

    def shape(self, *cpus: int) -> Any:
        """These nodes beside the head and no others, with nothing on them. Returns the cluster."""
        missing = Counter(cpus)
        for node in list(self.cluster.worker_nodes):
            if missing[self._cpus.get(node, 0)] > 0:
                missing[self._cpus[node]] -= 1
            else:
                self.cluster.remove_node(node)
        for each in missing.elements():
            self.add(each)
        until(lambda: self._is(*cpus))
        return self.cluster

    def add(self, cpus: int) -> Any:
        node = self.cluster.add_node(num_cpus=cpus, **COMMON)
        self._cpus[node] = cpus
        return node

    def _is(self, *cpus: int) -> bool:
        import ray

        there = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        return sorted(there) == sorted([0, *cpus]) and ray.available_resources().get("CPU", 0.0) == sum(cpus)

    def close(self) -> None:
        import ray

        try:
            ray.shutdown()
        finally:
            os.environ.pop("RAY_TMPDIR", None)
            _end(lambda: _children() - self.before)
            _reap(self.before)
            shutil.rmtree(self.folder, ignore_errors=True)


def check_nobody_is_left() -> None:
    """No actor that has a name; all of ours have."""
    import ray

    until(lambda: not ray.util.list_named_actors(all_namespaces=True), 20.0)
