"""How good are the pictures? FID, CMMD, DINO-MMD and, on scenes, exact prompt accuracy; and the model for others.

    python eval_prx.py logs/micro                              # a finished run: 2,000 scenes, or all held-out captions
    python eval_prx.py logs/micro --n 10000 --steps 25 --cfg 3.5 --precision bf16 --seed 1 --out results
    python eval_prx.py logs/micro --metrics fid,cmmd,dino-mmd,kid,precision,recall
    python eval_prx.py logs/micro --sweep cfg=1,2,3.5,5        # a curve; steps=4,8,16 or exports (over time) too
    python eval_prx.py --real photos --fake samples --save-stats photos.safetensors   # then --real photos.safetensors
    python eval_prx.py --real photos --fake samples --inception inception-2015-12-05.pt \\
        --clip openai/clip-vit-large-patch14-336 --dino facebook/dinov2-with-registers-large  # published networks
    python eval_prx.py sample logs/micro "one object: a big red ring in the top left. behind, plain navy." --n 8
    python eval_prx.py export logs/24h --out pipeline          # a folder for diffusers, with a model card

A run is painted by its own script, `RUN/train_prx.py --paint` (the request: records/README.md), in one process on a
CPU and one for each GPU; where that script is not this checkout's, --trust is asked for: it is code. A run on scenes is
judged on scenes that training never shows: n prompts of the split `eval`, and n / 4 of `unseen` (shape and colour pairs
that training never has). The reference is n other scenes of `eval`; the column `real` is a second such set: what
perfect samples would get. A run on other data paints the first n held-out captions by hash and is compared with their
images, or with --real. Each prompt has its own noise: ranks change nothing, and batches only the rounding of a pixel
now and then. Written: metrics.json (protocol, its hash, metrics, 95 % intervals, seconds), samples.png, curve.png. Two
results compare where their `protocol_sha256` is equal.
"""

import argparse
import functools
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import scenes
from data.shards import (HeldOut, UserError, data_folders, file_sha256, read_index, read_picture, save_grid,
                         shared_images, write_atomically, write_json)

ROOT = Path(__file__).resolve().parent
NETWORKS = ROOT / "data" / "networks"
BEFORE = "58b37c5"  # the last commit that judges runs without a script and a run.json
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")  # what data/shards.py reads
REFERENCE, SECOND = 10_000_000, 20_000_000  # where the two real sets begin in `eval`; prompts count from 0
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"  # inception-2015-12-05.pt
HUB = {"repa-e": "REPA-E/e2e-flux-vae", "flux": "black-forest-labs/FLUX.1-schnell",  # train_prx.py's short names
       "flux2": "black-forest-labs/FLUX.2-dev", "dc-ae": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
       "t5gemma": "google/t5gemma-2b-2b-ul2"}


class Failure(Exception):
    """What is no mistake of the user's: one sentence, exit code 1."""


# =====================================================================================================================
# Metrics: two sets of features in, one float out.
# =====================================================================================================================

def mean_and_covariance(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) -> (D,) and (D, D) in float64; the covariance divides by N - 1, as FID's code does."""
    x = x.double()
    mean = x.mean(0)
    centred = x - mean  # first: a large mean must not eat the digits
    return mean, centred.T @ centred / (len(x) - 1)


def root(covariance: torch.Tensor) -> torch.Tensor:
    """A with A A^T = covariance (D, D)."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp(min=0).sqrt()


def fid(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Frechet distance of two Gaussians, in squared feature units (FID: Heusel et al. 2017, arXiv 1706.08500).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). With S1 = A A^T and S2 = B B^T the last trace is the sum of the
    singular values of A^T B: real, and stable where a covariance is singular (fewer samples than features).
    """
    m1, s1 = mean_and_covariance(real)
    m2, s2 = mean_and_covariance(fake)
    cross = torch.linalg.svdvals(root(s1).T @ root(s2)).sum()
    return ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


def fid_of_resamples(real: torch.Tensor, fake: torch.Tensor, counts: torch.Tensor) -> torch.Tensor | None:
    """FID (R,) of resamples of the fake features (M, D): counts (R, M). None where it would take minutes."""
    if fake.shape[1] > 512:
        return None
    m1, s1 = mean_and_covariance(real)
    x, half, out = fake.double(), root(s1), []
    for count in counts:
        mean = x[0] + count @ (x - x[0]) / count.sum()
        centred = (x - mean) * (count / (count.sum() - 1)).sqrt()[:, None]
        cross = torch.linalg.eigvalsh(half.T @ (centred.T @ centred) @ half).clamp(min=0).sqrt().sum()
        out.append((m1 - mean).square().sum() + s1.trace() + centred.square().sum() - 2 * cross)
    return torch.stack(out)


