"""Data files → rows, each with the place it came from.

`datasets` reads what its own files are: directories written by `Dataset.save_to_disk`, and hub names. Its builders for text
formats (5.2.0) were compared and are not used, because an invalid row then has no line number, and values change:

- json: a broken line, a lone surrogate or a 401-digit number fails the file (or becomes `inf`) without a line number;
  integers become floats where a column has both; columns that a row lacks become null.
- csv (pandas): "007" becomes 7, "NA" becomes null, and a stray quote in a .tsv swallows the rest of the file.
- text and parquet: give the same rows, but `data_files` are glob patterns, so that a path with [..] is not found.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import json
import logging
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_dist.config.data import DATA_SUFFIXES, DataSource, data_suffix
from rlhf_dist.core.errors import DataError
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.kinds import KINDS

log = logging.getLogger(__name__)

Row = tuple[str, Mapping[str, Any]]
"""Where a row is, as "file.jsonl:17" where the file has lines, and its columns."""

_SAVED = ("state.json", "dataset_dict.json")
"""What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write beside the data."""
_SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")
_WORD = re.compile(r"[^a-z0-9]+")
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TOOL_KEYS = frozenset({"tools", "functions", "tool_calls", "function_call"})
_BOM = b"\xef\xbb\xbf"


def read_rows(source: DataSource, bad_rows: BadRows | None = None) -> Iterator[Row]:
    """The first `source.limit` rows of a file, of several (a pattern, a directory), a `datasets` directory or a hub name.

    Under `source.on_bad_row: skip` a row that cannot be parsed is added to `bad_rows`. Where reading cannot continue after it
    (broken JSON in a .json file, a broken .parquet file, an unclosed quote in a table), the file is invalid all the same.

    Raises:
        DataError: no such file, an unknown format, broken or non-UTF-8 content (with its line), no rows.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    known = len(bad_rows)
    empty = True
    for row in islice(_rows(source, bad_rows), source.limit):
        empty = False
        yield row
    if empty:
        bad = bad_rows.rows[known:]
        why = f" (all {len(bad)} rows are bad, the first: {bad[0].reason})" if bad else ""
        raise DataError(
            f"{source.path} has no records{why}; a data set needs at least one: give another file, or remove it"
        )


def _rows(source: DataSource, bad_rows: BadRows) -> Iterator[Row]:
    path = Path(source.path).expanduser()
    given = [name for name in ("subset", "data_dir", "revision") if getattr(source, name) is not None]
    if given and (path.exists() or data_suffix(path) in DATA_SUFFIXES):
        raise DataError(
            f"{source.path} is a local path and has {', '.join(given)}, which only hub names take; remove them"
        )
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED):
            return _dataset_rows(source, _load_directory(source, path), bad_rows)
        return _rows_of_files(source, _files_of_split(source, path), bad_rows)
    if not path.exists() and glob.has_magic(source.path):
        return _rows_of_files(source, _files_of_pattern(source), bad_rows)
    if (reader := _reader(path)) is not None:
        if not path.is_file():
            raise DataError(f"{source.path} does not exist (looked in {Path.cwd()}); give the path of a data file")
        return reader(source, path, bad_rows)
    if path.exists() or path.is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") > 1:
        raise DataError(
            f"{source.path} is not a supported data set: files end in one of {', '.join(DATA_SUFFIXES)}; "
            f"compressed ones also in {', '.join(_OPEN)}; rename the file, or convert it"
        )
    return _dataset_rows(source, _load_hub(source), bad_rows)


def _reader(path: Path) -> Callable[[DataSource, Path, BadRows], Iterator[Row]] | None:
    """By the file's ending, before that of its compression."""
    readers = {
        ".json": _json_rows,
        ".jsonl": _jsonl_rows,
        ".csv": _table_rows,
        ".tsv": _table_rows,
        ".txt": _txt_rows,
        ".parquet": _parquet_rows,
    }
    return readers.get(data_suffix(path))


