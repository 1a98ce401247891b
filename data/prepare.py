"""Captioned images -> training shards, in pixel space.

    python data/prepare.py photos/ --out shards --size 32                   # an image folder with metadata.jsonl
    python data/prepare.py wds/ more/00000.tar --out shards --size 256      # WebDataset tars, or folders of them
    python train_prx.py --track micro --data shards                         # then train on them

SOURCE is one of
    an image folder   with metadata.jsonl (the Hugging Face ImageFolder convention), one JSON object per line:
                      {"file_name": "cats/1.jpg", "text": "a long caption", "text_short": "a cat"}; text_short may lack
    WebDataset tars   members KEY.jpg|jpeg|png|webp with KEY.txt (the caption) or KEY.json ("text" or "caption", and
                      "text_short"); read member by member, never unpacked to disk

Images are turned upright (EXIF), composited over white, cropped to the central square and resized. Captions are cleaned
by diffusers' own code for PRX prompts, so that training and sampling see the same text. What cannot be used is skipped,
counted by reason and named; by default that includes images smaller than --size, since enlarging them teaches blur.

DIR then holds, in the order of the source:
    train-00000.safetensors, ...   image uint8 [N, 3, H, W]; hash uint8 [N, 16], from the sha256 of each image's pixels;
                                   caption.long, and caption.short if every sample has one: UTF-8 bytes uint8 [total],
                                   of which caption i is offset[i]:offset[i + 1] by caption.long.offset int64 [N + 1]
    report.json                    what was read, kept and skipped, with the first 100 names for each reason
    index.json                     the contract with the trainer; written last, so without it DIR is incomplete
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import os
import shlex
import shutil
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # no other decoder of Pillow ever sees the bytes
MAX_BYTES = 100 * 10**6      # of an encoded image or a caption file
MAX_PIXELS = 100 * 10**6     # of an image, by its header
MAX_SIDE = 30_000            # pixels
MAX_CAPTION = 10_000         # characters: clean_text is quadratic, 10,000 hostile ones cost 3 s (measured)
NAMES_KEPT = 100             # names of skipped samples in report.json, per reason


class UserError(Exception):
    """Bad input: one sentence that names it and says what to do; exit code 2."""


class Reject(Exception):
    """This sample cannot be used; the message is the reason it is counted under."""


# ---- sources: each yields (name, image_bytes, {"long": str, "short": str | None}) ------------------------------------


def read_image_folder(path, skip=lambda name, reason: None):
    """Samples of an image folder, in the order of metadata.jsonl; `skip(name, reason)` hears of what cannot be read."""
    root = Path(path).resolve()
    with open(root / "metadata.jsonl", "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name = f"metadata.jsonl:{number}"
            try:
                info = parse_json(line)
                if not isinstance(info.get("file_name"), str):
                    raise Reject("bad metadata")
                name = info["file_name"]
                yield name, read_inside(root, name), captions(info)
            except Reject as reason:
                skip(name, str(reason))


def read_inside(root: Path, name: str) -> bytes:
    """The bytes of the file `name` in the folder `root` (resolved); Reject if it is missing, too large or elsewhere."""
    try:
        file = (root / name).resolve()  # follows links and "..": what counts is where the file really is
        if not file.is_relative_to(root):
            raise Reject("outside the folder")
        if not file.is_file():
            raise Reject("missing file")
        if file.stat().st_size > MAX_BYTES:
            raise Reject("too many bytes")
        return file.read_bytes()
    except (OSError, ValueError, RuntimeError):  # no permission, name too long; a null byte in it; a loop of links
        raise Reject("missing file") from None


def read_webdataset(paths, skip=lambda name, reason: None):
    """Samples of tars, in stream order; `skip` as above. Member names are labels, never paths."""
    for path in map(Path, paths):
        try:
            with tarfile.open(path, "r:") as tar:
                files = (m for m in tar if m.isreg() and split_name(m.name))  # no links, devices or hidden files
                for key, members in itertools.groupby(files, lambda m: split_name(m.name)[0]):
                    name = f"{path.name}:{key}"
                    try:
                        yield name, *read_group(tar, members)
                    except Reject as reason:
                        skip(name, str(reason))
                # tarfile takes a damaged header for the end of the archive; a real end is zeros, or the end of the file
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError
        except (tarfile.TarError, OSError, EOFError, ValueError):
            skip(path.name, "broken tar (what follows the damage is lost)")


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member, cut at the first dot of its file name as in WebDataset; None for hidden files."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def read_group(tar: tarfile.TarFile, members) -> tuple[bytes, dict]:
    """(image bytes, captions) of the members that share a key."""
    parts = {}
    for member in members:
        extension = split_name(member.name)[1]
        kind = "image" if extension in IMAGE_EXTENSIONS else extension
        if kind in ("image", "txt", "json") and kind not in parts:  # of several images under one key, the first
            if member.size > MAX_BYTES:
                raise Reject("too many bytes")
            parts[kind] = tar.extractfile(member).read()
    if "image" not in parts:
        raise Reject("no image under this key")
    info = parse_json(parts.get("json", b"{}"))
    try:
        text = parts.get("txt", b"").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Reject("caption not in UTF-8") from None
    return parts["image"], captions({**info, "text": text} if text.strip() else info)


def parse_json(data: bytes) -> dict:
    try:
        return dict(**json.loads(data))
    except (ValueError, TypeError, RecursionError):  # no JSON, no object, nested without end
        raise Reject("bad metadata") from None


def captions(info: dict) -> dict:
    """{"long": str, "short": str | None} of a metadata object; what is absent or no string is "" and None."""
    long, short = info.get("text") or info.get("caption"), info.get("text_short")
    return {"long": long if isinstance(long, str) else "", "short": short if isinstance(short, str) else None}


def find_source(paths: list[Path]) -> tuple[str, list[Path]]:
    """("image_folder", [folder]) or ("webdataset", tars), whichever `paths` are; UserError if they are neither."""
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; SOURCE is an image folder with metadata.jsonl, or WebDataset tars")
    if len(paths) == 1 and (paths[0] / "metadata.jsonl").is_file():
        return "image_folder", paths
    tars = []
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [f for f in files if f.suffix.lower() == ".tar" and f.is_file() and not f.name.startswith(".")]
        if not found:
            raise UserError(f"{path} has nothing to read: looked for .tar files and for metadata.jsonl; SOURCE is one "
                            "image folder with metadata.jsonl, or WebDataset tars and folders of them")
        tars += found
    return "webdataset", tars


# ---- one sample: bytes to pixels, caption to clean caption -----------------------------------------------------------


def decode(data: bytes, size: int, min_size: int) -> np.ndarray:
    """Encoded image -> uint8 [3, size, size], upright RGB, centre-cropped; Reject says why it cannot be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd but readable files, and of sizes that are judged here
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)  # the header only
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                raise Reject("too many pixels")
            if min(image.size) < min_size:
                raise Reject("smaller than --min-size")
            image.draft(None, (4 * size, 4 * size))  # JPEG: decode at 1/2, 1/4 or 1/8 while 4x the target remains
            image = ImageOps.exif_transpose(image)
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = to_rgb(image.crop((left, top, left + side, top + side)))
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        except Reject:
            raise
        except Image.DecompressionBombError:
            raise Reject("too many pixels") from None
        except UnidentifiedImageError:
            raise Reject("not a JPEG, PNG or WebP image") from None
        except Exception:  # hostile bytes raise OSError, SyntaxError, struct.error, zlib.error, ... out of the decoders
            raise Reject("broken image") from None
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that JPEG, PNG and WebP have -> RGB; transparency over white."""
    if image.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion clips at 255 where it should scale
        image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def clean(text: str) -> str:
    """The caption as diffusers' PRXPipeline cleans a prompt. Not idempotent: the trainer must not clean it again."""
    if len(text) > MAX_CAPTION:
        raise Reject("caption too long")
    return text_preprocessor().clean_text(text)


