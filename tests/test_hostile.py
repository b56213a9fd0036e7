"""Untrusted files: any bytes are read or refused in one line, and nothing is written outside."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stpp import checkpoint
from stpp.config import Config, load_recipe
from stpp.dataset import index, splits
from stpp.errors import UserError
from stpp.images import sources, tars
from stpp.label import rows
from stpp.models.build import build_model
from stpp.models.trained import load_network

RELAXED = settings(max_examples=60, deadline=None,
                   suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Draws `data` with some bytes changed, possibly truncated."""
    found = bytearray(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
    for place, value in draw(st.lists(st.tuples(st.integers(0, max(len(found) - 1, 0)), st.integers(0, 255)),
                                      max_size=6)):
        if found:
            found[place] = value
    return bytes(found)


def one_line(error: UserError) -> None:
    assert "\n" not in str(error).strip()


def refused_or(action) -> None:
    """Runs `action`, which may refuse its input and may fail in no other way."""
    try:
        action()
    except UserError as error:
        one_line(error)


@RELAXED
@given(st.text(max_size=200))
def test_any_text_as_a_recipe(tmp_path, text):
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8", errors="surrogatepass")
    refused_or(lambda: load_recipe(Config, tmp_path / "recipe.toml"))


@RELAXED
@given(st.dictionaries(st.sampled_from(["help", "out", "seed", "data", "train", "x y", "--seed", "", "a.b"]),
                       st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["root", "lr", "epochs", "help", "-", "="]), inner),
    max_leaves=4)))
def test_any_values_as_a_config(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    refused_or(lambda: load_recipe(Config, tmp_path / "config.json"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("rows") / "part.parquet"
    rows.write(path, [{"key": f"k{i}", "reliability": i / 9, "reliable": i > 4} for i in range(10)],
               rows.RELIABILITY)
    return path.read_bytes()


@RELAXED
@given(st.data())
def test_damaged_rows(tmp_path, parquet, data):
    (tmp_path / "rows.parquet").write_bytes(data.draw(damaged(parquet)))
    refused_or(lambda: rows.read(tmp_path / "rows.parquet"))


def test_text_that_is_not_utf8_is_refused_as_a_table(tmp_path):
    offsets, text = pa.py_buffer(np.array([0, 1], dtype=np.int32)), pa.py_buffer(b"\x80")
    keys = pa.Array.from_buffers(pa.string(), 1, [None, offsets, text])
    pq.write_table(pa.table({"key": keys}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="rows.parquet: not a readable Parquet file"):
        rows.read(tmp_path / "rows.parquet")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "last.pt"
    checkpoint.save(path, model={"w": torch.arange(6.0)}, step=3)
    return path.read_bytes()


@RELAXED
@given(st.data())
def test_damaged_checkpoints(tmp_path, saved, data):
    (tmp_path / "last.pt").write_bytes(data.draw(damaged(saved)))
    refused_or(lambda: checkpoint.load(tmp_path / "last.pt"))


class Bomb:
    """Object that writes a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_code_is_not_run(tmp_path):
    torch.save({"format": checkpoint.FORMAT, "model": Bomb(tmp_path / "boom")}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last.pt holds a Python object"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "boom").exists()


def archive(names: list[str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            made.addfile(member, io.BytesIO(b"data"))
    return file.getvalue()


@RELAXED
@given(st.data(), st.lists(NAMES, max_size=4))
def test_damaged_archives(tmp_path, data, names):
    (tmp_path / "a.tar").write_bytes(data.draw(damaged(archive(names))))
    refused_or(lambda: list(tars.members(str(tmp_path / "a.tar"))))


@RELAXED
@given(st.lists(st.sampled_from(["../out.png", "/etc/x.png", "a/../../x.jpg", "a\nb.jpg", "$(touch x).jpg",
                                 "a.jpg", "C:\\x.jpg"]) |
                NAMES.map(lambda name: name + ".jpg"), min_size=1, max_size=4))
def test_archive_keys_never_lead_outside(tmp_path, names):
    (tmp_path / "a.tar").write_bytes(archive(names))
    out = tmp_path / "masks"
    for item in sources.open_source(str(tmp_path / "a.tar")).items():
        if item.error is None:
            assert (out / f"{item.key}.png").resolve().is_relative_to(out) and "\n" not in item.key


@RELAXED
@given(st.text(max_size=120))
def test_any_text_as_a_split(tmp_path, synthetic_index, text):
    (tmp_path / "labeled.txt").write_text(text, encoding="utf-8", errors="surrogatepass")
    known = index.load(synthetic_index)
    refused_or(lambda: splits.read_split(tmp_path / "labeled.txt", known, labelled=True))


def stpp(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "stpp", *map(str, args)], capture_output=True, text=True,
                          timeout=120)


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_decompression_bombs_and_absurd_headers_are_named(tmp_path):
    """Headers that declare 60000x60000 pixels are refused from the header, with the file's name."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "images" / "good.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "masks" / "good.png")
    data = bytearray((root / "images" / "good.png").read_bytes())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    (root / "images" / "bomb.png").write_bytes(data)
    (root / "classes.json").write_text('["a", "b"]')
    before = listing(root)
    ran = stpp("prepare", "--data.root", root, "--data.layout", "globs", "--data.images", "images/*.png",
               "--data.masks",
               "masks/*.png", "--out", tmp_path / "index", "--workers", "1")
    assert ran.returncode == 2 and "bomb.png" in ran.stderr and "Traceback" not in ran.stderr
    assert listing(root) == before


def test_links_out_of_the_root_and_shell_characters(tmp_path):
    """A linked image is accepted, a name with shell characters is read literally; nothing is run or written
    outside."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    name = "$(touch boom);`touch boom` & 'x'.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "images" / name)
    ran = stpp("prepare", "--data.root", root, "--data.layout", "globs", "--data.images", "images/*.png",
               "--data.classes", "a",
               "b", "--out", tmp_path / "index", "--workers", "1")
    assert "Traceback" not in ran.stderr and ran.returncode in (0, 2)
    assert not list(tmp_path.rglob("boom")) and not Path("boom").exists()


@pytest.mark.parametrize("change", [
    {"classes": [1, 2, 3]}, {"model": {1: torch.zeros(1)}}, {"view_px": 10**12}, {"view_px": 480.5},
    {"view_px": True},
])
def test_crafted_networks_are_refused_in_one_line(tmp_path, change):
    network = build_model("pspnet", "resnet18", 3, 32)
    architecture = {"name": "pspnet", "backbone": "resnet18", "output_stride": 32,
                    "view_px": change.pop("view_px", None)}
    content = {"model": dict(network.state_dict()), "classes": ["a", "b", "c"], "architecture": architecture}
    checkpoint.save(tmp_path / "best.pt", **content | change)
    with pytest.raises(UserError, match=r"best\.pt: holds no network of this version") as error:
        load_network(tmp_path / "best.pt")
    assert "\n" not in str(error.value)
