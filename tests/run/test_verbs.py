"""The verbs as people run them: to the end, stopped and started again, and on input that is
wrong."""

import collections
import gzip
import json
import math
import random
import signal
import time

import jax
import numpy as np
import pytest
from run import small

from jaxdeep.agent import record
from jaxdeep.metrics import declared, read_metrics
from jaxdeep.run import cli
from jaxdeep.train import checkpoint

OWN = f"{small.__file__}:Lucky"  # rewards that differ inside every group: a random model is never right


def steps(workdir):
    return [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]


def wait_for(workdir, step, process):
    """Until the metrics of a run have this step."""
    path, end = workdir / "metrics.jsonl", time.monotonic() + 900  # only where it hangs
    while time.monotonic() < end:
        if path.exists() and any(row["step"] >= step for row in read_metrics(path)):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {path}")


def without_time(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    timed = ("time/", "rollout/tool_seconds", "engine/", "tool/search/latency")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def ended_alike(parts, whole):
    """Metrics, rollouts and what was trained are the same to the last bit."""
    assert without_time(parts) == without_time(whole)
    for path in sorted((whole / "rollouts").glob("*")):
        pairs = zip(record.read(path), record.read(parts / "rollouts" / path.name), strict=True)
        assert all(a.pieces == b.pieces and a.rewards == b.rewards for a, b in pairs)
    ours, theirs = (
        checkpoint.Checkpoints(at, None).manager.restore(steps(at)[-1])["trained"]
        for at in (parts, whole)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def mixture(folder):
    """Flags for rows of conversations, of a made-up world and of a book, and a loss on other
    rows."""
    talks = [
        [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "so " * i}]
        for i in range(50)
    ]
    lines = [json.dumps({"messages": talk}) + "\n" for talk in talks]
    (folder / "talks.jsonl").write_text("".join(lines))
    (folder / "book.txt").write_text("A line of a chapter.\n\n" * 300)
    sources = (
        {"source": f"jsonl:{folder}/talks.jsonl", "weight": 2.0, "cap": 20},
        {"source": "demos:0", "weight": 1.0},
        {"source": f"text:{folder}/book.txt", "weight": 1.0},
    )
    return [
        "--config.data.source=",
        f"--config.data.sources={sources}",
        "--config.data.eval={'source': 'demos:1', 'rows': 8, 'every': 4}",
    ]


@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_a_run_killed_ends_as_if_never_stopped(verb, tmp_path):
    same = [f"--config={small.config(tmp_path, verb, steps=9)}", f"--config.env.taskset={OWN}"]
    same += mixture(tmp_path) if verb == "sft" else ["--config.rollout.exact=True"]
    done = small.run(verb, *same, f"--workdir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    process = small.start(verb, *same, f"--workdir={tmp_path / 'parts'}")
    wait_for(tmp_path / "parts", 3, process)
    process.kill()
    process.communicate()
    assert steps(tmp_path / "parts")[-1] < 9
    done = small.run(verb, *same, f"--workdir={tmp_path / 'parts'}")
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path / "parts") == list(range(1, 10))
    ended_alike(tmp_path / "parts", tmp_path / "whole")
    assert all(row["train/grad_norm"] > 0 for row in read_metrics(tmp_path / "whole/metrics.jsonl"))
    if verb == "sft":
        ours = without_time(tmp_path / "parts")
        assert all(ours[-1][f"data/{name}/rows"] for name in ("talks", "demos", "book"))
        assert [name for row in ours for name in row if not declared(name)] == []
        assert sum("eval/loss" in row for row in ours) == 3


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_twenty_kills_at_random_moments_change_nothing(verb, tmp_path):
    rng, last = random.Random(verb), 120
    same = [f"--config={small.config(tmp_path, verb, steps=last)}"]
    same += [f"--config.env.taskset={OWN}"]
    same += ["--config.rollout.exact=True"] if verb == "grpo" else []
    done = small.run(verb, *same, f"--workdir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    parts, reached = tmp_path / "parts", 0
    for _ in range(20):
        process = small.start(verb, *same, f"--workdir={parts}")
        wait_for(parts, reached + 1, process)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.communicate()
        kept = checkpoint.Checkpoints(parts, None).latest() or 0
        seen = steps(parts)[-1]
        # every second step is saved, while the next ones run
        assert seen - 4 <= kept and seen < last
        reached = seen
    done = small.run(verb, *same, f"--workdir={parts}")
    assert done.returncode == 0, done.stderr
    ended_alike(parts, tmp_path / "whole")


@pytest.mark.parametrize("ahead", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_grpo_interrupted_goes_on_without_gap_or_repeat(ahead, tmp_path):
    config, workdir = small.config(tmp_path, "grpo", steps=12), tmp_path / "run"
    same = [f"--config={config}", f"--workdir={workdir}", f"--config.grpo.ahead={ahead}"]
    same += [f"--config.env.taskset={OWN}"] if ahead else []
    process = small.start("grpo", *same)
    wait_for(workdir, 3, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command continues" in said
    assert "Traceback" not in said
    done = small.run("grpo", *same)
    assert done.returncode == 0, done.stderr
    assert steps(workdir) == list(range(1, 13))
    tasks = []
    for step in range(1, 13):
        seen = record.read(workdir / "rollouts" / f"{step:06d}.jsonl")
        assert len(seen) == 16 and all(t.sampled for t in seen)
        tasks += [t.task.id for t in seen[::4]]
    walks = [tasks[i : i + 16] for i in range(0, 48, 16)]  # each takes every task once
    assert all(len(set(walk)) == 16 for walk in walks) and walks[0] != walks[1]
    if ahead:
        rows = read_metrics(workdir / "metrics.jsonl")
        assert rows[0]["train/max_staleness"] == 0
        assert max(row["train/max_staleness"] for row in rows) == 1
        assert all(row.get("train/fresh_logp_diff", 0.0) <= 1e-4 for row in rows)
        assert max(row["train/max_logp_diff"] for row in rows) > 1e-4  # of the others
    again = small.run("grpo", *same)  # nothing is left to do
    assert again.returncode == 0 and steps(workdir) == list(range(1, 13))


def test_eval_and_chat_on_a_trained_run(tmp_path, capsys):
    sft = small.config(tmp_path, "sft", steps=2)
    config = small.config(tmp_path, "eval")
    flags = [f"--workdir={tmp_path / 'sft'}", "--config.optim.lr=0.1"]
    assert cli.main(["sft", f"--config={sft}", *flags]) == 0
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    assert cli.main(["eval", f"--config={config}", f"--workdir={base}"]) == 0
    capsys.readouterr()
    run = str(tmp_path / "sft")
    other = "--config.rollout.limits.max_turns=3"  # as in the file; rows of SFT have no such limit
    same = [f"--workdir={tuned}", other, f"--against={base}"]
    assert cli.main(["eval", run, *same]) == 0
    found = json.loads((tuned / "eval.json").read_text())
    assert found["n"] == 16 and found["mcnemar"]["n"] == 16 and found["failed"] == 0
    printed, told = capsys.readouterr()
    assert "McNemar p" in printed and "EM" in printed
    assert f"newest checkpoint of {run}: step 2" in told and "differs" not in told
    assert (tuned / "eval.html").read_text().count("<html") == 1
    first, second = (record.read(place / "eval.jsonl") for place in (base, tuned))
    assert [t.task.id for t in first] == [t.task.id for t in second]
    assert any(a.tokens != b.tokens for a, b in zip(first, second, strict=True))
    question = "--question=What is the capital of Chad?"
    start = f"--config.train.start={run}"
    for words in ([run], [str(tuned)], [f"--config={config}", start, "--config.env.k=2"]):
        assert cli.main(["chat", *words, question]) == 0
        printed, told = capsys.readouterr()
        assert printed.strip() and f"newest checkpoint of {run}: step 2" in told
    assert "differs from the run: env.k=2 (trained with 1)" in told
    assert cli.main(["chat", run, "--best", question]) == 2
    assert "has a score" in capsys.readouterr().err


WRONG = {
    "a missing file": ("sft", ["--config.data.source=jsonl:none.jsonl"], "none.jsonl"),
    "an empty corpus": ("grpo", ["--config.env.corpus={tmp}/empty"], "empty"),
    "an unknown algorithm": ("grpo", ["--config.grpo.algorithm=dr-grpo"], '"dr_grpo"'),
    "an unknown objective": ("grpo", ["--config.grpo.objective=ppo"], "'clip', 'gspo', 'cispo'"),
    "a coefficient below 0": ("grpo", ["--config.grpo.kl.coef=-1.0"], "kl.coef=-1.0"),
    "kl to what is trained": (
        "grpo",
        ["--config.grpo.algorithm=grpo", "--config.lora.rank=0"],
        "kl.coef=0.04",
    ),
    "ahead and several passes, nothing corrected": (
        "grpo",
        ["--config.grpo.ahead=1", "--config.grpo.passes=2"],
        "needs grpo.correction.kind=truncate or mask",
    ),
    "ahead of weights that are trained": (
        "grpo",
        ["--config.grpo.ahead=1", "--config.lora.rank=0"],
        "grpo.ahead=1 needs an adapter",
    ),
    "a workdir in a bucket": (
        "grpo",
        ["--workdir=gs://b/run"],
        "--config.train.checkpoints=gs://b/run",
    ),
    "bounds out of order": (
        "grpo",
        ["--config.grpo.curriculum.low=0.9", "--config.grpo.curriculum.high=0.5"],
        "curriculum.low=0.9",
    ),
    "a missing corpus": (
        "grpo",
        [
            "--config.env.taskset=search",
            "--config.env.questions={tmp}/good.jsonl",
            "--config.env.corpus={tmp}/nowhere",
        ],
        "there is no corpus at {tmp}/nowhere",
    ),
    "no answer": (
        "grpo",
        ["--config.env.taskset=search", "--config.env.questions={tmp}/bad.jsonl"],
        "bad.jsonl:2",
    ),
    "a group of one": ("grpo", ["--config.grpo.group=1"], "grpo.group=1"),
    "a typo": ("grpo", ["--config.grpo.promps=1"], '"grpo.prompts"'),
    "a typo in a section": ("grpo", ["--config.gpro.group=4"], "grpo.group"),
    "a wrong type": ("sft", ["--config.train.steps=many"], "expected int"),
    "a model that is not there": ("sft", ["--config.model.path={tmp}/no"], "{tmp}/no"),
    "no such run": ("grpo", ["--config.train.start={tmp}/no"], "there is no such run"),
    "too short": ("grpo", ["--config.batch.length=64"], "must hold a whole rollout"),
    "too many prompts": ("grpo", ["--config.grpo.prompts=99"], "99"),
    "weights that are not there": ("sft", ["--config.model.weights=load"], "model.safetensors"),
    "a mesh that does not fit": ("sft", ["--config.mesh.model=3"], "devices"),
    "int8 to be trained": ("sft", ["--config.model.quant=int8", "--config.lora.rank=0"], "quant"),
    "an unknown kernel": ("sft", ["--config.model.attention=flash"], "splash"),
    "a width that does not divide": ("sft", ["--config.batch.rows=3"], "3 rows"),
    "a batch that does not divide": ("grpo", ["--config.batch.rows=3"], "3 rows"),
    "a source without its number": ("sft", ["--config.data.source=demos:"], "demos:0"),
    "a bad split": ("grpo", ["--config.env.questions=all-of-it"], "none of 'train', 'dev'"),
    "a taskset that is not there": (
        "grpo",
        ["--config.env.taskset={tmp}/no.py:mine"],
        "there is no file {tmp}/no.py",
    ),
    "no taskset in it": ("grpo", ["--config.env.taskset=json:mine"], "mine"),
    "nothing to compare with": ("eval", ["--against={tmp}/no"], "there is no evaluation"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named_without_a_traceback(name, tmp_path, capsys):
    verb, flags, word = WRONG[name]
    (tmp_path / "empty").mkdir()
    rows = [{"question": "Who?", "answer": "I"}, {"question": "Why?", "answer": ""}]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "good.jsonl").write_text(json.dumps(rows[0]))
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    config = small.config(tmp_path, verb)
    status = cli.main([verb, f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags])
    said = capsys.readouterr().err
    assert status == 2 and word.format(tmp=tmp_path) in said
    assert "Traceback" not in said


def test_a_checkpoint_of_another_shape_is_refused_and_kept(tmp_path, capsys):
    config, workdir = small.config(tmp_path, "sft", steps=2), tmp_path / "run"
    assert cli.main(["sft", f"--config={config}", f"--workdir={workdir}"]) == 0
    before = (workdir / "metrics.jsonl").read_text()
    flags = [f"--config={config}", f"--workdir={workdir}", "--config.lora.rank=8"]
    assert cli.main(["sft", *flags]) == 2
    assert "lora.rank=4 there, 8 here" in capsys.readouterr().err
    assert (workdir / "metrics.jsonl").read_text() == before
    kept = json.loads((workdir / "config.json").read_text())["config"]
    assert kept["lora"]["rank"] == 4
    assert cli.main(["sft", f"--config={config}", f"--workdir={workdir}"]) == 0
    assert "step 2 of 2 is done: nothing is left to do" in capsys.readouterr().err


def test_a_run_says_where_it_goes_on_and_does_not_need_its_start(tmp_path, capsys):
    config, first, workdir = small.config(tmp_path, "sft", steps=2), tmp_path / "a", tmp_path / "b"
    same = ["sft", f"--config={config}", f"--workdir={workdir}", f"--config.train.start={first}"]
    best = ["--config.data.eval={'source': 'demos:1', 'rows': 8, 'every': 1}"]
    assert cli.main(["sft", f"--config={config}", f"--workdir={first}", *best]) == 0
    assert "goes on" not in capsys.readouterr().err
    assert cli.main([*same, "--config.train.best=True"]) == 0
    losses = [row["eval/loss"] for row in read_metrics(first / "metrics.jsonl")]
    best = 1 + losses.index(min(losses))  # each was saved, though save_every is 2
    assert f"best checkpoint of {first}: step {best}" in capsys.readouterr().err
    first.rename(tmp_path / "gone")
    assert cli.main([*same, "--config.train.steps=3", "--config.optim.lr=0.5"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert "goes on from step 2 of 3" in said
    assert (
        "changed since: optim.lr 0.001 -> 0.5, optim.steps 2 -> 3, train.best True -> False, "
        "train.steps 2 -> 3"
    ) in said
    assert steps(workdir) == [1, 2, 3]


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys):
    config, workdir = small.config(tmp_path, "sft", steps=3), tmp_path / "run"
    decay = "--config.optim.weight_decay=100.0"  # times the rate it is more than float32 holds
    same = ["sft", f"--config={config}", f"--workdir={workdir}", decay]
    huge = ["--config.optim.lr=3e38"]
    assert cli.main([*same, *huge]) == 2
    said = capsys.readouterr().err
    assert "step 1: the update made weights that are not finite" in said
    assert not checkpoint.exists(workdir)
    assert cli.main([*same, "--config.train.save_every=1"]) == 0  # nothing of it is in the way
    assert cli.main([*same, *huge, "--config.train.steps=9"]) == 2
    assert "step 4: the update" in capsys.readouterr().err
    assert cli.main([*same, "--config.train.steps=4"]) == 0
    assert "goes on from step 3 of 4" in capsys.readouterr().err


def test_sampler_and_trainer_that_disagree_stop_the_run(tmp_path, capsys):
    config, workdir = small.config(tmp_path, "grpo"), tmp_path / "run"
    same = [f"--config={config}", f"--workdir={workdir}", f"--config.env.taskset={OWN}"]
    assert cli.main(["grpo", *same, "--config.grpo.tolerance=0.0"]) == 2
    said = capsys.readouterr().err
    assert "differ by up to" in said and "grpo.tolerance=0" in said
    assert steps(workdir) == []
    assert cli.main(["grpo", *same]) == 0  # within 1e-4 nats it runs
    rows = read_metrics(workdir / "metrics.jsonl")
    assert len(rows) == 4 and all(row["train/max_logp_diff"] <= 1e-4 for row in rows)
    assert all(row["train/grad_norm"] > 0 and row["train/clipped"] == 0 for row in rows)
    for row in rows:  # what the pages show of each token is what the step computed of it
        name = f"{row['step']:06d}"
        seen = record.read(workdir / "rollouts" / f"{name}.jsonl")
        gaps = [gap for _, gap in record.with_gaps(seen, workdir / "gaps" / f"{name}.npy")]
        assert [t.advantage is None for t in seen] == [gap is None for gap in gaps]
        most = max(abs(gap).max() for gap in gaps if gap is not None)
        assert most == pytest.approx(row["train/max_logp_diff"], rel=1e-2, abs=1e-7)
    assert cli.main(["view", str(workdir), "--steps=2:3"]) == 0
    assert "index.html" in capsys.readouterr().out
    assert (workdir / "view/0/000003/0.js").exists() and not (workdir / "view/0/000004").exists()


def test_metrics_say_what_happened(tmp_path):
    config, workdir = small.config(tmp_path, "grpo", steps=2), tmp_path / "run"
    dev = {"taskset": "facts", "corpus": "dev", "questions": "dev", "k": 1, "count": 3}
    dev["system"] = "Go."  # the default leaves no room in 224 tokens
    flags = [f"--config.dev.{name}={value}" for name, value in dev.items()]
    flags += [f"--config={config}", f"--workdir={workdir}", "--config.grpo.eval_every=2"]
    flags += [f"--config.env.taskset={OWN}"]
    assert cli.main(["grpo", *flags]) == 0
    before, first, row = read_metrics(workdir / "metrics.jsonl")
    assert before["step"] == 0 and before["dev/em"] >= 0 and "reward/mean" not in before
    assert [name for name in row if not declared(name)] == []
    assert "dev/em" not in first and row["dev/em"] >= 0
    stops = sum(value for name, value in row.items() if name.startswith("rollout/stop/"))
    assert math.isclose(stops, 1) and row["rollout/turns"] >= 1
    assert {"reward/mean", "reward/answer", "time/rollout", "grpo/flat_groups"} <= set(row)
    assert row["time/total"] >= row["time/rollout"] >= row["time/rollout/policy"] > 0
    with gzip.open(workdir / "trace.json.gz", "rt") as file:
        kinds = collections.Counter(event["cat"] for event in json.load(file))
    assert kinds["rollout"] == 2 * (1 + 16) and kinds["reward"] >= 2 * 16 <= kinds["policy"]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["config"]["grpo"]["group"] == 4 and "jax" in saved["versions"]


def test_a_run_that_learns_nothing_ends_with_a_status_that_says_so(tmp_path, capsys):
    config, workdir = small.config(tmp_path, "grpo", steps=5), tmp_path / "run"
    assert cli.main(["grpo", f"--config={config}", f"--workdir={workdir}"]) == 2
    said = capsys.readouterr().err
    assert "step 5: for 5 steps the rewards within every group are equal (they are 0)" in said
    assert "error: none of the 5 steps updated the policy" in said
    assert "env: 4 of 16 tasks tried" in said
    assert steps(workdir) == [1, 2, 3, 4, 5]


def test_a_run_that_collapses_goes_back_and_recovers(tmp_path, capsys):
    config, workdir = small.config(tmp_path, "grpo", steps=16), tmp_path / "run"
    flags = [f"--config={config}", f"--workdir={workdir}", "--config.train.keep=4"]
    flags += [f"--config.env.taskset={small.__file__}:Collapsing"]
    guard = {"action": "rollback", "window": 2, "patience": 2, "flat": 0.0}
    guarded = [f"--config.guard.{name}={value}" for name, value in guard.items()]
    assert cli.main(["grpo", *flags, *guarded]) == 0
    said = capsys.readouterr().err
    assert "reward/mean is" in said and "set back to step" in said
    (back,) = json.loads((workdir / "guard.json").read_text())
    assert back["to"] < 7 < back["step"]  # steps 7 to 9 had no reward
    rows, lost = (
        read_metrics(path / "metrics.jsonl") for path in (workdir, workdir / "collapsed-1")
    )
    assert steps(workdir) == list(range(1, 17))
    assert [row["step"] for row in lost] == list(range(1, back["step"] + 1))
    at = back["to"]  # what is after it has half the learning rate, and another draw
    assert rows[at]["train/lr"] == pytest.approx(lost[at]["train/lr"] / 2)
    assert rows[at]["train/entropy"] != lost[at]["train/entropy"] and rows[:at] == lost[:at]
    kept = {int(path.stem) for path in (workdir / "rollouts").iterdir()}
    assert kept == set(range(1, 17))
    assert rows[-1]["reward/mean"] > 1


@pytest.mark.parametrize("verb", [pytest.param("sft", marks=pytest.mark.slow), "grpo"])
def test_sigterm_saves_and_the_run_goes_on(verb, tmp_path):
    config, workdir = small.config(tmp_path, verb, steps=400), tmp_path / "run"
    same = [f"--config={config}", f"--config.env.taskset={OWN}", f"--workdir={workdir}"]
    process = small.start(verb, *same, "--config.train.save_every=1000")
    wait_for(workdir, 3, process)
    process.terminate()
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 0 and "Traceback" not in said
    done = steps(workdir)[-1]
    assert checkpoint.Checkpoints(workdir, None).latest() == done < 400
