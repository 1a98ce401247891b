"""Shards as the trainer reads them: every sample once per epoch in an order that resumes, and nothing that does not fit."""

import hashlib
import io
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, TINY, losses, shell, torchrun
from PIL import Image
from safetensors.torch import save_file

import train_prx as T

LATENT = dict(vae="v", type="AutoencoderKL", channels=4, factor=8, scale=0.5, shift=0.1, sha256="ab")


def encoded(images, kind):
    """JPEG or PNG bytes one after the other, and where each begins."""
    files = []
    for x in images:
        file = io.BytesIO()
        grey = x[:1].expand(3, -1, -1) if kind == "jpeg" else x  # JPEG keeps flat grey images exactly
        Image.fromarray(grey.permute(1, 2, 0).numpy()).save(file, kind.upper(), **dict(quality=95) if kind == "jpeg" else {})
        files.append(file.getvalue())
    return torch.tensor(list(b"".join(files)), dtype=torch.uint8), torch.tensor([0, *np.cumsum([len(f) for f in files])])


def write_shards(folder: Path, parts=((20, 32, 32, "train"), (14, 32, 32, "train")), fields=("long", "short"), image="raw",
                 latent=None, text=None, first=0, skip=(), resolution=32):
    """A folder in format 2. parts: (count, height, width, split[, resolution]). Sample i says so in its caption and in
    its values."""
    folder.mkdir(parents=True)
    for network in ("text", "teacher"):
        (folder / network).symlink_to(ROOT / "data/networks" / network)
    g = torch.Generator().manual_seed(0)
    index = {"format": 2, "captions": list(fields), "image": image, "latent": latent, "text": text, "shards": []}
    for n, (count, height, width, split, *other) in enumerate(parts):
        ids = range(first, first + count)
        tensors = {"hash": torch.tensor([list(hashlib.sha256(b"%d" % i).digest()[:16]) for i in ids], dtype=torch.uint8)}
        pixels = torch.randint(0, 256, (count, 3, height, width), generator=g, dtype=torch.uint8)
        pixels[:, 0] = torch.tensor(ids, dtype=torch.uint8)[:, None, None]
        if image == "raw":
            tensors["image"] = pixels
        elif image:
            tensors[image], tensors[f"{image}.offset"] = encoded(pixels, image)
        if latent:
            tensors["latent"] = torch.tensor(ids)[:, None, None, None].expand(
                -1, latent["channels"], height // latent["factor"], width // latent["factor"]).bfloat16()
        for f in fields:
            words = [f"{f} number {i}".encode() for i in ids]
            tensors[f"caption.{f}"] = torch.tensor(list(b"".join(words)), dtype=torch.uint8)
            tensors[f"caption.{f}.offset"] = torch.tensor([0, *np.cumsum([len(w) for w in words])])
            if text:
                lengths = [1 + i % 5 for i in ids]
                tensors[f"text.{f}"] = torch.repeat_interleave(torch.tensor(ids), torch.tensor(lengths))[:, None].expand(
                    -1, text["width"]).bfloat16()
                tensors[f"text.{f}.offset"] = torch.tensor([0, *np.cumsum(lengths)])
        path = folder / f"{split}-{n:05d}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        index["shards"].append(dict(file=path.name, split=split, count=count, resolution=(other or [resolution])[0],
                                    height=height, width=width, sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                                    skip=[i - first for i in skip if i in ids]))
        first += count
    if text:
        save_file({"text": torch.full((1, text["width"]), -1.0).bfloat16()}, folder / "empty.safetensors")
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def config(data, **kw):
    return replace(T.TRACKS["micro"][0], data=str(data), **dict(repa=0.0, caption_dropout=0.0) | kw)


class Numbers:
    """In place of a tokenizer: a caption's kind (1 long, 0 short, 2 empty) and number, so that a batch says what it holds."""

    def tokenize(self, texts):
        rows = [[int(t.startswith("long")), int(t.split()[-1])] if t else [2, -1] for t in texts]
        return torch.tensor(rows), torch.ones(len(rows), 2, dtype=torch.bool)


