"""No file is opened by something that can run code from it: safetensors and JSON only, read from the source.

The one exception is a network that its publisher offers as .pth alone: its digest is compared first, and
``weights_only`` keeps the unpickler to tensors.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINNED = "shared/byline/features/efficientnet.py"
#: module.function that runs what it reads, or may.
UNSAFE = {
    "torch.load", "torch.jit.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "pandas.read_pickle", "pd.read_pickle", "pickle.load", "pickle.loads", "marshal.loads", "shelve.open",
}  # fmt: skip

#: What parses a file of a release. Whoever calls one of these asks ``vouched`` first.
PARSERS = {"load_head", "load_index", "read_catalogue", "catalogue_ids", "open_sketches"}
VOUCHED_ELSEWHERE = {
    "shared/byline/releases/sketches.py",  # a part of load_release
    "shared/byline/releases/registry.py",  # at registration, with the manifest its builder made, digests compared
    "shared/byline/cli/evaluate_calibration.py",  # through find_head
    "shared/byline/cli/bench_lookup_system.py",  # a release that the bench made itself
}


@cache
def calls() -> tuple[tuple[str, str, ast.Call], ...]:
    return tuple(_calls())


def _calls() -> Iterator[tuple[str, str, ast.Call]]:
    for folder in ("shared", "services"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
                if isinstance(node, ast.Call):
                    yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, object]:
    return {word.arg: getattr(word.value, "value", None) for word in call.keywords if word.arg}


def test_nothing_that_can_run_code_from_a_file_opens_one() -> None:
    broken = [f"{path}:{call.lineno} {name}" for path, name, call in calls()
              if name in UNSAFE | {"eval", "exec"} and path != PINNED]  # fmt: skip
    assert not broken, broken


def test_the_one_pinned_network_is_loaded_as_tensors_only_after_its_digest_was_compared() -> None:
    (load,) = [call for path, name, call in calls() if path == PINNED and name in UNSAFE]
    assert keywords(load).get("weights_only") is True
    source = (ROOT / PINNED).read_text()
    assert source.index("sha256") < source.index("torch.load")


def test_a_file_of_a_release_is_opened_only_where_it_is_vouched_for() -> None:
    opening = {path for path, name, _ in calls() if name in PARSERS}
    asking = {path for path, name, _ in calls() if name == "vouched"}
    assert opening >= {"shared/byline/releases/loader.py", "services/trainer/refresh.py"}
    assert sorted(opening - asking) == sorted(VOUCHED_ELSEWHERE)


def test_no_option_switches_safety_off() -> None:
    for path, name, call in calls():
        given = keywords(call)
        assert given.get("allow_pickle") is not True, f"{path}:{call.lineno} {name}"
        assert given.get("trust_remote_code") is not True, f"{path}:{call.lineno} {name}"
        assert given.get("use_safetensors") is not False, f"{path}:{call.lineno} {name}"
        assert given.get("weights_only") is not False, f"{path}:{call.lineno} {name}"


def test_the_queue_takes_json_and_nothing_else() -> None:
    from byline.config import load_settings
    from byline.queue import make_celery

    configured = make_celery(load_settings(redis_url="redis://127.0.0.1:1/0")).conf
    assert list(configured.accept_content) == ["json"] and configured.task_serializer == "json"
