"""A small world for the tests: what a conversation was shown, and a report that is right."""

import random

from jaxdeep.envs.research import sources

PASSAGES = {
    "Cyprus": [
        "Cyprus is an island country.",
        "The capital of Cyprus is Nicosia.",
        "The population of Cyprus is 920,000.",
        "Cyprus joined the European Union in 2004.",
    ],
    "Nicosia": [
        "Nicosia is the largest city of Cyprus.",
        "Nicosia lies on the river Pedieos.",
        "The mayor of Nicosia is Charalambos Prountzos.",
    ],
    "Euro": [
        "The Euro is the currency of 20 countries.",
        "The currency of Cyprus is the Euro.",
        "Cyprus adopted the Euro on 1 January 2008.",
    ],
}
NUGGETS = ("The capital of Cyprus is Nicosia.", "The currency of Cyprus is the Euro.")
QUESTION = "Which currency is used in the country whose capital is Nicosia?"
ANSWER = "Euro"
TOP = (
    'The answer is the **Euro**: <cite id="S1.2">the capital of Cyprus is Nicosia</cite>, and '
    '<cite id="S3.2">the currency of Cyprus is the Euro</cite>.'
)
SECTIONS = """## Nicosia lies in Cyprus
<cite id="S2.1">Nicosia is the largest city of Cyprus.</cite>

## Cyprus pays in euro since 2008
<cite id="S3.3">Cyprus adopted the Euro on 1 January 2008.</cite>"""
GOLD = f"{TOP}\n\n{SECTIONS}"


def result(number):
    """The text of a result that shows one passage, as a model reads it."""
    title = list(PASSAGES)[number - 1]
    text = "\n".join(PASSAGES[title])
    return sources.show(
        sources.source(f"S{number}", text, title=title, url=f"https://example.org/{title}")
    )


def shelf():
    """Three passages, shown by messages 2, 4 and 6."""
    found = sources.Shelf()
    for number in (1, 2, 3):
        sources.read_shown(result(number), 2 * number, found)
    return found


def _list(words):
    return words.split()


FIRST = _list("Alva Boris Celia Dario Edda Felix Greta Hugo Irene Jonas Karla Lukas")
LAST = _list("Amberg Brunner Castell Drexler Ekberg Falken Gruber Hollis Ibsen Jansen")
TOWNS = _list("Aldby Brenta Corvo Delmar Elstow Fenwick Garda Holm Istra Jena Kolda Lund")
VERBS = ["designed", "restored", "surveyed", "defended", "described", "financed"]
THINGS = ["lighthouse", "granary", "observatory", "aqueduct", "monastery", "foundry", "viaduct"]
SENTENCES = [
    "{a} {verb} the largest {thing} of {town} in {year}, before the flood of {other}.",
    "The {thing} in northern {town} was not finished by {a} until the winter of {year}.",
    "It has {number} windows and a roof of “red” tiles, more than any {thing} in {town}.",
    "{b} won the first contest for a new {thing} in {town} with {number} votes.",
    "In {year} the town council of {town} had {number} members, and {a} was never one of them.",
    "The old road from {town} to the {thing} is {number} km long and passes the café of {b}.",
    "{a} and {b} founded a well-known school for builders, the oldest in {town}, which began in {year}.",
]


def prose(rng: random.Random, passages: int):
    """Sources of made-up sentences about made-up people."""
    return sources.Shelf(
        sources.source(f"S{number}", " ".join(_sentence(s, rng) for s in rng.sample(SENTENCES, 4)))
        for number in range(1, passages + 1)
    )


def _sentence(form, rng):
    people = [f"{rng.choice(FIRST)} {rng.choice(LAST)}" for _ in range(2)]
    return form.format(
        a=people[0],
        b=people[1],
        verb=rng.choice(VERBS),
        thing=rng.choice(THINGS),
        town=rng.choice(TOWNS),
        year=rng.randrange(1701, 1990),
        other=rng.randrange(1701, 1990),
        number=rng.randrange(11, 9000),
    )
