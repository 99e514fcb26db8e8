"""The backbone against dinov2 and timm, and what packing, compilation, sharding and half precision leave of it."""

import copy
import itertools

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor

from tests.training.models.golden import MADE, VALUES, config_of, golden
from training.config import ModelConfig
from training.models.convert import backbone_to_timm
from training.models.vit import Tokens, VisionTransformer

BACKBONES = list(MADE["BACKBONES"])
CROPS, MASKS = MADE["crops"]()


def backbone(name: str, attention: str = "auto", **changes) -> VisionTransformer:
    """A backbone of the golden run with its weights."""
    model = VisionTransformer(config_of(name, **changes), attention=attention)
    MADE["fill"](model, name)
    return model


def parts_of(outputs: list[Tokens]) -> list[Tensor]:
    return [part for tokens in outputs for part in tokens]


def assert_same(first: list[Tokens], second: list[Tokens], atol: float):
    for one, other in zip(parts_of(first), parts_of(second), strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("name", BACKBONES)
def test_tokens_and_gradients_are_those_of_dinov2(name: str, attention: str):
    model = backbone(name, attention)
    outputs = model(CROPS, MASKS)
    for i, tokens in enumerate(outputs):
        for kind in Tokens._fields:
            torch.testing.assert_close(getattr(tokens, kind), golden(f"{name}/{i}/{kind}"), atol=1e-5, rtol=0)
    MADE["readout"](parts_of(outputs)).backward()
    ours = MADE["gradients"](model, name)
    assert set(ours) == {key for key in VALUES if key.startswith(f"{name}/grad/")}
    for key, gradient in ours.items():
        torch.testing.assert_close(torch.from_numpy(gradient), golden(key), atol=5e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", BACKBONES)
def test_intermediate_blocks_are_those_of_dinov2(name: str):
    model = backbone(name)
    deep, last = model.intermediate(CROPS[1], 2)
    torch.testing.assert_close(deep.cls, golden(f"{name}/deep_cls"), atol=1e-5, rtol=0)
    torch.testing.assert_close(deep.patches, golden(f"{name}/deep_patches"), atol=1e-5, rtol=0)
    assert_same([last], model([CROPS[1]]), 0)


@pytest.mark.parametrize("num", [0, 3])
def test_more_blocks_than_there_are_is_an_error(num: int):
    with pytest.raises(ValueError, match=f"num_blocks: got {num}; allowed: 1 to 2"):
        backbone("plain").intermediate(CROPS[0], num)


@pytest.mark.parametrize("num_registers", [0, 4])
def test_small_model_at_518_equals_that_of_timm_to_the_last_bit(num_registers: int):
    registers = "_reg4" if num_registers else ""
    config = ModelConfig(
        arch="vit_small",
        image_px=518,
        num_registers=num_registers,
        layerscale=0.5,
        pos_resize="size" if num_registers else "offset",
    )
    torch.manual_seed(0)
    ours = VisionTransformer(config, attention="sdpa").eval()
    with torch.device("meta"):
        theirs = timm.create_model(f"vit_small_patch14{registers}_dinov2").eval()
    theirs.load_state_dict(backbone_to_timm(ours.state_dict(), config), assign=True)
    images = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        tokens, expected = ours([images])[0], theirs.forward_features(images)
    assert torch.equal(tokens.cls, expected[:, 0])
    assert torch.equal(tokens.registers, expected[:, 1 : 1 + num_registers])
    assert torch.equal(tokens.patches, expected[:, 1 + num_registers :])


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
def test_packed_groups_come_out_as_each_alone(attention: str):
    model = backbone("registers", attention)
    packed = model(CROPS, MASKS)
    alone = [model([crops], [mask])[0] for crops, mask in zip(CROPS, MASKS, strict=True)]
    assert_same(packed, alone, 1e-5)


def test_packed_groups_come_out_as_each_alone_in_half_precision():
    model = backbone("registers")
    with torch.autocast("cpu", torch.bfloat16):
        packed = model(CROPS, MASKS)
        alone = [model([crops], [mask])[0] for crops, mask in zip(CROPS, MASKS, strict=True)]
    assert_same(packed, alone, 2e-2)


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("name", BACKBONES)
def test_half_precision_stays_near_full_precision_and_trains(name: str, attention: str):
    model = backbone(name, attention, drop_path=0.4)
    expected = model.eval()(CROPS, MASKS)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(CROPS, MASKS)
        assert_same([Tokens(*(part.float() for part in tokens)) for tokens in outputs], expected, 0.05)
        MADE["readout"](parts_of(model.train()(CROPS, MASKS))).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("name", BACKBONES)
def test_wanted_patches_are_those_of_all_tokens_and_so_are_gradients(name: str, drop_path: float):
    model = backbone(name, drop_path=drop_path)
    pruned = copy.deepcopy(model)
    indices = MASKS[0].flatten().nonzero().flatten()
    torch.manual_seed(0)
    full = model(CROPS, MASKS)
    torch.manual_seed(0)
    spared = pruned(CROPS, MASKS, wanted=indices)
    expected = [full[0].patches.flatten(0, 1)[indices], *(tokens.cls for tokens in full)]
    found = [spared[0].patches, *(tokens.cls for tokens in spared)]
    assert all(not tokens.registers.numel() for tokens in spared)
    assert not spared[1].patches.numel()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    MADE["readout"](expected).backward()
    MADE["readout"](found).backward()
    for (key, parameter), other in zip(model.named_parameters(), pruned.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, atol=5e-5, rtol=1e-5, msg=key)


def test_no_wanted_patch_leaves_class_tokens():
    model = backbone("registers").eval()
    none = torch.zeros(0, dtype=torch.int64)
    full, spared = model(CROPS), model(CROPS, wanted=none)
    assert spared[0].patches.shape == (0, MADE["DIM"])
    for one, other in zip(spared, full, strict=True):
        torch.testing.assert_close(one.cls, other.cls, atol=1e-5, rtol=0)


def test_hidden_patches_do_not_matter_but_their_places_do():
    model = backbone("plain")
    other = [crops + 10 * mask_px(mask, crops) for crops, mask in zip(CROPS, MASKS, strict=True)]
    assert_same(model(CROPS, MASKS), model(other, MASKS), 1e-6)
    every = torch.ones_like(MASKS[0])
    tokens = model([CROPS[0]], [every])[0]
    assert (tokens.patches[:, 0] - tokens.patches[:, 1]).abs().max() > 0.1


def mask_px(mask: Tensor, crops: Tensor) -> Tensor:
    """Masks [C, N] as pixels [C, 1, H, W]."""
    side = MADE["PATCH_PX"]
    grid = mask.view(len(mask), 1, crops.shape[2] // side, crops.shape[3] // side).float()
    return grid.repeat_interleave(side, 2).repeat_interleave(side, 3)


def test_side_that_is_no_multiple_of_the_patch_is_an_error():
    with pytest.raises(ValueError, match="got 16 x 18 px; allowed: multiples of the patch, 4 px"):
        backbone("plain")([torch.zeros(1, 3, 16, 18)])


def test_a_mask_too_few_is_an_error():
    with pytest.raises(ValueError, match="got 1 for 2 groups of crops"):
        backbone("plain")(CROPS, [None])


STEM = ModelConfig(dim=32, depth=1, num_heads=2, patch_px=16, image_px=64, stem="conv")


def test_a_convolutional_stem_gives_the_same_grid_for_each_crop_alone():
    model = VisionTransformer(STEM)
    MADE["fill"](model, "stem")
    images = torch.rand(2, 3, 32, 64)
    (tokens,) = model([images])
    assert tokens.patches.shape == (2, 2 * 4, 32)
    (alone,) = model([images[1:]])
    torch.testing.assert_close(tokens.patches[1:], alone.patches)
    first = model.patch_embed(images).unflatten(1, (2, 4))
    images[:, :, :, 48:] = 0  # the last column of patches
    moved = (model.patch_embed(images).unflatten(1, (2, 4)) - first).abs().amax((0, 1, 3))
    assert 0 < moved[0] < moved[2] < moved[3]  # through norms; through convolutions too; itself


@pytest.mark.parametrize("values", [{"dim": 48}, {"patch_px": 4}])
def test_a_stem_that_does_not_fit_is_refused(values: dict[str, int]):
    with pytest.raises(ValueError, match="stem 'conv' needs a dim that is a multiple of 32"):
        ModelConfig(**(STEM.model_dump() | values))


@pytest.mark.parametrize("config", [config_of("registers"), STEM])
def test_weights_drawn_after_the_meta_device_are_those_drawn_before(config: ModelConfig):
    expected = VisionTransformer(config)
    torch.manual_seed(3)
    expected.init_weights()
    with torch.device("meta"):
        model = VisionTransformer(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(3)
    model.init_weights()
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_initial_weights_have_the_spread_of_dinov2():
    model = VisionTransformer(ModelConfig(arch="vit_tiny", depth=1, num_registers=2, layerscale=1e-5))
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert 0 < model.cls_token.abs().max() < 1e-5
    assert 0 < model.register_tokens.abs().max() < 1e-5
    assert not model.mask_token.any()
    assert (model.blocks[0].ls1.gamma == 1e-5).all()


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_each_block_compiles_as_one_graph_and_computes_the_same(drop_path: float):
    model = backbone("registers", depth=1, drop_path=drop_path)
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    results = []
    for each in (model, compiled):
        torch.manual_seed(0)
        outputs = each(CROPS, MASKS)
        MADE["readout"](parts_of(outputs)).backward()
        results.append(outputs)
    assert_same(*results, atol=1e-5)
    for parameter, other in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-4, rtol=1e-4)
    for wanted in (torch.tensor([2, 0, 3]), torch.tensor([1]), torch.arange(5)):
        pair = []
        for each in (model, compiled):
            torch.manual_seed(0)
            pair.append(each(CROPS, MASKS, wanted=wanted))
        assert_same(*pair, atol=1e-5)


def test_activation_checkpointing_draws_the_same_subsets_again():
    from torch.distributed._composable import checkpoint

    model = backbone("plain", drop_path=0.4)
    saving = copy.deepcopy(model)
    for block in saving.blocks:
        checkpoint(block)
    for each in (model, saving):
        torch.manual_seed(0)
        MADE["readout"](parts_of(each(CROPS, MASKS))).backward()
    for parameter, other in zip(model.parameters(), saving.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_blocks_compute_the_same(mesh):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = backbone("registers")
    sharded = copy.deepcopy(model)
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    register_fsdp_forward_method(sharded, "intermediate")
    for _, each in itertools.product(range(2), (model, sharded)):  # the second pass finds everything resharded
        each.zero_grad()
        MADE["readout"](parts_of(each(CROPS, MASKS))).backward()
    for (name, parameter), other in zip(model.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(other.grad.full_tensor(), parameter.grad, atol=1e-5, rtol=1e-5, msg=name)
    assert_same(model.intermediate(CROPS[0], 2), sharded.intermediate(CROPS[0], 2), 1e-6)
    wanted = torch.tensor([1, 5])
    assert_same(model(CROPS, MASKS, wanted=wanted), sharded(CROPS, MASKS, wanted=wanted), 1e-6)
