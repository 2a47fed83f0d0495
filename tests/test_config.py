"""Configurations: typed overrides, errors that say what to do, frozen dataclasses, a run's
record."""

import dataclasses
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from typing import Literal

import pytest
from ml_collections import ConfigDict

from jaxdeep import config as configs
from jaxdeep.errors import CheckpointError, ConfigError

FILE = """
from ml_collections import ConfigDict, config_dict


def get_config(arg=None):
    c = ConfigDict()
    c.seed = 0
    c.name = "run"
    c.train = ConfigDict(dict(lr=1e-3, steps=10, remat=True, buckets=(64, 128), mix=("a", "b")))
    c.train.limit = config_dict.placeholder(int)
    c.rollout = ConfigDict(dict(prompts=4, group=8, weights=[0.5, 1.0]))
    c.rollout.rows = c.rollout.get_ref("prompts") * c.rollout.get_ref("group")
    if arg == "smoke":
        c.train.steps = 1
    return c
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(FILE)
    return str(path)


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        configs.load(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("seed=-1", "seed", -1),
        ("name=12", "name", "12"),
        ("name=a=b", "name", "a=b"),
        ("train.lr=1", "train.lr", 1.0),
        ("train.lr=3e-4", "train.lr", 3e-4),
        ("train.remat=false", "train.remat", False),
        ("train.remat=True", "train.remat", True),
        ("train.buckets=256", "train.buckets", (256,)),
        ("train.buckets=(32, 64, 96)", "train.buckets", (32, 64, 96)),
        ("train.mix=c,d,e", "train.mix", ("c", "d", "e")),
        ("train.limit=5", "train.limit", 5),
        ("train.lr=None", "train.lr", None),
        ("rollout.weights=1,2", "rollout.weights", [1.0, 2.0]),
    ],
)
def test_an_override_has_the_type_of_the_present_value(file, override, key, value):
    loaded = configs.load(file, [f"--config.{override}"])
    section, _, leaf = key.rpartition(".")
    found = (loaded[section] if section else loaded)[leaf]
    assert found == value and type(found) is type(value)


def test_derived_values_follow_overrides(file):
    assert configs.load(file, ["--config.rollout.group=2"]).rollout.rows == 8


def test_an_argument_reaches_get_config(file):
    assert configs.load(f"{file}:smoke").train.steps == 1
    assert configs.load(file).train.steps == 10


def test_the_configuration_is_locked(file):
    with pytest.raises(AttributeError):
        configs.load(file).sead = 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lr=3", r'lr is not .* "train\.lr"'),
        ("seed.x=3", r"seed\.x is not"),
        ("train=3", r"train is a section; set one of .*train\.lr"),
        ("seed=many", r"seed=many: expected int, such as 0"),
        ("seed=1.5", r"seed=1\.5: expected int"),
        ("train.lr=fast", r"train\.lr=fast: expected float, such as 0\.001"),
        ("train.remat=maybe", r"train\.remat=maybe: expected bool, such as True"),
        ("train.buckets=a,b", r"train\.buckets=a,b: expected tuple, such as \(64, 128\)"),
        ("train.limit=x", r"train\.limit=x: expected int"),
        ("seed", "not of the form"),
    ],
)
def test_a_wrong_override_is_refused_with_what_was_expected(file, override, says):
    assert re.search(says, refusal(file, f"--config.{override}"))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Three configurations that come with the package, and an empty current folder."""
    for number, name in enumerate(("search/train", "search/eval", "repair/eval")):
        path = tmp_path / "shipped" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FILE.replace("seed = 0", f"seed = {number}"))
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        *(("configs/search/train.py", 0), ("search/train.py", 0), ("search/train", 0)),
        *(("train", 0), ("repair/eval", 2), ("search/eval", 1)),
    ],
)
def test_what_comes_with_the_package_is_found_by_name(shipped, name, seed):
    assert configs.load(name).seed == seed


