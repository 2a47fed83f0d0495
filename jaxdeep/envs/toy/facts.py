"""A small closed world to learn searching in: real facts as passages, and made-up worlds to
practise on.

The tables in `assets/facts` (elements, countries, states, moons) are rendered into short passages,
each with some of the facts of its entity, and into questions with one hop ("What is the currency of
Cyprus?") or two ("... of the country with the capital Nicosia?"). Entities are split into train,
dev and test, so that a question's facts are new at test time.

Made-up worlds use the same sentences with all names drawn at random ("The capital of Zinc is
Peru."): memorising them is useless, reading them is not. What a model sees before reinforcement
learning comes from these worlds alone, and a made-up fact that happens to be real is drawn again.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import pathlib
import random
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from jaxdeep.chat.families import control_names
from jaxdeep.envs import qa
from jaxdeep.settings import AtLeast, section
from jaxdeep.tools.bm25 import BM25
from jaxdeep.tools.corpus import Passage
from jaxdeep.types import Task

ASSETS = pathlib.Path(__file__).parents[2] / "assets"
K1 = 0.3  # of BM25: in passages this short, a name that comes twice must not outweigh the attribute
Split = Literal["train", "dev", "test"]
SplitOrAll = Literal[Split, "all"]


class Kind(NamedTuple):
    """The texts about one kind of entity, with a field for its name and for each attribute.
    Sentences whose attribute is unknown are left out."""

    table: str
    passages: tuple[tuple[str, ...], ...]
    questions: Mapping[str, str]  # by attribute
    words: Mapping[str, str]  # by attribute: what to add to an entity's name to find it
    bridges: Mapping[str, str]  # by attribute: a description of the entity that stands for its name


KINDS = {
    "country": Kind(
        "countries",
        (
            ("{name} is a country in {continent}.", "The capital of {name} is {capital}."),
            ("The currency of {name} is the {currency}. Prices in shops there are given in it.",),
        ),
        {
            "capital": "What is the capital of {name}?",
            "continent": "Which continent is {name} in?",
            "currency": "What is the currency of {name}?",
        },
        {"capital": "capital", "continent": "country", "currency": "currency"},
        {"capital": "the country with the capital {capital}"},
    ),
    "element": Kind(
        "elements",
        (
            (
                "{name} is a chemical element.",
                "The symbol of {name} is {symbol}.",
                "The atomic number of {name} is {number}.",
            ),
            (
                "The discovery of {name} is part of the history of chemistry.",
                "It was made in the year {year}.",
                "It is credited to {discoverer}.",
            ),
        ),
        {
            "symbol": "What is the symbol of {name}?",
            "number": "What is the atomic number of {name}?",
            "year": "In which year was the discovery of {name} made?",
            "discoverer": "Who is credited with the discovery of {name}?",
        },
        {
            "symbol": "symbol",
            "number": "atomic number",
            "year": "discovery",
            "discoverer": "discovery",
        },
        {"symbol": "the element with the symbol {symbol}"},
    ),
    "state": Kind(
        "states",
        (
            ("{name} is a state of America.", "The capital of {name} is {capital}."),
            ("People call {name} the {nickname} State.", "{name} joined the union in {year}."),
        ),
        {
            "capital": "What is the capital of {name}?",
            "nickname": "What nickname do people call {name} by?",
            "year": "In which year was it that {name} joined the union?",
        },
        {"capital": "capital", "nickname": "people call", "year": "joined"},
        {
            "capital": "the state with the capital {capital}",
            "nickname": "the state that people call the {nickname} State",
        },
    ),
    "moon": Kind(
        "moons",
        (
            ("{name} is a moon. The planet that {name} orbits is {planet}.",),
            (
                "The discovery of {name} took a good telescope.",
                "It was made in the year {year}.",
                "It is credited to {discoverer}.",
            ),
        ),
        {
            "planet": "Which planet does the moon {name} orbit?",
            "year": "In which year was the discovery of {name} made?",
            "discoverer": "Who is credited with the discovery of {name}?",
        },
        {"planet": "planet", "year": "discovery", "discoverer": "discovery"},
        {},
    ),
}


class Entity(NamedTuple):
    """One thing and its known attributes."""

    kind: str
    name: str
    facts: Mapping[str, str]


class Text(NamedTuple):
    """A passage and the attributes of its entity that it states."""

    entity: str
    text: str
    states: frozenset[str]


class Quiz(NamedTuple):
    """A question about one attribute of one entity. In a two-hop question the entity is described
    by the attribute `bridge` instead of its name."""

    id: str
    question: str
    answer: str
    entity: Entity
    attribute: str
    bridge: str = ""

    @property
    def hops(self) -> int:
        """The number of passages that an answer needs."""
        return 2 if self.bridge else 1


def _fields(sentence: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}


def _capital(value: str) -> str:
    # One spelling everywhere, so that the tiny tokenizer has the same token for a name in every
    # place.
    return " ".join(word[:1].upper() + word[1:] for word in value.split())


@functools.cache
def entities() -> tuple[Entity, ...]:
    """The real entities, from the tables."""
    out = []
    for kind, spec in KINDS.items():
        with (ASSETS / "facts" / f"{spec.table}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                name = row.pop("name")
                out.append(Entity(kind, name, {k: _capital(v) for k, v in row.items() if v}))
    return tuple(out)


def split(entity: Entity) -> Split:
    """The split of an entity: 45 % train, 10 % dev, 45 % test, by a hash of its name."""
    digest = int(hashlib.sha256(entity.name.encode()).hexdigest(), 16) % 100
    return "train" if digest < 45 else "dev" if digest < 55 else "test"


def texts(entity: Entity) -> list[Text]:
    """An entity's passages, without those that would state no attribute."""
    values = {"name": entity.name, **entity.facts}
    out = []
    for sentences in KINDS[entity.kind].passages:
        kept = [s for s in sentences if _fields(s) <= set(values)]
        states = frozenset().union(*map(_fields, kept)) - {"name"}
        if states:
            out.append(Text(entity.name, " ".join(s.format(**values) for s in kept), states))
    return out


