"""Interpretation of shape labels: their class ids, and the class of pixels in no shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stpp.annotations import coco, cvat
from stpp.annotations.labelled import BACKGROUND, is_background
from stpp.annotations.shapes import Legend
from stpp.dataset import class_files
from stpp.dataset.classes import ClassList, counts_nowhere
from stpp.errors import UserError
from stpp.images.masks import IGNORE


def _labels(root: Path, layout: str, files: Sequence[str]) -> dict[int, str] | None:
    """Names by the numbers in shapes; None for layouts whose shapes store names.

    Raises:
        UserError: no file has the names, or two files disagree on a number.
    """
    if layout == "labelme":
        return None
    if layout == "yolo":
        return dict(enumerate(_yolo_names(root)[0]))
    names: dict[int, str] = {}
    for file in files:
        for number, name in coco.listing(root / file).categories.items():
            if names.setdefault(number, name) != name:
                raise UserError(f"{file}: category {number} is {name!r}, but {names[number]!r} in another "
                                "file; give all files the same categories")
    return dict(sorted(names.items()))


def own_classes(root: Path, settings: Mapping, files: Sequence[str]) -> ClassList | None:
    """Class names in the annotation files, with `background` first if unlisted pixels belong to it; None if
    the files have none."""
    labels = _labels(root, settings["layout"], files)
    if labels is None:
        return None
    mapped = {_entry(entry)[0] for entry in settings["mask_map"]}
    names = [name for name in dict.fromkeys(labels.values())
             if name not in mapped and not counts_nowhere(name)]
    if settings["unlisted"] == BACKGROUND and _background(names) is None:
        names.insert(0, BACKGROUND)
    return ClassList(names, files[0] if files else _yolo_names(root)[1])


def legend(root: Path, settings: Mapping, files: Sequence[str] = ()) -> Legend:
    """Interpretation of shapes.

    Args:
        settings: result of stpp.dataset.settings.resolved.
        files: result of `files_of`.

    Raises:
        UserError: a background class is needed but missing, or an invalid entry of the mask map.
    """
    names = list(settings["classes"])
    background = _background(names)
    if settings["unlisted"] == BACKGROUND and background is None:
        raise UserError(f"--data.unlisted background: no class is called {BACKGROUND}; add it to the class "
                        "list, at the position of its id")
    meaning = {name: i for i, name in enumerate(names)}
    labels = _labels(root, settings["layout"], files)
    labels_in_files = set(labels.values()) if labels is not None else None
    mapped: set[str] = set()
    for map_entry in settings["mask_map"]:
        label, class_name = _entry(map_entry)
        if labels_in_files is not None and label not in labels_in_files:
            raise UserError(f"--data.mask-map {map_entry}: no label is called {label!r}; there are "
                            f"{', '.join(sorted(labels_in_files)[:8])}{', ...' * (len(labels_in_files) > 8)}")
        if class_name != "ignore" and class_name not in names:
            raise UserError(f"--data.mask-map {map_entry}: unknown class; the classes are "
                            f"{', '.join(names)}, and ignore")
        if label in mapped:
            raise UserError(f"--data.mask-map {map_entry}: {label!r} is mapped twice")
        mapped.add(label)
        meaning[label] = IGNORE if class_name == "ignore" else names.index(class_name)
    meaning = _ClassIds(meaning)
    classes = meaning if labels is None else {
        number: meaning[name] for number, name in labels.items() if name in meaning}
    return Legend(classes=classes, names=labels or {},
                  unlisted=background if settings["unlisted"] == BACKGROUND else IGNORE,
                  stored=settings.get("annotated") == "stored" or not settings["exif"],
                  smallest_on_top=settings["layout"] != "labelme", crowds=settings.get("crowds") != "ignore",
                  lenient=settings.get("doubtful") == "ignore")


def of_colours(folder: Path, labels: Sequence[cvat.LabelColour], classes: Sequence[str]) -> tuple[str, ...]:
    """Mask-map entries of a folder's labelmap. Without a background class, background pixels are ignored.

    Raises:
        UserError: a label is not a class.
    """
    entries = []
    for label in labels:
        is_empty = counts_nowhere(label.name) or is_background(label.name)
        if label.name not in classes and not is_empty:
            raise UserError(f"{folder / cvat.LABELMAP}: {label.name!r} is not a class; add it to "
                            "--data.classes, or map each colour with --data.mask-map")
        class_id = list(classes).index(label.name) if label.name in classes else None
        if class_id is None and is_background(label.name):
            class_id = _background(classes)
        entries.append(f"{','.join(map(str, label.colour))}={'ignore' if class_id is None else class_id}")
    return tuple(entries)


class _ClassIds(dict):
    """Class ids by name; names of ignored pixels map to 255."""

    def __missing__(self, name: str) -> int:
        if counts_nowhere(name):
            return IGNORE
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and counts_nowhere(name))

    def get(self, name: str, default: int | None = None) -> int | None:
        return self[name] if name in self else default


def _entry(entry: str) -> tuple[str, str]:
    label, equals, class_name = (part.strip() for part in entry.rpartition("="))
    if not equals or not label or not class_name:
        raise UserError(f"--data.mask-map {entry}: expected LABEL=CLASS with names, such as van=car or "
                        "sketch=ignore")
    return label, class_name


def _background(names: Sequence[str]) -> int | None:
    return next((i for i, name in enumerate(names) if is_background(name)), None)


def _yolo_names(root: Path) -> tuple[list[str], str]:
    found = class_files.from_tools(root)
    if found is None:
        raise UserError(f"{root}: no file names the numbered classes; write data.yaml with `names: [...]`")
    return found
