"""Metrics against their definitions, preprocessing against transformers, and the command line of eval_prx.py."""

import io
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import eval_prx
import train_prx
from data.encoders import TextEncoder
from data import scenes
from data.settings import parse_args
from eval_prx import Features, Moments, fid, main, mmd, preprocess


def random_features(n, d, seed, rank=None):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, rank or d)) @ rng.normal(size=(rank or d, d)) + rng.normal(size=d) * 3
    return torch.from_numpy(x)


# FID and MMD

def test_fid_is_the_definition_with_scipy_sqrtm():
    for seed in range(3):
        x, y = random_features(400, 24, seed), random_features(300, 24, seed + 100)
        m1, m2, s1, s2 = x.mean(0).numpy(), y.mean(0).numpy(), np.cov(x.numpy().T), np.cov(y.numpy().T)
        expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
        assert fid(Moments().update(x), Moments().update(y)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n, d, rank", [(12, 40, None), (200, 30, 7)], ids=["fewer samples than features", "low rank"])
def test_fid_is_right_on_rank_deficient_covariances(n, d, rank):
    """The oracle needs no matrix root: tr (S1 S2)^(1/2) is the nuclear norm of X^T Y for centred, scaled data."""
    x, y = random_features(n, d, 1, rank), random_features(n, d, 2, rank)
    cx, cy = ((a - a.mean(0)) / math.sqrt(n - 1) for a in (x, y))
    expected = (x.mean(0) - y.mean(0)).square().sum() + cx.square().sum() + cy.square().sum()
    expected = (expected - 2 * torch.linalg.matrix_norm(cx @ cy.T, "nuc")).item()
    got = fid(Moments().update(x), Moments().update(y))
    assert got == pytest.approx(expected, rel=1e-6)
    s1, s2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = scipy.linalg.sqrtm(s1 @ s2 + 1e-9 * np.eye(d)).real  # scipy's needs help on a singular matrix
    by_scipy = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(s1 + s2 - 2 * root)
    assert got == pytest.approx(by_scipy, rel=1e-3)


def test_moments_do_not_depend_on_the_batches():
    x = random_features(333, 20, 5) + 1e4  # a large mean must not eat the digits
    whole, parts = Moments().update(x), Moments()
    for part in x.split(50):
        parts.update(part)
    assert torch.allclose(whole.mean, x.mean(0), rtol=1e-12) and torch.allclose(parts.mean, whole.mean, rtol=1e-12)
    assert torch.allclose(whole.cov, x.T.cov(), rtol=1e-7, atol=1e-7)
    assert torch.allclose(parts.cov, whole.cov, rtol=1e-9, atol=1e-9)


def test_mmd_is_the_double_loop():
    x, y = random_features(17, 6, 0), random_features(23, 6, 1)
    unit = lambda a: a / a.norm(dim=1, keepdim=True)

    def mean_kernel(a, b):
        kernel = [math.exp(-((u - v) ** 2).sum().item() / (2 * 10 ** 2)) for u in unit(a) for v in unit(b)]
        return sum(kernel) / len(kernel)

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert mmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert mmd(x * 7, y) == pytest.approx(expected, rel=1e-9)  # features are normalised
    for chunk in (1, 5, 16):
        assert mmd(x, y, chunk=chunk) == pytest.approx(expected, rel=1e-9)


def test_a_set_with_itself_is_zero_and_metrics_are_symmetric():
    x, y = random_features(50, 80, 0), random_features(60, 80, 1)
    a, b = Moments().update(x), Moments().update(y)
    assert abs(fid(a, a)) < 1e-6 * fid(a, b) and fid(a, b) == pytest.approx(fid(b, a), rel=1e-9)
    assert abs(mmd(x, x)) < 1e-9 and mmd(x, y) == pytest.approx(mmd(y, x), rel=1e-9)


# Preprocessing and networks

def picture(h, w, seed=0):
    """A smooth uint8 (3, h, w) image."""
    x = torch.rand(1, 3, h // 4 + 2, w // 4 + 2, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(x, (h, w), mode="bicubic").clamp(0, 255).to(torch.uint8)[0]


def as_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("kind", ["clip", "dino"])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (200, 330), (501, 300), (97, 64)])
def test_preprocessing_is_that_of_transformers_image_processors(kind, size):
    import transformers

    cls = transformers.CLIPImageProcessor if kind == "clip" else transformers.BitImageProcessor
    mean, std = eval_prx.MEAN_STD[kind]
    processor = cls(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=mean, image_std=std,
                    resample=3)
    image = picture(*size)
    expected = torch.as_tensor(np.array(processor(images=as_pil(image))["pixel_values"]))
    got = preprocess(image[None], 64, kind)
    level = 1 / 255 / min(std)
    assert (got - expected).abs().max() < 2.5 * level and (got - expected).abs().mean() < 0.1 * level


