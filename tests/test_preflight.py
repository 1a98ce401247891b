"""Promises of data/preflight.py and data/plan.py: everything wrong at once, and a plan whose figures are right."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from test_shards import write_shards
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_prx as T
from data import plan as P
from data import preflight as F
from data.settings import parse_args

ROOT = Path(T.ROOT)
GPU = T.World(device=torch.device("cuda", 0))
MICRO = ["--track", "micro"]


def outlines(flags=(), **knobs):
    config, stages = parse_args(list(flags))
    return [P.Outline(replace(T.stage_config(config, stage), **knobs)) for stage in stages]


def problems(flags, world=T.World()):
    config, stages = parse_args(flags)
    return F.check(config, stages, world, Path("logs") / config.name)[1]


def rows(text):
    """The plan's table: {stage: {column: cell}}."""
    shape = re.compile(r"stage  |\S+ +[\d.?]+ ?(h|min)? +\d+ ")
    lines = [re.split(r"  +", line) for line in text.splitlines() if shape.match(line)]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[1:]}


def network_folder(path, **config):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(bytes(400))
    return path


# ---- all problems at once --------------------------------------------------------------------------------------------


def test_everything_wrong_is_said_at_once(in_tmp, capsys):
    code = T.main(["--data", "nowhere", "--batch", "64", "--repa", "0.5", "--init", "no/such/thing"])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and not Path("logs").exists()
    for wanted in ("nowhere holds no index.json; give 'scenes' or folders that data/prepare.py wrote",
                   "track 24h needs CUDA GPUs and there is none here; `python train_prx.py --track micro`",
                   "--vae repa-e: REPA-E/e2e-flux-vae is not in the local Hugging Face cache",
                   "--repa-teacher dinov3: facebook/dinov3-vitl16-pretrain-lvd1689m is not in the local",
                   "--init no/such/thing: no/such/thing is neither a local folder nor a repository"):
        assert sum(wanted in line for line in said) == 1, (wanted, said)
    assert len(said) == 5


def test_no_data_is_a_problem_beside_the_others(in_tmp):
    said = problems([])
    assert said[0] == "track 24h needs --data FOLDER with shards that data/prepare.py wrote" and len(said) >= 3


