"""Realistic folders and lists: files read, files skipped and counted, and refusals."""

import os
import subprocess
import sys

import pytest

import label_cases as cases
from stpp.errors import UserError
from stpp.images.sources import FolderSource, TarSource, open_source

JPEG = cases.encoded(cases.picture(0))


def names(source) -> list[str]:
    return [item.source for item in source.items()]


def test_leftovers_are_skipped_and_counted(tmp_path):
    kept = ["IMG_0.jpg", "trip/IMG_1.jpg", "recycle/IMG_2.jpg", "Icons/a.jpg"]
    left = ["@eaDir/IMG_0.jpg/SYNOPHOTO_THUMB_XL.jpg", "trip/@eaDir/x.jpg", "#recycle/gone.jpg",
            "$RECYCLE.BIN/$R1.jpg", "#snapshot/x.jpg", "trip/Thumbs.db", "desktop.ini",
            ".Trash-1000/files/x.jpg",
            "._IMG_0.jpg", "Icon\r"]
    folder = cases.as_folder(tmp_path / "in", dict.fromkeys(kept + left, JPEG))
    source = open_source(str(folder))
    assert sorted(names(source)) == sorted(kept)
    line = source.skipped.line()
    for words in ("2 @eaDir", "1 #recycle", "1 $RECYCLE.BIN", "1 #snapshot", "1 Thumbs.db", "1 desktop.ini",
                  "1 ._*", "1 Icon", "1 hidden"):
        assert words in line, line
    assert source.stamp()["files"] == 4
    archive = cases.as_tar(tmp_path / "s.tar", dict.fromkeys(kept + left, JPEG))
    source = open_source(str(archive))
    assert sorted(names(source)) == sorted(f"s.tar::{name}" for name in kept)
    assert "2 @eaDir" in source.skipped.line()


def test_unsupported_formats_are_counted_by_extension(tmp_path):
    others = ["a.HEIC", "b.heic", "c.avif", "d.gif", "e.jp2", "noext", "f.JSON"]
    read = ["1.jfif", "2.JPE", "3.pgm", "4.Jpeg", "5.TIF"]
    folder = cases.as_folder(tmp_path / "in", dict.fromkeys(others + read, JPEG))
    source = open_source(str(folder))
    assert names(source) == sorted(read)
    for words in ("2 .heic", "1 .avif", "1 .gif", "1 .jp2", "1 without an extension", "1 .json",
                  "unsupported formats"):
        assert words in source.skipped.line()
    assert open_source(str(cases.as_folder(tmp_path / "plain", {"x.jpg": JPEG}))).skipped.line() is None


def test_folder_without_images_lists_its_contents(tmp_path):
    folder = cases.as_folder(tmp_path / "in", {"a.heic": b"", "b.heic": b""})
    with pytest.raises(UserError, match=r"contains no image \(skipped: 2 \.heic"):
        cases.run(folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["shots {1,2} [x]", "{000..127}.tar", "photos.tar", "old.tar.gz",
                                  "lists{a,b}.txt"])
def test_existing_folder_is_a_folder_whatever_its_name(tmp_path, name):
    cases.as_folder(tmp_path / name, {"a.jpg": JPEG})
    source = open_source(str(tmp_path / name))
    assert isinstance(source, FolderSource) and names(source) == ["a.jpg"]
    assert cases.run(tmp_path / name, tmp_path / "out").images == 1


