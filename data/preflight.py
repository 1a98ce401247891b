"""Before any training: everything that is in the way, at once, each with what to do.

    python train_prx.py --dry-run --data ...   # check everything as a run would, print the plan (data/plan.py), stop
"""

import dataclasses
import fcntl
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data.plan import CUDA, KEPT, Outline, describe, fitting, latent_space, read_json, report
from train_prx import TEACHERS, TEXTS, VAES, UserError, find_checkpoint, flag, stage_config

NETWORKS = {  # knob: its names, where in a folder or repository the network lies, what to do without it
    "vae": (VAES, ("vae", ""), "use --vae none (pixel space)"),
    "text": (TEXTS, ("",), "prepare the data with --store text where it is, or use --text tiny (words of scenes)"),
    "repa_teacher": (TEACHERS, ("",), "use --repa-teacher dinov2, which is not gated, or --repa 0"),
    "pdino_teacher": (TEACHERS, ("",), "use --pdino 0"),
    "init": ({}, ("transformer", ""), "leave --init away")}


def check(config, stages, world, run):
    """(datasets, problems): one data set per stage, and one sentence for everything that is in the way, on any rank.

    Every rank opens the data and looks at its own GPU; rank 0 asks for networks, licences and disk.
    """
    configs = [stage_config(config, stage) for stage in stages]
    opened, problems = open_data(config, configs)
    datasets, outlines = [data for data in opened if data], list(map(Outline, configs, opened))
    if config.track == "24h" and not torch.cuda.is_available():
        problems.append("track 24h needs CUDA GPUs and there is none here; `python train_prx.py --track micro` runs on "
                        "a CPU")
    problems += [f"--batch {c.batch} over --accumulate {c.accumulate} is not a multiple of {world.size} ranks; change "
                 "one of them" for c in configs if c.batch // c.accumulate % world.size]
    if world.device.type == "cuda":
        problems += check_gpu(outlines, world)
    if config.verify_data:
        problems += check_files(datasets, world)
    if world.rank == 0:
        problems += check_splits(datasets) + check_networks(configs, datasets, run) + check_disk(outlines[0], run)
    if world.control is not None:  # something may be wrong on one machine only, and rank 0 alone speaks
        everywhere = [None] * world.size
        dist.all_gather_object(everywhere, problems, group=world.control)
        problems = sum(everywhere, [])
    return datasets, list(dict.fromkeys(problems))


def plan(config, stages, datasets=None) -> str:
    """What the run will be. datasets: as `check` has opened them; else they are tried, and the plan says why not."""
    ranks = int(os.environ.get("WORLD_SIZE", 8 if config.track == "24h" and datasets is None else 1))
    gpu = torch.cuda.is_available() or datasets is None and config.track != "micro"
    configs, problems = [stage_config(config, stage) for stage in stages], []
    if datasets is None:
        datasets, problems = open_data(config, configs)
    warnings = [f"epochs are unknown: {problem}" for problem in dict.fromkeys(problems)]
    return report(config, stages, list(map(Outline, configs, datasets)), ranks, gpu, warnings)


def read_metrics(run: Path) -> list[dict]:
    """The records of metrics.jsonl; a line that a crash cut short is passed over."""
    records = []
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            pass
    return [r for r in records if isinstance(r, dict) and "elapsed" in r]


def find_run(config, plan: list[dict]) -> tuple[Path, Path | None, list[str], float]:
    """The run's folder, the checkpoint to go on from, notes on those passed over, and the seconds on its clock."""
    run = Path("logs") / config.name
    if config.resume == "never":
        return run, None, [], 0.0
    source = run if config.resume == "auto" or find_checkpoint(run)[0] else Path(config.resume)
    checkpoint, notes = find_checkpoint(source)
    if checkpoint is None:
        if config.resume != "auto":
            raise UserError(f"--resume {config.resume} holds no complete checkpoint "
                            f"({'; '.join(notes) or 'there is no checkpoint/step-* in it'}); give a run's folder such "
                            "as logs/micro, or leave --resume away")
        return run, None, notes, 0.0
    try:
        then = dict(json.loads((source / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}/config.json cannot be read ({error}), so it is unknown what its checkpoints belong "
                        "to; choose another --name") from None
    free = set("resume stop_after name samples checkpoint_minutes milestone_hours compile dry_run verify_data init "
               "loader_threads mfu recompute bench profile".split())
    differ = [f"{flag(k)} was {then.get(k)}, now {v}" for k, v in dataclasses.asdict(config).items()
              if k not in free and then.get(k) != v]
    differ += [f"its stages were {then.get('plan')}, now {plan}"] * (not differ and then.get("plan") != plan)
    if differ:
        raise UserError(f"{source} was started with other settings ({'; '.join(differ)}); repeat its flags, choose "
                        "another --name, or give --resume never to throw it away")
    return run, checkpoint, notes, ([0.0] + [record["elapsed"] for record in read_metrics(source)])[-1]


# ---- data ------------------------------------------------------------------------------------------------------------


def open_data(config, configs):
    """([data set or None for each stage], problems)."""
    from data.scenes import SceneData
    from data.shards import ShardData

    opened, problems = [None] * len(configs), []
    if not config.data:
        return opened, [f"track {config.track} needs --data FOLDER with shards that data/prepare.py wrote"]
    for number, c in enumerate(configs):
        try:
            data = SceneData(c) if c.data == "scenes" else ShardData(c, number)
            if space := latent_space(c.vae, data.latent):
                check_sizes(c, data, space[1])
                if data.latent and (data.latent["channels"], data.latent["factor"]) != space:
                    raise UserError(f"the latents of {c.data} were made by {data.latent['vae']}, and --vae {c.vae} has "
                                    f"{space[0]} channels and factor {space[1]}; give the --vae that made them")
            opened[number] = data
        except UserError as error:
            problems.append(str(error))
    if len(texts := {str(data.text) for data in opened if data}) > 1:
        problems.append(f"the stages' data sets differ in the text that they store ({' and '.join(sorted(texts))}); "
                        "prepare them in the same way")
    return opened, problems


def check_sizes(c, data, factor: int):
    cell = factor * c.patch
    for height, width in data.sizes:
        if height % cell or width % cell:
            raise UserError(f"images of {height} x {width} px cannot be cut into tokens of {cell} px (--vae {c.vae} "
                            f"and --patch {c.patch}); change one of them or the size")


def check_latents(config, data, vae):
    """UserError where a data set does not fit the VAE that this run has loaded."""
    theirs, ours = data.latent, vae and vae.about
    if theirs and any(theirs[k] != ours[k] for k in ("type", "channels", "factor", "scale", "shift", "sha256")):
        raise UserError(f"the latents of {data.config.data} were made by {theirs}, and --vae {config.vae} is {ours}; "
                        "give the --vae that made them, or prepare the data again")
    check_sizes(config, data, vae.factor if vae else 1)


def check_splits(datasets) -> list[str]:
    """Training images of any stage must not be evaluation images of any, by content hash; scenes never are."""
    shards = {data.config.data: data for data in datasets if hasattr(data, "hashes")}
    held_out = {name: data.hashes("eval") for name, data in shards.items()}
    problems = []
    for name, data in shards.items():
        train = data.hashes("train")
        for other, hashes in held_out.items():
            if len(both := hashes[np.isin(hashes, train)]):
                problems.append(f"{len(both)} images are in the training set of {name} and in the evaluation set of "
                                f"{other} (the first has hash {both[0].tobytes().hex()}...); prepare both with one "
                                "--eval-share")
    return problems


def check_files(datasets, world) -> list[str]:
    problems = []
    for data in datasets:
        try:
            if hasattr(data, "verify"):
                data.verify(world.rank, world.size)
        except UserError as error:
            problems.append(str(error))
    return problems


# ---- machine ---------------------------------------------------------------------------------------------------------


def lock_run(run: Path, problems: list[str]):
    """An open file that keeps other processes out of the run's folder, on this machine and on most shared disks."""
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        problems.append(f"another process is training in {run}; wait for it, or choose another --name")
    return file


def gpu_memory(device) -> tuple[float, float]:
    """(total, free) bytes."""
    return torch.cuda.get_device_properties(device).total_memory, torch.cuda.mem_get_info(device)[0]


def check_gpu(outlines, world) -> list[str]:
    """This rank's GPU: BF16, and by estimate memory for every stage."""
    o, (total, free), problems = max(outlines, key=lambda o: o.need(world.size)), gpu_memory(world.device), []
    need, name, micro = o.need(world.size), f"GPU {world.device.index}", o.c.batch // o.c.accumulate // world.size
    why = f"about {need / 1e9:.0f} GB per GPU by estimate ({describe(o.memory(world.size))})"
    if o.c.compute != "fp32" and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(f"{name} has no BF16; use one of NVIDIA's Ampere generation or later, or give --compute fp32, "
                        "which is slow")
    if need > total:
        n = fitting(outlines, world.size, total)
        todo = f"give --accumulate {n}" if n else (
            "no --accumulate makes it fit: give a smaller --hidden or --depth, or more GPUs, which share the masters")
        problems.append(f"{micro} images of {o.c.resolution} px at a time need {why}, and {name} has "
                        f"{total / 1e9:.0f}; {todo}")
    elif need > free + CUDA[0]:  # this process's own context is not free any more
        problems.append(f"the run needs {why}, and of the {total / 1e9:.0f} of {name} only {free / 1e9:.0f} are free; "
                        "end what else runs on it")
    return problems


def check_disk(o: Outline, run: Path) -> list[str]:
    there = next(p for p in [run, *run.absolute().parents] if p.is_dir())
    if not os.access(there, os.W_OK):
        return [f"{there} cannot be written to, and {run} goes there; change its permissions or start elsewhere"]
    free = shutil.disk_usage(there).free + sum(p.stat().st_size for p in run.glob("checkpoint/*/*"))
    return [] if free >= o.disk else [
        f"{there.absolute()} has {free / 1e9:.1f} GB free and {run} needs {o.disk / 1e9:.1f} ({KEPT} checkpoints of "
        f"{o.checkpoint / 1e9:.1f} and the final weights); free some, or make logs/ a link to a larger disk"]


# ---- networks --------------------------------------------------------------------------------------------------------


def check_networks(configs, datasets, run) -> list[str]:
    """The frozen networks and --init: there, whole, permitted. In parallel: about 20 s at most with a bad network."""
    c = configs[0]
    needed = {("vae", c.vae) for c in configs if c.vae != "none"}
    needed |= {("text", c.text)} if any(data.text is None for data in datasets) else set()
    needed |= {("repa_teacher", c.repa_teacher) for c in configs if c.repa}
    needed |= {("pdino_teacher", c.pdino_teacher) for c in configs if c.pdino}
    needed |= {("init", c.init)} if c.init and (c.resume == "never" or not find_checkpoint(run)[0]) else set()
    with ThreadPoolExecutor(8) as pool:
        return [problem for problem in pool.map(lambda pair: check_network(*pair), sorted(needed)) if problem]


def check_network(knob: str, name: str) -> str | None:
    """What is wrong with the folder or repository that `name` stands for, or None."""
    known, places, instead = NETWORKS[knob]
    source, what = known.get(name, name), f"{flag(knob)} {name}"
    if Path(source).is_dir():
        has = lambda folder: (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
        return None if any(has(Path(source, place)) for place in places) else (
            f"{what}: {source} has no config.json with .safetensors weights beside it; give a folder that has, or "
            f"{instead}")
    missing = (f"{what}: {source} is neither a local folder nor a repository that you may see; "
               f"{'use one of ' + ', '.join(known) + ', ' if known else ''}check the spelling, log in with "
               f"`hf auth login` if it is private, or {instead}")
    gated = (f"{what}: {source} is gated; accept its licence on https://huggingface.co/{source} and log in with "
             f"`hf auth login`, or {instead}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return missing

    from huggingface_hub import HfApi, errors, hf_hub_url
    for place in places:
        try:
            if not in_cache(source, place, "diffusion_pytorch_model" if knob in ("vae", "init") else "model"):
                url = hf_hub_url(source, "config.json", subfolder=place or None)
                HfApi().get_hf_file_metadata(url=url, timeout=10)  # HfApi.auth_check would wait for ever
            return None
        except errors.EntryNotFoundError:
            pass
        except errors.GatedRepoError:
            return gated
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            return missing
        except Exception as error:  # offline mode, no network, no name server, a proxy: there are dozens of classes
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
                return gated
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            part = f" (of a pipeline {places[0]}/ is enough)" if places[0] else ""
            return (f"{what}: {source} is not in the local Hugging Face cache and cannot be asked for ({reason}); run "
                    f"`hf download {source}`{part} where there is a network, give a local folder, or {instead}")
    return f"{what}: {source} holds no config.json of such a network; check the spelling, or {instead}"


def in_cache(repository: str, place: str, stem: str) -> bool:
    """Whether the configuration and all weights are in the local Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    def find(file):
        path = try_to_load_from_cache(repository, f"{place}/{file}" if place else file)
        return path if isinstance(path, str) else None  # neither unknown nor known to be absent

    index = find(f"{stem}.safetensors.index.json")
    parts = set(read_json(Path(index))["weight_map"].values()) if index else {f"{stem}.safetensors"}
    return all(map(find, {"config.json", *parts}))
