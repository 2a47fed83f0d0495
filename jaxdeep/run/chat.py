"""Talk to a policy that has the search tool: its thinking, its searches and its answer, turn by turn.

`train.start` names the run whose newest adapter speaks, or the folder of a PEFT adapter; empty is the
base. Every line asks a new question; an empty line or Ctrl-D ends. `--question` asks one and exits.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.text import Text

from jaxdeep import programs
from jaxdeep.agent.rollout import rollout
from jaxdeep.chat.format import ChatFormat
from jaxdeep.envs.qa import SearchTaskset
from jaxdeep.errors import ConfigError
from jaxdeep.parallel import mesh as meshes
from jaxdeep.rewards.answers import final_answer
from jaxdeep.run import eval as evaluate
from jaxdeep.sample.engine import Engine
from jaxdeep.setup import sections as setup
from jaxdeep.train import optim
from jaxdeep.train import state as states
from jaxdeep.types import Message, Sampling, Task, Trajectory

DEFAULT_CONFIG = None
EXAMPLE = (
    "python -m jaxdeep chat --config=configs/eval_search.py "
    '--config.train.start=runs/grpo --question="What is the capital of Chad?"'
)
FLAGS = {
    "question": "ask this and exit",
    "temperature": "0 (the default) takes the most likely words, 1 samples",
}


def main(config: ConfigDict, workdir: Path, question: str = "", temperature: str = "0") -> int:
    """Answer `question`, or every line that is typed."""
    part = evaluate.parts(config)
    try:
        sampling = Sampling(float(temperature))
    except ValueError:
        raise ConfigError(f"--temperature={temperature} is not a number") from None
    chat = setup.chat_of(part["model"])
    taskset = setup.taskset_of(part["env"])
    mesh = meshes.make_mesh(part["mesh"])
    spec = setup.spec_of(part["model"], part["lora"], optim.OptimConfig(lr=0.0, steps=1))
    setup.check_vocabulary(chat, spec.model)
    params, state = setup.load_or_init(part["train"], part["model"], spec, mesh)
    weights, adapter = states.policy(spec, params, state.trained)
    programs.compile_all(
        programs.Workload("chat", spec, engine=setup.size_of(part["rollout"])), mesh, mesh
    )
    engine = setup.engine_of(part["rollout"], weights, spec, mesh)
    engine.set_adapter(adapter)
    console = Console()

    def ask(text: str, seed: int) -> None:
        show(
            console,
            asyncio.run(answer(taskset, engine, chat, text, part["rollout"], sampling, seed)),
        )

    try:
        if question:
            ask(question, 0)
            return 0
        for seed in range(1_000_000):
            try:
                line = console.input("[bold]question>[/bold] ").strip()
            except EOFError:
                break
            if not line:
                break
            ask(line, seed)
    finally:
        engine.close()
    return 0


async def answer(
    taskset: SearchTaskset,
    engine: Engine,
    chat: ChatFormat,
    text: str,
    settings: setup.RolloutConfig,
    sampling: Sampling,
    seed: int,
) -> Trajectory:
    """One conversation about a question without a known answer."""
    task = Task("chat", text)
    env = taskset.env(task)
    return await rollout(
        env, task, engine, chat, limits=settings.limits, seed=seed, sampling=sampling
    )


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
