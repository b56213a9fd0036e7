"""A labelling as it is asked for: one record, which everything that does a part of it is given as it is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stpp.config import DataConfig, LabelConfig
from stpp.images import batches
from stpp.images.planning import BatchLimits
from stpp.images.sources import Source
from stpp.label.shards import WHOLE, Part


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Work on every image of a corpus."""

    source: Source
    out: Path
    config: LabelConfig = field(default_factory=LabelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    """Who decodes, with how many threads, and whether EXIF counts; the rest is not looked at."""
    title: str = "label"
    """Of the progress bar."""
    output: Literal["png", "tar"] = "png"
    """A file for every mask, or an archive for every shard."""
    table: Literal["labels", "scores"] = "labels"
    """Folder of the parts of its table below the output; `rows.TABLES` has the columns."""
    part: Part = WHOLE
    """The share of the shards that this call does."""
    verify: bool = False
    """Look at what finished shards left, and do damaged ones again."""
    update: bool = False
    """Take what is new or changed since the source was listed into the plan, and what is gone out of it."""
    list_only: bool = False
    """Only list the source: that is work of one process, and needs no GPU."""

    @property
    def cut(self) -> BatchLimits:
        """How the settings cut shards into batches."""
        return BatchLimits(max_batch=self.config.batch_per_rank, batch_pixels=self.config.batch_pixels,
                           max_pixels=self.config.max_pixels, exif=self.data.exif)

    @property
    def decoder(self) -> str:
        """ "dali" or "pil"."""
        return batches.pick(self.data.loader)
