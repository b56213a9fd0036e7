"""Pictures taken in validation: their choice, and that they leave everything else unchanged."""

import numpy as np
import pytest
import torch

from stpp import log
from stpp.config import DataConfig
from stpp.dataset import index
from stpp.distributed import World
from stpp.inference import evaluate
from stpp.inference.open import EagerPredictor
from stpp.models.build import build_model
from stpp.report.examples import GAP_PX, PICTURE_PX, PictureRecorder

HERE = World(device=torch.device("cpu"))


@pytest.fixture
def samples(synthetic_index):
    known = index.load(synthetic_index)
    return [known.sample(image) for image in sorted(known.entries)][:6]


def test_recording_pictures_keeps_scores_and_random_numbers(samples):
    torch.manual_seed(0)
    teacher = EagerPredictor(build_model("deeplabv3plus", "resnet18", 6, 32).eval(), num_classes=6,
                             device=HERE.device,
                           dtype=torch.float32)
    alone = evaluate.evaluate(teacher, samples, HERE, DataConfig(threads=1))
    recorder = PictureRecorder(samples, [1, 4], 6)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    seen = evaluate.evaluate(teacher, samples, HERE, DataConfig(threads=1), on_batch=recorder.record)
    assert torch.equal(alone, seen) and torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(numpys, np.random.get_state()[1])
    assert set(recorder.pictures) == {samples[1].key, samples[4].key}
    for picture in recorder.pictures.values():
        assert picture.dtype == np.uint8 and max(picture.shape[0],
                                                 (picture.shape[1] - 2 * GAP_PX) // 3) <= PICTURE_PX


def test_only_the_main_rank_writes_tensorboard_and_skips_nan(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = np.zeros((2, 3, 3), dtype=np.uint8)
    try:
        for speaks in (False, True):
            log.set_speaker(speaks)
            with log.Metrics(tmp_path / str(speaks), first_step=0) as metrics:
                metrics.show(1, values={"iou_pct/a": 5.0, "iou_pct/b": float("nan")},
                             pictures={"validation/ä b/<c>": picture})
    finally:
        log.set_speaker(True)
    assert not (tmp_path / "False").exists()
    board = EventAccumulator(str(tmp_path / "True" / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["iou_pct/a"] and len(board.Tags()["images"]) == 1
