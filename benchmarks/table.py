"""Writes the tables of measurements in README.md and benchmarks/README.md from the committed rows.

    python benchmarks/table.py

A figure is a summary row of one file in `benchmarks/results/`. A test fails where tables and rows differ.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
MACHINES = {"AVX-512": "cpu", "AVX-512 with bf16": "cpu-bf16", "AMX": "cpu-amx"}
"""Names of two-core machines by arithmetic; files of rows end in the word on the right."""
GPUS = {"H100": "h100", "H200": "h200"}
"""Names of machines with one GPU; a column, and the lines of `ON_GPUS`, appear once there are rows."""
RATIOS = (
    ("loss (upsampling and cross-entropy), forward and backward, least of three "
     "shapes", "eager", "loss", "loss.fused_vs_eager_ratio"),
    ("the same", "`torch.compile`d eager", "loss", "loss.fused_vs_compiled_ratio"),
    ("ten views of softmax, summed", "eager", "ops-labelling", "softmax_accumulate.fused_vs_eager_ratio"),
    ("confusion matrix", "eager", "ops-labelling", "confusion.fused_vs_eager_ratio"),
    ("dilated convolutions of ASPP in bf16, forward, "
     "41x41", "`F.conv2d`", "ops-conv", "dilated_conv.forward_ratio_41x41"),
    ("the same, 63x63", "`F.conv2d`", "ops-conv", "dilated_conv.forward_ratio_63x63"),
    ("the same, 90x120", "`F.conv2d`", "ops-conv", "dilated_conv.forward_ratio_90x120"),
    ("with backward, 41x41", "`F.conv2d`", "ops-conv", "dilated_conv.forward_backward_ratio_41x41"),
    ("with backward, 63x63", "`F.conv2d`", "ops-conv", "dilated_conv.forward_backward_ratio_63x63"),
    ("depthwise convolutions of EfficientNet-Lite0, 8 x 241 px, stride 16, "
     "backward", "`F.conv2d`", "ops-depthwise", "depthwise_conv.backward_ratio_all_layers"),
    ("loading and augmenting, half of it strongly", "PIL, worker processes", "data",
     "data.dali_vs_pil_ratio"),
    ("training step, DeepLabV3+ ResNet-50, stride 8, 2 x 321 "
     "px", "public recipe", "step", "step.engine_vs_public_ratio"),
    ("the same", "tuned PyTorch: autocast, channels_last, fused SGD, `torch.compile`", "step",
     "step.engine_vs_tuned_ratio"),
    ("the same with loading", "public recipe", "step", "step.files_engine_vs_public_ratio"),
    ("the public recipe's step, images a second", "", "step", "step.public_images_per_s"),
    ("training step, DeepLabV3+ EfficientNet-Lite0, stride 16, 8 x 241 "
     "px", "its depthwise layers by `F.conv2d`", "step-lite0", "step.depthwise_conv_ratio"),
    ("the same", "public recipe", "step-lite0", "step.engine_vs_public_ratio"),
    ("step of UniMatch, DeepLabV3+ ResNet-50, stride 16, 2 + 2 x 321 "
     "px", "public recipe", "unimatch", "unimatch.unimatch.engine_vs_public_ratio"),
    ("the same", "tuned PyTorch", "unimatch", "unimatch.unimatch.engine_vs_tuned_ratio"),
    ("the same with loading", "public recipe", "unimatch", "unimatch.unimatch.files_engine_vs_public_ratio"),
    ("step of UniMatch-V2, DPT on DINOv2-small, 2 + 2 x 266 "
     "px", "public recipe", "unimatch", "unimatch.unimatch-v2.engine_vs_public_ratio"),
    ("the same", "tuned PyTorch", "unimatch", "unimatch.unimatch-v2.engine_vs_tuned_ratio"),
    ("the same with loading", "public recipe", "unimatch",
     "unimatch.unimatch-v2.files_engine_vs_public_ratio"),
    ("teacher, DeepLabV3+ ResNet-18, stride 16, "
     "360x480", "public recipe", "teacher", "teacher.best_vs_public_ratio"),
    ("labelling files with ten test-time augmentations, ResNet-50", "public recipe", "label",
     "label.engine_vs_public_ratio"),
    ("all stages of ST++, the demo shortened to a third", "public recipe", "selftrain",
     "selftrain.engine_vs_public_ratio"),
)
"""Subject, peer, files of rows, name of the summary row."""
HIGHLIGHTS = (("selftrain", "selftrain.engine_vs_public_ratio"), ("step", "step.engine_vs_public_ratio"),
              ("step", "step.engine_vs_tuned_ratio"), ("step-lite0", "step.engine_vs_public_ratio"),
              ("unimatch", "unimatch.unimatch.engine_vs_public_ratio"),
              ("label", "label.engine_vs_public_ratio"))
"""Files of rows and names of the rows of `RATIOS` that README.md shows."""
ON_GPUS = (
    ("the loss from a CUDA graph, 16 x 21 classes x 321 "
     "px", "eager, likewise", "loss", "loss.graph_fused_vs_eager_ratio"),
    ("training step, DeepLabV3+ ResNet-101, 8 x 721 "
     "px", "public recipe", "step-r101-721", "step.engine_vs_public_ratio"),
    ("share of a large matrix product's rate, ResNet-50, 16 x 321 "
     "px", "", "step", "step.engine_share_of_matmul_rate"),
    ("labelling with ten views, images of 360x480, images a second", "", "label", "label.images_per_s.stpp"),
    ("the same, each image of another size", "", "label-mixed", "label.images_per_s.stpp"),
)
"""Lines of `RATIOS` that exist only for GPUs."""
GPU_SIZES = {
    "step": "GPU: 16 x 321 px",
    "teacher": "GPU: ResNet-50, stride 8",
}
"""Sizes measured on GPUs that differ from the line's text, by files of rows."""
STAGES = {"labels alone": ".1-supervised", "control": ".control", "ST": "-st.3-retrain",
          "ST++, stage 4": ".4-retrain", "ST++, stage 6": ".6-retrain",
          "control of UniMatch": "-unimatch.control", "UniMatch": "-unimatch.1-unimatch",
          "UniMatch-V2": "-unimatch.2-unimatch-v2"}
