"""The shard format and the one function that opens pictures."""

import hashlib
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from data import shards
from data.shards import HeldOut, UserError, read_picture

ROOT = Path(shards.__file__).resolve().parents[1]


def test_the_format_imports_nothing_of_the_repository():
    code = ("import sys; from data import shards; "
            "print([n for n in sys.modules if n.split('.')[0] in ('train_prx', 'eval_prx', 'records', 'tests') "
            "or n.startswith('data.') and n != 'data.shards'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ---- shards ----------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, image: str = "raw", ids=range(7), split: str = "eval", skip=(), captions=("long",)):
    """A folder with one shard. Image i has the value i in its first channel, and noise that compression must keep."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (len(ids), 3, 32, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[:, 0] = torch.tensor(ids, dtype=torch.uint8)[:, None, None]
    hashes = b"".join(hashlib.sha256(b"%d" % i).digest()[:16] for i in ids)
    tensors = {"hash": torch.tensor(list(hashes), dtype=torch.uint8).view(-1, 16)}
    if image == "raw":
        tensors["image"] = pixels
    else:
        files = []
        for each in pixels:
            file = io.BytesIO()
            Image.fromarray(each.permute(1, 2, 0).contiguous().numpy()).save(file, image.upper())
            files.append(file.getvalue())
        tensors |= shards.ragged(image, files)
    for field in captions:
        tensors |= shards.ragged(f"caption.{field}", [f"{field} ü {i}".encode() for i in ids])
    entry = shards.write_shard(folder / f"{split}-00000.safetensors", tensors, split, 32, 32, 24, skip)
    networks = shards.copy_networks(folder)
    index = {"captions": list(captions), "image": image, "latent": None, "text": None, "networks": networks,
             "shards": [entry]}
    shards.write_index(folder, index)
    return pixels


@pytest.mark.parametrize("image", ["raw", "png", "jpeg"])
def test_what_is_written_is_read(tmp_path, image):
    pixels = write_folder(tmp_path, image, captions=("long", "short"))
    index = shards.read_index(tmp_path)
    assert index["format"] == 2 and index["captions"] == ["long", "short"]
    entry, = index["shards"]
    assert entry == {"file": "eval-00000.safetensors", "split": "eval", "count": 7, "resolution": 32, "height": 32,
                     "width": 24, "skip": [], "sha256": shards.file_sha256(tmp_path / "eval-00000.safetensors")}
    tensors = shards.open_shard(tmp_path, entry)
    for i in range(7):
        got = shards.read_image(tensors, i)
        assert got.shape == (3, 32, 24) and got.dtype == torch.uint8
        if image != "jpeg":
            assert torch.equal(got, pixels[i])
        assert shards.read_caption(tensors, i, "short") == f"short ü {i}"
    assert not list(tmp_path.rglob("*.tmp"))


def test_files_can_be_read_by_everybody(tmp_path):
    write_folder(tmp_path)
    assert {oct(p.stat().st_mode & 0o044) for p in tmp_path.rglob("*") if p.is_file()} == {"0o44"}


def test_ragged_rows_may_be_empty_and_of_tensors():
    tensors = shards.ragged("t", [torch.ones(2, 3), torch.zeros(0, 3), torch.full((1, 3), 2.0)])
    assert tensors["t"].shape == (3, 3) and tensors["t.offset"].tolist() == [0, 2, 2, 3]
    assert shards.read_ragged(tensors, "t", 1).shape == (0, 3) and shards.read_ragged(tensors, "t", 2).sum() == 6
    assert shards.ragged("t", [])["t.offset"].tolist() == [0]
    assert shards.read_caption(shards.ragged("caption.long", [b"", "é".encode()]), 1) == "é"


ENTRY = dict(file="train-00000.safetensors", split="train", count=7, resolution=32, height=32, width=32, sha256="",
             skip=[])
INDEX = dict(format=2, captions=["long"], latent=None, text=None, image="raw", shards=[ENTRY])


@pytest.mark.parametrize("content, says", [
    ("{", "is damaged"), ("[]", "is damaged"), ('{"format": 2}', "is damaged"),
    ('{"format": 1}', "has format 1, this script reads 2; prepare the data again"),
    (json.dumps(INDEX | dict(shards=[])), "is damaged .*no shards"),
    (json.dumps(INDEX | dict(shards=[{"file": "x"}])), "is damaged"),
    (json.dumps(INDEX | dict(shards=[ENTRY | dict(file="../x.safetensors")])), "is in another folder"),
    (json.dumps({k: v for k, v in INDEX.items() if k != "latent"}), "is damaged .*latent")])
def test_a_damaged_index_is_one_sentence(tmp_path, content, says):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=says) as error:
        shards.read_index(tmp_path)
    assert "\n" not in str(error.value)


def test_a_half_written_folder_is_refused(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "index.json"
    text = path.read_text()
    path.unlink()
    with pytest.raises(UserError, match="holds no index.json; give a folder that data/scenes.py or data/prepare.py"):
        HeldOut([tmp_path], 32)
    path.write_text(text.replace('"count": 7', '"count": 8'))
    with pytest.raises(UserError, match="does not hold the 8 samples that its index promises"):
        HeldOut([tmp_path], 32)
    path.write_text(text)
    shard = tmp_path / "eval-00000.safetensors"
    whole = shards.open_tensors(shard)
    shards.save_file(whole | {"caption.long": whole["caption.long"][:-1].clone()}, tmp_path / "cut")
    (tmp_path / "cut").rename(shard)
    with pytest.raises(UserError, match="caption.long has another length"):
        HeldOut([tmp_path], 32)
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(UserError, match="eval-00000.safetensors cannot be read"):
        HeldOut([tmp_path], 32)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")

    def fails(path):
        path.write_text("half of the n")
        raise OSError("full")
    with pytest.raises(OSError):
        shards.write_atomically(tmp_path / "a", fails)
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("file", ["eval-00000.safetensors", "text/model.safetensors", "teacher/model.safetensors"])
def test_verify_notices_a_flipped_byte_and_a_missing_file(tmp_path, file):
    write_folder(tmp_path)
    assert shards.verify(tmp_path) == 3
    path = tmp_path / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{file} is not the file that its index names"):
        shards.verify(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        shards.verify(tmp_path)


def test_held_out_images_come_in_the_order_of_their_hashes_without_skipped_ones_or_doubles(tmp_path):
    write_folder(tmp_path / "a", ids=range(20), skip=[5])
    write_folder(tmp_path / "b", ids=range(3, 30), image="png")
    write_folder(tmp_path / "c", split="train")
    order = lambda ids: sorted(ids, key=lambda i: hashlib.sha256(b"%d" % i).digest()[:16])
    held, ids = HeldOut(str(tmp_path / "a"), 32), order(set(range(20)) - {5})
    assert [held.caption(i) for i in range(len(held))] == [f"long ü {i}" for i in ids]
    assert [held.image(i)[0, 0, 0].item() for i in range(len(held))] == ids and held.stored
    both = HeldOut(f"{tmp_path}/a:0.5,{tmp_path}/b:0.5", 32)  # image 5 is good in b, and no image counts twice
    assert [both.image(i)[0, 3, 3].item() for i in range(len(both))] == order(range(30))
    with pytest.raises(UserError, match="holds 0 image.* of 64 px"):
        HeldOut([tmp_path / "a"], 64)
    with pytest.raises(UserError, match="holds 0 image"):
        HeldOut([tmp_path / "c"], 32)


def test_data_folders(in_tmp):
    (in_tmp / "a:0.5").mkdir()
    assert shards.data_folders("a:0.5") == [("a:0.5", 1.0)]
    assert shards.data_folders("A:0.7,B/c:.3,D") == [("A", 0.7), ("B/c", 0.3), ("D", 1.0)]
    for name in ("run:2", "a,b", "x,y:3,z"):
        (in_tmp / name).mkdir()
        assert shards.data_folders(name) == [(name, 1.0)]
        assert shards.data_folders(f"{name}:0.5,D") == [(name, 0.5), ("D", 1.0)]
        path = str(in_tmp / name)
        assert shards.data_folders(f"D:2,{path},{name}/") == [("D", 2.0), (path, 1.0), (f"{name}/", 1.0)]
    assert shards.data_folders("run:2,a,b:0.5,x,y:3,z") == [("run:2", 1.0), ("a,b", 0.5), ("x,y:3,z", 1.0)]
    for bad in ("A:0", "A,,B"):
        with pytest.raises(UserError, match="is not a list of folders with positive weights"):
            shards.data_folders(bad)


def test_a_printed_command_runs_from_any_folder(in_tmp, monkeypatch):
    (in_tmp / "a b").mkdir()
    for here in (in_tmp, ROOT, ROOT / "data"):
        monkeypatch.chdir(here)
        line = shards.command("data/prepare.py", "--verify", in_tmp / "a b")
        done = subprocess.run(line, shell=True, capture_output=True, text=True)
        assert done.returncode == 2 and "a b holds no index.json" in done.stderr, done.stderr
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv/bin/python"))
    assert shards.command("train_prx.py", "--data", "a b", 3) == ".venv/bin/python train_prx.py --data 'a b' 3"


def test_a_grid_shows_the_images_and_their_prompts(tmp_path):
    images = torch.arange(5, dtype=torch.uint8).mul(50)[:, None, None, None].expand(5, 3, 32, 32)
    shards.save_grid(images, ["a prompt of some words " * 8] * 5, tmp_path / "x" / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "x" / "grid.png"))
    assert grid.shape[1] == 4 * 200 + 8
    assert [grid[100, 108 + 200 * i, 0] for i in range(4)] == [0, 50, 100, 150]
    assert (grid[200:, :200] < 100).any()  # the words


def test_the_readmes_own_shards_are_whole(tmp_path):
    readme = (ROOT / "data/README.md").read_text()
    code = next(part.split("```")[0] for part in readme.split("```python")[1:] if "write_shard" in part)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shards.verify(tmp_path / "shards/mine") == 4
    assert HeldOut(str(tmp_path / "shards/mine"), 32).caption(0).startswith("noise number")


# ---- pictures --------------------------------------------------------------------------------------------------------

SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])  # to XYZ, D50
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])


def encode_srgb(linear):
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def decode_srgb(x):
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def s15(*values) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


SRGB_CURVE = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + s15(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def profile(space: bytes, curve: bytes, matrix=None) -> bytes:
    """A minimal ICC profile, version 4: tone curve and, for RGB, the primaries in XYZ under D50."""
    tags = {b"wtpt": b"XYZ " + bytes(4) + s15(0.9642, 1.0, 0.8249)}
    if matrix is None:
        tags[b"kTRC"] = curve
    else:
        for i, name in enumerate((b"r", b"g", b"b")):
            tags[name + b"XYZ"] = b"XYZ " + bytes(4) + s15(*matrix[:, i])
            tags[name + b"TRC"] = curve
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = bytes(8) + b"\x04\x30\0\0" + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += s15(0.9642, 1.0, 0.8249)
    content = header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(content)) + content[4:]


def to_srgb(image, matrix, linearise) -> np.ndarray:
    """uint8 (H, W, 3) in another RGB space -> in sRGB, clipped."""
    linear = linearise(np.asarray(image) / 255)
    return 255 * encode_srgb(linear @ (np.linalg.inv(SRGB) @ matrix).T)


def smooth(width=48, height=40) -> np.ndarray:
    """uint8 (H, W, 3), different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([40 + 3 * x + y, 220 - 2 * x - y, 60 + 4 * y], -1).clip(0, 255).astype(np.uint8)


def file_of(image, kind: str = "PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def add_chunk(data: bytes, kind: bytes, body: bytes) -> bytes:
    """A chunk right after a PNG's header."""
    return data[:33] + png_chunk(kind, body) + data[33:]


def raw_png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows))
            + png_chunk(b"IEND", b""))


