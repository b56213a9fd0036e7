"""Pseudo labels of photographs by a real network, against the method in plain PyTorch."""

import numpy as np
import pytest
import torch
from PIL import Image

import label_cases as cases
from stpp import checkpoint
from stpp.config import DataConfig
from stpp.images.masks import read_index_mask
from stpp.images.sources import open_source
from stpp.inference import views
from stpp.inference.predictors import from_paths
from stpp.label.assignment import Assignment
from stpp.label.labels import label_corpus
from stpp.models.build import build_model
from stpp.models.trained import load_network

CLASSES = 11


@torch.no_grad()
def settled(network: torch.nn.Module, images_NCHW: torch.Tensor) -> torch.nn.Module:
    """Gives random weights batch-norm statistics of photographs and a balanced classifier."""
    network.train()
    for _ in range(3):
        network(images_NCHW)
    network.eval()
    logits = network(images_NCHW)
    (layer,) = (module for module in network.get_submodule(network.classifier_name).modules()
                if isinstance(module, torch.nn.Conv2d))
    scale = 3 / logits.std((0, 2, 3))
    layer.weight *= scale.view(-1, 1, 1, 1)
    layer.bias.copy_((layer.bias - logits.mean((0, 2, 3))) * scale)
    return network


class Plain:
    def __init__(self, network):
        self.logits = network.eval()


@pytest.mark.slow
@torch.no_grad()
def test_photographs_of_mixed_sizes_match_the_method(camvid, tmp_path):
    paths = (
        sorted((camvid / "images" / "val").rglob("*.png"))[::40]
        or sorted((camvid / "images" / "val").rglob("*.jpg"))[::40]
    )
    source = tmp_path / "in"
    source.mkdir()
    for i, size in enumerate([(480, 360), (241, 187), (241, 187), (99, 203), (64, 33)]):
        with Image.open(paths[i % len(paths)]) as image:
            image.convert("RGB").resize(size).save(source / f"{i}.png")
    torch.manual_seed(3)
    values = torch.from_numpy(np.array(Image.open(source / "0.png"))).permute(2, 0, 1)[None].float() / 255
    seen = (torch.cat([values, values.flip(3)]) - 0.45) / 0.225
    network = settled(build_model("deeplabv3plus", "resnet18", CLASSES, 16), seen)
    trained = tmp_path / "best.pt"
    checkpoint.save(trained, model=network.state_dict(), classes=[f"c{i}" for i in range(CLASSES)],
                    architecture={"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16})
    label_corpus(from_paths([trained], torch.device("cpu"), mode="stpp", backend="eager", precision="fp32"),
                 Assignment(source=open_source(str(source)), out=tmp_path / "out",
                            data=DataConfig(threads=1)), cases.HERE)
    plain, same, total, classes = Plain(load_network(trained)[0]), 0, 0, set()
    for path in sorted(source.iterdir()):
        mask = read_index_mask(tmp_path / "out" / "masks" / path.name)
        truth = cases.plain_mask(plain, path, *views.VIEWS["stpp"])
        assert mask.shape == truth.shape
        same, total = same + (mask == truth).sum(), total + mask.size
        classes |= set(np.unique(truth))
    assert same / total >= 0.9999 and len(classes) >= 5
