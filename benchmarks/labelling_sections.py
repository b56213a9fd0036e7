"""Sections of bench_ops.py for the operators that label: upsample_argmax, softmax_accumulate with finalize,
confusion.

Every section first checks that the variants agree, then measures them. Images are 360x480; logits have a
quarter of the target size, as in DeepLabV3+.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F

from harness import Report, graphed, minimum_ratio
from stpp_kernels import confusion, finalize, pairwise_iou, softmax_accumulate, upsample_argmax

SIZE = (360, 480)
CLASSES = (11, 21)
SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)


def argmax(report: Report, options: argparse.Namespace) -> None:
    """Measures the mask, and the mask with confidence, of batch 4; peers: F.interpolate and argmax, eager and
    compiled."""
    pairs = []
    for classes in CLASSES:
        logits = _logits(4, classes, SIZE, report.device)

        def eager(x=logits):
            return _resize(x, SIZE).argmax(1).byte()

        def eager_confidence(x=logits):
            confidence, mask = _resize(x, SIZE).softmax(1).max(1)
            return mask.byte(), confidence

        agreement = (upsample_argmax(logits, SIZE) == eager()).float().mean().item()
        assert agreement > 0.9999, agreement
        shape = _shape(logits)
        rows = report.compare(
            "upsample_argmax", shape, "float32",
            {"fused": lambda x=logits: upsample_argmax(x, SIZE), "eager": eager, **_compiled(options, eager)},
        )  # fmt: skip
        pairs += [(rows["fused"], rows["eager"])]
        rows = report.compare(
            "upsample_argmax.confidence", shape, "float32",
            {
                "fused": lambda x=logits: upsample_argmax(x, SIZE, confidence=True),
                "eager": eager_confidence, **_compiled(options, eager_confidence),
            },
        )  # fmt: skip
        pairs += [(rows["fused"], rows["eager"])]
    report.summary("upsample_argmax.fused_vs_eager_ratio", minimum_ratio(pairs))


def augmentation(report: Report, options: argparse.Namespace) -> None:
    """Measures one view at scale 2, and the ten views of test-time augmentation with their mask; peer: the
    two-step form."""
    pairs = []
    for classes in CLASSES:
        views = []
        for scale in SCALES:
            scaled = (int(SIZE[0] * scale), int(SIZE[1] * scale))
            views += [(_logits(1, classes, scaled, report.device), scaled, flip) for flip in (False, True)]

        def add(acc, logits, scaled, flip):
            probabilities = _resize(logits, scaled).softmax(1)
            acc += _resize(probabilities.flip(3) if flip else probabilities, SIZE)

        def fused(views=views, classes=classes):
            acc = torch.zeros((1, classes, *SIZE), device=report.device)
            for logits, scaled, flip in views:
                softmax_accumulate(acc, logits, scaled, SIZE, flip)
            return finalize(acc)

        def all_views(add, views=views, classes=classes):
            acc = torch.zeros((1, classes, *SIZE), device=report.device)
            for logits, scaled, flip in views:
                add(acc, logits, scaled, flip)
            value, mask = acc.max(1)
            return (
                mask.byte(),
                (value / acc.sum(1)).mean((1, 2)),
                torch.bincount(mask.flatten(), minlength=classes),
            )

        agreement = (fused()[0] == all_views(add)[0]).float().mean().item()
        assert agreement > 0.9999, agreement
        acc, compiled = torch.zeros((1, classes, *SIZE), device=report.device), _compiled(options, add)
        rows = report.compare(
            "softmax_accumulate", _shape(views[-1][0]), "float32",
            {
                "fused": lambda a=acc, v=views[-1]: softmax_accumulate(a, v[0], v[1], SIZE, v[2]),
                "eager": lambda a=acc, v=views[-1], add=add: add(a, *v),
                **{label: lambda a=acc, v=views[-1], add=add: add(a, *v) for label, add in compiled.items()},
            },
        )  # fmt: skip
        pairs += [(rows["fused"], rows["eager"])]
        rows = report.compare(
            "ten_views", f"1,{classes},{SIZE[0]},{SIZE[1]}", "float32",
            {
                "fused": fused, "eager": lambda add=add, all_views=all_views: all_views(add),
                **{label: lambda add=add, all_views=all_views: all_views(add) for label,
                   add in compiled.items()},
            },
        )  # fmt: skip
        pairs += [(rows["fused"], rows["eager"])]
        if options.graphs:  # eager's bincount synchronises with the device, which a graph cannot
            report.compare("ten_views.graph", f"1,{classes},{SIZE[0]},{SIZE[1]}", "float32",
                           graphed({"fused": fused}, report.device))
    report.summary("softmax_accumulate.fused_vs_eager_ratio", minimum_ratio(pairs))


def masks(report: Report, options: argparse.Namespace) -> None:
    """Measures the confusion matrix, and the reliability score of ST++, of batch 4; peers: bincount and a
    loop over the classes."""
    pairs = []
    for kind in ("regions", "noise"):
        if kind == "regions":
            pred, target = (upsample_argmax(_logits(4, 21, (side, 64), report.device), SIZE)
                            for side in (48, 52))
        else:
            pred, target = (torch.randint(21, (4, *SIZE), dtype=torch.uint8, device=report.device)
                            for _ in range(2))
        target[:, :20] = 255

        def eager(pred=pred, target=target):
            counted = target != 255
            return torch.bincount(target[counted].long() * 21 + pred[counted], minlength=441).view(21, 21)

        def eager_iou(a=pred, b=target):
            counted = (a != 255) & (b != 255)
            scores = a.new_zeros(len(a), 21, dtype=torch.float64)
            present = torch.zeros_like(scores, dtype=torch.bool)
            for k in range(21):
                both = ((a == k) & (b == k) & counted).flatten(1).sum(1)
                either = (((a == k) | (b == k)) & counted).flatten(1).sum(1)
                scores[:, k], present[:, k] = both / either.clamp(min=1), either > 0
            return scores.sum(1) / present.sum(1)

        assert torch.equal(confusion(pred, target, 21), eager())
        torch.testing.assert_close(pairwise_iou(pred, target, 21), eager_iou(), rtol=1e-6, atol=0)
        shape = ",".join(map(str, pred.shape))
        rows = report.compare(
            f"confusion.{kind}", shape, "uint8",
            {"fused": lambda p=pred, t=target: confusion(p, t, 21), "eager": eager,
             **_compiled(options, eager)},
        )  # fmt: skip
        pairs += [(rows["fused"], rows["eager"])]
        rows = report.compare(
            f"pairwise_iou.{kind}", shape, "uint8",
            {"fused": lambda p=pred, t=target: pairwise_iou(p, t, 21), "eager": eager_iou,
             **_compiled(options, eager_iou)},
        )  # fmt: skip
        pairs += [(rows["fused"], rows["eager"])]
    report.summary("confusion.fused_vs_eager_ratio", minimum_ratio(pairs))


def _compiled(options: argparse.Namespace, function: Callable) -> dict[str, Callable]:
    """Returns the compiled form of `function` as a further variant, unless --no-compile."""
    return {} if options.no_compile else {"compiled": torch.compile(function, dynamic=False)}


def _logits(batch: int, classes: int, size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Draws random logits at a quarter of `size`."""
    generator = torch.Generator().manual_seed(classes)
    values = 4 * torch.randn(batch, classes, (size[0] + 3) // 4, (size[1] + 3) // 4, generator=generator)
    return values.to(device)


def _resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def _shape(tensor: torch.Tensor) -> str:
    return ",".join(map(str, tensor.shape))
