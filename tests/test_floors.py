"""The floors of the house: a module imports from its own floor and lower ones, and some packages have one door."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = {  # the longest name that a module's name begins with decides
    "types": 0,
    "config": 0,
    "presets": 0,
    "contradictions": 0,
    "protocol": 1,
    "tokenizer": 1,
    "sharding": 1,
    "nn": 2,
    "scoring": 3,
    "rollout": 3,
    "turns": 3,
    "outcome": 4,
    "deal": 4,
    "world_model": 4,
    "micro_batches": 3,
    "policy": 4,
    "advantage": 4,
    "value": 4,
    "reward": 4,
    "guards": 4,
    "goals": 4,
    "valuation": 4,
    "targets": 5,
    "lookahead": 5,
    "planner": 5,
    "optimizer": 5,
    "learner": 5,
    "data": 5,
    "replay": 5,
    "experience": 5,
    "envs": 5,
    "checkpoint": 5,
    "metrics": 5,
    "heldout": 5,
    "judge": 5,
    "evaluation": 5,
    "report": 5,
    "evaluation_report": 5,
    "ablation_runs": 5,
    "ablation_plan": 5,
    "ablation_table": 5,
    "negotiation_table": 5,
    "sweeps": 5,
    "user_report": 5,
    "conversation": 5,
    "discriminator": 5,
    "yardsticks": 5,
    "command_line": 5,
    "app": 6,
    "loop": 6,
    "trained": 6,
}
LIBRARY = sorted((ROOT / "mbrl_lm").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(path: pathlib.Path, source: str | None = None) -> set[str]:
    """Full names of all modules that a file imports, wherever in it; `from a import b` counts as a.b if that is a module."""
    package = module_name(path).split(".")[: None if path.name == "__init__.py" else -1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                own = base.split(".")[0] in ("mbrl_lm", "experiments", "launch")
                found.add(full if not own or exists(full) else base)
    return found


def floor(module: str) -> int | None:
    """The floor of `mbrl_lm.x.y`; None if nobody has given it one."""
    return FLOORS.get(module.split(".")[1]) if "." in module else 0


def complaints(path: pathlib.Path, source: str | None = None) -> list[str]:
    """What is wrong with a library file's imports."""
    name, found = module_name(path), imports(path, source)
    own = floor(name)
    if own is None:
        return [f"{name} has no floor: give it one in tests/test_floors.py, as high as the highest module that it imports"]
    wrong = []
    for other in sorted(found):
        top = other.split(".")[0]
        if top == "mbrl_lm" and (floor(other) is None or floor(other) > own):
            wrong.append(f"{name} (floor {own}) imports {other} (floor {floor(other)}): move one, or turn the call round")
        if top in ("experiments", "launch", "tests"):
            wrong.append(f"{name} imports {other}: the library knows nothing of who uses it")
        if top in ("tensorflow", "torch"):
            wrong.append(f"{name} imports {other}: the library runs on JAX alone")
        if (other + ".").startswith("flax.linen.") and not name.startswith("mbrl_lm.nn"):
            wrong.append(f"{name} imports {other}: only mbrl_lm/nn may")
        if top == "orbax" and name != "mbrl_lm.checkpoint":
            wrong.append(f"{name} imports {other}: only mbrl_lm/checkpoint.py may")
    return wrong


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_a_module_imports_from_lower_floors_only(path):
    assert not complaints(path)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=module_name)
def test_experiments_do_not_import_each_other(path):
    own = module_name(path)
    others = {name for name in imports(path) if name.split(".")[0] in ("experiments", "launch", "tests") and name != own}
    if own == "experiments.ablations":  # rows of other experiments: its only purpose
        others = {name for name in others if not name.startswith("experiments.")}
    assert not others, f"{own} imports {sorted(others)}: what experiments share belongs in mbrl_lm/"


@pytest.mark.parametrize("path", sorted((ROOT / "launch").rglob("*.py")), ids=module_name)
def test_launchers_know_nothing_but_command_lines(path):
    assert not {name for name in imports(path) if name.split(".")[0] in ("mbrl_lm", "experiments")}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("types", "from mbrl_lm import protocol"),
        ("turns", "import mbrl_lm.value"),
        ("scoring", "def f():\n    from mbrl_lm.learner import weights"),
        ("nn/layers", "from .. import rollout"),
        ("nn/layers", "from ..scoring import score"),
        ("learner", "import flax.linen as nn"),
        ("learner", "from flax import linen"),
        ("learner", "from orbax import checkpoint"),
        ("replay", "import torch.nn"),
        ("data/records", "from tensorflow import io"),
        ("app", "import experiments.dream"),
        ("a_new_module", "import jax"),
        ("learner", "from mbrl_lm import a_new_module_that_is_not_there, app"),
    ],
)
def test_wrong_imports_are_seen(module, source):
    assert complaints(ROOT / "mbrl_lm" / f"{module}.py", source)


def test_right_imports_are_not_complained_of():
    lines = ("import flax.struct, tensorflow_datasets", "from mbrl_lm import protocol as pr", "from mbrl_lm.nn import Net")
    assert not complaints(ROOT / "mbrl_lm" / "learner.py", "\n".join(lines))
    assert len(LIBRARY) > 25
