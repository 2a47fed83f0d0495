"""Post-train tool-using agents with JAX: from a corpus to questions to rollouts to GRPO."""

__version__ = "0.1.0"
