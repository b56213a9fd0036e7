"""Pytest plugin (`-p unpassed`) that records the tests that did not pass, and runs those of a record.

`--unpassed=FILE`: FILE lists the ids of all tests of this run, one a line, except those that have passed or
were skipped so far. So after an interrupted run it lists the failed tests and those that did not run.
`--only=FILE`: runs only the collected tests that FILE lists.

It works under xdist: the workers select the tests and the controller writes the file. With a space in place
of `=` pytest takes FILE for a test when it looks for its root.
"""

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--unpassed", type=Path, help="file of tests that did not pass, written as tests end")
    parser.addoption("--only", type=Path, help="file of the tests to run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--only")
    if path is None:
        return
    wanted = set(path.read_text(encoding="utf-8").splitlines())
    left_out = [item for item in items if item.nodeid not in wanted]
    items[:] = [item for item in items if item.nodeid in wanted]
    config.hook.pytest_deselected(items=left_out)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--unpassed") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Unpassed(config.getoption("--unpassed")), "unpassed-file")


class Unpassed:
    """Writer of the file, in the process that receives all test reports."""

    def __init__(self, path: Path):
        self._path, self._left, self._bad = path, {}, set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self._begin([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if not self._left:  # every worker collects the same tests
            self._begin(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._bad.add(report.nodeid)
        if report.when == "teardown" and report.nodeid not in self._bad:
            self._left.pop(report.nodeid, None)
            self._write()

    def _begin(self, ids: list[str]) -> None:
        self._left = dict.fromkeys(ids)
        self._write()

    def _write(self) -> None:
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text("".join(f"{one}\n" for one in self._left), encoding="utf-8")
        os.replace(partial, self._path)
