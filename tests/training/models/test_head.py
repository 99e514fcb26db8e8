"""Projection heads against dinov2's."""

import pytest
import torch

from tests.training.models.golden import MADE, VALUES, golden
from training.config import HeadConfig
from training.models.head import ProjectionHead


def head_of(name: str) -> ProjectionHead:
    head = ProjectionHead(MADE["DIM"], HeadConfig(**MADE["HEAD"], **MADE["HEADS_OF"][name]))
    MADE["fill"](head, name)
    return head


def rows_of(name: str) -> torch.Tensor:
    return MADE["noise"](f"rows {name}", MADE["HEAD_ROWS"], MADE["DIM"])


def small(**values) -> ProjectionHead:
    return ProjectionHead(8, HeadConfig(num_prototypes=10, hidden_dim=6, bottleneck_dim=4, **values))


@pytest.mark.parametrize("name", list(MADE["HEADS_OF"]))
def test_logits_and_gradients_are_those_of_dinov2(name: str):
    head = head_of(name)
    logits = head(rows_of(name))
    torch.testing.assert_close(logits, golden(f"{name}/logits"), atol=1e-6, rtol=1e-6)
    MADE["readout"]([logits]).backward()
    ours = MADE["gradients"](head, name)
    assert set(ours) == {key for key in VALUES if key.startswith(f"{name}/grad/")}
    for key, gradient in ours.items():
        torch.testing.assert_close(torch.from_numpy(gradient), golden(key), atol=1e-5, rtol=1e-5, msg=key)


def test_logits_are_bounded_by_the_gain():
    head = small()
    assert head(100 * torch.randn(50, 8)).abs().max() <= 1 + 1e-6
    torch.testing.assert_close(head.project(torch.randn(50, 8)).norm(dim=-1), torch.ones(50))


def test_rows_of_zeros_give_finite_gradients():
    head = small()
    rows = torch.zeros(3, 8, requires_grad=True)
    head(rows).sum().backward()
    assert rows.grad.isfinite().all()


def test_no_rows_give_no_logits():
    for norm in ("none", "batch", "batch_all"):
        assert small(norm=norm)(torch.zeros(0, 8)).shape == (0, 10)


def test_batch_norm_after_the_bottleneck_spreads_rows_that_lie_on_one_side():
    rows = torch.randn(50, 8) + 20
    for norm, is_spread in (("none", False), ("batch_all", True)):
        z = small(norm=norm).project(rows)
        assert bool(z.mean(0).norm() < 0.5) == is_spread, norm


def test_frozen_gain_does_not_learn():
    head = small(weight_norm_gain="frozen")
    head(torch.randn(3, 8)).sum().backward()
    assert head.last_layer.weight_g.grad is None
    assert head.last_layer.weight_v.grad is not None


def test_without_gain_prototypes_are_a_plain_linear_layer():
    head = small(weight_norm_gain="none")
    assert [name for name, _ in head.last_layer.named_parameters()] == ["weight"]
    rows = torch.randn(3, 8)
    assert torch.equal(head(rows), head.project(rows) @ head.last_layer.weight.T)


def test_batch_norm_in_a_teacher_is_that_in_training():
    head, rows = small(norm="batch"), torch.randn(7, 8)
    assert torch.equal(head.train()(rows), head.eval()(rows))


@pytest.mark.parametrize("rows", [torch.randn(4, 8), torch.randn(4, 8).bfloat16()])
def test_head_computes_in_full_precision_under_autocast(rows: torch.Tensor):
    head = small()
    expected = head(rows.float())
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(rows)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("gain", ["trainable", "none"])
def test_weights_drawn_after_the_meta_device_are_those_drawn_before(gain: str):
    config = HeadConfig(num_prototypes=10, hidden_dim=6, bottleneck_dim=4, weight_norm_gain=gain, norm="batch")
    expected = ProjectionHead(8, config)
    torch.manual_seed(3)
    expected.init_weights()
    with torch.device("meta"):
        head = ProjectionHead(8, config)
    head.to_empty(device="cpu")
    torch.manual_seed(3)
    head.init_weights()
    for parameter, other in zip(head.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("gain", ["trainable", "frozen", "none"])
def test_losses_are_those_of_the_logits(gain: str):
    head, temperature = small(weight_norm_gain=gain), 0.1
    rows, targets = torch.randn(4 + 6, 8), torch.rand(4, 10).softmax(-1)
    terms = head.dino_loss(rows, targets, num_locals=3, temperature=temperature, chunk=3)
    logp = (head(rows) / temperature).log_softmax(-1).view(5, 2, 10)  # [view, picture, K]
    pairs = [(t, s) for t in range(2) for s in range(5) if s != t]
    every = [-(targets.view(2, 2, 10)[t] * logp[s]).sum(-1).mean() for t, s in pairs]
    torch.testing.assert_close(terms.total, torch.stack(every).mean(), atol=1e-5, rtol=1e-5)

    masks = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    loss = head.ibot_loss(rows[:4], targets, masks=masks, temperature=temperature, chunk=3)
    each = -(targets * (head(rows[:4]) / temperature).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss, each.sum() / 2 / 4, atol=1e-5, rtol=1e-5)
