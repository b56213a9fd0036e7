"""Flags and checks that several commands share, so that they are spelled, explained and refused alike."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from stpp.config import DeviceConfig, LoaderConfig, PrecisionConfig, SourceConfig
from stpp.errors import UserError
from stpp.settings import INLINE

OutputStride = Annotated[Literal[8, 16, 32] | None, tyro.conf.arg(
    help="Output stride of a checkpoint that does not tell it, such as a published one; unset: 8.")]
ViewPx = Annotated[int | None, tyro.conf.arg(
    help="Longer side in pixels at which the network sees whole images; masks have the images' own size. "
         "Unset: as the checkpoint tells (--data.view-px of its run), or the images' own.")]
TrustEngine = Annotated[bool, tyro.conf.arg(
    help="Run engines that you did not build on this machine: they are programs.")]


TOOLS = ("cvat", "coco", "yolo", "labelme")
"""Layouts of annotation tools, which may have a pattern of images."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(PrecisionConfig, DeviceConfig):
    """Where and in which type a network computes."""


Compute = Annotated[ComputeConfig, INLINE]
"""`--device` and `--precision`."""
Reading = Annotated[LoaderConfig, INLINE]
"""`--loader` and `--threads`."""


def need_root(data: SourceConfig) -> None:
    """Refuses a data set that is not there, or patterns without the layout that they belong to.

    Raises:
        UserError: one of them.
    """
    if data.layout not in TOOLS and (data.layout == "globs") != (data.images is not None):
        raise UserError(f"--data.layout {data.layout} with --data.images {data.images}: patterns go with "
                        "layout globs, and globs needs them")
    if data.root is None:
        raise UserError("--data.root is missing: name the folder of the data set")
    if not data.root.is_dir():
        raise UserError(f"--data.root {data.root}: no such folder")
