"""Every technique of the article, one switch at a time, on scenes: the table behind the README's.

    python records/ablate.py --track micro --seeds 3             # run what is missing, seed by seed, row by row
    python records/ablate.py --track micro --table               # the table and the plots from the logs alone

All rows see the same number of images from the same seeds (the baseline with one thing changed, in as many steps unless
the row's batch is another), a row after the other within a seed, so that a slow hour of the machine hits all alike.
Each run is judged on 500 held-out prompts by eval_prx.py. A run that is there is not made again: stop it at any time,
go on later. One JSON line per run goes to records/ablations/TRACK.jsonl; loss by noise level and what BF16 storage
loses to TRACK.curves.json.

Equal time: images/s of the rows are measured in turns in one process (--speed), because machines are noisy; with
--equal-time the rows that change throughput run once more for as many steps as the baseline's time allows.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "records/ablations"
sys.path.insert(0, str(ROOT))

# The baseline is PRX part 2's recipe with its rate tuned for scenes (records/micro_search.jsonl): AdamW 2e-3, constant,
# no EMA. Muon runs at the rates that the same search chose for it.
BASE = {"micro": "--recipe tuned-baseline --batch 64", "mini": "--recipe tuned-baseline"}
MUON = "--optimizer muon --lr 5e-3 --lr-adamw 3e-3 --ns classic --ns-steps 5 --momentum 0.95 --modulation muon"
CONSTANT = "--repa 0.5 --repa-until 1"
ROWS = {
    "baseline": "", "Muon": MUON, "REPA": CONSTANT, "REPA, first half": "--repa 0.5 --repa-until 0.5",
    "iREPA": CONSTANT + " --repa-kind irepa", "TREAD 50 %": "--tread 0.5",
    "TREAD 50 %, learned": "--tread 0.5 --tread-select learned", "SPRINT 75 %": "--sprint 0.75",
    "contrastive 0.05": "--contrastive 0.05", "v-prediction": "--predict v", "P-DINO 0.01": "--pdino 0.01",
    "short captions": "--captions short", "long/short mix 0.2": "--captions mix:0.2", "BF16 weights": "--weights bf16",
    "EMA 0.99": "--ema 0.99 --ema-every 4", "decay from 0.3": "--decay-from 0.3", "Muon and REPA": f"{MUON} {CONSTANT}",
    "first record's recipe": MUON + " --recipe default --batch 64 --repa 0 --ema 0.99 --ema-every 4 --decay-from 0.3",
    "default recipe": "--recipe default",
}
PUBLISHED = {  # FID of PRX part 2 at 256 px: baseline 18.20
    "baseline": "18.20", "Muon": "15.55", "REPA": "14.64", "iREPA": "hurts with DINOv3", "TREAD 50 %": "21.61",
    "SPRINT 75 %": "22.56", "contrastive 0.05": "20.03", "v-prediction": "18.20 (x: 16.80, in latents)",
    "short captions": "36.84", "BF16 weights": "21.87"}
STEPS = {"micro": 300, "mini": 1000}
METRICS = ("accuracy", "fid", "cmmd", "dino_mmd")


def flags_of(track: str, row: str) -> list[str]:
    own = ROWS[row].split()
    return own if "--recipe" in own else BASE[track].split() + own


def batch_of(track: str, row: str, extra: list[str]) -> int:
    from data.settings import parse_args
    return parse_args(["--track", track, "--steps", "1", *flags_of(track, row), *extra])[0].batch


def records(track: str) -> list[dict]:
    path = OUT / f"{track}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(track: str, row: str, seed: int, steps: int, name: str, *extra: str) -> Path:
    run = Path("logs") / name
    if not (run / "transformer/config.json").exists():
        subprocess.run([sys.executable, str(ROOT / "train_prx.py"), "--track", track, "--name", name, "--seed",
                        str(seed), "--steps", str(steps), "--samples", "0", *flags_of(track, row), *extra], check=True,
                       stdout=subprocess.DEVNULL)
    return run


def name_of(track, row, seed, steps):
    return f"ablate-{track}-{''.join(c if c.isalnum() else '-' for c in row)}-seed{seed}-{steps}"


def one(track: str, row: str, seed: int, steps: int, extra: list[str], kind: str) -> dict:
    run = train(track, row, seed, steps, name_of(track, row, seed, steps), *extra)
    subprocess.run([sys.executable, str(ROOT / "eval_prx.py"), str(run), "--n", "500"], check=True,
                   stdout=subprocess.DEVNULL)
    result = json.loads((run / "metrics.json").read_text())
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    beats = [r for r in logged if r.get("losses")]
    log = (run / "log.txt").read_text()
    machine = json.loads(log.split("machine: ", 1)[1].split("\n", 1)[0])
    config = json.loads((run / "config.json").read_text())
    shutil.rmtree(run / "checkpoint", ignore_errors=True)
    return {"row": row, "seed": seed, "kind": kind, "steps": steps, "samples": logged[-1]["samples"],
            "seconds": round(logged[-1]["elapsed"], 1), "flags": flags_of(track, row) + extra,
            **{key: round(result["metrics"]["eval"][key], 5) for key in METRICS},
            "unseen": round(result["metrics"]["unseen"]["accuracy"], 5),
            "loss": round(statistics.fmean(x for r in beats[-3:] for x in r["losses"] if x is not None), 5),
            "lost_updates": beats[-1].get("lost_updates"), "compute": config["compute"],
            "protocol": {k: result["protocol"][k] for k in ("n", "steps", "cfg_scale", "prompts_sha256")},
            "machine": {k: machine[k] for k in ("cpu", "cpus", "gpu", "torch", "source_sha256")}}


def curves(track: str):
    """Losses, losses by noise level and lost updates over the runs at hand, for the plots: means over seeds."""
    found = {}
    for record in records(track):
        run = Path("logs") / name_of(track, record["row"], record["seed"], record["steps"])
        if record["kind"] == "steps" and (run / "metrics.jsonl").exists():
            beats = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines() if '"losses"' in x]
            losses = [x for b in beats for x in b["losses"]]
            group = [sum(losses[i:i + 10]) / 10 for i in range(0, len(losses) // 10 * 10, 10)]
            found.setdefault(record["row"], []).append(dict(
                seed=record["seed"], loss=[round(x, 4) for x in group],
                by_time=[round(sum(b["loss_by_time"][k] for b in beats[-4:]) / len(beats[-4:]), 5) for k in range(10)],
                lost=[[b["step"], round(b["lost_updates"], 4)] for b in beats if b.get("lost_updates") is not None]))
    path = OUT / f"{track}.curves.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    for row, runs in found.items():  # what was kept of seeds whose logs are not at hand stays
        new = {run["seed"] for run in runs}
        kept[row] = sorted([*runs, *(r for r in kept.get(row, []) if r["seed"] not in new)], key=lambda r: r["seed"])
    path.write_text(json.dumps(kept) + "\n")


def speed(track: str, turns: int, rows: list[str], extra: list[str]):
    """Images/s of each row, in each turn: its compiled step on random data (records/bench.py), row after row in one
    process, and what all rows share: scenes and text encoder. Of some rows only, the ratio to the baseline is measured
    and noted as if it had been taken in the turns of before."""
    import bench
    from data import encoders
    from data.scenes import SceneData

    T, median = bench.T, statistics.median
    device, flags = T.setup_world().device, ["--track", track, "--steps", "1", "--compile", "on"]
    configs = {row: bench.parse_args([*flags, *flags_of(track, row), *extra])[0] for row in rows}
    configs |= {f"{row}, ended": dataclasses.replace(c, repa=0.0) for row, c in configs.items()
                if c.repa and c.repa_until < 1}  # what follows the burn-in
    c = configs["baseline"]
    teacher = encoders.Teacher("repa-teacher", c.repa_teacher, device)
    settings = {row: bench.Ours(config, device, *bench.shapes_of(config), teacher) for row, config in configs.items()}
    times, _ = bench.in_turns(settings, turns, 4)
    encoder, shared = encoders.TextEncoder(c.text, device, c.text_tokens, c.text_pad), {}
    for c in {c.batch: c for c in configs.values()}.values():
        batches = T.host_batches(SceneData(c), c, 0, 0, slice(0, c.batch))
        shared[c.batch] = []
        for _ in range(12):
            start = time.perf_counter()
            encoder.encode(next(batches)[2])
            shared[c.batch].append(time.perf_counter() - start)
    step = {row: [median(lap["step"] for lap in laps[i:i + 4]) + median(shared[configs[row].batch])
                  for i in range(0, len(laps), 4)] for row, laps in times.items()}
    for row in rows:
        if f"{row}, ended" in step:
            share = configs[row].repa_until
            step[row] = [share * a + (1 - share) * b for a, b in zip(step[row], step.pop(f"{row}, ended"))]
    rates = {row: [configs[row].batch / seconds for seconds in values] for row, values in step.items()}
    for row, values in rates.items():
        print(f"{row:24s} {median(values):7.0f} images/s, {median(values) / median(rates['baseline']):.2f}", flush=True)
    path = OUT / f"{track}.speed.json"
    if path.exists() and set(rows) != set(ROWS):
        before = json.loads(path.read_text())
        turns_in_pairs = lambda row: zip(rates[row], rates["baseline"], before["baseline"])
        rates = before | {row: [a / b * c for a, b, c in turns_in_pairs(row)] for row in rows if row != "baseline"}
    path.write_text(json.dumps(rates, indent=1) + "\n")


def table(track: str) -> str:
    """Markdown, from the logs alone."""
    kept = records(track)
    path = OUT / f"{track}.speed.json"
    rates = json.loads(path.read_text()) if path.exists() else {}
    cell = lambda xs, scale=1, digits=2: (f"{statistics.fmean(xs) * scale:.{digits}f}" + (
        f" ± {statistics.stdev(xs) * scale:.{digits}f}" if len(xs) > 1 else "")) if xs else "-"
    base = {r["seed"]: r["accuracy"] for r in kept if (r["row"], r["kind"]) == ("baseline", "steps")}
    lines = ["| row | published FID | n | accuracy % | points over the same seed's baseline | unseen % | FID | CMMD | "
             "DINO-MMD | images/s over the baseline's | accuracy % at equal time |", "|---" * 11 + "|"]
    for row in ROWS:
        mine = [r for r in kept if r["row"] == row and r["kind"] == "steps"]
        timed = [r["accuracy"] for r in kept if r["row"] == row and r["kind"] == "time"]
        ratio = [a / b for a, b in zip(rates.get(row, []), rates.get("baseline", []))]
        if mine:
            column = lambda key: [r[key] for r in mine]
            gains = [r["accuracy"] - base[r["seed"]] for r in mine if r["seed"] in base and row != "baseline"]
            lines.append(f"| {row} | {PUBLISHED.get(row, '-')} | {len(mine)} | {cell(column('accuracy'), 100)} | "
                         f"{cell(gains, 100)} | {cell(column('unseen'), 100)} | {cell(column('fid'))} | "
                         f"{cell(column('cmmd'), 1, 3)} | "
                         f"{cell(column('dino_mmd'), 1, 3)} | {cell(ratio)} | {cell(timed, 100)} |")
    return "\n".join(lines)


def plots(track: str):
    """BF16 storage: loss, accuracy and lost updates. Captions: loss by noise level."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    found = json.loads((OUT / f"{track}.curves.json").read_text())
    kept = [r for r in records(track) if r["kind"] == "steps"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for row, colour in (("baseline", "C0"), ("BF16 weights", "C3")):
        for i, run in enumerate(found.get(row, [])):
            axes[0].plot(np.arange(len(run["loss"])) * 10, run["loss"], colour, lw=0.8, label=row if i == 0 else None)
        values = [r["accuracy"] * 100 for r in kept if r["row"] == row]
        axes[1].scatter([row] * len(values), values, color=colour)
    for run in found.get("BF16 weights", []):
        axes[2].plot(*zip(*[(s, 100 * x) for s, x in run["lost"]]), "C3", lw=0.8)
    axes[0].set(yscale="log", xlabel="step", ylabel="loss", title="FP32 masters against BF16 storage")
    axes[0].legend()
    axes[1].set(ylabel="prompt accuracy, %", title="each seed")
    axes[2].set(xlabel="step", ylabel="% of a step's updates", title="rounded away to nothing by BF16", ylim=(0, 100))
    figure.tight_layout()
    figure.savefig(OUT / f"{track}-bf16.png", dpi=90)
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for row, colour in (("baseline", "C0"), ("short captions", "C1"), ("long/short mix 0.2", "C2")):
        runs = found.get(row, [])
        if runs:
            axis.plot((np.arange(10) + 0.5) / 10, np.mean([r["by_time"] for r in runs], 0), colour + "o-",
                      label={"baseline": "long captions"}.get(row, row))
    axis.set(yscale="log", xlabel="time t (1 is noise)", ylabel="loss in the last steps",
             title="What a caption settles: loss by noise level")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(OUT / f"{track}-captions.png", dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", default="micro", choices=list(STEPS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every row [300 on micro, 1000 on mini]")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--equal-time", action="store_true", help="rows that change throughput, for its time")
    parser.add_argument("--speed", type=int, metavar="TURNS", help="measure images/s of the rows, in turns")
    parser.add_argument("--table", action="store_true", help="print the table and draw the plots from the logs")
    parser.add_argument("--flags", default="", help="further flags of every run, such as '--compile off'")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    steps, extra = args.steps or STEPS[args.track], args.flags.split()
    if args.speed:
        speed(args.track, args.speed, ["baseline", *(r for r in args.rows if r != "baseline")], extra)
    if not args.table and not args.speed:
        for seed in range(args.seeds):
            for row in args.rows:
                kind, mine = "steps", round(
                    steps * batch_of(args.track, "baseline", extra) / batch_of(args.track, row, extra))
                if args.equal_time:
                    rates = json.loads((OUT / f"{args.track}.speed.json").read_text())
                    ratio = statistics.fmean(a / b for a, b in zip(rates[row], rates["baseline"]))
                    if abs(ratio - 1) < 0.03:
                        continue
                    kind, mine = "time", round(mine * ratio)
                if any((r["row"], r["seed"], r["kind"]) == (row, seed, kind) for r in records(args.track)):
                    continue
                record = one(args.track, row, seed, mine, extra, kind)
                with open(OUT / f"{args.track}.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"seed {seed}  {row:24s} {record['accuracy']:.2%}  FID {record['fid']:.2f}  loss "
                      f"{record['loss']:.4f}  {record['seconds']:.0f} s", flush=True)
                curves(args.track)
    if args.table or not args.speed:
        print(table(args.track))
        if (OUT / f"{args.track}.curves.json").exists():
            plots(args.track)


if __name__ == "__main__":
    main()