def test_a_file_of_ones_own_comes_before_one_of_the_package(shipped):
    (shipped / "search").mkdir()
    (shipped / "search" / "train.py").write_text(FILE.replace("seed = 0", "seed = 7"))
    assert configs.load("search/train.py").seed == 7
    assert configs.load("search/train").seed == 0


def test_a_missing_file_names_the_files_there_are(shipped):
    message = refusal("configs/search/trian.py")
    assert "configs/search/trian.py does not exist; with the package come repair/eval, " in message
    assert 'Did you mean "search/train"?' in message
    assert "--config=eval could be repair/eval or search/eval: say which" in refusal("eval")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\ny = 1 / 0\n", r"run\.py:2: ZeroDivisionError"),
        ("import no_such_module\n", r"run\.py:1: ModuleNotFoundError: No module named"),
        ("def get_config(:\n", r"run\.py: SyntaxError"),
        ("\n\ndef get_config():\n    return {}['lr']\n", r"run\.py:4: KeyError: 'lr'"),
        ("x = 1\n{}['k']\n", r"run\.py:2: KeyError: 'k'"),
        ("x = 1\n", r"run\.py defines no get_config"),
        ("def get_config():\n    return {}\n", r"get_config\(\) gave a dict"),
    ],
)
def test_a_file_that_cannot_be_used_is_our_error(tmp_path, source, says):
    path = tmp_path / "run.py"
    path.write_text(source)
    assert re.search(says, refusal(str(path)))


def test_an_argument_that_is_not_taken_is_refused(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict()\n"
    )
    assert "positional argument" in refusal(f"{path}:smoke")


def test_an_error_of_ours_in_a_file_passes_through(tmp_path):
    path = tmp_path / "run.py"
    path.write_text("from jaxdeep.errors import CheckpointError\nraise CheckpointError('gone')\n")
    with pytest.raises(CheckpointError, match="gone"):
        configs.load(str(path))


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float
    warmup: int = 0


@dataclasses.dataclass(frozen=True)
class Train:
    optim: Optim
    buckets: tuple[int, ...]
    mode: Literal["sft", "grpo"] = "sft"
    clip: float | None = None
    span: tuple[int, float] = (0, 1.0)
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    judge: Optim | None = None

    def __post_init__(self):
        if not self.buckets:
            raise ValueError("buckets must not be empty")


def test_build_makes_the_dataclass_with_its_types():
    section = ConfigDict(
        {
            "optim": {"lr": 1},
            "buckets": [1, 2],
            "clip": 2,
            "span": [1, 2],
            "weights": {"em": 1},
            "judge": {"lr": 0.5, "warmup": 3},
        }
    )
    built = configs.build(Train, section, "train")
    assert built == Train(
        Optim(1.0), (1, 2), "sft", 2.0, (1, 2.0), {"em": 1.0}, Optim(lr=0.5, warmup=3)
    )
    assert type(built.optim.lr) is float and type(built.span[1]) is float


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bucket": 1}, r'train\.bucket is not a setting\. Did you mean "train\.buckets"'),
        ({"optim": {"lr": 1.0, "warmpu": 1}}, r'train\.optim\.warmpu .* "train\.optim\.warmup"'),
        ({"optim": {"warmup": 1}}, r"train\.optim\.lr must be set"),
        ({"optim": {"lr": "1"}}, r"train\.optim\.lr is '1', a str; expected float"),
        ({"optim": {"lr": True}}, r"train\.optim\.lr is True, a bool; expected float"),
        ({"optim": {"lr": 1.0, "warmup": True}}, r"warmup is True, a bool; expected int"),
        ({"optim": {"lr": 1.0, "warmup": 1.0}}, r"warmup is 1\.0, a float; expected int"),
        ({"optim": 3}, r"train\.optim is 3, a int; expected Optim"),
        ({"buckets": (1, "2")}, r"train\.buckets\[1\] is '2'"),
        ({"buckets": ()}, r"train: buckets must not be empty"),
        ({"mode": "ppo"}, r"train\.mode is 'ppo'.*grpo"),
        ({"clip": "2"}, r"train\.clip is '2'"),
        ({"span": (1,)}, r"train\.span is \(1,\), of 1 elements; expected 2"),
        ({"weights": {"em": "x"}}, r"train\.weights\.em is 'x'"),
        ({"judge": {"lr": 1.0, "x": 1}}, r"train\.judge\.x is not a setting"),
    ],
)
def test_build_refuses_what_does_not_fit(change, says):
    section = ConfigDict({"optim": ConfigDict({"lr": 0.1}), "buckets": (1, 2)})
    with pytest.raises(ConfigError, match=says):
        configs.build(Train, dict(section.items()) | change, "train")


