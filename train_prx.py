"""PRX speedrun: train a text-to-image diffusion transformer from scratch, in one readable script.

    python train_prx.py --track micro                  # two CPU cores, two minutes, no downloads: watch it learn
    python train_prx.py --track mini                   # one GPU, four minutes, 256 px scenes
    torchrun --standalone --nproc_per_node=8 train_prx.py --data SHARDS   # the 24 h track, PRX-1.2B on one 8-GPU node
    python train_prx.py --track micro --data SHARDS    # your own images, prepared with data/prepare.py

Everything a run produces is in logs/NAME: log.txt (this source included), metrics.jsonl, samples/, curve.png,
checkpoint/ and transformer/, which diffusers' PRXTransformer2DModel loads. `python eval_prx.py logs/NAME` measures it.

Best record so far: `micro`, 96.28 % prompt accuracy (mean of 3 seeds, worst 95.91 %) in 60 seconds on 2 cores of an
AMD EPYC with AVX512-BF16, torch 2.13.0, 2026-11-25, by the default recipe. Logs and rules: records/README.md.
Model: PRX, Photoroom 2026, as in diffusers' `PRXTransformer2DModel`.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
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
from torch.utils.checkpoint import checkpoint as recompute

ROOT = Path(__file__).resolve().parent
sys.modules.setdefault("train_prx", sys.modules[__name__])  # what data/ imports, also when this runs as a script
PEAK_FLOPS = 790e12  # about what dense BF16 matmuls reach on one H200; MFU is the model's own FLOPs over this


class UserError(Exception):
    """Bad input. The message is one sentence that names the value and says what to do; the exit code is 2."""


class TrainingFailed(Exception):
    """The run cannot go on; its last checkpoint stands. The exit code is 1."""


# =====================================================================================================================
# 2. Configuration: every knob, once, with its evidence. data/settings.py makes `--help` and the flags from this text.
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
    stages: str = "all"  # all | show (print the plan) | some of the track's, 256px,sft | px:share, 64:0.7,128:0.3
    mfu: float = 0.6  # what --stages show assumes of the GPUs: the goal for 128 images of 256 px, not a measurement
    init: str = ""  # start from the weights of a PRX in diffusers format: a folder or owner/name, published or ours
    dry_run: bool = False  # check weights, licences, data, disk and memory, list what is wrong, and stop
    resume: str = "auto"  # auto (newest complete checkpoint of this run) | never (start again) | a run's folder
    stop_after: int = 0  # write a checkpoint after this many steps in all and stop, to split a run over jobs; 0: never
    # data
    data: str = ""  # "scenes" (the embedded data set) or folders of data/prepare.py, weighted: A or A:0.7,B:0.3
    sft_data: str = ""  # the same, of curated pairs, for the last stage of 24h; empty: no such stage
    verify_data: bool = False  # compare the sha256 of every shard with the index before training
    loader_threads: int = 4  # that read one batch, on CUDA. On two cores 1: 861, 4: 1,319 images/s (bench_loader)
    resolution: int = 256  # pixels per side, or the side of the square with the area of an aspect-ratio bucket
    batch: int = 256  # images per step over all ranks; PRX part 2
    accumulate: int = 1  # micro-batches per step, summed in FP32: one GPU gets the batch of eight
    captions: str = "long"  # long | short | mix:P (share P is short). FID 18.20 long, 36.84 short, part 2
    # what the model sees: latents or pixels. --vae brings patch, bottleneck, predict and shift that fit it
    vae: str = "repa-e"  # repa-e | flux | flux2 | dc-ae | a folder | none (pixels). FID 12.08, 18.20 flux, part 2
    patch: int = 2  # pixels of the latent (or the image) per side of a token
    bottleneck: int = 0  # pixel space: patch -> bottleneck -> hidden; 0: one Linear
    predict: str = "v"  # x | v: what the network outputs; the loss is in v-space. CMMD in latents: v 0.41, x 0.54
    shift: float = 1.0  # time shift s: t <- s t / (1 + (s - 1) t). In PRX 1.0 for latents at 256 px, 3.0 for pixels
    # model: PRX-1.2B
    hidden: int = 1792  # width
    depth: int = 16  # blocks
    heads: int = 28  # attention heads; hidden / heads is the head dimension, a multiple of 4
    mlp_ratio: float = 3.5  # width of the gated MLP over hidden
    text: str = "t5gemma"  # frozen encoder: t5gemma | tiny (embedded) | a Hugging Face repository or folder
    text_tokens: int = 256  # longer prompts are cut
    text_pad: int = 64  # text is padded to a multiple of this per batch: few shapes to compile for, little padding
    # objective
    contrastive: float = 0.0  # weight of minus the error to other samples' targets, arXiv 2506.05350. FID 20.03, part 2
    uniform: float = 0.1  # share of times drawn uniformly instead of logit-normal
    caption_dropout: float = 0.1  # share of captions replaced by the empty prompt, for classifier-free guidance
    # alignment: the tokens of one block against a frozen vision transformer's, arXiv 2410.06940
    repa: float = 0.0  # weight, 0.5 in PRX; 0: off. FID 18.20 -> 14.64 with DINOv3, 16.6 with DINOv2, part 2
    repa_kind: str = "repa"  # repa | irepa (3x3 projector, spatial norm): helps DINOv2, hurts DINOv3, part 2
    repa_teacher: str = "dinov3"  # dinov3 | dinov2 | tiny (embedded) | a Hugging Face repository or folder
    repa_layer: int = 7  # the block, from 0, whose output is aligned
    repa_until: float = 51e6  # burn-in: samples (above 1) or share of the run after which alignment ends; part 2
    pdino: float = 0.0  # weight of P-DINO: the estimate of x_0 against x_0 in a teacher's eyes. Pixels; 0.01, part 3
    pdino_teacher: str = "facebook/dinov2-base"  # as repa_teacher
    # routing: some tokens skip some blocks in training; sampling takes all
    tread: float = 0.0  # share that skips, then is put back (arXiv 2501.04765). FID 21.61; at 1024 px 17.42 -> 14.10
    tread_blocks: str = "2-12"  # the blocks, from 0, both included
    tread_select: str = "random"  # random (the paper) | learned (a scorer picks the tokens; PRX.choose)
    sprint: float = 0.0  # share that skips, with dense and deep tokens fused (arXiv 2510.21986); tread_blocks apply
    # optimizer
    optimizer: str = "muon"  # muon (2-D weights of the blocks; the rest AdamW) | adamw. FID 18.20 -> 15.55, part 2
    lr: float = 1e-4  # of Muon's matrices, scaled so that AdamW's rate carries over; with adamw, of everything
    lr_adamw: float = 1e-4  # of what Muon leaves to AdamW
    warmup: float = 0.01  # linear warm-up over this share of the run; 1,000 of 100k steps in part 2
    decay_from: float = 0.7  # linear decay to zero from this share of the run; 1: constant, as part 2
    momentum: float = 0.95  # Muon's, Nesterov
    ns: str = "polar"  # classic | polar: Newton-Schulz by Keller Jordan or Polar Express (arXiv 2505.16932)
    ns_steps: int = 5  # its iterations. On micro polar needs 3 where classic needs 5: micro_search_polar.jsonl
    modulation: str = "muon"  # muon (as PRX) | adamw: who moves the modulations; 25 % fewer Newton-Schulz FLOPs
    split_qkv: bool = False  # orthogonalise Q, K and V apart (and the text's K and V), not as one matrix
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    eps: float = 1e-8  # AdamW; 1e-15 in part 2's baseline
    weight_decay: float = 0.0  # decoupled, of everything; part 2
    skip_spikes: float = 0.0  # skip steps whose gradient is this many times its running mean norm; 0: never
    clip: float = 1.0  # largest norm of the gradient over all parameters; 0.2 in part 2's baseline
    ema: float = 0.999  # decay per step of the weights' moving average, in FP32, of the masters; 0: off
    ema_every: int = 10  # steps between its updates
    # precision and speed
    weights: str = "fp32"  # fp32 | bf16: what masters are stored in. FID 18.20 -> 21.87 in BF16: an ablation, part 2
    wire: str = "fp32"  # fp32 | bf16: what gradients travel in between ranks. BF16 halves them and sums in BF16
    compute: str = "auto"  # auto | bf16 | fp32, of matmuls; masters stay FP32. FID 18.20, 21.87 otherwise, part 2
    deterministic: bool = False  # bit-identical runs on CUDA, too; slower there (not measured). CPUs always are
    compile: str = "auto"  # auto | on | off: torch.compile of the blocks; auto: where it pays back within the run
    fp8: bool = False  # matmuls of the blocks in FP8, a scale per tensor; CUDA from Hopper on. Speed is not measured
    recompute: bool = False  # compute a block's activations again backward: less memory, a third more FLOPs
    bench: bool = False  # time the step on random data instead of training (records/bench.py has more)
    profile: bool = False  # the ten most expensive kernels of a step, and a trace in logs/NAME, instead of training
    # output
    sample_steps: int = 25  # Euler steps of the sample grids
    guidance: str = "cfg"  # cfg | self (full against routed tokens, with TREAD: no unconditional pass)
    cfg_scale: float = 3.0  # its scale in the sample grids
    samples: int = 4  # sample grids over the run, on the clock; 0: only the one after the end, off the clock
    checkpoint_minutes: float = 30.0  # between checkpoints, written in the background; the last two are kept
    milestone_hours: float = 0.0  # a checkpoint every so many hours is kept for good; 0: none


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run: its share of the budget and the knobs that differ in it (data, resolution, batch, lr, ...).

    Weights, optimizer state and EMA go on from stage to stage.
    """

    name: str = "main"
    share: float = 1.0
    knobs: dict = dataclasses.field(default_factory=dict)