def mean_of_pairs(kernel, x: torch.Tensor, y: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """(N,): for each x the mean of kernel(x, y) over all y, `chunk` rows at a time: memory is chunk * len(y)."""
    return torch.cat([kernel(part, y).mean(1) for part in x.split(chunk)])


def mmd_of_resamples(real: torch.Tensor, fake: torch.Tensor, counts: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """`mmd` (R,) of resamples of the fake features (M, D): counts (R, M)."""
    def kernel(a, b):  # minus one: the ones cancel, and sigma 10 puts every k on the unit sphere close to 1
        return 1000 * torch.expm1((a @ b.T - 1).clamp(max=0) / 10 ** 2)

    x, y = (F.normalize(features.double(), dim=1) for features in (real, fake))
    weights = counts.double() / counts.sum(1, keepdim=True)
    out = mean_of_pairs(kernel, x, x, chunk).mean() - 2 * weights @ mean_of_pairs(kernel, y, x, chunk)
    for part, w in zip(y.split(chunk), weights.split(chunk, 1)):
        out = out + ((w @ kernel(part, y)) * weights).sum(1)
    return out


def mmd(real: torch.Tensor, fake: torch.Tensor, chunk: int = 1024) -> float:
    """Squared maximum mean discrepancy of features (N, D) and (M, D), L2-normalised here, under an RBF kernel.

    1000 * (E k(x, x') + E k(y, y') - 2 E k(x, y)), k = exp(-|x - y|^2 / (2 * 10^2)): the biased estimator, over all
    pairs with the diagonals, as in CMMD (Jayasumana et al. 2024, arXiv 2401.09603). float64.
    """
    return mmd_of_resamples(real, fake, torch.ones(1, len(fake)), chunk).item()


def kid(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Kernel inception distance, 1000 times the unbiased squared MMD under the kernel (a b / D + 1)^3 (Binkowski et al.
    2018, arXiv 1801.01401), over all pairs in place of the mean of subsets. May be below 0. float64."""
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(x):  # without the diagonal
        diagonal = (x.square().mean(1) + 1) ** 3
        return ((len(x) * mean_of_pairs(kernel, x, x) - diagonal) / (len(x) - 1)).mean()

    x, y = real.double(), fake.double()
    return 1000 * (within(x) + within(y) - 2 * mean_of_pairs(kernel, x, y).mean()).item()


def covered(points: torch.Tensor, centres: torch.Tensor, k: int = 3) -> float:
    """The share of points (N, D) in a ball around one of the centres (M, D), each reaching to its k-th neighbour.

    Precision is that of fake points in real balls, recall the reverse (Kynkaanniemi et al. 2019, arXiv 1904.06991, with
    VGG-16's features in place of the network's here).
    """
    points, centres = points.double(), centres.double()
    k = min(k + 1, len(centres))  # the nearest is the centre itself
    radii = torch.cat([torch.cdist(part, centres).kthvalue(k, 1).values for part in centres.split(1024)])
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(1024)]
    return torch.cat(inside).double().mean().item()


class Metric(NamedTuple):
    network: str                        # inception, clip or dino
    value: Callable                     # features (real (N, D), fake (M, D)) -> float
    resampled: Callable | None = None   # for its interval: (real, fake, counts (R, M)) -> (R,) or None


METRICS = {"fid": Metric("inception", fid, fid_of_resamples),
           "cmmd": Metric("clip", mmd, mmd_of_resamples),
           "dino_mmd": Metric("dino", mmd, mmd_of_resamples),
           "kid": Metric("inception", kid),
           "precision": Metric("inception", lambda real, fake: covered(fake, real)),
           "recall": Metric("inception", covered)}
DEFAULT_METRICS = ("fid", "cmmd", "dino_mmd")


def resample(n: int, resamples: int = 100) -> torch.Tensor:
    """(resamples, n) float64: how often each of n samples is in each bootstrap resample. Always the same draws."""
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(n))
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())


def interval(value: float, resampled: torch.Tensor) -> list[float]:
    """95 % around `value`, from the metric of each resample (R,). The resamples are centred on the value, as drawing
    again from a sample adds the small-sample bias of FID and the MMDs a second time."""
    low, high = (resampled - resampled.mean()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [value + low, value + high]


# =====================================================================================================================
# Feature networks: the small ones of this repository and the published ones load alike.
# =====================================================================================================================

MEAN_STD = {"inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1, 1]
            "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
            "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
            "inception-2015": ((128 / 255,) * 3, (128 / 255,) * 3)}  # (x - 128) / 128


def preprocess(images, size: int, kind: str) -> torch.Tensor:
    """uint8 images, (N, 3, H, W) or a list of (3, H, W) -> FP32 (N, 3, size, size), normalised as `kind` expects.

    The shorter edge becomes `size`, antialiased bicubic, and the longer one is cropped around its centre: what the
    image processors of transformers do. uint8 and on CPU, where torch's bicubic gives Pillow's numbers. Only
    `inception-2015` squeezes the whole image into the square without rounding, as clean-fid (arXiv 2104.11222).
    """
    if not isinstance(images, torch.Tensor):
        if len({x.shape for x in images}) > 1:
            return torch.cat([preprocess(x[None], size, kind) for x in images])
        images = torch.stack(list(images))
    if images.dtype != torch.uint8:  # the range of floats would be a guess, and a wrong one inverts or wraps the image
        raise TypeError(f"images must be uint8 in 0..255, not {images.dtype}")
    x = images.cpu()
    h, w = x.shape[-2:]
    if (h, w) == (size, size):
        pass
    elif kind == "inception-2015":
        x = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    else:
        height, width = (size, size * w // h) if h <= w else (size * h // w, size)
        if max(height, width) > 20 * size:
            raise UserError(f"a picture of {w}x{h} pixels is longer than 20:1; remove it")
        top, left = (height - size) // 2, (width - size) // 2
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
        x = x[:, :, top:top + size, left:left + size]
    mean, std = (torch.tensor(v)[:, None, None] for v in MEAN_STD[kind])
    return (x.float() / 255 - mean) / std


def sha256_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Over names and values, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Features:
    """A network that turns images into features: `inception` (pooled), `clip` (projected) or `dino` (global feature).

    `source`: a folder or a repository on the Hugging Face hub with a ResNet, CLIP, DINOv2-with-registers or DINOv3
    model, whose config's `image_size` is the input size; or, for `inception`, NVIDIA's TorchScript file of the network
    that FID is defined with (2015-12-05), which is loaded only when its checksum is the known one: TorchScript is code.
    Called with images as `preprocess` takes them: FP32 (N, D), on CPU.
    """

    def __init__(self, kind: str, source=None, device="cpu"):
        self.kind, self.device, self.source = kind, device, str(source or NETWORKS / kind)
        if kind == "inception" and self.source.endswith(".pt"):
            self.load_inception_2015()
            return
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.inputs = kind
        loader = transformers.CLIPVisionModelWithProjection if kind == "clip" else transformers.AutoModel
        try:
            self.model, report = loader.from_pretrained(self.source, dtype=torch.float32, output_loading_info=True,
                                                        use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--{kind} {self.source} cannot be loaded ({first_line(error)}); --{kind} none goes without"
                            ) from None
        self.size = getattr(self.model.config, "image_size", None)
        if report["missing_keys"] or not isinstance(self.size, int):  # what is missing would be drawn at random
            lacks = min(report["missing_keys"], default="image_size in its config.json")
            raise UserError(f"--{kind} {self.source} is not such a network: it lacks {lacks}")
        self.model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.sha256 = sha256_tensors(self.model.state_dict())

    def load_inception_2015(self):
        data = Path(self.source).read_bytes()
        self.inputs, self.size = "inception-2015", 299
        self.sha256 = hashlib.sha256(data).hexdigest()
        if self.sha256 != INCEPTION_SHA256:
            raise UserError(f"--inception {self.source} is not loaded: its sha256 is not {INCEPTION_SHA256}, NVIDIA's")
        script = torch.jit.load(io.BytesIO(data), map_location=self.device).eval()
        self.model = lambda pixel_values: script.layers(pixel_values).flatten(1)  # its own resize is left out

    @torch.inference_mode()
    def __call__(self, images, batch: int = 250) -> torch.Tensor:
        out = []
        for i in range(0, len(images), batch):
            x = preprocess(images[i:i + batch], self.size, self.inputs)
            x = x.to(self.device, memory_format=torch.channels_last)
            with torch.backends.cudnn.flags(allow_tf32=False):
                y = self.model(pixel_values=x)
            if self.kind == "clip":
                y = y.image_embeds
            elif self.inputs != "inception-2015":
                y = y.pooler_output
            out.append(y.flatten(1).float().cpu())
        return torch.cat(out)

    def describe(self) -> dict:
        """For the protocol: source, input size, resize, and sha256 of the weights."""
        source = Path(self.source)
        source = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else self.source
        return {"source": source, "size": self.size, "resize": "bicubic", "sha256": self.sha256}


# =====================================================================================================================
# Sets of images as features by kind of network: computed, kept in files, compared.
# =====================================================================================================================

def features_of(batches, networks: dict[str, Features]) -> dict[str, torch.Tensor]:
    """FP32 (N, D) by kind of network, of batches of images."""
    rows = {kind: [] for kind in networks}
    for images in batches:
        for kind, network in networks.items():
            rows[kind].append(network(images))
    return {kind: torch.cat(parts) for kind, parts in rows.items()}


def about_set(images: dict, networks: dict[str, Features]) -> dict:
    """What decides the statistics of a set: which images, and what looks at them."""
    looks = {kind: network.describe() | {"source": None} for kind, network in networks.items()}
    return {"images": images, "networks": looks}


def sha256_json(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def save_statistics(path: Path, features: dict[str, torch.Tensor], about: dict):
    state = {kind: x.contiguous() for kind, x in features.items()}
    about = {"about": json.dumps(about), "sha256": sha256_tensors(state)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: save_file(state, part, about))


def load_statistics(path: Path, networks: dict[str, Features]) -> tuple[dict[str, torch.Tensor], dict]:
    """Features by kind of network from a file of save_statistics, and what it says about its images."""
    try:
        with safe_open(path, "pt") as file:
            about, digest = json.loads(file.metadata()["about"]), file.metadata()["sha256"]
            features = {key: file.get_tensor(key) for key in file.keys()}
        if sha256_tensors(features) != digest:
            raise ValueError("its sha256 differs")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no statistics ({first_line(error)}); make them with --save-stats") from None
    for kind, look in about_set({}, networks)["networks"].items():
        if about["networks"].get(kind) != look:
            raise UserError(f"{path} was made with {kind} {about['networks'].get(kind, 'none')}, now it is {look}; "
                            f"give the same network, or --{kind} none")
    return {kind: features[kind] for kind in networks}, about["images"]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prx"


def real_set(images: dict, batches: list, load, networks: dict[str, Features]) -> dict[str, torch.Tensor]:
    """Features of real images load(batch), or of the cache, by a hash of their content and of the networks."""
    if not networks:
        return {}
    about = about_set(images, networks)
    path = cache_folder() / f"{sha256_json(about)}.safetensors"
    if path.exists():
        try:
            return load_statistics(path, networks)[0]
        except UserError as error:
            print(f"the cache is passed over and made again: {error}")
    features = features_of(map(load, batches), networks)
    try:
        save_statistics(path, features, about)
    except OSError as error:
        print(f"the reference is not cached in {path.parent} ({error})")
    return features


def compare(real: dict, fake: dict, metrics=DEFAULT_METRICS, intervals: bool = True) -> dict:
    """`metrics` of two sets of features, as far as there are networks for them, bootstrap `intervals` over the fake
    samples (the reference is given), `notes`, and `failed`: sentences for what could not be computed."""
    out = {"metrics": {}, "intervals": {}, "notes": [], "failed": []}
    for name in metrics:
        metric = METRICS[name]
        if metric.network not in real:
            continue
        x, y = real[metric.network], fake[metric.network]
        few, dimensions = min(len(x), len(y)), x.shape[1]
        try:
            if few < 2:
                raise RuntimeError(f"it needs at least 2 images in each set; there are {len(x)} and {len(y)}")
            out["metrics"][name] = value = metric.value(x, y)
            resampled = metric.resampled(x, y, resample(len(y))) if intervals and metric.resampled else None
            if resampled is not None:
                out["intervals"][name] = interval(value, resampled)
        except RuntimeError as error:  # LinAlgError and OutOfMemoryError are such
            out["failed"].append(f"{name} failed: {first_line(error)}")
        if name == "fid" and few <= dimensions:
            out["notes"].append(f"FID: {few} images do not determine a covariance of {dimensions} features; take more "
                                "to compare with others")
    return out


def in_batches(items, batch: int) -> list:
    return [items[i:i + batch] for i in range(0, len(items), batch)]


def list_images(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted; at least two."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds images")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_TYPES and p.is_file())
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} image(s) ({', '.join(IMAGE_TYPES)}); at least 2 are needed")
    return files


def load_images(paths: list[Path]) -> list[torch.Tensor]:
    """uint8 (3, H, W) each. One that cannot be read ends the evaluation: without it, it is another set."""
    return [torch.from_numpy(np.array(read_picture(path))).permute(2, 0, 1) for path in paths]


def describe_images(files: list[Path]) -> dict:
    """Number of images, and sha256 over the files' contents in order."""
    digests = b"".join(bytes.fromhex(file_sha256(path)) for path in files)
    return {"n": len(files), "sha256": hashlib.sha256(digests).hexdigest()}


def evaluate_folders(args, networks: dict[str, Features]) -> dict:
    """The result of comparing the images of two folders; --real may be a file of statistics."""
    files, batch = list_images(args.fake), args.batch or 50
    reference, _, about = references_of(None, args.real, networks, batch)
    if args.save_stats:
        save_statistics(args.save_stats, reference, about_set(about["real"], networks))
        print(f"wrote {args.save_stats}; next time: --real {args.save_stats}")
    fake = features_of(map(load_images, in_batches(files, batch)), networks)
    compared = compare(reference, fake, args.metrics)
    protocol = about | {"fake": describe_images(files), "n": len(files), "weights": "images"}
    return {"protocol": protocol, "seconds": {}, "notes": compared["notes"], "failed": compared["failed"],
            "metrics": {"fake": compared["metrics"]}, "intervals": {"fake": compared["intervals"]}}


# =====================================================================================================================
# A finished run: what is known of it, its script at work, what it is asked to paint, what comes of it.
# =====================================================================================================================

def read_run(run: Path, trust: bool) -> dict:
    """run.json of a finished run, or of a pipeline that `export` made of one, and `script_sha256` of its script. Asks
    for `trust` where that script, which is about to be executed, is not this checkout's."""
    script = run / "train_prx.py"
    if not run.is_dir():
        raise UserError(f"{run} is not there; give the folder of a finished run, such as logs/micro")
    for path in (run / "run.json", script):
        if not path.is_file():
            raise UserError(f"{run} holds no {path.name}: give the folder of a finished run; an older one is judged by "
                            f"commit {BEFORE} (git worktree add ../before {BEFORE})")
    try:
        about = dict(json.loads((run / "run.json").read_text()))
        about["folders"] = [str(entry["folder"]) for entry in about["data"]]
        for key in "track seed resolution vae text pixels predict shift cfg_scale sample_steps".split():
            about[key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / 'run.json'} is damaged ({type(error).__name__} {error}); restore it") from None
    if not (run / "transformer").is_dir():
        raise UserError(f"{run} is not finished: it holds no transformer/, which training writes at its end")
    about["script_sha256"] = file_sha256(script)
    if not trust and about["script_sha256"] != file_sha256(ROOT / "train_prx.py"):
        raise UserError(f"{script} differs from this checkout's train_prx.py, and painting executes it: a script is "
                        "code and may do whatever you may; read it, then give --trust")
    return about


class Painting:
    """A run's own script at work on prompts: one process for each device, each with its share, in order.

    `request`: as in records/README.md, without prompts, seeds and device. A context manager: leaving it ends the
    processes and deletes what they wrote, which lies in `folder` meanwhile.
    """

    def __init__(self, run: Path, prompts: list, seeds: list, request: dict, devices: list, folder: Path):
        self.script, self.parent, self.processes, self.counts = run.resolve() / "train_prx.py", folder, [], []
        devices = devices[:len(prompts)]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=".painting-", dir=folder)).resolve()
        threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        for rank, device in enumerate(devices):
            part = slice(len(prompts) * rank // len(devices), len(prompts) * (rank + 1) // len(devices))
            own = {"format": 1, "prompts": prompts[part], "seeds": seeds[part], "device": device}
            asked, painted = self.folder / f"{rank}.json", self.folder / f"{rank}.safetensors"
            asked.write_text(json.dumps(own | request))
            self.counts.append(len(own["prompts"]))
            # -P: modules are not searched in the script's folder, so that nothing else of it is executed
            command = [sys.executable, "-P", self.script, "--paint", asked, "--out", painted]
            with open(self.folder / f"{rank}.log", "wb") as log:
                self.processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL,
                                                       stdout=subprocess.DEVNULL, stderr=log))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def images(self) -> list[torch.Tensor]:
        """Waits for the processes. uint8 (3, H, W) of each prompt, read from disk when they are used. UserError for
        what the script refuses, Failure where it fails."""
        while any(process.poll() is None for process in self.processes):
            self.check()
            if sys.stderr.isatty():
                print(f"\r{self.last_words(0)}", end="\033[K", file=sys.stderr, flush=True)
            time.sleep(0.05)
        self.check()
        images = []
        for rank, count in enumerate(self.counts):
            try:
                with safe_open(self.folder / f"{rank}.safetensors", "pt") as file:
                    part = file.get_tensor("images")
            except (OSError, SafetensorError) as error:
                raise Failure(f"{self.script} --paint wrote no images ({first_line(error)})") from None
            if part.dtype != torch.uint8 or part.ndim != 4 or part.shape[:2] != (count, 3):
                raise Failure(f"{self.script} --paint wrote {part.dtype} {tuple(part.shape)}, not {count} images")
            images += part.unbind()
        return images

    def last_words(self, rank: int) -> str:
        lines = (self.folder / f"{rank}.log").read_text(errors="replace").strip().split("\n")
        return lines[-1].strip()

    def check(self):
        for rank, process in enumerate(self.processes):
            code = process.poll()
            if code == 2:
                raise UserError(f"{self.script} --paint: {self.last_words(rank)}")
            if code:
                kept = shutil.copy(self.folder / f"{rank}.log", self.parent / "paint.log")
                raise Failure(f"{self.script} --paint failed with exit code {code} ({self.last_words(rank)}); all that "
                              f"it said is in {kept}; where memory ran out give a smaller --batch")


