"""Networks as a whole: keys, sizes, modes, formats, precisions, tracing. Their arithmetic:
test_model_blocks.py."""

import copy
import functools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from stpp.models.build import NETWORKS, build_model, parameter_groups
from stpp.models.layers import DilatedConv3x3
from stpp.models.resnet import VARIANTS

STATE_DICTS = sorted((Path(__file__).parents[1] / "data" / "state_dicts").glob("*.json"))
ON_RESNETS = [name for name, network in NETWORKS.items() if "resnet18" in network.backbones]
ALL_MODELS = pytest.mark.parametrize("name", ON_RESNETS)


@functools.cache
def _built(name, output_stride):
    torch.manual_seed(0)
    return build_model(name, "resnet18", 5, output_stride)


def small(name, output_stride=8):
    """Copies a fresh network, which is much faster than drawing the weights again."""
    return copy.deepcopy(_built(name, output_stride))


def plain_convolutions(model):
    for module in model.modules():
        if isinstance(module, DilatedConv3x3):
            module.fused = False
    return model


def expected_size(name, output_stride, size):
    return math.ceil(size / (4 if name == "deeplabv3plus" else output_stride))


PUBLISHED = {
    "deeplabv2_resnet101_21": ("deeplabv2", "resnet101", 44.049),
    "deeplabv3plus_resnet101_21": ("deeplabv3plus", "resnet101", 59.344),
    "deeplabv3plus_resnet50_21": ("deeplabv3plus", "resnet50", 40.352),
    "pspnet_resnet50_21": ("pspnet", "resnet50", 46.593),
    "unimatch_deeplabv3plus_resnet101_21": ("deeplabv3plus", "resnet101-deep-stem", 59.468),
    "unimatch_deeplabv3plus_resnet50_21": ("deeplabv3plus", "resnet50-deep-stem", 40.476),
    "unimatch_v2_dpt_dinov2_base_21": ("dpt", "dinov2-base", 97.529),
    "unimatch_v2_dpt_dinov2_large_21": ("dpt", "dinov2-large", 335.579),
    "unimatch_v2_dpt_dinov2_small_21": ("dpt", "dinov2-small", 24.796),
}
"""Published state dicts of ST++, UniMatch and UniMatch V2: network, backbone, million parameters."""


def test_published_networks_exist():
    assert [path.stem for path in STATE_DICTS] == list(PUBLISHED)


@pytest.mark.parametrize("path", STATE_DICTS, ids=lambda path: path.stem)
def test_keys_and_shapes_are_the_published_ones(path):
    name, backbone, millions = PUBLISHED[path.stem]
    with torch.device("meta"):
        model = build_model(name, backbone, 21)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 3) == millions
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(ours.items()) == list(json.loads(path.read_text()).items())


@ALL_MODELS
def test_keys_and_shapes_do_not_depend_on_the_output_stride(name):
    want, *others = ({k: v.shape for k, v in small(name, stride).state_dict().items()}
                     for stride in (8, 16, 32))
    assert want == others[0] == others[1]


def test_resnet18_has_torchvisions_keys():
    backbone = set(small("deeplabv2").backbone.state_dict())
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    want = {"conv1.weight"} | {f"bn1.{part}" for part in norm}
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"layer{layer}.{block}."
            want |= {f"{at}conv{i}.weight"
                     for i in (1, 2)} | {f"{at}bn{i}.{part}" for i in (1, 2) for part in norm}
        if layer > 1:
            at = f"layer{layer}.0.downsample."
            want |= {f"{at}0.weight"} | {f"{at}1.{part}" for part in norm}
    assert backbone == want


