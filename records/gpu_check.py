"""Does everything work on these GPUs, and how fast? One command, at most nine minutes, nothing but the repository.

    python records/gpu_check.py --out gpu.json                # on one GPU; send the JSON in with a pull request
    python records/gpu_check.py --out gpu.json --only attention step
    torchrun --standalone --nproc_per_node=8 records/gpu_check.py --ranks     # the links between GPUs, ranks that fail
    python records/gpu_check.py --tiny --out cpu.json         # the same code at tiny sizes on a CPU, as the tests

The parts run in the order of ALONE, with --ranks of TOGETHER and FAULTS. Each prints a line for what it finds, and the
JSON is written again with every line, so that a check which is cut short, after nine minutes or by a signal, keeps what
it has. A part that fails says why, and the others go on. What no GPU has shown yet is "not measured" in the notes.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_prx as T  # noqa: E402
from data.scenes import write_track  # noqa: E402
from records import bench, variants  # noqa: E402

BUDGET = 540.0  # seconds
AGAIN = 5.0  # seconds from one interrupt to the next
BACKENDS = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "math": SDPBackend.MATH, "cudnn": SDPBackend.CUDNN_ATTENTION, "varlen": "varlen"}
BUCKETS = [(256, 256), (288, 224), (224, 288), (320, 192), (192, 320)]
# Four blocks of 16: the copies that variants compares fit beside the model, and the check into its minutes
SHALLOW = "--depth 4 --tread-blocks 1-2 --repa-layer 1"
KINDS = {  # of kernels, by their names; the first that fits
    "attention": r"^(?!triton).*(attention|fmha|flash|sdpa)",
    "products": r"^(?!triton).*(gemm|nvjet|cutlass|xmma|::(mm|bmm|addmm|baddbmm)$)",
    "other": ""}
DERIVED = {  # milliseconds on an H100, for 128 images of 256 px without REPA
    "products": 257.0,            # 166.5 TFLOP at 650 TFLOP/s
    "attention": 35.0,            # 1.97 TFLOP at 250 TFLOP/s forward, 4.93 at 180 backward
    "other": 77.0,                # 10.7 GB a block at 2.6 TB/s are 65; loss, copies and gaps 12
    "forward + backward": 369.0,
    "Newton-Schulz, 1 of 1": 96.0,  # 47.9 TFLOP at 500 TFLOP/s
    "Newton-Schulz, 1 of 8": 12.0,
    "passes, 1 of 8": 8.0,        # gradients to FP32, norm, Muon, AdamW: 20 GB at 2.6 TB/s
    "reduce-scatter": 12.0,       # 4.2 GB at 350 GB/s
    "all-gather": 7.0}            # 2.3 GB


class Check:
    """What the parts share: the device, sizes, runs of the trainer, and what was found."""

    def __init__(self, tiny: bool, out: Path, folder: Path):
        self.world, self.tiny, self.out, self.folder = T.connect(), tiny, out, folder
        self.device, self.cuda = self.world.device, self.world.device.type == "cuda"
        self.track, self.turns = ("micro", 1) if tiny else ("24h", 3)
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.ranks = max(2, self.world.size)  # of runs with ranks
        self.found = {}  # by the part at work
        self.result = dict(machine=T.describe_machine(self.world), cuda=torch.version.cuda, tiny=tiny,
                           cudnn=torch.backends.cudnn.version(), mfu_is_over=T.PEAK_FLOPS, parts={}, seconds={})

    def save(self):
        if self.world.rank == 0:
            T.write_json(self.out, self.result)

    def note(self, name: str, **found):
        """Keep what a part found, and print it."""
        found = {k: v[-4000:] if isinstance(v, str) else v for k, v in found.items()}
        self.found[name] = found = json.loads(json.dumps(found), parse_constant=str)  # JSON knows no NaN
        self.save()
        figures = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()
                   if k != "said" and not isinstance(v, (dict, list))]
        print(f"{name:36}{', '.join(figures)}", flush=True)

    def note_time(self, name: str, ms: float, **more):
        """Beside the derived time of that name."""
        if name in DERIVED and not self.tiny:
            more |= dict(derived_ms=DERIVED[name], over_derived=ms / DERIVED[name])
        self.note(name, ms=ms, **more)

    def config(self, flags: str) -> T.Config:
        small = "--hidden 32 --heads 2 --depth 2 --batch 16 --repa-layer 1 --tread-blocks 0-1 --compute fp32 --tread 0"
        first = next(iter(bench.ROWS[self.track]))
        return bench.config_of(self.track, first, f"{small if self.tiny else bench.SMALL} {flags}".split())

    @functools.cached_property
    def rate(self) -> float:
        return bench.matmul_rate(self.device, self.dtype)

    def ours(self, flags: str = "--repa 0") -> bench.Ours:
        return bench.build(self.config(flags), self.world, shards=False)

    def rows(self, rows: dict[str, str], make: Callable) -> dict:
        """A step of each setting, one after the other; one that does not fit is said and left out."""
        found = {}
        for name, flags in rows.items():
            found |= bench.compare({name: lambda: make(flags)}, self.device, self.turns, self.rate)
            self.found[name] = found.get(name, "does not fit into memory")
            self.save()
        return found

    def milliseconds(self, work: Callable) -> float:
        """Of the slowest rank, all beginning together: the median of five, after one that warms up."""
        times = []
        for _ in range(6):
            self.world.agree(0.0)
            times.append(stopwatch(self.device, work)[1])
        return max(self.world.gather(statistics.median(times[1:])))

    def train(self, name: str, ranks: int, *flags, **kw) -> "Training":
        """Start a small run of the trainer: of `mini`, or on CPUs of `micro` with a tiny model."""
        on_gpus = not self.tiny and ranks <= torch.cuda.device_count()  # NCCL takes one rank for each GPU
        track, n = ("mini", 1024) if on_gpus else ("micro", 64)
        if not (self.folder / "shards" / track).exists():
            write_track(track, self.folder / "shards" / track, n=n, eval_n=16, processes=1)
        small = "" if on_gpus else "--hidden 32 --heads 2 --depth 2 --batch 16 --repa 0 --sample-steps 2 --compile off"
        flags = ["--track", track, *small.split(), "--samples", 0, *flags]
        return Training(self.folder, name, ranks, *flags, env={} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}, **kw)


def stopwatch(device, work: Callable, *args) -> tuple:
    """What work(*args) returns, and its milliseconds; the GPU is waited for before and after."""
    laps = bench.Laps(device)
    laps("before")
    out = work(*args)
    laps("work")
    return out, 1e3 * laps.times["work"]


# ---- one GPU ---------------------------------------------------------------------------------------------------------

def varlen(q, k, v, padding: int):
    """Attention without a mask (records/variants.py); the last `padding` keys fit no query. Shapes as in SDPA."""
    paddings = torch.full(q.shape[:1], padding, device=q.device)
    return variants.without_mask(*(x.transpose(1, 2) for x in (q, k, v)), paddings).transpose(1, 2)


def attention(check: Check):
    """Every backend's output and gradients against FP32 math at the script's shapes, an eighth of the text masked: the
    norm of the difference over the norm, and the time of forward and backward in a block. "None fits": all scores are
    near -2 d. Known trouble: there cuDNN's gradient of the queries is NaN where keys % 128 == 64."""
    H, text, d = (4, 24, 8) if check.tiny else (28, 256, 64)
    tokens = [16] if check.tiny else [256, 64, 192, 240, 252, 512, 960, 1024, 4096]  # 64 and 960: 320 and 1,216 keys
    # Timed at the images per GPU of 256 px, of 512 px and its routed blocks, and of 1024 px
    timed = {16: 4} if check.tiny else {256: 128, 1024: 32, 512: 32, 4096: 8}
    for N, apart in itertools.product(tokens, (0, 4)):
        B, padding = 2 if apart else timed.get(N, 2), text // 8
        generator = torch.Generator(check.device).manual_seed(0)
        draw = lambda n: torch.randn(B, n, H, d, generator=generator, device=check.device).transpose(1, 2)
        inputs = [draw(N) + apart, draw(N + text) - apart, draw(N + text)]
        inputs, weight = [x.to(check.dtype) for x in inputs], draw(N).to(check.dtype)
        mask = torch.zeros(B, 1, 1, N + text, device=check.device)
        mask[:, :, :, -padding:] = -torch.inf

        def run(dtype, backend, images=slice(None)):
            leaves = [x[images].to(dtype).requires_grad_() for x in inputs]
            if backend == "varlen":
                out = varlen(*leaves, padding)
            else:
                with sdpa_kernel([backend]):
                    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask[images].to(dtype))
            return out.detach(), *torch.autograd.grad(out, leaves, weight[images].to(dtype))

        def all_blocks(backend):
            for _ in range(16):
                run(check.dtype, backend)

        expected = run(torch.float32, SDPBackend.MATH, slice(2))
        for name, backend in BACKENDS.items():
            where = f"{name}, {N} of {N + text} keys{', none fits' if apart else ''}"
            try:
                pairs = zip(run(check.dtype, backend, slice(2)), expected)
                found = dict(zip(("output", "dq", "dk", "dv"),
                                 [((new.float() - old).norm() / old.norm()).item() for new, old in pairs]))
                check.note(where, **found)
                if B > 2 and name != "math":
                    ms = check.milliseconds(lambda: all_blocks(backend)) / 16
                    check.note(where, **found, images=B, ms=ms)
            except (RuntimeError, AssertionError, ImportError) as error:
                check.note(where, failed=T.first_line(error)[:150])


