"""Error feedback: its identities, what it keeps, what an abort leaves, and where it converges on a biased wire."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from elastic.errors import CheckpointMismatch, ConfigurationError
from elastic.outer.compression import Compression
from elastic.outer.feedback import EF21, Compressor, EControl, ErrorFeedback, Feedback, NoFeedback, Residual

ALL = [NoFeedback(), ErrorFeedback(), ErrorFeedback(decay=0.9), EF21(), EControl()]
WITH_SLOT = [EF21(), EControl()]
LOSSY = [Compression(wire=wire, rotate=rotate) for wire in ("int4", "e3m0") for rotate in (False, True)]
EXACT = Compression()


class Top1:
    """The largest number only: d = 1/n, and as biased as can be."""

    def approximated(self, x: torch.Tensor) -> torch.Tensor:
        kept, largest = torch.zeros_like(x), x.abs().argmax()
        kept[largest] = x[largest]
        return kept


def normal(elements: int, seed: int) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed))


def described(each: Feedback | Compression) -> str:
    return each.description


class Peers:
    """Peers that exchange through a compressor: the mean over those who are in a round, in one process."""

    def __init__(self, feedback: Feedback, compressor: Compressor, n: int, elements: int) -> None:
        self.feedback, self.compressor = feedback, compressor
        self.residuals = [feedback.residual(elements) for _ in range(n)]
        self.slot = torch.zeros(elements) if feedback.slots else None

    def exchange(self, xs: Sequence[torch.Tensor], who: Sequence[int] = (), share: float | None = None) -> torch.Tensor:
        """The estimate after one committed round. who: the contributors, all by default."""
        who = who or range(len(xs))
        seen = [self._contribution(peer, xs[peer]) for peer in who]
        mean = torch.stack(seen).mean(0)
        share = len(who) / len(xs) if share is None else share
        estimate, self.slot = self.feedback.combined(mean, self.slot, share=share)
        return estimate

    def _contribution(self, peer: int, x: torch.Tensor) -> torch.Tensor:
        offered = self.feedback.offered(self.residuals[peer], x)
        self.residuals[peer] = self.feedback.counted(self.residuals[peer], offered, x, self.compressor)
        return self.compressor.approximated(offered)

    @property
    def mean_estimate(self) -> torch.Tensor:
        return torch.stack([residual.state_dict()["estimate"] for residual in self.residuals]).mean(0)


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ALL, ids=described)
def test_if_nothing_is_lost_the_estimate_is_the_mean(feedback: Feedback) -> None:
    peers = Peers(feedback, EXACT, 3, 500)
    for turn in range(5):
        xs = [normal(500, 10 * turn + peer) for peer in range(3)]
        torch.testing.assert_close(peers.exchange(xs), torch.stack(xs).mean(0), atol=2e-6, rtol=0)
        for x, residual in zip(xs, peers.residuals, strict=True):
            state = residual.state_dict()
            torch.testing.assert_close(state.get("estimate", x), x, atol=2e-6, rtol=0)
            torch.testing.assert_close(state.get("error", torch.zeros(500)), torch.zeros(500), atol=2e-6, rtol=0)


@pytest.mark.parametrize("feedback", [NoFeedback(), ErrorFeedback()], ids=described)
def test_without_loss_classic_feedback_is_none_to_the_bit(feedback: Feedback) -> None:
    xs = [normal(300, peer) for peer in range(2)]
    peers, plain = Peers(feedback, EXACT, 2, 300), Peers(NoFeedback(), EXACT, 2, 300)
    for _ in range(3):
        assert torch.equal(peers.exchange(xs), plain.exchange(xs))


@pytest.mark.parametrize("compression", LOSSY, ids=described)
def test_ef21_comes_to_know_vectors_that_stay(compression: Compression) -> None:
    xs = [normal(300, peer) for peer in range(3)]
    peers = Peers(EF21(), compression, 3, 300)
    errors = [float((peers.exchange(xs) - torch.stack(xs).mean(0)).norm()) for _ in range(12)]
    assert errors[0] > 0.1 and errors[-1] < 1e-5


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", [*LOSSY, Top1()], ids=lambda c: getattr(c, "description", "top-1"))
def test_classic_feedback_loses_nothing(compressor: Compressor) -> None:
    feedback, residual = ErrorFeedback(), ErrorFeedback().residual(400)
    seen, given = torch.zeros(400, dtype=torch.float64), torch.zeros(400, dtype=torch.float64)
    for turn in range(50):
        x = normal(400, turn)
        offered = feedback.offered(residual, x)
        residual = feedback.counted(residual, offered, x, compressor)
        seen += compressor.approximated(offered)
        given += x
    assert residual.error is not None and residual.error.norm() > 0
    torch.testing.assert_close(seen + residual.error, given, atol=1e-4, rtol=0)


@pytest.mark.parametrize("feedback", WITH_SLOT, ids=described)
@pytest.mark.parametrize("compression", LOSSY, ids=described)
def test_the_slot_is_the_mean_of_the_estimates_whoever_is_left_out(
    feedback: Feedback, compression: Compression
) -> None:
    peers = Peers(feedback, compression, 4, 300)
    for turn, who in enumerate(([0, 1, 2, 3], [0, 2], [3], [1, 2, 3], [0, 1])):
        before = list(peers.residuals)
        peers.exchange([normal(300, 10 * turn + peer) for peer in range(4)], who)
        assert all((peers.residuals[peer] is before[peer]) == (peer not in who) for peer in range(4))
        torch.testing.assert_close(peers.slot, peers.mean_estimate, atol=2e-6, rtol=0)


@pytest.mark.parametrize("feedback", WITH_SLOT, ids=described)
def test_a_joiner_leaves_the_mean_where_it_is(feedback: Feedback) -> None:
    peers = Peers(feedback, Compression(wire="int4"), 3, 300)
    for turn in range(3):
        peers.exchange([normal(300, 10 * turn + peer) for peer in range(3)])
    peers.residuals.append(feedback.joined(300, peers.slot))
    torch.testing.assert_close(peers.slot, peers.mean_estimate, atol=2e-6, rtol=0)
    xs = [normal(300, 100 + peer) for peer in range(4)]
    for _ in range(200):
        estimate = peers.exchange(xs)
    torch.testing.assert_close(peers.slot, peers.mean_estimate, atol=2e-6, rtol=0)
    torch.testing.assert_close(estimate, torch.stack(xs).mean(0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("feedback", WITH_SLOT, ids=described)
def test_a_member_that_goes_stays_in_the_slot_until_all_rebase(feedback: Feedback) -> None:
    xs = [normal(300, peer) for peer in range(3)]
    peers = Peers(feedback, Compression(wire="int4"), 3, 300)
    for _ in range(20):
        peers.exchange(xs)
    del peers.residuals[2], xs[2]
    for _ in range(20):
        off = peers.exchange(xs) - torch.stack(xs).mean(0)
    assert off.norm() > 1
    peers.residuals = [feedback.rebased(residual, peers.slot) for residual in peers.residuals]
    torch.testing.assert_close(peers.slot, peers.mean_estimate, atol=2e-6, rtol=0)
    for _ in range(200):
        off = peers.exchange(xs) - torch.stack(xs).mean(0)
    assert off.norm() < 1e-3


# --- rounds that do not count -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ALL, ids=described)
def test_an_offer_that_is_not_counted_changes_nothing(feedback: Feedback) -> None:
    """Neither does one that is: it makes a new residual."""
    compression = Compression(wire="int4", rotate=True)
    peers = Peers(feedback, compression, 2, 300)
    for turn in range(3):
        peers.exchange([normal(300, 10 * turn + peer) for peer in range(2)])
    residual, slot, x = peers.residuals[0], peers.slot, normal(300, 99)
    held = [x, *residual.state_dict().values(), *([] if slot is None else [slot])]
    bits = [tensor.numpy().tobytes() for tensor in held]
    aborted = feedback.offered(residual, x)
    assert torch.equal(feedback.offered(residual, x), aborted), "the next attempt sends the same"
    feedback.counted(residual, aborted, x, compression)
    feedback.combined(normal(300, 98), slot, share=0.5)
    feedback.rebased(residual, slot)
    assert [tensor.numpy().tobytes() for tensor in held] == bits


# --- heterogeneous quadratics -----------------------------------------------------------------------------------------


def distance(feedback: Feedback, *, share: float | None = None, left_out: bool = False, lr: float = 0.05) -> float:
    """How far theta is from the optimum of the mean of 1/2 ||theta - a_i||^2, at most in any of ten coordinates, after
    1000 rounds of descent through the top 1 of 10. left_out: every peer is, at random, of four rounds in ten.
    """
    targets, theta = normal(40, 0).view(4, 10), torch.zeros(10)
    peers, random = Peers(feedback, Top1(), 4, 10), torch.Generator().manual_seed(0)
    for _ in range(1000):
        who = [peer for peer in range(4) if not left_out or torch.rand(1, generator=random) < 0.6]
        if who:
            theta = theta - lr * peers.exchange([theta - target for target in targets], who, share)
    return float((theta - targets.mean(0)).abs().max())


def test_a_biased_wire_alone_stalls_and_feedback_converges() -> None:
    assert distance(NoFeedback()) > 0.1
    assert distance(ErrorFeedback()) < distance(NoFeedback()), "it dithers around the optimum"
    assert distance(EF21()) < 1e-6
    assert distance(EControl()) < 1e-6


@pytest.mark.parametrize("feedback", WITH_SLOT, ids=described)
def test_it_converges_when_peers_are_left_out_and_only_with_their_share(feedback: Feedback) -> None:
    assert distance(feedback, left_out=True) < 1e-6
    assert distance(feedback, left_out=True, share=1.0) > 0.1


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_an_eta_that_diverges_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"at most 0\.2: 0\.3 was measured to diverge"):
        EControl(eta=0.3)
    with pytest.raises(ConfigurationError, match="above 0"):
        EControl(eta=0)
    diverging = EControl()
    object.__setattr__(diverging, "eta", 0.3)
    assert not distance(diverging) < 1e6, "as the message says"


@pytest.mark.parametrize("decay", [0.0, 1.1])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigurationError, match="decay is"):
        ErrorFeedback(decay=decay)


@pytest.mark.parametrize("feedback", WITH_SLOT, ids=described)
def test_the_state_of_another_method_is_refused(feedback: Feedback) -> None:
    with pytest.raises(ValueError, match="lacks what is needed"):
        feedback.offered(Residual(), normal(10, 0))
    with pytest.raises(ValueError, match="lacks what is needed"):
        feedback.combined(normal(10, 0), None)


def test_contracts_differ_where_the_methods_do() -> None:
    assert [feedback.description for feedback in ALL] == [
        "none",
        "ErrorFeedback(decay=1.0)",
        "ErrorFeedback(decay=0.9)",
        "EF21",
        "EControl(eta=0.05)",
    ]


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ALL, ids=described)
def test_a_residual_survives_its_state(feedback: Feedback) -> None:
    peers = Peers(feedback, Compression(wire="int4"), 2, 300)
    peers.exchange([normal(300, peer) for peer in range(2)])
    state = peers.residuals[0].state_dict()
    again = Residual.from_state_dict({name: tensor.clone() for name, tensor in state.items()})
    assert again.state_dict().keys() == state.keys()
    assert torch.equal(feedback.offered(again, normal(300, 5)), feedback.offered(peers.residuals[0], normal(300, 5)))


@pytest.mark.parametrize(
    "state, said",
    [
        ({"momentum": torch.zeros(3)}, "not momentum"),
        ({"error": torch.zeros(3, dtype=torch.float64)}, "float64"),
        ({"error": torch.zeros(3, 3)}, "not flat"),
        ({"error": torch.zeros(3), "estimate": torch.zeros(4)}, "different lengths"),
    ],
)
def test_state_that_is_no_residual_is_refused(state: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(CheckpointMismatch, match=said):
        Residual.from_state_dict(state)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", WITH_SLOT, ids=described)
def test_the_slot_moves_by_single_rounded_operations(feedback: Feedback) -> None:
    mean, slot = normal(10_001, 0), normal(10_001, 1)
    share = torch.tensor(2 / 3, dtype=torch.float32).numpy()
    expected = slot.numpy() + mean.numpy() * share
    estimate, moved = feedback.combined(mean, slot, share=2 / 3)
    assert moved is not None and moved.numpy().tobytes() == expected.tobytes() == estimate.numpy().tobytes()
    estimate, _ = feedback.combined(mean, slot)
    assert estimate.numpy().tobytes() == (slot.numpy() + mean.numpy()).tobytes()
