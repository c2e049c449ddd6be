"""``make bench-corpus``: how long until a thousand added items are found, end to end and without a new release.

Why it exists: "within seconds" is a figure only if everything is in it: the API with its decoding child, the blobs'
flushes, near-duplicate groups, encoders, head, the delta in Postgres and the worker that answers from it. Real servers
and services, pictures of the demo corpus; the release itself holds synthetic embeddings of any number of items.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from byline.catalog.decode import encode_png
from byline.cli.bench_lookup_system import CORPUS_ID, BenchSystem, Others, make_release, running
from byline.client.corpus import CorpusClient, NewItem
from byline.config import as_environment, load_settings, repository_root
from byline.evaluation.corpus_file import read_corpus
from byline.evaluation.result_file import git_commit, write_result

#: Added items that are asked for by their own picture and caption.
_ASKED = 20


def main(argv: Sequence[str] | None = None) -> None:
    """Run one measurement and write ``reports/bench/corpus.json``."""
    a = _parser().parse_args(argv)
    settings = load_settings()
    begun = time.perf_counter()
    corpus = read_corpus(settings.corpus_source)
    with tempfile.TemporaryDirectory(prefix="byline-bench-") as folder:
        release = make_release(
            Path(folder) / "releases", corpus[:48], items=a.items, dim=a.dim, queries=64, feature_spec=a.feature_spec,
            model_directory=settings.model_directory, index_factory=None, seed=a.seed,
        )  # fmt: skip
        new = [
            NewItem(encode_png(one.image), one.caption, creator=f"creator {number % 50}")
            for number, one in enumerate(corpus[48 : 48 + a.add])
        ]
        with running(Path(folder), release, feature_spec=a.feature_spec,
                     model_directory=settings.model_directory) as system, _encoding(system, a.processes):  # fmt: skip
            figures = _measure(system, new, a.first)
    figures |= {"items": a.items, "dim": a.dim, "processes": a.processes, "feature_spec": a.feature_spec}
    command = f"python -m byline.cli.bench_corpus --add {a.add} --processes {a.processes} -f {a.feature_spec}"
    write_result(a.out, figures, command=command, seconds=time.perf_counter() - begun,
                 commit=git_commit(repository_root()), seed=a.seed)  # fmt: skip
    print(f"{a.add} items, {a.feature_spec}, {a.processes} encoding processes, release of {a.items}: stored after "
          f"{figures['stored_seconds']:.1f} s, all found after {figures['found_seconds']:.1f} s; "
          f"{figures['found_themselves']} of {figures['asked']} found themselves in the first 20; wrote {a.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=int, default=1_000, help="items added at once")
    parser.add_argument("--items", type=int, default=20_000, help="items the release holds already")
    parser.add_argument("--dim", type=int, default=256, help="width of its embeddings")
    parser.add_argument("--processes", type=int, default=2, help="processes that encode additions")
    parser.add_argument("-f", "--feature-spec", default="minilm", help="encoders of the release")
    parser.add_argument("--first", action="store_true", help="run before everything else on this machine (SCHED_RR)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("reports/bench/corpus.json"))
    return parser


def _measure(system: BenchSystem, new: Sequence[NewItem], first: bool) -> dict[str, object]:
    with CorpusClient(system.address, "bench", model="bench", timeout=60) as client:
        # Encoders are loaded, the release is opened: as in a system that runs.
        client.wait_until_found(CORPUS_ID, 0, timeout=900)
        if first:
            system.schedule(first=True)
        others = Others(lambda: sum(system.cpu_seconds().values()) + sum(psutil.Process().cpu_times()[:4]))
        begun = time.perf_counter()
        added = client.add_items(CORPUS_ID, new)
        stored = time.perf_counter() - begun
        client.wait_until_found(CORPUS_ID, added.corpus_sequence, timeout=600, poll_s=0.02)
        last = new[-1]
        while True:  # the worker that answers has heard of it, too
            answer = client.attribute(last.image, last.caption, top_k=20)
            if (answer.answer.corpus_sequence or 0) >= added.corpus_sequence:
                break
        found = time.perf_counter() - begun
        busy = others.cores()
        if first:
            system.schedule(first=False)
        chosen = range(0, len(new), max(1, len(new) // _ASKED))
        themselves = 0
        for number in chosen:
            answer = client.attribute(new[number].image, new[number].caption, top_k=20)
            named = {i for one in answer.influences for i in (one.item_id, *one.copies)}
            themselves += added.items[number].item_id in named
    return {
        "added": added.count("ADDED"), "refused": added.count("REFUSED"), "stored_seconds": stored,
        "found_seconds": found, "asked": len(chosen), "found_themselves": themselves,
        "cores_used_by_others_and_encoders": round(busy, 2),
        "joined_a_group": sum(one.near_duplicate_group not in (0, one.item_id) for one in added.items),
    }  # fmt: skip


@contextmanager
def _encoding(system: BenchSystem, processes: int) -> Iterator[None]:
    """The processes that embed additions, as the trainer's thread does."""
    environment = {**os.environ, **as_environment(system.settings), "OMP_NUM_THREADS": "1"}
    log = (system.settings.state_dir / "additions.log").open("ab")
    started = [
        subprocess.Popen([sys.executable, "-m", "services.trainer", "--additions"], env=environment, stdout=log,
                         stderr=log)
        for _ in range(processes)
    ]  # fmt: skip
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)
        log.close()


if __name__ == "__main__":
    main()
