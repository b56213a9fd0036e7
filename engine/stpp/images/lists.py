"""Corpora listed in a text file."""

import codecs
import hashlib
import io
import os
import re
from collections.abc import Iterator
from typing import IO

from stpp.errors import UserError
from stpp.images import storage, tars
from stpp.images.image_file import IMAGE_EXTENSIONS
from stpp.images.items import Item, SkippedItems, failed_item, item_of

_IMAGE_END = rf"({'|'.join(map(re.escape, IMAGE_EXTENSIONS))})\s+(?=\S)"


_LOOKED_AT = 1 << 12
"""Bytes at the start of a list that distinguish text from other files."""


class ListSource:
    """Images named in a text file, one per line (`image`, or `image mask` as in split files)."""

    def __init__(self, path: str, root: str):
        self._path, self._root = path, root
        self.skipped = SkippedItems()

    def items(self) -> Iterator[Item]:
        self.skipped = SkippedItems()
        with storage.opened(self._path) as file:
            for text in _lines(file, self._path):
                if text := _plain(text.strip()):
                    yield self._item(text)

    def _item(self, text: str) -> Item:
        if storage.is_url(text):
            return item_of(text.partition("://")[2].lstrip("/"), text, text)
        mark = self._mark(text)
        if mark == storage.ABSENT and len(text.split()) > 1:
            # `image mask`: names may hold spaces, so the image is an existing file with an image extension.
            cuts = [text[: match.end(1)] for match in re.finditer(_IMAGE_END, text, re.IGNORECASE)]
            text = next((cut for cut in cuts if self._mark(cut) != storage.ABSENT), cuts[0] if cuts else text)
            mark = self._mark(text)
        name = text.lstrip("/") if os.path.isabs(text) else text
        item = item_of(name, text, self._file(text), mark=mark)
        if item.error is not None:
            return failed_item(text, self._file(text), item.error + _remedy(text), mark)
        if mark == storage.ABSENT and (problem := _other_form(text)):
            return failed_item(text, self._file(text), problem, mark)
        return item

    def _file(self, text: str) -> str:
        remote = storage.is_url(self._root) and not os.path.isabs(text)
        return f"{self._root}/{text}" if remote else os.path.join(self._root, text)

    def _mark(self, text: str) -> str:
        """Mark of a local image; empty for remote ones, which would need a request each."""
        file = self._file(text)
        if storage.is_url(file):
            return ""
        try:
            return storage.mark(file)
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            return storage.ABSENT

    def stamp(self) -> dict:
        """Digest of the list, and digest of its images' sizes and modification times."""
        digest, images = hashlib.sha256(), hashlib.sha256()
        with storage.opened(self._path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        for item in self.items():
            images.update(f"{item.mark}\n".encode())
        return {"kind": "list", "path": self._path, "root": self._root, "digest": digest.hexdigest(),
                "images": images.hexdigest()}


def _plain(text: str) -> str:
    """A line without leading `./`."""
    while text.startswith("./"):
        text = text[2:].lstrip("/")
    return text


def _lines(file: IO[bytes], path: str) -> Iterator[str]:
    """Lines of a text file: UTF-8, or the encoding of its byte order mark; undecodable bytes become
    surrogates.

    Raises:
        UserError: UTF-16 without a mark, or damaged.
    """
    head = file.read(4)
    file.seek(0)
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        wide = head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE))
        try:
            for line in io.TextIOWrapper(file, "utf-32" if wide else "utf-16"):
                yield line.strip("\r\n")
        except UnicodeError as error:
            raise UserError(f"--source {path}: begins as UTF-{32 if wide else 16}, but cannot be read as "
                            f"that ({error}); save it as UTF-8") from None
        return
    start = head + file.read(_LOOKED_AT)
    file.seek(0)
    if path.lower().endswith(IMAGE_EXTENSIONS) and (b"\0" in start or not head.isascii()):
        raise UserError(f"--source {path}: is an image; give its folder, or a list of images")
    if form := tars.compression(start):
        raise UserError(f"--source {path}: is a {form} archive, not a list of images; unpack it, and give "
                        "the folder")
    if start[:1] == b"\0" or start[1:2] == b"\0":
        raise UserError(f"--source {path}: not UTF-8 text: it begins with zero bytes, as UTF-16 without a "
                        "mark does; save it as UTF-8")
    if b"\0" in start:
        raise UserError(f"--source {path}: is not a text file; give a folder, a text file with one image per "
                        "line, or .tar archives")
    for number, raw in enumerate(file):
        yield raw.decode("utf-8-sig" if number == 0 else "utf-8", "surrogateescape").strip("\r\n")


def _remedy(text: str) -> str:
    """Advice for a line that cannot name a mask; empty if the reason contains it."""
    if "\\" in text:
        return "; write paths with forward slashes, below one folder, which --root names"
    if ".." in text.split("/"):
        return "; write paths below one folder, which --root names"
    return ""


def _other_form(text: str) -> str | None:
    """Problem of a line that names no file and looks like a table row or code."""
    if text[0] == text[-1] and text[0] in "\"'" and len(text) > 1:
        return "the line is quoted, and no such file exists; give paths without quotes"
    if re.search(r"[,;\t]", text):
        return "no such file; lists are not tables (CSV): give one image per line, or image, space and mask"
    return None
