"""Starts a program at the levels `guarded` and `bare`, and ends all that it leaves.

Run as a process of its own, as `python -I -S launch.py SETTINGS`, never imported. It forks: the
child limits itself, gives up its user, locks itself in and becomes the program. The parent is the
reaper of everything that descends from it, daemons included: when the program has ended, or on
SIGTERM, or when its own parent dies, it kills all of them. It says on `status_fd` how the program
ended; without that line the run does not count.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
libc = ctypes.CDLL(None, use_errno=True)


def prctl(option, *args):
    values = [ctypes.c_ulong(value) for value in args] + [ctypes.c_ulong(0)] * (4 - len(args))
    if libc.prctl(option, *values) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def install_filter(program):
    """Has the kernel check every system call from here on by a BPF program."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    prctl(PR_SET_NO_NEW_PRIVS, 1)
    filter_ = Program(len(program) // 8, program)
    if libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(filter_), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp: " + os.strerror(ctypes.get_errno()))


def ruleset(settings):
    """What the program may read, run and write, opened by whoever may open it."""
    sys.path.insert(0, settings["landlock"])
    from landlockpy import AccessFS, Ruleset, Scope

    read = AccessFS.READ_FILE | AccessFS.READ_DIR | AccessFS.EXECUTE
    device = AccessFS.READ_FILE | AccessFS.WRITE_FILE
    rules = Ruleset(scoped=Scope.ABSTRACT_UNIX_SOCKET | Scope.SIGNAL)
    every = rules.handled_fs
    for access, paths in ((read, "readable"), (every, "writable"), (device, "devices")):
        for path in settings[paths]:
            if os.path.exists(path):
                only_file = AccessFS.READ_FILE | AccessFS.WRITE_FILE | AccessFS.EXECUTE
                rules.allow_path(path, access if os.path.isdir(path) else access & only_file)
    return rules


def become(settings, rules):
    """Turns this process into the program."""
    os.setsid()
    for name, value in settings["rlimits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    os.chdir(settings["folder"])
    os.umask(0o022)
    if settings["uid"] is not None:
        os.setgroups([])
        os.setresgid(settings["uid"], settings["uid"], settings["uid"])
        os.setresuid(settings["uid"], settings["uid"], settings["uid"])
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if rules is not None:
        rules.restrict()
    if settings["filter"]:
        install_filter(bytes.fromhex(settings["filter"]))
    for kind in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM):
        signal.signal(kind, signal.SIG_DFL)
    os.execvpe(settings["command"][0], settings["command"], settings["environment"])


def descendants():
    """The ids of all processes below this one."""
    found, todo = [], [os.getpid()]
    while todo:
        pid = todo.pop()
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    children = [int(child) for child in file.read().split()]
                found += children
                todo += children
        except OSError:
            continue  # it ended meanwhile
    return found


def end_all():
    """Kills every descendant until none is left. Orphans become children of this process, so none
    can hide; those that fork faster than they die are stopped first."""
    while True:
        alive = descendants()
        for kind in (signal.SIGSTOP, signal.SIGKILL):
            for pid in alive:
                with contextlib.suppress(OSError):
                    os.kill(pid, kind)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def main():
    settings = json.loads(sys.argv[1])
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != settings["parent"]:
        os._exit(1)  # the parent died before it could be asked to tell
    rules = ruleset(settings) if settings["landlock"] else None
    failed, failure = os.pipe2(os.O_CLOEXEC)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    child = os.fork()
    if child == 0:
        try:
            os.close(settings["status_fd"])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            become(settings, rules)
        except BaseException as error:
            os.write(failure, f"{type(error).__name__}: {error}".encode())
        os._exit(126)
    os.close(failure)
    for fd in (0, 1, 2, *settings["close"]):
        os.close(fd)  # so that the ends of the pipes are the program's alone

    def stop(*_):
        end_all()
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    reason = os.read(failed, 4096).decode()
    while True:
        pid, status = os.wait()
        if pid == child:
            break
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    code = os.waitstatus_to_exitcode(status)
    record = {"failed": reason} if reason else {"exit-code": code}
    os.write(settings["status_fd"], (json.dumps(record) + "\n").encode())
    end_all()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.write(settings["status_fd"], json.dumps({"cpu": usage.ru_utime + usage.ru_stime}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
