"""Metrics against their definitions, preprocessing against transformers, and the command line of eval_prx.py."""

import io
import json
import math
import shutil

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
from eval_prx import Features, Moments, SceneTask, fid, main, mmd, preprocess


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Reference statistics are cached in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prx"


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
    half = scipy.linalg.sqrtm(s1).real  # S1^(1/2) S2 S1^(1/2) has the eigenvalues of S1 S2, and is symmetric
    root = scipy.linalg.sqrtm(half @ s2 @ half).real
    by_scipy = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(s1 + s2 - 2 * root)
    assert got == pytest.approx(by_scipy, rel=1e-6)


def test_moments_do_not_depend_on_the_batches():
    x = random_features(333, 20, 5) + 1e4  # a large mean must not eat the digits
    whole, parts = Moments().update(x), Moments()
    for part in x.split(50):
        parts.update(part)
    assert torch.allclose(whole.mean, x.mean(0), rtol=1e-12) and torch.allclose(parts.mean, whole.mean, rtol=1e-12)
    assert torch.allclose(whole.cov, x.T.cov(), rtol=1e-7, atol=1e-7)
    assert torch.allclose(parts.cov, whole.cov, rtol=1e-9, atol=1e-9)


def test_moments_of_ranks_add_up_and_do_not_grow():
    x = random_features(400, 20, 6) + 1e3
    whole, merged = Moments().update(x), Moments()
    for n, part in zip((100, 0, 37, 263), x.split([100, 0, 37, 263])):
        merged.merge(Moments().update(part) if n else Moments())
    assert merged.n == 400 and torch.allclose(merged.mean, whole.mean, rtol=1e-12)
    assert torch.allclose(merged.cov, whole.cov, rtol=1e-9, atol=1e-9)
    assert sum(torch.as_tensor(value).numel() for value in vars(merged).values()) == 20 * 20 + 2 * 20 + 1


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


def test_the_bias_is_what_two_samples_of_one_distribution_get():
    """And about 10 (1 - |mean|^2) / n for each set."""
    population = random_features(2000, 5, 0)
    draw = lambda n, seed: population[torch.randperm(2000, generator=torch.Generator().manual_seed(seed))[:n]]
    pairs = [(draw(30, seed), draw(50, seed + 1000)) for seed in range(200)]
    biases = [eval_prx.mmd_bias(xx, yy.item(), 30, 50) for xx, yy, _ in (eval_prx.mmd_terms(x, y) for x, y in pairs)]
    values = torch.tensor([mmd(x, y) for x, y in pairs])
    assert np.mean(biases) == pytest.approx(values.mean().item(), abs=4 * values.std().item() / 200 ** 0.5)
    unit = torch.nn.functional.normalize(population, dim=1)
    rule = 10 * (1 - unit.mean(0).square().sum().item()) * (1 / 30 + 1 / 50)
    assert np.mean(biases) == pytest.approx(rule, rel=0.05)


def test_intervals_are_as_wide_as_the_spread_of_fresh_samples():
    reference, population = random_features(2000, 6, 0), random_features(20_000, 6, 1)
    real = Moments().update(reference)

    def fresh(n, seed):
        return population[torch.randperm(20_000, generator=torch.Generator().manual_seed(seed))[:n]]

    def mmd_of_resamples(x, counts):
        _, yy, xy = eval_prx.mmd_terms(reference, x, counts)
        return yy - 2 * xy

    for metric, resampled in ((lambda x: fid(real, Moments().update(x)),
                               lambda x, counts: eval_prx.fid_of_resamples(real, x, counts)),
                              (lambda x: mmd(reference, x), mmd_of_resamples)):
        widths = []
        for n in (100, 400):
            x = fresh(n, n)
            low, high = eval_prx.interval(metric(x), resampled(x, eval_prx.resample(n)))
            spread = np.std([metric(fresh(n, seed)) for seed in range(40)])
            assert low < metric(x) < high and 0.6 < (high - low) / (2 * 1.96 * spread) < 1.6
            widths.append(high - low)
        assert widths[1] < 0.7 * widths[0]
    x = fresh(100, 0)  # each sample once is the sample itself
    once = eval_prx.fid_of_resamples(real, x, torch.ones(1, 100).double()).item()
    assert once == pytest.approx(fid(real, Moments().update(x)), rel=1e-6)


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


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (400, 300), (640, 480)])
def test_the_inception_of_2015_sees_what_clean_fid_shows_it_or_with_legacy_pytorch_fid(size):
    """Pillow's bicubic on each float channel, squeezed to 299 x 299, clipped; legacy: bilinear without antialiasing."""
    image = picture(*size)
    planes = [Image.fromarray(x.numpy().astype(np.float32), "F").resize((299, 299), Image.BICUBIC) for x in image]
    expected = (torch.from_numpy(np.stack(planes)).clamp(0, 255) - 128) / 128
    got = preprocess(image[None], 299, "inception-2015")[0]
    assert (got - expected).abs().max() < 1e-4
    legacy = torch.nn.functional.interpolate(image[None].float(), (299, 299), mode="bilinear", align_corners=False)
    assert torch.allclose(preprocess(image[None], 299, "inception-2015", "legacy"), (legacy - 128) / 128, atol=1e-5)
    if size != (299, 299):
        assert (preprocess(image[None], 299, "inception-2015", "legacy")[0] - got).abs().max() > 0.01