def test_scenes_are_checked_without_heavy_imports(tmp_path):
    """Neither transformers nor diffusers nor the hub's client: a start on two cores stays quick."""
    script = ("import sys, train_prx as T\nfrom pathlib import Path\nfrom data import preflight as F\nfrom data.settings import parse_args\n"
              "config, stages = parse_args(['--track', 'micro'])\n"
              "data, problems = F.check(config, stages, T.World(), Path('logs/micro'))\n"
              "assert len(data) == 1 and not problems, problems\nF.plan(config, stages, data)\n"
              "heavy = {'transformers', 'diffusers', 'huggingface_hub'} & set(sys.modules)\nassert not heavy, heavy")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_dry_run_checks_and_leaves_nothing_behind(in_tmp, capsys):
    assert T.main([*MICRO, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "nothing is in the way" in said and rows(said)["main"]["tokens"] == "16" and not Path("logs").exists()


def test_a_problem_on_one_rank_reaches_all(tmp_path):
    """Rank 0 alone speaks: it must know what is wrong on another machine."""
    script = tmp_path / "ranks.py"
    script.write_text("from pathlib import Path\nimport train_prx as T\nfrom data import preflight as F\n"
                      "from data.settings import parse_args\n"
                      "world = T.setup_world()\nflags = ['--track', 'micro'] + ['--data', 'gone'] * world.rank\n"
                      "_, problems = F.check(*parse_args(flags), world, Path('logs/x'))\n"
                      "assert len(problems) == 1 and 'gone holds no index.json' in problems[0], problems\n"
                      "world.barrier()\nT.dist.destroy_process_group()\n")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE="2",
                                PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen([sys.executable, script], cwd=tmp_path, env=env | dict(RANK=str(r))) for r in (0, 1)]
    assert [rank.wait(100) for rank in ranks] == [0, 0]


# ---- data ------------------------------------------------------------------------------------------------------------


def test_images_that_cannot_be_cut_are_refused_before_training(in_tmp):
    write_shards(in_tmp / "shards")
    [said] = problems([*MICRO, "--data", "shards", "--patch", "12"])
    assert "images of 32 x 32 px cannot be cut into tokens of 12 px (--vae none and --patch 12)" in said


def test_an_image_in_both_splits_is_found(in_tmp):
    write_shards(in_tmp / "a", parts=((8, 32, 32, "train"),))
    write_shards(in_tmp / "b", parts=((4, 32, 32, "eval"), (8, 32, 32, "train")))
    [said] = problems([*MICRO, "--data", "a,b"])
    assert "4 images are in the training set of a,b and in the evaluation set of a,b" in said


def test_stages_must_store_the_same_text(in_tmp):
    write_shards(in_tmp / "long", text=dict(text="tiny", width=96, max_tokens=80))
    write_shards(in_tmp / "sft")
    config, _ = parse_args([*MICRO, "--data", "long"])
    stages = [T.Stage("main"), T.Stage("sft", knobs=dict(data="sft"))]
    _, [said] = F.check(config, stages, T.World(), Path("logs/x"))
    assert "the stages' data sets differ in the text that they store" in said


def test_latents_of_another_vae_are_refused(in_tmp):
    latent = dict(vae="flux2", type="AutoencoderKLFlux2", channels=4, factor=8, scale=1.0, shift=0.0, sha256="ab")
    write_shards(in_tmp / "shards", latent=latent)
    said = problems([*MICRO, "--data", "shards", "--vae", "flux", "--patch", "2"])
    assert any("were made by flux2, and --vae flux has 16 channels and factor 8" in line for line in said)


def test_ranks_must_divide_the_micro_batch(in_tmp):
    assert problems([*MICRO, "--batch", "60", "--accumulate", "4"], T.World(0, 2)) == [
        "--batch 60 over --accumulate 4 is not a multiple of 2 ranks; change one of them"]


# ---- networks --------------------------------------------------------------------------------------------------------


def response(status):
    return SimpleNamespace(status_code=status, headers={}, request=None, text="")


@pytest.mark.parametrize("raised, said", [
    (errors.GatedRepoError("403 Client Error", response=response(403)),
     "is gated; accept its licence on https://huggingface.co/black-forest-labs/FLUX.1-schnell and log in with "
     "`hf auth login`, or use --vae none"),
    (errors.HfHubHTTPError("403: enable gated repositories in your token", response=response(403)), "is gated; accept"),
    (errors.RepositoryNotFoundError("401 Client Error", response=response(401)),
     "is neither a local folder nor a repository that you may see; use one of repa-e, flux, flux2, dc-ae, check the "
     "spelling, log in with `hf auth login` if it is private, or use --vae none"),
    (errors.RemoteEntryNotFoundError("404 Client Error", response=response(404)), "holds no config.json"),
    (ConnectionError("Name or service not known"),
     "cannot be asked for (Name or service not known); run `hf download black-forest-labs/FLUX.1-schnell` (of a "
     "pipeline vae/ is enough) where there is a network, give a local folder, or use --vae none"),
    (None, None)])
def test_what_the_hub_says_becomes_a_sentence(monkeypatch, raised, said):
    asked = []

    def metadata(self, *, url, timeout):
        asked.append(url)
        assert timeout <= 10
        if raised:
            raise raised

    monkeypatch.setattr(huggingface_hub.HfApi, "get_hf_file_metadata", metadata)
    problem = F.check_network("vae", "flux")
    assert asked[0].endswith("black-forest-labs/FLUX.1-schnell/resolve/main/vae/config.json")
    assert problem is None if said is None else said in problem and problem.startswith("--vae flux: ")


def test_offline_mode_asks_nobody():
    said = F.check_network("text", "t5gemma")  # the tests run with HF_HUB_OFFLINE=1
    assert "google/t5gemma-2b-2b-ul2 is not in the local Hugging Face cache and cannot be asked for" in said
    assert "offline mode" in said and "--store text" in said and "--text tiny" in said


def test_the_cache_counts_when_it_is_whole(monkeypatch, tmp_path):
    index = tmp_path / "index"
    index.write_text(json.dumps(dict(weight_map=dict(a="m-1.safetensors", b="m-2.safetensors"))))
    cache = {"config.json": "x", "model.safetensors.index.json": str(index), "m-1.safetensors": "x"}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: cache.get(file))
    assert "not in the local Hugging Face cache" in F.check_network("text", "t5gemma")
    cache["m-2.safetensors"] = "x"
    assert F.check_network("text", "t5gemma") is None


