"""The import rules: downwards only, and no torch in the front end."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Every third-party package that a rule speaks of.
HEAVY = {"torch", "zmq", "flask", "gunicorn", "transformers", "numpy", "tiktoken", "safetensors"}

BASE = {
    "nanogpt.admission_config",
    "nanogpt.bpe_files",
    "nanogpt.config",
    "nanogpt.detokenizer",
    "nanogpt.errors",
    "nanogpt.jobs_config",
    "nanogpt.log",
    "nanogpt.network",
    "nanogpt.options",
    "nanogpt.process",
    "nanogpt.ranks",
    "nanogpt.registry",
    "nanogpt.request",
    "nanogpt.rundir",
    "nanogpt.sampling_params",
    "nanogpt.section",
    "nanogpt.servable",
    "nanogpt.tokenizer",
    "nanogpt.weight_files",
}

# What each part may import of the project and of HEAVY.
RULES: dict[str, tuple[set[str], set[str]]] = {
    "nanogpt.model": (BASE | {"nanogpt.model"}, {"torch", "numpy", "safetensors"}),
    "nanogpt.model.convert": (
        BASE | {"nanogpt.model"},
        {"torch", "numpy", "safetensors", "transformers"},
    ),
    "nanogpt.engine": (BASE | {"nanogpt.model", "nanogpt.engine"}, {"torch", "numpy"}),
    "nanogpt.engine.scheduler": (BASE | {"nanogpt.engine"}, set()),
    "nanogpt.engine.block_manager": (BASE | {"nanogpt.engine"}, set()),
    "nanogpt.engine.sequence": (BASE | {"nanogpt.engine"}, {"numpy"}),
    "nanogpt.cluster": (BASE | {"nanogpt.cluster"}, set()),
    "nanogpt.cluster.transport": (BASE | {"nanogpt.cluster"}, {"zmq"}),
    "nanogpt.cluster.broadcast": (BASE | {"nanogpt.cluster"}, {"torch"}),
    "nanogpt.cluster.process_group": (BASE | {"nanogpt.cluster"}, {"torch"}),
    "nanogpt.api": (BASE | {"nanogpt.api", "nanogpt.cluster.messages"}, set()),
    "nanogpt.api.server": (BASE | {"nanogpt.api"}, {"gunicorn"}),
    "nanogpt.jobs": (BASE | {"nanogpt.jobs"}, set()),
    "nanogpt.api.jobs": (BASE | {"nanogpt.api", "nanogpt.jobs"}, set()),
    "nanogpt.data": (BASE | {"nanogpt.data", "nanogpt.model"}, {"numpy", "torch"}),
    "nanogpt.train": (
        BASE | {"nanogpt.train", "nanogpt.data", "nanogpt.model"},
        {"numpy", "torch", "safetensors"},
    ),
    "nanogpt.eval": (
        BASE | {"nanogpt.eval", "nanogpt.data", "nanogpt.model", "nanogpt.engine.cpu"},
        {"numpy", "torch"},
    ),
    "nanogpt.bench": (BASE | {"nanogpt.bench"}, set()),
    "nanogpt.bench.sweep": (
        BASE | {"nanogpt.bench", "nanogpt.engine", "nanogpt.model"},
        {"torch"},
    ),
    "nanogpt.bench.memory": (
        BASE | {"nanogpt.bench", "nanogpt.engine.capacity", "nanogpt.engine.kv_cache"},
        set(),
    ),
    "nanogpt.bench.job_stores": (BASE | {"nanogpt.bench", "nanogpt.jobs"}, set()),
    "nanogpt.bench.fake_rank": (BASE | {"nanogpt.bench", "nanogpt.cluster"}, set()),
    "nanogpt.bench.roofline": (BASE | {"nanogpt.model"}, {"torch"}),
    "nanogpt.admin": (BASE | {"nanogpt.api.admission", "nanogpt.admin_models"}, set()),
    "nanogpt.admin_models": (BASE, set()),
    "nanogpt.__main__": ({"nanogpt.config"}, set()),
    "nanogpt.fetch": (BASE | {"nanogpt.model.hub", "nanogpt.model.hub_blob"}, set()),
    "nanogpt.agent": ({"nanogpt.network"}, {"torch"}),
    "nanogpt.chaos": (BASE | {"nanogpt.chaos"}, set()),
    "nanogpt.launch": (BASE | {"nanogpt.preflight", "nanogpt.cluster.keeper"}, set()),
    "nanogpt.preflight": (BASE, set()),
    "rank_worker": (BASE | {"nanogpt.engine", "nanogpt.model", "nanogpt.cluster"}, set()),
    "frontend": (
        BASE | {"nanogpt.api", "nanogpt.jobs", "nanogpt.cluster"},
        {"flask"},
    ),
}
BASE_MAY = {"tiktoken"}  # and the standard library, and msgspec


@functools.cache
def modules() -> tuple[str, ...]:
    paths = [*(ROOT / "nanogpt").rglob("*.py"), ROOT / "frontend.py", ROOT / "rank_worker.py"]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths]
    return tuple(sorted({name.removesuffix(".__init__") for name in names} - {"nanogpt"}))


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Dotted names that a module imports, whether at its top or in a function."""
    path = ROOT / Path(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            known = {f"{node.module}.{a.name}" for a in node.names} & set(modules())
            found |= known or {node.module}
    return frozenset(found)


def rule_of(module: str) -> tuple[set[str], set[str]] | None:
    while module:
        if module in RULES:
            return RULES[module]
        if module in BASE:
            return BASE, BASE_MAY
        module = module.rpartition(".")[0]
    return None


def within(name: str, allowed: set[str]) -> bool:
    return name == "nanogpt" or any(name == a or name.startswith(a + ".") for a in allowed)


@pytest.mark.parametrize("module", modules())
def test_imports_only_downwards(module):
    rule = rule_of(module)
    assert rule is not None, f"no rule speaks of {module}: add one"
    project, third_party = rule
    for name in imports(module):
        top = name.partition(".")[0]
        if top in ("nanogpt", "frontend", "rank_worker"):
            assert within(name, project), f"{module} must not import {name}"
        elif top in HEAVY:
            assert top in third_party, f"{module} must not import {name}"


@pytest.mark.parametrize("module", ["frontend", "nanogpt.launch"])
def test_never_loads_torch(module):
    """In a process of its own: neither directly nor through anything it imports."""
    code = f"import sys, {module}; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# It reads meta.pkl with an unpickler that allows no globals, and torch.save's files with
# weights_only.
READERS = {"nanogpt.model.pickles"}


def test_nothing_unpickles():
    for module in modules():
        if module not in READERS:
            assert not imports(module) & {"pickle", "cloudpickle", "dill", "joblib"}, module


def test_torch_load_takes_weights_only():
    calls = 0
    for module in modules():
        path = ROOT / Path(*module.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                calls += 1
                safe = [k for k in node.keywords if k.arg == "weights_only"]
                assert safe, module
                assert ast.unparse(safe[0].value) == "True", module
    assert calls
