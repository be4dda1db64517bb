"""Spikes as bits, in C++: what backward keeps of a tensor of zeros and ones takes a 32nd of it.

Bit r of a word stands for an element of row r, so that neighbours in memory go to neighbouring words: both ways are
loops over a row that the compiler vectorises.
"""

from __future__ import annotations

BITS_ROW = 64  # elements whose words lie side by side
BITS_GROUP = 32 * BITS_ROW  # elements that share so many words

_SOURCE = """enum {{ ROW = {row}, GROUP = {group} }};
const unsigned ONE = 0x3f800000u;  // 1.0f

// x: `size` floats, seen as unsigned; bits: ROW words for each group of them, the last one filled up with zeros.
// Whether all of them are zeros and ones; if not, the words mean nothing.
extern "C" int pack(long size, const unsigned *x, unsigned *bits, int threads) {{
  const long groups = (size + GROUP - 1) / GROUP;
  unsigned others = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : others) if (threads > 1)
  for (long g = 0; g < groups; ++g) {{
    unsigned word[ROW] = {{0}}, other[ROW] = {{0}};
    for (long r = 0; r < 32; ++r) {{
      const unsigned *from = x + g * GROUP + r * ROW;
      const long left = size - g * GROUP - r * ROW, count = left < ROW ? left : ROW;
      for (long c = 0; c < count; ++c) {{
        const unsigned bit = from[c] >> 23 & 1u;
        word[c] |= bit << r;
        other[c] |= from[c] ^ bit * ONE;
      }}
    }}
    for (long c = 0; c < ROW; ++c) {{
      bits[g * ROW + c] = word[c];
      others |= other[c];
    }}
  }}
  return others == 0;
}}

// The floats again.
extern "C" void unpack(long size, const unsigned *bits, unsigned *x, int threads) {{
  const long groups = (size + GROUP - 1) / GROUP;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long g = 0; g < groups; ++g) {{
    const unsigned *word = bits + g * ROW;
    for (long r = 0; r < 32; ++r) {{
      unsigned *to = x + g * GROUP + r * ROW;
      const long left = size - g * GROUP - r * ROW, count = left < ROW ? left : ROW;
      for (long c = 0; c < count; ++c) to[c] = (word[c] >> r & 1u) * ONE;
    }}
  }}
}}
"""


def emit_bits() -> str:
    """The source of `pack` and `unpack`."""
    return _SOURCE.format(row=BITS_ROW, group=BITS_GROUP)
