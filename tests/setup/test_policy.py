"""A policy is opened without anything that only training needs."""

import asyncio

import pytest
from run import small

from jaxdeep import config as configs
from jaxdeep.errors import ConfigError
from jaxdeep.parallel import mesh as meshes
from jaxdeep.setup.policy import open_policy
from jaxdeep.setup.runs import EvalRun
from jaxdeep.setup.sections import ModelConfig, load_run
from jaxdeep.setup.weights import chat_of
from jaxdeep.train import optim
from jaxdeep.types import Message


def test_no_optimizer_is_made_and_the_engine_is_closed(tmp_path, monkeypatch):
    def no_optimizer(*_):
        raise AssertionError("an optimizer was built")

    monkeypatch.setattr(optim, "chain", no_optimizer)
    config = configs.load(small.config(tmp_path, "eval"), ["--config.mesh.data=1"])
    one = meshes.make_mesh(devices=meshes.jax.devices()[:1])
    monkeypatch.setattr(meshes, "make_mesh", lambda cfg: one)
    with open_policy(load_run(EvalRun, config)) as policy:
        prompt = policy.chat.opening([Message("user", "Who?")])
        completion = asyncio.run(policy.engine(prompt, seed=0, max_new=3))
        assert len(completion.tokens) == len(completion.logps) <= 3
        again = asyncio.run(policy.engine(prompt, seed=0, max_new=3))
        assert again.tokens == completion.tokens
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(policy.engine(prompt, seed=0, max_new=3))


def test_the_chat_format_is_the_one_that_is_named():
    assert chat_of(ModelConfig("tiny", thinking="none")).family == "qwen3"
    assert chat_of(ModelConfig("tiny", thinking="none", chat="chatml")).family == "chatml"
    with pytest.raises(ConfigError, match="'llama9': there is qwen3"):
        chat_of(ModelConfig("tiny", thinking="none", chat="llama9"))
