"""The embedded default embedder: HOG against skimage's, the PCA against sklearn's, and what it is worth on pictures."""

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.represent import handmade
from training.data.pixels import decode


def smooth(seed: int, num: int) -> np.ndarray:
    """Pictures with edges, uint8 [num, 64, 64, 3]."""
    import cv2

    noise = np.random.default_rng(seed).integers(0, 256, (num, 9, 9, 3)).astype(np.uint8)
    return np.stack([cv2.resize(one, (64, 64), interpolation=cv2.INTER_CUBIC) for one in noise])


def test_hog_agrees_with_skimage():
    from skimage.feature import hog

    for picture in smooth(0, 5):
        grey = picture.astype(np.float32).mean(axis=2)
        theirs = hog(grey, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2), block_norm="L2-Hys")
        # Theirs counts a gradient for one orientation, ours for the two it lies between: alike, not equal.
        blocks = handmade.hog(grey).reshape(7, 7, 4, 9)[:, :, [0, 2, 1, 3]]
        theirs = theirs.reshape(7, 7, 4, 9)
        best = max(
            float((blocks * np.roll(theirs, turn, axis=3)[..., ::flip]).sum()) for turn in range(9) for flip in (1, -1)
        )
        assert best / 49 > 0.85


def test_hog_of_one_edge():
    grey = np.zeros((64, 64), np.float32)
    grey[:, 32:] = 1
    found = handmade.hog(grey).reshape(7, 7, 4, 9)
    assert found[..., 1:].max() == 0
    assert found[:, 3, :, 0].min() > 0
    assert handmade.hog(grey * 200).tolist() == pytest.approx(found.ravel().tolist(), abs=1e-6)
    assert not handmade.hog(np.full((64, 64), 7, np.float32)).any()


@pytest.mark.parametrize("shape", [(40, 90), (300, 50)])
def test_axes_equal_sklearn(shape):
    from sklearn.decomposition import PCA

    values = np.random.default_rng(1).normal(size=shape) @ np.diag(np.linspace(3, 1, shape[1]))
    axes = handmade.principal_axes(values - values.mean(axis=0), 12)
    theirs = PCA(12, svd_solver="full").fit(values).components_
    np.testing.assert_allclose(np.abs((axes * theirs).sum(axis=1)), 1, atol=1e-5)


def test_few_pictures_leave_zero_axes():
    pairs = [handmade.features(one) for one in smooth(2, 5)]
    arrays = handmade.fit(*(np.stack([pair[half] for pair in pairs]) for half in (0, 1)))
    assert arrays["hog_axes"].shape == (handmade.HOG_DIM, 1764)
    assert arrays["thumb_axes"].shape == (handmade.THUMB_DIM, 3072)
    for name in ("hog_axes", "thumb_axes"):
        lengths = np.linalg.norm(arrays[name], axis=1)
        assert np.count_nonzero(lengths > 1e-3) == 4
        np.testing.assert_allclose(lengths[:4], 1, atol=1e-5)
        assert not lengths[4:].any()
    vector = handmade.project(*pairs[0], arrays)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    alone = handmade.fit(*(np.stack([half]) for half in pairs[0]))
    assert not handmade.project(*pairs[0], alone).any()


def neighbours_vote(bank: np.ndarray, classes: np.ndarray, vectors: np.ndarray, k: int = 20) -> np.ndarray:
    """Classes by weighted vote of the k nearest, weights exp(similarity / 0.07)."""
    scores = vectors @ bank.T
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    votes = np.zeros((len(vectors), classes.max() + 1))
    for rank in range(k):
        rows = np.arange(len(vectors))
        np.add.at(votes, (rows, classes[nearest[:, rank]]), np.exp(scores[rows, nearest[:, rank]] / 0.07))
    return votes.argmax(axis=1)


def test_meaning_beyond_thumbnails(shared_data):
    """20 classes, 60 + 20 pictures of each, chance 5 %. The whole set, 100 classes, gives 17.8 %, thumbnails 9.8 %."""
    table = pq.read_table(shared_data / "tiny_imagenet_100c.parquet", columns=["image", "split", "label", "sha256"])
    label, split = table["label"].to_numpy(), np.array(table["split"].to_pylist())
    order = np.argsort([hashlib.sha256(one.encode()).hexdigest() for one in table["sha256"].to_pylist()])
    places = []
    for name, num in (("train", 60), ("val", 20)):
        for one in np.unique(label)[:20]:
            places += [at for at in order if label[at] == one and split[at] == name][:num]
    pairs = [handmade.features(decode(table["image"][int(at)].as_py()).rgb) for at in places]
    hogs, thumbs = (np.stack([pair[half] for pair in pairs]) for half in (0, 1))
    classes = np.unique(label[places], return_inverse=True)[1]
    fitted = handmade.fit(hogs[:1200], thumbs[:1200])
    vectors = np.stack([handmade.project(*pair, fitted) for pair in pairs])
    centred = thumbs - thumbs[:1200].mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    ours, plain = (
        float((neighbours_vote(one[:1200], classes[:1200], one[1200:]) == classes[1200:]).mean())
        for one in (vectors, centred)
    )
    assert ours > 0.22
    assert ours > plain + 0.03
