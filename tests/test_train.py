"""A run as a user starts it: it learns, stops, goes on bit for bit, runs on two ranks, and says what is wrong."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, TINY, losses, metrics, run, same, shell, start, torchrun, weights
from PIL import Image
from safetensors.torch import load_file

import train_prx as T


def kept(name, step, kind, rank=0):
    """One kind of tensors of a checkpoint, by parameter name."""
    state = load_file(f"logs/{name}/checkpoint/step-{step:08d}/rank-{rank}.safetensors")
    return {k.split("/", 1)[1]: v for k, v in state.items() if k.startswith(kind + "/")}


def model_only(tensors):
    return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}


# --- what a run leaves

def test_a_run_leaves_everything_that_the_readme_names(shards):
    run("--steps", 4, "--name", "r", "--samples", 1)
    folder = Path("logs/r")
    from diffusers import PRXTransformer2DModel

    for exported in ("transformer", "exports/step-00000003"):
        assert PRXTransformer2DModel.from_pretrained(folder / exported).config.hidden_size == 32
    assert [p.name for p in folder.glob("exports/*")] == ["step-00000003"]
    log = (folder / "log.txt").read_text()
    assert T.SOURCE in log and '"torch"' in log and (folder / "train_prx.py").read_text() == T.SOURCE
    assert len(losses("r")) == 4 and metrics("r")[-1]["event"] == "finished"
    assert sorted(p.name for p in folder.glob("samples/*")) == ["final.png", "step-00000003.png"]
    assert json.loads((folder / "config.json").read_text())["config"]["hidden"] == 32
    assert (folder / "text/model.safetensors").read_bytes() == Path("shards/micro/text/model.safetensors").read_bytes()


def test_the_facts_of_a_run_are_in_run_json(shards):
    """What evaluation and records read; config.json is the script's own."""
    facts = []
    for flags in (["--stop-after", 2], []):
        run("--steps", 4, "--name", "r", *flags)
        facts.append(json.loads(Path("logs/r/run.json").read_text()))
    stopped, done = facts
    model = T.load_transformer("logs/r")
    index = shards / "shards/micro/index.json"
    wanted = dict(
        format=1, name="r", track="micro", seed=0, steps=4, hours=0.0, script="train_prx.py",
        source_sha256=hashlib.sha256(T.SOURCE.encode()).hexdigest(), resolution=32, captions="long", vae="none",
        text="tiny", pixels=True, predict="x", shift=T.TRACKS["micro"][0].shift, cfg_scale=3.0, sample_steps=2,
        parameters=sum(p.numel() for p in model.parameters()), world_size=1,
        data=[dict(folder=str(index.parent.resolve()), sha256=hashlib.sha256(index.read_bytes()).hexdigest())])
    assert {k: done[k] for k in wanted} == wanted and done["command"]  # the format is only ever extended
    assert stopped["finished"] is None and done["finished"]["step"] == 4 and done["finished"]["samples"] == 64
    assert done["finished"]["elapsed"] == metrics("r")[-1]["elapsed"] and done["machine"]["ranks"] == 1


def test_the_loss_falls(shards):
    run("--steps", 60, "--name", "r", "--lr", 0.01, "--lr-adamw", 0.01)
    x = losses("r")
    assert np.mean(x[-10:]) < 0.6 * np.mean(x[:5])


def test_a_run_by_hours_ends_in_its_budget(shards, monkeypatch):
    """On a clock that goes on by one second whenever it is read, so that no slow moment of this machine counts."""
    now = iter(range(1000))
    monkeypatch.setattr(T, "Clock", lambda before=0.0: lambda: before + next(now))
    run("--hours", 20 / 3600, "--name", "r")
    finished = metrics("r")[-1]
    assert 15 < finished["step"] < 20 and finished["elapsed"] <= 20
    progress = [p for r in metrics("r") for p in r.get("progresses", [])]
    assert progress == sorted(progress) and progress[-1] > 0.9


