"""Networks filled by a rule reproduce the results of the public implementations of UniMatch and UniMatch V2,
in float64."""

import pytest
import torch

import golden_cases as golden
from stpp.models.build import build_model
from stpp.models.layers import upsample

UNIMATCH, V2 = golden.read("unimatch_resnet50"), golden.read("unimatch_v2")
SLOW = pytest.mark.slow


@pytest.mark.parametrize("case", list(UNIMATCH))
def test_unimatch_deeplabv3plus(case):
    expected = UNIMATCH[case]
    network = golden.filled(build_model("deeplabv3plus", "resnet50-deep-stem", 21)).train(
        case.endswith("train")
    )
    images_NCHW = golden.waves("input", expected["input_shape"])
    with torch.no_grad():
        c1, c4 = network.features(images_NCHW)
        logits = upsample(network.decode(c1, c4), images_NCHW.shape[2:])
    for found, name in ((c1, "c1"), (c4, "c4"), (logits, "logits")):
        golden.assert_gives(found, expected[name])


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[SLOW] if "base" in case or "518" in case else []) for case in V2]
)
def test_unimatch_v2_dpt(case):
    expected = V2[case]
    network = golden.filled(build_model("dpt", case.split()[0].replace("_", "-"), 21)).eval()
    images_NCHW = golden.waves("input", expected["input_shape"])
    with torch.no_grad():
        maps = network.features(images_NCHW)
        low = network.decode(*maps)
    for found, tapped in zip(maps, expected["tapped"], strict=True):
        golden.assert_gives(found.flatten(2).transpose(1, 2), tapped)
    golden.assert_gives(low, expected["low_resolution_logits"])
    golden.assert_gives(upsample(low, images_NCHW.shape[2:]), expected["logits"])


def test_golden_numbers_cover_their_cases():
    assert [case.split()[-1] for case in UNIMATCH] == ["eval", "train"]
    assert {case for case in V2} >= {"dinov2_small 70x98", "dinov2_small 518x518", "dinov2_base 70x98"}
