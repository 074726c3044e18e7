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

static long min(long a, long b) { return a < b ? a : b; }
static long max(long a, long b) { return a > b ? a : b; }
static long round_up(long n, long to) { return (n + to - 1) / to * to; }

/* ---- Pixels. `bf16`, here and below, says that they are bfloat16; it is a constant wherever these
   functions are inlined. */

static INLINE float read_pixel(const void *from, long i, int bf16) {
  if (!bf16) return ((const float *)from)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* Rounds to the nearest number that a pixel can hold, and to the even one of two that are equally
   near. A NaN stays one: it came from bfloat16 or from the processor, so its lower half is zero, and
   the addition does not overflow. */
static INLINE float round_to_pixel(float value, int bf16) {
  if (!bf16) return value;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* Writes a value that `round_to_pixel` has rounded. */
static INLINE void write_pixel(void *to, long i, float rounded, int bf16) {
  if (!bf16) {
    ((float *)to)[i] = rounded;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  ((uint16_t *)to)[i] = (uint16_t)(bits >> 16);
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