def test_local_folders_must_hold_a_network(tmp_path):
    assert F.check_network("text", str(network_folder(tmp_path / "encoder"))) is None
    assert F.check_network("text", "tiny") is None
    network_folder(tmp_path / "pipeline/vae")
    assert F.check_network("vae", str(tmp_path / "pipeline")) is None
    (tmp_path / "empty").mkdir()
    assert "has no config.json with .safetensors weights beside it" in F.check_network("init", str(tmp_path / "empty"))
    assert "neither a local folder nor a repository" in F.check_network("vae", "../gone")


def test_stored_text_needs_no_encoder(in_tmp):
    write_shards(in_tmp / "stored", text=dict(text="t5gemma", width=96, max_tokens=80))
    write_shards(in_tmp / "raw")
    flags = [*MICRO, "--text", "t5gemma", "--data"]
    assert problems([*flags, "stored"]) == [] and "t5gemma" in "".join(problems([*flags, "raw"]))


# ---- disk, memory ----------------------------------------------------------------------------------------------------


def test_disk_must_hold_the_checkpoints(in_tmp, monkeypatch):
    [o] = outlines(MICRO)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=o.disk - 1))
    [said] = problems(MICRO)
    assert "0.1 GB free" in said and "3 checkpoints" in said and "make logs/ a link to a larger disk" in said
    run = in_tmp / "logs/micro/checkpoint/step-00000001"  # what the run itself has there is room that it has
    run.mkdir(parents=True)
    (run / "rank-0.safetensors").write_bytes(b"x")
    assert problems(MICRO) == []


def test_checkpoints_have_the_size_that_the_plan_says(in_tmp):
    model = T.PRX(hidden_size=64, num_heads=2, depth=2)
    for recipe in ("default", "baseline"):
        c, _ = parse_args("--hidden 64 --heads 2 --depth 2 --repa 0 --tread 0 --recipe".split() + [recipe])
        state = T.MuonAdamW(model.named_parameters(), c).state_dict()
        assert P.Outline(c).checkpoint == sum(x.numel() * 4 for x in state.values())


def saved_bytes(c, side, text_tokens, batch, compiled, dtype):
    """What autograd keeps, storages counted once, parameters not."""
    torch.manual_seed(0)
    model = T.PRX(hidden_size=c.hidden, num_heads=c.heads, depth=c.depth, mlp_ratio=c.mlp_ratio).initialize()
    model.set_compute_dtype(dtype)
    for block in model.blocks if compiled else ():
        block.compile(dynamic=False, backend="aot_eager_decomp_partition")  # the partition that inductor makes
    own, seen, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    x, eps = torch.randn(2, batch, 16, 2 * side, 2 * side)
    text, mask = torch.randn(batch, text_tokens, 2304).to(dtype), torch.ones(batch, text_tokens, dtype=torch.bool)
    inputs = model, x, eps, torch.rand(batch), text, mask, "v"
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        if compiled:
            T.flow_matching_loss(*inputs)
            seen.clear()
        loss = T.flow_matching_loss(*inputs)
    assert loss is not None
    return sum(seen.values())


@pytest.mark.parametrize("hidden, depth, side, text_tokens, mlp, compute, compiled", [
    (128, 2, 16, 64, 3.5, "bf16", False), (256, 3, 8, 128, 3.5, "bf16", False), (128, 2, 8, 64, 2.0, "fp32", False),
    (128, 2, 16, 64, 3.5, "bf16", True), (256, 2, 8, 192, 3.5, "bf16", True)])
def test_activations_are_what_autograd_keeps(hidden, depth, side, text_tokens, mlp, compute, compiled, monkeypatch):
    monkeypatch.setattr(T, "attention_dtype", lambda x: x.dtype)  # as on CUDA, which the estimate is for
    o = P.Outline(T.Config(hidden=hidden, heads=hidden // 64, depth=depth, text_tokens=text_tokens, mlp_ratio=mlp,
                           resolution=16 * side, compute=compute, compile="on" if compiled else "off"))
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    counted = saved_bytes(o.c, side, text_tokens, 4, compiled, dtype)
    assert o.tokens == side * side and abs(o.activations(4) / counted - 1) < 0.1, (o.activations(4), counted)


def test_routing_saves_memory_and_flops_in_its_blocks():
    full, routed = outlines(tread=0.0, repa=0.0)[1], outlines(tread=0.5, repa=0.0)[1]
    assert (full.tokens, routed.kept, routed.routed) == (1024, 512, 11)
    share = 11 / 16 / 2  # of the image tokens
    assert 1 - share < routed.activations(1) / full.activations(1) < 1 - share * 0.8
    assert 1 - share * 1.1 < routed.flops() / full.flops() < 1 - share * 0.8


