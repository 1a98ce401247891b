"""Sampling: Heun against closed forms, painting from the command line, curves, and the same result on any ranks."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval_prx
import train_prx
from eval_prx import heun, main
from test_eval import cache, refused, run  # noqa: F401: fixtures


class Decay(torch.nn.Module):
    """A velocity field v = x * (a + b t), a and b from the text: x(0) = x(1) exp(-(a + b / 2)) exactly."""

    def forward(self, x, t, text, mask):
        a, b = text[:, 0, 0], text[:, 0, 1]
        return x * (a + b * t)[:, None, None, None]


def ode(a, b, n=1):
    return torch.tensor([[[a, b]]]).expand(n, -1, -1), torch.ones(n, 1, dtype=torch.bool)


def test_heun_is_second_order_and_euler_first():
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = noise * math.exp(-(0.7 + 0.9 / 2))
    errors = {}
    for name, sampler in (("euler", train_prx.sample), ("heun", heun)):
        errors[name] = [(sampler(Decay(), noise, *ode(0.7, 0.9, 3), *ode(0.0, 0.0), steps=steps, cfg_scale=1.0,
                                 shift=1.0, predict="v") - truth).abs().max().item() for steps in (8, 16, 32)]
    order = {name: [math.log2(a / b) for a, b in zip(e, e[1:])] for name, e in errors.items()}
    assert all(0.8 < o < 1.2 for o in order["euler"]) and all(1.6 < o < 2.4 for o in order["heun"])
    assert errors["heun"][0] < 0.2 * errors["euler"][0]


def test_heun_guides_as_the_trainers_sampler_does():
    """With one step it is Euler's; guidance of a linear field is the field of the guided coefficients."""
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    options = dict(cfg_scale=2.5, shift=2.0)
    for predict in "vx":
        one = [sampler(Decay(), noise, *ode(0.7, 0.2, 2), *ode(0.3, 0.1), steps=1, predict=predict, **options)
               for sampler in (train_prx.sample, heun)]
        assert torch.allclose(*one, atol=1e-6)
    guided = heun(Decay(), noise, *ode(0.7, 0.2, 2), *ode(0.3, 0.1), steps=6, predict="v", **options)
    same = heun(Decay(), noise, *ode(0.3 + 2.5 * 0.4, 0.1 + 2.5 * 0.1, 2), *ode(0.0, 0.0), steps=6, predict="v",
                cfg_scale=1.0, shift=2.0)
    assert torch.allclose(guided, same, atol=1e-5)


# Painting for people

def pixels(path):
    return np.array(Image.open(path)).astype(int)


def test_a_prompt_becomes_a_grid_and_a_folder(run, tmp_path, capsys):  # noqa: F811
    argv = ["sample", str(run), "a red ring", "--n", "3", "--seed", "1", "--steps", "2"]
    assert main([*argv, "--out", str(tmp_path / "grid.png")]) == 0
    said = capsys.readouterr().out
    assert "3 images of 32 px in 2 steps on cpu: about" in said and "grid.png" in said
    assert main([*argv, "--out", str(tmp_path / "folder"), "--batch", "2"]) == 0
    single = [pixels(tmp_path / "folder" / f"00000-0{i}.png") for i in range(3)]
    assert single[0].shape == (32, 32, 3) and not (single[0] == single[1]).all()
    assert abs(pixels(tmp_path / "folder.png") - pixels(tmp_path / "grid.png")).max() <= 1
    assert main([*argv[:-3], "2", "--steps", "2", "--out", str(tmp_path / "other")]) == 0  # another seed
    assert not (pixels(tmp_path / "other" / "00000-00.png") == single[0]).all()

    (tmp_path / "prompts.txt").write_text("a blue square\n\na red ring\n")
    assert main(["sample", str(run), "--prompts", str(tmp_path / "prompts.txt"), "--n", "1", "--seed", "1", "--steps",
                 "2", "--out", str(tmp_path / "many")]) == 0
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["00000-00.png", "00001-00.png"]
    assert abs(pixels(tmp_path / "many" / "00001-00.png") - single[0]).max() <= 1  # its own noise, whatever the others


def test_a_run_on_other_data_can_paint_too(run, tmp_path):  # noqa: F811
    other = tmp_path / "photos"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text()) | {"data": "shards/photos"}
    (other / "config.json").write_text(json.dumps(config))
    assert main(["sample", str(other), "a red ring", "--n", "1", "--steps", "1", "--out", str(tmp_path / "g.png")]) == 0


