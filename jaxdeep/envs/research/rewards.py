"""Rewards of a report: the answer, times what its citations and its explanation add.

    R = answer * (0.4 + 0.3 citation + 0.3 explanation)

Everything is gated by the answer's score, so that form alone pays nothing. Both parts are measured
with `support.strict`, against what the conversation was really shown. Each way to cheat that is
known has a test that it stays under its bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence

from jaxdeep.agent.base import Reward
from jaxdeep.envs.research import conversation, explain, support
from jaxdeep.envs.research.pin import Status
from jaxdeep.envs.research.report import Report
from jaxdeep.rewards.answers import exact_match
from jaxdeep.types import Task, Trajectory

ANSWER, CITATION, EXPLANATION = 0.4, 0.3, 0.3

MOST_REFERENCES = 4  # of a claim; one with more shows no place
MOST_SENTENCES = 3  # in the span of a reference, for the same reason
COVERED = 0.8  # share of the words of factual sentences in supported claims that is enough
NEW = 0.6  # novelty of the nodes that is enough
DUMPED = (0.34, 0.6)  # share of the shown sentences that are cited: up to the first all, from the
FEW_CITED = 4  # second nothing, if more than so many are


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a report earned: each from 0 to 1. `reason` is why a part is 0 in one word, "" where
    none is."""

    citation: float
    explanation: float
    reason: str = ""

    def total(self, answer: float) -> float:
        """The reward of a report whose answer scored `answer`."""
        return answer * (ANSWER + CITATION * self.citation + EXPLANATION * self.explanation)


def parts(report: Report, nuggets: Sequence[explain.Nugget] = ()) -> Parts:
    """What the citations and the explanation of a report earn. `nuggets` are facts that belong in
    it, where they are known: an explanation must state them, and a citation that supports none of
    them earns less."""
    claims = [claim for claim in report.claims if _is_bounded(report, claim)]
    results = [support.judged(claim, support.strict) for claim in claims]
    supported = support.union((r.claim.start, r.claim.end) for r in results if r.support == 1)
    if any(report.counts[s] for s in (Status.FABRICATED, Status.MISATTRIBUTED)):
        citation, reason = 0.0, "fabricated"
    elif not supported:
        return Parts(0.0, 0.0, "unsupported")
    elif not (thrifty := _thrift(report)):
        return Parts(0.0, 0.0, "dumped")
    else:
        citation = thrifty * _citation(report, claims, supported, nuggets)
        reason = ""
    value, why = _explanation(report, supported, nuggets)
    return Parts(citation, value, reason or why)


def _is_bounded(report: Report, claim: support.Claim) -> bool:
    """Whether a claim's references show places: a few, each of a few sentences, and named by their
    sentences or a quotation unless the source has no more than these."""
    if len(claim.pins) > MOST_REFERENCES:
        return False
    for pin in claim.pins:
        source = report.shelf.get(pin.source) if pin.status.pinned else None
        if source and len(source.around(pin.start, pin.end)) > MOST_SENTENCES:
            return False
        if source and pin.reference.first is None and len(source.sentences) > 1:
            whole = pin.end - pin.start >= source.sentences[-1].end - source.sentences[0].start
            if whole:
                return False
    return True


def _thrift(report: Report) -> float:
    """1 for a report that cites some of what it was shown, down to 0 for one that cites most."""
    places = [place for found in report.pins for place in found if place.status.pinned]
    cited = {
        (place.source, sentence.number)
        for place in places
        for sentence in report.shelf.get(place.source).around(place.start, place.end)
    }
    shown = sum(len(source.sentences) for source in report.shelf)
    if len(cited) <= FEW_CITED:
        return 1.0
    low, high = DUMPED
    return _between((high - len(cited) / shown) / (high - low))


