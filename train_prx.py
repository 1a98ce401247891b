"""PRX speedrun: train a text-to-image diffusion transformer from scratch, in one readable script.

    python data/scenes.py --track micro && python train_prx.py --track micro   # two CPU cores: watch it learn
    torchrun --standalone --shutdown-timeout=300 --nproc_per_node=8 train_prx.py   # 24 h: PRX-1.2B, 8 GPUs
    python train_prx.py --track micro --data MINE   # your own images, prepared with data/prepare.py
    python RUN/train_prx.py --paint REQUEST.json --out IMAGES.safetensors   # images of a run (records/README.md)

It needs nothing of its repository but prepared shards (data/README.md). A run lies in logs/NAME, its weights, for
diffusers' PRXTransformer2DModel, in transformer/; `python eval_prx.py logs/NAME` measures it. Model: PRX (Photoroom).

Best record: `micro`, 95 % prompt accuracy in 38 seconds on 2 CPU cores (records/micro/2026-11-26_lean).
"""

import argparse
import collections
import contextlib
import datetime
import fcntl
import gc
import hashlib
import heapq
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

# Read at once: the log holds what runs, whatever the file becomes
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
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class UserError(Exception):
    """Bad input: one sentence that names the value and says what to do. Exit code 2."""

    everywhere = False  # whether all ranks raise it: rank 0 alone says it


class TrainingFailed(Exception):
    """The run cannot go on. The last checkpoint stands. Exit code 1."""

    everywhere = True


def need(holds, sentence: str):
    if not holds:
        raise UserError(sentence)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def explained(what: str, remedy: str):
    """Whatever fails inside, and networks fail in any way, is one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({type(error).__name__}: {first_line(error)}); {remedy}") from None


def command(script: str, *words) -> str:
    """To copy: this interpreter, and a script that lies beside this one."""
    line = shlex.join(map(str, (sys.executable, Path(__file__).resolve().parent / script, *words)))
    return line.replace(f"{os.getcwd()}/", "")


# ========================================================================================
# 2. Configuration: every knob, once, with its evidence. What nobody tunes is a constant beside its use.
# Figures are FID in Photoroom's ablation study, PRX part 2 (FLUX VAE, 256 px, 100k steps), unless they say otherwise.

def knob(default, help: str, choices: str = ""):
    return field(default=default, metadata=dict(help=help, choices=choices.split() or None))


@dataclass(frozen=True)
class Config:
    # run
    track: str = knob("24h", "data, model, length, rules", "24h mini micro")
    name: str = knob("", "in logs/; empty: the track, and your data")
    seed: int = knob(0, "every draw: f(seed, step, global sample)")
    steps: int = knob(0, "length in steps, on a CPU reproducible to the bit")
    hours: float = knob(24.0, "or in hours, from process start to final weights")
    stages: str = knob("all", "of the track's, such as 256px,sft")
    init: str = knob("", "PRX to start from: diffusers' folder, owner/name")
    dry_run: bool = knob(False, "open all, warm up, print the plan, stop")
    resume: str = knob("auto", "auto: newest checkpoint | never: anew | a run")
    stop_after: int = knob(0, "checkpoint and stop at this step")
    # data
    data: str = knob("", "A or A:0.7,B:0.3; empty: shards/TRACK")
    sft_data: str = knob("", "of stage sft; empty: shards/24h-sft, if any")
    resolution: int = knob(256, "pixels: side, or root of a bucket's area")
    batch: int = knob(256, "images per step over all ranks")
    accumulate: int = knob(1, "micro-batches per step, FP32 sums")
    captions: str = knob("long", "long (18.20) | short (36.84) | mix:P of short")
    # what the model sees; --vae brings patch, bottleneck, predict and shift that fit
    vae: str = knob("repa-e", "repa-e (12.08) | flux (18.20) | flux2 | dc-ae | folder | none")
    patch: int = knob(2, "side of a token in the latent or image")
    bottleneck: int = knob(0, "width between patch and hidden; 0: none")
    predict: str = knob("v", "the output; the loss is in v-space", "x v")
    shift: float = knob(1.0, "t <- s t / (1 + (s - 1) t). PRX: pixels 3.0")
    # model: PRX-1.2B
    hidden: int = knob(1792, "width")
    depth: int = knob(16, "blocks")
    heads: int = knob(28, "hidden / heads is a multiple of 4")
    mlp_ratio: float = knob(3.5, "width of the gated MLP over hidden")
    text: str = knob("t5gemma", "t5gemma | tiny (DATA/text) | repository, folder")
    text_tokens: int = knob(256, "text is cut or padded to it: one shape")
    # objective
    contrastive: float = knob(0.0, "weight, arXiv 2506.05350. 18.20 -> 20.03")
    caption_dropout: float = knob(0.1, "share of empty prompts, for guidance")
    # REPA: one block's tokens against a frozen vision transformer's, arXiv 2410.06940
    repa: float = knob(0.0, "weight. 18.20 -> 14.64 DINOv3, 16.6 DINOv2")
    repa_kind: str = knob("repa", "irepa helps DINOv2, hurts DINOv3", "repa irepa")
    repa_teacher: str = knob("dinov3", "dinov3 | dinov2 | tiny (DATA/teacher) | repository")
    repa_layer: int = knob(7, "block, from 0, whose output is aligned")
    repa_until: float = knob(1.0, "share of the run after which it ends")
    pdino: float = knob(0.0, "weight of P-DINO, pixels only; part 3: 0.01")
    pdino_teacher: str = knob("facebook/dinov2-base", "as --repa-teacher")
    # routing: some tokens skip some blocks in training; sampling takes all
    tread: float = knob(0.0, "share, arXiv 2501.04765. 21.61; 1024 px 17.42 -> 14.10")
    tread_blocks: str = knob("2-12", "the blocks, from 0, both included")
    tread_select: str = knob("random", "learned: a scorer picks", "random learned")
    sprint: float = knob(0.0, "share, dense and deep fused, arXiv 2510.21986")
    # optimizer
    optimizer: str = knob("muon", "of blocks' matrices. 18.20 -> 15.55", "muon adamw")
    lr: float = knob(1e-4, "of Muon, scaled as AdamW's; or of AdamW alone")
    lr_adamw: float = knob(1e-4, "of what Muon leaves to AdamW")
    warmup: float = knob(0.01, "share of the run, linear")
    decay_from: float = knob(0.7, "share of the run; linear to zero; 1: none")
    momentum: float = knob(0.95, "Muon's, Nesterov")
    ns_steps: int = knob(5, "of Newton-Schulz; micro needs 3")
    modulation: str = knob("muon", "who moves it; adamw: 25 % fewer FLOPs", "muon adamw")
    eps: float = knob(1e-8, "AdamW's; 1e-15 in part 2")
    weight_decay: float = knob(0.0, "decoupled, of everything")
    clip: float = knob(1.0, "of a module's gradient norm; part 2: 0.2")
    ema: float = knob(0.999, "decay per step of the FP32 average; 0: off")
    # precision and speed
    weights: str = knob("fp32", "masters. bf16: 18.20 -> 21.87, an ablation", "fp32 bf16")
    compute: str = knob("auto", "of matmuls; masters stay FP32", "auto bf16 fp32")
    compile: str = knob("auto", "blocks; auto: where it pays back", "auto on off")
    # output
    sample_steps: int = knob(25, "Euler steps of the sample grids")
    cfg_scale: float = knob(3.0, "guidance of the sample grids")
    samples: int = knob(4, "grids and EMA exports, on the clock; one more at the end")
    checkpoint_minutes: float = knob(30.0, "between checkpoints; two are kept")


@dataclass(frozen=True)
class Stage:
    """A part of a run: its share of the length and the knobs that differ in it."""

    name: str = "main"
    share: float = 1.0
    knobs: dict = field(default_factory=dict)

    def config(self, c: Config) -> Config:
        return replace(c, **self.knobs)


# What fits a latent space. DC-AE's and FLUX.2's latents are one token per pixel.
LATENTS = dict(patch=2, bottleneck=0, predict="v", shift=1.0)
SPACES = {"none": dict(patch=32, bottleneck=256, predict="x", shift=3.0),
          "dc-ae": LATENTS | dict(patch=1), "flux2": LATENTS | dict(patch=1)}

AT_512 = dict(resolution=512, shift=2.0, captions="mix:0.2", repa=0.0)
SCENES = dict(vae="none", predict="x", text="tiny", repa_teacher="tiny", pdino_teacher="tiny")
TRACKS = {
    # Shares, batches and rates are guesses (rate times sqrt(batch / 256)): no such run has been made. REPA ends after
    # about 51 M samples (part 2), by the derived speed. Shift at 512 px: the root of the tokens (arXiv 2403.03206).
    "24h": (Config(repa=0.5, repa_until=0.26), [
        Stage("256px", 0.65, dict(batch=1024, lr=2e-4, lr_adamw=2e-4)),
        Stage("512px", 0.3, AT_512 | dict(batch=512, accumulate=2, tread=0.5)),
        Stage("sft", 0.05, AT_512 | dict(batch=256, lr=5e-5, lr_adamw=5e-5))]),
    # A guess from the micro track's search: not measured
    "mini": (Config(
        **SCENES, track="mini", hours=4 / 60, patch=16, bottleneck=128, shift=3.0, hidden=512, depth=8, heads=8,
        text_tokens=64, repa_layer=3, tread_blocks="1-6", lr=2e-3, lr_adamw=2e-3, warmup=0.03,
        decay_from=0.3, ema=0.99, checkpoint_minutes=5), [Stage()]),
    # From records/notes/search. No long caption has more than 37 tokens
    "micro": (Config(
        **SCENES, track="micro", steps=1100, hours=0.0, resolution=32, batch=32, patch=8, hidden=128, depth=6, heads=4,
        text_tokens=40, repa=4.0, repa_layer=2, repa_until=0.6, tread_blocks="1-4", lr=7e-3, lr_adamw=2e-3,
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
    parser = Parser(description="Train PRX. Defaults are those of the 24h track.", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for knob in fields(Config):
        kind = dict(type=knob.type, choices=knob.metadata["choices"])
        if knob.type is bool:
            kind = dict(action="store_true")
        help = f"{knob.metadata['help']} [{knob.default}]".replace("%", "%%")
        parser.add_argument(flag(knob.name), help=help, **kind)
    flags = vars(parser.parse_args(argv))

    config, stages = TRACKS[flags.get("track", "24h")]
    lengths = flags.get("steps"), flags.get("hours")
    need(not all(lengths), "--steps and --hours both give the length; give one of them")
    if any(lengths):
        flags = dict(steps=0, hours=0.0) | flags
    vae = flags.get("vae", config.vae)
    if vae != config.vae:
        space = SPACES.get(vae, LATENTS)
        flags = {k: v for k, v in space.items() if v != getattr(config, k)} | flags
    config = replace(config, **flags)

    names = [config.track]
    if config.data:
        folders = [Path(folder).resolve().name for folder, _ in data_folders(config.data)]
        names += [folder for folder in folders if folder != config.track]
    sft = config.sft_data or "shards/24h-sft"
    has_sft = config.sft_data or not config.data and Path(sft, "index.json").exists()
    name = config.name or re.sub(r"[^\w.-]", "_", "-".join(names))
    config = replace(config, name=name, data=config.data or f"shards/{config.track}")
    stages = {s.name: replace(s, knobs={k: v for k, v in s.knobs.items() if k not in flags})
              for s in stages if s.name != "sft" or has_sft}
    if "sft" in stages:
        stages["sft"].knobs["data"] = sft
    wanted = list(stages) if config.stages == "all" else config.stages.split(",")
    need(set(wanted) <= set(stages),
         f"--stages {config.stages} is unknown; this run has {','.join(stages)} (sft needs --sft-data)")
    chosen = [stage for stage in stages.values() if stage.name in wanted]
    World().refuse([p for stage in chosen for p in problems_in(stage.config(config))])
    return config, chosen


def data_folders(data: str) -> list[tuple[str, float]]:
    """A:0.7,B:0.3 -> [("A", 0.7), ("B", 0.3)]; without a weight it is 1. A folder that exists is
    taken by its name, a colon or commas in it included."""
    def entry(text):
        match = re.fullmatch(r"(.+):(\d*\.?\d+)", text)
        return (match[1], float(match[2])) if match and not Path(text).exists() else (text, 1.0)

    folders, pieces = [], data.split(",")
    while pieces:
        entries = [entry(",".join(pieces[:n + 1])) for n in range(len(pieces))]
        longest = max((n for n, (folder, _) in enumerate(entries) if Path(folder).exists()), default=0)
        folders.append(entries[longest])
        pieces = pieces[longest + 1:]
    need(all(folder and weight for folder, weight in folders),
         f"--data {data} is no list of folders with positive weights such as A or A:0.7,B:0.3")
    return folders


def routed_blocks(c: Config) -> tuple[int, int]:
    """The first block that routed tokens skip, and one past the last."""
    first, last = map(int, c.tread_blocks.split("-"))
    return first, last + 1


def problems_in(c: Config) -> list[str]:
    """A sentence for everything that cannot work, before anything is loaded."""
    positive = ("batch accumulate resolution hidden depth heads mlp_ratio patch text_tokens shift lr lr_adamw eps "
                "ns_steps sample_steps checkpoint_minutes")
    amounts = "steps hours stop_after bottleneck samples contrastive repa repa_layer pdino weight_decay clip"
    rules = [
        ("must be positive", lambda x: 0 < x < math.inf, positive),
        ("must not be negative", lambda x: 0 <= x < math.inf, amounts),
        ("must lie in 0 to 1", lambda x: 0 <= x <= 1, "caption_dropout warmup decay_from repa_until"),
        ("must be at least 0 and less than 1", lambda x: 0 <= x < 1, "momentum ema tread sprint"),
        ("must lie in 0 to 2^63 - 1", lambda x: 0 <= x < 2 ** 63, "seed"),
        ("must name a first and a last block, such as 2-12", lambda x: re.fullmatch(r"\d+-\d+", x), "tread_blocks"),
        ("is unknown; use long, short or mix:0.3",
         lambda x: re.fullmatch(r"long|short|mix:(0(\.\d+)?|1(\.0+)?)", x), "captions"),
        ("must be a plain folder name (letters, digits, . _ -)", lambda x: re.fullmatch(r"\.*[\w-][\w.-]*", x), "name")]
    problems = [f"{flag(name)} {getattr(c, name)!r} {rule}" for rule, fits, names in rules for name in names.split()
                if not fits(getattr(c, name))]
    if problems:
        return problems
    first, end = routed_blocks(c)
    blocks, layer = f"--tread-blocks {c.tread_blocks}", f"--repa-layer {c.repa_layer}"
    routed = c.tread or c.sprint
    misses = routed and c.repa_layer in range(first, end)
    return [sentence for holds, sentence in [
        (c.steps or c.hours, "the run has no length; give --steps or --hours"),
        (c.warmup <= c.decay_from, f"--warmup {c.warmup} ends after --decay-from {c.decay_from} begins; lower one"),
        (c.hidden % (4 * c.heads) == 0, f"--hidden {c.hidden} over --heads {c.heads} must be a multiple of 4"),
        (c.batch % c.accumulate == 0, f"--batch {c.batch} cannot be cut into --accumulate {c.accumulate} parts"),
        (not c.pdino or c.vae == "none", "--pdino compares pixels; give --vae none"),
        (not c.repa or c.repa_layer < c.depth, f"{layer} must be one of 0 to {c.depth - 1}"),
        (not (c.tread and c.sprint), "--tread and --sprint both route tokens; choose one"),
        (not routed or first < end <= c.depth, f"{blocks} must lie in 0 to {c.depth - 1}"),
        (not (c.repa and c.repa_kind == "irepa" and misses),
         f"{layer} must see all tokens for irepa; change {blocks}"),
    ] if not holds]


# ========================================================================================
# 3. Ranks, clock and log: torchrun's variables or one plain process; rank 0 speaks, the clock never stops.

TIMEOUT = datetime.timedelta(minutes=10)  # of collectives. None waits for a disk
# Dense BF16 of an H100 or H200 as others count it; MFU is the model's FLOPs over this
PEAK_FLOPS = 989e12


@dataclass
class World:
    """This process among its peers. `control`: a gloo group for decisions on the CPU, None for one rank."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    control: object = None
    store: object = field(default_factory=dist.HashStore)
    torchrun: object = None  # torchrun's store, which outlives a restart
    signal: int = 0
    turns: int = 0

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over the ranks: a time, a flag. No GPU is synchronised."""
        if self.control is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def gather(self, value) -> list:
        """One object of each rank, by rank."""
        values = [value] * self.size
        if self.control is not None:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def refuse(self, problems: list[str]):
        """UserError on all ranks if there is a problem on any: each problem once."""
        if found := sum(self.gather(problems), []):
            error = UserError("\n".join(dict.fromkeys(found)))
            error.everywhere = True
            raise error

    def first(self, work) -> str:
        """Rank 0 works, the others wait on the store: no collective, so that a slow disk ends no
        group. Returns what was in the way (an OSError), or nothing."""
        self.turns += 1
        key, failure = f"turn-{self.turns}", ""
        if self.rank == 0:
            try:
                work()
            except OSError as error:
                failure = str(error)
            self.store.set(key, failure)
        while not self.store.check([key]):
            time.sleep(0.05)
        return self.store.get(key).decode()


def connect() -> World:
    """NCCL with CUDA, gloo without."""
    env, device = os.environ, torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(env.get("LOCAL_RANK", 0)))
        count = torch.cuda.device_count()
        need(device.index < count, f"this machine has {count} GPUs; lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # FP32 means FP32
    if int(env.get("WORLD_SIZE", 1)) == 1:
        return World(device=device)
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    # The port may be taken, a host away, a variable missing
    with explained("the ranks cannot meet", "start them with torchrun --standalone, or give another --master_port"):
        torchrun, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # Without a prefix a restart finds the dead ranks' addresses in the store
        store = dist.PrefixStore(f"attempt-{attempt}", torchrun)
        backend, gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=gpu)
    world = World(rank, size, device, dist.new_group(backend="gloo", timeout=TIMEOUT), store, torchrun)
    if attempt != "0" and torchrun.check(["verdict"]):  # starting again helps against crashes only
        world.refuse([f"the attempt before ended for good: {torchrun.get('verdict').decode()}"])
    return world


def watch_signals(world: World):
    """SIGTERM and SIGINT ask for a checkpoint and the end. A repeat changes nothing: torchrun and
    Slurm both forward signals, so they come twice. Ctrl-C more than three seconds after the first
    signal ends the process at once."""
    began = None

    def note(number, _):
        nonlocal began
        if began is None:
            world.signal, began = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - began > 3:
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
        self.clear = "\r\033[K" if self.on and sys.stderr.isatty() else ""
        quiet = folder is None or not self.on
        self.text = open(os.devnull if quiet else folder / "log.txt", "a")
        self.metrics = open(os.devnull if quiet else folder / "metrics.jsonl", "a")
        if self.metrics.tell():  # a line that a crash cut short stays alone
            self.metrics.write("\n")

    def __call__(self, line: str, show: bool = True, live: bool = False):
        """show: on stdout, too. live: on a terminal instead as its progress line."""
        with contextlib.suppress(OSError):  # a full disk ends no run
            print(line, file=self.text, flush=True)
        if live and self.clear:
            print(self.clear + line, end="", file=sys.stderr, flush=True)
        elif show and self.on:
            print(self.clear + line, flush=True)

    def write(self, **record):
        """One line of metrics.jsonl. JSON knows no NaN: what is not finite becomes null."""
        record = json.loads(json.dumps(record | dict(time=time.time())), parse_constant=lambda name: None)
        with contextlib.suppress(OSError):
            print(json.dumps(record), file=self.metrics, flush=True)


def read_metrics(run: Path) -> list[dict]:
    """The records of metrics.jsonl; a line that a crash cut short is passed over."""
    path, records = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and "elapsed" in r]


def describe_machine(world: World) -> dict:
    """What a figure needs beside it to mean anything."""
    versions = {p: importlib.metadata.version(p) for p in ("torch", "numpy", "safetensors", "transformers")}
    info = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return dict(python=platform.python_version(), **versions, cpu=(cpus or [platform.processor()])[0],
                cpus=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu, ranks=world.size)


def has_fast_bf16(device: torch.device) -> bool:
    """CUDA, or a CPU with BF16 instructions; without them BF16 matmuls are slow (61 against 330 GFLOP/s)."""
    known = "amx_bf16", "avx512_bf16", "bf16"  # Intel, AMD, Arm
    return device.type == "cuda" or any(torch.cpu.get_capabilities().get(name) for name in known)


# ========================================================================================
# 4. The model: PRX. Names, shapes and numerics of the state dict are diffusers' PRXTransformer2DModel.

class Linear(nn.Linear):
    """Computes in the weight's dtype; the FP32 bias is cast."""

    def forward(self, x):
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight, bias)


