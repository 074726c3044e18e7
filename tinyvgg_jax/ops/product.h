/* The matrix product, block by block. winograd.c takes one for each element of a tile. Its numbers
   are floats, or pairs of bfloat16 numbers (numbers.h); `pairs` says which. */

/* c[r][n] = sum over d of a[r][d] b[d][n], or += with `add`, for ROWS x COLUMNS elements. */
static INLINE void product_block(
    long depth, const float *a, long a_row, long a_depth, const float *b, long b_depth, float *c,
    long c_row, int add, int pairs) {
  vec sum[ROWS][2];
  for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = (vec){0};
#pragma GCC unroll 4
  for (long d = 0; d < depth; d++) {
    vec left = *(const vec *)(b + d * b_depth), right = *(const vec *)(b + d * b_depth + LANES);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
      float factor = a[r * a_row + d * a_depth];
      sum[r][0] = multiply_add(sum[r][0], factor, left, pairs);
      sum[r][1] = multiply_add(sum[r][1], factor, right, pairs);
    }
  }
  for (int r = 0; r < ROWS; r++) {
    vec *to = (vec *)(c + r * c_row), *to_right = (vec *)(c + r * c_row + LANES);
    *to = add ? *to + sum[r][0] : sum[r][0];
    *to_right = add ? *to_right + sum[r][1] : sum[r][1];
  }
}

/* c = or += a b for a [M, K] and b [K, COLUMNS], M a multiple of ROWS. */
static INLINE void product(long M, long K, const float *a, long a_row, long a_depth, const float *b,
                           long b_depth, float *c, long c_row, int add, int pairs) {
  for (long m = 0; m < M; m += ROWS)
    product_block(K, a + m * a_row, a_row, a_depth, b, b_depth, c + m * c_row, c_row, add, pairs);
}
