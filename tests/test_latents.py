"""Latents and text as diffusers' pipelines see them, runs in latents from start to export, and --init."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval_prx
import train_prx as T
from data import encoders
from data.preflight import read_metrics
from data.settings import parse_args
from data.encoders import VAE, TextEncoder

KL = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
          block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
RUN = ("--track micro --repa 0 --ema 0.99 --hidden 32 --heads 2 --depth 2 --batch 8 --samples 0 --sample-steps 2 --compile off "
       "--compute fp32 --resolution 64").split()


def small_vae(kind: str):
    import diffusers

    torch.manual_seed(0)
    if kind == "flux":
        vae = diffusers.AutoencoderKL(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **KL)
    elif kind == "sd":  # no shift
        vae = diffusers.AutoencoderKL(latent_channels=4, **KL)
    elif kind == "flux2":
        vae = diffusers.AutoencoderKLFlux2(latent_channels=8, **KL)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    else:
        vae = diffusers.AutoencoderDC(latent_channels=8, encoder_block_out_channels=(8, 8, 16), scaling_factor=0.41407,
                                      decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1),
                                      decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()),
                                      decoder_qkv_multiscales=((), (), ()), encoder_block_types="ResBlock",
                                      decoder_block_types="ResBlock", attention_head_dim=8)
    return vae.eval()


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vaes")
    for kind in ("flux", "sd", "flux2", "dc-ae"):
        small_vae(kind).save_pretrained(folder / kind / ("vae" if kind == "flux" else ""))  # as part of a pipeline, or alone
    return folder


@pytest.fixture(scope="module")
def t5gemma(tmp_path_factory):
    """A small random T5Gemma encoder with the embedded tokenizer, in the format of the real one."""
    from transformers import AutoTokenizer, T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    folder = tmp_path_factory.mktemp("t5gemma")
    tokenizer = AutoTokenizer.from_pretrained(T.TEXTS["tiny"])
    module = T5GemmaModuleConfig(vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=1, head_dim=12, sliding_window=64)
    torch.manual_seed(0)
    T5GemmaEncoderModel(T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pipeline(vae=None, text=None, tokenizer=None):
    """diffusers' pipeline around a transformer that outputs zero: what goes in as latents is what it decodes."""
    import diffusers

    channels = vae.config.latent_channels if vae else 4
    transformer = diffusers.PRXTransformer2DModel(in_channels=channels, patch_size=1, context_in_dim=24, hidden_size=32,
                                                  num_heads=2, depth=1, axes_dim=[8, 8])
    torch.nn.init.zeros_(transformer.final_layer.linear.weight)
    torch.nn.init.zeros_(transformer.final_layer.linear.bias)
    return diffusers.PRXPipeline(transformer, diffusers.FlowMatchEulerDiscreteScheduler(), text, tokenizer, vae)


def photo(n=2, height=64, width=96):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows = [127 + 120 * torch.sin(i + c + x / (9 + c) + (c + 1) * y / 17) for i in range(n) for c in range(3)]
    return torch.stack(rows).view(n, 3, height, width).to(torch.uint8)


# --- VAEs

