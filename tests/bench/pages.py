"""How the pages of `view` cope with a large run: 1,000 rollouts of 8,000 tokens in one step, in
Chromium.

    python tests/bench/pages.py [--rollouts=1000] [--tokens=8000]

The run is made up of random words (thoughts, calls and results) in the tokens of the shipped
tokenizer. Printed: seconds to make the pages, their size, and wall-clock seconds until each page is
ready, loaded from disk in a browser of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import tempfile
import time

import numpy as np

from jaxdeep.agent import record
from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import FILE, Tokenizer
from jaxdeep.envs.toy import facts
from jaxdeep.pages import view
from jaxdeep.types import Branch, Message, Piece, Stop, Task, ToolCall, Trajectory

GROUP = 8
WORDS = re.findall(
    r"\w+", "the result of the search shows that Paris is a city with two million people"
)
PAGES = {
    "the curves": "",
    "the step": "#/000001",
    "a rollout": "#/000001/0/{}",
    "a search of every token": "#/search/two%20million/000001",
}
READY = "document.body && document.body.dataset.ready === '1'"
NEXT = """(async () => { const from = performance.now(); KEYS.j();
  while (document.body.dataset.ready !== '2')
    await new Promise((resolve) => setTimeout(resolve, 2));
  return performance.now() - from; })()"""


def rollout(chat: Qwen3Chat, task: Task, rounds: int, rng: random.Random) -> Trajectory:
    """A conversation of `rounds` calls."""

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    messages = [Message("user", task.question)]
    for _ in range(rounds):
        call = ToolCall("search", {"query": text(4)})
        messages.append(Message("assistant", text(150), calls=(call,)))
        messages.append(Message("tool", text(300), name="search"))
    messages.append(Message("assistant", text(20)))
    pieces = [
        Piece(p.tokens, p.author, [rng.uniform(-2, 0) for _ in p.tokens])
        if p.author == "policy"
        else p
        for p in chat.pieces(messages)
    ]
    reward = float(rng.random() < 0.4)
    made = Trajectory(task, branches=[Branch(pieces)], messages=messages, stop=Stop.FINISHED)
    made.rewards, made.reward, made.advantage = {"answer": reward}, reward, reward - 0.4
    return made


def make(run: pathlib.Path, count: int, length: int) -> float:
    """Write the run; returns the mean number of tokens of a rollout."""
    rng, chat = random.Random(0), Qwen3Chat(Tokenizer.load(facts.ASSETS / "tiny"), "none")
    tasks = [Task(f"task-{n}", f"Question {n}?", ("Paris",)) for n in range(-(-count // GROUP))]
    rounds = -(-length // len(rollout(chat, tasks[0], 1, rng).tokens))
    every = [rollout(chat, tasks[n // GROUP], rounds, rng) for n in range(count)]
    record.write(run / "rollouts" / "000001.jsonl", every, chat.tokenizer)
    noise = np.random.default_rng(0)
    gaps = [noise.normal(0, 0.02, t.sampled) for t in every]
    record.write_gaps(run / "gaps" / "000001.npy", every, gaps)
    (run / FILE).write_text(chat.tokenizer.text)
    rows = [{"step": n} | {f"x/{k}": noise.normal() for k in range(60)} for n in range(1, 401)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sum(len(t.tokens) for t in every) / count


def size(folder: pathlib.Path) -> float:
    """MiB of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


class Browser:
    """Headless Chromium, driven through its DevTools protocol over two pipes."""

    def __init__(self, program: str, folder: str) -> None:
        mine, theirs = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={folder}", "about:blank"]
        self._run = subprocess.Popen(
            ["sh", "-c", f'exec "$@" 3<&{mine[0]} 4>&{theirs[1]}', "sh", program, *flags],
            pass_fds=(mine[0], theirs[1]),
            stderr=subprocess.DEVNULL,
        )
        os.close(mine[0]), os.close(theirs[1])
        self._to, self._from = os.fdopen(mine[1], "wb"), os.fdopen(theirs[0], "rb")
        self._id, self._rest, self._session = 0, b"", None
        while not (
            pages := [
                t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"
            ]
        ):
            time.sleep(0.05)
        target = {"targetId": pages[0]["targetId"], "flatten": True}
        self._session = self.call("Target.attachToTarget", **target)["sessionId"]

    def call(self, method: str, **params) -> dict:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            while b"\0" not in self._rest:
                self._rest += os.read(self._from.fileno(), 2**16)
            line, _, self._rest = self._rest.partition(b"\0")
            if (answer := json.loads(line)).get("id") == self._id:
                return answer["result"]

    def ask(self, expression: str):
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        return found["result"].get("value")

    def close(self) -> None:
        self.call("Browser.close")
        self._run.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=8000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = pathlib.Path(scratch) / "run"
        print(f"{args.rollouts} rollouts of {make(run, args.rollouts, args.tokens):.0f} tokens")
        start = time.perf_counter()
        page = view.build([run], run / "view")
        made = time.perf_counter() - start
        sizes = f"{size(run / 'view'):.0f} MiB, from {size(run / 'rollouts'):.0f} of rollouts"
        print(f"  made in {made:.1f} s: {sizes}")
        program = shutil.which("chromium") or shutil.which("google-chrome")
        for name, place in PAGES.items() if program else ():
            browser = Browser(program, f"{scratch}/profile")
            start = time.perf_counter()
            browser.call("Page.navigate", url=page.as_uri() + place.format(args.rollouts // 2))
            while not browser.ask(READY):
                time.sleep(0.01)
            print(f"  {name}: {time.perf_counter() - start:.2f} s")
            if name == "a rollout":
                print(f"  the next rollout: {browser.ask(NEXT) / 1e3:.2f} s")
            browser.close()


if __name__ == "__main__":
    main()
