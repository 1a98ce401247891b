"""A finished run as a folder for diffusers, with a model card: `python eval_prx.py export RUN --out DIR` calls it."""

import json
import shutil
from pathlib import Path

import torch

import train_prx
from data.encoders import quiet_import
from data.preflight import read_metrics
from eval_prx import Painter, prompt_noise, read_run, table
from train_prx import UserError


PROMPT = "one object: a big red ring in the top left. the background is plain navy."  # what models of scenes know


def export(run: Path, out: Path, text: str = "copy", push: str | None = None):
    """A finished run -> a pipeline folder that diffusers loads, with a model card: PRXPipeline for latents with
    v-prediction, PRXPixelPipeline for pixels with x-prediction, with copies of VAE, text encoder and tokenizer.
    UserError for what neither can do. The folder is checked: the same noise must give the same image as here."""
    config = read_run(run)
    pixels = config["vae"] == "none"
    if config["predict"] != ("x" if pixels else "v"):
        raise UserError(f"{run} has --vae {config['vae']} --predict {config['predict']}, and diffusers has pipelines "
                        "for latents with v and for pixels with x; its transformer/ folder can be used by itself")
    if "span" in json.loads((run / "transformer/config.json").read_text()):
        raise UserError(f"{run} was trained with --sprint or a learned scorer, which diffusers' model does not have")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / "model_index.json").is_file():
        raise UserError(f"--out {out} exists and is no pipeline; give a new folder")
    if text == "reference" and Path(train_prx.TEXTS.get(config["text"], config["text"])).exists():
        raise UserError(f"--text-encoder reference needs an encoder on the Hugging Face hub, and {config['text']} is a "
                        "folder; give --text-encoder copy")
    diffusers = quiet_import("diffusers")
    painter = Painter(run, config, "cpu")
    parts = dict(transformer=diffusers.PRXTransformer2DModel.from_pretrained(run / "transformer"),
                 text_encoder=painter.encoder.model, tokenizer=painter.encoder.tokenizer,
                 default_sample_size=config["resolution"], scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    if pixels:
        pipeline = diffusers.PRXPixelPipeline(**parts, prompt_max_tokens=config["text_tokens"], noise_scale=1.0)
    else:
        vae = painter.vae.model
        if not hasattr(vae.config, "scaling_factor"):
            raise UserError(f"{run} has the latents of {type(vae).__name__}, which PRXPipeline cannot decode; its "
                            "transformer/ folder can be used by itself")
        if getattr(vae.config, "shift_factor", 0.0) is None:  # the pipeline would add None
            vae.register_to_config(shift_factor=0.0)
        parts["tokenizer"].model_max_length = config["text_tokens"]  # the pipeline cuts and pads to it
        pipeline = diffusers.PRXPipeline(**parts, vae=vae)
    difference = same_image(pipeline, painter, config)
    if difference > 1e-3:
        raise UserError(f"{run} paints another image with diffusers than here (largest difference {difference:.4f} of "
                        "1), and is not exported; its transformer/ folder can be used by itself")
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=config["shift"])
    if text == "reference":
        pipeline.text_encoder = pipeline.tokenizer = None
        pipeline.register_modules(text_encoder=None, tokenizer=None)
    pipeline.save_pretrained(out)
    shutil.copy(run / "config.json", out / "config.json")  # so that `eval_prx.py PIPELINE` knows what it is
    picture = next((p for p in (run / "samples.png", run / "samples/final.png") if p.is_file()), None)
    if picture:
        shutil.copy(picture, out / "samples.png")
    about = config, type(pipeline).__name__, type(painter.encoder.model).__name__ if text == "reference" else ""
    card = model_card(run, *about, str(push or out), difference, bool(picture))
    (out / "README.md").write_text(card)
    print(f"same noise, same image: at most {difference:.1e} of 1 between our sampler and diffusers'")
    print(f"wrote {out} with a model card, README.md; next:\n"
          + usage(*about, str(out)))
    if push:
        upload(out, push)


def same_image(pipeline, painter: Painter, config: dict, steps: int = 4) -> float:
    """The largest difference, of images in [0, 1], between diffusers' pipeline with our time grid and our sampler."""
    side, prompt = config["resolution"], "a red ring"  # which the pipelines' text cleaning leaves alone
    noise = prompt_noise("export", [0], painter.noise_shape, 0)
    grid = train_prx.shift_time(torch.linspace(1, 0, steps + 1), config["shift"])[:-1] * 1000
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(prompt, height=side, width=side, timesteps=grid.tolist(), guidance_scale=3.0, output_type="np",
                      latents=noise.clone(), use_resolution_binning=False).images
    ours = train_prx.sample(painter.model, noise, *painter.encoder.encode([prompt]), *painter.null, steps=steps,
                            cfg_scale=3.0, shift=config["shift"], predict=config["predict"])
    ours = (painter.vae.decode(ours) if painter.vae else ours) / 2 + 0.5
    return (torch.from_numpy(theirs).permute(0, 3, 1, 2) - ours.clamp(0, 1)).abs().max().item()


