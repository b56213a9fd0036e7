"""Notices of `prepare` about image kinds that may not look as expected."""

from collections import Counter

from stpp.annotations.shapes import Legend
from stpp.dataset.check import Checked
from stpp.dataset.notes import Notes, counted
from stpp.images.masks import IGNORE
from stpp.images.pixels import range_bits
from stpp.images.reading import FEW_COLOURS, uses_few


class Notices:
    """Counts images whose decoding deserves a notice."""

    def __init__(self):
        self._kinds: Counter[str] = Counter()
        self._dark: tuple[int, str, int] = (0, "", 0)
        self._like_masks: tuple[int, str] = (0, "")
        self._by_pil = self._images = 0

    def add(self, checked: Checked) -> None:
        """Counts an image without problems."""
        reading = checked.reading
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
            self._kinds["partly transparent: alpha is dropped, the colours behind it are used"] += 1
        if checked.like_mask and checked.task.mask is None:
            count, first = self._like_masks
            self._like_masks = count + 1, first or checked.task.image
        if reading.bits > 8:
            upper = f"the upper 8 of {range_bits(reading.bits)}" if reading.bits > 16 else "the upper 8"
            self._kinds[f"of {reading.bits} bits a channel: {upper} are used"] += 1
            if uses_few(checked.used_bits, reading):
                count, first, bits = self._dark
                self._dark = count + 1, first or checked.task.image, max(bits, checked.used_bits)

    def say(self, notes: Notes) -> None:
        """Prints the notices; none for a set of ordinary photographs."""
        for kind, count in sorted(self._kinds.items()):
            notes.line(f"{count} {'image is' if count == 1 else 'images are'} {kind}")
        count, first, bits = self._dark
        if count:
            notes.warn(
                f"{count} of the images of more than 8 bits use at most {bits} bits (the first: {first}), "
                "so they look nearly black to the network; stretch all of them to the full range by the "
                "same factor"
            )
        count, first = self._like_masks
        if count:
            # If all images are like this, such as scanned pages, no warning is needed.
            (notes.warn if count < self._images else notes.line)(
                f"{counted(count, 'image')} without a mask {'has' if count == 1 else 'have'} at most "
                f"{FEW_COLOURS} flat colours, as masks do (the first: {first}): if they are masks, exclude "
                "them from --data.images, and give them with --data.masks"
            )
        if self._by_pil:
            notes.line(
                f"{self._by_pil} of {self._images} images are of kinds that decoders read differently: PIL "
                "decodes them with any loader, which is slower; JPEG and 8-bit PNG in gray or RGB are fastest"
            )


class ShapeNotices:
    """Counts notices about masks drawn from shapes."""

    def __init__(self):
        self._turned: tuple[int, str] = (0, "")
        self._crowds = 0
        self._doubtful: tuple[int, str] = (0, "")

    def add(self, checked: Checked) -> None:
        """Counts an image with its shapes."""
        if checked.orientation != 1:
            count, first = self._turned
            self._turned = count + 1, first or checked.task.image
        self._crowds += checked.crowds
        if checked.doubtful:
            count, first = self._doubtful
            self._doubtful = count + len(checked.doubtful), first or checked.doubtful[0]

    def say(self, notes: Notes, legend: Legend, *, exif: bool) -> None:
        """Prints how shapes were interpreted, and likely mistakes."""
        background = f"the background, class {legend.unlisted}"
        notes.line(f"pixels in no shape are {'ignored (255)' if legend.unlisted == IGNORE else background}")
        count, first = self._turned
        if count:
            seen, other = ("are stored", "upright") if legend.stored else ("are seen upright", "stored")
            remedy = f"; if not, --data.annotated {other}" if exif else ""
            notes.line(f"EXIF rotates {counted(count, 'labelled image')} (the first: {first}): their shapes "
                       f"are assumed to be drawn on the images as they {seen}{remedy}")
        if self._crowds:
            meant = "their class; --data.crowds ignore makes them 255" if legend.crowds else "255 (ignore)"
            notes.line(f"crowds (iscrowd): {counted(self._crowds, 'region')}, drawn below the others as "
                       f"{meant}")
        count, first = self._doubtful
        if count:
            notes.warn(f"{counted(count, 'doubtful shape')}, with any pixels set to 255; the first: {first}")
