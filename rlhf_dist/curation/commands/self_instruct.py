"""`rlhf-dist data self-instruct`: seed tasks and a language model → instruction records."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_dist.config.load import dump_yaml
from rlhf_dist.config.yaml_file import read_mapping
from rlhf_dist.core.errors import DataError
from rlhf_dist.curation.config.self_instruct import SelfInstructConfig
from rlhf_dist.curation.generators import load_generator
from rlhf_dist.curation.output import CONFIG, OutputFolder, check_output, print_notes, written
from rlhf_dist.curation.prompts import PromptTemplate
from rlhf_dist.curation.resumable import Work, identity_of, resumable
from rlhf_dist.curation.self_instruct import PROMPT, SelfInstruct, read_seeds, restore, run_rounds
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.run.console import RunProgress, print_table

COMPLETIONS = "completions.jsonl"
REJECTED = "rejected.jsonl"
_CAPS = ("num_records", "max_requests")


def run(config: SelfInstructConfig) -> None:
    """Generate until `num_records` are kept or `max_requests` are used up; continue where an earlier call stopped."""
    check_output(config.out_dir, config.overwrite)
    bad_rows = BadRows()
    seeds = read_seeds(config.seeds, bad_rows)
    prompt = PromptTemplate(config.prompt_path, PROMPT)
    state = SelfInstruct(config, seeds, prompt)
    state.next_requests()  # a prompt that cannot be rendered is rejected before a model is loaded
    identity = identity_of(config, without=_CAPS, seeds=_fingerprint(seeds), prompt=prompt.sha256)
    with resumable(config.out_dir, identity, _earlier(config)) as work:
        _generate(config, state, work)
        nearest = state.nearest()
        with written(config.out_dir, config.overwrite, dump_yaml(config)) as folder:
            _write(folder, state, nearest, work, bad_rows)
    _show(config, state, nearest, bad_rows)
    print_notes(bad_rows)
    if not state.records:
        raise DataError(
            f"no record was kept of {state.report.parsed} tasks in {state.report.requests} completions; {config.out_dir} says "
            f"why ({REJECTED}, {COMPLETIONS}). Try a more able model, another prompt, or other filters."
        )


def _earlier(config: SelfInstructConfig) -> Path | None:
    """The completions of a finished result, where only more is wanted of it."""
    settings, completions = config.out_dir / CONFIG, config.out_dir / COMPLETIONS
    if not (settings.is_file() and completions.is_file()):
        return None
    known, _ = read_mapping(settings)
    before = [known.get(cap) for cap in _CAPS]
    if not all(isinstance(cap, int) for cap in before):  # another command's
        return None
    changes = [getattr(config, name) - cap for name, cap in zip(_CAPS, before, strict=True)]
    return completions if min(changes) >= 0 < max(changes) else None


def _generate(config: SelfInstructConfig, state: SelfInstruct, work: Work) -> None:
    restore(state, work)
    if state.finished:
        return
    generator = load_generator(config.generator, config.seed)
    with RunProgress("self-instruct", config.num_records, min(state.report.kept, config.num_records)) as progress:
        if state.report.requests:
            progress.message(f"continuing after {state.report.requests} requests, {state.report.kept} records kept")
        kept = state.report.kept
        try:
            for report in run_rounds(state, generator, work):
                progress.advance(report.kept - kept)
                kept = report.kept
                progress.message(
                    f"{report.requests} requests: {report.parsed} tasks parsed, {report.rejected.total()} rejected, "
                    f"{report.kept} of {config.num_records} kept"
                )
        finally:
            generator.close()


def _write(folder: OutputFolder, state: SelfInstruct, nearest: dict[str, Any], work: Work, bad_rows: BadRows) -> None:
    folder.write_records(state.records)
    folder.write_records(state.rejections, REJECTED)
    work.save_to(folder.path / COMPLETIONS)
    folder.write_bad_rows(bad_rows)
    settings = state.settings
    folder.write_report(
        {
            "records": len(state.records),
            "wanted": settings.num_records,
            "stopped_by": "num_records" if len(state.records) >= settings.num_records else "max_requests",
            **state.report.as_dict(),
            "nearest": nearest,
            "seeds": {"read": len(state.seeds), "shown": len(state.shown), "bad": len(bad_rows)},
            "generator": settings.generator.model_dump(mode="json"),
            "prompt": {"origin": state.prompt.origin, "sha256": state.prompt.sha256},
        }
    )


def _show(config: SelfInstructConfig, state: SelfInstruct, nearest: dict[str, Any], bad_rows: BadRows) -> None:
    report = state.report
    rows: list[tuple[str, Any]] = [
        ("requests", report.requests),
        ("  failed", report.failed_requests),
        ("  without a task", report.without_tasks),
        ("pieces malformed", report.malformed),
        ("tasks cut off", report.unfinished),
        ("tasks parsed", report.parsed),
        *((f"  rejected: {rule}", number) for rule, number in report.rejected.most_common()),
        ("  not needed any more", report.surplus),
        ("records kept", report.kept),
    ]
    if nearest:
        rows.append(("nearest other, ROUGE-L", f"mean {nearest['mean']}, largest {nearest['max']}"))
    if bad_rows:
        rows.append(("bad seeds, skipped", len(bad_rows)))
    print_table(str(config.out_dir), [(name, str(value)) for name, value in rows])
    if report.kept < config.num_records:
        print(
            f"Stopped at max_requests {config.max_requests}: {report.kept} of {config.num_records} records. "
            "Raise it and pass --overwrite true to continue from there."
        )


def _fingerprint(seeds: list[Any]) -> str:
    return hashlib.sha256(json.dumps([asdict(seed) for seed in seeds]).encode()).hexdigest()
