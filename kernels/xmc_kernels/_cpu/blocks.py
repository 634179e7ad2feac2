"""Tuples of vectors: several labels, or several slots of one, that a kernel works on at once.

A tuple's length is part of its type, so that every number below stays in a register. `T` labels
that share an index row take one load of a row of x for `T` multiply-adds; chains of multiply-adds
that do not wait for each other hide their latency.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from xmc_kernels._cpu.vector import (
    FLOATS,
    LANES,
    address_of,
    call,
    interleaved,
    slice_of,
    splatted,
    sum_of,
)

I64 = ir.IntType(64)


@intrinsic(prefer_literal=True)
def repeat(typingctx, count, vector):
    """A tuple of `count` (a compile-time constant) times the same vector."""
    signature = types.UniTuple(vector, count.literal_value)(count, vector)

    def codegen(context, builder, sig, args):
        return context.make_tuple(builder, sig.return_type, [args[1]] * len(sig.return_type))

    return signature, codegen


def _broadcast(builder, weight, offset, width):
    return splatted(builder, width, builder.load(builder.gep(weight, [offset])))


def _row(builder, kind, index, offset, base, width):
    """Where in feature-major numbers the input lies that an index names."""
    value = builder.load(builder.gep(index, [offset]))
    value = (builder.sext if kind.dtype.signed else builder.zext)(value, I64)
    return builder.add(base, builder.mul(value, I64(width)))


@intrinsic
def add_slots(typingctx, sums, x, base, weight, w, index, row):
    """`sums[c] += weight[w + c] * (row index[row + c] of x)`: slots of one label."""
    signature = sums(sums, FLOATS, types.intp, FLOATS, types.intp, index, types.intp)

    def codegen(context, builder, sig, args):
        sums, x, base, weight, w, index, row = args
        width = sig.args[0].dtype.width
        for c in range(len(sig.args[0])):
            at = _row(builder, sig.args[5], index, builder.add(row, I64(c)), base, width)
            inputs = builder.load(address_of(builder, x, at, width), align=4)
            scale = _broadcast(builder, weight, builder.add(w, I64(c)), width)
            total = call(builder, "fmuladd", [scale, inputs, builder.extract_value(sums, c)])
            sums = builder.insert_value(sums, total, c)
        return sums

    return signature, codegen


@intrinsic
def add_labels(typingctx, sums, x, at, weight, w, step):
    """`sums[t] += weight[w + t * step] * x[at:]`: one slot of labels that share an index row."""
    signature = sums(sums, FLOATS, types.intp, FLOATS, types.intp, types.intp)

    def codegen(context, builder, sig, args):
        sums, x, at, weight, w, step = args
        width = sig.args[0].dtype.width
        inputs = builder.load(address_of(builder, x, at, width), align=4)
        for t in range(len(sig.args[0])):
            scale = _broadcast(builder, weight, w, width)
            total = call(builder, "fmuladd", [scale, inputs, builder.extract_value(sums, t)])
            sums = builder.insert_value(sums, total, t)
            w = builder.add(w, step)
        return sums

    return signature, codegen


@intrinsic
def total(typingctx, sums):
    """The sum of a tuple's vectors, as a tree."""

    def codegen(context, builder, sig, args):
        parts = [builder.extract_value(args[0], i) for i in range(len(sig.args[0]))]
        while len(parts) > 1:
            half = len(parts) // 2
            added = [builder.fadd(a, b) for a, b in zip(parts[:half], parts[half:], strict=False)]
            parts = added + parts[2 * half :]
        return parts[0]

    return sums.dtype(sums), codegen


@intrinsic
def load_rows(typingctx, like, source, at):
    """A tuple of consecutive vectors of a pointer, from offset `at` on."""
    signature = like(like, FLOATS, types.intp)

    def codegen(context, builder, sig, args):
        _, source, at = args
        width = sig.args[0].dtype.width
        rows = [
            builder.load(
                address_of(builder, source, builder.add(at, I64(i * width)), width), align=4
            )
            for i in range(len(sig.args[0]))
        ]
        return context.make_tuple(builder, sig.return_type, rows)

    return signature, codegen


@intrinsic
def fill_rows(typingctx, like, source, at):
    """A tuple of vectors, the t-th of `source[at + t]` alone."""
    signature = like(like, FLOATS, types.intp)

    def codegen(context, builder, sig, args):
        _, source, at = args
        width = sig.args[0].dtype.width
        rows = [
            _broadcast(builder, source, builder.add(at, I64(t)), width)
            for t in range(len(sig.args[0]))
        ]
        return context.make_tuple(builder, sig.return_type, rows)

    return signature, codegen


