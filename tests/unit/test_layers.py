"""Imports go down the layers only, without cycles; the light layers never import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "rlhf"
LAYERS = {
    0: ("errors", "config", "artifacts", "faults", "metrics", "nodes", "processes"),
    1: ("data", "toy", "algo", "tracking"),
    2: ("models", "inference", "training"),
    3: ("stages",),
    4: (
        "compose",
        "datacheck",
        "cost",
        "defaults",
        "fingerprint",
        "intake",
        "lease",
        "launch",
        "operate",
        "plan",
        "progress",
        "provenance",
        "report",
        "resolve",
        "runner",
        "state",
        "supply",
        "usage",
        "versions",
        "worker",
    ),
    5: ("cli", "commands", "doctor", "hydra_app", "service", "serving"),
}
LEVEL = {name: level for level, names in LAYERS.items() for name in names}
MAX_LINES = 400
MAX_FUNCTION = 60


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.AST, known: set[str]) -> set[str]:
    """Return the modules of this package that a module imports, late imports included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return {name for name in found if name.split(".")[0] == "rlhf" and name != "rlhf"}


def part(module: str) -> str:
    return module.split(".")[1]


def test_imports_go_down_only() -> None:
    trees = modules()
    wrong = [
        f"{module} imports {target}"
        for module, tree in trees.items()
        if module != "rlhf"
        for target in imports(tree, set(trees))
        if LEVEL[part(target)] > LEVEL[part(module)]
    ]
    assert wrong == []


def test_no_stage_imports_another() -> None:
    trees = modules()
    wrong = [
        f"{module} imports {target}"
        for module, tree in trees.items()
        for target in imports(tree, set(trees))
        if module.startswith("rlhf.stages.") and target.startswith("rlhf.stages")
    ]
    assert wrong == []


def test_there_are_no_import_cycles() -> None:
    trees = modules()
    graph = {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name in done:
            return
        for target in graph.get(name, ()):
            visit(target, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_the_layer_test_can_fail() -> None:
    tree = ast.parse("def late():\n    from rlhf.stages import sft\n    import rlhf.plan")
    assert imports(tree, {"rlhf.stages.sft"}) == {"rlhf.stages.sft", "rlhf.plan"}


def test_budgets_hold() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_LINES, path
        assert text.isascii(), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= MAX_FUNCTION, f"{path}: {node.name} has {length} lines"


def test_broad_excepts_stay_at_the_boundaries() -> None:
    service = {"service/guards.py", "service/watch.py"}
    allowed = {"cli.py", "worker.py", "launch/local.py", "tracking.py", *service}
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    }
    assert found <= allowed


def test_light_modules_import_neither_torch_nor_hydra() -> None:
    check = "import sys; import {}; sys.exit(' '.join(m for m in {} if m in sys.modules) or 0)"
    for module, banned in (
        ("rlhf.cli", ["torch", "hydra", "omegaconf", "yaml", "rich", "numpy"]),
        ("rlhf.commands", ["torch", "transformers", "scipy", "numpy", "pyarrow", "hydra"]),
        ("rlhf.plan", ["torch", "transformers"]),
        ("rlhf.toy.world", ["torch", "transformers"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", check.format(module, banned)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{module}: {done.stderr}"
