"""The vocabulary of the host half: what a conversation, a rollout and a batch are made of.

Tokens are the state of a conversation and text is a view of it: `Trajectory.pieces` is what training
reads, `Trajectory.messages` is what people, tools and rewards read.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """One call the model asked for. `error` says why it could not be read; then `arguments` is empty."""

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn as people read it. `name` is the tool's for role "tool"; `weight` is how much the turn
    counts where it is learned, 0 for not at all."""

    role: Role
    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str = ""
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How the next tokens are drawn: temperature 0 takes the most likely one; of the rest, scaled by it,
    the `top_k` most likely (0: all), the fewest that have `top_p` of the probability, and those with at
    least `min_p` of the most likely one's. A turn ends after any of the ids, or runs of ids, in `stop`.
    All of it is data, never a shape."""

    temperature: float = 1.0
    stop: tuple[int | tuple[int, ...], ...] = ()
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


class Completion(NamedTuple):
    """What a policy said: ids as sampled (the stop token included) and the log-probability of each
    under the policy at temperature 1, in nats. `stop` is "length" when the budget cut the turn, "" in
    a part of a turn that goes on. `drawn_logps` are under the distribution that was drawn from.
    `version` is of the policy: how many updates had made it."""

    tokens: list[int]
    logps: list[float]
    stop: Literal["stop", "length", ""]
    drawn_logps: list[float] | None = None
    version: int = 0


class Piece(NamedTuple):
    """A run of tokens with one author. `logps` is set where a policy sampled them, None in data.
    `weights` says how much each token is learned; None: the policy's 1, the world's 0. `version` is of the
    policy that sampled them all: how many updates had made it."""

    tokens: list[int]
    author: Literal["policy", "world"]
    logps: list[float] | None = None
    weights: list[float] | None = None
    version: int = 0


class Stop(enum.Enum):
    """Why a rollout ended."""

    FINISHED = "finished"  # the model ended a turn without asking for a tool
    TOOL_DONE = "tool_done"  # a tool declared the episode over
    MAX_TURNS = "max_turns"  # as many turns as the limits allow
    MAX_CALLS = "max_calls"  # as many tool calls as the limits allow
    TURN_TOKENS = "turn_tokens"  # one turn filled its budget and was cut
    MAX_TOKENS = "max_tokens"  # the conversation filled its budget
    TIMEOUT = "timeout"  # the rollout took too long by the clock
    FAILED = "failed"  # the world failed; `Trajectory.failure` says how

    @property
    def truncated(self) -> bool:
        """Whether a limit, rather than the model or the world, ended the rollout."""
        return self not in (Stop.FINISHED, Stop.TOOL_DONE, Stop.FAILED)


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One problem: what to ask, which answers are right, and whatever its rewards need in `meta`."""

    id: str
    question: str
    answers: tuple[str, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Trajectory:
    """One rollout. Append-only while it runs; `pieces` concatenated are the ids the sampler saw."""

    task: Task
    seed: int = 0
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    messages: list[Message] = dataclasses.field(default_factory=list)
    stop: Stop = Stop.FAILED
    failure: str = ""
    rewards: dict[str, float | None] = dataclasses.field(default_factory=dict)
    reward: float | None = None
    advantage: float | None = None  # its weight in the loss; None where it has no part in it
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """Every token of the conversation, in order."""
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def sampled(self) -> int:
        """How many tokens the policy wrote."""
        return sum(len(piece.tokens) for piece in self.pieces if piece.author == "policy")


class Row(NamedTuple):
    """One sequence to learn from, all arrays of length T and aligned with `tokens`: `learn[t]` is above 0
    where token t is to be learned (predicted from the tokens before it) and says how much it counts, 1
    unless data weighs it; `logp[t]` is the log-probability its sampler gave it, `advantage[t]` the factor
    of its gradient, `learn[t]` included."""

    tokens: np.ndarray
    learn: np.ndarray
    logp: np.ndarray
    advantage: np.ndarray


class Batch(NamedTuple):
    """Packed rows, numpy on the host and arrays on the mesh. `segments_BT` numbers the sequences of a
    row from 1; 0 is padding, which nothing attends to and nothing learns from."""

    tokens_BT: Any
    segments_BT: Any
    positions_BT: Any
    learn_BT: Any
    logp_BT: Any
    advantage_BT: Any
