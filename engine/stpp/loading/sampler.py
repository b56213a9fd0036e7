"""Which samples a step takes: a pure function of (seed, stage, step), the same on any number of ranks.

Legend: n samples of a list, G global batch, position: a place in the epoch's order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stpp.loading.sample import Preference, Sample, Stream

ORDER_STREAM, CLASS_STREAM = 0, 14
"""Random streams of the epoch's order, and of the classes of the places that are filled by class. The
augmentation's numbers come from other ones (see `philox`)."""
STREAMS_OF_LIST = 16
"""Random streams that belong to each stream of samples: its order, and its views."""


def philox(stream: int, *, seed: int, stage: int, epoch: int,
           counter: tuple[int, int] = (0, 0)) -> np.random.Philox:
    """A counter-based bit generator: what it yields depends on the arguments alone.

    Args:
        stream: 0..255, one number for each use, so that two uses never share random bits.
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
    """float64 [N, width] in [0, 1): each row a function of its position, the block's number and the key.

    Args:
        width: a multiple of 4, the numbers of one count.
        stream: see `philox`.
    """
    out = np.empty((len(positions), width), dtype=np.uint64)
    # A run of consecutive positions (what the sampler yields) is one run of the counter: one generator serves
    # it.
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for run in np.split(np.arange(len(positions)), breaks):
        if len(run):
            counter = (int(positions[run[0]]) * (width // 4), block)
            bits = philox(stream, seed=seed, stage=stage, epoch=epoch, counter=counter)
            out[run] = bits.random_raw(len(run) * width).reshape(len(run), width)
    return (out >> np.uint64(11)) * 2.0**-53


def epoch_order(n: int, *, seed: int, stage: int, epoch: int, number: int = 0) -> np.ndarray:
    """The order of one epoch of stream `number`: an int64 [n] permutation of 0..n-1."""
    if n < 1:
        raise ValueError(f"n is {n}, expected at least one sample")
    # Sorting raw bits, because what NumPy's own `permutation` makes of them may change between its versions.
    bits = philox(ORDER_STREAM + STREAMS_OF_LIST * number, seed=seed, stage=stage, epoch=epoch)
    return np.argsort(bits.random_raw(n), kind="stable").astype(np.int64)


def drawn_classes(preference: Preference, positions: np.ndarray, *, seed: int, stage: int, epoch: int,
                  number: int) -> tuple[np.ndarray, np.ndarray]:
    """The class that each place of an epoch is filled by, int64 [n], -1 for none; and a uniform number for
    its image."""
    u_place, u_class, u_image, _ = uniform_rows(
        positions, 4, stream=CLASS_STREAM + STREAMS_OF_LIST * number, seed=seed, stage=stage, epoch=epoch).T
    ends_C = preference.chances_C.cumsum()
    ends_C /= ends_C[-1]  # or rounding would leave a little for a last class that has no chance
    drawn = np.searchsorted(ends_C[:-1], u_class, side="right")
    return np.where(u_place < preference.share, drawn, -1).astype(np.int64), u_image


def preferred(preference: Preference, positions: np.ndarray, order: np.ndarray, *, seed: int, stage: int,
              epoch: int, number: int) -> np.ndarray:
    """An epoch's order with other images in the places that are filled by class: int64, as `order`."""
    classes, u_image = drawn_classes(preference, positions, seed=seed, stage=stage, epoch=epoch,
                                     number=number)
    order = order.copy()
    for place in np.flatnonzero(classes >= 0):
        shown = preference.members[classes[place]]
        order[place] = shown[int(u_image[place] * len(shown))]
    return order


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What one rank puts through the model at once: a part of one optimiser step's global batch."""

    step: int
    """Optimiser step, counted over the whole stage from 0."""
    epoch: int
    positions: np.ndarray
    """int64 [b]: places in the epoch's order. They key the augmentation."""
    indices: np.ndarray
    """int64 [b]: positions in the list of samples."""


class StepSampler:
    """Cuts every epoch's order into global batches, and these into ranks and accumulation pieces.

    Step k of an epoch takes the positions [k G, (k + 1) G). Each rank takes a contiguous part of them, and
    accumulation cuts that part into contiguous pieces, so the stream of a step does not depend on who
    computes it. What is left at the end of an epoch (less than G) is dropped. A list shorter than G, or than
    the longest list of the stage, is repeated.
    """

    def __init__(self, n_samples: int, batch_global: int, seed: int, stage: int, *, number: int = 0,
                 longest: int = 0, preference: Preference | None = None):
        """Args:
            n_samples: length of the list of samples, at least 1.
            batch_global: samples of one optimiser step over all ranks, at least 1.
            seed, stage, number: key of the epochs' orders; the last is that of the stream.
            longest: length of the stage's longest list, which sets the length of an epoch.
            preference: of the stream; it puts other images in some places of an epoch's order.

        Raises:
            ValueError: an empty list or batch.
        """
        if n_samples < 1 or batch_global < 1:
            raise ValueError(f"n_samples is {n_samples} and batch_global is {batch_global}, expected both at "
                             "least 1")
        self.n_samples, self.batch_global, self.seed, self.stage = n_samples, batch_global, seed, stage
        self.number, self.preference = number, preference
        # A list that is too short is repeated as a whole until it fills a batch; one beside a longer list as
        # far as that goes.
        whole = n_samples * -(-batch_global // n_samples) if n_samples < batch_global else n_samples
        self.n_positions = max(whole, longest)
        self.steps_per_epoch = self.n_positions // batch_global

    def micro_batches(
        self, first_step: int, last_step: int, *, rank: int = 0, world: int = 1, accumulate: int = 1
    ) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches of the steps first_step <= step < last_step, `accumulate` of them
        a step.

        Raises:
            ValueError: batch_global is not divisible by world x accumulate, or the rank or the steps are
                impossible.
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
    """Samplers of the streams of a stage, in step: the longest list sets the steps of an epoch, shorter ones
    are repeated.

    Raises:
        ValueError: two streams have one number, and so would have the same random numbers.
    """
    if len({stream.number for stream in streams}) < len(streams):
        raise ValueError(f"streams have the numbers {[stream.number for stream in streams]}, expected each "
                         "once")

    def made(longest: int) -> list[StepSampler]:
        return [StepSampler(len(stream.samples), batch_global, seed, stage, number=stream.number,
                            longest=longest, preference=stream.preference)
                for stream in streams]

    return made(max(sampler.n_positions for sampler in made(0)))


def equal_size_batches(samples: Sequence[Sample], max_batch: int, *, rank: int = 0,
                       world: int = 1) -> list[list[int]]:
    """Batches of images of one size, each sample in exactly one batch of one rank, for evaluation and
    labelling.

    The batches themselves do not depend on rank and world, only their distribution does: largest batch first,
    each to the rank with the fewest pixels so far. A size's samples are spread evenly over its batches (7
    with at most 4 a
    batch: 4 and 3).

    Returns:
        This rank's batches, each a list of positions in `samples`; largest batches (in pixels) first.

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
