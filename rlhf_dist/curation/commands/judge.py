"""`rlhf-dist data judge`: candidates and a judge → judgements and preference records."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

from rlhf_dist.config.load import dump_yaml
from rlhf_dist.core.errors import DataError
from rlhf_dist.curation.agreement import as_json, position_bias
from rlhf_dist.curation.candidates import read_items
from rlhf_dist.curation.config.judge import JudgeConfig
from rlhf_dist.curation.function_judge import FunctionJudge, plain
from rlhf_dist.curation.generators import load_generator
from rlhf_dist.curation.judgements import preference_records
from rlhf_dist.curation.judging import PROMPT, Answer, Judge, Judging, ModelJudge, judge_prompt, run_pieces
from rlhf_dist.curation.labeling import units_of
from rlhf_dist.curation.output import check_output, print_notes, written
from rlhf_dist.curation.prompts import PromptTemplate
from rlhf_dist.curation.resumable import Work, identity_of, resumable
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.run.console import RunProgress, print_table

ANSWERS = "answers.jsonl"
JUDGEMENTS = "judgements.jsonl"
_PIECE = 64
"""Pairs that a function judges between two entries of the journal."""


def run(config: JudgeConfig) -> None:
    """Judge every pair in both orders; continue where an earlier call stopped."""
    check_output(config.out_dir, config.overwrite)
    bad_rows = BadRows()
    items = read_items(config.sources, bad_rows)
    units = units_of(items, config.pairs, config.seed)
    if not units:
        raise DataError("the sources hold no two different responses to one prompt, so there is nothing to judge")
    state = Judging(units, config.name)
    asked = PromptTemplate(config.prompt_path, PROMPT) if config.judge else FunctionJudge(str(config.function))
    fingerprints: dict[str, Any] = {
        "items": hashlib.sha256(json.dumps([item.id for item in items]).encode()).hexdigest()
    }
    if isinstance(asked, FunctionJudge):
        fingerprints["function"] = {"place": asked.place, "sha256": asked.sha256}
    else:
        judge_prompt(
            asked, *state.next_shown(1)[0], config.guidelines, config.seed
        )  # rejected before a model is loaded
        fingerprints["prompt"] = asked.sha256
    with resumable(config.out_dir, identity_of(config, without=("source_name",), **fingerprints)) as work:
        _judge(config, state, asked, work)
        if config.function:
            _set_aside(state, bad_rows)
        by_id = {item.id: item for item in items}
        with written(config.out_dir, config.overwrite, dump_yaml(config)) as folder:
            folder.write_records((judgement.entry() for judgement in state.judgements), JUDGEMENTS)
            made = preference_records(by_id, state.judgements, "majority", source=config.source_name)
            number = folder.write_records(made)
            work.save_to(folder.path / ANSWERS)
            folder.write_bad_rows(bad_rows)
            bias = as_json(position_bias(state.single))
            report = {"records": number, **state.report.as_dict(), "position_bias": bias, "bad": len(bad_rows)}
            folder.write_report(report | {"annotator": config.name})
    _show(config, report)
    print_notes(bad_rows)
    if not number:
        raise DataError(
            f"no pair of {len(units)} became a preference; {config.out_dir} says why ({ANSWERS}). Try a more able judge, "
            "another prompt or, where answers were cut off, a larger max_response_tokens."
        )


def _judge(config: JudgeConfig, state: Judging, asked: PromptTemplate | FunctionJudge, work: Work) -> None:
    for entry in work.done:
        state.absorb([Answer(*answer) for answer in entry["answers"]])
    if state.finished:
        return
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(RunProgress("judge", len(state.units), state.num_asked))
        if work.num_found:
            progress.message(f"continuing after {state.num_asked} pairs")
        judge, size = _judge_of(config, asked, stack)
        for answers in run_pieces(state, judge, size):
            work.add({"answers": [list(answer) for answer in answers]})
            progress.advance(len(answers) // 2)
            progress.message(f"{state.num_asked + len(answers) // 2} of {len(state.units)} pairs judged")


def _judge_of(
    config: JudgeConfig, asked: PromptTemplate | FunctionJudge, stack: contextlib.ExitStack
) -> tuple[Judge, int]:
    """The judge, and how many pairs it gets at a time."""
    if isinstance(asked, FunctionJudge):
        return asked, _PIECE
    assert config.judge is not None, "the schema asks for one"
    generator = load_generator(config.judge, config.seed)
    stack.callback(generator.close)
    judge = ModelJudge(generator, config.name, config.judge.sampling, asked, config.guidelines, config.seed)
    return judge, max(1, config.judge.batch_size // 2)


def _set_aside(state: Judging, bad_rows: BadRows) -> None:
    """Pairs that the function could not judge, as the policy of their source says."""
    for unit, why in state.failures:
        item = unit.item
        a, b = (plain(item.candidates[i]) for i in unit.pair)
        bad_rows.add(item.on_bad_row, DataError(why), {"prompt": plain(item.prompt), "a": a, "b": b})


def _show(config: JudgeConfig, report: dict[str, Any]) -> None:
    bias = report["position_bias"]
    names = ("pairs", "preferred", "ties", "both_bad", "skipped", "inconsistent", "unreadable", "failed", "records")
    rows = [(name.replace("_", " "), str(report[name])) for name in names]
    if bias["share"] is not None:
        rows.append(("answers for the first position", f"{bias['share']:.0%}"))
    print_table(str(config.out_dir), rows)
