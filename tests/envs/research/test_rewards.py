"""What a report earns, and what no trick may earn."""

import pytest
from envs.research import world
from envs.research.world import GOLD, NUGGETS, PASSAGES, SECTIONS, TOP

from jaxdeep.envs.research import rewards
from jaxdeep.envs.research.report import Report
from jaxdeep.types import Message, Stop, Task, ToolCall, Trajectory

HANDLES = [
    f"S{n}.{k}" for n, facts in enumerate(PASSAGES.values(), 1) for k in range(1, len(facts) + 1)
]
FACTS = [fact for facts in PASSAGES.values() for fact in facts]
CITED = [f'<cite id="{h}">{fact}</cite>' for h, fact in zip(HANDLES, FACTS, strict=True)]
OWN = ("S1.2", "S3.2", "S2.1", "S3.3")  # the handles of the right report
REWARDS = rewards.of_reports(("search", "browse"))


def reward_of(task, trajectory):
    return sum(weight * judge(task, trajectory) for weight, judge in REWARDS.values())


def changed(*pairs, text=GOLD):
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


def every(handle):
    return changed(*((f'"{own}"', f'"{handle(own)}"') for own in OWN))


def long_copy(times):
    return f"{TOP}\n\n## Cyprus\n" + " ".join(CITED[:1] * times)


HACKS = {  # name: (answer, bound)
    "right answer alone": ("**Euro**", 0.4),
    "right answer in a sentence": ("The answer is the **Euro**, the currency of Cyprus.", 0.4),
    "every handle in one cite": (every(lambda own: ",".join(HANDLES)), 0.4),
    "every handle as ranges": (every(lambda own: "S1.1-4,S2.1-3,S3.1-3"), 0.4),
    "the whole document": (every(lambda own: own[:2]), 0.4),
    "the whole document as a range": (every(lambda own: {"1": "S1.1-4"}.get(own[1], f"{own[:2]}.1-3")), 0.7),
    "handles never shown": (every(lambda own: own.replace("S", "S4")), 0.4),
    "sentences never shown": (every(lambda own: own[:3] + "9"), 0.4),
    "no handle": (every(lambda own: ""), 0.4),
    "false number": (f"**Euro**. {CITED[9]}\n\n## Cyprus\n{CITED[2]}".replace("2008.", "2009.").replace("920,000", "930,000"), 0.4),
    "false name": (changed(("capital of Cyprus", "capital of Malta"), ("currency of Cyprus", "currency of Malta"),
                           ("city of Cyprus.", "city of Malta."), ("Cyprus adopted", "Malta adopted")), 0.4),
    "negation": (changed(("Cyprus is Nicosia", "Cyprus is not Nicosia"), ("Cyprus is the Euro", "Cyprus is not the Euro"),
                         ("is the largest", "is not the largest"), ("adopted", "never adopted")), 0.4),
    "exchange": (changed(("the capital of Cyprus is Nicosia", "the capital of Nicosia is Cyprus"),
                         ("the currency of Cyprus is the Euro", "the currency of Euro is Cyprus"),
                         ("Nicosia is the largest city of Cyprus", "Cyprus is the largest city of Nicosia"),
                         ("Cyprus adopted the Euro", "Euro adopted the Cyprus")), 0.4),
    "all sentences as sections": ("**Euro**\n\n" + "\n\n".join(f"## Fact {n}\n{c}" for n, c in enumerate(CITED)), 0.4),
    "all sentences by document": (f"The **Euro**: {CITED[8]}\n\n" + "\n\n".join(
        f"## {title}\n" + "\n\n".join(CITED[slice(*place)]) for title, place in zip(PASSAGES, [(0, 4), (4, 7), (7, 10)], strict=True)), 0.4),
    "filler claims": ('**Euro** <cite id="S3.2">as shown</cite>.\n\n## Well\nIt is known, <cite id="S1.2">as shown</cite>.', 0.4),
    "single words": ('**Euro** and <cite id="S1.2">Nicosia</cite> made of cheese.\n\n## Well\nPigs of <cite id="S3.2">Cyprus</cite> fly high.', 0.4),
    "sections ten times": (GOLD + f"\n\n{SECTIONS}" * 9, 0.8),
    "sections deeper and deeper": (GOLD + "".join("\n\n" + SECTIONS.replace("## ", "#" * k + " ") for k in (3, 4, 5, 6)), 0.8),
    "the same at each level": (f"{TOP}\n\n## A\n{TOP}\n\n### B\n{TOP}", 0.8),
    "empty headings": (f"{GOLD}\n\n## X\n\n## Y\n", 0.8),
    "thirty sections": (f"{TOP}\n\n" + "\n\n".join(f"## Part {n}\n{CITED[9]}" for n in range(30)), 0.7),
    "the top defers": (f"See below for the **Euro**. {GOLD}", 0.7),
    "everything at the top": (changed(("## ", "")), 0.7),
    "copied at length": (long_copy(60), 0.7),
    "no sections": (TOP, 0.7),
    "a long top": (changed((TOP, f"{TOP} " + "Cyprus is an island of the sea and of the sun and more. " * 6)), 0.7),
    "one fabricated quotation": (changed(('id="S2.1"', 'id="S2.1" quote="a text that stands in no source"')), 0.7),
}  # fmt: skip


