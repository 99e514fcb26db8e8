"""Backbones: every kind of name with small models and weights made here; errors are one line before any work."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

from curation.backbones import BackboneConfig, file_sha256, open_backbone, weights_digest, weights_file
from training.config import ConfigError, ModelConfig, TrainRecipe
from training.export import write_network
from training.models.network import Network

torch = pytest.importorskip("torch")
VIT = "test_vit"


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """Weights of timm's smallest ViT, classifier and all, as other people store them."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model(VIT, num_classes=7).state_dict(), str(path))
    return path


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), np.uint8)


def test_timm_equals_timm(vit, pictures):
    import timm

    backbone = open_backbone(BackboneConfig(name=f"timm:{VIT}", weights=str(vit), size_px=64, batch_size=4))
    model = timm.create_model(VIT, num_classes=0, img_size=64).eval()
    state = timm.models.load_state_dict(str(vit))
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, model), strict=False)
    own = timm.data.resolve_model_data_config(model)
    assert (backbone.mean, backbone.std) == (own["mean"], own["std"])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(own["mean"]).view(1, 3, 1, 1)) / torch.tensor(own["std"]).view(1, 3, 1, 1)
    with torch.inference_mode():
        wanted = model(pixels).numpy()
    features = backbone.embed(pictures)
    assert features.shape == (7, backbone.dim)
    np.testing.assert_allclose(features, wanted, atol=1e-5)


@pytest.mark.parametrize("pooling", ["model", "cls", "mean", "cls_mean"])
def test_a_row_does_not_depend_on_its_batch(vit, pictures, pooling):
    config = BackboneConfig(name=f"timm:{VIT}", weights=str(vit), size_px=64, pooling=pooling, batch_size=4)
    backbone = open_backbone(config)
    whole = backbone.embed(pictures)
    alone = np.concatenate([backbone.embed(pictures[i : i + 1]) for i in range(7)])
    turned = backbone.embed(pictures[::-1])[::-1]
    assert whole.tobytes() == alone.tobytes() == np.ascontiguousarray(turned).tobytes()
    assert backbone.embed(pictures[:0]).shape == (0, backbone.dim)


