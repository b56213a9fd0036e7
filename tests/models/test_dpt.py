"""DINOv2 and DPT: sizes, position embeddings, memory, and methods' operations between features and logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import golden_cases as golden
from stpp.inference import choose
from stpp.models import dinov2
from stpp.models.build import BACKBONES, NETWORKS, build_model
from stpp.models.dpt import Fusion
from stpp.models.layers import upsample
from stpp.models.network import Network


def small(**settings) -> Network:
    return golden.filled(build_model("dpt", "dinov2-small", 5, **settings)).float()


@pytest.fixture(scope="module")
def network() -> Network:
    return small().eval()


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 80), columns=st.integers(1, 80))
def test_position_embeddings_follow_the_published_rule(rows, columns):
    """The oracle: PyTorch's bicubic interpolation in float32 with the scale that the published code uses."""
    trained = golden.waves("pos_embed", (1, 37, 37, 6)).float()
    scales = ((rows + 0.1) / 37, (columns + 0.1) / 37)
    expected = F.interpolate(trained.permute(0, 3, 1, 2), scale_factor=scales, mode="bicubic").permute(
        0, 2, 3, 1
    )
    if rows == columns == 37:
        expected = trained
    holder = type("Holder", (), {"pos_embed": torch.cat([torch.ones(1, 1, 6), trained.flatten(1, 2)], 1)})
    found = dinov2.DINOv2._positions(holder, rows, columns)
    torch.testing.assert_close(found, expected.flatten(1, 2), rtol=0, atol=1e-6)
    surplus = dinov2._surplus(rows, columns, torch.device("cpu"))
    assert surplus.item() == pytest.approx(0.0 if rows == columns == 37 else 0.1)
    for size in (rows, columns) if surplus else ():  # the computation of exported graphs
        by_formula = dinov2.cubic_matrix(size, surplus)
        published = dinov2.published_matrix(size, torch.device("cpu"))
        torch.testing.assert_close(by_formula, published, rtol=0, atol=1e-5)
    assert torch.equal(dinov2.cubic_matrix(37, torch.zeros(())), torch.eye(37))


def test_sides_are_rounded_to_a_multiple_only_in_evaluation(network):
    images_NCHW = golden.waves(
        "input", (1, 3, 48, 77)
    ).float()  # 48 is nearest to 42, 77 lies between 70 and 84: up
    with torch.no_grad():
        maps = network.features(images_NCHW)
        expected = network.backbone(upsample(images_NCHW, (42, 84)))
    assert [tuple(each.shape) for each in maps] == [(1, 384, 3, 6)] * 4
    assert all(torch.equal(found, each) for found, each in zip(maps, expected, strict=True))
    assert network.decode(*maps).shape == (1, 5, 24, 48)
    for side, patches in ((1, 1), (6, 1), (20, 1), (21, 2), (34, 2), (35, 3)):
        assert patches == max(1, int(side / 14 + 0.5))  # the public evaluation's rule
        with torch.no_grad():
            assert network.features(torch.zeros(1, 3, side, 14))[0].shape[2:] == (patches, 1)
    with pytest.raises(
        ValueError, match=r"\(48, 77\) pixels do not divide into patches of 14; train on crops of \(42, 84\)"
    ):
        small().train().features(images_NCHW)


def test_activation_checkpointing_keeps_logits_and_gradients():
    images_NCHW = golden.waves("input", (2, 3, 42, 56)).float()
    results, calls = [], []
    for checkpointed in (False, True):
        made = small(checkpoint_activations=checkpointed).train()
        made.backbone.blocks[3].mlp.register_forward_hook(lambda *_: calls.append(1))
        logits = made(images_NCHW)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in made.parameters() if p.requires_grad)])
    assert len(calls) == 1 + 2, "the inside of a block is computed once, and twice where it was not kept"
    for kept, computed in zip(*results, strict=True):
        torch.testing.assert_close(computed, kept, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="--model.checkpoint-activations: resnet18 has no such setting"):
        build_model("deeplabv3plus", "resnet18", 5, checkpoint_activations=True)


def test_fusion_before_upsampling_equals_fusion_after_it():
    fusion = golden.filled(Fusion(6))
    coarse, fine = golden.waves("coarse", (2, 6, 5, 7)), golden.waves("fine", (2, 6, 5, 7))

    def unit(name, x):
        part = fusion.get_submodule(name)
        return x + part.conv2(part.conv1(x.relu()).relu())

    expected = fusion.out_conv(upsample(unit("resConfUnit2", coarse + unit("resConfUnit1", fine)), (10, 14)))
    torch.testing.assert_close(fusion(coarse, fine, (10, 14)), expected, rtol=1e-12, atol=1e-12)


