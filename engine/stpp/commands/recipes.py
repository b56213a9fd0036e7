"""`stpp recipes`: the recipes that come with stpp, which `stpp train --recipe NAME` finds by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stpp import config
from stpp.errors import UserError

PACKAGE = Path(__file__).parents[1]
FOLDER = next((folder for folder in (PACKAGE / "recipes", PACKAGE.parents[1] / "launch" / "recipes")
               if folder.is_dir()), PACKAGE / "recipes")
"""Folder of the recipes: in the package of an installed wheel, or launch/recipes of a checkout."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes, with what each trains; `stpp train --recipe NAME --print-config` shows one."""


def recipes(args: Sequence[str]) -> None:
    """Runs `stpp recipes`."""
    config.parse(Recipes, args, prog="stpp recipes")
    found = _known()
    if not found:
        print(f"no recipes in {FOLDER}: install stpp again; "
              "`stpp train --recipe` takes the path of any .toml file")
    width = max(map(len, found), default=0)
    for name, path in found.items():
        print(f"{name:<{width}}  {_title(path)}")


def find(recipe: str) -> Path:
    """The file of a recipe: a path, else the name of one of ours.

    Raises:
        UserError: neither.
    """
    path, found = Path(recipe), _known()
    if path.is_file():
        return path
    if recipe in found:
        return found[recipe]
    names = f", or one of {', '.join(found)}" if found else ""
    raise UserError(f"--recipe {recipe}: no such file; give the path of a .toml file{names}")


def _known() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def _title(path: Path) -> str:
    """The first line of the comment that a recipe begins with."""
    with path.open(encoding="utf-8-sig") as file:
        return file.readline().lstrip("#").strip()
