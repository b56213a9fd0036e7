"""Predictors for a corpus, opened when its size is known, because compiling pays only for many images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from stpp.errors import UserError
from stpp.inference import views
from stpp.inference.open import Predictor, Work, open_predictor
from stpp.models.trained import load_network


@dataclass(frozen=True, kw_only=True)
class OpenedPredictor:
    """Predictor with its identity and classes."""

    network: Predictor
    identity: str
    """Everything that its labels depend on, except the device: weights, backend, precision."""
    classes: tuple[str, ...] = ()
    """Class names; empty if unknown."""


PredictorOpener = Callable[[int], list[OpenedPredictor]]
"""Function that opens predictors for a number of images. The result depends on that number and the compute
threads, not on ranks."""


def from_paths(paths: Sequence[Path], device: torch.device, *, mode: str, backend: str = "auto",
               precision: str = "auto", image_px: int | None = None, predictors: int | None = None,
               trust: bool = False, output_stride: int | None = None,
               view_px: int | None = None) -> PredictorOpener:
    """Makes the opener of checkpoints or engine folders.

    Args:
        mode: test-time augmentation, key of `views.VIEWS`.
        backend: "auto" chooses by the amount of work.
        image_px: typical pixels of an image; None: unknown.
        predictors: predictors of this architecture in the run, which may share one engine; None: `paths`.
        trust: run engines that this user did not build.
        output_stride, view_px: see `load_network`.

    Returns:
        Opener. It raises a UserError if a path is no predictor, disagrees with eager, or has other classes
        than the first.
    """
    scales, mirrored = views.VIEWS[mode]
    load = partial(load_network, output_stride=output_stride, view_px=view_px)
    per_image = sum(scale * scale for scale in scales) * (1 + mirrored)

    def open_all(images: int) -> list[OpenedPredictor]:
        size = {} if image_px is None else {"image_px": image_px}
        work = Work(images=images, views=per_image, predictors=predictors or len(paths), **size)
        opened: list[OpenedPredictor] = []
        for path in paths:
            network = open_predictor(path, load=load, device=device, backend=backend, precision=precision,
                                     work=work, trust=trust)
            classes = tuple(network.identity.classes)
            if opened and classes != opened[0].classes:
                raise UserError(f"{path}: its classes ({', '.join(classes)}) are not those of {paths[0]} "
                                f"({', '.join(opened[0].classes)})")
            opened.append(OpenedPredictor(network=network, identity=str(network.identity), classes=classes))
        return opened

    return open_all


def already_open(*networks: Predictor, identity: str) -> PredictorOpener:
    """Makes an opener that returns open predictors, with a common `identity`."""
    return lambda images: [OpenedPredictor(network=network, identity=identity) for network in networks]
