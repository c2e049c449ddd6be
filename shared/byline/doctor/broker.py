"""What the doctor asks Redis, and what Celery is set to.

Why it exists: Redis is only a doorbell, but one that evicts keys or gives a message to two workers looks healthy.
"""

from __future__ import annotations

from typing import Any

import redis

from byline.doctor.finding import Finding, Level, ok
from byline.queue import TIME_LIMIT_S, VISIBILITY_TIMEOUT_S, make_celery

MEMORY_SHARE = 0.7


def broker(redis_url: str, timeout_s: float = 2.0) -> list[Finding]:
    """Reachable, never evicting, keeping its data, not full."""
    client: Any = redis.Redis.from_url(
        redis_url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, decode_responses=True
    )
    try:
        info = client.info()
        try:
            configured = {**client.config_get("maxmemory-policy"), **client.config_get("appendonly")}
        except redis.ResponseError:
            configured = {}
    except (redis.RedisError, OSError) as error:
        advice = "start it, or mend BYLINE_REDIS_URL; jobs are still accepted, and wait"
        return [Finding("redis", Level.FAILURE, f"cannot be reached ({type(error).__name__})", advice)]
    finally:
        client.close()
    server = f"{info.get('server_name', 'redis')} {info.get('valkey_version') or info.get('redis_version')}"
    return [ok("redis", server), _policy(configured), _persistence(configured), _memory(info)]


def _policy(configured: dict[str, str]) -> Finding:
    policy = configured.get("maxmemory-policy")
    if policy is None:
        return Finding("redis.policy", Level.SKIPPED, "the server does not tell", "make sure that it is noeviction")
    if policy != "noeviction":
        return Finding("redis.policy", Level.FAILURE, policy, "set maxmemory-policy noeviction: it would drop messages")
    return ok("redis.policy", policy)


def _persistence(configured: dict[str, str]) -> Finding:
    append = configured.get("appendonly")
    if append == "no":
        advice = "set appendonly yes: without it a restart costs every waiting job some seconds (none is lost)"
        return Finding("redis.persistence", Level.WARNING, "appendonly no", advice)
    return ok("redis.persistence", "appendonly yes") if append else Finding(
        "redis.persistence", Level.SKIPPED, "the server does not tell"
    )  # fmt: skip


def _memory(info: dict[str, Any]) -> Finding:
    used, limit = int(info["used_memory"]), int(info.get("maxmemory") or 0)
    found = f"{used / 1e6:.1f} MB used" + (f" of {limit / 1e6:.1f}" if limit else ", no limit")
    if limit and used > MEMORY_SHARE * limit:
        return Finding("redis.memory", Level.WARNING, found, "raise maxmemory, or see who else writes there")
    return ok("redis.memory", found)


def timeouts(redis_url: str, lease_s: float, heartbeat_s: float) -> list[Finding]:
    """Do the times fit each other: heartbeat < lease, a stage's limit < the time after which kombu redelivers?"""
    effective = make_celery(redis_url).conf.broker_transport_options["visibility_timeout"]
    longest = max(TIME_LIMIT_S.values())
    found = f"longest stage {longest} s, redelivery after {effective} s"
    queue = (
        ok("timeouts.queue", found)
        if longest < effective == VISIBILITY_TIMEOUT_S
        else Finding("timeouts.queue", Level.FAILURE, found, "redelivery must come after the longest stage's end")
    )
    beats = f"a lease of {lease_s:g} s, a heartbeat every {heartbeat_s:g} s"
    if lease_s < 2 * heartbeat_s:
        advice = "one late heartbeat loses the job: let the lease be at least two heartbeats"
        return [queue, Finding("timeouts.lease", Level.WARNING, beats, advice)]
    return [queue, ok("timeouts.lease", beats)]
