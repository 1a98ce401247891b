"""Records that carry their own proof: race two scripts, pack the result, verify it, keep the table.

    python records/record.py new mine --track micro              # work/mine/train_prx.py, to edit
    python records/record.py race train_prx.py work/mine/train_prx.py --out work/race      # five seeds, in turns
    python records/record.py race "train_prx.py --steps 480" "train_prx.py --steps 440" --out work/race
    python records/record.py pack work/race --name mine --author you     # records/micro/DATE_mine, baseline beside it
    python records/record.py verify records/micro/*_mine         # recomputes everything, executes nothing
    python records/record.py verify records/micro/*_mine --rerun 3        # repeats seed 3 with the record's own script
    python records/record.py table                               # writes the leaderboard from what verifies

A race runs A (the baseline) and B in turns on this machine, seed by seed, from a cold compile cache, and judges each
run. It goes on where it was stopped. A record is a B that is good enough, and the A that ran beside it. What no program
can show here: a consistent forgery is found by --rerun only, and that the painting is the model's own work is read by a
person. The rules: records/README.md.
"""

import argparse
import ast
import datetime
import hashlib
import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import scenes  # noqa: E402
from data.shards import UserError, write_json  # noqa: E402

SEEDS = 5  # at least, numbered from 0
TARGET, LEVEL = 0.95, 0.01  # micro: prompt accuracy, and p of both tests
FASTER = 0.98  # a new record's mean time over its baseline's, at most
FILES = ("log.txt", "metrics.jsonl", "metrics.json", "scores.json", "run.json", "samples.png")  # of each run
LARGEST = 300 << 10  # bytes of a file
LOCAL = ("data", "eval_prx", "records", "tests", "train_prx")  # modules that a record's script must not import
PROTOCOL = {"micro": dict(data="bdfb4862c633a39caaa7e07fd831f14337b5e7aa2c49c8fb869ed26566e653ab", prompts=2000)}
BOARD = "<!-- leaderboard: written by records/record.py table -->"


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from None


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- new and race ----------------------------------------------------------------------------------------------------

def new(args) -> int:
    """A working copy of the trainer, or of a record's script."""
    folder, source = Path("work") / args.name, (args.start or ROOT) / "train_prx.py"
    if folder.exists():
        raise UserError(f"{folder} exists; choose another name")
    folder.mkdir(parents=True)
    shutil.copy(source, folder / "train_prx.py")
    print(f"edit {folder}/train_prx.py; try it: python {folder}/train_prx.py --track {args.track}\nrace it: python "
          f"records/record.py race {source} {folder}/train_prx.py --track {args.track} --out work/{args.name}-race")
    return 0


def race(args) -> int:
    """A and B in turns, seed by seed."""
    data, out = (args.data or Path("shards") / args.track).resolve(), args.out.resolve()
    if not (data / "index.json").exists():
        raise UserError(f"{data} holds no shards; write them with `python data/scenes.py --track {args.track}`")
    sides = {}
    for side, command in (("a", args.a), ("b", args.b)):
        script, *flags = shlex.split(command)
        if not Path(script).is_file():
            raise UserError(f"{script} is no script; give a file, or a file and its flags in quotes")
        folder = out / side
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "train_prx.py").exists() and sha256(folder / "train_prx.py") != sha256(Path(script)):
            raise UserError(f"{folder} holds runs of another script; choose another --out")
        shutil.copy(script, folder / "train_prx.py")
        sides[side] = folder, flags
    begun, total, done = time.time(), 2 * args.seeds, 0
    for seed in range(args.seeds):
        for side in ("ab" if seed % 2 == 0 else "ba"):
            run_one(*sides[side], args.track, data, seed)
            done += 1
            left = (time.time() - begun) / done * (total - done)
            result = said(out / side / "logs" / f"seed{seed}")
            print(f"{side}, seed {seed}: {result}; {left / 60:.0f} minutes left", flush=True)
    print(report(out, args.seeds))
    return 0


def run_one(folder: Path, flags: list[str], track: str, data: Path, seed: int):
    """Trains and judges a seed, if that has not been done. A run that fails stays: every seed counts."""
    run = folder / "logs" / f"seed{seed}"
    command = [sys.executable, "train_prx.py", "--track", track, "--data", str(data), "--seed", str(seed), "--name",
               run.name, *flags]
    if not finished(run):
        print(f"seed {seed}: progress in {folder / f'seed{seed}.txt'}", flush=True)
        with open(folder / f"seed{seed}.txt", "w") as log:
            subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    if finished(run) and not (run / "metrics.json").exists():
        judge = [sys.executable, ROOT / "eval_prx.py", run, "--trust"]
        with open(folder / f"seed{seed}.txt", "a") as log:
            subprocess.run(judge, stdout=log, stderr=subprocess.STDOUT)


