"""`stpp.load(path).predict(image)` and `stpp predict`: their results and refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import engine_cases as cases
import stpp
from cli_cases import ended
from stpp import checkpoint
from stpp.errors import UserError
from stpp.images.items import Item
from stpp.images.masks import read_index_mask
from stpp.images.pixels import normalised

CLASSES = list("abcdef")


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return cases.model("deeplabv3plus", seed=1, classes=len(CLASSES))


@pytest.fixture(scope="module")
def best(network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    checkpoint.save(path, model=network.state_dict(), classes=CLASSES,
                    architecture={"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16})
    return path


@pytest.fixture(scope="module")
def predictor(best):
    return stpp.load(best, device="cpu", precision="fp32")


@pytest.fixture(autouse=True)
def threads():
    """Restores the number of threads, which commands set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def picture(seed: int, width: int = 70, height: int = 50) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_mask_comes_with_its_mean_confidence(predictor, network):
    colours_HWC = np.asarray(picture(5))
    mask_HW, confidence = predictor.scored(colours_HWC)
    assert (mask_HW == predictor.mask(colours_HWC)).mean() > 0.999
    images_NCHW = torch.from_numpy(normalised(colours_HWC)).permute(2, 0, 1)[None].contiguous()
    with torch.no_grad():
        low = network.eval()(images_NCHW)
    full = F.interpolate(low, colours_HWC.shape[:2], mode="bilinear", align_corners=True)
    assert abs(confidence - full.softmax(1).amax(1).mean().item()) < 1e-4


def plain_mask(network: torch.nn.Module, colours_HWC: np.ndarray) -> np.ndarray:
    """Computes the mask in plain PyTorch."""
    images_NCHW = torch.from_numpy(normalised(colours_HWC)).permute(2, 0, 1)[None].contiguous()
    with torch.no_grad():
        low = network.eval()(images_NCHW)
        full = F.interpolate(low, colours_HWC.shape[:2], mode="bilinear", align_corners=True)
    return full.argmax(1)[0].byte().numpy()


def command(capsys, *args) -> tuple[int, str, str]:
    """Runs `stpp predict`; returns exit code, standard output, standard error."""
    return ended(capsys, "predict", *args, "--device", "cpu", "--precision", "fp32")


# --- from Python


def test_path_image_and_array_give_the_same_mask(network, predictor, tmp_path):
    image = picture(0)
    image.save(tmp_path / "caf\u00e9 au lait.png")
    mask = predictor.predict(np.asarray(image))
    assert mask.dtype == np.uint8 and mask.shape == (50, 70) and predictor.classes == tuple(CLASSES)
    assert (mask == plain_mask(network, np.asarray(image))).mean() >= 0.999
    for same in (image, tmp_path / "caf\u00e9 au lait.png", str(tmp_path / "caf\u00e9 au lait.png")):
        np.testing.assert_array_equal(predictor.predict(same), mask)
    np.testing.assert_array_equal(predictor.predict(image.convert("RGBA")), mask)


