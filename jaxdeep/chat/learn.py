"""What of a conversation is learned, and how much: by role, by turn, by span.

A weight goes with each token into `Row.learn`: 0 is read and not learned, 1 is the default, and the loss
is the mean over tokens by weight. The tokens themselves never depend on it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

from jaxdeep.errors import ConfigError
from jaxdeep.types import Role

Weighed = tuple[str, float]
"""A part of a turn and the weight of what it says."""

TAG = re.compile(r"[A-Za-z][\w.-]*")


@dataclasses.dataclass(frozen=True)
class LearnConfig:
    """`roles` are learned, their text and its end. `spans` multiplies the weight of what the policy wrote
    from `<tag>` to `</tag>`, both included: think=0.0 leaves reasoning out, tool_call=2.0 counts calls
    twice. A token counts as the character it starts with. What stands between the tags in `world`,
    inside an assistant's text, is the world's: a tool's output, which no policy writes."""

    roles: tuple[Role, ...] = ("assistant",)
    spans: Mapping[str, float] = dataclasses.field(default_factory=dict)
    world: tuple[str, ...] = ("tool_output", "tool_response")

    def __post_init__(self) -> None:
        for tag in (*self.spans, *self.world):
            if not TAG.fullmatch(tag):
                raise ConfigError(f"learn: {tag!r} is not the name of a tag, such as tool_output")
        for tag, weight in self.spans.items():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"learn.spans.{tag}={weight} must be 0 or more")
            if tag in self.world:
                raise ConfigError(f"learn.spans.{tag}: what is in learn.world is never learned")
        if not self.roles:
            raise ConfigError("learn.roles is empty: nothing would be learned")

    def of_world(self, text: str) -> bool:
        """Whether an assistant's text holds a span of the world."""
        return bool(self.world and self._worldly.search(text))

    def authored(self, text: str) -> list[tuple[str, bool]]:
        """An assistant's text in order, each part with whether the world wrote it. A span ends where its tag is
        closed for the last time before another span begins, since what the world says may hold the tag too;
        one that nothing closes goes to the end. Blank text before, between or after spans alone is the
        world's as well."""
        parts, at = [], 0
        for span in self._worldly.finditer(text):
            parts += [(text[at : span.start()], False), (span.group(), True)]
            at = span.end()
        parts.append((text[at:], False))
        return [(part, world or not part.strip()) for part, world in parts if part]

    def weigh(self, parts: Sequence[str], base: float) -> list[Weighed]:
        """The parts of a policy's turn, cut at the tags of `spans`, each with its weight."""
        if not self.spans or not base:
            return [(part, base) for part in parts]
        atoms: list[str] = []
        for part in parts:  # a control token is whole, a text may hold tags
            atoms += filter(None, self._tags.split(part)) if type(part) is str else [part]
        weights = [base] * len(atoms)
        for tag, weight in self.spans.items():
            opened = None
            for i, atom in enumerate(atoms):
                if opened is None and re.fullmatch(rf"<{tag}(\s[^>]*)?>", atom):
                    opened = i
                elif opened is not None and atom == f"</{tag}>":
                    weights[opened : i + 1] = [w * weight for w in weights[opened : i + 1]]
                    opened = None
        return list(zip(atoms, weights, strict=True))

    @functools.cached_property
    def _worldly(self) -> re.Pattern:
        tags = "|".join(map(re.escape, self.world))
        begin = rf"<({tags})(?:\s[^>]*)?>"
        again = rf"(?:(?!<(?:{tags})(?:\s[^>]*)?>).)*</\1>"
        return re.compile(rf"{begin}.*?(?:</\1>(?!{again})|\Z)", re.DOTALL)

    @functools.cached_property
    def _tags(self) -> re.Pattern:
        tags = "|".join(map(re.escape, self.spans))
        return re.compile(rf"(</?(?:{tags})(?:\s[^>]*)?>)")


PLAIN = LearnConfig(world=())
"""An assistant's text is an assistant's."""
