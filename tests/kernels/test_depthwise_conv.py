"""depthwise_conv against F.conv2d after F.pad: values, gradients in both forms, thread counts, 16-bit
arithmetic, autocast, tracing, export."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from kernels_cases import DTYPES, LAYOUTS, assert_three_way, laid_out
from stpp_kernels import depthwise_conv, dispatch, reference

OP = torch.ops.stpp_kernels.depthwise_conv.default
BACKWARD = torch.ops.stpp_kernels.depthwise_conv_backward.default
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NAMES = ("output", "gradient of x", "gradient of the weight")


@st.composite
def geometries(draw, kernels=(1, 3, 5, 7)) -> tuple[tuple[int, int], int, dict]:
    """Draws ((H, W), K, stride and dilation and padding) with at least one output."""
    kernel, (stride, dilation) = draw(st.sampled_from(kernels)), (draw(st.integers(1, 3)) for _ in range(2))
    span = dilation * (kernel - 1) + 1
    padding = tuple(draw(st.integers(0, span)) for _ in range(4))
    height = draw(st.integers(max(1, span - padding[2] - padding[3]), 24))
    width = draw(st.integers(max(1, span - padding[0] - padding[1]), 24))
    return (height, width), kernel, {"stride": stride, "dilation": dilation, "padding": padding}


def plain(x, weight, *, stride=1, dilation=1, padding=(0, 0, 0, 0)):
    return F.conv2d(F.pad(x, padding), weight, None, stride, 0, dilation, groups=x.shape[1])


def three(function, x, weight, gradient, dtype):
    """Returns (output, gradient of x, gradient of the weight) in `dtype`."""
    x, weight = x.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    out = function(x, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight), gradient.to(dtype))


def drawn(shape, kernel, dtype, layout, seed=0):
    """Returns x and weight of a case."""
    generator = torch.Generator().manual_seed(seed)
    x = laid_out(torch.randn(shape, generator=generator).to(dtype), layout)
    return x, torch.randn(shape[1], 1, kernel, kernel, generator=generator).to(dtype)


def check(shape, kernel, dtype, layout, seed=0, **geometry):
    x, weight = drawn(shape, kernel, dtype, layout, seed)
    gradient = laid_out(torch.randn_like(plain(x.float(), weight.float(), **geometry)).to(dtype), layout)
    fused = three(lambda a, b: depthwise_conv(a, b, **geometry), x, weight, gradient, dtype)
    eager, truth = (
        three(lambda a, b: plain(a, b, **geometry), x, weight, gradient, kind)
        for kind in (dtype, torch.float64)
    )
    assert fused[0].is_contiguous(memory_format=torch.channels_last) and fused[0].dtype == dtype
    for name, *tensors in zip(NAMES, fused, eager, truth, strict=True):
        assert_three_way(name, *tensors)


def test_backward_pass_is_the_cpp_form():
    assert dispatch.implementations("cpu")["depthwise_conv_backward"] == "cpp"


@given(
    geometry=geometries(), n=st.integers(1, 3), c=st.sampled_from([1, 3, 16, 17, 32, 40]),
    dtype=st.sampled_from([*DTYPES, torch.float64]), layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_same_as_conv2d(geometry, n, c, dtype, layout, seed):
    # A single channel makes an ordinary convolution, which oneDNN computes wrongly in 16 bits on AMX.
    assume(c > 1 or dtype in (torch.float32, torch.float64))
    size, kernel, rest = geometry
    check((n, c, *size), kernel, dtype, layout, seed, **rest)


@given(geometry=geometries(), c=st.sampled_from([3, 16, 40]), seed=st.integers(0, 2**32 - 1))
def test_reference_is_the_gradient_of_conv2d(geometry, c, seed):
    """Compares the reference in float64, the oracle of the C++ form, with autograd; and C++ with both."""
    size, kernel, rest = geometry
    x, weight = drawn((2, c, *size), kernel, torch.float64, "channels_last", seed)
    gradient = torch.randn_like(plain(x, weight, **rest))
    _, *truth = three(lambda a, b: plain(a, b, **rest), x, weight, gradient, torch.float64)
    arguments = (*rest.values(), True, True)
    found = reference.depthwise_conv_backward(gradient, x, weight, *arguments)
    floats = [each.float() for each in (gradient, x, weight)]
    fused = BACKWARD(*floats, *arguments)
    eager = reference.depthwise_conv_backward(*floats, *arguments)
    for name, expected, oracle, mine, theirs in zip(NAMES[1:], truth, found, fused, eager, strict=True):
        torch.testing.assert_close(oracle, expected, rtol=1e-12, atol=1e-12)
        assert_three_way(name, mine, theirs, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel, stride, dilation", list(itertools.product((3, 5), (1, 2), (1, 2))))
@pytest.mark.parametrize("side", [30, 31])
def test_shapes_of_efficientnet(kernel, stride, dilation, side, dtype):
    """Channels that fill several chunks, more images than one task, TensorFlow's padding."""
    after = dilation * (kernel // 2)
    before = after if stride == 1 else after - 1 + side % 2
    check((5, 368, side, side), kernel, dtype, "channels_last", stride=stride, dilation=dilation,
          padding=(before, after, before, after))  # fmt: skip


def test_many_small_images_share_a_task():
    check((130, 8, 5, 6), 3, torch.float32, "channels_last", padding=(1, 1, 1, 1))


def test_wide_map_of_few_channels_is_split_into_bands():
    check((1, 5, 100, 700), 5, torch.float32, "channels_last", stride=2, padding=(1, 2, 2, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 20, 40, 30), (9, 600, 9, 8)])
