"""Odd pictures through preparation and evaluation: the same pixels, or the same sentence.

tests/test_format.py says what each of its odd pictures should look like; here are more, and both ways through all.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_format import ODD, P3, add_chunk, exif, file_of, gamma_curve, profile, smooth

import eval_prx
from data import prepare, shards
from data.shards import UserError

SIDE = 40  # of most pictures the shorter edge: preparation crops them and resamples nothing


def more_pictures() -> dict[str, bytes]:
    """Name -> file."""
    rgb, noise = smooth(), np.random.default_rng(1).integers(0, 256, (SIDE, 48, 4), np.uint8)
    image, rgba, more = Image.fromarray(rgb), Image.fromarray(noise), {}
    gray, few = image.convert("L"), rgba.quantize(16)
    cmyk = file_of(image.convert("CMYK"), "JPEG", quality=98)
    adobe = cmyk.index(b"Adobe")
    more["ycck"] = cmyk[:adobe + 11] + b"\2" + cmyk[adobe + 12:]  # the same bytes, said to be YCCK
    more["mpo"] = file_of(image, "MPO", save_all=True, append_images=[rgba.convert("RGB")], quality=98)
    more["4:2:0"] = file_of(rgb, "JPEG", quality=60, subsampling=2)
    more["progressive gray"] = file_of(gray, "JPEG", quality=98, progressive=True)
    more["jpeg without an end"] = file_of(noise[..., :3], "JPEG", quality=98)[:-2]
    more["rgba"], more["rgba webp"], more["rgba bmp"] = (file_of(rgba, kind) for kind in ("PNG", "WEBP", "BMP"))
    more["rgba turned"] = file_of(rgba, exif=exif(orientation=8))
    more["rgba of a palette"], more["rgba gif"] = file_of(few), file_of(few, "GIF")
    more["gray gif"], more["gray bmp"] = file_of(gray, "GIF"), file_of(gray, "BMP")
    more["interlaced gif"] = file_of(image.convert("P"), "GIF", interlace=1)
    more["one bit bmp"] = file_of(image.convert("1"), "BMP")
    more["two colours"] = file_of(image.quantize(2), bits=1)
    more["gamma"] = add_chunk(file_of(rgb), b"gAMA", (100_000).to_bytes(4, "big"))
    linear = profile(b"RGB ", gamma_curve(1.0), P3)
    more["two profiles"] = add_chunk(file_of(rgb, icc_profile=linear), b"iCCP", b"y\0\0\1")
    more["long"] = file_of(np.tile(rgb, (1, 300, 1)))
    more["high"] = file_of(np.tile(rgb, (300, 1, 1)), "JPEG", quality=98)
    more["one row"], more["one column"] = file_of(rgb[:1]), file_of(rgb[:, :1])
    more["junk behind"], more["junk before"] = file_of(255 - rgb) + b"junk" * 99, b"junk" + file_of(rgb)
    more["half a header"], more["half a gif"] = file_of(rgb)[:20], file_of(few, "GIF")[:300]
    more["half a bmp"] = file_of(rgb, "BMP")[:500]
    more["a wrong checksum"] = file_of(rgb)[:-30] + bytes(30)
    more["no pixels"] = file_of(rgb)[:16] + bytes(8) + file_of(rgb)[24:]
    more["avif"], more["pdf"] = b"\0\0\0\x1cftypavif" + bytes(99), b"%PDF-1.4\n" + bytes(99)
    more["svg"], more["zeros"] = b"<svg xmlns='http://www.w3.org/2000/svg'/>", bytes(5000)
    return more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder: odd names, and the endings of other formats."""
    folder = tmp_path_factory.mktemp("odd") / "pictures"
    (folder / "ünter ordner").mkdir(parents=True)
    files, lines = {name: entry[0] for name, entry in ODD.items()} | more_pictures(), []
    for i, (name, data) in enumerate(files.items()):
        ending = eval_prx.IMAGE_TYPES[i % len(eval_prx.IMAGE_TYPES)]
        path = f"{name}, 写真 {i}{ending.upper() if i % 2 else ending}"
        path = f"ünter ordner/{path}" if i % 3 else path
        (folder / path).write_bytes(data)
        lines.append(json.dumps({"file_name": path, "text": f"number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_odd_pictures_are_the_same_to_preparation_and_evaluation_or_refused_in_the_same_words(folder, in_tmp):
    prepare.prepare(folder, in_tmp / "prepared", size=str(SIDE), min_size=1, eval_share=0.5)
    prepared = {}  # by hash of the file
    for entry in shards.read_index(in_tmp / "prepared")["shards"]:
        tensors = shards.open_shard(in_tmp / "prepared", entry)
        for key, image in zip(tensors["hash"], tensors["image"]):
            prepared[key.numpy().tobytes()] = image.numpy()
    kept = {image.tobytes() for image in prepared.values()}
    report = json.loads((in_tmp / "prepared/report.json").read_text())["skipped"]
    reasons = {name: reason for reason, entry in report.items() for name in entry["first"]}
    files, seen = eval_prx.list_images(folder)[0], {"the same": 0, "as an earlier one": 0, "refused": 0}
    assert len(files) == len(ODD) + len(more_pictures()) >= 120
    for path in files:
        name = str(path.relative_to(folder))
        try:
            [image] = eval_prx.load_images([path])
        except UserError as error:
            assert str(error) == f"{path}: {reasons[name]}"
            seen["refused"] += 1
            continue
        square = prepare.fit(Image.fromarray(image.permute(1, 2, 0).numpy()), [(SIDE, SIDE)], Image.Resampling.LANCZOS)
        if reasons.get(name) == "duplicate":
            assert square.tobytes() in kept, name
            seen["as an earlier one"] += 1
        else:
            assert name not in reasons, (name, reasons[name])
            assert np.array_equal(square, prepared[bytes.fromhex(shards.file_sha256(path))[:16]]), name
            seen["the same"] += 1
        for kind in ("clip", "inception-2015"):  # and none of them is too odd for a network
            assert torch.isfinite(eval_prx.preprocess([image], 32, kind)).all()
    assert seen["the same"] >= 40 and seen["refused"] >= 10, seen
