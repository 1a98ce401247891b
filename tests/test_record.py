"""records/record.py: what is forged or sloppy is refused with its reason; what is right is verified and tabled."""

import hashlib
import json
import random
import shutil

import pytest
import torch

from data import scenes
from data.shards import save_grid
from records import record as R

SOURCE = "import torch\n\nprint('a trainer with a compile cache')\n"


def write_run(folder, source: str, seed: int, seconds: float, wrong: int):
    """A consistent run of 12 steps whose pictures are real scenes, the last `wrong` of 2,000 of them of no worth."""
    folder.mkdir(parents=True)
    sha = hashlib.sha256(source.encode()).hexdigest()
    records, began = [], 1.7e9 + 1000 * seed
    for i in range(3):
        elapsed = seconds * (i + 1) / 4
        records.append(dict(step=4 * i + 4, elapsed=elapsed, cpu_s=1.9 * elapsed, losses=[1.0, 0.9, 0.8, 0.7]))
    records.append(dict(event="finished", step=12, elapsed=seconds))
    text = "".join(json.dumps(r | dict(time=began + r["elapsed"])) + "\n" for r in records)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "log.txt").write_text(f"command\n--- source\n{source}\n--- end of source\ncompile cache: 0 files at the start\n")
    about = dict(track="micro", seed=seed, steps=12, source_sha256=sha, data=[dict(folder="x", sha256=R.DATA)],
                 finished=dict(step=12, samples=1, elapsed=seconds), machine=dict(cpu="AMD", cpus=2), parameters=1,
                 world_size=1, command=f"train_prx.py --track micro --data D --seed {seed} --name seed{seed} --steps 12")
    scores = dict(eval=dict(accuracy=[1.0] * (2000 - wrong) + [0.0] * wrong))
    protocol = dict(n=2000, scenes=scenes.MICRO.protocol, script_sha256=sha)
    metrics = dict(eval=dict(accuracy=(2000 - wrong) / 2000))
    for name, content in (("run", about), ("scores", scores), ("metrics", dict(protocol=protocol, metrics=metrics))):
        (folder / f"{name}.json").write_text(json.dumps(content))
    drawn = scenes.draw_scenes(range(32), "eval", scenes.MICRO)
    save_grid(scenes.render(drawn, 32), scenes.captions(drawn), folder / "samples.png", columns=8)


@pytest.fixture
def race(tmp_path):
    """A race of five seeds as `race` leaves it: B is a tenth faster."""
    noise = random.Random(0)
    for side, source, seconds in (("a", SOURCE, 60.0), ("b", SOURCE + "# faster\n", 54.0)):
        (tmp_path / "race" / side).mkdir(parents=True)
        (tmp_path / "race" / side / "train_prx.py").write_text(source)
        for seed in range(5):
            write_run(tmp_path / "race" / side / "logs" / f"seed{seed}", source, seed, seconds + noise.random(), 40 + seed)
    return tmp_path / "race"


@pytest.fixture
def packed(race, tmp_path, monkeypatch):
    monkeypatch.setattr(R, "ROOT", tmp_path)
    assert R.main(["pack", str(race), "--name", "mine", "--author", "me"]) == 0
    [folder] = (tmp_path / "records/micro").iterdir()
    return folder


def test_a_race_is_packed_verified_and_tabled(packed, tmp_path, capsys):
    assert R.verify(packed) == [] and R.main(["verify", str(packed)]) == 0
    record = json.loads((packed / "record.json").read_text())
    tests = R.tests_of(record["baseline_runs"], record["runs"])
    assert tests["passes"] and tests["faster"] and tests["n"] == 5 and 0.88 < tests["time_ratio"] < 0.92
    page = tmp_path / "records/README.md"
    page.write_text(f"# Records\n{R.BOARD}\nold\n<!-- end -->\nrest\n")
    for agrees, there in ((None, False), ("not at all", False), ("to the bit", True)):  # no row before a seed is repeated
        if agrees:
            (packed / "rerun.json").write_text(json.dumps(dict(agrees=agrees)))
        assert R.main(["table"]) == 0
        row = f"[{packed.name}](micro/{packed.name}) | me | 54." in page.read_text()
        assert row == there == (tmp_path / "records/history.png").exists(), agrees
    assert "\nrest\n" in page.read_text() and "old" not in page.read_text()


def test_a_disturbed_run_is_named_and_counts(race):
    edit_lines(race / "b/logs/seed3/metrics.jsonl", lambda x: [r | dict(cpu_s=1.2 * r["elapsed"]) for r in x])
    text = R.report(race, 5)
    assert "B, seed 3, was disturbed: 1.2 cores, usual 1.9" in text and text.count("disturbed") == 1 and "\n   3 " in text


