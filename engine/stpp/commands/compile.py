"""`stpp compile`: builds an engine from a checkpoint. Heavy imports are deferred."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stpp import config, files
from stpp.commands.options import Compute, ComputeConfig, OutputStride, ViewPx
from stpp.config import BackendName
from stpp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Compile:
    """Compile a checkpoint into an engine for faster labelling; see docs/engines.md."""

    checkpoint: Path
    """A best.pt or third-*.pt of a run, or a published state dict."""
    out: Path
    """Folder of the engine; an existing engine is replaced."""
    output_stride: OutputStride = None
    view_px: ViewPx = None
    backend: BackendName = "auto"
    """Compiler; auto: the fastest one installed."""
    shapes: tuple[str, ...] = ()
    """Smallest, typical and largest input as NxHxW, for example 1x32x32 4x360x480 16x1024x2048; test-time
    views are up to twice as large as the images. Default: any (inductor), or these."""
    sample: Path | None = None
    """Folder of images on which the engine is compared with eager; default: the first images that it
    labels."""
    compute: Compute = ComputeConfig()

    def __post_init__(self):
        config.check_view(self.view_px)
        if self.sample is not None and self.backend == "eager":
            raise UserError("--sample: compares an engine with eager; leave it out with --backend eager")


def compile(args: Sequence[str]) -> None:
    """Runs `stpp compile`.

    Raises:
        UserError: missing checkpoint, unavailable backend, or a failed compilation.
    """
    options = config.parse(Compile, args, prog="stpp compile")
    if not files.and_part(options.checkpoint)[0].is_file():
        raise UserError(f"--checkpoint {options.checkpoint}: no such file")
    from stpp import distributed
    from stpp.inference import exif_rule
    from stpp.inference.open import Shapes, compile_predictor
    from stpp.inference.single_images import sample_images
    from stpp.models.trained import load_network

    shapes = Shapes.parse(options.shapes) if options.shapes else None
    with distributed.world(options.compute.device) as world:
        if world.size > 1:
            raise UserError("stpp compile runs in one process; start it without torchrun")
        rule = exif_rule.resolve([options.checkpoint])
        sample = options.sample and sample_images(options.sample, world.device, exif=rule)
        load = partial(load_network, output_stride=options.output_stride, view_px=options.view_px)
        compile_predictor(options.checkpoint, options.out, load=load, device=world.device, shapes=shapes,
                        backend=options.backend, precision=options.compute.precision, sample=sample)
    print(options.out)
