"""The keys of a configuration are listed from the code: all of them, and as the page has them."""

import pathlib

import pytest

import jaxdeep
from jaxdeep import settings
from jaxdeep.errors import ConfigError
from jaxdeep.setup import keys, runs
from jaxdeep.setup.tasksets import load_config

PAGE = pathlib.Path(jaxdeep.__file__).parent.parent / "configs/KEYS.md"


def test_the_page_is_current():
    found = keys.markdown(keys.keys_of(keys.EVERYTHING))
    assert PAGE.read_text() == found, "run: python -m jaxdeep.setup.keys > configs/KEYS.md"


def test_the_listing_has_every_setting_in_100_columns():
    listed = keys.keys_of(keys.EVERYTHING)
    said = keys.text(listed)
    assert max(map(len, said.splitlines())) <= keys.COLUMNS
    names = {key.key for section in listed for key in section.keys}
    for name, cls in (("optim", "OptimConfig"), ("guard", "GuardConfig"), ("data", "DataConfig")):
        fields = settings.describe(getattr(runs, cls))
        plain = {f"{name}.{f.name}" for f in fields if not settings.nested(f.kind)}
        assert plain <= names
    for key in ("rollout.limits.seconds", "grpo.clip.dual", "data.learn.spans", "env.partial"):
        assert key in names and f"\n  {key} " in said
    assert all(key.meaning for section in listed for key in section.keys)
    assert len({section.key for section in listed}) == len(listed)


def test_a_configuration_shows_its_values_and_its_own_task_set(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom typing import Annotated\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine:\n"
        "    '''Numbers to add.'''\n\n"
        "    most: Annotated[int, 'the largest number'] = 9\n"
        "    def load(self): ...\n"
    )
    own = f"{tmp_path}/mine.py:Mine"
    config = load_config("configs/search/grpo.py", [f"--config.env.taskset={own}"])
    listed = keys.keys_of({"": ("GrpoRun",)}, config)
    said = keys.text(keys.chosen(listed, "env"))
    assert "Numbers to add." in said and "env.most = 9    int\n      the largest number" in said
    assert "taskset=search" not in said and "env.taskset = " in said
    (one,) = keys.chosen(listed, "rollout.slots")
    assert (
        keys.text([one]).splitlines()[1] == "  rollout.slots = 64 (default none)    int, at least 1"
    )
    with pytest.raises(ConfigError, match=r'rollout\.slot: .*"rollout\.slots"'):
        keys.chosen(listed, "rollout.slot")


def test_a_section_that_two_verbs_have_lists_the_keys_of_both():
    listed = {k.key: k for s in keys.keys_of({"": ("EvalRun", "GrpoRun")}) for k in s.keys}
    assert {"train.start", "train.steps", "train.keep"} <= listed.keys()


def test_types_are_said_in_words():
    listed = {k.key: k for s in keys.keys_of({"": ("SftRun",)}) for k in s.keys}
    assert listed["data.sources"].kind == "by name: SourceConfig or tuple of SourceConfig"
    assert listed["profile.steps"].kind == "str or int, at least 1"
    assert listed["lora.targets"].kind == "tuple of str" and listed["train.steps"].default == ""