@pytest.mark.parametrize("file, content", [
    ("record.json", "[]"), ("record.json", '{"format": 1, "track": "micro"}'), ("seed1/run.json", "{}"), ("seed1/metrics.json", "\x00"),
    ("seed1/scores.json", '{"eval": 3}'), ("seed1/metrics.jsonl", "[]"), ("seed1/metrics.jsonl", "{")])
def test_a_damaged_file_is_a_sentence(packed, file, content, capsys):
    (packed / file).write_text(content)
    assert R.main(["verify", str(packed)]) == 2
    said = capsys.readouterr()
    assert str(packed) in said.out + said.err and "Traceback" not in said.err


def test_the_statistics_are_scipys():
    from scipy import stats

    a = [dict(seconds=x, accuracy=0.96) for x in (60.0, 61.0, 62.5, 60.2, 61.1)]
    b = [dict(seconds=x, accuracy=y) for x, y in ((57.0, 0.961), (58.1, 0.958), (60.0, 0.965), (57.7, 0.955), (58.0, 0.96))]
    found = R.tests_of(a, b)
    assert found["p_faster"] == stats.ttest_rel([r["seconds"] for r in b], [r["seconds"] for r in a], alternative="less").pvalue
    assert found["p_accuracy"] == stats.ttest_1samp([r["accuracy"] for r in b], 0.95, alternative="greater").pvalue
    repeats = [dict(seconds=60.0, accuracy=0.951)] * 5
    assert not R.tests_of(a, [r | dict(accuracy=0.95) for r in repeats])["passes"]


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        place = content
        *parents, last = key.split("__")
        for part in parents:
            place = place[int(part) if part.isdigit() else part]
        place[last] = value
    path.write_text(json.dumps(content))


def drop_seed(folder):
    shutil.rmtree(folder / "seed2")
    content = json.loads((folder / "record.json").read_text())
    content["runs"] = [r for r in content["runs"] if r["seed"] != 2]
    (folder / "record.json").write_text(json.dumps(content))


def same_seed_twice(folder):
    shutil.rmtree(folder / "seed4")
    shutil.copytree(folder / "seed3", folder / "seed4")


def edit_lines(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r) + "\n" for r in change(lines)))


def paused(lines):
    return [r | dict(time=r["time"] + 100 * (i > 1)) for i, r in enumerate(lines)]


def other_picture(folder):
    drawn = scenes.draw_scenes(range(100, 132), "eval", scenes.MICRO)
    save_grid(scenes.render(drawn, 32), scenes.captions(drawn), folder / "seed0/samples.png", columns=8)


def write(path, text):
    path.write_text(text)


