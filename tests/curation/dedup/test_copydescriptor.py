"""Descriptors by name: unit vectors that depend on the pixels only, thresholds that belong to them, readable errors."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from curation.dedup.copydescriptor import (
    DescriptorConfig,
    load_sscd,
    open_descriptor,
    sscd_resnet50,
)
from curation.dedup.describe import Describe
from curation.dedup.siftvlad import (
    DIM,
    MIRROR,
    dct_vector,
    fit_sift_vlad,
    grey_of,
    keypoints_of,
    own_direction,
    symmetric_vlad,
    vlad,
    whitening,
)
from training.config import ConfigError


def picture(seed: int, height_px: int = 200, width_px: int = 260) -> np.ndarray:
    """Random blobs and edges: many keypoints."""
    draw = np.random.default_rng(seed)
    canvas = np.zeros((height_px, width_px, 3), np.uint8)
    for _ in range(120):
        centre = (int(draw.integers(0, width_px)), int(draw.integers(0, height_px)))
        colour = tuple(int(c) for c in draw.integers(0, 256, 3))
        if draw.random() < 0.5:
            cv2.circle(canvas, centre, int(draw.integers(2, 25)), colour, -1)
        else:
            corner = (centre[0] + int(draw.integers(3, 40)), centre[1] + int(draw.integers(3, 40)))
            cv2.rectangle(canvas, centre, corner, colour, -1)
    return canvas


def jpeg(rgb: np.ndarray, quality: int = 60) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "JPEG", quality=quality)
    return np.asarray(Image.open(out).convert("RGB"))


@pytest.fixture(scope="module")
def fit() -> dict[str, np.ndarray]:
    return fit_sift_vlad((picture(1000 + seed) for seed in range(60)), seed=0)


# --- sift-vlad-dct


def test_fit_and_vector_are_deterministic(fit: dict[str, np.ndarray]) -> None:
    again = fit_sift_vlad((picture(1000 + seed) for seed in range(60)), seed=0)
    assert set(fit) == {"sift_mean", "sift_axes", "words", "vlad_mean", "vlad_axes"}
    for name, array in fit.items():
        np.testing.assert_array_equal(array, again[name])
    descriptor = open_descriptor(DescriptorConfig(), fit)
    one = descriptor.vector(picture(1))
    descriptor.vector(picture(2))
    np.testing.assert_array_equal(one, descriptor.vector(picture(1)))
    assert one.shape == (DIM,)
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)


def test_copies_are_above_the_threshold_and_others_below() -> None:
    config = DescriptorConfig()
    # As many as the smallest pool is topped up to.
    descriptor = open_descriptor(config, fit_sift_vlad((picture(1000 + n) for n in range(config.fit_at_least)), seed=0))
    originals = [picture(seed) for seed in range(20)]
    edited = [
        edit
        for rgb in originals
        for edit in (
            jpeg(rgb, 20),
            cv2.resize(rgb, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
            rgb[10:-10, 20:-5],
        )
    ]
    a = np.stack([descriptor.vector(rgb) for rgb in originals])
    b = np.stack([descriptor.vector(np.ascontiguousarray(rgb)) for rgb in edited])
    scores = a @ b.T
    own = np.repeat(np.eye(20, dtype=bool), 3, axis=1)
    threshold = config.thresholds().duplicate
    assert (scores[own] >= threshold).mean() >= 0.95
    assert (scores[~own] >= threshold).mean() <= 0.01


def test_mirrored_sift_is_a_permutation() -> None:
    rgb = cv2.resize(picture(3), (288, 221))
    plain, mirrored = keypoints_of(grey_of(rgb)).rows, keypoints_of(grey_of(rgb[:, ::-1])).rows
    distance = np.linalg.norm(plain[:, MIRROR][:, None] - mirrored[None], axis=2).min(1)
    assert np.median(distance) < 0.1


@pytest.mark.parametrize("num_pictures", [0, 1, 2, 3, 10])
def test_small_pools_get_a_shorter_fit_and_a_whole_vector(num_pictures: int) -> None:
    small = fit_sift_vlad((picture(seed) for seed in range(num_pictures)), seed=0)
    descriptor = open_descriptor(DescriptorConfig(), small)
    vectors = np.stack([descriptor.vector(picture(seed)) for seed in (0, 1, 50)])
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_mirror_image_is_a_copy(fit: dict[str, np.ndarray]) -> None:
    rows = keypoints_of(grey_of(picture(5))).rows
    mirrored = np.ascontiguousarray(rows[:, MIRROR])
    np.testing.assert_allclose(symmetric_vlad(rows, fit), symmetric_vlad(mirrored, fit), atol=1e-5)
    descriptor = open_descriptor(DescriptorConfig(), fit)
    flat = np.repeat(np.linspace(0, 255, 240).astype(np.uint8)[None], 200, 0)[..., None].repeat(3, 2)
    for rgb in (picture(5), flat):
        similarity = descriptor.vector(rgb) @ descriptor.vector(np.ascontiguousarray(rgb[:, ::-1]))
        assert similarity > DescriptorConfig().thresholds().duplicate


def test_pictures_without_keypoints_are_no_copies_of_each_other(fit: dict[str, np.ndarray]) -> None:
    ramp = np.linspace(0, 255, 240).astype(np.uint8)
    flat = [np.full((200, 240, 3), value, np.uint8) for value in (0, 128, 255)]
    flat += [
        np.repeat(np.tile(ramp, (200, 1))[..., None], 3, 2),
        np.repeat(np.tile(ramp // 2 + 60, (200, 1))[..., None], 3, 2),
    ]
    descriptor = open_descriptor(DescriptorConfig(), fit)
    vectors = np.stack([descriptor.vector(rgb) for rgb in flat])
    scores = vectors @ vectors.T
    assert scores[np.triu_indices(len(flat), 1)].max() < DescriptorConfig().thresholds().duplicate
    np.testing.assert_array_equal(own_direction(grey_of(flat[3])), own_direction(grey_of(flat[3])))


def test_vlad_equals_the_loop(fit: dict[str, np.ndarray]) -> None:
    rows = keypoints_of(grey_of(picture(7))).rows
    reduced = (rows - fit["sift_mean"]) @ fit["sift_axes"]
    sums = np.zeros_like(fit["words"])
    for row in reduced:
        word = int(np.argmin(((fit["words"] - row) ** 2).sum(1)))
        sums[word] += row - fit["words"][word]
    sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    flat = (np.sign(sums) * np.sqrt(np.abs(sums))).ravel()
    np.testing.assert_allclose(vlad(rows, fit), flat / np.linalg.norm(flat), atol=1e-4)


def test_whitened_rows_have_unit_variance() -> None:
    rows = np.random.default_rng(0).standard_normal((60, 200)).astype(np.float32) * np.linspace(
        0.1, 3, 200, dtype=np.float32
    )
    centred = rows - rows.mean(0)
    white = centred @ whitening(centred)
    np.testing.assert_allclose(white.T @ white / len(rows), np.eye(white.shape[1]), atol=1e-3)


def test_dct_is_blind_to_brightness() -> None:
    grey = grey_of(picture(5))
    np.testing.assert_allclose(dct_vector(grey), dct_vector((grey // 2 + 20).astype(np.uint8)), atol=0.05)


# --- models with weights


@pytest.fixture(scope="module")
def sscd_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random weights of SSCD's torchvision form, as both kinds of file."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sscd")
    model = sscd_resnet50(512).eval()
    torch.save({f"backbone.{key}": value for key, value in model.state_dict().items()}, folder / "a.torchvision.pt")

    class WithNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(self.backbone(x))

    with torch.inference_mode():
        traced = torch.jit.trace(WithNorm(), torch.zeros(1, 3, 96, 96), check_trace=False)
    torch.jit.save(traced, str(folder / "a.torchscript.pt"))
    return {"script": str(folder / "a.torchscript.pt"), "state": str(folder / "a.torchvision.pt")}


def test_both_files_of_sscd_give_the_same_vectors(sscd_files: dict[str, str]) -> None:
    vectors = {}
    for kind, path in sscd_files.items():
        descriptor = open_descriptor(DescriptorConfig(name=f"sscd:{path}"), {})
        vectors[kind] = np.stack([descriptor.vector(picture(0, 90, 120)), descriptor.vector(picture(1, 100, 80))])
    np.testing.assert_allclose(vectors["script"], vectors["state"], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors["state"], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("dim", [512, 1024])
def test_both_lengths_of_sscd(dim: int, tmp_path: Path) -> None:
    state = {f"backbone.{key}": value for key, value in sscd_resnet50(dim).state_dict().items()}
    torch.save(state, tmp_path / "sscd.torchvision.pt")
    descriptor = open_descriptor(DescriptorConfig(name=f"sscd:{tmp_path / 'sscd.torchvision.pt'}"), {})
    assert descriptor.dim == dim == len(descriptor.vector(picture(0, 64, 96)))


def test_sscd_pools_by_the_generalised_mean(sscd_files: dict[str, str]) -> None:
    pool = load_sscd(sscd_files["state"]).avgpool
    x = torch.rand(2, 5, 3, 4)
    expected = torch.nn.functional.avg_pool2d(x.clamp(min=1e-6) ** 3, (3, 4)) ** (1 / 3)
    torch.testing.assert_close(pool(x), expected)


def test_a_timm_model_has_as_many_numbers_as_features(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    config = DescriptorConfig(
        name="timm:test_resnet", weights=str(tmp_path / "weights.pth"), duplicate_threshold=0.9, leakage_threshold=0.8
    )
    descriptor = open_descriptor(config, {})
    vector = descriptor.vector(picture(0, 96, 96))
    assert vector.shape == (model.num_features,) == (descriptor.dim,)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> DescriptorConfig:
    """An open_clip model of a few weights."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    tower = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    shape = {"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}
    (folder / "lvd-copies.json").write_text(json.dumps(shape))
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    torch.save(open_clip.create_model("lvd-copies").state_dict(), folder / "clip.pt")
    name, weights = "open_clip:lvd-copies/mine", str(folder / "clip.pt")
    return DescriptorConfig(name=name, weights=weights, duplicate_threshold=0.9, leakage_threshold=0.8)


