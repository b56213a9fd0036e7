"""DALI against the PIL reference from the same numbers; odd and broken files.

Deviations are in grey levels (0..255) of the image before normalisation; docs/augmentation.md describes their
measurement.
"""

import dataclasses
import hashlib
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import stream_cases
from stpp.config import AugmentConfig
from stpp.errors import UserError
from stpp.images import batches
from stpp.images.batches import has_dali
from stpp.images.image_file import IMAGENET_MEAN, IMAGENET_STD
from stpp.images.pixels import normalised
from stpp.images.reading import read_header
from stpp.loading import loader, reference
from stpp.loading.augment import Appearance, Augmentation, draw
from stpp.loading.native import native_batches
from stpp.loading.sample import Batch, Sample, Stream
from stpp.loading.sampler import MicroBatch, StepSampler, equal_size_batches
from stpp.methods.consistency import inside

try:
    from stpp.loading import dali
except ImportError:
    dali = None
needs_dali = pytest.mark.skipif(dali is None, reason="NVIDIA DALI is not installed")
LOADERS = [pytest.param("dali", marks=needs_dali), "reference"]

GRAY_LEVELS = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)

# Operation -> greatest mean and greatest 99th percentile of any image, on CamVid and on images of saturated
# colours. Each is the measured value, rounded up by about a quarter.
BOUNDS = {
    "weak": {"street": (0.01, 0), "vivid": (0.01, 0)},
    "brightness": {"street": (0.8, 1), "vivid": (0.8, 1)},
    "contrast": {"street": (0.8, 1), "vivid": (0.8, 1)},
    "saturation": {"street": (0.6, 1), "vivid": (0.6, 1)},
    "hue": {"street": (3.7, 18), "vivid": (20, 69)},
    "gray": {"street": (0.01, 0), "vivid": (0.01, 1)},
    "blur": {"street": (0.6, 2), "vivid": (0.65, 2)},
    "cutout": {"street": (0.01, 0), "vivid": (0.01, 0)},
}


def module(name: str):
    return dali if name == "dali" else reference


def micro(indices, *, step: int = 0) -> MicroBatch:
    indices = np.asarray(indices, dtype=np.int64)
    return MicroBatch(step=step, epoch=0, positions=np.arange(len(indices)) + 1000 * step, indices=indices)


def train(name: str, samples: list[Sample], micro_batches=None, *, crop_px=64, long_side=(40, 160),
          views=("sample",), box="erase", masked=True, **settings):
    settings = {"seed": 0, "stage": 1, "device": "cpu", "threads": 2, **settings}
    micro_batches = [micro(range(len(samples)))] if micro_batches is None else micro_batches
    config = AugmentConfig(crop_px=crop_px, long_side=long_side)
    stream = Stream(samples=samples, views=views, box=box, masked=masked)
    return module(name).train_batches(stream, micro_batches, augment=config, **settings)


def evaluate(name: str, samples: list[Sample], cut, **settings):
    return native_batches(samples, cut, **{"device": "cpu", "threads": 2, "loader": name, **settings})


def deviations(a: Batch, b: Batch, view: int = 0) -> torch.Tensor:
    """Returns float [N, 3, H, W]: absolute differences in grey levels."""
    return (a.views[view] - b.views[view]).abs() * GRAY_LEVELS


def per_image(difference: torch.Tensor) -> list[tuple[float, float]]:
    """Returns (mean, 99th percentile) of each image."""
    return [(d.mean().item(), np.percentile(d.numpy(), 99).item()) for d in difference]


def near_boundary(labels: torch.Tensor) -> torch.Tensor:
    """Returns bool [N, H, W]: pixels with another label among their eight neighbours."""
    values = labels.float()[:, None]
    pool = torch.nn.functional.max_pool2d
    return (pool(values, 3, 1, 1) != -pool(-values, 3, 1, 1))[:, 0]