"""Columns of scores, with the suffix of their rows' names after the name of a run."""
RUNS = (
    ("demo, seed 0", "demo-cpu-bf16", "demo-seed0"),
    ("demo, seed 1", "demo-cpu-bf16", "demo-seed1"),
    ("demo, seed 2", "demo-cpu-bf16", "demo-seed2"),
    ("CamVid, 1/8 of the labels, ResNet-18", "camvid-cpu-bf16", "camvid"),
    ("a third of its crops, fp32, one core", "camvid-cpu", "camvid"),
    ("the same on two ranks, two images each, beside other work", "camvid-cpu", "camvid-2ranks"),
    ("`camvid_unimatch`: EfficientNet-Lite0 from ImageNet, seed 0", "camvid-cpu-amx",
     "camvid-lite0-seed0-unimatch"),
)
"""Subject, file of rows, name of the run in them."""
GAINS = (
    ("generated pictures (`make demo`), ResNet-18 from scratch, 1/8 of the labels", "demo-cpu-bf16",
     ("demo-seed0", "demo-seed1", "demo-seed2")),
)
"""Subject, file of rows, names of runs whose scores README.md shows as their mean."""
GAINED = ("labels alone", "control", "ST", "ST++, stage 6", "control of UniMatch", "UniMatch", "UniMatch-V2")
"""Columns of `GAINS`, keys of `STAGES`; those without a row are left out."""


def highlights() -> str:
    """Formats the lines of the ratios in `HIGHLIGHTS`, on two cores.

    Raises:
        KeyError: no line or no row.
    """
    lines = [f"| work | against | {' | '.join(f'speed-up, {machine}' for machine in MACHINES)} |",
             "|---" * (2 + len(MACHINES)) + "|"]
    by_name = {line[2:]: (i, line) for i, line in enumerate(RATIOS)}
    for files, name in HIGHLIGHTS:
        i, (what, against, *_) = by_name[files, name]
        while what == "the same":
            i -= 1
            what = RATIOS[i][0]
        found = [values(f"{files}-{word}").get(name) for word in MACHINES.values()]
        if not any(found):
            raise KeyError(f"no row {name}")
        shown = ["" if value is None else f"{_figures(value)}x" for value in found]
        lines.append(f"| {what} | {against} | {' | '.join(shown)} |")
    return "\n".join(lines)


