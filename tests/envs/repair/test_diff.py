"""Patches: round trips of random files, agreement with git, places that are never guessed."""

import random
import subprocess

import pytest

from jaxdeep.envs.repair import diff
from jaxdeep.envs.repair.diff import DiffError, between, parse

LINES = (
    "x = 1", "x = 1", "", "", "    return x", "\treturn x", "\x0cpage", "a\x85b", "a\u2028b",
    "<<<<<<< HEAD", "=======", ">>>>>>> other", "<<<<<<< SEARCH", ">>>>>>> REPLACE", "======",
    "--- a/x", "+++ b/x", "@@ -1 +1 @@", "-- ", "\\ No newline", "\udcff\udcfe", "lone\rreturn", "é",
    "diff --git a/x b/x", "trailing  ", "```", "def f(a, b):", "# comment",
)  # fmt: skip
PATHS = ("a.py", "a/b.py", "src/a b.py", 'q"uote.py', "é.py", "b/c.py", "Makefile", "src/d.txt")


def random_text(rng):
    ending = rng.choice(["\n", "\n", "\r\n", None])
    lines = [rng.choice(LINES) for _ in range(rng.choice([0, 1, 2, 5, 30]))]
    text = "".join(line + (ending or rng.choice(["\n", "\r\n"])) for line in lines)
    return text.rstrip("\r\n") if rng.random() < 0.3 else text


def changed(rng, text):
    lines = diff.split_lines(text)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(lines))
        new = [rng.choice(LINES) + rng.choice(["\n", "\r\n"]) for _ in range(rng.randint(0, 3))]
        lines[at : at + rng.randint(0, 3)] = new
    text = "".join(lines)
    return text.rstrip("\r\n") if rng.random() < 0.2 else text


def random_pair(rng, form):
    before, after = {}, {}
    for path in rng.sample(PATHS, rng.randint(1, 4)):
        kind = rng.choice(["change", "change", "change", "make", "delete", "keep"])
        text = random_text(rng)
        before[path] = None if kind == "make" else text
        after[path] = {"make": text, "delete": None, "keep": text}.get(kind, changed(rng, text))
        if form == "blocks" and kind == "delete":
            after[path] = before[path]
    return before, after


@pytest.mark.parametrize("form", ["blocks", "unified"])
def test_a_patch_between_two_sets_of_files_makes_one_of_the_other(form):
    rng = random.Random(0)
    changes = 0
    for _ in range(1000):
        before, after = random_pair(rng, form)
        patch = between(before, after, form)
        assert patch.apply(before) == after
        if before != after:
            changes += 1
            assert parse(patch.text(), form) == patch
            assert parse(f"Some words.\n\n{patch.text()}\nDone.\n", form).apply(before) == after
    assert changes > 800


def write(folder, files):
    for path, text in files.items():
        if text is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(text.encode("utf-8", "surrogateescape"))


