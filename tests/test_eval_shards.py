"""Evaluation of runs on prepared shards: the held-out split by hash gives the prompts and the reference."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval_prx
from data import scenes
from data.shards import UserError, ragged, write_index, write_shard
from eval_prx import ShardTask, main
from test_eval import SCRIPT, cache, judged, refused, write_run  # noqa: F401 (cache is a fixture)

SIZES = {"train": ((20, 32, 32),), "eval": ((24, 32, 32), (6, 24, 40))}
SQUARE = {"train": ((20, 32, 32),), "eval": ((24, 32, 32),)}


def write_folder(folder: Path, stored: bool = True, first: int = 0, sizes=SIZES, **index) -> Path:
    """A folder with 20 images for training and 30 held out, one of which is to be skipped. Sample i says so in its
    caption and in its first colour."""
    folder.mkdir(parents=True)
    entries, latent = [], None if stored else {"vae": "none", "channels": 4, "factor": 8}
    for split, parts in sizes.items():
        for count, h, w in parts:
            ids = range(first, first + count)
            first += count
            pixels = torch.randint(0, 256, (count, 3, h, w), generator=torch.Generator().manual_seed(first))
            pixels[:, 0] = torch.tensor(ids)[:, None, None]
            tensors = {"hash": torch.tensor([list(hashlib.sha256(b"%d" % i).digest()[:16]) for i in ids])}
            tensors = {"hash": tensors["hash"].to(torch.uint8)} | ragged(
                "caption.long", [f"long number {i}".encode() for i in ids])
            tensors |= {"image": pixels.to(torch.uint8)} if stored else {"latent": torch.zeros(count, 4, h // 8, w // 8)}
            skip = [5] if split == "eval" and count == 24 else []
            entries.append(write_shard(folder / f"{split}-{len(entries):05d}.safetensors", tensors, split, 32, h, w, skip))
    write_index(folder, {"captions": ["long"], "image": "raw" if stored else None, "latent": latent, "text": None,
                         "source": {"name": "counted squares"}, "shards": entries} | index)
    return folder


def run_on(tmp_path: Path, *folders: Path, **about) -> list[str]:
    data = [{"folder": str(folder), "sha256": "0"} for folder in folders]
    return [str(write_run(tmp_path / "run", data=data, **about)), "--trust"]


def result_in(folder) -> dict:
    return json.loads((Path(folder) / "metrics.json").read_text())


def test_evaluation_images_that_were_trained_on_are_refused(tmp_path, capsys):
    """The second folder trains on images that the first holds out; one of those is skipped."""
    run = run_on(tmp_path, write_folder(tmp_path / "a"), write_folder(tmp_path / "b", first=20))
    message = refused(capsys, *run, "--steps", "2")
    assert message.startswith("19 images of ") and "are trained on and held out" in message


def test_without_n_it_takes_what_there_is_and_says_so(tmp_path, capsys):
    """29 held-out images, not the 2,000 or 10,000 of a record; of so few, FID is not printed to four decimals."""
    run = run_on(tmp_path, write_folder(tmp_path / "d"))
    assert main([*run, "--steps", "2"]) == 0
    printed, result = capsys.readouterr().out, result_in(run[0])
    assert "29 prompts, all that are held out: records have 10000" in printed
    assert result["protocol"]["n"] == result["protocol"]["held_out"] == 29 and "real" not in result["metrics"]
    assert set(result["metrics"]["eval"]) == {"fid", "cmmd", "dino_mmd"} and "\naccuracy" not in printed
    row = next(line for line in printed.splitlines() if line.startswith("fid "))
    assert len(row.split()[1].partition(".")[2]) <= 2 and "no measure of photographs" in printed
    assert Image.open(Path(run[0]) / "samples.png").width > 300
    assert "--n 30 is more than the 29 held-out images of" in refused(capsys, *run, "--n", "30")


def test_what_is_asked_for_is_what_is_held_out_in_the_order_of_the_hashes(tmp_path):
    """The script gets the captions in order; the reference are their images, the second set the next ones."""
    folder = write_folder(tmp_path / "d")
    run = run_on(tmp_path, folder)
    copy = "import shutil, sys; shutil.copy(sys.argv[2], sys.argv[0] + '.' + sys.argv[2][-6])\n"
    (Path(run[0]) / "train_prx.py").write_text(copy + SCRIPT)
    assert main([*run, "--n", "12", "--steps", "2", "--batch", "5", "--ranks", "2", "--precision", "bf16"]) == 0
    requests = [json.loads((Path(run[0]) / f"train_prx.py.{rank}").read_text()) for rank in (0, 1)]
    ids = [i for i in sorted(range(20, 50), key=lambda i: hashlib.sha256(b"%d" % i).digest()[:16]) if i != 25]
    assert requests[0]["prompts"] + requests[1]["prompts"] == [f"long number {i}" for i in ids[:12]]
    assert requests[0]["seeds"] + requests[1]["seeds"] == list(range(12))
    for request in requests:
        del request["prompts"], request["seeds"]
        assert request == dict(format=1, steps=2, cfg_scale=3.0, batch=5, precision="bf16", device="cpu")
    result = result_in(run[0])
    assert set(result["metrics"]["eval"]) == {"fid", "cmmd", "dino_mmd"} == set(result["metrics"]["real"])
    assert result["protocol"]["precision"] == "bf16"


def test_perfect_paintings_have_distance_zero(tmp_path):
    task = ShardTask([str(write_folder(tmp_path / "d", sizes=SQUARE))], 32, 11)
    networks = {kind: eval_prx.Features(kind) for kind in ("inception", "clip")}
    found = judged(task, [task.held_out.image(i) for i in range(11)], networks, ["fid", "cmmd"], tmp_path)
    assert all(abs(found["eval"][key]) < 1e-6 for key in ("fid", "cmmd"))
    assert found["real"]["fid"] > 1e-3  # the next 11 images are others
    with pytest.raises(UserError, match="holds 0 image"):
        ShardTask([str(tmp_path / "d")], 64, None)


def test_shards_without_images_need_a_reference_and_take_one(tmp_path, capsys):
    run = run_on(tmp_path, write_folder(tmp_path / "d", stored=False))
    flags = [*run, "--n", "8", "--steps", "1"]
    assert "holds no images, only latents" in refused(capsys, *flags)
    (tmp_path / "real").mkdir()
    for i in range(8):
        image = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8)
        Image.fromarray(image.numpy()).save(tmp_path / "real" / f"{i}.png")
    flags += ["--real", str(tmp_path / "real")]
    assert main(flags) == 0
    result = result_in(run[0])
    assert result["protocol"]["real"]["n"] == 8 and result["metrics"]["eval"]["fid"] > 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "d").rename(tmp_path / "elsewhere/d")
    assert "holds no index.json" in refused(capsys, *flags)
    assert main([*flags, "--data", str(tmp_path / "elsewhere/d")]) == 0


def test_the_data_says_whether_a_run_is_one_on_scenes(tmp_path, capsys):
    """Not the track: `--track micro` trains on anybody's pictures too. And the index says of which track they are."""
    pictures, marked = write_folder(tmp_path / "a"), write_folder(tmp_path / "b", scenes={"track": "mini"})
    run = run_on(tmp_path, marked)
    flags = ["--n", "8", "--steps", "1", "--metrics", "fid"]
    assert main([*run, *flags]) == 0
    result = result_in(run[0])
    assert result["metrics"]["eval"]["accuracy"] > 0 and "unseen" in result["metrics"]
    assert result["protocol"]["scenes"] == scenes.MINI.protocol
    assert "no measure of photographs" not in capsys.readouterr().out
    assert main([*run, *flags, "--data", f"{pictures},{marked}"]) == 0
    assert "accuracy" not in result_in(run[0])["metrics"]["eval"]
    assert main([*run, *flags, "--data", "scenes"]) == 0
    assert result_in(run[0])["protocol"]["scenes"] == scenes.MICRO.protocol
