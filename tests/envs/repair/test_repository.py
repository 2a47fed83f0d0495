"""Tasks in repositories: one commit and no more, patches as they come, verdicts on their result."""

import dataclasses
import json
import subprocess
import sys

import pytest
from envs.repair import tricks

from jaxdeep.envs.repair import repository
from jaxdeep.envs.repair.diff import between
from jaxdeep.envs.repair.repository import RepositoryTask, checkout, grade, judge_patch
from jaxdeep.errors import DataError, WorldError
from jaxdeep.tools import sandbox

F2P = ("tests/test_calc.py::test_add[1-2-3]", "tests/test_calc.py::test_add[5--7--2]")
P2P = ("tests/test_calc.py::test_scale", "tests/test_old.py::test_old")
BASE = {
    "src/calc.py": tricks.BUGGY["calc.py"],
    "tests/test_old.py": "from calc import scale\n\n\ndef test_old():\n    assert scale([], 1) == []\n",
    "pytest.ini": "[pytest]\naddopts = --cov\npython_files = test_*.py\n",
    "crlf.txt": "a\r\nb\r\nc\r\n",
}
GOLD = between(BASE, {**BASE, "src/calc.py": tricks.GOLD["calc.py"]}, "unified").text()
TEST_PATCH = between(BASE, {**BASE, **tricks.TESTS}, "unified").text()


@pytest.fixture(scope="module")
def level():
    level = sandbox.best()
    if level == "bare" or (level == "guarded" and sandbox.python() != sys.executable):
        pytest.skip(f"full and guarded do not work here: {sandbox.problem('full')}")
    return level


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A repository whose second commit is the task's, and whose third has the solution."""
    folder = tmp_path_factory.mktemp("history")

    def git(*arguments):
        return repository.run_git(folder, *arguments)

    git("init", "-q", "-b", "main")
    for text in (None, BASE["src/calc.py"], tricks.GOLD["calc.py"]):
        for path, content in (BASE | {"src/calc.py": text or "secret = 1\n"}).items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content.encode())
        git("add", "-A")
        git("commit", "-q", "-m", "a commit", "--date=2024-01-01T00:00:00Z")
    git("tag", "v1")
    return folder, git("rev-parse", "HEAD^").strip()


@pytest.fixture(scope="module")
def task(history):
    folder, commit = history
    return RepositoryTask(
        "calc", str(folder), commit, TEST_PATCH, F2P, P2P, path=["src"], seconds=120
    )


def test_a_checkout_holds_one_commit(history, tmp_path):
    folder, commit = history
    subprocess.run(
        ["git", "-C", folder, "bundle", "create", "-q", tmp_path / "b", "--all"], check=True
    )
    for n, source in enumerate((folder, tmp_path / "b")):
        made = tmp_path / str(n)
        assert checkout(str(source), commit[:10], made) == ()
        assert repository.run_git(made, "rev-parse", "HEAD").strip() == commit
        objects = repository.run_git(made, "cat-file", "--batch-all-objects", "--batch-check")
        assert objects.count(" commit ") == 1 and objects.count(" tag ") == 0
        contents = repository.run_git(made, "cat-file", "--batch-all-objects", "--batch")
        assert "a - b" in contents and "a + b" not in contents and "secret" not in contents
        assert repository.run_git(made, "for-each-ref") == repository.run_git(made, "remote") == ""
        assert not (made / ".git" / "logs").exists() and not (tmp_path / f"{n}.mirror").exists()
        assert (made / "crlf.txt").read_bytes() == b"a\r\nb\r\nc\r\n"
    with pytest.raises(DataError, match="has no commit 'abc'"):
        checkout(str(folder), "abc", tmp_path / "2")
    with pytest.raises(WorldError, match="there is no repository"):
        checkout(str(tmp_path / "none"), commit, tmp_path / "3")


