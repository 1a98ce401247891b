"""Train the small network that REPA takes as its teacher where DINOv3 cannot be downloaded, on scenes.

    python data/networks/train_teacher.py                        # about 10 minutes on one core
    python data/networks/train_teacher.py --steps 300 --out teacher

It goes to data/networks/teacher/ in Hugging Face format: a DINOv3ViTModel of 1 MB for images of 32 x 32 pixels,
normalised with ImageNet's mean and standard deviation. Its patch tokens say what is where:

    tokens = net(pixel_values=pixels).last_hidden_state[:, 1 + net.config.num_register_tokens:]      # (B, 16, 80)

They lie row by row, 4 x 4. train.log has the configuration, the losses and the linear probe.

The objective needs no labels and no captions: half of the patches are hidden behind the mask token, and a small head,
which is thrown away, reads the pixels of all patches from the tokens (SimMIM, arXiv:2111.09886). To fill in the hidden
quarter of an object, the network must find out from the rest which object it is. Patches that it sees count 0.2 in the
loss: nothing else trains the tokens of what is seen, and REPA sees whole images. With weight 0 the probe read 0.75 of
the shapes instead of 0.79 (2400 steps, one seed). Nothing is shared with the networks of train_features.py, by which
runs are judged: other family, resolution, objective and weights. Images are not flipped, cropped or recoloured: place
and colour are what the tokens have to tell. Only micro scenes of the split `train` are seen.
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

SIZE, PATCH = 32, 8                          # pixels per side of an image and of a patch
GRID = SIZE // PATCH                         # 4 x 4 patches; a place of a micro scene is 2 x 2 of them
RECIPE = {"steps": 8000, "batch": 64, "lr": 4e-3, "weight_decay": 0.02, "warmup": 0.05, "masked": 0.5, "visible": 0.2}
CLASSES = {"shape": len(scenes.SHAPES), "colour": len(scenes.COLOURS), "size": len(scenes.SIZES), "presence": 2,
           "background": len(scenes.BACKGROUNDS) * len(scenes.PATTERNS)}


def make_pixels(drawn) -> torch.Tensor:
    """N scenes -> FP32 (N, 3, SIZE, SIZE), normalised as for DINOv2 and DINOv3."""
    return preprocess(scenes.render(drawn, SIZE), SIZE, "dino")


def patch_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, patches, 3 * PATCH * PATCH), the patches row by row."""
    return F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)


def patch_tokens(net, pixels: torch.Tensor, masked=None) -> torch.Tensor:
    """(B, 3, H, W) -> (B, patches, D): the last hidden state after the class and register tokens.

    Patches where `masked`, bool (B, patches), is true are hidden from the network.
    """
    return net(pixel_values=pixels, bool_masked_pos=masked).last_hidden_state[:, 1 + net.config.num_register_tokens:]


