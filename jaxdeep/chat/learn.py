"""Which tokens of a conversation are learned, and with what weight: by role, by turn, by span.

A token's weight goes into `Row.learn`: 0 masks it out of the loss, 1 is the default, and the loss
is the weighted mean over tokens. The tokens themselves never depend on the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from jaxdeep.errors import ConfigError
from jaxdeep.settings import AtLeast, section
from jaxdeep.types import Role

WeightedPart = tuple[str, float]
"""A part of a turn (text, or a control token) and the weight of its tokens."""

TAG = re.compile(r"[A-Za-z][\w.-]*")


@section
class LearnConfig:
    """What is learned of a conversation.

    Turns of `roles` are learned: their text and the token that ends them, times the message's
    weight. `spans` multiplies the weight of what the policy wrote from `<tag>` to `</tag>`, both
    included: think=0.0 masks reasoning out, tool_call=2.0 counts calls twice. A token that reaches
    across a tag has the weight of the character it starts with.

    Text between the tags in `world`, inside an assistant's turn, is the output of a tool that
    someone put there: the world wrote it, so it is never learned.

    ConfigError: a tag that is not a name, a negative weight, a span in both, no role.
    """

    roles: Annotated[tuple[Role, ...], "whose turns are learned"] = ("assistant",)
    spans: Annotated[
        Mapping[str, Annotated[float, AtLeast(0)]], "factors on the weight inside <TAG>, by tag"
    ] = dataclasses.field(default_factory=dict)
    world: Annotated[
        tuple[str, ...], "tags of tool output inside an assistant's turn, which is not learned"
    ] = ("tool_output", "tool_response")

    def __post_init__(self) -> None:
        for tag in (*self.spans, *self.world):
            if not TAG.fullmatch(tag):
                raise ConfigError(
                    f"data.learn: {tag!r} is not the name of a tag, such as tool_output"
                )
        for tag in self.spans:
            if tag in self.world:
                raise ConfigError(
                    f"data.learn.spans.{tag}: what is in data.learn.world is never learned"
                )
        if not self.roles:
            raise ConfigError("data.learn.roles is empty: nothing would be learned")

    def has_world_span(self, text: str) -> bool:
        """Whether part of an assistant's text was written by the world."""
        return bool(self.world and self._world_span.search(text))

    def split_by_author(self, text: str) -> list[tuple[str, bool]]:
        """An assistant's text as (part, whether the world wrote it), in order.

        A span of the world ends where its tag is closed for the last time before another span
        begins, since a tool's output may have the closing tag in it; one that nothing closes goes
        to the end. Blank text between spans is the world's too, as no policy has to write it.
        """
        parts, at = [], 0
        for span in self._world_span.finditer(text):
            parts += [(text[at : span.start()], False), (span.group(), True)]
            at = span.end()
        parts.append((text[at:], False))
        return [(part, world or not part.strip()) for part, world in parts if part]

    def weigh(self, parts: Sequence[str], base: float) -> list[WeightedPart]:
        """The parts of a policy's turn, cut at the tags of `spans`, each with its weight. `base` is
        the weight of the turn. A span that is not closed is none; spans may be nested in each
        other."""
        if not self.spans or not base:
            return [(part, base) for part in parts]
        atoms: list[str] = []
        for part in parts:  # a control token is whole, but a text may have tags in it
            atoms += filter(None, self._span_tag.split(part)) if type(part) is str else [part]
        weights = [base] * len(atoms)
        for tag, weight in self.spans.items():
            begin = None
            for i, atom in enumerate(atoms):
                if begin is None and re.fullmatch(rf"<{tag}(\s[^>]*)?>", atom):
                    begin = i
                elif begin is not None and atom == f"</{tag}>":
                    weights[begin : i + 1] = [w * weight for w in weights[begin : i + 1]]
                    begin = None
        return list(zip(atoms, weights, strict=True))

    @functools.cached_property
    def _world_span(self) -> re.Pattern:
        tags = "|".join(map(re.escape, self.world))
        begin = rf"<({tags})(?:\s[^>]*)?>"
        # Another closing tag that comes before any span begins: then the first one was output.
        closed_again = rf"(?:(?!<(?:{tags})(?:\s[^>]*)?>).)*</\1>"
        return re.compile(rf"{begin}.*?(?:</\1>(?!{closed_again})|\Z)", re.DOTALL)

    @functools.cached_property
    def _span_tag(self) -> re.Pattern:
        tags = "|".join(map(re.escape, self.spans))
        return re.compile(rf"(</?(?:{tags})(?:\s[^>]*)?>)")


PLAIN = LearnConfig(world=())
"""Without spans of the world: everything in an assistant's turn was written by the policy."""
