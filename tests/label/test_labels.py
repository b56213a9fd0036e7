"""Labelling in one process: masks and rows, bad images, options, interrupted and damaged runs."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import label_cases as cases
from stpp import distributed
from stpp.config import DataConfig, LabelConfig
from stpp.errors import UserError
from stpp.images import batches
from stpp.images.masks import read_index_mask
from stpp.images.sources import open_source
from stpp.inference import views
from stpp.inference.predictors import already_open
from stpp.inference.record import Agreement
from stpp.label import confidence_map, labels, listing, reliability, rows
from stpp.label.assignment import Assignment
from stpp.label.export import parts_of
from stpp.label.shards import Part
from stpp.loading.sample import Sample

FAULTS = Path(__file__).parents[1] / "faults"


def loaders() -> list[str]:
    return ["reference", "dali"] if batches.pick("auto") == "dali" else ["reference"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return cases.as_folder(tmp_path_factory.mktemp("corpus"), cases.good_files())


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """Returns the result of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    cases.run(corpus, out)
    return out


@pytest.mark.parametrize("loader", loaders())
@pytest.mark.parametrize("mode", list(views.VIEWS))
def test_masks_match_the_method(tmp_path, mode, loader):
    files = cases.good_files(4) | cases.odd_files()
    source = cases.as_folder(tmp_path / "in", files)
    cases.run(source, tmp_path / "out", tta=mode, loader=loader)
    same = total = 0
    for name in files:
        mask = read_index_mask((tmp_path / "out" / "masks" / name).with_suffix(".png"))
        truth = cases.plain_mask(cases.Tiny(), source / name, *views.VIEWS[mode])
        assert mask.shape == truth.shape, name
        same, total = same + (mask == truth).sum(), total + mask.size
        assert (mask == truth).mean() >= 0.999, name
    assert same / total >= 0.9999


def test_rows_describe_the_files(corpus, whole):
    table = list(rows.read_parts(whole, "labels"))
    assert [row["key"] for row in table] == sorted(name.removesuffix(".jpg") for name in cases.good_files())
    for row in table:
        data = (whole / "masks" / f"{row['key']}.png").read_bytes()
        mask = read_index_mask(whole / "masks" / f"{row['key']}.png")
        assert (row["size"], row["crc"]) == (len(data), zlib.crc32(data))
        assert (row["height"], row["width"]) == mask.shape
        assert row["class_pixels"] == np.bincount(mask.ravel(), minlength=4).tolist()
        assert (
            row["status"] == "ok"
            and row["error"] is None
            and row["teacher"] == "tiny"
            and row["ignored_fraction"] == 0
        )
        assert 0.25 < row["mean_confidence"] <= 1
        # every pixel, or every second one, of small images
        sure = confidence_map.read(row["confidence_map"], *mask.shape) / 255
        assert abs(sure.mean() - row["mean_confidence"]) < 0.05
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["images"] == 12 and summary["bad"] == 0
    assert summary["class_pixels"] == np.sum([row["class_pixels"] for row in table], axis=0).tolist()
    assert rows.read(whole / "failed.parquet") == []


def test_archives_hold_the_same_masks(corpus, whole, tmp_path):
    for out in ("one", "two"):
        cases.run(corpus, tmp_path / out, output="tar")
    assert cases.contents(tmp_path / "one") == cases.contents(tmp_path / "two")
    found = {}
    for path in sorted((tmp_path / "one" / "masks").glob("*.tar")):
        with tarfile.open(path) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}
    files = (whole / "masks").rglob("*.png")
    assert found == {str(path.relative_to(whole / "masks")): path.read_bytes() for path in files}


