"""Captioned procedural scenes: the embedded data set, exact and the same on every machine.

    python data/scenes.py --track micro           # writes the training shards of the micro track, shards/micro
    python data/scenes.py --track mini            # of the mini track, shards/mini: some minutes on two cores
    python data/scenes.py --track mini --sheet scenes.png       # only a contact sheet with captions

A scene is a background (colour, pattern) with one or more objects (shape, colour, size), each in a place of its own.
Sample `index` of a `split` is a function of (seed, split, index) alone: attributes come from a 64-bit integer hash,
pixels from signed distance functions, words from templates. Three splits never meet:

    train   what the trainer sees
    eval    scenes whose content (everything but the jitter) hashes into 1/16 of all contents; training never draws them
    unseen  scenes with at least one (shape, colour) pair out of UNSEEN, which training and `eval` never show

Because the truth is known, prompt accuracy is exact: `match` finds the scene that explains an image best, by least
squares.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import io
import json
import math
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import shards  # noqa: E402

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {"red": (225, 45, 45), "green": (50, 190, 70), "blue": (65, 100, 245), "yellow": (250, 220, 50),
           "purple": (190, 75, 225), "white": (250, 250, 250)}
SIZES = {"small": 0.22, "large": 0.38}  # radius as a share of the cell's width
BACKGROUNDS = {"black": (15, 15, 20), "gray": (105, 105, 110), "brown": (105, 65, 35), "navy": (20, 30, 95)}
PATTERNS = ("plain", "striped", "checkered")
PLACES = {2: ("top left", "top right", "bottom left", "bottom right"),
          3: ("top left", "top center", "top right", "middle left", "center", "middle right",
              "bottom left", "bottom center", "bottom right")}
UNSEEN = frozenset({("triangle", "purple"), ("ring", "yellow"), ("cross", "green")})  # never in `train` or `eval`
JITTER = 0.08        # each object's centre moves by up to this share of a cell in x and y
PATTERN_SHADE = 45   # the second tone of a pattern is this much lighter, of 255
SPLITS = ("train", "eval", "unseen")
VERSION = 1          # raise it when any sample changes: it is part of the protocol's hash


@dataclass(frozen=True)
class Difficulty:
    """How hard the scenes are: `grid` x `grid` places, 1 to `max_objects` objects."""

    grid: int = 2
    max_objects: int = 2

    @property
    def protocol(self) -> str:
        """Hash of everything that decides what a scene is; two runs may be compared only where it is equal."""
        what = (VERSION, self, SHAPES, COLOURS, SIZES, BACKGROUNDS, PATTERNS, sorted(UNSEEN), JITTER, PATTERN_SHADE)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


MICRO, MINI = Difficulty(grid=2, max_objects=2), Difficulty(grid=3, max_objects=4)


def difficulty_of(track: str) -> Difficulty:
    return MICRO if track == "micro" else MINI


@dataclass
class Scenes:
    """A batch of scenes as integer arrays; an absent object has place -1. N scenes, K = max_objects slots.

    place, shape, colour, size: (N, K) int64. background: (N,) = colour * len(PATTERNS) + pattern. jitter: (N, K, 2) in
    [-1, 1]. words: (N, 16) uint64, the random numbers behind the wording of the captions.
    """

    difficulty: Difficulty
    place: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    background: np.ndarray
    jitter: np.ndarray
    words: np.ndarray

    def __len__(self):
        return len(self.background)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing scenes from a seed and an index
# ---------------------------------------------------------------------------------------------------------------------

def _hash(*words) -> np.ndarray:
    """Broadcast integers to well-mixed uint64 values (splitmix64's finaliser, Steele et al. 2014, chained)."""
    with np.errstate(over="ignore"):
        z = np.uint64(0)
        for word in words:
            z = z + np.asarray(word).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return z


def _below(u: np.ndarray, n) -> np.ndarray:
    """uint64 noise -> integers in [0, n). The modulo bias for n < 2^16 is below 2^-48."""
    return (u % np.uint64(n)).astype(np.int64)


_UNSEEN = np.array([[(s, c) in UNSEEN for c in COLOURS] for s in SHAPES])  # (shape, colour) -> bool


def content_hash(place, shape, colour, size, background) -> np.ndarray:
    """uint64 (N,): a hash of what a scene shows, whatever the order of its objects and their jitter."""
    objects = np.where(place >= 0, _hash(place, shape, colour, size), np.uint64(0))
    with np.errstate(over="ignore"):
        return _hash(objects.sum(1, dtype=np.uint64), background)


def draw_scenes(indices, split: str = "train", difficulty: Difficulty = MICRO, seed: int = 0) -> Scenes:
    """The scenes with these `indices` (sequence of N ints >= 0) of a split. Raises ValueError on an unknown split.

    Attributes are drawn until the content belongs to the split; attempt number k is part of the hash, so a sample
    never depends on the other samples of its batch.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    indices = np.asarray(indices, dtype=np.int64)
    n, k, cells = len(indices), difficulty.max_objects, difficulty.grid ** 2
    slot = np.arange(k)
    out = [np.zeros((n, k), np.int64) for _ in range(4)] + [np.zeros(n, np.int64)]
    todo, attempt = np.arange(n), 0
    while len(todo):
        u = lambda field, *more: _hash(seed, SPLITS.index(split), indices[todo].reshape(-1, *[1] * len(more)), attempt,
                                       field, *more)
        count = 1 + _below(u(0), k)                                               # (n,) objects, all counts alike
        order = np.argsort(u(1, np.arange(cells)[None]), axis=1, kind="stable")   # (n, cells) a permutation of places
        place = np.where(slot < count[:, None], order[:, :k], -1)                 # (n, k)
        shape, colour, size = (_below(u(f, slot[None]), m) for f, m in ((2, len(SHAPES)), (3, len(COLOURS)), (4, 2)))
        background = _below(u(5), len(BACKGROUNDS) * len(PATTERNS))
        unseen = (_UNSEEN[shape, colour] & (place >= 0)).any(1)
        held_out = content_hash(place, shape, colour, size, background) % np.uint64(16) == 0
        good = {"train": ~unseen & ~held_out, "eval": ~unseen & held_out, "unseen": unseen}[split]
        for array, values in zip(out, (place, shape, colour, size, background)):
            array[todo[good]] = values[good]
        todo, attempt = todo[~good], attempt + 1
    noise = lambda field, m: _hash(seed, SPLITS.index(split), indices[:, None], 0, field, np.arange(m)[None])
    jitter = (noise(6, 2 * k) >> np.uint64(40)).astype(np.float32) / 2 ** 23 - 1  # 24 bits: exact in float32
    return Scenes(difficulty, *out, jitter=jitter.reshape(n, k, 2), words=noise(7, 16))


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------

def _distance(shape: int, x, y, r):
    """Signed distance (negative inside) of points x, y from the outline of a shape with radius r; all broadcast."""
    box = lambda hx, hy: torch.maximum(x.abs() - hx, y.abs() - hy)  # Chebyshev: exact on the sides, sharp corners
    if shape == 0:                                                   # circle
        return (x * x + y * y).sqrt() - r
    if shape == 1:                                                   # square
        return box(0.84 * r, 0.84 * r)
    if shape == 2:                                                   # triangle, point up, equilateral
        return torch.maximum(x.abs() * 0.8660254 - y * 0.5, y) - 0.55 * r
    if shape == 3:                                                   # cross
        return torch.minimum(box(0.32 * r, r), box(r, 0.32 * r))
    return ((x * x + y * y).sqrt() - 0.76 * r).abs() - 0.24 * r      # ring


def _background(background: torch.Tensor, res: int) -> torch.Tensor:
    """(N,) -> (N, 3, res, res) float32 in [0, 255]."""
    device = background.device
    base = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=device)[background // len(PATTERNS)]
    band = (torch.arange(res, device=device) * 8 // res) % 2                       # 8 bands, aligned to the image
    masks = torch.stack([torch.zeros(res, res, device=device), band[:, None].expand(res, res).float(),
                         (band[:, None] ^ band[None]).float()])                   # (3 patterns, res, res)
    return base[:, :, None, None] + PATTERN_SHADE * masks[background % len(PATTERNS)][:, None]


def render(scenes: Scenes, res: int = 32, device="cpu") -> torch.Tensor:
    """Draw scenes at any resolution, anti-aliased: uint8 (N, 3, res, res) on `device`."""
    to = lambda a, dtype=torch.int64: torch.as_tensor(a, dtype=dtype, device=device)
    place, shape, colour, size = to(scenes.place), to(scenes.shape), to(scenes.colour), to(scenes.size)
    jitter, grid = to(scenes.jitter, torch.float32), scenes.difficulty.grid
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device)
    radius = torch.tensor(list(SIZES.values()), device=device)[size] / grid        # (N, K), in image widths
    centre = torch.stack([place % grid, place // grid], -1) + 0.5 + JITTER * jitter
    centre = centre / grid                                                         # (N, K, 2): x, y
    n, slot = (place >= 0).nonzero(as_tuple=True)                                  # (M,): all objects
    x, y = centre[n, slot].unbind(-1)
    # An object changes a window around it, `side` pixels wide; the tip of a triangle is 1.1 radii away
    side = min(res, 2 * math.ceil(1.1 * max(SIZES.values()) / grid * res) + 4)
    left, top = ((v * res).long().sub(side // 2).clamp(0, res - side) for v in (x, y))
    axis, steps = (torch.arange(res, device=device) + 0.5) / res, torch.arange(side, device=device)
    x = axis[left[:, None] + steps][:, None] - x[:, None, None]                    # (M, 1, side)
    y = axis[top[:, None] + steps][:, :, None] - y[:, None, None]                  # (M, side, 1)
    distance = x.new_empty(len(n), side, side)
    for kind in range(len(SHAPES)):
        rows = (shape[n, slot] == kind).nonzero()[:, 0]
        distance[rows] = _distance(kind, x[rows], y[rows], radius[n, slot][rows, None, None])
    alpha = (0.5 - distance * res).clamp(0, 1)[:, None]                            # one pixel of anti-aliasing
    inside = palette[colour[n, slot]][:, :, None, None]
    every = _background(torch.arange(len(BACKGROUNDS) * len(PATTERNS), device=device), res).to(torch.uint8)
    image = every[to(scenes.background)]
    windows = image.unfold(2, side, 1).unfold(3, side, 1)                          # (N, 3, top, left, side, side)
    for k in range(place.shape[1]):                                                # one object per image at a time
        rows = (slot == k).nonzero()[:, 0]
        at = n[rows], slice(None), top[rows], left[rows]
        windows[at] = torch.lerp(windows[at].float(), inside[rows], alpha[rows]).round().to(torch.uint8)
    return image


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------

_WORDS = {"circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle",),
          "cross": ("cross", "plus sign"), "ring": ("ring", "hoop"), "small": ("small", "little"),
          "large": ("large", "big"), "plain": ("plain", "solid"), "striped": ("striped",), "checkered": ("checkered",)}
_OBJECT = ("a {size} {colour} {shape} in the {place}", "in the {place} a {size} {colour} {shape}",
           "a {colour} {shape} of {size} size at the {place}", "the {place} holds a {size} {colour} {shape}",
           "at the {place} there is a {size} {shape} in {colour}")
_SCENE = ("{count}: {objects}. the background is {pattern} {ground}.", "{objects}, on a {pattern} {ground} background.",
          "a {pattern} {ground} background with {count}: {objects}.", "this picture shows {count}, {objects}. behind, "
          "{pattern} {ground}.", "on {pattern} {ground}, {count}. {objects}.")
_SHORT = ("a {colour} {shape}", "a {shape}", "a {shape} on {ground}", "{count}")
_NUMBER = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def captions(scenes: Scenes, field: str = "long") -> list[str]:
    """N captions: `long` states everything in varied wording, `short` leaves most of it out."""
    places, out = PLACES[scenes.difficulty.grid], []
    shapes, colours, sizes, grounds = SHAPES, tuple(COLOURS), tuple(SIZES), tuple(BACKGROUNDS)
    for i in range(len(scenes)):
        words = iter(scenes.words[i].tolist())
        pick = lambda options: options[next(words) % len(options)]
        say = lambda word: pick(_WORDS[word])
        ground, pattern = divmod(int(scenes.background[i]), len(PATTERNS))
        present = [k for k in range(scenes.place.shape[1]) if scenes.place[i, k] >= 0]
        objects = [dict(size=say(sizes[scenes.size[i, k]]), colour=colours[scenes.colour[i, k]],
                        shape=say(shapes[scenes.shape[i, k]]), place=places[scenes.place[i, k]]) for k in present]
        count = f"{_NUMBER[len(present) - 1]} {pick(('object', 'shape'))}{'s' * (len(present) > 1)}"
        context = dict(count=count, ground=grounds[ground], pattern=say(PATTERNS[pattern]))
        if field == "short":
            out.append(pick(_SHORT).format(**objects[0], **context))
        else:
            phrases = [pick(_OBJECT).format(**o) for o in objects]
            joined = ", ".join(phrases[:-1]) + (" and " if len(phrases) > 1 else "") + phrases[-1]
            out.append(pick(_SCENE).format(objects=joined, **context))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Reading a scene back: prompt accuracy
# ---------------------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=4)
def _templates(cell: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every object that a cell of `cell` pixels may hold: alpha (T, cell * cell), shape (T,), size (T,)."""
    offsets = torch.linspace(-JITTER, JITTER, 7)
    shape, size, ix, iy = torch.cartesian_prod(torch.arange(len(SHAPES)), torch.arange(len(SIZES)),
                                               torch.arange(7), torch.arange(7)).T
    dx, dy = offsets[ix], offsets[iy]
    radius = torch.tensor(list(SIZES.values()))[size]
    axis = (torch.arange(cell) + 0.5) / cell - 0.5
    x, y, r = axis[None, None, :] - dx[:, None, None], axis[None, :, None] - dy[:, None, None], radius[:, None, None]
    d = torch.stack([_distance(k, x, y, r) for k in range(len(SHAPES))])           # (shapes, T, cell, cell)
    d = d.gather(0, shape[None, :, None, None].expand(1, -1, cell, cell))[0]
    return (0.5 - d * cell).clamp(0, 1).flatten(1), shape, size


def match(images: torch.Tensor, difficulty: Difficulty = MICRO) -> dict[str, torch.Tensor]:
    """Read scenes from images by least squares: the best background, then in each cell the best object or none.

    images: uint8 (N, 3, H, W). Returns `background` (N,), `present` (N, cells) bool, and `shape`, `colour`, `size`
    (N, cells), all on CPU. In a cell, every template m (shape, size, offset) in every colour c is composited over the
    background B; the residual |x - B - m (c - B)|^2 is expanded so that the whole search is two matrix products. An
    object is present where the best template explains the cell better than the empty background does, with a margin.
    """
    grid = difficulty.grid
    cell = min(32, images.shape[-1] // grid)
    templates, t_shape, t_size = _templates(cell)
    found = {k: [] for k in ("background", "present", "shape", "colour", "size")}
    candidates = _background(torch.arange(len(BACKGROUNDS) * len(PATTERNS)), grid * cell) / 255
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
    for x in images.cpu().float().div(255).split(128):
        if x.shape[-2:] != (grid * cell, grid * cell):
            x = F.interpolate(x, (grid * cell, grid * cell), mode="bilinear", antialias=True)
        n = len(x)
        # truncated squares: objects are outliers, they must not choose the background
        error = (x[:, None] - candidates).square().sum(2).clamp(max=0.05).sum((-1, -2))        # (n, backgrounds)
        background = error.argmin(1)
        B = candidates[background]                                                               # (n, 3, S, S)
        cells = lambda a: a.view(n, 3, grid, cell, grid, cell).permute(0, 2, 4, 1, 3, 5).reshape(n, grid ** 2, 3, -1)
        r, b = cells(x - B), cells(B)                                                            # (n, cells, 3, P)
        delta = palette[:, :, None] - b[:, :, None]                                              # (n, cells, C, 3, P)
        inner, energy = (delta * r[:, :, None]).sum(3), delta.square().sum(3)                    # (n, cells, C, P)
        energy = energy @ templates.square().T                                                   # (n, cells, C, T)
        gain = 2 * (inner @ templates.T) - energy                              # (n, cells, C, T) explained away
        best, which = gain.flatten(2).max(2)
        colour, t = which // len(templates), which % len(templates)
        found["background"].append(background)
        found["present"].append(best > 0.2 * energy.flatten(2).gather(2, which[..., None])[..., 0])
        for key, value in (("shape", t_shape[t]), ("colour", colour), ("size", t_size[t])):
            found[key].append(value.view(n, -1))
    return {k: torch.cat(v) for k, v in found.items()}


ATTRIBUTES = ("count", "places", "shapes", "colours", "sizes", "background")


def score(images: torch.Tensor, scenes: Scenes) -> dict[str, torch.Tensor]:
    """Prompt accuracy of images (uint8 (N, 3, H, W)) that were meant to show `scenes`.

    Returns float64 (N,) per attribute: `count`, `places` (the set of occupied places) and `background` are right or
    wrong; `shapes`, `colours`, `sizes` are the share of the scene's objects that are right, a missing object counting
    as wrong. `accuracy` is the mean of the six; `all` is 1 where everything is right.
    """
    found = match(images, scenes.difficulty)
    place = torch.as_tensor(scenes.place)
    there, at = place >= 0, place.clamp(min=0)                                    # (N, K)
    occupied = torch.zeros_like(found["present"]).scatter_add(1, at, there) > 0   # (N, cells)
    count = there.sum(1)
    out = {"count": (found["present"].sum(1) == count).double(),
           "places": (found["present"] == occupied).all(1).double()}
    for key, attribute in (("shape", "shapes"), ("colour", "colours"), ("size", "sizes")):
        right = (found[key].gather(1, at) == torch.as_tensor(getattr(scenes, key))) & found["present"].gather(1, at)
        out[attribute] = (right & there).sum(1).double() / count
    out["background"] = (found["background"] == torch.as_tensor(scenes.background)).double()
    out["accuracy"] = torch.stack([out[k] for k in ATTRIBUTES]).mean(0)
    out["all"] = (torch.stack([out[k] for k in ATTRIBUTES]) == 1).all(0).double()
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Shards for the trainer
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Track:
    """What a track trains on: `count` scenes of `resolution` px, stored as `image`, `shard_size` of them a file."""

    difficulty: Difficulty
    count: int
    resolution: int
    image: str
    shard_size: int


TRACKS = {"micro": Track(MICRO, 131_072, 32, "raw", 32_768),   # 100 MB of pixels a file
          "mini": Track(MINI, 262_144, 256, "png", 65_536)}    # PNG: 2.5 KB a scene and exact; JPEG has 4.1 KB
EVAL_COUNT = 2048
CHUNK = 1024  # scenes that a process makes at a time


def write_track(track: str, out: Path, n: int | None = None, eval_n: int = EVAL_COUNT, processes: int = 2) -> dict:
    """Write a track's training shards to the folder `out` and return the content of its index.json.

    Row i of the training shards is scene i of split `train` with seed 0, and of the held-out shard of split `eval`.
    A folder that holds these scenes already is left as it is, or written again where it is damaged or half-written;
    UserError where it holds anything else. n: fewer scenes than the track has, for tests.
    """
    what, out = TRACKS[track], Path(out)
    counts = {"train": what.count if n is None else n, "eval": eval_n}
    if min(counts.values()) < 1:
        raise shards.UserError(f"--n {counts['train']} --eval-n {counts['eval']}: give 1 or more of each")
    if (out / "index.json").exists():
        index = shards.read_index(out)
        scenes = index.get("scenes") or {}
        theirs = scenes.get("track"), scenes.get("protocol"), index.get("count"), index.get("eval_count")
        if theirs != (track, what.difficulty.protocol, counts["train"], counts["eval"]):
            raise shards.UserError(f"{out} holds other data; remove it or give another --out")
        if is_whole(out, index):
            print(f"{out} is there already, whole, protocol hash {scenes['hash']}")
            return index
        print(f"{out} is damaged and is written again")
        (out / "index.json").unlink()
    out.mkdir(parents=True, exist_ok=True)
    files = []  # (path, split, chunks) of each shard
    for split, count in counts.items():
        for number, start in enumerate(range(0, count, what.shard_size)):
            stop = min(start + what.shard_size, count)
            chunks = [(track, split, first, min(first + CHUNK, stop)) for first in range(start, stop, CHUNK)]
            files.append((out / f"{split}-{number:05d}.safetensors", split, chunks))
    made = make_chunks([chunk for *_, chunks in files for chunk in chunks], processes)
    entries, size = [], what.resolution
    with tqdm(total=sum(counts.values()), unit=" scenes", desc=str(out), disable=None) as bar:
        for path, split, chunks in files:
            parts = []
            for _ in chunks:
                parts.append(next(made))
                bar.update(len(parts[-1]["hash"]))
            entries.append(shards.write_shard(path, join_chunks(parts, what.image), split, size, size, size))
    index = {"format": shards.FORMAT, "count": counts["train"], "eval_count": counts["eval"],
             "captions": ["long", "short"], "text_cleaning": "diffusers.PRXPipeline.clean_text",
             "image": what.image, "latent": None, "text": None, "source": {"names": ["data/scenes.py"]},
             "networks": shards.copy_networks(out), "shards": entries}
    index["scenes"] = {"track": track, "protocol": what.difficulty.protocol}
    index["scenes"]["hash"] = track_hash(out, index)
    shards.write_index(out, index)
    print(f"wrote {out}: {counts['train']:,} scenes for training and {counts['eval']:,} for evaluation, protocol hash "
          f"{index['scenes']['hash']}")
    return index


def make_chunks(chunks: list[tuple], processes: int):
    """make_chunk of each, in order. A few chunks are made in this process: another one takes 2 s to start."""
    if processes == 1 or len(chunks) < 16:
        for chunk in chunks:
            yield make_chunk(*chunk)
        return
    # not by fork: OpenMP's threads do not survive it
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(make_chunk, *zip(*chunks))


def make_chunk(track: str, split: str, start: int, stop: int) -> dict:
    """Scenes start to stop of a track's split, encoded: `hash` and `image` (or `png`) and captions, row by row."""
    what = TRACKS[track]
    chunk = {"hash": [], "image": [], "png": [], "caption.long": [], "caption.short": []}
    step = 2**21 // what.resolution**2  # images at a time that stay in the processor's caches
    for first in range(start, stop, step):
        scenes = draw_scenes(range(first, min(first + step, stop)), split, what.difficulty)
        images = render(scenes, what.resolution).numpy()
        chunk["hash"] += [hashlib.sha256(image).digest()[:16] for image in images]
        if what.image == "raw":
            chunk["image"].append(images)
        else:
            chunk["png"] += [encode_png(image) for image in images]
        for field in ("long", "short"):
            chunk[f"caption.{field}"] += [text.encode() for text in captions(scenes, field)]
    return chunk


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (3, H, W) -> PNG. Run lengths suit flat colours: 2.5 KB in 0.8 ms, where level 9 has 2.3 KB in 3.5 ms."""
    file = io.BytesIO()
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    Image.fromarray(pixels).save(file, "PNG", compress_type=3)  # zlib's Z_RLE
    return file.getvalue()


def join_chunks(chunks: list[dict], image: str) -> dict[str, torch.Tensor]:
    """The tensors of a shard."""
    rows = {key: [row for chunk in chunks for row in chunk[key]] for key in chunks[0]}
    hashes = np.frombuffer(b"".join(rows["hash"]), np.uint8).copy()
    tensors = {"hash": torch.from_numpy(hashes.reshape(-1, 16))}
    if image == "raw":
        tensors["image"] = torch.from_numpy(np.concatenate(rows["image"]))
    else:
        tensors |= shards.ragged("png", rows["png"])
    for field in ("long", "short"):
        tensors |= shards.ragged(f"caption.{field}", rows[f"caption.{field}"])
    return tensors


def track_hash(folder: Path, index: dict) -> str:
    """Hash of all that a run on these shards sees: the scenes' protocol, counts, images, captions, networks.

    An image counts by its row of `hash`, the sha256 of its pixels: how it is packed and cut into files does not matter.
    """
    digest = hashlib.sha256()
    about = {"protocol": index["scenes"]["protocol"], "count": index["count"], "eval_count": index["eval_count"],
             "networks": index["networks"]}
    digest.update(json.dumps(about, sort_keys=True).encode())
    for split in ("train", "eval"):
        tensors = [shards.open_shard(folder, entry) for entry in index["shards"] if entry["split"] == split]
        for key in ("hash", "caption.long", "caption.short"):
            for each in tensors:
                digest.update(each[key].numpy())
        for key in ("caption.long.offset", "caption.short.offset"):
            for each in tensors:
                digest.update(each[key].diff().numpy())  # lengths: offsets begin anew in each file
    return digest.hexdigest()[:16]


def is_whole(folder: Path, index: dict) -> bool:
    """Is every file what the index says, with today's networks, and is the hash right?"""
    try:
        shards.verify(folder)
        return index["networks"] == shards.network_hashes() and index["scenes"]["hash"] == track_hash(folder, index)
    except (shards.UserError, KeyError):
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--track", choices=tuple(TRACKS), default="micro")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder for the shards [shards/TRACK]")
    parser.add_argument("--n", type=int, help="scenes for training [131,072 of micro, 262,144 of mini]")
    parser.add_argument("--eval-n", type=int, default=EVAL_COUNT, help="scenes for evaluation [%(default)s]")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="only write a contact sheet of 16 scenes")
    args = parser.parse_args()
    try:
        if args.sheet:
            scenes = draw_scenes(range(16), "train", difficulty_of(args.track))
            resolution = TRACKS[args.track].resolution
            shards.save_grid(render(scenes, resolution), captions(scenes), args.sheet)
            print(f"wrote {args.sheet}: 16 scenes of {args.track}, protocol {scenes.difficulty.protocol}")
        else:
            write_track(args.track, args.out or Path("shards") / args.track, args.n, args.eval_n)
    except (shards.UserError, OSError) as error:  # OSError: a full disk, no permission
        print(f"scenes.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, shards.UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
