"""Which environment variables are secrets, by their names."""

from __future__ import annotations

_SECRET = {"TOKEN", "KEY", "APIKEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS"}
"""Words of variables' names."""
_PLACES = {"PATH", "FILE", "DIR"}
"""Last words of variables that say where a secret lies."""
_OTHER_PLACES = {"GOOGLE_APPLICATION_CREDENTIALS"}
"""Those that do so without such a word."""


def is_secret(name: str) -> bool:
    """Whether a variable of that name holds a secret, as in HF_TOKEN; not where one lies, as in HF_TOKEN_PATH."""
    words = name.upper().split("_")
    return bool(_SECRET & set(words)) and words[-1] not in _PLACES and name.upper() not in _OTHER_PLACES
