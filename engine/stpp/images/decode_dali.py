"""NVIDIA DALI decoder of in-memory files; on a GPU it decodes JPEGs there.

DALI decodes only files that every decoder reads alike (`Reading.plain`, complete); PIL decodes the rest. A
file that DALI fails on breaks its pipeline: the batch is then decoded file by file, failures go to PIL, and a
new pipeline is built. PIL alone thus decides which files are bad. On a CPU both decoders give the same
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
    """DALI implementation of `stpp.images.batches.Decoder`.

    Args:
        device: device of JPEG decoding and of the output.
        threads: CPU threads of DALI.
        most: images of the largest batch.
        pool: thread pool for PIL decoding.
    """

    def __init__(self, device: torch.device, threads: int, most: int, pool: Executor):
        self._device, self._threads, self._most, self._pool = device, threads, most, pool
        self._pipelines: dict[int, Pipeline] = {}

    def images(self, planned: list[Planned],
               raw: list[bytes | BadImage]) -> list[np.ndarray | torch.Tensor | BadImage]:
        images: list = [None] * len(raw)
        for_dali = [i for i, (entry, data) in enumerate(zip(planned, raw, strict=True))
                    if not isinstance(data, BadImage) and entry.reading.plain and looks_whole(data)]
        for_pil = [i for i in range(len(raw)) if i not in for_dali]
        if for_dali:
            decoded = self._run([raw[i] for i in for_dali], self._most)
            if decoded is None:
                decoded = [alone[0] if (alone := self._run([raw[i]], 1)) is not None else attempt(raw[i])
                           for i in for_dali]
            for i, image in zip(for_dali, decoded, strict=True):
                images[i] = image
        for i, image in zip(for_pil, self._pool.map(attempt, [raw[i] for i in for_pil]), strict=True):
            images[i] = image
        return images

    def _run(self, raw: list[bytes], most: int) -> list[torch.Tensor] | None:
        """Decoded images, uint8 [H, W, 3] each; None if DALI cannot decode one of them."""
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
