"""Latents and text as diffusers' pipelines see them, runs in latents from start to export, and --init."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TINY, losses, metrics, run, same, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from test_shards import write_shards

import eval_prx
import train_prx as T
from data import prepare, scenes

KL = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
          block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
AT_64 = ["--batch", 8, "--resolution", 64]


def small_vae(kind: str):
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
        inner = "vae" if kind == "flux" else ""  # as part of a pipeline, or alone
        small_vae(kind).save_pretrained(folder / kind / inner)
    return folder


@pytest.fixture
def at_64(in_tmp):
    """A current folder with shards/micro of 64 px and two fields of captions."""
    write_shards(in_tmp / "shards/micro", ((48, 64, 64, "train"), (4, 64, 64, "eval")), resolution=64)
    return in_tmp


@pytest.fixture(scope="module")
def t5gemma(tmp_path_factory):
    """A small random T5Gemma encoder with the embedded tokenizer, in the format of the real one."""
    folder = tmp_path_factory.mktemp("t5gemma")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data/networks/text")
    module = transformers.T5GemmaModuleConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, sliding_window=64)
    config = transformers.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    torch.manual_seed(0)
    transformers.T5GemmaEncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pipeline(vae=None, text=None, tokenizer=None):
    """diffusers' pipeline around a transformer that outputs zero: what goes in as latents is what it decodes."""
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
    x, vae = photo(), T.VAE(str(vaes / kind))
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
    x, vae, model = photo(1, 64, 64), T.VAE(str(vaes / "flux2")), small_vae("flux2")
    them = SimpleNamespace(vae=model, _patchify_latents=diffusers.Flux2Pipeline._patchify_latents)
    with torch.no_grad():
        theirs = diffusers.Flux2Pipeline._encode_vae_image(them, x / 127.5 - 1, None)
        # as the pipeline's __call__ decodes
        mean, std = model.bn.running_mean.view(1, -1, 1, 1), (model.bn.running_var.view(1, -1, 1, 1) + 1e-4).sqrt()
        picture = model.decode(diffusers.Flux2Pipeline._unpatchify_latents(theirs * std + mean)).sample
    assert torch.allclose(vae.encode(x), theirs, atol=1e-5) and vae.channels == 32 and vae.factor == 16
    assert torch.allclose(vae.decode(theirs), picture, atol=1e-5)


def test_vaes_are_told_apart_by_their_weights(vaes, tmp_path):
    a = T.VAE(str(vaes / "sd"))
    model = small_vae("sd")
    with torch.no_grad():
        model.decoder.conv_out.bias += 1e-3
    model.save_pretrained(tmp_path / "sd")
    b = T.VAE(str(tmp_path / "sd"))
    assert a.about["sha256"] != b.about["sha256"] and {**a.about, "sha256": 0} == {**b.about, "sha256": 0}
    assert "sd" == a.about["vae"]  # no path of this machine


def test_a_vae_that_cannot_be_had_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "Nonsense"}')
    for name in ("nobody/nothing", str(tmp_path), str(tmp_path / "gone")):
        with pytest.raises(T.UserError, match=r"--vae .* cannot be loaded .*give a local folder") as error:
            T.VAE(name)
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


def test_token_ids_are_those_of_the_pipeline_on_nasty_strings(t5gemma, monkeypatch):
    monkeypatch.setattr(prepare, "LOST_LETTERS", 1)  # however much the cleaning removes
    text = T.TextEncoder(str(t5gemma), max_tokens=48)
    text.tokenizer.model_max_length = 48
    theirs = pipeline(None, text.model, text.tokenizer)
    ids, mask = theirs._tokenize_prompts(NASTY, "cpu")
    assert len(NASTY) >= 50 and mask.all(1).any() and len({tuple(i[m].tolist()) for i, m in zip(ids, mask)}) > 40
    with torch.no_grad():
        states = text.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    for i, prompt in enumerate(NASTY):
        cleaned = prepare.clean(prompt)
        ours = text.tokenizer([cleaned], truncation=True, max_length=48)["input_ids"][0]
        assert ours == ids[i][mask[i]].tolist(), prompt
        encoded, our_mask = text.encode([cleaned])
        assert torch.allclose(encoded[our_mask], states[i][mask[i]], atol=1e-5), prompt


