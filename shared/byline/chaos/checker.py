"""Which promises a history breaks. Pure: it knows neither database nor clock nor the code that kept the promises.

Why it exists: the code under test must not be its own judge. Each promise of docs/jobs.md is one function over plain
values, tested with histories made up to break it (``tests/unit/chaos/test_checker.py``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from byline.chaos.history import Change, History, JobFacts, Result, Watched
from byline.jobs.states import TERMINAL, TRANSITIONS, Kind, State, Tier, stages

#: Who else than the worker that holds a job may change it.
_OTHERS = ("client", "dispatcher")
#: Faults that take the doorbells with them.
WIPES = ("redis_flushed", "redis_killed")


@dataclass(frozen=True, slots=True)
class Violation:
    """Promise number ``promise`` was broken for ``job``, and how."""

    promise: int
    job: str
    how: str


@dataclass(frozen=True)
class Verdict:
    """What the checker found; ``passed`` is what a run is judged by."""

    violations: tuple[Violation, ...]
    jobs: int
    acknowledged: int
    answers: int

    @property
    def passed(self) -> bool:
        """Whether no promise was broken."""
        return not self.violations

    def broken(self, *promises: int) -> int:
        """Jobs for which one of these promises was broken."""
        return len({found.job for found in self.violations if found.promise in promises})


def check(history: History) -> Verdict:
    """All promises over all jobs."""
    changes: dict[str, list[Change]] = defaultdict(list)
    for change in history.changes:
        changes[change.job].append(change)
    results: dict[str, list[Result]] = defaultdict(list)
    for result in history.results:
        results[result.job].append(result)
    found = [*never_lost(history), *one_job_a_request(history)]
    for job in history.jobs:
        found += ends_once(job, changes[job.job])
        found += takes_effect_once(job, changes[job.job], results[job.job])
        found += only_the_holder_writes(changes[job.job])
        found += names_its_release(job, results[job.job], history.release_items)
    for watched in history.watched:
        found += shows_each_state_in_order(watched, changes[watched.job])
    found += answers_do_not_change(history)
    found += answers_come_from_one_release(history)
    found += withdrawn_is_in_no_later_answer(history)
    return Verdict(tuple(found), len(history.jobs), len(history.acknowledged), len(history.reads))


def never_lost(history: History) -> Iterator[Violation]:
    """Promises 1 and 5: what was acknowledged exists as the same job, and has ended; also when Redis was wiped."""
    rows = {job.job: job for job in history.jobs}
    known: dict[tuple[str, str], str] = {}
    wiped = [fault for fault in history.faults if fault.name in WIPES]
    for told in history.acknowledged:
        first = known.setdefault((told.project, told.request), told.job)
        if first != told.job:
            yield Violation(1, told.job, f"the request was acknowledged as job {first} before")
        row = rows.get(told.job)
        if row is None:
            yield Violation(1, told.job, "was acknowledged and does not exist")
        elif (row.project, row.request) != (told.project, told.request):
            yield Violation(1, told.job, "is another request's job")
        elif State(row.state) not in TERMINAL:
            yield Violation(1, told.job, f"was acknowledged and is {row.state} at the end")
            if any(told.at <= fault.ended for fault in wiped):
                yield Violation(5, told.job, "has not ended after Redis was wiped")


def one_job_a_request(history: History) -> Iterator[Violation]:
    """Promise 3, of Create: a request sent again makes no second job."""
    for (project, request), count in Counter((job.project, job.request) for job in history.jobs).items():
        if count > 1:
            twice = next(job.job for job in history.jobs if (job.project, job.request) == (project, request))
            yield Violation(3, twice, f"{count} jobs of one request")


def ends_once(job: JobFacts, changes: Sequence[Change]) -> Iterator[Violation]:
    """Promise 2: a chain of allowed changes from the creation on, and nothing after its one terminal state."""
    before: str | None = None
    for change in changes:
        if change.before != before:
            yield Violation(2, job.job, f"changed from {change.before} when it was {before}")
        elif before is None and change.after != State.QUEUED:
            yield Violation(2, job.job, f"was created {change.after}")
        elif before is not None and State(change.after) not in TRANSITIONS[State(before)]:
            yield Violation(2, job.job, f"changed from {before} to {change.after}")
        before = change.after
    if before != job.state:
        yield Violation(2, job.job, f"is {job.state}, its last change says {before}")
    ended = [change.after for change in changes if State(change.after) in TERMINAL]
    if len(ended) > 1:
        yield Violation(2, job.job, f"ended {len(ended)} times: {', '.join(ended)}")


def shows_each_state_in_order(watched: Watched, changes: Sequence[Change]) -> Iterator[Violation]:
    """Promise 2, as a client saw it: the job's states in their order (one may be missed), its end once and last."""
    left = iter([change.after for change in changes])
    if not all(state in left for state in watched.states):
        yield Violation(2, watched.job, f"a watch showed {', '.join(watched.states)}, which are not its changes")
    *before, last = watched.states or (None,)
    if any(State(state) in TERMINAL for state in before):
        yield Violation(2, watched.job, f"a watch showed {', '.join(watched.states)}: it went on after an end")
    if watched.ended and last not in TERMINAL:
        yield Violation(2, watched.job, f"a watch ended while the job was {last or 'not seen'}")


