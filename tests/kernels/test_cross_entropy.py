"""upsample_cross_entropy against eager: values, gradients, wrong labels, layouts, determinism, tracing,
training."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_cases import (
    DTYPES,
    FORMS,
    LAYOUTS,
    LOGIT_ULP,
    TRITON,
    LossCase,
    assert_three_way,
    device_of,
    eager_loss,
    fused_loss,
    laid_out,
    loss_cases,
)
from stpp_kernels import reference, upsample_cross_entropy

OP = torch.ops.stpp_kernels.upsample_cross_entropy.default
EPS = torch.finfo(torch.float32).eps


def check(form: str, case: LossCase) -> None:
    logits, labels, weights = case.tensors(device_of(form))
    loss, counted, gradient = fused_loss(form, logits, labels, **weights)
    truth, true_gradient = eager_loss(logits, labels, **weights, compute=torch.float64)
    eager, eager_gradient = eager_loss(logits, labels, **weights)
    assert loss.dtype == torch.float32 and counted.dtype == torch.int64 and gradient.dtype == logits.dtype
    assert counted.item() == (labels != 255).sum().item()
    assert_three_way("loss", loss, eager, truth, slack=2 * LOGIT_ULP * EPS * case.magnitude * labels.numel())
    assert_three_way("gradient", gradient, eager_gradient, true_gradient, slack=case.slack())


@pytest.mark.parametrize("form", [form for form in FORMS if form is not TRITON])
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_loss_and_gradient_satisfy_the_three_way_rule(form, data):
    check(form, data.draw(loss_cases(form)))


@pytest.mark.parametrize("form", [TRITON])
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_three_way_rule_interpreted(form, data):
    check(form, data.draw(loss_cases(form)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 1), (33, 1), (1, 40), (33, 41), (30, 35), (9, 11), (4, 3)])
def test_factors_up_down_and_degenerate(form, size):
    check(form, LossCase(1, 19, (9, 11), size, torch.float32, torch.uint8, "contiguous", 3.0, 0.2, True, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_shapes(dtype, layout):
    check("cpu", LossCase(2, 21, (81, 81), (321, 321), dtype, torch.uint8, layout, 3.0, 0.1, False, 1))


def _extreme(kind: str) -> torch.Tensor:
    """Builds logits [1, 5, 5, 6] whose corners disagree, so that their maxima do not bound the pixels between
    them closely."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 5, 5, 6, generator=generator)
    corner = torch.randint(5, (1, 1, 5, 6), generator=generator)
    chosen = torch.zeros(1, 5, 5, 6).scatter_(1, corner, 1.0)
    checkered = ((torch.arange(5)[:, None] + torch.arange(6)) % 2 * 2 - 1).float()
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0]).view(1, 5, 1, 1)
    return {
        "opposite corners": 1e4 * checkered * sign + noise,
        "every corner its own class": 2e4 * chosen - 1e4 + noise,
        "all below": 2e4 * chosen - 3e4 + noise,
        "near the limit of the bound": 44.0 * chosen + noise,
        "above the limit": 60.0 * chosen + noise,
        "just out of float32's exponentials": 176.0 * chosen + noise,
        "one cell of many": noise
        + torch.zeros(1, 5, 5, 6).index_fill_(3, torch.tensor([2]), 1.0) * 1e4 * sign,
        "beyond 2^20": 1e7 * noise,
        "equal classes far up": noise * 0 + 1e4,
    }[kind]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [
    "opposite corners", "every corner its own class", "all below", "near the limit of the bound",
    "above the limit",
    "just out of float32's exponentials", "one cell of many", "beyond 2^20", "equal classes far up",
])  # fmt: skip
def test_corners_that_disagree(form, kind):
    logits = _extreme(kind).to(device_of(form))
    size = (13, 17)  # pixels at the corners, at the middle of the cells and between
    labels = torch.randint(5, (1, *size), generator=torch.Generator().manual_seed(1)).to(device_of(form))
    loss, counted, gradient = fused_loss(form, logits, labels)
    truth, true_gradient = eager_loss(logits, labels, compute=torch.float64)
    eager, eager_gradient = eager_loss(logits, labels)
    largest = logits.abs().max().item()
    case = LossCase(1, 5, (5, 6), size, torch.float32, torch.int64, "contiguous", largest, 0.0, False, 0)
    assert counted.item() == labels.numel()
    assert_three_way("loss", loss, eager, truth, slack=2 * LOGIT_ULP * EPS * largest * labels.numel())
    assert_three_way("gradient", gradient, eager_gradient, true_gradient, slack=case.slack())


