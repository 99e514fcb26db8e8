"""Measurements of backbones on labelled pictures that are read from disk."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from tests.training import small_training as small
from training.config import ConfigError, EvalConfig, TrainRecipe
from training.data.tars import TarWriter
from training.eval import linear
from training.eval.evaluate import Evaluator, evaluate_file, labelled_set
from training.eval.features import extract, read_out
from training.eval.pictures import Pictures
from training.export import NETWORK, TEACHER, write_network
from training.models.network import Network


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Forty-eight pictures with labels; one more that is none, and one without label."""
    folder = tmp_path_factory.mktemp("tars")
    small.write_tars(folder)
    writer = TarWriter(folder / "odd.tar")
    for key, data, label in (("bad", b"\xff\xd8\xff no picture", 1), ("unlabelled", small.picture(1), None)):
        writer.add(f"{key}.jpg", data)
        writer.add(f"{key}.json", json.dumps({"label": label}).encode())
    writer.close()
    return folder


def evaluation(tars, **changes) -> EvalConfig:
    part = {"kind": "tars", "location": f"{tars}/*.tar"}
    base = {"sets": {"made": {"train": part}}, "k": (5, 1), "batch_size": 16}
    return EvalConfig.model_validate(base | changes)


@pytest.fixture(scope="module")
def trained(tars, tmp_path_factory):
    """A network as a stage writes it, and the folder that it is in."""
    torch.manual_seed(0)
    resolved = TrainRecipe.model_validate(small.values(tars, tmp_path_factory.mktemp("run"))).resolved("pretrain")
    network = Network(resolved.model, resolved.objective)
    folder = tmp_path_factory.mktemp("stage")
    write_network(folder, dict(network.state_dict()), resolved)
    return resolved, network, folder


def test_a_fifth_is_held_out_where_there_is_no_test_set(tars, trained):
    resolved, network, _ = trained
    evaluator = Evaluator(evaluation(tars), resolved.views)
    found = evaluator(network.backbone)
    assert set(found) == {f"knn_made{kind}" for kind in ("", "_k1", "_mean", "_cls_mean")} | {
        "rank_me_made",
        "chance_made",
        "bad_made",
    }
    assert found["bad_made"] == 1
    labelled = evaluator.sets["made"]
    assert len(labelled.labels) == 48
    held = ~labelled.is_train
    assert torch.equal(held, labelled.is_test)
    assert sorted(linear.held_out_by_label(labelled.labels, 5).tolist()) == held.nonzero().flatten().tolist()
    assert found["chance_made"] == pytest.approx(float(labelled.labels[held].bincount().max()) / int(held.sum()))
    blocks = extract(network.backbone, labelled.train.prepared(), views=resolved.views, batch_size=48)
    features = read_out(blocks, network.backbone.dim, "cls").double()
    theirs = KNeighborsClassifier(5, algorithm="brute", metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(features[~held].numpy(), labelled.labels[~held].numpy())
    assert found["knn_made"] == pytest.approx(theirs.score(features[held].numpy(), labelled.labels[held].numpy()))


def test_rows_that_are_tested_are_spread_over_the_classes_of_a_sorted_set():
    names = [f"{number // 20:02}" for number in range(200)]  # 10 classes, one after another, as folders lie
    whole, some = (labelled_set(Pictures(names, lambda: iter([]), 0), max_test=limit) for limit in (None, 10))
    assert whole.test_labels.bincount().tolist() == [4] * 10
    assert some.test_labels.bincount().tolist() == [1] * 10
    assert torch.equal(some.is_train, whole.is_train), "what is not tested is not learned from either"


def test_readouts_give_what_they_give_when_they_are_asked_for(tars, trained):
    resolved, network, _ = trained
    mean = Evaluator(evaluation(tars, readout="mean"), resolved.views)(network.backbone)
    cls = Evaluator(evaluation(tars, readout="cls"), resolved.views)(network.backbone)
    assert (mean["knn_made"], mean["knn_made_cls"]) == (cls["knn_made_mean"], cls["knn_made"])


def test_the_same_network_is_measured_the_same_twice(tars, trained):
    resolved, network, _ = trained
    evaluator = Evaluator(evaluation(tars, readout="cls_mean", linear=True), resolved.views)
    first = evaluator(network.backbone)
    assert "linear_ridge_made" in first
    assert "linear_sgd_made" not in first, "too slow while it trains"
    assert evaluator(network.backbone) == first


def test_a_test_set_of_its_own_has_its_own_pictures_and_limits(tars, trained):
    resolved, network, _ = trained
    train, test = ({"kind": "tars", "location": str(tars / name)} for name in ("000.tar", "001.tar"))
    sets = {"own": {"train": train, "test": train}, "other": {"train": train, "test": test, "max_test": 3}}
    evaluator = Evaluator(evaluation(tars, sets=sets, k=(1,)), resolved.views)
    found = evaluator(network.backbone)
    assert found["knn_own"] == found["knn_own_mean"] == 1.0, "each picture finds itself"
    assert len(evaluator.sets["other"].test_labels) == 3
    assert evaluator.sets["other"].num_bad == 0


def test_no_labelled_picture_is_an_error(tars, trained):
    resolved, _, _ = trained
    sets = {"odd": {"train": {"kind": "tars", "location": str(tars / "odd.tar")}}}
    with pytest.raises(ConfigError, match="got 0 labelled pictures"):
        Evaluator(evaluation(tars, sets=sets), resolved.views)


@pytest.mark.parametrize("name", [NETWORK, TEACHER])
def test_a_file_is_measured_as_the_network_in_it(tars, trained, name, monkeypatch):
    monkeypatch.setattr(linear, "MAX_PASSES", 5)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    resolved, network, folder = trained
    found = evaluate_file(folder / name, evaluation(tars, linear=True))
    plain = Evaluator(evaluation(tars, linear=True), resolved.views)(network.backbone)
    assert {key: found[key] for key in plain} == pytest.approx(plain, abs=1e-4)
    assert set(found) - set(plain) == {"linear_sgd_made", "linear_sgd_best_made"}
    assert all(0 <= found[f"linear_sgd{kind}_made"] <= 1 for kind in ("", "_best"))


def test_a_file_is_measured_with_all_of_dinov2s_numbers_of_neighbours(tars, trained, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    _, _, folder = trained
    part = {"kind": "tars", "location": f"{tars}/*.tar"}
    found = evaluate_file(folder / NETWORK, EvalConfig.model_validate({"sets": {"made": {"train": part}}}))
    assert {key for key in found if key.startswith("knn_made")} == {
        f"knn_made{kind}" for kind in ("", "_k10", "_k100", "_k200", "_mean", "_cls_mean")
    }
    assert found["knn_made_k100"] == found["knn_made_k200"], "there are 39 pictures to learn from"


def test_a_network_that_broke_is_measured_as_nan_and_does_not_end_the_run(tars, trained):
    resolved, network, _ = trained
    broken = copy.deepcopy(network.backbone)
    with torch.no_grad():
        broken.norm.weight[0] = math.nan
    found = Evaluator(evaluation(tars, linear=True), resolved.views)(broken)
    assert all(math.isnan(value) for name, value in found.items() if not name.startswith(("bad", "chance")))


def test_weights_that_do_not_say_what_they_are_are_refused(tars, trained, tmp_path):
    _, _, folder = trained
    save_file(load_file(folder / TEACHER), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"does not say what network it holds; give the network\.safetensors"):
        evaluate_file(tmp_path / "other.safetensors", evaluation(tars))
