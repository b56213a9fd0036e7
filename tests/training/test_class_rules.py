"""Weights, offsets and confidences by class, against their plain forms; and the resulting loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stpp.config import Config, ConsistencyConfig, RareConfig, TrainConfig
from stpp.errors import UserError
from stpp.training.class_rules import ClassRules, for_run, loss_weights, offsets
from stpp.training.loss import OHEM_IMAGE, labelled_loss

COUNTS = st.lists(st.integers(0, 10**9), min_size=1, max_size=12).filter(any)
CLASSES = ("a", "b", "c")


@given(COUNTS, st.floats(1, 100))
def test_inverse_square_root_weights_keep_mean_and_limit(pixels, most):
    found = loss_weights(pixels, RareConfig(weights="inverse-sqrt", most_weight=most))
    there = [(n, weight) for n, weight in zip(pixels, found, strict=True) if n]
    assert sum(n * weight for n, weight in there) / sum(pixels) == pytest.approx(1)
    assert all(weight == 1 for n, weight in zip(pixels, found, strict=True) if not n)
    least = min(weight for _, weight in there)
    frequent = max(n for n, _ in there)
    for n, weight in there:
        assert weight / least == pytest.approx(min(math.sqrt(frequent / n), most))


@given(COUNTS, st.integers(2, 10**7))
def test_effective_number_weights_match_the_paper(pixels, most):
    rare = RareConfig(weights="effective", effective_pixels=most, most_weight=1e12)
    found = loss_weights(pixels, rare)
    beta = 1 - 1 / most
    plain = [1 / max((1 - beta**n) / (1 - beta), 1e-300) if n else 0 for n in pixels]
    scale = sum(pixels) / sum(n * weight for n, weight in zip(pixels, plain, strict=True))
    for n, ours, theirs in zip(pixels, found, plain, strict=True):
        assert ours == pytest.approx(theirs * scale if n else 1, rel=1e-6)


def test_no_rule_by_default():
    rules = for_run(Config(), CLASSES, [5, 0, 7], torch.device("cpu"))
    assert rules == ClassRules()
    assert loss_weights([0, 0], RareConfig(weights="inverse-sqrt")) is None


def test_offsets_are_logarithms_of_the_shares():
    found = offsets([90, 10, 0], RareConfig(logit_adjustment=0.5))
    assert found == pytest.approx([0.5 * math.log(one) for one in (0.9, 0.1, 0.01)])


def case(seed: int, n: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws logits, labels with ignored pixels and one image without any, and the logits at full size."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, 3, 5, 5, generator=generator)
    labels = torch.randint(3, (n, 9, 9), generator=generator).byte()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    labels[-1] = 255
    return logits, labels, F.interpolate(logits, (9, 9), mode="bilinear", align_corners=True)


@pytest.mark.parametrize("seed", range(3))
def test_loss_uses_weights_and_offsets(seed):
    logits, labels, full = case(seed)
    rare = RareConfig(weights="inverse-sqrt", logit_adjustment=1.0)
    rules = for_run(Config(rare=rare), CLASSES, [100, 10, 1], torch.device("cpu"))
    found = labelled_loss(logits, labels, TrainConfig(), rules)
    plain = F.cross_entropy(full + rules.offset_C[:, None, None], labels.long(), ignore_index=255,
                            weight=rules.weight_C, reduction="sum")
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-4)
    assert not torch.isclose(found, labelled_loss(logits, labels, TrainConfig()))


@pytest.mark.parametrize("seed", range(5))
def test_hardest_pixels_of_each_image_define_its_loss(seed):
    logits, labels, full = case(seed)
    full = full * 4  # most labels are either confident or wrong
    found = labelled_loss(logits * 4, labels, TrainConfig(loss="ohem-image"))
    plain = torch.zeros(())
    for image, truth in zip(full, labels, strict=True):
        counted = truth != 255
        if not counted.any():
            continue
        per_pixel = F.cross_entropy(image[None], truth[None].long(), ignore_index=255, reduction="none")[0]
        probability = torch.exp(-per_pixel)
        ranked = torch.where(counted, probability, 2.0).flatten().sort().values
        threshold = max(0.7, ranked[-(-truth.numel() // OHEM_IMAGE) - 1].item())
        kept = counted & (probability <= threshold)
        plain = plain + per_pixel[kept].mean() * counted.sum()
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-3)
    assert found > 1.2 * labelled_loss(logits * 4, labels, TrainConfig())


def test_loss_of_images_does_not_depend_on_their_passes():
    logits, labels, _ = case(7)
    train = TrainConfig(loss="ohem-image")
    whole = labelled_loss(logits, labels, train)
    parts = [labelled_loss(logits[i : i + 1], labels[i : i + 1], train) for i in range(len(logits))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-4)


def test_no_labelled_pixel_gives_zero_loss_and_gradient():
    logits = torch.randn(2, 3, 5, 5, requires_grad=True)
    labels = torch.full((2, 9, 9), 255, dtype=torch.uint8)
    rules = for_run(Config(rare=RareConfig(weights="inverse-sqrt", logit_adjustment=1.0)), CLASSES, [9, 3, 1],
                    torch.device("cpu"))
    for kind in ("ce", "ohem", "ohem-image"):
        loss = labelled_loss(logits, labels, TrainConfig(loss=kind), rules)
        loss.backward()
        assert loss == 0 and not logits.grad.any()


def test_classes_have_their_own_confidence():
    config = Config(consistency=ConsistencyConfig(confidence=0.9, class_confidence=("b=0.5",)))
    rules = for_run(config, CLASSES, [1, 1, 1], torch.device("cpu"))
    labels = torch.tensor([[[0, 1, 2, 1]]], dtype=torch.uint8)
    probability = torch.tensor([[[0.8, 0.6, 0.95, 0.4]]])
    assert rules.is_confident(labels, probability, 0.9).tolist() == [[[False, True, True, False]]]
    assert ClassRules().is_confident(labels, probability, 0.5).tolist() == [[[True, True, True, False]]]


@pytest.mark.parametrize(("given_pairs", "said"), [
    (("b",), "CLASS=CONFIDENCE"), (("b=1",), "CLASS=CONFIDENCE"), (("b=nan",), "CLASS=CONFIDENCE"),
    (("=0.5",), "CLASS=CONFIDENCE"), (("b=0.1", "b=0.2"), "twice")])
def test_malformed_pairs_are_refused(given_pairs, said):
    with pytest.raises(UserError, match=said):
        ConsistencyConfig(class_confidence=given_pairs)


def test_unknown_class_is_refused():
    config = Config(consistency=ConsistencyConfig(class_confidence=("d=0.5",)))
    with pytest.raises(UserError, match="unknown class d; the classes are a, b, c"):
        for_run(config, CLASSES, [1, 1, 1], torch.device("cpu"))
