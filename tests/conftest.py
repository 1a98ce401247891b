"""What the tests share: small shards of scenes, tiny runs in a folder of their own, and how to look at them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never download
torch.set_num_threads(1)  # the tests' models are tiny: a second thread only waits

import train_prx as T  # noqa: E402

SCRIPT = ROOT / "train_prx.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = ("--track micro --repa 0 --ema 0.99 --hidden 32 --heads 2 --depth 2 --batch 16 --samples 0 --sample-steps 2 "
        "--compile off --compute fp32").split()


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory):
    """2,048 training and 64 held-out scenes of the micro track, as data/scenes.py writes them."""
    from data.scenes import write_track

    folder = tmp_path_factory.mktemp("scenes") / "micro"
    write_track("micro", folder, n=2048, eval_n=64, processes=1)
    return folder


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs write to logs/ under the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shards(in_tmp, scene_folder):
    """A current folder with shards/micro, so that a run needs no --data."""
    (in_tmp / "shards").mkdir()
    (in_tmp / "shards/micro").symlink_to(scene_folder)
    return in_tmp


def run(*flags, code=0):
    """A tiny run in this process."""
    assert T.main([*TINY, *map(str, flags)]) == code


def shell(*args, **kw):
    """A Python process, to its end."""
    kw = dict(capture_output=True, text=True, timeout=300, env=ENVIRONMENT) | kw
    return subprocess.run([sys.executable, *map(str, args)], **kw)


def torchrun(ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def start(*flags, ranks=1, script=SCRIPT, tiny=True, torchrun_flags=(), **kw):
    """A training process that goes on; its output is in .stdout."""
    launch = [*torchrun(ranks), *torchrun_flags] if ranks > 1 else []
    command = [sys.executable, *launch, script, *(TINY if tiny else []), *flags]
    kw = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT) | kw
    return subprocess.Popen([str(x) for x in command], **kw)


def weights(name):
    return load_file(f"logs/{name}/transformer/diffusion_pytorch_model.safetensors")


def metrics(name):
    return T.read_metrics(Path("logs") / name)


def losses(name):
    return [x for record in metrics(name) for x in record.get("losses", [])]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
