"""Fused segmentation operators that never store full-resolution logits: C++ on CPUs, Triton on CUDA, plain
PyTorch elsewhere."""

from stpp_kernels.argmax import upsample_argmax
from stpp_kernels.batch_norm_clamp import batch_norm_clamp
from stpp_kernels.confusion import class_pixels, confusion, pairwise_iou
from stpp_kernels.cross_entropy import upsample_cross_entropy
from stpp_kernels.depthwise_conv import depthwise_conv
from stpp_kernels.dilated_conv import dilated_conv3x3
from stpp_kernels.dispatch import describe_implementations, implementations
from stpp_kernels.label_probability import label_probability
from stpp_kernels.softmax_accumulate import finalize, softmax_accumulate

__all__ = [
    "batch_norm_clamp",
    "class_pixels",
    "confusion",
    "depthwise_conv",
    "describe_implementations",
    "dilated_conv3x3",
    "finalize",
    "implementations",
    "label_probability",
    "pairwise_iou",
    "softmax_accumulate",
    "upsample_argmax",
    "upsample_cross_entropy",
]
