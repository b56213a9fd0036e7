"""A checkpoint stores the EXIF rule of its training, and every command follows it or refuses another."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine_cases as cases
import stpp
from cli_cases import ended, refused
from stpp import checkpoint
from stpp.errors import UserError
from stpp.inference import exif_rule
from stpp.inference.open import compile_predictor
from stpp.models.trained import load_network
from zoo_files import HEIGHT, TURNS, WIDTH, exif_block, jpeg, picture

CLASSES = ["a", "b", "c"]
ARCHITECTURE = {"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 32}


@pytest.fixture(scope="module")
def state() -> dict:
    return cases.model("deeplabv3plus", seed=1, classes=len(CLASSES)).state_dict()


@pytest.fixture(scope="module")
def checkpoints(state, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, told in (
        ("upright", {"reading": {"exif": True}}),
        ("stored", {"reading": {"exif": False}}),
        ("silent", {}),
        ("odd", {"reading": {"exif": "yes"}}),
        ("other", {"reading": 7}),
    ):
        checkpoint.save(
            folder / f"{name}.pt", model=state, classes=CLASSES, architecture=ARCHITECTURE, **told
        )
    torch.save(state, folder / "published.pth", _use_new_zipfile_serialization=False)
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def photos(tmp_path) -> Path:
    """One photograph on its side, its upright twin as a PNG, and its stored pixels as another."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "turned.jpg").write_bytes(jpeg(TURNS[6](picture()), exif=exif_block(6)))
    with Image.open(folder / "turned.jpg") as image:
        stored = np.asarray(image)
    Image.fromarray(stored).save(folder / "stored.png")
    Image.fromarray(np.ascontiguousarray(np.rot90(stored, -1))).save(folder / "upright.png")
    return folder


def test_stored_rule_is_read(checkpoints):
    told = {name: exif_rule.recorded(path) for name, path in checkpoints.items()}
    assert told == {
        "upright": True,
        "stored": False,
        "silent": None,
        "odd": None,
        "other": None,
        "published": None,
    }
    assert exif_rule.recorded(Path("there is no such file")) is None


def test_rules_agree_or_are_refused(checkpoints):
    upright, stored, silent = (checkpoints[name] for name in ("upright", "stored", "silent"))
    assert (
        exif_rule.resolve([silent])
        and exif_rule.resolve([upright, silent])
        and exif_rule.resolve([upright], True)
    )
    assert (
        not exif_rule.resolve([stored])
        and not exif_rule.resolve([silent, stored, stored])
        and not exif_rule.resolve([silent], False)
    )
    for paths, asked, words in (
        ([upright], False, "--no-exif: .*upright.pt was trained on images turned upright"),
        ([silent, stored], True, "--exif: .*stored.pt was trained on images as they are stored"),
        ([upright, stored], None, "stored.pt was trained .* checkpoints of one run"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            exif_rule.resolve(paths, asked)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "seen"),
    [("upright", "upright"), ("silent", "upright"), ("published", "upright"), ("stored", "stored")],
)
def test_load_follows_the_rule_of_the_checkpoint(checkpoints, photos, name, seen):
    predictor = stpp.load(
        checkpoints[name], device="cpu", precision="fp32", output_stride=None if name != "published" else 32
    )
    expected = predictor.predict(photos / f"{seen}.png")
    assert expected.shape == ((HEIGHT, WIDTH) if seen == "upright" else (WIDTH, HEIGHT))
    assert np.array_equal(predictor.predict(photos / "turned.jpg"), expected)
    with Image.open(photos / "turned.jpg") as image:
        assert np.array_equal(predictor.predict(image), expected)
    if name == "upright":
        with pytest.raises(UserError, match="--no-exif"):
            stpp.load(checkpoints[name], device="cpu", exif=False)


def masks(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)) for path in (folder / "masks").glob("*.png")}


@pytest.mark.parametrize(
    ("name", "flags", "seen"),
    [("stored", [], "stored"), ("upright", [], "upright"), ("silent", ["--no-exif"], "stored")],
)
def test_predict_and_label_follow_the_rule_of_the_checkpoint(checkpoints, photos, tmp_path, name, flags,
                                                             seen, capsys):
    shared = ["--device", "cpu", "--precision", "fp32", "--tta", "none", *flags]
    assert (
        ended(capsys, "predict", photos, "--checkpoint", checkpoints[name], "--out", tmp_path / "p", *shared)[
            0
        ]
        == 0
    )
    assert (
        ended(
            capsys,
            "label",
            "--teacher",
            checkpoints[name],
            "--source",
            photos,
            "--out",
            tmp_path / "l",
            "--backend",
            "eager",
            "--loader",
            "reference",
            *shared,
        )[0]
        == 0
    )
    for folder in ("p", "l"):
        found = masks(tmp_path / folder)
        assert np.array_equal(found["turned"], found[seen]), folder


@pytest.mark.parametrize("command", ["predict", "label", "select"])
def test_contradicting_flag_is_refused_in_one_line(checkpoints, photos, tmp_path, command, capsys):
    path = str(checkpoints["stored"])
    given = {
        "predict": [str(photos), "--checkpoint", path],
        "label": ["--teacher", path, "--source", str(photos)],
        "select": ["--checkpoints", path, path, "--source", str(photos)],
    }[command]
    for flags, words in ((["--exif"], "--exif: "), (["--exif", "--no-exif"], "contradict")):
        error = refused(capsys, command, *given, "--out", tmp_path / "out", "--device", "cpu", *flags)
        assert error.startswith("stpp: ") and words in error


def test_engine_folder_keeps_the_rule_of_its_checkpoint(checkpoints, tmp_path):
    for name, rule in (("stored", False), ("upright", True), ("silent", None)):
        compile_predictor(
            checkpoints[name], tmp_path / name, load=load_network, device=torch.device("cpu"), backend="eager"
        )
        assert exif_rule.recorded(tmp_path / name) is rule