def test_images_of_many_sizes_are_each_preprocessed_alone():
    images = [picture(40, 70, 1), picture(64, 64, 2), picture(90, 33, 3)]
    together = preprocess(images, 48, "dino")
    assert torch.equal(together, torch.cat([preprocess(x[None], 48, "dino") for x in images]))


def test_values_arrive_in_the_right_range_and_not_inverted():
    black, white = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    assert preprocess(black, 64, "inception").unique().tolist() == [-1]
    assert preprocess(white, 64, "inception").unique().tolist() == [1]
    assert (preprocess(black, 64, "clip") < -1).all() and (preprocess(white, 64, "clip") > 1).all()
    with pytest.raises(TypeError, match="uint8"):
        preprocess(torch.rand(1, 3, 64, 64), 64, "clip")
    image = scenes.render(scenes.draw_scenes(range(4), "eval"), 32)
    for kind in eval_prx.MEAN_STD:
        network = Features(kind)
        features, inverse = network(image), network(255 - image)
        assert features.dtype == torch.float64 and features.shape[0] == 4 and features.ndim == 2
        assert ((features - inverse).norm(dim=1) > 0.1 * features.norm(dim=1)).all()
        batched = network(image, batch=3)
        assert torch.allclose(batched, features, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Published architectures at random, on disk: a whole CLIP, as its repository has it, and DINOv2 with registers."""
    import transformers as t

    folder = tmp_path_factory.mktemp("tiny")
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    text = dict(vocab_size=99, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, projection_dim=24, **small)
    vision = dict(image_size=42, patch_size=14, projection_dim=24, **small)
    clip = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    clip.save_pretrained(folder / "clip")
    small.pop("intermediate_size")
    config = t.Dinov2WithRegistersConfig(image_size=70, patch_size=14, num_register_tokens=4, **small)
    t.Dinov2WithRegistersModel(config).save_pretrained(folder / "dino")
    return folder


def test_published_architectures_load_through_the_same_path(tiny):
    import transformers as t

    images = torch.stack([picture(50, 60, seed) for seed in range(3)])
    clip, dino = Features("clip", tiny / "clip"), Features("dino", tiny / "dino")
    assert (clip.size, dino.size) == (42, 70)
    with torch.no_grad():
        model = t.CLIPModel.from_pretrained(tiny / "clip")
        expected = model.get_image_features(pixel_values=preprocess(images, 42, "clip"))
        expected = getattr(expected, "pooler_output", expected)
        assert torch.allclose(clip(images).float(), expected, atol=1e-5)
        model = t.Dinov2WithRegistersModel.from_pretrained(tiny / "dino")
        tokens = model(pixel_values=preprocess(images, 70, "dino")).last_hidden_state
        assert torch.allclose(dino(images).float(), tokens[:, 0], atol=1e-5)
    assert len(clip.describe()["sha256"]) == 64 and clip.describe() == Features("clip", tiny / "clip").describe()
    assert clip.describe()["sha256"] != dino.describe()["sha256"]


def test_networks_with_missing_weights_are_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((tiny / "dino" / "config.json").read_text())
    weights = load_file(tiny / "dino" / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(train_prx.UserError, match="layernorm.weight"):
        Features("dino", tmp_path)
    with pytest.raises(train_prx.UserError, match="--clip .*nowhere"):
        Features("clip", tmp_path / "nowhere")


# Two folders

@pytest.fixture
def folders(tmp_path):
    """real/: 12 scenes as png; fake/: 12 others, jpg, webp and a png of another size in a subfolder."""
    for name, first in (("real", 0), ("fake", 100)):
        (tmp_path / name / "sub").mkdir(parents=True)
        for i, image in enumerate(scenes.render(scenes.draw_scenes(range(first, first + 12), "eval"), 48)):
            suffix = ("png", "jpg", "webp")[i % 3] if name == "fake" else "png"
            as_pil(image).save(tmp_path / name / f"{i}.{suffix}")
    as_pil(picture(30, 50)).save(tmp_path / "fake" / "sub" / "odd.PNG")
    (tmp_path / "fake" / "notes.txt").write_text("not an image")
    return tmp_path


def test_two_folders_through_the_command_line(folders, capsys):
    real, fake, out = str(folders / "real"), str(folders / "fake"), folders / "out"
    assert main(["--real", real, "--fake", fake, "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "2 different sizes" in printed and "fid" in printed and "trained on scenes" in printed
    result = json.loads((out / "metrics.json").read_text())
    assert result["protocol"]["real"]["n"] == 12 and result["protocol"]["fake"]["n"] == 13
    assert len(result["protocol"]["features"]["clip"]["sha256"]) == 64 and result["seconds"]["total"] > 0
    metrics = result["metrics"]["fake"]
    assert metrics.keys() == {"fid", "cmmd", "dino_mmd"} and all(value > 0 for value in metrics.values())

    main(["--real", real, "--fake", fake, "--out", str(out), "--batch", "5", "--device", "cpu"])
    for key, value in json.loads((out / "metrics.json").read_text())["metrics"]["fake"].items():
        assert value == pytest.approx(metrics[key], rel=1e-4)
    main(["--real", real, "--fake", real, "--out", str(out), "--inception", "none", "--device", "cpu"])
    same = json.loads((out / "metrics.json").read_text())["metrics"]["fake"]
    assert same.keys() == {"cmmd", "dino_mmd"} and all(abs(value) < 1e-6 for value in same.values())


def refused(capsys, *argv) -> str:
    """Runs main, which must exit with 2 and one sentence on stderr; returns the sentence."""
    assert main([str(a) for a in argv]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    return message


def test_bad_images_are_named(folders, capsys):
    real, fake = folders / "real", folders / "fake"
    whole = io.BytesIO()
    as_pil(picture(64, 64)).save(whole, "png")
    for name, content in (("cut.png", whole.getvalue()[:400]), ("text.jpg", b"hello"), ("nothing.webp", b"")):
        (fake / name).write_bytes(content)
        assert f"{name} cannot be read" in refused(capsys, "--real", real, "--fake", fake)
        (fake / name).unlink()
    Image.new("1", (20000, 6000)).save(fake / "huge.png")
    assert "huge.png is 20000x6000" in refused(capsys, "--real", real, "--fake", fake)
    (fake / "huge.png").unlink()
    Image.new("RGB", (500, 3)).save(fake / "thin.png")
    assert "thin.png is 500x3" in refused(capsys, "--real", real, "--fake", fake)
    (fake / "thin.png").unlink()
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(fake / "deep.png")
    assert "deep.png" in refused(capsys, "--real", real, "--fake", fake)


def test_bad_arguments_are_one_sentence(folders, capsys, tmp_path):
    real, empty = folders / "real", tmp_path / "empty"
    empty.mkdir()
    assert "empty holds 0 image(s)" in refused(capsys, "--real", real, "--fake", empty)
    as_pil(picture(32, 32)).save(empty / "one.png")
    assert "at least 2" in refused(capsys, "--real", empty, "--fake", real)
    assert "nowhere is not a folder" in refused(capsys, "--real", tmp_path / "nowhere", "--fake", real)
    assert "--frobnicate" in refused(capsys, "--frobnicate", "1")
    assert "either" in refused(capsys) and "either" in refused(capsys, "--real", real)
    assert "either" in refused(capsys, "logs/x", "--real", real, "--fake", real)
    assert "--n 3" in refused(capsys, "logs/x", "--n", "3")
    assert "--device tpu" in refused(capsys, "logs/x", "--device", "tpu")
    assert "no config.json" in refused(capsys, tmp_path / "logs")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{")
    assert "config.json is damaged" in refused(capsys, run)
    (run / "config.json").write_text(json.dumps({"data": "scenes", "track": "micro"}))
    assert "not finished" in refused(capsys, run)
    (run / "config.json").write_text(json.dumps({"data": "shards/photos", "track": "micro"}))
    (run / "transformer").mkdir()
    (run / "transformer/config.json").write_text("{}")
    assert "shards/photos" in (message := refused(capsys, run)) and "--real" in message


# A run

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run whose model knows nothing."""
    folder = tmp_path_factory.mktemp("logs") / "run"
    encoder = TextEncoder("tiny")
    config, _ = parse_args(["--track", "micro", "--hidden", "32", "--depth", "1", "--heads", "2"])
    model = train_prx.PRX(in_channels=3, patch_size=8, context_in_dim=encoder.width, hidden_size=32, mlp_ratio=2.0,
                          num_heads=2, depth=1, axes_dim=[8, 8], bottleneck_size=None)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    train_prx.export_transformer(model.config, model.state_dict(), folder / "transformer")
    (folder / "config.json").write_text(json.dumps(vars(config)))
    return folder


def test_a_run_through_the_command_line(run, tmp_path):
    results = []
    for batch in (24, 7):
        out = tmp_path / f"batch-{batch}"
        flags = ["--n", "24", "--steps", "2", "--batch", str(batch), "--out", str(out), "--device", "cpu"]
        assert main([str(run), *flags]) == 0
        results.append(json.loads((out / "metrics.json").read_text()))
        assert Image.open(out / "samples.png").width > 500
    grids = [np.array(Image.open(tmp_path / f"batch-{batch}" / "samples.png")).astype(int) for batch in (24, 7)]
    assert grids[0].shape == grids[1].shape and abs(grids[0] - grids[1]).max() <= 1
    first, second = results
    assert first["metrics"].keys() == {"eval", "unseen", "real"}
    for split, values in first["metrics"].items():
        for key, value in values.items():  # the batch size changes nothing
            assert second["metrics"][split][key] == pytest.approx(value, rel=1e-3, abs=1e-6), (split, key)
    protocol = first["protocol"]
    assert protocol["n"] == 24 and protocol["n_unseen"] == 6 and protocol["steps"] == 2 and protocol["cfg_scale"] == 3.0
    assert protocol["scenes"] == scenes.MICRO.protocol and protocol["features"].keys() == {"inception", "clip", "dino"}
    assert protocol["prompts_sha256"] == second["protocol"]["prompts_sha256"]
    assert first["metrics"]["real"]["fid"] < first["metrics"]["eval"]["fid"]  # noise is no scene
    assert first["seconds"].keys() >= {"load", "sample", "accuracy", "features", "reference", "metrics", "total"}


def test_every_prompt_has_its_own_noise_whatever_the_batch():
    noise = eval_prx.prompt_noise("eval", range(8), (3, 16, 16), seed=0)
    assert torch.equal(noise[5:7], eval_prx.prompt_noise("eval", range(5, 7), (3, 16, 16), seed=0))
    others = [eval_prx.prompt_noise(split, range(8), (3, 16, 16), seed) for split, seed in (("eval", 1), ("unseen", 0))]
    flat = torch.cat([noise, *others]).flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(24)).abs().max() < 0.25
    assert noise.mean().abs() < 0.05 and (noise.std() - 1).abs() < 0.05


