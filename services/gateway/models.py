"""What never changes about models and releases, read once: a model's corpus, a release's manifest.

Why it exists: every answer names items of a corpus, but a job only knows its model, and every request is checked
against the active release. A registered model never changes its corpus (``CatalogStore.add_model`` refuses that), a
registered release never its manifest; which release is active is asked each time.
"""

from __future__ import annotations

from sqlalchemy import Connection

from byline.catalog.store import CatalogStore
from byline.releases.manifest import ReleaseManifest
from byline.releases.registry import ReleaseRegistry


class Models:
    """Remembers what never changes about the registered models."""

    def __init__(self, catalog: CatalogStore) -> None:
        self._catalog = catalog
        self._corpus_of: dict[str, str] = {}

    def corpus_of(self, model_id: str, connection: Connection) -> str:
        """The corpus of a model. ModelNotFound. ``connection``: the caller's, as a second one may not be had."""
        known = self._corpus_of.get(model_id)
        if known is None:
            known = self._catalog.model_within(connection, model_id).corpus_id
            self._corpus_of[model_id] = known
        return known


class Manifests:
    """Remembers the manifests of the releases asked about; a service sees few of them in its life."""

    def __init__(self, registry: ReleaseRegistry) -> None:
        self._registry = registry
        self._known: dict[str, ReleaseManifest] = {}

    def manifest(self, release_id: str, connection: Connection) -> ReleaseManifest:
        """The manifest of a registered release. ReleaseNotFound."""
        known = self._known.get(release_id)
        if known is None:
            known = self._known[release_id] = self._registry.get_within(connection, release_id).manifest
        return known
