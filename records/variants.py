"""What could make a step faster and is not in train_prx.py: the same parameters and result, computed otherwise.

    python records/variants.py --out variants.json                  # on a GPU: the 24h track's first row of bench.py
    python records/variants.py --track micro --compile on --turns 12              # further flags are train_prx.py's
    torchrun --nproc_per_node=8 records/variants.py --only ranks                 # what concerns the links between ranks

Each variant stands next to the script's plain step. Before anything is timed, its output and gradients (or its update,
where it changes the optimizer) are compared with the plain ones; then all take turns in one process. What a GPU's log
in records/ shows to pay at least 2 % moves into the script; what does not stays here, with its figures in
records/notes/speed.md. What cannot run here says so in one line.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_prx as T  # noqa: E402
from records import bench  # noqa: E402


# ---- the model, computed otherwise: each changes a PRX in place ------------------------------------------------------

class GateAndUp(T.Block):
    """The gated MLP's first two matrices in one product."""

    def mlp(self, h):
        weight = torch.cat([self.gate_proj.weight, self.up_proj.weight])
        gate, up = F.linear(h.to(weight.dtype), weight).chunk(2, -1)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class Recomputed(T.Block):
    """Activations are computed again backward: less memory, a third more FLOPs."""

    def forward(self, *args):
        return checkpoint(super().forward, *args, use_reentrant=False)


class Modulated(nn.Module):
    """A block that gets its rows of the product of all modulations; the first block makes it."""

    def __init__(self, block: T.Block, number: int, linears: list[nn.Linear], rows: list):
        super().__init__()
        self.block, self.number, self.linears, self.rows = block, number, linears, rows
        block.modulation = nn.Identity()  # its product is made with all the others'

    def forward(self, x, text, vec, rope, mask):
        if self.number == 0:
            weight = torch.cat([linear.weight for linear in self.linears])
            bias = torch.cat([linear.bias for linear in self.linears]).to(weight.dtype)
            product = F.linear(F.silu(vec).to(weight.dtype), weight, bias)
            self.rows[:] = product.chunk(len(self.linears), -1)
        return self.block(x, text, self.rows[self.number], rope, mask)


def without_mask(q, k, v, padding):
    """Flash attention of q (B, N, H, d) over k and v (B, M, H, d), of which the last padding (B) keys are not there.

    A batch is twice as many sequences: each image's queries with its keys, then no queries with the padding that
    follows. So shapes are fixed, nothing is packed, and nobody asks the GPU for a length. Padding gets no gradient.
    """
    from torch.nn.attention.varlen import varlen_attn

    (B, N), M = q.shape[:2], k.shape[1]
    ends = torch.arange(1, B + 1, device=q.device)
    queries = torch.stack([ends * N, ends * N], 1).flatten()
    keys = torch.stack([ends * M - padding, ends * M], 1).flatten()
    queries, keys = (F.pad(counts, (1, 0)).int() for counts in (queries, keys))
    return varlen_attn(*(y.flatten(0, 1) for y in (q, k, v)), queries, keys, N, M).unflatten(0, (B, N))


class WithoutMask(T.Attention):
    """Flash attention over [image, text] keys of any length, one run of keys per image and no mask."""

    def forward(self, x, text, rope, mask):
        tokens = text.shape[1]
        split = lambda y, n: y.unflatten(-1, (n, self.heads, -1)).unbind(2)            # (B, N, H, d) each
        rope = [table[:, None] if table.ndim == 2 else table.transpose(1, 2) for table in rope]
        q, k, v = split(self.img_qkv_proj(x), 3)
        text_k, text_v = split(self.txt_kv_proj(text), 2)
        q, k = (T.rotate(y, rope).to(v.dtype) for y in (self.norm_q(q.float()), self.norm_k(k.float())))
        k = torch.cat([k, self.norm_added_k(text_k.float()).to(v.dtype)], 1)
        v = torch.cat([v, text_v], 1)
        padding = 0 if mask is None else (mask[:, 0, 0, :tokens] != 0).sum(-1)
        return self.to_out[0](without_mask(q, k, v, padding).flatten(2))


def to_fp8(x, dtype):
    """FP8 values and the scale that undoes them: the largest magnitude becomes the largest number of `dtype`."""
    scale = (x.abs().amax().float() / torch.finfo(dtype).max).clamp(min=1e-12)
    return (x.float() / scale).to(dtype), scale


def fp8_product(a, scale_a, b, scale_b):
    """a (M, K) @ b (N, K)^T -> BF16."""
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)


