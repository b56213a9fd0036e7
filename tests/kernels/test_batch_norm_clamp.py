"""batch_norm_clamp against F.batch_norm and clamp: values, statistics, gradients, thread counts, layouts,
tracing; and the layer that uses it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kernels_cases import DTYPES, LAYOUTS, assert_three_way, laid_out
from stpp.models import layers
from stpp_kernels import batch_norm_clamp, dispatch, reference

OP = torch.ops.stpp_kernels.batch_norm_clamp.default
BACKWARD = torch.ops.stpp_kernels.batch_norm_clamp_backward.default
NAMES = ("output", "gradient of x", "gradient of the weight", "gradient of the bias")
RELU6 = (0.0, 6.0)
NONE = (-math.inf, math.inf)
EPS = 1e-3


def drawn(shape, dtype, layout, seed=0, spread=3.0, shift=0.0):
    """Returns x, weight, bias and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * spread + shift
    weight = torch.rand(shape[1], generator=generator) * 3 - 1
    bias = torch.randn(shape[1], generator=generator) * 3
    gradient = torch.randn(shape, generator=generator)
    return laid_out(x.to(dtype), layout), weight, bias, laid_out(gradient.to(dtype), layout)


def plain(x, weight, bias, low, high, eps=EPS):
    return F.batch_norm(x, None, None, weight, bias, True, eps=eps).clamp(low, high)


def norm_relu6(x, weight, bias):
    return batch_norm_clamp(x, weight, bias, low=0, high=6, eps=EPS)[0]


def four(function, x, weight, bias, gradient, dtype=None):
    """Returns the output and the gradients of (x, weight, bias), with all tensors in `dtype`."""
    leaves = [each.detach().to(dtype or each.dtype).requires_grad_() for each in (x, weight, bias)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype))


def check(shape, dtype, layout, limits=RELU6, eps=EPS, **how):
    x, weight, bias, gradient = drawn(shape, dtype, layout, **how)
    low, high = limits
    y = plain(x.double(), weight.double(), bias.double(), *NONE, eps)
    # A value at a limit may round to either side of it, which decides over its whole gradient.
    near = ((y - low).abs() < 0.05) | ((y - high).abs() < 0.05)
    gradient = gradient.masked_fill(near, 0)
    fused = four(lambda *leaves: batch_norm_clamp(*leaves, low=low, high=high, eps=eps)[0], x, weight, bias,
                 gradient)
    eager = four(lambda *leaves: plain(*leaves, low, high, eps), x, weight, bias, gradient)
    truth = four(lambda *leaves: plain(*leaves, low, high, eps), x, weight, bias, gradient, torch.float64)
    assert fused[0].is_contiguous(memory_format=torch.channels_last) and fused[0].dtype == dtype
    # A mean in float32 has the rounding of the values, which small deviations magnify.
    variance = x.double().var((0, 2, 3), correction=0).min().item()
    rounding = 8 * torch.finfo(torch.float32).eps * x.abs().max().item() / math.sqrt(variance + eps)
    for name, *tensors in zip(NAMES, fused, eager, truth, strict=True):
        assert_three_way(name, *tensors, rounding * max(1, tensors[-1].abs().max().item()))


def test_cpu_uses_the_cpp_form():
    forms = dispatch.implementations("cpu")
    assert forms["batch_norm_clamp"] == forms["batch_norm_clamp_backward"] == "cpp"


@given(
    n=st.integers(1, 3), c=st.sampled_from([1, 3, 15, 16, 17, 32, 40]), height=st.integers(1, 9),
    width=st.integers(2, 9), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS),
    limits=st.sampled_from([RELU6, NONE, (0.0, math.inf), (-1.0, 1.0)]),
    spread_shift=st.sampled_from([(1e-3, 0.0), (1.0, 0.0), (1.0, 4.0), (50.0, -30.0)]),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_same_as_batch_norm_and_clamp(n, c, height, width, dtype, layout, limits, spread_shift, seed):
    spread, shift = spread_shift
    check((n, c, height, width), dtype, layout, limits, spread=spread, shift=shift, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 96, 61, 60), (2, 672, 16, 17), (3, 24, 90, 90), (1, 1152, 9, 9)])
def test_shapes_of_efficientnet(shape, dtype):
    """Several chunks, of which the last is shorter."""
    check(shape, dtype, "channels_last")


def test_statistics_are_those_of_the_batch():
    x, weight, bias, _ = drawn((4, 20, 50, 70), torch.bfloat16, "channels_last", shift=100.0)
    _, mean, variance = batch_norm_clamp(x, weight, bias, eps=EPS)
    expected, expected_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=0)


def test_variance_of_large_equal_values_is_zero():
    x = torch.full((8, 16, 64, 64), 1e4).to(memory_format=torch.channels_last)
    out, mean, variance = batch_norm_clamp(x, torch.ones(16), torch.full((16,), 0.5), eps=EPS)
    assert not variance.any() and (mean == 1e4).all() and (out == 0.5).all()