def write(
    folder: Path, name: str, image: Image.Image, *, strong: bool = False, turned: bool = True, **options
) -> Sample:
    """Writes an image file and a mask of blocks of 16 pixels."""
    image.save(folder / name, **options)
    reading = read_header((folder / name).read_bytes(), exif=turned)
    width, height = reading.width, reading.height
    blocks = np.random.default_rng(len(name)).integers(0, 5, (height // 16 + 1, width // 16 + 1),
                                                       dtype=np.uint8)
    mask = np.kron(blocks, np.ones((16, 16), np.uint8))[:height, :width]
    Image.fromarray(mask).save(folder / f"{name}.mask.png")
    return Sample(key=name, image=str(folder / name), mask=str(folder / f"{name}.mask.png"), width=width,
                  height=height, orientation=reading.orientation, plain=reading.plain,
                  strong=strong)  # fmt: skip


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Draws uint8 [height, width(, channels)]: large soft spots of every colour."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 16 + 2, width // 16 + 2, channels),
                                                 dtype=np.uint8)
    large = [np.asarray(Image.fromarray(small[..., c]).resize((width, height), Image.BICUBIC))
             for c in range(channels)]
    return np.stack(large, axis=2) if channels > 1 else large[0]


@pytest.fixture(scope="module")
def street(camvid) -> list[Sample]:
    """24 CamVid images; every second one is augmented strongly."""
    images = sorted((camvid / "images" / "train").glob("*.jpg"))[::15][:24]
    return [
        Sample(
            key=path.stem,
            image=str(path),
            mask=str(camvid / "masks" / "train" / f"{path.stem}.png"),
            width=480,
            height=360,
            plain=True,
            strong=number % 2 == 1,
        )  # fmt: skip
        for number, path in enumerate(images)
    ]


@pytest.fixture(scope="module")
def vivid(tmp_path_factory) -> list[Sample]:
    """Six images of saturated colours, lossless: the worst case of hue and clipping."""
    folder = tmp_path_factory.mktemp("vivid")
    return [write(folder, f"{i}.png", Image.fromarray(smooth(360, 480, seed=i)), strong=True)
            for i in range(6)]


def fixed(n: int, **changes) -> Augmentation:
    """Numbers of n 480x360 samples that cut the middle 256x256 unscaled and change nothing except
    `changes`."""
    stream = Stream(samples=[Sample(key="", image="", width=480, height=360)] * n, masked=False)
    config = AugmentConfig(crop_px=256, long_side=(480, 480))
    drawn = draw(stream, np.arange(n), np.arange(n), augment=config, seed=0, stage=0, epoch=0)
    geometry = dataclasses.replace(drawn.geometry, crop_y=np.full(n, 50), crop_x=np.full(n, 100),
                                   flip=np.zeros(n, bool))
    values = {name: getattr(drawn.views[0], name).copy() for name in Appearance.__slots__}
    return Augmentation(geometry=geometry, views=(Appearance(**(values | changes)),))


def with_params(monkeypatch, params: Augmentation, samples: list[Sample]) -> tuple[Batch, Batch]:
    """Returns the batch of all samples from both loaders, made with these parameters."""
    for target in (dali, reference):
        monkeypatch.setattr(target, "draw", lambda *args, **kwargs: params)
    return tuple(next(train(name, samples, crop_px=256)) for name in ("dali", "reference"))


def jitter_of(n: int, **factors) -> dict:
    return {"jitter": np.ones(n, bool)} | {name: np.resize(np.float32(value), n) for name,
                                           value in factors.items()}


OPERATIONS = {
    "weak": lambda n: {},
    "brightness": lambda n: jitter_of(n, brightness=[0.5, 0.75, 1.2, 1.5]),
    "contrast": lambda n: jitter_of(n, contrast=[0.5, 0.75, 1.2, 1.5]),
    "saturation": lambda n: jitter_of(n, saturation=[0.5, 0.75, 1.2, 1.5]),
    "hue": lambda n: jitter_of(n, hue=[-0.25, -0.1, 0.05, 0.17, 0.25]),
    "gray": lambda n: {"gray": np.ones(n, bool)},
    "blur": lambda n: {"blur_sigma": np.resize(np.float32([0.1, 0.3, 0.6, 1.0, 1.5, 2.0]), n)},
    "cutout": lambda n: {"box": np.tile(np.int32([30, 100, 80, 150]), (n, 1))},
}


