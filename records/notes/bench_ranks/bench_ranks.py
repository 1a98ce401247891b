# Needs the tree of commit 58b37c5 (git worktree add ../then 58b37c5), where it lay in records/; kept as it ran.
"""What do ranks cost? Bytes on the wire, memory and checkpoint stall, per rank: measured here, computed for 8 GPUs.

    python records/bench_ranks.py --ranks 1 2 4 8 --out records/bench/ranks.json      # gloo processes on this machine
    python records/bench_ranks.py --ranks 2 --track mini
    unshare -n sh -c 'ip link set lo up; tc qdisc add dev lo root tbf rate 1gbit burst 256kb latency 1s;
        python records/bench_ranks.py --ranks 2 --out overlap.json'          # over a slower link, as root

Every world size takes the same global batch of random data through the trainer's step. Bytes on the wire are those of
the network interface that gloo uses (lo), over the steps and ranks, headers included; beside them stands what ring
algorithms send. Memory is that of the optimizer's tensors (masters, state, EMA, gradients), and what it would be if
every rank held all of it. The stall is how long Checkpoints.save keeps the loop waiting, the thread that writes apart.
"Overlapped" is a step whose weights come in while REPA's teacher runs, as in training; "waiting" the same step, which
waits for them first; both in turns.

The row for 8 GPUs is computed from PRX-1.2B's shapes: gradients in FP32, matrices come back in BF16; the seconds are at
the --link and --pcie rates, with nothing overlapped.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_prx as T  # noqa: E402
from data import encoders  # noqa: E402
from data.settings import parse_args  # noqa: E402
from records import bench  # noqa: E402


def sent_bytes() -> int:
    """What this process's network namespace has sent over lo so far."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def memory(optimizer) -> int:
    """Bytes of the optimizer's own tensors."""
    kept = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in vars(optimizer).values()
            if isinstance(v, torch.Tensor)}
    return sum(kept.values())


