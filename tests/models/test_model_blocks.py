"""Every block of every network against a plain form: functions over the state dict, from the method's paper.

Float64 throughout, so that a wrong order, stride or dilation cannot hide in rounding.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stpp.models import layers, pspnet
from stpp.models.build import build_model
from stpp.models.deeplabv2 import DeepLabV2
from stpp.models.deeplabv3plus import ASPP, PooledContext
from stpp.models.resnet import BasicBlock, Bottleneck, ResNet

EXACT = {"rtol": 1e-9, "atol": 1e-9}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# Dilation of the 3x3 convolutions of layers 3 and 4: (first block, later blocks); a basic block has two of
# them.
BOTTLENECK_DILATIONS = {8: ((1, 2), (2, 4)), 16: ((1, 1), (1, 2)), 32: ((1, 1), (1, 1))}
BASIC_DILATIONS = {8: (((1, 2), (2, 2)), ((2, 4), (4, 4))), 16: (((1, 1), (1, 1)), ((1, 2), (2, 2))),
                   32: (((1, 1), (1, 1)), ((1, 1), (1, 1)))}  # fmt: skip
STRIDES = {8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}


def scrambled(module, seed=0):
    """Gives the module random weights and batch statistics in float64, and no dropout, so that modes
    compare."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for name, tensor in module.state_dict().items():
        if tensor.dim() == 4:
            scale = (2 / tensor[0].numel()) ** 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * scale)
        elif name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5)
        elif tensor.dim() == 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.3 + 0.5)
    for part in module.modules():
        if isinstance(part, (torch.nn.Dropout, torch.nn.Dropout2d)):
            part.p = 0.0
    return module


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Functional:
    """The networks as functions of a state dict; `training` takes batch statistics instead of stored ones."""

    def __init__(self, module, training):
        module.train(training)
        self.state = {key: value.clone() for key, value in module.state_dict().items()}
        self.training = training

    def conv(self, key, x, stride=1, padding=0, dilation=1):
        return F.conv2d(x, self.state[key + ".weight"], self.state.get(key + ".bias"), stride, padding,
                        dilation)

    def norm(self, key, x):
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (self.state[f"{key}.{part}"] for part in parts)
        return F.batch_norm(x, mean, var, weight, bias, self.training, momentum=0.1, eps=1e-5)

    def unit(self, conv, norm, x, **options):
        return self.norm(norm, self.conv(conv, x, **options)).clamp(min=0)

    def shortcut(self, at, x, stride):
        if at + "downsample.0.weight" not in self.state:
            return x
        return self.norm(at + "downsample.1", self.conv(at + "downsample.0", x, stride=stride))

    def basic(self, at, x, stride, dilations):
        one, two = dilations
        y = self.unit(at + "conv1", at + "bn1", x, stride=stride, padding=one, dilation=one)
        y = self.norm(at + "bn2", self.conv(at + "conv2", y, padding=two, dilation=two))
        return (y + self.shortcut(at, x, stride)).clamp(min=0)

    def bottleneck(self, at, x, stride, dilation):
        y = self.unit(at + "conv1", at + "bn1", x)
        y = self.unit(at + "conv2", at + "bn2", y, stride=stride, padding=dilation, dilation=dilation)
        y = self.norm(at + "bn3", self.conv(at + "conv3", y))
        return (y + self.shortcut(at, x, stride)).clamp(min=0)

    def stem(self, at, x):
        return F.max_pool2d(self.unit(at + "conv1", at + "bn1", x, stride=2, padding=3), 3, 2, 1)

    def resnet(self, at, x, name, output_stride):
        basic = name == "resnet18"
        plain = (1, 1) if basic else 1
        late = (BASIC_DILATIONS if basic else BOTTLENECK_DILATIONS)[output_stride]
        dilations = ((plain, plain), (plain, plain), *late)
        depths = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}[name]
        x = self.stem(at, x)
        maps = []
        stages = zip(depths, dilations, STRIDES[output_stride], strict=True)
        for stage, (depth, (first, later), stride) in enumerate(stages):
            for index in range(depth):
                block = self.basic if basic else self.bottleneck
                arguments = (stride, first) if index == 0 else (1, later)
                x = block(f"{at}layer{stage + 1}.{index}.", x, *arguments)
            maps.append(x)
        return maps

    def pooled(self, at, x):
        y = self.unit(at + "gap.1", at + "gap.2", F.adaptive_avg_pool2d(x, 1))
        return F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True)

    def aspp(self, at, x, rates):
        views = [self.unit(at + "b0.0", at + "b0.1", x)]
        views += [self.unit(f"{at}b{i}.0", f"{at}b{i}.1", x, padding=r, dilation=r) for i,
                  r in enumerate(rates, 1)]
        views.append(self.pooled(at + "b4.", x))
        return self.unit(at + "project.0", at + "project.1", torch.cat(views, 1))

    def decoder(self, c1, context):
        context = F.interpolate(context, c1.shape[2:], mode="bilinear", align_corners=True)
        x = torch.cat([self.unit("reduce.0", "reduce.1", c1), context], 1)
        x = self.unit("fuse.3", "fuse.4", self.unit("fuse.0", "fuse.1", x, padding=1), padding=1)
        return self.conv("classifier", x)

    def pyramid(self, at, x):
        maps = [x]
        for level, bins in enumerate((1, 2, 3, 6), 1):
            y = self.unit(f"{at}conv{level}.0", f"{at}conv{level}.1", F.adaptive_avg_pool2d(x, bins))
            maps.append(F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True))
        return torch.cat(maps, 1)

    def deeplabv2(self, x):
        return sum(self.conv(f"classifier.{i}", x, padding=d, dilation=d) for i,
                   d in enumerate((6, 12, 18, 24)))


MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@MODES
def test_stem(training):
    net = scrambled(ResNet("resnet18", 32))
    form = Functional(net, training)
    x = images(2, 3, 33, 46)
    torch.testing.assert_close(net.maxpool(net.relu(net.bn1(net.conv1(x)))), form.stem("", x), **EXACT)


@MODES
@pytest.mark.parametrize("stride, dilations",
                         [(1, (1, 1)), (2, (1, 1)), (1, (1, 2)), (1, (2, 4)), (1, (4, 4))])
def test_residual_blocks(training, stride, dilations):
    projects = (True,) if stride == 2 else (False, True)
    for project, (block, width) in itertools.product(projects, ((BasicBlock, 12), (Bottleneck, 3))):
        shortcut = torch.nn.Sequential(torch.nn.Conv2d(12, 12, 1, stride, bias=False),
                                       torch.nn.BatchNorm2d(12))
        module = scrambled(block(12, width, stride, *dilations, shortcut if project else None))
        form = Functional(module, training)
        x = images(2, 12, 13, 10)
        if block is BasicBlock:
            want = form.basic("", x, stride, dilations)
        else:
            want = form.bottleneck("", x, stride, dilations[0])
        torch.testing.assert_close(module(x.clone()), want, **EXACT)


@MODES
@pytest.mark.parametrize("name, output_stride",
                         [("resnet18", 8), ("resnet18", 16), ("resnet18", 32), ("resnet50", 8)])
