"""Corpora: the images found, their keys, and refused names."""

import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import label_cases as cases
from stpp.errors import UserError
from stpp.images import names, sources, tars
from stpp.images.sources import open_source
from stpp.label import plan
from stpp.label.labels import SampleSource
from stpp.loading.sample import Sample

JPEG = cases.encoded(cases.picture(0))


def keys(source) -> list[str]:
    return [item.key for item in source.items()]


def test_folder_is_walked_in_name_order(tmp_path):
    files = ["b/x.jpg", "a.JPEG", "b.jpg", "c/d/e/f.tiff", "b/.hidden.jpg", ".git/g.jpg", "notes.txt",
             "z.webp", "__MACOSX/m.jpg"]
    cases.as_folder(tmp_path / "in", dict.fromkeys(files, JPEG))
    source = open_source(str(tmp_path / "in"))
    assert keys(source) == ["a", "b/x", "b", "c/d/e/f", "z"]
    assert [item.source for item in source.items()][:2] == ["a.JPEG", "b/x.jpg"]
    assert all(item.read() == JPEG and item.read(10) == JPEG[:10] for item in source.items())


def test_more_names_than_fit_are_sorted_on_disk(tmp_path, monkeypatch):
    cases.as_folder(tmp_path / "in", {f"{i * 7919 % 1000:03d}.jpg": b"" for i in range(50)})
    expected = keys(open_source(str(tmp_path / "in")))
    assert expected == sorted(expected) and len(expected) == 50
    monkeypatch.setattr(sources, "_RUN", 7)
    assert keys(open_source(str(tmp_path / "in"))) == expected


def test_link_to_a_parent_folder_ends(tmp_path):
    cases.as_folder(tmp_path / "in", {"a/x.jpg": JPEG})
    os.symlink(tmp_path / "in", tmp_path / "in" / "a" / "up")
    os.symlink(tmp_path / "nowhere.jpg", tmp_path / "in" / "broken.jpg")
    source = open_source(str(tmp_path / "in"))
    assert keys(source) == ["a/x", "broken"]
    assert source.stamp()["files"] == 2


