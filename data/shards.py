"""Training shards: what data/prepare.py writes and train_prx.py reads, in an order that depends on the seed alone.

A folder holds index.json (format 2) and safetensors shards of one resolution bucket each:

    hash           uint8 [N, 16]      first half of the sha256 of the encoded source image
    image          uint8 [N, 3, H, W]; or jpeg uint8 [bytes] and jpeg.offset int64 [N + 1]; may lack where latent is
    latent         bf16 [N, C, h, w]  normalised (encoders.VAE)
    caption.FIELD  uint8 [bytes] UTF-8, cleaned, and caption.FIELD.offset int64 [N + 1]; FIELD is long or short
    text.FIELD     bf16 [tokens, D] ragged text embeddings, and text.FIELD.offset int64 [N + 1]

and, where text is stored, empty.safetensors with the empty prompt's `text` bf16 [T, D]. The index names each shard's
split (train or eval), size, sha256 and rows to skip, and what encoded the latents and the text.
"""

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from data.settings import data_folders
from train_prx import TEXTS, Config, UserError, choose_field


def decode_jpeg(data: torch.Tensor) -> torch.Tensor:
    """uint8 bytes -> uint8 (3, H, W)."""
    image = Image.open(io.BytesIO(data.numpy().tobytes()), formats=["JPEG"])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ShardData:
    """Folders that data/prepare.py wrote, mixed by weight: index.json and memory-mapped safetensors shards.

    A stage takes the shards of its resolution. A sample's id is its row among them, folder after folder.
    UserError where a folder is damaged or does not fit the configuration.
    """

    FORMAT, WINDOW, CHUNK = 2, 8192, 65536

    def __init__(self, c: Config, stage: int = 0):
        self.config, self.stage, self.shards, indices = c, stage, [], []
        self.fields = {"long": ["long"], "short": ["short"]}.get(c.captions, ["long", "short"])
        self.weights = np.array([weight for _, weight in data_folders(c.data)])
        for folder, (path, _) in enumerate(data_folders(c.data)):
            indices.append(index := self.read_index(Path(path)))
            shards = [s | dict(folder=folder, path=Path(path) / s["file"]) for s in index["shards"]]
            sizes = sorted({s["resolution"] for s in shards})
            self.shards += [s for s in shards if s["resolution"] == c.resolution]
            if c.resolution not in sizes:
                raise UserError(f"{path} holds images of {', '.join(map(str, sizes))} px and this stage trains at "
                                f"--resolution {c.resolution}; give one of them, or prepare it with --size")
            if missing := set(self.fields) - set(index["captions"]):
                raise UserError(f"--captions {c.captions} needs the field {missing.pop()}, which {path} does not have; "
                                f"it has {', '.join(index['captions'])}")
            for kind in ("latent", "text", "image"):
                if index[kind] != indices[0][kind] and not (kind == "image" and index["latent"]):
                    raise UserError(f"{path} and {data_folders(c.data)[0][0]} cannot be mixed: their {kind} is "
                                    f"{index[kind]} and {indices[0][kind]}; prepare them in the same way")
        self.latent, self.text = indices[0]["latent"] if c.vae != "none" else None, indices[0]["text"]
        self.image = indices[0]["image"]  # raw, jpeg or None
        if not self.latent and not self.image:
            raise UserError(f"--vae none trains on pixels and {c.data} holds latents only; give the --vae that made "
                            f"them ({indices[0]['latent']['vae']}) or prepare it with --store image")
        self.pixels = not self.latent or c.repa > 0  # are images read?
        if self.pixels and not self.image:
            raise UserError(f"--repa shows images to its teacher and {c.data} holds none; prepare it with --store "
                            "latent,text,image (or jpeg), or give --repa 0")
        mine = dict(text=c.text if c.text in TEXTS else Path(c.text).name, max_tokens=c.text_tokens)
        if self.text and mine != (theirs := {k: self.text[k] for k in mine}):
            raise UserError(f"the text of {c.data} was encoded with {theirs}, and this run has {mine}; give --text and "
                            "--text-tokens as it was prepared, or prepare it again")
        self.empty, first = "", Path(data_folders(c.data)[0][0])
        self.tensors = {s["path"]: self.open(s) for s in self.shards}  # now: better than in the middle of the run
        if self.text:
            self.empty = self.load(first / "empty.safetensors")["text"]
        train = [s for s in self.shards if s["split"] == "train"]
        self.held_out = [s for s in self.shards if s["split"] == "eval"]
        self.first = np.cumsum([0] + [s["count"] for s in train])  # the id of each shard's first sample
        self.shards = train
        self.ids = [np.delete(np.arange(s["count"]), s["skip"]) + start for s, start in zip(train, self.first)]
        self.folders = [[i for i, s in enumerate(train) if s["folder"] == f] for f in range(len(self.weights))]
        counts = [sum(len(self.ids[i]) for i in shards) for shards in self.folders]
        if not all(counts):
            raise UserError(f"{c.data} has a folder with no training image of {c.resolution} px; prepare it again")
        self.sizes = list(dict.fromkeys((s["height"], s["width"]) for s in train))
        self.bucket = np.repeat([self.sizes.index((s["height"], s["width"])) for s in train], np.diff(self.first))
        self.count, self.epochs = sum(counts), {}
        self.threads = c.loader_threads if torch.cuda.is_available() else 1  # on two cores they fight with the model's
        self.about = f"{self.count:,} images of {c.resolution} px in {len(train)} shards and {len(self.sizes)} buckets"

    @classmethod
    def read_index(cls, folder: Path) -> dict:
        path = folder / "index.json"
        if not path.exists():
            raise UserError(f"--data {folder} holds no index.json; give 'scenes' or folders that data/prepare.py wrote "
                            "to the end")
        try:
            index = dict(json.loads(path.read_text()))
            if index["format"] != cls.FORMAT:
                raise UserError(f"{path} has format {index['format']}, this script reads {cls.FORMAT}; prepare the "
                                "data again")
            index["shards"] = [dict({k: int(s[k]) for k in ("count", "resolution", "height", "width")},
                                    **{k: str(s[k]) for k in ("file", "split", "sha256")},
                                    skip=[int(i) for i in s["skip"]]) for s in index["shards"]]
            index["shards"][0], index["captions"], index["latent"], index["text"], index["image"]
            return index
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__} {error}); prepare the data again") from None

    @staticmethod
    def load(path: Path) -> dict[str, torch.Tensor]:
        """Tensors that read the file when they are indexed."""
        try:
            file = safe_open(path, "pt")
            return {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); restore the file or prepare the data again") from None

    def open(self, s: dict) -> dict[str, torch.Tensor]:
        path, n = s["path"], s["count"]
        tensors, lengths = self.load(path), {"hash": n} | ({"latent": n} if self.latent else {})
        if self.pixels:
            lengths |= {"image": n} if self.image == "raw" else {"jpeg.offset": n + 1}
        kinds = ["caption", "text"] if self.text else ["caption"]
        lengths |= {f"{kind}.{field}.offset": n + 1 for field in self.fields for kind in kinds}
        for key, length in lengths.items():
            if key not in tensors or len(tensors[key]) != length:
                raise UserError(f"{path} does not hold the {n} samples that its index promises ({key} is missing or "
                                "has another length); prepare the data again")
        return tensors

    def verify(self, rank: int, ranks: int):
        """--verify-data: this rank's share of the shards against the index."""
        for s in (self.shards + self.held_out)[rank::ranks]:
            with open(s["path"], "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != s["sha256"]:
                    raise UserError(f"{s['path']} is not the file that its index names (sha256 differs); restore it")

    def hashes(self, split: str) -> np.ndarray:
        """The first half of each sample's hash as one number: 2^64 of them hold 10^8 images apart."""
        shards = self.shards if split == "train" else self.held_out
        parts = [self.tensors[s["path"]]["hash"].numpy() for s in shards] or [np.empty((0, 16), np.uint8)]
        return np.ascontiguousarray(np.concatenate(parts)[:, :8]).view(np.uint64).ravel()

    def read(self, s: dict, row: int, field: str) -> tuple:
        """One sample of a shard: its latent and its image (None where there is none or nobody asks), its caption or
        text embedding."""
        tensors = self.tensors[s["path"]]

        def ragged(key):
            start, end = tensors[f"{key}.offset"][row:row + 2].tolist()
            return tensors[key][start:end]

        latent, image = tensors["latent"][row] if self.latent else None, None
        if self.pixels and self.image == "raw":
            image = tensors["image"][row]
        elif self.pixels:
            image = decode_jpeg(ragged("jpeg"))
        text = ragged(f"text.{field}") if self.text else bytes(ragged(f"caption.{field}").tolist()).decode()
        return latent, image, text

    def prompts(self, n: int) -> tuple[list, list[str]]:
        """Captions of the evaluation split for the grids, or of training images where there is none; as `batches`
        gives them, and to print underneath."""
        rows = [(s, row) for s in self.held_out or self.shards for row in range(min(n, s["count"]))]
        rows = [rows[i % len(rows)] for i in range(n)]
        texts = [self.read(s, row, self.fields[0])[2] for s, row in rows]
        stored, self.text = self.text, None
        captions = [self.read(s, row, self.fields[0])[2] for s, row in rows]
        self.text = stored
        return texts, captions

    def stream(self, folder: int, start: int, stop: int) -> np.ndarray:
        """Samples start to stop of a folder's endless stream: each once per epoch, shards shuffled, then windows."""
        out = [np.empty(0, np.int64)]
        while start < stop:
            n = sum(len(self.ids[s]) for s in self.folders[folder])
            epoch = start // n
            if self.epochs.get(folder, (None,))[0] != epoch:
                rng = np.random.default_rng((self.config.seed, self.stage, folder, epoch))
                ids = np.concatenate([self.ids[s] for s in rng.permutation(self.folders[folder])])
                for i in range(0, n, self.WINDOW):
                    rng.shuffle(ids[i:i + self.WINDOW])
                self.epochs[folder] = epoch, ids
            out.append(self.epochs[folder][1][start - epoch * n:stop - epoch * n])
            start += len(out[-1])
        return np.concatenate(out)

    def order(self):
        """Endless global batches of sample ids, one bucket each. The folders' streams are interleaved by weight; what
        does not fill a batch of its bucket waits for the next one."""
        batch, share = self.config.batch, self.weights / self.weights.sum()
        waiting, chunk = [np.empty(0, np.int64)] * len(self.sizes), 0
        while True:
            spans = [(int(chunk * self.CHUNK * w), int((chunk + 1) * self.CHUNK * w)) for w in share]
            ids = np.concatenate([self.stream(f, *span) for f, span in enumerate(spans)])
            due = np.concatenate([(np.arange(*span) + 0.5) / w for span, w in zip(spans, share)])
            ids, full = ids[np.argsort(due, kind="stable")], []
            for b, left in enumerate(waiting):
                at = np.flatnonzero(self.bucket[ids] == b)
                queue = np.concatenate([left, ids[at]])
                n = len(queue) // batch
                ends = np.concatenate([np.full(len(left), -1), at])[batch - 1::batch]  # where each batch became full
                full += zip(ends.tolist(), queue[:n * batch].reshape(n, batch))
                waiting[b] = queue[n * batch:]
            yield from (batch_ids for _, batch_ids in sorted(full, key=lambda pair: pair[0]))
            chunk += 1

    def batches(self, skip: int, rows: slice):
        c = self.config
        with ThreadPoolExecutor(self.threads) as pool:
            for i, ids in enumerate(self.order()):
                if i < skip:
                    continue
                first, ids = i * c.batch + (rows.start or 0), ids[rows]
                shards = np.searchsorted(self.first, ids, "right") - 1
                fields = [choose_field(c.captions, c.seed, first + j) for j in range(len(ids))]
                items = [(self.shards[s], int(k - self.first[s]), f) for s, k, f in zip(shards, ids, fields)]
                samples = list((pool.map if self.threads > 1 else map)(self.read, *zip(*items)))
                latents, images, texts = zip(*samples)
                images = torch.stack(images) if self.pixels else None
                yield (torch.stack(latents), list(texts), images) if self.latent else (images, list(texts), None)


class HeldOut:
    """The evaluation split of prepared folders at one resolution, as caption(i) and image(i), in the order of the
    images' hashes: the same first n for everybody who has prepared the same images."""

    def __init__(self, data: str, resolution: int):
        found, self.tensors, self.stored = [], {}, True
        for folder in (Path(path) for path, _ in data_folders(data)):
            index = ShardData.read_index(folder)
            self.stored = self.stored and bool(index["image"])
            for s in index["shards"]:
                if s["split"] == "eval" and s["resolution"] == resolution:
                    path = folder / s["file"]
                    self.tensors[path] = tensors = ShardData.load(path)
                    rows = np.delete(np.arange(s["count"]), s["skip"])
                    found += [(bytes(tensors["hash"][row].tolist()), path, int(row)) for row in rows]
        self.rows = sorted(dict((f[0], f) for f in found).values())
        if len(self.rows) < 2:
            raise UserError(f"{data} holds {len(self.rows)} image(s) of {resolution} px for evaluation, and at least 2 "
                            "are needed; prepare more data, or with a larger --eval-share")

    def __len__(self):
        return len(self.rows)

    def ragged(self, i: int, key: str) -> torch.Tensor:
        _, path, row = self.rows[i]
        start, end = self.tensors[path][f"{key}.offset"][row:row + 2].tolist()
        return self.tensors[path][key][start:end]

    def caption(self, i: int) -> str:
        return bytes(self.ragged(i, "caption.long").tolist()).decode()

    def image(self, i: int) -> torch.Tensor:  # uint8 (3, H, W)
        _, path, row = self.rows[i]
        raw = self.tensors[path].get("image")
        return decode_jpeg(self.ragged(i, "jpeg")) if raw is None else raw[row]
