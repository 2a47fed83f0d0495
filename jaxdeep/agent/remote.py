"""Tools and rewards that need more than one host: plain functions on a Ray cluster (extra `ray`).

    @tool(timeout=60.0)
    @on_ray                                   # or @on_ray(cpus=4)
    def run_tests(patch: Annotated[str, "a diff"]) -> str: ...

    rewards = {"judged": (1.0, on_ray(judge))}

The cluster is the one at RAY_ADDRESS, else one that runs on this machine; without either, a cluster
of this machine's cores is started with the first call. Its workers must be able to import what the
function imports. They get a copy of its arguments, `self` of a method too, so changes to those are
not seen here. The function itself is sent once.
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

TRIES = 4  # times that a call is made whose worker or host dies
FROM_FILE = "jaxdeep_file_"  # names of modules that were imported from a file begin with this


@overload
def on_ray(function: Callable[P, T], /) -> Callable[P, Awaitable[T]]: ...
@overload
def on_ray(*, cpus: float = ...) -> Callable[[Callable[P, T]], Callable[P, Awaitable[T]]]: ...
def on_ray(function: Callable[..., Any] | None = None, /, *, cpus: float = 1.0) -> Any:
    """The function as an async one: a call waits until `cpus` of the cluster are free and runs
    there.

    A call whose worker dies is made again on another, so the function may run more than once; after
    `TRIES` it is a WorldError. What the function raises is raised here. A call that is cancelled
    here, by a timeout say, is killed there. ConfigError where Ray is not installed.
    """
    if function is None:
        return functools.partial(on_ray, cpus=cpus)
    if inspect.iscoroutinefunction(function):
        raise TypeError(
            f"{function.__name__}: on_ray is for plain functions, an async one waits here"
        )
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"{function.__name__} is to run on Ray: pip install 'jaxdeep[ray]'")
    # Made with the first call, since it starts or joins the cluster: importing a file must not.
    remote = functools.cache(lambda: _remote(function, cpus))

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        import ray

        result = remote().remote(*args, **kwargs)
        try:
            return await asyncio.wrap_future(result.future())
        except asyncio.CancelledError:
            ray.cancel(result, force=True)
            raise
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise WorldError(f"{function.__name__} on Ray: {reason}") from error

    return call


def _remote(function: Callable[..., Any], cpus: float) -> Any:
    import ray

    if function.__module__.startswith(FROM_FILE):  # workers could not import it by this name
        ray.cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return ray.remote(num_cpus=cpus, max_retries=TRIES - 1)(function)
