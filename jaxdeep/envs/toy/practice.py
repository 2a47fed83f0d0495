"""Conversations in made-up worlds: what the tiny base model learns reading from, and the imperfect
demonstrations that teach it the search tool.

Both are sources of training data (`data.sources.Source`). A row follows from the seed and its
number alone, so a run can go on anywhere; the order in which random numbers are drawn must not
change. A block of `BLOCK` rows shares one world, because making a world takes much longer than
making a row.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence

from jaxdeep.chat.format import ChatFormat
from jaxdeep.envs.toy import facts
from jaxdeep.tools.bm25 import BM25
from jaxdeep.tools.search import SEARCH, show
from jaxdeep.types import Message, Piece, ToolCall

BLOCK = 400
"""Rows that share a world."""

Texts = Mapping[str, Sequence[facts.Text]]
"""The passages of a world, by the name of their entity."""


@functools.lru_cache(maxsize=4)
def _world(seed: int) -> tuple[list[facts.Quiz], Texts]:
    """The questions of a made-up world and its passages."""
    world = facts.made_up(seed)
    quizzes = [quiz for entity in world for quiz in facts.quizzes(entity)]
    return quizzes, {entity.name: facts.texts(entity) for entity in world}


def _with_calls(dialogue: Sequence[Message]) -> list[Message]:
    """The same dialogue with the librarian as a tool."""
    out, asked = list(dialogue[:1]), False
    for message in dialogue[1:]:
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
    """Rows for the base model: answering from passages, asking a librarian for them, naming
    keywords, and repeating random tokens. Half the time the librarian is a tool: not the one that
    `Demos` teach, but called in the same syntax.

    Questions whose passage states other attributes too, which could be mistaken for the answer,
    come `choosing` times as often as others.
    """

    def __init__(self, chat: ChatFormat, seed: int, *, choosing: int = 1) -> None:
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
        make = {"desk": self._desk, "read": self._read, "keywords": self._keywords}[kind]
        dialogue = make(rng, quiz, texts)
        if kind == "desk" and rng.random() < 0.5:
            kind, dialogue = "call the desk", _with_calls(dialogue)
        return self.chat.pieces([Message("system", kind.capitalize() + "."), *dialogue])

    def _desk(self, rng: random.Random, quiz: facts.Quiz, texts: Texts) -> list[Message]:
        """A dialogue with a librarian, who gives one passage for each set of keywords."""
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
        if rng.random() < 0.4:  # a first try with the name or the attribute alone, which may miss
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

    def _read(self, rng: random.Random, quiz: facts.Quiz, texts: Texts) -> list[Message]:
        """A question under a few passages, which answer it four times in five."""
        own = texts[quiz.entity.name]
        shown = [
            rng.choice(texts[name]).text for name in rng.sample(list(texts), rng.randint(0, 2))
        ]
        needed = dict.fromkeys(_stating(own, a).text for a in (quiz.attribute, quiz.bridge) if a)
        answerable = rng.random() < 0.8
        shown += list(needed) if answerable else []
        rng.shuffle(shown)
        # The other passages may be the needed ones by chance.
        answer = quiz.answer if answerable or needed.keys() <= set(shown) else "Unknown"
        text = "\n".join([*shown, quiz.question])
        return [Message("user", text), Message("assistant", f"<answer>{answer}</answer>")]

    def _keywords(self, rng: random.Random, quiz: facts.Quiz, texts: Texts) -> list[Message]:
        return [Message("user", quiz.question), Message("assistant", facts.query(quiz, 0))]

    def _repeat(self, rng: random.Random) -> list[Piece]:
        """Random tokens and the same again: this teaches copying, and trains every embedding, of
        which most would otherwise never get a gradient."""
        start, end = self.chat.turn_start, self.chat.turn_end
        ids = [id for id in range(self.chat.tokenizer.size) if id not in (start, end)]
        tokens = rng.sample(ids, rng.randint(4, 40))
        return [Piece([start, *tokens, end], "world"), Piece([*tokens, end], "policy")]


@functools.lru_cache(maxsize=4)
def _engine(seed: int) -> tuple[BM25, dict[str, frozenset[str]]]:
    """A search engine over a made-up world, and the attributes that each passage states, by its
    id."""
    world = facts.made_up(seed)
    states = {
        passage.id: text.states
        for entity in world
        for passage, text in zip(facts.passages([entity]), facts.texts(entity), strict=True)
    }
    return BM25(facts.passages(world), k1=facts.K1), states


class Demos:
    """Rows for SFT: a demonstrator who knows the search tool and is lazy with it. `k` is the number
    of results that a search shows.

    It searches with the name and the attribute one time in four, with the name alone two times, and
    with the attribute alone one time. After a miss it searches again, with both, two times in five;
    it goes on to a second hop four times in five; else it answers "Unknown". So there is much left
    to learn from rewards.
    """

    def __init__(self, chat: ChatFormat, seed: int, *, k: int, system: str) -> None:
        self.chat, self.seed, self.k, self.system = chat, seed, k, system

    def __getitem__(self, index: int) -> list[Piece]:
        rng = random.Random(f"demo {self.seed} {index}")
        world = -1 - self.seed * 1_000_003 - index // BLOCK  # no world is shared with `Reading`
        quizzes, _ = _world(world)
        engine, states = _engine(world)
        quiz = rng.choice(quizzes)
        messages = [Message("system", self.system), Message("user", quiz.question)]

        def search(hop: int, attribute: str, careful: bool) -> bool:
            """Searches once; whether a result states the attribute of the entity in question."""
            style = 0.0 if careful else rng.random()
            words = facts.query(quiz, hop, name=style < 0.75, word=style < 0.25 or style >= 0.75)
            hits = engine.search(words, self.k)
            messages.append(Message("assistant", calls=(ToolCall(SEARCH, {"query": words}),)))
            messages.append(Message("tool", show(hits), name=SEARCH))
            return any(
                hit.title == quiz.entity.name and attribute in states[hit.id] for hit, _ in hits
            )

        def find(hop: int, attribute: str) -> bool:
            """Searches, after a miss perhaps again."""
            if search(hop, attribute, careful=False):
                return True
            return rng.random() < 0.4 and search(hop, attribute, careful=True)

        if quiz.bridge:
            right = find(0, quiz.bridge) and rng.random() < 0.8 and find(1, quiz.attribute)
        else:
            right = find(0, quiz.attribute)
        answer = quiz.answer if right else "Unknown"
        messages.append(Message("assistant", f"<answer>{answer}</answer>"))
        return self.chat.pieces(messages)
