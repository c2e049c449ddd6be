"""Every setting of every program, validated once, with one readable list of what is wrong.

Why it exists: a service must fail at start, naming all its bad settings at once, and never in the
middle of a job. Settings come from ``BYLINE_*`` environment variables; a secret may come from the
file named by ``BYLINE_<NAME>_FILE``. Nothing is read when this module is imported and there is no
global instance: a program calls :func:`load_settings` and passes the result on.

Where the servers are is answered lazily: ``BYLINE_DATABASE_URL``, ``BYLINE_REDIS_URL`` and
``BYLINE_GRPC_ADDRESS`` win; without them the private servers running under ``state_dir`` are used.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from byline import failpoints
from byline.embedded.discovery import discover
from byline.errors import SettingsInvalid
from byline.security.settings import SECRETS, SecuritySettings

ENV_PREFIX = "BYLINE_"
DEFAULT_GRPC_ADDRESS = "127.0.0.1:50551"
#: Settings that may be given as the path of a file which holds the value.
SECRET_FIELDS = ("database_url", "redis_url", "page_token_key", *SECRETS)
#: Settings that are paths; a relative one is relative to where the program was started.
PATH_FIELDS = ("state_dir", "blob_dir", "release_dir", "cache_dir", "model_directory", "corpus_source", "labels_dir")

#: Names of the registered teachers and layer selections. Repeated here because the registries import torch and the
#: gateway must not; a test holds them equal.
TEACHER_NAMES = (
    "abu_plus", "abu_plus_linear", "abu", "abu_linear", "gradient_linear", "sketch", "trak", "d_trak",
    *(f"similarity:{name}" for name in (
        "efficientnet_lite0", "minilm", "denoiser", "dino", "dinov2", "clip_image", "clip_text", "pixels")),
)  # fmt: skip
#: Index factories that can be forced; the same list as ``byline.index.factory``, which imports faiss.
INDEX_FACTORIES = r"^(auto|Flat|SQ8,RFlat|IVF\d+,SQ8,RFlat|(RR\d+,)?IVF\d+,RaBitQ,RFlat|HNSW\d+,Flat|Milvus:\S+)$"
LAYER_SELECTIONS = ("cross_attention_kv", "cross_attention", "attention", "linear", "all")
Aggregation = Literal["sum", "skew", "unit"]
Objective = Literal["denoising", "output_norm"]


def repository_root() -> Path:
    """The checkout this package runs from, or the working directory when it was installed as a wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def _server(name: str) -> Any:
    """A field filled from ``BYLINE_<NAME>`` or the keyword ``name``; empty means "look for a private server"."""
    return Field("", validation_alias=AliasChoices(name, (ENV_PREFIX + name).lower()), repr=False)


