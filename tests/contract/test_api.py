"""The public API as a contract: lint, comments, stubs that match, errors that have a code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.rpc import code_pb2, error_details_pb2

import byline.client
import byline.errors
from attribution.v1 import (
    attribution_service_pb2,
    catalog_service_pb2,
    curation_service_pb2,
    operator_service_pb2,
    release_service_pb2,
)
from byline.errors import BylineError
from services.gateway import status

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
#: A declaration: message, enum, service, rpc, a field, or an enum value.
DECLARATION = re.compile(
    r"^\s*(message|enum|service|rpc|oneof)\s+\w+"
    r"|^\s*(repeated |optional )?[\w.]+(<.*>)?\s+\w+ = \d+"
    r"|^\s*[A-Z_0-9]+ = \d+;"
)


def subclasses(kind: type[BylineError]) -> Iterator[type[BylineError]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


@pytest.mark.skipif(shutil.which("buf", path=str(Path(sys.executable).parent)) is None, reason="buf-bin not installed")
def test_the_protos_pass_buf_lint_with_comments_required() -> None:
    buf = Path(sys.executable).parent / "buf"
    done = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("buf", path=str(Path(sys.executable).parent)) is None, reason="buf-bin not installed")
def test_the_protos_are_compatible_with_those_that_were_published(tmp_path: Path) -> None:
    """`make publish-protos` after a compatible change is released; never to silence this."""
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}

    def compare(root: Path) -> subprocess.CompletedProcess[str]:
        script = root / "protos" / "breaking.sh"
        return subprocess.run(["sh", script], env=environment, capture_output=True, text=True, timeout=120)

    done = compare(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    # The check is a check: a field taken away is noticed.
    shutil.copytree(PROTOS, tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    changed = tmp_path / "protos" / "attribution" / "v1" / "attribution_service.proto"
    changed.write_text(changed.read_text().replace("bool validate_only = 4", "bool validate_only = 14"))
    done = compare(tmp_path)
    assert done.returncode != 0 and "validate_only" in done.stdout


@pytest.mark.parametrize("path", sorted((PROTOS / "attribution").rglob("*.proto")), ids=lambda path: path.name)
def test_every_declaration_of_the_api_has_a_comment_above_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    naked = [
        f"{path.name}:{number + 1}: {line.strip()}"
        for number, line in enumerate(lines)
        if DECLARATION.match(line) and not line.startswith(("syntax", "import")) and not comment_above(lines, number)
    ]
    assert not naked


def comment_above(lines: list[str], number: int) -> bool:
    return number > 0 and lines[number - 1].lstrip().startswith("//")


def test_the_committed_stubs_are_those_of_the_protos(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    subprocess.run(
        [PROTOS / "generate.sh", tmp_path], env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}, check=True
    )
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*")}
    assert len(made) == 3 * len(list((PROTOS / "attribution").rglob("*.proto")))
    stale = [str(name) for name, text in made.items() if (PROTOS / name).read_text() != text]
    assert not stale, "run `make protos`"


@pytest.mark.parametrize("kind", sorted(subclasses(BylineError), key=lambda k: k.__name__), ids=lambda k: k.__name__)
def test_every_error_has_a_grpc_code_and_a_reason_a_client_may_rely_on(kind: type[BylineError]) -> None:
    assert kind.code in code_pb2.Code.keys() and kind.code != "OK"  # noqa: SIM118
    assert re.fullmatch(r"[A-Z][A-Z0-9_]+[A-Z0-9]", kind.reason) and len(kind.reason) <= 63
    error = kind.__new__(kind)
    BylineError.__init__(error, "what to do", field="prompt")
    made = status.from_error(error)
    assert made.code == code_pb2.Code.Value(kind.code)
    info = error_details_pb2.ErrorInfo()
    assert made.details[0].Unpack(info) and (info.reason, info.domain) == (kind.reason, "attribution.v1")
    wants_retry = kind.retry_after_s is not None
    assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in made.details) is wants_retry


def test_reasons_are_unique_so_that_a_client_can_tell_errors_apart() -> None:
    own = [kind for kind in subclasses(BylineError) if kind.__module__ == byline.errors.__name__]
    reasons = [kind.reason for kind in own if "reason" in vars(kind)]
    assert len(reasons) == len(set(reasons))


def test_every_method_that_creates_takes_a_request_id() -> None:
    for message in ("CreateAttributionJobRequest", "AttributeRequest"):
        assert "request_id" in attribution_service_pb2.DESCRIPTOR.message_types_by_name[message].fields_by_name


def test_the_services_are_complete_on_the_server() -> None:
    from services.gateway.attribution_servicer import AttributionServicer
    from services.gateway.catalog_servicer import CatalogServicer
    from services.gateway.curation_servicer import CurationServicer
    from services.gateway.operator_servicer import OperatorServicer
    from services.gateway.release_servicer import ReleaseServicer

    for module, name, servicer in (
        (attribution_service_pb2, "AttributionService", AttributionServicer),
        (catalog_service_pb2, "CatalogService", CatalogServicer),
        (operator_service_pb2, "OperatorService", OperatorServicer),
        (curation_service_pb2, "CurationService", CurationServicer),
        (release_service_pb2, "ReleaseService", ReleaseServicer),
    ):
        methods = {method.name for method in module.DESCRIPTOR.services_by_name[name].methods}
        assert methods <= set(vars(servicer)), "a method of the API has no handler"


def test_the_gateway_and_the_client_import_neither_torch_nor_faiss() -> None:
    program = (
        "import sys, services.gateway.main, byline.client, byline.cli.submit, byline.cli.page;"
        "print(sorted({'torch', 'faiss', 'diffusers', 'transformers', 'celery'} & set(sys.modules)))"
    )
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'shared'}:{PROTOS}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], env=path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
