"""Imports run one way, and what must start fast imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ostinato

SOURCE = Path(ostinato.__file__).parent


def imports(path: Path, top_level_only: bool) -> set[str]:
    """Modules that a file imports, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if top_level_only and isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                dots = "." * child.level
                found.add(dots + (child.module or ""))
                found.update(f"{dots}{child.module or ''}.{alias.name}" for alias in child.names)
            visit(child)

    visit(tree)
    return found


def roots(path: Path, top_level_only: bool = False) -> set[str]:
    return {name.lstrip(".").split(".")[0] for name in imports(path, top_level_only)}


@pytest.mark.parametrize(
    "name",
    [
        "scheduler.py",
        "kv_blocks.py",
        "types.py",
        "errors.py",
        "graphs/plan.py",
        "graphs/keys.py",
        "graphs/report.py",
    ],
)
def test_planning_imports_no_torch(name: str) -> None:
    assert not roots(SOURCE / name) & {"torch", "numpy", "triton"}


def test_only_the_gpu_modules_name_triton() -> None:
    for path in SOURCE.rglob("*.py"):
        relative = path.relative_to(SOURCE)
        if relative.parts[:2] != ("ops", "triton"):
            assert "triton" not in {n for n in imports(path, False) if not n.startswith(".")}, relative


@pytest.mark.parametrize(
    "low", ["types.py", "errors.py", "config.py", "inputs.py", "scheduler.py", "ops/reference.py"]
)
def test_lower_layers_do_not_import_higher_ones(low: str) -> None:
    assert not roots(SOURCE / low) & {"engine", "llm", "cli", "outputs", "serve", "bench"}


@pytest.mark.parametrize("heavy", ["torch", "transformers", "huggingface_hub", "numpy", "gguf", "triton"])
def test_the_package_itself_imports_nothing_heavy(heavy: str) -> None:
    code = f"import sys, ostinato, ostinato.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("heavy", ["torch", "transformers", "numpy", "matplotlib", "triton"])
def test_the_arguments_of_benchmarks_import_nothing_heavy(heavy: str) -> None:
    code = f"import sys; from ostinato.cli import _parser; _parser(['bench']); sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "heavy",
    [
        *("transformers", "huggingface_hub", "gguf", "triton", "scipy", "jinja2"),
        *("ostinato.bench", "torch._dynamo", "torch._inductor", "sympy"),
    ],
)
def test_the_engine_imports_only_what_it_runs(heavy: str) -> None:
    code = f"import sys, ostinato.llm; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_names_are_listed_and_exist() -> None:
    for name in ostinato.__all__:
        assert getattr(ostinato, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        ostinato.LMM  # noqa: B018


def test_the_http_process_imports_no_torch() -> None:
    code = (
        "import sys, ostinato.serve.server, ostinato.serve.grammar, ostinato.bench.serve; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