def painting_devices(args) -> list[str]:
    """The device of each painting process: `cuda` means all GPUs, one process each, unless --ranks says how many."""
    count = torch.cuda.device_count()
    devices = [f"cuda:{i}" for i in range(count)] if args.device == "cuda" else [args.device]
    return [devices[i % len(devices)] for i in range(args.ranks or len(devices))]


def request_of(about: dict, args) -> dict:
    """The painting request of the flags, without prompts, seeds and device. Images at a time: 50 fit a CPU's cache; a
    GPU gets the pixels of 64 images of 512 px, thus 16 of 1024 px (a guess, not measured)."""
    batch = 50 if args.device == "cpu" else max(1, min(250, 64 * 512 ** 2 // about["resolution"] ** 2))
    return {"steps": args.steps or about["sample_steps"], "batch": args.batch or batch, "precision": args.precision,
            "cfg_scale": about["cfg_scale"] if args.cfg is None else args.cfg}


class SceneTask:
    """What a run on scenes is asked to paint, and what it is compared with: n prompts of the split `eval`, n / 4 of
    `unseen`, and two sets of n other scenes."""

    usual = 2000  # of a record, as records/README.md has it

    def __init__(self, track: str, resolution: int, n: int):
        self.difficulty, self.resolution = scenes.difficulty_of(track), resolution
        self.n, self.counts = n, {"eval": n, "unseen": n // 4}
        about = {"scenes": self.difficulty.protocol, "split": "eval"}
        self.protocol, self.sets = about | {"n": n, "n_unseen": n // 4, "captions": "long"}, []
        for name, first in (("reference", REFERENCE), ("second", SECOND)):
            self.protocol[name] = [first, first + n]
            self.sets.append((about | {"range": [first, first + n], "resolution": resolution}, range(first, first + n)))

    def drawn(self, indices, split: str):
        return scenes.draw_scenes(indices, split, self.difficulty)

    def prompts(self, split: str) -> list[str]:
        return scenes.captions(self.drawn(range(self.counts[split]), split))

    def score(self, split: str, images) -> dict[str, torch.Tensor]:  # (N,) each
        return scenes.score(torch.stack(list(images)), self.drawn(range(len(images)), split))

    def real(self, indices) -> torch.Tensor:
        return scenes.render(self.drawn(indices, "eval"), self.resolution)


class ShardTask:
    """The same of a run on other data: the first n held-out captions by hash and, as the reference, their images; the
    next n images are the second set, where there are as many. n None: all of them, up to the usual number."""

    usual = 10_000

    def __init__(self, folders: list[str], resolution: int, n: int | None):
        self.held_out = held = HeldOut(folders, resolution)
        self.n = n or min(self.usual, len(held))
        self.counts, self.sets, data = {"eval": self.n}, [], ",".join(folders)
        if both := shared_images(folders):
            raise UserError(f"{both} images are in the training set and in the evaluation set of {data}; prepare them "
                            "with one --eval-share")
        if self.n > len(held):
            raise UserError(f"--n {n} is more than the {len(held)} held-out images of {data}; without it all are taken")
        for part in (range(self.n), range(self.n, 2 * self.n)):
            if held.stored and part.stop <= len(held):
                rows = [held.rows[i] for i in part]
                hashes = b"".join(tensors["hash"][row].numpy().tobytes() for tensors, row in rows)
                about = {"hashes": hashlib.sha256(hashes).hexdigest(), "n": self.n, "resolution": resolution}
                self.sets.append((about, part))
        self.protocol = {"data": data, "split": "eval", "n": self.n, "held_out": len(held), "captions": "long"}

    def prompts(self, split: str) -> list[str]:
        return [self.held_out.caption(i) for i in range(self.n)]

    def score(self, *_) -> dict:
        return {}

    def real(self, indices) -> list[torch.Tensor]:
        return [self.held_out.image(i) for i in indices]


def task_of(about: dict, data: str | None = None, n: int | None = None):
    """The task of a run, from its data folders or those of --data. Says how many images it takes."""
    folders = [folder for folder, _ in data_folders(data)] if data else about["folders"]
    try:
        parts = [] if data == "scenes" else [read_index(Path(folder)).get("scenes") for folder in folders]
    except UserError as error:
        raise UserError(f"{error}; or --data FOLDER, where it lies now, or --data scenes, those of its track") from None
    if all(parts):
        track = parts[-1]["track"] if parts else about["track"]
        task = SceneTask(track, about["resolution"], n or SceneTask.usual)
    else:
        task = ShardTask(folders, about["resolution"], n)
    if task.n != task.usual:
        all_of_them = "" if n else ", all that are held out"
        print(f"{task.n} prompts{all_of_them}: records have {task.usual}, and FID and MMD compare only at equal n")
    return task


def seeds_of(split: str, n: int, seed: int) -> list[int]:
    """The noise seeds of the first n prompts of a split: no two images share one. torch's generator takes their lower
    32 bits, enough for 200 values of --seed."""
    first = {"eval": 0, "unseen": 10_000_000}[split] + 20_000_000 * seed
    return list(range(first, first + n))


def references_of(task, real: Path | None, networks: dict[str, Features], batch: int) -> tuple[dict, dict, dict]:
    """Features of the real images, of a second set of them ({} if there is none), and what the protocol says of them:
    the task's own, or those of `real`, a folder or a file of statistics."""
    if real and real.is_file():
        features, about = load_statistics(real, networks)
    elif real:
        files = list_images(real)
        about = describe_images(files)
        features = real_set(about, in_batches(files, batch), load_images, networks)
    if real:
        return features, {}, {"real": about, "reference_sha256": about["sha256"]}
    sets = [real_set(about, in_batches(part, batch), task.real, networks) for about, part in task.sets]
    first, second = (sets + [{}, {}])[:2]
    return first, second, {"reference_sha256": sha256_json(task.sets[0][0]) if task.sets else None}


def judge(task, images, references, networks: dict[str, Features], metrics, out: Path) -> dict:
    """The result for images (N, 3, H, W), or a list of (3, H, W), that were painted for the prompts of the task, split
    after split; writes samples.png and, of scenes, scores.json (of every prompt) into the folder `out`."""
    digest, first, found, bounds, scores = hashlib.sha256(), 0, {}, {}, {}
    real, second, about = references
    for split, count in task.counts.items():
        prompts, painted = task.prompts(split), images[first:first + count]
        digest.update("".join(prompt + "\n" for prompt in prompts).encode())
        first += count
        found[split], bounds[split] = {}, {}
        for key, values in task.score(split, painted).items():
            scores.setdefault(split, {})[key] = [round(value, 6) for value in values.tolist()]
            found[split][key] = values.mean().item()
            bounds[split][key] = interval(found[split][key], resample(count) / count @ values)
        if split == "eval":
            save_grid(torch.stack(list(painted[:32])), prompts[:32], out / "samples.png", columns=8)
    if scores:
        write_json(out / "scores.json", scores)
    fake = features_of(in_batches(images[:task.n], 250), networks)
    compared = compare(real, fake, metrics)
    found["eval"] |= compared["metrics"]
    bounds["eval"] |= compared["intervals"]
    if second:
        found["real"] = compare(real, second, metrics, intervals=False)["metrics"]
    protocol = task.protocol | about | {"prompts_sha256": digest.hexdigest()}
    return {"protocol": protocol, "metrics": found, "intervals": bounds, "notes": compared["notes"],
            "failed": compared["failed"]}


# =====================================================================================================================
# What is shown: a table, the protocol's hash, curves, samples.
# =====================================================================================================================

def table(result: dict) -> str:
    """A row for each metric, a column for each set of images, the first with half of its 95 % interval; accuracies in
    per cent, distances with the digits that the interval leaves meaning."""
    columns, protocol = result["metrics"], result["protocol"]
    first = next(iter(columns), "")
    bounds = result.get("intervals", {}).get(first, {})
    lines = [" " * 12 + "".join(f"{column:>10}" + ("     ±95 %" if column == first else "") for column in columns)]
    for key in dict.fromkeys(key for values in columns.values() for key in values):
        cell = "{:10.2%}"
        half = (bounds[key][1] - bounds[key][0]) / 2 if key in bounds else None
        if key in METRICS:
            cell = f"{{:10.{decimals(half, protocol.get('n', 0))}f}}"
        line = f"{key:<12}"
        for column, values in columns.items():
            line += cell.format(values[key]) if key in values else " " * 10
            if column == first:
                line += cell.format(half) if half is not None else " " * 10
        lines.append(line.rstrip())
    networks = [network["source"] for network in protocol.get("features", {}).values()]
    if "scenes" not in protocol and any(source.startswith("data/networks") for source in networks):
        lines.append("by small networks trained on scenes: no measure of photographs; for these give --inception "
                     "inception-2015-12-05.pt (NVIDIA's, of stylegan3) and, from the Hugging Face hub, --clip openai/"
                     "clip-vit-large-patch14-336 --dino facebook/dinov2-with-registers-large")
    return "\n".join(lines)


def decimals(half: float | None, n: int) -> int:
    """Digits after the point that mean something: two of the half interval; without one, few for few images."""
    if not half or not math.isfinite(half):
        return 3 if n >= 2000 else 1
    return min(4, max(0, 1 - math.floor(math.log10(half))))


HASHED = ("n", "n_unseen", "prompts_sha256", "reference_sha256", "resolution", "steps", "cfg_scale", "precision")
ALWAYS = {"sampler": "euler", "guidance": "cfg", "weights": "ema"}  # once choices: older results still compare


def finish_result(result: dict, networks: dict[str, Features], device: str, start: float):
    """Adds networks, device, versions and the hash of what decides whether two results compare; prints them."""
    packages, protocol = ("torch", "transformers", "diffusers", "numpy", "pillow"), result["protocol"]
    protocol["features"] = {kind: network.describe() for kind, network in networks.items()}
    hashed = {key: protocol.get(key) for key in HASHED} | about_set({}, networks)
    result["protocol_sha256"] = sha256_json(ALWAYS | hashed)
    protocol |= {"device": device, "versions": {name: metadata.version(name) for name in packages}}
    result["seconds"]["total"] = time.perf_counter() - start
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())
    print("\n".join([*result["notes"], table(result), seconds]))


def draw(path: Path, panels: list[tuple[str, Callable]]):
    """A row of panels (title, function of its axes) as a PNG, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} is not drawn: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels) + 2, 4), squeeze=False)
    for axis, (title, plot) in zip(axes[0], panels):
        plot(axis)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_loss(run: Path, path: Path):
    """The loss of each step, from the run's metrics.jsonl."""
    log, steps, losses = run / "metrics.jsonl", [], []
    for line in log.read_text().splitlines() if log.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # a line that a crash cut short
            continue
        for i, loss in enumerate(reversed(record.get("losses", []))):
            steps.append(record["step"] - i)
            losses.append(math.nan if loss is None else loss)

    def plot(axis):
        axis.semilogy(steps, losses, ".", ms=2)
        axis.set(xlabel="step", ylabel="loss")

    if losses:
        draw(path, [(run.resolve().name, plot)])


def draw_sweep(rows: list[dict], axis_name: str, path: Path):
    def plot(name, axis):
        y = np.array([row["metrics"]["eval"][name] for row in rows])
        bounds = np.array([row["intervals"]["eval"].get(name, (v, v)) for row, v in zip(rows, y)])
        axis.errorbar([row[axis_name] for row in rows], y, np.abs(bounds.T - y), marker="o", capsize=3)
        axis.set_xlabel(axis_name)

    names = [key for key in ("accuracy", *METRICS) if key in rows[0]["metrics"]["eval"]]
    draw(path, [(name, functools.partial(plot, name)) for name in names])


def clean(prompt: str) -> str:
    """As diffusers' PRXPipeline and data/prepare.py clean captions."""
    from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor

    return TextPreprocessor().clean_text(prompt)


def paint_prompts(args):
    """n images of each prompt, from a run's folder, as one grid --out, or, where that is no .png, as single files in a
    folder --out and the first 64 as a grid beside it. Prompts are cleaned as diffusers' PRXPipeline and data/prepare.py
    clean them. Image i of every prompt begins with the same noise."""
    about, start = read_run(args.run, args.trust), time.perf_counter()
    prompts = [prompt for prompt in args.prompts for _ in range(args.n)]
    cleaned = [text for prompt in args.prompts for text in [clean(prompt)] * args.n]
    seeds = [args.seed + i for _ in args.prompts for i in range(args.n)]
    request, devices = request_of(about, args), painting_devices(args)
    print(f"{len(prompts)} images of {about['resolution']} px in {request['steps']} steps on {', '.join(devices)}",
          flush=True)
    with Painting(args.run, cleaned, seeds, request, devices, args.out.resolve().parent) as painting:
        images, grid = painting.images(), args.out
        if not args.out.suffix:
            grid = args.out.with_name(args.out.name + ".png")  # not among the images, which may be evaluated
            args.out.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images):
                picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
                picture.save(args.out / f"{number // args.n:05d}-{number % args.n:02d}.png")
            print(f"wrote {len(images)} images in {args.out}")
        columns = min(8, args.n if args.n > 1 else len(prompts))
        save_grid(torch.stack(images[:64]), prompts[:64], grid, columns=columns)
    print(f"wrote {grid} in {time.perf_counter() - start:.1f} s")


# =====================================================================================================================
# A finished run as a folder for diffusers.
# =====================================================================================================================

SCENE = "one object: a big red ring in the top left. the background is plain navy."  # what models of scenes know
PLAIN = "a red ring"  # which no pipeline's text cleaning changes


def export(run: Path, out: Path, trust: bool = False):
    """A finished run -> a pipeline folder that diffusers loads, with a model card: PRXPipeline for latents with
    v-prediction, PRXPixelPipeline for pixels with x-prediction. UserError for what neither can do, and where the same
    noise does not give the image that the run's own script paints. It is a run's folder too: eval_prx.py judges it."""
    about = read_run(run, trust)
    if about["predict"] != ("x" if about["pixels"] else "v"):
        raise UserError(f"{run} has --vae {about['vae']} --predict {about['predict']}, and diffusers has pipelines for "
                        "latents with v and for pixels with x; its transformer/ folder can be used by itself")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / "model_index.json").is_file():
        raise UserError(f"--out {out} exists and is no pipeline; give a new folder")
    about["text_source"] = HUB.get(about["text"], about["text"])
    if about["text"] == "tiny":
        about["text_source"] = str(run / "text")
    pipeline = load_pipeline(run, about)
    check = compare_paintings(pipeline, run, about, out.resolve().parent)
    pipeline.scheduler = type(pipeline.scheduler)(shift=about["shift"])
    about["pipeline"] = type(pipeline).__name__
    pipeline.save_pretrained(out)
    for name in ("train_prx.py", "run.json", "config.json", "text", "samples.png", "metrics.json"):
        if (run / name).is_dir():
            shutil.copytree(run / name, out / name, dirs_exist_ok=True)
        elif (run / name).is_file():
            shutil.copy(run / name, out / name)
    (out / "README.md").write_text(model_card(about, out, check))
    print(f"same noise, same image in diffusers: {check}\nwrote {out}; {out / 'README.md'} says how to use it; publish "
          f"it with\nhf upload OWNER/NAME {out}")


def load_pipeline(run: Path, about: dict):
    """diffusers' pipeline of a run, FP32 on CPU; its scheduler takes our time grid."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    text, vae, tokens = about["text_source"], HUB.get(about["vae"], about["vae"]), about.get("text_tokens", 256)
    try:
        if "span" in json.loads((run / "transformer/config.json").read_text()):
            raise ValueError("it has --sprint or a learned scorer, which diffusers' model does not have")
        transformer, report = diffusers.PRXTransformer2DModel.from_pretrained(
            run / "transformer", use_safetensors=True, output_loading_info=True)
        if report["missing_keys"] or report["unexpected_keys"]:
            raise ValueError("its weights are not those of diffusers' PRXTransformer2DModel")
        config = transformers.AutoConfig.from_pretrained(text, trust_remote_code=False)
        config.is_encoder_decoder = False
        classes = {"t5gemma": transformers.T5GemmaEncoderModel, "t5": transformers.T5EncoderModel}
        encoder = classes.get(config.model_type, transformers.AutoModel)
        encoder = encoder.from_pretrained(text, config=config, use_safetensors=True, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(text, trust_remote_code=False)
        parts = dict(transformer=transformer, text_encoder=encoder, tokenizer=tokenizer,
                     default_sample_size=about["resolution"], scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
        if about["pixels"]:
            return diffusers.PRXPixelPipeline(**parts, prompt_max_tokens=tokens, noise_scale=1.0)
        try:  # a repository of its own, or part of a pipeline
            vae = diffusers.AutoModel.from_pretrained(vae, use_safetensors=True)
        except (OSError, ValueError):
            vae = diffusers.AutoModel.from_pretrained(vae, subfolder="vae", use_safetensors=True)
        if not hasattr(vae.config, "scaling_factor"):
            raise ValueError(f"it has the latents of {type(vae).__name__}, which PRXPipeline cannot decode")
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{run} cannot be a pipeline of diffusers: {first_line(error)}; its transformer/ folder can be "
                        "used by itself") from None
    if getattr(vae.config, "shift_factor", 0.0) is None:  # the pipeline would add None
        vae.register_to_config(shift_factor=0.0)
    tokenizer.model_max_length = tokens  # the pipeline cuts and pads to it
    return diffusers.PRXPipeline(**parts, vae=vae.eval())


def compare_paintings(pipeline, run: Path, about: dict, folder: Path, steps: int = 4) -> str:
    """How far the run's own script and diffusers' pipeline, on our time grid, are apart with the same noise, in words.
    UserError for more than rounding: 1e-3 of 1 on average is a quarter of the rounded values off by one of 255."""
    side, shift, config = about["resolution"], about["shift"], pipeline.transformer.config
    request = {"steps": steps, "cfg_scale": 3.0, "batch": 1, "precision": "fp32"}
    with Painting(run, [PLAIN], [0], request, ["cpu"], folder) as painting:
        ours = painting.images()[0].int()
    small = side // (1 if about["pixels"] else pipeline.vae_scale_factor)
    noise = torch.randn((config.in_channels, small, small), generator=torch.Generator("cpu").manual_seed(0))
    times = [1 - i / steps for i in range(steps)]
    timesteps = [1000 * shift * t / (1 + (shift - 1) * t) for t in times]
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PLAIN, height=side, width=side, timesteps=timesteps, guidance_scale=3.0, output_type="np",
                      latents=noise[None], use_resolution_binning=False).images[0]
    theirs = (torch.from_numpy(theirs).permute(2, 0, 1) * 255).round().int()
    difference = (theirs - ours).abs()
    share, largest = (difference > 0).double().mean().item(), int(difference.max())
    words = f"{share:.2%} of the values differ, by {largest} of 255 at most"
    if largest > 1 or share > 0.25:
        raise UserError(f"{run} paints another image with diffusers than its script does ({words}): not exported")
    return words


def describe_data(about: dict) -> tuple[str, str]:
    """A prompt that the model knows, of scenes or the first held-out caption, and a line for each data folder with its
    source and licence."""
    prompt, lines = PLAIN, []
    for folder in about["folders"]:
        try:
            index = read_index(Path(folder))
            if index.get("scenes"):
                prompt, words = SCENE, "procedural scenes, drawn by data/scenes.py; no rights of others"
            else:
                known = {key: index[key] for key in ("source", "license", "attribution") if key in index}
                words = json.dumps(known, ensure_ascii=False)
        except UserError:
            words = "was not there when the model was exported"
        try:
            prompt = HeldOut([folder], about["resolution"]).caption(0) if prompt == PLAIN else prompt
        except UserError:
            pass  # nothing is held out
        lines.append(f"- {Path(folder).name}: {words}")
    return prompt, "\n".join(lines)


def usage(about: dict, where: Path, prompt: str) -> str:
    """The Python commands that load a pipeline's folder and paint on the trainer's own time grid."""
    side = about["resolution"]
    bins = (1024,) if about["pixels"] else (256, 512, 1024)  # sizes that diffusers has bins for
    binning = "" if side in bins else ", use_resolution_binning=False"
    lines = ["import diffusers",
             f"pipeline = diffusers.{about['pipeline']}.from_pretrained({str(where)!r})",
             "pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)  # shifted below",
             f"shift, steps = {about['shift']}, {about['sample_steps']}",
             "grid = [1 - i / steps for i in range(steps)]",
             "timesteps = [1000 * shift * t / (1 + (shift - 1) * t) for t in grid]",
             f"image = pipeline({prompt!r}, height={side}, width={side}, timesteps=timesteps, "
             f"guidance_scale={max(1.0, about['cfg_scale'])}{binning}).images[0]", "image.save('image.png')"]
    return "\n".join(lines)


def model_card(about: dict, out: Path, check: str) -> str:
    """README.md of an exported pipeline, from the files that came from the run."""
    prompt, data = describe_data(about)
    picture = "![samples](samples.png)" if (out / "samples.png").is_file() else ""
    metrics, trained, lower = "Not evaluated.", "", ""
    if (out / "metrics.json").is_file():
        result = json.loads((out / "metrics.json").read_text())
        metrics = f"```\n{table(result)}\n```\nProtocol {result['protocol_sha256']}; all of it is in metrics.json."
    if about.get("finished"):
        end = about["finished"]
        trained = f"{end['samples']:,} images in {end['elapsed']:.0f} s from process start to final weights on disk. "
    frozen = [] if about["pixels"] else [f"VAE {HUB.get(about['vae'], about['vae'])}"]
    frozen.append("the embedded text encoder, Apache-2.0" if about["text"] == "tiny" else about["text_source"])
    if about["pixels"] and prompt != SCENE:
        lower = "Write prompts as captions were prepared, in lower case: this pipeline does not do it.\n"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
license: other
license_name: see-licences
tags: [prx, text-to-image, {about['pipeline']}]
---
# {about.get('name', 'PRX')}

A PRX text-to-image model, {about['resolution']} px, exported for diffusers' `{about['pipeline']}` (diffusers,
transformers and ftfy are needed).
{picture}

## Use
```python
{usage(about, out, prompt)}
```
{lower}The time grid is the trainer's; checked at export with 4 steps and the same noise: {check}.
Without `timesteps`, `num_inference_steps` gives diffusers' own grid.

## Metrics
{metrics}

## Recipe
{trained}Track {about['track']}, seed {about['seed']}, by the train_prx.py that lies here:
```
{about.get('command', 'its command is not known')}
```

## Data
{data}

## Licences
The code that trained it is Apache-2.0. These weights: to be stated by whoever publishes them, within the terms of the
data and of the frozen networks: {", ".join(frozen)}.
"""


# =====================================================================================================================
# Command line.
# =====================================================================================================================

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def common_flags(parser, steps: int | None):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--steps", type=int, default=steps, help=f"of the sampler [{steps or 'those of its grids'}]")
    parser.add_argument("--cfg", type=float, help="guidance scale [the run's cfg_scale]")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model that paints [fp32]")
    parser.add_argument("--batch", type=int, help="images at a time [CPU 50, GPU as many as their size allows]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, 0 to 199 [0]")
    parser.add_argument("--device", default=default, help="cpu, cuda (all GPUs) or cuda:N [%(default)s]")
    parser.add_argument("--ranks", type=int, help="painting processes [one for each GPU; CPU 1]")
    parser.add_argument("--trust", action="store_true", help="execute a script that is not this checkout's")


def check_flags(parser, args, least: int):
    for flag, low, high in (("n", least, REFERENCE), ("steps", 1, 1000), ("batch", 1, 10_000), ("ranks", 1, 64),
                            ("seed", 0, 199)):
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            parser.error(f"--{flag} {value} is not one of {low} to {high}")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(f"--device {args.device} is not on this machine: use cpu")


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run, or exported from one")
    parser.add_argument("--data", help="folders whose held-out captions are painted, or scenes [as it was trained]")
    parser.add_argument("--real", type=Path, help="folder of real images, or a file of --save-stats")
    parser.add_argument("--fake", type=Path, help="folder of the images to judge")
    parser.add_argument("--save-stats", type=Path, help="write the statistics of --real to this file")
    parser.add_argument("--n", type=int, help="held-out prompts and real images [scenes 2000; else all, up to 10000]")
    parser.add_argument("--metrics", default=",".join(DEFAULT_METRICS), help=f"of {', '.join(METRICS)} [%(default)s]")
    common_flags(parser, 16)
    parser.add_argument("--sweep", metavar="cfg=1,2,3.5", help="a curve over cfg=..., steps=... or exports")
    parser.add_argument("--out", type=Path, help="folder to write into [the run's; with --fake none, only printed]")
    for kind in ("inception", "clip", "dino"):
        parser.add_argument(f"--{kind}", default=NETWORKS / kind, metavar="PATH",
                            help=f"network: folder, Hugging Face repository, or none [data/networks/{kind}]")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.fake is None) or args.fake and not args.real:
        parser.error("give either the folder of a run, or --real DIR and --fake DIR")
    check_flags(parser, args, 2)
    args.metrics = [name.strip().replace("-", "_") for name in args.metrics.split(",")]
    for name in args.metrics:
        if name not in METRICS:
            parser.error(f"--metrics {name} is unknown: there are {', '.join(METRICS)}")
    args.points = sweep_points(parser, args)
    return args


