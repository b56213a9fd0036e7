"""One training step of UniMatch and of UniMatch-V2: the engine against the public recipes and against tuned
PyTorch.

    python benchmarks/bench_unimatch.py --out benchmarks/results/last.jsonl
    python benchmarks/bench_unimatch.py --methods unimatch-v2 --backbone-v2 dinov2-base --crop-v2 518

UniMatch: DeepLabV3+ on a deep-stem ResNet-50 at output stride 16, crops of 321 pixels. UniMatch-V2: DPT on
DINOv2-small, crops of 518 pixels on a GPU, 266 on a CPU. A step takes as many labelled as unlabelled images:
on a GPU the published number per GPU, otherwise two of each. Peers (`public_unimatch.py`): *public*: float32,
NCHW, the public code's passes, full-size losses; *tuned*: the same with autocast in the engine's precision,
channels_last and a fused optimiser; *compiled*: tuned under torch.compile, measured last. On files the engine
has its own loader, which decodes and crops an image once for its three views; the peers have a DataLoader
with PIL and a worker process for each core, and UniMatch's peer a second one for its other augmentation of
the same images.

All start from equal weights. Their first losses are compared before timing starts, without boxes, because the
public code pastes from other images; dropout draws differ. Every pixel of the weak view is a label, so that
all losses are computed.

Rows: milliseconds a step; `.compiled`, `.files`. Summaries: `unimatch.METHOD.engine_vs_public_ratio`,
`engine_vs_tuned_ratio` (against the faster of tuned and compiled; with --no-compile
`engine_vs_tuned_eager_ratio`), `files_engine_vs_public_ratio`,
`files_engine_vs_tuned_ratio`, and the unlabelled images a second of engine and public.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import bench_data
from harness import Report, arguments, bare_trainer, call_ms, random_batch
from public_unimatch import Arithmetic, Peer, PublicUniMatch, PublicUniMatchV2, Unlabelled
from stpp.config import AugmentConfig, Config, ConsistencyConfig, DataConfig, ModelConfig, TrainConfig
from stpp.distributed import World
from stpp.loading.sample import Batch, Sample
from stpp.methods.consistency import inside
from stpp.methods.unimatch import UniMatch
from stpp.methods.unimatch_v2 import UniMatchV2
from stpp.models.build import network_of
from stpp.precision import autocast_dtype
from stpp.processes import cores
from stpp.training.optimizer import REFERENCE_BATCH
from stpp.training.step import Step
from stpp.training.trainer import Trainer

CLASSES, IGNORED = 21, 0.1
SMALL = {"rounds": 1, "backbone_v1": "resnet18", "crop_v1": 33, "crop_v2": 28, "batch": 2, "no_compile": True,
         "pictures": 4}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Method and its public recipe."""

    kind: type[Step]
    peer: type[Peer]
    train: TrainConfig
    batch_of_gpu: int
    """Labelled, and unlabelled, images per GPU in the published settings."""


COMPARISONS = {
    "unimatch": Comparison(kind=UniMatch, peer=PublicUniMatch, batch_of_gpu=2,
                        train=TrainConfig(lr=0.001, head_lr_multiplier=10.0)),
    "unimatch-v2": Comparison(kind=UniMatchV2, peer=PublicUniMatchV2, batch_of_gpu=4,
                           train=TrainConfig(lr=5e-6, head_lr_multiplier=40.0, optimizer="adamw",
                                             weight_decay=0.01)),
}


