"""Vectors of float32 as values in numba code, so that accumulators live in registers.

numba has scalars and arrays; a loop over an array slice keeps its accumulators in memory. The
`Vector` type here is an LLVM vector `<width x float>`: LLVM promotes it to registers and cuts it
into whatever the machine has (four zmm for width 64 with AVX-512, eight ymm with AVX2), so nothing
here names an instruction set. Multiply-adds are `llvm.fmuladd`: fused where the machine can.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic, models, register_model

F32 = ir.FloatType()
I32 = ir.IntType(32)
LANES = 16
FLOATS = types.CPointer(types.float32)


class Vector(types.Type):
    """`width` float32 numbers."""

    def __init__(self, width):
        super().__init__(name=f"Vector({width})")
        self.width = width


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(F32, fe_type.width))


def _constant(width, value, element=F32):
    return ir.Constant(ir.VectorType(element, width), [value] * width)


def call(builder, name, operands):
    """Call an LLVM intrinsic overloaded on its (vector) type."""
    kind = operands[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    fn_type = ir.FunctionType(kind, [kind] * len(operands))
    fn = get_or_insert_function(builder.module, fn_type, f"llvm.{name}.{suffix}")
    return builder.call(fn, operands)


def address_of(builder, pointer, offset, width=LANES):
    """Address of the `width` numbers from `offset` on."""
    kind = ir.VectorType(F32, width).as_pointer()
    return builder.bitcast(builder.gep(pointer, [offset]), kind)


def _codegen(emit):
    return lambda context, builder, sig, args: emit(builder, *args)


@intrinsic
def pointer(typingctx, array):
    """The address of a contiguous array's first number, which can be indexed like the array.

    Without wrap-around and reference counting, either of which costs an inner loop dearly. Keep
    the array alive.
    """
    signature = types.CPointer(array.dtype)(array)

    def codegen(context, builder, sig, args):
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return signature, codegen


@intrinsic
def at_address(typingctx, kind, address):
    """A pointer to numbers of a kind (np.float32, ...) from an address; 0 makes a null pointer."""
    signature = types.CPointer(kind.instance_type)(kind, types.int64)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[1], context.get_value_type(sig.return_type))

    return signature, codegen


@intrinsic
def advance(typingctx, pointer, count):
    """The pointer to what lies `count` numbers further on."""
    signature = pointer(pointer, types.intp)
    return signature, _codegen(lambda b, start, count: b.gep(start, [count]))


@intrinsic
def bits_of(typingctx, pointer):
    """The pointer to float32 numbers as one to their bits, uint32."""
    return types.CPointer(types.uint32)(FLOATS), _codegen(
        lambda b, start: b.bitcast(start, I32.as_pointer())
    )


@intrinsic
def next_share(typingctx, arguments):
    """The number of a share nobody else has: reads and raises the record's first field, at once."""
    signature = types.int64(arguments)

    def codegen(context, builder, sig, args):
        counter = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return signature, codegen


def splatted(builder, width, value):
    """A vector of the same number."""
    kind = ir.VectorType(value.type, width)
    undefined = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(undefined, value, I32(0))
    return builder.shuffle_vector(one, undefined, _constant(width, 0, I32))


