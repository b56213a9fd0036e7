"""Run lengths of masks: COCO's, plain and compressed, and Label Studio's brush format.

COCO run lengths are column-major and start with an off run. The compressed form stores each count, minus the
count two places before it, in 5-bit characters (lowest first, offset 48, bit 5: more characters follow).
"""

import numpy as np

_LONGEST = 7
"""Maximum characters of one count: 35 bits exceed any mask."""


def from_text(text: str) -> np.ndarray:
    """Decodes COCO's compressed form to counts, int64 [N]; counts may be inconsistent, see `checked`.

    Raises:
        ValueError: malformed text; the message is the reason.
    """
    try:
        signs = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError("its counts hold characters that are not run lengths") from None
    if signs.size == 0 or signs.min() < 0 or signs.max() > 63:
        raise ValueError("its counts hold characters that are not run lengths")
    ends = np.flatnonzero((signs & 32) == 0)
    if ends.size == 0 or ends[-1] != signs.size - 1:
        raise ValueError("its counts are cut short")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST:
        raise ValueError("its counts hold a number too large for any mask")
    place = np.arange(signs.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((signs & 31) << (5 * place), starts)
    negative = (signs[ends] & 16) != 0
    values[negative] -= np.int64(1) << (5 * lengths[negative])
    for first in (1, 2):  # from the fourth count on, counts are differences over two places
        values[first::2] = np.cumsum(values[first::2])
    return values


def checked(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the counts if they describe a mask of this size.

    Raises:
        ValueError: they do not; the message is the reason.
    """
    if counts.size == 0 or counts.min() < 0 or counts.max() > height * width:
        raise ValueError("its counts hold a number too large for a mask of this size")
    if (total := int(counts.sum())) != height * width:
        raise ValueError(f"its counts add up to {total} pixels, not to {width}x{height}")
    return counts


def pixels(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels of validated counts, bool [H, W]."""
    return np.repeat(np.arange(counts.size) % 2 == 1, counts).reshape(width, height).T


def of_part(x: int, y: int, part: np.ndarray, height: int, width: int) -> np.ndarray:
    """COCO counts of an image [height, width] that is on in `part`, bool [h, w] with its upper left corner at
    x, y."""
    change = np.diff(np.pad(part, ((1, 1), (0, 0))).astype(np.int8), axis=0).T
    columns, rows = np.nonzero(change)  # column by column, alternately on and off
    places = (columns + x) * height + rows + y
    # A run that reaches the lower edge continues in the next column if that begins with a run.
    continued = np.flatnonzero(places[1:-1:2] == places[2::2]) * 2 + 1
    places = np.delete(places, np.concatenate((continued, continued + 1)))
    return np.diff(places, prepend=0, append=height * width)


def brush(mask_HW: np.ndarray) -> list[int]:
    """Bytes of a Label Studio brush region, from bool [H, W]: row-major RGBA, 255 in all four channels where
    on.

    The header stores the number of values (32 bits), bits per value - 1 (5) and the four run-length widths -
    1 (4 each); each run stores a 1, the width index (2 bits), length - 1, and the value. Source: the
    thi.ng/rle-pack format, which the tool uses.
    """
    flat = mask_HW.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate(([0], edges))
    lengths = 4 * np.diff(np.concatenate((starts, [flat.size])))
    values = np.where(flat[starts], 255, 0)
    # Longer runs are split: the widest field counts to 2^16.
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
    """Concatenates numbers of the given bit widths into bytes, zero-padded at the end."""
    shift = np.repeat(np.cumsum(widths), widths) - 1 - np.arange(widths.sum())
    bits = (np.repeat(words, widths) >> shift) & 1
    return np.packbits(bits.astype(np.uint8)).tolist()
