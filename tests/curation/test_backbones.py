"""Backbones: every kind of name with small models and weights made here; errors are one line before any work."""

import json
from pathlib import Path

import numpy as np
import pytest

from curation.backbones import BackboneConfig, open_backbone
from curation.outline import backbone_facts
from training.config import ConfigError, TrainRecipe
from training.export import export, read_network, write_network
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


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """What scikit-image installs, in several shapes."""
    import skimage.data

    return [skimage.data.astronaut()[:300], skimage.data.coffee()[:, 100:300], skimage.data.chelsea()]


def normalised(pictures: np.ndarray, preparation) -> "torch.Tensor":
    """uint8 [N, H, W, 3] to float [N, 3, H, W]."""
    pixels = (pictures.astype(np.float32) / 255 - np.float32(preparation.mean)) / np.float32(preparation.std)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, 3, 1)))


def test_timm_equals_timm(vit, photographs):
    import timm
    from PIL import Image

    backbone = open_backbone(BackboneConfig(name=f"timm:{VIT}", weights=str(vit), batch_size=4))
    model = timm.create_model(VIT, num_classes=0, checkpoint_path="").eval()
    model.load_state_dict({k: v for k, v in timm.models.load_state_dict(str(vit)).items() if "head" not in k})
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        wanted = model(torch.stack([transform(Image.fromarray(rgb)) for rgb in photographs])).numpy()
    features = backbone.embed(np.stack([backbone.prepare(rgb) for rgb in photographs]))
    assert features.shape == (len(photographs), backbone.dim)
    np.testing.assert_allclose(features, wanted, atol=1e-5)


def test_timm_at_another_size_resamples_its_positions(vit, pictures):
    import timm

    backbone = open_backbone(BackboneConfig(name=f"timm:{VIT}", weights=str(vit), size_px=64, batch_size=4))
    model = timm.create_model(VIT, num_classes=0, img_size=64).eval()
    state = timm.models.load_state_dict(str(vit))
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, model), strict=False)
    with torch.inference_mode():
        wanted = model(normalised(pictures, backbone.preparation)).numpy()
    np.testing.assert_allclose(backbone.embed(pictures), wanted, atol=1e-5)


def test_timm_pools_tokens_as_its_own_heads_do(tmp_path, pictures):
    """eva02 has its norm behind the pooling, reg4 has registers before the patches, gap has no class token."""
    import timm

    small = {"num_classes": 0, "img_size": 32}
    for name, own in (("eva02_tiny_patch14_224", "mean"), ("vit_wee_patch16_reg1_gap_256", "mean"), (VIT, "cls")):
        torch.manual_seed(0)
        size = 28 if "patch14" in name else 32
        model = timm.create_model(name, **(small | {"img_size": size})).eval()
        torch.save(model.state_dict(), tmp_path / "w.pt")
        given = {"name": f"timm:{name}", "weights": str(tmp_path / "w.pt"), "size_px": size}
        found = open_backbone(BackboneConfig(**given, pooling=own)).embed(pictures[:2, :size, :size])
        np.testing.assert_allclose(
            found, open_backbone(BackboneConfig(**given)).embed(pictures[:2, :size, :size]), atol=1e-5
        )
        if "gap" in name:
            with pytest.raises(ConfigError, match="it has no class token, so pooling 'cls_mean' means nothing"):
                open_backbone(BackboneConfig(**given, pooling="cls_mean"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("pooling", ["model", "cls", "mean", "cls_mean"])
def test_a_row_does_not_depend_on_its_batch(vit, pictures, pooling, precision):
    config = BackboneConfig(
        name=f"timm:{VIT}", weights=str(vit), size_px=64, pooling=pooling, precision=precision, batch_size=4
    )
    backbone = open_backbone(config)
    whole = backbone.embed(pictures)
    alone = np.concatenate([backbone.embed(pictures[i : i + 1]) for i in range(7)])
    turned = backbone.embed(pictures[::-1])[::-1]
    assert whole.tobytes() == alone.tobytes() == np.ascontiguousarray(turned).tobytes()
    assert backbone.embed(pictures[:0]).shape == (0, backbone.dim)


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.9995), ("fp16", 0.99999)])
def test_half_precision_gives_nearly_the_same_direction(vit, photographs, precision, least):
    given = {"name": f"timm:{VIT}", "weights": str(vit), "batch_size": 3}
    full, half = (open_backbone(BackboneConfig(**given, precision=p)) for p in ("fp32", precision))
    squares = np.stack([full.prepare(rgb) for rgb in photographs])
    a, b = full.embed(squares), half.embed(squares)
    assert not np.array_equal(a, b)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > least


