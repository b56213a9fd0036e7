"""Engine folders: trust, rebuilding and refusals. A backend in Python replaces the compilers."""

import dataclasses
import json
import os
import shutil
import threading

import pytest
import torch

from engine_cases import CLASSES, CPU, images, load, relative_error, save, tiny
from stpp import checkpoint
from stpp.errors import UserError
from stpp.inference import build, choose, gate, trust
from stpp.inference import record as records
from stpp.inference.open import EagerPredictor, Work, compile_predictor, open_predictor
from stpp.inference.record import ANY_SIZE, Device, Shapes


class FakeBackend:
    """Backend that keeps the ready network where a compiler would write a library, and counts calls."""

    SHAPES = Shapes(smallest=(1, 8, 8), typical=(2, 32, 32), largest=(8, 64, 64))

    def __init__(self):
        self.version, self.built, self.swaps, self.fail, self.spoil, self.reason = "1", 0, 0, None, None, None

    def unavailable(self, device):
        return self.reason

    def versions(self):
        return {"fake": self.version}

    def build(self, ready, folder, *, shapes, device, dtype, frozen):
        self.built += 1
        (folder / "engine.fake").write_bytes(b"native code")
        self.ready = ready
        if self.fail:
            raise UserError(self.fail)
        return shapes

    def load(self, folder, *, device, swapped=None):
        assert (folder / "engine.fake").read_bytes() == b"native code"
        network = swapped or self.ready
        self.swaps += swapped is not None
        return (lambda images_NCHW: self.spoil(network(images_NCHW))) if self.spoil else network


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    """Separate user, without engines or key."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "stpp"


@pytest.fixture
def fake(monkeypatch):
    backend = FakeBackend()
    monkeypatch.setitem(build.BACKENDS, "fake", backend)
    costs = {("fake", False): choose.Cost(compile_s=10, speedup=9, speedup_fp32=2, shared=True),
             ("fake", True): choose.Cost(compile_s=40, speedup=9, speedup_fp32=4)}
    monkeypatch.setattr(choose, "COSTS", {"cpu": costs})
    monkeypatch.delitem(build.BACKENDS, "inductor")
    return backend


@pytest.fixture
def first(tmp_path):
    return save(tmp_path / "first.pt", 0)


@pytest.fixture
def second(tmp_path):
    return save(tmp_path / "second.pt", 1)


def opened(path, **options):
    return open_predictor(path, **{"load": load, "device": CPU, "precision": "fp32", **options})


def compiled(path, out, **options):
    return compile_predictor(path, out,
                             **{"load": load, "device": CPU, "precision": "fp32", "backend": "fake",
                                **options})


def truth(path, images_NCHW):
    with torch.no_grad():
        return load(path)[0](images_NCHW)


def assert_computes(teacher, path, *shape):
    images_NCHW = images(*(shape or (2, 33, 47)))
    with torch.inference_mode():
        ours = teacher.logits(images_NCHW)
    assert ours.dtype == torch.float32
    assert relative_error(ours, truth(path, images_NCHW)) < 1e-4


def edit(folder, **values):
    path = folder / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- choice of backend
# ---------------------------------------------------------------------------------------------------


def test_little_or_unknown_work_uses_eager(first, fake):
    for work in (None, Work(images=1), Work(images=0)):
        teacher = opened(first, work=work)
        assert isinstance(teacher, EagerPredictor) and teacher.identity.backend == "eager"
        assert_computes(teacher, first)
    assert fake.built == 0


def test_much_work_is_compiled_and_logs_the_reason(first, fake, tmp_path, capsys):
    teacher = opened(first, images=10**8, cache=tmp_path / "cache")
    assert (
        fake.built == 1
        and teacher.identity.backend == "fake-frozen"
        and teacher.identity.classes == tuple(CLASSES)
    )
    assert_computes(teacher, first)
    said = capsys.readouterr().err
    assert "fake fp32" in said and "s to compile" in said and "agree with eager" in said


def test_choice_depends_on_the_work_and_never_on_the_clock(fake):
    network = tiny(0)

    def work_of(flop_s, predictors=1):
        images_ = flop_s * choose.EAGER_FLOPS["cpu"]["fp32"] / choose.flop_per_px(network) / (360 * 480)
        return Work(images=images_, predictors=predictors)

    def pick(flop_s, predictors=1, present=("fake",)):
        work = work_of(flop_s, predictors)
        return choose.pick(network, work, present=list(present), kind="cpu", precision="fp32", cores=1)[:2]

    def is_frozen(work):  # of a requested backend
        return choose.is_frozen("fake", network, work, kind="cpu", precision="fp32", cores=1)

    assert is_frozen(work_of(200)) and is_frozen(Work(images=None)) and not is_frozen(work_of(15))
    assert is_frozen(work_of(124)) and not is_frozen(work_of(124, predictors=5))

    assert pick(15) == ("eager", False)
    assert pick(25) == ("fake", False)
    assert pick(15, predictors=5) == ("fake", False)
    assert pick(200) == ("fake", True)
    assert pick(200, present=()) == ("eager", False)
    assert choose.fastest(["fake"], "cpu") == "fake" and choose.fastest([], "cpu") == "eager"
    work = Work(images=1000, views=16.1)
    assert len({choose.pick(network, work, present=["fake"], kind="cpu", precision="fp32", cores=2)
                for _ in range(5)}) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gpu_compile_pays_off_after_six_minutes_of_eager(precision):
    """By estimates: 60 s of compiling, a sixth less work after it, 2.8e14 operations a second of eager."""
    network = tiny(0)

    def pick(eager_s: float) -> tuple:
        work = Work(images=eager_s * 2.8e14 / choose.flop_per_px(network) / (360 * 480))
        return choose.pick(network, work, present=["inductor"], kind="cuda", precision=precision, cores=1)[:2]

    assert pick(355) == ("eager", False) and pick(365) == ("inductor", False)


def test_operations_are_counted_without_computing():
    convolution = torch.nn.Conv2d(3, 8, 3, padding=1)
    assert choose.flop_per_px(convolution) == pytest.approx(2 * 3 * 9 * 8)
    product = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 2, stride=2), torch.nn.Flatten(2),
                                  torch.nn.Linear(16 * 16, 5))
    assert choose.flop_per_px(product, side=32) == pytest.approx(
        (2 * 12 * 8 * 16**2 + 2 * 8 * 16**2 * 5) / 32**2
    )
    assert next(convolution.parameters()).device.type == "cpu"


def test_auto_falls_back_to_eager_if_the_compiler_fails(first, fake, tmp_path, capsys):
    fake.fail = "no linker"
    assert_computes(opened(first, images=10**8, cache=tmp_path / "cache"), first)
    assert "no linker" in capsys.readouterr().err
    with pytest.raises(UserError, match="no linker"):
        opened(first, backend="fake", cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(("options", "names"), [
    ({"backend": "tensorrt"}, ["--backend tensorrt", "CUDA"]),
    ({"backend": "torch-tensorrt"}, ["--backend torch-tensorrt", "CUDA"]),
    ({"backend": "tvm"}, ["--backend tvm", "inductor", "eager"]),
    ({"precision": "fp16"}, ["--precision fp16", "CUDA"]),
])
def test_unavailable_backends_are_named(first, tmp_path, options, names):
    def compile_it():
        compile_predictor(first, tmp_path / "out", load=load, device=CPU, **options)

    for action in (lambda: opened(first, **options), compile_it):
        with pytest.raises(UserError) as refused:
            action()
        assert all(name in str(refused.value) for name in names) and "\n" not in str(refused.value)


# --- caching and sharing
# ------------------------------------------------------------------------------------------


def test_cached_engine_is_reused(first, fake, tmp_path):
    for _ in range(2):
        assert_computes(opened(first, backend="fake", cache=tmp_path / "cache"), first)
    assert fake.built == 1


def test_unfrozen_engine_serves_all_teachers_and_frozen_only_its_own(first, second, fake, tmp_path):
    seconds = (
        25
        * choose.EAGER_FLOPS["cpu"]["fp32"]
        * torch.get_num_threads()
        / choose.flop_per_px(tiny(0))
        / (360 * 480)
    )
    for path in (first, second, first):
        teacher = opened(path, work=Work(images=seconds), cache=tmp_path / "cache")
        assert teacher.identity.backend == "fake"
        assert teacher.identity.weights_sha256 == records.weights_sha256(load(path)[0].state_dict())
        assert_computes(teacher, path)
    assert (fake.built, fake.swaps) == (1, 1)
    for path in (first, second):
        assert_computes(opened(path, backend="fake", cache=tmp_path / "cache"), path)
    assert (fake.built, fake.swaps) == (3, 1)


def test_failed_swap_of_weights_is_detected(first, second, fake, tmp_path, monkeypatch):
    work = Work(
        images=25
        * choose.EAGER_FLOPS["cpu"]["fp32"]
        * torch.get_num_threads()
        / choose.flop_per_px(tiny(0))
        / (360 * 480)
    )
    opened(first, work=work, cache=tmp_path / "cache")
    own = fake.ready
    monkeypatch.setattr(fake, "load", lambda folder, *, device, swapped=None: own)
    teacher = opened(second, work=work, cache=tmp_path / "cache")
    assert isinstance(teacher, EagerPredictor)
    assert_computes(teacher, second)


def test_leftovers_of_a_killed_process_are_removed(first, fake, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(build.shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(fake, "load", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        opened(first, backend="fake", cache=cache)
    assert [path for path in cache.iterdir() if path.name.endswith(".tmp")]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(build.BACKENDS, "fake", fake)
    assert_computes(opened(first, backend="fake", cache=cache), first)
    # engine and lock
    assert sorted(path.name.split("-")[0].strip(".") for path in cache.iterdir()) == ["fake", "fake"]


def test_concurrent_processes_compile_once(first, fake, tmp_path):
    barrier, found = threading.Barrier(4), []

    def open_once():
        barrier.wait(timeout=30)
        found.append(opened(first, backend="fake", cache=tmp_path / "cache"))

    threads = [threading.Thread(target=open_once) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 4 and fake.built == 1


# --- trust
# ----------------------------------------------------------------------------------------------


def test_engine_folder_opens_without_compiling(first, fake, tmp_path):
    sample = [images(1, 60, 60, seed=seed) for seed in range(3)]
    compiled(first, tmp_path / "engine", sample=sample)
    record, _ = records.read(tmp_path / "engine")
    assert record.agreement.pixels == 3 * 3600 and record.agreement.outside == 1.0
    teacher = opened(tmp_path / "engine")
    assert_computes(teacher, first)
    assert fake.built == 1 and teacher.agreement.outside == 1.0
    moved = shutil.move(tmp_path / "engine", tmp_path / "elsewhere")
    assert_computes(opened(moved), first)
    assert fake.built == 1


def rebuilt(folder, fake, tmp_path, path, capsys):
    capsys.readouterr()
    teacher = opened(folder, cache=tmp_path / "rebuilt")
    assert fake.built == 2
    assert "is not used" in (said := capsys.readouterr().err)
    assert_computes(teacher, path)
    return said


def test_engine_of_another_version_is_compiled_again(first, fake, tmp_path, capsys):
    compiled(first, tmp_path / "engine")
    fake.version = "2"
    said = rebuilt(tmp_path / "engine", fake, tmp_path, first, capsys)
    assert "fake 1" in said and "fake 2" in said


def test_engine_of_another_device_is_compiled_again(first, fake, tmp_path, capsys, monkeypatch):
    compiled(first, tmp_path / "engine")
    other = Device(kind="cpu", name="Other CPU", capability="armv9")
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, device: other))
    assert "Other CPU" in rebuilt(tmp_path / "engine", fake, tmp_path, first, capsys)


def test_altered_engine_file_is_never_run(first, fake, tmp_path, capsys):
    compiled(first, tmp_path / "engine")
    (tmp_path / "engine" / "engine.fake").write_bytes(b"evil code")
    assert "engine.fake" in rebuilt(tmp_path / "engine", fake, tmp_path, first, capsys)
    (tmp_path / "engine" / "engine.fake").unlink()
    assert_computes(opened(tmp_path / "engine", cache=tmp_path / "rebuilt"), first)


def test_other_weights_in_the_folder_are_compiled_again(first, second, fake, tmp_path, capsys):
    compiled(first, tmp_path / "engine")
    shutil.copy(second, tmp_path / "engine" / "checkpoint.pt")
    assert "other weights" in rebuilt(tmp_path / "engine", fake, tmp_path, second, capsys)


def test_foreign_engine_needs_trust(first, fake, tmp_path, user):
    compiled(first, tmp_path / "engine")
    (user / "engine.key").unlink()
    with pytest.raises(UserError, match="--trust-engine"):
        opened(tmp_path / "engine")
    assert_computes(opened(tmp_path / "engine", trust=True), first)
    compiled(first, tmp_path / "mine")  # with a new key the old engine is still foreign
    with pytest.raises(UserError, match="--trust-engine"):
        opened(tmp_path / "engine")


@pytest.mark.parametrize("field", ["files", "shapes", "precision", "weights_sha256", "classes",
                                   "architecture", "compile_s"])
def test_signature_covers_every_field(first, fake, tmp_path, field):
    compiled(first, tmp_path / "engine")
    table = json.loads((tmp_path / "engine" / "engine.json").read_text())
    changed = {"files": {}, "shapes": table["shapes"] | {"largest": [9, 99, 99]}, "precision": "bf16",
               "weights_sha256": "0" * 64,
               "classes": ["x"], "architecture": {}, "compile_s": 0.123}
    edit(tmp_path / "engine", **{field: changed[field]})
    record, signature = records.read(tmp_path / "engine")
    assert not trust.is_own(record, signature)


def test_planted_cache_entry_is_not_run(first, fake, tmp_path, user):
    opened(first, backend="fake", cache=tmp_path / "cache")
    (user / "engine.key").unlink()
    assert_computes(opened(first, backend="fake", cache=tmp_path / "cache"), first)
    assert fake.built == 2


def test_key_readable_by_others_is_refused(first, fake, tmp_path, user):
    compiled(first, tmp_path / "engine")
    os.chmod(user / "engine.key", 0o644)
    with pytest.raises(UserError, match="engine.key"):
        opened(tmp_path / "engine")
    os.chmod(user / "engine.key", 0o600)
    (user / "engine.key").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        opened(tmp_path / "engine")


def test_concurrent_processes_make_one_key(user):
    barrier, keys = threading.Barrier(8), []

    def open_once():
        barrier.wait(timeout=30)
        keys.append(trust._key(create=True))

    threads = [threading.Thread(target=open_once) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(keys) == 8 and len(set(keys)) == 1 and len(keys[0]) == trust.KEY_BYTES
    assert [path.name for path in user.iterdir()] == ["engine.key"]


# --- refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    "", "{", "[]", "3", '{"format": 1}', '{"format": 2}', '{"format": 1, "shapes": {}, "agreement": null}'])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "engine.json").write_text(content)
    with pytest.raises(UserError, match="engine.json") as refused:
        opened(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_folder_without_engine_or_weights_is_named(first, fake, tmp_path):
    with pytest.raises(UserError, match="no engine"):
        opened(tmp_path)
    compiled(first, tmp_path / "engine")
    (tmp_path / "engine" / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match="checkpoint.pt"):
        opened(tmp_path / "engine")


def test_flags_that_contradict_the_engine_are_named(first, fake, tmp_path):
    compiled(first, tmp_path / "engine")
    for flag, value in (("backend", "eager"), ("precision", "bf16")):
        with pytest.raises(UserError, match=f"--{flag} {value}"):
            opened(tmp_path / "engine", **{flag: value})


def test_an_engine_for_another_kind_of_device_points_to_its_weights(first, fake, tmp_path):
    compiled(first, tmp_path / "engine")
    table = json.loads((tmp_path / "engine" / "engine.json").read_text())
    edit(tmp_path / "engine", device=table["device"] | {"kind": "cuda", "name": "H200"}, precision="fp16")
    with pytest.raises(UserError, match="H200.*checkpoint.pt"):
        opened(tmp_path / "engine", precision="auto")


def test_a_cache_that_cannot_be_locked_is_named(first, fake, tmp_path):
    opened(first, backend="fake", cache=tmp_path / "cache")
    (lock,) = (tmp_path / "cache").glob(".*.lock")
    lock.unlink()
    lock.mkdir()
    with pytest.raises(UserError, match="cache"):
        opened(first, backend="fake", cache=tmp_path / "cache")


def test_cache_that_is_a_file_is_named_and_auto_uses_eager(first, fake, tmp_path, user):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cache") as refused:
        opened(first, backend="fake", cache=tmp_path / "cache")
    assert "\n" not in str(refused.value)
    assert isinstance(opened(first, images=10**8, cache=tmp_path / "cache"), EagerPredictor)
    user.parent.mkdir(exist_ok=True)
    user.write_text("")  # no place for a key
    with pytest.raises(UserError, match="stpp"):
        compiled(first, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_foreign_folder_is_not_overwritten(first, fake, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="photos"):
        compiled(first, tmp_path / "photos")
    assert (tmp_path / "photos" / "one.jpg").exists() and fake.built == 0


def test_failed_compile_keeps_only_the_old_engine(first, second, fake, tmp_path):
    compiled(first, tmp_path / "engine")
    before = sorted(path.name for path in tmp_path.iterdir())
    fake.fail = "no linker"
    with pytest.raises(UserError, match="no linker"):
        compiled(second, tmp_path / "engine")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    fake.fail = None
    compiled(second, tmp_path / "engine")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_computes(opened(tmp_path / "engine"), second)


@pytest.mark.parametrize("spoil", [lambda x: x * 1.2, lambda x: x + float("nan"), lambda x: x[:, :, 1:],
                                   lambda x: x.flip(1)],
                         ids=["scaled", "nan", "shape", "classes"])
def test_wrong_engine_is_refused_at_build(first, fake, tmp_path, spoil):
    fake.spoil = spoil
    with pytest.raises(UserError, match="eager"):
        compiled(first, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_sizes_outside_the_range_use_eager_and_are_logged_once(first, fake, tmp_path, capsys):
    teacher = opened(first, backend="fake", cache=tmp_path / "cache")
    for shape in ((1, 7, 40), (9, 20, 20), (1, 40, 65), (1, 8, 8), (8, 64, 64), (1, 100, 200)):
        assert_computes(teacher, first, *shape)
    assert capsys.readouterr().err.count("inputs outside") == 1


def test_an_eager_folder_is_portable(first, tmp_path, user):
    compile_predictor(first, tmp_path / "engine", load=load, device=CPU, backend="eager", precision="fp32")
    shutil.rmtree(user)
    assert_computes(opened(tmp_path / "engine"), first)


def test_eager_folder_with_other_weights_is_refused(first, second, tmp_path):
    compile_predictor(first, tmp_path / "engine", load=load, device=CPU, backend="eager", precision="fp32")
    shutil.copy(second, tmp_path / "engine" / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt: holds other weights than .*engine.json names"):
        opened(tmp_path / "engine")


# --- records
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [[], ["1x2x3"], ["1x32x32"] * 4, ["0x32x32"] * 3, ["1x32"] * 3,
                                   ["1x32x32 "] * 3, ["-1x3x3"] * 3, ["2x32x32", "1x64x64", "4x64x64"],
                                   ["1x32x32", "2x64x64", "4x64x63"], ["1x9999999x1"] * 3])
def test_impossible_shapes_are_named(texts):
    with pytest.raises(UserError, match="--shapes"):
        Shapes.parse(texts)


def test_shapes_hold_their_ends():
    shapes = Shapes.parse(["1x32x48", "2x64x64", "4x128x256"])
    held = {(1, 32, 48): True, (4, 128, 256): True, (5, 64, 64): False, (1, 31, 48): False,
            (1, 32, 47): False, (2, 129, 64): False}
    assert {shape: shapes.hold(torch.empty(shape[0], 3, *shape[1:])) for shape in held} == held
    assert ANY_SIZE.hold(torch.empty(1, 3, 1, 1))


def test_records_read_back(first, fake, tmp_path):
    record = compiled(first, tmp_path / "engine").record
    found, signature = records.read(tmp_path / "engine")
    assert found == record and trust.is_own(found, signature)
    awkward = records.Agreement(raw=0.1 + 0.2, outside=1 / 3, margin=0.1, decided=0.5, pixels=3)
    judged = dataclasses.replace(record, agreement=awkward)
    records.write(tmp_path / "engine", judged, trust.sign(judged))
    assert records.read(tmp_path / "engine")[0] == judged and trust.is_own(*records.read(tmp_path / "engine"))


def test_weights_are_hashed_by_value():
    state = tiny(0).state_dict()
    same = records.weights_sha256(state)
    layout = {name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value for name,
              value in state.items()}
    assert records.weights_sha256(dict(reversed(layout.items()))) == same
    name = "conv1.weight"
    others = [{**state, name: state[name].half()}, {**state, name: state[name].flatten(1)},
              {**state, name: state[name] + 1e-6},
              {**{key: value for key, value in state.items() if key != name}, "other": state[name]}]
    assert len({same, *map(records.weights_sha256, others)}) == 5


def test_engine_checkpoint_holds_only_the_network(first, fake, tmp_path):
    compiled(first, tmp_path / "engine")
    assert set(checkpoint.load(tmp_path / "engine" / "checkpoint.pt")) == {
        "format",
        "model",
        "classes",
        "architecture",
    }


# --- the gate
# ---------------------------------------------------------------------------------------------------------


def logits_of(classes_HW: torch.Tensor, lead: float) -> torch.Tensor:
    """Builds logits [1, 3, H, W] whose largest exceeds the others by `lead`."""
    return torch.nn.functional.one_hot(classes_HW, 3).permute(2, 0, 1)[None].float() * lead


def agreement(engine, eager):
    tally = gate.Counts(CPU)
    tally.add(engine, eager, tuple(engine.shape[2:]))
    return tally.agreement()


def test_near_ties_are_defined_by_eager_alone():
    classes = torch.zeros(10, 10, dtype=torch.long)
    eager = logits_of(classes, 5.0)
    eager[..., :4, :] = logits_of(classes, 0.1)[..., :4, :]  # 40 near-ties: the two largest are 0.035 apart
    ours = logits_of(classes, 5.0)
    ours[..., :2, :] = logits_of(classes + 1, 5.0)[..., :2, :]  # 20 of them differ
    found = agreement(ours, eager)
    assert (found.raw, found.outside, found.decided, found.pixels) == (0.8, 1.0, 0.6, 100)
    # and ten decided ones, though the engine is undecided there
    ours[..., 9, :] = logits_of(classes + 1, 0.01)[..., 9, :]
    found = agreement(ours, eager)
    assert found.raw == pytest.approx(0.7) and found.outside == pytest.approx(50 / 60)


def test_all_pixels_count_if_all_are_near_ties():
    classes = torch.zeros(4, 5, dtype=torch.long)
    found = agreement(logits_of(classes + 1, 5.0), logits_of(classes, 0.01))
    assert (found.raw, found.outside, found.decided) == (0.0, 0.0, 0.0)


def test_nan_logits_agree_with_nothing():
    classes = torch.zeros(4, 4, dtype=torch.long)
    ours = logits_of(classes, 5.0)
    ours[0, 1] = float("nan")
    assert agreement(ours, logits_of(classes, 5.0)).outside == 0.0


@pytest.mark.parametrize(("wrong", "accepted"), [(0, True), (5, True), (6, False), (1000, False)])
def test_agreement_floor_is_exact_and_refusals_give_both_figures(wrong, accepted):
    classes = torch.zeros(20, 50, dtype=torch.long)
    ours = classes.clone().flatten()
    ours[:wrong] = 1
    found = agreement(logits_of(ours.view(20, 50), 5.0), logits_of(classes, 5.0))
    if accepted:
        gate.accept(found, "engine")
        return
    with pytest.raises(UserError) as refused:
        gate.accept(found, "engine")
    assert str(refused.value).count(f"{(1000 - wrong) / 10:.3f} %") >= 2 and "--backend eager" in str(
        refused.value
    )


@pytest.mark.parametrize(("wrong", "rounded", "accepted"), [
    (8, 5, False), (8, 6, True), (12, 8, True), (13, 8, False), (30, 30, True), (31, 900, False),
    (4, 0, True)])
def test_engine_is_not_refused_for_its_precision(wrong, rounded, accepted, capsys):
    """Counts of 1000 pixels that differ from float32: the engine's, and those of eager in its precision."""
    classes = torch.zeros(20, 50, dtype=torch.long)

    def found(different: int) -> records.Agreement:
        ours = classes.clone().flatten()
        ours[:different] = 1
        return agreement(logits_of(ours.view(20, 50), 5.0), logits_of(classes, 5.0))

    if not accepted:
        with pytest.raises(UserError, match="rejected"):
            gate.accept(found(wrong), "engine", found(rounded))
        return
    gate.accept(found(wrong), "engine", found(rounded))
    assert ("--train.precision fp32" in capsys.readouterr().err) == (wrong > 5)


