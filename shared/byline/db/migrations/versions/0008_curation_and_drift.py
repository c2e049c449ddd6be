"""What curation decides by and drift is measured in.

Why it exists: pauses and budgets must survive a restart, and whoever reads a label must learn why its query was chosen,
where its candidates came from and how far the student was off. ``jobs`` gets an index of those that may be learnt from.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_TABLES = """
CREATE TABLE curation_controls (
    model_id TEXT NOT NULL,
    paused BOOLEAN DEFAULT false NOT NULL,
    queries_per_hour DOUBLE PRECISION,
    gpu_share DOUBLE PRECISION,
    uniform_share DOUBLE PRECISION,
    repeat_share DOUBLE PRECISION,
    drift_share DOUBLE PRECISION,
    reason TEXT DEFAULT '' NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_curation_controls PRIMARY KEY (model_id)
);
CREATE TABLE query_choices (
    query_id UUID NOT NULL,
    model_id TEXT NOT NULL,
    chosen_for TEXT NOT NULL,
    chance DOUBLE PRECISION,
    release_id TEXT,
    at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_query_choices PRIMARY KEY (query_id),
    CONSTRAINT ck_query_choices_chosen_for CHECK (chosen_for IN ('uniform', 'far', 'disagreement', 'live', 'drift')),
    CONSTRAINT fk_query_choices_query_id_queries FOREIGN KEY(query_id) REFERENCES queries (id) ON DELETE CASCADE
);
CREATE INDEX ix_query_choices_model_id_at ON query_choices (model_id, at);
CREATE TABLE shortlists (
    query_id UUID NOT NULL,
    candidate_set TEXT NOT NULL,
    nearest BYTEA NOT NULL,
    by_head BYTEA NOT NULL,
    explored BYTEA NOT NULL,
    outside INTEGER NOT NULL,
    release_id TEXT,
    CONSTRAINT pk_shortlists PRIMARY KEY (query_id, candidate_set),
    CONSTRAINT fk_shortlists_query_id_queries FOREIGN KEY(query_id) REFERENCES queries (id) ON DELETE CASCADE
);
CREATE TABLE label_repeats (
    query_id UUID NOT NULL,
    model_id TEXT NOT NULL,
    candidate_set TEXT NOT NULL,
    job_id UUID NOT NULL,
    at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_label_repeats PRIMARY KEY (query_id),
    CONSTRAINT fk_label_repeats_query_id_queries FOREIGN KEY(query_id) REFERENCES queries (id) ON DELETE CASCADE
);
CREATE TABLE live_intake (
    job_id UUID NOT NULL,
    purpose TEXT NOT NULL,
    model_id TEXT NOT NULL,
    prompt TEXT NOT NULL,
    image_sha256 TEXT NOT NULL,
    release_id TEXT,
    state TEXT NOT NULL,
    why TEXT DEFAULT '' NOT NULL,
    query_id UUID,
    at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT pk_live_intake PRIMARY KEY (job_id, purpose),
    CONSTRAINT ck_live_intake_purpose CHECK (purpose IN ('live', 'drift')),
    CONSTRAINT ck_live_intake_state CHECK (state IN ('waiting', 'asked', 'labelled', 'void'))
);
CREATE INDEX ix_live_intake_waiting ON live_intake (model_id, at) WHERE state = 'waiting';
CREATE TABLE label_measures (
    ranking_id UUID NOT NULL,
    model_id TEXT NOT NULL,
    query_id UUID NOT NULL,
    kind TEXT NOT NULL,
    purpose TEXT NOT NULL,
    release_id TEXT,
    cluster INTEGER,
    n INTEGER NOT NULL,
    k INTEGER NOT NULL,
    overlap DOUBLE PRECISION,
    spearman DOUBLE PRECISION,
    predicted DOUBLE PRECISION,
    observed DOUBLE PRECISION,
    lost DOUBLE PRECISION,
    missed DOUBLE PRECISION,
    at TIMESTAMP WITH TIME ZONE NOT NULL,
    measured_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_label_measures PRIMARY KEY (ranking_id),
    CONSTRAINT ck_label_measures_kind CHECK (kind IN ('student', 'repeat')),
    CONSTRAINT fk_label_measures_ranking_id_rankings FOREIGN KEY(ranking_id) REFERENCES rankings (id) ON DELETE CASCADE
);
CREATE INDEX ix_label_measures_model_id_kind_at ON label_measures (model_id, kind, at);
CREATE TABLE prompt_clusters (
    model_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    example TEXT NOT NULL,
    centre BYTEA NOT NULL,
    encoder TEXT NOT NULL,
    at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_prompt_clusters PRIMARY KEY (model_id, number)
);
CREATE TABLE drift_alarms (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    model_id TEXT NOT NULL,
    raised_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    reason TEXT NOT NULL,
    detail JSONB NOT NULL,
    closed_at TIMESTAMP WITH TIME ZONE,
    closed_by TEXT,
    CONSTRAINT pk_drift_alarms PRIMARY KEY (id)
);
CREATE UNIQUE INDEX uq_drift_alarms_open ON drift_alarms (model_id) WHERE closed_at IS NULL;
"""

_NAMES = (
    "drift_alarms", "prompt_clusters", "label_measures", "live_intake",
    "label_repeats", "shortlists", "query_choices", "curation_controls",
)


def upgrade() -> None:
    op.execute(_TABLES)
    # Clients' jobs that opted in, for the curation service that looks for new ones every few seconds.
    op.execute(
        "CREATE INDEX ix_jobs_may_learn ON jobs (model_id, end_time) "
        "WHERE (payload ->> 'may_learn') = 'true' AND state = 'SUCCEEDED'"
    )
    op.execute("CREATE INDEX ix_job_events_rank ON job_events (at) WHERE stage = 'rank'")


def downgrade() -> None:
    op.execute("DROP INDEX ix_job_events_rank")
    op.execute("DROP INDEX ix_jobs_may_learn")
    for name in _NAMES:
        op.execute(f"DROP TABLE {name}")
