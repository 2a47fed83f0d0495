"""Post-train tool-using agents with JAX: from a corpus to questions to rollouts to GRPO.

What most programs need is here by name:

    from jaxdeep import Env, Message, Task, tool        a task set of your own
    from jaxdeep import load_config, run_verb           a verb from Python

Each name is imported when it is first used, so that `import jaxdeep` costs nothing and none of the
names but `run_verb` brings jax.
"""

import importlib
import typing

__version__ = "0.1.0"

_WHERE = {
    "jaxdeep.types": (
        *("Batch", "Branch", "Completion", "Message", "Piece", "Row", "Sampling", "Stop", "Task"),
        *("ToolCall", "Trajectory"),
    ),
    "jaxdeep.errors": (
        *("CheckpointError", "ConfigError", "DataError", "DivergedError", "JaxdeepError"),
        *("MismatchError", "ToolTimeout", "WorldError"),
    ),
    "jaxdeep.agent.base": ("Env", "Policy", "Reward", "Taskset"),
    "jaxdeep.agent.tool": ("Tool", "ToolError", "ToolResult", "tool"),
    "jaxdeep.agent.remote": ("on_ray",),
    "jaxdeep.agent.scripted": ("ScriptedPolicy",),
    "jaxdeep.run.verbs": ("load_config", "run_verb"),
}
_NAMES = {name: module for module, names in _WHERE.items() for name in names}
__all__ = [*sorted(_NAMES), "__version__"]


def __getattr__(name: str) -> typing.Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'jaxdeep' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
