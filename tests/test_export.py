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
from PIL import Image

import train_prx
from data.encoders import TextEncoder
from data.export import PROMPT
from eval_prx import main
from test_eval import cache, refused  # noqa: F401: fixtures

TINY = ("--track micro --repa 0 --ema 0.99 --hidden 32 --heads 2 --depth 1 --batch 8 --samples 0 --sample-steps 3 "
        "--compile off --compute fp32 --steps 12 --lr 0.01 --lr-adamw 0.01 --shift 2").split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a very short run of the micro track, evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert train_prx.main([*TINY, "--name", "short"]) == 0
        assert main(["logs/short", "--n", "8", "--steps", "2", "--inception", "none"]) == 0
    return folder / "logs/short"


@pytest.fixture(scope="module")
def pipeline(trained):
    out = trained.parent / "pipeline"
    assert main(["export", str(trained), "--out", str(out)]) == 0
    return out


def test_the_model_cards_commands_paint_in_a_process_that_has_diffusers_only(trained, pipeline, tmp_path):
    """Both: the short one, and the one on the trainer's time grid, which paints the trainer's image."""
    card = (pipeline / "README.md").read_text()
    short, exact = re.findall(r"```python\n(.*?)```", card, re.S)
    first_lines = "import torch\nnoise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
    exact = first_lines + exact.replace("guidance_scale=", "latents=noise, guidance_scale=")
    forbid = "import sys\nsys.modules.update({'train_prx': None, 'eval_prx': None, 'data': None})\n"
    for code in (short, exact):
        assert PROMPT in code and str(pipeline) in code and "use_resolution_binning=False" in code
        done = subprocess.run([sys.executable, "-c", forbid + code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        picture = Image.open(tmp_path / "image.png")
        assert picture.size == (32, 32) and np.array(picture).std() > 1
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = TextEncoder("tiny")
    model = train_prx.load_transformer(trained / "transformer")
    ours = train_prx.sample(model, noise, *text.encode([PROMPT]), *text.encode([""]), steps=3,
                            cfg_scale=3.0, shift=2.0, predict="x")
    theirs = torch.from_numpy(np.array(picture)).permute(2, 0, 1).int()
    assert (train_prx.to_uint8(ours)[0].int() - theirs).abs().max() <= 1


def test_the_model_card_is_made_of_the_runs_own_files(trained, pipeline):
    card = (pipeline / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "PRXPixelPipeline" in card
    result = json.loads((trained / "metrics.json").read_text())
    assert f"{result['metrics']['eval']['accuracy']:.2%}" in card and result["protocol_sha256"] in card
    assert "96 images in" in card and '"lr": 0.01' in card and '"shift": 2.0' in card and "scenes" in card
    assert "Licences" in card and (pipeline / "samples.png").read_bytes() == (trained / "samples.png").read_bytes()
    assert float(re.search(r"largest difference of an image in\s+\[0, 1\] was (\S+)\)", card)[1]) < 1e-4
    scheduler = json.loads((pipeline / "scheduler/scheduler_config.json").read_text())
    index = json.loads((pipeline / "model_index.json").read_text())
    assert scheduler["shift"] == 2.0 and index["noise_scale"] == 1.0 and index["prompt_max_tokens"] == 80


def test_a_pipeline_is_evaluated_and_painted_from_as_its_run(trained, pipeline, tmp_path):
    flags = ["--n", "8", "--steps", "2", "--inception", "none"]
    assert main([str(pipeline), *flags, "--out", str(tmp_path)]) == 0
    of_run = json.loads((trained / "metrics.json").read_text())
    of_pipeline = json.loads((tmp_path / "metrics.json").read_text())
    assert of_pipeline["metrics"] == of_run["metrics"] and of_pipeline["protocol_sha256"] == of_run["protocol_sha256"]
    assert main(["sample", str(pipeline), "a red ring", "--n", "1", "--steps", "1", "--out", str(tmp_path)]) == 0


def test_what_diffusers_paints_otherwise_is_not_exported(trained, tmp_path, monkeypatch, capsys):
    import diffusers

    ones = lambda prompts: torch.ones(len(prompts), 8, dtype=torch.long)
    monkeypatch.setattr(diffusers.PRXPixelPipeline, "_tokenize_prompts",
                        lambda self, prompts, device, **_: (ones(prompts), ones(prompts).bool()))  # not the prompt
    assert "paints another image" in refused(capsys, "export", trained, "--out", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_what_cannot_be_exported_is_one_sentence(trained, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    assert "taken exists and is no pipeline" in refused(capsys, "export", trained, "--out", tmp_path / "taken")
    assert "--text-encoder copy" in refused(capsys, "export", trained, "--out", tmp_path / "p", "--text-encoder",
                                            "reference")
    config = json.loads((trained / "config.json").read_text())
    run = tmp_path / "run"
    (run / "transformer").mkdir(parents=True)
    (run / "transformer/config.json").write_text((trained / "transformer/config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"predict": "v"}))
    assert "--vae none --predict v" in refused(capsys, "export", run, "--out", tmp_path / "p")
    (run / "config.json").write_text(json.dumps(config | {"vae": "flux"}))
    assert "--vae flux --predict x" in refused(capsys, "export", run, "--out", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_text_encoder_on_the_hub_can_be_left_there(trained, tmp_path, monkeypatch):
    """The folder is without it, and the model card's commands pass it in. A folder stands for the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_prx.TEXTS, "hub", "tiny/encoder")
    Path("tiny").mkdir()
    Path("tiny/encoder").symlink_to(train_prx.TEXTS["tiny"])
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = json.loads((run / "config.json").read_text()) | {"text": "hub"}
    (run / "config.json").write_text(json.dumps(config))
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: str(self) != "tiny/encoder" and exists(self))
    assert main(["export", str(run), "--out", "p", "--text-encoder", "reference"]) == 0
    assert not exists(Path("p/text_encoder")) and not exists(Path("p/tokenizer"))
    code = re.findall(r"```python\n(.*?)```", Path("p/README.md").read_text(), re.S)[0]
    assert "T5GemmaEncoderModel.from_pretrained('tiny/encoder', is_encoder_decoder=False)" in code
    exec(code, {})
    assert Image.open("image.png").size == (32, 32)


def test_push_creates_the_repository_and_uploads_the_folder(trained, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repository, exist_ok):
            calls.append(("create", repository, exist_ok))

        def upload_folder(self, folder_path, repo_id):
            calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    out = tmp_path / "p"
    assert main(["export", str(trained), "--out", str(out), "--push", "me/prx-short"]) == 0
    assert calls[0] == ("create", "me/prx-short", True) and calls[1][:2] == ("upload", "me/prx-short")
    assert {"README.md", "model_index.json", "transformer"} <= set(calls[1][2])
    assert "from_pretrained('me/prx-short')" in (out / "README.md").read_text()
    Api.create_repo = lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    capsys.readouterr()
    message = refused(capsys, "export", trained, "--out", out, "--push", "me/prx-short")
    assert "no network" in message and "hf auth login" in message and (out / "model_index.json").exists()
