"""The verb that checks a configuration: every part of it, and each problem is told."""

import json
import textwrap

import pytest

from jaxdeep.run import cli

BROKEN = """
    import dataclasses

    from jaxdeep.agent.base import Env
    from jaxdeep.types import Message, Task


    class Ask(Env):
        def __init__(self, task):
            self.task = task

        async def open(self):
            return [Message("user", self.task.question * (1 + 999 * (self.task.id == "2")))]


    @dataclasses.dataclass(frozen=True)
    class Broken:
        rewards = {"right": (1.0, lambda task, trajectory: 1.0)}

        def load(self):
            return self

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return Task(str(index), "Say yes.", ("yes",))

        def env(self, task):
            return Ask(task)

        def gold(self, task):
            return [Message("assistant", "yes")]
"""
GRPO = ["--config=configs/search/grpo.py", "--config.model.path=tiny"]


def test_the_quickstart_is_valid(capsys):
    assert cli.main(["validate", "--tasks=3"]) == 0
    said = capsys.readouterr().out
    for key in ("sft.env", "grpo.env", "grpo.dev", "test.env"):
        assert f"{key}: 3 of " in said
    assert "sft.data: demos (endless rows)" in said and said.endswith("nothing is wrong\n")


def test_every_problem_of_a_task_set_is_told(tmp_path, capsys):
    (tmp_path / "broken.py").write_text(textwrap.dedent(BROKEN))
    words = ["validate", *GRPO, f"--config.env.taskset={tmp_path}/broken.py:Broken", "--tasks=all"]
    assert cli.main([*words, "--config.rollout.limits.max_tokens=500"]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: env: ")]
    assert len(errors) == 2 and captured.out.endswith("2 problems\n")
    assert any("prompt of the task '2'" in e and "(1 of the 4 tasks tried)" in e for e in errors)
    assert any("an empty answer to the task '0' earns 1" in error for error in errors)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config.env.corpus=gone/"], "error: env: there is no corpus at gone"),
        (["--config.env.k=0"], "error: env.k=0 must be at least 1"),
        (["--config.grpo.eval_every=5"], "error: grpo.eval_every=5 needs a section dev"),
        (["--tasks=few"], "error: --tasks=few is neither a number of tasks nor all"),
        (["--config.train.checkpoints=gs://b/x"], "pip install 'jaxdeep[gs]'"),
    ],
)
def test_what_is_wrong_elsewhere_is_told(flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Who?", "answer": "I"}))
    words = ["validate", *GRPO, f"--config.env.questions={tmp_path}/q.jsonl", *flags]
    assert cli.main(words) == 2
    assert says in capsys.readouterr().err


def test_the_data_of_a_run_are_opened(tmp_path, capsys):
    sft = ["validate", "--config=configs/search/sft.py", "--config.model.path=tiny"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    assert cli.main([*sft, f"--config.data.source=jsonl:{rows}"]) == 0
    assert "data: rows (1 rows)" in capsys.readouterr().out
    assert cli.main([*sft, "--config.data.source=jsonl:gone.jsonl"]) == 2
    assert "error: data: " in capsys.readouterr().err
