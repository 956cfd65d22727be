from __future__ import annotations

import io
import warnings
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from toy import encode_part

from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.commits import GROUP_BYTES
from raydfkd.data.shards import RowsDigest, _only_page, decode_part, rows_digest


def encode(*batches):
    return encode_part(batches, unit="r000-c0000-0009", seed=2**62, first_index=10)


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