@functools.cache
def text_preprocessor():
    from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor  # 8 s, so not before the first good image
    return TextPreprocessor()


# ---- output ----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Fills shards in a hidden folder of `out`; `publish` moves them into place with the two JSON files."""

    def __init__(self, out: Path, size: int, shard_size: int):
        self.out, self.size, self.shard_size = out, size, shard_size
        self.partial = out / ".prepare.partial"  # in `out`, so that moving a file is a rename
        self.samples, self.shards = [], []  # of the shard being filled; index entries of those written
        self.kept = self.lacking_short = 0

    def add(self, image: np.ndarray, digest: bytes, long: str, short: str) -> None:
        """Takes uint8 [3, H, W], 16 bytes and two clean captions; an empty `short` means there is none."""
        self.samples.append((image, np.frombuffer(digest, np.uint8), long, short))
        self.kept += 1
        self.lacking_short += not short
        if len(self.samples) == self.shard_size:
            self.flush()

    def flush(self) -> None:
        images, digests, longs, shorts = zip(*self.samples)
        tensors = {"image": np.stack(images), "hash": np.stack(digests), **ragged("caption.long", longs)}
        if not self.lacking_short:  # so far; publish takes them out again where a later sample has none
            tensors |= ragged("caption.short", shorts)
        name = f"train-{len(self.shards):05d}.safetensors"
        self.partial.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.partial / name)
        self.shards.append({"file": name, "count": len(images), "height": self.size, "width": self.size})
        self.samples = []

    def publish(self, index: dict, report: dict) -> dict:
        """Returns the index as written. What an earlier run left goes first: no index ever names shards not its own."""
        if self.samples:
            self.flush()
        for shard in self.shards:
            file = self.partial / shard["file"]
            if self.lacking_short:
                tensors = load_file(file)
                if tensors.pop("caption.short", None) is not None:
                    del tensors["caption.short.offset"]
                    save_file(tensors, file)
            shard["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        index = {**index, "count": self.kept, "captions": ["long"] if self.lacking_short else ["long", "short"],
                 "buckets": [[self.size, self.size]], "shards": self.shards}
        for name, content in (("report.json", report), ("index.json", index)):
            (self.partial / name).write_text(json.dumps(content, indent=1) + "\n")
        for old in [self.out / "index.json", *self.out.glob("train-[0-9][0-9][0-9][0-9][0-9].safetensors")]:
            old.unlink(missing_ok=True)
        for name in [*(shard["file"] for shard in self.shards), "report.json", "index.json"]:  # the index last
            with open(self.partial / name, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self.partial / name, self.out / name)
        return index


