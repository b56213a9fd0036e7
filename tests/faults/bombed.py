"""`stpp` with a bomb: runs a command, records every event at which a run may die, and kills itself at one of
them.

Arguments: events file or "", bomb (JSON: event, signal, rank) or "", file that records that the bomb went
off, then those of `stpp`. An event is unique within a run: "step 1-supervised 5", "half 1-supervised/last.pt
4" (while writing a checkpoint of step 4), "replace 3-label/masks/a.png", "replace 1-supervised/DONE.json".
"""

import io
import json
import os
import signal
import sys
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / name) for name in ("engine", "kernels")]

import torch  # noqa: E402

from stpp import cli  # noqa: E402
from stpp.training import trainer  # noqa: E402

RANK = int(os.environ.get("RANK", 0))
_local = threading.local()


def main(events: str, bomb: str, fired: str, args: list[str]) -> None:
    bomb = json.loads(bomb) if bomb else {"event": None}
    lock = threading.Lock()

    def event(text: str) -> None:
        if events and RANK == 0:
            with lock, open(events, "a") as file:
                file.write(text + "\n")
        if text == bomb["event"] and RANK == bomb["rank"] and not Path(fired).exists():
            Path(fired).touch()
            os.kill(os.getpid(), bomb["signal"])

    step, save, replace = trainer.Trainer.train_step, torch.save, os.replace

    def traced_step(self, passes):
        event(f"step {self.title} {self.steps_done}")
        return step(self, passes)

    def traced_save(content, file):
        path = Path(file.name)
        buffer = io.BytesIO()
        save(content, buffer)
        data = buffer.getvalue()
        file.write(data[: len(data) // 2])
        file.flush()
        _local.step = content["step"]
        event(f"half {path.parent.name}/{path.name[1:].split('.pt')[0]}.pt {content['step']}")
        file.write(data[len(data) // 2:])

    def traced_replace(source, target):
        path = Path(target)
        if "stages" in path.parts:
            name = "/".join(path.parts[path.parts.index("stages") + 1:])
            event(f"replace {name}" + (f" {_local.step}" if path.suffix == ".pt" else ""))
        return replace(source, target)

    trainer.Trainer.train_step, torch.save, os.replace = traced_step, traced_save, traced_replace
    cli.main(args)


if __name__ == "__main__":
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    main(*sys.argv[1:4], sys.argv[4:])
