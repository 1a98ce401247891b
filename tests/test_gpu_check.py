"""records/gpu_check.py at tiny sizes: what it will do on somebody's GPU, it does here."""

import json
import math

import pytest
import torch

from records import gpu_check
from train_prx import UserError

pytestmark = pytest.mark.xdist_group("gpu_check")
PARTS = ["attention", "step", "share of eight", "repa", "recompilations"]  # test_bench.py has the variants and the peers


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "check.json"
    gpu_check.main(["--tiny", "--out", str(out), "--only", *PARTS])
    assert out.stat().st_size < 1 << 20
    return json.loads(out.read_text())


def test_every_part_runs_and_is_timed(result):
    assert list(result["parts"]) == list(result["seconds"]) == PARTS and result["machine"]["torch"] == torch.__version__
    assert not any(isinstance(part, str) for part in result["parts"].values()), result["parts"]


def test_attention_is_compared_in_output_and_gradients(result):
    flash = result["parts"]["attention"]["flash, 16 of 40 keys"]
    assert all(flash[k] < 1e-4 for k in ("output", "dq", "dk", "dv"))
    assert isinstance(result["parts"]["attention"]["cudnn, 16 of 40 keys"], str)  # none on a CPU: said, not raised


def test_a_rank_of_eight_owns_less(result):
    share = result["parts"]["share of eight"]
    assert set(share) == {"rank 0 of 8", "rank 0 of 1"} and all(row["ms"] > 0 for row in share.values())


def test_a_second_pass_over_the_buckets_compiles_nothing(result):
    graphs = result["parts"]["recompilations"]
    assert graphs["first_pass"] > 0 and graphs["second_pass"] == 0


def test_a_part_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    def broken(check):
        """Breaks."""
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check, "PARTS", dict(broken=broken, attention=gpu_check.attention))
    found = gpu_check.main(["--tiny", "--out", str(tmp_path / "x.json"), "--only", "broken", "attention"])
    assert found["parts"]["broken"] == "failed: no such kernel" and "flash, 16 of 40 keys" in found["parts"]["attention"]
    monkeypatch.setattr(gpu_check, "BUDGET", -1.0)
    found = gpu_check.main(["--tiny", "--out", str(tmp_path / "x.json"), "--only", "attention"])
    assert found["parts"] == {"attention": "left out: no time"}


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        gpu_check.main([])


@pytest.mark.slow
def test_sixty_steps_fall_and_resume(tmp_path):
    training = gpu_check.main(["--tiny", "--out", str(tmp_path / "x.json"), "--only", "training"])["parts"]["training"]
    assert len(training["losses"]["whole"]) == len(training["losses"]["cut"]) == 6
    assert training["resume_differs_by"] == 0 and not math.isnan(training["resume_differs_by"])
