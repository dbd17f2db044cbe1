from setuptools import find_packages, setup

setup(
    name="mbrl_lm",
    version="0.1.0",
    description="Model-based reinforcement learning of language models in JAX",
    license="Apache-2.0",
    packages=find_packages(include=["mbrl_lm", "mbrl_lm.*", "experiments"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "array-record",  # the record files of tensorflow-datasets, readable without TensorFlow
        "chex",
        "flax",
        "jax>=0.10",
        "matplotlib",
        "mctx",  # Gumbel MuZero, for planning
        "ml-collections",  # --config.a.b=v flags from dataclasses
        "optax",
        "orbax-checkpoint",
        "rich",  # the progress line
        "scipy",  # Student's t of the ablation table
        "sentencepiece",
        "tensorboardX",  # event files without TensorFlow
        "tensorflow-datasets",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "ruff"],
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "bench": ["torch==2.13.0", "transformers"],
    },
)
