"""records/bench.py and variants.py: they time the script's own step, and what they report makes sense."""

import json

import pytest
import torch
from conftest import ROOT, T, shell, torchrun
from records import bench, gpu_check, variants

SMALL = ("--track micro --hidden 32 --heads 2 --depth 3 --batch 16 --tread-blocks 1-1 --repa-layer 1 --compute fp32 "
         "--compile off").split()
ALONE = [name for name, variant in variants.VARIANTS.items() if not variant.needs]
CUDA = [name for name, variant in variants.VARIANTS.items() if variant.needs == "cuda"]
RANKS = [name for name, variant in variants.VARIANTS.items() if variant.needs == "ranks"]


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling is torch's business and takes a minute: here `compiled` rows run as they are."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: None)
    monkeypatch.setattr(torch, "compile", lambda net, **kw: net)


def check_row(row, batch=16):
    low, high = row["quartiles_ms"]
    assert 0 < low <= row["ms"] <= high and row["images_per_s"] == pytest.approx(batch / row["ms"] * 1e3)
    assert row["floor_ms"] > 0 and row["parts_ms"]["forward + backward"] > 0 and row["parts_ms"]["optimizer"] > 0


def test_peers_take_the_same_data_and_give_a_ratio_for_each(in_tmp, uncompiled):
    before = T.NEWTON_SCHULZ
    result = bench.main([*SMALL, "--peers", "diffusers", "--turns", "1"])
    assert json.loads((in_tmp / "bench.json").read_text()) == result
    assert set(result["ratios"]) == set(bench.PEERS) and result["largest_difference"] < 1e-5
    for kind, ratio in result["ratios"].items():
        ours = result["rows"][f"ours, compiled, {kind.split(', ')[1]}"]
        theirs = result["rows"][f"diffusers, {kind}"]
        check_row(ours), check_row(theirs)
        assert ratio == pytest.approx(ours["images_per_s"] / theirs["images_per_s"])
    assert T.NEWTON_SCHULZ is before
    assert {"machine", "config", "flops_per_s"} < set(result)


def test_a_step_divides_into_data_model_and_optimizer(shards):
    names = ["the track's step", "AdamW"]
    rows = bench.main([*SMALL, "--share", "--turns", "1", "--out", "share.json", "--rows", *names])["rows"]
    assert list(rows) == names == list(json.loads((shards / "share.json").read_text())["rows"])
    for row in rows.values():
        check_row(row)
        assert row["parts_ms"]["data"] > 0.1  # read from shards


def test_without_shards_a_step_takes_random_data(in_tmp):
    [row] = bench.main([*SMALL, "--share", "--turns", "1", "--rows", "TREAD 50 %"])["rows"].values()
    check_row(row)
    assert row["parts_ms"]["data"] < 0.1


def test_random_data_are_never_zeros_and_the_24h_track_has_its_shapes():
    c = bench.config_of("24h", "1024 px, 8, TREAD 50 %", ["--batch", "2", "--resolution", "64"])
    batch = bench.random_batch(c, torch.device("cpu"))
    assert batch.x.shape == batch.eps.shape == (2, 16, 8, 8) and batch.x.dtype == torch.bfloat16
    assert batch.text.shape == (2, 256, 2304) and batch.mask.sum() == 2 * 224 and batch.keep.shape == (2, 8)
    for x in (batch.x, batch.eps, batch.text, batch.t, batch.pixels):
        assert (x == 0).float().mean() < 0.05
    for row in bench.ROWS["24h"]:
        assert bench.config_of("24h", row, []).accumulate == 1
    nets = bench.build(bench.config_of("micro", "AdamW", SMALL[2:]), T.World(), shards=False).nets
    assert all(p.abs().sum() > 0 for p in nets.parameters())  # gates and the final layer too


def test_the_profile_names_ten_kernels_and_leaves_a_trace(in_tmp):
    result = bench.main([*SMALL, "--repa", "0", "--profile", "--out", "p.json"])
    kernels = json.loads((in_tmp / "p.json").read_text())["kernels"]
    assert len(kernels) == 10 and 0 < sum(k["share"] for k in kernels) <= 1 and kernels == result["kernels"]
    assert kernels[0]["ms"] >= kernels[-1]["ms"] > 0
    assert json.loads((in_tmp / "p.trace.json").read_text())["traceEvents"]


def test_flops_are_those_of_the_model():
    row = {"micro": "without REPA"}
    c = bench.config_of("micro", row["micro"], SMALL[2:])
    ours = bench.build(c, T.World(), shards=False)
    assert ours.flops() == 3 * 16 * T.flops_per_image(ours.nets["model"].config, 16, 40)


