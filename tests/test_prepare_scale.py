"""data/prepare.py on hundreds of images: formats, networks, kills, ranks, duplicates, a hub on localhost."""

import contextlib
import csv
import errno
import hashlib
import http.server
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import prepare as prep, scenes, sources  # noqa: E402
from data.shards import NETWORKS, UserError, verify  # noqa: E402

COUNT = 520


# ---- sources and networks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples():
    """(name, PNG bytes, long caption, short caption) of scenes, 64 px."""
    drawn = scenes.draw_scenes(range(COUNT))
    out = []
    for i, (image, *texts) in enumerate(zip(scenes.render(drawn, 64), scenes.captions(drawn, "long"),
                                            scenes.captions(drawn, "short"))):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG", compress_level=1)
        out.append((f"{i:05d}.png", buffer.getvalue(), *texts))
    return out


def as_folder(path: Path, samples) -> Path:
    path.mkdir(parents=True)
    lines = []
    for name, data, long, short in samples:
        (path / name).write_bytes(data)
        lines.append(json.dumps({"file_name": name, "text": long, "text_short": short}) + "\n")
    (path / "metadata.jsonl").write_text("".join(lines))
    return path


def as_tars(path: Path, samples, each: int) -> Path:
    path.mkdir(parents=True)
    for start in range(0, len(samples), each):
        with tarfile.open(path / f"{start:05d}.tar", "w") as archive:
            for name, data, long, short in samples[start:start + each]:
                about = json.dumps({"long_caption": long, "short_caption": short}).encode()
                for member, content in ((name, data), (name.replace("png", "json"), about)):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return path


