"""dilated_conv3x3 against F.conv2d: values, gradients, both forms, 16-bit arithmetic, autocast, tracing,
export."""

import contextlib
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_cases import LAYOUTS, TOLERANCE, TRITON, assert_three_way, laid_out
from stpp_kernels import dilated_conv, dilated_conv3x3

FORMS = ["taps", "conv", "", TRITON]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CASES = [
    *((form, "cpu") for form in ("taps", "conv", "")),
    pytest.param("triton", "cpu", marks=TRITON.marks),
    *(pytest.param(form, "cuda", marks=GPU) for form in ("taps", "conv", "", "triton")),
]


if torch.cuda.is_available():  # disables TF32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@contextlib.contextmanager
def forced(form: str):
    os.environ[dilated_conv.FORM_VARIABLE] = form
    try:
        yield
    finally:
        del os.environ[dilated_conv.FORM_VARIABLE]


def three(function, x, weight, gradient, dtype):
    """Returns (output, gradient of x, gradient of the weight) in `dtype`."""
    x, weight = x.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    out = function(x, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight), gradient.to(dtype))


def check(form, device, shape, channels, dilation, dtype, layout, seed=0):
    torch.manual_seed(seed)
    x = laid_out(torch.randn(shape), layout).to(dtype).to(device)
    weight = laid_out(torch.randn(channels, shape[1], 3, 3), layout).to(dtype).to(device)
    gradient = torch.randn(shape[0], channels, *shape[2:]).to(dtype).to(device)
    with forced(form):
        fused = three(lambda a, b: dilated_conv3x3(a, b, dilation), x, weight, gradient, dtype)
    plain = [
        three(lambda a, b: F.conv2d(a, b, padding=dilation, dilation=dilation), x, weight, gradient, kind)
        for kind in (dtype, torch.float64)
    ]
    assert fused[0].is_contiguous(memory_format=torch.channels_last) and fused[0].dtype == dtype
    for name, *tensors in zip(("output", "gradient of x", "gradient of the weight"), fused, *plain,
                              strict=True):
        rounded = 0.0  # values that are rounded to `dtype` on the way
        if form == "triton" and device == "cpu" and dtype == torch.bfloat16:
            rounded = max(1.0, tensors[-1].abs().max().item())  # the interpreter truncates results
        elif form != "conv" and dtype.itemsize == 2 and name == "gradient of the weight":
            rounded = sum(products(x, gradient, dilation))  # those of single images, before they are added
        assert_three_way(name, *tensors, rounded * TOLERANCE[dtype])


def products(x, gradient, dilation) -> list[float]:
    """Returns the largest element of the weight's gradient of each image, in float64."""
    size = (gradient.shape[1], x.shape[1], 3, 3)
    return [torch.nn.grad.conv2d_weight(image[None].double(), size, of_image[None].double(), padding=dilation,
                                        dilation=dilation).abs().max().item()
            for image, of_image in zip(x, gradient, strict=True)]


@pytest.mark.parametrize("form,device", CASES)
@given(
    n=st.integers(1, 3), i=st.integers(1, 5), o=st.integers(1, 4), h=st.integers(1, 14), w=st.integers(1, 14),
    dilation=st.integers(1, 15), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_same_as_conv2d(form, device, n, i, o, h, w, dilation, dtype, layout, seed):
    check(form, device, (n, i, h, w), o, dilation, dtype, layout, seed)


@pytest.mark.parametrize("form,device", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 16, 13, 17), (2, 3, 4, 9), (1, 1, 1, 1)])
def test_float16_is_the_same_as_conv2d(form, device, layout, shape):
    check(form, device, shape, 8, 5, torch.float16, layout)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rate", [12, 24, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rates_of_aspp(form, rate, dtype):
    check(form, "cpu", (2, 32, 41, 41), 8, rate, dtype, "channels_last")


