"""`stpp export`: a trained network as ONNX, for programs without PyTorch. Heavy imports are deferred."""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stpp import config, files
from stpp.commands.options import OutputStride
from stpp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a checkpoint to ONNX with batch norm folded, for any number of images, from the smallest size
    that the network accepts."""

    checkpoint: Path
    """A best.pt or third-*.pt of a run, or a published state dict."""
    out: Path
    """The .onnx file; an existing file is replaced."""
    output_stride: OutputStride = None
    precision: Literal["fp32", "fp16"] = "fp32"
    """Type of weights, images and feature maps; logits are always fp32."""


def export(args: Sequence[str]) -> None:
    """Runs `stpp export`.

    The graph takes `images` [N, 3, H, W]: RGB in 0..1, normalised with ImageNet's mean and deviation. It
    returns `logits` [N, C, h, w] at the network's own resolution: resize them bilinearly to H, W with aligned
    corners, and take the argmax.

    Raises:
        UserError: missing checkpoint, missing package, or an unwritable file.
    """
    options = config.parse(Export, args, prog="stpp export")
    if options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder; give the path of the .onnx file")
    if options.out.exists() and options.out.samefile(files.and_part(options.checkpoint)[0]):
        raise UserError(f"--out {options.out} is the checkpoint; give the path of the .onnx file")
    import torch

    from stpp.images.image_file import IMAGENET_MEAN, IMAGENET_STD
    from stpp.inference import export as graphs
    from stpp.inference import fold
    from stpp.inference.build import PRECISIONS
    from stpp.inference.record import DEFAULT_SHAPES
    from stpp.models.trained import load_network

    network, classes, architecture = load_network(options.checkpoint, output_stride=options.output_stride)
    dtype = PRECISIONS[options.precision]
    folded = fold.ready(network, device=torch.device("cpu"), dtype=dtype)
    unfinished = options.out.with_name(f".{options.out.name}.{os.getpid()}.tmp")
    try:
        graphs.onnx(folded, unfinished, shapes=DEFAULT_SHAPES, dtype=dtype,
                    metadata={"pretrained": json.dumps(network.pretrained)})
        os.replace(unfinished, options.out)
    except OSError as error:
        raise UserError(f"--out {options.out}: {error.strerror or error}; make room, or choose another "
                        "--out") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    view_px = architecture.get("view_px")
    print(f"{options.out}: {graphs.INPUT} [N, 3, H, W] {options.precision}, (RGB in 0..1 - {IMAGENET_MEAN}) "
          f"/ {IMAGENET_STD} -> {graphs.OUTPUT} [N, {len(classes)}, h, w] fp32"
          + (f"; images resized to a longer side of {view_px}" if view_px else ""))
