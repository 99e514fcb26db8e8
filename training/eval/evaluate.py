"""kNN, linear probe and rank of a backbone on labelled pictures: while it trains, and of a file.

| value | what it is |
|---|---|
| ``knn_SET`` | top-1 accuracy of the nearest neighbours, as many as the first of ``config.k`` |
| ``knn_SET_kK`` | of K of them, for its others |
| ``knn_SET_READOUT`` | as the first, by the readouts that are not ``config.readout`` |
| ``chance_SET`` | share of the most frequent class among the test pictures |
| ``linear_ridge_SET`` | of a ridge probe on the same features |
| ``rank_me_SET`` | effective rank of the test pictures' features; see ``metrics.rank_me`` |
| ``linear_sgd_SET`` | of dinov2's grid of classifiers; the one that is best on held-out training pictures |
| ``linear_sgd_best_SET`` | of the one that is best on the test pictures, as dinov2 reports |
| ``bad_SET`` | pictures that could not be decoded, where there are any |
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from training.config import ConfigError, EvalConfig, EvalSet, ModelConfig, ViewConfig
from training.data.sources import pictures
from training.eval.features import READOUTS, extract, read_out
from training.eval.knn import knn_accuracy
from training.eval.linear import NUM_BLOCKS, grid_accuracy, held_out_by_label, ridge_accuracy
from training.eval.pictures import Pictures, Preparation, read_pictures
from training.export import NETWORK, read_state
from training.metrics import rank_me
from training.models.convert import load_backbone
from training.models.vit import VisionTransformer

MAX_WORKERS = 16
# dinov2's eval/knn: 10, 20, 100, 200. The first one names ``knn_SET``, which is then that of training.
FILE_K = (20, 10, 100, 200)


class LabelledSet(NamedTuple):
    """Pictures to learn from and to be tested on."""

    train: Pictures
    labels: Tensor  # int64 [n], of train
    is_train: Tensor  # bool [n], whether they are learned from
    test: Pictures | None  # None: rows of train that are held out
    test_labels: Tensor  # int64 [m]
    is_test: Tensor  # bool [n]

    @property
    def num_bad(self) -> int:
        """Pictures that could not be decoded."""
        return self.train.num_bad + (self.test.num_bad if self.test is not None else 0)


def open_set(config: EvalSet, prepare: Preparation, *, num_workers: int = 0) -> LabelledSet:
    """Read a set as the recipe names it.

    Raises:
        ConfigError: a part is not there, has no such label, or too few pictures.
    """
    train = partial(pictures, config.train, config.label, config.max_train)
    test = partial(pictures, config.test, config.label, config.max_test) if config.test is not None else None
    read = partial(read_pictures, prepare=prepare, num_workers=num_workers)
    return labelled_set(read(train), read(test) if test is not None else None, max_test=config.max_test)


def labelled_set(train: Pictures, test: Pictures | None = None, *, max_test: int | None = None) -> LabelledSet:
    """Number the labels, and hold out a fifth of each class of ``train`` where there is no ``test``.

    Args:
        train: to learn from.
        test: to be tested on; None: rows of ``train``.
        max_test: of rows that are held out, test so many, spread over the classes; None: all.

    Raises:
        ConfigError: there are too few pictures.
    """
    if len(train.names) < 2 or (test is not None and not test.names):
        raise ConfigError(
            f"evaluation: got {len(train.names)} labelled pictures that can be decoded to learn from, and "
            f"{len(test.names) if test is not None else 'a fifth of them'} to test; allowed: from 2 and 1 on"
        )
    numbers = {name: number for number, name in enumerate(sorted({*train.names, *(test.names if test else ())}))}
    labels = torch.tensor([numbers[name] for name in train.names])
    is_train, is_test = torch.ones(len(labels), dtype=torch.bool), torch.zeros(len(labels), dtype=torch.bool)
    if test is None:
        rows = held_out_by_label(labels, 5)
        is_train[rows] = False
        num_tested = min(max_test or len(rows), len(rows))
        is_test[rows[torch.arange(num_tested) * len(rows) // num_tested]] = True  # rows lie sorted by class
    return LabelledSet(
        train=train,
        labels=labels,
        is_train=is_train,
        test=test,
        test_labels=labels[is_test] if test is None else torch.tensor([numbers[name] for name in test.names]),
        is_test=is_test,
    )


class Evaluator:
    """Measures backbones on the labelled sets of a recipe, which are opened once.

    Args:
        config: sets and what to measure.
        views: size of the global crops, mean and standard deviation.
        with_grid: where ``config.linear`` is on, also dinov2's grid of classifiers, which takes long.

    Raises:
        ConfigError: see ``open_set``.
    """

    def __init__(self, config: EvalConfig, views: ViewConfig, *, with_grid: bool = False) -> None:
        self.config, self.views, self.with_grid = config, views, with_grid
        prepare = Preparation.of(config, views)
        self.sets = {
            name: open_set(labelled, prepare, num_workers=config.num_workers) for name, labelled in config.sets.items()
        }

    def __call__(self, backbone: VisionTransformer) -> dict[str, float]:
        """What the table above lists, for every set; computed where the backbone lies."""
        found: dict[str, float] = {}
        for name, labelled in self.sets.items():
            found |= {f"{measure}_{name}{suffix}": value for (measure, suffix), value in self._one(backbone, labelled)}
        return found

    def _one(self, backbone: VisionTransformer, labelled: LabelledSet) -> Iterator[tuple[tuple[str, str], float]]:
        """Values by what stands before and behind the name of the set."""
        config, dim, device = self.config, backbone.dim, next(backbone.parameters()).device
        has_grid = config.linear and self.with_grid
        num_blocks = min(NUM_BLOCKS, len(backbone.blocks)) if has_grid else 1
        blocks, labels, test_blocks, test_labels = self._features(backbone, labelled, num_blocks)
        for readout in (config.readout, *(other for other in READOUTS if other != config.readout)):
            is_main = readout == config.readout
            accuracies = knn_accuracy(
                read_out(blocks, dim, readout),
                labels,
                read_out(test_blocks, dim, readout),
                test_labels,
                k=config.k if is_main else config.k[:1],
                temperature=config.temperature,
                device=device,
            )
            for k, accuracy in accuracies.items():
                yield ("knn", ("" if is_main else f"_{readout}") if k == config.k[0] else f"_k{k}"), accuracy
        train, test = (read_out(features, dim, config.readout) for features in (blocks, test_blocks))
        yield ("rank_me", ""), rank_me(test)
        yield ("chance", ""), float(test_labels.bincount().max()) / len(test_labels)
        if config.linear:
            yield ("linear_ridge", ""), ridge_accuracy(train, labels, test, test_labels)
        if has_grid:
            grid = grid_accuracy(blocks, labels, test_blocks, test_labels, dim=dim, device=device)
            yield ("linear_sgd", ""), grid.accuracy
            yield ("linear_sgd_best", ""), grid.best_accuracy
        if labelled.num_bad:
            yield ("bad", ""), float(labelled.num_bad)

    def _features(
        self, backbone: VisionTransformer, labelled: LabelledSet, num_blocks: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features [n, F] and labels [n] to learn from, [m, F] and [m] to be tested on; all on the CPU."""

        def of(pictures: Pictures) -> Tensor:
            made = extract(
                backbone,
                pictures.prepared(),
                views=self.views,
                batch_size=self.config.batch_size,
                num_blocks=num_blocks,
                precision=self.config.precision,
            )
            if len(made) != len(pictures.names):  # or labels would stand beside other pictures
                raise ConfigError("evaluation: pictures changed since they were read first")
            return made

        train = of(labelled.train)
        if labelled.test is not None:
            return train, labelled.labels, of(labelled.test), labelled.test_labels
        is_train, is_test = labelled.is_train, labelled.is_test
        return train[is_train], labelled.labels[is_train], train[is_test], labelled.test_labels


