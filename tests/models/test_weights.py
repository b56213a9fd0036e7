"""Loading weights: matching tensors are loaded, others are named, and nothing in a file is ever run."""

import collections
import copy
import functools
import io
import os
import pickle
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stpp.errors import UserError
from stpp.models import trained, weights
from stpp.models.build import NETWORKS, PLAIN, build_model

CLASSES = 5
ON_RESNETS = [name for name, network in NETWORKS.items() if "resnet18" in network.backbones]


@functools.cache
def _built(name, backbone, num_classes, seed):
    torch.manual_seed(seed)
    return build_model(name, backbone, num_classes, 16)


def network(name="deeplabv2", backbone="resnet18", num_classes=CLASSES, seed=0):
    """Copies a fresh network, which is much faster than drawing the weights again."""
    return copy.deepcopy(_built(name, backbone, num_classes, seed))


def save(content, folder, name="weights.pth", **options):
    path = Path(folder) / name
    torch.save(content, path, **options)
    return path


def torchvision_file(folder, batches_tracked=True, seed=7):
    """Writes a ResNet-18 in torchvision's form, with a classifier of 1000 classes."""
    state = network(seed=seed).backbone.state_dict()
    if not batches_tracked:
        state = {key: value for key, value in state.items() if "num_batches" not in key}
    state |= {"fc.weight": torch.randn(1000, 512), "fc.bias": torch.randn(1000)}
    return save(collections.OrderedDict(state), folder, "resnet18-f37072fd.pth")


def assert_same(loaded, expected):
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def refusal(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and "weights_only" not in message and message.isprintable()
    return message


@pytest.mark.parametrize("name, prefix, wrapper", [
    ("deeplabv2", "", None), ("deeplabv3plus", "module.", None), ("pspnet", "", "model"),
    ("deeplabv2", "_orig_mod.", None), ("deeplabv2", "module._orig_mod.", "state_dict"),
])  # fmt: skip
def test_round_trip(tmp_path, name, prefix, wrapper):
    source, target = network(name, seed=1), network(name, seed=2)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    path = save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path)
    report = weights.load_model(target, path)
    assert_same(target.state_dict(), source.state_dict())
    assert report.loaded == report.total == len(state)
    assert report.summary() == f"{len(state)} of {len(state)} tensors loaded from weights.pth"


def test_old_file_format(tmp_path):
    source, target = network(seed=1), network(seed=2)
    weights.load_model(target, save(source.state_dict(), tmp_path, _use_new_zipfile_serialization=False))
    assert_same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("batches_tracked", [True, False])
def test_torchvision_backbone(tmp_path, batches_tracked):
    model = network("deeplabv3plus", seed=2)
    head = model.classifier.weight.clone()
    path = torchvision_file(tmp_path, batches_tracked)
    report = weights.load_backbone(model, path)
    assert_same(model.backbone.state_dict(), network(seed=7).backbone.state_dict())
    assert torch.equal(model.classifier.weight, head)
    loaded = 120 if batches_tracked else 100
    assert len(model.backbone.state_dict()) == 120
    start, end = report.summary().split("; ")
    assert (start, end) == (f"{loaded} of 120 tensors loaded from "
                            f"{path.name}", "left out: fc.weight, fc.bias")


def test_backbone_from_a_whole_network(tmp_path):
    source, target = network(seed=1, num_classes=21), network("pspnet", seed=2)
    report = weights.load_backbone(target, save({"model": source.state_dict()}, tmp_path))
    assert_same(target.backbone.state_dict(), source.backbone.state_dict())
    assert report.left_out[0] == "classifier.0.weight" and report.summary().endswith("and 3 more")


