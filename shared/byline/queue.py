"""The one Celery app: queues, settings, and how a doorbell is rung.

Why it exists: a message carries ``(job_id, stage)`` and nothing else, and Postgres decides what it means;
with these settings a lost, doubled or late message costs time, never a job or a second effect. They are a
safety argument, so ``tests/contract/test_celery_settings.py`` asserts the effective values. What each
prevents is said beside it (numbers are celery issues unless said otherwise).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import redis
from celery import Celery
from kombu.entity import Exchange, Queue
from kombu.exceptions import KombuError

from byline.errors import BrokerUnavailable, SettingsInvalid
from byline.jobs.states import Stage

LOOKUP = "lookup"
VERIFICATION = "verification"
QUEUES = (LOOKUP, VERIFICATION)

QUEUE_OF: Mapping[Stage, str] = {
    Stage.LOOKUP: LOOKUP,
    Stage.ESTIMATE: VERIFICATION,
    Stage.VERIFY: VERIFICATION,
    Stage.RANK: VERIFICATION,
}

#: The one task: ``run_stage(job_id, stage)``.
TASK = "byline.run_stage"

#: A message a worker sends to itself, to see whether it consumes (services/workers/canary.py).
CANARY = "byline.canary"
_CANARY_KEPT_S = 3600

#: Hard limit per queue, seconds: ends a stage that hangs so badly that it misses its lost lease.
TIME_LIMIT_S: Mapping[str, int] = {LOOKUP: 120, VERIFICATION: 7200}

#: Longer than any stage may run: kombu gives a message that is unacknowledged for so long to another worker
#: (#5935, #3270), whose claim would then be refused. The lease, not this, brings back a dead worker's job.
VISIBILITY_TIMEOUT_S = 2 * max(TIME_LIMIT_S.values())

#: Seconds to wait for Redis when a doorbell is rung; the dispatcher rings again later.
PUBLISH_TIMEOUT_S = 2.0


#: Keeps our keys apart from anything else in the same Redis.
KEY_PREFIX = "byline:"


def make_celery(redis_url: str, key_prefix: str = KEY_PREFIX, *, own: str | None = None) -> Celery:
    """The Celery app on this broker. ``own``: a further queue, of one worker, bound to no exchange."""
    app = Celery("byline", broker=redis_url, backend=None, set_as_current=False)
    exchange = Exchange("byline", type="direct")  # type: ignore[no-untyped-call]
    queues = [Queue(name, exchange, routing_key=name) for name in QUEUES]  # type: ignore[no-untyped-call]
    if own is not None:
        queues.append(Queue(own, Exchange(""), routing_key=own))  # type: ignore[no-untyped-call]
    app.conf.update(
        # Anyone who can write to Redis can send messages: nothing but JSON is ever decoded.
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        # Results live in Postgres; a result backend would only expire, hang chords and fill Redis (#4207).
        result_backend=None,
        task_ignore_result=True,
        task_queues=queues,
        task_default_queue=LOOKUP,
        task_default_exchange="byline",
        task_default_routing_key=LOOKUP,
        # A mistyped queue must fail, not vanish into a list nobody reads.
        task_create_missing_queues=False,
        # Acknowledge after the work: a message outlives its worker …
        task_acks_late=True,
        # … but one that kills its worker is not handed to the next at once; attempts are counted in Postgres.
        task_reject_on_worker_lost=False,
        task_acks_on_failure_or_timeout=True,
        worker_prefetch_multiplier=1,
        # Dropping reservations on close breaks this newer switch (#10345): leave it off.
        worker_disable_prefetch=False,
        # A worker that loads models after the fork needs longer than the default of 4 s.
        worker_proc_alive_timeout=300.0,
        worker_soft_shutdown_timeout=20.0,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_send_task_events=False,
        task_send_sent_event=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        # Workers wait for Redis for ever; whoever publishes does not (max_retries below).
        broker_connection_max_retries=None,
        broker_connection_timeout=PUBLISH_TIMEOUT_S,
        task_publish_retry=False,
        visibility_timeout=VISIBILITY_TIMEOUT_S,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            "global_keyprefix": key_prefix,
            # Bring back what a crashed worker held within seconds of its time, not within minutes.
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            # Silent stalls after a lost connection (#8030, #10302): keep it alive, and notice when it is not.
            "health_check_interval": 25,
            "socket_keepalive": True,
            "socket_timeout": 30,
            "socket_connect_timeout": PUBLISH_TIMEOUT_S,
            # A publisher gives up after two quick tries instead of trying for ever.
            "max_retries": 2,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.2,
        },
    )
    return app


def enqueue(app: Celery, job_id: uuid.UUID, stage: Stage) -> None:
    """Ring the doorbell once. Raises ``BrokerUnavailable`` within a few seconds if Redis is away."""
    try:
        app.send_task(TASK, args=[str(job_id), stage.value], queue=QUEUE_OF[stage], retry=False, ignore_result=True)
    except (KombuError, redis.RedisError, OSError) as error:
        raise BrokerUnavailable("Redis cannot be reached", cause=type(error).__name__) from error


def own_queue(worker: str) -> str:
    """The queue that this worker alone consumes and fills."""
    return f"own.{worker}"


def send_canary(app: Celery, redis_url: str, queue: str) -> None:
    """A message to this worker itself; of one that dies, Redis forgets it. Raises ``BrokerUnavailable``."""
    try:
        app.send_task(CANARY, args=[], queue=queue, retry=False, ignore_result=True)
        with redis.Redis.from_url(
            redis_url, socket_timeout=PUBLISH_TIMEOUT_S, socket_connect_timeout=PUBLISH_TIMEOUT_S
        ) as client:
            client.expire(KEY_PREFIX + queue, _CANARY_KEPT_S)
    except (KombuError, redis.RedisError, OSError) as error:
        raise BrokerUnavailable("Redis cannot be reached", cause=type(error).__name__) from error


def check_broker(redis_url: str) -> None:
    """Refuse a Redis that may evict messages under memory pressure.

    Raises ``SettingsInvalid`` for any policy but ``noeviction``, ``BrokerUnavailable`` if Redis is away. A
    server that does not let us read its configuration (managed services) is accepted.
    """
    client = redis.Redis.from_url(
        redis_url, socket_timeout=PUBLISH_TIMEOUT_S, socket_connect_timeout=PUBLISH_TIMEOUT_S, decode_responses=True
    )
    try:
        policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "noeviction")
    except redis.ResponseError:
        return
    except (redis.RedisError, OSError) as error:
        raise BrokerUnavailable("Redis cannot be reached", cause=type(error).__name__) from error
    finally:
        client.close()
    if policy != "noeviction":
        raise SettingsInvalid(
            f"Redis evicts keys ({policy}) and would drop messages; set maxmemory-policy to noeviction", policy=policy
        )
