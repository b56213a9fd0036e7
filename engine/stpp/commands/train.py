"""`stpp train`: a whole run, from a recipe and flags. Heavy imports are deferred."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from stpp import config
from stpp.commands.options import need_root
from stpp.commands.recipes import find
from stpp.config import Config
from stpp.errors import UserError
from stpp.settings import INLINE


@dataclass(frozen=True, kw_only=True)
class Train:
    """Run supervised training, ST, ST++, UniMatch or UniMatch-V2. To resume, run the same command again;
    finished stages are skipped."""

    recipe: str | None = None
    """Base settings: a name that `stpp recipes` lists, or the path of a .toml file or config.json."""
    print_config: bool = False
    """Print all settings as JSON and exit."""
    config: Annotated[Config, INLINE] = Config()


def train(args: Sequence[str]) -> None:
    """Runs `stpp train`.

    Raises:
        UserError: invalid flags, recipe, data or run folder.
    """
    options = parse(args)
    if options.print_config:
        print(json.dumps(config.to_dict(options.config), indent=2))
        return
    if options.config.out is None:
        raise UserError("--out is missing: name the folder of the run")
    need_root(options.config.data)
    from stpp import distributed, log
    from stpp.run.start import start

    with distributed.world(options.config.device, timeout_minutes=options.config.timeout_minutes) as world:
        log.set_speaker(world.is_main)
        start(options.config, world)


_LENGTHS = {"--train.epochs": "steps", "--train.supervised-epochs": "supervised_steps",
            "--train.supervised-steps": "supervised_epochs"}
"""A flag of a stage's length, and the setting of the same length in the other unit that it replaces."""


def parse(args: Sequence[str]) -> Train:
    """Reads the recipe, then the flags, which take precedence."""
    recipe, given = None, set()
    for place, arg in enumerate(args, 1):
        name, is_joined, value = arg.partition("=")
        given.add(name.replace("_", "-"))
        if name == "--recipe":
            recipe = value if is_joined else next(iter(args[place:]), None)  # None is rejected below
    if recipe is None:
        return config.parse(Train, args, prog="stpp train")
    base = config.load_recipe(Config, find(recipe))
    replaced = {setting: None for flag, setting in _LENGTHS.items() if flag in given}
    base = dataclasses.replace(base, train=dataclasses.replace(base.train, **replaced))
    return config.parse(Train, args, prog="stpp train", default=Train(config=base))
