"""No step waits for the GPU or one slow read, blocks compile once per shape, and warm-up leaves no trace."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from conftest import losses, same, weights
from test_shards import config, pooled, write_shards
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_prx as T

SIZE = dict(in_channels=3, patch_size=4, context_in_dim=20, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=3)


class Watch(TorchDispatchMode):
    """Fails on a copy between devices that waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in [*args, out] if isinstance(x, torch.Tensor) and x.ndim}
        assert len(devices) < 2 or (kwargs or {}).get("non_blocking"), f"{func} waits"
        return out


def test_nothing_in_a_step_waits_for_the_gpu(monkeypatch):
    """On meta tensors, which have no values: reading one raises, and so does, here, a copy between devices that waits.
    Every technique at once, with the first step's tables made beforehand as in training."""
    class Random:  # a teacher without the resizing and the network
        patch, width = 4, 24

        def __call__(self, images, rows, columns):
            return images.mean((1, 2, 3))[:, None, None] * torch.ones(rows * columns, 24, device=images.device)

    c = dataclasses.replace(T.Config(), batch=8, weight_decay=0.1, repa=0.5, repa_layer=1, pdino=0.1, contrastive=0.05,
                            patch=4, accumulate=1)
    with torch.device("meta"):
        nets = nn.ModuleDict(dict(model=T.PRX(**SIZE, span=(1, 2), scorer=True), repa=T.Alignment(32, 24, "repa")))
        x, pixels = (torch.empty(8, 3, 16, 16, dtype=torch.uint8) for _ in range(2))
        text, mask, eps = torch.empty(8, 8, 20), torch.ones(8, 8, dtype=torch.bool), torch.empty(8, 3, 16, 16)
        batch = T.Batch(x, torch.empty(8), text, mask, pixels, eps, torch.empty(8, 8, dtype=torch.long))
    world, frozen = T.World(device=torch.device("meta")), T.Frozen(teacher=Random(), critic=Random())
    optimizer = T.MuonAdamW(nets, c, world)
    T.set_compute_dtype(nets, torch.bfloat16)
    log = T.Heartbeat(None, 0.0)

    def step():
        loss, by_time = T.training_step(nets, frozen, batch, c, True)
        optimizer.accumulate()
        log.pending.append((loss, by_time, optimizer.step(0.5), 0.5))

    step()
    for name in ("tensor", "as_tensor"):  # their copies wait, too, and are not seen by the watch
        monkeypatch.setattr(torch, name, lambda *a, **k: pytest.fail("torch.tensor waits for the GPU"))
    with Watch():
        step()
    assert len(log.pending) == 2


def test_blocks_compile_whole_and_once_per_shape():
    """No graph breaks (fullgraph), one graph for all blocks, one more where tokens are routed: on meta tensors, which
    stop before code is generated. BF16, forward and backward."""
    with torch.device("meta"):
        model = T.PRX(**SIZE, span=(1, 2))
        x, t, text = torch.empty(4, 3, 16, 16), torch.empty(4), torch.empty(4, 8, 20)
        mask, keep = torch.ones(4, 8, dtype=torch.bool), torch.empty(4, 8, dtype=torch.long)
    T.set_compute_dtype(model, torch.bfloat16)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for routed, graphs in ((None, 1), (keep, 2), (None, 2), (keep, 2)):
        out = model(x, t, text, mask, routed)
        out.square().mean().backward()
        assert out.shape == x.shape and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


