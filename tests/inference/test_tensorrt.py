"""TensorRT engines: graphs against ONNX Runtime, engines built for GPUs not present here, and the runner on a
stand-in."""

import contextlib
import ctypes
import importlib.util
import sys
import threading
import types

import pytest
import torch

import stream_cases
from engine_cases import CPU, MODELS, images, least_px, model, relative_error, sizes_from, tiny
from stpp.device import CAPTURING, AsyncUpload, graph_capture, on_stream, ordered_on_stream, side_stream
from stpp.errors import UserError
from stpp.inference import export, fold, tensorrt, tensorrt_run, torch_tensorrt
from stpp.inference.record import ANY_SIZE, Shapes
from stpp.inference.tensorrt_run import MAX_BUCKETS, Runner

SHAPES = Shapes.parse(["1x17x17", "2x65x97", "4x193x257"])
SIZES = ((1, 33, 33), (1, 17, 17), (3, 64, 201), (2, 17, 190), (4, 193, 257))
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02}
"""Tolerance relative to the largest logit; ONNX Runtime's kernels and PyTorch's round differently."""
GPUS = ("SM86", "SM89", "SM120")
CUDA = torch.device("cuda")

needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None
                                or importlib.util.find_spec("onnxscript") is None,
                                reason="onnxruntime and onnxscript are not installed (stpp[dev])")
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None,
                               reason="tensorrt-rtx is not installed (stpp[dev])")


def ready(network, dtype):
    return fold.ready(network, device=CPU, dtype=dtype)


def assert_onnx_equals(path, network, dtype, sizes=SIZES):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in sizes:
        images_NCHW = images(*size, dtype=dtype)
        with torch.inference_mode():
            truth = network(images_NCHW)
        ours = torch.from_numpy(session.run(["logits"], {"images": images_NCHW.contiguous().numpy()})[0])
        assert ours.dtype == torch.float32 and ours.shape == truth.shape
        assert relative_error(ours, truth) < TOLERANCE[dtype], size


@needs_onnx
def test_onnx_graph_matches_eager(tmp_path):
    network = ready(tiny(0), torch.float32)
    shapes = export.onnx(network, tmp_path / "tiny.onnx", shapes=ANY_SIZE, dtype=torch.float32)
    assert shapes.smallest[0] == 1 and network.branch[0].fused
    assert_onnx_equals(tmp_path / "tiny.onnx", network, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.onnx"]


@needs_onnx
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MODELS)
def test_onnx_graphs_of_all_models_match_eager(name, tmp_path):
    network = ready(model(name), torch.float32)
    export.onnx(network, tmp_path / "model.onnx", shapes=ANY_SIZE, dtype=torch.float32)
    assert_onnx_equals(tmp_path / "model.onnx", network, torch.float32, sizes_from(least_px(name), SIZES))


def assert_built(graph, network, dtype, shapes, *, capabilities, rows):
    """Builds an engine, and checks its inputs, outputs and types in the parsed network."""
    import tensorrt_rtx as trt

    plan = graph.with_suffix(".plan")
    tensorrt.compile_onnx(graph, plan, shapes=shapes, device=CUDA, capabilities=capabilities)
    assert plan.stat().st_size > sum(p.numel() * p.element_size() for p in network.parameters()) * 0.9
    logger = tensorrt._logger(trt)
    builder = trt.Builder(logger)
    parsed = tensorrt.parse(trt, builder, graph, logger)
    kind = {torch.float32: trt.float32, torch.float16: trt.float16, torch.bfloat16: trt.bfloat16}[dtype]
    taken, given = parsed.get_input(0), parsed.get_output(0)
    assert (parsed.num_inputs, parsed.num_outputs) == (1, 1)
    assert (taken.name, tuple(taken.shape), taken.dtype) == ("images", (-1, 3, -1, -1), kind)
    assert (given.name, tuple(given.shape), given.dtype) == ("logits", (-1, rows, -1, -1), trt.float32)
    layers = map(parsed.get_layer, range(parsed.num_layers))
    types_ = [layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.CONVOLUTION]
    exact = sum(isinstance(module, torch.nn.Conv2d) and module.weight.dtype == torch.float32
                for module in network.modules())  # the classifier, and the backbone's exact parts
    assert types_.count(trt.float32) == (len(types_) if dtype == torch.float32 else exact)
    assert 0 < exact < len(types_) or dtype == torch.float32
    assert set(types_) <= {kind, trt.float32} and len(types_) > 2
    return plan.read_bytes()


