"""How good are the pictures? FID, CMMD, DINO-MMD and, on scenes, exact prompt accuracy; and the model for others.

    python eval_prx.py logs/micro                              # a finished run on scenes: 2,000 held-out prompts
    python eval_prx.py logs/micro --n 10000 --steps 25 --cfg 3.5 --sampler heun --batch 500 --seed 1 --out results
    python eval_prx.py logs/micro --sweep cfg=1,2,3.5,5        # a curve, sweep.json and sweep.png; steps=4,8,16 too
    python eval_prx.py logs/micro --checkpoints all            # a curve over the checkpoints that the run has left
    torchrun --standalone --nproc_per_node=8 -- eval_prx.py logs/mini --n 10000    # the same from eight ranks; the
                                                               # `--` keeps torchrun from reading --n as its own
    python eval_prx.py --real photos --fake samples            # any two folders of images
    python eval_prx.py --real photos --fake samples --save-stats photos.safetensors   # then --real photos.safetensors
    python eval_prx.py --real photos --fake samples --inception inception-2015-12-05.pt \\
        --clip openai/clip-vit-large-patch14-336 --dino facebook/dinov2-with-registers-large  # published networks
    python eval_prx.py sample logs/micro "one object: a big red ring in the top left. behind, plain navy." --n 8
    python eval_prx.py export logs/24h --out pipeline          # a folder for diffusers, with a model card

A run on scenes is judged on scenes that training never shows: n prompts of the split `eval`, and n / 4 of `unseen`
(shape and colour pairs that training never has), reported apart. The reference is n other scenes of `eval`; the column
`real` has the same metrics for a second such set: what perfect samples would get. A run on prepared shards paints the
first n captions of their evaluation split, in the order of the images' hashes, and is compared with those images, or
with --real. Each prompt has its own noise, drawn from its index: ranks change nothing, and batches only the rounding of
a pixel now and then, 1e-6 of a metric. Written: metrics.json (protocol, its hash, metrics, 95 % intervals, seconds) and
samples.png. Two results compare where their `protocol_sha256` is equal.

The default feature networks are small ones trained on scenes (data/train_features.py): right for scenes, no measure of
photographs, and their numbers compare with nobody else's.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import train_prx
from data import scenes
from data.encoders import VAE, TextEncoder
from data.shards import HeldOut
from records import figures
from train_prx import UserError, World

ROOT = Path(__file__).resolve().parent
sys.modules.setdefault("eval_prx", sys.modules[__name__])  # what data/export.py imports, also when this is the script
NETWORKS = ROOT / "data" / "networks"
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
MAX_PIXELS, MAX_ASPECT = 100_000_000, 20
METRICS = {"inception": "fid", "clip": "cmmd", "dino": "dino_mmd"}  # by the kind of network
RECORD_N = {"micro": 2000, "mini": 2000, "24h": 10_000}  # images of a record's evaluation; records/README.md
GRID = 64  # images of a folder that are shown in its grid
RESAMPLES = 100  # of the bootstrap
WIDE = 512  # features of more dimensions are not kept for FID's bootstrap
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"  # inception-2015-12-05.pt
REFERENCE, SECOND = 10_000_000, 20_000_000  # where the two real sets begin in `eval`; prompts count from 0


# =====================================================================================================================
# Metrics: features in, one float out.
# =====================================================================================================================

class Moments:
    """Mean and covariance of features in float64, streamed: memory does not grow with N.

    update(features (N, D)) adds a batch; `mean` is (D,), `cov` (D, D) divides by N - 1, as FID's code does. Sums are
    relative to the first sample, so that large means cost no digits.
    """

    def __init__(self):
        self.n, self.origin, self.first, self.second = 0, None, 0.0, 0.0

    def update(self, features: torch.Tensor) -> "Moments":
        x = features.double()
        self.origin = x[0].clone() if self.origin is None else self.origin
        x = x - self.origin
        self.n, self.first, self.second = self.n + len(x), self.first + x.sum(0), self.second + x.T @ x
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Adds the samples of another set, a rank's for one: its sums are moved to this set's origin."""
        if not self.n:
            self.n, self.origin, self.first, self.second = other.n, other.origin, other.first, other.second
        elif other.n:
            d = other.origin - self.origin
            cross = torch.outer(other.first, d)
            self.n, self.first = self.n + other.n, self.first + other.first + other.n * d
            self.second = self.second + other.second + cross + cross.T + other.n * torch.outer(d, d)
        return self

    @property
    def mean(self) -> torch.Tensor:
        return self.origin + self.first / self.n

    @property
    def cov(self) -> torch.Tensor:
        if self.n < 2:
            raise UserError(f"FID needs at least 2 images in each set; one has {self.n}")
        return (self.second - torch.outer(self.first, self.first) / self.n) / (self.n - 1)


def fid(real: Moments, fake: Moments) -> float:
    """Frechet distance of two Gaussians, in squared feature units (FID: Heusel et al. 2017, arXiv 1706.08500).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). With S1 = A A^T and S2 = B B^T the last trace is the sum of the
    singular values of A^T B: real, and stable where a covariance is singular (fewer samples than features).
    """
    def root(cov):
        values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
        return vectors * values.clamp(min=0).sqrt()

    cross = torch.linalg.svdvals(root(real.cov).T @ root(fake.cov)).sum()
    return ((real.mean - fake.mean).square().sum() + real.cov.trace() + fake.cov.trace() - 2 * cross).item()


def mmd_terms(real, fake, counts=None, sigma: float = 10.0, scale: float = 1000.0, chunk: int = 1024):
    """scale * (E k(x, x') - 1), the same of (y, y') and of (x, y): a float and two of (R,), for `mmd`.

    counts (R, M): how often each fake sample counts, a row for each resample; without it each counts once, R = 1.
    """
    x, y = (F.normalize(features.double(), dim=1) for features in (real, fake))
    weights = torch.ones(1, len(y), dtype=torch.float64) if counts is None else counts.double()
    weights = weights / weights.sum(1, keepdim=True)

    def kernel(a, b):  # minus one: the ones cancel, and sigma 10 puts every k on the unit sphere close to 1
        return scale * torch.expm1((a @ b.T - 1).clamp(max=0) / sigma ** 2)

    xx = sum(kernel(part, x).sum() for part in x.split(chunk)) / len(x) ** 2
    yy = xy = 0.0
    for part, w in zip(y.split(chunk), weights.split(chunk, 1)):
        yy = yy + ((w @ kernel(part, y)) * weights).sum(1)
        xy = xy + w @ kernel(part, x).mean(1)
    return xx.item(), yy, xy


