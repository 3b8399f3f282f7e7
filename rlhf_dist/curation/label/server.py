"""The server of the labeling page: one process, one event loop, the page's library around it."""

from __future__ import annotations

import contextlib
import socket
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.curation.config.label import ANY_ADDRESS, LOOPBACK, LabelServer
from rlhf_dist.curation.labeling import LabelTask, tokens_of


def check_library() -> None:
    """Reject before anything is read.

    Raises:
        ConfigError: the page's library is not installed.
    """
    try:
        import nicegui  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the labeling page needs nicegui, which is not installed: pip install 'rlhf-dist[curation]'"
        ) from error


def serve_page(task: LabelTask, journal_path: Path) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    import uvicorn
    from fastapi import FastAPI
    from nicegui import ui

    from rlhf_dist.curation.label import page, report_page
    from rlhf_dist.curation.label.auth import Gate

    settings = task.config.server
    listening = _listen(settings)
    with listening:
        port = listening.getsockname()[1]
        tokens = tokens_of(task.config.out_dir)
        page.register(task)
        report_page.register(task)
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        ui.run_with(
            app,
            title=task.config.title,
            dark=None,
            tailwind=False,
            reconnect_timeout=10.0,
            show_welcome_message=False,
            favicon="⚖",
        )
        gate = Gate(app, tokens, hosts_of(settings), cookie=f"rlhf_label_{port}")
        _announce(task, journal_path, settings, port, tokens)
        config = uvicorn.Config(
            gate, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        # nicegui looks at every object of the process, and torch warns of one of its own that is looked at.
        warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
        if not server.started:
            raise ConfigError("the server of the page did not start; its messages stand above")
    print(f"Stopped. {len(task.judgements)} entries are in {journal_path}.")


def hosts_of(settings: LabelServer) -> list[str]:
    """Names that a browser may call this server by."""
    own = [] if settings.host in ANY_ADDRESS else [settings.host]
    local = LOOPBACK if settings.is_loopback or settings.host in ANY_ADDRESS else ()
    return [*own, *local, *settings.allowed_hosts]


def _listen(settings: LabelServer) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
        listening.listen(128)
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError(
            f"server.host {settings.host} with server.port {settings.port} cannot be listened on ({error}); choose another "
            "port (0 takes a free one), or an address of this machine"
        ) from error
    return listening


def _announce(task: LabelTask, journal_path: Path, settings: LabelServer, port: int, tokens: Mapping[str, str]) -> None:
    name = hosts_of(settings)[0] if settings.host not in ANY_ADDRESS else settings.allowed_hosts[0]
    base = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
    if not settings.is_loopback:
        print(
            f"warning: the page listens on {settings.host}, so others on the network reach it, over plain HTTP: whoever reads "
            "the traffic reads tokens and texts. An SSH tunnel to 127.0.0.1 does without.",
            file=sys.stderr,
        )
    print(
        f"{len(task.units)} pairs of {len(task.items)} prompts; {len(task.judgements)} entries so far in {journal_path}"
    )
    print(f"  annotators: {base}/?token={tokens['annotator']}")
    print(f"  organizer:  {base}/report?token={tokens['organizer']}")
    print("Ctrl-C ends it. What a page has moved on from is on disk.", flush=True)