def as_parquet(path: Path, samples, each: int, plain: bool = False) -> Path:
    path.mkdir(parents=True)
    for start in range(0, len(samples), each):
        names, images, longs, shorts = zip(*samples[start:start + each])
        images = list(images) if plain else [{"bytes": data, "path": name} for name, data in zip(names, images)]
        table = pa.table({"id": list(range(len(names))), "image": images, "prompt": longs, "short_caption": shorts})
        pq.write_table(table, path / f"{start:05d}.parquet", row_group_size=70)
    return path


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The folders of a small VAE and a small T5Gemma encoder with random weights."""
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=16,
                  scaling_factor=0.3611, shift_factor=0.1159).save_pretrained(folder / "vae")
    tokenizer = AutoTokenizer.from_pretrained(NETWORKS / "text")
    half = T5GemmaModuleConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                               num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    config = T5GemmaConfig(encoder=half, decoder=half, is_encoder_decoder=False, vocab_size=len(tokenizer))
    T5GemmaEncoderModel(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return {"vae": str(folder / "vae"), "text": str(folder / "text")}


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(shard: dict, name: str) -> list:
    data, offset = shard[name], shard[f"{name}.offset"].tolist()
    return [data[a:b] for a, b in zip(offset[:-1], offset[1:])]


def shards(out: Path, split: str) -> list[dict]:
    index = json.loads((out / "index.json").read_text())
    return [load_file(out / shard["file"]) for shard in index["shards"] if shard["split"] == split]


ALL = dict(size=32, store="image,latent,text", eval_share=0.1, shard_size=200)


@pytest.fixture(scope="module")
def three(samples, networks, tmp_path_factory):
    """The same samples prepared from each kind of source, undisturbed."""
    tmp = tmp_path_factory.mktemp("three")
    given = {"folder": as_folder(tmp / "folder", samples), "tars": as_tars(tmp / "tars", samples, 150),
             "parquet": as_parquet(tmp / "parquet", samples, 300)}
    for name, source in given.items():
        prep.prepare(source, tmp / f"out-{name}", **ALL, **networks)
    return tmp


# ---- formats and networks --------------------------------------------------------------------------------------------


def test_three_kinds_of_source_give_the_same_shards(three):
    folder, tars, parquet = (json.loads((three / f"out-{kind}" / "index.json").read_text())
                             for kind in ("folder", "tars", "parquet"))
    assert folder["shards"] == tars["shards"] == parquet["shards"] and len(folder["shards"]) >= 4
    assert folder["count"] + folder["eval_count"] == COUNT and folder["captions"] == ["long", "short"]
    assert {s["split"] for s in folder["shards"]} == {"train", "eval"}
    for kind in ("folder", "tars", "parquet"):
        files = contents(three / f"out-{kind}")
        assert all(files[s["file"]] == s["sha256"] for s in folder["shards"])
        assert str(three) not in (three / f"out-{kind}" / "index.json").read_text()
        assert not (three / f"out-{kind}" / ".prepare").exists()


KINDS_OF_LIST = ("csv", "parquet", "txt")


def as_images(path: Path, samples, metadata: str) -> Path:
    """A folder of images with metadata.csv or .parquet, or with KEY.txt and KEY.json beside each."""
    path.mkdir(parents=True)
    for name, data, long, short in samples:
        (path / name).write_bytes(data)
        if metadata == "txt":
            (path / name.replace("png", "txt")).write_text(long)
            (path / name.replace("png", "json")).write_text(json.dumps({"text_short": short}))
    names, _, longs, shorts = zip(*samples)
    table = pa.table({"file_name": names, "text": longs, "text_short": shorts})
    if metadata == "csv":
        with open(path / "metadata.csv", "w", newline="") as file:
            rows = csv.DictWriter(file, table.column_names)
            rows.writeheader()
            rows.writerows(table.to_pylist())
    elif metadata == "parquet":
        pq.write_table(table, path / "metadata.parquet")
    return path


def test_seven_layouts_of_the_same_images_give_the_same_bytes(samples, tmp_path, hub):
    samples, settings = samples[:500], dict(size=32, eval_share=0.1, shard_size=200)
    sources = {"jsonl": as_folder(tmp_path / "jsonl", samples), "tar": as_tars(tmp_path / "tar", samples, 120),
               "parquet": as_parquet(tmp_path / "parquet", samples, 300),
               **{f"images-{kind}": as_images(tmp_path / kind, samples, kind) for kind in ("csv", "txt")},
               "images-parquet": as_images(tmp_path / "images-parquet", samples, "parquet")}
    indices = {kind: prep.prepare(source, tmp_path / f"out-{kind}", **settings) for kind, source in sources.items()}
    tables = as_parquet(tmp_path / "hub", samples, 100)
    Hub.stall, Hub.files = "", {f"data/train-{i:05d}-of-00005.parquet": path.read_bytes()
                                for i, path in enumerate(sorted(tables.iterdir()))}
    process = from_hub(hub, 10**9, ("hf://good/set", "--out", tmp_path / "out-hub", "--size", 32, "--eval-share", 0.1,
                                    "--shard-size", 200))
    _, error = process.communicate()
    assert process.returncode == 0, error
    expected, index = contents(tmp_path / "out-jsonl"), indices["jsonl"]
    assert index["count"] + index["eval_count"] == 500 and len(index["shards"]) >= 4
    for kind in [*indices, "hub"]:
        files = contents(tmp_path / f"out-{kind}")
        other = json.loads((tmp_path / f"out-{kind}/index.json").read_text())
        assert {**other, "source": 0, "job": 0} == {**index, "source": 0, "job": 0}, kind
        assert {k: v for k, v in files.items() if k != "index.json"} == {k: v for k, v in expected.items()
                                                                         if k != "index.json"}, kind


@pytest.mark.parametrize("kind", KINDS_OF_LIST)
def test_a_job_of_any_list_goes_on_after_its_last_part(samples, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "PART_LINES", 9)
    source, write = as_images(tmp_path / "in", samples[:30], kind), prep.PartWriter.close
    prep.prepare(source, tmp_path / "undisturbed", eval_share=0.2)
    done = []

    def fail(self, fields):
        done.append(self.name)
        if done == ["part-00000", "part-00001", "part-00002"]:
            raise OSError("unplugged")
        return write(self, fields)
    monkeypatch.setattr(prep.PartWriter, "close", fail)
    with pytest.raises(OSError, match="unplugged"):
        prep.prepare(source, tmp_path / "out", eval_share=0.2)
    prep.prepare(f"{source}/", tmp_path / "out", eval_share=0.2)  # the same folder, written in another way
    assert done[3:] == ["part-00002", "part-00003"] and contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_another_way_to_write_the_source_is_no_other_job(samples, tmp_path, monkeypatch):
    source, close = as_tars(tmp_path / "in", samples[:20], 10), prep.PartWriter.close
    monkeypatch.setattr(prep.PartWriter, "close", lambda self, fields: (_ for _ in ()).throw(OSError("unplugged")))
    with pytest.raises(OSError, match="unplugged"):
        prep.prepare(source, tmp_path / "out", eval_share=0)
    monkeypatch.setattr(prep.PartWriter, "close", close)
    assert prep.prepare(f"{source}/*.tar", tmp_path / "out", eval_share=0)["count"] == 20


def test_two_processes_do_not_prepare_the_same_folder(samples, tmp_path, monkeypatch, capsys):
    source, out = as_folder(tmp_path / "in", samples[:20]), tmp_path / "out"

    def second(*args):
        monkeypatch.setattr(prep, "run_parts", run_parts)
        for again in (dict(), dict(overwrite=True), dict(size=16)):
            with pytest.raises(UserError, match=f"another process is preparing {out}: wait for it, or take another"):
                prep.prepare(source, out, eval_share=0, **again)
        return run_parts(*args)
    run_parts = prep.run_parts
    monkeypatch.setattr(prep, "run_parts", second)
    assert prep.prepare(source, out, eval_share=0)["count"] == 20 and not (out / ".prepare").exists()
    with pytest.raises(UserError, match="already holds a prepared data set: --overwrite replaces it"):
        prep.prepare(source, out, eval_share=0)

    def none(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(prep.fcntl, "flock", none)
    assert prep.prepare(source, out, eval_share=0, overwrite=True)["count"] == 20
    assert "warning: the file system cannot lock" in capsys.readouterr().out


def test_what_is_not_finite_is_left_out_and_counted(samples, tmp_path, monkeypatch, networks):
    """A latent of one size, latents of both, a text; and a duplicate stays one."""
    latents, states = prep.Networks.latents, prep.Networks.states
    bad = {hashlib.sha256(samples[i][1]).digest()[:16] for i in (3, 4, 5)}

    def with_nan(self, images):
        out = latents(self, images)
        for row, image in zip(out, images):
            if image.tobytes() in broken:
                row[0, 0, 0] = float("nan")
        return out
    large, both = (prep.decode(samples[i][1], {size: [(size, size)] for size in (32, 64)}) for i in (3, 4))
    broken = {large[64].tobytes(), *(image.tobytes() for image in both.values())}
    text = prep.clean(samples[5][2])
    monkeypatch.setattr(prep.Networks, "latents", with_nan)
    monkeypatch.setattr(prep.Networks, "states", lambda self, prompts: [
        x * float("inf") if prompt == text else x for x, prompt in zip(states(self, prompts), prompts)])
    source = as_folder(tmp_path / "in", [*samples[:12], ("again.png", samples[7][1], "x", "x")])
    prep.prepare(source, tmp_path / "out", size="32,64", store="latent,text", eval_share=0, batch=3, **networks)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["read"], report["kept"], report["resolutions"]) == (13, 9, {"32": 9, "64": 9})
    assert {k: sorted(v["first"]) for k, v in report["skipped"].items()} == {
        "its latent is not finite": ["00003.png", "00004.png"], "its text's embedding is not finite": ["00005.png"],
        "duplicate": ["again.png"]}
    index = json.loads((tmp_path / "out/index.json").read_text())
    for entry, shard in zip(index["shards"], shards(tmp_path / "out", "train")):
        keep = [row for row in range(entry["count"]) if row not in entry["skip"]]
        assert shard["latent"][keep].isfinite().all() and len(keep) == 9
        assert not bad & {bytes(row.tolist()) for row in shard["hash"][keep]}


def test_latents_and_states_are_those_of_the_trainers_own_networks(three, networks, samples):
    from train_prx import VAE, TextEncoder
    index = json.loads((three / "out-folder" / "index.json").read_text())
    vae, text = VAE(networks["vae"]), TextEncoder(networks["text"])
    assert index["latent"] == json.loads(json.dumps(vae.about)) and index["text"] == json.loads(json.dumps(text.about))
    shard = shards(three / "out-folder", "train")[0]
    assert shard["latent"].dtype == shard["text.long"].dtype == torch.bfloat16
    assert shard["latent"].shape == (200, 16, 4, 4) and shard["latent"].float().std() > 0.01
    expected = vae.encode(shard["image"])
    assert torch.allclose(shard["latent"].float(), expected, rtol=2**-7, atol=1e-4)
    captions = {hashlib.sha256(data).digest()[:16]: (prep.clean(a), prep.clean(b)) for _, data, a, b in samples}
    longs, shorts = zip(*(captions[bytes(row.tolist())] for row in shard["hash"]))
    for field, texts in (("long", longs), ("short", shorts)):
        assert [bytes(row.tolist()).decode() for row in rows(shard, f"caption.{field}")] == list(texts)
        for stored, prompt in list(zip(rows(shard, f"text.{field}"), texts))[::7]:
            states, mask = text.encode([prompt])
            assert stored.shape == (int(mask.sum()), text.width)
            assert torch.allclose(stored.float(), states[mask], rtol=2**-7, atol=1e-3)
    states, mask = text.encode([""])
    empty = load_file(three / "out-folder" / "empty.safetensors")["text"]
    assert torch.equal(empty, states[mask].to(torch.bfloat16))


def test_the_evaluation_set_is_split_off_by_the_encoded_bytes_and_shares_nothing(three, samples):
    sets = {split: {bytes(row.tolist()) for s in shards(three / "out-folder", split) for row in s["hash"]}
            for split in ("train", "eval")}
    share = {hashlib.sha256(data).digest() for _, data, _, _ in samples}
    assert sets["eval"] == {h[:16] for h in share if int.from_bytes(h[:8], "big") / 2**64 < 0.1}
    assert sets["train"] == {h[:16] for h in share} - sets["eval"] and len(sets["eval"]) > 20


def test_jpeg_shards_and_area_filter(samples, tmp_path):
    source = as_folder(tmp_path / "in", samples[:8])
    prep.prepare(source, tmp_path / "raw", filter="area", eval_share=0)
    index = prep.prepare(source, tmp_path / "jpeg", filter="area", store="jpeg", eval_share=0)
    raw, jpeg = (shards(tmp_path / name, "train")[0] for name in ("raw", "jpeg"))
    assert index["image"] == "jpeg" and "image" not in jpeg
    assert Image.open(tmp_path / "raw" / "contact_sheet.png").width > 800
    for pixels, data in zip(raw["image"], rows(jpeg, "jpeg")):
        image = Image.open(io.BytesIO(bytes(data.tolist())))
        assert image.format == "JPEG" and image.layer[0][1:3] == (1, 1)  # 4:4:4
        assert np.abs(np.asarray(image).astype(int) - pixels.permute(1, 2, 0).numpy()).mean() < 4
    first = torch.from_numpy(np.array(Image.open(io.BytesIO(samples[0][1])))).float()
    area = first.view(32, 2, 32, 2, 3).mean((1, 3)).permute(2, 0, 1)
    assert (raw["image"][0].float() - area).abs().max() <= 1  # Pillow rounds after each direction


@pytest.mark.parametrize("settings", [
    dict(size=64, store="jpeg", crop="buckets"), dict(store="latent,text", text="tiny")],
    ids=lambda s: "-".join(map(str, s.values())))
def test_the_printed_command_trains(settings, samples, networks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    networks = networks | ({"text": "tiny"} if settings.get("text") == "tiny" else {})
    index = prep.prepare(as_folder(tmp_path / "in", samples[:60]), tmp_path / "out", **{**networks, **settings})
    if settings.get("text") == "tiny":
        assert index["text"] == {"text": "tiny", "width": 96, "max_tokens": 40}
    assert verify(tmp_path / "out") == len(index["shards"]) + 2
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    done = subprocess.run([*words, "--steps", "2", "--samples", "0", "--compile", "off", "--name", "r"], cwd=tmp_path,
                          text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("settings, captions, image, says", [
    (dict(size="256,512", store="latent,text"), ["long", "short"], None,
     "--track 24h --data d --vae repa-e --text t5gemma --text-tokens 256 --repa 0"),
    (dict(size="256,512", store="latent,jpeg"), ["long"], "jpeg", "--track 24h --data d --vae repa-e --captions long"),
    (dict(size=512, store="latent,image"), ["long", "short"], "raw",
     "--track 24h --data d --resolution 512 --vae repa-e"),
    (dict(size=256), ["long"], "raw", "--track mini --data d")])
def test_the_printed_command_says_what_the_track_does_not(settings, captions, image, says, monkeypatch):
    import train_prx
    s = prep.Settings(**settings)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv/bin/python"))
    command = prep.next_command(Path("d"), s, {"captions": captions, "image": image})
    assert command == f".venv/bin/python train_prx.py {says}"
    train_prx.parse_args(command.split()[2:])  # no flag is unknown


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_buckets_are_those_of_the_pipeline_and_the_nearest_is_taken(tmp_path):
    from diffusers.pipelines.prx.pipeline_prx import ASPECT_RATIO_BINS
    for size in (256, 512, 1024):
        assert prep.buckets(size, "buckets") == [tuple(v) for v in ASPECT_RATIO_BINS[size].values()]
    for size in (32, 64, 128, 384, 768):
        shapes = prep.buckets(size, "buckets")
        assert (size, size) in shapes and all(side % 8 == 0 for shape in shapes for side in shape)
        assert {(w, h) for h, w in shapes} == set(shapes) and len(shapes) >= 5
        assert all(0.75 < h * w / size**2 < 1.3 for h, w in shapes)
    made = []
    for i, (width, height) in enumerate([(64, 64), (64, 66), (96, 64), (64, 96), (130, 64), (64, 140)]):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8))
        image.paste((0, 0, 255), (width // 2 - 8, height // 2 - 8, width // 2 + 8, height // 2 + 8))
        image.save(buffer := io.BytesIO(), "PNG")
        made.append((f"{i}.png", buffer.getvalue(), f"image {i}", ""))
    index = prep.prepare(as_folder(tmp_path / "in", made), tmp_path / "out", size="64", crop="buckets", eval_share=0)
    assert {(s["height"], s["width"], s["count"]) for s in index["shards"]} == {
        (64, 64, 2), (48, 80, 1), (80, 48, 1), (40, 88, 1), (88, 40, 1)}
    for s in index["shards"]:
        image = load_file(tmp_path / "out" / s["file"])["image"]
        assert image.shape[2:] == (s["height"], s["width"])
        assert (image[0, :, s["height"] // 2, s["width"] // 2].int() - torch.tensor([0, 0, 255])).abs().max() < 3


def test_several_sizes_make_one_sample_each_and_small_images_only_the_sizes_they_reach(samples, tmp_path, networks):
    small = Image.new("RGB", (40, 40), "red")
    small.save(buffer := io.BytesIO(), "PNG")
    source = as_folder(tmp_path / "in", [*samples[:5], ("small.png", buffer.getvalue(), "small", "s")])
    index = prep.prepare(source, tmp_path / "out", size="32,64", store="latent", vae=networks["vae"], eval_share=0)
    assert {s["resolution"]: s["count"] for s in index["shards"]} == {32: 6, 64: 5} and index["count"] == 11
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["read"], report["kept"], report["resolutions"]) == (6, 6, {"32": 6, "64": 5})
    with pytest.raises(UserError, match="20 x 20 pixels, no multiple of the 8 pixels"):
        prep.prepare(source, tmp_path / "bad", size=20, store="latent", vae=networks["vae"])


# ---- duplicates ------------------------------------------------------------------------------------------------------


def test_duplicates_across_parts_are_skipped_without_touching_the_shards(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_LINES", 10)
    again = io.BytesIO()
    Image.open(io.BytesIO(samples[3][1])).save(again, "PNG", compress_level=9)  # the same pixels, other bytes
    assert again.getvalue() != samples[3][1]
    chosen = [*samples[:15], ("copy.png", samples[2][1], "x", "x"), ("pixels.png", again.getvalue(), "y", "y"),
              ("inside.png", samples[11][1], "z", "z"), *samples[15:22]]
    index = prep.prepare(as_folder(tmp_path / "in", chosen), tmp_path / "out", eval_share=0)
    assert [s["skip"] for s in index["shards"]] == [[], [5, 6], []] and index["count"] == 22
    assert [s["count"] for s in index["shards"]] == [10, 9, 5]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sorted(report["skipped"]["duplicate"]["first"]) == ["copy.png", "inside.png", "pixels.png"]
    assert report["read"] == 25 and report["kept"] == 22


def test_the_limit_counts_kept_images_over_parts(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_LINES", 10)
    chosen = [*samples[:12], ("copy.png", samples[2][1], "x", "x"), *samples[12:40]]
    source = as_folder(tmp_path / "in", chosen)
    index = prep.prepare(source, tmp_path / "out", limit=23, eval_share=0)
    captions = [bytes(row.tolist()).decode() for s in shards(tmp_path / "out", "train")
                for row in rows(s, "caption.long")]
    assert index["count"] == 23 and captions == [prep.clean(long) for _, _, long, _ in samples[:23]]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--limit 23 on 2 processes"):
        prep.prepare(source, tmp_path / "two", limit=23)


# ---- kills, ranks, disks ---------------------------------------------------------------------------------------------


def child(work) -> int:
    """Runs `work` in a fork of this process; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            work()
            code = 0
        os._exit(code)
    return pid


