"""What the client gives back: frozen values without a trace of gRPC.

Why it exists: programs keep, compare and print answers; they should not have to know a wire format for that,
and a new field of the protos must not change their types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from os import PathLike
from typing import Any, Protocol, TypeAlias


class SavesImage(Protocol):
    """A picture in memory; ``PIL.Image.Image`` is one."""

    def save(self, fp: Any, format: str | None = None) -> Any:
        """Write the picture in a format."""
        ...


#: A file, the file's bytes, or a PIL image.
ImageSource: TypeAlias = str | PathLike[str] | bytes | SavesImage

TERMINAL = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})


@dataclass(frozen=True, slots=True)
class Probability:
    """Calibrated probability to be among the teacher's ``top`` most influential items (0: the release does not say).

    ``low``, ``high`` is an interval of nominal coverage ``coverage``.
    """

    value: float
    low: float
    high: float
    coverage: float
    top: int = 0


@dataclass(frozen=True, slots=True)
class Influence:
    """One training image. Higher ``cosine`` and ``tau`` mean more influential; None means not known in this tier."""

    item_id: int
    rank: int
    cosine: float | None
    tau: float | None
    standard_error: float | None
    probability: Probability | None
    retrieved_rank: int | None
    caption: str
    creator: str
    licence: str
    near_duplicate_group: int
    image_sha256: str
    #: Resource name, ``corpora/{corpus}/items/{item}``.
    name: str
    #: Other found items of the same near-duplicate group; they take no place of their own.
    copies: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CreatorShare:
    """One creator's share under a credit policy, 0..1, and the items it comes from."""

    creator: str
    share: float
    item_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Credit:
    """Credit by creator under a named policy; shares and ``unattributed`` sum to 1."""

    policy: str
    shares: tuple[CreatorShare, ...]
    unattributed: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one tier (RETRIEVED, ESTIMATED or VERIFIED), all of it from one release."""

    tier: str
    release: str
    model_revision: str
    #: True when nothing rises above the noise floor, or the evidence says that the model did not make this image from
    #: this prompt; None when the release has no noise floor for such a query.
    not_attributable: bool | None
    noise_floor: float | None
    influences: tuple[Influence, ...]
    #: How many influences are left out because their item was withdrawn since.
    withdrawn_influences: int
    teacher_id: str
    draws: int
    credit: Credit | None
    timings_ms: Mapping[str, float]
    create_time: datetime | None
    #: How much better the model predicts the image with the prompt than without, and what that must reach; None where
    #: not known, or not asked for.
    evidence: float | None = None
    evidence_floor: float | None = None
    #: Which additions were searched: of the release's delta, and of the corpus (None: nobody has compared them yet).
    delta_sequence: int = 0
    corpus_sequence: int | None = None
    #: Distance of the query to the nearest one the student has learnt from, and beyond which it is far from all it
    #: knows; None where not known.
    labelled_distance: float | None = None
    labelled_distance_limit: float | None = None
    far_from_labelled: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a job failed: canonical code, stable reason, message for people."""

    code: str
    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """One attribution request as it was when it was read."""

    name: str
    model: str
    prompt: str
    image: str
    tier: str
    top_k: int
    candidates: int
    verification: str
    state: str
    stage: str
    progress_done: int
    progress_total: int
    release: str
    answers: tuple[Answer, ...]
    error: Problem | None
    verification_error: Problem | None
    attempt: int
    revision: int
    request_id: str
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    expire_time: datetime | None

    @property
    def id(self) -> str:
        """The job's UUID: the last part of its name."""
        return self.name.rpartition("/")[2]

    @property
    def done(self) -> bool:
        """Whether the job has ended."""
        return self.state in TERMINAL

    @property
    def answer(self) -> Answer | None:
        """The best answer so far."""
        return self.answers[-1] if self.answers else None

    def answer_of(self, tier: str) -> Answer | None:
        """The answer of one tier, if it is there."""
        return next((answer for answer in self.answers if answer.tier == tier), None)


@dataclass(frozen=True, slots=True)
class Attribution:
    """An answer together with the job that asked for it. Iterates over its influences."""

    job: Job
    answer: Answer

    @property
    def tier(self) -> str:
        """The tier of the answer."""
        return self.answer.tier

    @property
    def release(self) -> str:
        """The release that produced it."""
        return self.answer.release

    @property
    def influences(self) -> tuple[Influence, ...]:
        """The training images, most influential first."""
        return self.answer.influences

    @property
    def not_attributable(self) -> bool:
        """Whether the answer says that nothing can be attributed; see ``Answer.not_attributable``."""
        return bool(self.answer.not_attributable)

    def __iter__(self) -> Iterator[Influence]:
        return iter(self.answer.influences)

    def __len__(self) -> int:
        return len(self.answer.influences)


@dataclass(frozen=True, slots=True)
class Sketches:
    """What a release answers tier ESTIMATED from; ``fidelity`` is the agreement with their teacher, by name."""

    teacher_id: str
    dimensions: int
    selection: str
    query_draws: int
    fidelity: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Refresh:
    """Why and how a trainer made a release. ``triggers``: (what, what was seen); ``start``: fresh, warm or kept."""

    triggers: tuple[tuple[str, str], ...]
    snapshot_time: datetime | None
    start: str
    validation_map: Mapping[str, float]
    held_out_split: str
    held_out_queries: int
    labels_digest: str


@dataclass(frozen=True, slots=True)
class Release:
    """A release of a model and how it fared."""

    name: str
    state: str
    parent: str
    model_revision: str
    corpus: str
    feature_spec: str
    embedding_dim: int
    items: int
    teacher_id: str
    label_queries: int
    metrics: Mapping[str, float]
    reason: str
    create_time: datetime | None
    #: None where the release does not serve tier ESTIMATED.
    sketches: Sketches | None = None
    #: None where no trainer made it.
    refresh: Refresh | None = None
    #: When its files were removed.
    collect_time: datetime | None = None

    @property
    def id(self) -> str:
        """The release's id: the last part of its name."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class ActiveRelease:
    """Which release answers now. ``epoch`` rises with every activation."""

    release: str
    previous_release: str
    epoch: int
    update_time: datetime | None


@dataclass(frozen=True, slots=True)
class StageStatus:
    """The work of one stage."""

    stage: str
    queued: int
    running: int
    oldest_wait: timedelta | None
    paused: bool


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker process."""

    worker_id: str
    queue: str
    release_id: str
    error: str
    start_time: datetime | None
    last_seen_time: datetime | None
    #: An operator drains it; ``drained_time`` is since when it holds nothing.
    draining: bool = False
    drained_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """All stages and the workers heard of lately."""

    stages: tuple[StageStatus, ...]
    workers: tuple[WorkerStatus, ...]


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Receipt of a withdrawal: from ``effective_time`` on, the first two are in no answer."""

    corpus: str
    withdrawn: tuple[int, ...]
    already_withdrawn: tuple[int, ...]
    unknown: tuple[int, ...]
    effective_time: datetime | None
