"""Spikes as bits, in C++: what backward keeps of zeros and ones takes a 32nd of the floats, of sums of them a bit more.

Bit r of a word stands for an element of row r, so that neighbours in memory go to neighbouring words: both ways are
loops over a row that the compiler vectorises. Numbers above 1 have a plane of such words for each of their bits.
"""

from __future__ import annotations

BITS_ROW = 64  # elements whose words lie side by side
BITS_GROUP = 32 * BITS_ROW  # elements that share so many words of a plane
MOST_PLANES = 4

_SOURCE = """enum {{ ROW = {row}, GROUP = {group}, MOST_PLANES = {planes} }};

static inline unsigned bits_of(float x) {{
  unsigned bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}}

// x: `size` floats; bits: `planes` times ROW words for each group of them, the last one filled up with zeros.
// Whether all of them are whole numbers from 0 below 2 to the power of `planes`; if not, the words mean nothing.
extern "C" int pack(long size, const float *x, unsigned *bits, long planes, int threads) {{
  const long groups = (size + GROUP - 1) / GROUP;
  const float limit = (float)(1 << planes);
  unsigned others = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : others) if (threads > 1)
  for (long g = 0; g < groups; ++g) {{
    unsigned word[MOST_PLANES][ROW] = {{{{0}}}}, other[ROW] = {{0}}, number[ROW];
    for (long r = 0; r < 32; ++r) {{
      const float *from = x + g * GROUP + r * ROW;
      const long left = size - g * GROUP - r * ROW, count = left < ROW ? left : ROW;
      for (long c = 0; c < count; ++c) {{
        const int whole = (int)(from[c] >= 0.0f && from[c] < limit ? from[c] : 0.0f);
        // The sign by itself: a compiler may make one rounding of both conversions, which keeps that of -0.
        other[c] |= bits_of(from[c]) >> 31 | (bits_of(from[c]) ^ bits_of((float)whole));
        number[c] = whole;
      }}
      for (long p = 0; p < planes; ++p)
        for (long c = 0; c < count; ++c) word[p][c] |= (number[c] >> p & 1u) << r;
    }}
    for (long p = 0; p < planes; ++p)
      for (long c = 0; c < ROW; ++c) bits[(g * planes + p) * ROW + c] = word[p][c];
    for (long c = 0; c < ROW; ++c) others |= other[c];
  }}
  return others == 0;
}}

// The floats again.
extern "C" void unpack(long size, float *x, const unsigned *bits, long planes, int threads) {{
  const long groups = (size + GROUP - 1) / GROUP;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long g = 0; g < groups; ++g) {{
    const unsigned *word = bits + g * planes * ROW;
    for (long r = 0; r < 32; ++r) {{
      float *to = x + g * GROUP + r * ROW;
      const long left = size - g * GROUP - r * ROW, count = left < ROW ? left : ROW;
      int number[ROW] = {{0}};
      for (long p = 0; p < planes; ++p)
        for (long c = 0; c < count; ++c) number[c] |= (word[p * ROW + c] >> r & 1u) << p;
      for (long c = 0; c < count; ++c) to[c] = (float)number[c];
    }}
  }}
}}
"""


def emit_bits() -> str:
    """The source of `pack` and `unpack`."""
    return _SOURCE.format(row=BITS_ROW, group=BITS_GROUP, planes=MOST_PLANES)
