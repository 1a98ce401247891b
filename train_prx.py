"""PRX speedrun: train a text-to-image diffusion transformer from scratch, in one readable script.

    python train_prx.py --track micro                  # two CPU cores, five minutes, no downloads: watch it learn
    python train_prx.py --track mini                   # one GPU, four minutes, 256 px scenes
    torchrun --standalone --nproc_per_node=8 train_prx.py --data SHARDS   # the 24 h track, PRX-1.2B on one 8-GPU node
    python train_prx.py --track micro --data SHARDS    # your own images, prepared with data/prepare.py

Everything a run produces is in logs/NAME: log.txt (this source included), metrics.jsonl, samples/, curve.png,
checkpoint/ and transformer/, which diffusers' PRXTransformer2DModel loads. `python eval_prx.py logs/NAME` measures it.

Best record so far: `micro`, 99.75 % prompt accuracy (mean of 3 seeds, worst 99.67 %) in 4 minutes on 2 cores of an
Intel Xeon with AVX-512, torch 2.13.0, 2026-11-23. Logs and rules: records/README.md.
Model: PRX, Photoroom 2026, as in diffusers' `PRXTransformer2DModel`.
"""

import argparse
import dataclasses
import hashlib
import importlib
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

SOURCE = Path(__file__).read_text()  # at once: the log embeds the code that runs, not what it is edited to meanwhile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

ROOT = Path(__file__).resolve().parent
PEAK_FLOPS = 790e12  # about what dense BF16 matmuls reach on one H200; MFU is the model's own FLOPs over this


class UserError(Exception):
    """Bad input. The message is one sentence that names the value and says what to do; the exit code is 2."""


class TrainingFailed(Exception):
    """The run cannot go on; its last checkpoint stands. The exit code is 1."""


# =====================================================================================================================
# 2. Configuration: every knob, once, with its evidence. `--help` and the flags are made from this text.
# =====================================================================================================================
# "PRX part 2" is Photoroom's ablation study (FLUX VAE, 256 px, 100k steps). "micro" figures are in the README's table.

@dataclasses.dataclass(frozen=True)
class Config:
    # run
    track: str = "24h"  # 24h | mini | micro: which data, model, budget and rules (records/README.md)
    recipe: str = "default"  # default | baseline (PRX part 2's: AdamW 1e-4, constant, no EMA) | tuned-baseline
    name: str = ""  # the run's folder in logs/; empty: the track, and the recipe and the data where they differ from it
    seed: int = 0  # every random draw is a function of (seed, step, global sample index)
    steps: int = 0  # length in steps, reproducible to the bit; 0: the length is given in hours
    hours: float = 24.0  # length in wall-clock hours from process start to final weights on disk; 0: given in steps
    resume: str = "auto"  # auto (newest complete checkpoint of this run) | never (start again) | a run's folder
    stop_after: int = 0  # write a checkpoint after this many steps in all and stop, to split a run over jobs; 0: never
    # data
    data: str = ""  # "scenes" (the embedded data set) or a folder that data/prepare.py wrote
    resolution: int = 256  # pixels per side of the scenes; shards bring their own
    batch: int = 256  # images per step over all ranks; PRX part 2
    accumulate: int = 1  # micro-batches per step, summed in FP32: one GPU gets the batch of eight
    captions: str = "long"  # long | short | mix:P (share P is short). FID 18.20 long, 36.84 short, part 2
    # model: PRX-1.2B
    hidden: int = 1792  # width
    depth: int = 16  # blocks
    heads: int = 28  # attention heads; hidden / heads is the head dimension, a multiple of 4
    mlp_ratio: float = 3.5  # width of the gated MLP over hidden
    patch: int = 16  # pixels per side of a token
    bottleneck: int = 256  # pixel space: patch -> bottleneck -> hidden; 0: one Linear
    text: str = "google/t5gemma-2b-2b-ul2"  # frozen encoder: Hugging Face repository or folder; tiny: embedded
    text_tokens: int = 256  # longer prompts are cut
    text_pad: int = 64  # text is padded to a multiple of this per batch: few shapes to compile for, little padding
    # objective
    predict: str = "x"  # x | v: what the network outputs; the loss is in v-space. CMMD in latents: v 0.41, x 0.54
    shift: float = 3.0  # time shift s: t <- s t / (1 + (s - 1) t). 3.0 for pixel space in PRX
    uniform: float = 0.1  # share of times drawn uniformly instead of logit-normal
    caption_dropout: float = 0.1  # share of captions replaced by the empty prompt, for classifier-free guidance
    # optimizer
    optimizer: str = "muon"  # muon (2-D weights of the blocks; the rest AdamW) | adamw. FID 18.20 -> 15.55, part 2
    lr: float = 1e-4  # of Muon's matrices, scaled so that AdamW's rate carries over; with adamw, of everything
    lr_adamw: float = 1e-4  # of what Muon leaves to AdamW
    warmup: float = 0.01  # linear warm-up over this share of the run; 1,000 of 100k steps in part 2
    decay_from: float = 0.7  # linear decay to zero from this share of the run; 1: constant, as part 2
    momentum: float = 0.95  # Muon's, Nesterov
    ns_steps: int = 5  # Newton-Schulz iterations
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    eps: float = 1e-8  # AdamW; 1e-15 in part 2's baseline
    weight_decay: float = 0.0  # decoupled, of everything; part 2
    clip: float = 1.0  # largest norm of the gradient over all parameters; 0.2 in part 2's baseline
    ema: float = 0.999  # decay per step of the weights' moving average, in FP32, of the masters; 0: off
    ema_every: int = 10  # steps between its updates
    # precision and speed
    compute: str = "auto"  # auto | bf16 | fp32, of matmuls; masters stay FP32. FID 18.20, 21.87 otherwise, part 2
    compile: str = "auto"  # auto | on | off: torch.compile of the blocks; auto: where it pays back within the run
    # output
    sample_steps: int = 25  # Euler steps of the sample grids
    cfg_scale: float = 3.0  # guidance of the sample grids
    samples: int = 4  # sample grids over the run, on the clock; 0: only the one after the end, off the clock
    checkpoint_minutes: float = 30.0  # between checkpoints; the last two are kept


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run: its share of the budget and the knobs that differ in it (resolution, batch, captions, shift)."""

    share: float = 1.0
    knobs: dict = dataclasses.field(default_factory=dict)


TRACKS = {
    "24h": (Config(), [Stage()]),
    # 256 tokens of 16 px. A guess from the micro track's search: not measured yet.
    "mini": (Config(track="mini", data="scenes", hours=4 / 60, hidden=512, depth=8, heads=8, bottleneck=128,
                    text="tiny", text_tokens=64, lr=2e-3, lr_adamw=2e-3, warmup=0.03, decay_from=0.3, ema=0.99,
                    checkpoint_minutes=5), [Stage()]),
    # Batch, rates and shift (2.0: 94.3 %, 1.0: 97.8 % prompt accuracy after 38,400 images) from
    # records/micro_search.jsonl. No long caption of the micro scenes has more than 37 tokens.
    "micro": (Config(track="micro", data="scenes", hours=4 / 60, resolution=32, batch=64, hidden=128, depth=6,
                     heads=4, patch=8, bottleneck=0, text="tiny", text_tokens=80, text_pad=40, shift=1.0, lr=5e-3,
                     lr_adamw=3e-3, warmup=0.04, decay_from=0.3, ema=0.99, ema_every=4, samples=2,
                     checkpoint_minutes=2), [Stage()]),
}

BASELINE = dict(optimizer="adamw", lr=1e-4, eps=1e-15, weight_decay=0.0, warmup=0.01, decay_from=1.0, clip=0.2, ema=0.0)
RECIPES = {"default": {}, "baseline": BASELINE, "tuned-baseline": BASELINE | dict(lr=2e-3)}

KNOB = re.compile(r"^    (\w+): (?:str|int|float) = .+?  # (.+)$", re.M)  # the comments above are the help texts
HELP = dict(KNOB.findall(SOURCE.split("class Config:")[1].split("class Stage:")[0]))


def flag(knob: str) -> str:
    return "--" + knob.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse_args(argv=None) -> tuple[Config, list[Stage]]:
    """The track's settings, then the recipe's, then the flags. UserError on anything unknown or contradictory."""
    parser = Parser(description="Train PRX. Defaults are those of the 24h track.", allow_abbrev=False)
    for field in dataclasses.fields(Config):
        parser.add_argument(flag(field.name), type=field.type, default=argparse.SUPPRESS,
                            help=f"{HELP[field.name]} [{field.default}]".replace("%", "%%"))
    flags = vars(parser.parse_args(argv))
    for knob, table in (("track", TRACKS), ("recipe", RECIPES)):
        if flags.get(knob, Config.__dict__[knob]) not in table:
            raise UserError(f"--{knob} {flags[knob]} is unknown; use one of {', '.join(table)}")
    config, stages = TRACKS[flags.get("track", "24h")]
    if flags.get("steps") and flags.get("hours"):
        raise UserError("--steps and --hours both give the length of the run; give one of them")
    if flags.get("steps"):
        flags["hours"] = 0.0
    config = dataclasses.replace(config, **RECIPES[flags.get("recipe", "default")] | flags)
    if not config.name:
        parts = [config.track] + [config.recipe] * (config.recipe != "default")
        if config.data and config.data != TRACKS[config.track][0].data:
            parts += [re.sub(r"[^\w.-]", "_", Path(config.data).resolve().name)]
        config = dataclasses.replace(config, name="-".join(parts))
    stages = [Stage(s.share, {k: v for k, v in s.knobs.items() if k not in flags}) for s in stages]
    for stage in stages:
        check_config(dataclasses.replace(config, **stage.knobs))
    return config, stages


def check_config(c: Config):
    """Refuse what cannot work, before anything is loaded."""
    def need(condition, message):
        if not condition:
            raise UserError(message)

    for knob, options in dict(predict="x v", optimizer="muon adamw", compute="auto bf16 fp32",
                              compile="auto on off").items():
        need(getattr(c, knob) in options.split(),
             f"{flag(knob)} {getattr(c, knob)} is unknown; use one of {', '.join(options.split())}")
    for knob in ("batch", "accumulate", "hidden", "depth", "heads", "patch", "text_tokens", "lr", "lr_adamw",
                 "ema_every", "sample_steps", "ns_steps", "shift", "checkpoint_minutes", "resolution", "text_pad",
                 "eps", "mlp_ratio"):
        need(getattr(c, knob) > 0, f"{flag(knob)} {getattr(c, knob)} must be positive")
    for knob in ("uniform", "caption_dropout", "warmup", "decay_from"):
        need(0 <= getattr(c, knob) <= 1, f"{flag(knob)} {getattr(c, knob)} must lie in 0 to 1")
    for knob in ("momentum", "beta1", "beta2", "ema"):
        need(0 <= getattr(c, knob) < 1, f"{flag(knob)} {getattr(c, knob)} must be at least 0 and less than 1")
    need(0 <= c.seed < 2 ** 63, f"--seed {c.seed} must lie in 0 to 2^63 - 1")
    need(c.hours < math.inf, f"--hours {c.hours} must be finite")
    for knob in ("steps", "hours", "stop_after", "clip", "bottleneck", "samples", "weight_decay"):
        need(getattr(c, knob) >= 0, f"{flag(knob)} {getattr(c, knob)} must not be negative")
    need(c.steps or c.hours, "the run has no length; give --steps or --hours")
    need(c.warmup <= c.decay_from,
         f"--warmup {c.warmup} ends after --decay-from {c.decay_from} begins; lower one of them")
    need(c.hidden % c.heads == 0 and c.hidden // c.heads % 4 == 0,
         f"--hidden {c.hidden} over --heads {c.heads} must be a multiple of 4 (two axes of rotated pairs)")
    need(c.text_tokens % c.text_pad == 0,
         f"--text-tokens {c.text_tokens} must be a multiple of --text-pad {c.text_pad}, which sets the padded lengths")
    need(c.batch % c.accumulate == 0, f"--batch {c.batch} cannot be cut into --accumulate {c.accumulate} micro-batches")
    need(re.fullmatch(r"long|short|mix:(0(\.\d+)?|1(\.0+)?)", c.captions),
         f"--captions {c.captions} is unknown; use long, short or mix:0.3")
    need(re.fullmatch(r"[\w.-]+", c.name) and c.name.strip("."),
         f"--name {c.name!r} must be a plain folder name (letters, digits, . _ -)")
    need(c.data != "scenes" or c.resolution % c.patch == 0,
         f"--resolution {c.resolution} is not a multiple of --patch {c.patch}")


# =====================================================================================================================
# 3. Ranks, clock and log: torchrun's variables or one plain process; rank 0 speaks, the clock never stops.
# =====================================================================================================================

@dataclasses.dataclass
class World:
    """This process among its peers. `control` is a gloo group for decisions on the CPU (None for one rank)."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    control: object = None

    def barrier(self):
        if self.control is not None:
            dist.barrier(self.control)

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over the ranks: a time, a flag. No GPU is synchronised."""
        if self.control is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()


def setup_world() -> World:
    """NCCL with CUDA, gloo without."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(f"rank {local} of this machine has no GPU, there are {torch.cuda.device_count()}; lower "
                            "--nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32: Muon's and the loss's
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return World(device=device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **(dict(device_id=device) if cuda else {}))
    return World(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))


