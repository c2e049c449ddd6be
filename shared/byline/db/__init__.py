"""The database: tables, migrations, connections and notifications.

Why it exists: Postgres is the truth of the whole system, and this package is the only place that says
what it looks like. Nothing here knows what a job or a release *means*; see ``byline.jobs`` and
``byline.releases`` for that.
"""

from byline.db import corpus_models as _corpus_models  # noqa: F401
from byline.db import curation_models as _curation_models  # noqa: F401
from byline.db import operations_models as _operations_models  # noqa: F401 - a table is known once its module is
from byline.db import security_models as _security_models  # noqa: F401
from byline.db import trainer_models as _trainer_models  # noqa: F401
from byline.db.migration import migrate
from byline.db.session import Session, make_engine, transaction

__all__ = ["Session", "make_engine", "migrate", "transaction"]