def test_names_that_are_no_text_are_bad_images(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for name in (b"latin\xe9.jpg", b"line\nbreak.jpg", b"back\\slash.jpg", "ü ß.jpg".encode()):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(JPEG)
    found = {item.source: item.error for item in open_source(str(tmp_path / "in")).items()}
    assert found["ü ß.jpg"] is None
    assert found["latin\\xe9.jpg"] == "its name is not UTF-8"
    assert found["line\\x0abreak.jpg"] == "its name contains a control character"
    assert found["back\\slash.jpg"] == "its name contains a backslash"
    assert open_source(str(tmp_path / "in")).stamp()["files"] == 4


def test_lists_name_images_and_may_name_masks(tmp_path):
    files = ["im/a.jpg", "im/with space.jpg", "im/b.jpg mask.png", "elsewhere/c.png"]
    cases.as_folder(tmp_path / "data", dict.fromkeys(files, JPEG))
    absolute = tmp_path / "data" / "elsewhere" / "c.png"
    listed = tmp_path / "list.txt"
    listed.write_bytes(("\ufeffim/a.jpg\r\n\r\n./im/with space.jpg\nim/b.jpg mask.png\nim/a2.jpg gt/a 2.png\n"
                        f"{absolute}\n../up.jpg\nmemory://bucket/d.jpg\n").encode())
    items = list(open_source(str(listed), root=tmp_path / "data").items())
    assert [item.key for item in items[:5]] == ["im/a", "im/with space", "im/b.jpg mask", "im/a2",
                                                str(absolute)[1:-4]]
    assert items[5].error.startswith("its name leads outside the output ('..'); write paths below one folder")
    assert items[5].source == "../up.jpg"
    assert items[6].key == "bucket/d" and items[6].file == "memory://bucket/d.jpg"
    assert all(item.read() == JPEG for item in items[:3])
    assert items[3].source == "im/a2.jpg"


def test_bad_lines_name_a_remedy_and_repeated_lines_are_skipped(tmp_path):
    cases.as_folder(tmp_path / "data", {"im/a.jpg": JPEG})
    listed = tmp_path / "list.txt"
    lines = ["im\\a.jpg", "./im/a.jpg", "im/a.jpg", ".//im/a.jpg", "im/../im/a.jpg"]
    listed.write_text("\n".join(lines))
    items = list(open_source(str(listed), root=tmp_path / "data").items())
    assert "forward slashes" in items[0].error and "--root" in items[0].error and "--root" in items[4].error
    assert {(item.key, item.source) for item in items[1:4]} == {("im/a", "im/a.jpg")}


@pytest.mark.parametrize(("name", "data", "said"), [
    ("a.zip", b"PK\3\4\x14\0\0\0im/a.jpg", "is a zip archive, not a list of images; unpack it"),
    ("list.txt", b"\x1f\x8b\x08\0im/a.jpg", "is a gzip archive, not a list of images; unpack it"),
    ("a.jpg", JPEG, "is an image; give its folder"),
    ("a.PNG", b"\x89PNG\r\n\x1a\n", "is an image; give its folder"),
    ("a.bin", b"im/a.jpg\nim/\0b.jpg\n", "is not a text file"),
    ("wide.txt", "im/a.jpg\n".encode("utf-16-le"), "not UTF-8 text"),
])
def test_files_that_are_no_lists_are_refused(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: {said}"):
        list(open_source(str(tmp_path / name)).items())


def test_masks_next_to_images_of_a_folder_are_skipped(tmp_path):
    names = ["a/7.JPG", "a/7_mask.png", "a/mask_7.png", "a/7_label.jpg", "a/8_mask.png", "a/9.Jpg",
             "a/9_mask.png", "img_1.webp", "mask_1.PNG", "b/7_mask.png"]
    cases.as_folder(tmp_path / "in", dict.fromkeys(names, JPEG))
    source = open_source(str(tmp_path / "in"))
    assert [item.source for item in source.items()] == ["a/7.JPG", "a/7_label.jpg", "a/8_mask.png",
                                                        "a/9.Jpg", "b/7_mask.png", "img_1.webp"]
    assert source.skipped.masks == 4 and "4 masks of listed images" in source.skipped.line()
    assert source.stamp()["files"] == 6


@pytest.mark.parametrize("kind", ["folder", "tar", "url"])
def test_folders_of_masks_next_to_folders_of_images_are_skipped(tmp_path, kind):
    """A data set given as a corpus: its masks are no photographs, and a folder of that name alone holds no
    masks."""
    images = ["photos/a/7.jpg", "photos/a/8.jpg", "set/9.jpg", "alone/labels/1.png", "labels/a/9.png",
              "labels/b/7.jpg"]
    masks = ["labels/a/7.png", "Masks/a/8.png", "set/annotations/9.png", "photos/a/8_mask.png"]
    files = dict.fromkeys([*images, *masks], JPEG)
    spec = str(tmp_path / "in.tar")
    if kind == "folder":
        spec = str(cases.as_folder(tmp_path / "in", files))
    elif kind == "tar":
        cases.as_tar(tmp_path / "in.tar", files)
    else:
        memory = pytest.importorskip("fsspec").filesystem("memory")
        for name, data in files.items():
            memory.pipe_file(f"/{tmp_path.name}/{name}", data)
        spec = f"memory://{tmp_path.name}"
    source = open_source(spec)
    assert sorted(item.key for item in source.items()) == sorted(name.rpartition(".")[0] for name in images)
    assert source.skipped.masks == 4 and "4 masks of listed images" in source.skipped.line()


def test_tar_members_are_read_in_place(tmp_path):
    one = cases.as_tar(tmp_path / "s-00.tar",
                       {"a/x.jpg": JPEG, "a/x.json": b"{}", "long/" + "n" * 180 + ".jpg": b"12345"})
    cases.as_tar(tmp_path / "s-01.tar", {"./b/y.left.png": b"abc"})
    source = open_source(str(tmp_path / "s-{00..01}.tar"))
    items = list(source.items())
    assert [item.key for item in items] == ["a/x", "long/" + "n" * 180, "b/y.left"]
    assert [item.read() for item in items] == [JPEG, b"12345", b"abc"]
    assert items[0].source == "s-00.tar::a/x.jpg" and items[0].read(4) == JPEG[:4]
    before = source.stamp()
    with tarfile.open(one, "a") as archive:
        archive.addfile(tarfile.TarInfo("new.jpg"))
    assert source.stamp() != before


def test_braces_expand_to_ranges_and_lists():
    assert sources.expand_braces("a{08..11}{x,y}") == [f"a{n}{c}" for n in ("08", "09", "10", "11")
                                                       for c in "xy"]
    assert sources.expand_braces("a{8..10}.tar") == ["a8.tar", "a9.tar", "a10.tar"]
    assert sources.expand_braces("plain") == ["plain"]
    with pytest.raises(UserError, match="ascending"):
        sources.expand_braces("a{9..1}")


HOSTILE = {
    "../up.jpg": "outside", "/etc/cron.d/x.jpg": "absolute", "a/../../b.jpg": "outside",
    "C:evil.jpg": "absolute",
    "c:/windows/x.jpg": "absolute", "..\\win.jpg": "backslash", "new\nline.jpg": "control",
    "tab\there.jpg": "control",
    "nul\x01.jpg": "control", "x.png/y.jpg": "ends in .png", "n" * 300 + ".jpg": "longer than 255",
    "../": None,
    "a/..": None, "d/" * 1500 + "x.jpg": "longer than 2000",
}


@pytest.mark.parametrize("folders", [False, True])
def test_hostile_members_never_leave_the_output(tmp_path, folders):
    named = {name: reason for name, reason in HOSTILE.items() if reason}
    archive = cases.as_tar(tmp_path / "deep" / "in" / "hostile.tar",
                           dict.fromkeys([*named, "good.jpg"], JPEG),
                           links={"link.jpg": "/etc/passwd", "hard.jpg": "good.jpg"})
    out = tmp_path / "deep" / "out"
    before = set(tmp_path.rglob("*"))
    summary = cases.run(archive, out, tar_folders=folders)
    assert (summary.images, summary.bad) == (len(named) + 3, len(named) + 2)
    assert [str(path.relative_to(out)) for path in (out / "masks").rglob("*.png")] == [
        "masks/hostile/good.png" if folders else "masks/good.png"]
    outside = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(out) for path in outside)
    from stpp.label import rows

    failed = {row["source"]: row["error"] for row in rows.read(out / "failed.parquet")}
    for name, reason in named.items():
        assert reason in failed[f"hostile.tar::{names.printable(name)}"]
    assert "link" in failed["hostile.tar::link.jpg"]


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(codec=None), max_size=40) | st.lists(st.sampled_from(
    ["..", ".", "", "a", "b.jpg", "~", "C:", "\\", "c.png", "\0"]), max_size=6).map("/".join))
