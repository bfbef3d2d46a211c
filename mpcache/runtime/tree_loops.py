"""Compile key trees (`mpcache.protocols.dcf`) with the CPU's own AES: numba on x86-64 with AES-NI.

The same trees to the bit, forty times faster than a call of a library for each level of a few trees: the
levels of a tree wait for each other, so a small batch pays for calls alone. No branch and no index depends on
what is secret.
The import fails where a machine cannot; there the trees grow over `cryptography`.
"""

# numba's functions have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, call-arg, var-annotated"

from __future__ import annotations

import platform

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba import types, uint8, uint64, void
from numba.extending import intrinsic

from mpcache.runtime.loops import compile_loop

if platform.machine().lower() not in ("x86_64", "amd64") or not binding.get_host_cpu_features().get("aes"):
    raise ImportError("no AES instructions that this module knows")

_ROUNDS = 10
_LEFT, _RIGHT, _VALUE, _LEAF, _WINDOW = (np.uint64(c) for c in range(5))
_0, _1, _8, _32, _63, _64 = (np.uint64(c) for c in (0, 1, 8, 32, 63, 64))

Words = npt.NDArray[np.uint64]


def _sbox() -> bytes:
    """Return AES's table: inverses in GF(2^8), by powers of 3, and a public affine map (FIPS 197, 5.1.1)."""
    powers = [1]
    for _ in range(254):
        x = powers[-1]
        double = x << 1 ^ (0x11B if x & 0x80 else 0)
        powers.append(x ^ double)
    inverse = {0: 0} | {x: powers[-i % 255] for i, x in enumerate(powers)}
    table = []
    for x in range(256):
        y = inverse[x] * 0x101
        table.append((y ^ y >> 4 ^ y >> 5 ^ y >> 6 ^ y >> 7) & 0xFF ^ 0x63)
    return bytes(table)


def round_keys(key: bytes) -> Words:
    """Expand a public key of 16 bytes into the keys of all rounds (FIPS 197, 5.2): (22,) words."""
    sbox, words, constant = _sbox(), [key[i : i + 4] for i in range(0, 16, 4)], 1
    for i in range(4, 4 * (_ROUNDS + 1)):
        last = words[-1]
        if i % 4 == 0:
            last = bytes(sbox[b] for b in last[1:] + last[:1])
            last = bytes([last[0] ^ constant]) + last[1:]
            constant = constant << 1 ^ (0x11B if constant & 0x80 else 0)
        words.append(bytes(a ^ b for a, b in zip(words[i - 4], last, strict=True)))
    return np.frombuffer(b"".join(words), dtype=np.uint64).copy()


@intrinsic
def _encrypt(typing_context, low, high, keys):
    """Encrypt one block, two words, under expanded keys, with the CPU's instructions."""

    def generate_code(context, builder, signature, arguments):
        low, high, keys = arguments
        block, index = ir.VectorType(ir.IntType(64), 2), ir.IntType(32)
        data = context.make_array(signature.args[2])(context, builder, keys).data
        first = builder.bitcast(data, block.as_pointer())

        def key(i):
            return builder.load(builder.gep(first, [index(i)]), align=8)

        def instruction(name):
            known = builder.module.globals.get(name)
            return known or ir.Function(builder.module, ir.FunctionType(block, [block, block]), name)

        x = builder.insert_element(ir.Constant(block, ir.Undefined), low, index(0))
        x = builder.xor(builder.insert_element(x, high, index(1)), key(0))
        for i in range(1, _ROUNDS):
            x = builder.call(instruction("llvm.x86.aesni.aesenc"), [x, key(i)])
        x = builder.call(instruction("llvm.x86.aesni.aesenclast"), [x, key(_ROUNDS)])
        words = [builder.extract_element(x, index(i)) for i in (0, 1)]
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint64, 2)(types.uint64, types.uint64, keys), generate_code


@compile_loop()
def _grow(low, high, tweak, keys):
    """Compute AES(x) ^ x of x = (low, high) ^ tweak: the generator of the trees."""
    low, high = low ^ tweak, high ^ (tweak << _32)
    a, b = _encrypt(low, high, keys)
    return a ^ low, b ^ high


@compile_loop()
def _output(low, high, index, width, mask):
    """Take output `index` of a block, `width` bits each."""
    at = index * width
    upper = _0 - (at >> np.uint64(6))  # all ones for the second word
    return (((high & upper) | (low & ~upper)) >> (at & _63)) & mask


@compile_loop()
def _choose(bit, one, zero):
    """Choose `one` where bit is 1, without a branch."""
    return zero ^ ((one ^ zero) & (_0 - bit))


@compile_loop()
def _negate_if(bit, x):
    return (x ^ (_0 - bit)) + bit


_A1, _A2, _B2 = uint64[::1], uint64[:, ::1], uint8[:, ::1]


