"""`stpp export`: the ONNX file of a checkpoint, and refusals. The engine tests check the graph itself."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import engine_cases as cases
from cli_cases import refused
from stpp import checkpoint, cli
from stpp.images.image_file import IMAGENET_MEAN

PRETRAINED = {"source": "backbone.pth", "sha256": "0" * 64, "licence": None}


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    checkpoint.save(path, model=cases.model("pspnet", classes=3).state_dict(), classes=cases.CLASSES,
                    architecture={"name": "pspnet", "backbone": "resnet18", "output_stride": 16},
                    pretrained=PRETRAINED)
    return path


def test_mistakes_are_named(best, tmp_path, capsys, monkeypatch):
    assert "is a folder" in refused(capsys, "export", "--checkpoint", best, "--out", tmp_path)
    assert "absent.pt" in refused(capsys, "export", "--checkpoint", tmp_path / "absent.pt", "--out",
                                  tmp_path / "a.onnx")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "onnxscript" else found(name, *rest))
    errors = refused(capsys, "export", "--checkpoint", best, "--out", tmp_path / "a.onnx")
    assert "onnxscript" in errors and "stpp[tensorrt]" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_onnxruntime_computes_the_same(best, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (stpp[dev])")
    out = tmp_path / "deep" / "best.onnx"
    cli.main(["export", "--checkpoint", str(best), "--out", str(out)])
    assert str(IMAGENET_MEAN) in capsys.readouterr().out and [path.name for path in out.parent.iterdir()] == [
        "best.onnx"
    ]
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"pretrained": json.dumps(PRETRAINED)}
    network = cases.model("pspnet", classes=3)
    network.load_state_dict(checkpoint.load(best)["model"])
    for shape in ((1, 70, 90), (3, 97, 65)):
        images_NCHW = cases.images(*shape)
        with torch.no_grad():
            truth = network.eval()(images_NCHW)
        (found,) = session.run(["logits"], {"images": images_NCHW.contiguous().numpy()})
        assert cases.relative_error(torch.from_numpy(found), truth) < 1e-3
