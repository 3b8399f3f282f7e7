"""Starting a run: its folder, its session, its hosted roles, its checkpoints.

Everything that can be checked without a process (data, models, run folder, placement) is checked before the first actor
starts and before the run folder is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_dist.config.hosting import HostedRun, RunConfig
from rlhf_dist.config.load import dump_yaml
from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.distributed.group import Session, WorkerGroup
from rlhf_dist.distributed.inline import InlineSession
from rlhf_dist.run import preemption
from rlhf_dist.run.checkpoint import Checkpoints, step_of
from rlhf_dist.run.console import print_table
from rlhf_dist.run.identity import identity
from rlhf_dist.run.prepared import Prepared
from rlhf_dist.run.run import Run
from rlhf_dist.run.run_folder import BAD_ROWS, RunFolder, write_atomically
from rlhf_dist.run.run_summary import print_shares


def open_session(config: HostedRun) -> Session:
    """A session of the run's hosting; connects to nothing yet."""
    if config.cluster == "inline":
        return InlineSession(config.device)
    from rlhf_dist.distributed.ray.session import RaySession  # Ray takes a second to import: not for inline runs

    return RaySession(config.ray, config.device)


def check_run_folder(config: Any) -> None:
    """Check that the run folder of a `RunConfig` or `EvalConfig` may be used; touches nothing.

    Raises:
        RunFolderError: it holds another run's results.
    """
    RunFolder.check(config.run_dir, resume=config.resume == "auto", overwrite=config.overwrite)


@contextlib.contextmanager
def hosted(
    config: Any, prepared: Prepared[Any], session: Session | None
) -> Iterator[tuple[Run, dict[str, WorkerGroup]]]:
    """The run's folder and its hosted roles; on leaving, the roles are gone and what was started here is stopped.

    An earlier run's folder is touched only when the new run's placement is granted.

    Args:
        config: a `RunConfig` or `EvalConfig`.
        prepared: of the same run.
        session: host in this one, and leave it open; None: in a session of the run's own.
    """
    own = session or open_session(config)
    resumed_step = resumable_step(config, prepared)
    folder: RunFolder = RunFolder(config.run_dir)

    def open_folder() -> Path:
        nonlocal folder
        folder = RunFolder.open(config.run_dir, resume=config.resume == "auto", overwrite=config.overwrite)
        folder.write_config(dump_yaml(config))
        if prepared.bad_rows:
            write_atomically(folder.path / BAD_ROWS, "".join(prepared.bad_rows))
        return folder.logs_dir

    try:
        own.check(prepared.specs)
        print_table(str(config.run_dir), [(name, str(value)) for name, value in prepared.run_summary.items()])
        print_shares(prepared.shares)
        with (
            own.place(prepared.specs, seed=config.seed, logs_dir=open_folder) as groups,
            Run.open(config, folder, resumed_step=resumed_step, stop_requested=preemption.requested) as run,
        ):
            yield run, groups
    finally:
        if session is None:
            own.close()


def resumable_step(config: Any, prepared: Prepared[Any]) -> int | None:
    """The step a resumed run continues from; None for a new run.

    Raises:
        RunFolderError: the checkpoint is another configuration's, or the run is finished and left no checkpoint.
    """
    if config.resume != "auto":
        return None
    found = checkpoints(config, prepared)
    latest = found.latest()
    if latest is not None:
        found.check(latest)
        return step_of(latest)
    if RunFolder(config.run_dir).summary_path.exists():
        raise RunFolderError(
            f"run_dir {config.run_dir} holds a finished run without checkpoints, so there is nothing to resume; pass "
            "--overwrite true (and --resume no) to run it again, or choose another run_dir"
        )
    return None


def checkpoints(config: RunConfig, prepared: Prepared[Any]) -> Checkpoints:
    """The run's checkpoints, which carry the run's identity: a resumed run must have the same."""
    shared = identity(config, prepared.contents)
    shared |= {f"number of {name}": value for name, value in prepared.run_summary.items() if isinstance(value, int)}
    return Checkpoints(RunFolder(config.run_dir).checkpoints_dir, config.checkpoint.keep_last, shared)