def test_a_float_metric_fed_with_uint8_would_see_an_inverted_image_and_ours_does_not():
    """The public implementation gives uint8 to torchmetrics' FID(normalize=True), which multiplies by 255 in uint8: x
    becomes 256 - x. That image is another one to our features; ours are those of the image itself."""
    image = scenes.render(scenes.draw_scenes(range(64), "eval"), 32)
    wrapped = image * 255  # in uint8
    assert torch.equal(wrapped, (256 - image.int()).remainder(256).to(torch.uint8))
    network = Features("inception")
    real = Moments().update(network(scenes.render(scenes.draw_scenes(range(1000, 1200), "eval"), 32)))
    straight, inverted = (fid(real, Moments().update(network(x))) for x in (image, wrapped))
    assert inverted > 3 * straight
    with torch.no_grad():  # the network's own answer to the image in [-1, 1], nothing of ours in between
        x = torch.nn.functional.interpolate(image, (64, 64), mode="bicubic", antialias=True).float() / 127.5 - 1
        expected = network.model(pixel_values=x.to(memory_format=torch.channels_last)).pooler_output.flatten(1)
    assert torch.allclose(network(image), expected, atol=1e-4)


def test_values_arrive_in_the_right_range_and_not_inverted():
    black, white = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    assert preprocess(black, 64, "inception").unique().tolist() == [-1]
    assert preprocess(white, 64, "inception").unique().tolist() == [1]
    assert (preprocess(black, 64, "clip") < -1).all() and (preprocess(white, 64, "clip") > 1).all()
    with pytest.raises(TypeError, match="uint8"):
        preprocess(torch.rand(1, 3, 64, 64), 64, "clip")
    image = scenes.render(scenes.draw_scenes(range(4), "eval"), 32)
    for kind in eval_prx.METRICS:
        network = Features(kind)
        features, inverse = network(image), network(255 - image)
        assert features.dtype == torch.float32 and features.shape[0] == 4 and features.ndim == 2
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


def test_dinov3_loads_as_the_network_of_dino_mmd(tmp_path):
    import transformers as t

    torch.manual_seed(0)
    t.DINOv3ViTModel(t.DINOv3ViTConfig(image_size=64, patch_size=16, hidden_size=32, intermediate_size=64,
                                       num_hidden_layers=2, num_attention_heads=2, num_register_tokens=4)
                     ).save_pretrained(tmp_path / "dinov3")
    network, images = Features("dino", tmp_path / "dinov3"), torch.stack([picture(64, 64, seed) for seed in range(3)])
    with torch.no_grad():
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in eval_prx.MEAN_STD["dino"])
        model = t.DINOv3ViTModel.from_pretrained(tmp_path / "dinov3")
        tokens = model(pixel_values=(images / 255 - mean) / std).last_hidden_state
    assert network.size == 64 and torch.allclose(network(images), tokens[:, 0], atol=1e-5)


