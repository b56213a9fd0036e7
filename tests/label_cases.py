"""Cases of the tests of labelling: tiny images of every kind, good and bad, and a teacher that needs no
network."""

import hashlib
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from stpp import distributed
from stpp.config import DataConfig, LabelConfig
from stpp.images.sources import open_source
from stpp.inference.predictors import OpenedPredictor
from stpp.label.assignment import Assignment
from stpp.label.labels import label_corpus
from stpp.label.shards import WHOLE

HERE = distributed.World(device=torch.device("cpu"))
SIZES = [(48, 64), (64, 48), (40, 56)]


class Tiny:
    """Teacher of four classes from one fixed convolution at a quarter of the size; counts the images it
    saw."""

    num_classes, view_px = 4, None

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self._weight = torch.randn(4, 3, 4, 4, generator=generator)
        self.seen = 0

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        self.seen += len(images_NCHW)
        side = [max(0, 4 - length) for length in images_NCHW.shape[-2:]]
        return F.conv2d(F.pad(images_NCHW, (0, side[1], 0, side[0])), self._weight.to(images_NCHW.device),
                        stride=4)


def picture(seed: int, size: tuple[int, int] = (48, 64)) -> Image.Image:
    """Draws a smooth picture, (height, width)."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3),
                                                 dtype=np.uint8)
    return Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def good_files(count: int = 12) -> dict[str, bytes]:
    """Names and bytes of plain JPEGs in two folders."""
    return {f"{('one', 'two/deep')[i % 2]}/image{i:03d}.jpg": encoded(picture(i, SIZES[i % 3]))
            for i in range(count)}


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(101, (40, 56)), exif=exif)


def odd_files() -> dict[str, bytes]:
    """Images of unusual kinds that can be labelled."""
    deep = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    wide = picture(102, (2, 20000))
    return {
        "odd/pixel.png": encoded(Image.new("RGB", (1, 1), (200, 10, 90)), "PNG"),
        "odd/wide.png": encoded(wide, "PNG"),
        "odd/cmyk.jpg": encoded(picture(103).convert("CMYK")),
        "odd/deep.png": encoded(Image.fromarray(deep), "PNG"),
        "odd/palette.png": encoded(picture(104).convert("P"), "PNG"),
        "odd/gray.jpg": encoded(picture(105).convert("L")),
        "odd/alpha.png": encoded(picture(106).convert("RGBA"), "PNG"),
        "odd/turned.jpg": rotated(),
        "odd/upper.JPG": encoded(picture(107)),
    }


def bad_files() -> dict[str, bytes]:
    """One file of each kind that cannot be labelled."""
    whole, png = encoded(picture(108)), encoded(picture(109), "PNG")
    floats = io.BytesIO()
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(floats, "TIFF")
    return {
        "bad/truncated.jpg": whole[: len(whole) * 2 // 3],
        "bad/cut_header.jpg": whole[:100],
        "bad/half.png": png[: len(png) // 2],
        "bad/empty.jpg": b"",
        "bad/text.jpg": b"this is no image\n" * 20,
        "bad/bomb.png": bomb(60000, 60000),
        "bad/huge.png": bomb(20000, 1000),
        "bad/floats.tif": floats.getvalue(),
    }


def bomb(width: int, height: int) -> bytes:
    """Builds a PNG of few bytes that declares many pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def as_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def as_tar(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        add_to(archive, files)
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return path


def add_to(archive: tarfile.TarFile, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def run(source, out: Path, *, here=HERE, teacher=None, output: str = "png", loader: str = "reference",
        tar_folders: bool = False, root=None, identity: str = "tiny", part=WHOLE, verify: bool = False,
        exif: bool = True, update: bool = False, classes: tuple[str, ...] = (), **config):
    """Labels in this process."""
    given = {"tta": "flip", "batch_per_rank": 3, "shard_size": 5, "max_pixels": 1 << 20} | config
    if isinstance(source, (str, Path)):
        source = open_source(str(source), root=root, tar_folders=tar_folders)
    task = Assignment(source=source, out=out, config=LabelConfig(**given), output=output, part=part,
                      verify=verify, update=update, data=DataConfig(threads=1, loader=loader, exif=exif))
    network = OpenedPredictor(network=teacher or Tiny(), identity=identity, classes=classes)
    return label_corpus(lambda images: [network], task, here)


def contents(out: Path) -> dict[str, str]:
    """Returns the digest of every file of a result, except temporary files of killed processes."""
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*"))
            if path.is_file() and not path.name.endswith(".tmp")}


def plain_mask(teacher, path: Path, scales, mirrored: bool) -> np.ndarray:
    """Computes the mask of one image by the description of the method, view by view: uint8 [H, W]."""
    with Image.open(path) as image:
        turn = {6: Image.Transpose.ROTATE_270}.get(image.getexif().get(0x0112))
        if image.mode == "I;16":
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        image = image.convert("RGB")
        image = image.transpose(turn) if turn else image
        values = (np.asarray(image, dtype=np.float64) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    images = torch.from_numpy(values).float().permute(2, 0, 1)[None]
    height, width = images.shape[-2:]
    total = 0
    for scale in scales:
        size = (max(1, int(height * scale)), max(1, int(width * scale)))
        view = F.interpolate(images, size, mode="bilinear", align_corners=True)
        for flip in (False, True)[: 1 + mirrored]:
            low = teacher.logits(view.flip(3) if flip else view)
            probability = F.interpolate(low, size, mode="bilinear", align_corners=True).softmax(1)
            probability = probability.flip(3) if flip else probability
            total = total + F.interpolate(probability, (height, width), mode="bilinear", align_corners=True)
    return total.argmax(1)[0].numpy().astype(np.uint8)
