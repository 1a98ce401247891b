"""No run is lost: checkpoints, checksums, full and slow disks, signals, locks, dead and failing ranks, random kills."""

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, SCRIPT, TINY, losses, metrics, run, same, shell, start, torchrun, weights
from test_shards import LATENT, write_shards

import train_prx as T
from records.gpu_check import Training, processes, send

ranks_group = pytest.mark.xdist_group("ranks")


def driver(folder, body, name="driver.py"):
    """A program that changes train_prx before it runs it, on the rank that it is on."""
    (folder / name).write_text(
        f"import datetime, os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\nimport train_prx as T\n"
        f"rank = int(os.environ.get('RANK', 0))\n{body}\nif __name__ == '__main__':\n    sys.exit(T.main(sys.argv[1:]))\n")
    return folder / name


def finish(process, timeout=400):
    """What it said, to its end. Its workers hold its output open, so they have ended as well."""
    said, _ = process.communicate(timeout=timeout)
    return said


def wait_for_steps(name, process):
    while not losses(name):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def steps_on_disk(name):
    return [int(p.name[5:]) for p in sorted(Path(f"logs/{name}/checkpoint").glob("step-????????"))]


class Ticking:
    """A clock that goes on by a second whenever it is read: once a step."""

    def __init__(self, before=0.0):
        self.now = before

    def __call__(self):
        self.now += 1
        return self.now


# --- checkpoints

@pytest.mark.parametrize("damage", ["flip", "truncate", "half-written", "no state"])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_is_used(shards, capsys, damage):
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


def test_a_full_disk_loses_nothing_and_is_tried_again(shards, monkeypatch, capsys):
    """Writing fails twice in the middle of the run, then works; meanwhile heartbeats say since when there is none."""
    run("--steps", 14, "--name", "whole")
    write, tried, left = T.write_atomically, [], []

    def full(path, content):
        if "rank-0" in path.name:
            tried.append(int(path.parent.name[5:13]))
            left.extend(path.parents[1].glob("*.tmp"))  # nothing stays of a failed one, for a disk that is full
            if 2 <= len(tried) <= 3:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"some")
                raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(T, "write_atomically", full)
    monkeypatch.setattr(T, "Clock", Ticking)
    monkeypatch.setattr(T.Heartbeat, "EVERY", 0.0)
    monkeypatch.setattr(T, "CHECKPOINT_AGAIN", 2.0)
    run("--steps", 14, "--name", "r", "--checkpoint-minutes", 3 / 60)
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 2 and "training goes on" in said and "five minutes" in said
    first = tried[0]
    assert np.diff(tried[:6]).tolist() == [3, 2, 2, 3, 1] and tried[-1] == 14  # again after a failure; at the end always
    beats = {r["step"]: r["no_checkpoint_since"] for r in metrics("r") if "no_checkpoint_since" in r}
    assert [s for s, since in beats.items() if since is not None] == list(range(first + 4, first + 8))
    assert len({since for since in beats.values() if since is not None}) == 1 and beats[14] is None
    assert same(weights("whole"), weights("r")) and not left


