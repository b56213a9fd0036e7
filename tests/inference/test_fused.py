"""Fused convolutions of folded networks: values, keys, and which layers are fused."""

import copy

import pytest
import torch
from torch import nn

from engine_cases import warmed
from stpp.errors import UserError
from stpp.inference import fold, fused
from stpp.inference.open import EagerPredictor, open_predictor
from stpp.models.build import build_model

CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu,
                                  pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def trained(name: str = "deeplabv3plus", backbone: str = "resnet18") -> nn.Module:
    torch.manual_seed(1)
    return warmed(build_model(name, backbone, 5, 16), (49, 65))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name,backbone", [("deeplabv3plus", "resnet18"), ("deeplabv3plus", "resnet50"),
                                           ("pspnet", "resnet18"), ("deeplabv2", "resnet18")])
def test_fused_network_computes_the_same(name, backbone, dtype, tolerance, device):
    plain = fold.ready(trained(name, backbone), device=torch.device(device), dtype=dtype)
    ready = fused.fuse(copy.deepcopy(plain))
    assert list(ready.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 65, 81, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        found, expected = ready(images.clone()), plain(images.clone())
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert found.dtype == torch.float32


def test_all_but_stem_shortcuts_and_classifier_are_fused(monkeypatch):
    called = []
    conv_relu = fused.conv_relu
    monkeypatch.setattr(fused, "conv_relu", lambda conv, *maps: called.append(conv) or conv_relu(conv, *maps))
    ready = fused.fuse(fold.ready(trained(), device=CPU, dtype=torch.float32))
    with torch.inference_mode():
        ready(torch.randn(1, 3, 33, 33))
    names = {id(module): name for name, module in ready.named_modules()}
    left = {names[id(module)] for module in ready.modules() if isinstance(module, nn.Conv2d)
            and module not in called}
    assert {name for name in left if "downsample" not in name} == {"backbone.conv1", "classifier"}
    assert len(called) == len(set(called))


def test_requested_on_cuda_only(monkeypatch):
    cuda = torch.device("cuda")
    assert not fused.requested(cuda)
    monkeypatch.setenv(fused.VARIABLE, "1")
    assert fused.requested(cuda) and not fused.requested(CPU)


@pytest.fixture
def labelling(tmp_path, monkeypatch):
    """Opens the fused predictor of a checkpoint whose classes vary over an image."""
    network, architecture = trained(), {"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16}
    nn.init.zeros_(network.classifier.bias)
    monkeypatch.setattr(fused, "requested", lambda device: True)
    return lambda: open_predictor(tmp_path / "best.pt", device=CPU, backend="eager", precision="fp32",
                                  load=lambda path: (network, list("abcde"), architecture))


def test_labelling_runs_fused_convolutions_behind_the_gate(labelling):
    images = torch.randn(1, 3, 33, 33).contiguous(memory_format=torch.channels_last)
    predictor = labelling()
    assert predictor.identity.backend == "eager-fused" and fusions(predictor._engine)
    assert not any(fusions(reference.__self__) for reference in predictor._make_references())
    with torch.inference_mode():
        predictor.logits(images)
    assert predictor.agreement.outside > 0.999


def test_wrong_fused_convolution_is_rejected(labelling, monkeypatch):
    conv_relu = fused.conv_relu
    monkeypatch.setattr(fused, "conv_relu", lambda *args: -conv_relu(*args))
    images = torch.randn(1, 3, 33, 33).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), pytest.raises(UserError, match="eager-fused fp32 is rejected"):
        labelling().logits(images)


def fusions(predictor: EagerPredictor) -> list[nn.Module]:
    """Lists the residual blocks of a predictor that are fused."""
    return [module for module in predictor._network.modules()
            if getattr(module.forward, "__func__", None) is fused._basic_block]
