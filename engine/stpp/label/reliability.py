"""ST++'s selection: which unlabelled images several checkpoints agree on.

Source: ST++ (arXiv 2106.05095), section 3.3.
"""

from collections.abc import Sequence
from pathlib import Path

from stpp import files
from stpp.config import DataConfig, LabelConfig
from stpp.distributed import World
from stpp.images.sources import Source
from stpp.inference.several import Open
from stpp.label import rows
from stpp.label.jobs import Scores
from stpp.label.labeller import cut, require_none_bad
from stpp.label.labels import SampleSource
from stpp.label.run import Summary, Task, execute
from stpp.label.shards import WHOLE, Part
from stpp.loading.sample import Sample


def select_corpus(open_teachers: Open, source: Source, here: World, *, config: LabelConfig, data: DataConfig, out: Path,
                  part: Part = WHOLE, verify: bool = False, list_only: bool = False, title: str = "select",
                  order: Sequence[str] | None = None) -> Summary:
    """Writes `reliability.parquet`, `reliable_ids.txt` and `unreliable_ids.txt`: the reliable half, and the rest.

    Reliability is the mean IoU between the last teacher's prediction and each earlier one's. Shards, markers and
    restarts are as for `stpp.label.labeller.label_corpus`; the parts of the table are `scores/part-*.parquet`.

    Args:
        open_teachers: opens checkpoints of one run in the order of training; the last one judges.
        order: keys of the images in the order that ties keep; None: the order of the source.
    """
    def job(images: int) -> Scores:
        opened = open_teachers(images)
        return Scores(networks=[one.network for one in opened], teacher="+".join(one.identity for one in opened))

    return execute(Task(source=source, open_job=job, cut=cut(config, data), shard_size=config.shard_size, out=out, title=title,
                        loader=data.loader, threads=data.threads, part=part, verify=verify, list_only=list_only,
                        conclude=lambda folder: write_selection(folder, order)), here)


def select(open_teachers: Open, samples: Sequence[Sample], lines: Sequence[str], here: World, *, config: LabelConfig,
           data: DataConfig, out: Path, title: str = "select") -> float:
    """Selects among the samples of a stage with `select_corpus`.

    Args:
        lines: of the unlabelled list, which the id files repeat.

    Returns:
        The mean reliability.

    Raises:
        UserError: an image cannot be read.
    """
    summary = select_corpus(open_teachers, SampleSource(samples, lines), here, config=config, data=data, out=out, title=title,
                            order=[sample.key for sample in samples])
    require_none_bad(summary, out)
    return summary.mean


def split_by_reliability(scores: Sequence[float]) -> tuple[list[int], list[int]]:
    """Positions of the reliable half (floor of half, most reliable first) and of the rest; ties keep their order."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    half = len(scores) // 2
    return order[:half], order[half:]


def write_selection(out: Path, order: Sequence[str] | None = None) -> None:
    """Writes the table and the two lists from the scores of all shards; images without a score are in neither.

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
