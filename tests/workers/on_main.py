"""One rank of a test of `distributed.on_main`: `on_main.py CASE`; prints its observations."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: E402, F401  puts the sources on the path
from stpp import cli, distributed  # noqa: E402
from stpp.errors import UserError  # noqa: E402

TIMEOUT_S = 4.0


def slow(here) -> None:
    """Rank 0 takes longer than a collective may."""
    for _ in range(2):
        distributed.on_main(here, lambda: time.sleep(TIMEOUT_S * 1.5))


def failing(here) -> None:
    """Rank 0 fails at the second of three actions."""
    distributed.on_main(here, lambda: None)
    distributed.on_main(here, refuse)
    print(f"rank {here.rank} went on", flush=True)


def refuse() -> None:
    raise UserError("the data is not there")


def parts(here) -> None:
    """Each call has its own part of the store."""
    counts = []
    for _ in range(3):
        store = distributed.call_store(here)
        store.add("n", 1)
        distributed.gather(None)
        counts.append(store.add("n", 0))
    print(f"rank {here.rank} counts {counts}", flush=True)


def main() -> None:
    with distributed.world("cpu", timeout_minutes=TIMEOUT_S / 60) as here:
        {"slow": slow, "failing": failing, "parts": parts}[sys.argv[1]](here)
        print(f"rank {here.rank} ends", flush=True)


if __name__ == "__main__":
    cli.run = lambda name, args: main()  # the command line's handling of errors
    cli.main(["test"])
