"""Masks that need the whole set to be judged: palettes, bits, alpha, 0 and 255, soft edges, specks."""

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dataset_cases import data_set, ids, paletted, prepare
from stpp.dataset.mask_judge import edges
from stpp.errors import UserError
from stpp.images.masks import read_index_mask

BLACK, GREEN, RED, BLUE = (0, 0, 0), (0, 200, 0), (200, 0, 0), (0, 0, 200)


def refused(root, match, **options):
    with pytest.raises(UserError, match=match) as error:
        prepare(root, **options)
    assert "\n" not in str(error.value) and not (root.parent / "index" / "index.json").exists()
    return str(error.value)


def bilevel(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values > 0)  # Pillow writes one bit a pixel


# --- palettes


def test_index_with_two_colours_is_refused_and_readable_by_colour(tmp_path):
    root = data_set(
        tmp_path / "data",
        {"a": paletted(ids(1, 2), BLACK, GREEN, RED), "b": paletted(ids(2, 1), BLACK, RED, GREEN)},
    )
    said = refused(root, r"index 1 is #00c800 in labels/a\.png and #c80000 in labels/b\.png")
    assert "--data.mask-map" in said and "'#00c800=CLASS'" in said
    made = prepare(root, mask_map=["#000000=background", "#00c800=leaf", "#c80000=stem"])
    first, second = (read_index_mask(made.sample(f"photos/{name}.jpg").mask) for name in "ab")
    assert (first == second).all() and set(np.unique(first)) == {0, 1, 2}


def test_colour_with_two_indices_is_refused(tmp_path):
    """No index has two colours, because each mask uses others."""
    root = data_set(
        tmp_path / "data",
        {"a": paletted(ids(1), BLACK, GREEN, BLUE), "b": paletted(ids(2), BLACK, BLUE, GREEN)},
    )
    refused(root, r"#00c800 is index 1 in labels/a\.png and 2 in labels/b\.png")


def test_common_palette_is_read_by_index_despite_unused_entries(tmp_path):
    root = data_set(
        tmp_path / "data",
        {
            "a": paletted(ids(1), BLACK, GREEN),
            "b": paletted(ids(2), BLACK, BLUE, RED),
            "c": paletted(ids(1, 2), BLACK, GREEN, RED),
            "d": ids(1, 2),
        },
    )
    made = prepare(root)
    assert [made.entries[f"photos/{name}.jpg"].class_pixels[1:] for name in "abcd"] == [
        [80, 0],
        [0, 80],
        [80, 80],
        [80, 80],
    ]


@pytest.mark.parametrize(
    "grays", [((0,) * 3, (255,) * 3), ((0,) * 3, (2,) * 3, (1,) * 3), ((128,) * 3, (0,) * 3)]
)
def test_palette_of_other_grays_is_refused_with_both_remedies(tmp_path, grays):
    values = ids(*range(1, len(grays)))
    root = data_set(tmp_path / "data", {"a": paletted(values, *grays), "b": paletted(values, *grays)})
    said = refused(root, r"labels/a\.png: its palette shows index \d as gray \d+")
    assert "2 masks of this kind" in said
    entries = [f"#{gray[0]:02x}{gray[0]:02x}{gray[0]:02x}={i}" for i, gray in enumerate(grays)]
    made = prepare(root, mask_map=entries)
    assert (read_index_mask(made.sample("photos/a.jpg").mask) == values).all()
    with pytest.raises(
        UserError, match="its palette shows"
    ):  # a map of numbers that are also grays is ambiguous
        prepare(root, mask_map=[f"{i}={i}" for i in range(len(grays))])


def test_map_of_numbers_that_are_no_grays_selects_indices(tmp_path):
    root = data_set(tmp_path / "data", {"a": paletted(ids(1), (10,) * 3, (20,) * 3)})
    assert prepare(root, mask_map=["0=0", "1=2"]).entries["photos/a.jpg"].class_pixels == [688, 0, 80]
    assert prepare(root, mask_map=["#0a0a0a=0", "#141414=1"]).entries["photos/a.jpg"].class_pixels == [
        688,
        80,
        0,
    ]


def test_palette_with_grays_equal_to_indices_is_read(tmp_path):
    root = data_set(tmp_path / "data", {"a": paletted(ids(1, 2), *((i,) * 3 for i in range(3)))})
    assert prepare(root).entries["photos/a.jpg"].class_pixels[1:] == [80, 80]