def test_same_bits_for_every_number_of_threads(shape, dtype):
    x, weight = drawn(shape, 5, dtype, "channels_last")
    gradient = torch.randn_like(x)
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(BACKWARD(gradient, x, weight, 1, 2, (4, 4, 4, 4), True, True))
    for again in found[1:]:
        assert all(map(torch.equal, found[0], again))
    for which in (0, 1):  # independent of the other requested gradients
        alone = BACKWARD(gradient, x, weight, 1, 2, (4, 4, 4, 4), which == 0, which == 1)
        assert torch.equal(alone[which], found[0][which]) and alone[1 - which].numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_does_not_change_a_bit(layout):
    x, weight = drawn((2, 19, 9, 11), 3, torch.bfloat16, "channels_last")
    gradient = torch.randn_like(x)
    expected = BACKWARD(gradient, x, weight, 1, 1, (1, 1, 1, 1), True, True)
    found = BACKWARD(laid_out(gradient, layout), laid_out(x, layout), weight, 1, 1, (1, 1, 1, 1), True, True)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_propagate(dtype):
    x, weight = drawn((1, 3, 8, 8), 3, dtype, "channels_last")
    gradient = torch.zeros_like(x)
    gradient[0, 1, 4, 4], gradient[0, 2, 0, 0] = float("nan"), float("inf")
    grad_x, grad_weight = BACKWARD(gradient, x, weight, 1, 1, (1, 1, 1, 1), True, True)
    assert grad_x[0, 0].eq(0).all() and grad_weight[0].eq(0).all()
    assert grad_x[0, 1, 3:6, 3:6].isnan().all() and grad_weight[1].isnan().all()
    assert int((~grad_x[0, 1].isfinite()).sum()) == 9 and grad_x[0, 2, :2, :2].isinf().all()


def test_sums_over_many_pixels_stay_exact():
    """In bfloat16 a running sum of ones ends at 256."""
    x = torch.ones(4, 2, 90, 90, dtype=torch.bfloat16)
    _, grad_weight = BACKWARD(x, x, torch.ones(2, 1, 1, 1, dtype=torch.bfloat16), 1, 1, (0,) * 4, False, True)
    assert grad_weight.flatten().tolist() == [torch.tensor(4 * 90 * 90.0).bfloat16().item()] * 2


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_empty_batch_has_zero_gradients(dtype):
    x = torch.zeros(0, 4, 5, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3).to(dtype).requires_grad_()
    out = depthwise_conv(x, weight, stride=2, padding=(0, 1, 0, 1))
    assert out.shape == (0, 4, 2, 2)
    out.sum().backward()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape and not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", [0, 1])
def test_one_sided_gradients(which, dtype):
    arguments = list(drawn((2, 5, 9, 9), 3, dtype, "channels_last"))
    arguments[which].requires_grad_()
    depthwise_conv(*arguments, padding=(1, 1, 1, 1)).sum().backward()
    assert arguments[which].grad is not None and arguments[1 - which].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_both_arguments(dtype):
    x, weight = drawn((1, 4, 9, 9), 3, torch.float32, "channels_last")
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        out = depthwise_conv(x, weight)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    half = [each.detach().to(dtype).requires_grad_() for each in (x, weight)]
    expected = depthwise_conv(*half)
    expected.float().sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, half[0].grad.float()) and torch.equal(weight.grad, half[1].grad.float())


def test_autocast_leaves_float64_alone():
    x, weight = drawn((1, 2, 5, 5), 3, torch.float64, "contiguous")
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_conv(x, weight).dtype == torch.float64


