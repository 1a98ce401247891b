"""Shards as the trainer reads them: every sample once per epoch in an order that resumes, and nothing that does not fit."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train_prx as T
from data.preflight import read_metrics
from data.shards import ShardData

TINY = ("--track micro --repa 0 --ema 0.99 --hidden 32 --heads 2 --depth 2 --batch 16 --samples 0 --sample-steps 2 --compile off "
        "--compute fp32").split()
LATENT = dict(vae="v", type="AutoencoderKL", channels=4, factor=8, scale=0.5, shift=0.1, sha256="ab")


def write_shards(folder: Path, parts=((20, 32, 32, "train"), (14, 32, 32, "train")), fields=("long", "short"), image="raw",
                 latent=None, text=None, first=0, skip=(), resolution=32):
    """A folder in format 2. parts: (count, height, width, split). Sample i says so in its caption and in its values."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    index = {"format": 2, "captions": list(fields), "image": image, "latent": latent, "text": text, "shards": []}
    for n, (count, height, width, split) in enumerate(parts):
        ids = range(first, first + count)
        tensors = {"hash": torch.tensor([list(hashlib.sha256(b"%d" % i).digest()[:16]) for i in ids], dtype=torch.uint8)}
        pixels = torch.randint(0, 256, (count, 3, height, width), generator=g, dtype=torch.uint8)
        pixels[:, 0] = torch.tensor(ids, dtype=torch.uint8)[:, None, None]
        if image == "raw":
            tensors["image"] = pixels
        elif image == "jpeg":
            files = []
            for x in pixels:
                file = io.BytesIO()
                Image.fromarray(x[:1].expand(3, -1, -1).permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
                files.append(file.getvalue())
            tensors["jpeg"] = torch.tensor(list(b"".join(files)), dtype=torch.uint8)
            tensors["jpeg.offset"] = torch.tensor([0, *np.cumsum([len(f) for f in files])])
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
        index["shards"].append(dict(file=path.name, split=split, count=count, resolution=resolution, height=height,
                                    width=width, sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                                    skip=[i - first for i in skip if i in ids]))
        first += count
    if text:
        save_file({"text": torch.full((1, text["width"]), -1.0).bfloat16()}, folder / "empty.safetensors")
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def config(data, **kw):
    return T.dataclasses.replace(T.TRACKS["micro"][0], data=str(data), **dict(repa=0.0) | kw)


def numbers(texts):
    return [int(t.split()[-1]) for t in texts]


# --- order

BUCKETS = ((20, 32, 32, "train"), (14, 24, 40, "train"), (9, 32, 32, "train"), (3, 40, 24, "train"), (5, 32, 32, "eval"))


def test_each_sample_is_seen_once_per_epoch_over_all_ranks_with_its_own_image(tmp_path):
    write_shards(tmp_path / "d", ((20, 32, 32, "train"), (20, 32, 32, "train"), (7, 32, 32, "eval")))
    data, seen = ShardData(config(tmp_path / "d", batch=8)), []
    ranks = [data.batches(0, slice(r * 4, r * 4 + 4)) for r in range(2)]
    for _ in range(10):  # two epochs of 40
        for images, captions, _ in (next(r) for r in ranks):
            assert images[:, 0, 0, 0].tolist() == numbers(captions)
            seen += numbers(captions)
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40)) and seen[:40] != seen[40:]


@pytest.mark.parametrize("folders", [1, 2])
def test_buckets_and_mixtures_lose_nothing_over_ranks_a_stop_and_a_resume(tmp_path, folders):
    """Two ranks, stopped after 11 batches and gone on with in new processes: the same batches as one undisturbed rank,
    one bucket each, and every sample of a folder once per epoch of that folder."""
    write_shards(tmp_path / "a", BUCKETS, skip=[3, 25])
    write_shards(tmp_path / "b", BUCKETS, first=100)
    spec = f"{tmp_path}/a" if folders == 1 else f"{tmp_path}/a:0.75,{tmp_path}/b:0.25"
    c = config(spec, batch=6)
    whole = ShardData(c).batches(0, slice(0, 6))
    expected = [next(whole) for _ in range(120)]
    seen = []
    for skip, stop in ((0, 11), (11, 120)):
        ranks = [ShardData(c).batches(skip, slice(r * 3, r * 3 + 3)) for r in range(2)]
        for _ in range(skip, stop):
            (x, a, _), (y, b, _) = (next(r) for r in ranks)
            assert x.shape == y.shape
            seen.append(a + b)
    assert seen == [texts for _, texts, _ in expected]
    assert {x.shape[2:] for x, *_ in expected} == {(32, 32), (24, 40), (40, 24)}
    flat = [i for batch in seen for i in numbers(batch)]
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
    data = ShardData(config(tmp_path / "d", batch=4))
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
    monkeypatch.setattr(ShardData, "CHUNK", 50)
    monkeypatch.setattr(ShardData, "WINDOW", 16)
    write_shards(tmp_path / "d", BUCKETS)
    c = config(tmp_path / "d", batch=5)
    data, waiting, expected = ShardData(c), {}, []
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
    order = ShardData(c).order()
    assert [next(order).tolist() for _ in range(60)] == np.array(expected)[:60].tolist()


