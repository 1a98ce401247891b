# Needs the tree of commit 58b37c5 (git worktree add ../then 58b37c5), where it lay in records/; kept as it ran.
"""Do the metrics of eval_prx.py behave as metrics should? On scenes, with the feature networks of this repository.

    python records/eval_checks.py                 # -> records/eval/checks.json and checks.png, 40 s on one core
    python records/eval_checks.py --peers FOLDER  # FID against pytorch-fid's and clean-fid's functions, whose sources
                                                  # (pytorch_fid/, cleanfid/) are in FOLDER -> records/eval/peers.json

A set with itself must have distance zero; two halves of one distribution little, and less the larger they are; blur,
noise and colour inversion must raise FID, CMMD and DINO-MMD; shuffled prompts must lower prompt accuracy and nothing
else.
"""

import argparse
import ast
import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import scenes  # noqa: E402
from eval_prx import METRICS, REFERENCE, Features, ImageSet, Moments, compare, fid, mmd  # noqa: E402
from records.figures import plt  # noqa: E402

OUT = ROOT / "records" / "eval"
N, RES, SIZES = 2000, 32, (125, 250, 500, 1000, 2000, 4000)


def draw(first: int, n: int):
    """n scenes of the split `eval`, from index `first` on, and their images uint8 (n, 3, RES, RES)."""
    drawn = scenes.draw_scenes(range(first, first + n), "eval")
    return drawn, scenes.render(drawn, RES)


def blur(images, sigma: float = 0.7):
    x = torch.arange(-3, 4) / sigma
    kernel = torch.exp(-x.square() / 2) / torch.exp(-x.square() / 2).sum()
    out = F.pad(images.float(), (3, 3, 3, 3), mode="reflect")
    for shape in ((1, 1, 1, 7), (1, 1, 7, 1)):
        out = F.conv2d(out, kernel.view(shape).expand(3, *shape[1:]), groups=3)
    return out.round().to(torch.uint8)


def noise(images, deviation: float = 12.0):
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + deviation * drawn).round().clamp(0, 255).to(torch.uint8)


def distances(features_x: dict, features_y: dict) -> dict[str, float]:
    """The three metrics from features (N, D) by kind of network."""
    return {name: fid(Moments().update(features_x[kind]), Moments().update(features_y[kind])) if name == "fid"
            else mmd(features_x[kind], features_y[kind]) for kind, name in METRICS.items()}


def check_halves(networks) -> dict:
    """A set with itself, and disjoint sets of n and n: mean and deviation over as many pairs as there are, 8 at most.
    """
    images = draw(REFERENCE, 2 * SIZES[-1])[1]
    features = {kind: network(images) for kind, network in networks.items()}
    part = lambda i, n: {kind: x[i * n:(i + 1) * n] for kind, x in features.items()}
    halves = {}
    for n in SIZES:
        values = [distances(part(2 * i, n), part(2 * i + 1, n)) for i in range(min(8, SIZES[-1] // n))]
        halves[n] = {name: {"mean": np.mean([v[name] for v in values]), "deviation": np.std([v[name] for v in values]),
                            "pairs": len(values)} for name in METRICS.values()}
    return {"itself": distances(part(0, N), part(0, N)), "halves": halves}


def check_damage(networks) -> dict:
    """The metrics of damaged scenes against other, whole ones, and their prompt accuracy."""
    drawn, images = draw(0, N)
    real = ImageSet(networks, [draw(REFERENCE, N)[1]])
    shuffled = images[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    damaged = {"other scenes": images, "blur": blur(images), "noise": noise(images), "colour inversion": 255 - images,
               "prompts shuffled": shuffled}
    return {name: compare(real, ImageSet(networks, [x]))
            | {"accuracy": scenes.score(x, drawn)["accuracy"].mean().item()} for name, x in damaged.items()}


def peer(path: Path, name: str):
    """A single function out of a source file, without importing what the file needs. scipy.linalg.sqrtm lost its `disp`
    argument; here it is taken and ignored."""
    import scipy.linalg
    from types import SimpleNamespace

    def sqrtm(a, disp=True):
        root = scipy.linalg.sqrtm(a)
        return root if disp else (root, None)

    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    space = {"np": np, "linalg": SimpleNamespace(sqrtm=sqrtm)}
    exec(compile(tree, str(path), "exec"), space)
    return space[name]


def check_peers(networks, folder: Path) -> list[dict]:
    """FID of the same features by eval_prx.py and by two published functions, also with fewer images than features."""
    peers = {"pytorch-fid": peer(next(folder.rglob("pytorch_fid/fid_score.py")), "calculate_frechet_distance"),
             "clean-fid": peer(next(folder.rglob("cleanfid/fid.py")), "frechet_distance")}
    real = networks["inception"](draw(REFERENCE, N)[1])
    damaged = {"other scenes": draw(0, N)[1], "blur": blur(draw(0, N)[1]), "64 scenes": draw(0, 64)[1]}
    rows = []
    for name, images in damaged.items():
        fake = networks["inception"](images)
        row = {"set": name, "n": [len(real), len(fake)], "features": real.shape[1],
               "eval_prx": fid(Moments().update(real), Moments().update(fake))}
        (m1, s1), (m2, s2) = ((x.double().mean(0).numpy(), np.cov(x.double().numpy().T)) for x in (real, fake))
        for theirs, function in peers.items():
            row[theirs] = float(function(m1, s1, m2, s2))
            row[f"{theirs}, relative difference"] = abs(row[theirs] / row["eval_prx"] - 1)
        rows.append(row)
    return rows


def plot(halves: dict, path: Path):
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for panel, name in zip(axes, METRICS.values()):
        mean, deviation = ([halves[n][name][key] for n in SIZES] for key in ("mean", "deviation"))
        panel.errorbar(SIZES, mean, deviation, marker="o", capsize=3, label="disjoint sets of scenes")
        panel.plot(SIZES, [mean[-1] * SIZES[-1] / n for n in SIZES], "--", lw=1, color="gray", label="~ 1 / n")
        panel.set(xscale="log", yscale="log", xlabel="images in each set", title=name)
        panel.set_xticks(SIZES, SIZES)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder with the sources of pytorch-fid and clean-fid")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    networks = {kind: Features(kind) for kind in METRICS}
    about = {"resolution": RES, "networks": {kind: network.describe() for kind, network in networks.items()},
             "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy", "scipy")}}
    if args.peers:
        rows = check_peers(networks, args.peers)
        about["peers"] = "pytorch-fid 0.3.0 and clean-fid 0.1.35"
        (OUT / "peers.json").write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
        print(json.dumps(rows, indent=2))
        return
    result = about | {"n": N} | check_halves(networks) | {"damage": check_damage(networks)}
    (OUT / "checks.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result["halves"], OUT / "checks.png")
    print("| set | FID | CMMD | DINO-MMD | prompt accuracy |\n|---|---|---|---|---|")
    rows = {"the set itself": result["itself"]} | result["damage"]
    for name, row in rows.items():
        print(f"| {name} | {row['fid']:.3f} | {row['cmmd']:.4f} | {row['dino_mmd']:.4f} | "
              + (f"{row['accuracy']:.1%} |" if "accuracy" in row else "- |"))


if __name__ == "__main__":
    main()