def test_a_painter_that_knows_the_answer_gets_full_marks(tmp_path):
    """And one that paints other prompts' scenes stays near chance, with the same FID: only prompt accuracy can tell."""
    answers = {}
    for split in ("eval", "unseen"):
        drawn = scenes.draw_scenes(range(200), split)
        answers |= dict(zip(scenes.captions(drawn), scenes.render(drawn, 32)))
    config = dict(track="micro", resolution=32, shift=3.0, predict="x", seed=0, noise_shape=(3, 32, 32))
    knows = lambda prompts, *_: torch.stack([answers[p] for p in prompts])
    confuses = lambda prompts, *_: knows(prompts).roll(1, 0)
    networks = {"inception": Features("inception")}
    options = dict(n=200, steps=1, cfg=1.0, batch=100, seed=0)
    right = eval_prx.evaluate_run(config, knows, networks, tmp_path, **options)["metrics"]
    wrong = eval_prx.evaluate_run(config, confuses, networks, tmp_path, **options)["metrics"]
    assert right["eval"]["accuracy"] > 0.995 and right["unseen"]["accuracy"] > 0.98
    assert wrong["eval"]["accuracy"] < 0.5 and wrong["eval"]["all"] < 0.05
    assert right["eval"]["fid"] == pytest.approx(wrong["eval"]["fid"], rel=1e-6)
