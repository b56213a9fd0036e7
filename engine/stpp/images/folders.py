"""File names to skip in users' folders: system files, and masks stored among their images.

One table for data sets and corpora, so that both skip the same files. Names are compared case-insensitively.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

SYSTEM_FOLDERS = frozenset({
    "__macosx", "$recycle.bin", "recycler", "recycled", "system volume information", "found.000",
    "lost+found", "@eadir", "@tmp", "@sharebin", "@sharesnap", "@synologydrive", "#recycle", "#snapshot",
    "@recycle",
    "@recently-snapshot", "@transcode", ".@__thumb", "@__thumb", "network trash folder", "temporary items",
    "thevolumesettingsfolder", ".trashes", ".trash", "~snapshot",
})  # fmt: skip
"""Recycle bins, thumbnails and snapshots of Windows, macOS, Linux, Synology, QNAP, NetApp."""
SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"})
"""Thumbnail caches and folder settings; `Icon` with a carriage return is a folder icon on macOS."""

UNREAD_IMAGES = frozenset(
    ".heic .heif .hif .avif .gif .jp2 .j2k .jpf .jpx .jxl .jxr .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 "
    ".orf .rw2 .raf .pef .raw .psd .psb .xcf .kra .svg .eps .ai .pdf .tga .exr .hdr .pcx .ico .icns .cur "
    ".dcm .nii .mha .npy .npz .mat .qoi .fit .fits .ecw .sid .img .pbm .pnm .pfm .webm .mp4 .mov .avi".split()
)
"""Extensions of unsupported image and video formats; a folder of these is not empty."""

MASK_ENDINGS = (
    "mask",
    "masks",
    "label",
    "labels",
    "seg",
    "segmentation",
    "gt",
    "annotation",
    "groundtruth",
    "labelids",
    "labeltrainids",
    "instanceids",
    "trainids",
    "matte",
    "alpha",
    "color_mask",
    "mask_color",
)
"""Final words of mask names next to their images: `7.jpg` and `7_mask.png`."""
MASK_FOLDERS = frozenset(
    "mask masks label labels annotation annotations gt groundtruth ground_truth segmentation segmentations "
    "segmentationclass segmentationclassaug segmentationobject labelled_masks gtfine".split()
)
"""Lower-case folder names that hold masks if a sibling folder holds images of the same names."""
_BESIDE = re.compile(
    rf"(.+)[_.\- ](?:{'|'.join(MASK_ENDINGS)})(?:[_.\- ]?\(?\d+\)?)?", re.IGNORECASE | re.DOTALL
)
_BEFORE = re.compile(
    rf"((?:.*/)?)(?:{'|'.join(MASK_ENDINGS)})([_.\- ]?)([^/]+)", re.IGNORECASE | re.DOTALL
)
_IMAGE_WORDS = tuple(
    form
    for word in ("img", "image", "images", "photo", "pic", "frame", "rgb")
    for form in (word, word.title(), word.upper())
)
"""First words of image names whose masks begin with `mask`: `img_7.jpg` and `mask_7.png`."""


def is_leftover(name: str, *, is_folder: bool) -> bool:
    """True for system files and folders by name (without path), which are never the user's images."""
    return name.lower() in (SYSTEM_FOLDERS if is_folder else SYSTEM_FILES) or name.startswith("._")


def is_passed_over(name: str, *, is_folder: bool) -> bool:
    """True for system files and for hidden files and folders."""
    return name.startswith(".") or is_leftover(name, is_folder=is_folder)


def image_of_mask(key: str, keys: Container[str]) -> str | None:
    """Image in the same folder that a file is a mask of, by its name: "a/7" for "a/7_mask", "a/7-label_2",
    "a/7_seg (1)" and "a/mask_7"; "a/img7" for "a/mask7".

    Args:
        key: the file's path without its extension.
        keys: paths of images without their extensions.

    Returns:
        the image's key, or None if there is no such image.
    """
    match = _BESIDE.fullmatch(key)
    if match and match[1] in keys:
        return match[1]
    if not (match := _BEFORE.fullmatch(key)):
        return None
    folder, mark, rest = match.groups()
    forms = [f"{folder}{rest}"] * bool(mark) + [f"{folder}{word}{mark}{rest}" for word in _IMAGE_WORDS]
    return next((form for form in forms if form in keys), None)


