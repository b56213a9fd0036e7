"""Files of every kind show the same pixels, the same way up, in every command and with every loader; or
`prepare` refuses them.

The network of these tests assigns a class to every pixel's colour, so that a mask reveals the pixels that a
command read.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import label_cases
import stpp
import zoo_cases as zoo
from stpp import checkpoint
from stpp.config import AugmentConfig, DataConfig
from stpp.dataset import index
from stpp.distributed import World
from stpp.errors import UserError
from stpp.images.batches import has_dali
from stpp.images.image_file import IMAGE_EXTENSIONS, IMAGENET_MEAN, IMAGENET_STD
from stpp.images.reading import read_header
from stpp.inference import single_images
from stpp.inference.evaluate import evaluate
from stpp.inference.protocol import Identity
from stpp.loading import loader, reference
from stpp.loading.augment import draw
from stpp.loading.native import native_batches
from stpp.loading.sample import Sample, Stream
from stpp.loading.sampler import MicroBatch

LOADERS = ["reference", *(["dali"] if has_dali() else [])]
COLOURS = 251
QUICK = (
    "plain.jpg",
    "turn6.jpg",
    "two_exif.jpg",
    "cmyk_unmarked.jpg",
    "cmyk_turned.jpg",
    "s411.jpg",
    "gray16.png",
    "exif_after.png",
    "palette4_clear.png",
    "turn3.tif",
    "turn8.tif",
    "gray16_turned.tif",
    "exif.webp",
    "bits16.bmp",
    "p3.ppm",
)
KINDS = {
    f"{Path(kind.name).stem}_{kind.name.rpartition('.')[2]}{Path(kind.name).suffix}": kind
    for kind in zoo.kinds()
}
"""File names that differ without their extensions, because keys of images must."""


def named(pixels: np.ndarray) -> np.ndarray:
    """Returns the class of each colour: uint8 [H, W] of uint8 [H, W, 3]."""
    return ((pixels.astype(np.int64) * (1, 2, 4)).sum(2) % COLOURS).astype(np.uint8)


def colours_of(images_NCHW: torch.Tensor) -> np.ndarray:
    """Returns the uint8 [N, H, W, 3] before normalisation."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((images_NCHW.cpu().permute(0, 2, 3, 1) * std + mean) * 255).round().to(torch.uint8).numpy()


class Namer:
    """Network that assigns a class to every colour."""

    num_classes, view_px = COLOURS, None
    identity = Identity(
        weights_sha256="0" * 64, classes=tuple(map(str, range(COLOURS))), backend="eager", precision="fp32"
    )

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        masks = np.stack([named(pixels) for pixels in colours_of(images_NCHW)])
        classes = torch.nn.functional.one_hot(torch.from_numpy(masks).long(), COLOURS)
        return 20.0 * classes.permute(0, 3, 1, 2).float()


@dataclass(frozen=True)
class Zoo:
    """Prepared files of some kinds."""

    root: Path
    prepared: index.Index
    samples: list[Sample]
    seen: list[np.ndarray]
    """What is expected of each: uint8 [H, W, 3], by the PIL decoder and `read_header`."""
    exif: bool


def build(folder: Path, names: list[str], *, exif: bool = True) -> Zoo:
    """Writes and prepares files, each with a mask of zeros of its expected size."""
    (folder / "data" / "photos").mkdir(parents=True)
    (folder / "data" / "labels").mkdir()
    for name in names:
        kind = KINDS[name]
        (folder / "data" / "photos" / name).write_bytes(kind.data)
        shown = kind.truth if exif else zoo.TURNS[read_header(kind.data, exif=True).orientation](kind.truth)
        Image.fromarray(np.zeros(shown.shape[:2], np.uint8)).save(
            folder / "data" / "labels" / f"{Path(name).stem}.png"
        )
    made = index.prepare(
        folder / "data",
        folder / "index",
        layout="globs",
        images="photos/*",
        masks="labels/*.png",
        classes=("a", "b"),
        exif=exif,
        workers=1,
        progress=False,
    )
    samples = [made.sample(f"photos/{name}") for name in names]
    return Zoo(folder / "data", made, samples, [reference.decoded(sample)[0] for sample in samples], exif)


def good(names=None) -> list[str]:
    """Selects kinds that a data set may hold; of these names, or all."""
    return [
        name
        for name, kind in KINDS.items()
        if kind.refused is None
        and Path(name).suffix in IMAGE_EXTENSIONS
        and (names is None or kind.name in names)
    ]


