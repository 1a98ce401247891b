"""Every technique of the article against a plain reference written here, all parameters random, gradients included."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_prx as T
from data import encoders
from data.preflight import read_metrics

SIZE = dict(in_channels=3, patch_size=4, context_in_dim=20, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=5)
RUN = ("--track micro --repa 0 --ema 0.99 --hidden 32 --heads 2 --depth 4 --batch 16 --samples 0 --sample-steps 2 --compile off "
       "--compute fp32 --tread-blocks 1-2 --repa-layer 2").split()


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
    model = random_model(span=(1, 3), sprint=sprint)
    x, _, t, text, mask = inputs()
    keep = T.route(8, x, 4, 0.5, torch.Generator().manual_seed(2))
    assert keep.shape == (8, 8) and all(len(set(row)) == 8 for row in keep.tolist()) and len(set(map(tuple, keep.tolist()))) > 1
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
    plain, routed = random_model(), random_model(span=(1, 3))
    assert torch.equal(plain(x, t, text, mask), routed(x, t, text, mask))
    assert torch.allclose(plain(x, t, text, mask), routed(x, t, text, mask, everything), atol=1e-5)
    for p in (fresh := T.PRX(**SIZE, span=(1, 3), sprint=True).initialize(0)).blocks.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    same = T.PRX(**SIZE)
    same.load_state_dict({k: v for k, v in fresh.state_dict().items() if k not in ("skipped_token", "fuse.weight", "fuse.bias")})
    torch.nn.init.normal_(same.final_layer.linear.weight)
    fresh.final_layer.linear.weight.data.copy_(same.final_layer.linear.weight)
    assert torch.allclose(fresh(x, t, text, mask), same(x, t, text, mask), atol=1e-5)


def test_the_scorer_picks_the_best_tokens_and_learns():
    """Values are those of plain routing with its choice; its gradient is that of scaling by the sigmoid of the score."""
    model = random_model(span=(1, 3), scorer=True)
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
    now = T.take(score[..., None], kept).sigmoid().detach()

    def scaled(w):
        gate = 1 + F.linear(T.take(h[0].detach(), kept), w, model.scorer.bias).sigmoid() - now
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


def test_self_guidance_is_an_explicit_loop_and_does_not_depend_on_the_batch():
    model = random_model(span=(1, 3))
    noise, _, _, text, mask = inputs(3)
    options = dict(steps=3, cfg_scale=2.5, shift=1.5, predict="v", skipped=0.5)
    got = T.sample(model, noise, text, mask, None, None, **options)
    assert torch.allclose(got[1:2], T.sample(model, noise[1:2], text[1:2], mask[1:2], None, None, **options), atol=1e-4)
    x, routes = noise, T.generator_for("cpu", 3, 3)
    grid = T.shift_time(torch.linspace(1, 0, 4), 1.5).tolist()
    for a, b in zip(grid, grid[1:]):
        keep, time = T.route(1, x, 4, 0.5, routes).expand(3, -1), torch.full((3,), a)
        weak, full = model(x, time, text, mask, keep), model(x, time, text, mask)
        x = x + (b - a) * (weak + 2.5 * (full - weak))
    assert torch.allclose(got, x, atol=1e-5) and not torch.allclose(got, T.sample(
        model, noise, text, mask, text[:1], mask[:1], steps=3, cfg_scale=2.5, shift=1.5, predict="v"), atol=1e-3)


# --- objectives

@pytest.mark.parametrize("predict", ["v", "x"])
def test_contrastive_loss_is_an_explicit_loop_and_ignores_micro_batches(predict):
    model = random_model()
    x_0, eps, t, text, mask = inputs(16)
    loss, plain, estimate, _ = T.flow_matching_loss(model, x_0, eps, t, text, mask, predict, contrastive=0.05)
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
    halves = [T.flow_matching_loss(model, x_0[s], eps[s], t[s], text[s], mask[s], predict, 0.05)[0]
              for s in (slice(0, 8), slice(8, 16))]
    assert torch.allclose(torch.cat(halves), loss, rtol=1e-5)


def test_repa_is_minus_the_mean_cosine_of_visible_tokens():
    g = torch.Generator().manual_seed(0)
    head = T.Alignment(32, 24, "repa").initialize(0)
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
    head = T.Alignment(32, 24, "irepa").initialize(0)
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
    t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(patch_size=8, num_register_tokens=4, **small)).save_pretrained(
        top / "dinov2")
    t.Dinov2Model(t.Dinov2Config(patch_size=14, **small | dict(image_size=56))).save_pretrained(top / "plain")
    return top


@pytest.mark.parametrize("kind", ["dinov3", "dinov2", "plain"])
def test_a_teachers_grid_is_the_token_grid_and_special_tokens_are_dropped(teachers, kind):
    teacher = encoders.Teacher("repa-teacher", str(teachers / kind))
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
    teacher = encoders.Teacher("pdino-teacher", str(teachers / "plain"))
    x, x_0 = torch.rand(2, 2, 3, 56, 56) * 2 - 1
    x.requires_grad_(True)
    loss = T.perceptual_loss(teacher, x, x_0)
    a, b = teacher(x, 4, 4), teacher(x_0, 4, 4)
    for i in range(2):
        assert torch.allclose(loss[i], 1 - torch.stack([F.cosine_similarity(a[i, j], b[i, j], dim=0) for j in range(16)]).mean(),
                              atol=1e-5)
    loss.sum().backward()
    assert x.grad.abs().sum() > 0 and torch.allclose(T.perceptual_loss(teacher, x_0, x_0), torch.zeros(2), atol=1e-5)


def test_bf16_weights_are_what_bf16_storage_gives_and_count_what_is_lost():
    model = random_model()
    reference = copy.deepcopy(model)
    c = T.dataclasses.replace(T.Config(), optimizer="adamw", lr=1e-4, weights="bf16", ema=0.0, clip=0.0)
    optimizer = T.MuonAdamW(model.named_parameters(), c)
    stored = {n: p.detach().bfloat16() for n, p in reference.named_parameters()}
    adam = torch.optim.AdamW(reference.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(3):
        lost = total = 0
        with torch.no_grad():
            for n, p in reference.named_parameters():
                p.copy_(stored[n])
        for (n, p), q in zip(model.named_parameters(), reference.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step * 100 + p.numel() % 97))
            q.grad = p.grad.clone()
        optimizer.accumulate()
        optimizer.step()
        adam.step()
        for n, p in reference.named_parameters():
            moved = p.detach() != stored[n].float()
            new = p.detach().bfloat16()
            lost, total = lost + int((moved & (new == stored[n])).sum()), total + int(moved.sum())
            stored[n] = new
        assert optimizer.lost.item() == pytest.approx(lost / total, abs=0.01) and 0.3 < lost / total < 1
    for n, p in model.named_parameters():
        assert (p == p.bfloat16().float()).all() and (p - stored[n].float()).abs().max() <= 2 ** -7 * p.abs().max(), n


# --- whole runs

def run(*flags, code=0):
    assert T.main([*RUN, *map(str, flags)]) == code


def losses(name):
    return [x for record in read_metrics(Path("logs") / name) for x in record.get("losses", [])]


TECHNIQUES = {
    "repa": ["--repa", 0.5], "irepa": ["--repa", 0.5, "--repa-kind", "irepa"], "tread": ["--tread", 0.5],
    "tread-learned": ["--tread", 0.5, "--tread-select", "learned", "--guidance", "self"], "sprint": ["--sprint", 0.75],
    "tread-repa": ["--tread", 0.5, "--repa", 0.5], "contrastive": ["--contrastive", 0.05], "v": ["--predict", "v"],
    "pdino": ["--pdino", 0.1], "bf16": ["--weights", "bf16"], "adamw": ["--optimizer", "adamw"], "no-ema": ["--ema", 0],
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_each_technique_trains_and_resumes_bit_for_bit(in_tmp, teachers, name):
    flags = [*TECHNIQUES[name], "--repa-teacher", teachers / "dinov3", "--pdino-teacher", teachers / "dinov2", "--steps", 6,
             "--captions", "mix:0.5"]
    run(*flags, "--name", "whole")
    run(*flags, "--name", "cut", "--stop-after", 3)
    run(*flags, "--name", "cut")
    assert losses("whole") == losses("cut") and np.isfinite(losses("whole")).all()
    a, b = (T.load_transformer(f"logs/{n}/transformer").state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    run("--steps", 6, "--captions", "mix:0.5", "--name", "plain")
    if name not in ("no-ema",):
        plain = T.load_transformer("logs/plain/transformer").state_dict()
        assert any(not torch.equal(plain[k], a[k]) for k in plain), "the switch changes nothing"


@pytest.mark.parametrize("until", [0.5, 48])
def test_burn_in_frees_the_teacher_and_the_projector_and_resumes(in_tmp, teachers, until, capsys, monkeypatch):
    """By share of the run and by samples: 3 of 6 steps of 16."""
    flags = ["--repa", 0.5, "--repa-teacher", teachers / "dinov3", "--repa-until", until, "--steps", 6]
    run(*flags, "--name", "whole")
    assert "REPA ends at step 3: the teacher is gone" in capsys.readouterr().out
    for stop in (2, 5, 0):  # before the end of the burn-in and after it
        if stop == 0:
            monkeypatch.setattr(encoders, "Teacher", None)  # nobody needs it any more
        run(*flags, "--name", "cut", "--stop-after", stop)
    assert losses("whole") == losses("cut")
    state = Path("logs/cut/checkpoint")
    keys = {p.name: T.safe_open(p / "rank-0.safetensors", "pt").keys() for p in state.iterdir()}
    assert not any(k.startswith("repa.") for k in keys["step-00000005"])
    assert json.loads((state / "step-00000005/state.json").read_text())["burned_in"]


def test_repa_raises_the_similarity(in_tmp, monkeypatch):
    """A projector and a model that learn: the alignment goes up, which a cut gradient would not do."""
    seen, forward = [], T.Alignment.forward
    monkeypatch.setattr(T.Alignment, "forward", lambda self, *a: (out := forward(self, *a), seen.append(-out.mean().item()))[0])
    run("--repa", 2.0, "--repa-teacher", T.ROOT / "data/networks/dino", "--steps", 60, "--name", "r", "--lr", 0.01,
        "--lr-adamw", 0.01)
    assert np.mean(seen[-5:]) > np.mean(seen[:5]) + 0.3


def test_alignment_may_differ_between_stages_and_ends_with_the_last_one_that_has_it(in_tmp, monkeypatch, capsys):
    """The 24 h track has REPA in its first stage only; a run too short for the burn-in comes to the next one with it."""
    c = T.TRACKS["micro"][0]
    stages = [T.Stage("a", 0.25), T.Stage("b", 0.25, off := dict(repa=0.0)), T.Stage("c", 0.25), T.Stage("d", 0.25, off)]
    monkeypatch.setitem(T.TRACKS, "micro", (T.dataclasses.replace(c, repa_until=51e6, repa=0.5), stages))
    assert RUN[2:4] == ["--repa", "0"]
    flags, moved, step = [*RUN[:2], *RUN[4:], "--steps", "8"], [], T.MuonAdamW.step

    def spy(self, *args, **more):
        moved.append(len(self.params) < 10)
        return step(self, *args, **more)

    monkeypatch.setattr(T.MuonAdamW, "step", spy)
    assert T.main([*flags, "--name", "whole"]) == 0
    assert moved == [False, True] * 2 + [False] * 2 + [False, True] * 2 + [False] * 2  # model, projector
    assert capsys.readouterr().out.count("REPA ends at step 6") == 1
    for stop in (1, 3, 5, 7, 0):
        assert T.main([*flags, "--name", "cut", "--stop-after", str(stop)]) == 0
    a, b = (T.load_transformer(f"logs/{n}/transformer").state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_ranks_follow_one_with_everything_on(in_tmp, teachers):
    import subprocess
    import sys

    flags = ["--steps", 6, "--repa", 0.5, "--repa-teacher", teachers / "dinov3", "--repa-until", 0.5, "--contrastive", 0.05,
             "--tread", 0.5]
    run(*flags, "--name", "one")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", T.__file__,
                           *RUN, *map(str, flags), "--name", "two"], capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.allclose(losses("one"), losses("two"), rtol=1e-4)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile on CPU needs a C++ compiler")
def test_routing_and_alignment_compile(in_tmp, teachers):
    flags = ["--steps", 3, "--tread", 0.5, "--repa", 0.5, "--repa-teacher", teachers / "dinov3"]
    run(*flags, "--name", "eager")
    run(*flags, "--name", "compiled", "--compile", "on")
    assert np.allclose(losses("eager"), losses("compiled"), rtol=1e-4)
    torch.compiler.reset()


def test_a_sprint_model_loads_again_and_says_that_it_is_not_diffusers(in_tmp, capsys):
    run("--sprint", 0.75, "--steps", 2, "--name", "r")
    model = T.load_transformer("logs/r/transformer")
    assert model.config["sprint"] and model.span == [1, 2]
    assert "is not in diffusers' model" in capsys.readouterr().out
    config = Path("logs/r/config.json")
    config.write_text(config.read_text().replace('"vae": "none"', '"vae": "flux"').replace('"predict": "x"', '"predict": "v"'))
    import eval_prx
    assert eval_prx.main(["export", "logs/r", "--out", "p"]) == 2
    assert "--sprint or a learned scorer" in capsys.readouterr().err


def test_a_run_with_tread_is_sampled_with_self_guidance(in_tmp, capsys):
    import eval_prx

    run("--tread", 0.5, "--steps", 2, "--name", "r")
    run("--steps", 2, "--name", "plain")
    flags = ["--n", "8", "--steps", "2", "--inception", "none", "--clip", "none", "--dino", "none", "--guidance", "self"]
    assert eval_prx.main(["logs/r", *flags]) == 0
    assert json.loads(Path("logs/r/metrics.json").read_text())["protocol"]["guidance"] == "self"
    assert eval_prx.main(["logs/plain", *flags]) == 2
    assert "was not trained with --tread" in capsys.readouterr().err


def test_a_teacher_that_lacks_weights_is_refused(teachers, tmp_path):
    shutil.copytree(teachers / "dinov3", tmp_path / "t")
    tensors = T.load_file(tmp_path / "t/model.safetensors")
    del tensors["norm.weight"]
    T.save_file(tensors, tmp_path / "t/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(T.UserError, match="it lacks weights such as norm.weight"):
        encoders.Teacher("repa-teacher", str(tmp_path / "t"))


@pytest.mark.parametrize("flags, says", [
    (["--tread", 0.5, "--sprint", 0.5], "--tread and --sprint both route tokens"),
    (["--tread", 1], "--tread 1.0 must be at least 0 and less than 1"),
    (["--tread", 0.5, "--tread-blocks", "1-9"], "--tread-blocks 1-9 must name a first and a last block of 0 to 3"),
    (["--tread", 0.5, "--tread-blocks", "all"], "--tread-blocks all must name"),
    (["--repa", 0.5, "--repa-layer", 4], "--repa-layer 4 is not one of the blocks 0 to 3"),
    (["--repa", 0.5, "--repa-kind", "irepa", "--tread", 0.5], "--repa-kind irepa needs all tokens at --repa-layer 2"),
    (["--repa", 0.5, "--repa-teacher", "/gone"], "--repa-teacher /gone"),
    (["--contrastive", 0.05, "--batch", 12], "--contrastive compares groups of 8 samples, and --batch 12"),
    (["--guidance", "self"], "--guidance self compares full with routed tokens and needs --tread"),
    (["--pdino", 0.1, "--vae", "flux"], "--pdino compares pixels and works in pixel space only"),
    (["--repa-kind", "x"], "--repa-kind x is unknown; use one of repa, irepa"),
])
def test_what_cannot_work_is_refused(in_tmp, capsys, flags, says):
    run("--steps", 2, *flags, code=2)
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_self_guidance_needs_one_stage_that_routes_not_all():
    from data.settings import parse_args

    config, stages = parse_args(["--guidance", "self"])  # 24h, whose 256 px stage does not route
    assert config.guidance == "self" and [s.knobs.get("tread", 0) for s in stages] == [0, 0.5]


def test_repa_without_images_is_refused(in_tmp, capsys):
    from test_shards import LATENT, write_shards

    write_shards(in_tmp / "d", latent=LATENT, image=None)
    with pytest.raises(T.UserError, match="--repa shows images to its teacher and .* holds none; prepare it with --store"):
        from data.shards import ShardData
        ShardData(T.dataclasses.replace(T.TRACKS["micro"][0], data=str(in_tmp / "d"), vae="v", repa=0.5))