# What goes with a latent space, where --vae changes it. DC-AE's and FLUX.2's latents are one token per pixel.
LATENTS = dict(patch=2, bottleneck=0, predict="v", shift=1.0)
SPACES = {"none": dict(patch=32, bottleneck=256, predict="x", shift=3.0), "dc-ae": LATENTS | dict(patch=1),
          "flux2": LATENTS | dict(patch=1)}

TRACKS = {
    # Shares, batches and rates are guesses (rate times sqrt(batch / 256)): no such run has been made. Shift at 512 px:
    # it grows with the root of the tokens (arXiv 2403.03206). Captions: long, a mix at the end (PRX part 2).
    "24h": (Config(repa=0.5),
            [Stage("256px", 0.65, dict(batch=1024, lr=2e-4, lr_adamw=2e-4)),
             Stage("512px", 0.3, dict(resolution=512, batch=512, accumulate=2, shift=2.0, captions="mix:0.2", repa=0.0,
                                      tread=0.5)),
             Stage("sft", 0.05, dict(resolution=512, batch=256, shift=2.0, captions="mix:0.2", lr=5e-5, lr_adamw=5e-5,
                                     repa=0.0))]),
    # 256 tokens of 16 px. A guess from the micro track's search: not measured yet.
    "mini": (Config(track="mini", data="scenes", hours=4 / 60, vae="none", patch=16, bottleneck=128, predict="x",
                    shift=3.0, hidden=512, depth=8, heads=8, text="tiny", text_tokens=64, repa_teacher="tiny",
                    repa_layer=3, repa_until=1.0, pdino_teacher="tiny", tread_blocks="1-6", lr=2e-3, lr_adamw=2e-3,
                    warmup=0.03, decay_from=0.3, ema=0.99, checkpoint_minutes=5), [Stage()]),
    # Shift (2.0: 94.3 %, 1.0: 97.8 % prompt accuracy at 38,400 images) is from records/micro_search.jsonl; decay, EMA
    # and REPA's end from micro_search_repa.jsonl; batch, rates, momentum, modulation and REPA's weight from
    # micro_search_short.jsonl. No long caption of the micro scenes has more than 37 tokens.
    "micro": (Config(track="micro", data="scenes", hours=2 / 60, resolution=32, batch=32, vae="none", patch=8,
                     predict="x", hidden=128, depth=6, heads=4, text="tiny", text_tokens=80, text_pad=40,
                     repa=4.0, repa_teacher="tiny", repa_layer=2, repa_until=0.6, pdino_teacher="tiny",
                     tread_blocks="1-4", lr=7e-3, lr_adamw=2e-3, momentum=0.85, modulation="adamw", ns_steps=3,
                     warmup=0.04, decay_from=0.5, ema=0.0, samples=2, checkpoint_minutes=2), [Stage()]),
}

BASELINE = dict(optimizer="adamw", lr=1e-4, eps=1e-15, weight_decay=0.0, warmup=0.01, decay_from=1.0, clip=0.2, ema=0.0,
                repa=0.0, tread=0.0)
RECIPES = {"default": {}, "baseline": BASELINE, "tuned-baseline": BASELINE | dict(lr=2e-3)}  # on micro with --batch 64


def flag(knob: str) -> str:
    return "--" + knob.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def span(c: Config) -> tuple[int, int]:
    """The first and the last block that routing skips."""
    return tuple(map(int, c.tread_blocks.split("-")))


# =====================================================================================================================
# 3. Ranks, clock and log: torchrun's variables or one plain process; rank 0 speaks, the clock never stops.
# =====================================================================================================================

@dataclasses.dataclass
class World:
    """This process among its peers. `control` and `files` are gloo groups (None for one rank): for decisions on the
    CPU, and for the thread that writes checkpoints."""

    TIMEOUT = datetime.timedelta(minutes=10)

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    control: object = None
    files: object = None

    def barrier(self):
        if self.control is not None:
            dist.barrier(self.control)

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over the ranks: a time, a flag. No GPU is synchronised."""
        if self.control is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        try:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        except RuntimeError as error:
            try:  # says which ranks are missing
                dist.monitored_barrier(self.control, datetime.timedelta(seconds=5), wait_all_ranks=True)
            except RuntimeError as who:
                error = who
            raise TrainingFailed(f"rank {self.rank} has lost its peers ({str(error).splitlines()[0]}); nothing is "
                                 "written, the last checkpoint stands: the same command goes on from it") from None
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
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=World.TIMEOUT))
        # torchrun keeps its store over restarts: without a prefix of its own, a restart finds the dead ranks' addresses
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                                timeout=World.TIMEOUT, **(dict(device_id=device) if cuda else {}))
    except (RuntimeError, ValueError) as error:  # the port is taken, a host is not there, a variable is missing
        raise UserError(f"the {os.environ['WORLD_SIZE']} ranks cannot meet at {os.environ.get('MASTER_ADDR')}:"
                        f"{os.environ.get('MASTER_PORT')} ({str(error).splitlines()[0]}); start them with torchrun "
                        "--standalone, or give it another --master_port") from None
    groups = [dist.new_group(backend="gloo", timeout=World.TIMEOUT) for _ in range(2)]
    return World(dist.get_rank(), dist.get_world_size(), device, *groups)


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
            with contextlib.suppress(OSError):  # a full disk ends no run
                self.text.write(line + "\n")
                self.text.flush()
            if show:
                print("\r\033[K" * self.live + line, flush=True)

    def write(self, **record):
        """One line of metrics.jsonl. JSON knows no NaN: what is not finite becomes null."""
        finite = lambda x: x if not isinstance(x, float) or math.isfinite(x) else None
        if self.on:
            record = {k: [finite(x) for x in v] if isinstance(v, list) else finite(v) for k, v in record.items()}
            with contextlib.suppress(OSError):
                self.metrics.write(json.dumps(record | {"time": time.time()}) + "\n")
                self.metrics.flush()

    def progress(self, line: str, new_line: bool):
        """A live line on a terminal; elsewhere a printed line now and then."""
        self(line, show=new_line and not self.live)
        if self.live:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


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

def to_fp8(x, dtype):
    """FP8 values and the scale that undoes them: the largest magnitude becomes the largest number of `dtype`."""
    scale = (x.abs().amax().float() / torch.finfo(dtype).max).clamp(min=1e-12)
    return (x.float() / scale).to(dtype), scale


class Fp8Product(torch.autograd.Function):
    """x (M, K) @ w (N, K)^T in FP8, a scale per tensor: e4m3 for x and w, e5m2 for the gradient (arXiv 2209.05433)."""

    @staticmethod
    def product(a, scale_a, b, scale_b):  # a (M, K) by rows, b (N, K) by rows
        return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)

    @staticmethod
    def forward(ctx, x, w):
        x, w = to_fp8(x, torch.float8_e4m3fn), to_fp8(w, torch.float8_e4m3fn)
        ctx.save_for_backward(*x, *w)
        return Fp8Product.product(*x, *w)

    @staticmethod
    def backward(ctx, grad):
        x, scale_x, w, scale_w = ctx.saved_tensors
        g, scale = to_fp8(grad, torch.float8_e5m2)
        return (Fp8Product.product(g, scale, w.t().contiguous(), scale_w),
                Fp8Product.product(g.t().contiguous(), scale, x.t().contiguous(), scale_x))


class Linear(nn.Linear):
    """Computes in the weight's dtype, or in FP8; the bias (1-D, so FP32) is cast."""

    fp8 = False

    def forward(self, x):
        dtype = self.weight.dtype
        if self.fp8:
            return Fp8Product.apply(x.to(dtype).flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
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


def attention_dtype(x):
    """The compute dtype on CUDA. On a CPU FP32: its BF16 attention took 11 ms backward, FP32 1.2 (records/speed.md)."""
    return x.dtype if x.is_cuda else torch.float32


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
        dtype = attention_dtype(x)
        q, k, v = split(self.img_qkv_proj(x), 3)              # (B, H, N, d) each
        text_k, text_v = split(self.txt_kv_proj(text), 2)     # (B, H, T, d) each
        q, k = rotate(self.norm_q(q), rope).to(dtype), rotate(self.norm_k(k), rope).to(dtype)
        k = torch.cat([self.norm_added_k(text_k).to(dtype), k], 2)
        v = torch.cat([text_v, v], 2).to(dtype)               # (B, H, T + N, d)
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
        return x + (gate2 * self.mlp(modulate(x, shift2, scale2))).to(x.dtype)

    def mlp(self, h):
        return self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h))


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