def measured(monkeypatch, operation: str, samples: list[Sample]) -> tuple[float, float]:
    """Returns the greatest mean and greatest 99th percentile over the images."""
    a, b = with_params(monkeypatch, fixed(len(samples), **OPERATIONS[operation](len(samples))), samples)
    assert (a.labels_NHW == b.labels_NHW).all()
    means, percentiles = zip(*per_image(deviations(a, b)), strict=True)
    return max(means), max(percentiles)


@needs_dali
@pytest.mark.parametrize("images", ["street", "vivid"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_is_within_its_stated_bound(monkeypatch, request, operation, images):
    mean, percentile = measured(monkeypatch, operation, request.getfixturevalue(images))
    assert mean <= BOUNDS[operation][images][0] and percentile <= BOUNDS[operation][images][1] + 0.01


@needs_dali
@given(sigma=st.floats(0.01, 30))
def test_blur_has_the_requested_spread(sigma):
    from stpp.loading.dali_graph import _blur_kernel

    kernel = _blur_kernel(sigma).astype(np.float64)
    offsets = np.arange(len(kernel)) - len(kernel) // 2
    assert (
        kernel.sum() == pytest.approx(1, abs=1e-6) and (kernel >= 0).all() and (kernel == kernel[::-1]).all()
    )
    assert np.sqrt((kernel * offsets**2).sum()) == pytest.approx(sigma, rel=1e-3)


@needs_dali
def test_no_blur_is_a_single_tap():
    from stpp.loading.dali_graph import _blur_kernel

    assert _blur_kernel(0.0).tolist() == [1.0]


@needs_dali
def test_operations_change_images(monkeypatch, street):
    """Guards the bounds: two loaders that both do nothing would satisfy them."""
    plain, _ = with_params(monkeypatch, fixed(6), street[:6])
    for operation, changes in OPERATIONS.items():
        for batch in with_params(monkeypatch, fixed(6, **changes(6)), street[:6]):
            change = (deviations(batch, plain)).mean((1, 2, 3))
            assert (change < 0.01).all() if operation == "weak" else change.median() > 0.5, (
                operation,
                change,
            )
            assert ((batch.labels_NHW != plain.labels_NHW).float().mean() > 0.1) == (operation == "cutout")


@needs_dali
@pytest.mark.parametrize("crop_px", [256, 321])
def test_weak_batches_agree(street, crop_px):
    weak = [dataclasses.replace(s, strong=False) for s in street]
    steps = [micro(range(len(weak)), step=step) for step in range(2)]
    pairs = zip(*(train(name, weak, steps, crop_px=crop_px, long_side=(200, 800))
                  for name in ("dali", "reference")),
                strict=True)  # fmt: skip
    wrong, pixels = 0, 0
    for a, b in pairs:
        assert a.images_NCHW.shape == b.images_NCHW.shape == (24, 3, crop_px, crop_px)
        for mean, percentile in per_image(deviations(a, b)):
            assert mean <= 1.5 and percentile <= 8
            assert mean <= 0.4 and percentile <= 1.01, "much closer than required is what was measured"
        different = a.labels_NHW != b.labels_NHW
        assert not (different & ~near_boundary(a.labels_NHW) & ~near_boundary(b.labels_NHW)).any()
        assert ((a.labels_NHW == 255) & (b.labels_NHW != 255)).float().mean() < 1e-4
        wrong, pixels = wrong + different.sum().item(), pixels + different.numel()
    assert wrong / pixels < 1e-4


@needs_dali
def test_mixed_batches_agree(street):
    """Weak and strong samples in one batch: the weak ones as closely as alone, the strong as their colours
    allow."""
    for a, b in zip(
        *(train(name, street, crop_px=256, long_side=(200, 800)) for name in ("dali", "reference")),
        strict=True
    ):
        for index, (mean, percentile) in zip(a.indices, per_image(deviations(a, b)), strict=True):
            assert (mean <= 6
                    and percentile <= 27) if street[index].strong else (mean <= 0.4 and percentile <= 1.01)
        assert (a.labels_NHW != b.labels_NHW).float().mean() < 1e-3
        assert (a.indices == b.indices).all() and a.step == b.step and a.epoch == b.epoch


ODD = {
    "gray.jpg": lambda: (Image.fromarray(smooth(120, 200, 1)), {}),
    "rgb.jpg": lambda: (Image.fromarray(smooth(120, 200)), {"quality": 90}),
    "progressive.jpg": lambda: (Image.fromarray(smooth(120, 200)), {"progressive": True}),
    "cmyk.jpg": lambda: (Image.merge("CMYK", Image.fromarray(smooth(120, 200, 4)).split()), {"quality": 90}),
    "rgba.png": lambda: (Image.fromarray(smooth(120, 200, 4)), {}),
    "luma_alpha.png": lambda: (Image.fromarray(smooth(120, 200, 4)).convert("LA"), {}),
    "palette.png": lambda: (Image.fromarray(smooth(120, 200)).quantize(64), {}),
    "bits.png": lambda: (Image.fromarray(smooth(120, 200, 1)).convert("1"), {}),
    "one.bmp": lambda: (Image.fromarray(smooth(120, 200)), {}),
    "one.tiff": lambda: (Image.fromarray(smooth(120, 200)), {}),
    "one.webp": lambda: (Image.fromarray(smooth(120, 200)), {"lossless": True}),
    "one_wide.jpg": lambda: (Image.fromarray(smooth(90, 1)), {}),
    "one_high.png": lambda: (Image.fromarray(smooth(1, 90)), {}),
    "one_pixel.png": lambda: (Image.fromarray(smooth(1, 1)), {}),
    "tiny.jpg": lambda: (Image.fromarray(smooth(7, 5)), {}),
    "unicode \u00e4 \u4e2d.jpg": lambda: (Image.fromarray(smooth(50, 40)), {}),
}


def oriented(value: int) -> tuple[Image.Image, dict]:
    exif = Image.Exif()
    exif[0x112] = value
    return Image.fromarray(smooth(120, 200)), {"exif": exif.tobytes(), "quality": 95}


@needs_dali
@pytest.mark.parametrize("exif", [True, False])
def test_odd_images_agree(tmp_path, exif):
    samples = [write(tmp_path, name, *(made := make())[:1], **made[1]) for name, make in ODD.items()]
    for value in range(2, 9):
        image, options = oriented(value)
        samples.append(write(tmp_path, f"exif{value}.jpg", image, turned=exif, **options))
    singles = [[index] for index in range(len(samples))]
    pairs = zip(*(evaluate(name, samples, singles) for name in ("dali", "reference")), strict=True)
    for sample, (a, b) in zip(samples, pairs, strict=True):
        assert a.images_NCHW.shape == (1, 3, sample.height, sample.width)
        assert deviations(a, b).max() <= 1.01 and (a.labels_NHW == b.labels_NHW).all(), sample.key
    steps = [micro(range(len(samples)), step=step) for step in range(4)]
    for crop_px in (32, 200):  # 200 is larger than every image
        settings = {"crop_px": crop_px, "long_side": (24, 150)}
        for a, b in zip(*(train(name, samples, steps, **settings) for name in ("dali", "reference")),
                        strict=True):
            assert all(mean <= 1.5 and percentile <= 8 for mean, percentile in per_image(deviations(a, b)))
            different = a.labels_NHW != b.labels_NHW
            assert not (different & ~near_boundary(a.labels_NHW) & ~near_boundary(b.labels_NHW)).any()


@needs_dali
def test_odd_images_are_augmented_strongly(tmp_path):
    samples = [write(tmp_path, name, *(made := make())[:1], strong=True, **made[1]) for name,
               make in ODD.items()]
    steps = [micro(range(len(samples)), step=step) for step in range(4)]
    settings = {"crop_px": 48, "long_side": (24, 150)}
    for a, b in zip(*(train(name, samples, steps, **settings) for name in ("dali", "reference")),
                    strict=True):
        assert all(mean <= 20 and percentile <= 90 for mean, percentile in per_image(deviations(a, b)))


@needs_dali
def test_evaluation_equals_pil(street):
    batches = equal_size_batches(street, 5)
    seen = []
    for batch in evaluate("dali", street, batches):
        for row, index in enumerate(batch.indices):
            pixels = np.asarray(Image.open(street[index].image).convert("RGB")).astype(np.float32)
            own = (batch.images_NCHW[row] * GRAY_LEVELS).permute(1, 2, 0).numpy() + 255 * np.float32(
                [0.485, 0.456, 0.406]
            )
            assert np.abs(own - pixels).max() <= 2 and np.abs(own - pixels).mean() <= 0.2
            assert (batch.labels_NHW[row].numpy() == np.asarray(Image.open(street[index].mask))).all()
            seen.append(index)
    assert sorted(seen) == list(range(len(street)))


@pytest.mark.parametrize("name", LOADERS)
def test_batches_have_the_documented_layout_and_stay_valid(name, street):
    sampler = StepSampler(len(street), 8, seed=0, stage=2)
    held, copies = [], []
    for expected, batch in zip(
        sampler.micro_batches(0, 7), train(name, street, sampler.micro_batches(0, 7)), strict=True
    ):
        images, labels = batch.images_NCHW, batch.labels_NHW
        assert images.shape == (8, 3, 64, 64) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (8, 64, 64) and labels.dtype == torch.uint8 and labels.is_contiguous()
        assert (batch.indices == expected.indices).all() and (batch.step, batch.epoch) == (
            expected.step,
            expected.epoch,
        )
        held.append(batch)
        copies.append((images.clone(), labels.clone()))
    assert len({copy[0].sum().item() for copy in copies}) == 7, "batches differ"
    for batch, (images, labels) in zip(held, copies, strict=True):
        assert torch.equal(batch.images_NCHW, images) and torch.equal(batch.labels_NHW, labels)
    assert len({batch.images_NCHW.data_ptr() for batch in held}) == 7


@pytest.mark.parametrize("name", LOADERS)
def test_a_batch_outlives_its_loader(name, street):
    batches = train(name, street[:4], [micro(range(4), step=step) for step in range(6)])
    first = next(batches)
    copy = first.images_NCHW.clone()
    batches.close()
    del batches
    assert torch.equal(first.images_NCHW, copy)


@pytest.mark.parametrize("name", LOADERS)
def test_batches_do_not_depend_on_composition_threads_or_prefetch(name, street):
    whole = list(train(name, street, [micro(range(8))], threads=1, prefetch=1))[0]
    halves = [
        MicroBatch(step=0, epoch=0, positions=np.arange(4) + start, indices=np.arange(4) + start)
        for start in (0, 4)
    ]
    parts = list(train(name, street, halves, threads=2, prefetch=4))
    assert torch.equal(torch.cat([part.images_NCHW for part in parts]), whole.images_NCHW)
    assert torch.equal(torch.cat([part.labels_NHW for part in parts]), whole.labels_NHW)


@pytest.mark.parametrize("name", LOADERS)
def test_evaluation_of_mixed_sizes_and_missing_masks(name, tmp_path):
    sizes = [(30, 40), (30, 40), (50, 20), (30, 40), (1, 9)]
    samples = [write(tmp_path, f"{i}.png", Image.fromarray(smooth(h, w, seed=i))) for i,
               (h, w) in enumerate(sizes)]
    batches = [[2], [0, 1, 3], [4]]  # the first is not the longest
    for batch, indices in zip(evaluate(name, samples, batches), batches, strict=True):
        assert batch.indices.tolist() == indices and batch.labels_NHW.shape == (
            len(indices),
            *sizes[indices[0]],
        )
    bare = samples[:4] + [Sample(key="bare", image=samples[4].image, width=9, height=1)]
    assert [batch.labels_NHW for batch in evaluate(name, bare, batches)] == [None] * 3
    assert list(evaluate(name, samples, [])) == [] and list(train(name, samples, [])) == []


@pytest.mark.parametrize("name", LOADERS)
def test_wrong_arguments_are_refused_before_anything_is_read(name, tmp_path):
    samples = [write(tmp_path, f"{i}.png", Image.fromarray(smooth(8 + i, 8))) for i in range(2)]
    bare = [Sample(key="bare", image=samples[0].image, width=8, height=8)]
    for call in (
        lambda: train(name, samples + bare),
        lambda: train(name, samples, threads=0),
        lambda: train(name, samples, prefetch=0),
        lambda: evaluate(name, samples, [[0, 1]]),
        lambda: evaluate(name, samples, [[]]),
        lambda: evaluate(name, samples, [[0]], threads=0),
    ):
        with pytest.raises(ValueError):
            call()


def broken(folder: Path, kind: str) -> Sample:
    good = write(folder, "good.jpg", Image.fromarray(smooth(120, 200)), quality=95)
    data, mask = Path(good.image).read_bytes(), Path(good.mask).read_bytes()
    path = folder / ("bad.png" if kind == "cut mask" else "bad.jpg")
    if kind != "missing":
        path.write_bytes({"cut in half": data[: len(data) // 2], "no end": data[:-300],
                          "no picture": b"hello" * 99,
                          "empty": b"", "cut mask": mask[:60], "other size": data}[kind])  # fmt: skip
    image, mask = (good.image, str(path)) if kind == "cut mask" else (str(path), good.mask)
    height = 121 if kind == "other size" else 120
    return Sample(key="bad", image=image, mask=mask, width=200, height=height, plain=True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("kind", ["missing", "cut in half", "no end", "no picture", "empty", "cut mask",
                                  "other size"])
def test_a_broken_file_is_named(name, kind, tmp_path):
    good = [write(tmp_path, f"{i}.jpg", Image.fromarray(smooth(120, 200, seed=i))) for i in range(5)]
    samples = [*good, broken(tmp_path, kind)]
    steps = [micro([0, 1]), micro([2, 3], step=1), micro([4, 5], step=2), micro([0, 1], step=3)]
    for stream in (train(name, samples, steps), evaluate(name, samples, [[0, 1], [2, 3], [5], [4]])):
        with pytest.raises(UserError, match=r"bad\.(jpg|png)") as caught:
            list(stream)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_loaders_are_picked(monkeypatch, capsys):
    assert loader.pick("reference") is reference
    with pytest.raises(ValueError, match="nonsense"):
        loader.pick("nonsense")
    if dali is not None:
        assert loader.pick() is loader.pick("dali") is dali
        assert capsys.readouterr().err == ""
    monkeypatch.setattr(batches, "has_dali", lambda: False)
    monkeypatch.setattr(loader, "_noticed", False)
    with pytest.raises(UserError, match=r"pip install stpp\[cuda12\]"):
        loader.pick("dali")
    assert loader.pick() is reference and loader.pick("auto") is reference
    assert capsys.readouterr().err.count("DALI is not installed") == 1


def test_has_dali_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.delitem(sys.modules, "nvidia.dali", raising=False)
    assert has_dali() is False


NORMALISED = "d68dfe153708ad86bf727d5ff301114ad738ae8c3e5b2ad90ee3623255dd849f"
"""SHA-256 of every colour, normalised."""


def test_normalisation_on_device_equals_numpy():
    values = np.arange(256, dtype=np.uint8)
    pixels_NHWC = np.stack([values, values[::-1], np.roll(values, 99)], axis=1).reshape(2, 8, 16, 3)
    found = normalised(torch.from_numpy(pixels_NHWC)).permute(0, 3, 1, 2)
    assert found.shape == (2, 3, 8, 16) and found.is_contiguous(memory_format=torch.channels_last)
    assert found.permute(0, 2, 3, 1).numpy().tobytes() == normalised(pixels_NHWC).tobytes()
    assert hashlib.sha256(found.permute(0, 2, 3, 1).numpy().tobytes()).hexdigest() == NORMALISED


def few(folder: Path, count: int = 8) -> list[Sample]:
    images = [Image.fromarray(smooth(60, 80, seed=i)) for i in range(count)]
    return [write(folder, f"{i}.png", image, strong=i % 2 == 1) for i, image in enumerate(images)]


def test_reference_batches_equal_a_plain_loop(tmp_path):
    samples = few(tmp_path)
    steps = list(StepSampler(len(samples), 4, seed=0, stage=2).micro_batches(0, 5))
    noise = reference.noise_image(reference.noise_side(64))
    for step, batch in zip(steps, train("reference", samples, steps), strict=True):
        chosen = [samples[i] for i in step.indices]
        stream, config = Stream(samples=samples), AugmentConfig(crop_px=64, long_side=(40, 160))
        drawn = draw(stream, step.indices, step.positions, augment=config, seed=0, stage=1, epoch=step.epoch)
        rows = [reference.augmented(*reference.decoded(sample), drawn, row, stream=stream, noise=noise)
                for row, sample in enumerate(chosen)]
        images_NHWC = torch.from_numpy(np.stack([normalised(image) for (image,), _ in rows]))
        assert torch.equal(batch.images_NCHW, images_NHWC.permute(0, 3, 1, 2))
        assert batch.images_NCHW.stride() == images_NHWC.permute(0, 3, 1, 2).stride()
        assert torch.equal(batch.labels_NHW, torch.from_numpy(np.stack([mask for _, mask in rows])))


THREE = {"views": ("weak", "strong", "strong"), "box": "paste", "masked": False}


@needs_dali
def test_loaders_agree_view_by_view(street):
    """Images without masks: one crop, plain in the first view, recoloured in the others, boxes left to the
    step."""
    bare = [dataclasses.replace(sample, mask=None) for sample in street[:8]]
    steps = [micro(range(8), step=step) for step in range(3)]
    settings = {"crop_px": 256, "long_side": (200, 800), **THREE}
    for a, b in zip(train("dali", bare, steps, **settings), train("reference", bare, steps, **settings),
                    strict=True):
        assert a.labels_NHW is b.labels_NHW is None and len(a.views) == len(b.views) == 3
        assert torch.equal(a.boxes_VN4, b.boxes_VN4) and torch.equal(a.shown_N4, b.shown_N4)
        assert not a.boxes_VN4[0].any() and a.boxes_VN4[1:].any()
        for view, (mean_bound, percentile_bound) in enumerate(((1.5, 8), (6, 27), (6, 27))):
            for mean, percentile in per_image(deviations(a, b, view)):
                assert mean <= mean_bound and percentile <= percentile_bound, view
        assert all(image.is_contiguous(memory_format=torch.channels_last) for image in a.views)
        assert not torch.equal(a.views[1], a.views[2])


@pytest.mark.parametrize("name", LOADERS)
def test_weak_view_of_three_equals_a_single_view(name, tmp_path):
    samples = few(tmp_path)
    bare = [dataclasses.replace(sample, mask=None) for sample in samples]
    steps = [micro(range(8), step=step) for step in range(2)]
    weak = [dataclasses.replace(sample, strong=False) for sample in samples]
    for three, one in zip(train(name, bare, steps, **THREE), train(name, weak, steps), strict=True):
        assert torch.equal(three.views[0], one.images_NCHW)


@pytest.mark.parametrize("name", LOADERS)
def test_shown_region_matches_labels(name, tmp_path):
    """Outside of it, images are black before normalisation and labels are 255."""
    samples = [dataclasses.replace(sample, strong=False) for sample in few(tmp_path)]
    steps = [micro(range(8), step=step) for step in range(4)]
    black = (torch.zeros(3) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    for masked, bare in zip(train(name, samples, steps), train(name, samples, steps, **THREE), strict=True):
        shown_NHW = inside(bare.shown_N4, (64, 64))
        assert torch.equal(shown_NHW, masked.labels_NHW != 255) and not shown_NHW.all() and shown_NHW.any()
        outside = bare.images_NCHW.permute(0, 2, 3, 1)[~shown_NHW]
        torch.testing.assert_close(outside, black.expand_as(outside), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LOADERS)
def test_cutout_boxes_of_images_without_masks(name, tmp_path):
    bare = [dataclasses.replace(sample, mask=None) for sample in few(tmp_path)]
    (erased,) = train(name, bare, views=("strong",), masked=False)
    (kept,) = train(name, bare, views=("strong",), masked=False, box="paste")
    assert erased.boxes_VN4 is None and kept.boxes_VN4 is not None
    stream, config = Stream(samples=bare, views=("strong",),
                            masked=False), AugmentConfig(crop_px=64, long_side=(40, 160))
    (view,) = draw(stream, np.arange(8), np.arange(8), augment=config, seed=0, stage=1, epoch=0).views
    boxes = inside(torch.from_numpy(view.box), (64, 64))[:, None].expand_as(kept.images_NCHW)
    assert boxes.any() and torch.equal(erased.images_NCHW[~boxes], kept.images_NCHW[~boxes])
    assert (erased.images_NCHW[boxes] != kept.images_NCHW[boxes]).float().mean() > 0.9


class AtOnce:
    """Pool that runs everything when it is submitted."""

    def __init__(self, *_, **__):
        pass

    def submit(self, call, *args) -> Future:
        future = Future()
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_) -> None:
        pass


def test_batch_is_copied_while_the_previous_is_used(tmp_path, monkeypatch):
    samples = few(tmp_path, 4)
    steps = [micro([step % 4, (step + 1) % 4], step=step) for step in range(5)]
    plain = list(train("reference", samples, steps))
    log = stream_cases.install(monkeypatch)
    monkeypatch.setattr(reference, "copy_stream", lambda device: stream_cases.Stream("side", log))
    monkeypatch.setattr(reference, "ThreadPoolExecutor", AtOnce)
    for number, batch in enumerate(train("reference", samples, steps), 1):
        assert torch.equal(batch.images_NCHW, plain[number - 1].images_NCHW)
        started = max(int(entry.split()[-1]) for entry in log if entry.startswith("side event"))
        assert started == min(number + 1, len(steps)), "the next copy is queued before this batch is given"
        waited = [f"main waits for side event {number}", "main uses 5-d uint8", "main uses 3-d uint8"]
        at = log.index(waited[0])
        assert log[at : at + 3] == waited, "the memory of both is kept until the main stream has used it"


def test_broken_batch_raises_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "ThreadPoolExecutor", AtOnce)
    samples = [*few(tmp_path, 4), broken(tmp_path, "no picture")]
    steps = [micro([0, 1]), micro([2, 3], step=1), micro([4, 0], step=2)]
    stream = train("reference", samples, steps)
    assert [next(stream).indices.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="bad.jpg"):
        next(stream)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_reference_makes_the_same_batches_on_a_gpu(tmp_path):
    samples = few(tmp_path)
    steps = list(StepSampler(len(samples), 4, seed=0, stage=2).micro_batches(0, 40))
    held = []
    ours = train("reference", samples, steps, device="cuda")
    for a, b in zip(ours, train("reference", samples, steps), strict=True):
        assert a.images_NCHW.is_contiguous(memory_format=torch.channels_last)
        held.append((a, b))
        a.images_NCHW.sum()  # work that the copies overlap
    for a, b in held:
        assert torch.equal(a.images_NCHW.cpu(), b.images_NCHW)
        assert torch.equal(a.labels_NHW.cpu(), b.labels_NHW)


@pytest.mark.gpu
@needs_dali
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_batches_agree(street):
    settings = {"crop_px": 256, "long_side": (200, 800)}
    steps = [micro(range(24), step=step) for step in range(6)]
    held = []
    ours = train("dali", street, steps, device="cuda", **settings)
    for a, b in zip(ours, train("reference", street, steps, **settings), strict=True):
        assert a.images_NCHW.device.type == a.labels_NHW.device.type == "cuda"
        assert a.images_NCHW.is_contiguous(memory_format=torch.channels_last)
        held.append((a, a.images_NCHW.clone()))
        moved = Batch(views=(a.images_NCHW.cpu(),), labels_NHW=a.labels_NHW.cpu(), indices=a.indices)
        for index, (mean, percentile) in zip(a.indices, per_image(deviations(moved, b)), strict=True):
            assert (mean <= 6
                    and percentile <= 27) if street[index].strong else (mean <= 1.5 and percentile <= 8)
        assert (moved.labels_NHW != b.labels_NHW).float().mean() < 1e-3
    assert all(torch.equal(batch.images_NCHW, copy) for batch, copy in held)
    for batch in evaluate("dali", street, equal_size_batches(street, 8), device="cuda"):
        expected = next(evaluate("reference", street, [batch.indices.tolist()]))
        assert torch.equal(batch.labels_NHW.cpu(), expected.labels_NHW)
        assert ((batch.images_NCHW.cpu() - expected.images_NCHW).abs() * GRAY_LEVELS).mean() < 1