def test_photographs_are_turned_upright(predictor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as file:
        expected = predictor.predict(np.asarray(ImageOps.exif_transpose(file)))
        np.testing.assert_array_equal(predictor.predict(file), expected)
    assert expected.shape == (70, 50)
    np.testing.assert_array_equal(predictor.predict(tmp_path / "turned.jpg"), expected)


def test_views_are_summed(best, network):
    pixels = np.asarray(picture(2))
    found = stpp.load(best, device="cpu", precision="fp32", tta="flip").predict(pixels)
    images_NCHW = torch.from_numpy(normalised(pixels)).permute(2, 0, 1)[None].contiguous()
    with torch.no_grad():
        views = [F.interpolate(network(view), (50, 70), mode="bilinear", align_corners=True).softmax(1)
                 for view in (images_NCHW, images_NCHW.flip(3))]
    assert (found == (views[0] + views[1].flip(3)).argmax(1)[0].numpy()).mean() >= 0.999


def test_inputs_that_are_no_image_are_refused(best, predictor, tmp_path):
    for bad in (np.zeros((4, 5, 3)), np.zeros((4, 5), np.uint8), np.zeros((4, 5, 4), np.uint8),
                np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
            predictor.predict(bad)
    for bad in (None, 3, b"bytes", [[1]]):
        with pytest.raises(TypeError, match="a path, a PIL image or a uint8 array"):
            predictor.predict(bad)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a photograph")
    for name, said in (("absent.jpg", "no such file"), ("broken.jpg", "broken.jpg: "),
                       (".", "cannot be read")):
        with pytest.raises(UserError, match=said) as refused:
            predictor.predict(tmp_path / name)
        assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(UserError, match="floating"):
        predictor.predict(Image.new("F", (4, 4)))
    picture(0).save(tmp_path / "large.png")
    small = stpp.load(best, device="cpu", precision="fp32", max_pixels=100)
    for large in (tmp_path / "large.png", picture(0)):
        with pytest.raises(UserError, match="70x50 pixels"):
            small.predict(large)


def test_files_that_are_no_network_are_refused(best, tmp_path):
    (tmp_path / "text.pt").write_text("text")
    for name in ("absent.pt", "text.pt"):
        with pytest.raises(UserError, match=name):
            stpp.load(tmp_path / name, device="cpu")
    with pytest.raises(ValueError, match="tta is 'many'"):
        stpp.load(best, tta="many")


def test_published_state_dict_gives_the_same_masks(network, predictor, tmp_path, capsys):
    path, image, out = tmp_path / "published.pth", tmp_path / "a.png", tmp_path / "out"
    torch.save({f"module.{key}": value for key, value in network.state_dict().items()}, path)
    picture(9).save(image)
    expected = predictor.predict(image)
    found = stpp.load(path, device="cpu", precision="fp32", output_stride=16)
    np.testing.assert_array_equal(found.predict(image), expected)
    assert found.classes == ("0", "1", "2", "3", "4", "5")
    with pytest.raises(ValueError, match="output_stride 7"):
        stpp.load(path, device="cpu", output_stride=7)
    code, _, errors = command(capsys, image, "--checkpoint", path, "--output-stride", "16", "--out", out)
    assert code == 0, errors
    np.testing.assert_array_equal(read_index_mask(out / "masks" / "a.png"), expected)


# --- from the command line


def test_masks_and_overlays_of_files_and_folders(best, predictor, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    (folder / "deep er").mkdir(parents=True)
    picture(3).save(folder / "a.jpg")
    picture(4, 40, 60).save(folder / "deep er" / "b.PNG")
    picture(5).save(tmp_path / "single.webp")
    code, said, _ = command(capsys, folder, tmp_path / "single.webp", "--checkpoint", best, "--out", out)
    assert code == 0 and "3 masks" in said
    for key, source in (("a", folder / "a.jpg"), ("deep er/b", folder / "deep er" / "b.PNG"),
                        ("single", tmp_path / "single.webp")):
        with Image.open(out / "masks" / f"{key}.png") as file:
            assert file.mode == "L"
        mask = read_index_mask(out / "masks" / f"{key}.png")
        np.testing.assert_array_equal(mask, predictor.predict(source))
        with Image.open(out / "overlays" / f"{key}.png") as file:
            assert (file.mode, file.size) == ("RGB", mask.shape[::-1])
    described = json.loads((out / "classes.json").read_text())
    assert described["classes"] == CLASSES and len(set(described["colors"])) == len(CLASSES)


def test_overlay_is_half_image_half_class_colour():
    from stpp.images.palette import overlaid, palette

    image, mask = np.full((1, 2, 3), 200, dtype=np.uint8), np.array([[1, 255]], dtype=np.uint8)
    found = overlaid(image, mask, 3)
    assert found.dtype == np.uint8 and found.tolist() == [[[(200 + int(c)) // 2 for c in palette(3)[i]]
                                                           for i in (1, 255)]]


def test_broken_images_have_a_line_each_and_the_others_a_mask(best, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    picture(6).save(folder / "good.jpg")
    whole = (folder / "good.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    hostile = {"back\\slash.jpg": "backslash", "line\nbreak.jpg": "control character",
               os.fsdecode(b"latin\xe9.jpg"): "UTF-8"}
    made = 0
    for name in list(hostile):
        try:
            (folder / name).write_bytes(whole)
            made += 1
        except OSError:
            del hostile[name]  # this file system has no such names
    code, said, errors = command(capsys, folder, "--checkpoint", best, "--out", out)
    assert code == 2 and "1 masks" in said and "Traceback" not in errors
    assert [path.name for path in (out / "masks").rglob("*.png")] == ["good.png"]
    lines = [line for line in errors.splitlines() if str(folder) in line]
    assert len(lines) == 2 + made
    for words in ("cut.jpg: ", "empty.png: the file is empty", *hostile.values()):
        assert sum(words in text for text in lines) == 1, (words, errors)
    assert f"{2 + made} of {3 + made} images have no mask" in errors

    code, _, errors = command(capsys, folder / "cut.jpg", "--checkpoint", best, "--out", out)
    assert code == 2 and sum("cut.jpg" in text for text in errors.splitlines()) == 1


def test_mistakes_print_one_line_and_write_no_mask(best, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    for name in ("x/a.jpg", "y/a.png"):
        (folder / name).parent.mkdir(parents=True)
        picture(7).save(folder / name)
    (tmp_path / "empty").mkdir()
    network, into = ["--checkpoint", best], ["--out", out]
    image = folder / "x" / "a.jpg"
    for args, words in (
        ([image, *into], "give either --checkpoint FILE or --engine DIR"),
        ([image, *into, *network, "--engine", tmp_path], "give either --checkpoint"),
        ([image, *into, "--checkpoint", tmp_path / "no.pt"], "no.pt: no such checkpoint"),
        ([image, *into, "--engine", best], "no such engine folder"),
        ([*into, *network], "no images: give stpp predict IMAGE|FOLDER"),
        ([tmp_path / "absent.jpg", *into, *network], "absent.jpg: no such image or folder"),
        ([tmp_path / "empty", *into, *network], "empty: no image in this folder"),
        ([folder, *network, "--out", folder / "out"], "its masks would be taken for images"),
        ([image, folder / "y" / "a.png", *into, *network], "would both become a.png"),
        ([image, *network], "--out"),
        ([image, *into, *network, "--max-pixels", "100"], "70x50 pixels are more than --max-pixels 100"),
    ):
        code, _, errors = command(capsys, *args)
        assert code == 2 and words in errors, (args, errors)
        assert len([text for text in errors.splitlines() if text.startswith("stpp: ")]) == 1
    assert not (out / "masks").exists() and not (folder / "out").exists()


def test_an_output_that_cannot_be_written_is_named(best, tmp_path, capsys):
    picture(8).save(tmp_path / "a.jpg")
    (tmp_path / "file").touch()
    code, _, errors = command(capsys, tmp_path / "a.jpg", "--checkpoint", best, "--out",
                              tmp_path / "file" / "out")
    assert code == 2 and "--out" in errors and "Traceback" not in errors


@pytest.fixture(scope="module")
def broken(network, tmp_path_factory) -> Path:
    """Checkpoint with a NaN among its weights."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    state["backbone.conv1.weight"][0, 0, 0, 0] = float("nan")
    path = tmp_path_factory.mktemp("broken") / "best.pt"
    checkpoint.save(path, model=state, classes=CLASSES,
                    architecture={"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16})
    return path


def test_answer_that_is_not_finite_is_no_mask(broken, tmp_path, capsys):
    picture(9).save(tmp_path / "a.jpg")
    code, _, errors = command(capsys, tmp_path / "a.jpg", "--checkpoint", broken, "--out", tmp_path / "out")
    assert code == 2 and "a.jpg: the network's answer is not finite" in errors
    assert not list((tmp_path / "out").rglob("*.png"))
    for mode in ("none", "flip", "stpp"):
        network = stpp.load(broken, device="cpu", precision="fp32", tta=mode)
        with pytest.raises(UserError, match="the network's answer is not finite"):
            network.predict(picture(9))
    with pytest.raises(UserError, match="image: the network's answer is not finite"):
        network.predict(np.zeros((50, 70, 3), np.uint8))


def test_files_of_the_user_are_not_replaced(best, tmp_path, capsys):
    picture(9).save(tmp_path / "a.jpg")
    (tmp_path / "classes.json").write_text("mine")
    arguments = tmp_path / "a.jpg", "--checkpoint", best, "--out", tmp_path
    code, _, errors = command(capsys, *arguments)
    assert code == 2 and "contains classes.json, which stpp did not write" in errors
    assert (tmp_path / "classes.json").read_text() == "mine" and not (tmp_path / "masks").exists()
    (tmp_path / "classes.json").unlink()
    for _ in range(2):  # its own files are
        assert command(capsys, *arguments)[0] == 0


def test_arrays_have_a_limit_too(best):
    small = stpp.load(best, device="cpu", precision="fp32", max_pixels=3000)
    with pytest.raises(UserError, match="70x50 pixels, more than max_pixels 3000"):
        small.predict(np.zeros((50, 70, 3), np.uint8))


@pytest.mark.parametrize(("classes", "reason"), [
    (list(map(str, range(256))), "it has 256 classes; up to 255 are possible"),
    (["a", "b", "c", "d", "e", "a"], "not distinct"),
    (["a", "b", "c", "d", "e", "f\n"], "not printable"),
    ("abcdef", "not text"),
])
def test_classes_that_no_run_writes_are_refused(network, tmp_path, classes, reason):
    checkpoint.save(tmp_path / "best.pt", model=network.state_dict(), classes=classes,
                    architecture={"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16})
    with pytest.raises(UserError, match=reason):
        stpp.load(tmp_path / "best.pt", device="cpu")


@pytest.mark.parametrize("turn", range(1, 9))
def test_masks_for_tools_are_upright(best, tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    picture(9).save(tmp_path / "a.png", exif=exif)
    item = Item(key="", source="a.png", file=str(tmp_path / "a.png"))
    stored = stpp.load(best, device="cpu", precision="fp32", exif=False)
    mask = stored.mask(stored.read(item)[0])
    numbers = Image.fromarray(mask)
    numbers.getexif()[0x0112] = turn
    assert np.array_equal(stored.as_shown(mask, item), np.asarray(ImageOps.exif_transpose(numbers)))
    upright = stpp.load(best, device="cpu", precision="fp32")
    assert upright.as_shown(mask, item) is mask
