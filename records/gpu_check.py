"""Does everything work on this GPU, and how fast? One command, at most nine minutes, nothing but the repository.

    python records/gpu_check.py --out gpu.json                # on one GPU; send the JSON in with a pull request
    python records/gpu_check.py --out gpu.json --only attention step
    python records/gpu_check.py --tiny --out cpu.json         # the same code at tiny sizes on a CPU, as the tests

The parts run in the order of PARTS; the JSON is written again after each, so that a run cut short keeps what it has. A
part that fails says why, and the others go on. What no GPU has shown yet is "not measured" in the records' notes.
"""

import argparse
import contextlib
import math
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_prx as T  # noqa: E402
from records import bench, variants  # noqa: E402

BUDGET = 540.0  # seconds; a part that is not begun by then is left out
BACKENDS = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "math": SDPBackend.MATH, "cudnn": SDPBackend.CUDNN_ATTENTION}
# Derived for one H100, milliseconds of a step of 128 images of 256 px without REPA, alone (notes/speed.md)
DERIVED = {"forward + backward": 369.0, "optimizer": 84.0 + 8.0}
BUCKETS = [(256, 256), (288, 224), (224, 288), (320, 192), (192, 320)]


class Check:
    """What the parts share: the device, sizes, and where the track's shapes come from."""

    def __init__(self, tiny: bool):
        self.world, self.tiny = T.connect(), tiny
        self.device, self.cuda = self.world.device, self.world.device.type == "cuda"
        self.track, self.turns = ("micro", 1) if tiny else ("24h", 3)
        self.dtype = torch.bfloat16 if self.cuda else torch.float32

    def config(self, flags: str) -> T.Config:
        small = "--hidden 32 --heads 2 --depth 2 --batch 16 --repa-layer 1 --tread-blocks 0-1 --compute fp32 "
        flags = (small if self.tiny else "") + flags
        return bench.config_of(self.track, next(iter(bench.ROWS[self.track])), flags.split())

    def rows(self, rows: dict[str, str]) -> dict:
        """A step of each setting, one after the other on CUDA."""
        configs = {name: self.config(flags) for name, flags in rows.items()}
        rate = bench.matmul_rate(self.device, self.dtype)
        builders = {name: lambda c=c: bench.build(c, self.world, shards=False) for name, c in configs.items()}
        return bench.compare(builders, self.device, self.turns, rate) | {"flops_per_s": rate}


# ---- the parts: each returns what goes into the JSON -----------------------------------------------------------------

