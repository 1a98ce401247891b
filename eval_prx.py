"""How good are the pictures? FID, CMMD, DINO-MMD and, on scenes, exact prompt accuracy.

    python eval_prx.py logs/micro                              # a finished run on scenes: 2,000 held-out prompts
    python eval_prx.py logs/micro --n 10000 --steps 25 --cfg 3.5 --batch 500 --seed 1 --out results
    python eval_prx.py export logs/24h --out pipeline          # a run in latents -> a folder for diffusers' PRXPipeline
    python eval_prx.py --real photos --fake samples            # any two folders of images (png, jpg, webp)
    python eval_prx.py --real photos --fake samples --inception none \\
        --clip openai/clip-vit-large-patch14-336 --dino facebook/dinov2-with-registers-large  # published networks

A run is judged on scenes that training never shows: n prompts of the split `eval`, and n / 4 of `unseen` (shape and
colour pairs that training never has), reported apart. Each prompt has its own noise, drawn from its index, so the
batch size changes nothing. The reference is n other scenes of `eval`; the column `real` has the same metrics for a
second such set: what perfect samples would get. Written: metrics.json (protocol, metrics, seconds) and samples.png.

The default feature networks are small ones trained on scenes (data/train_features.py): right for scenes, no measure of
photographs, and their numbers compare with nobody else's.
"""

import argparse
import hashlib
import json
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train_prx
from data import scenes
from data.encoders import VAE, TextEncoder
from records import figures
from train_prx import UserError

ROOT = Path(__file__).resolve().parent
NETWORKS = ROOT / "data" / "networks"
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS, MAX_ASPECT = 100_000_000, 20
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


def mmd(real: torch.Tensor, fake: torch.Tensor, sigma: float = 10.0, scale: float = 1000.0, chunk: int = 2048) -> float:
    """Squared maximum mean discrepancy of features (N, D) and (M, D), L2-normalised here, under an RBF kernel.

    scale * (E k(x, x') + E k(y, y') - 2 E k(x, y)), k = exp(-|x - y|^2 / (2 sigma^2)): the biased estimator, over all
    pairs with the diagonals, as in CMMD (Jayasumana et al. 2024, arXiv 2401.09603). float64, `chunk` rows at a time:
    memory is chunk * N. It sums k - 1 (the ones cancel), as sigma 10 puts every k on the unit sphere close to 1.
    """
    x, y = (F.normalize(features.double(), dim=1) for features in (real, fake))

    def mean_kernel(a, b):
        rows = (torch.expm1((part @ b.T - 1).clamp(max=0) / sigma ** 2).sum() for part in a.split(chunk))
        return sum(rows) / (len(a) * len(b))

    return (scale * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))).item()


# =====================================================================================================================
# Feature networks: the small ones of this repository and the published ones load alike.
# =====================================================================================================================

