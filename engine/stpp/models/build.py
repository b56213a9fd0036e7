"""Registry of networks and backbones, construction by name, and parameter groups of backbone and head."""

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
    """Registry entry of a backbone."""

    make: Callable[..., network.Backbone]
    """Constructor (name, output stride, **settings); (name, **settings) if the stride is fixed."""
    output_stride: int | None
    """Default output stride; None: fixed by the patches of a transformer."""
    published_stride: int | None = None
    """Output stride of all published networks on it, which their files do not record; None: the user must
    give it."""
    optional: frozenset[str] = frozenset()
    """Settings of the backbone that a recipe may change."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Registry entry of a network."""

    make: Callable[..., network.Network]
    """Constructor (backbone, number of classes, **settings)."""
    backbones: Mapping[str, Settings]
    """Settings of the network by backbone name."""
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
            **dict.fromkeys(DEEP_STEM, {"dropout": False}),  # as in UniMatch
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
    """Builds a network with random weights, in fp32 on the CPU.

    `model(images_NCHW)` returns low-resolution logits [N, num_classes, h, w]: a quarter of the input size for
    DeepLabV3+, 8 / 14 for DPT, 1 / output_stride for PSPNet and DeepLabV2, rounded up. In training mode,
    networks with global pooling (DeepLabV3+ and PSPNet) need at least two images per rank.

    Args:
        name: key of `NETWORKS`.
        backbone: key of `NETWORKS[name].backbones`.
        num_classes: at least 2.
        output_stride: 8, 16 or 32; None: see `stride_of`.
        dropout: dropout in the head of DeepLabV3+ and PSPNet; None: as in the published network.
        checkpoint_activations: activation checkpointing of a DINOv2; None: off.

    Raises:
        UserError: an argument is invalid; gives its value, and what is allowed.
    """
    if name not in NETWORKS:
        raise UserError(f"--model.name {name!r} is unknown; choose one of {', '.join(NETWORKS)}")
    architecture = NETWORKS[name]
    if backbone not in architecture.backbones:
        pairs = "; ".join(f"{other} on {', '.join(NETWORKS[other].backbones)}" for other in NETWORKS)
        raise UserError(f"--model.backbone {backbone!r} does not work with --model.name {name!r}; available: "
                        f"{pairs}")
    if num_classes < 2:
        raise UserError(f"num_classes is {num_classes}; segmentation needs at least 2")
    recipe = BACKBONES[backbone]
    stride = stride_of(backbone, output_stride)
    encoder = recipe.make(
        backbone,
        *([] if stride is None else [stride]),
        **_allowed(backbone, recipe.optional, checkpoint_activations=checkpoint_activations),
    )
    return architecture.make(
        encoder,
        num_classes,
        **{**architecture.backbones[backbone], **_allowed(name, architecture.optional, dropout=dropout)},
    )


def _allowed(name: str, optional: frozenset[str], **settings: bool | None) -> Settings:
    """Drops settings that are None, and checks the others.

    Raises:
        UserError: there is no such setting.
    """
    chosen = {key: value for key, value in settings.items() if value is not None}
    if refused := chosen.keys() - optional:
        raise UserError(f"--model.{min(refused).replace('_', '-')}: {name} has no such setting; leave it out")
    return chosen


def stride_of(backbone: str, requested: int | None = None) -> int | None:
    """Output stride of a backbone: `requested`, or its default; None if patches fix it.

    Raises:
        UserError: the backbone does not support this stride.
    """
    own = BACKBONES[backbone].output_stride
    if requested is None:
        return own
    if own is None:
        raise UserError(f"output stride {requested}: {backbone} has patches and no output stride; leave it "
                        "out")
    if requested not in OUTPUT_STRIDES:
        raise UserError(
            f"output_stride {requested!r} is not possible; choose one of "
            f"{', '.join(map(str, OUTPUT_STRIDES))}"
        )
    return requested


def network_of(model: ModelConfig, num_classes: int) -> network.Network:
    """Builds the network of a model config."""
    return build_model(
        model.name,
        model.backbone,
        num_classes,
        model.output_stride,
        dropout={"auto": None, "on": True, "off": False}[model.dropout],
        checkpoint_activations=model.checkpoint_activations or None,
    )


def architecture_of(model: ModelConfig, view_px: int | None = None) -> dict[str, str | int | None]:
    """Describes a network for its checkpoint: name, backbone, output stride, and `view_px` if set."""
    return {
        "name": model.name,
        "backbone": model.backbone,
        "output_stride": stride_of(model.backbone, model.output_stride),
    } | ({"view_px": view_px} if view_px else {})


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits the trainable parameters into (backbone parameters, head parameters)."""
    in_backbone = {id(parameter) for parameter in model.backbone.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return (
        [parameter for parameter in trained if id(parameter) in in_backbone],
        [parameter for parameter in trained if id(parameter) not in in_backbone],
    )
