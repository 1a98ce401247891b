"""Train the small feature networks behind the offline FID, CMMD and DINO-MMD, on scenes.

    python data/networks/train_features.py                  # all three, about 20 minutes on one core
    python data/networks/train_features.py clip --steps 300 --out networks

Each goes to data/networks/<name>/ in Hugging Face format, with train.log: configuration, losses, probe accuracies.

    inception  ResNetModel: classifies the scene's attributes from its pooled output (FID)
    clip       CLIPVisionModelWithProjection: contrastive, against descriptions of the scenes (CMMD)
    dino       Dinov2WithRegistersModel: reads each cell from its patches, all from the global feature (DINO-MMD)

Only the split `train` is seen, micro and mini scenes in turn, at 32, 64 and 128 pixels. Many images are damaged: parts
of objects missing, blur, noise. How much is part of what each network has to tell, so that its features move with the
damage instead of ignoring it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import scenes  # noqa: E402
from eval_prx import NETWORKS, preprocess  # noqa: E402

SIZE = 64                                    # input pixels per side
GRIDS = (2, 3)                               # micro's and mini's
CELLS = sum(g * g for g in GRIDS)            # 13: 4 cells of micro scenes, then 9 of mini scenes
CLASSES = {"shape": len(scenes.SHAPES), "colour": len(scenes.COLOURS), "size": len(scenes.SIZES)}
PER_CELL = 1 + sum(CLASSES.values())         # how much of an object is there, and what it is
BACKGROUNDS = len(scenes.BACKGROUNDS) * len(scenes.PATTERNS)
MAX_BLUR, MAX_NOISE = 3.0, 0.25              # sigma in pixels at 64 px; sigma in units of the full range
RESOLUTIONS = (32,) * 5 + (64,) * 6 + (128,)  # one of these for each batch; large ones are slow to draw
RECIPE = {"batch": 128, "lr": {"inception": 4e-3, "clip": 4e-3, "dino": 4e-3}, "weight_decay": 0.02, "warmup": 0.05,
          "steps": {"inception": 1500, "clip": 1300, "dino": 1500}}


# ---------------------------------------------------------------------------------------------------------------------
# Images, damage, and what is to be told
# ---------------------------------------------------------------------------------------------------------------------

def blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of (N, C, H, W) with one sigma per image, in pixels, by FFT; edges are mirrored."""
    h, w = images.shape[-2:]
    x = torch.cat([images, images.flip(2)], 2)
    x = torch.cat([x, x.flip(3)], 3)
    fy, fx = torch.fft.fftfreq(2 * h)[:, None], torch.fft.rfftfreq(2 * w)[None]
    gain = torch.exp(-2 * torch.pi ** 2 * sigma[:, None, None, None] ** 2 * (fy ** 2 + fx ** 2))
    return torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=(2 * h, 2 * w))[:, :, :h, :w]


def make_batch(indices, difficulty, res: int, rng: torch.Generator, split: str = "train", damage: bool = True):
    """uint8 images (N, 3, res, res) and what they show, as tensors.

    `place`, `shape`, `colour`, `size` (N, K), place -1 where there is no object; `background` (N,); `visible` (N, K),
    the share of each object that was left; `quality` (N, 2), blur and noise in [0, 1].
    """
    drawn = scenes.draw_scenes(indices, split, difficulty)
    n, k = drawn.place.shape
    target = {key: torch.from_numpy(getattr(drawn, key)) for key in ("place", "shape", "colour", "size", "background")}
    target |= {"visible": (target["place"] >= 0).float(), "quality": torch.zeros(n, 2)}
    images = scenes.render(drawn, res)
    if not damage:
        return images, target
    uniform = lambda *shape: torch.rand(*shape, generator=rng)
    x = images.float() / 255
    empty = scenes._background(target["background"], res) / 255
    # a horizontal or vertical strip of a cell's width or so, in half of the images, fades to the background
    axis = (torch.arange(res) + 0.5) / res
    strip = ((axis - uniform(n, 1)).abs() < uniform(n, 1) / (2 * difficulty.grid)).float()                # (N, res)
    vertical = (uniform(n, 1, 1) < 0.5).float()
    strip = vertical * strip[:, None, :] + (1 - vertical) * strip[:, :, None]                           # (N, res, res)
    strip = strip * ((uniform(n) < 0.5) * uniform(n).sqrt())[:, None, None]
    change = (x - empty).abs().sum(1)                                                                   # (N, res, res)
    g = difficulty.grid
    per_cell = lambda a: F.adaptive_avg_pool2d(a[:, None], g).flatten(1)                                # (N, g * g)
    left = 1 - per_cell(change * strip) / per_cell(change).clamp(min=1e-6)
    target["visible"] = left.gather(1, target["place"].clamp(min=0)) * target["visible"]
    x = torch.lerp(x, empty, strip[:, None])
    level = uniform(n, 2) ** 2 * (uniform(n, 2) < 0.5)                                                  # mostly light
    hit = level[:, 0] > 0
    x[hit] = blur(x[hit], level[hit, 0] * MAX_BLUR * res / SIZE)
    x = x + torch.randn(x.shape, generator=rng) * (level[:, 1] * MAX_NOISE)[:, None, None, None]
    target["quality"] = level
    return (x.clamp(0, 1) * 255).round().to(torch.uint8), target


