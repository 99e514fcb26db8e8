"""Probes against scikit-learn and torch's own SGD."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from training.eval import linear
from training.eval.linear import RATES, _Probes, _Ridge, grid_accuracy, held_out, held_out_by_label, ridge_accuracy


def made(seed: int, num: int = 400, num_classes: int = 5, dim: int = 20, noise: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num,), generator=generator)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    return centres[labels] + noise * torch.randn(num, dim, generator=generator), labels


@pytest.mark.parametrize("rows", [65_536, 33])
def test_ridge_is_that_of_scikit_learn_on_centred_features(rows, monkeypatch):
    monkeypatch.setattr(linear, "ROWS", rows)
    (train, labels), (test, _) = made(0), made(1)
    fitted = _Ridge(train + 3, labels, 5)
    penalty = 0.1
    centred = train - train.mean(0)
    level = penalty * float((centred.T @ centred).trace()) / train.shape[1]
    theirs = Ridge(alpha=level).fit((train + 3).double().numpy(), np.eye(5)[labels.numpy()])
    np.testing.assert_allclose(fitted.scores(test, penalty).numpy(), theirs.predict(test.double().numpy()), atol=1e-5)


def test_ridge_tells_apart_what_can_be_and_does_not_overfit_noise():
    (train, labels), (test, test_labels) = made(0), made(1)
    assert ridge_accuracy(train, labels, test, test_labels) > 0.95
    wide = torch.randn(len(train), 300, generator=torch.Generator().manual_seed(5))
    wide_test = torch.randn(len(test), 300, generator=torch.Generator().manual_seed(6))
    joined = ridge_accuracy(torch.cat([train, wide], 1), labels, torch.cat([test, wide_test], 1), test_labels)
    assert joined > 0.85, "a penalty was chosen that ignores 300 columns of noise"


def test_ridge_survives_features_that_are_all_alike():
    labels = torch.arange(20) % 2
    assert ridge_accuracy(torch.ones(20, 3), labels, torch.ones(4, 3), torch.tensor([0, 0, 1, 1])) == 0.5


def test_held_out_rows_are_a_fifth_and_always_the_same():
    assert held_out(100, 5).sum() == 20
    assert torch.equal(held_out(100, 5), held_out(100, 5))
    assert [int(held_out(num, 5).sum()) for num in (1, 2, 3)] == [0, 1, 1]


def test_each_class_gives_its_fifth():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 2 + [3] * 12)[torch.randperm(67)]
    rows = held_out_by_label(labels, 5)
    assert len(rows) == len(set(rows.tolist())) == 13
    for name, num in zip(*(values.tolist() for values in labels.unique(return_counts=True)), strict=True):
        assert num // 5 <= int((labels[rows] == name).sum()) <= -(-num // 5)
    assert torch.equal(labels[rows], labels[rows].sort().values), "sorted by class"
    assert torch.equal(rows, held_out_by_label(labels, 5)), "always the same ones"
    assert not torch.equal(rows, held_out_by_label(labels, 5, seed=1))
    assert [len(held_out_by_label(torch.zeros(num, dtype=torch.long), 5)) for num in (0, 1, 2, 9, 10)] == [
        0,
        0,
        1,
        1,
        2,
    ]


def test_no_class_of_two_pictures_is_held_out_whole():
    labels = torch.arange(40) // 2
    held = labels[held_out_by_label(labels, 5)]
    assert len(held.unique()) == len(held) == 8


def test_features_that_are_not_finite_are_not_measured():
    (train, labels), (test, test_labels) = made(0, dim=18), made(1, dim=18)
    test[0, 0] = math.inf
    assert math.isnan(ridge_accuracy(train, labels, test, test_labels))
    assert math.isnan(grid_accuracy(train, labels, test, test_labels, dim=6, num_steps=1).accuracy)


def test_probes_side_by_side_are_what_torch_trains_one_by_one():
    train, labels = made(0, num=60, dim=6)
    steps, batch = 12, 20
    probes = _Probes(6, 5, torch.device("cpu"))
    first = probes._weight[0].clone()
    probes.fit(train, labels, num_steps=steps, batch_size=batch)
    order = torch.Generator().manual_seed(0)
    batches = torch.cat([torch.randperm(60, generator=order) for _ in range(4)]).split(batch)[:steps]
    for index in (0, 8, len(RATES) - 1):
        classifier = torch.nn.Linear(6, 5)
        with torch.no_grad():
            classifier.weight.copy_(first)
            classifier.bias.zero_()
        rate = RATES[index] * batch / 256
        optimizer = torch.optim.SGD(classifier.parameters(), lr=rate, momentum=0.9)
        for step, rows in enumerate(batches):
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            loss = torch.nn.functional.cross_entropy(classifier(train[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(probes._weight[index], classifier.weight.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(probes._bias[index], classifier.bias.detach(), atol=1e-6, rtol=1e-5)


def test_the_grid_finds_the_input_that_tells_classes_apart():
    # five parts of 6 columns: only the mean patch, the last of them, knows the class
    (known, labels), (known_test, test_labels) = made(0, dim=6, noise=0.3), made(1, dim=6, noise=0.3)
    generator = torch.Generator().manual_seed(7)
    train, test = (torch.cat([torch.randn(400, 24, generator=generator), x], 1) for x in (known, known_test))
    result = grid_accuracy(train, labels, test, test_labels, dim=6, num_steps=150, batch_size=64)
    assert "mean patch" in result.name
    assert result.accuracy > 0.9
    assert result.best_accuracy >= result.accuracy
    assert grid_accuracy(train, labels, test, test_labels, dim=6, num_steps=150, batch_size=64) == result


def test_a_network_with_fewer_blocks_has_a_smaller_grid():
    (train, labels), (test, test_labels) = made(0, dim=18), made(1, dim=18)
    result = grid_accuracy(train, labels, test, test_labels, dim=6, num_steps=100, batch_size=64)
    assert result.name.startswith(("last block,", "last 2 blocks,"))