def loaders(c, ranks=1, skip=0, stage=0, step=None, teacher=None):
    """One loader per rank, each with the data opened for itself."""
    latent = T.Shards(c).latent
    frozen = T.Frozen(vae=latent and SimpleNamespace(**latent), text=Numbers(), teacher=teacher)
    return [T.Loader(T.Shards(c, stage), c, frozen, T.World(rank, ranks), skip, skip if step is None else step)
            for rank in range(ranks)]


def together(batches):
    """The ranks' batches as one."""
    keys = [k for k, v in vars(batches[0]).items() if v is not None]
    return T.Batch(**{k: torch.cat([getattr(b, k) for b in batches]) for k in keys})


def equal(a, b):
    return all(torch.equal(v, w) if v is not None else w is None for v, w in zip(vars(a).values(), vars(b).values()))


def numbers(batch):
    return batch.text[:, 1].tolist()


# --- order

BUCKETS = ((20, 32, 32, "train"), (14, 24, 40, "train"), (9, 32, 32, "train"), (3, 40, 24, "train"), (5, 32, 32, "eval"))


def test_each_sample_is_seen_once_per_epoch_over_all_ranks_with_its_own_image(tmp_path):
    write_shards(tmp_path / "d", ((20, 32, 32, "train"), (20, 32, 32, "train"), (7, 32, 32, "eval")))
    ranks, seen = loaders(config(tmp_path / "d", batch=8), 2), []
    for _ in range(10):  # two epochs of 40
        for batch in map(next, ranks):
            assert len(batch.x) == 4 and batch.x[:, 0, 0, 0].tolist() == numbers(batch)
            seen += numbers(batch)
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40)) and seen[:40] != seen[40:]


@pytest.mark.parametrize("folders", [1, 2])
def test_buckets_and_mixtures_lose_nothing_over_ranks_a_stop_and_a_resume(tmp_path, folders):
    """Two ranks, stopped after 11 batches and gone on with in new processes: the same batches as one undisturbed rank,
    with the same times, noise, routes and dropped captions; one bucket each, and every sample of a folder once per
    epoch of that folder."""
    write_shards(tmp_path / "a", BUCKETS, skip=[3, 25])
    write_shards(tmp_path / "b", BUCKETS, first=100)
    spec = f"{tmp_path}/a" if folders == 1 else f"{tmp_path}/a:0.75,{tmp_path}/b:0.25"
    c = config(spec, batch=6, tread=0.5, captions="mix:0.5")
    [whole] = loaders(c)
    expected, got = [next(whole) for _ in range(120)], []
    for skip, stop in ((0, 11), (11, 120)):
        ranks = loaders(c, 2, skip)
        got += [together([next(r) for r in ranks]) for _ in range(skip, stop)]
    assert all(map(equal, got, expected))
    assert {b.x.shape[2:] for b in expected} == {(32, 32), (24, 40), (40, 24)}
    flat = [i for batch in got for i in numbers(batch)]
    ours = [i for i in flat if i < 100]
    counts = Counter(ours)
    wanted = set(range(46)) - {3, 25}
    assert set(counts) == wanted  # no skipped rows, no evaluation images
    whole_epochs = len(ours) / len(wanted)
    waiting = 3 * 5 / len(wanted) + 1  # what waits in three buckets, and the epoch under way
    assert max(counts.values()) <= whole_epochs + waiting and min(counts.values()) >= whole_epochs - waiting
    if folders == 2:
        assert abs(len(ours) / len(flat) - 0.75) < 0.03


def test_an_epoch_of_a_bucketed_folder_is_exact(tmp_path):
    """Bucket by bucket, the n-th pass over a bucket's samples is a permutation of them."""
    write_shards(tmp_path / "d", BUCKETS)
    data = T.Shards(config(tmp_path / "d", batch=4))
    order = data.order()
    by_bucket = {}
    for _ in range(200):
        ids = next(order)
        assert len(set(data.bucket[ids])) == 1
        by_bucket.setdefault(int(data.bucket[ids[0]]), []).extend(ids.tolist())
    for bucket, ids in by_bucket.items():
        n = int((data.bucket == bucket).sum())
        for start in range(0, len(ids) - n + 1, n):
            assert len(set(ids[start:start + n])) == n, bucket


