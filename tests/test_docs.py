"""What the guides tell people to type: commands that exist, flags and recipes that resolve."""

import re
import shlex
from pathlib import Path

import pytest

from stpp import cli, config, export, predict
from stpp.config import Config
from stpp.label import command

DOCS = Path(__file__).parents[1] / "docs"
FLAGS = {"prepare": cli.Prepare, "train": Config, "evaluate": cli.Evaluate, "compile": cli.Compile, "split": cli.Split,
         "predict": predict.Predict, "export": export.Export, "label": command.Label}
GUIDES = ["your-data.md", "from-public-code.md"]


def commands(text: str) -> list[list[str]]:
    """The words of every `stpp ...` in the shell blocks, comments and continued lines understood."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for start in ("stpp",), ("-m", "stpp"):
                for i in range(len(words)):
                    if tuple(words[i : i + len(start)]) == start and (len(start) == 2 or i == 0):
                        found.append(words[i + len(start):])
    return found


@pytest.mark.parametrize("name", GUIDES)
def test_commands_and_flags_exist(name):
    typed = commands((DOCS / name).read_text(encoding="utf-8"))
    assert typed
    for command_name, *args in typed:
        _, args = cli._take(args, "--recipe")
        config.parse(FLAGS[command_name], args, prog=f"stpp {command_name}")


@pytest.mark.parametrize("name", GUIDES)
def test_every_command_that_is_named_exists(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    assert set(re.findall(r"`stpp (\w+)", text)) <= cli.COMMANDS.keys()


def test_the_recipe_of_the_guide_resolves(tmp_path):
    (toml,) = re.findall(r"```toml\n(.*?)```", (DOCS / "your-data.md").read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(toml, encoding="utf-8")
    resolved = config.load_recipe(Config, path)
    assert (resolved.data.layout, resolved.data.fraction, resolved.data.val) == ("globs", "1/1", 0.2)
    path.write_text(toml.replace("[data]\n", '[data]\nmask_map = ["#804080=road", "0,0,0=ignore"]\n'), encoding="utf-8")
    assert config.load_recipe(Config, path).data.mask_map == ("#804080=road", "0,0,0=ignore")
