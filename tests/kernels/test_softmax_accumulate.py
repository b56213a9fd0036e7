"""softmax_accumulate and finalize against the two-step eager form: values, mirrors, layouts, edges,
tracing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stpp_kernels
from kernels_cases import FORMS, device_of, laid_out
from kernels_label_cases import QUICK, accumulate, cases, finalize, probability_tolerance, resized, worst
from stpp.inference import views

ACCUMULATE = torch.ops.stpp_kernels.softmax_accumulate.default
FINALIZE = torch.ops.stpp_kernels.finalize.default


def eager(logits, scaled, size, flip):
    """Computes the two-step form in the dtype of the logits."""
    probabilities = resized(logits, scaled).softmax(1)
    return resized(probabilities.flip(3) if flip else probabilities, size).float()


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(QUICK, max_examples=25)
def test_accumulation_matches_the_eager_form(form, data):
    case, flip = data.draw(cases(form)), data.draw(st.booleans())
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "sliced"]))
    logits = case.logits(device_of(form))
    before = torch.rand(case.n, case.c, *case.size)
    acc = laid_out(before.clone(), layout).to(device_of(form))
    before = before.to(acc.device)
    accumulate(form, acc, logits, case.scaled, case.size, flip)
    truth = before + eager(logits.float(), case.scaled, case.size, flip)
    coarse = before + eager(logits, case.scaled, case.size, flip)
    allowed = 2 * (coarse - truth).abs().max().item() + probability_tolerance(logits)
    assert (acc - truth).abs().max().item() <= allowed, worst(acc, truth)
    added = (acc - before).sum(1)
    assert (added - 1).abs().max() < 1e-4  # whatever the classes, every pixel gains one probability mass


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.5, 0.75, 1, 1.5, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_scales_of_test_time_augmentation(form, scale, flip):
    torch.manual_seed(3)
    height, width = (5, 7) if form == "triton" else (90, 121)
    classes = 3 if form == "triton" else 11
    scaled = (int(height * scale), int(width * scale))
    logits = 4 * torch.randn(1, classes, scaled[0] // 4 + 1, scaled[1] // 4 + 1, device=device_of(form))
    acc = torch.zeros(1, classes, height, width, device=logits.device)
    accumulate(form, acc, logits, scaled, (height, width), flip)
    accumulate(form, acc, logits, scaled, (height, width), flip)
    truth = 2 * eager(logits, scaled, (height, width), flip)
    assert (acc - truth).abs().max() < 2e-6, worst(acc, truth)


@pytest.mark.parametrize("form", FORMS)
def test_mirrored_logits_give_the_mirrored_view(form):
    torch.manual_seed(4)
    logits = torch.randn(1, 3, 4, 5, device=device_of(form))
    straight, mirrored = (torch.zeros(1, 3, 9, 14, device=logits.device) for _ in range(2))
    accumulate(form, straight, logits, (8, 11), (9, 14), False)
    accumulate(form, mirrored, logits.flip(3), (8, 11), (9, 14), True)
    torch.testing.assert_close(straight, mirrored, atol=3e-6, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(QUICK, max_examples=15)
def test_pair_equals_two_calls(form, data):
    case, flip = data.draw(cases(form)), data.draw(st.booleans())
    first, second = case.logits(device_of(form)), replace(case, seed=case.seed ^ 1).logits(device_of(form))
    together, apart = (torch.ones(case.n, case.c, *case.size, device=first.device) for _ in range(2))
    accumulate(form, together, laid_out(torch.cat([first, second]), case.layout), case.scaled, case.size,
               flip, pair=True)
    accumulate(form, apart, first, case.scaled, case.size, flip)
    accumulate(form, apart, second, case.scaled, case.size, not flip)
    if form == "cuda":  # two kernels: the compiler may fuse products and sums differently
        torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    else:
        assert torch.equal(together, apart)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("classes", "source", "scaled", "size"),
    [(150, (3, 5), (4, 13), (3, 20)), (3, (65, 65), (9, 513), (12, 342))]
)
def test_many_classes_and_maps_of_crop_513(form, classes, source, scaled, size):
    torch.manual_seed(7)
    logits = (torch.randn(2, classes,
                          *source) * 5).contiguous(memory_format=torch.channels_last).to(device_of(form))
    acc = torch.zeros(1, classes, *size, device=logits.device)
    accumulate(form, acc, logits, scaled, size, False, pair=True)
    truth = eager(logits[:1], scaled, size, False) + eager(logits[1:], scaled, size, True)
    assert (acc - truth).abs().max() <= 2 * probability_tolerance(logits), worst(acc, truth)
    mask, mean, counts = finalize(form, acc)
    assert torch.equal(acc.gather(1, mask.long()[:, None])[:, 0],
                       acc.amax(1)) and counts.sum() == mask.numel()
    torch.testing.assert_close(mean, (acc.amax(1) / acc.sum(1)).mean((1, 2)), atol=1e-5, rtol=0)


def test_pairs_of_views_equal_single_views():
    def logits(view):
        return 3 * torch.nn.functional.avg_pool2d(view, 4, ceil_mode=True)

    torch.manual_seed(6)
    images, size = torch.randn(2, 3, 37, 53), (37, 53)
    expected = torch.zeros(2, 3, *size)
    for scale in views.VIEWS["stpp"][0]:
        scaled = (int(37 * scale), int(53 * scale))
        view = images if scaled == size else resized(images, scaled)
        view = torch.cat([view, view.flip(3)]).contiguous(memory_format=torch.channels_last)
        for flip, low in zip((False, True), logits(view).split(2), strict=True):
            stpp_kernels.softmax_accumulate(expected, low, scaled, size, flip)
    assert torch.equal(views.accumulate_views(logits, images, "stpp", 3), expected)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(QUICK, max_examples=20)
def test_finalize_counts_and_averages(form, data):
    case = data.draw(cases(form))
    acc = laid_out(torch.rand(case.n, case.c, *case.size) + 1e-3, case.layout).to(device_of(form))
    if data.draw(st.booleans()):
        acc = (acc * 4).ceil()  # full of ties
    mask, mean, counts = finalize(form, acc)
    value, _ = acc.max(1)
    chosen = mask.long()[:, None]
    assert mask.dtype == torch.uint8 and mean.dtype == torch.float32 and counts.dtype == torch.int64
    assert torch.equal(acc.gather(1, chosen)[:, 0], value)
    earlier = torch.arange(case.c, device=acc.device).view(1, -1, 1, 1) < chosen
    assert not (earlier & (acc == value[:, None])).any()  # the lowest class of a tie
    expected = (value.double() / acc.double().sum(1)).flatten(1).mean(1)
    assert (mean - expected).abs().max() < 2e-6, worst(mean, expected)
    per_image = [torch.bincount(image.flatten().long(), minlength=case.c) for image in mask]
    assert torch.equal(counts, torch.stack(per_image))


def test_ten_views_give_the_mask_of_the_eager_form():
    torch.manual_seed(5)
    size = (61, 83)
    acc, truth = torch.zeros(1, 19, *size), torch.zeros(1, 19, *size)
    for scale in (0.5, 0.75, 1, 1.5, 2):
        for flip in (False, True):
            scaled = (int(size[0] * scale), int(size[1] * scale))
            logits = 4 * torch.randn(1, 19, scaled[0] // 4 + 1, scaled[1] // 4 + 1)
            stpp_kernels.softmax_accumulate(acc, logits, scaled, size, flip)
            truth += eager(logits, scaled, size, flip)
    top = truth.topk(2, dim=1).values
    apart = top[:, 0] - top[:, 1] > 1e-4
    mask, mean, _ = stpp_kernels.finalize(acc)
    assert apart.float().mean() > 0.99 and torch.equal(mask[apart], truth.argmax(1)[apart].byte())
    torch.testing.assert_close(mean, (truth.amax(1) / truth.sum(1)).mean((1, 2)), atol=1e-5, rtol=0)


def test_results_do_not_depend_on_the_number_of_threads():
    logits = torch.randn(2, 21, 23, 31)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        acc = torch.zeros(2, 21, 60, 80)
        for scaled in ((30, 40), (60, 80), (120, 160)):
            stpp_kernels.softmax_accumulate(acc, logits, scaled, (60, 80), True)
        found.append((acc, *stpp_kernels.finalize(acc)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_empty_batch_and_float64_logits():
    acc = torch.zeros(0, 3, 5, 6)
    stpp_kernels.softmax_accumulate(acc, torch.zeros(0, 3, 2, 2), (4, 4), (5, 6), False)
    mask, mean, counts = stpp_kernels.finalize(acc)
    assert mask.shape == (0, 5, 6) and mean.shape == (0,) and counts.shape == (0, 3)
    acc, logits = torch.zeros(1, 3, 5, 6), torch.randn(1, 3, 2, 2, dtype=torch.float64)
    stpp_kernels.softmax_accumulate(acc, logits, (4, 4), (5, 6), False)
    torch.testing.assert_close(acc, eager(logits, (4, 4), (5, 6), False), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "acc, logits, scaled, size, error, text",
    [
        (torch.zeros(1, 3, 5, 6), torch.zeros(1, 3, 2, 2), (4, 4), (6, 5), ValueError, "the sum has shape"),
        (torch.zeros(1, 4, 5, 6), torch.zeros(1, 3, 2, 2), (4, 4), (5, 6), ValueError, "the sum has shape"),
        (torch.zeros(1, 3, 5, 6), torch.zeros(1, 3, 2, 2), (0, 4), (5, 6), ValueError, "scaled_size is"),
        (torch.zeros(1, 3, 5, 1).expand(1, 3, 5, 6), torch.zeros(1, 3, 2, 2), (4, 4), (5, 6), ValueError,
         "shares memory"),
        (torch.zeros(1, 3, 5, 6).half(), torch.zeros(1, 3, 2, 2), (4, 4), (5, 6), TypeError,
         "sum is torch.float16"),
    ],
)
def test_wrong_arguments_are_named(acc, logits, scaled, size, error, text):
    with pytest.raises(error, match=text):
        stpp_kernels.softmax_accumulate(acc, logits, scaled, size, False)


@pytest.mark.parametrize(("images", "text"), [(3, "2N, C, h, w"), (4, "the sum has shape")])
def test_pair_with_a_wrong_number_of_images_is_named(images, text):
    with pytest.raises(ValueError, match=text):
        stpp_kernels.softmax_accumulate(torch.zeros(1, 3, 5, 6), torch.zeros(images, 3, 2, 2), (4, 4), (5, 6),
                                        pair=True)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype, pair):
    logits = torch.randn(4 if pair else 2, 5, 4, 6).to(dtype)
    acc = torch.rand(2, 5, 9, 7)
    torch.library.opcheck(ACCUMULATE, (acc, logits, [8, 11], [9, 7], True, pair))
    torch.library.opcheck(FINALIZE, (acc,))


def test_compiles_without_graph_break():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def label(x, flipped):
        size = (x.shape[2] * 3, x.shape[3] * 4)
        acc = x.new_zeros((x.shape[0], x.shape[1], *size))
        stpp_kernels.softmax_accumulate(acc, x + 0, (x.shape[2] * 4, x.shape[3] * 4), size, False)
        stpp_kernels.softmax_accumulate(acc, flipped + 0, (x.shape[2] * 4, x.shape[3] * 4), size, True)
        return stpp_kernels.finalize(acc), acc

    for height, width in ((4, 5), (7, 6)):
        logits = torch.randn(2, 6, height, width)
        (mask, mean, counts), acc = label(logits, logits.flip(3))
        size, scaled = (height * 3, width * 4), (height * 4, width * 4)
        truth = eager(logits, scaled, size, False) + eager(logits.flip(3), scaled, size, True)
        torch.testing.assert_close(acc, truth, atol=4e-6, rtol=0)
        assert torch.equal(mask, stpp_kernels.finalize(acc)[0]) and counts.sum() == mask.numel()
        torch.testing.assert_close(mean, (truth.amax(1) / 2).mean((1, 2)), atol=1e-5, rtol=0)


def test_nan_logits_are_not_hidden():
    acc, logits = torch.zeros(1, 3, 8, 8), torch.randn(1, 3, 4, 4)
    logits[0, 1] = float("nan")
    stpp_kernels.softmax_accumulate(acc, logits, (8, 8), (8, 8), False)
    assert acc.isnan().all()
