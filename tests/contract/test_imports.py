"""Who may import whom. The rules of the layout, read from the source, and proved once more by importing.

A rule that only a reviewer holds is broken within a month; a gateway that loads torch is slow to start
and cannot be installed without a gigabyte of packages.
"""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "shared" / "byline"
SERVICES = ROOT / "services"
METHOD = ("diffusion", "features", "teachers", "ranker", "index", "evaluation", "credit")
#: What the method must not know: it runs in a notebook, without service or database.
INFRASTRUCTURE = (
    "byline.jobs", "byline.db", "byline.queue", "byline.rankings", "byline.releases", "byline.catalog",
    "byline.embedded", "byline.client", "byline.cli", "attribution", "sqlalchemy", "psycopg", "celery", "redis", "grpc",
)
HEAVY = ("torch", "faiss", "transformers", "diffusers", "pyarrow", "sklearn")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
#: Imported by packages of the base where they happen to be installed, and not missed where they are not.
OPTIONAL = {"grpc_tools", "opentelemetry", "wrapt", "yaml", "_yaml", "_distutils_hack"}
LIGHT_SERVICES = ("gateway", "dispatcher", "console")


@dataclass(frozen=True)
class Import:
    """One imported module, and where."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "_pb2" not in path.name)


def _imports(path: Path) -> Iterator[Import]:
    importer = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno}: relative import; write the full name"
            assert node.module is not None
            for alias in node.names:
                yield Import(importer, f"{node.module}.{alias.name}", node.lineno)


def _under(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _service_names() -> list[str]:
    return sorted(folder.name for folder in SERVICES.iterdir() if any(folder.glob("*.py")))


def test_the_library_never_imports_a_service() -> None:
    broken = [found for path in _sources(LIBRARY) for found in _imports(path) if _under(found.imported, ("services",))]
    assert not broken, "\n".join(map(str, broken))


def test_a_service_never_imports_another_service() -> None:
    broken = [
        found
        for name in _service_names()
        for path in _sources(SERVICES / name)
        for found in _imports(path)
        if _under(found.imported, ("services",)) and not _under(found.imported, (f"services.{name}",))
    ]
    assert not broken, "\n".join(map(str, broken))


@pytest.mark.parametrize("package", METHOD)
def test_the_method_knows_neither_database_nor_queue_nor_wire(package: str) -> None:
    broken = [
        found
        for path in _sources(LIBRARY / package)
        for found in _imports(path)
        if _under(found.imported, INFRASTRUCTURE)
    ]
    assert not broken, "\n".join(map(str, broken))


def test_only_the_gateway_and_the_client_know_the_wire() -> None:
    allowed = ("services/gateway/", "services/console/", "shared/byline/client/", "shared/byline/client.py")
    broken = [
        found
        for path in [*_sources(LIBRARY), *_sources(SERVICES)]
        for found in _imports(path)
        if _under(found.imported, ("attribution",)) and not found.importer.startswith(allowed)
    ]
    assert not broken, "\n".join(map(str, broken))


def test_pickle_is_imported_nowhere() -> None:
    unsafe = ("pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal")
    broken = [
        found
        for path in [*_sources(LIBRARY), *_sources(SERVICES)]
        for found in _imports(path)
        if _under(found.imported, unsafe)
    ]
    assert not broken, "\n".join(map(str, broken))


def _loaded_by(modules: list[str]) -> set[str]:
    """Import ``modules`` in a fresh interpreter and return which heavy packages that loaded, transitively."""
    code = "import sys, importlib\n"
    code += "".join(f"importlib.import_module({module!r})\n" for module in modules)
    code += f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def _modules(folder: Path, base: Path) -> list[str]:
    names = []
    for path in _sources(folder):
        parts = path.relative_to(base).with_suffix("").parts
        if parts[-1] != "__main__":  # Importing it would do no harm, but it is the program, not a module.
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize("service", LIGHT_SERVICES)
def test_a_light_service_loads_no_heavy_package_however_indirectly(service: str) -> None:
    folder = SERVICES / service
    if not folder.is_dir():
        assert service == "console", f"services/{service} is gone"
        return
    assert _loaded_by(_modules(folder, ROOT)) == set()


def _base_distributions() -> set[str]:
    """What installing byline without extras brings, transitively, by normalised name."""
    found: set[str] = set()
    waiting = [("byline", frozenset[str]())]
    while waiting:
        name, extras = waiting.pop()
        for text in importlib.metadata.distribution(name).requires or []:
            requirement = Requirement(text)
            wanted = [{"extra": extra} for extra in (*extras, "")]
            if requirement.marker and not any(requirement.marker.evaluate(each) for each in wanted):
                continue
            if canonicalize_name(requirement.name) not in found:
                found.add(canonicalize_name(requirement.name))
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found


@pytest.mark.parametrize("service", ["gateway", "dispatcher"])
def test_a_light_service_needs_nothing_but_the_base_installation(service: str) -> None:
    code = "import sys, importlib\n"
    code += "".join(f"importlib.import_module({module!r})\n" for module in _modules(SERVICES / service, ROOT))
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    owners = importlib.metadata.packages_distributions()
    allowed = _base_distributions() | {"byline"}
    surplus = [
        f"{name} of {', '.join(sorted(owners[name]))}"
        for name in sorted(set(done.stdout.split()) - sys.stdlib_module_names - OPTIONAL)
        if name in owners and not {canonicalize_name(owner) for owner in owners[name]} & allowed
    ]
    assert not surplus, "\n".join(surplus)


def test_the_parents_of_forked_workers_load_no_heavy_package() -> None:
    """torch in the parent hangs the forked child."""
    assert _loaded_by(["services.workers.__main__", "byline.queue"]) == set()


def test_the_command_line_and_the_client_load_no_heavy_package() -> None:
    commands = ["byline.cli.app", "byline.cli.up", "byline.cli.status", "byline.cli.submit", "byline.cli.show"]
    assert _loaded_by([*commands, "byline.client"]) == set()


def test_a_module_reads_no_environment_and_starts_nothing_when_imported() -> None:
    """Only functions may read the environment: a value read at import cannot be given by a caller."""
    broken = []
    for path in [*_sources(LIBRARY), *_sources(SERVICES)]:
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        broken += [
            f"{path.relative_to(ROOT)}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and id(node) not in inside
        ]
    assert not broken, "\n".join(broken)
