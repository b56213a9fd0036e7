"""Labelling of corpora of 1,000, 10,000 and 100,000 tiny images: memory and rate must not depend on their
number.

A separate process labels each corpus, and the kernel reports its peak memory. The network is one small
convolution, so the rate is that of listing, planning, decoding, encoding and writing.

Rows, for each number of images: `corpus.rate.<n>` (images a second, planning included),
`corpus.peak_mib.<n>`, `corpus.list_s.<n>` (listing, names checked), `corpus.restart_s.<n>` (the same command
again, all done), `corpus.bytes.<folder>.<n>` (of a folder of the output, bytes an image), and
`corpus.time.<n>.<part>`. Of torchrun's store, which hands out the shards, over the loopback: `store.add_us`
(one client) and `store.adds_per_s` (concurrent clients). The summary row `corpus.memory_growth_mib` is the
peak memory of the largest corpus less that of the smallest.
"""

import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from harness import Report, arguments
from stpp import distributed
from stpp.config import LabelConfig
from stpp.images.sources import open_source
from stpp.inference.predictors import already_open
from stpp.label import plan
from stpp.label.assignment import Assignment
from stpp.label.labels import label_corpus

PER_FOLDER = 1000
SIDE = 32


class Small:
    """Predictor of four classes from one convolution."""

    num_classes, view_px = 4, None

    def __init__(self):
        torch.manual_seed(0)
        self._layer = nn.Conv2d(3, 4, 4, stride=4)

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self._layer(images_NCHW)


def pictures() -> list[bytes]:
    """Encodes a few different JPEGs."""
    rng, found = np.random.default_rng(0), []
    for _ in range(16):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (4, 4, 3),
                                     dtype=np.uint8)).resize((SIDE, SIDE)).save(file, "JPEG")
        found.append(file.getvalue())
    return found


def make_corpus(folder: Path, count: int, kind: str) -> str:
    """Writes the images, and returns their source."""
    data = pictures()
    for first in range(0, count, PER_FOLDER):
        name = f"{first // PER_FOLDER:05d}"
        numbers = range(first, min(first + PER_FOLDER, count))
        if kind == "folder":
            (folder / name).mkdir(parents=True)
            for i in numbers:
                (folder / name / f"{i:09d}.jpg").write_bytes(data[i % len(data)])
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for i in numbers:
                member = tarfile.TarInfo(f"{i:09d}.jpg")
                member.size = len(data[i % len(data)])
                archive.addfile(member, io.BytesIO(data[i % len(data)]))
    return str(folder) if kind == "folder" else f"{folder}/{{00000..{(count - 1) // PER_FOLDER:05d}}}.tar"


def child(source: str, out: str, output: str, shard_size: str) -> None:
    """Labels a corpus in its own process, and prints the measurements."""
    listing = {}
    make = plan.make

    def timed(*args, **kwargs):
        start = time.perf_counter()
        try:
            return make(*args, **kwargs)
        finally:
            listing["s"] = time.perf_counter() - start

    from stpp.label import listing as listings

    listings.make = timed
    here = distributed.World(device=torch.device("cpu"))
    distributed.keep_freed_memory()  # as in `stpp label`: kept memory must not grow either
    start = time.perf_counter()
    config = LabelConfig(tta="none", batch_per_rank=64, shard_size=int(shard_size))
    task = Assignment(source=open_source(source), out=Path(out), output=output, config=config)
    summary = label_corpus(already_open(Small(), identity="small"), task, here)
    print(json.dumps({"wall_s": time.perf_counter() - start, "list_s": listing.get("s"),
                      "images": summary.images,
                      "bad": summary.bad, "labelled": summary.labelled, "seconds": summary.seconds,
                      "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def measured(source: str, out: Path, output: str, shard_size: int) -> dict:
    """Runs `child` in a separate process, and returns its measurements."""
    done = subprocess.run([sys.executable, __file__, "--child", source, str(out), output, str(shard_size)],
                          capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def client(port: str, count: str) -> None:
    """Adds to a counter of the store in its own process, and prints the seconds."""
    store = torch.distributed.TCPStore("127.0.0.1", int(port), is_master=False)
    store.add("next", 1)
    start = time.perf_counter()
    for _ in range(int(count)):
        store.add("next", 1)
    print(time.perf_counter() - start)


def measure_store(report: Report, clients: int = 4, count: int = 2000) -> None:
    """Measures the rate of the counter of shards."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    for number in (1, clients):
        command = [sys.executable, __file__, "--client", str(store.port), str(count)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(number)]
        seconds = [float(process.communicate()[0]) for process in running]
        if number == 1:
            report.summary("store.add_us", seconds[0] / count * 1e6)
        else:
            report.summary("store.adds_per_s", number * count / max(seconds))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--kind", choices=["folder", "tar"], default="folder")
    parser.add_argument("--output", choices=["png", "tar"], default="png")
    parser.add_argument("--shard-size", type=int, default=1000)
    options = parser.parse_args()
    report = Report(options)
    peaks = []
    measure_store(report)
    with tempfile.TemporaryDirectory() as name:
        for count in options.counts:
            folder = Path(name) / str(count)
            source = make_corpus(folder / "in", count, options.kind)
            first = measured(source, folder / "out", options.output, options.shard_size)
            again = measured(source, folder / "out", options.output, options.shard_size)
            assert (first["images"], first["bad"], first["labelled"],
                    again["labelled"]) == (count, 0, count, 0)
            peaks.append(first["peak_mib"])
            for key, value in (("rate", count / first["wall_s"]), ("peak_mib", first["peak_mib"]),
                               ("list_s", first["list_s"]), ("restart_s", again["wall_s"])):
                report.summary(f"corpus.{key}.{count}", value)
            for part in ("plan", "labels", "shards", "masks"):
                size = sum(path.stat().st_size for path in (folder / "out" / part).rglob("*")
                           if path.is_file())
                report.summary(f"corpus.bytes.{part}.{count}", size / count)
            for part, value in first["seconds"].items():
                report.summary(f"corpus.time.{count}.{part}", value)
    report.summary("corpus.memory_growth_mib", peaks[-1] - peaks[0])
    report.finish()


if __name__ == "__main__":
    {"--child": child, "--client": client}[sys.argv[1]](*sys.argv[2:]) if sys.argv[1:2] in (
        ["--child"],
        ["--client"],
    ) else main()
