"""Fit a head to rankings: vectorised, seeded, stopped early on held-out mAP, best checkpoint kept.

Why it exists: one function serves the trainer, the demo and the studies. A step encodes each distinct row once and
uses all pairs, which sees tens of times more pairs per second than one pair per row; randomness comes only from the
seed; the untrained network takes part as step 0, so a fit can never return something worse than its start. Where the
head has a direct part, the network is fitted by itself and its weight beside that part is chosen afterwards: a joint
descent was tried, and lost what the direct part had (docs/student.md).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from byline.errors import LabelsNotUsable
from byline.evaluation.map import mean_average_precision
from byline.ranker.direct import EXPONENTS, TEMPERS
from byline.ranker.head import Head, HeadConfig
from byline.ranker.labelled_set import LabelledSet, influence_ranks
from byline.ranker.losses import RankingLoss, make_loss, reliability_weights
from byline.ranker.sampling import PairSampler

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
#: Weights of the network beside a direct part that are tried, in standard deviations of its scores.
BLENDS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 12.8)
#: Choices whose validation mAP differs by less are alike: the standard error over a few dozen queries is larger.
NEAR = 0.005


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit. ``evaluate_at`` is the L of the validation mAP(L) that decides when to stop.

    ``weighted``: a pair counts as far as its label's standard error lets it be trusted (``reliability_weights``).
    """

    loss: str = "listwise"
    max_steps: int = 160
    warm_up_steps: int = 10
    learning_rate: float = 1e-3
    slope_learning_rate: float = 0.03
    weight_decay: float = 0.01
    queries_per_step: int = 64
    items_per_step: int = 512
    outside_share: float = 0.1
    evaluate_every: int = 20
    patience: int = 4
    evaluate_at: int = 100
    encode_batch: int = 1024
    weighted: bool = False


@dataclass(frozen=True)
class FitPoint:
    """One evaluation: training loss since the last one (NaN at step 0) and held-out mAP(L)."""

    step: int
    loss: float
    validation_map: float


@dataclass(frozen=True)
class FitReport:
    """What a fit produced. ``slope`` is the learned factor on the score, positive by construction."""

    head: Head
    history: tuple[FitPoint, ...]
    best_map: float
    best_step: int
    start_map: float
    slope: float


def fit_head(
    train: LabelledSet,
    validation: LabelledSet,
    config: HeadConfig,
    fit: FitConfig,
    seed: int,
    progress: Progress | None = None,
    warm_start: Head | None = None,
) -> FitReport:
    """Train a head of shape ``config`` on ``train``, choosing the step by mAP on ``validation``.

    ``warm_start`` continues from a head of the same shape (its standardisation is kept). ``progress(done, total)`` is
    called after every step. Raises LabelsNotUsable if there is nothing to learn from or to judge by.
    """
    _check(train, validation, config)
    weights = _weights(train) if fit.weighted else None
    # Layers and dropout draw from torch's global generator: run it from the seed, and leave the caller's as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(replace(config, width=0))
        if warm_start is not None and replace(warm_start.config, width=config.width) == config:
            head.load_state_dict(warm_start.state_dict())
        else:
            head.initialise(train.item_features, train.query_features, torch.Generator().manual_seed(seed))
        if not config.learned:
            start = held_out_map(head, validation, fit)
            head = head.narrowed(config.embedding_dim)
            best = choose_blend(head, train, validation, fit)
            return FitReport(head.eval(), (FitPoint(0, math.nan, start),), best, 0, start, 1.0)
        loss = make_loss(fit.loss, fit.evaluate_at)
        sampler = PairSampler(
            influence_ranks(train.tau),
            queries_per_step=fit.queries_per_step,
            items_per_step=fit.items_per_step,
            outside_share=fit.outside_share,
            rng=np.random.default_rng(seed),
        )
        fitted = _descend(head, loss, _optimizer(head, loss, fit), sampler, train, validation, fit, progress,
                          weights)  # fmt: skip
    # Fitted in full, then put in order and cut: ``config.width`` decides what is served, not what is learnt.
    head.order_columns(train.item_features)
    head = head.narrowed(config.embedding_dim)
    return replace(fitted, head=head, best_map=choose_blend(head, train, validation, fit))


def _descend(
    head: Head,
    loss: RankingLoss,
    optimizer: torch.optim.Optimizer,
    sampler: PairSampler,
    train: LabelledSet,
    validation: LabelledSet,
    fit: FitConfig,
    progress: Progress | None,
    weights: FloatArray | None,
) -> FitReport:
    queries = torch.from_numpy(np.array(train.query_features, dtype=np.float32))
    items = torch.from_numpy(np.array(train.item_features, dtype=np.float32))
    base_rates = [group["lr"] for group in optimizer.param_groups]
    start = _network_map(head, validation, fit)
    history = [FitPoint(0, math.nan, start)]
    best_map, best_step, best_state, best_slope = start, 0, _snapshot(head), float(loss.slope.detach())
    losses: list[float] = []
    without_gain = 0
    for step in range(1, fit.max_steps + 1):
        factor = _schedule(step, fit)
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        batch = sampler.draw()
        head.train()
        scores = head.query_embedding(queries[batch.queries]) @ head.item_embedding(items[batch.items]).T
        trusted = None if weights is None else torch.from_numpy(weights[np.ix_(batch.queries, batch.items)])
        value = loss(
            scores, torch.from_numpy(batch.ranks), torch.from_numpy(batch.totals), torch.from_numpy(batch.mask), trusted
        )
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        losses.append(float(value.detach()))
        if progress is not None:
            progress(step, fit.max_steps)
        if step % fit.evaluate_every and step != fit.max_steps:
            continue
        current = _network_map(head, validation, fit)
        history.append(FitPoint(step, float(np.mean(losses)), current))
        losses.clear()
        # A gain must exceed float noise, or the chosen step could depend on the encode batch size.
        without_gain += 1
        if current > best_map + 1e-4:
            best_map, best_step, best_state, best_slope = current, step, _snapshot(head), float(loss.slope.detach())
            without_gain = 0
        if without_gain >= fit.patience:
            break
    head.load_state_dict(best_state)
    head.eval()
    if progress is not None:
        progress(fit.max_steps, fit.max_steps)
    return FitReport(head, tuple(history), best_map, best_step, start, best_slope)