def mmd(real: torch.Tensor, fake: torch.Tensor, **options) -> float:
    """Squared maximum mean discrepancy of features (N, D) and (M, D), L2-normalised here, under an RBF kernel.

    scale * (E k(x, x') + E k(y, y') - 2 E k(x, y)), k = exp(-|x - y|^2 / (2 sigma^2)): the biased estimator, over all
    pairs with the diagonals, as in CMMD (Jayasumana et al. 2024, arXiv 2401.09603). float64, `chunk` rows at a time:
    memory is chunk * N.
    """
    xx, yy, xy = mmd_terms(real, fake, **options)
    return (xx + yy - 2 * xy).item()


def mmd_bias(xx: float, yy: float, n: int, m: int) -> float:
    """What two sets of n and m samples of one distribution get on average, from the first two of `mmd_terms`: the
    diagonals, k(x, x) = 1, weigh 1/n and 1/m. For CMMD about 10 (1 - |mean|^2) / n for each set."""
    return -xx / (n - 1) - yy / (m - 1)


def resample(n: int, resamples: int = RESAMPLES) -> torch.Tensor:
    """(resamples, n) float64: how often each of n samples is in each bootstrap resample. Always the same draws."""
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(n))
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())


def interval(value: float, resampled: torch.Tensor) -> list[float]:
    """95 % around `value`, from the metric of each resample (R,). The resamples are centred on the value, as drawing
    again from a sample adds the small-sample bias of FID and the MMDs a second time."""
    low, high = (resampled - resampled.mean()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [value + low, value + high]


def fid_of_resamples(real: Moments, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """FID (R,) of resamples of fake features (M, D): counts (R, M)."""
    x = rows.double()
    origin = x[0]
    values, vectors = torch.linalg.eigh((real.cov + real.cov.T) / 2)
    root, out = vectors * values.clamp(min=0).sqrt(), []
    for count in counts:
        total = count.sum()
        mean = origin + count @ (x - origin) / total
        centred = (x - mean) * (count / (total - 1)).sqrt()[:, None]
        cross = torch.linalg.eigvalsh(root.T @ (centred.T @ centred) @ root).clamp(min=0).sqrt().sum()
        out.append((real.mean - mean).square().sum() + real.cov.trace() + centred.square().sum() - 2 * cross)
    return torch.stack(out)


# =====================================================================================================================
# Feature networks: the small ones of this repository and the published ones load alike.
# =====================================================================================================================

MEAN_STD = {"inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1, 1]
            "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
            "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
            "inception-2015": ((128 / 255,) * 3, (128 / 255,) * 3)}  # (x - 128) / 128


def preprocess(images, size: int, kind: str, resize: str = "bicubic") -> torch.Tensor:
    """uint8 images, (N, 3, H, W) or a list of (3, H, W) -> FP32 (N, 3, size, size), normalised as `kind` expects.

    The shorter edge becomes `size`, antialiased bicubic, and the longer one is cropped around its centre: what the
    image processors of transformers do. uint8 and on CPU, where torch's bicubic gives Pillow's numbers.

    `inception-2015` squeezes the whole image into the square without rounding, as clean-fid (arXiv 2104.11222). With
    resize="legacy", FID's kinds get bilinear without antialiasing, as pytorch-fid: it aliases, and old numbers have it.
    """
    if not isinstance(images, torch.Tensor):
        if len({x.shape for x in images}) > 1:
            return torch.cat([preprocess(x[None], size, kind, resize) for x in images])
        images = torch.stack(list(images))
    if images.dtype != torch.uint8:  # the range of floats would be a guess, and a wrong one inverts or wraps the image
        raise TypeError(f"images must be uint8 in 0..255, not {images.dtype}")
    x, (h, w) = images.cpu(), images.shape[-2:]
    if (h, w) != (size, size) and "inception" in kind and (resize == "legacy" or kind == "inception-2015"):
        how = dict(mode="bilinear") if resize == "legacy" else dict(mode="bicubic", antialias=True)
        x = F.interpolate(x.float(), (size, size), **how).clamp(0, 255)
    elif (h, w) != (size, size):
        height, width = (size, size * w // h) if h <= w else (size * h // w, size)
        top, left = (height - size) // 2, (width - size) // 2
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)[:, :, top:top + size, left:left + size]
    mean, std = (torch.tensor(v)[:, None, None] for v in MEAN_STD[kind])
    return (x.float() / 255 - mean) / std


def sha256_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Over names and values, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Features:
    """A network that turns images into features: `inception` (pooled), `clip` (projected) or `dino` (global feature).

    `source`: a folder or a repository on the Hugging Face hub with a ResNet, CLIP, DINOv2-with-registers or DINOv3
    model, whose config's `image_size` is the input size; or, for `inception`, NVIDIA's TorchScript file of the network
    that FID is defined with (2015-12-05), which is loaded only when its checksum is the known one: TorchScript is code.
    Called with images as `preprocess` takes them: FP32 (N, D), on CPU.
    """

    def __init__(self, kind: str, source=None, device="cpu", resize: str = "bicubic"):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.kind, self.source, self.device, self.resize = kind, str(source or NETWORKS / kind), device, resize
        if kind == "inception" and self.source.endswith(".pt"):
            self.load_inception_2015()
            return
        self.inputs = kind
        loader = transformers.CLIPVisionModelWithProjection if kind == "clip" else transformers.AutoModel
        try:
            self.model, report = loader.from_pretrained(self.source, dtype=torch.float32, output_loading_info=True,
                                                        use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--{kind} {self.source} cannot be loaded ({reason}); give a folder or repository of such "
                            f"a network, or --{kind} none to go without") from None
        self.size = getattr(self.model.config, "image_size", None)
        if report["missing_keys"] or not isinstance(self.size, int):  # what is missing would be drawn at random
            lacks = min(report["missing_keys"], default="image_size in its config.json")
            raise UserError(f"--{kind} {self.source} is not such a network: it lacks {lacks}")
        self.model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.sha256 = sha256_tensors(self.model.state_dict())

    def load_inception_2015(self):
        try:
            data = Path(self.source).read_bytes()
        except OSError as error:
            raise UserError(f"--inception {self.source} cannot be read ({error.strerror}); give NVIDIA's "
                            "inception-2015-12-05.pt, a folder, or none to go without FID") from None
        self.inputs, self.size, self.sha256 = "inception-2015", 299, hashlib.sha256(data).hexdigest()
        if self.sha256 != INCEPTION_SHA256:
            raise UserError(f"--inception {self.source} has sha256 {self.sha256} and is not loaded: NVIDIA's "
                            f"inception-2015-12-05.pt has {INCEPTION_SHA256}; download it again")
        script = torch.jit.load(io.BytesIO(data), map_location=self.device).eval()
        self.model = lambda pixel_values: script.layers(pixel_values).flatten(1)  # its own resize is left out

    @torch.inference_mode()
    def __call__(self, images, batch: int = 250) -> torch.Tensor:
        out = []
        for i in range(0, len(images), batch):
            x = preprocess(images[i:i + batch], self.size, self.inputs, self.resize)
            x = x.to(self.device, memory_format=torch.channels_last)
            with torch.backends.cudnn.flags(allow_tf32=False):
                y = self.model(pixel_values=x)
            y = y if self.inputs == "inception-2015" else y.image_embeds if self.kind == "clip" else y.pooler_output
            out.append(y.flatten(1).float().cpu())
        return torch.cat(out)

    def describe(self) -> dict:
        """For the protocol: source, input size, resize, and sha256 of the weights."""
        source = Path(self.source)
        return {"source": str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else self.source,
                "size": self.size, "resize": self.resize if self.kind == "inception" else "bicubic",
                "sha256": self.sha256}


# =====================================================================================================================
# Sets of images: what the metrics need to know of them, kept in a file, gathered from ranks, compared.
# =====================================================================================================================

class ImageSet:
    """What the metrics need to know of a set of images: moments for FID, the features themselves for the MMDs."""

    def __init__(self, networks: dict[str, Features], batches=()):
        self.networks, self.moments, self.rows = networks, Moments(), {kind: [] for kind in METRICS}
        for images in batches:
            self.add(images)

    def add(self, images):
        for kind, network in self.networks.items():
            features = network(images)
            if kind == "inception":
                self.moments.update(features)
            if kind != "inception" or features.shape[1] <= WIDE:
                self.rows[kind].append(features)

    def features(self, kind: str) -> torch.Tensor | None:  # (N, D) FP32
        return torch.cat(self.rows[kind]) if self.rows[kind] else None

    def state(self) -> dict[str, torch.Tensor]:
        moments = vars(self.moments).items() if self.moments.n else ()
        return ({kind: torch.cat(rows) for kind, rows in self.rows.items() if rows}
                | {f"moments.{key}": torch.as_tensor(value) for key, value in moments})

    def merge(self, state: dict[str, torch.Tensor]) -> "ImageSet":
        for kind in self.networks:
            if kind in state:
                self.rows[kind].append(state[kind])
        if "inception" in self.networks and "moments.n" in state:
            other = Moments()
            other.n = int(state["moments.n"])
            other.origin, other.first, other.second = (state[f"moments.{k}"] for k in ("origin", "first", "second"))
            self.moments.merge(other)
        return self

    def save(self, path: Path, about: dict):
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {key: value.contiguous() for key, value in self.state().items()}
        about = {"about": json.dumps(about), "sha256": sha256_tensors(state)}
        train_prx.write_atomically(path, lambda p: save_file(state, p, about))


def about_set(images: dict, networks: dict[str, Features]) -> dict:
    """What decides the statistics of a set: which images, and what looks at them."""
    looks = {kind: network.describe() for kind, network in networks.items()}
    return {"images": images, "networks": {kind: about | {"source": None} for kind, about in looks.items()}}


def sha256_json(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_statistics(path: Path, networks: dict[str, Features]) -> tuple[ImageSet, dict]:
    """A file of ImageSet.save, for the networks in use, and what it says about its images. UserError where it does not
    fit or is damaged."""
    try:
        with safe_open(path, "pt") as file:
            about, digest = json.loads(file.metadata()["about"]), file.metadata()["sha256"]
            state = {key: file.get_tensor(key) for key in file.keys()}
        if sha256_tensors(state) != digest:
            raise ValueError("its sha256 differs")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no statistics ({str(error).splitlines()[0]}); make them with --save-stats"
                        ) from None
    for kind, look in about_set({}, networks)["networks"].items():
        if about["networks"].get(kind) != look:
            raise UserError(f"{path} was made with {kind} {about['networks'].get(kind, 'none')}, now it is {look}; "
                            f"give the same network and --resize, or --{kind} none")
    return ImageSet(networks).merge(state), about["images"]


def shares(batches: list, world: World) -> list:
    """This rank's part, in order, of a list of batches: the same batches whatever the number of ranks."""
    return batches[len(batches) * world.rank // world.size:len(batches) * (world.rank + 1) // world.size]


def gather(value, world: World) -> list:
    """Every rank's value, in order, on rank 0; [] elsewhere."""
    if world.size == 1:
        return [value]
    out = [None] * world.size if world.rank == 0 else None
    dist.gather_object(value, out, group=world.control)
    return out or []


def gather_set(part: ImageSet, world: World) -> ImageSet:
    """The union of the ranks' parts on rank 0."""
    whole = ImageSet(part.networks)
    for state in gather(part.state(), world):
        whole.merge(state)
    return whole


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prx"


def real_set(images: dict, batches: list, load, networks: dict[str, Features], world: World) -> ImageSet:
    """The statistics of real images, on rank 0: from the cache, by a hash of their content and of the networks, or from
    the images load(batch), which are then cached. A damaged file there is made again."""
    if not networks:
        return ImageSet({})
    about = about_set(images, networks)
    path, whole = cache_folder() / f"{sha256_json(about)}.safetensors", None
    if world.rank == 0 and path.exists():
        try:
            whole = load_statistics(path, networks)[0]
        except UserError as error:
            print(f"the cache is passed over and made again: {error}")
    if not world.agree(float(whole is not None))[0]:
        whole = gather_set(ImageSet(networks, map(load, shares(batches, world))), world)
        try:
            if world.rank == 0:
                whole.save(path, about)
        except OSError as error:
            print(f"the reference is not cached in {path.parent} ({error})")
    return whole


def compare_with_intervals(real: ImageSet, fake: ImageSet) -> dict:
    """`metrics` of `compare`, their bootstrap `intervals` over the fake samples (the reference is given; for FID up to
    512 features), the MMDs' small-sample `bias`, `notes`, and `failed`: sentences for what could not be computed."""
    out = {"metrics": {}, "intervals": {}, "bias": {}, "notes": [], "failed": []}
    for kind in real.networks:
        name, x, y = METRICS[kind], real.features(kind), fake.features(kind)
        try:
            if kind == "inception":
                out["metrics"][name] = value = fid(real.moments, fake.moments)
                few, dimensions = min(real.moments.n, fake.moments.n), len(real.moments.origin)
                if few <= dimensions:
                    out["notes"].append(f"FID: {few} images do not determine a covariance of {dimensions} features; "
                                        "take more to compare with others")
                if y is not None:
                    out["intervals"][name] = interval(value, fid_of_resamples(real.moments, y, resample(len(y))))
                continue
            if len(x) < 2 or len(y) < 2:
                raise UserError(f"{name} needs at least 2 images in each set, there are {len(x)} and {len(y)}")
            xx, yy, xy = mmd_terms(x, y, torch.cat([torch.ones(1, len(y)), resample(len(y))]))
            values = xx + yy - 2 * xy
            out["metrics"][name] = values[0].item()
            out["intervals"][name] = interval(values[0].item(), values[1:])
            out["bias"][name] = mmd_bias(xx, yy[0].item(), len(x), len(y))
        except (UserError, torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:
            out["failed"].append(f"{name} failed: {error}")
    return out


def compare(real: ImageSet, fake: ImageSet) -> dict[str, float]:
    """`fid`, `cmmd` and `dino_mmd` between two sets, as far as they have the networks; 0 is best."""
    out = {"fid": fid(real.moments, fake.moments)} if "inception" in real.networks else {}
    mmds = [kind for kind in real.networks if kind != "inception"]
    return out | {METRICS[kind]: mmd(real.features(kind), fake.features(kind)) for kind in mmds}


class Stopwatch(dict):
    """Seconds by name: `watch(name, function, *args)` calls the function and adds its time."""

    def __call__(self, name, function, *args):
        start = time.perf_counter()
        result = function(*args)
        self[name] = self.get(name, 0.0) + time.perf_counter() - start
        return result


# =====================================================================================================================
# Two folders of images.
# =====================================================================================================================

def list_images(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted; at least two."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds images")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_TYPES and p.is_file())
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} image(s) ({', '.join(IMAGE_TYPES)}, subfolders included), and at "
                        "least 2 are needed")
    return files


def load_image(path: Path) -> torch.Tensor:
    """uint8 (3, H, W), upright RGB. A file that cannot be read ends the evaluation: without it, it is another set."""
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # ours is below and names the file
    try:
        with Image.open(path) as image:
            w, h = image.size
            if w * h > MAX_PIXELS or max(w, h) > MAX_ASPECT * min(w, h):
                raise UserError(f"{path} is {w}x{h} pixels, which is more than {MAX_PIXELS:,} in all or than "
                                f"{MAX_ASPECT}:1; remove it")
            if image.mode[0] in "IF":
                raise UserError(f"{path} has pixels of more than 8 bits (mode {image.mode}); convert it")
            return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); repair or remove it") from None


