"""Calibrations beside the checkpoints that they are of: made once, and read after that."""

from collections.abc import Callable, Sequence
from pathlib import Path

from stpp import distributed, log
from stpp.config import DataConfig
from stpp.distributed import World
from stpp.errors import UserError
from stpp.inference import calibration
from stpp.inference.calibration import NEVER, Calibration
from stpp.inference.open import Predictor
from stpp.inference.record import weights_sha256
from stpp.loading.sample import Sample
from stpp.models.trained import load_network


def calibrated(here: World, checkpoint: Path, predictor: Callable[[Path], Predictor],
               samples: Sequence[Sample], data: DataConfig, *, tta: str, classes: Sequence[str],
               wanted: float) -> Calibration:
    """The calibration of a checkpoint on held-out samples, written beside it; every rank must call it.

    Args:
        predictor: opens the checkpoint.
        wanted: precision that the file has proposals for.
    """
    weights, path = weights_sha256(load_network(checkpoint)[0].state_dict()), _path(checkpoint)
    kept = distributed.gather(_kept(path, weights, tta, samples))[0]  # as rank 0 found it
    if kept is not None:
        return kept
    log.say(f"  calibrating {checkpoint.parent.name} on {len(samples)} held-out images, {tta} views")
    found = calibration.measure(predictor(checkpoint), samples, here, data, tta=tta, classes=classes,
                                weights=weights)
    distributed.on_main(here, lambda: calibration.write(path, found, [wanted]))
    return found


def _path(checkpoint: Path) -> Path:
    return checkpoint.parent / calibration.NAME


def _kept(path: Path, weights: str, tta: str, samples: Sequence[Sample]) -> Calibration | None:
    """The calibration in a file, if it is that of these weights, views and images."""
    try:
        found = calibration.read(path)
    except UserError:
        return None
    same = (found.weights, found.tta, found.held_out) == (weights, tta, calibration.digest(samples))
    return found if same else None


def floors_of(found: Calibration, precision: float) -> tuple[float, ...]:
    """Least confidence of every class for the wanted precision; says which.

    Raises:
        UserError: no class reaches it.
    """
    floors = found.floors(precision)
    if set(floors) == {NEVER}:
        best = max(found.proposal(precision, i).precision for i in range(len(floors)))
        raise UserError(f"a precision of {precision:g} is reached by no class at any confidence (the best "
                        f"has {best:.2f} on {found.images} held-out images); lower it, or train the teacher "
                        "longer")
    log.say(_chosen(found, floors, precision))
    return floors


def _chosen(found: Calibration, floors: Sequence[float], precision: float) -> str:
    kept = ", ".join(f"{name} {floor:.3f}" for name, floor in zip(found.classes, floors, strict=True)
                     if floor != NEVER)
    never = [name for name, floor in zip(found.classes, floors, strict=True) if floor == NEVER]
    nowhere = f"; {', '.join(never)} {'does' if len(never) == 1 else 'do'} not reach it and " \
              f"{'is' if len(never) == 1 else 'are'} left out of the labels" if never else ""
    return f"  least confidence for a precision of {precision:g}: {kept or 'none'}{nowhere}"
