"""MuonAdamW is torch.optim.Muon and torch.optim.AdamW, batched, with one owner for each parameter."""

import dataclasses
import re

import pytest
import torch

import train_prx as T

MUON = T.Config(optimizer="muon", lr=0.02, lr_adamw=3e-3, weight_decay=0.1, clip=0.0, ema=0.0)
SHAPES = {"blocks.0.a.weight": (12, 8), "blocks.1.a.weight": (12, 8), "blocks.0.b.weight": (8, 20),
          "blocks.0.norm": (8,), "img_in.weight": (8, 6), "img_in.bias": (8,)}


def parameters(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.nn.Parameter(torch.randn(s, generator=g)) for n, s in SHAPES.items()}


def feed(params, step):
    """The same made-up gradients for whoever asks."""
    g = torch.Generator().manual_seed(1000 + step)
    for p in params.values():
        p.grad = (torch.randn(p.shape, generator=g) * 10 ** torch.randn((), generator=g)).to(p.dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def run(config, steps=20, world=T.World()):
    params = parameters()
    optimizer = T.MuonAdamW(params.items(), config, world)
    for i in range(steps):
        feed(params, i)
        optimizer.accumulate()
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("eps", [1e-8, 1e-15])
def test_adamw_equals_torch(eps):
    config = dataclasses.replace(MUON, optimizer="adamw", lr=3e-3, eps=eps)
    ours, theirs = run(config)[0], parameters()
    oracle = torch.optim.AdamW(theirs.values(), lr=3e-3, betas=(0.9, 0.95), eps=eps, weight_decay=0.1)
    for i in range(20):
        feed(theirs, i)
        oracle.step()
    for name in SHAPES:
        assert relative(ours[name], theirs[name]) < 1e-6, name


def test_muon_equals_torch_with_one_orthogonaliser_in_both(monkeypatch):
    """Momentum, Nesterov, scaling and decay, free of torch's BF16 iteration: an exact SVD stands in for it in both."""
    import torch.optim._muon as torch_muon

    def svd(G, *_):
        U, _, V = torch.linalg.svd(G.double(), full_matrices=False)
        return (U @ V).to(G.dtype)

    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", svd)
    monkeypatch.setattr(T, "orthogonalize", svd)
    ours, theirs = run(MUON)[0], parameters()
    matrices = {n: p for n, p in theirs.items() if n.startswith("blocks") and p.ndim == 2}
    oracles = [torch.optim.Muon(matrices.values(), lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1,
                                adjust_lr_fn="match_rms_adamw"),
               torch.optim.AdamW([p for n, p in theirs.items() if n not in matrices], lr=3e-3, betas=(0.9, 0.95),
                                 weight_decay=0.1)]
    for i in range(20):
        feed(theirs, i)
        for oracle in oracles:
            oracle.step()
    for name in SHAPES:
        assert relative(ours[name], theirs[name]) < 1e-6, name


def polynomial(G, steps=5):
    """The same quintic on the singular values, in float64."""
    U, s, V = torch.linalg.svd(G.double(), full_matrices=False)
    s = s / G.double().norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return U @ torch.diag(s) @ V


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 96), (64, 64)])
def test_orthogonaliser_equals_its_polynomial_in_float64_and_torchs(shape):
    from torch.optim._muon import _zeropower_via_newtonschulz

    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    got = T.orthogonalize(G)
    for one, ours in zip(G, got):
        assert relative(ours.double(), polynomial(one)) < 1e-5
        theirs = _zeropower_via_newtonschulz(one.clone(), (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
        assert relative(theirs, ours) < 2e-2
        assert relative(T.orthogonalize(one[None].bfloat16())[0].float(), ours) < 2e-2


def test_orthogonaliser_runs_in_the_compute_precision_with_same_shapes_batched(monkeypatch):
    seen, real = [], T.orthogonalize
    monkeypatch.setattr(T, "orthogonalize", lambda G, *a: (seen.append((tuple(G.shape), G.dtype)), real(G, *a))[1])
    params = {n: torch.nn.Parameter(p.data.to(torch.bfloat16 if p.ndim == 2 else torch.float32))
              for n, p in parameters().items()}
    optimizer = T.MuonAdamW(params.items(), MUON)
    feed(params, 0)
    optimizer.accumulate()
    optimizer.step()
    assert sorted(seen) == [((1, 8, 20), torch.bfloat16), ((2, 12, 8), torch.bfloat16)]
    assert optimizer.master.dtype == torch.float32 and params["img_in.weight"].dtype == torch.bfloat16


def test_masters_keep_updates_that_bf16_would_round_away():
    config = dataclasses.replace(MUON, optimizer="adamw", lr=1e-5, weight_decay=0.0)
    params = {"blocks.0.w.weight": torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))}
    optimizer = T.MuonAdamW(params.items(), config)
    for _ in range(1000):
        params["blocks.0.w.weight"].grad = torch.ones(8, 8, dtype=torch.bfloat16)
        optimizer.accumulate()
        optimizer.step()
    assert torch.allclose(optimizer.master[:64], torch.tensor(0.99), atol=1e-4)  # 1 - 1000 * 1e-5
    assert torch.allclose(params["blocks.0.w.weight"].float(), torch.tensor(0.99), atol=4e-3)


