"""The embedded text encoder is an ordinary Hugging Face folder, any other encoder loads the same way, and a tenth of
the captions is the empty prompt."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import train_prx as T
from data import scenes as S

TINY_TEXT = str(ROOT / "data/networks/text")


@pytest.fixture(scope="module")
def tiny():
    return T.TextEncoder(TINY_TEXT)


def test_padding_changes_nothing_and_is_masked(tiny):
    short, long = "a red ring.", "a small red ring in the top left and a large blue cross in the bottom right."
    alone, mask = tiny.encode([short])
    n = int(mask.sum())
    padded, padded_mask = T.TextEncoder(TINY_TEXT, max_tokens=40).encode([short, long])
    assert alone.shape[1] == 256 and padded.shape[1] == 40 and padded_mask[0].sum() == n < padded_mask[1].sum()
    assert torch.allclose(alone[0, :n], padded[0, :n], atol=1e-5)
    assert padded_mask[0, :n].all() and not padded_mask[0, n:].any()


def test_every_batch_has_one_shape_and_long_text_is_cut(tiny):
    encoder = T.TextEncoder(TINY_TEXT, max_tokens=24)
    for prompts in ([""], ["a dog"], ["a dog" * 100, "a"]):
        states, mask = encoder.encode(prompts)
        assert states.shape == (len(prompts), 24, encoder.width) and states.dtype == torch.float32
        assert mask.shape == (len(prompts), 24) and mask.dtype == torch.bool
    assert mask[0].all() and encoder.about == dict(text="text", width=encoder.width, max_tokens=24)
    tokens, mask = encoder.tokenize(["a dog", ""])  # what the loader reads and the trainer encodes
    assert torch.equal(encoder.states(tokens, mask), encoder.encode(["a dog", ""])[0])


def test_the_empty_prompt_and_any_bytes_can_be_encoded(tiny):
    states, mask = tiny.encode(["", "Ünïcödé 你好 🦊\x07", "a dog" * 100])
    assert states.isfinite().all() and mask.any(1).all() and states.shape[1] == 256
    tokens = tiny.tokenizer("你", add_special_tokens=False)["input_ids"]
    assert tiny.tokenizer.convert_ids_to_tokens(tokens)[-3:] == ["<0xE4>", "<0xBD>", "<0xA0>"]


@pytest.mark.parametrize("track", ["micro", "mini"])
def test_no_caption_of_the_scenes_is_cut(tiny, track):
    scenes = S.draw_scenes(range(3000), "train", S.difficulty_of(track))
    captions = S.captions(scenes) + S.captions(scenes, "short")
    assert max(map(len, tiny.tokenizer(captions)["input_ids"])) <= T.TRACKS[track][0].text_tokens


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
        encoder = T.TextEncoder(str(tmp_path / name), max_tokens=16)
        states, mask = encoder.encode(["a red ring", "a blue cross and a ring"])
        assert states.shape == (2, 16, 16) and mask.shape == (2, 16) and mask.any(1).all()


def test_an_encoder_that_cannot_be_had_is_one_sentence(tmp_path):
    for name in ("nobody/nothing", str(tmp_path / "gone")):
        with pytest.raises(T.UserError, match=f"--text {name} cannot be loaded .*give a local folder") as error:
            T.TextEncoder(name)
        assert "\n" not in str(error.value)


# --- captions as the loader hands them out

def captions_of(folder, batches=40, **knobs):
    """Captions of the samples, long and short, and the texts that the trainer got in their place."""
    c = dataclasses.replace(T.TRACKS["micro"][0], data=str(folder), batch=48, repa=0.0, **knobs)
    data, got = T.Shards(c), []

    def tokenize(texts):
        got.extend(texts)
        return torch.zeros(2, len(texts), 4, dtype=torch.int64)

    loader = T.Loader(data, c, T.Frozen(text=SimpleNamespace(tokenize=tokenize)), T.World())
    order = data.order()
    ids = np.concatenate([next(order) for _ in range(batches)])
    for _ in range(batches):
        next(loader)
    shards = np.searchsorted(data.first, ids, "right") - 1
    places = [(data.shards[s], int(i - data.first[s])) for s, i in zip(shards, ids)]
    return [[data.caption(*place, field) for place in places] for field in ("long", "short")], got


@pytest.mark.parametrize("share", [0.1, 0.0, 0.5, 1.0])
def test_caption_dropout_is_the_share_of_empty_prompts(scene_folder, share):
    """Of 1,920 samples; the others have their own captions."""
    (long, _), got = captions_of(scene_folder, captions="long", caption_dropout=share)
    empty = [text == "" for text in got]
    assert len(got) == 1920 and np.mean(empty) == pytest.approx(share, abs=0.03)
    assert all(text == own for text, own, dropped in zip(got, long, empty) if not dropped)


def test_a_track_drops_a_tenth_of_the_captions():
    assert {c.caption_dropout for c, _ in T.TRACKS.values()} == {0.1}


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_a_caption_mix_has_its_share_of_short_captions(scene_folder, share):
    (long, short), got = captions_of(scene_folder, captions=f"mix:{share}", caption_dropout=0.0)
    assert np.mean([text == s for text, s in zip(got, short)]) == pytest.approx(share, abs=0.03)
    assert all(text in pair for text, *pair in zip(got, long, short))


def test_stored_text_is_padded_to_one_shape():
    c = dataclasses.replace(T.Config(), text_tokens=80)
    states, mask = T.pack_text([torch.full((n, 3), float(n)) for n in (1, 33, 80)], c, None)
    assert states.shape == (3, 80, 3) and mask.shape == (3, 80) and mask.sum(1).tolist() == [1, 33, 80]
    assert all((row[m] == len(row[m])).all() and (row[~m] == 0).all() for row, m in zip(states, mask))
    assert all(m[:n].all() for m, n in zip(mask, (1, 33, 80)))
