"""How long does a step take, and what of it? Random data of the real shapes, no weights needed.

    python records/bench.py --track micro                            # two cores
    python records/bench.py --hidden 1792 --resolution 256 --batch 128 --out bench.json     # PRX-1.2B on one GPU
    python records/bench.py --track micro --rows plain tread --steps 20

Each row is one setting of the same model; rows run in turns, a few steps each, because machines are noisy, and the
median of all steps is reported with its quartiles and as a ratio to the first row. `REPA`, then `REPA ended` is the
burn-in's end: the same step before and after, and the bytes that leave memory with the teacher and the projector.
FLOPs are the model's own (train_prx.flops_per_image times 3): the teacher's do not count.
"""

import argparse
import dataclasses
import gc
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_prx as T  # noqa: E402
from data.settings import parse_args  # noqa: E402

ROWS = {"plain": {}, "REPA": dict(repa=0.5), "REPA ended": {}, "TREAD 50 %": dict(tread=0.5),
        "SPRINT 75 %": dict(sprint=0.75), "contrastive": dict(contrastive=0.05), "AdamW": dict(optimizer="adamw"),
        "no EMA": dict(ema=0.0)}


class Setting:
    """A model, its optimizers and a step on random data."""

    def __init__(self, c: T.Config, device, channels: int, factor: int, width: int, teacher=None):
        self.c, self.device, self.teacher = c, device, teacher
        bf16 = c.compute == "bf16" or c.compute == "auto" and T.has_fast_bf16(device)
        dtype, routed = torch.bfloat16 if bf16 else torch.float32, c.tread or c.sprint
        self.model = T.PRX(in_channels=channels, patch_size=c.patch, hidden_size=c.hidden, mlp_ratio=c.mlp_ratio,
                           context_in_dim=width, num_heads=c.heads, depth=c.depth, bottleneck_size=c.bottleneck or None,
                           span=T.span(c) if routed else None, sprint=c.sprint > 0).initialize(0).to(device)
        self.optimizers = [T.MuonAdamW(self.model.named_parameters(), c)]
        self.model.set_compute_dtype(dtype)
        if c.repa:
            self.projector = T.Alignment(c.hidden, teacher.width, c.repa_kind).initialize(1).to(device)
            self.optimizers.append(T.MuonAdamW(self.projector.named_parameters(), c))
            self.projector.set_compute_dtype(dtype)
        if c.compile == "on" or c.compile == "auto" and device.type == "cuda":
            for block in self.model.blocks:
                block.compile(dynamic=False)
        side, b = c.resolution // factor, c.batch
        g = torch.Generator(device).manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=g, device=device)
        self.x_0, self.eps, self.t = draw(b, channels, side, side), draw(b, channels, side, side), draw(b).sigmoid()
        self.text, self.mask = draw(b, c.text_pad, width), torch.ones(b, c.text_pad, dtype=torch.bool, device=device)
        self.pixels = draw(b, 3, c.resolution, c.resolution).clamp(-1, 1)
        kept = round((side // c.patch) ** 2 * (1 - c.tread - c.sprint))
        self.tokens, self.kept, self.bytes = (side // c.patch) ** 2, kept, 0
        if c.repa:  # what leaves memory when the burn-in ends
            state = [v for v in vars(self.optimizers[1]).values() if isinstance(v, torch.Tensor)]
            tensors = [*teacher.model.parameters(), *self.projector.parameters(), *state]
            self.bytes = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    def step(self) -> dict[str, float]:
        """Seconds of the parts of one step."""
        c, times = self.c, {}

        def lap(name, start):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times[name] = time.perf_counter() - start
            return time.perf_counter()

        keep = T.route(c.batch, self.x_0, c.patch, c.tread + c.sprint, None) if c.tread + c.sprint else None
        now = begin = lap("start", time.perf_counter())
        features = None
        if c.repa:
            rows = int(self.tokens ** 0.5)
            with torch.no_grad():
                features = self.teacher(self.pixels, rows, rows)
            now = lap("teacher", now)
        loss, _, _, tapped = T.flow_matching_loss(self.model, self.x_0, self.eps, self.t, self.text, self.mask,
                                                  c.predict, c.contrastive, keep, c.repa_layer if c.repa else None)
        if c.repa:
            loss = loss + c.repa * self.projector(*tapped, features, rows, rows)
        loss.mean().backward()
        now = lap("forward + backward", now)
        for optimizer in self.optimizers:
            optimizer.accumulate()
            optimizer.step()
        lap("optimizer", now)
        times["step"] = time.perf_counter() - begin
        del times["start"]
        return times


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Further flags are those of train_prx.py.")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--turns", type=int, default=5, help="how often each row comes round [%(default)s]")
    parser.add_argument("--steps-per-turn", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--out", type=Path)
    args, flags = parser.parse_known_args(argv)
    base, _ = parse_args(["--steps", "1", *flags])
    world = T.setup_world()
    channels, factor = {"none": (3, 1), "dc-ae": (32, 32), "flux2": (128, 16)}.get(base.vae, (16, 8))
    width = 96 if base.text == "tiny" else 2304
    teacher = T.Teacher("repa-teacher", base.repa_teacher, world.device) if "REPA" in args.rows else None
    off = dict(repa=0.0, tread=0.0, sprint=0.0, contrastive=0.0)
    settings = {row: Setting(dataclasses.replace(base, **off | ROWS[row]), world.device, channels, factor, width,
                             teacher) for row in args.rows}
    times = {row: [] for row in args.rows}
    for turn in range(args.turns + 1):
        for row, setting in settings.items():
            laps = [setting.step() for _ in range(args.steps_per_turn)]
            times[row] += laps if turn else []  # the first turn warms up, and compiles
    out, first = {}, None
    print(f"{'':14s}{'ms/step':>10s}{'quartiles':>18s}{'images/s':>10s}{'ratio':>7s}{'TFLOP/s':>9s}  parts, ms")
    for row, laps in times.items():
        s, c = settings[row], settings[row].c
        low, mid, high = np.percentile([x["step"] for x in laps], (25, 50, 75))
        first = first or mid
        last, begin = T.span(c)[1], T.span(c)[0]
        flops = 3 * T.flops_per_image(s.model.config, s.tokens, c.text_pad, c.tread + c.sprint,
                                      (last - begin + 1) * bool(c.tread or c.sprint)) * c.batch
        parts = {k: float(np.median([x[k] for x in laps])) * 1e3 for k in laps[0] if k != "step"}
        out[row] = dict(ms=mid * 1e3, quartiles_ms=[low * 1e3, high * 1e3], images_per_s=c.batch / mid,
                        ratio=first / mid, tflops=flops / mid / 1e12, parts_ms=parts, freed_bytes=s.bytes)
        print(f"{row:14s}{mid * 1e3:10.1f}{f'{low * 1e3:.1f} to {high * 1e3:.1f}':>18s}{c.batch / mid:10.0f}"
              f"{first / mid:7.2f}{flops / mid / 1e12:9.3f}  " + ", ".join(f"{k} {v:.1f}" for k, v in parts.items()))
    if "REPA" in out:
        print(f"the end of REPA's burn-in frees {out['REPA']['freed_bytes'] / 1e6:.1f} MB (teacher, projector, its "
              "state)")
        if world.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            del settings["REPA"], teacher
            gc.collect()
            after = torch.cuda.memory_allocated()
            print(f"memory allocated on the GPU: {before / 1e9:.2f} GB, without that row {after / 1e9:.2f}")
    result = dict(machine=T.describe_machine(world), config=dataclasses.asdict(base), rows=out)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
