"""A GRPO step end to end (rollouts with a tool, rewards, update), side by side: jaxdeep; trl's
GRPOTrainer, which generates with `transformers`; google-tunix's agentic GRPO learner. All train a
random Qwen3 of the quickstart's shape (4 layers, width 128, V = 3,072, fp32), rank 16 on all
linears, 8 prompts x 8 rollouts, each system in a process of its own, in rounds.

    make bench           (python tests/bench/grpo_step.py [--rounds=3] [--steps=5] [--spread=0.5])

All systems get the same work, token by token: questions and search results of the quickstart's
world; two tool calls in every conversation and a turn after them; the lengths of turns, log-normal
around 16, at most 48 (as the quickstart's are; `--spread=0` makes all turns equally long), at most
240 tokens a conversation; temperature 1, no top-p; one AdamW update on all sampled tokens, no KL.
What the model says is random, so the end of a turn and its call are forced: jaxdeep gets the length
as the turn's budget; systems that generate in lock step sample up to the longest turn of all
conversations, as they would have to wait for its end, and the surplus is cut off. In favour of the
peers: only jaxdeep renders, parses, encodes and calls a tool, the others get the tokens of a
result; trl has no gradient checkpointing; tunix makes one call a turn for all conversations, where
its learner would make one for each.

Printed: trained tokens/s (median of the rounds) and as a multiple of the best peer; seconds a step,
of rollouts and of training; seconds to the end of the first step (the first two are left out of all
other figures); compilations after those; peak memory above that of the imports.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from typing import Annotated, ClassVar

import numpy as np
import toy

from jaxdeep.agent.base import Env
from jaxdeep.agent.rollout import Limits, rollout, score
from jaxdeep.agent.tool import tool
from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.envs.toy import facts
from jaxdeep.tools.search import show
from jaxdeep.types import Message, Sampling, Stop, Task, ToolCall

V, D, F, L, N, K, H = 3072, 128, 384, 4, 4, 2, 32
RANK, PROMPTS, GROUP = 16, 8, 8
CALLS, TURN, LENGTH, MEDIAN = 2, 48, 240, 16
WARM = 2
TINY = facts.ASSETS / "tiny"
SYSTEM = "Search first, then answer."
SYSTEMS = ("jaxdeep", "trl", "tunix")


@dataclasses.dataclass(frozen=True)
class Talk:
    """A scripted conversation."""

    task: Task
    found: list[str]  # results of the tool
    said: list[int]  # tokens of each turn
    prompt: list[int]  # ids
    replies: list[list[int]]  # ids of what follows each turn but the last

    @property
    def answer(self) -> int:
        """Tokens after the prompt."""
        return sum(self.said) + sum(map(len, self.replies))


class Searching(Qwen3Chat):
    """The quickstart's format, in which every turn is a call of the tool."""

    def __init__(self) -> None:
        super().__init__(Tokenizer.load(TINY), "none", tools_in_prompt=False)

    def parse(self, tokens):
        message = super().parse(tokens)
        call = ToolCall("search", {"query": message.content})
        return dataclasses.replace(message, calls=(call,))


def opening(task: Task) -> list[Message]:
    return [Message("system", SYSTEM), Message("user", task.question)]


def workload(steps: int, spread: float) -> list[list[Talk]]:
    """The conversations of each step, group by group."""
    rng, chat = np.random.default_rng(0), Searching()
    world = facts.entities_of("train")
    tasks, passages = facts.tasks(world), facts.passages(world)
    out = []
    for step in range(steps):
        talks = []
        for at in range(PROMPTS):
            task = tasks[(step * PROMPTS + at) % len(tasks)]
            for _ in range(GROUP):
                hits = [passages[i] for i in rng.integers(len(passages), size=CALLS)]
                found = [show([(hit, 1.0)]) for hit in hits]
                replies = [chat.reply([Message("tool", t)], closed=False) for t in found]
                said = np.exp(rng.normal(np.log(MEDIAN), spread, CALLS + 1))
                said = np.clip(np.rint(said), 2, TURN).astype(int).tolist()
                prompt = chat.opening(opening(task))
                while len(prompt) + sum(map(len, replies)) + sum(said) > LENGTH:
                    said[said.index(max(said))] -= 1
                talks.append(Talk(task, found, said, prompt, replies))
        out.append(talks)
    return out


def reward(last: int) -> float:
    """Noise, from the last token: groups of equal rewards would be left out of the update."""
    return last / V


def compilations() -> list[int]:
    """A list of one number: how many programs JAX has compiled since."""
    import jax

    count = [0]

    def heard(event: str, *_: object, **__: object) -> None:
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(heard)
    return count