def attention(check: Check) -> dict:
    """Every backend's output and gradients against FP32 math at the script's shapes, with its broadcast mask; `worst`
    is the norm of the difference over the norm. Known trouble: NaN in the query's gradient where keys % 128 == 64."""
    shapes = [(4, 28, 256, 256, 64), (4, 28, 192, 256, 64), (2, 28, 1024, 256, 64)]
    shapes = [(2, 4, 16, 24, 8)] if check.tiny else shapes
    found = {}
    for B, H, N, text, d in shapes:
        generator = torch.Generator(check.device).manual_seed(0)
        draw = lambda n: torch.randn(B, H, n, d, generator=generator, device=check.device)
        inputs, weight = [draw(N), draw(N + text), draw(N + text)], draw(N)
        mask = torch.zeros(B, 1, 1, N + text, device=check.device)
        mask[:, :, :, text // 2:text] = -torch.inf

        def run(dtype, backend):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            with sdpa_kernel([backend]):
                out = F.scaled_dot_product_attention(*leaves, attn_mask=mask.to(dtype))
            return [out.detach().float(), *(g.float() for g in torch.autograd.grad(out, leaves, weight.to(dtype)))]

        expected = run(torch.float32, SDPBackend.MATH)
        for name, backend in BACKENDS.items():
            try:
                start, off = time.perf_counter(), {}
                for what, new, old in zip(("output", "dq", "dk", "dv"), run(check.dtype, backend), expected):
                    off[what] = ((new - old).norm() / old.norm()).item()
                found[f"{name}, {N} of {N + text} keys"] = off | dict(seconds=time.perf_counter() - start)
            except RuntimeError as error:
                found[f"{name}, {N} of {N + text} keys"] = first_line(error)
    return found


def training(check: Check) -> dict:
    """Sixty steps of `mini` from scenes: the loss falls, and a run stopped half-way ends where the whole one does."""
    from data.scenes import write_track

    steps, found = (6, {}) if check.tiny else (60, {})
    flags = ["--track", check.track if check.tiny else "mini", "--steps", str(steps), "--samples", "0"]
    if check.tiny:
        flags += ["--compile", "off", "--hidden", "32", "--heads", "2", "--depth", "3"]
    with tempfile.TemporaryDirectory() as folder:
        write_track(flags[1], Path(folder) / "shards" / flags[1], n=64 if check.tiny else 1024, eval_n=16)
        for name, stop in (("whole", 0), ("cut", steps // 2), ("cut", 0)):
            start = time.perf_counter()
            command = [sys.executable, ROOT / "train_prx.py", *flags, "--name", name, "--stop-after", str(stop)]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
            found[f"{name}, stopped at {stop}"] = dict(code=done.returncode, seconds=time.perf_counter() - start,
                                                       said=(done.stdout + done.stderr)[-1500:])
        losses = {}
        for name in ("whole", "cut"):
            records = T.read_metrics(Path(folder) / "logs" / name)
            losses[name] = [x for record in records for x in record.get("losses", [])]
    tail = lambda x: sum(x[-steps // 6:]) / max(1, len(x[-steps // 6:]))
    off = [abs(a - b) / abs(a) for a, b in zip(losses["whole"], losses["cut"])]
    return found | dict(losses=losses, falls=tail(losses["whole"]) < losses["whole"][0],
                        resume_differs_by=max(off, default=math.nan))


def step(check: Check) -> dict:
    """PRX-1.2B at 256 px with 32 and 128 images, Muon and AdamW, and 1024 px with and without TREAD; beside what was
    derived. The peers' table and the README take their figures from here."""
    names = [name for name in bench.ROWS[check.track]][:2 if check.tiny else None]
    rows = check.rows({name: bench.ROWS[check.track][name] for name in names})
    if not check.tiny and names[0] in rows:
        rows["derived"] = DERIVED
        parts = rows[names[0]]["parts_ms"]
        rows["over derived"] = {part: parts[part] / ms for part, ms in DERIVED.items()}
    return rows


@contextlib.contextmanager
def alone():
    """Collectives that do nothing: a rank of a pretended world works on its own share."""
    with contextlib.ExitStack() as stack:
        for owner, name, new in (
                (T.MuonAdamW, "publish", lambda *args: None), (T.dist, "all_reduce", lambda *args: None),
                (T.Flat, "reduced", lambda flat: flat.grads[0].clone())):
            stack.enter_context(variants.in_place_of(owner, name, new))
        yield


def share_of_eight(check: Check) -> dict:
    """The optimizer's step of rank 0 of a pretended world of eight, without the links; milliseconds, and alone."""
    c, found = check.config(bench.SMALL if not check.tiny else "--repa 0"), {}
    for ranks in (8, 1):
        nets = bench.awaken(T.build_nets([c], bench.TEXT_WIDTH.get(c.text, 2304), 0, T.Frozen(), check.device)
                            if c.vae == "none" else bench.build(c, check.world, shards=False).nets)
        with alone() if ranks > 1 else contextlib.nullcontext():
            optimizer = T.MuonAdamW(nets, c, T.World(size=ranks, device=check.device))
            T.set_compute_dtype(nets, check.dtype)
            for flat in optimizer.flats:
                flat.grads.normal_()
            laps = bench.Laps(check.device)
            for i in range(4):
                optimizer.step()
                laps(f"step {i}")
        found[f"rank 0 of {ranks}"] = dict(ms=1e3 * min(laps.times.values()), peak_bytes=peak(check))
        del nets, optimizer
    return found


def repa(check: Check) -> dict:
    """The step with a random ViT-L of DINOv3's shape as teacher, and without."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    if check.tiny:
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    with tempfile.TemporaryDirectory() as folder:
        DINOv3ViTModel(DINOv3ViTConfig(patch_size=16, num_register_tokens=4, **sizes)).save_pretrained(folder)
        flags = "--tread 0" if check.tiny else bench.SMALL.replace("--repa 0 ", "")
        return check.rows({"without REPA": f"{flags} --repa 0", "REPA": f"{flags} --repa 0.5 --repa-teacher {folder}"})


def recompilations(check: Check) -> dict:
    """Graphs compiled in two passes over aspect-ratio buckets, routed and not: the second pass compiles none."""
    c, graphs = check.config(f"{'' if check.tiny else bench.SMALL} --batch 16 --tread 0.5 --repa 0 --compile on"), []
    ours = bench.build(c, check.world, shards=False)
    buckets = [(h // 8, w // 8) for h, w in BUCKETS[:2]] if check.tiny else BUCKETS
    for _ in range(2):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for height, width in buckets:
            batch, factor = ours.batch, ours.frozen.factor
            h, w = (max(c.patch, n // factor // c.patch * c.patch) for n in (height, width))
            batch = T.dataclasses.replace(batch, x=batch.x[:, :, :1, :1].expand(-1, -1, h, w).contiguous(),
                                          eps=batch.eps[:, :, :1, :1].expand(-1, -1, h, w).contiguous())
            tokens = h * w // c.patch ** 2
            for skipped in (0.0, 0.5):
                keep = T.route(c.batch, tokens, skipped, torch.Generator(check.device)) if skipped else None
                ours.forward_backward(T.dataclasses.replace(batch, keep=keep))
        ours.optimizer.reset()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    return dict(first_pass=graphs[0], second_pass=graphs[1], buckets=len(buckets))


def all_variants(check: Check) -> dict:
    """Every variant of records/variants.py: the same output and gradients? How fast over the plain step?"""
    flags = "--repa 0 --batch 16" if check.tiny else f"{bench.SMALL} --batch 64 --compile on"
    return variants.measure(check.config(flags), check.world, list(variants.VARIANTS), check.turns)


def peers(check: Check) -> dict:
    """diffusers' model with torch.optim, where it is installed."""
    flags = "--repa 0 --compile off" if check.tiny else f"{bench.SMALL} --batch 32"
    args = argparse.Namespace(turns=check.turns)
    return bench.peers(check.config(flags), check.world, args, bench.matmul_rate(check.device, check.dtype))


PARTS = {"attention": attention, "training": training, "step": step, "share of eight": share_of_eight, "repa": repa,
         "recompilations": recompilations, "variants": all_variants, "peers": peers}


def peak(check: Check) -> int:
    return torch.cuda.max_memory_allocated() if check.cuda else 0


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="[%(default)s]")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any machine")
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        raise T.UserError("gpu_check needs a CUDA GPU and torch finds none; --tiny runs it at tiny sizes on a CPU")
    start, check = time.perf_counter(), Check(args.tiny)
    result = dict(machine=T.describe_machine(check.world), cuda=torch.version.cuda, tiny=args.tiny, parts={},
                  seconds={})
    for name in args.only:
        begun = time.perf_counter()
        if begun - start > BUDGET:
            result["parts"][name] = "left out: no time"
            continue
        print(f"--- {name}: {PARTS[name].__doc__.splitlines()[0]}", flush=True)
        try:
            result["parts"][name] = PARTS[name](check)
        except Exception as error:  # one part must not end the others
            result["parts"][name] = f"failed: {first_line(error)}"
            print(traceback.format_exc(), flush=True)
        if check.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.compiler.reset()
        result["seconds"][name] = time.perf_counter() - begun
        T.write_json(args.out, result)
    print(f"wrote {args.out}: {time.perf_counter() - start:.0f} s")
    return result


if __name__ == "__main__":
    try:
        main()
    except T.UserError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        sys.exit(2)
