"""The shard format: what data/scenes.py and data/prepare.py write and the trainer reads. data/README.md documents it.

    folder/index.json               what is there; written last, so a folder without it is incomplete
    folder/train-00000.safetensors  images and captions of one size; eval-... are held out
    folder/text/, folder/teacher/   the small networks that --text tiny and --repa-teacher tiny mean
    folder/empty.safetensors        the empty prompt's embedding, where text is stored

Here are a writer, a plain reader, the evaluation split, and the one function of this repository that opens pictures.
This file imports nothing of the repository.
"""

import functools
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = 2
NETWORKS = Path(__file__).resolve().parent / "networks"
NETWORK_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

PICTURES = ("JPEG", "PNG", "WEBP", "BMP")  # no other decoder of Pillow ever sees the bytes
MAX_PIXELS = 100 * 10**6                   # of a picture, by its header
MAX_SIDE = 30_000                          # pixels
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20  # bytes: Pillow's 1 MB loses sound pictures with long texts or profiles


class UserError(Exception):
    """Bad input, said in one sentence that names the file, value or flag."""


def command(script: str, *words) -> str:
    """A command line that runs as it is printed: this interpreter and a script of this repository, by their paths from
    the current folder."""
    here = Path.cwd()
    paths = (path.relative_to(here) if path.is_relative_to(here) else path for path in
             (Path(sys.executable), NETWORKS.parents[1] / script))
    return shlex.join(map(str, (*paths, *words)))


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write):
    """`write(temporary path)`, flushed to disk, then renamed: a file with this name is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)  # safetensors makes files that nobody but their owner can read
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict):
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda p: p.write_text(text))


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ragged(name: str, rows: list) -> dict[str, torch.Tensor]:
    """N byte strings or tensors (t_i, ...) -> {name: (sum of t_i, ...), name.offset: int64 (N + 1)}."""
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    if rows and isinstance(rows[0], bytes):
        data = torch.from_numpy(np.frombuffer(b"".join(rows), np.uint8).copy())
    else:
        data = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.uint8)
    return {name: data, f"{name}.offset": torch.from_numpy(ends)}


def write_shard(path: Path, tensors: dict, split: str, resolution: int, height: int, width: int, skip=()) -> dict:
    """Write one shard and return its entry for the index.

    tensors: as data/README.md lists them, `hash` among them; `ragged` makes the ragged ones. split: train or eval.
    resolution: the size in pixels that a stage asks for; height, width: of these images. skip: rows that do not count.
    """
    write_atomically(path, lambda p: save_file(tensors, p))
    return {"file": path.name, "split": split, "count": len(tensors["hash"]), "resolution": resolution,
            "height": height, "width": width, "skip": list(skip), "sha256": file_sha256(path)}


def copy_networks(folder: Path, text: Path = NETWORKS / "text") -> dict[str, str]:
    """Copy text/, from the folder `text`, and teacher/ into a folder; returns the index's `networks`."""
    for name, source in (("text", text), ("teacher", NETWORKS / "teacher")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in NETWORK_FILES:
            if (source / file).exists():
                content = (source / file).read_bytes()
                write_atomically(folder / name / file, lambda p: p.write_bytes(content))
    return network_hashes(text)


def network_hashes(text: Path = NETWORKS / "text") -> dict[str, str]:
    """{"text": sha256 of its weights, "teacher": ...} of the networks that travel with the shards."""
    folders = {"text": text, "teacher": NETWORKS / "teacher"}
    return {name: file_sha256(folder / "model.safetensors") for name, folder in folders.items()}


def write_index(folder: Path, index: dict):
    """Write index.json, last of all: {"format": 2} and the keys that data/README.md lists."""
    write_json(folder / "index.json", {"format": FORMAT} | index)


# ---- reading ---------------------------------------------------------------------------------------------------------


def data_folders(data: str) -> list[tuple[str, float]]:
    """A:0.7,B:0.3 -> [("A", 0.7), ("B", 0.3)]; without a weight it is 1. A folder that exists is taken by its name, a
    colon or commas in it included."""
    def entry(text):
        match = re.fullmatch(r"(.+):(\d*\.?\d+)", text)
        return (match[1], float(match[2])) if match and not Path(text).exists() else (text, 1.0)

    folders, pieces = [], data.split(",")
    while pieces:
        entries = [entry(",".join(pieces[:n + 1])) for n in range(len(pieces))]
        longest = max((n for n, (folder, _) in enumerate(entries) if Path(folder).exists()), default=0)
        folders.append(entries[longest])
        pieces = pieces[longest + 1:]
    if not all(folder and weight for folder, weight in folders):
        raise UserError(f"--data {data} is not a list of folders with positive weights such as A or A:0.7,B:0.3")
    return folders


def read_index(folder: Path) -> dict:
    """The content of index.json; UserError where it is missing, damaged or of another format."""
    path = Path(folder) / "index.json"
    if not path.exists():
        raise UserError(f"{folder} holds no index.json; give a folder that data/scenes.py or data/prepare.py wrote to "
                        "the end")
    try:
        index = dict(json.loads(path.read_text()))
        if index["format"] != FORMAT:
            raise UserError(f"{path} has format {index['format']}, this script reads {FORMAT}; prepare the data again")
        index["shards"] = [check_entry(dict(entry)) for entry in index["shards"]]
        if not index["shards"]:
            raise ValueError("no shards")
        for key in ("captions", "latent", "text", "image"):
            index[key]
        return index
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__} {error}); prepare the data again") from None


