"""What `prepare` says about how images are read: the kinds that look other than people expect."""

from collections import Counter

from stpp.annotations.shapes import Legend
from stpp.dataset.check import Checked
from stpp.dataset.notes import Notes, counted
from stpp.images.masks import IGNORE
from stpp.images.pixels import range_bits
from stpp.images.reading import FEW_COLOURS, uses_few


class Notices:
    """Counts images whose reading is worth a word."""

    def __init__(self):
        self._kinds: Counter[str] = Counter()
        self._dark: tuple[int, str, int] = (0, "", 0)
        self._like_masks: tuple[int, str] = (0, "")
        self._by_pil = self._images = 0

    def add(self, one: Checked) -> None:
        """Counts an image without problems."""
        reading = one.reading
        self._images += 1
        self._by_pil += not reading.plain
        if "CMYK" in reading.colours:
            inks = (
                ""
                if reading.format not in ("JPEG", "MPO")
                else " with Adobe's marker: inks are stored inverted"
                if reading.colours == "inverted CMYK"
                else " without Adobe's marker: inks are stored as they are"
            )
            self._kinds["CMYK" + inks] += 1
        if reading.alpha:
            self._kinds["partly transparent: alpha is dropped, the colours behind it are seen"] += 1
        if one.like_mask and one.task.mask is None:
            count, first = self._like_masks
            self._like_masks = count + 1, first or one.task.image
        if reading.bits > 8:
            upper = f"the upper 8 of {range_bits(reading.bits)}" if reading.bits > 16 else "the upper 8"
            self._kinds[f"of {reading.bits} bits a channel: {upper} are used"] += 1
            if uses_few(one.used_bits, reading):
                count, first, bits = self._dark
                self._dark = count + 1, first or one.task.image, max(bits, one.used_bits)

    def say(self, notes: Notes) -> None:
        """Says what is worth a word; nothing for a set of plain photographs."""
        for kind, count in sorted(self._kinds.items()):
            notes.line(f"{count} {'image is' if count == 1 else 'images are'} {kind}")
        count, first, bits = self._dark
        if count:
            notes.warn(
                f"{count} of the images of more than 8 bits use at most {bits} bits (the first: {first}): to "
                "the network they are nearly black; stretch them to the full range, all by the same factor"
            )
        count, first = self._like_masks
        if count:
            # Where all are so, as scanned pages, it is the data set's kind.
            (notes.warn if count < self._images else notes.line)(
                f"{counted(count, 'image')} without a mask {'holds' if count == 1 else 'hold'} at most "
                f"{FEW_COLOURS} flat colours, as masks do (the first: {first}): if they are masks, keep them "
                "out of the pattern of --data.images, and name them with --data.masks"
            )
        if self._by_pil:
            notes.line(
                f"{self._by_pil} of {self._images} images are of kinds that decoders read differently: PIL "
                "decodes them, whatever the loader, which is slower; JPEG and 8-bit PNG in gray or RGB are "
                "fastest"
            )


class ShapeNotices:
    """Counts what is worth a word of masks that were drawn from shapes."""

    def __init__(self):
        self._turned: tuple[int, str] = (0, "")
        self._crowds = 0
        self._doubtful: tuple[int, str] = (0, "")

    def add(self, one: Checked) -> None:
        """Counts an image with its shapes."""
        if one.orientation != 1:
            count, first = self._turned
            self._turned = count + 1, first or one.task.image
        self._crowds += one.crowds
        if one.doubtful:
            count, first = self._doubtful
            self._doubtful = count + len(one.doubtful), first or one.doubtful[0]

    def say(self, notes: Notes, legend: Legend, *, exif: bool) -> None:
        """Says what the masks were taken for, and what may be otherwise."""
        background = f"the background, class {legend.unlisted}"
        notes.line(f"pixels in no shape are {'ignored (255)' if legend.unlisted == IGNORE else background}")
        count, first = self._turned
        if count:
            seen, other = ("are stored", "upright") if legend.stored else ("are seen upright", "stored")
            remedy = f"; if not, --data.annotated {other}" if exif else ""
            notes.line(f"EXIF turns {counted(count, 'labelled image')} ({first} the first): their shapes are "
                       f"taken as drawn on the images as they {seen}{remedy}")
        if self._crowds:
            meant = "their class; --data.crowds ignore makes them 255" if legend.crowds else "255 (ignore)"
            notes.line(f"crowds (iscrowd): {counted(self._crowds, 'region')}, drawn below the others as "
                       f"{meant}")
        count, first = self._doubtful
        if count:
            notes.warn(f"shapes that may not be what was meant: {count}, whose pixels are 255 as far as they "
                       f"have any; the first: {first}")
