"""The records explain themselves: links resolve, folders name their commit, ablations are runs of the script."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, T

sys.path.insert(0, str(ROOT / "records"))
import ablate  # noqa: E402

FOLDERS = sorted(p for track in ("24h", "mini", "micro") for p in (ROOT / "records" / track).glob("*") if p.is_dir())
PAGES = sorted([ROOT / "README.md", ROOT / "data/README.md", *(ROOT / "records").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of the headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_page_resolves(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.relative_to(ROOT)} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.relative_to(ROOT)} links to {target}"


def test_every_record_has_a_readme_that_names_its_commit_and_hardware():
    assert len(FOLDERS) >= 4
    for folder in FOLDERS:
        text = (folder / "README.md").read_text()
        assert re.search(r"commit\W+\*\*[0-9a-f]{7,40}\*\*", text), folder
        assert "cores of" in text or "GPU" in text, folder
        if (folder / "record.json").exists():  # records/record.py verifies it
            continue
        cited = re.findall(r"^\| `([\w-]+)` \|", text, re.M)
        runs = {re.sub(r"-seed\d+$", "", p.name) for p in folder.iterdir() if p.is_dir()}
        assert runs == set(cited), f"{folder}: a run that no table cites, or the reverse"


def test_the_commit_of_a_record_is_the_one_whose_script_ran():
    in_git = subprocess.run(["git", "cat-file", "-e", "58b37c5"], cwd=ROOT, capture_output=True).returncode == 0
    if not in_git:
        pytest.skip("no history here (a shallow clone or an archive)")
    for name, run in (("2026-11-23_first", "default-seed0"), ("2026-11-24_polar", "default-120s-seed0"),
                      ("2026-11-25_short", "default-60s-seed0")):
        folder = ROOT / "records/micro" / name
        commit = re.search(r"commit\W+\*\*([0-9a-f]+)\*\*", (folder / "README.md").read_text())[1]
        log = (folder / run / "log.txt").read_text()
        source = log.split("--- source\n", 1)[1].split("\n--- end of source", 1)[0]
        show = ["git", "show", f"{commit}:train_prx.py"]
        then = subprocess.run(show, cwd=ROOT, capture_output=True, text=True).stdout
        assert source.strip() == then.strip(), name


def test_figures_of_the_leaderboard_are_those_of_the_runs():
    text = (ROOT / "records/README.md").read_text()
    accuracy = lambda run: json.loads((run / "metrics.json").read_text())["metrics"]["eval"]["accuracy"]
    for folder, runs in (("2026-11-25_short", "default-60s"), ("2026-11-24_bf16", "default-60s"),
                         ("2026-11-23_first", "default")):
        values = [accuracy(p) for p in sorted((ROOT / "records/micro" / folder).glob(f"{runs}-seed*"))]
        assert f"| 3 | {sum(values) / 3:.2%}"[:-1] in text and f"{min(values):.2%}"[:-1] in text, folder


def test_the_leaderboard_keeps_the_protocols_apart():
    text = (ROOT / "records/README.md").read_text()
    new, old = text.index("### Protocol 2"), text.index("### Protocol 1 (closed)")
    assert new < old and "2026-11-26_lean" in text[new:old] and "96.28 ± 0.47 %" in text[old:]
    assert "1,100" in text and T.TRACKS["micro"][0].steps == 1100


def test_finished_experiments_name_the_tree_they_need():
    scripts = sorted((ROOT / "records/notes").rglob("*.py"))
    assert scripts and all("commit 58b37c5" in p.read_text().splitlines()[0] for p in scripts)
    kept = {p.name for p in (ROOT / "records").glob("*.py")}
    assert {"bench.py", "variants.py", "ablate.py"} <= kept and "figures.py" not in kept
    assert "estimated" in (ROOT / "records/notes/fits.md").read_text().splitlines()[0]


@pytest.mark.parametrize("track", list(ablate.STEPS))
def test_every_row_of_the_ablations_is_flags_that_the_script_takes(track):
    for row in [*ablate.ROWS, *ablate.ALONE]:
        config, stages = T.parse_args(ablate.arguments(track, row, 3, 7, []))
        assert (config.track, config.seed, config.steps, config.samples) == (track.replace("openmoji", "micro"), 3, 7, 0)
        assert re.fullmatch(rf"ablate-{track}-[\w-]+-seed3-7", config.name)
    of = lambda row: T.parse_args(ablate.arguments(track, row, 0, 1, []))[0]
    default, base, published = of("default recipe"), of("baseline"), of("published baseline")
    on = ["--track", "micro", "--data", "shards/openmoji"] if track == "openmoji" else ["--track", track]
    assert default == T.parse_args([*on, "--name", default.name, "--steps", "1", "--samples", "0"])[0]
    assert (base.optimizer, base.lr, base.eps, base.decay_from, base.ema, base.repa) == ("adamw", 2e-3, 1e-15, 1, 0, 0)
    assert published.lr == 1e-4 and base.clip == published.clip == 0.2
    assert of("Muon").optimizer == "muon" and of("Muon").clip == 0.2 and of("TREAD 50 %").tread == 0.5
    assert ablate.batch_of(track, "baseline", []) == (256 if track == "mini" else 64)


def test_the_ablation_table_is_made_from_its_log(tmp_path):
    rows = (("baseline", 0, "steps", 0.5, 100), ("baseline", 1, "steps", 0.7, 110), ("Muon", 0, "steps", 0.9, 80),
            ("TREAD 50 %", 0, "time", 0.4, 120), ("TREAD 50 %", 0, "steps", 0.3, 120))
    keys = "row seed kind accuracy images_per_s".split()
    rest = dict(unseen=0.5, fid=1.0, cmmd=2.0, dino_mmd=3.0, loss=[1.0, 0.5], loss_by_time=[0.1] * 10)
    lines = [json.dumps(dict(zip(keys, row)) | rest) for row in rows]
    (tmp_path / "micro.jsonl").write_text("\n".join(lines) + "\n")
    lines = ablate.table(tmp_path / "micro.jsonl").splitlines()
    assert "| baseline | 18.20 | 2 | 60.00 ± 14.14 | - |" in lines[2] and len(lines) == 5
    assert "| Muon | 15.55 | 1 | 90.00 | 40.00 |" in lines[3] and "| 0.80 | - |" in lines[3]
    assert lines[4].endswith("| 1.20 | 40.00 |")
    ablate.plots(tmp_path / "micro.jsonl")
    assert (tmp_path / "micro-bf16.png").exists() and (tmp_path / "micro-captions.png").exists()


def test_ablations_on_emoji_are_judged_by_retrieval(tmp_path, monkeypatch):
    rows = {"painted": dict(share=0.3), "  without": dict(share=0.1)}
    calls = []

    def run(args, **kw):
        calls.append(args)
        (tmp_path / "retrieval.json").write_text(json.dumps(dict(protocol=dict(seed=0), rows=rows)))

    monkeypatch.setattr(subprocess, "run", run)
    for captions, asked in (("short", "short"), ("mix:0.2", "long"), ("long", "long")):
        (tmp_path / "retrieval.json").unlink(missing_ok=True)
        assert ablate.judge_emoji(tmp_path, dict(captions=captions), {})[0] == dict(retrieval=0.3, alone=0.1)
        assert calls.pop()[1:] == [str(ROOT / "records/retrieval.py"), str(tmp_path), "--captions", asked]
    keys, rest = "row seed kind retrieval alone images_per_s".split(), dict(loss=[1.0], loss_by_time=[0.1] * 10)
    rows = ("baseline", 0, "steps", 0.2, 0.1, 100), ("Muon", 0, "steps", 0.3, 0.2, 80)
    (tmp_path / "openmoji.jsonl").write_text("".join(json.dumps(dict(zip(keys, row)) | rest) + "\n" for row in rows))
    assert "| Muon | 15.55 | 1 | 30.00 | 10.00 | 20.00 | 0.80 | - |" in ablate.table(tmp_path / "openmoji.jsonl")
    ablate.plots(tmp_path / "openmoji.jsonl")


def test_an_ablation_is_a_run_of_the_script_judged_by_the_evaluator(shards, monkeypatch):
    calls = []

    def run(args, **kw):
        """The script for real, at a small size; the evaluator's result made up."""
        calls.append(args)
        if args[1].endswith("train_prx.py"):
            return subprocess.run_really([*args, "--hidden", "32", "--heads", "2", "--depth", "2"], **kw)
        metrics = {"eval": dict(accuracy=0.5, fid=1.0, cmmd=2.0, dino_mmd=3.0), "unseen": dict(accuracy=0.4)}
        (Path(args[2]) / "metrics.json").write_text(json.dumps(dict(metrics=metrics, protocol_sha256="ab")))

    monkeypatch.setattr(subprocess, "run_really", subprocess.run, raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    flags = ["--out", "out", "--rows", "baseline", "--seeds", "1", "--steps", "3", "--flags", "--compile off --batch 16"]
    ablate.main(flags)
    ablate.main(flags)  # it is there: not made again
    assert len(calls) == 2 and calls[1][1:] == [str(ROOT / "eval_prx.py"), calls[1][2], "--n", "500"]
    [record] = ablate.read_log(Path("out/micro.jsonl"))
    assert (record["row"], record["steps"], record["samples"]) == ("baseline", 3, 48)
    assert record["accuracy"] == 0.5 and record["images_per_s"] > 0 and len(record["loss_by_time"]) == 10
    assert record["protocol_sha256"] == "ab" and record["machine"]["torch"]
    assert record["data"][0]["sha256"] and record["data"][0]["folder"] == "micro"
