"""How long does a training step take, of what, and beside whom? On the script's own training_step and MuonAdamW.

    python records/bench.py --track micro --share                  # data, forward + backward, optimizer; row by row
    python records/bench.py --track micro --peers diffusers        # beside diffusers' model with torch.optim, in turns
    python records/bench.py --track micro --profile                # the ten most expensive kernels, and a trace
    python records/bench.py --share --out gpu.json                 # one GPU: the 24h track's shapes, no weights needed
    python records/bench.py --track micro --share --compile on --lr 1e-3       # further flags are train_prx.py's

On micro and mini, where their shards are, --share and --profile time real batches, with text encoder and teacher. Else,
and beside peers, inputs are random numbers of the real shapes: never zeros, whose products could be cheaper.

On CPUs rows take turns, a few steps each, because such machines are noisy; on CUDA, where memory is short, one model is
freed before the next is built, and a row that does not fit says so. Printed: the median of all steps, with quartiles.
FLOPs are the model's own; the floor is the time they take at the rate of one large matrix product here. JSON: --out.
"""

import argparse
import dataclasses
import gc
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_prx as T  # noqa: E402

SMALL = "--repa 0 --tread 0 --accumulate 1 --resolution 256 --batch 128"
LARGE = "--repa 0 --tread 0 --accumulate 1 --resolution 1024 --batch 8"
TECHNIQUES = {  # row -> flags; the others are compared with the first
    "the track's step": "",
    "without REPA": "--repa 0",
    "AdamW": "--repa 0 --optimizer adamw",
    "TREAD 50 %": "--repa 0 --tread 0.5",
    "SPRINT 75 %": "--repa 0 --sprint 0.75"}
ROWS = {
    "micro": TECHNIQUES,
    "mini": TECHNIQUES,
    "24h": {
        "256 px, 128": SMALL,
        "256 px, 128, AdamW": f"{SMALL} --optimizer adamw",
        "256 px, 32": f"{SMALL} --batch 32",
        "1024 px, 8": LARGE,
        "1024 px, 8, TREAD 50 %": f"{LARGE} --tread 0.5"}}
LATENTS = {"none": (3, 1), "dc-ae": (32, 32), "flux2": (128, 16)}  # channels and pixels per side; others (16, 8)
TEXT_WIDTH = {"tiny": 96}  # others 2304, as T5Gemma
PEERS = "eager, Muon", "compiled, Muon", "eager, AdamW", "compiled, AdamW"

torch._dynamo.config.recompile_limit = 64  # one graph for each shape of all rows, as in training
torch._inductor.config.cpp.vec_isa_ok = True


def config_of(track: str, row: str, flags: list[str]) -> T.Config:
    """The track's settings, then the row's flags, then the user's."""
    config, stages = T.parse_args(["--track", track, "--steps", "1", *ROWS[track][row].split(), *flags])
    return stages[0].config(config)


def compute_dtype(c: T.Config, device) -> torch.dtype:
    bf16 = c.compute == "bf16" or c.compute == "auto" and T.has_fast_bf16(device)
    return torch.bfloat16 if bf16 else torch.float32


class Laps:
    """Seconds of the parts of a step, each waited for."""

    def __init__(self, device):
        self.device, self.times, self.last = device, {}, time.perf_counter()

    def __call__(self, part: str):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times[part], self.last = now - self.last, now