def gains() -> str:
    """Formats the mean mIoU, percent, of the runs in `GAINS`.

    Raises:
        KeyError: a run has no rows, or not all the stages that another of its line has.
    """
    found = []
    for what, file, runs in GAINS:
        of = values(file)
        scored = {head: [f"{run}{STAGES[head]}.miou_pct" for run in runs] for head in GAINED}
        found.append((what, {head: sum(of[name] for name in names) / len(names)
                             for head, names in scored.items() if any(name in of for name in names)}))
    heads = [head for head in GAINED if any(head in means for _, means in found)]
    lines = [f"| mIoU, mean of three seeds | {' | '.join(head.split(',')[0] for head in heads)} |",
             "|---" * (1 + len(heads)) + "|"]
    lines += [f"| {what} | {' | '.join(f'{means[head]:.1f}' if head in means else '' for head in heads)} |"
              for what, means in found]
    return "\n".join(lines)


def ratios() -> str:
    """Formats the lines of ratios.

    Raises:
        KeyError: a line has no row.
    """
    gpus = {name: word for name,
            word in GPUS.items() if any(values(f"{line[2]}-{word}") for line in (*RATIOS, *ON_GPUS))}
    machines = {**MACHINES, **gpus}
    lines = [f"| what | against | {' | '.join(machines)} | rows |", "|---" * (3 + len(machines)) + "|"]
    for line in (*RATIOS, *(ON_GPUS if gpus else ())):
        what, against, files, name = line
        found = {word: values(f"{files}-{word}").get(name) for word in machines.values()}
        if not any(found.values()):
            if line in ON_GPUS:
                continue
            raise KeyError(f"no row {name}")
        if line in RATIOS and files in GPU_SIZES and any(found[word] for word in gpus.values()):
            what += f" ({GPU_SIZES[files]})"
        shown = ["" if value is None else _figures(value) for value in found.values()]
        lines.append(f"| {what} | {against} | {' | '.join(shown)} | `{files}`: `{name}` |")
    return "\n".join(lines)


def _figures(value: float) -> str:
    """Formats two significant figures, or all before the decimal point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def scores() -> str:
    """Formats the lines of mIoU, percent, of a run's stages; of ST and UniMatch if there is a run whose name
    ends in -st or -unimatch, which has its own control.

    Raises:
        KeyError: a run has no rows.
    """
    heads = ("run", *STAGES, "minutes", "rows")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for what, file, run in RUNS:
        of = values(file)
        alone = run.removesuffix("-unimatch")  # a run of UniMatch without one of ST++ beside it
        found = (of.get(f"{alone if suffix.startswith('-unimatch') else run}{suffix}.miou_pct")
                 for suffix in STAGES.values())
        miou = ["" if value is None else f"{value:.1f}" for value in found]
        lines.append(f"| {what} | {' | '.join(miou)} | {of[f'{run}.minutes']:.1f} | `{file}.jsonl`: `{run}` "
                     "|")
    return "\n".join(lines)


PAGES = {"README.md": {"gains": gains, "highlights": highlights},
         "benchmarks/README.md": {"ratios": ratios, "scores": scores}}
"""Tables of each page, by the word in the two marks around a table."""


def values(file: str) -> dict[str, float]:
    """Reads the summary values of a file of rows, by name; none if the file is missing."""
    path = ROOT / "benchmarks" / "results" / f"{file}.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {row["name"]: row["value"] for row in rows if "value" in row}


def filled(page: str, text: str) -> str:
    """Returns the text of a page with updated tables."""
    for name, table in PAGES[page].items():
        begin, end = f"<!-- {name}: written by benchmarks/table.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")