def test_bfloat16_products_satisfy_the_three_way_rule(monkeypatch):
    monkeypatch.setattr(dilated_conv, "_cpu_multiplies", lambda dtype: True)  # as on a CPU with AMX
    for layout in LAYOUTS:
        check("taps", "cpu", (3, 64, 11, 13), 16, 4, torch.bfloat16, layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cudnn_output_is_converted_to_channels_last(layout, dtype):
    """On a CPU conv2d's output of contiguous maps is contiguous, as cuDNN's is, so this path behaves here as
    on CUDA."""
    torch.manual_seed(0)
    x = laid_out(torch.randn(2, 4, 7, 9), layout).to(dtype).requires_grad_()
    weight = torch.randn(5, 4, 3, 3, dtype=dtype, requires_grad=True)
    out, plain = dilated_conv._cudnn(x, weight, 3), F.conv2d(x, weight, padding=3, dilation=3)
    assert out.is_contiguous(memory_format=torch.channels_last) and torch.equal(out, plain)
    gradient = torch.randn_like(plain)
    for mine, theirs in zip(*(torch.autograd.grad(one, (x, weight), gradient) for one in (out, plain)),
                            strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(form):
    with forced(form):
        assert dilated_conv3x3(torch.zeros(0, 2, 5, 5), torch.zeros(3, 2, 3, 3), 2).shape == (0, 3, 5, 5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", [0, 1])
def test_only_needed_gradients_are_computed(form, which):
    with forced(form):
        arguments = [torch.randn(1, 2, 9, 9), torch.randn(3, 2, 3, 3)]
        arguments[which].requires_grad_()
        dilated_conv3x3(*arguments, 4).sum().backward()
        assert arguments[which].grad is not None and arguments[1 - which].grad is None


def test_valid_share_counts_taps_inside_the_map():
    for height, width, dilation in [(41, 41, 36), (5, 9, 2), (3, 3, 3), (1, 7, 4), (6, 6, 1)]:
        inside = F.conv2d(torch.ones(1, 1, height, width), torch.ones(1, 1, 3, 3), padding=dilation,
                          dilation=dilation).sum()
        expected = inside.item() / (9 * height * width)
        assert dilated_conv.valid_share(height, width, dilation) == pytest.approx(expected)


def test_plain_forms_can_be_forced(monkeypatch):
    x = torch.empty(1, 1, 9, 9)
    assert dilated_conv.form("weight gradient", x, 8) == "taps"
    monkeypatch.setenv("STPP_KERNELS", "reference")
    assert dilated_conv.form("weight gradient", x, 8) == "conv"
    with forced("taps"):
        assert dilated_conv.form("weight gradient", x, 8) == "taps"


def test_form_saves_work_on_a_cpu_only():
    x = torch.zeros(1, 2048, 41, 41, dtype=torch.float64)
    assert dilated_conv.form("forward", x, 12) == "taps"
    assert dilated_conv.form("forward", x, 1) == "conv"
    assert dilated_conv.form("forward", x.to("meta"), 12) == "conv"


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("amx", [False, True])
def test_form_delegates_to_onednn_where_equally_fast(avx512, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    wide, narrow = torch.zeros(1, 2048, 41, 41), torch.zeros(1, 512, 41, 41)
    skips = avx512 and not amx  # bfloat16 products of AMX and emulated ones multiply padding
    for x, conv in ((wide, True), (narrow, True), (wide.bfloat16(), skips), (narrow.bfloat16(), skips)):
        assert dilated_conv.form("forward", x,
                                 12) == dilated_conv.form("input gradient", x,
                                                          12) == ("conv" if conv else "taps")
        assert dilated_conv.form("weight gradient", x, 36) == "taps"
    assert dilated_conv.form("weight gradient", wide, 12) == "taps"
    # copying columns costs more than it saves
    assert dilated_conv.form("weight gradient", narrow, 12) == "conv"


def test_autocast_casts_both_arguments():
    x, weight = torch.randn(1, 4, 9, 9), torch.randn(2, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_conv3x3(x, weight, 4)
        assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    expected = dilated_conv3x3(x.bfloat16(), weight.detach().bfloat16(), 4)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_float64(form):
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    with forced(form):
        torch.autograd.gradcheck(lambda a, b: dilated_conv3x3(a, b, 3), (x, weight))


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    with forced(form):
        torch.library.opcheck(torch.ops.stpp_kernels.dilated_conv3x3.default, (x, weight, 4))
        arguments = (torch.randn(2, 4, 6, 7), x.detach(), weight.detach(), 4, True, True)
        torch.library.opcheck(torch.ops.stpp_kernels.dilated_conv3x3_backward.default, arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 1, 1), 2), "weight"),
        ((torch.zeros(1, 2, 5, 5), torch.zeros(3, 4, 3, 3), 2), "weight"),
        ((torch.zeros(2, 5, 5), torch.zeros(3, 2, 3, 3), 2), "x must be"),
        ((torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3).double(), 2), "agree"),
        ((torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), 0), "at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        dilated_conv3x3(*arguments)


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)

    def forward(self, x):
        return dilated_conv3x3(x, self.conv.weight, 6).relu()


def test_export_keeps_one_opaque_operator_with_dynamic_sizes():
    size = {0: torch.export.Dim("n", min=1, max=8), 2: torch.export.Dim("h", min=4),
            3: torch.export.Dim("w", min=4)}
    net = _Net().eval()
    program = torch.export.export(net, (torch.randn(2, 3, 13, 17),), dynamic_shapes=({**size},))
    assert [node.target
            for node in program.graph.nodes].count(torch.ops.stpp_kernels.dilated_conv3x3.default) == 1
    for shape in [(1, 3, 5, 30), (3, 3, 20, 9)]:  # rate 6 drops whole taps in the first, none in the second
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    net = _Net()
    compiled = torch.compile(net, fullgraph=True)
    x = torch.randn(2, 3, 13, 17, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x),
                               torch.autograd.grad(net(x).square().sum(), x))


def test_second_derivative_is_refused():
    x, weight = torch.randn(1, 2, 9, 9, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(dilated_conv3x3(x, weight, 4).sum(), x, create_graph=True)
