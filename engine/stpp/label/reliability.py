"""ST++'s selection: which unlabelled images several checkpoints agree on.

Source: ST++ (arXiv 2106.05095), section 3.3. Legend: N images, H W size of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stpp import files
from stpp.clock import Clock
from stpp.config import DataConfig, LabelConfig
from stpp.device import Readback
from stpp.distributed import World
from stpp.images.batches import Decoded
from stpp.images.planning import Planned
from stpp.inference import views
from stpp.inference.open import Predictor
from stpp.inference.several import Open
from stpp.label import rows
from stpp.label.assignment import Assignment
from stpp.label.labels import SampleSource, require_none_bad
from stpp.label.run import Summary, execute
from stpp.loading.sample import Sample
from stpp_kernels import pairwise_iou


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Agreement of the last of several teachers with each earlier one.

    Source: ST++ (arXiv 2106.05095), section 3.3.
    """

    networks: Sequence[Predictor]
    teacher: str
    classes = ()

    @property
    def settings(self) -> dict:
        """See `Job`."""
        return {"job": "select", "teacher": self.teacher}

    def compute(self, batch: Decoded) -> Callable[[], list[float | None]]:
        """See `Job`: the mean over the earlier teachers of their mask's mean IoU with the last one's."""
        *earlier, last = self.networks
        reference_NHW = views.masks(last, batch.images_NCHW, "none")
        total_N = torch.zeros(len(batch.planned), dtype=torch.float64, device=reference_NHW.device)
        for network in earlier:
            masks_NHW = views.masks(network, batch.images_NCHW, "none")
            total_N += pairwise_iou(masks_NHW, reference_NHW, last.num_classes)
        queued, errors = Readback(total_N / len(earlier)), batch.errors

        def results() -> list[float | None]:
            (scores_N,) = queued.read()
            return [None if i in errors else score for i, score in enumerate(scores_N.tolist())]

        return results

    def sink(self, out: Path, shard: int, clock: Clock) -> None:
        """See `Job`."""

    def row(self, one: Planned, result: float, stored: None) -> dict:
        """See `Job`."""
        return rows.good(one, self.teacher) | {"reliability": result}


def select_corpus(open_teachers: Open, task: Assignment, here: World, *,
                  order: Sequence[str] | None = None) -> Summary:
    """Writes `reliability.parquet`, `reliable_ids.txt` and `unreliable_ids.txt`: the reliable half, and the
    rest.

    Reliability is the mean IoU between the last teacher's prediction and each earlier one's. Shards, markers
    and restarts are as for `stpp.label.labels.label_corpus`; the parts of the table are
    `scores/part-*.parquet`.

    Args:
        open_teachers: opens checkpoints of one run in the order of training; the last one judges.
        task: with the table "scores".
        order: keys of the images in the order that ties keep; None: the order of the source.
    """
    def job(images: int) -> Reliability:
        opened = open_teachers(images)
        return Reliability(networks=[one.network for one in opened],
                           teacher="+".join(one.identity for one in opened))

    return execute(task, job, here, conclude=lambda: write_selection(task.out, order))


def select(open_teachers: Open, samples: Sequence[Sample], lines: Sequence[str], here: World, *,
           config: LabelConfig, data: DataConfig, out: Path, title: str = "select") -> float:
    """Selects among the samples of a stage with `select_corpus`.

    Args:
        lines: of the unlabelled list, which the id files repeat.

    Returns:
        The mean reliability.

    Raises:
        UserError: an image cannot be read.
    """
    task = Assignment(source=SampleSource(samples, lines), out=out, config=config, data=data, title=title,
                      table="scores")
    summary = select_corpus(open_teachers, task, here, order=[sample.key for sample in samples])
    require_none_bad(summary, out)
    return summary.mean


def split_by_reliability(scores: Sequence[float]) -> tuple[list[int], list[int]]:
    """Positions of the reliable half (floor of half, most reliable first) and of the rest; ties keep their
    order."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    half = len(scores) // 2
    return order[:half], order[half:]


def write_selection(out: Path, order: Sequence[str] | None = None) -> None:
    """Writes the table and the two lists from the scores of all shards; images without a score are in
    neither.

    The names of all images are held in memory for it, about 200 bytes each.
    """
    found = [(row["key"], row["source"], row["reliability"]) for row in rows.read_parts(out / "scores")
             if row["status"] == "ok"]
    if order is not None:
        place = {key: i for i, key in enumerate(order)}
        found.sort(key=lambda row: place[row[0]])
    reliable, unreliable = split_by_reliability([score for _, _, score in found])
    trusted = set(reliable)
    rows.write(out / "reliability.parquet", ({"key": key, "reliability": score, "reliable": i in trusted}
                                             for i, (key, _, score) in enumerate(found)), rows.RELIABILITY)
    for name, positions in (("reliable_ids.txt", reliable), ("unreliable_ids.txt", unreliable)):
        files.write_text(out / name, "".join(f"{found[i][1]}\n" for i in positions))
