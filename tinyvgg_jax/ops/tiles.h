/* The tiles of a convolution and their transformations, of which winograd.c takes the products. */

typedef struct {
  long B, H, W, C, O;
  int bf16;  /* 1 if pixels are bfloat16, else 0 */
  int pairs; /* 1 if the products take them in pairs */
  long tiles_h, tiles_w, tiles;
  long O_up;          /* O, rounded up to whole panels of COLUMNS */
  long chunk;         /* tiles in a chunk, a multiple of ROWS */
  long chunks;        /* number of chunks */
  const float *zeros; /* stands for the pixels outside of an image */
  atomic_int failed;  /* whether memory ran out */
} Plan;

/* A thread transforms tiles to this many elements (1 MiB) before it multiplies them, so that they
   are still in the cache then; and at least MIN_CHUNK tiles. */
#define CHUNK_ELEMENTS (256 * 1024)
#define MIN_CHUNK (4 * ROWS)

/* Tells if the products of these images take bfloat16 numbers in pairs. */
static int takes_pairs(const XLA_FFI_Buffer *images) {
  return HAS_PAIRS && images->dtype == XLA_FFI_DataType_BF16;
}

/* Plans a convolution of images [B, H, W, any] from C to O channels, with `elements` elements of
   buffers for each tile. `only_squares` leaves out an odd last row or column, which belongs to no
   square of the pooling. */
static void make_plan(Plan *plan, const XLA_FFI_Buffer *images, long C, long O, int only_squares,
                      long elements, const float *zeros) {
  plan->B = images->dims[0], plan->H = images->dims[1], plan->W = images->dims[2];
  plan->C = C;
  plan->O = O;
  plan->O_up = round_up(O, COLUMNS);
  plan->bf16 = images->dtype == XLA_FFI_DataType_BF16;
  plan->pairs = takes_pairs(images);
  plan->tiles_h = (plan->H + !only_squares) / 2;
  plan->tiles_w = (plan->W + !only_squares) / 2;
  plan->tiles = plan->B * plan->tiles_h * plan->tiles_w;
  plan->chunk = max(CHUNK_ELEMENTS / elements, MIN_CHUNK);
  plan->chunks = (plan->tiles + plan->chunk - 1) / plan->chunk;
  plan->chunk = round_up((plan->tiles + plan->chunks - 1) / plan->chunks, ROWS);
  plan->chunks = (plan->tiles + plan->chunk - 1) / plan->chunk;
  plan->zeros = zeros;
  atomic_init(&plan->failed, 0);
}

/* The address of pixel number i of an array. */
static INLINE const void *pixel(const Plan *plan, const void *array, long i) {
  return (const char *)array + i * (plan->bf16 ? 2 : 4);
}

/* Calls a transformation with a constant as its last argument, `bf16`. */
#define FOR_DTYPE_OF(plan, transformation, ...) \
  ((plan)->bf16 ? transformation(__VA_ARGS__, 1) : transformation(__VA_ARGS__, 0))

/* Finds the tile's pixels: the n x n addresses of rows and columns `from` to `from` + n - 1,
   counted from the tile's first output pixel. Pixels outside of the image lie in `zeros`. */
static void locate(const Plan *plan, const void *x, long channels, long tile, int from, int n,
                   const void **pixels) {
  long column = tile % plan->tiles_w, row = tile / plan->tiles_w % plan->tiles_h;
  long image = tile / (plan->tiles_w * plan->tiles_h) * plan->H * plan->W;
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++) {
      long h = 2 * row + from + i, w = 2 * column + from + j;
      int inside = 0 <= h && h < plan->H && 0 <= w && w < plan->W;
      pixels[i * n + j] =
          inside ? pixel(plan, x, (image + h * plan->W + w) * channels) : plan->zeros;
    }
}

/* The gate that a gradient goes through; at most one of the two is not NULL:
     `outputs`, those of the ReLU, let it through where they are positive;
     `maxima`, a byte for each pooling square, let it through to pixel (i, j) if bit 2i + j is 1. */
typedef struct {
  const void *outputs;
  const uint8_t *maxima;
} Gate;

/* The gradient of one pixel of a pooling square: `gradient_share`, the square's gradient divided by
   its number of maxima, if the pixel is one of them. The value is read in any case, here and below,
   because the compiler would turn a conditional read into a jump. */
static INLINE float through_pooling(const void *gradient_share, const uint8_t *maxima, int bit,
                                    long c, int bf16) {
  float value = read_pixel(gradient_share, c, bf16);
  return maxima[c] >> bit & 1 ? value : 0;
}

/* The gradient of one pixel before a ReLU, whose output was y. */
static INLINE float through_relu(const void *gradient, const void *y, long c, int bf16) {
  float value = read_pixel(gradient, c, bf16);
  return read_pixel(y, c, bf16) > 0 ? value : 0;
}

