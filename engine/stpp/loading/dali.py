"""DALI loader: files to normalised batches, on the CPU or the GPU, with the same graph.

Inputs of the graph (`stpp.loading.dali_graph`) are paths and the numbers of `stpp.loading.augment`.
docs/augmentation.md gives the measured differences from `stpp.loading.reference`, the same loader in PIL.

Plain images are read and decoded in the graph. The others are decoded by PIL in a pool of threads, some
batches ahead, and passed to the graph as pixels. If DALI fails on a plain image, that image is found and
decoded by PIL from then on, and a new pipeline resumes with the same batches.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline, pipeline_def

from stpp import log
from stpp.config import AugmentConfig
from stpp.errors import UserError
from stpp.loading.augment import Augmentation, draw, noise_image, noise_side, pasting
from stpp.loading.dali_graph import (
    decoded_image,
    decoded_mask,
    path_rows,
    train_graph,
    train_inputs,
    train_rows,
)
from stpp.loading.decode import image_of, mask_of
from stpp.loading.sample import Batch, Sample, Stream
from stpp.loading.sampler import MicroBatch

_NOT_FED = np.zeros((1, 1, 3), dtype=np.uint8)
"""Placeholder for the pixels of an image that the graph decodes."""


def train_batches(
    stream: Stream,
    micro_batches: Iterable[MicroBatch],
    *,
    augment: AugmentConfig,
    seed: int,
    stage: int,
    device: torch.device | str,
    threads: int,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Decodes, augments and normalises micro-batches, in order.

    Args:
        stream: stream whose list the micro-batches index; its views are made of one crop.
        micro_batches: from `StepSampler`, none longer than the first; consumed lazily, a few ahead.
        augment: size of the crops, range of the long side, strength of the strong views.
        seed, stage: key of the augmentation, with each micro-batch's epoch and positions.
        device: device of the batches; on "cuda", JPEG decoding and all computation run there.
        threads: CPU threads that decode (and compute, on the CPU), at least 1.
        prefetch: batches prepared ahead, at least 1.

    Returns:
        Batches of crop_px x crop_px. A batch stays valid while it is referenced.

    Raises:
        ValueError: immediately, for invalid numbers.
        UserError: while iterating, for a file that is missing, broken, or of another size than its sample.
    """
    device = _checked(device, threads, prefetch)
    noise = noise_image(noise_side(augment.crop_px))

    def drawn() -> Iterator[_Fed]:
        for micro in micro_batches:
            numbers = draw(stream, micro.indices, micro.positions, augment=augment, seed=seed, stage=stage,
                           epoch=micro.epoch)
            rows = train_rows([stream.samples[i] for i in micro.indices], numbers, stream, noise)
            yield _Fed(micro, numbers, rows)

    return _Feeder(stream, device, augment.crop_px, threads, prefetch).batches(drawn())


def _checked(device: torch.device | str, threads: int, prefetch: int) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}, expected cpu or cuda (the reference loader serves others)")
    if threads < 1 or prefetch < 1:
        raise ValueError(f"threads is {threads} and prefetch is {prefetch}, expected both at least 1")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


@dataclass(frozen=True, slots=True)
class _Fed:
    """Inputs of the graph for a batch in a pipeline."""

    micro: MicroBatch
    drawn: Augmentation
    rows: dict
    pixels: dict[int, Future] = field(default_factory=dict)
    """Pixels of the images that PIL decodes, by position in the batch."""


