"""Cases shared by the tests of engines: a tiny network with its checkpoints, and the real models at their
smallest."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from stpp import checkpoint
from stpp.models.build import build_model
from stpp.models.layers import DilatedConv3x3, spread

CPU = torch.device("cpu")
CLASSES = ["road", "car", "sky"]
MODELS = {
    "deeplabv3plus": ("deeplabv3plus", "resnet18", 16),
    "pspnet": ("pspnet", "resnet18", 16),
    "deeplabv2": ("deeplabv2", "resnet18", 16),
    "efficientnet-lite0": ("deeplabv3plus", "efficientnet-lite0", 16),
    "dinov2-small": ("dpt", "dinov2-small", None),
}
"""Network, backbone and output stride by the name of a case."""
QUICK = ("deeplabv3plus", "pspnet")
"""Cases that are exported in seconds."""


class Tiny(nn.Module):
    """Network of parts that are hard for engines: batch norms, a dilated convolution, a pooled branch, a
    small classifier."""

    classifier_name = "classifier"
    least_px = 2

    def __init__(self, classes: int = len(CLASSES)):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.branch = nn.Sequential(DilatedConv3x3(8, 8, 6), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.classifier = nn.Conv2d(16, classes, 1)

    def forward(self, images_NCHW):
        x_NCHW = self.bn1(self.conv1(images_NCHW)).relu()
        pooled = spread(x_NCHW.mean((2, 3), keepdim=True), x_NCHW.shape[2:])
        return self.classifier(torch.cat([self.branch(x_NCHW), pooled], 1))


def warmed(network: nn.Module, size: tuple[int, int] = (49, 65)) -> nn.Module:
    """Gives batch norms statistics, so that folding matters, and a classifier that separates classes."""
    with torch.no_grad():
        for _ in range(2):
            network.train()(torch.randn(4, 3, *size) * 2 + 1)
        for name, factor in network.named_parameters():
            if name.endswith("gamma"):  # fresh ones are so small that the blocks would not count
                factor.uniform_(0.5, 1.5)
        for module in network.get_submodule(network.classifier_name).modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(4)
                module.bias.uniform_(-3, 3)
    return network.eval()


def model(name: str, seed: int = 0, classes: int = 6) -> nn.Module:
    """Builds one of `MODELS`."""
    torch.manual_seed(seed)
    kind, backbone, output_stride = MODELS[name]
    return warmed(build_model(kind, backbone, classes, output_stride),
                  (42, 70) if kind == "dpt" else (49, 65))


def seeing_all_classes() -> nn.Module:
    """Builds a network that predicts every class; with random weights it would predict one class everywhere,
    with crops and without."""
    made = model("deeplabv3plus", seed=1)
    with torch.no_grad():
        logits = made(images(4, 70, 90))
        made.classifier.bias -= logits.mean((0, 2, 3))
        for value in (made.classifier.weight, made.classifier.bias):
            value *= 3 / logits.std((0, 2, 3)).reshape(-1, *[1] * (value.dim() - 1))
    return made


def saved(path: Path, network: nn.Module, classes: Iterable[str], **architecture: object) -> Path:
    """Saves a checkpoint of DeepLabV3+ on ResNet-18, with further entries of the architecture."""
    checkpoint.save(path, model=network.state_dict(), classes=list(classes),
                    architecture={"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16}
                    | architecture)
    return path


def least_px(name: str) -> int:
    """Smallest side of a model's graph: two cells of the last map at stride 16; for DPT three patches, which
    give two cells."""
    return 35 if name == "dinov2-small" else 17


def sizes_from(least_px: int, sizes: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Selects the inputs (images, rows, columns) that a graph accepts."""
    return [size for size in sizes if min(size[1:]) >= least_px]


def tiny(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return warmed(Tiny())


def save(path: Path, seed: int) -> Path:
    """Saves a checkpoint of a `tiny` network."""
    checkpoint.save(path, model=tiny(seed).state_dict(), classes=CLASSES, architecture={"name": "tiny"})
    return path


def load(path: Path) -> tuple[nn.Module, list[str], dict]:
    """Replaces `stpp.models.trained.load_network` of the real models."""
    saved = checkpoint.load(path)
    network = Tiny(len(saved["classes"]))
    network.load_state_dict(saved["model"])
    return network.eval(), list(saved["classes"]), saved["architecture"]


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draws smooth pictures [N, 3, H, W], channels_last: in pure noise every pixel would be a near-tie."""
    count, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 7, generator=generator) * 2
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return smooth.to(dtype).contiguous(memory_format=torch.channels_last)


def relative_error(values: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((values.float() - truth.float()).abs().max() / truth.float().abs().max())
