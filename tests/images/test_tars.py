"""Realistic archives: read completely, or refused with the reason; never read partly without notice."""

import gzip
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import label_cases as cases
from stpp.errors import UserError
from stpp.images import storage, tars
from stpp.images.sources import open_source

FILES = {f"{i:02d}.jpg": bytes([i]) * (100 + 300 * i) for i in range(6)}
LONG = "folder/" * 20 + "n" * 120 + ".jpg"


def archive(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as opened:
        cases.add_to(opened, files)
    return file.getvalue()


def read(path) -> dict[str, bytes]:
    """Returns the bytes of every image in the archive, by name."""
    items = list(open_source(str(path)).items())
    assert all(item.error is None for item in items)
    return {item.source.partition("::")[2]: item.read() for item in items}


def refused(path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_concatenated_archives_are_all_read(tmp_path, kind):
    names, path = list(FILES), tmp_path / "all.tar"
    parts = [archive({name: FILES[name] for name in names[i : i + 2]}, kind) for i in (0, 2, 4)]
    path.write_bytes(b"".join(parts))
    assert read(path) == FILES
    empty = archive({})
    path.write_bytes(empty + parts[0] + empty + bytes(512 * 1400) + parts[1] + parts[2] + bytes(512 * 4000))
    assert read(path) == FILES


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_large_headers_are_read(tmp_path, kind):
    files = FILES | {LONG: b"long", "\u00fc" * 60 + ".jpg": b"not ASCII"}
    (tmp_path / "long.tar").write_bytes(archive(files, kind))
    assert read(tmp_path / "long.tar") == files


def test_global_headers_are_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT,
                      pax_headers={"comment": "of all"}) as opened:
        member = tarfile.TarInfo("x.jpg")
        member.size, member.pax_headers = 3, {"mtime": "1.25", "SCHILY.xattr.user.note": "y" * 2000}
        opened.addfile(member, io.BytesIO(b"abc"))
    assert read(tmp_path / "a.tar") == {"x.jpg": b"abc"}


@settings(deadline=None, max_examples=150)
@given(st.integers(0, len(archive(FILES)) - 1))
def test_archive_truncated_anywhere_is_complete_or_refused(tmp_path_factory, length):
    path, whole = tmp_path_factory.mktemp("cut") / "a.tar", archive(FILES)
    path.write_bytes(whole[:length])
    try:
        assert read(path) == FILES
        assert set(whole[length:]) <= {0}  # only zeros of its end were lost
    except UserError as error:
        assert "incomplete tar archive" in str(error) and "\n" not in str(error)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 5), st.integers(0, 511), st.integers(1, 255))