@pytest.mark.parametrize("form", [TRITON])
@pytest.mark.parametrize("search", [False, True])
def test_bound_and_search_agree(form, search, monkeypatch):
    """Moderate logits whose corners' maxima differ by up to 40 nats: the bound is used, and is as good as the
    largest logit."""
    from stpp_kernels.triton import cross_entropy

    logits = 40.0 * torch.rand(1, 4, 4, 5, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(4, (1, 11, 14), generator=torch.Generator().manual_seed(3))
    if search:
        monkeypatch.setattr(cross_entropy, "MAX_GAP", cross_entropy.tl.constexpr(-1.0))
    loss, _, gradient = fused_loss(form, logits, labels)
    truth, true_gradient = eager_loss(logits, labels, compute=torch.float64)
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=0, atol=4e-5)


@pytest.mark.parametrize("form", [TRITON])
@pytest.mark.parametrize("launch", [(8, 1, 1), (16, 2, 5), (512, 4, 8192)])
def test_launch_settings_change_only_rounding(form, launch):
    from stpp_kernels.triton.cross_entropy import Launch
    from stpp_kernels.triton.cross_entropy import upsample_cross_entropy as raw

    tile, warps, programs = launch
    case = LossCase(1, 5, (5, 7), (9, 13), torch.float32, torch.uint8, "channels_last", 3.0, 0.2, True, 4)
    logits, labels, weights = case.tensors()
    arguments = (logits, labels, weights["class_weight"], weights["pixel_weight"], 255, True)
    expected = raw(*arguments)
    found = raw(*arguments, Launch(tile=tile, warps=warps, programs=programs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [TRITON])
@pytest.mark.parametrize(("classes", "size"), [(150, (9, 14)), (255, (6, 5))])
def test_many_classes_interpreted(form, classes, size):
    check(form, LossCase(1, classes, (3, 5), size, torch.bfloat16, torch.uint8, "channels_last", 3.0, 0.2,
                         True, 7))


@pytest.mark.slow
@pytest.mark.parametrize("form", [TRITON])
@pytest.mark.parametrize("classes", [19, 150])
@pytest.mark.timeout(900)
def test_maps_of_crop_513_interpreted(form, classes):
    from stpp_kernels.triton.cross_entropy import Launch
    from stpp_kernels.triton.cross_entropy import upsample_cross_entropy as raw

    case = LossCase(1, classes, (65, 65), (129, 513), torch.float32, torch.uint8, "channels_last", 3.0, 0.1,
                    False, 8)
    logits, labels, _ = case.tensors()
    # 64 cells: the interpreter is slow for every pixel position of a block
    tile = 64 * 2 ** (classes - 1).bit_length()
    loss, counted, gradient = raw(logits, labels, None, None, 255, True, Launch(tile=tile))
    truth, true_gradient = eager_loss(logits, labels, compute=torch.float64)
    eager, eager_gradient = eager_loss(logits, labels)
    assert counted.item() == (labels != 255).sum().item()
    assert_three_way("loss", loss, eager, truth, slack=2 * LOGIT_ULP * EPS * case.magnitude * labels.numel())
    assert_three_way("gradient", gradient, eager_gradient, true_gradient, slack=case.slack())


@pytest.mark.parametrize("form", FORMS)
def test_all_ignored_is_zero_without_nan(form):
    logits = torch.full((2, 5, 3, 4), 1e4, device=device_of(form))
    logits[:, 1] = -1e4
    labels = torch.full((2, 9, 10), 255, dtype=torch.uint8, device=device_of(form))
    loss, counted, gradient = fused_loss(form, logits, labels)
    assert loss.item() == 0 and counted.item() == 0
    assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("form", ["cpu", "reference", TRITON])
@pytest.mark.parametrize(("wrong", "dtype"),
                         [(21, torch.uint8), (254, torch.uint8), (-1, torch.int64), (2**40, torch.int64)])
def test_label_out_of_range_is_an_error(form, wrong, dtype):
    logits, labels = torch.randn(1, 21, 3, 3), torch.zeros(1, 7, 18, dtype=dtype)
    labels[0, 6, 17] = wrong
    with pytest.raises(RuntimeError if form == "triton" else ValueError, match="outside"):
        fused_loss(form, logits, labels)
    with pytest.raises(RuntimeError if form == "triton" else ValueError, match="outside"):
        fused_loss(form, logits, labels, class_weight=torch.ones(21))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ignore_index", [-100, 0, 3, 2**40])
def test_any_ignore_index(form, ignore_index):
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 5, 4, 4,
                                 device=device_of(form)), torch.randint(5, (1, 9, 9), device=device_of(form))
    labels[0, :3] = ignore_index
    loss, counted, gradient = fused_loss(form, logits, labels, ignore_index=ignore_index)
    eager, eager_gradient = eager_loss(logits, labels, ignore_index=ignore_index)
    assert counted.item() == (labels != ignore_index).sum().item()
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(gradient, eager_gradient)