def test_stages_and_seeds_have_their_own_order(tmp_path):
    write_shards(tmp_path / "d")
    first = lambda c, stage: next(ShardData(c, stage).order()).tolist()
    a = first(config(tmp_path / "d"), 0)
    assert a == first(config(tmp_path / "d"), 0)
    assert a != first(config(tmp_path / "d"), 1) and a != first(config(tmp_path / "d", seed=1), 0)


def test_captions_follow_the_mix_and_resume(tmp_path):
    c = config(write_shards(tmp_path / "d"), batch=12, captions="mix:0.5")
    whole, rest = (ShardData(c).batches(skip, slice(0, 12)) for skip in (0, 7))
    batches = [next(whole) for _ in range(12)]
    for images, captions, _ in batches[7:]:
        again = next(rest)
        assert torch.equal(images, again[0]) and captions == again[1]
    kinds = [t.split()[0] for _, texts, _ in batches for t in texts]
    assert 0.3 < kinds.count("short") / len(kinds) < 0.7


def test_a_position_deep_in_a_large_set_is_found_in_seconds(tmp_path):
    """10 million samples, position 2 million: numpy only, no sample is touched."""
    import time

    data = ShardData(config(write_shards(tmp_path / "d"), batch=1000))
    count, shards = 10_000_000, 10_000
    data.ids = list(np.arange(count).reshape(shards, -1))
    data.folders, data.bucket, data.count = [list(range(shards))], np.zeros(count, np.int64), count
    start, order = time.perf_counter(), data.order()
    for _ in range(2000):
        next(order)
    assert time.perf_counter() - start < 20


# --- what a batch holds

def test_latents_and_stored_text_come_out_as_they_went_in(tmp_path):
    write_shards(tmp_path / "d", latent=LATENT, text=dict(text="tiny", width=6, max_tokens=80), image=None)
    c = config(tmp_path / "d", vae="v", batch=8, caption_dropout=0.5)
    data = ShardData(c)
    x, texts, images = next(data.batches(0, slice(0, 8)))
    assert images is None and x.dtype == torch.bfloat16 and x.shape == (8, 4, 4, 4)
    for latent, text in zip(x, texts):
        i = int(latent[0, 0, 0])
        assert (latent == i).all() and text.shape == (1 + i % 5, 6) and (text == i).all()
    x, t, (states, mask), _ = next(T.host_batches(data, c, 0, 0, slice(0, 8)))
    assert states.shape == (8, 40, 6) and t.shape == (8,)
    for latent, row, m in zip(x, states, mask):
        i = int(latent[0, 0, 0])
        kept = row[m]
        assert (row[~m] == 0).all() and ((kept == i).all() and len(kept) == 1 + i % 5 or (kept == -1).all())
    assert 0 < (states[:, 0, 0] == -1).sum() < 8  # the empty prompt's embedding, for half of them
    texts, captions = data.prompts(3)
    assert captions == ["long number 0", "long number 1", "long number 2"] and (texts[2] == 2).all()


def test_jpegs_are_decoded(tmp_path):
    write_shards(tmp_path / "d", image="jpeg")
    x, texts, _ = next(ShardData(config(tmp_path / "d")).batches(0, slice(0, 8)))
    assert x.shape == (8, 3, 32, 32) and (x[:, :, 0, 0] - torch.tensor(numbers(texts))[:, None]).abs().max() <= 1


def test_prompts_are_held_out_where_there_is_an_evaluation_set(tmp_path):
    write_shards(tmp_path / "d", BUCKETS)
    assert numbers(ShardData(config(tmp_path / "d")).prompts(6)[1]) == [46, 47, 48, 49, 50, 46]


# --- what is refused

