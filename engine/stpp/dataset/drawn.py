"""Layouts whose masks are drawn from shapes: `coco`, `yolo` and `labelme`.

`coco`: images anywhere below the root, or as `--data.images` says, and the JSON files that `--data.masks`
names; an image is found by its `file_name`, from the root, from the JSON's folder, or by the end of its path
if that is of one image alone. `yolo`: `images/**` and `labels/**/*.txt`, with any folders before them; or
texts beside images. `labelme`: a JSON beside each image. For the last two, two patterns may say otherwise.
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
from stpp.images.folders import PassedOver

FORMATS = ("coco", "yolo", "labelme")
ENDINGS = {"coco": ".json", "yolo": ".txt", "labelme": ".json"}
_ABSOLUTE = re.compile(r"[/~]|[A-Za-z]:")


def refuse_settings(layout: str, images: str | None, masks: str | None, options: Mapping[str, object], *,
                    exif: bool) -> None:
    """Refuses settings that do not go with a layout.

    Args:
        options: `unlisted`, `annotated`, `crowds` and `doubtful`; None where not given.

    Raises:
        UserError: one of them.
    """
    if layout not in FORMATS:
        for name, value in options.items():
            if value is not None:
                raise UserError(f"--data.{name} {value}: goes with --data.layout {', '.join(FORMATS)}, not "
                                f"{layout}")
        return
    if options["unlisted"] is None:
        raise UserError(f"--data.layout {layout}: say what pixels in no shape are: --data.unlisted "
                        "background, or --data.unlisted ignore where only some objects were drawn")
    if options["crowds"] is not None and layout != "coco":
        raise UserError(f"--data.crowds {options['crowds']}: goes with --data.layout coco, not {layout}")
    if options["annotated"] == "upright" and not exif:
        raise UserError("--data.annotated upright: goes not with --data.no-exif, which takes images and "
                        "shapes as they are stored")
    if layout == "coco" and not masks:
        raise UserError("--data.layout coco: needs --data.masks, the JSON file or a pattern of several, such "
                        "as annotations/instances_train2017.json or 'annotations/instances_*.json'")
    if layout != "coco" and (images is None) != (masks is None):
        raise UserError(f"--data.layout {layout}: give both patterns, --data.images and --data.masks, or "
                        "none")


def files_of(root: Path, layout: str, masks: str | None, *, follow_links: bool = False) -> list[str]:
    """The JSON files of the layout coco, relative to the root; none of other layouts, whose files go with
    images.

    Raises:
        UserError: no such file, or one outside the root.
    """
    if layout != "coco":
        return []
    if set(masks) & set("*?[{") and not (root / masks).is_file():
        side = patterns.parsed(masks, "masks", root)
        below = len(side.prefix) + bool(side.prefix)
        found = [path for path in walk(root, side.prefix, follow_links=follow_links)
                 if side.pattern.fullmatch(unicodedata.normalize("NFC", path[below:]))]
        if not found:
            raise UserError(f"--data.masks {masks}: no file matches it under {root}")
        return sorted(found)
    return [_below(root, masks, follow_links)]


def _below(root: Path, masks: str, follow_links: bool) -> str:
    """A file that a flag names, from the root, or as the shell sees it, relative to the root."""
    tried = (root / masks, Path(masks).expanduser().absolute())
    path = next((Path(os.path.normpath(one)) for one in tried if one.is_file()), None)
    if path is None:
        raise UserError(f"--data.masks {masks}: no such file under {root}")
    for form in (path, path.parent.resolve() / path.name):
        if form.is_relative_to(root):
            if not follow_links and not path.resolve().is_relative_to(root):
                raise UserError(f"--data.masks {masks}: is a link out of {root}; {FOLLOW} reads what links "
                                "lead to")
            return form.relative_to(root).as_posix()
    raise UserError(f"--data.masks {masks}: lies outside {root}; put it, or a link to it, below the data "
                    "root")


def match(search: Search, layout: str, images: str | None, masks: str | None, taken: Mapping[str, str],
          notes: Notes) -> dict[str, tuple[str, ShapeSource]]:
    """The file of shapes of each image that has one, and where in it they stand.

    Args:
        taken: images by their pairing names.

    Raises:
        UserError: a file that is none of the layout, a name in it that leads outside or is of several images,
            or no image with shapes.
    """
    if layout == "coco":
        found = _of_coco(search, masks, list(taken.values()), notes)
    else:
        found = _of_files(search, layout, images, masks, taken, notes)
    if not found:
        looked = masks or ("labels/**/*.txt" if layout == "yolo" else "a .json beside each image")
        raise UserError(f"{search.root}: no image has shapes (layout {layout}); looked for {looked}")
    return found


def _of_files(search: Search, layout: str, images: str | None, masks: str | None, taken: Mapping[str, str],
              notes: Notes) -> dict[str, tuple[str, ShapeSource]]:
    """A file for each image."""
    if masks is not None:
        sides = [patterns.parsed(images, "images", search.root), patterns.parsed(masks, "masks", search.root)]
        alike = sides[0].pattern.groups == sides[1].pattern.groups
        pairs = search.named(sides[1], "shapes", alike, PassedOver())
        image_of = taken
    else:
        pairs = search.named(Side("", None, (ENDINGS[layout],)), "shapes", False, PassedOver())
        pairs = ((_image_name(name) if layout == "yolo" else name, path) for name, path in pairs)
        image_of = {unicodedata.normalize("NFC", os.path.splitext(path)[0]): path for path in taken.values()}
    found, alone = {}, []
    for name, path in pairs:
        if (image := image_of.get(name)) is not None:
            if image in found:
                raise UserError(f"{search.root}: {found[image][0]} and {path} are both of {image}; remove "
                                "one")
            found[image] = (path, ShapeSource(layout))
        elif masks is not None or _is_of_shapes(path, layout):
            alone.append(path)
    if alone and found:
        notes.warn(f"{search.root}: files of shapes that belong to no image: {len(alone)}, for example "
                   f"{alone[0]}")
    return found


def _is_of_shapes(path: str, layout: str) -> bool:
    """False for files that are of something else by their names."""
    return path != class_files.JSON if layout == "labelme" else "labels" in path.split("/")[:-1]


def _image_name(name: str) -> str:
    """The image of a text, without its extension: its last folder `labels` stands for `images`."""
    parts = name.split("/")
    place = next((i for i in range(len(parts) - 2, -1, -1) if parts[i] == "labels"), None)
    return name if place is None else "/".join([*parts[:place], "images", *parts[place + 1 :]])


def _of_coco(search: Search, masks: str, images: Sequence[str],
             notes: Notes) -> dict[str, tuple[str, ShapeSource]]:
    names = _Names(images)
    found: dict[str, tuple[str, ShapeSource]] = {}
    listed: dict[str, str] = {}
    missing, empty = [], []
    for file in files_of(search.root, "coco", masks, follow_links=search.follow_links):
        for one in coco.listing(search.root / file).images:
            image = names.find(one.name, file)
            if image is None:
                missing.append(one.name)
                continue
            if image in listed:
                raise UserError(f"{file}: {image} is listed twice, here as {one.name!r} and in "
                                f"{listed[image]}; leave one of them out")
            listed[image] = file
            if one.parts:
                found[image] = (file, ShapeSource("coco", one.parts, one.size))
            else:
                empty.append(image)
    if missing and not listed:
        raise UserError(f"--data.masks {masks}: none of its {len(missing)} images is below {search.root}, "
                        f"for example {missing[0][:120]!r}")
    if names.by_ends:
        name, image = next(iter(names.by_ends.items()))
        notes.line(f"{masks}: {counted(len(names.by_ends), 'image')} found by the end of the path alone, for "
                   f"example {name[:120]}, taken for {image}")
    if missing:
        notes.warn(f"{masks}: {counted(len(missing), 'image')} that it lists "
                   f"{'is' if len(missing) == 1 else 'are'} not there, for example {missing[0][:120]}")
    if empty:
        notes.line(f"{masks}: {counted(len(empty), 'image')} that it lists without an annotation, taken as "
                   f"unlabelled: that may mean nothing to see or not looked at, for example {empty[0]}")
    return found


class _Names:
    """Images by the names that other programs have for them."""

    def __init__(self, images: Sequence[str]):
        self._images = {unicodedata.normalize("NFC", image): image for image in images}
        self._ends: dict[str, list[str]] = {}
        self.by_ends: dict[str, str] = {}
        """Names that stand for the end of a path alone, and whose they were taken for."""
        for image in sorted(self._images):
            self._ends.setdefault(image.rpartition("/")[2], []).append(image)

    def find(self, name: str, file: str) -> str | None:
        """The image that a file calls so; None if there is none.

        Raises:
            UserError: the name leads outside, or means several.
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
                            "from the data root, or say which images are meant with --data.images")
        if not ends:
            return None
        self.by_ends[name] = self._images[ends[0]]
        return self._images[ends[0]]


def _exact(name: str, folder: str) -> Iterator[str]:
    if folder:
        yield f"{folder}/{name}"
    yield name
