"""Self-training for semantic segmentation at the speed of the hardware: ST, ST++, UniMatch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stpp.inference.single_images import ImagePredictor

__version__ = "0.2.0"


def load(path, *, tta: str = "none", device: str = "auto", precision: str = "auto", max_pixels: int = 1 << 24,
         trust_engine: bool = False, output_stride: int | None = None, view_px: int | None = None,
         exif: bool | None = None) -> "ImagePredictor":
    """Opens a trained network that predicts single images: `stpp.load("best.pt").predict("photo.jpg")`.

    Args:
        path: a best.pt or third-*.pt of a run, a published state dict, or the folder of an engine that `stpp
            compile` built.
        tta: test-time views whose probabilities are summed: "none" (1), "flip" (2) or "stpp" (10).
        device: "auto" (CUDA if available), or a PyTorch device name such as "cpu" or "cuda:1".
        precision: "auto" (bf16 where the device supports it), "bf16", "fp16" or "fp32".
        max_pixels: largest accepted image; larger ones need much memory and are rejected.
        trust_engine: run an engine that you did not build on this machine; engines contain native code.
        output_stride: 8, 16 or 32, for checkpoints that do not store it, such as published ones; None: 8.
        view_px: longer side in pixels to which images are resized for the network; masks keep the image's
            size; None: the checkpoint's value, or no resizing.
        exif: rotate images upright by their EXIF orientation; None: the rule that the network was trained
            with.

    Returns:
        An object with `predict(image) -> uint8 [H, W]`, where `image` is a path, a PIL image or a uint8 array
            [H, W, 3], and `classes`, the class names by id (numbers if the checkpoint stores none).

    Raises:
        UserError: the network is missing, cannot run on this device, or was trained with another rule than
            `exif`.
        ValueError: unknown `tta` or `output_stride`.
    """
    import torch

    from stpp.inference.single_images import open_image_predictor

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_image_predictor(path, mode=tta, device=torch.device(device), precision=precision,
                                max_pixels=max_pixels, trust=trust_engine, output_stride=output_stride,
                                view_px=view_px, exif=exif)
