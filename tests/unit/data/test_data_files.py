from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.config.data import DataSource
from rlhf_dist.core.errors import DataError
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.files import read_rows
from rlhf_dist.data.reader import read_preferences, read_sequences

ROWS = [{"text": "một"}, {"text": 'a "quote", b'}, {"text": "hai\nba"}]
CSV = 'text,n\r\nmột,1\r\n"a ""quote"", b",2\r\n"hai\nba",3\r\n'


def read(path, kind="text", **settings):
    return list(read_rows(DataSource(path=str(path), kind=kind, **settings)))


def texts(path, **settings):
    return [dict(values)["text"] for _, values in read(path, **settings)]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"data": ROWS}, ensure_ascii=False, indent=1)),
        ("a.jsonl", "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n\r\n"),
        ("a.csv", CSV),
        ("a.CSV", CSV),
    ],
)
def test_text_formats(write, name, content, bom):
    assert texts(write(name, bom + content.encode())) == [row["text"] for row in ROWS]


def test_parquet_directory_and_splits(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == [row["text"] for row in ROWS]
    assert read(tmp_path / "a.parquet")[2][0].endswith("a.parquet: row 3")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "one") == [row["text"] for row in ROWS]
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "split")
    assert texts(tmp_path / "split", split="test") == ["một"]
    with pytest.raises(DataError, match="has no split 'train'; set split to one of test"):
        read(tmp_path / "split")


def test_locations(write):
    assert [
        location.rsplit("/", 1)[1] for location, _ in read(write("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n'))
    ] == [
        "a.jsonl:1",
        "a.jsonl:3",
    ]
    # A row is named by the line it begins on, quoted line ends counted.
    multi = write("a.csv", 'text\n"a\nb"\nc\n')
    assert [location.rsplit("/", 1)[1] for location, _ in read(multi)] == ["a.csv:2", "a.csv:4"]
    assert read(write("b.json", '[{"text": "a"}]'))[0][0].endswith("b.json: record 1")


def test_tab_separated_text_keeps_quotes(write):
    path = write("a.txt", '1\t"open quote\r\n2\tit\'s ""fine""\r\n')
    rows = read(path, columns=("id", "text"))
    assert [values["text"] for _, values in rows] == ['"open quote', 'it\'s ""fine""']


def test_txt_is_one_text_a_line(write):
    path = write("a.txt", "xin chào\r\n\r\n  hai\tba \n")
    assert texts(path) == ["xin chào", "  hai\tba "]
    assert read(path, kind="prompt", fields={"prompt": "p"})[0][1] == {"p": "xin chào"}
    with pytest.raises(DataError, match=r"kind 'instruction'.*columns"):
        read(path, kind="instruction")


def test_delimiter_and_header(write):
    assert texts(write("a.txt", "text|n\nx|1\n"), delimiter="|") == ["x"]
    assert texts(write("a.tsv", "text\tn\nx\t1\n")) == ["x"]
    assert texts(write("a.csv", "x;1\n"), delimiter=";", columns=("text", "n")) == ["x"]


def test_fields_longer_than_the_csv_modules_limit(write):
    assert texts(write("a.csv", "text,n\n" + "x" * 200_000 + ",1\n")) == ["x" * 200_000]


def test_limit_stops_reading(write):
    assert texts(write("a.jsonl", '{"text": "a"}\nbroken\n'), limit=1) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "settings", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', {}, r"a\.jsonl:2: not JSON "),
        ("a.jsonl", "[1]\n", {}, r"a\.jsonl:1: a list where a record must be a JSON object"),
        ("a.json", '[\n{"a": 1},\n{]\n', {}, r"a\.json:3: not JSON .*name it \.jsonl"),
        ("a.json", '{"rows": []}', {}, r"neither a list of objects nor"),
        ("a.json", "[1]", {}, r"a\.json: record 1: a int where"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            {},
            r"a\.jsonl:2: byte 0xe9 at column 14 is not UTF-8.*iconv",
        ),
        ("a.csv", b"text\na\n\xff\n", {}, r"a\.csv:3: byte 0xff"),
        ("a.csv", "text,n\na,1\nb\n", {}, r"a\.csv:3: 1 columns where there should be 2 \(text, n\)"),
        ("a.csv", 'text\n"open\nb\n', {}, r"a\.csv:3: not a table .*close the quoted field"),
        ("a.csv", "a\n", {"delimiter": "||"}, r"delimiter '\|\|' must be one character"),
        ("a.jsonl", "\n", {}, r"a\.jsonl has no records"),
        ("a.csv", "text\n", {}, r"a\.csv has no records"),
        ("a.json", "[]", {}, r"has no records"),
        ("a.xlsx", "x", {}, r"a\.xlsx .*\.json, "),
        ("a.parquet", "x", {}, r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_errors_name_place_and_remedy(write, name, content, settings, words):
    with pytest.raises(DataError, match=words):
        read(write(name, content), **settings)


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist .*give the path"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"none .*\.jsonl"):
        read(tmp_path / "none")
    with pytest.raises(DataError, match=r"no data files \(\.json"):
        read(tmp_path)


def test_hub_name_out_of_reach(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"org/name is neither .* \(Couldn't reach the Hub\); check the name"):
        read("org/name")


def test_hub_rows(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *_, split, **__: [{"text": f"{path} {split}"}])
    assert read("org/name", split="test") == [("org/name[test]: row 1", {"text": "org/name test"})]


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files(write, suffix, compress):
    assert texts(write("a.jsonl" + suffix, compress(JSONL))) == [row["text"] for row in ROWS]
    assert texts(write("a.csv" + suffix, compress(CSV.encode()))) == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".gz", gzip.compress(JSONL)[:-9]), (".gz", JSONL), (".bz2", JSONL), (".xz", lzma.compress(JSONL)[:-9])],
)
def test_a_broken_compressed_file_is_named(write, suffix, content):
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}: not a whole {suffix} file"):
        texts(write("a.jsonl" + suffix, content))


