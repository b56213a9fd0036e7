"""Floating-point type of autocast."""

import torch

from stpp.errors import UserError


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Resolves `--train.precision` to a dtype for this device.

    Raises:
        UserError: fp16 on a CPU.
    """
    if precision == "auto":
        if device.type == "cuda":
            return (
                torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
            )
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--train.precision fp16 needs CUDA; use bf16 or fp32 on a CPU")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