class Settings(SecuritySettings):
    """Settings of one process. Durations in seconds, sizes in bytes, addresses as host:port."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, case_sensitive=False, extra="forbid", frozen=True, populate_by_name=True,
        protected_namespaces=(),
    )

    # Where things are. Use the properties database_url, redis_url and grpc_address.
    configured_database_url: str = _server("database_url")
    configured_redis_url: str = _server("redis_url")
    configured_grpc_address: str = _server("grpc_address")
    state_dir: Path = Path(".byline")
    blob_dir: Path = Path()
    release_dir: Path = Path()
    cache_dir: Path = Path()
    model_directory: Path = Field(default_factory=lambda: repository_root() / "data" / "generator")
    corpus_source: Path = Field(default_factory=lambda: repository_root() / "data" / "openclipart" / "items.parquet")
    labels_dir: Path = Field(default_factory=lambda: repository_root() / "data" / "labels")

    # What is served.
    model_id: str = "openclipart"
    corpus_id: str = "openclipart"
    #: Models that workers answer for besides ``model_id``: ``*`` (every registered one), or names with commas between.
    serve_models: str = Field("*", pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9._-]*(,\s*[A-Za-z0-9][A-Za-z0-9._-]*)*|)$")
    project_id: str = Field("default", min_length=1, max_length=64)

    # Jobs.
    lease_seconds: float = Field(30.0, gt=0, le=3600)
    heartbeat_seconds: float = Field(0.0, ge=0)
    max_attempts: int = Field(3, ge=1, le=20)
    job_ttl_seconds: float = Field(86_400.0, gt=0)
    lookup_queue_bound: int = Field(10_000, ge=1)
    verification_queue_bound: int = Field(1_000, ge=1)
    #: The most of a queue's bound that one project may fill.
    project_queue_share: float = Field(0.5, gt=0, le=1)
    default_top_k: int = Field(20, ge=1)
    max_top_k: int = Field(1_000, ge=1)
    max_image_bytes: int = Field(8 * 1024 * 1024, ge=1)
    max_image_pixels: int = Field(25_000_000, ge=1)
    max_prompt_characters: int = Field(2_000, ge=1)
    page_token_key: str = Field("", repr=False)

    # The method.
    feature_spec: str = "minilm+gradient"
    verify_teacher: str = "abu_plus"
    verify_candidates: int = Field(40, ge=1)
    verify_draws: int = Field(64, ge=1)
    verify_selection: str = "cross_attention_kv"
    verify_damping: float = Field(0.1, gt=0)
    verify_aggregation: Aggregation = "sum"
    verify_objective: Objective = "output_norm"
    #: Stop spending draws on candidates that cannot reach the top_k a job asked for.
    verify_racing: bool = True
    #: Noise draws of the query's gradient in the ESTIMATED tier.
    estimate_draws: int = Field(64, ge=8, multiple_of=8)
    device: str = "cpu"
    torch_threads: int = Field(1, ge=1)
    seed: int = 0

    # Curation: which queries get rankings next.
    curation_teacher: str = "abu_plus_linear"
    curation_selection: str = "cross_attention_kv"
    curation_damping: float = Field(0.1, gt=0)
    curation_aggregation: Aggregation = "sum"
    curation_objective: Objective = "output_norm"
    curation_target_open: int = Field(2, ge=0)
    curation_poll_seconds: float = Field(2.0, gt=0)
    #: Candidates of a query: its nearest, and some at random. 0: the whole corpus.
    curation_candidates: int = Field(400, ge=0)
    #: Queries of one ranking job: they share the pass over their candidates.
    curation_batch: int = Field(8, ge=1, le=256)
    curation_explore_share: float = Field(0.1, ge=0, le=1)
    curation_draws: int = Field(64, ge=1)
    curation_sampling_steps: int = Field(50, ge=1)
    curation_guidance: float = Field(3.0, ge=0)
    #: Rankings of a model from which on curation asks for no more. 0: no limit.
    curation_max_rankings: int = Field(0, ge=0)
    #: Prompts beside the corpus's captions, one a line.
    curation_prompt_file: Path | None = None

    # Trainer: when to fit again, and what a release must reach.
    trainer_min_new_rankings: int = Field(8, ge=1)
    trainer_interval_seconds: float = Field(3_600.0, gt=0)
    trainer_poll_seconds: float = Field(5.0, gt=0)
    #: A changed corpus is refreshed once it has been still for so long.
    trainer_settle_seconds: float = Field(60.0, ge=0)
    #: Files of old releases stay: of the newest that can answer, and of all that are younger.
    release_keep: int = Field(3, ge=0)
    release_keep_days: float = Field(7.0, ge=0)
    trainer_loss: str = "listwise"
    #: Labels count as far as their standard errors let them be trusted (docs/studies.md, *options*).
    trainer_weighted: bool = False
    trainer_epochs: int = Field(40, ge=1)
    #: Columns of an embedding at most; a head is fitted in full and cut to its best ones.
    trainer_width: int = Field(768, ge=8)
    #: Index of new releases: ``auto`` (by size and measured recall) or a factory string (docs/index.md).
    index_factory: str = Field("auto", pattern=INDEX_FACTORIES)
    gate_map_floor: float = Field(0.05, ge=0, le=1)
    gate_map_at: int = Field(100, ge=1)
    gate_regression_tolerance: float = Field(0.01, ge=0, le=1)
    gate_confidence: float = Field(0.95, gt=0, lt=1)
    #: So much worse one kind of query may get; more refuses a release where it is sure (1: never).
    gate_slice_tolerance: float = Field(0.02, ge=0, le=1)
    #: At most so far off are probabilities on average, and so many null queries attributed (1: never refuse for it).
    gate_calibration_error: float = Field(0.05, ge=0, le=1)
    gate_false_attribution: float = Field(0.05, ge=0, le=1)

    # Operation.
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["auto", "json", "console"] = "auto"
    #: An OpenTelemetry collector's OTLP/HTTP address, as http://collector:4318 (empty: spans stay in the logs), and
    #: which share of the traces that begin here it gets.
    otlp_endpoint: str = Field("", pattern=r"^(https?://\S+|)$")
    trace_share: float = Field(1.0, ge=0, le=1)
    #: An idle worker sends itself a message so often; two that do not come back end it (0: off).
    canary_seconds: float = Field(20.0, ge=0)
    drain_seconds: float = Field(10.0, ge=0)

    @field_validator(*PATH_FIELDS)
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute() if value != Path() else value

    @field_validator("verify_teacher", "curation_teacher")
    @classmethod
    def _registered_teacher(cls, value: str) -> str:
        if value not in TEACHER_NAMES:
            raise ValueError(f"no teacher is called {value!r}; choose one of {', '.join(TEACHER_NAMES)}")
        return value

    @field_validator("verify_selection", "curation_selection")
    @classmethod
    def _known_selection(cls, value: str) -> str:
        if value not in LAYER_SELECTIONS:
            raise ValueError(f"no layer selection is called {value!r}; choose one of {', '.join(LAYER_SELECTIONS)}")
        return value

    @field_validator("configured_database_url")
    @classmethod
    def _postgres_scheme(cls, value: str) -> str:
        if value.startswith(("postgresql://", "postgres://")):
            return "postgresql+psycopg://" + value.split("://", 1)[1]
        if value and not value.startswith("postgresql+psycopg://"):
            raise ValueError("must be a postgresql:// URL")
        return value

    @field_validator("configured_redis_url")
    @classmethod
    def _redis_scheme(cls, value: str) -> str:
        if value and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must be a redis://, rediss:// or unix:// URL")
        return value

    @field_validator("configured_grpc_address")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        port = value.rpartition(":")[2]
        if value and (":" not in value or not port.isdigit() or int(port) > 65_535):
            raise ValueError("must be host:port")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Defaults that depend on other settings: the folders under state_dir, a third of the lease."""
        state = data["state_dir"] = Path(data.get("state_dir", ".byline")).expanduser().absolute()
        for name, folder in (("blob_dir", "blobs"), ("release_dir", "releases"), ("cache_dir", "cache")):
            data.setdefault(name, state / folder)
        with suppress(ValueError):  # lease_seconds is not a number: its own field reports that.
            data.setdefault("heartbeat_seconds", float(data.get("lease_seconds", 30.0)) / 3)
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if not 0 < self.heartbeat_seconds < self.lease_seconds:
            raise ValueError("heartbeat_seconds must be positive and shorter than lease_seconds")
        if self.default_top_k > self.max_top_k:
            raise ValueError("default_top_k must not exceed max_top_k")
        for kind, teacher, aggregation in (
            ("verify", self.verify_teacher, self.verify_aggregation),
            ("curation", self.curation_teacher, self.curation_aggregation),
        ):
            if teacher in ("abu_plus", "abu") and aggregation == "unit":
                raise ValueError(f"{kind}_aggregation 'unit' needs gradients, which {teacher} has not: use sum or skew")
        return self

    @property
    def verify_teacher_settings(self) -> dict[str, object]:
        """Layer selection and teacher settings of the verification stage, as the workers' bench takes them."""
        return {"selection": self.verify_selection, "damping": self.verify_damping,
                "aggregation": self.verify_aggregation, "objective": self.verify_objective}

    @property
    def curation_family(self) -> str:
        """The family of curation's labels, as it stands first in their teacher ids: method and objective."""
        unlearning = not self.curation_teacher.startswith(("trak", "d_trak", "similarity:"))
        other = unlearning and self.curation_objective != "denoising"
        return f"{self.curation_teacher}+{self.curation_objective}" if other else self.curation_teacher

    @property
    def curation_teacher_settings(self) -> dict[str, object]:
        """The same for curation; its labels share one noise set over all items (design §7: worth 1.3x the draws)."""
        return {"noise": "shared", "selection": self.curation_selection, "damping": self.curation_damping,
                "aggregation": self.curation_aggregation, "objective": self.curation_objective}

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of Postgres. Raises SettingsInvalid when none is configured and none is running."""
        if self.configured_database_url:
            return self.configured_database_url
        servers = discover(self.state_dir)
        return servers.database_url if servers else _none_running("database", "BYLINE_DATABASE_URL", self.state_dir)

    @property
    def redis_url(self) -> str:
        """URL of Redis. Raises SettingsInvalid when none is configured and none is running."""
        if self.configured_redis_url:
            return self.configured_redis_url
        servers = discover(self.state_dir)
        return servers.redis_url if servers else _none_running("Redis", "BYLINE_REDIS_URL", self.state_dir)

    @property
    def grpc_address(self) -> str:
        """Where the gateway listens and clients call: configured, else announced by ``byline up``, else the default."""
        configured = self.configured_grpc_address
        if configured and not configured.endswith(":0"):
            return configured
        servers = discover(self.state_dir)
        return (servers.grpc_address if servers else configured) or DEFAULT_GRPC_ADDRESS


def as_environment(settings: Settings) -> dict[str, str]:
    """Environment variables that give another process, started elsewhere, the settings of this one.

    Secrets are included; defaults are not, except paths, which may depend on the working directory.
    """
    names = settings.model_fields_set | set(PATH_FIELDS)
    return {
        ENV_PREFIX + name.removeprefix("configured_").upper(): str(getattr(settings, name))
        for name in sorted(names)
        if str(getattr(settings, name)) != ""
    }


def _none_running(what: str, variable: str, state_dir: Path) -> str:
    raise SettingsInvalid(
        f"no {what} is configured and none runs under {state_dir}: start one with `byline up`, or set {variable}",
        variable=variable, state_dir=state_dir,
    )


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, the files named by ``BYLINE_*_FILE`` and ``overrides`` (which win).

    Raises SettingsInvalid whose message lists every problem, one a line.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    known = {name.removeprefix("configured_") for name in Settings.model_fields}
    for variable in sorted(os.environ):
        name = variable.removeprefix(ENV_PREFIX).lower()
        if not variable.startswith(ENV_PREFIX) or name in known or name.startswith("test_"):
            continue
        if variable == failpoints.VARIABLE:
            try:
                failpoints.check_environment()
            except SettingsInvalid as error:
                problems.append(error.message)
            continue
        if name.removesuffix("_file") in SECRET_FIELDS and name.endswith("_file"):
            try:
                values[name.removesuffix("_file")] = Path(os.environ[variable]).read_text().strip()
            except OSError as error:
                problems.append(f"{variable}: cannot read {os.environ[variable]}: {error.strerror}")
        else:
            problems.append(f"{variable}: no such setting")
    for name in sorted(set(overrides) - known):
        problems.append(f"{name}: no such setting")
    values.update({name: value for name, value in overrides.items() if value is not None and name in known})
    settings: Settings | None = None
    try:
        settings = Settings(**values)
    except ValidationError as error:
        for detail in error.errors():
            field = ".".join(str(part) for part in detail["loc"]).removeprefix(ENV_PREFIX.lower())
            where = f"{ENV_PREFIX}{field.upper()}: " if field else ""
            problems.append(f"{where}{detail['msg'].removeprefix('Value error, ')}")
    if problems or settings is None:
        raise SettingsInvalid("settings are invalid:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return settings