@pytest.mark.parametrize("kind", ["flux", "sd", "dc-ae"])
def test_latents_decoded_by_the_diffusers_pipeline_are_the_vaes_own_reconstruction(vaes, kind):
    """Bit for bit the same picture as the VAE's own encode and decode: so the same PSNR."""
    x, vae = photo(), VAE(str(vaes / kind))
    z = vae.encode(x)
    assert z.shape == (2, vae.channels, 64 // vae.factor, 96 // vae.factor)
    model = small_vae(kind)
    if getattr(model.config, "shift_factor", 0.0) is None:
        model.register_to_config(shift_factor=0.0)
    pixels = x / 127.5 - 1
    with torch.no_grad():
        latent = model.encode(pixels)
        own = model.decode(latent.latent if kind == "dc-ae" else latent.latent_dist.mode()).sample
        theirs = pipeline(model)(
            prompt_embeds=torch.zeros(2, 4, 24), prompt_attention_mask=torch.ones(2, 4, dtype=torch.bool), latents=z,
            num_inference_steps=1, guidance_scale=1.0, height=64, width=96, use_resolution_binning=False,
            output_type="pt").images
    assert (z - z.mean()).abs().max() > 1e-3
    assert torch.allclose(theirs, (own / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert torch.allclose(vae.decode(z), own, atol=1e-5)
    psnr = lambda a: -10 * ((a.clamp(-1, 1) - pixels).square().mean() / 4).log10()
    assert abs(psnr(theirs * 2 - 1) - psnr(own)) < 1e-3


def test_flux2_latents_are_those_of_diffusers_own_pipeline(vaes):
    from diffusers import Flux2Pipeline

    x, vae, model = photo(1, 64, 64), VAE(str(vaes / "flux2")), small_vae("flux2")
    them = SimpleNamespace(vae=model, _patchify_latents=Flux2Pipeline._patchify_latents)
    with torch.no_grad():
        theirs = Flux2Pipeline._encode_vae_image(them, x / 127.5 - 1, None)
        # as the pipeline's __call__ decodes
        mean, std = model.bn.running_mean.view(1, -1, 1, 1), (model.bn.running_var.view(1, -1, 1, 1) + 1e-4).sqrt()
        picture = model.decode(Flux2Pipeline._unpatchify_latents(theirs * std + mean)).sample
    assert torch.allclose(vae.encode(x), theirs, atol=1e-5) and vae.channels == 32 and vae.factor == 16
    assert torch.allclose(vae.decode(theirs), picture, atol=1e-5)


def test_vaes_are_told_apart_by_their_weights(vaes, tmp_path):
    a = VAE(str(vaes / "sd"))
    model = small_vae("sd")
    with torch.no_grad():
        model.decoder.conv_out.bias += 1e-3
    model.save_pretrained(tmp_path / "sd")
    b = VAE(str(tmp_path / "sd"))
    assert a.about["sha256"] != b.about["sha256"] and {**a.about, "sha256": 0} == {**b.about, "sha256": 0}
    assert "sd" == a.about["vae"]  # no path of this machine


def test_a_vae_that_cannot_be_had_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "Nonsense"}')
    for name in ("nobody/nothing", str(tmp_path), str(tmp_path / "gone")):
        with pytest.raises(T.UserError, match=r"--vae .* cannot be loaded .*use --vae none") as error:
            VAE(name)
        assert "\n" not in str(error.value)


# --- text

NASTY = ["", " ", "a red ring", "A RED Ring!", "<person> & a dog", "see https://example.com/a?b=c now", "www.x.org",
         "50% off + tax", "caf\u00e9 na\u00efve", "Ünïcödé", "sch\u00c3\u00b6n", "你好 world", "日本語テキスト", "한국어", "🦊 fox 🦊",
         "a\tb\nc\r\nd", "\x00\x07bell", "&amp;amp; &lt;b&gt;", "@someone hello", "#tag #другой", "1234567 and 12.5",
         "12:45 and 10.0.0.1", "«quotes» „low“ ‘single’", "em—dash – en‑dash", "under_score-and-dash", "a.b.c...d!!!???",
         "IMG_1234.JPG photo.png", "free shipping worldwide", "page 5", "click to enlarge", "(brackets) [square] {curly}",
         "back\\slash /slash |pipe|", "*star* ~tilde~ §", "x 640x480 y", "nbsp\u00a0space\u200bzero", "e\u0301 combining",
         "ﬁ ligature Ⅷ ½", "مرحبا", "שלום", "हिन्दी", "'quoted'", '"double"', "trailing-", "_leading", ".hidden",
         "%20encoded%2Ftext", "+plus+signs+", "a" * 2000, "word " * 400, "ring, " * 100 + "end", "<b>bold</b><br>",
         "\ufeffbom", "𝓯𝓪𝓷𝓬𝔂", "🏳️‍🌈", "C++ & C#"]


def test_token_ids_are_those_of_the_pipeline_on_nasty_strings(t5gemma):
    from data.prepare import clean

    text = TextEncoder(str(t5gemma), max_tokens=48, pad=16)
    text.tokenizer.model_max_length = 48
    theirs = pipeline(None, text.model, text.tokenizer)
    ids, mask = theirs._tokenize_prompts(NASTY, "cpu")
    assert len(NASTY) >= 50 and mask.all(1).any() and len({tuple(i[m].tolist()) for i, m in zip(ids, mask)}) > 40
    with torch.no_grad():
        states = text.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    for i, prompt in enumerate(NASTY):
        cleaned = clean(prompt)
        ours = text.tokenizer([cleaned], truncation=True, max_length=48)["input_ids"][0]
        assert ours == ids[i][mask[i]].tolist(), prompt
        encoded, our_mask = text.encode([cleaned])
        assert torch.allclose(encoded[our_mask], states[i][mask[i]], atol=1e-5), prompt


def test_stored_text_is_padded_to_few_lengths():
    states, mask = T.pad_text([torch.ones(n, 3) * n for n in (1, 33, 64)], 32)
    assert states.shape == (3, 64, 3) and mask.sum(1).tolist() == [1, 33, 64]
    assert T.pad_text([torch.ones(65, 3)], 32)[0].shape[1] == 96
    assert all((row[m] == len(row[m])).all() and (row[~m] == 0).all() for row, m in zip(states, mask))


# --- runs

def losses(name):
    return [x for record in read_metrics(Path("logs") / name) for x in record.get("losses", [])]


def test_scenes_train_in_latents_and_the_export_paints_with_diffusers(in_tmp, vaes, t5gemma, capsys):
    """Encoded on the fly; the exported pipeline, given our noise and our time grid, paints what our sampler paints."""
    import diffusers

    assert T.main([*RUN, "--steps", "30", "--vae", str(vaes / "flux"), "--text", str(t5gemma), "--name", "r", "--shift",
                   "2.0", "--lr", "0.01", "--lr-adamw", "0.01"]) == 0
    config = json.loads(Path("logs/r/config.json").read_text())
    assert (config["patch"], config["predict"], config["bottleneck"]) == (2, "v", 0)
    assert np.mean(losses("r")[-5:]) < np.mean(losses("r")[:3])
    assert eval_prx.main(["export", "logs/r", "--out", "pipeline"]) == 0
    assert "PRXPipeline.from_pretrained('pipeline')" in capsys.readouterr().out
    theirs = diffusers.PRXPipeline.from_pretrained("pipeline")
    theirs.set_progress_bar_config(disable=True)
    picture = theirs("a red ring", height=64, width=64, num_inference_steps=3, use_resolution_binning=False).images[0]
    assert picture.size == (64, 64)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    grid = T.shift_time(torch.linspace(1, 0, 4), 2.0)
    theirs.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)  # ours is shifted already
    image = theirs("a red ring", height=64, width=64, timesteps=(grid[:-1] * 1000).tolist(), guidance_scale=3.0,
                   latents=noise.clone(), use_resolution_binning=False, output_type="pt").images
    from data.prepare import clean
    vae, text = VAE(str(vaes / "flux")), TextEncoder(str(t5gemma), max_tokens=80)
    z = T.sample(T.load_transformer("logs/r/transformer"), noise, *text.encode([clean("a red ring")]), *text.encode([""]),
                 steps=3, cfg_scale=3.0, shift=2.0, predict="v")
    assert torch.allclose(image, (vae.decode(z) / 2 + 0.5).clamp(0, 1), atol=1e-3) and image.std() > 0
    assert eval_prx.main(["logs/r", "--n", "8", "--steps", "1", "--inception", "none", "--clip", "none", "--dino",
                          "none"]) == 0


def test_what_prx_pipeline_cannot_do_is_not_exported(in_tmp, vaes, capsys):
    for name, flags, says in (("pixels", ["--predict", "v"], "--vae none --predict v"),
                              ("flux2", ["--vae", str(vaes / "flux2"), "--patch", "1"], "AutoencoderKLFlux2")):
        assert T.main([*RUN, "--steps", "1", "--name", name, *flags]) == 0
        assert eval_prx.main(["export", f"logs/{name}", "--out", "p"]) == 2
        assert says in capsys.readouterr().err and not Path("p").exists()


def test_latents_of_another_vae_are_refused_with_both(in_tmp, vaes, capsys):
    from test_shards import write_shards

    about = VAE(str(vaes / "flux")).about
    write_shards(in_tmp / "d", ((16, 64, 64, "train"),), latent=about | dict(scale=0.5), image=None, resolution=64)
    assert T.main([*RUN, "--steps", "2", "--vae", str(vaes / "flux"), "--data", "d"]) == 2
    err = capsys.readouterr().err
    assert "'scale': 0.5" in err and "'scale': 0.3611" in err
    write_shards(in_tmp / "e", ((16, 64, 64, "train"),), latent=about, image=None, resolution=64)
    assert T.main([*RUN, "--steps", "2", "--vae", str(vaes / "sd"), "--data", "e"]) == 2
    assert "the latents of e were made by" in capsys.readouterr().err
    assert T.main([*RUN, "--steps", "2", "--vae", str(vaes / "flux"), "--data", "e", "--patch", "3"]) == 2
    assert "images of 64 x 64 px cannot be cut into tokens of 24 px" in capsys.readouterr().err


def test_two_resolutions_keep_weights_optimizer_and_ema(in_tmp, vaes, monkeypatch):
    """Latents of 64 and 128 px with a caption mix and buckets: one run, stopped in each stage, equal to the whole one."""
    from test_shards import write_shards

    about = VAE(str(vaes / "flux")).about
    text = dict(text="tiny", width=96, max_tokens=80)
    write_shards(in_tmp / "a", ((20, 64, 64, "train"), (12, 48, 80, "train"), (4, 64, 64, "eval")), latent=about, text=text,
                 image=None, resolution=64)
    write_shards(in_tmp / "b", ((20, 128, 128, "train"),), latent=about, text=text, image=None, resolution=128)
    stages = [T.Stage("64px", 0.5, dict(data="a")), T.Stage("128px", 0.5, dict(
        data="b", resolution=128, batch=4, captions="mix:0.5", shift=2.0))]
    monkeypatch.setitem(T.TRACKS, "micro", (T.TRACKS["micro"][0], stages))
    monkeypatch.setattr(encoders, "TextEncoder", None)  # stored text needs no encoder
    flags = [*RUN[:RUN.index("--batch")], *RUN[RUN.index("--batch") + 2:-2], "--vae", str(vaes / "flux"), "--steps", "12"]
    monkeypatch.setattr(T, "TRACKS", {"micro": (T.dataclasses.replace(T.TRACKS["micro"][0], batch=8, resolution=64), stages)})
    for name, stops in (("whole", [0]), ("cut", [3, 8, 0])):
        for stop in stops:
            assert T.main([*flags, "--name", name, "--stop-after", str(stop)]) == 0
    a, b = (load_file(f"logs/{n}/transformer/diffusion_pytorch_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a) and losses("whole") == losses("cut")
    assert read_metrics(Path("logs/whole"))[-1]["samples"] == 6 * 8 + 6 * 4
    assert Path("logs/whole/samples/final.png").exists()


def test_five_hundred_images_from_prepare_through_two_resolutions_to_a_picture_by_diffusers(in_tmp, vaes, t5gemma):
    """One command prepares, a second trains 100 steps on latents of 64 and 128 px with a caption mix, a third exports."""
    import diffusers
    from PIL import Image

    from data import prepare, scenes

    drawn = scenes.draw_scenes(range(500), "train")
    Path("photos").mkdir()
    with open("photos/metadata.jsonl", "w") as lines:
        texts = zip(scenes.captions(drawn), scenes.captions(drawn, "short"))
        for i, (picture, (long, short)) in enumerate(zip(scenes.render(drawn, 128), texts)):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(f"photos/{i}.png")
            lines.write(json.dumps(dict(file_name=f"{i}.png", text=long, text_short=short)) + "\n")
    prepare.prepare("photos", "shards", size="64,128", store="latent,text", vae=str(vaes / "flux"), text=str(t5gemma),
                    text_tokens=80)
    flags = [f for f in RUN if f not in ("--resolution", "64")] + [
        "--data", "shards", "--vae", str(vaes / "flux"), "--text", str(t5gemma), "--steps", "100", "--stages",
        "64:0.5,128:0.5", "--captions", "mix:0.3", "--lr", "0.01", "--lr-adamw", "0.01", "--name", "r"]
    assert T.main(flags) == 0
    curve = losses("r")
    assert len(curve) == 100 and np.mean(curve[40:50]) < 0.9 * np.mean(curve[:5]) and np.mean(curve[-10:]) < np.mean(curve[:5])
    assert [r["stage"] for r in read_metrics(Path("logs/r")) if "stage" in r][-1] == 1
    assert eval_prx.main(["export", "logs/r", "--out", "pipeline"]) == 0
    pipe = diffusers.PRXPipeline.from_pretrained("pipeline")
    picture = pipe("a red ring", height=128, width=128, num_inference_steps=2, use_resolution_binning=False).images[0]
    assert picture.size == (128, 128) and np.array(picture).std() > 0


# --- --init

def test_init_starts_from_a_transformer_or_a_pipeline_folder_strictly(in_tmp, capsys):
    assert T.main([*RUN, "--steps", "3", "--name", "a", "--ema", "0"]) == 0
    source = Path("logs/a/transformer")
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    # lr so small that the weights stay: what comes out is what went in
    still = ["--steps", "1", "--lr", "1e-12", "--lr-adamw", "1e-12", "--ema", "0"]
    sharded = Path("pipe/transformer")
    sharded.mkdir(parents=True)
    (sharded / "config.json").write_text((source / "config.json").read_text())
    names = sorted(tensors)
    weight_map = {k: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({k: tensors[k] for k in names if weight_map[k] == file}, sharded / file)
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, init in (("b", source), ("c", "pipe")):
        assert T.main([*RUN, *still, "--name", name, "--init", str(init)]) == 0
        again = load_file(f"logs/{name}/transformer/diffusion_pytorch_model.safetensors")
        assert all(torch.allclose(again[k], v, atol=1e-8) for k, v in tensors.items())
    assert T.main([*RUN, *still, "--name", "d", "--init", str(source), "--depth", "3"]) == 2
    assert "depth is 3 here and 2 there" in capsys.readouterr().err
    del tensors["txt_in.weight"]
    save_file(tensors, source / "diffusion_pytorch_model.safetensors")
    assert T.main([*RUN, *still, "--name", "e", "--init", str(source)]) == 2
    assert "is no PRX transformer in diffusers format" in capsys.readouterr().err
    assert T.main([*RUN, *still, "--name", "f", "--init", "nobody/nothing"]) == 2
    assert "nobody/nothing" in capsys.readouterr().err


def test_a_resumed_run_does_not_start_from_init_again(in_tmp):
    assert T.main([*RUN, "--steps", "3", "--name", "a"]) == 0
    flags = [*RUN, "--steps", "6", "--init", "logs/a/transformer"]
    assert T.main([*flags, "--name", "whole"]) == 0
    assert T.main([*flags, "--name", "cut", "--stop-after", "3"]) == 0
    assert T.main([*flags, "--name", "cut"]) == 0
    assert losses("whole") == losses("cut") and losses("whole") != losses("a")[:3] + losses("whole")[3:]


# --- the real size

@pytest.mark.parametrize("vae, size, tokens, channels", [("repa-e", 256, 256, 16), ("repa-e", 1024, 4096, 16),
                                                         ("flux2", 1024, 4096, 128), ("dc-ae", 1024, 1024, 32),
                                                         ("none", 1024, 1024, 3)])
def test_the_1b_model_takes_every_latent_space_on_the_meta_device(vae, size, tokens, channels):
    c, _ = parse_args(["--vae", vae])
    factor = {"none": 1, "repa-e": 8, "flux2": 16, "dc-ae": 32}[vae]
    with torch.device("meta"):
        model = T.PRX(in_channels=channels, patch_size=c.patch, hidden_size=c.hidden, depth=c.depth, num_heads=c.heads,
                      mlp_ratio=c.mlp_ratio, bottleneck_size=c.bottleneck or None)
        model.set_compute_dtype(torch.bfloat16)
        seen = []
        model.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out.shape))
        x = torch.empty(2, channels, size // factor, size // factor)
        text, mask = torch.empty(2, 192, 2304), torch.ones(2, 192, dtype=torch.bool)
        loss = T.flow_matching_loss(model, x, x, torch.empty(2), text, mask, c.predict)[0]
        loss.sum().backward()
    assert seen == [(2, tokens, 1792)] and all(p.grad is not None for p in model.parameters())
    assert 1.15e9 < sum(p.numel() for p in model.parameters()) < 1.2e9


def test_the_24_hour_track_in_miniature(in_tmp, vaes, t5gemma, monkeypatch, capsys):
    """Its own recipe and three stages, from prepared shards of 256 and 512 px and curated ones: only the model is small, the
    batches are 1/256 and the networks random. Too short for REPA's burn-in, and stopped in every stage."""
    import transformers
    from PIL import Image

    from data import prepare, scenes

    torch.manual_seed(0)
    transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        patch_size=16, num_register_tokens=4, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32)).save_pretrained("vit")
    for folder, first in (("photos", 0), ("curated", 40)):
        Path(folder).mkdir()
        drawn = scenes.draw_scenes(range(first, first + 16))
        with open(f"{folder}/metadata.jsonl", "w") as lines:
            texts = zip(scenes.captions(drawn), scenes.captions(drawn, "short"))
            for i, (picture, (long, short)) in enumerate(zip(scenes.render(drawn, 512), texts)):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(f"{folder}/{i}.png")
                lines.write(json.dumps(dict(file_name=f"{i}.png", text=long, text_short=short)) + "\n")
        prepare.prepare(folder, f"{folder}-shards", size="256,512", store="image,latent,text", vae=str(vaes / "flux"),
                        text=str(t5gemma), eval_share=0.1)
    c, stages = T.TRACKS["24h"]
    assert [s.knobs["batch"] for s in stages] == [1024, 512, 256] and c.repa and not stages[1].knobs["repa"]
    small = [T.Stage(s.name, s.share, s.knobs | dict(batch=s.knobs["batch"] // 256)) for s in stages]
    monkeypatch.setitem(T.TRACKS, "micro", (T.dataclasses.replace(c, track="micro", hidden=32, heads=2), small))  # no CUDA
    flags = ["--track", "micro", "--data", "photos-shards", "--sft-data", "curated-shards", "--vae", str(vaes / "flux"),
             "--text", str(t5gemma), "--repa-teacher", "vit", "--steps", "20", "--samples", "1", "--sample-steps", "2",
             "--compile", "off"]
    for name, stops in (("whole", [0]), ("cut", [5, 16, 0])):
        for stop in stops:
            assert T.main([*flags, "--name", name, "--stop-after", str(stop)]) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert said.count("stage 512px:") == said.count("stage sft:") == 2 and said.count("REPA ends at step 13:") == 2
    a, b = (load_file(f"logs/{n}/transformer/diffusion_pytorch_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a) and losses("whole") == losses("cut")
    assert read_metrics(Path("logs/whole"))[-1]["samples"] == 13 * 4 + 6 * 2 + 1