@compile_loop(void(*(uint64,) * 6, _A2, _A2, _B2, _A2, _A2, _A1, _A2, _A2))
def evaluate_trees(
    party, depth, start, levels, tail, width, seeds, words, bits, values, points, keys, window, below
):
    """Evaluate trees (n) at points (n, p) as `dcf.dcf_eval` does: window and below, (n, p), are written.

    width: of an output, in bits.  bits: (n, at least levels).  values: (n, outputs' correction words).
    """
    mask = ~_0 >> (_64 - width)
    last_value = values.shape[1] - 1
    for i in range(points.shape[0]):
        for p in range(points.shape[1]):
            path, t = points[i, p], party
            low, high = seeds[i, 0] & ~_1, seeds[i, 1]
            total, inside, column = _0, _0, 0
            for level in range(levels):
                if level == start and start > _0:
                    a, b = _grow(low, high, _WINDOW, keys)
                    inside = _output(a, b, _0, width, mask) + t * values[i, last_value]
                bit = (path >> (depth - _1 - np.uint64(level))) & _1
                next_low, next_high = _grow(low, high, bit, keys)
                if level >= start:
                    a, b = _grow(low, high, _VALUE, keys)
                    total += _output(a, b, bit, width, mask) + t * values[i, column]
                    column += 1
                control, all_t = next_low & _1, _0 - t
                low = (next_low ^ control) ^ (words[i, 2 * level] & all_t)
                high = next_high ^ (words[i, 2 * level + 1] & all_t)
                t = control ^ (t & ((np.uint64(bits[i, level]) >> bit) & _1))
            last = path & ((_1 << tail) - _1)
            a, b = _grow(low, high, _LEAF, keys)
            total += _output(a, b, last, width, mask) + t * values[i, column + np.int64(last)]
            below[i, p] = _negate_if(party, total) & mask
            window[i, p] = _negate_if(party, inside) & mask


@compile_loop(void(*(uint64,) * 5, _A2, _A2, _A1, _A1, _A1, _A2, _B2, _A2))
def generate_trees(depth, start, levels, tail, width, seeds0, seeds1, alpha, beta, keys, words, bits, values):
    """Generate trees (n) as `dcf.dcf_keygen` does: words, bits (n, levels) and values are written."""
    mask = ~_0 >> (_64 - width)
    last_value = values.shape[1] - 1
    for i in range(alpha.shape[0]):
        a, payload = alpha[i], beta[i]
        low0, high0, t0 = seeds0[i, 0] & ~_1, seeds0[i, 1], _0
        low1, high1, t1 = seeds1[i, 0] & ~_1, seeds1[i, 1], _1
        running, column = _0, 0
        for level in range(levels):
            if level == start and start > _0:
                x0, y0 = _grow(low0, high0, _WINDOW, keys)
                x1, y1 = _grow(low1, high1, _WINDOW, keys)
                node = _output(x1, y1, _0, width, mask) - _output(x0, y0, _0, width, mask)
                values[i, last_value] = _negate_if(t1, payload + node) & mask
            bit = (a >> (depth - _1 - np.uint64(level))) & _1
            left0, left_high0 = _grow(low0, high0, _LEFT, keys)
            left1, left_high1 = _grow(low1, high1, _LEFT, keys)
            right0, right_high0 = _grow(low0, high0, _RIGHT, keys)
            right1, right_high1 = _grow(low1, high1, _RIGHT, keys)
            left_bit0, left_bit1, right_bit0, right_bit1 = left0 & _1, left1 & _1, right0 & _1, right1 & _1
            left0, left1, right0, right1 = left0 & ~_1, left1 & ~_1, right0 & ~_1, right1 & ~_1
            word_low = _choose(bit, left0 ^ left1, right0 ^ right1)
            word_high = _choose(bit, left_high0 ^ left_high1, right_high0 ^ right_high1)
            left_word = left_bit0 ^ left_bit1 ^ bit ^ _1
            right_word = right_bit0 ^ right_bit1 ^ bit
            words[i, 2 * level], words[i, 2 * level + 1] = word_low, word_high
            bits[i, level] = np.uint8(left_word | (right_word << _1))
            if level >= start:
                x0, y0 = _grow(low0, high0, _VALUE, keys)
                x1, y1 = _grow(low1, high1, _VALUE, keys)
                first0, first1 = _output(x0, y0, _0, width, mask), _output(x1, y1, _0, width, mask)
                other0, other1 = _output(x0, y0, _1, width, mask), _output(x1, y1, _1, width, mask)
                lose = _choose(bit, first1 - first0, other1 - other0)
                keep = _choose(bit, other1 - other0, first1 - first0)
                value = _negate_if(t1, lose - running + payload * bit)
                running = running - keep + _negate_if(t1, value)
                values[i, column] = value & mask
                column += 1
            word = _choose(bit, right_word, left_word)
            all0, all1 = _0 - t0, _0 - t1
            low0 = _choose(bit, right0, left0) ^ (word_low & all0)
            high0 = _choose(bit, right_high0, left_high0) ^ (word_high & all0)
            low1 = _choose(bit, right1, left1) ^ (word_low & all1)
            high1 = _choose(bit, right_high1, left_high1) ^ (word_high & all1)
            t0 = _choose(bit, right_bit0, left_bit0) ^ (t0 & word)
            t1 = _choose(bit, right_bit1, left_bit1) ^ (t1 & word)
        x0, y0 = _grow(low0, high0, _LEAF, keys)
        x1, y1 = _grow(low1, high1, _LEAF, keys)
        size = _1 << tail
        last = a & (size - _1)
        for j in range(size):
            index = np.uint64(j)
            is_below = (index - last) >> _63  # both are small
            leaf = _output(x1, y1, index, width, mask) - _output(x0, y0, index, width, mask)
            values[i, column + j] = _negate_if(t1, payload * is_below - running + leaf) & mask
