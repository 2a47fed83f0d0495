"""Talk to a policy that has tools: its thinking, its calls and its answer, turn by turn.

`train.start` names the run whose newest adapter speaks, or the folder of a PEFT adapter; empty is
the base. Every line asks a new question; an empty line or Ctrl-D ends. `--question` asks one and
exits."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.text import Text

from jaxdeep.agent.base import Taskset
from jaxdeep.agent.rollout import rollout
from jaxdeep.errors import ConfigError
from jaxdeep.rewards.answers import final_answer
from jaxdeep.setup.policy import OpenPolicy, open_policy
from jaxdeep.setup.runs import EvalRun
from jaxdeep.setup.sections import load_run
from jaxdeep.types import Message, Sampling, Task, Trajectory

DEFAULT_CONFIG = None
KEYS = {"": ("EvalRun",)}
EXAMPLE = (
    "python -m jaxdeep chat --config=configs/search/eval.py "
    '--config.train.start=runs/grpo --question="What is the capital of Chad?"'
)
NEEDS = "the run of the example of grpo, its corpus in docs/, and other questions in test.jsonl"
FLAGS = {
    "question": "ask this and exit",
    "temperature": "0 (the default) takes the most likely words, 1 samples",
}


def main(config: ConfigDict, workdir: Path, question: str = "", temperature: str = "0") -> int:
    """Answer `question`, or every line that is typed."""
    run = load_run(EvalRun, config)
    try:
        sampling = Sampling(float(temperature))
    except ValueError:
        raise ConfigError(f"--temperature={temperature} is not a number") from None
    taskset, console = run.env.load(), Console()
    with open_policy(run, "chat") as policy:
        if question:
            ask(console, taskset, policy, question, run, sampling, seed=0)
            return 0
        for seed in range(1_000_000):
            try:
                line = console.input("[bold]question>[/bold] ").strip()
            except EOFError:
                break
            if not line:
                break
            ask(console, taskset, policy, line, run, sampling, seed)
    return 0


def ask(
    console: Console,
    taskset: Taskset,
    policy: OpenPolicy,
    question: str,
    run: EvalRun,
    sampling: Sampling,
    seed: int,
) -> None:
    """One conversation about a question without a known answer, shown when it is over."""
    task = Task("chat", question)
    conversation = rollout(
        taskset.env(task),
        task,
        policy.engine,
        policy.chat,
        limits=run.rollout.limits,
        seed=seed,
        sampling=sampling,
    )
    show(console, asyncio.run(conversation))


def show(console: Console, trajectory: Trajectory) -> None:
    """The turns of a conversation as a terminal shows them."""
    for message in trajectory.messages:
        if message.role in ("assistant", "tool"):
            _show(console, message)
    final = final_answer(trajectory)
    text = final if final is not None else f"no answer ({trajectory.stop.value})"
    console.print(Text(text, style="bold green" if final is not None else "bold red"))


def _show(console: Console, message: Message) -> None:
    if message.reasoning:
        console.print(Text(message.reasoning.strip(), style="dim italic"))
    if message.role == "tool":
        console.print(Text(message.content, style="dim"))
    elif message.content and not message.calls:
        console.print(Text(message.content))
    for call in message.calls:
        words = call.error or ", ".join(f"{k}={v!r}" for k, v in call.arguments.items())
        console.print(Text(f"{call.name or 'unreadable call'}({words})", style="cyan"))