def test_an_open_clip_model_gives_what_open_clip_gives(clip: DescriptorConfig) -> None:
    import open_clip

    descriptor = open_descriptor(clip, {})
    model, _, transform = open_clip.create_model_and_transforms("lvd-copies", pretrained=clip.weights)
    for rgb in (picture(0, 96, 150), picture(1, 70, 64)):
        with torch.inference_mode():
            wanted = model.eval().encode_image(transform(Image.fromarray(rgb))[None])[0].numpy()
        vector = descriptor.vector(rgb)
        assert vector.shape == (16,) == (descriptor.dim,)
        np.testing.assert_allclose(vector, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_an_open_clip_model_is_told_before_it_is_loaded(clip: DescriptorConfig) -> None:
    clip.check()
    (facts,) = Describe(clip).models()
    assert (facts.name, facts.takes, facts.dim, facts.precision) == ("open_clip:lvd-copies/mine", "64 px", 16, "fp32")
    values = clip.model_values()
    assert values == {"name": clip.name, "weights_sha256": facts.sha256}
    with pytest.raises(
        ConfigError, match=r"descriptor\.duplicate_threshold: got none, and none is known for 'open_clip:"
    ):
        clip.model_copy(update={"duplicate_threshold": None}).check()
    unknown = clip.model_copy(update={"name": "open_clip:No/tag"})
    with pytest.raises(ConfigError, match=r"descriptor\.name: got 'open_clip:No/tag'; open_clip has no model 'No'"):
        Describe(unknown).models()


# --- thresholds and errors


def test_known_thresholds_and_the_recipes_own() -> None:
    assert DescriptorConfig(name="sscd:x").thresholds() == (0.6, 0.45)
    assert DescriptorConfig(name="sscd:x", leakage_threshold=0.5).thresholds() == (0.6, 0.5)
    assert DescriptorConfig(duplicate_threshold=0.0, leakage_threshold=-0.5).thresholds() == (0.0, -0.5)


def test_the_fingerprint_holds_the_weights_and_not_their_path(tmp_path: Path) -> None:
    values = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
        values.append(DescriptorConfig(name=f"sscd:{tmp_path / name}").model_values())
    assert values[0] == values[1] != values[2]
    assert str(tmp_path) not in str(values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "magic"},
            "descriptor.name: got 'magic', allowed: sift-vlad-dct, sscd:PATH, timm:NAME, open_clip:NAME/TAG; sift-vlad",
        ),
        (
            {"name": "sscd:/no/such.pt"},
            "descriptor.name: got '/no/such.pt', which is no file; allowed: a path of weights",
        ),
        ({"name": "timm:resnet18"}, "descriptor.weights: got None, which is no file"),
        ({"name": "open_clip:ViT-B-32/openai"}, "descriptor.weights: got None, which is no file"),
        ({"name": "open_clip:ViT-B-32"}, "descriptor.name: got 'open_clip:ViT-B-32', allowed: sift-vlad-dct, sscd"),
        ({"precision": "fp16"}, "descriptor.precision: got 'fp16', allowed with sift-vlad-dct: fp32"),
    ],
)
def test_bad_names_and_files_are_one_readable_line(config: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DescriptorConfig(**config).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fit_of_few_pictures_has_no_thresholds_of_its_own() -> None:
    few = DescriptorConfig(fit_at_least=799)
    with pytest.raises(ConfigError, match="'sift-vlad-dct' with a fit of fewer than 800 pictures; allowed: a cosine"):
        few.check()
    few.model_copy(update={"duplicate_threshold": 0.5, "leakage_threshold": 0.5}).check()
    assert DescriptorConfig(fit_pictures=10).thresholds() == DescriptorConfig().thresholds()  # it is topped up
    assert few.model_values() != DescriptorConfig().model_values()


def test_a_descriptor_without_thresholds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"")
    config = DescriptorConfig(name="timm:resnet18", weights=str(tmp_path / "w"), duplicate_threshold=0.8)
    with pytest.raises(
        ConfigError, match=r"descriptor\.leakage_threshold: got none, and none is known for 'timm:resnet18'"
    ):
        config.check()


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"no model")
    with pytest.raises(ConfigError, match="holds neither a TorchScript model nor the state dict"):
        open_descriptor(DescriptorConfig(name=f"sscd:{tmp_path / 'w'}"), {})