@needs_rtx
@needs_onnx
def test_engine_is_built_without_a_gpu(tmp_path, monkeypatch):
    """An engine's ranges can only be read on a GPU; here the builder's input is read back from its
    profile."""
    import tensorrt_rtx as trt

    profiles, made = [], trt.Builder.create_optimization_profile

    def create(builder):
        profiles.append(made(builder))
        return profiles[-1]

    monkeypatch.setattr(trt.Builder, "create_optimization_profile", create)
    network, graph = ready(tiny(0), torch.float16), tmp_path / "tiny.onnx"
    shapes = export.onnx(network, graph, shapes=SHAPES, dtype=torch.float16)
    assert shapes == SHAPES
    engines = {assert_built(graph, network, torch.float16, shapes, capabilities=gpus, rows=3)
               for gpus in (GPUS, GPUS[:1], GPUS[1:2])}
    assert len(engines) == 3
    for profile in profiles:
        assert [tuple(shape) for shape in profile.get_shape("images")] == [
            (1, 3, 17, 17),
            (2, 3, 65, 97),
            (4, 3, 193, 257),
        ]


@needs_rtx
@needs_onnx
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_engines_of_every_model_are_built_for_every_gpu(name, dtype, tmp_path):
    network, graph = ready(model(name), dtype), tmp_path / "model.onnx"
    shapes = export.onnx(network, graph, shapes=SHAPES, dtype=dtype)
    assert shapes.smallest == (1, least_px(name), least_px(name)) and shapes.largest == SHAPES.largest
    # tensorrt-rtx 1.7 has no transposed convolution in bfloat16.
    if (name, dtype) == ("dinov2-small", torch.bfloat16):
        with pytest.raises(UserError, match="--backend tensorrt: .* could not build the engine"):
            assert_built(graph, network, dtype, shapes, capabilities=(GPUS[0],), rows=6)
        return
    for gpu in GPUS:
        assert_built(graph, network, dtype, shapes, capabilities=(gpu,), rows=6)
    if dtype == torch.float16:  # ONNX Runtime computes no convolution in bfloat16
        assert_onnx_equals(graph, network, dtype, sizes_from(least_px(name), SIZES)[:3])


@needs_rtx
@needs_onnx
def test_foreign_onnx_file_is_refused_with_the_reason(tmp_path):
    import tensorrt_rtx as trt

    logger = tensorrt._logger(trt)
    for content in (b"", b"not a graph"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(UserError, match="neither input nor output|cannot parse") as refused:
            tensorrt.parse(trt, trt.Builder(logger), tmp_path / "bad.onnx", logger)
        assert "\n" not in str(refused.value)


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_driver_loading_is_refused_in_one_line(tmp_path):
    (tmp_path / tensorrt.FILE).write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="does not load") as refused:
        tensorrt.load(tmp_path, device=CUDA)
    assert "\n" not in str(refused.value)


# --- missing packages are named
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("absent", "named"), [
    (("tensorrt", "tensorrt_rtx"), "stpp[tensorrt]"),
    (("onnx", "onnxscript"), "stpp[tensorrt]"),
    (("torch_tensorrt",), "stpp[torch-tensorrt]"),
])
def test_a_missing_package_names_its_extra(monkeypatch, absent, named):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name in absent else found(name, *rest))
    backend = torch_tensorrt if absent == ("torch_tensorrt",) else tensorrt
    if "onnx" in absent:
        monkeypatch.setattr(tensorrt, "installed",
                            lambda: ("tensorrt", types.SimpleNamespace(__version__="11.0")))
    assert named in backend.unavailable(CUDA)
    assert "CUDA" in backend.unavailable(CPU)


def graph(*names, calls=0):
    """Builds a graph of parts with these names and that many calls of PyTorch's own."""
    root = torch.nn.Module()
    made = torch.fx.Graph()
    value = made.placeholder("images")
    for name in names:
        root.add_module(name, torch.nn.Identity())
        value = made.call_module(name, (value,))
    for _ in range(calls):
        value = made.call_function(torch.relu, (value,))
    made.output(value)
    return torch.fx.GraphModule(root, made)


