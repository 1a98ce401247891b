"""Records that carry their own proof: race two scripts, pack the result, verify it, keep the table.

    python records/record.py new mine                            # work/mine/train_prx.py, to edit
    python records/record.py race train_prx.py work/mine/train_prx.py --out work/race      # five seeds, in turns
    python records/record.py pack work/race --name mine --author you     # records/micro/DATE_mine, baseline beside it
    python records/record.py verify records/micro/*_mine --rerun 3   # recomputes everything; then repeats seed 3
    python records/record.py table                               # writes the leaderboard from what verifies

A race runs A (the baseline) and B in turns on this machine, seed by seed, and goes on where it was stopped. A record is
a B that is good enough, and the A that ran beside it. A consistent forgery is found by --rerun only, and that a script
paints with the model that it has trained is read by a person. The rules: records/README.md.
"""

import argparse
import ast
import datetime
import hashlib
import json
import math
import os
import re
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
from data.shards import UserError, command, file_sha256, write_json  # noqa: E402

SEEDS = 5  # at least, numbered from 0
TARGET, LEVEL, FASTER = 0.95, 0.01, 0.98  # micro: prompt accuracy; p of both tests; most of the baseline's mean time
FILES = ("log.txt", "metrics.jsonl", "metrics.json", "scores.json", "run.json", "samples.png")  # of each run
TOP = ("record.json", "README.md", "train_prx.py", "rerun.json")
LARGEST = 300 << 10  # bytes of a file
SYSTEM = "/proc/self/stat", "/proc/cpuinfo"  # what the trainer reads beside its data
LOCAL = ("data", "eval_prx", "records", "tests", "train_prx")  # modules that a record's script must not import
PROMPTS, DATA = 2000, "bdfb4862c633a39caaa7e07fd831f14337b5e7aa2c49c8fb869ed26566e653ab"  # of shards/micro/index.json
BOARD = "<!-- leaderboard: written by records/record.py table -->"


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from None


# ---- new and race ----------------------------------------------------------------------------------------------------

def new(args):
    """A working copy of the trainer, or of a record's script."""
    folder, source = Path("work") / args.name, (args.start or ROOT) / "train_prx.py"
    if folder.exists():
        raise UserError(f"{folder} exists; choose another name")
    folder.mkdir(parents=True)
    shutil.copy(source, folder / "train_prx.py")
    script = folder / "train_prx.py"
    sides = [shlex.quote(str(side)) for side in (source, script)]  # each a command line of its own
    race = command("records/record.py", "race", *sides, "--track", args.track, "--out", f"work/{args.name}-race")
    print(f"edit {script}; try it:\n{command(script.resolve(), '--track', args.track)}\nrace it:\n{race}")


def race(args):
    """A and B in turns, seed by seed."""
    data, out = (args.data or Path("shards") / args.track).resolve(), args.out.resolve()
    if not (data / "index.json").exists():
        raise UserError(f"{data} holds no shards; write them with `{command('data/scenes.py', '--track', args.track)}`")
    sides = {}
    for side, line in (("a", args.a), ("b", args.b)):
        script, *flags = shlex.split(line)
        if not Path(script).is_file():
            raise UserError(f"{script} is no script; give a file, or a file and its flags in quotes")
        folder = out / side
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "train_prx.py").exists() and file_sha256(folder / "train_prx.py") != file_sha256(Path(script)):
            raise UserError(f"{folder} holds runs of another script; choose another --out")
        shutil.copy(script, folder / "train_prx.py")
        sides[side] = folder, flags
    begun = time.time()
    for seed in range(args.seeds):
        order = "ab" if seed % 2 == 0 else "ba"
        for side in order:  # right after each other, so that the machine is the same
            train_one(*sides[side], args.track, data, seed)
        for side in order:
            judge_one(sides[side][0], seed)
        left = (time.time() - begun) / (seed + 1) * (args.seeds - seed - 1) / 60
        a, b = (outcome(out / side / f"logs/seed{seed}") for side in "ab")
        print(f"seed {seed}: A {a['seconds']:.1f} s, {a['accuracy']:.2%}; B {b['seconds']:.1f} s, {b['accuracy']:.2%}; "
              f"{left:.0f} minutes left", flush=True)
    print(report(out, args.seeds))


