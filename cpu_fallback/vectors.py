"""Short vectors of LLVM's IR with Python's operators, and the block of a decode function made of them.

Everything is generic IR, which LLVM lowers for any CPU. x86 instructions are asked for by name in two places only,
`multiply_pairs` and `multiply_bytes`: LLVM does not find those by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_BITS = {I8: 8, I16: 16, F16: 16, I32: 32, F32: 32, I64: 64}


def _type(element: ir.Type, count: int) -> ir.Type:
    return ir.VectorType(element, count) if count > 1 else element


class Vector:
    """A value of `count` lanes while code is emitted. Integers are shifted and converted by their `signed`."""

    def __init__(self, emitter: Emitter, value: ir.Value, signed: bool = False) -> None:
        self.emitter, self.value, self.signed = emitter, value, signed
        self.halves: Vector | None = None  # the 16-bit floats it came from
        self.place: ir.Value | None = None  # where in memory its lanes lie as they are

    @property
    def count(self) -> int:
        """Lanes; a scalar has one."""
        return self.value.type.count if isinstance(self.value.type, ir.VectorType) else 1

    @property
    def element(self) -> ir.Type:
        """The type of one lane."""
        return self.value.type.element if isinstance(self.value.type, ir.VectorType) else self.value.type

    def make(self, value: ir.Value, signed: bool | None = None) -> Vector:
        """A result in self's place; of its signedness, unless told."""
        return Vector(self.emitter, value, self.signed if signed is None else signed)

    def lanes(self, numbers: Sequence[int], other: Vector | None = None) -> Vector:
        """The lanes asked for, numbered through self and then `other` (of the same count)."""
        if len(numbers) == 1 and self.count == 1:
            return self
        first, second = (self.emitter.as_vector(v.value) if v else None for v in (self, other))
        second = second or ir.Constant(first.type, ir.Undefined)
        mask = ir.Constant(ir.VectorType(I32, len(numbers)), list(numbers))
        return self.make(self.emitter.builder.shuffle_vector(first, second, mask))

    def widen(self, count: int) -> Vector:
        """Self in `count` lanes, where it has one."""
        return self if self.count == count else self.lanes([0] * count)

    def bitcast(self, element: ir.Type) -> Vector:
        """The same bits as lanes of another type."""
        count = self.count * _BITS[self.element] // _BITS[element]
        return self.make(self.emitter.builder.bitcast(self.value, _type(element, count)))

    def integer(self, element: ir.IntType) -> Vector:
        """Integers in wider lanes."""
        extend = self.emitter.builder.sext if self.signed else self.emitter.builder.zext
        return self.make(extend(self.value, _type(element, self.count)))

    def as_signed(self) -> Vector:
        """The same bits read as signed integers."""
        return self.make(self.value, signed=True)

    def float(self) -> Vector:
        """Integers as float32; float32 as it is."""
        if self.element == F32:
            return self
        convert = self.emitter.builder.sitofp if self.signed else self.emitter.builder.uitofp
        return self.make(convert(self.value, _type(F32, self.count)))

    def truncate(self, element: ir.IntType) -> Vector:
        """Integers in narrower lanes, which must be able to hold them."""
        return self.make(self.emitter.builder.trunc(self.value, _type(element, self.count)))

    def _binary(self, other: Vector | float, integer: str, floating: str = "") -> Vector:
        if not isinstance(other, Vector):
            other = self.make(self.emitter.constant(self.element, other))
        count = max(self.count, other.count)
        operation = getattr(self.emitter.builder, floating if self.element == F32 else integer)
        return self.make(operation(self.widen(count).value, other.widen(count).value))

    def __and__(self, other: Vector | int) -> Vector:
        return self._binary(other, "and_")

    def __or__(self, other: Vector | int) -> Vector:
        return self._binary(other, "or_")

    def __xor__(self, other: Vector | int) -> Vector:
        return self._binary(other, "xor")

    def __lshift__(self, other: Vector | int) -> Vector:
        return self._binary(other, "shl")

    def __rshift__(self, other: Vector | int) -> Vector:
        return self._binary(other, "ashr" if self.signed else "lshr")

    def __add__(self, other: Vector | float) -> Vector:
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Vector | float) -> Vector:
        return self._binary(other, "sub", "fsub")

    def __mul__(self, other: Vector | float) -> Vector:
        return self._binary(other, "mul", "fmul")

    def __truediv__(self, other: Vector | float) -> Vector:
        return self._binary(other, "", "fdiv")

    def __neg__(self) -> Vector:
        if self.halves:  # turned before they are converted, which happens in one go
            return self.emitter.from_half(self.halves ^ 0x8000)
        return self.make(self.emitter.builder.fneg(self.value))

    def _compare(self, operator: str, other: Vector | float) -> Vector:
        if not isinstance(other, Vector):
            other = self.make(self.emitter.constant(self.element, other))
        builder = self.emitter.builder
        integers = builder.icmp_signed if self.signed else builder.icmp_unsigned
        return self.make((builder.fcmp_ordered if self.element == F32 else integers)(operator, self.value, other.value))

    def __lt__(self, other: Vector | float) -> Vector:
        return self._compare("<", other)

    def __gt__(self, other: Vector | float) -> Vector:
        return self._compare(">", other)


