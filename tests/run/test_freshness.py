"""Scores use the current masks; and faults that end a command in one line: full and read-only disks."""

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import shape_cases
from dataset_cases import data_set, ids, paletted, photo, prepare
from stpp import cli, files, log
from stpp.dataset import check, index, splits
from stpp.distributed import World
from stpp.errors import UserError
from stpp.images.masks import read_index_mask
from stpp.run import lease
from stpp.run.freshness import fresh_index

COLOURS = ((0, 0, 0), (128, 0, 0), (0, 128, 0))


@pytest.fixture
def known(tmp_path):
    """Palette masks, of which the index keeps copies."""
    return prepare(data_set(tmp_path / "data", {f"{i}": paletted(ids(1, 2), *COLOURS) for i in range(4)}))


@pytest.fixture
def here():
    import torch

    return World(device=torch.device("cpu"))


def listed(known, *names):
    path = known.out.parent / "val.txt"
    path.write_text("".join(splits.line(known.entries[f"photos/{name}.jpg"]) for name in names))
    return path


def test_corrected_mask_is_read_again_before_scoring(known, here, capsys):
    path = listed(known, "0", "1")
    assert (
        fresh_index(known.out, path, here).fingerprint == known.fingerprint
        and "again" not in capsys.readouterr().err
    )
    paletted(ids(2), *COLOURS).save(known.root / "labels" / "1.png")
    fresh = fresh_index(known.out, path, here)
    assert (read_index_mask(fresh.sample("photos/1.jpg").mask) == ids(2)).all()
    assert "1 file of" in (said := capsys.readouterr().err) and "the first: labels/1.png" in said
    assert (
        fresh_index(known.out, path, here).fingerprint == fresh.fingerprint
        and "again" not in capsys.readouterr().err
    )


def test_photograph_of_another_size_is_found_without_reading_others(known, here, capsys):
    photo(known.root / "photos" / "3.jpg", 9)
    assert fresh_index(known.out, listed(known, "0", "1"), here).fingerprint == known.fingerprint
    photo(known.root / "photos" / "0.jpg", 9, (40, 30))
    with pytest.raises(UserError, match=r"labels/0\.png: the mask has 32x24 pixels"):
        fresh_index(known.out, listed(known, "0", "1"), here)


def test_evaluation_works_after_the_refused_file_is_corrected(known, here):
    """The run's index has settings that nobody enters again, so a refusal must not lose it."""
    path, photograph = listed(known, "0", "1"), known.root / "photos" / "0.jpg"
    held, status = photograph.read_bytes(), photograph.stat()
    paletted(ids(2), *COLOURS).save(known.root / "labels" / "1.png")
    photo(photograph, 9, (40, 30))
    for _ in range(2):
        with pytest.raises(UserError, match=r"labels/0\.png: the mask has 32x24 pixels"):
            fresh_index(known.out, path, here)
    photograph.write_bytes(held)
    os.utime(photograph, ns=(status.st_atime_ns, status.st_mtime_ns))
    fresh = fresh_index(known.out, path, here)
    assert fresh.fingerprint and (read_index_mask(fresh.sample("photos/1.jpg").mask) == ids(2)).all()


def test_files_with_old_times_are_read_again_after_a_refusal(known, here):
    """A copy of a mask may have been rewritten before another mask was refused."""
    path, mask = listed(known, "0", "1"), known.root / "labels" / "0.png"
    held, status = mask.read_bytes(), mask.stat()
    paletted(ids(2), *COLOURS).save(mask)
    photo(known.root / "photos" / "1.jpg", 9, (40, 30))
    with pytest.raises(UserError):
        fresh_index(known.out, path, here)
    mask.write_bytes(held)
    os.utime(mask, ns=(status.st_atime_ns, status.st_mtime_ns))
    photo(known.root / "photos" / "1.jpg", 1)
    fresh = fresh_index(known.out, path, here)
    assert (read_index_mask(fresh.sample("photos/0.jpg").mask) == ids(1, 2)).all()


def test_evaluation_resumes_after_a_kill_while_rereading(known, here):
    """At any moment before the index is written."""
    path = listed(known, "0", "1")
    paletted(ids(2), *COLOURS).save(known.root / "labels" / "1.png")
    code = """if __name__ == "__main__":
    import os, signal, sys
    from pathlib import Path
    from stpp.dataset import index, survey
    check_files = survey.check_files
    def killed(*args, **options):
        if sys.argv[2] == "behind":
            check_files(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    survey.check_files = killed
    index.renewed(Path(sys.argv[1]))
"""
    for moment in ("before", "behind"):
        done = subprocess.run([sys.executable, "-c", code, str(known.out), moment])
        assert done.returncode == -signal.SIGKILL and not (known.out / "index.json").exists()
        with pytest.raises(UserError, match="its preparation is unfinished; run `stpp prepare`"):
            index.load(known.out)
    fresh = fresh_index(known.out, path, here)
    assert (read_index_mask(fresh.sample("photos/1.jpg").mask) == ids(2)).all()
    assert fresh.settings == known.settings and not (known.out / "unfinished.json").exists()


def test_resumed_run_keeps_its_masks(known, here):
    """The index is in the run's folder, and its masks are read while it trains."""
    paletted(ids(2), *COLOURS).save(known.root / "labels" / "0.png")
    path = listed(known, "0")
    with (
        lease.held(known.out.parent),
        pytest.raises(UserError, match="a run trains on it .*in use by process"),
    ):
        fresh_index(known.out, path, here)
    assert fresh_index(known.out, path, here).fingerprint != known.fingerprint


