"""Decoding of a sample's files by PIL, by the reading that the index records.

H W: pixels.
"""

import numpy as np

from stpp.errors import UserError
from stpp.images import storage
from stpp.images.masks import read_index_mask
from stpp.images.pixels import BadImage
from stpp.images.reading import upright_pixels
from stpp.loading.sample import Sample


def image_of(sample: Sample) -> np.ndarray:
    """Decodes a sample's image, upright: uint8 [H, W, 3].

    Raises:
        UserError: it is missing, broken, or of another size than the sample; names the file.
    """
    try:
        return upright_pixels(storage.read(sample.image), sample.reading)
    except BadImage as bad:
        raise UserError(f"{sample.image}: {bad}; run `stpp prepare` again") from None
    except OSError as error:
        reason = storage.describe_error(error)
        raise UserError(f"{sample.image}: {reason}; run `stpp prepare` again") from None


def mask_of(sample: Sample) -> np.ndarray:
    """Decodes the class ids of a sample's mask: uint8 [H, W]; `stpp prepare` has turned masks upright.

    Raises:
        UserError: it is missing, broken, or of another size than the sample; names the file.
    """
    mask_HW = read_index_mask(sample.mask, exif=False)
    if mask_HW.shape != (sample.height, sample.width):
        raise UserError(
            f"{sample.mask}: is {mask_HW.shape[1]}x{mask_HW.shape[0]} pixels where the index says "
            f"{sample.width}x{sample.height}; run `stpp prepare` again"
        )
    return mask_HW
