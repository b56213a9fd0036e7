"""What a data set gives cause to say: lines about what was found, and warnings, which `--strict` turns into a
refusal."""

from dataclasses import dataclass, field

from stpp import log
from stpp.errors import UserError


@dataclass
class Notes:
    """Lines and warnings in the order in which they were said."""

    quiet: bool = False
    """Collect them only."""
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def line(self, text: str) -> None:
        """Says what is so."""
        self.lines.append(text)
        if not self.quiet:
            log.say(text)

    def warn(self, text: str) -> None:
        """Says what may be a mistake."""
        self.warnings.append(text)
        if not self.quiet:
            log.say(f"warning: {text}")

    def refuse(self) -> None:
        """Refuses if there are warnings.

        Raises:
            UserError: names the first of them.
        """
        if self.warnings:
            more = f"; and {len(self.warnings) - 1} more above" if len(self.warnings) > 1 else ""
            raise UserError(f"--strict: {self.warnings[0]}{more}")


def counted(count: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{count} {noun}{'s' * (count != 1)}"
