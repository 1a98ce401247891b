"""Kills a run again and again and compares what comes out with an undisturbed one, bit for bit.

    python tests/fault_harness.py                       # 50 kills over 300 steps, one process: about fifteen minutes
    python tests/fault_harness.py --ranks 2 --kills 20  # under torchrun: also one rank only

Signals: SIGKILL of all, or SIGTERM or SIGINT to the process, or twice to its whole group; with ranks also to one rank,
SIGKILL included. Moments: during start-up, between steps, while a checkpoint is being written (they are written every
second). After each kill the same command is given again.
"""

import argparse
import contextlib
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
sys.path.insert(0, str(ROOT))

from data.scenes import write_track  # noqa: E402

FLAGS = ("--track micro --hidden 64 --heads 2 --depth 3 --batch 16 --samples 0 --sample-steps 2 --compile off --compute "
         "fp32 --checkpoint-minutes 0.015 --captions mix:0.3 --repa-until 0.5").split()


def start(folder: Path, name: str, steps: int, ranks: int) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", "--shutdown-timeout=300", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launch if ranks > 1 else []), ROOT / "train_prx.py", *FLAGS, "--steps", steps, "--name", name]
    return subprocess.Popen([str(x) for x in command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def gone(process):
    """Wait for all of its group: a rank may outlive torchrun for a moment, and holds the folder's lock."""
    def alive():
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = path.read_text().rsplit(")", 1)[1].split()[:3]
                if int(group) == process.pid and state != "Z":
                    return True
        return False

    process.wait()
    while alive():
        time.sleep(0.02)


def kill(process, how: str, rng):
    target, number = how.split()
    number = getattr(signal, number)
    if target == "rank":
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if children:
            os.kill(int(rng.choice(children)), number)
    elif target == "group":
        for _ in range(2):
            os.killpg(process.pid, number)
            time.sleep(0.003)
    else:
        os.kill(process.pid, number)


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


def harness(folder: Path, kills: int, steps: int, ranks: int, seed: int, data: Path | None = None) -> dict:
    rng, told = random.Random(seed), []
    (folder / "shards").mkdir()
    if data:
        (folder / "shards/micro").symlink_to(data)
    else:
        write_track("micro", folder / "shards/micro", n=4096, eval_n=64, processes=1)
    start(folder, "whole", steps, ranks).wait()
    run = folder / "logs/killed"
    ways = ["group SIGKILL", "process SIGTERM", "process SIGINT", "group SIGTERM", "group SIGINT"]
    ways += ["rank SIGKILL", "rank SIGTERM"] if ranks > 1 else []
    while True:
        process = start(folder, "killed", steps, ranks)
        moment = rng.choice(("start-up", "training", "checkpoint")) if len(told) < kills else "never"
        if moment == "never" or not wait_for(moment, process, run, rng):
            gone(process)
            if process.returncode == 0 and len(told) >= kills:
                break
            if process.returncode == 0:  # finished before it could be killed: start it again from its last checkpoint
                shutil.rmtree(run / "transformer")
                (run / "run.json").unlink()
                last = sorted((run / "checkpoint").glob("step-????????"))
                if len(last) > 1:
                    shutil.rmtree(last[-1])
            continue
        how = rng.choice(ways)
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            kill(process, how, rng)
        gone(process)
        told.append((moment, how, process.returncode))
        print(f"kill {len(told)}: {told[-1]}", flush=True)
    files = [folder / f"logs/{name}/transformer/diffusion_pytorch_model.safetensors" for name in ("whole", "killed")]
    a, b = map(load_file, files)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(x) for x in lines if x.startswith("{") and x.endswith("}")]
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
