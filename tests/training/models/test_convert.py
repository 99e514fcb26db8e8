"""Weights in and out of other layouts."""

import json
import re
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training.models.golden import MADE, VALUES, config_of
from training.config import ConfigError, ModelConfig
from training.models.convert import (
    backbone_from_hf,
    backbone_to_hf,
    backbone_to_timm,
    check_exportable,
    load_backbone,
    timm_architecture,
)
from training.models.position import resize_positions
from training.models.timm_stem import timm_embed_layer
from training.models.vit import VisionTransformer

TINY: dict[str, Any] = {"dim": 24, "depth": 2, "num_heads": 3, "patch_px": 4, "image_px": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"arch": "vit_small", "image_px": 56},
    "small with four registers": {"arch": "vit_small", "image_px": 56, "num_registers": 4},
    "tiny with two registers": {"arch": "vit_tiny", "depth": 2, "patch_px": 16, "image_px": 64, "num_registers": 2},
    "own dims": TINY,
    "relu": TINY | {"activation": "relu"},
    "relu without LayerScale": TINY | {"activation": "relu", "layerscale": None, "num_registers": 1},
    "other ratio": TINY | {"mlp_ratio": 2.7},
    "swiglu": TINY | {"ffn": "swiglu"},
    "swiglu of another ratio": TINY | {"ffn": "swiglu", "mlp_ratio": 3.1, "dim": 21, "num_registers": 3},
    "swiglu without LayerScale": TINY | {"ffn": "swiglu", "layerscale": None, "activation": "relu"},
}
SHALLOW = [name for name, values in CONFIGS.items() if "depth" in values]
HF = [name for name in SHALLOW if float(CONFIGS[name].get("mlp_ratio", 4)).is_integer()]


def backbone(config: ModelConfig, seed: int = 0) -> VisionTransformer:
    """All its weights are noise."""
    model = VisionTransformer(config, attention="sdpa").eval()
    MADE["fill"](model, f"seed {seed}")
    return model


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]):
    assert sorted(first) == sorted(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# Released


@pytest.mark.parametrize(
    ("name", "values", "num_keys"),
    [
        ("vit_small", {"arch": "vit_small"}, 175),
        ("vit_small_reg4", {"arch": "vit_small", "num_registers": 4}, 176),
        ("vit_giant2", {"arch": "vit_giant2", "ffn": "swiglu"}, 567),
    ],
)
def test_names_and_shapes_are_those_of_released_models(name: str, values: dict[str, Any], num_keys: int):
    with torch.device("meta"):
        model = VisionTransformer(ModelConfig(image_px=518, **values))
    lines = sorted(f"{key} {tuple(tensor.shape)}" for key, tensor in model.state_dict().items())
    assert len(lines) == num_keys
    assert lines == VALUES[f"keys/{name}"].tolist()
    if name == "vit_giant2":
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1136.5e6, rel=1e-4)


