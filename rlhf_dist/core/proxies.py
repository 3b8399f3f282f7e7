"""The proxy that the environment puts between this process and a server, for messages."""

from __future__ import annotations

import os
from urllib.parse import urlsplit
from urllib.request import proxy_bypass


def proxy_hint(url: str) -> str:
    """A sentence that names the variable by which requests to `url` go through a proxy; "" where none does."""
    parts = urlsplit(url)
    if not parts.hostname or proxy_bypass(parts.hostname):
        return ""
    names = [f"{parts.scheme}_proxy", f"{parts.scheme}_proxy".upper(), "all_proxy", "ALL_PROXY"]
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return ""
    proxy = urlsplit(os.environ[name])
    where = f"{proxy.hostname}:{proxy.port}" if proxy.hostname and proxy.port else proxy.hostname or "set"
    return (
        f" The variable {name} sends the request through a proxy ({where}): if that is not meant, unset it, or add "
        f"{parts.hostname} to no_proxy."
    )
