"""What makes the step fast or small changes nothing in it: FP8, recomputation, symmetric products; and the benchmark."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_prx as T
from data.preflight import read_metrics
from records import variants

sys.path.insert(0, str(T.ROOT / "records"))
import bench  # noqa: E402

SIZE = dict(in_channels=3, patch_size=4, context_in_dim=20, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=3)
SMALL = "--track micro --hidden 32 --heads 2 --depth 3 --batch 8 --tread-blocks 1-1 --repa-layer 1".split()


def randomised(**more):
    model = T.PRX(**SIZE, **more)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1 + (p.ndim == 1)
    return model


def inputs(n=4):
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(n, 8, dtype=torch.bool)
    mask[0, 5:] = False
    return torch.randn(n, 3, 16, 16, generator=g), torch.rand(n, generator=g), torch.randn(n, 8, 20, generator=g), mask


def gradients(model, *args):
    model.zero_grad()
    out = model(*args)
    out.float().square().mean().backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters()}


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("n, m", [(1024, 1100), (1030, 1030), (64, 100)])
def test_a_symmetric_product_of_three_blocks_is_the_product(n, m):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(2, n, m, generator=g) / m ** 0.5
    A = T.gram(X)
    assert torch.allclose(A, X @ X.mT, atol=1e-5) and torch.equal(A[:, n // 2:, :n // 2], A[:, :n // 2, n // 2:].mT)
    assert torch.allclose(T.gram(A, A, -4.775, 2.0315), -4.775 * A + 2.0315 * A @ A, atol=1e-4)


def test_recomputation_gives_the_same_gradients_bit_for_bit():
    model = randomised()
    for keep in (None, T.route(4, torch.zeros(4, 3, 16, 16), 4, 0.5, torch.Generator().manual_seed(0))):
        model.span, args = (1, 1), inputs()
        seen = []
        for model.recompute in (False, True):
            model.zero_grad()
            out = model(*args, keep=keep)
            out = out[0] if isinstance(out, tuple) else out
            out.square().mean().backward()
            seen.append((out.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
        (out, grads), (out_2, grads_2) = seen
        assert torch.equal(out, out_2) and all(torch.equal(grads[n], grads_2[n]) for n in grads)


def test_fp8_rounds_each_tensor_with_its_own_scale_and_nothing_else():
    """Against products of the rounded values in float64; the gradient of the output is rounded to e5m2."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g).bfloat16().requires_grad_(True) for s in ((48, 32), (64, 32)))
    grad = torch.randn(48, 64, generator=g).bfloat16()

    def rounded(v, dtype):
        scale = v.detach().abs().max().float() / torch.finfo(dtype).max
        return (v.detach().float() / scale).to(dtype).double() * scale.double()

    y = T.Fp8Product.apply(x, w)
    y.backward(grad)
    X, W, G = rounded(x, torch.float8_e4m3fn), rounded(w, torch.float8_e4m3fn), rounded(grad, torch.float8_e5m2)
    for got, expected in ((y, X @ W.T), (x.grad, G @ W), (w.grad, G.T @ X)):
        assert relative(got, expected) < 4e-3 and got.dtype == torch.bfloat16  # the result's own rounding
    assert 5e-3 < relative(y, x.double() @ w.double().T) < 6e-2
    assert T.to_fp8(torch.zeros(3), torch.float8_e4m3fn)[0].float().abs().sum() == 0


def test_a_model_in_fp8_deviates_from_bf16_by_a_few_per_cent_and_modulation_stays_out():
    model = randomised().set_compute_dtype(torch.bfloat16)
    args = inputs()
    exact, exact_grads = gradients(model, *args)
    model.set_compute_dtype(torch.bfloat16, True)
    flags = {n: m.fp8 for n, m in model.named_modules() if isinstance(m, T.Linear)}
    assert flags["blocks.0.attention.img_qkv_proj"] and flags["blocks.2.down_proj"]
    assert not any(on for n, on in flags.items() if "modulation" in n or not n.startswith("blocks."))
    coarse, coarse_grads = gradients(model, *args)
    assert 1e-4 < relative(coarse, exact) < 0.1
    assert all(relative(coarse_grads[n], exact_grads[n]) < 0.5 for n in exact_grads)
    assert not torch.equal(coarse, exact)


