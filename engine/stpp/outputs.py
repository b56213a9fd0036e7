"""Output folders: a mark names the files and folders that a command writes there, so that no command
overwrites a user's files, and listings of data skip outputs."""

from collections.abc import Sequence
from pathlib import Path

from stpp import files
from stpp.errors import UserError

MARK = ".stpp-output"


def claim(out: Path, names: Sequence[str], *, earlier: str | None = None) -> None:
    """Marks an output folder, which is created if missing.

    Args:
        names: files and folders that will be written there.
        earlier: path below the folder that earlier versions wrote in place of the mark.

    Raises:
        UserError: a file or folder of these names exists and was not written by this program.
        OSError: the folder cannot be written.
    """
    marked = written(out)
    if marked or not (earlier and (out / earlier).exists()):
        foreign = [name for name in names if name not in marked and (out / name).exists()]
        if foreign:
            raise UserError(f"--out {out}: contains {', '.join(foreign)}, which stpp did not write and "
                            "would replace; choose another --out")
    if not marked >= set(names):
        files.write_text(out / MARK, "".join(f"{name}\n" for name in sorted(marked | set(names))))


def written(folder: Path) -> set[str]:
    """Names of the files and folders in `folder` that are outputs; empty without a mark."""
    try:
        return set(files.read_text(folder / MARK).split("\n")) - {""}
    except (OSError, ValueError):
        return set()
