"""The vocabulary of the host half: what a conversation, a rollout and a batch are made of.

Tokens are the state of a conversation and text is a view of it: training reads the pieces of
`Trajectory.branches`; people, tools and rewards read `Trajectory.messages`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxdeep.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]


def plain(value: Any) -> Any:
    """A numpy number or array in plain Python: what `json.dumps` is given as its `default`.
    TypeError for what has no such meaning."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r:.80} of {type(value).__name__} is not a value of JSON")


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """One call the model asked for. `error` says why it could not be read; `arguments` is then
    empty. `id` is the model's, in chat formats where calls have one."""

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""
    id: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn as people read it. `name` is the tool's where the role is "tool", and `call_id` the
    id of the call that it answers, if that had one. `weight` multiplies the loss of the turn in
    supervised training; 0 leaves it out."""

    role: Role
    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str = ""
    weight: float = 1.0
    call_id: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the most likely one. Any other temperature
    divides the logits; of the resulting distribution are kept the `top_k` most likely tokens (0:
    all), of what these have together the fewest that make up `top_p`, and of those the ones with at
    least `min_p` times the probability of the most likely one. A turn ends after any of the ids, or
    runs of ids, in `stop`.

    All of it is data to the compiled programs, never a shape: no setting compiles anything.
    """

    temperature: float = 1.0
    stop: tuple[int | tuple[int, ...], ...] = ()
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


class Completion(NamedTuple):
    """A policy's turn, or part of one. `tokens` are ids as sampled, the stop token included;
    `logps` their log-probabilities at temperature 1, in nats. `stop` is "length" where the budget
    cut the turn and "" in a part after which the turn goes on. `drawn_logps` are under the
    distribution the tokens were drawn from, and `version` is how many updates the policy had seen.

    `forced` marks tokens that were put into the turn rather than sampled. Their entries of `logps`
    may be anything, NaN too: nobody reads them, and forced tokens are never learned. None: all were
    sampled.
    """

    tokens: list[int]
    logps: list[float]
    stop: Literal["stop", "length", ""]
    drawn_logps: list[float] | None = None
    version: int = 0
    forced: list[bool] | None = None


class Piece(NamedTuple):
    """A run of tokens with one author. `logps` are the sampler's, None in data that nobody sampled.
    `weights` multiply the loss of each token; None is 1 for the policy's and 0 for the world's.
    `version` is how many updates the policy that sampled them had seen."""

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
    MAX_TOKENS = "max_tokens"  # a branch filled its budget
    TIMEOUT = "timeout"  # the rollout took too long by the clock
    FAILED = "failed"  # the world failed; `Trajectory.failure` says how

    @property
    def truncated(self) -> bool:
        """Whether a limit, rather than the model or the world, ended the rollout."""
        return self not in (Stop.FINISHED, Stop.TOOL_DONE, Stop.FAILED)


def answer_text(answer: Any) -> str:
    """An answer that is a text, a number or a truth value, as a text; DataError for others."""
    answer = plain(answer) if isinstance(answer, np.generic) else answer
    if isinstance(answer, bool):
        return str(answer).lower()  # as JSON writes it
    if isinstance(answer, str) or (isinstance(answer, int | float) and math.isfinite(answer)):
        return str(answer)
    raise DataError(f"an answer must be a text or a number, found {answer!r:.80}")


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One problem: what to ask, which answers are right, and whatever its rewards need in `meta`.

    A single text or number in place of `answers` is the one right answer. DataError: an answer that
    is neither."""

    id: str
    question: str
    answers: tuple[str, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        given = plain(self.answers) if isinstance(self.answers, np.ndarray) else self.answers
        answers = tuple(map(answer_text, given if isinstance(given, list | tuple) else [given]))
        object.__setattr__(self, "answers", answers)  # it is frozen


@dataclasses.dataclass(slots=True)
class Branch:
    """One token sequence of a rollout. It only grows while the rollout runs, and its pieces in
    order are exactly the ids that the sampler saw."""

    pieces: list[Piece] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Every token, in order."""
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def sampled(self) -> int:
        """How many tokens the policy sampled."""
        return sum(len(piece.tokens) for piece in self.pieces if piece.author == "policy")


@dataclasses.dataclass(slots=True)
class Trajectory:
    """One rollout.

    `branches` are its token sequences in the order in which they began: one, unless the environment
    manages the context and starts over from a summary or without old results (`Env.fork`). What a
    later branch repeats of earlier turns is the world's there, so each sampled token is the
    policy's in one place and is learned once. `messages` is everything that was said, each thing
    once: the first branch's opening, then turns and answers to them.
    """

    task: Task
    seed: int = 0
    branches: list[Branch] = dataclasses.field(default_factory=list)
    messages: list[Message] = dataclasses.field(default_factory=list)
    stop: Stop = Stop.FAILED
    failure: str = ""
    rewards: dict[str, float | None] = dataclasses.field(default_factory=dict)
    reward: float | None = None
    advantage: float | None = None  # weight of its tokens in the loss; None: left out of the loss
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of all branches in order, for counting. Not a prompt: only a branch is one."""
        return [piece for branch in self.branches for piece in branch.pieces]

    @property
    def tokens(self) -> list[int]:
        """Every token of all branches, in order."""
        return [token for branch in self.branches for token in branch.tokens]

    @property
    def sampled(self) -> int:
        """How many tokens the policy sampled."""
        return sum(branch.sampled for branch in self.branches)


class Row(NamedTuple):
    """One sequence to learn from: arrays of one length, aligned with `tokens`.

    `learn[t]` is the loss mask: above 0 where token t is learned (predicted from the tokens before
    it), and its weight there, 1 unless data says otherwise. `logp[t]` is the log-probability the
    sampler gave the token, `advantage[t]` what its gradient is multiplied by, `learn[t]` included.
    """

    tokens: np.ndarray
    learn: np.ndarray
    logp: np.ndarray
    advantage: np.ndarray


class Batch(NamedTuple):
    """Packed rows, numpy on the host and sharded arrays on the mesh. `segments_BT` numbers the
    sequences of a row from 1; 0 is padding: it is not attended to and its loss mask is 0."""

    tokens_BT: Any
    segments_BT: Any
    positions_BT: Any
    learn_BT: Any
    logp_BT: Any
    advantage_BT: Any
