"""Model-based reinforcement learning of language models."""
