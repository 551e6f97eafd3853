"""One Ray for all tests of this folder, with the nodes that each of them asks for; it ends with the last of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shared_ray import SharedRay, check_nobody_is_left

HERE = Path(__file__).parent
_shared: list[SharedRay] = []


def _close_shared() -> None:
    while _shared:
        _shared.pop().close()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After the last test of this folder, for other tests start Rays of their own."""
    if nextitem is None or HERE not in nextitem.path.parents:
        _close_shared()


@pytest.fixture
def shared_ray() -> SharedRay:
    """What this process is connected to."""
    if not _shared:
        _shared.append(SharedRay())
    return _shared[0]


@pytest.fixture
def no_ray() -> None:
    """This process is connected to none."""
    _close_shared()


@pytest.fixture
def ray_here(shared_ray: SharedRay) -> Iterator[None]:
    """A Ray with one node for peers, which has four CPUs; afterwards nobody is left on it."""
    shared_ray.shape(4)
    yield
    check_nobody_is_left()


@pytest.fixture
def nodes(shared_ray: SharedRay) -> Iterator[Any]:
    """The cluster, with two nodes that have room for one peer each; afterwards nobody is left on them."""
    yield shared_ray.shape(1, 1)
    check_nobody_is_left()