class Trained(nn.Module):
    """What is trained: the model, and the projector of REPA."""

    @torch.no_grad()
    def initialize(self, seed: int = 0):
        """Matrices uniform in +-1/sqrt(fan_in) (torch's default), biases, gates and the final layer zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2 and not re.search(r"modulation\.|adaLN|final_layer", name):
                p.copy_(torch.empty(p.shape).uniform_(-1, 1, generator=generator) * p.shape[1] ** -0.5)
            elif p.ndim == 2 or name.endswith("bias") or name == "skipped_token":
                p.zero_()
            else:
                assert re.search(r"norm_(q|k|added_k)\.weight$", name), f"no rule initialises {name} {tuple(p.shape)}"
                p.fill_(1.0)
        if hasattr(self, "fuse"):  # at first the fused tokens are the deep ones: a plain PRX
            n = self.fuse.out_features
            self.fuse.weight.copy_(torch.eye(n, 2 * n).roll(n, 1))
        return self

    def set_compute_dtype(self, dtype: torch.dtype, fp8: bool = False):
        """Matrices in `dtype`, 1-D parameters in FP32 (the optimizer keeps FP32 masters of all). With `fp8` the tokens'
        products in the blocks are in FP8; the modulation's are not."""
        for p in self.parameters():
            p.data = p.data.to(dtype if p.ndim == 2 else torch.float32)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.fp8 = fp8 and name.startswith("blocks.") and module.bias is None
        return self


def take(h, index):
    """Tokens by number: h (B, N, D), index (B, K) -> (B, K, D)."""
    return h.gather(1, index[..., None].expand(-1, -1, h.shape[-1]))