def test_the_order_is_what_a_plain_loop_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(T.Shards, "WINDOW", 16)
    write_shards(tmp_path / "d", BUCKETS)
    c = config(tmp_path / "d", batch=5)
    data, waiting, expected = T.Shards(c), {}, []
    for number in range(8):
        rng = np.random.default_rng((c.seed, 0, 0, number))
        ids = np.concatenate([data.ids[s] for s in rng.permutation(4)])
        for start in range(0, len(ids), 16):
            window = ids[start:start + 16].copy()
            rng.shuffle(window)
            for i in window:
                queue = waiting.setdefault(data.bucket[i], [])
                queue.append(i)
                if len(queue) == 5:
                    expected.append(queue.copy())
                    queue.clear()
    order = T.Shards(c).order()
    assert [next(order).tolist() for _ in range(60)] == np.array(expected)[:60].tolist()


@pytest.mark.parametrize("weights", [(0.7, 0.3), (3, 1), (1, 0.001)])
def test_folders_take_turns_by_weight_within_one_sample(tmp_path, weights):
    for name, first in (("a", 0), ("b", 100)):
        write_shards(tmp_path / name, first=first)
    spec = ",".join(f"{tmp_path}/{name}:{weight}" for name, weight in zip("ab", weights))
    data = T.Shards(config(spec, batch=10))
    order = data.order()
    ids = np.concatenate([next(order) for _ in range(300)])
    ours = np.cumsum(ids < data.first[len(data.folders[0])])
    assert abs(ours - weights[0] / sum(weights) * np.arange(1, 3001)).max() <= 1


def test_stages_and_seeds_have_their_own_order(tmp_path):
    write_shards(tmp_path / "d")
    first = lambda c, stage: next(T.Shards(c, stage).order()).tolist()
    a = first(config(tmp_path / "d"), 0)
    assert a == first(config(tmp_path / "d"), 0)
    assert a != first(config(tmp_path / "d"), 1) and a != first(config(tmp_path / "d", seed=1), 0)


def test_captions_follow_the_mix_and_resume(tmp_path):
    c = config(write_shards(tmp_path / "d"), batch=12, captions="mix:0.25")
    [whole], [rest] = loaders(c), loaders(c, skip=7)
    batches = [next(whole) for _ in range(40)]
    assert all(equal(batch, next(rest)) for batch in batches[7:])
    kinds = torch.cat([b.text[:, 0] for b in batches])
    assert 0.18 < (kinds == 0).float().mean() < 0.32 and (kinds < 2).all()
    for kind in ("long", "short"):
        [loader] = loaders(replace(c, captions=kind))
        assert (next(loader).text[:, 0] == (kind == "long")).all()


def test_one_caption_in_ten_is_dropped_and_all_ranks_agree_which(tmp_path):
    c = config(write_shards(tmp_path / "d"), batch=100, caption_dropout=0.1)
    [whole], ranks = loaders(c), loaders(c, 4)
    dropped = []
    for _ in range(20):
        batch = next(whole)
        assert equal(batch, together([next(r) for r in ranks]))
        dropped.append((batch.text[:, 0] == 2).float())
    assert 0.07 < torch.cat(dropped).mean() < 0.13 and len({tuple(d.tolist()) for d in dropped}) > 15


def test_draws_depend_on_the_step_and_data_on_the_batch_of_the_stage(tmp_path):
    """The second stage begins at its first batch, and goes on with the run's steps."""
    c = config(write_shards(tmp_path / "d"), batch=8)
    [first], [second] = loaders(c), loaders(c, skip=0, step=5)
    a, b = ([next(x) for _ in range(6)] for x in (first, second))
    assert torch.equal(a[0].x, b[0].x) and not torch.equal(a[0].eps, b[0].eps)
    assert torch.equal(a[5].t, b[0].t) and torch.equal(a[5].eps, b[0].eps)


