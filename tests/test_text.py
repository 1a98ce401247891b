"""The embedded text encoder is an ordinary Hugging Face folder, and any other encoder loads the same way."""

import numpy as np
import pytest
import torch

import train_prx as T
from data.encoders import TextEncoder
from data import scenes as S


@pytest.fixture(scope="module")
def tiny():
    return TextEncoder("tiny")


def test_padding_changes_nothing_and_is_masked(tiny):
    short, long = "a red ring.", "a small red ring in the top left and a large blue cross in the bottom right."
    alone, mask = tiny.encode([short])
    n = int(mask.sum())
    padded, padded_mask = TextEncoder("tiny", max_tokens=80, pad=40).encode([short, long])
    assert padded.shape[1] == 40 and padded_mask[0].sum() == n
    assert torch.allclose(alone[0, :n], padded[0, :n], atol=1e-5)


def test_the_empty_prompt_and_any_bytes_can_be_encoded(tiny):
    states, mask = tiny.encode(["", "Ünïcödé 你好 🦊\x07", "a dog" * 100])
    assert states.isfinite().all() and mask.any(1).all() and states.shape[1] <= 256
    tokens = tiny.tokenizer("你", add_special_tokens=False)["input_ids"]
    assert tiny.tokenizer.convert_ids_to_tokens(tokens)[-3:] == ["<0xE4>", "<0xBD>", "<0xA0>"]


def test_long_captions_of_the_micro_track_fit_one_shape(tiny):
    captions = S.captions(S.draw_scenes(range(3000)))
    assert max(map(len, tiny.tokenizer(captions)["input_ids"])) <= T.TRACKS["micro"][0].text_pad


def test_the_state_of_a_place_name_knows_the_colour_that_stands_there(tiny):
    """A ridge regression on the states of "top" and "bottom" reads the colour of the object there, on held-out text."""
    scenes = S.draw_scenes(range(3000), "eval")
    texts, features, colours = S.captions(scenes), [], []
    for i in np.nonzero((scenes.place >= 0).sum(1) == 2)[0][:1200]:
        states, _ = tiny.encode([texts[i]])
        tokens = tiny.tokenizer.convert_ids_to_tokens(tiny.tokenizer(texts[i])["input_ids"])
        at = [j for j, token in enumerate(tokens) if token.strip("▁") in ("top", "bottom")]
        assert len(at) == 2, texts[i]
        features += [states[0, j] for j in at]
        colours += [scenes.colour[i, k] for k in
                    sorted(range(2), key=lambda k: texts[i].index(S.PLACES[2][scenes.place[i, k]]))]
    x, y, half = torch.stack(features).double(), torch.tensor(np.array(colours)), len(colours) // 2
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    gram, target = x[:half].T @ x[:half] + torch.eye(x.shape[1]), torch.nn.functional.one_hot(y[:half], 6).double()
    weights = torch.linalg.solve(gram, x[:half].T @ target)
    assert ((x[half:] @ weights).argmax(1) == y[half:]).double().mean() > 0.8  # chance is 0.17


def test_other_encoder_families_load_the_same_way(tmp_path, tiny):
    from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

    size = dict(vocab_size=len(tiny.tokenizer))
    t5 = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **size)
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **size)
    for name, model in (("t5", T5EncoderModel(t5)), ("bert", BertModel(bert))):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer.save_pretrained(tmp_path / name)
        states, mask = TextEncoder(str(tmp_path / name)).encode(["a red ring", "a blue cross and a ring"])
        assert states.shape[-1] == 16 and states.shape[:2] == mask.shape