@pytest.mark.parametrize("name", list(VARIANTS))
def test_torchvisions_dilation_rule(name):
    """The first block of a dilated stage keeps the previous dilation; strides become dilations from there."""
    # Of layers 3 and 4: stride and dilation of the first block, dilation of the later ones.
    rule = ((32, (2, 1, 1), (2, 1, 1)), (16, (2, 1, 1), (1, 1, 2)), (8, (1, 1, 2), (1, 2, 4)))
    for output_stride, want3, want4 in rule:
        with torch.device("meta"):
            net = build_model("deeplabv3plus", name, 3, output_stride).backbone
        for layer, (stride, first, later) in ((net.layer3, want3), (net.layer4, want4)):
            blocks = [[m for m in block.modules() if isinstance(m, nn.Conv2d)] for block in layer]
            spatial = [[m for m in convolutions if m.kernel_size == (3, 3)] for convolutions in blocks]
            assert spatial[0][0].stride == (stride, stride) and spatial[0][0].dilation == (first, first)
            after = spatial[0][1:] + [convolution for block in spatial[1:] for convolution in block]
            assert len(after) == {"resnet18": 3}.get(name, len(layer) - 1)
            for convolution in after:
                assert convolution.stride == (1, 1)
                assert convolution.dilation == convolution.padding == (later, later)


@ALL_MODELS
@pytest.mark.parametrize(
    "backbone, output_stride", [("resnet18", 8), ("resnet18", 16), ("resnet18", 32), ("resnet50", 8)]
)
def test_sizes_of_logits(name, backbone, output_stride):
    with torch.device("meta"):
        model = plain_convolutions(build_model(name, backbone, 7, output_stride).eval())
        for height, width in ((321, 321), (65, 65), (33, 33), (97, 131), (720, 960), (1, 1), (5, 300)):
            logits = model(torch.empty(2, 3, height, width))
            want = (2, 7, expected_size(name, output_stride, height),
                    expected_size(name, output_stride, width))
            assert logits.shape == want


@ALL_MODELS
@pytest.mark.parametrize("height, width", [(33, 33), (97, 131), (1, 1), (2, 250)])
def test_odd_sizes_run_and_are_finite(name, height, width):
    for output_stride in (8, 32):
        logits = small(name, output_stride).eval()(torch.randn(1, 3, height, width))
        assert logits.shape[2:] == tuple(expected_size(name, output_stride, size) for size in (height, width))
        assert logits.isfinite().all()


@ALL_MODELS
@pytest.mark.parametrize("output_stride", [8, 16])
def test_resnet101_runs(name, output_stride):
    with torch.no_grad():
        logits = build_model(name, "resnet101", 5, output_stride).eval()(torch.randn(1, 3, 49, 65))
    assert logits.shape == (1, 5, expected_size(name, output_stride, 49),
                            expected_size(name, output_stride, 65))
    assert logits.isfinite().all() and logits.std() > 0