@intrinsic
def store_rows(typingctx, into, at, rows):
    """Store a tuple's vectors one after the other, from offset `at` on."""
    signature = types.void(FLOATS, types.intp, rows)

    def codegen(context, builder, sig, args):
        into, at, rows = args
        width = sig.args[2].dtype.width
        for i in range(len(sig.args[2])):
            to = address_of(builder, into, builder.add(at, I64(i * width)), width)
            builder.store(builder.extract_value(rows, i), to, align=4)
        return context.get_dummy_value()

    return signature, codegen


def _reversed(number, count):
    """The number with the bits of [0, count) in reverse."""
    return int(format(number, "b").zfill(count.bit_length() - 1)[::-1], 2) if count > 1 else 0


def _tree(builder, rows, block=1):
    """The sums of sixteen vectors, depth first, so that few of them exist at a time.

    The e-th vector's sum ends in lane `_reversed(e, 16)`.
    """
    if block == LANES:
        return next(rows)
    first = _tree(builder, rows, 2 * block)
    return interleaved(builder, first, _tree(builder, rows, 2 * block), block)


@intrinsic
def add_gradients(typingctx, grads, x, d_x, base, weight, w, step, index, row, into, to):
    """What `16 // T` consecutive inputs of T labels with one index row get from `grads [T]`.

    For each input: `d_x[its row] += sum_t weight[t] * grads[t]`, in one load and store, and
    `into[to + t * step + input] += (its row of x) . grads[t]`. Sixteen dot products are added up
    in one tree: label after label, each its inputs, hence the reversed order of both.
    """
    offset = types.intp
    signature = types.void(
        *(grads, FLOATS, FLOATS, offset, FLOATS, offset, offset, index, offset, FLOATS, offset)
    )

    def codegen(context, builder, sig, args):
        grads, x, d_x, base, weight, w, step, index, row, into, to = args
        num_labels, width = len(sig.args[0]), sig.args[0].dtype.width
        grads = [builder.extract_value(grads, t) for t in range(num_labels)]
        count = LANES // num_labels

        def products(order):
            for number in order:
                i = I64(number)
                at = _row(builder, sig.args[7], index, builder.add(row, i), base, width)
                change = address_of(builder, d_x, at, width)
                of_input = builder.load(change, align=4)
                position = builder.add(w, i)
                for t in range(num_labels):
                    scale = _broadcast(builder, weight, position, width)
                    of_input = call(builder, "fmuladd", [scale, grads[t], of_input])
                    position = builder.add(position, step)
                builder.store(of_input, change, align=4)
                inputs = builder.load(address_of(builder, x, at, width), align=4)
                for t in range(num_labels):
                    yield _dot_lanes(builder, inputs, grads[t])

        order = [_reversed(entered, count) for entered in range(count)]
        if num_labels == 1:  # registers for all, so that rows of x are met as they lie in memory
            lanes = list(products(range(count)))
            rows = iter([lanes[number] for number in order])
        else:
            rows = products(order)
        sums = _tree(builder, rows)
        for t in range(num_labels):
            part = slice_of(builder, sums, _reversed(t, num_labels) * count, count)
            place = address_of(builder, into, to, count)
            builder.store(builder.fadd(part, builder.load(place, align=4)), place, align=4)
            to = builder.add(to, step)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_gradient(typingctx, grads, x, d_x, base, weight, w, step, index, row, into, to):
    """As `add_gradients`, for one input."""
    offset = types.intp
    signature = types.void(
        *(grads, FLOATS, FLOATS, offset, FLOATS, offset, offset, index, offset, FLOATS, offset)
    )

    def codegen(context, builder, sig, args):
        grads, x, d_x, base, weight, w, step, index, row, into, to = args
        width = sig.args[0].dtype.width
        at = _row(builder, sig.args[7], index, row, base, width)
        change = address_of(builder, d_x, at, width)
        of_input = builder.load(change, align=4)
        inputs = builder.load(address_of(builder, x, at, width), align=4)
        for t in range(len(sig.args[0])):
            g = builder.extract_value(grads, t)
            of_input = call(
                builder, "fmuladd", [_broadcast(builder, weight, w, width), g, of_input]
            )
            place = builder.gep(into, [to])
            dot = sum_of(builder, _dot_lanes(builder, inputs, g))
            builder.store(builder.fadd(builder.load(place), dot), place)
            w, to = builder.add(w, step), builder.add(to, step)
        builder.store(of_input, change, align=4)
        return context.get_dummy_value()

    return signature, codegen


def _dot_lanes(builder, a, b):
    """Sixteen partial sums of the dot product of two vectors."""
    parts = [
        (slice_of(builder, a, i, LANES), slice_of(builder, b, i, LANES))
        for i in range(0, a.type.count, LANES)
    ]
    lanes = builder.fmul(*parts[0])
    for x, y in parts[1:]:
        lanes = call(builder, "fmuladd", [x, y, lanes])
    return lanes
