"""Text encoders and autoencoders of other kinds than the trainer's own: they work, or one sentence says why not."""

import pytest
import torch
from safetensors.torch import load_file
from test_prepare import encode, folder, picture, run

import train_prx as T


def words(path, **tokens):
    """A tokenizer of whole words that adds no tokens of its own: it makes nothing of the empty prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "</s>", "a", "red", "ring", "blue", "cross", "and", "big"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **tokens).save_pretrained(path)
    return len(vocabulary)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of small random networks by the name of their kind."""
    import transformers as tf

    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    count = words(root / "gpt2", eos_token="</s>")
    tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=count, n_embd=16, n_layer=2, n_head=2)).save_pretrained(root / "gpt2")
    words(root / "qwen3", eos_token="</s>", padding_side="left")
    tf.Qwen3ForCausalLM(tf.Qwen3Config(vocab_size=count, num_key_value_heads=1, head_dim=8, **small)).save_pretrained(
        root / "qwen3")
    words(root / "llama", eos_token="</s>", bos_token="</s>")
    tf.LlamaModel(tf.LlamaConfig(vocab_size=count, **small)).save_pretrained(root / "llama")
    text = dict(vocab_size=count, max_position_embeddings=24, bos_token_id=1, eos_token_id=1, pad_token_id=1, **small)
    vision = dict(image_size=8, patch_size=4, **small)
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    for name in ("clip", "clip-text"):
        words(root / name, eos_token="</s>", pad_token="</s>")
    tf.CLIPModel(config).save_pretrained(root / "clip")
    tf.CLIPTextModel(config.text_config).save_pretrained(root / "clip-text")
    words(root / "no padding")
    tf.LlamaModel(tf.LlamaConfig(vocab_size=count, **small)).save_pretrained(root / "no padding")
    words(root / "vision", eos_token="</s>")
    tf.ViTModel(tf.ViTConfig(image_size=8, patch_size=4, **small)).save_pretrained(root / "vision")
    return root


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "llama", "clip", "clip-text"])
def test_decoder_only_models_and_clips_are_text_encoders(encoders, kind):
    encoder = T.TextEncoder(str(encoders / kind), max_tokens=12)
    states, mask = encoder.encode(["a red ring", "a blue cross and a big red ring", ""])
    assert states.shape == (3, 12, 16) and encoder.width == 16 and states.isfinite().all()
    tokens = [len(encoder.tokenizer(text)["input_ids"]) for text in ("a red ring", "a blue cross and a big red ring")]
    assert mask.sum(1).tolist() == [*tokens, 1 if kind != "llama" else mask[2].sum().item()]
    assert all(m[:m.sum()].all() for m in mask)  # as the trainer packs stored text: real tokens first
    alone, _ = encoder.encode(["a red ring"])
    assert torch.allclose(alone[0, :tokens[0]], states[0, :tokens[0]], atol=1e-5)  # padding changes nothing


@pytest.mark.parametrize("kind, max_tokens, says", [
    ("no padding", 12, "--text .*no padding cannot be loaded"), ("vision", 12, "--text .*vision cannot be loaded"),
    ("clip", 40, "--text .*clip cannot be loaded .*24")])
def test_an_encoder_that_cannot_work_is_one_sentence(encoders, kind, max_tokens, says):
    with pytest.raises(T.UserError, match=says) as error:
        T.TextEncoder(str(encoders / kind), max_tokens=max_tokens)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    import diffusers

    root = tmp_path_factory.mktemp("autoencoders")
    diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                              num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(root / "tiny")
    diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(root / "vq")
    diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                          down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2).save_pretrained(
                              root / "unet")
    return root


@pytest.mark.parametrize("kind", ["tiny", "vq", "unet"])
def test_an_autoencoder_without_a_posterior_is_one_sentence(autoencoders, tmp_path, kind):
    with pytest.raises(T.UserError, match=f"--vae .*{kind} cannot be loaded") as error:
        T.VAE(str(autoencoders / kind))
    assert "\n" not in str(error.value)
    source = folder(tmp_path / "in", {"a.png": encode(picture())}, [{"file_name": "a.png", "text": "x"}])
    if kind == "vq":
        done = run(source, "--out", tmp_path / "out", "--store", "latent", "--vae", autoencoders / kind)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr


def test_latents_by_a_decoder_only_model_are_prepared_and_trained_on(encoders, tmp_path):
    from data import prepare as prep

    images = {f"{i}.png": encode(picture(i)) for i in range(4)}
    source = folder(tmp_path / "in", images, [{"file_name": name, "text": "a red ring"} for name in images])
    index = prep.prepare(source, tmp_path / "out", store="image,text", text=str(encoders / "qwen3"), text_tokens=12,
                         eval_share=0)
    assert index["text"] == {"text": "qwen3", "width": 16, "max_tokens": 12}
    assert load_file(tmp_path / "out/empty.safetensors")["text"].shape == (1, 16)