def test_every_parameter_that_takes_a_gradient_gets_one():
    made = small().train()
    made(golden.waves("input", (2, 3, 42, 56)).float()).square().mean().backward()
    without = {key for key, value in made.named_parameters() if value.grad is None or not value.grad.any()}
    unit = "head.scratch.refinenet4.resConfUnit1."
    unused = {unit + f"conv{i}.{part}" for i in (1, 2) for part in ("weight", "bias")} | {
        "backbone.mask_token"
    }
    assert without == unused == {key for key, value in made.named_parameters() if not value.requires_grad}


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_keeps_logits_near_those_of_float32(network, dtype):
    images_NCHW = golden.waves("input", (1, 3, 70, 98)).float()
    with torch.no_grad():
        expected = network(images_NCHW)
        with torch.autocast("cpu", dtype):
            found = network(images_NCHW)
        assert found.dtype == dtype
        assert (found.float() - expected).norm() < 0.1 * expected.norm()


PAIRS = [(name, backbone) for name in NETWORKS for backbone in NETWORKS[name].backbones]


@pytest.mark.parametrize("name, backbone", PAIRS)
def test_every_network_decodes_its_features(name, backbone):
    """Checks shapes only; and that the strides and channels that a backbone declares are those of its
    maps."""
    with torch.device("meta"):
        made = build_model(name, backbone, 6).eval()
        images_NCHW = torch.empty(2, 3, 84, 112)
        for module in made.modules():
            if hasattr(module, "fused"):
                module.fused = False
        encoded = made.backbone(images_NCHW)
        maps = made.features(images_NCHW)
        logits = made.decode(*maps)
        assert logits.shape == made(images_NCHW).shape and logits.shape[:2] == (2, 6)
        assert (
            made.decode(*(each * torch.empty(2, each.shape[1], 1, 1) for each in maps)).shape == logits.shape
        )
    assert tuple(each.shape[1] for each in encoded) == made.backbone.channels
    for stride, each in zip(made.backbone.strides, encoded, strict=True):
        assert tuple(each.shape[2:]) == (-(-84 // stride), -(-112 // stride))
    assert made.get_submodule(made.classifier_name) is not None and backbone in BACKBONES


def test_configuration_knows_every_name():
    from typing import get_args, get_type_hints

    from stpp.config import ModelConfig

    hints = get_type_hints(ModelConfig)
    assert get_args(hints["name"]) == tuple(NETWORKS) and set(get_args(hints["backbone"])) == set(BACKBONES)
    assert {backbone for _, backbone in PAIRS} == set(BACKBONES)


def test_work_estimate_includes_linear_layers_and_attention():
    """The choice of a compiler depends on it. 93 GFLOP of the encoder and 20 of the head at 518 pixels were
    counted separately."""
    flop = choose.flop_per_px(build_model("dpt", "dinov2-small", 21), side=518) * 518**2
    assert flop == pytest.approx(93e9 + 20e9, rel=0.02)


@pytest.mark.parametrize("size, encoder, head", [("small", 22.057, 2.739), ("base", 86.580, 10.948),
                                                 ("large", 304.369, 31.211)])
def test_crop_of_518_has_the_published_grids_and_parameters(size, encoder, head):
    with torch.device("meta"):
        made = build_model("dpt", f"dinov2-{size}", 21).eval()
        maps = made.features(torch.empty(1, 3, 518, 518))
        assert [tuple(each.shape[2:]) for each in maps] == [(37, 37)] * 4
        assert tuple(made.decode(*maps).shape) == (1, 21, 296, 296)
    for part, millions in ((made.backbone, encoder), (made.head, head)):
        assert round(sum(parameter.numel() for parameter in part.parameters()) / 1e6, 3) == millions


def test_giant_has_the_published_size():
    with torch.device("meta"):
        encoder = build_model("dpt", "dinov2-giant", 21).backbone
    assert encoder.blocks[0].mlp.w12.weight.shape == (8192, 1536) and encoder.blocks[
        0
    ].mlp.w3.weight.shape == (1536, 4096)
    assert round(sum(parameter.numel() for parameter in encoder.parameters()) / 1e6) == 1136


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_patches_are_embedded_right_in_bfloat16(layout, autocast):
    """PyTorch's convolution is wrong in half of the calls on AMX."""
    torch.manual_seed(0)
    embedding = dinov2.PatchEmbedding(384)
    for rows, columns in ((1, 1), (3, 5), (19, 19), (6, 1)):
        x = torch.randn(2, 3, 14 * rows, 14 * columns).contiguous(memory_format=layout)
        expected = embedding(x)
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                found = embedding(x)
        else:
            found = copy.deepcopy(embedding).bfloat16()(x.bfloat16())
        assert found.dtype == torch.bfloat16 and found.shape == expected.shape == (2, rows * columns, 384)
        assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()
        if autocast:
            gradient, truth = (torch.autograd.grad(each.float().square().sum(), embedding.proj.weight)[0]
                               for each in (found, expected))
            assert (gradient - truth).norm() < 0.03 * truth.norm()
