"""A whole run that has to learn: mazes, where GRPO goes on from what SFT left."""

import json
import os
import subprocess

import pytest
from run import small


@pytest.mark.slow
def test_grpo_gains_ten_points_on_sft_in_mazes(tmp_path):
    flags = ["--config=configs/toy/maze.py", f"--workdir={tmp_path}"]
    alone = os.environ | {"XLA_FLAGS": ""}  # not the suite's eight slow devices
    subprocess.run(small.command("quickstart", *flags), check=True, timeout=3600, env=alone)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["n"] >= 200 and found["base_em"] < 0.1
    assert found["grpo_em"] >= found["sft_em"] + 0.1 and found["mcnemar_p"] < 0.001
