"""Preparation of a trained network for inference: batch-norm folding, and half precision up to the
classifier."""

import copy
import operator

import torch
from torch import nn
from torch.nn.utils import fusion


def ready(network: nn.Module, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Copies `network` for inference: images of any floating-point type to float32 logits.

    Folding happens in float32, before the weights are rounded to `dtype`. The classifier is computed in
    float32, so that logits keep the bits that decide between two nearly equal classes; so are the backbone's
    `exact_parts`.
    """
    copied = fold_batch_norm(copy.deepcopy(network).float().eval().requires_grad_(False))
    # a compiled package drops unused weights, and would seem to be of another network
    for name in getattr(network, "unused", ()):
        holder, _, last = name.rpartition(".")
        delattr(copied.get_submodule(holder), last)
    layout = {"device": device, "memory_format": torch.channels_last}
    exact = {name: copy.deepcopy(operator.attrgetter(name)(copied)) for name in _exact_parts(copied)}
    copied.to(dtype=dtype, **layout)
    for name, part in exact.items():
        holder, _, last = name.rpartition(".")
        setattr(copied.get_submodule(holder), last, part.to(**layout))
    for module in copied.get_submodule(network.classifier_name).modules():
        if isinstance(module, nn.Conv2d):
            module.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return copied


def _exact_parts(network: nn.Module) -> list[str]:
    return [f"backbone.{name}" for name in getattr(getattr(network, "backbone", None), "exact_parts", ())]


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Folds every batch norm into the convolution before it, in place.

    Networks register a batch norm right after its convolution, or after an `nn.Sequential` that ends in one.

    Raises:
        ValueError: a batch norm has no convolution before it.
    """
    for module in network.modules():
        names = [name for name, _ in module.named_children()]
        for before, name in zip([None, *names], names, strict=False):
            norm = getattr(module, name)
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):  # synchronised ones too
                continue
            holder, place = (None, None) if before is None else _last(module, before)
            if holder is None or not isinstance(getattr(holder, place), nn.Conv2d):
                raise ValueError(f"batch norm {name} of {type(module).__name__} follows no convolution")
            setattr(holder, place, fusion.fuse_conv_bn_eval(getattr(holder, place), norm))
            setattr(module, name, nn.Identity())
    return network


def _last(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Parent and name of a child, or of the last layer of a sequence."""
    child = getattr(module, name)
    if isinstance(child, nn.Sequential) and len(child):
        return _last(child, str(len(child) - 1))
    return module, name
