"""What a release is made of, written last and checked first.

Why it exists: a head with another head's index gives plausible nonsense and no error. The manifest ties
every file of a release together by digest and says what made them: which features, which labels, which
teacher, which parent. It needs neither torch nor faiss, so the gateway can read it too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from byline.errors import ReleaseCorrupt

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
HEAD = "head.safetensors"
EMBEDDINGS = "embeddings.faiss"
CATALOGUE = "catalogue.parquet"
CALIBRATOR = "calibrator.json"
GOLDEN = "golden.safetensors"
REQUIRED_FILES = (HEAD, EMBEDDINGS, CATALOGUE, CALIBRATOR, GOLDEN)
#: All three or none: a release that has them serves the ESTIMATED tier.
SKETCHES = "sketches.faiss"
SKETCH_BASIS = "sketch_basis.safetensors"
SKETCH_GOLDEN = "sketch_golden.safetensors"
SKETCH_FILES = (SKETCHES, SKETCH_BASIS, SKETCH_GOLDEN)
#: Beside them where the teacher's layers read the text alone: exact scores instead of approximate ones.
SKETCH_TOKENS = "sketch_tokens.safetensors"

_ReleaseId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
_FileName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+\.[a-z0-9]+$")]
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(BaseModel):
    """One file of the release."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: _Digest
    bytes: int = Field(ge=0)


class LabelSet(BaseModel):
    """Which rankings the head learnt from: how many queries, and a digest of all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queries: int = Field(ge=0)
    digest: str


class IndexTrial(BaseModel):
    """One tier that was tried: the effort it needed, the recall it reached, its modelled work for a query."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factory: str
    effort: dict[str, float]
    recall: float = Field(ge=0, le=1)
    bytes_per_item: float = Field(ge=0)
    work_ms: float = Field(ge=0)
    accepted: bool


class IndexSection(BaseModel):
    """Which index was chosen and why (``byline.index.choice``).

    ``recall`` at ``recall_at`` against exact search, over ``queries`` queries; 0 of them: exact by construction.
    ``forced``: a setting asked for this factory. ``effort`` are the search parameters, kept in the file as well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    factory: str
    forced: bool
    reason: str
    target: float = Field(ge=0, le=1)
    recall_at: int = Field(gt=0)
    recall: float = Field(ge=0, le=1)
    queries: int = Field(ge=0)
    bytes_per_item: float = Field(ge=0)
    effort: dict[str, float] = Field(default_factory=dict)
    tried: tuple[IndexTrial, ...] = ()


class SketchSection(BaseModel):
    """What the sketches of a release are, and how near to the teacher they come.

    ``teacher_id`` is the teacher they were fitted from, ``selection`` the layers whose gradients they hold,
    ``query_draws`` the noise draws of the queries that ``fidelity`` was measured with (against the teacher's
    ranking of the whole corpus: ``map100``, ``spearman`` …, by name). ``token_rank`` is that of the token
    gradients, 0 for a release without.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher_id: str
    dimensions: int = Field(gt=0)
    selection: str
    query_draws: int = Field(ge=0)
    token_rank: int = Field(default=0, ge=0)
    fidelity: dict[str, float] = Field(default_factory=dict)
    #: None: a release from before indexes were chosen, whose sketches are searched exactly.
    index: IndexSection | None = None


class RefreshTrigger(BaseModel):
    """One reason why the refresh was begun."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trigger: str
    detail: str = ""


class RefreshSection(BaseModel):
    """Why a trainer made this release, from what, and how its head was found.

    ``snapshot_at``: the database's time when labels and items were read; what came later is in the next release.
    ``start`` is what the head was continued from: ``fresh``, ``warm`` (the active head), or ``kept`` (it *is* the
    active head, as only the corpus changed); ``validation_map`` what each that was tried reached. ``held_out`` names
    the queries that judged it by a digest: no head was ever trained on them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    triggers: tuple[RefreshTrigger, ...]
    snapshot_at: datetime
    start: str
    validation_map: dict[str, float] = Field(default_factory=dict)
    held_out_split: str
    held_out_queries: int = Field(ge=0)
    held_out_digest: str