/* v = B' d B for each of C channels, d being the 4x4 pixels of a tile:
     with neither `outputs` nor `maxima`, the pixels themselves;
     with `outputs`, a gradient behind a ReLU, let through where the outputs are positive;
     with `maxima`, a pooled gradient, of which `d` holds the 3x3 squares that the 4x4 pixels lie in
     (the tile's own square, and one row or column of each of its neighbours).
   The 16 elements of v lie `step` floats apart. */
static INLINE void transform_4x4(long C, const void **d, const void **outputs,
                                 const uint8_t **maxima, float *v, long step, int bf16) {
#pragma omp simd
  for (long c = 0; c < C; c++) {
    float t[16];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      float a, b, e, f;
      if (maxima) {
        int k = (j + 1) / 2, right = (j + 1) % 2;
        a = through_pooling(d[k], maxima[k], 2 + right, c, bf16);
        b = through_pooling(d[3 + k], maxima[3 + k], right, c, bf16);
        e = through_pooling(d[3 + k], maxima[3 + k], 2 + right, c, bf16);
        f = through_pooling(d[6 + k], maxima[6 + k], right, c, bf16);
      } else if (outputs) {
        a = through_relu(d[j], outputs[j], c, bf16);
        b = through_relu(d[4 + j], outputs[4 + j], c, bf16);
        e = through_relu(d[8 + j], outputs[8 + j], c, bf16);
        f = through_relu(d[12 + j], outputs[12 + j], c, bf16);
      } else {
        a = read_pixel(d[j], c, bf16), b = read_pixel(d[4 + j], c, bf16);
        e = read_pixel(d[8 + j], c, bf16), f = read_pixel(d[12 + j], c, bf16);
      }
      t[j] = a - e, t[4 + j] = b + e, t[8 + j] = e - b, t[12 + j] = b - f;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      float a = t[4 * i], b = t[4 * i + 1], e = t[4 * i + 2], f = t[4 * i + 3];
      v[(4 * i) * step + c] = a - e;
      v[(4 * i + 1) * step + c] = b + e;
      v[(4 * i + 2) * step + c] = e - b;
      v[(4 * i + 3) * step + c] = b - f;
    }
  }
}

static void transform_pixels(const Plan *plan, const void *x, long tile, float *v, long step) {
  const void *pixels[16];
  locate(plan, x, plan->C, tile, -1, 4, pixels);
  FOR_DTYPE_OF(plan, transform_4x4, plan->C, pixels, NULL, NULL, v, step);
}

static void transform_relu_gradient(const Plan *plan, const void *gradient, const void *y,
                                    long tile, float *v, long step) {
  const void *pixels[16], *outputs[16];
  locate(plan, gradient, plan->C, tile, -1, 4, pixels);
  locate(plan, y, plan->C, tile, -1, 4, outputs);
  FOR_DTYPE_OF(plan, transform_4x4, plan->C, pixels, outputs, NULL, v, step);
}

static void transform_pooled_gradient(const Plan *plan, const void *gradient_share,
                                      const uint8_t *maxima, long tile, float *v, long step) {
  const void *shares[9];
  const uint8_t *masks[9];
  long H = plan->H / 2, W = plan->W / 2;
  long column = tile % plan->tiles_w, row = tile / plan->tiles_w % plan->tiles_h;
  long image = tile / (plan->tiles_w * plan->tiles_h);
  for (int i = 0; i < 3; i++)
    for (int j = 0; j < 3; j++) {
      long h = row - 1 + i, w = column - 1 + j, at = ((image * H + h) * W + w) * plan->C;
      int inside = 0 <= h && h < H && 0 <= w && w < W;
      shares[3 * i + j] = inside ? pixel(plan, gradient_share, at) : plan->zeros;
      masks[3 * i + j] = inside ? maxima + at : (const uint8_t *)plan->zeros;
    }
  FOR_DTYPE_OF(plan, transform_4x4, plan->C, shares, NULL, masks, v, step);
}

/* v = B' d B for the input x of a convolution: images, or a gradient that goes through `gate`. */
static void transform_input(const Plan *plan, const void *x, Gate gate, long tile, float *v,
                            long step) {
  if (gate.maxima)
    transform_pooled_gradient(plan, x, gate.maxima, tile, v, step);
  else if (gate.outputs)
    transform_relu_gradient(plan, x, gate.outputs, tile, v, step);
  else
    transform_pixels(plan, x, tile, v, step);
}

/* m = A e A' for each of O channels, e being the gradient of the tile's 2x2 output pixels: `g`, let
   through where the ReLU's `outputs` are positive; or with `maxima`, the square's `g[0]`, let
   through to the maxima. */