@pytest.fixture(
    scope="module", params=[pytest.param("quick", id="quick"), pytest.param("all", marks=pytest.mark.slow)]
)
def chosen(request) -> list[str]:
    return good(QUICK if request.param == "quick" else None)


@pytest.fixture(scope="module", params=[True, False], ids=["upright", "stored"])
def made(request, chosen, tmp_path_factory) -> Zoo:
    return build(tmp_path_factory.mktemp("zoo"), chosen, exif=request.param)


def test_zoo_is_large():
    assert len(KINDS) >= 60 and len(good(QUICK)) == len(QUICK)


def test_pixels_match_the_picture(made):
    for sample, seen in zip(made.samples, made.seen, strict=True):
        kind = KINDS[Path(sample.image).name]
        stored = zoo.TURNS[read_header(kind.data, exif=True).orientation](kind.truth)
        expected = kind.truth if made.exif else stored
        assert seen.shape == expected.shape, kind.name
        assert np.abs(seen.astype(int) - expected).mean() <= kind.near, kind.name
        assert sample.plain is kind.plain, kind.name


@pytest.mark.parametrize("name", LOADERS)
def test_training_sees_these_pixels(made, name):
    """Uses crops as large as the image, resized to its own size: only mirrored and padded."""
    side = zoo.WIDTH
    micro = MicroBatch(
        step=0, epoch=0, positions=np.arange(len(made.samples)), indices=np.arange(len(made.samples))
    )
    augment = AugmentConfig(crop_px=side, long_side=(side, side))
    stream = Stream(samples=made.samples)
    (batch,) = loader.pick(name).train_batches(
        stream, [micro], augment=augment, seed=0, stage=1, device="cpu", threads=2
    )
    cut = draw(stream, micro.indices, micro.positions, augment=augment, seed=0, stage=1, epoch=0).geometry
    for row, (sample, seen) in enumerate(zip(made.samples, made.seen, strict=True)):
        found = colours_of(batch.images_NCHW[row : row + 1])[0]
        found = found[:, ::-1] if cut.flip[row] else found
        assert np.array_equal(found[: sample.height, : sample.width], seen), sample.key


@pytest.mark.parametrize("name", LOADERS)
def test_evaluation_sees_these_pixels(made, name):
    found = {}

    def see(batch, masks_NHW) -> None:
        found.update(zip(batch.indices.tolist(), colours_of(batch.images_NCHW), strict=True))

    evaluate(
        Namer(), made.samples, World(device=torch.device("cpu")), DataConfig(loader=name, threads=2),
        on_batch=see
    )
    for i, (sample, seen) in enumerate(zip(made.samples, made.seen, strict=True)):
        assert np.array_equal(found[i], seen), sample.key


@pytest.mark.parametrize("name", LOADERS)
def test_labelling_sees_these_pixels(made, name, tmp_path):
    summary = label_cases.run(
        made.root / "photos",
        tmp_path / "out",
        teacher=Namer(),
        loader=name,
        exif=made.exif,
        tta="none",
        shard_size=100,
    )
    assert summary.bad == 0
    for sample, seen in zip(made.samples, made.seen, strict=True):
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{Path(sample.image).stem}.png"))
        assert np.array_equal(mask, named(seen)), sample.key


