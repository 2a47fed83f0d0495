"""The three kinds of failure, and where each is handled.

    ours          ConfigError, DataError, CheckpointError, MismatchError,
                  DivergedError                                            stops the run, with the values
    the world's   WorldError                                               recorded on the trajectory, kept
      ToolTimeout                                                          out of baseline and loss
    the model's   no exception: an observation the model reads             agent.tool, agent.rollout

A `JaxdeepError` carries a message for people: the verbs print it without a traceback and exit with 2.
"""


class JaxdeepError(Exception):
    """A failure with a message for the person who ran the command."""


class ConfigError(JaxdeepError):
    """A configuration that cannot be run: an unknown key, a missing one, a size that does not divide."""


class DataError(JaxdeepError):
    """Input that cannot be used: a missing file, an empty corpus, a question without an answer."""


class CheckpointError(JaxdeepError):
    """Weights or a checkpoint that do not fit the run that asks for them."""


class MismatchError(JaxdeepError):
    """Sampler and trainer disagree about the log-probabilities of the same tokens."""


class DivergedError(JaxdeepError):
    """A loss or a gradient that is no number. The state before it was kept."""


class WorldError(Exception):
    """The world failed, not the model: an index that is gone, a tool that hangs. The rollout is void."""


class ToolTimeout(WorldError):
    """A tool did not answer in its time."""
