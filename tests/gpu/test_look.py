"""NudeNet's passes on the GPU: batches of any pictures, and what the CPU finds."""

import numpy as np
import pytest

from curation.safety.detector import NudeNetDetector, has_cuda
from curation.safety.look import LookConfig, Looker

pytestmark = pytest.mark.skipif(not has_cuda(), reason="onnxruntime is not built for CUDA")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    from skimage import data

    return [
        data.astronaut(),
        data.coffee(),
        data.chelsea(),
        data.astronaut()[::3, ::2],
        np.zeros((9, 700, 3), np.uint8),
    ]


def test_a_picture_gives_the_same_whatever_comes_with_it(pictures):
    detector = NudeNetDetector(device="cuda", batch_px=4 * 320**2)
    together = list(detector.outputs(pictures))
    for rgb, output in zip(pictures, together, strict=True):
        (alone,) = detector.outputs([rgb])
        assert np.array_equal(alone, output)


def test_faces_and_scores_are_those_of_the_cpu(pictures):
    on_gpu, on_cpu = (Looker(LookConfig(device=device)).see(pictures) for device in ("cuda", "cpu"))
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.class_scores == pytest.approx(theirs.class_scores, abs=1e-2)
        assert [box.label for box in ours.faces] == [box.label for box in theirs.faces]
        assert np.allclose([box[2:] for box in ours.faces], [box[2:] for box in theirs.faces], atol=2)
