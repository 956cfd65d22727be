"""Parquet parts: how synthetic batches become bytes and bytes become tensors."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from raydfkd.data.batches import SyntheticBatch
from raydfkd.data.commits import GROUP_BYTES
from raydfkd.data.encodings import Encoding, EncodingKind, decode_images, encode_images
from raydfkd.data.logits import class_dtype, completed, largest

RAW = Encoding()
LOGITS_BYTES = 2**32
"""Maximum of bytes of a part's logits; a small file could ask for any number of them where few are stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """The rows of a part as students see them, in the order they were written.

    N rows, images of C channels, K classes.
    """

    images: Tensor
    """[N, C, H, W], uint8."""
    labels: Tensor
    """[N], int64."""
    teacher_logits: Tensor
    """[N, K], float16."""
    top_k: int | None = None
    """Logits of each row that are as the teacher gave them, where the others are made of their common level."""

    def __len__(self) -> int:
        """Rows in the part."""
        return len(self.labels)


def encode_rows(
    batch: SyntheticBatch, *, unit: str, seed: int, first_index: int, encoding: Encoding = RAW
) -> pa.RecordBatch:
    """The columns of a checked batch; raw pixels and whole logits are not copied.

    Raw images and logits are fixed-size binary, since Parquet has no uint8 and would store tensors and lists value by
    value, four times as large and many times slower. Where only the largest logits are kept, their classes are a column
    beside them. The other columns say where a row comes from, to readers of other tools: unit and its seed, number of
    the row in the unit (from ``first_index``), objective and student version.

    Raises:
        ValueError: the encoding cannot store so many channels.
    """
    count = len(batch)
    form = _Form(
        shape=tuple(batch.images.shape[1:]),
        classes=batch.teacher_logits.shape[1],
        kind=encoding.kind,
        top_k=encoding.top_k,
    )
    schema = _schema(form)
    image = schema.field("image").type
    logits = [batch.teacher_logits] if form.top_k is None else largest(batch.teacher_logits, form.top_k)
    columns = [
        _fixed_size_binary(batch.images, image)
        if encoding.kind == "raw"
        else pa.array(encode_images(batch.images, encoding), image),
        pa.array(batch.labels.numpy().astype(np.int32)),
        *(
            _fixed_size_binary(values, schema.field(name).type)
            for name, values in zip(("teacher_logits", "top_classes"), logits, strict=False)
        ),
        pa.array(np.full(count, batch.objective, np.float32)),
        pa.array(np.full(count, batch.student_version, np.int32)),
        pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [unit]),
        pa.array(np.full(count, seed, np.int64)),
        pa.array(np.arange(first_index, first_index + count, dtype=np.int32)),
    ]
    return pa.record_batch(columns, schema=schema)


def write_part(rows: Sequence[pa.RecordBatch]) -> bytes:
    """Write columns as one Parquet file; a row group's raw pixels are one page, which ``decode_part`` need not copy."""
    assert sum(len(batch) for batch in rows) > 0, "a part has rows"
    shape = _declared(rows[0].schema).shape
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_batches(rows),
        sink,
        row_group_size=max(1, GROUP_BYTES // int(np.prod(shape))),
        data_page_size=2 * GROUP_BYTES,
        compression="none",
        use_dictionary=["objective", "student_version", "unit", "seed"],
        write_statistics=["label", "index"],
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def decode_part(data: bytes | mmap.mmap) -> StoredRows:
    """Read what ``write_part`` wrote; nothing in the file decides what code runs.

    Raw pixels stay where they are: ``images`` may share the memory of ``data`` and must not be written to.

    Raises:
        ValueError: not Parquet, damaged, or with a schema that is not exactly ours; says what is wrong with it.
    """
    buffer = pa.py_buffer(data)
    try:
        file = pq.ParquetFile(pa.BufferReader(buffer))
        form = _declared(file.schema_arrow)
        _check_schema(file.schema_arrow, expected=_schema(form))
        others = [name for name in ("label", "teacher_logits", "top_classes") if name in file.schema_arrow.names]
        table = file.read(columns=others, use_threads=False)
        images = _read_images(file, buffer, form.shape, form.kind)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot be read as Parquet ({' '.join(str(error).split())})") from error
    return StoredRows(
        images=images,
        labels=_tensor(table["label"], pa.int32(), table.num_rows).long(),
        teacher_logits=_read_logits(table, form),
        top_k=form.top_k,
    )


def _read_logits(table: pa.Table, form: _Form) -> Tensor:
    count, width = table.num_rows, form.num_logits
    kept = _tensor(table["teacher_logits"], pa.float16(), count * width).view(count, width)
    if form.top_k is None:
        return kept
    dtype = pa.int16() if form.class_dtype == torch.int16 else pa.int32()
    classes = _tensor(table["top_classes"], dtype, count * form.top_k).view(count, form.top_k)
    if 2 * count * form.classes > LOGITS_BYTES:
        raise ValueError(f"has {count:,} rows of {form.classes:,} logits, more than {LOGITS_BYTES >> 30} GiB")
    if not 0 <= int(classes.min()) <= int(classes.max()) < form.classes:
        raise ValueError(f"column top_classes has numbers beyond the {form.classes} classes")
    return completed(kept, classes, form.classes)


def _read_images(file: pq.ParquetFile, data: pa.Buffer, shape: tuple[int, ...], kind: EncodingKind) -> Tensor:
    if kind != "raw":
        column = file.read(columns=["image"], use_threads=False)["image"]
        return decode_images((value.as_py() for value in column), kind, shape)
    pixels = int(np.prod(shape))
    index = file.schema_arrow.get_field_index("image")
    chunks = [file.metadata.row_group(group).column(index) for group in range(file.num_row_groups)]
    pages = [page for chunk in chunks if (page := _only_page(chunk, data, chunk.num_values * pixels)) is not None]
    if not pages or len(pages) < len(chunks):  # by another writer
        column = file.read(columns=["image"], use_threads=False)["image"]
        return _tensor(column, pa.uint8(), len(column) * pixels).view(-1, *shape)
    tensors = [from_dlpack(pa.Array.from_buffers(pa.uint8(), page.size, [None, page])) for page in pages]
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).view(-1, *shape)


