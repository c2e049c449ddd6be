"""The programs of Byline: thin shells around ``byline``, one folder each, started by ``python -m services.NAME``."""