def jaxdeep(work: list[list[Talk]]) -> list[dict]:
    import jax

    from jaxdeep.data.pack import pack
    from jaxdeep.model import lora
    from jaxdeep.model import weights as model_weights
    from jaxdeep.model.config import Config
    from jaxdeep.parallel import mesh as meshes
    from jaxdeep.rl import advantages
    from jaxdeep.sample.engine import Engine, EngineConfig
    from jaxdeep.train import losses, optim
    from jaxdeep.train import state as states

    compiled, chat = compilations(), Searching()
    cfg = Config.from_hf(TINY, dtype="float32", remat="dots")
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    spec = states.Spec(
        cfg,
        lora.LoraConfig(RANK, RANK),
        optim.OptimConfig(lr=1e-3, steps=100),
        losses.Objective(kind="clip"),
    )
    params = jax.jit(lambda: model_weights.init(jax.random.key(0), cfg))()
    step, state = states.Step(spec, mesh), states.init(jax.random.key(1), spec, mesh)
    assert sum(x.size for x in jax.tree.leaves(state.trained)) == factors()
    engine = Engine(params, cfg, mesh, EngineConfig(slots=PROMPTS * GROUP, length=LENGTH))
    engine.set_adapter(lora.Adapter(state.trained, spec.lora.scale))
    engine.warm()
    limits = Limits(
        max_turns=CALLS + 1, max_calls=CALLS, turn_tokens=TURN, max_tokens=LENGTH,
        result_tokens=LENGTH, seconds=600.0,
    )  # fmt: skip

    class Looking(Env):
        def __init__(self, talk: Talk) -> None:
            self.talk, self.found = talk, iter(talk.found)
            self.tools = (self.search,)

        async def open(self) -> list[Message]:
            return opening(self.talk.task)

        @tool(inline=True)
        def search(self, query: Annotated[str, "a few words to look for"]) -> str:
            """Search the corpus."""
            return next(self.found)

    class Tasks:
        rewards: ClassVar = {"last": (1.0, lambda task, t: reward(t.pieces[-1].tokens[-1]))}

    async def one(seed: int, talk: Talk):
        budgets = iter(talk.said)

        async def forced(prompt, *, seed, max_new, sampling):
            said = await engine(prompt, seed=seed, max_new=next(budgets), sampling=Sampling(1.0))
            return said._replace(stop="stop")

        found = await rollout(Looking(talk), talk.task, forced, chat, limits=limits, seed=seed)
        assert found.stop is Stop.MAX_TURNS, (found.stop, found.failure)
        await score(Tasks, found)
        return found

    async def explore(seed: int, talks: list[Talk]):
        return await asyncio.gather(*(one(seed + i, talk) for i, talk in enumerate(talks)))

    out = []
    for number, talks in enumerate(work):
        before, start = compiled[0], time.perf_counter()
        every = asyncio.run(explore(number * 1000, talks))
        groups = [every[i : i + GROUP] for i in range(0, len(every), GROUP)]
        middle = time.perf_counter()
        advantages.assign_advantages(groups)
        rows = advantages.to_rows(groups)
        batches = pack(rows, B=4, T=512)
        grads, found = step.gradients(state, states.Frozen(params), batches)
        assert float(found["max_logp_diff"]) < 1e-4
        state, _ = step.update(state, grads)
        engine.set_adapter(lora.Adapter(state.trained, spec.lora.scale))
        jax.block_until_ready(state)
        end = time.perf_counter()
        tokens = int(sum(batch.learn_BT.sum() for batch in batches))
        counts = dict(tokens=tokens, compiled=compiled[0] - before)
        out.append(dict(rollout=middle - start, train=end - middle, end=end, **counts))
    engine.close()
    return out


