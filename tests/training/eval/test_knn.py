"""Neighbours against scikit-learn's brute force."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from training.eval import knn
from training.eval.knn import knn_accuracy, nearest, predict


def made(seed: int, num: int = 300, num_classes: int = 7, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num)
    centres = np.random.default_rng(99).normal(size=(num_classes, dim))
    features = (centres[labels] + rng.normal(size=(num, dim)) * 1.5) * rng.uniform(0.1, 5, (num, 1))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("blocks", [(512, 65_536), (17, 41)])
def test_classes_are_those_of_scikit_learn_with_the_same_votes(temperature, blocks, monkeypatch):
    monkeypatch.setattr(knn, "_TEST_ROWS", blocks[0])
    monkeypatch.setattr(knn, "_TRAIN_ROWS", blocks[1])
    (train, labels), (test, test_labels) = made(0), made(1)
    found = predict(train, labels, test, k=(20, 1, 5, 200), temperature=temperature)
    for k, classes in found.items():
        theirs = KNeighborsClassifier(
            k, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
        ).fit(train.double().numpy(), labels.numpy())
        assert np.array_equal(classes.numpy(), theirs.predict(test.double().numpy())), k
    accuracies = knn_accuracy(train, labels, test, test_labels, k=(20,), temperature=temperature)
    assert accuracies == {20: pytest.approx(float((found[20] == test_labels).float().mean()))}


def test_of_equal_votes_the_smaller_class_wins():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = predict(train, torch.tensor([3, 1, 1, 3]), torch.tensor([[2.0, 0.0]]), k=(4,), temperature=0.07)
    assert found[4].tolist() == [1]


def test_more_neighbours_than_pictures_are_all_pictures():
    (train, labels), (test, _) = made(0, num=9), made(1, num=20)
    found = predict(train, labels, test, k=(9, 50), temperature=0.07)
    assert torch.equal(found[9], found[50])


def test_a_low_temperature_does_not_overflow():
    (train, labels), (test, _) = made(0), made(1)
    cold, single = (predict(train, labels, test, k=(k,), temperature=1e-4)[k] for k in (20, 1))
    assert (cold == single).float().mean() > 0.99


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_not_measured(value):
    (train, labels), (test, test_labels) = made(0), made(1)
    broken = train.clone()
    broken[3, 2] = value
    for pair in ((broken, test), (train, broken)):
        found = knn_accuracy(pair[0], labels, pair[1], test_labels, k=(20, 1), temperature=0.07)
        assert all(math.isnan(accuracy) for accuracy in found.values())


def test_neighbours_are_found_in_parts_as_at_once(monkeypatch):
    train, test = (torch.nn.functional.normalize(made(seed)[0], dim=-1) for seed in (0, 1))
    similarity, rows = (test @ train.T).topk(30)
    monkeypatch.setattr(knn, "_TRAIN_ROWS", 11)
    found, where = nearest(train, test, 30)
    torch.testing.assert_close(found, similarity)
    assert (where == rows).float().mean() > 0.999
