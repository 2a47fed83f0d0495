"""The three kinds of failure, and what becomes of each.

    ours          ConfigError, DataError, CheckpointError,   the run stops, the message has the
                  MismatchError, DivergedError               values that disagree
    the world's   WorldError, ToolTimeout                    recorded on the trajectory, which is
                                                             left out of baseline and loss
    the model's   no exception                               an observation that the model reads

A `JaxdeepError` carries a message for people: the verbs print it without a traceback and exit with
2.
"""


class JaxdeepError(Exception):
    """A failure with a message for the person who ran the command."""


class ConfigError(JaxdeepError):
    """A configuration that cannot be run: an unknown key, a missing one, a size that does not
    divide."""


class DataError(JaxdeepError):
    """Input that cannot be used: a missing file, an empty corpus, a question without an answer."""


class CheckpointError(JaxdeepError):
    """Weights or a checkpoint that do not exist, are incomplete, or do not fit the run."""


class MismatchError(JaxdeepError):
    """Sampler and trainer give the same tokens different log-probabilities."""


class DivergedError(JaxdeepError):
    """A loss or a gradient that is not finite, or a collapse. The state before it was kept."""


class WorldError(Exception):
    """The world failed, not the model: a search index is down, a tool hangs. The rollout is left
    out of training."""


class ToolTimeout(WorldError):
    """A tool did not answer in its time."""
