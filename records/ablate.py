"""Every technique of the article, one switch at a time: runs the script as processes, with flags.

    python records/ablate.py --track micro --seeds 3             # run what is missing, seed by seed, row by row
    python records/ablate.py --track micro --table               # the table and the plots from the log alone
    python records/ablate.py --track openmoji --rows baseline Muon REPA  # micro's recipes on real pictures and words
    python records/ablate.py --show "Muon"                       # the command of a row, to repeat it by hand

All rows see the same number of images from the same seeds: the baseline with one thing changed, in as many steps unless
the row's batch is another. Rows follow each other within a seed, so that a slow hour of the machine hits all alike.
Each run is judged on 500 held-out prompts by eval_prx.py, on emoji by records/retrieval.py with the kind of prompts
that it was trained on. A run that is there is not made again: stop at any time, go on later. One JSON line per run goes
to records/ablations/TRACK.jsonl; --out takes another folder, such as records/notes/ablations, where the published ones
are. Runs need shards/TRACK (data/scenes.py, data/openmoji.py) and write to logs/. Results: records/notes/ablations.md.

--equal-time runs the rows that change throughput once more, for as many steps as the baseline's time allows, by the
images/s of the runs at equal steps.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.shards import command  # noqa: E402

SCRIPT = ROOT / "train_prx.py"

# PRX part 2's recipe: AdamW 1e-4, constant, no EMA. Tuned: its rate by a search on scenes (records/notes/search)
BASELINE = ("--optimizer adamw --lr 1e-4 --eps 1e-15 --weight-decay 0 --warmup 0.01 --decay-from 1 --clip 0.2 --ema 0 "
            "--repa 0 --tread 0")
TUNED_BASELINE = BASELINE.replace("--lr 1e-4", "--lr 2e-3")
RECIPES = {
    "micro": {"default": "", "baseline": f"{BASELINE} --batch 64", "tuned-baseline": f"{TUNED_BASELINE} --batch 64"},
    "mini": {"default": "", "baseline": BASELINE, "tuned-baseline": TUNED_BASELINE}}
RECIPES["openmoji"] = RECIPES["micro"]

MUON = "--optimizer muon --lr 5e-3 --lr-adamw 3e-3 --ns-steps 5 --momentum 0.95 --modulation muon"
REPA = "--repa 0.5 --repa-until 1"
ROWS = {  # flags after the tuned baseline's; the last that is given counts
    "baseline": "",
    "Muon": MUON,
    "REPA": REPA,
    "REPA, first half": "--repa 0.5 --repa-until 0.5",
    "iREPA": f"{REPA} --repa-kind irepa",
    "TREAD 50 %": "--tread 0.5",
    "TREAD 50 %, learned": "--tread 0.5 --tread-select learned",
    "SPRINT 75 %": "--sprint 0.75",
    "contrastive 0.05": "--contrastive 0.05",
    "v-prediction": "--predict v",
    "P-DINO 0.01": "--pdino 0.01",
    "short captions": "--captions short",
    "long/short mix 0.2": "--captions mix:0.2",
    "BF16 weights": "--weights bf16",
    "EMA 0.99": "--ema 0.99",
    "decay from 0.3": "--decay-from 0.3",
    "Muon and REPA": f"{MUON} {REPA}",
    "first record's recipe": f"{MUON} --eps 1e-8 --clip 1 --warmup 0.04 --ema 0.99 --decay-from 0.3"}
ALONE = {"default recipe": "default", "published baseline": "baseline"}  # rows that are a recipe
PUBLISHED = {  # FID of PRX part 2 at 256 px: baseline 18.20
    "baseline": "18.20", "Muon": "15.55", "REPA": "14.64", "iREPA": "hurts with DINOv3", "TREAD 50 %": "21.61",
    "SPRINT 75 %": "22.56", "contrastive 0.05": "20.03", "v-prediction": "18.20 (x: 16.80, in latents)",
    "short captions": "36.84", "BF16 weights": "21.87"}
STEPS = {"micro": 300, "mini": 1000, "openmoji": 600}  # of the baseline
# A column's head, scale and digits. The first is the score
SCENES = {"accuracy": ("accuracy %", 100, 2), "unseen": ("unseen %", 100, 2), "fid": ("FID", 1, 2),
          "cmmd": ("CMMD", 1, 3), "dino_mmd": ("DINO-MMD", 1, 3)}
EMOJI = {"retrieval": ("prompted picture is nearest %", 100, 2), "alone": ("of those without a sibling %", 100, 2)}
MEASURES = {"micro": SCENES, "mini": SCENES, "openmoji": EMOJI}


def flags_of(track: str, row: str) -> list[str]:
    if row in ALONE:
        return RECIPES[track][ALONE[row]].split()
    return f"{RECIPES[track]['tuned-baseline']} {ROWS[row]}".split()


def arguments(track: str, row: str, seed: int, steps: int, extra: list[str]) -> list[str]:
    """What runs a row, but for the interpreter and the script."""
    name = f"ablate-{track}-{''.join(c if c.isalnum() else '-' for c in row)}-seed{seed}-{steps}"
    data = ["--track", "micro", "--data", "shards/openmoji"] if track == "openmoji" else ["--track", track]
    return [*data, *flags_of(track, row), "--name", name, "--seed", str(seed), "--steps", str(steps), "--samples", "0",
            *extra]


def batch_of(track: str, row: str, extra: list[str]) -> int:
    """As the script itself understands the flags."""
    sys.path.insert(0, str(ROOT))
    from train_prx import parse_args

    config, stages = parse_args(arguments(track, row, 0, 1, extra))
    return stages[0].config(config).batch


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def heartbeats(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.strip()]
    return [r for r in records if r.get("losses")]


def run_one(track: str, row: str, seed: int, steps: int, kind: str, extra: list[str]) -> dict:
    """Train and judge one run, where it is not there yet; what the log keeps of it."""
    flags = arguments(track, row, seed, steps, extra)
    run = Path("logs") / flags[flags.index("--name") + 1]
    quiet = dict(check=True, stdout=subprocess.DEVNULL)
    if not (run / "transformer/config.json").exists():
        subprocess.run([sys.executable, str(SCRIPT), *flags], **quiet)
    facts = json.loads((run / "run.json").read_text())
    measured, protocol = (judge_emoji if track == "openmoji" else judge_scenes)(run, facts, quiet)
    shutil.rmtree(run / "checkpoint", ignore_errors=True)
    beats = heartbeats(run)
    losses = [x for beat in beats for x in beat["losses"] if x is not None]
    last = beats[-4:]
    return dict(
        row=row, seed=seed, kind=kind, steps=steps, samples=facts["finished"]["samples"],
        seconds=round(facts["finished"]["elapsed"], 1), flags=flags_of(track, row) + extra,
        images_per_s=round(statistics.median(beat["images_per_s"] for beat in beats), 1),
        **{key: round(measured[key], 5) for key in MEASURES[track]},
        loss=[round(statistics.fmean(losses[i:i + 10]), 4) for i in range(0, len(losses), 10)],
        loss_by_time=[round(statistics.fmean(column), 5) for column in zip(*(beat["loss_by_time"] for beat in last))],
        data=[d | dict(folder=Path(d["folder"]).name) for d in facts["data"]], protocol_sha256=protocol,
        source_sha256=facts["source_sha256"], machine=facts["machine"])


def judge_scenes(run: Path, facts: dict, quiet: dict) -> tuple[dict, str]:
    """What eval_prx.py measures, and its protocol."""
    if not (run / "metrics.json").exists():
        subprocess.run([sys.executable, str(ROOT / "eval_prx.py"), str(run), "--n", "500"], **quiet)
    judged = json.loads((run / "metrics.json").read_text())
    return judged["metrics"]["eval"] | dict(unseen=judged["metrics"]["unseen"]["accuracy"]), judged["protocol_sha256"]


def judge_emoji(run: Path, facts: dict, quiet: dict) -> tuple[dict, str]:
    """What records/retrieval.py measures, and its protocol."""
    if not (run / "retrieval.json").exists():
        captions = "short" if facts["captions"] == "short" else "long"
        subprocess.run([sys.executable, str(ROOT / "records/retrieval.py"), str(run), "--captions", captions], **quiet)
    judged = json.loads((run / "retrieval.json").read_text())
    shares = {name.strip(): row["share"] for name, row in judged["rows"].items()}
    protocol = hashlib.sha256(json.dumps(judged["protocol"], sort_keys=True).encode()).hexdigest()
    return dict(retrieval=shares["painted"], alone=shares["without"]), protocol


def speed_ratio(path: Path, row: str) -> float | None:
    """Images/s over the baseline's, the median over the seeds that both have at equal steps."""
    rates = {(r["row"], r["seed"]): r["images_per_s"] for r in read_log(path) if r["kind"] == "steps"}
    ratios = [rate / rates["baseline", seed] for (name, seed), rate in rates.items()
              if name == row and ("baseline", seed) in rates]
    return statistics.median(ratios) if ratios else None


