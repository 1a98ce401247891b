"""Pictures of a run: sample grids and the loss curve."""

import math
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data.preflight import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def save_grid(images: torch.Tensor, prompts: list[str], path: Path, columns: int = 4):
    """Images uint8 (N, 3, H, W) as a PNG, the prompts printed underneath; small images are enlarged, pixels kept."""
    font = ImageFont.load_default(size=11)
    zoom = max(1, 192 // images.shape[-1])
    side_x, side_y = images.shape[-1] * zoom, images.shape[-2] * zoom
    lines = [textwrap.wrap(p, max(10, side_x // 6))[:8] for p in prompts]
    text_height, gap = 13 * max(len(x) for x in lines) + 4, 8
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (side_x + gap) + gap, rows * (side_y + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images.cpu(), lines)):
        x, y = gap + i % columns * (side_x + gap), gap + i // columns * (side_y + text_height + gap)
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side_x, side_y), Image.NEAREST), (x, y))
        draw.text((x, y + side_y + 2), "\n".join(text), fill="black", font=font, spacing=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def plot_curve(run: Path):
    """curve.png: the loss over the run, raw and smoothed."""
    losses = {record["step"] - len(record["losses"]) + i: loss for record in read_metrics(run)
              for i, loss in enumerate(record.get("losses", [])) if loss is not None}
    steps = sorted(losses)
    values = np.array([losses[s] for s in steps])
    window = max(1, len(values) // 50)
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(steps, values, lw=0.4, alpha=0.4)
    if len(values) > window:
        axes.plot(steps[window - 1:], np.convolve(values, np.ones(window) / window, "valid"), lw=1.5)
    axes.set(xlabel="step", ylabel="loss (velocity MSE)", yscale="log", title=run.name)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(run / "curve.png", dpi=110)
    plt.close(figure)