def test_single_gray_in_a_palette_is_accepted(tmp_path):
    """Such as VOC's bus, which is gray 128 at index 7."""
    root = data_set(tmp_path / "data", {"a": paletted(ids(2), BLACK, RED, (128, 128, 128))})
    assert prepare(root).entries["photos/a.jpg"].class_pixels[1:] == [0, 80]


# --- bits and alpha


def test_one_bit_alone_is_read_by_its_number(tmp_path):
    root = data_set(
        tmp_path / "data", {"a": bilevel(ids(1)), "b": bilevel(ids(1, 1))}, ("background", "leaf")
    )
    assert prepare(root).entries["photos/b.jpg"].class_pixels[1] == 160


def test_one_bit_among_eight_is_refused_unless_the_map_names_both(tmp_path):
    root = data_set(tmp_path / "data", {"a": ids(1, 2), "b": bilevel(ids(1))})
    refused(root, r"labels/b\.png: has 1 bits a pixel, and labels/a\.png has 8")
    refused(root, "has 1 bits", mask_map=["0=0", "1=1", "2=2"])
    made = prepare(root, mask_map=["0=0", "1=1", "2=2", "255=1"])
    assert made.entries["photos/b.jpg"].class_pixels[1] == 80
    assert prepare(data_set(tmp_path / "empty", {"a": ids(1, 2), "b": bilevel(ids())})).counts["masks"] == 2


@pytest.mark.parametrize("alpha", [ids(128), np.where(ids(1) > 0, 255, 0).astype(np.uint8)])
@pytest.mark.parametrize("coloured", [True, False])
def test_alpha_that_is_not_constant_is_refused(tmp_path, alpha, coloured):
    image = Image.fromarray(ids(1)).convert("RGBA" if coloured else "LA")
    image.putalpha(Image.fromarray(alpha))
    refused(
        data_set(tmp_path / "data", {"a": image}), r"labels/a\.png: \d+ pixels of the mask are transparent"
    )
    image.putalpha(7)
    assert prepare(data_set(tmp_path / "plain", {"a": image})).entries["photos/a.jpg"].class_pixels[1] == 80


def test_colours_that_only_transparency_tells_apart_are_refused(tmp_path):
    """A palette with two blacks, one of them transparent: the visible colour is ambiguous."""
    image = paletted(ids(1, 2), BLACK, BLACK, GREEN)
    image.info["transparency"] = 0
    colours = ["#000000=leaf", "#00c800=stem"]
    refused(data_set(tmp_path / "data", {"a": image}), "608 pixels of the mask are transparent",
            mask_map=colours)
    image.info["transparency"] = bytes([9, 200, 255])
    refused(data_set(tmp_path / "some", {"a": image}), "608 pixels of the mask are transparent",
            mask_map=colours)
    image.info["transparency"] = 2
    made = prepare(data_set(tmp_path / "other", {"a": image}), mask_map=colours)
    assert made.entries["photos/a.jpg"].class_pixels == [0, 688, 80]


# --- 0 and 255


def test_masks_of_0_and_255_are_refused_unless_mapped(tmp_path):
    root = data_set(tmp_path / "data", {"a": ids(255), "b": ids()}, ("background", "lesion"))
    assert "'lesion'" in refused(root, "--data.mask-map 0=0 255=1")
    assert prepare(root, mask_map=["0=0", "255=1"]).entries["photos/a.jpg"].class_pixels[1] == 80
    assert prepare(root, mask_map=["0=0", "255=ignore"]).entries["photos/a.jpg"].class_pixels == [688, 0]
    (root.parent / "index" / "index.json").unlink()
    refused(root, "only 0 and 255", mask_map=["0=0", "1=1"])


def test_masks_of_0_and_255_among_masks_of_0_and_1_are_refused(tmp_path):
    refused(
        data_set(tmp_path / "data", {"a": ids(255), "b": ids(1)}, ("background", "lesion")),
        "255 is ignore: if it also means 'lesion'",
    )
    root = data_set(
        tmp_path / "voc", {"a": ids(255), "b": ids(1), "c": ids(1, 255)}, ("background", "lesion")
    )
    assert prepare(root).counts["masks"] == 3


# --- soft edges and noise


