"""Integers as a dense stream of bits: 3-bit weights take 3 bits.

Each row is packed on its own, least significant bit first, and ends on a byte boundary. Eight integers of b bits make
exactly b bytes, so eight of them are shifted into one 64-bit word and its b low bytes are what is stored; no loop over
bits, for any width from 1 to 8.
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
    groups = F.pad(values.long(), (0, -count % 8)).view(rows, -(-count // 8), 8)
    shifts = torch.arange(8, device=values.device)
    words = (groups << shifts * num_bits).sum(-1, keepdim=True)
    packed = (words >> 8 * shifts[:num_bits]) & 0xFF
    return packed.flatten(1)[:, : packed_width(count, num_bits)].to(torch.uint8).contiguous()


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
    groups = F.pad(packed.long(), (0, -width % num_bits)).view(rows, -(-width // num_bits), num_bits)
    shifts = torch.arange(8, device=packed.device)
    words = (groups << 8 * shifts[:num_bits]).sum(-1, keepdim=True)
    values = (words >> num_bits * shifts) & (2**num_bits - 1)
    return values.flatten(1)[:, :count].to(torch.int16)
