"""The shipped REPA teacher: its patch tokens say what is where, and it is not a network by which runs are judged."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from data.networks import train_teacher
from data.networks.train_teacher import (GRID, SIZE, make_network, make_pixels, patch_labels, patch_pixels,
                                         patch_tokens, probe)
from data.scenes import draw_scenes
from data.shards import NETWORKS

FOLDER = NETWORKS / "teacher"


@pytest.fixture(scope="module")
def teacher():
    net, report = AutoModel.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(report.values()), f"{FOLDER} does not fit its config: {report}"
    return net.eval()


def test_patch_tokens_beat_raw_pixels_and_an_untrained_network_in_a_linear_probe(teacher):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = make_network().eval()
    features = {"teacher": lambda pixels: patch_tokens(teacher, pixels), "raw pixels": patch_pixels,
                "untrained": lambda pixels: patch_tokens(untrained, pixels)}
    accuracy = {name: probe(function, n_train=2000, n_test=600) for name, function in features.items()}
    for name, values in accuracy.items():
        print(f"{name:10} {values}")
    for other in ("raw pixels", "untrained"):
        for key, margin in (("shape", 0.2), ("colour", 0.05), ("size", 0.05), ("presence", 0.05)):
            ours, theirs = accuracy["teacher"][key], accuracy[other][key]
            assert ours > theirs + margin, f"{key}: the teacher reads {ours}, {other} {theirs}, margin {margin}"


def test_the_probe_asks_for_the_object_in_the_place_of_the_patch():
    drawn = draw_scenes(range(50), "eval")
    labels = patch_labels(drawn)
    pixels = make_pixels(drawn)
    assert pixels.shape == (50, 3, SIZE, SIZE) and patch_pixels(pixels).shape[1] == GRID ** 2
    for i in range(50):
        for key in ("shape", "colour", "size"):
            expected = torch.full((2, 2), -1)
            for k, place in enumerate(drawn.place[i]):
                if place >= 0:
                    expected[place // 2, place % 2] = getattr(drawn, key)[i, k].item()
            expected = expected.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
            assert torch.equal(labels[key][i], expected)
            assert torch.equal(labels["presence"][i], (expected >= 0).long())
    row = patch_pixels(torch.arange(SIZE * SIZE, dtype=torch.float32).view(1, 1, SIZE, SIZE))[0, :, 0]
    assert row[1] - row[0] == SIZE // GRID, "patches lie row by row, as the tokens do"


def test_teacher_is_none_of_the_networks_that_judge(teacher):
    judge = json.loads((NETWORKS / "dino" / "config.json").read_text())
    assert type(teacher).__name__ == "DINOv3ViTModel" and judge["architectures"] != ["DINOv3ViTModel"]
    assert teacher.config.hidden_size != judge["hidden_size"] and teacher.config.image_size != judge["image_size"]


def test_teacher_is_small_and_comes_with_its_log():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 1_500_000
    log = (FOLDER / "train.log").read_text()
    assert all(word in log for word in ("eval split, teacher", "raw pixels", "untrained", "processor time", '"seed"'))


def test_the_script_makes_such_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(train_teacher, "probe", lambda features: {})
    with torch.random.fork_rng():
        train_teacher.train(steps=2, seed=1, folder=tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f.name for f in FOLDER.iterdir())
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == AutoConfig.from_pretrained(FOLDER).to_diff_dict()
    made, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path, FOLDER))
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in shipped.items()}
    unchanged = [k for k in made if torch.equal(made[k], shipped[k])]
    assert not unchanged, f"the shipped network is as untrained as this one: {unchanged}"
