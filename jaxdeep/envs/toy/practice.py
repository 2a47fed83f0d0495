"""Conversations in made-up worlds, row by row and by row number alone: what the tiny base learns
reading from, and the imperfect demonstrations that teach it the search tool.

Rows are lists of pieces, as everything that trains is. A block of rows shares one world.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from jaxdeep.chat.qwen3 import Chat, Mark
from jaxdeep.envs.toy import facts
from jaxdeep.rewards.answers import SEARCH
from jaxdeep.tools.bm25 import BM25
from jaxdeep.tools.search import show
from jaxdeep.types import Message, Piece, ToolCall

BLOCK = 400  # rows that share a world


@functools.lru_cache(maxsize=4)
def _world(seed: int) -> tuple[list[facts.Quiz], dict[str, list[facts.Text]]]:
    world = facts.made_up(seed)
    quizzes = [quiz for entity in world for quiz in facts.quizzes(entity)]
    return quizzes, {entity.name: facts.texts(entity) for entity in world}


def _called(said: Sequence[Message]) -> list[Message]:
    """The same dialogue with the librarian as a tool."""
    out, asked = list(said[:1]), False
    for message in said[1:]:
        keywords = message.content.removeprefix("Find: ")
        if message.role == "user" and asked:
            message = Message("tool", message.content, name="Desk")
        asked = message.role == "assistant" and keywords != message.content
        if asked:
            message = Message("assistant", calls=(ToolCall("Desk", {"Find": keywords}),))
        out.append(message)
    return out


def _stating(texts: Sequence[facts.Text], attribute: str) -> facts.Text:
    return next(text for text in texts if attribute in text.states)


class Reading:
    """Rows for the base: answering from passages, asking a librarian for them, naming keywords, and
    repeating random tokens. Half the time the librarian is a tool: not the one that `Demos` teach,
    but called in the same syntax.

    With `choosing`, questions whose passage states other things too, that could be mistaken for the
    answer, come `choosing` times as often as others.
    """

    def __init__(self, chat: Chat, seed: int, *, choosing: int = 1) -> None:
        self.chat, self.seed, self.choosing = chat, seed, choosing

    def __getitem__(self, index: int) -> list[Piece]:
        rng = random.Random(f"reading {self.seed} {index}")
        quizzes, texts = _world(self.seed * 1_000_003 + index // BLOCK)
        quiz = rng.choice(quizzes)
        while (
            self.choosing > 1
            and len(_stating(texts[quiz.entity.name], quiz.attribute).states) == 1
            and rng.random() > 1 / self.choosing
        ):
            quiz = rng.choice(quizzes)
        kind = rng.choices(("desk", "read", "keywords", "repeat"), (60, 20, 10, 10))[0]
        if kind == "repeat":
            return self._repeat(rng)
        turns = {"desk": self._desk, "read": self._read, "keywords": self._keywords}[kind]
        said = turns(rng, quiz, texts)
        if kind == "desk" and rng.random() < 0.5:
            kind, said = "call the desk", _called(said)
        return self.chat.pieces([Message("system", kind.capitalize() + "."), *said])

    def _desk(self, rng: random.Random, quiz: facts.Quiz, texts: dict) -> list[Message]:
        """A dialogue with a librarian, who hands out one passage for some keywords."""
        own = texts[quiz.entity.name]
        out = [Message("user", quiz.question)]
        titled = rng.random() < 0.5

        def find(keywords: str, passage: facts.Text) -> None:
            out.append(Message("assistant", f"Find: {keywords}"))
            title = f"Result 1: {passage.entity}\n" if titled else ""
            out.append(Message("user", title + passage.text))

        if quiz.bridge:
            find(facts.query(quiz, 0), _stating(own, quiz.bridge))
        last = quiz.hops - 1
        if rng.random() < 0.4:  # a first try by the name alone, or by the attribute alone, may miss
            if rng.random() < 0.7:
                find(facts.query(quiz, last, word=False), own[0])
                missed = quiz.attribute not in own[0].states
            else:
                other = rng.choice(texts[rng.choice(list(texts))])
                find(facts.query(quiz, last, name=False), other)
                missed = other.entity != quiz.entity.name or quiz.attribute not in other.states
            if missed:
                find(facts.query(quiz, last), _stating(own, quiz.attribute))
        else:
            find(facts.query(quiz, last), _stating(own, quiz.attribute))
        return [*out, Message("assistant", f"<answer>{quiz.answer}</answer>")]

    def _read(self, rng: random.Random, quiz: facts.Quiz, texts: dict) -> list[Message]:
        """A question under a few passages that may hold its answer."""
        own = texts[quiz.entity.name]
        shown = [
            rng.choice(texts[name]).text for name in rng.sample(list(texts), rng.randint(0, 2))
        ]
        need = dict.fromkeys(_stating(own, a).text for a in (quiz.attribute, quiz.bridge) if a)
        known = rng.random() < 0.8
        shown += list(need) if known else []
        rng.shuffle(shown)
        answer = quiz.answer if known or need.keys() <= set(shown) else "Unknown"
        text = "\n".join([*shown, quiz.question])
        return [Message("user", text), Message("assistant", f"<answer>{answer}</answer>")]

    def _keywords(self, rng: random.Random, quiz: facts.Quiz, texts: dict) -> list[Message]:
        return [Message("user", quiz.question), Message("assistant", facts.query(quiz, 0))]

    def _repeat(self, rng: random.Random) -> list[Piece]:
        """Random tokens and the same again: copying, and a reason for every embedding to move."""
        tokenizer = self.chat.tokenizer
        outside = {tokenizer.id(Mark.START), tokenizer.id(Mark.END)}
        ids = [i for i in range(tokenizer.size) if i not in outside]
        tokens = rng.sample(ids, rng.randint(4, 40))
        start, end = tokenizer.id(Mark.START), tokenizer.id(Mark.END)
        return [Piece([start, *tokens, end], "world"), Piece([*tokens, end], "policy")]


@functools.lru_cache(maxsize=4)
def _engine(seed: int) -> tuple[BM25, dict[str, frozenset[str]]]:
    """A search engine over a made-up world, and what each of its passages states."""
    world = facts.made_up(seed)
    states = {
        passage.id: text.states
        for entity in world
        for passage, text in zip(facts.passages([entity]), facts.texts(entity), strict=True)
    }
    return BM25(facts.passages(world), k1=facts.K1), states


class Demos:
    """Rows for SFT: a demonstrator who knows the tool but is lazy with it.

    It asks with the name and the attribute one time in four, with the name alone half the time, with
    the attribute alone otherwise. When the result misses it tries again two times in five, goes on to
    a second hop four times in five, and else answers "Unknown": much is left to learn from rewards.
    """

    def __init__(self, chat: Chat, seed: int, *, k: int, system: str) -> None:
        self.chat, self.seed, self.k, self.system = chat, seed, k, system

    def __getitem__(self, index: int) -> list[Piece]:
        rng = random.Random(f"demo {self.seed} {index}")
        world = -1 - self.seed * 1_000_003 - index // BLOCK  # no world is shared with `Reading`
        quizzes, _ = _world(world)
        engine, states = _engine(world)
        quiz = rng.choice(quizzes)
        messages = [Message("system", self.system), Message("user", quiz.question)]
        known = quiz.entity.name

        def looked(hop: int, attribute: str, careful: bool) -> bool:
            """Ask once; whether a result states the attribute of the entity in question."""
            style = 0.0 if careful else rng.random()
            words = facts.query(quiz, hop, name=style < 0.75, word=style < 0.25 or style >= 0.75)
            hits = engine.search(words, self.k)
            messages.append(Message("assistant", calls=(ToolCall(SEARCH, {"query": words}),)))
            messages.append(Message("tool", show(hits), name=SEARCH))
            return any(hit.title == known and attribute in states[hit.id] for hit, _ in hits)

        def found(hop: int, attribute: str) -> bool:
            return looked(hop, attribute, False) or (
                rng.random() < 0.4 and looked(hop, attribute, True)
            )

        if quiz.bridge:
            right = found(0, quiz.bridge) and rng.random() < 0.8 and found(1, quiz.attribute)
        else:
            right = found(0, quiz.attribute)
        answer = quiz.answer if right else "Unknown"
        messages.append(Message("assistant", f"<answer>{answer}</answer>"))
        return self.chat.pieces(messages)