def test_fp8_trains_and_its_contradictions_are_refused(in_tmp, capsys):
    run = [*SMALL, "--compute", "bf16", "--samples", "0", "--sample-steps", "2", "--compile", "off", "--steps", "6"]
    assert T.main([*run, "--fp8", "--name", "fp8"]) == 0 and T.main([*run, "--name", "bf16"]) == 0
    a, b = ([x for r in read_metrics(Path("logs") / n) for x in r.get("losses", [])] for n in ("fp8", "bf16"))
    assert a != b and a == pytest.approx(b, rel=0.05)
    assert T.main([*run, "--fp8", "--recompute", "--name", "both"]) == 0
    capsys.readouterr()
    assert T.main([*run, "--fp8", "--compute", "fp32"]) == 2
    assert "--fp8 and --compute fp32 contradict each other" in capsys.readouterr().err
    assert T.main([*run, "--fp8", "--hidden", "40"]) == 2
    assert "multiples of 16" in capsys.readouterr().err


def test_bench_and_profile_of_the_script(in_tmp, capsys):
    assert T.main([*SMALL, "--bench", "--name", "b"]) == 0
    said, result = capsys.readouterr().out, json.loads(Path("logs/b/bench.json").read_text())
    assert "wrote logs/b/bench.json" in said and set(result["rows"]) == set(bench.TECHNIQUES)
    assert {"EMA update", "checkpoint stall", "loader (scenes)"} <= set(result["once_ms"])
    sent = result["one_of_8_ranks"]["bytes_sent"]
    assert sent["gradients"] >= 4 * 7 / 8 * sum(p.numel() for p in T.PRX(**SIZE | dict(context_in_dim=96)).parameters())
    assert T.main([*SMALL, "--profile", "--repa", "0.5", "--name", "p"]) == 0
    said = capsys.readouterr().out
    assert said.count("calls/step") == 10 and "wrote logs/p/trace.json" in said
    assert json.loads(Path("logs/p/trace.json").read_text())["traceEvents"]
    assert not Path("logs/b/checkpoint").exists()


def test_peers_paint_the_same_and_are_timed_in_the_same_run(tmp_path, capsys):
    result = bench.main([*SMALL, "--compute", "fp32", "--peers", "diffusers", "--turns", "1", "--steps-per-turn", "1",
                         "--out", str(tmp_path / "p.json")])
    assert result["largest_difference"]["diffusers"] < 1e-5
    theirs = [row for row in result["rows"] if row.startswith("diffusers")]
    assert len(theirs) == 4 and all(result["rows"][row]["ours_over_it"] > 0 for row in theirs)
    row = result["rows"]["diffusers, eager, Muon"]
    ours = result["rows"]["ours, compiled, Muon"]
    assert row["ours_over_it"] == pytest.approx(ours["images_per_s"] / row["images_per_s"])
    assert "over diffusers, eager, Muon" in capsys.readouterr().out
    with pytest.raises(T.UserError, match="holds no prx/models/prx.py"):
        bench.main([*SMALL, "--peers", str(tmp_path)])