def train_one(folder: Path, flags: list[str], track: str, data: Path, seed: int):
    """Trains a seed, if that has not been done. A run that fails stays: every seed counts."""
    if not finished(folder / f"logs/seed{seed}"):
        print(f"seed {seed}: progress in {folder}/seed{seed}.txt", flush=True)
        execute(folder, seed, "train_prx.py", "--track", track, "--data", str(data), "--seed", str(seed), "--name",
                f"seed{seed}", *flags)


def judge_one(folder: Path, seed: int):
    run = folder / f"logs/seed{seed}"
    if finished(run) and not (run / "metrics.json").exists():
        execute(folder, seed, ROOT / "eval_prx.py", run, "--trust")


def execute(folder: Path, seed: int, *words):
    """A program that needs no network, so it sees no proxy and no token. What it says goes into the seed's log."""
    hidden = "_proxy", "_token", "_key", "_secret"
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith(hidden)} | dict(HF_HUB_OFFLINE="1")
    with open(folder / f"seed{seed}.txt", "a") as log:
        subprocess.run([sys.executable, *words], cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=env)


def finished(run: Path) -> dict | None:
    try:
        return json.loads((run / "run.json").read_text())["finished"]
    except (OSError, ValueError, KeyError):
        return None


def outcome(run: Path) -> dict:
    """Seconds to the final weights, prompt accuracy, and cores that were busy. All zero for a run that failed."""
    end, result = finished(run), dict(seed=int(run.name[4:]), seconds=0.0, accuracy=0.0, cores=0.0)
    if end and (run / "metrics.json").exists():
        beats = [r for r in read_lines(run / "metrics.jsonl") if "cpu_s" in r]
        result["cores"] = round(beats[-1]["cpu_s"] / beats[-1]["elapsed"], 3)
        result["accuracy"] = read_json(run / "metrics.json")["metrics"]["eval"].get("accuracy", 0.0)
        result["seconds"] = end["elapsed"]
    return result


def tests_of(a: list[dict], b: list[dict]) -> dict:
    """What is claimed of B's runs, beside A's: accuracy against the target (one-sided t-test), times against A's of the
    same seed (one-sided, paired). A run: seed, seconds, accuracy, cores."""
    from scipy import stats

    accuracy, times = [r["accuracy"] for r in b], [[r["seconds"] for r in runs] for runs in (a, b)]
    out = dict(n=len(b), accuracy=statistics.fmean(accuracy), accuracy_sd=statistics.stdev(accuracy),
               worst=min(accuracy), seconds=statistics.fmean(times[1]), baseline_seconds=statistics.fmean(times[0]))
    out["p_accuracy"] = float(stats.ttest_1samp(accuracy, TARGET, alternative="greater").pvalue)
    out["p_faster"] = float(stats.ttest_rel(times[1], times[0], alternative="less").pvalue)
    out |= dict(time_ratio=out["seconds"] / out["baseline_seconds"], passes=out["p_accuracy"] < LEVEL)
    out["faster"] = all(times[0] + times[1]) and out["p_faster"] < LEVEL and out["time_ratio"] <= FASTER
    return out


