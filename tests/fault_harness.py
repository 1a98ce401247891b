"""Kills a run again and again and compares what comes out with an undisturbed one, bit for bit.

    python tests/fault_harness.py                       # 50 kills over 300 steps, one process: about fifteen minutes
    python tests/fault_harness.py --ranks 2 --kills 20  # under torchrun: also one rank only

Signals: SIGKILL, SIGTERM or SIGINT, and with ranks SIGKILL of one rank only. Moments: during start-up, between steps,
while a checkpoint is being written (they are written every second). After each kill the same command is given again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("--track micro --hidden 64 --heads 2 --depth 3 --batch 16 --samples 0 --sample-steps 2 --compile off --compute "
         "fp32 --checkpoint-minutes 0.015 --captions mix:0.3").split()


def start(folder: Path, name: str, steps: int, ranks: int) -> subprocess.Popen:
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  f"--nproc_per_node={ranks}"]
    return subprocess.Popen([*launch, str(ROOT / "train_prx.py"), *FLAGS, "--steps", str(steps), "--name", name], cwd=folder,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(moment: str, process, run: Path, rng) -> bool:
    """Until the moment has come; False if the run has ended before."""
    def steps():
        path = run / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    begin = steps()
    while process.poll() is None:
        if moment == "start-up":
            time.sleep(rng.uniform(0.2, 6))
            return process.poll() is None
        if moment == "checkpoint" and list(run.glob("checkpoint/*.tmp/*")):
            return True
        if moment == "training" and steps() > begin:
            time.sleep(rng.uniform(0, 3))
            return process.poll() is None
        time.sleep(0.002)
    return False


def harness(folder: Path, kills: int, steps: int, ranks: int, seed: int) -> dict:
    rng, told = random.Random(seed), []
    start(folder, "whole", steps, ranks).wait()
    run = folder / "logs/killed"
    while True:
        process = start(folder, "killed", steps, ranks)
        moment = rng.choice(("start-up", "training", "checkpoint")) if len(told) < kills else "never"
        if moment == "never" or not wait_for(moment, process, run, rng):
            code = process.wait()
            if code == 0 and len(told) >= kills:
                break
            if code == 0:  # finished before it could be killed: start it again from its last checkpoint
                shutil.rmtree(run / "transformer")
                last = sorted((run / "checkpoint").glob("step-????????"))
                if len(last) > 1:
                    shutil.rmtree(last[-1])
            continue
        how = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, "one rank" if ranks > 1 else signal.SIGKILL))
        if how == "one rank":
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            if children:
                os.kill(int(rng.choice(children)), signal.SIGKILL)
        elif how == signal.SIGKILL:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, how)
        process.wait()
        told.append((moment, how if isinstance(how, str) else how.name, process.returncode))
        print(f"kill {len(told)}: {told[-1]}", flush=True)
    files = [folder / f"logs/{name}/transformer/diffusion_pytorch_model.safetensors" for name in ("whole", "killed")]
    a, b = map(load_file, files)
    records = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines() if x.startswith("{") and x.endswith("}")]
    logged = sum(len(r.get("losses", [])) for r in records)
    clocks = [r["elapsed"] for r in records if "elapsed" in r]
    return dict(kills=len(told), identical=a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), steps=steps,
                ranks=ranks, steps_logged=logged, resumed=sum(r.get("event") == "resume" for r in records),
                clock_only_grows=all(x <= y + 1e-6 for x, y in zip(clocks, clocks[1:])), told=told)


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
