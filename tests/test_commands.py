"""Every command that a page or a program of this project shows: as text it is parsed, as advice it is executed."""

import argparse
import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, T, run, weights
from PIL import Image
from test_script import renamed

from records import ablate, record

PROGRAMS = sorted(p for folder in (".", "data", "records") for p in (ROOT / folder).glob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "data/README.md", ROOT / "records/README.md"]
PHOTOGRAPHS = {
    "astronaut.png": "an astronaut in an orange suit", "chelsea.png": "a ginger cat looks up", "coffee.png":
    "a cup of coffee on a wooden table", "rocket.jpg": "a rocket at night", "hubble_deep_field.jpg": "far galaxies",
    "motorcycle_left.png": "a motorcycle in a garage", "brick.png": "a brick wall", "grass.png": "grass from above",
    "camera.png": "a man behind a camera, black and white", "coins.png": "old coins on a dark ground"}
REST = {"records/bench.py", "records/variants.py"}  # further flags of theirs are train_prx.py's


# ---- in pages and in --help ------------------------------------------------------------------------------------------


def commands_in(text: str) -> list[list[str]]:
    """Words after the interpreter, of every command that runs a script."""
    text = re.sub(r"\\+\n\s*", "", text)
    lines = [part.strip() for line in text.splitlines() for part in re.split(r"\s+#|&&", line)]
    found = [re.match(r"(?:\S*python|torchrun(?: --\S+)*) (\S+\.py\b.*)", line) for line in lines]
    return [shlex.split(match[1].strip("`")) for match in found if match]


def shown() -> list[list[str]]:
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)]
    helps = [ast.get_docstring(ast.parse(program.read_text())) or "" for program in PROGRAMS]
    return list(map(list, dict.fromkeys(tuple(words) for text in blocks + helps for words in commands_in(text))))


class Parsed(BaseException):
    pass


@pytest.mark.parametrize("words", shown(), ids=" ".join)
def test_a_command_of_a_page_or_a_help_is_one_that_the_program_takes(words, monkeypatch):
    """It is parsed by the program itself, which then goes no further."""
    def stop_after(name: str):
        original = getattr(argparse.ArgumentParser, name)

        def parse(*args):
            patched.undo()  # what it calls itself goes on
            raise Parsed(original(*args))
        patched.setattr(argparse.ArgumentParser, name, parse)

    script = "train_prx.py" if words[0].endswith("train_prx.py") else words[0]  # a run's, a working copy
    if "--paint" in words:
        assert words[1::2] == ["--paint", "--out"]
        return
    monkeypatch.setattr(sys, "argv", words)
    patched = pytest.MonkeyPatch()
    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        stop_after(name)
    with pytest.raises(Parsed) as parsed:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    [result] = parsed.value.args
    if isinstance(result, tuple):
        assert script in REST
        T.parse_args(["--track", "micro", *result[1]])


# ---- as advice -------------------------------------------------------------------------------------------------------

# (file, function) that shows a command: the test that executes it as it is shown, or why none does
ADVICE = {
    ("train_prx.py", "read_index"): "test_missing_scenes_are_written_by_the_command_of_the_message",
    ("train_prx.py", "train"): "test_photographs_by_the_readmes_commands_and_those_that_they_show",
    ("train_prx.py", "connect"): "half a command, for ranks that cannot meet",
    ("train_prx.py", "loading"): "the hub: a login",
    ("data/prepare.py", "next_command"): "test_the_printed_command_trains",
    ("data/prepare.py", "small_text"): "installs packages, as .ci/run does",
    ("data/caption.py", "caption_folder"): "test_hidden_images_get_no_caption_and_the_printed_command_runs",
    ("data/caption.py", "__init__"): "the hub: a login",
    ("data/openmoji.py", "main"): "test_emoji_are_prepared_by_the_command_that_is_shown",
    ("data/openmoji.py", "package"): "installs packages, as .ci/run does",
    ("data/sources.py", "open_repository"): "the hub: a login",
    ("eval_prx.py", "read_run"): "an older commit's tree, needs the history",
    ("eval_prx.py", "draw"): "installs packages, as .ci/run does",
    ("eval_prx.py", "export"): "the hub: an upload",
    ("records/ablate.py", "main"): "test_a_row_of_the_ablations_is_repeated_by_the_command_that_is_shown",
    ("records/record.py", "new"): "test_a_working_copy_trains_and_races_by_the_commands_that_are_shown",
    ("records/record.py", "race"): "test_missing_scenes_are_written_by_the_command_of_the_message",
    ("records/record.py", "pack"): "test_a_race_is_packed_verified_and_tabled",
}


def shows_commands(tree) -> set[str]:
    """The functions in which a text that is no docstring names an interpreter, or a command is made."""
    texts = re.compile(r"\b(python|hf|git) \w|\bpip install|\btorchrun --standalone,")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = set()
    for function in functions:
        nodes = [node for child in function.body for node in ast.walk(child)]
        documented = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented
            call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "command"
            if call or text and texts.search(node.value):
                found.add(function.name)
    return found


