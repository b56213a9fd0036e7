"""Counted operations of the operators equal those of the convolution that they replace."""

import pytest
import torch
import torch.nn.functional as F

from stpp_kernels import depthwise_conv, dilated_conv3x3, flops


def counted(function, x, weight, *, backward: bool) -> int:
    with flops.counter() as found:
        out = function(x, weight, 3)
        if backward:
            out.sum().backward()
    return found.get_total_flops()


def plain(x, weight, dilation):
    return F.conv2d(x, weight, padding=dilation, dilation=dilation)


@pytest.mark.parametrize(("for_x", "for_weight"),
                         [(False, False), (True, False), (False, True), (True, True)])
def test_dilated_convolution_counts_like_a_plain_one(for_x, for_weight):
    x = torch.randn(2, 4, 7, 9, requires_grad=for_x)
    weight = torch.randn(5, 4, 3, 3, requires_grad=for_weight)
    backward = for_x or for_weight
    found = counted(dilated_conv3x3, x, weight, backward=backward)
    assert found == counted(plain, x, weight, backward=backward)
    assert found == (1 + for_x + for_weight) * 2 * 2 * 5 * 7 * 9 * 4 * 9


@pytest.mark.parametrize(("for_x", "for_weight"),
                         [(False, False), (True, False), (False, True), (True, True)])
def test_depthwise_convolution_counts_only_its_own_taps(for_x, for_weight):
    x = torch.randn(2, 4, 7, 9, requires_grad=for_x)
    weight = torch.randn(4, 1, 5, 5, requires_grad=for_weight)

    def operator(x, weight, stride):
        return depthwise_conv(x, weight, stride=stride, padding=(2, 2, 2, 2))

    def plain(x, weight, stride):
        return F.conv2d(x, weight, stride=stride, padding=2, groups=4)

    forward = 2 * 2 * 4 * 3 * 3 * 25
    found = counted(operator, x, weight, backward=for_x or for_weight)
    assert found == (1 + for_x + for_weight) * forward
    assert counted(plain, x, weight, backward=for_x or for_weight) == found


def test_transposed_and_grouped_convolutions_count_their_products():
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    for function, shape in ((F.conv_transpose2d, (4, 3, 2, 2)), (F.conv2d, (6, 2, 3, 3))):
        groups = 1 if function is F.conv_transpose2d else 2
        weight = torch.randn(shape, requires_grad=True)

        def convolve(a, b, _, function=function, groups=groups):
            return function(a, b, groups=groups)

        once = counted(convolve, x, weight, backward=False)
        assert counted(convolve, x, weight, backward=True) == 3 * once


def test_importing_the_operators_does_not_import_the_counter():
    import subprocess
    import sys

    code = "import sys, stpp_kernels.flops; print('torch.utils.flop_counter' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["False"], ran.stderr
