"""The user's files, checked and indexed: layouts, classes, masks, splits."""
