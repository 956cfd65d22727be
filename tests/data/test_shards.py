from __future__ import annotations

import io
import warnings
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from toy import encode_part

from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.commits import GROUP_BYTES
from raydfkd.data.encodings import Encoding
from raydfkd.data.shards import RowsDigest, _only_page, decode_part, rows_digest


def encode(*batches, **encoding):
    return encode_part(batches, unit="r000-c0000-0009", seed=2**62, first_index=10, encoding=Encoding(**encoding))


def rows_of(batch, rows):
    return replace(batch, **{name: getattr(batch, name)[rows] for name in ("images", "labels", "teacher_logits")})


def rewritten(data, change):
    """The part with its table changed, as a stranger might write it."""
    sink = io.BytesIO()
    pq.write_table(change(pq.read_table(io.BytesIO(data))), sink)
    return sink.getvalue()


def test_part_reads_back_as_the_rows_that_were_written(make_batch):
    batches = [make_batch(5), make_batch(1), make_batch(3)]
    rows = decode_part(encode(*batches))
    assert len(rows) == 9
    for name in ("images", "labels", "teacher_logits"):
        written = torch.cat([getattr(batch, name) for batch in batches])
        torch.testing.assert_close(getattr(rows, name), written, rtol=0, atol=0)


def test_reading_a_part_warns_of_nothing(make_batch):
    data = encode(make_batch(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_part(data).images.float()


def test_rows_say_where_they_come_from_to_any_parquet_reader(make_batch):
    table = pq.read_table(io.BytesIO(encode(make_batch(2, objective=0.5), make_batch(1, student_version=4))))
    assert table["unit"].to_pylist() == ["r000-c0000-0009"] * 3
    assert table["seed"].to_pylist() == [2**62] * 3
    assert table["index"].to_pylist() == [10, 11, 12]
    assert table["objective"].to_pylist() == [0.5, 0.5, 1.0]
    assert table["student_version"].to_pylist() == [-1, -1, 4]


def test_pixels_are_stored_byte_for_byte_and_uncompressed(make_batch):
    batch = make_batch(4)
    file = pq.ParquetFile(io.BytesIO(data := encode(batch)))
    column = file.metadata.row_group(0).column(0)
    assert batch.images.numpy().tobytes() in data
    assert (column.physical_type, column.compression) == ("FIXED_LEN_BYTE_ARRAY", "UNCOMPRESSED")
    assert file.schema_arrow.field("image").metadata == {b"shape": b"3,4,5", b"dtype": b"uint8"}


def test_raw_pixels_are_not_copied_out_of_the_file(make_batch):
    batch = make_batch(4)
    data = bytearray(encode(batch))
    images = decode_part(data).images
    data[data.index(batch.images.numpy().tobytes())] ^= 0xFF
    assert images[0, 0, 0, 0] == 255 - batch.images[0, 0, 0, 0].item()


@pytest.mark.parametrize("count", [1, 63, 64, 8191, 8192])
def test_pixels_of_a_part_are_found_whatever_the_length_of_their_header(count):
    """Lengths and counts take one byte more from 64, 8192 and so on."""
    rng = torch.Generator().manual_seed(count)
    batch = SyntheticBatch(
        images=torch.randint(0, 256, (count, 1, 1, 1), dtype=torch.uint8, generator=rng),
        labels=torch.zeros(count, dtype=torch.int64),
        teacher_logits=torch.zeros(count, 2).half(),
        objective=0.0,
    )
    data = encode(batch)
    file = pq.ParquetFile(io.BytesIO(data))
    assert _only_page(file.metadata.row_group(0).column(0), pa.py_buffer(data), count) is not None
    assert torch.equal(decode_part(data).images, batch.images)


@pytest.mark.parametrize(
    "options",
    [
        {"data_page_size": 100, "write_batch_size": 1},
        {"row_group_size": 2, "data_page_size": 60, "write_batch_size": 1},
        {"compression": "zstd"},
        {"use_dictionary": True},
        {"use_dictionary": False, "column_encoding": {"image": "BYTE_STREAM_SPLIT"}},
        {"use_dictionary": False, "data_page_version": "2.0"},
        {"use_dictionary": False, "write_page_checksum": True},
    ],
)
def test_part_that_another_program_rewrote_has_the_same_rows(options, make_batch):
    batch = make_batch(5)
    sink = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(encode(batch))), sink, **{"compression": "none", **options})
    assert torch.equal(decode_part(sink.getvalue()).images, batch.images)


