"""confusion and pairwise_iou against counting by hand: values, ignored pixels, values outside the classes,
tracing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stpp_kernels
from kernels_cases import FORMS, device_of
from kernels_label_cases import QUICK, confusion

OP = torch.ops.stpp_kernels.confusion.default
DTYPES = [torch.uint8, torch.int64]


def by_hand(pred, target, num_classes, ignore_index):
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for p, t in zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != ignore_index:
            matrix[t, p] += 1
    return matrix


def iou_by_hand(a, b, num_classes):
    pairs = [(x, y) for x,
             y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True) if x != 255 and y != 255]
    scores = []
    for k in range(num_classes):
        both, either = sum(x == k == y for x, y in pairs), sum(k in (x, y) for x, y in pairs)
        if either:
            scores.append(both / either)
    return sum(scores) / len(scores) if scores else 0.0


def masks(seed, shape, num_classes, ignored, run=1):
    """Draws (prediction, truth) in runs of equal pixels; a share `ignored` of the truth is 255, its
    predictions arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()

    def draw(high):
        values = torch.randint(0, high, (count // run + 1,), generator=generator).repeat_interleave(run)
        return values[:count].view(shape)

    pred, target = draw(num_classes), draw(num_classes)
    hidden = torch.rand(shape, generator=generator) < ignored
    return torch.where(hidden, draw(256), pred), torch.where(hidden, 255, target)


@pytest.mark.parametrize("form", FORMS)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 33), st.integers(1, 33)),
    num_classes=st.sampled_from([1, 2, 19, 21, 65, 150, 256]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    run=st.sampled_from([1, 5, 40]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
)
@settings(QUICK, max_examples=30)
def test_counts_pairs(form, seed, shape, num_classes, ignored, run, dtypes):
    pred, target = masks(seed, shape, num_classes, ignored, run)
    expected = torch.stack([by_hand(p, t, num_classes, 255) for p, t in zip(pred, target, strict=True)])
    pred, target = pred.to(dtypes[0]).to(device_of(form)), target.to(dtypes[1]).to(device_of(form))
    per_image = confusion(form, pred, target, num_classes, per_image=True)
    total = confusion(form, pred, target, num_classes)
    assert per_image.dtype == total.dtype == torch.int64
    assert torch.equal(per_image.cpu(), expected) and torch.equal(total.cpu(), expected.sum(0))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_large_masks_are_split_among_threads(threads):
    pred, target = masks(7, (3, 251, 397), 21, 0.2, run=30)  # not a multiple of a thread's share
    counted = target != 255
    image = torch.arange(3).view(3, 1, 1).expand_as(target)[counted]
    expected = torch.bincount((image * 21 + target[counted]) * 21 + pred[counted],
                              minlength=3 * 441).view(3, 21, 21)
    torch.set_num_threads(threads)
    found = stpp_kernels.confusion(pred.byte(), target, 21, per_image=True)
    total = stpp_kernels.confusion(pred, target.byte(), 21)
    assert torch.equal(found, expected) and torch.equal(total, expected.sum(0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ignore_index", [0, 3, 255, -100, 1000])
def test_any_ignore_index(form, ignore_index):
    target = torch.tensor([[0, 1, 2, 3, 3, 3, 0, 1]])
    pred = torch.tensor([[0, 1, 1, 3, 2, 0, 2, 1]])
    found = confusion(form, pred.to(device_of(form)), target.to(device_of(form)), 4,
                      ignore_index=ignore_index)
    assert torch.equal(found.cpu(), by_hand(pred, target, 4, ignore_index))


def test_ignore_index_above_255_ignores_nothing():
    target = torch.tensor([255, 0, 1], dtype=torch.uint8)
    assert stpp_kernels.confusion(target, target, 256, ignore_index=-1)[255, 255] == 1
    assert stpp_kernels.confusion(target, target, 256, ignore_index=256 + 255)[255, 255] == 1
    assert stpp_kernels.confusion(target, target, 256).sum() == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_masks(dtype):
    pred, target = masks(8, (2, 20, 30), 5, 0.1)
    pred, target = pred.to(dtype).transpose(1, 2), target.to(dtype).transpose(1, 2)
    assert torch.equal(stpp_kernels.confusion(pred, target, 5), by_hand(pred, target, 5, 255))
    cut_p, cut_t = pred[:, 1::2, 3:], target[:, 1::2, 3:]
    assert torch.equal(stpp_kernels.confusion(cut_p, cut_t, 5), by_hand(cut_p, cut_t, 5, 255))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 700, 999])
def test_values_outside_the_classes_are_named(dtype, position):
    good = torch.zeros(1, 1000, dtype=dtype)
    bad = good.clone()
    bad[0, position] = 77
    with pytest.raises(ValueError, match="a prediction is 77, outside \\[0, 21\\)"):
        stpp_kernels.confusion(bad, good, 21)
    with pytest.raises(ValueError, match="a target is 77, outside \\[0, 21\\)"):
        stpp_kernels.confusion(good, bad, 21)
    hidden = good.clone()
    hidden[0, position] = 255
    # a prediction under an ignored pixel may be anything
    assert stpp_kernels.confusion(bad, hidden, 21)[0, 0] == 999


@pytest.mark.parametrize("value", [-1, -(2**40), 2**32, 2**40 + 3, 21])
def test_wide_values_do_not_wrap_into_the_classes(value):
    good, bad = torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    bad[4] = value
    with pytest.raises(ValueError, match=f"a prediction is {value},"):
        stpp_kernels.confusion(bad, good, 21)
    with pytest.raises(ValueError, match=f"a target is {value},"):
        stpp_kernels.confusion(good, bad, 21)


def test_triton_form_asserts_on_values_outside():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("an assert on a real stream ends the CUDA context")
    good, bad = torch.zeros(1, 50, dtype=torch.int64), torch.full((1, 50), 21)
    for pred, target in ((bad, good), (good, bad), (good, -bad)):
        with pytest.raises(RuntimeError, match="outside \\[0, 21\\)"):
            confusion("triton", pred, target, 21)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    num_classes=st.sampled_from([1, 2, 5, 21]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
@settings(QUICK, max_examples=30)
def test_pairwise_iou(seed, shape, num_classes, ignored, dtype):
    _, a = masks(seed, shape, num_classes, ignored)
    _, b = masks(seed + 1, shape, num_classes, ignored / 2)
    expected = torch.tensor([iou_by_hand(x, y, num_classes) for x, y in zip(a, b, strict=True)],
                            dtype=torch.float64)
    found = stpp_kernels.pairwise_iou(a.to(dtype), b.to(dtype), num_classes)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, stpp_kernels.pairwise_iou(b.to(dtype), a.to(dtype), num_classes))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_classes", [45, 46, 150])
@pytest.mark.parametrize("run", [1, 1000, 5000])
def test_runs_across_the_pieces_of_a_mask(form, num_classes, run):
    # 9191 pixels: pieces of 4096 or 1024
    pred, target = masks(12, (2, 91, 101), num_classes, 0.0 if run > 1 else 0.3, run)
    target[:, 40:43] = 255
    expected = torch.stack([by_hand(p, t, num_classes, 255) for p, t in zip(pred, target, strict=True)])
    found = confusion(form, pred.byte().to(device_of(form)), target.to(device_of(form)), num_classes,
                      per_image=True)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_classes", [21, 70])
def test_pixels_ignored_in_either_mask(form, num_classes):
    _, a = masks(10, (2, 11, 13), num_classes, 0.3)
    _, b = masks(11, (2, 11, 13), num_classes, 0.3)
    expected = by_hand(a, torch.where(a == 255, 255, b), num_classes, 255)
    found = confusion(form, a.to(device_of(form)), b.to(device_of(form)), num_classes, ignore_both=True)
    assert torch.equal(found.cpu(), expected)


def test_pairwise_iou_class_rule():
    a = torch.tensor([[[0, 0, 1, 1]], [[2, 2, 2, 2]], [[0, 1, 255, 0]]], dtype=torch.uint8)
    b = torch.tensor([[[0, 0, 1, 2]], [[2, 2, 2, 2]], [[0, 255, 3, 1]]], dtype=torch.uint8)
    # First: classes 0 (2/2), 1 (1/2), 2 (only in b: 0). Third: two pixels count; 0 is 1/2, 1 is only in b.
    expected = torch.tensor([(1 + 0.5 + 0) / 3, 1.0, 0.25], dtype=torch.float64)
    torch.testing.assert_close(stpp_kernels.pairwise_iou(a, b, 4), expected)
    with pytest.raises(ValueError, match="is 3, outside"):
        stpp_kernels.pairwise_iou(a, torch.full_like(a, 3), 3)


def test_empty_and_wrong_arguments():
    empty = torch.zeros(0, 4, 4, dtype=torch.uint8)
    assert stpp_kernels.confusion(empty, empty, 3).sum() == 0
    assert stpp_kernels.confusion(empty, empty, 3, per_image=True).shape == (0, 3, 3)
    assert stpp_kernels.pairwise_iou(empty, empty, 3).shape == (0,)
    mask = torch.zeros(2, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected the same"):
        stpp_kernels.confusion(mask, mask[:1], 3)
    with pytest.raises(TypeError, match="torch.int32"):
        stpp_kernels.confusion(mask.int(), mask, 3)
    with pytest.raises(ValueError, match="num_classes is 257"):
        stpp_kernels.confusion(mask, mask, 257)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("ignore_both", [False, True])
def test_opcheck(per_image, ignore_both):
    pred, target = masks(9, (2, 5, 6), 4, 0.0)
    torch.library.opcheck(OP, (pred.byte(), target, 4, 255, per_image, ignore_both))


def test_compiles_without_graph_break():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def score(a, b):
        return stpp_kernels.confusion(a, b, 5) * 2, stpp_kernels.pairwise_iou(a, b, 5)

    for side in (4, 9):
        pred, target = masks(side, (2, side, side), 5, 0.0)
        matrix, iou = score(pred, target)
        assert torch.equal(matrix, 2 * by_hand(pred, target, 5, 255))
        torch.testing.assert_close(iou, stpp_kernels.pairwise_iou(pred, target, 5))


@pytest.mark.parametrize("per_image", [False, True])
def test_pixels_of_classes_are_counted(per_image):
    masks = torch.randint(0, 5, (3, 7, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    masks[masks == 4] = 255
    plain = torch.stack([torch.stack([(mask == c).sum() for c in range(4)]) for mask in masks])
    found = stpp_kernels.class_pixels(masks, 4, per_image=per_image)
    assert found.dtype == torch.int64 and torch.equal(found, plain if per_image else plain.sum(0))
