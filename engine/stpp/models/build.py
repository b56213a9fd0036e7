"""From names to a network, and its parameters split into backbone and head."""

from torch import nn

from stpp.models.deeplabv2 import DeepLabV2
from stpp.models.deeplabv3plus import DeepLabV3Plus
from stpp.models.pspnet import PSPNet

MODELS = {"deeplabv3plus": DeepLabV3Plus, "pspnet": PSPNet, "deeplabv2": DeepLabV2}


def build_model(name: str, backbone: str, num_classes: int, output_stride: int) -> nn.Module:
    """Makes a network with fresh weights, in fp32 on the CPU.

    `model(images_NCHW)` gives low-resolution logits [N, num_classes, h, w]: a quarter of the input's size for
    DeepLabV3+, 1 / output_stride for the others, rounded up. `model.backbone` is the ResNet; `model.head_lr_multiplier`
    is the learning rate of the other parameters over the backbone's. In training mode every rank needs at least two
    images where there is global pooling (DeepLabV3+ and PSPNet).

    Args:
        name: "deeplabv3plus", "pspnet" or "deeplabv2".
        backbone: "resnet18", "resnet50" or "resnet101".
        num_classes: at least 2.
        output_stride: 8, 16 or 32.

    Raises:
        ValueError: naming the argument, its value, and what is allowed.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(MODELS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; segmentation needs at least 2")
    return MODELS[name](backbone, num_classes, output_stride)


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(backbone parameters, head parameters) of a network from `build_model`; together all of them, each once."""
    backbone = list(model.backbone.parameters())
    in_backbone = {id(parameter) for parameter in backbone}
    return backbone, [parameter for parameter in model.parameters() if id(parameter) not in in_backbone]