def test_largest_logits_and_their_classes_are_columns_that_numpy_reads(make_batch):
    batch = make_batch(4)
    table = pq.read_table(io.BytesIO(encode(batch, top_k=3)))
    top = batch.teacher_logits.topk(3)
    for row in range(4):
        kept = np.frombuffer(table["teacher_logits"][row].as_py(), "float16")
        classes = np.frombuffer(table["top_classes"][row].as_py(), "int16")
        assert kept[:3].tolist() == top.values[row].tolist()
        assert classes.tolist() == top.indices[row].tolist()
        others = batch.teacher_logits[row].double()
        others[top.indices[row]] = -torch.inf
        assert kept[3] == pytest.approx(others.exp().sum().div(4).log().item(), abs=2e-3)
    about = {b"shape": b"7", b"dtype": b"float16", b"encoding": b"top_k", b"k": b"3"}
    assert table.schema.field("teacher_logits").metadata == about
    assert table.schema.field("top_classes").metadata == {b"shape": b"3", b"dtype": b"int16"}


def test_part_with_all_logits_has_the_columns_that_it_always_had(make_batch):
    names = ["image", "label", "teacher_logits", "objective", "student_version", "unit", "seed", "index"]
    schema = pq.read_schema(io.BytesIO(encode(make_batch(2))))
    assert schema.names == names
    assert schema.field("teacher_logits").metadata == {b"shape": b"7", b"dtype": b"float16"}


def test_class_of_a_logit_that_the_teacher_does_not_have_is_refused(make_batch):
    for wrong in (7, -1):

        def change(table, wrong=wrong):
            index = table.schema.get_field_index("top_classes")
            field = table.schema.field(index)
            values = pa.array([np.array([0, wrong, 2], "int16").tobytes()] * 2, field.type)
            return table.set_column(index, field, values)

        with pytest.raises(ValueError, match="column top_classes has numbers beyond the 7 classes"):
            decode_part(rewritten(encode(make_batch(2), top_k=3), change))


def test_small_part_that_asks_for_absurdly_many_logits_is_refused_before_they_are_made(make_batch, monkeypatch):
    data = encode(make_batch(5), top_k=2)
    monkeypatch.setattr("raydfkd.data.shards.LOGITS_BYTES", 2 * 5 * 7)
    assert len(decode_part(data)) == 5
    monkeypatch.setattr("raydfkd.data.shards.LOGITS_BYTES", 2 * 5 * 7 - 1)
    with pytest.raises(ValueError, match="has 5 rows of 7 logits, more than"):
        decode_part(data)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"encoding": "top_k", "k": "7"}, "column teacher_logits declares b'7' logits of 7, which cannot be"),
        ({"encoding": "top_k", "k": "-3"}, "declares b'-3' logits"),
        ({"encoding": "top_k"}, "declares b'' logits"),
        ({"encoding": "top_k", "k": "2"}, "has columns .* instead of|column teacher_logits is"),
        ({"encoding": "gzip", "k": "3"}, "column teacher_logits is"),
    ],
)
def test_logits_in_a_form_that_cannot_be_are_refused(metadata, problem, make_batch):
    def change(table):
        index = table.schema.get_field_index("teacher_logits")
        about = {"shape": "7", "dtype": "float16", **metadata}
        return table.cast(table.schema.set(index, table.schema.field(index).with_metadata(about)))

    with pytest.raises(ValueError, match=problem):
        decode_part(rewritten(encode(make_batch(2), top_k=3), change))