class Fp8Product(torch.autograd.Function):
    """x (M, K) @ w (N, K)^T in FP8, a scale per tensor: e4m3 for x and w, e5m2 for the gradient (arXiv 2209.05433)."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.dtypes = x.dtype, w.dtype
        (x, scale_x), (w, scale_w) = to_fp8(x, torch.float8_e4m3fn), to_fp8(w, torch.float8_e4m3fn)
        ctx.save_for_backward(x, scale_x, w, scale_w)
        return fp8_product(x, scale_x, w, scale_w).to(ctx.dtypes[0])

    @staticmethod
    def backward(ctx, grad):
        x, scale_x, w, scale_w = ctx.saved_tensors
        g, scale = to_fp8(grad, torch.float8_e5m2)
        grad_x = fp8_product(g, scale, w.t().contiguous(), scale_w)
        grad_w = fp8_product(g.t().contiguous(), scale, x.t().contiguous(), scale_x)
        return grad_x.to(ctx.dtypes[0]), grad_w.to(ctx.dtypes[1])


class Fp8Linear(T.Linear):
    def forward(self, x):
        x = x.to(self.weight.dtype)
        return Fp8Product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


def fp8(model: T.PRX):
    """The products of tokens in the blocks; modulations have biases and one row per image, and stay."""
    for module in model.blocks.modules():
        if isinstance(module, T.Linear) and module.bias is None:
            module.__class__ = Fp8Linear


def modulations(model: T.PRX):
    linears, rows = [block.modulation.lin for block in model.blocks], [None] * len(model.blocks)
    model.blocks = nn.ModuleList(Modulated(block, i, linears, rows) for i, block in enumerate(model.blocks))


def blocks_by(kind: type, model: T.PRX):
    for block in model.blocks:
        block.__class__ = kind


def attention_by(kind: type, model: T.PRX):
    for block in model.blocks:
        block.attention.__class__ = kind


# ---- the optimizer, computed otherwise: each is in force inside a context --------------------------------------------

@contextlib.contextmanager
def in_place_of(owner, name: str, new):
    """owner.name is `new` inside."""
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


SYMMETRIC_FROM = 1024  # smaller matrices are one product


def symmetric(X, C=None, beta: float = 0.0, alpha: float = 1.0):
    """beta C + alpha X X^T (K, n, n) of X (K, n, m) and a symmetric C. Of large matrices the block below the diagonal
    is not computed but copied: three of four products."""
    def block(i, j):
        x, y = X[:, i], X[:, j].mT
        return x @ y if C is None else torch.baddbmm(C[:, i, j], x, y, beta=beta, alpha=alpha)

    n = X.shape[1]
    if n < SYMMETRIC_FROM:
        return block(slice(n), slice(n))
    upper, lower = slice(n // 2), slice(n // 2, n)
    corner = block(upper, lower)
    return torch.cat([torch.cat([block(upper, upper), corner], 2), torch.cat([corner.mT, block(lower, lower)], 2)], 1)


def orthogonalize_by_blocks(G, steps: int = 5, coefficients=None):
    """T.orthogonalize with symmetric products by blocks."""
    coefficients = coefficients or T.NEWTON_SCHULZ
    margin = 1.01 if coefficients is T.POLAR else 1.0
    X = G.mT if G.shape[1] > G.shape[2] else G
    X = X / (X.flatten(1).norm(dim=1) * margin).clamp(min=1e-7)[:, None, None]
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        A = symmetric(X)                              # (K, n, n), n the smaller side
        B = symmetric(A, A, b, c)                     # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)            # a X + (b A + c A^2) X
    return X.mT if G.shape[1] > G.shape[2] else X


def reduced_in_bf16(flat: T.Flat) -> torch.Tensor:
    """T.Flat.reduced with half the bytes: gradients travel, and are summed, in BF16."""
    own = torch.empty_like(flat.master, dtype=torch.bfloat16)
    T.reduce_scatter(own, flat.grads.view(-1).bfloat16())
    return own.float().div_(len(flat.layout))


class InFlight:
    """Weights on their way: publish() starts the all-gathers, and arrive() waits for them and fills the nets. What
    runs in between (data, text encoder, VAE, teacher) hides them."""

    def __init__(self):
        self.coming = []

    def publish(self, optimizer: T.MuonAdamW):
        for flat in optimizer.flats:
            dtype = optimizer.matrix_dtype() if flat is optimizer.matrices else torch.float32
            mine = flat.master.to(dtype)
            rows = torch.empty(len(flat.layout), flat.size, dtype=dtype, device=mine.device)
            work = T.all_gather(rows.view(-1), mine, async_op=True)
            self.coming.append((work, mine, rows, flat, optimizer.params))

    @torch.no_grad()
    def arrive(self):
        for work, _, rows, flat, params in self.coming:
            work.wait()
            views = flat.all_views(rows)
            torch._foreach_copy_([params[n].data for n in views], list(views.values()))
        self.coming = []


# ---- the variants ----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def new_graph_step():
    torch.compiler.cudagraph_mark_step_begin()
    yield


class Setting(bench.Ours):
    """The script's step with a variant: parameters, optimizer and batch are those of `ours`, for all variants."""

    def __init__(self, ours: bench.Ours, variant: "Variant"):
        vars(self).update(vars(ours))
        self.around = variant.around
        with torch.device("meta"):
            model = T.PRX(**dict(span=ours.nets["model"].span) | ours.nets["model"].config)
        model.load_state_dict(ours.nets["model"].state_dict(keep_vars=True), assign=True)  # the same parameters
        variant.change(model)
        if self.c.compile == "on" or self.c.compile == "auto" and self.device.type == "cuda":
            for block in model.blocks:
                getattr(block, "block", block).compile(dynamic=False, **variant.compile)
        self.nets = nn.ModuleDict({**ours.nets, "model": model})

    def optimize(self):
        self.optimizer.step()

    def step(self) -> dict[str, float]:
        with self.around():
            return super().step()

    def results(self, kinds: str = "output gradients updates") -> dict[str, list]:
        """The model's output, and of each parameter the gradient and the update. Then all is as before."""
        o, b = self.optimizer, self.batch
        copy = lambda tensors: [x.detach().float().clone() for x in tensors]
        with self.around():
            # Not under no_grad, which would compile another graph than training's
            found = dict(output=copy([self.nets["model"](b.eps, b.t, b.text, b.mask, b.keep)]))
            self.forward_backward(b)
            found["gradients"] = copy(o.grad_views.values())
            if "updates" not in kinds:
                o.fresh = True  # what comes next begins new sums
                return found
            state = {k: v.clone() for k, v in o.state_dict().items()}
            before = copy(o.params.values())
            self.optimize()
        found["updates"] = [new - old for new, old in zip(copy(o.params.values()), before)]
        o.load(state.__getitem__)
        return found


