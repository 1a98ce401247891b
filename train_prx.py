"""PRX speedrun: train a text-to-image diffusion transformer from scratch, in one readable script.

    python data/scenes.py --track micro && python train_prx.py --track micro    # two CPU cores: watch it learn
    python data/scenes.py --track mini && python train_prx.py --track mini      # one GPU, four minutes, 256 px scenes
    torchrun --standalone --shutdown-timeout=300 --nproc_per_node=8 train_prx.py   # the 24 h track: PRX-1.2B, 8 GPUs
    python train_prx.py --track micro --data MINE       # your own images, prepared with data/prepare.py
    python RUN/train_prx.py --paint REQUEST.json --out IMAGES.safetensors    # images of a run (records/README.md)

The script needs nothing of its repository but prepared shards (data/README.md). A run's folder logs/NAME holds this
source, log.txt, metrics.jsonl, samples/, checkpoint/ and transformer/, which diffusers' PRXTransformer2DModel loads.
`python eval_prx.py logs/NAME` measures it. Model: PRX, Photoroom 2026.

Best record: `micro`, 96.28 % prompt accuracy (mean of 3 seeds, worst 95.91 %) in 60 seconds on 2 cores of an AMD EPYC
with AVX512-BF16, torch 2.13.0, 2026-11-25 (protocol 1). Logs and rules: records/README.md.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import importlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Read at once: the log holds the code that runs, not what the file is edited to meanwhile
SOURCE = Path(__file__).read_text()
# Before CUDA starts: shapes vary from stage to stage, and repeated runs are to agree
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class UserError(Exception):
    """Bad input: one sentence that names the value and says what to do. Exit code 2."""

    everywhere = False  # do all ranks raise it? Then rank 0 alone says it


class TrainingFailed(Exception):
    """The run cannot go on. The last checkpoint stands. Exit code 1."""

    everywhere = True


class LostPeers(TrainingFailed):
    """Another rank is gone."""

    everywhere = False


# =====================================================================================================================
# 2. Configuration: every knob, once, with its evidence. What nobody tunes is a constant beside its use.
# =====================================================================================================================
# Figures are FID in Photoroom's ablation study, PRX part 2 (FLUX VAE, 256 px, 100k steps), unless they say otherwise.

def knob(default, help: str, choices: str = ""):
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices.split() or None))


@dataclasses.dataclass(frozen=True)
class Config:
    # run
    track: str = knob("24h", "data, model, length and rules", "24h mini micro")
    name: str = knob("", "folder of the run in logs/; empty: the track, and your data")
    seed: int = knob(0, "every draw is a function of (seed, step, global sample)")
    steps: int = knob(0, "length in steps, reproducible to the bit")
    hours: float = knob(24.0, "or length in hours, process start to final weights")
    stages: str = knob("all", "which of the track's, such as 256px,sft")
    init: str = knob("", "start from a PRX in diffusers format: folder or owner/name")
    dry_run: bool = knob(False, "open everything, warm up, print the plan and stop")
    resume: str = knob("auto", "auto: newest checkpoint | never: start again | a run")
    stop_after: int = knob(0, "checkpoint and stop after this many steps in all")
    # data
    data: str = knob("", "prepared folders: A or A:0.7,B:0.3; empty: shards/TRACK")
    sft_data: str = knob("", "for 24h's last stage; empty: shards/24h-sft if it exists")
    resolution: int = knob(256, "pixels per side, or root of a bucket's area")
    batch: int = knob(256, "images per step over all ranks")
    accumulate: int = knob(1, "micro-batches per step, summed in FP32")
    captions: str = knob("long", "long | short | mix:P of short. 18.20 long, 36.84 short")
    # what the model sees; --vae brings patch, bottleneck, predict and shift that fit
    vae: str = knob("repa-e", "repa-e (12.08) | flux (18.20) | flux2 | dc-ae | folder | none")
    patch: int = knob(2, "side of a token in pixels of the latent or image")
    bottleneck: int = knob(0, "pixels: patch -> bottleneck -> hidden; 0: one Linear")
    predict: str = knob("v", "the network's output; the loss is in v-space", "x v")
    shift: float = knob(1.0, "of times: t <- s t / (1 + (s - 1) t). PRX: pixels 3.0")
    # model: PRX-1.2B
    hidden: int = knob(1792, "width")
    depth: int = knob(16, "blocks")
    heads: int = knob(28, "attention heads; hidden / heads is a multiple of 4")
    mlp_ratio: float = knob(3.5, "width of the gated MLP over hidden")
    text: str = knob("t5gemma", "encoder: t5gemma | tiny (DATA/text) | repository or folder")
    text_tokens: int = knob(256, "text is cut or padded to this: one shape to compile")
    # objective
    contrastive: float = knob(0.0, "weight, arXiv 2506.05350. 18.20 -> 20.03")
    caption_dropout: float = knob(0.1, "share of empty prompts, for guidance")
    # REPA: one block's tokens against a frozen vision transformer's, arXiv 2410.06940
    repa: float = knob(0.0, "weight. 18.20 -> 14.64 with DINOv3, 16.6 with DINOv2")
    repa_kind: str = knob("repa", "irepa helps DINOv2, hurts DINOv3", "repa irepa")
    repa_teacher: str = knob("dinov3", "dinov3 | dinov2 | tiny (DATA/teacher) | repository")
    repa_layer: int = knob(7, "the block, from 0, whose output is aligned")
    repa_until: float = knob(1.0, "share of the run after which alignment ends")
    pdino: float = knob(0.0, "weight of P-DINO, pixels only; 0.01 in part 3")
    pdino_teacher: str = knob("facebook/dinov2-base", "as --repa-teacher")
    # routing: some tokens skip some blocks in training; sampling takes all
    tread: float = knob(0.0, "share, arXiv 2501.04765. 21.61; at 1024 px 17.42 -> 14.10")
    tread_blocks: str = knob("2-12", "the blocks, from 0, both included")
    tread_select: str = knob("random", "learned: a scorer picks tokens", "random learned")
    sprint: float = knob(0.0, "share, dense and deep fused, arXiv 2510.21986")
    # optimizer
    optimizer: str = knob("muon", "muon: the blocks' matrices. 18.20 -> 15.55", "muon adamw")
    lr: float = knob(1e-4, "of Muon, scaled as AdamW's; with adamw, of everything")
    lr_adamw: float = knob(1e-4, "of what Muon leaves to AdamW")
    warmup: float = knob(0.01, "linear warm-up over this share of the run")
    decay_from: float = knob(0.7, "linear decay to zero from this share; 1: none")
    momentum: float = knob(0.95, "Muon's, Nesterov")
    ns_steps: int = knob(5, "Newton-Schulz iterations; micro needs 3")
    modulation: str = knob("muon", "who moves it; adamw: 25 % fewer FLOPs", "muon adamw")
    eps: float = knob(1e-8, "AdamW's; 1e-15 in part 2")
    weight_decay: float = knob(0.0, "decoupled, of everything")
    clip: float = knob(1.0, "largest gradient norm of a module; 0.2 in part 2")
    ema: float = knob(0.999, "decay per step of the FP32 average; 0: off")
    # precision and speed
    weights: str = knob("fp32", "of masters. bf16: 18.20 -> 21.87, an ablation", "fp32 bf16")
    compute: str = knob("auto", "of matmuls; masters stay FP32", "auto bf16 fp32")
    compile: str = knob("auto", "the blocks; auto: where it pays back", "auto on off")
    # output
    sample_steps: int = knob(25, "Euler steps of the sample grids")
    cfg_scale: float = knob(3.0, "guidance of the sample grids")
    samples: int = knob(4, "grids and EMA exports, on the clock; one more at the end")
    checkpoint_minutes: float = knob(30.0, "between checkpoints; the last two are kept")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run: its share of the length and the knobs that differ in it."""

    name: str = "main"
    share: float = 1.0
    knobs: dict = dataclasses.field(default_factory=dict)

    def config(self, c: Config) -> Config:
        return dataclasses.replace(c, **self.knobs)


# What fits a latent space. DC-AE's and FLUX.2's latents are one token per pixel.
LATENTS = dict(patch=2, bottleneck=0, predict="v", shift=1.0)
SPACES = {"none": dict(patch=32, bottleneck=256, predict="x", shift=3.0),
          "dc-ae": LATENTS | dict(patch=1),
          "flux2": LATENTS | dict(patch=1)}

TRACKS = {
    # Shares, batches and rates are guesses (rate times sqrt(batch / 256)): no such run has been made. REPA ends after
    # about 51 M samples (part 2), by the derived speed. Shift at 512 px: the root of the tokens (arXiv 2403.03206).
    "24h": (Config(repa=0.5, repa_until=0.26), [
        Stage("256px", 0.65, dict(batch=1024, lr=2e-4, lr_adamw=2e-4)),
        Stage("512px", 0.3, dict(resolution=512, batch=512, accumulate=2, shift=2.0,
                                 captions="mix:0.2", repa=0.0, tread=0.5)),
        Stage("sft", 0.05, dict(resolution=512, batch=256, shift=2.0, captions="mix:0.2",
                                repa=0.0, lr=5e-5, lr_adamw=5e-5))]),
    # 256 tokens of 16 px. A guess from the micro track's search: not measured yet.
    "mini": (Config(
        track="mini", hours=4 / 60, vae="none", patch=16, bottleneck=128, predict="x", shift=3.0,
        hidden=512, depth=8, heads=8, text="tiny", text_tokens=64, repa_teacher="tiny", repa_layer=3,
        pdino_teacher="tiny", tread_blocks="1-6", lr=2e-3, lr_adamw=2e-3, warmup=0.03, decay_from=0.3,
        ema=0.99, checkpoint_minutes=5), [Stage()]),
    # From records/notes/search: shift (1.0: 97.8 % prompt accuracy at 38,400 images, 2.0: 94.3 %), decay, EMA, REPA,
    # batch, rates, momentum, modulation. No long caption has more than 37 tokens.
    "micro": (Config(
        track="micro", steps=1100, hours=0.0, resolution=32, batch=32, vae="none", patch=8, predict="x",
        hidden=128, depth=6, heads=4, text="tiny", text_tokens=40, repa=4.0, repa_teacher="tiny",
        repa_layer=2, repa_until=0.6, pdino_teacher="tiny", tread_blocks="1-4", lr=7e-3, lr_adamw=2e-3,
        momentum=0.85, modulation="adamw", ns_steps=3, warmup=0.04, decay_from=0.5, ema=0.0, samples=2,
        checkpoint_minutes=2), [Stage()]),
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse_args(argv: list[str]) -> tuple[Config, list[Stage]]:
    """The track's settings, then what fits the latent space, then the flags, which hold in every stage."""
    parser = Parser(description="Train PRX. Defaults are those of the 24h track.", allow_abbrev=False)
    for field in dataclasses.fields(Config):
        kind = dict(type=field.type, choices=field.metadata["choices"], metavar=field.name.upper())
        if field.type is bool:
            kind = dict(action="store_true")
        help = f"{field.metadata['help']} [{field.default}]".replace("%", "%%")
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=help, **kind)
    flags = vars(parser.parse_args(argv))
    config, stages = TRACKS[flags.get("track", "24h")]
    if flags.get("steps") and flags.get("hours"):
        raise UserError("--steps and --hours both give the length of the run; give one of them")
    if flags.get("steps") or flags.get("hours"):
        flags = dict(steps=0, hours=0.0) | flags
    space, usual = (SPACES.get(vae, LATENTS) for vae in (flags.get("vae", config.vae), config.vae))
    given = {k: v for k, v in space.items() if v != usual[k]} | flags
    config = dataclasses.replace(config, **given)

    name = [config.track]
    if config.data:
        name += [re.sub(r"[^\w.-]", "_", Path(p).resolve().name) for p, _ in data_folders(config.data)]
    sft = config.sft_data
    if not sft and not config.data and Path("shards/24h-sft/index.json").exists():
        sft = "shards/24h-sft"
    config = dataclasses.replace(config, name=config.name or "-".join(name),
                                 data=config.data or f"shards/{config.track}")
    stages = [s for s in stages if s.name != "sft" or sft]
    wanted = [s.name for s in stages] if config.stages == "all" else config.stages.split(",")
    if unknown := set(wanted) - {s.name for s in stages}:
        raise UserError(f"--stages {','.join(sorted(unknown))} is unknown; this run has "
                        f"{','.join(s.name for s in stages)} (sft needs --sft-data)")
    chosen = []
    for stage in stages:
        if stage.name in wanted:
            knobs = {k: v for k, v in stage.knobs.items() if k not in given}
            chosen.append(Stage(stage.name, stage.share, knobs | (dict(data=sft) if stage.name == "sft" else {})))
    if problems := [p for stage in chosen for p in problems_in(stage.config(config))]:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return config, chosen


def data_folders(data: str) -> list[tuple[str, float]]:
    """A:0.7,B:0.3 -> [("A", 0.7), ("B", 0.3)]; without a weight it is 1. A folder that exists is one folder."""
    if Path(data).exists():
        return [(data, 1.0)]
    parts = [re.fullmatch(r"(.+?)(?::(\d*\.?\d+))?", part) for part in data.split(",")]
    if not all(parts) or any(p[2] and float(p[2]) == 0 for p in parts):
        raise UserError(f"--data {data} is no list of folders with positive weights such as A or A:0.7,B:0.3")
    return [(p[1], float(p[2] or 1)) for p in parts]


def routed_blocks(c: Config) -> tuple[int, int]:
    """The first block that routed tokens skip, and one past the last."""
    first, last = map(int, c.tread_blocks.split("-"))
    return first, last + 1