def test_the_clock_runs_from_process_start(shards):
    for budget in (12, 60, 240):  # a slow moment may eat a short one before the first step
        began = time.time()
        done = shell(SCRIPT, *TINY, "--hours", budget / 3600, "--name", "r")
        if "no step fits" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert budget - 1.1 < metrics("r")[-1]["elapsed"] <= time.time() - began + 0.02  # a tick of the process table
    done = shell("-c", f"import sys, time; time.sleep(2); sys.path.insert(0, {str(ROOT)!r}); import train_prx as T; "
                       "print(T.Clock()() > 2, T.Clock(100.0)() > 102)")
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_the_exported_weights_are_the_ema_and_without_one_the_masters(shards):
    run("--steps", 5, "--name", "plain", "--ema", 0)
    run("--steps", 5, "--name", "ema", "--ema", 0.99)
    assert same(weights("plain"), model_only(kept("plain", 5, "master")))
    assert same(weights("ema"), model_only(kept("ema", 5, "ema")))
    assert same(kept("plain", 5, "master"), kept("ema", 5, "master")) and not same(weights("plain"), weights("ema"))


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(shards):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("--steps", 4, "--name", name, "--seed", seed)
    assert same(weights("a"), weights("b")) and not same(weights("a"), weights("c"))


def test_bf16_compute_follows_an_all_fp32_run(shards):
    flags = ["--steps", 40]
    run(*flags, "--name", "fp32")
    run(*flags, "--name", "bf16", "--compute", "bf16")
    full, low = np.array(losses("fp32")), np.array(losses("bf16"))
    assert not np.array_equal(full, low)
    assert np.abs(low / full - 1).mean() < 0.05 and abs(low.mean() / full.mean() - 1) < 0.02
    assert all(v.dtype == torch.float32 for v in weights("bf16").values())


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile on CPU needs a C++ compiler")
def test_compiled_blocks_give_the_same_losses_from_a_cache_of_the_runs_own(shards):
    """A process of its own: the cache's folder is read once. It begins empty, so a second run is as cold as the first."""
    flags = ["--steps", 3, "--depth", 1, "--compile"]
    run(*flags, "off", "--name", "eager")
    Path("logs/compiled/cache").mkdir(parents=True)
    Path("logs/compiled/cache/old").touch()  # of a start that came to nothing
    done = shell(SCRIPT, *TINY, *flags, "on", "--name", "compiled")
    assert done.returncode == 0 and "compile cache: 0 files at the start" in done.stdout, done.stderr
    assert "does not work here" not in done.stdout and list(Path("logs/compiled/cache").rglob("*.so"))
    assert np.allclose(losses("eager"), losses("compiled"), rtol=1e-4)


def test_without_a_compiler_a_run_goes_on_and_says_so(shards):
    environment = os.environ | {"CXX": "no-such-compiler"}
    done = shell(SCRIPT, *TINY, "--steps", 2, "--depth", 1, "--name", "r", "--compile", "on", env=environment)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here, so the blocks run uncompiled" in done.stdout and "no-such" in done.stdout


