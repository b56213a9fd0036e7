"""Samples at native size, without augmentation: the image reader of labelling, plus masks.

Evaluation thus reads images with the same code as labelling.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch

from stpp.clock import Clock
from stpp.errors import UserError
from stpp.images import batches
from stpp.images.planning import Planned
from stpp.images.sources import Item
from stpp.loading.decode import mask_of
from stpp.loading.sample import Batch, Sample


def native_batches(
    samples: Sequence[Sample],
    index_batches: Sequence[Sequence[int]],
    *,
    device: torch.device | str,
    loader: str = "auto",
    threads: int = 1,
) -> Iterator[Batch]:
    """Decodes and normalises batches of samples, in order.

    Args:
        samples: list that the batches index.
        index_batches: indices into `samples`; images of a batch have equal size (`equal_size_batches`).
        device: device of the batches.
        loader: "auto", "dali" or "reference".
        threads: threads that read, and as many that decode, at least 1.

    Returns:
        Batches; `labels_NHW` is None in all if any sample of the list has no mask.

    Raises:
        ValueError: immediately, for an empty batch, images of different sizes, or invalid numbers.
        UserError: while iterating, for a file that is missing, broken, or of another size than its sample.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    index_batches = [np.asarray(batch, dtype=np.int64) for batch in index_batches]
    for batch in index_batches:
        if len({(samples[i].height, samples[i].width) for i in batch}) != 1:
            raise ValueError(f"batch {batch.tolist()} is empty or holds images of different sizes")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _read(samples, index_batches, device, batches.pick(loader), threads)


def _read(
    samples: Sequence[Sample], index_batches: list[np.ndarray], device: torch.device, kind: str, threads: int
) -> Iterator[Batch]:
    labelled = all(sample.mask is not None for sample in samples)
    masks: deque[list[Future]] = deque()
    with ThreadPoolExecutor(threads, "stpp-masks") as pool:

        def tasks() -> Iterator[tuple[int, list[Planned]]]:
            for number, batch in enumerate(index_batches):
                masks.append([pool.submit(mask_of, samples[i]) for i in batch] if labelled else [])
                yield number, [_planned(samples[i], number, position) for position, i in enumerate(batch)]

        stream = batches.batches(
            tasks(),
            device=device,
            kind=kind,
            threads=threads,
            most=max(map(len, index_batches), default=1),
            clock=Clock(),
        )
        try:
            with closing(stream):
                for number, batch in stream:
                    for row, reason in batch.errors.items():
                        sample = samples[index_batches[number][row]]
                        raise UserError(f"{sample.image}: {reason}; run `stpp prepare` again")
                    labels = [mask.result() for mask in masks.popleft()]
                    labels_NHW = torch.from_numpy(np.stack(labels)).to(device) if labels else None
                    yield Batch(views=(batch.images_NCHW,), labels_NHW=labels_NHW,
                                indices=index_batches[number])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _planned(sample: Sample, batch: int, position: int) -> Planned:
    item = Item(key=sample.key, source=sample.image, file=sample.image)
    return Planned(item=item, position=position, reading=sample.reading, batch=batch, error=None)
