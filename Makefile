# make quickstart   train a tiny search agent on this machine, in minutes
# make test         ruff and the tests that take seconds, as CI runs them
# make test-slow    the tests that take minutes
# make lint         ruff, and its formatting
# make bench        speed and memory beside peers (tests/bench/README.md has the results)
# make study        the learning study: hours
# make plan-table   where Qwen3 fits on TPUs, by their compiler
# make base         the tiny base model and the tokenizers that ship with the package, from nothing
# make clean        remove .venv and what builds and tests leave
#
# ARGS="..." passes flags on. Each makes .venv if there is none, from PYTHON (3.11, 3.12 or 3.13),
# and installs into it when setup.py has changed.

PYTHON ?= python3
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: quickstart test test-slow lint bench plan-table study base clean

quickstart: $(VENV)/.installed
	$(PY) -m jaxdeep quickstart $(ARGS)

test: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m pytest -q -n 2 --dist loadfile --durations=10 $(ARGS)

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Real tokenizer and corpus, a model with Qwen3-0.6B's layers, the losses of trl, notebooks, plans of
# the configurations by the TPU compiler, a Ray cluster, processes that are killed, and launch/slurm in a Slurm of its own (as root, after
# apt-get install slurmctld slurmd munge).
test-slow: $(VENV)/.installed-dev
	$(PY) -m pip install --disable-pip-version-check -q -e '.[bench,ray,tpu]'
	$(PY) -m pytest -q -m slow --durations=10 $(ARGS)

# Beside peers, each in a process of its own; then memory, and what int8 costs. Takes minutes.
# SKYRL=PATH is the python of an environment with skyrl[jax]==0.3.0, whose dependencies conflict
# with all others. With the extra `tpu` installed, memory on TPUs too. Tunix pins versions that
# conflict with the others', but works with theirs: it is installed without its dependencies.
TUNIX := google-tunix==0.1.7 qwix google-metrax grain jaxtyping wadler-lindig kagglehub kagglesdk numba \
  llvmlite omegaconf antlr4-python3-runtime pylatexenc python-dotenv perfetto sympy tenacity hf_transfer \
  array-record more-itertools clu importlib_resources tensorboardX
bench: $(VENV)/.installed-dev
	$(PY) -m pip install --disable-pip-version-check -q -e '.[bench]'
	$(PY) -m pip install --disable-pip-version-check -q --no-deps $(TUNIX)
	JAX_PLATFORMS=cpu $(PY) tests/bench/sft_step.py
	JAX_PLATFORMS=cpu $(PY) tests/bench/sft_step.py --vocab=151936 --rounds=1 --steps=2
	JAX_PLATFORMS=cpu $(PY) tests/bench/agents.py
	JAX_PLATFORMS=cpu $(PY) tests/bench/decode.py $(if $(SKYRL),--skyrl-python=$(SKYRL))
	JAX_PLATFORMS=cpu $(PY) tests/bench/grpo_step.py
	JAX_PLATFORMS=cpu $(PY) tests/bench/slow_tools.py
	JAX_PLATFORMS=cpu $(PY) tests/bench/compile_time.py
	JAX_PLATFORMS=cpu $(PY) tests/bench/int8_loss.py
	$(PY) tests/bench/memory.py
	$(PY) tests/bench/pages.py

# No TPU is needed. Rows that are in runs/pods are not compiled again.
plan-table: $(VENV)/.installed
	$(PY) -m pip install --disable-pip-version-check -q -e '.[tpu]'
	$(PY) tests/bench/pods.py $(ARGS)

# The effect of the algorithm, the retry reward and the adapter's rank: a table over three seeds.
# Runs that are in runs/study are not repeated. A part: ARGS="--rows=maze/default --seeds=0"
study: $(VENV)/.installed
	JAX_PLATFORMS=cpu $(PY) tests/bench/study.py $(ARGS)

# Overwrites jaxdeep/assets: the tokenizer of mazes, the tiny base's tokenizer, then its weights.
base: $(VENV)/.installed
	$(PY) -m jaxdeep.envs.toy.maze > jaxdeep/assets/maze/tokenizer.json
	$(PY) -m jaxdeep.envs.toy.facts 3072 > jaxdeep/assets/tiny/tokenizer.json
	$(PY) -m jaxdeep sft --config=configs/toy/tiny_base.py:reading --workdir=runs/tiny_base-reading
	$(PY) -m jaxdeep sft --config=configs/toy/tiny_base.py:choosing --workdir=runs/tiny_base-choosing
	cp runs/tiny_base-choosing/model/model.safetensors jaxdeep/assets/tiny/

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

$(VENV)/.installed: setup.py | $(PY)
	$(PY) -m pip install --disable-pip-version-check -q -e .
	@touch $@

$(VENV)/.installed-dev: setup.py | $(PY)
	$(PY) -m pip install --disable-pip-version-check -q -e '.[dev]'
	@touch $(VENV)/.installed $@

# A venv that could not be finished is removed, so that the next try starts from nothing.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo 'jaxdeep needs Python 3.11, 3.12 or 3.13; name one: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo '$(PYTHON) -m venv failed; on Debian and Ubuntu: sudo apt install python3-venv' >&2; exit 1; }
