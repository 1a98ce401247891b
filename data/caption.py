"""Captions for images that have none, by an image-text-to-text model of transformers.

    python data/caption.py photos/ --model Qwen/Qwen2.5-VL-7B-Instruct     # writes photos/metadata.jsonl
    python data/prepare.py photos/ --out shards --size 256                 # which this then reads

Every image in the folder and its subfolders that has no `text` in metadata.jsonl (the Hugging Face ImageFolder
convention) gets a line {"file_name": ..., "text": a long caption, "text_short": a short one}. Lines are appended image
by image: a run that was stopped goes on where it stopped, and captions that are there are kept. Other fields of an
image's line are copied to its new line. Bad images are named and skipped. On a GPU in BF16, else in FP32.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.shards import UserError, command, read_picture  # noqa: E402
from data.sources import IMAGE_EXTENSIONS, split_path, walk  # noqa: E402

MAX_SIDE = 1024  # pixels; larger images are shrunk: tokens and time grow with the area, captions gain little (a guess)
PROMPTS = {  # kind: (instruction, most new tokens); long ones are about as long as PRX part 2's, about 160 words
    "long": ("Describe everything in this image: the objects, their number, colours, sizes and places, the background, "
             "the light and the style. Answer with the description only, in 80 to 150 words.", 256),
    "short": ("Describe this image in at most 12 words. Answer with the description only.", 32)}


@functools.cache
def load_transformers():
    """transformers, quiet, and with processors that leave their video half out: it needs torchvision, images do not."""
    import transformers  # seconds

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parts = transformers.ProcessorMixin.get_attributes.__func__
    transformers.ProcessorMixin.get_attributes = classmethod(lambda c: [p for p in parts(c) if p != "video_processor"])
    return transformers


class Captioner:
    """A frozen image-text-to-text model from a Hugging Face repository or a local folder, safetensors only.

    The model's own code is never run: what transformers does not know is refused. Greedy decoding: the same images
    always get the same captions. `flag` is what the error names: the option that the model's name came from.
    Raises UserError when the model cannot be had or is of another kind.
    """

    def __init__(self, name: str, device="cpu", batch_size: int = 8, flag: str = "--caption"):
        transformers = load_transformers()
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        try:
            self.model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
            if report["missing_keys"]:  # they would be drawn at random
                raise ValueError(f"its weights lack {min(report['missing_keys'])}")
            # with PIL: the default image processors are torchvision's where that is installed, and differ a little
            self.processor = transformers.AutoProcessor.from_pretrained(
                name, backend="pil", video_processor=None, trust_remote_code=False)
            if not hasattr(self.processor, "image_processor"):
                raise ValueError("it has no image processor")
        except Exception as error:  # OSError, ValueError, ImportError, KeyError, SafetensorError, RuntimeError, ...
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{flag} {name} cannot be loaded ({reason}); give the Hugging Face repository (if it is "
                            "gated, log in with `hf auth login`) or the local folder of an image-text-to-text model "
                            "with safetensors weights") from None
        self.model.to(device).eval().requires_grad_(False)
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # so that every row of a batch goes on right after its prompt
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def caption(self, images: list[Image.Image]) -> list[dict]:
        """{"long": str, "short": str} per image, which is shrunk to MAX_SIDE first; "" where the model says nothing."""
        images = [shrink(image) for image in images]
        answers = {kind: [] for kind in PROMPTS}
        for start in range(0, len(images), self.batch_size):
            for kind, (prompt, tokens) in PROMPTS.items():
                answers[kind] += self.answer(images[start:start + self.batch_size], prompt, tokens)
        return [dict(zip(answers, row)) for row in zip(*answers.values())]

    @torch.inference_mode()
    def answer(self, images: list[Image.Image], prompt: str, max_new_tokens: int) -> list[str]:
        """One answer per image, without the prompt, on one line."""
        if self.processor.chat_template or self.tokenizer.chat_template:
            text = {"type": "text", "text": prompt}
            talks = [[{"role": "user", "content": [{"type": "image", "image": image}, text]}] for image in images]
            inputs = self.processor.apply_chat_template(
                talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                processor_kwargs={"padding": True})
        else:
            text = f"{getattr(self.processor, 'image_token', None) or '<image>'}\n{prompt}"
            inputs = self.processor(images=[[image] for image in images], text=[text] * len(images), padding=True,
                                    return_tensors="pt")
        inputs = inputs.to(self.device, self.dtype)  # the dtype is for floats: pixels, not token ids
        out = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
                                  pad_token_id=self.tokenizer.pad_token_id)
        n = inputs["input_ids"].shape[1]
        if torch.equal(out[:, :n], inputs["input_ids"]):  # not so in encoder-decoders: they return the answer only
            out = out[:, n:]
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]


def shrink(image: Image.Image) -> Image.Image:
    """RGB, at most MAX_SIDE pixels on the longer side."""
    image = image.convert("RGB")
    scale = min(1, MAX_SIDE / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


# ---- a folder --------------------------------------------------------------------------------------------------------


def read_metadata(file: Path) -> tuple[dict[str, dict], int]:
    """Fields by file_name, later lines over earlier ones; bytes up to a last line that a crash cut short."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    entries, end = {}, sum(map(len, lines))
    for line in lines:
        try:
            entry = json.loads(line)
            entries[entry["file_name"]] = entries.get(entry["file_name"], {}) | entry
        except (ValueError, TypeError, KeyError):  # a whole line that is bad stays; data/prepare.py will name it
            if not line.endswith(b"\n"):
                end -= len(line)
    return entries, end