@pytest.mark.xdist_group("ranks")
@pytest.mark.skipif(not shutil.which("g++"), reason="rank 0 needs a C++ compiler")
def test_where_one_rank_cannot_compile_all_go_on_uncompiled(shards):
    Path("one.py").write_text("import os, runpy\nif os.environ['RANK'] == '1':\n    os.environ['CXX'] = 'no-such-compiler'\n"
                              f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")
    process = start("--steps", 2, "--depth", 1, "--name", "r", "--compile", "on", ranks=2, script="one.py")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and said.count("so the blocks run uncompiled") == 1 and "no-such" in said, said


# --- one step

def test_losses_are_sorted_by_their_noise_level(monkeypatch):
    """Bin i holds the samples of times i / 10 to (i + 1) / 10: here each sample's loss is its time."""
    c = replace(T.TRACKS["micro"][0], repa=0.0, accumulate=2)
    t = torch.tensor([0.05, 0.11, 0.19, 0.31, 0.55, 0.95, 0.999])
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(T, "flow_matching_loss", lambda net, x, eps, t, *rest: (
        net(t[:, None])[:, 0], t, None, []))
    batch = T.Batch(torch.zeros(7, 3, 8, 8, dtype=torch.uint8), t, torch.zeros(7, 4, 5), torch.ones(7, 4).bool())
    loss, by_time = T.training_step(torch.nn.ModuleDict(dict(model=model)), T.Frozen(), batch, c, False)
    assert loss.item() == pytest.approx(t.mean().item() / 2)  # one of two micro-batches
    assert by_time[1].tolist() == [1, 2, 0, 1, 0, 1, 0, 0, 0, 2]
    assert torch.allclose(by_time[0], torch.tensor([0.05, 0.30, 0, 0.31, 0, 0.55, 0, 0, 0, 1.949]))
    assert model.weight.grad is not None


# --- stop and resume

def test_a_stage_may_begin_the_average_or_end_it(shards, monkeypatch):
    c = T.TRACKS["micro"][0]
    halves = lambda ema: (replace(c, ema=0.0), [T.Stage("a", 0.5, dict(ema=0.99 - ema)), T.Stage("b", 0.5, dict(ema=ema))])
    flags = [x for x in TINY if x not in ("--ema", "0.99")]
    for name, ema in (("begins", 0.99), ("ends", 0.0)):
        monkeypatch.setitem(T.TRACKS, "micro", halves(ema))
        assert T.main([*flags, "--steps", "6", "--name", name]) == 0
        average, masters = (kept(name, 6, kind) for kind in ("ema", "master"))
        assert average.keys() == masters.keys() and same(weights(name), model_only(average))
        assert same(average, masters) == (name == "ends")


@pytest.mark.parametrize("flags", [
    [], ["--optimizer", "adamw", "--accumulate", "2", "--weights", "bf16"],
    ["--repa", "4", "--repa-layer", "1", "--repa-until", "0.5", "--tread", "0.5", "--tread-blocks", "1-1"]],
    ids=["default", "adamw", "repa"])
def test_resume_is_bit_identical(shards, flags):
    """Three processes' worth; with REPA the last begins after its end, without its teacher."""
    flags = ["--steps", 8, "--captions", "mix:0.5", *flags]
    run(*flags, "--name", "whole")
    run(*flags, "--name", "cut", "--stop-after", 3)
    assert not Path("logs/cut/transformer").exists()
    run(*flags, "--name", "cut", "--stop-after", 6)
    run(*flags, "--name", "cut")
    assert same(weights("whole"), weights("cut")) and losses("whole") == losses("cut")
    assert sum(r.get("event") == "resume" for r in metrics("cut")) == 2
    for kind in ("master", "ema", "exp_avg", "momentum"):
        ours, theirs = (model_only(kept(name, 8, kind)) for name in ("whole", "cut"))
        assert same(ours, theirs) and (ours or kind == "momentum")


def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_from_it(shards):
    process = start("--steps", "100000", "--name", "cut")
    while not metrics("cut"):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "with a checkpoint in logs/cut; the same command goes on from there" in said
    stopped = T.find_checkpoint(Path("logs/cut"))[0]
    step = int(stopped.name[5:])
    before = metrics("cut")[-1]
    assert step > 0 and before["event"] == "stopped" and before["step"] == step
    run("--steps", 100000, "--name", "cut", "--stop-after", step + 2)
    assert len(losses("cut")) == step + 2 and metrics("cut")[-1]["elapsed"] > before["elapsed"]


def test_a_run_by_hours_goes_on_from_the_same_progress(shards):
    run("--hours", 1e3, "--name", "r", "--stop-after", 3)
    before = metrics("r")[-1]["elapsed"]
    run("--hours", 1e3, "--name", "r", "--stop-after", 4)
    stopped, resumed = (r for r in metrics("r") if r.get("losses"))
    budget = 3.6e6 - 1
    assert stopped["progresses"][-1] * budget < before
    assert before < resumed["progresses"][0] * budget  # this test's process is older than the run, which may only add
    state = json.loads((T.find_checkpoint(Path("logs/r"))[0] / "state.json").read_text())
    assert state["first_progress"] == stopped["progresses"][0]


def test_another_run_can_be_gone_on_from_and_then_stands_alone(shards):
    run("--steps", 6, "--name", "whole")
    run("--steps", 6, "--name", "a", "--stop-after", 2)
    run("--steps", 6, "--name", "b", "--resume", "logs/a", "--stop-after", 4)
    run("--steps", 6, "--name", "b", "--resume", "logs/a")
    assert losses("b") == losses("whole")[2:] and same(weights("whole"), weights("b"))


def test_a_run_begins_at_given_weights(shards, capsys):
    run("--steps", 3, "--name", "a")
    run("--steps", 2, "--name", "b", "--init", "logs/a", "--lr", 1e-12, "--lr-adamw", 1e-12)
    assert all(torch.allclose(v, weights("b")[k], atol=1e-6) for k, v in weights("a").items())
    run("--steps", 2, "--name", "c", "--init", "logs/a", "--depth", 3, code=2)
    assert "--init logs/a has" in capsys.readouterr().err


def test_stages_change_their_knobs_at_their_share_and_resume_inside_one(in_tmp, monkeypatch):
    from test_shards import write_shards

    write_shards(in_tmp / "d", ((40, 32, 32, "train"), (40, 16, 16, "train", 16)))
    stages = [T.Stage("a", 0.5), T.Stage("b", 0.5, dict(resolution=16, batch=8, captions="short", shift=3.0, lr=1e-3))]
    c = T.TRACKS["micro"][0]
    monkeypatch.setitem(T.TRACKS, "micro", (c, stages))
    seen, rates, real, step = [], [], T.training_step, T.MuonAdamW.step

    def spy(nets, frozen, batch, c, align):
        seen.append((*batch.x.shape, c.shift))
        return real(nets, frozen, batch, c, align)

    def warm_up(r, warm=T.warm_up):
        told = warm(r)
        seen.clear(), rates.clear()
        return told

    monkeypatch.setattr(T, "training_step", spy)
    monkeypatch.setattr(T, "warm_up", warm_up)
    monkeypatch.setattr(T.MuonAdamW, "step", lambda self, *a: (rates.append(self.config.lr), step(self, *a))[1])
    flags = [f for f in TINY if f not in ("--batch", "16")]
    for name, stops in (("whole", [0]), ("cut", [3, 7, 0])):
        told = [], []
        for stop in stops:
            assert T.main([*flags, "--data", "d", "--steps", "10", "--name", name, "--stop-after", str(stop)]) == 0
            told[0].extend(seen), told[1].extend(rates)
        assert told[0] == [(c.batch, 3, 32, 32, c.shift)] * 5 + [(8, 3, 16, 16, 3.0)] * 5
        assert told[1] == [c.lr] * 5 + [1e-3] * 5
    assert same(weights("whole"), weights("cut")) and metrics("whole")[-1]["samples"] == 5 * c.batch + 5 * 8


def test_the_rate_warms_up_stays_and_decays():
    c = replace(T.Config(), warmup=0.1, decay_from=0.6)
    share = [T.lr_share(p, 0.05, c) for p in (0.05, 0.10, 0.15, 0.5, 0.6, 0.8, 1.0)]
    assert np.allclose(share, [0.01, 0.51, 1.0, 1.0, 1.0, 0.5, 0.0])
    assert T.lr_share(0.0, 0.0, replace(c, warmup=0.0)) == T.lr_share(0.99, 0.0, replace(c, decay_from=1.0)) == 1.0


def test_a_failed_start_leaves_nothing_that_a_later_run_believes(shards):
    run("--steps", 8, "--name", "r", "--captions", "short", "--text", "/nowhere", code=2)
    assert not Path("logs/r").exists()
    Path("logs/r").mkdir(parents=True)
    Path("logs/r/config.json").write_text("{}")
    Path("logs/r/metrics.jsonl").write_text('{"elapsed": 1e9}\n{"elapsed": 2')
    run("--steps", 3, "--name", "r")
    assert max(r["elapsed"] for r in metrics("r")) < 1e9
    assert json.loads(Path("logs/r/config.json").read_text())["config"]["steps"] == 3
    run("--steps", 4, "--name", "r", "--resume", "never", "--data", "typo", code=2)
    assert weights("r")


def test_damaged_files_of_a_run_are_one_sentence_or_passed_over(shards, capsys):
    run("--steps", 8, "--name", "r", "--stop-after", 2)
    with open("logs/r/metrics.jsonl", "a") as file:
        file.write('{"elapsed": 3, "losses": [1.')
    run("--steps", 8, "--name", "r")
    assert len([r for r in metrics("r") if r.get("losses")]) == 2
    run("--steps", 8, "--name", "s", "--stop-after", 2)
    for content in ("{", "[]", '{"config": 3, "stages": []}'):
        Path("logs/s/config.json").write_text(content)
        run("--steps", 8, "--name", "s", code=2)
        err = capsys.readouterr().err
        assert "logs/s/config.json cannot be read" in err and err.count("\n") == 1


def test_two_checkpoints_are_kept(shards):
    for k in (2, 3, 4):
        run("--steps", 8, "--name", "r", "--stop-after", k)
    assert [p.name for p in sorted(Path("logs/r/checkpoint").iterdir())] == ["step-00000003", "step-00000004"]


def test_a_finished_run_is_left_alone_unless_told_and_then_moved_aside(shards, capsys):
    run("--steps", 3, "--name", "r")
    first, trained = Path("logs/r/log.txt").read_text(), weights("r")
    run("--steps", 3, "--name", "r")
    assert "holds a finished run" in capsys.readouterr().out and Path("logs/r/log.txt").read_text() == first
    for old in ("r.old1", "r.old2"):
        before = weights("r")
        run("--steps", 3, "--name", "r", "--resume", "never", "--seed", 1)
        assert same(weights(old), before) and not same(weights("r"), trained)
    assert Path("logs/r.old1/log.txt").read_text() == first and same(weights("r.old1"), trained)
    assert len(losses("r")) == 3  # nothing of the old run is taken for the new one's


# --- ranks

@pytest.mark.xdist_group("ranks")
def test_two_ranks_follow_one_and_hand_over_to_one(shards):
    """The same global batch: losses and weights equal up to summation order; one rank goes on from two's checkpoint,
    which was written after the end of REPA."""
    flags = ["--steps", 12, "--repa", 4, "--repa-layer", 1, "--repa-until", 0.4]
    run(*flags, "--name", "one")
    run(*flags, "--name", "micro", "--accumulate", 4)
    for name, more in (("two", []), ("handed", ["--stop-after", 6])):
        done = shell(*torchrun(2), SCRIPT, *TINY, *flags, "--name", name, *more)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(Path("logs/handed/checkpoint/step-00000006").glob("rank-*.safetensors"))) == 2
    assert json.loads(Path("logs/two/run.json").read_text())["world_size"] == 2
    run(*flags, "--name", "handed")
    for name in ("two", "handed", "micro"):
        assert np.allclose(losses("one"), losses(name), rtol=1e-4), name
        assert all(torch.allclose(a, weights(name)[k], atol=2e-3) for k, a in weights("one").items()), name


