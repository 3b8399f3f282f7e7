"""`rlhf-dist data dedup`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_dist.config.data import DataSource
from rlhf_dist.config.load import dump_yaml
from rlhf_dist.core.errors import DataError
from rlhf_dist.core.json_lines import json_line
from rlhf_dist.curation.config.dedup import DedupConfig, NearDuplicates
from rlhf_dist.curation.decontamination import EvaluationIndex
from rlhf_dist.curation.dedup import TEXT_FIELDS, Verdicts, compared_text, find_duplicates, record_texts
from rlhf_dist.curation.fingerprints import banding, encoded
from rlhf_dist.curation.output import OutputFolder, note_rows, written
from rlhf_dist.curation.parallel import default_processes
from rlhf_dist.curation.rows import read_records
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.spool import Spool
from rlhf_dist.run.console import print_table

REMOVED = "removed.jsonl"
_CURVE = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def run(config: DedupConfig) -> None:
    """Read, compare, write what stays and what does not."""
    bad_rows = BadRows()
    fields = config.fields or TEXT_FIELDS[config.sources[0].kind]
    processes = default_processes() if config.num_processes is None else config.num_processes
    if config.near is not None:
        banding(config.near)  # rejected before anything is read
    with (
        written(config.out_dir, config.overwrite, dump_yaml(config)) as folder,
        folder.scratch() as work,
        Spool(work / "records") as records,
    ):
        evaluation = _evaluation(config, work, bad_rows)
        try:
            verdicts = find_duplicates(
                _spooled(config, bad_rows, records),
                config,
                fields=("compared",),
                evaluation=evaluation,
                evaluated_fields=("evaluated",),
                scratch=work,
                num_processes=processes,
            )
            _check_some_left(verdicts)
            folder.write_lines(_kept(records, verdicts))
            folder.write_lines(_removed(records, verdicts, evaluation), REMOVED)
        finally:
            if evaluation is not None:
                evaluation.close()
        folder.write_bad_rows(bad_rows)
        _report(config, folder, verdicts, evaluation, fields, len(bad_rows))
    rows = [(reason, f"{number:,}", f"{number / len(verdicts):.2%}") for reason, number in verdicts.counts().items()]
    if verdicts.num_empty:
        empty = f"{verdicts.num_empty:,}", f"{verdicts.num_empty / len(verdicts):.2%}"
        rows.append(("kept, without text to compare", *empty))
    rows += [(what, number, "") for what, number in note_rows(bad_rows)]
    print_table("dedup: what became of the records", rows, header=("", "records", "share"))
    bad = f"; {len(bad_rows)} bad rows skipped (bad_rows.jsonl)" if bad_rows else ""
    print(f"The result is in {config.out_dir}; what was removed, and why, in its {REMOVED}{bad}")


def _evaluation(config: DedupConfig, work: Path, bad_rows: BadRows) -> EvaluationIndex | None:
    """The evaluation sets' runs of words."""
    if config.decontaminate is None:
        return None
    folder = work / "evaluation"
    folder.mkdir()
    index = EvaluationIndex(folder, config.decontaminate)
    try:
        for name, source in config.decontaminate.against.items():
            rows = read_records((source,), bad_rows, texts=lambda source, row, _: record_texts(source.kind, row))
            index.add(name, ((row.location, row.texts[1]) for row in rows))
        index.finish()
    except BaseException:
        index.close()
        raise
    return index


def _spooled(config: DedupConfig, bad_rows: BadRows, records: Spool) -> Iterator[Mapping[str, Any]]:
    """The texts of the records as they come, each record written down on the way as its place and its line."""
    unseen = set(config.fields or ())

    def texts(source: DataSource, row: Fields, record: Mapping[str, Any]) -> tuple[str, str]:
        compared, evaluated = record_texts(source.kind, row)
        if config.fields is None:
            return compared, evaluated
        try:
            return compared_text(record, config.fields), evaluated
        except DataError as error:
            raise DataError(f"{row.location}: {error}") from error

    for row in read_records(config.sources, bad_rows, texts=texts):
        records.append(encoded(f"{row.location}\0{row.line}"))
        unseen -= row.record.keys()
        yield {"compared": row.texts[0], "evaluated": row.texts[1]}
    if unseen:
        raise DataError(
            f"no record has the field {', '.join(map(repr, sorted(unseen)))} that fields names; name fields of kind "
            f"{config.sources[0].kind!r} or columns of the data"
        )


def _check_some_left(verdicts: Verdicts) -> None:
    if not len(verdicts.kept()):
        raise DataError(
            f"none of {len(verdicts)} records would be left, for evaluation sets contain all of them; give other sources, or "
            "take sets out of decontaminate.against"
        )


def _kept(records: Spool, verdicts: Verdicts) -> Iterator[bytes]:
    for number, item in enumerate(records):
        if verdicts.removal(number) is None:
            yield item.partition(b"\0")[2]


def _removed(records: Spool, verdicts: Verdicts, evaluation: EvaluationIndex | None) -> Iterator[bytes]:
    """What was removed: the record, its place, the reason, what it is the same as."""
    for number, item in enumerate(records):
        removal = verdicts.removal(number)
        if removal is None:
            continue
        location, line = _parts(item)
        entry: dict[str, Any] = {"location": location, "reason": removal.reason}
        if removal.run is not None and evaluation is not None:
            row = evaluation.row(removal.of)
            entry |= {"evaluation_set": row.set, "evaluation_location": row.location, "shared_words": removal.run}
        else:
            there, other = _parts(records[removal.of])
            entry |= {"same_as": there}
            if removal.similarity is not None:
                entry |= {"similarity": round(removal.similarity, 4), "same_as_record": other}
        yield json_line({**entry, "record": line}).encode("utf-8")


def _parts(item: bytes) -> tuple[str, Any]:
    location, _, line = item.partition(b"\0")
    return location.decode("utf-8", "surrogatepass"), json.loads(line)


def _report(
    config: DedupConfig,
    folder: OutputFolder,
    verdicts: Verdicts,
    evaluation: EvaluationIndex | None,
    fields: tuple[str, ...],
    num_bad: int,
) -> None:
    content: dict[str, Any] = {
        "records": verdicts.counts()["kept"],
        "counts": verdicts.counts(),
        "without text to compare": verdicts.num_empty,
        "bad rows": num_bad,
        "sources": [source.path for source in config.sources],
        "fields": list(fields),
    }
    if config.near is not None:
        content["near"] = banding_report(config.near) | {
            "pairs compared by their true similarity": verdicts.near.num_compared,
            "buckets of which some were not compared (near.max_bucket)": verdicts.near.num_full_buckets,
            "records of whose candidates some were not compared (near.max_compared)": verdicts.near.num_cut,
        }
    if evaluation is not None:
        content["decontaminate"] = evaluation.report()
    folder.write_report(content)


def banding_report(near: NearDuplicates) -> dict[str, Any]:
    """How surely pairs of a similarity are found."""
    shape = banding(near)
    similarities = sorted({*_CURVE, near.threshold})
    return {
        "bands": shape.num_bands,
        "values of a band": shape.num_rows,
        "probability that a pair of a similarity is compared": {
            f"{similarity:g}": round(shape.probability(similarity), 4) for similarity in similarities
        },
    }
