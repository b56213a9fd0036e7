"""Flags and checks shared by several commands, with one spelling, help text and error each."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from stpp.config import DeviceConfig, LoaderConfig, PrecisionConfig, SourceConfig
from stpp.errors import UserError
from stpp.settings import INLINE

OutputStride = Annotated[Literal[8, 16, 32] | None, tyro.conf.arg(
    help="Output stride of checkpoints that do not store it, such as published ones; default: 8.")]
ViewPx = Annotated[int | None, tyro.conf.arg(
    help="Longer side in pixels to which whole images are resized for the network; masks keep the images' "
         "size. Default: the checkpoint's value (--data.view-px of its run), or no resizing.")]
TrustEngine = Annotated[bool, tyro.conf.arg(
    help="Run engines that you did not build on this machine; engines contain native code.")]


TOOLS = ("cvat", "coco", "yolo", "labelme")
"""Layouts of annotation tools, which accept an image pattern."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(PrecisionConfig, DeviceConfig):
    """Device and precision of a network's computation."""


Compute = Annotated[ComputeConfig, INLINE]
"""`--device` and `--precision`."""
Reading = Annotated[LoaderConfig, INLINE]
"""`--loader` and `--threads`."""


def need_root(data: SourceConfig) -> None:
    """Rejects a missing data root, and image patterns without the layout that uses them.

    Raises:
        UserError: one of these.
    """
    if data.layout not in TOOLS and (data.layout == "globs") != (data.images is not None):
        raise UserError(f"--data.layout {data.layout} with --data.images {data.images}: patterns need "
                        "layout globs, and globs needs patterns")
    if data.root is None:
        raise UserError("--data.root is missing: name the folder of the data set")
    if not data.root.is_dir():
        raise UserError(f"--data.root {data.root}: no such folder")
