"""The model: what it may look at, where it starts, and that it learns."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    """As the demo loads it: by path, with no package around it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpt = load("gpt")
SMALL = gpt.GPTConfig(layers=2, d_model=32, heads=2, context=16)


def small_model(seed: int = 0, moved: bool = True) -> torch.nn.Module:
    """With `moved`, every weight is away from its start: the zeros there would hide what is tested."""
    model = gpt.GPT(SMALL, seed=seed)
    if moved:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3))


def test_default_has_about_a_million_parameters() -> None:
    assert 0.8e6 < gpt.GPT(gpt.GPTConfig()).num_parameters < 1.2e6


def test_logits_have_one_row_per_position() -> None:
    assert small_model()(random_tokens(3, 16)).shape == (3, 16, 256)


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    tokens = random_tokens(2, 17)
    loss = small_model(moved=False).loss(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(256), abs=1e-4)


def test_no_position_sees_a_later_one() -> None:
    model, tokens = small_model(), random_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9], after[:, 9])


def test_order_matters() -> None:
    model, tokens = small_model(), random_tokens(1, 16)
    swapped = tokens.clone()
    swapped[0, [2, 5]] = tokens[0, [5, 2]]
    assert not torch.allclose(model(tokens)[0, -1], model(swapped)[0, -1])


def test_seed_fixes_the_weights_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (torch.cat([p.flatten() for p in gpt.GPT(SMALL, seed=s).parameters()]) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_every_parameter_gets_a_gradient() -> None:
    model, tokens = small_model(), random_tokens(2, 17)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_learns_a_text_and_goes_on_with_it() -> None:
    text = b"the quick brown fox jumps over the lazy dog. "
    data = torch.tensor(list(text * 3))
    model = gpt.GPT(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    windows = data.unfold(0, 17, 1)[: len(text)]  # (45, 17): each start in the text once
    for _ in range(80):
        loss = model.loss(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    assert model.generate(b"the quick brown ", 9, temperature=0) == b"fox jumps"


def test_generate_is_fixed_by_its_generator_and_by_nothing_else() -> None:
    model = small_model()
    first, again, other = (model.generate(b"", 40, 1.0, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first == again != other
    assert len(first) == 40  # more than the context: the window slides


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"d_model": 30, "heads": 4}, {"context": -1}])
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        gpt.GPTConfig(**wrong)
