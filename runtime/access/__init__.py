"""Access to a server: keys and their scopes, the admin token, hosts and origins, limits, audit.

Independent of HTTP frameworks and the engine: `runtime.api.http.auth` applies it to requests, `runtime.cli` reads and
writes its files.
"""

from runtime.access.access import Access

__all__ = ["Access"]
