"""What a run will be: tokens, FLOPs, images/s, bytes on the GPU and on disk, stage by stage.

    python train_prx.py --stages show     # the plan; needs nothing but the settings, opens --data where it can
    python data/plan.py                   # the README's table of what fits on one GPU and on eight

GB are 1e9 bytes. Nothing here has been measured on a GPU: what is counted, derived or guessed says so.
"""

import json
import math
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.settings import parse_args  # noqa: E402
from train_prx import PEAK_FLOPS, PRX, TEXTS, flops_per_image, span, stage_config  # noqa: E402

EPOCHS = 4  # the plan warns beyond. A guess: repeats cost language models little up to there (arXiv 2305.16264)
KEPT = 2 + 1  # checkpoints on disk: the last two, and the one being written
CUDA = 2e9, 0.1  # bytes of the CUDA context and libraries, and the share lost to fragmentation: guesses
SPACES = {"none": (3, 1), "repa-e": (16, 8), "flux": (16, 8), "flux2": (128, 16), "dc-ae": (32, 32)}  # channels, factor
PARAMETERS = {"repa-e": 84e6, "flux": 84e6, "flux2": 84e6, "dc-ae": 312e6, "t5gemma": 2.61e9, "dinov3": 303e6,
              "dinov2": 304e6, "facebook/dinov2-base": 87e6}  # of frozen networks, counted from their configurations
# Bytes that autograd keeps per block, over micro-batch * hidden: per image token, times mlp_ratio beside that, and per
# text token. Counted on a CPU by saved_tensors_hooks (tests/test_preflight.py does it again). Compiled: what the
# partitioner keeps, which computes again what is cheap; on a GPU it may choose otherwise. Keys: (BF16, compiled).
SAVED = {(True, False): (50, 8, 12), (True, True): (26, 6, 8), (False, False): (72, 16, 20),
         (False, True): (52, 12, 16)}


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def latent_space(vae: str, latent: dict | None = None) -> tuple[int, int] | None:
    """Channels, and pixels per side of a latent pixel, of a VAE; None if unknown. latent: of stored data."""
    if vae in SPACES or latent:
        return SPACES.get(vae) or (latent["channels"], latent["factor"])
    c = read_json(Path(vae, "vae/config.json")) or read_json(Path(vae, "config.json"))
    widths, channels = c.get("block_out_channels") or c.get("encoder_block_out_channels"), c.get("latent_channels")
    packed = 2 if c.get("_class_name") == "AutoencoderKLFlux2" else 1  # its latents are packed 2 x 2
    return (channels * packed ** 2, 2 ** (len(widths) - 1) * packed) if widths and channels else None


def text_width(name: str, text: dict | None = None) -> int | None:
    """Width of a text encoder's states; None if unknown. text: of stored data."""
    if name == "t5gemma" or text:
        return text["width"] if text else 2304
    c = read_json(Path(TEXTS.get(name, name), "config.json"))
    return (c.get("encoder") or c).get("hidden_size") or c.get("d_model")


def parameters_of(name: str) -> float:
    """Parameters of a frozen network: known by name, or what is FP32 in its folder, or 0."""
    files = [p for place in ("vae", ".") for p in Path(TEXTS.get(name, name), place).glob("*.safetensors")]
    return PARAMETERS.get(name) or sum(p.stat().st_size for p in files) / 4