def test_git_applies_what_we_write_and_we_apply_what_git_writes(tmp_path):
    # each pair has a folder of its own in one repository, so that git is started a few times only
    rng, pairs = random.Random(1), {}
    for n in range(150):
        before, after = random_pair(rng, "unified")
        pairs |= {f"{n}/{path}": (before[path], after[path]) for path in before}
    before = {path: pair[0] for path, pair in pairs.items() if pair[0] is not None}
    after = {path: pair[1] for path, pair in pairs.items() if pair[1] is not None}

    def git(*args, text=None):
        command = ["git", "-c", "core.autocrlf=false", "-c", "core.safecrlf=false", *args]
        done = subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, check=True)
        return done.stdout

    write(tmp_path, before)
    git("init", "-q")
    git("add", "-A")
    ours = between(before, after, "unified")
    git("apply", "--index", "-", text=ours.text().encode("utf-8", "surrogateescape"))
    names = git("ls-files", "-z").decode().split("\0")[:-1]
    found = {n: (tmp_path / n).read_bytes().decode("utf-8", "surrogateescape") for n in names}
    assert found == after
    git("apply", "-R", "--index", "-", text=ours.text().encode("utf-8", "surrogateescape"))
    git("-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "before")
    git("apply", "--index", "-", text=ours.text().encode("utf-8", "surrogateescape"))
    for flags in (["-U3"], ["-U1"], ["-M"], ["-U0"]):
        theirs = git("diff", "--text", "--cached", "HEAD", *flags)
        patch = parse(theirs.decode("utf-8", "surrogateescape"), "unified")
        result = patch.apply(before)
        assert {path: text for path, text in result.items() if text is not None} == after
        assert parse(patch.text(), "unified") == patch


def blocks(search, replace, path="a.py", marks=7):
    return f"{path}\n{'<' * marks} SEARCH\n{search}{'=' * marks}\n{replace}{'>' * marks} REPLACE\n"


def fails(code, text, files, form="blocks", **options):
    with pytest.raises(DiffError) as caught:
        parse(text, form).apply(files, **options)
    assert caught.value.code == code, caught.value
    return caught.value


def old_rule_blocks(text):
    """How the prototype read blocks: pieces between blank lines, each with all three marks."""
    return [p for p in text.split("\n\n") if all(m in p for m in ("SEARCH", "=====", "REPLACE"))]


def test_blank_lines_are_content_of_a_block():
    search, text = "a = 1\n\nb = 2\n", "a = 1\n\nb = 2\n\nc = 3\n"
    patch = blocks(search, "a = 1\n\nb = 4\n")
    assert parse(patch, "blocks").apply({"a.py": text}) == {"a.py": "a = 1\n\nb = 4\n\nc = 3\n"}
    assert old_rule_blocks(patch) == []  # where nothing was read, nothing was compared: full reward


def test_a_repeated_block_is_never_placed():
    rng = random.Random(2)
    for _ in range(200):
        block = "".join(f"    {rng.choice('abc')} = {rng.randint(0, 9)}\n" for _ in range(3))
        other = "".join(f"def f{n}():\n    pass\n" for n in range(rng.randint(1, 4)))
        text = other + block + other + block
        error = fails("ambiguous", blocks(block, "    z = 0\n"), {"a.py": text})
        starts = [i for i in range(len(text)) if text.startswith(block, i)]
        assert error.lines == tuple(text[:i].count("\n") + 1 for i in starts)
        assert text.replace(block, "    z = 0\n").count("    z = 0\n") == 2  # the old rule: all
        hunk = "".join("-" + line + "\n" for line in block.splitlines())
        patch = f"--- a/a.py\n+++ b/a.py\n@@ -999,3 +999,1 @@\n{hunk}+    z = 0\n"
        fails("ambiguous", patch, {"a.py": text}, "unified")


@pytest.mark.parametrize(
    ("text", "search", "replace", "after"),
    [
        ("a\r\nb\r\nc\r\n", "b\n", "x\ny\n", "a\r\nx\r\ny\r\nc\r\n"),  # line ending
        ("a\nb\nc\n", "b\r\n", "x\r\n", "a\nx\nc\n"),
        ("a\nb  \nc\n", "b\n", "x\n", "a\nx\nc\n"),  # trailing white space
        (
            "if a:\n    b\n\n    c\n",
            "b\n\nc\n",
            "x\n\ny\n",
            "if a:\n    x\n\n    y\n",
        ),  # indentation
        ("a\nb\n", "    a\n    b\n", "    x\n      y\n", "x\n  y\n"),
        ("\ta\n\tb\n", "a\nb\n", "x\n", "\tx\n"),
        ("a\nb", "b\n", "x\ny\n", "a\nx\ny"),  # no final line feed before, none after
        ("a\r\nb", "b\n", "x\ny\n", "a\r\nx\r\ny"),
        ("a\nb", "b\n", "", "a\n"),
        ("x\rb\nc\n", "x\rb\n", "y\n", "y\nc\n"),  # a lone carriage return is content
        ("a\n  b\nb\n", "b\n", "x\n", "a\n  b\nx\n"),  # the first level that fits decides
        ("a\x0cb\nc\n", "a\x0cb\n", "x\n", "x\nc\n"),
        ("a\n<<<<<<< HEAD\n", "<<<<<<< HEAD\n", "b\n", "a\nb\n"),
        ("b\n", "b\n", "x\n\\ No newline at end of file\n", "x"),
    ],
)
def test_a_search_fits_exactly_or_but_for_white_space(text, search, replace, after):
    assert parse(blocks(search, replace), "blocks").apply({"a.py": text}) == {"a.py": after}


@pytest.mark.parametrize(
    ("code", "patch", "files"),
    [
        ("unparsable", "no patch", {"a.py": "a\n"}),
        ("unparsable", "", {"a.py": "a\n"}),
        ("unparsable", blocks("a\n", "b\n").removesuffix(">>>>>>> REPLACE\n"), {"a.py": "a\n"}),
        ("unparsable", blocks("a\n=======\n", "b\n"), {"a.py": "a\n=======\n"}),
        ("unparsable", blocks("a\n", "b\n", marks=4), {"a.py": "a\n"}),
        ("unparsable", blocks("a\n", "b\n", "Change it so:"), {"a.py": "a\n", "b.py": ""}),
        ("not_found", blocks("b\n", "c\n"), {"a.py": "a\n"}),
        ("not_found", blocks("a\n", "c\n", "c.py"), {"a.py": "a\n"}),
        ("not_found", blocks("a\n", "c\n", "c.py"), {"a.py": "a\n", "c.py": None}),
        ("not_found", blocks("\ta\n    b\n", "c\n"), {"a.py": "a\nb\n"}),  # two indentations
        ("not_found", blocks("    a\n    b\n", "x\n"), {"a.py": "a\nb\n"}),
        ("ambiguous", blocks("a\n", "c\n"), {"a.py": "  a\n    a\n"}),
        ("no_change", blocks("a\n", "a\n"), {"a.py": "a\n"}),
        ("no_change", blocks("a\r\n", "a\n"), {"a.py": "a\n"}),
        ("conflict", blocks("", "b\n"), {"a.py": "a\n"}),
        ("conflict", blocks("", "b\n", "a.py/b.py"), {"a.py": "a\n"}),
        ("outside", blocks("", "b\n", "../b.py"), {"a.py": "a\n"}),
        ("outside", blocks("", "b\n", "/etc/b.py"), {"a.py": "a\n"}),
        ("outside", blocks("", "b\n", "x/.GIT/hooks/b"), {"a.py": "a\n"}),
        ("outside", blocks("", "b\n", "link/b.py"), {"a.py": "a\n"}),
    ],
)
def test_a_block_that_cannot_be_placed_says_why(code, patch, files):
    fails(code, patch, files, symlinks=frozenset({"link"}))


def test_all_blocks_or_none_and_each_after_the_one_before():
    files = {"a.py": "a\nb\n"}
    two = blocks("a\n", "x\n") + blocks("x\nb\n", "y\n")
    assert parse(two, "blocks").apply(files) == {"a.py": "y\n"}
    fails("not_found", blocks("a\n", "x\n") + blocks("a\n", "y\n"), files)
    assert files == {"a.py": "a\nb\n"}


@pytest.mark.parametrize(
    "line",
    ["src/a.py", "`src/a.py`", "**src/a.py**", "### src/a.py", "File: src/a.py", "src/a.py:",
     "a/src/a.py", "./src/a.py", '"src/a.py"', "In `src/a.py`:", "src/a.py\n```python",
     "```python\nsrc/a.py", "src/a.py\n\n~~~"],
)  # fmt: skip
def test_the_path_is_read_whatever_markdown_it_wears(line):
    files = {"src/a.py": "a\n", "src/b.py": "a\n"}
    done = parse(blocks("a\n", "b\n", line), "blocks").apply(files)
    assert done == {"src/a.py": "b\n", "src/b.py": "a\n"}


@pytest.mark.parametrize("line", ["", "Here is the fix:", "Solution", "<answer>", "```"])
def test_one_file_needs_no_path(line):
    assert parse(blocks("a\n", "b\n", line), "blocks").apply({"x.py": "a\n"}) == {"x.py": "b\n"}


FILE = "".join(f"line {n}\n" for n in range(1, 21))


def unified(hunks, old="a/a.py", new="b/a.py"):
    return f"--- {old}\n+++ {new}\n{hunks}"


@pytest.mark.parametrize(
    ("hunk", "old", "new"),
    [
        ("@@ -9,9 +3,2 @@\n line 9\n-line 10\n+ten\n line 11\n", "line 10\n", "ten\n"),  # counts
        ("@@ -2,3 +2,3 @@\n line 9\n-line 10\n+ten\n line 11\n", "line 10\n", "ten\n"),  # place
        ("@@ @@\n line 9\n-line 10\n+ten\n", "line 10\n", "ten\n"),
        ("@@ -9,3 +9,3 @@\n lime 9\n-line 10\n+ten\n line 11\n", "line 10\n", "ten\n"),  # outer
        ("@@ -8,4 +8,4 @@\n x\n lime 9\n-line 10\n+ten\n line 11\n", "line 10\n", "ten\n"),
        ("@@ -20,1 +20,2 @@\n line 20\n+end\n", "line 20\n", "line 20\nend\n"),
        ("@@ -1,2 +1,1 @@\n line 1\n-line 2\n\n", "line 2\n", ""),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_hunk_with_wrong_numbers_is_placed_where_its_lines_are(hunk, old, new, ending):
    before, after = (
        text.replace("\n", ending)
        for text in (FILE, ("\n" + FILE).replace("\n" + old, "\n" + new, 1)[1:])
    )
    assert parse(unified(hunk), "unified").apply({"a.py": before}) == {"a.py": after}


def test_lines_without_context_go_where_the_header_says_as_they_are():
    for count in ("0,0", "1,3"):
        patch = parse(unified(f"@@ -{count} +1 @@\n+top\n"), "unified")
        assert patch.apply({"a.py": "a\r\n"}) == {"a.py": "top\na\r\n"}
    patch = parse(unified("@@ -1,0 +2 @@\n+end"), "unified")
    assert patch.apply({"a.py": "a"}) == {"a.py": "a\nend"}


def test_a_blank_line_is_blank_context_and_a_missing_final_newline_stays_missing():
    hunk = "@@ -1,3 +1,4 @@\n a\n\n-b\n+c\n+d\n"
    assert parse(unified(hunk), "unified").apply({"a.py": "a\n\nb"}) == {"a.py": "a\n\nc\nd"}
    hunk = "@@ -1,2 +1,3 @@\n a\n b\n+c\n"
    assert parse(unified(hunk), "unified").apply({"a.py": "a\nb"}) == {"a.py": "a\nb\nc"}


@pytest.mark.parametrize(
    ("code", "patch"),
    [
        ("unparsable", "@@ -1 +1 @@\n-line 1\n+x\n"),
        ("unparsable", unified("")),
        ("unparsable", unified("@@@ -1 -1 +1 @@@\n")),
        ("unparsable", "diff --git a/a.py b/a.py\nindex 123..456 100644\n"),
        ("not_found", unified("@@ -1 +1 @@\n-line 0\n+x\n")),
        ("not_found", unified("@@ -1 +1 @@\n-x\n+y\n", "a/b.py", "b/b.py")),
        ("not_found", unified("@@ -90,0 +91 @@\n+x\n")),
        ("ambiguous", unified("@@\n+x\n")),
        ("no_change", unified("@@ -1 +1 @@\n-line 1\n+line 1\n")),
        ("conflict", unified("@@ -0,0 +1 @@\n+x\n", "/dev/null")),
        ("conflict", unified("@@ -1 +0,0 @@\n-line 1\n", new="/dev/null")),
        ("conflict", unified("@@ -1 +1 @@\n-line 1\n+x\n@@ -1 +1 @@\n-line 1\n+y\n")),
        ("conflict", "diff --git a/a.py b/c.py\nrename from a.py\nrename to c.py\n"),
        ("outside", unified("@@ -0,0 +1 @@\n+x\n", "/dev/null", "b/../x")),
        ("outside", unified("@@ -0,0 +1 @@\n+x\n", "/dev/null", "b/.git/hooks/x")),
        ("outside", unified("@@ -0,0 +1 @@\n+x\n", "/dev/null", "b/link/x")),
        ("outside", "diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+/etc\n"),
        ("binary", "diff --git a/a.py b/a.py\nindex 1..2 100644\nBinary files a/a.py and b/a.py differ\n"),
    ],
)  # fmt: skip
def test_a_diff_that_cannot_be_applied_says_why(code, patch):
    files = {"a.py": FILE, "c.py": "c\n"}
    fails(code, patch, files, "unified", symlinks=frozenset({"link"}))


def test_headers_of_git_and_of_mails_are_read():
    patch = (
        "From: someone\nSubject: [PATCH] a fix\n\n---\n a.py | 2 +-\n\n"
        "diff --git a/a.py b/b.py\nsimilarity index 90%\nrename from a.py\nrename to b.py\n"
        "index 1234567..89abcde 100755\n--- a/a.py\n+++ b/b.py\n@@ -1,2 +1,2 @@ def f():\n-a\n+b\n c\n"
        'diff --git "a/t\\303\\251.py" "b/t\\303\\251.py"\ndeleted file mode 100644\n'
        "diff --git a/s p.py b/s p.py\nold mode 100644\nnew mode 100755\n"
        "-- \n2.39.5\n"
    )
    files = {"a.py": "a\nc\n", "té.py": "", "s p.py": "s\n"}
    parsed = parse(patch, "unified")
    done = parsed.apply(files)
    assert {k: v for k, v in done.items() if v is not None} == {"b.py": "b\nc\n", "s p.py": "s\n"}
    assert parsed.paths() == ["a.py", "b.py", "té.py", "s p.py"]
    assert parse(parsed.text(), "unified") == parsed


def test_a_deleted_line_that_looks_like_a_header_is_a_deleted_line():
    text = "-- a comment\nselect 1\n"
    patch = between({"a.sql": text}, {"a.sql": "++ b\nselect 1\n"}, "unified")
    assert "--- a comment\n+++ b\n" in patch.text()
    assert parse(patch.text(), "unified") == patch
