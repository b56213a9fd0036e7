"""Start of a run from a config: claims the folder, prepares the index, runs the method's stages, writes
results.json."""

import contextlib
import os

import torch

from stpp import distributed, log
from stpp.config import Config, DataConfig
from stpp.dataset import index as indices
from stpp.dataset.entries import Index
from stpp.distributed import World
from stpp.errors import UserError
from stpp.methods import METHODS
from stpp.precision import autocast_dtype
from stpp.run import folder, lease
from stpp.run.outcome import summary
from stpp.run.run import Run
from stpp.training.assemble import images_per_pass
from stpp_kernels import describe_implementations


def start(config: Config, world: World) -> dict:
    """Runs all unfinished stages of `config.method`.

    Returns:
        Content of `results.json`:
        `{"method", "stages": [{"name", "miou", "steps", "seconds"}, ...], "control"}`, mIoU in percent.

    Raises:
        UserError: the data, the recipe or the run folder are invalid.
    """
    if config.deterministic:
        # required by cuBLAS for determinism
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    per_pass = images_per_pass(config.train, world)
    if METHODS[config.method].consistency and per_pass % 2:
        raise UserError(f"--train.batch-global {config.train.batch_global} gives {per_pass} images per rank "
                        f"and pass, and --method {config.method} mixes pairs; choose a multiple of "
                        f"{2 * world.size * config.train.accumulate}")
    with contextlib.ExitStack() as stack:
        distributed.on_main(world, lambda: stack.enter_context(lease.held(config.out)))
        distributed.on_main(world, lambda: folder.claim(config))
        index = _prepared_index(config, world, stack)
        return _run(config, world, index)


def _run(config: Config, world: World, index: Index) -> dict:
    distributed.on_main(world, lambda: folder.record_provenance(
        config.out, index.contents, index.classes))
    run = Run(config, world, index)
    distributed.on_main(world, lambda: folder.record_lists(config.out, run.lists.digest()))
    log.say(f"{config.method} in {config.out}: {world.size} x {world.device.type}, "
            f"{str(autocast_dtype(config.train.precision, world.device)).removeprefix('torch.')}, "
            f"{len(run.labelled)} labelled, {len(run.unlabelled)} unlabelled, {len(run.val)} validation "
            "images")
    for line in _without_effect(config):
        log.say(line)
    log.say(f"operators: {describe_implementations(world.device.type)}")
    distributed.on_main(world, run.preflight)
    if config.strict:
        distributed.on_main(world, run.refuse_warnings)
    METHODS[config.method].run(run)
    if config.control or (config.out / "stages" / "control" / "DONE.json").exists():
        run.control()
    results = {"method": config.method,
               "stages": run.stages} | ({"control": run.controlled} if run.controlled else {})
    distributed.on_main(world, lambda: run.finish(results))
    log.say(summary(results))
    return results


def _without_effect(config: Config) -> list[str]:
    """Lines about settings, perhaps of a recipe for another method, that the method does not use."""
    method, train, data = METHODS[config.method], config.train, config.data
    lines = []
    if data.split and (data.fraction, data.split_seed) != (DataConfig().fraction, DataConfig().split_seed):
        lines.append(f"--data.fraction {data.fraction} and --data.split-seed {data.split_seed} have no "
                     f"effect: --data.split {data.split} lists the labelled images")
    if train.from_teacher and not (method.labels or method.consistency):
        lines.append(f"--train.from-teacher has no effect with --method {config.method}, which has no "
                     "teacher")
    on_labels = config.method == "supervised" or method.labels or (method.consistency and train.from_teacher)
    given = [flag for flag, value in (("--train.supervised-steps", train.supervised_steps),
                                      ("--train.supervised-epochs", train.supervised_epochs)) if value]
    if given and not on_labels:
        lines.append(f"{given[0]} has no effect with --method {config.method}, which has no stage on the "
                     "labels alone" + " without --train.from-teacher" * method.consistency)
    return lines


def _prepared_index(config: Config, world: World, stack: contextlib.ExitStack) -> Index:
    """Loads the index of the data set; rank 0 first prepares it if it is missing or stale, and keeps others
    from rewriting it until the stack is closed."""
    data = config.data
    folder = data.index or config.out / "index"
    settings = data.prepare_options()

    def renew() -> None:
        if data.index and (other := indices.differing_settings(folder, data.root, **settings)):
            raise UserError(f"--data.index {folder} was prepared with other settings "
                            f"({', '.join(other)}), and another run may be using it; choose another "
                            "folder, or run `stpp prepare` again")
        if indices.is_stale(folder, data.root, **settings):
            log.say(f"prepare: reading {data.root}")
            indices.prepare(data.root, folder, strict=config.strict, only_if_stale=True, **settings)
        stack.enter_context(indices.in_use(folder))

    distributed.on_main(world, renew)
    return indices.load(folder)
