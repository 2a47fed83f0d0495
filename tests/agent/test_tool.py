"""Tools: the schema shown, the arguments accepted, and who is to blame for a failure."""

import asyncio
import json
import subprocess
import sys
import time
import unicodedata
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from jaxdeep.agent.tool import ToolError, ToolResult, tool
from jaxdeep.errors import ToolTimeout, WorldError


def call(tool, **arguments):
    return asyncio.run(tool.call(arguments))


@tool
def lookup(
    query: Annotated[str, "words"],
    k: int = 5,
    share: float | None = None,
    exact: bool = False,
    kind: Literal["page", "table"] = "page",
    years: list[int] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict:
    """Look something up."""
    return {"k": k, "share": share, "exact": exact, "kind": kind, "years": years, "extra": extra}


def test_the_schema_is_that_of_the_signature():
    assert lookup.schema == {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Look something up.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "words"},
                    "k": {"type": "integer", "default": 5},
                    "share": {"type": ["number", "null"]},
                    "exact": {"type": "boolean", "default": False},
                    "kind": {"type": "string", "enum": ["page", "table"], "default": "page"},
                    "years": {"type": ["array", "null"], "items": {"type": "integer"}},
                    "extra": {"type": ["object", "null"]},
                },
                "required": ["query"],
            },
        },
    }


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"k": "5"}, {"k": 5}),
        ({"k": 5.0}, {"k": 5}),
        ({"share": 1}, {"share": 1.0}),
        ({"share": "0.5"}, {"share": 0.5}),
        ({"share": None}, {"share": None}),
        ({"exact": "True"}, {"exact": True}),
        ({"kind": "table"}, {"kind": "table"}),
        ({"years": ["1969", 1970]}, {"years": [1969, 1970]}),
        ({"extra": {"a": [1]}}, {"extra": {"a": [1]}}),
    ],
)
def test_every_argument_has_an_effect(given, read):
    assert json.loads(call(lookup, query="x", **given).text).items() >= read.items()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, '"query" (string)'),
        ({"query": ["a"]}, '"query" of lookup must be string'),
        ({"query": "a", "k": "many"}, '"k" of lookup must be integer, not "many"'),
        ({"query": "a", "k": True}, '"k" of lookup must be integer'),
        ({"query": "a", "k": None}, '"k" of lookup must be integer'),
        ({"query": "a", "k": 5.5}, '"k" of lookup must be integer'),
        ({"query": "a", "share": "nan"}, '"share" of lookup must be number or null'),
        ({"query": "a", "share": 10**400}, '"share" of lookup must be number or null'),
        ({"query": "a", "kind": "image"}, 'must be one of "page", "table"'),
        ({"query": "a", "years": [1, "x"]}, '"years" of lookup must be array of integer or null'),
        ({"query": "a", "extra": "x"}, '"extra" of lookup must be object or null'),
        ({"query": "a", "top": 3}, 'no argument "top". Its arguments: "query" (string)'),
    ],
)
def test_wrong_arguments_are_told_and_nothing_runs(given, told):
    result = call(lookup, **given)
    assert result.failed
    assert told in result.text


def test_all_problems_are_told_at_once():
    text = call(lookup, k="x", top=1).text
    assert '"query"' in text and '"k"' in text and '"top"' in text


def test_functions_that_cannot_be_a_tool_are_refused_by_name():
    def untyped(x): ...
    def odd(x: set[int]): ...
    def rest(*words: str): ...
    def lost(x: "Missing"): ...  # noqa: F821 - the point of the test

    async def async_inline(x: str): ...

    for function, named in ((untyped, "'x' of tool untyped"), (odd, "'x' of tool odd")):
        with pytest.raises(TypeError, match=named):
            tool(function)
    with pytest.raises(TypeError, match="'words' of tool rest"):
        tool(rest)
    with pytest.raises(TypeError, match="lost"):
        tool(lost)
    with pytest.raises(TypeError, match="async_inline"):
        tool(inline=True)(async_inline)


def test_methods_are_bound_to_their_instance():
    class Shop:
        def __init__(self, price: int) -> None:
            self.price = price

        @tool
        async def cost(self, count: int) -> str:
            """The cost."""
            return str(self.price * count)

    assert call(Shop(3).cost, count=2).text == "6"
    assert call(Shop(5).cost, count=2).text == "10"
    assert Shop.cost.unbound and not Shop(1).cost.unbound
    assert Shop.cost.schema["function"]["parameters"]["required"] == ["count"]


def test_results_are_text_as_it_is_a_result_or_json():
    @tool(inline=True)
    def give(kind: int) -> Any:
        return ["Zürich", ToolResult("over", done=True), {"a": "ö"}, None][kind]

    texts = [call(give, kind=kind).text for kind in range(4)]
    assert texts == ["Zürich", "over", '{"a": "ö"}', "null"]
    assert call(give, kind=1).done and not call(give, kind=0).done


def test_who_failed_decides_what_happens():
    @tool
    async def fail(who: str) -> str:
        errors = {
            "model": ToolError("no such page"),
            "world": WorldError("gone"),
            "own": KeyError(),
        }
        raise errors.get(who, TimeoutError("of a socket"))

    result = call(fail, who="model")
    assert (result.text, result.failed, result.done) == ("no such page", True, False)
    for who, error in (("world", WorldError), ("own", KeyError), ("socket", TimeoutError)):
        with pytest.raises(error):
            call(fail, who=who)


@pytest.mark.parametrize("is_async", [True, False])
def test_a_tool_that_hangs_is_timed_out(is_async):
    @tool(timeout=0.05)
    async def sleep(seconds: float) -> str:
        await asyncio.sleep(seconds)

    @tool(timeout=0.05)
    def block(seconds: float) -> str:
        time.sleep(seconds)

    start = time.monotonic()
    with pytest.raises(ToolTimeout, match=r"0\.05 s"):
        call(sleep if is_async else block, seconds=1.0)
    assert time.monotonic() - start < 0.9


def test_plain_functions_do_not_wait_for_each_other():
    @tool(timeout=5.0)
    def block() -> str:
        time.sleep(0.1)
        return "up"

    async def many():
        return await asyncio.gather(*(block.call({}) for _ in range(40)))

    start = time.monotonic()
    results = asyncio.run(many())
    assert time.monotonic() - start < 3.0  # one after the other would take 4 s
    assert all(result.text == "up" and result.seconds >= 0.1 for result in results)


def test_a_hung_tool_does_not_keep_the_process_alive():
    code = """
import asyncio, time
from jaxdeep.agent.tool import tool
@tool(timeout=0.05)
def hang() -> str:
    time.sleep(60)
asyncio.run(hang.call({}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert "ToolTimeout: hang did not answer" in done.stderr


def test_results_may_hold_numpy_values_and_choices_either_form_of_unicode():
    decomposed = unicodedata.normalize("NFD", "Zürich")

    @tool
    def lake(town: Literal[decomposed, "Bern"]) -> dict:
        """The depth of a lake."""
        return {"depth": np.float64(136.0), "towns": np.array([1, 2]), "known": town == decomposed}

    found = call(lake, town=unicodedata.normalize("NFC", "Zürich"))  # all that a model can write
    assert json.loads(found.text) == {"depth": 136.0, "towns": [1, 2], "known": True}
    assert call(lake, town="Basel").failed