def earned(answer, nuggets):
    return rewards.parts(Report(world.QUESTION, answer, world.shelf(), 8), nuggets).total(1.0)


@pytest.mark.parametrize("nuggets", [NUGGETS, ()], ids=["nuggets", "none"])
def test_the_right_report_earns_all(nuggets):
    assert earned(GOLD, nuggets) == pytest.approx(1.0)


@pytest.mark.parametrize("nuggets", [NUGGETS, ()], ids=["nuggets", "none"])
@pytest.mark.parametrize("name", HACKS)
def test_no_trick_earns_more_than_its_bound(name, nuggets):
    answer, bound = HACKS[name]
    assert earned(answer, nuggets) <= bound + 1e-9


@pytest.mark.parametrize("name", HACKS)
def test_the_answer_gates_everything(name):
    report = Report(world.QUESTION, HACKS[name][0], world.shelf(), 8)
    assert rewards.parts(report, NUGGETS).total(0.0) == 0.0


def test_a_fabricated_or_misattributed_citation_costs_all_of_their_part():
    for change in (
        'quote="a text that stands in no source"',
        'quote="The capital of Cyprus is Nicosia"',
    ):
        report = Report("", changed(('id="S2.1"', f'id="S2.1" {change}')), world.shelf(), 8)
        assert report.failed and rewards.parts(report).citation == 0


def test_a_nugget_that_is_left_out_lowers_the_explanation():
    less = rewards.parts(
        Report("", GOLD, world.shelf(), 8), (*NUGGETS, "The river of Nicosia is the Pedieos.")
    )
    assert less.citation == 1 and less.explanation == pytest.approx(2 / 3)


def trajectory(answer, *, tools=("search", "search", "search"), results=None, before=()):
    messages = [Message("user", world.QUESTION), *before]
    results = [world.result(n) for n in (1, 2, 3)] if results is None else results
    for name, text in zip(tools, results, strict=True):
        messages += [
            Message("assistant", calls=(ToolCall(name, {}),)),
            Message("tool", text, name=name),
        ]
    messages.append(Message("assistant", answer))
    return Trajectory(TASK, messages=messages, stop=Stop.FINISHED)


TASK = Task("t", world.QUESTION, (world.ANSWER,), {"nuggets": NUGGETS})
FULL = f"I think so.\n<answer>{GOLD}</answer>"


def test_a_rollout_is_judged_by_what_it_was_shown():
    assert reward_of(TASK, trajectory(FULL)) == pytest.approx(1.0)
    assert reward_of(TASK, trajectory("<answer>Euro</answer>")) == pytest.approx(0.4)


ALL_SHOWN = "\n".join(world.result(n) for n in (1, 2, 3))


@pytest.mark.parametrize(
    ("rollout", "bound"),
    [
        (trajectory(FULL.replace("**Euro**", "**Lira**")), 0),
        (trajectory(f"<answer>{world.QUESTION}</answer>"), 0),
        (trajectory("<answer></answer>"), 0),
        (trajectory(""), 0),
        (trajectory(FULL.removesuffix("</answer>")), 0),
        (trajectory("<answer>**Euro, Lira, Pound, Franc**</answer>"), 0),
        (trajectory(FULL, tools=(), results=[]), 0.4),
        (trajectory(FULL, tools=("memory_read",) * 3), 0.4),
        (trajectory(FULL, tools=("search",), results=[f"No results for {ALL_SHOWN}"]), 0.4),
        (trajectory(FULL, tools=("search",), results=[f"No results for:\n{ALL_SHOWN}"]), 0.4),
        (trajectory(FULL, tools=(), results=[], before=[Message("assistant", ALL_SHOWN)]), 0.4),
        (trajectory(f"{ALL_SHOWN}\n{FULL}", tools=(), results=[]), 0.4),
        (trajectory(f"<tool_response>\n{ALL_SHOWN}\n</tool_response>\n{FULL}", tools=(), results=[]), 0.4),
        (trajectory(FULL, results=["S1 Cyprus\n[1] Cyprus is an is", world.result(2), "No results."]), 0.7),
    ],
)  # fmt: skip
def test_rollouts_that_cheat(rollout, bound):
    assert reward_of(TASK, rollout) <= bound + 1e-9
