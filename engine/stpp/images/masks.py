"""Index masks: any PNG that holds class indices, to uint8 [H, W], and back to 8-bit grayscale PNG.

DALI decodes only 8-bit grayscale PNGs exactly: from a palette it makes colours, and it rescales other bit
depths. So every mask passes through here once, and what is not plain is written anew.
"""

import os
from dataclasses import dataclass, replace
from typing import IO, NamedTuple, Protocol

import numpy as np
from PIL import Image

from stpp.errors import UserError
from stpp.images.containers import (
    GRAY,
    GRAY_ALPHA,
    PALETTE,
    PNG_HEADER_BYTES,
    PNG_SIGNATURE,
    RGB,
    RGB_ALPHA,
    looks_whole,
    png_header,
)
from stpp.images.image_file import opened, orientation, upright

IGNORE = 255
"""The label of pixels that count nowhere."""


class Meaning(Protocol):
    """Meaning of what masks hold that is not class ids; see stpp.dataset.mask_map."""

    in_colour: bool
    """Whether it is of colours, not of ids."""

    def __call__(self, values: np.ndarray, path: str | os.PathLike) -> np.ndarray:
        """Ids [H, W] or colours [H, W, 3] to class ids, uint8 [H, W]."""
        ...


class PaletteEntry(NamedTuple):
    """An entry of a palette that pixels use."""

    index: int
    colour: int
    """65536 * red + 256 * green + blue."""
    only: bool
    """True where no other entry of that palette has this colour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """How a mask file stores its ids: what a whole data set of masks is judged by, see
    stpp.dataset.mask_judge."""

    kind: str
    """"gray", "palette" or "colour"."""
    bits: int
    """Bits a channel."""
    palette: tuple[PaletteEntry, ...] = ()
    """Of a palette: the entries that pixels use."""
    gray_palette: bool = False
    """True for a palette that holds grays alone."""
    numbers: tuple[int, ...] = ()
    """Of grays with fewer than 8 bits: the numbers that pixels hold."""
    transparent: int = 0
    """Of an alpha channel that is not the same everywhere: pixels that are not fully opaque. Of a palette
    that is read by its colours: those that share a colour with a less transparent entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """A mask as `read_mask` found it."""

    values: np.ndarray
    """Class ids, uint8 [H, W]."""
    plain: bool
    """True for 8-bit grayscale with nothing to turn: any decoder reads the same from the file."""
    turn: int
    """Its EXIF orientation, 1 to 8."""
    stored: Stored


_EXACT_EXTRAS = {"dpi", "srgb", "interlace"}
"""Entries of Pillow's `info` that change no decoder's pixels; beside these a mask is written anew, to be
safe."""


def read_index_mask(path: str | os.PathLike, *, exif: bool = True) -> np.ndarray:
    """Reads the class indices of a mask: uint8 [H, W], contiguous.

    A palette image gives its indices, not its colours. Grayscale of 1, 2 and 4 bits gives the stored numbers
    (not stretched to 0..255), 16 bits too if all are below 256. Colour images count where red, green and blue
    are equal; alpha is dropped.

    Args:
        path: a PNG.
        exif: turn the mask upright if it carries an EXIF orientation of its own.

    Raises:
        UserError: not a PNG, broken, too large, in colour, or with numbers above 255. Names the file.
    """
    return read_mask(path, exif=exif).values


def read_mask(path: str | os.PathLike, *, exif: bool = True, mask_map: Meaning | None = None) -> Mask:
    """As `read_index_mask`, and what the preparation needs besides.

    Args:
        mask_map: what the stored ids or colours mean. A map of colours takes those that are seen: a palette
            gives its colours, alpha is dropped.

    Raises:
        UserError: as `read_index_mask`; or the map does not name what the mask holds.
    """
    bits, kind, whole = _png_header(path)
    in_colour = mask_map is not None and mask_map.in_colour
    with opened(path, ("PNG",)) as image:
        if bits == 16 and (in_colour or kind != GRAY):
            raise UserError(
                f"{path}: a mask with 16 bits a channel and colour or alpha is not read; save 8-bit class "
                "indices"
            )
        extras = set(image.info) - _EXACT_EXTRAS
        turn = orientation(image)
        image.load()
        stored = _stored(image, bits, kind)
        if in_colour and kind == PALETTE:
            stored = replace(stored, transparent=_hidden(image, stored))
        values = np.asarray(image.convert("RGBA"))[..., :3] if in_colour else np.asarray(image)
        # Only read after the pixels: eXIf may follow them.
        turn = orientation(image) if turn == 1 else turn
    if in_colour:
        values = mask_map(values, path)
    else:
        values = _indices(values, bits, kind, path)
        values = _narrow(values, path) if mask_map is None else mask_map(values, path)
    if exif and turn != 1:
        values = upright(values, turn)
    upright_already = turn == 1 or not exif
    plain = mask_map is None and whole and kind == GRAY and bits == 8 and not extras and upright_already
    return Mask(values=np.ascontiguousarray(values), plain=plain, turn=turn, stored=stored)