def trl(work: list[list[Talk]]) -> list[dict]:
    import datasets
    import peft
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    config = transformers.Qwen3Config(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
        num_attention_heads=N, num_key_value_heads=K, head_dim=H, tie_word_embeddings=True,
        rope_theta=1e4, max_position_embeddings=1024,
    )  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(TINY / "tokenizer.json"),
        eos_token="<|im_end|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    out: list[dict] = []

    def rollouts(prompts: list[str], trainer: GRPOTrainer) -> dict:
        start = time.perf_counter()
        talks = work[len(out)]
        assert [f"{len(out)}/{i // GROUP}" for i in range(len(talks))] == prompts
        histories = [talk.prompt for talk in talks]
        masks: list[list[int]] = [[] for _ in talks]
        for turn in range(CALLS + 1):
            longest = max(talk.said[turn] for talk in talks)
            trainer.generation_config.max_new_tokens = longest
            trainer.generation_config.min_new_tokens = longest
            said, _ = trainer._generate_single_turn(histories, None, {}, 1)
            for i, talk in enumerate(talks):
                new = said[i][: talk.said[turn]]
                assert len(new) == talk.said[turn]
                reply = talk.replies[turn] if turn < CALLS else []
                histories[i] = histories[i] + new + reply
                masks[i] += [1] * len(new) + [0] * len(reply)
        now = time.perf_counter()
        tokens = sum(map(sum, masks))
        out.append(dict(rollout=now - start, start=start, tokens=tokens, compiled=0))
        return dict(
            prompt_ids=[talk.prompt for talk in talks],
            completion_ids=[h[len(t.prompt) :] for h, t in zip(histories, talks, strict=True)],
            logprobs=None,
            env_mask=masks,
        )

    def judge(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [reward(ids[-1]) for ids in completion_ids]

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            end = time.perf_counter()
            out[-1] |= dict(train=end - out[-1].pop("start") - out[-1]["rollout"], end=end)

    trainer = GRPOTrainer(
        model=transformers.Qwen3ForCausalLM(config).float(),
        reward_funcs=judge,
        args=GRPOConfig(
            output_dir="unused",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_steps=len(work),
            max_completion_length=LENGTH,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            learning_rate=1e-3,
            shuffle_dataset=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10**6,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": f"{step}/{at}"} for step in range(len(work)) for at in range(PROMPTS)]
        ),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"),
        rollout_func=rollouts,
        callbacks=[Ends()],
    )
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == factors()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    trainer.train()
    return out


class Format(toy.Numbers):
    """The tokenizer of numbers as a chat format."""

    def parse(self, messages, **_) -> str:
        return " ".join(message["content"] for message in messages)


def tunix(work: list[list[Talk]]) -> list[dict]:
    import flax.nnx as nnx
    import jax
    import optax
    import qwix
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import rl_cluster
    from tunix.rl.agentic import agentic_grpo_learner as grpo
    from tunix.rl.agentic.agents.model_agent import ModelAgent
    from tunix.rl.agentic.environments import base_environment as envs
    from tunix.rl.rollout import base_rollout

    compiled = compilations()
    every = [talk for talks in work for talk in talks]
    prompt = max(len(talk.prompt) for talk in every)
    answer = max(talk.answer for talk in every) + 1  # a conversation ends when it reaches this
    turn = max(max(talk.said) for talk in every)
    numbers, many = Format(V), PROMPTS * GROUP
    config = qwen3.ModelConfig(
        num_layers=L, vocab_size=V, embed_dim=D, hidden_dim=F, num_heads=N, head_dim=H,
        num_kv_heads=K, rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=True,
    )  # fmt: skip
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    provider = qwix.LoraProvider(module_path=f".*({names})", rank=RANK, alpha=RANK)
    model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == factors()
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tp"))
    Role = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=numbers,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-3), eval_every_n_steps=10**9, max_steps=len(work),
                mini_batch_size=PROMPTS, train_micro_batch_size=PROMPTS,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=answer, max_prompt_length=prompt, temperature=1.0, top_p=1.0,
                kv_cache_size=512, return_logprobs=True, eos_tokens=[-1],  # never drawn
            ),
        ),
    )  # fmt: skip

    def talk_of(env) -> Talk:
        at = env.extra_kwargs["group_id"] * GROUP + env.extra_kwargs["pair_index"]
        return every[at]

    class Looking(envs.BaseTaskEnv):
        def __init__(self, task, **more) -> None:
            super().__init__(task, max_steps=CALLS + 1, **more)

        def _initial_observation(self):
            text = numbers.decode(talk_of(self).prompt)
            return {"prompts": np.array([self.task["prompts"].item()]), "question": text}

        def _step_impl(self, action):
            done = self.step_count > CALLS
            says = None if done else numbers.decode(talk_of(self).replies[self.step_count - 1])
            gain = reward(numbers.encode(action)[-1]) if done else 0.0
            return envs.EnvStepResult(says, gain, done, {})

    class Agent(ModelAgent):
        def _observation_to_messages(self, observation, reward, done, info) -> None:
            text = observation["question"] if isinstance(observation, dict) else observation
            self._messages.append({"role": "user", "content": text})

    class Learner(grpo.GRPOLearner):
        """Its model call cuts each turn to its scripted length."""

        def __init__(self, *args, **more) -> None:
            self.asked: dict[int, str] = {}
            self.barrier = threading.Barrier(many, action=self.answer)
            self.lock = threading.Lock()
            super().__init__(*args, **more)

        def answer(self) -> None:
            order = sorted(self.asked)
            out = cluster.generate([self.asked[at] for at in order], max_generation_steps=turn)
            self.said = {at: (out, i) for i, at in enumerate(order)}
            self.asked = {}

        def _model_call(self, chat_lists, env=None, max_generation_steps=None):
            env.task["policy_version"] = self.policy_version
            talk, at = talk_of(env), env.extra_kwargs["group_id"] * GROUP
            at += env.extra_kwargs["pair_index"]
            wanted, text = talk.said[env.step_count], numbers.parse(chat_lists)
            with self.lock:
                self.asked[at] = text
            self.barrier.wait(timeout=500)
            out, i = self.said[at]
            marks["rolled"] = time.perf_counter()
            tokens = out.tokens[i][:wanted]
            assert len(tokens) == wanted
            return base_rollout.RolloutOutput(
                text=[numbers.decode(tokens)], logits=[], tokens=[tokens],
                left_padded_prompt_tokens=out.left_padded_prompt_tokens[i : i + 1],
                logprobs=[out.logprobs[i][:wanted]],
            )  # fmt: skip

    learner = Learner(
        cluster,
        grpo.GRPOConfig(
            num_generations=GROUP, beta=0.0, max_concurrency=many, max_response_length=answer,
            loss_agg_mode="token-mean",
        ),
        chat_parser=numbers,
        agent_class=Agent,
        env_class=Looking,
    )  # fmt: skip
    marks = dict(start=time.perf_counter(), compiled=0)
    out, update = [], cluster.update_actor

    def timed(examples, *rest) -> None:
        update(examples, *rest)
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
        end = time.perf_counter()
        tokens = int(sum(np.sum(np.asarray(example.completion_mask)) for example in examples))
        rolled = marks["rolled"]
        out.append(
            dict(rollout=rolled - marks["start"], train=end - rolled, end=end, tokens=tokens)
            | dict(compiled=compiled[0] - marks["compiled"])
        )
        marks.update(start=end, compiled=compiled[0])

    cluster.update_actor = timed
    learner.train([{"prompts": np.array([str(i)] * PROMPTS)} for i in range(len(work))])
    return out