def test_the_peers_loss_is_ours(tmp_path):
    """Both sides of the benchmark do the same work: one step of diffusers' model with AdamW moves the weights as ours."""
    c = dataclasses.replace(bench.parse_args([*SMALL, "--compute", "fp32", "--optimizer", "adamw", "--compile", "off",
                                              "--ema", "0", "--steps", "1"])[0], **bench.OFF)
    ours = bench.Ours(c, torch.device("cpu"), *bench.shapes_of(c))
    weights = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(3)) * 0.1 + (v.ndim == 1)
               for k, v in ours.model.state_dict().items()}
    ours.model.load_state_dict(weights)
    theirs = bench.Peer("diffusers", "eager, AdamW", ours)
    b = ours.batch
    ours_loss = T.flow_matching_loss(ours.model, b.x_0, b.eps, b.t, b.text, b.mask, c.predict, 0.0, None, None)[0].mean()
    ours_loss.backward()
    captured = {}
    theirs.optimizers[0].step = lambda: captured.update({n: p.grad.clone() for n, p in theirs.net.named_parameters()})
    theirs.c = dataclasses.replace(c, clip=1e9)
    theirs.step()
    for name, p in ours.model.named_parameters():
        assert relative(captured[name], p.grad) < 1e-4, name


def test_the_sweep_plots_cost_against_size(tmp_path):
    result = bench.main([*SMALL, "--compute", "fp32", "--sweep", "--turns", "1", "--steps-per-turn", "1",
                         "--out", str(tmp_path / "s.json")])
    assert set(result["sweep"]) == {"depth", "width", "image tokens", "batch"}
    depth = result["sweep"]["depth"]
    assert depth[0]["flop_floor_images_per_s"] > depth[-1]["flop_floor_images_per_s"] > 0
    assert (tmp_path / "s.png").stat().st_size > 10_000


def test_a_row_that_does_not_fit_into_memory_is_left_out_and_models_do_not_pile_up(capsys):
    class Setting:
        alive, most = 0, 0

        def __init__(self, fits):
            self.fits, self.device, self.optimizers = fits, torch.device("cpu"), []
            Setting.alive += 1
            Setting.most = max(Setting.most, Setting.alive)

        def __del__(self):
            Setting.alive -= 1

        def step(self):
            if not self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
            return dict(step=0.5)

        def facts(self):
            return "facts"

    def none():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    seen, cuda = [], SimpleNamespace(type="cuda")
    builders = {"no model": none, "big": lambda: Setting(False), "small": lambda: Setting(True),
                "small too": lambda: Setting(True)}
    facts, times, extra = bench.one_by_one(builders, cuda, 2, 3, lambda row: row.split()[0],
                                           lambda settings: seen.append(list(settings)))
    assert set(facts) == set(times) == set(extra) == {"small", "small too"} and len(times["small"]) == 6
    assert seen == [["small", "small too"]] and Setting.most == 2 and Setting.alive == 0
    said = capsys.readouterr().out
    assert "no model: no room for the model" in said and "big: does not fit into memory (CUDA out of mem" in said
    with pytest.raises(T.UserError, match="no row fits into this GPU's memory"):
        bench.one_by_one({"big": builders["big"]}, cuda, 1, 1)
    bench.one_by_one(builders | {"no model": builders["small"]}, torch.device("cpu"), 1, 1)
    assert Setting.most == 4


def test_repa_is_timed_with_random_weights_where_dinov3_cannot_be_had(monkeypatch, capsys):
    def none(*_, **__):
        raise OSError("offline")

    import transformers
    real, asked = transformers.AutoModel.from_pretrained, []
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda folder, **k: (
        asked.append(folder), none() if "dinov3-vitl16" in str(folder) else real(folder, **k))[1])
    monkeypatch.setattr(bench, "VIT_L", bench.VIT_L | dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                                           intermediate_size=64))
    result = bench.main([*SMALL, "--repa-teacher", "dinov3", "--rows", "plain", "REPA", "--turns", "1",
                         "--steps-per-turn", "1", "--compile", "off"])
    assert len(asked) == 2 and result["rows"]["REPA"]["parts_ms"]["teacher"] > 0
    assert "ViT-L/16 with random weights: --repa-teacher dinov3 cannot be loaded (offline)" in capsys.readouterr().out
    with pytest.raises(T.UserError, match="--repa-teacher .*nowhere cannot be loaded"):
        bench.main([*SMALL, "--repa-teacher", "/nowhere", "--rows", "REPA"])


