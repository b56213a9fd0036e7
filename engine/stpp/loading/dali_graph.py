"""The DALI graph of training, and the numbers it is fed.

The graph is a function from named input nodes to (images, labels, shapes upright). It holds no randomness,
and is the same for CPU and GPU builds but for where JPEGs are decoded and how contrast is computed. What only
some samples undergo runs on those alone: the `if`s below are DALI conditionals, which split the batch and
merge it again.

Legend: N samples, H W pixels, C colours. Images inside the graph are uint8 HWC, masks uint8 HW1.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types

from stpp.images.image_file import IMAGENET_MEAN, IMAGENET_STD
from stpp.images.masks import IGNORE
from stpp.loading.augment import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    LUMA,
    SATURATION,
    Appearance,
    Augmentation,
    Geometry,
)
from stpp.loading.sample import Sample, Stream

_CROP = {
    "image_path": (types.UINT8, 1, ""),
    "roi_start": (types.FLOAT, 1, ""),
    "roi_end": (types.FLOAT, 1, ""),
    "size": (types.FLOAT, 1, ""),
    "pad_start": (types.INT32, 1, ""),
}
_MASK = {"mask_path": (types.UINT8, 1, "")}
_VIEW = {
    "jitter": (types.BOOL, 0, ""),
    "matrix": (types.FLOAT, 2, ""),
    "matrix_place": (types.INT32, 0, ""),
    "factor_1": (types.FLOAT, 0, ""),
    "luma_1": (types.FLOAT, 1, ""),
    "factor_2": (types.FLOAT, 0, ""),
    "luma_2": (types.FLOAT, 1, ""),
    "gray": (types.BOOL, 0, ""),
    "blur": (types.BOOL, 0, ""),
    "blur_kernel": (types.FLOAT, 1, ""),
}
_BOX = {
    "cutout": (types.BOOL, 0, ""),
    "box_anchors": (types.INT32, 2, ""),
    "box_shapes": (types.INT32, 2, ""),
    "noise": (types.UINT8, 3, "HWC"),
}
_BOX_OF_MASK = {"box_start": (types.FLOAT, 1, ""), "box_size": (types.FLOAT, 1, "")}
_FED = {"fed": (types.BOOL, 0, ""), "pixels": (types.UINT8, 3, "HWC")}
_TURNED = {
    "transposed": (types.BOOL, 0, ""),
    "flipped": (types.BOOL, 0, ""),
    "mirrored": (types.INT32, 0, ""),
    "upended": (types.INT32, 0, ""),
}


def train_inputs(stream: Stream, *, fed: bool, turned: bool) -> dict[str, tuple]:
    """What the graph is fed, one row a sample: name -> (type, dimensions, layout). A view's names end in its
    number; a weak view has none.

    Args:
        fed: some images come as pixels, upright: those of rows with `fed`. The others are read from their
            paths.
        turned: some images that are read are turned upright.
    """
    inputs = _CROP | (_MASK if stream.masked else {}) | (_FED if fed else {}) | (_TURNED if turned else {})
    for number in _coloured(stream):
        inputs |= {f"{name}_{number}": kind for name, kind in (_VIEW | _box_inputs(stream)).items()}
    return inputs


def _box_inputs(stream: Stream) -> dict[str, tuple]:
    if stream.box == "paste":
        return {}
    return _BOX | (_BOX_OF_MASK if stream.masked else {})


def _coloured(stream: Stream) -> list[int]:
    """Numbers of the views that may differ from the plain crop."""
    return [number for number, view in enumerate(stream.views) if view != "weak"]


def train_graph(x: dict, gpu: bool, *, side: int, stream: Stream) -> tuple:
    """Files and numbers (`train_rows`) to the views, float32 [side, side, 3] each; masks, uint8 [side, side,
    1], if the stream has masks; shapes.

    Shapes: int32 [3] or [6], height, width and channels of the upright image and of the mask.
    """
    image, mask = _image(x, gpu), None
    shapes = image.shape(dtype=types.INT32)
    if stream.masked:
        mask = decoded_mask(x["mask_path"], gpu)
        shapes = fn.cat(shapes, mask.shape(dtype=types.INT32))
        if gpu:
            mask = mask.gpu()
    # Only the part of the resized image that the crop shows is computed; a reversed region comes out
    # mirrored.
    roi = {"roi_start": x["roi_start"], "roi_end": x["roi_end"], "size": x["size"]}
    image = fn.resize(image, antialias=True, **roi)
    pad = {"start": x["pad_start"], "shape": [side, side], "axes": [0, 1], "out_of_bounds_policy": "pad"}
    image = fn.slice(image, fill_values=0, **pad)
    if stream.masked:
        mask = fn.slice(fn.resize(mask, interp_type=types.INTERP_NN, **roi), fill_values=IGNORE, **pad)

    views = []
    for number, view in enumerate(stream.views):
        seen = image
        if view != "weak":
            own = {name: x[f"{name}_{number}"] for name in _VIEW}
            seen = _recoloured(seen, own, gpu)
            if stream.box == "erase":
                box = {name: x[f"{name}_{number}"] for name in _box_inputs(stream)}
                seen = _noisy(seen, box, side, gpu)
                if stream.masked:
                    mask = _erased(mask, box)
        views.append(_normalised(seen))
    # The merged masks may lie scattered; an operator on all of them makes one block, which torch can take
    # over.
    return (*views, *([fn.copy(mask)] if stream.masked else []), shapes)


def _recoloured(image, x: dict, gpu: bool):
    """Jitter, gray, blur."""
    if x["jitter"]:
        image = _jitter(image, x, gpu)
    if x["gray"]:
        image = fn.coord_transform(image, M=np.tile(LUMA, 3).tolist(), dtype=types.UINT8)
    if x["blur"]:
        image = _blurred(image, x["blur_kernel"], gpu)
    return image


def _noisy(image, x: dict, side: int, gpu: bool):
    """Noise in the box."""
    if x["cutout"]:
        noise = x["noise"]
        if gpu:
            noise = noise.gpu()
        boxes = {"out_anchors": x["box_anchors"], "shapes": x["box_shapes"]}
        image = fn.multi_paste(image, noise, output_size=(side, side), **boxes)
    return image


def _erased(mask, x: dict):
    """Ignored pixels in the box."""
    if x["cutout"]:
        mask = fn.erase(mask, anchor=x["box_start"], shape=x["box_size"], axes=(0, 1), fill_value=IGNORE)
    return mask


def decoded_image(path, gpu: bool):
    """uint8 RGB as stored, of a path."""
    # Fancy upsampling is what libjpeg does on the CPU: without it GPU images differ at colour edges.
    return fn.decoders.image(fn.io.file.read(path), device="mixed" if gpu else "cpu", output_type=types.RGB,
                             adjust_orientation=False, jpeg_fancy_upsampling=True)  # fmt: skip


def decoded_mask(path, gpu: bool):
    """uint8 [H, W, 1] on the CPU, of a path; a mask that had to be turned was written anew when it was
    prepared."""
    file = fn.io.file.read(path)
    return fn.decoders.image(file, device="cpu", output_type=types.GRAY, adjust_orientation=False)


def _image(x: dict, gpu: bool):
    """The upright RGB image: as it was fed, or read."""
    if "fed" not in x:
        return _upright(decoded_image(x["image_path"], gpu), x)
    if x["fed"]:
        image = x["pixels"]
        if gpu:
            image = image.gpu()
    else:
        image = _upright(decoded_image(x["image_path"], gpu), x)
    return image


def _upright(image, x: dict):
    """`stpp.images.image_file.upright`."""
    if "transposed" not in x:
        return image
    if x["transposed"]:
        image = fn.transpose(image, perm=[1, 0, 2], transpose_layout=False, output_layout="HWC")
    if x["flipped"]:
        image = fn.flip(image, horizontal=x["mirrored"], vertical=x["upended"])
    return image


def _jitter(image, x: dict, gpu: bool):
    """Brightness, contrast, and saturation and hue as one matrix, in the drawn order, each rounded and
    clipped."""
    if x["matrix_place"] == 0:
        image = fn.coord_transform(image, M=x["matrix"], dtype=types.UINT8)
    image = _scale_around(image, x["factor_1"], x["luma_1"], gpu)
    if x["matrix_place"] == 1:
        image = fn.coord_transform(image, M=x["matrix"], dtype=types.UINT8)
    image = _scale_around(image, x["factor_2"], x["luma_2"], gpu)
    if x["matrix_place"] == 2:
        image = fn.coord_transform(image, M=x["matrix"], dtype=types.UINT8)
    return image


def _scale_around(image, factor, luma, gpu: bool):
    """center + factor (image - center), center = mean colour times `luma`: contrast, or brightness where luma
    is 0."""
    mean = fn.reductions.mean(image, axes=(0, 1))
    if gpu:
        # Arguments of operators live on the CPU, this mean does not.
        factor = factor.gpu()
        center = fn.reductions.sum(mean * luma.gpu())
        return fn.cast(image * factor + center * (1.0 - factor), dtype=types.UINT8)
    return fn.brightness_contrast(image, contrast=factor, contrast_center=fn.reductions.sum(mean * luma))


def _blurred(image, kernel, gpu: bool):
    """Rows, then columns, filtered with float32 [K]; pixels beyond a border are those at it."""
    if gpu:
        kernel = kernel.gpu()
    for shape in ([1, -1], [-1, 1]):
        image = fn.filter(image, fn.reshape(kernel, shape=shape), border="clamp")
    return image


def _normalised(image):
    mean = [255 * value for value in IMAGENET_MEAN]
    std = [255 * value for value in IMAGENET_STD]
    return fn.crop_mirror_normalize(image, mean=mean, std=std, output_layout="HWC", dtype=types.FLOAT)


def path_rows(paths: Iterable[str]) -> list[np.ndarray]:
    """Paths as the graph reads them: a uint8 array each."""
    return [np.frombuffer(path.encode(), dtype=np.uint8) for path in paths]


def train_rows(samples: Sequence[Sample], drawn: Augmentation, stream: Stream, noise: np.ndarray) -> dict:
    """The graph's inputs but for pixels, by their names (`train_inputs`): each an array or list with one
    entry a sample.

    Args:
        samples, drawn: N samples and what happens to them.
        stream: that they are of.
        noise: uint8 [side of the noise, side of the noise, 3].
    """
    masks = {"mask_path": path_rows(sample.mask for sample in samples)} if stream.masked else {}
    rows = {"image_path": path_rows(sample.image for sample in samples), **masks, **_turn_rows(samples),
            **_crop_rows(samples, drawn.geometry)}
    for number in _coloured(stream):
        view = drawn.views[number]
        own = _view_rows(view) | (_box_rows(view, drawn.geometry.crop_px, noise) if stream.box == "erase"
                                  else {})
        rows |= {f"{name}_{number}": values for name, values in own.items()}
    return rows


def _crop_rows(samples: Sequence[Sample], cut: Geometry) -> dict:
    source, side = np.array([(sample.height, sample.width) for sample in samples],
                            dtype=np.float64), cut.crop_px
    resized = np.stack([cut.resize_h, cut.resize_w], axis=1)
    start = np.stack([cut.crop_y, cut.crop_x], axis=1)
    shown = np.minimum(resized - start, side)
    # Where a mask's pixel falls on the border of two, the later one is taken. DALI computes in float32, which
    # may fall short of the border: a millionth of the size decides it, and is nothing to the image.
    nudge = source * 2.0**-20
    roi_start = start * source / resized + nudge
    roi_end = (start + shown) * source / resized + nudge
    flip = cut.flip
    roi_start[flip, 1], roi_end[flip, 1] = roi_end[flip, 1], roi_start[flip, 1]
    pad_start = np.zeros_like(shown)
    pad_start[flip, 1] = shown[flip, 1] - side  # the padding on the right is mirrored to the left
    return {"roi_start": roi_start.astype(np.float32), "roi_end": roi_end.astype(np.float32),
            "size": shown.astype(np.float32), "pad_start": pad_start.astype(np.int32)}


def _view_rows(view: Appearance) -> dict:
    return {"jitter": view.jitter, **_jitter_rows(view), "gray": view.gray, "blur": view.blur_sigma > 0,
            "blur_kernel": [_blur_kernel(sigma) for sigma in view.blur_sigma.tolist()]}


def _box_rows(view: Appearance, side: int, noise: np.ndarray) -> dict:
    corner, size = view.box[:, :2], view.box[:, 2:]
    zeros, whole = np.zeros_like(corner), np.full_like(corner, side)
    return {
        "cutout": view.box[:, 2] > 0,
        "box_anchors": np.stack([zeros, corner], axis=1),
        "box_shapes": np.stack([whole, size], axis=1),
        "box_start": corner.astype(np.float32),
        "box_size": size.astype(np.float32),
        "noise": [
            np.ascontiguousarray(noise[ny + y : ny + y + max(h, 1), nx + x : nx + x + max(w, 1)])
            for (ny, nx), (y, x, h, w) in zip(view.noise_offset.tolist(), view.box.tolist(), strict=True)
        ],
    }


def _turn_rows(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """How each image that the graph reads is turned upright; see `stpp.images.image_file.upright`."""
    turns = np.array([sample.orientation for sample in samples])
    mirrored, upended = np.isin(turns, (2, 3, 6, 7)), np.isin(turns, (3, 4, 7, 8))
    return {"transposed": turns >= 5, "flipped": mirrored | upended, "mirrored": mirrored.astype(np.int32),
            "upended": upended.astype(np.int32)}


def _blur_kernel(sigma: float) -> np.ndarray:
    """float32 [K]: PIL's Gaussian blur, a box three times over; [1] for sigma 0.

    Each box has a third of the variance: 2 `reach` + 1 whole pixels, and of the pixels beside them the part
    that makes up the rest.
    """
    if sigma == 0:
        return np.ones(1, dtype=np.float32)
    variance = sigma**2 / 3
    reach = int((np.sqrt(12 * variance + 1) - 1) / 2)
    whole = 2 * reach + 1
    part = whole * (3 * variance - reach * (reach + 1)) / (6 * ((reach + 1) ** 2 - variance))
    box = np.array([part, *[1.0] * whole, part]) / (whole + 2 * part)
    return np.convolve(np.convolve(box, box), box).astype(np.float32)


def _jitter_rows(view: Appearance) -> dict[str, np.ndarray]:
    """Colour jitter as three operations: two scalings (brightness, contrast) and one matrix (saturation,
    hue).

    Without clipping, saturation commutes with brightness and contrast, so it can be moved beside the hue at
    no loss that shows (docs/augmentation.md): one matrix product a pixel instead of two.
    """
    place = np.argsort(view.jitter_order, axis=1)  # place[:, op]: when op happens
    contrast_first = place[:, CONTRAST] < place[:, BRIGHTNESS]
    saturation, hue = _saturation_matrix(view.saturation), _hue_matrix(view.hue)
    saturation_first = (place[:, SATURATION] < place[:, HUE])[:, None, None]
    before_hue = (place[:, BRIGHTNESS] < place[:, HUE]).astype(np.int32) + (
        place[:, CONTRAST] < place[:, HUE]
    )
    return {
        "matrix": np.where(saturation_first, hue @ saturation, saturation @ hue).astype(np.float32),
        "matrix_place": before_hue.astype(np.int32),
        "factor_1": np.where(contrast_first, view.contrast, view.brightness),
        "luma_1": contrast_first[:, None] * LUMA,
        "factor_2": np.where(contrast_first, view.brightness, view.contrast),
        "luma_2": ~contrast_first[:, None] * LUMA,
    }


def _saturation_matrix(factor: np.ndarray) -> np.ndarray:
    """float64 [N, 3, 3]: blend with the gray image, exactly PIL's saturation."""
    factor = factor.astype(np.float64)[:, None, None]
    return factor * np.eye(3) + (1 - factor) * np.tile(LUMA.astype(np.float64), (3, 1))


def _hue_matrix(turns: np.ndarray) -> np.ndarray:
    """float64 [N, 3, 3]: rotation of the colours about the gray axis.

    It equals the shift in HSV for gray pixels and for thirds of the circle, and is a linear map near it
    between. The shift is taken in whole 1/256 turns, as 8-bit HSV takes it.
    """
    angle = 2 * np.pi * np.trunc(turns.astype(np.float64) * 255) / 256
    diagonal = (1 + 2 * np.cos(angle)) / 3
    minus = (1 - np.cos(angle)) / 3 - np.sin(angle) / np.sqrt(3)
    plus = (1 - np.cos(angle)) / 3 + np.sin(angle) / np.sqrt(3)
    rows = [[diagonal, minus, plus], [plus, diagonal, minus], [minus, plus, diagonal]]
    return np.moveaxis(np.array(rows), 2, 0)