class Inception2015(torch.nn.Module):
    """A stand-in for NVIDIA's TorchScript file: `layers` maps (x - 128) / 128 at 299 px to features."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AvgPool2d(23), torch.nn.Flatten())  # (B, 3 * 13 * 13)

    def forward(self, x):
        return self.layers(x) * 0


def test_the_torchscript_inception_is_loaded_only_with_its_checksum(tmp_path, monkeypatch, folders, capsys):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Inception2015()).save(path)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("loaded before its checksum was known"))
    argv = ["--real", folders / "real", "--fake", folders / "fake", "--inception", path]
    assert eval_prx.INCEPTION_SHA256 in refused(capsys, *argv)
    assert "cannot be read" in refused(capsys, *argv[:5], tmp_path / "gone.pt")
    monkeypatch.undo()
    monkeypatch.setattr(eval_prx, "INCEPTION_SHA256", eval_prx.hashlib.sha256(path.read_bytes()).hexdigest())
    image = picture(299, 299)
    expected = torch.nn.functional.avg_pool2d((image.float() - 128) / 128, 23).flatten()
    assert torch.allclose(Features("inception", path)(image[None])[0], expected, atol=1e-5)


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
        assert value == pytest.approx(metrics[key], rel=1e-6)
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
    (run / "config.json").write_text(json.dumps({"data": "shards/photos", "track": "micro", "resolution": 32}))
    (run / "transformer").mkdir()
    (run / "transformer/config.json").write_text("{}")
    assert "shards/photos holds no index.json" in refused(capsys, run)


def test_statistics_are_cached_by_content_and_made_again_when_damaged(folders, cache, capsys, monkeypatch):
    argv = ["--real", str(folders / "real"), "--fake", str(folders / "fake"), "--out", str(folders / "out")]
    metrics = lambda: json.loads((folders / "out" / "metrics.json").read_text())["metrics"]["fake"]
    load, read = eval_prx.load_image, []
    monkeypatch.setattr(eval_prx, "load_image", lambda path: read.append(path.parent.name) or load(path))
    assert main(argv) == 0 and read.count("real") == 12
    first, (file,) = metrics(), cache.glob("*.safetensors")
    (folders / "real" / "0.png").rename(folders / "real" / "00.png")  # the name is not the content
    assert main(argv) == 0 and read.count("real") == 12 and metrics() == first
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    for times, damaged in enumerate((whole[:-50], flipped, b""), 2):
        file.write_bytes(damaged)
        capsys.readouterr()
        assert main(argv) == 0 and read.count("real") == 12 * times and metrics() == first
        assert "the cache is passed over and made again" in capsys.readouterr().out
        eval_prx.load_statistics(file, {})  # whole again
    as_pil(picture(48, 48)).save(folders / "real" / "1.png")
    assert main(argv) == 0 and read.count("real") == 60 and metrics() != first and len(list(cache.iterdir())) == 2
    assert main([*argv, "--resize", "legacy"]) == 0 and read.count("real") == 72  # another look at the same images


def test_a_folder_against_saved_statistics(folders, tiny, capsys):
    real, fake, stats, out = folders / "real", folders / "fake", folders / "stats.safetensors", folders / "out"
    argv = ["--fake", str(fake), "--out", str(out)]
    assert main(["--real", str(real), "--save-stats", str(stats), *argv]) == 0
    first = json.loads((out / "metrics.json").read_text())
    shutil.rmtree(real)
    assert main(["--real", str(stats), *argv]) == 0
    second = json.loads((out / "metrics.json").read_text())
    assert second["metrics"] == first["metrics"] and second["protocol_sha256"] == first["protocol_sha256"]
    assert "stats.safetensors was made with dino" in refused(capsys, "--real", stats, *argv, "--dino", tiny / "dino")
    assert "--resize" in refused(capsys, "--real", stats, *argv, "--resize", "legacy")
    (folders / "text.safetensors").write_text("hello")
    assert "text.safetensors holds no statistics" in refused(capsys, "--real", folders / "text.safetensors", *argv)


@pytest.mark.parametrize("suffix", ["bmp", "gif", "tiff", "ppm", "webp", "jpg"])
def test_any_image_format(tmp_path, suffix):
    image = torch.full((3, 20, 30), 200, dtype=torch.uint8)
    as_pil(image).save(tmp_path / f"a.{suffix}")
    assert (eval_prx.load_image(tmp_path / f"a.{suffix}").int() - 200).abs().max() <= 3
    assert eval_prx.IMAGE_TYPES.count(f".{suffix}") == 1


def test_what_is_there_is_kept_when_a_metric_or_an_image_fails(folders, run, capsys, monkeypatch):
    out = folders / "out"
    monkeypatch.setattr(eval_prx, "fid", lambda *_: (_ for _ in ()).throw(train_prx.UserError("it does not converge")))
    argv = ["--real", str(folders / "real"), "--fake", str(folders / "fake"), "--out", str(out)]
    assert "fid failed: it does not converge" in refused(capsys, *argv)
    kept = json.loads((out / "metrics.json").read_text())
    assert kept["metrics"]["fake"].keys() == {"cmmd", "dino_mmd"} and kept["failed"]
    fail = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    monkeypatch.setattr(eval_prx, "compare_with_intervals", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        main([str(run), "--n", "8", "--steps", "1", "--out", str(out)])
    kept = json.loads((out / "metrics.partial.json").read_text())
    assert kept["metrics"]["eval"].keys() >= {"accuracy", "all"} and kept["metrics"]["unseen"]


def test_few_images_are_said_not_to_determine_the_covariance(folders, capsys):
    assert main(["--real", str(folders / "real"), "--fake", str(folders / "fake")]) == 0
    assert "12 images do not determine a covariance of 96 features" in capsys.readouterr().out


# A run

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run whose model knows nothing."""
    folder = tmp_path_factory.mktemp("logs") / "run"
    encoder = TextEncoder("tiny")
    config, _ = parse_args(["--track", "micro", "--repa", "0", "--hidden", "32", "--depth", "1", "--heads", "2"])
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
            assert second["metrics"][split][key] == pytest.approx(value, rel=1e-5, abs=1e-8), (split, key)
    protocol = first["protocol"]
    assert protocol["n"] == 24 and protocol["n_unseen"] == 6 and protocol["steps"] == 2 and protocol["cfg_scale"] == 3.0
    assert protocol["scenes"] == scenes.MICRO.protocol and protocol["features"].keys() == {"inception", "clip", "dino"}
    assert protocol["prompts_sha256"] == second["protocol"]["prompts_sha256"]
    assert first["metrics"]["real"]["fid"] < first["metrics"]["eval"]["fid"]  # noise is no scene
    assert first["intervals"]["eval"].keys() == first["metrics"]["eval"].keys()
    assert all(low <= first["metrics"]["eval"][key] <= high for key, (low, high) in first["intervals"]["eval"].items())
    assert 0 < first["bias"]["eval"]["cmmd"] < first["metrics"]["eval"]["cmmd"]
    assert first["seconds"].keys() >= {"load", "sample", "accuracy", "features", "reference", "metrics", "total"}