class MethodBenchmark:
    """Variants of one method."""

    def __init__(self, method: str, options: argparse.Namespace, report: Report, folder: Path):
        self.contest, self.report, self.folder, self.options = COMPARISONS[method], report, folder, options
        self.device, v2 = report.device, method == "unimatch-v2"
        self.batch = options.batch or (self.contest.batch_of_gpu if self.device.type == "cuda" else 2)
        self.crop = options.crop_v2 if v2 else options.crop_v1
        self.name = f"unimatch.{method}"
        self.config = Config(
            method=method, out=folder, data=DataConfig(root=folder), deterministic=False,
            model=ModelConfig(name="dpt", backbone=options.backbone_v2) if v2 else
            ModelConfig(backbone=options.backbone_v1, output_stride=16, dropout="off"),
            augment=AugmentConfig(crop_px=self.crop), consistency=ConsistencyConfig(confidence=0.0),
            train=dataclasses.replace(self.contest.train, batch_global=self.batch,
                                      precision=options.precision))
        self.dtype = autocast_dtype(options.precision, self.device)
        torch.manual_seed(0)
        self.network = network_of(self.config.model, CLASSES).to(self.device)

    def engine(self, *lists: list[Sample]) -> Trainer:
        """Builds the engine's trainer, from the common weights."""
        trainer = bare_trainer(self.config, World(device=self.device), self.folder, CLASSES,
                               *(lists or ((), ())), kind=self.contest.kind)
        state = self.network.state_dict()
        trainer.step.network.load_state_dict(state)
        if isinstance(trainer.step, UniMatchV2):
            trainer.step.average.network.load_state_dict(state)
        return trainer

    def peer(self, label: str) -> Peer:
        """Builds a peer by its name."""
        how = Arithmetic() if label == "public" else Arithmetic(
            dtype=self.dtype, channels_last=True, fused=True, compiled=label == "compiled")
        train = self.config.train
        return self.contest.peer(self.network, how, lr=train.lr * self.batch / REFERENCE_BATCH,
                                 weight_decay=train.weight_decay, head=train.head_lr_multiplier,
                                 confidence=self.config.consistency.confidence)

    def run(self) -> None:
        """Measures the method."""
        x, u, boxes = self._batches()
        trainer, peers = self.engine(), {label: self.peer(label) for label in ("public", "tuned")}
        self._agree(trainer, peers, x, u)
        trainer, peers = self.engine(), {label: self.peer(label) for label in peers}
        engine_batches = [(x, dataclasses.replace(u, boxes_VN4=boxes))]
        peer_batches = self._for_peers(x, u, boxes)
        shape = f"{self.batch} + {self.batch},3,{self.crop},{self.crop}"
        kind = str(self.dtype).removeprefix("torch.")
        variants: dict[str, Callable] = {"engine": lambda: trainer.train_step(engine_batches)}
        variants |= {label: partial(peer, *peer_batches) for label, peer in peers.items()}
        rows = self.report.compare(self.name, shape, kind, variants)
        step_ms, public_ms = rows["engine"]["median"], rows["public"]["median"]
        self.report.summary(f"{self.name}.engine_vs_public_ratio", public_ms / step_ms)
        for label, value in (("engine", step_ms), ("public", public_ms)):
            self.report.summary(f"{self.name}.{label}_unlabelled_images_per_s", 1000 * self.batch / value)
        ratio = rows["tuned"]["median"] / step_ms
        if not self.options.no_compile:
            both = {"engine": variants["engine"], "compiled": partial(self.peer("compiled"), *peer_batches)}
            compiled = self.report.compare(f"{self.name}.compiled", shape, kind, both)
            ratio = min(ratio, compiled["compiled"]["median"] / compiled["engine"]["median"])
        peer = "tuned_eager" if self.options.no_compile else "tuned"
        self.report.summary(f"{self.name}.engine_vs_{peer}_ratio", ratio)
        if not self.options.no_files:
            self._on_files(peers, shape, kind)

    def _batches(self) -> tuple[Batch, Batch, torch.Tensor]:
        """Draws labelled noise; unlabelled noise in three views without boxes; and boxes of its strong
        views."""
        x = random_batch(self.batch, self.crop, CLASSES, self.device, ignored=IGNORED)
        views = [random_batch(self.batch, self.crop, CLASSES, self.device).images_NCHW for _ in range(3)]
        shown = torch.tensor([[0, 0, self.crop, self.crop]] * self.batch, dtype=torch.int32,
                             device=self.device)
        boxes = torch.zeros(3, self.batch, 4, dtype=torch.int32, device=self.device)
        u = Batch(views=tuple(views), labels_NHW=None, indices=None, boxes_VN4=boxes, shown_N4=shown)
        boxes = boxes.clone()
        boxes[1:, ::2] = torch.tensor([self.crop // 4, self.crop // 8, self.crop // 2, self.crop // 3],
                                      dtype=torch.int32, device=self.device)
        return x, u, boxes

    def _for_peers(self, x: Batch, u: Batch, boxes: torch.Tensor) -> tuple[list, list, list]:
        """Converts the batches to the peers' form. The other augmentation is the images in another order."""
        size = (self.crop, self.crop)
        masks = [inside(one, size).float() for one in boxes[1:]]
        unlabelled = [*u.views, torch.zeros(self.batch, *size, dtype=torch.long, device=self.device), *masks]
        return ([x.images_NCHW, x.labels_NHW.long()], unlabelled,
                [each.flip(0) for each in unlabelled])

    def _agree(self, trainer: Trainer, peers: dict[str, Peer], x: Batch, u: Batch) -> None:
        """Takes one step of each, without boxes, and compares the losses."""
        terms, _ = trainer.train_step([(x, u)])
        found = {"engine": (trainer.weights_T * terms).sum().item()}
        found |= {label: peer(*self._for_peers(x, u, u.boxes_VN4)).item() for label, peer in peers.items()}
        print("first losses:", {label: round(loss, 4) for label, loss in found.items()}, flush=True)
        # dropout draws differ
        assert max(found.values()) - min(found.values()) < 0.05 * found["engine"], found

    def _on_files(self, peers: dict[str, Peer], shape: str, kind: str) -> None:
        """Measures steps with loading."""
        samples = bench_data.samples_of(self.options, self.folder)
        lists = samples[::2], [dataclasses.replace(sample, mask=None) for sample in samples[1::2]]
        trainer = self.engine(*lists)
        batches = trainer._passes()
        streams = {label: self._streams(*lists) for label in peers}

        def peer_step(label: str) -> None:
            peers[label](*([each.to(self.device, non_blocking=True) for each in next(stream)]
                           for stream in streams[label]))

        variants = {"engine": lambda: trainer.train_step(next(batches)[0]),
                    **{label: partial(peer_step, label) for label in peers}}
        times: dict[str, list[float]] = {label: [] for label in variants}
        untimed = bench_data.untimed_batches(cores()) if cores() >= bench_data.MANY_CORES else 1
        for turn in range(self.report.rounds):
            for label, variant in variants.items():
                for _ in range(untimed if turn == 0 or untimed > 1 else 0):
                    variant()
                times[label].append(call_ms(variant, self.device, calls=20 if untimed > 1 else 1))
        rows = {label: self.report.measured(f"{self.name}.files", label, shape, kind, found)
                for label, found in times.items()}
        for label in peers:
            self.report.summary(f"{self.name}.files_engine_vs_{label}_ratio",
                                rows[label]["median"] / rows["engine"]["median"])

    def _streams(self, labelled: list[Sample], unlabelled: list[Sample]) -> list[Iterator]:
        """Builds samples of labelled images, of unlabelled ones, and for UniMatch of another augmentation of
        these."""
        placing = self.crop, self.config.augment.long_side
        sets = [bench_data.Public(labelled, *placing), Unlabelled(unlabelled, *placing)]
        sets += [Unlabelled(unlabelled, *placing)] * (self.contest.peer is PublicUniMatch)
        loaders = [iter(DataLoader(one, self.batch, num_workers=cores(),
                                   pin_memory=self.device.type == "cuda")) for one in sets]
        return loaders if len(loaders) == 3 else [*loaders, iter(lambda: (), None)]


def parsed() -> argparse.Namespace:
    """Parses the command line."""
    parser = arguments(__doc__.splitlines()[0], SMALL)
    parser.add_argument("--methods", nargs="+", default=list(COMPARISONS), choices=list(COMPARISONS))
    parser.add_argument("--backbone-v1", default="resnet50-deep-stem")
    parser.add_argument("--backbone-v2", default="dinov2-small")
    parser.add_argument("--crop-v1", type=int, default=321, help="pixels")
    parser.add_argument("--crop-v2", type=int, default=0, help="pixels; 0: 518 on a GPU, 266 on a CPU")
    parser.add_argument("--batch", type=int, default=0, help="images of each list; 0: published number per "
                                                             "GPU, 2 on a CPU")
    bench_data.step_arguments(parser)
    options = parser.parse_args()
    options.crop_v2 = options.crop_v2 or (518 if options.device.startswith("cuda") else 266)
    return options


def main() -> None:
    options = parsed()
    report = Report(options)
    torch.backends.cudnn.benchmark = True
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            MethodBenchmark(method, options, report, Path(folder)).run()
    report.finish()


if __name__ == "__main__":
    main()
