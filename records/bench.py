"""How long does a step take, and what of it? Random data of the real shapes, no weights needed.

    python train_prx.py --bench                                  # the track's rows: sizes, batches, TREAD, FP8, REPA
    python records/bench.py --track micro --peers diffusers      # beside diffusers' model with torch.optim, in turns
    python records/bench.py --peers diffusers,PATH               # and the public PRX framework's, checked out in PATH
    python records/bench.py --track micro --sweep                # cost against depth, width, tokens and batch, plotted
    python train_prx.py --profile --track micro                  # the ten most expensive kernels, and a trace

Each row is one setting. On CPUs rows run in turns, a few steps each, because such machines are noisy; on CUDA, where
memory is short, rows of one model do, and the next model is built when the last is gone. A row that does not fit into
memory says so and is left out. The median of all steps is reported with its quartiles and as a ratio to the first row.
FLOPs are the model's own: 3 x train_prx.flops_per_image; the teacher's, the optimizer's and those of recomputation do
not count. MFU is their share of PEAK_FLOPS (CUDA only).
The floor is the time that those FLOPs would take at the rate of a large matrix product, measured in the same process.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_prx as T  # noqa: E402
from data import encoders  # noqa: E402
from data.settings import check_config, parse_args  # noqa: E402

OFF = dict(repa=0.0, pdino=0.0, tread=0.0, sprint=0.0, contrastive=0.0)
TECHNIQUES = {"plain": {}, "REPA": dict(repa=0.5), "REPA ended": {}, "TREAD 50 %": dict(tread=0.5),
              "SPRINT 75 %": dict(sprint=0.75), "contrastive": dict(contrastive=0.05), "AdamW": dict(optimizer="adamw"),
              "EMA": dict(ema=0.99)}
LARGE, SMALL = dict(resolution=1024, batch=8), dict(resolution=256, batch=128)
ROWS = {"micro": TECHNIQUES, "mini": TECHNIQUES, "24h": {
    "256 px, 128": SMALL, "256 px, 128, FP8": SMALL | dict(fp8=True), "256 px, 128, REPA": SMALL | dict(repa=0.5),
    "256 px, 32": dict(resolution=256, batch=32), "1024 px, 8": LARGE, "1024 px, 8, TREAD": LARGE | dict(tread=0.5),
    "1024 px, 8, FP8": LARGE | dict(fp8=True), "256 px, 128, AdamW": SMALL | dict(optimizer="adamw")}}
VIT_L = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=16,
             num_register_tokens=4)  # DINOv3 ViT-L/16
PEERS = ("eager, Muon", "compiled, Muon", "eager, AdamW", "compiled, AdamW")


torch._dynamo.config.recompile_limit = 64  # shapes of a sweep; beyond the 8 of the default it would run eagerly
torch._inductor.config.cpp.vec_isa_ok = True  # as the trainer: start-up is timed, too


def uses_bf16(c, device) -> bool:
    return c.compute == "bf16" or c.compute == "auto" and T.has_fast_bf16(device)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Batch:
    """Random data of a setting's shapes."""

    def __init__(self, c, device, channels: int, factor: int, width: int):
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, device=device)
        side = c.resolution // factor
        self.x_0, self.eps = draw(2, c.batch, channels, side, side)
        self.t, self.text = draw(c.batch).sigmoid(), draw(c.batch, c.text_pad, width)
        self.mask = torch.ones(c.batch, c.text_pad, dtype=torch.bool, device=device)
        self.mask[:, c.text_pad - c.text_pad // 8:] = False  # an eighth is padding
        self.pixels = draw(c.batch, 3, c.resolution, c.resolution).clamp(-1, 1) if c.repa else None
        self.tokens = (side // c.patch) ** 2


class Ours:
    """The trainer's step. Settings that differ in data or routing only share a model and its optimizer in `made`."""

    def __init__(self, c, device, channels: int, factor: int, width: int, teacher=None, made=None):
        self.c, self.device, self.teacher, made = c, device, teacher, {} if made is None else made
        dtype = torch.bfloat16 if uses_bf16(c, device) else torch.float32
        compiled = c.compile == "on" or c.compile == "auto" and device.type == "cuda"
        scorer, key = c.tread > 0 and c.tread_select == "learned", self.key(c)
        if key not in made:
            model = T.PRX(in_channels=channels, patch_size=c.patch, hidden_size=c.hidden, mlp_ratio=c.mlp_ratio,
                          context_in_dim=width, num_heads=c.heads, depth=c.depth, span=T.span(c), sprint=c.sprint > 0,
                          scorer=scorer, bottleneck_size=c.bottleneck or None).initialize(0).to(device)
            optimizer = T.MuonAdamW(model.named_parameters(), c)
            model.set_compute_dtype(dtype, c.fp8)
            model.recompute = c.recompute
            for block in model.blocks if compiled else ():
                block.compile(dynamic=False)
            made[key] = model, optimizer
        self.model, optimizer = made[key]
        self.optimizers, self.bytes = [optimizer], 0
        if c.repa:
            if compiled and device.type == "cuda":
                teacher.model.compile(dynamic=False)
            self.projector = T.Alignment(c.hidden, teacher.width, c.repa_kind).initialize(1).to(device)
            self.optimizers.append(T.MuonAdamW(self.projector.named_parameters(), c))
            self.projector.set_compute_dtype(dtype)
            # what leaves memory when the burn-in ends
            state = [v for v in vars(self.optimizers[1]).values() if isinstance(v, torch.Tensor)]
            tensors = [*teacher.model.parameters(), *self.projector.parameters(), *state]
            self.bytes = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
        self.batch = Batch(c, device, channels, factor, width)

    @staticmethod
    def key(c) -> tuple:
        """Settings with the same key share a model and its optimizer."""
        return (c.optimizer, c.sprint > 0, c.tread > 0 and c.tread_select == "learned", c.fp8, c.ema, c.compile,
                c.hidden, c.depth, c.compute, c.heads, c.patch, c.recompute)

    def facts(self) -> types.SimpleNamespace:
        """What the report needs when the model is gone."""
        return types.SimpleNamespace(c=self.c, device=self.device, bytes=self.bytes, flops=self.flops())

    def step(self) -> dict[str, float]:
        """Seconds of the parts of one step, and of the whole."""
        c, b, times, begin = self.c, self.batch, {}, time.perf_counter()
        now = begin

        def lap(name):
            nonlocal now
            synchronize(self.device)
            times[name], now = time.perf_counter() - now, time.perf_counter()

        keep = T.route(c.batch, b.x_0, c.patch, c.tread + c.sprint, None) if c.tread + c.sprint else None
        features = None
        if c.repa:
            rows = int(b.tokens ** 0.5)
            with torch.no_grad():
                features = self.teacher(b.pixels, rows, rows)
            lap("teacher")
        loss, _, estimate, tapped = T.flow_matching_loss(self.model, b.x_0, b.eps, b.t, b.text, b.mask, c.predict,
                                                  c.contrastive, keep, c.repa_layer if c.repa else None)
        if c.repa:
            loss = loss + c.repa * self.projector(*tapped, features, rows, rows)
        if c.pdino:
            loss = loss + c.pdino * T.perceptual_loss(self.teacher, estimate, b.x_0)
        loss.mean().backward()
        lap("forward + backward")
        for optimizer in self.optimizers:
            optimizer.accumulate()
            optimizer.step()
        lap("optimizer")
        return times | dict(step=time.perf_counter() - begin)

    def flops(self) -> float:
        """Of a training step."""
        c, (first, last) = self.c, T.span(self.c)
        return 3 * c.batch * T.flops_per_image(self.model.config, self.batch.tokens, c.text_pad, c.tread + c.sprint,
                                               (last - first + 1) * bool(c.tread or c.sprint))


class Peer:
    """Another implementation of the same model on the same data, weights and loss: FP32 weights with autocast, its
    matrices with torch.optim.Muon (or AdamW for all), clipping by torch; no EMA, which `ours` has.

    source: "diffusers", or the folder of the public PRX framework, whose model's modules are used.
    """

    def __init__(self, source: str, kind: str, ours: Ours):
        self.ours, self.c, self.device = ours, ours.c, ours.device
        config = ours.model.config
        if source == "diffusers":
            transformer = encoders.quiet_import("diffusers").PRXTransformer2DModel
            self.net = transformer(**{k: v for k, v in config.items() if k not in ("span", "sprint", "scorer")})
            self.model = lambda x, t, text, mask: self.net(x, t, text, mask, return_dict=False)[0]
        else:
            folder = Path(source) / "prx"
            if not (folder / "models/prx.py").exists():
                raise T.UserError(f"--peers {source} is not diffusers and holds no prx/models/prx.py; give a checkout "
                                  "of the public PRX framework")
            # not through its __init__, which asks for more packages
            for name, path in (("prx", folder), ("prx.models", folder / "models")):
                package = sys.modules.setdefault(name, types.ModuleType(name))
                package.__path__ = [str(path)]
            theirs = importlib.import_module("prx.models.prx")
            fields = {f.name for f in dataclasses.fields(theirs.PRXParams)}
            self.net = theirs.PRX({k: v for k, v in config.items() if k in fields})
            self.model = lambda x, t, text, mask: self.net(x, t, text, mask)
        self.net.to(self.device).train()
        own = {k: v.float() for k, v in ours.model.state_dict().items()}
        self.same_weights = set(own) == set(self.net.state_dict())
        if self.same_weights:
            self.net.load_state_dict(own)
        blocks = [p for n, p in self.net.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
        rest = [p for p in self.net.parameters() if not any(p is q for q in blocks)]
        adamw = dict(lr=self.c.lr, betas=(self.c.beta1, self.c.beta2), weight_decay=0.0, fused=True)
        self.optimizers = ([torch.optim.AdamW(self.net.parameters(), **adamw)] if "AdamW" in kind else [
            torch.optim.Muon(blocks, lr=self.c.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, **adamw)])
        if "compiled" in kind:
            self.net = torch.compile(self.net, dynamic=False)
        self.bf16 = uses_bf16(self.c, self.device)

    def predict(self, x, t, text, mask):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(x, t, text, mask).float()

    def step(self) -> dict[str, float]:
        b, begin = self.ours.batch, time.perf_counter()
        t = b.t[:, None, None, None]
        x_t = (1 - t) * b.x_0 + t * b.eps
        output = self.predict(x_t, b.t, b.text, b.mask)
        if self.c.predict == "x":
            loss = F.mse_loss((x_t - output) / t.clamp(min=0.05), (x_t - b.x_0) / t.clamp(min=0.05))
        else:
            loss = F.mse_loss(output, b.eps - b.x_0)
        loss.backward()
        synchronize(self.device)
        middle = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.c.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        synchronize(self.device)
        end = time.perf_counter()
        return {"forward + backward": middle - begin, "optimizer": end - middle, "step": end - begin}

    def facts(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(c=self.c, device=self.device, bytes=0, flops=self.ours.flops())


def difference(peer: Peer) -> float | None:
    """Largest difference of the outputs from ours with the same weights, none of them zero, over the largest output."""
    if not peer.same_weights:
        return None
    model, b = T.PRX(**peer.ours.model.config).to(peer.device), peer.ours.batch
    generator = torch.Generator().manual_seed(1)
    weights = {k: v.cpu() + 0.02 * torch.randn(v.shape, generator=generator)
               for k, v in peer.net.state_dict().items()}
    model.load_state_dict(weights)
    peer.net.load_state_dict(weights)
    with torch.no_grad():
        ours, theirs = (net(b.x_0, b.t, b.text, b.mask) for net in (model, peer.model))
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def teacher_for(c, device) -> encoders.Teacher:
    """REPA's teacher. A step takes as long with random weights, so where DINOv3's cannot be had, a network of its shape
    gets some."""
    try:
        return encoders.Teacher("repa-teacher", c.repa_teacher, device)
    except T.UserError as error:
        if c.repa_teacher != "dinov3":
            raise
        print(f"REPA's teacher is a ViT-L/16 with random weights: {error}")
    transformers = encoders.quiet_import("transformers")
    with tempfile.TemporaryDirectory() as folder:
        transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VIT_L)).bfloat16().save_pretrained(folder)
        return encoders.Teacher("repa-teacher", folder, device)


def in_turns(settings: dict, turns: int, steps: int) -> tuple[dict, dict]:
    """Laps of every setting, and what its first step took, with compilation. The first turn only warms up; whoever runs
    out of memory is left out from then on."""
    times, first, peak = {row: [] for row in settings}, {}, {}
    for turn in range(turns + 1):
        for row in list(times):
            setting = settings[row]
            if setting.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                laps = [setting.step() for _ in range(steps)]
            except torch.OutOfMemoryError as error:
                laps, why = None, str(error).splitlines()[0]
            if laps is None:  # now that the error, which holds on to the step's tensors, is gone
                print(f"{row}: does not fit into memory ({why})")
                del times[row]
                release(setting)
                continue
            times[row] += laps if turn else []
            first.setdefault(row, laps[0]["step"])
            peak[row] = torch.cuda.max_memory_allocated() if setting.device.type == "cuda" else None
    return times, {row: dict(first_step_s=first[row], peak_bytes=peak[row]) for row in times}


def release(*settings):
    """Gradients of a step that was cut short, and what the allocator holds on to."""
    for setting in settings:
        for optimizer in setting.optimizers:
            optimizer.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_by_one(builders: dict, device, turns: int, steps: int, key=lambda row: row, first=lambda settings: None):
    """Facts, laps and first steps of the settings that `builders` make. On CPUs all are there at once and take turns;
    on CUDA those with the same key(row), freed before the next are built. `first` sees the first ones alive."""
    groups = {}
    for row in builders:
        groups.setdefault(key(row) if device.type == "cuda" else None, []).append(row)
    facts, times, extra = {}, {}, {}
    for names in groups.values():
        try:
            settings = {row: builders[row]() for row in names}
        except torch.OutOfMemoryError as error:
            settings = {}
            print(f"{', '.join(names)}: no room for the model ({str(error).splitlines()[0]})")
        laps, more = in_turns(settings, turns, steps)
        if laps and not times:
            try:
                first({row: settings[row] for row in laps})
            except torch.OutOfMemoryError as error:
                print(f"EMA, checkpoint and shares of ranks: no room beside the model ({str(error).splitlines()[0]})")
        facts |= {row: settings[row].facts() for row in laps}
        times, extra = times | laps, extra | more
        del settings
        release()
    if not times:
        raise T.UserError("no row fits into this GPU's memory; give a smaller --batch, or --recompute")
    return facts, times, extra


def ceilings(device, dtype) -> tuple[float, float]:
    """What this machine reaches: FLOP/s of a large matrix product, bytes/s of a large copy (read and written)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    long = torch.zeros(2, n * n * 4, device=device)
    best = []
    for work in (lambda: a @ b, lambda: long[0].copy_(long[1])):
        seconds = []
        for _ in range(8):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        best.append(min(seconds))
    return 2 * n ** 3 / best[0], long.numel() * 4 / best[1]  # half of them read, half written


def ring_bytes(optimizer, ranks: int, width: int) -> dict[str, int]:
    """What each rank sends in a step by ring algorithms: gradients by reduce-scatter in FP32 (or BF16, --wire); weights
    by all-gather, matrices `width` bytes wide, the rest in FP32. Rows are as long as the longest rank's."""
    most, least = optimizer.matrices
    weights = 4 * optimizer.size if width == 4 else width * most + 4 * (optimizer.size - least)
    gradients = (2 if optimizer.config.wire == "bf16" else 4) * optimizer.size
    return dict(gradients=(ranks - 1) * gradients, weights=(ranks - 1) * weights)


def shares(c, setting: Ours, ranks: int = 8) -> dict:
    """The optimizer's step with one rank's share of `ranks`, collectives left out: the costliest rank's, and the bytes
    that each rank sends per step to the others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = T.PRX(**setting.model.config).initialize(0).to(setting.device)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        out = {}
        for kind in ("muon", "adamw"):
            optimizer = T.MuonAdamW(model.named_parameters(), dataclasses.replace(c, optimizer=kind),
                                    T.World(0, ranks, setting.device))
            model.set_compute_dtype(torch.bfloat16 if uses_bf16(c, setting.device) else torch.float32)
            laps = []
            for _ in range(7):
                synchronize(setting.device)
                start = time.perf_counter()
                optimizer.step()
                synchronize(setting.device)
                laps.append(time.perf_counter() - start)
            out[f"{kind}_ms"] = float(np.median(laps[2:])) * 1e3
            wide = next(p.element_size() for p in model.parameters() if p.ndim == 2)
            out["bytes_sent"] = ring_bytes(optimizer, ranks, wide)
            del optimizer
            model.float()
        return out
    finally:
        dist.destroy_process_group()


def once(settings: list[Ours], device) -> dict:
    """What does not come with every step, in ms: an update of the EMA (of the first setting that has one), and, of the
    first setting, a checkpoint's stall and a batch of scenes."""
    c, optimizer, out = settings[0].c, settings[0].optimizers[0], {}

    def median(work, n=5):
        laps = []
        for _ in range(n):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            laps.append(time.perf_counter() - start)
        return float(np.median(laps)) * 1e3

    if averaged := [s.optimizers[0] for s in settings if s.c.ema]:
        out["EMA update"] = median(averaged[0].update_ema)
    with tempfile.TemporaryDirectory() as folder:
        log = lambda line: None
        checkpoints = T.Checkpoints(Path(folder), T.World(device=device), log)

        def save(step=[0]):
            checkpoints.wait()  # the thread that wrote the last one: not part of the stall
            step[0] += 1
            start = time.perf_counter()
            checkpoints.save({"": optimizer}, dict(step=step[0]), 0.0)
            return time.perf_counter() - start

        stalls = [save() for _ in range(4 if optimizer.size < 1e8 else 2)]  # 19 GB each for 1.2 B parameters
        checkpoints.wait()
        out["checkpoint stall"], out["first checkpoint stall"] = float(np.median(stalls[1:])) * 1e3, stalls[0] * 1e3
    if c.data == "scenes":
        from data.scenes import SceneData
        batches = T.host_batches(SceneData(c), c, 0, 0, slice(0, c.batch))
        out["loader (scenes)"] = median(lambda: next(batches))
    return out


def compile_seconds(base) -> dict:
    """Seconds of a fresh process's first step, compilation included: with an empty cache and with the one it left."""
    code = ("import dataclasses, json, sys\nfrom records import bench\nc = bench.T.Config(**json.loads(sys.argv[1]))\n"
            "print(bench.Ours(c, bench.T.setup_world().device, *bench.shapes_of(c)).step()['step'])")
    config = json.dumps(dataclasses.asdict(dataclasses.replace(base, **OFF, compile="on")))
    with tempfile.TemporaryDirectory() as cache:
        def run():
            done = subprocess.run([sys.executable, "-c", code, config], capture_output=True, text=True, cwd=T.ROOT,
                                  env=os.environ | dict(TORCHINDUCTOR_CACHE_DIR=cache))
            if done.returncode:
                raise T.UserError(f"--compile-time: the step fails in a process of its own ("
                                  f"{(done.stderr.strip() or 'no message').splitlines()[-1]}); what was measured "
                                  "before is kept")
            return float(done.stdout.splitlines()[-1])

        return dict(cold_s=run(), warm_s=run())


def shapes_of(c) -> tuple[int, int, int]:
    """Channels and factor of the latents, width of the text: no weights are loaded."""
    latents = {"none": (3, 1), "dc-ae": (32, 32), "flux2": (128, 16)}.get(c.vae, (16, 8))
    return *latents, 96 if c.text == "tiny" else 2304


def choose_rows(base, names: list[str] | None = None) -> dict[str, T.Config]:
    """The track's rows. A knob that the user has changed is the same in all of them; rows that become equal are one."""
    table, track = ROWS[base.track], T.TRACKS[base.track][0]
    if unknown := set(names or ()) - set(table):
        raise T.UserError(f"--rows {sorted(unknown)[0]} is unknown; track {base.track} has {', '.join(table)}")
    given = {f.name for f in dataclasses.fields(base) if getattr(base, f.name) != getattr(track, f.name)} - set(OFF)
    rows = {}
    for row in names or table:
        c = dataclasses.replace(base, **OFF | {k: v for k, v in table[row].items() if k not in given})
        check_config(c)
        if (c not in rows.values() or row == "REPA ended") and (torch.cuda.is_available() or not c.fp8 or base.fp8):
            rows[row] = c
    return rows


def report(facts: dict, times: dict, extra: dict, ceiling: float) -> dict:
    """One line per row, and the same as a dict."""
    out, first = {}, None
    print(f"{'':28s}{'ms/step':>10s}{'quartiles':>18s}{'images/s':>10s}{'ratio':>7s}{'TFLOP/s':>9s}{'floor, ms':>11s}  "
          "parts, ms")
    for row, laps in times.items():
        s, batch = facts[row], facts[row].c.batch
        low, mid, high = np.percentile([x["step"] for x in laps], (25, 50, 75))
        first, flops = first or mid / batch, s.flops
        parts = {k: float(np.median([x[k] for x in laps])) * 1e3 for k in laps[0] if k != "step"}
        out[row] = dict(ms=mid * 1e3, quartiles_ms=[low * 1e3, high * 1e3], images_per_s=batch / mid,
                        ratio=first / mid * batch, tflops=flops / mid / 1e12, floor_ms=flops / ceiling * 1e3,
                        parts_ms=parts, freed_bytes=s.bytes, **extra[row])
        mfu = ""
        if s.device.type == "cuda":
            compute = flops / (parts["forward + backward"] / 1e3) / T.PEAK_FLOPS
            out[row] |= dict(mfu=flops / mid / T.PEAK_FLOPS, mfu_forward_backward=compute)
            mfu = (f", MFU {out[row]['mfu']:.1%}, of forward + backward {compute:.1%}, "
                   f"{extra[row]['peak_bytes'] / 1e9:.1f} GB")
        print(f"{row:28s}{mid * 1e3:10.1f}{f'{low * 1e3:.1f} to {high * 1e3:.1f}':>18s}{batch / mid:10.1f}"
              f"{out[row]['ratio']:7.2f}{flops / mid / 1e12:9.3f}{flops / ceiling * 1e3:11.1f}  "
              + ", ".join(f"{k} {v:.1f}" for k, v in parts.items()) + mfu)
    return out


def sweep(base, shapes, device, turns: int, steps: int, ceiling: float, path: Path) -> dict:
    """images/s against depth, width, tokens and batch, each around the base, next to what FLOPs alone predict."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plain = dataclasses.replace(base, **OFF)
    head = base.hidden // base.heads
    variants = {
        "depth": {d: dict(depth=d, tread_blocks="0-0") for d in (base.depth // 2, base.depth, base.depth * 2)},
        "width": {head * h: dict(hidden=head * h, heads=h) for h in (base.heads // 2, base.heads, base.heads * 2)},
        "image tokens": {(r // shapes[1] // base.patch) ** 2: dict(resolution=r) for r in (
            base.resolution, base.resolution * 2, base.resolution * 4)},
        "batch": {b: dict(batch=b) for b in (base.batch // 4, base.batch // 2, base.batch, base.batch * 2)}}
    out, (figure, axes) = {}, plt.subplots(1, 4, figsize=(15, 3.6))
    for axis, (what, values) in zip(axes, variants.items()):
        builders = {v: lambda c=dataclasses.replace(plain, **knobs): Ours(c, device, *shapes)
                    for v, knobs in values.items()}
        facts, times, _ = one_by_one(builders, device, turns, steps)
        rate = {v: s.c.batch / float(np.median([x["step"] for x in times[v]])) for v, s in facts.items()}
        model = {v: ceiling / (s.flops / s.c.batch) for v, s in facts.items()}
        out[what] = [dict(value=v, images_per_s=rate[v], flop_floor_images_per_s=model[v]) for v in facts]
        axis.loglog(list(rate), list(rate.values()), "o-", label="measured, whole step")
        axis.loglog(list(model), list(model.values()), "k--", lw=0.8, label="FLOPs at the matmul ceiling")
        axis.set(xlabel=what, ylabel="images/s")
        axis.set_xticks(list(rate), list(map(str, rate)), minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        print(what, {v: f"{r:.0f} images/s" for v, r in rate.items()})
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    return out


def profile(c):
    """A torch.profiler trace of three steps, and the ten kernels that cost most, with their share."""
    device = T.setup_world().device
    teacher = teacher_for(c, device) if c.repa else None
    setting = Ours(c, device, *shapes_of(c), teacher)
    for _ in range(3):
        setting.step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=kinds) as trace:
        for _ in range(3):
            setting.step()
    path = Path("logs") / c.name / "trace.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(trace.key_averages(), key=lambda e: -getattr(e, key))
    total = sum(getattr(e, key) for e in events)
    for e in events[:10]:
        print(f"{getattr(e, key) / total:7.1%} {getattr(e, key) / 3e3:9.2f} ms/step {e.count // 3:6d} calls/step  "
              f"{e.key[:90]}")
    print(f"wrote {path}; open it in https://ui.perfetto.dev")


def from_config(c) -> int:
    """What --bench and --profile of train_prx.py do."""
    if c.profile:
        profile(c)
    else:
        args = arguments().parse_args(["--out", f"logs/{c.name}/bench.json"])
        measure(dataclasses.replace(c, bench=False), args)
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Further flags are those of train_prx.py.", allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="some of the track's [all]")
    parser.add_argument("--turns", type=int, default=5, help="how often each row comes round [%(default)s]")
    parser.add_argument("--steps-per-turn", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--peers", help="diffusers, or folders of the public PRX framework, with commas between them")
    parser.add_argument("--sweep", action="store_true", help="depth, width, tokens and batch instead of the rows")
    parser.add_argument("--compile-time", action="store_true", help="time a cold and a warm first step, too")
    parser.add_argument("--out", type=Path, help="JSON; plots lie beside it")
    return parser


def peers(base, shapes, device, sources: list[str]) -> tuple[dict, dict]:
    """What builds ours and theirs, eager and compiled, with Muon and with AdamW; and how far their outputs differ."""
    c, differences = dataclasses.replace(base, **OFF, ns="classic", ns_steps=5, modulation="muon"), {}  # as the peers
    builders = {row: lambda c=dataclasses.replace(c, **knobs): Ours(c, device, *shapes) for row, knobs in {
        "ours, compiled, Muon": dict(compile="on"), "ours, eager, Muon": dict(compile="off"),
        "ours, compiled, AdamW": dict(compile="on", optimizer="adamw")}.items()}
    plain = builders["ours, eager, Muon"]()
    plain.optimizers = []  # the peers need its weights and data only
    for source in sources:
        name = "diffusers" if source == "diffusers" else "PRX framework"
        differences[name] = off = difference(Peer(source, "eager, AdamW", plain))
        release()
        print(f"{name}: " + ("its state dict has other names, so its weights are its own" if off is None else
                             f"the same weights give the same output within {off:.1e} of the largest (FP32)"))
        builders |= {f"{name}, {kind}": lambda source=source, kind=kind: Peer(source, kind, plain) for kind in PEERS}
    return builders, differences


def rows_of_the_track(base, shapes, device, args, ceiling: float, result: dict) -> T.Config:
    """Times them, puts what it finds into `result`, prints it, and returns the settings of the first that fits."""
    rows, made = choose_rows(base, args.rows), {}
    teacher = teacher_for(base, device) if any(c.repa for c in rows.values()) else None

    def build(row):
        if Ours.key(rows[row]) not in made and device.type == "cuda":
            made.clear()
            release()
        return Ours(rows[row], device, *shapes, teacher, made)

    def of_the_first(settings):
        row = next(iter(settings))
        result["once_ms"] = once(list(settings.values()), device)
        result["one_of_8_ranks"] = shares(rows[row], settings[row])

    result["rows"] = report(*one_by_one({row: lambda row=row: build(row) for row in rows}, device, args.turns,
                                        args.steps_per_turn, lambda row: Ours.key(rows[row]), of_the_first), ceiling)
    first = next(iter(result["rows"]))
    if "once_ms" in result:
        print(", ".join(f"{k} {v:.2f} ms ({v / result['rows'][first]['ms']:.1%} of a step)"
                        for k, v in result["once_ms"].items()))
    if "one_of_8_ranks" in result:
        share = result["one_of_8_ranks"]
        print(f"one of 8 ranks: Muon's step {share['muon_ms']:.2f} ms, AdamW's {share['adamw_ms']:.2f} ms, without "
              f"communication; each step a rank sends {share['bytes_sent']['gradients'] / 1e6:.4g} MB of gradients and "
              f"{share['bytes_sent']['weights'] / 1e6:.4g} MB of weights")
    if freed := max(row["freed_bytes"] for row in result["rows"].values()):
        print(f"the end of REPA's burn-in frees {freed / 1e6:.1f} MB (teacher, projector, its state)")
    return rows[first]


def measure(base, args) -> dict:
    """Everything that `args` asks for; returns, and writes, what was printed."""
    shapes, device = shapes_of(base), T.setup_world().device
    dtype = torch.bfloat16 if uses_bf16(base, device) else torch.float32
    ceiling, bandwidth = ceilings(device, dtype)
    result = dict(machine=T.describe_machine(T.World(device=device)), config=dataclasses.asdict(base), ceilings=dict(
        dtype=str(dtype).removeprefix("torch."), flops_per_s=ceiling, bytes_per_s=bandwidth))
    print(f"a large {result['ceilings']['dtype']} matrix product reaches {ceiling / 1e12:.2f} TFLOP/s here, a large "
          f"copy moves {bandwidth / 1e9:.1f} GB/s")
    typical = base

    def write():
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    if args.sweep:
        path = (args.out or Path("bench.json")).with_suffix(".png")
        result["sweep"] = sweep(base, shapes, device, args.turns, args.steps_per_turn, ceiling, path)
    elif args.peers:
        builders, result["largest_difference"] = peers(base, shapes, device, args.peers.split(","))
        rows = result["rows"] = report(*one_by_one(builders, device, args.turns, args.steps_per_turn), ceiling)
        for row, theirs in rows.items():
            ours = "ours, compiled, " + row.split(", ")[-1]
            if not row.startswith("ours") and ours in rows:
                theirs["ours_over_it"] = rows[ours]["images_per_s"] / theirs["images_per_s"]
                print(f"{ours} over {row}: {theirs['ours_over_it']:.2f}x images/s")
    else:
        typical = rows_of_the_track(base, shapes, device, args, ceiling, result)
    write()
    if args.compile_time:
        release()
        result["compile"] = compile_seconds(typical)
        print("first step of a fresh process, with compilation: cold {cold_s:.1f} s, warm {warm_s:.1f} s".format(
            **result["compile"]))
        write()
    if args.out:
        print(f"wrote {args.out}")
    return result


def main(argv=None) -> dict:
    args, flags = arguments().parse_known_args(argv)
    return measure(parse_args(["--steps", "1", *flags])[0], args)


if __name__ == "__main__":
    try:
        main()
    except T.UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