@pytest.mark.parametrize("parts", [("_run_on_acc_0",), ("_run_on_acc_0", "_run_on_gpu_1")])
def test_torch_tensorrt_receives_types_and_ranges(monkeypatch, tmp_path, parts):
    """Tests the calls of a stand-in, because no machine here can import the package."""
    asked = {}

    def compile_(exported, **options):
        asked.update(options)
        return graph(*parts)

    def save(compiled, path, **options):
        asked.update(options)
        torch.save(0, path)

    fake = types.SimpleNamespace(
        Input=lambda **options: types.SimpleNamespace(**options),
        dynamo=types.SimpleNamespace(compile=compile_), save=save,
        load=lambda path: types.SimpleNamespace(module=lambda: lambda images_NCHW: (images_NCHW.float(),)))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    network = ready(tiny(0), torch.float16)
    if len(parts) > 1:
        with pytest.raises(UserError, match="_run_on_gpu_1"):
            torch_tensorrt.build(network, tmp_path, shapes=SHAPES, device=CPU, dtype=torch.float16)
        return
    assert torch_tensorrt.build(network, tmp_path, shapes=SHAPES, device=CPU, dtype=torch.float16) == SHAPES
    (taken,) = asked["arg_inputs"]
    assert (taken.min_shape, taken.opt_shape,
            taken.max_shape) == ((1, 3, 17, 17), (2, 3, 65, 97), (4, 3, 193, 257))
    assert taken.dtype == torch.float16 and asked["use_explicit_typing"] and asked["require_full_compilation"]
    assert asked["timing_cache_path"].startswith(str(tmp_path)) and "enabled_precisions" not in asked
    assert [path.name for path in tmp_path.iterdir()] == [torch_tensorrt.FILE]
    assert torch_tensorrt.load(tmp_path,
                               device=CPU)(images(1, 17, 17, dtype=torch.float16)).dtype == torch.float32


def test_partial_conversion_is_detected():
    assert torch_tensorrt.unconverted(graph("_run_on_acc_0")) == []
    assert torch_tensorrt.unconverted(graph("_run_on_acc_0", "_run_on_gpu_1",
                                            "_run_on_acc_2")) == ["_run_on_gpu_1"]
    assert torch_tensorrt.unconverted(graph("_run_on_acc_0", "_run_on_acc_1")) != []
    assert torch_tensorrt.unconverted(graph("_run_on_acc_0", calls=1)) != []
    assert torch_tensorrt.unconverted(graph(calls=2)) != []
    assert torch_tensorrt.unconverted(graph()) != []


# --- the runner, on an engine that computes on the CPU through the given addresses
# ------------------------------


class FakeContext:
    """Context that runs a network on the memory whose addresses are bound, when executed or when a graph is
    replayed."""

    def __init__(self, engine):
        self.engine, self.shape, self.addresses, self.memory = engine, (0, 0, 0, 0), {}, None

    def set_input_shape(self, name, shape):
        assert name == "images"
        self.shape = shape
        return shape[2] <= 64

    def get_tensor_shape(self, name):
        count, _, height, width = self.shape
        return self.shape if name == "images" else (count, 3, -(-height // 2), -(-width // 2))

    def update_device_memory_size_for_shapes(self):
        return self.shape[0] * self.shape[2] * self.shape[3]

    def set_device_memory(self, address, size):
        assert size >= self.update_device_memory_size_for_shapes()
        self.memory = address

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        addresses, shape = dict(self.addresses), self.shape
        self.engine.streams.append(stream)
        assert self.memory is not None or self.engine.recording is None

        def run():
            taken = at(addresses["images"], shape)
            at(addresses["logits"], self.get_tensor_shape("logits")).copy_(self.engine.network(taken))

        self.engine.executed += 1
        if self.engine.recording is not None:
            self.engine.recording.append(run)
        else:
            run()
        return True


def at(address, shape):
    """Returns the contiguous float32 tensor of this shape at an address."""
    count = int(torch.tensor(shape).prod())
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32).view(*shape)


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, network, names=("images", "logits")):
        self.network, self.names, self.recording, self.executed, self.contexts = network, names, None, 0, 0
        self.fails, self.streams = False, []

    def get_tensor_name(self, i):
        return self.names[i]

    def get_tensor_dtype(self, name):
        return "float"

    def create_execution_context(self, how):
        self.contexts += 1
        return FakeContext(self)

    def create_runtime_config(self):
        return types.SimpleNamespace(cuda_graph_strategy=None)


TRT = types.SimpleNamespace(DataType=types.SimpleNamespace(FLOAT="float", HALF="half", BF16="bf16"),
                            ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED=1),
                            CudaGraphStrategy=types.SimpleNamespace(WHOLE_GRAPH_CAPTURE=1))