def ended(pid: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(step: int):
    """Makes this process kill itself at its step-th change of the disk, before it in odd cases, after it in even."""
    count = 0

    def lethal(change):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            now = count == step
            if now and step % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return change(*args, **kwargs)
            finally:
                if now:
                    os.kill(os.getpid(), signal.SIGKILL)
        return wrapped
    os.replace, os.rmdir, os.unlink = lethal(os.replace), lethal(os.rmdir), lethal(os.unlink)


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "over an old one"])
def test_killed_at_any_change_of_the_disk_it_ends_with_the_same_bytes(samples, tmp_path, monkeypatch, replaces):
    monkeypatch.setattr(sources, "PART_LINES", 9)
    source, old = as_folder(tmp_path / "in", samples[:16]), tmp_path / "old"
    settings = dict(size=16, shard_size=6, eval_share=0.2)
    prep.prepare(as_folder(tmp_path / "other", samples[30:45]), old, **settings)
    prep.prepare(source, tmp_path / "undisturbed", **settings)
    expected, before = contents(tmp_path / "undisturbed"), contents(old)
    assert len(expected) >= 6
    stopped_while_old = stopped_while_half = step = 0
    while True:
        step += 1
        out = tmp_path / f"out-{step}"
        if replaces:
            shutil.copytree(old, out)

        def work():
            killed_at(step)
            prep.prepare(source, out, overwrite=True, **settings)
        code = ended(child(work))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        there = contents(out) if out.exists() else {}
        if replaces and there.get("index.json") == before["index.json"]:
            assert before.items() <= there.items()  # the old set is whole
            stopped_while_old += 1
        stopped_while_half += "index.json" not in there
        prep.prepare(source, out, overwrite=True, **settings)
        assert contents(out) == expected, step
    assert step > 25 and stopped_while_half > 4 and (stopped_while_old > 8) == replaces


