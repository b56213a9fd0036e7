"""Batch-norm statistics of given images, against a plain form; and frozen statistics."""

import contextlib

import pytest
import torch
from torch import nn

import engine_cases as cases
from stpp import distributed
from stpp.training.batch_norm import recalibrated

HERE = distributed.World(device=torch.device("cpu"))


class Small(nn.Module):
    """Two norms, the second after the first; and dropout, which must be off."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.3)
        self.dropout = nn.Dropout(0.5)
        for norm in (self.first, self.second):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, images_NCHW):
        return self.second(self.dropout(self.first(images_NCHW)).relu())


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 5, 7, generator=generator) * (i + 1) + i for i in range(count)]


def recalibrate(network, images=None):
    return recalibrated(network, lambda: iter(images or batches()), HERE, autocast=contextlib.nullcontext())


@pytest.mark.parametrize("training", [False, True])
def test_statistics_are_means_over_batches_and_are_restored(training):
    network = Small().train(training)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    seen = [(images.mean((0, 2, 3)), images.var((0, 2, 3))) for images in batches()]
    inner = [((images - images.mean((0, 2, 3), keepdim=True))
              / (images.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()).relu()
             for images in batches()]
    with recalibrate(network):
        assert network.training == training
        for norm, maps in ((network.first, batches()), (network.second, inner)):
            for found, plain in ((norm.running_mean, [each.mean((0, 2, 3)) for each in maps]),
                                 (norm.running_var, [each.var((0, 2, 3)) for each in maps])):
                torch.testing.assert_close(found, torch.stack(plain).mean(0), rtol=1e-4, atol=1e-5)
        network.eval()(batches(1)[0])  # as in validation; changes nothing
        means = torch.stack([mean for mean, _ in seen])
        torch.testing.assert_close(network.first.running_mean, means.mean(0))
        network.train(training)
    assert network.training == training and network.first.momentum == 0.1 and network.second.momentum == 0.3
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_statistics_are_restored_after_a_failure():
    network = Small().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(RuntimeError), recalibrate(network):
        raise RuntimeError
    with pytest.raises(RuntimeError), recalibrate(network, [torch.zeros(1, 2, 3, 3)]):
        pass
    assert network.training and network.second.momentum == 0.3
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("freeze", ["freeze_backbone", "freeze_batch_norm"])
def test_frozen_norms_keep_their_statistics(freeze):
    network = cases.model("deeplabv3plus", seed=1).train()
    getattr(network, freeze)()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = [cases.images(2, 40, 40)]
    network.train()(images[0])
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and not any(key.startswith("backbone.") for key in changed)
    with recalibrate(network, images):
        changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
        assert changed and not any(key.startswith("backbone.") for key in changed)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert any(name.startswith("backbone.") for name in trained) == (freeze == "freeze_batch_norm")
