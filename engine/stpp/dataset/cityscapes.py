"""Cityscapes: its 19 training classes, file locations, and the mapping of its original mask ids.

Masks are `*_labelTrainIds.png` (training class ids) or `*_labelIds.png` (all 34 ids).
"""

CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

IMAGES = "leftImg8bit/**/*_leftImg8bit.png"
TRAIN_IDS_ENDING, LABEL_IDS_ENDING = "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"
TRAIN_IDS, LABEL_IDS = f"gtFine/**/*{TRAIN_IDS_ENDING}", f"gtFine/**/*{LABEL_IDS_ENDING}"

LABEL_IDS_MAP = (
    "0-6=ignore", "7-8=0-1", "9-10=ignore", "11-13=2-4", "14-16=ignore", "17=5", "18=ignore", "19-28=6-15",
    "29-30=ignore",
    "31-33=16-18",
)  # fmt: skip
"""Mask map of the original ids, see `stpp.dataset.mask_map`. Source: labels of the data set's own tools."""
