"""Which corpus a model was trained on, read once for each model.

Why it exists: every answer names items of a corpus and every withdrawal is looked up by it, but a job only
knows its model. A registered model never changes its corpus (``CatalogStore.add_model`` refuses that).
"""

from __future__ import annotations

from byline.catalog.store import CatalogStore


class Models:
    """Remembers what never changes about the registered models."""

    def __init__(self, catalog: CatalogStore) -> None:
        self._catalog = catalog
        self._corpus_of: dict[str, str] = {}

    def corpus_of(self, model_id: str) -> str:
        """The corpus of a model. ModelNotFound."""
        known = self._corpus_of.get(model_id)
        if known is None:
            known = self._catalog.model(model_id).corpus_id
            self._corpus_of[model_id] = known
        return known