def slice_of(builder, vector, start, count):
    """`vector[start : start + count]`."""
    mask = ir.Constant(ir.VectorType(I32, count), list(range(start, start + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


@intrinsic
def load(typingctx, like, source, offset):
    """`source[offset : offset + width]` of a pointer, as wide as the vector `like`."""
    signature = like(like, FLOATS, types.intp)

    def codegen(context, builder, sig, args):
        return builder.load(address_of(builder, args[1], args[2], sig.return_type.width), align=4)

    return signature, codegen


@intrinsic
def store(typingctx, into, offset, vector):
    """`into[offset : offset + width] = vector` of a pointer."""
    signature = types.void(FLOATS, types.intp, vector)

    def codegen(context, builder, sig, args):
        builder.store(args[2], address_of(builder, args[0], args[1], sig.args[2].width), align=4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def splat(typingctx, width, value):
    """A vector of `width` (a compile-time constant) times the same float32."""
    signature = Vector(width.literal_value)(width, types.float32)

    def codegen(context, builder, sig, args):
        return splatted(builder, sig.return_type.width, args[1])

    return signature, codegen


@intrinsic
def fill(typingctx, like, value):
    """A vector as wide as `like`, of the same float32."""
    signature = like(like, types.float32)

    def codegen(context, builder, sig, args):
        return splatted(builder, sig.return_type.width, args[1])

    return signature, codegen


@intrinsic
def horner(typingctx, x, coefficients):
    """The polynomial of x with a tuple of float32 coefficients, the constant first."""
    signature = x(x, coefficients)

    def codegen(context, builder, sig, args):
        x, packed = args
        rest = [
            splatted(builder, x.type.count, builder.extract_value(packed, i))
            for i in range(len(sig.args[1]))
        ]
        total = rest.pop()
        while rest:
            total = call(builder, "fmuladd", [total, x, rest.pop()])
        return total

    return signature, codegen


def _binary(name, emit):
    """An intrinsic of two vectors of one width; `emit(builder, a, b)` returns a vector."""

    def typer(typingctx, a, b):
        return a(a, b), _codegen(emit)

    typer.__name__ = typer.__qualname__ = name
    return intrinsic(typer)


def _ternary(name, emit):
    """An intrinsic of three vectors of one width; `emit(builder, a, b, c)` returns a vector."""

    def typer(typingctx, a, b, c):
        return a(a, b, c), _codegen(emit)

    typer.__name__ = typer.__qualname__ = name
    return intrinsic(typer)


add = _binary("add", lambda b, x, y: b.fadd(x, y))
sub = _binary("sub", lambda b, x, y: b.fsub(x, y))
mul = _binary("mul", lambda b, x, y: b.fmul(x, y))
div = _binary("div", lambda b, x, y: b.fdiv(x, y))
maximum = _binary("maximum", lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
fma = _ternary("fma", lambda b, x, y, z: call(b, "fmuladd", [x, y, z]))


@intrinsic
def negative_abs(typingctx, a):
    """`-|a|`."""
    return a(a), _codegen(lambda b, x: b.fneg(call(b, "fabs", [x])))


def _scale_by_power(builder, vector, shifted):
    """`vector * 2^n` by adding n to the exponent bits, where `shifted = n + 1.5 * 2^23`."""
    ints = ir.VectorType(I32, vector.type.count)
    power = builder.shl(builder.bitcast(shifted, ints), _constant(ints.count, 23, I32))
    return builder.bitcast(builder.add(builder.bitcast(vector, ints), power), vector.type)


scale_by_power = _binary("scale_by_power", _scale_by_power)


@intrinsic
def inverse_power(typingctx, a):
    """`2^-n` and `n` as floats, where 2^n <= a < 2^(n + 1), of normal numbers a < 2^127."""

    def codegen(context, builder, sig, args):
        (a,) = args
        ints = ir.VectorType(I32, a.type.count)
        exponent = builder.and_(builder.bitcast(a, ints), _constant(ints.count, 0x7F800000, I32))
        inverse = builder.sub(_constant(ints.count, 254 << 23, I32), exponent)
        biased = builder.lshr(exponent, _constant(ints.count, 23, I32))
        number = builder.sub(biased, _constant(ints.count, 127, I32))
        results = [builder.bitcast(inverse, a.type), builder.sitofp(number, a.type)]
        return context.make_tuple(builder, sig.return_type, results)

    return types.UniTuple(a, 2)(a), codegen


select_negative = _ternary(
    "select_negative",
    lambda b, s, x, y: b.select(b.fcmp_ordered("<", s, _constant(s.type.count, 0.0)), x, y),
)


@intrinsic
def greater(typingctx, a, b):
    """Bit i of the uint64 result says whether `a[i] > b[i]`."""

    def codegen(context, builder, sig, args):
        width = sig.args[0].width
        bits = builder.bitcast(builder.fcmp_ordered(">", *args), ir.IntType(width))
        return bits if width == 64 else builder.zext(bits, ir.IntType(64))

    return types.uint64(a, b), codegen


def sum_of(builder, vector):
    """The sum of a vector's numbers, as a tree."""
    while vector.type.count > 1:
        half = vector.type.count // 2
        vector = builder.fadd(
            slice_of(builder, vector, 0, half), slice_of(builder, vector, half, half)
        )
    return builder.extract_element(vector, I32(0))


@intrinsic
def hsum(typingctx, a):
    """Sum of the numbers of a vector, as a tree."""
    return types.float32(a), _codegen(sum_of)


@intrinsic
def hmax(typingctx, a):
    """The largest of a vector's numbers."""

    def codegen(context, builder, sig, args):
        (vector,) = args
        while vector.type.count > 1:
            half = vector.type.count // 2
            low, high = (slice_of(builder, vector, start, half) for start in (0, half))
            vector = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        return builder.extract_element(vector, I32(0))

    return types.float32(a), codegen


def interleaved(builder, a, b, block):
    """The halves of blocks of `2 * block` lanes added up: of a and b in turn."""
    low, high = [], []
    for start in range(0, LANES, 2 * block):
        for vector in (0, LANES):
            low += range(vector + start, vector + start + block)
            high += range(vector + start + block, vector + start + 2 * block)
    masks = [ir.Constant(ir.VectorType(I32, LANES), lanes) for lanes in (low, high)]
    return builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks))


@intrinsic
def transpose_block(typingctx, source, at, step, into, to, to_step):
    """`into[to + c * to_step + r] = source[at + r * step + c]` for 16 rows and 16 columns."""
    signature = types.void(FLOATS, types.intp, types.intp, FLOATS, types.intp, types.intp)

    def codegen(context, builder, sig, args):
        source, at, step, into, to, to_step = args

        def address(data, base, stride, i):
            offset = builder.add(base, builder.mul(stride, ir.Constant(base.type, i)))
            return address_of(builder, data, offset)

        rows = [builder.load(address(source, at, step, i), align=4) for i in range(LANES)]
        # Exchange off-diagonal quarters of ever smaller blocks.
        for block in (8, 4, 2, 1):
            from_low = [i if i & block == 0 else LANES + i - block for i in range(LANES)]
            from_high = [i + block if i & block == 0 else LANES + i for i in range(LANES)]
            masks = [ir.Constant(ir.VectorType(I32, LANES), m) for m in (from_low, from_high)]
            for i in range(LANES):
                if i & block == 0:
                    a, b = rows[i], rows[i + block]
                    rows[i], rows[i + block] = (builder.shuffle_vector(a, b, m) for m in masks)
        for i, row in enumerate(rows):
            builder.store(row, address(into, to, to_step, i), align=4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def width_of(typingctx, vector):
    """The number of floats in a vector, a constant to the compiler."""

    def codegen(context, builder, sig, args):
        return ir.Constant(context.get_value_type(types.intp), sig.args[0].width)

    return types.intp(vector), codegen