static INLINE void transform_2x2(long O, const void **g, const void **outputs,
                                 const uint8_t *maxima, float *m, long step, int bf16) {
#pragma omp simd
  for (long o = 0; o < O; o++) {
    float t[8];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      float a, b;
      if (maxima) {
        a = through_pooling(g[0], maxima, j, o, bf16);
        b = through_pooling(g[0], maxima, 2 + j, o, bf16);
      } else {
        a = through_relu(g[j], outputs[j], o, bf16);
        b = through_relu(g[2 + j], outputs[2 + j], o, bf16);
      }
      t[j] = a, t[2 + j] = a + b, t[4 + j] = a - b, t[6 + j] = -b;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      float a = t[2 * i], b = t[2 * i + 1];
      m[(4 * i) * step + o] = a;
      m[(4 * i + 1) * step + o] = a + b;
      m[(4 * i + 2) * step + o] = a - b;
      m[(4 * i + 3) * step + o] = -b;
    }
  }
}

/* m = A e A' for the gradient of a convolution's output, which goes through `gate`. */
static void transform_gradient(const Plan *plan, const void *gradient, Gate gate, long tile,
                               float *m, long step) {
  const void *pixels[4] = {pixel(plan, gradient, tile * plan->O)}, *outputs[4];
  if (gate.maxima) {
    const uint8_t *maxima = gate.maxima + tile * plan->O;
    FOR_DTYPE_OF(plan, transform_2x2, plan->O, pixels, NULL, maxima, m, step);
  } else {
    locate(plan, gradient, plan->O, tile, 0, 2, pixels);
    locate(plan, gate.outputs, plan->O, tile, 0, 2, outputs);
    FOR_DTYPE_OF(plan, transform_2x2, plan->O, pixels, outputs, NULL, m, step);
  }
}

/* s = A' m A + bias, the tile's 2x2 output pixels, for each of n channels. Writes max(s, least) for
   each pixel: a ReLU if `least` is 0, and s itself if it is -INFINITY. With `maxima`, writes only
   the largest of the four, and sets the bits of the pixels that have it; none if it is not above
   `least`, because then ReLU lets no gradient through. */
static INLINE void transform_back(long n, const float *m, long step, const void *bias, float least,
                                  void **y, uint8_t *maxima, int bf16) {
#pragma omp simd
  for (long o = 0; o < n; o++) {
    float t[8], s[4], b = read_pixel(bias, o, bf16);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      float a = m[j * step + o], b = m[(4 + j) * step + o], e = m[(8 + j) * step + o],
            f = m[(12 + j) * step + o];
      t[j] = a + b + e, t[4 + j] = b - e - f;
    }
    s[0] = round_to_pixel(t[0] + t[1] + t[2] + b, bf16);
    s[1] = round_to_pixel(t[1] - t[2] - t[3] + b, bf16);
    s[2] = round_to_pixel(t[4] + t[5] + t[6] + b, bf16);
    s[3] = round_to_pixel(t[5] - t[6] - t[7] + b, bf16);
    /* The comparisons are written in the directions that let a NaN through to the output. */
    if (maxima) {
      float most = s[0];
#pragma GCC unroll 3
      for (int i = 1; i < 4; i++) most = (s[i] > most) | (s[i] != s[i]) ? s[i] : most;
      int mask = (s[0] == most) | (s[1] == most) << 1 | (s[2] == most) << 2 | (s[3] == most) << 3;
      write_pixel(y[0], o, most < least ? least : most, bf16);
      maxima[o] = most > least ? mask : 0;
    } else {
#pragma GCC unroll 4
      for (int i = 3; i >= 0; i--) write_pixel(y[i], o, s[i] < least ? least : s[i], bf16);
    }
  }
}

/* The results of a convolution, and what is applied to them. */
typedef struct {
  const void *bias;
  float least;     /* lower bound of the output: 0 for a ReLU */
  void *y;
  uint8_t *maxima; /* of the pooling; NULL if none follows */
} Output;

/* Writes a tile's output for the n channels from `from` on, or its maximum if pooling follows.
   Pixels outside of the image are written to `nowhere`. */
static void transform_output(const Plan *plan, const float *m, long step, const Output *output,
                             long tile, long from, long n, void *nowhere) {
  const void *pixels[4] = {pixel(plan, output->y, tile * plan->O)};
  const void *bias = pixel(plan, output->bias, from);
  uint8_t *maxima = output->maxima ? output->maxima + tile * plan->O + from : NULL;
  if (!maxima) locate(plan, output->y, plan->O, tile, 0, 2, pixels);
  void *y[4];
  for (int i = 0; i < (maxima ? 1 : 4); i++)
    y[i] = pixels[i] == plan->zeros ? nowhere : (void *)pixel(plan, pixels[i], from);
  if (maxima)
    FOR_DTYPE_OF(plan, transform_back, n, m, step, bias, output->least, y, maxima);
  else
    FOR_DTYPE_OF(plan, transform_back, n, m, step, bias, output->least, y, NULL);
}
