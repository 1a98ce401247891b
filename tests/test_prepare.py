"""Promises of data/prepare.py. Every source is made here with PIL and tarfile; nothing is downloaded."""

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import prepare as prep, shards  # noqa: E402


def picture(seed: int = 0, width: int = 40, height: int = 40) -> Image.Image:
    """Smooth and different for each seed, so that lossy formats and resizing barely change it."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = [127 + 120 * np.sin(seed + c + x / 15 + (c + 1) * y / 25) for c in range(3)]
    return Image.fromarray(np.stack(rgb, -1).astype(np.uint8))


def encode(image: Image.Image, fmt: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **kwargs)
    return buffer.getvalue()


def png(width: int, height: int, bits: int = 8, colour_type: int = 2, rows: bytes = b"") -> bytes:
    """A PNG from its chunks: its header claims what it is told to."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def folder(path: Path, images: dict[str, bytes], lines: list) -> Path:
    """An image folder; `lines` are dicts or raw lines of metadata.jsonl."""
    path.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (path / "metadata.jsonl").write_text("\n".join(text) + "\n")
    return path


def tar(path: Path, members: list) -> Path:
    """A tar of (name, bytes) pairs and TarInfos."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tuple):
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
            else:
                archive.addfile(member)
    return path


def tensors(out: Path) -> dict[str, np.ndarray]:
    """The first shard."""
    return load_file(out / "train-00000.safetensors")


def texts(shard: dict, field: str) -> list[str]:
    data, offset = shard[f"caption.{field}"].tobytes(), shard[f"caption.{field}.offset"]
    return [data[a:b].decode() for a, b in zip(offset[:-1], offset[1:])]


def skipped(out: Path) -> dict[str, list[str]]:
    report = json.loads((out / "report.json").read_text())
    assert report["read"] == report["kept"] + sum(entry["count"] for entry in report["skipped"].values())
    assert all(entry["count"] == len(entry["first"]) for entry in report["skipped"].values())
    return {reason: entry["first"] for reason, entry in report["skipped"].items()}


def beside_a_good_one(tmp_path: Path, data: bytes, caption: str = "a bad one") -> dict[str, list[str]]:
    """What is skipped of a folder with one good image and `data` as bad.jpg; the good one must have been kept."""
    lines = [{"file_name": "bad.jpg", "text": caption}, {"file_name": "good.png", "text": "a good one"}]
    source = folder(tmp_path / "in", {"bad.jpg": data, "good.png": encode(picture())}, lines)
    prep.prepare(source, tmp_path / "out", eval_share=0)
    assert texts(tensors(tmp_path / "out"), "long") == ["a good one"]
    return skipped(tmp_path / "out")


def decoded(data: bytes, size: int = 32) -> np.ndarray:
    """[H, W, 3] as int."""
    return prep.decode(data, {size: [(size, size)]})[size].transpose(1, 2, 0).astype(int)


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_folder_and_tar_of_the_same_images_give_the_same_shards(tmp_path):
    images = {f"{i}.{ext}": encode(picture(i, 50 + i, 40), fmt)
              for i, (ext, fmt) in enumerate([("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("jpeg", "JPEG")])}
    captions = {name: (f"A Picture, number {name[0]}", f"picture {name[0]}") for name in images}
    source = folder(tmp_path / "in", images,
                    [{"file_name": n, "text": a, "text_short": b} for n, (a, b) in captions.items()])
    members = []
    for name, data in images.items():
        stem, ext = name.split(".")
        members += [(f"x/{stem}.{ext.upper()}", data), (f"x/{stem}.cls", b"7"), (f"x/._{stem}.{ext}", b"mac")]
        if stem in "01":
            members.append((f"x/{stem}.txt", captions[name][0].encode()))
        info = {"caption": captions[name][0], "text_short": captions[name][1]}
        members.append((f"x/{stem}.json", json.dumps(info).encode()))
    tar(tmp_path / "tars" / "a.tar", members[:10])  # the first two samples
    tar(tmp_path / "tars" / "b.TAR", members[10:])
    a = prep.prepare(source, tmp_path / "a", shard_size=3, eval_share=0)
    b = prep.prepare(tmp_path / "tars", tmp_path / "b", shard_size=3, eval_share=0)
    assert [s["count"] for s in a["shards"]] == [3, 1] and a["shards"] == b["shards"]  # sha256 of the files included
    assert a["captions"] == ["long", "short"] and b["source"]["names"] == ["tars"] and b["source"]["read"] == 4
    shard = tensors(tmp_path / "a")
    assert shard["image"].shape == (3, 3, 32, 32) and shard["image"].dtype == np.uint8
    assert shard["caption.long.offset"].dtype == np.int64
    assert texts(shard, "short") == ["picture 0", "picture 1", "picture 2"]


def test_captions_are_what_diffusers_makes_of_a_prompt(tmp_path):
    from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor
    raw = ["A RED   Circle & a “blue” square!!", "see https://example.com/x.jpg — schÃ¶n",
           "#cat 1234567 (two)\nlines …", "\ud800 é"]
    images = {f"{i}.png": encode(picture(i)) for i in range(len(raw))}
    lines = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(raw)]
    prep.prepare(folder(tmp_path / "in", images, lines), tmp_path / "out")
    expected = [TextPreprocessor().clean_text(text) for text in raw]
    assert texts(tensors(tmp_path / "out"), "long") == expected and expected != raw


def test_index_and_hashes_match_the_files(tmp_path):
    images = {f"{i}.png": encode(picture(i)) for i in range(5)}
    lines = [{"file_name": name, "text": f"image {name[0]}"} for name in images] + ["{not json"]
    returned = prep.prepare(folder(tmp_path / "in", images, lines), tmp_path / "out", shard_size=2, eval_share=0)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index == returned and index["format"] == 2 and (index["count"], index["eval_count"]) == (5, 0)
    assert index["image"] == "raw" and index["latent"] is index["text"] is None
    assert index["captions"] == ["long"] and index["skipped"] == {"bad metadata": 1}
    assert index["text_cleaning"] == "diffusers.PRXPipeline.clean_text" and str(tmp_path) not in json.dumps(index)
    order, hashes = [], []
    for shard in index["shards"]:
        file = tmp_path / "out" / shard["file"]
        assert shard["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert (shard["split"], shard["resolution"], shard["skip"]) == ("train", 32, [])
        content = load_file(file)
        assert content["image"].shape == (shard["count"], 3, shard["height"], shard["width"])
        hashes += [row.tobytes() for row in content["hash"]]
        order += texts(content, "long")
    assert order == [f"image {i}" for i in range(5)]  # the order of the source
    assert hashes == [hashlib.sha256(data).digest()[:16] for data in images.values()]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "contact_sheet.png", "index.json", "report.json", "teacher", "text",
        *(f"train-{i:05d}.safetensors" for i in range(3))]
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size[0] > 500


def test_the_index_has_short_captions_only_if_every_sample_has_one(tmp_path, capsys):
    images = {f"{i}.png": encode(picture(i)) for i in range(4)}
    lines = [{"file_name": f"{i}.png", "text": "long", "text_short": "short" if i < 3 else ""} for i in range(4)]
    index = prep.prepare(folder(tmp_path / "in", images, lines), tmp_path / "out", shard_size=1)
    assert index["captions"] == ["long"] and "1 of 4 kept samples have no short caption" in capsys.readouterr().out
    assert "caption.short" not in load_file(tmp_path / "out" / index["shards"][-1]["file"])


def test_the_last_line_is_the_next_command_and_limit_stops_early(tmp_path, capsys):
    images = {f"{i}.png": encode(picture(i)) for i in range(4)}
    source = folder(tmp_path / "in", images, [{"file_name": name, "text": "x"} for name in images])
    assert prep.prepare(source, tmp_path / "out", limit=2, eval_share=0)["count"] == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("kept 2 of 2 images, 2 samples for training and 0 for evaluation, 1 shards, 0.0 MB")
    assert printed[-1] == shards.command("train_prx.py", "--track", "micro", "--data", tmp_path / "out")
    assert "warning: 0 of 2 images are held out" in printed[-3] and "--overwrite --eval-share 0.5" in printed[-3]


# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_the_central_square_is_kept_and_resized():
    wide = Image.new("RGB", (120, 40), "red")
    wide.paste((0, 0, 255), (40, 0, 80, 40))
    assert (decoded(encode(wide)) == (0, 0, 255)).all()
    big = picture(1, 640, 640)
    expected = np.asarray(big.resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert (decoded(encode(big)) == expected).all()
    assert abs(decoded(encode(big, "JPEG", quality=95)) - expected).mean() < 2  # decoded at a reduced scale


def test_exif_orientation_is_applied():
    image = picture(2, 32, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    assert (decoded(encode(image, exif=exif)) == np.rot90(np.asarray(image), -1)).all()


PLAIN = Image.new("RGB", (40, 40), (200, 40, 40))
MODES = {  # what is encoded, and the colour that must come out
    "CMYK": (encode(PLAIN.convert("CMYK"), "JPEG", quality=95), (200, 40, 40)),
    "palette": (encode(PLAIN.convert("P", palette=Image.Palette.ADAPTIVE)), (200, 40, 40)),
    "gray": (encode(Image.new("L", (40, 40), 200)), (200, 200, 200)),
    "one bit": (encode(Image.new("1", (40, 40), 1)), (255, 255, 255)),
    "16-bit gray": (encode(Image.fromarray(np.full((40, 40), 200 * 256 + 7, np.uint16))), (200, 200, 200)),
    "16-bit RGB": (png(40, 40, 16, 2, (b"\0" + struct.pack(">HHH", 51207, 10247, 7) * 40) * 40), (200, 40, 0)),
    "LA": (encode(Image.new("LA", (40, 40), (0, 51))), (204, 204, 204)),  # a fifth of black over white
    "RGBA": (encode(Image.new("RGBA", (40, 40), (255, 0, 0, 51))), (255, 204, 204)),
    "transparent palette": (encode(Image.new("P", (40, 40), 0), transparency=0), (255, 255, 255)),
    "transparent RGB": (encode(PLAIN, transparency=(200, 40, 40)), (255, 255, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    data, colour = MODES[mode]
    assert abs(decoded(data) - colour).max() <= 3


# ---- bad samples -----------------------------------------------------------------------------------------------------


def test_a_truncated_jpeg_is_skipped_counted_and_named(tmp_path, capsys):
    data = encode(picture(1, 200, 200), "JPEG")
    assert beside_a_good_one(tmp_path, data[:len(data) // 2]) == {"broken image": ["bad.jpg"]}
    assert "skipped 1: broken image ('bad.jpg')" in capsys.readouterr().out


def test_a_text_file_named_jpg_is_skipped(tmp_path):
    assert beside_a_good_one(tmp_path, b"this is text") == {"not a JPEG, PNG, WebP or BMP image": ["bad.jpg"]}


def test_other_formats_never_reach_a_decoder(tmp_path):
    assert beside_a_good_one(tmp_path, encode(picture(), "TIFF")) == {"not a JPEG, PNG, WebP or BMP image": ["bad.jpg"]}


@pytest.mark.parametrize("width, height", [(60_000, 60_000), (12_000, 9_000), (40_000, 64)])
def test_absurd_sizes_are_refused_from_the_header(tmp_path, monkeypatch, width, height):
    load = ImageFile.ImageFile.load

    def small(image):
        assert max(image.size) < 1000, "the pixels of a refused image were about to be decoded"
        return load(image)
    monkeypatch.setattr(ImageFile.ImageFile, "load", small)
    assert beside_a_good_one(tmp_path, png(width, height)) == {"too many pixels": ["bad.jpg"]}


def test_oversized_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(prep.sources, "MAX_BYTES", 10_000)
    assert beside_a_good_one(tmp_path, bytes(10_001)) == {"too many bytes": ["bad.jpg"]}
    members = [("a.jpg", bytes(10_001)), ("a.txt", b"a"), ("b.png", encode(picture())), ("b.txt", b"b")]
    prep.prepare(tar(tmp_path / "a.tar", members), tmp_path / "tar_out")
    assert skipped(tmp_path / "tar_out") == {"too many bytes": ["a.tar:a"]}


@pytest.mark.parametrize("caption", ["", "   ", "@nobody", "https://example.com/a"])
def test_an_empty_caption_is_skipped_also_when_only_cleaning_empties_it(tmp_path, caption):
    assert beside_a_good_one(tmp_path, encode(picture(1)), caption) == {"no caption": ["bad.jpg"]}


def test_an_endless_caption_is_skipped(tmp_path):
    assert beside_a_good_one(tmp_path, encode(picture(1)), "a." * 50_000) == {"caption too long": ["bad.jpg"]}


def test_a_duplicate_is_found_by_its_pixels(tmp_path):
    again = encode(picture(), compress_level=1)
    assert again != encode(picture())
    source = folder(tmp_path / "in", {"a.png": encode(picture()), "b.png": again},
                    [{"file_name": "a.png", "text": "first"}, {"file_name": "b.png", "text": "second"}])
    prep.prepare(source, tmp_path / "out")
    assert skipped(tmp_path / "out") == {"duplicate": ["b.png"]}


def test_small_images_are_skipped_unless_min_size_allows_them(tmp_path):
    source = folder(tmp_path / "in", {"a.png": encode(picture(0, 31, 90)), "b.png": encode(picture(1, 32, 90))},
                    [{"file_name": name, "text": "x"} for name in ("a.png", "b.png")])
    prep.prepare(source, tmp_path / "out")
    assert skipped(tmp_path / "out") == {"smaller than --min-size": ["a.png"]}
    assert prep.prepare(source, tmp_path / "out", min_size=16, overwrite=True)["count"] == 2


def test_file_names_that_leave_the_folder_or_lead_nowhere_are_skipped_and_links_are_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(encode(picture(1)))
    source = folder(tmp_path / "in", {"a/good.png": encode(picture())}, [
        {"file_name": name, "text": "x"}
        for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "gone.png", "a", "loop.png",
                     "nul\0.png", "n" * 5000, "a/../a/good.png")
    ] + ["[1]", "{}", '{"file_name": 3}', "[" * 100_000, ""])
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    (source / "loop.png").symlink_to("loop.png")
    assert prep.prepare(source, tmp_path / "out", eval_share=0)["count"] == 2  # the link's and the good one
    assert skipped(tmp_path / "out") == {
        "outside the folder": ["../secret.png", str(tmp_path / "secret.png")],
        "missing file": ["gone.png", "a", "loop.png", "nul\0.png", "n" * 200],  # the report cuts long names
        "bad metadata": ["metadata.jsonl:10", "metadata.jsonl:13"],
        "no file name in this row": ["metadata.jsonl:11", "metadata.jsonl:12"]}


def odd_image(kind: str, i: int) -> bytes | None:
    """One that cannot be used, and each a different one; None: no file."""
    return {"too small": lambda: encode(picture(i, 16, 48)),
            "another format": lambda: encode(picture(i), "TIFF"),
            "cut": lambda: encode(picture(i))[:200 + i],
            "no image": lambda: b"text %d" % i,
            "missing": lambda: None,
            "the same": lambda: encode(picture(0), compress_level=i % 10) + bytes(i),
            "no caption": lambda: encode(picture(i))}[kind]()


ODD_IMAGES = ["too small", "another format", "cut", "no image", "missing", "the same", "no caption"]


@pytest.mark.parametrize("kind", ODD_IMAGES)
@pytest.mark.parametrize("source", ["folder", "tar"])
def test_good_images_behind_a_hundred_bad_ones_are_kept(tmp_path, capsys, kind, source):
    bad = {f"{i:03d}": odd_image(kind, i) for i in range(110)}
    images = {name: data for name, data in bad.items() if data} | {f"x{i}": encode(picture(200 + i)) for i in range(5)}
    names = [*bad, *(f"x{i}" for i in range(5))]
    caption = lambda name: "" if kind == "no caption" and name in bad else f"a caption of {name}"
    if source == "tar":
        members = [(f"{name}.{x}", data) for name in names for x, data in
                   (("jpg", images.get(name)), ("txt", caption(name).encode())) if data is not None]
        path = tar(tmp_path / "a.tar", members)
    else:
        path = folder(tmp_path / "in", images, [{"file_name": name, "text": caption(name)} for name in names])
    prep.prepare(path, tmp_path / "out", eval_share=0)
    kept = texts(tensors(tmp_path / "out"), "long")
    expected = [f"a caption of x{i}" for i in range(5)]
    assert kept == (["a caption of 000"] if kind == "the same" else []) + expected
    reason = {"too small": "smaller than --min-size", "another format": "not a JPEG, PNG, WebP or BMP image",
              "cut": "broken image", "no image": "not a JPEG, PNG, WebP or BMP image", "the same": "duplicate",
              "missing": "missing file" if source == "folder" else "no image under this key",
              "no caption": "no caption"}
    counts = json.loads((tmp_path / "out/index.json").read_text())["skipped"]
    assert counts == {reason[kind]: 109 if kind == "the same" else 110}


LACKS = {
    "another key": (lambda i: {"image": f"{i}.png", "text": "x"}, {},
                    r"no file name in this row: 12\); their fields are image, text: name one with --image-field$"),
    "another field": (lambda i: {"file_name": f"{i}.png", "words": "x"}, {},
                      r"no caption: 12\); their fields are file_name, words: name one with --long-field; --caption"),
    "small images": (lambda i: {"file_name": f"{i}.png", "text": "x"}, {"size": 64}, r"smaller than --min-size: 12\)$"),
    "all and one more": (lambda i: {"file": "x"} if i else {"file_name": "0.png"}, {},
                         "no caption: 1, no file name in this row: 11.*name one with --long-field or --image-field")}


@pytest.mark.parametrize("kind", LACKS)
@pytest.mark.parametrize("lines", [20_000, 5])
def test_advice_fits_the_reason_also_after_the_first_of_several_parts(tmp_path, monkeypatch, kind, lines):
    monkeypatch.setattr(prep.sources, "PART_LINES", lines)
    line, settings, says = LACKS[kind]
    source = folder(tmp_path / "in", {f"{i}.png": encode(picture(i)) for i in range(12)}, [line(i) for i in range(12)])
    if lines == 5 and kind != "small images":
        says = says.replace("12", "5").replace("11", "4")
    with pytest.raises(prep.UserError, match=says):
        prep.prepare(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_advice_for_a_tar_names_the_endings_that_were_met(tmp_path):
    source = tar(tmp_path / "a.tar", [(f"{i}.{x}", b"x") for i in range(3) for x in ("picture", "words")])
    with pytest.raises(prep.UserError, match="under this key: 3.*fields are picture, words: name one with --image"):
        prep.prepare(source, tmp_path / "out")
    assert "--caption" not in prep.nothing_usable(["a"], [], {"no image under this key": 3}, 0, ["picture"])


def test_what_is_not_read_is_said(tmp_path, capsys):
    images = {f"{i}.png": encode(picture(i)) for i in range(5)}
    source = folder(tmp_path / "in", images | {"notes.md": b"#", "old.zip": b"x", "b.zip": b"x", "LICENSE": b"x"},
                    [{"file_name": f"{i}.png", "text": "x"} for i in range(3)])
    prep.prepare(source, tmp_path / "out", eval_share=0)
    printed = capsys.readouterr().out
    assert "metadata.jsonl lists 3 images, and its folder holds 5: the others are left out" in printed
    assert "passed over 4 other file(s) (.zip: 2, no ending: 1, .md: 1)" in printed


def test_images_of_rare_shapes_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prep, "RARE", 3)
    sizes = [(64, 64)] * 4 + [(96, 64)] * 2 + [(64, 140)]
    images = {f"{i}.png": encode(picture(i, *size)) for i, size in enumerate(sizes)}
    source = folder(tmp_path / "in", images, [{"file_name": name, "text": "x"} for name in images])
    prep.prepare(source, tmp_path / "out", eval_share=0, size=64, crop="buckets")
    assert "warning: 3 images are of 2 rare shapes" in capsys.readouterr().out
    prep.prepare(source, tmp_path / "square", eval_share=0, size="32,64")
    assert "rare shapes" not in capsys.readouterr().out


FOREIGN = {
    "Chinese": ("一只红色的猫坐在蓝色的沙发上", False),
    "Japanese": ("赤い帽子をかぶった猫が椅子に座っている", False),
    "Chinese with some English": ("a cat 一只红色的猫坐在蓝色的沙发上", False),
    "percent-encoded": ("%E7%8C%AB %E7%8C%AB", False),
    "strokes and compatibility": ("㐀㐁㐂 ㇰㇱ 㒀", False),
    "English with a Chinese word": ("a neon sign that reads 拉面 in a narrow street at night", True),
    "Russian": ("красная кошка сидит на диване", True),
    "Korean": ("빨간 고양이가 소파에 앉아 있다", True),
    "Arabic": ("قطة حمراء على الأريكة", True),
    "Thai": ("แมวสีแดงบนโซฟา", True),
    "Greek": ("μια κόκκινη γάτα", True),
    "accents": ("une étoile déjà gelée, où l'œil se noie", True),
    "mojibake": ("une Ã©toile dÃ©jÃ\xa0 gelÃ©e", True),
    "full width": ("Ａ ＲＥＤ ＣＡＴ", True), "ligatures": ("a ﬁne oﬃce ﬂoor", True),
    "an address": ("a cat, https://example.com/a/very/long/address/that/is/longer/than/the/caption", True),
    "a hashtag": ("@somebody_with_a_name a cat #sunset", True)}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_caption_whose_letters_the_cleaning_removes_is_counted_under_its_own_reason(kind):
    text, good = FOREIGN[kind]
    if kind == "percent-encoded":
        assert prep.clean(text) == ""
    elif good:
        assert prep.clean(text) == prep.text_preprocessor().clean_text(text) != ""
    else:
        with pytest.raises(prep.Reject, match="cleaning removes the caption's letters"):
            prep.clean(text)
        assert prep.clean_short(text) == ""


def test_a_foreign_short_caption_spoils_no_sample(tmp_path, capsys):
    images = {f"{i}.png": encode(picture(i)) for i in range(3)}
    lines = [{"file_name": "0.png", "text": "a cat", "text_short": "猫"},
             {"file_name": "1.png", "text": "红色的猫"},
             {"file_name": "2.png", "text": "a dog", "text_short": "x" * 20_000}]
    prep.prepare(folder(tmp_path / "in", images, lines), tmp_path / "out", eval_share=0)
    assert texts(tensors(tmp_path / "out"), "long") == ["a cat", "a dog"]
    assert skipped(tmp_path / "out") == {"cleaning removes the caption's letters": ["1.png"]}


# ---- tars ------------------------------------------------------------------------------------------------------------


def test_member_names_are_never_paths_and_links_are_ignored(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(encode(picture(9)))
    links = []
    for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("pipe.png", tarfile.FIFOTYPE)):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, str(tmp_path / "secret.png")
        links += [info, (name.replace("png", "txt"), b"a link")]
    source = tar(tmp_path / "in" / "a.tar", [("../x.jpg", encode(picture(1), "JPEG")), ("../x.txt", b"outside"), *links,
                                             ("/abs/y.png", encode(picture(2))), ("/abs/y.txt", b"absolute")])
    monkeypatch.chdir(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    prep.prepare(source, tmp_path / "out")
    assert texts(tensors(tmp_path / "out"), "long") == ["outside", "absolute"]
    assert skipped(tmp_path / "out") == {"no image under this key": ["a.tar:link", "a.tar:hard", "a.tar:pipe"]}
    assert [p for p in sorted(tmp_path.rglob("*")) if (tmp_path / "out") not in (p, *p.parents)] == before


def test_bad_groups_of_a_tar_are_skipped_and_named(tmp_path):
    image = encode(picture())
    source = tar(tmp_path / "a.tar", [
        ("nocaption.png", image), ("latin.png", image), ("latin.txt", b"caf\xe9"), ("json.png", image),
        ("json.json", b"[]"), ("list.png", image), ("list.json", b'{"caption": ["a"]}'), ("README.md", b"#"),
        ("good.seg.png", b"a mask"), ("good.png", image), ("good.txt", b"\xef\xbb\xbfgood"), ("good.webp", b"another")])
    prep.prepare(source, tmp_path / "out")
    assert skipped(tmp_path / "out") == {
        "no caption": ["a.tar:nocaption", "a.tar:list"], "caption not in UTF-8": ["a.tar:latin"],
        "bad metadata": ["a.tar:json"], "no image under this key": ["a.tar:README"],
        "another image under this key": ["a.tar:good"]}
    assert texts(tensors(tmp_path / "out"), "long") == ["good"]


@pytest.mark.parametrize("damage", ["cut in the data", "cut in a header", "overwritten header", "no tar"])
def test_a_broken_tar_keeps_what_came_before_and_is_named(tmp_path, damage):
    members = [member for i in range(3) for member in ((f"{i}.png", encode(picture(i))), (f"{i}.txt", b"text %d" % i))]
    data = bytearray(tar(tmp_path / "in" / "bad.tar", members).read_bytes())
    with tarfile.open(tmp_path / "in" / "bad.tar") as archive:
        last = archive.getmember("2.png")
    data = {"cut in the data": data[:last.offset_data + 100],
            "cut in a header": data[:last.offset + 100],
            "overwritten header": data[:last.offset] + b"?" * 512 + data[last.offset_data:],
            "no tar": b"?" * 2000}[damage]
    (tmp_path / "in" / "bad.tar").write_bytes(data)
    tar(tmp_path / "in" / "good.tar", [("z.png", encode(picture(7))), ("z.txt", b"good")])
    prep.prepare([tmp_path / "in" / "bad.tar", tmp_path / "in"], tmp_path / "out")
    kept = texts(tensors(tmp_path / "out"), "long")
    assert kept == (["good"] if damage == "no tar" else ["text 0", "text 1", "good"])
    assert skipped(tmp_path / "out")["broken tar (what the damage hit is lost)"] == ["bad.tar", "bad.tar"]


# ---- what travels with the data --------------------------------------------------------------------------------------


def test_the_small_networks_travel_with_the_data_and_verify_checks_them(tmp_path):
    source = tar(tmp_path / "a.tar", [("a.png", encode(picture())), ("a.txt", b"a")])
    out = tmp_path / "out"
    index = prep.prepare(source, out, eval_share=0)
    for name in ("text", "teacher"):
        for file in ("config.json", "model.safetensors"):
            assert (out / name / file).read_bytes() == (shards.NETWORKS / name / file).read_bytes()
        weights = (out / name / "model.safetensors").read_bytes()
        assert index["networks"][name] == hashlib.sha256(weights).hexdigest()
    assert (out / "text/tokenizer.json").exists()
    done = run("--verify", out)
    assert done.returncode == 0 and done.stdout == f"{out}: all 3 files are those that its index names\n"
    file = out / "teacher/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = run("--verify", out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "teacher/model.safetensors is not" in done.stderr


# ---- errors and atomicity --------------------------------------------------------------------------------------------


def run(*args, cwd=ROOT):
    return subprocess.run([sys.executable, ROOT / "data" / "prepare.py", *map(str, args)], cwd=cwd, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_nothing_usable_is_exit_code_2_and_one_sentence(tmp_path):
    lines = [{"file_name": "a.jpg", "text": "x"}, {"file_name": "b", "text": "y"}]
    source = folder(tmp_path / "in", {"a.jpg": b"text"}, lines)
    done = run(source, "--out", tmp_path / "out", cwd=tmp_path)  # a folder that is not the repository's root
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    for part in (str(source), "metadata.jsonl", "found 2", "not a JPEG, PNG, WebP or BMP image: 1", "missing file: 1"):
        assert part in done.stderr
    assert not (tmp_path / "out").exists()


def test_missing_source_and_unknown_flag_are_exit_code_2(tmp_path):
    done = run(tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere does not exist" in done.stderr
    assert run(tmp_path, "--out", tmp_path / "out", "--sise", "3").returncode == 2


def test_unusable_arguments_are_refused_by_name(tmp_path):
    good = tar(tmp_path / "a.tar", [("a.png", encode(picture())), ("a.txt", b"a")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    tar(tmp_path / "none.tar", [])
    for source, kwargs, message in [
            (tmp_path / "empty", {}, "empty has nothing to read"),
            (tmp_path / "file", {}, "file has nothing to read"),
            ([good, tmp_path / "empty"], {}, "empty has nothing to read"),
            (good, {"size": 0}, "--size is 0"),
            (good, {"size": "32,x"}, "--size is 32,x"),
            (good, {"size": "36", "crop": "buckets"}, "--size 36 .* multiple of 8"),
            (good, {"crop": "middle"}, "--crop middle"),
            (good, {"filter": "nearest"}, "--filter nearest"),
            (good, {"store": "image,pixels"}, "pixels is unknown"),
            (good, {"store": "image,jpeg"}, "keeps images twice"),
            (good, {"store": "text"}, "keeps no images"),
            (good, {"eval_share": 1.0}, "--eval-share is 1.0"),
            (good, {"eval_share": 0.9999999999}, "all 1 usable images fall to the evaluation set"),
            (good, {"workers": -1}, "--workers is -1"),
            (str(tmp_path / "*.jpg"), {}, "does not exist"),
            (good, {"store": "latent", "vae": str(tmp_path / "empty")}, "--vae .*empty cannot be loaded"),
            (good, {"limit": 0}, "--limit is 0"),
            (good, {"out": tmp_path / "file"}, "file is a file"),
            (tmp_path / "none.tar", {}, "none.tar: no usable image; .* found none")]:
        with pytest.raises(prep.UserError, match=message):
            prep.prepare(source, **{"out": tmp_path / "out", **kwargs})
    assert not (tmp_path / "out").exists()


def test_overwrite_is_needed_and_replaces_everything(tmp_path):
    images = {f"{i}.png": encode(picture(i)) for i in range(3)}
    source = folder(tmp_path / "in", images, [{"file_name": name, "text": "x"} for name in images])
    out = tmp_path / "out"
    prep.prepare(source, out, shard_size=1)
    files = lambda: {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    before = files()
    with pytest.raises(prep.UserError, match="--overwrite replaces it"):
        prep.prepare(source, out)
    with pytest.raises(prep.UserError, match="smaller than --min-size: 3"):  # and the old set stays as it was
        prep.prepare(source, out, size=64, overwrite=True)
    assert before == files()
    prep.prepare(source, out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["contact_sheet.png", "index.json", "report.json", "teacher",
                                                     "text", "train-00000.safetensors"]


@pytest.mark.parametrize("fails", ["save_file", "os.replace"])
def test_a_failed_run_leaves_no_index_and_the_next_one_goes_on(tmp_path, monkeypatch, fails):
    images = {f"{i}.png": encode(picture(i)) for i in range(3)}
    source = folder(tmp_path / "in", images, [{"file_name": name, "text": "x"} for name in images])
    calls, target = [], prep.os if fails == "os.replace" else shards
    original = getattr(target, fails.split(".")[-1])

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(target, fails.split(".")[-1], fail_at_the_second)
    with pytest.raises(OSError, match="No space"):
        prep.prepare(source, tmp_path / "out", shard_size=1)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".prepare"]
    monkeypatch.undo()
    assert prep.prepare(source, tmp_path / "out", shard_size=1)["count"] == 3  # and it needs no flag
    assert not (tmp_path / "out" / ".prepare").exists()


def test_the_index_is_moved_into_place_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(prep.os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    source = tar(tmp_path / "a.tar", [("a.png", encode(picture())), ("a.txt", b"a")])
    prep.prepare(source, tmp_path / "out", eval_share=0)
    assert moved[-5:] == ["model.safetensors", "contact_sheet.png", "report.json", "index.json", "trash"]


@pytest.mark.parametrize("text, short", [
    ("a red ring lies on blue. it is big.", "a red ring lies on blue."),
    ("one", "one"),
    ("a cat. it sits on a mat; it is black. the mat is red.", "a cat. it sits on a mat;"),
    ("mt. fuji at dawn, seen from a lake. a boat drifts by.", "mt. fuji at dawn, seen from a lake."),
    ("a portrait of dr. chen in a white coat. she smiles.", "a portrait of dr. chen in a white coat."),
    ("a bottle of no. 5 perfume. the light is soft.", "a bottle of no. 5 perfume."),
    ("the flag of the u. s. over a house. blue sky.", "the flag of the u. s. over a house."),
    ("a man reads j. r. r. tolkien in bed. he yawns.", "a man reads j. r. r. tolkien in bed."),
    ("an old sign of smith & sons (est. 1890) on brick. rust.", "an old sign of smith & sons (est. 1890) on brick."),
    ("a view of the prof. z. b. building and its yard. trees.", "a view of the prof. z. b. building and its yard."),
    ("5 p. m. in the old town, gen. lee on a horse! a crowd.", "5 p. m. in the old town, gen. lee on a horse!"),
    ("a photograph taken at f/1.8 in the evening? nobody knows.", "a photograph taken at f/1.8 in the evening?"),
    ("no end of the sentence here", "no end of the sentence here")])
def test_the_first_sentence_is_whole(text, short):
    assert prep.first_sentence(text) == short


def test_the_first_sentence_serves_as_a_short_caption(tmp_path):
    images = {f"{i}.png": encode(picture(i)) for i in range(2)}
    lines = [{"file_name": "0.png", "text": "A red ring of Dr. Chen. It lies on blue."},
             {"file_name": "1.png", "text": "one"}]
    index = prep.prepare(folder(tmp_path / "in", images, lines), tmp_path / "out", eval_share=0.0,
                         short_field="first-sentence")
    assert index["captions"] == ["long", "short"]
    assert texts(tensors(tmp_path / "out"), "short") == ["a red ring of dr. chen.", "one"]
