"""Wire formats: nearest-even rounding, stable under a second encoding; and the import rules of the package."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from plane import ROOT

from collectives.wires import WIRES, Floats, as_floats, round_trip

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
floats = arrays(np.float32, st.integers(1, 200), elements=st.floats(width=32))


@pytest.mark.parametrize("name", sorted(WIRES))
@given(values=floats)
def test_agrees_with_torch_and_is_stable(name: str, values: Floats) -> None:
    wire, scratch = WIRES[name], memoryview(bytearray(4 * values.size))
    once, twice = np.empty_like(values), np.empty_like(values)
    data = bytes(wire.encode(values, scratch))
    assert len(data) == wire.size(values.size)
    wire.decode(memoryview(bytearray(data)), once)
    wanted = torch.from_numpy(values.copy()).to(TORCH[name]).to(torch.float32).numpy()
    np.testing.assert_array_equal(once, wanted)
    round_trip(wire, once, scratch, twice)
    np.testing.assert_array_equal(once.view(np.uint32), twice.view(np.uint32))


def test_pieces_join_without_seams() -> None:
    values = np.random.default_rng(0).standard_normal(100_001).astype(np.float32)
    out = np.empty_like(values)
    round_trip(WIRES["bf16"], values, memoryview(bytearray(values.nbytes)), out)
    np.testing.assert_array_equal(out, torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy())


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 2), torch.zeros(4, dtype=torch.float64), torch.zeros(8)[::2], torch.tensor(1.0)]
)
def test_other_tensors_are_refused_with_advice(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        as_floats(tensor)


def test_importing_the_package_and_its_records_is_cheap() -> None:
    code = (
        "import sys, collectives, collectives.records; collectives.Start, collectives.Done;"
        "sys.exit(bool({'torch', 'numpy', 'xxhash', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_public_name_resolves() -> None:
    import collectives

    assert all(getattr(collectives, name) is not None for name in collectives.__all__)
    assert set(collectives.__all__) <= set(dir(collectives))
    with pytest.raises(AttributeError, match="nonsense"):
        collectives.nonsense  # noqa: B018
