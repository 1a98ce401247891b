"""Frozen networks: VAE and text encoder, whose output data/prepare.py stores and train_prx.py computes where it is not
stored, and the teacher of REPA and P-DINO."""

import hashlib
import importlib
from pathlib import Path

import torch
import torch.nn.functional as F

from train_prx import TEACHERS, TEXTS, VAES, UserError


def quiet_import(name: str):
    """transformers or diffusers (seconds each, so only where they are used), without their progress bars."""
    module = importlib.import_module(name)
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def unavailable(knob: str, name: str, error: Exception, instead: str) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"--{knob} {name} cannot be loaded ({reason}); if the repository is gated, accept its licence on "
                     f"its page and log in with `hf auth login`; or give a local folder, or {instead}")


class VAE:
    """A frozen autoencoder of diffusers: AutoencoderKL (FLUX.1, REPA-E), AutoencoderDC, AutoencoderKLFlux2.

    encode: uint8 (B, 3, H, W) -> latents FP32 (B, channels, H / factor, W / factor), normalised as diffusers' pipelines
    undo it: (z - shift) * scale, or for FLUX.2 packed 2 x 2 and whitened by its batch norm. The posterior's mode, not a
    sample: deterministic, and FLUX's posterior is narrow. decode: latents -> FP32 (B, 3, H, W) in [-1, 1].
    FP32 where the VAE asks for it (force_upcast) and on CPUs, else BF16. `about` goes into the index of prepared data.
    """

    def __init__(self, name: str, device="cpu"):
        diffusers = quiet_import("diffusers")
        folder = VAES.get(name, name)
        try:
            for sub in ("vae", None):  # part of a pipeline, or the repository itself
                try:
                    config = diffusers.AutoencoderKL.load_config(folder, subfolder=sub)
                    break
                except OSError:
                    if sub is None:
                        raise
            cls = getattr(diffusers, config["_class_name"])
            self.model = cls.from_pretrained(folder, subfolder=sub, use_safetensors=True)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise unavailable("vae", name, error, "use --vae none (pixel space)") from None
        c = self.model.config
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + tensor.float().contiguous().numpy().tobytes())
        wide = torch.device(device).type == "cpu" or c.get("force_upcast", False)
        self.dtype, self.device = torch.float32 if wide else torch.bfloat16, device
        self.packed = cls.__name__ == "AutoencoderKLFlux2"
        self.scale = 1.0 if self.packed else float(c.get("scaling_factor") or 1.0)
        self.shift = 0.0 if self.packed else float(c.get("shift_factor") or 0.0)
        if self.packed:  # the mean and deviation of each packed channel, before they are rounded
            self.mean = self.model.bn.running_mean.float().view(1, -1, 1, 1).to(device)
            self.std = (self.model.bn.running_var.float() + c.batch_norm_eps).sqrt().view(1, -1, 1, 1).to(device)
        self.model.to(device, self.dtype).eval().requires_grad_(False)
        probe = self.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        self.channels, self.factor = probe.shape[1], 64 // probe.shape[2]
        self.about = dict(vae=name if name in VAES else Path(name).name, type=cls.__name__, channels=self.channels,
                          factor=self.factor, scale=self.scale, shift=self.shift, sha256=digest.hexdigest())

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        parts = [self.model.encode((x.to(self.device).float() / 127.5 - 1).to(self.dtype)) for x in images.split(16)]
        z = torch.cat([x.latent if hasattr(x, "latent") else x.latent_dist.mode() for x in parts]).float()
        if self.packed:
            return (F.pixel_unshuffle(z, 2) - self.mean) / self.std
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        z = (F.pixel_shuffle(latents * self.std + self.mean, 2) if self.packed else latents / self.scale + self.shift)
        return torch.cat([self.model.decode(row.to(self.dtype)).sample.float() for row in z.split(8)])


class TextEncoder:
    """encode(prompts) -> last hidden states (B, T, width) FP32 and mask (B, T) bool, T a multiple of `pad`.

    Any Hugging Face encoder, or the encoder of a T5 or T5Gemma. Prompts are taken as they are; data/prepare.py has
    cleaned captions as diffusers' PRXPipeline cleans its prompts. Raises UserError when the weights cannot be had.
    """

    def __init__(self, name: str, device="cpu", max_tokens: int = 256, pad: int = 8):
        transformers = quiet_import("transformers")
        folder = TEXTS.get(name, name)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        encoders = {"t5gemma": transformers.T5GemmaEncoderModel, "t5": transformers.T5EncoderModel}
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            config.is_encoder_decoder = False
            cls = encoders.get(config.model_type, transformers.AutoModel)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            self.model = cls.from_pretrained(folder, config=config, use_safetensors=True, dtype=dtype)
        except (OSError, ValueError) as error:
            raise unavailable("text", name, error, "use --text tiny (the words of the scenes)") from None
        self.model.to(device).eval().requires_grad_(False)
        self.device, self.max_tokens, self.pad = device, max_tokens, pad
        self.width = self.encode([""])[0].shape[-1]
        self.about = dict(text=name if name in TEXTS else Path(name).name, width=self.width, max_tokens=max_tokens)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenizer(prompts, padding=True, pad_to_multiple_of=self.pad, truncation=True,
                                max_length=self.max_tokens, return_tensors="pt").to(self.device)
        states = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        return states.float(), tokens["attention_mask"].bool()


class Teacher:
    """A frozen vision transformer of transformers (DINOv3, DINOv2 with or without registers).

    teacher(images FP32 (B, 3, H, W) in [-1, 1], rows, columns) -> patch tokens (B, rows * columns, width) FP32, of the
    images resized so that its patches are that grid (bicubic, antialiased) and normalised as ImageNet's.
    """

    def __init__(self, knob: str, name: str, device="cpu"):
        transformers = quiet_import("transformers")
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        try:
            folder = TEACHERS.get(name, name)
            self.model, report = transformers.AutoModel.from_pretrained(folder, use_safetensors=True, dtype=dtype,
                                                                        output_loading_info=True)
            if report["missing_keys"]:  # they would be drawn at random
                raise ValueError(f"it lacks weights such as {sorted(report['missing_keys'])[0]}")
            self.patch, self.width = self.model.config.patch_size, self.model.config.hidden_size
        except (OSError, ValueError, AttributeError) as error:
            raise unavailable(knob, name, error, f"use --{knob} tiny (trained on scenes)") from None
        self.model.to(device).eval().requires_grad_(False)
        self.special = 1 + getattr(self.model.config, "num_register_tokens", 0)
        self.mean, self.std = (torch.tensor(x, device=device).view(1, 3, 1, 1)
                               for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def __call__(self, images, rows: int, columns: int):
        size = rows * self.patch, columns * self.patch
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
        x = ((images / 2 + 0.5 - self.mean) / self.std).to(self.model.dtype)
        return self.model(pixel_values=x).last_hidden_state[:, self.special:].float()
