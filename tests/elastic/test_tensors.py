"""What the caller gives, as one flat tensor that travels; and results in its likeness. On every device there is."""

from __future__ import annotations

import pytest
import torch

from elastic.errors import ConfigurationError
from elastic.tensors import Reserve, check_finite, gathered_in, stage, wires_of

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NUMBERS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16]
NUMBERS += [torch.int32, torch.int64]
SHAPES = [(), (0,), (7,), (3, 5), (2, 0, 3)]


def some(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    numbers = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(len(shape)))
    return numbers.to(dtype).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*NUMBERS, torch.bool])
@pytest.mark.parametrize("reduced", [True, False])
def test_whatever_is_staged_comes_back_in_its_own_likeness(dtype: torch.dtype, device: str, reduced: bool) -> None:
    if reduced and dtype is torch.bool:
        with pytest.raises(ConfigurationError, match=r"torch.bool cannot be reduced"):
            stage(torch.ones(1, dtype=dtype), reduced=True)
        return
    for shape in SHAPES:
        tensor = some(shape, dtype, device)
        staged = stage(tensor, reduced=reduced)
        assert staged.flat.dim() == 1 and staged.flat.is_contiguous() and staged.flat.device.type == "cpu"
        (back,) = staged.pieces(staged.like(staged.flat))
        assert back.dtype == dtype and back.device == tensor.device and torch.equal(back, tensor)


def test_one_contiguous_tensor_is_not_copied_and_anything_else_once() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    assert stage(matrix, reduced=True).flat.data_ptr() == matrix.data_ptr()
    assert stage(matrix, reduced=False).flat.data_ptr() == matrix.data_ptr()
    assert stage([matrix], reduced=True).flat.data_ptr() == matrix.data_ptr()
    for tensor in (matrix.t(), matrix[:, 1:], [matrix, matrix], matrix.bfloat16()):
        staged = stage(tensor, reduced=True)
        assert staged.copied and staged.snapshot() is staged.flat
    kept = stage(matrix, reduced=True).snapshot()
    matrix.zero_()
    assert torch.equal(kept, torch.arange(12.0))


def test_a_list_is_one_flat_tensor_and_its_results_are_views_of_one() -> None:
    given = [torch.tensor(1.0), torch.arange(6.0).reshape(2, 3).t(), torch.empty(0), torch.tensor([7.0, 8.0])]
    staged = stage(given, reduced=True)
    assert staged.flat.tolist() == [1, 0, 3, 1, 4, 2, 5, 7, 8]
    flat = staged.like(staged.flat)
    pieces = staged.pieces(flat)
    assert all(torch.equal(piece, tensor) for piece, tensor in zip(pieces, given, strict=True))
    flat.zero_()
    assert pieces[3].tolist() == [0.0, 0.0]


def test_halves_are_summed_in_float32_and_moved_as_bits() -> None:
    tensor = torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16)
    assert stage(tensor, reduced=True).flat.dtype is torch.float32
    moved = stage(tensor, reduced=False)
    assert moved.flat.dtype is torch.int16 and moved.flat.data_ptr() == tensor.data_ptr()


def test_every_dtype_has_its_wires() -> None:
    def wires(dtype: torch.dtype, wire: str | None = None, gather: str | None = None) -> tuple[str, str]:
        return wires_of(stage(torch.ones(1, dtype=dtype), reduced=True), wire, gather)

    assert [wires(dtype)[0] for dtype in NUMBERS[:4]] == ["f32", "raw", "bf16", "f16"]
    assert {wires(dtype) for dtype in NUMBERS[4:]} == {("raw", "")}
    assert wires(torch.bfloat16, "f32") == ("f32", "") and wires(torch.float32, "bf16", "f32") == ("bf16", "f32")
    assert [gathered_in(wire) for wire in ("f32", "int8", "int4", "e3m0")] == ["", "", "int8", "int8"]
    for dtype, wire in ((torch.float64, "f32"), (torch.int8, "int8"), (torch.float32, "raw"), (torch.float32, "f31")):
        with pytest.raises(ConfigurationError, match=f"wire '{wire}' is not one of"):
            wires(dtype, wire)


def test_shapes_are_told_apart_in_few_words() -> None:
    def words(*shapes: tuple[int, ...]) -> str:
        return stage([torch.empty(shape) for shape in shapes], reduced=True).shape

    assert words((3, 4)) == "(3, 4)" and words((), (2,)) == "() (2,)"
    many = [(i, 2) for i in range(300)]
    assert words(*many) != words(*many[:-1], (2, 299)) and len(words(*many)) < 60


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 299_999, 700_000])
def test_the_first_number_that_a_quantised_wire_has_not_is_named(bad: float, at: int) -> None:
    numbers = torch.zeros(700_001)
    numbers[at] = numbers[-1] = bad
    for wire in ("f32", "bf16", "f16"):
        check_finite(numbers, wire, "p1")
    for wire in ("int8", "int4", "e3m0"):
        with pytest.raises(ConfigurationError, match=rf"element {at} of peer p1 is {bad}, and wire '{wire}'") as error:
            check_finite(numbers, wire, "p1")
        assert isinstance(error.value, ValueError) and error.value.peer == "p1"
        check_finite(numbers[:at], wire, "p1")


def test_memory_of_large_results_serves_again_once_nobody_holds_it() -> None:
    reserve = Reserve()
    first = reserve.take(1 << 20, torch.float32)
    where, view = first.data_ptr(), first[5:].view(-1)
    assert not where % 64 and first.numel() == 1 << 20 and first.dtype is torch.float32
    del first
    other = reserve.take(1 << 20, torch.float32)
    assert other.data_ptr() != where, "a view still holds it"
    view.fill_(7.0)
    del view
    again = reserve.take(1 << 19, torch.float64)
    assert again.data_ptr() == where, "the same bytes, for other numbers"
    assert reserve.take(10, torch.int16).numel() == 10
    del again
    reserve.clear()
    assert reserve.take(1 << 20, torch.float32).numel() == 1 << 20