def exif(*entries, orientation=None) -> bytes:
    """EXIF from raw directory entries (tag, type, count, four bytes)."""
    entries = list(entries)
    if orientation is not None:
        entries.append((0x0112, 3, 1, struct.pack("<HH", orientation, 0)))
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


def over_white(rgba) -> np.ndarray:
    rgba = np.asarray(rgba).astype(float)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def odd_pictures() -> dict:
    """Name -> (file, expected pixels or the reason of the refusal, largest error)."""
    rgb = smooth()
    gray = rgb[..., 0]
    three = lambda x: np.repeat(np.asarray(x)[..., None], 3, -1)
    turns = {1: rgb, 2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1], 5: rgb.swapaxes(0, 1), 6: np.rot90(rgb, -1),
             7: np.rot90(rgb, 2).swapaxes(0, 1), 8: np.rot90(rgb)}
    odd = {}
    for turn, expected in turns.items():
        odd[f"exif {turn} png"] = file_of(rgb, exif=exif(orientation=turn)), expected, 0
        odd[f"exif {turn} jpeg"] = file_of(rgb, "JPEG", quality=98, exif=exif(orientation=turn)), expected, 12
    odd["exif 6 webp"] = file_of(rgb, "WEBP", lossless=True, exif=exif(orientation=6)), turns[6], 0

    # damaged EXIF: nothing is lost, and a sound orientation among bad tags still counts
    for name, entries in {"a bad offset": (0x010F, 2, 999, b"\xff\xff\xff\x7f"),
                          "a bad type": (0x010F, 99, 1, bytes(4)),
                          "a huge count": (0x011A, 5, 2**31 - 1, b"\x08\0\0\0"),
                          "bytes for a number": (0x8769, 2, 4, b"abc\0")}.items():
        data = exif(entries, orientation=6)
        odd[f"exif with {name}"] = file_of(rgb, "JPEG", quality=98, exif=data), turns[6], 12
        odd[f"exif with {name}, png"] = file_of(rgb, exif=data), turns[6], 0
    odd["exif cut short"] = file_of(rgb, "JPEG", quality=98, exif=exif(orientation=6)[:20]), rgb, 12
    odd["exif of noise"] = file_of(rgb, "JPEG", quality=98, exif=b"Exif\0\0" + bytes(range(100))), rgb, 12
    odd["exif orientation 99"] = file_of(rgb, exif=exif(orientation=99)), rgb, 0
    odd["exif orientation as text"] = file_of(rgb, exif=exif((0x0112, 2, 4, b"six\0"))), rgb, 0
    odd["exif without an end"] = file_of(rgb, exif=exif(orientation=3) + b"junk"), turns[3], 0

    # profiles
    p3, adobe = profile(b"RGB ", SRGB_CURVE, P3), profile(b"RGB ", gamma_curve(563 / 256), ADOBE)
    in_p3 = to_srgb(rgb, P3, decode_srgb)
    odd["Display P3 png"] = file_of(rgb, icc_profile=p3), in_p3, 3
    odd["Display P3 jpeg"] = file_of(rgb, "JPEG", quality=98, subsampling=0, icc_profile=p3), in_p3, 12
    odd["Display P3 webp"] = file_of(rgb, "WEBP", lossless=True, icc_profile=p3), in_p3, 3
    odd["Display P3, turned"] = file_of(rgb, icc_profile=p3, exif=exif(orientation=6)), np.rot90(in_p3, -1), 3
    odd["Adobe RGB"] = file_of(rgb, icc_profile=adobe), to_srgb(rgb, ADOBE, lambda x: x ** (563 / 256)), 3
    odd["sRGB, by hand"] = file_of(rgb, icc_profile=profile(b"RGB ", SRGB_CURVE, SRGB)), rgb, 0
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    odd["sRGB, by lcms"] = file_of(rgb, icc_profile=srgb), rgb, 0
    linear = profile(b"GRAY", gamma_curve(1.0))
    bright = three(255 * encode_srgb(gray / 255))
    odd["linear gray"] = file_of(gray, icc_profile=linear), bright, 3
    odd["linear gray, jpeg"] = file_of(gray, "JPEG", quality=98, icc_profile=linear), bright, 12
    la = np.stack([gray, np.full_like(gray, 255)], -1)
    odd["linear gray with alpha"] = file_of(Image.fromarray(la, "LA"), icc_profile=linear), bright, 3
    odd["16-bit linear gray"] = file_of(gray.astype(np.uint16) * 256, icc_profile=linear), bright, 3
    odd["a gray picture in P3"] = file_of(gray, icc_profile=p3), three(gray), 3
    odd["a gray picture in linear RGB"] = file_of(gray, icc_profile=profile(b"RGB ", gamma_curve(1.0), P3)), bright, 3
    odd["a gray profile on RGB"] = file_of(rgb, icc_profile=linear), rgb, 0
    rgba = np.concatenate([rgb, three(gray)[..., :1]], -1)
    odd["Display P3 with alpha"] = (file_of(rgba, icc_profile=p3),
                                    over_white(np.concatenate([in_p3, rgba[..., 3:]], -1)), 4)
    palette = Image.fromarray(rgb).quantize(64)
    odd["palette in P3"] = (file_of(palette, icc_profile=p3),
                            to_srgb(palette.convert("RGB"), P3, decode_srgb), 3)
    odd["a profile cut short"] = file_of(rgb, icc_profile=p3[:200]), rgb, 0
    odd["a profile of noise"] = file_of(rgb, icc_profile=bytes(range(256)) * 3), rgb, 0
    odd["a profile with a bad offset"] = file_of(rgb, icc_profile=p3[:136] + b"\x7f" * 4 + p3[140:]), rgb, 300
    odd["an empty iCCP chunk"] = add_chunk(file_of(rgb), b"iCCP", b"x\0\0"), rgb, 0

    # transparency and modes
    odd["RGBA"] = file_of(rgba), over_white(rgba), 1
    odd["RGBA webp"] = file_of(rgba, "WEBP", lossless=True, exact=True), over_white(rgba), 1
    la = np.stack([gray, gray[::-1]], -1)
    odd["LA"] = file_of(Image.fromarray(la, "LA")), over_white(np.dstack([three(gray), gray[::-1]])), 1
    marked = rgb.copy()
    marked[:20] = 1, 2, 3
    white = marked.copy()
    white[:20] = 255
    odd["RGB with a transparent colour"] = file_of(marked, transparency=(1, 2, 3)), white, 0
    odd["gray with a transparent level"] = file_of(marked[..., 0], transparency=1), three(white[..., 0]), 0
    deep = marked[..., 0].astype(np.uint16) * 256
    odd["16-bit gray with a transparent level"] = file_of(deep, transparency=256), three(white[..., 0]), 0
    table = Image.fromarray(np.repeat(np.arange(3, dtype=np.uint8), 16)[None].repeat(40, 0)).convert("P")
    table.putpalette([10, 20, 30, 200, 100, 50, 90, 90, 90])
    expected = np.array([[255, 255, 255], [200, 100, 50], [90, 90, 90]]).repeat(16, 0)[None].repeat(40, 0)
    odd["palette with a transparent entry"] = file_of(table, transparency=0), expected, 0
    half = expected.copy()
    half[:, :16] = over_white([10, 20, 30, 51]).round()
    odd["palette with alpha"] = file_of(table, transparency=bytes([51, 255, 255])), half, 1
    odd["16-bit gray"] = file_of(gray.astype(np.uint16) * 257), three(gray), 0
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in (rgb.astype(np.uint16) * 256 + 7).reshape(40, -1))
    odd["16-bit RGB"] = raw_png(48, 40, 16, 2, rows), rgb, 0
    deep, faint = rgb.astype(np.uint16) * 256, np.full((40, 48, 1), 51 * 257, np.uint16)
    for name, colour, pixels in (("RGB", 6, deep), ("gray", 4, deep[..., :1])):
        pixels = np.concatenate([pixels, faint], -1).astype(">u2").reshape(40, -1)
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        expected = (rgb if name == "RGB" else three(gray)) * 0.2 + 255 * 0.8
        odd[f"16-bit {name} with alpha"] = raw_png(48, 40, 16, colour, rows), expected, 1
    rows = b"".join(b"\0" + bytes(row[::2] & 0xF0 | row[1::2] >> 4) for row in gray)
    odd["4-bit gray"] = raw_png(48, 40, 4, 0, rows), three(gray // 16 * 17), 0
    odd["one bit, transparent"] = file_of(Image.fromarray(gray > 100), transparency=0), three(gray * 0 + 255), 0
    odd["one bit"] = file_of(Image.fromarray(gray > 100)), three(np.where(gray > 100, 255, 0)), 0
    odd["gray jpeg"] = file_of(gray, "JPEG", quality=98), three(gray), 6
    cmyk = Image.fromarray(rgb).convert("CMYK")
    odd["CMYK jpeg"] = file_of(cmyk, "JPEG", quality=98), np.asarray(cmyk.convert("RGB")), 12
    odd["CMYK jpeg in an RGB profile"] = (file_of(cmyk, "JPEG", quality=98, icc_profile=p3),
                                          np.asarray(cmyk.convert("RGB")), 12)
    odd["bmp"] = file_of(rgb, "BMP"), rgb, 0
    odd["progressive jpeg"] = file_of(rgb, "JPEG", quality=98, progressive=True), rgb, 12
    odd["one pixel"] = file_of(rgb[:1, :1]), rgb[:1, :1], 0

    # animations: the first frame
    frames = [Image.fromarray(rgb[::-1]), Image.fromarray(255 - rgb)]
    odd["animated webp"] = file_of(rgb, "WEBP", save_all=True, append_images=frames, lossless=True), rgb, 0
    odd["animated png"] = file_of(rgb, save_all=True, append_images=frames), rgb, 0

    # large texts and profiles
    long = "x" * 1_500_000
    texts = {name: PngImagePlugin.PngInfo() for name in ("tEXt", "zTXt", "iTXt")}
    texts["tEXt"].add_text("a", long)
    texts["zTXt"].add_text("a", long, zip=True)
    texts["iTXt"].add_itxt("a", long, zip=True)
    for name, info in texts.items():
        odd[f"1.5 MB of {name}"] = file_of(rgb, pnginfo=info), rgb, 0
    odd["a profile of 1.5 MB"] = file_of(rgb, icc_profile=bytes(1_500_000)), rgb, 0

    # what a PNG holds beside its pixels, damaged or odd
    plain, turned = file_of(rgb), file_of(rgb, icc_profile=p3, exif=exif(orientation=6))
    for name, kind, body in [
            ("a cut pHYs", b"pHYs", b"ab"), ("a cut gAMA", b"gAMA", b"a"), ("a cut cHRM", b"cHRM", b"a"),
            ("an empty sRGB", b"sRGB", b""), ("a text without a method", b"zTXt", b"a\0\7xx"),
            ("a profile without a method", b"iCCP", b"a\0\7xx"), ("a profile without a name", b"iCCP", b"a"),
            ("a text called transparency", b"tEXt", b"transparency\0yes"),
            ("a text called bbox", b"tEXt", b"bbox\0yes"),
            ("a text called icc_profile", b"tEXt", b"icc_profile\0yes"), ("a cut animation", b"acTL", b"ab"),
            ("a text of 70 MB", b"zTXt", b"a\0\0" + zlib.compress(bytes(70 * 2**20)))]:
        odd[f"png with {name}"] = add_chunk(plain, kind, body), rgb, 0
        odd[f"png with {name} at its end"] = plain[:-12] + png_chunk(kind, body) + plain[-12:], rgb, 0
    text = png_chunk(b"tEXt", b"a\0b")
    odd["png with a text whose checksum is wrong"] = plain[:33] + text[:-1] + b"?" + plain[33:], rgb, 0
    odd["png with a cut pHYs, in P3, turned"] = add_chunk(turned, b"pHYs", b"ab"), np.rot90(in_p3, -1), 3

    # refused
    odd["a truncated jpeg"] = file_of(smooth(400, 400), "JPEG")[:3000], "broken image", 0
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    odd["a truncated png"] = file_of(noise)[:2000], "broken image", 0
    odd["a truncated webp"] = file_of(rgb, "WEBP")[:100], "image", 0
    odd["no bytes"] = b"", "not a JPEG, PNG, WebP or BMP image", 0
    odd["text"] = b"this is text", "not a JPEG, PNG, WebP or BMP image", 0
    odd["gif"] = file_of(table, "GIF", transparency=0), "not a JPEG, PNG, WebP or BMP image", 0
    odd["tiff"] = file_of(rgb, "TIFF"), "not a JPEG, PNG, WebP or BMP image", 0
    for width, height in ((60_000, 60_000), (12_000, 9_000), (40_000, 64)):
        odd[f"{width} x {height}"] = raw_png(width, height, 8, 2, b""), "too many pixels", 0
    return odd


ODD = odd_pictures()


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_read_right_or_refused_in_one_sentence(name, tmp_path):
    data, expected, error = ODD[name]
    path = tmp_path / "picture"
    path.write_bytes(data)
    if isinstance(expected, str):
        for source in (data, path):
            with pytest.raises(UserError, match=expected) as caught:
                read_picture(source)
            assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{path}: ")
        return
    image = read_picture(data)
    assert image.mode == "RGB"
    got = np.asarray(image)
    assert got.shape == expected.shape
    assert abs(got - np.asarray(expected, float)).max() <= error + 0.5
    assert np.array_equal(got, np.asarray(read_picture(path)))


def test_there_are_enough_odd_pictures():
    assert len(ODD) >= 80


def test_a_profile_that_is_srgb_under_another_name_costs_no_conversion():
    assert shards.profile_transform(profile(b"RGB ", SRGB_CURVE, SRGB), "RGB") is None
    assert shards.profile_transform(profile(b"RGB ", gamma_curve(2.2), SRGB), "RGB") is not None


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="none.png: no such file"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(UserError, match="is a directory"):
        read_picture(tmp_path)


def test_a_large_jpeg_may_be_decoded_smaller_but_not_below_what_is_asked(tmp_path):
    data = file_of(smooth(800, 600), "JPEG", quality=98)
    assert read_picture(data).size == (800, 600)
    assert read_picture(data, reduce_to=290).size == (400, 300)
    assert read_picture(data, reduce_to=310).size == (800, 600)
    assert read_picture(file_of(smooth(800, 600)), reduce_to=100).size == (800, 600)  # a PNG
