"""Where a head is good and where it is not: the held-out queries by kind.

Why it exists: a mean hides the queries it is poor at. Three cuts, none of which looks at the head: what the prompt is
about, whose picture the teacher names first, and how far the query is from everything the head was taught on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byline.evaluation.bootstrap import PairedDifference, paired_bootstrap
from byline.evaluation.head_measures import gain_json

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
OTHER = "all others"
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True)
class Slice:
    """Some of the held-out queries. ``gain``: the head over the best raw feature on them."""

    cut: str
    name: str
    queries: int
    head: float
    standard_error: float
    raw: float
    gain: PairedDifference
    ceiling: float | None

    def to_json(self) -> dict[str, object]:
        """Plain numbers."""
        return {"cut": self.cut, "name": self.name, "queries": self.queries, "head": self.head,
                "standard_error": self.standard_error, "best_raw": self.raw, "head_gain": gain_json(self.gain),
                "ceiling": self.ceiling}  # fmt: skip


def slices(cuts: Mapping[str, Sequence[str]], head: DoubleArray, raw: DoubleArray, ceiling: DoubleArray | None, *,
           seed: int) -> tuple[Slice, ...]:
    """A row per cut and name: ``cuts[cut]`` names the slice of every query; the values are AP per query [q]."""
    out: list[Slice] = []
    for cut, names in cuts.items():
        labels = np.asarray(names)
        for name in sorted(set(names), key=lambda each: (each == OTHER, list(names).index(each))):
            rows = np.flatnonzero(labels == name)
            out.append(Slice(
                cut, name, rows.shape[0], float(head[rows].mean()), float(head[rows].std() / np.sqrt(rows.shape[0])),
                float(raw[rows].mean()), paired_bootstrap(head[rows], raw[rows], seed=seed),
                None if ceiling is None else float(ceiling[rows].mean()),
            ))  # fmt: skip
    return tuple(out)


def prompt_clusters(train_text: FloatArray, train_prompts: Sequence[str], text: FloatArray, *, seed: int,
                    smallest: int = 8) -> list[str]:
    """Cluster of every held-out prompt, named by the words that set it apart.

    k-means on the training prompts' unit features [q_train, d], so that the clusters are there before the held-out
    prompts ``text`` [q, d] are; as many as leave about ``smallest`` held-out queries each, 2 to 8.
    """
    from sklearn.cluster import KMeans

    count = int(np.clip(text.shape[0] // smallest, 2, 8))
    centre = train_text.mean(0, dtype=np.float64)
    taught, asked = (_unit(rows - centre) for rows in (train_text, text))
    found = KMeans(min(count, taught.shape[0]), n_init=4, random_state=seed).fit(taught)
    names = _cluster_names(train_prompts, found.labels_)
    return [names[label] for label in found.predict(asked)]


def creator_of_top(tau: FloatArray, creators: Sequence[str], smallest: int = 5) -> list[str]:
    """Creator of the teacher's first item per query; those of fewer than ``smallest`` queries together."""
    names = [creators[int(np.nanargmax(row))] or "unknown" for row in tau]
    count = Counter(names)
    return [name if count[name] >= smallest else OTHER for name in names]


def distance_thirds(train_features: FloatArray, features: FloatArray) -> list[str]:
    """Near, middle or far by 1 − the highest cosine to a training query, in features standardised by those."""
    mean, deviation = train_features.mean(0, dtype=np.float64), train_features.std(0, dtype=np.float64)
    scale = np.where(deviation > 1e-6, 1.0 / np.maximum(deviation, 1e-6), 0.0)
    taught, asked = (_unit((rows - mean) * scale) for rows in (train_features, features))
    distance = 1.0 - (asked @ taught.T).max(1)
    low, high = np.quantile(distance, [1 / 3, 2 / 3])
    near, far = f"near (below {low:.2f})", f"far (above {high:.2f})"
    return [near if d <= low else far if d > high else "middle" for d in distance]


def _cluster_names(prompts: Sequence[str], labels: npt.NDArray[np.integer]) -> list[str]:
    """Three words each: the most frequent in the cluster beyond what the whole would lead one to expect."""
    words = [set(_WORD.findall(prompt.lower())) for prompt in prompts]
    overall = Counter(word for each in words for word in each)
    names: list[str] = []
    for label in range(int(labels.max()) + 1):
        members = [each for each, at in zip(words, labels, strict=True) if at == label]
        here = Counter(word for each in members for word in each)
        share = len(members) / max(len(words), 1)
        lift = {word: found - share * overall[word] for word, found in here.items()}
        name = ", ".join(sorted(lift, key=lambda word: (-lift[word], word))[:3]) or "no words"
        names.append(name if name not in names else f"{name} ({label})")
    return names


def _unit(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    rows = np.asarray(rows, dtype=np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), dtype=np.float64)
