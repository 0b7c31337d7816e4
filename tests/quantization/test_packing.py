"""Integers as a dense bit stream: its bytes, its width, and that unpacking gives the integers back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_oscqat.quantization.packing import pack_bits, packed_width, unpack_bits


@given(st.data())
def test_unpack_undoes_pack_for_every_width_and_shape(data):
    bits = data.draw(st.integers(1, 8))
    rows = data.draw(st.integers(0, 5))
    count = data.draw(st.integers(0, 35))
    seed = data.draw(st.integers(0, 2**16))
    values = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(count, bits))
    assert torch.equal(unpack_bits(packed, bits, count), values.short())


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (0, 5), (0, 8)])
def test_empty_tensors_come_back(shape):
    packed = pack_bits(torch.zeros(shape, dtype=torch.int64), 3)
    assert packed.shape == (shape[0], packed_width(shape[1], 3))
    assert unpack_bits(packed, 3, shape[1]).shape == shape


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_width_is_the_least_number_of_bytes_that_holds_all_bits(count, bits):
    width = packed_width(count, bits)
    assert width * 8 >= count * bits
    assert (width - 1) * 8 < count * bits


def test_bytes_of_three_bits():
    # Integers     5    2    7    1    0    6    3    4    1
    # least significant bit first:
    #             101  010  111  100  000  011  110  001  100
    # in bytes:   10101011 11000000 11110001 100(00000)
    # read with the least significant bit first:
    #             1+4+16+64+128 = 213, 1+2 = 3, 1+2+4+8+128 = 143, 1
    values = torch.tensor([[5, 2, 7, 1, 0, 6, 3, 4, 1]])
    packed = torch.tensor([[213, 3, 143, 1]], dtype=torch.uint8)
    assert torch.equal(pack_bits(values, 3), packed)
    assert torch.equal(unpack_bits(packed, 3, 9), values.short())


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b10000001, 0b1]),
        (2, [3, 0, 1, 2], [0b10_01_00_11]),
        (4, [1, 15, 8], [0xF1, 0x08]),
        (5, [31, 1], [0b001_11111, 0b00]),
        (7, [127, 1], [0b1_1111111, 0b0]),
        (8, [0, 200, 255], [0, 200, 255]),
    ],
)
def test_bytes_of_other_widths(bits, values, expected):
    assert pack_bits(torch.tensor([values]), bits).tolist() == [expected]


def test_each_row_begins_with_a_byte_of_its_own():
    assert pack_bits(torch.tensor([[7, 7, 7], [1, 0, 0]]), 3).tolist() == [[0xFF, 0x01], [0x01, 0x00]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_packs_to_the_same_bytes(dtype):
    values = torch.tensor([[1, 2, 3, 7, 0]])
    assert torch.equal(pack_bits(values.to(dtype), 3), pack_bits(values, 3))


def test_integers_in_float_pack_like_integers():
    values = torch.tensor([[1, 2, 3, 7, 0]])
    assert torch.equal(pack_bits(values.float(), 3), pack_bits(values, 3))


@pytest.mark.parametrize(("value", "bits"), [(-1, 3), (8, 3), (256, 8), (4, 2)])
def test_integer_out_of_range_is_an_error(value, bits):
    with pytest.raises(ValueError, match=rf"got integers from .*{value}.*expected 0 to {2**bits - 1} .*subtract qmin"):
        pack_bits(torch.tensor([[0, value, 1]]), bits)


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (8,), (2, 4, 1)])
def test_rows_of_another_width_are_an_error(shape):
    with pytest.raises(ValueError, match=r"expected \[rows, 4\] for 10 integers of 3 bits"):
        unpack_bits(torch.zeros(shape, dtype=torch.uint8), 3, 10)
