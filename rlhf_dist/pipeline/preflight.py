"""Every check of a pipeline's stages that can be made before the first of them runs.

What a stage takes from an earlier one that has not run is stood in for: a model by the configuration and tokenizer that it
will have, as they follow from the model it starts from; records by the sets themselves, which are made aside. So the
checks of a later stage are those of its own command, on its own data, hours before it starts.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_dist.config.interpolation import Interpolation
from rlhf_dist.core.errors import RlhfDistError
from rlhf_dist.data.splits import write_set
from rlhf_dist.data.tokenizer import add_pad_token, load_tokenizer
from rlhf_dist.distributed.group import Session
from rlhf_dist.models import score_moments
from rlhf_dist.models.loading import as_scalar_config, check_causal_lm, load_model_config
from rlhf_dist.models.score_moments import ScoreMoments
from rlhf_dist.models.vocabulary import num_token_ids
from rlhf_dist.pipeline.commands import COMMANDS
from rlhf_dist.pipeline.config import PipelineConfig
from rlhf_dist.pipeline.stage_config import stage_config
from rlhf_dist.pipeline.stages import Stage, State, files_of, raise_together
from rlhf_dist.run.lineage import sha256_of_file
from rlhf_dist.run.run_folder import BAD_ROWS, RunFolder, write_atomically

MANIFEST = "manifest.json"
"""Of the data stage: what each file holds, and what was skipped."""


class _NotCheckedError(Exception):
    """A stage that starts from one that failed its checks."""


class Preflight:
    """Checks the stages that have not ended yet. Writes below `scratch` only, where the sets of the data stage are made."""

    def __init__(
        self, pipeline: PipelineConfig, stages: Sequence[Stage], states: Mapping[str, State], scratch: Path
    ) -> None:
        self._pipeline = pipeline
        self._stages = {stage.name: stage for stage in stages}
        self._states = states
        self._scratch = scratch
        self.data_seconds = 0.0
        """What making the sets took."""
        self._configs: dict[str, Any] = {}
        """Of the stages that passed."""

    @property
    def data(self) -> Path:
        """What will be the data stage's folder, where that stage has not run."""
        return self._scratch / "data"

    def check(self, session: Session | None) -> dict[str, dict[str, Any]]:
        """Stage → derived numbers, of the stages that have not ended. `session` checks the placement, where it is given.

        Raises:
            RlhfDistError: what is wrong with a stage; all of it in one message, each with its stage.
        """
        summary: dict[str, dict[str, Any]] = {}
        errors: list[RlhfDistError] = []
        for name, stage in self._stages.items():
            if self._states[name].word in ("done", "written"):
                continue
            try:
                with contextlib.suppress(_NotCheckedError):
                    summary[name] = self._data(stage) if name == "data" else self._stage(stage, session)
            except RlhfDistError as error:
                errors.append(type(error)(f"{name}: {self._as_it_will_be(str(error))}"))
        raise_together(errors)
        return summary

    def _stage(self, stage: Stage, session: Session | None) -> dict[str, Any]:
        RunFolder.check(stage.folder, resume=True, overwrite=False)
        config = stage_config(self._pipeline, stage.name, self._locate, stage.folder)
        prepared = COMMANDS[stage.name].prepare(config)
        if session is not None:
            session.check(prepared.specs)
        self._configs[stage.name] = config
        shares = {
            f"share of {row['source']}": f"{row['share']:.2%} of an epoch's records ({row['taken']} of {row['available']})"
            for row in prepared.shares
        }
        return prepared.run_summary | shares

    def _data(self, stage: Stage) -> dict[str, Any]:
        started = time.perf_counter()
        manifest = make_data(stage, self.data)
        self.data_seconds = time.perf_counter() - started
        self._configs["data"] = stage.config
        summary: dict[str, Any] = {}
        for name, made in manifest.items():
            for file in made["files"].values():
                label = f"{name}.{file['part']}" if file["part"] else name
                summary[label] = summary.get(label, 0) + file["records"]
            if made["skipped"]:
                summary[f"{name}: skipped"] = f"{made['skipped']} of {made['records']}"
        return summary

    def _as_it_will_be(self, message: str) -> str:
        """A message that names what will be there, in place of what is in for it."""
        for name, stage in self._stages.items():
            final = stage.folder if name == "data" else stage.folder / "model"
            message = message.replace(str(self._scratch / name), str(final))
        return message

    def _folder(self, name: str) -> Path:
        stage = self._stages.get(name)
        return stage.folder if stage is not None else self._pipeline.run_dir

    def _locate(self, found: Interpolation) -> list[Path]:
        ended = self._states[found.stage].word in ("done", "written")
        if not ended and found.stage not in self._configs:
            raise _NotCheckedError
        if found.stage == "data":
            folder = self._folder("data") if ended else self.data
            return filled(files_of(found, self._stages["data"].config, folder / "sets"))
        return [self._folder(found.stage) / found.output if ended else self._stand_in(found.stage)]

    def _stand_in(self, name: str) -> Path:
        """A folder with the configuration and the tokenizer that the model of a stage will have."""
        folder = self._scratch / name
        if folder.exists():
            return folder
        config = self._configs[name]
        start = (config.policy if name == "ppo" else config.model).model_path
        model = load_model_config(start)
        if name == "reward":
            as_scalar_config(model)
        else:
            check_causal_lm(model, name)
        tokenizer = load_tokenizer(start, config.data.template_path)
        num_ids = num_token_ids(tokenizer)
        if name == "reward":
            add_pad_token(tokenizer)
        text = model.get_text_config()
        if (name != "ppo" and config.model.resize_embeddings) or num_token_ids(tokenizer) > num_ids:
            text.vocab_size = max(text.vocab_size, num_token_ids(tokenizer))
        model.save_pretrained(folder)
        if name == "reward":
            (folder / score_moments.FILE).write_text(ScoreMoments(0.0, 1.0, 1, "held-out").to_json(), encoding="utf-8")
        tokenizer.save_pretrained(folder)
        return folder


def filled(files: Sequence[Path]) -> list[Path]:
    """Those that hold records: a source may have none in a small part."""
    return [file for file in files if file.stat().st_size > 0]


def make_data(stage: Stage, folder: Path) -> dict[str, Any]:
    """Make the sets of a data stage in `folder`; returns what its manifest says of each.

    Raises:
        DataError: a record that cannot be used, or a part that would be empty.
    """
    sets: dict[str, Any] = {}
    bad_rows: list[str] = []
    for wanted in stage.config.sets:
        written = write_set(wanted, stage.seed, folder / "sets")
        sources = [
            {"path": item.path, "content": item.content, "kind": item.source.kind}
            for item in stage.inputs
            if item.source is not None and item.source in wanted.sources
        ]
        files = {
            file: {"part": part or None, "records": number, "sha256": sha256_of_file(folder / "sets" / file)}
            for part, found in written.files.items()
            for file, number in found.items()
        }
        sets[wanted.name] = {
            "sources": sources,
            "records": written.num_records,
            "skipped": written.num_unassigned,
            "files": files,
        }
        if written.bad:
            sets[wanted.name]["bad_rows"] = len(written.bad)
            bad_rows.extend(written.bad.lines())
    if bad_rows:
        write_atomically(folder / BAD_ROWS, "".join(bad_rows))
    write_atomically(folder / MANIFEST, json.dumps(sets, indent=2, ensure_ascii=False) + "\n")
    return sets
