"""The benchmark and the ablation runner: they run, and their tables come from their logs."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "records"))
import ablate  # noqa: E402
import bench  # noqa: E402


def test_the_benchmark_reports_every_row_and_what_burn_in_frees(tmp_path, capsys):
    flags = "--track micro --hidden 32 --heads 2 --depth 3 --batch 8 --tread-blocks 1-1 --repa-layer 1 --compute fp32".split()
    bench.main([*flags, "--turns", "1", "--steps-per-turn", "1", "--out", str(tmp_path / "b.json")])
    result = json.loads((tmp_path / "b.json").read_text())
    assert set(result["rows"]) == set(bench.TECHNIQUES) and result["rows"]["plain"]["ratio"] == 1
    for row in result["rows"].values():
        assert row["images_per_s"] == pytest.approx(8 / row["ms"] * 1e3) and row["parts_ms"]["optimizer"] > 0
    teacher = 1_000_000  # bytes of the embedded one
    assert result["rows"]["REPA"]["freed_bytes"] > teacher and result["rows"]["plain"]["freed_bytes"] == 0
    assert "teacher" in result["rows"]["REPA"]["parts_ms"] and "the end of REPA's burn-in frees" in capsys.readouterr().out


def test_the_ablation_table_is_made_from_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "OUT", tmp_path)
    rows = [dict(row=row, seed=seed, kind=kind, accuracy=a, unseen=a, fid=1.0, cmmd=2.0, dino_mmd=3.0)
            for row, seed, kind, a in (("baseline", 0, "steps", 0.5), ("baseline", 1, "steps", 0.7), ("Muon", 0, "steps", 0.9),
                                       ("TREAD 50 %", 0, "time", 0.4), ("TREAD 50 %", 0, "steps", 0.3))]
    (tmp_path / "micro.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "micro.speed.json").write_text(json.dumps({"baseline": [100, 110], "TREAD 50 %": [120, 132]}))
    lines = ablate.table("micro").splitlines()
    assert "| baseline | 18.20 | 2 | 60.00 ± 14.14 | - |" in lines[2] and len(lines) == 5
    assert "| Muon | 15.55 | 1 | 90.00 | 40.00 |" in lines[3]
    assert "1.20" in lines[4] and lines[4].endswith("| 40.00 |")
    assert ablate.flags_of("micro", "Muon")[:4] == "--recipe tuned-baseline --batch 64".split()
    assert ablate.flags_of("micro", "default recipe") == ["--recipe", "default"]


def test_the_benchmark_of_ranks_counts_bytes_and_memory(tmp_path):
    import subprocess
    done = subprocess.run([sys.executable, str(ROOT / "records/bench_ranks.py"), "--ranks", "1", "2", "--steps-of-each", "2",
                           "--out", str(tmp_path / "r.json"), *"--track micro --repa 0 --hidden 32 --heads 2 --depth 2 --batch 8 "
                           "--compute fp32 --tread-blocks 0-0".split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "r.json").read_text())
    one, two = result["rows"]
    assert two["wire_bytes"] > two["ring_bytes"]["gradients"] > 0 and sum(one["ring_bytes"].values()) == 0
    assert two["memory_bytes"] < one["memory_bytes"] == two["unsharded_bytes"] and two["stall_ms"] > 0
    gpus = result["computed"]  # masters, EMA and state are an eighth of their whole, gradients are whole
    whole = gpus["unsharded_bytes"] - 4 * gpus["parameters"]
    assert gpus["memory_bytes"] == pytest.approx(whole / 8 + 4 * gpus["parameters"], rel=0.1)