def test_sigkill_from_outside_while_networks_encode(three, samples, networks, tmp_path, monkeypatch):
    """The real script in a process of its own, killed from another one once a part is there."""
    monkeypatch.setattr(sources, "PART_BYTES", 1)
    prep.prepare(three / "tars", tmp_path / "undisturbed", **ALL, **networks)
    argv = ["prepare.py", str(three / "tars"), "--out", str(tmp_path / "out")]
    for key, value in {**ALL, **networks}.items():
        argv += [prep.flag(key), str(value)]
    code = ("import sys; from data import sources, prepare; sources.PART_BYTES = 1; "
            f"sys.argv = {argv!r}; prepare.main()")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    record = tmp_path / "out/.prepare/job/part-00001.json"
    while not record.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    stamp = record.stat().st_mtime_ns
    assert not (tmp_path / "out" / "index.json").exists()
    seen, write = [], prep.PartWriter.close
    monkeypatch.setattr(prep.PartWriter, "close", lambda self, fields: (seen.append(self.name), write(self, fields)))
    monkeypatch.setattr(prep, "run_parts", lambda *a, run=prep.run_parts: (
        pytest.fail("a finished part was redone") if record.stat().st_mtime_ns != stamp else run(*a)))
    prep.prepare(three / "tars", tmp_path / "out", **ALL, **networks)
    assert "part-00000" not in seen and "part-00001" not in seen and "part-00003" in seen
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_two_ranks_give_the_bytes_of_one(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_LINES", 15)
    source = as_folder(tmp_path / "in", [*samples[:50], ("copy.png", samples[0][1], "x", "x")])
    prep.prepare(source, tmp_path / "one", eval_share=0.2, workers=3)

    def rank(number):
        os.environ.update(RANK=str(number), WORLD_SIZE="2", LOCAL_RANK=str(number))
        if number == 0:
            time.sleep(0.5)  # rank 1 waits for the job
        prep.prepare(source, tmp_path / "two", eval_share=0.2)
    pids = [child(lambda number=number: rank(number)) for number in range(2)]
    assert [ended(pid) for pid in pids] == [0, 0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    monkeypatch.setenv("RANK", "1")  # one that comes when rank 0 has already put everything in place
    monkeypatch.setattr(prep, "STARTED", 0)
    assert prep.prepare(source, tmp_path / "two", eval_share=0.2) == {}
    monkeypatch.setattr(prep, "STARTED", time.time() + 60)  # a later start, on a finished data set
    with pytest.raises(UserError, match="--overwrite replaces it"):
        prep.prepare(source, tmp_path / "two", eval_share=0.2)


def test_a_nearly_full_disk_stops_with_a_sentence_and_can_be_gone_on_with(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_LINES", 20)
    source, free, calls = as_folder(tmp_path / "in", samples[:60]), shutil.disk_usage(tmp_path), []

    def filling(path):
        calls.append(path)
        return free._replace(free=10**12 if len(calls) <= 2 else prep.MIN_FREE - 1)
    monkeypatch.setattr(prep.shutil, "disk_usage", filling)
    with pytest.raises(OSError, match=r"out has 1.0 GB left.*start the same command again"):
        prep.prepare(source, tmp_path / "out", eval_share=0)
    assert (tmp_path / "out/.prepare/job/part-00000.json").exists()
    monkeypatch.setattr(prep.shutil, "disk_usage", lambda path: free._replace(free=10**12))
    assert prep.prepare(source, tmp_path / "out", eval_share=0)["count"] == 60


@pytest.mark.parametrize("make", [as_folder, lambda p, s: as_tars(p, s, 75), lambda p, s: as_parquet(p, s, 100)])
def test_what_cannot_fit_is_refused_before_anything_is_written(samples, tmp_path, monkeypatch, capsys, make):
    source, free = make(tmp_path / "in", samples[:150]), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prep.shutil, "disk_usage", lambda path: free._replace(free=150 * 3 * 64 * 64))
    with pytest.raises(UserError, match="need 2.0 MB, and the disk|need 1.9 MB, and the disk"):
        prep.prepare(source, tmp_path / "out", size=64)
    assert "about 150 images" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_another_job_in_the_same_folder_is_refused_and_says_what_differs(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_LINES", 20)
    source, write = as_folder(tmp_path / "in", samples[:60]), prep.PartWriter.close

    def fail(self, fields):
        if self.name == "part-00001":
            raise OSError("unplugged")
        return write(self, fields)
    monkeypatch.setattr(prep.PartWriter, "close", fail)
    with pytest.raises(OSError, match="unplugged"):
        prep.prepare(source, tmp_path / "out", eval_share=0)
    monkeypatch.setattr(prep.PartWriter, "close", write)
    with pytest.raises(UserError, match="--size was 32 and is 16; --filter was lanczos and is area: .*--overwrite"):
        prep.prepare(source, tmp_path / "out", size=16, filter="area", eval_share=0)
    (source / "metadata.jsonl").write_text((source / "metadata.jsonl").read_text().replace("red", "RED"))
    with pytest.raises(UserError, match="the source's files are not the same"):
        prep.prepare(source, tmp_path / "out", eval_share=0)
    assert prep.prepare(source, tmp_path / "out", size=16, eval_share=0, overwrite=True)["count"] == 60
    assert shards(tmp_path / "out", "train")[0]["image"].shape[2] == 16


def test_memory_stays_bounded_by_writing_the_fullest_shard_early(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(prep, "MAX_BUFFER", 40 * 3300)
    index = prep.prepare(as_folder(tmp_path / "in", samples[:100]), tmp_path / "out", eval_share=0)
    assert len(index["shards"]) > 2 and max(s["count"] for s in index["shards"]) <= 45 and index["count"] == 100


# ---- captions and fields ---------------------------------------------------------------------------------------------


def test_a_model_captions_the_images_that_have_no_caption(samples, tmp_path, monkeypatch):
    class Captioner:
        def __init__(self, name, device, batch_size):
            assert (name, batch_size) == ("some/model", 4)

        def caption(self, images):
            assert all(image.mode == "RGB" and image.size == (32, 32) for image in images)
            return [{"long": "A Long ONE", "short": "Short"} for _ in images]
    import types
    monkeypatch.setitem(sys.modules, "data.caption", types.SimpleNamespace(Captioner=Captioner))
    chosen = [(name, data, "" if i % 3 == 0 else long, "" if i % 3 == 0 else short)
              for i, (name, data, long, short) in enumerate(samples[:10])]
    index = prep.prepare(as_folder(tmp_path / "in", chosen), tmp_path / "out", caption="some/model", batch=4,
                         eval_share=0)
    shard = shards(tmp_path / "out", "train")[0]
    longs, shorts = ([bytes(r.tolist()).decode() for r in rows(shard, f"caption.{f}")] for f in ("long", "short"))
    assert index["captions"] == ["long", "short"] and index["count"] == 10
    assert longs == [prep.clean(s[2]) if i % 3 else "a long one" for i, s in enumerate(samples[:10])]
    assert shorts[0] == "short" and shorts[1] == prep.clean(samples[1][3])


def test_fields_are_found_by_usual_names_or_named_and_otherwise_listed(samples, tmp_path):
    names, images, longs, shorts = zip(*samples[:6])
    table = pa.table({"key": names, "picture": list(images), "words": longs, "tags": shorts})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column of captions .*--long-field; its columns are key \(string\), "):
        prep.prepare(tmp_path / "a.parquet", tmp_path / "out")
    with pytest.raises(UserError, match="no column 'Words' that can serve as --long-field"):
        prep.prepare(tmp_path / "a.parquet", tmp_path / "out", long_field="Words")
    with pytest.raises(UserError, match="no column 'words' that can serve as --image-field"):
        prep.prepare(tmp_path / "a.parquet", tmp_path / "out", image_field="words", long_field="words")
    index = prep.prepare(tmp_path / "a.parquet", tmp_path / "out", long_field="words", short_field="tags", eval_share=0)
    assert index["count"] == 6 and index["captions"] == ["long", "short"]
    source = as_folder(tmp_path / "in", samples[:120])
    lines = (source / "metadata.jsonl").read_text().replace('"text"', '"words"').replace('"file_name"', '"file"')
    (source / "metadata.jsonl").write_text(lines)
    with pytest.raises(UserError, match="no caption: 120.* fields are file, words, text_short: name one with --long"):
        prep.prepare(source, tmp_path / "two", image_field="file")
    assert prep.prepare(source, tmp_path / "two", image_field="file", long_field="words", eval_share=0)["count"] == 120


def test_broken_parquet_files_and_rows_are_counted_and_named(samples, tmp_path):
    source = as_parquet(tmp_path / "in", samples[:90], 30, plain=True)
    table = pa.table({"image": [samples[90][1], None, b"no image", samples[91][1]],
                      "text": pa.array([b"good", b"x", b"y", b"caf\xe9"], pa.binary()).cast(pa.string(), safe=False)
                      if False else pa.Array.from_buffers(pa.string(), 4, pa.array([b"good", b"x", b"y", b"caf\xe9"],
                                                                                   pa.binary()).buffers())})
    pq.write_table(table, source / "00090.parquet")
    cut, damaged = source / "00030.parquet", source / "00060.parquet"
    cut.write_bytes(cut.read_bytes()[:-200])
    data = bytearray(damaged.read_bytes())
    data[4:400] = bytes(396)  # the first pages
    damaged.write_bytes(data)
    index = prep.prepare(source, tmp_path / "out", eval_share=0)
    report = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]
    assert report["broken Parquet file (what follows the damage is lost)"]["first"] == ["00030.parquet",
                                                                                       "00060.parquet"]
    assert report["no image in this row"]["first"] == ["00090.parquet:1"]
    assert report["not a JPEG, PNG, WebP or BMP image"]["first"] == ["00090.parquet:2"]
    assert report["caption not in UTF-8"]["first"] == ["00090.parquet:3"]
    assert index["count"] == 31


# ---- the hub ---------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The few endpoints of the Hugging Face hub that a download needs, over `files`; `stall` is never sent."""

    commit, files, log, stall = "0123456789abcdef" * 2 + "01234567", {}, [], ""
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content: bytes, status: int = 200, **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(content), "Content-Type": "application/json", **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/datasets/good/set"):
            if "/tree/" in path:
                tree = [{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                        for p, d in self.files.items()]
                return self.answer(json.dumps(tree).encode())
            return self.answer(json.dumps({"id": "good/set", "sha": self.commit}).encode())
        name = path.removeprefix(f"/datasets/good/set/resolve/{self.commit}/")
        if name not in self.files:
            error = "GatedRepo" if "gated" in path else "RepoNotFound"
            return self.answer(b"{}", 403 if "gated" in path else 404, X_Error_Code=error)
        data = self.files[name]
        if self.command == "GET":
            self.log.append(name)
            if name == self.stall:
                time.sleep(60)
        return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=self.commit)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy")}
    yield {**env, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
    server.shutdown()


def from_hub(env, part_bytes: int, *commands):
    """Runs prepare.py's main with each of the commands in one process; it exits as the last one does."""
    code = (f"import contextlib, sys\nfrom data import sources, prepare\nsources.PART_BYTES = {part_bytes}\n"
            f"for sys.argv in {[['prepare.py', *map(str, c)] for c in commands]!r}:\n"
            "    with contextlib.suppress(SystemExit if sys.argv[1] == 'hf://gone/set' else ()):\n"
            "        prepare.main()\n")
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def test_a_repository_is_downloaded_part_by_part_and_a_killed_download_goes_on(samples, tmp_path, hub):
    tars = as_tars(tmp_path / "tars", samples[:100], 20)
    names = [f"data/{p.name}" for p in sorted(tars.iterdir())]
    Hub.files = {"README.md": b"# set", "other/x.tar": b"not asked for",
                 **{name: (tars / name[5:]).read_bytes() for name in names}}
    two_tars = int(2.5 * len(Hub.files[names[0]]))
    Hub.log.clear()
    Hub.stall, out = names[3], tmp_path / "out"
    command = (hub, two_tars, ("hf://good/set@main/data", "--out", out, "--eval-share", "0"))
    process = from_hub(*command)
    while names[3] not in Hub.log:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.wait()
    downloaded = sorted(p.name for p in (out / ".prepare/download").rglob("*.tar"))
    assert downloaded == ["00040.tar"]  # of the second part; the first one is done and its tars are gone
    Hub.stall = ""
    process = from_hub(*command)
    printed, error = process.communicate()
    assert process.returncode == 0, error
    index = json.loads((out / "index.json").read_text())
    assert index["count"] == 100 and index["source"]["repositories"] == {"good/set": Hub.commit}
    assert [s["count"] for s in index["shards"]] == [40, 40, 20] and not (out / ".prepare").exists()
    assert Hub.log == [*names[:4], *names[3:]]
    assert "train_prx.py --track micro --data" in printed.splitlines()[-1]


def test_a_folder_of_images_on_the_hub_and_a_missing_repository(samples, tmp_path, hub):
    source = as_folder(tmp_path / "in", samples[:12])
    Hub.files = {f"train/{p.name}": p.read_bytes() for p in sorted(source.iterdir()) if p.name != samples[3][0]}
    for kind in KINDS_OF_LIST:
        for path in as_images(tmp_path / kind, samples[20:26], kind).iterdir():
            Hub.files[f"other/{kind}/a/{path.name}"] = path.read_bytes()
    Hub.stall = ""
    process = from_hub(hub, 1, ("hf://gone/set", "--out", tmp_path / "gone"),
                       *((f"hf://good/set/other/{kind}", "--out", tmp_path / f"out-{kind}") for kind in KINDS_OF_LIST),
                       ("hf://good/set/train", "--out", tmp_path / "out", "--eval-share", "0"))
    printed, error = process.communicate()
    assert process.returncode == 0, error
    assert "skipped 1: missing file ('train/00003.png')" in printed and "kept 11 of 12" in printed
    assert error.count("\n") == 1 and "hf://gone/set cannot be read (404" in error and "hf auth login" in error
    assert not (tmp_path / "gone").exists() and not (tmp_path / "out" / ".prepare").exists()
    assert printed.count("kept 6 of 6") == 3


def test_what_is_no_repository_or_has_nothing_to_read_is_said_in_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="hf://owner is no dataset repository: write hf://owner/name"):
        prep.prepare("hf://owner", tmp_path / "out")
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: type("Info", (), {"sha": "0" * 40}))
    tree = [huggingface_hub.RepoFile(path=p, size=1, oid="0") for p in ("a.zip", "b/c.csv")]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", lambda *a, **k: iter(tree))
    with pytest.raises(UserError, match=r"nothing to read among its 2 file\(s\) .*csv, zip"):
        prep.prepare("hf://owner/name", tmp_path / "out")
    assert not (tmp_path / "out").exists()
