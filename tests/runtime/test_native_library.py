"""Python sources without a native library, as in a clone, and an installed package that they hide."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vptq_runtime
from vptq_runtime import _native

SOURCES = Path(vptq_runtime.__file__).parent


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The package's sources, and nothing that was compiled."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "demo")
    return shutil.copytree(SOURCES, tmp_path / "clone" / "vptq_runtime", ignore=ignored)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A package with this build's native library; its Python modules are old ones, which must not be used."""
    package = tmp_path / "site" / "vptq_runtime"
    package.mkdir(parents=True)
    assert _native.__file__ is not None
    shutil.copy(_native.__file__, package)
    for name in ("__init__", "errors", "of_old"):
        (package / f"{name}.py").write_text("raise AssertionError('from the installed package')\n")
    return package


def run(code: str, clone: Path, installed: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in the clone. Without .pth files, as an editable install has one."""
    paths = [str(installed.parent), *(path for path in sys.path if path)]
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=clone.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )


def test_only_the_native_library_comes_from_the_installed_package(clone: Path, installed: Path) -> None:
    code = """if True:
        import sys
        from vptq_runtime import Runtime, _native
        assert _native.cpu_isas()[-1] == "generic"
        assert sys.modules["vptq_runtime._native"] is _native
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "vptq_runtime":
                print(name, module.__file__)
        try:
            import vptq_runtime.of_old
        except ModuleNotFoundError:
            print("end")
    """
    result = run(code, clone, installed)
    assert result.stderr == ""
    *modules, end = result.stdout.splitlines()
    assert end == "end"
    files = dict(line.split() for line in modules)
    assert files.pop("vptq_runtime._native").startswith(str(installed))
    assert "vptq_runtime.runtime" in files
    assert all(file.startswith(str(clone)) for file in files.values())


def test_a_folder_with_the_library_alone(clone: Path, installed: Path) -> None:
    """As an editable install has it."""
    for file in installed.glob("*.py"):
        file.unlink()
    result = run("from vptq_runtime import _native; print(_native.version)", clone, installed)
    assert (result.stdout, result.stderr) == (f"{vptq_runtime.__version__}\n", "")


# Imports it twice, and prints what came of it.
TWICE = """if True:
    for _ in range(2):
        try:
            from vptq_runtime import _native
        except ImportError as error:
            print(error)
"""


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("difference", ["version", "interface"])
def test_built_from_other_sources(difference: str, clone: Path, installed: Path) -> None:
    version = vptq_runtime.__version__
    if difference == "version":
        change(clone / "__init__.py", f'__version__ = "{version}"', '__version__ = "7.8.9"')
        found, expected = f"version {version}, .*", r"7\.8\.9, .*"
    else:
        change(clone / "_native.pyi", "def cpu_isas()", "def cpu_isas(best: bool)")
        found = f"version {version}, interface {_native.interface[:12]}"
        expected = f"{version}, [0-9a-f]{{12}}"
    result = run(TWICE, clone, installed)
    assert result.stderr == ""
    first, second = result.stdout.splitlines()
    assert first == second
    message = (
        rf"{installed}/_native\..*: found a native library of {found}, expected {expected}, as of {clone}: .*"
    )
    assert re.fullmatch(message + "`pip install .`.*", first)


def test_a_build_that_does_not_say_what_it_was_made_from(clone: Path, installed: Path) -> None:
    for library in installed.glob("_native.*"):
        library.unlink()
    (installed / "_native.py").touch()
    result = run(TWICE, clone, installed)
    assert result.stderr == ""
    first, second = result.stdout.splitlines()
    assert first == second
    assert f"{installed}/_native.py: found a native library of version unknown, interface unknown" in first


def test_no_library_at_all(clone: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in installed.glob("_native.*"):
        library.unlink()
    monkeypatch.setattr(sys, "path", [])  # where this build is
    result = run(TWICE, clone, installed)
    assert result.stderr == ""
    expected = f"{clone}: found no native library, expected one: run `pip install .` in {clone.parent}"
    assert result.stdout.splitlines() == [expected] * 2


def test_commands_say_it_in_one_line(clone: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from vptq_runtime.commands.run import main; raise SystemExit(main(['-m', 'x.gguf', '-p', 'x']))"

    def said() -> str:
        result = run(code, clone, installed)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        return result.stderr

    change(clone / "__init__.py", f'__version__ = "{vptq_runtime.__version__}"', '__version__ = "7.8.9"')
    assert said().startswith(f"vptq-run: error: {installed}/_native.")
    for library in installed.glob("_native.*"):
        library.unlink()
    monkeypatch.setattr(sys, "path", [])
    assert said().startswith(f"vptq-run: error: {clone}: found no native library, expected one")
