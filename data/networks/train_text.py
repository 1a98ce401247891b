"""Train the offline text encoder: a small T5Gemma encoder and its tokenizer, for tracks that run without downloads.

    python data/networks/train_text.py            # about fifteen minutes on two busy cores; writes data/networks/text/

The trainer conditions on the hidden states of a frozen encoder. The states of a random one would not say which colour
belongs to which shape. This one learned it from text alone: ten learned questions ("what is in the top left?", ...
"what is behind?") attend to its states and must answer from the caption. Captions are of the `train` split only; the
questions are thrown away, the encoder is saved as a plain Hugging Face folder. Its log lies beside its weights.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.scenes import (BACKGROUNDS, COLOURS, MICRO, MINI, PATTERNS, PLACES, SHAPES, SIZES, captions,  # noqa: E402
                         draw_scenes)


def train_tokenizer(texts: list[str], vocab_size: int = 480):
    """BPE with byte fallback, as Gemma's: whole words of the captions; any other text in letters or bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{i:02X}>" for i in range(256)]
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789.,:'-")
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                                   unk_token="<unk>", model_max_length=256, padding_side="right")


def build_encoder(vocab_size: int, width: int, layers: int):
    from transformers import T5GemmaConfig, T5GemmaEncoderModel
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

    module = dict(vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                  num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4, query_pre_attn_scalar=width // 4,
                  max_position_embeddings=256, sliding_window=256, layer_types=["full_attention"] * layers,
                  attn_logit_softcapping=None, final_logit_softcapping=None, dropout_rate=0.0,
                  pad_token_id=0, eos_token_id=1, bos_token_id=2)
    config = T5GemmaConfig(encoder=T5GemmaModuleConfig(**module), decoder=T5GemmaModuleConfig(**module),
                           is_encoder_decoder=False, dropout_rate=0.0)
    return T5GemmaEncoderModel(config)


class Questions(nn.Module):
    """One learned query per place and one for the background attend to the encoder's states, (B, T, D) -> logits."""

    ANSWERS = (2, len(SHAPES), len(COLOURS), len(SIZES))  # present, shape, colour, size

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(PLACES[3]) + 1, width) * 0.02)
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.place = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, sum(self.ANSWERS)))
        self.background = nn.Sequential(nn.Linear(width, width), nn.GELU(),
                                        nn.Linear(width, len(BACKGROUNDS) * len(PATTERNS)))

    def forward(self, states, mask):
        x, _ = self.attend(self.queries.expand(len(states), -1, -1), states, states, key_padding_mask=~mask,
                           need_weights=False)
        return self.place(x[:, :-1]).split(self.ANSWERS, -1), self.background(x[:, -1])


def batch(index: int, size: int):
    """Captions and answers: the micro and the mini difficulty in turn. Places are numbered on the 3 x 3 grid."""
    difficulty = (MICRO, MINI)[index % 2]
    scenes = draw_scenes(range(index * size, (index + 1) * size), "train", difficulty, seed=1234)
    to_nine = np.array([PLACES[3].index(name) for name in PLACES[difficulty.grid]])
    truth = torch.full((size, 9, 4), -1)  # present, shape, colour, size
    truth[:, :, 0] = 0
    for k in range(difficulty.max_objects):
        rows = np.nonzero(scenes.place[:, k] >= 0)[0]
        answer = np.stack([np.ones_like(rows), *(a[rows, k] for a in (scenes.shape, scenes.colour, scenes.size))], 1)
        truth[rows, to_nine[scenes.place[rows, k]]] = torch.from_numpy(answer)
    return captions(scenes), truth, torch.from_numpy(scenes.background)


def main():
    parser = argparse.ArgumentParser(description="Train the offline text encoder on captions of scenes.")
    parser.add_argument("--out", type=Path, default=ROOT / "data/networks/text")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    start = time.time()
    tokenizer = train_tokenizer([c for i in range(40) for c in batch(i, 256)[0]])
    encoder = build_encoder(len(tokenizer), args.width, args.layers)
    questions = Questions(args.width)
    parameters = [*encoder.parameters(), *questions.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    size = sum(p.numel() for p in encoder.parameters())
    lines = [f"{vars(args) | {'out': args.out.name}}",
             f"torch {torch.__version__}, vocabulary {len(tokenizer)}, encoder {size:,} parameters"]
    print(*lines, sep="\n")

    def run(index):
        texts, truth, background = batch(index, args.batch)
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        states = encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        places, ground = questions(states, tokens["attention_mask"].bool())
        losses = [F.cross_entropy(p.flatten(0, 1), truth[:, :, i].flatten(), ignore_index=-1)
                  for i, p in enumerate(places)]
        right = [((p.argmax(-1) == truth[:, :, i]) | (truth[:, :, i] < 0)).all(1) for i, p in enumerate(places)]
        right = torch.stack(right + [ground.argmax(-1) == background]).all(0)
        return sum(losses) + F.cross_entropy(ground, background), right.float().mean()

    for step in range(args.steps):
        progress = step / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 100) * min(1, 2 * (1 - progress))
        loss, right = run(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 200 == 0 or step == args.steps - 1:
            lines.append(f"step {step:5d}  loss {loss.item():.4f}  captions read without any error {right.item():.3f}  "
                         f"{time.time() - start:.0f} s")
            print(lines[-1], flush=True)
    encoder.eval()
    with torch.no_grad():
        right = torch.stack([run(10_000_000 // args.batch + i)[1] for i in range(16)]).view(8, 2).mean(0)
    lines.append(f"new captions read without any error: micro {right[0].item():.4f}, mini {right[1].item():.4f} "
                 f"(n = {args.batch * 8} each)")
    print(lines[-1])
    args.out.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "train.log").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
