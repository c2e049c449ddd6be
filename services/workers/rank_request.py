"""What a ranking job asks, read from its payload: which queries, which candidates of each, which teacher.

Why it exists: curation writes payloads and workers read them, sometimes an older version's, and neither may import
the other; this is where the agreement is checked.

    query_ids               UUIDs of the queries to label, in order (older jobs: one ``query_id``)
    candidate_ids           item ids every one of them is ranked over; absent: the whole corpus
    candidate_ids_by_query  instead of it, one list for each query
    candidate_set           the name of the lists; ``corpus`` for the whole corpus
    teacher, draws, teacher_settings   which teacher; default: this worker's settings
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from byline.errors import InvalidRequest

#: The candidate set that means every item of the corpus that is not withdrawn.
WHOLE_CORPUS = "corpus"


@dataclass(frozen=True)
class Wanted:
    """One query and what it is ranked over. ``candidate_ids`` None stands for the whole corpus."""

    query_id: uuid.UUID
    candidate_set: str
    candidate_ids: tuple[int, ...] | None


@dataclass(frozen=True)
class RankRequest:
    """What curation asks: rank these candidates for these queries with this teacher and this many noise draws."""

    wanted: tuple[Wanted, ...]
    teacher: str
    draws: int
    #: Further fields of the teacher's settings, for labels that must be comparable with earlier ones.
    teacher_settings: Mapping[str, Any]

    @classmethod
    def of(cls, payload: Mapping[str, Any], *, teacher: str, draws: int) -> RankRequest:
        """Parse a job's payload; ``teacher`` and ``draws`` are the defaults. Raises InvalidRequest."""
        try:
            named = payload["query_ids"] if "query_ids" in payload else [payload["query_id"]]
            queries = [uuid.UUID(str(query_id)) for query_id in _list(named)]
            common = _ids(payload.get("candidate_ids"))
            own = payload.get("candidate_ids_by_query")
            lists = [common for _ in queries] if own is None else [_ids(ids) for ids in _list(own)]
            count = int(payload.get("draws") or draws)
            settings = dict(payload.get("teacher_settings") or {})
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest("payload", f"is not a ranking request: {error!r}") from error
        if not queries or len(set(queries)) != len(queries):
            raise InvalidRequest("payload.query_ids", "must name at least one query, and none twice")
        if len(lists) != len(queries) or (own is not None and common is not None):
            raise InvalidRequest("payload.candidate_ids_by_query", "must hold one list for each query, and be the only")
        name = payload.get("candidate_set")
        wanted = tuple(_wanted(query, ids, name) for query, ids in zip(queries, lists, strict=True))
        return cls(wanted, str(payload.get("teacher") or teacher), count, settings)


def _wanted(query_id: uuid.UUID, ids: tuple[int, ...] | None, name: object) -> Wanted:
    if ids is None and name not in (None, "", WHOLE_CORPUS):
        raise InvalidRequest("payload.candidate_set", f"{name!r} needs candidate_ids; only 'corpus' does without")
    return Wanted(query_id, str(name or (WHOLE_CORPUS if ids is None else _name_of(ids))), ids)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


def _ids(value: object) -> tuple[int, ...] | None:
    return None if value is None else tuple(int(item_id) for item_id in _list(value))


def _name_of(item_ids: Sequence[int]) -> str:
    """A name for an unnamed list: equal lists have equal names, whatever their order."""
    digest = hashlib.sha256(",".join(str(item_id) for item_id in sorted(item_ids)).encode()).hexdigest()[:12]
    return f"list-{len(item_ids)}-{digest}"
