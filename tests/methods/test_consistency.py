"""UniMatch, UniMatch-V2 and FixMatch against plain PyTorch in float64, written from the papers' definitions
at full size."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stpp.config import AugmentConfig, Config, ConsistencyConfig, TrainConfig
from stpp.distributed import World
from stpp.loading.sample import Batch, Sample
from stpp.methods import unimatch_v2
from stpp.methods.consistency import inside, pasted, pseudo_labels, swapped
from stpp.methods.unimatch import UniMatch
from stpp.methods.unimatch_v2 import FixMatch, UniMatchV2, complementary_dropout
from stpp.training.ema import MovingAverage
from stpp.training.loss import hardest, labelled_loss
from stpp.training.trainer import Schedule, Trainer

CLASSES, SIDE = 4, 24


class Small(nn.Module):
    """Two maps at a quarter of the size, without batch statistics."""

    head_lr_multiplier = 1.0

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleList([nn.Conv2d(3, 6, 5, stride=4, padding=2),
                                       nn.Conv2d(3, 6, 7, stride=4, padding=3)])
        self.classifier = nn.Conv2d(12, CLASSES, 3, padding=1)

    def features(self, images_NCHW):
        return tuple(conv(images_NCHW).tanh() for conv in self.backbone)

    def decode(self, *maps):
        return self.classifier(torch.cat(maps, dim=1))

    def forward(self, images_NCHW):
        return self.decode(*self.features(images_NCHW))


def network() -> Small:
    torch.manual_seed(3)
    made = Small().double()
    with torch.no_grad():
        made.classifier.weight.mul_(8)  # so that some pixels are confident
    return made


def batches(seed: int, n: int = 2, m: int = 4) -> tuple[Batch, Batch]:
    generator = torch.Generator().manual_seed(seed)

    def images(count: int) -> torch.Tensor:
        return torch.randn(count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)

    labels = torch.randint(CLASSES, (n, SIDE, SIDE), generator=generator).byte()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    boxes = torch.tensor([[[0, 0, 0, 0]] * m,
                          [[2, 3, 10, 8], [0, 0, 0, 0], [5, 5, 19, 19], [0, 20, 24, 4]][:m],
                          [[1, 1, 4, 20], [8, 0, 16, 9], [0, 0, 0, 0], [3, 3, 3, 3]][:m]], dtype=torch.int32)
    shown = torch.tensor([[0, 0, 24, 24], [0, 0, 24, 15], [0, 6, 20, 18], [0, 0, 9, 24]][:m],
                         dtype=torch.int32)
    x = Batch(views=(images(n),), labels_NHW=labels, indices=np.arange(n))
    u = Batch(views=(images(m), images(m), images(m)), labels_NHW=None, indices=np.arange(m), boxes_VN4=boxes,
              shown_N4=shown)
    return x, u


def upsampled(logits: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=True)


def mixed_plain(tensor: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Applies CutMix with the neighbour, image by image."""
    out = tensor.clone()
    for i, (y, x, height, width) in enumerate(boxes.tolist()):
        out[i, ..., y : y + height, x : x + width] = tensor[i ^ 1, ..., y : y + height, x : x + width]
    return out


def masked_mean(logits: torch.Tensor, labels: torch.Tensor, confidence: torch.Tensor, shown: torch.Tensor,
                threshold: float):
    """Computes the sum of CE * (confidence >= threshold) * shown, over the number of shown pixels."""
    loss = F.cross_entropy(upsampled(logits), labels.long(), reduction="none")
    return (loss * (confidence >= threshold) * shown).sum() / shown.sum()