def finished(run: Path) -> dict | None:
    try:
        return json.loads((run / "run.json").read_text())["finished"]
    except (OSError, ValueError, KeyError):
        return None


def accuracy_of(run: Path) -> float:
    """Prompt accuracy; nothing (0) of a run that failed."""
    if not finished(run) or not (run / "metrics.json").exists():
        return 0.0
    return read_json(run / "metrics.json")["metrics"]["eval"].get("accuracy", 0.0)


def seconds_of(run: Path) -> float:
    return finished(run)["elapsed"] if finished(run) else math.nan


def said(run: Path) -> str:
    return f"{seconds_of(run):.1f} s, {accuracy_of(run):.2%}" if finished(run) else "failed"


def tests_of(a: list[dict], b: list[dict]) -> dict:
    """What is claimed of B's runs, beside A's: accuracy against the target (one-sided t-test), times against A's of the
    same seed (one-sided, paired). A run: seconds, accuracy."""
    from scipy import stats

    accuracy, times = [r["accuracy"] for r in b], [[r["seconds"] for r in runs] for runs in (a, b)]
    out = dict(n=len(b), accuracy=statistics.fmean(accuracy), accuracy_sd=statistics.stdev(accuracy),
               worst=min(accuracy), seconds=statistics.fmean(times[1]), baseline_seconds=statistics.fmean(times[0]))
    out["p_accuracy"] = float(stats.ttest_1samp(accuracy, TARGET, alternative="greater").pvalue)
    out["p_faster"] = float(stats.ttest_rel(times[1], times[0], alternative="less").pvalue)
    out["time_ratio"] = out["seconds"] / out["baseline_seconds"]
    out["passes"] = out["p_accuracy"] < LEVEL
    out["faster"] = out["p_faster"] < LEVEL and out["time_ratio"] <= FASTER
    return out


def runs_of(folder: Path, seeds: int) -> list[dict]:
    runs = [folder / "logs" / f"seed{seed}" for seed in range(seeds)]
    return [dict(seed=i, seconds=seconds_of(run), accuracy=accuracy_of(run)) for i, run in enumerate(runs)]


def report(out: Path, seeds: int) -> str:
    a, b = (runs_of(out / side, seeds) for side in "ab")
    lines = ["seed      A, s      A, %      B, s      B, %"]
    for x, y in zip(a, b):
        lines.append(f"{x['seed']:4} {x['seconds']:9.1f} {x['accuracy']:9.2%} {y['seconds']:9.1f} {y['accuracy']:9.2%}")
    t = tests_of(a, b)
    passes, faster = "passes" if t["passes"] else "does not pass", "faster" if t["faster"] else "not shown to be faster"
    lines.append(f"B: {t['accuracy']:.2%} +- {t['accuracy_sd']:.2%}, worst {t['worst']:.2%}, above {TARGET:.0%} with "
                 f"p = {t['p_accuracy']:.4f} ({passes} at {LEVEL})")
    lines.append(f"B takes {t['time_ratio']:.3f} of A's time, p = {t['p_faster']:.4f}: {faster}")
    return "\n".join(lines)


# ---- pack ------------------------------------------------------------------------------------------------------------

def pack(args) -> int:
    """A race's B as a record, with its baseline A beside it."""
    first = args.race / "b/logs/seed0"
    about = read_json(first / "run.json")
    seeds = len(list((args.race / "b/logs").glob("seed*")))
    folder = args.records / about["track"] / f"{datetime.date.today()}_{args.name}"
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --name")
    for side, target in (("b", folder), ("a", folder / "baseline")):
        target.mkdir(parents=True)
        shutil.copy(args.race / side / "train_prx.py", target)
        for seed in range(seeds):
            run = args.race / side / "logs" / f"seed{seed}"
            (target / f"seed{seed}").mkdir()
            for name in FILES:
                if (run / name).exists():
                    shutil.copy(run / name, target / f"seed{seed}")
    a, b = (runs_of(args.race / side, seeds) for side in "ab")
    diff = subprocess.run(["git", "diff", "--no-index", "--shortstat", folder / "baseline/train_prx.py",
                           folder / "train_prx.py"], capture_output=True, text=True).stdout.strip()
    write_json(folder / "record.json", dict(
        format=1, track=about["track"], name=args.name, authors=args.author, parent=args.parent, diff=diff,
        source_sha256=sha256(folder / "train_prx.py"), baseline_sha256=sha256(folder / "baseline/train_prx.py"),
        machine=about["machine"], parameters=about["parameters"], world_size=about["world_size"], data=about["data"],
        runs=b, baseline_runs=a, tests=tests_of(a, b)))
    (folder / "README.md").write_text(
        f"# {args.name}\n\nBy {', '.join(args.author)}. `diff baseline/train_prx.py train_prx.py`: {diff or 'nothing'}."
        "\n\n## What changed, and why\n\n## What was expected, what was measured\n")
    print(f"wrote {folder}: fill in its README.md, then python records/record.py verify {folder}")
    return 0


