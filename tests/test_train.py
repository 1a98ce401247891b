"""A run as a user starts it: it learns, stops, goes on bit for bit, runs on two ranks, and says what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_prx as T
from data.preflight import read_metrics
from data.scenes import SceneData
from data.settings import HELP

SCRIPT = Path(T.__file__)
TINY = ("--track micro --repa 0 --ema 0.99 --hidden 32 --heads 2 --depth 2 --batch 16 --samples 0 --sample-steps 2 --compile off "
        "--compute fp32").split()


def run(*flags, code=0):
    assert T.main([*TINY, *map(str, flags)]) == code


def shell(*args, **kw):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=240, **kw)


def weights(name):
    return load_file(f"logs/{name}/transformer/diffusion_pytorch_model.safetensors")


def metrics(name):
    return read_metrics(Path("logs") / name)


def losses(name):
    return [x for record in metrics(name) for x in record.get("losses", [])]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- what a run leaves

def test_a_run_leaves_everything_that_the_readme_names(in_tmp):
    run("--steps", 4, "--name", "r", "--samples", 1)
    folder = Path("logs/r")
    from diffusers import PRXTransformer2DModel

    assert PRXTransformer2DModel.from_pretrained(folder / "transformer").config.hidden_size == 32
    log = (folder / "log.txt").read_text()
    assert T.SOURCE in log and T.hashlib.sha256(T.SOURCE.encode()).hexdigest() in log and '"torch"' in log
    assert len(losses("r")) == 4 and metrics("r")[-1]["event"] == "finished"
    assert len(list((folder / "samples").glob("*.png"))) == 2 and (folder / "curve.png").stat().st_size > 1000
    assert json.loads((folder / "config.json").read_text())["hidden"] == 32


def test_the_loss_falls(in_tmp):
    run("--steps", 60, "--name", "r", "--lr", 0.01, "--lr-adamw", 0.01)
    x = losses("r")
    assert np.mean(x[-10:]) < 0.6 * np.mean(x[:5])


def test_a_run_by_hours_ends_in_its_budget(in_tmp):
    """Seconds count from process start, so this test's own process is started for it."""
    start = time.time()
    done = shell(SCRIPT, *TINY, "--hours", 30 / 3600, "--name", "r")
    assert done.returncode == 0, done.stderr
    finished = metrics("r")[-1]
    assert finished["elapsed"] <= 30.5 and finished["elapsed"] <= time.time() - start and finished["step"] > 3


def test_the_exported_weights_are_the_ema_and_without_one_the_masters(in_tmp):
    run("--steps", 5, "--name", "plain", "--ema", 0)
    run("--steps", 5, "--name", "ema", "--ema", 0.99, "--ema-every", 1)

    def kept(name, kind):
        state = load_file(f"logs/{name}/checkpoint/step-00000005/rank-0.safetensors")
        return {k.split("/", 1)[1]: v for k, v in state.items() if k.startswith(kind + "/")}

    assert same(weights("plain"), kept("plain", "master")) and same(weights("ema"), kept("ema", "ema"))
    assert same(kept("plain", "master"), kept("ema", "master")) and not same(weights("plain"), weights("ema"))


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(in_tmp):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("--steps", 4, "--name", name, "--seed", seed)
    assert same(weights("a"), weights("b")) and not same(weights("a"), weights("c"))


def test_bf16_compute_follows_an_all_fp32_run(in_tmp):
    flags = ["--steps", 40]
    run(*flags, "--name", "fp32")
    assert T.main([*TINY[:-2], "--compute", "bf16", *map(str, flags), "--name", "bf16"]) == 0
    full, low = np.array(losses("fp32")), np.array(losses("bf16"))
    assert not np.array_equal(full, low)
    assert np.abs(low / full - 1).mean() < 0.05 and abs(low.mean() / full.mean() - 1) < 0.02
    assert all(v.dtype == torch.float32 for v in weights("bf16").values())


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile on CPU needs a C++ compiler")
def test_compiled_blocks_give_the_same_losses(in_tmp):
    run("--steps", 3, "--name", "eager")
    run("--steps", 3, "--name", "compiled", "--compile", "on")
    assert np.allclose(losses("eager"), losses("compiled"), rtol=1e-4)
    torch.compiler.reset()


