"""The switches --exif and --no-exif of commands that follow the rule of a checkpoint."""

from stpp.errors import UserError


def exif_asked(exif: bool, no_exif: bool) -> bool | None:
    """The rule that the switches ask for; None where neither is given.

    Raises:
        UserError: both are given.
    """
    if exif and no_exif:
        raise UserError(
            "--exif and --no-exif contradict each other; give one, or neither to follow the checkpoint"
        )
    return True if exif else False if no_exif else None
