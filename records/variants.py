"""What could make a step faster and is not in train_prx.py: the same model, weights and outputs, computed otherwise.

    python records/variants.py                                        # on a GPU: 256 and 1024 px, what to build next
    python records/variants.py --track micro --compile on --turns 12 --steps-per-turn 6 --out variants.json

Each variant shares its parameters with the trainer's model; before anything is timed its output and gradients are
compared with the model's own. Then all take turns in one process. What pays moves into the script, and what does not
into records/speed.md. "Attention without a mask", cuDNN's and CUDA graphs need a GPU.
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
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_prx as T  # noqa: E402
from data.settings import parse_args  # noqa: E402
from records import bench  # noqa: E402


class GateAndUp(T.Block):
    """The gated MLP's first two matrices in one product."""

    def mlp(self, h):
        weight = torch.cat([self.gate_proj.weight, self.up_proj.weight])
        gate, up = F.linear(h.to(weight.dtype), weight).chunk(2, -1)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class Chunks(nn.Module):
    """Stands for a block's modulation, whose product was made with all the others'."""

    def forward(self, rows):  # (B, 6 D) -> six of (B, 1, D) in FP32
        return rows.float()[:, None].chunk(6, -1)


class Modulated(nn.Module):
    """A block that gets its rows of the product of all modulations; the first one makes it."""

    def __init__(self, block, number: int, linears: list[nn.Linear], rows: list[torch.Tensor]):
        super().__init__()
        self.block, self.number, self.rows, self.linears = block, number, rows, linears
        block.modulation = Chunks()

    def forward(self, x, text, vec, rope, mask):
        if self.number == 0:
            join = lambda kind: torch.cat([getattr(linear, kind) for linear in self.linears])
            weight, bias = join("weight"), join("bias")
            product = F.linear(F.silu(vec).to(weight.dtype), weight, bias.to(weight.dtype))
            self.rows[:] = product.chunk(len(self.linears), -1)
        return self.block(x, text, self.rows[self.number], rope, mask)


class WithoutMask(T.Attention):
    """Flash attention over [image, text] keys of any length, one run of keys per image and no mask.

    A batch is twice as many sequences: each image's queries with its keys, then no queries with the padding that
    follows. So shapes are fixed, nothing is packed, and nobody asks the GPU for a length. Padding gets no gradient.
    """

    def forward(self, x, text, rope, mask):
        (B, N), tokens = x.shape[:2], text.shape[1]
        split = lambda y, n: y.unflatten(-1, (n, self.heads, -1)).unbind(2)            # (B, N, H, d) each
        rope = [table[:, None] if table.ndim == 2 else table.transpose(1, 2) for table in rope]
        q, k, v = split(self.img_qkv_proj(x), 3)
        text_k, text_v = split(self.txt_kv_proj(text), 2)
        q, k = T.rotate(self.norm_q(q), rope).to(v.dtype), T.rotate(self.norm_k(k), rope).to(v.dtype)
        k, v = torch.cat([k, self.norm_added_k(text_k).to(v.dtype)], 1), torch.cat([v, text_v], 1)
        padding = 0 if mask is None else (mask[:, 0, 0, :tokens] != 0).sum(-1)
        ends = torch.arange(1, B + 1, device=x.device)
        queries, keys = ends * N, ends * (N + tokens)
        queries, keys = (F.pad(torch.stack(pair, 1).flatten(), (1, 0)).int()
                         for pair in ((queries, queries), (keys - padding, keys)))
        out = varlen_attn(*(y.flatten(0, 1) for y in (q, k, v)), queries, keys, N, N + tokens)
        return self.to_out[0](out.unflatten(0, (B, N)).flatten(2))


class Cudnn(T.Attention):
    """The context is inside: around the compiled block it would not be seen, the kernel being chosen by then."""

    def forward(self, *args):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return super().forward(*args)


def gate_and_up(model):
    for block in model.blocks:
        block.__class__ = GateAndUp


def modulations(model):
    linears, rows = [block.modulation.lin for block in model.blocks], [None] * len(model.blocks)
    model.blocks = nn.ModuleList(Modulated(block, i, linears, rows) for i, block in enumerate(model.blocks))


def attention_by(kind, model):
    for block in model.blocks:
        block.attention.__class__ = kind


@contextlib.contextmanager
def new_graph_step():
    torch.compiler.cudagraph_mark_step_begin()
    yield


@dataclasses.dataclass(frozen=True)
class Variant:
    change: Callable = lambda model: None
    around: Callable = contextlib.nullcontext  # each step
    compile: dict = dataclasses.field(default_factory=dict)  # arguments of torch.compile
    cuda: bool = False  # needs it


