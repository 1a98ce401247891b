"""No run is lost: checkpoints in the background, checksums, full disks, locks, dead ranks, random kills."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_prx as T
from data.preflight import read_metrics

RUN = ("--track micro --repa 0 --ema 0.99 --hidden 32 --heads 2 --depth 2 --batch 16 --samples 0 --sample-steps 2 --compile off "
       "--compute fp32").split()
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*flags, code=0):
    assert T.main([*RUN, *map(str, flags)]) == code


def losses(name):
    return [x for record in read_metrics(Path("logs") / name) for x in record.get("losses", [])]


def weights(name):
    return load_file(f"logs/{name}/transformer/diffusion_pytorch_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def start(*flags, ranks=1):
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    return subprocess.Popen([*launch, T.__file__, *RUN, *map(str, flags)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


# --- checkpoints

@pytest.mark.parametrize("damage", ["flip", "truncate", "half-written", "no state"])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_is_used(in_tmp, capsys, damage):
    run("--steps", 8, "--name", "whole")
    for stop in (3, 5):
        run("--steps", 8, "--name", "cut", "--stop-after", stop)
    newest = Path("logs/cut/checkpoint/step-00000005")
    file = newest / "rank-0.safetensors"
    data = file.read_bytes()
    if damage == "flip":  # in the middle of the weights: the file still opens
        file.write_bytes(data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:])
    elif damage == "truncate":
        file.write_bytes(data[:-100])
    elif damage == "half-written":
        newest.rename(newest.with_name(newest.name + ".tmp"))
    else:
        (newest / "state.json").unlink()
    run("--steps", 8, "--name", "cut")
    said = capsys.readouterr().out
    assert "checkpoint step-00000005" in said and "is passed over" in said and "checkpoint/step-00000003 at step 3" in said
    assert same(weights("whole"), weights("cut"))


def test_the_snapshot_is_of_its_step_although_training_goes_on(in_tmp, monkeypatch):
    """The writer is held back until two more steps are made: what it writes is still what it was at its step."""
    release, write = threading.Event(), T.Checkpoints.write
    monkeypatch.setattr(T.Checkpoints, "write", lambda self, state: (release.wait(), write(self, state)))
    model = torch.nn.Linear(64, 64)
    optimizer = T.MuonAdamW(model.named_parameters(), T.Config())
    checkpoints = T.Checkpoints(Path("logs/r"), T.World(), None)

    def step():
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.accumulate()
        optimizer.step()

    step()
    then = {k: v.clone() for k, v in optimizer.state_dict().items()}
    checkpoints.save({"": optimizer}, dict(step=1), 0.0)
    step()
    step()
    assert not Path("logs/r/checkpoint/step-00000001").exists()
    release.set()
    checkpoints.wait()
    written = load_file("logs/r/checkpoint/step-00000001/rank-0.safetensors")
    assert same(written, then) and not same(written, optimizer.state_dict())


def test_milestones_are_kept_for_good(in_tmp):
    world, log = T.World(), T.Log(Path("logs/r"), T.World())
    model = torch.nn.Linear(4, 4)
    optimizers = {"": T.MuonAdamW(model.named_parameters(), T.Config())}
    checkpoints = T.Checkpoints(Path("logs/r"), world, log, milestone_hours=1.0)
    for step, elapsed in enumerate((600, 3700, 4000, 5000, 7300, 7400, 7500), 1):
        checkpoints.save(optimizers, dict(step=step), elapsed, wait=True)
    assert [int(p.name[5:]) for p in sorted(Path("logs/r/checkpoint").iterdir())] == [2, 5, 6, 7]


def test_a_full_disk_loses_nothing_and_training_goes_on(in_tmp, monkeypatch, capsys):
    """Writing fails in the middle of the run, then works again."""
    run("--steps", 10, "--name", "whole")
    save, calls = T.save_file, []

    def full(tensors, path, **kw):
        if "checkpoint" in str(path):
            calls.append(1)
            if 2 <= len(calls) <= 3:
                Path(path).write_bytes(b"some")
                raise OSError(28, "No space left on device")
        return save(tensors, path, **kw)

    monkeypatch.setattr(T, "save_file", full)
    run("--steps", 10, "--name", "r", "--checkpoint-minutes", 1e-9)
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 2 and "training goes on" in said
    assert same(weights("whole"), weights("r")) and len(calls) >= 10
    assert not list(Path("logs/r/checkpoint").glob("*.tmp"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_is_really_full_leaves_the_old_checkpoint_valid(in_tmp, capsys, monkeypatch):
    folder = in_tmp / "logs"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    step = T.MuonAdamW.step

    def fills(self, *a, **k):  # somebody else fills the disk while we train
        file = os.open(folder / "ballast", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        with contextlib.suppress(OSError):
            while True:
                os.write(file, bytes(10000))
        os.close(file)
        return step(self, *a, **k)

    try:
        run("--steps", 9, "--name", "r", "--stop-after", 3)
        monkeypatch.setattr(T.MuonAdamW, "step", fills)
        run("--steps", 9, "--name", "r", "--stop-after", 5, code=1)
        said = capsys.readouterr()
        assert "cannot write its part of checkpoint step-00000005" in said.out
        assert "stopped at step 5, whose checkpoint could not be written" in said.err
        assert T.find_checkpoint(Path("logs/r"))[0].name == "step-00000003"
        monkeypatch.setattr(T.MuonAdamW, "step", step)
        run("--steps", 9, "--name", "r", code=2)
        assert "logs" in capsys.readouterr().err  # pre-flight: the disk is full
        (folder / "ballast").unlink()
        run("--steps", 9, "--name", "r")
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def test_two_runs_in_one_folder_are_refused(in_tmp):
    first = start("--steps", 100000, "--name", "r")
    while not read_metrics(Path("logs/r")):
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    before = Path("logs/r/metrics.jsonl").read_text()
    second = start("--steps", 100000, "--name", "r", "--resume", "never")
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 2 and "another process is training in logs/r" in said
    assert Path("logs/r/metrics.jsonl").read_text().startswith(before)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGINT


# --- gradients

def test_spikes_are_skipped_and_counted():
    model = torch.nn.Linear(8, 8)
    optimizer = T.MuonAdamW(model.named_parameters(), T.dataclasses.replace(T.Config(), skip_spikes=5.0, clip=0.0))
    for step in range(30):
        for p in model.parameters():
            p.grad = torch.full_like(p, 100.0 if step == 20 else 1.0 + 0.01 * step)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.accumulate()
        optimizer.step()
        moved = not all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert moved == (step != 20)
    assert optimizer.skipped.item() == 1 and optimizer.typical.item() < 20


@pytest.mark.parametrize("coefficients, worst", [(T.CLASSIC, 0.35), (T.POLAR, 0.15)])
def test_newton_schulz_brings_singular_values_to_one(coefficients, worst):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(3, 48, 96, generator=g)
    values = torch.linalg.svdvals(T.orthogonalize(X, 5, coefficients))
    assert (values - 1).abs().max() < worst
    flat = torch.linalg.svd(X)[0][:, :, :48] * torch.logspace(0, -2, 48)[:, None] @ torch.randn(3, 48, 96, generator=g)
    classic, polar = (torch.linalg.svdvals(T.orthogonalize(flat, 5, k)).min() for k in (T.CLASSIC, T.POLAR))
    assert polar > 0.5 * classic  # small directions are not left behind
    values = torch.linalg.svdvals(T.orthogonalize(torch.randn(3, 128, 384, generator=g).bfloat16(), 5, coefficients
                                                  ).float())
    assert values.max() < 1.2  # no value grows because BF16 has moved it out of the interval


def test_split_qkv_orthogonalises_each_part():
    model = T.PRX(in_channels=3, patch_size=4, context_in_dim=8, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1)
    model.initialize(0)
    c = T.dataclasses.replace(T.Config(), split_qkv=True, ns="classic", lr=1.0, clip=0.0, ema=0.0, momentum=0.0)
    optimizer = T.MuonAdamW(model.named_parameters(), c)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    g = torch.Generator().manual_seed(1)
    grads = {}
    for n, p in model.named_parameters():
        p.grad = grads[n] = torch.randn(p.shape, generator=g)
    optimizer.accumulate()
    optimizer.step()
    name = "blocks.0.attention.img_qkv_proj.weight"
    update = (before[name] - dict(model.named_parameters())[name]) / (0.2 * 32 ** 0.5)
    scale = min(1.0, 1.0)
    for part, grad in zip(update.chunk(3), grads[name].chunk(3)):
        assert torch.allclose(part, T.orthogonalize(grad[None] * scale)[0], atol=1e-4)


def test_64_micro_batches_are_one_batch(in_tmp):
    run("--batch", 64, "--steps", 6, "--name", "one")
    run("--batch", 64, "--steps", 6, "--accumulate", 64, "--name", "many")
    assert np.allclose(losses("one"), losses("many"), rtol=1e-5)
    one, many = weights("one"), weights("many")
    worst = max(((one[k] - many[k]).norm() / one[k].norm().clamp(min=1e-3)).item() for k in one)
    assert worst < 1e-3, worst  # AdamW's first steps divide small differences by small gradients


# --- ranks

COUNTING = """
import json, os, sys
sys.path.insert(0, {root!r})
import train_prx as T
real, counted = T.orthogonalize, []
def counting(G, *a):
    counted.append(len(G))
    return real(G, *a)
