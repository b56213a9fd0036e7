"""Messages and exit codes of `stpp label` and `stpp predict` for faults of input or output."""

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

import engine_cases
import label_cases as cases
from cli_cases import ended
from stpp import checkpoint, files, outputs
from stpp.images import masks
from stpp.inference import predictors

CLASSES = list("abcd")


@pytest.fixture(autouse=True)
def threads():
    """Restores the number of threads, which commands set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def label(monkeypatch, capsys, tmp_path):
    """`stpp label` with a teacher that needs no network: (exit code, standard output, standard error)."""
    ready = predictors.already_open(cases.Tiny(), identity="tiny")
    monkeypatch.setattr(predictors, "from_paths", lambda paths, device, **_: ready)

    def call(source, out, *more) -> tuple[int, str, str]:
        return ended(capsys, "label", "--teacher", str(Path(__file__).parent), "--source", str(source),
                     "--out", str(out), "--tta", "none", "--device", "cpu", "--compute-threads", "1",
                     "--threads", "1",
                     "--loader", "reference", *more)

    return call


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    network = engine_cases.model("deeplabv3plus", seed=1, classes=len(CLASSES))
    checkpoint.save(path, model=network.state_dict(), classes=CLASSES,
                    architecture={"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16})
    return path


@pytest.fixture
def predict(best, capsys):
    def call(source, out) -> tuple[int, str, str]:
        return ended(capsys, "predict", str(source), "--checkpoint", str(best), "--out", str(out),
                     "--device", "cpu", "--precision", "fp32")

    return call


def last_line(errors: str) -> str:
    """Returns the line that reports the fault."""
    (line,) = [line for line in errors.splitlines() if line.startswith("stpp: ")]
    return line


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_first_reasons_of_bad_images_are_printed(label, tmp_path):
    bad = {f"{i}.jpg": b"no image" for i in range(7)}
    source = cases.as_folder(tmp_path / "in", cases.good_files(3) | bad)
    code, _, errors = label(source, tmp_path / "out")
    assert code == 1 and "7 of 10 images are bad" in last_line(errors)
    assert "the first: 0.jpg: not one of the formats" in last_line(errors)
    assert errors.count("no mask: ") == 6 and "no mask: 2 more" in errors
    code, _, errors = label(source, tmp_path / "out", "--max-bad-fraction", "1")
    assert code == 0 and "no mask: 0.jpg: not one of the formats" in errors


@pytest.mark.parametrize(("form", "reason"), [
    ("sub\\{}", "backslash"), ('"{}"', "is quoted"), ("{},m.png", "not tables"), ("../in/{}", "outside")])
def test_reason_is_printed_for_every_form_of_list(label, tmp_path, form, reason):
    source = cases.as_folder(tmp_path / "in", {"a.jpg": cases.encoded(cases.picture(1))})
    (source / "list.txt").write_text(form.format("a.jpg") + "\n")
    code, _, errors = label(source / "list.txt", tmp_path / "out")
    assert code == 1 and reason in last_line(errors)


def test_predict_reports_skipped_files_and_failed_images(predict, tmp_path):
    source = cases.as_folder(tmp_path / "in", {
        "a.jpg": cases.encoded(cases.picture(1)), "b.jpg": b"", "c.HEIC": b"",
        "d.jfif": cases.encoded(cases.picture(2)), "@eaDir/a.jpg/x.jpg": b""})
    code, output, errors = predict(source, tmp_path / "out")
    assert code == 2 and "2 masks" in output and "b.jpg: the file is empty" in last_line(errors)
    assert "skipped: 1 .heic: unsupported formats; 1 @eaDir" in errors


def test_read_only_output_is_reported_in_one_line(label, predict, tmp_path):
    source = cases.as_folder(tmp_path / "in", cases.good_files(2))
    with mounted(tmp_path / "disk", "size=300k,ro") as disk:
        for command in (label, predict):
            code, _, errors = command(source, disk / "out")
            assert code == 2 and "Read-only file system" in last_line(errors) and str(disk / "out") in errors
    (tmp_path / "file").write_text("")
    for command in (label, predict):
        code, _, errors = command(source, tmp_path / "file" / "out")
        assert code == 2 and "--out" in last_line(errors) and "None" not in errors


def test_predict_on_a_full_disk_leaves_no_partial_picture(predict, tmp_path):
    images = {f"{i:02d}.jpg": cases.encoded(cases.picture(i, (200, 300))) for i in range(12)}
    source = cases.as_folder(tmp_path / "in", images)
    with mounted(tmp_path / "disk", "size=160k") as disk:
        code, _, errors = predict(source, disk / "out")
        assert code == 2 and "No space left on device" in last_line(errors) and "(None)" not in errors
        written = [path for path in (disk / "out").rglob("*") if path.is_file()]
        assert all(path.suffix in (".png", ".json") or path.name == outputs.MARK for path in written)
        pictures = [path for path in written if path.suffix == ".png"]
        assert pictures
        for path in pictures:
            with Image.open(path) as image:
                image.load()


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_failed_write_of_predict_leaves_only_complete_files(predict, tmp_path, monkeypatch, call):
    """Of the masks and overlays of two images, the given one fails after half its bytes."""
    images = {f"{i}.png": cases.encoded(cases.picture(i), "PNG") for i in range(2)}
    source, count, save = cases.as_folder(tmp_path / "in", images), [0], Image.Image.save

    def breaking(self, file, *args, **kwargs):
        count[0] += 1
        save(self, file, *args, **kwargs)
        if count[0] == call:
            file.truncate(file.tell() // 2)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(masks.Image.Image, "save", breaking)
    code, _, errors = predict(source, tmp_path / "out")
    assert code == 2 and "Input/output error" in last_line(errors) and "None" not in errors
    monkeypatch.undo()
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()
            and path.name not in ("classes.json", outputs.MARK)]
    assert len(left) == call - 1
    for path in left:
        with Image.open(path) as image:
            image.load()


def test_reason_of_a_failed_write_is_never_none():
    assert files.describe_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) == "No space left on device"
    assert files.describe_error(
        OSError(errno.EROFS, os.strerror(errno.EROFS), "/out/x")) == "Read-only file system (/out/x)"
    assert files.describe_error(OSError("broken\npipe")) == "broken pipe"
    assert files.describe_error(OSError()) == "OSError"