# --- runs

def test_a_run_in_latents_learns_and_its_export_paints_with_diffusers(at_64, vaes, t5gemma, capsys):
    """Encoded on the fly; the exported pipeline, given our noise and our time grid, paints what our sampler paints."""
    run(*AT_64, "--steps", 30, "--vae", vaes / "flux", "--text", t5gemma, "--name", "r", "--shift", 2.0, "--lr", 0.01,
        "--lr-adamw", 0.01)
    config = json.loads(Path("logs/r/config.json").read_text())["config"]
    assert (config["patch"], config["predict"], config["bottleneck"]) == (2, "v", 0)
    assert np.mean(losses("r")[-5:]) < np.mean(losses("r")[:3])
    assert eval_prx.main(["export", "logs/r", "--out", "pipeline"]) == 0
    assert "wrote pipeline" in capsys.readouterr().out
    theirs = diffusers.PRXPipeline.from_pretrained("pipeline")
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    grid = T.shift_time(torch.linspace(1, 0, 4), 2.0)
    theirs.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)  # ours is shifted already
    image = theirs("a red ring", height=64, width=64, timesteps=(grid[:-1] * 1000).tolist(), guidance_scale=3.0,
                   latents=noise.clone(), use_resolution_binning=False, output_type="pt").images
    vae, text = T.VAE(str(vaes / "flux")), T.TextEncoder(str(t5gemma), max_tokens=80)
    z = T.sample(T.load_transformer("logs/r/transformer"), noise, *text.encode([prepare.clean("a red ring")]),
                 *text.encode([""]), steps=3, cfg_scale=3.0, shift=2.0, predict="v")
    ours = (vae.decode(z) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(image, ours, atol=1e-3) and image.std() > 0
    request = dict(format=1, prompts=["a red ring"], seeds=[0], steps=3, cfg_scale=3.0, device="cpu")
    Path("request.json").write_text(json.dumps(request))
    with pytest.MonkeyPatch.context() as patch:  # and so does --paint
        patch.setattr(T, "__file__", str(Path("logs/r/train_prx.py").resolve()))
        assert T.main(["--paint", "request.json", "--out", "out.safetensors"]) == 0
    assert (load_file("out.safetensors")["images"].float() / 255 - ours).abs().max() < 6e-3


def test_latents_that_are_encoded_on_the_fly_are_the_stored_ones(in_tmp, vaes, monkeypatch):
    """The model sees the same in the same order, but for the BF16 in which latents are stored."""
    vae = T.VAE(str(vaes / "flux"))
    for name, more in (("images", {}), ("latents", dict(latent=vae.about, image=None))):
        write_shards(in_tmp / name, ((32, 64, 64, "train"),), resolution=64, **more)
    latents = vae.encode(load_file("images/train-00000.safetensors")["image"]).bfloat16()
    tensors = load_file("latents/train-00000.safetensors") | dict(latent=latents.contiguous())
    save_file(tensors, "latents/train-00000.safetensors")
    seen, real = [], T.flow_matching_loss
    monkeypatch.setattr(T, "flow_matching_loss", lambda model, x_0, *a: (seen.append(x_0), real(model, x_0, *a))[1])
    for name in ("images", "latents"):
        run(*AT_64, "--steps", 6, "--vae", vaes / "flux", "--data", name, "--name", name)
    encoded, stored = torch.stack(seen[:len(seen) // 2]), torch.stack(seen[len(seen) // 2:])
    assert encoded.std() > 0.01 and (encoded - stored).abs().max() < 2 ** -8 * encoded.abs().max()
    assert np.allclose(losses("images"), losses("latents"), rtol=1e-2)


def test_latents_of_another_vae_are_refused_with_both(in_tmp, vaes, capsys):
    about = T.VAE(str(vaes / "flux")).about
    write_shards(in_tmp / "d", ((16, 64, 64, "train"),), latent=about | dict(scale=0.5), image=None, resolution=64)
    run(*AT_64, "--steps", 2, "--vae", vaes / "flux", "--data", "d", code=2)
    err = capsys.readouterr().err
    assert "0.5" in err and "0.3611" in err and err.count("\n") == 1
    write_shards(in_tmp / "e", ((16, 64, 64, "train"),), latent=about, image=None, resolution=64)
    run(*AT_64, "--steps", 2, "--vae", vaes / "sd", "--data", "e", code=2)
    assert "the latents of e were made by" in capsys.readouterr().err
    run(*AT_64, "--steps", 2, "--vae", vaes / "flux", "--data", "e", "--patch", 3, code=2)
    assert "images of 64 x 64 px cannot be cut into tokens of 24 px" in capsys.readouterr().err
    assert not Path("logs").exists()


def test_two_resolutions_keep_weights_optimizer_and_ema(in_tmp, vaes, monkeypatch):
    """Latents of 64 and 128 px with a caption mix and buckets: a run stopped in each stage equals the whole one."""
    about = T.VAE(str(vaes / "flux")).about
    text = dict(text="tiny", width=96, max_tokens=80)
    write_shards(in_tmp / "a", ((20, 64, 64, "train"), (12, 48, 80, "train"), (4, 64, 64, "eval")), latent=about,
                 text=text, image=None, resolution=64)
    write_shards(in_tmp / "b", ((20, 128, 128, "train"),), latent=about, text=text, image=None, resolution=128)
    stages = [T.Stage("64px", 0.5, dict(data="a", batch=8, resolution=64)), T.Stage("128px", 0.5, dict(
        data="b", resolution=128, batch=4, captions="mix:0.5", shift=2.0))]
    monkeypatch.setitem(T.TRACKS, "micro", (T.TRACKS["micro"][0], stages))
    monkeypatch.setattr(T, "TextEncoder", None)  # stored text needs no encoder
    at = TINY.index("--batch")
    flags = [*TINY[:at], *TINY[at + 2:], "--text-tokens", "80", "--vae", str(vaes / "flux"), "--steps", "12"]
    for name, stops in (("whole", [0]), ("cut", [3, 8, 0])):
        for stop in stops:
            assert T.main([*flags, "--name", name, "--stop-after", str(stop)]) == 0
    assert same(weights("whole"), weights("cut")) and losses("whole") == losses("cut")
    assert metrics("whole")[-1]["samples"] == 6 * 8 + 6 * 4
    assert Path("logs/whole/samples/final.png").exists()


def photos(folder, numbers, size):
    """A folder of scenes as pictures with long and short captions."""
    Path(folder).mkdir()
    drawn = scenes.draw_scenes(numbers, "train")
    texts = zip(scenes.captions(drawn), scenes.captions(drawn, "short"))
    with open(f"{folder}/metadata.jsonl", "w") as lines:
        for i, (picture, (long, short)) in enumerate(zip(scenes.render(drawn, size), texts)):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(f"{folder}/{i}.png")
            lines.write(json.dumps(dict(file_name=f"{i}.png", text=long, text_short=short)) + "\n")


def test_five_hundred_images_from_prepare_through_two_resolutions_to_a_picture_by_diffusers(in_tmp, vaes, t5gemma,
                                                                                           monkeypatch):
    """One command prepares, a second trains on latents of 64 and 128 px with a caption mix, a third exports."""
    photos("photos", range(500), 128)
    prepare.prepare("photos", "shards/d", size="64,128", store="latent,text", vae=str(vaes / "flux"), text=str(t5gemma),
                    text_tokens=80)
    stages = [T.Stage("64px", 0.5, dict(resolution=64)), T.Stage("128px", 0.5, dict(resolution=128))]
    monkeypatch.setitem(T.TRACKS, "micro", (T.TRACKS["micro"][0], stages))
    run("--batch", 8, "--data", "shards/d", "--vae", vaes / "flux", "--text", t5gemma, "--text-tokens", 80,
        "--name", "r", "--steps", 100, "--captions", "mix:0.3", "--lr", 0.01, "--lr-adamw", 0.01)
    curve = losses("r")
    assert len(curve) == 100 and np.mean(curve[40:50]) < 0.9 * np.mean(curve[:5])
    assert np.mean(curve[-10:]) < np.mean(curve[:5])
    assert [r["stage"] for r in metrics("r") if "stage" in r][-1] == 1
    assert eval_prx.main(["export", "logs/r", "--out", "pipeline"]) == 0
    pipe = diffusers.PRXPipeline.from_pretrained("pipeline")
    picture = pipe("a red ring", height=128, width=128, num_inference_steps=2, use_resolution_binning=False).images[0]
    assert picture.size == (128, 128) and np.array(picture).std() > 0


# --- --init

def test_init_starts_from_a_transformer_or_a_pipeline_folder_strictly(shards, capsys):
    run("--steps", 3, "--name", "a", "--ema", 0)
    source, tensors = Path("logs/a/transformer"), weights("a")
    # lr so small that the weights stay: what comes out is what went in
    still = ["--steps", 1, "--lr", 1e-12, "--lr-adamw", 1e-12, "--ema", 0]
    sharded = Path("pipe/transformer")
    sharded.mkdir(parents=True)
    (sharded / "config.json").write_text((source / "config.json").read_text())
    names = sorted(tensors)
    weight_map = {k: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({k: tensors[k] for k in names if weight_map[k] == file}, sharded / file)
    index = json.dumps({"weight_map": weight_map})
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    for name, init in (("b", source), ("c", "pipe")):
        run(*still, "--name", name, "--init", init)
        again = weights(name)
        assert all(torch.allclose(again[k], v, atol=1e-8) for k, v in tensors.items())
    run(*still, "--name", "d", "--init", source, "--depth", 3, code=2)
    err = capsys.readouterr().err
    assert "'depth': 2" in err and "'depth': 3" in err and "give the flags that fit" in err
    run(*still, "--name", "e", "--init", source, "--sprint", 0.5, "--tread-blocks", "0-0", code=2)
    assert "'sprint': True" in capsys.readouterr().err
    del tensors["txt_in.weight"]
    save_file(tensors, source / "diffusion_pytorch_model.safetensors")
    for name, init in (("f", source), ("g", "nobody/nothing"), ("h", "logs")):
        run(*still, "--name", name, "--init", init, code=2)
        err = capsys.readouterr().err
        assert f"{init} as a PRX transformer in diffusers format cannot be loaded" in err and err.count("\n") == 1


def test_a_resumed_run_does_not_start_from_init_again(shards):
    run("--steps", 3, "--name", "a")
    flags = ["--steps", 6, "--init", "logs/a/transformer"]
    run(*flags, "--name", "whole")
    run(*flags, "--name", "cut", "--stop-after", 3)
    run(*flags, "--name", "cut")
    assert losses("whole") == losses("cut") and losses("whole")[:3] != losses("a")
    assert same(weights("whole"), weights("cut"))


# --- the real size

@pytest.mark.parametrize("vae, size, tokens, channels", [("repa-e", 256, 256, 16), ("repa-e", 1024, 4096, 16),
                                                         ("flux2", 1024, 4096, 128), ("dc-ae", 1024, 1024, 32),
                                                         ("none", 1024, 1024, 3)])
def test_the_1b_model_takes_every_latent_space_on_the_meta_device(vae, size, tokens, channels):
    c, _ = T.parse_args(["--vae", vae])
    factor = {"none": 1, "repa-e": 8, "flux2": 16, "dc-ae": 32}[vae]
    with torch.device("meta"):
        model = T.PRX(in_channels=channels, patch_size=c.patch, hidden_size=c.hidden, depth=c.depth, num_heads=c.heads,
                      mlp_ratio=c.mlp_ratio, bottleneck_size=c.bottleneck or None)
        T.set_compute_dtype(model, torch.bfloat16)
        seen = []
        model.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out.shape))
        x = torch.empty(2, channels, size // factor, size // factor)
        text, mask = torch.empty(2, 256, 2304), torch.ones(2, 256, dtype=torch.bool)
        loss = T.flow_matching_loss(model, x, x, torch.empty(2), text, mask, c)[0]
        loss.sum().backward()
    assert seen == [(2, tokens, 1792)] and all(p.grad is not None for p in model.parameters())
    assert 1.15e9 < sum(p.numel() for p in model.parameters()) < 1.2e9


def test_the_24_hour_track_in_miniature(in_tmp, vaes, t5gemma, monkeypatch, capsys):
    """Its own recipe and three stages, from prepared shards of two sizes and curated ones: only the model is small, the
    batches are 1/256, the sizes a fourth and the networks random. REPA ends with its stage; stopped in every stage."""
    torch.manual_seed(0)
    transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        patch_size=16, num_register_tokens=4, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32)).save_pretrained("vit")
    for first, out in ((0, "shards/24h"), (40, "shards/24h-sft")):
        photos(f"photos-{first}", range(first, first + 16), 128)
        prepare.prepare(f"photos-{first}", out, size="64,128", store="image,latent,text", vae=str(vaes / "flux"),
                        text=str(t5gemma), eval_share=0.1)
    c, stages = T.TRACKS["24h"]
    assert [s.knobs["batch"] for s in stages] == [1024, 512, 256] and c.repa and not stages[1].knobs["repa"]
    assert c.repa_until < stages[0].share
    smaller = lambda k: dict(batch=k.batch // 256, resolution=k.resolution // 4)
    small = [T.Stage(s.name, s.share, s.knobs | smaller(s.config(c))) for s in stages]
    c = dataclasses.replace(c, hidden=32, heads=2, repa_until=1.0)
    monkeypatch.setitem(T.TRACKS, "micro", (dataclasses.replace(c, track="micro"), small))  # no CUDA
    flags = ["--track", "micro", "--data", "shards/24h", "--sft-data", "shards/24h-sft", "--vae", str(vaes / "flux"),
             "--text", str(t5gemma), "--repa-teacher", "vit", "--steps", "20", "--samples", "1", "--sample-steps", "2",
             "--compile", "off"]
    for name, stops in (("whole", [0]), ("cut", [5, 16, 0])):
        for stop in stops:
            assert T.main([*flags, "--name", name, "--stop-after", str(stop)]) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert said.count("stage 512px:") == said.count("stage sft:") == 2 and said.count("REPA ends at step 13:") == 2
    assert same(weights("whole"), weights("cut")) and losses("whole") == losses("cut")
    assert metrics("whole")[-1]["samples"] == 13 * 4 + 6 * 2 + 1
    facts = json.loads(Path("logs/whole/run.json").read_text())
    assert [Path(d["folder"]).name for d in facts["data"]] == ["24h", "24h-sft"] and facts["resolution"] == 128
    assert facts["parameters"] == sum(v.numel() for v in weights("whole").values()) and facts["shift"] == 2.0
    [export] = Path("logs/whole/exports").iterdir()
    assert T.load_transformer(export).config == T.load_transformer("logs/whole/transformer").config


def test_the_24_hour_track_takes_the_folders_of_its_name(in_tmp):
    """Without --data: shards/24h, and shards/24h-sft where it exists."""
    assert T.parse_args([])[0].data == "shards/24h"
    assert [s.name for s in T.parse_args([])[1]] == ["256px", "512px"]
    Path("shards/24h-sft").mkdir(parents=True)
    Path("shards/24h-sft/index.json").write_text("{}")
    config, stages = T.parse_args([])
    assert [s.config(config).data for s in stages] == ["shards/24h"] * 2 + ["shards/24h-sft"]
