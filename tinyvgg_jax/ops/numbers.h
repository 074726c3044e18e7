/* The numbers that winograd.c computes with. Arrays hold pixels, which are float32 or bfloat16; sums
   and transformations are float32 for both. bfloat16 is the upper half of a float32, so it is read
   by a shift.

   Where the processor has AVX512_BF16, the matrix products of bfloat16 images take their factors in
   pairs: an element of 4 bytes holds two bfloat16 numbers, and one instruction multiplies 16 such
   elements with 16 others and adds both products to 16 float32 sums. That is twice the rate of
   float32. Elsewhere the factors stay float32, which is more exact and no slower than with float32
   images. A buffer is an array of elements of 4 bytes, typed float, in either case. */

#include <stdint.h>
#include <string.h>

/* Clang 16 crashes when it compiles the pairs, Clang 19 does not; those between are not known. */
#if defined(__clang__) && __clang_major__ < 19
#define HAS_PAIRS 0
#elif defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

/* A vector has LANES floats. The matrix product keeps ROWS x COLUMNS sums in registers. */
#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6
#elif defined(__aarch64__)
#define LANES 4
#define ROWS 12
#else
#define LANES 4
#define ROWS 6
#endif
#define COLUMNS (2 * LANES)

#define INLINE inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
/* The same number of integers, bfloat16 numbers and bytes. A comparison of vectors gives integers:
   -1, all bits set, where it holds, and 0 elsewhere. */
typedef int32_t int_vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uint_vec __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint8_t byte_vec __attribute__((vector_size(LANES), aligned(1)));

static long min(long a, long b) { return a < b ? a : b; }
static long max(long a, long b) { return a > b ? a : b; }
static long round_up(long n, long to) { return (n + to - 1) / to * to; }

/* ---- Pixels, n at a time: LANES of them, or the fewer that are left of the channels; the rest of a
   vector is zero then. `bf16`, here and below, says that they are bfloat16; it is a constant wherever
   these functions are inlined. */

/* Reading and writing fewer is rare. Not inlined, it takes little time to compile. */
#define RARE __attribute__((noinline))

static RARE byte_vec read_some_bytes(const uint8_t *from, long n) {
  byte_vec bytes = {0};
  for (long i = 0; i < n; i++) bytes[i] = from[i];
  return bytes;
}

static RARE void write_some_bytes(uint8_t *to, long n, byte_vec bytes) {
  for (long i = 0; i < n; i++) to[i] = bytes[i];
}

static RARE vec read_some_floats(const float *from, long stride, long n) {
  vec values = {0};
  for (long i = 0; i < n; i++) values[i] = from[i * stride];
  return values;
}

static RARE void write_some_floats(float *to, long n, vec values) {
  for (long i = 0; i < n; i++) to[i] = values[i];
}

static RARE half_vec read_some_halves(const uint16_t *from, long stride, long n) {
  half_vec halves = {0};
  for (long i = 0; i < n; i++) halves[i] = from[i * stride];
  return halves;
}

static RARE void write_some_halves(uint16_t *to, long n, half_vec halves) {
  for (long i = 0; i < n; i++) to[i] = halves[i];
}

static INLINE byte_vec read_bytes(const uint8_t *from, long n) {
  return n == LANES ? *(const byte_vec *)from : read_some_bytes(from, n);
}

static INLINE void write_bytes(uint8_t *to, long n, byte_vec bytes) {
  if (n == LANES)
    *(byte_vec *)to = bytes;
  else
    write_some_bytes(to, n, bytes);
}

/* Reads n pixels from number `at` on, `stride` apart. A single one is common: grey images have one
   channel. */
static INLINE vec read_pixels(const void *from, long at, long stride, long n, int bf16) {
  int whole = n == LANES && stride == 1;
  if (bf16) {
    const uint16_t *pixels = (const uint16_t *)from + at;
    half_vec halves = whole    ? *(const half_vec *)pixels
                      : n == 1 ? (half_vec){*pixels}
                               : read_some_halves(pixels, stride, n);
    return (vec)(__builtin_convertvector(halves, uint_vec) << 16);
  }
  const float *pixels = (const float *)from + at;
  return whole    ? *(const vec *)pixels
         : n == 1 ? (vec){*pixels}
                  : read_some_floats(pixels, stride, n);
}

/* Rounds to the nearest number that a pixel can hold, and to the even one of two that are equally
   near. A NaN stays one: it came from bfloat16 or from the processor, so its lower half is zero, and
   the addition does not overflow. */
static INLINE vec round_to_pixels(vec values, int bf16) {
  if (!bf16) return values;
  uint_vec bits = (uint_vec)values;
  return (vec)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

/* Writes n values that `round_to_pixels` has rounded, from pixel number `at` on. */
static INLINE void write_pixels(void *to, long at, long n, vec rounded, int bf16) {
  if (bf16) {
    uint16_t *pixels = (uint16_t *)to + at;
    half_vec halves = __builtin_convertvector((uint_vec)rounded >> 16, half_vec);
    if (n == LANES)
      *(half_vec *)pixels = halves;
    else
      write_some_halves(pixels, n, halves);
    return;
  }
  float *pixels = (float *)to + at;
  if (n == LANES)
    *(vec *)pixels = rounded;
  else
    write_some_floats(pixels, n, rounded);
}

/* a where `condition` holds, b elsewhere. */
static INLINE vec choose(int_vec condition, vec a, vec b) {
  return (vec)((condition & (int_vec)a) | (~condition & (int_vec)b));
}

/* ---- Pairs */

#if HAS_PAIRS
#define PAIR_LANES 16

/* sum + left right, for pairs the sum of both products. */
static INLINE vec multiply_add(vec sum, float left, vec right, int pairs) {
  if (!pairs) return sum + left * right;
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(left), (__m512bh)right);
}

/* Packs floats 2i and 2i + 1 as element i, for n floats. It reads and writes whole vectors: up to 31
   floats and 15 elements more than there are. */
static void pack_neighbours(const float *from, long n, float *to) {
  for (long i = 0; i < n; i += 2 * PAIR_LANES) {
    __m512 low = _mm512_loadu_ps(from + i), high = _mm512_loadu_ps(from + i + PAIR_LANES);
    _mm512_storeu_si512(to + i / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

/* Packs even[i] and odd[i] as element i, for n elements. It reads and writes whole vectors: up to 15
   floats and elements more than there are. */
static void pack_rows(const float *even, const float *odd, long n, float *to) {
  static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i interleave = _mm512_loadu_si512(order);
  for (long i = 0; i < n; i += PAIR_LANES) {
    __m512 low = _mm512_loadu_ps(even + i), high = _mm512_loadu_ps(odd + i);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(interleave, both));
  }
}
#else
/* Nothing is ever packed. */
static INLINE vec multiply_add(vec sum, float left, vec right, int pairs) {
  (void)pairs;
  return sum + left * right;
}
static void pack_neighbours(const float *from, long n, float *to) { (void)from, (void)n, (void)to; }
static void pack_rows(const float *even, const float *odd, long n, float *to) {
  (void)even, (void)odd, (void)n, (void)to;
}
#endif