FORGERIES = {
    "time edited in the record": (lambda f: edit_json(f / "record.json", runs__0__seconds=40.0), "and record.json says"),
    "time edited in run.json": (lambda f: edit_json(f / "seed1/run.json", finished__elapsed=40.0), "its time differs"),
    "accuracy edited in the record": (lambda f: edit_json(f / "record.json", runs__0__accuracy=0.99), "and record.json says"),
    "accuracy edited in metrics": (lambda f: edit_json(f / "seed0/metrics.json", metrics__eval__accuracy=0.99), "its accuracy"),
    "scores cut": (lambda f: edit_json(f / "seed0/scores.json", eval__accuracy=[1.0] * 10), "the scores of all prompts"),
    "a picture of other scenes": (other_picture, "samples.png does not show"),
    "one seed dropped": (drop_seed, "the seeds are [0, 1, 3, 4]"),
    "a seed used twice": (same_seed_twice, "run.json has seed 3"),
    "the best of many": (lambda f: (f / "seed0").rename(f / "seed9"), "there are runs"),
    "script is not the log's": (lambda f: write(f / "train_prx.py", SOURCE + "# other\n"), "is not the script of record.json"),
    "log is not the script's": (lambda f: write(f / "seed0/log.txt", "--- source\nx\n--- end of source"), "the source in log.txt"),
    "other evaluation set": (lambda f: edit_json(f / "seed0/metrics.json", protocol__n=500), "judged by another protocol"),
    "other scenes": (lambda f: edit_json(f / "seed0/metrics.json", protocol__scenes="x"), "judged by another protocol"),
    "pictures of another script": (lambda f: edit_json(f / "seed0/metrics.json", protocol__script_sha256="x"), "another script's"),
    "other data": (lambda f: edit_json(f / "seed0/run.json", data=[dict(folder="x", sha256="y")]), "on other data"),
    "truncated log": (lambda f: edit_lines(f / "seed0/metrics.jsonl", lambda x: x[:-1]), "not finished at its declared length"),
    "steps missing": (lambda f: edit_lines(f / "seed0/metrics.jsonl", lambda x: x[1:]), "steps are missing"),
    "a resume": (lambda f: edit_lines(f / "seed0/metrics.jsonl", lambda x: [
        dict(event="resume", step=0, elapsed=0.0, time=1.0), *x]), "it was stopped and resumed"),
    "the clock paused": (lambda f: edit_lines(f / "seed0/metrics.jsonl", paused), "something was taken off the clock"),
    "the clock turned back": (lambda f: edit_lines(f / "seed0/metrics.jsonl", lambda x: [x[1], x[0], *x[2:]]), "clock goes back"),
    "a warm compile cache": (lambda f: write(f / "seed0/log.txt", (f / "seed0/log.txt").read_text().replace(
        "cache: 0 files", "cache: 9 files")), "the compile cache was not empty"),
    "a file too large": (lambda f: write(f / "seed0/log.txt", "x" * (400 << 10)), "bytes, more than"),
    "a file of its own": (lambda f: write(f / "weights.bin", "x"), "does not belong into a record"),
    "a link out of the folder": (lambda f: (f / "seed0/scores.json.x").symlink_to("/etc/passwd"), "does not belong"),
    "no baseline": (lambda f: shutil.rmtree(f / "baseline"), "baseline/train_prx.py is missing"),
    "a run's cores edited": (lambda f: edit_json(f / "record.json", runs__0__cores=9.9), "and record.json says"),
    "different lengths": (lambda f: edit_json(f / "seed1/run.json", steps=13), "a record has one length"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_are_refused_with_their_reason(packed, name, capsys):
    forge, says = FORGERIES[name]
    forge(packed)
    problems = R.verify(packed)
    assert any(says in p for p in problems), problems
    assert R.main(["verify", str(packed)]) == 2


@pytest.mark.parametrize("line, says", [
    ("from data import scenes", "imports data of the repository"), ("import train_prx", "imports train_prx"),
    ("x = open('/etc/passwd').read()", "names /etc/passwd, which is not its data"),
    ("x = open('../../data/networks/a').read()", "which is not its data"), ("def broken(:", "is no Python"), ("x = '" + "A" * 500 + "'", "nobody can read it")])
def test_a_script_that_needs_the_repository_or_cannot_be_read_is_refused(tmp_path, line, says):
    (tmp_path / "train_prx.py").write_text(line + "\n")
    sha = hashlib.sha256((line + "\n").encode()).hexdigest()
    assert says in R.check_script(tmp_path, sha)[0]


def test_the_trainer_itself_is_a_script_that_a_record_may_hold(tmp_path):
    shutil.copy(R.ROOT / "train_prx.py", tmp_path)
    assert R.check_script(tmp_path, R.file_sha256(tmp_path / "train_prx.py")) == []


def test_what_does_not_pass_is_not_a_record(race, tmp_path, monkeypatch):
    monkeypatch.setattr(R, "ROOT", tmp_path)
    for seed in range(5):
        run = race / f"b/logs/seed{seed}"
        edit_json(run / "scores.json", eval__accuracy=[1.0] * 1900 + [0.0] * 100)
        edit_json(run / "metrics.json", metrics__eval__accuracy=0.95 + 1e-3 * (seed - 2))
        edit_json(run / "scores.json", eval__accuracy=[1.0] * (1896 + 2 * seed) + [0.0] * (104 - 2 * seed))
    R.main(["pack", str(race), "--name", "weak", "--author", "me"])
    [folder] = (tmp_path / "records/micro").iterdir()
    assert any("accuracy is not above 95% at p < 0.01" in p for p in R.verify(folder))


def test_new_copies_a_script_and_prints_the_race(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert R.main(["new", "mine"]) == 0
    assert (tmp_path / "work/mine/train_prx.py").read_text() == (R.ROOT / "train_prx.py").read_text()
    assert "records/record.py race" in capsys.readouterr().out
    assert R.main(["new", "mine"]) == 2


def test_a_grid_is_read_back(tmp_path):
    drawn = scenes.draw_scenes(range(32), "eval", scenes.MICRO)
    images = scenes.render(drawn, 32)
    save_grid(images, scenes.captions(drawn), tmp_path / "g.png", columns=8)
    assert torch.equal(R.read_grid(tmp_path / "g.png", 32), images)


def test_the_repositorys_records_verify_and_its_table_is_up_to_date():
    page = (R.ROOT / "records/README.md").read_text()
    board = page.split(R.BOARD + "\n")[1].split("\n<!-- end -->")[0]
    assert board == R.table(R.ROOT / "records")[0]