def modulate(x, shift, scale):
    """LayerNorm, then the time's shift and scale (B, 1, D), in FP32. x (B, N, D)."""
    h = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return (h * (1 + scale) + shift).to(x.dtype)


def rope_table(rows: int, columns: int, axes_dim, theta: float, device):
    """cos, sin, (N, head_dim / 2) FP32 each: half of the pairs rotate with the row, half with the column."""
    arange = lambda *args: torch.arange(*args, dtype=torch.float64, device=device)
    angles = []
    for d, place in zip(axes_dim, torch.cartesian_prod(arange(rows), arange(columns)).T):
        frequencies = theta ** -(arange(0, d, 2) / d)
        angles.append(place[:, None] * frequencies)
    angle = torch.cat(angles, 1)
    return angle.cos().float(), angle.sin().float()


def rotate(x, rope):
    """RoPE (arXiv 2104.09864) on neighbouring pairs of channels. x (B, H, N, d) FP32."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


# Not cuDNN, PyTorch's first choice on Hopper: at 64 keys more than a multiple of 128, with a mask, its gradient of
# queries that no key fits is NaN (seen at 448 keys: records/notes/gpu.md)
BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


class Attention(nn.Module):
    """Image queries attend to text and image, in the mask's dtype. Text has no queries and no position."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.img_qkv_proj = Linear(dim, 3 * dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.txt_kv_proj = Linear(dim, 2 * dim, bias=False)
        self.norm_added_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.to_out = nn.ModuleList([Linear(dim, dim, bias=False)])

    def forward(self, x, text, rope, mask):
        split = lambda y, n: y.unflatten(-1, (n, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = split(self.img_qkv_proj(x), 3)  # (B, H, N, d) each
        text_k, text_v = split(self.txt_kv_proj(text), 2)  # (B, H, T, d) each
        q, k = rotate(self.norm_q(q.float()), rope), rotate(self.norm_k(k.float()), rope)
        k = torch.cat([self.norm_added_k(text_k.float()), k], 2)  # (B, H, T + N, d)
        v = torch.cat([text_v, v], 2)
        q, k, v = q.to(mask.dtype), k.to(mask.dtype), v.to(mask.dtype)
        with sdpa_kernel(BACKENDS, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        wide = int(dim * mlp_ratio)
        self.attention = Attention(dim, heads)
        self.gate_proj = Linear(dim, wide, bias=False)
        self.up_proj = Linear(dim, wide, bias=False)
        self.down_proj = Linear(wide, dim, bias=False)
        self.modulation = nn.Sequential(collections.OrderedDict(silu=nn.SiLU(), lin=Linear(dim, 6 * dim)))

    def forward(self, x, text, vec, rope, mask):
        """x (B, N, D), text (B, T, D), time vec (B, D), additive mask (B, 1, 1, T + N) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vec).float()[:, None].chunk(6, -1)
        h = self.attention(modulate(x, shift1, scale1), text, rope, mask)
        x = x + (gate1 * h).to(x.dtype)
        h = self.mlp(modulate(x, shift2, scale2))
        return x + (gate2 * h).to(x.dtype)

    def mlp(self, h):
        gate = F.gelu(self.gate_proj(h), approximate="tanh")
        return self.down_proj(gate * self.up_proj(h))


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.linear = Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec).float()[:, None].chunk(2, -1)
        return self.linear(modulate(x, shift, scale)).float()


class PRX(nn.Module):
    """x_t (B, C, H, W), t (B,) in (0, 1], text (B, T, context_in_dim) and its mask (B, T) bool in,
    x_0 or velocity out. With `tap`, the output of that block comes along, and which tokens it holds
    (None: all).

    Routing: the blocks of the span, less its end, see the tokens `keep` (B, K), or the K that the
    scorer likes best. TREAD puts the others back as they were. SPRINT, also when all tokens are
    kept, fuses the tokens before the span with those after it, where a learned token stands for the
    others.
    """

    DEFAULTS = dict(  # diffusers' config.json
        in_channels=16, patch_size=2, context_in_dim=2304, hidden_size=1792, mlp_ratio=3.5, num_heads=28, depth=16,
        axes_dim=None, theta=10000, time_factor=1000.0, time_max_period=10000, bottleneck_size=None)

    def __init__(self, span=None, sprint=False, scorer=False, **config):
        super().__init__()
        if unknown := config.keys() - self.DEFAULTS.keys():
            raise TypeError(f"PRX has no {', '.join(sorted(unknown))}")
        c = self.config = self.DEFAULTS | config
        d, heads, depth, bottleneck = c["hidden_size"], c["num_heads"], c["depth"], c["bottleneck_size"]
        c["axes_dim"] = list(c["axes_dim"] or [d // heads // 2] * 2)
        if sprint or scorer:  # not diffusers', but needed to load the weights again
            c |= dict(span=list(span), sprint=sprint, scorer=scorer)
        self.span = span or (depth, depth)
        patch = c["in_channels"] * c["patch_size"] ** 2
        self.img_in = Linear(patch, d)
        if bottleneck:
            self.img_in = nn.Sequential(Linear(patch, bottleneck), Linear(bottleneck, d))
        self.time_in = nn.Sequential(collections.OrderedDict(
            in_layer=Linear(256, d), silu=nn.SiLU(), out_layer=Linear(d, d)))
        self.txt_in = Linear(c["context_in_dim"], d)
        self.blocks = nn.ModuleList(Block(d, heads, c["mlp_ratio"]) for _ in range(depth))
        self.final_layer = FinalLayer(d, patch)
        self.skipped_token = nn.Parameter(torch.zeros(d)) if sprint else None
        self.fuse = Linear(2 * d, d) if sprint else None
        self.scorer = Linear(d, 1) if scorer else None

    def time_embedding(self, t):  # (B,) -> (B, 256)
        decay = -math.log(self.config["time_max_period"])
        frequencies = torch.exp(decay * torch.arange(128, device=t.device) / 128)
        angle = self.config["time_factor"] * (t.float()[:, None] * frequencies)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def forward(self, x, t, text, mask=None, keep=None, tap=None):
        c, p, taps = self.config, self.config["patch_size"], []
        grid = x.shape[2] // p, x.shape[3] // p
        rope = rope_table(*grid, c["axes_dim"], c["theta"], x.device)
        h = F.pixel_unshuffle(x, p).flatten(2).mT.contiguous()  # (B, N, C p p)
        h, text, vec = self.img_in(h), self.txt_in(text), self.time_in(self.time_embedding(t))
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=x.device)
        n = text.shape[1] + h.shape[1]
        padding = F.pad(~mask, (0, h.shape[1] + -n % 8))[:, None, None]  # attention's kernels want strides of 8
        mask = torch.where(padding, -torch.inf, 0.0)
        if h.is_cuda:  # on a CPU attention's backward pass took 11 ms in BF16, 1.2 in FP32
            mask = mask.to(h.dtype)
        mask = mask[..., :n]  # additive (B, 1, 1, T + N)

        def run(h, start, stop, rope, mask, kept=None):
            for i in range(start, stop):
                h = self.blocks[i](h, text, vec, rope, mask)
                if i == tap:
                    taps.extend((h, kept))
            return h

        first, end = self.span
        dense = h = run(h, 0, first, rope, mask)
        if keep is None:
            h = run(h, first, end, rope, mask)
        else:
            kept, gate = self.choose(h, keep)
            kept_rope = [table[kept][:, None] for table in rope]
            kept_mask = mask[..., :text.shape[1] + kept.shape[1]]
            some = kept[..., None].expand(-1, -1, h.shape[2])  # (B, K, D)
            h = run(h.gather(1, some), first, end, kept_rope, kept_mask, kept)
            rest = dense if self.fuse is None else self.skipped_token.to(h.dtype).expand_as(dense)
            h = rest.scatter(1, some, h * gate.to(h.dtype))
        if self.fuse is not None:
            h = self.fuse(torch.cat([dense, h], -1))
        h = self.final_layer(run(h, end, len(self.blocks), rope, mask), vec)  # (B, N, C p p)
        out = F.pixel_shuffle(h.mT.contiguous().unflatten(2, grid), p)
        return (out, *taps) if taps else out

    def choose(self, h, keep):
        """Which tokens go on (B, K), and a factor for each (B, K, 1), through which the scorer
        learns: its gradient is the score's sigmoid's (arXiv 2404.02258), its value 1, so that
        sampling with all tokens is no other model."""
        if self.scorer is None:
            return keep, torch.ones(1, 1, 1, device=h.device)
        score = self.scorer(h).float()  # (B, N, 1)
        kept = score[..., 0].topk(keep.shape[1], 1).indices.sort(1).values
        weight = score.gather(1, kept[..., None]).sigmoid()
        return kept, 1 + weight - weight.detach()


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> nn.Module:
    """Matrices as torch does; biases, gates and the final layer zero, so that a fresh PRX outputs zero; norms one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if name == "fuse.weight":  # at first the fused tokens are the deep ones: a plain PRX
            p.copy_(torch.eye(*p.shape).roll(len(p), 1))
        elif re.search(r"bias$|modulation\.|final_layer|skipped_token", name):
            p.zero_()
        elif p.ndim == 2:
            p.uniform_(-1, 1, generator=generator).mul_(p.shape[1] ** -0.5)
        else:
            assert re.search(r"norm_\w+\.weight$", name), f"no rule initialises {name} {tuple(p.shape)}"
            p.fill_(1.0)
    return module


def set_compute_dtype(module: nn.Module, dtype: torch.dtype):
    """Matrices in `dtype`, 1-D parameters in FP32. The optimizer has FP32 masters of all."""
    for p in module.parameters():
        p.data = p.data.to(dtype if p.ndim == 2 else torch.float32)


def flops_per_image(config: dict, tokens: int, text_tokens: int, kept: int = 0, span=(0, 0)) -> float:
    """Matrix products of one image's forward pass, a third of a training step's, less the time
    embedding's. The span's blocks see `kept` tokens."""
    d, patch = config["hidden_size"], config["in_channels"] * config["patch_size"] ** 2
    routed = span[1] - span[0] if kept else 0

    def block(n):
        linear = n * (4 + 3 * config["mlp_ratio"]) + text_tokens * 2 + 6
        return linear * d * d + 2 * n * (n + text_tokens) * d

    ends = (tokens * 2 * patch + text_tokens * config["context_in_dim"]) * d
    return 2 * ((config["depth"] - routed) * block(tokens) + routed * block(kept) + ends)


# ========================================================================================
# 5. Objectives: flow matching (arXiv 2210.02747, 2209.03003) with v- or x-prediction, contrastive, REPA, P-DINO.

UNIFORM = 0.1  # share of times that are drawn uniformly, not logit-normal
NEGATIVES = 8  # samples in a group of contrastive flow matching


def generator_for(device, *key: int):
    """The same for a key (seed, step, purpose) on every rank and after a resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def draw_times(n: int, shift: float, generator):
    """(n,) times in [1e-3, 1), 1 is noise: logit-normal (SD3, arXiv 2403.03206), a share uniform, shifted. On CPU."""
    t = torch.full((n,), 2.0)
    while (outside := (t < 1e-3) | (t >= 1)).any():
        share, uniform = torch.rand(2, n, generator=generator)
        normal = torch.randn(n, generator=generator)
        draw = torch.where(share < UNIFORM, uniform, normal.sigmoid())
        t = torch.where(outside, shift_time(draw, shift), t)
    return t


def shift_time(t, shift: float):
    """More time at high noise for shift > 1."""
    return shift * t / (1 + (shift - 1) * t)


def velocity(output, x_t, t, predict: str):
    """The network's output as d x_t / dt = eps - x_0. For x-prediction t is clamped at 0.05."""
    if predict == "v":
        return output
    return (x_t - output) / t.clamp(min=0.05)[:, None, None, None]


def kept_tokens(tokens: int, skipped: float) -> int:
    return max(1, round(tokens * (1 - skipped)))


def route(n: int, tokens: int, skipped: float, generator):
    """(n, K) random token numbers, in order: those that do not skip."""
    draw = torch.rand(n, tokens, generator=generator, device=generator.device)
    return draw.topk(kept_tokens(tokens, skipped), 1).indices.sort(1).values


def flow_matching_loss(model, x_0, eps, t, text, mask, c: Config, keep=None, tap=None):
    """Mean squared error in v-space, x_t = (1 - t) x_0 + t eps. Returns what to minimise (B,), the
    plain loss (B,), the estimate of x_0 and the tap.

    Contrastive (arXiv 2506.05350): less `contrastive` times the error to the target of the next in
    a group of eight, so that negatives depend neither on the ranks nor on the micro-batches.
    """
    time_ = t[:, None, None, None]
    x_t = (1 - time_) * x_0 + time_ * eps
    target = eps - x_0 if c.predict == "v" else velocity(x_0, x_t, t, "x")  # with the same clamp
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
    """REPA (arXiv 2410.06940): minus the mean cosine similarity (B,) of a block's tokens (B, K, D),
    projected, and a teacher's features (B, N, F); kept (B, K) are the tokens' numbers, None: all.

    iREPA (arXiv 2512.10794): a 3x3 convolution on the grid of rows x columns instead of the MLP,
    and features without most of what all tokens share: (f - gamma mean) / deviation over the
    tokens.
    """

    GAMMA = 0.8  # a guess: the paper leaves it open; PRX's framework takes it from the features

    def __init__(self, dim: int, features: int, kind: str):
        super().__init__()
        self.spatial, width = kind == "irepa", min(1024, 4 * features)
        layers = [Linear(9 * dim, features)]
        if not self.spatial:
            layers = [Linear(dim, width), nn.SiLU(), Linear(width, width), nn.SiLU(), Linear(width, features)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, tokens, kept, features, rows: int, columns: int):
        if self.spatial:
            image = tokens.mT.unflatten(2, (rows, columns))
            tokens = F.unfold(image.float(), 3, padding=1).mT  # (B, N, 9 D)
            deviation = features.std(1, keepdim=True) + 1e-6
            features = (features - self.GAMMA * features.mean(1, True)) / deviation
        if kept is not None:
            features = features.take_along_dim(kept[..., None], 1)
        return -F.cosine_similarity(self.mlp(tokens).float(), features, dim=-1).mean(1)


def perceptual_loss(teacher, x, x_0):
    """P-DINO (PRX part 3): 1 - mean cosine similarity (B,) of the patch tokens of x and x_0 (B, 3,
    H, W) in [-1, 1], at most 16 x 16 of them."""
    side = [min(16, n // teacher.patch) for n in x.shape[2:]]
    with torch.no_grad():
        real = teacher(x_0, *side)
    return 1 - F.cosine_similarity(teacher(x, *side), real, dim=-1).mean(1)


# ========================================================================================
# 6. Frozen networks: VAE, text encoder and teacher, from the Hugging Face hub or folders.

VAES = {
    "repa-e": "REPA-E/e2e-flux-vae",
    "flux": "black-forest-labs/FLUX.1-schnell",
    "flux2": "black-forest-labs/FLUX.2-dev",
    "dc-ae": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"}
TEXTS = {"t5gemma": "google/t5gemma-2b-2b-ul2"}
TEACHERS = {
    "dinov3": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "dinov2": "facebook/dinov2-with-registers-large"}


def quiet_import(name: str):
    """transformers or diffusers: seconds each, so only where they are used."""
    module = importlib.import_module(name)
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def loading(name: str):
    return explained(f"{name} cannot be loaded", "give a local folder, or for a gated repository accept its licence "
                     "and log in with `hf auth login`")


def frozen_dtype(device) -> torch.dtype:
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


class VAE:
    """diffusers' AutoencoderKL (FLUX.1, REPA-E), AutoencoderDC or AutoencoderKLFlux2.

    encode: uint8 (B, 3, H, W) -> FP32 (B, channels, H / factor, W / factor): the posterior's mode,
    normalised as diffusers' pipelines undo it. decode: back to FP32 (B, 3, H, W) in [-1, 1].
    `about` goes into prepared data.
    """

    def __init__(self, name: str, device="cpu"):
        diffusers = quiet_import("diffusers")
        source, sub = VAES.get(name, name), "vae"
        with loading(f"--vae {name}"):
            try:  # part of a pipeline, or the repository itself
                config = diffusers.AutoencoderKL.load_config(source, subfolder=sub)
            except OSError:
                sub, config = None, diffusers.AutoencoderKL.load_config(source)
            kind = getattr(diffusers, config["_class_name"])
            self.model = kind.from_pretrained(source, subfolder=sub, use_safetensors=True)
            z = self.posterior(torch.zeros(1, 3, 64, 64))
        c, digest = self.model.config, hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + tensor.float().numpy().tobytes())
        scale, shift = float(c.get("scaling_factor") or 1), float(c.get("shift_factor") or 0)
        self.scale, self.shift, self.pack = scale, shift, 1
        if kind.__name__ == "AutoencoderKLFlux2":  # packed 2 x 2 and whitened by its batch norm, in FP32
            norm, self.pack = self.model.bn, 2
            self.shift = norm.running_mean.float()[:, None, None].to(device)
            self.scale = (norm.running_var.float() + norm.eps).rsqrt()[:, None, None].to(device)
        self.device = device
        self.dtype = torch.float32 if c.get("force_upcast") else frozen_dtype(device)
        self.model.to(device, self.dtype).requires_grad_(False)
        self.channels, self.factor = z.shape[1] * self.pack ** 2, 64 // z.shape[2] * self.pack
        self.about = dict(
            vae=Path(name).name, type=kind.__name__, channels=self.channels, factor=self.factor, scale=scale,
            shift=shift, sha256=digest.hexdigest())

    def posterior(self, x):
        """Its mode, or the latent itself where there is no distribution."""
        coded = self.model.encode(x)
        return coded.latent if hasattr(coded, "latent") else coded.latent_dist.mode()

    @torch.no_grad()
    def encode(self, images):
        out = [self.posterior(to_float(x.to(self.device)).to(self.dtype)) for x in images.split(16)]
        return (F.pixel_unshuffle(torch.cat(out).float(), self.pack) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents):
        z = F.pixel_shuffle(latents / self.scale + self.shift, self.pack).to(self.dtype)
        return torch.cat([self.model.decode(rows).sample.float() for rows in z.split(8)])


class TextEncoder:
    """A Hugging Face encoder (of T5, T5Gemma, CLIP, too) or language model: last hidden states (B,
    max_tokens, width) FP32 and their mask (B, max_tokens) bool. data/prepare.py has cleaned
    captions as PRXPipeline cleans its prompts."""

    def __init__(self, name: str, device="cpu", max_tokens: int = 256):
        transformers = quiet_import("transformers")
        source = TEXTS.get(name, name)
        encoders = {"t5gemma": "T5GemmaEncoderModel", "t5": "T5EncoderModel", "clip": "CLIPTextModel"}
        self.device, self.max_tokens, self.lock = device, max_tokens, threading.Lock()
        with loading(f"--text {name}"):
            config = transformers.AutoConfig.from_pretrained(source)
            kind = getattr(transformers, encoders.get(config.model_type, "AutoModel"))
            if config.model_type == "clip":
                config = config.text_config
            config.is_encoder_decoder = False
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, padding_side="right")
            self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
            self.model = kind.from_pretrained(source, config=config, use_safetensors=True, dtype=frozen_dtype(device))
            self.model.to(device).requires_grad_(False)
            self.width = self.encode([""])[0].shape[-1]
        self.about = dict(text=Path(name).name, width=self.width, max_tokens=max_tokens)

    def tokenize(self, prompts: list[str]):
        """Token numbers and mask, (B, max_tokens) each, on the CPU; from any thread."""
        with self.lock:  # a fast tokenizer's padding is shared state
            out = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=self.max_tokens,
                                 return_tensors="pt")
        mask = out["attention_mask"].bool()
        # Where a tokenizer makes nothing of the empty prompt, one padding token stands for it
        mask[:, 0] = True
        return out["input_ids"], mask

    @torch.no_grad()
    def states(self, tokens, mask):
        return self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()

    def encode(self, prompts: list[str]):
        tokens, mask = (x.to(self.device) for x in self.tokenize(prompts))
        return self.states(tokens, mask), mask


class Teacher:
    """DINOv3, or DINOv2 with or without registers. Of images FP32 (B, 3, H, W) in [-1, 1], resized
    so that the patches are a grid of rows x columns, the patch tokens (B, rows * columns, width)
    FP32."""

    def __init__(self, name: str, device="cpu"):
        transformers = quiet_import("transformers")
        with loading(f"the teacher {name}"):
            self.model, report = transformers.AutoModel.from_pretrained(
                TEACHERS.get(name, name), use_safetensors=True, dtype=frozen_dtype(device), output_loading_info=True)
            if report["missing_keys"]:  # they would be drawn at random
                raise ValueError(f"it lacks weights such as {sorted(report['missing_keys'])[0]}")
            self.patch = self.model.config.patch_size
            self.width = self.model.config.hidden_size
        self.model.to(device).requires_grad_(False)
        self.mean = torch.tensor((0.485, 0.456, 0.406), device=device)[:, None, None]
        self.std = torch.tensor((0.229, 0.224, 0.225), device=device)[:, None, None]

    def __call__(self, images, rows: int, columns: int):
        size = rows * self.patch, columns * self.patch
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
        x = ((images / 2 + 0.5 - self.mean) / self.std).to(self.model.dtype)
        return self.model(pixel_values=x).last_hidden_state[:, -rows * columns:].float()  # less class and registers


def to_float(images):
    """uint8 (B, 3, H, W) -> FP32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


@dataclass
class Frozen:
    """The networks that a run uses and does not train, or None."""

    vae: VAE | None = None
    text: TextEncoder | None = None
    teacher: Teacher | None = None  # REPA's
    critic: Teacher | None = None  # P-DINO's
    init: PRX | None = None  # what a fresh run starts from

    @property
    def factor(self) -> int:  # pixels per side of a latent pixel
        return self.vae.factor if self.vae else 1

    @property
    def channels(self) -> int:  # of what the model works on
        return self.vae.channels if self.vae else 3

    def latents(self, x):
        """What the model works on, in FP32: stored latents as they are, images encoded or in [-1, 1]."""
        if x.dtype != torch.uint8:
            return x.float()
        return self.vae.encode(x) if self.vae else to_float(x)

    def pictures(self, x):
        """Back to uint8 images (B, 3, H, W)."""
        x = self.vae.decode(x) if self.vae else x
        return x.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)

    def embed(self, text, mask):
        """Stored states (B, T, D) as they are, token numbers (B, T) encoded."""
        return text if text.is_floating_point() else self.text.states(text, mask)


# ========================================================================================
# 7. Optimizer: Muon for the blocks' matrices, AdamW for the rest, one class for 1 to N ranks.

CLASSIC = [(3.4445, -4.7750, 2.0315)]  # Keller Jordan's quintic, the same at every step
# Polar Express (arXiv 2505.16932): the best quintic for each step, all but the last for values 1 % larger, as in the
# paper: in BF16 some leave the interval that a step is made for, and without this room they grow (2.7, not 1.13)
POLAR = [(8.28721202, -23.5958865, 17.3003873), (4.10705911, -2.94784992, 0.544843108),
         (3.94869085, -2.90890212, 0.551819139), (3.31841966, -2.48848802, 0.51004894),
         (2.30065202, -1.66890398, 0.418807312)]
POLAR[:-1] = [(a / 1.01, b / 1.01 ** 3, c / 1.01 ** 5) for a, b, c in POLAR[:-1]]
NEWTON_SCHULZ = POLAR
BETAS = 0.9, 0.95  # AdamW
# Elements orthogonalised at once: bounds the temporaries (5 GB for all gate and up matrices of 1.2 B)
STACK = 2 ** 26

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def orthogonalize(G, steps: int = 5, coefficients=None):
    """Newton-Schulz: push all singular values of each matrix towards 1. G (K, rows, columns), in G's dtype."""
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


def is_muon(name: str, p, c: Config) -> bool:
    others = c.modulation == "adamw" and ".modulation." in name
    return c.optimizer == "muon" and p.ndim == 2 and "blocks." in name and not others


class Flat:
    """Parameters as FP32 vectors, one per rank, of those that it owns, padded to the longest. They
    are dealt out in turn: of a run of equal shapes each rank gets as many, give or take one. grads
    (ranks, size) are the sums of all; master and ema (size,) are this rank's."""

    def __init__(self, params: dict, world: World, average: bool):
        self.params, self.rank = params, world.rank
        self.layout = [list(params)[rank::world.size] for rank in range(world.size)]
        self.size = max(sum(params[n].numel() for n in names) for names in self.layout)
        self.grads = torch.zeros(world.size, self.size, device=world.device)
        self.master = torch.zeros(self.size, device=world.device)
        for name, view in self.views(self.master).items():
            view.copy_(params[name].detach())
        self.ema = self.master.clone() if average else self.master

    def views(self, flat, rank: int | None = None, start: int = 0) -> dict:
        """Tensors by name in a rank's vector (this one's), or in its part from element `start` on."""
        out, end = {}, -start
        for name in self.layout[self.rank if rank is None else rank]:
            begin, end = end, end + self.params[name].numel()
            if begin >= 0 and end <= len(flat):
                out[name] = flat[begin:end].view(self.params[name].shape)
        return out

    def all_views(self, rows) -> dict:
        """Tensors by name in all ranks' vectors (ranks, size)."""
        return {n: v for rank, row in enumerate(rows) for n, v in self.views(row, rank).items()}

    def everywhere(self, flat) -> dict:
        """The same, from each rank's own vector. Every rank must call."""
        rows = flat[None]
        if len(self.layout) > 1:
            rows = flat.new_empty(len(self.layout), self.size)
            all_gather(rows.view(-1), flat)
        return self.all_views(rows)

    def reduced(self) -> torch.Tensor:
        """This rank's gradients, averaged over the ranks."""
        if len(self.layout) == 1:
            return self.grads[0]
        own = torch.empty_like(self.master)
        reduce_scatter(own, self.grads.view(-1))
        return own.div_(len(self.layout))


class MuonAdamW:
    """torch.optim.Muon with match_rms_adamw (where NEWTON_SCHULZ is CLASSIC) and torch.optim.AdamW,
    on FP32 vectors.

    One rank owns each parameter. Matrices and 1-D parameters have a vector each: Muon's matrices
    first, shape by shape, so that a stack of them is a view. A reduce-scatter hands each owner its
    gradients, an all-gather hands the weights back, matrices in the compute dtype. Each module has
    its own clipping: the model's first norms are 4, those of REPA's projector 20. Build the
    optimizer on FP32 nets, then set their compute dtype.
    """

    def __init__(self, nets: nn.ModuleDict, config: Config, world: World):
        self.params, self.modules = dict(nets.named_parameters()), list(nets)
        self.config, self.world = config, world
        if config.weights == "bf16":
            for p in self.params.values():
                p.data.copy_(p.data.bfloat16())
        muon = {n: tuple(p.shape) for n, p in self.params.items() if is_muon(n, p, config)}
        names = sorted(self.params, key=lambda n: (n not in muon, muon.get(n, ())))  # else module after module
        self.matrices = Flat({n: self.params[n] for n in names if self.params[n].ndim == 2}, world, config.ema > 0)
        self.vectors = Flat({n: self.params[n] for n in names if self.params[n].ndim != 2}, world, config.ema > 0)
        self.flats = self.matrices, self.vectors
        self.stacks, self.split = [], 0  # Muon's stacks: (first element, one past the last, shape)
        shapes = [muon[n] for n in self.matrices.layout[world.rank] if n in muon]
        for (rows, columns), count in collections.Counter(shapes).items():
            most = max(1, STACK // (rows * columns))
            for done in range(0, count, most):
                n = min(most, count - done)
                end = self.split + n * rows * columns
                self.stacks.append((self.split, end, (n, rows, columns)))
                self.split = end
        self.rest = [self.matrices.master[self.split:], self.vectors.master]  # what AdamW moves
        self.adamw = torch.optim.AdamW(self.rest, lr=0.0, betas=BETAS, eps=config.eps, fused=True)
        self.grad_views = self.matrices.all_views(self.matrices.grads) | self.vectors.all_views(self.vectors.grads)

        def elements(flat, module):  # in this rank's vector, where modules follow one another
            mine = [n for n in flat.layout[world.rank] if n.startswith(module + ".")]
            return sum(self.params[n].numel() for n in mine)

        self.sizes = [[elements(flat, module) for module in self.modules] for flat in self.flats]
        self.reset()
        self.publish()

    def reset(self):
        """Forget all moments, counts and gradients: a fresh optimizer at the weights as they are."""
        zeros = self.matrices.master.new_zeros
        self.momentum = zeros(self.split)
        for p in self.rest:
            self.adamw.state[p] = dict(step=zeros(()), exp_avg=zeros(len(p)), exp_avg_sq=zeros(len(p)))
        self.fresh = True
        for flat in self.flats:
            flat.grads.zero_()
        # skipped: steps with a non-finite gradient
        self.steps, self.skipped, self.in_a_row = zeros(()), zeros(()), zeros(())

    def matrix_dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.params.values() if p.ndim == 2)

    @torch.no_grad()
    def publish(self, ema: bool = False):
        """Give the nets the masters, or their moving average, on all ranks."""
        for flat in self.flats:
            dtype = torch.float32 if flat is self.vectors else self.matrix_dtype()
            own = flat.ema if ema else flat.master
            views = flat.everywhere(own.to(dtype) if self.world.size > 1 else own)
            torch._foreach_copy_([self.params[n].data for n in views], list(views.values()))

    @torch.no_grad()
    def accumulate(self):
        """Add a micro-batch's gradients, in FP32. What only another stage uses has none."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params.values()]
        add = torch._foreach_copy_ if self.fresh else torch._foreach_add_
        add([self.grad_views[n] for n in self.params], grads)
        self.fresh = False
        for p in self.params.values():
            p.grad = None

    def clip(self, grads) -> tuple[torch.Tensor, torch.Tensor]:
        """By module, in place. Returns the model's norm before, and whether all norms are finite."""
        split = [grad[:sum(sizes)].split(sizes) for grad, sizes in zip(grads, self.sizes)]
        parts = list(zip(*split))  # of each module
        squares = torch.stack([torch.stack(torch._foreach_norm(part)).square().sum() for part in parts])
        if self.world.size > 1:
            dist.all_reduce(squares)
        norms = squares.sqrt()
        if self.config.clip:
            for part, norm in zip(parts, norms):
                torch._foreach_mul_(part, (self.config.clip / (norm + 1e-6)).clamp(max=1.0))
        return norms[0], norms.isfinite().all()

    @torch.no_grad()
    def step(self, lr_share: float = 1.0) -> torch.Tensor:
        """One update with both rates times lr_share. Returns the model's gradient norm before
        clipping, on the device. A non-finite gradient changes no weight and counts in `skipped`,
        with no synchronisation."""
        c = self.config
        grads = [flat.reduced() for flat in self.flats]
        norm, good = self.clip(grads)
        self.skipped += ~good
        self.in_a_row = torch.where(good, 0.0, self.in_a_row + 1)
        self.muon_step(grads[0], good, lr_share)
        rate = c.lr if c.optimizer == "adamw" else c.lr_adamw
        self.adamw.param_groups[0].update(lr=rate * lr_share, weight_decay=c.weight_decay)
        self.adamw.found_inf = (~good).float()  # torch's own way to skip a fused step
        self.rest[0].grad, self.rest[1].grad = grads[0][self.split:], grads[1]
        self.adamw.step()
        self.rest[0].grad = self.rest[1].grad = None  # they would keep the sums through the next step
        self.steps += 1
        self.fresh = True  # what comes next begins new sums
        share = (9 / (10 + self.steps)).clamp(min=1 - c.ema)  # at first the average's memory is short
        for flat in self.flats:
            if c.weights == "bf16":  # an update below half a unit in the last place is lost
                flat.master.copy_(flat.master.bfloat16())
            if flat.ema is not flat.master:
                flat.ema.lerp_(flat.master, share)
        self.publish()
        return norm

    def muon_step(self, grad, good, lr_share: float):
        """Nesterov momentum, orthogonalised. Where the step is not good, nothing moves."""
        c = self.config
        rate = good * lr_share * c.lr
        grad.masked_fill_(~good, 0.0)
        for start, end, shape in self.stacks:
            w, g, m = (flat[start:end].view(shape) for flat in (self.matrices.master, grad, self.momentum))
            m.lerp_(g, good * (1 - c.momentum))
            update = orthogonalize(g.lerp(m, c.momentum).to(self.matrix_dtype()), c.ns_steps)
            w.mul_(1 - rate * c.weight_decay)
            w.addcmul_(update.float(), rate * -0.2 * max(shape[1:]) ** 0.5)  # AdamW's rate fits: arXiv 2502.16982

    def model_ema(self) -> dict[str, torch.Tensor]:
        """The model's moving average in FP32, on the CPU of rank 0. Every rank must call."""
        out = {}
        for flat in self.flats:
            views = flat.everywhere(flat.ema)
            if self.world.rank == 0:
                out |= {n.removeprefix("model."): v.cpu() for n, v in views.items() if n.startswith("model.")}
        return out

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Views of all that this rank owns: `master/NAME`, `momentum/NAME`, ..."""
        kinds = [("momentum", self.matrices.views(self.momentum))]
        for flat, p, start in zip(self.flats, self.rest, (self.split, 0)):
            kinds.append(("master", flat.views(flat.master)))
            if flat.ema is not flat.master:
                kinds.append(("ema", flat.views(flat.ema)))
            for kind in ("exp_avg", "exp_avg_sq"):
                kinds.append((kind, flat.views(self.adamw.state[p][kind], start=start)))
        counts = dict(steps=self.steps, skipped=self.skipped, in_a_row=self.in_a_row)
        return counts | {f"{kind}/{n}": v for kind, views in kinds for n, v in views.items()}

    @torch.no_grad()
    def load(self, read):
        """Of state_dict(). `read(key)` finds a tensor in whichever rank's file holds it."""
        for key, tensor in self.state_dict().items():
            tensor.copy_(read(key))
        for p in self.rest:
            self.adamw.state[p]["step"].copy_(self.steps - self.skipped)
        self.publish()


# ========================================================================================
# 8. Data: prepared shards (data/README.md has the format), in an order that depends on the seed alone.

def read_index(folder: Path) -> dict:
    """index.json of a prepared folder; UserError if it is missing, damaged or of another format."""
    path, how = folder / "index.json", "data/prepare.py"
    if folder.name in ("micro", "mini"):
        how = f"`{command('data/scenes.py', '--track', folder.name, '--out', folder)}`"
    need(path.exists(), f"--data {folder} holds no index.json; write it with {how}")
    with explained(f"{path} is damaged", "prepare the data again"):
        index = dict(json.loads(path.read_text()))
        need(index["format"] == 2,
             f"{path} has format {index['format']}, this script reads 2; prepare the data again")
        for s in index["shards"]:
            s |= {k: int(s[k]) for k in ("count", "resolution", "height", "width")}
            s |= dict(path=folder / s["file"], split=str(s["split"]), skip=np.array(s["skip"], np.int64))
        index["shards"][0], index["captions"], index["latent"], index["text"], index["image"]  # are they there?
    return index | dict(folder=folder, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


class Shards:
    """Prepared folders of one stage, mixed by weight: memory-mapped safetensors shards of the
    stage's resolution. A sample's id is its row among the training shards. UserError where a folder
    is damaged or does not fit."""

    WINDOW = 8192  # samples shuffled together

    def __init__(self, c: Config, stage: int = 0, vae: VAE | None = None):
        self.config, self.stage = c, stage
        self.fields = ["long", "short"] if c.captions.startswith("mix:") else [c.captions]
        folders = data_folders(c.data)
        self.weights = [weight for _, weight in folders]
        self.indices = [read_index(Path(path)) for path, _ in folders]
        first = self.indices[0]
        self.latent = first["latent"] if c.vae != "none" else None
        self.text, self.image = first["text"], first["image"]  # image: raw, jpeg, png or None
        self.pixels = not self.latent or c.repa > 0  # are images read?
        every = [s | dict(folder=f) for f, index in enumerate(self.indices) for s in index["shards"]]
        every = [s for s in every if s["resolution"] == c.resolution]
        self.shards = [s for s in every if s["split"] == "train"]
        self.held_out = [s for s in every if s["split"] == "eval"]
        sizes = [(s["height"], s["width"]) for s in self.shards]
        self.sizes = list(dict.fromkeys(sizes))
        self.check(c, vae)
        self.tensors = {s["path"]: self.open(s) for s in every}
        self.first = np.cumsum([0] + [s["count"] for s in self.shards])  # the id of each shard's first sample
        self.ids = [np.delete(np.arange(s["count"]), s["skip"]) + n for s, n in zip(self.shards, self.first)]
        self.folders = [[i for i, s in enumerate(self.shards) if s["folder"] == f] for f in range(len(folders))]
        self.counts = [sum(len(self.ids[i]) for i in shards) for shards in self.folders]
        need(all(self.counts), f"{c.data} has a folder with no training image of {c.resolution} px; prepare it again")
        self.bucket = np.repeat([self.sizes.index(size) for size in sizes], np.diff(self.first))
        self.empty = self.load(first["folder"] / "empty.safetensors")["text"] if self.text else ""

    def check(self, c: Config, vae: VAE | None):
        """Do the folders fit each other and the run? If not, UserError with both values."""
        first = self.indices[0]
        for index in self.indices:
            folder, has = index["folder"], index["captions"]
            sizes = sorted({str(s["resolution"]) for s in index["shards"]})
            need(str(c.resolution) in sizes, f"{folder} holds images of {', '.join(sizes)} px, and this stage trains "
                 f"at --resolution {c.resolution}; prepare it with --size")
            need(set(self.fields) <= set(has), f"--captions {c.captions} needs {self.fields}, and {folder} has {has}")
            for kind in ["latent", "text", "networks"] + ([] if self.latent else ["image"]):
                theirs, ours = index.get(kind), first.get(kind)
                need(theirs == ours, f"{folder} and {first['folder']} cannot be mixed: their {kind} is {theirs} and "
                     f"{ours}; prepare them alike")
        why = "--repa shows images to its teacher" if self.latent else "the model needs images"
        need(self.image or not self.pixels,
             f"{why}, and {c.data} holds none; prepare it with --store latent,text,image")
        if self.text:
            ours = dict(text=Path(c.text).name, max_tokens=c.text_tokens)
            theirs = {k: self.text[k] for k in ours}
            need(theirs == ours, f"the text of {c.data} was encoded with {theirs}, and this run has {ours}; give the "
                 "same --text and --text-tokens")
        if self.latent and vae:
            ours = {k: v for k, v in vae.about.items() if k != "vae"}
            theirs = {k: self.latent[k] for k in ours}
            need(theirs == ours, f"the latents of {c.data} were made by {theirs}, and --vae {c.vae} is {ours}; give "
                 "the --vae that made them")
        cell = c.patch * (vae.factor if vae else 1)
        for height, width in self.sizes:
            need(height % cell == width % cell == 0, f"images of {height} x {width} px cannot be cut into tokens of "
                 f"{cell} px (--vae {c.vae}, --patch {c.patch}); change one of them or the size")

    @staticmethod
    def load(path: Path) -> dict:
        """Tensors that read the file when they are indexed."""
        with explained(f"{path} cannot be read", "restore it or prepare the data again"):
            file = safe_open(path, "pt")
            return {key: file.get_tensor(key) for key in file.keys()}

    def open(self, s) -> dict:
        tensors, n = self.load(s["path"]), s["count"]
        kinds = ["caption", "text"] if self.text else ["caption"]
        lengths = {f"{kind}.{field}.offset": n + 1 for kind in kinds for field in self.fields}
        if self.latent:
            lengths["latent"] = n
        if self.pixels:
            lengths |= {"image": n} if self.image == "raw" else {f"{self.image}.offset": n + 1}
        for key, length in lengths.items():
            need(len(tensors.get(key, ())) == length, f"{s['path']} does not hold the {n} samples that its index "
                 f"promises (see {key}); prepare the data again")
        return tensors

    def ragged(self, s, row, key):
        tensors = self.tensors[s["path"]]
        start, end = tensors[f"{key}.offset"][row:row + 2].tolist()
        return tensors[key][start:end]

    def caption(self, s, row, field) -> str:
        return bytes(self.ragged(s, row, f"caption.{field}").numpy()).decode()

    def prompt(self, s, row, field):
        """The caption, or its stored states (T, D)."""
        return self.ragged(s, row, f"text.{field}") if self.text else self.caption(s, row, field)

    def subject(self, s, row):
        """What the model works on: a latent (C, h, w), or an image where none is stored."""
        return self.tensors[s["path"]]["latent"][row] if self.latent else self.picture(s, row)

    def picture(self, s, row):  # uint8 (3, H, W)
        if self.image == "raw":
            return self.tensors[s["path"]]["image"][row]
        file = io.BytesIO(self.ragged(s, row, self.image).clone().numpy())  # copies without the GIL
        image = Image.open(file, formats=["JPEG", "PNG"])
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    def prompts(self, n: int) -> tuple[list, list[str]]:
        """Held-out prompts for the grids (where there are none, of training), and to print underneath."""
        shards, field = self.held_out or self.shards, self.fields[0]
        rows = [(s, row, field) for s in shards for row in range(min(n, s["count"]))]
        rows = (rows * n)[:n]
        return [self.prompt(*row) for row in rows], [self.caption(*row) for row in rows]

    def stream(self, folder: int):
        """A folder's samples without end: each once per epoch, shards shuffled, then windows."""
        epoch = 0
        while True:
            rng = np.random.default_rng((self.config.seed, self.stage, folder, epoch))
            ids = np.concatenate([self.ids[s] for s in rng.permutation(self.folders[folder])])
            for start in range(0, len(ids), self.WINDOW):
                window = ids[start:start + self.WINDOW]
                rng.shuffle(window)
                yield from window.tolist()
            epoch += 1

    def order(self):
        """Global batches of sample ids without end, one bucket each. The folders take turns by
        weight; what does not fill a batch of its bucket waits for the next one."""
        waiting = [[] for _ in self.sizes]
        turns = [zip(itertools.count(0.5 / weight, 1 / weight), self.stream(folder))
                 for folder, weight in enumerate(self.weights)]
        for _, sample in heapq.merge(*turns):  # by the time at which each is due
            queue = waiting[self.bucket[sample]]
            queue.append(sample)
            if len(queue) == self.config.batch:
                yield np.array(queue)
                queue.clear()


def pack_text(texts: list, c: Config, encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions -> tokens (b, T) int64, or stored states (T_i, D) -> (b, T, D), then zeros. And the
    mask (b, T) bool."""
    if isinstance(texts[0], str):
        return encoder.tokenize(texts)
    states = texts[0].new_zeros(len(texts), c.text_tokens, texts[0].shape[1])
    for row, x in zip(states, texts):
        row[:len(x)] = x
    return states, torch.arange(c.text_tokens) < torch.tensor([len(x) for x in texts])[:, None]


@dataclass
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
    """Batches of a stage from its number `skip` on, with noise and routes, on the device. Draws are
    made for the global batch and then cut: they are the same for any number of ranks. `stall`:
    seconds that the trainer waited.

    On CUDA threads make batches ahead, each copying its rows out of the files; on two CPU cores
    they would cost."""

    THREADS = 4

    def __init__(self, data: Shards, c: Config, frozen: Frozen, world: World, skip: int = 0, step: int = 0):
        self.data, self.c, self.frozen, self.device = data, c, frozen, world.device
        share = c.batch // world.size
        self.rows = slice(world.rank * share, (world.rank + 1) * share)
        self.short = float(dict(long=0, short=1).get(c.captions, c.captions[4:]))  # share of short captions
        self.jobs = enumerate(data.order(), step - skip)
        for _ in range(skip):
            next(self.jobs)
        self.step, self.stall, self.ahead = step, 0.0, collections.deque()
        self.pool = ThreadPoolExecutor(self.THREADS) if self.device.type == "cuda" else None

    def __next__(self) -> Batch:
        start = time.perf_counter()
        if self.pool is None:
            batch = self.read(*next(self.jobs))
        else:
            while len(self.ahead) <= self.THREADS:
                self.ahead.append(self.pool.submit(self.read, *next(self.jobs)))
            batch = self.ahead.popleft().result()
        self.stall += time.perf_counter() - start
        batch = self.to_device(batch, self.step)
        self.step += 1
        return batch

    def read(self, step: int, ids: np.ndarray) -> Batch:
        """This rank's rows of a global batch, in pinned memory where there is a GPU."""
        c, data, ids = self.c, self.data, ids[self.rows]
        generator = generator_for("cpu", c.seed, step, 0)
        uniform = lambda: torch.rand(c.batch, generator=generator)[self.rows]
        t = draw_times(c.batch, c.shift, generator)[self.rows]
        dropped = uniform() < c.caption_dropout
        fields = ["short" if draw < self.short else "long" for draw in uniform()]
        shards = np.searchsorted(data.first, ids, "right") - 1
        places = [(data.shards[s], int(i - data.first[s])) for s, i in zip(shards, ids)]
        rows = zip(dropped, places, fields)
        texts = [data.empty if drop else data.prompt(*place, field) for drop, place, field in rows]
        x = torch.stack([data.subject(*place) for place in places])
        batch = Batch(x, t, *pack_text(texts, c, self.frozen.text))
        if data.latent and c.repa and self.frozen.teacher:  # until REPA ends
            batch.pixels = torch.stack([data.picture(*place) for place in places])
        return batch.map(torch.Tensor.pin_memory) if self.pool else batch

    def to_device(self, batch: Batch, step: int) -> Batch:
        c, device = self.c, self.device
        generator = generator_for(device, c.seed, step, 1)
        batch = batch.map(lambda x: x.to(device, non_blocking=True))
        factor = self.frozen.factor if batch.x.dtype == torch.uint8 else 1
        height, width = (n // factor for n in batch.x.shape[2:])
        shape = c.batch, self.frozen.channels, height, width
        batch.eps = torch.randn(shape, generator=generator, device=device)[self.rows]
        if c.tread + c.sprint:
            tokens = height * width // c.patch ** 2
            batch.keep = route(c.batch, tokens, c.tread + c.sprint, generator)[self.rows]
        return batch


# ========================================================================================
# 9. Sampling, grids and painting, export, checkpoints.

@torch.no_grad()
def sample(model, noise, text, mask, null_text, null_mask, *, steps: int, cfg_scale: float, shift: float, predict: str):
    """Euler from t = 1 to 0 on a shifted linear grid, with classifier-free guidance (arXiv
    2207.12598).

    noise (B, C, H, W) FP32; text (B, T, D), mask (B, T); null_text (1, T, D), null_mask (1, T) ->
    (B, C, H, W).
    """
    x, guided = noise, cfg_scale != 1
    if guided:
        text = torch.cat([text, null_text.expand_as(text)])
        mask = torch.cat([mask, null_mask.expand_as(mask)])
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


def save_grid(images, prompts: list[str], path: Path):
    """Images uint8 (N, 3, H, W) in four columns, the prompts underneath; small images are enlarged, pixels kept."""
    zoom = max(1, 192 // images.shape[-1])
    width, height = images.shape[-1] * zoom, images.shape[-2] * zoom
    lines = [textwrap.wrap(p, max(10, width // 6))[:8] for p in prompts]
    across, down = width + 8, height + 12 + 13 * max(map(len, lines))
    sheet = Image.new("RGB", (4 * across + 8, math.ceil(len(images) / 4) * down + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images.cpu()):
        x, y = 8 + i % 4 * across, 8 + i // 4 * down
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + height + 2), "\n".join(lines[i]), fill="black", font_size=11, spacing=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def paint(request: Path, out: Path):
    """--paint: images of this script's run. records/README.md has the request's format."""
    run = Path(__file__).resolve().parent
    with explained("--paint needs a run's folder and a request", "records/README.md has its format"):
        saved, asked = (json.loads(file.read_text()) for file in (run / "config.json", request))
        prompts, seeds = asked.pop("prompts"), asked.pop("seeds")
    c = Stage(**saved["stages"][-1]).config(Config(**saved["config"]))
    defaults = dict(format=1, transformer="transformer", steps=25, cfg_scale=3.0, batch=64, precision="fp32",
                    device="auto", height=c.resolution, width=c.resolution)
    unknown, asked = sorted(asked.keys() - defaults.keys()), defaults | asked
    need(not unknown, f"{request} asks for {', '.join(unknown)}, which this script does not know")
    device = asked["device"].replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    model = load_transformer(run / asked["transformer"], device)
    set_compute_dtype(model, torch.bfloat16 if asked["precision"] == "bf16" else torch.float32)
    text = TextEncoder(str(run / "text") if c.text == "tiny" else c.text, device, c.text_tokens)
    frozen, null = Frozen(VAE(c.vae, device) if c.vae != "none" else None), text.encode([""])
    shape = model.config["in_channels"], asked["height"] // frozen.factor, asked["width"] // frozen.factor
    cell = frozen.factor * c.patch
    fits = asked["height"] % cell == asked["width"] % cell == 0
    need(asked["format"] == 1 and len(prompts) == len(seeds) and fits,
         f"{request} needs format 1, as many seeds as prompts and sides that are multiples of {cell} px")
    images = []
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


def export_transformer(config: dict, tensors: dict, folder: Path):
    """A folder that diffusers' PRXTransformer2DModel.from_pretrained loads."""
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomically(folder / "diffusion_pytorch_model.safetensors", weights)
    write_json(folder / "config.json", {"_class_name": "PRXTransformer2DModel"} | config)


def load_transformer(source, device="cpu") -> PRX:
    """A PRX in diffusers format, strictly, in FP32: a transformer's folder, a pipeline's, or
    owner/name on the hub."""
    folder, tensors = Path(source), {}
    weights = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-?????.safetensors"
    with loading(f"{source} as a PRX transformer in diffusers format"):
        if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            hub = importlib.import_module("huggingface_hub")
            folder = Path(hub.snapshot_download(str(source), allow_patterns=["transformer/*", "config.json", *weights]))
        if (folder / "transformer").is_dir():
            folder = folder / "transformer"
        config = dict(json.loads((folder / "config.json").read_text()))
        for file in [file for pattern in weights for file in folder.glob(pattern)]:
            tensors |= safetensors.torch.load_file(file)
        # PRX has no resolution_embeds: where they are off nothing is missing, where they are on it refuses the name
        model = PRX(**{k: v for k, v in config.items() if not k.startswith("_") and v is not False})
        model.load_state_dict(tensors, strict=True)
    return model.to(device)


def find_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and a sentence for each one passed over."""
    notes = []
    for folder in sorted((run / "checkpoint").glob("step-*"), reverse=True):
        try:
            if folder.suffix == ".tmp":
                raise ValueError("it was not finished")
            for rank, sha256 in enumerate(json.loads((folder / "state.json").read_text())["sha256"]):
                with open(folder / f"rank-{rank}.safetensors", "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                        raise ValueError(f"rank-{rank}.safetensors is damaged (its sha256 differs)")
            return folder, notes
        except (OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"checkpoint {folder.name} is passed over: {error}")
    return None, notes


def load_checkpoint(folder: Path, state: dict, optimizer: MuonAdamW):
    """Fill the optimizer and the nets from a checkpoint of any number of ranks; `state` is its state.json."""
    files = [safe_open(folder / f"rank-{rank}.safetensors", "pt") for rank in range(len(state["sha256"]))]
    where = {key: file for file in files for key in file.keys()}
    missing = sorted(optimizer.state_dict().keys() - where.keys())
    need(not missing, f"checkpoint {folder} lacks {', '.join(missing[:1])}; it belongs to another model or to an "
         "older script, which its log.txt holds")
    optimizer.load(lambda key: where[key].get_tensor(key))


# ========================================================================================
# 10. Training.

def training_step(nets: nn.ModuleDict, frozen: Frozen, batch: Batch, c: Config, align: bool):
    """Forward, all losses and backward of one micro-batch. Returns its part of the plain
    flow-matching loss, and by tenths of t the sum of losses and their number, (2, 10)."""
    x_0, text = frozen.latents(batch.x), frozen.embed(batch.text, batch.mask)
    rows, columns = (n // c.patch for n in x_0.shape[2:])
    losses, plain, estimate, tapped = flow_matching_loss(
        nets["model"], x_0, batch.eps, batch.t, text, batch.mask, c, batch.keep, c.repa_layer if align else None)
    if align:
        pixels = batch.x if batch.pixels is None else batch.pixels
        with torch.no_grad():
            features = frozen.teacher(to_float(pixels), rows, columns)
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


# ---- set-up, in the order in which data flows ------------------------------------------

LARGE = 1e8  # parameters: a step of more takes minutes on a CPU
COMMAND = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
FREE = "name resume stop_after samples checkpoint_minutes compile dry_run init data sft_data".split()  # may change


def attempt(problems: list[str], make, *args):
    """make(*args); an error goes to the problems, to be told with all others."""
    try:
        return make(*args)
    except (UserError, OSError) as error:
        problems.append(str(error))


def settings(config: Config, stages: list[Stage]) -> dict:
    return dict(config=asdict(config), stages=[asdict(s) for s in stages])


def find_start(config: Config, stages: list[Stage], run: Path) -> tuple:
    """The checkpoint to go on from or None, its state, the seconds so far, sentences about those passed over."""
    checkpoint, notes, elapsed = None, [], [0.0]
    state = dict(step=0, stage=0, batches=0, samples=0, burned_in=False, features=0)
    if config.resume != "never":
        checkpoint, notes = find_checkpoint(run)
    if not checkpoint and config.resume not in ("auto", "never"):
        run = Path(config.resume)
        checkpoint, notes = find_checkpoint(run)
        need(checkpoint, f"--resume {run} holds no complete checkpoint; give a run's folder such as logs/micro")
    if checkpoint:
        check_settings(run, settings(config, stages))
        state |= json.loads((checkpoint / "state.json").read_text())
        elapsed += [record["elapsed"] for record in read_metrics(run)]
    return checkpoint, state, max(elapsed), notes


def check_settings(run: Path, now: dict):
    """Refuse to go on with a run under other settings."""
    with explained(f"{run}/config.json cannot be read", "choose another --name"):
        then = json.loads((run / "config.json").read_text())
        then, now = (x["config"] | dict(stages=[s | dict(knobs=s["knobs"] | dict(data="")) for s in x["stages"]])
                     for x in (then, now))
    differ = [f"{flag(k)} was {then.get(k)}, now {v}" for k, v in now.items() if k not in FREE and then.get(k) != v]
    need(not differ,
         f"{run} was started with other settings ({'; '.join(differ)}); repeat them, or choose another --name")


def open_everything(configs: list[Config], aligned: bool, world: World) -> tuple[list[Shards], Frozen]:
    """The data of every stage and every frozen network, checked against each other. UserError with all problems."""
    problems, c, device, frozen = [], configs[0], world.device, Frozen()
    if c.track == "24h" and device.type != "cuda" and not c.dry_run:
        reason = "no device"
        try:
            torch.cuda.init()
        except Exception as error:
            reason = first_line(error)
        problems.append(f"track 24h needs CUDA GPUs, and torch finds none; --track micro runs on a CPU ({reason})")
    problems += [f"--batch {k.batch} over --accumulate {k.accumulate} is not a multiple of {world.size} ranks; change "
                 "one of them" for k in configs if k.batch // k.accumulate % world.size]
    problems += [f"--batch {k.batch} over --accumulate and ranks must be a multiple of {NEGATIVES} for --contrastive"
                 for k in configs if k.contrastive and k.batch // k.accumulate // world.size % NEGATIVES]
    if c.vae != "none":
        frozen.vae = attempt(problems, VAE, c.vae, device)
    datasets = [attempt(problems, Shards, k, i, frozen.vae) for i, k in enumerate(configs)]
    texts = [data.text for data in datasets if data]
    if any(text != texts[0] for text in texts):
        problems.append("the stages' data differ in the text that they store; prepare them in the same way")
    folder = Path(data_folders(c.data)[0][0])
    source = lambda name, tiny: str(folder / tiny) if name == "tiny" else name
    there = lambda name: name != "tiny" or all(datasets)  # tiny networks travel with the data
    if not all(texts) and there(c.text):
        frozen.text = attempt(problems, TextEncoder, source(c.text, "text"), device, c.text_tokens)
    if aligned and there(c.repa_teacher):
        frozen.teacher = attempt(problems, Teacher, source(c.repa_teacher, "teacher"), device)
    if any(k.pdino for k in configs) and there(c.pdino_teacher):
        frozen.critic = attempt(problems, Teacher, source(c.pdino_teacher, "teacher"), device)
    if c.init:
        frozen.init = attempt(problems, load_transformer, c.init)
    world.refuse(problems)
    return datasets, frozen


def begin_folder(folder: Path, config: Config, stages: list[Stage], fresh: bool, text: Path):
    """The run's folder. Returns an open file that keeps other processes out, on this machine and
    most shared disks. --resume never moves an old run aside, and what a failed start has left
    goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(folder.with_name(f".{folder.name}.lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {folder}; wait for it, or choose another --name") from None
    except OSError:
        print(f"warning: the file system cannot lock {folder}; do not start two runs in it", flush=True)
    if config.resume == "never" and (folder / "log.txt").exists():
        names = (folder.with_name(f"{folder.name}.old{n}") for n in range(1, 10 ** 6))
        folder.rename(next(name for name in names if not name.exists()))
    if fresh:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder / "cache", ignore_errors=True)
    if config.text == "tiny":
        shutil.copytree(text, folder / "text", dirs_exist_ok=True)
    write_json(folder / "config.json", settings(config, stages))
    write_atomically(folder / "train_prx.py", SOURCE.encode())
    return lock


def build_nets(configs: list[Config], text_width: int, features: int, frozen: Frozen, device) -> nn.ModuleDict:
    """The model, and REPA's projector onto a teacher's features (0: none). FP32, from the seed or --init."""
    c, routes = configs[0], any(k.tread or k.sprint for k in configs)
    model = PRX(in_channels=frozen.channels, patch_size=c.patch, context_in_dim=text_width,
                hidden_size=c.hidden, mlp_ratio=c.mlp_ratio, num_heads=c.heads, depth=c.depth,
                bottleneck_size=c.bottleneck or None, span=routed_blocks(c) if routes else None,
                sprint=c.sprint > 0, scorer=routes and c.tread_select == "learned")
    nets = nn.ModuleDict(dict(model=initialize(model, c.seed)))
    if frozen.init:
        need(frozen.init.config == model.config,
             f"--init {c.init} has {frozen.init.config}, this run {model.config}; give the flags that fit it")
        model.load_state_dict(frozen.init.state_dict())
        frozen.init = None
    if features:
        nets["repa"] = initialize(Alignment(c.hidden, features, c.repa_kind), c.seed + 1)
    return nets.to(device)


class Run:
    """All that training holds, made in the order in which data flows. With --dry-run no file is written."""

    def __init__(self, world: World, config: Config, stages: list[Stage]):
        folder, problems = Path("logs") / config.name, []
        start = attempt(problems, find_start, config, stages, folder) if world.rank == 0 else None
        world.refuse(problems)
        self.checkpoint, self.state, before, notes = world.gather(start)[0]
        self.clock = Clock(before)
        if self.checkpoint:
            config = replace(config, init="")
        self.world, self.folder, self.config, self.stages = world, folder, config, stages
        self.configs = [stage.config(config) for stage in stages]  # one per stage, as are the data

        aligned = any(self.aligned(c) for c in self.configs[self.state["stage"]:])
        self.datasets, self.frozen = open_everything(self.configs, aligned, world)
        mix = [[i["sha256"], weight] for data in self.datasets for i, weight in zip(data.indices, data.weights)]
        if self.state.setdefault("data", mix) != mix:
            problems.append(f"{self.checkpoint} was trained on other data (sha256 and weight {self.state['data']}, now "
                            f"{mix}); give the same --data, or choose another --name")
        elif world.rank == 0 and not config.dry_run:
            text = self.datasets[0].indices[0]["folder"] / "text"
            self.lock = attempt(problems, begin_folder, folder, config, stages, not self.checkpoint, text)
        world.refuse(problems)
        log = self.log = Log(None if config.dry_run else folder, world)
        log(f"command: {COMMAND}\nsettings: {json.dumps(settings(config, stages))}\nmachine: "
            f"{json.dumps(describe_machine(world))}\n--- source\n{SOURCE}\n--- end of source", show=False)
        for note in notes:
            log(note)

        frozen, data = self.frozen, self.datasets[0]
        # Its projector stays after the burn-in: whatever goes on has the same optimizer
        if frozen.teacher:
            self.state["features"] = frozen.teacher.width
        width = data.text["width"] if data.text else frozen.text.width
        self.nets = build_nets(self.configs, width, self.state["features"], frozen, world.device)
        self.large = world.device.type == "cpu" and sum(p.numel() for p in self.nets.parameters()) > LARGE
        averaged = replace(config, ema=max(c.ema for c in self.configs))  # in any stage
        self.optimizer = None if config.dry_run and self.large else MuonAdamW(self.nets, averaged, world)
        bf16 = config.compute == "bf16" or config.compute == "auto" and has_fast_bf16(world.device)
        set_compute_dtype(self.nets, torch.bfloat16 if bf16 else torch.float32)
        self.saved = None  # the step of the last checkpoint
        self.no_checkpoint_since = None  # seconds on the clock: the first failure since a success
        images = ", ".join(f"{sum(d.counts):,} images of {d.config.resolution} px" for d in self.datasets)
        log(f"{config.name}: PRX {self.parameters() / 1e6:.1f} M parameters, {'BF16' if bf16 else 'FP32'} compute, "
            f"{world.size} rank(s) on {world.device.type}, {images}")

    def aligned(self, c: Config) -> bool:
        return c.repa > 0 and not self.state["burned_in"]

    def forward_backward(self, batch: Batch, c: Config, align: bool) -> list:
        """All micro-batches of a step: the sums of what training_step returns."""
        parts = []
        for part in batch.split(c.accumulate):
            parts.append(training_step(self.nets, self.frozen, part, c, align))
            self.optimizer.accumulate()
        return [sum(values) for values in zip(*parts)]

    def flops(self, c: Config, tokens: int) -> float:
        """The model's, forward and backward, of an image."""
        kept = kept_tokens(tokens, c.tread + c.sprint)
        return 3 * flops_per_image(self.nets["model"].config, tokens, c.text_tokens, kept, routed_blocks(c))

    def parameters(self) -> int:
        return sum(p.numel() for p in self.nets["model"].parameters())

    def checkpoint_bytes(self) -> int:
        """FP32 masters, moments and EMA, over all ranks."""
        average = any(c.ema for c in self.configs)
        copies = lambda name, p: (2 if is_muon(name, p, self.config) else 3) + average
        return sum(4 * p.numel() * copies(name, p) for name, p in self.nets.named_parameters())


def get_ready(r: Run):
    """What may go wrong goes wrong now. With --dry-run the plan is printed, else the checkpoint loaded."""
    c, log, measured = r.config, r.log, {}
    if not c.dry_run:
        check_disk(r)
    long = c.steps >= 600 or c.hours >= 1.5 / 60  # two cores: 15 s for a fifth of a step (notes/speed.md)
    if c.compile == "on" or c.compile == "auto" and (r.world.device.type == "cuda" or long):
        compile_blocks(r)
    if r.large:
        log("no warm-up: on a CPU a model of this size takes minutes a step")
    else:
        measured = warm_up(r)
    if c.dry_run:
        log(describe_plan(r, measured))
    elif r.checkpoint:
        load_checkpoint(r.checkpoint, r.state, r.optimizer)
        step, elapsed = r.state["step"], r.clock()
        log(f"resumed from {r.checkpoint} at step {step}, {elapsed:.0f} s on the clock")
        log.write(event="resume", step=step, elapsed=elapsed)


def check_disk(r: Run):
    """Room for three checkpoints (two are kept, one is being written) and the exports."""
    room = 3 * r.checkpoint_bytes() + 4 * r.parameters() * (r.config.samples + 1)
    free = shutil.disk_usage(r.folder).free + sum(p.stat().st_size for p in r.folder.glob("checkpoint/*/*"))
    r.world.refuse([] if free >= room else [
        f"{r.folder.resolve()} has {free / 1e9:.1f} GB free and the run needs {room / 1e9:.1f}; make room"])


def compile_blocks(r: Run):
    """One graph for all blocks, per shape. The cache lies in the run's folder."""
    cache = r.folder / "cache"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache.resolve())
    torch._inductor.config.cpp.vec_isa_ok = True  # skip Inductor's CPU probe (6 s of 29)
    torch._dynamo.config.recompile_limit = 64  # shapes; after the default, 8, it would run eagerly
    modules = list(r.nets["model"].blocks)
    for net in (r.frozen.teacher, r.frozen.critic, r.frozen.text):
        if net and r.world.device.type == "cuda":  # on CPUs a teacher's cost 8 s and save 2
            modules += [m for m in net.model.modules() if type(m).__name__.endswith("Layer")]
    for module in modules:
        module.compile(dynamic=False)
    r.log(f"compile cache: {sum(p.is_file() for p in cache.rglob('*'))} files at the start")


def warm_up(r: Run) -> dict[int, tuple[float, int]]:
    """A throw-away step of every shape of every stage to come: compiles what the run will need, and
    finds out of memory by running out of memory. Returns per stage, on CUDA, seconds of a step
    without the optimizer, and peak bytes."""
    cuda, problems, broken, measured = r.world.device.type == "cuda", [], [], {}
    for stage in range(r.state["stage"], len(r.configs)):
        c, data, slowest = r.configs[stage], r.datasets[stage], 0.0
        loader = Loader(data, c, r.frozen, r.world)
        aligns = [False, True] if r.aligned(c) and c.repa_until < 1 else [r.aligned(c)]
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            aligns *= 2  # the last one is timed
        for bucket, (height, width) in enumerate(data.sizes):
            ids = np.resize(np.flatnonzero(data.bucket == bucket), c.batch)
            batch = loader.to_device(loader.read(0, ids), 0)
            try:
                for align in aligns:
                    start = time.perf_counter()
                    loss, _ = r.forward_backward(batch, c, align)
                    loss.item()
                slowest = max(slowest, time.perf_counter() - start)
            except torch.OutOfMemoryError as error:
                problems.append(f"stage {r.stages[stage].name} does not fit into a GPU at {height} x {width} px "
                                f"({first_line(error)}); give --accumulate {2 * c.accumulate}, or a smaller model")
            except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, a broken one, no Python headers
                broken.append(first_line(error))
        if cuda:
            measured[stage] = slowest, torch.cuda.max_memory_allocated()
    if reasons := sum(r.world.gather(broken), []):  # on any rank. Does it fit uncompiled?
        r.log(f"torch.compile does not work here, so the blocks run uncompiled, which is slower ({reasons[0]})")
        torch.compiler.set_stance("force_eager")
        r.nets.zero_grad()
        r.optimizer.reset()
        return warm_up(r)
    r.world.refuse(problems)
    r.optimizer.step(0.0)
    r.optimizer.reset()
    return measured


def describe_plan(r: Run, measured: dict) -> str:
    """What --dry-run prints: per stage what is derived, and what the warm-up measured ('-' without CUDA)."""
    rows = ["stage,px,tokens,text,batch,TFLOP/image,images/s,peak GB,samples,epochs".split(",")]
    show = lambda value, form: format(value, form) if value else "-"
    for i, (stage, c, data) in enumerate(zip(r.stages, r.configs, r.datasets)):
        tokens = max(map(math.prod, data.sizes)) // (c.patch * r.frozen.factor) ** 2
        share = stage.share / sum(s.share for s in r.stages)
        seconds, peak = measured.get(i, (math.inf, 0))
        rate = c.batch / seconds
        samples = c.steps * share * c.batch or c.hours * 3600 * share * rate
        rows.append([stage.name, c.resolution, tokens, c.text_tokens, c.batch, f"{r.flops(c, tokens) / 1e12:.4g}",
                     show(rate, ",.0f"), show(peak / 1e9, ".1f"), show(samples, ",.0f"),
                     show(samples / sum(data.counts), ".2f")])
    lines = ["".join(f"{cell:>12}" for cell in row) for row in rows]
    lines.append(f"a checkpoint: {r.checkpoint_bytes() / 1e9:.3g} GB\nmeasured: images/s (without the optimizer), peak "
                 "GB\nderived: TFLOP/image (3 x flops_per_image), samples (time x share x images/s), epochs\n"
                 "nothing is in the way; leave --dry-run away to train")
    return "\n".join(lines)


# ---- the loop and what it writes -------------------------------------------------------

CHECKPOINT_AGAIN = 300.0  # seconds until a failed one is tried again


def loop(r: Run) -> tuple[float, float, float]:
    """Train until the length is reached, a signal comes or --stop-after. Returns progress, elapsed, stall."""
    config, world, state, optimizer = r.config, r.world, r.state, r.optimizer
    # Less the time to write them: a guess
    budget = max(1e-3, config.hours * 3600 - 1.0 - 2e-8 * r.parameters())
    [elapsed] = world.agree(r.clock())
    heart, next_checkpoint = Heartbeat(r, elapsed), elapsed + config.checkpoint_minutes * 60
    stage, loader, stall, next_grid = None, None, 0.0, 0
    while True:
        elapsed, number = world.agree(r.clock(), world.signal)
        world.signal = int(number) or world.signal  # one may have come meanwhile
        progress = state["step"] / config.steps if config.steps else min(1.0, elapsed / budget)
        if number or progress >= 1 or 0 < config.stop_after <= state["step"]:
            break
        first = state.setdefault("first_progress", progress)
        next_grid = next_grid or max(1, math.ceil(progress * (config.samples + 1)))
        if (now := stage_at(progress, r.stages)) != stage:
            if now != state["stage"]:
                state |= dict(stage=now, batches=0)
                r.log(f"stage {r.stages[now].name}: {r.stages[now].knobs}")
            stage, c, optimizer.config = now, r.configs[now], r.configs[now]
            loader = Loader(r.datasets[now], c, r.frozen, world, state["batches"], state["step"])
            loader.stall = stall
        if r.frozen.teacher and (progress >= c.repa_until or not any(k.repa for k in r.configs[stage:])):
            r.frozen.teacher, state["burned_in"] = None, True
            gc.collect()  # compiled layers refer to themselves
            r.log(f"REPA ends at step {state['step']}: the teacher is gone from memory")

        batch = next(loader)
        loss, by_time = r.forward_backward(batch, c, r.aligned(c))
        norm = optimizer.step(lr_share(progress, first, c))
        heart.pending.append((loss, by_time, norm, progress))
        state |= dict(step=state["step"] + 1, batches=state["batches"] + 1, samples=state["samples"] + c.batch)
        stall = loader.stall

        due = elapsed >= next_checkpoint
        if due or elapsed - heart.last >= heart.EVERY:  # a checkpoint's steps are in the log before it is written
            heart.beat(elapsed, batch, stall)
        if due:
            saved = save_checkpoint(r, elapsed)
            next_checkpoint = elapsed + (config.checkpoint_minutes * 60 if saved else CHECKPOINT_AGAIN)
        if progress * (config.samples + 1) >= next_grid <= config.samples:
            save_samples(r, f"step-{state['step']:08d}")
            save_export(r, r.folder / "exports" / f"step-{state['step']:08d}")
            next_grid += 1
    if heart.pending:
        heart.beat(elapsed, batch, stall)
    return progress, elapsed, stall


class Heartbeat:
    """Collects scalars on the device; every few seconds reads them at once and writes them down. Ends
    the run, with a checkpoint, after ten steps in a row whose gradient was not finite."""

    EVERY = 5.0  # seconds

    def __init__(self, r: Run, now: float):
        self.r, self.last = r, now
        self.pending, self.shown = [], 0  # (loss, loss by time, gradient norm, progress) of each step

    def beat(self, now: float, batch: Batch, stall: float):
        r, state, ranks = self.r, self.r.state, self.r.world.size
        c = r.configs[state["stage"]]
        losses, by_time, norms, progresses = zip(*self.pending)
        losses, by_time = torch.stack(losses), torch.stack(by_time).sum(0)
        if ranks > 1:
            dist.all_reduce(losses)
            dist.all_reduce(by_time)
        losses, (error, count) = (losses / ranks).tolist(), by_time.cpu()
        loss, progress = float(np.mean(losses)), progresses[-1]
        rate = c.batch * len(losses) / max(now - self.last, 1e-3)
        counted = {k: state[k] for k in ("step", "samples", "stage")}
        r.log.write(progress=progress, elapsed=now, loss=loss, losses=losses, progresses=progresses,
                    grad_norm=torch.stack(norms).mean().item(), images_per_s=rate, cpu_s=time.process_time(),
                    loss_by_time=(error / count.clamp(min=1)).tolist(), data_stall_s=stall, **counted,
                    skipped_steps=r.optimizer.skipped.item(), no_checkpoint_since=r.no_checkpoint_since)
        speed = f"{rate:,.0f} images/s"
        if r.world.device.type == "cuda":
            flops = r.flops(c, batch.eps[0, 0].numel() // c.patch ** 2)
            speed += f"  MFU {flops * rate / ranks / PEAK_FLOPS:.1%}"
        left = now * (1 / progress - 1) if progress else 0.0
        twentieth = int(progress * 20)
        r.log(f"step {state['step']:6d}  {progress:6.1%}  loss {loss:.4f}  {speed}  {now:.0f} s, {left:.0f} s left",
              show=twentieth > self.shown, live=True)
        self.last, self.pending, self.shown = now, [], twentieth
        if r.optimizer.in_a_row.item() >= 10:
            save_checkpoint(r, now)
            raise TrainingFailed(f"the norm of the gradient was not finite 10 steps in a row; step {state['step']} is "
                                 "kept; lower --lr or --lr-adamw, or look at the data")


def save_checkpoint(r: Run, elapsed: float) -> bool:
    """checkpoint/step-N/: a file of each rank with what it owns, by parameter name, and state.json
    with their sha256. No RNG state: every draw is a function of (seed, step), the data position a
    number of batches. All ranks call. Returns whether the step is on disk.

    No collective waits for a disk: each rank says on the store that its file is there, and rank 0
    renames. Where one cannot write (a full disk), all drop this one and training goes on.
    Synchronous: 14 GB over 8 ranks every 30 minutes are 0.3 % at 2.5 GB/s, 1.6 % at 0.5 GB/s
    (derived).
    """
    world, step = r.world, r.state["step"]
    if r.saved == step:
        return True
    folder = r.folder / f"checkpoint/step-{step:08d}"
    data = safetensors.torch.save({k: v.cpu() for k, v in r.optimizer.state_dict().items()})
    said = dict(sha256=hashlib.sha256(data).hexdigest())  # of the bytes in memory
    try:
        write_atomically(folder.with_suffix(".tmp") / f"rank-{world.rank}.safetensors", data)
    except OSError as error:
        said = dict(error=f"rank {world.rank}: {error}")
    keys = [f"checkpoint-{world.turns}-{rank}" for rank in range(world.size)]
    world.store.set(keys[world.rank], json.dumps(said))
    if failure := world.first(lambda: finish_checkpoint(r, folder, keys, elapsed)):
        if r.no_checkpoint_since is None:
            r.no_checkpoint_since = elapsed
        r.log(f"warning: checkpoint {folder.name} could not be written ({failure}); the ones before it stay, training "
              "goes on, and it is tried again in five minutes")
        return False
    r.saved, r.no_checkpoint_since = step, None
    return True


def finish_checkpoint(r: Run, folder: Path, keys: list[str], elapsed: float):
    """Rank 0: wait for all files, then give the folder its name and remove all but the last two."""
    store, temporary, patience = r.world.store, folder.with_suffix(".tmp"), time.monotonic() + 60
    while late := [str(rank) for rank, key in enumerate(keys) if not store.check([key])]:
        if time.monotonic() > patience:
            r.log(f"checkpoint {folder.name} waits for the disk of rank {', '.join(late)}")
            patience = math.inf
        time.sleep(0.05)
    said = [json.loads(store.get(key)) for key in keys]
    try:
        if errors := [s["error"] for s in said if "error" in s]:
            raise OSError("; ".join(errors))
        sums = [s["sha256"] for s in said]
        write_json(temporary / "state.json", r.state | dict(elapsed=elapsed, sha256=sums))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        for half in folder.parent.glob("*.tmp"):  # this one, if it failed, and what a crash has left
            shutil.rmtree(half, ignore_errors=True)
    older = sorted(other for other in folder.parent.iterdir() if other.name < folder.name)
    for other in older[:-1]:
        shutil.rmtree(other, ignore_errors=True)


def save_samples(r: Run, name: str):
    """The same prompts and noise at every call of a stage, with the EMA weights. All ranks call, rank 0 writes."""
    stage, device, model = r.state["stage"], r.world.device, r.nets["model"]
    c, data = r.configs[stage], r.datasets[stage]
    texts, captions = data.prompts(16)
    size = min(data.sizes, key=lambda size: abs(math.log(size[0] / size[1])))
    shape = len(texts), model.config["in_channels"], *(n // r.frozen.factor for n in size)
    noise = torch.randn(shape, generator=generator_for("cpu", c.seed, 0, 2)).to(device)
    text, mask = (x.to(device) for x in pack_text([*texts, data.empty], c, r.frozen.text))
    r.optimizer.publish(ema=True)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # another batch size: not worth a compilation
        text = r.frozen.embed(text, mask)
        x = sample(model, noise, text[:-1], mask[:-1], text[-1:], mask[-1:], steps=c.sample_steps,
                   cfg_scale=c.cfg_scale, shift=c.shift, predict=c.predict)
        images = r.frozen.pictures(x)
    r.optimizer.publish()
    if failure := r.world.first(lambda: save_grid(images, captions, r.folder / f"samples/{name}.png")):
        r.log(f"warning: the samples of {name} could not be written ({failure})")


def save_export(r: Run, folder: Path) -> str:
    """The EMA weights in diffusers format. All ranks call, rank 0 writes; returns what was in the way."""
    weights = r.optimizer.model_ema()
    return r.world.first(lambda: export_transformer(r.nets["model"].config, weights, folder))


def write_facts(r: Run, finished: dict | None = None):
    """run.json: what evaluation and records need to know of a run."""
    c = r.configs[-1]
    names = "name track seed steps hours resolution captions vae text text_tokens predict shift cfg_scale sample_steps"
    folders = {str(i["folder"].resolve()): i["sha256"] for data in r.datasets for i in data.indices}
    facts = dict(format=1, **{k: getattr(c, k) for k in names.split()}, pixels=c.vae == "none", command=COMMAND,
                 script="train_prx.py", source_sha256=hashlib.sha256(SOURCE.encode()).hexdigest(),
                 parameters=r.parameters(), world_size=r.world.size, machine=describe_machine(r.world),
                 data=[dict(folder=f, sha256=s) for f, s in folders.items()], finished=finished)
    r.world.first(lambda: write_json(r.folder / "run.json", facts))


def is_finished(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return bool(json.loads((folder / "run.json").read_text())["finished"])
    return False


def train(world: World, config: Config, stages: list[Stage]) -> int:
    """Train to the end of the length. Returns the exit code: 0, or 128 + signal after a checkpoint."""
    watch_signals(world)
    folder = Path("logs") / config.name
    if config.resume != "never" and not config.dry_run and is_finished(folder):
        check_settings(folder, settings(config, stages))
        if world.rank == 0:
            print(f"{folder} holds a finished run; choose another --name, or give --resume never, which moves it aside")
        return 0
    r = Run(world, config, stages)
    get_ready(r)
    if config.dry_run:
        return 0
    write_facts(r)
    progress, elapsed, stall = loop(r)
    step, samples = r.state["step"], r.state["samples"]
    if progress < 1:  # a signal or --stop-after
        saved = save_checkpoint(r, elapsed)
        r.log.write(event="stopped", step=step, elapsed=r.clock())
        if not saved:
            raise TrainingFailed(f"stopped at step {step}, whose checkpoint could not be written; the last one stands")
        later = "" if world.signal else ", with a later --stop-after or none,"
        r.log(f"stopped at step {step} with a checkpoint in {folder}; the same command{later} goes on from there")
        return 128 + world.signal if world.signal else 0
    if step == 0:
        raise TrainingFailed(f"start-up took {elapsed:.0f} s: no step fits into --hours {config.hours:.4g}; give more")
    failure = save_export(r, folder / "transformer")
    seconds = r.clock()  # the clock stops here
    save_checkpoint(r, seconds)
    if failure:
        raise TrainingFailed(f"the final weights could not be written ({failure}); make room and start it again")
    finished = dict(step=step, samples=samples, elapsed=seconds)
    r.log(f"finished: {step} steps, {samples:,} images, {seconds:.1f} s to the final weights, data stall {stall:.1f} s")
    r.log.write(event="finished", **finished, data_stall_s=stall)
    write_facts(r, finished)
    save_samples(r, "final")
    judge = f"; next:\n{command('eval_prx.py', folder)}" if r.datasets[-1].held_out else ""
    r.log(f"wrote {folder}/transformer and {folder}/samples/final.png{judge}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 after a failure, 2 for bad input, 128 + signal after a checkpoint on a signal."""
    argv, world = sys.argv[1:] if argv is None else argv, None
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    together = True  # do all ranks fail alike?
    try:
        if "--paint" in argv:
            need(argv[::2] == ["--paint", "--out"] and len(argv) == 4,
                 "painting takes --paint REQUEST.json --out IMAGES.safetensors")
            paint(Path(argv[1]), Path(argv[3]))
            return 0
        options = parse_args(argv)
        together = size == 1
        world = connect()
        code = train(world, *options)
        if size > 1:
            dist.barrier(world.control)
            dist.destroy_process_group()
        return code
    except (UserError, TrainingFailed) as error:
        code = 2 if isinstance(error, UserError) else 1
        who = "" if together or error.everywhere else f"rank {rank}: "
        if who or rank == 0:
            print(f"train_prx: {who}{error}", file=sys.stderr, flush=True)
        if world and world.torchrun:
            world.torchrun.set("verdict", str(error))
    except Exception as error:
        if size == 1:
            raise
        what = f" failed:\n{traceback.format_exc()}"
        if isinstance(error, dist.DistError) or re.search("Connection|Timed out|Socket|pair closure", str(error)):
            what = (f": lost its peers ({first_line(error)}), which may say why; the last checkpoint stands, and the "
                    "same command goes on from it")
        print(f"train_prx: rank {rank}{what}", file=sys.stderr, flush=True)
        code = 1
    # At once: destroying the group would wait for peers that wait for this rank. torchrun ends them
    if size > 1:
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
