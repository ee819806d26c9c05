import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spectral_lightning.data.readers import file_format, read_documents


def read(path, text_column="text"):
    return list(read_documents(path, text_column))


@pytest.fixture
def write(tmp_path):
    def written(name, content):
        path = tmp_path / name
        content = content.encode() if isinstance(content, str) else content
        packers = {".xz": lzma.compress, ".gz": gzip.compress}
        path.write_bytes(packers.get(path.suffix, bytes)(content))
        return path

    return written


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_plain_text_may_be_packed(write, suffix):
    assert read(write(f"a.txt{suffix}", "one\n\n\ntwo\r\n")) == ["one", "two"]


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_every_record_of_json_lines_is_a_document(write, suffix):
    content = '{"text": "one\\n\\n\\nstill one"}\n\n{"text": " "}\n{"text": "two", "id": 1}\n'
    assert read(write(f"a.jsonl{suffix}", content)) == ["one\n\n\nstill one", "two"]


def test_every_row_of_parquet_is_a_document(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one", "", "two"], "id": [1, 2, 3]}), path)
    assert read(path, "body") == ["one", "two"]
    with pytest.raises(ValueError, match=r"`text_column` must be a column of .*'id'\], got 'text'"):
        read(path)
    with pytest.raises(ValueError, match="must name a column of strings, but 'id' holds int"):
        read(path, "id")


def test_byte_order_mark_is_no_text(write):
    assert read(write("a.txt", b"\xef\xbb\xbfone")) == ["one"]


def test_format_is_known_by_the_ending(tmp_path):
    assert file_format(tmp_path / "A.TXT.XZ") == "txt"
    assert file_format(tmp_path / "a.parquet") == "parquet"
    assert file_format(tmp_path / "a.pdf") is None


def test_text_that_is_not_utf8_is_refused(write):
    with pytest.raises(ValueError, match=r"A text file must be UTF-8, but .*a\.txt is not"):
        read(write("a.txt", "h\u00e9".encode("latin-1")))


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_damaged_file_is_refused(write, suffix):
    path = write(f"a.txt{suffix}", "some text " * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"The text file .*a.txt{suffix} is damaged"):
        read(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=f"The text file .*a.txt{suffix} is damaged"):
        read(path)


def test_damaged_parquet_is_refused(write):
    with pytest.raises(ValueError, match=r"The text file .*a\.parquet is damaged"):
        read(write("a.parquet", "no such thing"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "must hold one JSON object per line, but line 2 of .*jsonl does not"),
        ("[1]", "must be a field of every record, but line 2 of .* no 'text', only list"),
        ('{"body": "x"}', r"but line 2 of .*a\.jsonl has no 'text', only \['body'\]"),
        ('{"text": null}', "'text' holds NoneType in line 2 of"),
        ('{"text": "\\ud800"}', "line 2 of .* holds half a surrogate pair"),
    ],
)
def test_bad_record_is_named_by_its_line(write, line, message):
    with pytest.raises(ValueError, match=message):
        read(write("a.jsonl", f"{json.dumps({'text': 'fine'})}\n{line}\n"))
