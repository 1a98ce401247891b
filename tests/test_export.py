"""The exported folder: what a fresh process with diffusers alone makes of it, its model card, what is refused.

Most runs here are painted by a short script around diffusers' own model; the last test exports a run of train_prx.py.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import eval_prx
from eval_prx import PLAIN, main
from test_eval import cache, refused, write_run  # noqa: F401 (cache is a fixture)
from test_eval_shards import write_folder

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = '''
"""diffusers' transformer under a sampler of its own, to be painted from and exported."""
import json, sys
from pathlib import Path

import diffusers, torch, transformers
from safetensors.torch import save_file

torch.set_grad_enabled(False)
run, request = Path(__file__).resolve().parent, json.loads(Path(sys.argv[2]).read_text())
about = json.loads((run / "run.json").read_text())
model = diffusers.PRXTransformer2DModel.from_pretrained(run / request.get("transformer", "transformer"))
text = transformers.T5GemmaEncoderModel.from_pretrained(run / "text", is_encoder_decoder=False)
tokenizer = transformers.AutoTokenizer.from_pretrained(run / "text")
cfg, steps, side, shift = request["cfg_scale"], request["steps"], about["resolution"], about["shift"]


def encode(prompt):
    tokens = tokenizer([prompt], padding="max_length", max_length=about["text_tokens"], return_tensors="pt")
    return text(**tokens).last_hidden_state, tokens["attention_mask"].bool()


def velocity(x, t, states, mask):
    output = model(x, torch.full((1,), t), states, attention_mask=mask, return_dict=False)[0]
    return (x - output) / max(t, 0.05)