@pytest.mark.parametrize("clip", [0.2, 1e9])
def test_clipping_is_by_the_norm_over_all_parameters(clip):
    config = dataclasses.replace(MUON, optimizer="adamw", lr=1e6, beta1=0.0, beta2=0.0, eps=1e6, clip=clip,
                                 weight_decay=0.0)
    params, theirs = parameters(), parameters()
    optimizer = T.MuonAdamW(params.items(), config)
    feed(params, 0), feed(theirs, 0)
    expected = torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
    optimizer.accumulate()
    norm = optimizer.step()
    assert torch.allclose(norm, expected, rtol=1e-5)
    for name, p in theirs.items():  # eps dwarfs the second moment, so AdamW steps along the clipped gradient itself
        moved = parameters()[name] - params[name]
        assert torch.allclose(moved, p.grad, rtol=1e-3, atol=1e-5), name


def test_a_non_finite_gradient_changes_no_weight_and_is_counted():
    params, optimizer = run(MUON, 3)
    before = {n: p.clone() for n, p in params.items()}
    for bad in (float("nan"), float("inf")):
        feed(params, 4)
        params["img_in.bias"].grad[0] = bad
        optimizer.accumulate()
        optimizer.step()
    assert optimizer.skipped == optimizer.skipped_in_a_row == 2
    assert all(torch.equal(before[n], params[n]) for n in params)
    feed(params, 5)
    optimizer.accumulate()
    optimizer.step()
    assert optimizer.skipped == 2 and optimizer.skipped_in_a_row == 0
    assert all(p.isfinite().all() for p in params.values())
    assert not torch.equal(before["img_in.bias"], params["img_in.bias"])


def test_micro_batches_sum_in_fp32():
    params = {"w.weight": torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))}
    optimizer = T.MuonAdamW(params.items(), MUON)
    for _ in range(512):  # in BF16 the sum would stop at 256
        params["w.weight"].grad = torch.ones(4, 4, dtype=torch.bfloat16)
        optimizer.accumulate()
    assert (optimizer.grads == 512).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_parameter_is_owned_by_exactly_one_rank(ranks):
    owned = []
    for rank in range(ranks):
        optimizer = T.MuonAdamW.__new__(T.MuonAdamW)
        optimizer.publish = lambda **_: None
        optimizer.__init__(parameters().items(), MUON, T.World(rank=rank, size=ranks))
        owned.append(list(optimizer.views(optimizer.master)))
        assert optimizer.layout[rank] == owned[-1]
    assert sorted(sum(owned, [])) == sorted(SHAPES)


@pytest.mark.parametrize("every", [1, 4])
def test_ema_follows_the_masters(every):
    """The decay is per step, whatever the steps between updates; the last steps of a run are brought in at its end."""
    config = dataclasses.replace(MUON, ema=0.9, ema_every=every)
    params = parameters()
    optimizer = T.MuonAdamW(params.items(), config)
    expected, last = optimizer.master.clone(), 0
    for i in range(1, 39):
        feed(params, i)
        optimizer.accumulate()
        optimizer.step()
        if i == 38:
            optimizer.update_ema()
        if i % every == 0 or i == 38:
            decay = min(0.9, (1 + i) / (10 + i)) ** (i - last)
            expected, last = decay * expected + (1 - decay) * optimizer.master, i
        assert torch.allclose(optimizer.ema, expected, atol=1e-5)


