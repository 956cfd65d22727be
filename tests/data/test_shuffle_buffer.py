from __future__ import annotations

import pytest
import torch

from raydfkd.data.commits import Part
from raydfkd.data.shards import StoredRows
from raydfkd.data.shuffle_buffer import Piece, ShuffleBuffer

PARTS = [
    Part(path=f"parts/p{index}.parquet", rows=rows, bytes=1, xxh3="0" * 32) for index, rows in enumerate((5, 1, 7))
]
NUMBERS = torch.arange(13).split([part.rows for part in PARTS])


def fetch(part, reads=None):
    """Rows that are numbered through all parts."""
    if reads is not None:
        reads.append(part.path)
    numbers = NUMBERS[PARTS.index(part)]
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    return StoredRows(images=images, labels=numbers, teacher_logits=numbers.view(-1, 1).half())


def window(pieces, **changes):
    return ShuffleBuffer(pieces, **{"fetch": fetch, "held": {}, **changes})


@pytest.mark.parametrize("picked", [[0], [6, 0, 3], [4, 5, 6, 7], [8, 2, 5], list(range(9))])
def test_rows_with_given_numbers_are_taken_in_the_order_of_the_window(picked):
    pieces = [Piece(PARTS[2], 1, 4), Piece(PARTS[1], 0, 1), Piece(PARTS[0], 0, 5)]
    rows_of_window = torch.tensor([7, 8, 9, 5, 0, 1, 2, 3, 4])
    rows = window(pieces).take(torch.tensor(picked))
    expected = rows_of_window[sorted(picked)]
    assert torch.equal(rows.labels, expected)
    assert torch.equal(rows.teacher_logits[:, 0], expected.half())
    assert torch.equal(rows.images, expected.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2))


def test_taken_rows_are_a_copy():
    part = fetch(PARTS[0])
    one = window([Piece(PARTS[0], 0, 5)], fetch=lambda _: part)
    one.take(torch.arange(5)).images.zero_()
    assert torch.equal(part.images, fetch(PARTS[0]).images)


def test_logits_of_a_part_that_is_in_the_buffer_whole_are_held_once_and_of_others_apart_from_the_buffer():
    buffer = window([Piece(PARTS[0], 0, 5), Piece(PARTS[2], 2, 7)])
    whole, partial = (buffer.parts[PARTS[index].path].teacher_logits for index in (0, 2))
    memory = buffer.teacher_logits.untyped_storage().data_ptr()
    assert whole.untyped_storage().data_ptr() == memory
    assert partial.untyped_storage().data_ptr() != memory
    for logits, index in ((whole, 0), (partial, 2)):
        assert torch.equal(logits, fetch(PARTS[index]).teacher_logits)


def test_logits_of_parts_that_could_be_read_are_those_of_the_buffer():
    pieces = [Piece(part, 0, part.rows) for part in PARTS]
    buffer = window(pieces, fetch=lambda part: None if part is PARTS[1] else fetch(part))
    assert buffer.teacher_logits[:, 0].tolist() == [*range(5), *range(6, 13)]


def test_parts_that_are_held_are_not_fetched_again():
    reads = []
    first = window([Piece(PARTS[0], 0, 2), Piece(PARTS[1], 0, 1)])
    second = window(
        [Piece(PARTS[0], 2, 5), Piece(PARTS[2], 0, 7)], fetch=lambda part: fetch(part, reads), held=first.parts
    )
    assert reads == [PARTS[2].path]
    assert second.parts.keys() == {PARTS[0].path, PARTS[2].path}
    assert second.take(torch.arange(10)).labels.tolist() == [2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
