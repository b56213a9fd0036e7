"""The table of folders that say what their images are for."""

FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What a folder of this name, in lower case, holds."""


def kinds(image: str) -> set[str]:
    """What the folders of a path say that it is for: "train", "val", "test"."""
    return {FOLDERS[part] for part in image.lower().split("/")[:-1] if part in FOLDERS}
