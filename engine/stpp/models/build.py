"""Networks and backbones by name, which of them go together, and a network's parameters split into backbone
and head."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from stpp.config import ModelConfig
from stpp.errors import UserError
from stpp.models import network
from stpp.models.deeplabv2 import DeepLabV2
from stpp.models.deeplabv3plus import DeepLabV3Plus
from stpp.models.dinov2 import DINOv2
from stpp.models.dpt import DPT
from stpp.models.efficientnet_lite import EfficientNetLite
from stpp.models.pspnet import PSPNet
from stpp.models.resnet import ResNet

Settings = Mapping[str, Any]
OUTPUT_STRIDES = (8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class BackboneRecipe:
    """A backbone as recipes name it."""

    make: Callable[..., network.Backbone]
    """(name, output stride, **settings) -> backbone; (name, **settings) where the stride is fixed."""
    output_stride: int | None
    """Taken where none is asked for; None: fixed by the patches of a transformer."""
    published_stride: int | None = None
    """That of all published networks on it, whose files do not tell it; None: such a file needs the user's
    word."""
    optional: frozenset[str] = frozenset()
    """Settings of the backbone that a recipe may change."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network as recipes name it."""

    make: Callable[..., network.Network]
    """(backbone, number of classes, **settings) -> network."""
    backbones: Mapping[str, Settings]
    """What it is made on, by name, and with which settings there."""
    optional: frozenset[str] = frozenset()
    """Settings of the network that a recipe may change."""


PLAIN, DEEP_STEM = ("resnet18", "resnet50", "resnet101"), ("resnet50-deep-stem", "resnet101-deep-stem")
LITE = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
BACKBONES: dict[str, BackboneRecipe] = {
    **dict.fromkeys(PLAIN, BackboneRecipe(make=ResNet, output_stride=8, published_stride=8)),
    **dict.fromkeys(DEEP_STEM, BackboneRecipe(make=ResNet, output_stride=16)),
    **dict.fromkeys(LITE, BackboneRecipe(make=EfficientNetLite, output_stride=16)),
    **dict.fromkeys(
        ("dinov2-small", "dinov2-base", "dinov2-large", "dinov2-giant"),
        BackboneRecipe(make=DINOv2, output_stride=None, optional=frozenset({"checkpoint_activations"})),
    ),
}
DROPOUT = frozenset({"dropout"})
NETWORKS: dict[str, Architecture] = {
    "deeplabv3plus": Architecture(
        make=DeepLabV3Plus,
        optional=DROPOUT,
        backbones={
            **dict.fromkeys(PLAIN, {}),
            **dict.fromkeys(DEEP_STEM, {"dropout": False}),  # as UniMatch trains it
            **dict.fromkeys(LITE, {"width": 128, "decoder_width": 128}),
        },
    ),
    "pspnet": Architecture(make=PSPNet, optional=DROPOUT, backbones=dict.fromkeys(PLAIN, {})),
    "deeplabv2": Architecture(make=DeepLabV2, backbones=dict.fromkeys(PLAIN, {})),
    "dpt": Architecture(
        make=DPT,
        backbones={
            "dinov2-small": {"widths": (48, 96, 192, 384), "width": 64},
            "dinov2-base": {"widths": (96, 192, 384, 768), "width": 128},
            "dinov2-large": {"widths": (256, 512, 1024, 1024), "width": 256},
            "dinov2-giant": {"widths": (1536, 1536, 1536, 1536), "width": 384},
        },
    ),
}


def build_model(
    name: str,
    backbone: str,
    num_classes: int,
    output_stride: int | None = None,
    *,
    dropout: bool | None = None,
    checkpoint_activations: bool | None = None,
) -> network.Network:
    """Makes a network with fresh weights, in fp32 on the CPU.

    `model(images_NCHW)` gives low-resolution logits [N, num_classes, h, w]: a quarter of the input's size for
    DeepLabV3+, 8 / 14 for DPT, 1 / output_stride for PSPNet and DeepLabV2, rounded up. In training mode every
    rank needs at least two images where there is global pooling (DeepLabV3+ and PSPNet).

    Args:
        name: a key of `NETWORKS`.
        backbone: a key of `NETWORKS[name].backbones`.
        num_classes: at least 2.
        output_stride: 8, 16 or 32; None: see `stride_of`.
        dropout: in the head of DeepLabV3+ and PSPNet; None: as the published network has it.
        checkpoint_activations: of a DINOv2; None: no.

    Raises:
        UserError: naming the argument, its value, and what is allowed.
    """
    if name not in NETWORKS:
        raise UserError(f"--model.name {name!r} is unknown; choose one of {', '.join(NETWORKS)}")
    whole = NETWORKS[name]
    if backbone not in whole.backbones:
        pairs = "; ".join(f"{other} on {', '.join(NETWORKS[other].backbones)}" for other in NETWORKS)
        raise UserError(f"--model.backbone {backbone!r} is none of --model.name {name!r}; there is {pairs}")
    if num_classes < 2:
        raise UserError(f"num_classes is {num_classes}; segmentation needs at least 2")
    part = BACKBONES[backbone]
    stride = stride_of(backbone, output_stride)
    encoder = part.make(
        backbone,
        *([] if stride is None else [stride]),
        **_allowed(backbone, part.optional, checkpoint_activations=checkpoint_activations),
    )
    return whole.make(
        encoder,
        num_classes,
        **{**whole.backbones[backbone], **_allowed(name, whole.optional, dropout=dropout)},
    )


def _allowed(name: str, optional: frozenset[str], **asked: bool | None) -> Settings:
    """The settings that were asked for.

    Raises:
        UserError: there is no such setting.
    """
    given = {key: value for key, value in asked.items() if value is not None}
    if refused := given.keys() - optional:
        raise UserError(f"--model.{min(refused).replace('_', '-')}: {name} has no such setting; leave it out")
    return given


def stride_of(backbone: str, asked: int | None = None) -> int | None:
    """Output stride of a backbone: the one that was asked for, or its own; None where patches fix it.

    Raises:
        UserError: it cannot have this one.
    """
    own = BACKBONES[backbone].output_stride
    if asked is None:
        return own
    if own is None:
        raise UserError(f"output stride {asked}: {backbone} has patches and no output stride; leave it out")
    if asked not in OUTPUT_STRIDES:
        raise UserError(
            f"output_stride {asked!r} is not possible; choose one of {', '.join(map(str, OUTPUT_STRIDES))}"
        )
    return asked


def network_of(model: ModelConfig, num_classes: int) -> network.Network:
    """The network of a recipe, as `build_model` makes it."""
    return build_model(
        model.name,
        model.backbone,
        num_classes,
        model.output_stride,
        dropout={"auto": None, "on": True, "off": False}[model.dropout],
        checkpoint_activations=model.checkpoint_activations or None,
    )


def architecture_of(model: ModelConfig, view_px: int | None = None) -> dict[str, str | int | None]:
    """What a checkpoint says of its network: name, backbone, output stride, and the longer side at which it
    sees whole images where that is not their own."""
    return {
        "name": model.name,
        "backbone": model.backbone,
        "output_stride": stride_of(model.backbone, model.output_stride),
    } | ({"view_px": view_px} if view_px else {})


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(backbone parameters, head parameters) that are trained: together all that take a gradient, each
    once."""
    in_backbone = {id(parameter) for parameter in model.backbone.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return (
        [parameter for parameter in trained if id(parameter) in in_backbone],
        [parameter for parameter in trained if id(parameter) not in in_backbone],
    )
