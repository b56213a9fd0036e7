"""Sampler: assigns samples to steps as a pure function of (seed, stage, step), for any number of ranks.

Legend: n samples of a list, G global batch, position: index in the epoch's order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stpp.loading.sample import Preference, Sample, Stream

ORDER_STREAM, CLASS_STREAM = 0, 14
"""Random streams of the epoch's order, and of the classes at positions filled by class; augmentation uses
others (see `philox`)."""
STREAMS_OF_LIST = 16
"""Random streams per stream of samples: its order, and its views."""


def philox(stream: int, *, seed: int, stage: int, epoch: int,
           counter: tuple[int, int] = (0, 0)) -> np.random.Philox:
    """Makes a counter-based bit generator; its output depends on the arguments alone.

    Args:
        stream: 0..255, a different number for each use, so that two uses never share random bits.
        seed, stage, epoch: non-negative; below 2^64, 2^24 and 2^32.
        counter: the low two of Philox's four 64-bit counter words. One count of the first word is four 64-bit
            numbers.

    Raises:
        ValueError: a key is negative or too large.
    """
    for name, value, bits in (("stream", stream, 8), ("seed", seed, 64), ("stage", stage, 24),
                              ("epoch", epoch, 32)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} is {value}, expected 0 <= {name} < 2^{bits}")
    key = np.array([seed, stream << 56 | stage << 32 | epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([*counter, 0, 0], dtype=np.uint64))


def uniform_rows(positions: np.ndarray, width: int, *, stream: int, seed: int, stage: int, epoch: int,
                 block: int = 0) -> np.ndarray:
    """Draws float64 [N, width] in [0, 1): each row depends on its position, the block's number and the key.

    Args:
        width: multiple of 4, the numbers of one count.
        stream: see `philox`.
    """
    out = np.empty((len(positions), width), dtype=np.uint64)
    # Consecutive positions (as from the sampler) are consecutive counts: one generator draws them.
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for run in np.split(np.arange(len(positions)), breaks):
        if len(run):
            counter = (int(positions[run[0]]) * (width // 4), block)
            bits = philox(stream, seed=seed, stage=stage, epoch=epoch, counter=counter)
            out[run] = bits.random_raw(len(run) * width).reshape(len(run), width)
    return (out >> np.uint64(11)) * 2.0**-53


def epoch_order(n: int, *, seed: int, stage: int, epoch: int, number: int = 0) -> np.ndarray:
    """Draws the order of one epoch of stream `number`: an int64 [n] permutation of 0..n-1."""
    if n < 1:
        raise ValueError(f"n is {n}, expected at least one sample")
    # Sorting raw bits, because the result of NumPy's `permutation` may change between versions.
    bits = philox(ORDER_STREAM + STREAMS_OF_LIST * number, seed=seed, stage=stage, epoch=epoch)
    return np.argsort(bits.random_raw(n), kind="stable").astype(np.int64)


def drawn_classes(preference: Preference, positions: np.ndarray, *, seed: int, stage: int, epoch: int,
                  number: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the class of each position of an epoch, int64 [n], -1 for none; and a uniform number that selects
    its image."""
    u_place, u_class, u_image, _ = uniform_rows(
        positions, 4, stream=CLASS_STREAM + STREAMS_OF_LIST * number, seed=seed, stage=stage, epoch=epoch).T
    ends_C = preference.chances_C.cumsum()
    ends_C /= ends_C[-1]  # or rounding could select a last class of probability 0
    drawn = np.searchsorted(ends_C[:-1], u_class, side="right")
    return np.where(u_place < preference.share, drawn, -1).astype(np.int64), u_image


def preferred(preference: Preference, positions: np.ndarray, order: np.ndarray, *, seed: int, stage: int,
              epoch: int, number: int) -> np.ndarray:
    """Replaces the images at positions filled by class in an epoch's order: int64, as `order`."""
    classes, u_image = drawn_classes(preference, positions, seed=seed, stage=stage, epoch=epoch,
                                     number=number)
    order = order.copy()
    for place in np.flatnonzero(classes >= 0):
        members = preference.members[classes[place]]
        order[place] = members[int(u_image[place] * len(members))]
    return order


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Part of an optimiser step's global batch that one rank processes in one pass."""

    step: int
    """Optimiser step, counted over the whole stage from 0."""
    epoch: int
    positions: np.ndarray
    """int64 [b]: positions in the epoch's order; key of the augmentation."""
    indices: np.ndarray
    """int64 [b]: indices in the list of samples."""