def test_a_position_deep_in_a_large_set_is_found_without_a_sample(tmp_path, monkeypatch):
    """10 million samples, position 2 million: numpy only, no sample is touched."""
    data = T.Shards(config(write_shards(tmp_path / "d"), batch=1000))
    count, shards = 10_000_000, 10_000
    data.ids = list(np.arange(count).reshape(shards, -1))
    data.folders, data.bucket, data.counts = [list(range(shards))], np.zeros(count, np.int64), [count]
    touched = []
    for method in ("picture", "prompt", "ragged", "caption"):
        monkeypatch.setattr(T.Shards, method, lambda *a: touched.append(a))
    start, order = time.process_time(), data.order()
    for _ in range(2000):
        next(order)
    assert time.process_time() - start < 60 and not touched  # 1.5 s


# --- what a batch holds

def test_latents_and_stored_text_come_out_as_they_went_in(tmp_path):
    write_shards(tmp_path / "d", latent=LATENT, text=dict(text="tiny", width=6, max_tokens=40), image=None)
    c = config(tmp_path / "d", vae="v", batch=64, caption_dropout=0.2)
    data = T.Shards(c)
    loader = T.Loader(data, c, T.Frozen(vae=SimpleNamespace(**data.latent)), T.World())
    batch = next(loader)
    assert batch.pixels is None and batch.x.dtype == torch.bfloat16 and batch.x.shape == batch.eps.shape == (64, 4, 4, 4)
    assert batch.text.shape == (64, 40, 6) and batch.t.shape == (64,)
    empty = 0
    for latent, row, m in zip(batch.x, batch.text, batch.mask):
        i = int(latent[0, 0, 0])
        assert (latent == i).all() and (row[~m] == 0).all()
        assert (row[m] == i).all() and len(row[m]) == 1 + i % 5 or (row[m] == -1).all() and len(row[m]) == 1
        empty += bool((row[m] == -1).all())
    assert 4 < empty < 28  # the empty prompt's states, for a fifth of them
    texts, captions = data.prompts(3)
    assert captions == ["long number 0", "long number 1", "long number 2"] and (texts[2] == 2).all()


@pytest.mark.parametrize("image, close", [("jpeg", 1), ("png", 0)])
def test_compressed_images_are_decoded(tmp_path, image, close):
    write_shards(tmp_path / "d", image=image)
    [loader] = loaders(config(tmp_path / "d", batch=8))
    batch = next(loader)
    assert batch.x.shape == (8, 3, 32, 32)
    shown = batch.x[:, :, 0, 0] if image == "jpeg" else batch.x[:, :1, 0, 0]
    assert (shown.int() - torch.tensor(numbers(batch))[:, None]).abs().max() <= close
    [raw] = loaders(config(write_shards(tmp_path / "raw"), batch=8))
    assert image == "jpeg" or torch.equal(batch.x, next(raw).x)


def test_images_beside_latents_are_read_only_while_a_teacher_looks(tmp_path, monkeypatch):
    write_shards(tmp_path / "d", latent=LATENT)
    read, picture = [], T.Shards.picture
    monkeypatch.setattr(T.Shards, "picture", lambda *a: (read.append(1), picture(*a))[1])
    c = config(tmp_path / "d", vae="v", batch=8, repa=1.0)
    [loader] = loaders(c, teacher="a teacher")
    batch = next(loader)
    assert batch.pixels.shape == (8, 3, 32, 32) and batch.pixels[:, 0, 0, 0].tolist() == numbers(batch) and len(read) == 8
    loader.frozen.teacher = None  # as the loop does at the end of REPA
    assert next(loader).pixels is None and len(read) == 8


def test_prompts_are_held_out_where_there_is_an_evaluation_set(tmp_path):
    write_shards(tmp_path / "d", BUCKETS)
    texts, captions = T.Shards(config(tmp_path / "d")).prompts(6)
    assert texts == captions and [int(t.split()[-1]) for t in captions] == [46, 47, 48, 49, 50, 46]


def test_a_batch_is_cut_into_micro_batches():
    x = torch.arange(12)
    parts = T.Batch(x, x * 2, x * 3, x * 4, None, x * 5, None).split(3)
    assert len(parts) == 3 and all(len(p.x) == 4 and p.pixels is None and p.keep is None for p in parts)
    assert equal(together(parts), T.Batch(x, x * 2, x * 3, x * 4, None, x * 5, None))


# --- workers, as on CUDA