def write_index_png(path_or_file: str | os.PathLike | IO[bytes], mask: np.ndarray, *,
                    fast: bool = True) -> None:
    """Writes uint8 [H, W] as an 8-bit grayscale PNG.

    Args:
        path_or_file: a path (its folder must exist) or a file opened for binary writing.
        mask: uint8 [H, W].
        fast: the fastest compression (masks are flat, so it costs little room) instead of the smallest file.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype != np.uint8 or mask.ndim != 2 or mask.size == 0:
        found = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ValueError(f"mask: expected a uint8 array [H, W] with pixels, got {found}")
    Image.fromarray(mask).save(path_or_file, format="PNG", compress_level=1 if fast else 9)


def count_indices(mask: np.ndarray) -> np.ndarray:
    """Pixels of each index in a uint8 mask: int64 [256]."""
    # Pillow's histogram counts bytes without widening them first: several times faster than numpy.bincount.
    return np.asarray(Image.fromarray(mask).histogram(), dtype=np.int64)


def _png_header(path: str | os.PathLike) -> tuple[int, int, bool]:
    """(bits a channel, colour type, whether it ends as it should) of a PNG.

    Pillow does not tell 2 and 4 bits from 8, and does not mind a missing end as other decoders may.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(PNG_HEADER_BYTES)
            file.seek(-min(12, len(head)), os.SEEK_END)
            tail = file.read()
    except OSError as error:
        raise UserError(f"{path}: the mask cannot be opened ({error.strerror})") from error
    if not head:
        raise UserError(f"{path}: the mask is empty (0 bytes); replace or remove it")
    if head[:8] != PNG_SIGNATURE:
        lossy = " (JPEG changes class indices: draw the mask anew)" if head[:2] == b"\xff\xd8" else ""
        raise UserError(f"{path}: the mask is not a PNG; save masks as PNG files of class indices{lossy}")
    found = png_header(head)
    if found is None:
        raise UserError(f"{path}: the mask is cut short or damaged; replace or remove it")
    return found.bits, found.kind, looks_whole(tail)


def _stored(image: Image.Image, bits: int, kind: int) -> Stored:
    """How an image whose pixels are loaded stores its ids."""
    if kind == PALETTE:
        colours = np.asarray(image.getpalette("RGB") or (), dtype=np.int64).reshape(-1, 3) @ (65536, 256, 1)
        used = [i for i, count in enumerate(image.histogram()) if count and i < len(colours)]
        times = dict(zip(*(part.tolist() for part in np.unique(colours, return_counts=True)), strict=True))
        entries = tuple(PaletteEntry(i, int(colours[i]), times[int(colours[i])] == 1) for i in used)
        all_gray = bool((colours % 0x10101 == 0).all())
        return Stored(kind="palette", bits=bits, palette=entries, gray_palette=all_gray)
    if kind == GRAY:
        step = 255 // ((1 << min(bits, 8)) - 1)  # Pillow shows the numbers stretched
        histogram = image.histogram() if bits < 8 else ()
        numbers = tuple(i // step for i, count in enumerate(histogram) if count)
        return Stored(kind="gray", bits=bits, numbers=numbers)
    transparent = 0
    if kind in (GRAY_ALPHA, RGB_ALPHA) and bits == 8:
        alpha = np.asarray(image.getchannel("A").histogram())
        transparent = int(alpha[:255].sum()) if np.count_nonzero(alpha) > 1 else 0
    return Stored(kind="colour", bits=bits, transparent=transparent)


def _hidden(image: Image.Image, stored: Stored) -> int:
    """Pixels of a palette image that its colours do not tell from more opaque ones."""
    clear = image.info.get("transparency", b"")
    alpha = dict(enumerate(clear)) if isinstance(clear, bytes) else {clear: 0}
    most: dict[int, int] = {}
    for entry in stored.palette:
        most[entry.colour] = max(most.get(entry.colour, 0), alpha.get(entry.index, 255))
    counts = image.histogram()
    return sum(
        counts[entry.index] for entry in stored.palette if alpha.get(entry.index, 255) < most[entry.colour]
    )


def _indices(values: np.ndarray, bits: int, kind: int, path: str | os.PathLike) -> np.ndarray:
    """The stored numbers, integer [H, W], from what Pillow made of them."""
    if kind in (RGB, RGB_ALPHA, GRAY_ALPHA):
        values = _one_channel(values, path)
    if kind == GRAY and bits == 1:
        return values.astype(np.uint8)
    if kind == GRAY and bits in (2, 4):
        # Pillow stretches these to 0..255: by 85 for 2 bits, by 17 for 4.
        return values // np.uint8(255 // ((1 << bits) - 1))
    return values


def _one_channel(values: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """The gray channel of [H, W, 2 | 3 | 4] if colour channels agree."""
    if values.ndim != 3:
        raise UserError(f"{path}: the mask is damaged; replace or remove it")
    if values.shape[2] == 2:
        return values[..., 0]
    coloured = (values[..., 0] != values[..., 1]) | (values[..., 0] != values[..., 2])
    if coloured.any():
        y, x = np.unravel_index(int(coloured.argmax()), coloured.shape)
        colour = tuple(int(v) for v in values[y, x, :3])
        raise UserError(
            f"{path}: the mask holds colours (first {colour} at x {x}, y {y}), not class indices; say what "
            "each colour means with --data.mask-map, or save it as a palette or grayscale PNG of class "
            "indices"
        )
    return values[..., 0]


def _narrow(values: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """Indices to uint8; 16-bit ones are refused above 255."""
    if values.dtype == np.uint8:
        return values
    above = values > 255
    if above.any():
        ids, counts = np.unique(values[above], return_counts=True)
        listed = ", ".join(f"{i} ({n} pixels)" for i,
                           n in zip(ids[:5].tolist(), counts[:5].tolist(), strict=True))
        raise UserError(f"{path}: class ids above 255: {listed}; class indices must be 0 to 254, and 255 is "
                        "ignore; --data.mask-map turns other ids into these")
    return values.astype(np.uint8)