T.orthogonalize = counting
owned = []
init = T.MuonAdamW.__init__
def spy(self, *a):
    init(self, *a)
    owned.append(self.layout)
T.MuonAdamW.__init__ = spy
code = T.main(sys.argv[1:])
json.dump(dict(counted=sum(counted), layout=owned[0]), open(f"count-{{os.environ.get('RANK', 0)}}.json", "w"))
sys.exit(code)
"""


SLOW = [pytest.param(ranks, ns, marks=pytest.mark.slow) for ranks, ns in (
    (2, "classic"), (4, "polar"), (8, "classic"), (8, "polar"))]


@pytest.mark.parametrize("ranks, ns", [(2, "polar"), (4, "classic"), *SLOW])
def test_any_number_of_ranks_follows_one_and_orthogonalises_each_matrix_once(in_tmp, ranks, ns):
    """50 steps; 2 blocks have 14 matrices of Muon's, which neither 4 nor 8 ranks divide."""
    script = in_tmp / "counting.py"
    script.write_text(COUNTING.format(root=str(T.ROOT)))
    flags = ["--steps", "50", "--ns", ns, "--lr", "1e-3", "--lr-adamw", "1e-3", "--modulation", "muon"]
    for n in (1, ranks):
        launch = [sys.executable] if n == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={n}"]
        done = subprocess.run([*launch, str(script), *RUN, *flags, "--name", f"n{n}"], capture_output=True, text=True,
                              env=ENVIRONMENT, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        counts = [json.loads(Path(f"count-{r}.json").read_text()) for r in range(n)]
        assert sum(c["counted"] for c in counts) == 50 * 14
        names = [name for layout in counts[0]["layout"] for name in layout]
        assert len(names) == len(set(names)) and len(counts[0]["layout"]) == n
    assert np.allclose(losses("n1"), losses(f"n{ranks}"), rtol=1e-4)
    assert all(torch.allclose(a, weights(f"n{ranks}")[k], atol=2e-3) for k, a in weights("n1").items())


def test_bf16_on_the_wire_gives_what_one_rank_computes(in_tmp):
    flags = [f for f in RUN if f not in ("--compute", "fp32")] + ["--compute", "bf16", "--steps", "10"]
    assert T.main([*flags, "--name", "one"]) == 0
    assert T.main([*flags, "--batch", "24", "--name", "same"]) == 0 and losses("one") != losses("same")
    for wire in ("fp32", "bf16"):  # of the gradients; the weights are BF16 in both
        process = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3",
                                  T.__file__, *flags, "--batch", "24", "--wire", wire, "--name", wire],
                                 capture_output=True, text=True, env=ENVIRONMENT)
        assert process.returncode == 0, process.stderr[-3000:]
        assert np.allclose(losses("same"), losses(wire), rtol=2e-2)
    assert losses("fp32")[0] == losses("bf16")[0] and losses("fp32") != losses("bf16")


