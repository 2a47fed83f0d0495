"""Talk to a policy that has tools: its thinking, its calls and its answer, as they are written.

RUN is the folder of a run, also of a quickstart, or gs://... where its checkpoints are: its newest
adapter speaks as it was trained, with the tools of its task set, and what --config.KEY=VALUE
changes is said. With --config=FILE.py instead `train.start` names the run, or the folder of a PEFT
adapter; empty is the base.

Ctrl-C stops the answer that is being written, and leaves at an empty prompt; so does Ctrl-D.
`/help` lists the commands. `--question` asks one and exits. Of several processes the first one
talks."""

from __future__ import annotations

import asyncio
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import prompt_toolkit
from ml_collections import ConfigDict
from rich.console import Console
from rich.text import Text

from jaxdeep.agent.talk import Conversation, Plain, Result
from jaxdeep.chat.format import CallEnd, ContentText, Event, ReasoningText
from jaxdeep.errors import ConfigError, JaxdeepError
from jaxdeep.parallel import hosts
from jaxdeep.parallel.rounds import Rounds
from jaxdeep.rewards.answers import final_answer
from jaxdeep.setup import past
from jaxdeep.setup.policy import open_policy
from jaxdeep.setup.runs import EvalRun
from jaxdeep.types import Sampling, Stop, ToolCall, Trajectory
from jaxdeep.workdir import home

DEFAULT_CONFIG = None
RUN = "optional"
KEYS = {"": ("EvalRun",)}
EXAMPLE = (
    'python -m jaxdeep chat runs/quickstart-quickstart --question="What is the capital of Chad?"'
)
NEEDS = "the run that the quickstart leaves"
FLAGS = {
    "question": "ask this and exit",
    "temperature": "0 (the default) takes the most likely words, 1 samples",
    "memory": "on or off: whether a line goes on from those before; default: off with a task set",
}
PROCESSES = True
COMMANDS = {
    "/reset": "forget what was said",
    "/save FILE": "write the conversation as a JSONL file that SFT reads",
    "/help": "this list",
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # nothing of a model's may move the cursor


def main(
    config: ConfigDict,
    workdir: Path,
    question: str = "",
    temperature: str = "0",
    memory: str = "",
    **process: str,
) -> int:
    """Answer `question`, or every line that is typed; `process` says which of several this is."""
    sampling = read_sampling(temperature)
    if memory not in ("", "on", "off"):
        raise ConfigError(f"--memory={memory} is on or off")
    with hosts.joined(**process):
        run = past.start(EvalRun, config, first=jax.process_index() == 0)
        # a question of a task set stands alone in training
        converse(run, sampling, memory == "on" or (not memory and run.env is None), question)
    return 0


def converse(run: EvalRun, sampling: Sampling, memory: bool, question: str = "") -> None:
    """Answer the question, or what a person types in the first process, which the others serve."""
    env = run.env.load().env if run.env else Plain
    with (
        open_policy(run, "chat", conversations=1) as policy,
        policy.engine.serving(),
        Rounds("chat") as rounds,
    ):
        if jax.process_index() == 0:
            screen = Screen(Console(highlight=False))
            conversation = Conversation(
                *(env, policy.engine.stream, policy.chat),
                *(run.rollout.limits, sampling, screen.show, memory),
            )
            talk(conversation, screen, question)
        rounds("the conversation is over")


def read_sampling(temperature: str) -> Sampling:
    """How the words are drawn. ConfigError for what is no temperature."""
    try:
        value = float(temperature)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"--temperature={temperature} is not a number of 0 or more")
    return Sampling(value)


def talk(conversation: Conversation, screen: Screen, question: str) -> None:
    """Answer the question, or one line after the other until the person leaves."""
    if question:
        answer(conversation, screen, question)
        return
    read = reader()
    if sys.stdin.isatty():
        screen.note(
            "A line goes on from those before."
            if conversation.memory
            else "Each line is a question of its own (--memory=on goes on from those before)."
        )
        screen.note("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.")
    interrupts = 0  # in a row
    while True:
        try:
            line = read()
        except EOFError:
            return
        except Interrupted as error:
            interrupts = 0 if error.typed else interrupts + 1
            if interrupts > 1:
                return
            if interrupts:
                screen.note("Ctrl-C again leaves.")
            continue
        interrupts = 0
        if line.startswith("/"):
            command(conversation, screen, line)
        elif line:
            try:
                answer(conversation, screen, line)
            except KeyboardInterrupt:
                interrupts = 1
                screen.note("stopped")


