"""Integers as a dense stream of bits: 3-bit weights take 3 bits.

Each row is packed on its own, least significant bit first, and ends on a byte boundary. There is no loop over bits:
integers are shifted into words, and the words' low bytes are what is stored. Where the width divides 8, a word is one
byte; otherwise eight integers of b bits make exactly b bytes, for which a word of 64 bits has room.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_width(count: int, num_bits: int) -> int:
    """Bytes that a row of `count` integers of `num_bits` bits takes."""
    return -(-count * num_bits // 8)


def pack_bits(values: Tensor, num_bits: int) -> Tensor:
    """Pack rows of unsigned integers into rows of bytes.

    Args:
        values: integers in `[0, 2**num_bits)`, any integer dtype, shape `[rows, count]`.
        num_bits: width of an integer, 1 to 8.

    Returns:
        uint8 tensor `[rows, packed_width(count, num_bits)]`.

    Raises:
        ValueError: if a value does not fit in `num_bits` bits.
    """
    rows, count = values.shape
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 2**num_bits):
        raise ValueError(
            f"got integers from {int(values.min())} to {int(values.max())}, expected 0 to {2**num_bits - 1} "
            f"for {num_bits} bits: subtract qmin first"
        )
    in_word, dtype = _word(num_bits)
    groups = F.pad(values.to(dtype), (0, -count % in_word)).view(rows, -(-count // in_word), in_word)
    words = (groups << _shifts(groups, in_word, num_bits)).sum(-1, keepdim=True, dtype=dtype)
    if dtype != torch.uint8:
        words = (words >> _shifts(words, num_bits, 8)).to(torch.uint8)
    return words.flatten(1)[:, : packed_width(count, num_bits)].contiguous()


def unpack_bits(packed: Tensor, num_bits: int, count: int) -> Tensor:
    """Undo `pack_bits`.

    Args:
        packed: uint8 tensor `[rows, packed_width(count, num_bits)]`.
        num_bits: width of an integer, 1 to 8.
        count: integers in a row.

    Returns:
        int16 tensor `[rows, count]`, values in `[0, 2**num_bits)`.

    Raises:
        ValueError: if a row has another number of bytes than `count` integers take.
    """
    if packed.ndim != 2 or packed.shape[1] != packed_width(count, num_bits):
        raise ValueError(
            f"got packed rows of shape {list(packed.shape)}, expected [rows, {packed_width(count, num_bits)}] "
            f"for {count} integers of {num_bits} bits"
        )
    rows, width = packed.shape
    in_word, dtype = _word(num_bits)
    if dtype == torch.uint8:
        words = packed.unsqueeze(-1)
    else:
        groups = F.pad(packed, (0, -width % num_bits)).view(rows, -(-width // num_bits), num_bits).to(dtype)
        words = (groups << _shifts(groups, num_bits, 8)).sum(-1, keepdim=True, dtype=dtype)
    values = (words >> _shifts(words, in_word, num_bits)).bitwise_and_(2**num_bits - 1)
    return values.to(torch.int16).flatten(1)[:, :count]


def _word(num_bits: int) -> tuple[int, torch.dtype]:
    """How many integers go into a word, and its type."""
    return (8, torch.int64) if 8 % num_bits else (8 // num_bits, torch.uint8)


def _shifts(like: Tensor, count: int, step: int) -> Tensor:
    return torch.arange(0, count * step, step, dtype=like.dtype, device=like.device)
