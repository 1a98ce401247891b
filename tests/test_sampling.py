"""Sampling: Euler with guidance against closed forms and diffusers, and painting from a run's folder."""

import json
import math

import pytest
import torch
from conftest import run, shell
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from test_model import both, inputs

import train_prx as T


# --- the sampler

@pytest.mark.parametrize("predict", ["v", "x"])
@pytest.mark.parametrize("cfg_scale", [1, 3.0])
def test_the_sampler_walks_from_noise_to_the_data_of_a_perfect_model(predict, cfg_scale):
    """With one data point x* the exact denoiser is known, and Euler must end on it."""
    star, calls = torch.full((2, 3, 4, 4), 0.5), []

    def model(x, t, text, mask):
        calls.append(text.shape[0])
        time = t[:, None, None, None]
        return star[:1].expand(len(x), -1, -1, -1) if predict == "x" else (x - star[:1]) / time

    text, mask = torch.zeros(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    out = T.sample(model, torch.randn(2, 3, 4, 4), text, mask, text[:1], mask[:1], steps=12, cfg_scale=cfg_scale,
                   shift=3.0, predict=predict)
    assert torch.allclose(out, star, atol=1e-5)
    assert calls == [4 if cfg_scale != 1 else 2] * 12


def test_sampling_follows_diffusers_euler_on_our_time_grid():
    """Same network, same noise, our shifted grid passed to diffusers' scheduler with shift 1: the same image."""
    ours, theirs = both(in_channels=3)
    g = torch.Generator().manual_seed(3)
    noise, (_, _, text, mask) = torch.randn(3, 3, 16, 16, generator=g), inputs()
    a = T.sample(ours, noise, text, mask, text[:1], mask[:1], steps=7, cfg_scale=1, shift=3.0, predict="v")
    grid = T.shift_time(torch.linspace(1, 0, 8), 3.0)[:-1]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=grid.tolist())
    x = noise
    with torch.no_grad():
        for sigma in scheduler.timesteps:
            v = theirs(hidden_states=x, timestep=sigma.expand(3) / 1000, encoder_hidden_states=text,
                       attention_mask=mask).sample
            x = scheduler.step(v, sigma, x, return_dict=False)[0]
    assert (a - x).abs().max() < 1e-4


def test_our_time_grid_is_diffusers_shifted_one():
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_shift(shift)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 11)[:-1].numpy())
        assert torch.allclose(scheduler.sigmas, T.shift_time(torch.linspace(1, 0, 11), shift), atol=1e-6)


class Decay(torch.nn.Module):
    """A velocity field v = x * (a + b t), a and b from the text: x(0) = x(1) exp(-(a + b / 2)) exactly."""

    def forward(self, x, t, text, mask):
        a, b = text[:, 0, 0], text[:, 0, 1]
        return x * (a + b * t)[:, None, None, None]


def ode(a, b, n=1):
    return torch.tensor([[[a, b]]]).expand(n, -1, -1), torch.ones(n, 1, dtype=torch.bool)


def test_euler_is_of_first_order():
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = noise * math.exp(-(0.7 + 0.9 / 2))
    errors = [(T.sample(Decay(), noise, *ode(0.7, 0.9, 3), *ode(0.0, 0.0), steps=steps, cfg_scale=1.0, shift=1.0,
                        predict="v") - truth).abs().max().item() for steps in (8, 16, 32)]
    assert all(0.8 < math.log2(a / b) < 1.2 for a, b in zip(errors, errors[1:]))


@pytest.mark.parametrize("predict", ["v", "x"])
def test_guidance_goes_from_the_empty_prompt_past_the_prompt(predict):
    """Guidance of a linear field is the field of the guided coefficients."""
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    net, options = Decay(), dict(steps=6, shift=2.0, predict=predict)
    if predict == "x":  # the estimate of x_0 that means the same velocity
        net = lambda x, t, text, mask: x - t[:, None, None, None].clamp(min=0.05) * Decay()(x, t, text, mask)
    guided = T.sample(net, noise, *ode(0.7, 0.2, 2), *ode(0.3, 0.1), cfg_scale=2.5, **options)
    same = T.sample(net, noise, *ode(0.3 + 2.5 * 0.4, 0.1 + 2.5 * 0.1, 2), *ode(0.0, 0.0), cfg_scale=1.0, **options)
    assert torch.allclose(guided, same, atol=1e-5)
    plain = T.sample(net, noise, *ode(0.7, 0.2, 2), *ode(0.3, 0.1), cfg_scale=1.0, **options)
    assert not torch.allclose(guided, plain, atol=0.1)


# --- painting

