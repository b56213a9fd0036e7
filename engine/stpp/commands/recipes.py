"""`stpp recipes`: the built-in recipes, which `stpp train --recipe NAME` finds by name."""

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
    """List the built-in recipes with a description; `stpp train --recipe NAME --print-config` prints one."""


def recipes(args: Sequence[str]) -> None:
    """Runs `stpp recipes`."""
    config.parse(Recipes, args, prog="stpp recipes")
    paths = _known()
    if not paths:
        print(f"no recipes in {FOLDER}: install stpp again; "
              "`stpp train --recipe` accepts the path of any .toml file")
    width = max(map(len, paths), default=0)
    for name, path in paths.items():
        print(f"{name:<{width}}  {_title(path)}")


def find(recipe: str) -> Path:
    """Path of a recipe, given a path or the name of a built-in recipe.

    Raises:
        UserError: neither exists.
    """
    path, paths = Path(recipe), _known()
    if path.is_file():
        return path
    if recipe in paths:
        return paths[recipe]
    names = f", or one of {', '.join(paths)}" if paths else ""
    raise UserError(f"--recipe {recipe}: no such file; give the path of a .toml file{names}")


def _known() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def _title(path: Path) -> str:
    """First line of the comment at the top of a recipe."""
    with path.open(encoding="utf-8-sig") as file:
        return file.readline().lstrip("#").strip()
