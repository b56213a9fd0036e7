"""Layouts whose masks are drawn from shapes: `coco`, `yolo` and `labelme`.

`coco`: images anywhere below the root, or matching `--data.images`, and the JSON files of `--data.masks`; an
image is found by its `file_name`, relative to the root or to the JSON's folder, or by a unique path ending.
`yolo`: `images/**` and `labels/**/*.txt`, below any folders; or texts next to their images. `labelme`: a JSON
next to each image. For the last two, a pair of patterns overrides these locations.
"""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from stpp.annotations import coco
from stpp.annotations.shapes import ShapeSource
from stpp.dataset import class_files, patterns
from stpp.dataset.notes import Notes, counted
from stpp.dataset.patterns import Side
from stpp.dataset.search import Search
from stpp.dataset.walk import FOLLOW, walk
from stpp.errors import UserError
from stpp.images.folders import SkippedFiles

FORMATS = ("coco", "yolo", "labelme")
ENDINGS = {"coco": ".json", "yolo": ".txt", "labelme": ".json"}
_ABSOLUTE = re.compile(r"[/~]|[A-Za-z]:")


def refuse_settings(layout: str, images: str | None, masks: str | None, options: Mapping[str, object], *,
                    exif: bool) -> None:
    """Rejects settings that do not apply to a layout.

    Args:
        options: `unlisted`, `annotated`, `crowds` and `doubtful`; None if not given.

    Raises:
        UserError: one of them does not apply.
    """
    if layout not in FORMATS:
        for name, value in options.items():
            if value is not None:
                raise UserError(f"--data.{name} {value}: needs --data.layout {', '.join(FORMATS)}, not "
                                f"{layout}")
        return
    if options["unlisted"] is None:
        raise UserError(f"--data.layout {layout}: needs a class for pixels in no shape: --data.unlisted "
                        "background, or --data.unlisted ignore if only some objects were drawn")
    if options["crowds"] is not None and layout != "coco":
        raise UserError(f"--data.crowds {options['crowds']}: needs --data.layout coco, not {layout}")
    if options["annotated"] == "upright" and not exif:
        raise UserError("--data.annotated upright: conflicts with --data.no-exif, which reads images and "
                        "shapes as stored")
    if layout == "coco" and not masks:
        raise UserError("--data.layout coco: needs --data.masks, the JSON file or a pattern of several, such "
                        "as annotations/instances_train2017.json or 'annotations/instances_*.json'")
    if layout != "coco" and (images is None) != (masks is None):
        raise UserError(f"--data.layout {layout}: give both patterns, --data.images and --data.masks, or "
                        "neither")


def files_of(root: Path, layout: str, masks: str | None, *, follow_links: bool = False) -> list[str]:
    """JSON files of the layout coco, relative to the root; empty for other layouts, which have one file per
    image.

    Raises:
        UserError: no such file, or a file outside the root.
    """
    if layout != "coco":
        return []
    if set(masks) & set("*?[{") and not os.path.isfile(root / masks):
        side = patterns.parsed(masks, "masks", root)
        below = len(side.prefix) + bool(side.prefix)
        paths = [path for path in walk(root, side.prefix, follow_links=follow_links)
                 if side.pattern.fullmatch(unicodedata.normalize("NFC", path[below:]))]
        if not paths:
            raise UserError(f"--data.masks {masks}: no file matches it under {root}")
        return sorted(paths)
    return [_below(root, masks, follow_links)]