def _only_page(chunk: pq.ColumnChunkMetaData, data: pa.Buffer, size: int) -> pa.Buffer | None:
    """The ``size`` bytes of a column chunk's values, where it is one plain, uncompressed page; else None.

    The page's header is compared with the one that such a page has (Parquet's PageHeader in Thrift's compact protocol:
    type, both sizes, number of values, encoding), so that a file of other pages is never taken for one.
    """
    length, count = _varint(2 * size), _varint(2 * chunk.num_values)
    header = b"\x15\x00\x15" + length + b"\x15" + length + b"\x2c\x15" + count + b"\x15\x00"
    begin, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page or not 0 <= begin <= end - size <= data.size:
        return None
    if data.slice(begin, len(header)).to_pybytes() != header or end > data.size:
        return None
    return data.slice(end - size, size)


def _varint(value: int) -> bytes:
    """Seven bits a byte, low ones first, all but the last byte with the high bit set."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def on_host(batch: SyntheticBatch) -> SyntheticBatch:
    """The batch in CPU memory, contiguous.

    Raises:
        ValueError: a tensor has another type or shape than ``SyntheticBatch`` promises.
    """
    for name, dtype, dim in (("images", torch.uint8, 4), ("labels", torch.int64, 1), ("teacher_logits", torch.half, 2)):
        tensor: Tensor = getattr(batch, name)
        if tensor.dtype != dtype or tensor.dim() != dim or len(tensor) != len(batch):
            raise ValueError(
                f"{name} of a batch of {len(batch)} is {tensor.dtype} {list(tensor.shape)}, "
                f"but a transfer set stores {dtype} with {dim} dimensions, the first {len(batch)}"
            )
    return replace(
        batch,
        images=batch.images.detach().cpu().contiguous(),
        labels=batch.labels.detach().cpu().contiguous(),
        teacher_logits=batch.teacher_logits.detach().cpu().contiguous(),
    )


class RowsDigest:
    """XXH3 (128 bits) over pixels, labels and logits of rows that come in batches.

    Each row is hashed by itself, so that rows can come in one batch or in many without a difference, and ``state``
    (16 bytes a row) is all that another process needs to resume.
    """

    def __init__(self) -> None:
        self._rows = bytearray()
        self._header = ""

    def update(self, batch: SyntheticBatch) -> None:
        """Add the rows of a batch on the host."""
        self._header = f"{list(batch.images.shape[1:])} {list(batch.teacher_logits.shape[1:])}"
        images = _bytes_of_rows(batch.images.numpy())
        labels = _bytes_of_rows(batch.labels.numpy().astype("<i4"))
        logits = _bytes_of_rows(batch.teacher_logits.numpy().astype("<f2", copy=False))
        for image, label, answer in zip(images, labels, logits, strict=True):
            row = xxhash.xxh3_128(image)
            row.update(label)
            row.update(answer)
            self._rows += row.digest()

    @property
    def state(self) -> tuple[str, bytes]:
        """The rows so far, as ``from_state`` takes them."""
        return self._header, bytes(self._rows)

    @classmethod
    def from_state(cls, header: str, rows: bytes) -> RowsDigest:
        """Resume from a ``state``."""
        digest = cls()
        digest._header, digest._rows = header, bytearray(rows)
        return digest

    def hexdigest(self) -> str:
        """The digest of all rows so far."""
        return xxhash.xxh3_128(self._header.encode() + self._rows).hexdigest()


def _bytes_of_rows(values: NDArray[Any]) -> Iterator[memoryview]:
    data, width = values.data.cast("B"), values[0].nbytes
    return (data[begin : begin + width] for begin in range(0, len(data), width))


def rows_digest(batches: Iterable[SyntheticBatch]) -> str:
    """XXH3 (128 bits) of pixels, labels and logits of these rows, however they were split into batches or parts."""
    digest = RowsDigest()
    for batch in batches:
        digest.update(on_host(batch))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """The form of a part's rows, as the metadata of its columns has it."""

    shape: tuple[int, ...]
    """Of an image."""
    classes: int
    kind: EncodingKind
    top_k: int | None

    @property
    def num_logits(self) -> int:
        """Logits that are stored of each row."""
        return self.classes if self.top_k is None else self.top_k + 1

    @property
    def class_dtype(self) -> torch.dtype:
        """Type of the classes of the largest logits."""
        return class_dtype(self.classes)


