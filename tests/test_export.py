"""The exported folder: what a fresh process with diffusers alone makes of it, its model card, what is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image
from safetensors.torch import load_file, save_file
from test_eval import cache, refused  # noqa: F401 (cache is a fixture)
from test_eval_shards import write_folder

import eval_prx
from data.shards import HeldOut
from eval_prx import PLAIN, main

pytestmark = pytest.mark.xdist_group("export")  # one trained run and one pipeline serve all
EVALUATE = "--n 8 --steps 2 --inception none".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scene_folder):
    """A run's folder, evaluated. Its weights are drawn at random, so that every one of them shows in an image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        patch.setattr(eval_prx, "CACHE", Path("cache").resolve())
        run("--data", scene_folder, "--name", "short", "--steps", 2, "--shift", 2.0, "--lr", 0.01)
        folder = Path("logs/short").resolve()
        torch.manual_seed(0)
        redraw(folder, lambda tensor: torch.randn_like(tensor) * 0.15)
        assert main([str(folder), *EVALUATE]) == 0  # without --trust: its script is this checkout's
    return folder


def redraw(run: Path, change):
    path = run / "transformer/diffusion_pytorch_model.safetensors"
    save_file({key: change(tensor) for key, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.fixture(scope="module")
def pipeline(trained):
    out = trained.parent / "pipeline"
    assert main(["export", str(trained), "--out", str(out)]) == 0
    return out


def test_the_model_cards_commands_paint_in_a_process_that_has_diffusers_only(trained, pipeline, scene_folder, tmp_path):
    """A prompt that was held out, on the trainer's time grid; of the first prompt of the evaluation the run's image."""
    (code,) = re.findall(r"```python\n(.*?)```", (pipeline / "README.md").read_text(), re.S)
    held_out, first = HeldOut([scene_folder], 32).caption(0), eval_prx.SceneTask("micro", 32, 8).prompts["eval"][0]
    assert f"pipeline({held_out!r}" in code and str(pipeline) in code and "use_resolution_binning=False" in code
    again = code[code.index("image = "):].replace(repr(held_out), repr(first)).replace("image.png", "first.png")
    again = again.replace("guidance_scale=", "latents=noise, guidance_scale=")
    forbid = "import sys\nsys.modules.update({'train_prx': None, 'eval_prx': None, 'data': None})\n"
    noise = "import torch\nnoise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
    code = forbid + code + noise + again
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    picture, theirs = (np.array(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("image", "first"))
    assert picture.shape == theirs.shape == (32, 32, 3) and picture.std() > 1 and abs(picture - theirs).max() > 10
    ours = np.array(Image.open(trained / "samples.png"))[8:200:6, 8:200:6].astype(int)  # each pixel is shown as 6 x 6
    assert abs(ours - theirs).max() <= 1


def test_the_model_card_says_what_diffusers_cannot_do(pipeline):
    import diffusers

    painter = diffusers.PRXPixelPipeline.from_pretrained(pipeline)
    size = dict(height=32, width=32, use_resolution_binning=False, num_inference_steps=2)
    painter(PLAIN, **size)
    for several in (dict(prompt=[PLAIN, PLAIN]), dict(prompt=PLAIN, num_images_per_prompt=2)):
        with pytest.raises(RuntimeError, match="must match the size"):
            painter(**several, **size)
    assert "one prompt at a time, for one image each" in (pipeline / "README.md").read_text()


def test_the_model_card_is_made_of_the_runs_own_files(trained, pipeline):
    card = (pipeline / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "PRXPixelPipeline" in card
    result = json.loads((trained / "metrics.json").read_text())
    assert f"{result['metrics']['eval']['accuracy']:.2%}" in card and result["protocol_sha256"] in card
    facts = json.loads((trained / "run.json").read_text())
    assert f"32 images in {facts['finished']['elapsed']:.0f} s" in card and f"\n{facts['command']}\n" in card
    assert "micro: procedural scenes" in card and f"seed {facts['seed']}" in card
    assert "Licences" in card and (pipeline / "samples.png").read_bytes() == (trained / "samples.png").read_bytes()
    share, largest = re.search(r"noise: (\S+)% of the values differ,\s+by (\d) of 255", card).groups()
    assert float(share) < 1 and int(largest) <= 1
    scheduler = json.loads((pipeline / "scheduler/scheduler_config.json").read_text())
    index = json.loads((pipeline / "model_index.json").read_text())
    assert scheduler["shift"] == 2.0 and index["noise_scale"] == 1.0 and index["prompt_max_tokens"] == 40


def test_the_model_cards_prompt_is_one_that_the_data_has(trained, pipeline, tmp_path):
    """The first held-out caption of pictures, with their source and licence; a plain one where the data is gone."""
    folder = write_folder(tmp_path / "photos", source={"name": "counted squares"}, license="CC BY-SA 4.0")
    about = eval_prx.read_run(trained, False) | {"folders": [str(folder)], "pipeline": "PRXPixelPipeline"}
    card = eval_prx.model_card(about, pipeline, "they are equal")
    assert f"pipeline({HeldOut([folder], 32).caption(0)!r}" in card and "long number" in card and "lower case" in card
    assert "photos: " in card and "counted squares" in card and "CC BY-SA 4.0" in card and "they are equal" in card
    shutil.rmtree(folder)
    assert eval_prx.describe_data(about)[0] == PLAIN


def test_a_pipeline_is_evaluated_and_painted_from_as_its_run(trained, pipeline, tmp_path):
    """Files and JSON lie between training, painting and exporting, nothing else."""
    assert main([str(pipeline), *EVALUATE, "--out", str(tmp_path)]) == 0
    of_run = json.loads((trained / "metrics.json").read_text())
    of_pipeline = json.loads((tmp_path / "metrics.json").read_text())
    assert of_run["metrics"]["eval"].keys() >= {"accuracy", "cmmd", "dino_mmd"}
    assert of_pipeline["metrics"] == of_run["metrics"] and of_pipeline["protocol_sha256"] == of_run["protocol_sha256"]


def test_what_diffusers_paints_otherwise_is_not_exported(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    script = (trained / "train_prx.py").read_text()
    start = "import torch\nreal = torch.randn\ntorch.randn = lambda *size, **kw: 1.02 * real(*size, **kw)\n"
    (copy / "train_prx.py").write_text(script.replace("import torch\n", start, 1))
    assert "paints another image" in refused(capsys, "export", copy, "--out", tmp_path / "p", "--trust")
    (copy / "train_prx.py").write_text("import sys; sys.exit('no more paint')")
    assert "no more paint" in refused(capsys, "export", copy, "--out", tmp_path / "p", "--trust", code=1)
    assert not (tmp_path / "p").exists()


def test_what_cannot_be_exported_is_one_sentence(trained, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    message = refused(capsys, "export", trained, "--out", tmp_path / "taken")
    assert "taken exists and is no pipeline" in message
    flags = ["--out", tmp_path / "p"]
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
