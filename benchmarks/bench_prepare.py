"""Preparation of a data set, against the previous version: deciding once how a file is read must not slow it
down.

Photographs in JPEG and masks in PNG are drawn once, all different. `index.prepare` then reads them with this
version and with that of another checkout in turn, each time in a separate process and into a new folder.
Starting Python and importing are not timed, and an untimed round of each first fills the page cache.

Rows: `prepare`, variants *this* and *before*. Summary rows: `prepare.images_per_s`, and `prepare.ratio`, the
seconds of this version over those of the previous one (medians): 1.1 is a tenth slower.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from harness import Report, arguments

WIDTH, HEIGHT = 500, 375
"""Pixels of an image, those of VOC."""
CLASSES = ("background", "disc", "box")
PER_FOLDER = 1000
CHILD = """
import json, sys, time
sys.meta_path = [finder for finder in sys.meta_path
                 if "__editable__" not in getattr(finder, "__module__", "")]
try:
    from stpp.dataset import index
except ModuleNotFoundError:
    from stpp.data import index
root, out, classes = sys.argv[1], sys.argv[2], sys.argv[3:]
start = time.perf_counter()
made = index.prepare(root, out, layout="globs", images="photos/**/*", masks="labels/**/*.png",
                     classes=tuple(classes),
                     progress=False)
seconds = time.perf_counter() - start
masks = sum(entry.mask is not None for entry in made.entries.values())
print(json.dumps({"seconds": seconds, "images": len(made.entries), "masks": masks, "module": index.__file__}))
"""
"""Script that a version runs: nothing but `index.prepare`, which was in `stpp.data` before. An editable
install would mix the modules of two versions."""


def draw(root: Path, count: int) -> None:
    """Writes photographs and their masks, all different."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = f"{i // PER_FOLDER:03d}"
        coarse = rng.integers(0, 256, (HEIGHT // 12, WIDTH // 12, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        mask = Image.new("L", image.size)
        for number, shape in ((1, ImageDraw.Draw(mask).ellipse), (2, ImageDraw.Draw(mask).rectangle)):
            left, top = int(rng.integers(0, WIDTH - 120)), int(rng.integers(0, HEIGHT - 120))
            shape((left, top, left + 100, top + 80), fill=number)
        for kind, picture, name in (("photos", image, f"{i:06d}.jpg"), ("labels", mask, f"{i:06d}.png")):
            (root / kind / folder).mkdir(parents=True, exist_ok=True)
            picture.save(root / kind / folder / name, **({"quality": 85} if kind == "photos" else {}))


def prepared(checkout: Path, root: Path, count: int) -> float:
    """Returns the seconds that a version takes."""
    path = os.pathsep.join(str(checkout / part) for part in ("engine", "kernels"))
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([sys.executable, "-c", CHILD, str(root), f"{out}/index", *CLASSES],
                              capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        raise SystemExit(f"{checkout}: cannot prepare\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not Path(found["module"]).is_relative_to(checkout):
        raise SystemExit(f"{checkout}: {found['module']} was imported instead of its own")
    assert found["images"] == found["masks"] == count, found
    return found["seconds"]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], small={"files": 40, "rounds": 1})
    parser.add_argument("--files", type=int, default=10_000, help="photographs, each with a mask")
    parser.add_argument("--before", type=Path, required=True,
                        help="checkout of the version to compare with")
    options = parser.parse_args()
    report = Report(options)
    checkouts = {"this": Path(__file__).resolve().parents[1], "before": options.before.resolve()}
    times: dict[str, list[float]] = {variant: [] for variant in checkouts}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "data"
        draw(root, options.files)
        for number in range(options.rounds + 1):
            for variant, checkout in checkouts.items():
                seconds = prepared(checkout, root, options.files)
                if number:
                    times[variant].append(1000 * seconds)
    shape = f"{options.files} x {WIDTH}x{HEIGHT}"
    for variant, found in times.items():
        report.measured("prepare", variant, shape, "uint8", found)
    this, before = (statistics.median(times[variant]) for variant in ("this", "before"))
    report.summary("prepare.images_per_s", options.files / this * 1000)
    report.summary("prepare.ratio", this / before)
    report.finish()


if __name__ == "__main__":
    main()
