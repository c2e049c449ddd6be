"""The effective Celery settings: the safety argument of the queue, asserted."""

from __future__ import annotations

import ast
import inspect

import pytest

import byline.queue
from byline.jobs.states import Stage
from byline.queue import QUEUE_OF, QUEUES, TIME_LIMIT_S, make_celery


@pytest.fixture
def conf():
    return make_celery("redis://127.0.0.1:1/0").conf


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("task_serializer", "json"),
        ("result_serializer", "json"),
        ("accept_content", ["json"]),
        ("result_backend", None),
        ("task_ignore_result", True),
        ("task_acks_late", True),
        ("task_reject_on_worker_lost", False),
        ("worker_prefetch_multiplier", 1),
        ("worker_disable_prefetch", False),
        ("task_create_missing_queues", False),
        ("task_publish_retry", False),
        ("broker_connection_retry_on_startup", True),
        ("broker_connection_max_retries", None),
        ("worker_proc_alive_timeout", 300.0),
    ],
)
def test_the_effective_setting_is(conf, setting: str, value: object):
    assert getattr(conf, setting) == value


def test_no_stage_may_run_as_long_as_its_message_stays_invisible(conf):
    assert conf.visibility_timeout == conf.broker_transport_options["visibility_timeout"]
    assert max(TIME_LIMIT_S.values()) * 2 <= conf.visibility_timeout


def test_a_publisher_gives_up_instead_of_retrying_for_ever(conf):
    options = conf.broker_transport_options
    assert options["max_retries"] <= 3
    assert options["interval_max"] <= 1
    assert options["socket_connect_timeout"] <= 5


def test_a_worker_notices_a_dead_connection(conf):
    options = conf.broker_transport_options
    assert options["socket_keepalive"] is True
    assert 0 < options["health_check_interval"] <= 60
    assert 0 < options["socket_timeout"] <= 60


def test_messages_have_a_key_prefix_of_their_own(conf):
    assert conf.broker_transport_options["global_keyprefix"] == "byline:"


def test_no_message_has_a_priority(conf):
    assert "queue_order_strategy" not in conf.broker_transport_options
    assert conf.task_queue_max_priority is None


def test_there_is_a_queue_for_every_stage_and_no_other(conf):
    assert set(QUEUE_OF) == set(Stage)
    assert set(QUEUE_OF.values()) == set(QUEUES) == {queue.name for queue in conf.task_queues} == set(TIME_LIMIT_S)


def test_the_module_knows_neither_eta_nor_chord_nor_revoke():
    tree = ast.parse(inspect.getsource(byline.queue))
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    assert not words & {"eta", "countdown", "chord", "chain", "group", "revoke", "terminate", "AsyncResult"}