def test_keys_are_paths_inside_or_refused(name):
    try:
        key = names.mask_key(name)
    except ValueError as error:
        assert name == "" or name not in str(error) or len(name) < 3
        return
    path = os.path.normpath(f"/root/folder/{key}.png")
    assert path.startswith("/root/folder/") and "\\" not in path and path == f"/root/folder/{key}.png"
    key.encode()


def test_collisions_are_refused_with_both_names(tmp_path):
    cases.as_folder(tmp_path / "in", {"a/x.jpg": JPEG, "a/x.png": JPEG, "b.jpg": JPEG})
    with pytest.raises(UserError, match=r"a/x\.jpg and a/x\.png would both be labelled as a/x\.png"):
        cases.run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "run.json").exists()
    for number in (0, 1):
        cases.as_tar(tmp_path / f"{number}.tar", {"same.jpg": JPEG})
    spec = tmp_path / "{0..1}.tar"
    with pytest.raises(UserError, match=r"0\.tar::same\.jpg and 1\.tar::same\.jpg .*--tar-folders"):
        cases.run(spec, tmp_path / "out2")
    assert cases.run(spec, tmp_path / "out2", tar_folders=True).images == 2
    listed = tmp_path / "list.txt"
    listed.write_text("in/b.jpg\nin/./b.jpg\n")
    with pytest.raises(UserError, match="in/b.jpg and in/./b.jpg"):
        cases.run(listed, tmp_path / "out3")


def test_equal_digests_that_end_in_zeros_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "_digest", lambda key: key.encode().ljust(16, b"\0"))
    with names.Collisions(tmp_path) as found:
        for key in ("aa", "ab", "ba", "ab", "a"):
            found.add(key)
        assert found.repeated() == {b"ab".ljust(16, b"\0")}
    assert list(tmp_path.iterdir()) == []
    assert names.first_pair({b"ab".ljust(16, b"\0")},
                            [("aa", "0"), ("ab", "1"), ("ab", "2")]) == ("ab", "1", "2")