# ---- verify ----------------------------------------------------------------------------------------------------------

def verify(folder: Path) -> list[str]:
    """A sentence for everything that is wrong with a record; nothing of it is executed."""
    problems = check_files(folder)
    if problems:
        return problems
    record = read_json(folder / "record.json")
    if record.get("format") != 1 or record.get("track") not in PROTOCOL:
        return [f"{folder}/record.json has format {record.get('format')} and track {record.get('track')}; this program "
                f"verifies format 1 of {', '.join(PROTOCOL)}"]
    sides = {"runs": folder, "baseline_runs": folder / "baseline"}
    for key, side in sides.items():
        problems += check_script(side, record["source_sha256" if key == "runs" else "baseline_sha256"])
        seeds = [run["seed"] for run in record[key]]
        if seeds != list(range(len(seeds))) or len(seeds) < SEEDS:
            problems.append(f"{side}: the seeds are {seeds}, not 0 to n - 1 with n of at least {SEEDS}")
        there = sorted(p.name for p in side.glob("seed*"))
        if there != sorted(f"seed{seed}" for seed in seeds):
            problems.append(f"{side}: there are runs {', '.join(there)}, and record.json speaks of {seeds}")
            continue
        for run in record[key]:
            problems += check_run(side / f"seed{run['seed']}", side, run, record["track"])
    lengths = {read_json(p)["steps"] for p in folder.glob("seed*/run.json")}
    if len(lengths) != 1:
        problems.append(f"{folder}: the runs declare {sorted(lengths)} steps; a record has one length")
    if not problems:
        expected = tests_of(record["baseline_runs"], record["runs"])
        wrong = [k for k, v in expected.items() if record["tests"].get(k) != v]
        if wrong:
            problems.append(f"{folder}/record.json: {', '.join(wrong)} are not what its runs give "
                            f"({', '.join(str(expected[k]) for k in wrong)})")
        elif not expected["passes"]:
            problems.append(f"{folder}: accuracy is not above {TARGET:.0%} at p < {LEVEL} (p = "
                            f"{expected['p_accuracy']:.4f})")
    return problems


def check_files(folder: Path) -> list[str]:
    """Nothing missing, nothing that does not belong, nothing large, no links."""
    problems = [f"{folder / name} is missing" for name in ("record.json", "README.md", "train_prx.py",
                                                           "baseline/train_prx.py") if not (folder / name).is_file()]
    top = {"record.json", "README.md", "train_prx.py"}
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        inside = parts[1:] if parts[0] == "baseline" else parts
        known = path.name in top if len(inside) == 1 else path.name in FILES and inside[0].startswith("seed")
        if path.is_symlink() or path.is_file() and (not known or len(inside) > 2):
            problems.append(f"{path} does not belong into a record")
        elif path.is_file() and path.stat().st_size > LARGEST:
            problems.append(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST:,}")
    return problems


def check_script(side: Path, claimed: str) -> list[str]:
    path = side / "train_prx.py"
    if sha256(path) != claimed:
        return [f"{path} is not the script of record.json (its sha256 differs)"]
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, ValueError) as error:
        return [f"{path} is no Python ({error})"]
    problems = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.split(".")[0] in LOCAL:
                problems.append(f"{path}, line {node.lineno}, imports {name} of the repository")
    long = max(map(len, path.read_text().splitlines()), default=0)
    if long > 400:
        problems.append(f"{path} has a line of {long} characters; nobody can read it")
    return problems


