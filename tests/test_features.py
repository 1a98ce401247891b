"""The shipped feature networks measure something: every metric rises with the damage done to a set of images."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from data import scenes
from data.networks.train_features import blur
from eval_prx import NETWORKS, REFERENCE, Features, compare, features_of

N = 500
LADDERS = {"blur": (0.7, 1.5, 3.0),       # sigma in pixels at 64 px
           "noise": (0.04, 0.1, 0.25),    # sigma in units of the full range
           "swapped": (0.1, 0.3, 0.7),    # share of objects that become white circles
           "missing": (0.1, 0.3, 0.7)}    # share of objects that are gone


@pytest.fixture(scope="module")
def networks():
    return {kind: Features(kind) for kind in ("inception", "clip", "dino")}


def damaged(drawn, res: int, kind: str, amount: float) -> torch.Tensor:
    """Images of these scenes with one kind of damage.

    Swaps go to one favourite, as in a model that has a bias. Attributes are uniform, so swapping them at random would
    give another sample of the same distribution: no metric between sets can see that, prompt accuracy does.
    """
    rng = np.random.default_rng(0)
    hit = rng.random(drawn.place.shape) < amount
    if kind == "swapped":
        drawn = dataclasses.replace(drawn, shape=np.where(hit, scenes.SHAPES.index("circle"), drawn.shape),
                                    colour=np.where(hit, list(scenes.COLOURS).index("white"), drawn.colour))
    if kind == "missing":
        drawn = dataclasses.replace(drawn, place=np.where(hit, -1, drawn.place))
    images = scenes.render(drawn, res)
    x = images.float()
    if kind == "blur":
        x = blur(x, torch.full((len(x),), amount * res / 64))
    if kind == "noise":
        x = x + 255 * amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x.round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("difficulty, res", [(scenes.MICRO, 32), (scenes.MINI, 64)], ids=["micro", "mini"])
def test_every_metric_rises_with_every_damage(networks, difficulty, res):
    reference = scenes.render(scenes.draw_scenes(range(REFERENCE, REFERENCE + N), "eval", difficulty), res)
    real, drawn = features_of(reference, networks), scenes.draw_scenes(range(N), "eval", difficulty)
    metrics = lambda images: compare(real, features_of(images, networks, batch=50), intervals=False)["metrics"]
    itself, untouched = compare(real, real, intervals=False)["metrics"], metrics(scenes.render(drawn, res))
    for metric, value in itself.items():
        assert abs(value) < 1e-6 * max(1.0, untouched[metric]), f"{metric} of a set with itself is {value}"
    for kind, amounts in LADDERS.items():
        ladder = [untouched] + [metrics(damaged(drawn, res, kind, amount)) for amount in amounts]
        for metric in untouched:
            values = [step[metric] for step in ladder]
            print(f"{kind:8} {metric:9}" + "".join(f"{value:10.4f}" for value in values))
            assert all(a < b for a, b in zip(values, values[1:])), f"{metric} does not rise with {kind}: {values}"


def test_networks_are_small_and_come_with_their_logs():
    for kind in ("inception", "clip", "dino"):
        folder = NETWORKS / kind
        assert (folder / "model.safetensors").stat().st_size < 1_000_000
        assert json.loads((folder / "config.json").read_text())["image_size"] == 64
        log = (folder / "train.log").read_text()
        assert "linear probe on micro" in log and "processor time" in log and '"seed"' in log
