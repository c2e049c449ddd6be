"""``byline doctor``: is this installation set up so that its promises can hold?

Why it exists: the settings that lose data (a Redis that evicts, a Postgres that does not flush, a schema one step
behind, clocks apart, a damaged release) give no error until the night they matter. Each check is a function that
returns one or more findings and never raises for what it looks at; ``examine`` runs all of them.
"""

from byline.doctor.examination import examine
from byline.doctor.finding import Finding, Level, worst

__all__ = ["Finding", "Level", "examine", "worst"]
