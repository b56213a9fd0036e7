"""upsample_argmax against resized logits: values, ties, layouts, edges, tracing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stpp_kernels
from kernels_cases import FORMS, device_of, laid_out
from kernels_label_cases import QUICK, argmax, cases, logit_tolerance, probability_tolerance, resized, worst

OP = torch.ops.stpp_kernels.upsample_argmax.default


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(QUICK, max_examples=25)
def test_mask_and_confidence_match_resized_logits(form, data):
    case = data.draw(cases(form))
    logits = case.logits(device_of(form))
    mask, confidence = argmax(form, logits, case.size)
    assert mask.dtype == torch.uint8 and confidence.dtype == torch.float32
    assert mask.shape == confidence.shape == (case.n, *case.size)
    truth, eager = resized(logits.float(), case.size), resized(logits, case.size)
    best = truth.amax(1)

    # distance of the chosen class's true logit below the largest: 0 unless two are nearly equal
    def regret(chosen):
        return (best - truth.gather(1, chosen.long()[:, None])[:, 0]).max().item()

    assert regret(mask) <= 2 * regret(eager.argmax(1)) + logit_tolerance(logits)
    probability, eager_probability = truth.softmax(1).amax(1), eager.softmax(1).amax(1).float()
    allowed = 2 * (eager_probability - probability).abs().max().item() + probability_tolerance(logits)
    assert (confidence - probability).abs().max().item() <= allowed, worst(confidence, probability)


@pytest.mark.parametrize("form", FORMS)
def test_fp32_masks_are_equal_to_eager_where_classes_are_apart(form):
    torch.manual_seed(1)
    source, size = ((4, 5), (7, 9)) if form == "triton" else ((65, 81), (257, 321))
    logits = torch.randn(2, 19, *source, device=device_of(form)) * 5
    mask, confidence = argmax(form, logits, size)
    full = resized(logits, size)
    top = full.topk(2, dim=1).values
    apart = top[:, 0] - top[:, 1] > 1e-4
    assert apart.float().mean() > 0.99
    assert torch.equal(mask[apart], full.argmax(1)[apart].byte())
    torch.testing.assert_close(confidence, full.softmax(1).amax(1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("classes", "source", "size"), [(150, (9, 13), (17, 20)), (3, (65, 65), (40, 513))])
def test_many_classes_and_maps_of_crop_513(form, classes, source, size):
    torch.manual_seed(3)
    logits = (torch.randn(1, classes,
                          *source) * 5).contiguous(memory_format=torch.channels_last).to(device_of(form))
    mask, confidence = argmax(form, logits, size)
    full = resized(logits, size)
    assert (full.amax(1) - full.gather(1, mask.long()[:, None])[:, 0]).max() <= logit_tolerance(logits)
    assert (confidence - full.softmax(1).amax(1)).abs().max() <= probability_tolerance(logits)


@pytest.mark.parametrize("form", FORMS)
def test_lowest_class_wins_a_tie(form):
    torch.manual_seed(2)
    # F.interpolate rounds channels differently, so that equal classes become unequal
    if form != "reference":
        logits = torch.randn(1, 4, 5, 6, device=device_of(form))
        mask, _ = argmax(form, torch.cat([logits, logits, logits], 1), (13, 17))
        assert torch.equal(mask, argmax(form, logits, (13, 17))[0])
    assert argmax(form, torch.zeros(1, 7, 3, 3, device=device_of(form)), (5, 20))[0].max() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_equal_size_is_plain_argmax(form, layout):
    # full of ties
    logits = laid_out(torch.randint(-3, 4, (2, 19, 7, 33)).float(), layout).to(device_of(form))
    mask, _ = argmax(form, logits, (7, 33))
    value, chosen = logits.amax(1), mask.long()[:, None]
    assert torch.equal(logits.gather(1, chosen)[:, 0], value)
    earlier = torch.arange(19, device=logits.device).view(1, 19, 1, 1) < chosen
    assert not (earlier & (logits == value[:, None])).any()


@pytest.mark.parametrize("form", FORMS)
def test_confidence_of_single_and_of_equal_classes(form):
    device = device_of(form)
    assert torch.equal(argmax(form, torch.randn(1, 1, 2, 3, device=device), (4, 5))[1].cpu(),
                       torch.ones(1, 4, 5))
    logits = torch.full((1, 8, 2, 3), -1e4, device=device)
    shares = argmax(form, logits, (4, 5))[1]
    # its log-sum-exp rounds like a logit
    allowed = probability_tolerance(logits) if form == "reference" else 1e-6
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 8), atol=allowed, rtol=0)


def test_without_confidence_only_the_mask_is_returned():
    logits = torch.randn(1, 3, 4, 4)
    mask = stpp_kernels.upsample_argmax(logits, (9, 9))
    assert torch.equal(mask, stpp_kernels.upsample_argmax(logits, (9, 9), confidence=True)[0])


def test_result_does_not_depend_on_the_number_of_threads():
    logits = torch.randn(3, 21, 31, 37)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(stpp_kernels.upsample_argmax(logits, (123, 149), confidence=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_empty_batch_and_float64():
    assert stpp_kernels.upsample_argmax(torch.zeros(0, 3, 2, 2), (5, 6)).shape == (0, 5, 6)
    logits = torch.randn(1, 5, 3, 3, dtype=torch.float64)
    mask, confidence = stpp_kernels.upsample_argmax(logits, (7, 7), confidence=True)
    assert torch.equal(mask, resized(logits, (7, 7)).argmax(1).byte()) and confidence.dtype == torch.float32


@pytest.mark.parametrize(
    "shape, dtype, size, error, text",
    [
        ((1, 300, 2, 2), torch.float32, (4, 4), ValueError, "300 classes"),
        ((3, 2, 2), torch.float32, (4, 4), ValueError, "expected \\[N, C, h, w\\]"),
        ((1, 3, 0, 2), torch.float32, (4, 4), ValueError, "at least one pixel"),
        ((1, 3, 2, 2), torch.float32, (0, 4), ValueError, "size is \\(0, 4\\)"),
        ((1, 3, 2, 2), torch.int64, (4, 4), TypeError, "torch.int64"),
    ],
)
def test_wrong_arguments_are_named(shape, dtype, size, error, text):
    with pytest.raises(error, match=text):
        stpp_kernels.upsample_argmax(torch.zeros(shape, dtype=dtype), size)


@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(confidence, dtype):
    logits = torch.randn(2, 5, 4, 6).to(dtype)
    torch.library.opcheck(OP, (logits, [9, 7], confidence))
    torch.library.opcheck(OP, (logits.contiguous(memory_format=torch.channels_last), [4, 6], confidence))


def test_compiles_without_graph_break():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def predict(x):
        mask, confidence = stpp_kernels.upsample_argmax(x * 2, (x.shape[2] * 4, x.shape[3] * 3),
                                                        confidence=True)
        return mask, confidence + 1

    for height, width in ((4, 5), (7, 6)):
        logits = torch.randn(2, 6, height, width, requires_grad=True)
        mask, confidence = predict(logits)
        expected = stpp_kernels.upsample_argmax(logits * 2, (height * 4, width * 3), confidence=True)
        assert torch.equal(mask, expected[0]) and torch.equal(confidence, expected[1] + 1)
