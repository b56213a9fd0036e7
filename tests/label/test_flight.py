"""Labelling with one batch in flight: the order of the queue, and failures."""

import weakref
from pathlib import Path

import pytest
import torch

import label_cases as cases
import stream_cases
from stpp.device import CAPTURING, Readback
from stpp.errors import UserError
from stpp.images import batches
from stpp.label import labels, rows
from stpp.label.shards import Markers


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return cases.as_folder(tmp_path_factory.mktemp("corpus"), cases.good_files(12))


class Watched(cases.Tiny):
    """Network that records its calls, and fails in some of them."""

    def __init__(self, log: list[str], errors: dict[int, Exception] | None = None):
        super().__init__()
        self.log, self.errors, self.calls = log, errors or {}, 0

    def logits(self, images_NCHW):
        self.calls += 1
        self.log.append(f"compute {self.calls}")
        if self.calls in self.errors:
            raise self.errors[self.calls]
        return super().logits(images_NCHW)


def watch_results(monkeypatch, log: list[str]) -> None:
    """Records in the log when results are queued and when they are read."""

    class Watching(Readback):
        made = 0

        def __init__(self, *results):
            super().__init__(*results)
            Watching.made += 1
            self._number = Watching.made
            log.append(f"queue {self._number}")

        def read(self):
            log.append(f"read {self._number}")
            return super().read()

    monkeypatch.setattr(labels, "Readback", Watching)


@pytest.mark.parametrize("shard_size", [12, 6, 2])
def test_next_batch_is_queued_before_the_previous_is_read(corpus, tmp_path, monkeypatch, shard_size):
    """Also across the border of two shards."""
    log: list[str] = []
    watch_results(monkeypatch, log)
    options = {"tta": "none", "batch_per_rank": 1, "shard_size": shard_size}
    cases.run(corpus, tmp_path / "out", teacher=Watched(log), **options)
    expected = ["compute 1", "queue 1"]
    for number in range(2, 13):
        expected += [f"compute {number}", f"queue {number}", f"read {number - 1}"]
    assert log == [*expected, "read 12"]


def test_batch_in_flight_holds_no_images(corpus, tmp_path, monkeypatch):
    """The device's memory must suffice for one batch, the unit that --batch-pixels limits."""
    seen: list[weakref.ref] = []
    compute = labels.LabelJob.compute

    def watching(self, batch):
        assert all(images() is None for images in seen)
        seen.append(weakref.ref(batch.images_NCHW))
        return compute(self, batch)

    monkeypatch.setattr(labels.LabelJob, "compute", watching)
    cases.run(corpus, tmp_path / "out", batch_per_rank=1)
    assert len(seen) == 12


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("a bug"), KeyboardInterrupt()])
def test_error_keeps_the_previous_batch(corpus, tmp_path, monkeypatch, error):
    """Four shards of three batches; the network fails in the first batch of the third: the second is done."""
    options = {"tta": "none", "batch_per_rank": 1, "shard_size": 3, "output": "tar"}
    cases.run(corpus, tmp_path / "whole", **options)
    log: list[str] = []
    watch_results(monkeypatch, log)
    with pytest.raises(type(error)):
        cases.run(corpus, tmp_path / "out", teacher=Watched(log, {7: error}), **options)
    assert log[-2:] == ["compute 7", "read 6"]
    markers = Markers(tmp_path / "out")
    assert [markers.done(shard) for shard in range(4)] == [True, True, False, False]
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 2, "nothing of the third is left behind"
    teacher = cases.Tiny()
    cases.run(corpus, tmp_path / "out", teacher=teacher, **options)
    assert teacher.seen == 6 and cases.contents(tmp_path / "out") == cases.contents(tmp_path / "whole")


def test_error_within_a_shard_keeps_nothing_of_it(corpus, tmp_path):
    options = {"tta": "none", "batch_per_rank": 1, "shard_size": 3, "output": "tar"}
    with pytest.raises(KeyError):
        cases.run(corpus, tmp_path / "out", teacher=Watched([], {6: KeyError("a bug")}), **options)
    assert [path.name for path in (tmp_path / "out" / "masks").iterdir()] == ["shard-000000.tar"]


def test_results_that_cannot_be_read_end_the_run(corpus, tmp_path, monkeypatch):
    """A failed kernel is known when the results are read: one batch later than it was queued."""
    log: list[str] = []

    class Failing(Readback):
        def read(self):
            log.append("read")
            if len(log) == 4:
                raise RuntimeError("an illegal memory access was encountered")
            return super().read()

    monkeypatch.setattr(labels, "Readback", Failing)
    options = {"tta": "none", "batch_per_rank": 1, "shard_size": 3}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cases.run(corpus, tmp_path / "out", **options)
    assert len(log) == 4
    assert [Markers(tmp_path / "out").done(shard) for shard in range(4)] == [True, False, False, False]


@pytest.mark.parametrize("calls", [{1}, {4}, {3, 4, 5}, {12}, set(range(1, 13))])
def test_image_too_large_for_memory_is_bad_in_order(corpus, tmp_path, calls):
    options = {"tta": "none", "batch_per_rank": 1, "shard_size": 4, "output": "tar"}
    cases.run(corpus, tmp_path / "whole", **options)
    errors = {number: torch.OutOfMemoryError("CUDA out of memory") for number in calls}
    summary = cases.run(corpus, tmp_path / "out", teacher=Watched([], errors), **options)
    assert (summary.images, summary.bad) == (12, len(calls))
    whole = {row["key"]: row for row in rows.read_parts(tmp_path / "whole", "labels")}
    found = {row["key"]: row for row in rows.read_parts(tmp_path / "out", "labels")}
    assert found.keys() == whole.keys()
    good = [row for row in found.values() if row["status"] == "ok"]
    assert len(good) == 12 - len(calls) and all(row == whole[row["key"]] for row in good)
    bad = [row for row in found.values() if row["status"] == "bad"]
    assert len(bad) == len(calls) and all("more memory than there is" in row["error"] for row in bad)


def test_out_of_memory_is_raised_after_the_previous_batch(corpus, tmp_path, monkeypatch):
    log: list[str] = []
    watch_results(monkeypatch, log)
    teacher = Watched(log, {3: torch.OutOfMemoryError("CUDA out of memory")})
    with pytest.raises(UserError, match="--batch-pixels"):
        cases.run(corpus, tmp_path / "out", teacher=teacher, tta="none", batch_per_rank=2, shard_size=12)
    assert log[-2:] == ["compute 3", "read 2"]


def test_images_are_copied_on_a_separate_stream(corpus, tmp_path, monkeypatch):
    options = {"batch_per_rank": 2}
    cases.run(corpus, tmp_path / "plain", **options)
    log = stream_cases.install(monkeypatch)
    assemble = batches._assembled

    def watching(*args):
        assert CAPTURING.locked(), "a CUDA graph must not be captured meanwhile"
        log.append(f"copy on {torch.cuda.current_stream().name}")
        return assemble(*args)

    monkeypatch.setattr(batches, "_assembled", watching)
    monkeypatch.setattr(batches, "copy_stream", lambda device: stream_cases.Stream("side", log))
    cases.run(corpus, tmp_path / "out", **options)
    assert cases.contents(tmp_path / "out") == cases.contents(tmp_path / "plain")
    count = sum(entry.startswith("side event") for entry in log)
    assert count >= 6 and log.count("copy on side") == count
    for number in range(1, count + 1):
        assert log.index(f"side event {number}") < log.index(f"main waits for side event {number}")
    assert log.count("main uses 4-d uint8") == count
