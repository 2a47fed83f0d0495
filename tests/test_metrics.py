"""Every metric is declared, with its unit and what it means."""

import ast
import pathlib

import pytest

import jaxdeep
from jaxdeep import metrics
from jaxdeep.train.guard import SIGNS

PACKAGE = pathlib.Path(jaxdeep.__file__).parent


def test_the_page_is_current():
    found = (PACKAGE / "rl/METRICS.md").read_text()
    assert found == metrics.markdown(), "run: python -m jaxdeep.metrics > jaxdeep/rl/METRICS.md"


def test_each_is_declared_once_and_says_something():
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.meaning for metric in metrics.METRICS)
    assert max(map(len, metrics.text().splitlines())) <= 100


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("reward/mean", "reward/mean"),
        ("reward/right", "reward/{reward}"),
        ("tool/search/failed", "tool/{tool}/failed"),
        ("data/a.b-c/cut", "data/{source}/cut"),
        ("data/rows", "data/rows"),
        ("time/rollout/tools", "time/{stage}"),
        ("rollout/stop/timeout", "rollout/stop/{stop}"),
        ("rollout/nothing", None),
        ("mean", None),
        ("xreward/mean", None),
    ],
)
def test_a_name_finds_its_declaration(name, declared):
    found = metrics.declared(name)
    assert (found.name if found else None) == declared


def test_the_metrics_that_code_names_are_declared():
    named = {metric for metric, _ in SIGNS.values()}
    for path in (PACKAGE / "rl/summary.py", PACKAGE / "run/grpo.py", PACKAGE / "run/sft.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                top, slash, rest = node.value.partition("/")
                if (
                    slash
                    and top in ("reward", "rollout", "grpo", "engine", "dev")
                    and rest.isidentifier()
                ):
                    named.add(node.value)
    assert len(named) > 15 and [name for name in sorted(named) if not metrics.declared(name)] == []