def test_build_names_every_missing_key():
    with pytest.raises(ConfigError, match=r"train\.optim, train\.buckets must be set"):
        configs.build(Train, ConfigDict(), "train")


def test_save_records_what_was_run_without_jax(file, tmp_path):
    program = (
        "import sys; sys.modules['jax'] = None\n"
        "import pathlib; from jaxdeep import config\n"
        "loaded = config.load(sys.argv[1], ['--config.rollout.group=3'])\n"
        "config.save(loaded, loaded, pathlib.Path(sys.argv[2]), ['jaxdeep', 'grpo', '--config.name=a b'])\n"
    )
    workdir = tmp_path / "new" / "run"
    subprocess.run([sys.executable, "-c", program, file, workdir], check=True, cwd=configs.ROOT)
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["rollout"] == {
        "prompts": 4,
        "group": 3,
        "rows": 12,
        "weights": [0.5, 1.0],
    }
    assert record["command"] == "jaxdeep grpo '--config.name=a b'"
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(-dirty)?", record["commit"])
    assert {"python", "jaxdeep", "jax", "numpy"} <= record["versions"].keys()
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_the_commit_is_the_checkouts_and_unknown_outside_one(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "ROOT", tmp_path)
    assert configs._commit() == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    assert configs._commit() == "unknown"  # no commit yet
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    clean = configs._commit()
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "a").write_text("2")
    assert configs._commit() == f"{clean}-dirty"


def test_a_section_inside_one_that_the_file_leaves_out_is_set_too(file):
    loaded = configs.load(file, ["--config.train.data.cap=3", "--config.train.data.name=x"])
    assert loaded.train.data.to_dict() == {"cap": 3, "name": "x"} and loaded.is_locked
    assert "data.cap is not" in refusal(file, "--config.data.cap=3")


def test_a_key_that_the_file_leaves_out_is_set_and_left_to_the_dataclass(file):
    loaded = configs.load(file, ["--config.train.fresh=3"])
    assert loaded.train.fresh == 3 and loaded.is_locked


def test_a_section_that_all_runs_have_need_not_be_in_the_file(file):
    loaded = configs.load(file, ["--config.profile.steps=10:12"])
    assert loaded.profile.to_dict() == {"steps": "10:12"} and loaded.is_locked
    assert "profil.steps is not" in refusal(file, "--config.profil.steps=1")


def test_a_tilde_in_any_text_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = """
    from ml_collections import ConfigDict
    def get_config():
        data = dict(source="jsonl:~/rows.jsonl", sources=(dict(source="text:~/b.txt"),))
        return ConfigDict(dict(model=dict(path="~/m"), data=data, about="~5 words", own="~/t.py:Mine"))
    """
    path = tmp_path / "run.py"
    path.write_text(textwrap.dedent(text))
    config = configs.load(str(path), ["--config.model.path=~/other"])
    assert config.model.path == "/home/me/other" and config.about == "~5 words"
    assert config.data.source == "jsonl:/home/me/rows.jsonl"
    assert config.data.sources[0]["source"] == "text:/home/me/b.txt"
    assert config.own == "/home/me/t.py:Mine"