def save_image(image: torch.Tensor, path: Path):  # uint8 (3, H, W)
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def describe_images(files: list[Path]) -> dict:
    """Number of images, sha256 over the files' contents in order, and how many sizes there are (from their headers)."""
    from PIL import Image

    digest, sizes = hashlib.sha256(), {}
    for path in files:
        digest.update(train_prx.file_sha256(path))
        try:
            with Image.open(path) as image:
                sizes[size] = sizes.get(size := "{}x{}".format(*image.size), 0) + 1
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} cannot be read as an image ({error}); repair or remove it") from None
    return {"n": len(files), "sha256": digest.hexdigest(), "sizes": len(sizes),
            "commonest_size": max(sizes, key=sizes.get)}


def folder_batches(folder: Path, batch: int, world: World) -> tuple[dict, list[list[Path]]]:
    files = list_images(folder)
    about = describe_images(files)
    if about["sizes"] > 1 and world.rank == 0:
        print(f"{folder}: {len(files)} images of {about['sizes']} different sizes; all are resized and cropped")
    return about, [files[i:i + batch] for i in range(0, len(files), batch)]


def load_images(paths: list[Path], seconds: Stopwatch) -> list[torch.Tensor]:
    return [seconds("read", load_image, path) for path in paths]


def real_from(real: Path, networks: dict[str, Features], batch: int, world: World, seconds) -> tuple[ImageSet, dict]:
    """The reference, and what images it has: of a folder, or of a file of --save-stats."""
    if real.is_file():
        return load_statistics(real, networks)
    about, parts = folder_batches(real, batch, world)
    load = lambda paths: load_images(paths, seconds)
    return seconds("reference", real_set, about, parts, load, networks, world), about