def sweep_points(parser, args) -> list[tuple]:
    """For each point its place on the axis of --sweep, and what it changes of the painting request."""
    if not args.sweep:
        return [(None, {})]
    args.axis, _, values = args.sweep.partition("=")
    if args.axis == "exports":
        folders = sorted(args.run.glob("exports/step-????????"))
        if not folders:
            parser.error(f"{args.run} has no exports/, which training leaves with its sample grids")
        return [(int(folder.name[5:]), {"transformer": f"exports/{folder.name}"}) for folder in folders]
    keys = {"cfg": ("cfg_scale", float), "steps": ("steps", int)}
    if args.axis not in keys:
        parser.error(f"--sweep {args.sweep} is not understood: give cfg=1,2,3.5 or steps=4,8,16 or exports")
    key, kind = keys[args.axis]
    try:
        return [(kind(value), {key: kind(value)}) for value in values.split(",")]
    except ValueError:
        parser.error(f"--sweep {args.sweep}: {values} are not numbers with commas between them")


def load_networks(args) -> dict[str, Features]:
    """The networks that the metrics need, but for those that are `none`."""
    device = "cuda:0" if args.device == "cuda" else args.device
    kinds = dict.fromkeys(METRICS[name].network for name in args.metrics)
    sources = {kind: getattr(args, kind) for kind in kinds}
    return {kind: Features(kind, source, device) for kind, source in sources.items() if str(source) != "none"}