@pytest.mark.parametrize("form", FORMS)
def test_weight_of_zero_counts_without_cost(form):
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 4, 4, device=device_of(form))
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8, device=device_of(form))
    loss, counted, gradient = fused_loss(form, logits, labels,
                                         pixel_weight=torch.zeros(1, 8, 8, device=device_of(form)))
    assert loss.item() == 0 and counted.item() == 64 and not gradient.any()


def test_gradient_of_the_mean_and_of_a_repeated_backward():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 5, 6, requires_grad=True), torch.randint(4, (2, 17, 19))
    loss, counted = upsample_cross_entropy(logits, labels)
    mean = loss / counted
    full = F.interpolate(logits, (17, 19), mode="bilinear", align_corners=True)
    (expected,) = torch.autograd.grad(F.cross_entropy(full, labels), logits)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(mean, logits, retain_graph=True)[0], expected)
    with torch.no_grad():
        assert not upsample_cross_entropy(logits, labels)[0].requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_float16_gradient_survives_sums_beyond_its_range(form):
    logits = torch.zeros(1, 2, 1, 1, dtype=torch.float16, device=device_of(form))
    side = 8 if form == "triton" else 600  # 360000 pixels contribute to one logit
    labels = torch.zeros(1, side, side, dtype=torch.uint8, device=device_of(form))
    if form in ("cpu", "cuda"):
        logits.requires_grad_()
        loss, counted = upsample_cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss / counted * 1024, logits)
        assert gradient.flatten().tolist() == [-512.0, 512.0]
    else:
        raw = {"reference": reference.upsample_cross_entropy}.get(form)
        if raw is None:
            from stpp_kernels.triton.cross_entropy import upsample_cross_entropy as raw
        assert raw(logits, labels, None, None, 255,
                   True)[2].flatten().tolist() == [-side * side / 2, side * side / 2]


def test_gradient_keeps_the_layout_of_the_logits():
    for layout in ("contiguous", "channels_last"):
        logits = laid_out(torch.randn(2, 5, 6, 7), layout).bfloat16()
        assert fused_loss("cpu", logits,
                          torch.zeros(2, 20, 20, dtype=torch.uint8))[2].stride() == logits.stride()


def test_same_bits_for_any_number_of_threads_and_every_run():
    case = LossCase(3, 21, (41, 41), (161, 163), torch.float32, torch.uint8, "channels_last", 3.0, 0.2, True,
                    5)
    logits, labels, weights = case.tensors()
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(fused_loss("cpu", logits, labels, **weights))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_of_full_size_is_allocated():
    logits = torch.randn(4, 21, 41, 41, requires_grad=True)
    labels = torch.randint(21, (4, 161, 161)).to(torch.uint8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        upsample_cross_entropy(logits, labels)[0].backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = [event.nbytes() for event in events if event.nbytes() > 0]
    full = 4 * 4 * 21 * 161 * 161  # bytes of the logits at full size, of which eager holds three
    assert allocated and sum(allocated) < 3 * full / 8, (allocated, full)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_is_deterministic_without_synchronisation():
    case = LossCase(4, 21, (41, 41), (161, 163), torch.bfloat16, torch.uint8, "channels_last", 3.0, 0.2, True,
                    5)
    logits, labels, weights = case.tensors("cuda")
    first = fused_loss("cuda", logits, labels, **weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [fused_loss("cuda", logits, labels, **weights) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for other in again:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_images_are_independent():
    logits, labels, _ = LossCase(3, 4, (9, 9), (33, 33), torch.float32, torch.int64, "contiguous", 3.0, 0.2,
                                 False, 6).tensors()
    alone = fused_loss("cpu", logits[1:2], labels[1:2])[2]
    torch.testing.assert_close(fused_loss("cpu", logits, labels)[2][1:2], alone, rtol=0, atol=1e-6)


def test_autocast_does_not_cast_the_logits():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 5, 6, 6, requires_grad=True), torch.randint(5, (1, 21, 21))
    plain = upsample_cross_entropy(logits, labels)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(upsample_cross_entropy(logits, labels)[0], plain)
        double = upsample_cross_entropy(logits.double(), labels)[0]  # computed by the plain form
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), plain)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(with_gradient, dtype):
    case = LossCase(2, 5, (4, 6), (9, 20), dtype, torch.uint8, "channels_last", 3.0, 0.2, True, 2)
    logits, labels, weights = case.tensors()
    logits = logits.requires_grad_(with_gradient)
    torch.library.opcheck(OP, (logits, labels, weights["class_weight"], weights["pixel_weight"], 255,
                               with_gradient))


