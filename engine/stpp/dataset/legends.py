"""The meaning of shapes: what the labels of a tool's files are in class ids, and what pixels in no shape
are."""

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
    """Names by the numbers that shapes have; None where shapes are called by names.

    Raises:
        UserError: no file has the names, or two files name one number differently.
    """
    if layout == "labelme":
        return None
    if layout == "yolo":
        return dict(enumerate(_yolo_names(root)[0]))
    names: dict[int, str] = {}
    for file in files:
        for number, name in coco.listing(root / file).categories.items():
            if names.setdefault(number, name) != name:
                raise UserError(f"{file}: category {number} is {name!r}, and {names[number]!r} in another "
                                "file; give the files one list of categories")
    return dict(sorted(names.items()))


def own_classes(root: Path, settings: Mapping, files: Sequence[str]) -> ClassList | None:
    """The class names that the files of the tool have, with `background` first where that is what unlisted
    pixels are; None where they have none."""
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
    """The meaning of shapes.

    Args:
        settings: of stpp.dataset.settings.resolved.
        files: those of `files_of`.

    Raises:
        UserError: no class is the background, where one is needed; or an entry of the mask map that is none.
    """
    names = list(settings["classes"])
    background = _background(names)
    if settings["unlisted"] == BACKGROUND and background is None:
        raise UserError(f"--data.unlisted background: no class is called {BACKGROUND}; put it on the class "
                        "list, where its id is to be")
    meaning = {name: i for i, name in enumerate(names)}
    labels = _labels(root, settings["layout"], files)
    known = set(labels.values()) if labels is not None else None
    for entry in settings["mask_map"]:
        label, class_name = _entry(entry)
        if known is not None and label not in known:
            raise UserError(f"--data.mask-map {entry}: no label is called {label!r}; there are "
                            f"{', '.join(sorted(known)[:8])}{', ...' * (len(known) > 8)}")
        if class_name != "ignore" and class_name not in names:
            raise UserError(f"--data.mask-map {entry}: the right side names no class; the classes are "
                            f"{', '.join(names)}, and ignore")
        meaning[label] = IGNORE if class_name == "ignore" else names.index(class_name)
    meaning = _Named(meaning)
    classes = meaning if labels is None else {
        number: meaning[name] for number, name in labels.items() if name in meaning}
    return Legend(classes=classes, names=labels or {},
                  unlisted=background if settings["unlisted"] == BACKGROUND else IGNORE,
                  stored=settings.get("annotated") == "stored" or not settings["exif"],
                  smallest_on_top=settings["layout"] != "labelme", crowds=settings.get("crowds") != "ignore",
                  lenient=settings.get("doubtful") == "ignore")


def of_colours(folder: Path, labels: Sequence[cvat.LabelColour], classes: Sequence[str]) -> tuple[str, ...]:
    """The entries of the mask map that a labelmap in a folder makes. Where no class is the background, its
    pixels are ignored: there nothing was drawn.

    Raises:
        UserError: a label is no class.
    """
    entries = []
    for label in labels:
        nothing = counts_nowhere(label.name) or is_background(label.name)
        if label.name not in classes and not nothing:
            raise UserError(f"{folder / cvat.LABELMAP}: {label.name!r} is no class; name it in "
                            "--data.classes, or say what each colour means with --data.mask-map")
        meant = list(classes).index(label.name) if label.name in classes else None
        if meant is None and is_background(label.name):
            meant = _background(classes)
        entries.append(f"{','.join(map(str, label.colour))}={'ignore' if meant is None else meant}")
    return tuple(entries)


class _Named(dict):
    """Classes by name; names of what counts nowhere are 255."""

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
        raise UserError(f"{root}: no file names the classes that the texts number; write data.yaml with "
                        "`names: [...]`")
    return found