def check_run(run: Path, side: Path, claimed: dict, track: str) -> list[str]:
    """One seed: its log, its clock, its metrics, its pictures."""
    if missing := [name for name in FILES if not (run / name).is_file()]:
        return [f"{run} lacks {', '.join(missing)}"]
    about, log = read_json(run / "run.json"), (run / "log.txt").read_text()
    result, scores, records = read_json(run / "metrics.json"), read_json(run / "scores.json"), []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        if line.strip():
            try:
                records.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                return [f"{run}/metrics.jsonl holds a line that is no JSON object"]
    rules, problems = PROTOCOL[track], []

    def need(holds, sentence):
        if not holds:
            problems.append(f"{run}: {sentence}")

    source = log.split("--- source\n", 1)[-1].split("\n--- end of source", 1)[0]
    need(hashlib.sha256(source.encode()).hexdigest() == sha256(side / "train_prx.py") == about["source_sha256"],
         "the source in log.txt, the folder's script and run.json are not the same")
    need(about["seed"] == claimed["seed"], f"run.json has seed {about['seed']}")
    need(about["track"] == track and [d["sha256"] for d in about["data"]] == [rules["data"]],
         "it was trained on other data than the track's")
    need("compile cache: 0 files at the start" in log or "compile cache" not in log, "the compile cache was not empty")
    need(not any(r.get("event") in ("resume", "stopped") for r in records), "it was stopped and resumed")

    end = [r for r in records if r.get("event") == "finished"]
    beats = [r for r in records if "losses" in r]
    need(len(end) == 1 and end[0]["step"] == about["steps"], "it is not finished at its declared length")
    need(sum(len(r["losses"]) for r in beats) == about["steps"], "steps are missing in metrics.jsonl")
    clock = [(r["elapsed"], r["time"], r["step"]) for r in beats + end]
    need(all(x[0] <= y[0] and x[1] <= y[1] and x[2] <= y[2] for x, y in zip(clock, clock[1:])), "its clock goes back")
    drift = [abs((y[1] - x[1]) - (y[0] - x[0])) for x, y in zip(clock, clock[1:])]
    need(max(drift, default=0) < 5, "its clock and its time stamps differ: something was taken off the clock")
    seconds = end[0]["elapsed"] if end else math.nan
    need(about["finished"] and about["finished"]["elapsed"] == seconds == claimed["seconds"],
         "its time is not the same in metrics.jsonl, run.json and record.json")

    protocol, found = result["protocol"], result["metrics"]["eval"]
    need(protocol.get("n") == rules["prompts"] and protocol.get("scenes") == scenes.difficulty_of(track).protocol,
         "it was judged by another protocol")
    need(protocol.get("script_sha256") == sha256(side / "train_prx.py"), "its pictures are another script's")
    accuracy = np.asarray(scores.get("eval", {}).get("accuracy", []), dtype=np.float64)
    need(len(accuracy) == rules["prompts"], "scores.json does not hold the scores of all prompts")
    need(len(accuracy) and abs(accuracy.mean() - found["accuracy"]) < 1e-6 and found["accuracy"] == claimed["accuracy"],
         "its accuracy is not the same in scores.json, metrics.json and record.json")
    if len(accuracy) >= 32:
        seen = scenes.score(read_grid(run / "samples.png", 32), scenes.draw_scenes(
            range(32), "eval", scenes.difficulty_of(track)))["accuracy"].numpy()
        need(np.abs(seen - accuracy[:32]).max() < 1e-5, "samples.png does not show what scores.json says of it")
    return problems


def read_grid(path: Path, side: int, columns: int = 8, count: int = 32) -> torch.Tensor:
    """The images of a grid that eval_prx.py wrote: uint8 (count, 3, side, side)."""
    sheet, zoom, gap = np.array(Image.open(path, formats=["PNG"]).convert("RGB")), max(1, 192 // side), 8
    cell, images = (len(sheet) - gap) // (count // columns), []
    for i in range(count):
        x, y = gap + i % columns * (side * zoom + gap), gap + i // columns * cell
        images.append(torch.from_numpy(sheet[y:y + side * zoom:zoom, x:x + side * zoom:zoom].copy()).permute(2, 0, 1))
    if any(image.shape != (3, side, side) for image in images):
        raise UserError(f"{path} is no grid of {count} images of {side} px")
    return torch.stack(images)


def rerun(folder: Path, seed: int, data: Path) -> str:
    """Repeats a seed with the record's own script in a scratch folder; says how it compares."""
    record, scratch = read_json(folder / "record.json"), Path("work") / f"rerun-{folder.name}"
    print(f"executing {folder}/train_prx.py in {scratch}: read it first", flush=True)
    scratch.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "train_prx.py", scratch)
    about = read_json(folder / f"seed{seed}/run.json")
    flags = shlex.split(about["command"])[1:]
    for name in ("--track", "--data", "--seed", "--name"):
        if name in flags:
            del flags[flags.index(name):flags.index(name) + 2]
    run_one(scratch.resolve(), flags, record["track"], data.resolve(), seed)
    before = [x for r in read_lines(folder / f"seed{seed}/metrics.jsonl") for x in r.get("losses", [])]
    after = [x for r in read_lines(scratch / f"logs/seed{seed}/metrics.jsonl") for x in r.get("losses", [])]
    same = "the same losses to the bit" if before == after else "other losses"
    claimed = record["runs"][seed]
    return (f"seed {seed}: {said(scratch / f'logs/seed{seed}')} here, {claimed['seconds']:.1f} s, "
            f"{claimed['accuracy']:.2%} claimed; {same}")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