def takes_effect_once(job: JobFacts, changes: Sequence[Change], results: Sequence[Result]) -> Iterator[Violation]:
    """Promise 3: each stage completed at most once, with one result, written by the claim that completed it."""
    completed: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        if change.after == State.SUCCEEDED or change.reason == f"{change.stage} completed":
            completed[change.stage].append(change)
    written = Counter(result.stage for result in results)
    for stage in {*completed, *written}:
        if len(completed[stage]) > 1:
            yield Violation(3, job.job, f"stage {stage} completed {len(completed[stage])} times")
        if written[stage] != len(completed[stage]):
            yield Violation(3, job.job, f"stage {stage}: {len(completed[stage])} completions, {written[stage]} results")
    for result in results:
        if completed[result.stage] and result.fence != completed[result.stage][0].fence:
            yield Violation(4, job.job, f"the result of stage {result.stage} is of another claim than its completion")
    if job.state == State.SUCCEEDED:
        missing = [stage for stage in stages(Kind(job.kind), Tier(job.tier)) if not written[stage]]
        if missing:
            yield Violation(3, job.job, f"SUCCEEDED without a result of {', '.join(missing)}")


def only_the_holder_writes(changes: Sequence[Change]) -> Iterator[Violation]:
    """Promise 4: fences rise one by one, and a worker's change is that of the last claim."""
    holder: str | None = None
    fence = 0
    for change in changes:
        if change.after == State.RUNNING:
            if change.fence != fence + 1:
                yield Violation(4, change.job, f"claimed with fence {change.fence} after {fence}")
            holder, fence = change.actor, change.fence
            continue
        if change.fence != fence:
            yield Violation(4, change.job, f"a change with fence {change.fence} while {fence} was the last claim's")
        if change.actor not in _OTHERS and change.actor != holder:
            yield Violation(4, change.job, f"{change.actor} changed it while {holder or 'nobody'} held it")
        if change.after != State.CANCELLING:
            holder = None


def names_its_release(
    job: JobFacts, results: Sequence[Result], release_items: Mapping[str, frozenset[int]]
) -> Iterator[Violation]:
    """Promise 6: one release in the row, in every stage's result and in what the result says; and its items only."""
    if job.kind != Kind.ATTRIBUTION:
        return
    for result in results:
        named = {result.release, result.names_release, job.release}
        if None in named:
            yield Violation(6, job.job, f"the result of stage {result.stage} names no release")
        elif len(named) > 1:
            yield Violation(6, job.job, f"stage {result.stage} names releases {', '.join(sorted(map(str, named)))}")
        foreign = _foreign(result.items, result.release, release_items)
        if foreign:
            yield Violation(6, job.job, f"items {foreign} of stage {result.stage} are not in {result.release}")


def answers_come_from_one_release(history: History) -> Iterator[Violation]:
    """Promise 6, as clients saw it."""
    pinned: dict[str, str] = {}
    for read in history.reads:
        first = pinned.setdefault(read.job, read.release)
        if not read.release or first != read.release:
            yield Violation(6, read.job, f"answered from {read.release or 'no release'}, before that from {first}")
        foreign = _foreign(read.items, read.release, history.release_items)
        if foreign:
            yield Violation(6, read.job, f"answered with items {foreign}, which {read.release} does not hold")


def answers_do_not_change(history: History) -> Iterator[Violation]:
    """Promise 3, as clients saw it: an answer read again is the same, but for items withdrawn since."""
    gone = {withdrawal.item for withdrawal in history.withdrawn}
    kept: dict[tuple[str, str], tuple[int, ...]] = {}
    for read in sorted(history.reads, key=lambda read: read.began):
        stays = tuple(item for item in read.items if item not in gone)
        before = kept.setdefault((read.job, read.tier), stays)
        if before != stays:
            yield Violation(3, read.job, f"its {read.tier} answer was {list(before)} and became {list(stays)}")


def withdrawn_is_in_no_later_answer(history: History) -> Iterator[Violation]:
    """Promise 7: a call that began after the acknowledgement shows the item no more."""
    since: dict[int, float] = {}
    for withdrawal in history.withdrawn:
        since[withdrawal.item] = min(withdrawal.acknowledged, since.get(withdrawal.item, withdrawal.acknowledged))
    for read in history.reads:
        seen = [item for item in read.items if item in since and since[item] < read.began]
        if seen:
            yield Violation(7, read.job, f"an answer asked for after their withdrawal names items {seen}")


def _foreign(items: Iterable[int], release: str | None, release_items: Mapping[str, frozenset[int]]) -> list[int]:
    held = release_items.get(release or "")
    return [] if held is None else sorted(set(items) - held)
