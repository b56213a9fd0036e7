"""Whether the command line takes a command, without running it."""

import pytest

from stpp import cli, config


class _Read(Exception):
    """The command's flags were read."""


def assert_accepted(name: str, args: list[str], monkeypatch) -> None:
    """Asserts that every flag of `stpp NAME ARGS` exists and has a possible value, and that none is missing."""
    real = config.parse

    def parse(*given, **more):
        found = real(*given, **more)
        if more["prog"] == "stpp":  # a recipe, which the flags come after
            return found
        raise _Read

    monkeypatch.setattr(config, "parse", parse)
    with pytest.raises(_Read):
        cli.COMMANDS[name][0](args)
    monkeypatch.setattr(config, "parse", real)