def test_a_failure_of_the_compilers_timing_loses_no_row(tmp_path, monkeypatch):
    real, out = bench.subprocess.run, tmp_path / "b.json"
    monkeypatch.setattr(bench.subprocess, "run", lambda cmd, **k: real([sys.executable, "-c", "raise SystemExit('no room')"],
                                                                       **k))
    with pytest.raises(T.UserError, match=r"--compile-time: the step fails in a process of its own \(no room\)"):
        bench.main([*SMALL, "--rows", "plain", "--turns", "1", "--steps-per-turn", "1", "--compile-time", "--out", str(out)])
    assert json.loads(out.read_text())["rows"]["plain"]["ms"] > 0


def test_rows_that_do_not_exist_are_refused():
    with pytest.raises(T.UserError, match="--rows nothing is unknown"):
        bench.main([*SMALL, "--rows", "nothing"])


def test_nothing_in_a_step_waits_for_the_gpu(monkeypatch):
    """On meta tensors, which have no values: reading one raises, and so does, here, a copy between devices that waits.
    Every technique at once, with the first step's tables made beforehand as in training."""
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            devices = {x.device.type for x in [*args, out] if isinstance(x, torch.Tensor) and x.ndim}
            assert len(devices) < 2 or (kwargs or {}).get("non_blocking"), f"{func} waits"
            return out

    c = T.Config(batch=8, skip_spikes=5.0, weight_decay=0.1, ema_every=1)
    with torch.device("meta"):
        model, projector = T.PRX(**SIZE, span=(1, 1), scorer=True), T.Alignment(32, 24, "repa")
        x, eps = torch.randn(2, 8, 3, 16, 16)
        t, text, mask, features = torch.rand(8), torch.randn(8, 8, 20), torch.ones(8, 8).bool(), torch.randn(8, 16, 24)
    optimizers = [T.MuonAdamW(net.named_parameters(), c, T.World(device=x.device)) for net in (model, projector)]
    for net in (model, projector):
        net.set_compute_dtype(torch.bfloat16)

    def step():
        keep = T.route(8, x, 4, 0.5, None)
        losses, plain, _, tapped = T.flow_matching_loss(model, x, eps, t, text, mask, "v", 0.05, keep, 1)
        (losses + projector(*tapped, features, 4, 4)).mean().backward()
        torch.zeros(2, 10, device="meta").index_add_(1, (t * 10).long(), torch.stack([plain, torch.ones_like(plain)]))
        for each in optimizers:
            each.accumulate()
            each.step(0.5)

    step()
    for name in ("tensor", "as_tensor"):  # their copies wait, too, and are not seen by the watch
        monkeypatch.setattr(torch, name, lambda *a, **k: pytest.fail("torch.tensor waits for the GPU"))
    with Watch():
        step()


# --- variants: what could replace parts of the step

