"""Tasks in repositories: a checkout without history, a patch applied as SWE-bench does, a verdict.

A checkout holds one commit: no other objects, no branches, no remotes, no log, so that a repair
cannot be read from the future. It is verified to be the commit that the task names.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxdeep.envs.repair import verdict as verdicts
from jaxdeep.envs.repair.diff import DiffError, parse
from jaxdeep.envs.repair.grading import Rule
from jaxdeep.envs.repair.scan import is_runner_file, is_shadow, is_test_file, scan
from jaxdeep.envs.repair.task import RepairTask, Runner
from jaxdeep.errors import DataError, WorldError
from jaxdeep.tools import sandbox

LARGEST_PATCH = 10 * 2**20
"""Bytes of a patch above which it is not tried."""

_CHAIN: tuple[tuple[str, ...], ...] = (
    ("git", "apply"),
    ("git", "apply", "--3way"),
    ("git", "apply", "--reject"),
    ("patch", "--batch", "--forward", "--fuzz=5", "-p1", "-i"),
)
"""How SWE-bench 5 tries to apply a patch, in this order, each on the tree as it was."""

_BOUNDED = 'ulimit -f 131072; ulimit -v 4194304; exec "$@"'  # files of 64 MB, 4 GB of memory

_OPTIONS = {
    "core.autocrlf": "false",
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.logAllRefUpdates": "false",
    "gc.auto": "0",
    "safe.directory": "*",
    "protocol.file.allow": "always",
    "uploadpack.allowAnySHA1InWant": "true",
    "advice.detachedHead": "false",
    "user.name": "nobody",
    "user.email": "nobody@localhost",
}
_SECONDS = 600.0  # that one command of git may take


@dataclasses.dataclass(frozen=True)
class RepositoryTask:
    """A task in a repository. `repository` is a folder with a clone, bare or not, or a bundle.
    `test_patch` brings the tests that tell whether it is solved. The rest is as in `RepairTask`."""

    instance_id: str
    repository: str
    base_commit: str
    test_patch: str
    fail_to_pass: Sequence[str]
    pass_to_pass: Sequence[str] = ()
    runner: Runner = "pytest"
    path: Sequence[str] = ()
    seconds: float = 300.0
    memory_mb: int = 2048
    allowed_flags: frozenset[str] = frozenset()
    python: str | None = None


def judge_patch(
    task: RepositoryTask,
    patch: str | None,
    *,
    level: sandbox.Level = "full",
    rule: Rule = "strict",
    seed: int = 0,
) -> verdicts.Verdict:
    """The verdict on a unified diff against the task's commit. What the machine fails at (git, the
    disk, a clone that is not there) is "infra"; a task that is wrong in itself raises `DataError`.
    """
    if not (patch or "").strip():
        return verdicts.Verdict(task.instance_id, "empty")
    assert patch is not None
    with tempfile.TemporaryDirectory(prefix="jaxdeep-repository-") as place:
        folder = pathlib.Path(place) / "checkout"
        try:
            notes = checkout(task.repository, task.base_commit, folder)
            applied = apply_chain(folder, patch)
            if isinstance(applied, str):
                return verdicts.Verdict(task.instance_id, "not_applied", detail=applied)
            return _judge(task, folder, applied, notes, level, rule, seed)
        except (OSError, WorldError) as error:
            return verdicts.Verdict(task.instance_id, "infra", detail=f"{error}")


def _judge(task, folder, applied, notes, level, rule, seed) -> verdicts.Verdict:
    before, after = changed_files(folder)
    links = [path for path in after if (folder / path).is_symlink()]
    size = sum(len(text or "") for text in after.values())
    if links or size > verdicts.LARGEST_FILES:  # before anything is written through one
        detail = f"symbolic links: {links}" if links else f"changed files of {size / 2**20:.0f} MB"
        return verdicts.Verdict(task.instance_id, "not_applied", detail=detail)
    tests = laid_tests(task, folder)
    flags = [f for f in scan(before, after, tests) if f.what not in task.allowed_flags]
    tree = run_git(folder, "write-tree").strip()
    for path in after:
        new = before[path] is None
        theirs = is_runner_file(path) or is_test_file(path, tests) or (new and is_shadow(path))
        if theirs:
            _put(folder, path, before[path])
    configuration = {path: show(folder, path) for path in verdicts.CONFIGURATIONS}
    shutil.rmtree(folder / ".git")
    repair = RepairTask(
        instance_id=task.instance_id,
        files=configuration,
        runner=task.runner,
        tests={path: text for path, text in tests.items() if text is not None},
        fail_to_pass=task.fail_to_pass,
        pass_to_pass=task.pass_to_pass,
        path=task.path,
        seconds=task.seconds,
        memory_mb=task.memory_mb,
        python=task.python,
    )
    found = verdicts.judge_tests(repair, {}, flags, level, seed, folder=folder, rule=rule)
    flags = (*found.flags, *notes)
    return dataclasses.replace(found, flags=flags, apply_level=applied, tree=tree)


def checkout(repository: str, commit: str, folder: pathlib.Path) -> tuple[str, ...]:
    """Makes `folder` with one commit of a repository and nothing else, and returns notes on what is
    not in it: submodules, and files of LFS, of which there are pointers. Raises `DataError` for a
    commit that the repository does not have, `WorldError` where git fails."""
    source = pathlib.Path(repository).expanduser().absolute()
    if not source.exists():
        raise WorldError(f"there is no repository {repository}")
    folder.mkdir(parents=True)
    if source.is_file():
        mirror = folder.with_name(folder.name + ".mirror")
        run_git(folder, "clone", "-q", "--mirror", str(source), str(mirror))
        source = mirror
    try:
        full = run_git(source, "rev-parse", "--verify", "-q", f"{commit}^{{commit}}").strip()
    except WorldError as error:
        raise DataError(f"{repository} has no commit {commit!r}") from error
    run_git(folder, "init", "-q")
    run_git(folder, "fetch", "-q", "--depth=1", "--no-tags", f"file://{source}", full)
    run_git(folder, "checkout", "-q", "--detach", "FETCH_HEAD")
    (folder / ".git" / "FETCH_HEAD").unlink(missing_ok=True)
    if source.name.endswith(".mirror"):
        shutil.rmtree(source)
    head = run_git(folder, "rev-parse", "HEAD").strip()
    count = run_git(folder, "rev-list", "--count", "--all", "HEAD").strip()
    if head != full or count != "1" or run_git(folder, "remote"):
        raise WorldError(f"the checkout of {commit} has {count} commits and is at {head}")
    listed = run_git(folder, "ls-files", "-s", "-z").split("\0")
    entries = [line.split(None, 3) for line in listed if line]
    notes = [f"submodule not there: {entry[3]}" for entry in entries if entry[0] == "160000"]
    for entry in entries:
        path = folder / entry[3]
        small = path.is_file() and not path.is_symlink() and path.stat().st_size < 200
        if small and path.read_bytes().startswith(b"version https://git-lfs.github.com/spec/"):
            notes.append(f"file of LFS not there: {entry[3]}")
    return tuple(notes)


def apply_chain(folder: pathlib.Path, patch: str) -> int | str:
    """Applies a patch to a checkout as SWE-bench does and puts the result in the index. Returns the
    number of the command that could, from 1; 0 where the change is there already; or, where none
    could, what the first one said."""
    try:
        data = patch.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        return f"a patch that cannot be encoded: {error}"
    if len(data) > LARGEST_PATCH:
        return f"a patch of {len(data) / 2**20:.0f} MB"
    file = folder.with_name(folder.name + ".diff")
    file.write_bytes(data if data.endswith(b"\n") else data + b"\n")
    reasons = []
    for number, command in enumerate(_CHAIN, start=1):
        # binary contents may be a thousand times as long as their text
        done = _run(["/bin/sh", "-c", _BOUNDED, "sh", *command, str(file)], folder)
        if done.returncode == 0:
            for path in run_git(folder, "ls-files", "-o", "-z").split("\0"):
                if path.endswith((".orig", ".rej")):
                    (folder / path).unlink()
            run_git(folder, "add", "-A", "-f")
            return number
        reasons.append(done.stderr or done.stdout)
        run_git(folder, "reset", "-q", "--hard")
        run_git(folder, "clean", "-fdxq")
    if _run(["git", "apply", "--check", "--reverse", str(file)], folder).returncode == 0:
        return 0
    return reasons[0].strip()[-2000:]


def changed_files(folder: pathlib.Path) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """The files that the index changes, as they were and as they are; None: not there."""
    names = run_git(folder, "diff", "--cached", "--name-only", "--no-renames", "-z", "HEAD")
    paths = [path for path in names.split("\0") if path]
    after = {}
    for path in paths:
        file = folder / path
        there = file.is_file() and not file.is_symlink()
        after[path] = _text(file.read_bytes()) if there else ("" if file.is_symlink() else None)
    return {path: show(folder, path) for path in paths}, after


def laid_tests(task: RepositoryTask, folder: pathlib.Path) -> dict[str, str | None]:
    """The files of the task's tests, as they are laid: those of its test patch applied to the
    commit, and those that it names besides. Raises `DataError` where the patch does not apply."""
    named = {test.partition("::")[0] for test in (*task.fail_to_pass, *task.pass_to_pass)}
    laid = {path: show(folder, path) for path in sorted(named)}
    if task.test_patch.strip():
        try:
            patch = parse(task.test_patch, "unified")
            base = {path: show(folder, path) for path in patch.paths()}
            laid |= patch.apply(base)
        except DiffError as error:
            message = f"task {task.instance_id!r}: its test_patch does not apply: {error.code}"
            raise DataError(f"{message}: {error}") from error
    for path in [path for path, text in laid.items() if text is None]:
        _put(folder, path, None)
    return laid


def show(folder: pathlib.Path, path: str) -> str | None:
    """A file of the commit, None if it is not there."""
    done = _run(["git", "show", f"HEAD:{path}"], folder, text=False)
    return _text(done.stdout) if done.returncode == 0 else None


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _put(folder: pathlib.Path, path: str, text: str | None) -> None:
    (folder / path).unlink(missing_ok=True)
    if text is not None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text.encode("utf-8", "surrogateescape"))


def run_git(folder: pathlib.Path, *arguments: str) -> str:
    """The output of a command of git, without the configuration of whoever runs this. Raises
    `WorldError` if it fails."""
    done = _run(["git", *arguments], folder)
    if done.returncode != 0:
        raise WorldError(f"git {' '.join(arguments[:3])}: {done.stderr.strip()[-1000:]}")
    return done.stdout


def _run(command: Sequence[str], folder: pathlib.Path, text: bool = True):
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/nonexistent",
        "LC_ALL": "C.UTF-8",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_LFS_SKIP_SMUDGE": "1",
        "GIT_CONFIG_COUNT": str(len(_OPTIONS)),
    }
    for number, (key, value) in enumerate(_OPTIONS.items()):
        environment |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    coding: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"} if text else {}
    try:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=_SECONDS,
            stdin=subprocess.DEVNULL, **coding,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise WorldError(f"{' '.join(command[:3])} took more than {_SECONDS:.0f} s") from error


def grade(
    tasks: Iterable[RepositoryTask],
    predictions: Iterable[Mapping[str, Any]],
    *,
    level: sandbox.Level = "full",
    rule: Rule = "strict",
    attempts: int = 3,
) -> list[verdicts.Verdict]:
    """Verdicts on predictions (`instance_id`, `model_patch`), in the order of the tasks; a task
    without a prediction is "empty". What the machine fails at is tried `attempts` times. Raises
    `DataError` for a prediction of no task, and for two of one."""
    patches: dict[str, str | None] = {}
    known = {task.instance_id: task for task in tasks}
    for line in predictions:
        name = line.get("instance_id")
        if name not in known:
            raise DataError(f"a prediction for {name!r}, which is no task")
        if name in patches:
            raise DataError(f"two predictions for {name!r}")
        patches[name] = line.get("model_patch")
    results = []
    for name, task in known.items():
        for _ in range(attempts):
            found = judge_patch(task, patches.get(name), level=level, rule=rule)
            if found.status != "infra":
                break
        results.append(found)
    return results