def held_out_map(head: Head, labelled: LabelledSet, fit: FitConfig) -> float:
    """mAP(``fit.evaluate_at``) of ``head`` on ``labelled``, over the items the teacher scored."""
    scores = head.scores(labelled.query_features, labelled.item_features, fit.encode_batch)
    return mean_average_precision(scores, labelled.tau, fit.evaluate_at).mean


def _network_map(head: Head, labelled: LabelledSet, fit: FitConfig) -> float:
    """As :func:`held_out_map`, of the network alone: what is fitted is judged by itself."""
    scores = head.learned_scores(labelled.query_features, labelled.item_features, fit.encode_batch)
    return mean_average_precision(scores, labelled.tau, fit.evaluate_at).mean


def choose_blend(head: Head, train: LabelledSet, validation: LabelledSet, fit: FitConfig) -> float:
    """Set how much the direct part's weak directions and an item's length count, and the network beside them.

    Of all choices whose mAP(``fit.evaluate_at``) on ``validation`` is within ``NEAR`` of the best, the one that most
    often has the teacher's first item first: mAP hardly sees it, and it is what people look at. For the columns that
    ``head`` keeps. Returns the mAP; of a head without a direct part too, which is left as it is.
    """
    if head.direct is None:
        return held_out_map(head, validation, fit)
    asked, items, tau = validation.query_features, validation.item_features, validation.tau
    network = head.learned_scores(asked, items, fit.encode_batch)
    size = float(network.std(1).mean()) or 1.0
    seen: dict[tuple[float, float, float], tuple[float, float]] = {}
    for exponent, temper in itertools.product(EXPONENTS, TEMPERS):
        head.set_powers(exponent, temper, train.item_features, train.query_features)
        direct = head.direct_scores(asked, items)
        for share in BLENDS if head.config.learned else (0.0,):
            scores = direct + np.float32(share / size) * network
            quality = mean_average_precision(scores, tau, fit.evaluate_at).mean
            seen[exponent, temper, share] = (quality, _first_found(scores, tau))
    exponent, temper, share = _best(seen)
    head.set_powers(exponent, temper, train.item_features, train.query_features)
    head.blend.fill_(share / size)
    return seen[exponent, temper, share][0]


def _best(seen: Mapping[tuple[float, float, float], tuple[float, float]]) -> tuple[float, float, float]:
    most = max(quality for quality, _ in seen.values())
    near = {choice: found for choice, found in seen.items() if found[0] >= most - NEAR}
    # Of equals the first seen, which is the least change: differences below 1e-4 are float noise.
    return max(near, key=lambda choice: (near[choice][1], round(near[choice][0], 4)))


def _first_found(scores: FloatArray, tau: FloatArray) -> float:
    """Share of queries whose best scored item by ``scores`` [q, n] is that by ``tau`` [q, n] (NaN = not scored)."""
    scored = ~np.isnan(tau)
    asked = scored.any(1)
    found = np.where(scored, scores, -np.inf).argmax(1) == np.where(scored, tau, -np.inf).argmax(1)
    return float(found[asked].mean()) if asked.any() else 0.0


def _optimizer(head: Head, loss: RankingLoss, fit: FitConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": list(head.parameters()), "lr": fit.learning_rate, "weight_decay": fit.weight_decay},
            # The slope moves far and must not be pulled to zero: at the network's rate it never arrives.
            {"params": list(loss.parameters()), "lr": fit.slope_learning_rate, "weight_decay": 0.0},
        ]
    )


def _schedule(step: int, fit: FitConfig) -> float:
    """Linear warm-up, then a cosine to a twentieth of the rate."""
    if step <= fit.warm_up_steps:
        return step / max(1, fit.warm_up_steps)
    done = (step - fit.warm_up_steps) / max(1, fit.max_steps - fit.warm_up_steps)
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done))


def _snapshot(head: Head) -> dict[str, torch.Tensor]:
    return copy.deepcopy(head.state_dict())


def _weights(train: LabelledSet) -> FloatArray:
    """[q, n]: how far each label is trusted; 1 for what the teacher did not score, which is sampled as unrelated."""
    if train.standard_error is None:
        raise LabelsNotUsable("a weighted fit needs the labels' standard errors: fit without weights, or load them")
    return np.where(train.scored(), reliability_weights(train.tau, train.standard_error), np.float32(1.0))


def _check(train: LabelledSet, validation: LabelledSet, config: HeadConfig) -> None:
    if train.in_dim != config.in_dim or validation.in_dim != config.in_dim:
        raise LabelsNotUsable(
            f"the head takes {config.in_dim} features, the labels have {train.in_dim} (train) and "
            f"{validation.in_dim} (validation)"
        )
    if not train.scored().any() or not validation.scored().any():
        raise LabelsNotUsable("there must be rankings both to train on and to validate with")
