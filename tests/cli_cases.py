"""Commands in this process: their exit code and output, and the acceptance of their flags."""

import pytest

from stpp import cli, config


class _Read(Exception):
    """Raised once the command's flags were read."""


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
    """Runs `stpp ARGS`; returns exit code, standard output and standard error."""
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
    """Runs `stpp ARGS`, which ends with code 2; returns its last line of standard error."""
    code, _, errors = ended(capsys, *args)
    assert code == 2
    return errors.strip().splitlines()[-1]
