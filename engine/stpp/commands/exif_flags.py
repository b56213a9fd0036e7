"""The switches --exif and --no-exif of commands that follow the checkpoint's EXIF rule."""

from stpp.errors import UserError


def exif_asked(exif: bool, no_exif: bool) -> bool | None:
    """EXIF rule given by the switches; None if neither is set.

    Raises:
        UserError: both are set.
    """
    if exif and no_exif:
        raise UserError(
            "--exif and --no-exif contradict each other; give one, or neither to follow the checkpoint"
        )
    return True if exif else False if no_exif else None