class Interrupted(Exception):
    """Ctrl-C at the prompt; `typed`: something was written there, which is gone."""

    def __init__(self, typed: bool) -> None:
        self.typed = typed


def reader() -> Callable[[], str]:
    """What reads the next line: with editing and a history at a terminal, plainly elsewhere."""
    if not sys.stdin.isatty():
        return lambda: input().strip()
    session: prompt_toolkit.PromptSession[str] = prompt_toolkit.PromptSession()

    def read() -> str:
        try:
            return session.prompt("question> ").strip()
        except KeyboardInterrupt:
            raise Interrupted(bool(session.default_buffer.text)) from None

    return read


def command(conversation: Conversation, screen: Screen, line: str) -> None:
    """Do what a line that begins with a slash says."""
    name, _, rest = line.partition(" ")
    if name == "/reset":
        conversation.reset()
        screen.note("forgotten")
    elif name == "/save" and rest.strip():
        path = home(rest.strip())
        try:
            rows = conversation.save(path)
        except JaxdeepError as error:
            screen.note(f"error: {error}")
        else:
            screen.note(f"{rows} conversation{'s' * (rows > 1)} in {path}")
    else:
        if name != "/help":
            screen.note(f"{line} is not a command")
        for name, does in COMMANDS.items():
            screen.note(f"{name:<11} {does}")


def answer(conversation: Conversation, screen: Screen, line: str) -> None:
    """Answer a line, shown while it is written."""
    try:
        trajectory = asyncio.run(conversation.ask(line))
    finally:
        screen.end_line()
    screen.conclude(trajectory)


class Screen:
    """A conversation as a terminal shows it: text as it comes, a call and its result in a line."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.open = ""  # the style of the line that is being written
        self.last = ""  # what the last turn has said

    def show(self, event: Event | Result) -> None:
        """One event of a turn."""
        match event:
            case ReasoningText(text):
                self._write(text, "dim italic")
            case ContentText(text):
                self.last += text
                self._write(text, "default")
            case CallEnd(_, call):
                self._line(Text(f"{printable(written(call))}", style="cyan"))
                self.last = ""
            case Result(_, text):
                self._line(Text(f"  {printable(folded(text))}", style="dim"))

    def conclude(self, trajectory: Trajectory) -> None:
        """The answer, where tags or more text are around it, or why there is none."""
        final, last = final_answer(trajectory), self.last.strip()
        self.last = ""
        if trajectory.stop is Stop.FAILED:
            self._line(Text(printable(f"failed: {trajectory.failure}"), style="bold red"))
        elif final is not None and final != last:
            self._line(Text(printable(final), style="bold green"))
        elif final is None and trajectory.stop is Stop.MAX_TOKENS:
            self.note("no room is left in rollout.limits.max_tokens; /reset forgets what was said")
        elif final is None and (trajectory.stop is not Stop.FINISHED or not last):
            self._line(Text(f"no answer ({trajectory.stop.value})", style="bold red"))

    def note(self, text: str) -> None:
        """A line that is not the policy's."""
        self._line(Text(text, style="dim"))

    def end_line(self) -> None:
        """Go to a new line, if one is open."""
        if self.open:
            self.console.print()
            self.open = ""

    def _write(self, text: str, style: str) -> None:
        text = printable(text)
        if self.open != style:
            self.end_line()
            text = text.lstrip("\n")
        if text:
            self.console.print(Text(text, style=style), end="", soft_wrap=True)
            self.open = style

    def _line(self, text: Text) -> None:
        self.end_line()
        self.console.print(text, soft_wrap=True)


def written(call: ToolCall) -> str:
    """A call in one line, as a person would write it."""
    words = call.error or ", ".join(f"{k}={v!r}" for k, v in call.arguments.items())
    return f"{call.name or 'unreadable call'}({words})"


def folded(text: str) -> str:
    """The first line of a result, and how many follow."""
    first, *rest = text.strip().splitlines() or [""]
    first = first if len(first) <= 200 else f"{first[:200]} ..."
    return first + (f"  [+ {len(rest)} line{'s' * (len(rest) > 1)}]" if rest else "")


def printable(text: str) -> str:
    """The text without characters that a terminal would obey."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