def test_a_dead_rank_ends_the_others_and_torchrun_starts_the_run_again(in_tmp):
    run("--steps", 40, "--name", "whole")
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                "--max-restarts=2", T.__file__, *RUN, "--steps", "40", "--name", "r",
                                "--checkpoint-minutes", "0.001"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env=ENVIRONMENT)
    while not list(Path("logs").glob("r/checkpoint/step-????????")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert "resumed from logs/r/checkpoint" in said and "cannot meet" not in said  # at the first restart
    assert np.allclose(losses("whole")[-5:], losses("r")[-5:], rtol=1e-3)


@pytest.mark.parametrize("peer", ["os._exit(9)", "time.sleep(1000)"], ids=["dead", "hung"])
def test_a_rank_that_loses_its_peer_says_so_and_writes_nothing(in_tmp, peer):
    script = in_tmp / "ranks.py"
    script.write_text(f"import sys, os, time, datetime\nsys.path.insert(0, {str(T.ROOT)!r})\nimport train_prx as T\n"
                      "T.World.TIMEOUT = datetime.timedelta(seconds=15)\n"
                      "world = T.setup_world()\nworld.agree(1.0)\n"
                      f"if world.rank == 1: {peer}\n"
                      "try:\n    world.agree(1.0)\nexcept T.TrainingFailed as error:\n    print(error)\n    os._exit(1)\n")
    from test_preflight import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        environment = ENVIRONMENT | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE="2")
    ranks = [subprocess.Popen([sys.executable, str(script)], env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    said = ranks[0].communicate(timeout=120)[0]
    ranks[1].kill()
    assert ranks[0].returncode == 1 and "rank 0 has lost its peers" in said and "the last checkpoint stands" in said


@pytest.mark.parametrize("before, after", [(4, 1), (4, 3)])
def test_a_checkpoint_of_four_ranks_continues_on_fewer(in_tmp, before, after):
    flags = ["--steps", 8, "--batch", 24]
    run(*flags, "--name", "whole")
    for name, ranks, stop in (("r", before, 4), ("r", after, 0)):
        process = start(*flags, "--name", name, "--stop-after", stop, ranks=ranks)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
    assert np.allclose(losses("whole"), losses("r"), rtol=1e-4)


# --- random kills

def test_random_kills_change_nothing(in_tmp):
    """A few here; `python tests/fault_harness.py` makes fifty and more, with ranks."""
    from fault_harness import harness

    told = harness(in_tmp, kills=4, steps=60, ranks=1, seed=0)
    assert told["identical"] and told["kills"] == 4 and told["steps_logged"] >= 60
