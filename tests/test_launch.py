"""Launch scripts: their commands, the Kubernetes manifest, and two machines simulated by two torchrun
agents."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import label_cases as cases
from cli_cases import assert_accepted, refused
from conftest import torchrun
from run_cases import TINY
from stpp import checkpoint, cli
from stpp.label import rows
from stpp.models.build import build_model

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
TRAIN = ["--recipe", "a recipe.toml", "--data.root", "it's here", "--out", "run"]
BARE = {key: value for key,
        value in os.environ.items() if not key.startswith(("SLURM_", "PET_"))
        and key not in ("HOST", "NPROC", "CUDA_VISIBLE_DEVICES")}


def dry(script: str, *args: str, **variables: str) -> list[str]:
    """Returns the words of the command that a script would start."""
    ran = subprocess.run(["bash", f"launch/{script}", "--dry-run", *args], env=BARE | variables, cwd=ROOT,
                         capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0, ran.stderr
    return shlex.split(ran.stdout)


def flag(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize(("script", "command"), [("train.sh", "train"), ("label.sh", "label")])
def test_one_machine_starts_a_process_for_each_gpu(script, command):
    words = dry(script, *TRAIN, NPROC="3", PYTHON="/some/python")
    assert words[:3] == ["/some/python", "-m", "torch.distributed.run"]
    assert flag(words, "--nproc-per-node") == "3" and "--standalone" in words
    assert words[-len(TRAIN) - 3:] == ["-m", "stpp", command, *TRAIN]  # quoting survives
    assert int(flag(dry(script, *TRAIN), "--nproc-per-node")) >= max(1, torch.cuda.device_count())


@pytest.mark.parametrize(("listing", "visible", "count"), [
    ("GPU 0: NVIDIA H100 (UUID: a)\nGPU 1: NVIDIA H100 (UUID: b)\n", None, 2),
    ("GPU 0: A100 (UUID: a)\n  MIG 1g.5gb Device 0: (UUID: c)\n  MIG 1g.5gb Device 1: (UUID: d)\n", None, 1),
    ("GPU 0: a\nGPU 1: b\nGPU 2: c\nGPU 3: d\n", "1,3", 2),
    ("NVIDIA-SMI has failed because\nit could not talk to the driver\n", None, 1),
])
def test_processes_are_counted_by_gpu(tmp_path, listing, visible, count):
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    (tmp_path / "list").write_text(listing)
    program.write_text(f"#!/bin/sh\ncat {shlex.quote(str(tmp_path / 'list'))}\n")
    program.chmod(0o755)
    words = dry("train.sh", *TRAIN, PATH=f"{program.parent}:{os.environ['PATH']}",
                **{"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    assert flag(words, "--nproc-per-node") == str(count)


def test_scripts_run_through_a_link(tmp_path):
    for script in ("train.sh", "label.sh", "multinode.sh"):
        link = tmp_path / script
        link.symlink_to(LAUNCH / script)
        ran = subprocess.run([link, "--dry-run", "label", *TRAIN], text=True, capture_output=True,
                             env=BARE | {"HOST": "host0", "NNODES": "2"}, timeout=30)
        assert ran.returncode == 0 and "torch.distributed.run" in ran.stdout, ran.stderr


def test_several_machines_meet_and_may_leave_and_return():
    words = dry("multinode.sh", "label", *TRAIN, HOST="host0", NNODES="1:8", NPROC="8", JOB="j7")
    assert [
        flag(words, name)
        for name in (
            "--nnodes",
            "--nproc-per-node",
            "--rdzv-backend",
            "--rdzv-endpoint",
            "--rdzv-id",
            "--max-restarts",
        )
    ] == ["1:8", "8", "c10d", "host0:29500", "j7", "3"]
    assert words[-len(TRAIN) - 3:] == ["-m", "stpp", "label", *TRAIN]


def test_slurm_gives_every_start_its_own_rendezvous():
    given = {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NUM_NODES": "4",
             "SLURM_GPUS_ON_NODE": "8"}
    words = dry("slurm.sbatch", "train", *TRAIN, **given)
    assert [flag(words, name) for name in ("--nnodes", "--nproc-per-node", "--rdzv-id")] == ["4", "8", "42-2"]
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --requeue" in text and "#SBATCH --signal=B:TERM@" in text and "scontrol requeue" in text


@pytest.mark.parametrize("args", [["train.sh"], ["multinode.sh"], ["multinode.sh", "evaluate"],
                                  ["multinode.sh", "train"]],
                         ids=" ".join)
def test_scripts_name_missing_arguments(args):
    ran = subprocess.run(["bash", f"launch/{args[0]}", *args[1:]], env=BARE, cwd=ROOT, capture_output=True,
                         text=True, timeout=30)
    assert ran.returncode != 0 and ("launch/" in ran.stderr) and "torch.distributed" not in ran.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    if script.name != "common.sh":
        assert os.access(script, os.X_OK) or script.suffix == ".sbatch"
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True,
                             timeout=60)
    assert checked.returncode == 0, checked.stdout


def documents() -> dict[str, dict]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (stpp[dev])")
    return {one["metadata"]["name"]: one
            for one in yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())}


def assert_taken(words: list[str], monkeypatch) -> None:
    """Asserts that the command line accepts the words after `-m stpp`."""
    name, *args = words[words.index("stpp") + 1:]
    monkeypatch.chdir(ROOT)
    assert_accepted(name, args, monkeypatch)


def test_manifest_trains_elastically(monkeypatch):
    job = documents()["stpp-train"]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    elastic, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert (
        elastic["rdzvBackend"] == "c10d"
        and elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    )
    assert elastic["maxRestarts"] > 0 and isinstance(job["spec"]["nprocPerNode"], str)
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    assert int(job["spec"]["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["terminationGracePeriodSeconds"] > 30  # torchrun kills its workers after 30 s
    batch, processes = int(flag(container["args"], "--train.batch-global")), int(job["spec"]["nprocPerNode"])
    for nodes in range(elastic["minReplicas"], elastic["maxReplicas"] + 1):
        # batch norm needs two images
        assert batch % (nodes * processes) == 0 and batch // (nodes * processes) >= 2
    assert_taken(container["command"] + container["args"], monkeypatch)


def test_manifest_labels_every_part_once(monkeypatch):
    found = documents()
    assert found.keys() == {"stpp-train", "stpp-list", "stpp-label"}
    job = found["stpp-label"]["spec"]
    assert job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    (script,) = container["args"]
    parts = []
    for index in range(job["completions"]):
        printed = subprocess.run(["bash", "-c", script.replace("exec torchrun", "printf '%s\\n'")],
                                 capture_output=True, text=True,
                                 env=BARE | {"JOB_COMPLETION_INDEX": str(index)}, check=True, timeout=30)
        words = printed.stdout.splitlines()
        parts.append(flag(words, "--part"))
    assert parts == [f"{i}/{job['completions']}" for i in range(1, job["completions"] + 1)]
    assert_taken(words, monkeypatch)
    (lister,) = found["stpp-list"]["spec"]["template"]["spec"]["containers"]
    assert "--list-only" in lister["args"] and "limits" not in lister.get("resources", {})
    assert set(lister["args"]) - {"--list-only"} <= set(words)  # the same source and output
    assert_taken(lister["command"] + lister["args"], monkeypatch)


def test_torchrun_closing_report_names_the_error(tmp_path):
    ran = torchrun(2, "-m", "stpp", "train", "--data.root", str(tmp_path / "none"), "--out",
                   str(tmp_path / "run"))
    assert ran.returncode != 0
    _, _, cause = ran.stderr.partition("Root Cause")
    assert f"UserError: --data.root {tmp_path / 'none'}: no such folder" in cause and "exitcode  : 2" in cause
    assert "Traceback" not in cause
    # both ranks found it
    assert len([line for line in ran.stderr.splitlines() if line.startswith("stpp: ")]) == 1


def test_unwritable_error_report_keeps_the_exit_code(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    assert refused(capsys, "train", "--data.root", tmp_path / "none", "--out",
                   tmp_path / "run").endswith("folder")


def test_error_report_that_is_cut_off_is_none(tmp_path, monkeypatch):
    """torchrun ends a rank that is recording its error, and cannot read a part of it."""
    def cut_off(data, fp):
        fp.write("{")
        raise KeyboardInterrupt

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr("torch.distributed.elastic.multiprocessing.errors.error_handler.json.dump", cut_off)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["train", "--data.root", str(tmp_path / "none"), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "error.json").exists()


@pytest.mark.parametrize("name", ["stpp-train", "stpp-list", "stpp-label"])
def test_manifest_mounts_have_volumes(name):
    spec = documents()[name]["spec"]
    pod = (spec["pytorchReplicaSpecs"]["Worker"] if name == "stpp-train" else spec)["template"]["spec"]
    mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def machines(folder: Path, *args: str):
    """Returns a function that starts a machine: a torchrun agent of two that meet on loopback. All are killed
    at the end.

    Both have the address of the rendezvous, so the first must hold the port before the other starts: the
    other must not become the host.
    """
    variables = os.environ | {"HOST": "127.0.0.1", "PORT": str(free_port()), "NNODES": "2", "NPROC": "1",
                              "PYTHON": sys.executable,
                              "JOB": folder.name, "OMP_NUM_THREADS": "1", "PET_LOCAL_ADDR": "127.0.0.1",
                              "GLOO_SOCKET_IFNAME": "lo"}
    started: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        with open(folder / f"machine-{len(started)}.log", "w") as log:
            started.append(subprocess.Popen(["bash", str(LAUNCH / "multinode.sh"), *args], env=variables,
                                            stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
        end = time.monotonic() + 60
        while len(started) == 1 and not listens(int(variables["PORT"])):
            assert time.monotonic() < end and started[0].poll() is None, logs(folder)
            time.sleep(0.1)
        return started[-1]

    try:
        yield start
    finally:
        for agent in started:
            kill(agent)


def listens(port: int) -> bool:
    """Returns True if a process of this machine listens on a port."""
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def kill(agent: subprocess.Popen) -> None:
    """Kills an agent and its workers together, like a machine that loses power."""
    if agent.poll() is not None:
        return
    for number in [agent.pid, *children(agent.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    agent.wait(timeout=30)


def children(parent: int) -> list[int]:
    """Lists the children of a process; torchrun gives its workers separate sessions."""
    try:
        return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("machine-*.log")))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "best.pt"
    checkpoint.save(path, model=build_model("deeplabv3plus", "resnet18", 4, 16).state_dict(),
                    classes=list("abcd"),
                    architecture={"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16})
    return path


@pytest.mark.dist
@pytest.mark.slow
def test_two_machines_label(teacher, tmp_path):
    source, out = cases.as_folder(tmp_path / "in", cases.good_files(12)), tmp_path / "out"
    with machines(tmp_path, "label", "--teacher", str(teacher), "--source", str(source), "--out", str(out),
                  "--tta", "none",
                  "--shard-size", "2", "--device", "cpu", "--backend", "eager") as start:
        agents = [start(), start()]
        assert [agent.wait(timeout=200) for agent in agents] == [0, 0], logs(tmp_path)
    assert json.loads((out / "summary.json").read_text())["images"] == 12
    assert len([row for row in rows.read_parts(out, "labels") if row["status"] == "ok"]) == 12


@pytest.mark.dist
@pytest.mark.slow
def test_two_machines_train_and_a_killed_one_returns(synthetic, synthetic_index, tmp_path):
    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(TINY)
    with machines(tmp_path, "train", "--recipe", str(recipe), "--method", "supervised",
                  "--train.supervised-epochs", "10",
                  "--device", "cpu", "--data.root", str(synthetic), "--data.index", str(synthetic_index),
                  "--out", str(out)) as start:
        first, second = start(), start()
        end = time.monotonic() + 150
        while not (out / "stages" / "1-supervised" / "last.pt").exists():
            assert time.monotonic() < end and first.poll() is None and second.poll() is None, logs(tmp_path)
            time.sleep(0.1)
        assert not (out / "results.json").exists(), "it was done before it could be disturbed"
        kill(second)
        time.sleep(2)
        second = start()
        assert [agent.wait(timeout=240) for agent in (first, second)] == [0, 0], logs(tmp_path)
    assert json.loads((out / "results.json").read_text())["stages"][0]["steps"] == 40
    assert "resuming from step" in logs(tmp_path)
