"""What do the script's techniques buy? diffusers' model, torch.optim.AdamW and a plain loop, as long on the same shards.

    python records/peer.py logs/micro-openmoji --out logs/peer         # trains for the seconds that this run took
    python records/retrieval.py logs/peer                              # and is judged like it

The same size, objective, captions and caption dropout as the run's; batches of 64 and AdamW at 2e-3, the tuned baseline
of records/ablate.py; BF16 autocast, no compilation, which takes as long as it saves here. No alignment, no schedule.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_prx as T  # noqa: E402

BATCH, RATE = 64, 2e-3


def samples(c: T.Config):
    """All training images uint8 (N, 3, H, W), stored long captions (N tensors), and the empty one."""
    data = T.Shards(c)
    places = [(data.shards[s], int(i - data.first[s])) for s, ids in enumerate(data.ids) for i in ids]
    if not data.text:
        raise T.UserError(f"{c.data} holds no text; prepare it with --store image,text")
    texts = [data.prompt(*place, data.fields[0]) for place in places]
    return torch.stack([data.picture(*place) for place in places]), texts, data.empty


def train(run: Path, out: Path) -> dict:
    """Writes `out`: the run's script, settings and text encoder with the peer's weights. Returns what was done."""
    from diffusers import PRXTransformer2DModel

    clock, saved = T.Clock(), json.loads((run / "config.json").read_text())
    facts = json.loads((run / "run.json").read_text())
    c = dataclasses.replace(T.Config(**saved["config"]), repa=0.0)
    config = json.loads((run / "transformer/config.json").read_text())
    images, texts, empty = samples(c)
    torch.manual_seed(c.seed)
    net = PRXTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")}).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, betas=T.BETAS, weight_decay=0.0, fused=True)
    bf16, steps = T.has_fast_bf16(torch.device("cpu")), 0
    while clock() < facts["finished"]["elapsed"]:
        rows = torch.randint(len(images), (BATCH,))
        dropped = (torch.rand(BATCH) < c.caption_dropout).tolist()
        text, mask = T.pack_text([empty if drop else texts[i] for drop, i in zip(dropped, rows.tolist())], c, None)
        x_0, t = T.to_float(images[rows]), T.draw_times(BATCH, c.shift, None)
        eps = torch.randn_like(x_0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model = lambda x, t, text, mask, keep, tap: net(x, t, text.float(), mask, return_dict=False)[0].float()
            loss, *_ = T.flow_matching_loss(model, x_0, eps, t, text, mask, c)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), c.clip)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    out.mkdir(parents=True)
    shutil.copytree(run / "text", out / "text")
    for name in ("train_prx.py", "config.json"):
        shutil.copy(run / name, out)
    T.export_transformer(config, net.state_dict(), out / "transformer")
    done = dict(step=steps, samples=steps * BATCH, elapsed=clock())
    T.write_json(out / "run.json", facts | dict(name=out.name, finished=done))
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run on the CPU, on shards with stored text")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    args = parser.parse_args()
    try:
        if args.out.exists() or not T.is_finished(args.run):
            raise T.UserError(f"{args.out} exists" if args.out.exists() else f"{args.run} is not a finished run")
        done = train(args.run, args.out)
    except T.UserError as error:
        print(f"peer.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {done['step']} steps, {done['samples']:,} images, {done['elapsed']:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