def table(path: Path) -> str:
    """Markdown, from the log alone."""
    track, records = path.stem, read_log(path)

    def cell(values, scale=1.0, digits=2):
        if not values:
            return "-"
        mean = f"{statistics.fmean(values) * scale:.{digits}f}"
        return mean + (f" ± {statistics.stdev(values) * scale:.{digits}f}" if len(values) > 1 else "")

    score, *others = measures = MEASURES[track]
    base = {r["seed"]: r[score] for r in records if r["row"] == "baseline" and r["kind"] == "steps"}
    names = [name for name, _, _ in measures.values()]
    head = ["row", "published FID", "n", names[0], "points over the same seed's baseline", *names[1:],
            "images/s over the baseline's", f"{names[0]} at equal time"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in [*ROWS, *ALONE]:
        mine = [r for r in records if r["row"] == row and r["kind"] == "steps"]
        timed = [r[score] for r in records if r["row"] == row and r["kind"] == "time"]
        if not mine:
            continue
        column = lambda key: cell([r[key] for r in mine], *measures[key][1:])
        gains = [r[score] - base[r["seed"]] for r in mine if r["seed"] in base and row != "baseline"]
        ratio = speed_ratio(path, row)
        cells = [row, PUBLISHED.get(row, "-"), str(len(mine)), column(score), cell(gains, 100), *map(column, others),
                 f"{ratio:.2f}" if ratio else "-", cell(timed, 100)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plots(path: Path):
    """BF16 storage: loss and score. Captions: loss by noise level. They lie beside the log."""
    track = path.stem
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    score = next(iter(MEASURES[track]))
    runs = {row: [r for r in read_log(path) if r["row"] == row and r["kind"] == "steps"] for row in ROWS}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    for row, colour in (("baseline", "C0"), ("BF16 weights", "C3")):
        for i, run in enumerate(runs[row]):
            left.plot([10 * k for k in range(len(run["loss"]))], run["loss"], colour, lw=0.8, label=None if i else row)
        right.scatter([row] * len(runs[row]), [100 * run[score] for run in runs[row]], color=colour)
    left.set(yscale="log", xlabel="step", ylabel="loss", title="FP32 masters against BF16 storage")
    left.legend()
    right.set(ylabel=MEASURES[track][score][0], title="each seed")
    figure.tight_layout()
    figure.savefig(path.with_name(f"{track}-bf16.png"), dpi=90)
    figure, axis = plt.subplots(figsize=(6.5, 4))
    tenths = [(k + 0.5) / 10 for k in range(10)]
    for row in ("baseline", "short captions", "long/short mix 0.2"):
        if runs[row]:
            means = [statistics.fmean(column) for column in zip(*(run["loss_by_time"] for run in runs[row]))]
            axis.plot(tenths, means, "o-", label="long captions" if row == "baseline" else row)
    axis.set(yscale="log", xlabel="time t (1 is noise)", ylabel="loss in the last steps",
             title="What a caption settles: loss by noise level")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path.with_name(f"{track}-captions.png"), dpi=90)


def main(argv: list[str] | None = None):
    rows = [*ROWS, *ALONE]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", default="micro", choices=list(STEPS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the baseline [300 on micro, 1000 on mini, 600 on openmoji]")
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, metavar="ROW")
    parser.add_argument("--equal-time", action="store_true", help="rows that change images/s, for the baseline's time")
    parser.add_argument("--table", action="store_true", help="only the table and the plots, from the log")
    parser.add_argument("--out", type=Path, default=ROOT / "records/ablations", help="where TRACK.jsonl lies")
    parser.add_argument("--show", choices=rows, metavar="ROW", help="print a row's command and stop")
    parser.add_argument("--flags", default="", help="further flags of every run, such as '--compile off'")
    args = parser.parse_args(argv)
    track, steps, extra = args.track, args.steps or STEPS[args.track], args.flags.split()
    if args.show:
        print(command("train_prx.py", *arguments(track, args.show, 0, steps, extra)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{track}.jsonl"
    base_batch = batch_of(track, "baseline", extra)
    for seed in range(0 if args.table else args.seeds):
        for row in args.rows:
            kind, mine = "steps", round(steps * base_batch / batch_of(track, row, extra))
            if args.equal_time:
                ratio = speed_ratio(path, row)
                if ratio is None or abs(ratio - 1) < 0.03:
                    print(f"{row}: not at equal time (images/s over the baseline's: {ratio})")
                    continue
                kind, mine = "time", round(mine * ratio)
            if any((r["row"], r["seed"], r["kind"]) == (row, seed, kind) for r in read_log(path)):
                continue
            record = run_one(track, row, seed, mine, kind, extra)
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
            measured = ", ".join(f"{name} {record[key] * scale:.{digits}f}" for key, (name, scale, digits)
                                 in MEASURES[track].items())
            print(f"seed {seed}  {row:24s} {measured}  {record['seconds']:.0f} s", flush=True)
    if read_log(path):
        print(table(path))
        plots(path)


if __name__ == "__main__":
    main()
