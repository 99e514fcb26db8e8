"""Losses against dinov2's values (tests/golden/make_losses.py), slow twins, and inputs that break naive forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from training.losses.centering import Center
from training.losses.dino import dino_loss
from training.losses.gram import gram_loss, resize_tokens
from training.losses.ibot import ibot_loss
from training.losses.koleo import duplicate_pairs, koleo
from training.losses.prototypes import chunked_cross_entropy
from training.losses.sinkhorn import sinkhorn

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[2] / "golden" / "losses.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def close(first, second, atol=1e-6):
    torch.testing.assert_close(first, second, atol=atol, rtol=1e-6)


# Cross-entropy in chunks


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_neither_loss_nor_gradients(chunk):
    torch.manual_seed(0)
    z, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (7, 11))
    targets, weights = torch.rand(7, 11, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    loss = chunked_cross_entropy(z, weight, targets, temperature=0.1, weights=weights, chunk=chunk).total
    twin = -((targets * (z @ weight.T / 0.1).log_softmax(-1)).sum(-1) * weights).sum()
    close(loss, twin)
    for mine, other in zip(
        torch.autograd.grad(loss * 3, (z, weight)), torch.autograd.grad(twin * 3, (z, weight)), strict=True
    ):
        close(mine, other)
    assert torch.autograd.gradcheck(
        lambda a, b: chunked_cross_entropy(a, b, targets, temperature=0.5, weights=weights, chunk=chunk).total,
        (z, weight),
    )


def test_rows_may_share_targets_and_their_losses_sum_to_the_total():
    z, weight, targets = torch.randn(7, 5), torch.randn(11, 5), torch.rand(3, 11)
    index = torch.tensor([2, 0, 0, 1, 2, 2, 0])
    found = chunked_cross_entropy(z, weight, targets, temperature=0.1, index=index, chunk=2)
    expected = -(targets[index] * (z @ weight.T / 0.1).log_softmax(-1)).sum(-1) / 7
    close(found.rows, expected)
    close(found.total, expected.sum())


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    z, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    loss = chunked_cross_entropy(z, weight, torch.rand(4, 6), temperature=0.1, chunk=2).total * 3
    first = torch.autograd.grad(loss, (z, weight), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, (z, weight)), strict=True):
        assert torch.equal(one, other)


def test_no_rows_give_a_differentiable_zero():
    z, weight = torch.randn(0, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss = chunked_cross_entropy(z, weight, torch.randn(0, 6), temperature=0.1, chunk=4).total
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()


def test_logits_of_ten_thousand_stay_finite():
    z, weight = torch.full((2, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = chunked_cross_entropy(z, weight, torch.eye(3)[:2], temperature=0.1, chunk=8).total
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(weight.grad).all()


# DINO, iBOT


def test_dino_is_that_of_dinov2(golden):
    z = golden["dino_z"].requires_grad_()
    terms = dino_loss(z, golden["dino_weight"], golden["dino_targets"], num_locals=3, temperature=0.1, chunk=5)
    close(terms.global_, golden["dino_global"])
    close(terms.local, golden["dino_local"])
    terms.total.backward()
    close(z.grad, golden["dino_gradient"])


@pytest.mark.parametrize("num_locals", [0, 2])
def test_dino_is_the_mean_over_all_pairs_but_the_same_view(num_locals):
    torch.manual_seed(1)
    pictures, prototypes = 3, 6
    z, weight = torch.randn((2 + num_locals) * pictures, 4), torch.randn(prototypes, 4)
    targets = torch.rand(2 * pictures, prototypes).softmax(-1)
    logs = (z @ weight.T / 0.1).log_softmax(-1).view(2 + num_locals, pictures, prototypes)
    pairs = [
        -(targets.view(2, pictures, prototypes)[g, b] * logs[s, b]).sum()
        for b in range(pictures)
        for g in range(2)
        for s in range(2 + num_locals)
        if s != g
    ]
    terms = dino_loss(z, weight, targets, num_locals=num_locals, temperature=0.1, chunk=100)
    close(terms.total, torch.stack(pairs).mean(), atol=1e-5)


def test_ibot_is_that_of_dinov2_with_an_unmasked_crop(golden):
    masks, student = golden["ibot_masks"], golden["ibot_student"].requires_grad_()
    identity = torch.eye(student.shape[1])
    loss = ibot_loss(student, identity, golden["ibot_targets"], masks=masks, temperature=0.1, chunk=7)
    close(loss, golden["ibot_loss"])
    loss.backward()
    close(student.grad, golden["ibot_gradient"])
    assert not masks[1].any()


def test_ibot_without_a_masked_patch_is_zero():
    z = torch.randn(0, 4, requires_grad=True)
    masks = torch.zeros(2, 9, dtype=torch.bool)
    loss = ibot_loss(z, torch.randn(5, 4), torch.randn(0, 5), masks=masks, temperature=0.1, chunk=4)
    loss.backward()
    assert loss == 0


# Sinkhorn, centre


def in_logs(logits, temperature, iterations=3):
    """Ground truth in double precision."""
    q = logits.double() / temperature
    for _ in range(iterations):
        q = q - q.logsumexp(0, keepdim=True)
        q = q - q.logsumexp(1, keepdim=True)
    return q.exp()


def test_sinkhorn_is_that_of_dinov2(golden):
    for name in ("dino", "ibot"):
        found = sinkhorn(golden[f"{name}_teacher"], temperature=0.05)
        close(found, golden[f"{name}_targets"])
        close(found.double(), in_logs(golden[f"{name}_teacher"], 0.05))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_sinkhorn_cannot_overflow(scale):
    torch.manual_seed(2)
    found = sinkhorn(torch.randn(16, 40) * scale, temperature=0.04)
    assert torch.isfinite(found).all()
    close(found.sum(1), torch.ones(16), atol=1e-5)


def test_a_row_far_below_the_largest_does_not_vanish():
    logits = torch.randn(6, 8)
    logits[2] -= 50
    close(sinkhorn(logits, temperature=0.1).double(), in_logs(logits, 0.1), atol=1e-5)


@pytest.mark.parametrize("offset", [-3.4, -4.0, -1e4])
def test_a_prototype_far_below_the_others_gets_its_share(offset):
    torch.manual_seed(6)
    logits = torch.randn(16, 24) * 0.2
    shifted = logits.clone()
    shifted[:, 7] += offset
    found = sinkhorn(shifted, temperature=0.04)
    close(found.double(), in_logs(shifted, 0.04), atol=2e-5 if offset < -100 else 1e-6)
    if offset > -100:  # -1e4 itself rounds the logits that it is added to
        close(found, sinkhorn(logits, temperature=0.04), atol=1e-4)


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(2, 20), st.floats(-100, 100), st.integers(0, 2**31))
def test_sinkhorn_rows_sum_to_one_and_a_shift_of_all_logits_changes_nothing(rows, prototypes, shift, seed):
    logits = torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed))
    found = sinkhorn(logits, temperature=0.07)
    close(found.sum(1), torch.ones(rows), atol=1e-5)
    close(sinkhorn(logits + shift, temperature=0.07), found, atol=2e-3)  # the shift itself rounds logits / temperature


def test_sinkhorn_of_nothing_is_nothing():
    assert sinkhorn(torch.zeros(0, 5), temperature=0.1).shape == (0, 5)


def test_centres_are_those_of_dinov2_step_by_step(golden):
    center = Center(golden["center_steps"].shape[-1], 0.9)
    for step, cls, patch in zip(golden["center_steps"], golden["center_cls"], golden["center_patch"], strict=True):
        close(center.probabilities(step, 0.06), cls)
        close(center.probabilities(step, 0.06), patch)
        center.update(step)
    close(center.center, golden["center_end"])


# KoLeo


def test_koleo_is_that_of_dinov2(golden):
    x = golden["koleo_x"].requires_grad_()
    loss = koleo(x)
    loss.backward()
    close(loss, golden["koleo_loss"])
    close(x.grad, golden["koleo_gradient"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_duplicate_costs_what_it_can_at_most_and_no_more(dtype):
    torch.manual_seed(3)
    x = F.normalize(torch.randn(6, 16), dim=-1).to(dtype)
    x[3] = x[1]
    x.requires_grad_()
    loss = koleo(x)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()
    apart = koleo(torch.cat([x[:1], x[2:3], x[4:]]).detach())
    assert loss < math.log(1e8) * 2 / 6 + 3 * abs(apart)
    assert duplicate_pairs(x) == 1


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_equal_rows_pull_at_nothing(copies):
    torch.manual_seed(7)
    x = torch.randn(8, 16)
    alone = x.clone().requires_grad_()
    koleo(alone).backward()
    x[1:copies] = x[:1]
    x.requires_grad_()
    koleo(x).backward()
    assert x.grad.abs().max() < 10 * alone.grad.abs().max()


def test_koleo_of_one_picture_is_zero():
    x = torch.randn(1, 8, requires_grad=True)
    koleo(x).backward()
    assert not x.grad.any()


# Gram


def test_gram_is_the_mean_squared_difference_of_cosines():
    torch.manual_seed(4)
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 9)
    slow = torch.stack(
        [
            (
                F.cosine_similarity(student[c, i], student[c, j], 0)
                - F.cosine_similarity(teacher[c, i], teacher[c, j], 0)
            )
            ** 2
            for c in range(2)
            for i in range(4)
            for j in range(4)
        ]
    ).mean()
    close(gram_loss(student, teacher), slow)
    assert gram_loss(student, student * 3) < 1e-12


def test_tokens_are_resized_as_pictures_are():
    ramp = torch.arange(8.0).view(1, 1, 8).expand(1, 8, 8).reshape(1, 64, 1)
    small = resize_tokens(ramp, (8, 8), (4, 4)).view(4, 4)
    close(small[0], torch.tensor([0.5, 2.5, 4.5, 6.5]), atol=0.2)


# Ranks


def _rank(rank: int, size: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store{size}", rank=rank, world_size=size)
    torch.manual_seed(5)
    x, logits = torch.randn(8, 6), torch.randn(7, 10) / 3
    bounds = {2: [0, 7, 7], 4: [0, 3, 3, 6, 7]}[size]  # a rank without rows is one of them
    mine = x.chunk(size)[rank].clone().requires_grad_()
    loss = koleo(mine, group=dist.group.WORLD)
    loss.backward()
    rows = sinkhorn(logits[bounds[rank] : bounds[rank + 1]], temperature=0.05, group=dist.group.WORLD)
    center = Center(10, 0.9)
    center.update(logits[bounds[rank] : bounds[rank + 1]], dist.group.WORLD)
    torch.save((loss.detach(), mine.grad, rows, center.center), f"{path}/{size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_are_one_process(tmp_path, size):
    torch.multiprocessing.start_processes(_rank, args=(size, str(tmp_path)), nprocs=size, start_method="fork")
    parts = [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)]
    torch.manual_seed(5)
    x, logits = torch.randn(8, 6).requires_grad_(), torch.randn(7, 10) / 3
    loss = koleo(x)
    loss.backward()
    close(torch.stack([part[0] for part in parts]).mean(), loss.detach())
    # Gradients of parameters are averaged over ranks; that of a row is its share of the sum.
    close(torch.cat([part[1] for part in parts]) / size, x.grad)
    close(torch.cat([part[2] for part in parts]), sinkhorn(logits, temperature=0.05))
    close(parts[0][3], 0.1 * logits.mean(0, keepdim=True))