def make_network():
    """The teacher with random weights from torch's generator: 250 thousand parameters."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(
        image_size=SIZE, patch_size=PATCH, hidden_size=80, intermediate_size=200, num_hidden_layers=4,
        num_attention_heads=4, num_register_tokens=2, layerscale_value=1.0, pos_embed_rescale=None))


# ---------------------------------------------------------------------------------------------------------------------
# The probe: what a linear map reads from a single patch about the place that it lies in
# ---------------------------------------------------------------------------------------------------------------------

def patch_labels(drawn) -> dict[str, torch.Tensor]:
    """What each patch shows, int64 (N, patches) per key of CLASSES: of the object in its place (-1: none), of all."""
    place, cells = torch.from_numpy(drawn.place), drawn.difficulty.grid ** 2
    at = place.where(place >= 0, cells)  # what is absent goes to an extra cell, which is cut off
    labels = {key: torch.full((len(place), cells + 1), -1).scatter(1, at, torch.from_numpy(getattr(drawn, key)))[:, :-1]
              for key in ("shape", "colour", "size")}
    labels["presence"] = (labels["shape"] >= 0).long()
    row, column = torch.arange(GRID ** 2) // GRID, torch.arange(GRID ** 2) % GRID
    cell = row * drawn.difficulty.grid // GRID * drawn.difficulty.grid + column * drawn.difficulty.grid // GRID
    labels = {key: value[:, cell] for key, value in labels.items()}
    return labels | {"background": torch.from_numpy(drawn.background)[:, None].expand(-1, GRID ** 2)}


@torch.no_grad()
def probe(features, n_train: int = 4000, n_test: int = 1000) -> dict[str, float]:
    """Accuracy of a linear probe (ridge regression to one-hot): fit on split `train`, tested on `eval`, micro scenes.

    features: function of pixels (B, 3, SIZE, SIZE) -> (B, patches, D). Each of the four corners of a place has a probe
    of its own, so that raw pixels need not find out which part of the object they show.
    """
    x, labels = {}, {}
    for split, n in (("train", n_train), ("eval", n_test)):
        drawn = scenes.draw_scenes(range(50_000_000, 50_000_000 + n), split)  # training is far from these indices
        x[split] = torch.cat([features(part) for part in make_pixels(drawn).split(500)]).double()
        labels[split] = patch_labels(drawn)
    row, column = torch.arange(GRID ** 2) // GRID, torch.arange(GRID ** 2) % GRID
    right = {key: [] for key in CLASSES}
    for corner in range(4):
        here = (row % 2 * 2 + column % 2) == corner
        fitted, tested = (x[split][:, here].flatten(0, 1) for split in ("train", "eval"))               # (N * 4, D)
        mean, std = fitted.mean(0), fitted.std(0).clamp(min=1e-6)
        fitted, tested = (F.pad((part - mean) / std, (0, 1), value=1.0) for part in (fitted, tested))
        for key, classes in CLASSES.items():
            label, truth = (labels[split][key][:, here].flatten() for split in ("train", "eval"))
            a, b = fitted[label >= 0], F.one_hot(label[label >= 0], classes).double()
            weights = torch.linalg.solve(a.T @ a + 1e-2 * len(a) * torch.eye(a.shape[1]), a.T @ b)
            right[key].append(((tested[truth >= 0] @ weights).argmax(1) == truth[truth >= 0]).double())
    return {key: round(torch.cat(values).mean().item(), 4) for key, values in right.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def train(steps: int, seed: int, folder: Path):
    """Train the teacher and save it, with its log, into `folder`."""
    torch.manual_seed(seed)
    net = make_network()
    head = nn.Sequential(nn.Linear(net.config.hidden_size, 256), nn.GELU(), nn.Linear(256, 3 * PATCH * PATCH))
    parameters = [*net.parameters(), *head.parameters()]
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "train.log").open("w")

    def say(line):
        print(line, flush=True)
        print(line, file=log, flush=True)

    start, start_cpu = time.perf_counter(), time.process_time()
    say(json.dumps({"network": "teacher", **RECIPE, "steps": steps, "seed": seed, "optimizer": "AdamW",
                    "betas": [0.9, 0.98], "schedule": "linear warm-up, linear to 0", "size": SIZE,
                    "torch": torch.__version__, "threads": torch.get_num_threads(),
                    "parameters": sum(p.numel() for p in net.parameters()), "scenes": scenes.MICRO.protocol}))
    probes = {"raw pixels": probe(patch_pixels), "untrained": probe(lambda pixels: patch_tokens(net.eval(), pixels))}
    optimizer = torch.optim.AdamW(parameters, lr=RECIPE["lr"], betas=(0.9, 0.98), weight_decay=RECIPE["weight_decay"])
    batch, losses = RECIPE["batch"], []
    net.train()
    for step in range(steps):
        pixels = make_pixels(scenes.draw_scenes(range(step * batch, (step + 1) * batch)))
        masked = torch.rand(batch, GRID ** 2).argsort(1) < RECIPE["masked"] * GRID ** 2                 # (B, patches)
        progress = step / steps
        for group in optimizer.param_groups:
            warm, cool = (progress + 1 / steps) / RECIPE["warmup"], (1 - progress) / (1 - RECIPE["warmup"])
            group["lr"] = RECIPE["lr"] * min(1, warm, cool)
        error = (head(patch_tokens(net, pixels, masked)) - patch_pixels(pixels)).square().mean(-1)     # (B, patches)
        loss = error[masked].mean() + RECIPE["visible"] * error[~masked].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            say(f"step {step + 1}/{steps} loss {sum(losses) / len(losses):.4f} seconds {seconds:.0f}")
            losses = []
    net.eval().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    for name, values in {"teacher": probe(lambda pixels: patch_tokens(net, pixels)), **probes}.items():
        say(f"linear probe of single patches, micro, eval split, {name}: {json.dumps(values)}")
    say(f"wall time {time.perf_counter() - start:.0f} s, processor time {time.process_time() - start_cpu:.0f} s, "
        "probes included")
    log.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=RECIPE["steps"], help="optimizer steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=NETWORKS / "teacher", help="folder that gets the network")
    args = parser.parse_args()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    train(args.steps, args.seed, args.out)


if __name__ == "__main__":
    main()