def test_bad_requests_are_one_sentence(run, tmp_path, capsys):  # noqa: F811
    assert "nothing to paint" in refused(capsys, "sample", run)
    assert "missing.txt cannot be read" in refused(capsys, "sample", run, "--prompts", tmp_path / "missing.txt")
    assert "--n 0" in refused(capsys, "sample", run, "a", "--n", "0")
    assert "--steps 0" in refused(capsys, "sample", run, "a", "--steps", "0")
    assert "10,001 characters" in refused(capsys, "sample", run, "a" * 10_001)
    assert "--out ." in refused(capsys, "sample", run, "a", "--out", ".")
    assert "x.gif" in refused(capsys, "sample", run, "a", "--out", tmp_path / "x.gif")
    assert "no config.json" in refused(capsys, "sample", tmp_path, "a")
    assert "--tread" in refused(capsys, "sample", run, "a", "--guidance", "self")
    assert "--sampler euler" in refused(capsys, run, "--guidance", "self", "--sampler", "heun")
    for sweep in ("cfg", "cfg=", "cfg=a", "steps=0", "shift=1"):
        assert f"--sweep {sweep}" in refused(capsys, run, "--sweep", sweep)
    assert "no checkpoints" in refused(capsys, run, "--checkpoints", "all")


# Curves

NOTHING = ["--inception", "none", "--dino", "none"]


def test_a_sweep_is_the_single_evaluations_with_the_networks_loaded_once(run, tmp_path, monkeypatch):  # noqa: F811
    loaded, init = [], eval_prx.Features.__init__
    monkeypatch.setattr(eval_prx.Features, "__init__", lambda self, *a: (loaded.append(a[0]), init(self, *a))[1])
    argv = [str(run), "--n", "8", "--steps", "2", "--out", str(tmp_path), *NOTHING]
    assert main([*argv, "--sweep", "cfg=1,4"]) == 0 and loaded == ["clip"]
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    assert sweep["axis"] == "cfg" and [point["cfg"] for point in sweep["points"]] == [1, 4]
    assert Image.open(tmp_path / "sweep.png").width > 500
    for point in sweep["points"]:
        assert main([*argv, "--cfg", str(point["cfg"])]) == 0
        alone = json.loads((tmp_path / "metrics.json").read_text())
        assert point["metrics"] == alone["metrics"] and point["protocol_sha256"] == alone["protocol_sha256"]
    assert sweep["points"][0]["metrics"]["eval"]["cmmd"] != sweep["points"][1]["metrics"]["eval"]["cmmd"]
    assert main([*argv, "--sweep", "steps=1,3"]) == 0
    assert [point["steps"] for point in json.loads((tmp_path / "sweep.json").read_text())["points"]] == [1, 3]


def test_checkpoints_are_judged_by_their_ema_and_the_last_is_the_final_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = ("--track micro --repa 0 --ema 0.99 --hidden 32 --heads 2 --depth 1 --batch 8 --samples 0 --sample-steps 2 --compile off "
            "--compute fp32 --ema 0.5 --ema-every 1 --lr 0.01 --lr-adamw 0.01").split()
    for stop in (["--stop-after", "3"], []):
        assert train_prx.main([*tiny, "--steps", "6", *stop]) == 0
    argv = ["logs/micro", "--n", "8", "--steps", "2", *NOTHING]
    assert main([*argv, "--checkpoints", "all"]) == 0
    first, last = json.loads((tmp_path / "logs/micro/sweep.json").read_text())["points"]
    assert (first["step"], last["step"]) == (3, 6) and first["metrics"] != last["metrics"]
    assert main(argv) == 0  # transformer/ holds the EMA
    final = json.loads((tmp_path / "logs/micro/metrics.json").read_text())
    assert final["metrics"]["eval"] == pytest.approx(last["metrics"]["eval"], rel=1e-6)
    assert main([*argv, "--weights", "raw"]) == 0
    raw = json.loads((tmp_path / "logs/micro/metrics.json").read_text())
    assert raw["metrics"]["eval"]["cmmd"] != pytest.approx(final["metrics"]["eval"]["cmmd"], rel=1e-6)
    assert raw["protocol"]["weights"] == "raw" and raw["protocol_sha256"] != final["protocol_sha256"]
    (tmp_path / "logs/micro/checkpoint/step-00000003/rank-0.safetensors").write_bytes(b"damaged")
    assert "step-00000003 cannot be read" in refused(capsys, *argv, "--checkpoints", "all")


# Ranks

def test_the_result_does_not_depend_on_the_number_of_ranks(run, tmp_path):  # noqa: F811
    results = []
    for ranks in (1, 2, 4):
        out = tmp_path / f"ranks-{ranks}"
        argv = [str(run), "--n", "44", "--steps", "2", "--batch", "5", "--out", str(out)]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"]
        if ranks == 1:
            assert main(argv) == 0
        else:
            env = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(out / "cache")}
            done = subprocess.run([*launch, eval_prx.__file__, *argv], capture_output=True, text=True, env=env)
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.count("accuracy  ") == 1  # one rank speaks
        results.append(json.loads((out / "metrics.json").read_text()))
    one = results[0]
    for many in results[1:]:
        assert many["protocol_sha256"] == one["protocol_sha256"]
        for column, values in one["metrics"].items():
            assert many["metrics"][column] == pytest.approx(values, rel=1e-6, abs=1e-9)
        assert many["intervals"]["eval"]["cmmd"] == pytest.approx(one["intervals"]["eval"]["cmmd"], rel=1e-6)
    grids = [pixels(tmp_path / f"ranks-{ranks}" / "samples.png") for ranks in (1, 2, 4)]
    assert (grids[0] == grids[1]).all() and (grids[0] == grids[2]).all()