images, null = [], encode("")
for prompt, seed in zip(request["prompts"], request["seeds"]):
    x = torch.randn((1, 3, side, side), generator=torch.Generator("cpu").manual_seed(seed))
    times = [1 - i / steps for i in range(steps + 1)]
    times = [shift * t / (1 + (shift - 1) * t) for t in times]
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, t, *encode(prompt))
        if cfg != 1:
            without = velocity(x, t, *null)
            v = without + cfg * (v - without)
        x = x + (t_next - t) * v
    images.append(((x[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
save_file({"images": torch.stack(images)}, sys.argv[4])
'''
INDEX = {"scenes": {"track": "micro", "protocol": "p", "hash": "h"}}
CAPTION = "long number 39"  # whose image comes first by hash


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder, evaluated."""
    import diffusers

    folder = tmp_path_factory.mktemp("trained")
    data = write_folder(folder / "scenes-of-micro", **INDEX)
    run = write_run(folder / "short", SCRIPT, data=[{"folder": str(data), "sha256": "0"}], sample_steps=3, shift=2.0,
                    command="python train_prx.py --shift 2 --lr 0.01",
                    finished={"step": 12, "samples": 1096, "elapsed": 7.4})
    shutil.rmtree(run / "transformer")
    shutil.copytree(ROOT / "data/networks/text", run / "text")
    torch.manual_seed(0)
    model = diffusers.PRXTransformer2DModel(in_channels=3, patch_size=8, context_in_dim=96, hidden_size=32,
                                            mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[8, 8])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(run / "transformer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_prx, "CACHE", folder / "cache")
        assert main([str(run), "--trust", "--n", "8", "--steps", "2", "--inception", "none"]) == 0
    return run


@pytest.fixture(scope="module")
def pipeline(trained):
    out = trained.parent / "pipeline"
    assert main(["export", str(trained), "--out", str(out), "--trust"]) == 0
    return out


def test_the_model_cards_commands_paint_in_a_process_that_has_diffusers_only(trained, pipeline, tmp_path):
    """On the trainer's time grid: it is the run's own image."""
    card = (pipeline / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assert f"pipeline({CAPTION!r}" in code and str(pipeline) in code and "use_resolution_binning=False" in code
    noise = "import torch\nnoise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
    code = noise + code.replace("guidance_scale=", "latents=noise, guidance_scale=")
    forbid = "import sys\nsys.modules.update({'train_prx': None, 'eval_prx': None, 'data': None})\n"
    done = subprocess.run([sys.executable, "-c", forbid + code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    picture = Image.open(tmp_path / "image.png")
    assert picture.size == (32, 32) and np.array(picture).std() > 1
    argv = ["sample", str(trained), "--trust", CAPTION, "--n", "1", "--cfg", "3", "--out", str(tmp_path / "ours")]
    assert main(argv) == 0
    ours = np.array(Image.open(tmp_path / "ours/00000-00.png")).astype(int)
    assert abs(ours - np.array(picture)).max() <= 1


def test_the_model_card_is_made_of_the_runs_own_files(trained, pipeline):
    card = (pipeline / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "PRXPixelPipeline" in card
    result = json.loads((trained / "metrics.json").read_text())
    assert f"{result['metrics']['eval']['accuracy']:.2%}" in card and result["protocol_sha256"] in card
    assert "1,096 images in 7 s" in card and "--shift 2 --lr 0.01" in card and "scenes-of-micro: procedural" in card
    assert "Licences" in card and (pipeline / "samples.png").read_bytes() == (trained / "samples.png").read_bytes()
    share, largest = re.search(r"noise: (\S+)% of the values differ,\s+by (\d) of 255", card).groups()
    assert float(share) < 1 and int(largest) <= 1
    scheduler = json.loads((pipeline / "scheduler/scheduler_config.json").read_text())
    index = json.loads((pipeline / "model_index.json").read_text())
    assert scheduler["shift"] == 2.0 and index["noise_scale"] == 1.0 and index["prompt_max_tokens"] == 40


def test_the_model_cards_prompt_is_one_that_the_data_has(trained, tmp_path):
    """The first held-out caption of pictures, with their source and licence; a plain one where the data is gone."""
    run = shutil.copytree(trained, tmp_path / "run")
    data = write_folder(tmp_path / "photos", source={"name": "counted squares"}, license="CC BY-SA 4.0")
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"data": [{"folder": str(data), "sha256": "0"}]}))
    assert main(["export", str(run), "--out", str(tmp_path / "p"), "--trust"]) == 0
    card = (tmp_path / "p/README.md").read_text()
    assert f"pipeline({CAPTION!r}" in card and "lower case" in card
    assert "counted squares" in card and "CC BY-SA 4.0" in card
    shutil.rmtree(data)
    assert eval_prx.describe_data(eval_prx.read_run(run, True))[0] == PLAIN


def test_a_pipeline_is_evaluated_and_painted_from_as_its_run(trained, pipeline, tmp_path):
    flags = ["--n", "8", "--steps", "2", "--inception", "none", "--trust"]
    assert main([str(pipeline), *flags, "--out", str(tmp_path)]) == 0
    of_run = json.loads((trained / "metrics.json").read_text())
    of_pipeline = json.loads((tmp_path / "metrics.json").read_text())
    assert of_pipeline["metrics"] == of_run["metrics"] and of_pipeline["protocol_sha256"] == of_run["protocol_sha256"]


def test_what_diffusers_paints_otherwise_is_not_exported(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "train_prx.py").write_text(SCRIPT.replace("max(t, 0.05)", "max(t, 0.9)"))
    assert "paints another image" in refused(capsys, "export", run, "--out", tmp_path / "p", "--trust")
    (run / "train_prx.py").write_text("import sys; sys.exit('no more paint')")
    assert "no more paint" in refused(capsys, "export", run, "--out", tmp_path / "p", "--trust", code=1)
    assert not (tmp_path / "p").exists()


def test_what_cannot_be_exported_is_one_sentence(trained, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    message = refused(capsys, "export", trained, "--out", tmp_path / "taken", "--trust")
    assert "taken exists and is no pipeline" in message
    flags = ["--out", tmp_path / "p", "--trust"]
    run = shutil.copytree(trained, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    for change, message in ((dict(predict="v"), "--vae none --predict v"),
                            (dict(vae="flux", pixels=False), "--vae flux --predict x"),
                            (dict(text="nowhere/encoder"), "cannot be a pipeline of diffusers")):
        (run / "run.json").write_text(json.dumps(facts | change))
        assert message in refused(capsys, "export", run, *flags)
    (run / "run.json").write_text(json.dumps(facts))
    weights = load_file(run / "transformer/diffusion_pytorch_model.safetensors")
    for state in (weights | {"fuse.weight": torch.zeros(1)}, dict(list(weights.items())[1:])):
        save_file(state, run / "transformer/diffusion_pytorch_model.safetensors", {"format": "pt"})
        assert "no --sprint and no scorer" in refused(capsys, "export", run, *flags)
    assert not (tmp_path / "p").exists()


def test_short_names_mean_what_they_mean_to_the_trainer():
    import train_prx

    known = train_prx.VAES | {name: hub for name, hub in train_prx.TEXTS.items() if name != "tiny"}
    assert known == eval_prx.HUB


def test_a_run_of_the_trainer_is_evaluated_and_exported_without_trust(tmp_path, monkeypatch):
    """End to end: shards, train_prx.py, its own copy paints; Python's files and JSON in between, nothing else."""
    scenes = [sys.executable, str(ROOT / "data/scenes.py"), "--track", "micro", "--n", "64", "--eval-n", "8"]
    flags = ("--track micro --data d --name r --steps 2 --repa 0 --hidden 32 --heads 2 --depth 2 --batch 8 --samples 0 "
             "--compile off --compute fp32 --tread-blocks 0-0").split()
    for command in ([*scenes, "--out", "d"], [sys.executable, str(ROOT / "train_prx.py"), *flags]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.chdir(tmp_path)
    assert main(["logs/r", "--n", "16", "--steps", "2"]) == 0
    result = json.loads(Path("logs/r/metrics.json").read_text())
    assert result["metrics"]["eval"].keys() >= {"accuracy", "fid", "cmmd", "dino_mmd"}
    assert main(["export", "logs/r", "--out", "p"]) == 0
    assert main(["p", "--n", "16", "--steps", "2", "--precision", "bf16"]) == 0