# The words of all passages and questions. No entity is described by one of them, as indium would be
# by its symbol "In": a search for it finds anything.
_WORDS = frozenset(
    word.strip(".?").lower()
    for kind in KINDS.values()
    for sentences in (*kind.passages, kind.questions.values())
    for sentence in sentences
    for word in sentence.split()
)


def quizzes(entity: Entity) -> list[Quiz]:
    """Every question about an entity: each attribute by the entity's name, and by each bridge that
    another passage states, since otherwise one passage would answer both hops."""
    spec, out = KINDS[entity.kind], []
    stated_with = {a: text.states for text in texts(entity) for a in text.states}
    for attribute, template in spec.questions.items():
        if attribute not in entity.facts:
            continue
        answer = entity.facts[attribute]
        for bridge in ("", *spec.bridges):
            if bridge and (
                bridge not in entity.facts
                or attribute in stated_with[bridge]
                or entity.facts[bridge].lower() in _WORDS
            ):
                continue
            name = spec.bridges[bridge].format(**entity.facts) if bridge else entity.name
            question = template.format(name=name).replace("the moon the", "the")
            key = f"{entity.name}/{bridge + '>' if bridge else ''}{attribute}"
            out.append(Quiz(key, question, answer, entity, attribute, bridge))
    return out


@functools.cache
def _pools() -> dict[str, tuple[str, ...]]:
    """The real values of each attribute, and under "names" all that can be a name; sorted."""
    pools: dict[str, set[str]] = {"names": set()}
    for entity in entities():
        pools["names"].add(entity.name)
        for attribute, value in entity.facts.items():
            pools.setdefault(attribute, set()).add(value)
    for attribute in ("capital", "currency", "discoverer", "nickname"):
        pools["names"] |= pools[attribute]
    return {name: tuple(sorted(values)) for name, values in pools.items()}


def _claims(entity: Entity) -> set[tuple[str, str, str]]:
    """What questions say of an entity, as (subject, attribute, value): the subject is its name or
    one of its bridges."""
    facts, bridges = entity.facts, KINDS[entity.kind].bridges
    direct = {(entity.name, a, v) for a, v in facts.items()}
    return direct | {
        (b + facts[b], a, v) for b in bridges if b in facts for a, v in facts.items() if a != b
    }


@functools.cache
def _real() -> frozenset[tuple[str, str, str]]:
    return frozenset().union(*map(_claims, entities()))


def made_up(seed: int, size: int = 120) -> list[Entity]:
    """A world of `size` entities that do not exist, named by real names and by mixtures of their
    words. As with the real ones, some attributes of each are unknown. It follows from the seed
    alone: rows of training data are made from it by number, so the order of the draws must not
    change."""
    rng, pools = random.Random(f"world {seed}"), _pools()
    real = _real()
    words = sorted({word for name in pools["names"] for word in name.split() if word.istitle()})

    def fresh() -> Iterator[str]:
        """Names, none of them twice: one in five is a mixture of two or three words."""
        given = set(pools["names"])
        for name in rng.sample(pools["names"], len(pools["names"])):
            if rng.random() < 0.25:
                mixed = " ".join(rng.sample(words, rng.choice((2, 2, 3))))
                if mixed not in given:
                    given.add(mixed)
                    yield mixed
            yield name

    names, singles = fresh(), fresh()
    # Half the worlds keep the real continents and planets, and half call them something else: a
    # model must neither know them by heart nor think that they are always new.
    few = {
        a: pools[a] if rng.random() < 0.5 else [next(names) for _ in pools[a]]
        for a in ("continent", "planet")
    }
    symbols = rng.sample(pools["symbol"], len(pools["symbol"]))

    def value(attribute: str, name: str) -> str:
        if attribute == "symbol":
            return symbols.pop()
        if attribute in ("capital", "nickname"):  # these describe an entity: no two may share one
            return next(singles)
        if attribute in few:
            return rng.choice(few[attribute])
        if attribute in ("year", "number"):
            return rng.choice(pools[attribute])
        if attribute == "currency" and rng.random() < 0.15:  # like the New Zealand Dollar
            return f"{name} {rng.choice(words)}"
        return rng.choice(pools["names"])

    out: list[Entity] = []
    while len(out) < size:
        kind, name = rng.choice(list(KINDS)), next(names)
        entity = None
        while entity is None or _claims(entity) & real:
            about = {a: value(a, name) for a in KINDS[kind].questions}
            unknown = {a for a in about if rng.random() < 0.15}
            if unknown != set(about):
                about = {a: v for a, v in about.items() if a not in unknown}
            entity = Entity(kind, name, about)
        out.append(entity)
    return out


