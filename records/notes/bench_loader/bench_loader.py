# Needs the tree of commit 58b37c5 (git worktree add ../then 58b37c5), where it lay in records/; kept as it ran.
"""How fast is the loader? Images/s of latents + stored text from disk, next to what the model eats.

    python records/bench_loader.py                        # 2,000 samples of 256 px: about 1.4 GB in a temporary folder
    python records/bench_loader.py --folder SCRATCH --samples 20000 --out bench_loader.json

Shards of the real shapes with random content (T5Gemma: 2304 wide, 80 to 220 tokens; 16-channel latents of 256 px) are
read through ShardData and host_batches exactly as training does, pinning left out where there is no CUDA: page cache
dropped before the cold rows, one rank's batch of 128. Beside each row stand the images/s that one H200 needs at the
60 % MFU of the goals; the JPEG rows say what decoding images costs.
"""

import argparse
import dataclasses
import io
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_prx as T  # noqa: E402
from data.shards import ShardData  # noqa: E402

SHARD = 500  # samples


def write(folder: Path, kind: str, samples: int):
    """A folder in format 2 of `kind`: latent (with text) or jpeg (256 px, captions)."""
    rng, shards = np.random.default_rng(0), []
    for start in range(0, samples, SHARD):
        n = min(SHARD, samples - start)
        tensors = {"hash": torch.randint(0, 256, (n, 16), dtype=torch.uint8),
                   "caption.long": torch.zeros(n, dtype=torch.uint8), "caption.long.offset": torch.arange(n + 1)}
        if kind == "latent":
            lengths = rng.integers(80, 221, n)
            tensors["latent"] = torch.randn(n, 16, 32, 32).bfloat16()
            tensors["text.long"] = torch.randn(int(lengths.sum()), 2304).bfloat16()
            tensors["text.long.offset"] = torch.tensor([0, *np.cumsum(lengths)])
        else:
            files = []
            for _ in range(n):  # smooth colour fields with some noise: about 45 KB, as photographs of this size
                y, x = np.mgrid[:256, :256] / rng.uniform(5, 40)
                field = np.stack([np.sin(x + c) * np.cos(y * c) for c in rng.uniform(0, 3, 3)], -1) * 80 + 128
                image = Image.fromarray((field + rng.normal(0, 9, field.shape)).clip(0, 255).astype(np.uint8))
                image.save(file := io.BytesIO(), "JPEG", quality=95, subsampling=0)
                files.append(file.getvalue())
            tensors["jpeg"] = torch.from_numpy(np.frombuffer(b"".join(files), np.uint8).copy())
            tensors["jpeg.offset"] = torch.tensor([0, *np.cumsum([len(f) for f in files])])
        path = folder / f"train-{start // SHARD:05d}.safetensors"
        save_file(tensors, path)
        shards.append(dict(file=path.name, split="train", count=n, resolution=256, height=256, width=256, sha256="",
                           skip=[]))
    latent = dict(vae="repa-e", type="AutoencoderKL", channels=16, factor=8, scale=1.0, shift=0.0, sha256="")
    text = dict(text="t5gemma", width=2304, max_tokens=256)
    if kind == "latent":
        save_file({"text": torch.randn(2, 2304).bfloat16()}, folder / "empty.safetensors")
    index = dict(format=2, captions=["long"], image=None if kind == "latent" else "jpeg", shards=shards,
                 latent=latent if kind == "latent" else None, text=text if kind == "latent" else None)
    (folder / "index.json").write_text(json.dumps(index))


def drop_cache(folder: Path):
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def images_per_s(folder: Path, threads: int, cold: bool, batch: int, samples: int) -> float:
    config = dataclasses.replace(T.Config(), data=str(folder), batch=batch, loader_threads=threads)
    data = ShardData(config)
    data.threads = threads
    if cold:
        drop_cache(folder)
    batches = T.host_batches(data, config, 0, 0, slice(0, batch))
    start, n = time.perf_counter(), samples // batch
    for _ in range(n):
        next(batches)
    return n * batch / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the shards are written [a temporary folder]")
    parser.add_argument("--samples", type=int, default=2000, help="[%(default)s]")
    parser.add_argument("--batch", type=int, default=128, help="of one rank [%(default)s]")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    model = dict(hidden_size=1792, in_channels=16, patch_size=2, mlp_ratio=3.5, depth=16, context_in_dim=2304)
    need = 0.6 * T.PEAK_FLOPS / (3 * T.flops_per_image(model, 256, 192))
    top = Path(tempfile.mkdtemp(dir=args.folder))
    rows = []
    try:
        for kind in ("latent", "jpeg"):
            (top / kind).mkdir()
            write(top / kind, kind, args.samples)
            size = sum(p.stat().st_size for p in (top / kind).iterdir()) / args.samples
            for cold in (True, False):
                for threads in (1, 2, 4):
                    rates = [images_per_s(top / kind, threads, cold, args.batch, args.samples) for _ in range(3)]
                    rows.append(dict(kind=kind, cold=cold, threads=threads, bytes_per_image=size,
                                     images_per_s=float(np.median(rates)), all=rates))
                    rate = np.median(rates)
                    print(f"{kind:7s} {'cold' if cold else 'warm'}  {threads} thread(s)  {rate:8,.0f} images/s "
                          f"({min(rates):,.0f} to {max(rates):,.0f})  {rate * size / 1e9:5.2f} GB/s  "
                          f"{rate / need:5.1f} x one GPU's need", flush=True)
    finally:
        shutil.rmtree(top)
    print(f"one H200 at 60 % MFU of {T.PEAK_FLOPS / 1e12:.0f} TFLOP/s needs {need:,.0f} images/s (derived), eight "
          f"{8 * need:,.0f}: {8 * need * rows[0]['bytes_per_image'] / 1e9:.1f} GB/s of latents and text")
    if args.out:
        machine = T.describe_machine(T.World())
        args.out.write_text(json.dumps(dict(machine=machine, need_per_gpu=need, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