def test_bad_input_is_one_sentence(in_tmp):
    with pytest.raises(T.UserError, match="^--rows nonsense is unknown; micro has the track's step, without REPA"):
        bench.main(["--track", "micro", "--share", "--rows", "nonsense"])
    with pytest.raises(T.UserError, match="^--only nonsense is unknown; there are attention without a mask"):
        variants.main(["--track", "micro", "--only", "nonsense"])
    with pytest.raises(T.UserError, match="--hidden 33"):
        bench.main(["--track", "micro", "--share", "--hidden", "33"])


@pytest.fixture(scope="module")
def plain():
    """The plain step of a small model with REPA and routing, and its results."""
    c = bench.config_of("micro", "the track's step", [*SMALL[2:], "--tread", "0.5", "--repa-layer", "0"])
    ours = bench.build(c, T.World(), shards=False)
    return ours, variants.Setting(ours, variants.Variant()).results()


@pytest.mark.parametrize("name", ALONE)
def test_each_variant_gives_what_the_plain_step_gives(plain, name, monkeypatch):
    monkeypatch.setattr(variants, "SYMMETRIC_FROM", 8)  # so that small matrices are cut into blocks
    ours, expected = plain
    variant = variants.VARIANTS[name]
    setting = variant.kind(ours, variant)
    off = variants.differences(setting, expected)
    assert all(off[kind] <= variant.tolerance for kind in variant.compares.split()), off
    assert set(setting.step()) == {"data", "forward + backward", "optimizer"}
    fresh = bench.build(ours.c, T.World(), shards=False)  # the step above has moved the weights
    ours.optimizer.load(fresh.optimizer.state_dict().__getitem__)


def test_a_wrong_variant_is_noticed(plain):
    ours, expected = plain

    def wrong(model):
        model.blocks[1].__class__ = type("Wrong", (T.Block,), {"mlp": lambda self, h: 1.01 * T.Block.mlp(self, h)})

    off = variants.differences(variants.Setting(ours, variants.Variant(wrong)), expected)
    assert off["output"] > 3e-5 and off["gradients"] > 1e-3  # tolerance: 1e-5


def test_results_leave_weights_and_moments_as_they_were(plain):
    ours, expected = plain
    again = variants.Setting(ours, variants.Variant()).results()
    for kind, tensors in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, again[kind])), kind
    assert any(x.abs().sum() > 0 for x in expected["updates"])


def varlen_attn(q, k, v, queries, keys, *most):
    """torch's varlen_attn, run by run: it has no CPU kernel."""
    out = [torch.zeros(0, *q.shape[1:])]
    for (a, b), (c, d) in zip(queries.unfold(0, 2, 1).tolist(), keys.unfold(0, 2, 1).tolist()):
        run = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        out += [T.F.scaled_dot_product_attention(*run).transpose(0, 1)] if b > a else []
    return torch.cat(out)


def test_attention_without_a_mask_is_attention_with_it(plain, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    ours, expected = plain
    variant = variants.VARIANTS["attention without a mask (flash)"]
    assert not ours.batch.mask.all()  # some of the text is padding
    off = variants.differences(variants.Setting(ours, variant), expected, variant.compares)
    assert set(off) == {"output", "gradients"} and max(off.values()) < 1e-5
    q, k, v = torch.randn(3, 2, 4, 40, 8).unbind()
    mask = torch.zeros(2, 1, 1, 40).index_fill(3, torch.arange(30, 40), -torch.inf)
    masked = T.F.scaled_dot_product_attention(q[:, :, :16], k, v, mask)
    torch.testing.assert_close(gpu_check.varlen(q[:, :, :16], k, v, 10), masked)


def test_symmetric_products_by_blocks_are_the_products(monkeypatch):
    monkeypatch.setattr(variants, "SYMMETRIC_FROM", 8)
    for shape in ((3, 24, 40), (2, 40, 17), (1, 9, 9)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(variants.orthogonalize_by_blocks(G), T.orthogonalize(G), atol=1e-4, rtol=1e-4)


def test_what_needs_a_gpu_or_ranks_says_so_in_a_line(in_tmp, capsys):
    assert CUDA and RANKS
    flags = [*SMALL, "--repa", "0", "--turns", "1", "--only", *RANKS, *([] if torch.cuda.is_available() else CUDA)]
    rows = variants.main(flags)["rows"]
    said = capsys.readouterr().out.splitlines()
    assert set(rows) == {"as it is"}
    for name in RANKS:
        assert f"{name}: needs ranks; start this with torchrun" in said
    if not torch.cuda.is_available():
        assert all(f"{name}: needs CUDA" in said for name in CUDA)


@pytest.mark.xdist_group("ranks")
def test_two_ranks_compare_the_variants_of_the_links(in_tmp):
    flags = [*SMALL, "--only", "ranks", "--turns", "1", "--out", "v.json"]
    done = shell(*torchrun(2), ROOT / "records/variants.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((in_tmp / "v.json").read_text())["rows"]
    assert set(rows) == {"as it is", *RANKS} and all(rows[name]["same"] for name in RANKS)
    assert rows["weights in flight"]["differences"]["updates"] == 0