def check_entry(entry: dict) -> dict:
    """An entry of the index with its values as the types that they should have."""
    for key in ("count", "resolution", "height", "width"):
        entry[key] = int(entry[key])
    for key in ("file", "split", "sha256"):
        entry[key] = str(entry[key])
    entry["skip"] = [int(row) for row in entry["skip"]]
    if Path(entry["file"]).name != entry["file"]:
        raise ValueError(f"the file {entry['file']} is in another folder")
    return entry


def open_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, mapped: they read the file when they are indexed."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore the file or prepare the data again") from None


def open_shard(folder: Path, entry: dict) -> dict[str, torch.Tensor]:
    """The tensors of a shard of the index; UserError where it does not hold the rows that are promised."""
    path = Path(folder) / entry["file"]
    tensors = open_tensors(path)
    for key, tensor in tensors.items():
        if key.endswith(".offset"):
            length = entry["count"] + 1
        elif f"{key}.offset" in tensors:
            length = int(tensors[f"{key}.offset"][-1])
        else:
            length = entry["count"]
        if len(tensor) != length:
            raise UserError(f"{path} does not hold the {entry['count']} samples that its index promises ({key} has "
                            "another length); prepare the data again")
    if "hash" not in tensors:
        raise UserError(f"{path} has no tensor `hash`; prepare the data again")
    return tensors


def read_ragged(tensors: dict, key: str, row: int) -> torch.Tensor:
    start, end = tensors[f"{key}.offset"][row:row + 2].tolist()
    return tensors[key][start:end]


def read_caption(tensors: dict, row: int, field: str = "long") -> str:
    return read_ragged(tensors, f"caption.{field}", row).numpy().tobytes().decode()