@dataclass
class _Feeder:
    """Feeder of a stream's micro-batches to pipelines of the training graph."""

    stream: Stream
    device: torch.device
    side: int
    threads: int
    prefetch: int

    def __post_init__(self):
        self.samples = self.stream.samples
        self._by_pil = {i for i, sample in enumerate(self.samples) if not sample.plain}
        """Indices of the samples whose images PIL decodes."""
        self._turned = any(sample.orientation != 1 for sample in self.samples)
        self._waiting: deque[_Fed] = deque()
        """Batches that are drawn, but in no pipeline."""
        self._in_flight: deque[_Fed] = deque()
        """Batches in the pipeline."""

    def batches(self, drawn: Iterator[_Fed]) -> Iterator[Batch]:
        with ThreadPoolExecutor(self.threads, "stpp-load") as pool:
            try:
                yield from self._run(drawn, pool)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, drawn: Iterator[_Fed], pool: Executor) -> Iterator[Batch]:
        if not self._draw(drawn, pool, 1):
            return
        most = len(self._waiting[0].micro.indices)
        pipeline = self._pipeline(drawn, pool, most)
        stream = [torch.cuda.current_stream(self.device)] if self.device.type == "cuda" else []
        while True:
            try:
                outputs = pipeline.run(*stream)
            except StopIteration:
                return
            except RuntimeError as error:
                suspects = {i for fed in self._in_flight for i in fed.micro.indices.tolist()}
                if not self._give_to_pil(suspects):
                    raise error
                self._waiting.extendleft(reversed(self._in_flight))
                self._in_flight.clear()
                for fed in self._waiting:
                    self._decode(fed, pool)
                pipeline = self._pipeline(drawn, pool, most)
                continue
            yield self._batch(self._in_flight.popleft(), outputs)

    def _draw(self, drawn: Iterator[_Fed], pool: Executor, count: int) -> bool:
        """Draws batches, and starts decoding by PIL, until `count` wait or none is left; returns True if a
        batch waits."""
        while len(self._waiting) < count and (fed := next(drawn, None)) is not None:
            self._decode(fed, pool)
            self._waiting.append(fed)
        return bool(self._waiting)

    def _decode(self, fed: _Fed, pool: Executor) -> None:
        """Starts decoding a batch's images that PIL decodes, unless started."""
        for row, i in enumerate(fed.micro.indices.tolist()):
            if i in self._by_pil and row not in fed.pixels:
                fed.pixels[row] = pool.submit(image_of, self.samples[i])

    def _pipeline(self, drawn: Iterator[_Fed], pool: Executor, most: int) -> Pipeline:
        fed_pixels, gpu = bool(self._by_pil), self.device.type == "cuda"
        inputs = train_inputs(self.stream, fed=fed_pixels, turned=self._turned)

        def source() -> tuple:
            # PIL decodes ahead of the batches that DALI has.
            if not self._draw(drawn, pool, 1 + self.prefetch * fed_pixels):
                raise StopIteration
            fed = self._waiting.popleft()
            self._in_flight.append(fed)
            rows = fed.rows
            if fed_pixels:
                count = range(len(fed.micro.indices))
                rows = rows | {
                    "fed": np.array([row in fed.pixels for row in count]),
                    "pixels": [
                        np.ascontiguousarray(fed.pixels[row].result()) if row in fed.pixels else _NOT_FED
                        for row in count
                    ],
                }
            return tuple(rows[name] for name in inputs)

        def graph(x: dict):
            return train_graph(x, gpu, side=self.side, stream=self.stream)

        return _built(source, inputs, graph, self.device, self.threads, self.prefetch, most)

    def _batch(self, fed: _Fed, outputs) -> Batch:
        micro, (*images, shapes) = fed.micro, outputs
        labels = images.pop() if self.stream.masked else None
        _check_shapes([self.samples[i] for i in micro.indices], shapes)
        return Batch(
            views=tuple(torch.from_dlpack(view.as_tensor()).permute(0, 3, 1, 2) for view in images),
            labels_NHW=None if labels is None else torch.from_dlpack(labels.as_tensor()).squeeze(3),
            indices=micro.indices,
            step=micro.step,
            epoch=micro.epoch,
            **pasting(fed.drawn, self.stream, self.device),
        )

    def _give_to_pil(self, suspects: set[int]) -> bool:
        """Finds images that DALI cannot decode, and assigns them to PIL; returns True if there are any.

        DALI does not name the file that it failed on, and a failed pipeline cannot be used again, so each
        suspect is decoded alone.

        Raises:
            UserError: PIL cannot decode the image either, or DALI cannot decode a mask.
        """
        reassigned = False
        for i in sorted(suspects):
            sample = self.samples[i]
            if i not in self._by_pil and _failure(sample.image, decoded_image, self.device) is not None:
                image_of(sample)
                log.say(f"{sample.image}: DALI cannot decode it, PIL does")
                self._by_pil.add(i)
                reassigned = True
            if self.stream.masked and (reason := _failure(sample.mask, decoded_mask,
                                                          self.device)) is not None:
                mask_of(sample)
                raise UserError(
                    f"{sample.mask}: DALI cannot decode it, though PIL can ({reason}); save it again or "
                    "leave it out"
                )
        return reassigned


def _built(
    source: Callable[[], tuple],
    inputs: dict[str, tuple],
    graph: Callable,
    device: torch.device,
    threads: int,
    prefetch: int,
    most: int,
) -> Pipeline:
    """Builds a pipeline.

    Args:
        inputs: values that `source` yields: name to (type, dimensions, layout).
        graph: function from the inputs by name to the outputs.
        most: maximum batch size.
    """
    kinds, dimensions, layouts = map(list, zip(*inputs.values(), strict=True))

    @pipeline_def(enable_conditionals=True)
    def build():
        nodes = fn.external_source(source=source, num_outputs=len(inputs), batch=True, dtype=kinds,
                                   ndim=dimensions, layout=layouts)  # fmt: skip
        return graph({name: nodes[i] for i, name in enumerate(inputs)})

    pipeline = build(
        batch_size=most,
        num_threads=threads,
        device_id=device.index if device.type == "cuda" else None,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    pipeline.build()
    return pipeline


def _check_shapes(samples: Sequence[Sample], shapes) -> None:
    """Checks that images and masks have their sample's size.

    Args:
        samples: N samples.
        shapes: DALI list of N int32 [3] or [6]: height, width, channels of the image, then of the mask if it
            was read.

    Raises:
        UserError: one has another size.
    """
    for sample, shape in zip(samples, np.asarray(shapes.as_array()), strict=True):
        for path, (height, width, _) in zip(
            (sample.image, sample.mask), shape.reshape(-1, 3).tolist(), strict=False
        ):
            if (height, width) != (sample.height, sample.width):
                raise UserError(
                    f"{path}: is {width}x{height} pixels where the index says "
                    f"{sample.width}x{sample.height}; run `stpp prepare` again"
                )


def _failure(path: str, decoded: Callable, device: torch.device) -> str | None:
    """Reason why DALI cannot decode a file; None if it can."""
    pipeline = _built(
        lambda: (path_rows([path]),),
        {"path": (types.UINT8, 1, "")},
        lambda x: decoded(x["path"], device.type == "cuda"),
        device,
        1,
        1,
        1,
    )
    try:
        pipeline.run()
    except RuntimeError as error:
        reason = str(error).partition("encountered:")[2].split("\n\n")[1:2] or [str(error)]
        return " ".join(reason[0].split())[:200]
    return None