def test_missing_and_incomplete_sources_are_refused(tmp_path):
    whole = cases.as_tar(tmp_path / "whole.tar", {"a.jpg": JPEG, "b.jpg": JPEG}).read_bytes()
    (tmp_path / "half.tar").write_bytes(whole[: 512 + len(JPEG) // 2])
    (tmp_path / "damaged.tar").write_bytes(whole[:512 + 1024 * ((len(JPEG) + 1023) // 1024)] + b"x" * 5000)
    (tmp_path / "text.tar").write_text("no archive" * 100)
    (tmp_path / "empty").mkdir()
    for name, words in (("half.tar", "half.tar: incomplete"), ("damaged.tar", "damaged.tar: incomplete"),
                        ("text.tar", "text.tar: incomplete"), ("empty", "no image"),
                        ("absent", "no such folder"), ("absent-{0..3}.tar", "absent-0.tar"),
                        ("a.tar.gz", "compressed"), ("x-{1,2}", "braces"), ("absent.tar", "absent.tar")):
        with pytest.raises(UserError, match=words) as refused:
            cases.run(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(refused.value)
    assert len(list(tars.members(str(tmp_path / "whole.tar")))) == 2


def test_urls_of_folders_lists_and_tars(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    files = cases.good_files(5)
    for name, data in files.items():
        memory.pipe_file(f"/corpus/{name}", data)
    memory.pipe_file("/lists/all.txt",
                     "\n".join(["/".join(["memory:/", "corpus", name]) for name in files]).encode())
    memory.pipe_file("/tars/s-0.tar", cases.as_tar(tmp_path / "s.tar", files).read_bytes())
    expected = cases.as_folder(tmp_path / "local", files)
    cases.run(expected, tmp_path / "out-local")
    masks = {name: digest for name,
             digest in cases.contents(tmp_path / "out-local").items() if name.startswith("masks")}
    assert len(masks) == 5
    for spec, prefix in (("memory://corpus", ""), ("memory://lists/all.txt", "corpus/"),
                         ("memory://tars/s-{0..0}.tar", "")):
        out = tmp_path / spec.replace("/", "_")
        assert cases.run(spec, out).bad == 0
        found = cases.contents(out)
        assert {name: found[name.replace("masks/", f"masks/{prefix}")] for name in masks} == masks
    with pytest.raises(UserError, match="memory://nowhere"):
        open_source("memory://nowhere")
    with pytest.raises(UserError, match="nosuch"):
        open_source("nosuch://bucket/x")


def test_remote_read_is_retried(monkeypatch):
    from stpp.images import storage

    monkeypatch.setattr(storage, "PAUSE_S", 0.0)
    tries = []

    def flaky():
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("reset")
        return b"data"

    assert storage._retried(flaky) == b"data" and len(tries) == 3
    with pytest.raises(OSError, match="gone"):
        storage._retried(lambda: (_ for _ in ()).throw(ValueError("gone")))
    with pytest.raises(FileNotFoundError):
        storage._retried(lambda: open("/nowhere/at/all"))


def test_samples_are_ordered_by_size():
    samples = [Sample(key=f"k{i}", image=f"/x/k{i}.jpg", width=w, height=h) for i,
               (w, h) in enumerate([(9, 5), (4, 4), (9, 5)])]
    source = SampleSource(samples, ["l0\n", "l1\n", "l2\n"])
    assert [(item.key, item.source) for item in source.items()] == [("k1", "l1"), ("k0", "l0"), ("k2", "l2")]


def test_shard_of_few_images_is_small(tmp_path):
    cases.as_folder(tmp_path / "in", {f"{i:03d}.jpg": b"" for i in range(100)})
    made = plan.make(open_source(str(tmp_path / "in")), tmp_path / "plan", shard_size=0)
    assert made == {"items": 100, "shards": 7, "shard_size": 15}
    made = plan.make(open_source(str(tmp_path / "in")), tmp_path / "plan2", shard_size=30)
    assert made == {"items": 100, "shards": 4, "shard_size": 30}
