"""What `prepare` says about how images are read: the kinds that look other than people expect."""

from collections import Counter

from stpp.dataset.check import Checked
from stpp.images.reading import FEW_BITS


class Notices:
    """Counts images whose reading is worth a word."""

    def __init__(self):
        self._kinds: Counter[str] = Counter()
        self._dark: tuple[int, str, int] = (0, "", 0)
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
        if reading.bits == 16:
            self._kinds["of 16 bits a channel: the upper 8 are used"] += 1
            if one.used_bits <= FEW_BITS:
                count, first, bits = self._dark
                self._dark = count + 1, first or one.task.image, max(bits, one.used_bits)

    def lines(self) -> list[str]:
        """What is to be said, a line each; none for a set of plain photographs."""
        lines = [
            f"{count} {'image is' if count == 1 else 'images are'} {kind}"
            for kind, count in sorted(self._kinds.items())
        ]
        count, first, bits = self._dark
        if count:
            lines.append(
                f"warning: {count} of the 16-bit images use at most {bits} bits (the first: {first}): to the network "
                "they are nearly black; stretch them to the full range, all by the same factor"
            )
        if self._by_pil:
            lines.append(
                f"{self._by_pil} of {self._images} images are of kinds that decoders read differently: PIL decodes "
                "them, whatever the loader, which is slower; JPEG and 8-bit PNG in gray or RGB are fastest"
            )
        return lines
