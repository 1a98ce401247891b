# Needs the tree of commit 58b37c5 (git worktree add ../then 58b37c5), where it lay in records/; kept as it ran.
"""Does the fast path learn what the plain one learns? BF16 with compiled blocks, and FP8, against eager FP32.

    python records/numerics.py       # 300 micro steps x 3 seeds x 3 precisions -> records/bench/numerics.{json,png}

The same seed sees the same images, noise and times, so the losses can be subtracted step by step. They are averaged
over 25 steps first. "Seeds' spread" is the deviation of the FP32 losses over the seeds: what precision changes must be
less.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "records/bench/numerics"
WINDOW = 25
PRECISIONS = {"FP32, eager": "--compute fp32 --compile off", "BF16, compiled": "--compute bf16 --compile on",
              "FP8, eager": "--compute bf16 --fp8 --compile off"}


def losses(precision: str, seed: int, steps: int) -> tuple[np.ndarray, float]:
    """Losses of all steps, and the prompt accuracy on 500 held-out prompts."""
    name = f"numerics-{precision.split(',')[0]}-seed{seed}"
    run = Path("logs") / name
    subprocess.run([sys.executable, str(ROOT / "train_prx.py"), "--track", "micro", "--name", name, "--seed", str(seed),
                    "--steps", str(steps), "--samples", "0", *PRECISIONS[precision].split()], check=True,
                   stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, str(ROOT / "eval_prx.py"), str(run), "--n", "500"], check=True,
                   stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    accuracy = json.loads((run / "metrics.json").read_text())["metrics"]["eval"]["accuracy"]
    return np.array([x for record in records for x in record.get("losses", [])]), accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    found = {p: [] for p in PRECISIONS}
    for seed in range(args.seeds):  # rows in turns within a seed
        for precision in PRECISIONS:
            found[precision].append(losses(precision, seed, args.steps))
            print(f"seed {seed}  {precision:16s} last {WINDOW} losses {found[precision][-1][0][-WINDOW:].mean():.4f}  "
                  f"accuracy {found[precision][-1][1]:.2%}", flush=True)
    curves = {p: np.array([run[0].reshape(-1, WINDOW).mean(1) for run in runs]) for p, runs in found.items()}
    plain = curves["FP32, eager"]
    spread = plain.std(0, ddof=1) if args.seeds > 1 else np.full(plain.shape[1], np.nan)
    result = dict(window=WINDOW, seeds=args.seeds, steps=args.steps, seeds_spread=spread.tolist(), precisions={
        p: dict(losses=curve.tolist(), accuracy=[run[1] for run in found[p]],
                mean_difference=(curve - plain).mean(0).tolist(),
                largest_share_of_spread=float(np.abs((curve - plain).mean(0) / spread).max()),
                mean_relative_difference=float(np.abs(curve / plain - 1).mean())) for p, curve in curves.items()})
    for p, row in result["precisions"].items():
        print(f"{p:16s} mean |difference| of the loss {row['mean_relative_difference']:.2%}, mean over seeds at most "
              f"{row['largest_share_of_spread']:.2f} of the seeds' spread, accuracy {np.mean(row['accuracy']):.2%}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(6.5, 4))
    for colour, (p, curve) in zip(("k", "C0", "C1"), curves.items()):
        for i, run in enumerate(curve):
            axis.plot((np.arange(len(run)) + 0.5) * WINDOW, run, colour, lw=1, alpha=0.8, label=p if i == 0 else None)
    axis.set(yscale="log", xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", title="One line per seed")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(OUT.with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main()