def read_image(tensors: dict, row: int) -> torch.Tensor:
    """uint8 (3, H, W), whether the shard holds it raw, as JPEG or as PNG."""
    if "image" in tensors:
        return tensors["image"][row]
    key = "jpeg" if "jpeg" in tensors else "png"
    data = read_ragged(tensors, key, row).numpy().tobytes()
    image = Image.open(io.BytesIO(data), formats=[key.upper()])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class HeldOut:
    """The evaluation split of folders at one resolution, as caption(i) and image(i), in the order of the images'
    hashes: the same first n for everybody who has prepared the same images. No image counts twice.

    data: A or A:0.7,B:0.3 as --data takes it, or a list of folders. `stored`: do all folders hold images?
    """

    def __init__(self, data, resolution: int):
        folders = [path for path, _ in data_folders(data)] if isinstance(data, str) else list(data)
        found, self.stored = {}, True
        for folder in folders:
            index = read_index(Path(folder))
            self.stored = self.stored and bool(index["image"])
            for entry in index["shards"]:
                if entry["split"] != "eval" or entry["resolution"] != resolution:
                    continue
                tensors = open_shard(Path(folder), entry)
                for row in np.delete(np.arange(entry["count"]), entry["skip"]):
                    found[tensors["hash"][row].numpy().tobytes()] = tensors, int(row)
        self.rows = [found[key] for key in sorted(found)]
        if len(self.rows) < 2:
            raise UserError(f"{', '.join(map(str, folders))} holds {len(self.rows)} image(s) of {resolution} px for "
                            "evaluation, and at least 2 are needed; prepare more data, or with a larger --eval-share")

    def __len__(self):
        return len(self.rows)

    def caption(self, i: int, field: str = "long") -> str:
        tensors, row = self.rows[i]
        return read_caption(tensors, row, field)

    def image(self, i: int) -> torch.Tensor:
        """uint8 (3, H, W)."""
        tensors, row = self.rows[i]
        return read_image(tensors, row)


def shared_images(folders: list) -> int:
    """How many evaluation images of these folders are training images of one of them, by content hash."""
    hashes = {"train": [], "eval": []}
    for folder in map(Path, folders):
        for entry in read_index(folder)["shards"]:
            rows = np.delete(open_shard(folder, entry)["hash"].numpy(), entry["skip"], 0)[:, :8]
            hashes[entry["split"]].append(np.ascontiguousarray(rows).view(np.uint64).ravel())  # 2^64 hold 10^8 apart
    train, held_out = (np.concatenate([np.empty(0, np.uint64), *x]) for x in hashes.values())
    return int(np.isin(np.unique(held_out), train).sum())


def verify(folder: Path) -> int:
    """Compare every file that the index names with its sha256, networks included; returns how many there are."""
    folder = Path(folder)
    index = read_index(folder)
    expected = {entry["file"]: entry["sha256"] for entry in index["shards"]}
    for name, digest in index.get("networks", {}).items():
        expected[f"{name}/model.safetensors"] = digest
    for file, digest in expected.items():
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing; restore it or prepare the data again")
        if file_sha256(folder / file) != digest:
            raise UserError(f"{folder / file} is not the file that its index names (sha256 differs); restore it or "
                            "prepare the data again")
    return len(expected)


# ---- pictures --------------------------------------------------------------------------------------------------------


def read_picture(source, reduce_to: int | None = None) -> Image.Image:
    """A picture file (its bytes or its path) as an RGB image: the only place where this repository opens pictures.

    Upright by its EXIF tag, converted to sRGB by its ICC profile, transparency over white, 8 bits, the first frame of
    an animation. A damaged tag or profile is ignored, and so is what else a PNG holds beside its pixels. With
    reduce_to, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep that many pixels.
    UserError otherwise, for bytes with the reason alone.
    """
    name = "" if isinstance(source, bytes) else f"{source}: "
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"{name}{(error.strerror or str(error)).lower()}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd but readable files, and of sizes that are judged here
        for content in (data, *bare_pngs(data)):
            try:
                return decode(content, reduce_to)
            except (UserError, Image.DecompressionBombError):
                raise UserError(f"{name}too many pixels") from None
            except Image.UnidentifiedImageError:
                reason = "not a JPEG, PNG, WebP or BMP image"
            except Exception:  # hostile bytes raise OSError, SyntaxError, struct.error, ... out of the decoders
                reason = "broken image"
    raise UserError(f"{name}{reason}")


