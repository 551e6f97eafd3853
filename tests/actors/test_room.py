"""Whether so many peers fit on the nodes of a Ray, and what is said if they do not."""

from __future__ import annotations

import pytest

from actors.room import shortage

NODES = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 3.0}, {"memory": 1e9}]


@pytest.mark.parametrize(
    ("needs", "peers", "nodes", "words"),
    [
        ({"CPU": 1.0}, 7, NODES, ""),
        ({"CPU": 1.0}, 8, NODES, "8 peers need 1 CPU each; here is 7 CPUs on 3 nodes, which is room for 7"),
        ({"CPU": 2.0}, 3, NODES, ""),
        ({"CPU": 2.0}, 4, NODES, "4 peers need 2 CPUs each; here is 7 CPUs on 3 nodes, which is room for 3"),
        ({"CPU": 1.0, "GPU": 0.5}, 2, NODES, ""),
        (
            {"CPU": 1.0, "GPU": 0.5},
            3,
            NODES,
            "3 peers need 1 CPU and 0.5 GPUs each; here is 7 CPUs and 1 GPU on 3 nodes, which is room for 2",
        ),
        ({"CPU": 0.1}, 10, [{"CPU": 1.0}], ""),
        ({"CPU": 0.0, "GPU": 0.0}, 1000, [{"CPU": 1.0}], ""),
        ({"GPU": 1.0}, 1, [{"CPU": 1.0}], "1 peer needs 1 GPU each; here is 0 GPUs, which is room for 0"),
    ],
)
def test_what_fits(needs: dict[str, float], peers: int, nodes: list[dict[str, float]], words: str) -> None:
    assert shortage(needs, peers, nodes) == words