def test_a_feature_that_is_no_number_is_an_error_before_it_is_stored(vit, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(str(vit))
    state["norm.bias"][3] = float("inf")
    save_file(state, str(tmp_path / "w.safetensors"))
    with pytest.raises(ConfigError, match=r"gives features that are no finite numbers in fp32; allowed: .*that are"):
        open_backbone(BackboneConfig(name=f"timm:{VIT}", weights=str(tmp_path / "w.safetensors")))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[str, Path]:
    """An open_clip model of a few weights, and a file of them."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    tower = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    shape = {"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}
    (folder / "lvd-tiny.json").write_text(json.dumps(shape))
    (folder / "lvd-tiny-rn.json").write_text(
        json.dumps(shape | {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}})
    )
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    torch.save(open_clip.create_model("lvd-tiny").state_dict(), folder / "clip.pt")
    torch.save(open_clip.create_model("lvd-tiny-rn").state_dict(), folder / "rn.pt")
    return "lvd-tiny", folder / "clip.pt"


def test_open_clip_equals_open_clip(clip, photographs):
    import open_clip
    from PIL import Image

    name, path = clip
    backbone = open_backbone(BackboneConfig(name=f"open_clip:{name}/mine", weights=str(path), batch_size=3))
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=str(path))
    assert (backbone.dim, backbone.size_px) == (16, 64)
    with torch.inference_mode():
        wanted = model.eval().encode_image(torch.stack([transform(Image.fromarray(rgb)) for rgb in photographs]))
    found = backbone.embed(np.stack([backbone.prepare(rgb) for rgb in photographs]))
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_open_clip_at_another_size(clip):
    name, path = clip
    assert open_backbone(BackboneConfig(name=f"open_clip:{name}/mine", weights=str(path), size_px=32)).size_px == 32


def test_open_clip_pools_the_tokens_before_its_projection(clip, pictures):
    name, path = clip
    given = {"name": f"open_clip:{name}/mine", "weights": str(path)}
    parts = {p: open_backbone(BackboneConfig(**given, pooling=p)) for p in ("model", "cls", "mean", "cls_mean")}
    found = {p: backbone.embed(pictures[:2]) for p, backbone in parts.items()}
    told = {p: backbone_facts(BackboneConfig(**given, pooling=p)).dim for p in parts}
    assert told == {p: backbone.dim for p, backbone in parts.items()}
    assert {p: backbone.dim for p, backbone in parts.items()} == {"model": 16, "cls": 64, "mean": 64, "cls_mean": 128}
    tower = parts["model"]._model
    np.testing.assert_allclose(found["cls"] @ tower.proj.detach().numpy(), found["model"], atol=1e-5)
    tower.output_tokens = True  # the patches behind the last norm, as its own contrastive captioners have them
    with torch.inference_mode():
        patches = tower(normalised(pictures[:2], parts["model"].preparation))[1]
    np.testing.assert_allclose(found["mean"], patches.mean(1).numpy(), atol=1e-5)
    np.testing.assert_array_equal(parts["model"].embed(pictures[:2]), found["model"])  # of a pair, the features
    halves = [half / np.linalg.norm(half, axis=1, keepdims=True) for half in (found["cls"], found["mean"])]
    np.testing.assert_allclose(found["cls_mean"], np.concatenate(halves, 1), atol=1e-6)
    rn = BackboneConfig(name="open_clip:lvd-tiny-rn/mine", weights=str(path.with_name("rn.pt")), pooling="cls")
    with pytest.raises(ConfigError, match="it gives no tokens, so there is nothing to pool; allowed: pooling=model"):
        open_backbone(rn)


def test_a_tag_that_open_clip_does_not_know_is_refused(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"got 'open_clip:ViT-B-32/opanai'; a tag says .*for ViT-B-32: openai, "):
        open_backbone(BackboneConfig(name="open_clip:ViT-B-32/opanai", weights=str(tmp_path / "w.pt")))


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


def written(folder: Path, **model) -> Path:
    """A network of the trainer with weights at random, written as a stage ends."""
    data = {"parts": {"made": {"kind": "folder", "location": str(folder)}}}
    shape = {"dim": 32, "depth": 2, "num_heads": 2, "patch_px": 8, "image_px": 32} | model
    views = {"global_px": 32, "local_px": 16, "mean": (0.4, 0.5, 0.6)}
    values = {"name": "made", "run": str(folder), "data": data, "model": shape, "views": views}
    resolved = TrainRecipe.model_validate(values).resolved("pretrain")
    torch.manual_seed(0)
    network = Network(resolved.model, resolved.objective, with_heads=False)
    for tensor in network.parameters():
        torch.nn.init.normal_(tensor, std=0.1)
    write_network(folder, dict(network.state_dict()), resolved)
    return folder / "network.safetensors"


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("num_registers", [0, 2])
def test_a_network_of_our_trainer_by_three_names(tmp_path, pictures, stem, num_registers):
    """teacher, network, and the file for timm: with every pooling what the network itself gives."""
    path = written(tmp_path, stem=stem, num_registers=num_registers)
    export(path, "timm", tmp_path / "timm.safetensors")
    names = [{"name": f"checkpoint:{tmp_path / file}.safetensors"} for file in ("teacher", "network")]
    names += [{"name": "timm:vit_base_patch16_224", "weights": str(tmp_path / "timm.safetensors")}]
    backbone = read_network(path, with_heads=False).network.backbone.eval()
    with torch.inference_mode():
        preparation = open_backbone(BackboneConfig(**names[0])).preparation
        (tokens,) = backbone([normalised(pictures[:2, :32, :32], preparation)])
    cls, mean = tokens.cls, tokens.patches.mean(1)
    joined = torch.cat([torch.nn.functional.normalize(part, dim=1) for part in (cls, mean)], 1)
    for given in names:
        for pooling, wanted in {"model": cls, "cls": cls, "mean": mean, "cls_mean": joined}.items():
            config = BackboneConfig(**given, pooling=pooling)
            found, facts = open_backbone(config), backbone_facts(config)
            assert (facts.dim, facts.takes) == (found.dim, "32 px")
            assert (found.preparation.mean, found.size_px, found.preparation.resize_px) == ((0.4, 0.5, 0.6), 32, 37)
            np.testing.assert_allclose(found.embed(pictures[:2, :32, :32]), wanted.numpy(), atol=2e-5)


@pytest.mark.parametrize(("stem", "way"), [("linear", "timm:vit_base_patch16_224"), ("conv", "checkpoint:PATH, or")])
def test_a_file_of_our_trainer_under_the_name_of_another_model_is_refused_before_work(tmp_path, stem, way):
    weights = written(tmp_path, stem=stem).with_name("teacher.safetensors")
    config = BackboneConfig(name="timm:vit_tiny_patch16_224", weights=str(weights))
    for do in (backbone_facts, open_backbone):
        with pytest.raises(ConfigError, match=f"written by our trainer for another model; allowed: {way}"):
            do(config)


def test_script(tmp_path, photographs):
    path = tmp_path / "mean.pt"
    torch.jit.script(torch.nn.AdaptiveAvgPool2d(2)).save(str(path))
    name = f"script:{path}"
    backbone = open_backbone(BackboneConfig(name=name))
    assert (backbone.dim, backbone.size_px, backbone.preparation.resize_px) == (12, 224, 256)
    own = {"size_px": 32, "resize_px": 40, "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 4.0)}
    backbone = open_backbone(BackboneConfig(name=name, **own))
    squares = np.stack([backbone.prepare(rgb) for rgb in photographs])
    assert squares.shape == (3, 32, 32, 3)
    means = (squares / 255).reshape(3, 2, 16, 2, 16, 3).mean((2, 4))  # [3, 2, 2, 3]
    wanted = (means - np.array(own["mean"])) / np.array(own["std"])
    np.testing.assert_allclose(backbone.embed(squares), np.moveaxis(wanted, 3, 1).reshape(3, 12), atol=1e-5)
    with pytest.raises(ConfigError, match="resize_px 30: the square of 32 px is cut out of what is resized"):
        open_backbone(BackboneConfig(name=name, size_px=32, resize_px=30))


def test_weights_of_another_model_are_one_line(vit):
    with pytest.raises(ConfigError, match=r"embed.name: 'timm:resnet10t' cannot be opened with .*are not in it") as e:
        open_backbone(BackboneConfig(name="timm:resnet10t", weights=str(vit)))
    assert "\n" not in str(e.value)


def test_pooling_needs_tokens(tmp_path):
    import timm

    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "r.pt")
    config = BackboneConfig(name="timm:test_resnet", weights=str(tmp_path / "r.pt"), size_px=64, pooling="cls")
    with pytest.raises(ConfigError, match="it gives no tokens, so there is nothing to pool; allowed: pooling=model"):
        open_backbone(config)