class ReleaseManifest(BaseModel):
    """The whole description of one release. Immutable; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: int = SCHEMA_VERSION
    release_id: _ReleaseId
    model_id: str
    model_revision: str
    corpus_id: str
    parent: str | None = None
    created_at: datetime
    feature_spec: str
    preprocessing_hash: str
    feature_dim: int = Field(gt=0)
    embedding_dim: int = Field(gt=0)
    items: int = Field(gt=0)
    index_factory: str
    teacher_id: str
    labels: LabelSet
    metrics: dict[str, Any] = Field(default_factory=dict)
    git_sha: str = ""
    #: None: the release has no sketches and cannot serve the ESTIMATED tier.
    sketches: SketchSection | None = None
    #: How the index of the embeddings was chosen; None in releases from before that was measured.
    index: IndexSection | None = None
    #: None: not made by a trainer.
    refresh: RefreshSection | None = None
    files: dict[_FileName, FileEntry]

    @field_validator("created_at")
    @classmethod
    def _aware(cls, value: datetime) -> datetime:
        if value.tzinfo is None:
            raise ValueError("must carry a time zone")
        return value.astimezone(UTC)

    @field_validator("schema_version")
    @classmethod
    def _known_schema(cls, value: int) -> int:
        if value != SCHEMA_VERSION:
            raise ValueError(f"is {value}, this version reads {SCHEMA_VERSION}")
        return value

    @field_validator("files")
    @classmethod
    def _complete(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        missing = sorted(set(REQUIRED_FILES) - set(value))
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}")
        return value

    @model_validator(mode="after")
    def _one_index(self) -> ReleaseManifest:
        if self.index is not None and self.index.factory != self.index_factory:
            raise ValueError(f"index_factory {self.index_factory} is not that of section index, {self.index.factory}")
        return self

    @model_validator(mode="after")
    def _whole_sketches(self) -> ReleaseManifest:
        wanted = set(SKETCH_FILES) if self.sketches is not None else set()
        if set(SKETCH_FILES) & set(self.files) != wanted:
            raise ValueError(f"section sketches and files {', '.join(SKETCH_FILES)} come together or not at all")
        if (SKETCH_TOKENS in self.files) != (self.sketches is not None and self.sketches.token_rank > 0):
            raise ValueError(f"{SKETCH_TOKENS} and a token_rank of the sketches come together or not at all")
        return self

    def to_json(self) -> dict[str, Any]:
        """JSON values, as stored in ``releases.manifest`` and in the file."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: object) -> ReleaseManifest:
        """Parse what ``to_json`` gave. ReleaseCorrupt names every field that is wrong."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ReleaseCorrupt(f"the manifest is not usable: {faults}") from error

    @property
    def digest(self) -> str:
        """sha256 over the canonical JSON: two manifests with the same digest describe the same bytes."""
        return hashlib.sha256(_canonical(self.to_json())).hexdigest()

    def write(self, directory: Path) -> None:
        """Write ``manifest.json`` into a directory (the builder makes it durable)."""
        (directory / MANIFEST).write_text(json.dumps(self.to_json(), indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, directory: Path) -> ReleaseManifest:
        """The manifest of a release directory. ReleaseCorrupt when it is missing or not usable."""
        path = directory / MANIFEST
        try:
            value = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ReleaseCorrupt(f"{path} is missing or not JSON", file=MANIFEST) from error
        return cls.from_json(value)


def make_release_id(created_at: datetime, *parts: str) -> str:
    """A name that sorts by time and differs by contents: ``2026-09-12T10-03-07Z-3f9c1a2b``."""
    digest = hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:8]
    return f"{created_at.astimezone(UTC):%Y-%m-%dT%H-%M-%SZ}-{digest}"


def file_entry(path: Path) -> FileEntry:
    """Digest and size of a file, read in chunks. OSError when it cannot be read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(sha256=digest, bytes=path.stat().st_size)


def verify_files(directory: Path, manifest: ReleaseManifest, names: Collection[str] | None = None) -> None:
    """Compare every file, or those named, with the manifest. ReleaseCorrupt names the first that is missing or altered.
    """
    for name, expected in manifest.files.items():
        if names is not None and name not in names:
            continue
        try:
            found = file_entry(directory / name)
        except OSError as error:
            raise ReleaseCorrupt(
                f"{name} of release {manifest.release_id} is missing", file=name, release_id=manifest.release_id
            ) from error
        if found != expected:
            raise ReleaseCorrupt(
                f"{name} of release {manifest.release_id} was altered: its sha256 is {found.sha256[:16]}…, "
                f"the manifest says {expected.sha256[:16]}…",
                file=name, release_id=manifest.release_id,
            )  # fmt: skip


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