def evaluate(args) -> int:
    """The default command: a run or two folders, one result or a curve. Exit code 2 where a metric failed."""
    out, start = args.out or args.run, time.perf_counter()
    if args.run:
        result = evaluate_run(args, out)
    else:
        networks = load_networks(args)
        result = evaluate_folders(args, networks)
        finish_result(result, networks, args.device, start)
    if out and not args.sweep:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "metrics.json", result)
        print(f"wrote {out / 'metrics.json'}" + (f" and {out / 'samples.png'}" if args.run else ""))
        if out == args.run and (out / "log.txt").is_file():  # the run's own log states what came of it
            with open(out / "log.txt", "a") as log:
                log.write(f"eval_prx.py: {json.dumps(result['protocol'])}\n{table(result)}\n")
    if result["failed"]:
        print("\n".join(result["failed"]), file=sys.stderr)
    return 2 if result["failed"] else 0


def evaluate_run(args, out: Path) -> dict:
    """Paints and judges a run at each point of args.points. Returns the last result; a curve goes to sweep.json."""
    about = read_run(args.run, args.trust)
    task, networks, rows = task_of(about, args.data, args.n), None, []
    asked = [name for name in args.metrics if str(getattr(args, METRICS[name].network)) != "none"]
    if asked and not args.real and not task.sets:
        raise UserError(f"{task.protocol['data']} holds no images, only latents, which {', '.join(asked)} need: give "
                        "--real FOLDER or statistics, or prepare it with --store image (or jpeg)")
    prompts = [prompt for split in task.counts for prompt in task.prompts(split)]
    seeds = [seed for split, n in task.counts.items() for seed in seeds_of(split, n, args.seed)]
    for place, changes in args.points:
        start, request = time.perf_counter(), request_of(about, args) | changes
        with Painting(args.run, prompts, seeds, request, painting_devices(args), out) as painting:
            if networks is None:  # while the processes start
                networks = load_networks(args)
                references = references_of(task, args.real, networks, 250)
            images = painting.images()
            painted = time.perf_counter()
            result = judge(task, images, references, networks, args.metrics, out)
        told = {key: about[key] for key in ("track", "resolution", "shift", "predict", "script_sha256")}
        told |= {key: value for key, value in request.items() if key != "batch"}
        result["protocol"] |= told | {"train_seed": about["seed"], "seed": args.seed}
        result["seconds"] = {"paint": painted - start, "judge": time.perf_counter() - painted}
        finish_result(result, networks, args.device, start)
        if args.sweep:
            rows.append({args.axis: place} | {k: result[k] for k in ("protocol_sha256", "metrics", "intervals")})
            write_json(out / "sweep.json", {"axis": args.axis, "protocol": result["protocol"], "points": rows})
    if args.sweep:
        draw_sweep(rows, args.axis, out / "sweep.png")
        print(f"wrote {out / 'sweep.json'} and {out / 'sweep.png'}")
    draw_loss(args.run, out / "curve.png")
    return result


