"""Commands in this process: what they end with, and whether the command line takes them at all."""

import pytest

from stpp import cli, config


class _Read(Exception):
    """The command's flags were read."""


def assert_accepted(name: str, args: list[str], monkeypatch) -> None:
    """Asserts that every flag of `stpp NAME ARGS` exists and has a possible value, and that none is
    missing."""
    real = config.parse

    def parse(*given, **more):
        real(*given, **more)
        raise _Read

    monkeypatch.setattr(config, "parse", parse)
    with pytest.raises(_Read):
        cli.run(name, args)
    monkeypatch.setattr(config, "parse", real)


def ended(capsys, *args: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `stpp ARGS`."""
    capsys.readouterr()
    try:
        cli.main([*map(str, args)])
        code = 0
    except SystemExit as exit:
        code = exit.code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err


def refused(capsys, *args: object) -> str:
    """The last line that `stpp ARGS`, which ends with code 2, writes to standard error."""
    code, _, errors = ended(capsys, *args)
    assert code == 2
    return errors.strip().splitlines()[-1]
