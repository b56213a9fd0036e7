"""Calibrations of checkpoints, stored next to them and reused."""

from collections.abc import Callable, Sequence
from pathlib import Path

from stpp import distributed, log
from stpp.config import DataConfig
from stpp.distributed import World
from stpp.errors import UserError
from stpp.inference import calibration
from stpp.inference.calibration import NEVER, Calibration
from stpp.inference.open import Predictor
from stpp.inference.protocol import identity_of
from stpp.loading.sample import Sample
from stpp.models.trained import load_network


def ensure_calibration(world: World, checkpoint: Path, predictor: Callable[[Path], Predictor],
                       samples: Sequence[Sample], data: DataConfig, *, tta: str, classes: Sequence[str],
                       precision: float) -> Calibration:
    """Reads, or measures and writes, the calibration of a checkpoint on held-out samples; every rank must
    call it.

    Args:
        predictor: opens the checkpoint.
        precision: target precision for the proposals in the file.
    """
    network, path = identity_of(load_network(checkpoint)).network, _path(checkpoint)
    stored = distributed.gather(_stored(path, network, tta, samples))[0]  # as read by rank 0
    if stored is not None:
        return stored
    log.say(f"  calibrating {checkpoint.parent.name} on {len(samples)} held-out images, {tta} views")
    measured = calibration.measure(predictor(checkpoint), samples, world, data, tta=tta, classes=classes,
                                   network=network)
    distributed.on_main(world, lambda: calibration.write(path, measured, [precision]))
    return measured


def _path(checkpoint: Path) -> Path:
    return checkpoint.parent / calibration.NAME


def _stored(path: Path, network: str, tta: str, samples: Sequence[Sample]) -> Calibration | None:
    """Reads a calibration, if it is of this network, views and images."""
    try:
        stored = calibration.read(path)
    except UserError:
        return None
    same = (stored.network, stored.tta, stored.held_out) == (network, tta, calibration.digest(samples))
    return stored if same else None


def floors_of(measured: Calibration, precision: float) -> tuple[float, ...]:
    """Confidence threshold of every class for the target precision; logs them.

    Raises:
        UserError: no class reaches the precision.
    """
    floors = measured.floors(precision)
    if set(floors) == {NEVER}:
        best = max(measured.proposal(precision, i).precision for i in range(len(floors)))
        raise UserError(f"no class reaches a precision of {precision:g} at any confidence (the best has "
                        f"{best:.2f} on {measured.images} held-out images); lower it, or train the teacher "
                        "longer")
    log.say(_line(measured.classes, floors, precision))
    return floors


def _line(classes: Sequence[str], floors: Sequence[float], precision: float) -> str:
    reached = ", ".join(f"{name} {floor:.3f}" for name, floor in zip(classes, floors, strict=True)
                        if floor != NEVER)
    never = [name for name, floor in zip(classes, floors, strict=True) if floor == NEVER]
    unreached = f"; {', '.join(never)} {'does' if len(never) == 1 else 'do'} not reach it and " \
                f"{'is' if len(never) == 1 else 'are'} left out of the labels" if never else ""
    return f"  confidence thresholds for a precision of {precision:g}: {reached or 'none'}{unreached}"
