"""records/gpu_check.py at tiny sizes: what it will do on somebody's GPUs, it does here."""

import json
import math
import os
import re
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, shell, torchrun

from records import gpu_check
from train_prx import UserError

alone = pytest.mark.xdist_group("gpu_check")
PARTS = ["attention", "step", "kernels", "share of eight", "repa", "recompilations"]  # test_bench.py: variants and peers


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "check.json"
    gpu_check.main(["--tiny", "--out", str(out), "--only", *PARTS])
    assert out.stat().st_size < 1 << 20
    return json.loads(out.read_text())


TOGETHER = {}  # not a fixture's: pytest-xdist may tear one down between two tests


@pytest.fixture
def ranks(tmp_path_factory):
    """All parts of --ranks, on two, once."""
    if not TOGETHER:
        out = tmp_path_factory.mktemp("ranks") / "check.json"
        done = shell(*torchrun(2), ROOT / "records/gpu_check.py", "--ranks", "--tiny", "--out", out, timeout=560)
        assert done.returncode == 0, done.stderr[-3000:]
        assert out.stat().st_size < 1 << 20 and f"wrote {out}" in done.stdout
        TOGETHER.update(json.loads(out.read_text()))
    assert "cut_short" not in TOGETHER and not any("failed" in part for part in TOGETHER["parts"].values()), TOGETHER
    assert list(TOGETHER["parts"]) == [*gpu_check.TOGETHER, *gpu_check.FAULTS] == list(TOGETHER["seconds"])
    return TOGETHER["parts"]


# --- one GPU

@alone
def test_every_part_runs_and_is_timed(result):
    assert list(result["parts"]) == list(result["seconds"]) == PARTS and result["machine"]["torch"] == torch.__version__
    assert not any("failed" in part for part in result["parts"].values()), result["parts"]
    assert set(PARTS) | {"training", "failing rank", "variants", "peers"} == set(gpu_check.ALONE)
    assert result["mfu_is_over"] == 989e12


@alone
def test_attention_is_compared_in_output_and_gradients(result):
    found = result["parts"]["attention"]
    compared, timed = {"output", "dq", "dk", "dv"}, {"images", "ms"}
    for name, kinds in (("flash, 16 of 40 keys", compared | timed), ("flash, 16 of 40 keys, none fits", compared)):
        assert found[name].keys() == kinds and all(found[name][kind] < 1e-3 for kind in compared)
    assert found["flash, 16 of 40 keys"]["ms"] > 0
    assert set(found["cudnn, 16 of 40 keys"]) == {"failed"}  # none on a CPU: said, not raised


@alone
def test_a_wrong_backend_is_noticed(tmp_path, monkeypatch):
    """Its output is right, its gradient of the query is not a number."""
    real = torch.nn.functional.scaled_dot_product_attention

    def wrong(q, k, v, **kw):
        out = real(q, k, v, **kw)
        if torch._C._get_flash_sdp_enabled() and not torch._C._get_math_sdp_enabled():
            q.register_hook(lambda grad: grad * math.nan)
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    found = gpu_check.main(["--tiny", "--out", str(tmp_path / "x.json"), "--only", "attention"])
    row = found["parts"]["attention"]["flash, 16 of 40 keys"]
    assert row["dq"] == "NaN" and row["output"] < 1e-4 and row["dv"] < 1e-4


@alone
def test_the_time_of_a_step_divides_into_kinds_of_kernels(result):
    found = result["parts"]["kernels"]
    assert all(found[kind]["ms"] > 0 for kind in gpu_check.KINDS)
    assert any("attention" in name for name in found["kernels of attention"]["names"])
    for name, kind in (("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"), ("nvjet_tst_128x256", "products"),
                       ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"), ("aten::mm", "products"),
                       ("triton_poi_fused_mm__scaled_dot_product_efficient_attention_3", "other"), ("Memcpy", "other")):
        assert next(k for k, holds in gpu_check.KINDS.items() if re.search(holds, name)) == kind


@alone
def test_a_rank_of_eight_owns_less(result):
    share = result["parts"]["share of eight"]
    assert set(share) == {f"{part}, 1 of {n}" for part in ("Newton-Schulz", "passes") for n in (8, 1)}
    assert all(row["ms"] > 0 for row in share.values())


@alone
def test_a_second_pass_over_the_buckets_traces_nothing(result):
    graphs = result["parts"]["recompilations"]["graphs"]
    assert graphs["first_pass"] >= 4 and graphs["second_pass"] == 0  # two sizes, routed and not


@alone
def test_repa_has_a_price(result):
    found = result["parts"]["repa"]
    price = found["REPA"]["ms"] / found["without REPA"]["ms"] - 1
    assert found["REPA costs"]["share_of_step"] == pytest.approx(price)


@alone
def test_a_time_stands_beside_the_derived_one(tmp_path, monkeypatch):
    check = gpu_check.Check(True, tmp_path / "x.json", tmp_path)
    check.note_time("products", 514.0)
    assert check.found["products"] == dict(ms=514.0)
    check.tiny = False
    check.note_time("products", 514.0)
    assert check.found["products"] == dict(ms=514.0, derived_ms=257.0, over_derived=2.0)
    derived = gpu_check.DERIVED
    assert sum(derived[kind] for kind in gpu_check.KINDS) == derived["forward + backward"]