def shapes(*values: int, scale: int = 1) -> Image.Image:
    image = Image.new("L", (128 * scale, 96 * scale))
    draw = ImageDraw.Draw(image)
    for i, value in enumerate(values):
        left, top = (10 + 30 * i) * scale, (8 + 14 * i) * scale
        draw.ellipse([left, top, left + 40 * scale, top + 50 * scale], fill=value)
    return image


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


SPOILT = {
    "jpeg 80": lambda *values: as_jpeg(shapes(*values), 80),
    "jpeg 95": lambda *values: as_jpeg(shapes(*values), 95),
    "anti-aliased": lambda *values: shapes(*values, scale=4).resize((128, 96), Image.Resampling.BOX),
    "resized": lambda *values: shapes(*values).resize((150, 110), Image.Resampling.BILINEAR),
}


def of_size(image: Image.Image, root, name: str) -> None:
    Image.new("RGB", image.size).save(root / "photos" / f"{name}.jpg")


@pytest.mark.parametrize("how", SPOILT)
def test_soft_edges_in_a_long_class_list_are_refused(tmp_path, how):
    """Every id is in the list, so each pixel alone is valid."""
    masks = {
        name: SPOILT[how](*values) for name, values in {"a": (5, 20), "b": (15, 30), "c": (8, 25, 12)}.items()
    }
    root = data_set(tmp_path / "data", masks, [f"class {i}" for i in range(60)])
    for name, mask in masks.items():
        of_size(mask, root, name)
    refused(root, "soft edges or JPEG noise")
    made = prepare(root, mask_map=["0-59=0-59"])  # the user states that the ids are meant
    assert any("edges pass through" in text for text in made.warnings)


@pytest.mark.parametrize("how", ["anti-aliased", "resized", "jpeg 80"])
def test_soft_edges_of_three_classes_are_named(tmp_path, how, capsys):
    masks = {f"{i}": SPOILT[how](1, 2, 1) for i in range(3)}
    root = data_set(tmp_path / "data", masks, [f"class {i}" for i in range(9)])
    for name, mask in masks.items():
        of_size(mask, root, name)
    try:
        prepare(root)
        assert "soft edges or JPEG noise" in capsys.readouterr().err
    except UserError as error:
        assert "soft edges or JPEG noise" in str(error)


def test_clean_and_thin_masks_are_not_reported(tmp_path, capsys):
    line = Image.new("L", (128, 96))
    ImageDraw.Draw(line).line([0, 0, 127, 90], fill=2)
    masks = {
        "a": shapes(1, 2),
        "b": shapes(2, 1),
        "line": line,
        "checks": Image.fromarray((np.indices((96, 128)).sum(0) % 2).astype(np.uint8)),
    }
    root = data_set(tmp_path / "data", masks)
    for name, mask in masks.items():
        of_size(mask, root, name)
    prepare(root)
    assert "edges" not in capsys.readouterr().err


def test_many_unknown_ids_are_noise_and_few_are_missing_classes(tmp_path):
    root = data_set(
        tmp_path / "data", {"a": shapes(128, 255, scale=4).resize((32, 24), Image.Resampling.BOX)}
    )
    refused(
        root,
        r"labels/a\.png: \d+ ids from \d+ to \d+ in \d+ pixels are outside the class list .*: soft edges or "
        r"JPEG noise",
    )
    refused(data_set(tmp_path / "few", {"a": ids(7, 8)}), r"class id 7 in 80 pixels, id 8 in 80 pixels")


def test_many_unknown_colours_are_noise(tmp_path):
    image = Image.new("RGB", (32, 24))
    ImageDraw.Draw(image).ellipse([4, 4, 20, 18], fill=GREEN)
    root = data_set(tmp_path / "data", {"a": as_jpeg(image, 70)})
    refused(
        root,
        r"labels/a\.png: \d+ colours in \d+ pixels are not in the mask map: soft edges or JPEG noise; save",
        mask_map=["#000000=background", "#00c800=leaf"],
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 12)), data=st.data())
def test_edge_counts_equal_a_loop(shape, data):
    values = np.array(
        data.draw(
            st.lists(
                st.sampled_from([0, 1, 2, 3, 255]), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
            )
        ),
        np.uint8,
    ).reshape(shape)
    count = soft = 0
    for rows in (values, values.T):
        for row in rows.tolist():
            for before, at, after in zip(row, row[1:], row[2:], strict=False):
                count += before != at
                soft += (before < at < after and after != 255) or (before > at > after and before != 255)
    assert (edges(values).count, edges(values).soft) == (count, soft)