def _below(root: Path, masks: str, follow_links: bool) -> str:
    """File named by a flag, relative to the root or to the working directory; returned relative to the
    root."""
    candidates = (root / masks, Path(masks).expanduser().absolute())
    path = next((Path(os.path.normpath(candidate)) for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise UserError(f"--data.masks {masks}: no such file under {root}")
    for form in (path, path.parent.resolve() / path.name):
        if form.is_relative_to(root):
            if not follow_links and not path.resolve().is_relative_to(root):
                raise UserError(f"--data.masks {masks}: is a link out of {root}; {FOLLOW} allows such links")
            return form.relative_to(root).as_posix()
    raise UserError(f"--data.masks {masks}: is outside {root}; move it, or a link to it, below the data "
                    "root")


def match(search: Search, layout: str, images: str | None, masks: str | None, image_of: Mapping[str, str],
          notes: Notes) -> tuple[dict[str, tuple[str, ShapeSource]], dict[str, str]]:
    """Shape file of each annotated image, with the location of the shapes in it; and the JSON file of each
    listed image (layout coco), annotated or not.

    Args:
        image_of: images by their pairing names.

    Raises:
        UserError: an invalid file, an image name that leads outside or is ambiguous, or no image with shapes.
    """
    listed: dict[str, str] = {}
    if layout == "coco":
        shapes, listed = _of_coco(search, masks, list(image_of.values()), notes)
    else:
        shapes = _of_files(search, layout, images, masks, image_of, notes)
    if not shapes:
        looked = masks or ("labels/**/*.txt" if layout == "yolo" else "a .json next to each image")
        raise UserError(f"{search.root}: no image has shapes (layout {layout}); looked for {looked}")
    return shapes, listed


def _of_files(search: Search, layout: str, images: str | None, masks: str | None, taken: Mapping[str, str],
              notes: Notes) -> dict[str, tuple[str, ShapeSource]]:
    """Shape files of layouts with one file per image."""
    if masks is not None:
        sides = [patterns.parsed(images, "images", search.root), patterns.parsed(masks, "masks", search.root)]
        alike = sides[0].pattern.groups == sides[1].pattern.groups
        pairs = search.named_files(sides[1], "shapes", alike, SkippedFiles())
        image_of = taken
    else:
        pairs = search.named_files(Side("", None, (ENDINGS[layout],)), "shapes", False, SkippedFiles())
        pairs = ((_image_name(name) if layout == "yolo" else name, path) for name, path in pairs)
        image_of = {unicodedata.normalize("NFC", os.path.splitext(path)[0]): path for path in taken.values()}
    shapes, orphans = {}, []
    for name, path in pairs:
        if (image := image_of.get(name)) is not None:
            if image in shapes:
                raise UserError(f"{search.root}: {shapes[image][0]} and {path} both belong to {image}; "
                                "remove one")
            shapes[image] = (path, ShapeSource(layout))
        elif masks is not None or _is_of_shapes(path, layout):
            orphans.append(path)
    if orphans and shapes:
        notes.warn(f"{search.root}: {counted(len(orphans), 'shape file')} without an image, for example "
                   f"{orphans[0]}")
    return shapes


def _is_of_shapes(path: str, layout: str) -> bool:
    """False for files that, by their names, are not shape files."""
    return path != class_files.JSON if layout == "labelme" else "labels" in path.split("/")[:-1]


def _image_name(name: str) -> str:
    """Image name of a YOLO text, without extension: its last folder `labels` becomes `images`."""
    parts = name.split("/")
    place = next((i for i in range(len(parts) - 2, -1, -1) if parts[i] == "labels"), None)
    return name if place is None else "/".join([*parts[:place], "images", *parts[place + 1 :]])


def _of_coco(search: Search, masks: str, images: Sequence[str],
             notes: Notes) -> tuple[dict[str, tuple[str, ShapeSource]], dict[str, str]]:
    names = _ImageNames(images)
    shapes: dict[str, tuple[str, ShapeSource]] = {}
    listed: dict[str, str] = {}
    missing, empty = [], []
    for file in files_of(search.root, "coco", masks, follow_links=search.follow_links):
        for record in coco.listing(search.root / file).images:
            image = names.find(record.name, file)
            if image is None:
                missing.append(record.name)
                continue
            if image in listed:
                raise UserError(f"{file}: {image} is listed twice, here as {record.name!r} and in "
                                f"{listed[image]}; remove one")
            listed[image] = file
            if record.parts:
                shapes[image] = (file, ShapeSource("coco", record.parts, record.size))
            else:
                empty.append(image)
    if missing and not listed:
        raise UserError(f"--data.masks {masks}: none of its {len(missing)} images is below {search.root}, "
                        f"for example {missing[0][:120]!r}")
    if names.by_ends:
        name, image = next(iter(names.by_ends.items()))
        notes.line(f"{masks}: {counted(len(names.by_ends), 'image')} matched only by the end of the path, "
                   f"for example {name[:120]} to {image}")
    if missing:
        notes.warn(f"{masks}: {counted(len(missing), 'listed image')} missing, for example "
                   f"{missing[0][:120]}")
    if empty:
        notes.line(f"{masks}: {counted(len(empty), 'listed image')} without an annotation, treated as "
                   f"unlabelled (no objects, or not annotated), for example {empty[0]}")
    return shapes, listed


class _ImageNames:
    """Lookup of images by the names in annotation files."""

    def __init__(self, images: Sequence[str]):
        self._images = {unicodedata.normalize("NFC", image): image for image in images}
        self._ends: dict[str, list[str]] = {}
        self.by_ends: dict[str, str] = {}
        """Names matched by a path ending only, and the images they were matched to."""
        for image in sorted(self._images):
            self._ends.setdefault(image.rpartition("/")[2], []).append(image)

    def find(self, name: str, file: str) -> str | None:
        """Image with this name in an annotation file; None if there is none.

        Raises:
            UserError: the name leads outside the root, or is ambiguous.
        """
        plain = unicodedata.normalize("NFC", name.replace("\\", "/"))
        parts = [part for part in plain.split("/") if part not in ("", ".")]
        if ".." in parts or _ABSOLUTE.match(plain) or "\0" in plain or not parts:
            raise UserError(f"{file}: the file_name {name[:120]!r} leads outside the data root; write names "
                            "relative to it, without '..'")
        plain = "/".join(parts)
        folder = file.rpartition("/")[0]
        for exact in _exact(plain, folder):
            if exact in self._images:
                return self._images[exact]
        ends = [image for image in self._ends.get(parts[-1], ()) if image.endswith(f"/{plain}")]
        if len(ends) > 1:
            raise UserError(f"{file}: the file_name {name[:120]!r} may be {ends[0]} or {ends[1]}; write it "
                            "relative to the data root, or select the images with --data.images")
        if not ends:
            return None
        self.by_ends[name] = self._images[ends[0]]
        return self._images[ends[0]]


def _exact(name: str, folder: str) -> Iterator[str]:
    if folder:
        yield f"{folder}/{name}"
    yield name
