"""Two processes that evaluate, export and talk together do what one does alone."""

import json
import re

import numpy as np
import pytest
from run import small
from run.several import finish, identities, start

from jaxdeep.agent import record
from jaxdeep.model import tensors
from jaxdeep.run import cli

# the three verbs in one process: each by itself would take seconds to start
PROGRAM = """
import pathlib, sys
from jaxdeep.parallel import hosts, mesh as meshes
from jaxdeep.run import chat, eval, export
from jaxdeep.setup import past
from jaxdeep.setup.runs import EvalRun
from jaxdeep.setup.tasksets import override
from jaxdeep.types import Sampling

run, out, together = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
meshes.WHOLE_SLICE_CHIPS = ("cpu",) if together == "together" else ()
with hosts.joined():
    config = override(past.policy_config(run), ["--config.rollout.slots=2", "--config.env.count=6"])
    made = past.start(EvalRun, config)
    eval.evaluate(made, config, out)
    for what in ("adapter", "merged"):
        export.export(made, out / what, what)
    chat.converse(made, Sampling(0.0), False, "What is the capital of Chad?")
"""


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("apart", id="each its devices"),
        pytest.param("together", id="all devices together", marks=pytest.mark.slow),
    ],
)
def test_two_processes_do_what_one_does(how, tmp_path):
    for folder in ("one", how):
        (tmp_path / folder).mkdir()
    config = small.config(tmp_path, "sft", steps=2)
    run = tmp_path / "run"
    assert cli.main(["sft", f"--config={config}", f"--workdir={run}", "--config.optim.lr=0.1"]) == 0
    members = [("one", ()), *((how, identity) for identity in identities(2))]
    printed = finish(
        [
            start(PROGRAM, str(run), str(tmp_path / name), name, identity=identity)
            for name, identity in members
        ]
    )
    one = record.read(tmp_path / "one" / "eval.jsonl")
    assert len(one) == 6 and len({t.task.id for t in one}) == 6
    both = record.read(tmp_path / how / "eval.jsonl")
    assert [t.tokens for t in both] == [t.tokens for t in one]
    assert not (tmp_path / how / "process-1" / "eval.jsonl").exists()
    for what, file in (("adapter", "adapter_model"), ("merged", "model")):
        theirs, ours = (
            tensors.header(tmp_path / place / what / f"{file}.safetensors")
            for place in ("one", how)
        )
        assert theirs.keys() == ours.keys()
        for key, entry in theirs.items():
            # sums are in another order: one rounding
            np.testing.assert_allclose(ours[key].read(), entry.read(), atol=1e-6)
    settings = json.loads((tmp_path / how / "adapter" / "run.json").read_text())
    assert settings["config"]["lora"]["rank"] == 4
    # a library of jax's says there that the processes found each other
    printed = [re.sub(r"^\[Gloo\].*\n", "", text, flags=re.MULTILINE) for text in printed]
    alone, first, second = printed
    assert alone.strip() and alone == first and second == ""