def evaluate_file(path: Path, config: EvalConfig) -> dict[str, float]:
    """Measure a trained network.

    Args:
        path: ``network.safetensors`` of a stage, or ``teacher.safetensors`` with that beside it.
        config: sets and what to measure; sizes that it leaves open are those of the training, ``k`` is ``FILE_K``.

    Returns:
        See ``Evaluator``; with ``config.linear`` the grid of classifiers too.

    Raises:
        ConfigError: the file does not say what network it holds; or see ``open_set``.
    """
    state, metadata = read_state(path)
    beside = path.with_name(NETWORK)
    if "model" not in metadata and beside.is_file():
        _, metadata = read_state(beside)
    if "model" not in metadata:
        raise ConfigError(f"weights: {str(path)!r} does not say what network it holds; give the {NETWORK} of a stage")
    backbone = VisionTransformer(ModelConfig.model_validate_json(metadata["model"]))
    load_backbone(backbone, state)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_workers = config.num_workers or min((os.cpu_count() or 1) - 1, MAX_WORKERS)
    changes: dict[str, object] = {"num_workers": num_workers}
    if "k" not in config.model_fields_set:
        changes["k"] = FILE_K
    config = config.model_copy(update=changes)
    views = ViewConfig.model_validate_json(metadata["views"])
    return Evaluator(config, views, with_grid=True)(backbone.to(device).eval())