def test_a_pattern_is_one_set_in_the_order_of_names(tmp_path, write):
    for name in ("b.jsonl", "a.jsonl.gz", "notes.md"):
        line = json.dumps({"text": name}).encode() + b"\n"
        write(name, gzip.compress(line) if name.endswith(".gz") else line)
    found = read(tmp_path / "*.jsonl*")
    assert [(place, dict(values)["text"]) for place, values in found] == [
        (f"{tmp_path}/a.jsonl.gz:1", "a.jsonl.gz"),
        (f"{tmp_path}/b.jsonl:1", "b.jsonl"),
    ]
    with pytest.raises(DataError, match=r"matches .*notes\.md, which is no data file"):
        read(tmp_path / "*")
    with pytest.raises(DataError, match="matches no file"):
        read(tmp_path / "*.parquet")


def test_a_file_whose_name_looks_like_a_pattern_is_itself(write):
    assert texts(write("a[1].jsonl", JSONL)) == [row["text"] for row in ROWS]


def test_shards_of_a_directory_of_which_one_has_a_field_more(tmp_path):
    """As a hub repository lays them out."""
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"]}), folder / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"text": ["b"], "task": ["t"]}), folder / "train-00001-of-00002.parquet")
    pq.write_table(pa.table({"text": ["c"]}), folder / "test-00000-of-00001.parquet")
    (tmp_path / "repository" / "README.md").write_text("a card")
    assert [dict(values) for _, values in read(tmp_path / "repository")] == [{"text": "a"}, {"text": "b", "task": "t"}]
    assert texts(tmp_path / "repository", split="test") == ["c"]
    with pytest.raises(DataError, match=r"'validation'.*test, train"):
        read(tmp_path / "repository", split="validation")