@pytest.mark.parametrize("flags, says", [
    (["--captions", "short"], "--captions short needs the field short, which {d} does not have; it has long"),
    (["--captions", "mix:0.5"], "--captions mix:0.5 needs the field short"),
    (["--resolution", "64"], "holds images of 32 px and this stage trains at --resolution 64"),
    (["--patch", "5"], "images of 32 x 32 px cannot be cut into tokens of 5 px (--vae none and --patch 5)"),
    (["--data", "{d}:0"], "is not a list of folders with positive weights"),
    (["--data", "{d},nowhere"], "--data nowhere holds no index.json"),
    (["--stages", "512px"], "--stages 512px is unknown; this run has main"),
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
    for spec, kw, says in (
            ("text", {}, r"encoded with .*t5gemma.*256.* and this run has .*tiny.*80"),
            ("latent", {}, r"--vae none trains on pixels and .* holds latents only; give the --vae .*\(v\)"),
            ("latent,plain", dict(vae="v"), "cannot be mixed: their latent is None and {")):
        spec = ",".join(f"{tmp_path}/{part}" for part in spec.split(","))
        with pytest.raises(T.UserError, match=says):
            ShardData(config(spec, **kw))


def test_a_truncated_shard_and_a_flipped_byte_are_named(tmp_path, in_tmp, capsys):
    data = write_shards(tmp_path / "d")
    shard = data / "train-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    assert T.main([*TINY, "--steps", "1", "--name", "a", "--data", str(data)]) == 0  # nobody looks unless asked
    assert T.main([*TINY, "--steps", "1", "--name", "b", "--data", str(data), "--verify-data"]) == 2
    assert "train-00001.safetensors is not the file that its index names (sha256 differs)" in capsys.readouterr().err
    shard.write_bytes(whole)
    assert T.main([*TINY, "--steps", "1", "--name", "c", "--data", str(data), "--verify-data"]) == 0
    shard.write_bytes(whole[:200])
    assert T.main([*TINY, "--steps", "1", "--name", "d", "--data", str(data)]) == 2
    assert "train-00001.safetensors cannot be read" in capsys.readouterr().err


SHARD = dict(file="train-00000.safetensors", split="train", count=7, resolution=32, height=32, width=32, sha256="", skip=[])
INDEX = dict(format=2, captions=["long"], latent=None, text=None, image="raw", shards=[SHARD])


@pytest.mark.parametrize("content, says", [
    ("{", "is damaged"), ("[]", "is damaged"), ('{"format": 2}', "is damaged"),
    ('{"format": 1}', "has format 1, this script reads 2; prepare the data again"),
    (json.dumps(INDEX | dict(shards=[])), "is damaged"),
    (json.dumps(INDEX | dict(shards=[{"file": "x"}])), "is damaged"),
    (json.dumps(INDEX), "does not hold the 7 samples that its index promises")])
def test_a_damaged_index_is_one_sentence(tmp_path, in_tmp, capsys, content, says):
    data = write_shards(tmp_path / "d")
    (data / "index.json").write_text(content)
    assert T.main([*TINY, "--steps", "2", "--data", str(data)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_an_image_in_both_sets_is_found_by_its_hash(tmp_path, in_tmp, capsys):
    write_shards(tmp_path / "a")
    write_shards(tmp_path / "b", ((5, 32, 32, "train"), (5, 32, 32, "eval")), first=29)  # 34 to 38 are held out there
    write_shards(tmp_path / "c", ((5, 32, 32, "train"), (5, 32, 32, "eval")), first=25)  # 30 to 33 are trained on in a
    assert T.main([*TINY, "--steps", "2", "--data", f"{tmp_path}/a,{tmp_path}/b"]) == 0
    assert T.main([*TINY, "--steps", "2", "--data", f"{tmp_path}/a,{tmp_path}/c"]) == 2
    assert "4 images are in the training set of" in capsys.readouterr().err


# --- whole runs

def test_a_mixture_trains_on_two_ranks_as_on_one_and_resumes(in_tmp):
    for name, first in (("a", 0), ("b", 100)):
        write_shards(in_tmp / name, BUCKETS, first=first)
    flags = [*TINY, "--steps", "12", "--data", "a:0.7,b:0.3", "--captions", "mix:0.4", "--patch", "8"]
    assert T.main([*flags, "--name", "one"]) == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for stop in ("5", "0"):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                               T.__file__, *flags, "--name", "two", "--stop-after", stop], capture_output=True, text=True,
                              env=environment, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    losses = lambda name: [x for r in read_metrics(Path("logs") / name) for x in r.get("losses", [])]
    assert len(losses("two")) == 12 and np.allclose(losses("one"), losses("two"), rtol=1e-4)