def test_a_parameter_without_gradient_is_named():
    params = parameters()
    optimizer = T.MuonAdamW(params.items(), MUON)
    feed(params, 0)
    params["blocks.0.norm"].grad = None
    with pytest.raises(AssertionError, match=re.escape("blocks.0.norm")):
        optimizer.accumulate()


def test_all_parameters_of_prx_have_their_group():
    with torch.device("meta"):
        model = T.PRX()
    muon = {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert len(muon) == 16 * 7
    assert {re.sub(r"^blocks\.\d+\.", "", n) for n in muon} == {
        "attention.img_qkv_proj.weight", "attention.txt_kv_proj.weight", "attention.to_out.0.weight",
        "gate_proj.weight", "up_proj.weight", "down_proj.weight", "modulation.lin.weight"}
    for who in ("muon", "adamw"):  # the modulations are Muon's or AdamW's, the rest stays where it was
        optimizer = T.MuonAdamW(T.PRX(hidden_size=32, num_heads=2, depth=2, context_in_dim=8).named_parameters(),
                                dataclasses.replace(MUON, modulation=who))
        theirs = {n for n, is_muon in optimizer.is_muon.items() if not is_muon and n.startswith("blocks.")}
        assert {n for n in theirs if n.endswith("modulation.lin.weight")} == (set() if who == "muon" else {
            "blocks.0.modulation.lin.weight", "blocks.1.modulation.lin.weight"})
        assert sum(shape[0] for _, _, shape in optimizer.stacks) == 2 * (7 if who == "muon" else 6)


def test_modulations_left_to_adamw_move_as_in_torch():
    model = T.PRX(hidden_size=32, num_heads=2, depth=1, context_in_dim=8).initialize(0)
    name = "blocks.0.modulation.lin.weight"
    theirs = torch.nn.Parameter(model.state_dict()[name].clone())
    optimizer = T.MuonAdamW(model.named_parameters(), dataclasses.replace(MUON, modulation="adamw"))
    oracle = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for i in range(5):
        feed(dict(model.named_parameters()), i)
        theirs.grad = dict(model.named_parameters())[name].grad.clone()
        optimizer.accumulate()
        optimizer.step()
        oracle.step()
    assert relative(dict(model.named_parameters())[name], theirs) < 1e-6


def test_weights_on_their_way_are_the_models_when_they_arrive_and_never_replace_newer_ones(monkeypatch):
    """A collective that is done only when it is waited for: the other rank owns what this one does not."""
    class Late:
        def __init__(self, out, flat):
            self.out, self.flat = out, flat

        def wait(self):
            self.out.view(2, -1).copy_(self.flat.expand(2, -1))

    monkeypatch.setattr(T, "all_gather", lambda out, flat, async_op: Late(out, flat.clone()))
    monkeypatch.setattr(T, "reduce_scatter", lambda out, grads: out.copy_(2 * grads[:len(out)]))
    monkeypatch.setattr(T.dist, "all_reduce", lambda x: x)
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters()
        optimizer = T.MuonAdamW(params.items(), dataclasses.replace(MUON, ema=0.9, ema_every=1), T.World(0, 2))
        for p in params.values():
            p.data = p.data.to(dtype if p.ndim == 2 else torch.float32)
        mine = optimizer.layout[0]
        model_has = lambda flat: all(torch.equal(params[n], v.to(params[n].dtype))
                                     for n, v in optimizer.views(flat).items())
        assert 0 < len(mine) < len(SHAPES)
        for i in range(3):
            before = {n: params[n].clone() for n in mine}
            feed(params, i)
            optimizer.accumulate()
            optimizer.step(wait=False)
            assert all(torch.equal(params[n], before[n]) for n in mine) and not model_has(optimizer.master)
            optimizer.arrive()
            assert model_has(optimizer.master) and not optimizer.coming
            assert all(p.dtype == (dtype if p.ndim == 2 else torch.float32) for p in params.values())
        feed(params, 3)
        optimizer.accumulate()
        optimizer.step(wait=False)
        optimizer.publish(optimizer.ema)  # a sample grid right after a step
        assert model_has(optimizer.ema) and not model_has(optimizer.master)
        optimizer.arrive()
        assert model_has(optimizer.ema)
