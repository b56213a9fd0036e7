"""Messages about a data set: findings, and warnings that `--strict` turns into an error."""

from dataclasses import dataclass, field

from stpp import log
from stpp.errors import UserError


@dataclass
class Notes:
    """Findings and warnings in order of occurrence."""

    quiet: bool = False
    """Collect messages without printing them."""
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def line(self, text: str) -> None:
        """Adds and prints a finding."""
        self.lines.append(text)
        if not self.quiet:
            log.say(text)

    def warn(self, text: str) -> None:
        """Adds and prints a likely mistake."""
        self.warnings.append(text)
        if not self.quiet:
            log.say(f"warning: {text}")

    def refuse(self) -> None:
        """Rejects the data set if there are warnings.

        Raises:
            UserError: names the first warning.
        """
        if self.warnings:
            more = f"; and {len(self.warnings) - 1} more above" if len(self.warnings) > 1 else ""
            raise UserError(f"--strict: {self.warnings[0]}{more}")


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 image", "2 images"."""
    return f"{count} {noun}{'s' * (count != 1)}"
