"""The command line accepts every `stpp ...` command of README and docs; nothing is run."""

import re
import shlex
from pathlib import Path

import pytest

from cli_cases import assert_accepted
from stpp import config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "launch" / "recipes").glob("*.toml"))]
RECIPE = "launch/recipes/camvid_stpp.toml"
ELIDED = {"label": ["--teacher", "best.pt", "--source", "photos", "--out", "labels"],
          "train": ["--recipe", RECIPE, "--data.root", "DATA", "--out", "RUN"]}
"""Arguments that replace `...` in a command."""


def lines_of(page: Path) -> list[str]:
    """Returns the lines of the page's code (or a recipe's comment), joined after a backslash."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".toml":
        text = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    else:
        text = "\n".join(re.findall(r"^ *```[a-z]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL))
    return [" ".join(line.split()) for line in re.sub(r"\\\n", " ", text).splitlines()]


def commands(page: Path) -> list[str]:
    """Returns the stpp commands of a page, without their launcher."""
    found = []
    for line in lines_of(page):
        start = re.match(r"(?:stpp |torchrun .*?-m stpp )(?=[a-z])", line)
        script = re.match(
            r"(?:[A-Z]+=\S+ )*(?:bash |sbatch )?launch/(train|label|multinode|slurm)\.\w+ (?:--dry-run )?",
            line,
        )
        if start:
            found.append(line[start.end():])
        elif script:
            name = script[1] + " " if script[1] in ("train", "label") else ""
            found.append(name + line[script.end():])
    return found


COMMANDS = [pytest.param(text, id=f"{page.stem}: {text[:60]}") for page in PAGES for text in commands(page)]


def test_pages_contain_commands():
    assert len(COMMANDS) > 30
    used = {text.values[0].split()[0] for text in COMMANDS}
    assert used >= {"train", "label", "evaluate", "compile", "report", "doctor", "prepare"}


@pytest.mark.parametrize("text", COMMANDS)
def test_commands_of_pages_are_accepted(text, monkeypatch):
    name, *args = shlex.split(text, comments=True)
    if "..." in args:
        elided = ELIDED[name]
        args = [arg for i in range(0, len(elided), 2) if elided[i] not in args
                for arg in elided[i : i + 2]] + [
            arg for arg in args if arg != "..."]
    args = [RECIPE if arg in ("RECIPE", "mine.toml") else arg for arg in args]  # the second is tested below
    monkeypatch.chdir(ROOT)
    assert_accepted(name, args, monkeypatch)


@pytest.mark.parametrize("page", [page for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
                                  if page.suffix == ".md"],
                         ids=lambda page: page.name)
def test_links_point_to_existing_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_recipe_of_the_guide_resolves(tmp_path):
    (toml,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8"),
                         re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(toml, encoding="utf-8")
    resolved = config.load_recipe(config.Config, path)
    assert (resolved.data.layout, resolved.data.fraction, resolved.data.val) == ("globs", "1/1", 0.2)
    path.write_text(toml.replace("[data]\n", '[data]\nmask_map = ["#804080=road", "0,0,0=ignore"]\n'),
                    encoding="utf-8")
    assert config.load_recipe(config.Config, path).data.mask_map == ("#804080=road", "0,0,0=ignore")