def pooled(c, workers, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    [loader] = loaders(c)
    loader.pool = ThreadPoolExecutor(workers)
    return loader


def test_workers_read_all_rows_in_the_same_order(tmp_path, monkeypatch):
    """Every row is copied out of the files by a worker, none by the trainer's thread, and comes when it is due."""
    c = config(write_shards(tmp_path / "d", BUCKETS), batch=6, captions="mix:0.5", caption_dropout=0.3)
    [plain] = loaders(c)
    expected = [next(plain) for _ in range(30)]
    readers, picture = [], T.Shards.picture

    def spy(self, s, row):
        readers.append(threading.current_thread())
        time.sleep(0.001 * (row % 3))  # so that a later batch may be ready first
        return picture(self, s, row)

    monkeypatch.setattr(T.Shards, "picture", spy)
    loader = pooled(c, 4, monkeypatch)
    for batch in expected:
        mine = next(loader)
        assert equal(mine, batch)
        for tensors in loader.data.tensors.values():  # its own memory, not a view of a file
            begin = tensors["image"].data_ptr()
            assert not begin <= mine.x.data_ptr() < begin + tensors["image"].nbytes
    loader.pool.shutdown(wait=True, cancel_futures=True)
    assert threading.main_thread() not in readers and len(set(readers)) == 4 and len(readers) >= 30 * 6


def test_a_slow_file_is_hidden_by_more_workers(tmp_path, monkeypatch):
    """A disk that answers one row in a millisecond or more: four rows wait at once. Counted, not timed."""
    waiting, most, lock, picture = [0], [0], threading.Lock(), T.Shards.picture

    def slow(self, s, row):
        with lock:
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
        time.sleep(0.005)
        with lock:
            waiting[0] -= 1
        return picture(self, s, row)

    monkeypatch.setattr(T.Shards, "picture", slow)
    for workers in (1, 4):
        most[0] = 0
        loader = pooled(config(tmp_path / "d" if workers > 1 else write_shards(tmp_path / "d"), batch=8), workers, monkeypatch)
        for _ in range(8):
            next(loader)
        loader.pool.shutdown(wait=True, cancel_futures=True)
        assert most[0] == workers


def test_what_a_worker_cannot_read_is_said_by_the_trainer(tmp_path, monkeypatch):
    loader = pooled(config(write_shards(tmp_path / "d"), batch=8), 2, monkeypatch)
    next(loader)
    monkeypatch.setattr(T.Shards, "picture", lambda *a: (_ for _ in ()).throw(T.UserError("shard 7 is broken")))
    with pytest.raises(T.UserError, match="shard 7 is broken"):
        for _ in range(8):
            next(loader)
    loader.pool.shutdown(wait=True, cancel_futures=True)


# --- what is refused

@pytest.mark.parametrize("flags, says", [
    (["--captions", "short"], "--captions short needs"),
    (["--captions", "mix:0.5"], "--captions mix:0.5 needs"),
    (["--resolution", "64"], "holds images of 32 px, and this stage trains at --resolution 64"),
    (["--patch", "5"], "images of 32 x 32 px cannot be cut into tokens of 5 px (--vae none, --patch 5)"),
    (["--data", "{d}:0"], "is no list of folders with positive weights"),
    (["--data", "{d},nowhere"], "--data nowhere holds no index.json"),
    (["--stages", "512px"], "--stages 512px is unknown; this run has main"),
    (["--stages", ""], "--stages  is unknown; this run has main"),
])
def test_settings_that_do_not_fit_are_refused_with_both_values(tmp_path, in_tmp, capsys, flags, says):
    data = write_shards(tmp_path / "d", fields=("long",))
    flags = [f.format(d=data) for f in flags]
    assert T.main([*TINY, "--steps", "2", "--data", str(data), *flags]) == 2
    err = capsys.readouterr().err
    assert says.format(d=data) in err and err.count("\n") == 1 and not Path("logs").exists()


def test_other_text_settings_latents_without_their_vae_and_unlike_folders_are_refused(tmp_path):
    write_shards(tmp_path / "text", text=dict(text="t5gemma", width=2304, max_tokens=256))
    write_shards(tmp_path / "latent", latent=LATENT, image=None)
    write_shards(tmp_path / "plain")
    write_shards(tmp_path / "png", image="png")
    for spec, kw, says in (
            ("text", {}, r"encoded with .*t5gemma.*256.* and this run has .*tiny.*40"),
            ("latent", {}, r"images, and .*latent holds none; prepare it with --store"),
            ("latent", dict(vae="v", repa=1.0), r"--repa.*latent holds none; prepare it with --store"),
            ("latent,plain", dict(vae="v"), "cannot be mixed: their latent is None and {"),
            ("plain,png", {}, "cannot be mixed: their image is png and raw")):
        spec = ",".join(f"{tmp_path}/{part}" for part in spec.split(","))
        with pytest.raises(T.UserError, match=says):
            T.Shards(config(spec, **kw))


def test_folders_with_other_networks_are_not_mixed(tmp_path):
    for name in "ab":
        path = write_shards(tmp_path / name) / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(networks=dict(text=name))))
    with pytest.raises(T.UserError, match="cannot be mixed: their networks is"):
        T.Shards(config(f"{tmp_path}/a,{tmp_path}/b"))


