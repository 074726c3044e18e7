/* Winograd's transformations in one dimension: of a column or row of a tile. A tile's transformation
   is that of its columns, and then of the rows of the result. winograd.c has the matrices of F(2, 3),
   and README.md beside it derives those of F(4, 3).

   `size`, the output pixels in a line, is 2 or 4, and a constant wherever these are inlined. Each
   function reads consecutive vectors, of LANES lines, and writes vectors that lie `step` apart. */

/* F(4, 3) interpolates at 0, -NEAR, NEAR, -FAR, FAR and infinity. The elements of B and A are exact
   in float32 for these, and the error is about half of that for the common 1 and 2. */
#define NEAR 0.75f
#define FAR 1.5f
#define NEAR_2 (NEAR * NEAR)
#define FAR_2 (FAR * FAR)
/* The scales of G's rows: one over the product of a point's distances to the other finite points. */
#define AT_0 (1 / (NEAR_2 * FAR_2))
#define AT_NEAR (1 / (2 * NEAR_2 * (NEAR_2 - FAR_2)))
#define AT_FAR (1 / (2 * FAR_2 * (FAR_2 - NEAR_2)))

/* v = B' d: size + 2 input pixels to as many elements. */
static INLINE void line_to_v(const vec *d, vec *v, int step, int size) {
  if (size == 2) {
    v[0] = d[0] - d[2], v[step] = d[1] + d[2];
    v[2 * step] = d[2] - d[1], v[3 * step] = d[1] - d[3];
    return;
  }
  vec even = d[4] - FAR_2 * d[2], odd = NEAR * (d[3] - FAR_2 * d[1]);
  vec even_far = d[4] - NEAR_2 * d[2], odd_far = FAR * (d[3] - NEAR_2 * d[1]);
  v[0] = NEAR_2 * FAR_2 * d[0] - (NEAR_2 + FAR_2) * d[2] + d[4];
  v[step] = even + odd, v[2 * step] = even - odd;
  v[3 * step] = even_far + odd_far, v[4 * step] = even_far - odd_far;
  v[5 * step] = NEAR_2 * FAR_2 * d[1] - (NEAR_2 + FAR_2) * d[3] + d[5];
}

/* u = G g: the 3 taps of a kernel to size + 2 elements. */
static INLINE void line_to_u(const vec *g, vec *u, int step, int size) {
  if (size == 2) {
    u[0] = g[0], u[step] = 0.5f * (g[0] + g[2] + g[1]);
    u[2 * step] = 0.5f * (g[0] + g[2] - g[1]), u[3 * step] = g[2];
    return;
  }
  vec even = AT_NEAR * (g[0] + NEAR_2 * g[2]), odd = AT_NEAR * NEAR * g[1];
  vec even_far = AT_FAR * (g[0] + FAR_2 * g[2]), odd_far = AT_FAR * FAR * g[1];
  u[0] = AT_0 * g[0];
  u[step] = even + odd, u[2 * step] = even - odd;
  u[3 * step] = even_far + odd_far, u[4 * step] = even_far - odd_far;
  u[5 * step] = g[2];
}

/* s = A' m: size + 2 elements of the product to the output pixels. */
static INLINE void line_from_m(const vec *m, vec *s, int step, int size) {
  if (size == 2) {
    s[0] = m[0] + m[1] + m[2], s[step] = m[1] - m[2] - m[3];
    return;
  }
  vec even = m[1] + m[2], odd = NEAR * (m[1] - m[2]);
  vec even_far = m[3] + m[4], odd_far = FAR * (m[3] - m[4]);
  s[0] = m[0] + even + even_far;
  s[step] = odd + odd_far;
  s[2 * step] = NEAR_2 * even + FAR_2 * even_far;
  s[3 * step] = NEAR_2 * odd + FAR_2 * odd_far + m[5];
}

/* m = A e: the gradient of the output pixels to size + 2 elements. */
static INLINE void line_to_m(const vec *e, vec *m, int step, int size) {
  if (size == 2) {
    m[0] = e[0], m[step] = e[0] + e[1], m[2 * step] = e[0] - e[1], m[3 * step] = -e[1];
    return;
  }
  vec even = e[0] + NEAR_2 * e[2], odd = NEAR * (e[1] + NEAR_2 * e[3]);
  vec even_far = e[0] + FAR_2 * e[2], odd_far = FAR * (e[1] + FAR_2 * e[3]);
  m[0] = e[0];
  m[step] = even + odd, m[2 * step] = even - odd;
  m[3 * step] = even_far + odd_far, m[4 * step] = even_far - odd_far;
  m[5 * step] = e[3];
}

/* g = G' s: size + 2 sums to the gradient of the 3 taps. */
static INLINE void line_from_sums(const vec *s, vec *g, int step, int size) {
  if (size == 2) {
    vec even = 0.5f * (s[1] + s[2]);
    g[0] = s[0] + even, g[step] = 0.5f * (s[1] - s[2]), g[2 * step] = even + s[3];
    return;
  }
  vec even = AT_NEAR * (s[1] + s[2]), odd = AT_NEAR * NEAR * (s[1] - s[2]);
  vec even_far = AT_FAR * (s[3] + s[4]), odd_far = AT_FAR * FAR * (s[3] - s[4]);
  g[0] = AT_0 * s[0] + even + even_far;
  g[step] = odd + odd_far;
  g[2 * step] = NEAR_2 * even + FAR_2 * even_far + s[5];
}

/* Writes the elements of one row of a transformed tile, which lie `step` floats apart. */
static INLINE void write_elements(float *to, long step, const vec *line, int side) {
#pragma GCC unroll 6
  for (int j = 0; j < side; j++) *(vec *)(to + j * step) = line[j];
}