def caption_folder(folder, name: str, device="cpu", batch_size: int = 8) -> tuple[int, int]:
    """Captions the images of `folder` that have none: (captioned, skipped). Raises UserError as the Captioner does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds images")
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}: give 1 or more")
    found = walk(folder)
    names = sorted(name for name in found if split_path(name)[2] in IMAGE_EXTENSIONS)
    if not names:
        raise UserError(f"{folder} holds no images ({', '.join(IMAGE_EXTENSIONS)}, subfolders included)")
    metadata = folder / "metadata.jsonl"
    beside = [f"{name.rpartition('.')[0]}.txt" for name in names] + ["metadata.csv", "metadata.parquet"]
    if not metadata.exists() and (hidden := [name for name in beside if name in found]):
        line = command("data/prepare.py", folder, "--out", "shards", "--size", 256, "--caption", name)
        raise UserError(f"{folder} holds captions in {hidden[0]}, which a metadata.jsonl would hide; for the images that "
                        f"have none: {line}")
    entries, end = read_metadata(metadata)
    todo = [n for n in names if not str(entries.get(n, {}).get("text") or "").strip()]
    done = 0
    if todo:
        captioner = Captioner(name, device, batch_size, flag="--model")
        with open(metadata, "ab+") as out, tqdm(total=len(todo), unit=" images", disable=None) as bar:
            out.truncate(end)
            out.seek(max(0, end - 1))
            if out.read(1) not in (b"", b"\n"):  # a whole line that only lacks its end
                out.write(b"\n")
            for start in range(0, len(todo), batch_size):
                images = {}
                for n in todo[start:start + batch_size]:
                    try:
                        images[n] = read_picture((folder / n).read_bytes())
                    except (UserError, OSError) as error:
                        bar.write(f"skipped {n!r}: {error}")
                for n, answer in zip(images, captioner.caption(list(images.values()))):
                    if answer["long"]:
                        fields = {"file_name": n, "text": answer["long"], "text_short": answer["short"]}
                        out.write(json.dumps(entries.get(n, {}) | fields).encode() + b"\n")
                        out.flush()
                        done += 1
                    else:
                        bar.write(f"skipped {n!r}: the model said nothing")
                bar.update(min(batch_size, len(todo) - start))
    skipped = len(todo) - done
    print(f"captioned {done} of {len(names)} images, {len(names) - len(todo)} had captions, {skipped} were skipped; "
          f"next:\n{command('data/prepare.py', folder, '--out', 'shards', '--size', 256)}")
    return done, skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", help="a folder of images")
    parser.add_argument("--model", required=True, metavar="NAME", help="Hugging Face repository or local folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time [%(default)s]")
    args = parser.parse_args()
    try:
        caption_folder(args.folder, args.model, args.device, args.batch_size)
    except (UserError, OSError) as error:  # OSError: a full disk, no permission
        print(f"caption.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
