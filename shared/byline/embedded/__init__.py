"""Private Postgres and Redis-protocol servers, and the supervisor behind ``byline up``.

Why it exists: on a machine without servers and without root, the same programs must run as in
production. Real servers come from wheels, live under one state directory and listen on 127.0.0.1
only; every other part of the code sees nothing but two URLs.
"""

from byline.embedded.discovery import Servers, discover

__all__ = ["Servers", "discover"]
