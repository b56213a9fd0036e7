"""Kills a labelling before each of its commits in turn, lets another process finish, and compares with an
undisturbed run.

Arguments: source, folder to work in, png or tar, report (JSON); optionally the output of a labelling of an
earlier source, which every run then updates. Every run is a fork of this process, which computes nothing
itself. Commits are the calls that make something permanent or remove it: renaming, removing, and syncing of
files, folders and everything.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow.parquet  # noqa: E402, F401  (once, not in every fork)
from PIL import Image  # noqa: E402

import label_cases as cases  # noqa: E402
from stpp.images import names  # noqa: E402
from stpp.label import changes, rows  # noqa: E402

Image.init()
names._BUCKETS = changes._BUCKETS = 4  # to spend less time on opening files
COMMITS = ("replace", "fsync", "sync", "unlink")


def forked(action) -> tuple[int, str]:
    """Runs `action` in a fork; returns (0 or the signal that ended it, its text)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writer, action().encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the labelling failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, text


def label(source: str, out: Path, output: str, update: bool, kill_before: int = -1) -> str:
    """Labels; records every commit, and dies before one of them."""
    seen = []

    def traced(name: str):
        real = getattr(os, name)

        def call(*args, **kwargs):
            if len(seen) == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            target = args[-1] if name == "replace" else args[0] if name == "unlink" else ""
            seen.append(f"{name} {Path(target).name if target else ''}".strip())
            # A killed process loses nothing that the system holds: syncing would only take time here.
            return real(*args, **kwargs) if name in ("replace", "unlink") else None

        return call

    for name in COMMITS:
        setattr(os, name, traced(name))
    teacher = cases.Tiny()
    cases.run(source, out, teacher=teacher, output=output, shard_size=4, tta="none", update=update)
    return json.dumps({"commits": seen, "seen": teacher.seen})


def main(source: str, folder: str, output: str, report: str, before: str = "") -> None:
    def begun(name: str) -> Path:
        out = Path(folder) / name
        shutil.rmtree(out, ignore_errors=True)
        if before:
            shutil.copytree(before, out)
        return out

    whole = begun("whole")
    _, text = forked(lambda: label(source, whole, output, bool(before)))
    expected, commits = cases.contents(whole), json.loads(text)["commits"]
    found = []
    for number, commit in enumerate(commits):
        out = begun("killed")
        ended, _ = forked(lambda out=out, number=number: label(source, out, output, bool(before), number))
        assert ended == signal.SIGKILL, f"not killed before {commit}"
        _, text = forked(lambda out=out: label(source, out, output, bool(before)))
        found.append({"before": commit, "same": cases.contents(out) == expected,
                      "recomputed": json.loads(text)["seen"],
                      "keys": sorted(row["key"] for row in rows.read_parts(out, "labels"))})
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
