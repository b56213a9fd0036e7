"""Teachers: folding, test-time augmentation and scoring against plain forms of the method's description."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stpp import checkpoint, distributed, metrics
from stpp.config import DataConfig, LabelConfig
from stpp.dataset import index
from stpp.errors import UserError
from stpp.images.masks import read_index_mask
from stpp.inference import views
from stpp.inference.evaluate import evaluate, report
from stpp.inference.fold import fold_batch_norm
from stpp.inference.open import EagerPredictor
from stpp.inference.predictors import already_open
from stpp.label import labels, reliability, rows
from stpp.models.build import build_model
from stpp.models.trained import load_network

CPU = torch.device("cpu")
HERE = distributed.World(device=CPU)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def network(seed: int, name: str = "deeplabv3plus") -> torch.nn.Module:
    """Builds a network whose batch norms have statistics, so that folding matters."""
    torch.manual_seed(seed)
    net = build_model(name, "resnet18", 6, 16).train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(4, 3, 49, 65) * 2 + 1)
    return net.eval()


def teacher(seed: int = 0) -> EagerPredictor:
    return EagerPredictor(network(seed), num_classes=6, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def samples(synthetic_index):
    known = index.load(synthetic_index)
    return [known.sample(image) for image in sorted(known.entries)][:7]


def normalised(path: str) -> torch.Tensor:
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) / 255
    return torch.from_numpy((pixels - MEAN) / STD).float().permute(2, 0, 1)[None]


def plain_probabilities(net: torch.nn.Module, image_1CHW: torch.Tensor, scales,
                        mirrored: bool) -> torch.Tensor:
    """Computes views one by one: softmax at the scaled size, mirrored back, resized and summed."""
    height, width = image_1CHW.shape[-2:]
    total = 0
    for scale in scales:
        size = (int(height * scale), int(width * scale))
        view = F.interpolate(image_1CHW, size, mode="bilinear", align_corners=True)
        for flip in (False, True)[: 1 + mirrored]:
            low = net(view.flip(3) if flip else view)
            prob = F.interpolate(low, size, mode="bilinear", align_corners=True).softmax(1)
            prob = prob.flip(3) if flip else prob
            total = total + F.interpolate(prob, (height, width), mode="bilinear", align_corners=True)
    return total


@pytest.mark.parametrize("name", ["deeplabv3plus", "pspnet", "deeplabv2"])
def test_folding_preserves_function_and_network(name):
    net = network(1, name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images = torch.randn(2, 3, 65, 81)
    ready = EagerPredictor(net, num_classes=6, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        truth = net(images)
        torch.testing.assert_close(ready.logits(images), truth, rtol=1e-3,
                                   atol=1e-3 * truth.abs().max().item())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in ready._network.modules())
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_synchronised_batch_norms_are_folded_too():
    net = network(1)
    with_sync = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network(1))
    images = torch.randn(1, 3, 65, 81)
    ours, theirs = (EagerPredictor(n, num_classes=6, device=CPU, dtype=torch.float32)
                    for n in (with_sync, net))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(images), theirs.logits(images))


def test_half_precision_returns_fp32_logits():
    ready = EagerPredictor(network(2), num_classes=6, device=CPU, dtype=torch.bfloat16)
    images = torch.randn(2, 3, 65, 81)
    with torch.no_grad():
        ours, truth = ready.logits(images), network(2)(images)
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().max() < 0.05 * truth.abs().max()


def test_batch_norm_without_convolution_is_refused():
    with pytest.raises(ValueError, match="follows no convolution"):
        fold_batch_norm(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(3)))


@pytest.mark.parametrize("mode", list(views.VIEWS))
@pytest.mark.parametrize("size", [(33, 47), (64, 64), (8, 51)])
def test_views_match_the_description(mode, size):
    net, images = network(3), torch.randn(2, 3, *size)
    scales, mirrored = views.VIEWS[mode]
    with torch.no_grad():
        ours = views.accumulate_views(net, images, mode, 6)
        truth = torch.cat([plain_probabilities(net, image[None], scales, mirrored) for image in images])
    torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.sum(1), torch.full_like(ours[:, 0], len(scales) * (1 + mirrored)))


def test_pseudo_labels_equal_the_plain_form(samples, tmp_path):
    result = labels.label(already_open(teacher(), identity="one"), samples, HERE,
                          config=LabelConfig(batch_per_rank=3),
                            data=DataConfig(threads=1), out=tmp_path, title="label")
    same = pixels = 0
    net = network(0)
    for sample in samples:
        with torch.no_grad():
            total = plain_probabilities(net, normalised(sample.image), *views.VIEWS["stpp"])[0]
        mask = read_index_mask(tmp_path / labels.mask_name(sample))
        same += (total.argmax(0).numpy() == mask).sum()
        pixels += mask.size
    assert result.images == len(samples)
    # decoders differ by a grey level here and there; random networks are all near-ties
    assert same / pixels >= 0.995


def test_confusion_counts_every_labelled_pixel_once(samples):
    matrix = evaluate(teacher(), samples, HERE, DataConfig(threads=1))
    masks = [read_index_mask(sample.mask) for sample in samples]
    truth = sum(np.bincount(mask[mask != 255], minlength=6) for mask in masks)
    assert matrix.sum(1).tolist() == truth.tolist()
    differing = 0
    for seed in range(3):  # a random network may predict one class everywhere, with and without views
        alone, with_views = (evaluate(teacher(seed), samples, HERE, DataConfig(threads=1), mode=mode)
                             for mode in ("none", "flip"))
        assert with_views.sum(1).tolist() == truth.tolist()
        differing += not torch.equal(with_views, alone)
    assert differing > 0


def scores_of(teachers, samples, out) -> list[float]:
    lines = [sample.key for sample in samples]
    reliability.select(already_open(*teachers, identity="three"), samples, lines, HERE, config=LabelConfig(),
                       data=DataConfig(threads=1), out=out)
    found = {row["key"]: row["reliability"] for row in rows.read(out / "reliability.parquet")}
    return [found[key] for key in lines]


def test_reliability_is_agreement_with_the_last_checkpoint(samples, tmp_path):
    teachers = [teacher(seed) for seed in (1, 2, 3)]
    scores = scores_of(teachers, samples, tmp_path / "three")
    for sample, score in zip(samples, scores, strict=True):
        size = (sample.height, sample.width)
        with torch.no_grad():
            first, second, third = (
                F.interpolate(net(normalised(sample.image)), size, mode="bilinear",
                              align_corners=True).argmax(1)
                for net in map(network, (1, 2, 3)))
        ious = []
        for earlier in (first, second):
            per_class = [((earlier == c) & (third == c)).sum() / ((earlier == c) | (third == c)).sum()
                         for c in range(6) if ((earlier == c) | (third == c)).any()]
            ious.append(np.mean(per_class))
        assert score == pytest.approx(np.mean(ious), abs=0.02)
    assert scores_of([teachers[0]] * 3, samples, tmp_path / "same") == pytest.approx([1.0] * 7)


def test_miou_averages_the_classes_that_occur():
    matrix = torch.tensor([[5, 1, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert metrics.mean_iou(matrix) == pytest.approx(100 * (5 / 6 + 4 / 5) / 2)
    assert metrics.iou_per_class(matrix)[2:].isnan().all()
    predicted_only = torch.tensor([[5, 1], [0, 0]])
    assert metrics.mean_iou(predicted_only) == pytest.approx(100 * (5 / 6) / 2)
    assert "-" in report(matrix, ("a", "b", "c", "d"), images=1)


def test_foreign_checkpoints_are_refused(tmp_path):
    net = network(0)
    torch.save(net.backbone.state_dict(), tmp_path / "backbone.pt")
    checkpoint.save(tmp_path / "short.pt", model=net.state_dict(), classes=list("abc"),
                    architecture={"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16})
    checkpoint.save(tmp_path / "empty.pt", step=3)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "short.pt").read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    for name in ("backbone.pt", "short.pt", "empty.pt", "cut.pt", "text.pt", "absent.pt"):
        with pytest.raises(UserError, match=name) as refused:
            load_network(tmp_path / name)
        assert "\n" not in str(refused.value)


def test_checkpoint_with_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"format": 1, "model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="bomb.pt"):
        load_network(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()
