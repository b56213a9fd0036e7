"""Runner of a TensorRT engine on PyTorch tensors, without copies through the host.

It uses its own stream, because TensorRT synchronises in every pass on the legacy stream, PyTorch's default.
Every input shape has a bucket: an execution context and, from its second use on, fixed tensors and a CUDA
graph. A context serves one graph only, because a graph holds the addresses bound at capture.
"""

from collections import OrderedDict
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from stpp import log
from stpp.device import graph_capture, ordered_on_stream, side_stream
from stpp.inference.export import INPUT, OUTPUT

MAX_BUCKETS = 16
"""Maximum shapes with a graph; the least recently used is dropped."""


@dataclass
class Bucket:
    """Execution state for one shape of images."""

    context: Any
    memory: torch.Tensor | None
    """Memory for the context's feature maps, shared by buckets."""
    uses: int = 0
    images_NCHW: torch.Tensor | None = None
    logits_NChw: torch.Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


class Runner:
    """Function from images on the device, of the engine's dtype, to float32 logits.

    Args:
        trt: TensorRT module of `engine`.
        engine: deserialised engine with an input `images` and an output `logits`.
        device: device of the engine.
        keep: objects that must live as long as the engine.
        captures: capture CUDA graphs; False: TensorRT's runtime captures them (TensorRT for RTX).

    Raises:
        ValueError: the engine has other inputs or outputs.
    """

    def __init__(self, trt: ModuleType, engine: Any, *, device: torch.device, keep: tuple = (),
                 captures: bool = True):
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if names != {INPUT, OUTPUT}:
            raise ValueError(f"the engine has {sorted(names)}, expected {INPUT} and {OUTPUT}")
        self._trt, self._engine, self._device, self._keep = trt, engine, device, keep
        types = {trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16,
                 trt.DataType.BF16: torch.bfloat16}
        self._in_dtype, self._out_dtype = (types[engine.get_tensor_dtype(name)] for name in (INPUT, OUTPUT))
        self._stream, self._captures = side_stream(device), captures
        self._memory: torch.Tensor | None = None
        self._buckets: OrderedDict[tuple[int, ...], Bucket] = OrderedDict()
        self._one_context = None if captures else self._with_own_graphs()

    def __call__(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Computes logits, in a new tensor, ordered with the current stream."""
        with ordered_on_stream(self._stream, self._device):
            return self._run(images_NCHW)

    def _run(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        bucket = self._bucket(tuple(images_NCHW.shape))
        bucket.uses += 1
        if bucket.graph is None and bucket.uses > 1 and self._captures:
            self._capture(bucket)
        if bucket.graph is None:
            return self._execute(bucket.context, self._as_input(images_NCHW))
        bucket.images_NCHW.copy_(images_NCHW)
        bucket.graph.replay()
        return bucket.logits_NChw.clone()

    def _bucket(self, shape: tuple[int, ...]) -> Bucket:
        if shape not in self._buckets:
            self._buckets[shape] = self._new_bucket(shape)
            if len(self._buckets) > MAX_BUCKETS:
                if self._stream is not None:
                    self._stream.synchronize()  # sync: a dropped bucket must not be in use
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(shape)
        return self._buckets[shape]

    def _new_bucket(self, shape: tuple[int, ...]) -> Bucket:
        if self._one_context is not None:
            return Bucket(self._one_context, None)
        context = self._engine.create_execution_context(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        _set(context, shape)
        needed = context.update_device_memory_size_for_shapes()
        if self._memory is None or self._memory.numel() < needed:
            self._memory = torch.empty(max(needed, 1), dtype=torch.uint8, device=self._device)
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        return Bucket(context, self._memory)

    def _with_own_graphs(self) -> Any:
        """Makes a context for all shapes, whose runtime captures CUDA graphs itself."""
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

    def _as_input(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return images_NCHW.to(self._in_dtype).contiguous()

    def _execute(self, context: Any, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Queues one pass on the runner's stream."""
        if tuple(context.get_tensor_shape(INPUT)) != tuple(images_NCHW.shape):
            _set(context, tuple(images_NCHW.shape))
        logits_NChw = torch.empty(tuple(context.get_tensor_shape(OUTPUT)), dtype=self._out_dtype,
                                  device=self._device)
        context.set_tensor_address(INPUT, images_NCHW.data_ptr())
        context.set_tensor_address(OUTPUT, logits_NChw.data_ptr())
        if not context.execute_async_v3(0 if self._stream is None else self._stream.cuda_stream):
            raise RuntimeError(f"TensorRT failed on images of shape {tuple(images_NCHW.shape)}")
        return logits_NChw

    def _capture(self, bucket: Bucket) -> None:
        """Captures the graph of a bucket; if that fails, logs it and runs without graphs from then on."""
        shape = tuple(bucket.context.get_tensor_shape(INPUT))
        images_NCHW = torch.zeros(shape, dtype=self._in_dtype, device=self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with graph_capture(graph, self._stream, self._device):
                logits_NChw = self._execute(bucket.context, images_NCHW)
        except RuntimeError as error:
            self._captures = False
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            log.say(f"TensorRT: CUDA graph capture failed ({reason}); the engine runs without graphs")
            return
        bucket.images_NCHW, bucket.logits_NChw, bucket.graph = images_NCHW, logits_NChw, graph


def _set(context: Any, shape: tuple[int, ...]) -> Any:
    if not context.set_input_shape(INPUT, shape):
        raise RuntimeError(f"TensorRT does not take images of shape {shape}")
    return context