MEAN_STD = {"inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1, 1]
            "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
            "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}  # ImageNet's


def preprocess(images, size: int, kind: str) -> torch.Tensor:
    """uint8 images, (N, 3, H, W) or a list of (3, H, W) -> FP32 (N, 3, size, size), normalised as `kind` expects.

    The shorter edge becomes `size`, antialiased bicubic, and the longer one is cropped around its centre: what the
    image processors of transformers do. uint8 and on CPU, where torch's bicubic gives Pillow's numbers.
    """
    if not isinstance(images, torch.Tensor):
        if len({x.shape for x in images}) > 1:
            return torch.cat([preprocess(x[None], size, kind) for x in images])
        images = torch.stack(list(images))
    if images.dtype != torch.uint8:  # the range of floats would be a guess, and a wrong one inverts or wraps the image
        raise TypeError(f"images must be uint8 in 0..255, not {images.dtype}")
    x, (h, w) = images.cpu(), images.shape[-2:]
    if (h, w) != (size, size):
        height, width = (size, size * w // h) if h <= w else (size * h // w, size)
        top, left = (height - size) // 2, (width - size) // 2
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)[:, :, top:top + size, left:left + size]
    mean, std = (torch.tensor(v)[:, None, None] for v in MEAN_STD[kind])
    return (x.float() / 255 - mean) / std


class Features:
    """A network that turns images into features: `inception` (pooled), `clip` (projected) or `dino` (global feature).

    `source`: a folder or a repository on the Hugging Face hub with a ResNet, CLIP or DINOv2-with-registers model, whose
    config's `image_size` is the input size. Called with images as `preprocess` takes them: float64 (N, D), on CPU.
    """

    def __init__(self, kind: str, source=None, device="cpu"):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.kind, self.source, self.device = kind, str(source or NETWORKS / kind), device
        loader = transformers.CLIPVisionModelWithProjection if kind == "clip" else transformers.AutoModel
        try:
            self.model, report = loader.from_pretrained(self.source, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--{kind} {self.source} cannot be loaded ({reason}); give a folder or repository of such "
                            f"a network, or --{kind} none to go without") from None
        self.size = getattr(self.model.config, "image_size", None)
        if report["missing_keys"] or not isinstance(self.size, int):  # what is missing would be drawn at random
            lacks = min(report["missing_keys"], default="image_size in its config.json")
            raise UserError(f"--{kind} {self.source} is not such a network: it lacks {lacks}")
        self.model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images, batch: int = 250) -> torch.Tensor:
        out = []
        for i in range(0, len(images), batch):
            x = preprocess(images[i:i + batch], self.size, self.kind)
            x = x.to(self.device, memory_format=torch.channels_last)
            with torch.backends.cudnn.flags(allow_tf32=False):
                y = self.model(pixel_values=x)
            out.append((y.image_embeds if self.kind == "clip" else y.pooler_output).flatten(1).double().cpu())
        return torch.cat(out)

    def describe(self) -> dict:
        """For the protocol: source, input size, and sha256 over names and FP32 values of all weights, by name."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        source = Path(self.source)
        return {"source": str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else self.source,
                "size": self.size, "sha256": digest.hexdigest()}


class ImageSet:
    """What the metrics need to know of a set of images: moments for FID, the features themselves for the MMDs."""

    def __init__(self, networks: dict[str, Features], batches=()):
        self.networks, self.moments, self.rows = networks, Moments(), {"clip": [], "dino": []}
        for images in batches:
            self.add(images)

    def add(self, images):
        for kind, network in self.networks.items():
            self.moments.update(network(images)) if kind == "inception" else self.rows[kind].append(network(images))


def compare(real: ImageSet, fake: ImageSet) -> dict[str, float]:
    """`fid`, `cmmd` and `dino_mmd` between two sets, as far as they have the networks; 0 is best."""
    out = {"fid": fid(real.moments, fake.moments)} if "inception" in real.networks else {}
    for kind, name in (("clip", "cmmd"), ("dino", "dino_mmd")):
        if kind in real.networks:
            out[name] = mmd(torch.cat(real.rows[kind]), torch.cat(fake.rows[kind]))
    return out


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


def evaluate_folders(real: Path, fake: Path, networks: dict[str, Features], batch: int) -> dict:
    """Metrics between the images of two folders, with protocol and seconds."""
    seconds, sets, protocol = Stopwatch(), [], {"resize": "shorter edge, antialiased bicubic, centre crop"}
    for name, folder in (("real", real), ("fake", fake)):
        files, sizes = list_images(folder), {}
        sets.append(ImageSet(networks))
        for i in range(0, len(files), batch):
            images = [seconds("read", load_image, path) for path in files[i:i + batch]]
            for x in images:
                size = f"{x.shape[2]}x{x.shape[1]}"
                sizes[size] = sizes.get(size, 0) + 1
            seconds("features", sets[-1].add, images)
        protocol[name] = {"folder": str(folder), "n": len(files), "sizes": len(sizes),
                          "commonest_size": max(sizes, key=sizes.get)}
        if len(sizes) > 1:
            print(f"{folder}: {len(files)} images of {len(sizes)} different sizes; all are resized and cropped")
    if any(Path(network.source).is_relative_to(NETWORKS) for network in networks.values()):
        print("feature networks: small ones trained on scenes; for photographs give the published ones (see --help)")
    return {"protocol": protocol, "metrics": {"fake": seconds("metrics", compare, *sets)}, "seconds": seconds}


# =====================================================================================================================
# A finished run on scenes.
# =====================================================================================================================

def read_run(run: Path) -> dict:
    """A finished run's configuration as its last stage ended."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run, it holds no config.json; give the folder of a finished one, as logs/micro")
    try:
        config = json.loads((run / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{run / 'config.json'} is damaged ({error}); train again or restore it") from None
    if not (run / "transformer" / "config.json").is_file():
        raise UserError(f"{run} is not finished: it holds no transformer/, which training writes at its end")
    return config | (config.get("plan") or [{}])[-1].get("knobs", {})


def load_run(run: Path, device: str, guidance: str = "cfg"):
    """A run's folder -> its configuration (dict) and paint(prompts, noise, steps, cfg_scale) -> uint8 images on CPU."""
    config = read_run(run)
    if config["data"] != "scenes":
        raise UserError(f"{run} was trained on {config['data']} and prompt accuracy needs scenes, whose truth is "
                        "known; compare two folders of images with --real and --fake")
    model = train_prx.load_transformer(run / "transformer", device).eval()
    if guidance == "self" and not config.get("tread"):
        raise UserError(f"--guidance self compares full with routed tokens, and {run} was not trained with --tread")
    if guidance == "self":
        model.span = tuple(map(int, config["tread_blocks"].split("-")))
    skipped = config["tread"] if guidance == "self" else 0.0
    config["guidance"] = guidance
    vae = VAE(config["vae"], device) if config["vae"] != "none" else None
    side = config["resolution"] // (vae.factor if vae else 1)
    config["noise_shape"] = (model.config["in_channels"], side, side)
    encoder = TextEncoder(config["text"], device, config["text_tokens"])
    null = encoder.encode([""])

    def paint(prompts, noise, steps, cfg_scale):
        images = train_prx.sample(model, noise.to(device), *encoder.encode(prompts), *null, steps=steps,
                                  skipped=skipped, cfg_scale=cfg_scale, shift=config["shift"],
                                  predict=config["predict"])
        return train_prx.to_uint8(vae.decode(images) if vae else images).cpu()

    return config, paint


def prompt_noise(split: str, indices, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """FP32 (N, *shape): every prompt's own noise, a function of (seed, split, index) alone."""
    generators = (train_prx.generator_for("cpu", seed, split, index) for index in indices)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def evaluate_run(config: dict, paint, networks: dict[str, Features], out: Path, *, n: int, steps: int, cfg: float,
                 batch: int, seed: int) -> dict:
    """Prompt accuracy and metrics of a run as `load_run` gives it; writes samples.png into the folder `out`."""
    difficulty, res = scenes.difficulty_of(config["track"]), config["resolution"]
    seconds, metrics, fake, prompts_hash, shown = Stopwatch(), {}, ImageSet(networks), hashlib.sha256(), []
    for split, count in (("eval", n), ("unseen", n // 4)):
        scores = []
        for start in range(0, count, batch):
            indices = range(start, min(start + batch, count))
            wanted = scenes.draw_scenes(indices, split, difficulty)
            prompts = scenes.captions(wanted)
            prompts_hash.update("\n".join([*prompts, ""]).encode())
            noise = prompt_noise(split, indices, config["noise_shape"], seed)
            images = seconds("sample", paint, prompts, noise, steps, cfg)
            scores.append(seconds("accuracy", scenes.score, images, wanted))
            if split == "eval":
                seconds("features", fake.add, images)
                shown += zip(images[:max(0, 32 - start)], prompts)
            if sys.stderr.isatty():
                print(f"\r{split}: {indices.stop} of {count} prompts", end="\n" * (indices.stop == count),
                      file=sys.stderr, flush=True)
        metrics[split] = {key: torch.cat([s[key] for s in scores]).mean().item() for key in scores[0]}

    images, prompts = zip(*shown)
    figures.save_grid(torch.stack(images), prompts, out / "samples.png", columns=8)

    def real_set(first):
        ranges = (range(first + i, first + min(i + batch, n)) for i in range(0, n, batch))
        return ImageSet(networks, (scenes.render(scenes.draw_scenes(r, "eval", difficulty), res) for r in ranges))

    reference, second = (seconds("reference", real_set, first) for first in (REFERENCE, SECOND))
    metrics["eval"] |= seconds("metrics", compare, reference, fake)
    metrics["real"] = seconds("metrics", compare, reference, second)
    protocol = {"track": config["track"], "train_seed": config["seed"], "scenes": difficulty.protocol,
                "resolution": res, "split": "eval", "n": n, "n_unseen": n // 4, "captions": "long",
                "prompts_sha256": prompts_hash.hexdigest(), "reference": [REFERENCE, REFERENCE + n],
                "second": [SECOND, SECOND + n], "sampler": "euler", "steps": steps, "cfg_scale": cfg, "seed": seed,
                "guidance": config.get("guidance", "cfg"),
                "shift": config["shift"], "predict": config["predict"], "precision": "fp32", "weights": "transformer/"}
    return {"protocol": protocol, "metrics": metrics, "seconds": seconds}


def export(run: Path, out: Path):
    """A finished run in latents -> a pipeline folder that diffusers' PRXPipeline.from_pretrained loads, with copies of
    its VAE, text encoder and tokenizer. UserError for what PRXPipeline cannot do."""
    config = read_run(run)
    if config["vae"] == "none" or config["predict"] != "v":
        raise UserError(f"{run} has --vae {config['vae']} --predict {config['predict']}, and PRXPipeline paints in "
                        "latents with v; its transformer/ folder can be used by itself")
    if "span" in json.loads((run / "transformer/config.json").read_text()):
        raise UserError(f"{run} was trained with --sprint or a learned scorer, which diffusers' model does not have")
    import diffusers

    vae = VAE(config["vae"]).model
    if not hasattr(vae.config, "scaling_factor"):
        raise UserError(f"{run} has the latents of {type(vae).__name__}, which PRXPipeline cannot decode; its "
                        "transformer/ folder can be used by itself")
    if getattr(vae.config, "shift_factor", 0.0) is None:  # the pipeline would add None
        vae.register_to_config(shift_factor=0.0)
    text = TextEncoder(config["text"], "cpu", config["text_tokens"])
    text.tokenizer.model_max_length = config["text_tokens"]  # the pipeline cuts and pads to it
    pipeline = diffusers.PRXPipeline(
        transformer=diffusers.PRXTransformer2DModel.from_pretrained(run / "transformer"), vae=vae,
        text_encoder=text.model, tokenizer=text.tokenizer, default_sample_size=config["resolution"],
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=config["shift"]))
    pipeline.save_pretrained(out)
    side, binned = config["resolution"], config["resolution"] in (256, 512, 1024)
    print(f"wrote {out}; next:\nimport diffusers\npipeline = diffusers.PRXPipeline.from_pretrained({str(out)!r})\n"
          f"pipeline('a red ring', height={side}, width={side}, guidance_scale={config['cfg_scale']}"
          + ", use_resolution_binning=False" * (not binned) + ").images[0].save('ring.png')")


# =====================================================================================================================
# Command line.
# =====================================================================================================================

def table(metrics: dict[str, dict[str, float]]) -> str:
    """A row for each metric, a column for each set of images; accuracies in per cent."""
    lines = [f"{'':<12}" + "".join(f"{column:>10}" for column in metrics)]
    for key in dict.fromkeys(key for values in metrics.values() for key in values):
        cell = "{:10.4f}" if key in ("fid", "cmmd", "dino_mmd") else "{:10.2%}"
        lines.append(f"{key:<12}" + "".join(cell.format(v[key]) if key in v else " " * 10 for v in metrics.values()))
    return "\n".join(lines)


def parse_args(argv=None) -> argparse.Namespace:
    parser = train_prx.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                              allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run on scenes")
    parser.add_argument("--real", type=Path, help="folder of real images")
    parser.add_argument("--fake", type=Path, help="folder of the images to judge")
    parser.add_argument("--n", type=int, default=2000, help="held-out prompts, and scenes in the reference [2000]")
    parser.add_argument("--steps", type=int, default=16, help="Euler steps [16]")
    parser.add_argument("--cfg", type=float, help="guidance scale [the run's cfg_scale]")
    parser.add_argument("--guidance", choices=("cfg", "self"), default="cfg", help="self: full against routed tokens")
    parser.add_argument("--batch", type=int, default=250 if torch.cuda.is_available() else 50,  # fits a CPU's cache
                        help="images at a time; changes no result [250 with CUDA, 50 without]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise [0]")
    parser.add_argument("--out", type=Path, help="folder to write into [the run's; with --real none, only printed]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    for kind, metric in (("inception", "FID"), ("clip", "CMMD"), ("dino", "DINO-MMD")):
        parser.add_argument(f"--{kind}", default=NETWORKS / kind, metavar="PATH",
                            help=f"{metric}'s network: folder, Hugging Face repository, or none [data/networks/{kind}]")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.real is None) or (args.real is None) != (args.fake is None):
        parser.error("give either the folder of a run, or --real DIR and --fake DIR")
    for flag, least in (("n", 8), ("steps", 1), ("batch", 1)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag} {getattr(args, flag)} is too small: at least {least}")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(f"--device {args.device} is not on this machine: use cpu")
    if args.n > REFERENCE:
        parser.error(f"--n {args.n} would reach into the reference scenes: at most {REFERENCE}")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file: give a folder")
    return args


def main(argv=None) -> int:
    start, argv = time.perf_counter(), sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["export"]:
            parser = train_prx.Parser(prog="eval_prx.py export", description=export.__doc__, allow_abbrev=False)
            parser.add_argument("run", type=Path, help="folder of a finished run in latents")
            parser.add_argument("--out", type=Path, required=True, help="the pipeline's folder")
            export(**vars(parser.parse_args(argv[1:])))
            return 0
        args = parse_args(argv)
        out = args.out or args.run
        if args.run:  # what was asked for comes before what is slow to load
            config, paint = load_run(args.run, args.device, args.guidance)
        else:
            list_images(args.real), list_images(args.fake)
        sources = {kind: getattr(args, kind) for kind in MEAN_STD}
        networks = {kind: Features(kind, source, args.device) for kind, source in sources.items() if source != "none"}
        load = time.perf_counter() - start
        if args.run:
            cfg = config["cfg_scale"] if args.cfg is None else args.cfg
            result = evaluate_run(config, paint, networks, out, n=args.n, steps=args.steps, cfg=cfg, batch=args.batch,
                                  seed=args.seed)
        else:
            result = evaluate_folders(args.real, args.fake, networks, args.batch)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    packages = ("torch", "transformers", "diffusers", "numpy", "pillow")
    result["protocol"] |= {"features": {kind: network.describe() for kind, network in networks.items()},
                           "device": args.device, "versions": {name: metadata.version(name) for name in packages}}
    result["seconds"] = {"load": load, **result["seconds"], "total": time.perf_counter() - start}
    print(table(result["metrics"]))
    print(", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items()))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {out / 'metrics.json'}" + f" and {out / 'samples.png'}" * bool(args.run))
    if args.run and out == args.run:  # the run's own log states what came of it
        with open(args.run / "log.txt", "a") as log:
            log.write(f"eval_prx.py: {json.dumps(result['protocol'])}\n{table(result['metrics'])}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
