"""Tools and rewards that outgrow one host: a plain function that runs on a Ray cluster (extra `ray`).

    @tool(timeout=60.0)
    @on_ray                                   # or @on_ray(cpus=4)
    def run_tests(patch: Annotated[str, "a diff"]) -> str: ...

    rewards = {"judged": (1.0, on_ray(judge))}

The cluster is that of RAY_ADDRESS, or one that runs on this machine, or else one of this machine's cores
that starts with the first call. Its workers need what the function imports, and get a copy of its
arguments, `self` of a method too: what it changes there stays there. The function itself is sent once.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar, overload

from jaxdeep.errors import ConfigError, WorldError

P = ParamSpec("P")
T = TypeVar("T")

TRIES = 4  # of a call whose worker or host dies
FROM_FILE = "jaxdeep_file_"  # names of modules that were imported from a file begin with this


@overload
def on_ray(function: Callable[P, T], /) -> Callable[P, Awaitable[T]]: ...
@overload
def on_ray(*, cpus: float = ...) -> Callable[[Callable[P, T]], Callable[P, Awaitable[T]]]: ...
def on_ray(function: Callable[..., Any] | None = None, /, *, cpus: float = 1.0) -> Any:
    """The function as an async one: each call waits for `cpus` of the cluster to be free and runs there.

    A call whose worker dies is made again, elsewhere; that its function was begun twice is possible. After
    `TRIES` it is a WorldError. What the function raises is raised here. A call that nobody waits for any
    more, since its time is over, is killed there. ConfigError where Ray is not installed.
    """
    if function is None:
        return functools.partial(on_ray, cpus=cpus)
    if inspect.iscoroutinefunction(function):
        raise TypeError(
            f"{function.__name__}: on_ray is for plain functions, an async one waits here"
        )
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"{function.__name__} is to run on Ray: pip install 'jaxdeep[ray]'")
    sent = functools.cache(lambda: _remote(function, cpus))

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        import ray

        result = sent().remote(*args, **kwargs)
        try:
            return await asyncio.wrap_future(result.future())
        except asyncio.CancelledError:
            ray.cancel(result, force=True)
            raise
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            why = str(error).splitlines()[0]
            raise WorldError(
                f"{function.__name__} on Ray: {type(error).__name__}: {why}"
            ) from error

    return call


def _remote(function: Callable[..., Any], cpus: float) -> Any:
    import ray

    if function.__module__.startswith(FROM_FILE):  # workers could not import it by this name
        ray.cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return ray.remote(num_cpus=cpus, max_retries=TRIES - 1)(function)