def test_row_groups_hold_a_bounded_number_of_pixels(make_batch):
    batch = make_batch(3)
    large = replace(batch, images=torch.zeros(3, 3, 2048, 2048, dtype=torch.uint8))
    file = pq.ParquetFile(io.BytesIO(data := encode(large)))
    assert file.metadata.row_group(0).num_rows == GROUP_BYTES // (3 * 2048 * 2048)
    rows = decode_part(data)
    assert torch.equal(rows.labels, batch.labels)
    assert rows.images.shape == large.images.shape


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: table.drop(["seed"]), "has columns image, label, .* instead of"),
        (lambda table: table.drop(["image"]), "but not one image"),
        (lambda table: table.append_column("more", table["seed"]), "has columns .*, more instead of"),
        (lambda table: table.replace_schema_metadata({"pandas": "{}"}), "has metadata of its own: b'pandas'"),
        (lambda table: table.cast(as_type(table.schema, "label", pa.int64())), "column label is .*int64.* instead of"),
        (lambda table: table.cast(declaring(table.schema, "image", shape="3,4,6")), "column image is "),
        (lambda table: table.cast(declaring(table.schema, "image", shape="3,-4,5")), "declares the shape b'3,-4,5'"),
        (
            lambda table: table.cast(declaring(table.schema, "image", shape="3,4,5", encoding="gif")),
            "declares the encoding b'gif'",
        ),
        (lambda table: table.cast(declaring(table.schema, "image", shape="3,4,5", encoding="png")), "column image is "),
        (lambda table: table.cast(declaring(table.schema, "image", shape="99999,99999,99999")), "too large"),
    ],
)
def test_file_with_another_schema_is_refused_with_its_problem(change, problem, make_batch):
    with pytest.raises(ValueError, match=problem):
        decode_part(rewritten(encode(make_batch(2)), change))


def as_type(schema, name, kind):
    index = schema.get_field_index(name)
    return schema.set(index, schema.field(index).with_type(kind))


def declaring(schema, name, **metadata):
    index = schema.get_field_index(name)
    return schema.set(index, schema.field(index).with_metadata({"dtype": "uint8", **metadata}))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-20], lambda data: b"not Parquet" * 9])
def test_what_is_no_parquet_file_is_refused(damage, make_batch):
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        decode_part(damage(encode(make_batch(2))))


def test_rows_digest_does_not_depend_on_how_rows_are_split_into_batches(make_batch):
    whole = make_batch(10)
    for cut in (1, 4, 9):
        assert rows_digest([rows_of(whole, slice(cut)), rows_of(whole, slice(cut, None))]) == rows_digest([whole])


def test_rows_digest_is_a_hash_of_the_rows_hashes(make_batch):
    batch = make_batch(4)
    rows = b""
    for image, label, logits in zip(batch.images, batch.labels, batch.teacher_logits, strict=True):
        data = image.numpy().tobytes() + label.numpy().astype("<i4").tobytes() + logits.numpy().tobytes()
        rows += xxhash.xxh3_128(data).digest()
    assert rows_digest([batch]) == xxhash.xxh3_128_hexdigest(b"[3, 4, 5] [7]" + rows)


def test_rows_digest_goes_on_from_its_state(make_batch):
    whole = make_batch(10)
    half = RowsDigest()
    half.update(rows_of(whole, slice(4)))
    resumed = RowsDigest.from_state(*half.state)
    resumed.update(rows_of(whole, slice(4, None)))
    assert resumed.hexdigest() == rows_digest([whole])


@pytest.mark.parametrize("name", ["images", "labels", "teacher_logits"])
def test_rows_digest_changes_with_every_column(name, make_batch):
    batch = make_batch(4)
    changed = getattr(batch, name).clone()
    changed[-1] = 0 if changed[-1].count_nonzero() else 1
    assert rows_digest([replace(batch, **{name: changed})]) != rows_digest([batch])


def test_rows_digest_changes_with_the_order_of_rows(make_batch):
    batch = make_batch(4)
    assert rows_digest([rows_of(batch, [1, 0, 2, 3])]) != rows_digest([batch])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"images": torch.zeros(4, 3, 4, 5)}, r"images of a batch of 4 is torch.float32 \[4, 3, 4, 5\]"),
        ({"teacher_logits": torch.zeros(4, 7)}, "but a transfer set stores torch.float16 with 2 dimensions"),
        ({"teacher_logits": torch.zeros(3, 7).half()}, r"teacher_logits of a batch of 4 is torch.float16 \[3, 7\]"),
    ],
)
def test_batch_with_tensors_of_another_kind_is_refused(change, problem, make_batch):
    with pytest.raises(ValueError, match=problem):
        rows_digest([replace(make_batch(4), **change)])