def one_rank(argv: list[str], steps: int, folder: Path):
    """Under torchrun, or alone: rank 0 prints a JSON line."""
    world = T.setup_world()
    c = dataclasses.replace(parse_args(["--steps", "1", *argv])[0], **bench.OFF)
    share = dataclasses.replace(c, batch=c.batch // world.size)
    channels, factor, width = bench.shapes_of(c)
    model = T.PRX(in_channels=channels, patch_size=c.patch, hidden_size=c.hidden, mlp_ratio=c.mlp_ratio,
                  context_in_dim=width, num_heads=c.heads, depth=c.depth,
                  bottleneck_size=c.bottleneck or None).initialize(0)
    optimizer = T.MuonAdamW(model.named_parameters(), c, world)
    bf16 = bench.uses_bf16(c, world.device)
    model.set_compute_dtype(torch.bfloat16 if bf16 else torch.float32)
    b = bench.Batch(share, world.device, channels, factor, width)
    log = lambda line: None
    checkpoints = T.Checkpoints(folder, world, log)

    def step(wait=True, teacher=None):
        start = time.perf_counter()
        if teacher:
            with torch.no_grad():
                teacher(b.x_0, *[int(b.tokens ** 0.5)] * 2)
        optimizer.arrive()
        T.flow_matching_loss(model, b.x_0, b.eps, b.t, b.text, b.mask, c.predict)[0].mean().backward()
        optimizer.accumulate()
        optimizer.step(wait=wait)
        return time.perf_counter() - start

    turns = {True: [], False: []}
    if world.size > 1 and c.vae == "none":
        teacher = encoders.Teacher("repa-teacher", c.repa_teacher, world.device)
        for turn in range(6):
            for wait, laps in turns.items():
                new = [step(wait, teacher) for _ in range(steps)]
                laps += new[1:] if turn else []
        optimizer.arrive()
    for _ in range(3):
        step()
    world.barrier()
    before, seconds = sent_bytes(), [step() for _ in range(steps)]
    world.barrier()
    sent, stalls = (sent_bytes() - before) / steps / world.size, []
    for number in range(5):
        checkpoints.wait()
        world.barrier()
        start = time.perf_counter()
        checkpoints.save({"": optimizer}, dict(step=number + 1), 0.0)
        stalls.append(time.perf_counter() - start)
    checkpoints.wait()
    if world.rank == 0:
        lone = T.MuonAdamW(T.PRX(**model.config).named_parameters(), c)
        print(json.dumps(dict(
            ranks=world.size, step_ms=statistics.median(seconds) * 1e3, wire_bytes=sent,
            waiting_ms=[x * 1e3 for x in statistics.quantiles(turns[True])] if turns[True] else None,
            overlapped_ms=[x * 1e3 for x in statistics.quantiles(turns[False])] if turns[False] else None,
            ring_bytes=bench.ring_bytes(optimizer, world.size, 2 if bf16 else 4), memory_bytes=memory(optimizer),
            unsharded_bytes=memory(lone), stall_ms=statistics.median(stalls[1:]) * 1e3)))


def computed(ranks: int, link: float, pcie: float) -> dict:
    """The 24h track's model over `ranks` GPUs, from its shapes."""
    c = T.TRACKS["24h"][0]
    with torch.device("meta"):
        model = T.PRX(in_channels=16, patch_size=2, hidden_size=c.hidden, mlp_ratio=c.mlp_ratio, context_in_dim=2304,
                      num_heads=c.heads, depth=c.depth)
    optimizer = T.MuonAdamW.__new__(T.MuonAdamW)
    optimizer.publish = lambda **_: None
    optimizer.__init__(model.named_parameters(), c, T.World(0, ranks, torch.device("meta")))
    parameters = sum(p.numel() for p in model.parameters())
    state = 4 * (2 * optimizer.size + optimizer.split + 2 * (optimizer.size - optimizer.split))  # masters, EMA, state
    sent = bench.ring_bytes(optimizer, ranks, 2)
    whole = parameters * 4 * 2 + 4 * sum(p.numel() * (1 if optimizer.is_muon[n] else 2)
                                         for n, p in optimizer.params.items())
    return dict(ranks=ranks, parameters=parameters, ring_bytes=sent, wire_s=sum(sent.values()) / link,
                memory_bytes=state + 4 * ranks * optimizer.size, unsharded_bytes=whole + 4 * parameters,
                stall_s=state / pcie, link_bytes_per_s=link, pcie_bytes_per_s=pcie)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Further flags are those of train_prx.py.", allow_abbrev=False)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps-of-each", type=int, default=20)
    parser.add_argument("--link", type=float, default=300e9, help="bytes/s a GPU sends to the others [%(default).0e]")
    parser.add_argument("--pcie", type=float, default=25e9, help="bytes/s from a GPU to pinned memory [%(default).0e]")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # this is one of the ranks
    args, flags = parser.parse_known_args()
    flags = flags or ["--track", "micro"]
    if args.folder:
        one_rank(flags, args.steps_of_each, args.folder)
        return
    rows = []
    for ranks in args.ranks:
        launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                      f"--nproc_per_node={ranks}"]
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([*launch, __file__, "--folder", folder, "--steps-of-each", str(args.steps_of_each),
                                   *flags], stdout=subprocess.PIPE, text=True, check=True,
                                  env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
        rows.append(json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1]))
    gpus = computed(8, args.link, args.pcie)
    print("| ranks | sent per rank and step, measured | by the ring's formula | optimizer's memory per rank | without "
          "sharding | checkpoint stall | of a step |\n" + "|---" * 7 + "|")
    mb = lambda x: f"{x / 1e6:.1f} MB"
    for r in rows:
        print(f"| {r['ranks']} | {mb(r['wire_bytes'])} | {mb(sum(r['ring_bytes'].values()))} | "
              f"{mb(r['memory_bytes'])} | {mb(r['unsharded_bytes'])} | {r['stall_ms']:.1f} ms | "
              f"{r['stall_ms'] / r['step_ms']:.0%} of {r['step_ms']:.0f} ms |")
        if r["waiting_ms"]:
            print(f"with a teacher, medians: waiting for the weights {r['waiting_ms'][1]:.1f} ms, overlapped "
                  f"{r['overlapped_ms'][1]:.1f} ms", file=sys.stderr)
    gb = lambda x: f"{x / 1e9:.1f} GB"
    print(f"| 8 GPUs, {gpus['parameters'] / 1e9:.2f} B, computed | - | {gb(sum(gpus['ring_bytes'].values()))}, "
          f"{gpus['wire_s'] * 1e3:.0f} ms at {args.link / 1e9:.0f} GB/s | {gb(gpus['memory_bytes'])} | "
          f"{gb(gpus['unsharded_bytes'])} | {gpus['stall_s'] * 1e3:.0f} ms at {args.pcie / 1e9:.0f} GB/s | - |")
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))  # of each rank
    machine = T.describe_machine(T.World()) | dict(ranks=args.ranks, threads=threads)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(dict(machine=machine, flags=flags, rows=rows,
                                            computed=gpus), indent=1) + "\n")


if __name__ == "__main__":
    main()