def image_of_mask_in_folder(key: str, keys: Container[str],
                            folders_in: Callable[[str], Iterable[str]]) -> str | None:
    """Image that a file in a mask folder belongs to: "images/a/7" or "a/7" for "masks/a/7".

    Args:
        key: the file's path without its extension.
        keys: paths of images without their extensions.
        folders_in: names of the sub-folders of a folder ("" is the top).

    Returns:
        the image's key, or None if there is no such image.
    """
    parts = key.split("/")
    place = next((i for i, part in enumerate(parts[:-1]) if part.lower() in MASK_FOLDERS), None)
    if place is None:
        return None
    before, after = parts[:place], parts[place + 1 :]
    siblings = (folder for folder in folders_in("/".join(before)) if folder.lower() not in MASK_FOLDERS)
    forms = ("/".join([*before, *between, *after]) for between in ((), *((folder,) for folder in siblings)))
    return next((form for form in forms if form in keys), None)


def folders_of(keys: Iterable[str]) -> Callable[[str], Iterable[str]]:
    """Lookup of the sub-folder names of each folder in a listing; for `image_of_mask_in_folder`.

    Args:
        keys: paths of files.
    """
    subfolders: dict[str, dict[str, None]] = {}
    for folder in dict.fromkeys(key.rpartition("/")[0] for key in keys):
        while folder:
            folder, _, name = folder.rpartition("/")
            subfolders.setdefault(folder, {})[name] = None
    return lambda folder: subfolders.get(folder, ())


@dataclass
class SkippedFiles:
    """Counts of files and folders skipped in a listing."""

    system: Counter[str] = field(default_factory=Counter)
    """System files and folders by name."""
    hidden: int = 0
    """Names that begin with a dot."""
    runs: int = 0
    """Folders of runs and indices, and folders with outputs of other commands."""
    extensions: Counter[str] = field(default_factory=Counter)
    """Unsupported files among the images, by lower-case extension; "" without one."""

    def add(self, name: str, *, is_folder: bool) -> bool:
        """Counts a name if it is skipped, and returns whether it is."""
        if is_leftover(name, is_folder=is_folder):
            self.system["._*" if name.startswith("._") else name.strip()] += 1
        elif name.startswith("."):
            self.hidden += 1
        else:
            return False
        return True

    def unread(self, name: str) -> None:
        """Counts an unsupported file among the images."""
        self.extensions[os.path.splitext(name)[1].lower()] += 1

    def pictures(self) -> int:
        """Number of unsupported files that may be pictures: of a known format, or without an extension."""
        return sum(
            count
            for extension, count in self.extensions.items()
            if not extension or extension in UNREAD_IMAGES
        )

    def lines(self) -> list[str]:
        """Skipped files as text, one line per kind."""
        lines = []
        if self.extensions:
            parts = [
                f"{count} {extension or 'without an extension'}"
                for extension, count in _most_first(self.extensions)
            ]
            shown = ", ".join(parts[:12]) + (
                f" and {len(parts) - 12} more extensions" if len(parts) > 12 else ""
            )
            lines.append(f"{shown}: unsupported formats")
        if self.system:
            parts = [f"{count} {name}" for name, count in _most_first(self.system)[:8]]
            lines.append(f"{', '.join(parts)}: system files")
        if self.runs:
            lines.append(f"{self.runs} folders with outputs of stpp (a run, an index, masks)")
        if self.hidden:
            lines.append(f"{self.hidden} hidden (names that begin with a dot)")
        return lines


def _most_first(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0] or "~"))
