"""Published state dict as a teacher: it labels and compiles like a run's checkpoint, at the requested
stride."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import engine_cases as cases
import stpp
from cli_cases import refused
from stpp import checkpoint, cli
from stpp.images.masks import read_index_mask
from stpp.inference.predictors import from_paths

CPU = ["--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return cases.model("deeplabv2", seed=2)


@pytest.fixture(scope="module")
def published(network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("published") / "published.pth"
    torch.save(network.state_dict(), path)
    return path


def test_labels_store_the_stride_of_their_teacher(network, published, synthetic, tmp_path, capsys):
    source, out = tmp_path / "list.txt", tmp_path / "out"
    source.write_text("".join(f"{path}\n" for path in sorted((synthetic / "JPEGImages").iterdir())[:2]))
    args = ["label", "--teacher", str(published), "--source", str(source), "--root", str(synthetic), "--out",
            str(out), "--tta",
            "none", "--backend", "eager", "--loader", "reference", *CPU]
    cli.main([*args, "--output-stride", "16"])
    assert "2 images, 0 bad" in capsys.readouterr().out
    checkpoint.save(tmp_path / "best.pt", model=network.state_dict(), classes=list("abcdef"),
                    architecture={"name": "deeplabv2", "backbone": "resnet18", "output_stride": 16})
    same = stpp.load(tmp_path / "best.pt", device="cpu", precision="fp32")
    for mask in sorted((out / "masks").rglob("*.png")):
        image = next((synthetic / "JPEGImages").glob(f"{mask.stem}.*"))
        assert np.mean(read_index_mask(mask) == same.predict(image)) > 0.999
    # Equal weights at another stride are another teacher: its masks must not be mixed with these.
    assert "holds masks of another run (teacher: " in refused(capsys, *args)
    asked = ((published, None), (published, 8), (published, 16), (tmp_path / "best.pt", None))
    openers = [from_paths([path], torch.device("cpu"), mode="none", backend="eager", precision="fp32",
                          output_stride=stride)
               for path, stride in asked]
    identities = {open_all(1)[0].identity for open_all in openers}
    assert len(identities) == 2


def test_engine_folder_stores_stride_and_classes(published, tmp_path, capsys):
    folder, other = tmp_path / "engine", tmp_path / "other"
    args = ["--backend", "eager", *CPU, "--output-stride"]
    cli.main(["compile", "--checkpoint", str(published), "--out", str(folder), *args, "32"])
    saved = checkpoint.load(folder / "checkpoint.pt")
    assert saved["architecture"] == {"name": "deeplabv2", "backbone": "resnet18", "output_stride": 32}
    assert json.loads((folder / "engine.json").read_text())["classes"] == saved["classes"] == list("012345")
    capsys.readouterr()
    errors = refused(capsys, "compile", "--checkpoint", folder / "checkpoint.pt", "--out", other, *args, "8")
    assert "--output-stride 8" in errors and "trained at 32" in errors and not other.exists()


@pytest.mark.slow
def test_published_state_dict_exports(published, tmp_path, capsys):
    cli.main(["export", "--checkpoint", str(published), "--out", str(tmp_path / "a.onnx"), "--output-stride",
              "16"])
    assert "-> logits [N, 6, h, w]" in capsys.readouterr().out