class Overlapped(Setting):
    """A step that begins with the optimizer's: its weights arrive while data and the frozen networks are at work."""

    def __init__(self, ours, variant):
        super().__init__(ours, variant)
        self.flight = InFlight()
        publish = lambda optimizer, ema=False: self.flight.publish(optimizer)
        self.around = functools.partial(in_place_of, T.MuonAdamW, "publish", publish)

    def optimize(self):
        self.optimizer.step()
        self.flight.arrive()

    def step(self) -> dict[str, float]:
        b, c, frozen, laps = self.batch, self.c, self.frozen, bench.Laps(self.device)
        with self.around():
            self.optimizer.step()
            laps("optimizer")
            x = frozen.latents(b.x)
            batch = dataclasses.replace(b, x=x, text=frozen.embed(b.text, b.mask))
            if self.align:
                images = b.x if b.pixels is None else b.pixels
                batch.pixels, side = images, (n // c.patch for n in x.shape[2:])
                features = frozen.teacher(T.to_float(images), *side)
                frozen = dataclasses.replace(frozen, teacher=lambda *_: features)
            self.flight.arrive()
            T.training_step(self.nets, frozen, batch, c, self.align)
            self.optimizer.accumulate()
        laps("forward + backward")
        return laps.times


@dataclasses.dataclass(frozen=True)
class Variant:
    change: Callable = lambda model: None
    around: Callable = contextlib.nullcontext  # in force during a step
    kind: type = Setting
    compile: dict = dataclasses.field(default_factory=dict)  # arguments of torch.compile
    needs: str = ""  # cuda | ranks
    compares: str = "output gradients"  # of results()
    tolerance: float = 1e-5  # relative, FP32; in BF16 nothing is closer than 3e-2


VARIANTS = {
    "attention without a mask (flash)": Variant(functools.partial(attention_by, WithoutMask), needs="cuda"),
    "cuDNN's attention, with the mask": Variant(
        around=lambda: in_place_of(T, "BACKENDS", [SDPBackend.CUDNN_ATTENTION]), needs="cuda"),
    "gate and up in one product": Variant(functools.partial(blocks_by, GateAndUp)),
    "all modulations in one product": Variant(modulations),
    "recomputation": Variant(functools.partial(blocks_by, Recomputed)),
    "FP8 products": Variant(fp8, tolerance=0.3),
    "CUDA graphs": Variant(around=new_graph_step, compile=dict(mode="reduce-overhead"), needs="cuda"),
    "symmetric products by blocks": Variant(
        around=functools.partial(in_place_of, T, "orthogonalize", orthogonalize_by_blocks), compares="updates"),
    "gradients in BF16 between ranks": Variant(
        around=functools.partial(in_place_of, T.Flat, "reduced", reduced_in_bf16), needs="ranks", compares="updates",
        tolerance=0.3),  # Newton-Schulz magnifies what rounding does to small directions
    "weights in flight": Variant(kind=Overlapped, needs="ranks", compares="output gradients updates")}


def missing(variant: Variant, world: T.World) -> str:
    """Why a variant cannot run here, or nothing."""
    if variant.needs == "cuda" and world.device.type != "cuda":
        return "needs CUDA"
    if variant.needs == "ranks" and world.size == 1:
        return "needs ranks; start this with torchrun"
    return ""


def differences(setting: Setting, expected: dict, kinds: str = "output gradients updates") -> dict[str, float]:
    """Norm of the difference from the plain step's results over their norm, of the worst tensor."""
    off = lambda new, old: ((new - old).norm() / old.norm().clamp(min=1e-12)).item()
    return {k: max(map(off, tensors, expected[k])) for k, tensors in setting.results(kinds).items()}


def measure(c: T.Config, world: T.World, names: list[str], turns: int) -> dict:
    say = print if world.rank == 0 else lambda line: None
    plain = dataclasses.replace(c, compile="off", accumulate=1, batch=c.batch // world.size)
    ours = bench.build(plain, world, shards=False)
    ours.c = dataclasses.replace(plain, compile=c.compile)
    settings = {"as it is": Setting(ours, Variant())}
    expected, found = settings["as it is"].results(" ".join(VARIANTS[name].compares for name in names)), {}
    for name in names:
        variant = VARIANTS[name]
        if why := missing(variant, world):
            say(f"{name}: {why}")
            continue
        try:
            setting = variant.kind(ours, variant)
            found[name] = differences(setting, expected, variant.compares)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:  # one must not end the others
            say(f"{name}: does not run here ({(str(error).strip() or type(error).__name__).splitlines()[0]})")
            ours.nets.zero_grad()
            ours.optimizer.reset()
            continue
        settings[name] = setting
    expected = None  # 80 GB hold these copies or a step's activations
    rate, rows = bench.matmul_rate(world.device, bench.compute_dtype(c, world.device)), {}
    for name, laps in bench.in_turns(settings, turns).items():
        with contextlib.redirect_stdout(None if world.rank else sys.stdout):
            rows[name] = bench.describe(name, settings[name], laps, rate)
    exact = bench.compute_dtype(c, world.device) == torch.float32
    for name, each in found.items():
        tolerance = VARIANTS[name].tolerance if exact else max(VARIANTS[name].tolerance, 3e-2)
        same = all(each[k] <= tolerance for k in VARIANTS[name].compares.split())
        rows[name] |= dict(differences=each, same=same, over_plain=rows["as it is"]["ms"] / rows[name]["ms"])
        listed = ", ".join(f"{k} {each[k]:.1e}" for k in VARIANTS[name].compares.split())
        say(f"{name}: {rows[name]['over_plain']:.2f}x, differs in {listed}" + ("" if same else ": NOT THE SAME"))
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--track", default="24h", choices=list(bench.ROWS))
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), metavar="VARIANT", help="some of them, or: ranks")
    parser.add_argument("--turns", type=int, default=5, help="how often each comes round [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("variants.json"), help="[%(default)s]")
    args, flags = parser.parse_known_args(argv)
    names = [n for n, v in VARIANTS.items() if v.needs == "ranks"] if args.only == ["ranks"] else args.only
    if unknown := set(names) - set(VARIANTS):
        raise T.UserError(f"--only {unknown.pop()} is unknown; there are {', '.join(VARIANTS)}")
    c, world = bench.config_of(args.track, next(iter(bench.ROWS[args.track])), flags), T.connect()
    rows = measure(c, world, names, args.turns)
    result = dict(machine=T.describe_machine(world), config=dataclasses.asdict(c), rows=rows)
    if world.rank == 0:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.out}")
    if world.size > 1:
        dist.destroy_process_group()
    return result


if __name__ == "__main__":
    try:
        main()
    except T.UserError as error:
        print(f"variants: {error}", file=sys.stderr)
        sys.exit(2)
