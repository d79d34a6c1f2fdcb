"""The recipes for Kubernetes and SkyPilot: read as their programs read them, and run on this machine as if on two nodes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api import models
from support import ROOT, SMALL, free_port

from nanogpt.config import TrainConfig
from nanogpt.run import checkpoint

KUBERNETES, SKYPILOT = ROOT / "recipes" / "kubernetes.yaml", ROOT / "recipes" / "skypilot.yaml"


def documents():
    return {document["kind"]: document for document in yaml.safe_load_all(KUBERNETES.read_text())}


@pytest.mark.parametrize("kind", ["TrainingRuntime", "TrainJob"])
def test_kubeflow_knows_every_field(kind):
    document = documents()[kind]
    read = getattr(models, f"TrainerV1alpha1{kind}").from_dict(document)
    assert read.to_dict() == document  # a field that it does not know would be missing


def test_the_job_and_its_runtime_fit_each_other():
    runtime, job = documents()["TrainingRuntime"], documents()["TrainJob"]["spec"]
    assert job["runtimeRef"] == {
        "apiGroup": runtime["apiVersion"].partition("/")[0],
        "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == node["name"] == "node"  # the names by which Kubeflow finds the trainer
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert job["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == str(job["trainer"]["numProcPerNode"])


def test_skypilot_knows_every_field():
    """The fields are those of SkyPilot 0.14's schema, which is too large a package to install for this."""
    task = yaml.safe_load(SKYPILOT.read_text())
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "file_mounts", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "use_spot", "job_recovery"}
    assert set(task["resources"]["job_recovery"]) == {"max_restarts_on_errors"}
    assert re.fullmatch(r"\w+:\d+", task["resources"]["accelerators"]) and type(task["num_nodes"]) is int
    for mount in task["file_mounts"].values():
        assert set(mount) == {"source", "mode"} and mount["mode"] in ("COPY", "MOUNT", "MOUNT_CACHED")
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("recipe", [KUBERNETES, SKYPILOT])
def test_what_it_names_exists(recipe):
    text = recipe.read_text()
    for path in re.findall(r"\b(?:config|data)/\w+(?:/\w+)?\.py|(?<!-)\btrain\.py|constraints\.txt", text):
        assert (ROOT / path).is_file()
    for name in re.findall(r"--(\w+)=/volume|--(init_from)=", text):
        assert hasattr(TrainConfig, "".join(name))


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """A folder like the one in which the recipes run, and its volume."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    for name in ("train.py", "nanogpt"):
        os.symlink(ROOT / name, tmp_path / name)
    (tmp_path / "config").mkdir()
    (tmp_path / "volume").mkdir()
    os.symlink(tiny.parent, tmp_path / "volume" / "data")
    return tmp_path


def configure(place, **more):
    """Write the config file that the recipes name, for a tiny model."""
    given = dict(arg.removeprefix("--").split("=") for arg in SMALL) | more
    words = {name: repr(value) if name in ("dataset", "device") else value for name, value in given.items()}
    lines = [f"{name} = {value}\n" for name, value in words.items()]
    (place / "config" / "train_gpt2.py").write_text("".join(lines))


def start(nodes, place):
    """The processes of two nodes."""
    port, started = free_port(), []
    for node in range(2):
        command, env = nodes(place, node, port)
        with open(place / f"log-{node}.txt", "a") as log:
            to = dict(stdout=log, stderr=log, start_new_session=True)
            started.append(subprocess.Popen(command, env=os.environ | env, **to))
    return started


def on_kubernetes(place, node, port):
    """What the container of a node runs, and the variables that Kubeflow's torch policy gives it."""
    trainer = documents()["TrainJob"]["spec"]["trainer"]
    command = [word.replace("/volume", str(place / "volume")) for word in trainer["command"] + trainer["args"]]
    address = dict(PET_MASTER_ADDR="127.0.0.1", PET_MASTER_PORT=str(port))
    return command, address | dict(PET_NNODES="2", PET_NODE_RANK=str(node), PET_NPROC_PER_NODE="1")


def on_skypilot(place, node, port):
    """What a node runs, and the variables that SkyPilot gives it."""
    text = yaml.safe_load(SKYPILOT.read_text())["run"].replace("/volume", str(place / "volume"))
    (place / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    if not (torchrun := place / ".venv" / "bin" / "torchrun").exists():
        os.symlink(Path(sys.executable).with_name("torchrun"), torchrun)
    variables = dict(NODE_IPS="127.0.0.1\n127.0.0.1", NUM_NODES="2", NODE_RANK=str(node), NUM_GPUS_PER_NODE="1")
    command = ["bash", "-c", text.replace("29500", str(port))]
    return command, {f"SKYPILOT_{name}": value for name, value in variables.items()}


@pytest.mark.parametrize("nodes", [on_kubernetes, on_skypilot])
def test_nodes_that_are_told_to_end_save_and_resume_when_they_start_again(nodes, place):
    configure(place, max_iters=100000, eval_interval=100000)
    first, end = start(nodes, place), time.monotonic() + 300
    while "iter 3:" not in (said := (place / "log-0.txt").read_text()):
        assert time.monotonic() < end and all(node.poll() is None for node in first), said
        time.sleep(0.1)
    for node in first:  # as a node that is taken away: all processes of its container
        os.killpg(node.pid, signal.SIGTERM)
    assert all(node.wait(120) for node in first)
    out_dir = next((place / "volume").rglob("manifest.json")).parents[2]
    saved = checkpoint.newest(out_dir)
    assert saved.step >= 3
    configure(place, max_iters=saved.step + 2)
    assert [node.wait(300) for node in start(nodes, place)] == [0, 0], (place / "log-0.txt").read_text()
    assert f"resuming {saved.folder} at step {saved.step}" in (place / "log-0.txt").read_text()
    assert checkpoint.newest(out_dir).step == saved.step + 2