@given(seed=st.integers(0, 2**32 - 1), limits=st.sampled_from([RELU6, NONE]))
def test_reference_is_the_gradient_of_batch_norm(seed, limits):
    case = drawn((2, 5, 6, 7), torch.float64, "contiguous", seed)
    x, weight, bias, gradient = (each.double() for each in case)
    out, mean, variance = reference.batch_norm_clamp(x, weight, bias, *limits, EPS)
    found = reference.batch_norm_clamp_backward(gradient, x, mean, variance, weight, bias, *limits, EPS)
    truth = four(lambda *leaves: plain(*leaves, *limits), x, weight, bias, gradient)
    for mine, theirs in zip((out, *found), truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_number_of_threads(dtype):
    x, weight, bias, gradient = drawn((3, 72, 40, 41), dtype, "channels_last")
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        out, mean, variance = OP(x, weight, bias, *RELU6, EPS)
        found.append((out, mean, variance, *BACKWARD(gradient, x, mean, variance, weight, bias, *RELU6, EPS)))
    for again in found[1:]:
        assert all(map(torch.equal, found[0], again))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_does_not_change_a_bit(layout):
    x, weight, bias, gradient = drawn((2, 19, 9, 11), torch.bfloat16, "channels_last")
    expected = four(norm_relu6, x, weight, bias, gradient)
    found = four(norm_relu6, laid_out(x, layout), weight, bias, laid_out(gradient, layout))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_propagate_within_their_channel(dtype):
    for value in (math.nan, math.inf):
        x, weight, bias, gradient = drawn((1, 3, 8, 8), dtype, "channels_last")
        x[0, 1, 4, 4] = value
        out, grad_x, grad_weight, grad_bias = four(norm_relu6, x, weight, bias, gradient)
        assert out[0, 1].isnan().all() and grad_x[0, 1].isnan().all() and grad_weight[1].isnan()
        for healthy in (out[0, ::2], grad_x[0, ::2], grad_weight[::2], grad_bias[::2]):
            assert healthy.isfinite().all()


@pytest.mark.parametrize("limits", [RELU6, NONE])
def test_gradcheck_in_float64(limits):
    x, weight, bias, _ = drawn((2, 3, 4, 5), torch.float64, "contiguous")
    leaves = [each.double().requires_grad_() for each in (x, weight, bias)]
    torch.autograd.gradcheck(lambda *leaves: OP(*leaves, *limits, EPS)[0], leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, dtype):
    x, weight, bias, gradient = drawn((2, 3, 6, 7), dtype, layout)
    leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
    torch.library.opcheck(OP, (*leaves, *RELU6, EPS))
    _, mean, variance = OP(x, weight, bias, *RELU6, EPS)
    torch.library.opcheck(BACKWARD, (gradient, x, mean, variance, weight, bias, *RELU6, EPS))


@pytest.mark.parametrize(("x", "weight", "bias", "match"), [
    ((2, 5, 5), 5, 5, "x must be"), ((1, 2, 5, 5), 3, 2, "x must be"), ((1, 2, 5, 5), 2, 3, "x must be"),
    ((1, 2, 1, 1), 2, 2, "more than 1 value"), ((0, 2, 5, 5), 2, 2, "more than 1 value"),
    ((2, 0, 5, 5), 0, 0, "more than 1 value"),
])  # fmt: skip
def test_wrong_shapes_are_named(x, weight, bias, match):
    with pytest.raises(ValueError, match=match):
        batch_norm_clamp(torch.zeros(x), torch.zeros(weight), torch.zeros(bias), eps=EPS)


def test_second_derivative_is_refused():
    x, weight, bias, _ = drawn((1, 2, 9, 9), torch.float32, "contiguous")
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(batch_norm_clamp(x, weight, bias, eps=EPS)[0].sum(), x, create_graph=True)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("activation", [None, nn.ReLU6(inplace=True)])
def test_layer_keeps_the_running_averages_of_batch_norm(activation, momentum):
    fused, eager = (kind(20, eps=EPS, momentum=momentum) for kind in (layers.BatchNorm, nn.BatchNorm2d))
    for _ in range(3):
        x = torch.randn(2, 20, 7, 9) * 3 + 1
        found = layers.normalised(fused, x, activation)
        assert "batch_norm_clamp" in type(found.grad_fn).__name__
        expected = eager(x)
        torch.testing.assert_close(found, expected if activation is None else activation(expected))
    torch.testing.assert_close(fused.state_dict(), eager.state_dict())
    with torch.no_grad():
        layers.normalised(fused, x, activation), eager(x)
    assert int(fused.num_batches_tracked) == 4
    torch.testing.assert_close(fused.state_dict(), eager.state_dict())
    fused.eval(), eager.eval()
    eager.load_state_dict(fused.state_dict())
    expected = eager(x)
    assert torch.equal(layers.normalised(fused, x.clone(), activation),
                       expected if activation is None else activation(expected))
    assert int(fused.num_batches_tracked) == 4


def test_layer_leaves_other_norms_alone():
    x = torch.randn(2, 4, 5, 5)
    assert layers.normalised(nn.Identity(), x) is x
    assert torch.equal(layers.normalised(nn.Identity(), x.clone(), nn.ReLU6(inplace=True)), F.relu6(x))
    plain = layers.BatchNorm(4)
    plain.fused = False
    for norm in (nn.BatchNorm2d(4), plain, layers.BatchNorm(4).double()):
        out = layers.normalised(norm, x.to(norm.weight.dtype).requires_grad_())
        assert "stpp" not in type(out.grad_fn).__name__.lower()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_uses_the_layers_of_pytorch():
    norm, x = layers.BatchNorm(8).cuda(), torch.randn(2, 8, 9, 9, device="cuda", requires_grad=True)
    out = layers.normalised(norm, x, nn.ReLU6(inplace=True))
    assert "Hardtanh" in type(out.grad_fn).__name__
    found, *_ = OP(x.detach(), norm.weight, norm.bias, *RELU6, norm.eps)
    torch.testing.assert_close(found, out.detach(), rtol=1e-4, atol=1e-5)