def entities_of(part: SplitOrAll) -> tuple[Entity, ...]:
    """The real entities of a split, or of "all" splits."""
    return tuple(e for e in entities() if part in ("all", split(e)))


def passages(world: Sequence[Entity]) -> list[Passage]:
    """The corpus about these entities, a passage for each of their texts."""
    out = []
    for entity in world:
        for i, text in enumerate(texts(entity)):
            out.append(
                Passage(
                    f"{entity.name}#{i}", entity.name, text.text, 0, len(text.text), entity.kind
                )
            )
    return out


def tasks(world: Sequence[Entity]) -> list[Task]:
    """Every question about these entities, shuffled; `meta` has `hops` and `attribute`."""
    out = [
        Task(
            quiz.id,
            quiz.question,
            (quiz.answer,),
            {"hops": quiz.hops, "attribute": f"{entity.kind} {quiz.attribute}"},
        )
        for entity in world
        for quiz in quizzes(entity)
    ]
    random.Random("order").shuffle(out)
    return out


@section
class Facts:
    """The task set `facts`: questions about the entities of a split, searched for in passages."""

    questions: Annotated[SplitOrAll, "about the entities of this split"] = "train"
    corpus: Annotated[SplitOrAll, "passages about the entities of this split"] = "train"
    k: Annotated[int, AtLeast(1), "passages that a search shows: the best ones"] = 1
    k1: Annotated[
        float, AtLeast(0), "of BM25: how much a word that is repeated in a passage counts"
    ] = K1
    cache: Annotated[int, AtLeast(0), "answers of the engine kept for whoever asks the same"] = 0
    system: Annotated[str, "the system prompt; empty: none"] = qa.SYSTEM

    def load(self) -> qa.SearchTaskset:
        """The task set; it needs nothing but the package."""
        engine = BM25(passages(entities_of(self.corpus)), k1=self.k1)
        questions = tasks(entities_of(self.questions))
        return qa.SearchTaskset(questions, engine, k=self.k, system=self.system, cache=self.cache)


def query(quiz: Quiz, hop: int, *, name: bool = True, word: bool = True) -> str:
    """Keywords for one hop of a question, counted from 0: with `name` what is known at that hop
    (the bridge's value or the entity's name), with `word` the attribute's word."""
    of_bridge = bool(quiz.bridge) and hop == 0
    attribute = quiz.bridge if of_bridge else quiz.attribute
    subject = quiz.entity.facts[attribute] if of_bridge else quiz.entity.name
    return " ".join([subject] * name + [KINDS[quiz.entity.kind].words[attribute]] * word)


def tokenizer(size: int) -> str:
    """A byte-level BPE tokenizer.json of `size` ids for texts of this world, with the control
    tokens of Qwen3. It is trained on sentences without values and on names without relations, so
    that it has seen no fact."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    control = control_names("qwen3")
    bpe = Tokenizer(models.BPE())
    # A capitalised word never takes in the space or the quote before it, so that a name has the
    # same tokens in a question, a query, a passage and an answer.
    pattern = Regex(r" ?[a-z]+|[A-Z][A-Za-z]*|[0-9]+|\n|[^A-Za-z0-9\n]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(control),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_sentences(), trainer)
    bpe.add_tokens([AddedToken(name, special=True) for name in control])
    return bpe.to_str(pretty=False)


def _sentences() -> Iterator[str]:
    """The training text of the tokenizer: the words around conversations, sentences without values,
    and the words of names, each often enough to become tokens."""
    call = json.dumps({"name": "search", "arguments": {"query": "x"}})
    frame = (
        f"system user assistant\n{call}\n Find: <answer>Unknown</answer> Read. Desk. "
        "Keywords. Search first, then answer. Result 1: \nNo results."
    )
    for _ in range(50):
        yield frame
        for spec in KINDS.values():
            for sentences in (*spec.passages, spec.questions.values(), spec.bridges.values()):
                for sentence in sentences:
                    yield sentence.translate(str.maketrans("", "", "{}"))
    for values in _pools().values():
        for value in values:
            for word in value.split():
                for _ in range(3):
                    yield word


if __name__ == "__main__":
    sys.stdout.write(tokenizer(int(sys.argv[1])))