def first_cell(grid: int) -> int:
    """Where the cells of this grid begin among the 13."""
    return sum(g * g for g in GRIDS if g < grid)


def cell_index(place: torch.Tensor, grid: int) -> torch.Tensor:
    """Places of a grid -> indices into the 13 cells; absent objects -> the first of its cells."""
    return place.clamp(min=0) + first_cell(grid)


def cell_loss(logits: torch.Tensor, target: dict, grid: int) -> torch.Tensor:
    """Cross-entropies of (N, CELLS, PER_CELL) logits: how much of an object each cell of this grid holds, and which."""
    there, at, first = target["place"] >= 0, cell_index(target["place"], grid), first_cell(grid)
    visible = torch.zeros(len(logits), CELLS).scatter_add(1, at, target["visible"])[:, first:first + grid * grid]
    loss = F.binary_cross_entropy_with_logits(logits[:, first:first + grid * grid, 0], visible)
    objects = logits.gather(1, at[:, :, None].expand(-1, -1, PER_CELL))[there]                          # (M, PER_CELL)
    start = 1
    for key, classes in CLASSES.items():
        each = F.cross_entropy(objects[:, start:start + classes], target[key][there], reduction="none")
        loss, start = loss + (each * target["visible"][there]).mean(), start + classes
    return loss


class SceneHead(nn.Module):
    """Linear read-out of a whole scene from one feature vector: all cells, the background, blur and noise."""

    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Linear(width, CELLS * PER_CELL + BACKGROUNDS + 2)

    def loss(self, features, target, grid):
        cells, background, quality = self.out(features).split([CELLS * PER_CELL, BACKGROUNDS, 2], 1)
        cells = cells.unflatten(1, (CELLS, PER_CELL))
        return (cell_loss(cells, target, grid) + F.cross_entropy(background, target["background"])
                + 5 * F.mse_loss(quality, target["quality"]))


# ---------------------------------------------------------------------------------------------------------------------
# The three networks, each with its objective: loss(pixels, target, grid) and features(pixels)
# ---------------------------------------------------------------------------------------------------------------------

class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers import ResNetConfig, ResNetModel

        self.net = ResNetModel(ResNetConfig(embedding_size=24, hidden_sizes=[32, 64, 96], depths=[1, 1, 1],
                                            layer_type="basic", image_size=SIZE))
        self.head = SceneHead(96)

    def features(self, pixels):
        return self.net(pixel_values=pixels).pooler_output.flatten(1)

    def loss(self, pixels, target, grid):
        return self.head.loss(self.features(pixels), target, grid)


