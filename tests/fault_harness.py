"""Kills a run again and again and compares what comes out with an undisturbed one, bit for bit.

    python tests/fault_harness.py                       # 50 kills over 300 steps, one process: about fifteen minutes
    python tests/fault_harness.py --ranks 2 --kills 30  # under torchrun: also one rank only

Signals: SIGKILL to all processes at once, SIGTERM or SIGINT twice to all, or once to the first (torchrun's, where there
are ranks); with ranks also SIGKILL or SIGTERM to one rank. Moments: during start-up, between steps, while a checkpoint
is being written (they are written every second). After each kill the same command is given again, and when a run has
ended, the next one begins.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_prx as T  # noqa: E402
from data.scenes import write_track  # noqa: E402
from records.gpu_check import Training, processes, send  # noqa: E402

FLAGS = ("--track micro --hidden 64 --heads 2 --depth 3 --batch 16 --samples 0 --sample-steps 2 --compile off --compute "
         "fp32 --checkpoint-minutes 0.015 --captions mix:0.3 --repa-until 0.5").split()


def start(folder: Path, name: str, steps: int, ranks: int) -> Training:
    return Training(folder, name, ranks, *FLAGS, "--steps", steps)


def kill(run: Training, how: str, ranks: int, rng) -> bool:
    """Whether there was anybody to kill: a rank comes seconds after torchrun."""
    target, number = how.split()
    number, rank = getattr(signal, number), rng.randrange(ranks) if target == "rank" else None
    there = [run.process.pid] if target == "process" else processes(run.folder, rank)
    send(number, there)
    if target == "all":
        time.sleep(0.003)
        send(number, there)
    return bool(there)


def wait_for(moment: str, run: Training, rng) -> bool:
    """Until the moment has come; False if the run has ended before."""
    def logged():
        path = run.run / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    begin = logged()
    come = {"start-up": lambda: True, "training": lambda: logged() > begin,
            "checkpoint": lambda: list(run.run.glob("checkpoint/*.tmp/*"))}
    if run.until(come[moment], every=0.002) and moment != "checkpoint":
        time.sleep(rng.uniform(0.2, 6) if moment == "start-up" else rng.uniform(0, 3))
    return run.process.poll() is None


def harness(folder: Path, kills: int, steps: int, ranks: int, seed: int, data: Path | None = None) -> dict:
    rng, told, runs = random.Random(seed), [], []
    (folder / "shards").mkdir()
    if data:
        (folder / "shards/micro").symlink_to(data)
    else:
        write_track("micro", folder / "shards/micro", n=4096, eval_n=64, processes=1)
    whole = start(folder, "whole", steps, ranks).end(seconds=3600)
    assert whole["code"] == 0, whole["said"]
    ways = ["all SIGKILL", "process SIGTERM", "process SIGINT", "all SIGTERM", "all SIGINT"]
    ways += ["rank SIGKILL", "rank SIGTERM"] if ranks > 1 else []
    while not runs or len(told) < kills or (folder / "logs/killed").exists():
        training = start(folder, "killed", steps, ranks)
        moment, how = rng.choice(("start-up", "training", "checkpoint")), rng.choice(ways)
        if len(told) < kills and wait_for(moment, training, rng) and kill(training, how, ranks, rng):
            end = training.end()
            assert end["seconds"] < 300, end["said"]
            told.append((moment, how, end["code"]))
            print(f"kill {len(told)}: {told[-1]}", flush=True)
        else:
            end = training.end(seconds=3600)
            assert end["code"] == 0, end["said"]  # nobody has stopped this one
            runs.append(judge(folder))
            shutil.rmtree(training.run)  # the next kill is another run's
    sums = {key: sum(run[key] for run in runs) for key in ("steps_logged", "resumed")}
    both = {key: all(run[key] for run in runs) for key in ("identical", "clock_only_grows")}
    return dict(kills=len(told), runs=len(runs), steps=steps, ranks=ranks, **both, **sums, told=told)


def judge(folder: Path) -> dict:
    """What was killed beside what was not."""
    files = [folder / f"logs/{name}/transformer/diffusion_pytorch_model.safetensors" for name in ("whole", "killed")]
    a, b = map(load_file, files)
    records = T.read_metrics(folder / "logs/killed")
    clocks = [r["elapsed"] for r in records]
    return dict(identical=a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a),
                steps_logged=sum(len(r.get("losses", [])) for r in records),
                resumed=sum(r.get("event") == "resume" for r in records),
                clock_only_grows=all(x <= y + 1e-6 for x, y in zip(clocks, clocks[1:])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        told = harness(folder, args.kills, args.steps, args.ranks, args.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({k: v for k, v in told.items() if k != "told"}))
    if args.out:
        args.out.write_text(json.dumps(told) + "\n")
    sys.exit(0 if told["identical"] else 1)


if __name__ == "__main__":
    main()
