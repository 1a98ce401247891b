"""PRX is diffusers' PRXTransformer2DModel: names, shapes, numbers. And the objective is the one in the papers."""

import dataclasses
import json

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

import train_prx as T

SMALL = dict(in_channels=4, patch_size=2, context_in_dim=24, hidden_size=64, mlp_ratio=3.5, num_heads=2, depth=3,
             axes_dim=[16, 16])


def diffusers_model(**config):
    from diffusers import PRXTransformer2DModel

    return PRXTransformer2DModel(**config).eval()


def randomise(model, seed=0):
    """Every parameter at random, modulation, norm scales and final layer included; outputs stay of order one."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        scale = p.shape[1] ** -0.5 if p.ndim == 2 else 0.3
        p.data = torch.randn(p.shape, generator=g) * scale + (1.0 if p.ndim == 1 and p.numel() == 32 else 0.0)
    return model


def inputs(height=16, width=16, batch=3, tokens=7, channels=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(tokens)[None] < torch.tensor([tokens, 3, 1])[:batch, None]
    return (torch.randn(batch, channels, height, width, generator=g), torch.rand(batch, generator=g) * 0.9 + 0.05,
            torch.randn(batch, tokens, 24, generator=g), mask)


def both(**changes):
    ours = randomise(T.PRX(**SMALL | changes))
    theirs = diffusers_model(**SMALL | changes)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize("bottleneck", [None, 12])
def test_output_equals_diffusers(masked, size, bottleneck):
    ours, theirs = both(bottleneck_size=bottleneck)
    x, t, text, mask = inputs(*size)
    mask = mask if masked else None
    a = ours(x, t, text, mask)
    b = theirs(hidden_states=x, timestep=t, encoder_hidden_states=text, attention_mask=mask).sample
    assert b.std() > 0.3, "the comparison means nothing on an output near zero"
    assert (a - b).abs().max() < 1e-5


def test_gradients_equal_diffusers():
    ours, theirs = both()
    x, t, text, mask = inputs()
    ours(x, t, text, mask).square().mean().backward()
    theirs(x, t, text, mask).sample.square().mean().backward()
    expected = {n: q.grad for n, q in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert (p.grad - expected[name]).abs().max() < 1e-5 * max(1, expected[name].abs().max()), name


def test_the_comparison_notices_every_input_and_every_parameter():
    """The proof that the test above can fail: whatever changes, the output moves by far more than its tolerance."""
    ours, _ = both()
    x, t, text, mask = inputs()
    with torch.no_grad():
        base = ours(x, t, text, mask)
        moved = lambda out: (out - base).abs().max().item()
        assert moved(ours(x, t, text + 0.1, mask)) > 1e-3
        assert moved(ours(x, t * 0.9, text, mask)) > 1e-3
        assert moved(ours(x + 0.1, t, text, mask)) > 1e-3
        assert moved(ours(x, t, text, torch.ones_like(mask))) > 1e-3
        for name, p in ours.named_parameters():
            old = p.clone()
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
            assert moved(ours(x, t, text, mask)) > 1e-3, f"{name} does not reach the output"
            p.copy_(old)


def test_padding_of_the_text_is_ignored():
    ours, _ = both()
    x, t, text, mask = inputs()
    changed = torch.where(mask[..., None], text, text + 100)
    assert torch.allclose(ours(x, t, text, mask), ours(x, t, changed, mask), atol=1e-6)


def test_the_1_2_b_state_dict_is_diffusers_name_by_name():
    with torch.device("meta"):
        ours, theirs = T.PRX(), diffusers_model()
    shapes = lambda m: {k: tuple(v.shape) for k, v in m.state_dict().items()}
    assert shapes(ours) == shapes(theirs)
    assert 1.16e9 < sum(p.numel() for p in ours.parameters()) < 1.18e9
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)


def test_an_exported_folder_loads_in_diffusers_and_back(tmp_path):
    from diffusers import PRXTransformer2DModel

    ours = randomise(T.PRX(**SMALL))
    T.export_transformer(ours.config, ours.state_dict(), tmp_path / "ours")
    theirs = PRXTransformer2DModel.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = T.load_transformer(tmp_path / "theirs")
    x, t, text, mask = inputs()
    assert torch.equal(ours(x, t, text, mask), again(x, t, text, mask))
    assert (theirs(x, t, text, mask).sample - again(x, t, text, mask)).abs().max() < 1e-5
    assert json.loads((tmp_path / "ours/config.json").read_text())["_class_name"] == "PRXTransformer2DModel"


def test_loading_names_what_is_missing(tmp_path):
    with pytest.raises(T.UserError, match="config.json"):
        T.load_transformer(tmp_path)


def test_a_fresh_model_outputs_zero_and_every_parameter_has_a_rule():
    model = T.initialize(T.PRX(**SMALL), 0)
    assert model(*inputs()).abs().max() == 0
    model.extra = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(AssertionError, match="no rule initialises extra"):
        T.initialize(model, 0)


def test_bf16_compute_follows_fp32_and_keeps_1_d_parameters_in_fp32():
    ours, _ = both()
    low = randomise(T.PRX(**SMALL))
    T.set_compute_dtype(low, torch.bfloat16)
    assert {p.dtype for p in low.parameters() if p.ndim == 1} == {torch.float32}
    assert {p.dtype for p in low.parameters() if p.ndim == 2} == {torch.bfloat16}
    a, b = ours(*inputs()), low(*inputs())
    assert b.dtype == torch.float32 and (a - b).norm() / a.norm() < 0.03


def test_flops_count_the_matrix_products(monkeypatch):
    monkeypatch.setattr(T, "BACKENDS", [SDPBackend.MATH])  # the counter knows its products
    model = randomise(T.PRX(**SMALL, span=(1, 2)))
    x, t, text, _ = inputs()
    keep = torch.arange(16).expand(3, -1)
    for routed, kept in ((None, 0), (keep, 16)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t, text, None, routed)
        ours = 3 * T.flops_per_image(model.config, 64, 7, kept, model.span)
        assert abs(ours / counter.get_total_flops() - 1) < 0.03  # theirs includes the time embedding


# --- the objective

def test_times_are_logit_normal_with_a_uniform_share_shifted_and_in_range(monkeypatch):
    def draw(shift, uniform):
        monkeypatch.setattr(T, "UNIFORM", uniform)
        return T.draw_times(200_000, shift, torch.Generator().manual_seed(0))

    assert T.UNIFORM == 0.1
    t = draw(1.0, 0.0)
    assert abs(torch.logit(t).mean()) < 0.01 and abs(torch.logit(t).std() - 1) < 0.01
    assert abs(draw(1.0, 1.0).mean() - 0.5) < 0.005 and abs(draw(1.0, 1.0).std() - 12 ** -0.5) < 0.005
    low = lambda x: (x < 0.02).double().mean().item()
    assert low(t) < 2e-4 and abs(low(draw(1.0, 0.1)) - 0.002) < 5e-4  # a tenth of 2 %
    s = draw(3.0, 0.0)
    assert abs(torch.logit(s).mean() - torch.log(torch.tensor(3.0))) < 0.01  # the shift adds log s to the logit
    assert all(x.min() >= 1e-3 and x.max() < 1 for x in (t, s, draw(1.0, 1.0), draw(30.0, 1.0)))


@pytest.mark.parametrize("predict", ["v", "x"])
def test_loss_equals_an_explicit_loop(predict):
    g = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(4, 3, 8, 8, generator=g), torch.randn(4, 3, 8, 8, generator=g)
    t = torch.tensor([0.01, 0.3, 0.7, 0.99])
    model = lambda x, t, *_: torch.tanh(x) * t[:, None, None, None]
    got = T.flow_matching_loss(model, x_0, eps, t, None, None, dataclasses.replace(T.Config(), predict=predict))[0]
    for i in range(4):
        x_t = (1 - t[i]) * x_0[i] + t[i] * eps[i]
        out = torch.tanh(x_t) * t[i]
        clamp = max(t[i].item(), 0.05)
        v, target = (out, eps[i] - x_0[i]) if predict == "v" else ((x_t - out) / clamp, (x_t - x_0[i]) / clamp)
        assert torch.allclose(got[i], ((v - target) ** 2).mean(), rtol=1e-5)
