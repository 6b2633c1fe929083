"""Which part imports which, in whatever function it does so; and what is not loaded before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import vptq_runtime
from vptq_runtime import evaluate

ROOT = Path(__file__).parents[1]
PACKAGES = ("vptq_runtime", "converter/vptq_converter", "converter/vptq_quantizer")
CONVERTER = ("vptq_converter", "vptq_quantizer")


class Import(NamedTuple):
    module: str  # that imports
    name: str  # what it imports, in full
    for_types: bool  # only type checkers see it


def imports() -> Iterator[Import]:
    for package in map(ROOT.__truediv__, PACKAGES):
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            module = ".".join(parts).removesuffix(".__init__")
            yield from imports_of(module, ast.parse(path.read_text(encoding="utf-8")), for_types=False)


def imports_of(module: str, node: ast.AST, for_types: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(module, alias.name, for_types) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module}: a relative import"
        yield from (Import(module, f"{node.module}.{alias.name}", for_types) for alias in node.names)
    for_types |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    for child in ast.iter_child_nodes(node):
        yield from imports_of(module, child, for_types)


def within(name: str, *parts: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


ALL = list(imports())


def test_imports_are_found() -> None:
    assert Import("vptq_runtime.bench.synthetic", "vptq_converter.convert.vptq_keys", False) in ALL
    assert Import("vptq_runtime.evaluate.cli", "vptq_runtime._native", False) in ALL  # in a function
    assert Import("vptq_runtime.evaluate.cli", "vptq_runtime.runtime.Runtime", True) in ALL


def test_only_synthetic_models_conversions_and_dense_files_need_the_converter() -> None:
    users = {i.module for i in ALL if within(i.name, *CONVERTER) and not within(i.module, *CONVERTER)}
    assert users == {
        "vptq_runtime.bench.synthetic",
        "vptq_runtime.models.conversion",
        "vptq_runtime.evaluate.dense_gguf",
    }


def test_the_engine_knows_nothing_that_is_built_on_it() -> None:
    rooms = [f"vptq_runtime.{room}" for room in ("commands", "bench", "evaluate", "server", "cluster")]
    assert [i for i in ALL if within(i.module, "vptq_runtime.engine") and within(i.name, *rooms)] == []


def test_the_native_library_is_imported_where_it_is_checked() -> None:
    """As `from vptq_runtime import _native`: native_library.py finds it, and refuses another build's."""
    assert [i for i in ALL if i.name.startswith("vptq_runtime._native.") and not i.for_types] == []


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import vptq_runtime", {"numpy", "tokenizers", "vptq_runtime._native"}),
        (
            "from vptq_runtime import Runtime",
            {
                "torch",
                "transformers",
                "gguf",
                "jinja2",
                "rich",
                "vptq_converter",
                "huggingface_hub",
                "filelock",
            },
        ),
        (
            "import vptq_runtime.models.cli",
            {"numpy", "huggingface_hub", "vptq_converter", "vptq_runtime._native"},
        ),
        ("from vptq_runtime.evaluate import compare, perplexity", {"torch", "transformers", "safetensors"}),
        ("from vptq_runtime.evaluate import DenseModel", {"torch", "transformers"}),
    ],
)
def test_not_loaded_before_it_is_needed(code: str, absent: set[str]) -> None:
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "vptq_runtime" in modules
    assert absent & {*modules} == set()


def test_every_public_name_is_there() -> None:
    for package in (vptq_runtime, evaluate):
        for name in package.__all__:
            assert getattr(package, name).__module__.startswith(package.__name__)
            assert name in dir(package)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = package.nothing
