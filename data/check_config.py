"""Settings that cannot work are refused before anything is loaded, with a sentence that says what to change."""

import math
import re

from train_prx import NEGATIVES, UserError, flag, span


def check_config(c):
    """Refuse what cannot work, before anything is loaded."""
    def need(condition, message):
        if not condition:
            raise UserError(message)

    for knob, options in dict(predict="x v", optimizer="muon adamw", compute="auto bf16 fp32",
                              compile="auto on off", repa_kind="repa irepa",
                              tread_select="random learned", weights="fp32 bf16", guidance="cfg self").items():
        need(getattr(c, knob) in options.split(),
             f"{flag(knob)} {getattr(c, knob)} is unknown; use one of {', '.join(options.split())}")
    for knob in ("batch", "accumulate", "hidden", "depth", "heads", "patch", "text_tokens", "lr", "lr_adamw",
                 "ema_every", "sample_steps", "ns_steps", "shift", "checkpoint_minutes", "resolution", "text_pad",
                 "eps", "mlp_ratio"):
        need(getattr(c, knob) > 0, f"{flag(knob)} {getattr(c, knob)} must be positive")
    for knob in ("uniform", "caption_dropout", "warmup", "decay_from"):
        need(0 <= getattr(c, knob) <= 1, f"{flag(knob)} {getattr(c, knob)} must lie in 0 to 1")
    for knob in ("momentum", "beta1", "beta2", "ema", "tread", "sprint"):
        need(0 <= getattr(c, knob) < 1, f"{flag(knob)} {getattr(c, knob)} must be at least 0 and less than 1")
    need(0 <= c.seed < 2 ** 63, f"--seed {c.seed} must lie in 0 to 2^63 - 1")
    need(c.hours < math.inf, f"--hours {c.hours} must be finite")
    for knob in ("steps", "hours", "stop_after", "clip", "bottleneck", "samples", "weight_decay", "repa", "pdino",
                 "contrastive", "repa_until", "repa_layer"):
        need(getattr(c, knob) >= 0, f"{flag(knob)} {getattr(c, knob)} must not be negative")
    need(c.steps or c.hours, "the run has no length; give --steps or --hours")
    need(c.warmup <= c.decay_from,
         f"--warmup {c.warmup} ends after --decay-from {c.decay_from} begins; lower one of them")
    need(c.hidden % c.heads == 0 and c.hidden // c.heads % 4 == 0,
         f"--hidden {c.hidden} over --heads {c.heads} must be a multiple of 4 (two axes of rotated pairs)")
    need(c.text_tokens % c.text_pad == 0,
         f"--text-tokens {c.text_tokens} must be a multiple of --text-pad {c.text_pad}, which sets the padded lengths")
    need(c.batch % c.accumulate == 0, f"--batch {c.batch} cannot be cut into --accumulate {c.accumulate} micro-batches")
    need(not (c.tread and c.sprint), "--tread and --sprint both route tokens; choose one of them")
    routes, last = c.tread or c.sprint, c.depth - 1
    need(re.fullmatch(r"\d+-\d+", c.tread_blocks) and (not routes or span(c)[0] <= span(c)[1] <= last),
         f"--tread-blocks {c.tread_blocks} must name a first and a last block of 0 to {last}, such as 1-{last - 1}")
    need(not c.repa or c.repa_layer <= last, f"--repa-layer {c.repa_layer} is not one of the blocks 0 to {last}")
    need(not (c.repa and c.repa_kind == "irepa" and routes and span(c)[0] <= c.repa_layer <= span(c)[1]),
         f"--repa-kind irepa needs all tokens at --repa-layer {c.repa_layer}, and blocks {c.tread_blocks} see some; "
         "choose a layer outside, or --repa-kind repa")
    need(not c.pdino or c.vae == "none", "--pdino compares pixels and works in pixel space only; give --vae none")
    need(c.guidance == "cfg" or c.tread, "--guidance self compares full with routed tokens and needs --tread")
    need(not c.contrastive or c.batch // c.accumulate % NEGATIVES == 0,
         f"--contrastive compares groups of {NEGATIVES} samples, and --batch {c.batch} over --accumulate "
         f"{c.accumulate} is not a multiple")
    need(re.fullmatch(r"long|short|mix:(0(\.\d+)?|1(\.0+)?)", c.captions),
         f"--captions {c.captions} is unknown; use long, short or mix:0.3")
    need(re.fullmatch(r"[\w.-]+", c.name) and c.name.strip("."),
         f"--name {c.name!r} must be a plain folder name (letters, digits, . _ -)")
    need(c.data != "scenes" or c.vae != "none" or c.resolution % c.patch == 0,
         f"--resolution {c.resolution} is not a multiple of --patch {c.patch}")
