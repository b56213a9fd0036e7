"""Predictors for a corpus: opened when its size is known, because compiling one pays for many images only."""

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
class Opened:
    """A predictor that is ready."""

    network: Predictor
    identity: str
    """Of all that its labels depend on besides the device: weights, backend, precision."""
    classes: tuple[str, ...] = ()
    """Names, where they are known."""


Open = Callable[[int], list[Opened]]
"""Makes predictors ready for so many images. The answer depends on that number and the threads that compute,
not on ranks."""


def from_paths(paths: Sequence[Path], device: torch.device, *, mode: str, backend: str = "auto",
               precision: str = "auto", image_px: int | None = None, predictors: int | None = None,
               trust: bool = False, output_stride: int | None = None,
               view_px: int | None = None) -> Open:
    """Opens checkpoints or engine folders.

    Args:
        mode: views of an image: key of `views.VIEWS`.
        backend: "auto" chooses by the amount of work.
        image_px: pixels of an image, about; None: unknown.
        predictors: of one architecture in the run, which can share one engine; None: these alone.
        trust: run engines that this user did not build.
        output_stride, view_px: see `load_network`.

    Returns:
        What opens them. It raises a UserError for what is no predictor, does not agree with eager, or has
        other classes than the first.
    """
    scales, mirrored = views.VIEWS[mode]
    load = partial(load_network, output_stride=output_stride, view_px=view_px)
    per_image = sum(scale * scale for scale in scales) * (1 + mirrored)

    def open_all(images: int) -> list[Opened]:
        size = {} if image_px is None else {"image_px": image_px}
        work = Work(images=images, views=per_image, predictors=predictors or len(paths), **size)
        found: list[Opened] = []
        for path in paths:
            network = open_predictor(path, load=load, device=device, backend=backend, precision=precision,
                                     work=work,
                                   trust=trust)
            classes = tuple(network.identity.classes)
            if found and classes != found[0].classes:
                raise UserError(f"{path}: its classes ({', '.join(classes)}) are not those of {paths[0]} "
                                f"({', '.join(found[0].classes)})")
            found.append(Opened(network=network, identity=str(network.identity), classes=classes))
        return found

    return open_all


def ready(*networks: Predictor, identity: str) -> Open:
    """Predictors that are open already; `identity` is that of all together."""
    return lambda images: [Opened(network=network, identity=identity) for network in networks]
