"""Quotations changed on purpose: harmlessly, or so that they say something else."""

import re
import unicodedata

ANTONYMS = {
    "largest": "smallest", "first": "last", "north": "south", "before": "after", "increased": "decreased",
    "high": "low", "old": "new", "more": "less", "won": "lost", "oldest": "newest", "northern": "southern",
    "early": "late", "began": "ended", "joined": "left", "east": "west", "major": "minor",
    "highest": "lowest", "longest": "shortest", "upper": "lower", "above": "below", "founded": "dissolved",
}  # fmt: skip
LITTLE = {"a", "an", "the", "that", "which", "of"}
NAMES = ["Marlow", "Ostrava", "Quintero", "Halvorsen", "Bexley", "Tirana"]


def words_of(text):
    return text.split()


def number(quote, rng):
    found = list(re.finditer(r"\d+", quote))
    if not found:
        return None
    match = rng.choice(found)
    digits = match[0]
    n = rng.randrange(len(digits))
    digit = rng.choice([d for d in "123456789" if d != digits[n]])
    return quote[: match.start()] + digits[:n] + digit + digits[n + 1 :] + quote[match.end() :]


def name(quote, rng):
    found = [m for m in re.finditer(r"\b[A-Z][a-z]{2,}\b", quote) if m.start() > 0]
    if not found:
        return None
    match = rng.choice(found)
    return quote[: match.start()] + rng.choice(NAMES) + quote[match.end() :]


def negation_in(quote, rng):
    match = re.search(r"\b(is|was|are|were|has|had|did|can|will)\b", quote)
    return match and quote[: match.end()] + " not" + quote[match.end() :]


def negation_out(quote, rng):
    changed = re.sub(r"\b(not|never|no)\s", "", quote, count=1)
    return changed if changed != quote else None


def antonym(quote, rng):
    for word in words_of(quote):
        if word in ANTONYMS:
            return quote.replace(word, ANTONYMS[word], 1)
    return None


def order(quote, rng):
    words = words_of(quote)
    places = [n for n, w in enumerate(words) if w.lower() not in LITTLE and len(w) > 3]
    if len(places) < 2:
        return None
    a, b = rng.sample(places, 2)
    if words[a].lower().strip(".,") == words[b].lower().strip(".,"):
        return None
    words[a], words[b] = words[b], words[a]
    return " ".join(words)


def exchange(quote, rng):
    found = list(re.finditer(r"\b[A-Z][a-z]{2,}\b", quote))
    if len(found) < 2 or found[0][0] == found[-1][0]:
        return None
    a, b = found[0], found[-1]
    return quote[: a.start()] + b[0] + quote[a.end() : b.start()] + a[0] + quote[b.end() :]


def tail(quote, rng):
    tails = ("and was later demolished", "according to its founder", "by a wide margin indeed")
    return quote.rstrip(". ") + " " + rng.choice(tails)


def added(quote, rng):
    words = words_of(quote)
    words.insert(
        rng.randrange(1, len(words)), rng.choice(["reportedly", "allegedly", "twice", "former"])
    )
    return " ".join(words)


def dropped(quote, rng):
    words = words_of(quote)
    inner = [n for n in range(1, len(words) - 1) if words[n].lower().strip(".,;") not in LITTLE]
    if not inner:
        return None
    del words[rng.choice(inner)]
    return " ".join(words)


def ellipsis(quote, rng):
    words = words_of(quote)
    if len(words) < 7:
        return None
    return " ".join([*words[:2], "...", *words[-3:]])


ALTERED = [
    number,
    name,
    negation_in,
    negation_out,
    antonym,
    order,
    exchange,
    tail,
    added,
    dropped,
    ellipsis,
]


def spaces(quote, rng):
    return re.sub(" ", lambda m: rng.choice([" ", "  ", "\n", "\u00a0", "\t"]), quote)


def quotes(quote, rng):
    return "“" + quote.replace("'", "’").replace('"', "”") + "”"


def emphasis(quote, rng):
    words = words_of(quote)
    n = rng.randrange(len(words))
    mark = rng.choice(["*", "**", "_"])
    words[n] = f"{mark}{words[n]}{mark}"
    return " ".join(words)


def invisible(quote, rng):
    n = rng.randrange(1, len(quote))
    return quote[:n] + rng.choice(["\u200b", "\u00ad", "\u2060"]) + quote[n:]


def ligature(quote, rng):
    changed = quote.replace("fi", "ﬁ").replace("fl", "ﬂ")
    return changed if changed != quote else quote.replace("-", "‑")


def decomposed(quote, rng):
    return unicodedata.normalize("NFD", quote)


def case(quote, rng):
    return (
        rng.choice([str.upper, str.lower, str.title])(quote) if "'" not in quote else quote.lower()
    )


def lost_dot(quote, rng):
    return quote.rstrip(". ")


def dashes(quote, rng):
    return quote.replace("-", rng.choice("–—‑"))


BENIGN = [spaces, quotes, emphasis, invisible, ligature, decomposed, case, lost_dot, dashes]