def _schema(form: _Form) -> pa.Schema:
    image = {"shape": ",".join(map(str, form.shape)), "dtype": "uint8"}
    if form.kind != "raw":
        image["encoding"] = form.kind
    width = int(np.prod(form.shape)) if form.kind == "raw" else -1
    logits, beside = {"shape": str(form.classes), "dtype": "float16"}, []
    if form.top_k is not None:
        logits |= {"encoding": "top_k", "k": str(form.top_k)}
        about = {"shape": str(form.top_k), "dtype": str(form.class_dtype).removeprefix("torch.")}
        size = pa.binary(form.class_dtype.itemsize * form.top_k)
        beside = [pa.field("top_classes", size, nullable=False, metadata=about)]
    return pa.schema(
        [
            pa.field("image", pa.binary(width), nullable=False, metadata=image),
            pa.field("label", pa.int32(), nullable=False),
            pa.field("teacher_logits", pa.binary(2 * form.num_logits), nullable=False, metadata=logits),
            *beside,
            pa.field("objective", pa.float32(), nullable=False),
            pa.field("student_version", pa.int32(), nullable=False),
            pa.field("unit", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("seed", pa.int64(), nullable=False),
            pa.field("index", pa.int32(), nullable=False),
        ]
    )


def _declared(schema: pa.Schema) -> _Form:
    """The form that the columns' metadata declare."""
    sizes = []
    for name, pattern in (("image", rb"[1-9]\d{0,5}(,[1-9]\d{0,5}){2}"), ("teacher_logits", rb"[1-9]\d{0,6}")):
        if schema.names.count(name) != 1:
            raise ValueError(f"has columns {', '.join(schema.names)}, but not one {name}")
        shape = (schema.field(name).metadata or {}).get(b"shape", b"")
        if not re.fullmatch(pattern, shape):
            raise ValueError(f"column {name} declares the shape {shape[:40]!r}, which is none")
        sizes.append(tuple(int(size) for size in shape.split(b",")))
    image, (classes,) = sizes
    if np.prod(image, dtype=object) >= 2**31:
        raise ValueError(f"column image declares the shape {image}, which is too large")
    top_k = _declared_k(schema.field("teacher_logits").metadata or {}, classes)
    encoding = (schema.field("image").metadata or {}).get(b"encoding", b"raw")
    for kind in get_args(EncodingKind):
        if encoding == kind.encode():
            return _Form(shape=image, classes=classes, kind=kind, top_k=top_k)
    raise ValueError(f"column image declares the encoding {encoding[:40]!r}, which is none")


def _declared_k(metadata: Mapping[bytes, bytes], classes: int) -> int | None:
    if b"encoding" not in metadata:
        return None
    k = metadata.get(b"k", b"")
    if not re.fullmatch(rb"[1-9]\d{0,6}", k) or int(k) >= classes:
        raise ValueError(f"column teacher_logits declares {k[:40]!r} logits of {classes}, which cannot be")
    return int(k)


def _check_schema(schema: pa.Schema, *, expected: pa.Schema) -> None:
    if schema.equals(expected, check_metadata=True):
        return
    if schema.names != expected.names:
        raise ValueError(f"has columns {', '.join(schema.names)} instead of {', '.join(expected.names)}")
    for found, wanted in zip(schema, expected, strict=True):
        if not found.equals(wanted, check_metadata=True):
            raise ValueError(
                f"column {wanted.name} is {found} with metadata {found.metadata} "
                f"instead of {wanted} with metadata {wanted.metadata}"
            )
    raise ValueError(f"has metadata of its own: {', '.join(sorted(map(repr, schema.metadata or {})))}")


def _fixed_size_binary(tensor: Tensor, kind: pa.DataType) -> pa.Array:
    assert tensor[0].numel() * tensor.element_size() == kind.byte_width, "rows of a unit have one shape"
    return pa.Array.from_buffers(kind, len(tensor), [None, pa.py_buffer(tensor.numpy())])


def _tensor(column: pa.ChunkedArray, kind: pa.DataType, count: int) -> Tensor:
    """``count`` values of a column's buffer as a flat tensor."""
    rows = column.combine_chunks()
    per_row = count // len(rows)
    values = pa.Array.from_buffers(kind, count, [None, rows.buffers()[1]], offset=rows.offset * per_row)
    tensor: Tensor = from_dlpack(values)  # numpy would hand over the buffer as read-only, and torch warn of it
    return tensor