def widest(features: str) -> int:
    """Lanes of 32 bits in the widest vectors of a CPU with these features, or 8 where all are narrower."""
    return 16 if "+avx512bw" in features else 8


class Emitter:
    """Emits code at a builder's place for a CPU with these features (LLVM's names, such as "+avx2")."""

    def __init__(self, builder: ir.IRBuilder, triple: str, features: str) -> None:
        self.builder = builder
        self.avx2, self.lanes = "+avx2" in features, widest(features)
        self._dot_bytes = "+avxvnni" in features.split(",") or {"+avx512vnni", "+avx512vl"} <= set(features.split(","))
        self._native_half = "+f16c" in features or not triple.startswith(("x86_64", "i686"))
        self._tables: dict[int, ir.GlobalVariable] = {}

    def constant(self, element: ir.Type, number: float, count: int = 1) -> ir.Constant:
        """The same number in every lane."""
        return ir.Constant(_type(element, count), [number] * count if count > 1 else number)

    def number(self, number: float, count: int = 1) -> Vector:
        """The same float32 number in every lane."""
        return Vector(self, self.constant(F32, number, count))

    def zeros(self, element: ir.Type, count: int) -> Vector:
        """Zero in every lane."""
        return Vector(self, self.constant(element, 0, count))

    def least(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller of two signed integers."""
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def as_vector(self, value: ir.Value) -> ir.Value:
        """A scalar as a vector of one lane, which shuffles take."""
        if isinstance(value.type, ir.VectorType):
            return value
        undefined = ir.Constant(ir.VectorType(value.type, 1), ir.Undefined)
        return self.builder.insert_element(undefined, value, I32(0))

    def call(self, name: str, result: ir.Type, *arguments: ir.Value, **options: object) -> ir.Value:
        """A call of LLVM's intrinsic of that full name."""
        function_type = ir.FunctionType(result, [a.type for a in arguments])
        return self.builder.call(self.builder.module.declare_intrinsic(name, fnty=function_type), arguments, **options)

    @contextmanager
    def loop(self, start: ir.Value, stop: ir.Value) -> Iterator[ir.Value]:
        """The body is repeated for start <= index < stop."""
        with cgutils.for_range_slice(self.builder, start, stop, I64(1), I64) as (index, _):
            yield index

    # Memory

    def at(self, base: ir.Value, index: ir.Value, itemsize: int) -> ir.Value:
        """The address of an array's element; base is an address as an integer."""
        return self.move(self.builder.inttoptr(base, I8.as_pointer()), self.builder.mul(index, I64(itemsize)))

    def move(self, pointer: ir.Value, count: ir.Value | int) -> ir.Value:
        """The address `count` bytes further."""
        return self.builder.gep(pointer, [I64(count) if isinstance(count, int) else count])

    def load(self, pointer: ir.Value, element: ir.Type, count: int = 1, signed: bool = False) -> Vector:
        """Lanes from any address."""
        value = self.builder.load(self.builder.bitcast(pointer, _type(element, count).as_pointer()))
        value.align = 1
        vector = Vector(self, value, signed)
        vector.place = pointer
        return vector

    def look_up(self, table: np.ndarray, indices: Vector) -> Vector:
        """The entries of a constant table, one after the other: numbers, or rows of 4 or 8 bytes."""
        size, element = table.nbytes // len(table), F32 if table.dtype == np.float32 else I8
        if len(table) == 16 and size == 1:
            return self._look_up_bytes(table, indices)
        if id(table) not in self._tables:
            data = ir.Constant(ir.ArrayType(I8, table.nbytes), bytearray(table.tobytes()))
            name = self.builder.module.get_unique_name("table")
            self._tables[id(table)] = cgutils.global_constant(self.builder.module, name, data)
        start = self.builder.bitcast(self._tables[id(table)], I8.as_pointer())
        whole = ir.IntType(8 * size)
        entries = ir.Constant(ir.VectorType(whole, indices.count), ir.Undefined)
        for i, index in enumerate(self._scalars(indices)):
            pointer = self.move(start, self.builder.mul(index, I64(size)))
            entries = self.builder.insert_element(entries, self.load(pointer, whole).value, I32(i))
        return Vector(self, self.builder.bitcast(entries, _type(element, table.size // len(table) * indices.count)))

    def _scalars(self, vector: Vector) -> list[ir.Value]:
        """Lanes as addresses count, from memory if they lie there: it takes less than to move them from a vector."""
        if vector.count == 1:
            return [vector.integer(I64).value]
        if vector.place is None:
            wide = vector.integer(I64).value
            return [self.builder.extract_element(wide, I32(i)) for i in range(vector.count)]
        places = (self.move(vector.place, _BITS[vector.element] // 8 * i) for i in range(vector.count))
        return [self.load(place, vector.element).integer(I64).value for place in places]

    def _look_up_bytes(self, table: np.ndarray, indices: Vector) -> Vector:
        """Bytes of a table of 16 at indices of 4 bits."""
        if self.avx2 and indices.count == 32:
            twice = ir.Constant(ir.VectorType(I8, 32), [int(byte) for byte in table] * 2)
            return indices.make(self.call("llvm.x86.avx2.pshuf.b", indices.value.type, twice, indices.value))
        left = [indices.make(self.constant(I8, int(byte), indices.count)) for byte in table]
        for bit in range(4):  # each bit of the index chooses among half as many
            chosen = ((indices >> bit) & 1) * 255
            left = [a ^ ((a ^ b) & chosen) for a, b in zip(left[::2], left[1::2], strict=True)]
        return left[0]

    def store(self, vector: Vector, pointer: ir.Value) -> None:
        """Lanes to any address."""
        target = self.builder.bitcast(pointer, vector.value.type.as_pointer())
        self.builder.store(vector.value, target).align = 1

    def prefetch(self, pointer: ir.Value) -> None:
        """Start to bring a cache line close; any address will do."""
        arguments = [pointer, *(I32(flag) for flag in (0, 3, 1))]  # to read, to keep, data
        function_type = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], function_type)
        self.builder.call(function, arguments)

    def buffer(self, size: int) -> ir.Value:
        """So many bytes on the stack, at the start of a cache line."""
        place = cgutils.alloca_once(self.builder, I8, size=I32(size))
        place.align = 64
        return place

    def variable(self, initial: Vector) -> ir.Value:
        """Where a value lives that changes in loops: a register in the end."""
        place = cgutils.alloca_once(self.builder, initial.value.type)
        self.builder.store(initial.value, place)
        return place

    # Arithmetic

    def concat(self, *vectors: Vector) -> Vector:
        """One after the other: 1, 2, 4, 8 ... vectors of one count."""
        if len(vectors) == 1:
            return vectors[0]
        if all(vector.halves for vector in vectors):
            return self.from_half(self.concat(*(vector.halves for vector in vectors)))  # converted in one go
        half = len(vectors) // 2
        first, second = self.concat(*vectors[:half]), self.concat(*vectors[half:])
        return first.lanes(range(2 * first.count), second)

    def multiply_add(self, a: Vector, b: Vector, c: Vector) -> Vector:
        """a * b + c, fused where the CPU has that."""
        kind = f"v{c.count}f32" if c.count > 1 else "f32"
        operands = a.widen(c.count).value, b.widen(c.count).value, c.value
        return c.make(self.call(f"llvm.fmuladd.{kind}", c.value.type, *operands))

    def sum(self, vector: Vector) -> Vector:
        """The sum of 32-bit lanes, in whatever order is fastest."""
        if vector.element == I32:
            return vector.make(self.call(f"llvm.vector.reduce.add.v{vector.count}i32", I32, vector.value))
        name, zero = f"llvm.vector.reduce.fadd.v{vector.count}f32", self.constant(F32, 0.0)
        return vector.make(self.call(name, F32, zero, vector.value, fastmath=("reassoc",)))

    def select(self, condition: Vector, a: Vector, b: Vector) -> Vector:
        """a where the condition holds, else b."""
        count = max(a.count, b.count)
        return a.make(self.builder.select(condition.value, a.widen(count).value, b.widen(count).value))

    def maximum(self, a: Vector, b: Vector) -> Vector:
        """The larger of two integers, lane by lane."""
        return self.select(a > b, a, b)

    def largest(self, vector: Vector) -> Vector:
        """The largest of unsigned 32-bit lanes."""
        return vector.make(self.call(f"llvm.vector.reduce.umax.v{vector.count}i32", I32, vector.value))

    def round(self, vector: Vector) -> Vector:
        """float32 to the nearest integers of 32 bits, ties to even."""
        kind = f"v{vector.count}f32" if vector.count > 1 else "f32"
        nearest = self.call(f"llvm.rint.{kind}", vector.value.type, vector.value)
        return Vector(self, self.builder.fptosi(nearest, _type(I32, vector.count)), signed=True)

    def from_half(self, halves: Vector) -> Vector:
        """16-bit IEEE halves (as integers) -> float32."""
        if self._native_half:
            number = halves.make(self.builder.fpext(halves.bitcast(F16).value, _type(F32, halves.count)))
            number.halves = halves
            return number
        # The exponent's bias is 112 less. Infinity and NaN keep their full exponent: 31 << 23 becomes 255 << 23.
        bits = halves.integer(I32)
        magnitude = (bits & 0x7FFF) << 13
        special = self.builder.icmp_unsigned(">=", magnitude.value, self.constant(I32, 0x0F800000, halves.count))
        scaled = magnitude.bitcast(F32) * 2.0**112
        filled = (magnitude | 0x7F800000).bitcast(F32)
        number = halves.make(self.builder.select(special, filled.value, scaled.value))
        return (number.bitcast(I32) | ((bits & 0x8000) << 16)).bitcast(F32)

    def multiply_pairs(self, a: Vector, b: Vector) -> Vector:
        """Signed words -> half as many sums of 2 products, of neighbours."""
        count = a.count // 2
        if name := {8: self.avx2 and "avx2.pmadd.wd", 16: self.lanes == 16 and "avx512.pmaddw.d.512"}.get(count):
            return Vector(self, self.call(f"llvm.x86.{name}", _type(I32, count), a.value, b.value), signed=True)
        a, b = (words.as_signed().integer(I32) for words in (a, b))
        products = a * b
        return products.lanes(range(0, 2 * count, 2)) + products.lanes(range(1, 2 * count, 2))

    def transpose(self, vectors: list[Vector]) -> list[Vector]:
        """As many vectors of the same lanes, which hold the first lanes of all, then the second ones, and so on."""
        half, count = len(vectors) // 2, vectors[0].count
        order = [lane for i in range(count) for lane in (i, count + i)]
        for _ in range(half.bit_length()):
            pairs = zip(vectors[:half], vectors[half:], strict=True)
            vectors = [a.lanes(part, b) for a, b in pairs for part in (order[:count], order[count:])]
        return vectors

    def multiply_bytes(self, a: Vector, b: Vector) -> Vector:
        """32 bytes each (a signed, or below 128; b signed, not -128) -> 8 sums of 4 products, from words as above."""
        if not self.avx2:
            pairs = zip(even_odd(a), even_odd(b), strict=True)
            first, second = (self.multiply_pairs(*pair) for pair in pairs)
            return first + second
        if a.signed:  # the instruction multiplies unsigned by signed: |a| by b with a's sign
            b = b.make(self.call("llvm.x86.avx2.psign.b", b.value.type, b.value, a.value))
            a = a.make(self.call("llvm.abs.v32i8", a.value.type, a.value, self.constant(ir.IntType(1), 0)))
        if self._dot_bytes:
            operands = (vector.bitcast(I32).value for vector in (self.zeros(I32, 8), a, b))
            return Vector(self, self.call("llvm.x86.avx512.vpdpbusd.256", _type(I32, 8), *operands), signed=True)
        sums = Vector(self, self.call("llvm.x86.avx2.pmadd.ub.sw", _type(I16, 16), a.value, b.value))
        return self.multiply_pairs(sums, Vector(self, self.constant(I16, 1, 16)))


def even_odd(quants: Vector) -> tuple[Vector, Vector]:
    """32 bytes -> the even ones and the odd ones, each as 16 words."""
    words = quants.bitcast(I16)
    return (words << 8) >> 8, words >> 8


def words(quants: Vector) -> list[Vector]:
    """32 bytes as words: all in one vector where the CPU has so wide ones, else the even ones and the odd ones."""
    return [quants.integer(I16)] if quants.emitter.lanes == 16 else list(even_odd(quants))


class LlvmBlock:
    """The vectors of a decode function (see `decode`) for the block at a pointer."""

    def __init__(self, emitter: Emitter, pointer: ir.Value) -> None:
        self._emitter, self._pointer = emitter, pointer

    def _load(self, offset: int, element: ir.Type, count: int, signed: bool = False) -> Vector:
        return self._emitter.load(self._emitter.move(self._pointer, offset), element, count, signed)

    def u8(self, offset: int, count: int = 1) -> Vector:
        """Unsigned bytes."""
        return self._load(offset, I8, count)

    def i8(self, offset: int, count: int = 1) -> Vector:
        """Signed bytes."""
        return self._load(offset, I8, count, signed=True)

    def u16(self, offset: int, count: int = 1) -> Vector:
        """Unsigned numbers of 16 bits."""
        return self._load(offset, I16, count)

    def u32(self, offset: int, count: int = 1) -> Vector:
        """Unsigned numbers of 32 bits."""
        return self._load(offset, I32, count)

    def f16(self, offset: int, count: int = 1) -> Vector:
        """IEEE halves, as float32."""
        return self.half(self.u16(offset, count))

    def bf16(self, offset: int, count: int = 1) -> Vector:
        """The upper halves of float32 numbers, as float32."""
        return (self._load(offset, I16, count).integer(I32) << 16).bitcast(F32)

    def f32(self, offset: int, count: int = 1) -> Vector:
        """float32 numbers."""
        return self._load(offset, F32, count)

    def f64(self, offset: int, count: int = 1) -> Vector:
        """float64 numbers, as float32."""
        numbers = self._load(offset, F64, count)
        return numbers.make(self._emitter.builder.fptrunc(numbers.value, _type(F32, count)))

    def float(self, vector: Vector) -> Vector:
        """The same numbers as float32."""
        return vector.float()

    def half(self, vector: Vector) -> Vector:
        """16 bits each, read as IEEE halves, as float32."""
        return self._emitter.from_half(vector)

    def narrow(self, vector: Vector) -> Vector:
        """Numbers below 256 as unsigned bytes."""
        return vector.truncate(I8)

    def part(self, vector: Vector, start: int, count: int) -> Vector:
        """The lanes from `start` on."""
        return vector.lanes(range(start, start + count))

    def wide(self, vector: Vector) -> Vector:
        """Unsigned bytes as numbers of 16 bits."""
        return vector.integer(I16)

    def signed(self, vector: Vector) -> Vector:
        """Unsigned bytes read as signed ones."""
        return vector.as_signed()

    def masks(self, vector: Vector) -> Vector:
        """One byte for each bit of unsigned bytes, from the lowest up: 255 where it is set, else 0."""
        emitter, count = self._emitter, 8 * vector.count
        bits = emitter.builder.bitcast(vector.value, ir.VectorType(ir.IntType(1), count))
        return vector.make(emitter.builder.sext(bits, ir.VectorType(I8, count)))

    def look_up(self, table: np.ndarray, indices: Vector) -> Vector:
        """The entries of a table (n,) or (n, length), uint8 or float32, one after the other."""
        return self._emitter.look_up(table, indices)

    def concat(self, *vectors: Vector) -> Vector:
        """One after the other."""
        return self._emitter.concat(*vectors)

    def interleave(self, *vectors: Vector) -> Vector:
        """The first of each, then the second of each, and so on."""
        count = vectors[0].count
        order = [vector * count + lane for lane in range(count) for vector in range(len(vectors))]
        return self._emitter.concat(*vectors).lanes(order)
