"""Train the small network that tells emoji apart, for records/retrieval.py.

    python data/networks/train_emoji.py                     # from shards/openmoji of 32 px: some minutes on two cores

Contrastive without labels (SimCLR: Chen et al. 2020, arXiv 2002.05709): two damaged copies of a picture are to be nearer
to each other than to all others of the batch, so skin tones and sexes of one thing stay apart. Only the training split
is seen. data/networks/emoji/ gets a ResNetModel in Hugging Face format, whose config names the held-out pictures by
their hash, and train.log: configuration, losses, and how often a damaged held-out picture finds itself.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import shards  # noqa: E402
from eval_prx import NETWORKS, ShardTask, preprocess  # noqa: E402

SIZE = 32                    # input pixels per side
BATCH, LR, TEMPERATURE = 256, 4e-3, 0.1


def damage(images: torch.Tensor, rng: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> the same, each moved by up to 8 % of its side, turned by up to 10 degrees, scaled by up to
    12 %, its channels by up to 15 % in gain, blurred and with noise; `strength` times all of that."""
    n, x = len(images), images.float() / 255
    uniform = lambda *shape: (2 * torch.rand(n, *shape, generator=rng) - 1) * strength
    angle, scale, move = uniform() * math.radians(10), 1 + 0.12 * uniform(), 0.16 * uniform(2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    x = 1 - F.grid_sample(1 - x, grid, align_corners=False)  # what comes in from outside is white
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x.lerp(blurred, uniform(1, 1, 1).abs())
    x = x * (1 + 0.15 * uniform(3, 1, 1)) + 0.05 * strength * torch.randn(x.shape, generator=rng)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def training_images(folder: Path) -> torch.Tensor:
    """uint8 (N, 3, SIZE, SIZE) of the training split."""
    images = []
    for entry in shards.read_index(folder)["shards"]:
        if entry["split"] == "train" and entry["resolution"] == SIZE:
            tensors, skipped = shards.open_shard(folder, entry), set(entry["skip"])
            images += [shards.read_image(tensors, row) for row in range(entry["count"]) if row not in skipped]
    if not images:
        raise shards.UserError(f"{folder} holds no training images of {SIZE} px; data/openmoji.py says how to make them")
    return torch.stack(images)


def new_network() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(embedding_size=24, hidden_sizes=[32, 64, 96], depths=[1, 1, 1], layer_type="basic",
                                    image_size=SIZE))


def embed(network, images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> (N, D) of length 1."""
    pixels = preprocess(images, SIZE, "inception").to(memory_format=torch.channels_last)
    return F.normalize(network(pixel_values=pixels).pooler_output.flatten(1), dim=1)


@torch.no_grad()
def found(network, images: torch.Tensor, strength: float) -> float:
    """The share of pictures whose damaged copy is nearest to themselves."""
    network.eval()
    copies = damage(images, torch.Generator().manual_seed(1), strength)
    nearest = (embed(network, copies) @ embed(network, images).T).argmax(1)
    return (nearest == torch.arange(len(images))).double().mean().item()


def train(folder: Path, out: Path, steps: int, seed: int):
    torch.manual_seed(seed)
    rng, start = torch.Generator().manual_seed(seed), time.perf_counter()
    images, task = training_images(folder), ShardTask([str(folder)], SIZE, None)
    real = torch.stack(task.real(range(task.n)))
    network = new_network().to(memory_format=torch.channels_last)
    network.config.held_out = task.sets[0][0]["hashes"]
    head = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64))  # left out afterwards, as in SimCLR
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "train.log").open("w")

    def say(line):
        print(line, flush=True)
        print(line, file=log, flush=True)

    say(json.dumps({"steps": steps, "seed": seed, "batch": BATCH, "lr": LR, "optimizer": "AdamW", "weight_decay": 0.02,
                    "temperature": TEMPERATURE, "schedule": "warm-up over 5 %, then linear to 0", "size": SIZE,
                    "images": len(images), "held_out": len(real), "held_out_sha256": network.config.held_out,
                    "parameters": sum(p.numel() for p in network.parameters()), "torch": torch.__version__,
                    "threads": torch.get_num_threads()}))
    say(f"untrained, damaged held-out pictures that find themselves: {found(network, real, 0.5):.1%}")
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.98), weight_decay=0.02)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / (0.05 * steps), (1 - step / steps) / 0.95)
        rows = torch.randperm(len(images), generator=rng)[:BATCH]
        network.train()
        views = torch.cat([damage(images[rows], rng), damage(images[rows], rng)])
        pixels = preprocess(views, SIZE, "inception").to(memory_format=torch.channels_last)
        z = F.normalize(head(network(pixel_values=pixels).pooler_output.flatten(1)), dim=1)
        alike = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(alike, torch.arange(len(z)).roll(len(rows)))  # row i's other copy
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            say(f"step {step + 1}/{steps} loss {sum(losses) / len(losses):.4f} "
                f"seconds {time.perf_counter() - start:.0f}")
            losses = []
    network.eval().save_pretrained(out)
    say("damaged held-out pictures that find themselves: "
        + ", ".join(f"{found(network, real, strength):.1%} at {strength} of training's damage" for strength in (0.5, 1)))
    log.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("shards/openmoji"), help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=2000, help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=NETWORKS / "emoji", help="[data/networks/emoji]")
    args = parser.parse_args()
    train(args.data, args.out, args.steps, args.seed)


if __name__ == "__main__":
    main()
