"""Every setting is declared once: with a type, bounds and a meaning, which are checked wherever it
is given."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Literal

import pytest

from jaxdeep import config as configs
from jaxdeep import settings
from jaxdeep.errors import ConfigError
from jaxdeep.rl import algorithms
from jaxdeep.sample.sizes import EngineConfig
from jaxdeep.settings import Above, AtLeast, AtMost, Below, Finite, Or, section
from jaxdeep.setup import tasksets
from jaxdeep.setup.runs import EvalRun, GrpoRun, SftRun
from jaxdeep.setup.sections import load_run

RUNS = {"sft": SftRun, "grpo": GrpoRun, "eval": EvalRun}
NOT_SECTIONS = ("settings",)  # the door to a task set's own dataclass


def sections() -> dict[str, list[type]]:
    """The dataclasses of each section of all runs, and of each shipped task set."""
    found: dict[str, list[type]] = {}
    for run in RUNS.values():
        for name, hint in typing.get_type_hints(run).items():
            cls = settings.nested(hint)
            cls = tasksets.SharedSettings if cls is tasksets.EnvConfig else cls
            found.setdefault(name, [])
            found[name] += [] if cls in found[name] else [cls]
    found["env"] += [tasksets.settings_class(n, "env.taskset") for n in tasksets.BUILT_IN]
    return found


def leaves(cls: type, key: str) -> list[tuple[type, str, settings.Setting]]:
    """(dataclass, key, setting) of every value of a section, at any depth."""
    out = []
    for setting in settings.describe(cls):
        inside = settings.nested(setting.kind)
        if inside:
            out += leaves(inside, f"{key}.{setting.name}")
        else:
            out.append((cls, f"{key}.{setting.name}", setting))
    return out


SETTINGS = [
    (root, *leaf)
    for name, classes in sections().items()
    for root in classes
    for leaf in leaves(root, name)
]
SETTINGS += [(EngineConfig, *leaf) for leaf in leaves(EngineConfig, "engine")]
SETTINGS += [(tasksets.OwnReward, *leaf) for leaf in leaves(tasksets.OwnReward, "env.rewards.x")]
IDS = [key for *_, key, _ in SETTINGS]


def numbers_in(hint, marks=()):
    """(int or float, marks) for each number that an annotation admits, also inside of others."""
    kind, more = settings.split(hint)
    marks = (*marks, *more)
    if kind in (int, float):
        return [(kind, marks)]
    union = len(settings.members(kind)) > 1
    inside = [arg for arg in typing.get_args(kind) if arg is not Ellipsis]
    if typing.get_origin(kind) is Literal or dataclasses.is_dataclass(kind):
        return []
    return [found for arg in inside for found in numbers_in(arg, marks if union else ())]


@pytest.mark.parametrize(("root", "owner", "key", "setting"), SETTINGS, ids=IDS)
def test_every_setting_has_a_meaning_and_every_number_bounds(root, owner, key, setting):
    assert setting.meaning and len(setting.meaning.split()) > 1
    assert owner.__doc__ and not owner.__doc__.startswith(f"{owner.__name__}(")
    assert owner.__dataclass_params__.frozen
    for _, marks in numbers_in(setting.hint):
        assert any(isinstance(mark, settings.Bound) for mark in marks)


def inside(setting):
    """A value of a required setting."""
    if cls := settings.nested(setting.kind):
        return required(cls)
    bounds = [mark for mark in settings.split(setting.hint)[1] if isinstance(mark, settings.Bound)]
    least = next((b.limit for b in bounds if isinstance(b, AtLeast | Above)), 0)
    kind = setting.kind
    return kind(least + 1) if kind in (int, float) else "x" if kind is str else kind()


def required(cls):
    """A value of each setting that must be set."""
    missing = [s for s in settings.describe(cls) if s.default is dataclasses.MISSING]
    return {s.name: inside(s) for s in missing if s.name not in NOT_SECTIONS}


def changed(cls, path, value):
    """A section with one value changed, and what must be set around it."""
    values = required(cls)
    name, *rest = path
    if rest:
        by_name = {s.name: s for s in settings.describe(cls)}
        value = changed(settings.nested(by_name[name].kind), rest, value)
    return values | {name: value}


def nearest(bound, kind):
    """The value outside a bound that is nearest to it."""
    if isinstance(bound, Above | Below):
        return kind(bound.limit)
    away = -1 if isinstance(bound, AtLeast) else 1
    return bound.limit + away if kind is int else math.nextafter(bound.limit, away * math.inf)


def outside(kind, marks):
    """Values just outside each bound with the words that say so, and values that are no number."""
    bounds = [mark for mark in marks if isinstance(mark, settings.Bound)]
    special = {mark.value for mark in marks if isinstance(mark, Or)}
    found = [(nearest(b, kind), str(b)) for b in bounds if not isinstance(b, Finite)]
    found = [(value, words) for value, words in found if value not in special]
    found.append((True, "True"))
    huge = 10**30 if kind is int else 1e300
    found.append((huge, "must be at"))
    return found + ([] if kind is int else [(math.nan, "finite number"), (math.inf, "finite")])


NUMBERS = [
    pytest.param(root, owner, key, setting, kind, marks, id=key)
    for root, owner, key, setting in SETTINGS
    for kind, marks in numbers_in(setting.hint)
    if setting.kind in (int, float) or len(settings.members(setting.kind)) > 1
]


@pytest.mark.parametrize(("root", "owner", "key", "setting", "kind", "marks"), NUMBERS)
def test_values_outside_the_bounds_are_refused_by_key(root, owner, key, setting, kind, marks):
    top, *path = key.split(".")
    if root is tasksets.OwnReward:
        top, path = key.rpartition(".")[0], path[-1:]
    for value, words in outside(kind, marks):
        if value is True and "str" in settings.type_text(setting.kind):
            words = "expected"
        with pytest.raises(ConfigError) as built:
            settings.build(root, changed(root, path, value), top)
        with pytest.raises(ConfigError) as made:
            owner(**{**required(owner), setting.name: value})
        for caught, named in ((built, key), (made, f"{owner.__name__}.{setting.name}")):
            said = str(caught.value)
            assert named in said and str(value) in said
            assert words in said or "float32" in said, said


@pytest.mark.parametrize(("root", "owner", "key", "setting", "kind", "marks"), NUMBERS)
def test_values_at_the_bounds_are_taken(root, owner, key, setting, kind, marks):
    for mark in marks:
        if isinstance(mark, AtLeast | AtMost):
            assert settings.convert(kind(mark.limit), setting.hint, key) == mark.limit
        if isinstance(mark, Or):
            assert settings.convert(mark.value, setting.hint, key) == mark.value


# The command line, where such values come from.


def refusal(verb, *overrides):
    words = [f"--config.{override}" for override in overrides]
    with pytest.raises(ConfigError) as caught:
        config = tasksets.load_config(f"configs/search/{verb}.py", words)
        load_run(RUNS[verb], algorithms.expand(config))
    return str(caught.value)


@pytest.mark.parametrize(
    ("verb", "override", "bound"),
    [
        *(
            ("sft", f"train.seed={n}", "at least 0 and at most 4294967295")
            for n in (-1, 10**20 - 1)
        ),
        *(("sft", f"batch.rows={n}", "at least 1") for n in (0, -1)),
        ("sft", "batch.length=0", "at least 2"),
        ("sft", "model.chunk=0", "at least 1"),
        *(("sft", f"optim.lr={n}", "a finite number, above 0") for n in ("nan", "inf")),
        ("sft", "optim.lr=-0.001", "above 0"),
        *(("sft", f"optim.clip={n}", "at least 0") for n in (-1, "inf", "nan", "-inf")),
        ("sft", "optim.warmup=-3", "at least 0"),
        ("sft", "optim.warmup=501", "must not be above optim.steps=500"),
        ("sft", "optim.b1=1.5", "at least 0 and below 1"),
        *(("sft", f"lora.alpha={n}", "above 0") for n in (0.0, "nan", -8.0)),
        ("sft", "data.accumulate=0", "at least 1"),
        ("sft", "mesh.data=0", "at least 1 or -1"),
        ("sft", "train.save_every=1000000000000", "at most 2147483647"),
        ("grpo", "env.first=-5", "at least 0"),
        ("grpo", "env.count=-1", "at least 0"),
        *(("grpo", f"env.k={n}", "at least 1") for n in (0, -1)),
        ("grpo", "env.cache=-1", "at least 0"),
        ("grpo", "env.chunk=0", "at least 1"),
        ("grpo", "env.k1=nan", "a finite number, at least 0"),
        ("grpo", "rollout.limits.seconds=nan", "a finite number, above 0"),
        *(("grpo", f"grpo.tolerance={n}", "at least 0") for n in ("nan", -1.0)),
        ("grpo", "grpo.group=1", "at least 2"),
        ("grpo", "rollout.slots=0", "at least 1"),
        ("grpo", "grpo.clip.low=2.0", "above 0 and below 1"),
        ("grpo", "env.rewards.format=nan", "a finite number"),
        ("eval", "train.seed=-1", "at least 0"),
    ],
)
def test_numbers_that_no_run_can_mean_are_refused_before_anything_is_loaded(verb, override, bound):
    said = refusal(verb, override)
    assert said.startswith(override) and bound in said


@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_a_few_steps_of_a_shipped_configuration_have_a_warmup_that_fits(verb):
    config = tasksets.load_config(f"configs/search/{verb}.py", ["--config.train.steps=2"])
    if verb == "grpo":
        config.env = {"taskset": "facts"}
    assert config.optim.warmup <= config.optim.steps == 2


def test_a_clip_of_0_is_taken_and_no_clip():
    config = tasksets.load_config("configs/search/sft.py", ["--config.optim.clip=0"])
    assert load_run(SftRun, config).optim.clip == 0.0


def test_a_part_of_a_configuration_keeps_its_keys():
    config = tasksets.load_config("configs/search/quickstart.py", ["--config.sft.optim.lr=nan"])
    with pytest.raises(ConfigError, match=r"^sft\.optim\.lr=nan must be a finite number"):
        load_run(SftRun, config.sft, "sft.")
    with config.sft.unlocked():
        config.sft.bacth = {}
    with pytest.raises(ConfigError, match=r'config\.sft\.bacth is not .*"sft\.batch"'):
        load_run(SftRun, config.sft, "sft.")


@pytest.mark.parametrize(("text", "value"), [("wq,wv", ("wq", "wv")), ("wo", ("wo",))])
def test_texts_with_commas_are_tuples(text, value):
    config = tasksets.load_config("configs/search/sft.py", [f"--config.lora.targets={text}"])
    assert load_run(SftRun, config).lora.targets == value
    assert settings.convert("system, user", tuple[Literal["system", "user"], ...], "x")[1] == "user"
    with pytest.raises(ConfigError, match=r"x\[1\] is 'you', none of"):
        settings.convert("system,you", tuple[Literal["system", "user"], ...], "x")
    with pytest.raises(ConfigError, match="x is '1,2', a str; expected tuple of int"):
        settings.convert("1,2", tuple[int, ...], "x")


def test_what_is_no_section_is_refused():
    config = configs.load("configs/search/sft.py")
    with config.unlocked():
        del config.batch
        config.batch = 8
    with pytest.raises(ConfigError, match=r"config\.batch is 8; expected a section"):
        load_run(SftRun, config)


# The parts.


@section
class Small:
    """A section for tests."""

    share: Annotated[float, AtLeast(0), Below(1), "a share"] = 0.5
    count: Annotated[int, AtLeast(1), Or(-1), "how many; -1: all"] = -1
    most: Annotated[float | None, Above(1), "at most; None: any"] = None
    large: Annotated[int, Finite(), AtMost(2**62), "a large number"] = 0
    by_name: Annotated[Mapping[str, Annotated[float, AtLeast(0)]], "weights"] = dataclasses.field(
        default_factory=dict
    )
    pair: Annotated[tuple[int, float], "two numbers"] = (0, 0.0)
    mode: Annotated[Literal["a", "b"], "which way"] = "a"
    flag: Annotated[bool, "whether"] = False

    def __post_init__(self):
        if self.count == 13:
            raise ConfigError("Small.count=13 is unlucky")


@section
class Smaller(Small):
    """One that inherits, with a setting more."""

    more: Annotated[int, AtLeast(0), "more of it"] = 0


@pytest.mark.parametrize("cls", [Small, Smaller])
def test_a_section_checks_and_converts_what_it_is_made_with(cls):
    made = cls(share=0, most=2, by_name={"x": 1}, pair=[1, 2], large=2**40)
    assert type(made.share) is float and made.most == 2.0 and made.pair == (1, 2.0)
    assert made.large == 2**40 and type(made.by_name["x"]) is float
    name = cls.__name__
    for wrong, said in {
        "share": (1.0, rf"{name}\.share=1.0 must be at least 0 and below 1 \(a share\)"),
        "count": (0, rf"{name}\.count=0 must be at least 1 or -1"),
        "most": (1, rf"{name}\.most=1 must be above 1"),
        "by_name": ({"x": -1.0}, rf"{name}\.by_name\.x=-1.0 must be at least 0"),
        "pair": ((1, math.nan), rf"{name}\.pair\[1\]=nan must be a finite number"),
        "mode": ("c", rf"{name}\.mode is 'c', none of 'a', 'b'"),
        "flag": (1, rf"{name}\.flag is 1, a int; expected bool"),
        "large": (2**62 + 1, "must be any number and at most"),
    }.items():
        with pytest.raises(ConfigError, match=said[1]):
            cls(**{wrong: said[0]})
    with pytest.raises(ConfigError, match="unlucky"):
        cls(count=13)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.share = 0.1


def test_what_is_inherited_is_checked_too():
    with pytest.raises(ConfigError, match=r"Smaller\.more=-1"):
        Smaller(more=-1)


@pytest.mark.parametrize(
    ("name", "names", "closest"),
    [
        ("env.corpsu", ("env.corpus", "env.count", "dev.corpus"), "env.corpus"),
        ("lr", ("train.lr", "train.keep"), "train.lr"),
        ("grpo.lr", ("optim.lr", "grpo.length"), "optim.lr"),
        ("optim.stepz", ("train.steps", "optim.steps"), "optim.steps"),
        ("train.zzzz", ("train.keep", "train.seed"), None),
        ("configs/serach.py", ("configs/grpo.py", "configs/search.py"), "configs/search.py"),
        ("configs/grpo.py", ("configs/a/sft.py", "configs/a/grpo.py"), "configs/a/grpo.py"),
        ("grop", ("sft", "grpo"), "grpo"),
        ("x", (), None),
    ],
)
def test_suggestions_keep_the_whole_key(name, names, closest):
    said = settings.suggest(name, names)
    assert said == (f' Did you mean "{closest}"?' if closest else "")
