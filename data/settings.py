"""The command line of train_prx.py: flags and help from the text of its Config; what cannot work is refused at once."""

import argparse
import dataclasses
import math
import re
from pathlib import Path

import train_prx
from train_prx import LATENTS, NEGATIVES, RECIPES, SPACES, Config, Parser, Stage, UserError, flag, span

KNOB = re.compile(r"^    (\w+): (?:str|int|float|bool) = .+?  # (.+)$", re.M)  # the comments above are the help texts
HELP = dict(KNOB.findall(train_prx.SOURCE.split("class Config:")[1].split("class Stage:")[0]))


def parse_args(argv=None) -> tuple[Config, list[Stage]]:
    """The track's settings, then the recipe's, then the flags. UserError on anything unknown or contradictory."""
    parser = Parser(description="Train PRX. Defaults are those of the 24h track.", allow_abbrev=False)
    for field in dataclasses.fields(Config):
        kind = dict(action="store_true") if field.type is bool else dict(type=field.type)
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, **kind,
                            help=f"{HELP[field.name]} [{field.default}]".replace("%", "%%"))
    flags = vars(parser.parse_args(argv))
    for knob, table in (("track", train_prx.TRACKS), ("recipe", RECIPES)):
        if flags.get(knob, Config.__dict__[knob]) not in table:
            raise UserError(f"--{knob} {flags[knob]} is unknown; use one of {', '.join(table)}")
    config, stages = train_prx.TRACKS[flags.get("track", "24h")]
    if flags.get("steps") and flags.get("hours"):
        raise UserError("--steps and --hours both give the length of the run; give one of them")
    if flags.get("steps"):
        flags["hours"] = 0.0
    now, then = (SPACES.get(vae, LATENTS) for vae in (flags.get("vae", config.vae), config.vae))
    overlay = {k: v for k, v in now.items() if v != then[k]} | RECIPES[flags.get("recipe", "default")] | flags
    config = dataclasses.replace(config, **overlay)
    if not config.name:
        parts = [config.track] + [config.recipe] * (config.recipe != "default")
        if config.data and config.data != train_prx.TRACKS[config.track][0].data:
            parts += [re.sub(r"[^\w.-]", "_", Path(path).resolve().name) for path, _ in data_folders(config.data)]
        config = dataclasses.replace(config, name="-".join(parts))
    return config, choose_stages(config, stages, overlay)


def data_folders(data: str) -> list[tuple[str, float]]:
    """A:0.7,B:0.3 -> [("A", 0.7), ("B", 0.3)]; without a weight it is 1."""
    parts = [re.fullmatch(r"(.+?)(?::(\d*\.?\d+))?", part) for part in data.split(",")]
    if not all(parts) or any(p[2] and float(p[2]) == 0 for p in parts):
        raise UserError(f"--data {data} is not a list of folders with positive weights such as A or A:0.7,B:0.3")
    return [(p[1], float(p[2] or 1)) for p in parts]


def choose_stages(config: Config, stages: list[Stage], overlay: dict) -> list[Stage]:
    """The stages that --stages names, with what flags, recipe and latent space set taken out of their knobs."""
    if not config.sft_data:
        stages = [s for s in stages if s.name != "sft"]
    if re.fullmatch(r"(\d+:\d*\.?\d+,?)+", config.stages):
        track = {s.name: s.knobs for s in stages}
        parts = [part.split(":") for part in config.stages.strip(",").split(",")]
        stages = [Stage(f"{px}px", float(share), track.get(f"{px}px", {}) | dict(resolution=int(px)))
                  for px, share in parts]
    elif config.stages not in ("all", "show"):
        names = config.stages.split(",")
        if unknown := set(names) - {s.name for s in stages}:
            raise UserError(f"--stages {','.join(sorted(unknown))} is unknown; this run has "
                            f"{','.join(s.name for s in stages)} (sft needs --sft-data), all or show")
        stages = [s for s in stages if s.name in names]
    stages = [Stage(s.name, s.share, {k: v for k, v in s.knobs.items() if k not in overlay}
                    | (dict(data=config.sft_data) if s.name == "sft" else {})) for s in stages]
    configs = [dataclasses.replace(config, **stage.knobs) for stage in stages]
    if config.guidance == "self" and not any(c.tread for c in configs):  # stages without routing are sampled with CFG
        raise UserError("--guidance self compares full with routed tokens and needs --tread")
    for c in configs:
        check_config(c)
    return stages


def check_config(c):
    """Refuse what cannot work, before anything is loaded."""
    def need(condition, message):
        if not condition:
            raise UserError(message)

    for knob, options in dict(predict="x v", optimizer="muon adamw", compute="auto bf16 fp32",
                              compile="auto on off", repa_kind="repa irepa",
                              tread_select="random learned", weights="fp32 bf16", guidance="cfg self",
                              ns="classic polar", modulation="muon adamw", wire="fp32 bf16").items():
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
                 "contrastive", "repa_until", "repa_layer", "milestone_hours", "skip_spikes"):
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
    need(not c.repa or c.repa_layer <= last,
         f"--repa-layer {c.repa_layer} is not one of the blocks 0 to {last}; give one of them, or --repa 0")
    need(not (c.repa and c.repa_kind == "irepa" and routes and span(c)[0] <= c.repa_layer <= span(c)[1]),
         f"--repa-kind irepa needs all tokens at --repa-layer {c.repa_layer}, and blocks {c.tread_blocks} see some; "
         "choose a layer outside, or --repa-kind repa")
    need(not (c.fp8 and c.compute == "fp32"), "--fp8 and --compute fp32 contradict each other; give one of them")
    need(not c.fp8 or c.hidden % 16 == 0 and int(c.hidden * c.mlp_ratio) % 16 == 0,
         f"--fp8 needs widths that are multiples of 16, unlike --hidden {c.hidden} with --mlp-ratio {c.mlp_ratio}")
    need(not c.pdino or c.vae == "none", "--pdino compares pixels and works in pixel space only; give --vae none")
    need(not c.contrastive or c.batch // c.accumulate % NEGATIVES == 0,
         f"--contrastive compares groups of {NEGATIVES} samples, and --batch {c.batch} over --accumulate "
         f"{c.accumulate} is not a multiple")
    need(re.fullmatch(r"long|short|mix:(0(\.\d+)?|1(\.0+)?)", c.captions),
         f"--captions {c.captions} is unknown; use long, short or mix:0.3")
    need(re.fullmatch(r"[\w.-]+", c.name) and c.name.strip("."),
         f"--name {c.name!r} must be a plain folder name (letters, digits, . _ -)")
    need(c.data != "scenes" or c.vae != "none" or c.resolution % c.patch == 0,
         f"--resolution {c.resolution} is not a multiple of --patch {c.patch}")