def problems_in(c: Config) -> list[str]:
    """A sentence for everything that cannot work, before anything is loaded."""
    says = lambda name, rule: f"{flag(name)} {getattr(c, name)} {rule}"
    positive = ("batch accumulate resolution hidden depth heads mlp_ratio patch text_tokens shift lr lr_adamw eps "
                "ns_steps sample_steps checkpoint_minutes")
    shares = "caption_dropout warmup decay_from repa_until"
    below_one = "momentum ema tread sprint"
    amounts = "steps hours stop_after bottleneck samples contrastive repa repa_layer pdino weight_decay clip"
    problems = [says(k, "must be positive") for k in positive.split() if not 0 < getattr(c, k) < math.inf]
    problems += [says(k, "must lie in 0 to 1") for k in shares.split() if not 0 <= getattr(c, k) <= 1]
    problems += [says(k, "must be at least 0 and less than 1") for k in below_one.split() if not 0 <= getattr(c, k) < 1]
    problems += [says(k, "must not be negative") for k in amounts.split() if not 0 <= getattr(c, k) < math.inf]
    if not re.fullmatch(r"\d+-\d+", c.tread_blocks):
        problems.append(says("tread_blocks", "must name a first and a last block, such as 2-12"))
    if problems:
        return problems
    routes, (first, end) = c.tread or c.sprint, routed_blocks(c)
    in_route = routes and first <= c.repa_layer < end
    rules = [
        (0 <= c.seed < 2 ** 63, says("seed", "must lie in 0 to 2^63 - 1")),
        (c.steps or c.hours, "the run has no length; give --steps or --hours"),
        (c.warmup <= c.decay_from, says("warmup", f"ends after --decay-from {c.decay_from} begins; lower one")),
        (c.hidden % (4 * c.heads) == 0, says("hidden", f"over --heads {c.heads} must be a multiple of 4")),
        (c.batch % c.accumulate == 0, says("batch", f"cannot be cut into --accumulate {c.accumulate} parts")),
        (not (c.tread and c.sprint), "--tread and --sprint both route tokens; choose one of them"),
        (not routes or first < end <= c.depth, says("tread_blocks", f"must lie in 0 to {c.depth - 1}")),
        (not c.repa or c.repa_layer < c.depth, says("repa_layer", f"must be one of 0 to {c.depth - 1}")),
        (not (c.repa and c.repa_kind == "irepa" and in_route),
         says("repa_layer", f"must see all tokens for irepa, unlike blocks {c.tread_blocks}")),
        (not c.pdino or c.vae == "none", "--pdino compares pixels; give --vae none"),
        (not c.contrastive or c.batch // c.accumulate % NEGATIVES == 0,
         says("batch", f"over --accumulate must be a multiple of {NEGATIVES} for --contrastive")),
        (re.fullmatch(r"long|short|mix:(0(\.\d+)?|1(\.0+)?)", c.captions),
         says("captions", "is unknown; use long, short or mix:0.3")),
        (re.fullmatch(r"[\w.-]+", c.name) and c.name.strip("."),
         f"--name {c.name!r} must be a plain folder name (letters, digits, . _ -)"),
    ]
    return [message for holds, message in rules if not holds]


# =====================================================================================================================
# 3. Ranks, clock and log: torchrun's variables or one plain process; rank 0 speaks, the clock never stops.
# =====================================================================================================================

TIMEOUT = datetime.timedelta(minutes=10)  # of collectives. None waits for a disk
PEAK_FLOPS = 989e12  # dense BF16 of an H100 or H200 as others count it; MFU is the model's FLOPs over this


@dataclasses.dataclass
class World:
    """This process among its peers. `control`: a gloo group for decisions on the CPU, None for one rank."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    control: object = None
    store: object = dataclasses.field(default_factory=dist.HashStore)
    torchrun: object = None  # torchrun's store, which outlives a restart
    signal: int = 0
    turns: int = 0

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over the ranks: a time, a flag. No GPU is synchronised."""
        if self.control is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        try:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        except RuntimeError as error:
            raise LostPeers(f"lost its peers ({str(error).splitlines()[0]}); the last checkpoint stands, and the "
                            "same command goes on from it") from None
        return tensor.tolist()

    def gather(self, value) -> list:
        """One object of each rank, by rank."""
        values = [value] * self.size
        if self.control is not None:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def refuse(self, problems: list[str]):
        """UserError on all ranks if there is a problem on any: each problem once."""
        if found := [p for rank in self.gather(problems) for p in rank]:
            error = UserError("\n".join(dict.fromkeys(found)))
            error.everywhere = True
            raise error

    def first(self, work) -> str:
        """Rank 0 does the work; the others wait for it on the store, in no collective, so that a slow disk ends no
        group. Returns what was in the way (an OSError), or nothing."""
        self.turns += 1
        key = f"turn-{self.turns}"
        if self.rank == 0:
            said = "done"
            try:
                work()
            except OSError as error:
                said = str(error)
            self.store.set(key, said)
        while not self.store.check([key]):
            time.sleep(0.05)
        said = self.store.get(key).decode()
        return "" if said == "done" else said


def connect() -> World:
    """NCCL with CUDA, gloo without."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # FP32 means FP32
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return World(device=device)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        torchrun, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # Without a prefix a restart finds the dead ranks' addresses in the store
        store = dist.PrefixStore(f"attempt-{attempt}", torchrun)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                                timeout=TIMEOUT, device_id=device if cuda else None)
    except (RuntimeError, ValueError) as error:  # the port is taken, a host is not there, a variable is missing
        raise UserError(f"the ranks cannot meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
                        f"({str(error).splitlines()[0]}); start them with torchrun --standalone, or give it another "
                        "--master_port") from None
    world = World(rank, size, device, dist.new_group(backend="gloo", timeout=TIMEOUT), store, torchrun)
    if attempt != "0" and torchrun.check(["verdict"]):  # starting again helps against crashes only
        world.refuse([f"the attempt before ended for good: {torchrun.get('verdict').decode()}"])
    return world


def watch_signals(world: World):
    """SIGTERM and SIGINT ask for a checkpoint and the end. A repeat changes nothing: torchrun and Slurm both forward
    signals, so they come twice. Ctrl-C more than three seconds after the first signal ends the process at once."""
    came = []

    def note(number, _):
        if not came:
            world.signal = number
            came.append(time.monotonic())
        elif number == signal.SIGINT and time.monotonic() - came[0] > 3:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)


class Clock:
    """Wall-clock seconds of the run: since process start, plus what earlier processes of the same run took."""

    def __init__(self, before: float = 0.0):
        age = 0.0
        with contextlib.suppress(OSError, ValueError, IndexError):  # Linux; elsewhere the imports are missed
            ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        self.start = time.perf_counter() - age - before

    def __call__(self) -> float:
        return time.perf_counter() - self.start


class Log:
    """log.txt for people, metrics.jsonl for machines, a progress line for the terminal. Only rank 0 speaks."""

    def __init__(self, folder: Path | None, world: World):
        self.on = world.rank == 0
        self.live = self.on and sys.stderr.isatty()
        if self.on:
            self.text = open(folder / "log.txt" if folder else os.devnull, "a")
            self.metrics = open(folder / "metrics.jsonl" if folder else os.devnull, "a")
            self.metrics.write("\n" if self.metrics.tell() else "")  # a line that a crash cut short stays alone

    def __call__(self, line: str, show: bool = True):
        if self.on:
            with contextlib.suppress(OSError):  # a full disk ends no run
                self.text.write(line + "\n")
                self.text.flush()
            if show:
                print("\r\033[K" + line if self.live else line, flush=True)

    def write(self, **record):
        """One line of metrics.jsonl. JSON knows no NaN: what is not finite becomes null."""
        if self.on:
            clean = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
            record = {k: [clean(x) for x in v] if isinstance(v, list) else clean(v) for k, v in record.items()}
            with contextlib.suppress(OSError):
                self.metrics.write(json.dumps(record | dict(time=time.time())) + "\n")
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
        """images: per step, of all ranks. flops: of a training step per image. record: what else is written."""
        losses, by_time, norms, progresses = zip(*self.pending)
        losses, by_time, norms = torch.stack(losses), torch.stack(by_time).sum(0), torch.stack(norms)
        if self.world.size > 1:
            dist.all_reduce(losses)
            dist.all_reduce(by_time)
        losses, (error, count) = (losses / self.world.size).tolist(), by_time.cpu()
        loss, progress, rate = np.mean(losses), progresses[-1], images * len(losses) / max(now - self.last, 1e-3)
        self.log.write(progress=progress, elapsed=now, loss=float(loss), losses=losses, progresses=list(progresses),
                       grad_norm=norms.mean().item(), loss_by_time=(error / count.clamp(min=1)).tolist(),
                       images_per_s=rate, cpu_s=time.process_time(), **record)
        mfu = f"MFU {flops * rate / self.world.size / PEAK_FLOPS:.1%}  " if self.world.device.type == "cuda" else ""
        left = now * (1 / progress - 1) if progress else 0.0
        self.log.progress(f"step {record['step']:6d}  {progress:6.1%}  loss {loss:.4f}  {rate:,.0f} images/s  {mfu}"
                          f"{now:.0f} s, {left:.0f} s left", int(progress * 20) > self.shown)
        self.last, self.pending, self.shown = now, [], int(progress * 20)


def read_metrics(run: Path) -> list[dict]:
    """The records of metrics.jsonl; a line that a crash cut short is passed over."""
    path, records = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and "elapsed" in r]


def cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def describe_machine(world: World) -> dict:
    """What a figure needs beside it to mean anything."""
    versions = {p: importlib.metadata.version(p) for p in ("torch", "numpy", "safetensors", "transformers")}
    cpus = re.findall(r"model name\s*: (.+)", cpu_info()) or [platform.processor()]
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return dict(python=platform.python_version(), **versions, cpu=cpus[0], cpus=os.cpu_count(),
                threads=torch.get_num_threads(), gpu=gpu, ranks=world.size)


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
    arange = lambda n, step=1: torch.arange(0, n, step, dtype=torch.float64)
    ids = torch.cartesian_prod(arange(rows), arange(columns))                          # (N, 2)
    angle = torch.cat([ids[:, i, None] * theta ** -(arange(d, 2) / d) for i, d in enumerate(axes_dim)], 1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x, rope):
    """Rotate neighbouring pairs of channels in FP32 (RoPE, arXiv 2104.09864). x (B, H, N, d) FP32."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def attention_dtype(x):
    """The compute dtype on CUDA. On a CPU FP32: its BF16 attention took 11 ms backward, FP32 1.2 (notes/speed.md)."""
    return x.dtype if x.is_cuda else torch.float32


# PyTorch's own order on Hopper begins with cuDNN, whose gradients are known to go wrong with a mask where the keys are
# 64 more than a multiple of 128: half of our shapes. It is a variant (records/variants.py) until a GPU has compared it
BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


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
        q = rotate(self.norm_q(q), rope).to(dtype)
        k = rotate(self.norm_k(k), rope).to(dtype)
        k = torch.cat([self.norm_added_k(text_k).to(dtype), k], 2)
        v = torch.cat([text_v, v], 2).to(dtype)               # (B, H, T + N, d)
        with sdpa_kernel(BACKENDS, set_priority=True):
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


def take(h, index):
    """Tokens by number: h (B, N, D), index (B, K) -> (B, K, D)."""
    return h.gather(1, index[..., None].expand(-1, -1, h.shape[-1]))


