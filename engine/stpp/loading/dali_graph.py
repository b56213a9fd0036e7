"""DALI graph of training, and its inputs.

The graph is a function from named input nodes to (images, labels, shapes upright). It is deterministic, and
the same for CPU and GPU builds except for JPEG decoding and the computation of contrast. Operations on some
samples run on those only: the `if`s below are DALI conditionals, which split the batch and merge it again.

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
    """Describes the graph's inputs, one row per sample: name to (type, dimensions, layout). A view's names
    end in its number; a weak view has none.

    Args:
        fed: some images, in rows with `fed`, are passed as upright pixels; the others are read from their
            paths.
        turned: some images need to be turned upright after reading.
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
    """Defines the training graph: from files and numbers (`train_rows`) to the views, float32 [side, side, 3]
    each; masks, uint8 [side, side, 1], if the stream has masks; and shapes, int32 [3] or [6]: height, width
    and channels of the upright image, and of the mask.
    """
    image, mask = _image(x, gpu), None
    shapes = image.shape(dtype=types.INT32)
    if stream.masked:
        mask = decoded_mask(x["mask_path"], gpu)
        shapes = fn.cat(shapes, mask.shape(dtype=types.INT32))
        if gpu:
            mask = mask.gpu()
    # Only the crop's part of the resized image is computed; a reversed region is mirrored.
    roi = {"roi_start": x["roi_start"], "roi_end": x["roi_end"], "size": x["size"]}
    image = fn.resize(image, antialias=True, **roi)
    pad = {"start": x["pad_start"], "shape": [side, side], "axes": [0, 1], "out_of_bounds_policy": "pad"}
    image = fn.slice(image, fill_values=0, **pad)
    if stream.masked:
        mask = fn.slice(fn.resize(mask, interp_type=types.INTERP_NN, **roi), fill_values=IGNORE, **pad)

    views = []
    for number, view in enumerate(stream.views):
        augmented = image
        if view != "weak":
            own = {name: x[f"{name}_{number}"] for name in _VIEW}
            augmented = _recoloured(augmented, own, gpu)
            if stream.box == "erase":
                box = {name: x[f"{name}_{number}"] for name in _box_inputs(stream)}
                augmented = _noisy(augmented, box, side, gpu)
                if stream.masked:
                    mask = _erased(mask, box)
        views.append(_normalised(augmented))
    # The merged masks may be scattered in memory; an operator on all of them makes one block for torch.
    return (*views, *([fn.copy(mask)] if stream.masked else []), shapes)


def _recoloured(image, x: dict, gpu: bool):
    """Applies jitter, gray and blur."""
    if x["jitter"]:
        image = _jitter(image, x, gpu)
    if x["gray"]:
        image = fn.coord_transform(image, M=np.tile(LUMA, 3).tolist(), dtype=types.UINT8)
    if x["blur"]:
        image = _blurred(image, x["blur_kernel"], gpu)
    return image


def _noisy(image, x: dict, side: int, gpu: bool):
    """Fills the box with noise."""
    if x["cutout"]:
        noise = x["noise"]
        if gpu:
            noise = noise.gpu()
        boxes = {"out_anchors": x["box_anchors"], "shapes": x["box_shapes"]}
        image = fn.multi_paste(image, noise, output_size=(side, side), **boxes)
    return image


def _erased(mask, x: dict):
    """Sets the mask to 255 (ignore) in the box."""
    if x["cutout"]:
        mask = fn.erase(mask, anchor=x["box_start"], shape=x["box_size"], axes=(0, 1), fill_value=IGNORE)
    return mask


def decoded_image(path, gpu: bool):
    """Reads and decodes an image, uint8 RGB as stored."""
    # Fancy upsampling matches libjpeg on the CPU: without it GPU images differ at colour edges.
    return fn.decoders.image(fn.io.file.read(path), device="mixed" if gpu else "cpu", output_type=types.RGB,
                             adjust_orientation=False, jpeg_fancy_upsampling=True)  # fmt: skip


def decoded_mask(path, gpu: bool):
    """Reads and decodes a mask, uint8 [H, W, 1] on the CPU; `stpp prepare` has turned masks upright."""
    file = fn.io.file.read(path)
    return fn.decoders.image(file, device="cpu", output_type=types.GRAY, adjust_orientation=False)


def _image(x: dict, gpu: bool):
    """Returns the upright RGB image: passed as pixels, or read."""
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
    """Turns an image upright, as `stpp.images.image_file.upright`."""
    if "transposed" not in x:
        return image
    if x["transposed"]:
        image = fn.transpose(image, perm=[1, 0, 2], transpose_layout=False, output_layout="HWC")
    if x["flipped"]:
        image = fn.flip(image, horizontal=x["mirrored"], vertical=x["upended"])
    return image


