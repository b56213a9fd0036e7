"""The loader on NVIDIA DALI: files to normalised batches, on the CPU or the GPU, with the same graph.

The numbers of `stpp.loading.augment` go in beside the paths; `stpp.loading.dali_graph` says what is computed. By how much it
differs from `stpp.loading.reference`, which computes the same with PIL, is measured in docs/augmentation.md.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import nvidia.dali.fn as fn
import torch
from nvidia.dali import Pipeline, pipeline_def

from stpp.config import AugmentConfig
from stpp.errors import UserError
from stpp.images.image_file import opened
from stpp.loading.augment import draw, noise_image, noise_side
from stpp.loading.dali_graph import EVAL_INPUTS, TRAIN_INPUTS, eval_graph, path_rows, train_graph, train_rows
from stpp.loading.sample import Batch, Sample
from stpp.loading.sampler import MicroBatch


@dataclass(frozen=True, slots=True)
class _Fed:
    """A batch on its way through a pipeline: who it is, and what the graph is fed for it."""

    indices: np.ndarray
    step: int
    epoch: int
    rows: tuple


def train_batches(
    samples: Sequence[Sample],
    micro_batches: Iterable[MicroBatch],
    *,
    augment: AugmentConfig,
    seed: int,
    stage: int,
    device: torch.device | str,
    threads: int,
    exif: bool = True,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Decodes, augments and normalises the given micro-batches, in their order.

    Args:
        samples: the list that the micro-batches index. Every sample needs a mask.
        micro_batches: as `StepSampler` yields them, none longer than the first; taken lazily, a few ahead.
        augment: size of the crops and range of the long side.
        seed, stage: key of the augmentation, with each micro-batch's epoch and positions.
        device: where the batches come out. On "cuda" JPEGs are decoded and everything is computed there.
        threads: CPU threads that decode (and compute, on the CPU), at least 1.
        exif: turn images upright by their EXIF orientation.
        prefetch: batches in preparation while one is used, at least 1.

    Returns:
        Batches of crop_px x crop_px. A batch stays valid for as long as it is held.

    Raises:
        ValueError: at once, for a sample without mask or impossible numbers.
        UserError: while iterating, for a file that is missing, broken, or of another size than its sample says.
    """
    for sample in samples:
        if sample.mask is None:
            raise ValueError(f"sample {sample.key!r} has no mask, expected one for every sample that trains")
    device = _checked(device, threads, prefetch)
    side = augment.crop_px
    noise = noise_image(noise_side(side))

    def feed() -> Iterator[_Fed]:
        for micro in micro_batches:
            chosen = [samples[i] for i in micro.indices]
            params = draw(chosen, micro.positions, seed=seed, stage=stage, epoch=micro.epoch, crop_px=side,
                          long_side=augment.long_side)  # fmt: skip
            rows = train_rows(chosen, params, side, noise)
            yield _Fed(micro.indices, micro.step, micro.epoch, tuple(rows[name] for name in TRAIN_INPUTS))

    def graph(x: dict):
        return train_graph(x, device.type == "cuda", side=side, exif=exif)

    return _run(samples, feed(), TRAIN_INPUTS, graph, device, threads, prefetch, exif)