def random_batch(c: T.Config, device, seed: int = 0) -> T.Batch:
    """Random data of a setting's shapes: images or latents, and text states."""
    channels, factor = LATENTS.get(c.vae, (16, 8))
    side, skipped = c.resolution // factor, c.tread + c.sprint
    generator = torch.Generator(device).manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, device=device)
    image = (draw(c.batch, 3, c.resolution, c.resolution) * 50 + 127).clamp(0, 255).to(torch.uint8)
    mask = torch.ones(c.batch, c.text_tokens, dtype=torch.bool, device=device)
    mask[:, c.text_tokens - c.text_tokens // 8:] = False  # an eighth is padding
    text, t = draw(c.batch, c.text_tokens, TEXT_WIDTH.get(c.text, 2304)), draw(c.batch).sigmoid().clamp(1e-3, 0.999)
    batch = T.Batch(image, t, text, mask, eps=draw(c.batch, channels, side, side))
    if c.vae != "none":
        batch.x, batch.pixels = draw(c.batch, channels, side, side).bfloat16(), image
    if skipped:
        batch.keep = T.route(c.batch, (side // c.patch) ** 2, skipped, generator)
    return batch


@torch.no_grad()
def awaken(nets: torch.nn.Module) -> torch.nn.Module:
    """Weights away from where they start: a fresh PRX outputs zero whatever is computed inside."""
    for seed, p in enumerate(nets.parameters()):
        noise = torch.randn(p.shape, generator=torch.Generator(p.device).manual_seed(seed), device=p.device)
        p += 0.3 * noise * p.shape[-1] ** -0.5
    return nets


class Ours:
    """The script's step: its model, losses and optimizer, on one random batch or on batches from shards."""

    def __init__(self, c: T.Config, world: T.World, frozen: T.Frozen, data: T.Shards | None = None):
        self.c, self.world, self.device, self.frozen, self.align = c, world, world.device, frozen, c.repa > 0
        features = frozen.teacher.width if self.align else 0
        self.nets = awaken(T.build_nets([c], TEXT_WIDTH.get(c.text, 2304), features, frozen, self.device))
        self.optimizer = T.MuonAdamW(self.nets, c, world)
        T.set_compute_dtype(self.nets, compute_dtype(c, self.device))
        if c.compile == "on" or c.compile == "auto" and self.device.type == "cuda":
            for block in self.nets["model"].blocks:
                block.compile(dynamic=False)
        self.loader, self.batch = None, random_batch(c, self.device, world.rank)
        if data:
            self.loader = T.Loader(data, c, frozen, world)

    def forward_backward(self, batch: T.Batch):
        for part in batch.split(self.c.accumulate):
            T.training_step(self.nets, self.frozen, part, self.c, self.align)
            self.optimizer.accumulate()

    def step(self) -> dict[str, float]:
        laps = Laps(self.device)
        batch = next(self.loader) if self.loader else self.batch
        laps("data")
        self.forward_backward(batch)
        laps("forward + backward")
        self.optimizer.step()
        laps("optimizer")
        return laps.times

    def flops(self) -> float:
        """The model's, of a training step."""
        c, config = self.c, self.nets["model"].config
        tokens = (c.resolution // self.frozen.factor // c.patch) ** 2
        kept = T.kept_tokens(tokens, c.tread + c.sprint)
        return 3 * c.batch * T.flops_per_image(config, tokens, c.text_tokens, kept, T.routed_blocks(c))


class Peer:
    """diffusers' PRX on the same data, weights and loss, as its users would train it: FP32 weights with autocast, the
    blocks' matrices with torch.optim.Muon (or AdamW for all), clipped by torch; no EMA, which ours has off `micro`."""

    def __init__(self, kind: str, ours: Ours):
        from diffusers import PRXTransformer2DModel

        c = self.c = ours.c
        self.device, self.flops, self.batch = ours.device, ours.flops, ours.batch
        self.x_0, self.bf16 = ours.frozen.latents(ours.batch.x), compute_dtype(c, ours.device) == torch.bfloat16
        self.net = PRXTransformer2DModel(**ours.nets["model"].config).to(self.device).train()
        self.net.load_state_dict(ours.nets["model"].state_dict())
        named = list(self.net.named_parameters())
        matrices = [p for n, p in named if n.startswith("blocks.") and p.ndim == 2]
        rest = [p for n, p in named if not n.startswith("blocks.") or p.ndim != 2]
        adamw = dict(lr=c.lr, betas=T.BETAS, weight_decay=0.0, fused=True)
        self.optimizers = [torch.optim.AdamW(self.net.parameters(), **adamw)]
        if "Muon" in kind:
            muon = torch.optim.Muon(matrices, lr=c.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self.optimizers = [muon, torch.optim.AdamW(rest, **adamw)]
        self.run = torch.compile(self.net, dynamic=False) if "compiled" in kind else self.net

    def step(self) -> dict[str, float]:
        b, laps = self.batch, Laps(self.device)
        t = b.t[:, None, None, None]
        x_t = (1 - t) * self.x_0 + t * b.eps
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.run(x_t, b.t, b.text, b.mask, return_dict=False)[0].float()
        v, target = output, b.eps - self.x_0
        if self.c.predict == "x":
            v, target = ((x_t - x) / t.clamp(min=0.05) for x in (output, self.x_0))
        F.mse_loss(v, target).backward()
        laps("forward + backward")
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.c.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        laps("optimizer")
        return laps.times


@torch.no_grad()
def difference(peer: Peer, ours: Ours) -> float:
    """Largest difference of the two outputs in FP32, same weights and data, over the largest output."""
    b = peer.batch
    mine = ours.nets["model"](b.eps, b.t, b.text, b.mask)
    theirs = peer.net(b.eps, b.t, b.text, b.mask, return_dict=False)[0]
    return ((mine - theirs).abs().max() / mine.abs().max()).item()


def build(c: T.Config, world: T.World, shards: bool = True) -> Ours:
    """On scenes where they are, else on random data, for which nothing but REPA's teacher is loaded."""
    frozen, data, (channels, factor) = T.Frozen(), None, LATENTS.get(c.vae, (16, 8))
    network = lambda name, kind: str(ROOT / "data/networks" / kind) if name == "tiny" else name
    if c.vae != "none":
        frozen.vae = SimpleNamespace(channels=channels, factor=factor)
    if c.repa:
        frozen.teacher = T.Teacher(network(c.repa_teacher, "teacher"), world.device)
    if shards and c.track != "24h" and (Path(c.data) / "index.json").exists():
        data, frozen.text = T.Shards(c), T.TextEncoder(network(c.text, "text"), world.device, c.text_tokens)
    return Ours(c, world, frozen, data)


def in_turns(settings: dict, turns: int, steps: int = 4) -> dict[str, list[dict]]:
    """Laps of every setting. The first turn only warms up."""
    laps = {row: [] for row in settings}
    for turn in range(turns + 1):
        for row, setting in settings.items():
            mine = [setting.step() for _ in range(steps)]
            laps[row] += mine if turn else []
    return laps


def compare(builders: dict, device, turns: int, rate: float) -> dict[str, dict]:
    """A row for each setting that `builders` make: all at once and in turns on a CPU, one after the other on CUDA."""
    groups = [[row] for row in builders] if device.type == "cuda" else [list(builders)]
    rows = {}
    print(f"{'':28}{'ms':>9}{'quartiles':>18}{'images/s':>10}{'floor, ms':>11}  parts, ms")
    for names in groups:
        try:
            settings = {row: builders[row]() for row in names}
            for row, laps in in_turns(settings, turns).items():
                rows[row] = describe(row, settings[row], laps, rate)
        except torch.OutOfMemoryError as error:
            print(f"{names[0]}: does not fit into memory ({str(error).splitlines()[0]})")
        settings = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows


def describe(name: str, setting, laps: list[dict], rate: float) -> dict:
    """Prints a row and returns it. rate: FLOP/s of a large product."""
    low, ms, high = (1e3 * np.percentile([sum(lap.values()) for lap in laps], (25, 50, 75))).tolist()
    parts = {part: float(np.median([lap[part] for lap in laps])) * 1e3 for part in laps[0]}
    floor, per_s = setting.flops() / rate * 1e3, len(setting.batch.x) / ms * 1e3
    row = dict(ms=ms, quartiles_ms=[low, high], images_per_s=per_s, floor_ms=floor, parts_ms=parts, steps=len(laps))
    line = ", ".join(f"{part} {part_ms:.1f} ({part_ms / ms:.0%})" for part, part_ms in parts.items())
    if setting.device.type == "cuda":
        mfu = lambda part_ms: setting.flops() / part_ms * 1e3 / T.PEAK_FLOPS
        row |= dict(mfu=mfu(ms), mfu_forward_backward=mfu(parts["forward + backward"]),
                    peak_bytes=torch.cuda.max_memory_allocated())
        line += f"; MFU {mfu(ms):.1%}, {row['peak_bytes'] / 1e9:.1f} GB"
    print(f"{name:28}{ms:9.1f}{f'{low:.1f} to {high:.1f}':>18}{per_s:10.1f}{floor:11.1f}  {line}")
    return row


def matmul_rate(device, dtype) -> float:
    """FLOP/s of a large matrix product here."""
    n, seconds = 8192 if device.type == "cuda" else 2048, []
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    for _ in range(6):
        laps, _ = Laps(device), a @ b
        laps("product")
        seconds.append(laps.times["product"])
    return 2 * n ** 3 / min(seconds)


def peers(c: T.Config, world: T.World, args, rate: float) -> dict:
    """Ours and diffusers', eager and compiled, with Muon and with AdamW. Muon does the same on both sides: five classic
    iterations on all the blocks' matrices. Each peer is compared with our compiled step of the same optimizer."""
    off = dict(repa=0.0, pdino=0.0, tread=0.0, sprint=0.0, contrastive=0.0, accumulate=1)
    c = dataclasses.replace(c, **off, ns_steps=5, modulation="muon")
    ours = lambda **knobs: build(dataclasses.replace(c, **knobs), world, shards=False)
    reference = ours(compile="off", compute="fp32")  # weights and data for all
    reference.c, reference.optimizer = c, None
    largest = difference(Peer("eager, AdamW", reference), reference)
    print(f"same weights, same output within {largest:.1e} of the largest (FP32)")
    builders = {
        "ours, compiled, Muon": lambda: ours(compile="on"),
        "ours, eager, Muon": lambda: ours(compile="off"),
        "ours, compiled, AdamW": lambda: ours(compile="on", optimizer="adamw")}
    for kind in PEERS:
        builders[f"diffusers, {kind}"] = lambda kind=kind: Peer(kind, reference)
    before, T.NEWTON_SCHULZ = T.NEWTON_SCHULZ, T.CLASSIC
    rows, ratios = compare(builders, world.device, args.turns, rate), {}
    T.NEWTON_SCHULZ = before
    for kind in PEERS:
        mine, theirs = f"ours, compiled, {kind.split(', ')[1]}", f"diffusers, {kind}"
        if mine in rows and theirs in rows:
            ratios[kind] = rows[mine]["images_per_s"] / rows[theirs]["images_per_s"]
            print(f"{mine} over {theirs}: {ratios[kind]:.2f}x images/s")
    return dict(rows=rows, ratios=ratios, largest_difference=largest)


def profile(c: T.Config, world: T.World, trace: Path) -> dict:
    """The ten kernels that cost most in three steps, and a trace."""
    setting, cuda = build(c, world), world.device.type == "cuda"
    in_turns({"": setting}, 0)
    with torch.profiler.profile() as profiler:  # of the CPU, and of CUDA where there is one
        for _ in range(3):
            setting.step()
    profiler.export_chrome_trace(str(trace))
    cost = lambda e: e.self_device_time_total if cuda else e.self_cpu_time_total  # microseconds
    events = sorted(profiler.key_averages(), key=cost, reverse=True)
    total, kernels = sum(map(cost, events)), []
    for e in events[:10]:
        kernels.append(dict(name=e.key, share=cost(e) / total, ms=cost(e) / 3e3, calls=e.count // 3))
        print("{share:7.1%} {ms:9.2f} ms/step {calls:6d} calls/step  {name:.90}".format(**kernels[-1]))
    print(f"wrote {trace}; open it in https://ui.perfetto.dev")
    return dict(kernels=kernels, trace=str(trace))


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--share", action="store_true", help="how a step divides")
    what.add_argument("--peers", choices=["diffusers"], help="beside another implementation")
    what.add_argument("--profile", action="store_true", help="ten kernels and a trace")
    parser.add_argument("--track", default="24h", choices=list(ROWS))
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="for --share: some of the track's [all]")
    parser.add_argument("--turns", type=int, default=5, help="how often each row comes round [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="a trace lies beside it [%(default)s]")
    args, flags = parser.parse_known_args(argv)
    if unknown := set(args.rows or ()) - set(ROWS[args.track]):
        raise T.UserError(f"--rows {unknown.pop()} is unknown; {args.track} has {', '.join(ROWS[args.track])}")
    configs = {row: config_of(args.track, row, flags) for row in args.rows or ROWS[args.track]}
    first, world = next(iter(configs.values())), T.connect()
    rate = matmul_rate(world.device, compute_dtype(first, world.device))
    result = dict(machine=T.describe_machine(world), config=dataclasses.asdict(first), flops_per_s=rate)
    if args.peers:
        result |= peers(first, world, args, rate)
    elif args.profile:
        result |= profile(first, world, args.out.with_suffix(".trace.json"))
    else:
        builders = {row: lambda c=c: build(c, world) for row, c in configs.items()}
        result["rows"] = compare(builders, world.device, args.turns, rate)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")
    return result


if __name__ == "__main__":
    try:
        main()
    except T.UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