def test_a_batch_that_the_ranks_cannot_share_is_refused(shards, capsys, monkeypatch):
    monkeypatch.setattr(T, "connect", lambda: T.World(size=3))
    run("--steps", 2, code=2)
    assert "--batch 16 over --accumulate 1 is not a multiple of 3 ranks" in capsys.readouterr().err


# --- data

def test_images_from_a_folder_and_from_a_tar_train_and_sample(in_tmp):
    """The README's path for one's own images, by its commands."""
    rng = np.random.default_rng(0)
    Path("photos").mkdir()
    with open("photos/metadata.jsonl", "w") as meta, tarfile.open("photos.tar", "w") as tar:
        for i in range(24):
            pixels = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)
            Image.fromarray(pixels).save(f"photos/{i}.jpg")
            meta.write(json.dumps({"file_name": f"{i}.jpg", "text": f"a photo number {i}, with colours"}) + "\n")
            jpeg = Path(f"photos/{i}.jpg").read_bytes()
            for name, content in ((f"{i}.jpg", jpeg), (f"{i}.txt", f"a photo {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for source in ("photos", "photos.tar"):
        out = f"shards-{source}"
        done = shell(ROOT / "data/prepare.py", source, "--out", out, "--size", 32)
        assert done.returncode == 0, done.stderr
        run("--data", out, "--steps", 20, "--name", out)
        assert len(losses(out)) == 20 and Path(f"logs/{out}/samples/final.png").exists()
    run("--data", out, "--steps", 2)
    assert Path(f"logs/micro-{out}").exists()  # the default name says whose images


# --- errors: one sentence, exit code 2

MICRO = ["--track", "micro"]


@pytest.mark.parametrize("flags, says", [
    (["--bogus", "1"], "unrecognized arguments: --bogus 1"),
    (["--track", "nano"], "argument --track: invalid choice: 'nano' (choose from "),
    (["--ste", "5"], "unrecognized arguments: --ste 5"),
    (["--steps", "many"], "invalid int value: 'many'"),
    ([*MICRO, "--steps", "5", "--hours", "1"], "--steps and --hours both give the length"),
    ([*MICRO, "--steps", "-5"], "--steps -5 must not be negative"),
    ([*MICRO, "--hidden", "100", "--heads", "3"], "--hidden 100 over --heads 3"),
    ([*MICRO, "--batch", "10", "--accumulate", "3"], "--batch 10 cannot be cut into --accumulate 3"),
    ([*MICRO, "--warmup", "0.8", "--decay-from", "0.5"], "--warmup 0.8 ends after --decay-from 0.5"),
    ([*MICRO, "--captions", "mix:2"], "--captions 'mix:2' is unknown"),
    ([*MICRO, "--predict", "eps"], "--predict: invalid choice: 'eps'"),
    ([*MICRO, "--name", "../up"], "--name '../up' must be a plain folder name"),
    ([*MICRO, "--name", ".."], "--name '..' must be a plain folder name"),
    ([*MICRO, "--ema", "1"], "--ema 1.0 must be at least 0 and less than 1"),
    ([*MICRO, "--ema", "nan"], "--ema nan must be at least 0 and less than 1"),
    ([*MICRO, "--lr", "inf"], "--lr inf must be positive"),
    ([*MICRO, "--seed", "-1"], "--seed -1 must lie in 0 to"),
    ([*MICRO, "--lr", "-1"], "--lr -1.0 must be positive"),
    ([*MICRO, "--tread-blocks", "2"], "--tread-blocks '2' must name a first and a last block"),
    ([*MICRO, "--tread", "0.5", "--tread-blocks", "2-9"], "--tread-blocks 2-9 must lie in 0 to 5"),
    ([*MICRO, "--repa-layer", "6"], "--repa-layer 6 must be one of 0 to 5"),
    ([*MICRO, "--resume", "nothing-here"], "--resume nothing-here holds no complete checkpoint"),
    (["--paint", "request.json"], "painting takes --paint REQUEST.json --out IMAGES.safetensors"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(in_tmp, capsys, monkeypatch, flags, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert T.main(flags) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("train_prx: ") and not Path("logs").exists()
    assert err.count("\n") == 1


def test_settings_of_one_run_are_said_all_at_once(in_tmp, capsys):
    assert T.main([*MICRO, "--batch", "0", "--heads", "0", "--tread-blocks", "x"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


@pytest.mark.parametrize("flags, says", [
    (["--resolution", "36"], "holds images of 32 px, and this stage trains at --resolution 36"),
    (["--patch", "12"], "images of 32 x 32 px cannot be cut into tokens of 12 px"),
    (["--text", "/nowhere/at/all"], "--text /nowhere/at/all cannot be loaded ("),
    (["--repa", "1", "--repa-layer", "1", "--repa-teacher", "/nowhere/at/all"], "the teacher /nowhere/at/all cannot be"),
    (["--init", "/nowhere/at/all"], "/nowhere/at/all as a PRX transformer in diffusers format cannot be loaded"),
])
def test_what_does_not_fit_the_data_is_one_sentence_and_exit_code_2(shards, capsys, flags, says):
    run("--steps", 2, *flags, code=2)
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_process_exits_with_2(in_tmp):
    done = shell(SCRIPT, "--track", "nano")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_resuming_with_other_settings_is_refused_with_both_values(shards, capsys):
    run("--steps", 8, "--name", "r", "--stop-after", 2)
    run("--steps", 8, "--name", "r", "--lr", 0.5, code=2)
    assert f"--lr was {T.TRACKS['micro'][0].lr}, now 0.5" in capsys.readouterr().err


def test_ten_non_finite_steps_stop_the_run_with_a_checkpoint(shards, capsys, monkeypatch):
    real, calls = T.flow_matching_loss, []

    def broken(*a):
        calls.append(1)
        loss, *rest = real(*a)
        return loss * (float("nan") if len(calls) > 5 else 1.0), *rest  # the first one is the warm-up's

    monkeypatch.setattr(T, "flow_matching_loss", broken)
    monkeypatch.setattr(T.Heartbeat, "EVERY", 0.0)
    run("--steps", 20, "--name", "r", code=1)
    assert "NaN" not in Path("logs/r/metrics.jsonl").read_text() and len(losses("r")) == 14
    assert "the norm of the gradient was not finite 10 steps in a row; step 14 is kept" in capsys.readouterr().err
    state = load_file(next(Path("logs/r/checkpoint").glob("step-*")) / "rank-0.safetensors")
    assert all(v.isfinite().all() for v in state.values())


# --- the repository

def test_the_repository_stays_small():
    """No file over 2 MiB, all of them under 40 MiB (what git tracks; without git, what lies there)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / f for f in listed.stdout.split("\0") if f] if listed.returncode == 0 else [
        p for p in ROOT.rglob("*") if p.is_file() and not {".venv", "logs", "shards", ".git"} & set(p.parts)]
    sizes = {f: f.stat().st_size for f in files if f.exists()}
    assert max(sizes.values()) <= 2 << 20 and sum(sizes.values()) <= 40 << 20


def test_no_pickle_anywhere():
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "records").glob("*.py")]:
        text = path.read_text()
        assert not re.search(r"(?<!safetensors\.)torch\.(load|save)\(|^ *(import|from) pickle", text, re.M), path