@ALL_MODELS
def test_evaluation_is_deterministic_and_independent_of_the_batch(name):
    model = small(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(3, 3, 65, 49)
    logits = model(images)
    assert torch.equal(logits, model(images))
    torch.testing.assert_close(logits[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@ALL_MODELS
def test_training_moves_statistics_and_reaches_every_parameter(name):
    model = small(name).train()
    mean = model.backbone.layer4[1].bn2.running_mean.clone()
    model(torch.randn(2, 3, 65, 65)).square().mean().backward()
    assert not torch.equal(mean, model.backbone.layer4[1].bn2.running_mean)
    without = [key for key,
               parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert without == []


def test_dropout_matches_the_method():
    def dropouts(name):
        modules = small(name).named_modules()
        return {key: (type(m), m.p) for key, m in modules if isinstance(m, nn.modules.dropout._DropoutNd)}

    assert dropouts("deeplabv3plus") == {"head.project.3": (nn.Dropout2d, 0.5), "fuse.6": (nn.Dropout, 0.1)}
    assert dropouts("pspnet") == {"head.conv5.4": (nn.Dropout, 0.1)}
    assert dropouts("deeplabv2") == {}


@ALL_MODELS
def test_parameter_groups_split_all_parameters(name):
    model = small(name)
    backbone, head = parameter_groups(model)
    named = dict(model.named_parameters())
    assert [id(p) for p in backbone] == [id(p) for key, p in named.items() if key.startswith("backbone.")]
    assert [id(p) for p in head] == [id(p) for key, p in named.items() if not key.startswith("backbone.")]
    assert model.head_lr_multiplier == (1.0 if name == "deeplabv2" else 10.0)


def test_initial_weights():
    model = build_model("deeplabv2", "resnet50", 21, 8)
    for convolution in model.classifier:
        assert convolution.weight.std().item() == pytest.approx(0.01, rel=0.05)
    for key, parameter in model.backbone.named_parameters():
        if parameter.dim() == 4:
            fan_out = parameter.shape[0] * parameter.shape[2] * parameter.shape[3]
            assert parameter.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1), key
        else:
            assert (parameter == (1.0 if key.endswith("weight") else 0.0)).all(), key
    head = small("deeplabv3plus").fuse[0].weight  # PyTorch's default: uniform, bound 1 / sqrt(fan in)
    bound = 1 / math.sqrt(head[0].numel())
    assert head.abs().max() <= bound and head.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("arguments, message", [
    (("unet", "resnet50", 21, 8), "'unet'.*deeplabv3plus"),
    (("pspnet", "resnet34", 21, 8), "'resnet34'.*resnet101"),
    (("pspnet", "dinov2-small", 21),
     "'dinov2-small' does not work with --model.name 'pspnet'.*dpt on dinov2-small"),
    (("dpt", "dinov2-small", 21, 8), "output stride 8.*leave it out"),
    (("pspnet", "resnet18", 1, 8), "num_classes is 1"),
    (("deeplabv3plus", "resnet18", 21, 4), "output_stride 4"),
    (("deeplabv2", "resnet18", 21, 12), "output_stride 12"),
])  # fmt: skip
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(*arguments)


@ALL_MODELS
@pytest.mark.parametrize("training", [False, True])
def test_every_block_keeps_channels_last(name, training):
    """A concatenation or an upsampling that falls back to NCHW makes every later convolution reorder its
    input."""
    model = small(name).to(memory_format=torch.channels_last).train(training)
    strayed, seen = [], []

    def look(module, inputs):
        seen.append(module)
        if not inputs[0].is_contiguous(memory_format=torch.channels_last):
            strayed.append(module)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(look)
    logits = model(torch.randn(2, 3, 65, 97).to(memory_format=torch.channels_last))
    assert seen and strayed == [] and logits.is_contiguous(memory_format=torch.channels_last)


@ALL_MODELS
def test_memory_format_does_not_change_values(name):
    model, images = small(name).eval(), torch.randn(2, 3, 65, 97)
    want = model(images)
    got = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@ALL_MODELS
@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_autocast(name, fused):
    model = small(name).to(memory_format=torch.channels_last).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    if not fused:
        plain_convolutions(model)
    images = torch.randn(2, 3, 65, 97).to(memory_format=torch.channels_last)
    want = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - want).norm() < 0.1 * want.norm()
    logits.float().square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), key


@ALL_MODELS
def test_half_precision_model(name):
    """The export of an engine has parameters themselves in bfloat16."""
    model, images = small(name).eval(), torch.randn(1, 3, 65, 97)
    want = model(images)
    got = model.bfloat16()(images.bfloat16())
    assert got.dtype == torch.bfloat16 and (got.float() - want).norm() < 0.1 * want.norm()


@pytest.mark.slow
@ALL_MODELS
def test_compiles_as_one_graph_for_any_size(name):
    model = small(name).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for size in ((2, 3, 65, 97), (3, 3, 49, 33)):
        images = torch.randn(size)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["deeplabv3plus", "pspnet",
                                  pytest.param("deeplabv2", marks=pytest.mark.slow)])
def test_exports_with_any_size(name):
    model = small(name).eval()
    dim = torch.export.Dim
    shapes = {"images_NCHW": {0: dim("n", max=64), 2: dim("h", min=17, max=4096),
                              3: dim("w", min=17, max=4096)}}
    program = torch.export.export(model, (torch.randn(2, 3, 65, 97),), dynamic_shapes=shapes).module()
    for _ in range(4):
        images = torch.randn(random.randint(1, 3), 3, random.randint(17, 140), random.randint(17, 140))
        torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@ALL_MODELS
def test_cuda_agrees_with_cpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model, images = small(name).eval(), torch.randn(2, 3, 65, 97)
    want = model(images)
    torch.testing.assert_close(model.cuda()(images.cuda()).cpu(), want, rtol=1e-2, atol=1e-2)
