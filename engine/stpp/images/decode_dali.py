"""NVIDIA DALI as a decoder of files in memory: on a GPU JPEGs are decoded there.

DALI gets what every decoder reads alike (`Reading.plain`, whole at its end); PIL decodes the rest. A file
that DALI fails on makes its pipeline unusable: the files of that batch are tried one by one, what DALI
refuses goes to PIL, and a new pipeline is built. So PIL alone says what is bad. With a CPU both read the same
pixels.
"""

from concurrent.futures import Executor

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline, pipeline_def

from stpp.images.containers import looks_whole
from stpp.images.pixels import BadImage, attempt
from stpp.images.planning import Planned


class DaliDecoder:
    """See `stpp.images.batches.Decoder`.

    Args:
        device: where JPEGs are decoded and images come out.
        threads: CPU threads of DALI.
        most: images of the longest batch.
        pool: for what PIL decodes.
    """

    def __init__(self, device: torch.device, threads: int, most: int, pool: Executor):
        self._device, self._threads, self._most, self._pool = device, threads, most, pool
        self._pipelines: dict[int, Pipeline] = {}

    def images(self, planned: list[Planned],
               raw: list[bytes | BadImage]) -> list[np.ndarray | torch.Tensor | BadImage]:
        found: list = [None] * len(raw)
        ours = [i for i, (one, data) in enumerate(zip(planned, raw, strict=True))
                if not isinstance(data, BadImage) and one.reading.plain and looks_whole(data)]
        others = [i for i in range(len(raw)) if i not in ours]
        if ours:
            decoded = self._run([raw[i] for i in ours], self._most)
            if decoded is None:
                decoded = [alone[0] if (alone := self._run([raw[i]], 1)) is not None else attempt(raw[i])
                           for i in ours]
            for i, image in zip(ours, decoded, strict=True):
                found[i] = image
        for i, image in zip(others, self._pool.map(attempt, [raw[i] for i in others]), strict=True):
            found[i] = image
        return found

    def _run(self, raw: list[bytes], most: int) -> list[torch.Tensor] | None:
        """uint8 [H, W, 3] each; None if DALI cannot decode one of them."""
        pipeline = self._pipelines.get(most) or self._pipelines.setdefault(most, self._built(most))
        gpu = self._device.type == "cuda"
        try:
            pipeline.feed_input("files", [np.frombuffer(data, dtype=np.uint8) for data in raw])
            (images,) = pipeline.run(*([torch.cuda.current_stream(self._device)] if gpu else []))
        except RuntimeError:
            del self._pipelines[most]
            return None
        return [torch.from_dlpack(images[i]) for i in range(len(raw))]

    def _built(self, most: int) -> Pipeline:
        gpu = self._device.type == "cuda"

        @pipeline_def(batch_size=most, num_threads=self._threads,
                      device_id=self._device.index if gpu else None, prefetch_queue_depth=1,
                      exec_dynamic=True)
        def build():
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
            return fn.decoders.image(files, device="mixed" if gpu else "cpu", output_type=types.RGB,
                                     adjust_orientation=False, jpeg_fancy_upsampling=True)

        pipeline = build()
        pipeline.build()
        return pipeline