def test_what_a_checkout_does_not_have_is_noted(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    repository.run_git(folder, "init", "-q")
    lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    (folder / "model.bin").write_text(lfs)
    repository.run_git(folder, "add", "-A")
    commit = "0123456789012345678901234567890123456789"
    repository.run_git(folder, "update-index", "--add", "--cacheinfo", f"160000,{commit},vendor")
    repository.run_git(folder, "commit", "-qm", "a")
    notes = checkout(str(folder), "HEAD", tmp_path / "c")
    assert notes == ("submodule not there: vendor", "file of LFS not there: model.bin")


def test_gold_is_resolved_and_nothing_is_not(task, level):
    gold = judge_patch(task, GOLD, level=level)
    assert gold.status == "resolved" and gold.apply_level == 1 and gold.flags == (), gold
    assert {*gold.tests} == {*F2P, *P2P} and len(gold.tree) == 40
    idle = between(BASE, {**BASE, "notes.txt": "x\n"}, "unified").text()
    found = judge_patch(task, idle, level=level)
    assert (found.status, found.f2p, found.p2p) == ("unresolved", 0, 1)


@pytest.mark.parametrize("name", ["deletes a test", "skips by conftest", "shadows", "own old test"])
def test_what_a_patch_does_to_the_tests_does_not_count(name, task, level):
    after = {
        "deletes a test": {"tests/test_old.py": None},
        "skips by conftest": {"tests/conftest.py": "collect_ignore_glob = ['*.py']\n"},
        "shadows": {"pytest.py": "import os\nos._exit(0)\n"},
        "own old test": {"tests/test_calc.py": "def test_add():\n    pass\n"},
    }[name]
    patch = between(
        BASE, {**BASE, "src/calc.py": tricks.GOLD["calc.py"], **after}, "unified"
    ).text()
    found = judge_patch(task, patch, level=level)
    assert {*found.tests.values()} == {"passed"}, found  # as they are in the task
    assert found.status == ("resolved" if name == "own old test" else "tampered")
    assert len(found.flags) == 1


@pytest.mark.parametrize(
    ("patch", "status"),
    [
        ("", "empty"),
        (None, "empty"),
        ("no patch", "not_applied"),
        (GOLD.replace("a - b", "a / b"), "not_applied"),
        (GOLD.replace("src/calc.py", "../calc.py"), "not_applied"),
        (GOLD.replace("src/calc.py", ".git/config"), "not_applied"),
        ("x" * (repository.LARGEST_PATCH + 1), "not_applied"),
        ("diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+/etc\n"
         "\\ No newline at end of file\n", "not_applied"),
    ],
)  # fmt: skip
def test_patches_that_do_not_apply(patch, status, task, level):
    assert judge_patch(task, patch, level=level).status == status


def test_patches_are_tried_as_swe_bench_tries_them(history, tmp_path):
    folder, commit = history
    checkout(str(folder), commit, tmp_path / "c")

    def applied(patch):
        level = repository.apply_chain(tmp_path / "c", patch)
        text = (tmp_path / "c" / "src" / "calc.py").read_text()
        left = repository.run_git(tmp_path / "c", "ls-files", "-o")
        repository.run_git(tmp_path / "c", "reset", "-q", "--hard")
        return level, "a + b" in text, left

    assert applied(GOLD.removesuffix("\n")) == (1, True, "")
    moved = GOLD.replace(" def add(a, b):", " def added(a, b):")
    assert applied(moved) == (4, True, "")  # only patch is so lenient
    reverse = between({**BASE, "src/calc.py": tricks.GOLD["calc.py"]}, BASE, "unified").text()
    assert applied(reverse) == (0, False, "")
    (tmp_path / "c" / "b.bin").write_bytes(b"\0\1")
    repository.run_git(tmp_path / "c", "add", "-A")
    binary = repository.run_git(tmp_path / "c", "diff", "--cached", "--binary")
    repository.run_git(tmp_path / "c", "reset", "-q", "--hard")
    assert "GIT binary patch" in binary and applied(binary)[0] == 1
    crlf = between(BASE, {**BASE, "crlf.txt": "a\r\nB\r\nc\r\n"}, "unified").text()
    assert applied(crlf)[0] == 1


def test_predictions_are_graded_and_failures_of_the_machine_tried_again(task, level, monkeypatch):
    calls = []
    real = repository.judge_patch

    def failing(task, patch, **options):
        calls.append(task.instance_id)
        if calls.count(task.instance_id) < 3:
            return dataclasses.replace(real(task, ""), status="infra")
        return real(task, patch, **options)

    monkeypatch.setattr(repository, "judge_patch", failing)
    other = dataclasses.replace(task, instance_id="other")
    preds = [{"instance_id": "calc", "model_patch": GOLD}]
    found = grade([other, task], preds, level=level)
    assert [(v.instance_id, v.status) for v in found] == [("other", "empty"), ("calc", "resolved")]
    assert calls == ["other"] * 3 + ["calc"] * 3
    for wrong in (preds * 2, [{"instance_id": "none", "model_patch": ""}]):
        with pytest.raises(DataError, match=r"two predictions|is no task"):
            grade([task], wrong, level=level)


def test_a_task_whose_repository_is_gone_is_infra_and_a_wrong_one_is_said(task, level):
    gone = dataclasses.replace(task, repository="/no/such/repository")
    found = judge_patch(gone, GOLD, level=level)
    assert (found.status, found.reward) == ("infra", None) and "/no/such" in found.detail
    wrong = dataclasses.replace(task, test_patch=GOLD.replace("a - b", "a / b"))
    with pytest.raises(DataError, match="test_patch does not apply: not_found"):
        judge_patch(wrong, GOLD, level=level)
    with pytest.raises(DataError, match="has no FAIL_TO_PASS"):
        judge_patch(dataclasses.replace(task, fail_to_pass=()), GOLD, level=level)


@pytest.mark.slow
def test_tasks_from_the_history_of_a_real_repository(shared, level, tmp_path):
    bundle = shared("code/repos/tinydb.bundle")
    lines = shared("code/repos/tinydb_tasks.jsonl").read_text().splitlines()
    mirror = tmp_path / "tinydb.git"
    repository.run_git(tmp_path, "clone", "-q", "--mirror", str(bundle), str(mirror))
    for line in map(json.loads, lines):
        commit = line["commit"]

        def changed(paths, commit=commit):
            return repository.run_git(mirror, "diff", f"{commit}^", commit, "--", *paths)

        real = RepositoryTask(
            commit, str(mirror), f"{commit}^", changed(line["test_files"]), line["fail_to_pass"]
        )
        assert judge_patch(real, changed(line["src_files"]), level=level).status == "resolved"
        idle = between({}, {"notes.txt": "x\n"}, "unified").text()
        assert judge_patch(real, idle, level=level).status == "unresolved"