def decode(data: bytes, reduce_to: int | None) -> Image.Image:
    """Upright RGB in sRGB; UserError for too many pixels."""
    image = Image.open(io.BytesIO(data), formats=PICTURES)  # the header only
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise UserError("too many pixels")
    if reduce_to:
        image.draft(None, (reduce_to, reduce_to))
    image.load()
    upright = orientation(image)
    image = to_srgb(image)
    return image.transpose(upright) if upright is not None else image


def bare_pngs(data: bytes):
    """A PNG without texts, times, resolution and animation, then without profile and EXIF, too: one damaged or odd
    chunk ends Pillow's reading, and no pixel depends on these."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        chunks, start = [data[:8]], 8
        while start < len(data):
            end = start + 12 + int.from_bytes(data[start:start + 4], "big")
            chunks.append(data[start:end])
            start = end
        for more in ((b"iCCP", b"eXIf"), ()):
            kept = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", *more)
            yield b"".join(chunk for chunk in chunks if chunk is chunks[0] or chunk[4:8] in kept)


def orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright. Only this one tag is read: others may be damaged."""
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
             6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    try:
        return turns.get(image.getexif().get(0x0112))
    except Exception:  # Pillow's reader of EXIF raises whatever the bytes make it do
        return None


def to_srgb(image: Image.Image) -> Image.Image:
    """Any mode that these formats have -> RGB in sRGB, transparency over white."""
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion clips at 255 where it should scale
        values = np.asarray(image).astype(np.int32)
        transparent = image.info.get("transparency")
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if transparent is not None:
            alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        gray = image.mode in ("1", "L", "LA")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
        if gray:
            image = image.getchannel("R")  # so that a gray profile fits
    elif image.mode in ("1", "P", "PA", "LA"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    image = apply_profile(image, profile)
    if alpha is not None:
        image.paste("white", mask=alpha.point(lambda a: 255 - a))
    return image


def apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB, gray or CMYK -> RGB in sRGB. A profile that is damaged or for another kind of image is ignored."""
    if profile:
        try:
            space = profile[16:20]  # in the profile's header
            if space == b"RGB " and image.mode == "L":
                image = image.convert("RGB")
            fits = (image.mode, space) in (("RGB", b"RGB "), ("L", b"GRAY"), ("CMYK", b"CMYK"))
            transform = profile_transform(profile, image.mode) if fits else None
            if transform:
                return ImageCms.applyTransform(image, transform)
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.lru_cache(maxsize=32)
def profile_transform(profile: bytes, mode: str):
    """The transform to sRGB; None for a profile that moves no colour by more than 2 of 255, sRGB under another name."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "RGB":
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    else:
        colours = levels[None]
    probe = Image.fromarray(colours)
    moved = np.asarray(ImageCms.applyTransform(probe, transform), np.int32) - np.asarray(probe.convert("RGB"), np.int32)
    return transform if abs(moved).max() > 2 else None


def save_grid(images: torch.Tensor, prompts: list[str], path: Path, columns: int = 4):
    """Images uint8 (N, 3, H, W) as a PNG, the prompts printed underneath; small images are enlarged, pixels kept."""
    font, gap = ImageFont.load_default(size=11), 8
    zoom = max(1, 192 // images.shape[-1])
    across, down = images.shape[-1] * zoom, images.shape[-2] * zoom
    lines = [textwrap.wrap(prompt, max(10, across // 6))[:8] for prompt in prompts]
    text_height = 13 * max(map(len, lines)) + 4
    rows = math.ceil(len(images) / columns)
    size = columns * (across + gap) + gap, rows * (down + text_height + gap) + gap
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images.cpu(), lines)):
        x = gap + i % columns * (across + gap)
        y = gap + i // columns * (down + text_height + gap)
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(picture.resize((across, down), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + down + 2), "\n".join(text), fill="black", font=font, spacing=2)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