# ---- the table -------------------------------------------------------------------------------------------------------

def table(records: Path) -> str:
    """The leaderboard of micro under protocol 2, of the records that verify, fastest first."""
    rows = []
    for path in sorted(records.glob("micro/*/record.json")):
        if problems := verify(path.parent):
            raise UserError("\n".join(problems))
        record = read_json(path)
        rows.append((record["tests"], record, path.parent.name))
    lines = ["| record | by | mean time | prompt accuracy | worst | seeds | p | over its baseline | hardware |",
             "|---" * 9 + "|"]
    for t, record, name in sorted(rows, key=lambda row: row[0]["seconds"]):
        gain = f"{t['time_ratio']:.3f}, p = {t['p_faster']:.2g}" if t["faster"] else "not faster"
        lines.append(f"| [{name}](micro/{name}) | {', '.join(record['authors'])} | {t['seconds']:.1f} s | "
                     f"{t['accuracy']:.2%} ± {t['accuracy_sd']:.2%} | {t['worst']:.2%} | {t['n']} | "
                     f"{t['p_accuracy']:.2g} | {gain} | "
                     f"{record['machine']['cpus']} cores, {record['machine']['cpu']} |")
    return "\n".join(lines if rows else ["No record has been made under protocol 2."])


def write_table(records: Path) -> int:
    page = records / "README.md"
    before, board, rest = page.read_text().partition(BOARD)
    _, end, after = rest.partition("<!-- end -->")
    if not board or not end:
        raise UserError(f"{page} has no place for the table; it lies between '{BOARD}' and '<!-- end -->'")
    page.write_text(f"{before}{BOARD}\n{table(records)}\n{end}{after}")
    return 0


# ---- command line ----------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("new", help="a working copy of the current script")
    begin.add_argument("name")
    begin.add_argument("--track", default="micro", choices=list(PROTOCOL))
    begin.add_argument("--from", dest="start", type=Path, help="a record's folder [the checkout]")
    run = commands.add_parser("race", help="two scripts in turns")
    run.add_argument("a", help="the baseline: a script, or a script and its flags in quotes")
    run.add_argument("b", help="what is to be faster")
    run.add_argument("--seeds", type=int, default=SEEDS)
    run.add_argument("--track", default="micro", choices=list(PROTOCOL))
    run.add_argument("--data", type=Path, help="[shards/TRACK]")
    run.add_argument("--out", type=Path, default=Path("work/race"))
    packing = commands.add_parser("pack", help="a race as a record")
    packing.add_argument("race", type=Path)
    packing.add_argument("--name", required=True)
    packing.add_argument("--author", required=True, nargs="+")
    packing.add_argument("--parent", default="", help="the record that it builds on")
    packing.add_argument("--records", type=Path, default=ROOT / "records")
    proof = commands.add_parser("verify", help="recompute everything that a record claims")
    proof.add_argument("folders", nargs="+", type=Path)
    proof.add_argument("--rerun", type=int, metavar="SEED", help="repeat this seed: executes the record's script")
    proof.add_argument("--data", type=Path, default=Path("shards/micro"))
    board = commands.add_parser("table", help="write the leaderboard")
    board.add_argument("--records", type=Path, default=ROOT / "records")
    args = parser.parse_args(argv)
    try:
        if args.command == "verify":
            problems = [p for folder in args.folders for p in verify(folder)]
            print("\n".join(problems) or "all that can be recomputed is as claimed; --rerun SEED shows the rest")
            if not problems and args.rerun is not None:
                print("\n".join(rerun(folder, args.rerun, args.data) for folder in args.folders))
            return 2 if problems else 0
        if args.command == "table":
            return write_table(args.records)
        return dict(new=new, race=race, pack=pack)[args.command](args)
    except UserError as error:
        print(f"record: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