def test_splits_that_share_a_word(tmp_path):
    """UltraChat's layout."""
    folder = tmp_path / "chat" / "data"
    folder.mkdir(parents=True)
    for name in ("train_sft", "train_gen", "test_sft"):
        pq.write_table(pa.table({"text": [name]}), folder / f"{name}-00000-of-00001-ab12.parquet")
        pq.write_table(pa.table({"text": [name]}), folder / f"{name}-00000-of-00001.parquet")
    assert set(texts(tmp_path / "chat", split="train_sft")) == {"train_sft"}
    with pytest.raises(DataError, match="of the splits train_gen, train_sft"):
        texts(tmp_path / "chat")


def test_files_of_a_directory_that_are_not_read_are_named(tmp_path, write, caplog):
    (tmp_path / "a").mkdir()
    write("a/train.jsonl", JSONL)
    write("a/extra.jsonl", JSONL)
    write("a/LICENSE.txt", b"Do as you like.")
    write("a/test.jsonl", JSONL)
    assert len(texts(tmp_path / "a")) == len(ROWS)
    assert "1 files are of no split and are not read (extra.jsonl)" in caplog.text
    assert "(LICENSE.txt)" in caplog.text
    assert "test.jsonl" not in caplog.text


def test_a_directory_without_names_of_splits_is_read_whole(tmp_path, write):
    (tmp_path / "a").mkdir()
    write("a/2.jsonl", JSONL)
    write("a/1.csv", CSV.encode())
    assert len(texts(tmp_path / "a")) == 6


def test_what_a_hub_name_takes(monkeypatch):
    asked = []

    def load(*args, **settings):
        asked.append((args, settings))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    texts("org/set", subset="en", data_dir="harmless-base", revision="abc", split="test")
    assert asked == [(("org/set", "en"), {"data_dir": "harmless-base", "revision": "abc", "split": "test"})]


def test_hh_rlhf_as_it_is_published_is_one_line(tmp_path, write, tiny_lm, capsys):
    """A gzipped file of whole dialogues."""
    rows = [
        {
            "chosen": f"\n\nHuman: Name {n}.\n\nAssistant: It is {n}.",
            "rejected": f"\n\nHuman: Name {n}.\n\nAssistant: No.",
        }
        for n in range(3)
    ]
    path = write("train.jsonl.gz", gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    found = list(read_preferences(DataSource(path=str(path), kind="preference"), seed=0))
    assert [pair.responses[0][0]["content"] for pair in found] == ["It is 0.", "It is 1.", "It is 2."]

    config = tmp_path / "reward.yaml"
    data = f"data: {{train: [{{path: {path}, kind: preference}}], max_length_tokens: 64}}"
    config.write_text(f"run_dir: {tmp_path / 'run'}\nmodel: {{model_path: {tiny_lm}}}\n{data}\n")
    assert main(["validate", "reward", str(config), "--reward.batch_size", "3"]) == 0
    assert "3" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["subset", "data_dir", "revision"])
def test_what_only_hub_names_take_is_rejected_for_files(write, key):
    with pytest.raises(DataError, match=rf"a\.jsonl is a local path and has {key},"):
        read(write("a.jsonl", JSONL), **{key: "x"})


def arrow_strings(*contents: bytes) -> pa.Array:
    """A string column as faulty writers make it: of any bytes."""
    _, offsets, data = pa.array(contents, pa.binary()).buffers()
    return pa.StringArray.from_buffers(len(contents), offsets, data)


def stored(table: pa.Table, store: str, folder: Path) -> Path:
    """As a Parquet file, or as a saved data set."""
    path = folder / store
    if store == "dataset":
        datasets.Dataset(table).save_to_disk(path)
        return path
    path = path.with_suffix(".parquet")
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("store", ["parquet", "dataset"])
@pytest.mark.parametrize(
    ("column", "words"),
    [
        (arrow_strings(b"ok", b"caf\xe9", b"x"), "0xe9"),
        (pa.array([1, 2**62, 3], pa.duration("s")), "too large"),
        (pa.array([[1], [2**62], []], pa.list_(pa.duration("s"))), "too large"),
        (pa.array([{"at": 0}, {"at": 2**50}, None], pa.struct([("at", pa.timestamp("s"))])), ""),
    ],
)
def test_a_value_that_python_cannot_hold_makes_its_row_invalid(tmp_path, store, column, words):
    table = pa.table({"other": column, "text": ["a", "b", "c"]})
    path = stored(table, store, tmp_path)
    with pytest.raises(DataError, match=rf"row 2: column 'other' has a value that cannot be read \(.*{words}.*; fix"):
        read(path)
    bad_rows = BadRows()
    found = list(read_rows(DataSource(path=str(path), kind="text", on_bad_row="skip"), bad_rows))
    assert [(location[-5:], values["text"]) for location, values in found] == [("row 1", "a"), ("row 3", "c")]
    assert [bad.row for bad in bad_rows.rows] == [{"text": "b"}]