def test_a_damaged_header_is_refused(tmp_path_factory, number, byte, change):
    """Every byte of a header is in its checksum."""
    path, data = tmp_path_factory.mktemp("damaged") / "a.tar", bytearray(archive(FILES))
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as opened:
        data[opened.getmembers()[number].offset + byte] ^= change
    path.write_bytes(data)
    try:
        found = read(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert found == FILES and 148 <= byte < 156  # except for the checksum's own notation


def test_truncated_and_extended_archives_give_the_reason(tmp_path):
    whole = archive(FILES)
    with tarfile.open(fileobj=io.BytesIO(whole)) as opened:
        third = opened.getmembers()[3].offset
    path = tmp_path / "a.tar"
    assert f"ends after {third} bytes without the zeros" in refused(path, whole[:third])
    assert "'02.jpg' is truncated" in refused(path, whole[: third - 600])
    assert "on are not an archive" in refused(path, whole + b"<html>an error of the server</html>" * 20)
    assert "on are not an archive" in refused(path, whole + b"\x1f\x8b" + bytes(range(256)) * 8)
    assert "without the zeros" in refused(path, whole + archive(FILES)[:third])


@pytest.mark.parametrize(("kind", "magic"), [
    ("bzip2", b"BZh91AY&SY"), ("xz", b"\xfd7zXZ\0\0\4"), ("zstd", b"\x28\xb5\x2f\xfd\4"),
    ("zip", b"PK\3\4\x14\0"), ("gzip", gzip.compress(archive(FILES)))])
def test_compressed_archives_named_tar_are_refused(tmp_path, kind, magic):
    assert f"compressed with {kind}" in refused(tmp_path / "a.tar", magic + bytes(2000))


def test_hard_links_have_the_bytes_of_their_target(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as opened:
        cases.add_to(opened, {"a/x.jpg": b"first", "b.jpg": b"second"})
        for name, target in (("link.jpg", "a/x.jpg"), ("again.jpg", "./b.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, target
            opened.addfile(member)
    assert read(path) == {"a/x.jpg": b"first", "b.jpg": b"second", "link.jpg": b"first",
                          "again.jpg": b"second"}
    with tarfile.open(path, "a") as opened:
        member = tarfile.TarInfo("lost.jpg")
        member.type, member.linkname = tarfile.LNKTYPE, "elsewhere.jpg"
        opened.addfile(member)
    (lost,) = [item for item in open_source(str(path)).items() if item.error]
    assert lost.source == "a.tar::lost.jpg" and "hard link to 'elsewhere.jpg'" in lost.error


def test_sparse_and_special_members_are_bad_images_with_the_reason(tmp_path):
    data = bytearray(archive({"hole.jpg": bytes(1024), "b.jpg": b"next"}, tarfile.GNU_FORMAT))
    header = tarfile.TarInfo("hole.jpg")
    header.size, header.type = 1024, tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT)[:512])
    block[386:410] = b"00000000000\0" + b"00000002000\0"  # one piece: offset 0, 1024 bytes
    block[483:495] = b"00000100000\0"  # of a file of 32 KiB
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    data[:512] = block
    (tmp_path / "a.tar").write_bytes(data)
    found = {item.source: item.error for item in open_source(str(tmp_path / "a.tar")).items()}
    assert "sparse" in found["a.tar::hole.jpg"] and found["a.tar::b.jpg"] is None
    with tarfile.open(tmp_path / "b.tar", "w") as opened:
        for name, kind in (("pipe.jpg", tarfile.FIFOTYPE), ("link.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "x.jpg"
            opened.addfile(member)
    errors = [item.error for item in open_source(str(tmp_path / "b.tar")).items()]
    assert "special file" in errors[0] and "symbolic link" in errors[1]


@pytest.mark.parametrize("repeated", [{"a.jpg": b"2"}, {"b.jpg": b"2"}])
def test_duplicate_names_are_refused(tmp_path, repeated):
    good = {name: cases.encoded(cases.picture(i)) for i, name in enumerate(("a.jpg", "b.jpg"))}
    (tmp_path / "s.tar").write_bytes(archive(good) + archive(repeated))
    with pytest.raises(UserError, match=f"s.tar::{next(iter(repeated))} twice"):
        cases.run(tmp_path / "s.tar", tmp_path / "out")


def test_masks_next_to_images_are_skipped(tmp_path):
    samples = {}
    for i in range(3):
        samples |= {f"a/{i}.jpg": b"image", f"a/{i}.mask.png": b"mask", f"a/{i}.json": b"{}",
                    f"b/{i}.rgb.png": b"image",
                    f"b/{i}.seg.png": b"mask", f"{i}_label.png": b"mask", f"{i}.webp": b"image"}
    (tmp_path / "s.tar").write_bytes(archive(samples))
    source = open_source(str(tmp_path / "s.tar"))
    found = {item.source.partition("::")[2]: item.read() for item in source.items()}
    assert found == {name: data for name, data in samples.items() if data == b"image"}
    assert source.skipped.line() == ("skipped: 3 .json: unsupported formats; "
                                    "9 masks of listed images")


def test_images_named_like_masks_without_image_are_images(tmp_path):
    alone = {"x.seg.png": b"image", "y_mask.jpg": b"image", "left.label.png": b"image"}
    (tmp_path / "s.tar").write_bytes(archive(alone))
    assert read(tmp_path / "s.tar") == alone


def test_archive_of_masks_reads_back(tmp_path):
    written = b"".join(tars.entry(name, data) for name, data in FILES.items()) + tars.END
    (tmp_path / "m.tar").write_bytes(written)
    assert {one.name: storage.read(str(tmp_path / "m.tar"), one.offset, one.bytes)
            for one in tars.members(str(tmp_path / "m.tar"))} == FILES


@pytest.mark.parametrize("name", ["b.jpg", "b/"])
def test_negative_size_never_repeats_a_member(tmp_path, name):
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[148:156] = tarfile.itn(-512, 12, tarfile.GNU_FORMAT), b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    said = refused(tmp_path / "a.tar", tars.entry("a.jpg", b"x" * 10) + bytes(header) + tars.END)
    assert "has a negative size" in said


@pytest.mark.parametrize("headers", [{"GNU.sparse.map": "a,b"}, {"GNU.sparse.size": "x"},
                                     {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"size": "-512"}])
def test_damaged_extended_headers_are_refused(tmp_path, headers):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as opened:
        member = tarfile.TarInfo("a.jpg")
        member.pax_headers = headers
        opened.addfile(member)
    refused(tmp_path / "a.tar", file.getvalue())