def _jitter(image, x: dict, gpu: bool):
    """Applies brightness, contrast, and saturation and hue as one matrix, in the drawn order, each rounded
    and clipped."""
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
    """Computes center + factor (image - center), center = mean colour times `luma`: contrast, or brightness
    if luma is 0."""
    mean = fn.reductions.mean(image, axes=(0, 1))
    if gpu:
        # Operator arguments must be on the CPU, but this mean is on the GPU.
        factor = factor.gpu()
        center = fn.reductions.sum(mean * luma.gpu())
        return fn.cast(image * factor + center * (1.0 - factor), dtype=types.UINT8)
    return fn.brightness_contrast(image, contrast=factor, contrast_center=fn.reductions.sum(mean * luma))


def _blurred(image, kernel, gpu: bool):
    """Filters rows, then columns, with float32 [K]; pixels beyond a border repeat the border."""
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
    """Encodes paths for the graph, a uint8 array each."""
    return [np.frombuffer(path.encode(), dtype=np.uint8) for path in paths]


def train_rows(samples: Sequence[Sample], drawn: Augmentation, stream: Stream, noise: np.ndarray) -> dict:
    """Makes the graph's inputs, except pixels, by name (`train_inputs`): each an array or list with one entry
    per sample.

    Args:
        samples, drawn: N samples and their augmentation.
        stream: stream of the samples.
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
    visible = np.minimum(resized - start, side)
    # A mask pixel on the border of two takes the later one. DALI computes in float32, which may fall short of
    # the border: a nudge of a millionth of the size decides it, with no visible effect on the image.
    nudge = source * 2.0**-20
    roi_start = start * source / resized + nudge
    roi_end = (start + visible) * source / resized + nudge
    flip = cut.flip
    roi_start[flip, 1], roi_end[flip, 1] = roi_end[flip, 1], roi_start[flip, 1]
    pad_start = np.zeros_like(visible)
    pad_start[flip, 1] = visible[flip, 1] - side  # the padding on the right is mirrored to the left
    return {"roi_start": roi_start.astype(np.float32), "roi_end": roi_end.astype(np.float32),
            "size": visible.astype(np.float32), "pad_start": pad_start.astype(np.int32)}


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
    """Makes the inputs that turn images upright; see `stpp.images.image_file.upright`."""
    turns = np.array([sample.orientation for sample in samples])
    mirrored, upended = np.isin(turns, (2, 3, 6, 7)), np.isin(turns, (3, 4, 7, 8))
    return {"transposed": turns >= 5, "flipped": mirrored | upended, "mirrored": mirrored.astype(np.int32),
            "upended": upended.astype(np.int32)}


def _blur_kernel(sigma: float) -> np.ndarray:
    """Computes the kernel of PIL's Gaussian blur, a box applied three times: float32 [K]; [1] for sigma 0.

    Each box has a third of the variance: 2 `reach` + 1 whole pixels, and a fraction of the pixel on either
    side.
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
    """Makes the inputs of colour jitter as three operations: two scalings (brightness, contrast) and one
    matrix (saturation, hue).

    Without clipping, saturation commutes with brightness and contrast, so it is merged with the hue, with no
    visible difference (docs/augmentation.md): one matrix product per pixel instead of two.
    """
    place = np.argsort(view.jitter_order, axis=1)  # place[:, op]: position of op in the order
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
    """Computes saturation matrices, float64 [N, 3, 3]: a blend with the gray image, exactly as in PIL."""
    factor = factor.astype(np.float64)[:, None, None]
    return factor * np.eye(3) + (1 - factor) * np.tile(LUMA.astype(np.float64), (3, 1))


def _hue_matrix(turns: np.ndarray) -> np.ndarray:
    """Computes hue matrices, float64 [N, 3, 3]: rotations of the colours about the gray axis.

    A rotation equals the shift in HSV for gray pixels and for thirds of the circle, and approximates it in
    between. The shift is in whole 1/256 turns, as in 8-bit HSV.
    """
    angle = 2 * np.pi * np.trunc(turns.astype(np.float64) * 255) / 256
    diagonal = (1 + 2 * np.cos(angle)) / 3
    minus = (1 - np.cos(angle)) / 3 - np.sin(angle) / np.sqrt(3)
    plus = (1 - np.cos(angle)) / 3 + np.sin(angle) / np.sqrt(3)
    rows = [[diagonal, minus, plus], [plus, diagonal, minus], [minus, plus, diagonal]]
    return np.moveaxis(np.array(rows), 2, 0)