def report(out: Path, seeds: int) -> str:
    a, b = ([outcome(out / side / f"logs/seed{seed}") for seed in range(seeds)] for side in "ab")
    lines = ["seed      A, s      A, %      B, s      B, %"]
    for x, y in zip(a, b):
        lines.append(f"{x['seed']:4} {x['seconds']:9.1f} {x['accuracy']:9.2%} {y['seconds']:9.1f} {y['accuracy']:9.2%}")
    t = tests_of(a, b)
    passes, faster = "passes" if t["passes"] else "does not pass", "faster" if t["faster"] else "not shown to be faster"
    lines.append(f"B: {t['accuracy']:.2%} +- {t['accuracy_sd']:.2%}, worst {t['worst']:.2%}, above {TARGET:.0%} with "
                 f"p = {t['p_accuracy']:.4f} ({passes} at {LEVEL})")
    lines.append(f"B takes {t['time_ratio']:.3f} of A's time, p = {t['p_faster']:.4f}: {faster}")
    for side, runs in (("A", a), ("B", b)):  # a disturbed run is named, not dropped
        usual = statistics.median(r["cores"] for r in runs)
        slow = [r for r in runs if r["cores"] < 0.93 * usual]
        lines += [f"{side}, seed {r['seed']}, was disturbed: {r['cores']} cores, usual {usual}" for r in slow]
    return "\n".join(lines)


# ---- pack ------------------------------------------------------------------------------------------------------------

def pack(args):
    """A race's B as a record, with its baseline A beside it."""
    about = read_json(args.race / "b/logs/seed0/run.json")
    seeds = range(len(list((args.race / "b/logs").glob("seed*"))))
    folder = ROOT / "records" / about["track"] / f"{datetime.date.today()}_{args.name}"
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --name")
    for side, target in (("b", folder), ("a", folder / "baseline")):
        target.mkdir(parents=True)
        shutil.copy(args.race / side / "train_prx.py", target)
        for seed in seeds:
            shutil.copytree(args.race / side / f"logs/seed{seed}", target / f"seed{seed}",
                            ignore=lambda folder, names: set(names) - set(FILES))
            if (scores := target / f"seed{seed}/scores.json").exists():  # what verify needs of it
                scores.write_text(json.dumps(dict(eval=dict(accuracy=read_json(scores)["eval"]["accuracy"]))))
    for path in [*folder.rglob("log.txt"), *folder.rglob("run.json")]:  # no path of this machine goes along
        text = path.read_text().replace(about["data"][0]["folder"], f"shards/{about['track']}")
        path.write_text(text.replace(sys.executable, "python"))
    a, b = ([outcome(args.race / side / f"logs/seed{seed}") for seed in seeds] for side in "ab")
    diff = subprocess.run(["git", "diff", "--no-index", "--shortstat", folder / "baseline/train_prx.py",
                           folder / "train_prx.py"], capture_output=True, text=True).stdout.strip()
    write_json(folder / "record.json", dict(
        format=1, track=about["track"], name=args.name, authors=args.author, diff=diff, machine=about["machine"],
        source_sha256=file_sha256(folder / "train_prx.py"), world_size=about["world_size"], data=DATA,
        baseline_sha256=file_sha256(folder / "baseline/train_prx.py"), parameters=about["parameters"], runs=b,
        baseline_runs=a))
    (folder / "README.md").write_text(
        f"# {args.name}\n\nBy {', '.join(args.author)}. `diff baseline/train_prx.py train_prx.py`: {diff or 'nothing'}."
        "\n\n## What changed, and why\n\n## What was expected, what was measured\n")
    print(f"wrote {folder}: fill in its README.md, then\n{command('records/record.py', 'verify', folder)}")


# ---- verify ----------------------------------------------------------------------------------------------------------

def verify(folder: Path) -> list[str]:
    """A sentence for everything that is wrong with a record; nothing of it is executed."""
    try:
        return check_files(folder) or check_record(folder)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return [f"{folder} holds a file that no race has written ({type(error).__name__}: {error})"]