def test_what_a_crash_left_half_written_is_not_kept(shards):
    """The last two complete checkpoints are."""
    run("--steps", 8, "--name", "r", "--stop-after", 3)
    shutil.copytree("logs/r/checkpoint/step-00000003", "logs/r/checkpoint/step-00000004.tmp")
    run("--steps", 8, "--name", "r", "--stop-after", 5)
    assert sorted(p.name for p in Path("logs/r/checkpoint").iterdir()) == ["step-00000003", "step-00000005"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_is_really_full_leaves_the_old_checkpoint_valid(shards, capsys, monkeypatch):
    folder = shards / "logs"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode:
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
        assert "checkpoint step-00000005 could not be written (rank 0: " in said.out
        assert "stopped at step 5, whose checkpoint could not be written" in said.err
        assert not list(Path("logs/r/checkpoint").glob("*.tmp"))
        (folder / "ballast").unlink()
        monkeypatch.setattr(T.MuonAdamW, "step", step)
        run("--steps", 9, "--name", "r")
        assert "resumed from logs/r/checkpoint/step-00000003" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", folder], check=True)
    run("--steps", 9, "--name", "r2")
    assert len(losses("r2")) == 9


def test_a_failed_export_does_not_lose_the_last_steps(shards, monkeypatch, capsys):
    run("--steps", 6, "--name", "whole")
    export = T.export_transformer

    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(T, "export_transformer", full)
    run("--steps", 6, "--name", "r", code=1)
    assert "the final weights could not be written" in capsys.readouterr().err and steps_on_disk("r") == [6]
    monkeypatch.setattr(T, "export_transformer", export)
    run("--steps", 6, "--name", "r")
    assert same(weights("whole"), weights("r")) and len(losses("r")) == 6


def test_the_clock_of_a_resumed_run_holds_the_processes_before_it(shards):
    run("--steps", 6, "--name", "r", "--stop-after", 2)
    with open("logs/r/metrics.jsonl", "a") as file:
        file.write(json.dumps(dict(elapsed=5000.0)) + "\n")  # the last heartbeat of a process that was killed
    run("--steps", 6, "--name", "r", "--stop-after", 4)
    run("--steps", 6, "--name", "r")
    first, second = (r["elapsed"] for r in metrics("r") if r.get("event") == "resume")
    assert 5000 < first < second < metrics("r")[-1]["elapsed"]
    assert metrics("r")[-1]["event"] == "finished" and 5000 < json.loads(
        Path("logs/r/run.json").read_text())["finished"]["elapsed"]
    state = json.loads((T.find_checkpoint(Path("logs/r"))[0] / "state.json").read_text())
    assert state["elapsed"] > 5000


def test_going_on_with_other_data_is_refused_with_both_hashes(shards, capsys):
    for name, first in (("a", 0), ("b", 100)):
        write_shards(shards / name, first=first)
    hashes = [T.read_index(shards / name)["sha256"] for name in "ab"]
    run("--steps", 8, "--name", "r", "--data", "a", "--stop-after", 2)
    shutil.rmtree("a")
    Path("b").rename("a")
    run("--steps", 8, "--name", "r", "--data", "a", code=2)
    err = capsys.readouterr().err
    assert all(h in err for h in hashes) and "choose another --name" in err and err.count("\n") == 1


# --- signals

def test_a_signal_inside_the_agreement_is_not_lost(shards, monkeypatch):
    """It arrives after this rank has said its values, before it has read the answer. A repeat would change nothing."""
    agree, calls = T.World.agree, []

    def signalled(self, *values):
        answer = agree(self, *values)
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    monkeypatch.setattr(T.World, "agree", signalled)
    run("--steps", 50, "--name", "r", code=128 + signal.SIGTERM)
    assert steps_on_disk("r")[0] <= 6


def test_a_repeated_signal_changes_nothing_but_ctrl_c_after_three_seconds(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    now, left, world = [100.0], [], T.World()
    monkeypatch.setattr(T.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(T.os, "_exit", left.append)
    try:
        T.watch_signals(world)
        for after, number in ((0, signal.SIGTERM), (0, signal.SIGTERM), (1, signal.SIGINT), (60, signal.SIGTERM)):
            now[0] = 100.0 + after
            os.kill(os.getpid(), number)
            assert world.signal == signal.SIGTERM and not left
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [128 + signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- two runs in one folder

def test_a_second_process_stays_out_of_a_folder_in_use(shards, capsys):
    first = start("--steps", 100000, "--name", "r")
    wait_for_steps("r", first)
    before = Path("logs/r/metrics.jsonl").read_text()
    try:
        for more in ([], ["--resume", "never"]):
            run("--steps", 100000, "--name", "r", "--stop-after", 3, *more, code=2)
            assert "another process is training in logs/r" in capsys.readouterr().err
        assert Path("logs/r/metrics.jsonl").read_text().startswith(before) and not list(Path("logs").glob("r.old*"))
    finally:
        first.send_signal(signal.SIGINT)
        finish(first)
    assert first.returncode == 128 + signal.SIGINT


# --- the warm-up, and the end of REPA

def shape(batch, c, align):
    keep = None if batch.keep is None else batch.keep.shape
    return tuple(batch.x.shape), tuple(batch.text.shape), keep, align, c.resolution


def test_every_shape_of_every_stage_is_warmed_up_and_changes_nothing(in_tmp, monkeypatch):
    write_shards(in_tmp / "d", ((24, 32, 32, "train"), (24, 24, 40, "train"), (24, 16, 16, "train", 16),
                                (24, 8, 32, "train", 16)))
    c = T.TRACKS["micro"][0]
    later = dict(resolution=16, batch=8, accumulate=2, repa=0.0, tread=0.5)
    monkeypatch.setitem(T.TRACKS, "micro", (c, [T.Stage("a", 0.6), T.Stage("b", 0.4, later)]))
    seen, warm, step, warm_up = set(), set(), T.training_step, T.warm_up

    def spy(nets, frozen, batch, c, align):
        seen.add(shape(batch, c, align))
        return step(nets, frozen, batch, c, align)

    def watched(r):
        tensors = lambda: {k: v.clone() for k, v in r.optimizer.state_dict().items()} | {
            f"now/{n}": p.detach().clone() for n, p in r.nets.named_parameters()}
        before, state, generator = tensors(), dict(r.state), torch.get_rng_state()
        told = warm_up(r)
        assert same(tensors(), before) and r.state == state
        assert torch.equal(torch.get_rng_state(), generator)
        assert not any(flat.grads.any() for flat in r.optimizer.flats)
        assert all(p.grad is None for p in r.nets.parameters())
        warm.update(seen)
        seen.clear()
        return told

    monkeypatch.setattr(T, "training_step", spy)
    monkeypatch.setattr(T, "warm_up", watched)
    flags = ("--track micro --ema 0.99 --hidden 32 --heads 2 --depth 3 --samples 0 --sample-steps 2 --compile off "
             "--compute fp32 --tread-blocks 1-1 --repa-until 0.3 --data d --steps 40").split()
    assert T.main([*flags, "--name", "r"]) == 0
    assert seen <= warm, seen - warm
    assert len(warm) == 4 + 2 and seen == warm  # two buckets with and without the teacher, two routed
    monkeypatch.setattr(T, "warm_up", lambda r: {})
    assert T.main([*flags, "--name", "cold"]) == 0
    assert same(weights("r"), weights("cold")) and losses("r") == losses("cold")


def test_a_shape_that_does_not_fit_is_said_with_its_stage_and_a_knob(shards, monkeypatch, capsys):
    def too_large(*a):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(T, "training_step", too_large)
    run("--steps", 4, "--name", "r", code=2)
    err = capsys.readouterr().err
    assert "stage main does not fit" in err and "32 x 32 px (CUDA out of memory); give --accumulate 2" in err


def tiny_vae(folder):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, sample_size=32,
                  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                  layers_per_block=1).save_pretrained(folder)
    return T.VAE(str(folder)).about


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_after_repa_no_image_is_read_and_the_teacher_is_freed(in_tmp, monkeypatch, compiled):
    write_shards(in_tmp / "d", latent=LATENT | tiny_vae(in_tmp / "vae"), parts=((40, 32, 32, "train"),))
    teachers, read, log = [], [0], []
    init, picture, step = T.Teacher.__init__, T.Shards.picture, T.MuonAdamW.step

    def note(self, *a):
        init(self, *a)
        teachers.extend([weakref.ref(self), weakref.ref(self.model)])

    def stepped(self, *a):
        gc.collect()
        log.append((read[0], [ref() is None for ref in teachers]))
        read[0] = 0
        return step(self, *a)

    monkeypatch.setattr(T.Teacher, "__init__", note)
    monkeypatch.setattr(T.Shards, "picture", lambda *a: (read.__setitem__(0, read[0] + 1), picture(*a))[1])
    monkeypatch.setattr(T.MuonAdamW, "step", stepped)
    flags = ("--data d --vae vae --patch 1 --repa 1 --repa-layer 1 --repa-until 0.5 --predict v --bottleneck 0 "
             f"--steps 8 --name r --compile {'on' if compiled else 'off'}").split()
    run(*flags, "--stop-after", 6)
    warm, *steps = log
    assert warm[0] > 0 and steps == [(16, [False, False])] * 4 + [(0, [True, True])] * 2
    log.clear(), teachers.clear()
    run(*flags)  # a process that begins after its end
    assert [images for images, _ in log] == [0, 0, 0] and all(all(gone) for _, gone in log)


# --- gradients

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


def test_64_micro_batches_are_one_batch(shards):
    run("--batch", 64, "--steps", 6, "--name", "one")
    run("--batch", 64, "--steps", 6, "--accumulate", 64, "--name", "many")
    assert np.allclose(losses("one"), losses("many"), rtol=1e-5)
    one, many = weights("one"), weights("many")
    worst = max(((one[k] - many[k]).norm() / one[k].norm().clamp(min=1e-3)).item() for k in one)
    assert worst < 1e-3, worst  # AdamW's first steps divide small differences by small gradients


# --- ranks

COUNTING = """
import json
real, counted, owned, init = T.orthogonalize, [], [], T.MuonAdamW.__init__
if sys.argv[1] == "classic":
    T.NEWTON_SCHULZ = T.CLASSIC
def counting(G, *a):
    counted.append(len(G))
    return real(G, *a)
def spy(self, *a):
    init(self, *a)
    owned.extend(names for flat in self.flats for names in flat.layout)
T.orthogonalize, T.MuonAdamW.__init__ = counting, spy
main = T.main
def counted_main(argv):
    code = main(argv[1:])
    json.dump(dict(counted=sum(counted), layout=owned), open(f"count-{rank}.json", "w"))
    return code
T.main = counted_main
"""


SLOW = [pytest.param(ranks, ns, marks=pytest.mark.slow) for ranks, ns in (
    (2, "classic"), (2, "polar"), (4, "classic"), (8, "classic"), (8, "polar"))]


@ranks_group
@pytest.mark.parametrize("ranks, ns", [(4, "polar"), *SLOW])
def test_any_number_of_ranks_follows_one_and_orthogonalises_each_matrix_once(shards, ranks, ns):
    """2 blocks have 14 matrices of Muon's, which neither 4 nor 8 ranks divide."""
    script, steps = driver(shards, COUNTING), 30
    flags = ["--steps", steps, "--lr", "1e-3", "--lr-adamw", "1e-3", "--modulation", "muon"]
    for n in (1, ranks):
        done = shell(*(torchrun(n) if n > 1 else []), script, ns, *TINY, *flags, "--name", f"n{n}", timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        counts = [json.loads(Path(f"count-{r}.json").read_text()) for r in range(n)]
        assert sum(c["counted"] for c in counts) == (steps + 1) * 14  # one for the warm-up
        names = [name for layout in counts[0]["layout"] for name in layout]
        assert len(names) == len(set(names)) and len(counts[0]["layout"]) == 2 * n
    assert np.allclose(losses("n1"), losses(f"n{ranks}"), rtol=1e-4)
    assert all(torch.allclose(a, weights(f"n{ranks}")[k], atol=2e-3) for k, a in weights("n1").items())


@ranks_group
def test_a_checkpoint_of_four_ranks_continues_on_fewer(shards):
    flags = ["--steps", 8, "--batch", 24]
    run(*flags, "--name", "whole")
    done = shell(*torchrun(4), SCRIPT, *TINY, *flags, "--name", "r", "--stop-after", 4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(Path("logs/r/checkpoint/step-00000004").glob("rank-*.safetensors"))) == 4
    shutil.copytree("logs/r", "logs/three")
    run(*flags, "--name", "r")
    done = shell(*torchrun(3), SCRIPT, *TINY, *flags, "--name", "three")
    assert done.returncode == 0 and "step-00000004 at step 4" in done.stdout, done.stderr[-3000:]
    for name in ("r", "three"):
        assert len(losses(name)) == 8 and np.allclose(losses("whole"), losses(name), rtol=1e-4)


@pytest.mark.slow
@ranks_group
def test_three_ranks_in_bf16_follow_one_in_fp32(shards):
    """Matrices travel in BF16, gradients in FP32."""
    flags = ["--steps", 8, "--batch", 24]
    run(*flags, "--name", "whole")
    done = shell(*torchrun(3), SCRIPT, *TINY, *flags, "--compute", "bf16", "--name", "bf16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.allclose(losses("whole"), losses("bf16"), rtol=2e-2) and losses("whole") != losses("bf16")


RUNS = """
main = T.main
def three(flags):
    for attempt, (name, stop) in enumerate([("whole", "0"), ("cut", "20"), ("cut", "0")]):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)  # as if torchrun had started the ranks again
        assert main([*flags, "--name", name, "--stop-after", stop]) == 0
T.main = three
"""


@ranks_group
def test_two_ranks_resume_bit_for_bit_after_the_end_of_repa(shards):
    """What resumes has no teacher any more: who owns what, and so the order of sums, must not change a bit.
    Of 30 steps one was different."""
    flags = [*TINY, "--repa", 1, "--hidden", 64, "--depth", 3, "--captions", "mix:0.3", "--repa-until", 0.3, "--steps", 40]
    script = driver(shards, RUNS)
    done = shell(*torchrun(2), script, *flags)
    assert done.returncode == 0 and "resumed from logs/cut/checkpoint/step-00000020" in done.stdout, done.stderr[-3000:]
    assert losses("whole") == losses("cut") and same(weights("whole"), weights("cut"))


@ranks_group
def test_a_dead_rank_ends_the_others_and_torchrun_starts_the_run_again(shards):
    run("--steps", 40, "--name", "whole")
    process = start("--steps", 40, "--name", "r", "--checkpoint-minutes", 0.001, ranks=2, torchrun_flags=["--max-restarts=2"],
                    script=driver(shards, "step = T.MuonAdamW.step\n"  # so that it is not over before it can be killed
                                          "T.MuonAdamW.step = lambda *a: (time.sleep(0.05), step(*a))[1]"))
    while not list(Path("logs").glob("r/checkpoint/step-????????")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    send(signal.SIGKILL, processes(shards, rank=1))
    said = finish(process)
    assert process.returncode == 0, said[-3000:]
    assert "resumed from logs/r/checkpoint" in said and "cannot meet" not in said  # at the first restart
    assert np.allclose(losses("whole")[-5:], losses("r")[-5:], rtol=1e-3)


@pytest.mark.slow
@ranks_group
def test_a_rank_that_comes_to_no_collective_any_more_ends_the_run(shards):
    """After the groups' timeout, here ten seconds."""
    end = Training(shards, "r", 2, *TINY, "--steps", 3, fault="time.sleep(1000)", timeout=10).end()
    assert end["code"] == 1 and "rank 0: lost its peers" in end["said"], end["said"][-3000:]
    assert "the last checkpoint stands" in end["said"] and not Path("logs/r/transformer").exists()


FAILING = """
step, mode, main = T.training_step, sys.argv[1], T.main
calls = []
def failing(*a):
    calls.append(1)
    if rank == 1 and len(calls) == 3:
        if mode == "bad input":
            raise T.UserError("shard 7 is broken")
        assert not "every sample has its image"
    return step(*a)
if mode == "connect" and rank == 1:
    def connect():
        raise T.UserError("this machine has 1 GPUs")
    T.connect = connect
T.training_step = failing
open(f"started-{mode}-{rank}", "a").write("x")
T.main = lambda argv: main(argv[1:])
"""


@ranks_group
@pytest.mark.parametrize("mode, says", [
    ("bad input", r"train_prx: rank 1: shard 7 is broken"),
    ("assertion", r"train_prx: rank 1 failed:\n.*Traceback (?s:.*)AssertionError"),
    ("connect", r"train_prx: rank 1: this machine has 1 GPUs")])
def test_what_goes_wrong_on_another_rank_is_said_with_its_number_and_ends_the_job(shards, mode, says):
    """Long before rank 0's timeout, which is ten minutes. test_gpu_check.py has a rank whose memory runs out."""
    began = time.time()
    restarts = ["--max-restarts=1"] if mode == "bad input" else []
    launch = [*torchrun(2), *restarts, driver(shards, FAILING), mode]
    done = shell(*launch, *TINY, "--steps", 100000, "--name", "r", timeout=500)
    assert done.returncode == 1 and re.search(says, done.stderr), done.stderr[-4000:]
    assert time.time() - began < T.TIMEOUT.total_seconds() - 60
    assert ("rank 1 failed" in done.stderr) == (mode == "assertion")  # bad input has no traceback
    if restarts:  # starting again cannot help: the second attempt ends with the first one's sentence, before any step
        assert "the attempt before ended for good: shard 7 is broken" in done.stderr
        assert Path("started-bad input-1").read_text() == "xx"
        assert len(re.findall("^command: ", Path("logs/r/log.txt").read_text(), re.M)) == 1


@ranks_group
def test_what_set_up_finds_on_any_rank_is_said_once_by_rank_0(shards):
    """Also with --max-restarts: each attempt ends at once."""
    script = driver(shards, "sys.argv += ['--data', f'gone-{rank}']")
    done = shell(*torchrun(2), "--max-restarts=1", script, *TINY, "--steps", 4, "--name", "r")
    assert done.returncode == 1 and not Path("logs/r").exists()
    first, again = done.stderr.split("the attempt before ended for good", 1)
    for rank in (0, 1):
        assert first.count(f"--data gone-{rank} holds no index.json") == 1, done.stderr
        assert f"--data gone-{rank} holds no index.json" in again
    assert "Traceback" not in first


@ranks_group
@pytest.mark.parametrize("peer", ["os._exit(9)", "time.sleep(1000)"], ids=["dead", "hung"])
def test_a_rank_that_loses_its_peer_says_so(in_tmp, peer):
    script = driver(in_tmp, f"""
def train(world, *options):
    world.agree(1.0)
    T.dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=3), world.control)
    if rank == 1:
        {peer}
    world.agree(1.0)
T.train = train""")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        environment = ENVIRONMENT | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE="2")
    ranks = [subprocess.Popen([sys.executable, str(script)], env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    said = ranks[0].communicate(timeout=200)[0]
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 1 and "lost its peers" in said and "the last checkpoint stands" in said


# --- random kills

def told(folder, **kw):
    """A few kills here; `python tests/fault_harness.py` makes fifty and more, with ranks."""
    from fault_harness import harness

    result = harness(folder, **kw)
    assert result["identical"] and result["kills"] == kw["kills"] and result["steps_logged"] >= kw["steps"]
    assert result["clock_only_grows"], result
    return result


def test_random_kills_change_nothing(in_tmp, scene_folder):
    told(in_tmp, kills=3, steps=40, ranks=1, seed=0, data=scene_folder)


@pytest.mark.slow
@ranks_group
@pytest.mark.parametrize("kills, ranks", [(50, 1), (30, 2)])
def test_many_random_kills_change_nothing(in_tmp, scene_folder, kills, ranks):
    told(in_tmp, kills=kills, steps=300, ranks=ranks, seed=1, data=scene_folder)
