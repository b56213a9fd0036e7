"""A trained network made ready to label: batch norm folded into the convolutions, half precision up to the classifier."""

import copy

import torch
from torch import nn
from torch.nn.utils import fusion


def ready(network: nn.Module, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of `network` for evaluation: images in any floating type -> float32 logits.

    Folding happens in float32, before the weights are rounded to `dtype`. The classifier stays in float32, so that the
    logits keep the bits that decide between two nearly equal classes.
    """
    copied = fold_batch_norm(copy.deepcopy(network).float().eval().requires_grad_(False))
    copied.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    for module in copied.get_submodule(network.classifier_name).modules():
        if isinstance(module, nn.Conv2d):
            module.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return copied


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Replaces every convolution and the batch norm after it by one convolution, in place.

    The pairs are neighbours in an `nn.Sequential`, or attributes `conv<i>` and `bn<i>` of a module.

    Raises:
        ValueError: a batch norm has no convolution before it.
    """
    for module in network.modules():
        names = [name for name, _ in module.named_children()]
        for i, name in enumerate(names):
            norm = getattr(module, name)
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):  # synchronised ones too
                continue
            before = names[i - 1] if isinstance(module, nn.Sequential) and i else name.replace("bn", "conv")
            convolution = getattr(module, before, None)
            if not isinstance(convolution, nn.Conv2d):
                raise ValueError(f"batch norm {name} of {type(module).__name__} follows no convolution")
            setattr(module, before, fusion.fuse_conv_bn_eval(convolution, norm))
            setattr(module, name, nn.Identity())
    return network