def test_prediction_sees_these_pixels(made, tmp_path, monkeypatch):
    monkeypatch.setattr(single_images, "open_predictor", lambda *args, **more: Namer())
    checkpoint.save(tmp_path / "best.pt", reading={"exif": made.exif})
    predictor = stpp.load(tmp_path / "best.pt", device="cpu")
    for sample, seen in zip(made.samples, made.seen, strict=True):
        assert np.array_equal(predictor.predict(sample.image), named(seen)), sample.key
        with Image.open(sample.image) as image:
            assert np.array_equal(predictor.predict(image), named(seen)), sample.key


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.refused])
def test_files_without_colours_are_refused_in_one_line(name, tmp_path):
    (tmp_path / "data" / "photos").mkdir(parents=True)
    (tmp_path / "data" / "photos" / name).write_bytes(KINDS[name].data)
    (tmp_path / "data" / "photos" / "good.png").write_bytes(KINDS["rgb_png.png"].data)
    (tmp_path / "data" / "labels").mkdir()
    Image.fromarray(np.zeros((zoo.HEIGHT, zoo.WIDTH), np.uint8)).save(
        tmp_path / "data" / "labels" / "good.png"
    )
    with pytest.raises(
        UserError, match=rf"photos/{name}: cannot be read as an image \(.*{KINDS[name].refused}"
    ) as caught:
        index.prepare(
            tmp_path / "data",
            tmp_path / "index",
            layout="globs",
            images="photos/*",
            masks="labels/*.png",
            classes=("a", "b"),
            workers=1,
            progress=False,
        )
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not has_dali(), reason="NVIDIA DALI is not installed")
@pytest.mark.parametrize(
    "strange", [["exif_webp.webp"], ["turn4_tif.tif", "p3_ppm.ppm"], ["bits16_bmp.bmp", "exif_webp.webp"]]
)
def test_image_that_dali_rejects_is_read_by_pil_and_batches_stay(tmp_path, strange, capfd):
    """As if a file were plain: every batch comes once, in order, with the pixels of the other loader."""
    names = ["plain_jpg.jpg", "rgb_png.png", "turn6_jpg.jpg", "gray_jpg.jpg", *strange]
    made = build(tmp_path, names)
    claimed = [replace(sample, plain=True, strong=True) for sample in made.samples]
    count = len(names)
    micros = [
        MicroBatch(
            step=step, epoch=0, positions=np.arange(3) + 3 * step, indices=(np.arange(3) + 3 * step) % count
        )
        for step in range(6)
    ]
    settings = {
        "augment": AugmentConfig(crop_px=32, long_side=(40, 60)),
        "seed": 0,
        "stage": 1,
        "device": "cpu",
        "threads": 2,
    }
    dali = loader.pick("dali")
    expected = list(
        dali.train_batches(Stream(samples=[replace(sample, strong=True) for sample in made.samples]), micros,
                           **settings)
    )
    found = list(dali.train_batches(Stream(samples=claimed), micros, **settings))
    assert [batch.step for batch in found] == [batch.step for batch in expected] == list(range(6))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.images_NCHW, theirs.images_NCHW) and torch.equal(
            ours.labels_NHW, theirs.labels_NHW
        )
    said = capfd.readouterr()
    for name in strange:
        assert (said.out + said.err).count(f"{name}: DALI cannot decode it, PIL does") == 1


@pytest.mark.parametrize("name", LOADERS)
def test_file_broken_after_preparation_is_named(tmp_path, name):
    made = build(tmp_path, ["plain_jpg.jpg", "lossless_webp.webp", "turn6_tif.tif"])
    (made.root / "photos" / "lossless_webp.webp").write_bytes(b"no longer an image")
    micros = [
        MicroBatch(step=step, epoch=0, positions=np.arange(3), indices=np.arange(3)) for step in range(2)
    ]
    stream = loader.pick(name).train_batches(
        Stream(samples=made.samples),
        micros,
        augment=AugmentConfig(crop_px=32, long_side=(40, 60)),
        seed=0,
        stage=1,
        device="cpu",
        threads=1,
    )
    with pytest.raises(UserError, match=r"lossless_webp\.webp: not one of the formats .*prepare"):
        list(stream)


@pytest.mark.gpu
@pytest.mark.skipif(not (has_dali() and torch.cuda.is_available()), reason="needs DALI and a CUDA device")
def test_gpu_sees_nearly_these_pixels(made):
    """JPEGs are decoded on the GPU, which rounds differently; all others are equal."""
    side = zoo.WIDTH
    numbers = np.arange(len(made.samples))
    micro = MicroBatch(step=0, epoch=0, positions=numbers, indices=numbers)
    augment = AugmentConfig(crop_px=side, long_side=(side, side))
    settings = {"augment": augment, "seed": 0, "stage": 1, "threads": 2}
    (ours,) = loader.pick("dali").train_batches(made.samples, [micro], device="cuda", **settings)
    (truth,) = reference.train_batches(made.samples, [micro], device="cpu", **settings)
    shown, expected = colours_of(ours.images_NCHW).astype(int), colours_of(truth.images_NCHW)
    assert torch.equal(ours.labels_NHW.cpu(), truth.labels_NHW)
    for row, sample in enumerate(made.samples):
        assert np.abs(shown[row] - expected[row]).mean() <= 1.5, sample.key
    whole = [[i] for i in numbers]
    for batch in native_batches(made.samples, whole, device="cuda", loader="dali", threads=2):
        (i,) = batch.indices.tolist()
        found = colours_of(batch.images_NCHW)[0].astype(int)
        assert found.shape == made.seen[i].shape, made.samples[i].key
        assert np.abs(found - made.seen[i]).mean() <= 1.5, made.samples[i].key
