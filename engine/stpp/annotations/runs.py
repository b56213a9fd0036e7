"""Run lengths of masks: COCO's, plain and compressed, and those of Label Studio's brush.

COCO counts column by column, pixels that are off first. Its compressed form writes each count, less the one
two places before it, in characters of five bits (lowest first, 48 added, bit 5 says that more follow).
"""

import numpy as np

_LONGEST = 7
"""Characters of one count: 35 bits are more than any mask has."""


def from_text(text: str) -> np.ndarray:
    """The counts of COCO's compressed form, int64 [N]; they may be senseless, see `checked`.

    Raises:
        ValueError: no such text, with the reason.
    """
    try:
        signs = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError("its counts hold characters that run lengths do not have") from None
    if signs.size == 0 or signs.min() < 0 or signs.max() > 63:
        raise ValueError("its counts hold characters that run lengths do not have")
    ends = np.flatnonzero((signs & 32) == 0)
    if ends.size == 0 or ends[-1] != signs.size - 1:
        raise ValueError("its counts are cut short")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST:
        raise ValueError("its counts hold a number that no mask has")
    place = np.arange(signs.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((signs & 31) << (5 * place), starts)
    negative = (signs[ends] & 16) != 0
    values[negative] -= np.int64(1) << (5 * lengths[negative])
    for first in (1, 2):  # each is less the one two places before it, from the fourth on
        values[first::2] = np.cumsum(values[first::2])
    return values


def checked(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """The counts, if they are those of a mask of this size.

    Raises:
        ValueError: they are not, with the reason.
    """
    if counts.size == 0 or counts.min() < 0 or counts.max() > height * width:
        raise ValueError("its counts hold a number that no mask of this size has")
    if (total := int(counts.sum())) != height * width:
        raise ValueError(f"its counts add up to {total} pixels, not to {width}x{height}")
    return counts


def pixels(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """Checked counts as bool [H, W]."""
    return np.repeat(np.arange(counts.size) % 2 == 1, counts).reshape(width, height).T


def of_part(x: int, y: int, part: np.ndarray, height: int, width: int) -> np.ndarray:
    """The counts of an image [height, width] that is on where a part of it, bool [h, w] with its corner at x,
    y, is."""
    change = np.diff(np.pad(part, ((1, 1), (0, 0))).astype(np.int8), axis=0).T
    columns, rows = np.nonzero(change)  # by columns, and in each by turns on and off
    places = (columns + x) * height + rows + y
    # A run that reaches the lower edge goes on in the next column where that begins with one.
    same = np.flatnonzero(places[1:-1:2] == places[2::2]) * 2 + 1
    places = np.delete(places, np.concatenate((same, same + 1)))
    return np.diff(places, prepend=0, append=height * width)


def brush(mask_HW: np.ndarray) -> list[int]:
    """The bytes with which Label Studio writes a brush: bool [H, W], row by row, four channels of 255 where
    it is on.

    A head (number of values in 32 bits, bits a value less 1 in 5, and the four widths in which runs are
    counted less 1, 4 bits each), then for each run: 1, which of the widths in 2 bits, its length less 1, and
    the value. Source: the format of thi.ng/rle-pack, which the tool uses.
    """
    flat = mask_HW.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate(([0], edges))
    lengths = 4 * np.diff(np.concatenate((starts, [flat.size])))
    values = np.where(flat[starts], 255, 0)
    # Longer runs are cut: the widest field counts 2^16.
    pieces = -(-lengths // _RUN)
    values = np.repeat(values, pieces)
    cut = np.full(values.size, _RUN)
    last = np.cumsum(pieces) - 1
    cut[last] = lengths - (pieces - 1) * _RUN
    kind = np.searchsorted(_MOST, cut)
    width = np.asarray(_WIDTHS)[kind]
    words = (((4 + kind) << width | (cut - 1)) << 8) | values  # 1, kind, length - 1, value
    head = (4 * flat.size) << 21 | 7 << 16
    for place, bits in enumerate(_WIDTHS):
        head |= (bits - 1) << (12 - 4 * place)
    return _packed(np.concatenate(([head], words)), np.concatenate(([53], 11 + width)))


_WIDTHS = (3, 4, 8, 16)
_MOST = tuple(1 << bits for bits in _WIDTHS)
_RUN = _MOST[-1]


def _packed(words: np.ndarray, widths: np.ndarray) -> list[int]:
    """Numbers of so many bits each, one after the other, as bytes; zeros fill the last."""
    shift = np.repeat(np.cumsum(widths), widths) - 1 - np.arange(widths.sum())
    bits = (np.repeat(words, widths) >> shift) & 1
    return np.packbits(bits.astype(np.uint8)).tolist()
