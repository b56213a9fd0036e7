"""Copies, constants and cuDNN's search: on a CPU, and with stand-ins for CUDA's streams."""

import pytest
import torch

import stream_cases
from stpp import device
from stpp.images.pixels import normalised

CPU = torch.device("cpu")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_cudnn_searches_only_inside_the_block(monkeypatch, before, wanted):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    with device.cudnn_search(wanted):
        assert torch.backends.cudnn.benchmark is wanted
        with device.cudnn_search(not wanted):
            assert torch.backends.cudnn.benchmark is not wanted
        assert torch.backends.cudnn.benchmark is wanted
    assert torch.backends.cudnn.benchmark is before
    with pytest.raises(KeyError), device.cudnn_search(wanted):
        raise KeyError
    assert torch.backends.cudnn.benchmark is before


def test_constant_is_made_once_also_for_training():
    device.constant.cache_clear()
    with torch.inference_mode():
        first = device.constant((1.5, 2.0, 3.0), CPU)
    assert device.constant((1.5, 2.0, 3.0), CPU) is first and first.tolist() == [1.5, 2.0, 3.0]
    assert device.constant((2.0, 2.0, 3.0), CPU) is not first
    assert not first.is_inference()
    weights = torch.ones(3, requires_grad=True)
    (weights * first).sum().backward()  # an inference tensor could not be saved for this
    assert weights.grad.tolist() == [1.5, 2.0, 3.0]
    normalised(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
    made = device.constant.cache_info().misses
    normalised(torch.zeros(4, 5, 6, 3, dtype=torch.uint8))
    assert device.constant.cache_info().misses == made


def test_cpu_copies_nothing():
    assert device.side_stream(CPU) is None and device.copy_stream(CPU) is None
    staged = device.staging(2, 3, dtype=torch.uint8, device=CPU)
    assert staged.shape == (2, 3) and staged.dtype == torch.uint8 and not staged.is_pinned()
    with device.on_stream(None), device.ordered_on_stream(None, CPU):
        (taken,) = device.AsyncUpload(staged, stream=None).take()
    (read,) = device.Readback(staged).read()
    assert taken is staged and read is staged


def test_copies_to_a_device_share_one_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream_cases.Stream(str(device), []))
    device.copy_stream.cache_clear()
    zero, one = (torch.device("cuda", index) for index in (0, 1))
    assert device.copy_stream(zero) is device.copy_stream(torch.device("cuda:0"))
    assert device.copy_stream(one).name == "cuda:1"
    assert device.side_stream(zero) is not device.side_stream(zero)
    device.copy_stream.cache_clear()


def test_consumer_of_a_copy_waits_on_the_device_and_keeps_memory(monkeypatch):
    log = stream_cases.install(monkeypatch)
    side, first = stream_cases.Stream("side", log), torch.zeros(2, 3)
    arriving = device.AsyncUpload(first, torch.zeros(2), stream=side)
    side.record_event()  # what is queued behind is not waited for
    assert arriving.take()[0] is first
    assert log == ["side event 1", "side event 2", "main waits for side event 1", "main uses 2-d float32",
                   "main uses 1-d float32"]


def test_alternating_streams_wait_for_each_other_also_after_errors(monkeypatch):
    log = stream_cases.install(monkeypatch)
    own = stream_cases.Stream("own", log)
    with pytest.raises(KeyError), device.ordered_on_stream(own, CPU):
        log.append(f"work on {torch.cuda.current_stream().name}")
        raise KeyError
    assert log == ["own waits for main", "work on own", "main waits for own"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_are_complete_next_to_gpu_work():
    gpu = torch.device("cuda", torch.cuda.current_device())
    side, ballast, found = device.side_stream(gpu), torch.randn(2048, 2048, device=gpu), []
    for number in range(50):
        staged = device.staging(1 << 20, dtype=torch.int64, device=gpu)
        assert staged.is_pinned()
        staged.fill_(number)
        with device.on_stream(side):
            arriving = device.AsyncUpload(staged.to(gpu, non_blocking=True), stream=side)
        del staged
        ballast @ ballast
        (values,) = arriving.take()
        found.append(device.Readback(values.min(), values.max()))
        del values
    for number, one in enumerate(found):
        low, high = one.read()
        assert (int(low), int(high)) == (number, number) and not low.is_cuda and not low.is_pinned()