@alone
def test_what_does_not_fit_is_said_and_the_rest_is_kept(tmp_path, monkeypatch):
    def build(c, *args, real=gpu_check.bench.build, **kw):
        if c.optimizer == "muon":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(c, *args, **kw)

    monkeypatch.setattr(gpu_check.bench, "build", build)
    monkeypatch.setattr(gpu_check.bench, "matmul_rate", lambda *a: 1e12)
    rows = dict(large="--repa 0", small="--repa 0 --optimizer adamw")
    check = gpu_check.Check(True, tmp_path / "x.json", tmp_path)
    assert list(check.rows(rows, check.ours)) == ["small"]
    assert check.found["large"] == "does not fit into memory" and check.found["small"]["ms"] > 0


@alone
def test_a_part_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    def broken(check):
        """Breaks."""
        check.note("before", x=1)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check, "ALONE", dict(broken=broken, attention=gpu_check.attention))
    found = gpu_check.main(["--tiny", "--out", str(tmp_path / "x.json")])
    assert found["parts"]["broken"] == dict(before=dict(x=1), failed=dict(why="no such kernel"))
    assert "flash, 16 of 40 keys" in found["parts"]["attention"] and "no such kernel" in capsys.readouterr().err


@alone
@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM])
def test_a_check_that_is_cut_short_keeps_what_it_has(tmp_path, monkeypatch, number):
    """In the middle of a part; the trainer's runs that it has started are killed."""
    started = []

    def cut(check):
        """Is cut."""
        check.note("before", x=1)
        started.append(subprocess.Popen(["sleep", "1000"], cwd=check.folder))
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= gpu_check.BUDGET == 540
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            time.sleep(60)  # as if it were lost in a callback
        pytest.fail("it goes on")

    before = signal.getsignal(number)
    monkeypatch.setattr(gpu_check, "ALONE", dict(cut=cut, later=cut))
    monkeypatch.setattr(gpu_check, "AGAIN", 0.2)
    gpu_check.main(["--tiny", "--out", str(tmp_path / "x.json")])
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["parts"] == dict(cut=dict(before=dict(x=1))) and found["cut_short"] == "cut"
    assert started[0].wait(60) == -signal.SIGKILL
    assert signal.getsignal(number) == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


@alone
def test_bad_input_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="^--only nonsense is unknown; there are attention, step"):
        gpu_check.main(["--tiny", "--only", "nonsense"])
    with pytest.raises(UserError, match="^--ranks and torchrun .* go together"):
        gpu_check.main(["--tiny", "--ranks"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a CUDA GPU"):
            gpu_check.main([])


@alone
@pytest.mark.slow
def test_sixty_steps_fall_and_resume(tmp_path):
    found = gpu_check.main(["--tiny", "--out", str(tmp_path / "x.json"), "--only", "training"])["parts"]["training"]
    resumed = found["resumed"]
    assert len(resumed["losses"]["whole"]) == len(resumed["losses"]["cut"]) == 6 and resumed["differs_by"] == 0
    assert [run["code"] for name, run in found.items() if "rank(s)" in name] == [0, 0, 0]


# --- ranks

@pytest.mark.xdist_group("ranks")
class TestRanks:
    def test_collectives_are_timed_alone_and_beside_products(self, ranks):
        found = ranks["collectives"]
        names = {f"{name}{kind}" for kind in ("", " of vectors")
                 for name in ("reduce-scatter", "all-gather", "all-reduce of gradients")}
        assert set(found) == names | {"all-reduce of a norm", "agreement on the CPU"}
        assert all(row["ms"] > 0 for row in found.values())
        assert all(found[name]["bytes_per_s"] > 0 and math.isfinite(found[name]["hidden"]) for name in names)

    def test_a_step_and_the_variants_of_the_links_are_timed(self, ranks):
        assert [row["ms"] > 0 for row in ranks["step"].values() if "ms" in row] == [True, True]
        assert set(ranks["variants"]) == {"gradients in BF16 between ranks", "weights in flight"}
        assert all(row["same"] for row in ranks["variants"].values())

    def test_a_checkpoint_goes_on_on_fewer_ranks(self, ranks):
        found = ranks["fewer ranks"]
        runs = [f"{name}, {n} rank(s), stopped at {stop}" for name, n, stop in (
            ("whole", 2, 0), ("cut", 2, 6), ("cut", 1, 0))]
        assert [found[run]["code"] for run in runs] == [0, 0, 0]
        assert "1 rank(s) on cpu" in found[runs[2]]["said"] and "step-00000006 at step 6" in found[runs[2]]["said"]
        losses = found["resumed"]["losses"]
        assert len(losses["whole"]) == len(losses["cut"]) == 12 and found["resumed"]["differs_by"] < 1e-4

    def test_a_killed_rank_is_started_again_and_signals_to_all_at_once_leave_a_checkpoint(self, ranks):
        found = ranks["signals"]
        assert found["killed rank"]["goes_on"]
        end = found["signals"]
        assert end["event"] == "stopped" and end["checkpoint"] == f"step-{end['step']:08d}" and end["step"] > 0
        assert end["code"] != 0 and f"stopped at step {end['step']}" in end["said"] and end["passed_over"] == []

    def test_a_late_disk_costs_no_checkpoint(self, ranks):
        found = ranks["late rank"]["late rank"]
        assert found["code"] == 0 and found["checkpoints"] == ["step-00000002", "step-00000003"]
        assert found["seconds"] > 20 and "could not be written" not in found["said"]

    def test_a_failing_rank_says_why_and_ends_the_job(self, ranks):
        found = ranks["failing rank"]["failing rank"]
        assert found["code"] == 1 and found["says_why"] and found["seconds"] < 300  # its peers would wait for ten minutes