@pytest.mark.parametrize("workers", [2, 1])
def test_a_slow_disk_is_read_by_as_many_workers_as_there_are(tmp_path, monkeypatch, workers):
    """Where bytes leave the file, a worker waits until a second one is there: with two all goes on, with one it stands.
    Counted, not timed. The trainer's own thread copies nothing."""
    both, readers = threading.Barrier(2, timeout=60 if workers == 2 else 0.1), set()

    class OnDisk(torch.Tensor):
        """A view of it costs nothing; whoever copies it, waits."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            if func is torch.Tensor.__getitem__:
                return out
            readers.add(threading.current_thread())
            both.wait()
            return out.as_subclass(torch.Tensor)

    loader = pooled(config(write_shards(tmp_path / "d"), batch=8), workers, monkeypatch)
    for tensors in loader.data.tensors.values():
        tensors["image"] = tensors["image"].as_subclass(OnDisk)
    if workers == 2:
        assert all(len(next(loader).x) == 8 for _ in range(4))
    else:
        with pytest.raises(threading.BrokenBarrierError):
            next(loader)
    both.abort()
    loader.pool.shutdown(wait=True, cancel_futures=True)
    assert len(readers) == workers and threading.main_thread() not in readers


# --- warm-up

@pytest.fixture
def two_stages(shards, monkeypatch):
    """A function that runs the micro track in two stages with all there is; only the first has REPA. All weights are
    random: behind gates of zero, as a run begins, most gradients would be zero."""
    def initialize(module, seed, real=T.initialize):
        for p in real(module, seed).parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        return module

    monkeypatch.setattr(T, "initialize", initialize)
    stages = [T.Stage("a", 0.5), T.Stage("b", 0.5, dict(repa=0.0, batch=8, captions="short"))]
    base = dataclasses.replace(
        T.TRACKS["micro"][0], repa=0.5, batch=16, hidden=32, heads=2, depth=4, tread_blocks="1-2", tread=0.5, ema=0.9,
        weight_decay=0.1, accumulate=2, steps=8, lr=0.02, lr_adamw=0.02, captions="mix:0.5", samples=0, sample_steps=2)
    monkeypatch.setitem(T.TRACKS, "micro", (base, stages))
    flags = ["--track", "micro", "--compile", "off", "--compute", "fp32"]
    return lambda *more: T.main([*flags, *map(str, more)]) == 0


def everything_of(r: T.Run):
    """Copies of all that a run holds and a step may change."""
    tensors = {f"net/{n}": p.detach().clone() for n, p in r.nets.named_parameters()}
    tensors |= {k: v.clone() for k, v in r.optimizer.state_dict().items()}
    tensors |= {f"grads/{i}": flat.grads.clone() for i, flat in enumerate(r.optimizer.flats)}
    tensors |= {f"ema/{i}": flat.ema.clone() for i, flat in enumerate(r.optimizer.flats)}
    grads = [p.grad for p in r.nets.parameters()]
    return tensors, dict(state=dict(r.state), grads=grads)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_warm_up_leaves_weights_moments_average_and_counts_as_they_were(two_stages, monkeypatch, dtype):
    seen, warmed, real, step = [], [], T.warm_up, T.training_step

    def warm_up(r):
        seen.append(everything_of(r))
        real(r)
        seen.append(everything_of(r))

    def training_step(nets, frozen, part, c, align):
        if len(seen) == 1:
            warmed.append((c.batch, align, len(part.x)))
        return step(nets, frozen, part, c, align)

    monkeypatch.setattr(T, "warm_up", warm_up)
    monkeypatch.setattr(T, "training_step", training_step)
    assert two_stages("--weights", dtype, "--stop-after", 1)
    (before, counts), (after, counts_after) = seen
    assert same(before, after) and counts == counts_after and len(before) > 100
    # every stage, its own batch in micro-batches; with the teacher where it has one, without where it goes
    assert set(warmed) == {(16, True, 8), (16, False, 8), (8, False, 4)}


@pytest.mark.parametrize("cut", [False, True])
def test_a_run_is_bit_for_bit_the_one_without_warm_up(two_stages, monkeypatch, cut):
    """Weights, losses, data order, draws; also of a run that is stopped in both stages."""
    stops = (3, 6, 0) if cut else (0,)
    for stop in stops:
        assert two_stages("--name", "warm", "--stop-after", stop)
    monkeypatch.setattr(T, "warm_up", lambda r: {})
    assert two_stages("--name", "cold")
    assert losses("warm") == losses("cold") and len(losses("cold")) == 8 and np.isfinite(losses("cold")).all()
    assert same(weights("warm"), weights("cold"))
