"""Regional compilation: which parts are compiled, and that a compiled run is the run of the plain network."""

import pytest
import torch
from test_trainer import tiny, trainer, weights_of
from torch._dynamo.utils import counters

from stpp import device
from stpp.dataset import index
from stpp.errors import UserError
from stpp.models.build import build_model
from stpp.training import compiled

NETWORKS = [("deeplabv3plus", "resnet18", 16), ("pspnet", "resnet50", 8), ("deeplabv2", "resnet101", 8),
            ("deeplabv3plus", "efficientnet-lite0", 16), ("dpt", "dinov2-small", None)]


@pytest.mark.parametrize("name,backbone,output_stride", NETWORKS, ids=lambda value: str(value))
def test_regions_hold_nearly_all_weights_once(name, backbone, output_stride):
    network = build_model(name, backbone, 6, *([output_stride] if output_stride else []))
    names = list(network.state_dict())
    regions = [list(region.parameters()) for region in network.regions()]
    held = [weight for region in regions for weight in region]
    assert len({id(weight) for weight in held}) == len(held), "a region lies in another"
    total = sum(weight.numel() for weight in network.parameters())
    assert sum(weight.numel() for weight in held) > 0.9 * total
    compiled.compile_regions(network)
    assert list(network.state_dict()) == names


def test_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(compiled, "has_cpp_compiler", lambda: False)
    with pytest.raises(UserError, match=r"^--train.compile needs a C\+\+ compiler; install g\+\+, or .*$"):
        compiled.compile_regions(torch.nn.Identity())
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert not device.has_cpp_compiler()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_run_resumes_to_the_same_weights(synthetic_index, tmp_path):
    """It follows the plain one, and validates uncompiled."""
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]

    def scored(network: torch.nn.Module) -> float:
        before = counters["stats"]["unique_graphs"]
        with torch.no_grad():
            assert network(torch.zeros(1, 3, 47, 61)).isfinite().all()
        assert counters["stats"]["unique_graphs"] == before
        return 30.0

    def fails(network: torch.nn.Module) -> float:
        if (tmp_path / "broken" / "last.pt").exists():
            raise RuntimeError("power cut")
        return scored(network)

    torch._dynamo.reset()
    counters.clear()
    whole = trainer(tiny(compile=True), samples, tmp_path / "whole", scored)
    whole.run()
    num_graphs = counters["stats"]["unique_graphs"]
    assert 5 <= num_graphs <= len(whole.step.network.regions()) and not counters["graph_break"]
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tiny(compile=True), samples, tmp_path / "broken", fails).run()
    trainer(tiny(compile=True), samples, tmp_path / "broken", scored).run()
    for name in ("last.pt", "best.pt", "third-1.pt"):
        ours, theirs = weights_of(tmp_path / "broken" / name), weights_of(tmp_path / "whole" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name

    plain = trainer(tiny(), samples, tmp_path / "plain", None)
    again = trainer(tiny(compile=True), samples, tmp_path / "again", None)
    losses = [[ours.train_step(passes)[0].item() for passes, _ in ours._passes()] for ours in (plain, again)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4) and losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.06)  # rounding grows: see FOLLOWS in test_trainer