def usage(config: dict, pipeline: str, encoder: str, where: str, exact: bool = False) -> str:
    """The Python commands that load a pipeline's folder and paint; `exact`: on the trainer's own time grid. `encoder`:
    the class of a text encoder that was left on the hub, or ""."""
    side, source = config["resolution"], train_prx.TEXTS.get(config["text"], config["text"])
    lines, parts = ["import diffusers"], ""
    if encoder:
        lines += ["import transformers",
                  f"text_encoder = transformers.{encoder}.from_pretrained({source!r}, is_encoder_decoder=False)",
                  f"tokenizer = transformers.AutoTokenizer.from_pretrained({source!r}, "
                  f"model_max_length={config['text_tokens']})"]
        parts = ", text_encoder=text_encoder, tokenizer=tokenizer"
    lines.append(f"pipeline = diffusers.{pipeline}.from_pretrained({where!r}{parts})")
    time_grid = f"num_inference_steps={config['sample_steps']}"
    if exact:
        lines += ["pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)",
                  f"shift, steps = {config['shift']}, {config['sample_steps']}",
                  "grid = [1 - i / steps for i in range(steps)]",
                  "timesteps = [1000 * shift * t / (1 + (shift - 1) * t) for t in grid]"]
        time_grid = "timesteps=timesteps"
    binned = side in (1024,) if pipeline == "PRXPixelPipeline" else side in (256, 512, 1024)
    prompt = PROMPT if config["data"] == "scenes" else "a red ring"
    lines += [f"image = pipeline({prompt!r}, height={side}, width={side}, {time_grid}, "
              f"guidance_scale={max(1.0, config['cfg_scale'])}" + ", use_resolution_binning=False" * (not binned)
              + ").images[0]", "image.save('image.png')"]
    return "\n".join(lines)


def model_card(run: Path, config: dict, pipeline: str, encoder: str, where: str, difference: float, picture: bool):
    """README.md of an exported pipeline, from the run's own files."""
    changed = {k: v for k, v in config.items() if k in vars(train_prx.Config) and v != getattr(train_prx.Config, k)}
    finished = [record for record in read_metrics(run) if record.get("event") == "finished"]
    data = config["data"] + " (procedural, drawn by data/scenes.py; no rights of others)" * (config["data"] == "scenes")
    metrics = "Not evaluated.\n"
    if (run / "metrics.json").is_file():
        result = json.loads((run / "metrics.json").read_text())
        metrics = (f"```\n{table(result['metrics'], result.get('intervals'))}\n```\n"
                   f"Protocol {result.get('protocol_sha256', 'of an older version')}: "
                   + ", ".join(f"{k} {result['protocol'].get(k)}" for k in ("n", "sampler", "steps", "cfg_scale"))
                   + ". Feature networks: " + ", ".join(
                       f"{kind} {about['source']} ({about['sha256'][:12]})"
                       for kind, about in result["protocol"].get("features", {}).items()) + ".\n")
    frozen = [f"text encoder {train_prx.TEXTS.get(config['text'], config['text'])}"] * (config["text"] != "tiny")
    frozen += [f"VAE {train_prx.VAES.get(config['vae'], config['vae'])}"] * (config["vae"] != "none")
    trained = "".join(f"{record['samples']:,} images in {record['elapsed']:.0f} s from process start to final weights "
                      "on disk. " for record in finished[-1:])
    lower = ("\n\nCaptions were in lower case where data/prepare.py made them; write prompts so: this pipeline does "
             "not do it." if pipeline == "PRXPixelPipeline" and config["data"] != "scenes" else "")
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
license: other
license_name: see-licences
tags: [prx, text-to-image, {pipeline}]
---
# {run.name}

A PRX text-to-image model, {config['resolution']} px, exported for diffusers' `{pipeline}` (diffusers, transformers and
ftfy are needed).
{"![samples](samples.png)" if picture else ""}

## Use

```python
{usage(config, pipeline, encoder, where)}
```

The same time grid as the trainer's sampler (checked at export with 4 steps: the largest difference of an image in
[0, 1] was {difference:.1e}); diffusers' own grid is another one:

```python
{usage(config, pipeline, encoder, where, exact=True)}
```{lower}

## Metrics

{metrics}
## Recipe

{trained}Track {config['track']}, seed {config['seed']}. What differs from the defaults of `train_prx.py`:

```json
{json.dumps(changed, indent=1)}
```

## Data

{data}

## Licences

The code that trained it is Apache-2.0. These weights: to be stated by whoever publishes them, within the terms of the
data and of the frozen networks: {", ".join(frozen) or "here only the embedded text encoder, Apache-2.0"}.
"""


def upload(folder: Path, repository: str):
    """A folder to a (public) model repository on the Hugging Face hub."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repository)
    except Exception as error:  # no network, no login, no right: the hub has a dozen classes for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--push {repository} failed ({reason}); log in with `hf auth login`; {folder} is complete "
                        "and can be pushed later") from None
    print(f"pushed to https://huggingface.co/{repository}")
