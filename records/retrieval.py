"""Prompt retrieval: how often does a picture that a run paints look like the one that its prompt describes?

    python records/retrieval.py logs/micro-openmoji           # after training on shards/openmoji (data/openmoji.py)
    python records/retrieval.py logs/micro-openmoji --captions short --seed 1

Every held-out prompt is painted once, by the run's own script as eval_prx.py has it. data/networks/emoji, which never
saw a held-out picture, turns the painted and the N real held-out pictures into vectors; a painted one is a hit if of all
real ones the prompted one is nearest. Chance is 1 / N. The rows:

    painted        all of them, with a 95 % interval (Wilson) and p, the probability of as many hits by chance
      with sibling    another skin tone, sex or direction of the thing is in training (data/openmoji.py, `thing`)
      without         training has nothing of that name
    shuffled       the same pictures against each other's prompts: must be as chance
    real, damaged  the real pictures, moved by up to 4 % of the side, turned by up to 5 degrees, scaled by up to 6 %,
                   blurred, tinted and with noise: what a perfect painter with another hand would get

An untrained run (train_prx.py --steps 1) must be as chance, too. Written: retrieval.json and retrieval.png (the first 32
pictures that are painted, with their prompts) in the run's folder.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_prx as E  # noqa: E402
from data import shards  # noqa: E402
from data.networks.train_emoji import damage, embed  # noqa: E402
from data.openmoji import thing  # noqa: E402

NETWORK = E.NETWORKS / "emoji"
STRENGTH = 0.5  # of the damage of training, which `real, damaged` gets


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z, share = 1.96, hits / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def by_chance(hits: int, n: int, chance: float) -> float:
    """The probability of at least as many hits."""
    return sum(math.comb(n, i) * chance ** i * (1 - chance) ** (n - i) for i in range(hits, n + 1))


def row(hit: torch.Tensor, candidates: int) -> dict:
    hits, n = int(hit.sum()), len(hit)
    low, high = wilson(hits, n) if n else (0.0, 1.0)
    return {"n": n, "hits": hits, "share": hits / max(n, 1), "interval": [low, high], "chance": 1 / candidates,
            "p": by_chance(hits, n, 1 / candidates)}


def load_network(held_out: str):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not NETWORK.exists():
        raise shards.UserError(f"{NETWORK} is missing; restore it from the repository")
    network = transformers.AutoModel.from_pretrained(NETWORK, use_safetensors=True).eval().requires_grad_(False)
    if network.config.held_out != held_out:
        raise shards.UserError("data/networks/emoji was trained beside other held-out pictures and may have seen these: "
                               "make them with the packages of requirements-openmoji.txt and --eval-share 0.1, or train "
                               "it again with data/networks/train_emoji.py")
    return network


def things_in_training(folders: list[str]) -> set[str]:
    """Of all sizes: the training split's short captions without skin tone and sex."""
    things = set()
    for folder in map(Path, folders):
        for entry in shards.read_index(folder)["shards"]:
            if entry["split"] == "train":
                tensors = shards.open_shard(folder, entry)
                things |= {thing(shards.read_caption(tensors, i, "short")) for i in range(entry["count"])}
    return things


def judge(network, painted: torch.Tensor, real: torch.Tensor, sibling: torch.Tensor) -> dict[str, dict]:
    """The rows of the table. painted, real: uint8 (N, 3, H, W), painted[i] for the prompt of real[i]; sibling: (N,)."""
    rng, index = torch.Generator().manual_seed(0), torch.arange(len(real))
    vectors = embed(network, real)
    nearest = (embed(network, painted) @ vectors.T).argmax(1)
    shifts = torch.randperm(len(real), generator=rng)
    others = shifts[(torch.argsort(shifts) + 1) % len(real)]  # one cycle: nobody keeps the own prompt
    damaged = (embed(network, damage(real, rng, STRENGTH)) @ vectors.T).argmax(1)
    hits = {"painted": nearest == index, "  with sibling": (nearest == index)[sibling],
            "  without": (nearest == index)[~sibling], "shuffled": nearest == others,
            "real, damaged": damaged == index}
    return {name: row(hit, len(real)) for name, hit in hits.items()}


def retrieve(args):
    about = E.read_run(args.run, args.trust)
    task = E.ShardTask(about["folders"], about["resolution"], None)
    if not task.sets:
        raise shards.UserError(f"{task.protocol['data']} holds no images; prepare it with --store image,text")
    network = load_network(task.sets[0][0]["hashes"])
    prompts = [task.held_out.caption(i, args.captions) for i in range(task.n)]
    names = [task.held_out.caption(i, "short") for i in range(task.n)]
    known = things_in_training(about["folders"])
    request = E.request_of(about, args)
    seeds = E.seeds_of("eval", task.n, args.seed)
    with E.Painting(args.run, prompts, seeds, request, E.painting_devices(args), args.run) as painting:
        painted = torch.stack(painting.images())
    sibling = torch.tensor([thing(name) in known for name in names])
    rows = judge(network, painted, torch.stack(task.real(range(task.n))), sibling)
    print(f"{'':<16}{'n':>6}{'hits':>6}{'share':>9}{'95 % interval':>18}{'chance':>9}{'p':>10}")
    for name, r in rows.items():
        low, high = r["interval"]
        print(f"{name:<16}{r['n']:>6}{r['hits']:>6}{r['share']:>9.1%}{low:>10.1%} to{high:>6.1%}{r['chance']:>9.2%}"
              f"{r['p']:>10.1g}")
    told = {"captions": args.captions, "seed": args.seed} | {k: request[k] for k in ("steps", "cfg_scale", "precision")}
    shards.write_json(args.run / "retrieval.json", {"protocol": told | {"held_out": network.config.held_out},
                                                    "script_sha256": about["script_sha256"], "rows": rows})
    shards.save_grid(painted[:32], prompts[:32], args.run / "retrieval.png", columns=8)
    print(f"wrote {args.run / 'retrieval.json'} and {args.run / 'retrieval.png'}")


def main() -> int:
    parser = E.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a finished run on shards/openmoji")
    parser.add_argument("--captions", choices=("long", "short"), default="long", help="what is painted [%(default)s]")
    E.common_flags(parser, 16)
    parser.set_defaults(n=None)
    try:
        args = parser.parse_args()
        E.check_flags(parser, args, 2)
        retrieve(args)
        return 0
    except (shards.UserError, OSError, E.Failure) as error:
        print(f"retrieval.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, E.Failure) else 2


if __name__ == "__main__":
    sys.exit(main())
