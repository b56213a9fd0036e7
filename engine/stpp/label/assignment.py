"""Parameters of a labelling run, in one record that all its parts share."""

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
    """Labelling (or scoring) of every image of a corpus."""

    source: Source
    out: Path
    config: LabelConfig = field(default_factory=LabelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    """Loader, threads and EXIF rule; other fields are unused."""
    title: str = "label"
    """Title of the progress bar."""
    output: Literal["png", "tar"] = "png"
    """Mask format: a PNG per mask, or a tar archive per shard."""
    table: Literal["labels", "scores"] = "labels"
    """Folder of the result table's parts, below the output; `rows.TABLES` has the columns."""
    part: Part = WHOLE
    """Static share of the shards that this call labels."""
    verify: bool = False
    """Check the files of finished shards, and label damaged shards again."""
    update: bool = False
    """Add new and changed images of the source to the plan, and remove missing ones."""
    list_only: bool = False
    """List the source and stop; needs one process and no GPU."""

    @property
    def cut(self) -> BatchLimits:
        """Limits by which shards are cut into batches."""
        return BatchLimits(max_batch=self.config.batch_per_rank, batch_pixels=self.config.batch_pixels,
                           max_pixels=self.config.max_pixels, exif=self.data.exif)

    @property
    def decoder(self) -> str:
        """Name of the decoder, "dali" or "pil"."""
        return batches.pick(self.data.loader)