def test_backbone_of_another_depth_is_refused(tmp_path):
    model = network(seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = save(network(backbone="resnet50").backbone.state_dict(), tmp_path)
    message = refusal(weights.load_backbone, model, path)
    assert str(path) in message and "superfluous: layer1.0.conv3.weight" in message and "more" in message
    assert "layer1.0.conv1.weight ((64, 64, 1, 1) in the file, (64, 64, 3, 3) wanted)" in message
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("name", ON_RESNETS)
def test_another_number_of_classes_names_both(tmp_path, name):
    path = save({"model": network(name, num_classes=21).state_dict()}, tmp_path)
    message = refusal(weights.load_model, network(name, num_classes=19), path)
    assert "21 classes" in message and "19" in message and str(path) in message


def test_non_strict_loads_matching_tensors_and_names_the_others(tmp_path):
    source, target = network(seed=1, num_classes=21), network(seed=2)
    state = source.state_dict() | {"ema.decay": torch.ones(1)}
    del state["classifier.3.bias"]
    head = target.classifier[0].weight.clone()
    summary = weights.load_model(target, save(state, tmp_path), strict=False).summary()
    assert torch.equal(target.backbone.layer3[1].conv2.weight, source.backbone.layer3[1].conv2.weight)
    assert torch.equal(target.classifier[0].weight, head)
    wanted = len(target.state_dict())
    start = (
        f"{wanted - 8} of {wanted} tensors loaded from weights.pth; missing in the file: classifier.3.bias; "
    )
    assert summary.startswith(start)
    assert "classifier.0.bias ((21,) in the file, (5,) wanted)" in summary and summary.endswith(
        "left out: ema.decay"
    )


def test_non_strict_still_requires_the_backbone(tmp_path):
    """Otherwise a ResNet-50 started from ResNet-18 weights would train from noise, with only one line of
    notice."""
    path = save(network(num_classes=21).state_dict(), tmp_path)
    message = refusal(weights.load_model, network(backbone="resnet50"), path, strict=False)
    assert "does not fit the backbone" in message and "classifier" not in message


def test_strict_names_at_most_five_keys_of_a_kind(tmp_path):
    state = {f"wrong.{i}": torch.ones(1) for i in range(40)}
    message = refusal(weights.load_model, network(), save(state, tmp_path))
    assert re.findall(r"wrong\.\d+", message) == [f"wrong.{i}" for i in range(5)]
    assert "and 35 more" in message and message.count("backbone.") == 5


def test_single_superfluous_or_missing_key_is_refused(tmp_path):
    state = network().state_dict()
    message = refusal(weights.load_model, network(), save(state | {"extra": torch.ones(1)}, tmp_path))
    assert "superfluous: extra" in message
    state.pop("classifier.3.bias")
    assert "missing: classifier.3.bias" in refusal(weights.load_model, network(), save(state, tmp_path))


def test_values_that_are_no_plain_tensors(tmp_path):
    state = network().state_dict()
    message = refusal(weights.load_model, network(),
                      save(state | {"classifier.0.bias": [1.0] * CLASSES}, tmp_path))
    assert "classifier.0.bias (list in the file" in message
    on_nothing = torch.empty(CLASSES, device="meta")
    message = refusal(weights.load_model, network(),
                      save(state | {"classifier.0.bias": on_nothing}, tmp_path))
    assert "cannot be copied" in message


def test_control_characters_in_keys_are_escaped(tmp_path):
    state = network().state_dict() | {"a\nb\x1b[31m": torch.ones(1), "long" * 1000: torch.ones(1),
                                      3: torch.ones(1)}
    message = refusal(weights.load_model, network(), save(state, tmp_path))
    assert r"a\nb\x1b" in message and len(message) < 1000


@pytest.mark.parametrize(
    "content, found",
    [
        ([torch.ones(1)], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        (None, "holds a NoneType"),
        ({}, "no tensors"),
        ({"a": 1}, "no tensors"),
        ({"model": {}}, "no tensors"),
        ({"model": {"a": "b"}, "x": torch.ones(1)}, "no tensors"),
    ],
)
def test_files_without_a_state_dict(tmp_path, content, found):
    path = save(content, tmp_path)
    message = refusal(weights.read_checkpoint, path)
    assert found in message and str(path) in message


def test_missing_and_unreadable_files(tmp_path):
    assert "nowhere.pth does not exist" in refusal(weights.read_checkpoint, tmp_path / "nowhere.pth")
    assert "is a folder" in refusal(weights.load_backbone, network(), tmp_path)
    assert "does not exist" in refusal(weights.load_model, network(), str(tmp_path / "nowhere.pth"))
    closed = save({"a": torch.ones(1)}, tmp_path)
    closed.chmod(0)
    if os.access(closed, os.R_OK):
        pytest.skip("this user may read every file")
    assert "Permission denied" in refusal(weights.read_checkpoint, closed)


class Bomb:
    """Object that would write a file if unpickled without protection."""

    def __init__(self, evidence):
        self.command = f"touch {evidence}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["bare", "value", "key", "nested"])
def test_code_in_a_file_is_never_run(tmp_path, protocol, place):
    evidence = tmp_path / "evidence"
    bomb = Bomb(evidence)
    content = {"bare": bomb, "value": {"a": torch.ones(1), "b": bomb}, "key": [(bomb,)],
               "nested": {"model": {"w": torch.ones(1)}, "args": [bomb]}}[place]  # fmt: skip
    for zipped in (True, False):
        path = save(content, tmp_path, pickle_protocol=max(protocol, 1),
                    _use_new_zipfile_serialization=zipped)
        refusal(weights.read_checkpoint, path)
    if place != "nested":
        path.write_bytes(pickle.dumps(bomb, protocol))
        refusal(weights.read_checkpoint, path)
    assert not evidence.exists()
    pickle.loads(pickle.dumps(bomb, protocol))
    assert evidence.exists(), "the bomb is a dud, so this test shows nothing"


def test_refused_object_is_named(tmp_path):
    path = save({"w": torch.ones(1), "config": Path("x")}, tmp_path)
    assert re.search(r"holds a Python object \(pathlib[\w.]*\.PosixPath\)",
                     refusal(weights.read_checkpoint, path))


@pytest.mark.parametrize("name", ON_RESNETS)
@pytest.mark.parametrize("backbone", PLAIN)
def test_network_of_a_state_dict_is_recognised(tmp_path, name, backbone):
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build_model(name, backbone, 7, 8).state_dict().items()}
    state = {key: torch.full((), 0.5).expand(shape) for key,
             shape in shapes.items() if "num_batches" not in key}
    path = save(state, tmp_path)
    assert path.stat().st_size < 1e6, "the file should be small, whatever its tensors claim"
    found = trained.load_network(path, output_stride=16, class_names=list("abcdefg"))
    assert found.architecture == {"name": name, "backbone": backbone,
                                  "output_stride": 16} and found.classes == list("abcdefg")
    assert {key: value.shape for key, value in found.network.state_dict().items()} == shapes
    assert all(bool((value == 0.5).all()) for value in found.network.parameters())


def published_like(name: str, backbone: str, value: float, num_classes: int = 7) -> dict[str, torch.Tensor]:
    """Writes a state dict of a few bytes: every tensor is one number."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key,
                  tensor in build_model(name, backbone, num_classes).state_dict().items()}
    return {key: torch.full((), value).expand(shape) for key, shape in shapes.items()}


def of_public_training(**networks: dict) -> dict:
    """Builds a checkpoint in the form of UniMatch and UniMatch V2: networks from DDP, the optimiser, and
    scores as NumPy numbers."""
    wrapped = {key: {"module." + name: value for name, value in state.items()} for key,
               state in networks.items()}
    optimizer = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(3)}},
                 "param_groups": [{"lr": 5e-6, "params": [0]}]}
    scores = {"previous_best": np.float64(79.5), "previous_best_ema": np.mean([80.5]), "best_epoch": 3,
              "epoch": 59}
    return wrapped | {"optimizer": optimizer} | scores


@pytest.mark.parametrize("backbone", ["dinov2-small", "dinov2-base", "dinov2-large"])
def test_unimatch_v2_checkpoint_gives_the_moving_average(tmp_path, capsys, backbone):
    student, mean = (published_like("dpt", backbone, value) for value in (0.25, 0.75))
    path = save(of_public_training(model=student, model_ema=mean), tmp_path, "best.pth")
    for name, value, said in ((path, 0.75, True), (f"{path}#model_ema", 0.75, False),
                              (f"{path}#model", 0.25, False)):
        found = trained.load_network(name, class_names=list("abcdefg"))
        assert found.architecture == {"name": "dpt", "backbone": backbone, "output_stride": None}
        assert found.classes == list("abcdefg")
        assert all(bool((tensor == value).all()) for tensor in found.network.parameters())
        errors = capsys.readouterr().err
        assert (f"{path}: model_ema is read; best.pth#model selects the other" in errors) == said
        assert f"dpt on {backbone}, 7 classes" in errors and "output stride" not in errors
    assert "holds no 'x'; it has model_ema, model" in refusal(trained.load_network, f"{path}#x")
    assert "leave it out" in refusal(trained.load_network, path, output_stride=8)
    torch.save({}, tmp_path / "best.pth#model")  # a file of that name has precedence
    assert "no tensors" in refusal(trained.load_network, f"{path}#model")


@pytest.mark.parametrize("backbone", ["resnet50-deep-stem", "resnet101-deep-stem"])
def test_unimatch_checkpoint_requires_a_stride(tmp_path, backbone):
    path = save(of_public_training(model=published_like("deeplabv3plus", backbone, 0.5)), tmp_path)
    message = refusal(trained.load_network, path)
    assert (
        f"deeplabv3plus on {backbone}, by its keys" in message
        and "give it with --output-stride (16 is usual)" in message
    )
    found = trained.load_network(path, output_stride=16)
    assert found.architecture == {"name": "deeplabv3plus", "backbone": backbone, "output_stride": 16}
    assert all(bool((tensor == 0.5).all()) for tensor in found.network.parameters())
    assert not any(isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d)
                   for module in found.network.modules())


@pytest.mark.parametrize("backbone", ["efficientnet-lite1", "efficientnet-lite2"])
def test_equal_keys_are_distinguished_by_shapes(tmp_path, backbone):
    path = save(published_like("deeplabv3plus", backbone, 0.5), tmp_path)
    assert trained.load_network(path, output_stride=32).architecture["backbone"] == backbone


def test_numpy_numbers_are_not_built_from_a_file(tmp_path):
    """NumPy would take any eight bytes of a file as an object's address."""
    content = weights.read_checkpoint(save({"w": torch.ones(1), "best": np.float64(3.5)}, tmp_path))
    assert not isinstance(content["best"], float | np.generic)
    message = refusal(weights.read_checkpoint, save({"w": torch.ones(1), "all": np.arange(3)}, tmp_path))
    assert "holds a Python object (numpy" in message


def test_state_dict_has_the_public_stride_and_numbered_classes(tmp_path):
    found = trained.load_network(save(network().state_dict(), tmp_path), class_names=["too", "few"])
    assert found.classes == ["0", "1", "2", "3", "4"] and found.architecture["output_stride"] == 8
    assert found.network.backbone.layer4[1].conv2.dilation[0] == 4


def test_state_dicts_of_other_networks_are_refused(tmp_path):
    whole = network("deeplabv3plus").state_dict()
    deep_stem = {key: value for key, value in whole.items() if key != "backbone.conv1.weight"}
    deep_stem |= {f"backbone.conv1.{i}.weight": torch.ones(1) for i in (0, 3, 6)}
    message = refusal(trained.load_network, save(deep_stem, tmp_path))
    assert "weights.pth: holds no known network; nearest is deeplabv3plus on resnet18" in message
    assert (
        "missing: backbone.conv1.weight" in message
        and "superfluous: backbone.conv1.0.weight, backbone.conv1.3" in message
    )
    many = {"classifier.bias": torch.zeros(1 << 20),
            "classifier.weight": torch.zeros(1).expand(1 << 20, 256, 1, 1)}
    vast = {"backbone.layer1.0.conv1.weight": torch.zeros(1).expand(1 << 20, 1 << 20, 3, 3)}
    for change, words in (
        (many, "1048576 classes"),
        (vast, "(1048576, 1048576, 3, 3)"),
        ({"a\nb\x1b[31m": torch.ones(1)}, r"superfluous: 'a\nb\x1b"),
        ({"classifier.bias": 5}, "0 classes"),
        ({"classifier.bias": torch.zeros(1)}, "1 classes"),
        ({"classifier.weight": torch.ones(6, 64, 1, 1)}, "(6, 64, 1, 1)"),
        ({"classifier.bias": torch.empty(5, device="meta")}, "cannot be copied"),
    ):
        message = refusal(trained.load_network, save(whole | change, tmp_path))
        assert words in message and "weights.pth" in message and len(message) < 1500, message
    for content in (network().backbone.state_dict(), {"a": torch.ones(1)}):
        assert "holds no known network" in refusal(trained.load_network, save(content, tmp_path))
    last = {"format": 1, "model": whole, "step": 3}
    assert "give a best.pt" in refusal(trained.load_network, save(last, tmp_path))


def _file(zipped):
    buffer = io.BytesIO()
    content = {"model": {"a.weight": torch.arange(6.0), "b": torch.ones(2, 3)}, "step": 4, "name": "x"}
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FILES = [_file(True), _file(False)]
FLIPS = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
CODES = (*b"().0123}]", *range(66, 91), *range(97, 118), *range(0x80, 0x8B))  # components of pickles
OPCODES = st.sampled_from([bytes([code]) for code in CODES])


def _read(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "garbage.pth"
        path.write_bytes(data)
        try:
            content = weights.read_checkpoint(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return None
    assert isinstance(content, dict)
    return content


@given(st.binary(max_size=300))
def test_random_bytes(data):
    assert _read(data) is None


@given(st.lists(OPCODES | st.binary(max_size=6), max_size=40).map(b"".join), st.booleans())
def test_random_pickle_programs(program, closed):
    assert _read(b"\x80\x02" + program + (b"." if closed else b"")) is None


@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True))
def test_truncated_files(data, part):
    assert _read(data[: int(part * len(data))]) is None


@settings(max_examples=200)
@given(st.sampled_from(FILES), st.lists(FLIPS, min_size=1, max_size=4))
def test_flipped_bytes_give_a_dict_or_a_refusal(data, flips):
    data = bytearray(data)
    for place, change in flips:
        data[int(place * len(data))] ^= change
    _read(bytes(data))
