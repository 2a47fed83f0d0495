"""Checkpoints: which are kept, and what becomes of them when the disk does not play along."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from jaxdeep.errors import CheckpointError, ConfigError, JaxdeepError
from jaxdeep.model import lora
from jaxdeep.model.identity import Base
from jaxdeep.parallel import mesh as meshes
from jaxdeep.train import checkpoint, optim
from jaxdeep.train import state as states
from jaxdeep.workdir import lock_workdir

OPTIM = optim.OptimConfig(lr=1e-2, steps=10)
SFT = states.Spec(tiny.CFG, tiny.SPEC, OPTIM)


def fresh(spec=SFT):
    return states.init(jax.random.key(0), spec, tiny.one_device())


def test_a_checkpoint_of_another_shape_is_refused_by_what_differs(tmp_path):
    state = fresh()
    saved = checkpoint.Checkpoints(tmp_path, SFT)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        saved.restore(state)
    saved.save(1, state, {})
    saved.close()
    other = states.Spec(tiny.CFG, lora.LoraConfig(8, 8.0, ("wq", "wv")), OPTIM)
    with pytest.raises(CheckpointError, match=r"rank=4 there, 8 here.*targets=.*wo"):
        checkpoint.Checkpoints(tmp_path, other).restore(fresh(other))
    louder = dataclasses.replace(SFT, lora=dataclasses.replace(SFT.lora, alpha=64.0))
    with pytest.raises(CheckpointError, match=r"another shape: alpha=\S+ there, 64.0 here"):
        checkpoint.Checkpoints(tmp_path, louder).trained(state.trained)


def trained_over(tmp_path, spec, base):
    """The folder of a run with one checkpoint, and its state."""
    state = states.init(jax.random.key(3), spec, tiny.one_device(), tiny.adapter())
    saved = checkpoint.Checkpoints(tmp_path, spec, base=base)
    saved.save(1, state, {"read": 1})
    saved.close()
    return state


def test_an_adapter_is_read_with_the_scale_and_the_base_it_was_trained_with(tmp_path):
    base = Base("owner/base", "aaaa-bbbb")
    state = trained_over(tmp_path / "run", SFT, base)
    mesh = meshes.make_mesh(meshes.MeshConfig(data=4, model=2))
    adapter = checkpoint.load_adapter(tmp_path / "run", tiny.CFG, mesh, base)
    assert adapter.config == tiny.SPEC and adapter.base == base
    jax.tree.map(np.testing.assert_array_equal, adapter.factors, state.trained)
    shardings = jax.tree.map(lambda x: x.sharding, adapter.factors)
    assert shardings == states.shardings(SFT, mesh).trained
    with pytest.raises(CheckpointError, match="belongs to the base owner/base"):
        checkpoint.load_adapter(tmp_path / "run", tiny.CFG, mesh, Base("other", "cccc"))
    wider = dataclasses.replace(tiny.CFG, D=64)
    with pytest.raises(CheckpointError, match="D=32 there, 64 here"):
        checkpoint.load_adapter(tmp_path / "run", wider, mesh)
    full = states.Spec(tiny.CFG, lora.LoraConfig(0, 1.0), OPTIM)
    saved = checkpoint.Checkpoints(tmp_path / "full", full)
    saved.save(1, fresh(full), {})
    saved.close()
    with pytest.raises(CheckpointError, match=r"holds whole weights \(lora.rank=0\)"):
        checkpoint.load_adapter(tmp_path / "full", tiny.CFG, mesh)


def test_a_run_over_other_frozen_adapters_is_refused(tmp_path):
    base = Base("owner/base", "aaaa-bbbb")
    over = lora.base_over(base, (tiny.scaled_adapter(),))
    state = trained_over(tmp_path, SFT, over)
    assert checkpoint.Checkpoints(tmp_path, SFT, base=over).restore(state)[0] == 1
    with pytest.raises(CheckpointError, match=r"trained over .*set lora.under"):
        checkpoint.Checkpoints(tmp_path, SFT, base=base).restore(state)


def test_a_checkpoint_that_knows_nothing_of_frozen_adapters_is_read(tmp_path):
    """As they were written before `lora.under` was a setting."""
    state = trained_over(tmp_path, SFT, None)
    (file,) = (tmp_path / "checkpoints" / "1" / "about").glob("metadata")
    about = json.loads(file.read_text())
    assert about["lora"].pop("under") == []
    file.write_text(json.dumps(about))
    step, back, position = checkpoint.Checkpoints(tmp_path, SFT).restore(fresh())
    assert (step, position) == (1, {"read": 1})
    jax.tree.map(np.testing.assert_array_equal, back, state)
    adapter = checkpoint.load_adapter(tmp_path, tiny.CFG, tiny.one_device())
    assert adapter.config == tiny.SPEC


def test_a_bucket_that_cannot_be_reached_is_named_with_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs://bucket/run cannot be reached.*gcsfs"):
        checkpoint.Checkpoints("gs://bucket/run", SFT)


def test_only_the_last_checkpoints_are_kept_and_a_torn_one_is_not_taken(tmp_path):
    state = fresh()
    saved = checkpoint.Checkpoints(tmp_path, SFT, keep=2)
    for step in (1, 2, 3):
        saved.save(step, state, {})
    saved.close()
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"2", "3"}
    torn = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    torn.mkdir()
    assert checkpoint.Checkpoints(tmp_path, SFT).latest() == 3


def spoiled(path, how):
    """Damage the files that hold arrays below `path`, or what describes them. Which bytes of a file
    are in use differs from run to run, so no file is spared."""
    if how == "not JSON":
        next(path.glob("about/*")).write_text("{")
        return
    files = [file for file in path.rglob("d/*") if file.is_file()]
    assert files
    for file in files:
        if how == "cut":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            file.unlink()


@pytest.mark.parametrize("how", ["cut", "gone", "not JSON"])
def test_a_damaged_checkpoint_is_passed_over_and_put_aside(how, tmp_path, capsys):
    state = fresh()
    other = state.replace(step=state.step + 7)
    saved = checkpoint.Checkpoints(tmp_path, SFT)
    saved.save(1, state, {"read": 1})
    saved.save(2, other, {"read": 2})
    saved.wait()
    spoiled(tmp_path / "checkpoints" / "2", how)
    step, back, position = checkpoint.Checkpoints(tmp_path, SFT).restore(state)
    assert (step, position) == (1, {"read": 1})
    jax.tree.map(np.testing.assert_array_equal, back, state)
    assert "checkpoint 2 cannot be read" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints-torn").iterdir()] == ["2"]
    again = checkpoint.Checkpoints(tmp_path, SFT)
    again.save(2, other, {"read": 2})
    again.close()
    assert again.restore(state)[2] == {"read": 2}
    spoiled(tmp_path / "checkpoints" / "1", how)
    spoiled(tmp_path / "checkpoints" / "2", how)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        checkpoint.Checkpoints(tmp_path, SFT).restore(state)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}


def test_the_best_is_kept_beside_the_last(tmp_path):
    state = fresh()
    saved = checkpoint.Checkpoints(tmp_path, SFT, keep=2, run={"commit": "abc"})
    for step, score in enumerate((0.1, 0.9, None, 0.3, None), 1):
        saved.save(step, state.replace(step=state.step * 0 + step), {}, score=score)
    saved.wait()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "5"}
    assert saved.best() == 2 and saved.latest() == 5
    assert checkpoint.about(tmp_path)["run"] == {"commit": "abc"}
    assert saved.trained(state.trained, 2)[0] == 2
    with pytest.raises(CheckpointError, match="no step 3, only 2, 4, 5"):
        saved.trained(state.trained, 3)


def test_no_best_without_a_score(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, SFT)
    saved.save(1, fresh(), {})
    saved.wait()
    with pytest.raises(CheckpointError, match=r"has a score.*grpo.eval_every.*data.eval"):
        saved.best()


def tree(path):
    """Every file below a folder, with its content."""
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("how", ["cut", "gone", "not JSON", "no description", "half a description"])
def test_a_reader_passes_over_what_is_damaged_and_changes_nothing(how, tmp_path, capsys):
    state = fresh()
    saved = checkpoint.Checkpoints(tmp_path, SFT)
    saved.save(1, state, {"read": 1})
    saved.save(2, state.replace(step=state.step + 1), {"read": 2})
    saved.close()
    about = tmp_path / "checkpoints" / "2" / "about"
    if how == "no description":
        shutil.rmtree(about)
    elif how == "half a description":
        (about / "metadata").write_text((about / "metadata").read_text()[:40])
    else:
        spoiled(tmp_path / "checkpoints" / "2", how)
    before = tree(tmp_path)
    assert checkpoint.about(tmp_path)["position"] in ({"read": 1}, {"read": 2})
    reader = checkpoint.Checkpoints(tmp_path, SFT, read_only=True)
    step, back = reader.trained(state.trained)
    reader.close()
    assert step == 1 and tree(tmp_path) == before
    jax.tree.map(np.testing.assert_array_equal, back, state.trained)
    said = capsys.readouterr().err
    assert said.startswith("checkpoint 2 cannot be read (") and said.endswith("step 1 is taken\n")
    assert checkpoint.Checkpoints(tmp_path, SFT).restore(state)[0] == 1  # its own run goes on, too
    assert (tmp_path / "checkpoints-torn" / "2").is_dir()


def test_a_reader_makes_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.Checkpoints(tmp_path / "run", SFT, read_only=True).trained(fresh().trained)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["trained", "opt"])
def test_a_state_that_is_not_finite_is_none_to_go_on_from(part, tmp_path, capsys):
    """As an earlier version could leave one."""
    state = fresh()
    saved = checkpoint.Checkpoints(tmp_path, SFT)
    saved.save(1, state, {"read": 1})
    spoil = jax.tree.map(lambda x: x * np.nan if x.dtype.kind == "f" else x, getattr(state, part))
    saved.save(2, state.replace(**{part: spoil}), {"read": 2})
    saved.wait()
    assert checkpoint.Checkpoints(tmp_path, SFT).restore(state)[0] == 1
    assert "(it holds numbers that are not finite)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "muon"}, "optim.name=adamw there, muon here"),
        ({"weight_decay": 0.1}, "optim.weight_decay=0.0 there, 0.1 here"),
    ],
)
def test_another_optimizer_is_refused_in_a_sentence_and_nothing_is_moved(change, says, tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, SFT)
    saved.save(1, fresh(), {})
    saved.close()
    other = dataclasses.replace(SFT, optim=dataclasses.replace(OPTIM, lr=0.5, **change))
    with pytest.raises(CheckpointError) as refused:
        checkpoint.Checkpoints(tmp_path, other).restore(fresh(other))
    said = str(refused.value)
    assert says in said and "optim.lr" not in said and len(said.splitlines()) == 1
    assert checkpoint.Checkpoints(tmp_path, SFT).restore(fresh())[0] == 1
    reader = checkpoint.Checkpoints(tmp_path, other, read_only=True)
    assert reader.trained(fresh().trained)[0] == 1  # who only samples has no optimizer


def test_what_orbax_says_of_damage_is_one_line(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, SFT)
    saved.save(1, fresh(), {})
    saved.close()
    spoiled(tmp_path / "checkpoints" / "1", "gone")
    with pytest.raises(CheckpointError) as refused:
        checkpoint.Checkpoints(tmp_path, SFT).restore(fresh())
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 500


def test_two_workdirs_do_not_share_a_folder_of_checkpoints(tmp_path):
    shared = str(tmp_path / "shared")
    with checkpoint.hold(shared, tmp_path / "a"):
        with (
            pytest.raises(
                JaxdeepError, match=r"shared is in use.*choose another train.checkpoints"
            ),
            checkpoint.hold(shared, tmp_path / "b"),
        ):
            pass
        with lock_workdir(tmp_path / "a"), checkpoint.hold("", tmp_path / "a"):
            pass
    with lock_workdir(tmp_path / "a"), checkpoint.hold(str(tmp_path / "a"), tmp_path / "a"):
        pass  # the workdir by another name
    with checkpoint.hold(shared, tmp_path / "b"):
        pass


def test_a_bucket_names_the_run_that_uses_it_until_it_ends(tmp_path, monkeypatch):
    """On a local folder in place of the bucket: files are all that is needed of it."""
    bucket = "gs://bucket/run"
    monkeypatch.setattr(
        checkpoint, "folder", lambda path: epath.Path(tmp_path) / "bucket" / "checkpoints"
    )
    note = tmp_path / "bucket" / "owner.json"
    with checkpoint.hold(bucket, tmp_path / "a"):
        with (
            pytest.raises(
                JaxdeepError, match=f"the run in {tmp_path / 'a'} on .*, or remove {note}"
            ),
            checkpoint.hold(bucket, tmp_path / "b"),
        ):
            pass
        killed = note.read_text()
    assert not note.exists()
    note.write_text(killed)
    with checkpoint.hold(bucket, tmp_path / "a"):  # it was killed, and goes on
        pass
    assert not note.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_named_and_leaves_the_last_checkpoint_whole(tmp_path, caplog):
    """On a file system of its own, where that may be made."""
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600k", "none", tmp_path], capture_output=True
        ).returncode
    ):
        pytest.skip("a small file system cannot be mounted here")
    try:
        state = fresh()
        saved = checkpoint.Checkpoints(tmp_path, SFT)
        saved.save(1, state, {"read": 1})
        saved.wait()
        room = shutil.disk_usage(tmp_path).free
        (tmp_path / "other").write_bytes(b"x" * (room - 20_000))
        with pytest.raises(OSError) as failed:
            saved.save(2, state, {"read": 2})
            saved.wait()
        assert failed.value.errno == errno.ENOSPC
        logged = [f"{record.getMessage()} {record.exc_info}" for record in caplog.records]
        assert not any("No space left" in text for text in logged)  # it is told once
        (tmp_path / "other").unlink()
        again = checkpoint.Checkpoints(tmp_path, SFT)
        assert again.restore(state)[2] == {"read": 1}
        again.save(2, state, {"read": 2})
        again.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
