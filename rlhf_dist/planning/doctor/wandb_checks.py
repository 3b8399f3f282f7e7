"""Whether runs could be shown by Weights & Biases."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.planning.doctor.findings import Finding

HOST = "api.wandb.ai"


def check_wandb() -> Sequence[Finding]:
    """Installed, logged in, and in which mode. wandb is optional, never an error, and not imported here: that takes seconds."""
    try:
        version = importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        return [Finding("note", "wandb", "is not installed", "pip install wandb, or leave tracking.wandb: off")]
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return [
            Finding("note", "wandb", f"{version}, WANDB_MODE={mode}", "unset WANDB_MODE for tracking.wandb: online")
        ]
    login = "WANDB_API_KEY is set" if os.environ.get("WANDB_API_KEY") else _login()
    if not login:
        remedy = "wandb login, or WANDB_API_KEY, where tracking.wandb is to be online; offline needs neither"
        return [Finding("note", "wandb", f"{version}, not logged in", remedy)]
    return [Finding("ok", "wandb", f"{version}, {login}")]


def _login() -> str:
    """Where wandb's login stands, "" where there is none. The file may have any form: it is searched as text."""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    host = os.environ.get("WANDB_BASE_URL", f"https://{HOST}").split("://")[-1].split("/")[0]
    try:
        found = host in file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return f"logged in at {host} ({file})" if found else ""