def chunked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names that dinov2 gives blocks in chunks."""
    names = [line.split(" ")[0] for line in VALUES["keys/chunked"].tolist()]
    return {name: state[re.sub(r"blocks\.\d+\.(\d+)", r"blocks.\1", name)] for name in names}


@pytest.mark.parametrize("layout", ["flat", "model", "teacher", "chunked", "training checkpoint", "ours"])
def test_released_layouts_load_to_the_last_bit(layout: str):
    source, model = backbone(config_of("plain")), backbone(config_of("plain"), 1)
    state = state_of(source)
    within = {f"backbone.{name}": tensor for name, tensor in state.items()}
    heads = {"dino_head.mlp.0.weight": torch.zeros(2), "dino_head.last_layer.weight_g": torch.zeros(2)}
    teacher = {f"teacher.{name}": tensor for name, tensor in (within | heads).items()}
    student = {f"student.{name}": torch.zeros_like(tensor) for name, tensor in within.items()}
    given, unused = {
        "flat": (state, ()),
        "model": ({"model": state, "iteration": 7}, ()),
        "teacher": ({"teacher": {f"backbone.{name}": x for name, x in chunked(state).items()} | heads}, heads),
        "chunked": (chunked(state), ()),
        "training checkpoint": (
            {"model": student | teacher},
            [name for name in student | teacher if "s.b" not in name],
        ),
        "ours": (within | heads, heads),
    }[layout]
    report = load_backbone(model, given)
    assert_equal(state_of(model), state)
    assert (report.layout, report.missing, report.resized) == ("dinov2", (), None)
    if layout == "training checkpoint":
        assert len(report.unused) == len(student) + len(heads)
        assert "not used: " in str(report)
    else:
        assert report.unused == tuple(sorted(unused))


@pytest.mark.parametrize("pos_resize", ["offset", "size"])
def test_position_grid_is_resized_and_reported(pos_resize: str):
    source = backbone(config_of("plain", image_px=24, pos_resize=pos_resize))
    model = backbone(config_of("plain", pos_resize=pos_resize), 1)
    report = load_backbone(model, state_of(source))
    assert report.resized == (6, 4)
    assert str(report) == "backbone taken (dinov2 layout); position grid resized from 6 x 6 to 4 x 4"
    assert torch.equal(model.pos_embed, resize_positions(source.pos_embed, (4, 4), pos_resize))
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(source([images])[0].patches, model([images])[0].patches)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("plain", {"depth": 1}, r"the file has beside the model's 'blocks\.1\.attn\.proj\.bias' and 13 more"),
        ("plain", {"depth": 3}, r"the file lacks 'blocks\.2\.attn\.proj\.bias' and 13 more"),
        ("plain", {"layerscale": None}, r"has beside the model's 'blocks\.0\.ls1\.gamma' and 3 more"),
        ("plain", {"num_registers": 4}, r"lacks 'register_tokens'"),
        ("registers", {"num_registers": 4}, r"'register_tokens' is \(1, 3, 16\) in the file, \(1, 4, 16\) here"),
        ("plain", {"patch_px": 8}, r"'patch_embed\.proj\.weight' is \(16, 3, 4, 4\) in the file, \(16, 3, 8, 8\) here"),
        ("plain", {"ffn": "swiglu"}, r"lacks 'blocks\.0\.mlp\.w12\.bias' and 7 more"),
        ("bare", {"layerscale": 1.0}, r"lacks 'blocks\.0\.ls1\.gamma' and 3 more"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_taken(source: str, changes: dict, message: str):
    state = state_of(backbone(config_of(source)))
    model = backbone(config_of(source, **changes), 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        load_backbone(model, state)
    assert_equal(before, state_of(model))


def test_position_grid_that_is_not_square_is_refused():
    state = state_of(backbone(config_of("plain"))) | {"pos_embed": torch.zeros(1, 8, 16)}
    with pytest.raises(ConfigError, match="got 7 positions of patches; allowed: a square number"):
        load_backbone(backbone(config_of("plain")), state)


def test_file_of_something_else_is_refused():
    with pytest.raises(ConfigError, match="the file lacks 'blocks"):
        load_backbone(backbone(config_of("plain")), {"conv1.weight": torch.zeros(3)})


# timm


@pytest.mark.parametrize("name", CONFIGS)
def test_timm_builds_the_model_and_computes_the_same(name: str):
    config = ModelConfig(**CONFIGS[name])
    model = backbone(config)
    architecture, arguments = timm_architecture(config)
    theirs = timm.create_model(architecture, **json.loads(json.dumps(arguments)), dynamic_img_size=True).eval()
    theirs.load_state_dict(backbone_to_timm(state_of(model), config))
    images = torch.randn(2, 3, config.image_px, config.image_px)
    with torch.no_grad():
        tokens, expected = model([images])[0], theirs.forward_features(images)
        torch.testing.assert_close(theirs(images), expected[:, 0], atol=0, rtol=0)
    ours = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], dim=1)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SHALLOW)
def test_weights_come_back_from_timm_as_they_went(name: str):
    config = ModelConfig(**CONFIGS[name])
    source, model = backbone(config), backbone(config, 1)
    kept = model.mask_token.clone()
    theirs = backbone_to_timm(state_of(source), config)
    report = load_backbone(model, theirs)
    assert (report.layout, report.missing, report.unused) == ("timm", ("mask_token",), ())
    assert_equal(backbone_to_timm(state_of(model), config), theirs)
    assert torch.equal(model.mask_token, kept)
    if not config.num_registers:
        assert_equal(state_of(model) | {"mask_token": source.mask_token}, state_of(source))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"arch": "vit_small"}, "vit_small_patch14_dinov2"),
        ({"arch": "vit_base", "num_registers": 4}, "vit_base_patch14_reg4_dinov2"),
        ({"arch": "vit_large"}, "vit_large_patch14_dinov2"),
        ({"arch": "vit_base", "layerscale": None}, "vit_base_patch14_dinov2"),
        ({"arch": "vit_giant2", "ffn": "swiglu"}, "vit_giant_patch14_dinov2"),
        ({"arch": "vit_giant2", "ffn": "swiglu", "num_registers": 4}, "vit_giant_patch14_reg4_dinov2"),
        ({"arch": "vit_giant2"}, "vit_base_patch16_224"),
        ({"arch": "vit_huge", "num_registers": 4}, "vit_base_patch16_224"),
        ({"arch": "vit_large", "ffn": "swiglu"}, "vit_giant_patch14_dinov2"),
        ({"arch": "vit_large", "patch_px": 16}, "vit_base_patch16_224"),
    ],
)
def test_large_models_have_the_shapes_of_timm(values: dict[str, Any], expected: str):
    config = ModelConfig(**values)
    architecture, arguments = timm_architecture(config)
    assert architecture == expected
    with torch.device("meta"):
        ours = backbone_to_timm(VisionTransformer(config).state_dict(), config)
        theirs = timm.create_model(architecture, **arguments).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: x.shape for name, x in theirs.items()}


# Hugging Face


@pytest.mark.parametrize("name", HF)
def test_hugging_face_reads_the_files_and_computes_the_same(name: str, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = ModelConfig(**CONFIGS[name])
    model = backbone(config)
    theirs, about = backbone_to_hf(state_of(model), config)
    save_file(theirs, str(tmp_path / "model.safetensors"), {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(about))
    read, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(read).__name__ == about["architectures"][0]
    images = torch.randn(2, 3, config.image_px, config.image_px)
    with torch.no_grad():
        tokens, expected = model([images])[0], read.eval()(images).last_hidden_state
    ours = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], dim=1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)

    back = backbone(config, 1)
    read.save_pretrained(tmp_path / "again")
    report = load_backbone(back, load_file(str(tmp_path / "again" / "model.safetensors")))
    assert report.layout == "Hugging Face"
    assert_equal(state_of(back), state_of(model))


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_weights_come_back_from_hugging_face_as_they_went(name: str, prefix: str):
    config = ModelConfig(**CONFIGS[name])
    source, model = backbone(config), backbone(config, 1)
    theirs, _ = backbone_to_hf(state_of(source), config)
    wrapped = {prefix + key: tensor for key, tensor in theirs.items()} | {"classifier.weight": torch.zeros(2)}
    report = load_backbone(model, wrapped)
    assert (report.layout, report.missing, report.unused) == ("Hugging Face", (), ("classifier.weight",))
    assert_equal(state_of(model), state_of(source))


def test_gains_of_hugging_face_that_are_not_one_are_not_lost():
    config = ModelConfig(**TINY, layerscale=None)
    theirs, _ = backbone_to_hf(state_of(backbone(config)), config)
    theirs["encoder.layer.1.layer_scale2.lambda1"] = torch.full((24,), 0.5)
    with pytest.raises(ConfigError, match=r"has beside the model's 'blocks\.1\.ls2\.gamma'"):
        load_backbone(backbone(config, 1), theirs)


def test_a_part_of_the_projections_that_is_missing_is_noticed():
    config = ModelConfig(**TINY)
    theirs, _ = backbone_to_hf(state_of(backbone(config)), config)
    del theirs["encoder.layer.1.attention.attention.key.bias"]
    assert "blocks.1.attn.qkv.bias" not in backbone_from_hf(theirs)
    with pytest.raises(ConfigError, match=r"lacks 'blocks\.1\.attn\.qkv\.bias'"):
        load_backbone(backbone(config), theirs)


def test_ratio_that_hugging_face_does_not_take_is_refused():
    config = ModelConfig(**CONFIGS["other ratio"])
    with pytest.raises(ConfigError, match=r"model\.mlp_ratio 2\.7; allowed there: whole numbers"):
        backbone_to_hf(state_of(backbone(config)), config)


@pytest.mark.parametrize(("registers", "patch_px"), [(0, 8), (2, 16)])
def test_timm_computes_the_same_behind_our_convolutional_stem(registers: int, patch_px: int):
    config = ModelConfig(
        dim=64,
        depth=2,
        num_heads=2,
        patch_px=patch_px,
        image_px=48,
        stem="conv",
        num_registers=registers,
        layerscale=None,
    )
    model = backbone(config)
    architecture, arguments = timm_architecture(config)
    theirs = timm.create_model(
        architecture, **json.loads(json.dumps(arguments)), embed_layer=timm_embed_layer(64), dynamic_img_size=True
    ).eval()
    theirs.load_state_dict(backbone_to_timm(state_of(model), config))
    images = torch.randn(3, 3, 48, 48)
    with torch.inference_mode():
        (tokens,) = model([images])
        torch.testing.assert_close(theirs(images), tokens.cls, atol=1e-5, rtol=1e-5)
    again = VisionTransformer(config)
    load_backbone(again, theirs.state_dict())
    assert_equal(backbone_to_timm(state_of(again), config), backbone_to_timm(state_of(model), config))


@pytest.mark.parametrize("to", ["hf", "hub"])
def test_a_stem_that_others_cannot_build_is_refused(to: str):
    config = ModelConfig(dim=32, depth=1, num_heads=2, patch_px=8, image_px=32, stem="conv")
    with pytest.raises(ConfigError, match=rf"export to {to}: model\.stem 'conv'; allowed there: linear"):
        check_exportable(config, to)
