"""The folder of one run.

RUN_DIR/
  config.yaml      the resolved configuration
  metrics.jsonl    one line a step
  summary.json     what the run ended with
  samples/         generated samples, one file a step
  checkpoints/     step_*/
  model/           the trained model in Hugging Face format
  adapter/         the adapters alone, in peft's format, where the model was trained with some (`lora`)
  model_ema/       the moving average of a policy's weights, where `ppo.ema_decay` is set
  bad_rows.jsonl   data rows that were skipped under `on_bad_row: skip`, with the reasons
  aborted_step_*.jsonl   the samples that a step was aborted for
  logs/            logs of the actors, TensorBoard and wandb files
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from typing_extensions import Self

from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.core.json_lines import json_line

BAD_ROWS = "bad_rows.jsonl"


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file so that a crash leaves the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    # The rename itself is on disk only once the directory is.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class RunFolder:
    """Paths and writes of one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def check(cls, path: Path, *, resume: bool, overwrite: bool) -> None:
        """Reject, touching nothing, what `open` would reject. Raises RunFolderError.

        A folder that does not exist or holds no file may always be used. Any other needs `resume` (continue the run in
        it) or `overwrite` (remove that run first); either is rejected for a folder that holds no run.
        """
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"run_dir {path} is a file; a run needs a folder. Choose another run_dir.")
        if not path.exists() or _is_untouched(path):
            _check_writable(path)
            return
        is_run = cls(path).config_path.is_file()
        if not is_run:
            raise RunFolderError(
                f"run_dir {path} is not empty and holds no run (there is no config.yaml in it), so it is neither "
                "removed nor written to. Choose another run_dir, or empty the folder yourself."
            )
        if not (resume or overwrite) and cls(path)._has_results():
            raise RunFolderError(
                f"run_dir {path} holds an earlier run, and a new run never replaces one unasked. Pass --resume auto to "
                "continue it, --overwrite true to remove it first, or choose another run_dir."
            )
        _check_writable(path)

    @classmethod
    def open(cls, path: Path, *, resume: bool, overwrite: bool) -> Self:
        """Make the folder ready: checked, an earlier run removed if told to, subfolders made."""
        cls.check(path, resume=resume, overwrite=overwrite)
        if overwrite and path.exists():
            # The contents go, the folder stays: it may be a mount point or a link, or a shell's current directory. The
            # mark of a run goes last, so that an interrupted removal can be repeated.
            for child in sorted(path.iterdir(), key=lambda child: child.name == "config.yaml"):
                if child.is_dir() and not child.is_symlink():
                    shutil.rmtree(child)
                else:
                    child.unlink()
        folder = cls(path)
        for directory in (folder.samples_dir, folder.checkpoints_dir, folder.logs_dir):
            directory.mkdir(parents=True, exist_ok=True)
        return folder

    def _has_results(self) -> bool:
        """Whether the run ever got as far as measuring: one that was rejected or failed while starting did not."""
        measured = self.metrics_path.exists() and self.metrics_path.stat().st_size > 0
        start = {self.config_path, self.metrics_path, self.samples_dir, self.checkpoints_dir, self.logs_dir}
        more = any(child not in start for child in self.path.iterdir())
        return measured or more or any(self.checkpoints_dir.glob("step_*"))

    @property
    def config_path(self) -> Path:
        """The resolved configuration; its presence marks a folder as a run's."""
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """One JSON line a step."""
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """What the run ended with."""
        return self.path / "summary.json"

    @property
    def samples_dir(self) -> Path:
        """Generated samples."""
        return self.path / "samples"

    @property
    def checkpoints_dir(self) -> Path:
        """Checkpoints, step_*/."""
        return self.path / "checkpoints"

    @property
    def model_dir(self) -> Path:
        """The trained model in Hugging Face format."""
        return self.path / "model"

    @property
    def logs_dir(self) -> Path:
        """Logs of the actors, TensorBoard and wandb files."""
        return self.path / "logs"

    def write_config(self, text: str) -> None:
        """Write config.yaml."""
        write_atomically(self.config_path, text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json. Keys keep their order; text stays readable."""
        write_atomically(self.summary_path, json_line(summary, indent=2))


def _is_untouched(path: Path) -> bool:
    """Whether a folder is empty, or holds only what `open` makes: a run that ended before it wrote anything."""
    ours = {"samples", "checkpoints", "logs"}
    return all(child.name in ours and child.is_dir() and not any(child.iterdir()) for child in path.iterdir())


def _check_writable(path: Path) -> None:
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RunFolderError(
            f"run_dir {path} cannot be written: {parent} is not a folder that this user may write to. Choose another "
            "run_dir, or change its permissions."
        )


def replace_folder(new: Path, final: Path) -> None:
    """Put the folder `new` in the place of `final`, which is removed only after; a crash in between leaves one of the two."""
    old = final.with_name(f".replaced_{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    new.replace(final)
    shutil.rmtree(old, ignore_errors=True)