def _citation(
    report: Report,
    claims: Sequence[support.Claim],
    supported: Sequence[explain.Span],
    nuggets: Sequence[explain.Nugget],
) -> float:
    """F1 of precision and recall, times coverage and concision; with nuggets, times how many of the
    supported claims state one, half of them being enough."""
    measured = support.measure(report.text, report.tree.factual, report.claims, support.strict)
    total = sum(len(claim.pins) for claim in report.claims)
    kept = sum(len(claim.pins) for claim in claims)
    value = measured["citation_f1"] * kept / total * measured["concision"]
    covered = sum(explain.is_covered(span, supported) for span in report.tree.factual) / max(
        1, len(report.tree.factual)
    )
    value *= min(1.0, covered / COVERED, measured["coverage"] / COVERED)
    if nuggets:
        texts = [report.text[start:end] for start, end in supported]
        useful = sum(any(_says(text, nugget) for nugget in nuggets) for text in texts)
        value *= min(1.0, 2 * useful / len(texts))
    return _between(value)


def _says(text: str, nugget: explain.Nugget) -> bool:
    return any(explain.states(text[s:e], nugget) for s, e in explain.split(text))


def _explanation(
    report: Report, supported: Sequence[explain.Span], nuggets: Sequence[explain.Nugget]
) -> tuple[float, str]:
    """The value of the explanation, and why it is 0. What it must have: a short top level that
    stands alone, one to seven parts under each node, no contradiction, and in each part a gist and
    a supported sentence. Then novelty and length count, and with nuggets how many are stated."""
    root = report.tree
    sizes = explain.sizes(root)
    nodes = [node for node in root.walk() if node is not root]
    gates = {
        "top": sizes.top,
        "defers": explain.top_alone(root),
        "levels": sizes.children and sizes.depth,
        "empty": all(node.gist[1] > node.gist[0] and node.body.strip() for node in nodes),
        "contradiction": not explain.contradictions(root),
    }
    if failed := [name for name, passed in gates.items() if not passed]:
        return 0.0, failed[0]
    shares = explain.novelties(root)
    new = sum(share >= NEW / 2 for share in shares) / len(shares)
    based = sum(_is_based(node, supported) for node in nodes) / len(nodes)
    value = sizes.nodes * new * based * explain.linked(root)
    value *= min(1.0, sum(shares) / len(shares) / NEW)
    if nuggets:
        costs = explain.nugget_costs(root, nuggets, supported)
        value *= sum(cost <= explain.READ_WORDS for cost in costs) / len(costs)
    return _between(value), "" if value else "parts"


def _is_based(node: explain.Node, supported: Sequence[explain.Span]) -> bool:
    """Whether a node has a factual sentence that its citation supports."""
    own = {span for part in (node.gist, node.detail) for span in node.sentences(part)}
    return any(explain.is_covered(span, supported) for span in node.factual if span in own)


def _between(value: float) -> float:
    return min(1.0, max(0.0, value))


def of_reports(tools: Container[str]) -> dict[str, tuple[float, Reward]]:
    """The rewards of rollouts that end in a report over the results of `tools`, with the weights
    that make `Parts.total` of their sum.

    The answer is right where the report is whole and its short answer (`explain.short_answer`) is
    one of the task's after SQuAD's normalisation. Nuggets are in the task's `meta["nuggets"]`.
    """

    def right(task: Task, report: Report) -> float:
        if report.incomplete:
            return 0.0
        return exact_match(explain.short_answer(report.tree), task.answers)

    def read(task: Task, trajectory: Trajectory) -> Report:
        return conversation.report(task.question, trajectory.messages, tools)

    def answer(task: Task, trajectory: Trajectory) -> float:
        return right(task, read(task, trajectory))

    def citation(task: Task, trajectory: Trajectory) -> float:
        report = read(task, trajectory)
        return right(task, report) and parts(report, nuggets_of(task)).citation

    def explanation(task: Task, trajectory: Trajectory) -> float:
        report = read(task, trajectory)
        return right(task, report) and parts(report, nuggets_of(task)).explanation

    return {
        "answer": (ANSWER, answer),
        "citation": (CITATION, citation),
        "explanation": (EXPLANATION, explanation),
    }


def nuggets_of(task: Task) -> Sequence[explain.Nugget]:
    """The facts that belong in a task's report, where it says them."""
    return task.meta.get("nuggets", ())