def test_gradcheck_in_float64():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 3, 4, dtype=torch.float64,
                                 requires_grad=True), torch.randint(3, (2, 7, 5))
    labels[0, 0] = 255
    weight = torch.rand(2, 7, 5)
    torch.autograd.gradcheck(lambda z: upsample_cross_entropy(z, labels, pixel_weight=weight)[0], (logits,))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logits": torch.zeros(1, 3, 4)}, "logits must be"),
        ({"logits": torch.zeros(1, 300, 4, 4)}, "256 classes"),
        ({"labels": torch.zeros(2, 8, 8, dtype=torch.uint8)}, "labels must be"),
        ({"labels": torch.zeros(1, 8, 8, dtype=torch.int32)}, "labels must be"),
        ({"class_weight": torch.ones(4)}, "class_weight must be"),
        ({"pixel_weight": torch.ones(1, 4, 4)}, "pixel_weight must be"),
    ],
)
def test_wrong_arguments_are_named(change, match):
    arguments = {"logits": torch.zeros(1, 3, 4, 4),
                 "labels": torch.zeros(1, 8, 8, dtype=torch.uint8)} | change
    with pytest.raises(ValueError, match=match):
        upsample_cross_entropy(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def _trained(loss_of, steps: int = 20) -> list[float]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4, padding=1), torch.nn.ReLU(),
                                torch.nn.Conv2d(8, 5, 1)).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    images, labels = torch.randn(4, 3, 33, 33), torch.randint(5, (4, 33, 33))
    labels[:, :4] = 255
    losses = []
    for _ in range(steps):
        loss = loss_of(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_follows_eager_for_twenty_steps():
    def fused(logits, labels):
        loss, counted = upsample_cross_entropy(logits, labels)
        return loss / counted

    def eager(logits, labels):
        full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
        return F.cross_entropy(full, labels, ignore_index=255)

    mine, theirs = _trained(fused), _trained(eager)
    assert mine[-1] < mine[0]
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    @torch.compile(fullgraph=True, dynamic=True)
    def step(logits, labels):
        loss, counted = upsample_cross_entropy(logits * 2, labels)
        return loss / counted

    for size in (9, 13):
        logits, labels = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randint(3, (1, size, size))
        (gradient,) = torch.autograd.grad(step(logits, labels), logits)
        loss, expected = eager_loss(logits.detach() * 2, labels)
        torch.testing.assert_close(gradient, 2 * expected / labels.numel())


@pytest.mark.parametrize("form", ["cpu", "reference", TRITON])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_logits_are_not_hidden(form, bad):
    logits, labels = torch.randn(1, 5, 4, 4), torch.randint(5, (1, 9, 9))
    logits[0, 2] = bad
    loss, _, gradient = fused_loss(form, logits, labels)
    assert not loss.isfinite() and not gradient.isfinite().all()


def test_second_derivative_is_refused():
    logits, labels = torch.randn(1, 5, 4, 4, requires_grad=True), torch.randint(5, (1, 9, 9))
    loss, _ = upsample_cross_entropy(logits, labels)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("form", ["cpu", "reference"])
def test_weights_of_any_float_type_are_constants(form):
    logits, labels = torch.randn(1, 5, 4, 4), torch.randint(5, (1, 9, 9))
    weight = torch.rand(1, 9, 9, dtype=torch.float64)
    expected = fused_loss(form, logits, labels, pixel_weight=weight.float())[0]
    torch.testing.assert_close(fused_loss(form, logits, labels, pixel_weight=weight)[0], expected)
    assert not upsample_cross_entropy(logits, labels,
                                      pixel_weight=weight.float().requires_grad_())[0].requires_grad