def evaluate_folders(real: Path, fake: Path, networks: dict[str, Features], batch: int, world: World = World(),
                     save_stats: Path | None = None, result: dict | None = None) -> dict:
    """Metrics between the images of two folders, with protocol and seconds. `real` may be a file of statistics."""
    seconds, result = Stopwatch(), {} if result is None else result
    protocol = {"weights": "images", "resize": "shorter edge, antialiased bicubic, centre crop"}
    result |= {"protocol": protocol, "metrics": {}, "intervals": {}, "seconds": seconds, "notes": [], "failed": []}

    reference, protocol["real"] = real_from(real, networks, batch, world, seconds)
    if save_stats and world.rank == 0:
        reference.save(save_stats, about_set(protocol["real"], networks))
        print(f"wrote {save_stats}; next time: --real {save_stats}")
    about, parts = folder_batches(fake, batch, world)
    protocol |= {"fake": about, "n": about["n"], "reference_sha256": protocol["real"]["sha256"]}
    images = ImageSet(networks)
    for part in shares(parts, world):
        seconds("features", images.add, load_images(part, seconds))
    images = gather_set(images, world)
    if any(Path(network.source).is_relative_to(NETWORKS) for network in networks.values()) and world.rank == 0:
        print("feature networks: small ones trained on scenes; for photographs give the published ones (see --help)")
    if world.rank == 0:
        compared = seconds("metrics", compare_with_intervals, reference, images)
        result |= {key: {"fake": compared[key]} for key in ("metrics", "intervals", "bias")}
        result |= {key: compared[key] for key in ("notes", "failed")}
    return result


# =====================================================================================================================
# A finished run: its networks, its prompts' noise, its images.
# =====================================================================================================================