def test_without_a_compiler_a_run_goes_on_and_says_so(in_tmp):
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(in_tmp / "cache")}
    done = shell(SCRIPT, *TINY, "--steps", 2, "--name", "r", "--compile", "on", env=environment)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here, so the blocks run uncompiled" in done.stdout and "no-such" in done.stdout


# --- stop and resume

@pytest.mark.parametrize("recipe", ["default", "baseline"])
def test_resume_is_bit_identical(in_tmp, recipe):
    flags = ["--steps", 8, "--recipe", recipe, "--captions", "mix:0.5", "--ema-every", 2]
    run(*flags, "--name", "whole")
    run(*flags, "--name", "cut", "--stop-after", 3)
    assert not Path("logs/cut/transformer").exists()
    run(*flags, "--name", "cut", "--stop-after", 5)
    run(*flags, "--name", "cut")
    assert same(weights("whole"), weights("cut")) and losses("whole") == losses("cut")
    assert sum(r.get("event") == "resume" for r in metrics("cut")) == 2


def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_from_it(in_tmp):
    flags = [*TINY, "--steps", "100000", "--name", "cut"]
    process = subprocess.Popen([sys.executable, SCRIPT, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not read_metrics(Path("logs/cut")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    stopped = T.find_checkpoint(Path("logs/cut"))[0]
    step = int(stopped.name[5:])
    before = metrics("cut")[-1]
    assert step > 0 and before["event"] == "stopped" and before["step"] == step
    run("--steps", 100000, "--name", "cut", "--stop-after", step + 2)
    assert len(losses("cut")) == step + 2 and metrics("cut")[-1]["elapsed"] > before["elapsed"]


def test_a_run_by_hours_goes_on_from_the_same_progress(in_tmp):
    run("--hours", 1e3, "--name", "r", "--stop-after", 3)
    before = metrics("r")[-1]["elapsed"]
    run("--hours", 1e3, "--name", "r", "--stop-after", 4)
    stopped, resumed = (r for r in metrics("r") if r.get("losses"))
    budget = 3.6e6 - 1
    assert stopped["progresses"][-1] * budget < before
    assert before < resumed["progresses"][0] * budget  # this test's process is older than the run, which may only add
    state = json.loads((T.find_checkpoint(Path("logs/r"))[0] / "state.json").read_text())
    assert state["first_progress"] == stopped["progresses"][0]


def test_another_run_can_be_gone_on_from_and_then_stands_alone(in_tmp):
    run("--steps", 6, "--name", "whole")
    run("--steps", 6, "--name", "a", "--stop-after", 2)
    run("--steps", 6, "--name", "b", "--resume", "logs/a", "--stop-after", 4)
    run("--steps", 6, "--name", "b", "--resume", "logs/a")
    assert losses("b") == losses("whole")[2:] and same(weights("whole"), weights("b"))


def test_stages_change_their_knobs_at_their_share_and_resume_inside_one(in_tmp, monkeypatch):
    stages = [T.Stage("a", 0.5), T.Stage("b", 0.5, dict(resolution=16, batch=8, captions="short", shift=3.0, lr=1e-3))]
    c = T.TRACKS["micro"][0]
    monkeypatch.setitem(T.TRACKS, "micro", (c, stages))
    seen, real, step = [], T.host_batches, T.MuonAdamW.step

    def spy(data, c, *rest):
        for batch in real(data, c, *rest):
            seen.append((*batch[0].shape, c.shift))
            yield batch

    rates = []
    monkeypatch.setattr(T, "host_batches", spy)
    monkeypatch.setattr(T.MuonAdamW, "step", lambda self, *a, **k: (rates.append(self.config.lr), step(self, *a, **k))[1])
    flags = [f for f in TINY if f not in ("--batch", "16")]
    for name, stops in (("whole", [0]), ("cut", [3, 7, 0])):
        for stop in stops:
            assert T.main([*flags, "--steps", "10", "--name", name, "--stop-after", str(stop)]) == 0
        assert seen == [(c.batch, 3, 32, 32, 1.0)] * 5 + [(8, 3, 16, 16, 3.0)] * 5
        assert rates == [c.lr] * 5 + [1e-3] * 5
        seen.clear(), rates.clear()
    assert same(weights("whole"), weights("cut")) and metrics("whole")[-1]["samples"] == 5 * c.batch + 5 * 8


def test_the_rate_warms_up_stays_and_decays():
    c = T.dataclasses.replace(T.Config(), warmup=0.1, decay_from=0.6)
    share = [T.lr_share(p, 0.05, c) for p in (0.05, 0.10, 0.15, 0.5, 0.6, 0.8, 1.0)]
    assert np.allclose(share, [0.01, 0.51, 1.0, 1.0, 1.0, 0.5, 0.0])
    assert T.lr_share(0.0, 0.0, T.dataclasses.replace(c, warmup=0.0)) == T.lr_share(
        0.99, 0.0, T.dataclasses.replace(c, decay_from=1.0)) == 1.0


def test_a_broken_checkpoint_is_passed_over_with_a_sentence(in_tmp, capsys):
    run("--steps", 8, "--name", "cut", "--stop-after", 3)
    run("--steps", 8, "--name", "cut", "--stop-after", 5)
    newest = Path("logs/cut/checkpoint/step-00000005/rank-0.safetensors")
    newest.write_bytes(newest.read_bytes()[:1000])
    run("--steps", 8, "--name", "cut", "--stop-after", 6)
    out = capsys.readouterr().out
    assert "checkpoint step-00000005 is passed over" in out and "resumed from logs/cut/checkpoint/step-00000003" in out


def test_a_failed_start_leaves_nothing_that_a_later_run_believes(in_tmp, capsys):
    run("--steps", 8, "--name", "r", "--captions", "short", "--text", "/nowhere", code=2)
    assert not Path("logs/r").exists()
    Path("logs/r").mkdir(parents=True)
    Path("logs/r/config.json").write_text("{}")
    Path("logs/r/metrics.jsonl").write_text('{"elapsed": 1e9}\n{"elapsed": 2')
    run("--steps", 3, "--name", "r")
    assert max(r["elapsed"] for r in metrics("r")) < 1e9
    assert json.loads(Path("logs/r/config.json").read_text())["steps"] == 3
    run("--steps", 4, "--name", "r", "--resume", "never", "--data", "typo", code=2)
    assert weights("r")


def test_damaged_files_of_a_run_are_one_sentence_or_passed_over(in_tmp, capsys):
    run("--steps", 8, "--name", "r", "--stop-after", 2)
    with open("logs/r/metrics.jsonl", "a") as file:
        file.write('{"elapsed": 3, "losses": [1.')
    run("--steps", 8, "--name", "r")
    assert len([r for r in read_metrics(Path("logs/r")) if r.get("losses")]) == 2
    run("--steps", 8, "--name", "s", "--stop-after", 2)
    Path("logs/s/config.json").write_text("{")
    run("--steps", 8, "--name", "s", code=2)
    assert "logs/s/config.json cannot be read" in capsys.readouterr().err


def test_two_checkpoints_are_kept(in_tmp):
    for k in (2, 3, 4):
        run("--steps", 8, "--name", "r", "--stop-after", k)
    assert [p.name for p in sorted(Path("logs/r/checkpoint").iterdir())] == ["step-00000003", "step-00000004"]


def test_a_finished_run_is_left_alone_unless_told(in_tmp, capsys):
    run("--steps", 3, "--name", "r")
    first = Path("logs/r/log.txt").read_text()
    run("--steps", 3, "--name", "r")
    assert "holds a finished run" in capsys.readouterr().out and Path("logs/r/log.txt").read_text() == first
    run("--steps", 3, "--name", "r", "--resume", "never", "--seed", 1)
    assert Path("logs/r/log.txt").read_text() != first


# --- ranks

def torchrun(n, *flags):
    done = shell("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", SCRIPT, *TINY, *flags,
                 env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_ranks_follow_one_and_hand_over_to_one(in_tmp):
    """The same global batch: losses and weights equal up to summation order; one rank goes on from two's checkpoint."""
    flags = ["--steps", 12]
    run(*flags, "--name", "one")
    run(*flags, "--name", "micro", "--accumulate", 4)
    torchrun(2, *flags, "--name", "two")
    torchrun(2, *flags, "--name", "handed", "--stop-after", 6)
    assert len(list(Path("logs/handed/checkpoint/step-00000006").glob("rank-*.safetensors"))) == 2
    run(*flags, "--name", "handed")
    for name in ("two", "handed", "micro"):
        assert np.allclose(losses("one"), losses(name), rtol=1e-4), name
        assert all(torch.allclose(a, weights(name)[k], atol=2e-3) for k, a in weights("one").items()), name


def test_a_batch_that_the_ranks_cannot_share_is_refused(in_tmp, capsys, monkeypatch):
    monkeypatch.setattr(T, "setup_world", lambda: T.World(size=3))
    run("--steps", 2, code=2)
    assert "--batch 16 over --accumulate 1 is not a multiple of 3 ranks" in capsys.readouterr().err


# --- data

@pytest.mark.parametrize("depth", [0, 2])
def test_prefetch_keeps_the_order_and_hands_over_exceptions(depth):
    def items():
        yield from range(5)
        raise T.UserError("shard 7 is broken")

    loader = T.Prefetch(items(), depth)
    assert [next(loader) for _ in range(5)] == list(range(5))
    with pytest.raises(T.UserError, match="shard 7"):
        next(loader)


def test_scene_captions_follow_the_mix():
    c = T.dataclasses.replace(T.TRACKS["micro"][0], captions="mix:0.25", batch=400)
    texts = next(SceneData(c).batches(0, slice(0, 400)))[1]
    assert 0.18 < sum("background" not in t and "picture" not in t and " in " not in t and " the " not in t
                      for t in texts) / 400 < 0.32


def test_images_from_a_folder_and_from_a_tar_train_and_sample(in_tmp):
    """The README's path for one's own images, by its commands."""
    import io
    import tarfile

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
        done = shell(T.ROOT / "data/prepare.py", source, "--out", out, "--size", 32)
        assert done.returncode == 0, done.stderr
        run("--data", out, "--steps", 50, "--name", out)
        assert len(losses(out)) == 50 and Path(f"logs/{out}/samples/final.png").exists()


# --- errors: one sentence, exit code 2

@pytest.mark.parametrize("flags, says", [
    (["--bogus", "1"], "unrecognized arguments: --bogus 1"),
    (["--track", "nano"], "--track nano is unknown; use one of 24h, mini, micro"),
    (["--recipe", "magic"], "--recipe magic is unknown; use one of default"),
    (["--steps", "many"], "invalid int value: 'many'"),
    (["--track", "micro", "--data", "nowhere"], "--data nowhere holds no index.json"),
    (["--track", "micro", "--steps", "5", "--hours", "1"], "--steps and --hours both give the length"),
    (["--track", "micro", "--hours", "0"], "the run has no length"),
    (["--track", "micro", "--hidden", "100", "--heads", "3"], "--hidden 100 over --heads 3"),
    (["--track", "micro", "--resolution", "36"], "--resolution 36 is not a multiple of --patch 8"),
    (["--track", "micro", "--batch", "10", "--accumulate", "3"], "--batch 10 cannot be cut into --accumulate 3"),
    (["--track", "micro", "--warmup", "0.8", "--decay-from", "0.5"], "--warmup 0.8 ends after --decay-from 0.5"),
    (["--track", "micro", "--captions", "mix:2"], "--captions mix:2 is unknown"),
    (["--track", "micro", "--predict", "eps"], "--predict eps is unknown; use one of x, v"),
    (["--track", "micro", "--name", "../up"], "--name '../up' must be a plain folder name"),
    (["--track", "micro", "--ema", "1"], "--ema 1.0 must be at least 0 and less than 1"),
    (["--track", "micro", "--beta2", "1"], "--beta2 1.0 must be at least 0 and less than 1"),
    (["--track", "micro", "--seed", "-1"], "--seed -1 must lie in 0 to"),
    (["--track", "micro", "--text-tokens", "50"], "--text-tokens 50 must be a multiple of --text-pad 40"),
    (["--track", "micro", "--lr", "-1"], "--lr -1.0 must be positive"),
    (["--track", "micro", "--text", "/nowhere/at/all"], "--text /nowhere/at/all: /nowhere/at/all is neither a local folder"),
    (["--track", "micro", "--resume", "nothing-here"], "--resume nothing-here holds no complete checkpoint"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(in_tmp, capsys, monkeypatch, flags, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert T.main(flags) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("train_prx: ") and err.count("\n") == 1


def test_a_process_exits_with_2(in_tmp):
    done = shell(SCRIPT, "--track", "nano")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_resuming_with_other_settings_is_refused_with_both_values(in_tmp, capsys):
    run("--steps", 8, "--name", "r", "--stop-after", 2)
    run("--steps", 8, "--name", "r", "--lr", 0.5, code=2)
    assert f"--lr was {T.TRACKS['micro'][0].lr}, now 0.5" in capsys.readouterr().err


def test_ten_non_finite_steps_stop_the_run_with_a_checkpoint(in_tmp, capsys, monkeypatch):
    real, calls = T.flow_matching_loss, []

    def broken(*a):
        calls.append(1)
        loss, *rest = real(*a)
        return loss * (float("nan") if len(calls) > 4 else 1.0), *rest

    monkeypatch.setattr(T, "flow_matching_loss", broken)
    run("--steps", 20, "--name", "r", code=1)
    assert "NaN" not in Path("logs/r/metrics.jsonl").read_text()
    assert "10 steps in a row had a non-finite gradient" in capsys.readouterr().err
    state = load_file(next(Path("logs/r/checkpoint").glob("step-*")) / "rank-0.safetensors")
    assert all(v.isfinite().all() for v in state.values())


# --- the script itself

def test_importing_the_script_starts_nothing(in_tmp):
    done = shell("-c", f"import sys; sys.path.insert(0, {str(T.ROOT)!r}); import train_prx, threading, os; "
                       "assert threading.active_count() == 1 and not os.listdir('.'); "
                       "assert not {'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_every_knob_has_its_help_and_the_script_stays_readable():
    assert set(HELP) == {f.name for f in T.dataclasses.fields(T.Config)}
    lines = T.SOURCE.splitlines()
    assert len(lines) <= 1650 and max(map(len, lines)) <= 120


def test_the_repository_stays_small():
    """No file over 2 MiB, all of them under 40 MiB (what git tracks; without git, what lies there)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=T.ROOT, capture_output=True, text=True)
    files = [T.ROOT / f for f in listed.stdout.split("\0") if f] if listed.returncode == 0 else [
        p for p in T.ROOT.rglob("*") if p.is_file() and not {".venv", "logs", ".git"} & set(p.parts)]
    sizes = {f: f.stat().st_size for f in files if f.exists()}
    assert max(sizes.values()) <= 2 << 20 and sum(sizes.values()) <= 40 << 20


def test_no_pickle_anywhere():
    for path in [T.ROOT / "train_prx.py", T.ROOT / "eval_prx.py", *(T.ROOT / "data").glob("*.py")]:
        text = path.read_text()
        assert "torch.load(" not in text and "torch.save(" not in text and "import pickle" not in text, path
