"""Index masks: reading any PNG of class indices to uint8 [H, W], and writing 8-bit grayscale PNGs.

DALI decodes only 8-bit grayscale PNGs exactly: it expands palettes to colours and rescales other bit depths.
So every mask is read here once, and re-encoded unless it is plain.
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
"""Label of ignored pixels."""


class Meaning(Protocol):
    """Mapping of mask values that are not class ids; see stpp.dataset.mask_map."""

    in_colour: bool
    """True if it maps colours, False if it maps ids."""

    def __call__(self, values: np.ndarray, path: str | os.PathLike) -> np.ndarray:
        """Maps ids [H, W] or colours [H, W, 3] to class ids, uint8 [H, W]."""
        ...


class PaletteEntry(NamedTuple):
    """A palette entry used by pixels."""

    index: int
    colour: int
    """65536 * red + 256 * green + blue."""
    only: bool
    """True if no other entry of the palette has this colour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Storage of ids in a mask file, by which a data set's masks are compared; see
    stpp.dataset.mask_judge."""

    kind: str
    """ "gray", "palette" or "colour"."""
    bits: int
    """Bits per channel."""
    palette: tuple[PaletteEntry, ...] = ()
    """For a palette: the entries that pixels use."""
    gray_palette: bool = False
    """True for a palette of grays only."""
    numbers: tuple[int, ...] = ()
    """For grays below 8 bits: the values that pixels have."""
    transparent: int = 0
    """For a non-uniform alpha channel: pixels that are not fully opaque. For a palette read by colour: pixels
    that share a colour with a less transparent entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """A mask read by `read_mask`."""

    values: np.ndarray
    """Class ids, uint8 [H, W]."""
    plain: bool
    """True for 8-bit grayscale without rotation: any decoder reads the same pixels."""
    turn: int
    """EXIF orientation of the mask file, 1 to 8."""
    stored: Stored


_EXACT_EXTRAS = {"dpi", "srgb", "interlace"}
"""Entries of Pillow's `info` that change no decoder's pixels; with any other, a mask is re-encoded."""


def read_index_mask(path: str | os.PathLike, *, exif: bool = True) -> np.ndarray:
    """Reads the class indices of a mask: uint8 [H, W], contiguous.

    Palette images give their indices, not their colours. Grayscale of 1, 2 and 4 bits gives the stored
    numbers (not stretched to 0..255), 16 bits too if all are below 256. Colour images are accepted if red,
    green and blue are equal; alpha is dropped.

    Args:
        path: a PNG.
        exif: rotate the mask upright if it has an EXIF orientation of its own.

    Raises:
        UserError: not a PNG, broken, too large, in colour, or with numbers above 255. Names the file.
    """
    return read_mask(path, exif=exif).values


def read_mask(path: str | os.PathLike, *, exif: bool = True, mask_map: Meaning | None = None) -> Mask:
    """Reads a mask like `read_index_mask`, with the details that the preparation needs.

    Args:
        mask_map: mapping of the stored ids or colours. A map of colours uses displayed colours: palettes give
            their colours, alpha is dropped.

    Raises:
        UserError: as `read_index_mask`; or a value that the map does not name.
    """
    bits, kind, whole = _png_header(path)
    in_colour = mask_map is not None and mask_map.in_colour
    with opened(path, ("PNG",)) as image:
        if bits == 16 and (in_colour or kind != GRAY):
            raise UserError(
                f"{path}: 16-bit masks with colour or alpha are not supported; save 8-bit class indices"
            )
        extras = set(image.info) - _EXACT_EXTRAS
        turn = orientation(image)
        image.load()
        stored = _stored(image, bits, kind)
        if in_colour and kind == PALETTE:
            stored = replace(stored, transparent=_hidden(image, stored))
        values = np.asarray(image.convert("RGBA"))[..., :3] if in_colour else np.asarray(image)
        # Read after the pixels, because eXIf may follow them.
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
        path_or_file: a path in an existing folder, or a file opened for binary writing.
        mask: uint8 [H, W].
        fast: use the fastest compression, which suits flat masks, instead of the smallest file.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype != np.uint8 or mask.ndim != 2 or mask.size == 0:
        found = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ValueError(f"mask: expected a uint8 array [H, W] with pixels, got {found}")
    Image.fromarray(mask).save(path_or_file, format="PNG", compress_level=1 if fast else 9)


def count_indices(mask: np.ndarray) -> np.ndarray:
    """Pixels of each index in a uint8 mask: int64 [256]."""
    # Pillow's histogram counts bytes without widening them: several times faster than numpy.bincount.
    return np.asarray(Image.fromarray(mask).histogram(), dtype=np.int64)


def _png_header(path: str | os.PathLike) -> tuple[int, int, bool]:
    """(bits per channel, colour type, True if it ends properly) of a PNG.

    Pillow does not distinguish 2 and 4 bits from 8, and accepts a missing end that other decoders may reject.
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
        lossy = " (JPEG changes class indices: redraw the mask)" if head[:2] == b"\xff\xd8" else ""
        raise UserError(f"{path}: the mask is not a PNG; save masks as PNG files of class indices{lossy}")
    header = png_header(head)
    if header is None:
        raise UserError(f"{path}: the mask is truncated or damaged; replace or remove it")
    return header.bits, header.kind, looks_whole(tail)


def _stored(image: Image.Image, bits: int, kind: int) -> Stored:
    """Storage of ids in an image whose pixels are loaded."""
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
    """Palette pixels whose colour equals that of more opaque pixels."""
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
    """Stored numbers, integer [H, W], recovered from Pillow's output."""
    if kind in (RGB, RGB_ALPHA, GRAY_ALPHA):
        values = _one_channel(values, path)
    if kind == GRAY and bits == 1:
        return values.astype(np.uint8)
    if kind == GRAY and bits in (2, 4):
        # Pillow stretches these to 0..255: by 85 for 2 bits, by 17 for 4.
        return values // np.uint8(255 // ((1 << bits) - 1))
    return values


def _one_channel(values: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """Gray channel of [H, W, 2 | 3 | 4] if the colour channels are equal."""
    if values.ndim != 3:
        raise UserError(f"{path}: the mask is damaged; replace or remove it")
    if values.shape[2] == 2:
        return values[..., 0]
    coloured = (values[..., 0] != values[..., 1]) | (values[..., 0] != values[..., 2])
    if coloured.any():
        y, x = np.unravel_index(int(coloured.argmax()), coloured.shape)
        colour = tuple(int(v) for v in values[y, x, :3])
        raise UserError(
            f"{path}: the mask holds colours (first {colour} at x {x}, y {y}), not class indices; map each "
            "colour with --data.mask-map, or save it as a palette or grayscale PNG of class indices"
        )
    return values[..., 0]


def _narrow(values: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """Indices as uint8; 16-bit values above 255 are rejected."""
    if values.dtype == np.uint8:
        return values
    above = values > 255
    if above.any():
        ids, counts = np.unique(values[above], return_counts=True)
        listed = ", ".join(f"{i} ({n} pixels)"
                           for i, n in zip(ids[:5].tolist(), counts[:5].tolist(), strict=True))
        raise UserError(f"{path}: class ids above 255: {listed}; class indices must be 0 to 254, and 255 is "
                        "ignore; map other ids with --data.mask-map")
    return values.astype(np.uint8)
