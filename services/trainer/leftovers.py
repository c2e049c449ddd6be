"""What a killed trainer left, brought to an end by the next one.

Why it exists: nothing may stay half-published. A directory that was renamed into place but never registered, and a
candidate that was registered but never judged, are recorded as given up, so that they are seen, explained and later
collected. One that had passed the gate is activated, if the release it was judged against still answers: its work is
done. Only called by the trainer whose turn it is; only what a trainer made is touched.
"""

from __future__ import annotations

from pathlib import Path

from byline.errors import ReleaseChanged, ReleaseCorrupt, ReleaseNotEligible
from byline.releases.manifest import MANIFEST, ReleaseManifest
from byline.releases.registry import ReleaseRecord, ReleaseRegistry, ReleaseState
from byline.telemetry import get_logger

log = get_logger(__name__)

#: Begins the reason of a candidate whose trainer ended before it was judged.
ABANDONED = "ABANDONED"


def settle_leftovers(registry: ReleaseRegistry, root: Path, model_id: str) -> tuple[str, ...]:
    """End what another trainer of this model began; returns the ids of the releases touched."""
    touched = []
    for directory, manifest in _unregistered(registry, root, model_id):
        registry.register(manifest, directory)
        touched.append(_give_up(registry, manifest.release_id, "registered"))
    for record in registry.list(model_id, limit=20):
        if record.manifest.refresh is None or record.release_id in touched:
            continue
        if record.state is ReleaseState.BUILT:
            touched.append(_give_up(registry, record.release_id, "judged"))
        elif record.state is ReleaseState.VALIDATED and _finish(registry, record):
            touched.append(record.release_id)
    return tuple(touched)


def _unregistered(registry: ReleaseRegistry, root: Path, model_id: str) -> list[tuple[Path, ReleaseManifest]]:
    known = {record.release_id for record in registry.list(model_id, limit=1_000_000)}
    found = []
    for path in sorted(root.glob(f"[!.]*/{MANIFEST}")):
        if path.parent.name in known:
            continue
        try:
            manifest = ReleaseManifest.read(path.parent)
        except ReleaseCorrupt as error:
            log.warning("unregistered_release_unreadable", directory=str(path.parent), error=error.message)
            continue
        if manifest.model_id == model_id and manifest.refresh is not None:
            found.append((path.parent, manifest))
    return found


def _give_up(registry: ReleaseRegistry, release_id: str, what: str) -> str:
    registry.reject(release_id, f"{ABANDONED}: its trainer ended before it was {what}")
    log.warning("release_given_up", release_id=release_id, before=what)
    return release_id


def _finish(registry: ReleaseRegistry, record: ReleaseRecord) -> bool:
    """Activate a candidate that passed the gate, if nothing was activated since; whether it was settled.

    One that cannot be activated any more (its files were collected) is given up: it must not hold up every trainer.
    """
    active = registry.active(record.model_id)
    if (active.release_id if active else None) != record.parent:
        return False
    if active is not None and active.updated_at > record.created_at:
        return False
    try:
        registry.activate(record.model_id, record.release_id, expected_epoch=active.epoch if active else 0,
                          reason="passed the gate", principal="trainer")
    except ReleaseChanged:
        return False
    except ReleaseNotEligible as error:
        registry.reject(record.release_id, f"{ABANDONED}: it passed the gate, but {error.message}")
        log.warning("release_given_up", release_id=record.release_id, before="activated", error=error.message)
        return True
    log.info("release_activated_late", release_id=record.release_id)
    return True
