"""`rlhf-dist data responses`: prompts and two or more models or sampling settings → candidates to choose among."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from itertools import chain, repeat

from rlhf_dist.config.load import dump_yaml
from rlhf_dist.core.errors import DataError
from rlhf_dist.curation.config.responses import ResponsesConfig
from rlhf_dist.curation.generators import Completion, Generator, check_some_answered, load_generator
from rlhf_dist.curation.output import check_output, print_notes, written
from rlhf_dist.curation.responses import Responses, ResponsesReport, read_distinct_prompts
from rlhf_dist.curation.resumable import Work, identity_of, resumable
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.run.console import RunProgress, print_table

COMPLETIONS = "completions.jsonl"
SKIPPED = "skipped.jsonl"


def run(config: ResponsesConfig) -> None:
    """Let every generator answer every prompt; continue where an earlier call stopped."""
    check_output(config.out_dir, config.overwrite)
    bad_rows, report = BadRows(), ResponsesReport()
    prompts = read_distinct_prompts(config.prompts, bad_rows, report)
    state = Responses(config, prompts, report)
    fingerprint = hashlib.sha256(
        json.dumps(
            [(prompt.messages, prompt.tools) if prompt.tools else prompt.messages for prompt in prompts]
        ).encode()
    ).hexdigest()
    with resumable(config.out_dir, identity_of(config, prompts=fingerprint)) as work:
        _generate(config, state, work)
        with written(config.out_dir, config.overwrite, dump_yaml(config)) as folder:
            folder.write_records(state.records())
            folder.write_records(state.skipped, SKIPPED)
            work.save_to(folder.path / COMPLETIONS)
            folder.write_bad_rows(bad_rows)
            folder.write_report({**asdict(report), "bad": len(bad_rows)})
    _show(config, report, bad_rows)
    if not report.records:
        raise DataError(
            f"no prompt of {report.prompts} got two different responses; {config.out_dir} says why. Raise the temperature, or "
            "give other models."
        )


def _generate(config: ResponsesConfig, state: Responses, work: Work) -> None:
    """Pieces of the journal first, then of the models, one model at a time."""
    current: tuple[int, Generator] | None = None
    found = chain(list(work.done), repeat(None))
    progress = RunProgress("responses", state.num_slots)
    with progress:
        if work.num_found:
            progress.message(f"continuing after {work.num_found} batches")
        try:
            for piece in state.pieces():
                entry = next(found)
                if entry is not None:
                    completions = [Completion(**row) for row in entry["completions"]]
                else:
                    settings = config.generators[piece.generator]
                    if current is None or current[0] != piece.generator:
                        if current is not None:
                            current[1].close()
                        progress.message(f"{settings.label}: loading")
                        current = piece.generator, load_generator(settings, config.seed)
                    completions = current[1].generate(state.requests(piece))
                    check_some_answered(completions, settings.label, state.has_answered(piece.generator))
                    work.add({"completions": [completion.as_row() for completion in completions]})
                    progress.message(f"{settings.label}: {state.report.requests + len(piece.slots)} responses in all")
                state.absorb(piece, completions)
                progress.advance(0 if piece.draw else len(piece.slots))
        finally:
            if current is not None:
                current[1].close()


def _show(config: ResponsesConfig, report: ResponsesReport, bad_rows: BadRows) -> None:
    header = ("generator", "temperature", "kept", "cut off", "equal", "empty", "failed")
    rows = [
        [
            made["generator"],
            f"{made['sampling']['temperature']:g}",
            *(str(made.get(name, 0)) for name in ("kept", "cut_off", "equal", "empty", "failed")),
        ]
        for made in report.by_generator
    ]
    print_table(str(config.out_dir), rows, header)
    print_notes(bad_rows)
    print(
        f"{report.records} prompts with two or more responses, {report.skipped_prompts} without; {report.repeated_prompts} "
        f"came again, {len(bad_rows)} bad; {report.requests} requests, {report.redrawn} of them drawn anew."
    )
