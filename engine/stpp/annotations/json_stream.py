"""Streaming reader of JSON files: yields list elements one at a time, so memory does not grow with the
file."""

import json
import os
from collections.abc import Iterator
from typing import NamedTuple

from stpp.errors import UserError

BLOCK_BYTES = 1 << 20
MOST_BYTES = 1 << 26
"""Largest element that is read."""
_SPACE = " \t\n\r"
_BOM = b"\xef\xbb\xbf"


class Element(NamedTuple):
    """Element of a list in the file's top-level object."""

    name: str
    """Key of the list in that object."""
    offset: int
    """First byte in the file."""
    bytes: int
    value: object


def elements(path: str | os.PathLike) -> Iterator[Element]:
    """Yields the elements of every list in the file's top-level object; entries that are not lists are
    skipped.

    Raises:
        UserError: unreadable file, malformed JSON, or an element larger than `MOST_BYTES`; names the file.
    """
    try:
        with open(path, "rb") as file:
            yield from _Reader(file, path).elements()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def loads(data: bytes) -> object:
    """Decodes JSON text.

    Raises:
        ValueError: invalid JSON; the message is one line.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


class _Reader:
    """The file as text with one character per byte, so that text positions are byte offsets."""

    def __init__(self, file, path):
        self._file, self._path, self._text, self._at, self._start = file, path, "", 0, 0
        self._decode = json.JSONDecoder().raw_decode
        self._ended = False

    def elements(self) -> Iterator[Element]:
        self._read_block()
        if self._text.startswith(_BOM.decode("latin-1")):
            self._at = len(_BOM)
        if self._next_character() != "{":
            raise self._refusal("does not begin with an object {...}")
        self._at += 1
        while self._next_character() != "}":
            name = self._value()
            if not isinstance(name, str):
                raise self._refusal("invalid JSON (a key is not a string)")
            self._expect(":")
            if self._next_character() == "[":
                self._at += 1
                yield from self._list(name)
            else:
                self._value()
            self._skip_comma("}")
        self._at += 1
        if self._next_character(at_end=True):
            raise self._refusal("something follows the object {...}")

    def _list(self, name: str) -> Iterator[Element]:
        while self._next_character() != "]":
            self._discard_read()
            before = self._start + self._at
            value = self._value()
            yield Element(name, before, self._start + self._at - before, value)
            self._skip_comma("]")
        self._at += 1

    def _value(self) -> object:
        """Decodes the value at the current position and advances past it."""
        self._next_character()
        self._discard_read()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except RecursionError:
                raise self._refusal("is nested too deeply") from None
            except ValueError as error:
                failure = " ".join(str(error).split("(char")[0].split())[:200]
            else:
                # A number near the end of the buffer may continue in the file, as 0. and 1e- do.
                if end + 2 < len(self._text) or self._ended:
                    part, self._at = self._text[self._at : end], end
                    if "\\u" in part:
                        self._refuse_surrogates(value)
                    return value if part.isascii() else self._in_utf8(part)
                failure = "is cut short"
            if self._ended:
                raise self._refusal(f"invalid JSON ({failure})")
            if len(self._text) - self._at > MOST_BYTES:
                raise self._refusal(f"an element exceeds {MOST_BYTES >> 20} MiB, or the JSON is invalid")
            self._read_block(len(self._text))  # doubles the buffer, so that a value is retried few times

    def _refuse_surrogates(self, value: object) -> None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise self._refusal("text with half of a surrogate pair (\\ud800 to \\udfff)") from None

    def _in_utf8(self, part: str) -> object:
        try:
            return loads(part.encode("latin-1"))
        except ValueError as error:
            raise self._refusal(f"invalid UTF-8 JSON ({error})") from None

    def _skip_comma(self, end: str) -> None:
        if self._next_character() == ",":
            self._at += 1
            if self._next_character() != end:
                return
        elif self._next_character() == end:
            return
        raise self._refusal(f"invalid JSON (expected ',' or '{end}')")

    def _expect(self, sign: str) -> None:
        if self._next_character() != sign:
            raise self._refusal(f"invalid JSON (expected '{sign}')")
        self._at += 1

    def _next_character(self, *, at_end: bool = False) -> str:
        """Next non-space character, at `_at`; rejects the end of the file, or with `at_end` returns ""."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if self._ended and at_end:
                return ""
            if self._ended:
                raise self._refusal("is cut short")
            self._discard_read()
            self._read_block()

    def _discard_read(self) -> None:
        """Discards text that has been read, once it fills a block."""
        if self._at >= BLOCK_BYTES:
            self._start += self._at
            self._text, self._at = self._text[self._at :], 0

    def _read_block(self, count: int = BLOCK_BYTES) -> None:
        block = self._file.read(max(count, BLOCK_BYTES))
        self._ended = not block
        self._text += block.decode("latin-1")

    def _refusal(self, problem: str) -> UserError:
        return UserError(f"{self._path}: {problem}, at byte {self._start + self._at}")