def labels_of(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    confidence, labels = upsampled(logits).softmax(1).max(1)
    return labels, confidence


def shown_of(u: Batch) -> torch.Tensor:
    shown = torch.zeros(len(u.shown_N4), SIDE, SIDE, dtype=torch.bool)
    for i, (y, x, height, width) in enumerate(u.shown_N4.tolist()):
        shown[i, y : y + height, x : x + width] = True
    return shown


def strong_terms(logits, labels, confidence, u: Batch, threshold: float) -> list[torch.Tensor]:
    shown = shown_of(u)
    return [masked_mean(each, mixed_plain(labels, boxes), mixed_plain(confidence, boxes),
                        mixed_plain(shown, boxes), threshold)
            for each, boxes in zip(logits, u.boxes_VN4[1:], strict=True)]


def taken(step, x: Batch, u: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns terms divided by their pixels, and gradients of the weighted sum."""
    terms = step(x, u) / step.pixels(x, u)
    weights = torch.tensor(list(step.weights.values()), dtype=terms.dtype)
    return terms.detach(), list(torch.autograd.grad((weights * terms).sum(), list(step.network.parameters())))


def config(threshold: float = 0.5) -> Config:
    return Config(method="unimatch", consistency=ConsistencyConfig(confidence=threshold))


@pytest.mark.parametrize("seed", [0, 1])
def test_unimatch_equals_the_plain_form(monkeypatch, seed):
    net, (x, u) = network(), batches(seed)
    drawn = []
    monkeypatch.setattr(F, "dropout2d", lambda each, p: each * _dropout_mask(each, drawn))
    terms, gradients = taken(UniMatch(net, config()), x, u)

    plain = copy.deepcopy(net)
    maps = plain.features(torch.cat([x.images_NCHW, u.images_NCHW]))
    n = len(x.images_NCHW)
    clean, dropped = plain.decode(*maps), plain.decode(*(each * mask for each,
                                                         mask in zip(maps, drawn, strict=True)))
    labels, confidence = labels_of(clean[n:].detach())
    loss_x = F.cross_entropy(upsampled(clean[:n]), x.labels_NHW.long(), ignore_index=255)
    strong = strong_terms([plain(mixed_plain(view, boxes)) for view,
                           boxes in zip(u.views[1:], u.boxes_VN4[1:], strict=True)],
                          labels, confidence, u, 0.5)
    loss_d = masked_mean(dropped[n:], labels, confidence, shown_of(u), 0.5)
    share = ((confidence >= 0.5) & shown_of(u)).sum() / shown_of(u).sum()
    assert 0.05 < share < 0.95
    expected = torch.stack([loss_x, *strong, loss_d, share.double()]).detach()
    torch.testing.assert_close(terms.double(), expected, rtol=1e-5, atol=1e-6)
    loss = (loss_x + 0.25 * strong[0] + 0.25 * strong[1] + 0.5 * loss_d) / 2
    expected = torch.autograd.grad(loss, list(plain.parameters()))
    for gradient, truth in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-6, atol=1e-9)


def _dropout_mask(each: torch.Tensor, drawn: list) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(drawn))
    mask = 2.0 * (torch.rand(*each.shape[:2], 1, 1, generator=generator, dtype=torch.float64) < 0.5)
    drawn.append(mask)
    return mask


@pytest.mark.parametrize("seed", [0, 1])
def test_unimatch_v2_equals_the_plain_form_for_three_steps(monkeypatch, seed):
    net = network()
    step, plain = UniMatchV2(net, config()), copy.deepcopy(net)
    teacher, student = copy.deepcopy(net), torch.optim.SGD(net.parameters(), lr=0.2)
    plain_student = torch.optim.SGD(plain.parameters(), lr=0.2)
    for t in range(3):
        x, u = batches(10 * seed + t)
        generator = torch.Generator().manual_seed(t)
        kept = 2.0 * (torch.rand(4, 6, generator=generator, dtype=torch.float64) < 0.5)
        kept[[1, 2]] = 1.0
        factor = torch.cat([kept, 2 - kept])
        monkeypatch.setattr(unimatch_v2, "complementary_dropout",
                            lambda n, channels, device, factor=factor: [factor] * 2)
        terms, gradients = taken(step, x, u)

        labels, confidence = labels_of(teacher(u.images_NCHW))
        strong_images = torch.cat([mixed_plain(view, boxes) for view,
                                   boxes in zip(u.views[1:], u.boxes_VN4[1:], strict=True)])
        logits = plain.decode(*(each * factor[:, :, None, None]
                                for each in plain.features(strong_images))).chunk(2)
        loss_x = F.cross_entropy(upsampled(plain(x.images_NCHW)), x.labels_NHW.long(), ignore_index=255)
        strong = strong_terms(logits, labels, confidence, u, 0.5)
        torch.testing.assert_close(terms[:3].double(), torch.stack([loss_x, *strong]).detach(), rtol=1e-5,
                                   atol=1e-6)
        expected = torch.autograd.grad((loss_x + (strong[0] + strong[1]) / 2) / 2, list(plain.parameters()))
        for parameters, optimizer, found in ((net.parameters(), student, gradients),
                                             (plain.parameters(), plain_student, expected)):
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
            optimizer.step()
        for gradient, truth in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, truth, rtol=1e-6, atol=1e-9)
        step.after_step(t)
        a = min(1 - 1 / (t + 1), 0.996)
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), plain.parameters(), strict=True):
                mine.mul_(a).add_(theirs, alpha=1 - a)
        for mine, theirs in zip(step.average.network.parameters(), teacher.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert step.deployed is step.average.network and step.compared == {"student": net}


def test_fixmatch_equals_the_plain_form():
    net, (x, u) = network(), batches(5)
    one = Batch(views=u.views[:2], labels_NHW=None, indices=u.indices, boxes_VN4=u.boxes_VN4[:2],
                shown_N4=u.shown_N4)
    terms, _ = taken(FixMatch(net, config()), x, one)
    labels, confidence = labels_of(net(u.images_NCHW))
    (strong,) = strong_terms([net(mixed_plain(u.views[1], u.boxes_VN4[1]))], labels, confidence, one, 0.5)
    loss_x = F.cross_entropy(upsampled(net(x.images_NCHW)), x.labels_NHW.long(), ignore_index=255)
    torch.testing.assert_close(terms[:2].double(), torch.stack([loss_x, strong]).detach(), rtol=1e-5,
                               atol=1e-6)


@pytest.mark.parametrize("step", [UniMatch, UniMatchV2])
def test_two_passes_equal_one(step, monkeypatch):
    """Terms are sums over the pass, divided by pixels of all passes: unevenly padded halves add up to the
    whole."""
    net, (x, u) = network(), batches(7, n=4)
    monkeypatch.setattr(F, "dropout2d", lambda each, p: each)
    monkeypatch.setattr(unimatch_v2, "complementary_dropout",
                        lambda n, channels, device: [torch.ones(2 * n, 6, dtype=torch.float64)] * 2)
    method = step(net, config())
    pieces = [(part(x, rows), part(u, rows)) for rows in (slice(0, 2), slice(2, 4))]
    whole = method(x, u)
    torch.testing.assert_close(sum(method(*piece) for piece in pieces), whole)
    assert torch.equal(sum(method.pixels(*piece) for piece in pieces), method.pixels(x, u))


def part(batch: Batch, rows: slice) -> Batch:
    labels = None if batch.labels_NHW is None else batch.labels_NHW[rows]
    more = {} if batch.boxes_VN4 is None else {"boxes_VN4": batch.boxes_VN4[:, rows],
                                               "shown_N4": batch.shown_N4[rows]}
    return Batch(views=tuple(view[rows] for view in batch.views), labels_NHW=labels,
                 indices=batch.indices[rows], **more)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 6]))
@settings(deadline=None, max_examples=40)
def test_pasting_exchanges_boxes(seed, n):
    generator = np.random.default_rng(seed)
    boxes = torch.from_numpy(np.stack([generator.integers(0, 12, n), generator.integers(0, 12, n),
                                       generator.integers(0, 12, n), generator.integers(0, 12, n)],
                                      axis=1).astype(np.int32))
    images, labels = torch.randn(n, 3, SIDE, SIDE), torch.randint(5, (n, SIDE, SIDE)).byte()
    assert torch.equal(pasted(images, boxes), mixed_plain(images, boxes))
    assert torch.equal(pasted(labels, boxes), mixed_plain(labels, boxes))
    assert torch.equal(swapped(swapped(images)), images)
    assert inside(boxes, (SIDE, SIDE)).flatten(1).sum(1).tolist() == (boxes[:, 2] * boxes[:, 3]).tolist()


def test_thresholding_commutes_with_pasting():
    """Labels masked first and pasted equal labels, confidence and padding pasted and then masked."""
    _, u = batches(9)
    logits = torch.randn(4, CLASSES, 6, 6) * 3
    labels_NHW = pseudo_labels(logits, u, 0.6)
    labels, confidence = labels_of(logits)
    for boxes in u.boxes_VN4[1:]:
        sure = (mixed_plain(confidence, boxes) >= 0.6) & mixed_plain(shown_of(u), boxes)
        plain = torch.where(sure, mixed_plain(labels, boxes), 255)
        assert torch.equal(pasted(labels_NHW, boxes).long(), plain)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_complementary_dropout_keeps_each_channel_once_and_half_of_the_images_whole(n):
    torch.manual_seed(n)
    first, second = complementary_dropout(n, [64, 64], torch.device("cpu"))
    assert first is second and first.shape == (2 * n, 64)
    views = first.view(2, n, 64)
    assert torch.equal(views.sum(0), torch.full((n, 64), 2.0))
    whole = (views[0] == 1).all(1)
    assert whole.sum() == n // 2
    assert set(views[0][~whole].flatten().tolist()) == {0.0, 2.0}


def test_maps_of_other_depths_have_separate_draws():
    torch.manual_seed(0)
    shallow, deep = complementary_dropout(3, [8, 32], torch.device("cpu"))
    assert shallow.shape == (6, 8) and deep.shape == (6, 32)
    assert torch.equal((shallow == 1).all(1), (deep == 1).all(1))  # the same images are complete


def test_average_copies_first_and_never_trains():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = MovingAverage(net, 0.996)
    average.train()
    assert not any(module.training for module in average.modules())
    assert not any(weight.requires_grad for weight in average.parameters())
    with torch.no_grad():
        net[0].weight.add_(1)
    net(torch.randn(4, 3))
    average.update(net, 0)
    for name, value in net.state_dict().items():
        assert torch.equal(average.network.state_dict()[name], value), name
    before = average.network[0].weight.clone()
    with torch.no_grad():
        net[0].weight.add_(1)
    average.update(net, 10_000)
    torch.testing.assert_close(average.network[0].weight, before + 0.004, rtol=0, atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
@settings(deadline=None, max_examples=30)
def test_ohem_keeps_the_hardest_pixels(seed, kept):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, 5, 5, generator=generator)
    labels = torch.randint(3, (2, 7, 7), generator=generator).byte()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    full = F.interpolate(logits, (7, 7), mode="bilinear", align_corners=True)
    counted = labels != 255
    probability = full.softmax(1).gather(1, labels.masked_fill(~counted, 0).long()[:, None])[:, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stpp.training.loss.OHEM_KEPT", kept)
        found = hardest(logits, labels)
        loss = labelled_loss(logits, labels, TrainConfig(loss="ohem"))
    threshold = 0.7
    if counted.sum() >= kept:
        threshold = max(threshold, probability[counted].sort().values[kept - 1].item())
        certain = (probability - threshold).abs() > 1e-6
        expected = counted & (probability <= threshold)
    else:
        certain, expected = torch.ones_like(counted), counted  # too few: nothing is dropped
    assert torch.equal((found != 255)[certain], expected[certain])
    cross_entropy = F.cross_entropy(full, found.long(), ignore_index=255, reduction="none")
    mean = cross_entropy.sum() / max(1, int((found != 255).sum()))
    torch.testing.assert_close(loss, mean * counted.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", [UniMatch, UniMatchV2])
def test_three_steps_of_the_trainer_equal_the_plain_form(monkeypatch, tmp_path, kind, passes):
    """Compares terms, learning rates, weights and moving average; padding leaves each pass another number of
    pixels."""
    net, v2 = network(), kind is UniMatchV2
    plain, teacher, queue = copy.deepcopy(net), copy.deepcopy(net), []
    ours = trainer_of(kind, net, passes, tmp_path)
    monkeypatch.setattr(F, "dropout2d", lambda each, p: each * queue.pop(0))
    monkeypatch.setattr(unimatch_v2, "complementary_dropout", lambda *_: [queue.pop(0)] * 2)
    base = 0.05 if v2 else 0.4
    groups = [{"params": list(part.parameters())} for part in (plain.backbone, plain.classifier)]
    optimizer = (torch.optim.AdamW(groups, weight_decay=0.01) if v2
                 else torch.optim.SGD(groups, weight_decay=0.01, momentum=0.9))
    for k in range(3):
        x, u = batches(30 + k, n=4)
        rows = [slice(0, 2), slice(2, 4)] if passes == 2 else [slice(0, 4)]
        masks = kept_channels(k)
        queue += queued(masks, rows, v2)
        terms, nonfinite = ours.train_step([(part(x, some), part(u, some)) for some in rows])
        assert not queue and not nonfinite

        expected, loss = (plain_v2 if v2 else plain_v1)(plain, teacher, x, u, masks)
        torch.testing.assert_close(terms[: len(expected)].double(), expected, rtol=1e-5, atol=1e-6)
        rate = base * (1 - k / 3) ** 0.9
        both = zip(optimizer.param_groups, ours.optimizer.param_groups, (1, 5), strict=True)
        for group, theirs, factor in both:
            group["lr"] = rate * factor
            assert theirs["lr"] == pytest.approx(rate * factor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        a = min(1 - 1 / (k + 1), 0.996)
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), plain.parameters(), strict=True):
                mine.mul_(a).add_(theirs, alpha=1 - a)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-6, atol=1e-9, msg=name)
        if v2:
            for name, value in teacher.state_dict().items():
                torch.testing.assert_close(ours.step.average.network.state_dict()[name], value, rtol=1e-6,
                                           atol=1e-9, msg=name)


def trainer_of(kind, net: nn.Module, passes: int, folder) -> Trainer:
    v2 = kind is UniMatchV2
    settings = Config(consistency=ConsistencyConfig(confidence=0.5), augment=AugmentConfig(crop_px=SIDE),
                      train=TrainConfig(batch_global=4, accumulate=passes, lr=0.2 if v2 else 1.6,
                                        precision="fp32", head_lr_multiplier=5.0, weight_decay=0.01,
                                        optimizer="adamw" if v2 else "sgd"))
    step = kind(net, settings)
    none = [Sample(key="none", image="none", mask="none", width=SIDE, height=SIDE)] * 4
    return Trainer(settings, World(device=torch.device("cpu")), step, step.streams(settings, none, none),
                   key=1, title="t", classes=tuple("abcd"), folder=folder, validate=None,
                   schedule=Schedule(steps=3, validate_steps=3))


def kept_channels(k: int) -> list[torch.Tensor]:
    """Returns factors 0 and 2 of the channels of two maps, of four labelled and four unlabelled images: [8,
    6] each."""
    generator = torch.Generator().manual_seed(k)
    return [2.0 * (torch.rand(8, 6, generator=generator, dtype=torch.float64) < 0.5) for _ in range(2)]


def complementary(kept: torch.Tensor, some: slice) -> torch.Tensor:
    """Returns factors of both strong views of the unlabelled images; every other one keeps all channels."""
    factor = kept[4:].clone()
    factor[1::2] = 1.0
    return torch.cat([factor[some], 2 - factor[some]])


def queued(masks: list[torch.Tensor], rows: list[slice], v2: bool) -> list[torch.Tensor]:
    """Lists the masks that dropout must draw, in the order of its calls."""
    if v2:
        return [complementary(masks[0], some) for some in rows]
    return [torch.cat([mask[:4][some], mask[4:][some]])[:, :, None, None] for some in rows for mask in masks]


def pasted_plain(u: Batch) -> list[torch.Tensor]:
    """Returns both strong views after CutMix."""
    return [mixed_plain(view, boxes) for view, boxes in zip(u.views[1:], u.boxes_VN4[1:], strict=True)]


def plain_v1(plain: nn.Module, _, x: Batch, u: Batch,
             masks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes terms and loss of UniMatch."""
    maps = plain.features(torch.cat([x.images_NCHW, u.images_NCHW]))
    clean = plain.decode(*maps)
    dropped = plain.decode(*(each * mask[:, :, None, None] for each, mask in zip(maps, masks, strict=True)))
    labels, confidence = labels_of(clean[4:].detach())
    loss_x = F.cross_entropy(upsampled(clean[:4]), x.labels_NHW.long(), ignore_index=255)
    strong = strong_terms([plain(view) for view in pasted_plain(u)], labels, confidence, u, 0.5)
    loss_d = masked_mean(dropped[4:], labels, confidence, shown_of(u), 0.5)
    loss = (loss_x + 0.25 * strong[0] + 0.25 * strong[1] + 0.5 * loss_d) / 2
    return torch.stack([loss_x, *strong, loss_d]).detach(), loss


def plain_v2(plain: nn.Module, teacher: nn.Module, x: Batch, u: Batch,
             masks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes terms and loss of UniMatch-V2."""
    labels, confidence = labels_of(teacher(u.images_NCHW).detach())
    factor = complementary(masks[0], slice(0, 4))[:, :, None, None]
    logits = plain.decode(*(each * factor for each in plain.features(torch.cat(pasted_plain(u))))).chunk(2)
    loss_x = F.cross_entropy(upsampled(plain(x.images_NCHW)), x.labels_NHW.long(), ignore_index=255)
    strong = strong_terms(logits, labels, confidence, u, 0.5)
    return torch.stack([loss_x, *strong]).detach(), (loss_x + (strong[0] + strong[1]) / 2) / 2
