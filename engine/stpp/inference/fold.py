"""A trained network made ready to label: batch norm folded into the convolutions, half precision up to the
classifier."""

import copy

import torch
from torch import nn
from torch.nn.utils import fusion


def ready(network: nn.Module, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of `network` for evaluation: images in any floating type -> float32 logits.

    Folding happens in float32, before the weights are rounded to `dtype`. The classifier stays in float32, so
    that the logits keep the bits that decide between two nearly equal classes.
    """
    copied = fold_batch_norm(copy.deepcopy(network).float().eval().requires_grad_(False))
    # a package leaves them out, and would seem to be of another network
    for name in getattr(network, "unused", ()):
        holder, _, last = name.rpartition(".")
        delattr(copied.get_submodule(holder), last)
    copied.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    for module in copied.get_submodule(network.classifier_name).modules():
        if isinstance(module, nn.Conv2d):
            module.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return copied


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Replaces every convolution and the batch norm after it by one convolution, in place.

    The pairs are neighbours: networks register a batch norm right after what it follows, a convolution or an
    `nn.Sequential` that ends in one.

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
    """Holder and name of a child, or of the last layer in it where it is a sequence."""
    child = getattr(module, name)
    if isinstance(child, nn.Sequential) and len(child):
        return _last(child, str(len(child) - 1))
    return module, name