def process_age() -> float:
    """Seconds since this process began (from Linux's /proc; elsewhere 0, which misses the imports)."""
    try:
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


class Clock:
    """Wall-clock seconds of the run: since process start, plus what earlier processes of the same run took."""

    def __init__(self, before: float = 0.0):
        self.start = time.perf_counter() - process_age() - before

    def __call__(self) -> float:
        return time.perf_counter() - self.start


class Log:
    """log.txt for people, metrics.jsonl for machines, a progress line for the terminal. Only rank 0 speaks."""

    def __init__(self, folder: Path, world: World):
        self.on = world.rank == 0
        if self.on:
            folder.mkdir(parents=True, exist_ok=True)
            self.text, self.metrics = open(folder / "log.txt", "a"), open(folder / "metrics.jsonl", "a")
            self.metrics.write("\n" * (self.metrics.tell() > 0))  # a line that a crash cut short stays alone
        self.live = self.on and sys.stderr.isatty()

    def __call__(self, line: str, show: bool = True):
        if self.on:
            self.text.write(line + "\n")
            self.text.flush()
            if show:
                print("\r\033[K" * self.live + line, flush=True)

    def write(self, **record):
        """One line of metrics.jsonl. JSON knows no NaN: what is not finite becomes null."""
        finite = lambda x: x if not isinstance(x, float) or math.isfinite(x) else None
        if self.on:
            record = {k: [finite(x) for x in v] if isinstance(v, list) else finite(v) for k, v in record.items()}
            self.metrics.write(json.dumps(record | {"time": time.time()}) + "\n")
            self.metrics.flush()

    def progress(self, line: str, new_line: bool):
        """A live line on a terminal; elsewhere a printed line now and then."""
        self(line, show=new_line and not self.live)
        if self.live:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def read_metrics(run: Path) -> list[dict]:
    """The records of metrics.jsonl; a line that a crash cut short is passed over."""
    records = []
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            pass
    return [r for r in records if isinstance(r, dict) and "elapsed" in r]


class Heartbeat:
    """Collects scalars on the device; every few seconds reads them at once and writes them down."""

    EVERY = 5.0  # seconds

    def __init__(self, log: Log, world: World, now: float):
        self.log, self.world, self.last, self.pending, self.shown = log, world, now, [], 0

    def add(self, loss, by_time, norm, progress: float):
        self.pending.append((loss, by_time, norm, progress))

    def beat(self, now: float, images: int, flops: float, **record):
        """images: per step, of all ranks. flops: of a training step per image. record: what else metrics.jsonl gets."""
        if not self.pending:
            return
        *scalars, progresses = zip(*self.pending)
        losses, by_time, norms = map(torch.stack, scalars)
        if self.world.size > 1:
            dist.all_reduce(losses)
            dist.all_reduce(by_time)
        losses, by_time = (losses / self.world.size).tolist(), by_time.sum(0)
        progress, rate = progresses[-1], images * len(losses) / max(now - self.last, 1e-9)
        self.log.write(progress=progress, elapsed=now, loss=float(np.mean(losses)), losses=losses,
                       progresses=list(progresses), grad_norm=norms.mean().item(),
                       loss_by_time=(by_time[0] / by_time[1].clamp(min=1)).tolist(),
                       images_per_s=rate, **record)
        mfu = f"MFU {flops * rate / self.world.size / PEAK_FLOPS:.1%}  " if self.world.device.type == "cuda" else ""
        left = now * (1 / progress - 1) if progress else 0.0
        self.log.progress(f"step {record['step']:6d}  {progress:6.1%}  loss {np.mean(losses):.4f}  {rate:,.0f} images/s"
                          f"  {mfu}{now:.0f} s, {left:.0f} s left", int(progress * 20) > self.shown)
        self.last, self.pending, self.shown = now, [], int(progress * 20)


def describe_machine(world: World) -> dict:
    """What a figure needs beside it to mean anything."""
    import importlib.metadata as metadata

    cpus = re.findall(r"model name\s*: (.+)", cpu_info()) or [platform.processor()]
    versions = {p: metadata.version(p) for p in ("torch", "numpy", "safetensors", "transformers")}
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return dict(python=platform.python_version(), **versions, cpu=cpus[0], cpus=os.cpu_count(),
                threads=torch.get_num_threads(), gpu=gpu, ranks=world.size,
                source_sha256=hashlib.sha256(SOURCE.encode()).hexdigest())


def cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def has_fast_bf16(device: torch.device) -> bool:
    """CUDA, or a CPU with BF16 instructions; without them BF16 matmuls are slow (61 against 330 GFLOP/s)."""
    return device.type == "cuda" or bool(re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", cpu_info()))


# =====================================================================================================================
# 4. The model: PRX. Names, shapes and numerics of the state dict are diffusers' PRXTransformer2DModel.
# =====================================================================================================================

class Linear(nn.Linear):
    """Computes in the weight's dtype; the bias (1-D, so FP32) is cast."""

    def forward(self, x):
        dtype = self.weight.dtype
        return F.linear(x.to(dtype), self.weight, None if self.bias is None else self.bias.to(dtype))


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):  # (..., dim) -> FP32
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, eps=1e-6)


def modulate(x, shift, scale):
    """LayerNorm without affine, then the time's shift and scale, in FP32. x (B, N, D), shift and scale (B, 1, D)."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift).to(x.dtype)


def rope_table(rows: int, columns: int, axes_dim, theta: float, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin, each (N, head_dim / 2) in FP32: half of the pairs rotate with the row, half with the column."""
    ids = torch.cartesian_prod(torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64))
    angle = torch.cat([ids[:, i, None] * theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
                       for i, d in enumerate(axes_dim)], 1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x, rope):
    """Rotate neighbouring pairs of channels in FP32 (RoPE, arXiv 2104.09864). x (B, H, N, d) FP32."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Attention(nn.Module):
    """Image queries attend to text and image. Text has keys and values only, and no position."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.img_qkv_proj = Linear(dim, 3 * dim, bias=False)
        self.norm_q = RMSNorm(dim // heads)
        self.norm_k = RMSNorm(dim // heads)
        self.txt_kv_proj = Linear(dim, 2 * dim, bias=False)
        self.norm_added_k = RMSNorm(dim // heads)
        self.to_out = nn.ModuleList([Linear(dim, dim, bias=False)])

    def forward(self, x, text, rope, mask):
        split = lambda y, n: y.unflatten(-1, (n, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = split(self.img_qkv_proj(x), 3)              # (B, H, N, d) each
        text_k, text_v = split(self.txt_kv_proj(text), 2)     # (B, H, T, d) each
        q, k = rotate(self.norm_q(q), rope).to(v.dtype), rotate(self.norm_k(k), rope).to(v.dtype)
        k = torch.cat([self.norm_added_k(text_k).to(v.dtype), k], 2)
        v = torch.cat([text_v, v], 2)                         # (B, H, T + N, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class Modulation(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.lin = Linear(dim, 6 * dim)

    def forward(self, vec):  # (B, D) -> six of (B, 1, D) in FP32
        return self.lin(F.silu(vec)).float()[:, None].chunk(6, -1)


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.attention = Attention(dim, heads)
        self.gate_proj = Linear(dim, int(dim * mlp_ratio), bias=False)
        self.up_proj = Linear(dim, int(dim * mlp_ratio), bias=False)
        self.down_proj = Linear(int(dim * mlp_ratio), dim, bias=False)
        self.modulation = Modulation(dim)

    def forward(self, x, text, vec, rope, mask):
        """x (B, N, D) image tokens, text (B, T, D), vec (B, D) time, mask (B, 1, 1, T + N) additive -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vec)
        x = x + (gate1 * self.attention(modulate(x, shift1, scale1), text, rope, mask)).to(x.dtype)
        h = modulate(x, shift2, scale2)
        h = self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h))
        return x + (gate2 * h).to(x.dtype)


class TimeEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.in_layer = Linear(256, dim)
        self.out_layer = Linear(dim, dim)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.linear = Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec).float()[:, None].chunk(2, -1)
        return self.linear(modulate(x, shift, scale)).float()


class PRX(nn.Module):
    """The denoiser: image or latent x_t, time and text in; x_0 or velocity out. Arguments as diffusers' config.json.

    forward: x (B, C, H, W), t (B,) in (0, 1], text (B, T, context_in_dim), mask (B, T) bool or None -> (B, C, H, W).
    A fresh PRX outputs zero: every gate and the final layer start at zero.
    """

    def __init__(self, in_channels=16, patch_size=2, context_in_dim=2304, hidden_size=1792, mlp_ratio=3.5, num_heads=28,
                 depth=16, axes_dim=None, theta=10000, time_factor=1000.0, time_max_period=10000, bottleneck_size=None):
        super().__init__()
        axes_dim = list(axes_dim or (hidden_size // num_heads // 2,) * 2)
        self.config = dict(in_channels=in_channels, patch_size=patch_size, context_in_dim=context_in_dim,
                           hidden_size=hidden_size, mlp_ratio=mlp_ratio, num_heads=num_heads, depth=depth,
                           axes_dim=axes_dim, theta=theta, time_factor=time_factor, time_max_period=time_max_period,
                           bottleneck_size=bottleneck_size)
        patch_dim = in_channels * patch_size ** 2
        self.img_in = (nn.Sequential(Linear(patch_dim, bottleneck_size), Linear(bottleneck_size, hidden_size))
                       if bottleneck_size else Linear(patch_dim, hidden_size))
        self.time_in = TimeEmbedder(hidden_size)
        self.txt_in = Linear(context_in_dim, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_dim)
        self.ropes = {}  # (rows, columns, device) -> table

    @torch.no_grad()
    def initialize(self, seed: int = 0):
        """Matrices uniform in +-1/sqrt(fan_in) (torch's default), biases, gates and the final layer zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2 and not re.search(r"modulation\.|adaLN|final_layer", name):
                p.copy_(torch.empty(p.shape).uniform_(-1, 1, generator=generator) * p.shape[1] ** -0.5)
            elif p.ndim == 2 or name.endswith("bias"):
                p.zero_()
            else:
                assert re.search(r"norm_(q|k|added_k)\.weight$", name), f"no rule initialises {name} {tuple(p.shape)}"
                p.fill_(1.0)
        return self

    def set_compute_dtype(self, dtype: torch.dtype):
        """Matrices in `dtype`, 1-D parameters in FP32 (the optimizer keeps FP32 masters of all)."""
        for p in self.parameters():
            p.data = p.data.to(dtype if p.ndim == 2 else torch.float32)
        return self

    def time_embedding(self, t):  # (B,) -> (B, 256): cosines, then sines, of t * time_factor * period^(-i/128)
        freqs = torch.exp(-math.log(self.config["time_max_period"]) * torch.arange(128, device=t.device) / 128)
        angle = self.config["time_factor"] * (t.float()[:, None] * freqs)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def forward(self, x, t, text, mask=None):
        B, C, H, W = x.shape
        p, c = self.config["patch_size"], self.config
        rows, columns = H // p, W // p
        key = (rows, columns, x.device)
        if key not in self.ropes:
            self.ropes[key] = rope_table(rows, columns, c["axes_dim"], c["theta"], x.device)
        h = x.view(B, C, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(B, rows * columns, C * p * p)
        h, text, vec = self.img_in(h), self.txt_in(text), self.time_in(self.time_embedding(t))
        if mask is not None:  # additive and broadcast, once for all blocks
            mask = torch.zeros(B, mask.shape[1] + h.shape[1], dtype=h.dtype, device=x.device).masked_fill_(
                F.pad(~mask.bool(), (0, h.shape[1])), -torch.inf)[:, None, None]
        for block in self.blocks:
            h = block(h, text, vec, self.ropes[key], mask)
        h = self.final_layer(h, vec)
        return h.view(B, rows, columns, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def flops_per_image(config: dict, tokens: int, text_tokens: int) -> float:
    """Matmul FLOPs of one forward pass of one image, less the time embedding's. A training step is three times that."""
    d, patch = config["hidden_size"], config["in_channels"] * config["patch_size"] ** 2
    linear = tokens * (4 + 3 * config["mlp_ratio"]) + text_tokens * 2 + 6      # in units of d * d
    attention = 2 * tokens * (tokens + text_tokens)                            # in units of d
    ends = tokens * 2 * patch + text_tokens * config["context_in_dim"]         # in units of d
    return 2 * (config["depth"] * (linear * d * d + attention * d) + ends * d)


# =====================================================================================================================
# 5. Objectives: flow matching (arXiv 2210.02747, 2209.03003) with v- or x-prediction.
# =====================================================================================================================

def generator_for(device, *key: int) -> torch.Generator:
    """A generator that depends on the key (seed, step, purpose) alone: the same on every rank and after a resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def draw_times(n: int, shift: float, uniform: float, generator) -> torch.Tensor:
    """(n,) times in [1e-3, 1), 1 is noise: logit-normal (SD3, arXiv 2403.03206), a share uniform, shifted. On CPU."""
    t = torch.full((n,), 2.0)
    while (outside := (t < 1e-3) | (t >= 1)).any():
        draw = torch.where(torch.rand(n, generator=generator) < uniform, torch.rand(n, generator=generator),
                           torch.randn(n, generator=generator).sigmoid())
        t = torch.where(outside, shift_time(draw, shift), t)
    return t


def shift_time(t, shift: float):
    """More time at high noise for s > 1: s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def velocity(output, x_t, t, predict: str):
    """What the network said, as a velocity d x_t / dt = eps - x_0. For x-prediction t is clamped at 0.05."""
    return output if predict == "v" else (x_t - output) / t.clamp(min=0.05)[:, None, None, None]


def flow_matching_loss(model, x_0, eps, t, text, mask, predict: str):
    """Mean squared error in v-space, per sample: (B,) FP32. x_t = (1 - t) x_0 + t eps. The clamp is on both sides."""
    time_ = t[:, None, None, None]
    x_t = (1 - time_) * x_0 + time_ * eps
    target = eps - x_0 if predict == "v" else (x_t - x_0) / time_.clamp(min=0.05)
    return (velocity(model(x_t, t, text, mask), x_t, t, predict) - target).square().mean((1, 2, 3))


# =====================================================================================================================
# 6. Frozen networks: VAE and text encoder, from Hugging Face repositories or folders. The tiny encoder is embedded.
# =====================================================================================================================

VAES = {"repa-e": "REPA-E/e2e-flux-vae", "flux": "black-forest-labs/FLUX.1-schnell",
        "flux2": "black-forest-labs/FLUX.2-dev", "dc-ae": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"}
TEXTS = {"t5gemma": "google/t5gemma-2b-2b-ul2", "tiny": str(ROOT / "data/networks/text")}


def quiet_import(name: str):
    """transformers or diffusers (seconds each, so only where they are used), without their progress bars."""
    module = importlib.import_module(name)
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def unavailable(knob: str, name: str, error: Exception, instead: str) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"--{knob} {name} cannot be loaded ({reason}); if the repository is gated, accept its licence on "
                     f"its page and log in with `hf auth login`; or give a local folder, or {instead}")


class VAE:
    """A frozen autoencoder of diffusers: AutoencoderKL (FLUX.1, REPA-E), AutoencoderDC, AutoencoderKLFlux2.

    encode: uint8 (B, 3, H, W) -> latents FP32 (B, channels, H / factor, W / factor), normalised as diffusers' pipelines
    undo it: (z - shift) * scale, or for FLUX.2 packed 2 x 2 and whitened by its batch norm. The posterior's mode, not a
    sample: deterministic, and FLUX's posterior is narrow. decode: latents -> FP32 (B, 3, H, W) in [-1, 1].
    FP32 where the VAE asks for it (force_upcast) and on CPUs, else BF16. `about` goes into the index of prepared data.
    """

    def __init__(self, name: str, device="cpu"):
        diffusers = quiet_import("diffusers")
        folder = VAES.get(name, name)
        try:
            for sub in ("vae", None):  # part of a pipeline, or the repository itself
                try:
                    config = diffusers.AutoencoderKL.load_config(folder, subfolder=sub)
                    break
                except OSError:
                    if sub is None:
                        raise
            cls = getattr(diffusers, config["_class_name"])
            self.model = cls.from_pretrained(folder, subfolder=sub, use_safetensors=True)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise unavailable("vae", name, error, "use --vae none (pixel space)") from None
        c = self.model.config
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + tensor.float().contiguous().numpy().tobytes())
        wide = torch.device(device).type == "cpu" or c.get("force_upcast", False)
        self.dtype, self.device = torch.float32 if wide else torch.bfloat16, device
        self.model.to(device, self.dtype).eval().requires_grad_(False)
        self.packed = cls.__name__ == "AutoencoderKLFlux2"
        self.scale = 1.0 if self.packed else float(c.get("scaling_factor") or 1.0)
        self.shift = 0.0 if self.packed else float(c.get("shift_factor") or 0.0)
        if self.packed:  # the mean and deviation of each packed channel
            self.mean = self.model.bn.running_mean.float().view(1, -1, 1, 1)
            self.std = (self.model.bn.running_var.float() + c.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        probe = self.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        self.channels, self.factor = probe.shape[1], 64 // probe.shape[2]
        self.about = dict(vae=name if name in VAES else Path(name).name, type=cls.__name__, channels=self.channels,
                          factor=self.factor, scale=self.scale, shift=self.shift, sha256=digest.hexdigest())

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        x = self.model.encode((images.to(self.device).float() / 127.5 - 1).to(self.dtype))
        z = (x.latent if hasattr(x, "latent") else x.latent_dist.mode()).float()
        if self.packed:
            return (F.pixel_unshuffle(z, 2) - self.mean) / self.std
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        z = (F.pixel_shuffle(latents * self.std + self.mean, 2) if self.packed else latents / self.scale + self.shift)
        return torch.cat([self.model.decode(row.to(self.dtype)).sample.float() for row in z.split(8)])


class TextEncoder:
    """encode(prompts) -> last hidden states (B, T, width) FP32 and mask (B, T) bool, T a multiple of `pad`.

    Any Hugging Face encoder, or the encoder of a T5 or T5Gemma. Prompts are taken as they are; data/prepare.py has
    cleaned captions as diffusers' PRXPipeline cleans its prompts. Raises UserError when the weights cannot be had.
    """

    def __init__(self, name: str, device="cpu", max_tokens: int = 256, pad: int = 8):
        transformers = quiet_import("transformers")
        folder = TEXTS.get(name, name)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        encoders = {"t5gemma": transformers.T5GemmaEncoderModel, "t5": transformers.T5EncoderModel}
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            config.is_encoder_decoder = False
            cls = encoders.get(config.model_type, transformers.AutoModel)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            self.model = cls.from_pretrained(folder, config=config, use_safetensors=True, dtype=dtype)
        except (OSError, ValueError) as error:
            raise unavailable("text", name, error, "use --text tiny (the words of the scenes)") from None
        self.model.to(device).eval().requires_grad_(False)
        self.device, self.max_tokens, self.pad = device, max_tokens, pad
        self.width = self.encode([""])[0].shape[-1]
        self.about = dict(text=name if name in TEXTS else Path(name).name, width=self.width, max_tokens=max_tokens)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenizer(prompts, padding=True, pad_to_multiple_of=self.pad, truncation=True,
                                max_length=self.max_tokens, return_tensors="pt").to(self.device)
        states = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        return states.float(), tokens["attention_mask"].bool()


# =====================================================================================================================
# 7. Optimizer: Muon for the blocks' matrices, AdamW for the rest, one class for 1 to N ranks.
# =====================================================================================================================

def orthogonalize(G: torch.Tensor, steps: int = 5, coefficients=(3.4445, -4.7750, 2.0315)) -> torch.Tensor:
    """Newton-Schulz: push all singular values of each matrix towards 1. G (K, rows, columns), in G's dtype.

    From Keller Jordan's Muon; the quintic's coefficients are his. Same-shaped matrices go in one batched product.
    """
    a, b, c = coefficients
    X = G.mT if G.shape[1] > G.shape[2] else G
    X = X / X.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        A = X @ X.mT                                  # (K, n, n), n the smaller side
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)   # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)            # a X + (b A + c A^2) X
    return X.mT if G.shape[1] > G.shape[2] else X


all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class MuonAdamW:
    """Muon (as torch.optim.Muon with match_rms_adamw) and AdamW (as torch.optim.AdamW) over flat FP32 vectors.

    Every parameter is owned by one rank. A rank's parameters lie one after the other in a flat vector: first its Muon
    matrices, shape by shape, so that a stack of them is a view, then the rest. The gradients of all parameters are
    summed in FP32 in `grads` (world, size), one row per owner; a reduce-scatter hands each owner its row, and after the
    update an all-gather hands the weights back. `master`, `ema` and the state exist for owned parameters only.

    Build it on the FP32 model, then set the model's compute dtype.
    """

    def __init__(self, named_parameters, config: Config, world: World = World()):
        self.params, self.config, self.world = dict(named_parameters), config, world
        self.is_muon = {n: config.optimizer == "muon" and n.startswith("blocks.") and p.ndim == 2
                        for n, p in self.params.items()}
        # Owners: the costliest parameter first, to the rank with the least work. Newton-Schulz: rows * columns * min.
        cost = {n: p.numel() * (min(p.shape) if self.is_muon[n] else 1) for n, p in self.params.items()}
        load, owned = [0] * world.size, [[] for _ in range(world.size)]
        for name in sorted(self.params, key=lambda n: (-cost[n], n)):
            rank = load.index(min(load))
            load[rank] += cost[name]
            owned[rank].append(name)
        shape = {n: tuple(p.shape) for n, p in self.params.items()}
        order = lambda n: (not self.is_muon[n], shape[n] if self.is_muon[n] else (), n)
        self.layout = [sorted(names, key=order) for names in owned]
        twice = [n for n in self.params if sum(names.count(n) for names in self.layout) != 1]
        assert not twice, f"every parameter must be owned by exactly one rank, unlike {twice}"
        self.size = max(sum(self.params[n].numel() for n in names) for names in self.layout)
        device = next(iter(self.params.values())).device
        zeros = lambda *s: torch.zeros(*s, dtype=torch.float32, device=device)
        # Stacks of owned matrices: first element, one past the last, shape (K, rows, columns)
        self.stacks, end = [], 0
        mine = [shape[n] for n in self.layout[world.rank] if self.is_muon[n]]
        for rows, columns in dict.fromkeys(mine):
            k = mine.count((rows, columns))
            self.stacks.append((end, end + k * rows * columns, (k, rows, columns)))
            end += k * rows * columns
        self.split = end  # Muon's part of the flat vector ends here, AdamW's begins
        self.grads, self.master = zeros(world.size, self.size), zeros(self.size)
        self.momentum, self.exp_avg, self.exp_avg_sq = zeros(end), zeros(self.size - end), zeros(self.size - end)
        for name, view in self.views(self.master).items():
            view.copy_(self.params[name].detach())
        self.ema = self.master.clone() if config.ema else self.master
        self.grad_views = {n: v for rank, row in enumerate(self.grads) for n, v in self.views(row, rank).items()}
        self.steps, self.ema_steps, self.filled = 0, 0, False
        self.skipped, self.skipped_in_a_row = zeros(()), zeros(())  # steps with a non-finite gradient
        self.publish()

    def views(self, flat: torch.Tensor, rank: int | None = None, offset: int = 0) -> dict[str, torch.Tensor]:
        """Parameter-shaped views of a flat vector that begins `offset` elements into a rank's layout (its own's)."""
        out, start = {}, -offset
        for name in self.layout[self.world.rank if rank is None else rank]:
            end = start + self.params[name].numel()
            if start >= 0 and end <= len(flat):
                out[name] = flat[start:end].view(self.params[name].shape)
            start = end
        return out

    def all_ranks(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The flat vectors of all ranks as views by parameter name. Every rank must call."""
        if self.world.size == 1:
            return self.views(flat)
        rows = torch.empty(self.world.size, self.size, dtype=flat.dtype, device=flat.device)
        all_gather(rows.view(-1), flat)
        return {n: v for rank, row in enumerate(rows) for n, v in self.views(row, rank).items()}

    @torch.no_grad()
    def publish(self, flat: torch.Tensor | None = None):
        """Give the model the masters, or another flat vector such as `ema`, in the model's dtypes, on all ranks."""
        for name, view in self.all_ranks(self.master if flat is None else flat).items():
            p = self.params[name]
            if p.dtype == torch.float32 and self.world.size == 1:
                p.data = view  # no copy: the model's weight is the master
            else:
                p.data.copy_(view)

    @torch.no_grad()
    def accumulate(self):
        """Take over the gradients of one micro-batch: FP32 sums, whatever dtype they came in."""
        missing = [n for n, p in self.params.items() if p.grad is None]
        assert not missing, f"no gradient reached {missing[:5]}: every parameter must take part in the loss"
        views, grads = [self.grad_views[n] for n in self.params], [p.grad for p in self.params.values()]
        (torch._foreach_add_ if self.filled else torch._foreach_copy_)(views, grads)
        self.filled = True
        for p in self.params.values():
            p.grad = None

    @torch.no_grad()
    def step(self, lr_share: float = 1.0) -> torch.Tensor:
        """One update with both rates times lr_share. Returns the gradient's norm before clipping, on the device.

        A non-finite gradient leaves the weights as they are and counts in `skipped`, with no synchronisation.
        """
        c, self.filled = self.config, False
        self.steps += 1
        grad = self.grads[0]
        if self.world.size > 1:
            grad = torch.empty_like(self.master)
            reduce_scatter(grad, self.grads.view(-1))
            grad /= self.world.size
        square = grad.square().sum()
        if self.world.size > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        good = norm.isfinite()
        self.skipped += ~good
        self.skipped_in_a_row = torch.where(good & (self.skipped_in_a_row < 10), 0.0, self.skipped_in_a_row + 1)
        scale = (c.clip / (norm + 1e-6)).clamp(max=1.0) if c.clip else 1.0
        grad = torch.where(good, grad * scale, 0.0)
        rate = good * lr_share  # zero where the step is skipped

        for start, end, shape in self.stacks:  # Muon, Nesterov
            w, g, m = (flat[start:end].view(shape) for flat in (self.master, grad, self.momentum))
            m.lerp_(g, 1 - c.momentum)
            dtype = self.params[self.layout[self.world.rank][0]].dtype
            update = orthogonalize(g.lerp(m, c.momentum).to(dtype), c.ns_steps).float()
            w.mul_(1 - rate * (c.lr * c.weight_decay))
            w.sub_(update * (rate * (c.lr * 0.2 * max(shape[1:]) ** 0.5)))  # AdamW's rate fits: arXiv 2502.16982

        w, g, m, v = self.master[self.split:], grad[self.split:], self.exp_avg, self.exp_avg_sq  # AdamW
        lr = c.lr if c.optimizer == "adamw" else c.lr_adamw
        m.lerp_(g, 1 - c.beta1)
        v.mul_(c.beta2).addcmul_(g, g, value=1 - c.beta2)
        denominator = (v.sqrt() / math.sqrt(1 - c.beta2 ** self.steps)).add_(c.eps)
        w.mul_(1 - rate * (lr * c.weight_decay))
        w.sub_((m / denominator).mul_(rate * (lr / (1 - c.beta1 ** self.steps))))

        self.publish()
        if self.steps % c.ema_every == 0:
            self.update_ema()
        return norm

    def update_ema(self):
        """Bring the moving average up to this step. At first its memory is short: (1 + s) / (10 + s)."""
        if self.config.ema:
            decay = min(self.config.ema, (1 + self.steps) / (10 + self.steps)) ** (self.steps - self.ema_steps)
            self.ema.lerp_(self.master, 1 - decay)
        self.ema_steps = self.steps

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Views of everything this rank owns, in FP32, by kind and parameter: `master/NAME`, `momentum/NAME`, ..."""
        flats = {"master": (self.master, 0), "momentum": (self.momentum, 0), "exp_avg": (self.exp_avg, self.split),
                 "exp_avg_sq": (self.exp_avg_sq, self.split)} | ({"ema": (self.ema, 0)} if self.config.ema else {})
        return {f"{kind}/{name}": view for kind, (flat, offset) in flats.items()
                for name, view in self.views(flat, offset=offset).items()}

    def load_state_dict(self, read, steps: int):
        """`read(key)` returns a tensor of state_dict(), from whichever rank's file holds it."""
        for key, view in self.state_dict().items():
            view.copy_(read(key))
        self.steps, self.ema_steps = steps, steps - steps % self.config.ema_every
        self.publish()


# =====================================================================================================================
# 8. Data: endless scenes or shards, in an order that depends on the seed alone, read ahead by a thread.
# =====================================================================================================================
# A batch is (images uint8 (b, 3, H, W), captions [b]): this rank's rows of global batch number i, for i from `skip` on.

def choose_field(captions: str, seed: int, sample: int) -> str:
    """long, short, or mix:P: a function of the seed and the global sample number."""
    if not captions.startswith("mix:"):
        return captions
    return "short" if np.random.default_rng((seed, sample, 1)).random() < float(captions[4:]) else "long"


class SceneData:
    """data/scenes.py's endless training split: sample number i is scene i."""

    def __init__(self, config: Config):
        from data import scenes

        self.scenes, self.config = scenes, config
        self.difficulty = scenes.difficulty_of(config.track)
        self.about = f"scenes, {self.difficulty}, protocol {self.difficulty.protocol}"
        self.size = (config.resolution, config.resolution)

    def prompts(self, n: int) -> list[str]:
        """Held-out prompts for the grids."""
        return self.scenes.captions(self.scenes.draw_scenes(range(n), "eval", self.difficulty))

    def batches(self, c: Config, skip: int, rows: slice):
        for i in range(skip, sys.maxsize):
            numbers = range(i * c.batch, (i + 1) * c.batch)[rows]
            scenes = self.scenes.draw_scenes(numbers, "train", self.difficulty, c.seed)
            if c.captions.startswith("mix:"):
                texts = {f: self.scenes.captions(scenes, f) for f in ("long", "short")}
                texts = [texts[choose_field(c.captions, c.seed, n)][j] for j, n in enumerate(numbers)]
            else:
                texts = self.scenes.captions(scenes, c.captions)
            yield self.scenes.render(scenes, c.resolution), texts


class ShardData:
    """A folder that data/prepare.py wrote: index.json and memory-mapped safetensors shards."""

    FORMAT, WINDOW = 1, 8192

    def __init__(self, config: Config):
        self.folder = Path(config.data)
        index = self.folder / "index.json"
        if not index.exists():
            raise UserError(f"--data {config.data} holds no index.json; give 'scenes' or a folder that data/prepare.py "
                            "wrote")
        try:
            content = json.loads(index.read_text())
            if content["format"] != self.FORMAT:
                raise UserError(f"{index} has format {content['format']}, this script reads {self.FORMAT}; prepare the "
                                "data again")
            shards = [dict(file=str(s["file"]), count=int(s["count"]), height=int(s["height"]), width=int(s["width"]))
                      for s in content["shards"]]
            self.shards, self.fields = shards, [str(f) for f in content["captions"]]
            shards[0]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{index} is damaged ({type(error).__name__} {error}); prepare the data again") from None
        for s in shards:
            if s["height"] % config.patch or s["width"] % config.patch:
                raise UserError(f"the {s['height']} x {s['width']} images of {config.data} are not a multiple of "
                                f"--patch {config.patch}")
        self.first = np.cumsum([0] + [s["count"] for s in shards])  # the id of each shard's first sample
        self.files, self.config = {}, config
        for s in range(len(shards)):  # every header now, on every rank: better than in the middle of the run
            self.open(s)
        self.about = f"{self.first[-1]} images, {len(shards)} shards, captions {', '.join(self.fields)}"
        self.size = (shards[0]["height"], shards[0]["width"])  # of the sample grids

    def open(self, shard: int):
        if shard not in self.files:
            about = self.shards[shard]
            path = self.folder / about["file"]
            try:
                file = safe_open(path, "pt")
                offsets = {f: file.get_tensor(f"caption.{f}.offset").tolist() for f in self.fields}
                shape, expected = file.get_slice("image").get_shape(), [about[k] for k in ("count", "height", "width")]
                if shape != [expected[0], 3, *expected[1:]] or any(len(x) != shape[0] + 1 for x in offsets.values()):
                    raise OSError("it does not hold {} captioned images of {} x {}".format(*expected))
            except (OSError, SafetensorError) as error:
                raise UserError(f"shard {path} cannot be read ({error}); restore the file or prepare the data again"
                                ) from None
            self.files[shard] = file, offsets
        return self.files[shard]

    def read(self, sample: int, field: str):
        """One image uint8 (3, H, W) and its caption."""
        shard = int(np.searchsorted(self.first, sample, "right")) - 1
        (file, offsets), i = self.open(shard), sample - int(self.first[shard])
        if field not in offsets:
            raise UserError(f"--captions needs the field {field!r}; {self.folder} has {', '.join(offsets)}")
        start, end = offsets[field][i:i + 2]
        text = bytes(file.get_slice(f"caption.{field}")[start:end].tolist()).decode()
        return file.get_slice("image")[i:i + 1][0], text

    def prompts(self, n: int) -> list[str]:
        """The first captions: of training images, as nothing is held out of such a folder."""
        return [self.read(i % int(self.first[-1]), self.fields[0])[1] for i in range(n)]

    def order(self, c: Config):
        """Endless global batches of sample ids, one bucket each: shards shuffled, then samples in windows; each sample
        once per epoch, remainders of a bucket carried over."""
        shape = [(s["height"], s["width"]) for s in self.shards]
        shape_of = np.repeat(np.arange(len(shape)), np.diff(self.first)).tolist()  # sample -> shard
        pending, epoch = {}, 0
        while True:
            rng = np.random.default_rng((c.seed, epoch))
            ids = np.concatenate([np.arange(self.first[s], self.first[s + 1]) for s in rng.permutation(len(shape))])
            for start in range(0, len(ids), self.WINDOW):
                for i in rng.permutation(ids[start:start + self.WINDOW]):
                    bucket = pending.setdefault(shape[shape_of[i]], [])
                    bucket.append(int(i))
                    if len(bucket) == c.batch:
                        yield bucket.copy()
                        bucket.clear()
            epoch += 1

    def batches(self, c: Config, skip: int, rows: slice):
        for i, ids in enumerate(self.order(c)):
            if i >= skip:
                first = i * c.batch + (rows.start or 0)
                samples = [self.read(s, choose_field(c.captions, c.seed, first + j)) for j, s in enumerate(ids[rows])]
                yield torch.stack([image for image, _ in samples]), [text for _, text in samples]


class Prefetch:
    """Runs an iterator in a thread, `depth` items ahead. Its exceptions come out of next(); stall counts the wait.

    Depth 0 runs it in the caller: on two CPU cores its OpenMP team fights the model's, 312 against 385 images/s.
    """

    def __init__(self, iterator, depth: int):
        self.iterator, self.queue, self.stall, self.stopped = iterator, queue.Queue(depth), 0.0, False
        if depth:
            threading.Thread(target=self.fill, args=(iterator,), daemon=True).start()

    def fill(self, iterator):
        try:
            for item in iterator:
                while not self.stopped:
                    try:
                        self.queue.put(item, timeout=0.5)
                        break
                    except queue.Full:
                        pass
                if self.stopped:
                    return
        except Exception as error:  # handed to the reader, who raises it
            self.queue.put(error)

    def __next__(self):
        start = time.perf_counter()
        item = self.queue.get() if self.queue.maxsize else next(self.iterator)
        self.stall += time.perf_counter() - start
        if isinstance(item, Exception):
            raise item
        return item


# =====================================================================================================================
# 9. Sampling, grids, checkpoints, export.
# =====================================================================================================================

@torch.no_grad()
def sample(model, noise, text, mask, null_text, null_mask, *, steps: int, cfg_scale: float, shift: float, predict: str):
    """Euler from t = 1 to 0 on a linear grid, shifted; classifier-free guidance (arXiv 2207.12598) when cfg_scale != 1.

    noise (B, C, H, W) FP32; text (B, T, D), mask (B, T); null_text (1, T0, D), null_mask (1, T0). Returns (B, C, H, W).
    """
    B, x = len(noise), noise
    if cfg_scale != 1:
        T = max(text.shape[1], null_text.shape[1])
        longer = lambda a, m: (F.pad(a, (0, 0, 0, T - a.shape[1])), F.pad(m, (0, T - m.shape[1])))
        (text, mask), (null_text, null_mask) = longer(text, mask), longer(null_text, null_mask)
        text = torch.cat([text, null_text.expand(B, -1, -1)])
        mask = torch.cat([mask, null_mask.expand(B, -1)])
    grid = shift_time(torch.linspace(1, 0, steps + 1), shift).tolist()
    for t, t_next in zip(grid, grid[1:]):
        x_in = x if cfg_scale == 1 else torch.cat([x, x])
        time_ = torch.full((len(x_in),), t, device=x.device)
        v = velocity(model(x_in, time_, text, mask), x_in, time_, predict)
        if cfg_scale != 1:
            conditional, unconditional = v.chunk(2)
            v = unconditional + cfg_scale * (conditional - unconditional)
        x = x + (t_next - t) * v
    return x


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, (N, 3, H, W)."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images: torch.Tensor, prompts: list[str], path: Path, columns: int = 4):
    """Images uint8 (N, 3, H, W) as a PNG, the prompts printed underneath; small images are enlarged, pixels kept."""
    import textwrap

    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=11)
    zoom = max(1, 192 // images.shape[-1])
    side_x, side_y = images.shape[-1] * zoom, images.shape[-2] * zoom
    lines = [textwrap.wrap(p, max(10, side_x // 6))[:8] for p in prompts]
    text_height, gap = 13 * max(len(x) for x in lines) + 4, 8
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (side_x + gap) + gap, rows * (side_y + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images.cpu(), lines)):
        x, y = gap + i % columns * (side_x + gap), gap + i // columns * (side_y + text_height + gap)
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side_x, side_y), Image.NEAREST), (x, y))
        draw.text((x, y + side_y + 2), "\n".join(text), fill="black", font=font, spacing=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def write_atomically(path: Path, write):
    """`write(temporary path)`, flushed to disk, then renamed: a file with this name is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def export_transformer(config: dict, tensors: dict[str, torch.Tensor], folder: Path):
    """A folder that diffusers' PRXTransformer2DModel.from_pretrained loads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "diffusion_pytorch_model.safetensors",
                     lambda p: save_file({k: v.contiguous() for k, v in tensors.items()}, p, metadata={"format": "pt"}))
    text = json.dumps({"_class_name": "PRXTransformer2DModel"} | config, indent=2) + "\n"
    write_atomically(folder / "config.json", lambda p: p.write_text(text))


def load_transformer(folder: Path, device="cpu") -> PRX:
    """A PRX from such a folder, ours or diffusers', strictly, in FP32."""
    folder = Path(folder)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        if not (folder / name).exists():
            raise UserError(f"{folder} holds no {name}; give a transformer folder in diffusers format")
    config = json.loads((folder / "config.json").read_text())
    if config.pop("resolution_embeds", None):
        raise UserError(f"{folder} is a PRX with resolution embeddings, which this model does not have")
    model = PRX(**{k: v for k, v in config.items() if not k.startswith("_")})
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    return model.to(device)


def save_checkpoint(run: Path, optimizer: MuonAdamW, state: dict, world: World, keep: int = 2):
    """checkpoint/step-N/: one safetensors file per rank with what it owns, by parameter name, and state.json.

    Written to a temporary name, flushed, renamed when all ranks are done; the last `keep` stay. No pickle, and no RNG
    state: every draw is a function of (seed, step), and the data position is the number of batches drawn.
    """
    final = run / "checkpoint" / f"step-{state['step']:08d}"
    temporary = final.with_name(final.name + ".tmp")
    if final.exists() and find_checkpoint(run)[0] == final:  # this step is on disk already
        return
    if world.rank == 0:
        for left_over in (run / "checkpoint").glob("step-*.tmp"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)
    world.barrier()
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in optimizer.state_dict().items()}
    write_atomically(temporary / f"rank-{world.rank}.safetensors", lambda p: save_file(tensors, p))
    world.barrier()
    if world.rank == 0:
        state = state | {"ranks": world.size, "optimizer_steps": optimizer.steps}
        write_atomically(temporary / "state.json", lambda p: p.write_text(json.dumps(state, indent=2) + "\n"))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        for old in [p for p in sorted((run / "checkpoint").glob("step-????????")) if p <= final][:-keep]:
            shutil.rmtree(old)
    world.barrier()


def find_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and a sentence for each one passed over."""
    notes = []
    for folder in sorted((run / "checkpoint").glob("step-*"), reverse=True):
        try:
            if folder.name.endswith(".tmp"):
                raise ValueError("it was not finished")
            state = json.loads((folder / "state.json").read_text())
            for rank in range(state["ranks"]):
                safe_open(folder / f"rank-{rank}.safetensors", "pt").keys()
            return folder, notes
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            notes.append(f"checkpoint {folder.name} is passed over: {error}")
    return None, notes


def load_checkpoint(folder: Path, optimizer: MuonAdamW) -> dict:
    """Fill the optimizer and the model from a checkpoint of any number of ranks; returns its state.json."""
    state = json.loads((folder / "state.json").read_text())
    files = [safe_open(folder / f"rank-{rank}.safetensors", "pt") for rank in range(state["ranks"])]
    where = {key: file for file in files for key in file.keys()}

    def read(key):
        if key not in where:
            raise UserError(f"checkpoint {folder} has no {key}; it belongs to another model or optimizer")
        return where[key].get_tensor(key)

    optimizer.load_state_dict(read, state["optimizer_steps"])
    return state


def plot_curve(run: Path):
    """curve.png: the loss over the run, raw and smoothed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = {record["step"] - len(record["losses"]) + i: loss for record in read_metrics(run)
              for i, loss in enumerate(record.get("losses", [])) if loss is not None}
    steps = sorted(losses)
    values = np.array([losses[s] for s in steps])
    window = max(1, len(values) // 50)
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(steps, values, lw=0.4, alpha=0.4)
    if len(values) > window:
        axes.plot(steps[window - 1:], np.convolve(values, np.ones(window) / window, "valid"), lw=1.5)
    axes.set(xlabel="step", ylabel="loss (velocity MSE)", yscale="log", title=run.name)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(run / "curve.png", dpi=110)
    plt.close(figure)


# =====================================================================================================================
# 10. Training.
# =====================================================================================================================

def lr_share(progress: float, first: float, c: Config) -> float:
    """Linear warm-up from the first step's progress, constant, linear decay to zero at 1."""
    warm = 0.01 + (progress - first) / c.warmup if c.warmup else 1.0
    cool = (1 - progress) / (1 - c.decay_from) if c.decay_from < 1 else 1.0
    return max(0.0, min(1.0, warm, cool))


def stage_at(progress: float, stages: list[Stage]) -> int:
    ends = np.cumsum([s.share for s in stages]) / sum(s.share for s in stages)
    return min(int(np.searchsorted(ends, progress, "right")), len(stages) - 1)


def find_run(config: Config) -> tuple[Path, Path | None, list[str], float]:
    """The run's folder, the checkpoint to go on from, notes on those passed over, and the seconds on its clock."""
    run = Path("logs") / config.name
    if config.resume == "never":
        return run, None, [], 0.0
    source = run if config.resume == "auto" or find_checkpoint(run)[0] else Path(config.resume)
    checkpoint, notes = find_checkpoint(source)
    if checkpoint is None:
        if config.resume != "auto":
            raise UserError(f"--resume {config.resume} holds no complete checkpoint "
                            f"({'; '.join(notes) or 'there is no checkpoint/step-* in it'}); give a run's folder such "
                            "as logs/micro, or leave --resume away")
        return run, None, notes, 0.0
    try:
        then = dict(json.loads((source / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}/config.json cannot be read ({error}), so it is unknown what its checkpoints belong "
                        "to; choose another --name") from None
    free = {"resume", "stop_after", "name", "samples", "checkpoint_minutes", "compile"}
    differ = [f"{flag(k)} was {then.get(k)}, now {v}" for k, v in dataclasses.asdict(config).items()
              if k not in free and then.get(k) != v]
    if differ:
        raise UserError(f"{source} was started with other settings ({'; '.join(differ)}); repeat its flags, choose "
                        "another --name, or give --resume never to throw it away")
    return run, checkpoint, notes, ([0.0] + [record["elapsed"] for record in read_metrics(source)])[-1]


def draw_batch(images, captions, c: Config, step: int, rows: slice, device):
    """What a step needs, for this rank's rows: x_0, eps (b, 3, H, W), t (b,), captions with some dropped.

    All draws are made for the global batch and then cut, so that they are the same for any number of ranks.
    """
    host = generator_for("cpu", c.seed, step, 0)
    t = draw_times(c.batch, c.shift, c.uniform, host)[rows].to(device)
    dropped = (torch.rand(c.batch, generator=host) < c.caption_dropout)[rows].tolist()
    captions = ["" if drop else caption for drop, caption in zip(dropped, captions)]
    x_0 = images.to(device, non_blocking=True).float().div_(127.5).sub_(1)
    noise = generator_for(device, c.seed, step, 1)
    eps = torch.randn(c.batch, *x_0.shape[1:], generator=noise, device=device)[rows]
    return x_0, eps, t, captions


def cannot_compile(device) -> str:
    """Why torch.compile does not work here (on a CPU it needs a C++ compiler and Python's headers), or ''."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
        return ""
    except Exception as error:  # dynamo, inductor, a missing or a broken compiler: whatever it is, training can go on
        return (str(error).strip() or type(error).__name__).splitlines()[0]


def sample_fixed_prompts(model, optimizer, text_encoder, prompts, size, c: Config, path: Path, world: World):
    """The same prompts from the same noise at every call, with the EMA weights. All ranks call, rank 0 writes."""
    optimizer.publish(optimizer.ema)
    noise = torch.randn(len(prompts), 3, *size, generator=generator_for("cpu", c.seed, 0, 2)).to(world.device)
    with torch.compiler.set_stance("force_eager"):  # another batch size: not worth a compilation
        images = sample(model, noise, *text_encoder.encode(prompts), *text_encoder.encode([""]), steps=c.sample_steps,
                        cfg_scale=c.cfg_scale, shift=c.shift, predict=c.predict)
    optimizer.publish()
    if world.rank == 0:
        save_grid(to_uint8(images), prompts, path)


def train(config: Config, stages: list[Stage]) -> int:
    """Train to the end of the budget. Returns the exit code: 0, or 128 + signal after a checkpoint."""
    if config.track == "24h" and not torch.cuda.is_available():
        raise UserError("track 24h needs CUDA GPUs and there is none here; "
                        "`python train_prx.py --track micro` runs on a CPU")
    if not config.data:
        raise UserError(f"track {config.track} needs --data FOLDER with shards that data/prepare.py wrote")
    world = setup_world()
    device = world.device
    for batch in (stage.knobs.get("batch", config.batch) for stage in stages):
        if batch // config.accumulate % world.size:
            raise UserError(f"--batch {batch} over --accumulate {config.accumulate} is not a multiple of {world.size} "
                            "ranks")
    caught = []  # the first signal is noted, the second one ends the process
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: os._exit(128 + n) if caught else caught.append(n))

    run, checkpoint, notes, before = find_run(config)
    if config.resume != "never" and (run / "transformer/config.json").exists():
        if world.rank == 0:
            print(f"{run} holds a finished run; choose another --name, or give --resume never to throw it away")
        return 0
    data = SceneData(config) if config.data == "scenes" else ShardData(config)
    text_encoder = TextEncoder(config.text, device, config.text_tokens, config.text_pad)
    world.barrier()  # from here on the folder is written to
    if world.rank == 0 and config.resume == "never":
        shutil.rmtree(run, ignore_errors=True)
    if world.rank == 0 and not checkpoint:  # nothing to go on from: what a failed start has left does not count
        (run / "metrics.jsonl").unlink(missing_ok=True)
    clock, log = Clock(before), Log(run, world)
    log(f"command: {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}\n"
        f"config: {json.dumps(dataclasses.asdict(config))}\nstages: {stages}\n"
        f"machine: {json.dumps(describe_machine(world))}\n--- source\n{SOURCE}\n--- end of source", show=False)
    for note in notes:
        log(note)

    bf16 = config.compute == "bf16" or config.compute == "auto" and has_fast_bf16(device)
    model = PRX(in_channels=3, patch_size=config.patch, context_in_dim=text_encoder.width, hidden_size=config.hidden,
                mlp_ratio=config.mlp_ratio, num_heads=config.heads, depth=config.depth,
                bottleneck_size=config.bottleneck or None).initialize(config.seed).to(device)
    optimizer = MuonAdamW(model.named_parameters(), config, world)
    model.set_compute_dtype(torch.bfloat16 if bf16 else torch.float32)
    # On two cores compiling took 14 to 26 s and a micro step went from 207 to 151 ms (records/speed.md)
    long = config.steps >= 500 or config.hours >= 2 / 60
    compiled = config.compile == "on" or config.compile == "auto" and (device.type == "cuda" or long)
    if compiled and (reason := cannot_compile(device)):
        compiled = False
        log(f"torch.compile does not work here, so the blocks run uncompiled, which is slower ({reason})")
    for block in model.blocks if compiled else ():
        block.compile(dynamic=False)  # one graph for all blocks, one shape per resolution and text length

    state = dict(step=0, stage=0, batches=0, samples=0, first_progress=None)
    if checkpoint:
        state |= load_checkpoint(checkpoint, optimizer)
        log(f"resumed from {checkpoint} at step {state['step']}, {before:.0f} s on the clock")
        log.write(event="resume", step=state["step"], elapsed=clock())
    if world.rank == 0:
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        write_atomically(run / "config.json", lambda p: p.write_text(text))
    parameters = sum(p.numel() for p in model.parameters())
    budget = config.hours * 3600 - 1.0 - 2e-8 * parameters  # less the time to write the weights; a guess for 1.2 B
    length = f"{config.steps} steps" if config.steps else f"{config.hours * 60:.3g} minutes"
    log(f"{config.name}: PRX {parameters / 1e6:.1f} M parameters, {'BF16' if bf16 else 'FP32'} compute"
        f"{', compiled' if compiled else ''}, {world.size} rank(s) on {device.type}, {length}, data: {data.about}")

    prompts = data.prompts(16)
    grid = lambda name: sample_fixed_prompts(model, optimizer, text_encoder, prompts, data.size, c,
                                             run / "samples" / f"{name}.png", world)
    if compiled:  # now: the warm-up of a time-driven schedule must not pass while its first step compiles
        b = config.batch // config.accumulate // world.size
        images = torch.zeros(b, 3, *data.size, device=device)
        flow_matching_loss(model, images, images, torch.ones(b, device=device), *text_encoder.encode((prompts * b)[:b]),
                           config.predict).sum().backward()
        model.zero_grad(set_to_none=True)
    stage, loader, next_grid, c = None, None, 1, config
    [elapsed] = world.agree(clock())
    heart, last_checkpoint = Heartbeat(log, world, elapsed), elapsed

    def heartbeat():
        tokens = x_0.shape[2] * x_0.shape[3] // c.patch ** 2
        heart.beat(elapsed, c.batch, 3 * flops_per_image(model.config, tokens, text.shape[1]), step=state["step"],
                   samples=state["samples"], stage=stage, data_stall_s=loader.stall,
                   skipped_steps=optimizer.skipped.item())
        if optimizer.skipped_in_a_row.item() >= 10:
            save_checkpoint(run, optimizer, state, world)
            raise TrainingFailed(f"10 steps in a row had a non-finite gradient; step {state['step']} is kept in "
                                 f"{run}/checkpoint: lower --lr or --lr-adamw, or look at the data")

    while True:
        elapsed, number = world.agree(clock(), float(caught[0] if caught else 0))
        progress = state["step"] / config.steps if config.steps else elapsed / budget if elapsed < budget else 1.0
        if number or progress >= 1 or 0 < config.stop_after <= state["step"]:
            break
        if stage is None:  # the first step of this process
            state["first_progress"] = progress if state["first_progress"] is None else state["first_progress"]
            next_grid = max(1, math.ceil(progress * (config.samples + 1)))
        if (now := stage_at(progress, stages)) != stage:  # a new stage: its knobs, its data from the first batch on
            if now != state["stage"]:
                state |= dict(stage=now, batches=0)
            stage, c = now, dataclasses.replace(config, **stages[now].knobs)
            if loader:
                loader.stopped = True
            share = c.batch // world.size
            rows = slice(world.rank * share, (world.rank + 1) * share)
            loader = Prefetch(data.batches(c, state["batches"], rows), depth=3 if device.type == "cuda" else 0)

        x_0, eps, t, captions = draw_batch(*next(loader), c, state["step"], rows, device)
        loss, by_time = torch.zeros((), device=device), torch.zeros(2, 10, device=device)
        for i in range(0, share, share // c.accumulate):
            part = slice(i, i + share // c.accumulate)
            text, mask = text_encoder.encode(captions[part])
            losses = flow_matching_loss(model, x_0[part], eps[part], t[part], text, mask, c.predict)
            (losses.sum() / share).backward()
            optimizer.accumulate()
            loss += losses.detach().sum() / share
            by_time.index_add_(1, (t[part] * 10).long(), torch.stack([losses.detach(), torch.ones_like(losses)]))
        norm = optimizer.step(lr_share(progress, state["first_progress"], c))
        heart.add(loss, by_time, norm, progress)
        state |= dict(step=state["step"] + 1, batches=state["batches"] + 1, samples=state["samples"] + c.batch)

        if elapsed - heart.last >= heart.EVERY:
            heartbeat()
        if elapsed - last_checkpoint >= config.checkpoint_minutes * 60:
            save_checkpoint(run, optimizer, state, world)
            last_checkpoint = elapsed
        if progress * (config.samples + 1) >= next_grid <= config.samples:
            grid(f"step-{state['step']:08d}")
            next_grid += 1

    if heart.pending:
        heartbeat()
    if loader:
        loader.stopped = True
    if progress < 1:  # a signal or --stop-after
        save_checkpoint(run, optimizer, state, world)
        log.write(event="stopped", step=state["step"], elapsed=clock())
        log(f"stopped at step {state['step']} with a checkpoint in {run}; the same command"
            f"{'' if number else ', with a later --stop-after or none,'} goes on from there")
        return 128 + int(number) if number else 0
    if state["step"] == 0:
        raise TrainingFailed(f"no step fits into --hours {config.hours:.4g}: start-up took {elapsed:.0f} s; give more")
    optimizer.update_ema()
    tensors = {k: v.cpu() for k, v in optimizer.all_ranks(optimizer.ema).items()}
    if world.rank == 0:
        export_transformer(model.config, {name: tensors[name] for name in optimizer.params}, run / "transformer")
    seconds = clock()  # the clock stops here
    log(f"finished: {state['step']} steps, {state['samples']:,} images, {seconds:.1f} s from process start to final "
        f"weights on disk, data stall {loader.stall if loader else 0:.1f} s")
    log.write(event="finished", step=state["step"], elapsed=seconds, samples=state["samples"])
    save_checkpoint(run, optimizer, state, world)
    grid("final")
    if world.rank == 0:
        plot_curve(run)
    log(f"wrote {run}/transformer, {run}/samples/final.png and {run}/curve.png"
        + f"; next: python eval_prx.py {run}" * (config.data == "scenes"))
    world.barrier()
    return 0


def main(argv=None) -> int:
    """Exit code 0, 1 after a failure, 2 for bad input, 128 + signal after a checkpoint on a signal."""
    try:
        return train(*parse_args(argv))
    except (UserError, TrainingFailed) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train_prx: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
