"""Shapes of annotation tools to masks, and masks to the tools' formats: rates, and independence of memory
from the set's size.

A COCO file of 5,000 photographs with 20 polygons each, of 8 to 40 points, is prepared in a separate process,
and then one of a tenth of that; a fifth of the drawn masks is exported to each format. Starting Python and
importing are not timed.

Rows: `annotations`, variants *prepare* and *export FORMAT*. Summary rows: `annotations.prepare_images_per_s`,
`annotations.prepare_polygons_per_s`, `annotations.prepare_cpu_ms` (of all processes, per image),
`annotations.prepare_peak_mib` (of the leading process), `annotations.worker_peak_mib` (of a drawing process),
`annotations.peak_growth_mib` (of the leading process, from a tenth of the set to the whole), and
`annotations.export_images_per_s.FORMAT`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from harness import Report, arguments
from stpp.label import rows

WIDTH, HEIGHT, POLYGONS = 640, 480, 20
CLASSES = 8
FORMATS = {"cvat": "out", "coco": "out.json", "label-studio": "out", "yolo": "out"}
CHILD = """
import json, os, resource, sys, threading, time
from pathlib import Path
from stpp.dataset import index

def peak_mib(process):
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0)

def watch():
    while not done.wait(0.2):
        for task in Path("/proc/self/task").iterdir():
            try:
                peaks.extend(map(peak_mib, (task / "children").read_text().split()))
            except OSError:
                pass

def cpu_s():
    return sum(one.ru_utime + one.ru_stime
               for one in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))

peaks, done = [0], threading.Event()
watching = threading.Thread(target=watch)
watching.start()
root, out = sys.argv[1:]
start, before = time.perf_counter(), cpu_s()
made = index.prepare(root, out, layout="coco", masks="annotations.json", unlisted="background",
                     progress=False)
found = {"seconds": time.perf_counter() - start, "masks": made.counts["masks"]}
done.set()
watching.join()
print(json.dumps(found | {"cpu_s": cpu_s() - before, "peak": peak_mib("self"), "worker": max(peaks)}))
"""
"""Peaks are VmHWM, because a new process reports its parent's largest memory as its own."""
EXPORT = """
import json, sys, time
from stpp import cli
from stpp.annotations import to_coco, to_cvat, to_label_studio, to_yolo
from stpp.commands import export_labels
from stpp.label import export, fingerprint
from stpp.report import run
start = time.perf_counter()
cli.main(sys.argv[1:])
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def draw(root: Path, images: int) -> None:
    """Writes photographs and a COCO file of their polygons."""
    rng = np.random.default_rng(0)
    listed, annotations = [], []
    (root / "photos").mkdir(parents=True)
    for number in range(images):
        coarse = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        image.save(root / "photos" / f"{number:06d}.jpg", quality=85)
        listed.append({"id": number, "file_name": f"{number:06d}.jpg", "width": WIDTH, "height": HEIGHT})
        annotations += [
            {
                "id": POLYGONS * number + i,
                "image_id": number,
                "category_id": 1 + i % CLASSES,
                "iscrowd": 0,
                "segmentation": [polygon(rng)],
            }
            for i in range(POLYGONS)
        ]
    categories = [{"id": 1 + i, "name": f"class {i}"} for i in range(CLASSES)]
    text = json.dumps({"images": listed, "annotations": annotations, "categories": categories})
    (root / "annotations.json").write_text(text)


def polygon(rng: np.random.Generator) -> list[float]:
    count, radius = int(rng.integers(8, 41)), float(rng.uniform(8, 90))
    centre = rng.uniform((radius, radius), (WIDTH - radius, HEIGHT - radius))
    turn = (np.arange(count) + rng.uniform(0, 0.4, count)) * 2 * np.pi / count
    points = centre + radius * rng.uniform(0.5, 1, count)[:, None] * np.column_stack(
        (np.cos(turn), np.sin(turn))
    )
    return points.round(2).ravel().tolist()


def child(script: str, *args: object) -> dict:
    """Runs a script in a separate process and returns its JSON result."""
    done = subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, args))}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def as_labels(index: Path, out: Path, images: int) -> Path:
    """Writes the masks of an index as labels of `stpp label`, in parts of 500."""
    (out / "masks").mkdir(parents=True)
    (index / "masks" / "photos").rename(out / "masks" / "photos")
    keys = sorted(path.stem for path in (out / "masks" / "photos").iterdir())[:images]
    for part, first in enumerate(range(0, len(keys), 500)):
        path = rows.part(out, "labels", part)
        path.parent.mkdir(exist_ok=True)
        rows.write(
            path,
            [
                {
                    "key": f"photos/{key}",
                    "source": f"photos/{key}.jpg",
                    "status": "ok",
                    "width": WIDTH,
                    "height": HEIGHT,
                    "mean_confidence": 0.9,
                }
                for key in keys[first : first + 500]
            ],
            rows.LABELS,
        )
    return out


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], small={"files": 40, "rounds": 1})
    parser.add_argument("--files", type=int, default=5000, help=f"photographs, each with {POLYGONS} polygons")
    options = parser.parse_args()
    report = Report(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "tenth" / "data", max(options.files // 10, 1))
        draw(folder / "whole" / "data", options.files)
        tenth = child(CHILD, folder / "tenth" / "data", folder / "tenth" / "index")
        found = [
            child(CHILD, folder / "whole" / "data", folder / "whole" / f"index{i}")
            for i in range(options.rounds)
        ]
        assert all(one["masks"] == options.files for one in found)
        shape = f"{options.files} x {WIDTH}x{HEIGHT}, {POLYGONS} polygons each"
        report.measured("annotations", "prepare", shape, "uint8", [1000 * one["seconds"] for one in found])
        seconds = float(np.median([one["seconds"] for one in found]))
        peak = max(one["peak"] for one in found)
        report.summary("annotations.prepare_images_per_s", options.files / seconds)
        report.summary("annotations.prepare_polygons_per_s", POLYGONS * options.files / seconds)
        cpu_s = float(np.median([one["cpu_s"] for one in found]))
        report.summary("annotations.prepare_cpu_ms", 1000 * cpu_s / options.files)
        report.summary("annotations.prepare_peak_mib", peak)
        report.summary("annotations.worker_peak_mib", max(one["worker"] for one in found))
        report.summary("annotations.peak_growth_mib", peak - tenth["peak"])
        exported = max(options.files // 5, 1)
        labels = as_labels(folder / "whole" / "index0", folder / "labels", exported)
        names = ["background", *(f"class {i}" for i in range(CLASSES))]
        for form, out in FORMATS.items():
            took = child(
                EXPORT,
                "export-labels",
                labels,
                "--format",
                form,
                "--out",
                folder / form / out,
                "--classes",
                *names,
            )["seconds"]
            masks = f"{exported} x {WIDTH}x{HEIGHT}, masks of {POLYGONS} polygons each"
            report.measured("annotations", f"export {form}", masks, "uint8", [1000 * took])
            report.summary(f"annotations.export_images_per_s.{form}", exported / took)
    report.finish()


if __name__ == "__main__":
    main()
