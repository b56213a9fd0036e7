"""label_probability against the softmax of resized logits: values, ignored pixels, layouts, edges,
tracing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stpp_kernels
from kernels_cases import FORMS, device_of
from kernels_label_cases import QUICK, cases, probability_tolerance, resized, worst
from stpp_kernels import reference

OP = torch.ops.stpp_kernels.label_probability.default


def label_probabilities(form: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if form == "triton":
        from stpp_kernels.triton.label_probability import label_probability

        return label_probability(logits, labels, 255)
    if form == "reference":
        return reference.label_probability(logits, labels, 255).float()
    return stpp_kernels.label_probability(logits, labels)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(QUICK, max_examples=25)
def test_probability_matches_resized_logits(form, data):
    case = data.draw(cases(form))
    logits = case.logits(device_of(form))
    generator = torch.Generator().manual_seed(case.seed)
    labels = torch.randint(0, case.c, (case.n, *case.size), generator=generator).byte()
    ignored = torch.rand(labels.shape, generator=generator) < 0.3
    if case.c < 256:  # with 256 classes 255 is one of them, and still ignored
        labels[ignored] = 255
    ignored = labels == 255
    probability = label_probabilities(form, logits, labels.to(logits.device)).cpu()
    assert probability.dtype == torch.float32 and probability.shape == labels.shape
    assert (probability[ignored] == 2).all()
    index = labels.masked_fill(ignored, 0).long()[:, None]
    truth, eager = (
        resized(each, case.size).softmax(1).float().cpu().gather(1, index)[:, 0].masked_fill(ignored, 2)
        for each in (logits.float(), logits)
    )
    allowed = 2 * (eager - truth).abs().max().item() + probability_tolerance(logits)
    assert (probability - truth).abs().max().item() <= allowed, worst(probability, truth)


@pytest.mark.parametrize("form", FORMS)
def test_label_outside_the_classes_has_probability_zero(form):
    labels = torch.tensor([[[0, 3, 254, 255]]], dtype=torch.uint8, device=device_of(form))
    probability = label_probabilities(form, torch.zeros(1, 3, 1, 2, device=device_of(form)), labels)
    torch.testing.assert_close(probability.cpu(), torch.tensor([[[1 / 3, 0, 0, 2]]]))


def test_another_index_can_be_ignored():
    labels = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    probability = stpp_kernels.label_probability(torch.zeros(1, 4, 2, 2), labels, ignore_index=1)
    torch.testing.assert_close(probability, torch.tensor([[[0.25, 2.0]]]))


def test_empty_batch_and_float64():
    assert stpp_kernels.label_probability(torch.zeros(0, 3, 2, 2),
                                          torch.zeros(0, 5, 6, dtype=torch.uint8)).shape == (0, 5, 6)
    logits, labels = torch.randn(1, 5, 3, 3,
                                 dtype=torch.float64), torch.randint(5, (1, 7, 7), dtype=torch.uint8)
    expected = resized(logits, (7, 7)).softmax(1).gather(1, labels[:, None].long())[:, 0]
    torch.testing.assert_close(stpp_kernels.label_probability(logits, labels), expected.float())


@pytest.mark.parametrize("shape, labels, dtype, error, text", [
    ((1, 300, 2, 2), (1, 4, 4), torch.uint8, ValueError, "300 classes"),
    ((1, 3, 2, 2), (2, 4, 4), torch.uint8, ValueError, r"expected \[1, H, W\]"),
    ((1, 3, 2, 2), (1, 1, 4, 4), torch.uint8, ValueError, r"expected \[1, H, W\]"),
    ((1, 3, 2, 2), (1, 4, 4), torch.int64, TypeError, "torch.int64"),
])
def test_wrong_arguments_are_named(shape, labels, dtype, error, text):
    with pytest.raises(error, match=text):
        stpp_kernels.label_probability(torch.zeros(shape), torch.zeros(labels, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    logits, labels = torch.randn(2, 5, 4, 6).to(dtype), torch.randint(5, (2, 9, 7), dtype=torch.uint8)
    torch.library.opcheck(OP, (logits, labels, 255))
    torch.library.opcheck(OP, (logits.contiguous(memory_format=torch.channels_last), labels, 255))
