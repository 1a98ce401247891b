"""MuonAdamW is torch.optim.Muon and torch.optim.AdamW on flat vectors, with one owner for each parameter."""

import dataclasses
import re

import pytest
import torch
import torch.optim._muon as torch_muon
from torch import nn

import train_prx as T

MUON = T.Config(optimizer="muon", lr=0.02, lr_adamw=3e-3, weight_decay=0.1, clip=0.0, ema=0.0)
ADAMW = dataclasses.replace(MUON, optimizer="adamw", lr=3e-3)
SHAPES = {"blocks.0.a.weight": (12, 8), "blocks.1.a.weight": (12, 8), "blocks.0.b.weight": (8, 20),
          "blocks.0.norm": (8,), "img_in.weight": (8, 6), "img_in.bias": (8,)}


def module(shapes=SHAPES, seed=0):
    """A module with these parameters, at random."""
    top, g = nn.Module(), torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        *path, last = name.split(".")
        inner = top
        for part in path:
            if part not in inner._modules:
                inner.add_module(part, nn.Module())
            inner = inner._modules[part]
        inner.register_parameter(last, nn.Parameter(torch.randn(shape, generator=g)))
    return top


def model(shapes=SHAPES, seed=0):
    return nn.ModuleDict(dict(model=module(shapes, seed)))


def params(nets):
    return dict(nets.named_parameters())


def feed(nets, step):
    """The same made-up gradients for whoever asks."""
    g = torch.Generator().manual_seed(1000 + step)
    for p in nets.parameters():
        p.grad = (torch.randn(p.shape, generator=g) * 10 ** torch.randn((), generator=g)).to(p.dtype)


def update(optimizer, nets, step):
    feed(nets, step)
    optimizer.accumulate()
    return optimizer.step()


def run(config, steps=range(20), shapes=SHAPES):
    nets = model(shapes)
    optimizer = T.MuonAdamW(nets, config, T.World())
    for i in steps:
        update(optimizer, nets, i)
    return nets, optimizer


