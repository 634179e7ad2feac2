"""Packed index rows, unpacked block by block: see `packing.py` for the format."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from xmc_kernels._cpu.vector import advance, at_address, splatted


@intrinsic
def _word(typingctx, packed, at):
    """Eight bytes from an offset on as uint64, the first one lowest."""
    signature = types.uint64(packed, types.intp)

    def codegen(context, builder, sig, args):
        address = builder.bitcast(builder.gep(args[0], [args[1]]), ir.IntType(64).as_pointer())
        return builder.load(address, align=1)

    return signature, codegen


@intrinsic
def _spread(typingctx, low, high, shifts, mask, offsets, into, at):
    """`into[at + j] = offsets[at + j] + (word >> shifts[j] & mask)` for j < 8, of pointers.

    The word is `low` for the first four and `high` for the others.
    """
    offset, inputs = types.intp, types.CPointer(types.int32)
    wide = types.CPointer(types.uint64)
    word = types.uint64
    signature = types.void(word, word, wide, types.uint64, inputs, inputs, offset)

    def codegen(context, builder, sig, args):
        low, high, shifts, mask, offsets, into, at = args
        words, numbers = ir.VectorType(low.type, 8), ir.VectorType(ir.IntType(32), 8)
        halves = [ir.IntType(32)(lane // 4 * 8) for lane in range(8)]
        word = builder.shuffle_vector(
            splatted(builder, 8, low),
            splatted(builder, 8, high),
            ir.Constant(ir.VectorType(ir.IntType(32), 8), halves),
        )

        def vector(pointer, kind):
            return builder.bitcast(pointer, kind.as_pointer())

        spread = builder.lshr(word, builder.load(vector(shifts, words), align=8))
        local = builder.trunc(builder.and_(spread, splatted(builder, 8, mask)), numbers)
        first = builder.load(vector(builder.gep(offsets, [at]), numbers), align=4)
        to = vector(builder.gep(into, [at]), numbers)
        builder.store(builder.add(first, local), to, align=4)
        return context.get_dummy_value()

    return signature, codegen


@njit(forceinline=True)
def word_at(a, packed, at):
    """Eight bytes from an offset on, zeros behind the index."""
    if at + 8 <= a.index_bytes:
        return _word(packed, at)
    word = np.uint64(0)
    for i in range(a.index_bytes - at):
        word |= np.uint64(packed[at + i]) << np.uint64(8 * i)
    return word


@njit(error_model="numpy")
def unpack_rows(a, packed, first, last, into):
    """The inputs of index rows [first, last) as int32, rows `a.unpacked` numbers apart.

    Eight slots of b bits fill b bytes, so that each eight begin with a byte; four fit a word, the
    second of which begins at the byte in which its first slot does. Words that would end behind
    the index are put together byte by byte.
    """
    shifts, offsets = at_address(np.uint64, a.shifts), at_address(np.int32, a.offsets)
    mask = (np.uint64(1) << np.uint64(a.slot_bits)) - np.uint64(1)
    for r in range(first, last):
        at, to = r * a.row_bytes, (r - first) * a.unpacked
        for k in range(0, a.fan_in, 8):
            low, high = word_at(a, packed, at), word_at(a, packed, at + a.slot_bits // 2)
            _spread(low, high, shifts, mask, offsets, advance(into, to), k)
            at += a.slot_bits
