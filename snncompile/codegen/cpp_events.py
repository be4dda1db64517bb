"""A 2d convolution in C++ that is driven by events: it adds up the weights of what is not zero in its input.

Spikes are few, so this takes a part of the work of a library's convolution, and as much for one image as for many. The
nonzeros of each pixel are listed first. Then, for some pixels of the output and a block of its channels at a time, the
weights of one tap of the kernel are added for the nonzeros under it, in vector registers, before the next tap's: so
they are in the nearest cache. (The order of the additions is another than that of library kernels, and what is
multiplied by zero is left out, infinities and NaNs of the weights too.)
"""

from __future__ import annotations

_LANES = 8  # floats of a vector
_MOST_VECTORS = 8  # of output channels: with what is added to them they fill the registers of AVX2
EVENT_PIXELS = 64  # of the output that are computed together

_SOURCE = """typedef float vec __attribute__((vector_size({lanes} * sizeof(float)), aligned(sizeof(float))));
enum {{ BLOCK = {block}, LANES = {lanes}, VECTORS = BLOCK / LANES, PIXELS = {pixels} }};

// How many of some pixels spread over the input [pixels, channels] are not zero.
extern "C" long count(long pixels, long channels, const float *x, long looked_at) {{
  long found = 0;
  for (long i = 0; i < looked_at; ++i) {{
    const float *pixel = x + i * pixels / looked_at * channels;
    for (long c = 0; c < channels; ++c) found += pixel[c] != 0.0f;
  }}
  return found;
}}

// The nonzeros of a pixel and their channels; how many they are.
static inline int listed(const float *from, long channels, float *value, unsigned short *place) {{
  int found = 0;
  long c = 0;
#ifdef __AVX__
  for (; c + LANES <= channels; c += LANES) {{
    const vec zero = {{}};
    unsigned set = __builtin_ia32_movmskps256((vec)(*(const vec *)(from + c) != zero));
    for (; set; set &= set - 1) {{
      const int bit = __builtin_ctz(set);
      value[found] = from[c + bit];
      place[found++] = (unsigned short)(c + bit);
    }}
  }}
#endif
  for (; c < channels; ++c) {{
    value[found] = from[c];
    place[found] = (unsigned short)c;
    found += from[c] != 0.0f;
  }}
  return found;
}}

// x: the images [images, height, width, channels]; w: the weights [blocks, kernel height, kernel width, channels,
// BLOCK]; b: a number for each output channel, filled up to whole blocks; y: the results [images, out height, out
// width, out channels]; v, p: room for the nonzeros of `group` images and their channels; places, found: for where
// those of a pixel begin, and how many they are.
extern "C" void convolve(const long *sizes, const float *x, const float *w, const float *b, float *y, float *v,
                         unsigned short *p, long *places, long *found, long group, int threads) {{
  const long images = sizes[0], ih = sizes[1], iw = sizes[2], ic = sizes[3], oh = sizes[4], ow = sizes[5];
  const long oc = sizes[6], kh = sizes[7], kw = sizes[8], sy = sizes[9], sx = sizes[10], py = sizes[11];
  const long px = sizes[12], dy = sizes[13], dx = sizes[14];
  const long blocks = (oc + BLOCK - 1) / BLOCK, pixels = ih * iw;
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (long first = 0; first < images; first += group) {{
    const long count = images - first < group ? images - first : group, results = count * oh * ow;
#pragma omp for schedule(static)
    for (long part = 0; part < threads; ++part) {{
      const long stop = count * pixels * (part + 1) / threads;
      long i = count * pixels * part / threads, at = i * ic;
      for (; i < stop; ++i) {{
        places[i] = at;
        found[i] = listed(x + (first * pixels + i) * ic, ic, v + at, p + at);
        at += found[i];
      }}
    }}
#pragma omp for collapse(2) schedule(static)
    for (long o = 0; o < blocks; ++o)
      for (long begin = 0; begin < results; begin += PIXELS) {{
        const long end = begin + PIXELS < results ? begin + PIXELS : results;
        float sums[PIXELS * BLOCK];
        long image[PIXELS], top[PIXELS], left[PIXELS];
        for (long q = begin; q < end; ++q) {{
          image[q - begin] = q / (oh * ow) * pixels;
          top[q - begin] = q / ow % oh * sy - py;
          left[q - begin] = q % ow * sx - px;
          for (int j = 0; j < BLOCK; ++j) sums[(q - begin) * BLOCK + j] = b[o * BLOCK + j];
        }}
        for (long ky = 0; ky < kh; ++ky)
          for (long kx = 0; kx < kw; ++kx) {{
            const float *tap = w + ((o * kh + ky) * kw + kx) * ic * BLOCK;
            for (long q = 0; q < end - begin; ++q) {{
              const long iy = top[q] + ky * dy, ix = left[q] + kx * dx;
              if (iy < 0 || iy >= ih || ix < 0 || ix >= iw) continue;
              const long pixel = image[q] + iy * iw + ix, many = found[pixel];
              const float *value = v + places[pixel];
              const unsigned short *place = p + places[pixel];
              if (!many) continue;
              float *to = sums + q * BLOCK;
              vec sum[VECTORS];
#pragma GCC unroll {unroll}
              for (int j = 0; j < VECTORS; ++j) sum[j] = *(const vec *)(to + j * LANES);
              for (long e = 0; e < many; ++e) {{
                const float *row = tap + place[e] * (long)BLOCK;
#pragma GCC unroll {unroll}
                for (int j = 0; j < VECTORS; ++j) sum[j] += value[e] * *(const vec *)(row + j * LANES);
              }}
#pragma GCC unroll {unroll}
              for (int j = 0; j < VECTORS; ++j) *(vec *)(to + j * LANES) = sum[j];
            }}
          }}
        const long wide = oc - o * BLOCK < BLOCK ? oc - o * BLOCK : BLOCK;
        for (long q = begin; q < end; ++q) {{
          float *to = y + (first * oh * ow + q) * oc + o * BLOCK;
          for (long j = 0; j < wide; ++j) to[j] = sums[(q - begin) * BLOCK + j];
        }}
      }}
  }}
}}
"""


def event_block(channels: int) -> int:
    """How many output channels are computed together: whole vectors, with as few channels left over as can be."""
    blocks = -(-channels // (_MOST_VECTORS * _LANES))
    return -(-channels // (blocks * _LANES)) * _LANES


def emit_event_convolution(block: int) -> str:
    """The source of `count` and `convolve` for blocks of so many output channels."""
    return _SOURCE.format(block=block, lanes=_LANES, pixels=EVENT_PIXELS, unroll=_MOST_VECTORS)
