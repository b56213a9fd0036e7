"""Engines with test-time augmentation on photographs, against the method in plain PyTorch and float32.

The network is trained here for a minute, because an untrained one has smaller margins than half precision
keeps.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_views import plain_probabilities

from engine_cases import CPU
from stpp import checkpoint
from stpp.images.pixels import normalised
from stpp.inference import gate, views
from stpp.inference.open import open_predictor
from stpp.models.build import build_model
from stpp.models.trained import load_network
from stpp_kernels import finalize

CLASSES = 11
SIZES = ((120, 90), (97, 133), (131, 64), (49, 75))
"""Width and height: odd and even, wide and narrow; bfloat16 is slow on a CPU that only emulates it."""
STEPS = 60


def photograph(folder, number: int, size: tuple[int, int], mode: str) -> np.ndarray:
    filtering = Image.Resampling.BILINEAR if mode == "RGB" else Image.Resampling.NEAREST
    with Image.open(sorted(folder.iterdir())[number]) as image:
        return np.asarray(image.convert(mode).resize(size, filtering))


@pytest.fixture(scope="module")
def trained(camvid, tmp_path_factory):
    """Writes a checkpoint of a ResNet-18 trained on eight photographs."""
    torch.manual_seed(0)
    network = build_model("deeplabv3plus", "resnet18", CLASSES,
                          16).to(memory_format=torch.channels_last).train()
    images = [normalised(photograph(camvid / "images" / "train", 40 * i, (128, 96), "RGB")) for i in range(8)]
    masks = [photograph(camvid / "masks" / "train", 40 * i, (128, 96), "L") for i in range(8)]
    images_NCHW = (
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    )
    labels_NHW = torch.from_numpy(np.stack(masks)).long()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for step in range(STEPS):
        rows = [(4 * step + i) % 8 for i in range(4)]
        logits = F.interpolate(network(images_NCHW[rows]), (96, 128), mode="bilinear", align_corners=True)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels_NHW[rows], ignore_index=255).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("trained") / "best.pt"
    checkpoint.save(path, model=network.state_dict(), classes=[f"c{i}" for i in range(CLASSES)],
                    architecture={"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16})
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("backend", "precision", "raw", "outside"), [
    # float32 engines: test_inductor.py
    ("eager", "fp32", 0.9999, 1.0), ("inductor", "bf16", 0.97, gate.FLOOR),
])
def test_masks_match_the_method(camvid, trained, tmp_path, monkeypatch, backend, precision, raw, outside):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    teacher = open_predictor(trained, load=load_network, device=CPU, backend=backend, precision=precision)
    network = load_network(trained)[0].eval()
    scales, mirrored = views.VIEWS["stpp"]
    same, same_decided, decided, pixels, seen = 0, 0, 0, 0, set()
    with torch.inference_mode():
        for i, size in enumerate(SIZES):
            image = normalised(photograph(camvid / "images" / "val", 20 * i, size, "RGB"))
            images_NCHW = torch.from_numpy(image).permute(2, 0, 1)[None]
            mask = finalize(views.accumulate_views(teacher.logits, images_NCHW, "stpp", CLASSES))[0][0]
            mean = plain_probabilities(network, images_NCHW, scales,
                                       mirrored)[0] / (len(scales) * (1 + mirrored))
            first, second = mean.topk(2, dim=0).values
            clear, equal = first - second >= gate.MARGIN, mask == mean.argmax(0)
            same, same_decided = same + int(equal.sum()), same_decided + int((equal & clear).sum())
            decided, pixels, seen = (
                decided + int(clear.sum()),
                pixels + mask.numel(),
                seen | set(mask.unique().tolist()),
            )
    print(f"{backend} {precision}: {same / pixels:.5f} of all pixels as the method's, "
          f"{same_decided / decided:.5f} of the {decided / pixels:.3f} outside near-ties")
    assert len(seen) >= 4 and decided / pixels > 0.5
    assert same / pixels >= raw and same_decided / decided >= outside
    if backend == "inductor":
        assert teacher.agreement.outside >= gate.FLOOR