@pytest.mark.parametrize("loader", loaders())
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_only_bad_files_fail(tmp_path, kind, loader):
    good, bad = cases.good_files(6) | cases.odd_files(), cases.bad_files()
    arrange = cases.as_folder if kind == "folder" else cases.as_tar
    suffix = "" if kind == "folder" else ".tar"
    mixed = arrange(tmp_path / f"mixed{suffix}", dict(sorted((good | bad).items())))
    alone = arrange(tmp_path / f"alone{suffix}", dict(sorted(good.items())))
    summary = cases.run(mixed, tmp_path / "mixed-out", loader=loader, shard_size=100)
    cases.run(alone, tmp_path / "alone-out", loader=loader, shard_size=100)
    failed = rows.read(tmp_path / "mixed-out" / "failed.parquet")
    prefix = "" if kind == "folder" else "mixed.tar::"
    assert sorted(row["source"] for row in failed) == sorted(prefix + name for name in bad)
    assert all(row["status"] == "bad" and row["error"] and row["crc"] is None for row in failed)
    assert (summary.images, summary.bad) == (len(good) + len(bad), len(bad))
    masks = [{name: digest for name,
              digest in cases.contents(tmp_path / f"{which}-out").items() if name.startswith("masks")}
             for which in ("mixed", "alone")]
    assert masks[0] == masks[1] and len(masks[0]) == len(good)
    assert cases.contents(tmp_path / "mixed-out") == _again(cases, mixed, tmp_path / "again", loader=loader,
                                                            shard_size=100)


def _again(cases, source, out, **options):
    cases.run(source, out, **options)
    return cases.contents(out)


@pytest.mark.parametrize("loader", loaders())
def test_bad_image_leaves_a_gap_in_its_batch(tmp_path, loader):
    files = {f"{i}.jpg": cases.encoded(cases.picture(i)) for i in range(7)}
    cases.run(cases.as_folder(tmp_path / "in", files), tmp_path / "whole", loader=loader, shard_size=7)
    flipped = bytearray(files["3.jpg"])
    middle = len(flipped) // 2
    # markers where data should be; its end looks complete
    flipped[middle : middle + 40] = b"\xff\xc4" * 20
    files |= {"1.jpg": files["1.jpg"][:-200], "3.jpg": bytes(flipped)}
    cases.run(cases.as_folder(tmp_path / "in", files), tmp_path / "holes", loader=loader, shard_size=7)
    failed = {row["key"] for row in rows.read(tmp_path / "holes" / "failed.parquet")}
    assert "1" in failed and failed <= {"1", "3"}
    before, after = (cases.contents(tmp_path / name) for name in ("whole", "holes"))
    for key in {str(i) for i in range(7)} - {"1", "3"}:
        assert before[f"masks/{key}.png"] == after[f"masks/{key}.png"]