def check_record(folder: Path) -> list[str]:
    problems, record = [], read_json(folder / "record.json")
    if record.get("format") != 1 or record.get("track") != "micro":
        return [f"{folder}/record.json is not of format 1 and of track micro, which this program verifies"]
    for key, side, hashed in (("runs", ".", "source_sha256"), ("baseline_runs", "baseline", "baseline_sha256")):
        side = folder / side
        problems += check_script(side, record[hashed])
        seeds = [run["seed"] for run in record[key]]
        if seeds != list(range(len(seeds))) or len(seeds) < SEEDS:
            problems.append(f"{side}: the seeds are {seeds}, not 0 to n - 1 with n of at least {SEEDS}")
        there = sorted(p.name for p in side.glob("seed*"))
        if there != sorted(f"seed{seed}" for seed in seeds):
            problems.append(f"{side}: there are runs {', '.join(there)}, and record.json speaks of {seeds}")
            continue
        for run in record[key]:
            problems += check_run(side / f"seed{run['seed']}", side, run)
    lengths = {read_json(p)["steps"] for p in folder.glob("seed*/run.json")}
    if len(lengths) != 1:
        problems.append(f"{folder}: the runs declare {sorted(lengths)} steps; a record has one length")
    if not problems and not (t := tests_of(record["baseline_runs"], record["runs"]))["passes"]:
        problems.append(f"{folder}: accuracy is not above {TARGET:.0%} at p < {LEVEL} (p = {t['p_accuracy']:.4f})")
    return problems


def check_files(folder: Path) -> list[str]:
    """Nothing missing, nothing that does not belong, nothing large, no links."""
    problems = [f"{folder / name} is missing" for name in ("record.json", "README.md", "train_prx.py",
                                                           "baseline/train_prx.py") if not (folder / name).is_file()]
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        inside = parts[1:] if parts[0] == "baseline" else parts
        known = path.name in TOP if len(inside) == 1 else path.name in FILES and inside[0].startswith("seed")
        if path.is_symlink() or path.is_file() and (not known or len(inside) > 2):
            problems.append(f"{path} does not belong into a record")
        elif path.is_file() and path.stat().st_size > LARGEST:
            problems.append(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST:,}")
    return problems


def check_script(side: Path, claimed: str) -> list[str]:
    path = side / "train_prx.py"
    if file_sha256(path) != claimed:
        return [f"{path} is not the script of record.json (its sha256 differs)"]
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, ValueError) as error:
        return [f"{path} is no Python ({error})"]
    problems = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        problems += [f"{path}, line {node.lineno}, imports {name} of the repository" for name in names
                     if name.split(".")[0] in LOCAL]
        text = str(node.value) if isinstance(node, ast.Constant) else ""
        if re.match(r"(~|\.\.)/|/(dev|etc|home|mnt|opt|proc|root|srv|sys|tmp|usr|var)/", text) and text not in SYSTEM:
            problems.append(f"{path}, line {node.lineno}, names {text}, which is not its data")
    if any(len(line) > 400 for line in path.read_text().splitlines()):
        problems.append(f"{path} has a line of more than 400 characters; nobody can read it")
    return problems


def check_run(run: Path, side: Path, claimed: dict) -> list[str]:
    """One seed: its log, its clock, its metrics, its pictures."""
    if missing := [name for name in FILES if not (run / name).is_file()]:
        return [f"{run} lacks {', '.join(missing)}"]
    about, log = read_json(run / "run.json"), (run / "log.txt").read_text()
    result, scores = read_json(run / "metrics.json"), read_json(run / "scores.json")
    records, problems = read_lines(run / "metrics.jsonl"), []

    def need(holds, sentence):
        if not holds:
            problems.append(f"{run}: {sentence}")

    source = log.split("--- source\n", 1)[-1].split("\n--- end of source", 1)[0]
    need(hashlib.sha256(source.encode()).hexdigest() == file_sha256(side / "train_prx.py") == about["source_sha256"],
         "the source in log.txt, the folder's script and run.json are not the same")
    need(about["seed"] == claimed["seed"], f"run.json has seed {about['seed']}")
    need(about["track"] == "micro" and [d["sha256"] for d in about["data"]] == [DATA],
         "it was trained on other data than the track's")
    said = log.rpartition("--- end of source")[2]
    need("compile cache: 0 files" in said or "compile cache" not in said, "the compile cache was not empty")
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
    need(about["finished"] and about["finished"]["elapsed"] == seconds, "its time differs in metrics.jsonl and run.json")
    need(outcome(run) == claimed, f"it came to {outcome(run)}, and record.json says {claimed}")

    protocol, found = result["protocol"], result["metrics"]["eval"]
    need(protocol.get("n") == PROMPTS and protocol.get("scenes") == scenes.MICRO.protocol,
         "it was judged by another protocol")
    need(protocol.get("script_sha256") == file_sha256(side / "train_prx.py"), "its pictures are another script's")
    accuracy = np.asarray(scores.get("eval", {}).get("accuracy", []), dtype=np.float64)
    need(len(accuracy) == PROMPTS, "scores.json does not hold the scores of all prompts")
    need(len(accuracy) and abs(accuracy.mean() - found["accuracy"]) < 1e-6,
         "its accuracy is not the same in scores.json and metrics.json")
    if len(accuracy) >= 32:
        seen = scenes.score(read_grid(run / "samples.png", 32), scenes.draw_scenes(
            range(32), "eval", scenes.MICRO))["accuracy"].numpy()
        need(np.abs(seen - accuracy[:32]).max() < 1e-5, "samples.png does not show what scores.json says of it")
    return problems


