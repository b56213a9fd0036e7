"""A corpus that grew, changed or shrank after labelling: reports, relabelled images, and kept labels."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import label_cases as cases
from conftest import torchrun
from stpp.config import DataConfig, LabelConfig
from stpp.errors import UserError
from stpp.images.sources import open_source
from stpp.inference.predictors import OpenedPredictor, already_open
from stpp.label import changes, reliability, rows, update
from stpp.label.assignment import Assignment
from stpp.label.labels import label_corpus

FAULTS = Path(__file__).parents[1] / "faults"
OUTPUTS = ("png", "tar")


@pytest.fixture
def source(tmp_path) -> Path:
    """Writes twelve good images and a bad one, with old modification times."""
    folder = cases.as_folder(tmp_path / "in", cases.good_files() | {"bad.jpg": b"no image"})
    for path in folder.rglob("*.jpg"):
        os.utime(path, (1_000_000, 1_000_000))
    return folder


def label(source, out: Path, **options):
    """Returns the summary, and the number of images the network saw."""
    teacher = cases.Tiny()
    return cases.run(source, out, teacher=teacher, **{"tta": "none"} | options), teacher.seen


def masks(out: Path) -> dict[str, bytes]:
    """Returns the bytes of every mask by its key, from files or archives; no key may occur twice."""
    paths = (out / "masks").rglob("*.png")
    found = {str(path.relative_to(out / "masks")): path.read_bytes() for path in paths}
    for path in (out / "masks").glob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive:
                assert member.name not in found
                found[member.name] = archive.extractfile(member).read()
    return found


def keys(out: Path) -> list[str]:
    return sorted(row["key"] for row in rows.read_parts(out, "labels"))


def change(folder: Path) -> None:
    """Adds three images, changes two (one in size), spoils one, removes two, and touches one."""
    new = {f"three/new{i}.jpg": cases.encoded(cases.picture(50 + i)) for i in range(3)}
    new["one/image000.jpg"] = cases.encoded(cases.picture(60, cases.SIZES[0]))
    new["two/deep/image001.jpg"] = cases.encoded(cases.picture(61, (30, 34)))
    new["one/image002.jpg"] = b"broken"
    cases.as_folder(folder, new)
    (folder / "one/image004.jpg").unlink()
    (folder / "two/deep/image011.jpg").unlink()
    os.utime(folder / "one/image006.jpg")


@pytest.mark.parametrize("output", OUTPUTS)
def test_update_gives_the_labels_of_the_current_corpus(source, tmp_path, output):
    out = tmp_path / "out"
    label(source, out, output=output)
    kept = {name: data for name, data in masks(out).items() if "image000" not in name}
    change(source)
    summary, seen = label(source, out, output=output, update=True)
    assert seen == 5 and summary.labelled == 6 and (summary.images, summary.bad) == (14, 2)
    there = [str(path.relative_to(source)).removesuffix(".jpg") for path in source.rglob("*.jpg")]
    assert keys(out) == sorted(there)
    cases.run(source, tmp_path / "fresh", tta="none", output=output)
    expected = masks(tmp_path / "fresh")
    assert masks(out) == expected
    assert sum(kept.get(name) == data for name, data in expected.items()) == 7
    total, fresh = (json.loads((one / "summary.json").read_text()) for one in (out, tmp_path / "fresh"))
    assert total["mean"] == pytest.approx(fresh["mean"])
    assert total | {"mean": 0} == fresh | {"mean": 0}
    failed, fresh = ({row["key"]: row["error"] for row in rows.read(one / "failed.parquet")}
                     for one in (out, tmp_path / "fresh"))
    assert failed == fresh and failed.keys() == {"bad", "one/image002"}


@pytest.mark.parametrize("output", OUTPUTS)
def test_after_an_update_nothing_is_pending_or_damaged(source, tmp_path, output):
    out = tmp_path / "out"
    label(source, out, output=output)
    change(source)
    label(source, out, output=output, update=True)
    before = cases.contents(out)
    summary, seen = label(source, out, output=output, verify=True)
    assert seen == 0 and summary.redone == () and cases.contents(out) == before
    summary, seen = label(source, out, output=output, update=True)
    assert seen == 0 and cases.contents(out) == before
    assert not (out / "plan" / "update.json").exists() and not (out / "plan" / "update.parquet").exists()
    # A damaged shard is labelled again without the deleted images.
    (out / "labels" / "part-000000.parquet").write_bytes(b"")
    label(source, out, output=output, verify=True)
    assert cases.contents(out) == before


def test_without_update_changes_are_reported_and_files_kept(source, tmp_path):
    out = tmp_path / "out"
    label(source, out)
    change(source)
    before = cases.contents(out)
    with pytest.raises(UserError) as refused:
        label(source, out)
    text = str(refused.value)
    assert "3 new (three/new0.jpg, three/new1.jpg, three/new2.jpg)" in text
    assert "--update" in text and "\n" not in text
    assert "3 changed (one/image000.jpg, one/image002.jpg, two/deep/image001.jpg)" in text
    assert "2 gone (one/image004.jpg, two/deep/image011.jpg)" in text
    assert cases.contents(out) == before


@pytest.mark.parametrize("updated", [False, True])
def test_touched_files_are_not_relabelled(source, tmp_path, capsys, updated):
    out = tmp_path / "out"
    label(source, out)
    before = cases.contents(out)
    for path in source.rglob("*.jpg"):
        os.utime(path)
    summary, seen = label(source, out, update=updated)
    assert seen == 0 and summary.images == 13
    assert "files were touched, but their content is unchanged: 13" in capsys.readouterr().err
    changed = {name for name, digest in cases.contents(out).items() if before[name] != digest}
    assert all(name == "run.json" or name.startswith("plan/listing") for name in changed)
    label(source, out)
    assert "touched" not in capsys.readouterr().err  # the new times are stored now


def test_equal_size_with_other_bytes_is_a_change(tmp_path):
    pictures = [cases.encoded(cases.picture(seed), "BMP") for seed in (1, 2)]
    assert len(pictures[0]) == len(pictures[1])
    source = cases.as_folder(tmp_path / "in", {"a.bmp": pictures[0], "b.bmp": pictures[0]})
    out = tmp_path / "out"
    label(source, out)
    (source / "a.bmp").write_bytes(pictures[1])
    with pytest.raises(UserError, match=r"1 changed \(a\.bmp\)"):
        label(source, out)
    assert label(source, out, update=True)[1] == 1


def test_repaired_image_is_labelled(source, tmp_path):
    out = tmp_path / "out"
    label(source, out)
    (source / "bad.jpg").write_bytes(cases.encoded(cases.picture(3)))
    summary, seen = label(source, out, update=True)
    assert seen == 1 and summary.bad == 0 and "bad.png" in masks(out)
    assert rows.read(out / "failed.parquet") == []


def test_image_with_another_extension_replaces_its_mask(source, tmp_path):
    out = tmp_path / "out"
    label(source, out)
    (source / "one/image000.jpg").unlink()
    (source / "one/image000.png").write_bytes(cases.encoded(cases.picture(8), "PNG"))
    summary, seen = label(source, out, update=True)
    assert seen == 1 and summary.images == 13
    found = {row["key"]: row["source"] for row in rows.read_parts(out, "labels")}
    assert found["one/image000"] == "one/image000.png" and len(found) == 13


def test_names_that_collide_after_growth_are_refused(source, tmp_path):
    out = tmp_path / "out"
    label(source, out)
    before = cases.contents(out)
    (source / "one/image000.png").write_bytes(cases.encoded(cases.picture(8), "PNG"))
    for updated in (False, True):
        with pytest.raises(UserError, match=r"one/image000\.jpg and one/image000\.png would both"):
            label(source, out, update=updated)
    assert cases.contents(out).items() >= before.items()


def test_images_changed_before_their_shard_are_read_as_they_are(source, tmp_path):
    out = tmp_path / "out"
    label(source, out)
    for shard in (1, 2):  # as if it had been interrupted there, while its plan was made
        (out / "shards" / f"{shard:06d}.done.json").unlink()
    names = [item["source"] for item in rows.read(out / "plan" / "listing-000001.parquet")]
    (source / names[0]).write_bytes(cases.encoded(cases.picture(77, (20, 28))))
    (source / names[1]).write_bytes(b"broken")
    summary, seen = label(source, out)  # no label is outdated, so this needs no flag
    cases.run(source, tmp_path / "fresh", tta="none")
    assert masks(out) == masks(tmp_path / "fresh") and summary.bad == 2


def test_unfinished_labelling_is_updated(source, tmp_path):
    out = tmp_path / "out"
    label(source, out)
    (out / "shards" / "000001.done.json").unlink()
    (out / "summary.json").unlink()
    change(source)
    label(source, out, update=True)
    cases.run(source, tmp_path / "fresh", tta="none")
    assert masks(out) == masks(tmp_path / "fresh") and keys(out) == keys(tmp_path / "fresh")


def test_all_images_of_a_shard_may_be_deleted(source, tmp_path):
    out = tmp_path / "out"
    label(source, out, output="tar")
    for row in rows.read(out / "labels" / "part-000001.parquet"):
        (source / row["source"]).unlink()
    summary, seen = label(source, out, output="tar", update=True)
    assert seen == 0 and summary.images == 8 and len(masks(out)) == 7
    shutil.rmtree(source)
    source.mkdir()
    with pytest.raises(UserError, match="no image"):
        label(source, out, output="tar", update=True)


def test_archives_that_grew_and_were_added(tmp_path):
    files = cases.good_files(8)
    names = list(files)
    cases.as_tar(tmp_path / "s-0.tar", {name: files[name] for name in names[:3]})
    out = tmp_path / "out"
    label(tmp_path / "s-{0..0}.tar", out)
    with tarfile.open(tmp_path / "s-0.tar", "a") as archive:
        cases.add_to(archive, {names[3]: files[names[3]]})
    cases.as_tar(tmp_path / "s-1.tar", {name: files[name] for name in names[4:]})
    with pytest.raises(UserError, match=r"5 new \(s-0\.tar::"):
        label(tmp_path / "s-{0..1}.tar", out)
    summary, seen = label(tmp_path / "s-{0..1}.tar", out, update=True)
    assert seen == 5 and summary.images == 8
    # The same members in another order: new places, nothing to label; and they are found there.
    cases.as_tar(tmp_path / "s-0.tar", {name: files[name] for name in reversed(names[:4])})
    assert label(tmp_path / "s-{0..1}.tar", out)[1] == 0
    (out / "masks" / f"{names[0].removesuffix('.jpg')}.png").unlink()
    before = masks(out)
    label(tmp_path / "s-{0..1}.tar", out, verify=True)
    cases.run(tmp_path / "s-{0..1}.tar", tmp_path / "fresh", tta="none")
    assert masks(out) == masks(tmp_path / "fresh") and len(before) == 7


def test_duplicate_name_in_a_grown_archive_is_refused(tmp_path):
    files, out = cases.good_files(4), tmp_path / "out"
    path = cases.as_tar(tmp_path / "s.tar", files)
    label(path, out)
    for name in (next(iter(files)), "new.jpg"):
        with tarfile.open(path, "a") as archive:
            for seed in (8, 9):
                cases.add_to(archive, {name: cases.encoded(cases.picture(seed))})
        for updated in (False, True):
            with pytest.raises(UserError, match="twice"):
                label(path, out, update=updated)
        cases.as_tar(path, files)


def test_list_that_grew_with_a_changed_image(source, tmp_path):
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*.jpg"))
    listed.write_text("\n".join(["late.jpg", *names[:6]]))
    summary, _ = label(listed, out, root=source)
    assert summary.bad == 2  # bad.jpg, and late.jpg is missing
    (source / "late.jpg").write_bytes(cases.encoded(cases.picture(4)))
    (source / names[1]).write_bytes(cases.encoded(cases.picture(5)))
    listed.write_text("\n".join(["late.jpg", *names[:8], names[7]]))
    with pytest.raises(UserError, match=r"2 new .*2 changed \(late\.jpg, "):
        label(listed, out, root=source)
    summary, seen = label(listed, out, root=source, update=True)
    assert seen == 4 and summary.images == 9
    cases.run(listed, tmp_path / "fresh", tta="none", root=source)
    assert masks(out) == masks(tmp_path / "fresh")


def test_labelling_of_the_previous_version_resumes_or_is_refused(source, tmp_path):
    out = tmp_path / "out"
    label(source, out)
    for path in (out / "plan").glob("listing-*.parquet"):
        rows.write(path, rows.read(path), rows.PLACE)
    for path in (out / "labels").glob("*.parquet"):
        before = {name: kind for name, kind in rows.LABELS.items() if name != "image_hash"}
        rows.write(path, rows.read(path), before)
    listing = json.loads((out / "plan" / "listing.json").read_text())
    del listing["marks"]
    (out / "plan" / "listing.json").write_text(json.dumps(listing))
    begun = json.loads((out / "run.json").read_text())
    begun["fingerprint"]["cut"]["pad_to"] = 0
    (out / "run.json").write_text(json.dumps(begun))
    (out / "shards" / "000001.done.json").unlink()
    assert label(source, out)[1] == 5
    (source / "new.jpg").write_bytes(cases.encoded(cases.picture(1)))
    for updated in (False, True):
        with pytest.raises(UserError, match="source.files: 13 -> 14"):
            label(source, out, update=updated)
    begun["fingerprint"]["cut"]["pad_to"] = 32
    (out / "run.json").write_text(json.dumps(begun))
    (source / "new.jpg").unlink()
    with pytest.raises(UserError, match="cut.pad_to: 32 -> None"):
        label(source, out)


def test_memory_of_a_comparison_does_not_grow_with_the_corpus(source, tmp_path, monkeypatch):
    """Equal places meet in one bucket, and only one bucket at a time is in memory."""
    monkeypatch.setattr(changes, "_BUCKETS", 3)
    out = tmp_path / "out"
    label(source, out)
    change(source)
    summary, seen = label(source, out, update=True)
    assert seen == 5 and summary.images == 14


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_update_killed_at_every_commit_ends_the_same(tmp_path, output):
    source = cases.as_folder(tmp_path / "in", cases.good_files(5) | {"bad.jpg": b""})
    label(source, tmp_path / "before", output=output, shard_size=4)
    cases.as_folder(source, {"new.jpg": cases.encoded(cases.picture(50)),
                             "one/image000.jpg": cases.encoded(cases.picture(60, (30, 34)))})
    (source / "two/deep/image001.jpg").unlink()
    os.utime(source / "one/image002.jpg")
    report = tmp_path / "report.json"
    done = subprocess.run([sys.executable, FAULTS / "label_killed.py", source, tmp_path / "out", output,
                           report, tmp_path / "before"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    commits = [kill["before"] for kill in found]
    for commit in ("replace update.parquet", "replace update.json", "replace listing-000000.parquet",
                   "replace part-000000.parquet", "replace 000000.done.json", "replace listing.json",
                   "replace run.json",
                   "unlink update.json", "unlink update.parquet", "replace listing-000002.parquet",
                   "replace 000002.done.json", "replace summary.json"):
        assert commit in commits, commits
    assert [kill["before"] for kill in found if not kill["same"]] == []
    expected = ["bad", "new", "one/image000", "one/image002", "one/image004", "two/deep/image003"]
    assert all(kill["keys"] == expected for kill in found)
    assert max(kill["recomputed"] for kill in found) == 2  # never an image whose mask was valid


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_update_like_one(source, tmp_path):
    rank = str(FAULTS / "label_rank.py")

    def command(out: Path, *more: str) -> list[str]:
        return [rank, "none", "", "0", "", "label", "--teacher", str(FAULTS), "--source", str(source),
                "--out", str(out), "--tta",
                "none", "--shard-size", "4", "--device", "cpu", "--compute-threads", "1", "--threads", "1",
                "--loader",
                "reference", "--max-bad-fraction", "0.5", *more]

    for out in ("one", "two"):
        done = subprocess.run([sys.executable, *command(tmp_path / out)], capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == 0, done.stderr
    change(source)
    refused = torchrun(2, *command(tmp_path / "two"))
    assert refused.returncode != 0 and "3 new (three/new0.jpg" in refused.stderr
    assert len([line for line in refused.stderr.splitlines() if line.startswith("stpp: ")]) == 1
    done = subprocess.run([sys.executable, *command(tmp_path / "one", "--update")], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    done = torchrun(2, *command(tmp_path / "two", "--update"))
    assert done.returncode == 0, done.stderr
    assert cases.contents(tmp_path / "one") == cases.contents(tmp_path / "two")


def test_committed_update_is_carried_out_by_any_call(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    label(source, out)
    change(source)
    with monkeypatch.context() as patched:
        patched.setattr(update, "finish", lambda out, table: None)
        with pytest.raises(UserError):
            label(source, out)
        label(source, out, update=True)  # committed, not carried out
    assert (out / "plan" / "update.json").exists()
    summary, seen = label(source, out)
    assert seen == 5 and summary.images == 14


def test_selection_is_updated_like_labels(source, tmp_path):
    def select(out: Path, *, updated: bool = False):
        teachers = [cases.Tiny(), cases.Tiny()]
        noise = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        # scores differ, so that no order of ties matters
        teachers[0]._weight = teachers[0]._weight + 0.3 * noise
        task = Assignment(source=open_source(str(source)), out=out,
                          config=LabelConfig(batch_per_rank=3, shard_size=4),
                          data=DataConfig(threads=1, loader="reference"), table="scores", update=updated)
        opener = already_open(*teachers, identity="two")
        return reliability.select_corpus(opener, task, cases.HERE), teachers[0].seen

    out = tmp_path / "out"
    select(out)
    change(source)
    with pytest.raises(UserError, match="--update"):
        select(out)
    summary, seen = select(out, updated=True)
    assert seen == 5 and (summary.images, summary.bad) == (14, 2)
    select(tmp_path / "fresh")
    found, fresh = ({row["key"]: row for row in rows.read(one / "reliability.parquet")}
                    for one in (out, tmp_path / "fresh"))
    assert found == fresh and len({row["reliability"] for row in found.values()}) == 12
    lists = [[sorted((one / name).read_text().splitlines())
              for name in ("reliable_ids.txt", "unreliable_ids.txt")]
             for one in (out, tmp_path / "fresh")]
    assert lists[0] == lists[1]


def recorded(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


@pytest.mark.parametrize("touched_only", [True, False])
def test_class_names_and_the_first_number_of_images_outlive_an_update(source, tmp_path, touched_only):
    """The predictor is chosen by the number of images: another choice would be another run."""
    out, classes = tmp_path / "out", ("a", "b", "c", "d")
    label(source, out, classes=classes)
    if touched_only:
        os.utime(source / "one/image000.jpg")
        label(source, out, classes=classes)
    else:
        change(source)
        label(source, out, classes=classes, update=True)
        assert recorded(out)["plan"]["items"] == 14
    assert recorded(out)["classes"] == list(classes) and recorded(out)["planned_for"] == 13
    asked = []
    config = LabelConfig(tta="none", batch_per_rank=3, shard_size=5, max_pixels=1 << 20)
    task = Assignment(source=open_source(str(source)), out=out, config=config,
                      data=DataConfig(threads=1, loader="reference"))
    label_corpus(lambda images: asked.append(images) or
                 [OpenedPredictor(network=cases.Tiny(), identity="tiny")], task, cases.HERE)
    assert asked == [13]


def test_update_with_another_teacher_removes_nothing(source, tmp_path):
    out = tmp_path / "out"
    label(source, out)
    before = cases.contents(out)
    change(source)
    with pytest.raises(UserError, match="holds masks of another run .*teacher"):
        label(source, out, update=True, identity="other")
    after = cases.contents(out)
    assert {name: after.get(name) for name in before if not name.startswith("plan/")} == {
        name: digest for name, digest in before.items() if not name.startswith("plan/")}
    label(source, out, update=True)
    cases.run(source, tmp_path / "fresh", tta="none")
    assert masks(out) == masks(tmp_path / "fresh")


def test_touched_images_with_bad_names_are_no_change(tmp_path):
    folder = cases.as_folder(tmp_path / "in", cases.good_files(3))
    with open(os.fsencode(folder) + b"/bad\xff.jpg", "wb") as file:
        file.write(cases.encoded(cases.picture(1)))
    archive = cases.as_tar(tmp_path / "a.tar", cases.good_files(3), links={"link.jpg": "0.jpg"})
    for number, source in enumerate((folder, archive)):
        out = tmp_path / f"out{number}"
        assert label(source, out)[0].bad == 1
        for name in os.listdir(os.fsencode(folder)):
            os.utime(os.path.join(os.fsencode(folder), name), (1, 1))
        os.utime(archive, (1, 1))
        assert label(source, out)[1] == 0