def sample_command(argv) -> int:
    parser = Parser(prog="eval_prx.py sample", description=paint_prompts.__doc__, fromfile_prefix_chars="@")
    parser.add_argument("run", type=Path, help="folder of a finished run, or exported from one")
    parser.add_argument("prompts", nargs="+", metavar="prompt", help="what to paint; @FILE: a prompt on each line")
    parser.add_argument("--n", type=int, default=4, help="images of each prompt, each from its own noise [4]")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="a .png for a grid, or a folder for images")
    common_flags(parser, None)
    args = parser.parse_intermixed_args(argv)
    check_flags(parser, args, 1)
    if args.out.suffix not in ("", ".png") or not args.out.name:
        parser.error(f"--out {args.out} is neither a .png nor the name of a folder")
    if max(map(len, args.prompts)) > 10_000:  # cleaning is quadratic
        parser.error("a prompt has more than 10,000 characters")
    paint_prompts(args)
    return 0


def export_command(argv) -> int:
    parser = Parser(prog="eval_prx.py export", description=export.__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="the pipeline's folder")
    parser.add_argument("--trust", action="store_true", help="execute a script that is not this checkout's")
    export(**vars(parser.parse_args(argv)))
    return 0


def main(argv=None) -> int:
    """Exit code 0; 2 for bad input and for metrics that could not be computed; 1 where the painting failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"sample": sample_command, "export": export_command}
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("start it without torchrun: eval_prx.py starts a process for each GPU, or --ranks N")
        if argv and argv[0] in commands:
            return commands[argv[0]](argv[1:])
        return evaluate(parse_args(argv))
    except (UserError, OSError, Failure) as error:  # Python's own sentence of an OSError names the file
        print(error, file=sys.stderr)
        return 1 if isinstance(error, Failure) else 2


if __name__ == "__main__":
    sys.exit(main())