def _rows_of_files(source: DataSource, files: Sequence[Path], bad_rows: BadRows) -> Iterator[Row]:
    """Of files that together are one set, in the order of their names."""
    for file in files:
        yield from _rows(source.model_copy(update={"path": str(file)}), bad_rows)


def _files_of_split(source: DataSource, folder: Path) -> list[Path]:
    """The data files below a folder that are of `source.split`, where any file there has the name of a split, else all.

    A file's split is its name without the number of a shard, or a folder that it is in (`train-00000-of-00002.parquet`,
    `train/0.parquet`, as hub repositories have them); or a word of these (`data/my_train.jsonl`), if no other split has it.
    """
    found = sorted(file for file in folder.rglob("*") if file.is_file() and data_suffix(file) in DATA_SUFFIXES)
    if not found:
        raise DataError(
            f"{source.path} has no data files ({', '.join(DATA_SUFFIXES)}) and was not written by Dataset.save_to_disk; give a "
            "directory that holds one of these"
        )
    if any(data_suffix(file) != ".txt" for file in found):  # LICENSE.txt, requirements.txt
        _warn_unread(source, [file for file in found if data_suffix(file) == ".txt"], "text beside other data files")
        found = [file for file in found if data_suffix(file) != ".txt"]
    names = {file: _split_names(file.relative_to(folder)) for file in found}
    exact = [file for file in found if source.split in names[file]]
    words = {file: {word for name in names[file] for word in _WORD.split(name)} for file in found}
    like = [file for file in found if source.split in words[file]]
    if (
        not exact
        and len(other := {name for file in like for name in names[file] if source.split in _WORD.split(name)}) > 1
    ):
        raise DataError(
            f"{source.path} has files of the splits {', '.join(sorted(other))}, so split {source.split!r} is none of them; set "
            "split to one of these, or path to a pattern"
        )
    splits = {word for of_file in words.values() for word in of_file} & {*_SPLITS, source.split}
    if not splits:
        return found
    chosen = exact or like
    if not chosen:
        known = sorted({name for file in found for name in names[file] if splits & set(_WORD.split(name))})
        raise DataError(f"{source.path} has no files of split {source.split!r}; set split to one of {', '.join(known)}")
    _warn_unread(source, [file for file in found if file not in chosen and not splits & words[file]], "of no split")
    return chosen


def _warn_unread(source: DataSource, files: Sequence[Path], why: str) -> None:
    if files:
        named = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
        log.warning(
            "%s: %d files are %s and are not read (%s); name them by a pattern", source.path, len(files), why, named
        )


def _split_names(path: Path) -> list[str]:
    """What may be the split's name of a file: its own name without number and endings, and those of the folders it is in."""
    return [_SHARD.sub("", path.name.partition(".")[0]).lower(), *(part.lower() for part in path.parts[:-1])]


def _files_of_pattern(source: DataSource) -> list[Path]:
    pattern = str(Path(source.path).expanduser())
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (may be absolute)
    files = [path for path in found if path.is_file()]
    if not files:
        raise DataError(f"{source.path} matches no file (looked in {Path.cwd()}); give another pattern")
    if unknown := [str(path) for path in files if data_suffix(path) not in DATA_SUFFIXES]:
        raise DataError(
            f"{source.path} matches {unknown[0]}, which is no data file ({', '.join(DATA_SUFFIXES)}); give a narrower pattern"
        )
    return files


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their line ends; a byte-order mark is dropped.

    Raises:
        DataError: a compressed file that is broken or cut off.
    """
    opened: Any = _OPEN.get(path.suffix.lower(), open)
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.removeprefix(_BOM) if number == 1 else line
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as err:
        if isinstance(err, OSError) and err.errno is not None:
            raise  # of the machine; what a decompressor raises has no number
        raise DataError(f"{path}: not a whole {path.suffix} file ({err}); fetch or write it again") from err


def _decode(source: DataSource, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as err:
        raise DataError(
            f"{source.path}:{number}: byte 0x{line[err.start]:02x} at column {err.start + 1} is not UTF-8; "
            "data is read as UTF-8: convert the file (for example with iconv -f latin1 -t utf-8)"
        ) from err


def _text_lines(source: DataSource, path: Path, bad_rows: BadRows) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is UTF-8 and not blank."""
    for number, raw in enumerate(_lines(path), start=1):
        line = ""
        with bad_rows.guard(source.on_bad_row, repr(raw)):
            line = _decode(source, number, raw)
        if line.strip():
            yield number, line


