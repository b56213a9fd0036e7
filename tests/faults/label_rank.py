"""One rank of `stpp label` or `stpp select` with a teacher that needs no network, which may end or stop at a
commit.

Arguments: action (`none`, `kill`, `stop`, or `slow` with a shard and seconds), the commit before which it
happens, the number of that commit within a rank, and the file for the process's number, of the only rank that
it happens to, which is the first to get there; then those of `stpp`. A commit is a pattern of "<function>
<file>", such as `replace */part-*.parquet`.
"""

import os
import signal
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import label_cases as cases  # noqa: E402
from stpp import cli  # noqa: E402
from stpp.inference import predictors  # noqa: E402
from stpp.label import shards, worker  # noqa: E402


def from_paths(paths, device, **_):
    identity = "other" if os.environ.get("RANK") == os.environ.get("STPP_TEST_OTHER_RANK", "none") else "tiny"
    return lambda images: [predictors.OpenedPredictor(network=cases.Tiny(), identity=identity,
                                                      classes=tuple("abcd")) for _ in paths]


def first(number_file: str) -> bool:
    """Returns True for the first process, and writes its number."""
    try:
        with open(number_file, "x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def trap(what: str, commit: str, count: int, number_file: str) -> None:
    """Makes the count-th call that matches `commit` the last one."""
    seen = [0]

    def traced(name: str):
        real = getattr(os, name)

        def call(*args, **kwargs):
            target = Path(args[-1]) if name == "replace" else None
            # A sync has no name of its own here: its folder identifies it.
            if name == "fsync":
                target = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
            if fnmatch(f"{name} {target}" if target else name, commit):
                seen[0] += 1
                if seen[0] == count and first(number_file):
                    os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
            return real(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "sync"):
        setattr(os, name, traced(name))


def slow(shard: int, seconds: float) -> None:
    """Makes the check of a finished shard slow."""
    damage = worker.damage

    def delayed(out: Path, table: str, number: int) -> str | None:
        if number == shard:
            time.sleep(seconds)
        return damage(out, table, number)

    worker.damage = delayed


def main(what: str, commit: str, count: str, number_file: str, *args: str) -> None:
    predictors.from_paths = from_paths
    shards.PATIENCE_S = 3.0
    if what == "slow":
        slow(int(commit), float(count))
    elif what != "none":
        trap(what, commit, int(count), number_file)
    cli.main(list(args))


if __name__ == "__main__":
    main(*sys.argv[1:])