class PRX(Trained):
    """The denoiser: image or latent x_t, time and text in; x_0 or velocity out. Arguments as diffusers' config.json.

    forward: x (B, C, H, W), t (B,) in (0, 1], text (B, T, context_in_dim), mask (B, T) bool or None -> (B, C, H, W).
    A fresh PRX outputs zero: every gate and the final layer start at zero.

    Routing: blocks span[0] to span[1] see the tokens `keep` (B, K), or the K that the scorer likes best; others skip.
    TREAD puts them back as they were; SPRINT (sprint=True, always, also when all are kept) fuses the tokens
    before the span with those after it, where a learned token stands for the skipped ones. With `tap`, the output of
    that block comes along, and which tokens it holds (None: all).
    """

    def __init__(self, in_channels=16, patch_size=2, context_in_dim=2304, hidden_size=1792, mlp_ratio=3.5, num_heads=28,
                 depth=16, axes_dim=None, theta=10000, time_factor=1000.0, time_max_period=10000, bottleneck_size=None,
                 span=None, sprint=False, scorer=False):
        super().__init__()
        axes_dim = list(axes_dim or (hidden_size // num_heads // 2,) * 2)
        self.config = dict(in_channels=in_channels, patch_size=patch_size, context_in_dim=context_in_dim,
                           hidden_size=hidden_size, mlp_ratio=mlp_ratio, num_heads=num_heads, depth=depth,
                           axes_dim=axes_dim, theta=theta, time_factor=time_factor, time_max_period=time_max_period,
                           bottleneck_size=bottleneck_size)
        if sprint or scorer:  # not in diffusers' model: what follows must be known to load the weights again
            self.config |= dict(span=list(span), sprint=sprint, scorer=scorer)
        self.span, patch_dim = span, in_channels * patch_size ** 2
        self.img_in = (nn.Sequential(Linear(patch_dim, bottleneck_size), Linear(bottleneck_size, hidden_size))
                       if bottleneck_size else Linear(patch_dim, hidden_size))
        self.time_in = TimeEmbedder(hidden_size)
        self.txt_in = Linear(context_in_dim, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_dim)
        if sprint:
            self.skipped_token, self.fuse = nn.Parameter(torch.zeros(hidden_size)), Linear(2 * hidden_size, hidden_size)
        if scorer:
            self.scorer = Linear(hidden_size, 1)
        self.ropes, self.recompute = {}, False  # (rows, columns, device) -> table

    def time_embedding(self, t):  # (B,) -> (B, 256): cosines, then sines, of t * time_factor * period^(-i/128)
        freqs = torch.exp(-math.log(self.config["time_max_period"]) * torch.arange(128, device=t.device) / 128)
        angle = self.config["time_factor"] * (t.float()[:, None] * freqs)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def forward(self, x, t, text, mask=None, keep=None, tap=None):
        B, C, H, W = x.shape
        p, c = self.config["patch_size"], self.config
        rows, columns = H // p, W // p
        key = (rows, columns, x.device)
        if key not in self.ropes:
            self.ropes[key] = rope_table(rows, columns, c["axes_dim"], c["theta"], x.device)
        h = x.view(B, C, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(B, rows * columns, C * p * p)
        h, text, vec = self.img_in(h), self.txt_in(text), self.time_in(self.time_embedding(t))
        if mask is not None:  # additive and broadcast, once for all blocks
            mask = torch.zeros(B, mask.shape[1] + h.shape[1], dtype=attention_dtype(h), device=x.device).masked_fill_(
                F.pad(~mask.bool(), (0, h.shape[1])), -torch.inf)[:, None, None]
        rope, (first, last), tapped = self.ropes[key], self.span or (-1, -1), None
        for i, block in enumerate(self.blocks):
            if i == first:
                dense, all_rope, all_mask, kept = h, rope, mask, None
                if keep is not None:
                    kept, gate = self.choose(h, keep)                                  # (B, K), (B, K, 1)
                    h, rope = take(h, kept), tuple(table[kept][:, None] for table in rope)
                    mask = mask if mask is None else mask[..., :text.shape[1] + h.shape[1]]
            if self.recompute and torch.is_grad_enabled():
                h = recompute(block, h, text, vec, rope, mask, use_reentrant=False)
            else:
                h = block(h, text, vec, rope, mask)
            if i == tap:
                tapped = h, kept if first <= i <= last else None
            if i == last:
                if kept is not None:
                    rest = self.skipped_token.to(h.dtype).expand_as(dense) if hasattr(self, "fuse") else dense
                    h = rest.scatter(1, kept[..., None].expand_as(h), h * gate.to(h.dtype))
                if hasattr(self, "fuse"):
                    h = self.fuse(torch.cat([dense, h], -1))
                rope, mask = all_rope, all_mask
        h = self.final_layer(h, vec)
        h = h.view(B, rows, columns, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
        return h if tap is None else (h, *tapped)

    def choose(self, h, keep):
        """Which tokens go on, (B, K), and a factor of exactly 1 for each, (B, K, 1), through which the scorer learns:
        its gradient is that of scaling the routed tokens by the sigmoid of their scores (as in Mixture-of-Depths, arXiv
        2404.02258), while the values are those of plain routing, so that sampling with all tokens is no other model."""
        if not hasattr(self, "scorer"):
            return keep, torch.ones(1, 1, 1, device=h.device)
        score = self.scorer(h).float()                                                 # (B, N, 1)
        kept = score[..., 0].topk(keep.shape[1], 1).indices.sort(1).values
        weight = take(score, kept).sigmoid()
        return kept, 1 + weight - weight.detach()


def flops_per_image(config: dict, tokens: int, text_tokens: int, skipped: float = 0.0, skipping: int = 0) -> float:
    """Matmul FLOPs of one forward pass of one image, less the time embedding's. A training step is three times that.
    A share `skipped` of the tokens skips `skipping` of the blocks."""
    d, patch = config["hidden_size"], config["in_channels"] * config["patch_size"] ** 2

    def block(n):
        return (n * (4 + 3 * config["mlp_ratio"]) + text_tokens * 2 + 6) * d * d + 2 * n * (n + text_tokens) * d

    ends = tokens * 2 * patch + text_tokens * config["context_in_dim"]         # in units of d
    blocks = (config["depth"] - skipping) * block(tokens) + skipping * block(round(tokens * (1 - skipped)))
    return 2 * (blocks + ends * d)


# =====================================================================================================================
# 5. Objectives: flow matching (arXiv 2210.02747, 2209.03003) with v- or x-prediction, contrastive, REPA, P-DINO.
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


def route(n: int, x, patch: int, skipped: float, generator) -> torch.Tensor:
    """(n, K) numbers, in order, of the tokens of x (B, C, H, W) that do not skip, at random."""
    N = x.shape[2] * x.shape[3] // patch ** 2
    draw = torch.rand(n, N, generator=generator, device=x.device)
    return draw.topk(max(1, round(N * (1 - skipped))), 1).indices.sort(1).values


NEGATIVES = 8  # samples in a group of contrastive flow matching


def flow_matching_loss(model, x_0, eps, t, text, mask, predict: str, contrastive: float = 0.0, keep=None, tap=None):
    """Flow matching's loss per sample, (B,) FP32: mean squared error in v-space, x_t = (1 - t) x_0 + t eps; the clamp
    of t for x-prediction is on both sides. Returns what to minimise, the plain loss, the estimate of x_0 and the tap.

    Contrastive (arXiv 2506.05350): less `contrastive` times the error to another sample's target, the next of a group
    of eight, so that negatives depend neither on the ranks nor on the micro-batches.
    """
    time_ = t[:, None, None, None]
    x_t = (1 - time_) * x_0 + time_ * eps
    target = eps - x_0 if predict == "v" else (x_t - x_0) / time_.clamp(min=0.05)
    output, *tapped = model(x_t, t, text, mask, keep, tap) if tap is not None else [model(x_t, t, text, mask, keep)]
    v = velocity(output, x_t, t, predict)
    loss = plain = (v - target).square().mean((1, 2, 3))
    if contrastive:
        other = target.unflatten(0, (-1, NEGATIVES)).roll(1, 1).flatten(0, 1)
        loss = plain - contrastive * (v - other).square().mean((1, 2, 3))
    return loss, plain.detach(), x_t - time_ * v if predict == "v" else output, tapped


class Alignment(Trained):
    """REPA (arXiv 2410.06940): tokens of one block, through a projector, against a frozen teacher's patch tokens.

    forward: tokens (B, K, D) of a grid of rows x columns, kept (B, K) or None for all, features (B, N, F) -> (B,) minus
    the mean cosine similarity. iREPA (arXiv 2512.10794): a 3x3 convolution instead of the MLP, and features without
    most of what all tokens share: (f - gamma mean) / deviation over the tokens.
    """

    GAMMA = 0.8  # a guess: the paper leaves it open; PRX's framework takes it from the features

    def __init__(self, dim: int, features: int, kind: str, width: int = 1024):
        super().__init__()
        width = min(width, 4 * features)
        self.mlp = (nn.Sequential(Linear(9 * dim, features)) if kind == "irepa" else nn.Sequential(
            Linear(dim, width), nn.SiLU(), Linear(width, width), nn.SiLU(), Linear(width, features)))
        self.spatial = kind == "irepa"

    def forward(self, tokens, kept, features, rows: int, columns: int):
        if self.spatial:
            image = tokens.transpose(1, 2).unflatten(2, (rows, columns))
            tokens = F.unfold(image.float(), 3, padding=1).transpose(1, 2)             # (B, N, 9 D)
            features = (features - self.GAMMA * features.mean(1, True)) / (features.std(1, keepdim=True) + 1e-6)
        if kept is not None:
            features = take(features, kept)
        return -F.cosine_similarity(self.mlp(tokens).float(), features.float(), dim=-1).mean(1)


def perceptual_loss(teacher, x, x_0):
    """P-DINO (PRX part 3): 1 - mean cosine similarity of the patch tokens of x and x_0 (B, 3, H, W) in [-1, 1] -> (B,).
    At 224 px of the teacher's patches of 14, at most; images that are smaller stay as they are."""
    side = [min(224 // 14, n // teacher.patch) for n in x.shape[2:]]
    with torch.no_grad():
        real = teacher(x_0, *side)
    return 1 - F.cosine_similarity(teacher(x, *side), real, dim=-1).mean(1)


# =====================================================================================================================
# 6. Frozen networks: VAE, text encoder and teacher, from Hugging Face or folders (data/encoders.py loads them).
# =====================================================================================================================

VAES = {"repa-e": "REPA-E/e2e-flux-vae", "flux": "black-forest-labs/FLUX.1-schnell",
        "flux2": "black-forest-labs/FLUX.2-dev", "dc-ae": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"}
TEXTS = {"t5gemma": "google/t5gemma-2b-2b-ul2", "tiny": str(ROOT / "data/networks/text")}
TEACHERS = {"dinov3": "facebook/dinov3-vitl16-pretrain-lvd1689m", "tiny": str(ROOT / "data/networks/teacher"),
            "dinov2": "facebook/dinov2-with-registers-large"}


def pad_text(states: list[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged embeddings [b] of (T_i, D) -> (b, T, D) and mask (b, T) bool, T the next multiple of `pad`."""
    lengths, pin = torch.tensor([len(x) for x in states]), torch.cuda.is_available()
    padded = torch.empty(len(states), -(-int(lengths.max()) // pad) * pad, states[0].shape[1], dtype=states[0].dtype,
                         pin_memory=pin)  # the 150 MB of a batch of 128 are written once
    for row, x in zip(padded, states):
        row[:len(x)] = x
        row[len(x):] = 0
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return padded, mask.pin_memory() if pin else mask


# =====================================================================================================================
# 7. Optimizer: Muon for the blocks' matrices, AdamW for the rest, one class for 1 to N ranks.
# =====================================================================================================================

CLASSIC = [(3.4445, -4.7750, 2.0315)]  # Keller Jordan's quintic, the same at every step
POLAR = [(8.28721201814563, -23.595886519098837, 17.300387312530933),  # Polar Express: the best quintic for each step
         (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
         (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
         (3.3184196573706015, -2.488488024314874, 0.51004894012372),
         (2.300652019954817, -1.6689039845747493, 0.4188073119525673)]
# As in the paper, all but the last are for values 1 % larger: in BF16 some leave the interval that a step is made for,
# and without this room they grow (2.7 instead of 1.13 for a Gaussian matrix).
POLAR[:-1] = [(a / 1.01, b / 1.01 ** 3, c / 1.01 ** 5) for a, b, c in POLAR[:-1]]


def gram(X: torch.Tensor, C: torch.Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> torch.Tensor:
    """beta C + alpha X X^T (K, n, n) of X (K, n, m) and a symmetric C. Of large matrices the block below the diagonal
    is not computed but copied: three of four products."""
    def block(i, j):
        x, y = X[:, i], X[:, j].mT
        return x @ y if C is None else torch.baddbmm(C[:, i, j], x, y, beta=beta, alpha=alpha)

    n = X.shape[1]
    if n < 1024:
        return block(slice(n), slice(n))
    upper, lower = slice(n // 2), slice(n // 2, n)
    corner = block(upper, lower)
    return torch.cat([torch.cat([block(upper, upper), corner], 2), torch.cat([corner.mT, block(lower, lower)], 2)], 1)


def orthogonalize(G: torch.Tensor, steps: int = 5, coefficients=CLASSIC) -> torch.Tensor:
    """Newton-Schulz: push all singular values of each matrix towards 1. G (K, rows, columns), in G's dtype.

    From Keller Jordan's Muon. Same-shaped matrices go in one batched product.
    """
    margin = 1.01 if coefficients is POLAR else 1.0  # its first steps must not see a singular value above 1
    X = G.mT if G.shape[1] > G.shape[2] else G
    X = X / (X.flatten(1).norm(dim=1) * margin).clamp(min=1e-7)[:, None, None]
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        A = gram(X)                                   # (K, n, n), n the smaller side
        B = gram(A, A, b, c)                          # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)            # a X + (b A + c A^2) X
    return X.mT if G.shape[1] > G.shape[2] else X


all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class MuonAdamW:
    """Muon (as torch.optim.Muon with match_rms_adamw; --ns classic is its iteration) and AdamW (as torch.optim.AdamW)
    over flat FP32 vectors.

    Every parameter is owned by one rank. A rank's parameters lie one after the other in a flat vector: first its Muon
    matrices, shape by shape, so that a stack of them is a view, then the rest. The gradients of all parameters are
    summed in FP32 in `grads` (world, size), one row per owner; a reduce-scatter hands each owner its row, and after the
    update an all-gather hands the weights back. `master`, `ema` and the state exist for owned parameters only.

    Build it on the FP32 model, then set the model's compute dtype.
    """

    def __init__(self, named_parameters, config: Config, world: World = World()):
        self.params, self.config, self.world = dict(named_parameters), config, world
        self.is_muon = {n: config.optimizer == "muon" and n.startswith("blocks.") and p.ndim == 2 and (
                        config.modulation == "muon" or ".modulation." not in n) for n, p in self.params.items()}
        # Owners: the costliest parameter first, to the rank with the least work. Newton-Schulz: rows * columns * min.
        cost = {n: p.numel() * (min(p.shape) if self.is_muon[n] else 1) for n, p in self.params.items()}
        load, owned = [0] * world.size, [[] for _ in range(world.size)]
        for name in sorted(self.params, key=lambda n: (-cost[n], n)):
            rank = load.index(min(load))
            load[rank] += cost[name]
            owned[rank].append(name)
        shape = {n: tuple(p.shape) for n, p in self.params.items()}
        order = lambda n: (not self.is_muon[n], len(shape[n]) < 2, shape[n] if self.is_muon[n] else (), n)
        self.layout = [sorted(names, key=order) for names in owned]
        twice = [n for n in self.params if sum(names.count(n) for names in self.layout) != 1]
        assert not twice, f"every parameter must be owned by exactly one rank, unlike {twice}"
        self.size = max(sum(self.params[n].numel() for n in names) for names in self.layout)
        matrices = [sum(self.params[n].numel() for n in names if len(shape[n]) > 1) for names in self.layout]
        self.matrices = max(matrices), min(matrices)  # the flat vectors' ends up to which some, all ranks have matrices
        device = next(iter(self.params.values())).device
        zeros = lambda *s: torch.zeros(*s, dtype=torch.float32, device=device)
        # Stacks of owned matrices: first element, one past the last, shape (K, rows, columns)
        self.stacks, end = [], 0
        parts = {"img_qkv_proj": 3, "txt_kv_proj": 2} if config.split_qkv else {}
        mine = [(shape[n], parts.get(n.split(".")[-2], 1)) for n in self.layout[world.rank] if self.is_muon[n]]
        for (rows, columns), cut in dict.fromkeys(mine):
            k = mine.count(((rows, columns), cut))
            self.stacks.append((end, end + k * rows * columns, (k * cut, rows // cut, columns)))
            end += k * rows * columns
        self.split = end  # Muon's part of the flat vector ends here, AdamW's begins
        self.grads, self.master = zeros(world.size, self.size), zeros(self.size)
        self.momentum, self.exp_avg, self.exp_avg_sq = zeros(end), zeros(self.size - end), zeros(self.size - end)
        for name, view in self.views(self.master).items():
            view.copy_(self.params[name].detach())
        if config.weights == "bf16":
            self.master.copy_(self.master.bfloat16())
        self.ema = self.master.clone() if config.ema else self.master
        self.grad_views = {n: v for rank, row in enumerate(self.grads) for n, v in self.views(row, rank).items()}
        self.steps, self.ema_steps, self.filled, self.coming = 0, 0, False, []
        self.skipped, self.skipped_in_a_row = zeros(()), zeros(())  # steps with a non-finite gradient, or a spike
        self.typical = zeros(())  # running mean of the gradient's norm
        self.lost = zeros(())  # share of the last step's updates that BF16 storage rounded away, where weights are BF16
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

    def all_ranks(self, flat: torch.Tensor, offset: int = 0):
        """The flat vectors of all ranks, from `offset` on, as views by parameter name, and the collective to wait for
        before they are read (None: they are there). Every rank must call."""
        if self.world.size == 1:
            return self.views(flat, offset=offset), None
        rows = torch.empty(self.world.size, len(flat), dtype=flat.dtype, device=flat.device)
        work = all_gather(rows.view(-1), flat, async_op=True)
        return {n: v for rank, row in enumerate(rows) for n, v in self.views(row, rank, offset).items()}, work

    @torch.no_grad()
    def publish(self, flat: torch.Tensor | None = None, wait: bool = True):
        """Give the model the masters, or another flat vector such as `ema`, in the model's dtypes, on all ranks:
        matrices travel in the compute dtype, the rest in FP32. Without `wait` they are on their way until arrive()."""
        self.arrive()
        flat, (most, least) = self.master if flat is None else flat, self.matrices
        dtype = next((p.dtype for p in self.params.values() if p.ndim > 1), torch.float32)
        parts = [(flat, 0)] if dtype == torch.float32 or self.world.size == 1 else [
            (flat[least:], least), (flat[:most].to(dtype), 0)]
        self.coming = [self.all_ranks(*part) for part in parts]
        if wait:
            self.arrive()

    @torch.no_grad()
    def arrive(self):
        """Wait for the weights of publish() and hand them to the model."""
        for views, work in self.coming:
            if work:
                work.wait()
            for name, view in views.items():
                p = self.params[name]
                if p.dtype == torch.float32 and self.world.size == 1:
                    p.data = view  # no copy: the model's weight is the master
                elif p.ndim > 1 or view.dtype == torch.float32:  # a BF16 row may end in another rank's 1-D part
                    p.data.copy_(view)
        self.coming = []

    def zero_grad(self):
        for p in self.params.values():
            p.grad = None

    @torch.no_grad()
    def accumulate(self):
        """Take over the gradients of one micro-batch: FP32 sums, whatever dtype they came in."""
        for name, p in self.params.items():  # what only routing uses has no gradient in a stage without it
            p.grad = torch.zeros_like(p) if p.grad is None and name.startswith(("scorer", "skipped_token")) else p.grad
        missing = [n for n, p in self.params.items() if p.grad is None]
        assert not missing, f"no gradient reached {missing[:5]}: every parameter must take part in the loss"
        views, grads = [self.grad_views[n] for n in self.params], [p.grad for p in self.params.values()]
        (torch._foreach_add_ if self.filled else torch._foreach_copy_)(views, grads)
        self.filled = True
        self.zero_grad()

    @torch.no_grad()
    def step(self, lr_share: float = 1.0, wait: bool = True) -> torch.Tensor:
        """One update with both rates times lr_share. Returns the gradient's norm before clipping, on the device.
        Without `wait`, call arrive() before the model runs.

        A non-finite gradient leaves the weights as they are and counts in `skipped`, with no synchronisation.
        """
        self.arrive()  # until then the masters are read
        c, self.filled, self.steps = self.config, False, self.steps + 1
        grad = self.grads[0]
        if self.world.size > 1:
            wire = torch.bfloat16 if c.wire == "bf16" else torch.float32
            grad = torch.empty_like(self.master, dtype=wire)
            reduce_scatter(grad, self.grads.view(-1).to(wire))
            grad = grad.float().div_(self.world.size)
        square = torch.linalg.vector_norm(grad).square()
        if self.world.size > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        good = norm.isfinite()
        if c.skip_spikes:
            good &= (norm <= c.skip_spikes * self.typical) | (self.typical == 0)
        mean = torch.where(self.typical == 0, norm, self.typical.lerp(norm, 0.02))
        self.typical = torch.where(good, mean, self.typical)
        self.skipped += ~good
        self.skipped_in_a_row = torch.where(good & (self.skipped_in_a_row < 10), 0.0, self.skipped_in_a_row + 1)
        scale = (c.clip / (norm + 1e-6)).clamp(max=1.0) if c.clip else 1.0
        grad = grad.mul_(scale).masked_fill_(~good, 0.0)
        rate = good * lr_share  # zero where the step is skipped
        before = self.master.clone() if c.weights == "bf16" else None

        for start, end, shape in self.stacks:  # Muon, Nesterov
            w, g, m = (flat[start:end].view(shape) for flat in (self.master, grad, self.momentum))
            m.lerp_(g, 1 - c.momentum)
            dtype = self.params[self.layout[self.world.rank][0]].dtype
            update = orthogonalize(g.lerp(m, c.momentum).to(dtype), c.ns_steps, POLAR if c.ns == "polar" else CLASSIC)
            if c.weight_decay:
                w.mul_(1 - rate * (c.lr * c.weight_decay))
            w.addcmul_(update.float(), rate * (-c.lr * 0.2 * max(shape[1:]) ** 0.5))  # AdamW's rate fits: 2502.16982

        lr = c.lr if c.optimizer == "adamw" else c.lr_adamw
        steps = torch.full((), float(self.steps), device=grad.device)  # torch.tensor would wait for the GPU
        if self.split < self.size:
            torch._fused_adamw_(  # torch.optim.AdamW's own kernel: one pass
                [self.master[self.split:]], [grad[self.split:]], [self.exp_avg], [self.exp_avg_sq], [], [steps],
                lr=lr * lr_share, beta1=c.beta1, beta2=c.beta2, weight_decay=c.weight_decay, eps=c.eps, amsgrad=False,
                maximize=False, found_inf=(~good).float())

        if c.weights == "bf16":  # what BF16 storage does: an update below half a unit in the last place is lost
            moved, rounded = self.master != before, self.master.bfloat16().float()
            self.lost = ((rounded == before) & moved).sum() / moved.sum().clamp(min=1)
            self.master.copy_(rounded)
        self.publish(wait=wait)
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
# 8. Data: endless scenes or shards, in an order that depends on the seed alone, prepared ahead by a thread.
# =====================================================================================================================
# A data set (data/scenes.py: SceneData, data/shards.py: ShardData) has
#   batches(skip, rows)   this rank's rows of global batch number i, for i from `skip` on: x, uint8 (b, 3, H, W) images
#                         or BF16 (b, C, h, w) latents; texts, [b] captions or stored embeddings BF16 (T_i, D); the
#                         images that belong to latents, where REPA wants them, or None
#   empty, prompts(n)     the empty prompt, and n held-out ones with their captions, as in `texts`
#   sizes, latent, text   the (H, W) of its buckets; what encoded the stored latents and texts, or None

def choose_field(captions: str, seed: int, sample: int) -> str:
    """long, short, or mix:P: a function of the seed and the global sample number."""
    if not captions.startswith("mix:"):
        return captions
    return "short" if np.random.default_rng((seed, sample, 1)).random() < float(captions[4:]) else "long"


def host_batches(data, c: Config, skip: int, step: int, rows: slice):
    """What the host prepares for each step from `step` on: x, times t (b,), texts with some replaced by the empty one
    (embeddings are padded: states and mask), images. All draws are made for the global batch and then cut, so that they
    are the same for any number of ranks."""
    pin = (lambda x: x.pin_memory()) if torch.cuda.is_available() else lambda x: x  # for copies that nobody waits for
    for step, (x, texts, images) in enumerate(data.batches(skip, rows), step):
        generator = generator_for("cpu", c.seed, step, 0)
        t = draw_times(c.batch, c.shift, c.uniform, generator)[rows]
        dropped = (torch.rand(c.batch, generator=generator) < c.caption_dropout)[rows].tolist()
        texts = [data.empty if drop else text for drop, text in zip(dropped, texts)]
        texts = pad_text(texts, c.text_pad) if data.text else texts
        yield pin(x), pin(t), texts, images if images is None else pin(images)


class Prefetch:
    """Runs an iterator in a thread, `depth` items ahead. Its exceptions come out of next(); stall counts the wait.

    Depth 0 runs it in the caller: on two CPU cores its OpenMP team fights the model's, 316 against 378 images/s.
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
def sample(model, noise, text, mask, null_text, null_mask, *, steps: int, cfg_scale: float, shift: float, predict: str,
           skipped: float = 0.0):
    """Euler from t = 1 to 0 on a linear grid, shifted; classifier-free guidance (arXiv 2207.12598) when cfg_scale != 1.
    With `skipped`, self-guidance instead: away from what the model says when that share of the tokens is routed past.

    noise (B, C, H, W) FP32; text (B, T, D), mask (B, T); null_text (1, T0, D), null_mask (1, T0). Returns (B, C, H, W).
    """
    B, x = len(noise), noise
    routes = generator_for(noise.device, steps, 3)  # one choice of tokens per step for all rows: batches change nothing
    if cfg_scale != 1 and not skipped:
        T = max(text.shape[1], null_text.shape[1])
        longer = lambda a, m: (F.pad(a, (0, 0, 0, T - a.shape[1])), F.pad(m, (0, T - m.shape[1])))
        (text, mask), (null_text, null_mask) = longer(text, mask), longer(null_text, null_mask)
        text = torch.cat([text, null_text.expand(B, -1, -1)])
        mask = torch.cat([mask, null_mask.expand(B, -1)])
    grid = shift_time(torch.linspace(1, 0, steps + 1), shift).tolist()
    for t, t_next in zip(grid, grid[1:]):
        if skipped and cfg_scale != 1:
            keep = route(1, x, model.config["patch_size"], skipped, routes).expand(B, -1)
            weak, full = (velocity(model(x, torch.full((B,), t, device=x.device), text, mask, k), x,
                                   torch.full((B,), t, device=x.device), predict) for k in (keep, None))
            x = x + (t_next - t) * (weak + cfg_scale * (full - weak))
            continue
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


def write_atomically(path: Path, write):
    """`write(temporary path)`, flushed to disk, then renamed: a file with this name is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.umask(mask := os.umask(0))
    temporary.chmod(0o666 & ~mask)  # safetensors makes files that nobody but their owner can read
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


def load_transformer(source, device="cpu") -> PRX:
    """A PRX in diffusers format, ours or published, strictly, in FP32: a transformer folder, a pipeline's folder, or
    owner/name on the Hugging Face hub."""
    folder = Path(source)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        from data.encoders import unavailable
        from huggingface_hub import snapshot_download
        try:  # nothing but the transformer, wherever it lies in the repository
            folder = Path(snapshot_download(str(source), allow_patterns=[
                "transformer/*", "config.json", "diffusion_pytorch_model*"]))
        except Exception as error:  # no network, no such repository, no access: the hub has a dozen classes for it
            raise unavailable("init", source, error, "leave --init away") from None
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        files = (sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists()
                 else ["diffusion_pytorch_model.safetensors"])
        tensors = {k: v for file in files for k, v in load_file(folder / Path(file).name).items()}
        if config.pop("resolution_embeds", None):
            raise UserError(f"{folder} is a PRX with resolution embeddings, which this model does not have")
        model = PRX(**{k: v for k, v in config.items() if not k.startswith("_")})
        model.load_state_dict(tensors, strict=True)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder} is no PRX transformer in diffusers format ({str(error).strip().splitlines()[0]}); "
                        "it needs config.json and diffusion_pytorch_model.safetensors") from None
    return model.to(device)


class Checkpoints:
    """checkpoint/step-N/: one safetensors file per rank with what it owns, by parameter name after its optimizer's
    prefix, and state.json with their sha256.

    A thread writes them from a snapshot: to a temporary name, flushed, renamed when all ranks are done; the last two
    stay, and milestones. Where a rank cannot write (a full disk), all drop this one and training goes on. No pickle,
    and no RNG state: every draw is a function of (seed, step), and the data position is the number of batches drawn.
    """

    def __init__(self, run: Path, world: World, log: Log, milestone_hours: float = 0.0):
        self.folder, self.world, self.log, self.every = run / "checkpoint", world, log, milestone_hours * 3600
        self.thread, self.last, self.written, self.snapshot = None, None, None, {}  # last begun, last complete
        if world.rank == 0:
            for left_over in self.folder.glob("step-*.tmp"):
                shutil.rmtree(left_over)

    def save(self, optimizers: dict[str, MuonAdamW], state: dict, elapsed: float, wait: bool = False):
        self.wait()
        if self.last != state["step"]:
            tensors = {prefix + k: v for prefix, o in optimizers.items() for k, v in o.state_dict().items()}
            if self.snapshot.keys() != tensors.keys():
                pin = next(iter(tensors.values())).is_cuda
                self.snapshot = {k: torch.empty(v.shape, dtype=v.dtype, pin_memory=pin) for k, v in tensors.items()}
            for k, v in tensors.items():
                self.snapshot[k].copy_(v, non_blocking=True)
            optimizer, self.last = optimizers[""], state["step"]
            state = state | dict(ranks=self.world.size, optimizer_steps={k: o.steps for k, o in optimizers.items()},
                                 elapsed=elapsed, typical=optimizer.typical.item())  # which also waits for the copies
            self.thread = threading.Thread(target=self.write, args=(state,), daemon=True)
            self.thread.start()
        if wait:
            self.wait()

    def wait(self):
        if self.thread:
            self.thread.join()

    def write(self, state: dict):
        final = self.folder / f"step-{state['step']:08d}"
        temporary, digest, rank = final.with_name(final.name + ".tmp"), bytes(32), self.world.rank
        done = bytes(32)
        path = temporary / f"rank-{rank}.safetensors"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda p: save_file(self.snapshot, p))
            digest = file_sha256(path)
        except (OSError, SafetensorError) as error:
            print(f"warning: rank {rank} cannot write its part of checkpoint {final.name} ({error}); the ones before "
                  "it stay and training goes on", flush=True)
        try:
            digests = self.gather(digest)
            if rank == 0 and all(map(any, digests)):
                state["sha256"] = [d.hex() for d in digests]
                write_atomically(temporary / "state.json", lambda p: p.write_text(json.dumps(state, indent=2) + "\n"))
                older = sorted(p for p in self.folder.glob("step-????????") if p < final)
                if self.every and state["elapsed"] // self.every > max([0] + [
                        int(p.read_text()) for p in self.folder.glob("step-*/milestone")]):
                    (temporary / "milestone").write_text(str(int(state["elapsed"] // self.every)))
                shutil.rmtree(final, ignore_errors=True)
                os.rename(temporary, final)
                done = b"1" * 32
                for old in [p for p in older if not (p / "milestone").exists()][:-1]:
                    shutil.rmtree(old)
            elif rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
        except (OSError, RuntimeError) as error:  # a peer is gone, or the disk is full by now
            print(f"warning: checkpoint {final.name} is not complete ({error}); the ones before it stay", flush=True)
        if any(self.gather(done)[0]):  # nobody goes on before it is there
            self.written = state["step"]

    def gather(self, digest: bytes) -> list[bytes]:
        if self.world.files is None:
            return [digest]
        rows = [torch.empty(32, dtype=torch.uint8) for _ in range(self.world.size)]
        dist.all_gather(rows, torch.tensor(list(digest), dtype=torch.uint8), group=self.world.files)
        return [bytes(row.tolist()) for row in rows]


def file_sha256(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def find_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and a sentence for each one passed over."""
    notes = []
    for folder in sorted((run / "checkpoint").glob("step-*"), reverse=True):
        try:
            if folder.name.endswith(".tmp"):
                raise ValueError("it was not finished")
            state = json.loads((folder / "state.json").read_text())
            for rank, digest in enumerate(state["sha256"]):
                if file_sha256(folder / f"rank-{rank}.safetensors").hex() != digest:
                    raise ValueError(f"rank-{rank}.safetensors is damaged (its sha256 differs)")
            return folder, notes
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            notes.append(f"checkpoint {folder.name} is passed over: {error}")
    return None, notes


def load_checkpoint(folder: Path, optimizers: dict[str, MuonAdamW]) -> dict:
    """Fill the optimizers and the model from a checkpoint of any number of ranks; returns its state.json."""
    state = json.loads((folder / "state.json").read_text())
    files = [safe_open(folder / f"rank-{rank}.safetensors", "pt") for rank in range(state["ranks"])]
    where = {key: file for file in files for key in file.keys()}

    def read(key):
        if key not in where:
            raise UserError(f"checkpoint {folder} has no {key}; it belongs to another model or optimizer")
        return where[key].get_tensor(key)

    for prefix, optimizer in optimizers.items():
        optimizer.load_state_dict(lambda key: read(prefix + key), state["optimizer_steps"][prefix])
    optimizers[""].typical.fill_(state["typical"])
    return state


# =====================================================================================================================
# 10. Training.
# =====================================================================================================================

def lr_share(progress: float, first: float, c: Config) -> float:
    """Linear warm-up from the first step's progress, constant, linear decay to zero at 1."""
    warm = 0.01 + (progress - first) / c.warmup if c.warmup else 1.0
    cool = (1 - progress) / (1 - c.decay_from) if c.decay_from < 1 else 1.0
    return max(0.0, min(1.0, warm, cool))


def stage_config(config: Config, stage: Stage) -> Config:
    return dataclasses.replace(config, **stage.knobs)


def stage_at(progress: float, stages: list[Stage]) -> int:
    ends = np.cumsum([s.share for s in stages]) / sum(s.share for s in stages)
    return min(int(np.searchsorted(ends, progress, "right")), len(stages) - 1)


def to_latents(x, vae, device):
    """A batch as the model sees it, in FP32: stored latents, or images through the VAE, or scaled to [-1, 1]."""
    x = x.to(device, non_blocking=True)
    if x.dtype != torch.uint8:
        return x.float()
    return vae.encode(x) if vae else x.float().div_(127.5).sub_(1)


def sample_fixed_prompts(model, optimizer, vae, embed, data, c: Config, path: Path, world: World):
    """The same prompts from the same noise at every call of a stage, with the EMA weights, at the size nearest to a
    square. All ranks call, rank 0 writes."""
    from records import figures

    texts, captions = data.prompts(16)
    height, width = min(data.sizes, key=lambda size: abs(math.log(size[0] / size[1])))
    factor = vae.factor if vae else 1
    shape = len(texts), model.config["in_channels"], height // factor, width // factor
    noise = torch.randn(shape, generator=generator_for("cpu", c.seed, 0, 2)).to(world.device)
    optimizer.publish(optimizer.ema)
    with torch.compiler.set_stance("force_eager"):  # another batch size: not worth a compilation
        images = sample(model, noise, *embed(texts), *embed([data.empty]), steps=c.sample_steps, cfg_scale=c.cfg_scale,
                        shift=c.shift, predict=c.predict, skipped=c.tread if c.guidance == "self" else 0.0)
    optimizer.publish()
    if world.rank == 0:
        figures.save_grid(to_uint8(vae.decode(images) if vae else images), captions, path)


def train(config: Config, stages: list[Stage]) -> int:
    """Train to the end of the budget. Returns the exit code: 0, or 128 + signal after a checkpoint."""
    from data import encoders, preflight

    if config.stages == "show":
        print(preflight.plan(config, stages))
        return 0
    if config.bench or config.profile:
        from records import bench
        return bench.from_config(config)
    world = setup_world()
    device = world.device
    caught = []  # the first signal is noted, the second one ends the process
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: os._exit(128 + n) if caught else caught.append(n))

    plan = [dataclasses.asdict(stage) for stage in stages]
    run, checkpoint, notes, before = preflight.find_run(config, plan)
    if config.resume != "never" and (run / "transformer/config.json").exists():
        if world.rank == 0:
            print(f"{run} holds a finished run; choose another --name, or give --resume never to throw it away")
        return 0
    datasets, problems = preflight.check(config, stages, world, run)
    locks = not (world.rank or config.dry_run or problems)
    lock = preflight.lock_run(run, problems) if locks else None  # held to the end
    if any(world.agree(len(problems))):
        raise UserError("\n".join(problems))
    if config.dry_run:
        log_once = print if world.rank == 0 else lambda line: None
        log_once(f"{preflight.plan(config, stages, datasets)}\nnothing is in the way; leave --dry-run away to train")
        return 0
    vae = encoders.VAE(config.vae, device) if config.vae != "none" else None
    channels, factor = (vae.channels, vae.factor) if vae else (3, 1)
    for data in datasets:
        preflight.check_latents(config, data, vae)
    stored = datasets[0].text  # what encoded the text that the shards hold, or None
    text_encoder = None if stored else encoders.TextEncoder(config.text, device, config.text_tokens, config.text_pad)

    def embed(texts, part=slice(None)):
        """States (b, T, D) and mask (b, T) of prompts, of stored embeddings, or of such as are padded already."""
        if text_encoder:
            return text_encoder.encode(texts[part])
        states, mask = texts if isinstance(texts, tuple) else pad_text(texts, config.text_pad)
        return states[part].to(device, non_blocking=True), mask[part].to(device, non_blocking=True)

    world.barrier()  # from here on the folder is written to
    if world.rank == 0 and config.resume == "never":
        for old in run.iterdir():
            if old.name != "lock":
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    if world.rank == 0 and not checkpoint:  # nothing to go on from: what a failed start has left does not count
        (run / "metrics.jsonl").unlink(missing_ok=True)
    clock, log = Clock(before), Log(run, world)
    checkpoints = Checkpoints(run, world, log, config.milestone_hours)
    log(f"command: {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}\n"
        f"config: {json.dumps(dataclasses.asdict(config))}\nstages: {stages}\n"
        f"machine: {json.dumps(describe_machine(world))}\n--- source\n{SOURCE}\n--- end of source", show=False)
    for note in notes:
        log(note)

    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    configs = [stage_config(config, stage) for stage in stages]
    routed = any(c.tread or c.sprint for c in configs)
    bf16 = config.compute == "bf16" or config.compute == "auto" and has_fast_bf16(device)
    model = PRX(in_channels=channels, patch_size=config.patch, hidden_size=config.hidden, mlp_ratio=config.mlp_ratio,
                context_in_dim=stored["width"] if stored else text_encoder.width, num_heads=config.heads,
                depth=config.depth, bottleneck_size=config.bottleneck or None, span=span(config) if routed else None,
                sprint=config.sprint > 0, scorer=routed and config.tread_select == "learned").initialize(config.seed)
    model.to(device)
    if config.init and not checkpoint:
        start = load_transformer(config.init)
        if differ := [f"{k} is {v} here and {start.config[k]} there" for k, v in model.config.items()
                      if v != start.config[k]]:
            raise UserError(f"--init {config.init} is another model: {', '.join(differ)}; give the flags that fit it")
        model.load_state_dict(start.state_dict())
    optimizer = MuonAdamW(model.named_parameters(), config, world)
    model.register_forward_pre_hook(lambda *_: optimizer.arrive())  # whoever runs it, waits for its weights
    model.set_compute_dtype(torch.bfloat16 if bf16 else torch.float32, config.fp8)
    model.recompute = config.recompute
    optimizers, teacher, critic = {"": optimizer}, None, None
    state = dict(step=0, stage=0, batches=0, samples=0, first_progress=None, burned_in=False)
    if checkpoint:
        state |= json.loads((checkpoint / "state.json").read_text())
    if any(c.repa for c in configs) and not state["burned_in"]:
        teacher = encoders.Teacher("repa-teacher", config.repa_teacher, device)
        projector = Alignment(config.hidden, teacher.width, config.repa_kind).initialize(config.seed + 1).to(device)
        optimizers["repa."] = MuonAdamW(projector.named_parameters(), config, world)
        projector.set_compute_dtype(torch.bfloat16 if bf16 else torch.float32)
        projector.register_forward_pre_hook(lambda *_: optimizers["repa."].arrive())
    if any(c.pdino for c in configs):
        critic = encoders.Teacher("pdino-teacher", config.pdino_teacher, device)
    if config.weights == "bf16":
        log("--weights bf16 stores the weights in BF16, where small updates round away to nothing: an ablation of how "
            "training fails silently, not a setting to use")
    long = config.steps >= 600 or config.hours >= 1.5 / 60  # two cores: 15 s for a fifth of a step (records/speed.md)
    compiled = config.compile == "on" or config.compile == "auto" and (device.type == "cuda" or long)
    frozen = [net.model for net in (teacher, critic) if net and device.type == "cuda"]  # on CPUs it costs 8 s, saves 2
    if compiled:
        # Which vector instructions there are says the processor; trying the compiler with each took 6 of 29 s
        torch._inductor.config.cpp.vec_isa_ok = True
        torch._dynamo.config.recompile_limit = 64  # shapes; after the default, 8, it would run eagerly
        for module in [*model.blocks, *frozen]:
            module.compile(dynamic=False)  # one graph for all blocks, per shape

    if checkpoint:
        load_checkpoint(checkpoint, optimizers)
        if checkpoint.parent == checkpoints.folder:
            checkpoints.last = checkpoints.written = state["step"]
        log(f"resumed from {checkpoint} at step {state['step']}, {before:.0f} s on the clock")
        log.write(event="resume", step=state["step"], elapsed=clock())
    if world.rank == 0:
        text = json.dumps(dataclasses.asdict(config) | dict(plan=plan), indent=2) + "\n"
        write_atomically(run / "config.json", lambda p: p.write_text(text))
    parameters = sum(p.numel() for p in model.parameters())
    budget = config.hours * 3600 - 1.0 - 2e-8 * parameters  # less the time to write the weights; a guess for 1.2 B
    length = f"{config.steps} steps" if config.steps else f"{config.hours * 60:.3g} minutes"
    log(f"{config.name}: PRX {parameters / 1e6:.1f} M parameters, {'BF16' if bf16 else 'FP32'} compute"
        f"{', compiled' if compiled else ''}, {world.size} rank(s) on {device.type}, {length}, data: "
        + "; ".join(f"{s.name}: {data.about}" if len(stages) > 1 else data.about for s, data in zip(stages, datasets)))

    grid = lambda name: sample_fixed_prompts(model, optimizer, vae, embed, data, c, run / "samples" / f"{name}.png",
                                             world)
    stage, loader, next_grid = None, None, 1
    data, c = datasets[state["stage"]], configs[state["stage"]]

    def losses_of(x_0, eps, t, text, mask, keep, pixels):
        """What to minimise and the plain flow-matching loss, per sample of a micro-batch."""
        aligned = teacher is not None and c.repa > 0
        rows, columns = x_0.shape[2] // c.patch, x_0.shape[3] // c.patch
        if aligned:  # before the model: meanwhile its weights come in from the other ranks
            with torch.no_grad():
                features = teacher(pixels, rows, columns)
        losses, plain, estimate, tapped = flow_matching_loss(model, x_0, eps, t, text, mask, c.predict, c.contrastive,
                                                             keep, c.repa_layer if aligned else None)
        if aligned:
            losses = losses + c.repa * projector(*tapped, features, rows, columns)
        if c.pdino:
            losses = losses + c.pdino * perceptual_loss(critic, estimate, x_0)
        return losses, plain

    if compiled:  # now: the warm-up of a time-driven schedule must not pass while its first step compiles
        b, (height, width) = c.batch // c.accumulate // world.size, data.sizes[0]
        x = torch.zeros(b, channels, height // factor, width // factor, device=device)
        keep = route(b, x, c.patch, c.tread + c.sprint, None) if c.tread + c.sprint else None
        text = embed((data.prompts(16)[0] * b)[:b])
        pixels = torch.zeros(b, 3, height, width, device=device)
        try:
            losses_of(x, x, torch.ones(b, device=device), *text, keep, pixels)[0].sum().backward()
        except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, a broken one, no Python headers
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log(f"torch.compile does not work here, so the blocks run uncompiled, which is slower ({reason})")
            torch.compiler.set_stance("force_eager")
        for each in optimizers.values():
            each.zero_grad()
    [elapsed] = world.agree(clock())
    heart, last_checkpoint = Heartbeat(log, world, elapsed), elapsed

    def heartbeat():
        tokens = x_0.shape[2] * x_0.shape[3] // c.patch ** 2
        skipped, (first, last) = c.tread + c.sprint, span(c)
        flops = flops_per_image(model.config, tokens, text.shape[1], skipped, (last - first + 1) * (skipped > 0))
        heart.beat(elapsed, c.batch, 3 * flops, step=state["step"], samples=state["samples"], stage=stage,
                   data_stall_s=loader.stall, skipped_steps=optimizer.skipped.item(),
                   **(dict(lost_updates=optimizer.lost.item()) if c.weights == "bf16" else {}))
        if optimizer.skipped_in_a_row.item() >= 10:
            checkpoints.save(optimizers, state, elapsed, wait=True)
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
                log(f"stage {stages[now].name}: {stages[now].knobs}")
            stage, data, c = now, datasets[now], configs[now]
            for each in optimizers.values():
                each.config = c
            if loader:
                loader.stopped = True
            share = c.batch // world.size
            rows = slice(world.rank * share, (world.rank + 1) * share)
            loader = Prefetch(host_batches(data, c, state["batches"], state["step"], rows),
                              depth=3 if device.type == "cuda" else 0)

        over = (progress if c.repa_until <= 1 else state["samples"]) >= c.repa_until
        if teacher and (over or not any(k.repa for k in configs[stage:])):
            teacher = projector = None
            optimizers.pop("repa.").arrive()
            state["burned_in"] = True
            log(f"REPA ends at step {state['step']}: the teacher is gone from memory, the projector from the optimizer")
        moving = [each for prefix, each in optimizers.items() if not prefix or c.repa]  # no projector in stages without
        x, t, texts, images = next(loader)
        x_0, t = to_latents(x, vae, device), t.to(device, non_blocking=True)
        noise = generator_for(device, c.seed, state["step"], 1)
        eps = torch.randn(c.batch, *x_0.shape[1:], generator=noise, device=device)[rows]
        keep = route(c.batch, x_0, c.patch, c.tread + c.sprint, noise)[rows] if c.tread + c.sprint else None
        pixels = to_latents(x if images is None else images, None, device) if teacher and c.repa else None
        loss, by_time = torch.zeros((), device=device), torch.zeros(2, 10, device=device)
        for i in range(0, share, share // c.accumulate):
            part = slice(i, i + share // c.accumulate)
            text, mask = embed(texts, part)
            losses, plain = losses_of(x_0[part], eps[part], t[part], text, mask, None if keep is None else keep[part],
                                      None if pixels is None else pixels[part])
            (losses.sum() / share).backward()
            for each in moving:
                each.accumulate()
            loss += plain.sum() / share
            by_time.index_add_(1, (t[part] * 10).long(), torch.stack([plain, torch.ones_like(plain)]))
        norm, *_ = [each.step(lr_share(progress, state["first_progress"], c), wait=False) for each in moving]
        heart.add(loss, by_time, norm, progress)
        state |= dict(step=state["step"] + 1, batches=state["batches"] + 1, samples=state["samples"] + c.batch)

        due = elapsed - last_checkpoint >= config.checkpoint_minutes * 60
        if due or elapsed - heart.last >= heart.EVERY:  # a checkpoint's steps are in the log before it is written
            heartbeat()
        if due:
            checkpoints.save(optimizers, state, elapsed)
            last_checkpoint = elapsed
        if progress * (config.samples + 1) >= next_grid <= config.samples:
            grid(f"step-{state['step']:08d}")
            next_grid += 1

    if heart.pending:
        heartbeat()
    if loader:
        loader.stopped = True
    if progress < 1:  # a signal or --stop-after
        checkpoints.save(optimizers, state, elapsed, wait=True)
        log.write(event="stopped", step=state["step"], elapsed=clock())
        if checkpoints.written != state["step"]:
            raise TrainingFailed(f"stopped at step {state['step']}, whose checkpoint could not be written; the same "
                                 "command goes on from the one before")
        log(f"stopped at step {state['step']} with a checkpoint in {run}; the same command"
            f"{'' if number else ', with a later --stop-after or none,'} goes on from there")
        return 128 + int(number) if number else 0
    if state["step"] == 0:
        raise TrainingFailed(f"no step fits into --hours {config.hours:.4g}: start-up took {elapsed:.0f} s; give more")
    optimizer.update_ema()
    weights, work = optimizer.all_ranks(optimizer.ema)
    if work:
        work.wait()
    if world.rank == 0:
        export_transformer(model.config, {n: weights[n].cpu() for n in optimizer.params}, run / "transformer")
    seconds = clock()  # the clock stops here
    log(f"finished: {state['step']} steps, {state['samples']:,} images, {seconds:.1f} s from process start to final "
        f"weights on disk, data stall {loader.stall if loader else 0:.1f} s")
    log.write(event="finished", step=state["step"], elapsed=seconds, samples=state["samples"])
    checkpoints.save(optimizers, state, seconds, wait=True)
    grid("final")
    if world.rank == 0:
        from records import figures
        figures.plot_curve(run)
    log(f"wrote {run}/transformer, {run}/samples/final.png and {run}/curve.png"
        + f"; next: python eval_prx.py {run}" * (config.data == "scenes")
        + "; its fuse or scorer is not in diffusers' model, which cannot load it" * ("span" in model.config))
    world.barrier()
    if lock:
        lock.close()
    return 0


def main(argv=None) -> int:
    """Exit code 0, 1 after a failure, 2 for bad input, 128 + signal after a checkpoint on a signal."""
    try:
        from data.settings import parse_args
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
