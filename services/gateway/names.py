"""Resource names: ``projects/{project}/attributionJobs/{job}`` and its kin, built and taken apart in one place.

Why it exists: a name is the only thing a client hands back to us, so each part of it is checked once, here,
before it reaches a query.
"""

from __future__ import annotations

import re
import uuid

from byline.errors import InvalidRequest

_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_PROJECT = re.compile(rf"projects/({_ID})")
_JOB = re.compile(rf"projects/({_ID})/attributionJobs/([0-9a-fA-F-]{{36}})")
_IMAGE = re.compile(rf"projects/({_ID})/images/([0-9a-f]{{64}})")
_MODEL = re.compile(rf"models/({_ID})")
_RELEASE = re.compile(rf"models/({_ID})/releases/({_ID})")
_CORPUS = re.compile(rf"corpora/({_ID})")
_ITEM = re.compile(rf"corpora/({_ID})/items/(\d{{1,19}})")
_WITHDRAWAL = re.compile(rf"corpora/({_ID})/withdrawals/([0-9a-fA-F-]{{36}})")
MAX_INT64 = 2**63 - 1


def project(project_id: str) -> str:
    """``projects/{project}``."""
    return f"projects/{project_id}"


def job(project_id: str, job_id: uuid.UUID) -> str:
    """``projects/{project}/attributionJobs/{job}``."""
    return f"projects/{project_id}/attributionJobs/{job_id}"


def image(project_id: str, sha256: str) -> str:
    """``projects/{project}/images/{sha256}``."""
    return f"projects/{project_id}/images/{sha256}"


def model(model_id: str) -> str:
    """``models/{model}``."""
    return f"models/{model_id}"


def release(model_id: str, release_id: str) -> str:
    """``models/{model}/releases/{release}``; empty for an empty id."""
    return f"models/{model_id}/releases/{release_id}" if release_id else ""


def corpus(corpus_id: str) -> str:
    """``corpora/{corpus}``."""
    return f"corpora/{corpus_id}"


def item(corpus_id: str, item_id: int) -> str:
    """``corpora/{corpus}/items/{item}``."""
    return f"corpora/{corpus_id}/items/{item_id}"


def withdrawal(corpus_id: str, receipt_id: uuid.UUID) -> str:
    """``corpora/{corpus}/withdrawals/{withdrawal}``."""
    return f"corpora/{corpus_id}/withdrawals/{receipt_id}"


def parse_project(name: str, field: str = "parent") -> str:
    """The project id. InvalidRequest names ``field``."""
    return _match(_PROJECT, name, field, "projects/{project}")[0]


def parse_job(name: str, field: str = "name") -> tuple[str, uuid.UUID]:
    """Project id and job id."""
    expected = "projects/{project}/attributionJobs/{uuid}"
    project_id, job_id = _match(_JOB, name, field, expected)
    try:
        return project_id, uuid.UUID(job_id)
    except ValueError as error:
        raise _invalid(field, name, expected) from error


def parse_image(name: str, field: str) -> tuple[str, str]:
    """Project id and sha256."""
    project_id, sha256 = _match(_IMAGE, name, field, "projects/{project}/images/{sha256}")
    return project_id, sha256


def parse_model(name: str, field: str) -> str:
    """The model id."""
    return _match(_MODEL, name, field, "models/{model}")[0]


def parse_release(name: str, field: str = "name") -> tuple[str, str]:
    """Model id and release id."""
    model_id, release_id = _match(_RELEASE, name, field, "models/{model}/releases/{release}")
    return model_id, release_id


def parse_corpus(name: str, field: str = "parent") -> str:
    """The corpus id."""
    return _match(_CORPUS, name, field, "corpora/{corpus}")[0]


def parse_item(name: str, field: str = "name") -> tuple[str, int]:
    """Corpus id and item id."""
    expected = "corpora/{corpus}/items/{item}"
    corpus_id, item_id = _match(_ITEM, name, field, expected)
    if int(item_id) > MAX_INT64:
        raise _invalid(field, name, expected)
    return corpus_id, int(item_id)


def parse_withdrawal(name: str, field: str = "name") -> tuple[str, uuid.UUID]:
    """Corpus id and receipt id."""
    expected = "corpora/{corpus}/withdrawals/{uuid}"
    corpus_id, receipt_id = _match(_WITHDRAWAL, name, field, expected)
    try:
        return corpus_id, uuid.UUID(receipt_id)
    except ValueError as error:
        raise _invalid(field, name, expected) from error


def _match(pattern: re.Pattern[str], name: str, field: str, expected: str) -> tuple[str, ...]:
    found = pattern.fullmatch(name)
    if found is None:
        raise _invalid(field, name, expected)
    return found.groups()


def _invalid(field: str, name: str, expected: str) -> InvalidRequest:
    return InvalidRequest(field, f"must have the form {expected}", value=name[:200])
