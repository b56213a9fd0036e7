"""Published checkpoints of UniMatch and UniMatch-V2 in every command: a file with student and moving average,
and one with a deep stem."""

from pathlib import Path

import numpy as np
import pytest
import torch

import engine_cases as cases
import stpp
from cli_cases import ended, refused
from stpp import checkpoint, cli
from stpp.dataset import index
from stpp.images.masks import read_index_mask
from stpp.label import rows
from stpp.models.build import build_model

CPU = ["--device", "cpu", "--precision", "fp32"]


def public(model: torch.nn.Module) -> dict:
    """Returns a state dict in the form saved by DistributedDataParallel."""
    return {f"module.{key}": value for key, value in model.state_dict().items()}


def told_apart(network: torch.nn.Module) -> torch.nn.Module:
    """Shifts the classifier, so that every class occurs."""
    with torch.no_grad():
        logits = network(cases.images(2, 70, 98))
        last = network.get_submodule(network.classifier_name)
        last.bias -= logits.mean((0, 2, 3))
        for value in (last.weight, last.bias):
            value *= 3 / logits.std((0, 2, 3)).reshape(-1, *[1] * (value.dim() - 1))
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory, synthetic_index) -> Path:
    """Writes a published file of UniMatch-V2, and its two networks as checkpoints of a run."""
    path = tmp_path_factory.mktemp("published")
    student, average = (told_apart(cases.model("dinov2-small", seed=seed)) for seed in (0, 1))
    torch.save({"model": public(student), "model_ema": public(average), "optimizer": {"state": {}}, "epoch":
    59,
                "previous_best": 78.1, "previous_best_ema": 79.0}, path / "v2.pth")
    for name, network in (("student", student), ("average", average)):
        checkpoint.save(path / f"{name}.pt", model=network.state_dict(),
                        classes=list(index.load(synthetic_index).classes),
                        architecture={"name": "dpt", "backbone": "dinov2-small", "output_stride": None})
    return path


def masks_of(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: read_index_mask(path) for path in (out / "masks").rglob("*.png")}


@pytest.mark.slow
def test_average_is_scored_by_default_and_student_on_request(folder, synthetic_index, listed, capsys):
    def scored(name: str) -> str:
        code, said, errors = ended(capsys, "evaluate", "--checkpoint", folder / name, "--index",
                                   synthetic_index, "--list", listed, "--loader", "reference", *CPU)
        assert code == 0, errors
        return said

    assert scored("v2.pth") == scored("v2.pth#model_ema") == scored("average.pt") != scored("student.pt")
    assert scored("v2.pth#model") == scored("student.pt")


def test_config_next_to_a_published_checkpoint_is_ignored(folder, synthetic_index, listed, tmp_path, capsys):
    """Folders of downloaded weights may hold another program's config.json."""
    (tmp_path / "v2.pth").symlink_to(folder / "v2.pth")
    (tmp_path / "config.json").write_text('{"architectures": ["Dinov2Model"]}')
    code, _, errors = ended(capsys, "evaluate", "--checkpoint", tmp_path / "v2.pth", "--index",
                            synthetic_index, "--list", listed, "--loader", "reference", *CPU)
    assert code == 0, errors


@pytest.mark.slow
def test_predict_and_label_use_the_average(folder, synthetic, listed, tmp_path, capsys):
    photos = sorted((synthetic / "JPEGImages").iterdir())[:3]
    cli.main(["predict", *map(str, photos), "--checkpoint", str(folder / "v2.pth"), "--out", str(tmp_path /
    "p"),
              *CPU])
    found = masks_of(tmp_path / "p")
    networks = {name: stpp.load(folder / name, device="cpu", precision="fp32")
                for name in ("v2.pth", "average.pt", "v2.pth#model")}
    expected = {name: {path.stem: network.predict(path) for path in photos}
                for name, network in networks.items()}
    for photo in photos:
        stem = photo.stem
        np.testing.assert_array_equal(found[stem], expected["v2.pth"][stem])
        np.testing.assert_array_equal(expected["average.pt"][stem], expected["v2.pth"][stem])
        assert len(np.unique(found[stem])) > 1
    assert any((expected["v2.pth#model"][photo.stem] != found[photo.stem]).any() for photo in photos)
    source = tmp_path / "list.txt"
    source.write_text("".join(f"{path}\n" for path in photos))
    cli.main(["label", "--teacher", str(folder / "v2.pth"), "--source", str(source), "--root",
              str(synthetic), "--out", str(tmp_path / "labels"), "--tta", "none", "--backend", "eager",
              "--loader", "reference", *CPU])
    assert "3 images, 0 bad" in capsys.readouterr().out
    labelled = masks_of(tmp_path / "labels")
    assert all(np.mean(labelled[photo.stem] == found[photo.stem]) > 0.999 for photo in photos)


@pytest.mark.slow
def test_checkpoints_of_both_networks_rank_images(folder, synthetic, tmp_path, capsys):
    source = tmp_path / "list.txt"
    photos = sorted((synthetic / "JPEGImages").iterdir())[:4]
    source.write_text("".join(f"{path}\n" for path in photos))
    code, _, errors = ended(capsys, "select", "--checkpoints", folder / "v2.pth#model", folder / "v2.pth",
                            "--source", source, "--root", synthetic, "--out", tmp_path / "out", "--backend",
                            "eager", "--loader", "reference", *CPU)
    assert code == 0, errors
    scores = [row["reliability"] for row in rows.read(tmp_path / "out" / "reliability.parquet")]
    assert len(scores) == 4 and all(0 <= score < 1 for score in scores)


def test_published_checkpoint_compiles_to_an_engine_folder(folder, tmp_path, capsys):
    cli.main(["compile", "--checkpoint", str(folder / "v2.pth"), "--out", str(tmp_path / "engine"),
    "--backend",
              "eager", *CPU])
    saved = checkpoint.load(tmp_path / "engine" / "checkpoint.pt")
    assert saved["architecture"] == {"name": "dpt", "backbone": "dinov2-small", "output_stride": None}
    truth = checkpoint.load(folder / "average.pt")["model"]
    assert all(torch.equal(value, truth[key]) for key, value in saved["model"].items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_onnxruntime_computes_the_same(folder, tmp_path, capsys):
    """DPT on DINOv2, and DeepLabV3+ on a deep stem, which needs a stride."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (stpp[dev])")
    torch.manual_seed(0)
    deep = cases.warmed(build_model("deeplabv3plus", "resnet50-deep-stem", 6))
    torch.save({"model": public(deep), "epoch": 79}, tmp_path / "v1.pth")
    assert "give it with --output-stride (16 is usual)" in refused(
        capsys, "export", "--checkpoint", tmp_path / "v1.pth", "--out", tmp_path / "no.onnx")
    average = build_model("dpt", "dinov2-small", 6)
    average.load_state_dict(checkpoint.load(folder / "average.pt")["model"])
    for path, flags, network in ((folder / "v2.pth", [], average),
                                 (tmp_path / "v1.pth", ["--output-stride", "16"], deep)):
        out = tmp_path / f"{path.stem}.onnx"
        cli.main(["export", "--checkpoint", str(path), "--out", str(out), *flags])
        session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        for shape in ((1, 70, 91), (2, 98, 64)):
            images_NCHW = cases.images(*shape)
            with torch.no_grad():
                truth = network.eval()(images_NCHW)
            (found,) = session.run(["logits"], {"images": images_NCHW.contiguous().numpy()})
            assert cases.relative_error(torch.from_numpy(found), truth) < 1e-3