def read_grid(path: Path, side: int, columns: int = 8, count: int = 32) -> torch.Tensor:
    """The images of a grid that eval_prx.py wrote: uint8 (count, 3, side, side). ValueError for another picture."""
    sheet, gap, zoom = np.array(Image.open(path, formats=["PNG"]).convert("RGB")), 8, max(1, 192 // side)
    size, down = side * zoom, (len(sheet) - gap) // (count // columns)
    corners = [(gap + i // columns * down, gap + i % columns * (size + gap)) for i in range(count)]
    images = np.stack([sheet[y:y + size:zoom, x:x + size:zoom] for y, x in corners])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def rerun(folder: Path, seed: int, data: Path) -> str:
    """Repeats a seed with the record's own script in a scratch folder, without network, and writes rerun.json."""
    record, scratch = read_json(folder / "record.json"), (Path("work") / f"rerun-{folder.name}").resolve()
    print(f"executing {folder}/train_prx.py in {scratch}: read it first", flush=True)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shutil.copy(folder / "train_prx.py", scratch)
    flags = re.sub(r"--(track|data|seed|name) \S+", "", read_json(folder / f"seed{seed}/run.json")["command"])
    train_one(scratch, shlex.split(flags)[1:], record["track"], data.resolve(), seed)
    judge_one(scratch, seed)
    here, claimed = outcome(scratch / f"logs/seed{seed}"), record["runs"][seed]
    before, after = ([x for r in read_lines(path / f"seed{seed}/metrics.jsonl") for x in r.get("losses", [])]
                     for path in (folder, scratch / "logs"))
    # Other processors round otherwise and end elsewhere: as near as another seed may be
    near = abs(here["accuracy"] - claimed["accuracy"]) <= 3 * tests_of(record["runs"], record["runs"])["accuracy_sd"]
    agrees = "to the bit" if before == after else "within three deviations" if near else "not at all"
    machine = read_json(scratch / f"logs/seed{seed}/run.json")["machine"] if here["seconds"] else {}
    write_json(folder / "rerun.json", dict(format=1, date=str(datetime.date.today()), **here, agrees=agrees,
                                           source_sha256=record["source_sha256"], machine=machine))
    return (f"seed {seed}: {here['seconds']:.1f} s, {here['accuracy']:.2%} here; {claimed['seconds']:.1f} s, "
            f"{claimed['accuracy']:.2%} claimed; they agree {agrees}")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


# ---- the table -------------------------------------------------------------------------------------------------------

def table(records: Path) -> tuple[str, list[dict]]:
    """The leaderboard of micro under protocol 2, fastest first, and what is in it: records that verify, and of which
    somebody has repeated a seed."""
    rows = []
    for path in sorted(records.glob("micro/*/record.json")):
        if problems := verify(path.parent):
            raise UserError("\n".join(problems))
        record, again = read_json(path), path.with_name("rerun.json")
        rerun, tests = again.exists() and read_json(again), tests_of(record["baseline_runs"], record["runs"])
        if rerun and rerun["agrees"] != "not at all":
            rows.append(record | dict(folder=path.parent.name, rerun=rerun, tests=tests))
    rows.sort(key=lambda record: record["tests"]["seconds"])
    head = "record, by, time, prompt accuracy, worst, seeds, p, beside its baseline, repeated, hardware".split(", ")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        t, faster = r["tests"], f"not faster than {r['tests']['baseline_seconds']:.1f} s"
        if t["faster"]:
            faster = f"{t['time_ratio']:.3f} of {t['baseline_seconds']:.1f} s, p = {t['p_faster']:.2g}"
        lines.append(f"| [{r['folder']}](micro/{r['folder']}) | {', '.join(r['authors'])} | {t['seconds']:.1f} s | "
                     f"{t['accuracy']:.2%} ± {t['accuracy_sd']:.2%} | {t['worst']:.2%} | {t['n']} | "
                     f"{t['p_accuracy']:.2g} | {faster} | {r['rerun']['agrees']} | {r['machine']['cpus']} cores, "
                     f"{r['machine']['cpu']} |")
    picture = ["", "![Seconds to the target, by date](history.png)"]
    return "\n".join(lines + picture if rows else ["No record has been made under protocol 2."]), rows


def write_table(args):
    """The leaderboard into records/README.md, and history.png: time against date, a line for each kind of processor."""
    from matplotlib.figure import Figure

    page, (text, rows) = ROOT / "records/README.md", table(ROOT / "records")
    before, after = page.read_text().split(BOARD)[0], page.read_text().split("<!-- end -->")[1]
    page.write_text(f"{before}{BOARD}\n{text}\n<!-- end -->{after}")
    axes = (figure := Figure(figsize=(7, 3.5), layout="constrained")).subplots()
    axes.set(ylabel=f"seconds to {TARGET:.0%} prompt accuracy", title="micro, protocol 2")
    for cpu in sorted({r["machine"]["cpu"] for r in rows}):
        points = sorted((r["folder"][:10], r["tests"]["seconds"]) for r in rows if r["machine"]["cpu"] == cpu)
        axes.plot(*zip(*points), "o-", label=cpu)
        axes.legend()
    if rows:
        figure.savefig(page.with_name("history.png"), metadata=dict(Software=None))


# ---- command line ----------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("new", help="a working copy of the current script")
    begin.add_argument("name")
    begin.add_argument("--track", default="micro", choices=["micro", "mini"])
    begin.add_argument("--from", dest="start", type=Path, help="a record's folder [the checkout]")
    run = commands.add_parser("race", help="two scripts in turns")
    run.add_argument("a", help="the baseline: a script, or a script and its flags in quotes")
    run.add_argument("b", help="what is to be faster")
    run.add_argument("--seeds", type=int, default=SEEDS)
    run.add_argument("--track", default="micro", choices=["micro", "mini"])
    run.add_argument("--out", type=Path, default=Path("work/race"))
    packing = commands.add_parser("pack", help="a race as a record")
    packing.add_argument("race", type=Path)
    packing.add_argument("--name", required=True)
    packing.add_argument("--author", required=True, nargs="+")
    proof = commands.add_parser("verify", help="recompute everything that a record claims")
    proof.add_argument("folders", nargs="+", type=Path)
    proof.add_argument("--rerun", type=int, metavar="SEED", help="repeat this seed: executes the record's script")
    for part in (run, proof):
        part.add_argument("--data", type=Path, help="[shards/TRACK]")
    commands.add_parser("table", help="write the leaderboard and history.png")
    args = parser.parse_args(argv)
    try:
        if args.command == "verify":
            problems = [problem for folder in args.folders for problem in verify(folder)]
            print("\n".join(problems) or "what can be recomputed is as claimed; --rerun shows more")
            if not problems and args.rerun is not None:
                print("\n".join(rerun(folder, args.rerun, args.data or Path("shards/micro")) for folder in args.folders))
            return 2 if problems else 0
        dict(new=new, race=race, pack=pack, table=write_table)[args.command](args)
        return 0
    except UserError as error:
        print(f"record: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