class Outline:
    """One stage's networks without their weights: parameters, tokens, FLOPs, bytes.

    c: the stage's configuration; data: its data set. Without one, latents and text are taken as stored.
    """

    def __init__(self, c, data=None):
        self.c, self.data = c, data
        space, width = latent_space(c.vae, data and data.latent), text_width(c.text, data and data.text)
        self.notes = [f"--vae {c.vae} cannot be read here and is taken for 16 channels, factor 8"] * (not space)
        self.notes += [f"--text {c.text} cannot be read here and is taken for width 2304"] * (not width)
        (channels, self.factor), skipped = space or (16, 8), c.tread or c.sprint
        with torch.device("meta"):
            model = PRX(in_channels=channels, patch_size=c.patch, context_in_dim=width or 2304, hidden_size=c.hidden,
                        mlp_ratio=c.mlp_ratio, num_heads=c.heads, depth=c.depth, bottleneck_size=c.bottleneck or None,
                        span=span(c) if skipped else None, sprint=c.sprint > 0)
        self.model, sizes = model.config, {n: p.numel() for n, p in model.named_parameters()}
        muon = {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
        momenta = sum((1 if c.optimizer == "muon" and n in muon else 2) * size for n, size in sizes.items())
        self.parameters = sum(sizes.values())
        self.checkpoint = 4 * (self.parameters * (2 if c.ema else 1) + momenta)  # bytes: masters, EMA, momenta
        self.disk = KEPT * self.checkpoint + 4 * self.parameters
        teachers = [c.repa_teacher] * (c.repa > 0) + [c.pdino_teacher] * (c.pdino > 0)
        self.teacher = sum(map(parameters_of, teachers))
        encoder = parameters_of(c.text) if data and not data.text else 0
        self.frozen = 4 * parameters_of(c.vae) + 2 * (encoder + self.teacher)  # bytes; FLUX's VAE asks for FP32
        sizes = data.sizes if data else [(c.resolution, c.resolution)]
        self.tokens = max(h * w for h, w in sizes) // (self.factor * c.patch) ** 2  # of the largest image
        self.routed = span(c)[1] + 1 - span(c)[0] if skipped else 0  # blocks that see `kept` tokens only
        self.kept = max(1, round(self.tokens * (1 - skipped)))

    def flops(self) -> float:
        """Of one image in training: forward and backward of the model, forward of teachers (2 per weight and token)."""
        part = lambda depth, tokens: flops_per_image(self.model | dict(depth=depth), tokens, self.c.text_tokens)
        routed = part(self.routed, self.kept) - part(0, self.kept)
        return 3 * (part(self.c.depth - self.routed, self.tokens) + routed) + 2 * self.teacher * self.tokens

    def activations(self, micro: int) -> float:
        """Bytes that autograd keeps for the backward pass of `micro` images on one GPU, less REPA's 1 % or so."""
        c, d, text = self.c, self.c.hidden, self.c.text_tokens
        wide, patch = 4 if c.compute == "fp32" else 2, self.model["in_channels"] * c.patch ** 2
        per_image, per_mlp, per_text = SAVED[wide == 2, c.compile != "off"]
        tokens = (c.depth - self.routed) * self.tokens + self.routed * self.kept  # summed over the blocks
        blocks = d * (tokens * (per_image + per_mlp * c.mlp_ratio) + c.depth * text * per_text)
        ends = self.tokens * ((8 + wide) * d + (4 + wide) * patch) + text * wide * (d + self.model["context_in_dim"])
        return micro * (blocks + ends)

    def step(self, ranks: int) -> float:
        """Bytes of the optimizer's temporaries: FP32 copies of all parameters, counted for one rank; more ranks gather
        all masters beside their own share."""
        copies = 2 if self.c.optimizer == "adamw" else 0.9
        return 4 * self.parameters * (copies if ranks == 1 else 1 + copies / ranks)

    def memory(self, ranks: int, micro: int = 0) -> dict[str, float]:
        """Bytes on each GPU by what needs them. micro: images per GPU at a time, else as configured."""
        c, n, wide = self.c, self.parameters, 4 if self.c.compute == "fp32" else 2
        micro = micro or c.batch // c.accumulate // ranks
        noise = 4 * self.model["in_channels"] * (c.resolution / self.factor) ** 2 * c.batch  # each rank draws all of it
        parts = {"weights": n * wide, "FP32 gradients": n * 4, "masters, EMA and momenta": self.checkpoint / ranks,
                 "frozen networks": self.frozen, "batch and noise": noise * (1 + 1 / ranks)}
        # Then the largest of what comes one after the other. FLUX's VAE in FP32 (counted) encodes 16 images at a time
        # with 2572 bytes per pixel and decodes 8 with 3073; other VAEs are taken for it.
        vae = 16 * 2572 if self.data and not self.data.latent else 8 * 3073
        phases = {"activations and gradients": self.activations(micro) + n * wide, "the step": self.step(ranks),
                  "VAE": c.resolution ** 2 * vae * (c.vae != "none")}
        phase = max(phases, key=phases.get)
        parts[phase] = phases[phase]
        return parts | {"CUDA and fragmentation": CUDA[0] + CUDA[1] * sum(parts.values())}

    def need(self, ranks: int, micro: int = 0) -> float:
        return sum(self.memory(ranks, micro).values())


def fitting(outlines: list[Outline], ranks: int, limit: float) -> int | None:
    """The smallest --accumulate with which every stage fits into `limit` bytes per GPU."""
    for n in range(1, min(o.c.batch for o in outlines) // ranks + 1):
        if all(o.c.batch % (n * ranks) == 0 and o.need(ranks, o.c.batch // n // ranks) <= limit for o in outlines):
            return n


def describe(parts: dict[str, float]) -> str:
    return ", ".join(f"{k} {v / 1e9:.1f}" for k, v in parts.items() if v >= 5e7)


def report(config, stages, outlines: list[Outline], ranks: int, gpu: bool, warnings=()) -> str:
    """The plan: a table with a row per stage, memory, disk, notes and warnings."""
    rows, warnings, total = [], list(warnings), sum(stage.share for stage in stages)
    for stage, o in zip(stages, outlines):
        cells, seen = stage_row(o, stage.share / total, ranks, gpu)
        rows.append({"stage": stage.name} | cells)
        if seen > EPOCHS:
            warnings.append(f"stage {stage.name} would see images of {o.c.data} {seen:.3g} times, more than {EPOCHS} "
                            "(a guess at where repeats begin to cost); give more data or a shorter run")
    o = max(outlines, key=lambda o: o.need(ranks))
    named = "as WORLD_SIZE says" if "WORLD_SIZE" in os.environ else "taken, as there is no WORLD_SIZE"
    title = (f"{config.name}: PRX with {o.parameters / 1e6:,.1f} M parameters on {ranks} {'GPU' if gpu else 'CPU'} "
             f"rank{'s' * (ranks > 1)} ({named})")
    lines = ["tokens, text: of the largest image and the longest text; TFLOP: per image, teachers included",
             f"images/s: of all GPUs at {config.mfu:.0%} (--mfu) of {PEAK_FLOPS / 1e12:.0f} TFLOP/s each; the default "
             "is the goal on an H200, not a measurement" if gpu else
             "images/s: unknown on a CPU, and so is what has a ?"]
    lines += [f"data of {stage.name}: {o.data.about}" for stage, o in zip(stages, outlines) if o.data]
    lines += [f"memory: about {o.need(ranks) / 1e9:.0f} GB per GPU by estimate, most at {o.c.resolution} px: "
              f"{describe(o.memory(ranks))}"] * gpu
    lines += [f"disk: {o.disk / 1e9:.2g} GB in logs/: {KEPT} checkpoints of {o.checkpoint / 1e9:.2g} (two are kept, "
              "one is being written) and the final weights", *(f"note: {note}" for note in o.notes),
              *(f"warning: {warning}" for warning in warnings)]
    lines = [textwrap.fill(line, 120, subsequent_indent="  ", break_on_hyphens=False) for line in lines]
    return "\n".join([title, "", *align(rows), "", *lines])


def stage_row(o: Outline, share: float, ranks: int, gpu: bool) -> tuple[dict, float]:
    """What the plan's table says of a stage, and how often its data is seen (0 if endless or unknown)."""
    c, flops = o.c, o.flops()
    rate = c.mfu * PEAK_FLOPS * ranks / flops if gpu else None  # images per second
    samples = c.steps * share * c.batch if c.steps else rate and c.hours * 3600 * share * rate
    seconds = (rate and samples / rate) if c.steps else c.hours * 3600 * share
    seen = repeats(o.data, samples) if samples else 0
    length = "?" if not seconds else f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"
    endless = o.data and not hasattr(o.data, "folders")
    return {"length": length, "px": c.resolution, "tokens": o.tokens, "text": c.text_tokens, "batch": c.batch,
            "per GPU": c.batch // c.accumulate // ranks, "TFLOP": f"{flops / 1e12:.3g}", "images/s": short(rate),
            "steps": short(samples and samples / c.batch), "samples": short(samples),
            "epochs": f"{seen:.3g}" if seen else "endless" if endless else "?",
            "tokens seen": short(samples and samples * o.tokens),
            "checkpoints": int(seconds / 60 / c.checkpoint_minutes) if seconds else "?"}, seen


def repeats(data, samples: float) -> float:
    """How often a stage of so many samples sees the folder that it repeats most; 0 if endless or unknown."""
    counts = [sum(len(data.ids[shard]) for shard in shards) for shards in getattr(data, "folders", ())]
    return max((samples * w / data.weights.sum() / n for n, w in zip(counts, getattr(data, "weights", ()))), default=0)


def short(x: float | None) -> str:
    """156400000 -> 156 M; None or 0 -> ?"""
    power = min(4, int(math.log10(x) // 3)) if x and x >= 1e4 else 0
    return f"{x / 1000 ** power:.3g} {' kMGT'[power]}" if power else f"{x:,.0f}" if x else "?"


def align(rows: list[dict]) -> list[str]:
    """A table with columns as wide as they must be, the first one to the left, the others to the right."""
    rows = [list(rows[0])] + [[str(cell) for cell in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{cell:{'>' if i else '<'}{w}}" for i, (cell, w) in enumerate(zip(row, widths))) for row in rows]


def readme_table() -> str:
    """What fits: the largest micro-batch, and the --accumulate that brings a batch down to what fits."""
    lines = ["| GPU | GPUs | model | 256 px: images at a time | `--accumulate`, batch 256 / 1024 | 512 px: images at a "
             "time | `--accumulate`, batch 256 / 1024 | the 24h track |", "|---" * 8 + "|"]
    small = ["--hidden", "1280", "--heads", "20"]
    for ranks, gigabytes, flags in [(1, 24, []), (1, 24, small), *((1, gb, []) for gb in (48, 80, 141)),
                                    *((8, gb, []) for gb in (24, 48, 80, 141))]:
        config, stages = parse_args(flags)
        cells, limit = [], gigabytes * 1e9
        for resolution in (256, 512):
            c = replace(config, resolution=resolution)
            o = Outline(c)
            most = max((m for m in range(1, 1025) if o.need(ranks, m) <= limit), default=0)
            counts = [fitting([Outline(replace(c, batch=batch))], ranks, limit) for batch in (256, 1024)]
            cells += [str(most or "-"), " / ".join(f"`{n}`" if n else "-" for n in counts)]
        n = fitting([Outline(stage_config(config, stage)) for stage in stages], ranks, limit)
        model = f"{Outline(config).parameters / 1e9:.2f} B" + f" (`{' '.join(flags)}`)" * bool(flags)
        lines.append(f"| {gigabytes} GB | {ranks} | {model} | {' | '.join(cells)} | "
                     + (f"`--accumulate {n}` |" if n else "does not fit |"))
    return "\n".join(lines)


if __name__ == "__main__":
    print(readme_table())
