"""Pseudo labels of the samples of a data set: their source, the job, the result."""

import hashlib
from collections.abc import Iterator, Sequence

from stpp.images.sources import Item
from stpp.loading.sample import Sample


class SampleSource:
    """Samples of a prepared data set, ordered by size, so that most batches are full.

    Args:
        lines: what each is called in the id files; None: its path.
    """

    def __init__(self, samples: Sequence[Sample], lines: Sequence[str] | None = None):
        named_by = zip(samples, lines if lines is not None else [sample.image for sample in samples], strict=True)
        self._samples = sorted(named_by, key=lambda pair: (pair[0].height, pair[0].width))

    def items(self) -> Iterator[Item]:
        for sample, line in self._samples:
            yield Item(key=sample.key, source=line.rstrip("\n"), file=sample.image)

    def stamp(self) -> dict:
        digest = hashlib.sha256()
        for sample, _ in self._samples:
            digest.update(f"{sample.key}\0{sample.image}\n".encode())
        return {"kind": "samples", "files": len(self._samples), "digest": digest.hexdigest()}
