"""Recipe of ST++ that takes seconds."""

TINY = """
method = "stpp"
deterministic = true
[data]
layout = "voc"
fraction = "8"
[model]
backbone = "resnet18"
output_stride = 16
[augment]
crop_px = 49
long_side = [48, 96]
[train]
epochs = 1
supervised_epochs = 3
batch_global = 4
lr = 0.02
[label]
tta = "flip"
batch_per_rank = 2
"""