def test_a_truncated_shard_is_named(tmp_path, in_tmp, capsys):
    data = write_shards(tmp_path / "d")
    shard = data / "train-00001.safetensors"
    for content in (shard.read_bytes()[:200], shard.read_bytes()[:-7], b""):
        shard.write_bytes(content)
        assert T.main([*TINY, "--steps", "1", "--data", str(data)]) == 2
        err = capsys.readouterr().err
        assert "train-00001.safetensors cannot be read" in err and err.count("\n") == 1
    shard.unlink()
    assert T.main([*TINY, "--steps", "1", "--data", str(data)]) == 2
    assert "train-00001.safetensors cannot be read" in capsys.readouterr().err and not Path("logs").exists()


SHARD = dict(file="train-00000.safetensors", split="train", count=7, resolution=32, height=32, width=32, sha256="", skip=[])
INDEX = dict(format=2, captions=["long"], latent=None, text=None, image="raw", shards=[SHARD])


@pytest.mark.parametrize("content, says", [
    ("{", "is damaged"), ("[]", "is damaged"), ('{"format": 2}', "is damaged"), ("", "is damaged"),
    ('{"format": 1}', "has format 1, this script reads 2; prepare the data again"),
    (json.dumps(INDEX | dict(shards=[])), "is damaged"),
    (json.dumps(INDEX | dict(shards=[{"file": "x"}])), "is damaged"),
    (json.dumps(INDEX | dict(shards=[SHARD | dict(split="eval", count=20)])), "no training image of 32 px"),
    (json.dumps(INDEX), "does not hold the 7 samples that its index promises")])
def test_a_damaged_index_is_one_sentence(tmp_path, in_tmp, capsys, content, says):
    data = write_shards(tmp_path / "d")
    (data / "index.json").write_text(content)
    assert T.main([*TINY, "--steps", "2", "--data", str(data)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_data_that_are_missing_are_said_with_the_command_that_writes_them(in_tmp, capsys):
    for track, command in (("micro", f"`{T.command('data/scenes.py')} --track micro --out shards/micro`"),
                           ("mini", f"`{T.command('data/scenes.py')} --track mini --out shards/mini`"),
                           ("24h", "data/prepare.py")):
        assert T.main(["--track", track]) == 2
        assert f"--data shards/{track} holds no index.json; write it with {command}" in capsys.readouterr().err


# --- whole runs

@pytest.mark.xdist_group("ranks")
def test_a_mixture_trains_on_two_ranks_as_on_one_and_resumes(in_tmp):
    for name, first in (("a", 0), ("b", 100)):
        write_shards(in_tmp / name, BUCKETS, first=first)
    flags = [*TINY, "--steps", "12", "--data", "a:0.7,b:0.3", "--captions", "mix:0.4", "--patch", "8"]
    assert T.main([*flags, "--name", "one"]) == 0
    for stop in ("5", "0"):
        done = shell(*torchrun(2), SCRIPT, *flags, "--name", "two", "--stop-after", stop)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses("two")) == 12 and np.allclose(losses("one"), losses("two"), rtol=1e-4)