class StepSampler:
    """Sampler that splits every epoch's order into global batches, ranks and accumulation passes.

    Step k of an epoch takes the positions [k G, (k + 1) G). Each rank takes a contiguous part of them, and
    accumulation splits that part into contiguous pieces, so the samples of a step do not depend on the number
    of ranks. Fewer than G samples at the end of an epoch are dropped. A list shorter than G, or than the
    longest list of the stage, is repeated.
    """

    def __init__(self, n_samples: int, batch_global: int, seed: int, stage: int, *, number: int = 0,
                 longest: int = 0, preference: Preference | None = None):
        """Args:
            n_samples: length of the list of samples, at least 1.
            batch_global: samples of one optimiser step over all ranks, at least 1.
            seed, stage, number: key of the epochs' orders; `number` is that of the stream.
            longest: length of the stage's longest list, which determines the length of an epoch.
            preference: preference of the stream, which replaces images at some positions.

        Raises:
            ValueError: an empty list or batch.
        """
        if n_samples < 1 or batch_global < 1:
            raise ValueError(f"n_samples is {n_samples} and batch_global is {batch_global}, expected both at "
                             "least 1")
        self.n_samples, self.batch_global, self.seed, self.stage = n_samples, batch_global, seed, stage
        self.number, self.preference = number, preference
        # A list shorter than a batch is repeated as a whole; one shorter than `longest` up to that length.
        whole = n_samples * -(-batch_global // n_samples) if n_samples < batch_global else n_samples
        self.n_positions = max(whole, longest)
        self.steps_per_epoch = self.n_positions // batch_global

    def micro_batches(
        self, first_step: int, last_step: int, *, rank: int = 0, world: int = 1, accumulate: int = 1
    ) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches of the steps first_step <= step < last_step, `accumulate` per
        step.

        Raises:
            ValueError: batch_global is not divisible by world x accumulate, or the rank or the steps are
                invalid.
        """
        if world < 1 or accumulate < 1 or self.batch_global % (world * accumulate):
            raise ValueError(
                f"batch_global {self.batch_global} is not divisible by world {world} x accumulate "
                f"{accumulate}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}, expected 0 <= rank < world {world}")
        if not 0 <= first_step <= last_step:
            raise ValueError(f"steps are [{first_step}, {last_step}), expected 0 <= first_step <= last_step")
        return self._micro_batches(first_step, last_step, rank, world, accumulate)

    def _micro_batches(
        self, first_step: int, last_step: int, rank: int, world: int, accumulate: int
    ) -> Iterator[MicroBatch]:
        per_rank = self.batch_global // world
        piece = per_rank // accumulate
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(first_step, last_step):
            step_epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if step_epoch != epoch:
                epoch = step_epoch
                key = {"seed": self.seed, "stage": self.stage, "epoch": epoch, "number": self.number}
                order = epoch_order(self.n_positions, **key) % self.n_samples
                if self.preference is not None:
                    order = preferred(self.preference, np.arange(self.n_positions), order, **key)
            start = step_in_epoch * self.batch_global + rank * per_rank
            for first in range(start, start + per_rank, piece):
                yield MicroBatch(
                    step=step,
                    epoch=epoch,
                    positions=np.arange(first, first + piece, dtype=np.int64),
                    indices=order[first : first + piece],
                )


def stage_samplers(streams: Sequence[Stream], batch_global: int, *, seed: int,
                   stage: int) -> list[StepSampler]:
    """Makes the samplers of a stage's streams; the longest list determines the steps of an epoch, shorter
    ones are repeated.

    Raises:
        ValueError: two streams have the same number, and so the same random numbers.
    """
    if len({stream.number for stream in streams}) < len(streams):
        raise ValueError(f"streams have the numbers {[stream.number for stream in streams]}, expected each "
                         "once")

    def samplers(longest: int) -> list[StepSampler]:
        return [StepSampler(len(stream.samples), batch_global, seed, stage, number=stream.number,
                            longest=longest, preference=stream.preference)
                for stream in streams]

    return samplers(max(sampler.n_positions for sampler in samplers(0)))


def equal_size_batches(samples: Sequence[Sample], max_batch: int, *, rank: int = 0,
                       world: int = 1) -> list[list[int]]:
    """Groups samples into batches of one image size, each sample in one batch of one rank, for evaluation.

    The batches do not depend on rank and world, only their distribution does: largest batch first, each to
    the rank with the fewest pixels so far. Samples of a size are spread evenly over its batches (7 with at
    most 4 per batch: 4 and 3).

    Returns:
        This rank's batches, each a list of indices in `samples`; largest batches (in pixels) first.

    Raises:
        ValueError: max_batch or world below 1, or rank outside 0..world-1.
    """
    if max_batch < 1 or world < 1 or not 0 <= rank < world:
        raise ValueError(f"max_batch {max_batch}, rank {rank}, world {world}: expected max_batch >= 1, rank "
                         "< world")
    groups: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault((sample.height, sample.width), []).append(index)
    batches: list[tuple[int, list[int]]] = []
    for (height, width), members in groups.items():
        count = -(-len(members) // max_batch)
        short, longer = divmod(len(members), count)
        start = 0
        for number in range(count):
            stop = start + short + (number < longer)
            batches.append((height * width * (stop - start), members[start:stop]))
            start = stop
    batches.sort(key=lambda batch: (-batch[0], batch[1][0]))
    pixels_of_rank = [0] * world
    mine = []
    for pixels, members in batches:
        lightest = pixels_of_rank.index(min(pixels_of_rank))
        pixels_of_rank[lightest] += pixels
        if lightest == rank:
            mine.append(members)
    return mine