def test_every_place_that_shows_a_command_is_listed_with_the_test_that_executes_it():
    here = {(str(p.relative_to(ROOT)), name) for p in PROGRAMS for name in shows_commands(ast.parse(p.read_text()))}
    assert here == set(ADVICE)
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for who in ADVICE.values():
        assert not who.startswith("test_") or f"def {who}(" in tests, who


def execute(line: str, more: str = ""):
    """As it is shown, in the current folder; `more` only makes it shorter."""
    done = subprocess.run(f"{line} {more}", shell=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("program", ["train_prx", "race"])
def test_missing_scenes_are_written_by_the_command_of_the_message(program, in_tmp, capsys):
    if program == "race":
        assert record.main(["race", "a", "b", "--out", "race"]) == 2
    else:
        assert T.main(["--track", "micro"]) == 2
    [line] = re.findall("`(.*)`", capsys.readouterr().err)
    execute(line, "--n 512 --eval-n 16")
    run("--steps", 2)


def test_a_row_of_the_ablations_is_repeated_by_the_command_that_is_shown(shards, capsys):
    ablate.main(["--show", "Muon", "--steps", "2", "--flags=--compile off"])
    execute(capsys.readouterr().out)
    assert Path("logs/ablate-micro-Muon-seed0-2/transformer/config.json").exists()


def test_a_working_copy_trains_and_races_by_the_commands_that_are_shown(shards, monkeypatch, capsys):
    """From a record whose script is a small one of a short default length, which paints in one step."""
    script = (ROOT / "train_prx.py").read_text()
    for there, small in (("steps=1100", "steps=4"), ("hidden=128, depth=6", "hidden=32, depth=3"),
                         ("zip(grid, grid[1:])", "[(1.0, 0.0)]")):
        assert there in script
        script = script.replace(there, small)
    os.mkdir("a record")
    (shards / "a record/train_prx.py").write_text(script)
    assert record.main(["new", "mine", "--from", "a record"]) == 0
    _, trial, _, race = capsys.readouterr().out.splitlines()
    execute(trial)
    assert "B takes " in execute(race, "--seeds 2")

    monkeypatch.setattr(record, "ROOT", shards)  # it is packed, the trainer of the checkout changes, a seed is repeated
    assert record.main(["pack", "work/mine-race", "--name", "mine", "--author", "me"]) == 0
    [folder] = Path("records/micro").iterdir()
    os.mkdir("main")
    for part in ("data", "records"):
        shutil.copytree(ROOT / part, f"main/{part}", ignore=shutil.ignore_patterns("notes", "micro", "__pycache__"))
    shutil.copy(ROOT / "eval_prx.py", "main")
    Path("main/train_prx.py").write_text(renamed((ROOT / "train_prx.py").read_text()))
    again = (f"import sys; sys.path.insert(0, 'main'); from pathlib import Path; from records import record; "
             f"print(record.rerun(Path({str(folder)!r}), 1, Path('shards/micro')))")
    assert "they agree to the bit" in execute(shlex.join([sys.executable, "-c", again]))
    assert json.loads((folder / "rerun.json").read_text())["accuracy"] > 0


def test_photographs_by_the_readmes_commands_and_those_that_they_show(in_tmp):
    """Prepare, train 50 steps, evaluate, paint, export and load again in diffusers, on real photographs."""
    skimage = pytest.importorskip("skimage")
    photos, rows = Path(skimage.__file__).parent / "data", ["file_name,text"]
    os.mkdir("photos")
    for name, text in PHOTOGRAPHS.items():
        image = Image.open(photos / name).convert("RGB")
        side = min(image.size) * 2 // 3
        for i in range(12):
            left, top = (int((full - side) * x) for full, x in zip(image.size, (i % 4 / 3, i // 4 / 2)))
            image.crop((left, top, left + side, top + side)).save(f"photos/{Path(name).stem}-{i}.jpg", quality=92)
            rows.append(f"{Path(name).stem}-{i}.jpg,\"{text}, part {i + 1} of 12\"")
    Path("photos/metadata.csv").write_text("\n".join(rows) + "\n")

    section = (ROOT / "README.md").read_text().split("## Your own images")[1].split("```bash\n")[1].split("```")[0]
    prepare, train = section.replace(".venv/bin/python", sys.executable).replace(" data/", f" {ROOT}/data/").replace(
        " train_prx.py", f" {ROOT}/train_prx.py").strip().splitlines()
    shown = execute(prepare)
    assert shown.splitlines()[-1] == train  # the next command that it shows is the README's
    shown = execute(train, "--steps 50 --samples 0")
    shown = execute(shown.splitlines()[-1])
    assert "\nfid " in shown and "no measure of photographs" in shown and "accuracy" not in shown
    run_folder = "logs/micro-photos"
    execute(f"{sys.executable} {ROOT}/eval_prx.py sample {run_folder} 'a cat' --n 2 --out cat.png")
    assert Image.open("cat.png").size[0] > 64
    execute(f"{sys.executable} {ROOT}/eval_prx.py export {run_folder} --out pipeline")
    from diffusers import PRXTransformer2DModel

    model = PRXTransformer2DModel.from_pretrained("pipeline/transformer")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in weights("micro-photos").values())