def test_missing_mask_is_named(known, here):
    (known.root / "labels" / "0.png").unlink()
    (known.root / "photos" / "1.jpg").unlink()
    assert known.changed(["photos/0", "photos/1", "photos/2"]) == ["labels/0.png", "photos/1.jpg"]


# --- disks


def full(*_: object, **__: object):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")


def test_full_disk_leaves_no_partial_mask_or_index(known, monkeypatch):
    def half(file, values):
        file.write(b"\x89PNG")
        full()

    monkeypatch.setattr(check, "write_index_png", half)
    for path in (known.out / "masks").rglob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="the index cannot be written .No space left on device"):
        prepare(known.root)
    assert not (known.out / "index.json").exists() and not [
        path for path in (known.out / "masks").rglob("*") if path.is_file()
    ]


def test_unwritable_lists_are_named(known, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(UserError, match="/disk/file: the lists cannot be written .No space left"):
        splits.make_split(known, tmp_path / "split", fraction="1/2")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_disk_errors_end_any_command_in_one_line(monkeypatch, capsys, number):
    def run(*_):
        raise OSError(number, os.strerror(number), "/disk/scores.json")

    monkeypatch.setattr(cli, "run", run)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate"])
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and said.startswith("stpp: /disk/scores.json: cannot be written (")
        and said.count("\n") == 1
    )
    monkeypatch.setattr(cli, "run", lambda *_: open("/nowhere/x"))
    with pytest.raises(FileNotFoundError):
        cli.main(["evaluate"])


# --- text files of Windows


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_recipes_and_lists_with_byte_order_marks(known, tmp_path, capsys, encoding):
    recipe = tmp_path / "mine.toml"
    recipe.write_bytes(
        "method = 'st'\r\n[data]\r\nlayout = 'globs'\r\nimages = 'größe/*'\r\n".encode(encoding)
    )
    cli.main(["train", "--recipe", str(recipe), "--print-config"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["method"], shown["data"]["images"]) == ("st", "größe/*")
    path = tmp_path / "list.txt"
    path.write_bytes("photos/0.jpg labels/0.png\r\nphotos/1.jpg\r\n".encode(encoding))
    assert len(splits.read_split(path, known, labelled=True)) == 2


# --- strict runs


def test_strict_run_refuses_a_data_set_with_warnings(known, tmp_path, capsys):
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(known.root / "photos" / "0_mask.png")
    small = (
        "--method supervised --device cpu --model.backbone resnet18 --model.output-stride 32 "
        "--augment.crop-px 33 --augment.long-side "
        "32 64 --train.epochs 1 --train.batch-global 2 --data.fraction 1/1 --data.layout globs "
        "--data.images photos/**/* "
        "--data.masks labels/**/*.png"
    ).split()
    log.set_speaker(True)
    for again in range(2):  # the first command makes the index, the second reads it
        with pytest.raises(SystemExit) as ended:
            cli.main(
                [
                    "train",
                    *small,
                    "--strict",
                    "--data.root",
                    str(known.root),
                    "--data.index",
                    str(known.out),
                    "--out",
                    str(tmp_path / f"run{again}"),
                ]
            )
        assert ended.value.code == 2 and "--strict: skipped" in capsys.readouterr().err
        if not again:
            prepare(known.root)


def test_corrected_file_of_shapes_is_read_again(tmp_path, here, capsys):
    """One file holds the shapes of all images: only one file changed."""
    images = {f"photos/{i}.jpg": [{}] for i in range(3)}
    value = shape_cases.coco(images, {1: "leaf"})
    root = shape_cases.coco_set(tmp_path / "data", value)
    made = shape_cases.prepare(root, layout="coco", masks="annotations.json", unlisted="background")
    path = listed(made, "0", "1")
    assert fresh_index(made.out, path, here).fingerprint == made.fingerprint
    capsys.readouterr()
    value["annotations"][1]["segmentation"] = [[0, 0, 32, 0, 32, 24, 0, 24]]
    (root / "annotations.json").write_text(json.dumps(value))
    fresh = fresh_index(made.out, path, here)
    assert (read_index_mask(fresh.sample("photos/1.jpg").mask) == 1).all()
    assert (read_index_mask(fresh.sample("photos/0.jpg").mask) == shape_cases.square(1)).all()
    assert "1 file of" in (said := capsys.readouterr().err) and "the first: annotations.json" in said


def test_names_of_yolo_in_another_order_are_read_before_scoring(tmp_path, here):
    root = tmp_path / "data"
    photo(root / "images" / "0.jpg")
    (root / "labels").mkdir()
    (root / "labels" / "0.txt").write_text("0 0.1 0.1 0.9 0.1 0.9 0.9\n")
    (root / "data.yaml").write_text("names: [leaf, stem]\n")
    options = {"layout": "yolo", "unlisted": "ignore", "classes": ("leaf", "stem")}
    known = index.prepare(root, tmp_path / "index", progress=False, **options)
    path = tmp_path / "val.txt"
    path.write_text("".join(map(splits.line, known.entries.values())))
    (root / "data.yaml").write_text("names: [stem, leaf]\n")
    before, after = (index.class_pixels([index.sample("images/0.jpg")])[0]
                     for index in (known, fresh_index(known.out, path, here)))
    assert before[0] > 0 and after == before[::-1]
