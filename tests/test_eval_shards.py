"""Evaluation of runs on prepared shards: the held-out split by hash gives the prompts and the reference."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import eval_prx
import train_prx as T
from data.shards import HeldOut
from eval_prx import main
from test_eval import cache, refused  # noqa: F401: fixtures
from test_shards import write_shards

RUN = ("--track micro --repa 0 --ema 0.99 --hidden 32 --heads 2 --depth 2 --batch 8 --samples 0 --sample-steps 2 --compile off --compute "
       "fp32 --steps 2 --tread-blocks 0-0").split()
PARTS = ((20, 32, 32, "train"), (24, 32, 32, "eval"), (6, 24, 40, "eval"))


@pytest.fixture
def shards(in_tmp):
    write_shards(in_tmp / "d", PARTS, skip=[25])
    assert T.main([*RUN, "--data", "d", "--name", "r"]) == 0
    return in_tmp / "d"


def test_held_out_samples_come_in_the_order_of_their_hashes_without_skipped_ones(in_tmp):
    write_shards(in_tmp / "a", PARTS, skip=[25])
    write_shards(in_tmp / "b", ((21, 32, 32, "train"), (29, 32, 32, "eval")), image="jpeg")
    held = HeldOut("a", 32)
    ids = sorted((i for i in range(20, 50) if i != 25), key=lambda i: hashlib.sha256(b"%d" % i).digest()[:16])
    assert [held.caption(i) for i in range(len(held))] == [f"long number {i}" for i in ids]
    assert [held.image(i)[0, 0, 0].item() for i in range(len(held))] == ids
    both = HeldOut("a:0.5,b:0.5", 32)  # image 25 is good in b, and no image counts twice
    assert len(both) == 30 and "long number 25" in {both.caption(i) for i in range(30)}
    assert HeldOut("b", 32).image(3).shape == (3, 32, 32)
    with pytest.raises(T.UserError, match="holds 0 image"):
        HeldOut("a", 64)


def test_a_run_on_shards_is_compared_with_its_held_out_images(shards, capsys):
    assert main(["logs/r", "--n", "12", "--steps", "2", "--batch", "5"]) == 0
    result = json.loads(Path("logs/r/metrics.json").read_text())
    assert set(result["metrics"]["eval"]) == {"fid", "cmmd", "dino_mmd"} == set(result["metrics"]["real"])
    assert result["protocol"]["held_out"] == 29 and result["protocol"]["n"] == 12
    assert Path("logs/r/samples.png").exists()
    prompts = [HeldOut("d", 32).caption(i) for i in range(12)]
    config, seen = eval_prx.read_run(Path("logs/r")), []
    task = eval_prx.ShardTask(config, 12, "d", True)

    def paint(prompts, noise, *_):
        seen.extend(prompts)
        return torch.zeros(len(noise), 3, 32, 32, dtype=torch.uint8)

    options = dict(steps=1, cfg=1.0, seed=0)
    eval_prx.evaluate_run(config | dict(noise_shape=(3, 32, 32)), task, paint, {}, Path("out"), batch=5, **options)
    assert seen == prompts
    # a second real set needs n more images, and of 29 there are not 15 left
    assert main(["logs/r", "--n", "15", "--steps", "1", "--clip", "none", "--dino", "none", "--out", "o"]) == 0
    assert "real" not in json.loads(Path("o/metrics.json").read_text())["metrics"]
    assert "--n 30 is more than the 29 held-out images of d" in refused(capsys, "logs/r", "--n", "30")


def test_perfect_paintings_have_distance_zero(in_tmp):
    write_shards(in_tmp / "d", PARTS[:2])
    config = dict(track="micro", seed=0, resolution=32, shift=1.0, predict="x", noise_shape=(3, 32, 32))
    task = eval_prx.ShardTask(config, 12, "d", True)
    answers = {task.held_out.caption(i): task.held_out.image(i) for i in range(12)}
    networks = {kind: eval_prx.Features(kind) for kind in ("inception", "clip")}
    knows = lambda prompts, *_: torch.stack([answers[p] for p in prompts])
    result = eval_prx.evaluate_run(config, task, knows, networks, Path("o"), steps=1, cfg=1.0, batch=7, seed=0)
    assert all(abs(result["metrics"]["eval"][key]) < 1e-6 for key in ("fid", "cmmd"))
    assert result["metrics"]["real"]["fid"] > 1e-3  # the next 12 images are others


def test_shards_without_images_need_a_reference_and_take_one(in_tmp, capsys):
    write_shards(in_tmp / "d", PARTS)
    assert T.main([*RUN, "--data", "d", "--name", "r"]) == 0
    index = json.loads((in_tmp / "d/index.json").read_text())
    (in_tmp / "d/index.json").write_text(json.dumps(index | dict(image=None)))
    assert "holds no images, only latents" in refused(capsys, "logs/r", "--n", "8", "--steps", "1")
    folder = in_tmp / "real"
    for i in range(8):
        eval_prx.save_image(torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8), folder / f"{i}.png")
    assert main(["logs/r", "--n", "8", "--steps", "1", "--real", "real"]) == 0
    result = json.loads(Path("logs/r/metrics.json").read_text())
    assert result["protocol"]["real"]["n"] == 8 and result["metrics"]["eval"]["fid"] > 0
    (in_tmp / "elsewhere").mkdir()
    (in_tmp / "d").rename(in_tmp / "elsewhere/d")
    assert "holds no index.json" in refused(capsys, "logs/r", "--n", "8", "--steps", "1", "--real", "real")
    assert main(["logs/r", "--n", "8", "--steps", "1", "--real", "real", "--data", "elsewhere/d"]) == 0