def eval_batches(
    samples: Sequence[Sample],
    batches: Iterable[Sequence[int]],
    *,
    device: torch.device | str,
    threads: int,
    exif: bool = True,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Decodes and normalises the given batches at native size, in their order.

    Args:
        samples: the list that the batches index.
        batches: positions in `samples`; the images of one batch are of equal size (`equal_size_batches`).
        device, threads, exif, prefetch: as for `train_batches`.

    Returns:
        Batches; `labels_NHW` is None throughout if any sample of the list has no mask.

    Raises:
        ValueError: at once, for an empty batch, one with images of different sizes, or impossible numbers.
        UserError: as for `train_batches`.
    """
    device = _checked(device, threads, prefetch)
    # The longest first: a pipeline takes no batch longer than what it is built for, so all must be known.
    batches = [np.asarray(batch, dtype=np.int64) for batch in batches]
    for batch in batches:
        if len({(samples[i].height, samples[i].width) for i in batch}) != 1:
            raise ValueError(f"batch {batch.tolist()} is empty or holds images of different sizes")
    labelled = all(sample.mask is not None for sample in samples)
    inputs = EVAL_INPUTS if labelled else {"image_path": EVAL_INPUTS["image_path"]}

    def feed() -> Iterator[_Fed]:
        for batch in batches:
            rows = [path_rows(samples[i].image for i in batch)]
            if labelled:
                rows.append(path_rows(samples[i].mask for i in batch))
            yield _Fed(batch, 0, 0, tuple(rows))

    def graph(x: dict):
        return eval_graph(x, device.type == "cuda", exif=exif)

    most = max(map(len, batches), default=0)
    return _run(samples, feed(), inputs, graph, device, threads, prefetch, exif, most)


def _checked(device: torch.device | str, threads: int, prefetch: int) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}, expected cpu or cuda (the reference loader serves others)")
    if threads < 1 or prefetch < 1:
        raise ValueError(f"threads is {threads} and prefetch is {prefetch}, expected both at least 1")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _run(
    samples: Sequence[Sample],
    feed: Iterator[_Fed],
    inputs: dict[str, tuple],
    graph: Callable,
    device: torch.device,
    threads: int,
    prefetch: int,
    exif: bool,
    most: int = 0,
) -> Iterator[Batch]:
    """Runs a graph over what `feed` yields.

    Args:
        inputs: what `feed` yields: name -> (type, dimensions, layout).
        graph: function from the inputs by name to (images, labels or None, shapes as decoded).
        most: longest batch; 0 for the length of the first.
    """
    first = next(feed, None)
    if first is None:
        return
    queue = deque([first])
    pending: deque[_Fed] = deque()

    def source() -> tuple:
        # A StopIteration of `feed` tells DALI that this was all.
        pending.append(queue.popleft() if queue else next(feed))
        return pending[-1].rows

    pipeline = _pipeline(source, inputs, graph, device, threads, prefetch, most or len(first.indices))
    while True:
        try:
            outputs = pipeline.run(*([torch.cuda.current_stream(device)] if device.type == "cuda" else []))
        except StopIteration:
            return
        except RuntimeError as error:
            culprit = _culprit([samples[i] for fed in pending for i in fed.indices], device, exif)
            if culprit is not None:
                raise culprit from error
            raise
        fed = pending.popleft()
        _check_shapes([samples[i] for i in fed.indices], outputs[-1])
        yield Batch(
            images_NCHW=torch.from_dlpack(outputs[0].as_tensor()).permute(0, 3, 1, 2),
            labels_NHW=torch.from_dlpack(outputs[1].as_tensor()).squeeze(3) if len(outputs) == 3 else None,
            indices=fed.indices,
            step=fed.step,
            epoch=fed.epoch,
        )


def _pipeline(
    source: Callable[[], tuple],
    inputs: dict[str, tuple],
    graph: Callable,
    device: torch.device | None,
    threads: int,
    prefetch: int,
    batch: int,
) -> Pipeline:
    """A built pipeline that returns the graph's outputs without its Nones."""
    kinds, dimensions, layouts = map(list, zip(*inputs.values(), strict=True))

    @pipeline_def(enable_conditionals=True)
    def build():
        nodes = fn.external_source(source=source, num_outputs=len(inputs), batch=True, dtype=kinds, ndim=dimensions,
                                   layout=layouts)  # fmt: skip
        outputs = graph({name: nodes[i] for i, name in enumerate(inputs)})
        return tuple(output for output in outputs if output is not None)

    pipeline = build(
        batch_size=batch,
        num_threads=threads,
        device_id=device.index if device.type == "cuda" else None,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    pipeline.build()
    return pipeline


def _check_shapes(samples: Sequence[Sample], shapes) -> None:
    """Raises UserError for an image or mask that is not of its sample's size.

    Args:
        samples: N samples.
        shapes: DALI list of N int32 [3] or [6]: height, width, channels of the image, then of the mask.
    """
    for sample, shape in zip(samples, np.asarray(shapes.as_array()), strict=True):
        for path, (height, width, _) in zip((sample.image, sample.mask), shape.reshape(-1, 3).tolist(), strict=False):
            if (height, width) != (sample.height, sample.width):
                raise UserError(
                    f"{path}: is {width}x{height} pixels where the index says {sample.width}x{sample.height}; "
                    "run `stpp prepare` again"
                )


def _culprit(samples: Iterable[Sample], device: torch.device, exif: bool) -> UserError | None:
    """What names the first file among these samples' that DALI cannot decode; None if it can decode each.

    DALI does not say which file it failed on, and a pipeline that failed once serves no more: each is decoded alone.
    """
    for path in (path for sample in samples for path in (sample.image, sample.mask) if path is not None):
        try:
            with opened(path) as file:
                file.load()
        except UserError as error:
            return error
        try:
            _decode_alone(path, device, exif)
        except RuntimeError as error:
            reason = str(error).partition("encountered:")[2].split("\n\n")[1:2] or [str(error)]
            reason = " ".join(reason[0].split())[:200]
            return UserError(f"{path}: DALI cannot decode it, though PIL can ({reason}); write it anew or leave it out")
    return None


def _decode_alone(path: str, device: torch.device, exif: bool) -> None:
    """Raises RuntimeError if DALI cannot decode this file."""

    def source() -> tuple:
        return (path_rows([path]),)

    def graph(x: dict):
        return eval_graph(x, device.type == "cuda", exif=exif)

    _pipeline(source, {"image_path": EVAL_INPUTS["image_path"]}, graph, device, 1, 1, 1).run()