def read_run(run: Path) -> dict:
    """The configuration, as its last stage ended, of a finished run or of a pipeline that `export` made of one."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run, it holds no config.json; give the folder of a finished one, as logs/micro")
    try:
        config = json.loads((run / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{run / 'config.json'} is damaged ({error}); train again or restore it") from None
    if not (run / "transformer" / "config.json").is_file():
        raise UserError(f"{run} is not finished: it holds no transformer/, which training writes at its end")
    return config | (config.get("plan") or [{}])[-1].get("knobs", {})


class Painter:
    """A run's networks: painter(prompts, noise (B, C, H, W), steps, cfg_scale, sampler) -> uint8 (B, 3, H, W), on CPU.
    """

    def __init__(self, run: Path, config: dict, device: str, guidance: str = "cfg"):
        if guidance == "self" and not config.get("tread"):
            raise UserError(f"--guidance self compares full with routed tokens, and {run} was not trained with --tread")
        self.model = train_prx.load_transformer(run / "transformer", device).eval()
        if guidance == "self":
            self.model.span = tuple(map(int, config["tread_blocks"].split("-")))
        self.config, self.device, self.skipped = config, device, config["tread"] if guidance == "self" else 0.0
        vae = run if (run / "vae").is_dir() else config["vae"]  # a pipeline brings its own
        self.vae = VAE(str(vae), device) if config["vae"] != "none" else None
        side = config["resolution"] // (self.vae.factor if self.vae else 1)
        self.noise_shape = (self.model.config["in_channels"], side, side)
        self.encoder = TextEncoder(config["text"], device, config["text_tokens"])
        self.null = self.encoder.encode([""])

    def __call__(self, prompts, noise, steps, cfg_scale, sampler="euler"):
        options = dict(steps=steps, cfg_scale=cfg_scale, shift=self.config["shift"], predict=self.config["predict"])
        inputs = (self.model, noise.to(self.device), *self.encoder.encode(prompts), *self.null)
        images = heun(*inputs, **options) if sampler == "heun" else train_prx.sample(
            *inputs, skipped=self.skipped, **options)
        return train_prx.to_uint8(self.vae.decode(images) if self.vae else images).cpu()


@torch.no_grad()
def heun(model, noise, text, mask, null_text, null_mask, *, steps: int, cfg_scale: float, shift: float, predict: str):
    """Heun's method, second order (as in EDM, arXiv 2206.00364, algorithm 1), on the grid of train_prx.sample and with
    its arguments. 2 * steps - 1 evaluations: the last step is Euler's, as the velocity at t = 0 is not trained."""
    def velocity(x, t):
        t = torch.full((len(x),), t, device=x.device)
        full = train_prx.velocity(model(x, t, text, mask), x, t, predict)
        if cfg_scale == 1:
            return full
        rest = null_text.expand(len(x), -1, -1), null_mask.expand(len(x), -1)
        null = train_prx.velocity(model(x, t, *rest), x, t, predict)
        return null + cfg_scale * (full - null)

    x, grid = noise, train_prx.shift_time(torch.linspace(1, 0, steps + 1), shift).tolist()
    for t, t_next in zip(grid, grid[1:]):
        v = velocity(x, t)
        if t_next > 0:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    return x


