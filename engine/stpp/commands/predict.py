"""`stpp predict`: masks and overlays of a few images. Heavy imports are deferred."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from stpp import config, files, outputs
from stpp.commands.exif_flags import exif_asked
from stpp.commands.options import Compute, ComputeConfig, OutputStride, TrustEngine, ViewPx
from stpp.config import Views
from stpp.errors import UserError

if TYPE_CHECKING:
    from stpp.images.sources import Item
    from stpp.inference.single_images import ImagePredictor


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Write a mask and an overlay for each image. For many images use stpp label."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Images, and folders of images with their sub-folders."""
    out: Path
    """Folder for masks/, overlays/ and classes.json; existing files of the same name are replaced."""
    checkpoint: Path | None = None
    """A best.pt or third-*.pt of a run, or a published state dict."""
    engine: Path | None = None
    """Folder of an engine that `stpp compile` built, instead of a checkpoint."""
    output_stride: OutputStride = None
    view_px: ViewPx = None
    tta: Views = "none"
    exif: tyro.conf.FlagCreatePairsOff[bool] = False
    """Rotate images upright by their EXIF orientation. Without this and --no-exif: as in training, if the
    checkpoint records it; otherwise upright."""
    no_exif: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read images as stored, ignoring EXIF orientation."""
    max_pixels: int = 1 << 24
    """Largest accepted image; larger ones need much memory and get no mask."""
    trust_engine: TrustEngine = False
    compute: Compute = ComputeConfig()

    def __post_init__(self):
        config.check_view(self.view_px)


def predict(args: Sequence[str]) -> None:
    """Runs `stpp predict`.

    Raises:
        UserError: no images, no network, or unreadable images (raised after all others are processed).
    """
    options = config.parse(Predict, args, prog="stpp predict")
    network = options.checkpoint or options.engine
    if network is None or (options.checkpoint and options.engine):
        raise UserError("give either --checkpoint FILE or --engine DIR")
    if not (network.is_dir() if options.engine else files.and_part(network)[0].is_file()):
        raise UserError(f"{network}: no such {'engine folder' if options.engine else 'checkpoint'}")
    if not options.images:
        raise UserError("no images: give stpp predict IMAGE|FOLDER ... --checkpoint FILE --out DIR")
    exif_rule = exif_asked(options.exif, options.no_exif)
    from stpp import distributed, log
    from stpp.inference.single_images import open_image_predictor

    items = list(_items(options))
    with distributed.world(options.compute.device) as world:
        if world.size > 1:
            raise UserError("stpp predict runs in one process; start it without torchrun, or use stpp label")
        predictor = open_image_predictor(network, mode=options.tta, device=world.device,
                                         precision=options.compute.precision,
                                         max_pixels=options.max_pixels, trust=options.trust_engine,
                                         output_stride=options.output_stride, view_px=options.view_px,
                                         exif=exif_rule)
        try:
            bad = _write_all(predictor, items, options.out)
        except OSError as error:
            raise UserError(f"--out {options.out}: {files.describe_error(error)}; make room, or choose "
                            "another --out") from None
    print(f"{options.out}: {len(items) - len(bad)} masks")
    for line in bad[1:]:
        log.say(line)
    if bad:
        others = f" ({len(bad)} of {len(items)} images have no mask, the others are named above)"
        raise UserError(bad[0] + (others if len(bad) > 1 else ""))


def _items(options: Predict) -> Iterator["Item"]:
    """Yields the images of all arguments.

    Raises:
        UserError: a missing argument, a folder without images, or two images with the same mask file.
    """
    from stpp import log
    from stpp.commands.label import refuse_inside
    from stpp.images.items import item_of, require_readable_name
    from stpp.images.sources import FolderSource

    require_readable_name(str(options.out.absolute()), "--out")
    seen: dict[str, str] = {}
    for path in options.images:
        if path.is_dir():
            refuse_inside(options.out, str(path), "the folder")
            source = FolderSource(str(path.absolute()))
            items, skipped = list(source.items()), source.skipped.line()
            if skipped:
                log.say(f"  {path}: {skipped}")
        elif path.is_file():
            items = [item_of(path.name, str(path), str(path.absolute()))]
        else:
            raise UserError(f"{path}: no such image or folder")
        if not items:
            raise UserError(f"{path}: no image in this folder")
        for item in items:
            if seen.setdefault(item.key, item.file) != item.file:
                raise UserError(f"{seen[item.key]} and {item.file} would both become {item.key}.png; write "
                                "them to different --out folders")
            yield item


def _write_all(predictor: "ImagePredictor", items: list["Item"], out: Path) -> list[str]:
    """Writes masks, overlays and classes.json; returns an error line for each image without a mask."""
    from PIL import Image

    from stpp import log
    from stpp.images.masks import write_index_png
    from stpp.images.palette import overlaid, palette
    from stpp.images.pixels import BadImage
    from stpp.images.reading import is_dark

    outputs.claim(out, ("masks", "overlays", "classes.json"))
    count = len(predictor.classes)
    colors = ["#" + bytes(colour).hex() for colour in palette(count)[:count]]
    files.write_json(out / "classes.json", {"classes": list(predictor.classes), "colors": colors})
    bad = []
    for item in items:
        try:
            colours_HWC, reading = predictor.read(item)
            if is_dark(colours_HWC, reading):
                log.say(f"warning: {item.file}: uses few of its {reading.bits} bits per channel, so it looks "
                        "nearly black to the network; stretch it to the full range")
            mask_HW = predictor.mask(colours_HWC)
        except BadImage as error:
            bad.append(f"{item.file}: {error}")
            continue
        mask_path, overlay_path = (out / folder / f"{item.key}.png" for folder in ("masks", "overlays"))
        for path in (mask_path, overlay_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with files.renamed(mask_path) as file:
            write_index_png(file, mask_HW)
        with files.renamed(overlay_path) as file:
            Image.fromarray(overlaid(colours_HWC, mask_HW, count)).save(file, "PNG", compress_level=1)
    return bad
