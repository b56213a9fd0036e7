"""Exported graphs and AOTInductor packages of the real models, against their networks."""

import pytest
import torch
from PIL import Image

from engine_cases import (
    CLASSES,
    CPU,
    MODELS,
    QUICK,
    images,
    least_px,
    load,
    model,
    relative_error,
    save,
    sizes_from,
    tiny,
)
from stpp import checkpoint, cli, device
from stpp.errors import UserError
from stpp.images.pixels import normalised
from stpp.inference import export, fold, gate, inductor
from stpp.inference import record as records
from stpp.inference.open import EagerPredictor, compile_predictor, open_predictor
from stpp.inference.record import ANY_SIZE, Shapes
from stpp.models.layers import DilatedConv3x3
from stpp.models.trained import load_network

SIZES = ((1, 33, 33), (1, 17, 17), (1, 200, 40), (3, 64, 201), (2, 17, 300), (5, 49, 49))
"""One image and several, sides equal and not, maps smaller and larger than the dilations and the pooling's
regions."""
FP32 = 1e-5
"""Tolerance relative to the largest logit: the same sums in another order."""
HALF = 0.02
ERROR_OF_OTHER_WEIGHTS = 0.05
"""Least difference of two networks of this file."""


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def ready(network, dtype=torch.float32):
    return fold.ready(network, device=CPU, dtype=dtype)


def assert_equal(run, network, *, tolerance=FP32, sizes=SIZES, dtype=torch.float32):
    with torch.inference_mode():
        for size in sizes:
            images_NCHW = images(*size, dtype=dtype)
            ours, truth = run(images_NCHW), network(images_NCHW)
            assert ours.shape == truth.shape and ours.dtype == torch.float32
            assert relative_error(ours, truth) < tolerance, size


def operators(exported) -> set[str]:
    return {str(node.target) for node in exported.graph.nodes}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
                                  for name in MODELS])
def test_one_graph_accepts_every_size(name):
    network, least = ready(model(name)), least_px(name)
    exported, shapes = export.program(network, shapes=ANY_SIZE, device=CPU, dtype=torch.float32, plain=False)
    assert_equal(exported.module(), network,
                 sizes=(*sizes_from(least, SIZES), (1, least, least), (1, 518, 518)))
    pyramid = any(isinstance(module, DilatedConv3x3) for module in network.modules())
    assert ("stpp_kernels.dilated_conv3x3.default" in operators(exported)) == pyramid
    assert pyramid == (name not in ("pspnet", "dinov2-small"))
    assert shapes.smallest == (1, least, least) and shapes.largest == ANY_SIZE.largest


def test_plain_graphs_hold_no_custom_operator_and_keep_the_network():
    network = ready(tiny(0))
    exported, _ = export.program(network, shapes=ANY_SIZE, device=CPU, dtype=torch.float32, plain=True)
    assert not any(name.startswith("stpp") for name in operators(exported))
    assert network.branch[0].fused
    assert_equal(exported.module(), network)
    copied = export.plain_copy(network)
    assert copied.branch[0].weight is network.branch[0].weight and not copied.branch[0].fused


@pytest.mark.parametrize("typical", ["1x1x1", "1x64x64", "2x65x65", "7x333x65"])
def test_typical_input_does_not_specialise_the_graph(typical):
    network = ready(tiny(0))
    shapes = Shapes.parse(["1x1x1", typical, "9x400x400"])
    assert_equal(export.program(network, shapes=shapes, device=CPU, dtype=torch.float32,
                                plain=False)[0].module(), network)