def test_dali_and_pil_agree_on_a_cpu(corpus, whole, tmp_path):
    if "dali" not in loaders():
        pytest.skip("NVIDIA DALI is not installed")
    found = _again(cases, corpus, tmp_path / "dali", loader="dali")
    reference = cases.contents(whole)
    assert {name for name in found if found[name] != reference[name]} == {"run.json"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("loader", loaders())
def test_gpu_writes_nearly_the_same_masks(tmp_path, loader):
    files = cases.good_files(6) | cases.odd_files() | cases.bad_files()
    source = cases.as_folder(tmp_path / "in", files)
    gpu = distributed.World(device=torch.device("cuda", 0))
    here, there = (cases.run(source, tmp_path / name, here=world, loader=loader, tta="stpp")
                   for name, world in (("cpu", cases.HERE), ("gpu", gpu)))
    assert (here.images, here.bad) == (there.images, there.bad)
    same = total = 0
    for path in (tmp_path / "cpu" / "masks").rglob("*.png"):
        one, other = (read_index_mask(tmp_path / name / path.relative_to(tmp_path / "cpu"))
                      for name in ("cpu", "gpu"))
        same, total = same + (one == other).sum(), total + one.size
    assert same / total > 0.99  # JPEGs decoded on a GPU differ by a grey level here and there


def test_file_changed_after_planning_is_bad(tmp_path):
    source = cases.as_folder(tmp_path / "in", {f"{i}.jpg": cases.encoded(cases.picture(i)) for i in range(9)})

    class Changing(cases.Tiny):
        def logits(self, images_NCHW):
            if not self.seen:
                (source / "8.jpg").write_bytes(cases.encoded(cases.picture(2, (64, 64))))
            return super().logits(images_NCHW)

    out = tmp_path / "out"
    cases.run(source, out, teacher=Changing(), shard_size=9, batch_per_rank=1, tta="none")
    (row,) = rows.read(out / "failed.parquet")
    assert row["key"] == "8" and "64x64 pixels but had 64x48" in row["error"]


def test_pixels_of_low_confidence_are_ignored(corpus, whole, tmp_path):
    cases.run(corpus, tmp_path / "out", min_confidence=0.9)
    ignored = 0
    for row, sure in zip(rows.read_parts(tmp_path / "out", "labels"), rows.read_parts(whole, "labels"),
                         strict=True):
        mask, full = (read_index_mask(out / "masks" / f"{row['key']}.png")
                      for out in (tmp_path / "out", whole))
        assert (mask[mask != 255] == full[mask != 255]).all()
        assert row["ignored_fraction"] == pytest.approx((mask == 255).mean())
        assert row["class_pixels"] == np.bincount(mask[mask != 255], minlength=4).tolist()
        assert row["mean_confidence"] == sure["mean_confidence"]
        ignored += (mask == 255).sum()
    assert 0 < ignored < json.loads((whole / "summary.json").read_text())["pixels"]


@pytest.mark.parametrize(("change", "named"), [
    ({"tta": "none"}, "tta: flip -> none"), ({"identity": "other"}, "teacher: tiny -> other"),
    ({"batch_per_rank": 2}, "cut.max_batch: 3 -> 2"), ({"min_confidence": 0.5}, "min_confidence: 0.0 -> 0.5"),
    ({"output": "tar"}, "output: png -> tar"), ({"shard_size": 4}, "shard_size: 5 -> 4"),
    ({"exif": False}, "cut.exif")])
def test_another_run_is_refused_with_the_difference(corpus, whole, change, named):
    before = cases.contents(whole)
    with pytest.raises(UserError, match=named) as refused:
        cases.run(corpus, whole, **change)
    assert "\n" not in str(refused.value)
    assert cases.contents(whole) == before


def test_another_source_is_refused(corpus, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(corpus, source)
    cases.run(source, tmp_path / "out")
    cases.as_folder(source, {"new.jpg": cases.encoded(cases.picture(1))})
    with pytest.raises(UserError, match=r"1 new \(new\.jpg\); add --update"):
        cases.run(source, tmp_path / "out")
    shutil.copytree(corpus, tmp_path / "other")
    with pytest.raises(UserError, match="source.path: .*/in -> .*/other"):
        cases.run(tmp_path / "other", tmp_path / "out")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="foreign"):
        cases.run(source, tmp_path / "foreign")


def test_finished_shards_are_skipped(corpus, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    teacher = cases.Tiny()
    summary = cases.run(corpus, tmp_path / "out", teacher=teacher)
    assert teacher.seen == 0 and summary.labelled == 0 and summary.images == 12
    (tmp_path / "out" / "shards" / "000001.done.json").unlink()
    summary = cases.run(corpus, tmp_path / "out", teacher=teacher)
    assert teacher.seen == 2 * 5 and summary.labelled == 5
    assert cases.contents(tmp_path / "out") == cases.contents(whole)


def test_run_keeps_its_number_of_threads(corpus, tmp_path):
    before, seen = torch.get_num_threads(), []

    class Asking(cases.Tiny):
        def logits(self, images_NCHW):
            seen.append(torch.get_num_threads())
            return super().logits(images_NCHW)

    try:
        torch.set_num_threads(2)
        cases.run(corpus, tmp_path / "out", teacher=Asking())
        (tmp_path / "out" / "shards" / "000000.done.json").unlink()
        torch.set_num_threads(1)
        cases.run(corpus, tmp_path / "out", teacher=Asking())
        assert set(seen) == {2} and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_static_parts_complete_the_run(corpus, whole, tmp_path):
    out = tmp_path / "out"
    first = cases.run(corpus, out, part=Part.parse("2/2"))
    assert first.shards_left == 2 and first.labelled == 5 and not (out / "summary.json").exists()
    second = cases.run(corpus, out, part=Part.parse("1/2"))
    assert second.shards_left == 0 and second.labelled == 7 and second.images == 12
    assert cases.contents(out) == cases.contents(whole)
    for text in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"):
        with pytest.raises(UserError, match="--part"):
            Part.parse(text)


@pytest.mark.parametrize("output", ["png", "tar"])
def test_verify_finds_and_repairs_damage(corpus, tmp_path, output):
    out = tmp_path / "out"
    cases.run(corpus, out, output=output)
    expected = cases.contents(out)
    masks = sorted((out / "masks").rglob(f"*.{output}"))

    def damaged(path: Path, change) -> None:
        change(path)
        teacher = cases.Tiny()
        assert cases.run(corpus, out, output=output, teacher=teacher).redone == () and teacher.seen == 0
        summary = cases.run(corpus, out, output=output, teacher=teacher, verify=True)
        assert len(summary.redone) == 1 and str(path) in summary.redone[0], summary.redone
        assert teacher.seen <= 2 * 5
        assert cases.contents(out) == expected

    def altered(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    damaged(masks[0], Path.unlink)
    damaged(masks[-1], lambda path: path.write_bytes(path.read_bytes()[:-1]))
    damaged(masks[1], altered)
    damaged(out / "labels" / "part-000001.parquet", altered)
    damaged(out / "labels" / "part-000002.parquet", Path.unlink)
    teacher = cases.Tiny()
    assert cases.run(corpus, out, output=output, teacher=teacher,
                     verify=True).redone == () and teacher.seen == 0


def test_out_of_memory_names_the_option_to_lower(corpus, tmp_path):
    class Hungry(cases.Tiny):
        def logits(self, images_NCHW):
            return torch.empty(1 << 50)

    with pytest.raises(UserError, match="--batch-pixels"):
        cases.run(corpus, tmp_path / "out", teacher=Hungry())


def test_engine_agreement_is_stored_with_the_labels(corpus, tmp_path):
    class Judged(cases.Tiny):
        agreement = Agreement(raw=0.9, outside=0.99, margin=0.1, decided=0.8, pixels=10)

    cases.run(corpus, tmp_path / "out", teacher=Judged())
    kept = json.loads((tmp_path / "out" / "agreement-rank0.json").read_text())
    assert kept == {"teacher": "tiny",
                    "engines": [{"raw": 0.9, "outside": 0.99, "margin": 0.1, "decided": 0.8, "pixels": 10}]}
    cases.run(corpus, tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("agreement*"))


def test_single_image_that_exceeds_memory_is_bad(corpus, tmp_path):
    class Hungry(cases.Tiny):
        def logits(self, images_NCHW):
            return super().logits(images_NCHW) if images_NCHW.shape[3] < 50 else torch.empty(1 << 50)

    summary = cases.run(corpus, tmp_path / "out", teacher=Hungry(), batch_per_rank=1, tta="none")
    failed = rows.read(tmp_path / "out" / "failed.parquet")
    assert 0 < summary.bad == len(failed) < summary.images
    assert all("more memory than there is" in row["error"] and row["width"] >= 50 for row in failed)


def test_images_with_non_finite_logits_are_bad(corpus, tmp_path):
    class Broken(cases.Tiny):
        def logits(self, images_NCHW):
            logits = super().logits(images_NCHW)
            logits[0] = float("nan")
            return logits

    summary = cases.run(corpus, tmp_path / "out", teacher=Broken(), tta="none")
    failed = rows.read(tmp_path / "out" / "failed.parquet")
    assert 0 < summary.bad == len(failed) < 12 and {row["error"] for row in failed} == {
        "the network's answer is not finite"
    }


def test_bug_in_the_network_raises(corpus, tmp_path):
    class Wrong(cases.Tiny):
        def logits(self, images_NCHW):
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        cases.run(corpus, tmp_path / "out", teacher=Wrong(), output="tar")
    assert list((tmp_path / "out" / "masks").iterdir()) == []


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
                                      capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("output", ["png", "tar"])
def test_full_disk_stops_and_the_run_resumes_with_room(tmp_path, output):
    size = (200, 200)
    rng = np.random.default_rng(0)
    files = {
        f"{i:02d}.jpg": cases.encoded(cases.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)))
        for i in range(24)
    }
    source = cases.as_folder(tmp_path / "in", files)
    options = {"output": output, "tta": "none", "shard_size": 4}
    expected = _again(cases, source, tmp_path / "whole", **options)
    with small_disk(tmp_path / "disk", "220k") as disk:
        out = disk / "out"
        with pytest.raises(OSError) as full:
            cases.run(source, out, **options)
        assert full.value.errno == 28
        done = list((out / "shards").glob("*.done.json"))
        assert 0 < len(done) < 6
        assert not (out / "summary.json").exists() and not list((out / "tmp").iterdir())
        with pytest.raises(OSError):
            cases.run(source, out, **options)
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        teacher = cases.Tiny()
        assert cases.run(source, out, teacher=teacher, verify=True, **options).redone == ()
        assert teacher.seen == 24 - 4 * len(done)
        found = cases.contents(out)
    assert found == expected


@pytest.mark.parametrize("output", ["png", pytest.param("tar", marks=pytest.mark.slow)])
def test_result_is_the_same_when_killed_at_every_commit(tmp_path, output):
    source = cases.as_folder(tmp_path / "in", cases.good_files(7) | {"bad.jpg": b""})
    report = tmp_path / "report.json"
    done = subprocess.run([sys.executable, FAULTS / "label_killed.py", source, tmp_path / "out", output,
                           report],
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    kinds = {kill["before"].split()[0] for kill in found}
    assert {"replace", "fsync", "sync"} <= kinds
    # Two shards: each has a part of the plan, masks, rows and a marker to rename; then the last
    # two files.
    assert len(found) >= 30
    assert [kill for kill in found if not kill["same"]] == []
    assert all(sorted(kill["keys"]) == found[0]["keys"] for kill in found)
    assert len(set(found[0]["keys"])) == 8
    assert max(kill["recomputed"] for kill in found) == 7 and min(kill["recomputed"] for kill in found) == 0


def test_old_leftovers_of_killed_processes_are_removed(corpus, tmp_path):
    out = tmp_path / "out"
    (out / "tmp").mkdir(parents=True)
    old, new = (out / "tmp" / f"{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half a mask")
    os.utime(old, (1, 1))
    cases.run(corpus, out)
    assert list((out / "tmp").iterdir()) == [new]


def test_selection_ranks_by_agreement(corpus, tmp_path):
    def network(seed: int) -> cases.Tiny:
        teacher = cases.Tiny()
        teacher._weight = teacher._weight + 0.3 * torch.randn(
            4, 3, 4, 4, generator=torch.Generator().manual_seed(seed)
        )
        return teacher

    teachers = [network(seed) for seed in (1, 2, 3)]
    bad = cases.as_folder(tmp_path / "in", cases.good_files(9) | {"bad.jpg": b"x"})

    def select(out: Path, networks=teachers):
        task = Assignment(source=open_source(str(bad)), out=out,
                          config=LabelConfig(batch_per_rank=3, shard_size=4), data=DataConfig(threads=1),
                          table="scores")
        return reliability.select_corpus(already_open(*networks, identity="three"), task, cases.HERE)

    summary = select(tmp_path / "out")
    assert (summary.images, summary.bad) == (10, 1)
    table = rows.read(tmp_path / "out" / "reliability.parquet")
    for row in table:
        masks = [cases.plain_mask(teacher, bad / f"{row['key']}.jpg", (1.0,), False) for teacher in teachers]
        scores = []
        for earlier in masks[:2]:
            ious = [((earlier == c) & (masks[2] == c)).sum() / ((earlier == c) | (masks[2] == c)).sum()
                    for c in range(4)
                    if ((earlier == c) | (masks[2] == c)).any()]
            scores.append(np.mean(ious))
        assert row["reliability"] == pytest.approx(np.mean(scores), abs=0.01)
    lists = [(tmp_path / "out" / name).read_text().split("\n")[:-1]
             for name in ("reliable_ids.txt", "unreliable_ids.txt")]
    assert [len(lines) for lines in lists] == [4, 5]
    scores = {f"{row['key']}.jpg": row["reliability"] for row in table}
    ranked = [scores[line] for line in lists[0] + lists[1]]
    assert ranked == sorted(ranked, reverse=True) and set(lists[0] + lists[1]) == set(scores)
    assert {f"{row['key']}.jpg" for row in table if row["reliable"]} == set(lists[0])
    assert summary.mean == pytest.approx(np.mean(ranked))
    (tmp_path / "out" / "shards" / "000001.done.json").unlink()
    before = cases.contents(tmp_path / "out")
    select(tmp_path / "out")
    after = cases.contents(tmp_path / "out")
    assert before.items() <= after.items()
    select(tmp_path / "same", [teachers[0]] * 3)
    assert all(row["reliability"] == 1.0 for row in rows.read(tmp_path / "same" / "reliability.parquet"))


def test_decoded_batch_is_normalised_like_the_loader(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (1, 5, 6, 3), dtype=np.uint8)
    from stpp.images.pixels import normalised

    found = batches.network_input(torch.from_numpy(image), {})
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.permute(0, 2, 3, 1)[0], torch.from_numpy(normalised(image[0])))
    assert F.relu(found).shape == (1, 3, 5, 6)


def test_lost_table_of_a_finished_labelling_is_named(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    rows.part(out, "labels", 1).unlink()
    with pytest.raises(UserError, match=r"part-000001\.parquet is missing, so .* is incomplete; .*--verify"):
        list(rows.read_parts(out, "labels"))
    with pytest.raises(UserError, match="is incomplete"):
        parts_of(out)


def test_mask_of_an_image_that_has_become_bad_is_removed(tmp_path):
    source = cases.as_folder(tmp_path / "in", cases.good_files(4))
    cases.run(source, tmp_path / "out")
    path = source / "one" / "image000.jpg"
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)  # decayed: neither size nor time tells
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    mask = tmp_path / "out" / "masks" / "one" / "image000.png"
    mask.write_bytes(b"damaged")
    summary = cases.run(source, tmp_path / "out", verify=True)
    assert summary.bad == 1 and not mask.exists()


def test_samples_of_a_moved_data_set_are_listed_again(tmp_path):
    """A run that stopped in a labelling stage resumes with another `--data.root`."""
    def task(root: Path) -> Assignment:
        files = cases.as_folder(root, cases.good_files(6))
        samples = [Sample(key=f"im{i}", image=str(path), width=64, height=48)
                   for i, path in enumerate(sorted(files.rglob("*.jpg")))]
        return Assignment(source=labels.SampleSource(samples), out=tmp_path / "out", config=LabelConfig(),
                          data=DataConfig(threads=1, loader="reference"))

    listing.ensure(task(tmp_path / "first"))
    before = rows.read(tmp_path / "out" / "plan" / "listing-000000.parquet")
    moved = task(tmp_path / "second")
    assert listing.ensure(moved) == [] == listing.ensure(moved)
    after = rows.read(tmp_path / "out" / "plan" / "listing-000000.parquet")
    assert [row["key"] for row in before] == [row["key"] for row in after]
    assert all(row["file"].startswith(str(tmp_path / "second")) for row in after)
    fewer = dataclasses.replace(moved, source=labels.SampleSource([]))
    with pytest.raises(UserError, match="holds masks of another run"):
        listing.ensure(fewer)