class PRX(nn.Module):
    """The denoiser: image or latent x_t, time and text in; x_0 or velocity out. Arguments as diffusers' config.json.

    forward: x (B, C, H, W), t (B,) in (0, 1], text (B, T, context_in_dim), mask (B, T) bool or None -> (B, C, H, W).
    A fresh PRX outputs zero: every gate and the final layer start at zero.

    Routing: blocks span[0] to span[1] - 1 see the tokens `keep` (B, K), or the K that the scorer likes best; others
    skip. TREAD puts them back as they were. SPRINT (sprint=True, also when all tokens are kept) fuses the tokens before
    the span with those after it, where a learned token stands for the skipped ones. With `tap`, the output of that
    block comes along, and which tokens it holds (None: all).
    """

    def __init__(self, in_channels=16, patch_size=2, context_in_dim=2304, hidden_size=1792, mlp_ratio=3.5,
                 num_heads=28, depth=16, axes_dim=None, theta=10000, time_factor=1000.0, time_max_period=10000,
                 bottleneck_size=None, span=None, sprint=False, scorer=False):
        super().__init__()
        axes_dim = list(axes_dim or (hidden_size // num_heads // 2,) * 2)
        self.config = dict(in_channels=in_channels, patch_size=patch_size, context_in_dim=context_in_dim,
                           hidden_size=hidden_size, mlp_ratio=mlp_ratio, num_heads=num_heads, depth=depth,
                           axes_dim=axes_dim, theta=theta, time_factor=time_factor,
                           time_max_period=time_max_period, bottleneck_size=bottleneck_size)
        if sprint or scorer:  # not in diffusers' model: what follows must be known to load the weights again
            self.config |= dict(span=list(span), sprint=sprint, scorer=scorer)
        self.span, patch_dim = span or (depth, depth), in_channels * patch_size ** 2
        self.img_in = Linear(patch_dim, hidden_size)
        if bottleneck_size:
            self.img_in = nn.Sequential(Linear(patch_dim, bottleneck_size), Linear(bottleneck_size, hidden_size))
        self.time_in = TimeEmbedder(hidden_size)
        self.txt_in = Linear(context_in_dim, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_dim)
        self.skipped_token = nn.Parameter(torch.zeros(hidden_size)) if sprint else None
        self.fuse = Linear(2 * hidden_size, hidden_size) if sprint else None
        self.scorer = Linear(hidden_size, 1) if scorer else None
        self.ropes = {}  # (rows, columns, device) -> table

    def time_embedding(self, t):  # (B,) -> (B, 256): cosines, then sines, of t * time_factor * period^(-i/128)
        freqs = torch.exp(-math.log(self.config["time_max_period"]) * torch.arange(128, device=t.device) / 128)
        angle = self.config["time_factor"] * (t.float()[:, None] * freqs)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def rope(self, rows, columns, device):
        key = rows, columns, device
        if key not in self.ropes:
            self.ropes[key] = rope_table(rows, columns, self.config["axes_dim"], self.config["theta"], device)
        return self.ropes[key]

    def forward(self, x, t, text, mask=None, keep=None, tap=None):
        B, C, H, W = x.shape
        p = self.config["patch_size"]
        rows, columns = H // p, W // p
        h = x.view(B, C, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(B, rows * columns, C * p * p)
        h, text, vec = self.img_in(h), self.txt_in(text), self.time_in(self.time_embedding(t))
        rope, tapped = self.rope(rows, columns, x.device), None
        if mask is not None:  # additive and broadcast, once for all blocks: (B, 1, 1, T + N)
            padding = F.pad(~mask.bool(), (0, h.shape[1]))[:, None, None]
            mask = torch.zeros(padding.shape, dtype=attention_dtype(h), device=x.device)
            mask = mask.masked_fill_(padding, -torch.inf)

        def run(h, start, stop, rope, mask, kept=None):
            nonlocal tapped
            for i in range(start, stop):
                h = self.blocks[i](h, text, vec, rope, mask)
                if i == tap:
                    tapped = h, kept
            return h

        first, end = self.span
        dense = h = run(h, 0, first, rope, mask)
        if keep is None:
            h = run(h, first, end, rope, mask)
        else:
            kept, gate = self.choose(h, keep)                                          # (B, K), (B, K, 1)
            kept_rope = [table[kept][:, None] for table in rope]
            kept_mask = None if mask is None else mask[..., :text.shape[1] + kept.shape[1]]
            h = run(take(h, kept), first, end, kept_rope, kept_mask, kept)             # (B, K, D)
            rest = dense if self.fuse is None else self.skipped_token.to(h.dtype).expand_as(dense)
            h = rest.scatter(1, kept[..., None].expand_as(h), h * gate.to(h.dtype))
        if self.fuse is not None:
            h = self.fuse(torch.cat([dense, h], -1))
        h = run(h, end, len(self.blocks), rope, mask)
        h = self.final_layer(h, vec)
        h = h.view(B, rows, columns, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
        return h if tap is None else (h, *tapped)

    def choose(self, h, keep):
        """Which tokens go on, (B, K), and a factor of exactly 1 for each, (B, K, 1), through which the scorer learns:
        its gradient is that of scaling the routed tokens by the sigmoid of their scores (as in Mixture-of-Depths, arXiv
        2404.02258), while the values are those of plain routing, so that sampling with all tokens is no other model."""
        if self.scorer is None:
            return keep, torch.ones(1, 1, 1, device=h.device)
        score = self.scorer(h).float()                                                 # (B, N, 1)
        kept = score[..., 0].topk(keep.shape[1], 1).indices.sort(1).values
        weight = take(score, kept).sigmoid()
        return kept, 1 + weight - weight.detach()


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> nn.Module:
    """Matrices uniform in +-1/sqrt(fan_in) (torch's default); biases, gates and the final layer zero; norms one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if name == "fuse.weight":  # at first the fused tokens are the deep ones: a plain PRX
            p.copy_(torch.eye(*p.shape).roll(len(p), 1))
        elif p.ndim == 2 and not re.search(r"modulation\.|adaLN|final_layer", name):
            p.copy_(torch.empty(p.shape).uniform_(-1, 1, generator=generator) * p.shape[1] ** -0.5)
        elif p.ndim == 2 or name.endswith("bias") or name == "skipped_token":
            p.zero_()
        else:
            assert re.search(r"norm_(q|k|added_k)\.weight$", name), f"no rule initialises {name} {tuple(p.shape)}"
            p.fill_(1.0)
    return module


def set_compute_dtype(module: nn.Module, dtype: torch.dtype):
    """Matrices in `dtype`, 1-D parameters in FP32. The optimizer keeps FP32 masters of all."""
    for p in module.parameters():
        p.data = p.data.to(dtype if p.ndim == 2 else torch.float32)


def flops_per_image(config: dict, tokens: int, text_tokens: int, kept: int = 0, span=(0, 0)) -> float:
    """Matmul FLOPs of one forward pass of one image, less the time embedding's. A training step is three times that.
    The blocks of the span see `kept` tokens only."""
    d, patch = config["hidden_size"], config["in_channels"] * config["patch_size"] ** 2
    routed = span[1] - span[0] if kept else 0

    def block(n):
        return (n * (4 + 3 * config["mlp_ratio"]) + text_tokens * 2 + 6) * d * d + 2 * n * (n + text_tokens) * d

    ends = tokens * 2 * patch + text_tokens * config["context_in_dim"]                 # in units of d
    return 2 * ((config["depth"] - routed) * block(tokens) + routed * block(kept) + ends * d)


# =====================================================================================================================
# 5. Objectives: flow matching (arXiv 2210.02747, 2209.03003) with v- or x-prediction, contrastive, REPA, P-DINO.
# =====================================================================================================================

UNIFORM = 0.1  # share of times that are drawn uniformly, not logit-normal
NEGATIVES = 8  # samples in a group of contrastive flow matching


def generator_for(device, *key: int) -> torch.Generator:
    """A generator that depends on the key (seed, step, purpose) alone: the same on every rank and after a resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def draw_times(n: int, shift: float, generator) -> torch.Tensor:
    """(n,) times in [1e-3, 1), 1 is noise: logit-normal (SD3, arXiv 2403.03206), a share uniform, shifted. On CPU."""
    t = torch.full((n,), 2.0)
    while (outside := (t < 1e-3) | (t >= 1)).any():
        uniform = torch.rand(n, generator=generator) < UNIFORM
        draw = torch.where(uniform, torch.rand(n, generator=generator), torch.randn(n, generator=generator).sigmoid())
        t = torch.where(outside, shift_time(draw, shift), t)
    return t


def shift_time(t, shift: float):
    """More time at high noise for s > 1: s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def velocity(output, x_t, t, predict: str):
    """What the network said, as a velocity d x_t / dt = eps - x_0. For x-prediction t is clamped at 0.05."""
    return output if predict == "v" else (x_t - output) / t.clamp(min=0.05)[:, None, None, None]


def route(n: int, tokens: int, skipped: float, generator) -> torch.Tensor:
    """(n, K) numbers, in order, of the tokens that do not skip, at random."""
    draw = torch.rand(n, tokens, generator=generator, device=generator.device)
    return draw.topk(kept_tokens(tokens, skipped), 1).indices.sort(1).values


def kept_tokens(tokens: int, skipped: float) -> int:
    return max(1, round(tokens * (1 - skipped)))


def flow_matching_loss(model, x_0, eps, t, text, mask, c: Config, keep=None, tap=None):
    """Flow matching's loss per sample, (B,) FP32: mean squared error in v-space, x_t = (1 - t) x_0 + t eps; the clamp
    of t for x-prediction is on both sides. Returns what to minimise, the plain loss, the estimate of x_0 and the tap.

    Contrastive (arXiv 2506.05350): less `contrastive` times the error to another sample's target, the next of a group
    of eight, so that negatives depend neither on the ranks nor on the micro-batches.
    """
    time_ = t[:, None, None, None]
    x_t = (1 - time_) * x_0 + time_ * eps
    target = eps - x_0 if c.predict == "v" else (x_t - x_0) / time_.clamp(min=0.05)
    output = model(x_t, t, text, mask, keep, tap)
    output, *tapped = output if tap is not None else [output]
    v = velocity(output, x_t, t, c.predict)
    loss = plain = (v - target).square().mean((1, 2, 3))
    if c.contrastive:
        other = target.unflatten(0, (-1, NEGATIVES)).roll(1, 1).flatten(0, 1)
        loss = plain - c.contrastive * (v - other).square().mean((1, 2, 3))
    estimate = x_t - time_ * v if c.predict == "v" else output
    return loss, plain.detach(), estimate, tapped


class Alignment(nn.Module):
    """REPA (arXiv 2410.06940): tokens of one block, through a projector, against a frozen teacher's patch tokens.

    forward: tokens (B, K, D) of a grid of rows x columns, kept (B, K) or None for all, features (B, N, F) -> (B,) minus
    the mean cosine similarity. iREPA (arXiv 2512.10794): a 3x3 convolution instead of the MLP, and features without
    most of what all tokens share: (f - gamma mean) / deviation over the tokens.
    """

    GAMMA = 0.8  # a guess: the paper leaves it open; PRX's framework takes it from the features

    def __init__(self, dim: int, features: int, kind: str):
        super().__init__()
        self.spatial, width = kind == "irepa", min(1024, 4 * features)
        self.mlp = nn.Sequential(Linear(dim, width), nn.SiLU(), Linear(width, width), nn.SiLU(),
                                 Linear(width, features))
        if self.spatial:
            self.mlp = nn.Sequential(Linear(9 * dim, features))

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
    At most 16 x 16 patches; images that are smaller stay as they are."""
    side = [min(16, n // teacher.patch) for n in x.shape[2:]]
    with torch.no_grad():
        real = teacher(x_0, *side)
    return 1 - F.cosine_similarity(teacher(x, *side), real, dim=-1).mean(1)


# =====================================================================================================================
# 6. Frozen networks: VAE, text encoder and teacher, from the Hugging Face hub or folders.
# =====================================================================================================================

VAES = {"repa-e": "REPA-E/e2e-flux-vae", "flux": "black-forest-labs/FLUX.1-schnell",
        "flux2": "black-forest-labs/FLUX.2-dev", "dc-ae": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"}
TEXTS = {"t5gemma": "google/t5gemma-2b-2b-ul2"}
TEACHERS = {"dinov3": "facebook/dinov3-vitl16-pretrain-lvd1689m", "dinov2": "facebook/dinov2-with-registers-large"}


def quiet_import(name: str):
    """transformers or diffusers (seconds each, so only where they are used), without their progress bars."""
    module = importlib.import_module(name)
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def unavailable(name: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{name} cannot be loaded ({reason}); give a local folder, or for a gated repository accept its "
                     "licence on its page and log in with `hf auth login`")


class VAE:
    """A frozen autoencoder of diffusers: AutoencoderKL (FLUX.1, REPA-E), AutoencoderDC, AutoencoderKLFlux2.

    encode: uint8 (B, 3, H, W) -> latents FP32 (B, channels, H / factor, W / factor), normalised as diffusers' pipelines
    undo it: (z - shift) * scale, or for FLUX.2 packed 2 x 2 and whitened by its batch norm. The posterior's mode, not a
    sample: deterministic, and FLUX's posterior is narrow. decode: latents -> FP32 (B, 3, H, W) in [-1, 1].
    FP32 where the VAE asks for it (force_upcast) and on CPUs, else BF16. `about` is what prepared data notes of it.
    """

    def __init__(self, name: str, device="cpu"):
        diffusers, source, sub = quiet_import("diffusers"), VAES.get(name, name), "vae"
        try:
            try:  # part of a pipeline, or the repository itself
                config = diffusers.AutoencoderKL.load_config(source, subfolder=sub)
            except OSError:
                sub, config = None, diffusers.AutoencoderKL.load_config(source)
            kind = getattr(diffusers, config["_class_name"])
            self.model = kind.from_pretrained(source, subfolder=sub, use_safetensors=True)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise unavailable(f"--vae {name}", error) from None
        c, digest = self.model.config, hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + tensor.float().contiguous().numpy().tobytes())
        wide = torch.device(device).type == "cpu" or c.get("force_upcast", False)
        self.dtype, self.device = torch.float32 if wide else torch.bfloat16, device
        self.scale, self.shift = float(c.get("scaling_factor") or 1.0), float(c.get("shift_factor") or 0.0)
        self.packed = kind.__name__ == "AutoencoderKLFlux2"
        if self.packed:  # the mean and deviation of each packed channel, before they are rounded
            self.scale, self.shift = 1.0, 0.0
            self.mean = self.model.bn.running_mean.float().view(1, -1, 1, 1).to(device)
            self.std = (self.model.bn.running_var.float() + c.batch_norm_eps).sqrt().view(1, -1, 1, 1).to(device)
        self.model.to(device, self.dtype).eval().requires_grad_(False)
        probe = self.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        self.channels, self.factor = probe.shape[1], 64 // probe.shape[2]
        self.about = dict(vae=name if name in VAES else Path(name).name, type=kind.__name__, channels=self.channels,
                          factor=self.factor, scale=self.scale, shift=self.shift, sha256=digest.hexdigest())

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        parts = [self.model.encode((x.to(self.device).float() / 127.5 - 1).to(self.dtype)) for x in images.split(16)]
        z = torch.cat([x.latent if hasattr(x, "latent") else x.latent_dist.mode() for x in parts]).float()
        if self.packed:
            return (F.pixel_unshuffle(z, 2) - self.mean) / self.std
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        z = latents / self.scale + self.shift
        if self.packed:
            z = F.pixel_shuffle(latents * self.std + self.mean, 2)
        return torch.cat([self.model.decode(rows.to(self.dtype)).sample.float() for rows in z.split(8)])


class TextEncoder:
    """encode(prompts) -> last hidden states (B, max_tokens, width) FP32 and mask (B, max_tokens) bool.

    Any Hugging Face encoder, or the encoder of a T5 or T5Gemma. Prompts are taken as they are; data/prepare.py has
    cleaned captions as diffusers' PRXPipeline cleans its prompts. UserError when the weights cannot be had.
    """

    def __init__(self, name: str, device="cpu", max_tokens: int = 256):
        transformers, source = quiet_import("transformers"), TEXTS.get(name, name)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        encoders = {"t5gemma": "T5GemmaEncoderModel", "t5": "T5EncoderModel"}
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            config.is_encoder_decoder = False
            kind = getattr(transformers, encoders.get(config.model_type, "AutoModel"))
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            self.model = kind.from_pretrained(source, config=config, use_safetensors=True, dtype=dtype)
        except (OSError, ValueError) as error:
            raise unavailable(f"--text {name}", error) from None
        self.model.to(device).eval().requires_grad_(False)
        self.device, self.max_tokens, self.lock = device, max_tokens, threading.Lock()
        self.width = self.encode([""])[0].shape[-1]
        self.about = dict(text=name if name in TEXTS else Path(name).name, width=self.width, max_tokens=max_tokens)

    def tokenize(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token numbers (B, max_tokens) int64 and mask (B, max_tokens) bool, on the CPU; from any thread."""
        with self.lock:  # a fast tokenizer's padding is shared state
            out = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=self.max_tokens,
                                 return_tensors="pt")
        return out["input_ids"], out["attention_mask"].bool()

    @torch.no_grad()
    def states(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, max_tokens) on the encoder's device -> (B, max_tokens, width) FP32."""
        return self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mask = (x.to(self.device) for x in self.tokenize(prompts))
        return self.states(tokens, mask), mask


class Teacher:
    """A frozen vision transformer of transformers (DINOv3, DINOv2 with or without registers).

    teacher(images FP32 (B, 3, H, W) in [-1, 1], rows, columns) -> patch tokens (B, rows * columns, width) FP32, of the
    images resized so that its patches are that grid (bicubic, antialiased) and normalised as ImageNet's.
    """

    def __init__(self, name: str, device="cpu"):
        transformers = quiet_import("transformers")
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        try:
            self.model, report = transformers.AutoModel.from_pretrained(
                TEACHERS.get(name, name), use_safetensors=True, dtype=dtype, output_loading_info=True)
            if report["missing_keys"]:  # they would be drawn at random
                raise ValueError(f"it lacks weights such as {sorted(report['missing_keys'])[0]}")
            self.patch, self.width = self.model.config.patch_size, self.model.config.hidden_size
        except (OSError, ValueError, AttributeError) as error:
            raise unavailable(f"the teacher {name}", error) from None
        self.model.to(device).eval().requires_grad_(False)
        self.special = 1 + getattr(self.model.config, "num_register_tokens", 0)
        self.mean = torch.tensor((0.485, 0.456, 0.406), device=device).view(1, 3, 1, 1)
        self.std = torch.tensor((0.229, 0.224, 0.225), device=device).view(1, 3, 1, 1)

    def __call__(self, images, rows: int, columns: int):
        size = rows * self.patch, columns * self.patch
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
        x = ((images / 2 + 0.5 - self.mean) / self.std).to(self.model.dtype)
        return self.model(pixel_values=x).last_hidden_state[:, self.special:].float()


def to_float(images):
    """uint8 (B, 3, H, W) -> FP32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


@dataclasses.dataclass
class Frozen:
    """The networks that a run uses and does not train; None where it does without."""

    vae: VAE | None = None
    text: TextEncoder | None = None
    teacher: Teacher | None = None  # REPA's
    critic: Teacher | None = None  # P-DINO's
    init: PRX | None = None  # what a fresh run starts from

    @property
    def factor(self) -> int:  # pixels per side of a latent pixel
        return self.vae.factor if self.vae else 1

    def latents(self, x):
        """Stored latents, or images through the VAE or scaled to [-1, 1], in FP32."""
        if x.dtype != torch.uint8:
            return x.float()
        return self.vae.encode(x) if self.vae else to_float(x)

    def pictures(self, x):
        """What the model works on, as uint8 images (B, 3, H, W)."""
        x = self.vae.decode(x) if self.vae else x
        return x.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

    def embed(self, text, mask):
        """Stored states (B, T, D) as they are, token numbers (B, T) through the encoder."""
        return text if text.is_floating_point() else self.text.states(text, mask)


# =====================================================================================================================
# 7. Optimizer: Muon for the blocks' matrices, AdamW for the rest, one class for 1 to N ranks.
# =====================================================================================================================

CLASSIC = [(3.4445, -4.7750, 2.0315)]  # Keller Jordan's quintic, the same at every step
# Polar Express (arXiv 2505.16932): the best quintic for each step. As in the paper, all but the last are for values 1 %
# larger: in BF16 some leave the interval that a step is made for, and without this room they grow (2.7, not 1.13).
POLAR = [(8.28721201814563, -23.595886519098837, 17.300387312530933),
         (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
         (3.9486908534822946, -2.908902115952949, 0.5518191394370137),
         (3.3184196573706015, -2.488488024314874, 0.51004894012372),
         (2.300652019954817, -1.6689039845747493, 0.4188073119525673)]
POLAR[:-1] = [(a / 1.01, b / 1.01 ** 3, c / 1.01 ** 5) for a, b, c in POLAR[:-1]]
NEWTON_SCHULZ = POLAR
BETAS = 0.9, 0.95  # AdamW
EMA_EVERY = 10  # steps
STACK = 2 ** 26  # elements orthogonalised at once: bounds the temporaries (5 GB for all gate and up matrices of 1.2 B)


def orthogonalize(G: torch.Tensor, steps: int = 5, coefficients=None) -> torch.Tensor:
    """Newton-Schulz: push all singular values of each matrix towards 1. G (K, rows, columns), in G's dtype.

    From Keller Jordan's Muon. Same-shaped matrices go in one batched product.
    """
    coefficients = coefficients or NEWTON_SCHULZ
    margin = 1.01 if coefficients is POLAR else 1.0  # its first steps must not see a singular value above 1
    X = G.mT if G.shape[1] > G.shape[2] else G
    X = X / (X.flatten(1).norm(dim=1) * margin).clamp(min=1e-7)[:, None, None]
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        A = X @ X.mT                                  # (K, n, n), n the smaller side
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)   # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)            # a X + (b A + c A^2) X
    return X.mT if G.shape[1] > G.shape[2] else X


all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def is_muon(name: str, p, c: Config) -> bool:
    if c.optimizer != "muon" or p.ndim != 2 or "blocks." not in name:
        return False
    return c.modulation == "muon" or ".modulation." not in name


def assign_owners(params: dict, c: Config, ranks: int) -> list[list[str]]:
    """The names that each rank owns: the costliest parameter first, to the rank with the least work."""
    cost = {n: p.numel() * (min(p.shape) if is_muon(n, p, c) else 1) for n, p in params.items()}  # Newton-Schulz
    work, owned = [0] * ranks, [[] for _ in range(ranks)]
    for name in sorted(params, key=lambda n: (-cost[n], n)):
        rank = work.index(min(work))
        work[rank] += cost[name]
        owned[rank].append(name)
    return owned


class Flat:
    """Parameters as FP32 vectors, one per owner: a rank's own lie one after the other, padded to the longest rank's.

    grads (ranks, size) holds the sums of all parameters' gradients; master and ema (size,) are this rank's.
    """

    def __init__(self, layout: list[list[str]], params: dict, rank: int):
        self.layout, self.params, self.rank = layout, params, rank
        self.size = max(sum(params[n].numel() for n in names) for names in layout)
        device = next(iter(params.values())).device
        self.grads = torch.zeros(len(layout), self.size, device=device)
        self.master = torch.zeros(self.size, device=device)
        for name, view in self.views(self.master).items():
            view.copy_(params[name].detach())
        self.ema = self.master.clone()

    def views(self, flat, rank: int | None = None, start: int = 0) -> dict[str, torch.Tensor]:
        """Parameter-shaped views of a rank's vector (its own's), or of a part that begins `start` elements into it."""
        out, at = {}, -start
        for name in self.layout[self.rank if rank is None else rank]:
            n = self.params[name].numel()
            if at >= 0 and at + n <= len(flat):
                out[name] = flat[at:at + n].view(self.params[name].shape)
            at += n
        return out

    def everywhere(self, flat) -> dict[str, torch.Tensor]:
        """The vectors of all ranks as views by parameter name. Every rank must call."""
        rows = flat[None]
        if len(self.layout) > 1:
            rows = torch.empty(len(self.layout), self.size, dtype=flat.dtype, device=flat.device)
            all_gather(rows.view(-1), flat)
        return {n: v for rank, row in enumerate(rows) for n, v in self.views(row, rank).items()}

    def reduced(self) -> torch.Tensor:
        """This rank's gradients, averaged over the ranks."""
        if len(self.layout) == 1:
            return self.grads[0]
        own = torch.empty_like(self.master)
        reduce_scatter(own, self.grads.view(-1))
        return own.div_(len(self.layout))


class MuonAdamW:
    """Muon (as torch.optim.Muon with match_rms_adamw, when NEWTON_SCHULZ is CLASSIC) and torch.optim.AdamW over flat
    FP32 vectors.

    Every parameter is owned by one rank, and matrices and 1-D parameters lie in a vector each: matrices with Muon's
    first, shape by shape, so that a stack of them is a view. Gradients are summed in FP32; a reduce-scatter hands each
    owner its own, and after the update an all-gather hands the weights back, matrices in the compute dtype. Gradients
    are clipped by module: the model's first norms are 4, those of REPA's projector 20.

    nets: a ModuleDict of FP32 modules. Build the optimizer first, then set their compute dtype.
    """

    def __init__(self, nets: nn.ModuleDict, config: Config, world: World):
        self.params, self.config, self.world, self.modules = dict(nets.named_parameters()), config, world, list(nets)
        muon = {n: is_muon(n, p, config) for n, p in self.params.items()}
        owned = assign_owners(self.params, config, world.size)
        assert sorted(n for names in owned for n in names) == sorted(self.params), "a parameter needs one owner"
        order = lambda n: (not muon[n], tuple(self.params[n].shape) if muon[n] else (), n)
        matrices = [sorted((n for n in names if self.params[n].ndim == 2), key=order) for names in owned]
        vectors = [sorted(n for n in names if self.params[n].ndim != 2) for names in owned]
        self.matrices = Flat(matrices, self.params, world.rank)
        self.vectors = Flat(vectors, self.params, world.rank)
        self.flats = self.matrices, self.vectors
        if config.weights == "bf16":
            for flat in self.flats:
                flat.master.copy_(flat.master.bfloat16())
                flat.ema.copy_(flat.master)
        self.stacks, self.split = [], 0  # Muon's stacks: (first element, one past the last, shape)
        mine = [tuple(self.params[n].shape) for n in matrices[world.rank] if muon[n]]
        for (rows, columns), count in collections.Counter(mine).items():
            most = max(1, STACK // (rows * columns))
            for n in [most] * (count // most) + [count % most] * (count % most > 0):
                end = self.split + n * rows * columns
                self.stacks.append((self.split, end, (n, rows, columns)))
                self.split = end
        # AdamW's parameters: what follows Muon's matrices, and the vectors
        self.rest = [self.matrices.master[self.split:], self.vectors.master]
        self.adamw = torch.optim.AdamW(self.rest, lr=0.0, betas=BETAS, eps=config.eps, fused=True)
        self.grad_views = {n: v for flat in self.flats for rank, row in enumerate(flat.grads)
                           for n, v in flat.views(row, rank).items()}
        self.reset()
        self.publish()

    def reset(self):
        """Forget all moments, counts and gradients: a fresh optimizer at the weights as they are."""
        zero, device = torch.zeros_like, self.matrices.master.device
        self.momentum = torch.zeros(self.split, device=device)
        for p in self.rest:
            self.adamw.state[p] = dict(step=torch.zeros((), device=device), exp_avg=zero(p), exp_avg_sq=zero(p))
        for flat in self.flats:
            flat.grads.zero_()
        self.steps, self.ema_steps = 0, 0
        self.skipped = torch.zeros((), device=device)  # steps with a non-finite gradient
        self.in_a_row = torch.zeros((), device=device)

    def matrix_dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.params.values() if p.ndim == 2)

    @torch.no_grad()
    def publish(self, ema: bool = False):
        """Give the nets the masters, or their moving average, in their own dtypes, on all ranks."""
        for flat in self.flats:
            dtype = torch.float32 if flat is self.vectors else self.matrix_dtype()
            views = flat.everywhere((flat.ema if ema else flat.master).to(dtype))
            torch._foreach_copy_([self.params[n].data for n in views], list(views.values()))

    @torch.no_grad()
    def accumulate(self):
        """Take over the gradients of one micro-batch: FP32 sums, whatever dtype they came in. What only another stage
        uses has none: nothing is added."""
        names = [n for n, p in self.params.items() if p.grad is not None]
        torch._foreach_add_([self.grad_views[n] for n in names], [self.params[n].grad for n in names])
        for name in names:
            self.params[name].grad = None

    def clip(self, grads: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip by module, in place. Returns the model's norm before, and whether all norms are finite."""
        views = {n: v for flat, grad in zip(self.flats, grads) for n, v in flat.views(grad).items()}
        parts = [[v for n, v in views.items() if n.startswith(module + ".")] for module in self.modules]
        zero = grads[0].new_zeros(1)
        squares = torch.stack([torch.stack([zero[0], *torch._foreach_norm(part)] if part else [zero[0]]).square().sum()
                               for part in parts])
        if self.world.size > 1:
            dist.all_reduce(squares)
        norms = squares.sqrt()
        if self.config.clip:
            for part, norm in zip(parts, norms):
                if part:
                    torch._foreach_mul_(part, (self.config.clip / (norm + 1e-6)).clamp(max=1.0))
        return norms[0], norms.isfinite().all()

    @torch.no_grad()
    def step(self, lr_share: float = 1.0) -> torch.Tensor:
        """One update with both rates times lr_share. Returns the model's gradient norm before clipping, on the device.

        A non-finite gradient leaves the weights as they are and counts in `skipped`, with no synchronisation.
        """
        c = self.config
        grads = [flat.reduced() for flat in self.flats]
        norm, good = self.clip(grads)
        for grad in grads:
            grad.masked_fill_(~good, 0.0)
        self.skipped += ~good
        self.in_a_row = torch.where(good, 0.0, self.in_a_row + 1)
        self.muon_step(grads[0], good, lr_share)
        for group in self.adamw.param_groups:
            group.update(lr=(c.lr if c.optimizer == "adamw" else c.lr_adamw) * lr_share, weight_decay=c.weight_decay)
        self.adamw.found_inf = (~good).float()  # torch's own way to skip a fused step
        for p, grad in zip(self.rest, (grads[0][self.split:], grads[1])):
            p.grad = grad
        self.adamw.step()
        for flat in self.flats:
            flat.grads.zero_()
            if c.weights == "bf16":  # an update below half a unit in the last place is lost
                flat.master.copy_(flat.master.bfloat16())
        self.steps += 1
        self.publish()
        if self.steps % EMA_EVERY == 0:
            self.update_ema()
        return norm

    def muon_step(self, grad: torch.Tensor, good: torch.Tensor, lr_share: float):
        """Nesterov momentum, orthogonalised. Where the step is not good, nothing moves."""
        c, dtype, rate = self.config, self.matrix_dtype(), good * lr_share * self.config.lr
        for start, end, shape in self.stacks:
            w, g, m = (flat[start:end].view(shape) for flat in (self.matrices.master, grad, self.momentum))
            m.lerp_(g, good * (1 - c.momentum))
            update = orthogonalize(g.lerp(m, c.momentum).to(dtype), c.ns_steps).float()
            w.mul_(1 - rate * c.weight_decay)
            w.addcmul_(update, rate * -0.2 * max(shape[1:]) ** 0.5)  # AdamW's rate fits: arXiv 2502.16982

    @torch.no_grad()
    def update_ema(self):
        """Bring the moving average up to this step. At first its memory is short: (1 + s) / (10 + s)."""
        decay = min(self.config.ema, (1 + self.steps) / (10 + self.steps)) ** (self.steps - self.ema_steps)
        for flat in self.flats:
            flat.ema.lerp_(flat.master, 1 - decay if self.config.ema else 1.0)
        self.ema_steps = self.steps

    def model_ema(self) -> dict[str, torch.Tensor]:
        """The model's moving average in FP32 by parameter name, on the CPU of rank 0. Every rank must call."""
        out = {}
        for flat in self.flats:
            views = flat.everywhere(flat.ema)
            if self.world.rank == 0:
                out |= {n.removeprefix("model."): v.cpu() for n, v in views.items() if n.startswith("model.")}
        return out

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Views of all that this rank owns, in FP32, by kind and parameter: `master/NAME`, `momentum/NAME`, ..."""
        out = {f"momentum/{n}": v for n, v in self.matrices.views(self.momentum).items()}
        for flat, p, start in zip(self.flats, self.rest, (self.split, 0)):
            out |= {f"master/{n}": v for n, v in flat.views(flat.master).items()}
            out |= {f"ema/{n}": v for n, v in flat.views(flat.ema).items() if self.config.ema}
            for kind in ("exp_avg", "exp_avg_sq"):
                out |= {f"{kind}/{n}": v for n, v in flat.views(self.adamw.state[p][kind], start=start).items()}
        return out

    def counts(self) -> dict:
        """What else a checkpoint needs; load() takes it."""
        adamw_steps = self.adamw.state[self.rest[0]]["step"].item()
        return dict(steps=self.steps, ema_steps=self.ema_steps, adamw_steps=adamw_steps,
                    skipped=self.skipped.item(), in_a_row=self.in_a_row.item())

    @torch.no_grad()
    def load(self, read, counts: dict):
        """`read(key)` returns a tensor of state_dict(), from whichever rank's file holds it."""
        for key, view in self.state_dict().items():
            view.copy_(read(key))
        if not self.config.ema:
            for flat in self.flats:
                flat.ema.copy_(flat.master)
        for p in self.rest:
            self.adamw.state[p]["step"].fill_(counts["adamw_steps"])
        self.skipped.fill_(counts["skipped"])
        self.in_a_row.fill_(counts["in_a_row"])
        self.steps, self.ema_steps = counts["steps"], counts["ema_steps"]
        self.publish()


# =====================================================================================================================
# 8. Data: prepared shards (data/README.md has the format), in an order that depends on the seed alone.
# =====================================================================================================================

def read_index(folder: Path) -> dict:
    """index.json of a prepared folder. UserError if it is missing, damaged or of another format."""
    path, again = folder / "index.json", "prepare the data again"
    if not path.exists():
        scenes = folder.name if folder.name in ("micro", "mini") else ""
        how = f"`python data/scenes.py --track {scenes} --out {folder}`" if scenes else "data/prepare.py"
        raise UserError(f"--data {folder} holds no index.json; write it with {how}")
    try:
        index = dict(json.loads(path.read_text()))
        if index["format"] != 2:
            raise UserError(f"{path} has format {index['format']}, this script reads 2; {again}")
        for s in index["shards"]:
            s |= {k: int(s[k]) for k in ("count", "resolution", "height", "width")} | dict(path=folder / s["file"])
            s["split"], s["skip"] = str(s["split"]), np.array(s["skip"], np.int64)
        index["shards"][0], index["captions"], index["latent"], index["text"], index["image"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__} {error}); {again}") from None
    return index | dict(folder=folder, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def decode_image(data: torch.Tensor) -> torch.Tensor:
    """uint8 bytes of a JPEG or PNG -> uint8 (3, H, W)."""
    image = Image.open(io.BytesIO(data.numpy()), formats=["JPEG", "PNG"]).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Shards:
    """Prepared folders of one stage, mixed by weight: memory-mapped safetensors shards of the stage's resolution.

    A sample's id is its row among the training shards, folder after folder. UserError where a folder is damaged or does
    not fit the configuration.
    """

    WINDOW, CHUNK = 8192, 65536  # samples shuffled together, samples ordered at once

    def __init__(self, c: Config, stage: int = 0, vae: VAE | None = None):
        self.config, self.stage = c, stage
        self.fields = [c.captions] if c.captions in ("long", "short") else ["long", "short"]
        folders = data_folders(c.data)
        self.weights = np.array([weight for _, weight in folders])
        self.indices = [read_index(Path(path)) for path, _ in folders]
        first = self.indices[0]
        self.latent, self.text = first["latent"] if c.vae != "none" else None, first["text"]
        self.image = first["image"]  # raw, jpeg, png or None
        self.pixels = not self.latent or c.repa > 0  # are images read?
        every = [s | dict(folder=i) for i, index in enumerate(self.indices) for s in index["shards"]]
        every = [s for s in every if s["resolution"] == c.resolution]
        self.shards = [s for s in every if s["split"] == "train"]
        self.held_out = [s for s in every if s["split"] == "eval"]
        self.check(c, vae)
        self.tensors = {s["path"]: self.open(s) for s in every}  # now: better than in the middle of the run
        self.first = np.cumsum([0] + [s["count"] for s in self.shards])  # the id of each shard's first sample
        self.ids = [np.delete(np.arange(s["count"]), s["skip"]) + first for s, first in zip(self.shards, self.first)]
        self.folders = [[i for i, s in enumerate(self.shards) if s["folder"] == f] for f in range(len(folders))]
        self.counts = [sum(len(self.ids[i]) for i in shards) for shards in self.folders]
        if not all(self.counts):
            raise UserError(f"{c.data} has a folder with no training image of {c.resolution} px; prepare it again")
        sizes = [(s["height"], s["width"]) for s in self.shards]
        self.sizes = list(dict.fromkeys(sizes))
        self.bucket = np.repeat([self.sizes.index(size) for size in sizes], np.diff(self.first))
        self.epochs = {}  # folder -> (epoch, its ids in order)
        self.empty = self.load(first["folder"] / "empty.safetensors")["text"] if self.text else ""

    def check(self, c: Config, vae: VAE | None):
        """Whether the folders fit each other and the configuration: UserError with both values where they do not."""
        def need(condition, message):
            if not condition:
                raise UserError(message)

        first = self.indices[0]
        for index in self.indices:
            sizes, folder = sorted({s["resolution"] for s in index["shards"]}), index["folder"]
            need(c.resolution in sizes, f"{folder} holds images of {', '.join(map(str, sizes))} px, and this stage "
                 f"trains at --resolution {c.resolution}; give one of them, or prepare it with --size")
            need(set(self.fields) <= set(index["captions"]), f"--captions {c.captions} needs the fields "
                 f"{' and '.join(self.fields)}, and {folder} has {', '.join(index['captions'])}")
            for kind in ("latent", "text", "networks") + (() if self.latent else ("image",)):
                theirs, ours = index.get(kind), first.get(kind)
                need(theirs == ours, f"{folder} and {first['folder']} cannot be mixed: their {kind} is {theirs} and "
                     f"{ours}; prepare them in the same way")
        why = "--repa shows images to its teacher" if self.latent else "the model needs images"
        need(self.image or not self.pixels,
             f"{why}, and {c.data} holds none; prepare it with --store latent,text,image")
        if self.text:
            ours = dict(text=c.text if c.text in (*TEXTS, "tiny") else Path(c.text).name, max_tokens=c.text_tokens)
            theirs = {k: self.text[k] for k in ours}
            need(theirs == ours, f"the text of {c.data} was encoded with {theirs}, and this run has {ours}; give "
                 "--text and --text-tokens as it was prepared")
        if self.latent and vae:
            keys = "type channels factor scale shift sha256".split()
            theirs, ours = ({k: about[k] for k in keys} for about in (self.latent, vae.about))
            need(theirs == ours, f"the latents of {c.data} were made by {theirs}, and --vae {c.vae} is {ours}; give "
                 "the --vae that made them, or prepare the data again")
        cell = c.patch * (vae.factor if vae else 1)
        for s in self.shards:
            need(s["height"] % cell == s["width"] % cell == 0, f"images of {s['height']} x {s['width']} px cannot be "
                 f"cut into tokens of {cell} px (--vae {c.vae}, --patch {c.patch}); change one of them or the size")

    @staticmethod
    def load(path: Path) -> dict[str, torch.Tensor]:
        """Tensors that read the file when they are indexed."""
        try:
            file = safe_open(path, "pt")
            return {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); restore the file or prepare the data again") from None

    def open(self, s: dict) -> dict[str, torch.Tensor]:
        tensors, n = self.load(s["path"]), s["count"]
        lengths = {f"caption.{field}.offset": n + 1 for field in self.fields}
        if self.text:
            lengths |= {f"text.{field}.offset": n + 1 for field in self.fields}
        if self.latent:
            lengths["latent"] = n
        if self.pixels:
            lengths |= {"image": n} if self.image == "raw" else {f"{self.image}.offset": n + 1}
        for key, length in lengths.items():
            if key not in tensors or len(tensors[key]) != length:
                raise UserError(f"{s['path']} does not hold the {n} samples that its index promises ({key} is missing "
                                "or has another length); prepare the data again")
        return tensors

    def ragged(self, s: dict, row: int, key: str) -> torch.Tensor:
        tensors = self.tensors[s["path"]]
        start, end = tensors[f"{key}.offset"][row:row + 2].tolist()
        return tensors[key][start:end]

    def caption(self, s: dict, row: int, field: str) -> str:
        return self.ragged(s, row, f"caption.{field}").numpy().tobytes().decode()

    def prompt(self, s: dict, row: int, field: str):
        """The caption, or its stored states (T, D)."""
        return self.ragged(s, row, f"text.{field}") if self.text else self.caption(s, row, field)

    def picture(self, s: dict, row: int) -> torch.Tensor:
        if self.image == "raw":
            return self.tensors[s["path"]]["image"][row]
        return decode_image(self.ragged(s, row, self.image))

    def prompts(self, n: int) -> tuple[list, list[str]]:
        """Held-out prompts for the grids (of training images where there are none), and to print underneath."""
        rows = [(s, row) for s in self.held_out or self.shards for row in range(min(n, s["count"]))]
        rows = [(*rows[i % len(rows)], self.fields[0]) for i in range(n)]
        return [self.prompt(*row) for row in rows], [self.caption(*row) for row in rows]

    def stream(self, folder: int, start: int, stop: int) -> np.ndarray:
        """Samples start to stop of a folder's endless stream: each once per epoch, shards shuffled, then windows."""
        out, n = [np.empty(0, np.int64)], self.counts[folder]
        while start < stop:
            epoch = start // n
            if self.epochs.get(folder, (None,))[0] != epoch:
                rng = np.random.default_rng((self.config.seed, self.stage, folder, epoch))
                ids = np.concatenate([self.ids[s] for s in rng.permutation(self.folders[folder])])
                for i in range(0, n, self.WINDOW):
                    rng.shuffle(ids[i:i + self.WINDOW])
                self.epochs[folder] = epoch, ids
            out.append(self.epochs[folder][1][start - epoch * n:stop - epoch * n])
            start += len(out[-1])
        return np.concatenate(out)

    def order(self):
        """Endless global batches of sample ids, one bucket each. The folders' streams are interleaved by weight; what
        does not fill a batch of its bucket waits for the next one."""
        batch, share = self.config.batch, self.weights / self.weights.sum()
        waiting, chunk = [np.empty(0, np.int64)] * len(self.sizes), 0
        while True:
            spans = [(int(chunk * self.CHUNK * w), int((chunk + 1) * self.CHUNK * w)) for w in share]
            ids = np.concatenate([self.stream(f, *span) for f, span in enumerate(spans)])
            due = np.concatenate([(np.arange(*span) + 0.5) / w for span, w in zip(spans, share)])
            ids, full = ids[np.argsort(due, kind="stable")], []
            for b, left in enumerate(waiting):
                at = np.flatnonzero(self.bucket[ids] == b)
                queue, n = np.concatenate([left, ids[at]]), (len(left) + len(at)) // batch
                ends = np.concatenate([np.full(len(left), -1), at])[batch - 1::batch]  # where each batch became full
                full += zip(ends.tolist(), queue[:n * batch].reshape(n, batch))
                waiting[b] = queue[n * batch:]
            yield from (ids for _, ids in sorted(full, key=lambda pair: pair[0]))
            chunk += 1


def pack_text(texts: list, c: Config, encoder: TextEncoder | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions -> token numbers (b, T) int64; stored states (T_i, D) -> (b, T, D), zero where they end. With the mask
    (b, T) bool. T is text_tokens."""
    if isinstance(texts[0], str):
        return encoder.tokenize(texts)
    states = torch.zeros(len(texts), c.text_tokens, texts[0].shape[1], dtype=texts[0].dtype)
    for row, x in zip(states, texts):
        row[:len(x)] = x
    return states, torch.arange(c.text_tokens) < torch.tensor([len(x) for x in texts])[:, None]


@dataclasses.dataclass
class Batch:
    """This rank's rows of a global batch; on the device with noise and routes."""

    x: torch.Tensor  # uint8 (b, 3, H, W) images, or BF16 (b, C, h, w) latents
    t: torch.Tensor  # (b,) times
    text: torch.Tensor  # int64 (b, T) tokens, or BF16 (b, T, D) states
    mask: torch.Tensor  # (b, T) bool
    pixels: torch.Tensor | None = None  # uint8 (b, 3, H, W): what REPA's teacher sees, where x holds latents
    eps: torch.Tensor | None = None  # (b, C, h, w) noise
    keep: torch.Tensor | None = None  # (b, K) tokens that do not skip

    def map(self, change) -> "Batch":
        return Batch(*(None if v is None else change(v) for v in vars(self).values()))

    def split(self, n: int) -> list["Batch"]:
        size = len(self.x) // n
        return [self.map(lambda v: v[i:i + size]) for i in range(0, len(self.x), size)]


class Loader:
    """Batches of a stage from its number `skip` on, with noise and routes, on the device. All draws are made for the
    global batch and then cut, so that they are the same for any number of ranks.

    On CUDA threads make whole batches ahead, each copying its rows out of the files; on two CPU cores they would only
    fight with the model (316 against 378 images/s). `stall` counts the seconds that the trainer waited.
    """

    THREADS = 4

    def __init__(self, data: Shards, c: Config, encoder, world: World, channels: int, factor: int, skip: int = 0,
                 step: int = 0, pixels: bool = False):
        self.data, self.c, self.encoder, self.device = data, c, encoder, world.device
        self.channels, self.factor, self.pixels = channels, factor, pixels  # pixels: a teacher sees the images
        share = c.batch // world.size
        self.rows = slice(world.rank * share, (world.rank + 1) * share)
        self.jobs = enumerate(data.order())
        for _ in range(skip):
            next(self.jobs)
        self.step, self.first_step, self.stall = step, step - skip, 0.0
        self.pool = ThreadPoolExecutor(self.THREADS) if self.device.type == "cuda" else None
        self.ahead = collections.deque()

    def __next__(self) -> Batch:
        start = time.perf_counter()
        if self.pool is None:
            batch = self.read(*next(self.jobs))
        else:
            while len(self.ahead) <= self.THREADS:
                self.ahead.append(self.pool.submit(self.read, *next(self.jobs)))
            batch = self.ahead.popleft().result()
        self.stall += time.perf_counter() - start
        self.step += 1
        return self.to_device(batch, self.step - 1)

    def read(self, number: int, ids: np.ndarray) -> Batch:
        """This rank's rows of a global batch, in pinned memory where there is a GPU."""
        c, data = self.c, self.data
        generator = generator_for("cpu", c.seed, self.first_step + number, 0)
        t = draw_times(c.batch, c.shift, generator)[self.rows]
        dropped = (torch.rand(c.batch, generator=generator) < c.caption_dropout)[self.rows].tolist()
        shards = np.searchsorted(data.first, ids[self.rows], "right") - 1
        places = [(data.shards[s], int(i - data.first[s])) for s, i in zip(shards, ids[self.rows])]
        texts, first = [], number * c.batch + self.rows.start
        for i, (place, drop) in enumerate(zip(places, dropped)):
            texts.append(data.empty if drop else data.prompt(*place, self.field(first + i)))
        text, mask = pack_text(texts, c, self.encoder)
        images = latents = None
        if self.pixels or not data.latent:
            images = torch.stack([data.picture(*place) for place in places])
        if data.latent:
            latents = torch.stack([data.tensors[s["path"]]["latent"][row] for s, row in places])
        batch = Batch(latents, t, text, mask, images) if data.latent else Batch(images, t, text, mask)
        return batch.map(torch.Tensor.pin_memory) if self.pool else batch

    def field(self, sample: int) -> str:
        """long, short, or mix:P: a function of the seed and the global sample number."""
        if not self.c.captions.startswith("mix:"):
            return self.c.captions
        draw = np.random.default_rng((self.c.seed, sample, 1)).random()
        return "short" if draw < float(self.c.captions[4:]) else "long"

    def to_device(self, batch: Batch, step: int) -> Batch:
        c, generator = self.c, generator_for(self.device, self.c.seed, step, 1)
        batch = batch.map(lambda x: x.to(self.device, non_blocking=True))
        factor = self.factor if batch.x.dtype == torch.uint8 else 1
        height, width = (n // factor for n in batch.x.shape[2:])
        shape = c.batch, self.channels, height, width
        batch.eps = torch.randn(shape, generator=generator, device=self.device)[self.rows]
        if c.tread + c.sprint:
            tokens = height * width // c.patch ** 2
            batch.keep = route(c.batch, tokens, c.tread + c.sprint, generator)[self.rows]
        return batch


# =====================================================================================================================
# 9. Sampling, grids and painting, export, checkpoints.
# =====================================================================================================================

@torch.no_grad()
def sample(model, noise, text, mask, null_text, null_mask, *, steps: int, cfg_scale: float, shift: float, predict: str):
    """Euler from t = 1 to 0 on a linear grid, shifted; classifier-free guidance (arXiv 2207.12598) if cfg_scale != 1.

    noise (B, C, H, W) FP32; text (B, T, D), mask (B, T); null_text (1, T, D), null_mask (1, T). Returns (B, C, H, W).
    """
    B, x, guided = len(noise), noise, cfg_scale != 1
    if guided:
        text = torch.cat([text, null_text.expand(B, -1, -1)])
        mask = torch.cat([mask, null_mask.expand(B, -1)])
    grid = shift_time(torch.linspace(1, 0, steps + 1), shift).tolist()
    for t, t_next in zip(grid, grid[1:]):
        x_in = torch.cat([x, x]) if guided else x
        time_ = torch.full((len(x_in),), t, device=x.device)
        v = velocity(model(x_in, time_, text, mask), x_in, time_, predict)
        if guided:
            conditional, unconditional = v.chunk(2)
            v = unconditional + cfg_scale * (conditional - unconditional)
        x = x + (t_next - t) * v
    return x


def save_grid(images: torch.Tensor, prompts: list[str], path: Path, columns: int = 4):
    """Images uint8 (N, 3, H, W) as a PNG, the prompts printed underneath; small images are enlarged, pixels kept."""
    font, gap = ImageFont.load_default(size=11), 8
    zoom = max(1, 192 // images.shape[-1])
    width, height = images.shape[-1] * zoom, images.shape[-2] * zoom
    lines = [textwrap.wrap(p, max(10, width // 6))[:8] for p in prompts]
    cell = height + 13 * max(len(x) for x in lines) + 4 + gap
    sheet = Image.new("RGB", (columns * (width + gap) + gap, math.ceil(len(images) / columns) * cell + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images.cpu(), lines)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * cell
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + height + 2), "\n".join(text), fill="black", font=font, spacing=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def paint(request: Path, out: Path):
    """--paint: images of this script's run, for whoever measures it. records/README.md has the request's format."""
    run = Path(__file__).resolve().parent
    try:
        saved, asked = json.loads((run / "config.json").read_text()), json.loads(request.read_text())
        prompts, seeds = asked.pop("prompts"), asked.pop("seeds")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--paint needs a run's folder and a request ({type(error).__name__} {error})") from None
    c = Stage(**saved["stages"][-1]).config(Config(**saved["config"]))
    defaults = dict(format=1, transformer="transformer", steps=25, cfg_scale=3.0, batch=64, precision="fp32",
                    device="auto", height=c.resolution, width=c.resolution)
    if unknown := set(asked) - set(defaults):
        raise UserError(f"the request {request} asks for {', '.join(sorted(unknown))}, which this script does not know")
    asked = defaults | asked
    device = asked["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_transformer(run / asked["transformer"], device)
    set_compute_dtype(model, torch.bfloat16 if asked["precision"] == "bf16" else torch.float32)
    text = TextEncoder(str(run / "text") if c.text == "tiny" else c.text, device, c.text_tokens)
    frozen, null, images = Frozen(VAE(c.vae, device) if c.vae != "none" else None), text.encode([""]), []
    shape = model.config["in_channels"], asked["height"] // frozen.factor, asked["width"] // frozen.factor
    cell = frozen.factor * c.patch
    if asked["format"] != 1 or len(prompts) != len(seeds) or asked["height"] % cell or asked["width"] % cell:
        raise UserError(f"the request {request} needs format 1, a seed for each of its {len(prompts)} prompts, and a "
                        f"height and a width that are multiples of {cell} px")
    for i in range(0, len(prompts), asked["batch"]):
        part = slice(i, i + asked["batch"])
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds[part]])
        x = sample(model, noise.to(device), *text.encode(prompts[part]), *null, steps=asked["steps"],
                   cfg_scale=asked["cfg_scale"], shift=c.shift, predict=c.predict)
        images.append(frozen.pictures(x).cpu())
        print(f"painted {min(part.stop, len(prompts))} of {len(prompts)}", file=sys.stderr, flush=True)
    write_atomically(out, safetensors.torch.save({"images": torch.cat(images)}, metadata={"format": "1"}))


def write_atomically(path: Path, content: bytes):
    """To a temporary name, flushed to disk, then renamed: a file with this name is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict):
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def export_transformer(config: dict, tensors: dict[str, torch.Tensor], folder: Path):
    """A folder that diffusers' PRXTransformer2DModel.from_pretrained loads."""
    write_atomically(folder / "diffusion_pytorch_model.safetensors",
                     safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", {"_class_name": "PRXTransformer2DModel"} | config)


def load_transformer(source, device="cpu") -> PRX:
    """A PRX in diffusers format, ours or published, strictly, in FP32: a transformer folder, a pipeline's folder, or
    owner/name on the Hugging Face hub."""
    folder = Path(source)
    try:
        if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            hub = importlib.import_module("huggingface_hub")
            wanted = ["transformer/*", "config.json", "diffusion_pytorch_model*"]
            folder = Path(hub.snapshot_download(str(source), allow_patterns=wanted))
        folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
        config = dict(json.loads((folder / "config.json").read_text()))
        weights = "diffusion_pytorch_model.safetensors"
        index, files, tensors = folder / f"{weights}.index.json", {weights}, {}
        if index.exists():
            files = set(json.loads(index.read_text())["weight_map"].values())
        for file in files:
            tensors |= safetensors.torch.load_file(folder / Path(file).name)
        if config.pop("resolution_embeds", None):
            raise ValueError("it has resolution embeddings, which this model does not have")
        model = PRX(**{k: v for k, v in config.items() if not k.startswith("_")})
        model.load_state_dict(tensors, strict=True)
    except Exception as error:  # the hub alone has a dozen classes for no network, no such repository, no access
        raise unavailable(f"{source} as a PRX transformer in diffusers format", error) from None
    return model.to(device)


class Checkpoints:
    """checkpoint/step-N/: one safetensors file per rank with what it owns, by parameter name, and state.json with their
    sha256. No RNG state: every draw is a function of (seed, step), and the data position is a number of batches.

    Each rank writes its file and says on the store that it is there; rank 0 waits for all, renames and tells. No
    collective waits for a disk. Where a rank cannot write (a full disk), all drop this one and training goes on.
    Synchronous: 14 GB over 8 ranks every 30 minutes are 0.3 % at 2.5 GB/s, 1.6 % at 0.5 GB/s (derived).
    """

    AGAIN = 300.0  # seconds until a failed one is tried again

    def __init__(self, run: Path, world: World, log):
        self.folder, self.world, self.log, self.written = run / "checkpoint", world, log, None
        self.none_since = None  # seconds on the clock of the first failure since the last success

    def save(self, optimizer: MuonAdamW, state: dict, elapsed: float) -> bool:
        """Every rank must call. Returns whether the step is on disk."""
        if self.written == state["step"]:
            return True
        final, world = self.folder / f"step-{state['step']:08d}", self.world
        temporary, key = final.with_name(final.name + ".tmp"), f"checkpoint-{world.turns}-"
        state = state | dict(ranks=world.size, counts=optimizer.counts(), elapsed=elapsed)
        data = safetensors.torch.save({k: v.cpu() for k, v in optimizer.state_dict().items()})
        said = dict(sha256=hashlib.sha256(data).hexdigest())  # of the bytes in memory
        try:
            write_atomically(temporary / f"rank-{world.rank}.safetensors", data)
        except OSError as error:
            said = dict(error=f"rank {world.rank}: {error}")
        world.store.set(f"{key}{world.rank}", json.dumps(said))
        failure = world.first(lambda: self.finish(final, temporary, key, state))
        if failure:
            self.none_since = elapsed if self.none_since is None else self.none_since
            self.log(f"warning: checkpoint {final.name} could not be written ({failure}); the ones before it stay, "
                     "training goes on, and it is tried again in five minutes")
        else:
            self.written, self.none_since = state["step"], None
        return not failure

    def finish(self, final: Path, temporary: Path, key: str, state: dict):
        """Rank 0: wait for all files, then give the folder its name and remove all but the last two."""
        start, named = time.monotonic(), False
        while late := [r for r in range(self.world.size) if not self.world.store.check([f"{key}{r}"])]:
            if time.monotonic() - start > 60 and not named:
                self.log(f"checkpoint {final.name} waits for the disk of rank {', '.join(map(str, late))}")
                named = True
            time.sleep(0.05)
        said = [json.loads(self.world.store.get(f"{key}{r}")) for r in range(self.world.size)]
        try:
            if errors := [s["error"] for s in said if "error" in s]:
                raise OSError("; ".join(errors))
            state["sha256"] = [s["sha256"] for s in said]
            write_json(temporary / "state.json", state)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        older = sorted(p for p in self.folder.glob("step-????????") if p.name < final.name)
        for old in [*older[:-1], *self.folder.glob("*.tmp")]:  # and what a crash has left half-written
            shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and a sentence for each one passed over."""
    notes = []
    for folder in sorted((run / "checkpoint").glob("step-*"), reverse=True):
        try:
            if folder.name.endswith(".tmp"):
                raise ValueError("it was not finished")
            state = json.loads((folder / "state.json").read_text())
            for rank, digest in enumerate(state["sha256"]):
                with open(folder / f"rank-{rank}.safetensors", "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise ValueError(f"rank-{rank}.safetensors is damaged (its sha256 differs)")
            return folder, notes
        except (OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"checkpoint {folder.name} is passed over: {error}")
    return None, notes


def load_checkpoint(folder: Path, optimizer: MuonAdamW) -> dict:
    """Fill the optimizer and the nets from a checkpoint of any number of ranks; returns its state.json."""
    state = json.loads((folder / "state.json").read_text())
    files = [safe_open(folder / f"rank-{rank}.safetensors", "pt") for rank in range(state["ranks"])]
    where = {key: file for file in files for key in file.keys()}

    def read(key):
        if key not in where:
            raise UserError(f"checkpoint {folder} has no {key}; it belongs to another model or optimizer")
        return where[key].get_tensor(key)

    optimizer.load(read, state["counts"])
    return state


# =====================================================================================================================
# 10. Training.
# =====================================================================================================================

def training_step(nets: nn.ModuleDict, frozen: Frozen, batch: Batch, c: Config, align: bool):
    """Forward, all losses and backward of one micro-batch. Returns its plain flow-matching loss, a scalar to be summed
    over the micro-batches, and by tenths of t the sum of losses and their number, (2, 10)."""
    x_0, text = frozen.latents(batch.x), frozen.embed(batch.text, batch.mask)
    rows, columns = x_0.shape[2] // c.patch, x_0.shape[3] // c.patch
    losses, plain, estimate, tapped = flow_matching_loss(
        nets["model"], x_0, batch.eps, batch.t, text, batch.mask, c, batch.keep, c.repa_layer if align else None)
    if align:
        with torch.no_grad():
            features = frozen.teacher(to_float(batch.x if batch.pixels is None else batch.pixels), rows, columns)
        losses = losses + c.repa * nets["repa"](*tapped, features, rows, columns)
    if c.pdino:
        losses = losses + c.pdino * perceptual_loss(frozen.critic, estimate, x_0)
    (losses.mean() / c.accumulate).backward()
    by_time = torch.zeros(2, 10, device=plain.device)
    by_time.index_add_(1, (batch.t * 10).long(), torch.stack([plain, torch.ones_like(plain)]))
    return plain.mean() / c.accumulate, by_time


def lr_share(progress: float, first: float, c: Config) -> float:
    """Linear warm-up from the first step's progress, constant, linear decay to zero at 1."""
    warm = 0.01 + (progress - first) / c.warmup if c.warmup else 1.0
    cool = (1 - progress) / (1 - c.decay_from) if c.decay_from < 1 else 1.0
    return max(0.0, min(1.0, warm, cool))


def stage_at(progress: float, stages: list[Stage]) -> int:
    ends = np.cumsum([s.share for s in stages]) / sum(s.share for s in stages)
    return min(int(np.searchsorted(ends, progress, "right")), len(stages) - 1)


@dataclasses.dataclass
class Run:
    """All that training holds."""

    folder: Path
    config: Config
    stages: list[Stage]
    configs: list[Config]  # one per stage, as are the data
    datasets: list[Shards]
    world: World
    frozen: Frozen
    nets: nn.ModuleDict
    optimizer: MuonAdamW
    log: Log
    clock: Clock
    checkpoints: Checkpoints
    state: dict  # what a checkpoint's state.json keeps
    lock: object = None  # rank 0's hold on the folder

    def aligned(self, c: Config) -> bool:
        return c.repa > 0 and not self.state["burned_in"]

    def loader(self, stage: int, skip: int = 0, step: int = 0) -> Loader:
        c, channels = self.configs[stage], self.nets["model"].config["in_channels"]
        return Loader(self.datasets[stage], c, self.frozen.text, self.world, channels, self.frozen.factor, skip, step,
                      self.aligned(c))

    def flops(self, c: Config, size: tuple[int, int]) -> tuple[int, float]:
        """Tokens, and FLOPs of the model's forward and backward pass of one image of a size in pixels."""
        tokens, skipped = size[0] * size[1] // (c.patch * self.frozen.factor) ** 2, c.tread + c.sprint
        kept = kept_tokens(tokens, skipped) if skipped else 0
        model = self.nets["model"].config
        return tokens, 3 * flops_per_image(model, tokens, c.text_tokens, kept, routed_blocks(c))

    def parameters(self) -> int:
        return sum(p.numel() for p in self.nets["model"].parameters())

    def checkpoint_bytes(self) -> int:
        """FP32 masters, moments and EMA, over all ranks."""
        c, total = self.config, 0
        for name, p in self.nets.named_parameters():
            total += 4 * p.numel() * ((1 if is_muon(name, p, c) else 2) + 1 + (1 if c.ema else 0))
        return total


# ---- set-up, in the order in which data flows ------------------------------------------------------------------------

LARGE = 1e8  # parameters: a step of more takes minutes on a CPU
# What may differ when a run goes on
FREE = "name resume stop_after samples checkpoint_minutes compile dry_run init".split()


def attempt(problems: list[str], make, *args):
    """make(*args); a UserError goes to the problems, to be told with all others."""
    try:
        return make(*args)
    except UserError as error:
        problems.append(str(error))


def find_start(config: Config, stages: list[Stage], run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and sentences about those passed over."""
    if config.resume == "never":
        return None, []
    source = run if config.resume == "auto" or find_checkpoint(run)[0] else Path(config.resume)
    checkpoint, notes = find_checkpoint(source)
    if checkpoint is None:
        if config.resume != "auto":
            raise UserError(f"--resume {source} holds no complete checkpoint; give a run's folder such as logs/micro")
        return None, notes
    try:
        saved = json.loads((source / "config.json").read_text())
        then, plan = dict(saved["config"]), saved["stages"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source}/config.json cannot be read ({error}), so nobody knows what its checkpoints belong "
                        "to; choose another --name") from None
    differ = [f"{flag(k)} was {then.get(k)}, now {v}" for k, v in dataclasses.asdict(config).items()
              if k not in FREE and then.get(k) != v]
    if not differ and plan != [dataclasses.asdict(s) for s in stages]:
        differ = [f"its stages were {plan}, now {stages}"]
    if differ:
        raise UserError(f"{source} was started with other settings ({'; '.join(differ)}); repeat its flags, choose "
                        "another --name, or give --resume never to start again")
    return checkpoint, notes


def open_everything(configs: list[Config], aligned: bool, world: World) -> tuple[list[Shards], Frozen]:
    """The data of every stage and every frozen network, checked against each other. UserError with all problems."""
    problems, c, frozen = [], configs[0], Frozen()
    if c.track == "24h" and world.device.type != "cuda" and not c.dry_run:
        problems.append("track 24h needs CUDA GPUs, and torch finds none; --track micro runs on a CPU")
    for k in configs:
        if k.batch // k.accumulate % world.size:
            problems.append(f"--batch {k.batch} over --accumulate {k.accumulate} is not a multiple of {world.size} "
                            "ranks; change one of them")
    if c.vae != "none":
        frozen.vae = attempt(problems, VAE, c.vae, world.device)
    datasets = [attempt(problems, Shards, k, i, frozen.vae) for i, k in enumerate(configs)]
    texts = [data.text for data in datasets if data]
    if any(text != texts[0] for text in texts):
        problems.append("the stages' data differ in the text that they store; prepare them in the same way")
    folder = Path(data_folders(c.data)[0][0])
    network = lambda name, place: str(folder / place) if name == "tiny" else name
    if not all(texts):
        frozen.text = attempt(problems, TextEncoder, network(c.text, "text"), world.device, c.text_tokens)
    if aligned:
        frozen.teacher = attempt(problems, Teacher, network(c.repa_teacher, "teacher"), world.device)
    if any(k.pdino for k in configs):
        frozen.critic = attempt(problems, Teacher, network(c.pdino_teacher, "teacher"), world.device)
    if c.init:
        frozen.init = attempt(problems, load_transformer, c.init)
    world.refuse(problems)
    return datasets, frozen


def lock_folder(folder: Path):
    """An open file that keeps other processes out of the run's folder, on this machine and on most shared disks."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {folder}; wait for it, or choose another --name") from None
    except OSError:
        print(f"warning: the file system cannot lock {folder}; do not start two runs in it", flush=True)
    return file


def begin_folder(folder: Path, config: Config, stages: list[Stage], fresh: bool, data: Path):
    """The run's folder, locked: --resume never moves an old run aside, and what a failed start has left goes."""
    lock = lock_folder(folder)
    if config.resume == "never" and (folder / "log.txt").exists():
        old = [int(p.suffix[4:]) for p in folder.parent.glob(f"{folder.name}.old*") if p.suffix[4:].isdigit()]
        folder.rename(folder.with_name(f"{folder.name}.old{max(old, default=0) + 1}"))
        lock = lock_folder(folder)
    if fresh:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder / "cache", ignore_errors=True)
    if config.text == "tiny":
        shutil.copytree(data / "text", folder / "text", dirs_exist_ok=True)
    write_json(folder / "config.json", dict(config=dataclasses.asdict(config),
                                            stages=[dataclasses.asdict(s) for s in stages]))
    write_atomically(folder / "train_prx.py", SOURCE.encode())
    return lock


def build_nets(configs: list[Config], text_width: int, features: int, frozen: Frozen, device) -> nn.ModuleDict:
    """The model, and REPA's projector onto a teacher's features (0: no REPA). FP32, from the seed or --init."""
    c, routes = configs[0], any(k.tread or k.sprint for k in configs)
    model = PRX(in_channels=frozen.vae.channels if frozen.vae else 3, patch_size=c.patch, context_in_dim=text_width,
                hidden_size=c.hidden, mlp_ratio=c.mlp_ratio, num_heads=c.heads, depth=c.depth,
                bottleneck_size=c.bottleneck or None, span=routed_blocks(c) if routes else None,
                sprint=c.sprint > 0, scorer=routes and c.tread_select == "learned")
    nets = nn.ModuleDict(dict(model=initialize(model, c.seed)))
    if frozen.init:
        if frozen.init.config != model.config:
            raise UserError(f"--init {c.init} has {frozen.init.config}, and this run {model.config}; give the flags "
                            "that fit it")
        model.load_state_dict(frozen.init.state_dict())
        frozen.init = None
    if features:
        nets["repa"] = initialize(Alignment(c.hidden, features, c.repa_kind), c.seed + 1)
    return nets.to(device)


def check_disk(r: Run):
    """Room for three checkpoints (two are kept, one is being written) and the exports."""
    need = 3 * r.checkpoint_bytes() + 4 * r.parameters() * (r.config.samples + 1)
    free = shutil.disk_usage(r.folder).free + sum(p.stat().st_size for p in r.folder.glob("checkpoint/*/*"))
    r.world.refuse([] if free >= need else [
        f"{r.folder.resolve()} has {free / 1e9:.1f} GB free and the run needs {need / 1e9:.1f}; free some, or make "
        "logs/ a link to a larger disk"])


def compile_blocks(r: Run):
    """One graph for all blocks, per shape. The cache lies in the run's folder."""
    cache = r.folder / "cache"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache.resolve())
    torch._inductor.config.cpp.vec_isa_ok = True  # skip Inductor's CPU probe (6 s of 29)
    torch._dynamo.config.recompile_limit = 64  # shapes; after the default, 8, it would run eagerly
    modules = list(r.nets["model"].blocks)
    for net in (r.frozen.teacher, r.frozen.critic):
        if net and r.world.device.type == "cuda":  # on CPUs it costs 8 s and saves 2
            modules += [m for m in net.model.modules() if type(m).__name__.endswith("Layer")]
    for module in modules:
        module.compile(dynamic=False)
    r.log(f"compile cache: {sum(p.is_file() for p in cache.rglob('*'))} files at the start")


def warm_up(r: Run) -> dict[int, tuple[float, int]]:
    """A throw-away step of every stage to come and of every shape of it: compiles what the run will need, and finds out
    of memory by running out of memory. Weights and counts are as before. Returns for each stage, on CUDA, seconds per
    step without the optimizer's, and peak bytes."""
    cuda, problems, measured = r.world.device.type == "cuda", [], {}
    for stage in range(r.state["stage"], len(r.configs)):
        data, c, loader, slowest = r.datasets[stage], r.configs[stage], r.loader(stage), 0.0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for bucket, (height, width) in enumerate(data.sizes):
            ids = np.resize(np.flatnonzero(data.bucket == bucket), c.batch)
            batch = loader.to_device(loader.read(0, ids), 0)
            for align in {r.aligned(c), r.aligned(c) and c.repa_until == 1}:
                try:
                    for _ in range(2 if cuda else 1):  # the second one is timed
                        start = time.perf_counter()
                        for part in batch.split(c.accumulate):
                            loss, _ = training_step(r.nets, r.frozen, part, c, align)
                            r.optimizer.accumulate()
                        loss.item()
                    slowest = max(slowest, time.perf_counter() - start)
                except torch.OutOfMemoryError as error:
                    problems.append(f"stage {r.stages[stage].name} does not fit into a GPU at {height} x {width} px "
                                    f"({str(error).splitlines()[0]}); give --accumulate {2 * c.accumulate}, or a "
                                    "smaller --hidden or --depth")
        if cuda:
            measured[stage] = slowest, torch.cuda.max_memory_allocated()
    r.world.refuse(problems)
    r.optimizer.step(0.0)
    r.optimizer.reset()
    return measured


def describe_plan(r: Run, measured: dict) -> str:
    """What --dry-run prints: per stage what is derived, and what the warm-up measured ('-' without CUDA)."""
    lines = ["stage      px tokens text  batch  TFLOP/image  images/s  peak GB      samples   epochs"]
    show = lambda value, form: format(value, form) if value else "-".rjust(int(form.split(",")[0].split(".")[0]))
    for i, (stage, c, data) in enumerate(zip(r.stages, r.configs, r.datasets)):
        tokens, flops = r.flops(c, max(data.sizes, key=math.prod))
        seconds, peak = measured.get(i, (0, 0))
        rate, share = seconds and c.batch / seconds, stage.share / sum(s.share for s in r.stages)
        samples = c.steps * share * c.batch or c.hours * 3600 * share * rate
        lines.append(f"{stage.name:8} {c.resolution:4} {tokens:6} {c.text_tokens:4} {c.batch:6} {flops / 1e12:12.4g} "
                     f"{show(rate, '9,.0f')} {show(peak / 1e9, '8.1f')} {show(samples, '12,.0f')} "
                     f"{show(samples / sum(data.counts), '8.2f')}")
    return "\n".join([*lines, f"a checkpoint: {r.checkpoint_bytes() / 1e9:.3g} GB. tokens, TFLOP (the model's, forward "
                      "and backward) and checkpoint are derived; images/s (without the optimizer) and peak GB are "
                      "measured by the warm-up", "nothing is in the way; leave --dry-run away to train"])


def set_up(world: World, config: Config, stages: list[Stage]) -> Run:
    """A run that is ready for its next step (or, with --dry-run, printed and not to be used)."""
    device, folder, problems = world.device, Path("logs") / config.name, []
    start = attempt(problems, find_start, config, stages, folder) if world.rank == 0 else None
    world.refuse(problems)
    checkpoint, notes = world.gather(start)[0]  # rank 0's choice
    state, before = dict(step=0, stage=0, batches=0, samples=0, first_progress=None, burned_in=False, features=0), 0.0
    if checkpoint:
        config = dataclasses.replace(config, init="")
        state |= json.loads((checkpoint / "state.json").read_text())
        before = max([0.0] + [m["elapsed"] for m in read_metrics(checkpoint.parent.parent)])
    configs = [stage.config(config) for stage in stages]
    aligned = any(c.repa for c in configs[state["stage"]:]) and not state["burned_in"]
    datasets, frozen = open_everything(configs, aligned, world)
    indices = [index["sha256"] for data in datasets for index in data.indices]
    if state.setdefault("data", indices) != indices:
        problems.append(f"{checkpoint} was trained on data whose indices have sha256 {state['data']}, and now they "
                        f"have {indices}; give the same --data, or choose another --name")
    world.refuse(problems)
    locks = []
    if not config.dry_run:
        data = datasets[0].indices[0]["folder"]
        failure = world.first(lambda: locks.append(
            attempt(problems, begin_folder, folder, config, stages, not checkpoint, data)))
        world.refuse(problems + ([f"{folder} cannot be written to ({failure})"] if failure else []))
    log = Log(None if config.dry_run else folder, world)
    log(f"command: {command()}\nconfig: {json.dumps(dataclasses.asdict(config))}\nstages: {stages}\nmachine: "
        f"{json.dumps(describe_machine(world))}\n--- source\n{SOURCE}\n--- end of source", show=False)
    for note in notes:
        log(note)

    if frozen.teacher:  # its projector stays after the burn-in: whatever goes on has the same optimizer
        state["features"] = frozen.teacher.width
    width = datasets[0].text["width"] if datasets[0].text else frozen.text.width
    nets = build_nets(configs, width, state["features"], frozen, device)
    big = device.type == "cpu" and sum(p.numel() for p in nets.parameters()) > LARGE
    optimizer = None if config.dry_run and big else MuonAdamW(nets, config, world)
    bf16 = config.compute == "bf16" or config.compute == "auto" and has_fast_bf16(device)
    set_compute_dtype(nets, torch.bfloat16 if bf16 else torch.float32)
    r = Run(folder, config, stages, configs, datasets, world, frozen, nets, optimizer, log, Clock(before),
            Checkpoints(folder, world, log), state, locks)
    about = "; ".join(f"{s.name}: {sum(d.counts):,} images of {d.config.resolution} px, {len(d.sizes)} size(s)"
                      for s, d in zip(stages, datasets))
    log(f"{config.name}: PRX {r.parameters() / 1e6:.1f} M parameters, {'BF16' if bf16 else 'FP32'} compute, "
        f"{world.size} rank(s) on {device.type}, "
        f"{f'{config.steps} steps' if config.steps else f'{config.hours * 60:.3g} minutes'}, data: {about}")
    if config.weights == "bf16":
        log("--weights bf16 stores the weights in BF16, where small updates round away to nothing: an ablation of how "
            "training fails silently, not a setting to use")
    if not config.dry_run:
        check_disk(r)
    long = config.steps >= 600 or config.hours >= 1.5 / 60  # two cores: 15 s for a fifth of a step (notes/speed.md)
    if config.compile == "on" or config.compile == "auto" and (device.type == "cuda" or long):
        compile_blocks(r)
    measured = {}
    try:
        if big:
            log("no warm-up: on a CPU a model of this size takes minutes a step")
        else:
            measured = warm_up(r)
    except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, a broken one, no Python headers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log(f"torch.compile does not work here, so the blocks run uncompiled, which is slower ({reason})")
        torch.compiler.set_stance("force_eager")
        optimizer.reset()
    if config.dry_run:
        log(describe_plan(r, measured))
    elif checkpoint:
        load_checkpoint(checkpoint, optimizer)
        if checkpoint.parent == r.checkpoints.folder:
            r.checkpoints.written = state["step"]
        log(f"resumed from {checkpoint} at step {state['step']}, {before:.0f} s on the clock")
        log.write(event="resume", step=state["step"], elapsed=r.clock())
    return r


# ---- the loop and what it writes -------------------------------------------------------------------------------------

def loop(r: Run) -> tuple[float, float, float]:
    """Train until the length is reached, a signal comes or --stop-after. Returns progress, elapsed, stall."""
    config, world, state, optimizer = r.config, r.world, r.state, r.optimizer
    budget = config.hours * 3600 - 1.0 - 2e-8 * r.parameters()  # less the time to write the weights: a guess for 1.2 B
    [elapsed] = world.agree(r.clock())
    heart, last_checkpoint = Heartbeat(r.log, world, elapsed), elapsed
    stage, loader, stall, next_grid = None, None, 0.0, 0
    while True:
        elapsed, number = world.agree(r.clock(), world.signal)
        world.signal = int(number) or world.signal  # one may have come meanwhile
        progress = state["step"] / config.steps if config.steps else elapsed / budget if elapsed < budget else 1.0
        if number or progress >= 1 or 0 < config.stop_after <= state["step"]:
            break
        if state["first_progress"] is None:
            state["first_progress"] = progress
        if (now := stage_at(progress, r.stages)) != stage:  # its knobs, its data from the first batch on
            if now != state["stage"]:
                state |= dict(stage=now, batches=0)
                r.log(f"stage {r.stages[now].name}: {r.stages[now].knobs}")
            stall += loader.stall if loader else 0.0
            next_grid = next_grid or max(1, math.ceil(progress * (config.samples + 1)))
            stage, c, optimizer.config = now, r.configs[now], r.configs[now]
            loader = r.loader(now, state["batches"], state["step"])
        if r.frozen.teacher and (progress >= c.repa_until or not any(k.repa for k in r.configs[stage:])):
            r.frozen.teacher, state["burned_in"], loader.pixels = None, True, False
            r.log(f"REPA ends at step {state['step']}: the teacher is gone from memory")

        batch, parts = next(loader), []
        for part in batch.split(c.accumulate):
            parts.append(training_step(r.nets, r.frozen, part, c, r.aligned(c)))
            optimizer.accumulate()
        norm = optimizer.step(lr_share(progress, state["first_progress"], c))
        loss, by_time = (sum(values) for values in zip(*parts))
        heart.add(loss, by_time, norm, progress)
        state |= dict(step=state["step"] + 1, batches=state["batches"] + 1, samples=state["samples"] + c.batch)

        due = elapsed - last_checkpoint >= config.checkpoint_minutes * 60
        if due or elapsed - heart.last >= heart.EVERY:  # a checkpoint's steps are in the log before it is written
            heartbeat(r, heart, elapsed, batch, stall + loader.stall)
        if due:
            saved = r.checkpoints.save(optimizer, state, elapsed)
            last_checkpoint = elapsed if saved else elapsed - config.checkpoint_minutes * 60 + Checkpoints.AGAIN
        if progress * (config.samples + 1) >= next_grid <= config.samples:
            save_samples(r, f"step-{state['step']:08d}")
            save_export(r, r.folder / "exports" / f"step-{state['step']:08d}")
            next_grid += 1
    if heart.pending:
        heartbeat(r, heart, elapsed, batch, stall + loader.stall)
    return progress, elapsed, stall + loader.stall if loader else 0.0


def heartbeat(r: Run, heart: Heartbeat, elapsed: float, batch: Batch, stall: float):
    o, state, c = r.optimizer, r.state, r.configs[r.state["stage"]]
    _, flops = r.flops(c, [n * r.frozen.factor for n in batch.eps.shape[2:]])
    heart.beat(elapsed, c.batch, flops, step=state["step"], samples=state["samples"], stage=state["stage"],
               data_stall_s=stall, skipped_steps=o.skipped.item(), no_checkpoint_since=r.checkpoints.none_since)
    if o.in_a_row.item() >= 10:
        r.checkpoints.save(o, state, elapsed)
        raise TrainingFailed(f"10 steps in a row had a non-finite gradient; step {state['step']} is kept in "
                             f"{r.folder}/checkpoint: lower --lr or --lr-adamw, or look at the data")


def save_samples(r: Run, name: str):
    """The same prompts from the same noise at every call of a stage, with the EMA weights, at the size nearest to a
    square. All ranks call, rank 0 writes."""
    c, data, device, model = r.configs[r.state["stage"]], r.datasets[r.state["stage"]], r.world.device, r.nets["model"]
    texts, captions = data.prompts(16)
    height, width = min(data.sizes, key=lambda size: abs(math.log(size[0] / size[1])))
    shape = len(texts), model.config["in_channels"], height // r.frozen.factor, width // r.frozen.factor
    noise = torch.randn(shape, generator=generator_for("cpu", c.seed, 0, 2)).to(device)
    text, mask = (x.to(device) for x in pack_text(texts + [data.empty], c, r.frozen.text))
    r.optimizer.publish(ema=True)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # another batch size: not worth a compilation
        text = r.frozen.embed(text, mask)
        images = r.frozen.pictures(sample(
            model, noise, text[:-1], mask[:-1], text[-1:], mask[-1:], steps=c.sample_steps, cfg_scale=c.cfg_scale,
            shift=c.shift, predict=c.predict))
    r.optimizer.publish()
    if failure := r.world.first(lambda: save_grid(images, captions, r.folder / f"samples/{name}.png")):
        r.log(f"warning: the samples of {name} could not be written ({failure})")


def save_export(r: Run, folder: Path) -> str:
    """The EMA weights in diffusers format. All ranks call, rank 0 writes; returns what was in the way."""
    weights = r.optimizer.model_ema()
    return r.world.first(lambda: export_transformer(r.nets["model"].config, weights, folder))


def command() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def write_facts(r: Run, finished: dict | None = None):
    """run.json: what evaluation and records need to know of a run."""
    names = ("name track seed steps hours resolution captions vae text text_tokens predict shift cfg_scale "
             "sample_steps").split()
    c, folders = r.configs[-1], {str(i["folder"].resolve()): i["sha256"] for d in r.datasets for i in d.indices}
    facts = dict(format=1, **{k: getattr(c, k) for k in names}, pixels=c.vae == "none", command=command(),
                 script="train_prx.py", source_sha256=hashlib.sha256(SOURCE.encode()).hexdigest(),
                 parameters=r.parameters(), world_size=r.world.size, machine=describe_machine(r.world),
                 data=[dict(folder=f, sha256=s) for f, s in folders.items()], finished=finished)
    r.world.first(lambda: write_json(r.folder / "run.json", facts))


def is_finished(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads((folder / "run.json").read_text())["finished"])
    return False


def train(world: World, config: Config, stages: list[Stage]) -> int:
    """Train to the end of the length. Returns the exit code: 0, or 128 + signal after a checkpoint."""
    watch_signals(world)
    folder = Path("logs") / config.name
    if config.resume != "never" and not config.dry_run and is_finished(folder):
        if world.rank == 0:
            print(f"{folder} holds a finished run; choose another --name, or give --resume never to start again")
        return 0
    r = set_up(world, config, stages)
    if config.dry_run:
        return 0
    write_facts(r)
    progress, elapsed, stall = loop(r)
    state, log = r.state, r.log
    if progress < 1:  # a signal or --stop-after
        saved = r.checkpoints.save(r.optimizer, state, elapsed)
        log.write(event="stopped", step=state["step"], elapsed=r.clock())
        if not saved:
            raise TrainingFailed(f"stopped at step {state['step']}, whose checkpoint could not be written; the same "
                                 "command goes on from the one before")
        log(f"stopped at step {state['step']} with a checkpoint in {folder}; the same command"
            f"{'' if world.signal else ', with a later --stop-after or none,'} goes on from there")
        return 128 + world.signal if world.signal else 0
    if state["step"] == 0:
        raise TrainingFailed(f"no step fits into --hours {config.hours:.4g}: start-up took {elapsed:.0f} s; give more")
    r.optimizer.update_ema()
    failure = save_export(r, folder / "transformer")
    seconds = r.clock()  # the clock stops here
    r.checkpoints.save(r.optimizer, state, seconds)
    if failure:
        raise TrainingFailed(f"the final weights could not be written ({failure}); make room, and the same command "
                             "goes on from the last checkpoint")
    finished = dict(step=state["step"], samples=state["samples"], elapsed=seconds)
    log(f"finished: {state['step']} steps, {state['samples']:,} images, {seconds:.1f} s from process start to final "
        f"weights on disk, data stall {stall:.1f} s")
    log.write(event="finished", **finished, data_stall_s=stall)
    write_facts(r, finished)
    save_samples(r, "final")
    log(f"wrote {folder}/transformer and {folder}/samples/final.png; next: python eval_prx.py {folder}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 after a failure, 2 for bad input, 128 + signal after a checkpoint on a signal."""
    argv, world, together = sys.argv[1:] if argv is None else [*argv], None, True
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if "--paint" in argv:
            if argv[::2] != ["--paint", "--out"] or len(argv) != 4:
                raise UserError("painting takes --paint REQUEST.json --out IMAGES.safetensors")
            paint(Path(argv[1]), Path(argv[3]))
            return 0
        options, together = parse_args(argv), False  # the ranks' flags are the same
        world = connect()
        code = train(world, *options)
        if size > 1:
            dist.barrier(world.control)
            dist.destroy_process_group()
        return code
    except (UserError, TrainingFailed) as error:
        code, together = 2 if isinstance(error, UserError) else 1, together or error.everywhere or size == 1
        if rank == 0 or not together:
            print(f"train_prx: {'' if together else f'rank {rank}: '}{error}", file=sys.stderr, flush=True)
        if world and world.torchrun and not isinstance(error, LostPeers):
            world.torchrun.set("verdict", str(error))
    except Exception as error:
        if size == 1:
            raise
        lost = isinstance(error, dist.DistError) or "Connection" in str(error)  # another rank has the reason
        what = f"lost its peers ({str(error).splitlines()[0]})" if lost else f"failed:\n{traceback.format_exc()}"
        print(f"train_prx: rank {rank} {what}", file=sys.stderr, flush=True)
        code = 1
    if size > 1:  # at once: destroying the group would wait for peers that wait for this rank. torchrun ends them
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