def ragged(name: str, texts) -> dict[str, np.ndarray]:
    """N strings -> {name: uint8 [total UTF-8 bytes], name.offset: int64 [N + 1]}."""
    encoded = [text.encode("utf-8", "replace") for text in texts]
    offset = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return {name: np.frombuffer(b"".join(encoded), np.uint8), f"{name}.offset": offset}


# ---- all of it -------------------------------------------------------------------------------------------------------


def prepare(source, out, size=32, shard_size=1024, limit=None, min_size=None, overwrite=False) -> dict:
    """Writes the shards of `source` (a path or several) to the folder `out` and returns index.json's content.

    size, min_size: pixels; min_size, the smallest short side taken, is `size` unless given. shard_size: samples.
    limit: stop when that many are kept. Raises UserError for input that cannot be used, and `out` is then as it was."""
    sources = [Path(source)] if isinstance(source, (str, Path)) else [Path(s) for s in source]
    out, min_size = Path(out), size if min_size is None else min_size
    for flag, value in (("size", size), ("shard-size", shard_size), ("min-size", min_size), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"--{flag} is {value}: give 1 or more")
    kind, paths = find_source(sources)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if (out / "index.json").exists() and not overwrite:
        raise UserError(f"--out {out} already holds a prepared data set: --overwrite replaces it")

    skipped, digests = {}, set()

    def skip(name: str, reason: str) -> None:
        entry = skipped.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < NAMES_KEPT:
            entry["first"].append(name)

    writer = ShardWriter(out, size, shard_size)
    samples = read_image_folder(paths[0], skip) if kind == "image_folder" else read_webdataset(paths, skip)
    try:
        for name, data, texts in tqdm(samples, unit=" images", disable=None):  # None: only on a terminal
            try:
                image = decode(data, size, min_size)
                if not (long := clean(texts["long"])):
                    raise Reject("no caption")
                short, digest = clean(texts["short"] or ""), hashlib.sha256(image).digest()[:16]
                if digest in digests:
                    raise Reject("duplicate")
                digests.add(digest)
                writer.add(image, digest, long, short)
            except Reject as reason:
                skip(name, str(reason))
            if writer.kept == limit:
                break
        for reason, entry in skipped.items():  # repr: names come from strangers and may hold control characters
            more = ", ..." if entry["count"] > 3 else ""
            print(f"skipped {entry['count']}: {reason} ({', '.join(map(repr, entry['first'][:3]))}{more})")
        counts = {reason: entry["count"] for reason, entry in skipped.items()}
        read = writer.kept + sum(counts.values())
        if not writer.kept:
            sought = {"image_folder": "lines of metadata.jsonl with file_name and text",
                      "webdataset": "KEY.jpg, .jpeg, .png or .webp beside KEY.txt or KEY.json"}[kind]
            why = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
            raise UserError(f"{', '.join(map(str, sources))}: no usable image; looked for {sought} and found "
                            + (f"{read}, none of them good ({why})" if read else "none"))
        if 0 < writer.lacking_short < writer.kept:
            print(f"{writer.lacking_short} of {writer.kept} kept samples have no text_short, so the field is left out.")
        index = writer.publish(
            {"format": 1, "text_cleaning": "diffusers.PRXPipeline.clean_text", "latent": None, "skipped": counts,
             "source": {"kind": kind, "paths": [p.resolve().name for p in paths], "read": read, "min_size": min_size}},
            {"read": read, "kept": writer.kept, "skipped": skipped})
    finally:
        shutil.rmtree(writer.partial, ignore_errors=True)
    megabytes = sum((out / shard["file"]).stat().st_size for shard in index["shards"]) / 1e6
    print(f"kept {writer.kept} of {read} images, {len(index['shards'])} shards, {megabytes:.1f} MB; next:\n"
          f"python train_prx.py --track micro --data {shlex.quote(str(out))}")
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="an image folder, or WebDataset tars")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder for the shards")
    parser.add_argument("--size", type=int, default=32, help="pixels per side (default: %(default)s)")
    parser.add_argument("--min-size", type=int, help="skip images with a short side below this (default: --size)")
    parser.add_argument("--shard-size", type=int, default=1024, help="images per shard (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="stop when this many images are kept")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set that DIR holds")
    try:
        prepare(**vars(parser.parse_args()))
    except (UserError, OSError) as error:  # OSError: a full disk, no permission
        print(f"prepare.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
