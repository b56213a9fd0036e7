"""Operator `dilated_conv3x3`: a 3x3 convolution that skips padding, as one matrix product per tap over the
pixels where the tap is valid.

With stride 1 and padding = dilation d, output pixel (y, x) of an H x W map is

    out[y, x] = sum over ky, kx in {-1, 0, 1} of W[ky, kx] in[y + ky d, x + kx d],
    in = 0 outside the map.

The terms with y + ky d outside [0, H) or x + kx d outside [0, W) are exact zeros and can be left out. For a
tap (ky, kx) the remaining pixels are a rectangle of (H - |ky| d) x (W - |kx| d), empty if d reaches the map's
size. Summed over taps, a share ((H + 2 max(H - d, 0)) / 3H) ((W + 2 max(W - d, 0)) / 3W) of the nine full
rectangles remains: at 41 x 41 it is 0.65, 0.37 and 0.17 for d = 12, 24 and 36. On its rectangle a tap is a
matrix product over channels:

    forward            out[rectangle] += in[rectangle + (ky, kx) d] W[ky, kx]^T
    weight gradient    dW[ky, kx] = dout[rectangle]^T in[rectangle + (ky, kx) d]
    input gradient     din[y, x] = sum over valid taps of dout[y - ky d, x - kx d] W[ky, kx]

The valid taps of the input gradient are the same for all pixels of one of at most nine regions (cut at d and
H - d, d and W - d), so each region is one product whose inner dimension runs over taps and output channels,
and is written once.

The function `form` decides which of the three products are computed this way, and which by an ordinary
convolution.

Layout: a range of rows must be one contiguous matrix. The middle column (kx = 0) is contiguous, image by
image, in channels_last; the narrower rectangles of the other columns are copied, image by image, into one
buffer: fresh memory for all images would cost more in page faults than the copy. Partial sums are float32
(float64 for float64). bfloat16 and float16 are multiplied natively if the hardware supports it, and in
float32 on a CPU that would emulate them (many times slower).
"""

import functools
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from stpp_kernels import dispatch, reference
from stpp_kernels.tap_geometry import regions, valid_range, valid_share

MAX_VALID_SHARE = 0.95
"""Maximum share of valid taps; above it there is little to save, and an ordinary convolution is used."""

WIDE = 1024
"""Minimum input channels for which a weight gradient over more than half of the taps repays copying
columns."""

FORM_VARIABLE = "STPP_DILATED_CONV"
"""Environment variable: "taps", "conv" or, on CUDA, "triton" forces that form; unset: `form` decides."""


def form(product: str, x_NIHW: Tensor, dilation: int) -> str:
    """Chooses the form of a product: the taps, or "conv" (`F.conv2d`, in the dtype of `_compute_dtype`).

    Measured (benchmarks/NOTES.md): oneDNN's convolution skips padding in the forward pass and in the input
    gradient, in float32 and in AVX-512's bfloat16: 0.8 to 2.5 times as fast as the taps. It does not in the
    weight gradient (1.2 to 10 times as slow), nor in AMX's bfloat16. If bfloat16 is emulated, the taps widen
    it while copying to their buffer, which the convolution does in a separate pass: 1.2 times as slow. On
    CUDA neither the taps nor the implicit product in Triton (`triton/dilated_conv.py`) has been compared with
    cuDNN: only STPP_DILATED_CONV=taps or =triton enables them.

    Args:
        product: "forward", "input gradient" or "weight gradient".
        x_NIHW: input of the convolution.
        dilation: at least 1.

    Returns:
        "taps", "conv" or "triton".
    """
    forced = _forced_form()
    if forced:
        return "taps" if forced == "triton" and x_NIHW.dtype not in dispatch.CPP_DTYPES else forced
    share = valid_share(*x_NIHW.shape[2:], dilation)
    if x_NIHW.device.type != "cpu" or share > MAX_VALID_SHARE:
        return "conv"
    if not _convolution_skips_padding(x_NIHW.dtype):
        return "taps"
    worth_copying = share < 0.5 or x_NIHW.shape[1] >= WIDE
    return "taps" if product == "weight gradient" and worth_copying else "conv"


def _forced_form() -> str:
    """Form that the environment forces, or ""."""
    requested = os.environ.get(FORM_VARIABLE, "")
    if requested in ("taps", "conv", "triton"):
        return requested
    return "conv" if dispatch.reference_forced() else ""


