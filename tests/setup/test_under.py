"""`lora.under`: an adapter is trained over frozen ones, named in the configuration."""

import pytest
from run import small

from jaxdeep import config as configs
from jaxdeep.errors import CheckpointError
from jaxdeep.metrics import read_metrics
from jaxdeep.parallel import mesh as meshes
from jaxdeep.run import cli
from jaxdeep.setup import weights
from jaxdeep.setup.runs import SftRun
from jaxdeep.setup.sections import load_run


@pytest.mark.slow
def test_a_run_trains_over_another_ones_adapter(tmp_path, capsys):
    """SFT leaves one, a second SFT of another rank lies over it, and GRPO samples from their
    sum."""
    sft = [f"--config={small.config(tmp_path, 'sft', steps=2)}", "--config.optim.lr=1e-2"]
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert cli.main(["sft", *sft, f"--workdir={first}"]) == 0
    under = f"--config.lora.under=('{first}',)"
    over = ["--config.lora.rank=2", under]
    assert cli.main(["sft", *sft, *over, f"--workdir={second}"]) == 0
    # it begins where the first ended, not at the base
    last = read_metrics(first / "metrics.jsonl")[-1]["train/loss"]
    losses = [row["train/loss"] for row in read_metrics(second / "metrics.jsonl")]
    assert losses[0] < read_metrics(first / "metrics.jsonl")[0]["train/loss"]
    assert abs(losses[0] - last) < 0.5
    grpo = [f"--config={small.config(tmp_path, 'grpo', steps=1)}", *over]
    grpo += [f"--config.env.taskset={small.__file__}:Lucky", f"--config.train.start={second}"]
    assert cli.main(["grpo", *grpo, f"--workdir={third}"]) == 0
    (row,) = read_metrics(third / "metrics.jsonl")
    assert row["train/max_logp_diff"] < 1e-4
    # the second one's adapter is nobody's without the first
    assert cli.main(["grpo", *grpo, "--config.lora.under=()", f"--workdir={tmp_path / 'no'}"]) == 2
    assert "lora.under" in capsys.readouterr().err


def test_what_is_no_adapter_is_refused(tmp_path):
    overrides = [f"--config.lora.under=('{tmp_path / 'nowhere'}',)"]
    run = load_run(SftRun, configs.load(small.config(tmp_path, "sft"), overrides))
    with pytest.raises(CheckpointError, match="nowhere: there is neither a run"):
        weights.load_under(run.spec(), meshes.make_mesh())
