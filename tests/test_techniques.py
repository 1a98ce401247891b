"""Every technique of the article against a plain reference written here, all parameters random, gradients included."""

import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SCRIPT, TINY, losses, metrics, run, same, shell, torchrun, weights
from safetensors.torch import load_file, save_file
from test_shards import LATENT, write_shards
from torch import nn

import train_prx as T

SIZE = dict(in_channels=3, patch_size=4, context_in_dim=20, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=5)
DEEP = ["--depth", 4, "--tread-blocks", "1-2", "--repa-layer", 2]  # for runs with routing or alignment


def random_model(**kw):
    model = T.PRX(**SIZE, **kw)
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm_" in name else 0.0, 0.15, generator=g)
    return model


def inputs(n=8, size=16):
    g = torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, n, 3, size, size, generator=g)
    t, text = torch.rand(n, generator=g) * 0.9 + 0.05, torch.randn(n, 7, 20, generator=g)
    mask = torch.arange(7) < torch.randint(1, 8, (n, 1), generator=g)
    return x, eps, t, text, mask


def by_hand(model, x, t, text, mask, keep, first, last, sprint=False):
    """The model with routing as dense masking, sample by sample: every block runs on all tokens, the skipping ones are
    masked as keys and their results thrown away."""
    outputs, taps = [], []
    for b in range(len(x)):
        p, N = 4, (x.shape[2] // 4) * (x.shape[3] // 4)
        tokens = F.unfold(x[b:b + 1], p, stride=p).transpose(1, 2)
        h, words = model.img_in(tokens), model.txt_in(text[b:b + 1])
        vec = model.time_in(model.time_embedding(t[b:b + 1]))
        rope = T.rope_table(x.shape[2] // p, x.shape[3] // p, [8, 8], 10000, "cpu")
        there = torch.zeros(N, dtype=torch.bool)
        there[keep[b]] = True
        tap = []
        for i, block in enumerate(model.blocks):
            inside = first <= i <= last
            keys = torch.cat([mask[b], there if inside else torch.ones(N, dtype=torch.bool)])
            bias = torch.zeros(1, 1, 1, len(keys)).masked_fill(~keys, -torch.inf)
            before = h
            if i == first:
                dense = h
            h = block(h, words, vec, rope, bias)
            if inside:
                h = torch.where(there[None, :, None], h, before)
            tap.append(h[:, keep[b]] if inside else h)
            if i == last and sprint:
                deep = torch.where(there[None, :, None], h, model.skipped_token.expand_as(h))
                h = model.fuse(torch.cat([dense, deep], -1))
        h = model.final_layer(h, vec)
        outputs.append(F.fold(h.transpose(1, 2), x.shape[2:], p, stride=p))
        taps.append(tap)
    return torch.cat(outputs), taps


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- TREAD and SPRINT

@pytest.mark.parametrize("sprint", [False, True])
def test_gather_and_scatter_equal_dense_masking(sprint):
    model = random_model(span=(1, 4), sprint=sprint)
    x, _, t, text, mask = inputs()
    keep = T.route(8, 16, 0.5, torch.Generator().manual_seed(2))
    assert keep.shape == (8, 8) and keep.max() < 16 and len(set(map(tuple, keep.tolist()))) > 1
    assert all(row == sorted(set(row)) for row in keep.tolist())
    out, tokens, kept = model(x, t, text, mask, keep, tap=2)
    expected, taps = by_hand(model, x, t, text, mask, keep, 1, 3, sprint)
    assert torch.equal(kept, keep) and torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(tokens, torch.cat([tap[2] for tap in taps]), atol=1e-5)
    assert not torch.allclose(out, model(x, t, text, mask), atol=1e-2)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    ours, theirs = (gradients(model, (o * weight).sum()) for o in (out, expected))
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name, g in theirs.items():
        assert torch.allclose(ours[name], g, atol=1e-4 * max(1.0, g.abs().max().item())), name


def test_with_all_tokens_tread_is_no_other_model_and_a_fresh_sprint_is_a_plain_one():
    x, _, t, text, mask = inputs()
    everything = torch.arange(16).expand(8, -1)
    plain, routed = random_model(), random_model(span=(1, 4))
    assert torch.equal(plain(x, t, text, mask), routed(x, t, text, mask))
    assert torch.allclose(plain(x, t, text, mask), routed(x, t, text, mask, everything), atol=1e-5)
    fresh = T.initialize(T.PRX(**SIZE, span=(1, 4), sprint=True), 0)
    for p in [*fresh.blocks.parameters(), fresh.final_layer.linear.weight]:
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    plain.load_state_dict({k: v for k, v in fresh.state_dict().items() if not k.startswith(("skipped_token", "fuse"))})
    assert torch.allclose(fresh(x, t, text, mask), plain(x, t, text, mask), atol=1e-5)


def test_the_scorer_picks_the_best_tokens_and_learns():
    """Values are those of plain routing with its choice; its gradient is that of scaling by the score's sigmoid."""
    model = random_model(span=(1, 4), scorer=True)
    x, _, t, text, mask = inputs()
    like = torch.empty(8, 6, dtype=torch.long)
    out, _, kept = model(x, t, text, mask, like, tap=2)
    h = []
    hook = model.blocks[0].register_forward_hook(lambda m, a, o: h.append(o))
    model(x, t, text, mask)
    hook.remove()
    score = model.scorer(h[0])[..., 0]
    assert torch.equal(kept, score.topk(6, 1).indices.sort(1).values)
    expected, _ = by_hand(model, x, t, text, mask, kept, 1, 3)
    assert torch.allclose(out, expected, atol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    analytic = gradients(model, (out * weight).sum())["scorer.weight"]
    # the same by a model in which the routed tokens are scaled by 1 + sigmoid(score) - sigmoid(the score now)
    now = score.gather(1, kept)[..., None].sigmoid().detach()

    def scaled(w):
        gate = 1 + F.linear(h[0].detach().take_along_dim(kept[..., None], 1), w, model.scorer.bias).sigmoid() - now
        plain = T.PRX.choose
        T.PRX.choose = lambda self, hidden, keep: (kept, gate)
        try:
            return (model(x, t, text, mask, like) * weight).sum()
        finally:
            T.PRX.choose = plain

    w = model.scorer.weight.detach().clone()
    for i in (0, 7, 31):
        step = torch.zeros_like(w)
        step[0, i] = 1e-2
        numeric = (scaled(w + step) - scaled(w - step)).item() / 2e-2
        assert numeric == pytest.approx(analytic[0, i].item(), rel=0.05, abs=0.02) and abs(numeric) > 1e-4


# --- objectives

@pytest.mark.parametrize("predict", ["v", "x"])
def test_contrastive_loss_is_an_explicit_loop_and_ignores_micro_batches(predict):
    model = random_model()
    x_0, eps, t, text, mask = inputs(16)
    c = dataclasses.replace(T.Config(), predict=predict, contrastive=0.05)
    loss, plain, estimate, _ = T.flow_matching_loss(model, x_0, eps, t, text, mask, c)
    x_t = (1 - t.view(-1, 1, 1, 1)) * x_0 + t.view(-1, 1, 1, 1) * eps
    output = model(x_t, t, text, mask)
    for i in range(16):
        clamp = max(t[i].item(), 0.05)
        v = output[i] if predict == "v" else (x_t[i] - output[i]) / clamp
        target = lambda j: eps[j] - x_0[j] if predict == "v" else (x_t[j] - x_0[j]) / max(t[j].item(), 0.05)
        other = i // 8 * 8 + (i - 1) % 8
        own = (v - target(i)).square().mean()
        assert torch.allclose(plain[i], own, rtol=1e-4)
        assert torch.allclose(loss[i], own - 0.05 * (v - target(other)).square().mean(), rtol=1e-4)
        assert torch.allclose(estimate[i], x_t[i] - t[i] * v if predict == "v" else output[i], atol=1e-5)
    halves = [T.flow_matching_loss(model, x_0[s], eps[s], t[s], text[s], mask[s], c)[0]
              for s in (slice(0, 8), slice(8, 16))]
    assert torch.allclose(torch.cat(halves), loss, rtol=1e-5)


def test_repa_is_minus_the_mean_cosine_of_visible_tokens():
    g = torch.Generator().manual_seed(0)
    head = T.initialize(T.Alignment(32, 24, "repa"), 0)
    tokens, features = torch.randn(3, 5, 32, generator=g), torch.randn(3, 16, 24, generator=g)
    kept = torch.stack([torch.randperm(16, generator=g)[:5] for _ in range(3)])
    got = head(tokens, kept, features, 4, 4)
    for b in range(3):
        cosines = [F.cosine_similarity(head.mlp(tokens[b, j]), features[b, kept[b, j]], dim=0) for j in range(5)]
        assert torch.allclose(got[b], -torch.stack(cosines).mean(), atol=1e-6)
    assert [tuple(p.shape) for p in T.Alignment(1792, 1024, "repa").parameters() if p.ndim == 2] == [
        (1024, 1792), (1024, 1024), (1024, 1024)]  # PRX's projector


def test_irepa_is_a_convolution_against_spatially_normalised_features():
    g = torch.Generator().manual_seed(0)
    head = T.initialize(T.Alignment(32, 24, "irepa"), 0)
    tokens, features = torch.randn(2, 12, 32, generator=g), torch.randn(2, 12, 24, generator=g) + 3
    conv = torch.nn.Conv2d(32, 24, 3, padding=1)
    conv.weight.data = head.mlp[0].weight.data.view(24, 32, 3, 3)
    conv.bias.data = head.mlp[0].bias.data
    out = conv(tokens.transpose(1, 2).reshape(2, 32, 3, 4)).flatten(2).transpose(1, 2)
    for b in range(2):
        f = features[b]
        f = (f - head.GAMMA * f.mean(0)) / f.std(0)
        expected = -F.cosine_similarity(out[b], f, dim=1).mean()
        assert torch.allclose(head(tokens, None, features, 3, 4)[b], expected, atol=1e-5)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Small random vision transformers of the published families, in their format."""
    import transformers as t

    top = tmp_path_factory.mktemp("teachers")
    small = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32)
    torch.manual_seed(0)
    t.DINOv3ViTModel(t.DINOv3ViTConfig(patch_size=8, num_register_tokens=4, **small)).save_pretrained(top / "dinov3")
    registers = t.Dinov2WithRegistersConfig(patch_size=8, num_register_tokens=4, **small)
    t.Dinov2WithRegistersModel(registers).save_pretrained(top / "dinov2")
    t.Dinov2Model(t.Dinov2Config(patch_size=14, **small | dict(image_size=56))).save_pretrained(top / "plain")
    return top


@pytest.mark.parametrize("kind", ["dinov3", "dinov2", "plain"])
def test_a_teachers_grid_is_the_token_grid_and_special_tokens_are_dropped(teachers, kind):
    teacher = T.Teacher(str(teachers / kind))
    images = torch.rand(2, 3, 48, 64) * 2 - 1
    features = teacher(images, 3, 4)
    p = teacher.patch
    resized = F.interpolate(images, (3 * p, 4 * p), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((resized + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        states = teacher.model(pixel_values=x).last_hidden_state
    assert states.shape[1] == 12 + (1 if kind == "plain" else 5)
    assert torch.allclose(features, states[:, -12:], atol=1e-5) and features.shape == (2, 12, 24)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_p_dino_is_one_minus_cosine_and_its_gradient_reaches_the_pixels(teachers):
    teacher = T.Teacher(str(teachers / "plain"))
    x, x_0 = torch.rand(2, 2, 3, 56, 56) * 2 - 1
    x.requires_grad_(True)
    loss = T.perceptual_loss(teacher, x, x_0)
    a, b = teacher(x, 4, 4), teacher(x_0, 4, 4)
    for i in range(2):
        cosines = [F.cosine_similarity(a[i, j], b[i, j], dim=0) for j in range(16)]
        assert torch.allclose(loss[i], 1 - torch.stack(cosines).mean(), atol=1e-5)
    loss.sum().backward()
    assert x.grad.abs().sum() > 0 and torch.allclose(T.perceptual_loss(teacher, x_0, x_0), torch.zeros(2), atol=1e-5)


def test_bf16_weights_are_what_bf16_storage_gives():
    model = random_model()
    reference = copy.deepcopy(model)
    c = dataclasses.replace(T.Config(), optimizer="adamw", lr=1e-4, weights="bf16", ema=0.0, clip=0.0)
    optimizer = T.MuonAdamW(nn.ModuleDict(dict(model=model)), c, T.World())
    stored = {n: p.detach().bfloat16() for n, p in reference.named_parameters()}
    adam = torch.optim.AdamW(reference.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(3):
        lost = total = 0
        with torch.no_grad():
            for n, p in reference.named_parameters():
                p.copy_(stored[n])
        for p, q in zip(model.parameters(), reference.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step * 100 + p.numel() % 97))
            q.grad = p.grad.clone()
        optimizer.accumulate()
        optimizer.step()
        adam.step()
        for n, p in reference.named_parameters():
            moved, new = p.detach() != stored[n].float(), p.detach().bfloat16()
            lost, total = lost + int((moved & (new == stored[n])).sum()), total + int(moved.sum())
            stored[n] = new
        assert 0.3 < lost / total < 1, "the rate is to be one at which BF16 loses updates"
    for n, p in model.named_parameters():
        assert (p == p.bfloat16().float()).all() and (p - stored[n].float()).abs().max() <= 2 ** -7 * p.abs().max(), n


# --- the training step

TIMES = [0.001, 0.04, 0.11, 0.19, 0.23, 0.34, 0.37, 0.38, 0.55, 0.57, 0.66, 0.72, 0.91, 0.95, 0.99, 0.9999]
BINS = [2, 2, 1, 3, 0, 2, 1, 1, 0, 4]  # how many of them lie in each tenth


def step_parts(teachers, **knobs):
    """What training_step takes, for a model with random weights: nets, frozen networks, a batch and settings."""
    c = dataclasses.replace(T.TRACKS["micro"][0], **dict(patch=4, predict="v", repa=0.0, accumulate=1) | knobs)
    model = random_model(span=(1, 3))
    nets = nn.ModuleDict(dict(model=model, repa=T.initialize(T.Alignment(32, 24, "repa"), 0)))
    frozen = T.Frozen(teacher=T.Teacher(str(teachers / "dinov3")), critic=T.Teacher(str(teachers / "dinov2")))
    g = torch.Generator().manual_seed(4)
    x = torch.randint(0, 256, (16, 3, 16, 16), generator=g, dtype=torch.uint8)
    t = torch.tensor(TIMES)
    eps, text = torch.randn(16, 3, 16, 16, generator=g), torch.randn(16, 7, 20, generator=g)
    mask = torch.arange(7) < torch.randint(1, 8, (16, 1), generator=g)
    return nets, frozen, T.Batch(x, t, text, mask, eps=eps), c



def test_loss_by_noise_level_lies_in_the_tenth_of_its_time(teachers):
    """Sums of the plain loss, not of what is minimised, and counts: a bin without samples has zero of both."""
    nets, frozen, batch, c = step_parts(teachers, contrastive=0.1)
    loss, by_time = T.training_step(nets, frozen, batch, c, False)
    x_t = (1 - batch.t.view(-1, 1, 1, 1)) * (batch.x / 127.5 - 1) + batch.t.view(-1, 1, 1, 1) * batch.eps
    with torch.no_grad():
        v = nets["model"](x_t, batch.t, batch.text, batch.mask)
    each = (v - (batch.eps - batch.x / 127.5 + 1)).square().mean((1, 2, 3))
    expected = [sum(e for e, t in zip(each.tolist(), batch.t.tolist()) if i <= 10 * t < i + 1) for i in range(10)]
    assert by_time.shape == (2, 10) and by_time[1].tolist() == BINS
    assert by_time[0].tolist() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(each.mean().item(), rel=1e-4) and not loss.requires_grad


def test_the_log_has_the_mean_loss_of_each_noise_level_over_its_steps(tmp_path):
    """Weighted by samples; what no sample fell into is zero; loss, norm and progress of each step in order."""
    optimizer = SimpleNamespace(skipped=torch.tensor(3.0), in_a_row=torch.tensor(0.0))
    heart = T.Heartbeat(SimpleNamespace(
        log=T.Log(tmp_path, T.World()), world=T.World(), configs=[T.Config(batch=32)], optimizer=optimizer,
        state=dict(step=7, samples=224, stage=0), no_checkpoint_since=None), 10.0)
    by_time = torch.zeros(3, 2, 10)
    by_time[0, :, 0], by_time[1, :, 0], by_time[1, :, 7], by_time[2, :, 9] = (torch.tensor(pair) for pair in (
        (2.0, 1.0), (9.0, 3.0), (5.0, 2.0), (1.0, 4.0)))
    for i in range(3):
        heart.pending.append((torch.tensor(1.0 + i), by_time[i], torch.tensor(0.5 * i), 0.1 * i))
    heart.beat(12.0, None, 0.0)
    [record] = T.read_metrics(tmp_path)
    assert record["loss_by_time"] == pytest.approx([11 / 4, 0, 0, 0, 0, 0, 0, 5 / 2, 0, 1 / 4])
    assert record["losses"] == [1.0, 2.0, 3.0] and record["loss"] == 2.0 and record["grad_norm"] == 0.5
    assert record["progresses"] == [0.0, 0.1, 0.2] and record["progress"] == 0.2
    assert record["images_per_s"] == pytest.approx(48) and record["step"] == 7 and heart.pending == []
    assert record["skipped_steps"] == 3


def test_a_run_logs_its_loss_by_noise_level(shards, monkeypatch):
    """Of every sample once; a shift of the times to high noise is seen there, too."""
    share, counts, real = {}, [], T.training_step

    def spy(*args):
        loss, by_time = real(*args)
        counts.append(by_time[1])
        return loss, by_time

    monkeypatch.setattr(T, "warm_up", lambda r: {})
    monkeypatch.setattr(T, "training_step", spy)
    for shift in (0.2, 5.0):
        counts.clear()
        run("--steps", 8, "--shift", shift, "--name", f"s{shift}", "--accumulate", 2)
        total = torch.stack(counts).sum(0)
        assert total.sum() == 8 * 16 and len(metrics(f"s{shift}")[0]["loss_by_time"]) == 10
        share[shift] = (total[7:].sum() / total.sum()).item()
    assert share[0.2] < 0.2 and share[5.0] > 0.5


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_minimises_the_mean_of_all_weighted_losses(teachers, accumulate):
    """Flow matching, contrastive, REPA and P-DINO at once, whatever the micro-batches: gradients are those by hand."""
    knobs = dict(contrastive=0.1, repa=0.7, pdino=0.3, repa_layer=1, accumulate=accumulate, batch=32)
    nets, frozen, batch, c = step_parts(teachers, **knobs)
    batch = batch.map(lambda v: torch.cat([v, v.flip(0)]))  # 32, so that a fourth is a group of eight
    batch.keep = T.route(32, 16, 0.5, torch.Generator().manual_seed(0))
    x_0 = batch.x / 127.5 - 1
    losses, plain, estimate, tapped = T.flow_matching_loss(nets["model"], x_0, batch.eps, batch.t, batch.text,
                                                           batch.mask, c, batch.keep, 1)
    features = frozen.teacher(x_0, 4, 4)
    losses = losses + 0.7 * nets["repa"](*tapped, features, 4, 4)
    losses = losses + 0.3 * T.perceptual_loss(frozen.critic, estimate, x_0)
    expected = gradients(nets, losses.mean())
    nets.zero_grad()
    loss = sum(T.training_step(nets, frozen, part, c, True)[0] for part in batch.split(accumulate))
    got = {n: p.grad for n, p in nets.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() == dict(nets.named_parameters()).keys()
    assert loss.item() == pytest.approx(plain.mean().item(), rel=1e-5)  # what is logged: the plain loss
    for name, g in expected.items():
        assert torch.allclose(got[name], g, atol=1e-5 * max(1.0, g.abs().max().item())), name


def test_the_teacher_sees_the_images_where_the_model_sees_latents(teachers):
    nets, frozen, batch, c = step_parts(teachers, repa=0.5, repa_layer=1)
    seen, teacher = [], frozen.teacher

    def watched(*args):
        seen.append(args)
        return teacher(*args)

    frozen.teacher = watched
    latents = torch.randn(16, 3, 16, 16).bfloat16()
    pixels = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    T.training_step(nets, frozen, dataclasses.replace(batch, x=latents, pixels=pixels), c, True)
    T.training_step(nets, frozen, batch, c, True)
    for (images, rows, columns), x in zip(seen, (pixels, batch.x)):
        assert torch.allclose(images, x / 127.5 - 1, atol=1e-6) and (rows, columns) == (4, 4)


# --- whole runs

TECHNIQUES = {
    "repa": ["--repa", 0.5], "irepa": ["--repa", 0.5, "--repa-kind", "irepa"], "tread": ["--tread", 0.5],
    "tread-learned": ["--tread", 0.5, "--tread-select", "learned"], "sprint": ["--sprint", 0.75],
    "tread-repa": ["--tread", 0.5, "--repa", 0.5], "contrastive": ["--contrastive", 0.05], "v": ["--predict", "v"],
    "pdino": ["--pdino", 0.1], "bf16": ["--weights", "bf16"], "adamw": ["--optimizer", "adamw"], "no-ema": ["--ema", 0],
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_each_technique_trains_and_resumes_bit_for_bit(shards, teachers, name):
    common = [*DEEP, "--repa-teacher", teachers / "dinov3", "--pdino-teacher", teachers / "dinov2", "--steps", 6,
              "--captions", "mix:0.5"]
    flags = [*common, *TECHNIQUES[name]]
    run(*flags, "--name", "whole")
    run(*flags, "--name", "cut", "--stop-after", 3)
    run(*flags, "--name", "cut")
    assert losses("whole") == losses("cut") and len(losses("cut")) == 6 and np.isfinite(losses("whole")).all()
    assert same(weights("whole"), weights("cut"))
    run(*common, "--name", "plain")
    plain, other = weights("plain"), weights("whole")
    assert any(not torch.equal(plain[k], other[k]) for k in plain), "the switch changes nothing"


def test_burn_in_frees_the_teacher_stops_reading_images_and_resumes(shards, teachers, capsys, monkeypatch):
    """3 of 6 steps; stopped before the end of the burn-in and after it."""
    flags = [*DEEP, "--repa", 0.5, "--repa-teacher", teachers / "dinov3", "--repa-until", 0.5, "--steps", 6]
    aligned, real = [], T.training_step
    monkeypatch.setattr(T, "warm_up", lambda r: {})

    def training_step(nets, frozen, part, c, align):
        aligned.append((align, frozen.teacher is not None))
        return real(nets, frozen, part, c, align)

    monkeypatch.setattr(T, "training_step", training_step)
    run(*flags, "--name", "whole")
    assert "REPA ends at step 3: the teacher is gone" in capsys.readouterr().out
    assert aligned == [(True, True)] * 3 + [(False, False)] * 3
    for stop in (2, 5):
        run(*flags, "--name", "cut", "--stop-after", stop)
    state = json.loads(Path("logs/cut/checkpoint/step-00000005/state.json").read_text())
    assert state["burned_in"]
    monkeypatch.setattr(T, "Teacher", lambda *a: pytest.fail("nobody needs a teacher any more"))
    run(*flags, "--name", "cut")
    assert losses("whole") == losses("cut") and same(weights("whole"), weights("cut"))
    assert not any("repa" in k for k in weights("whole"))  # the projector is not exported


def test_repa_raises_the_similarity(shards, monkeypatch):
    """A projector and a model that learn: the alignment goes up, which a cut gradient would not do."""
    seen, forward = [], T.Alignment.forward
    monkeypatch.setattr(T.Alignment, "forward", lambda self, *a: (
        out := forward(self, *a), seen.append(-out.mean().item()))[0])
    run(*DEEP, "--repa", 2.0, "--repa-teacher", ROOT / "data/networks/dino", "--steps", 60, "--name", "r", "--lr", 0.01,
        "--lr-adamw", 0.01)
    assert np.mean(seen[-5:]) > np.mean(seen[:5]) + 0.3


def test_alignment_may_differ_between_stages_and_ends_with_the_last_one_that_has_it(shards, monkeypatch, capsys):
    """The 24 h track has REPA in its first stage only; a run too short for the burn-in enters the next with it."""
    c = dataclasses.replace(T.TRACKS["micro"][0], repa_until=1.0, repa=0.5)
    stages = [T.Stage(name, 0.25, dict(repa=repa)) for name, repa in (("a", 0.5), ("b", 0.0), ("c", 0.5), ("d", 0.0))]
    monkeypatch.setitem(T.TRACKS, "micro", (c, stages))
    monkeypatch.setattr(T, "warm_up", lambda r: {})
    at = TINY.index("--repa")
    flags, aligned, real = [*TINY[:at], *TINY[at + 2:], *map(str, DEEP), "--steps", "8"], [], T.training_step
    monkeypatch.setattr(T, "training_step", lambda *a: (aligned.append(a[-1]), real(*a))[1])
    assert T.main([*flags, "--name", "whole"]) == 0
    assert aligned == [True] * 2 + [False] * 2 + [True] * 2 + [False] * 2
    assert capsys.readouterr().out.count("REPA ends at step 6") == 1
    for stop in (1, 3, 5, 7, 0):
        assert T.main([*flags, "--name", "cut", "--stop-after", str(stop)]) == 0
    assert same(weights("whole"), weights("cut")) and losses("whole") == losses("cut")


def test_two_ranks_follow_one_with_everything_on(shards, teachers):
    flags = [*DEEP, "--steps", 6, "--repa", 0.5, "--repa-teacher", teachers / "dinov3", "--repa-until", 0.5,
             "--contrastive", 0.05, "--tread", 0.5]
    run(*flags, "--name", "one")
    done = shell(*torchrun(2), SCRIPT, *TINY, *flags, "--name", "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.allclose(losses("one"), losses("two"), rtol=1e-4) and len(losses("two")) == 6


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile on CPU needs a C++ compiler")
def test_routing_and_alignment_compile(shards, teachers):
    flags = [*DEEP, "--steps", 3, "--tread", 0.5, "--repa", 0.5, "--repa-teacher", teachers / "dinov3"]
    run(*flags, "--name", "eager")
    run(*flags, "--name", "compiled", "--compile", "on")
    assert np.allclose(losses("eager"), losses("compiled"), rtol=1e-4)
    torch.compiler.reset()


def test_a_sprint_model_and_a_scorer_load_again(shards):
    for name, flags in (("sprint", ["--sprint", 0.75]), ("scorer", ["--tread", 0.5, "--tread-select", "learned"])):
        run(*DEEP, *flags, "--steps", 2, "--name", name)
        model = T.load_transformer(f"logs/{name}/transformer")
        assert model.config[name] and model.config["span"] == list(model.span) == [1, 3]
        assert same(model.state_dict(), weights(name))


def test_a_teacher_that_lacks_weights_is_refused(teachers, tmp_path):
    shutil.copytree(teachers / "dinov3", tmp_path / "t")
    tensors = load_file(tmp_path / "t/model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, tmp_path / "t/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(T.UserError, match="it lacks weights such as norm.weight"):
        T.Teacher(str(tmp_path / "t"))


@pytest.mark.parametrize("flags, says", [
    (["--tread", 0.5, "--sprint", 0.5], "--tread and --sprint both route tokens"),
    (["--tread", 1], "--tread 1.0 must be at least 0 and less than 1"),
    (["--tread", 0.5, "--tread-blocks", "1-9"], "--tread-blocks 1-9 must lie in 0 to 3"),
    (["--tread", 0.5, "--tread-blocks", "all"], "--tread-blocks 'all' must name a first and a last block"),
    (["--repa", 0.5, "--repa-layer", 4], "--repa-layer 4 must be one of 0 to 3"),
    (["--repa", 0.5, "--repa-kind", "irepa", "--tread", 0.5], "--repa-layer 2 must see all tokens for irepa"),
    (["--repa", 0.5, "--repa-teacher", "/gone"], "the teacher /gone cannot be loaded"),
    (["--contrastive", 0.05, "--batch", 12], "--batch 12 over --accumulate and ranks must be a multiple of 8 for"),
    (["--pdino", 0.1, "--vae", "flux"], "--pdino compares pixels; give --vae none"),
    (["--repa-kind", "x"], "invalid choice: 'x'"),
])
def test_what_cannot_work_is_refused(shards, capsys, flags, says):
    run(*DEEP, "--steps", 2, *flags, code=2)
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_group_of_contrastive_negatives_fits_into_a_ranks_micro_batch(shards):
    c = dataclasses.replace(T.TRACKS["micro"][0], data="shards/micro", repa=0.0, contrastive=0.05, batch=32)
    T.open_everything([c], False, T.World(size=4))
    with pytest.raises(T.UserError, match="--batch 32 over --accumulate and ranks must be a multiple of 8"):
        T.open_everything([dataclasses.replace(c, accumulate=2)], False, T.World(size=4))


def test_repa_without_images_is_refused(tmp_path):
    write_shards(tmp_path / "d", latent=LATENT, image=None)
    c = dataclasses.replace(T.TRACKS["micro"][0], data=str(tmp_path / "d"), vae="v", repa=0.5)
    with pytest.raises(T.UserError, match="--repa shows images to its teacher, and .* holds none; prepare it with"):
        T.Shards(c)
    T.Shards(dataclasses.replace(c, repa=0.0))