class Description(nn.Module):
    """Text tower of the contrastive objective: a scene is a set of objects, a background and the damage done to it."""

    def __init__(self, width: int = 128, out: int = 64):
        super().__init__()
        self.words = nn.ModuleDict({key: nn.Embedding(n, width) for key, n in (("place", CELLS), *CLASSES.items())})
        self.object = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.background, self.quality = nn.Embedding(BACKGROUNDS, width), nn.Linear(2, width)
        self.scene = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))

    def forward(self, target, grid):
        words = self.words["place"](cell_index(target["place"], grid))
        words = words + sum(self.words[key](target[key]) for key in CLASSES)
        objects = (self.object(words) * target["visible"][:, :, None]).sum(1)
        return self.scene(objects + self.background(target["background"]) + self.quality(target["quality"]))


def alter(target: dict, grid: int) -> dict:
    """Hard negatives: the same descriptions with one attribute of the first object, or the background, changed."""
    wrong = {key: value.clone() for key, value in target.items()}
    which = torch.randint(5, (len(target["background"]),))
    for i, (key, classes) in enumerate((*CLASSES.items(), ("place", grid * grid))):
        rows = which == i
        wrong[key][rows, 0] = (wrong[key][rows, 0] + torch.randint(1, classes, (int(rows.sum()),))) % classes
    other = torch.randint(1, BACKGROUNDS, which.shape)
    wrong["background"] = torch.where(which == 4, (wrong["background"] + other) % BACKGROUNDS, wrong["background"])
    return wrong


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        self.net = CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE,
            patch_size=8, projection_dim=64))
        self.text = Description()
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def features(self, pixels):
        return self.net(pixel_values=pixels).image_embeds

    def loss(self, pixels, target, grid):
        image = F.normalize(self.features(pixels), dim=1)
        text = self.text(target, grid)
        wrong = [self.text(alter(target, grid), grid) for _ in range(4)]
        text = F.normalize(torch.cat([text, *wrong]), dim=1)
        logits = image @ text.T * self.scale.exp().clamp(max=100)                                       # (B, 5 B)
        labels = torch.arange(len(image))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :len(image)].T, labels)) / 2


class Dino(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        self.net = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
            hidden_size=64, mlp_ratio=3, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE, patch_size=8,
            num_register_tokens=2, layerscale_value=1.0))
        self.head, self.cell_head = SceneHead(64), nn.Linear(64, PER_CELL)

    def features(self, pixels):
        return self.net(pixel_values=pixels).pooler_output

    def loss(self, pixels, target, grid):
        output = self.net(pixel_values=pixels)
        patches = output.last_hidden_state[:, 1 + self.net.config.num_register_tokens:]                 # (B, 64, D)
        side = SIZE // 8
        patches = patches.transpose(1, 2).unflatten(2, (side, side))
        cells = F.adaptive_avg_pool2d(patches, grid).flatten(2).transpose(1, 2)                         # (B, cells, D)
        logits = torch.zeros(len(pixels), CELLS, PER_CELL)
        logits[:, first_cell(grid):first_cell(grid) + grid * grid] = self.cell_head(cells)
        return self.head.loss(output.pooler_output, target, grid) + cell_loss(logits, target, grid)


MODELS = {"inception": Inception, "clip": Clip, "dino": Dino}


# ---------------------------------------------------------------------------------------------------------------------
# Probes, training, saving
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def probe(model, kind: str, difficulty, n_train: int = 4000, n_test: int = 1000) -> dict[str, float]:
    """Accuracy of a linear probe (ridge regression to one-hot) on frozen features: fit on `train`, tested on `eval`.

    background; presence in each cell; shape and colour of the objects in the cells that hold one.
    """
    model.eval()
    features, targets = [], []
    for split, n in (("train", n_train), ("eval", n_test)):
        for i in range(0, n, 250):
            indices = range(50_000_000 + i, 50_000_000 + i + 250)
            images, target = make_batch(indices, difficulty, SIZE, None, split, damage=False)
            pixels = preprocess(images, SIZE, kind).to(memory_format=torch.channels_last)
            features.append(model.features(pixels).double())
            targets.append(target)
    x = torch.cat(features)
    x = F.pad((x - x.mean(0)) / x.std(0).clamp(min=1e-6), (0, 1), value=1.0)
    target = {key: torch.cat([t[key] for t in targets]) for key in targets[0]}
    cells, there = difficulty.grid ** 2, target["place"] >= 0
    at = target["place"].where(there, cells)  # what is absent goes to an extra cell, which is cut off
    at_cell = {key: torch.full((len(x), cells + 1), -1).scatter(1, at, target[key])[:, :cells]
               for key in ("shape", "colour")}
    right = {"background": [], "presence": [], "shape": [], "colour": []}

    def fit(name, label, classes, rows):
        fitted, tested = rows & (torch.arange(len(x)) < n_train), rows & (torch.arange(len(x)) >= n_train)
        a, b = x[fitted], F.one_hot(label[fitted], classes).double()
        weights = torch.linalg.solve(a.T @ a + 1e-2 * len(a) * torch.eye(a.shape[1]), a.T @ b)
        right[name].append(((x[tested] @ weights).argmax(1) == label[tested]).double())

    fit("background", target["background"], BACKGROUNDS, torch.ones(len(x), dtype=bool))
    for cell in range(cells):
        present = at_cell["shape"][:, cell] >= 0
        fit("presence", present.long(), 2, torch.ones(len(x), dtype=bool))
        for key in ("shape", "colour"):
            fit(key, at_cell[key][:, cell], CLASSES[key], present)
    return {name: round(torch.cat(values).mean().item(), 4) for name, values in right.items()}


