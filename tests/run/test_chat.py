"""The verb `chat` at a terminal: keys, commands, and what is shown."""

import contextlib
import os
import pty
import re
import select
import signal
import sys
import time

import pytest
from run import small

from jaxdeep.chat.format import CallEnd, ContentText, ReasoningText
from jaxdeep.run import chat
from jaxdeep.types import Message, Stop, Task, ToolCall, Trajectory

# a policy of a script: "endless" writes until it is stopped
PROGRAM = """
import asyncio, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from rich.console import Console
from jaxdeep.agent.rollout import Limits
from jaxdeep.agent.talk import Conversation, Plain
from jaxdeep.run import chat
from jaxdeep.setup import weights
from jaxdeep.setup.sections import ModelConfig
from jaxdeep.types import Completion, Sampling

form = weights.chat_of(ModelConfig("tiny", thinking="none"))

async def stream(prompt, *, seed, max_new, sampling):
    said = form.tokenizer.decode(prompt)
    endless = "endless" in said.split("user")[-1]
    tokens = form.encode_turn("word " * (3 if not endless else 10**4))
    for n, token in enumerate(tokens):
        if endless:
            await asyncio.sleep(0.01)
        yield Completion([token], [0.0], "stop" if n + 1 == len(tokens) else "")

limits = Limits(max_turns=1, max_calls=0, turn_tokens=10**5, max_tokens=10**6, result_tokens=9, seconds=1e6)
screen = chat.Screen(Console(highlight=False))
chat.talk(Conversation(Plain, stream, form, limits, Sampling(0.0), screen.show), screen, "")
print("left")
"""
MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")


class Terminal:
    """A program at a terminal of its own: what it shows, and what is typed into it."""

    def __init__(self, *command):
        self.pid, self.end = pty.fork()
        if not self.pid:
            os.environ.update(small.environment() | {"TERM": "xterm", "COLUMNS": "100"})
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            os.execv(command[0], command)
        self.seen = ""

    def read(self):
        """What is shown next; '' at the end. A terminal answers where its cursor is."""
        if not select.select([self.end], [], [], 1.0)[0]:
            return None
        try:
            text = os.read(self.end, 2**16).decode(errors="replace")
        except OSError:
            return ""
        if "\x1b[6n" in text:
            os.write(self.end, b"\x1b[1;1R")
        return text

    def until(self, words):
        """Wait until these words are shown after those waited for before; returns what was."""
        end = time.monotonic() + 600  # only where it hangs
        while (found := MOVES.sub("", self.seen)).find(words) < 0:
            text = self.read()
            assert text != "" and time.monotonic() < end, (words, found[-2000:])
            self.seen += text or ""
        at = found.index(words) + len(words)
        self.seen = found[at:]
        return found[:at]

    def type(self, keys):
        os.write(self.end, keys.encode())

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.end)


@pytest.fixture(scope="module")
def terminal():
    made = Terminal(sys.executable, "-c", PROGRAM)
    yield made
    made.close()


def test_a_session_at_a_terminal(terminal, tmp_path):
    """One process for all keys: it takes seconds to start."""
    terminal.until("Ctrl-D leaves.")
    terminal.until("question>")
    terminal.type("Helo\x1b[Dl\r")  # the arrow key moves the cursor: "Hello"
    terminal.until("word word word")
    terminal.until("question>")
    terminal.type("endless\r")
    terminal.until("word word word word word")
    terminal.type("\x03")  # stops the answer, and nothing else
    terminal.until("stopped")
    terminal.until("question>")
    terminal.type("\x1b[A\x1b[A\r")  # the history: the line before the last one
    terminal.until("word word word")
    terminal.until("question>")
    terminal.type("half a line\x03")  # takes the line away, and does not leave
    terminal.until("question>")
    terminal.type("/nothing\r")
    terminal.until("/nothing is not a command")
    terminal.until("/save FILE")
    terminal.type(f"/save {tmp_path}/talk.jsonl\r")
    terminal.until(f"1 conversation in {tmp_path}/talk.jsonl")
    saved = (tmp_path / "talk.jsonl").read_text()
    assert saved.count("Hello") == 2 and '"endless"' in saved and saved.count("\n") == 1
    terminal.type(f"/save {tmp_path}/talk.jsonl\r")
    terminal.until("error: ")
    terminal.type("/reset\r")
    terminal.until("forgotten")
    terminal.until("question>")
    terminal.type("\x03")
    terminal.until("Ctrl-C again leaves.")
    terminal.until("question>")
    terminal.type("\x03")
    assert "Traceback" not in terminal.until("left")


class Lines:
    """A console that keeps what is printed."""

    def __init__(self):
        self.text = ""

    def print(self, text="", end="\n", soft_wrap=False):
        self.text += f"{text}{end}"


def shown(*events):
    screen = chat.Screen(Lines())
    for event in events:
        screen.show(event)
    return screen


def ended(stop, *texts, **more):
    messages = [Message("assistant", text) for text in texts]
    return Trajectory(Task("a", "b"), stop=stop, messages=messages, **more)


def test_calls_and_results_are_folded_to_a_line_each():
    call = ToolCall("search", {"query": "capital of Chad", "k": 2})
    screen = shown(
        *(ReasoningText("I "), ReasoningText("wonder.\n"), CallEnd(0, call)),
        chat.Result(call, "Chad\nIts capital is N'Djamena.\nMore."),
        *(ContentText("<answer>"), ContentText("N'Djamena</answer>")),
    )
    screen.end_line()
    screen.conclude(ended(Stop.FINISHED, "<answer>N'Djamena</answer>"))
    assert screen.console.text == (
        "I wonder.\n\n"
        "search(query='capital of Chad', k=2)\n"
        "  Chad  [+ 2 lines]\n"
        "<answer>N'Djamena</answer>\n"
        "N'Djamena\n"
    )


def test_nothing_that_was_written_moves_the_cursor():
    call = ToolCall("\x1b[2J", error="\x07bad\x1b]0;x")
    screen = shown(ContentText("a\x1b[31mb\x9bc"), CallEnd(0, call), chat.Result(call, "\x1b[H"))
    screen.conclude(ended(Stop.FAILED, failure="\x1b[0m"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", screen.console.text)
    assert "a\N{REPLACEMENT CHARACTER}[31mb" in screen.console.text


@pytest.mark.parametrize(
    ("trajectory", "says"),
    [
        (ended(Stop.FINISHED, "Hello."), ""),
        (ended(Stop.FINISHED), "no answer (finished)\n"),
        (ended(Stop.MAX_TOKENS), "no room is left in rollout.limits.max_tokens; /reset forgets"),
        (ended(Stop.TURN_TOKENS, "So"), "no answer (turn_tokens)\n"),
        (ended(Stop.FAILED, failure="WorldError: the index is down"), "failed: WorldError: the"),
    ],
)
def test_how_an_answer_ended_is_said(trajectory, says):
    screen = shown(*(ContentText(m.content) for m in trajectory.messages))
    screen.end_line()
    before = len(screen.console.text)
    screen.conclude(trajectory)
    assert screen.console.text[before:].startswith(says)
    assert bool(screen.console.text[before:]) == bool(says)


@pytest.mark.parametrize("temperature", ["warm", "-1", "nan", "inf"])
def test_a_temperature_that_is_none_is_refused(temperature, tmp_path, capsys):
    from jaxdeep.run import cli

    config = small.config(tmp_path, "eval")
    assert cli.main(["chat", f"--config={config}", f"--temperature={temperature}"]) == 2
    assert f"--temperature={temperature} is not a number" in capsys.readouterr().err