PROMPTS = ["a red ring", "a blue cross", "", "a small green square in the top left", "a red ring"]


@pytest.fixture(scope="module")
def painted_run(tmp_path_factory, scene_folder):
    """A run whose weights are random: it paints something."""
    folder = tmp_path_factory.mktemp("painting")
    (folder / "shards").mkdir()
    (folder / "shards/micro").symlink_to(scene_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("--steps", 2, "--name", "r", "--shift", 2.0)
    model = T.load_transformer(folder / "logs/r/transformer")
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2
    T.export_transformer(model.config, model.state_dict(), folder / "logs/r/transformer")
    T.export_transformer(model.config, {k: 0.5 * v for k, v in model.state_dict().items()}, folder / "logs/r/exports/a")
    return folder / "logs/r"


@pytest.fixture
def paint(painted_run, tmp_path, monkeypatch):
    """A function: a request in, images out, as painted by the run's script in this process."""
    monkeypatch.setattr(T, "__file__", str(painted_run / "train_prx.py"))

    def paint(code=0, **asked):
        request, out = tmp_path / "request.json", tmp_path / "images.safetensors"
        asked = dict(format=1, prompts=PROMPTS, seeds=[3, 4, 5, 6, 7], steps=3, cfg_scale=2.0, device="cpu") | asked
        request.write_text(json.dumps(asked))
        assert T.main(["--paint", str(request), "--out", str(out)]) == code
        return load_file(out)["images"] if code == 0 else None

    return paint


def test_an_image_is_painted_from_its_prompt_and_seed_alone(paint, painted_run):
    """By the formula, and whatever the batch, the order and what else is asked for: so on any number of ranks."""
    images = paint()
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
    text = T.TextEncoder(str(painted_run / "text"), max_tokens=40)
    noise_of = lambda seed: torch.randn((3, 32, 32), generator=torch.Generator("cpu").manual_seed(seed))
    noise = torch.stack([noise_of(seed) for seed in range(3, 8)])
    x = T.sample(T.load_transformer(painted_run / "transformer"), noise, *text.encode(PROMPTS), *text.encode([""]),
                 steps=3, cfg_scale=2.0, shift=2.0, predict="x")
    near = lambda a, b: (a.int() - b.int()).abs().max() <= 1
    assert near(images, ((x + 1) * 127.5).round().clamp(0, 255)) and images.float().std() > 10
    assert near(paint(batch=2), images)
    halves = [paint(prompts=PROMPTS[s], seeds=[3, 4, 5, 6, 7][s]) for s in (slice(0, 2), slice(2, 5))]
    assert near(torch.cat(halves), images)
    assert near(paint(prompts=PROMPTS[::-1], seeds=[7, 6, 5, 4, 3]).flip(0), images)
    same_prompt, same_seed = paint(prompts=["a"] * 2, seeds=[1, 2]), paint(prompts=["a red ring", "a blue cross"],
                                                                          seeds=[1, 1])
    assert not near(*same_prompt) and not near(*same_seed)


def test_a_request_chooses_steps_guidance_precision_size_and_weights(paint):
    images = paint()
    for change in (dict(steps=2), dict(cfg_scale=1.0), dict(precision="bf16"), dict(transformer="exports/a")):
        assert not torch.equal(paint(**change), images), change
    low = paint(precision="bf16")
    assert (low.float() - images.float()).abs().mean() < 5
    assert paint(height=24, width=48).shape == (5, 3, 24, 48)


def test_an_unknown_request_is_one_sentence(paint, tmp_path, capsys):
    paint(code=2, sampler="heun")
    assert "asks for sampler, which this script does not know" in capsys.readouterr().err
    assert T.main(["--paint", str(tmp_path / "gone.json"), "--out", str(tmp_path / "x")]) == 2
    assert "gone.json" in capsys.readouterr().err
    assert T.main(["--paint", "a"]) == 2
    assert "--paint REQUEST.json --out IMAGES.safetensors" in capsys.readouterr().err


def test_a_runs_own_script_paints_from_anywhere(painted_run, paint, tmp_path):
    expected = paint(prompts=PROMPTS[:2], seeds=[3, 4])
    request = dict(format=1, prompts=PROMPTS[:2], seeds=[3, 4], steps=3, cfg_scale=2.0, device="cpu")
    (tmp_path / "own.json").write_text(json.dumps(request))
    done = shell(painted_run / "train_prx.py", "--paint", "own.json", "--out", "own.safetensors", cwd=tmp_path)
    assert done.returncode == 0 and "painted 2 of 2" in done.stderr, done.stderr
    assert torch.equal(load_file(tmp_path / "own.safetensors")["images"], expected)
