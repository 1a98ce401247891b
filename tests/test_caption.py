"""Promises of data/caption.py, on a tiny random Qwen2-VL in the real format, with a vocabulary of whole words."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data.caption as C
from data.shards import UserError, read_picture

SPECIAL = ["<pad>", "<unk>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """{% for message in messages %}user : {% for part in message['content'] %}{% if part['type'] == 'image' %}
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}
{% if add_generation_prompt %}assistant : {% endif %}"""


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]+", text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder as on the hub. Its own generation settings sample, and images of other sizes give other lengths."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("models") / "qwen"
    prompts = " ".join(prompt for prompt, _ in C.PROMPTS.values())
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(SPECIAL + words("user assistant red cat " + prompts)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>",
                                           eos_token="<eos>", extra_special_tokens=SPECIAL[3:])
    tokenizer.chat_template = TEMPLATE
    ids = {f"{name}_token_id": vocabulary[f"<|{token}|>"] for name, token in dict(
        image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end").items()}
    config = tf.Qwen2VLConfig(
        text_config=dict(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, pad_token_id=0,
                         bos_token_id=2, eos_token_id=2, rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3])),
        vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, initializer_range=0.3),
        **ids)
    torch.manual_seed(0)
    network = tf.Qwen2VLForConditionalGeneration(config)
    network.generation_config.update(do_sample=True, temperature=1.5, top_k=50)
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    tf.Qwen2VLImageProcessorPil(size=dict(shortest_edge=4 * 28**2, longest_edge=16 * 28**2)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def captioner(model):
    return C.Captioner(str(model))


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pictures() -> list[Image.Image]:
    return [picture(0, 60, 60), picture(1, 150, 60), picture(2, 60, 100)]


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def album(tmp_path):
    """Four good images, one of them captioned by hand, one of them in a subfolder, and two that are none."""
    folder = tmp_path / "photos"
    (folder / "cats").mkdir(parents=True)
    for i, name in enumerate(["a.jpg", "b.PNG", "cats/c.webp", "d.jpeg"]):
        picture(i, 60 + 20 * i, 60).save(folder / name)
    (folder / "bad.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    by_hand = [{"file_name": "b.PNG", "text": "by hand"}, {"file_name": "d.jpeg", "author": "me"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, by_hand)))  # the last line lacks its end
    return folder


# ---- the captioner ---------------------------------------------------------------------------------------------------


def test_answers_hold_words_and_no_prompt(captioner):
    answers = captioner.caption(pictures())
    for kind, (prompt, tokens) in C.PROMPTS.items():
        texts = [answer[kind] for answer in answers]
        assert all(0 < len(words(text)) <= tokens for text in texts) and len(set(texts)) == 3
        assert not any(re.search("<.*>|user : |assistant :|\n", text) for text in texts)
        assert not any(" ".join(words(prompt)[:5]) in text for text in texts)
    assert captioner.caption([]) == []


def test_captions_depend_neither_on_the_batch_nor_on_chance(captioner, model):
    images = pictures()
    together = captioner.caption(images)
    assert together == captioner.caption(images)
    assert together == [captioner.caption([image])[0] for image in images]
    assert together == C.Captioner(str(model), batch_size=2).caption(images)
    sizes = captioner.processor.image_processor(images, return_tensors="pt")["image_grid_thw"].prod(1)
    assert len(set(sizes.tolist())) == 3  # so that the batches above were padded


def test_a_model_without_chat_template_gets_a_plain_prompt(model, tmp_path):
    shutil.copytree(model, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    captioner = C.Captioner(str(tmp_path / "plain"))
    assert not captioner.processor.chat_template
    together = captioner.caption(pictures())
    assert together == [captioner.caption([image])[0] for image in pictures()] and all(a["short"] for a in together)
    assert not any(" ".join(words(C.PROMPTS["long"][0])[:5]) in answer["long"] for answer in together)


def test_a_model_that_could_do_videos_needs_no_torchvision(captioner):
    assert type(captioner.processor.image_processor).__name__.endswith("Pil")
    assert getattr(captioner.processor, "video_processor", None) is None


def test_images_are_shrunk_to_1024_pixels_and_made_rgb():
    assert C.shrink(picture(0, 2048, 512)).size == (1024, 256)
    assert C.shrink(picture(0, 1, 5000)).size == (1, 1024)
    small = picture(0, 1024, 3)
    assert np.array_equal(C.shrink(small), small)
    assert C.shrink(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_what_cannot_be_loaded_is_named(model, tmp_path):
    def error(name: str, **kwargs) -> str:
        with pytest.raises(UserError) as caught:
            C.Captioner(str(name), **kwargs)
        assert "\n" not in str(caught.value) and str(name) in str(caught.value)
        return str(caught.value)

    assert error(tmp_path / "nowhere").startswith("--caption ")
    assert error("nobody/nothing", flag="--model").startswith("--model nobody/nothing cannot be loaded")
    assert "image-text-to-text" in error(Path(C.__file__).parent / "networks" / "text")  # a text encoder
    tensors = load_file(model / "model.safetensors")
    shutil.copytree(model, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\1" * 100)
    error(tmp_path / "broken")
    lacking = min(tensors)
    save_file({k: v for k, v in tensors.items() if k != lacking}, tmp_path / "broken" / "model.safetensors",
              metadata={"format": "pt"})
    assert "weights lack" in error(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "broken" / "pytorch_model.bin")  # a pickle is never opened
    assert "safetensors" in error(tmp_path / "broken")


# ---- a folder --------------------------------------------------------------------------------------------------------


def test_a_folder_is_captioned_and_what_was_there_is_kept(model, tmp_path, capsys):
    folder = album(tmp_path)
    before = (folder / "metadata.jsonl").read_bytes()
    assert C.caption_folder(folder, str(model), batch_size=2) == (3, 1)
    assert (folder / "metadata.jsonl").read_bytes().startswith(before + b"\n")
    new = {line["file_name"]: line for line in lines(folder)[2:]}
    assert list(new) == ["a.jpg", "cats/c.webp", "d.jpeg"] and new["d.jpeg"]["author"] == "me"
    image = read_picture(folder / "cats" / "c.webp")
    assert C.Captioner(str(model)).caption([image]) == [{"long": new["cats/c.webp"]["text"],
                                                          "short": new["cats/c.webp"]["text_short"]}]
    out = capsys.readouterr().out
    assert "skipped 'bad.jpg'" in out and "captioned 3 of 5 images, 1 had captions, 1 were skipped" in out
    after = (folder / "metadata.jsonl").read_bytes()
    assert C.caption_folder(folder, str(model)) == (0, 1) and (folder / "metadata.jsonl").read_bytes() == after


def test_captions_of_other_kinds_are_not_hidden(tmp_path, capsys):
    for kind in ("a.txt", "metadata.csv", "metadata.parquet"):
        (tmp_path / kind / ".cache").mkdir(parents=True)
        for name in ("a.png", ".cache/hidden.png"):
            picture(0, 60, 60).save(tmp_path / kind / name)
        (tmp_path / kind / kind).write_text("by hand")
        with pytest.raises(UserError, match=rf"holds captions in {kind}, which a metadata.jsonl would hide; .*--cap"):
            C.caption_folder(tmp_path / kind, "some/model")
        assert not (tmp_path / kind / "metadata.jsonl").exists()


def test_hidden_images_get_no_caption_and_the_printed_command_runs(model, tmp_path, capsys):
    folder = tmp_path / "my photos"
    for name in ("a.png", ".cache/b.png", "@eaDir/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0, 300, 300).save(folder / name)
    assert C.caption_folder(folder, str(model)) == (1, 0)
    line = capsys.readouterr().out.splitlines()[-1].replace("--out shards", f"--out {tmp_path}/shards --eval-share 0")
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "kept 1 of 1 images" in done.stdout, done.stderr


def test_a_killed_run_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    whole = album(tmp_path)
    folder = shutil.copytree(whole, tmp_path / "killed")
    C.caption_folder(whole, str(model), batch_size=1)
    caption, calls, on_disk = C.Captioner.caption, [], []

    def killed(self, images):
        calls.extend(images)
        if images and len(calls) == 2:
            on_disk.extend(line["file_name"] for line in lines(folder))
            raise KeyboardInterrupt
        return caption(self, images)

    monkeypatch.setattr(C.Captioner, "caption", killed)
    with pytest.raises(KeyboardInterrupt):
        C.caption_folder(folder, str(model), batch_size=1)
    assert on_disk == ["b.PNG", "d.jpeg", "a.jpg"]
    with open(folder / "metadata.jsonl", "ab") as file:
        file.write((whole / "metadata.jsonl").read_bytes().splitlines()[3][:-20])  # a crash in the middle of a line
    assert C.caption_folder(folder, str(model), batch_size=1) == (2, 1)
    assert len(calls) == 4  # two before the end, two after it: nothing is captioned twice but what was cut
    assert (folder / "metadata.jsonl").read_bytes() == (whole / "metadata.jsonl").read_bytes()


def test_the_script_says_what_is_wrong_with_exit_code_2(tmp_path, monkeypatch, capsys):
    def run(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["caption.py", *argv])
        with pytest.raises(SystemExit) as caught:
            C.main()
        return caught.value.code, capsys.readouterr().err

    code, message = run(str(tmp_path / "none"), "--model", "x")
    assert code == 2 and message == f"caption.py: {tmp_path / 'none'} is not a folder; give one that holds images\n"
    assert "holds no images" in run(str(tmp_path), "--model", "x")[1]
    picture(0, 60, 60).save(tmp_path / "a.png")
    assert run(str(tmp_path), "--model", "x", "--batch-size", "0")[0] == 2
    code, message = run(str(tmp_path), "--model", str(tmp_path / "no-model"))
    assert code == 2 and "--model" in message and "cannot be loaded" in message
    assert not (tmp_path / "metadata.jsonl").exists()