VARIANTS = {
    "as it is": Variant(),
    "gate and up in one product": Variant(gate_and_up),
    "all modulations in one product": Variant(modulations),
    "attention without a mask (flash)": Variant(functools.partial(attention_by, WithoutMask), cuda=True),
    "cuDNN's attention, with the mask": Variant(functools.partial(attention_by, Cudnn), cuda=True),
    "CUDA graphs": Variant(around=new_graph_step, compile=dict(mode="reduce-overhead"), cuda=True)}


class Changed(bench.Ours):
    """The trainer's step with a variant of its model."""

    def __init__(self, ours: bench.Ours, variant: Variant):
        vars(self).update(vars(ours))
        self.around = variant.around
        with torch.device("meta"):
            self.model = T.PRX(**{"span": ours.model.span} | ours.model.config)
        self.model.load_state_dict(ours.model.state_dict(keep_vars=True), assign=True)  # the same parameters
        variant.change(self.model)
        compiled = self.c.compile == "on" or self.c.compile == "auto" and self.device.type == "cuda"
        for block in self.model.blocks if compiled else ():
            getattr(block, "block", block).compile(dynamic=False, **variant.compile)

    def step(self):
        with self.around():
            return super().step()

    def output_and_gradients(self) -> list[torch.Tensor]:
        b, c = self.batch, self.c
        self.optimizers[0].zero_grad()
        keep = T.route(c.batch, b.x_0, c.patch, c.tread, T.generator_for(self.device, 0)) if c.tread else None
        with self.around():
            out = self.model(b.x_0, b.t, b.text, b.mask, keep)
            out.square().mean().backward()
        params = self.optimizers[0].params.values()
        gradients = torch.cat([p.grad.float().flatten().cpu() for p in params])  # 5 GB for 1.2 B parameters
        return [out.detach().cpu(), gradients]


def awaken(ours: bench.Ours):
    """Weights away from where they start: a fresh PRX outputs zero whatever is computed inside."""
    optimizer = ours.optimizers[0]
    optimizer.master += 0.02 * torch.randn(optimizer.master.shape, generator=T.generator_for("cpu", 0)).to(ours.device)
    optimizer.publish()


def measure(base, args) -> dict:
    device, shapes = T.setup_world().device, bench.shapes_of(base)
    ceiling, _ = bench.ceilings(device, torch.bfloat16 if bench.uses_bf16(base, device) else torch.float32)
    result = dict(machine=T.describe_machine(T.World(device=device)), rows={})
    variants = {name: v for name, v in VARIANTS.items() if device.type == "cuda" or not v.cuda}
    if left := VARIANTS.keys() - variants:
        print(f"not measured, for want of a GPU: {', '.join(sorted(left))}")
    names = args.rows or (["256 px, 128", "1024 px, 8"] if base.track == "24h" else ["plain"])
    for row, c in bench.choose_rows(base, names).items():
        print(f"{row}:")
        teacher = bench.teacher_for(c, device) if c.repa else None
        ours = bench.Ours(dataclasses.replace(c, compile="off"), device, *shapes, teacher)  # compiled as a variant
        ours.c = c
        awaken(ours)
        settings, setting, expected, differences = {}, None, None, {}
        for name, variant in variants.items():
            found = None
            try:
                setting = Changed(ours, variant)
                found = setting.output_and_gradients()
            except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:  # one of them must not end the rest
                print(f"{name}: does not run here ({(str(error).strip() or type(error).__name__).splitlines()[0]})")
            bench.release(ours)  # also what an error held on to
            if found is None:
                continue
            expected = expected or found
            differences[name] = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, expected)]
            settings[name] = setting
        laps, extra = bench.in_turns(settings, args.turns, args.steps_per_turn)
        rows = bench.report({name: settings[name].facts() for name in laps}, laps, extra, ceiling)
        for name in rows:
            output, gradients = differences[name]
            del rows[name]["first_step_s"]  # it was compiled when outputs were compared
            rows[name] |= dict(difference_of_output=output, difference_of_gradients=gradients)
            print(f"{name}: output differs by {output:.1e}, gradients by {gradients:.1e}, relative")
        result["rows"][row] = dict(config=dataclasses.asdict(c), variants=rows)
        del ours, settings, setting
        bench.release()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.out}")
    return result


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Further flags are those of train_prx.py.", allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="of the track's rows in records/bench.py")
    parser.add_argument("--turns", type=int, default=5, help="how often each variant comes round [%(default)s]")
    parser.add_argument("--steps-per-turn", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--out", type=Path, help="JSON")
    args, flags = parser.parse_known_args(argv)
    return measure(parse_args(["--steps", "1", *flags])[0], args)


if __name__ == "__main__":
    try:
        main()
    except T.UserError as error:
        print(f"variants: {error}", file=sys.stderr)
        sys.exit(2)
