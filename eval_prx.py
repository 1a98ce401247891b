"""How good are the pictures? FID, CMMD, DINO-MMD and, on scenes, exact prompt accuracy; and the model for others.

    python eval_prx.py logs/micro                           # a finished run: 2,000 scenes, or all held-out captions
    python eval_prx.py logs/micro --n 10000 --steps 25 --cfg 3.5 --precision bf16 --seed 1 --out results
    python eval_prx.py logs/micro --metrics fid,cmmd,dino-mmd,kid,precision,recall
    python eval_prx.py logs/micro --sweep cfg=1,2,3.5,5     # a curve; or steps=4,8,16, or exports (over time)
    python eval_prx.py --real photos --fake samples --save-stats photos.safetensors  # next: --real photos.safetensors
    python eval_prx.py --real photos --fake samples --inception inception-2015-12-05.pt \\
        --clip openai/clip-vit-large-patch14-336 --dino facebook/dinov2-with-registers-large  # published networks
    python eval_prx.py sample logs/micro "one object: a big red ring in the top left. behind, plain navy." --n 8
    python eval_prx.py export logs/24h --out pipeline       # a folder for diffusers, with a model card

A run is painted by its own script, `RUN/train_prx.py --paint` (records/README.md), in a process for each GPU, or one.
Where that script is not this checkout's, --trust is asked for, once: it is code. A run on scenes is judged on scenes
that training never shows: n of the split `eval`, and n / 4 of `unseen`, whose pairs of shape and colour training never
has. The reference is n other scenes; the column `real` is a second such set: what perfect samples would get. A run on
other data paints the first n held-out captions by hash and is compared with their images, or with --real.

Written: metrics.json (protocol, its hash, metrics, 95 % intervals, seconds), samples.png, curve.png. Two results
compare where their `protocol_sha256` is equal.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import re
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
from torch import Tensor

from data import scenes
from data.shards import (HeldOut, UserError, data_folders, file_sha256, read_index, read_picture, save_grid,
                         shared_images, write_atomically, write_json)

ROOT = Path(__file__).resolve().parent
NETWORKS = ROOT / "data" / "networks"
BEFORE = "58b37c5"  # the last commit that judges runs without a script and a run.json
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "prx")
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")  # data/shards.py judges the content
REFERENCE, SECOND = 10_000_000, 20_000_000  # where the real sets begin in `eval`; prompts from 0
CHUNK = 1024  # rows of a matrix of distances that are in memory at a time
TRUST = "execute a script that is not this checkout's, now and later"
PLAIN = "a red ring"  # a prompt that no pipeline's text cleaning changes
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"  # inception-2015-12-05.pt
HUB = {"repa-e": "REPA-E/e2e-flux-vae", "flux": "black-forest-labs/FLUX.1-schnell",  # train_prx.py's short names
       "flux2": "black-forest-labs/FLUX.2-dev", "dc-ae": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
       "t5gemma": "google/t5gemma-2b-2b-ul2"}


class Failure(Exception):
    """What is no mistake of the user's: one sentence, exit code 1."""


# =====================================================================================================================
# Metrics: two sets of features in, one float out.
# =====================================================================================================================

def moments(x: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features (N, D), each taken count (N,) times -> mean (D,) and R, where R^T R is the covariance: a sum over
    samples divided by N - 1, as FID's code does. float64."""
    x = x.double()
    count = x.new_ones(len(x)) if count is None else count
    mean = x[0] + count @ (x - x[0]) / count.sum()  # from the first: a large mean must not eat the digits
    rows = (x - mean) * (count / (count.sum() - 1)).sqrt()[:, None]
    return mean, torch.linalg.qr(rows, mode="r").R


def fid(real: Tensor, fake: Tensor, counts: Tensor | None = None) -> Tensor:
    """Frechet distance of two Gaussians, in squared feature units (FID: Heusel et al. 2017, arXiv 1706.08500).

    Of resamples of the fake features: counts (R, M) -> (R,); without, of all of them: (1,).
    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). With S = R^T R the last trace is the sum of the singular values
    of R1 R2^T: real, and stable where a covariance is singular (fewer samples than features).
    """
    (m1, r1), out = moments(real), []
    counts = torch.ones(1, len(fake)).double() if counts is None else counts
    for count in counts:
        m2, r2 = moments(fake, count)
        cross = torch.linalg.svdvals(r1 @ r2.T).sum()
        out.append((m1 - m2).square().sum() + r1.square().sum() + r2.square().sum() - 2 * cross)
    return torch.stack(out)


def mean_of_pairs(kernel, x: Tensor, y: Tensor) -> Tensor:
    """(N,): for each x the mean of kernel(x, y) over all y."""
    return torch.cat([kernel(part, y).mean(1) for part in x.split(CHUNK)])


def mmd(real: Tensor, fake: Tensor, counts: Tensor | None = None) -> Tensor:
    """Squared maximum mean discrepancy of features (N, D) and (M, D), L2-normalised here, under an RBF kernel.

    Of resamples of the fake features: counts (R, M) -> (R,); without, of all of them: (1,).
    1000 * (E k(x, x') + E k(y, y') - 2 E k(x, y)), k = exp(-|x - y|^2 / (2 * 10^2)): the biased estimator, over all
    pairs with the diagonals, as in CMMD (Jayasumana et al. 2024, arXiv 2401.09603). float64.
    """
    def kernel(a, b):  # minus one: the ones cancel, and under sigma 10 every k is close to 1
        return 1000 * torch.expm1((a @ b.T - 1).clamp(max=0) / 10 ** 2)

    x, y = (F.normalize(features.double(), dim=1) for features in (real, fake))
    counts = y.new_ones(1, len(y)) if counts is None else counts
    weights = counts / counts.sum(1, keepdim=True)
    out = mean_of_pairs(kernel, x, x).mean() - 2 * weights @ mean_of_pairs(kernel, y, x)
    for part, w in zip(y.split(CHUNK), weights.split(CHUNK, 1)):
        out = out + ((w @ kernel(part, y)) * weights).sum(1)
    return out


def kid(real: Tensor, fake: Tensor) -> float:
    """Kernel inception distance, 1000 times the unbiased squared MMD under the kernel (a b / D + 1)^3 (Binkowski et al.
    2018, arXiv 1801.01401), over all pairs in place of the mean of subsets. May be below 0. float64."""
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(x):  # without the diagonal
        diagonal = (x.square().mean(1) + 1) ** 3
        return ((len(x) * mean_of_pairs(kernel, x, x) - diagonal) / (len(x) - 1)).mean()

    x, y = real.double(), fake.double()
    return 1000 * (within(x) + within(y) - 2 * mean_of_pairs(kernel, x, y).mean()).item()


def covered(points: Tensor, centres: Tensor, k: int = 3) -> float:
    """The share of points (N, D) in a ball around one of the centres (M, D), each reaching to its k-th neighbour.

    Precision is that of fake points in real balls, recall the reverse (Kynkaanniemi et al. 2019, arXiv 1904.06991, with
    VGG-16's features in place of the network's here).
    """
    points, centres = points.double(), centres.double()
    k = min(k + 1, len(centres))  # the nearest is the centre itself
    radii = torch.cat([torch.cdist(part, centres).kthvalue(k, 1).values for part in centres.split(CHUNK)])
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


class Metric(NamedTuple):
    network: str     # inception, clip or dino
    value: Callable  # features (real (N, D), fake (M, D)) -> one number
    widest: int = 0  # features, up to which value(real, fake, counts (R, M)) -> (R,) gives the interval in seconds


METRICS = {"fid": Metric("inception", fid, widest=512),
           "cmmd": Metric("clip", mmd, widest=4096),
           "dino_mmd": Metric("dino", mmd, widest=4096),
           "kid": Metric("inception", kid),
           "precision": Metric("inception", lambda real, fake: covered(fake, real)),
           "recall": Metric("inception", covered)}
DEFAULT_METRICS = ("fid", "cmmd", "dino_mmd")


def resample(n: int, resamples: int = 100) -> Tensor:
    """(resamples, n) float64: how often each of n samples is in each bootstrap resample. Always the same draws."""
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(n))
    return torch.stack([torch.bincount(row, minlength=n) for row in drawn]).double()


