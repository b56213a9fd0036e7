"""Freshness: an index keeps copies of masks, and what is scored must be the masks of today."""

from pathlib import Path

from stpp import distributed, log
from stpp.dataset import index as indices
from stpp.dataset import splits
from stpp.dataset.entries import Index
from stpp.dataset.notes import Notes, counted
from stpp.distributed import World
from stpp.errors import UserError
from stpp.run import lease


def of_today(folder: Path, listed: Path, here: World) -> Index:
    """The index in `folder`; made anew, by rank 0, where files of the images in a list changed since it was
    made.

    Args:
        folder: of the index.
        listed: lines `image mask`.

    Raises:
        UserError: no index, a list that does not fit it; files changed, and they cannot be used, the index
            cannot be written, or a run that goes on trains on it.
    """
    distributed.on_main(here, lambda: _renew(folder, listed))
    return indices.load(folder)


def _renew(folder: Path, listed: Path) -> None:
    if indices.is_unfinished(folder):
        what = f"{folder} was being made and is not whole"
    else:
        known = indices.load(folder)
        entries = splits.read_split(listed, known, labelled=True, notes=Notes(quiet=True))
        changed = known.changed(sample.key for sample in entries)
        if not changed:
            return
        what = (f"{counted(len(changed), 'file')} of {listed} changed since {folder} was made, "
                f"{changed[0]} the first")
    try:
        lease.refuse_living(folder.parent)
    except UserError as error:
        raise UserError(f"{what}, and a run trains on it ({error})") from None
    log.say(f"{what}: reading the files again")
    indices.renewed(folder)
