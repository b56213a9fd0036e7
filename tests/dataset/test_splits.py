"""Split files: the public format, names with spaces, refusals; drawing splits."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from stpp.dataset import index, splits
from stpp.errors import UserError


def data_set(
    root: Path, names: list[str], *, masks: float | set[str] = 1.0, layout: str = "camvid", value: int = 1
) -> Path:
    """Writes images `images/<name>.jpg` and masks `masks/<name>.png` for a share of them, or for the named
    ones."""
    folders = ("images", "masks") if layout == "camvid" else ("JPEGImages", "SegmentationClass")
    for i, name in enumerate(names):
        image, mask = (
            root / folder / f"{name}{suffix}" for folder,
            suffix in zip(folders, (".jpg", ".png"), strict=True)
        )
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(image)
        if name in masks if isinstance(masks, set) else i < masks * len(names):
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 3), value).save(mask)
    return root


def prepared(root: Path, out: Path) -> index.Index:
    return index.prepare(root, out, classes=("a", "b"), progress=False)


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> index.Index:
    """Set with difficult names; the last two have no mask."""
    root = tmp_path_factory.mktemp("odd")
    names = ["plain", "with space", "with", "two  spaces", "caf\u00e9", "train/deep er/x.y", "bare",
             "no mask"]
    return prepared(data_set(root / "data", names, masks=0.75), root / "index")


def read(tmp_path: Path, index: index.Index, text: str | bytes, *, labelled: bool = True):
    path = tmp_path / "list.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return splits.read_split(path, index, labelled=labelled)


@pytest.mark.parametrize("name", ["plain", "with space", "two  spaces", "caf\u00e9", "train/deep er/x.y"])
@pytest.mark.parametrize(
    "form", ["{i} {m}", "{i}", "./{i} ./{m}", "  {i} {m}  ", "{i}\t{m}", "\ufeff{i} {m}\r",
             "\n\n{i} {m}\n \n"]
)
def test_lines_are_resolved_against_the_index(tmp_path, odd, name, form):
    image, mask = f"images/{name}.jpg", f"masks/{name}.png"
    for labelled in (True, False):
        (sample,) = read(tmp_path, odd, form.format(i=image, m=mask) + "\n", labelled=labelled)
        assert sample.image == str(odd.root / image) and sample.mask == str(odd.root / mask)
        assert (sample.key, sample.width, sample.height, sample.strong) == (f"images/{name}", 4, 3, False)
    (sample,) = read(tmp_path, odd, unicodedata.normalize("NFD", form.format(i=image, m=mask)))
    assert sample.image == str(odd.root / image)


def test_unlabelled_images_need_no_mask(tmp_path, odd, capsys):
    samples = read(
        tmp_path,
        odd,
        "images/no mask.jpg\nimages/bare.jpg masks/bare.png\nimages/plain.jpg masks/other.png\n",
        labelled=False,
    )
    assert [sample.mask for sample in samples] == [None, None, str(odd.root / "masks/plain.png")]
    assert (
        "ignoring 2 masks of unlabelled images that are not in the index (line 2: masks/bare.png)"
        in capsys.readouterr().err
    )


def test_repeated_images_are_skipped_with_a_warning(tmp_path, odd, capsys):
    assert len(read(tmp_path, odd,
                    "images/plain.jpg\nimages/with.jpg\nimages/plain.jpg masks/plain.png\n")) == 2
    assert "line 3 repeats line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "lists no image"),
        (" \n\n", "lists no image"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"a\xff\xfe", "cannot be read"),
        (b"\x00", "line 1: .*no such image"),
        (
            "images/plain.jpg\nimages/gone.jpg masks/gone.png",
            "line 2: images/gone.jpg masks/gone.png: no such image",
        ),
        ("images/no mask.jpg", r"line 1: images/no mask\.jpg: has no mask"),
        ("images/bare.jpg masks/bare.png", "line 1: .*the mask masks/bare.png is not in the index"),
        (
            "images/plain.jpg masks/with.png",
            r"masks/with\.png is not the index's mask of .*masks/plain\.png",
        ),
        ("/images/plain.jpg masks/plain.png", r"line 1: .*relative to the data root, without '\.\.'"),
        ("../data/images/plain.jpg masks/plain.png", r"without '\.\.'"),
        ("images/plain.jpg /etc/passwd", r"without '\.\.'"),
        ("images/plain.jpg ../masks/plain.png", r"without '\.\.'"),
        ("C:\\images\\plain.jpg", r"without '\.\.'"),
        ("masks/plain.png", "masks/plain.png exists but is not an image of the index"),
        ("images/plain images/plain.jpg", "no such image"),
    ],
)
def test_bad_lists_are_refused_with_file_and_line(tmp_path, odd, text, said):
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path, odd, text)
    assert str(tmp_path / "list.txt") in str(error.value) and "\n" not in str(error.value)


def test_a_missing_list_is_named(tmp_path, odd):
    with pytest.raises(UserError, match="list.txt: no such split file"):
        splits.read_split(tmp_path / "list.txt", odd, labelled=True)
    with pytest.raises(UserError, match="cannot be read"):
        splits.read_split(tmp_path, odd, labelled=True)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.sampled_from("images/plain.jpg masks/with "
                                 "space.png\t\n\r./\u00e9\x00\u2028"), max_size=80),
    labelled=st.booleans(),
)
def test_any_text_raises_only_user_errors(tmp_path, odd, text, labelled):
    try:
        samples = read(tmp_path, odd, text, labelled=labelled)
        assert samples and all(Path(sample.image).is_file() for sample in samples)
    except UserError as error:
        assert "list.txt" in str(error)


class Known(dict):
    """Index that knows images and masks by name alone."""

    root, classes, unlabelled = Path("/root"), ("a", "b"), {}
    entries = property(lambda self: self)

    def find(self, image):
        return self.get(image)

    sample, place = index.Index.sample, index.Index.place


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.text(st.sampled_from("ab ."), min_size=1, max_size=6), min_size=1, max_size=6,
                   unique=True),
    data=st.data(),
)
def test_written_lines_read_back_with_any_names(tmp_path, names, data):
    known = Known()
    for name in names:
        image = f"images/{name}.jpg"
        mask = data.draw(st.sampled_from([None, f"masks/{name}.png"]))
        known[image] = index.Entry(
            key=image[:-4],
            image=image,
            mask=mask,
            converted=None,
            width=1,
            height=1,
            orientation=1,
            plain=True,
            format="JPEG",
            colours="RGB",
            alpha=False,
            bits=8,
            used_bits=8,
            class_pixels=[1, 0],
            bytes=1,
            mtime_ns=1,
        )
    assume(not any(f"{a} " in b for a in known for b in known))
    path = tmp_path / "list.txt"
    path.write_text("".join(splits.line(entry) for entry in known.values()), encoding="utf-8")
    samples = splits.read_split(path, known, labelled=False)
    assert [sample.image for sample in samples] == [f"/root/{image}" for image in known]


# --- drawing


def lists(folder: Path) -> dict[str, list[str]]:
    return {path.stem: path.read_text(encoding="utf-8").splitlines() for path in folder.glob("*.txt")}


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> index.Index:
    """20 training images with masks and 4 without, 6 for validation (one without a mask), 3 for test."""
    root = tmp_path_factory.mktemp("official")
    names = [f"train/{i:02d}" for i in range(20)] + [f"val/{i}"
                                                     for i in range(5)] + [f"test/{i}" for i in range(3)]
    data_set(root / "data", names)
    data_set(root / "data", [f"train/x{i}" for i in range(4)] + ["val/x"], masks=0)
    return prepared(root / "data", root / "index")


def test_official_validation_is_excluded_from_draws(tmp_path, official):
    splits.make_split(official, tmp_path, fraction="1/8")
    drawn = lists(tmp_path)
    assert set(drawn) == {"labeled", "unlabeled", "val"}
    assert len(drawn["labeled"]) == 3 and len(drawn["unlabeled"]) == 21
    assert drawn["val"] == [f"images/val/{i}.jpg masks/val/{i}.png" for i in range(5)]
    assert all(line.startswith("images/train/") for name in ("labeled", "unlabeled") for line in drawn[name])
    assert [line for line in drawn["unlabeled"]
            if " " not in line] == [f"images/train/x{i}.jpg" for i in range(4)]
    for name, labelled in (("labeled", True), ("unlabeled", False), ("val", True)):
        assert len(splits.read_split(tmp_path / f"{name}.txt", official,
                                     labelled=labelled)) == len(drawn[name])


def test_validation_is_drawn_on_request(tmp_path, official):
    splits.make_split(official, tmp_path, fraction="1/1", val=0.2)
    drawn = lists(tmp_path)
    assert len(drawn["val"]) == 4 and len(drawn["labeled"]) == 16
    assert not any("images/val" in line for lines in drawn.values() for line in lines)
    assert not set(drawn["val"]) & set(drawn["labeled"])
    assert sorted(drawn["unlabeled"]) == [f"images/train/x{i}.jpg" for i in range(4)]
    assert not any("test" in line for lines in drawn.values() for line in lines)


def test_without_validation_none_is_written(tmp_path):
    made = prepared(data_set(tmp_path / "data", [f"{i}" for i in range(10)]), tmp_path / "index")
    splits.make_split(made, tmp_path / "split", fraction="0.25", val=0.1)
    assert {name: len(lines) for name, lines in lists(tmp_path / "split").items()} == {
        "labeled": 3,
        "unlabeled": 6,
        "val": 1,
    }
    with pytest.raises(UserError, match="labeled.txt: is another list, which would be replaced"):
        splits.make_split(made, tmp_path / "split", fraction="4")
    splits.make_split(made, tmp_path / "split", fraction="4", replace=True)
    assert {name: len(lines) for name,
            lines in lists(tmp_path / "split").items()} == {"labeled": 4, "unlabeled": 6}


def test_voc_lists_are_official(tmp_path, capsys):
    root = data_set(tmp_path / "data", [f"{i}" for i in range(12)], layout="voc")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name, stems in (("train", "0\n1\n2\n3\n"), ("val", "4\n5\n\ngone\n"), ("test", "6\n")):
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(stems)
    made = prepared(root, tmp_path / "index")
    splits.make_split(made, tmp_path / "split", fraction="2")
    drawn = lists(tmp_path / "split")
    assert drawn["val"] == [f"JPEGImages/{i}.jpg SegmentationClass/{i}.png" for i in (4, 5)]
    images = {line.split()[0] for name in ("labeled", "unlabeled") for line in drawn[name]}
    assert images == {f"JPEGImages/{i}.jpg" for i in (0, 1, 2, 3, 7, 8, 9, 10, 11)}
    assert "1 of its 3 images are not in the index" in capsys.readouterr().err


def test_voc_lists_with_extensions_or_paths_are_official(tmp_path):
    root = data_set(tmp_path / "data", [f"{i}" for i in range(6)], layout="voc")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name, text in (("train", "0.jpg\n1.jpg\n"), ("val", "JPEGImages/2.jpg SegmentationClass/2.png\n"),
                       ("test", "3.jpg\n")):
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(text)
    made = prepared(root, tmp_path / "index")
    splits.make_split(made, tmp_path / "split", fraction="2")
    drawn = lists(tmp_path / "split")
    assert drawn["val"] == ["JPEGImages/2.jpg SegmentationClass/2.png"]
    used = {line.split()[0] for name in ("labeled", "unlabeled") for line in drawn[name]}
    assert used == {f"JPEGImages/{i}.jpg" for i in (0, 1, 4, 5)}
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("a/b\nc\n")
    with pytest.raises(UserError, match="val.txt: none of its 2 lines names an image, for example 'a/b'"):
        splits.make_split(made, tmp_path / "other", fraction="2")


def test_draws_depend_only_on_the_seed_and_are_nested(tmp_path, official):
    drawn = {}
    for name, options in {
        "a": {},
        "again": {},
        "other": {"seed": 1},
        "more": {"fraction": "1/2"},
        "huge": {"seed": 2**64 - 1},
    }.items():
        splits.make_split(official, tmp_path / name, **{"fraction": "1/4", **options})
        drawn[name] = lists(tmp_path / name)
    assert drawn["a"] == drawn["again"]
    assert drawn["a"]["labeled"] != drawn["other"]["labeled"] != drawn["huge"]["labeled"]
    assert set(drawn["a"]["labeled"]) < set(drawn["more"]["labeled"])


def test_draw_is_pinned(tmp_path, official):
    """A split must not change between versions."""
    splits.make_split(official, tmp_path, fraction="4", seed=7)
    assert [line.split()[0] for line in lists(tmp_path)["labeled"]] == [
        "images/train/12.jpg", "images/train/15.jpg", "images/train/16.jpg", "images/train/17.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("total", "fraction", "count"),
    [(10582, "1/16", 662), (10582, "1/8", 1323), (10582, "1/4", 2646), (2975, "1/30", 100),
     (2975, "1/8", 372), (2975, "1/4", 744), (1464, "92", 92), (5, "1/1", 5), (5, "1.0", 5), (5, "5", 5),
     (5, "0.001", 1), (8, "0.125", 1)],
)  # fmt: skip
def test_fractions_match_the_public_lists(total, fraction, count):
    assert splits._count(fraction, total) == count


@pytest.mark.parametrize(
    "fraction", ["0", "0/8", "9/8", "1.5", "-1/8", "-3", "1/0", "many", "", "nan", "inf", "25", "1e400"]
)
def test_impossible_fractions(tmp_path, official, fraction):
    with pytest.raises(UserError, match="--fraction"):
        splits.make_split(official, tmp_path, fraction=fraction)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [{"val": 0.0}, {"val": 1.0}, {"val": -0.1}, {"val": float("nan")}, {"seed": -1}, {"seed": 2**64}]
)
def test_impossible_options(tmp_path, official, options):
    with pytest.raises(UserError, match="--val|--seed"):
        splits.make_split(official, tmp_path, **options)


def test_set_without_masks_cannot_be_split(tmp_path):
    made = prepared(data_set(tmp_path / "data", ["a", "b"], masks=0), tmp_path / "index")
    with pytest.raises(UserError, match="no training image has a mask"):
        splits.make_split(made, tmp_path / "split")


def test_classes_without_a_label_are_named(tmp_path, official, capsys):
    splits.make_split(official, tmp_path, fraction="1/8")
    assert "the 3 labelled images hold no pixel of: a;" in capsys.readouterr().err