def factors() -> int:
    """Numbers in the adapter: all systems train the same."""
    shapes = [(D, N * H), (D, K * H), (D, K * H), (N * H, D), (D, F), (D, F), (F, D)]
    return L * RANK * sum(i + o for i, o in shapes)


def peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(system: str, steps: int, spread: float) -> None:
    modules = dict(jaxdeep="jaxdeep.sample.engine", trl="trl.trainer.grpo_trainer")
    importlib.import_module(modules.get(system, "tunix.rl.agentic.agentic_grpo_learner"))
    imports = peak()
    work = workload(steps + WARM, spread)
    start = time.perf_counter()
    runs = {"jaxdeep": jaxdeep, "trl": trl, "tunix": tunix}
    rows = runs[system](work)
    wanted = [sum(sum(talk.said) for talk in talks) for talks in work]
    assert [row["tokens"] for row in rows] == wanted, (rows, wanted)
    kept = rows[WARM:]
    seconds = kept[-1]["end"] - rows[WARM - 1]["end"]
    found = dict(
        rate=sum(wanted[WARM:]) / seconds,
        step=seconds / steps,
        rollout=statistics.mean(row["rollout"] for row in kept),
        train=statistics.mean(row["train"] for row in kept),
        first=rows[0]["end"] - start,
        compiled=sum(row["compiled"] for row in kept),
        peak=peak() - imports,
        tokens=sum(wanted[WARM:]) / steps,
    )
    print(json.dumps(found), flush=True)
    os._exit(0)  # tunix leaves a thread running that waits for more work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--spread", type=float, default=0.5, help="of the logarithm of lengths")
    parser.add_argument("--systems", default="jaxdeep,trl,tunix", help=f"of {','.join(SYSTEMS)}")
    parser.add_argument("--system", choices=SYSTEMS)
    flags = parser.parse_args()
    if flags.system:
        return child(flags.system, flags.steps, flags.spread)
    found: dict[str, list[dict]] = {name: [] for name in flags.systems.split(",")}
    for _ in range(flags.rounds):
        for name in found:
            command = [sys.executable, __file__, f"--system={name}"]
            command += [f"--steps={flags.steps}", f"--spread={flags.spread}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    middle = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    best = max((row["rate"] for name, row in middle.items() if name != "jaxdeep"), default=1.0)
    tokens = next(iter(middle.values()))["tokens"]
    print(
        f"GRPO step, {PROMPTS} x {GROUP} conversations of {CALLS} tool calls, {tokens:.0f} tokens "
        f"trained, median of {flags.rounds} rounds"
    )
    print(
        f"{'':14}{'tokens/s':>10}{'x best peer':>13}{'s/step':>9}{'rollout':>9}{'train':>9}"
        f"{'first s':>9}{'compiled':>10}{'peak MB':>9}"
    )
    for name, row in middle.items():
        print(
            f"{name:14}{row['rate']:10.0f}{row['rate'] / best:13.2f}{row['step']:9.2f}"
            f"{row['rollout']:9.2f}{row['train']:9.2f}{row['first']:9.1f}{row['compiled']:10.0f}"
            f"{row['peak'] / 1e6:9.0f}"
        )


if __name__ == "__main__":
    main()
