"""What all tests share: strict broadcasting, quick compilation, and one cache of compiled programs for every process."""

import importlib.metadata
import logging
import os
import pathlib
import tempfile

_CACHE = pathlib.Path(tempfile.gettempdir()) / f"mbrl_lm_tests_{os.getuid()}"
# What compiles three times faster than the defaults do; most programs of tests compute too little to lose that by it.
_FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones emit code in one way only, and refuse the flag
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")

# In the environment, before the backend starts, so that the processes that tests start have them too.
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in _FLAGS if flag.split("=")[0] not in _given), _given]).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402  (reads the environment when it is imported)
import pytest  # noqa: E402
from absl import logging as absl_logging  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
absl_logging.set_verbosity(absl_logging.FATAL)
logging.getLogger("jax").setLevel(logging.ERROR)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Every compiled program holds memory maps, of which a process may have 65,530: after each file they are let go."""
    yield
    jax.clear_caches()
