"""Engines of every installed backend on a GPU, against eager."""

import pytest
import torch

from engine_cases import images, model, relative_error
from stpp.inference import build, fold, gate
from stpp.inference.build import BACKENDS, PRECISIONS, Compilation
from stpp.inference.record import Shapes, weights_sha256

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SHAPES = Shapes.parse(["1x33x33", "4x129x193", "8x257x257"])
SIZES = ((1, 33, 33), (3, 64, 201), (4, 129, 193), (8, 257, 257))


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def plan(network, backend, precision, frozen=True):
    return Compilation(network=network, architecture={"name": "any"}, classes=tuple("abcdef"),
                       backend=backend, frozen=frozen,
                precision=precision, weights=weights_sha256(network.state_dict()),
                       device=torch.device("cuda", 0), shapes=SHAPES)


def smooth(*size, seed=0):
    return images(*size, seed=seed).to("cuda").contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def assert_agrees(teacher, made):
    eager = made.eager()
    for turn in range(4):  # from the second call on TensorRT replays a CUDA graph
        for size in SIZES:
            images_NCHW = smooth(*size, seed=turn)
            ours = teacher.logits(images_NCHW)
            assert ours.dtype == torch.float32 and ours.is_cuda
            assert relative_error(ours, eager.logits(images_NCHW)) < build.TOLERANCE[made.precision]
    # untrained networks have smaller margins than half precision keeps
    if made.precision == "fp32":
        (found,) = gate.compare([teacher.logits], eager.logits,
                                [smooth(*SIZES[2], seed=seed) for seed in range(8)])
        assert found.outside >= gate.FLOOR and found.decided > 0.1


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("name", ["deeplabv3plus", "pspnet", "deeplabv2"])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_engines_match_eager(backend, name, precision, tmp_path):
    if reason := BACKENDS[backend].unavailable(torch.device("cuda")):
        pytest.skip(reason)
    made = plan(model(name), backend, precision)
    teacher = build.build(made, tmp_path / "engine")
    assert_agrees(teacher, made)
    record, reason = build.check(tmp_path / "engine", made)
    assert reason is None
    assert_agrees(build.load(tmp_path / "engine", record, made), made)


def test_unfrozen_package_takes_other_weights(tmp_path):
    first, second = (plan(model("deeplabv3plus", seed), "inductor", "bf16", frozen=False) for seed in (0, 1))
    build.build(first, tmp_path / "engine")
    record, reason = build.check(tmp_path / "engine", second)
    assert reason is None
    assert_agrees(build.load(tmp_path / "engine", record, second), second)


def test_folded_networks_on_the_gpu_equal_those_on_the_cpu():
    network = model("deeplabv3plus")
    here, there = (fold.ready(network, device=torch.device(kind), dtype=torch.float32)
                   for kind in ("cpu", "cuda"))
    with torch.inference_mode():
        assert relative_error(there(smooth(2, 65, 97)).cpu(), here(images(2, 65, 97))) < 5e-3  # TF32