def prompt_noise(split: str, indices, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """FP32 (N, *shape): every prompt's own noise, a function of (seed, split, index) alone."""
    generators = (train_prx.generator_for("cpu", seed, split, index) for index in indices)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def read_checkpoint(folder: Path, kind: str = "ema") -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint of train_prx.py, FP32: the EMA where there is one, or with "raw" the masters.
    """
    try:
        ranks = json.loads((folder / "state.json").read_text())["ranks"]
        files = [safe_open(folder / f"rank-{rank}.safetensors", "pt") for rank in range(ranks)]
        found = {prefix: {key.removeprefix(prefix): file.get_tensor(key).float() for file in files
                          for key in file.keys() if key.startswith(prefix)}
                 for prefix in ("ema/", "master/")}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"checkpoint {folder} cannot be read ({error}); remove it") from None
    return found["ema/"] if kind == "ema" and found["ema/"] else found["master/"]


class SceneTask:
    """What a run on scenes is asked to paint, and what it is compared with: n prompts of the split `eval`, n / 4 of
    `unseen`, and two sets of n other scenes."""

    def __init__(self, config: dict, n: int):
        self.difficulty, self.resolution = scenes.difficulty_of(config["track"]), config["resolution"]
        self.counts = {"eval": n, "unseen": n // 4}
        about = lambda first: {"scenes": self.difficulty.protocol, "split": "eval", "range": [first, first + n],
                               "resolution": self.resolution}
        self.sets = [(about(first), range(first, first + n)) for first in (REFERENCE, SECOND)]
        self.protocol = {"scenes": self.difficulty.protocol, "split": "eval", "n": n, "n_unseen": n // 4,
                         "captions": "long", "reference": [REFERENCE, REFERENCE + n], "second": [SECOND, SECOND + n]}

    def prompts(self, split: str, indices) -> list[str]:
        return scenes.captions(scenes.draw_scenes(indices, split, self.difficulty))

    def score(self, split: str, indices, images) -> dict[str, torch.Tensor]:
        return scenes.score(images, scenes.draw_scenes(indices, split, self.difficulty))

    def real(self, indices) -> torch.Tensor:
        return scenes.render(scenes.draw_scenes(indices, "eval", self.difficulty), self.resolution)


class ShardTask:
    """The same of a run on prepared data: the first n held-out captions by hash and, as the reference, their images;
    the next n images are the second set, where there are as many."""

    def __init__(self, config: dict, n: int, data: str, needs_images: bool):
        self.held_out = held = HeldOut(data, config["resolution"])
        if n > len(held):
            raise UserError(f"--n {n} is more than the {len(held)} held-out images of {data}; give --n {len(held)}")
        if needs_images and not held.stored:
            raise UserError(f"{data} holds no images, only latents, and FID, CMMD and DINO-MMD need real ones: give "
                            "--real FOLDER or statistics, or prepare it with --store image (or jpeg)")
        about = lambda part: {"hashes": hashlib.sha256(b"".join(held.rows[i][0] for i in part)).hexdigest(),
                              "n": len(part), "resolution": config["resolution"]}
        parts = [range(n), range(n, 2 * n)][:2 if 2 * n <= len(held) else 1] if needs_images else []
        self.counts, self.sets = {"eval": n}, [(about(part), part) for part in parts]
        self.protocol = {"data": data, "split": "eval", "n": n, "held_out": len(held), "captions": "long"}

    def prompts(self, split: str, indices) -> list[str]:
        return [self.held_out.caption(i) for i in indices]

    def score(self, *_) -> dict:
        return {}

    def real(self, indices) -> list[torch.Tensor]:
        return [self.held_out.image(i) for i in indices]


def evaluate_run(config: dict, task, paint, networks: dict[str, Features], out: Path, *, steps: int, cfg: float,
                 batch: int, seed: int, sampler: str = "euler", weights: str = "ema", real: Path | None = None,
                 world: World = World(), result: dict | None = None) -> dict:
    """Metrics of a run on a SceneTask or ShardTask; writes samples.png into the folder `out`. `real`: a folder or a
    file of statistics instead of the task's own reference.

    The result is whole on rank 0 only; it is filled into `result` as it comes, so that a failure leaves what was there.
    """
    seconds, metrics, prompts_hash, fake = Stopwatch(), {}, hashlib.sha256(), ImageSet(networks)
    result = {} if result is None else result
    result |= {"metrics": metrics, "intervals": {}, "seconds": seconds, "notes": [], "failed": []}
    result["protocol"] = protocol = {
        "track": config["track"], "train_seed": config["seed"], "resolution": config["resolution"], **task.protocol,
        "sampler": sampler, "steps": steps, "cfg_scale": cfg, "seed": seed, "guidance": config.get("guidance", "cfg"),
        "shift": config["shift"], "predict": config["predict"], "precision": "fp32", "weights": weights}

    def batches(indices):
        return [indices[i:i + batch] for i in range(0, len(indices), batch)]

    if real:
        reference, protocol["real"] = real_from(real, networks, batch, world, seconds)
        protocol["reference_sha256"], second = protocol["real"]["sha256"], None
    else:
        real_sets = [seconds("reference", real_set, about, batches(part), task.real, networks, world)
                     for about, part in task.sets]
        reference, second = (*real_sets, None, None)[:2]
        protocol["reference_sha256"] = sha256_json(task.sets[0][0]) if task.sets else None
    for split, count in task.counts.items():
        for part in batches(range(count)):
            prompts_hash.update("\n".join([*task.prompts(split, part), ""]).encode())
        scores, shown = [], []
        for indices in shares(batches(range(count)), world):
            prompts = task.prompts(split, indices)
            noise = prompt_noise(split, indices, config["noise_shape"], seed)
            images = seconds("sample", paint, prompts, noise, steps, cfg, sampler)
            scores.append(seconds("accuracy", task.score, split, indices, images))
            if split == "eval":
                seconds("features", fake.add, images)
                shown += zip(images[:max(0, 32 - indices.start)], prompts)
            if sys.stderr.isatty() and world.rank == 0:
                print(f"\r{split}: {indices.stop} of {count} prompts", end="\n" * (indices.stop == count),
                      file=sys.stderr, flush=True)
        scores, shown = (sum(gather(part, world), []) for part in (scores, shown))
        if world.rank == 0:
            scores = {key: torch.cat([s[key] for s in scores]) for key in scores[0]}
            counts = resample(count) / count
            metrics[split] = {key: value.mean().item() for key, value in scores.items()}
            result["intervals"][split] = {key: interval(value.mean().item(), counts @ value)
                                          for key, value in scores.items()}
        if split == "eval" and world.rank == 0:
            images, prompts = zip(*shown)
            figures.save_grid(torch.stack(images), prompts, out / "samples.png", columns=8)
    protocol["prompts_sha256"], fake = prompts_hash.hexdigest(), gather_set(fake, world)
    if world.rank == 0 and networks:
        compared = seconds("metrics", compare_with_intervals, reference, fake)
        for key in ("metrics", "intervals"):
            result[key]["eval"] |= compared[key]
        result |= {"bias": {"eval": compared["bias"]}, "notes": compared["notes"], "failed": compared["failed"]}
        if second and not compared["failed"]:
            metrics["real"] = seconds("metrics", compare, reference, second)
    return result


def curve(points: list[dict], axis: str, run, out: Path | None):
    """Evaluates a run at each point with run(point) -> result; sweep.json grows with each, sweep.png ends it. On ranks
    other than 0, `out` is None and nothing is written."""
    rows = []
    for point in points:
        result = run(point)
        if not out:
            continue
        rows.append({axis: point[axis], "protocol_sha256": result["protocol_sha256"], "metrics": result["metrics"],
                     "intervals": result["intervals"]})
        text = json.dumps({"axis": axis, "protocol": result["protocol"], "points": rows}, indent=2) + "\n"
        train_prx.write_atomically(out / "sweep.json", lambda p: p.write_text(text))
    if not out:
        return
    plt = figures.plt
    names = [key for key in ("accuracy", *METRICS.values()) if key in rows[0]["metrics"]["eval"]]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.4), squeeze=False)
    x = [row[axis] for row in rows]
    for panel, name in zip(axes[0], names):
        y = np.array([row["metrics"]["eval"][name] for row in rows])
        bounds = np.array([row["intervals"]["eval"].get(name, (v, v)) for row, v in zip(rows, y)])
        panel.errorbar(x, y, np.abs(bounds.T - y), marker="o", capsize=3)
        panel.set(xlabel=axis, title=name)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "sweep.png", dpi=110)
    plt.close(figure)
    print(f"wrote {out / 'sweep.json'} and {out / 'sweep.png'}")


# =====================================================================================================================
# Sampling for people.
# =====================================================================================================================

def paint_prompts(run: Path, prompts: list[str], out: Path, *, n: int, steps: int | None, cfg: float | None,
                  guidance: str, sampler: str, seed: int, batch: int, device: str):
    """n images of each prompt, from a run's folder, as one grid `out`, or, where that is no .png, as single files in a
    folder `out` and the first 64 as a grid beside it. Prompts are cleaned as diffusers' PRXPipeline and data/prepare.py
    clean them. Says beforehand how long it takes."""
    from data.prepare import clean

    config = read_run(run)
    painter = Painter(run, config, device, guidance)
    cfg, steps = config["cfg_scale"] if cfg is None else cfg, steps or config["sample_steps"]
    jobs = [(prompt, i) for prompt in prompts for i in range(n)]
    batches = [jobs[i:i + batch] for i in range(0, len(jobs), batch)]

    def paint(part, steps):
        noise = torch.cat([prompt_noise(prompt, [i], painter.noise_shape, seed) for prompt, i in part])
        return painter([clean(prompt) for prompt, _ in part], noise, steps, cfg, sampler)

    paint(batches[0], 1)  # the first time is slower
    start = time.perf_counter()
    paint(batches[0], 1)
    one = time.perf_counter() - start
    print(f"{len(jobs)} images of {config['resolution']} px in {steps} steps on {device}: about "
          f"{one * len(batches) * steps * (2 if sampler == 'heun' else 1):.1f} s", flush=True)
    start, shown = time.perf_counter(), []
    single = not out.suffix
    for first, part in zip(range(0, len(jobs), batch), batches):
        images = paint(part, steps)
        shown += images[:max(0, GRID - first)] if single else images
        for number, image in enumerate(images if single else (), first):
            save_image(image, out / f"{number // n:05d}-{number % n:02d}.png")
        if sys.stderr.isatty():
            print(f"\r{first + len(part)} of {len(jobs)} images", end="\n" * (first + len(part) == len(jobs)),
                  file=sys.stderr, flush=True)
    path = out.with_name(out.name + ".png") if single else out  # not among the images, which may be evaluated
    figures.save_grid(torch.stack(shown), [prompt for prompt, _ in jobs[:len(shown)]], path,
                      columns=min(8, n if n > 1 else len(jobs)))
    print(f"wrote {path}" + f" and {len(jobs)} images in {out}" * single + f" in {time.perf_counter() - start:.1f} s")


# =====================================================================================================================
# Command line.
# =====================================================================================================================

def table(metrics: dict[str, dict[str, float]], intervals: dict | None = None) -> str:
    """A row for each metric, a column for each set of images, the first with half of its 95 % interval; accuracies in
    per cent."""
    first = next(iter(metrics), None)
    bounds = (intervals or {}).get(first, {})
    lines = [f"{'':<12}" + "".join(f"{c:>10}" + f"{'±95 %':>10}" * (c == first and bool(bounds)) for c in metrics)]
    for key in dict.fromkeys(key for values in metrics.values() for key in values):
        cell = "{:10.4f}" if key in METRICS.values() else "{:10.2%}"
        line = f"{key:<12}"
        for column, values in metrics.items():
            line += cell.format(values[key]) if key in values else " " * 10
            if column == first and bounds:
                line += cell.format((bounds[key][1] - bounds[key][0]) / 2) if key in bounds else " " * 10
        lines.append(line.rstrip())
    return "\n".join(lines)


HASHED = ("n", "n_unseen", "prompts_sha256", "reference_sha256", "resolution", "sampler", "steps", "cfg_scale",
          "guidance", "precision", "weights")


def finish_protocol(result: dict, networks: dict[str, Features], device: str, start: float, load: float):
    """Adds networks, device, versions and the hash of what decides whether two results compare."""
    packages = ("torch", "transformers", "diffusers", "numpy", "pillow")
    result["protocol"] |= {"features": {kind: network.describe() for kind, network in networks.items()}}
    hashed = {key: result["protocol"].get(key) for key in HASHED} | about_set({}, networks)
    result["protocol_sha256"] = sha256_json(hashed)
    result["protocol"] |= {"device": device, "versions": {name: metadata.version(name) for name in packages}}
    result["seconds"] = {"load": load, **result["seconds"], "total": time.perf_counter() - start}


def common_flags(parser, steps: int | None):
    parser.add_argument("--steps", type=int, default=steps, help=f"of the sampler [{steps or 'those of its grids'}]")
    parser.add_argument("--cfg", type=float, help="guidance scale [the run's cfg_scale]")
    parser.add_argument("--guidance", choices=("cfg", "self"), default="cfg", help="self: full against routed tokens")
    parser.add_argument("--sampler", choices=("euler", "heun"), default="euler", help="heun: two evaluations a step")
    parser.add_argument("--batch", type=int, default=250 if torch.cuda.is_available() else 50,  # fits a CPU's cache
                        help="images at a time [250 with CUDA, 50 without]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise [0]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")


def check_flags(parser, args, least: int):
    for flag, smallest in (("n", least), ("steps", 1), ("batch", 1)):
        if (getattr(args, flag) or smallest) < smallest or getattr(args, flag) == 0:
            parser.error(f"--{flag} {getattr(args, flag)} is too small: at least {smallest}")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(f"--device {args.device} is not on this machine: use cpu")
    if args.guidance == "self" and args.sampler == "heun":
        parser.error("--guidance self goes with --sampler euler")


def parse_args(argv=None) -> argparse.Namespace:
    parser = train_prx.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                              allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run, or exported from one")
    parser.add_argument("--data", help="prepared folders whose held-out captions are painted [those it was trained on]")
    parser.add_argument("--real", type=Path, help="folder of real images, or a file of --save-stats")
    parser.add_argument("--fake", type=Path, help="folder of the images to judge")
    parser.add_argument("--save-stats", type=Path, help="write the statistics of --real to this file")
    parser.add_argument("--n", type=int, help="held-out prompts, and images in the reference [the track's: 2000; 24h: "
                        "10000]")
    common_flags(parser, 16)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="raw: of the newest checkpoint")
    parser.add_argument("--sweep", metavar="cfg=1,2,3.5", help="a curve over cfg or steps")
    parser.add_argument("--checkpoints", choices=("all",), help="a curve over the run's checkpoints")
    parser.add_argument("--resize", choices=("bicubic", "legacy"), default="bicubic",
                        help="for FID: antialiased bicubic, or bilinear without antialiasing as old numbers have it")
    parser.add_argument("--out", type=Path, help="folder to write into [the run's; with --real none, only printed]")
    for kind, metric in (("inception", "FID"), ("clip", "CMMD"), ("dino", "DINO-MMD")):
        parser.add_argument(f"--{kind}", default=NETWORKS / kind, metavar="PATH",
                            help=f"{metric}'s network: folder, Hugging Face repository, or none [data/networks/{kind}]")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.fake is None) or args.fake and not args.real:
        parser.error("give either the folder of a run, or --real DIR and --fake DIR")
    check_flags(parser, args, 8)
    if (args.n or 0) > REFERENCE:
        parser.error(f"--n {args.n} would reach into the reference scenes: at most {REFERENCE}")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file: give a folder")
    if (args.sweep or args.checkpoints) and (args.fake or args.sweep and args.checkpoints):
        parser.error("--sweep and --checkpoints are for a run, one of them at a time")
    args.points = [{}]
    if args.sweep:
        axis, _, values = args.sweep.partition("=")
        try:
            args.points = [{axis: {"cfg": float, "steps": int}[axis](value)} for value in values.split(",")]
            if min(point[axis] for point in args.points) < (axis == "steps"):
                raise ValueError
        except (KeyError, ValueError):
            parser.error(f"--sweep {args.sweep} is not understood: give cfg=1,2,3.5 or steps=4,8,16")
    return args


def evaluate(args) -> int:
    """The default command: a run or two folders, one result or a curve. Exit code 2 where a metric failed."""
    start = time.perf_counter()
    world = train_prx.setup_world() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else World(device=args.device)
    speak = print if world.rank == 0 else lambda *_: None
    out, result = args.out or args.run, {}
    if args.run:  # what was asked for comes before what is slow to load
        config = read_run(args.run)
        usual = RECORD_N.get(config["track"], 2000)
        args.n = args.n or usual
        if args.n != usual:
            speak(f"--n {args.n}: records of track {config['track']} have {usual}, and FID and the MMDs compare only "
                  "at equal n")
        needs_images = not args.real and any(str(getattr(args, kind)) != "none" for kind in METRICS)
        task = SceneTask(config, args.n) if config["data"] == "scenes" else ShardTask(
            config, args.n, args.data or config["data"], needs_images)
        painter = Painter(args.run, config, world.device, args.guidance)
        config |= dict(guidance=args.guidance, noise_shape=painter.noise_shape)
        checkpoints = sorted((args.run / "checkpoint").glob("step-????????"))
        if (args.checkpoints or args.weights == "raw") and not checkpoints:
            raise UserError(f"{args.run} has no checkpoints; train with --milestone-hours to keep some")
        if args.checkpoints:
            args.points = [{"step": int(folder.name[5:]), "folder": folder} for folder in checkpoints]
        elif args.weights == "raw":
            args.points = [point | {"folder": checkpoints[-1]} for point in args.points]
    else:
        args.real.is_file() or list_images(args.real), list_images(args.fake)
    sources = {kind: getattr(args, kind) for kind in METRICS}
    networks = {kind: Features(kind, source, world.device, args.resize) for kind, source in sources.items()
                if str(source) != "none"}
    load = time.perf_counter() - start
    if out and world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)

    def run(point):
        """One evaluation; what there is of it is kept when it fails."""
        if "folder" in point:
            painter.model.load_state_dict(read_checkpoint(point["folder"], args.weights))
        cfg = config["cfg_scale"] if args.cfg is None else args.cfg
        result.clear()
        weights = "ema" if args.weights == "ema" and config["ema"] else "raw"
        evaluate_run(config, task, painter, networks, out, real=args.real, steps=point.get("steps", args.steps),
                     cfg=point.get("cfg", cfg), batch=args.batch, seed=args.seed, sampler=args.sampler, world=world,
                     weights=weights, result=result)
        return report()

    def report():
        finish_protocol(result, networks, str(world.device), start, load)
        for line in result["notes"]:
            speak(line)
        speak(table(result["metrics"], result["intervals"]))
        speak(", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items()))
        return dict(result)

    try:
        if args.fake:
            evaluate_folders(args.real, args.fake, networks, args.batch, world, args.save_stats, result)
            report()
        elif args.sweep or args.checkpoints:
            axis = "step" if args.checkpoints else args.sweep.partition("=")[0]
            curve(args.points, axis, run, out if world.rank == 0 else None)
        else:
            run(args.points[0])
    except BaseException:
        if out and world.rank == 0 and result.get("metrics"):
            (out / "metrics.partial.json").write_text(json.dumps(result, indent=2) + "\n")
            print(f"what there is so far is in {out / 'metrics.partial.json'}", file=sys.stderr)
        raise
    if world.rank:
        return 0
    if out and not (args.sweep or args.checkpoints):
        (out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {out / 'metrics.json'}" + f" and {out / 'samples.png'}" * bool(args.run))
        (out / "metrics.partial.json").unlink(missing_ok=True)
        if out == args.run and (out / "log.txt").is_file():  # the run's own log states what came of it
            with open(args.run / "log.txt", "a") as log:
                log.write(f"eval_prx.py: {json.dumps(result['protocol'])}\n"
                          f"{table(result['metrics'], result['intervals'])}\n")
    if result["failed"]:
        print("\n".join(result["failed"]), file=sys.stderr)
    return 2 if result["failed"] else 0


def sample_command(argv) -> int:
    from data.prepare import MAX_CAPTION

    parser = train_prx.Parser(prog="eval_prx.py sample", description=paint_prompts.__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a finished run, or exported from one")
    parser.add_argument("prompts", nargs="*", metavar="prompt", help="what to paint")
    parser.add_argument("--prompts", dest="file", type=Path, help="a file with a prompt on each line")
    parser.add_argument("--n", type=int, default=4, help="images of each prompt, each from its own noise [4]")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="a .png for a grid, or a folder for images")
    common_flags(parser, None)
    args = parser.parse_args(argv)
    check_flags(parser, args, 1)
    if args.out.suffix not in ("", ".png") or not args.out.name:
        parser.error(f"--out {args.out} is neither a .png nor the name of a folder")
    if args.file:
        try:
            args.prompts += [line.strip() for line in args.file.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            parser.error(f"--prompts {args.file} cannot be read ({error})")
    if not args.prompts:
        parser.error("nothing to paint: give a prompt, or --prompts FILE with one on each line")
    if (longest := max(map(len, args.prompts))) > MAX_CAPTION:
        parser.error(f"a prompt has {longest:,} characters: at most {MAX_CAPTION:,}")
    options = {key: value for key, value in vars(args).items() if key != "file"}
    paint_prompts(**options)
    return 0


def export_command(argv) -> int:
    from data.export import export

    parser = train_prx.Parser(prog="eval_prx.py export", description=export.__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="the pipeline's folder")
    parser.add_argument("--text-encoder", dest="text", choices=("copy", "reference"), default="copy",
                        help="reference: left on the hub, the model card's commands load it from there [copy]")
    parser.add_argument("--push", metavar="owner/name", help="upload to this (public) repository on the hub")
    export(**vars(parser.parse_args(argv)))
    return 0


def main(argv=None) -> int:
    """Exit code 0, or 2 for bad input and for metrics that could not be computed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"sample": sample_command, "export": export_command}
    try:
        if argv and argv[0] in commands:
            return commands[argv[0]](argv[1:])
        return evaluate(parse_args(argv))
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(error, file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
