"""Refresh of an index before scoring: an index holds copies of masks, which may be out of date."""

from pathlib import Path

from stpp import distributed, log
from stpp.dataset import index as indices
from stpp.dataset import splits
from stpp.dataset.entries import Index
from stpp.dataset.notes import Notes, counted
from stpp.distributed import World
from stpp.errors import UserError
from stpp.run import lease


def fresh_index(folder: Path, listed: Path, world: World) -> Index:
    """Loads the index in `folder`; rank 0 first rebuilds it if files of listed images have changed.

    Args:
        folder: folder of the index.
        listed: list with lines `image mask`.

    Raises:
        UserError: there is no index, or the list does not fit it; or files have changed, and they are
            invalid, the index cannot be written, or a running training uses it.
    """
    distributed.on_main(world, lambda: _renew(folder, listed))
    return indices.load(folder)


def _renew(folder: Path, listed: Path) -> None:
    if indices.is_unfinished(folder):
        what = f"{folder} is incomplete"
    else:
        known = indices.load(folder)
        entries = splits.read_split(listed, known, labelled=True, notes=Notes(quiet=True))
        changed = known.changed(sample.key for sample in entries)
        if changed:
            what = (f"{counted(len(changed), 'file')} of {listed} changed since {folder} was made, "
                    f"the first: {changed[0]}")
        elif known.layout == "yolo" and indices.is_stale(folder, known.root, **known.settings):
            what = f"{known.root} changed since {folder} was made"  # perhaps the names of its class numbers
        else:
            return
    try:
        lease.require_free(folder.parent)
    except UserError as error:
        raise UserError(f"{what}, and a run trains on it ({error})") from None
    log.say(f"{what}; preparing the index again")
    indices.renewed(folder)