def test_graph_is_half_precision_except_logits():
    exported, _ = export.program(ready(tiny(0), torch.bfloat16), shapes=ANY_SIZE, device=CPU,
                                 dtype=torch.bfloat16, plain=True)
    convolutions = [node for node in exported.graph.nodes if "conv2d" in str(node.target)]
    assert [node.meta["val"].dtype
            for node in convolutions] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert exported.graph.output_node().args[0][0].meta["val"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_unfrozen_package_takes_the_next_teachers_weights(tmp_path):
    """Three classes: so short a bias is written into the code unless that is forbidden, and a swap would miss
    it."""
    first, second = ready(tiny(0)), ready(tiny(1))
    assert first.classifier.bias.numel() <= 8
    assert relative_error(first(images(1, 33, 33)), second(images(1, 33, 33))) > ERROR_OF_OTHER_WEIGHTS
    assert inductor.unavailable(CPU) is None
    inductor.build(first, tmp_path, shapes=ANY_SIZE, device=CPU, dtype=torch.float32, frozen=False)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [inductor.FILE]
    assert_equal(inductor.load(tmp_path, device=CPU), first)
    swapped, own = inductor.load(tmp_path, device=CPU, swapped=second), inductor.load(tmp_path, device=CPU)
    assert_equal(swapped, second)
    assert_equal(own, first)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert_equal(swapped, second)
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="another architecture"):
        inductor.load(tmp_path, device=CPU, swapped=ready(model("pspnet")))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_frozen_package_refuses_other_weights(tmp_path):
    first, second = ready(tiny(0)), ready(tiny(1))
    inductor.build(first, tmp_path, shapes=ANY_SIZE, device=CPU, dtype=torch.float32, frozen=True)
    assert_equal(inductor.load(tmp_path, device=CPU), first)
    with pytest.raises(ValueError, match="weights compiled in"):
        inductor.load(tmp_path, device=CPU, swapped=second)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_half_precision_packages_agree_with_eager_in_float32(tmp_path):
    network = tiny(0)
    inductor.build(ready(network, torch.bfloat16), tmp_path, shapes=ANY_SIZE, device=CPU,
                   dtype=torch.bfloat16, frozen=False)
    run = inductor.load(tmp_path, device=CPU)
    truth = EagerPredictor(network, num_classes=len(CLASSES), device=CPU, dtype=torch.float32)
    assert_equal(run, ready(network, torch.bfloat16), tolerance=HALF, sizes=SIZES[:3], dtype=torch.bfloat16)
    with torch.inference_mode():
        (found,) = gate.compare([lambda x: run(x.bfloat16())], truth.logits,
                                [images(2, 64, 96, seed=seed) for seed in range(3)])
    assert found.outside >= gate.FLOOR and found.decided > 0.2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MODELS)
def test_packages_of_all_models_equal_eager_with_any_weights(name, tmp_path):
    first, second = ready(model(name, 0)), ready(model(name, 1))
    inductor.build(first, tmp_path, shapes=ANY_SIZE, device=CPU, dtype=torch.float32, frozen=False)
    sizes = sizes_from(least_px(name), SIZES)
    assert_equal(inductor.load(tmp_path, device=CPU), first, sizes=sizes)
    assert_equal(inductor.load(tmp_path, device=CPU, swapped=second), second, sizes=sizes)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compile_command_builds_checks_and_reopens(tmp_path, capsys):
    saved = checkpoint.load(save(tmp_path / "tiny.pt", 0))
    network = model("deeplabv2", classes=3)
    checkpoint.save(tmp_path / "best.pt", model=network.state_dict(), classes=saved["classes"],
                    architecture={"name": "deeplabv2", "backbone": "resnet18", "output_stride": 16})
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    pixels = (images(1, 90, 120)[0] * 40 + 120).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "photos" / "sub" / "one.png")
    cli.main(["compile", "--checkpoint", str(tmp_path / "best.pt"), "--out", str(tmp_path / "engine"),
              "--backend", "inductor",
              "--precision", "fp32", "--sample", str(tmp_path / "photos"), "--device", "cpu",
              "--shapes", "1x32x32", "2x64x64", "4x128x128"])
    assert "agree with eager" in capsys.readouterr().err
    record, _ = records.read(tmp_path / "engine")
    assert (
        record.agreement.pixels == 90 * 120
        and record.agreement.outside == 1.0
        and record.shapes.largest == (4, 128, 128)
    )
    teacher = open_predictor(tmp_path / "engine", load=load_network, device=CPU)
    image = torch.from_numpy(normalised(pixels)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        assert relative_error(teacher.logits(image), network(image)) < 1e-4
        crop = image[:, :, 3:70, 5:90]
        assert relative_error(teacher.logits(crop), network(crop)) < 1e-4
        assert relative_error(teacher.logits(image.contiguous()), network(image)) < 1e-4
    assert teacher.agreement.pixels == 2 * 90 * 120 + 67 * 85 and str(teacher.identity).endswith(
        "-inductor-frozen-fp32"
    )


def test_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="C\\+\\+ compiler"):
        compile_predictor(save(tmp_path / "best.pt", 0), tmp_path / "x", load=load, device=CPU,
                          backend="inductor", precision="fp32")