def resumed(check: Check, steps: int, ranks: tuple[int, int], *flags):
    """A whole run, and one that stops half-way and goes on, maybe on other ranks: how far do their losses differ?"""
    losses = {}
    for name, n, stop in (("whole", ranks[0], 0), ("cut", ranks[0], steps // 2), ("cut", ranks[1], 0)):
        run = check.train(f"{name}-{steps}", n, "--steps", steps, "--stop-after", stop, *flags)
        check.note(f"{name}, {n} rank(s), stopped at {stop}", **run.end())
        losses[name] = run.losses()
    off = [abs(a - b) / abs(a) for a, b in zip(*losses.values())]
    check.note("resumed", losses=losses, differs_by=max(off, default=math.nan),
               falls=len(off) == steps and statistics.mean(losses["whole"][-steps // 6:]) < losses["whole"][0])


def training(check: Check):
    """Sixty compiled steps of `mini` from scenes: the loss falls, and a run that was stopped ends as a whole one."""
    resumed(check, 6 if check.tiny else 60, (1, 1))


def step(check: Check):
    """PRX-1.2B at 256 px with 32 and 128 images, Muon and AdamW, and 1024 px with and without TREAD; ranks: 128."""
    rows = bench.ROWS[check.track]
    names = list(rows)[:1 if check.world.size > 1 else 2 if check.tiny else None]
    found = check.rows({name: rows[name] for name in names}, check.ours)
    if names[0] in found:
        check.note_time("forward + backward", found[names[0]]["parts_ms"]["forward + backward"])


def kernels(check: Check):
    """Where forward and backward of 128 images go, by kind of kernel."""
    ours, spent, names, each = check.ours(), dict.fromkeys(KINDS, 0.0), set(), {}
    bench.in_turns({"": ours}, 0)
    with torch.profiler.profile() as profiler:
        ours.forward_backward(ours.batch)
        bench.Laps(check.device)("done")
    for e in profiler.key_averages():
        if check.cuda and e.device_type == torch.autograd.DeviceType.CPU:
            continue  # an operation has the time of its kernels once more
        kind = next(kind for kind, holds in KINDS.items() if re.search(holds, e.key))
        ms = (e.self_device_time_total if check.cuda else e.self_cpu_time_total) / 1e3
        spent[kind] += ms
        each[e.key[:120]] = each.get(e.key[:120], 0.0) + ms
        names |= {e.key[:120]} if kind == "attention" else set()
    for kind, ms in spent.items():
        check.note_time(kind, ms)
    check.note("kernels of attention", names=sorted(names))
    check.note("the most expensive", ms=dict(sorted(each.items(), key=lambda item: -item[1])[:32]))


@contextlib.contextmanager
def alone():
    """Collectives that do nothing: a rank of a pretended world works on its own share."""
    with variants.in_place_of(T.MuonAdamW, "publish", lambda *args: None), \
            variants.in_place_of(T.dist, "all_reduce", lambda *args: None), \
            variants.in_place_of(T.Flat, "reduced", lambda flat: flat.grads[0].clone()):
        yield


def share_of_eight(check: Check):
    """The optimizer's step of rank 0 of a pretended world of eight, without the links, and of one."""
    for ranks in (8, 1):
        nets, spent, steps = check.ours().nets, [], []
        free(check)

        def watched(*args, work=T.orthogonalize):
            out, ms = stopwatch(check.device, work, *args)
            spent[-1] += ms
            return out

        with alone() if ranks > 1 else contextlib.nullcontext(), variants.in_place_of(T, "orthogonalize", watched):
            optimizer = T.MuonAdamW(nets, check.config("--repa 0"), T.World(size=ranks, device=check.device))
            for flat in optimizer.flats:
                flat.grads.normal_()
            for _ in range(4):
                spent.append(0.0)
                steps.append(stopwatch(check.device, optimizer.step)[1])
        ms, newton_schulz = min(zip(steps, spent))
        peak = torch.cuda.max_memory_allocated() if check.cuda else 0
        check.note_time(f"Newton-Schulz, 1 of {ranks}", newton_schulz)
        check.note_time(f"passes, 1 of {ranks}", ms - newton_schulz, peak_bytes=peak)
        del nets, optimizer


def repa(check: Check):
    """The step with a random ViT-L of DINOv3's shape as teacher, its layers compiled as in training, and without."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    if check.tiny:
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)

    def make(flags: str) -> bench.Ours:
        ours = check.ours(flags)
        for module in ours.frozen.teacher.model.modules() if ours.frozen.teacher and check.cuda else ():
            if type(module).__name__.endswith("Layer"):
                module.compile(dynamic=False)
        return ours

    with tempfile.TemporaryDirectory() as folder:
        DINOv3ViTModel(DINOv3ViTConfig(patch_size=16, num_register_tokens=4, **sizes)).save_pretrained(folder)
        rows = {"without REPA": "--repa 0", "REPA": f"--repa 0.5 --repa-teacher {folder}"}
        ms = [row["ms"] for row in check.rows(rows, make).values()]
    if len(ms) == 2:  # goal: 1.1 times the teacher's 12.9 % of the FLOPs
        check.note("REPA costs", share_of_step=ms[1] / ms[0] - 1)


def recompilations(check: Check):
    """Graphs traced in two passes over aspect-ratio buckets, routed and not: the second pass traces none."""
    ours, traced = check.ours("--batch 16 --tread 0.5 --repa 0 --compile off"), []
    for block in ours.nets["model"].blocks:
        block.compile(dynamic=False, backend="aot_eager")  # tracing is counted, code would take minutes
    c, batch, factor = ours.c, ours.batch, ours.frozen.factor
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        before = graphs()
        for size in [(h // 8, w // 8) for h, w in BUCKETS[:2]] if check.tiny else BUCKETS:
            h, w = (max(c.patch, n // factor // c.patch * c.patch) for n in size)
            x, eps = (x[:, :, :1, :1].expand(-1, -1, h, w).contiguous() for x in (batch.x, batch.eps))
            for skipped in (0.0, 0.5):
                generator = torch.Generator(check.device)
                keep = T.route(c.batch, h * w // c.patch ** 2, skipped, generator) if skipped else None
                ours.forward_backward(T.replace(batch, x=x, eps=eps, keep=keep))
        ours.optimizer.reset()
        traced.append(graphs() - before)
    check.note("graphs", first_pass=traced[0], second_pass=traced[1])


def all_variants(check: Check):
    """Each variant of records/variants.py in turns with the plain step: the same? How fast? Ranks: those of links."""
    size = (16 if check.tiny else 64) * check.world.size
    c = check.config(f"--repa 0 --batch {size} {SHALLOW} --compile {'on' if check.cuda else 'off'}")
    for name, variant in variants.VARIANTS.items():
        free(check)
        if (variant.needs == "ranks") == (check.world.size > 1) and not variants.missing(variant, check.world):
            rows = variants.measure(c, check.world, [name], check.turns)
            check.note(name, **rows.get(name, dict(failed="see the output")))


def peers(check: Check):
    """diffusers' model with torch.optim, where it is installed."""
    c = check.config(f"--repa 0 --batch 32 {SHALLOW}" if check.cuda else "--repa 0 --compile off")
    check.note("peers", **bench.peers(c, check.world, argparse.Namespace(turns=check.turns), check.rate))


# ---- ranks, together -------------------------------------------------------------------------------------------------

def collectives(check: Check):
    """The optimizer's collectives at its own sizes: time, bytes a second that a rank sends, and how much of it hides
    behind matrix products of the same length that do not need it: 1 is all."""
    optimizer, n = check.ours().optimizer, 256 if check.tiny else 8192
    a, others = torch.randn(n, n, device=check.device, dtype=check.dtype), check.world.size - 1
    product = check.milliseconds(lambda: a @ a)
    for kind, flat in zip(("", " of vectors"), optimizer.flats):
        mine = flat.master.to(torch.float32 if kind else optimizer.matrix_dtype())
        rows, own = mine.new_empty(check.world.size * len(mine)), torch.empty_like(flat.master)
        for name, sent, work in (
                ("reduce-scatter", own.nbytes, functools.partial(T.reduce_scatter, own, flat.grads.view(-1))),
                ("all-gather", mine.nbytes, functools.partial(T.all_gather, rows, mine)),
                ("all-reduce of gradients", 2 * own.nbytes, functools.partial(T.dist.all_reduce, flat.grads))):
            ms = check.milliseconds(work)
            count = max(1, round(ms / product))
            products = lambda: [a @ a for _ in range(count)]

            def both():
                coming = work(async_op=True)
                products()
                coming.wait()

            apart, together = check.milliseconds(products), check.milliseconds(both)
            check.note_time(name + kind, ms, bytes_per_s=1e3 * sent * others / ms, products_ms=apart,
                            both_ms=together, hidden=(ms + apart - together) / min(ms, apart))
    norm = torch.ones(1, device=check.device)
    check.note("all-reduce of a norm", ms=check.milliseconds(lambda: T.dist.all_reduce(norm)))
    check.note("agreement on the CPU", ms=check.milliseconds(lambda: check.world.agree(1.0, 2.0)))


# ---- ranks that stop, fail or are late: runs of the trainer, as processes of their own -------------------------------

DRIVER = """
import datetime, sys, time
sys.path.insert(0, {root!r})
import torch
import train_prx as T

def out_of_memory(nets, frozen, batch, *args):
    torch.empty(2 ** 50, device=batch.t.device)

def late(path, content, write=T.write_atomically):
    T.write_atomically = write
    time.sleep(20)
    write(path, content)

def loop(r, loop=T.loop):
    for group in (None, r.world.control):
        T.dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds={timeout}), group)
    if r.world.rank == 1:
        {fault}
    return loop(r)

T.loop = loop
sys.exit(T.main())
"""


def processes(folder: Path, rank: int | None = None) -> list[int]:
    """Of the runs in a folder, or of one rank: torchrun's ranks have sessions of their own, so no group holds all."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            works_here = os.readlink(path / "cwd") == str(folder) and int(path.name) != os.getpid()
            if works_here and (rank is None or f"\0RANK={rank}\0".encode() in (path / "environ").read_bytes()):
                found.append(int(path.name))
    return found


def send(number: int, pids: list[int]):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Training:
    """A run of the trainer in a folder, under torchrun where it has ranks; `fault` is what rank 1 does as it begins."""

    def __init__(self, folder: Path, name: str, ranks: int, *flags, fault="", timeout=600, launch=(), env=None):
        self.folder, self.run, script = folder.resolve(), folder.resolve() / "logs" / name, ROOT / "train_prx.py"
        if fault:
            script = self.folder / "driver.py"
            script.write_text(DRIVER.format(root=str(ROOT), fault=fault, timeout=timeout))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        torchrun += ["--shutdown-timeout=300", *launch]
        command = [sys.executable, *(torchrun if ranks > 1 else []), script, *flags, "--name", name]
        outer = r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE|NAME)|MASTER_.*|TORCHELASTIC_.*"  # of a torchrun around this
        kept = {k: v for k, v in os.environ.items() if not re.fullmatch(outer, k)}
        with open(self.folder / "said", "w") as said:
            self.process = subprocess.Popen([str(x) for x in command], cwd=folder, stdout=said, stderr=said,
                                            start_new_session=True, env=kept | {"OMP_NUM_THREADS": "1"} | (env or {}))

    def until(self, condition: Callable, every: float = 0.02) -> bool:
        """Wait for it, at most five minutes; False where the run ends before."""
        limit = time.monotonic() + 300
        while not (holds := condition()) and self.process.poll() is None and time.monotonic() < limit:
            time.sleep(every)
        return bool(holds)

    def end(self, seconds: float = 300) -> dict:
        """Wait until all its processes have ended, and kill what has not by then."""
        start = time.monotonic()
        while self.process.poll() is None or processes(self.folder):
            if time.monotonic() - start > seconds:
                send(signal.SIGKILL, processes(self.folder))
            time.sleep(0.02)
        return dict(code=self.process.returncode, seconds=time.monotonic() - start, said=self.said())

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def losses(self) -> list[float]:
        return [x for record in T.read_metrics(self.run) for x in record.get("losses", [])]

    def checkpoints(self) -> list[str]:
        return sorted(p.name for p in self.run.glob("checkpoint/*"))


def fewer_ranks(check: Check):
    """A checkpoint of all ranks goes on on half of them."""
    resumed(check, 12, (check.ranks, check.ranks // 2), "--compile", "off")


def signals(check: Check):
    """Rank 1 is killed: torchrun starts all again, and they go on. Then SIGTERM comes twice to all processes at once,
    as at Slurm's time limit: one checkpoint, and the end."""
    run = check.train("signals", check.ranks, "--steps", 100000, "--checkpoint-minutes", 0.02, "--compile", "off",
                      launch=["--max-restarts=1"])
    run.until(lambda: any("tmp" not in name for name in run.checkpoints()))
    start = time.monotonic()
    send(signal.SIGKILL, processes(run.folder, rank=1))
    goes_on = run.until(lambda: any(r.get("event") == "resume" for r in T.read_metrics(run.run)[:-1]))
    check.note("killed rank", goes_on=goes_on, after_s=time.monotonic() - start)
    for _ in range(2):
        send(signal.SIGTERM, processes(run.folder))
        time.sleep(0.003)
    end, (checkpoint, passed_over) = run.end(), T.find_checkpoint(run.run)
    last = T.read_metrics(run.run)[-1]
    check.note("signals", **end, event=last.get("event"), step=last.get("step"), passed_over=passed_over,
               checkpoint=checkpoint and checkpoint.name)


def late_rank(check: Check):
    """Rank 1's disk answers after 20 s, where no collective may take more than 10: no checkpoint is lost."""
    run = check.train("late", check.ranks, "--steps", 3, "--checkpoint-minutes", 1e-9, "--compile", "off",
                      fault="T.write_atomically = late", timeout=10)
    check.note("late rank", **run.end(), checkpoints=run.checkpoints())


def failing_rank(check: Check):
    """The memory of rank 1 runs out: its traceback is said and the job has ended, while its peers would wait for ten
    minutes. On one GPU both ranks are on the CPU."""
    end = check.train("fails", check.ranks, "--steps", 100, "--compile", "off",
                      fault="T.training_step = out_of_memory").end()
    check.note("failing rank", **end, says_why=bool(re.search("rank 1 failed:(?s:.*)alloc", end["said"])))


ALONE = {"attention": attention, "step": step, "kernels": kernels, "share of eight": share_of_eight,
         "training": training, "variants": all_variants, "repa": repa, "peers": peers,
         "recompilations": recompilations, "failing rank": failing_rank}
TOGETHER = {"collectives": collectives, "step": step, "variants": all_variants}
FAULTS = {"fewer ranks": fewer_ranks, "signals": signals, "late rank": late_rank, "failing rank": failing_rank}


# ---- the command -----------------------------------------------------------------------------------------------------

def free(check: Check):
    gc.collect()
    if check.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_part(check: Check, name: str, part: Callable):
    start, check.found = time.perf_counter(), check.result["parts"].setdefault(name, {})
    print(f"--- {name}: {' '.join(part.__doc__.split())}", flush=True)
    try:
        free(check)
        part(check)
    except Exception as error:  # one part must not end the others
        traceback.print_exc()
        check.note("failed", why=T.first_line(error))
        if T.dist.is_initialized():  # the other ranks wait for this one
            os._exit(1)
    torch.compiler.reset()
    check.result["seconds"][name] = time.perf_counter() - start
    check.save()


def part_company(check: Check) -> bool:
    """The ranks leave each other: the trainer's runs need their GPUs. Returns whether this one goes on."""
    if T.dist.is_initialized():
        T.dist.barrier(check.world.control)
        T.dist.destroy_process_group()
    return check.world.rank == 0


def build_nets(configs, text_width, features, frozen, device, build=T.build_nets):
    """Weights are drawn where they live: 1.2 B take 14 s on a CPU, and every row has its own."""
    with torch.device(device), variants.in_place_of(T, "initialize", lambda module, seed: module):
        return build(configs, text_width, features, frozen, device)


@contextlib.contextmanager
def a_folder(seconds: float):
    """For the trainer's runs, which end with it. After so many seconds, and at SIGTERM, what runs ends as at Ctrl-C;
    every few seconds again, since an exception that strikes inside a compiler or a callback may be lost."""
    def interrupt(number, frame):
        signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        raise KeyboardInterrupt

    numbers = signal.SIGALRM, signal.SIGTERM
    handlers = {number: signal.signal(number, interrupt) for number in numbers}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            yield Path(folder).resolve()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            send(signal.SIGKILL, processes(Path(folder).resolve()))


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="[%(default)s]")
    parser.add_argument("--ranks", action="store_true", help="under torchrun: what concerns several GPUs")
    parser.add_argument("--only", nargs="+", metavar="PART", help=", ".join(ALONE | TOGETHER | FAULTS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any machine")
    args = parser.parse_args(argv)
    parts = TOGETHER | FAULTS if args.ranks else ALONE
    if unknown := set(args.only or ()) - set(parts):
        raise T.UserError(f"--only {unknown.pop()} is unknown; there are {', '.join(parts)}")
    if not args.tiny and not torch.cuda.is_available():
        raise T.UserError("gpu_check needs a CUDA GPU and torch finds none; --tiny runs it at tiny sizes on a CPU")
    if args.ranks != (int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise T.UserError("--ranks and torchrun --standalone --nproc_per_node=8 go together; give both or neither")
    start = time.perf_counter()
    with a_folder(BUDGET) as folder, variants.in_place_of(T, "build_nets", build_nets):
        check = Check(args.tiny, args.out.resolve(), folder)
        with contextlib.redirect_stdout(None if check.world.rank else sys.stdout):
            try:
                for name in [name for name in parts if name in (args.only or parts)]:
                    if name in FAULTS and not part_company(check):
                        break
                    run_part(check, name, parts[name])
            except KeyboardInterrupt:
                for number in (signal.SIGALRM, signal.SIGTERM):  # one more would lose what follows
                    signal.signal(number, signal.SIG_IGN)
                check.result["cut_short"] = name
                check.save()
                print(f"cut short in {name}")
                if T.dist.is_initialized():  # a rank may be stuck in a collective: a clean end would wait for it
                    os._exit(1)
            print(f"wrote {args.out}: {time.perf_counter() - start:.0f} s", flush=True)
            part_company(check)
    return check.result


if __name__ == "__main__":
    try:
        main()
    except T.UserError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        sys.exit(2)
