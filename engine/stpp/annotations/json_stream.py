"""JSON files of any length, read an element of their lists at a time: memory does not grow with the file."""

import json
import os
from collections.abc import Iterator
from typing import NamedTuple

from stpp.errors import UserError

BLOCK_BYTES = 1 << 20
MOST_BYTES = 1 << 26
"""Of one element."""
_SPACE = " \t\n\r"
_BOM = b"\xef\xbb\xbf"


class Element(NamedTuple):
    """A part of the object that a file holds."""

    name: str
    """Of the entry of that object."""
    offset: int
    """First byte in the file."""
    bytes: int
    value: object


def elements(path: str | os.PathLike) -> Iterator[Element]:
    """The elements of every list in the object that the file holds, one after the other; entries that are no
    lists are passed over.

    Raises:
        UserError: it cannot be read, is no such file, or an element is larger than `MOST_BYTES`; names the
            file.
    """
    try:
        with open(path, "rb") as file:
            yield from _Reader(file, path).elements()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def loads(data: bytes) -> object:
    """The value of JSON text.

    Raises:
        ValueError: it is none; in one line.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


class _Reader:
    """A file as text of which each letter is a byte, so that places in it are places in the file."""

    def __init__(self, file, path):
        self._file, self._path, self._text, self._at, self._start = file, path, "", 0, 0
        self._decode = json.JSONDecoder().raw_decode
        self._ended = False

    def elements(self) -> Iterator[Element]:
        self._more()
        if self._text.startswith(_BOM.decode("latin-1")):
            self._at = len(_BOM)
        if self._sign() != "{":
            raise self._refusal("does not begin with an object {...}")
        self._at += 1
        while self._sign() != "}":
            name = self._value()
            self._expect(":")
            if self._sign() == "[":
                self._at += 1
                yield from self._list(name)
            else:
                self._value()
            self._comma("}")

    def _list(self, name: str) -> Iterator[Element]:
        while self._sign() != "]":
            self._drop()
            before = self._start + self._at
            value = self._value()
            yield Element(name, before, self._start + self._at - before, value)
            self._comma("]")
        self._at += 1

    def _value(self) -> object:
        """The value that begins here; `_at` is then behind it."""
        self._sign()
        self._drop()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except RecursionError:
                raise self._refusal("is nested too deeply") from None
            except ValueError as error:
                failure = " ".join(str(error).split("(char")[0].split())[:200]
            else:
                # A number may go on behind what has been read.
                if end < len(self._text) or self._ended:
                    part, self._at = self._text[self._at : end], end
                    return value if part.isascii() else self._in_utf8(part)
                failure = "is cut short"
            if self._ended:
                raise self._refusal(f"is no JSON ({failure})")
            if len(self._text) - self._at > MOST_BYTES:
                raise self._refusal(f"holds an element of more than {MOST_BYTES >> 20} MiB, or is no JSON")
            self._more(len(self._text))  # twice as much each time: a value is tried few times

    def _in_utf8(self, part: str) -> object:
        try:
            return loads(part.encode("latin-1"))
        except ValueError as error:
            raise self._refusal(f"is no JSON in UTF-8 ({error})") from None

    def _comma(self, end: str) -> None:
        if self._sign() == ",":
            self._at += 1
            if self._sign() != end:
                return
        elif self._sign() == end:
            return
        raise self._refusal(f"is no JSON (expected ',' or '{end}')")

    def _expect(self, sign: str) -> None:
        if self._sign() != sign:
            raise self._refusal(f"is no JSON (expected '{sign}')")
        self._at += 1

    def _sign(self) -> str:
        """The next letter that is no space, at `_at`; "" at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                raise self._refusal("is cut short")
            self._drop()
            self._more()

    def _drop(self) -> None:
        """Lets go of text that has been read, once it is much."""
        if self._at >= BLOCK_BYTES:
            self._start += self._at
            self._text, self._at = self._text[self._at :], 0

    def _more(self, count: int = BLOCK_BYTES) -> None:
        block = self._file.read(max(count, BLOCK_BYTES))
        self._ended = not block
        self._text += block.decode("latin-1")

    def _refusal(self, what: str) -> UserError:
        return UserError(f"{self._path}: {what}, at byte {self._start + self._at}")