def _jsonl_rows(source: DataSource, path: Path, bad_rows: BadRows) -> Iterator[Row]:
    for number, line in _text_lines(source, path, bad_rows):
        location = f"{source.path}:{number}"
        values = None
        with bad_rows.guard(source.on_bad_row, line.rstrip("\r\n")):
            values = _object(location, _parse(location, line))
        if values is not None:
            yield location, values


def _parse(location: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as err:
        raise DataError(
            f"{location}: not JSON ({err.msg} at column {err.colno}); every line must be one JSON object: fix it"
        ) from err
    except RecursionError as err:
        raise DataError(f"{location}: JSON nested too deeply to be read; a record is one flat object: fix it") from err
    except ValueError as err:  # an integer of thousands of digits
        raise DataError(f"{location}: a number that cannot be read ({err}); fix the line") from err


def _are_json_lines(path: Path) -> bool:
    """Whether the first line that is not blank is an object, and others follow: as many `.json` files have it."""
    lines = (line for line in _lines(path) if line.strip())
    first = next(lines, b"")
    if not first.lstrip().startswith(b"{") or next(lines, None) is None:
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _json_rows(source: DataSource, path: Path, bad_rows: BadRows) -> Iterator[Row]:
    if _are_json_lines(path):
        yield from _jsonl_rows(source, path, bad_rows)
        return
    try:
        content = json.loads("".join(_decode(source, number, raw) for number, raw in enumerate(_lines(path), start=1)))
    except RecursionError as err:
        raise DataError(f"{source.path}: JSON nested too deeply to be read; records are flat objects: fix it") from err
    except json.JSONDecodeError as err:
        raise DataError(
            f"{source.path}:{err.lineno}: not JSON ({err.msg} at column {err.colno}); a .json file is one list of "
            'objects, or {"data": [...]}: fix it, or name it .jsonl if every line is an object'
        ) from err
    except ValueError as err:  # an integer of thousands of digits
        raise DataError(f"{source.path}: a number that cannot be read ({err}); fix the file") from err
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise DataError(
            f'{source.path} contains neither a list of objects nor {{"data": [...]}}; give it one of these forms'
        )
    for number, found in enumerate(records, start=1):
        location = f"{source.path}: record {number}"
        values = None
        with bad_rows.guard(source.on_bad_row, found):
            values = _object(location, found)
        if values is not None:
            yield location, values


def _object(location: str, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{location}: a {type(values).__name__} where a record must be a JSON object; wrap it in one")
    return values


def _txt_rows(source: DataSource, path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """A table when columns or a delimiter are named, else one plain text a line (empty lines are skipped)."""
    if source.columns is not None or source.delimiter is not None:
        yield from _table_rows(source, path, bad_rows)
        return
    field = KINDS[source.kind].line_field
    if field is None:
        supported = " and ".join(repr(name) for name, kind in KINDS.items() if kind.line_field)
        raise DataError(
            f"{source.path}: a .txt file of plain lines does not support kind {source.kind!r}, only {supported}; if it is a "
            "table, name its columns"
        )
    column = source.fields.get(field, field)
    for number, line in _text_lines(source, path, bad_rows):
        yield f"{source.path}:{number}", {column: line.rstrip("\r\n")}


def _table_rows(source: DataSource, path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Rows of delimited text. Comma-separated files may quote fields, as RFC 4180 has it.

    In tab-separated text a quote is a character like any other (IANA's text/tab-separated-values has no quoting), so a
    stray one cannot swallow the lines behind it.
    """
    delimiter = source.delimiter or ("," if data_suffix(path) == ".csv" else "\t")
    if len(delimiter) != 1:
        raise DataError(f"{source.path}: delimiter {delimiter!r} must be one character; set delimiter to one")
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    # What is not UTF-8 passes through the reader, so that lines keep their numbers; a row with such bytes is invalid.
    lines = (raw.decode("utf-8", "surrogateescape") for raw in _lines(path))
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    # The csv module limits fields to 128 KiB by default, for the whole process; documents are longer.
    old_limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield from _named_columns(source, reader, bad_rows)
    except csv.Error as err:
        raise DataError(
            f"{source.path}:{reader.line_num}: not a table delimited by {delimiter!r} ({err}); close the quoted field, "
            "or set delimiter"
        ) from err
    finally:
        csv.field_size_limit(old_limit)


def _named_columns(source: DataSource, reader: Any, bad_rows: BadRows) -> Iterator[Row]:
    """Rows of a `csv.reader`, named by `source.columns` or by the first row."""
    columns = source.columns
    last_line = 0
    for cells in reader:
        line, last_line = last_line + 1, reader.line_num  # a quoted field may span lines: a row is named by its first
        if not cells:
            continue
        if columns is None:
            _check_utf8(source, line, cells)
            columns = tuple(cells)
            continue
        row = None
        with bad_rows.guard(source.on_bad_row, cells):
            row = _checked_cells(source, line, cells, columns)
        if row is not None:
            yield f"{source.path}:{line}", row


def _checked_cells(source: DataSource, line: int, cells: list[str], columns: tuple[str, ...]) -> dict[str, str]:
    _check_utf8(source, line, cells)
    if len(cells) != len(columns):
        raise DataError(
            f"{source.path}:{line}: {len(cells)} columns where there should be {len(columns)} "
            f"({', '.join(columns)}); fix the line, or set columns and delimiter to what the file has"
        )
    return dict(zip(columns, cells, strict=True))


def _check_utf8(source: DataSource, first_line: int, cells: list[str]) -> None:
    """Raises DataError for cells that were read from bytes that are not UTF-8."""
    for cell in cells:
        if not cell.isascii():
            for number, part in enumerate(cell.split("\n"), start=first_line):
                _decode(source, number, part.encode("utf-8", "surrogateescape"))


def _parquet_rows(source: DataSource, path: Path, bad_rows: BadRows) -> Iterator[Row]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            types = {field.name: str(field.type) for field in file.schema_arrow}
            tidy = _null_dropper(source, types, bad_rows)
            for batch in file.iter_batches(batch_size=1024):
                for values in _converted_rows(source, batch, number, bad_rows):
                    number += 1
                    if values is not None:
                        yield f"{source.path}: row {number}", tidy(values)
    except (ArrowException, OSError) as err:
        raise DataError(f"{source.path}: not a readable Parquet file ({_first_line(err)}); write it again") from err


def _converted_rows(
    source: DataSource, batch: Any, num_before: int, bad_rows: BadRows
) -> Iterator[Mapping[str, Any] | None]:
    """The rows of an Arrow batch; None for an invalid one. All are converted at once, or each by itself where a value of the
    batch cannot be, so that its row is named."""
    try:
        yield from batch.to_pylist()
        return
    except Exception:  # a value: Arrow raises what strings, datetime and time zones raise
        pass
    for i in range(batch.num_rows):
        cells = {name: column[i].as_py for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        yield _converted(source, f"{source.path}: row {num_before + i + 1}", cells, bad_rows)


def _converted(
    source: DataSource, location: str, cells: Mapping[str, Callable[[], Any]], bad_rows: BadRows
) -> Mapping[str, Any] | None:
    """A row whose columns are read one by one; None for an invalid one."""
    values: dict[str, Any] = {}
    unread: dict[str, Exception] = {}
    for name, read in cells.items():
        try:
            values[name] = read()
        except Exception as err:  # as in `_converted_rows`
            unread[name] = err
    for name, err in unread.items():
        reason = _first_line(err)
        error = DataError(
            f"{location}: column {name!r} has a value that cannot be read ({reason}); fix the row, or write the file without "
            "the column"
        )
        error.__cause__ = err
        bad_rows.add(source.on_bad_row, error, values)
        return None
    return values


def _load_directory(source: DataSource, path: Path) -> Any:
    import datasets  # here, because it takes a second to import and most runs read plain files

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as err:  # datasets raises what its file system and Arrow raise
        raise DataError(
            f"{source.path} is not a directory written by Dataset.save_to_disk ({_first_line(err)}); give such a "
            "directory, or a data file in it"
        ) from err
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if source.split not in loaded:
        raise DataError(
            f"{source.path} has no split {source.split!r}; set split to one of {', '.join(map(str, loaded))}"
        )
    return loaded[source.split]


def _load_hub(source: DataSource) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            source.path, source.subset, data_dir=source.data_dir, revision=source.revision, split=source.split
        )
    except Exception as err:  # the hub client, requests and Arrow each raise their own kinds
        raise DataError(
            f"{source.path} is neither a file or directory here (in {Path.cwd()}) nor a hub data set that can be "
            f"reached with split {source.split!r} ({_first_line(err)}); check the name, the split and the network, or "
            "give a local path"
        ) from err


def _dataset_rows(source: DataSource, dataset: Any, bad_rows: BadRows) -> Iterator[Row]:
    place, number = f"{source.path}[{source.split}]: row", 0
    # A column of JSON texts, which `datasets` reads, has the nulls that were written.
    types = {name: kind for name, kind in _types(dataset).items() if "Json(" not in kind}
    tidy = _null_dropper(source, types, bad_rows)
    try:
        for number, values in enumerate(dataset, start=1):
            yield f"{place} {number}", tidy(values)
        return
    except Exception as err:  # of a value, as in `_converted_rows`, or of what decodes an image
        log.debug("%s: reading on row by row after row %d (%s)", source.path, number, _first_line(err))
    for i in range(number, len(dataset)):
        location = f"{place} {i + 1}"
        try:
            values = dataset[i]
        except Exception:
            cells = {name: partial(_cell, dataset, name, i) for name in dataset.column_names}
            values = _converted(source, location, cells, bad_rows)
        if values is not None:
            yield location, tidy(values)


def _types(dataset: Any) -> dict[str, str]:
    """The type of each column, as text."""
    return {name: repr(kind) for name, kind in (getattr(dataset, "features", None) or {}).items()}


def _null_dropper(
    source: DataSource, types: Mapping[str, str], bad_rows: BadRows
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Drops the null members of tools and calls from a row.

    All records of an Arrow column have the members of all: a call of `{"city": "Paris"}` gets `"zone": null` where another call
    has a zone, and a template would write it. Elsewhere nulls are read as what is missing.
    """
    keys = {*_TOOL_KEYS, source.fields.get("tools", "tools").rpartition(".")[2]}
    columns = [name for name, kind in types.items() if any(key == name or key in kind for key in keys)]
    if not columns:
        return lambda values: values

    def tidy(values: Mapping[str, Any]) -> Mapping[str, Any]:
        changed = {name: _without_nulls(values[name], keys, name in keys) for name in columns if name in values}
        if any(changed[name] != values[name] for name in changed):
            bad_rows.notes["null members of tools and calls, as Arrow adds them, which are dropped"] += 1
            return {**values, **changed}
        return values

    return tidy


def _without_nulls(value: Any, keys: Collection[str], inside: bool = False) -> Any:
    """Without the null members of all that is below one of `keys`."""
    if isinstance(value, Mapping):
        kept = ((key, item) for key, item in value.items() if item is not None or not inside)
        return {key: _without_nulls(item, keys, inside or key in keys) for key, item in kept}
    return [_without_nulls(item, keys, inside) for item in value] if isinstance(value, list) else value


def _cell(dataset: Any, column: str, row: int) -> Any:
    return dataset.select_columns([column])[row][column]


def _first_line(err: Exception) -> str:
    return str(err).strip().split("\n")[0] or type(err).__name__
