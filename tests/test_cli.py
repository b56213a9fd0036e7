"""Command line: the help of every command is instant, and a mistake is one line and exit code 2."""

import importlib
import subprocess
import sys

import pytest

from cli_cases import ended
from stpp import cli


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_loads_nothing_heavy(name):
    code = (f"import sys\nfrom stpp import cli\ntry:\n    cli.main([{name!r}, '--help'])\nfinally:\n"
            "    print('loaded:', *sys.modules)")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    text, _, loaded = ran.stdout.partition("loaded:")
    assert ran.returncode == 0 and text.startswith(f"usage: stpp {name}"), ran.stderr
    assert set(loaded.split()) & {"torch", "numpy", "PIL", "stpp_kernels", "pyarrow"} == set()


def test_every_command_is_listed_and_a_function_of_its_module(capsys):
    for name, (module, line) in cli.COMMANDS.items():
        function = name.replace("-", "_")
        assert callable(getattr(importlib.import_module(f"stpp.commands.{module}"), function))
        assert f"{name:<13} {line}" in ended(capsys, "--help")[1]


@pytest.mark.parametrize("args", [[], ["fly"], ["train"], ["train", "--out", "x"],
                                  ["train", "--recipe", "absent.toml"], ["train", "--recipe"],
                                  ["train", "--out", "x", "--data.root", "absent"],
                                  ["train", "--out", "x", "--data.root", ".", "--data.layout", "globs"],
                                  ["evaluate", "--checkpoint", "absent.pt"], ["prepare"]])
def test_mistakes_exit_with_2_and_one_line(args, tmp_path):
    ran = subprocess.run([sys.executable, "-m", "stpp", *args], capture_output=True, text=True, timeout=60,
                         cwd=tmp_path)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert args == [] or len(ran.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