def test_archive_with_braces_in_its_name_is_found(tmp_path):
    cases.as_tar(tmp_path / "x{1,2}.tar", {"a.jpg": JPEG})
    source = open_source(str(tmp_path / "x{1,2}.tar"))
    assert isinstance(source, TarSource) and names(source) == ["x{1,2}.tar::a.jpg"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_in_any_encoding_with_a_mark(tmp_path, encoding, end):
    listed = ["a.jpg", "b c.jpg", "\u00e9\u20ac.jpg", "sub/x.jpg y.jpg"]
    folder = cases.as_folder(tmp_path / "in", dict.fromkeys(listed, JPEG))
    (folder / "list.txt").write_bytes(end.join(listed).encode(encoding))
    source = open_source(str(folder / "list.txt"))
    assert names(source) == listed and all(item.read() == JPEG for item in source.items())


@pytest.mark.parametrize("data", ["a.jpg\nb.jpg\n".encode("utf-16-be"), b"\xff\xfea\0\x00\xd8\n"])
def test_lists_that_are_no_text_are_refused_in_one_line(tmp_path, data):
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(UserError, match="UTF-8") as refused:
        names(open_source(str(tmp_path / "list.txt")))
    assert "\n" not in str(refused.value)


def test_masks_after_images_with_spaces_in_their_names(tmp_path):
    folder = cases.as_folder(tmp_path, {"i/x.jpg y.jpg": JPEG, "i/plain.png": JPEG, "i/two words.jpe": JPEG})
    (folder / "list.txt").write_text("i/x.jpg y.jpg m/x.jpg y.png\ni/plain.png m/plain.png\n"
                                     "i/two words.jpe m/two words.png\ni/absent one.jpg m/absent one.png\n")
    source = open_source(str(folder / "list.txt"))
    assert names(source) == ["i/x.jpg y.jpg", "i/plain.png", "i/two words.jpe", "i/absent one.jpg"]


@pytest.mark.parametrize(("line", "reason"), [
    ("image,mask", "not tables"), ("a.jpg,m/a.png", "not tables"), ("a.jpg;1", "not tables"),
    ('"a.jpg"', "is quoted"), ("'a b.jpg'", "is quoted"), ("sub\\a.jpg", "backslash"),
    ("../up.jpg", "outside")])
def test_malformed_lines_are_bad_images_with_the_reason(tmp_path, line, reason):
    cases.as_folder(tmp_path, {"a.jpg": JPEG, "b.jpg": JPEG})
    (tmp_path / "list.txt").write_text(f"{line}\nb.jpg\n")
    bad, good = open_source(str(tmp_path / "list.txt")).items()
    assert reason in bad.error and good.error is None


def test_quotes_and_commas_are_accepted_in_existing_names(tmp_path):
    odd = ["a, b.jpg", '"quoted".jpg', "x;y.jpg"]
    cases.as_folder(tmp_path, dict.fromkeys(odd, JPEG))
    (tmp_path / "list.txt").write_text("\n".join(odd))
    assert [item.error for item in open_source(str(tmp_path / "list.txt")).items()] == [None] * 3


def test_repeated_lines_are_dropped_and_counted(tmp_path, capsys):
    folder = cases.as_folder(tmp_path / "in", cases.good_files(7))
    listed = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    lines = [*listed, listed[0], listed[3] + " m/x.png", listed[0], "no.jpg", "no.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    summary = cases.run(tmp_path / "list.txt", tmp_path / "out", root=folder)
    assert (summary.images, summary.bad) == (8, 1)
    assert "4 repeated lines" in capsys.readouterr().err


def test_unreadable_folder_is_refused(tmp_path, monkeypatch):
    folder = cases.as_folder(tmp_path / "in", {"a.jpg": JPEG, "closed/b.jpg": JPEG})
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="in/closed: cannot be read .*be missing"):
        names(open_source(str(folder)))


@pytest.mark.parametrize("kind", ["folder", "list", "tar"])
def test_names_that_the_locale_cannot_read_are_refused_in_one_line(tmp_path, kind):
    folder = cases.as_folder(tmp_path / "in", {"for\u00eat.jpg": JPEG})
    spec = {"folder": folder, "list": tmp_path / "list.txt", "tar": tmp_path / "s.tar"}[kind]
    (tmp_path / "list.txt").write_text("in/for\u00eat.jpg", encoding="utf-8")
    cases.as_tar(tmp_path / "s.tar", {"for\u00eat.jpg": JPEG})
    code = f"from stpp.images.sources import open_source; list(open_source({str(spec)!r}).items())"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | plain, capture_output=True)
    assert b"UserError" in done.stderr and b"PYTHONUTF8=1" in done.stderr.splitlines()[-1], done.stderr
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"LC_ALL": "C"}, capture_output=True)
    assert done.returncode == 0, done.stderr
