"""Before a run trains: everything that is wrong is said at once, and --dry-run prints a plan whose figures are right."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run
from test_shards import LATENT, config, write_shards

import train_prx as T

MICRO = ["--track", "micro", "--compile", "off"]


def problems(*flags, world=None):
    """What open_everything refuses, a sentence a line; nothing if it takes it all."""
    config, stages = T.parse_args(list(flags))
    try:
        configs = [stage.config(config) for stage in stages]
        T.open_everything(configs, any(c.repa for c in configs), world or T.World())
    except T.UserError as error:
        return str(error).splitlines()
    return []


def rows(text):
    """The plan's table: {stage: {column: cell}}."""
    lines = [line.replace("peak GB", "peakGB").split() for line in text.splitlines()]
    begin = next(i for i, line in enumerate(lines) if line[:2] == ["stage", "px"])
    count = next(i for i, line in enumerate(lines[begin:]) if line[:2] == ["a", "checkpoint:"])
    table = lines[begin:begin + count]
    assert all(len(line) == len(table[0]) for line in table)
    return {line[0]: dict(zip(table[0], line)) for line in table[1:]}


# --- all problems at once

def test_everything_wrong_is_said_at_once(in_tmp, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = T.main(["--data", "nowhere", "--batch", "64", "--accumulate", "64"])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and not Path("logs").exists()
    for wanted in ("--data nowhere holds no index.json; write it with data/prepare.py",
                   "track 24h needs CUDA GPUs, and torch finds none; --track micro runs on a CPU",
                   "--vae repa-e cannot be loaded (", "the teacher dinov3 cannot be loaded ("):
        assert sum(wanted in line for line in said) == 1, (wanted, said)
    assert len(said) == 4  # the two stages' folder is named once; whether it would need an encoder nobody knows


def test_missing_networks_pass_on_what_the_library_says(in_tmp):
    """Its own sentence, and one hint: where the repository is gated, how to log in."""
    for name, make in (("--vae flux", T.VAE), ("--text t5gemma", T.TextEncoder), ("the teacher dinov2", T.Teacher)):
        with pytest.raises(T.UserError) as error:
            make(name.split()[-1])
        said = str(error.value)
        assert said.startswith(f"{name} cannot be loaded (") and said.count("\n") == 0
        assert "hf auth login" in said and "local folder" in said
        assert not said.startswith(f"{name} cannot be loaded ()")


def test_a_teacher_that_lacks_weights_is_refused(in_tmp, scene_folder):
    """The library would draw them at random."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(scene_folder / "teacher", "teacher")
    tensors = load_file("teacher/model.safetensors")
    assert T.Teacher("teacher").width > 0
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, "teacher/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(T.UserError, match="it lacks weights such as"):
        T.Teacher("teacher")


def test_stages_must_store_the_same_text(in_tmp, monkeypatch):
    write_shards(in_tmp / "long", text=dict(text="tiny", width=96, max_tokens=40))
    write_shards(in_tmp / "plain")
    monkeypatch.setitem(T.TRACKS, "micro", (T.TRACKS["micro"][0], [T.Stage("a"), T.Stage("sft")]))
    [said] = problems(*MICRO, "--data", "long", "--sft-data", "plain")
    assert "the stages' data differ in the text that they store" in said
    assert problems(*MICRO, "--data", "long", "--sft-data", "long") == []


def test_latents_of_another_vae_are_refused_with_both(tmp_path):
    write_shards(tmp_path / "d", latent=LATENT, image=None)
    vae = SimpleNamespace(factor=8, about=LATENT)
    c = config(tmp_path / "d", vae="v", patch=1)
    assert T.Shards(c, 0, vae).latent == LATENT
    for key, value in dict(sha256="cd", scale=0.6, channels=16).items():
        with pytest.raises(T.UserError, match="the latents of .* were made by .*, and --vae v is ") as error:
            T.Shards(c, 0, SimpleNamespace(factor=8, about=LATENT | {key: value}))
        assert str(LATENT[key]) in str(error.value) and str(value) in str(error.value)
    with pytest.raises(T.UserError, match="32 x 32 px cannot be cut into tokens of 24 px"):
        T.Shards(replace(c, patch=3), 0, vae)


def test_ranks_must_divide_the_micro_batch_of_every_stage(in_tmp, scene_folder, monkeypatch):
    stages = [T.Stage("a"), T.Stage("b", knobs=dict(batch=60, accumulate=4))]
    monkeypatch.setitem(T.TRACKS, "micro", (T.TRACKS["micro"][0], stages))
    world = T.World(size=2)
    [said] = problems(*MICRO, "--data", str(scene_folder), world=world)
    assert said == "--batch 60 over --accumulate 4 is not a multiple of 2 ranks; change one of them"


def test_only_networks_that_are_needed_are_opened(in_tmp):
    """Stored text needs no encoder, stored latents with no REPA no teacher."""
    write_shards(in_tmp / "stored", text=dict(text="t5gemma", width=96, max_tokens=40))
    write_shards(in_tmp / "raw")
    flags = [*MICRO, "--text", "t5gemma", "--repa", "0", "--data"]
    assert problems(*flags, "stored") == [] and "--text t5gemma" in "".join(problems(*flags, "raw"))
    c, stages = T.parse_args([*flags, "stored"])
    _, frozen = T.open_everything([stages[0].config(c)], False, T.World())
    assert frozen == T.Frozen()


def test_networks_of_a_mixture_are_the_first_folders(in_tmp):
    write_shards(in_tmp / "a")
    write_shards(in_tmp / "b", first=100)
    (in_tmp / "b/text").unlink()
    assert problems(*MICRO, "--data", "a:0.5,b:0.5") == []
    [said] = problems(*MICRO, "--data", "b:0.5,a:0.5")
    assert "--text b/text cannot be loaded" in said


# --- tracks and their data

def test_stages_are_chosen_by_name_and_sft_where_there_is_data(in_tmp, capsys):
    names = lambda *flags: [s.name for s in T.parse_args(list(flags))[1]]
    assert names() == ["256px", "512px"] and names("--stages", "512px") == ["512px"]
    assert names("--sft-data", "best") == ["256px", "512px", "sft"]
    assert names("--sft-data", "best", "--stages", "256px,sft") == ["256px", "sft"]
    config, stages = T.parse_args(["--sft-data", "best", "--lr", "7"])
    each = [stage.config(config) for stage in stages]
    assert [c.data for c in each] == ["shards/24h", "shards/24h", "best"] and {c.lr for c in each} == {7.0}
    (in_tmp / "shards/24h-sft").mkdir(parents=True)
    (in_tmp / "shards/24h-sft/index.json").touch()
    config, stages = T.parse_args([])
    assert names() == ["256px", "512px", "sft"] and stages[2].config(config).data == "shards/24h-sft"
    assert names("--data", "mine") == ["256px", "512px"]
    with pytest.raises(T.UserError, match="--stages sft is unknown; this run has 256px,512px"):
        names("--data", "mine", "--stages", "sft")


def test_the_name_of_a_run_is_its_track_and_its_data():
    name = lambda *flags: T.parse_args(["--track", "micro", *flags])[0].name
    assert name() == "micro" and name("--data", "my/cats") == "micro-cats" and name("--name", "x") == "x"
    assert name("--data", "a b:0.5,c:0.5") == "micro-a_b-c"


# --- disk

def test_disk_must_hold_three_checkpoints_and_the_exports(shards, monkeypatch, capsys):
    run("--steps", 8, "--name", "r", "--samples", 1, "--stop-after", 2)
    written = sum(p.stat().st_size for p in Path("logs/r/checkpoint/step-00000002").glob("rank-*"))
    weights = 4 * sum(p.numel() for p in T.PRX(**json.loads(json.dumps(small()))).parameters())
    free = [3 * written * 1.02 + 2 * weights]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    run("--steps", 8, "--name", "s", "--samples", 1, "--stop-after", 2)
    free[0] = 3 * written * 0.95
    run("--steps", 8, "--name", "t", "--samples", 1, "--stop-after", 2, code=2)
    assert "GB free and the run needs" in capsys.readouterr().err
    free[0] += 1.1 * written  # what the run itself has there is room that it has
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0] + weights * 2 - 1.02 * written))
    run("--steps", 8, "--name", "r", "--samples", 1, "--stop-after", 4)


def small():
    return dict(in_channels=3, patch_size=8, context_in_dim=96, hidden_size=32, mlp_ratio=3.5, num_heads=2, depth=2)


# --- the plan

def dry(capsys, *flags):
    assert T.main([*map(str, flags), "--dry-run"]) == 0
    return capsys.readouterr().out


def test_dry_run_checks_and_leaves_nothing_behind(shards, capsys):
    said = dry(capsys, *TINY, "--steps", 100)
    row = rows(said)["main"]
    assert "nothing is in the way" in said and not Path("logs").exists()
    assert (row["px"], row["tokens"], row["text"], row["batch"]) == ("32", "16", "40", "16")
    assert (row["samples"], row["epochs"]) == ("1,600", "0.78") and row["images/s"] == row["peakGB"] == "-"


def test_dry_run_does_not_touch_a_run(shards, capsys):
    run("--steps", 4, "--name", "r", "--stop-after", 2)
    before = {p: p.stat().st_mtime_ns for p in Path("logs").rglob("*")}
    dry(capsys, *TINY, "--steps", 4, "--name", "r")
    assert {p: p.stat().st_mtime_ns for p in Path("logs").rglob("*")} == before


def test_the_plans_derived_figures_are_right(shards, capsys):
    said = dry(capsys, *TINY, "--steps", 10)
    assert "derived: TFLOP/image (3 x flops_per_image), samples" in said and "measured: images/s" in said
    d, n, t = 32, 16, 40  # multiply-adds of a block and image: qkv, out, MLP; text K, V; modulation; attention
    block = n * (4 * d * d + 3 * 3.5 * d * d) + t * 2 * d * d + 6 * d * d + 2 * n * (n + t) * d
    flops = 3 * 2 * (2 * block + n * 2 * (3 * 8 * 8) * d + t * 96 * d)
    assert float(rows(said)["main"]["TFLOP/image"]) == pytest.approx(flops / 1e12, rel=1e-3)
    checkpoint = float(re.search(r"a checkpoint: ([\d.e-]+) GB", said)[1])
    run("--steps", 10, "--name", "r", "--stop-after", 1)
    assert checkpoint * 1e9 == pytest.approx(
        Path("logs/r/checkpoint/step-00000001/rank-0.safetensors").stat().st_size, rel=0.03)  # its header


def test_flops_are_what_torch_counts(monkeypatch):
    """One forward pass with the text projections, against torch's own counter; the time embedding is left out."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(T, "BACKENDS", [T.SDPBackend.MATH])  # the only one that it counts on CPUs
    model = T.PRX(**small() | dict(span=(1, 2)))
    inputs = torch.zeros(1, 3, 32, 32), torch.rand(1), torch.zeros(1, 7, 96), torch.ones(1, 7, dtype=torch.bool)
    time_ = 2 * (256 + 32) * 32 + 2 * 32 * 64  # its two layers, and the last modulation
    for kept in (0, 5):
        keep = torch.arange(kept)[None] if kept else None
        with FlopCounterMode(display=False) as counter:
            model(*inputs, keep=keep)
        ours = T.flops_per_image(model.config, 16, 7, kept, (1, 2))
        assert ours == pytest.approx(counter.get_total_flops() - time_, rel=0.01), kept


def test_routing_saves_flops_in_its_blocks():
    c = T.PRX(depth=1).config | dict(depth=16)
    full, routed = T.flops_per_image(c, 1024, 256), T.flops_per_image(c, 1024, 256, 512, (2, 13))
    share = 11 / 16 / 2  # of the image tokens
    assert 1 - share * 1.1 < routed / full < 1 - share * 0.8
    assert T.kept_tokens(1024, 0.5) == 512 and T.kept_tokens(3, 0.99) == 1


def test_what_the_warm_up_measured_fills_the_other_columns(in_tmp, monkeypatch, capsys):
    """As on CUDA: half a second a step and 3 GB in the first stage, a quarter and 5 in the second."""
    write_shards(in_tmp / "d", ((40, 32, 32, "train"), (60, 16, 16, "train", 16)))
    c = replace(T.TRACKS["micro"][0], repa=0.0)
    stages = [T.Stage("a", 3.0), T.Stage("b", 1.0, dict(resolution=16, batch=16))]
    monkeypatch.setitem(T.TRACKS, "micro", (c, stages))
    monkeypatch.setattr(T, "warm_up", lambda r: {0: (0.5, 3e9), 1: (0.25, 5e9)})
    a, b = rows(dry(capsys, *MICRO, "--data", "d", "--hours", 1)).values()
    assert (a["images/s"], a["peakGB"], b["images/s"], b["peakGB"]) == ("64", "3.0", "64", "5.0")
    assert (a["samples"], b["samples"]) == ("172,800", "57,600")  # three quarters and a quarter of an hour
    assert (a["epochs"], b["epochs"]) == ("4320.00", "960.00") and (a["tokens"], b["tokens"]) == ("16", "4")
    a, b = rows(dry(capsys, *MICRO, "--data", "d", "--steps", 100)).values()
    assert (a["samples"], b["samples"]) == ("2,400", "400")


def test_a_large_model_on_a_cpu_is_planned_without_a_warm_up(shards, monkeypatch, capsys):
    monkeypatch.setattr(T, "LARGE", 1000)
    monkeypatch.setattr(T, "MuonAdamW", lambda *a: pytest.fail("a plan needs no optimizer"))
    monkeypatch.setattr(T, "training_step", lambda *a: pytest.fail("it was warmed up"))
    said = dry(capsys, *TINY, "--steps", 10)
    assert "no warm-up: on a CPU a model of this size takes minutes a step" in said and rows(said)["main"]["px"] == "32"
