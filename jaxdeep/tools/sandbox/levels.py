"""Which levels work on this machine, and what to do about those that do not."""

from __future__ import annotations

import functools

import jaxdeep.tools.sandbox.bubblewrap as bubblewrap
import jaxdeep.tools.sandbox.guard as guard
import jaxdeep.tools.sandbox.slots as slots
from jaxdeep.errors import ConfigError
from jaxdeep.tools.sandbox.limits import LEVELS, Level

_INSTALL = "pip install 'jaxdeep[sandbox]', or the system's package bubblewrap"
_REMEDIES = {
    "full": f"""\
  - bubblewrap is missing: {_INSTALL}
  - Ubuntu 24.04 and later: an AppArmor profile for bwrap that allows `userns`, or
    sysctl kernel.apparmor_restrict_unprivileged_userns=0
  - Debian 10, Red Hat 7: sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces=10000
  - Docker: --security-opt seccomp=unconfined --security-opt systempaths=unconfined, as a user
    other than root or with --cap-add SETUID --cap-add SETGID
  - Kubernetes: a pod with `runtimeClassName: gvisor`, at the level guarded inside""",
    "guarded": """\
  - pip install 'jaxdeep[sandbox]' (landlockpy)
  - Linux 6.12 or later with Landlock in `lsm=`; as root with its own users, 6.2 is enough""",
    "bare": "  - it works on every Linux",
}


@functools.cache
def problem(level: Level) -> str:
    """Why a level does not work here, in one line; "" if it does. Tried once a process."""
    user = slots.TRIAL if slots.available() else None
    if level == "full":
        return bubblewrap.probe(user)
    return guard.probe(user) if level == "guarded" else ""


def best() -> Level:
    """The strongest level that works here."""
    return next(level for level in reversed(LEVELS) if not problem(level))


def need(level: Level) -> None:
    """Raises `ConfigError`, with what to do, if a level does not work here. Nothing ever runs at a
    weaker level than was asked for."""
    if level not in LEVELS:
        raise ConfigError(f"sandbox level {level!r} must be one of {', '.join(LEVELS)}")
    why = problem(level)
    if why:
        raise ConfigError(
            f"the sandbox level {level!r} does not work here: {why}\n{remedy(level)}\n"
            f"What works here is {best()!r}; ask for it by name to accept what it does not hold."
        )


def remedy(level: Level) -> str:
    """What to do where a level does not work."""
    return _REMEDIES[level]
