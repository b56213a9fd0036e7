"""Self-training for semantic segmentation at the speed of the hardware: ST, ST++, UniMatch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stpp.inference.single_images import ImagePredictor

__version__ = "0.2.0"


def load(path, *, tta: str = "none", device: str = "auto", precision: str = "auto", max_pixels: int = 1 << 24,
         trust_engine: bool = False, output_stride: int | None = None, view_px: int | None = None,
         exif: bool | None = None) -> "ImagePredictor":
    """Opens a trained network, to make masks of single images: `stpp.load("best.pt").predict("photo.jpg")`.

    Args:
        path: a best.pt or third-*.pt of a run, a published state dict, or the folder of an engine that
            `stpp compile` made.
        tta: views whose probabilities are summed: "none" (1), "flip" (2) or "stpp" (10).
        device: "auto" (CUDA if there is one), or a name of PyTorch's, such as "cpu" or "cuda:1".
        precision: "auto" (bf16 where the device has it), "bf16", "fp16" or "fp32".
        max_pixels: images of more pixels are refused: they need much memory.
        trust_engine: run an engine that you did not build on this machine: it is a program.
        output_stride: 8, 16 or 32, of a checkpoint that does not tell it, such as a published one; None: 8.
        view_px: longer side in pixels at which the network sees an image, whose mask has the image's own
            size; None: as the checkpoint tells, or the image's own.
        exif: turn images upright by their EXIF orientation; None: as those that the network was trained on.

    Returns:
        An object with `predict(image) -> uint8 [H, W]`, where `image` is a path, a PIL image or a uint8 array
        [H, W, 3], and `classes`, the names of the ids (numbers where the checkpoint has none).

    Raises:
        UserError: there is no such network, it does not run here, or it was trained with another rule than
            `exif`.
        ValueError: an unknown `tta` or `output_stride`.
    """
    import torch

    from stpp.inference.single_images import open_image_predictor

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_image_predictor(path, mode=tta, device=torch.device(device), precision=precision,
                                max_pixels=max_pixels, trust=trust_engine, output_stride=output_stride,
                                view_px=view_px, exif=exif)