def test_open_clip_from_a_file(tmp_path, pictures):
    import open_clip

    tower = {"image_size": 64, "layers": 1, "width": 64, "patch_size": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    shape = {"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}
    (tmp_path / "lvd-tiny.json").write_text(json.dumps(shape))
    open_clip.add_model_config(tmp_path / "lvd-tiny.json")
    torch.manual_seed(1)
    model = open_clip.create_model("lvd-tiny").eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    config = BackboneConfig(name="open_clip:lvd-tiny/mine", weights=str(tmp_path / "clip.pt"), batch_size=3)
    backbone = open_backbone(config)
    assert (backbone.dim, backbone.size_px, backbone.mean) == (16, 64, open_clip.OPENAI_DATASET_MEAN)
    pixels = (pictures[:2].astype(np.float32) / 255 - np.array(backbone.mean)) / np.array(backbone.std)
    with torch.inference_mode():
        wanted = model.encode_image(torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(backbone.embed(pictures[:2]), wanted, atol=1e-5)
    assert open_backbone(config.model_copy(update={"size_px": 32})).size_px == 32


def test_checkpoint_of_our_trainer(tmp_path, pictures):
    import timm
    from safetensors.torch import save_file

    model = timm.create_model(VIT, num_classes=0, img_size=32).eval()
    path = tmp_path / "teacher.safetensors"
    save_file(model.state_dict(), str(path), metadata={"architecture": VIT, "img_size": "32"})
    backbone = open_backbone(BackboneConfig(name=f"checkpoint:{path}"))
    assert backbone.size_px == 32
    assert backbone.embed(pictures[:, :32, :32]).shape == (7, backbone.dim)
    save_file(model.state_dict(), str(path))
    with pytest.raises(ConfigError, match=r"embed.name: .*names no architecture"):
        open_backbone(BackboneConfig(name=f"checkpoint:{path}"))


def test_a_backbone_of_our_trainer_that_timm_cannot_build(tmp_path, pictures):
    data = {"parts": {"made": {"kind": "folder", "location": str(tmp_path)}}}
    config = ModelConfig(dim=32, depth=2, num_heads=2, patch_px=8, image_px=32, stem="conv", num_registers=1)
    values = {"name": "made", "run": str(tmp_path), "data": data, "model": config, "views": {"local_px": 32}}
    resolved = TrainRecipe.model_validate(values).resolved("pretrain")
    network = Network(resolved.model, resolved.objective, with_heads=False)
    write_network(tmp_path, dict(network.state_dict()), resolved)
    of = BackboneConfig(name=f"checkpoint:{tmp_path / 'teacher.safetensors'}", pooling="cls_mean")
    backbone = open_backbone(of)
    (tokens,) = network.backbone.eval()([torch.zeros(1, 3, 32, 32) - backbone._shift / backbone._scale])
    wanted = torch.cat([tokens.cls, tokens.patches.mean(1)], dim=1)
    np.testing.assert_allclose(backbone.embed(pictures[:1, :32, :32] * 0), wanted.detach().numpy(), atol=1e-5)


def test_script(tmp_path, pictures):
    path = tmp_path / "mean.pt"
    torch.jit.script(torch.nn.AdaptiveAvgPool2d(2)).save(str(path))
    backbone = open_backbone(BackboneConfig(name=f"script:{path}", size_px=64))
    assert backbone.embed(pictures).shape == (7, 12)


def test_square_of_a_picture(vit):
    backbone = open_backbone(BackboneConfig(name=f"timm:{VIT}", weights=str(vit), size_px=64))
    for height, width in ((64, 64), (288, 400), (500, 40), (10, 10)):
        assert backbone.prepare(np.zeros((height, width, 3), np.uint8)).shape == (64, 64, 3)


@pytest.mark.parametrize("shape", [(64, 64), (288, 288), (288, 400), (433, 288), (57, 91), (320, 40), (10, 10), (1, 7)])
def test_square_equals_the_cut_of_the_whole_resized(vit, shape):
    from PIL import Image

    backbone = open_backbone(BackboneConfig(name=f"timm:{VIT}", weights=str(vit), size_px=64))
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    scale = round(64 / backbone._crop_ratio) / min(shape)
    size = [max(64, round(side * scale)) for side in shape]
    top, left = ((side - 64) // 2 for side in size)
    whole = np.asarray(Image.fromarray(rgb).resize(size[::-1], Image.Resampling.BICUBIC))
    assert np.array_equal(backbone.prepare(rgb), whole[top : top + 64, left : left + 64])


@pytest.mark.parametrize("shape", [(2, 40_000), (40_000, 2), (1, 65_500)])
def test_a_thin_picture_needs_no_memory_and_shows_its_middle(vit, shape, monkeypatch):
    from PIL import Image

    sides = []
    resize = Image.Image.resize

    def seen(self, size, *args, **kwargs):
        sides.extend(size)
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", seen)
    backbone = open_backbone(BackboneConfig(name=f"timm:{VIT}", weights=str(vit), size_px=64))
    rgb = np.zeros((*shape, 3), np.uint8)
    rgb[tuple(slice(side // 2 - 30, side // 2 + 30) if side > 60 else slice(None) for side in shape)] = 200
    assert (backbone.prepare(rgb) == 200).all()
    assert max(sides) <= 9 * 80


def test_digest_is_of_the_bytes(vit, tmp_path):
    config = BackboneConfig(name=f"timm:{VIT}", weights=str(vit))
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(vit.read_bytes())
    assert weights_digest(config, "embed") == weights_digest(config.model_copy(update={"weights": str(copy)}), "embed")
    copy.write_bytes(vit.read_bytes() + b" ")
    assert weights_digest(config, "embed") != weights_digest(config.model_copy(update={"weights": str(copy)}), "embed")


def test_digest_of_a_file_that_changes_or_is_not_there(tmp_path):
    path = tmp_path / "weights"
    for data in (b"one", b"four"):
        path.write_bytes(data)
        assert file_sha256(path, key="k") == file_sha256(str(path), key="k") == hashlib.sha256(data).hexdigest()
    path.unlink()
    with pytest.raises(ConfigError, match=r"^descriptor.weights: got '.*weights', which cannot be read \(No such file"):
        file_sha256(path, key="descriptor.weights")


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet50", None, r"embed.name: got 'resnet50', allowed: hog-thumb, timm:NAME"),
        ("open_clip:ViT-B-32", None, r"embed.name: got 'open_clip:ViT-B-32', allowed: .*open_clip:NAME/TAG"),
        ("timm:vit_nowhere", None, r"embed.name: got 'timm:vit_nowhere'; timm .* has no model 'vit_nowhere'"),
        ("open_clip:No/tag", None, r"embed.name: got 'open_clip:No/tag'; open_clip has no model 'No'"),
        ("timm:resnet10t", "/none/w.pt", r"embed.weights: got '/none/w.pt', which is no file; give the path"),
        ("checkpoint:/none/t.st", None, r"embed.name: got '/none/t.st', which is no file"),
        ("timm:resnet10t", None, r"embed.weights: got none, and 'timm:resnet10t' is not in the cache .*hog-thumb"),
    ],
)
def test_bad_names_are_one_line_at_once(name, weights, message, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as caught:
        weights_file(BackboneConfig(name=name, weights=weights), "embed")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - started < 20


def test_weights_of_another_model_are_one_line(vit):
    with pytest.raises(ConfigError, match=r"embed.name: 'timm:resnet10t' cannot be opened with .*are not in it") as e:
        open_backbone(BackboneConfig(name="timm:resnet10t", weights=str(vit)))
    assert "\n" not in str(e.value)


def test_pooling_needs_tokens(tmp_path):
    import timm

    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "r.pt")
    config = BackboneConfig(name="timm:test_resnet", weights=str(tmp_path / "r.pt"), size_px=64, pooling="cls")
    with pytest.raises(ConfigError, match="it gives no tokens, so pooling 'cls' means nothing; allowed: model"):
        open_backbone(config)
