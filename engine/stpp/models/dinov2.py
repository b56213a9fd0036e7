"""DINOv2 vision transformers (small, base, large and giant, without registers) with the published state-dict
keys.

The encoder returns four maps of one size, a cell for each patch of 14 pixels: outputs of four blocks, each
normalised by the last norm, without the class token.

Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", arXiv 2304.07193; choice
of the blocks: UniMatch V2 (Yang et al., arXiv 2410.10777).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stpp.models.layers import eager_on_cpu, in_half_precision, without_autocast
from stpp.models.network import Backbone

PATCH_PX = 14
GRID = 37
"""Side of the grid of position embeddings, in patches: trained on images of 518 pixels."""
HEAD_WIDTH = 64
NORM_EPS = 1e-6
LAYER_SCALE = 1e-5
"""Initial layer scale of a network from scratch, as in the published training."""
SURPLUS = 0.1
"""Offset that the published code adds to a size before dividing it by the trained one."""
CUBIC = -0.75
"""Free coefficient of bicubic interpolation, as in PyTorch."""


class DINOv2Variant(NamedTuple):
    """Size of an encoder."""

    width: int
    depth: int
    tapped: tuple[int, int, int, int]
    """Blocks whose outputs are returned as maps, counted from 0."""
    swiglu: bool = False


VARIANTS = {
    "dinov2-small": DINOv2Variant(384, 12, (2, 5, 8, 11)),
    "dinov2-base": DINOv2Variant(768, 12, (2, 5, 8, 11)),
    "dinov2-large": DINOv2Variant(1024, 24, (4, 11, 17, 23)),
    "dinov2-giant": DINOv2Variant(1536, 40, (9, 19, 29, 39), swiglu=True),
}


class Attention(nn.Module):
    """Multi-head self-attention, heads of 64 channels: [N, T, D] to [N, T, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        queries, keys, values = (
            self.qkv(x_NTD).unflatten(2, (3, self.heads, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        )
        return self.proj(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with an exact GELU between them: [N, T, D] to [N, T, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_NTD)))


class SwiGLU(nn.Module):
    """Two layers, the hidden one gated by its other half: [N, T, D] to [N, T, D]."""

    def __init__(self, width: int):
        super().__init__()
        hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        gates, values = self.w12(x_NTD).chunk(2, dim=-1)
        return self.w3(F.silu(gates) * values)


class LayerScale(nn.Module):
    """Learned factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def forward(self, x_NTD: Tensor) -> Tensor:
        return x_NTD * self.gamma


class Block(nn.Module):
    """Transformer block: attention and MLP, each with pre-norm and a shortcut: [N, T, D] to [N, T, D]."""

    def __init__(self, width: int, swiglu: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = SwiGLU(width) if swiglu else MLP(width)
        self.ls2 = LayerScale(width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        x_NTD = x_NTD + self.ls1(self.attn(self.norm1(x_NTD)))
        return x_NTD + self.ls2(self.mlp(self.norm2(x_NTD)))


class PatchEmbedding(nn.Module):
    """Embedding of each patch as a token: [N, 3, H, W] to [N, H / 14 * W / 14, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_PX, stride=PATCH_PX)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        if not eager_on_cpu(images_NCHW) or not in_half_precision(images_NCHW):
            return self.proj(images_NCHW).flatten(2).transpose(1, 2)
        # oneDNN's 16-bit convolution of few channels at such a stride is wrong on AMX (benchmarks/NOTES.md).
        patches_NCRSPP = images_NCHW.unfold(2, PATCH_PX, PATCH_PX).unfold(3, PATCH_PX, PATCH_PX)
        patches_NTK = patches_NCRSPP.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return F.linear(patches_NTK, self.proj.weight.flatten(1), self.proj.bias)


class DINOv2(Backbone):
    """DINOv2 encoder.

    Args:
        name: key of `VARIANTS`.
        checkpoint_activations: recompute the blocks' activations in the backward pass: less memory, about a
            third more time.
    """

    block_types = (Block,)

    def __init__(self, name: str, *, checkpoint_activations: bool = False):
        super().__init__()
        width, depth, self.tapped, swiglu = VARIANTS[name]
        self.channels, self.strides = (width,) * 4, (PATCH_PX,) * 4
        self.checkpoint_activations = checkpoint_activations
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + GRID**2, width))
        # part of the published checkpoint; unused here
        self.mask_token = nn.Parameter(torch.zeros(1, width), requires_grad=False)
        self.patch_embed = PatchEmbedding(width)
        self.blocks = nn.ModuleList(Block(width, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws random weights, as for the published training."""
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images whose sides are multiples of 14 to four maps [N, D, H / 14, W / 14], channels_last."""
        rows, columns = (side // PATCH_PX for side in images_NCHW.shape[2:])
        class_N1D = (self.cls_token + self.pos_embed[:, :1]).expand(images_NCHW.shape[0], -1, -1)
        # Under autocast the residual stream is float32, like the parameters added to it.
        x_NTD = torch.cat([class_N1D, self.patch_embed(images_NCHW) + self._positions(rows, columns)], dim=1)
        maps = []
        for i, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_NTD = checkpoint(
                    block, x_NTD, use_reentrant=False, preserve_rng_state=False
                )  # blocks have no dropout
            else:
                x_NTD = block(x_NTD)
            if i in self.tapped:
                maps.append(self.norm(x_NTD[:, 1:]).unflatten(1, (rows, columns)).permute(0, 3, 1, 2))
        return tuple(maps)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Interpolates the trained 37x37 position embeddings to a grid, bicubic: [1, rows columns, D].

        The published rule samples at steps of 37 / (n + 0.1), not 37 / n, with weights in float32, and leaves
        a grid of 37x37 unchanged. Here it is two matrix products: their backward is deterministic on CUDA,
        and they allow any size in an exported graph.
        """
        grid_1TD = self.pos_embed[:, 1:]
        if torch.compiler.is_compiling():
            shift = _surplus(rows, columns, grid_1TD.device)
            down, across = (cubic_matrix(size, shift) for size in (rows, columns))
        elif rows == columns == GRID:
            return grid_1TD
        else:
            down, across = (published_matrix(size, grid_1TD.device) for size in (rows, columns))
        dtype = torch.promote_types(grid_1TD.dtype, torch.float32)
        with without_autocast(grid_1TD.device):
            strips = (down.to(dtype) @ grid_1TD.to(dtype).view(GRID, -1)).unflatten(1, (GRID, -1))
            return (across.to(dtype) @ strips).flatten(0, 1)[None].to(grid_1TD.dtype)


def published_matrix(size: int, device: torch.device) -> Tensor:
    """Computes the weights [size, 37] of PyTorch's bicubic interpolation, used by the published code, by
    interpolating an identity matrix."""
    cells = torch.eye(GRID, device=device)[None, :, :, None]
    return F.interpolate(cells, scale_factor=((size + SURPLUS) / GRID, 1.0), mode="bicubic")[0, :, :, 0].T


def cubic_matrix(size: int, surplus: Tensor) -> Tensor:
    """Computes the same weights by formula, for graphs with a dynamic `size`: half-pixel centres, repeated
    borders.

    Args:
        surplus: offset of the size, float32 scalar; with 0 and size 37 the weights are the identity.
    """
    device = surplus.device
    centres = (torch.arange(size, device=device) + 0.5) * (
        GRID / (torch.full((), size, dtype=torch.float32, device=device) + surplus)
    ) - 0.5
    taps = centres.floor()[:, None] + torch.arange(-1.0, 3.0, device=device)
    x = (centres[:, None] - taps).abs()
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    weights = torch.where(x <= 1, near, far)
    cells = torch.arange(GRID, device=device)
    return (weights[:, :, None] * (taps.clamp(0, GRID - 1)[:, :, None] == cells)).sum(dim=1)


def _surplus(rows: int, columns: int, device: torch.device) -> Tensor:
    """Returns 0 for the trained grid, else `SURPLUS`, as a float32 scalar."""
    high, wide = (torch.full((), side, dtype=torch.float32, device=device) == GRID
                  for side in (rows, columns))
    return torch.where(high & wide, 0.0, SURPLUS)