def by_runs(q, k, v, queries, keys, longest_query, longest_key):
    """What variable-length attention is, by a loop: run i of the queries sees run i of the keys, of any length."""
    queries, keys, out = queries.tolist(), keys.tolist(), []
    assert (queries[-1], keys[-1]) == (len(q), len(k)) and queries == sorted(queries) and keys == sorted(keys)
    for a, b, c, d in zip(queries, queries[1:], keys, keys[1:]):
        assert b - a <= longest_query and d - c <= longest_key
        if b > a:
            one = [x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d])]
            out.append(F.scaled_dot_product_attention(*one).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("name", ["gate and up in one product", "all modulations in one product",
                                  "attention without a mask (flash)"])  # cuDNN and CUDA graphs have no CPU kernel
def test_a_variant_is_the_same_function_with_the_same_gradients(name, monkeypatch):
    """In FP32, with padding, without a mask, with an image that has no text at all, and with routed tokens."""
    monkeypatch.setattr(variants, "varlen_attn", by_runs)
    models = randomised(span=(1, 1)), randomised(span=(1, 1))
    parameters = [dict(model.named_parameters()) for model in models]
    variants.VARIANTS[name].change(models[1])
    x, t, text, mask = inputs()
    mask[1, :] = False
    keep = T.route(4, x, 4, 0.5, torch.Generator().manual_seed(0))
    for some_mask, some_keep in ((mask, None), (mask, keep), (None, None), (~torch.zeros_like(mask), keep)):
        outputs = [model(x, t, text, some_mask, some_keep) for model in models]
        assert outputs[0].abs().max() > 0.1 and torch.allclose(*outputs, atol=1e-5)
        for out, named in zip(outputs, parameters):
            for p in named.values():
                p.grad = None
            out.square().mean().backward()
        for n, p in parameters[0].items():
            assert p.grad.abs().max() > 0 and torch.allclose(p.grad, parameters[1][n].grad, rtol=1e-4, atol=1e-5), n


def test_the_call_of_variable_length_attention_is_pytorchs(monkeypatch):
    """Traced on fake tensors, forward and backward: names, shapes and dtypes are what the CUDA kernel is called with."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    seen, real = [], variants.varlen_attn
    monkeypatch.setattr(variants, "varlen_attn", lambda *a: (seen.append(a), real(*a))[1])
    with FakeTensorMode():
        model = T.PRX(**SIZE)
        model.set_compute_dtype(torch.bfloat16)
        variants.attention_by(variants.WithoutMask, model)
        mask = torch.ones(4, 8, dtype=torch.bool)
        out = model(torch.randn(4, 3, 16, 16), torch.rand(4), torch.randn(4, 8, 20), mask)
        out.square().mean().backward()
    assert out.shape == (4, 3, 16, 16) and all(p.grad.shape == p.shape for p in model.parameters())
    q, k, v, queries, keys, *longest = seen[0]
    assert q.shape == (4 * 16, 2, 16) and k.shape == v.shape == (4 * 24, 2, 16) and longest == [16, 24]
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and queries.dtype == keys.dtype == torch.int32
    assert queries.shape == keys.shape == (9,)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_blocks_compile_whole_and_once_per_shape(name):
    """No graph breaks (fullgraph), one graph for all blocks, one more where tokens are routed: on meta tensors, which
    stop before code is generated. BF16, forward and backward."""
    with torch.device("meta"):
        model = T.PRX(**SIZE, span=(1, 1))
        x, t, text, mask = (torch.empty_like(v, device="meta") for v in inputs())
        keep = torch.empty(4, 8, dtype=torch.long)
    model.set_compute_dtype(torch.bfloat16)
    variants.VARIANTS[name].change(model)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.blocks:
        getattr(block, "block", block).compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for some_keep, graphs in ((None, 1), (keep, 2), (None, 2), (keep, 2)):
        out = model(x, t, text, mask, some_keep)
        out.square().mean().backward()
        assert out.shape == x.shape and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


def test_variants_are_compared_and_timed_in_turns(tmp_path, capsys):
    result = variants.main([*SMALL, "--turns", "1", "--steps-per-turn", "1", "--out", str(tmp_path / "v.json")])
    rows = result["rows"]["plain"]["variants"]
    assert set(rows) == {"as it is", "gate and up in one product", "all modulations in one product"}
    assert all(r["ms"] > 0 and r["difference_of_output"] < 0.02 and r["difference_of_gradients"] < 0.05
               for r in rows.values())
    assert rows["gate and up in one product"]["difference_of_gradients"] > 0  # in BF16, or the order of sums, something
    assert "not measured, for want of a GPU: CUDA graphs" in capsys.readouterr().out
    assert json.loads((tmp_path / "v.json").read_text())["machine"]["torch"]
