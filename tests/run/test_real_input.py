"""The verbs on real input: traces, a mission report and its questions, the real tokenizer, and a
model with Qwen3-0.6B's widths and vocabulary, cut to two layers and randomly initialised."""

import json
import resource
import subprocess

import pytest
from run import small

from jaxdeep.agent import record
from jaxdeep.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def model(shared, tmp_path):
    """A config.json beside the real tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads(shared("qwen3/configs/Qwen--Qwen3-0.6B_config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    (folder / "tokenizer.json").write_bytes(shared("qwen3/tokenizer.json").read_bytes())
    return [
        f"--config.model.path={folder}",
        "--config.model.weights=random",
        "--config.model.dtype=float32",
    ]


def run(*args):
    done = subprocess.run(
        small.command(*args), env=small.environment(), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak memory so far: {peak:.1f} GiB")
    return peak


def test_one_sft_step_on_research_traces(model, shared, tmp_path):
    workdir = tmp_path / "sft"
    peak = run(
        "sft",
        "--config=configs/search/sft.py",
        f"--config.data.source=jsonl:{shared('traces/webdancer.jsonl')}",
        "--config.batch.rows=1",
        "--config.batch.length=4096",
        "--config.train.steps=1",
        f"--workdir={workdir}",
        *model,
    )
    (row,) = read_metrics(workdir / "metrics.jsonl")
    # a random model knows nothing: about the entropy of a uniform guess among 151,936 ids
    assert 10 < row["train/loss"] < 14 and row["train/tokens"] > 200 and row["train/grad_norm"] > 0
    assert peak < 10


def test_two_grpo_steps_on_the_questions_of_a_report(model, shared, tmp_path):
    workdir = tmp_path / "grpo"
    peak = run(
        "grpo",
        "--config=configs/search/grpo.py",
        f"--config.env.corpus={shared('apollo13/mission_report.md')}",
        f"--config.env.questions={shared('apollo13/rezero_questions.jsonl')}",
        "--config.grpo.prompts=2",
        "--config.grpo.group=4",
        "--config.grpo.tolerance=1e-4",
        "--config.rollout.slots=8",
        "--config.rollout.limits.turn_tokens=48",
        "--config.rollout.limits.max_tokens=1024",
        "--config.rollout.limits.max_turns=3",
        "--config.batch.rows=2",
        "--config.batch.length=1024",
        "--config.train.steps=2",
        f"--workdir={workdir}",
        *model,
    )
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    seen = record.read(workdir / "rollouts" / "000002.jsonl")
    assert len(seen) == 8 and all(t.sampled for t in seen)
    assert peak < 10