def valid_taps(x_NIHW: Tensor, weight_OI33: Tensor, dilation: int) -> Tensor:
    """Computes the forward pass over valid taps; channels_last, in x's dtype."""
    compute = _compute_dtype(x_NIHW)
    taps_33OI = _taps(weight_OI33, compute)
    num_images, _, height, width = x_NIHW.shape
    channels = weight_OI33.shape[0]
    total_NHWO = x_NIHW.new_empty((num_images, height, width, channels), dtype=_sum_dtype(compute))
    for kx in (1, 0, 2):  # the middle column first: it covers the whole map
        into_x, from_x = valid_range(width, kx, dilation)
        part_HWO = total_NHWO.new_empty((height, from_x.stop - from_x.start, channels)) if kx != 1 else None
        for total_HWO, source in zip(total_NHWO, _matrices(x_NIHW, from_x, compute), strict=False):
            if kx == 1:
                _add_rows(total_HWO, source, taps_33OI[:, kx], dilation)
            else:
                _add_rows(part_HWO, source, taps_33OI[:, kx], dilation)
                total_HWO[:, into_x] += part_HWO
    out = _empty_like_output(x_NIHW, weight_OI33)
    out.permute(0, 2, 3, 1).copy_(total_NHWO)
    return out


def valid_taps_backward(
    grad_NOHW: Tensor, x_NIHW: Tensor, weight_OI33: Tensor, dilation: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of x (channels_last) and of the weight (its own strides); an unneeded one is
    empty."""
    compute = _compute_dtype(x_NIHW)
    grad_x, grad_weight = _empty_gradients(x_NIHW, weight_OI33, need_x, need_weight)
    if need_x:
        grad_HNWO = grad_NOHW.permute(2, 0, 3, 1).to(compute).contiguous()
        _input_gradient(grad_HNWO, _taps(weight_OI33, compute), dilation, grad_x.permute(2, 0, 3, 1))
    if need_weight:
        _weight_gradient(grad_NOHW, x_NIHW, dilation, compute, grad_weight.permute(2, 3, 0, 1))
    return grad_x, grad_weight


def implicit_product(x_NIHW: Tensor, weight_OI33: Tensor, dilation: int) -> Tensor:
    """Computes the forward pass in one Triton kernel; channels_last, in x's dtype."""
    from stpp_kernels.triton import dilated_conv

    out = _empty_like_output(x_NIHW, weight_OI33)
    dilated_conv.forward(x_NIHW, weight_OI33, dilation, out)
    return out


def implicit_product_backward(
    grad_NOHW: Tensor, x_NIHW: Tensor, weight_OI33: Tensor, dilation: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Computes the gradients, as `valid_taps_backward`, in one Triton kernel each."""
    from stpp_kernels.triton import dilated_conv

    grad_x, grad_weight = _empty_gradients(x_NIHW, weight_OI33, need_x, need_weight)
    if need_x:
        dilated_conv.input_gradient(grad_NOHW, weight_OI33, dilation, grad_x)
    if need_weight:
        dilated_conv.weight_gradient(grad_NOHW, x_NIHW, dilation, grad_weight)
    return grad_x, grad_weight


def convolution(x_NIHW: Tensor, weight_OI33: Tensor, dilation: int) -> Tensor:
    """Computes the forward pass by PyTorch's convolution; channels_last, in x's dtype."""
    compute = _compute_dtype(x_NIHW)
    out = reference.dilated_conv3x3(x_NIHW.to(compute), weight_OI33.to(compute), dilation)
    return _empty_like_output(x_NIHW, weight_OI33).copy_(out)


def convolution_backward(
    grad_NOHW: Tensor, x_NIHW: Tensor, weight_OI33: Tensor, dilation: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Computes the gradients, as `valid_taps_backward`, by PyTorch's convolution in the same dtype."""
    compute = _compute_dtype(x_NIHW)
    into = _empty_gradients(x_NIHW, weight_OI33, need_x, need_weight)
    gradients = reference.dilated_conv3x3_backward(
        grad_NOHW.to(compute), x_NIHW.to(compute), weight_OI33.to(compute), dilation, need_x, need_weight
    )
    for target, source in zip(into, gradients, strict=True):
        target.copy_(source)
    return into


def _add_rows(part_HWO: Tensor, source_HWI: Tensor, taps_3OI: Tensor, dilation: int) -> None:
    """Fills `part` with the sum of the three taps of one column."""
    for ky in (1, 0, 2):  # the middle tap first: it covers all rows
        into_y, from_y = valid_range(part_HWO.shape[0], ky, dilation)
        target, source, tap_IO = (
            part_HWO[into_y].flatten(0, 1),
            source_HWI[from_y].flatten(0, 1),
            taps_3OI[ky].t(),
        )
        if ky == 1 and target.dtype == source.dtype:
            torch.mm(source, tap_IO, out=target)
        elif ky == 1:
            target.copy_(source @ tap_IO)
        elif target.numel():
            _add_product(target, source, tap_IO)


def _input_gradient(grad_HNWO: Tensor, taps_33OI: Tensor, dilation: int, into_HNWI: Tensor) -> None:
    height, _, width, _ = grad_HNWO.shape
    for x0, x1, first_x, last_x in regions(width, dilation):
        taps_x = taps_33OI[:, first_x : last_x + 1].contiguous()
        grad_x = _shifted(grad_HNWO.movedim(2, 0), x0, x1, first_x, last_x, dilation).movedim(0, 2)
        for y0, y1, first_y, last_y in regions(height, dilation):
            grad = _shifted(grad_x, y0, y1, first_y, last_y, dilation)
            region = grad.flatten(0, 2) @ taps_x[first_y : last_y + 1].flatten(0, 2)
            into_HNWI[y0:y1, :, x0:x1].copy_(region.view(y1 - y0, -1, x1 - x0, region.shape[1]))


def _weight_gradient(grad_NOHW: Tensor, x_NIHW: Tensor, dilation: int, compute: torch.dtype,
                     into_33OI: Tensor) -> None:
    height, width = x_NIHW.shape[2:]
    total_33OI = into_33OI.new_zeros(into_33OI.shape, dtype=_sum_dtype(compute))
    for kx in range(3):
        into_x, from_x = valid_range(width, kx, dilation)
        grads, sources = _matrices(grad_NOHW, into_x, compute), _matrices(x_NIHW, from_x, compute)
        for grad, source in zip(grads, sources, strict=True):
            for ky in range(3):
                into_y, from_y = valid_range(height, ky, dilation)
                _add_product(total_33OI[ky, kx], grad[into_y].flatten(0, 1).t(), source[from_y].flatten(0, 1))
    into_33OI.copy_(total_33OI)


def _matrices(maps_NCHW: Tensor, columns: slice, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields `columns` of every map as contiguous [H, width, C], each valid until the next; nothing if there
    are no columns."""
    buffer = None
    for map_HWC in maps_NCHW.permute(0, 2, 3, 1)[:, :, columns] if columns.start < columns.stop else ():
        if map_HWC.dtype == dtype and map_HWC.is_contiguous():
            yield map_HWC
        else:
            buffer = map_HWC.new_empty(map_HWC.shape, dtype=dtype) if buffer is None else buffer
            yield buffer.copy_(map_HWC)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _shifted(grad: Tensor, start: int, stop: int, first: int, last: int, dilation: int) -> Tensor:
    """Concatenates, along channels, the output gradients that each tap links to inputs start..stop of
    dimension 0."""
    parts = [grad[start - (k - 1) * dilation : stop - (k - 1) * dilation] for k in range(first, last + 1)]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def _taps(weight_OI33: Tensor, dtype: torch.dtype) -> Tensor:
    return weight_OI33.permute(2, 3, 0, 1).to(dtype).contiguous()


def _compute_dtype(x: Tensor) -> torch.dtype:
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not _cpu_multiplies(x.dtype):
        return torch.float32
    return x.dtype


@functools.cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    else:
        names = ("_is_amx_fp16_supported",)
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _convolution_skips_padding(dtype: torch.dtype) -> bool:
    """True if oneDNN's forward convolution of this dtype skips padding on this CPU."""
    avx512_alone = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32 or (dtype == torch.bfloat16 and avx512_alone)


def _sum_dtype(compute: torch.dtype) -> torch.dtype:
    return torch.float32 if compute in (torch.bfloat16, torch.float16) else compute


def _empty_like_output(x: Tensor, weight: Tensor) -> Tensor:
    size = (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _empty_gradients(x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0)
    return grad_x, torch.empty_like(weight) if need_weight else weight.new_empty(0)


def _forward(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    forms = {"taps": valid_taps, "conv": convolution, "triton": implicit_product}
    return forms[form("forward", x, dilation)](x, weight, dilation)


def _backward_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    forms = {"taps": valid_taps_backward, "conv": convolution_backward, "triton": implicit_product_backward}
    for_x = forms[form("input gradient", x, dilation)]
    for_weight = forms[form("weight gradient", x, dilation)]
    if for_x is for_weight or not (need_x and need_weight):
        return (for_x if need_x else for_weight)(grad, x, weight, dilation, need_x, need_weight)
    grad_x = for_x(grad, x, weight, dilation, True, False)[0]
    return grad_x, for_weight(grad, x, weight, dilation, False, True)[1]


dispatch.define(
    "dilated_conv3x3",
    "(Tensor x, Tensor weight, int dilation) -> Tensor",
    reference=_forward,
    fake=lambda x, weight, dilation: _empty_like_output(x, weight),
    cpp=False,
)
dispatch.define(
    "dilated_conv3x3_backward",
    "(Tensor grad, Tensor x, Tensor weight, int dilation, bool need_x, bool need_weight) -> (Tensor grad_x, "
    "Tensor grad_weight)",
    reference=_backward_kernel,
    fake=lambda grad, x, weight, dilation, need_x, need_weight: _empty_gradients(
        x, weight, need_x, need_weight
    ),
    cpp=False,
)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.dilation = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    if torch.is_grad_enabled():
        raise RuntimeError("dilated_conv3x3 has first derivatives only")
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = torch.ops.stpp_kernels.dilated_conv3x3_backward(
        grad, x, weight, ctx.dilation, need_x, need_weight
    )
    return grad_x if need_x else None, grad_weight if need_weight else None, None


torch.library.register_autograd("stpp_kernels::dilated_conv3x3", _backward, setup_context=_setup_context,
                                lib=dispatch.LIB)
for _name in ("dilated_conv3x3", "dilated_conv3x3_backward"):
    _named = {"taps": "valid taps", "conv": "conv2d", "triton": "triton"}
    dispatch.set_reported(_name, "cpu", _named.get(_forced_form(), "valid taps or conv2d"))
    dispatch.set_reported(_name, "cuda", _named.get(_forced_form(), "conv2d"))


def _cudnn(x_NIHW: Tensor, weight_OI33: Tensor, dilation: int) -> Tensor:
    """Runs conv2d with its own autograd, without the operator's copies. cuDNN returns contiguous maps for
    contiguous ones, and for float64 in any format."""
    out_NOHW = reference.dilated_conv3x3(x_NIHW, weight_OI33, dilation)
    return out_NOHW.contiguous(memory_format=torch.channels_last)


def dilated_conv3x3(x_NIHW: Tensor, weight_OI33: Tensor, dilation: int) -> Tensor:
    """Computes `F.conv2d(x, weight, padding=dilation, dilation=dilation)` for a 3x3 kernel, without
    multiplying padding.

    Under autocast both arguments are cast to its dtype, as in `F.conv2d`. It is one opaque operator for
    `torch.compile` and `torch.export`; export a plain convolution to ONNX. First derivatives only.

    Args:
        x_NIHW: [N, I, H, W] floating point, any strides; channels_last is read without a copy of the middle
            column.
        weight_OI33: [O, I, 3, 3], the dtype of x (or autocast); channels_last avoids a slow transposition.
        dilation: at least 1; may exceed the map.

    Returns:
        [N, O, H, W], channels_last, the dtype of x.

    Raises:
        ValueError: shapes that do not fit, different dtypes outside autocast, dilation below 1.
    """
    device = x_NIHW.device.type
    if torch.is_autocast_enabled(device) and x_NIHW.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x_NIHW, weight_OI33 = x_NIHW.to(dtype), weight_OI33.to(dtype)
    if x_NIHW.ndim != 4 or weight_OI33.ndim != 4 or weight_OI33.shape[1:] != (x_NIHW.shape[1], 3, 3):
        raise ValueError(
            f"x must be [N, I, H, W] and weight [O, I, 3, 3], got {tuple(x_NIHW.shape)} and "
            f"{tuple(weight_OI33.shape)}"
        )
    if x_NIHW.dtype != weight_OI33.dtype or x_NIHW.device != weight_OI33.device:
        raise ValueError(
            f"x and weight must agree in dtype and device, got {x_NIHW.dtype} on {x_NIHW.device} and "
            f"{weight_OI33.dtype} on {weight_OI33.device}"
        )
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    if x_NIHW.is_cuda and form("forward", x_NIHW, dilation) == "conv" and not torch.compiler.is_exporting():
        return _cudnn(x_NIHW, weight_OI33, dilation)
    return torch.ops.stpp_kernels.dilated_conv3x3(x_NIHW, weight_OI33, dilation)