@pytest.mark.parametrize(
    "stride, dilation, padding",
    [(1, 1, (1, 1, 1, 1)), (2, 1, (0, 1, 1, 1)), (2, 2, (1, 2, 2, 1)), (1, 2, (0, 0, 0, 0))],
)
def test_gradcheck_in_float64(stride, dilation, padding):
    x, weight = drawn((2, 2, 6, 5), 3, torch.float64, "contiguous")
    x.requires_grad_(), weight.requires_grad_()
    torch.autograd.gradcheck(
        lambda a, b: depthwise_conv(a, b, stride=stride, dilation=dilation, padding=padding), (x, weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, dtype):
    x, weight = drawn((2, 3, 6, 7), 3, dtype, layout)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.library.opcheck(OP, (*leaves, 2, 1, (0, 1, 1, 1)))
    gradient = torch.randn(2, 3, 3, 3).to(dtype)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(BACKWARD, (gradient, x, weight, 2, 1, (0, 1, 1, 1), *needs))


@pytest.mark.parametrize(
    ("shape", "weight", "geometry", "match"),
    [
        ((2, 5, 5), (2, 1, 3, 3), {}, "x must be"),
        ((1, 2, 5, 5), (2, 2, 3, 3), {}, "weight"),
        ((1, 2, 5, 5), (3, 1, 3, 3), {}, "weight"),
        ((1, 0, 5, 5), (0, 1, 3, 3), {}, "C at least 1"),
        ((1, 2, 5, 5), (2, 1, 3, 5), {}, "square"),
        ((1, 2, 5, 5), (2, 1, 2, 2), {}, "odd"),
        ((1, 2, 5, 5), (2, 1, 3, 3), {"stride": 0}, "at least 1"),
        ((1, 2, 5, 5), (2, 1, 3, 3), {"dilation": 0}, "at least 1"),
        ((1, 2, 5, 5), (2, 1, 3, 3), {"padding": (1, 1)}, "padding must be"),
        ((1, 2, 5, 5), (2, 1, 3, 3), {"padding": (0, -1, 0, 0)}, "padding must be"),
        ((1, 2, 5, 5), (2, 1, 3, 3), {"dilation": 3, "padding": (0, 1, 2, 2)}, "does not fit"),
    ],
)
def test_wrong_arguments_are_named(shape, weight, geometry, match):
    with pytest.raises(ValueError, match=match):
        depthwise_conv(torch.zeros(shape), torch.zeros(weight), **geometry)


def test_different_dtypes_are_refused():
    with pytest.raises(ValueError, match="agree"):
        depthwise_conv(torch.zeros(1, 2, 5, 5), torch.zeros(2, 1, 3, 3, dtype=torch.float64))


def test_second_derivative_is_refused():
    x, weight = drawn((1, 2, 9, 9), 3, torch.float32, "contiguous")
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(depthwise_conv(x, weight).sum(), x, create_graph=True)


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 1, 3, 3))

    def forward(self, x):
        above = x.shape[2] % 2
        return depthwise_conv(x, self.weight, stride=2, padding=(1, 1, above, 1)).relu()


def test_export_contains_a_plain_convolution():
    size = {0: torch.export.Dim("n", min=1, max=8), 3: torch.export.Dim("w", min=4)}
    net = _Net()
    with torch.enable_grad():
        program = torch.export.export(net, (torch.randn(2, 3, 13, 17),), dynamic_shapes=({**size},))
    names = [str(node.target) for node in program.graph.nodes]
    assert any("conv2d" in name for name in names) and not any("stpp_kernels" in name for name in names)
    x = torch.randn(3, 3, 13, 30)
    torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    net = _Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for side in (13, 18):
        x = torch.randn(2, 3, side, 17, requires_grad=True)
        both = [torch.autograd.grad(one(x).square().sum(), (x, net.weight)) for one in (compiled, net)]
        for found, expected in zip(*both, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("stride, padding", [(1, (1, 1, 1, 1)), (2, (0, 1, 1, 1))])
def test_cuda_uses_cudnn(stride, padding):
    leaves = drawn((2, 8, 9, 9), 3, torch.float32, "channels_last")
    x, weight = (each.cuda().requires_grad_() for each in leaves)
    out = depthwise_conv(x, weight, stride=stride, padding=padding)
    assert "stpp" not in type(out.grad_fn).__name__.lower()
    expected = plain(x, weight, stride=stride, padding=padding)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(out, expected)
    both = (torch.autograd.grad(one, (x, weight), gradient) for one in (out, expected))
    for found, truth in zip(*both, strict=True):
        torch.testing.assert_close(found, truth)


def test_nan_in_the_peer_does_not_loosen_the_bound():
    truth = torch.tensor([141.4, -3.0], dtype=torch.float64)
    right, broken = truth.bfloat16(), torch.tensor([float("nan"), -3.0]).bfloat16()
    assert_three_way("right", right, broken, truth)
    for wrong in (torch.tensor([150.0, -3.0]).bfloat16(), broken):
        with pytest.raises(AssertionError):
            assert_three_way("wrong", wrong, broken, truth)