class Counted:
    """Logits that are correct for `good` calls, with a count of the images seen."""

    num_classes, view_px, identity = 3, None, None

    def __init__(self, good: int = 10**9):
        self.good, self.seen, self.calls = good, 0, 0

    def logits(self, images_NCHW):
        self.calls, self.seen = self.calls + 1, self.seen + len(images_NCHW)
        classes = torch.zeros(images_NCHW.shape[2:], dtype=torch.long) + (self.calls > self.good)
        return logits_of(classes, 5.0).expand(len(images_NCHW), -1, -1, -1)


def test_gate_checks_the_first_images_and_then_frees_eager(monkeypatch, capsys):
    monkeypatch.setattr(gate, "GATE_PX", 250)
    engine, eager, rounded = Counted(), Counted(), Counted()
    made = []
    gated = gate.Gated(engine, lambda: made.append(1) or [eager.logits, rounded.logits], name="engine")
    for _ in range(5):
        gated.logits(torch.zeros(2, 3, 10, 10))
    # 250 of 200 a call: two images, then one
    assert (engine.seen, eager.seen, rounded.seen, len(made)) == (10, 3, 3, 1)
    assert gated.agreement.pixels == 300 and not gated._references
    assert capsys.readouterr().err.count("agree with eager") == 2


def test_engine_that_fails_within_the_first_images_is_refused(monkeypatch):
    monkeypatch.setattr(gate, "GATE_PX", 500)
    gated = gate.Gated(Counted(good=2), lambda: [Counted().logits], name="engine")
    for _ in range(2):
        gated.logits(torch.zeros(1, 3, 10, 10))
    with pytest.raises(UserError, match="rejected"):
        gated.logits(torch.zeros(1, 3, 10, 10))


def test_opened_engines_are_gated(first, fake, tmp_path):
    """An engine can pass on small noise and be wrong on real sizes."""
    fake.spoil = lambda x: x if x.shape[2] < 30 or x.shape[3] < 30 or x.shape[0] > 2 else x.flip(1)
    teacher = opened(first, backend="fake", cache=tmp_path / "cache")
    with torch.inference_mode(), pytest.raises(UserError, match="rejected"):
        teacher.logits(images(1, 64, 64))


def test_compare_stops_when_it_has_seen_enough(monkeypatch):
    monkeypatch.setattr(gate, "GATE_PX", 250)
    endless = (torch.zeros(1, 3, 10, 10) for _ in iter(int, 1))
    engines, eager = [Counted(), Counted(good=0)], Counted()
    right, wrong = gate.compare([engine.logits for engine in engines], eager.logits, endless)
    assert (right.pixels, wrong.pixels, eager.calls) == (300, 300, 3)
    assert (right.outside, wrong.outside) == (1.0, 0.0)
    with pytest.raises(ValueError, match="empty"):
        gate.compare([Counted().logits], Counted().logits, [])
