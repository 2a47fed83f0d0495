"""The loop to read, `grpo_minimal`, does what it says."""

import jax
import numpy as np
import pytest
from run import small

from jaxdeep import config as configs
from jaxdeep.errors import DataError
from jaxdeep.metrics import read_metrics
from jaxdeep.model import load
from jaxdeep.run import grpo_minimal
from jaxdeep.setup.runs import GrpoRun
from jaxdeep.setup.sections import load_run
from jaxdeep.train import checkpoint


def test_it_trains_on_what_it_samples(tmp_path):
    overrides = [f"--config.env.taskset={small.__file__}:Lucky", "--config.mesh.data=1"]
    overrides += ["--config.train.steps=3"]
    config = configs.load(small.config(tmp_path, "grpo"), overrides)
    run = load_run(GrpoRun, config)
    meshes = grpo_minimal.meshes
    one = meshes.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda cfg: one)
        state = grpo_minimal.train(run, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        # fresh rollouts of the policy that learns from them: trainer and sampler agree, the ratio
        # is 1
        assert row["train/max_logp_diff"] < 1e-4 and row["train/tokens"] == row["grpo/loss_tokens"]
    moved = {name: load.on_host(pair["b"]) for name, pair in state.trained.items()}
    assert all(np.abs(b).max() > 1e-5 for b in moved.values())
    assert int(load.on_host(state.step)) == 3
    saved = checkpoint.about(tmp_path / "run")
    assert saved["lora"]["rank"] == 4  # export and train.start take it
    with pytest.raises(DataError, match="holds a run"):
        grpo_minimal.train(run, tmp_path / "run")