def interval(value: float, resampled: Tensor) -> list[float]:
    """95 % around `value`, from the metric of each resample (R,). The resamples are centred on the value, as drawing
    again from a sample adds the small-sample bias of FID and the MMDs a second time."""
    low, high = np.quantile(resampled - resampled.mean(), (0.025, 0.975)).tolist()
    return [value + low, value + high]


# =====================================================================================================================
# Features: what small and published networks make of images, kept in files and compared.
# =====================================================================================================================

MEAN_STD = {"inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1, 1]
            "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
            "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
            "inception-2015": ((128 / 255,) * 3, (128 / 255,) * 3)}  # (x - 128) / 128


def middle(x: Tensor, height: int, width: int) -> Tensor:
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top:top + height, left:left + width]


def preprocess(images, size: int, kind: str) -> Tensor:
    """uint8 images, (N, 3, H, W) or a list of (3, H, W) -> FP32 (N, 3, size, size), normalised as `kind` expects.

    The shorter edge becomes `size`, antialiased bicubic, and the longer one is cropped around its centre: what the
    image processors of transformers do. uint8 and on CPU, where torch's bicubic gives Pillow's numbers. Only
    `inception-2015` squeezes the whole image into the square without rounding, as clean-fid (arXiv 2104.11222).
    """
    if len({image.shape for image in images}) > 1:
        return torch.cat([preprocess(image[None], size, kind) for image in images])
    x = torch.stack(list(images)).cpu()
    if x.dtype != torch.uint8:  # of floats the range would be a guess, and a wrong one inverts the image
        raise TypeError(f"images must be uint8 in 0..255, not {x.dtype}")
    if kind == "inception-2015":
        x = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    else:
        h, w = x.shape[-2:]
        h, w = min(h, 20 * w), min(w, 20 * h)  # of a longer picture no more is seen
        height, width = (size, size * w // h) if h <= w else (size * h // w, size)
        x = F.interpolate(middle(x, h, w), (height, width), mode="bicubic", antialias=True)
        x = middle(x, size, size)
    mean, std = (torch.tensor(v)[:, None, None] for v in MEAN_STD[kind])
    return (x.float() / 255 - mean) / std


def sha256_tensors(tensors: dict[str, Tensor]) -> str:
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
        loader = transformers.CLIPVisionModelWithProjection if kind == "clip" else transformers.AutoModel
        try:
            self.model, report = loader.from_pretrained(self.source, dtype=torch.float32, output_loading_info=True,
                                                        use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            words = f"({first_line(error)}); --{kind} none does without"
            raise UserError(f"--{kind} {self.source} cannot be loaded {words}") from None
        self.size = getattr(self.model.config, "image_size", None)
        if report["missing_keys"] or not isinstance(self.size, int):  # what is missing would be drawn at random
            lacks = min(report["missing_keys"], default="image_size in its config.json")
            raise UserError(f"--{kind} {self.source} is not such a network: it lacks {lacks}")
        self.model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.sha256 = sha256_tensors(self.model.state_dict())

    def load_inception_2015(self):
        data = Path(self.source).read_bytes()
        self.kind, self.size = "inception-2015", 299
        self.sha256 = hashlib.sha256(data).hexdigest()
        if self.sha256 != INCEPTION_SHA256:
            raise UserError(f"--inception {self.source} is not NVIDIA's: its sha256 is not {INCEPTION_SHA256}")
        script = torch.jit.load(io.BytesIO(data), map_location=self.device).eval()
        self.model = lambda pixel_values: script.layers(pixel_values).flatten(1)  # its own resize is left out

    @torch.inference_mode()
    def __call__(self, images) -> Tensor:
        x = preprocess(images, self.size, self.kind).to(self.device, memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(allow_tf32=False):
            y = self.model(pixel_values=x)
        if self.kind == "clip":
            y = y.image_embeds
        elif self.kind != "inception-2015":
            y = y.pooler_output
        return y.flatten(1).float().cpu()

    def describe(self) -> dict:
        """For the protocol: source, input size, resize, and sha256 of the weights."""
        source = self.source.removeprefix(f"{ROOT}/")
        return {"source": source, "size": self.size, "resize": "bicubic", "sha256": self.sha256}


def features_of(items, networks: dict, batch: int = 250, load=lambda images: images) -> dict:
    """FP32 (N, D) by kind of network, of load(`batch` items at a time)."""
    rows = {kind: [] for kind in networks}
    for i in range(0, len(items), batch):
        images = load(items[i:i + batch])
        for kind, network in networks.items():
            rows[kind].append(network(images))
    return {kind: torch.cat(parts) for kind, parts in rows.items()}


def about_set(images: dict, networks: dict) -> dict:
    """What decides the statistics of a set: which images, and what looks at them."""
    looks = {kind: network.describe() | {"source": None} for kind, network in networks.items()}
    return {"images": images, "networks": looks}


def sha256_json(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def save_statistics(path: Path, features: dict[str, Tensor], about: dict):
    about = {"about": json.dumps(about), "sha256": sha256_tensors(features)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: save_file(features, part, about))


def load_statistics(path: Path, networks: dict) -> tuple[dict[str, Tensor], dict]:
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
            raise UserError(f"{path} was made with another {kind}; give the same network, or --{kind} none")
    return {kind: features[kind] for kind in networks}, about["images"]


def real_set(images: dict, items, networks: dict, batch: int, load) -> dict[str, Tensor]:
    """Features of real images load(items), or of the cache, by a hash of their content and of the networks."""
    if not networks:
        return {}
    about = about_set(images, networks)
    path = CACHE / f"{sha256_json(about)}.safetensors"
    if path.exists():
        try:
            return load_statistics(path, networks)[0]
        except UserError as error:
            print(f"the cache is passed over and made again: {error}")
    features = features_of(items, networks, batch, load)
    try:
        save_statistics(path, features, about)
    except OSError as error:
        print(f"the reference is not cached in {path.parent} ({error})")
    return features


def compare(real: dict, fake: dict, metrics=DEFAULT_METRICS, intervals: bool = True) -> dict:
    """`metrics` of two sets of features, as far as there are networks for them, their bootstrap `intervals` over the
    fake samples (the reference is given), and `failed`: a sentence for each that could not be computed."""
    out = {"metrics": {}, "intervals": {}, "failed": []}
    for name in metrics:
        metric = METRICS[name]
        if metric.network not in real:
            continue
        x, y = real[metric.network], fake[metric.network]
        few, dimensions = min(len(x), len(y)), x.shape[1]
        try:
            out["metrics"][name] = value = float(metric.value(x, y))
            if intervals and dimensions <= metric.widest:
                out["intervals"][name] = interval(value, metric.value(x, y, resample(len(y))))
        except RuntimeError as error:  # LinAlgError and OutOfMemoryError are such
            out["failed"].append(f"{name} failed: {first_line(error)}")
        if name == "fid" and few <= dimensions and intervals:
            print(f"FID: {few} images do not determine a covariance of {dimensions} features; take more")
    return out


def list_images(folder: Path) -> tuple[list[Path], dict]:
    """The image files in a folder and its subfolders, sorted, at least two; their number and the sha256 of all."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds images")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_TYPES and p.is_file())
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} image(s), and at least 2 are needed")
    digests = b"".join(bytes.fromhex(file_sha256(path)) for path in files)
    return files, {"n": len(files), "sha256": hashlib.sha256(digests).hexdigest()}


def load_images(paths: list[Path]) -> list[Tensor]:
    """uint8 (3, H, W) each. One that cannot be read ends the evaluation: without it, it is another set."""
    return [torch.from_numpy(np.array(read_picture(path))).permute(2, 0, 1) for path in paths]


def evaluate_folders(args) -> dict:
    """The result of comparing the images of two folders; --real may be a file of statistics."""
    start, batch, networks = time.perf_counter(), args.batch or 50, load_networks(args)
    files, about_files = list_images(args.fake)
    (reference,), about = references_of(None, args.real, networks, batch)
    if args.save_stats:
        save_statistics(args.save_stats, reference, about_set(about["real"], networks))
        print(f"wrote {args.save_stats}")
    result = compare(reference, features_of(files, networks, batch, load_images), args.metrics)
    for key in ("metrics", "intervals"):
        result[key] = {"fake": result[key]}
    result["protocol"] = about | {"fake": about_files, "n": len(files), "weights": "images"}
    finish_result(result, networks, args.device, start)
    return result


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
            raise UserError(f"{run} holds no {path.name}: give the folder of a finished run; an older one is judged "
                            f"by commit {BEFORE} (git worktree add ../before {BEFORE})")
    try:
        about = dict(json.loads((run / "run.json").read_text()))
        about["folders"] = [str(entry["folder"]) for entry in about["data"]]
        for key in "track seed resolution vae text pixels predict shift cfg_scale sample_steps".split():
            about[key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / 'run.json'} is damaged ({type(error).__name__} {error}); restore it") from None
    if not (run / "transformer").is_dir():
        raise UserError(f"{run} is not finished: it holds no transformer/, which training writes at its end")
    about["script_sha256"] = digest = file_sha256(script)
    if digest != file_sha256(ROOT / "train_prx.py"):
        trusted = CACHE / "trusted" / digest  # not in the run's folder, which must not vouch for itself
        if trust:
            with contextlib.suppress(OSError):  # without a cache it is asked for each time
                trusted.parent.mkdir(parents=True, exist_ok=True)
                trusted.touch()
        elif not trusted.exists():
            raise UserError(f"{script} differs from this checkout's train_prx.py, and to paint is to execute it: code "
                            "may do whatever you may; read it, then give --trust, once")
    return about


class Painting(contextlib.ExitStack):
    """A run's own script at work on prompts: one process for each device, each with its share, in order.

    `request`: as in records/README.md, without prompts, seeds and device. A context manager: leaving it ends the
    processes and deletes what they wrote, which lies in `folder` meanwhile.
    """

    def __init__(self, run: Path, prompts: list, seeds: list, request: dict, devices: list, folder: Path):
        super().__init__()
        self.script, self.n, self.parent = run.resolve() / "train_prx.py", len(prompts), folder
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".painting-", dir=folder, ignore_cleanup_errors=True)
        self.folder = Path(self.enter_context(scratch))
        self.processes, devices = [], devices[:self.n]
        threads = max(1, len(os.sched_getaffinity(0)) // len(devices))
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        for rank, device in enumerate(devices):
            part = slice(self.n * rank // len(devices), self.n * (rank + 1) // len(devices))
            own = {"format": 1, "prompts": prompts[part], "seeds": seeds[part], "device": device}
            asked, painted = self.folder / f"{rank}.json", self.folder / f"{rank}.safetensors"
            asked.write_text(json.dumps(own | request))
            # -P: modules are not searched in the script's folder, so that nothing else of it is executed
            command = [sys.executable, "-P", self.script, "--paint", asked, "--out", painted]
            with open(self.folder / f"{rank}.log", "wb") as log:
                process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL,
                                           stdout=subprocess.DEVNULL, stderr=log)
            self.processes.append(self.enter_context(process))
            self.callback(process.kill)

    def images(self) -> list[Tensor]:
        """Waits for the processes. uint8 (3, H, W) of each prompt, read from disk when they are used. UserError for
        what the script refuses, Failure where it fails."""
        while self.at_work():
            if sys.stderr.isatty():
                print(f"\r{self.last_words(0)}", end="\033[K", file=sys.stderr, flush=True)
            time.sleep(0.05)
        images = []
        for rank in range(len(self.processes)):
            try:
                with safe_open(self.folder / f"{rank}.safetensors", "pt") as file:
                    images += file.get_tensor("images").unbind()
            except (OSError, SafetensorError) as error:
                raise Failure(f"{self.script} --paint wrote no images ({first_line(error)})") from None
        found = {(image.dtype, image.ndim, len(image)) for image in images}
        if len(images) != self.n or found != {(torch.uint8, 3, 3)}:
            raise Failure(f"{self.script} --paint did not write {self.n} images as uint8 (3, H, W)")
        return images

    def at_work(self) -> bool:
        codes = [process.poll() for process in self.processes]
        for rank, code in enumerate(codes):
            if code == 2:
                raise UserError(f"{self.script} --paint: {self.last_words(rank)}")
            if code:
                kept = shutil.copy(self.folder / f"{rank}.log", self.parent / "paint.log")
                words = f"{self.last_words(rank)}; more is in {kept}; where memory ran out give a smaller --batch"
                raise Failure(f"{self.script} --paint failed with exit code {code}: {words}")
        return None in codes

    def last_words(self, rank: int) -> str:
        lines = (self.folder / f"{rank}.log").read_text(errors="replace").strip().split("\n")
        return lines[-1].strip()


def painting_devices(args) -> list[str]:
    """The device of each painting process: `cuda` means all GPUs, one process each, unless --ranks says how many."""
    count = torch.cuda.device_count()
    devices = [f"cuda:{i}" for i in range(count)] if args.device == "cuda" else [args.device]
    return [devices[i % len(devices)] for i in range(args.ranks or len(devices))]


def request_of(about: dict, args) -> dict:
    """The painting request of the flags, without prompts, seeds and device. At a time 50 images fit a CPU's cache;
    a GPU gets the pixels of 64 images of 512 px, thus 16 of 1024 px (a guess, not measured)."""
    batch = 50 if args.device == "cpu" else max(1, min(250, 64 * 512 ** 2 // about["resolution"] ** 2))
    scale = about["cfg_scale"] if args.cfg is None else args.cfg
    return {"steps": args.steps or about["sample_steps"], "cfg_scale": scale, "batch": args.batch or batch,
            "precision": args.precision}


class SceneTask:
    """What a run on scenes is asked to paint, and what it is compared with: n prompts of the split `eval`, n / 4 of
    `unseen`, and two sets of n other scenes."""

    usual = 2000  # of a record, as records/README.md has it

    def __init__(self, track: str, resolution: int, n: int):
        self.difficulty, self.resolution, self.n = scenes.difficulty_of(track), resolution, n
        counts = {"eval": n, "unseen": n // 4}
        self.prompts = {split: scenes.captions(self.drawn(range(count), split)) for split, count in counts.items()}
        about = {"scenes": self.difficulty.protocol, "split": "eval"}
        self.protocol, self.sets = about | {"n": n, "n_unseen": n // 4, "captions": "long"}, []
        for name, first in (("reference", REFERENCE), ("second", SECOND)):
            self.protocol[name] = [first, first + n]
            images = about | {"range": [first, first + n], "resolution": resolution}
            self.sets.append((images, range(first, first + n)))

    def drawn(self, indices, split: str):
        return scenes.draw_scenes(indices, split, self.difficulty)

    def score(self, split: str, images) -> dict[str, Tensor]:  # (N,) each
        return scenes.score(torch.stack(list(images)), self.drawn(range(len(images)), split))

    def real(self, indices) -> Tensor:
        return scenes.render(self.drawn(indices, "eval"), self.resolution)


class ShardTask:
    """The same of a run on other data: the first n held-out captions by hash and, as the reference, their images; the
    next n images are the second set, where there are as many. n None: all of them, up to the usual number."""

    usual = 10_000

    def __init__(self, folders: list[str], resolution: int, n: int | None):
        self.held_out = held = HeldOut(folders, resolution)
        self.n, self.sets, data = n or min(self.usual, len(held)), [], ",".join(folders)
        if both := shared_images(folders):
            raise UserError(f"{both} images of {data} are trained on and held out; prepare it with one --eval-share")
        if self.n > len(held):
            raise UserError(f"--n {n} is more than the {len(held)} held-out images of {data}; leave it out")
        self.prompts = {"eval": [held.caption(i) for i in range(self.n)]}
        for part in (range(self.n), range(self.n, 2 * self.n)):
            if held.stored and part.stop <= len(held):
                rows = [held.rows[i] for i in part]
                hashes = b"".join(tensors["hash"][row].numpy().tobytes() for tensors, row in rows)
                about = {"hashes": hashlib.sha256(hashes).hexdigest(), "n": self.n, "resolution": resolution}
                self.sets.append((about, part))
        self.protocol = {"data": data, "split": "eval", "n": self.n, "held_out": len(held), "captions": "long"}

    def score(self, *_) -> dict:
        return {}

    def real(self, indices) -> list[Tensor]:
        return [self.held_out.image(i) for i in indices]


def task_of(about: dict, data: str | None = None, n: int | None = None):
    """The task of a run, from its data folders or those of --data. Says how many images it takes."""
    folders = [folder for folder, _ in data_folders(data)] if data else about["folders"]
    try:
        parts = [] if data == "scenes" else [read_index(Path(folder)).get("scenes") for folder in folders]
    except UserError as error:
        raise UserError(f"{error}; or --data FOLDER, where it lies now, or --data scenes") from None
    if all(parts):
        track = parts[-1]["track"] if parts else about["track"]
        task = SceneTask(track, about["resolution"], n or SceneTask.usual)
    else:
        task = ShardTask(folders, about["resolution"], n)
    if task.n != task.usual:
        all_of_them = "" if n else ", all that are held out"
        print(f"{task.n} prompts{all_of_them}: records have {task.usual}, and only equal n compare")
    return task


def seeds_of(split: str, n: int, seed: int) -> list[int]:
    """The noise seeds of the first n prompts of a split: no two images share one. torch's generator takes their
    lower 32 bits, enough for 200 values of --seed."""
    first = {"eval": 0, "unseen": 10_000_000}[split] + 20_000_000 * seed
    return list(range(first, first + n))


def references_of(task, real: Path | None, networks: dict, batch: int) -> tuple[list[dict], dict]:
    """Features of the real images, and of a second set where there is one, and what the protocol says of them: the
    task's own, or those of `real`, a folder or a file of statistics."""
    if real and real.is_file():
        features, about = load_statistics(real, networks)
    elif real:
        files, about = list_images(real)
        features = real_set(about, files, networks, batch, load_images)
    if real:
        return [features], {"real": about, "reference_sha256": about["sha256"]}
    if networks and not task.sets:
        raise UserError(f"{task.protocol['data']} holds no images, only latents: give --real FOLDER or statistics, "
                        "or prepare it with --store image (or jpeg)")
    sets = [real_set(about, part, networks, batch, task.real) for about, part in task.sets]
    return sets, {"reference_sha256": sha256_json(task.sets[0][0]) if task.sets else None}


def judge(task, images, references, networks: dict, metrics, out: Path) -> dict:
    """The result for N images (3, H, W) that were painted for the prompts of the task, split after split; writes
    samples.png and, of scenes, scores.json (of every prompt) into the folder `out`."""
    digest, found, bounds, scores, rest = hashlib.sha256(), {}, {}, {}, images
    sets, about = references
    for split, prompts in task.prompts.items():
        count = len(prompts)
        painted, rest = rest[:count], rest[count:]
        digest.update("".join(prompt + "\n" for prompt in prompts).encode())
        scored = task.score(split, painted)
        found[split] = {key: values.mean().item() for key, values in scored.items()}
        draws = resample(count) / count
        bounds[split] = {key: interval(found[split][key], draws @ scored[key]) for key in scored}
        if scored:
            scores[split] = {key: values.double().numpy().round(6).tolist() for key, values in scored.items()}
        if split == "eval":
            save_grid(torch.stack(list(painted[:32])), prompts[:32], out / "samples.png", columns=8)
    if scores:
        write_json(out / "scores.json", scores)
    real, second = (sets + [{}, {}])[:2]
    result = compare(real, features_of(images[:task.n], networks), metrics)
    found["eval"] |= result["metrics"]
    bounds["eval"] |= result["intervals"]
    if second:
        found["real"] = compare(real, second, metrics, intervals=False)["metrics"]
    protocol = task.protocol | about | {"prompts_sha256": digest.hexdigest()}
    return result | {"protocol": protocol, "metrics": found, "intervals": bounds}


# =====================================================================================================================
# What is shown: a table, the protocol's hash, curves, samples.
# =====================================================================================================================

def table(result: dict) -> str:
    """A row for each metric, a column for each set of images, the first with half of its 95 % interval; accuracies
    in per cent, distances with the digits that the interval leaves meaning."""
    columns, protocol = result["metrics"], result["protocol"]
    bounds = result.get("intervals", {}).get(next(iter(columns), ""), {})
    heads = [f"{column:>10}" for column in columns]
    heads.insert(1, "     ±95 %")
    lines = [" " * 12 + "".join(heads)]
    for key in dict.fromkeys(key for values in columns.values() for key in values):
        half = (bounds[key][1] - bounds[key][0]) / 2 if key in bounds else None
        digits = 3 if protocol.get("n", 0) >= 2000 else 1
        if half and math.isfinite(half):  # two digits of it
            digits = min(4, max(0, 1 - math.floor(math.log10(half))))
        cell = f"{{:10.{digits}f}}" if key in METRICS else "{:10.2%}"
        cells = [cell.format(values[key]) if key in values else " " * 10 for values in columns.values()]
        cells.insert(1, " " * 10 if half is None else cell.format(half))
        lines.append(f"{key:<12}{''.join(cells)}".rstrip())
    networks = [network["source"] for network in protocol.get("features", {}).values()]
    if "scenes" not in protocol and any(source.startswith("data/networks") for source in networks):
        lines.append("by small networks trained on scenes: no measure of photographs; --help names others")
    return "\n".join(lines)


HASHED = ("n", "n_unseen", "prompts_sha256", "reference_sha256", "resolution", "steps", "cfg_scale", "precision")
ALWAYS = {"sampler": "euler", "guidance": "cfg", "weights": "ema"}  # once choices: older results still compare


def finish_result(result: dict, networks: dict, device: str, start: float, **seconds: float):
    """Adds networks, versions, seconds and the hash of what decides whether two results compare; prints them."""
    packages, protocol = ("torch", "transformers", "diffusers", "numpy", "pillow"), result["protocol"]
    protocol["features"] = {kind: network.describe() for kind, network in networks.items()}
    hashed = {key: protocol.get(key) for key in HASHED} | about_set({}, networks)
    result["protocol_sha256"] = sha256_json(ALWAYS | hashed)
    protocol |= {"device": device, "versions": {name: metadata.version(name) for name in packages}}
    result["seconds"] = seconds | {"total": time.perf_counter() - start}
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())
    print(f"{table(result)}\n{spent}")


def draw(path: Path, xlabel: str, panels: dict[str, tuple]):
    """A row of panels, title: (x, y, errors of y or None), as a PNG, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: pip install matplotlib")
        return
    figure = Figure(figsize=(4 * len(panels) + 2, 4), layout="tight")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, (x, y, errors)) in zip(axes, panels.items()):
        axis.errorbar(x, y, errors, marker=".", capsize=3)
        axis.set(title=title, xlabel=xlabel, yscale="log" if errors is None else "linear")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_loss(run: Path, path: Path):
    """The loss of each step, from the run's metrics.jsonl."""
    log, steps, losses = run / "metrics.jsonl", [], []
    for line in log.read_text().splitlines() if log.is_file() else ():
        with contextlib.suppress(ValueError):  # a line that a crash cut short
            record = json.loads(line)
            found = record.get("losses", [])
            losses += [math.nan if loss is None else loss for loss in found]
            steps += range(record["step"] - len(found) + 1, record["step"] + 1)
    if losses:
        draw(path, "step", {f"loss of {run.resolve().name}": (steps, losses, None)})


def draw_sweep(rows: list[dict], axis: str, path: Path):
    """Every metric over the axis of a sweep, with its intervals."""
    x, panels = [row[axis] for row in rows], {}
    for name in ("accuracy", *METRICS):
        if name in rows[0]["metrics"]["eval"]:
            y = np.array([row["metrics"]["eval"][name] for row in rows])
            bounds = np.array([row["intervals"]["eval"].get(name, (v, v)) for row, v in zip(rows, y)])
            panels[name] = x, y, np.abs(bounds.T - y)
    draw(path, axis, panels)


def clean(prompt: str) -> str:
    """As diffusers' PRXPipeline and data/prepare.py clean captions."""
    from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor

    return TextPreprocessor().clean_text(prompt)


def unknown_words(run: Path, about: dict, prompts: list[str]) -> list[str]:
    """Words that are not in the vocabulary of the scenes' text encoder; [] where another encoder reads them."""
    file = run / "text" / "tokenizer.json"
    ours = (NETWORKS / "text" / file.name).read_bytes()
    if about["text"] != "tiny" or not file.is_file() or file.read_bytes() != ours:
        return []
    vocabulary = json.loads(file.read_text())["model"]["vocab"]
    words = dict.fromkeys(re.findall(r"\w+", " ".join(prompts)))
    return [word for word in words if f"▁{word}" not in vocabulary]


def sample(argv: list[str]) -> int:
    """n images of each prompt, from a run's folder: a grid of the first 64, or files in a folder. Prompts are cleaned
    as diffusers' PRXPipeline and data/prepare.py clean them. Image i of every prompt begins with the same noise."""
    parser = Parser(prog="eval_prx.py sample", description=sample.__doc__, fromfile_prefix_chars="@")
    add = common_flags(parser, None)
    add("run", type=Path, help="folder of a finished run, or exported from one")
    add("prompts", nargs="+", metavar="prompt", help="what to paint; @FILE: a prompt on each line")
    add("--n", type=int, default=4, help="images of each, each from its own noise [4]")
    add("--out", type=Path, default=Path("grid.png"), help="a .png for a grid, or a folder for images")
    args = parser.parse_intermixed_args(argv)
    check_flags(parser, args, 1)
    if args.out.suffix not in ("", ".png") or not args.out.name:
        parser.error(f"--out {args.out} is neither a .png nor the name of a folder")
    if max(map(len, args.prompts)) > 10_000:  # cleaning is quadratic
        parser.error("a prompt has more than 10,000 characters")
    about = read_run(args.run, args.trust)
    prompts = [prompt for prompt in args.prompts for _ in range(args.n)]
    cleaned = {prompt: clean(prompt) for prompt in args.prompts}
    if unknown := unknown_words(args.run, about, cleaned.values()):
        print(f"not in the vocabulary of the run's text encoder: {', '.join(unknown)}")
    seeds = [args.seed + i % args.n for i in range(len(prompts))]
    asked = [cleaned[prompt] for prompt in prompts]
    request, folder = request_of(about, args), args.out.resolve().parent
    with Painting(args.run, asked, seeds, request, painting_devices(args), folder) as painting:
        images = painting.images()
        if args.out.suffix:
            columns = min(8, args.n if args.n > 1 else len(prompts))
            save_grid(torch.stack(images[:64]), prompts[:64], args.out, columns)
        else:
            args.out.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):
                picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
                picture.save(args.out / f"{i // args.n:05d}-{i % args.n:02d}.png")
    print(f"wrote {args.out}: {len(images)} of {about['resolution']} px, {request['steps']} steps")
    return 0


# =====================================================================================================================
# A finished run as a folder for diffusers.
# =====================================================================================================================

def export(argv: list[str]) -> int:
    """A finished run -> a pipeline folder that diffusers loads, with a model card: PRXPipeline for latents with
    v-prediction, PRXPixelPipeline for pixels with x-prediction. UserError for what neither can do, and where the same
    noise does not give the image that the run's own script paints. It is a run's folder too: eval_prx.py judges it."""
    parser = Parser(prog="eval_prx.py export", description=export.__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="the pipeline's folder")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    args = parser.parse_args(argv)
    run, out, about = args.run, args.out, read_run(args.run, args.trust)
    if about["predict"] != ("x" if about["pixels"] else "v"):
        raise UserError(f"{run} has --vae {about['vae']} --predict {about['predict']}, and diffusers has pipelines "
                        "for latents with v and for pixels with x; its transformer/ folder can be used by itself")
    empty = not out.exists() or out.is_dir() and not any(out.iterdir())
    if not empty and not (out / "model_index.json").is_file():
        raise UserError(f"--out {out} exists and is no pipeline; give a new folder")
    about["text_source"] = str(run / "text") if about["text"] == "tiny" else HUB.get(about["text"], about["text"])
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
    print(f"same noise, same image in diffusers: {check}\nwrote {out}; to publish it: hf upload OWNER/NAME {out}")
    return 0


def load_pipeline(run: Path, about: dict):
    """diffusers' pipeline of a run, FP32 on CPU; its scheduler takes our time grid."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    text, vae, tokens = about["text_source"], HUB.get(about["vae"], about["vae"]), about.get("text_tokens", 256)
    try:
        transformer, report = diffusers.PRXTransformer2DModel.from_pretrained(
            run / "transformer", use_safetensors=True, output_loading_info=True)
        if report["missing_keys"] or report["unexpected_keys"]:
            raise ValueError("its weights are not those of diffusers' model, which has no --sprint and no scorer")
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
        raise UserError(f"{run} cannot be a pipeline of diffusers: {first_line(error)}") from None
    if getattr(vae.config, "shift_factor", 0.0) is None:  # the pipeline would add None
        vae.register_to_config(shift_factor=0.0)
    tokenizer.model_max_length = tokens  # the pipeline cuts and pads to it
    return diffusers.PRXPipeline(**parts, vae=vae.eval())


def compare_paintings(pipeline, run: Path, about: dict, folder: Path, steps: int = 4) -> str:
    """How far the run's own script and diffusers' pipeline, on our time grid, are apart with the same noise, in
    words. UserError for more than rounding: 1e-3 of 1 on average is a quarter of the values off by one of 255."""
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
        raise UserError(f"{run} paints another image with diffusers ({words}): not exported")
    return words


def describe_data(about: dict) -> tuple[str, str]:
    """A held-out caption, as a prompt, and a line for each data folder with its source and licence."""
    prompt, lines = PLAIN, []
    for folder in map(Path, about["folders"]):
        words = "was not there when the model was exported"
        with contextlib.suppress(UserError):  # it is gone, or holds nothing out
            index = read_index(folder)
            known = {key: index[key] for key in ("source", "license", "attribution") if key in index}
            words = json.dumps(known, ensure_ascii=False)
            if index.get("scenes"):
                words = "procedural scenes, drawn by data/scenes.py; no rights of others"
            prompt = HeldOut([folder], about["resolution"]).caption(0)
        lines.append(f"- {folder.name}: {words}")
    return prompt, "\n".join(lines)


def model_card(about: dict, out: Path, check: str) -> str:
    """README.md of an exported pipeline, from the files that came from the run."""
    prompt, data = describe_data(about)
    size = f"height={about['resolution']}, width={about['resolution']}, use_resolution_binning=False"
    picture = "![samples](samples.png)" if (out / "samples.png").is_file() else ""
    metrics, trained = "Not evaluated.", ""
    if (out / "metrics.json").is_file():
        result = json.loads((out / "metrics.json").read_text())
        metrics = f"```\n{table(result)}\n```\nProtocol {result['protocol_sha256']}; all of it is in metrics.json."
    if end := about.get("finished"):
        trained = f"{end['samples']:,} images in {end['elapsed']:.0f} s from process start to final weights on disk. "
    if about["pixels"]:
        frozen, lower = [], "Write prompts in lower case, as captions were prepared: this pipeline does not do it.\n"
    else:
        frozen, lower = [f"VAE {HUB.get(about['vae'], about['vae'])}"], ""
    frozen.append("the embedded text encoder, Apache-2.0" if about["text"] == "tiny" else about["text_source"])
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
import diffusers
pipeline = diffusers.{about['pipeline']}.from_pretrained({str(out)!r})
pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)  # shifted below
shift, steps = {about['shift']}, {about['sample_steps']}
grid = [1 - i / steps for i in range(steps)]
timesteps = [1000 * shift * t / (1 + (shift - 1) * t) for t in grid]
image = pipeline({prompt!r}, {size},
                 timesteps=timesteps, guidance_scale={max(1.0, about['cfg_scale'])}).images[0]
image.save('image.png')
```
{lower}The time grid is the trainer's; checked at export with 4 steps and the same noise: {check}.
Without `timesteps`, `num_inference_steps` gives diffusers' own grid.
Give one prompt at a time, for one image each: with guidance, diffusers 0.42.1 fails on more.

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


def common_flags(parser, steps: int | None) -> Callable:
    """Adds what `sample` and the default command share; returns the function that adds more."""
    add, default = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--steps", type=int, default=steps, help=f"of the sampler [{steps or 'of its grids'}]")
    add("--cfg", type=float, help="guidance scale [the run's cfg_scale]")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model [fp32]")
    add("--batch", type=int, help="images at a time [50; GPU: by their size]")
    add("--seed", type=int, default=0, help="of the noise, 0 to 199 [0]")
    add("--device", default=default, help="cpu, cuda (all GPUs) or cuda:N [%(default)s]")
    add("--ranks", type=int, help="painting processes [one for each GPU; CPU 1]")
    add("--trust", action="store_true", help=TRUST)
    return add


def check_flags(parser, args, least: int):
    for flag, low, high in (("n", least, REFERENCE), ("steps", 1, 1000), ("batch", 1, 10_000), ("ranks", 1, 64),
                            ("seed", 0, 199)):
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            parser.error(f"--{flag} {value} is not one of {low} to {high}")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(f"--device {args.device} is not on this machine: use cpu")


def parse_args(argv=None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = common_flags(parser, 16)
    add("run", nargs="*", type=Path, help="folder of a finished run, or exported from one")
    add("--data", help="folders with held-out captions, or scenes [as it was trained]")
    add("--real", type=Path, help="folder of real images, or a file of --save-stats")
    add("--fake", type=Path, help="folder of the images to judge")
    add("--save-stats", type=Path, help="write the statistics of --real to this file")
    add("--n", type=int, help="prompts and real images [scenes 2000; else all, up to 10000]")
    add("--metrics", default=",".join(DEFAULT_METRICS), help=f"of {', '.join(METRICS)} [%(default)s]")
    add("--sweep", metavar="cfg=1,2,3.5", help="a curve over cfg=..., steps=... or exports")
    add("--out", type=Path, help="folder to write into [the run's; none for --fake]")
    for kind in ("inception", "clip", "dino"):
        about = f"folder, Hugging Face repository, or none [data/networks/{kind}]"
        add(f"--{kind}", default=NETWORKS / kind, metavar="PATH", help=about)
    args = parser.parse_intermixed_args(argv)
    if len(args.run) > 1:
        parser.error(f"{args.run[0]} is no command: there are sample and export, or give a single run")
    args.run = args.run[0] if args.run else None
    if bool(args.run) == bool(args.fake) or args.fake and (args.sweep or not args.real):
        parser.error("give either the folder of a run, or --real DIR and --fake DIR")
    check_flags(parser, args, 2)
    args.metrics = [name.strip().replace("-", "_") for name in args.metrics.split(",")]
    if unknown := [name for name in args.metrics if name not in METRICS]:
        parser.error(f"--metrics {unknown[0]} is unknown: there are {', '.join(METRICS)}")
    return args


def sweep_points(run: Path, sweep: str) -> tuple[str, list]:
    """The axis of --sweep and, for each point, its place there and what it changes of the painting request."""
    axis, _, values = sweep.partition("=")
    if axis == "exports":
        folders = sorted(run.glob("exports/step-????????"))
        if not folders:
            raise UserError(f"{run} has no exports/, which training leaves with its sample grids")
        return axis, [(int(folder.name[5:]), {"transformer": f"exports/{folder.name}"}) for folder in folders]
    try:
        key, kind = {"cfg": ("cfg_scale", float), "steps": ("steps", int)}[axis]
        return axis, [(kind(value), {key: kind(value)}) for value in values.split(",")]
    except (KeyError, ValueError):
        raise UserError(f"--sweep {sweep} is not understood: give cfg=1,2,3.5, steps=4,8 or exports") from None


def load_networks(args) -> dict[str, Features]:
    """The networks that the metrics need, but for those that are `none`."""
    device = "cuda:0" if args.device == "cuda" else args.device
    sources = {METRICS[name].network: getattr(args, METRICS[name].network) for name in args.metrics}
    return {kind: Features(kind, source, device) for kind, source in sources.items() if str(source) != "none"}


def evaluate(args) -> int:
    """A run or two folders, one result or a curve. Exit code 2 where a metric failed."""
    out = args.out or args.run
    result = evaluate_run(args, out) if args.run else evaluate_folders(args)
    if out and not args.sweep:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "metrics.json", result)
        print(f"wrote {out / 'metrics.json'}")
    if result["failed"]:
        print("\n".join(result["failed"]), file=sys.stderr)
    return 2 if result["failed"] else 0


def evaluate_run(args, out: Path) -> dict:
    """Paints and judges a run at each point of --sweep. Returns the last result; a curve goes to sweep.json."""
    about = read_run(args.run, args.trust)
    task, networks, rows = task_of(about, args.data, args.n), None, []
    axis, points = sweep_points(args.run, args.sweep) if args.sweep else (None, [(None, {})])
    prompts = [prompt for part in task.prompts.values() for prompt in part]
    seeds = [seed for split, part in task.prompts.items() for seed in seeds_of(split, len(part), args.seed)]
    for place, changes in points:
        start, request = time.perf_counter(), request_of(about, args) | changes
        with Painting(args.run, prompts, seeds, request, painting_devices(args), out) as painting:
            if networks is None:  # while the processes start
                networks = load_networks(args)
                references = references_of(task, args.real, networks, 250)
            images = painting.images()
            seconds = time.perf_counter() - start
            result = judge(task, images, references, networks, args.metrics, out)
        told = {key: about[key] for key in ("track", "resolution", "shift", "predict", "script_sha256")}
        result["protocol"] |= told | request | {"train_seed": about["seed"], "seed": args.seed}
        finish_result(result, networks, args.device, start, paint=seconds)
        if axis:
            rows.append({axis: place} | {k: result[k] for k in ("protocol_sha256", "metrics", "intervals")})
            write_json(out / "sweep.json", {"axis": axis, "protocol": result["protocol"], "points": rows})
    if axis:
        draw_sweep(rows, axis, out / "sweep.png")
        print(f"wrote {out / 'sweep.json'}")
    draw_loss(args.run, out / "curve.png")
    return result


def main(argv=None) -> int:
    """Exit code 0; 2 for bad input and for metrics that could not be computed; 1 where the painting failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    other = {"sample": sample, "export": export}.get(argv[0] if argv else "")
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("start it without torchrun: it starts a process for each GPU, or --ranks N")
        return other(argv[1:]) if other else evaluate(parse_args(argv))
    except (UserError, OSError, Failure) as error:  # Python's own sentence of an OSError names the file
        print(error, file=sys.stderr)
        return 1 if isinstance(error, Failure) else 2


if __name__ == "__main__":
    sys.exit(main())