def test_backbone(name, output_stride, training):
    net = scrambled(ResNet(name, output_stride))
    form = Functional(net, training)
    x = images(2, 3, 33, 26)
    for got, want in zip(net(x), form.resnet("", x, name, output_stride), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@MODES
@pytest.mark.parametrize("output_stride, rates", [(8, (12, 24, 36)), (16, (6, 12, 18)), (32, (6, 12, 18))])
def test_aspp_and_each_branch(output_stride, rates, training):
    aspp = scrambled(build_model("deeplabv3plus", "resnet18", 5, output_stride).head)
    form = Functional(aspp, training)
    x = images(2, 512, 13, 37)
    torch.testing.assert_close(aspp.b0(x), form.unit("b0.0", "b0.1", x), **EXACT)
    for index, rate in enumerate(rates, 1):
        want = form.unit(f"b{index}.0", f"b{index}.1", x, padding=rate, dilation=rate)
        torch.testing.assert_close(getattr(aspp, f"b{index}")(x), want, **EXACT)
    torch.testing.assert_close(aspp.b4(x), form.pooled("b4.", x), **EXACT)
    aspp = scrambled(aspp)  # statistics moved in training mode
    torch.testing.assert_close(aspp(x), Functional(aspp, training).aspp("", x, rates), **EXACT)


@MODES
def test_decoder(training):
    model = scrambled(build_model("deeplabv3plus", "resnet18", 5, 16))
    form = Functional(model, training)
    c1, c4 = images(2, 64, 21, 17), images(2, 512, 6, 5)
    torch.testing.assert_close(model.decode(c1, c4), form.decoder(c1, form.aspp("head.", c4, (6, 12, 18))),
                               **EXACT)


@MODES
def test_pyramid_pooling_and_its_head(training):
    model = scrambled(build_model("pspnet", "resnet18", 5, 8))
    form = Functional(model, training)
    c4 = images(2, 512, 7, 11)
    # The averaging matrices are float32 by design.
    torch.testing.assert_close(model.head.conv5[0](c4), form.pyramid("head.conv5.0.", c4), **FLOAT32)
    model = scrambled(model)
    form = Functional(model, training)
    y = form.unit("head.conv5.1", "head.conv5.2", form.pyramid("head.conv5.0.", c4), padding=1)
    torch.testing.assert_close(model.decode(c4), form.conv("head.conv5.5", y), **FLOAT32)


@pytest.mark.parametrize("output_stride", [8, 32])
def test_deeplabv2_head(output_stride):
    model = scrambled(DeepLabV2(ResNet("resnet18", output_stride), 5))
    c4 = images(2, 512, 9, 30)
    torch.testing.assert_close(model.decode(c4), Functional(model, False).deeplabv2(c4), **EXACT)


@MODES
def test_whole_networks(training):
    x = images(2, 3, 33, 25)
    for name in ("deeplabv3plus", "pspnet", "deeplabv2"):
        model = scrambled(build_model(name, "resnet18", 4, 8))
        form = Functional(model, training)
        c1, _, _, c4 = form.resnet("backbone.", x, "resnet18", 8)
        if name == "deeplabv3plus":
            want = form.decoder(c1, form.aspp("head.", c4, (12, 24, 36)))
        elif name == "pspnet":
            y = form.unit("head.conv5.1", "head.conv5.2", form.pyramid("head.conv5.0.", c4), padding=1)
            want = form.conv("head.conv5.5", y)
        else:
            want = form.deeplabv2(c4)
        torch.testing.assert_close(model(x), want, **FLOAT32)
        if training:
            for key, value in model.state_dict().items():  # F.batch_norm moved the form's as well
                if "running" in key:
                    torch.testing.assert_close(value, form.state[key], **FLOAT32)


@pytest.mark.parametrize("name, size",
                         [("resnet18", (33, 65)), ("resnet18", (40, 42)), ("resnet50", (33, 26))])
def test_dilation_preserves_values(name, size):
    """At every value of the strided network, the dilated one has the same value."""
    x = images(1, 3, *size)
    c4 = {stride: scrambled(ResNet(name, stride)).eval()(x)[3] for stride in (8, 16, 32)}
    torch.testing.assert_close(c4[16][:, :, ::2, ::2], c4[32], **EXACT)
    torch.testing.assert_close(c4[8][:, :, ::4, ::4], c4[32], **EXACT)


@given(height=st.integers(1, 70), width=st.integers(1, 70), bins=st.integers(1, 8),
       channels_last=st.booleans())
def test_average_pool_equals_adaptive_pooling(height, width, bins, channels_last):
    x = images(2, 3, height, width).float()
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    torch.testing.assert_close(pspnet.average_pool(x, bins), F.adaptive_avg_pool2d(x, bins), **FLOAT32)


@given(height=st.integers(1, 90), width=st.integers(1, 90),
       half=st.sampled_from([torch.float16, torch.bfloat16]))
def test_global_average_rounds_at_most_once_more(height, width, half):
    x = (images(2, 3, height, width).relu() * 50).to(half).to(memory_format=torch.channels_last)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[half]
    want = x.double().mean((2, 3), keepdim=True)
    torch.testing.assert_close(layers.global_average(x).double(), want, rtol=tolerance, atol=1e-3)
    assert layers.global_average(x).shape == want.shape and layers.global_average(x).dtype == half


def test_global_average_of_a_large_map_stays_in_range_of_float16():
    x = torch.full((1, 8, 129, 2000), 1000.0, dtype=torch.float16).to(memory_format=torch.channels_last)
    assert layers.global_average(x).flatten().tolist() == [1000.0] * 8


def test_global_average_passes_a_gradient():
    x = images(2, 4, 5, 7).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    layers.global_average(x).sum().backward()
    torch.testing.assert_close(x.grad.float(), torch.full((2, 4, 5, 7), 1 / 35), rtol=2e-2, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_dilated_convolution_equals_conv2d(bias):
    module = layers.DilatedConv3x3(6, 4, 5, bias=bias).double()
    x = images(2, 6, 11, 8)
    want = F.conv2d(x, module.weight, module.bias, padding=5, dilation=5)
    torch.testing.assert_close(module(x), want, **EXACT)
    module.fused = False
    torch.testing.assert_close(module(x), want, **EXACT)


@given(num_images=st.integers(1, 3), height=st.integers(1, 9), width=st.integers(1, 9),
       stride=st.integers(1, 2), dilation=st.integers(1, 3), channels_last=st.booleans())
def test_convolution_of_a_small_map_equals_conv2d(num_images, height, width, stride, dilation, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    ours = layers.Conv3x3(2, 24, stride, dilation).double().to(memory_format=layout)
    x = images(num_images, 2, height, width).contiguous(memory_format=layout).requires_grad_()
    results = []
    for training in (True, False):
        out = ours.train(training)(x)
        grad = images(*out.shape, seed=2)
        results.append((out, *torch.autograd.grad(out, (x, ours.weight), grad)))
    for small, plain in zip(*results, strict=True):
        torch.testing.assert_close(small, plain, **EXACT)


def test_small_map_is_a_matrix_product(monkeypatch):
    ours = layers.Conv3x3(8, 32, stride=2)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("a convolution"))
    assert ours(torch.ones(8, 8, 4, 3)).shape == (8, 32, 2, 2)
    with pytest.raises(pytest.fail.Exception):
        ours(torch.ones(9, 8, 4, 3))  # 36 cells


def test_a_single_image_in_training_is_refused_by_global_pooling():
    for part in (PooledContext(16, 2), ASPP(16, (1, 2, 3), width=2, dropout=True)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            part.train()(torch.randn(1, 16, 5, 5))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("width", [1, 2])
def test_strided_convolution_to_one_column_is_right_in_bfloat16(width, autocast):
    """oneDNN's is wrong in a third of the calls on AMX."""
    torch.manual_seed(0)
    convolution = layers.Conv3x3(64, 96, stride=2).eval()
    for height in range(1, 12):
        x = torch.randn(2, 64, height, width).to(memory_format=torch.channels_last)
        expected = F.conv2d(x, convolution.weight, stride=2, padding=1)
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                found = convolution(x)
        else:
            found = copy.deepcopy(convolution).bfloat16()(x.bfloat16())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