def test_memory_is_static_state_plus_the_largest_phase():
    o = outlines(repa=0.0)[0]
    parts, n = o.memory(1, 1), 1_170_691_648
    assert o.parameters == n
    assert parts["weights"] == 2 * n and parts["FP32 gradients"] == 4 * n and parts["the step"] == pytest.approx(3.6 * n)
    assert parts["masters, EMA and momenta"] == pytest.approx(12 * n, rel=0.02)
    assert o.memory(8, 1)["masters, EMA and momenta"] == pytest.approx(1.5 * n, rel=0.02)
    assert "activations and gradients" in o.memory(1, 128)


class Peak(TorchDispatchMode):
    """Bytes that are new since it began, and their peak. known: what was there before."""

    def __init__(self, known):
        super().__init__()
        self.sizes, self.now, self.peak = {x.untyped_storage()._cdata: 0 for x in known}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in (x for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            storage = x.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("recipe", ["default", "baseline"])
def test_the_step_takes_no_more_than_is_planned(recipe):
    flags = f"--hidden 128 --heads 2 --depth 8 --repa 0 --tread 0 --text-tokens 64 --vae none --recipe {recipe}".split()
    o = outlines(flags)[0]
    model = T.PRX(**o.model).initialize()
    optimizer = T.MuonAdamW(model.named_parameters(), o.c)
    model.set_compute_dtype(torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.accumulate()
    with Peak([*model.parameters(), *(x for x in vars(optimizer).values() if isinstance(x, torch.Tensor))]) as peak:
        optimizer.step()
    assert 0.9 * peak.peak < o.step(1)


def gpu(monkeypatch, total, free=None, bf16=True):
    monkeypatch.setattr(F, "gpu_memory", lambda device: (total, total if free is None else free))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kw: bf16)


def test_a_24_gb_gpu_is_refused_with_what_to_do(monkeypatch):
    gpu(monkeypatch, 24e9)
    [said] = F.check_gpu(outlines(), GPU)
    assert "GPU 0 has 24; no --accumulate makes it fit: give a smaller --hidden or --depth, or more GPUs" in said
    gpu(monkeypatch, 48e9)
    [said] = F.check_gpu(outlines(), GPU)
    n = int(re.search(r"give --accumulate (\d+)$", said)[1])
    assert F.check_gpu(outlines(["--accumulate", str(n)]), GPU) == []
    assert F.check_gpu(outlines(["--accumulate", str(n // 2)]), GPU) != []
    gpu(monkeypatch, 141e9)
    assert F.check_gpu(outlines(), T.World(0, 8, torch.device("cuda", 0))) == []


def test_a_gpu_in_use_or_without_bf16_is_named(monkeypatch):
    gpu(monkeypatch, 141e9, free=10e9, bf16=False)
    said = F.check_gpu(outlines(), T.World(0, 8, torch.device("cuda", 3)))
    assert "GPU 3 has no BF16" in said[0] and "--compute fp32" in said[0]
    assert "of the 141 of GPU 3 only 10 are free; end what else runs on it" in said[1]


def test_the_readme_table_says_what_fits():
    lines = [line.split(" | ") for line in P.readme_table().splitlines()[2:]]
    assert lines[0][0] == "| 24 GB" and lines[0][-1] == "does not fit |"  # 1.17 B on one GPU of 24 GB
    assert lines[1][-1].startswith("`--accumulate")  # the smaller model does
    for _, ranks, _, micro, counts, *_ in lines[1:]:
        for batch, n in zip((256, 1024), counts.strip("`").split("` / `")):
            assert batch // int(n) // int(ranks) <= int(micro)


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_the_default_plan_has_the_right_figures(in_tmp, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert T.main(["--stages", "show", "--repa", "0", "--tread", "0"]) == 0
    said = capsys.readouterr().out
    assert "1,170.7 M parameters on 8 GPU ranks" in said and not Path("logs").exists()
    assert max(map(len, said.splitlines())) <= 120
    row = rows(said)["256px"]
    assert (row["tokens"], row["text"], row["batch"], row["per GPU"]) == ("256", "256", "1024", "128")
    assert rows(said)["512px"]["tokens"] == "1024"
    d, n, t = 1792, 256, 256  # multiply-adds of one block and image: qkv, out, MLP; text K, V; modulation; attention
    block = n * (4 * d * d + 3 * 3.5 * d * d) + t * 2 * d * d + 6 * d * d + 2 * n * (n + t) * d
    flops = 3 * 2 * (16 * block + n * 2 * 64 * d + t * 2304 * d)
    rate, seconds = 0.6 * 790e12 * 8 / flops, 24 * 3600 * 0.65 / 0.95
    assert float(row["TFLOP"]) == pytest.approx(flops / 1e12, rel=0.01)
    assert float(row["images/s"].replace(",", "")) == pytest.approx(rate, rel=0.01)
    assert row["samples"] == f"{seconds * rate / 1e6:.3g} M"
    assert (row["length"], row["checkpoints"]) == ("16.4 h", "32")
    assert row["tokens seen"] == f"{seconds * rate * 256 / 1e9:.3g} G" and row["epochs"] == "?"
    assert "epochs are unknown: track 24h needs --data" in said and "60% (--mfu) of 790 TFLOP/s" in said
    checkpoint = 4 * (1_170_691_648 * 2 + 1_156_055_040 + 2 * 14_636_608)  # masters, EMA, Muon's and AdamW's momenta
    assert f"3 checkpoints of {checkpoint / 1e9:.2g}" in said


def test_the_default_plan_counts_teacher_and_routing(in_tmp, capsys):
    T.main(["--stages", "show"])
    first, second = rows(capsys.readouterr().out).values()
    config, stages = parse_args([])
    plain = [T.flops_per_image(T.PRX(depth=1).config | dict(depth=16), n, 256) * 3e-12 for n in (256, 1024)]
    assert float(first["TFLOP"]) == pytest.approx(plain[0] + 0.155 * (config.repa > 0), rel=0.01)
    assert float(second["TFLOP"]) < 0.75 * plain[1]


def test_the_micro_plan_knows_what_it_does_not_know(in_tmp, capsys):
    T.main([*MICRO, "--stages", "show"])
    said = capsys.readouterr().out
    row = rows(said)["main"]
    assert (row["tokens"], row["images/s"], row["epochs"], row["length"]) == ("16", "?", "endless", "2.0 min")
    assert "unknown on a CPU" in said and "memory" not in said
    T.main([*MICRO, "--stages", "show", "--steps", "1000"])
    row = rows(capsys.readouterr().out)["main"]
    assert (row["steps"], row["samples"], row["length"]) == ("1,000", "32 k", "?")


def test_the_plan_counts_epochs_of_the_folder_that_repeats_most(in_tmp, capsys):
    write_shards(in_tmp / "a", parts=((100, 32, 32, "train"),))
    write_shards(in_tmp / "b", parts=((50, 32, 32, "train"),), first=100)
    T.main([*MICRO, "--stages", "show", "--data", "a:0.5,b:0.5", "--steps", "10", "--batch", "30"])
    said = capsys.readouterr().out
    assert rows(said)["main"]["epochs"] == "3" and "warning" not in said  # 150 of 300 samples come from b's 50
    T.main([*MICRO, "--stages", "show", "--data", "a:0.5,b:0.5", "--steps", "100", "--batch", "30"])
    assert "stage main would see images of a:0.5,b:0.5 30 times, more than 4 (a guess" in capsys.readouterr().out


def test_unknown_networks_are_said_to_be_guessed(in_tmp, capsys):
    T.main(["--stages", "show", "--vae", "someone/vae", "--text", "someone/encoder"])
    said = capsys.readouterr().out
    assert "--vae someone/vae cannot be read here and is taken for 16 channels, factor 8" in said
    assert "--text someone/encoder cannot be read here and is taken for width 2304" in said


def test_local_networks_are_read(tmp_path):
    kl = dict(_class_name="AutoencoderKL", latent_channels=4, block_out_channels=[8, 8, 8, 8])
    assert P.latent_space(str(network_folder(tmp_path / "kl", **kl))) == (4, 8)
    dc = dict(latent_channels=32, encoder_block_out_channels=[8] * 6)
    assert P.latent_space(str(network_folder(tmp_path / "pipeline/vae", **dc).parent)) == (32, 32)
    flux2 = dict(_class_name="AutoencoderKLFlux2", latent_channels=32, block_out_channels=[8] * 4)
    assert P.latent_space(str(network_folder(tmp_path / "flux2", **flux2))) == (128, 16)
    assert P.text_width(str(network_folder(tmp_path / "t5", d_model=512))) == 512 and P.text_width("tiny") == 96
    assert P.parameters_of(str(tmp_path / "t5")) == 100  # 400 bytes