def by_torch(config, steps=range(20)):
    """The same by torch.optim."""
    nets = model()
    named = params(nets)
    muon = [n for n in named if config.optimizer == "muon" and n.startswith("model.blocks") and named[n].ndim == 2]
    rate = config.lr_adamw if config.optimizer == "muon" else config.lr
    oracles = [torch.optim.AdamW([p for n, p in named.items() if n not in muon], lr=rate, betas=(0.9, 0.95),
                                 eps=config.eps, weight_decay=config.weight_decay)]
    if muon:
        oracles.append(torch.optim.Muon([named[n] for n in muon], lr=config.lr, momentum=config.momentum, nesterov=True,
                                        weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    for i in steps:
        feed(nets, i)
        for oracle in oracles:
            oracle.step()
    return nets


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def assert_close(ours, theirs, tolerance=1e-6):
    theirs = params(theirs)
    assert len(theirs) == len(params(ours)) > 0
    for name, p in params(ours).items():
        assert relative(p, theirs[name]) < tolerance, name


@pytest.fixture
def exact(monkeypatch):
    """Momentum, Nesterov, scaling and decay, free of torch's BF16 iteration: an exact SVD stands in for it in both."""
    def svd(G, *_):
        U, _, V = torch.linalg.svd(G.double(), full_matrices=False)
        return (U @ V).to(G.dtype)

    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", svd)
    monkeypatch.setattr(T, "orthogonalize", svd)


# --- against torch.optim

@pytest.mark.parametrize("eps", [1e-8, 1e-15])
def test_adamw_equals_torch(eps):
    config = dataclasses.replace(ADAMW, eps=eps)
    assert_close(run(config)[0], by_torch(config))


def test_muon_equals_torch_with_one_orthogonaliser_in_both(exact):
    assert_close(run(MUON)[0], by_torch(MUON))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", [MUON, ADAMW], ids=["muon", "adamw"])
def test_a_skipped_step_leaves_no_trace_in_the_later_ones(exact, config, bad):
    """Counts (AdamW's bias correction), moments and momentum are torch's when it never saw that step."""
    nets = model()
    optimizer = T.MuonAdamW(nets, config, T.World())
    for i in range(12):
        if i in (4, 5):
            feed(nets, 100 + i)
            params(nets)["model.img_in.bias"].grad[0] = bad
            optimizer.accumulate()
            optimizer.step()
        update(optimizer, nets, i)
    assert optimizer.skipped == 2 and optimizer.adamw.state[optimizer.rest[0]]["step"] == 12
    assert_close(nets, by_torch(config, range(12)))


@pytest.mark.parametrize("who", ["muon", "adamw"])
def test_modulations_move_as_in_torch_whoever_owns_them(exact, who):
    net = T.initialize(T.PRX(hidden_size=32, num_heads=2, depth=1, context_in_dim=8), 0)
    name, config = "model.blocks.0.modulation.lin.weight", dataclasses.replace(MUON, modulation=who)
    nets = nn.ModuleDict(dict(model=net))
    theirs = nn.Parameter(torch.randn(192, 32, generator=torch.Generator().manual_seed(0)))
    params(nets)[name].data.copy_(theirs.data)
    optimizer = T.MuonAdamW(nets, config, T.World())
    oracle = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    if who == "muon":
        oracle = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for i in range(5):
        feed(nets, i)
        theirs.grad = params(nets)[name].grad.clone()
        optimizer.accumulate()
        optimizer.step()
        oracle.step()
    assert relative(params(nets)[name], theirs) < 1e-6


# --- Newton-Schulz

def polynomial(G, coefficients, steps=5):
    """The same quintics on the singular values, in float64."""
    U, s, V = torch.linalg.svd(G.double(), full_matrices=False)
    s = s / G.double().norm() / (1.01 if coefficients is T.POLAR else 1.0)
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        s = a * s + b * s ** 3 + c * s ** 5
    return U @ torch.diag(s) @ V


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 96), (64, 64)])
@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize("name", ["CLASSIC", "POLAR"])
def test_the_orthogonaliser_equals_its_polynomial_in_float64(name, steps, shape):
    coefficients = getattr(T, name)
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for one, ours in zip(G, T.orthogonalize(G, steps, coefficients)):
        assert relative(ours.double(), polynomial(one, coefficients, steps)) < 2e-5
        assert relative(T.orthogonalize(one[None].bfloat16(), steps, coefficients)[0].float(), ours) < 5e-2


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 96), (64, 64)])
def test_the_classic_orthogonaliser_equals_torchs(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs = torch_muon._zeropower_via_newtonschulz(G.clone(), (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    assert relative(theirs, T.orthogonalize(G[None], 5, T.CLASSIC)[0]) < 2e-2


def test_polar_express_brings_singular_values_to_one_in_bf16_too():
    """Also those that are a hundredth of the largest; and none grows for want of room between the steps."""
    assert T.NEWTON_SCHULZ is T.POLAR
    g = torch.Generator().manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(4, 64, 64, generator=g))
    G = U @ torch.diag(torch.linspace(1, 0.01, 64)) @ V
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linalg.svdvals(T.orthogonalize(G.to(dtype)).float())
        assert 0.86 < values.min() and values.max() < 1.14
    noise = torch.randn(8, 256, 256, generator=g).bfloat16()
    assert torch.linalg.svdvals(T.orthogonalize(noise).float()).max() < 1.2  # 1.4 without the 1 %


def test_a_stack_is_orthogonalised_as_its_matrices_one_by_one():
    """Their sizes may differ by orders of magnitude, and one may be zero."""
    for shape in ((16, 24), (24, 16)):
        G = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
        G *= torch.tensor([1e-6, 1.0, 1e4, 0.0, 3.0])[:, None, None]
        for coefficients in (T.CLASSIC, T.POLAR):
            one_by_one = torch.cat([T.orthogonalize(one[None], 5, coefficients) for one in G])
            together = T.orthogonalize(G, 5, coefficients)
            assert torch.allclose(together, one_by_one, atol=1e-5) and together[3].abs().max() == 0
            assert (torch.linalg.svdvals(together[[0, 1, 2, 4]]) > 0.5).all()


def seen_by_newton_schulz(monkeypatch):
    seen, real = [], T.orthogonalize
    monkeypatch.setattr(T, "orthogonalize", lambda G, *a: (seen.append((tuple(G.shape), G.dtype)), real(G, *a))[1])
    return seen


def test_the_orthogonaliser_runs_in_the_compute_precision_with_same_shapes_batched(monkeypatch):
    seen, nets = seen_by_newton_schulz(monkeypatch), model()
    optimizer = T.MuonAdamW(nets, MUON, T.World())
    T.set_compute_dtype(nets, torch.bfloat16)
    update(optimizer, nets, 0)
    assert sorted(seen) == [((1, 8, 20), torch.bfloat16), ((2, 12, 8), torch.bfloat16)]
    assert all(flat.master.dtype == torch.float32 for flat in optimizer.flats)
    assert {n.removeprefix("model."): p.dtype for n, p in params(nets).items()} == {
        n: torch.bfloat16 if len(shape) == 2 else torch.float32 for n, shape in SHAPES.items()}


def test_stacks_are_cut_to_a_bound_on_memory_and_the_weights_stay_the_same(monkeypatch):
    shapes = SHAPES | {f"blocks.{i}.a.weight": (12, 8) for i in range(2, 14)}  # 14 of 96 elements
    whole, _ = run(MUON, range(5), shapes)
    seen = seen_by_newton_schulz(monkeypatch)
    for stack, expected in ((300, [3, 3, 3, 3, 2]), (192, [2] * 7), (10, [1] * 14)):
        monkeypatch.setattr(T, "STACK", stack)
        seen.clear()
        cut, _ = run(MUON, range(5), shapes)
        assert [s[0] for s, _ in seen if s[1:] == (12, 8)] == expected * 5
        assert_close(cut, whole)


# --- precision, clipping, skipped steps

def test_masters_keep_updates_that_bf16_would_round_away():
    config = dataclasses.replace(ADAMW, lr=1e-5, weight_decay=0.0)
    nets = model({"blocks.0.w.weight": (8, 8), "bias": (8,)})
    w = params(nets)["model.blocks.0.w.weight"]
    w.data.fill_(1.0)
    optimizer = T.MuonAdamW(nets, config, T.World())
    T.set_compute_dtype(nets, torch.bfloat16)
    for _ in range(1000):
        w.grad = torch.ones(8, 8, dtype=torch.bfloat16)
        optimizer.accumulate()
        optimizer.step()
    master = optimizer.state_dict()["master/model.blocks.0.w.weight"]
    assert torch.allclose(master, torch.tensor(0.99), atol=1e-4)  # 1 - 1000 * 1e-5
    assert torch.allclose(w.float(), torch.tensor(0.99), atol=4e-3)


@pytest.mark.parametrize("clip", [0.2, 0.0, 1e9])
def test_each_module_is_clipped_by_its_own_norm(clip, monkeypatch):
    """The projector's gradients are larger: they must not shrink the model's. The model's norm is what is returned."""
    monkeypatch.setattr(T, "BETAS", (0.0, 0.0))
    config = dataclasses.replace(ADAMW, lr=1e9, eps=1e9, clip=clip, weight_decay=0.0)
    both = lambda: nn.ModuleDict(dict(model=module(), repa=module({"mlp.weight": (8, 12), "mlp.bias": (8,)}, 1)))
    nets, theirs, before = both(), both(), params(both())
    optimizer = T.MuonAdamW(nets, config, T.World())
    for each in (nets, theirs):
        feed(each, 0)
        for p in each["repa"].parameters():
            p.grad *= 50
    expected = {name: torch.nn.utils.clip_grad_norm_(net.parameters(), clip or 1e12) for name, net in theirs.items()}
    optimizer.accumulate()
    assert torch.allclose(optimizer.step(), expected["model"], rtol=1e-5) and expected["repa"] > 5 * expected["model"]
    for name, p in params(theirs).items():  # eps dwarfs the second moment: the step is the gradient
        moved = before[name] - params(nets)[name]
        assert torch.allclose(moved, p.grad, rtol=1e-3, atol=1e-4), name


def test_a_non_finite_gradient_changes_no_weight_and_is_counted():
    for module_name in ("model", "repa"):
        nets = nn.ModuleDict(dict(model=module(), repa=module({"mlp.bias": (8,)}, 1)))
        optimizer = T.MuonAdamW(nets, dataclasses.replace(MUON, clip=1.0), T.World())
        for i in range(3):
            update(optimizer, nets, i)
        before = {n: p.detach().clone() for n, p in params(nets).items()}
        for bad in (float("nan"), float("inf")):
            feed(nets, 4)
            next(nets[module_name].parameters()).grad.view(-1)[0] = bad
            optimizer.accumulate()
            optimizer.step()
        assert optimizer.skipped == optimizer.in_a_row == 2
        assert all(torch.equal(before[n], p) for n, p in params(nets).items())
        update(optimizer, nets, 5)
        assert optimizer.skipped == 2 and optimizer.in_a_row == 0
        assert all(p.isfinite().all() and not torch.equal(before[n], p) for n, p in params(nets).items())


def test_no_sums_of_gradients_stay_in_memory_after_a_step():
    nets = model()
    optimizer = T.MuonAdamW(nets, MUON, T.World())
    feed(nets, 0)
    optimizer.accumulate()
    optimizer.step()
    assert all(p.grad is None for p in [*optimizer.rest, *nets.parameters()])


def test_micro_batches_sum_in_fp32():
    nets = model({"w.weight": (4, 4), "bias": (4,)})
    optimizer, w = T.MuonAdamW(nets, MUON, T.World()), params(nets)["model.w.weight"]
    T.set_compute_dtype(nets, torch.bfloat16)
    for _ in range(512):  # in BF16 the sum would stop at 256
        w.grad = torch.ones(4, 4, dtype=torch.bfloat16)
        optimizer.accumulate()
    assert (optimizer.matrices.grads == 512).all() and w.grad is None


def test_a_parameter_without_a_gradient_has_one_of_zero():
    """What only another stage uses: its neighbours in the flat vectors move as ever."""
    def move(change):
        nets = model()
        optimizer = T.MuonAdamW(nets, MUON, T.World())
        for i in range(3):
            feed(nets, i)
            change(params(nets)["model.blocks.0.norm"])
            optimizer.accumulate()
            optimizer.step()
        return nets

    without = move(lambda p: setattr(p, "grad", None))
    zero = move(lambda p: p.grad.zero_())
    assert all(torch.equal(p, params(zero)[n]) for n, p in params(without).items())


# --- owners, groups, moving average

@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_parameter_is_owned_by_exactly_one_rank(ranks, monkeypatch):
    monkeypatch.setattr(T.MuonAdamW, "publish", lambda self, ema=False: None)
    owned, layouts = [], []
    for rank in range(ranks):
        nets = model()
        optimizer = T.MuonAdamW(nets, MUON, T.World(rank=rank, size=ranks))
        masters = {k.removeprefix("master/"): v for k, v in optimizer.state_dict().items() if k.startswith("master/")}
        assert all(torch.equal(v, params(nets)[n]) for n, v in masters.items())
        layout = [flat.layout for flat in optimizer.flats]
        assert sorted(layout[0][rank] + layout[1][rank]) == sorted(masters)
        owned += masters
        layouts.append(layout)
    assert sorted(owned) == sorted(f"model.{n}" for n in SHAPES) and all(x == layouts[0] for x in layouts)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_many_owners_move_the_weights_as_one_does(ranks, monkeypatch):
    """The ranks one after the other in one process: what each sends to a collective is kept for the others."""
    config = dataclasses.replace(MUON, clip=1.0, ema=0.9)
    alone, one = run(config, range(3))
    norm = update(one, alone, 3)
    sent = {}  # (number of the call, rank) -> what the rank gave to it

    def replay(rank):
        calls = iter(range(10 ** 6))

        def meet(value):
            call = next(calls)
            sent[call, rank] = value.clone()
            if any((call, r) not in sent for r in range(ranks)):
                raise Stopped
            return [sent[call, r] for r in range(ranks)]

        monkeypatch.setattr(T, "all_gather", lambda out, flat: out.copy_(torch.cat(meet(flat))))
        monkeypatch.setattr(T, "reduce_scatter", lambda out, grads: out.copy_(
            sum(meet(grads)).view(ranks, -1)[rank]))
        monkeypatch.setattr(T.dist, "all_reduce", lambda x: x.copy_(sum(meet(x))))
        nets = model()
        optimizer = T.MuonAdamW(nets, config, T.World(rank=rank, size=ranks))
        for i in range(4):
            feed(nets, i)
            for p in nets.parameters():
                p.grad *= 0.5 + rank / (ranks - 1)  # mean of the ranks: as alone
            optimizer.accumulate()
            last = optimizer.step()
        assert torch.allclose(last, norm, rtol=1e-4)
        return nets

    finished = {}
    while len(finished) < ranks:
        for rank in range(ranks):
            try:
                finished[rank] = replay(rank)
            except Stopped:
                pass
    for nets in finished.values():
        assert_close(nets, alone, 1e-5)


def test_ema_follows_the_masters():
    nets = model()
    optimizer = T.MuonAdamW(nets, dataclasses.replace(MUON, ema=0.9), T.World())
    masters = lambda: torch.cat([flat.master for flat in optimizer.flats])
    expected = masters().double()
    for i in range(1, 139):  # from 80 on its memory is no longer short
        update(optimizer, nets, i)
        decay = min(0.9, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * masters()
        assert torch.allclose(torch.cat([flat.ema for flat in optimizer.flats]).double(), expected, atol=1e-5)
    now = {n: p.detach().clone() for n, p in params(nets).items()}
    optimizer.publish(ema=True)  # for a sample grid
    averages = optimizer.model_ema()
    assert sorted(averages) == sorted(SHAPES) and not torch.equal(averages["img_in.bias"], now["model.img_in.bias"])
    assert all(torch.equal(p, averages[n.removeprefix("model.")]) for n, p in params(nets).items())
    optimizer.publish()
    assert all(torch.equal(p, now[n]) for n, p in params(nets).items())


def test_all_parameters_of_prx_have_their_group():
    with torch.device("meta"):
        big = T.PRX()
    muon = {n for n, p in big.named_parameters() if T.is_muon(f"model.{n}", p, T.Config())}
    assert len(muon) == 16 * 7
    assert {re.sub(r"^blocks\.\d+\.", "", n) for n in muon} == {
        "attention.img_qkv_proj.weight", "attention.txt_kv_proj.weight", "attention.to_out.0.weight",
        "gate_proj.weight", "up_proj.weight", "down_proj.weight", "modulation.lin.weight"}
    modulation = {n for n in muon if ".modulation." in n}
    assert len(modulation) == 16
    for config, expected in ((dataclasses.replace(MUON, modulation="adamw"), muon - modulation), (ADAMW, set())):
        assert {n for n, p in big.named_parameters() if T.is_muon(f"model.{n}", p, config)} == expected
    for who, matrices in (("muon", 7), ("adamw", 6)):
        nets = nn.ModuleDict(dict(model=T.PRX(hidden_size=32, num_heads=2, depth=2, context_in_dim=8),
                                  repa=T.Alignment(32, 24, "repa")))
        optimizer = T.MuonAdamW(nets, dataclasses.replace(MUON, modulation=who), T.World())
        assert sum(shape[0] for _, _, shape in optimizer.stacks) == 2 * matrices
        muons = {k for k in optimizer.state_dict() if k.startswith("momentum/")}
        assert len(muons) == 2 * matrices and not any("repa" in k for k in muons)
