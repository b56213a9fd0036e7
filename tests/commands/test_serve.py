"""`stpp serve`: answers to Label Studio, and refusals."""

import http.client
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import engine_cases
from cli_cases import refused
from stpp import checkpoint
from stpp.annotations import runs, to_label_studio
from stpp.commands import serve
from stpp.errors import UserError
from stpp.images.pixels import BadImage

SETUP = (
    '<View><Image name="img" value="$photo"/><BrushLabels name="tag" toName="img">'
    '<Label value="b"/></BrushLabels></View>'
)


class Halves:
    """Network with class 1 on the left half, and class 2 in one pixel; reads only the name."""

    classes = ("background", "b", "c")

    def __init__(self):
        self.opened: list[str] = []

    def read(self, item):
        self.opened.append(item.file)
        if item.file.endswith("broken.jpg"):
            raise BadImage("it is cut short")
        return np.asarray(Image.open(item.file)), None

    def scored(self, colours_HWC):
        mask = np.zeros(colours_HWC.shape[:2], np.uint8)
        mask[:, : mask.shape[1] // 2] = 1
        mask[0, 0] = 2
        return mask, 0.75

    def as_shown(self, mask_HW, item):
        return mask_HW


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "data" / "a b").mkdir(parents=True)
    Image.new("RGB", (8, 4)).save(tmp_path / "data" / "a b" / "7.jpg")
    (tmp_path / "data" / "broken.jpg").write_bytes(b"x")
    Image.new("RGB", (8, 4)).save(tmp_path / "secret.jpg")
    (tmp_path / "data" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    return (tmp_path / "data").resolve()


@pytest.fixture
def network() -> Halves:
    return Halves()


@pytest.fixture
def address(root, network):
    server = serve.bound(serve.LabelStudioBackend(network, root, "best.pt"), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield "127.0.0.1", server.server_port
    server.shutdown()
    server.server_close()
    thread.join(10)


def asked(address, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(*address, timeout=20)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def task(image: object, entry: str = "photo") -> dict:
    return {"tasks": [{"id": 1, "data": {entry: image}}], "label_config": SETUP, "project": "1.17"}


def test_health_and_setup(address):
    assert asked(address, "GET", "/health") == (200, {"status": "UP", "model_class": "stpp"})
    status, found = asked(
        address, "POST", "/setup", {"project": "1.17", "schema": SETUP, "access_token": "x"}
    )
    assert status == 200 and "best.pt" in found["model_version"]
    assert asked(address, "POST", "/webhook", {"action": "ANNOTATION_CREATED"}) == (200, {})


@pytest.mark.parametrize(
    "image",
    [
        "/data/local-files/?d=a%20b/7.jpg",
        "a b/7.jpg",
        "http://label-studio:8080/data/local-files/?d=a%20b/7.jpg",
    ],
)
def test_prediction_is_a_brush_of_each_class(address, image):
    status, found = asked(address, "POST", "/predict", task(image))
    assert status == 200
    (prediction,) = found["results"]
    assert prediction["score"] == 0.75
    one, other = prediction["result"]
    assert (one["from_name"], one["to_name"], one["type"]) == ("tag", "img", "brushlabels")
    assert (one["original_width"], one["original_height"]) == (8, 4)
    expected = np.zeros((4, 8), bool)
    expected[:, :4] = True
    expected[0, 0] = False
    assert one["value"] == {"format": "rle", "rle": runs.brush(expected), "brushlabels": ["b"]}
    assert other["value"]["brushlabels"] == ["c"]


@pytest.mark.parametrize(
    "image",
    [
        "../secret.jpg",
        "/data/local-files/?d=../secret.jpg",
        "link.jpg",
        "/etc/passwd",
        "a b/../../secret.jpg",
        "%2e%2e/secret.jpg",
        "..%2fsecret.jpg",
        "",
        "a b",
        "x\0y",
        "y" * 5000,
        7,
        None,
        "gone.jpg",
        "/data/local-files/?d=%00",
        "x" * 300,
    ],
)
def test_nothing_outside_the_root_is_opened(address, network, image):
    status, found = asked(address, "POST", "/predict", task(image))
    assert status == 400 and ("--root" in found["error"] or "no image" in found["error"])
    assert network.opened == []


@pytest.mark.parametrize("image", ["http://elsewhere/x.jpg", "file:///etc/passwd", "s3://bucket/x.jpg"])
def test_no_address_is_fetched(address, network, image):
    status, found = asked(address, "POST", "/predict", task(image))
    assert status == 400 and "serve them as local files" in found["error"] and network.opened == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not a JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not a JSON"),
        ({}, "tasks"),
        ({"tasks": []}, "tasks"),
        ({"tasks": [1] * 65}, "tasks"),
        ({"tasks": [1]}, "no image"),
        ({"tasks": [{"data": []}]}, "no image"),
        (b"\xff\xfe", "not a JSON"),
        (task("a b/7.jpg") | {"label_config": "<View/>"}, "no <BrushLabels>"),
        (task("a b/7.jpg") | {"label_config": '<Image name="x" value="$a"/><BrushLabels name="b" '
                              'toName="y">'}, "its toName names no <Image>"),
        (task("a b/7.jpg") | {"label_config": "<BrushLabels><Image>"}, "has no name"),
        (task("broken.jpg"), "broken.jpg: it is cut short"),
    ],
)
def test_malformed_requests_are_refused_in_one_line(address, body, says):
    status, found = asked(address, "POST", "/predict", body)
    assert status == 400 and says in found["error"] and "\n" not in found["error"]
    assert asked(address, "GET", "/")[0] == 200


def test_oversized_and_cross_origin_requests_are_not_read(address):
    assert asked(address, "POST", "/predict", **{"Content-Length": str(serve.MOST_BYTES + 1)})[0] == 413
    assert asked(address, "POST", "/predict", **{"Content-Length": "-1"})[0] == 413
    assert asked(address, "POST", "/predict", task("a b/7.jpg"), Origin="http://evil")[0] == 403
    assert (
        asked(address, "POST", "/anything", {})[0] == 404
        and asked(address, "GET", "/../secret.jpg")[0] == 404
    )


def test_unservable_checkpoints_are_refused(tmp_path, capsys):
    said = refused(capsys, "serve", "--checkpoint", tmp_path / "gone.pt", "--root", tmp_path)
    assert "no such checkpoint" in said
    (tmp_path / "best.pt").write_bytes(b"")
    assert "no such folder" in refused(
        capsys, "serve", "--checkpoint", tmp_path / "best.pt", "--root", tmp_path / "gone"
    )


def test_view_reaches_the_network(tmp_path, monkeypatch, capsys):
    def opened(*_, view_px: int | None, **__) -> None:
        raise UserError(f"a view of {view_px}")

    monkeypatch.setattr("stpp.inference.single_images.open_image_predictor", opened)
    (tmp_path / "best.pt").write_bytes(b"")
    command = ["serve", "--checkpoint", tmp_path / "best.pt", "--root", tmp_path, "--view-px"]
    assert "a view of 64" in refused(capsys, *command, "64")
    assert "--view-px is 9: it must be from 16 to 32768" in refused(capsys, *command, "9")


@pytest.mark.slow
def test_checkpoint_is_served_and_stopped(tmp_path, root):
    network = engine_cases.model("deeplabv3plus", seed=1, classes=3)
    checkpoint.save(
        tmp_path / "best.pt",
        model=network.state_dict(),
        classes=["background", "b", "c"],
        architecture={"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16},
    )
    command = [sys.executable, "-m", "stpp", "serve", "--checkpoint", str(tmp_path / "best.pt")]
    command += ["--root", str(root), "--port", "0", "--device", "cpu"]
    # In the background of a shell an interrupt is ignored until it is restored.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        try:
            line = process.stdout.readline()
            port = int(line.split(":")[2])
            status, found = asked(("127.0.0.1", port), "POST", "/predict", task("a b/7.jpg"))
            assert status == 200 and 1 / 3 < found["results"][0]["score"] <= 1
            assert asked(("127.0.0.1", port), "GET", "/health")[0] == 200
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_image_of_the_brush_is_labelled():
    """A setup may show several images."""
    setup = ('<View><Image name="im" value="$undefined"/><Image value="$photo" name="im2"/>'
             '<BrushLabels name="b" toName="im2"><Label value="b"/></BrushLabels></View>')
    assert to_label_studio.tags(setup) == ("b", "im2", "photo")
