"""The JSON a stage leaves in ``job_results``: built here, read by the gateway, kept for ever.

Why it exists: the answer of every tier has one shape, and it must be told apart from how it was found.
Everything here is a pure function of values, so what a client will read is tested without a model, an
index or a database. ``item_id`` and ``near_duplicate_group`` are strings because JSON has no 64-bit integer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from byline.catalog.items import Item
from byline.evaluation.calibration import Probability
from byline.rankings.store import RankingLike

Influence = dict[str, Any]
Answer = dict[str, Any]

#: What only the lookup knows of an item.
_OF_THE_STUDENT = (
    "cosine", "probability", "probability_low", "probability_high", "probability_coverage", "probability_top",
    "retrieved_rank",
)  # fmt: skip

#: What the lookup says of an answer as a whole; the slower tiers keep it.
_VERDICT = (
    "not_attributable", "noise_floor", "evidence", "evidence_floor", "copies", "labelled_distance",
    "labelled_distance_limit",
)  # fmt: skip


def retrieved_influence(item: Item, *, rank: int, cosine: float, probability: Probability | None) -> Influence:
    """One line of a RETRIEVED answer. ``rank`` counts from 1; ``probability`` is None without calibration."""
    return {
        **_named(item, rank),
        "cosine": float(cosine),
        "probability": None if probability is None else probability.value,
        "probability_low": None if probability is None else probability.low,
        "probability_high": None if probability is None else probability.high,
        "probability_coverage": None if probability is None else probability.coverage,
        "probability_top": None if probability is None else probability.top,
        "retrieved_rank": rank,
    }


def _named(item: Item, rank: int) -> Influence:
    """The fields of an influence that say which item it is; nothing is known of its influence yet."""
    return {
        "item_id": str(item.item_id),
        "rank": rank,
        "tau": None,
        "standard_error": None,
        "caption": item.caption,
        "creator": item.creator,
        "licence": item.licence,
        "near_duplicate_group": str(item.near_duplicate_group),
        "image_sha256": item.image_sha256,
    }


def retrieved_answer(
    influences: Sequence[Influence],
    *,
    top_k: int,
    release_id: str,
    model_revision: str,
    not_attributable: bool,
    noise_floor: float | None,
    timings_ms: Mapping[str, float],
    evidence: float | None = None,
    evidence_floor: float | None = None,
    apart: bool = True,
    delta_sequence: int = 0,
    corpus_sequence: int | None = None,
    labelled_distance: float | None = None,
    labelled_distance_limit: float | None = None,
) -> Answer:
    """The lookup stage's answer: the first ``top_k`` influences (near-duplicate groups, unless copies are kept
    ``apart``); the rest wait as ``candidates`` for the teacher. The sequences say which additions were searched."""
    first = end_of_groups([one["near_duplicate_group"] for one in influences], top_k, apart)
    return {
        "tier": "RETRIEVED",
        "release_id": release_id,
        "delta_sequence": delta_sequence,
        "corpus_sequence": corpus_sequence,
        "copies": "apart" if apart else "together",
        "model_revision": model_revision,
        "not_attributable": not_attributable,
        "noise_floor": noise_floor,
        "evidence": evidence,
        "evidence_floor": evidence_floor,
        "labelled_distance": labelled_distance,
        "labelled_distance_limit": labelled_distance_limit,
        "influences": list(influences[:first]),
        "candidates": list(influences[first:]),
        "timings_ms": {name: round(value, 3) for name, value in timings_ms.items()},
        "teacher_id": None,
        "draws": None,
    }


def end_of_groups(groups: Sequence[object], wanted: int, apart: bool = False) -> int:
    """How many of a ranked list hold its first ``wanted`` groups: up to where another one begins.

    With copies ``apart`` everything is a group of its own.
    """
    if apart:
        return min(wanted, len(groups))
    seen: set[object] = set()
    for place, group in enumerate(groups):
        if group not in seen:
            if len(seen) == wanted:
                return place
            seen.add(group)
    return len(groups)


def group_ranks(groups: Sequence[object], apart: bool = False) -> list[int]:
    """The rank of each of a ranked list, from 1: copies have that of the first of their group, unless ``apart``."""
    if apart:
        return list(range(1, len(groups) + 1))
    ranks: dict[object, int] = {}
    return [ranks.setdefault(group, len(ranks) + 1) for group in groups]


def candidates_of(retrieved: Answer, *, limit: int, excluded: Iterable[int] = ()) -> list[Influence]:
    """The influences to verify, best first: at most ``limit``, without ``excluded`` (withdrawn) items.

    Of a near-duplicate group the first alone, unless copies are kept apart: what costs minutes is spent on ``limit``
    different pictures, however often one of them was saved again.
    """
    left = _left(retrieved, excluded)
    if copies_apart(retrieved):
        return left[:limit]
    first: dict[str, Influence] = {}
    for one in left:
        first.setdefault(one["near_duplicate_group"], one)
    return list(first.values())[:limit]


def copies_apart(retrieved: Answer) -> bool:
    """Whether the answer lists each copy by itself; one from before copies were gathered does."""
    return bool(retrieved.get("copies") != "together")


def _left(retrieved: Answer, excluded: Iterable[int]) -> list[Influence]:
    """Everything the lookup named, best first, without ``excluded`` items."""
    gone = {str(item_id) for item_id in excluded}
    every = (*retrieved["influences"], *retrieved.get("candidates", []))
    return [one for one in every if one["item_id"] not in gone]


def verified_answer(
    retrieved: Answer,
    candidates: Sequence[Influence],
    ranking: RankingLike,
    *,
    top_k: int,
    model_revision: str,
    timings_ms: Mapping[str, float],
    excluded: Iterable[int] = (),
) -> Answer:
    """The verify stage's answer: the candidates re-ranked by τ (higher = more influential; ties by item id).

    Cosine and ``retrieved_rank`` are those of the retrieved answer, so both orders can be read side by side;
    the release is the retrieved answer's too, ``model_revision`` that of the model that computed τ. A candidate the
    teacher did not score is left out. Copies of a candidate (without ``excluded`` items) follow it, without a τ.
    """
    by_id = {one["item_id"]: one for one in candidates}
    order = np.lexsort((ranking.item_ids, -ranking.tau.astype(np.float64)))
    ranked: list[Influence] = []
    for position in order:
        known = by_id.get(str(int(ranking.item_ids[position])))
        tau, error = float(ranking.tau[position]), float(ranking.standard_error[position])
        if known is None or not np.isfinite(tau):
            continue
        ranked.append(
            {
                **known,
                "rank": len(ranked) + 1,
                "tau": tau,
                "standard_error": error if np.isfinite(error) else None,
                "retrieved_rank": known["retrieved_rank"],
            }
        )
    apart = copies_apart(retrieved)
    if not apart:
        ranked = _with_copies(ranked, _left(retrieved, excluded))
    groups = [one["near_duplicate_group"] for one in ranked]
    for one, rank in zip(ranked, group_ranks(groups, apart), strict=True):
        one["rank"] = rank
    first = end_of_groups(groups, top_k, apart)
    return {
        "tier": "VERIFIED",
        "release_id": retrieved["release_id"],
        "delta_sequence": retrieved.get("delta_sequence", 0),
        "corpus_sequence": retrieved.get("corpus_sequence"),
        "model_revision": model_revision,
        **{name: retrieved.get(name) for name in _VERDICT},
        "influences": ranked[:first],
        "candidates": ranked[first:],
        "timings_ms": {name: round(value, 3) for name, value in timings_ms.items()},
        "teacher_id": ranking.teacher_id,
        "draws": int(ranking.draws),
    }


def _with_copies(measured: Sequence[Influence], found: Iterable[Influence]) -> list[Influence]:
    """Each of ``measured`` followed by the others of its group among what the lookup ``found``."""
    scored = {one["item_id"] for one in measured}
    copies: dict[str, list[Influence]] = {}
    for one in found:
        if one["item_id"] not in scored:
            copies.setdefault(one["near_duplicate_group"], []).append(dict(one))
    return [line for one in measured for line in (one, *copies.pop(one["near_duplicate_group"], ()))]


def estimated_answer(
    retrieved: Answer,
    found: Sequence[tuple[Item, float, float]],
    *,
    release_id: str,
    model_revision: str,
    teacher_id: str,
    draws: int,
    timings_ms: Mapping[str, float],
) -> Answer:
    """The estimate stage's answer: ``found`` items with τ and standard error, best first, of the whole corpus.

    An item the lookup named keeps its cosine, probability and retrieved rank; one that only the estimate found
    has none of them.
    """
    by_id = {one["item_id"]: one for one in (*retrieved["influences"], *retrieved.get("candidates", []))}
    influences: list[Influence] = []
    ranks = group_ranks([item.near_duplicate_group for item, _, _ in found], copies_apart(retrieved))
    for rank, (item, tau, error) in zip(ranks, found, strict=True):
        known = by_id.get(str(item.item_id), {})
        influences.append(
            {
                **_named(item, rank),
                **{name: known.get(name) for name in _OF_THE_STUDENT},
                "tau": tau,
                "standard_error": error if np.isfinite(error) else None,
            }
        )
    return {
        "tier": "ESTIMATED",
        "release_id": release_id,
        "model_revision": model_revision,
        **{name: retrieved.get(name) for name in _VERDICT},
        "influences": influences,
        "candidates": [],
        "timings_ms": {name: round(value, 3) for name, value in timings_ms.items()},
        "teacher_id": teacher_id,
        "draws": draws,
    }


def item_ids_of(answer: Answer) -> list[int]:
    """Every item id an answer names, candidates included."""
    return [int(one["item_id"]) for one in (*answer["influences"], *answer.get("candidates", []))]
