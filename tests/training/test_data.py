import csv
import json
import pickle

import pytest

from lorry.training.data import DataError, DataSpec, load_records, split_records

ROWS = [
    {"text": 'a "b", c', "label": "x"},
    {"text": "tab\there\nand a line", "label": "y"},
    {"text": "é", "label": "x"},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_json(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_folder(path, rows):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


WRITERS = [
    ("jsonl", write_jsonl),
    ("csv", write_csv),
    ("parquet", write_parquet),
    ("json", write_json),
    ("d", write_folder),
]


@pytest.mark.parametrize(("extension", "writer"), WRITERS)
def test_every_format_gives_the_same_records(tmp_path, extension, writer):
    path = writer(tmp_path / f"rows.{extension}", ROWS)
    assert load_records(path) == ROWS
    assert load_records(str(path), limit=2) == ROWS[:2]
    assert load_records(path, split="[1:]") == ROWS[1:]
    assert load_records(path, split="[:67%]", limit=1) == ROWS[:1]
    assert load_records(DataSpec(path=str(path), split="[1:3]")) == ROWS[1:3]
    assert load_records({"path": str(path), "limit": 1}) == ROWS[:1]


def test_an_explicit_format_overrides_the_extension(tmp_path):
    path = write_jsonl(tmp_path / "rows.data", ROWS)
    assert load_records(path, format="jsonl") == ROWS
    with pytest.raises(DataError, match=r"(?i)extension '\.data'.*format="):
        load_records(path)
    with pytest.raises(DataError, match="(?i)did you mean 'jsonl'"):
        load_records(path, format="jsnl")


def test_records_in_memory_pass_through():
    assert load_records(ROWS, limit=2) == ROWS[:2]
    assert load_records(ROWS)[0] is not ROWS[0]
    with pytest.raises(DataError, match="(?i)record 1 is a str"):
        load_records([ROWS[0], "text"])


@pytest.mark.parametrize(
    ("lines", "columns"),
    [
        (["a fine film\t1", "a bad one\t0", "it 's \"fine\t1"], ["text", "label"]),
        (["good\tpositive", "bad\tnegative", "fair\tpositive", "poor\tnegative"], ["text", "label"]),
        (["sentence\tlabel", "a fine film\t1"], ["sentence", "label"]),
        (["review\tstars", "a fine film\t1"], ["review", "stars"]),
        (["0\tthe first is the label", "1\tof this file"], ["label", "text"]),
        (
            ["one two three\tfour five six", "seven eight nine\tten and more words", "a b c d\te f g h i"],
            None,
        ),
        (["x\ty\tz\tw", "1 a\t2 a\t3 a\t4 a"], ["x", "y", "z", "w"]),
    ],
)
def test_tsv_with_and_without_header(tmp_path, lines, columns):
    path = tmp_path / "rows.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = load_records(path)
    columns = columns or ["column_1", "column_2"]
    assert list(records[0]) == columns
    headed = lines[0].split("\t") == columns
    assert [list(r.values()) for r in records] == [line.split("\t") for line in lines[headed:]]


def test_a_limit_never_changes_the_columns(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("".join(f"some words {i}\t{i % 2}\n" for i in range(50)))
    for limit in (1, 2, 3, 50, None):
        assert list(load_records(path, limit=limit)[0]) == ["text", "label"]


def test_named_columns_for_a_file_without_header(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("q,a\nreverse me,em esrever\n")
    assert load_records(path, columns=["q", "a"]) == [{"q": "reverse me", "a": "em esrever"}]
    assert len(load_records(path, columns=["prompt", "completion"])) == 2
    with pytest.raises(DataError, match=r"(?i)rows\.csv:1: 2 fields, but 3 column names"):
        load_records(path, columns=["a", "b", "c"])


def test_a_field_longer_than_the_csv_default(tmp_path):
    path = write_csv(tmp_path / "long.csv", [{"text": "x" * 200_000, "label": "1"}])
    before = csv.field_size_limit()
    assert len(load_records(path)[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_text_slices_count_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(10)))
    whole = path.read_text()
    assert load_records(path) == [{"text": whole}]
    first, last = load_records(path, split="[:80%]"), load_records(path, split="[80%:]")
    assert first[0]["text"] + last[0]["text"] == whole
    assert load_records(path, limit=2) == [{"text": "line 0\nline 1\n"}]


def test_folders_of_files_and_their_splits(tmp_path):
    write_jsonl(tmp_path / "train-00000.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "train-00001.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "dev.jsonl", ROWS[:2])
    (tmp_path / "README.md").write_text("not data")
    assert load_records(tmp_path, split="train") == ROWS
    assert load_records(tmp_path, "validation") == load_records(tmp_path, "dev") == ROWS[:2]
    assert load_records(tmp_path, "train[1:]", limit=1) == ROWS[1:2]
    with pytest.raises(DataError, match="(?i)splits train, validation; choose one"):
        load_records(tmp_path)
    with pytest.raises(DataError, match="(?i)no split 'tran'.*'train'"):
        load_records(tmp_path, "tran")


def test_a_dataset_dict_needs_a_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    data.save_to_disk(tmp_path / "set")
    assert load_records(tmp_path / "set", "train", limit=2) == ROWS[:2]
    with pytest.raises(DataError, match="(?i)train, test; choose one"):
        load_records(tmp_path / "set")
    with pytest.raises(DataError, match="(?i)no split 'dev'"):
        load_records(tmp_path / "set", "dev")


def test_json_object_of_splits(tmp_path):
    path = write_json(tmp_path / "all.json", {"train": ROWS, "test": ROWS[:1], "version": 3})
    assert load_records(path, "test") == ROWS[:1]
    with pytest.raises(DataError, match="(?i)test.*train.*choose one"):
        load_records(path)


BAD = [
    ("a.jsonl", '{"text": 1}\n{"text": \n', r"a\.jsonl:2: not JSON"),
    ("a.jsonl", "[1, 2]\n", r"a\.jsonl:1: expected an object, found a list"),
    ("a.json", '{"text": 1}\n{"text": 2}\n', r"a\.json:2: not JSON \(Extra data.*format='jsonl'"),
    ("a.json", "[1]", r"item 0 is a int"),
    ("a.json", "3", r"expected a list of objects"),
    ("a.csv", "text,label\na,1\nb\n", r"a\.csv:3: expected 2 fields \(text, label\), found 1"),
    ("a.tsv", "text\tlabel\na\t1\t2\n", r"a\.tsv:2: expected 2 fields .*found 3"),
    ("a.csv", 'text,label\n"a,1\n', r"a\.csv:2: unexpected end of data"),
    ("a.jsonl", "\n\n", r"no records in"),
    ("a.csv", "", r"no records in"),
    ("a.csv", "text,label\n", r"no records in"),
    ("a.txt", " \n", r"no records in"),
    ("a.parquet", "not parquet", r"cannot read .*a\.parquet as Parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"(?i){message}"):
        load_records(tmp_path / name)


def test_missing_files_offer_near_misses(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"(?i)no file or folder .*trian.jsonl; in .* did you mean 'train.jsonl'"):
        load_records(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="(?i)does not exist either"):
        load_records(tmp_path / "nowhere" / "train.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="(?i)no data files in"):
        load_records(tmp_path / "empty")
    with pytest.raises(DataError, match="(?i)one file and has no split 'train'"):
        load_records(tmp_path / "train.jsonl", "train")
    with pytest.raises(DataError, match="(?i)cannot read split"):
        load_records(tmp_path / "train.jsonl", "train[:")


class Explosive:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["data.pkl", "data.pt", "data.bin", "data.npy"])
def test_a_pickle_is_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(DataError, match="(?i)pickle.*convert it"):
        load_records(tmp_path / name)
    for format in ("jsonl", "json", "csv", "parquet"):
        with pytest.raises(DataError):
            load_records(tmp_path / name, format=format)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="(?i)not UTF-8"):
        load_records(tmp_path / "a.csv")


def test_unknown_spec_keys_offer_near_misses():
    with pytest.raises(DataError, match="(?i)unknown data option 'pth'; did you mean 'path'"):
        load_records({"pth": "x"})
    with pytest.raises(DataError, match="(?i)needs 'path'"):
        load_records({"limit": 3})
    with pytest.raises(DataError, match="(?i)limit must be at least 1"):
        load_records(ROWS, limit=0)


def test_split_records_holds_out_a_part():
    rows = [{"i": i} for i in range(10)]
    rest, held = split_records(rows, 0.3)
    assert held == rows[7:] and rest == rows[:7]
    rest, held = split_records(rows, 0.3, seed=1)
    assert sorted(r["i"] for r in rest + held) == list(range(10)) and len(held) == 3
    assert split_records(rows, 0.3, seed=1)[1] == held != split_records(rows, 0.3, seed=2)[1]
    with pytest.raises(DataError, match="(?i)between 0 and 1"):
        split_records(rows, 1.0)


def test_real_files(shared):
    data = shared / "data"
    train = load_records(data / "sst2", "train")
    dev = load_records(data / "sst2" / "dev.tsv")
    assert (len(train), len(dev)) == (6920, 872)
    assert set(train[0]) == {"text", "label"} and {r["label"] for r in dev} == {"0", "1"}
    boolq = load_records(data / "boolq_train.json")
    assert len(boolq) == 9427 and {"instruction", "output"} <= set(boolq[0])
    gsm = load_records(data / "gsm8k_test.jsonl")
    assert len(gsm) == 1319 and set(gsm[0]) == {"question", "answer"}
    text = load_records(data / "tinyshakespeare.txt")
    assert len(text) == 1 and text[0]["text"].startswith("First Citizen:")