def train(kind: str, steps: int, seed: int, folder: Path):
    """Train one network and save it, with its log, into `folder`."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = MODELS[kind]().to(memory_format=torch.channels_last)
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "train.log").open("w")

    def say(line):
        print(f"{kind}: {line}", flush=True)
        print(line, file=log, flush=True)

    start, start_cpu = time.perf_counter(), time.process_time()
    batch, peak = RECIPE["batch"], RECIPE["lr"][kind]
    say(json.dumps({"network": kind, "steps": steps, "seed": seed, "batch": batch, "lr": peak, "optimizer": "AdamW",
                    "betas": [0.9, 0.98], "weight_decay": RECIPE["weight_decay"], "warmup": RECIPE["warmup"],
                    "schedule": "linear warm-up, linear to 0", "size": SIZE, "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "parameters": sum(p.numel() for p in model.net.parameters()),
                    "scenes": [d.protocol for d in (scenes.MICRO, scenes.MINI)]}))
    untrained = {d.grid: probe(model, kind, d) for d in (scenes.MICRO, scenes.MINI)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=RECIPE["weight_decay"])
    losses = []
    for step in range(steps):
        difficulty = (scenes.MICRO, scenes.MINI)[step % 2]
        res = RESOLUTIONS[int(torch.randint(len(RESOLUTIONS), (), generator=rng))]
        images, target = make_batch(range(step * batch, (step + 1) * batch), difficulty, res, rng)
        pixels = preprocess(images, SIZE, kind).to(memory_format=torch.channels_last)
        progress = step / steps
        for group in optimizer.param_groups:
            warm, cool = (progress + 1 / steps) / RECIPE["warmup"], (1 - progress) / (1 - RECIPE["warmup"])
            group["lr"] = peak * min(1, warm, cool)
        model.train()
        loss = model.loss(pixels, target, difficulty.grid)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            say(f"step {step + 1}/{steps} loss {sum(losses) / len(losses):.4f} seconds {seconds:.0f}")
            losses = []
    model.eval()
    model.net.save_pretrained(folder)
    for name, difficulty in (("micro", scenes.MICRO), ("mini", scenes.MINI)):
        say(f"linear probe on {name}, eval split, 64 px: {json.dumps(probe(model, kind, difficulty))} "
            f"untrained network: {json.dumps(untrained[difficulty.grid])}")
    say(f"wall time {time.perf_counter() - start:.0f} s, processor time {time.process_time() - start_cpu:.0f} s")
    log.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=list(MODELS), help="inception, clip, dino")
    parser.add_argument("--steps", type=int, help="optimizer steps (each network's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=NETWORKS, help="folder that gets one folder per network")
    args = parser.parse_args()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for kind in args.networks:
        if kind not in MODELS:
            parser.error(f"network {kind} is unknown; use {', '.join(MODELS)}")
        train(kind, args.steps or RECIPE["steps"][kind], args.seed, args.out / kind)


if __name__ == "__main__":
    main()