def called(name: str, arguments: dict, **more) -> dict:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}, **more}
    return {"role": "assistant", "content": "a", "tool_calls": [call]}


def tool(name: str, **properties) -> dict:
    return {"name": name, "parameters": {"properties": properties}}


TOOL_ROWS = [
    {
        "messages": [{"role": "user", "content": "u"}, called("get", {"city": "Paris", "at": {"hour": 3}})],
        "tools": [tool("get", city={"type": "string"}), tool("wait", seconds={"type": "number", "least": 0})],
    },
    {"messages": [{"role": "user", "content": "u"}, called("wait", {"seconds": 3, "at": {"day": 1}}, id="c")]},
    {"messages": [{"role": "user", "content": "u"}, called("stop", {})], "tools": [tool("stop")]},
]


@pytest.mark.parametrize("store", ["parquet", "dataset"])
@pytest.mark.parametrize("column", ["tools", "mine"])
def test_tools_and_calls_of_arrow_are_those_that_were_written(tmp_path, write, store, column):
    """Compared with the same rows as JSON lines, which have no nulls."""
    rows = [{"messages": row["messages"]} | ({column: row["tools"]} if "tools" in row else {}) for row in TOOL_ROWS]
    table = pa.Table.from_pylist([*rows[:1], rows[1] | {column: None}, rows[2]])
    assert "None" in str(table.to_pylist()[2]["messages"])
    path = stored(table, store, tmp_path)
    fields = {} if column == "tools" else {"tools": column}
    bad_rows = BadRows()
    found, expected = (
        [
            (record.messages, record.tools)
            for record in read_sequences(DataSource(path=str(file), kind="messages", fields=fields), bad)
        ]
        for file, bad in ((path, bad_rows), (write("a.jsonl", rows), None))
    )
    assert found == expected
    assert bad_rows.notes["null members of tools and calls, as Arrow adds them, which are dropped"] == 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_nulls_that_were_written_stay(tmp_path, write, name):
    arguments: dict = {"zone": None}
    message = called("get", arguments if name == "a.jsonl" else json.dumps(arguments))
    row = {"messages": [{"role": "user", "content": "u"}, message], "tools": json.dumps([tool("get", zone=None)])}
    path = write("a.jsonl", [row])
    if name == "a.parquet":
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist([row]), path)
    [record] = read_sequences(DataSource(path=str(path), kind="messages"))
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == arguments
    assert record.tools == (tool("get", zone=None),)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("blank", ["", "\r\n"])
def test_json_lines_in_a_json_file(write, name, blank):
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    content = f"{blank}\n".encode().join([lines[0], *lines[1:], b""])
    path = write(name, gzip.compress(content) if name.endswith("gz") else content)
    assert read(path) == [(location.replace("b.jsonl", name), row) for location, row in read(write("b.jsonl", content))]
    broken = write("broken.json", b"\n".join([lines[0], b'{"text": ', lines[1], b"\xff"]))
    with pytest.raises(DataError, match=r"broken\.json:2: not JSON"):
        read(broken)
    bad_rows = BadRows()
    found = list(read_rows(DataSource(path=broken, kind="text", on_bad_row="skip"), bad_rows))
    assert ([values for _, values in found], len(bad_rows)) == (ROWS[:2], 2)