def test_the_protocol_hash_changes_with_what_decides_comparability_and_with_nothing_else(run, tmp_path, capsys):
    def sha256(*flags):
        assert main([str(run), "--n", "8", "--steps", "1", "--dino", "none", "--out", str(tmp_path), *flags]) == 0
        return json.loads((tmp_path / "metrics.json").read_text())["protocol_sha256"]

    base = sha256()
    assert "records of track micro have 2000" in capsys.readouterr().out
    for flags in (["--batch", "3"], ["--seed", "5"]):
        assert sha256(*flags) == base
    others = [sha256(*flags) for flags in (["--n", "9"], ["--steps", "2"], ["--cfg", "1.5"], ["--sampler", "heun"],
                                           ["--clip", "none"], ["--resize", "legacy"])]
    assert len({base, *others}) == 7


def test_every_prompt_has_its_own_noise_whatever_the_batch():
    noise = eval_prx.prompt_noise("eval", range(8), (3, 16, 16), seed=0)
    assert torch.equal(noise[5:7], eval_prx.prompt_noise("eval", range(5, 7), (3, 16, 16), seed=0))
    others = [eval_prx.prompt_noise(split, range(8), (3, 16, 16), seed) for split, seed in (("eval", 1), ("unseen", 0))]
    flat = torch.cat([noise, *others]).flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(24)).abs().max() < 0.25
    assert noise.mean().abs() < 0.05 and (noise.std() - 1).abs() < 0.05


def test_no_two_batches_share_their_noise(tmp_path):
    """The public implementation starts every batch of every rank from one seed: 10,000 images of 32 noise tensors."""
    seen = []
    config = dict(track="micro", resolution=32, shift=1.0, predict="x", seed=0, noise_shape=(3, 32, 32))

    def paint(prompts, noise, *_):
        seen.append(noise)
        return torch.zeros(noise.shape, dtype=torch.uint8)

    eval_prx.evaluate_run(config, SceneTask(config, 24), paint, {}, tmp_path, steps=1, cfg=1.0, batch=5, seed=0)
    noise = torch.cat(seen).flatten(1)
    assert len(noise) == 24 + 6 and len(noise.unique(dim=0)) == 30


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
    options, task = dict(steps=1, cfg=1.0, batch=100, seed=0), SceneTask(config, 200)
    right = eval_prx.evaluate_run(config, task, knows, networks, tmp_path, **options)["metrics"]
    wrong = eval_prx.evaluate_run(config, task, confuses, networks, tmp_path, **options)["metrics"]
    assert right["eval"]["accuracy"] > 0.995 and right["unseen"]["accuracy"] > 0.98
    assert wrong["eval"]["accuracy"] < 0.5 and wrong["eval"]["all"] < 0.05
    assert right["eval"]["fid"] == pytest.approx(wrong["eval"]["fid"], rel=1e-6)