@pytest.fixture
def engine(monkeypatch):
    """Stand-in engine that records CUDA graphs."""
    found = FakeEngine(ready(tiny(0), torch.float32))

    @contextlib.contextmanager
    def capture(graph, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local" and CAPTURING.locked() and pool == (0, 1)
        found.recording = graph.runs
        try:
            yield
        finally:
            found.recording = None
        if found.fails:
            raise RuntimeError("operation failed due to a previous\nerror during capture")

    class Graph:
        def __init__(self):
            self.runs = []

        def replay(self):
            for run in self.runs:
                run()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return found


@torch.inference_mode()
def assert_runs(runner, engine, *sizes):
    for i, size in enumerate(sizes):
        images_NCHW = images(*size, seed=i)
        assert relative_error(runner(images_NCHW), engine.network(images_NCHW)) < 1e-5


@pytest.mark.parametrize("captures", [True, False])
def test_runner_binds_its_inputs(engine, captures):
    runner = Runner(TRT, engine, device=CPU, captures=captures)
    sizes = [(1, 8, 9), (2, 8, 9), (1, 64, 40), (1, 8, 9), (1, 8, 9), (2, 8, 9), (3, 33, 17), (1, 64, 40),
             (1, 8, 9)]
    assert_runs(runner, engine, *sizes)
    assert engine.contexts == (4 if captures else 1)


def test_shape_is_captured_at_second_use_and_then_replayed(engine):
    runner = Runner(TRT, engine, device=CPU)
    assert_runs(runner, engine, *[(2, 16, 16)] * 6)
    assert engine.executed == 2  # once directly, once captured


def test_results_are_not_overwritten_by_later_ones(engine):
    runner = Runner(TRT, engine, device=CPU)
    with torch.inference_mode():
        kept = [runner(images(1, 16, 16, seed=seed)) for seed in range(4)]
        for seed, logits in enumerate(kept):
            assert relative_error(logits, engine.network(images(1, 16, 16, seed=seed))) < 1e-5


def test_failed_capture_is_logged_once_and_engine_runs_without(engine, capsys):
    engine.fails = True
    runner = Runner(TRT, engine, device=CPU)
    assert_runs(runner, engine, *[(2, 16, 16)] * 4, *[(1, 16, 16)] * 3)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "operation failed due to a previous error during capture" in said[0]
    assert engine.executed == 4 + 1 + 3  # one of them for the capture, which is not tried again
    assert not CAPTURING.locked()


def test_capture_waits_for_loading_threads(engine):
    """`CAPTURING` is the lock that `stpp.images.batches` holds while it decodes and copies."""
    runner = Runner(TRT, engine, device=CPU)
    with CAPTURING:
        waiting = threading.Thread(target=assert_runs, args=(runner, engine, *[(1, 16, 16)] * 2))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and engine.executed == 1  # the first use needs no capture
    waiting.join(20)
    assert not waiting.is_alive() and engine.executed == 2


def test_runner_stream_is_ordered_with_its_caller(engine, monkeypatch):
    log = stream_cases.install(monkeypatch)
    monkeypatch.setattr(tensorrt_run, "side_stream", lambda device: stream_cases.Stream("own", log, 7))
    runner = Runner(TRT, engine, device=CPU)
    assert_runs(runner, engine, *[(1, 16, 16)] * 3)
    assert log == ["own waits for main", "main waits for own"] * 3 and set(engine.streams) == {7}
    log.clear()
    with pytest.raises(RuntimeError, match="65"):
        runner(images(1, 65, 8))
    assert log == ["own waits for main", "main waits for own"]
    log.clear()
    assert_runs(runner, engine, *[(1, 8, 8 + i) for i in range(MAX_BUCKETS)])
    assert log.count("host waits for own") == 1  # one bucket is dropped: its memory may be in use


def test_failed_capture_is_undone(monkeypatch):
    done = []

    def end(index, pool):
        done.append((index, pool))
        raise RuntimeError("not currently recording")

    generator = types.SimpleNamespace(clone_state=lambda: "fresh", graphsafe_set_state=done.append)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 5))

    @contextlib.contextmanager
    def capture(graph, **settings):
        yield
        raise RuntimeError("invalidated")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    with pytest.raises(RuntimeError, match="invalidated"), graph_capture(None, None, torch.device("cuda", 1)):
        pass
    assert done == [(1, (0, 5)), "fresh"] and not CAPTURING.locked()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pytorch_continues_after_a_failed_capture():
    device = torch.device("cuda", torch.cuda.current_device())
    stream = side_stream(device)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError), ordered_on_stream(stream, device), graph_capture(graph, stream, device):
        torch.ones(3, device=device).sum().item()  # a capture does not allow waiting
    assert torch.nn.functional.dropout(torch.ones(1000, device=device)).sum() > 0
    before = torch.cuda.memory_allocated(device)
    for _ in range(5):
        with on_stream(stream):
            arriving = AsyncUpload(torch.empty(1 << 20, device=device), stream=stream)
        arriving.take()
        del arriving
        torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(device) - before < 3 << 22


def test_memory_is_bounded_and_shapes_are_rebuilt(engine):
    runner = Runner(TRT, engine, device=CPU)
    sizes = [(1, 8, 8 + i) for i in range(MAX_BUCKETS + 5)]
    assert_runs(runner, engine, *sizes, *sizes)
    assert len(runner._buckets) == MAX_BUCKETS


def test_unsupported_input_is_an_error(engine):
    with pytest.raises(RuntimeError, match="65"):
        Runner(TRT, engine, device=CPU)(images(1, 65, 8))
    engine.names = ("input", "output")
    with pytest.raises(ValueError, match="input"):
        Runner(TRT, engine, device=CPU)
