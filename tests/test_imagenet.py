"""`--model.pretrained imagenet`: found, downloaded once a machine, checked; and what is said where there is no network.

The download is PyTorch's own, from a folder in place of the server.
"""

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stpp.config import ModelConfig
from stpp.errors import UserError
from stpp.models import imagenet
from stpp.models.build import build_model
from stpp.training.assemble import start_from

MODEL = ModelConfig(name="deeplabv2", backbone="resnet18", output_stride=16, pretrained="imagenet")


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(MODEL.name, MODEL.backbone, 3, MODEL.output_stride)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of PyTorch's cache, which is not there yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def published(tmp_path, monkeypatch, cache) -> Path:
    """A file of ResNet-18 on the server, small because every tensor is one number."""
    state = {key: torch.tensor(0.25).expand(value.shape) for key, value in network().backbone.state_dict().items()}
    server = tmp_path / "server"
    server.mkdir()
    torch.save(state | {"fc.weight": torch.zeros(1).expand(1000, 512), "fc.bias": torch.zeros(1000)}, server / "made.pth")
    name = f"resnet18-{hashlib.sha256((server / 'made.pth').read_bytes()).hexdigest()[:8]}.pth"
    path = (server / "made.pth").rename(server / name)
    monkeypatch.setitem(imagenet.NAMES, "resnet18", name)
    monkeypatch.setattr(imagenet, "URL", f"{server.as_uri()}/")
    return path


def refusal() -> str:
    with pytest.raises(UserError) as caught:
        imagenet.weights_file("resnet18")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("--model.pretrained imagenet: ")
    return message


def is_loaded() -> bool:
    made = network()
    head = made.classifier[0].weight.clone()
    start_from(made, MODEL, list("abc"))
    assert torch.equal(made.classifier[0].weight, head)
    return all(bool((value == 0.25).all()) for value in made.backbone.parameters())


def test_it_is_downloaded_once_and_loaded_into_the_backbone(published, cache, capsys):
    assert is_loaded()
    said = capsys.readouterr().err
    assert f"downloading {imagenet.URL}{published.name}" in said and "left out: fc.weight, fc.bias" in said
    assert (cache / published.name).read_bytes() == published.read_bytes()
    published.unlink()
    assert is_loaded() and "downloading" not in capsys.readouterr().err
    assert {path.name for path in cache.iterdir()} == {published.name, f".{published.name}.lock"}


def test_a_file_put_there_by_hand_needs_no_network_and_no_right_to_write(published, cache, monkeypatch):
    cache.mkdir(parents=True)
    published.rename(cache / published.name)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    assert imagenet.weights_file("resnet18") == cache / published.name
    assert [path.name for path in cache.iterdir()] == [published.name]


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:500] + b"?" + data[501:], lambda data: b""])
def test_a_damaged_file_in_the_cache_is_downloaded_again(published, cache, capsys, damage):
    cache.mkdir(parents=True)
    (cache / published.name).write_bytes(damage(published.read_bytes()))
    assert is_loaded() and "damaged; downloading" in capsys.readouterr().err
    assert (cache / published.name).read_bytes() == published.read_bytes()


def test_what_the_server_sends_is_checked(published, cache):
    published.write_bytes(published.read_bytes()[:-1])
    message = refusal()
    assert "invalid hash" in message and published.name in message and str(cache / published.name) in message
    assert [path.name for path in cache.iterdir()] == [f".{published.name}.lock"]


def test_a_damaged_file_stays_refused_without_a_network(published, cache):
    cache.mkdir(parents=True)
    (cache / published.name).write_bytes(b"half")
    published.unlink()
    assert f"put it at {cache / published.name}" in refusal()


def test_without_a_network_the_line_says_what_to_put_where(cache, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(imagenet, "URL", f"http://127.0.0.1:{closed.getsockname()[1]}/")
        message = refusal()
    assert "refused" in message and "/resnet18-f37072fd.pth" in message
    assert f"put it at {cache / 'resnet18-f37072fd.pth'}" in message


def test_training_without_a_network_ends_with_that_line(synthetic, synthetic_index, cache, tmp_path):
    command = [sys.executable, "-m", "stpp", "train", "--data.root", synthetic, "--data.index", synthetic_index, "--data.fraction",
               "8", "--out", tmp_path / "run", "--device", "cpu", "--model.backbone", "resnet18", "--model.pretrained", "imagenet"]
    closed = os.environ | {"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, env=closed)
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("stpp: ")]
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert "/resnet18-f37072fd.pth cannot be had" in line and str(cache / "resnet18-f37072fd.pth") in line


def test_a_server_that_is_silent_is_given_up(cache, monkeypatch):
    monkeypatch.setattr(imagenet, "SILENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(imagenet, "URL", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert "timed out" in refusal()
    assert socket.getdefaulttimeout() is None


def test_a_cache_that_cannot_be_written_is_named(published, cache):
    cache.parent.parent.write_bytes(b"a file where the folder would be")
    message = refusal()
    assert "Not a directory" in message or "File exists" in message
    assert str(cache) in message


def test_of_the_processes_of_a_machine_one_downloads(published, cache, tmp_path):
    downloads = tmp_path / "downloads"
    code = f"""
import time, torch
from stpp.models import imagenet
imagenet.URL, imagenet.NAMES["resnet18"] = {imagenet.URL!r}, {published.name!r}
real = torch.hub.download_url_to_file
def slow(*args, **more):
    open({str(downloads)!r}, "a").write("once ")
    time.sleep(2)
    real(*args, **more)
torch.hub.download_url_to_file = slow
print(imagenet.weights_file("resnet18"))
"""
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for _ in range(3)]
    for process in started:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == str(cache / published.name), errors
    assert downloads.read_text() == "once "


def test_every_backbone_has_the_file_that_the_public_code_starts_from():
    from stpp.models.resnet import LAYOUTS

    assert imagenet.NAMES.keys() == LAYOUTS.keys()
    assert (imagenet.NAMES["resnet50"], imagenet.NAMES["resnet101"]) == ("resnet50-0676ba61.pth", "resnet101-63fe2227.pth")
