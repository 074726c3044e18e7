/* The tiles of a convolution and their transformations, of which winograd.c takes the products. */

typedef struct {
  long B, H, W, C, O;
  int bf16;     /* 1 if pixels are bfloat16, else 0 */
  int pairs;    /* 1 if the products take them in pairs */
  int size;     /* output pixels in a row or column of a tile: 2 or 4 */
  int elements; /* of a transformed tile: (size + 2)^2 */
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

/* The size of tiles that takes fewer multiplications, for images of H x W pixels.

   The forward pass always takes 2. There an output pixel is computed from its own 3x3 input pixels
   only, so that where these are black it is exactly its bias. A pixel of a larger tile depends on
   others, too, by rounding, and where the bias is zero the ReLU would let noise through. Gradients
   are compared with nothing.

   Pairs take 2 as well. They are rounded to bfloat16, and the transformations of larger tiles would
   make an error of that size several times larger. */
static int tile_size(long H, long W, int gradient, int pairs) {
  long by_2 = 16 * ((H + 1) / 2) * ((W + 1) / 2), by_4 = 36 * ((H + 3) / 4) * ((W + 3) / 4);
  return gradient && !pairs && by_4 < by_2 ? 4 : 2;
}

/* Plans a convolution of images [B, H, W, any] from C to O channels, or its gradient. Each of a tile's
   elements takes `channels` elements of the buffers. `only_squares` leaves out an odd last row or
   column, which belongs to no square of the pooling. */
static void make_plan(Plan *plan, const XLA_FFI_Buffer *images, long C, long O, int gradient,
                      int only_squares, long channels, const float *zeros) {
  plan->B = images->dims[0], plan->H = images->dims[1], plan->W = images->dims[2];
  plan->C = C;
  plan->O = O;
  plan->O_up = round_up(O, COLUMNS);
  plan->bf16 = images->dtype == XLA_FFI_DataType_BF16;
  plan->pairs = takes_pairs(images);
  long H = only_squares ? plan->H / 2 * 2 : plan->H, W = only_squares ? plan->W / 2 * 2 : plan->W;
  plan->size = tile_size(H, W, gradient, plan->pairs);
  plan->elements = (plan->size + 2) * (plan->size + 2);
  plan->tiles_h = (H + plan->size - 1) / plan->size;
  plan->tiles_w = (W + plan->size - 1) / plan->size;
  plan->tiles = plan->B * plan->tiles_h * plan->tiles_w;
  plan->chunk = max(CHUNK_ELEMENTS / (plan->elements * channels), MIN_CHUNK);
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

/* Calls a transformation with two constants as its last arguments, `size` and `bf16`. */
#define FOR_KIND_OF(plan, transformation, ...)                                              \
  ((plan)->size == 4 ? (plan)->bf16 ? transformation(__VA_ARGS__, 4, 1)                     \
                                    : transformation(__VA_ARGS__, 4, 0)                     \
   : (plan)->bf16    ? transformation(__VA_ARGS__, 2, 1)                                    \
                     : transformation(__VA_ARGS__, 2, 0))

/* The most pixels that a tile reads, which are also its most elements. */
#define MOST_PIXELS 36
#define OUTSIDE (-1)

/* Finds n x n pixels, or with `squares` n x n squares of the pooling: those of rows and columns
   `from` to `from` + n - 1, counted from the tile's first. Gives their numbers in the array, or
   OUTSIDE. */
static void find(const Plan *plan, int squares, long tile, int from, int n, long *places) {
  int side = squares ? 2 : 1;
  long H = plan->H / side, W = plan->W / side, size = plan->size / side;
  long column = tile % plan->tiles_w, row = tile / plan->tiles_w % plan->tiles_h;
  long image = tile / (plan->tiles_w * plan->tiles_h) * H * W;
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++) {
      long h = size * row + from + i, w = size * column + from + j;
      int inside = 0 <= h && h < H && 0 <= w && w < W;
      places[i * n + j] = inside ? image + h * W + w : OUTSIDE;
    }
}

/* The addresses of n x n places in an array; those OUTSIDE lie in `zeros`. */
static void locate(const Plan *plan, const void *x, long channels, int n, const long *places,
                   const void **addresses) {
  for (int i = 0; i < n * n; i++)
    addresses[i] = places[i] == OUTSIDE ? plan->zeros : pixel(plan, x, places[i] * channels);
}

/* The same for the bytes of the pooling's maxima. */
static void locate_maxima(const Plan *plan, const uint8_t *maxima, long channels, int n,
                          const long *places, const uint8_t **addresses) {
  for (int i = 0; i < n * n; i++)
    addresses[i] = places[i] == OUTSIDE ? (const uint8_t *)plan->zeros
                                        : maxima + places[i] * channels;
}

/* The gate that a gradient goes through; at most one of the two is not NULL:
     `outputs`, those of the ReLU, let it through where they are positive;
     `maxima`, a byte for each pooling square, let it through to pixel (i, j) if bit 2i + j is 1. */
typedef struct {
  const void *outputs;
  const uint8_t *maxima;
} Gate;

/* The gradient of a pixel of a pooling square, for n channels from c on: `gradient_share`, the
   square's gradient divided by its number of maxima, where the pixel is one of them. */
static INLINE vec through_pooling(const void *gradient_share, const uint8_t *maxima, int bit,
                                  long c, long n, int bf16) {
  int_vec bits = __builtin_convertvector(read_bytes(maxima + c, n), int_vec) >> bit & 1;
  return choose(bits != 0, read_pixels(gradient_share, c, 1, n, bf16), (vec){0});
}

/* The gradient of a pixel before a ReLU, whose output was y, for n channels from c on. */
static INLINE vec through_relu(const void *gradient, const void *y, long c, long n, int bf16) {
  int_vec positive = read_pixels(y, c, 1, n, bf16) > 0;
  return choose(positive, read_pixels(gradient, c, 1, n, bf16), (vec){0});
}

/* v = B' d B for each of C channels, d being the (size + 2)^2 input pixels of a tile:
     with neither `outputs` nor `maxima`, the pixels themselves;
     with `outputs`, a gradient behind a ReLU, let through where the outputs are positive;
     with `maxima`, a pooled gradient, of which `d` holds the squares that the pixels lie in (the
     tile's own, and one row or column of each of its neighbours).
   The elements of v lie `step` floats apart. Whole vectors are written, zeros beyond channel C. */
static INLINE void transform_pixels(long C, const void **d, const void **outputs,
                                    const uint8_t **maxima, float *v, long step, int size,
                                    int bf16) {
  const int side = size + 2, squares = size / 2 + 2;
  for (long c = 0; c < C; c += LANES) {
    long n = min(C - c, LANES);
    vec t[36], line[6];
#pragma GCC unroll 6
    for (int j = 0; j < side; j++) {
#pragma GCC unroll 6
      for (int i = 0; i < side; i++) {
        /* The first pixel is the last of its square. */
        int k = (i + 1) / 2 * squares + (j + 1) / 2, bit = (i + 1) % 2 * 2 + (j + 1) % 2;
        int at = i * side + j;
        line[i] = maxima    ? through_pooling(d[k], maxima[k], bit, c, n, bf16)
                  : outputs ? through_relu(d[at], outputs[at], c, n, bf16)
                            : read_pixels(d[at], c, 1, n, bf16);
      }
      line_to_v(line, t + j, side, size);
    }
#pragma GCC unroll 6
    for (int i = 0; i < side; i++) {
      line_to_v(t + i * side, line, 1, size);
      write_elements(v + i * side * step + c, step, line, side);
    }
  }
}

/* v = B' d B for the input x of a convolution: images, or a gradient that goes through `gate`. */
static void transform_input(const Plan *plan, const void *x, Gate gate, long tile, float *v,
                            long step) {
  const void *pixels[MOST_PIXELS], *outputs[MOST_PIXELS];
  const uint8_t *maxima[MOST_PIXELS];
  long places[MOST_PIXELS], C = plan->C;
  int n = gate.maxima ? plan->size / 2 + 2 : plan->size + 2;
  find(plan, gate.maxima != NULL, tile, -1, n, places);
  locate(plan, x, C, n, places, pixels);
  if (gate.maxima) {
    locate_maxima(plan, gate.maxima, C, n, places, maxima);
    FOR_KIND_OF(plan, transform_pixels, C, pixels, NULL, maxima, v, step);
  } else if (gate.outputs) {
    locate(plan, gate.outputs, C, n, places, outputs);
    FOR_KIND_OF(plan, transform_pixels, C, pixels, outputs, NULL, v, step);
  } else {
    FOR_KIND_OF(plan, transform_pixels, C, pixels, NULL, NULL, v, step);
  }
}

/* m = A e A' for each of O channels, e being the gradient of the tile's output pixels: `g`, let
   through where the ReLU's `outputs` are positive; or with `maxima`, that of the tile's squares, let
   through to the maxima. Adds the pixels of e to `sum`. Whole vectors are written, zeros beyond
   channel O. */
static INLINE void transform_output_gradient(long O, const void **g, const void **outputs,
                                             const uint8_t **maxima, float *m, long step,
                                             float *sum, int size, int bf16) {
  const int side = size + 2, squares = size / 2;
  for (long o = 0; o < O; o += LANES) {
    long n = min(O - o, LANES);
    vec t[24], line[6], total = {0};
#pragma GCC unroll 4
    for (int j = 0; j < size; j++) {
      vec of_column = {0};
#pragma GCC unroll 4
      for (int i = 0; i < size; i++) {
        int k = i / 2 * squares + j / 2, bit = i % 2 * 2 + j % 2, at = i * size + j;
        line[i] = maxima ? through_pooling(g[k], maxima[k], bit, o, n, bf16)
                         : through_relu(g[at], outputs[at], o, n, bf16);
        of_column += line[i];
      }
      total += of_column;
      line_to_m(line, t + j, size, size);
    }
#pragma GCC unroll 6
    for (int i = 0; i < side; i++) {
      line_to_m(t + i * size, line, 1, size);
      write_elements(m + i * side * step + o, step, line, side);
    }
    *(vec *)(sum + o) += total;
  }
}

/* m = A e A' for the gradient of a convolution's output, which goes through `gate`. Adds the
   gradient's pixels to `sum`. */
static void transform_gradient(const Plan *plan, const void *gradient, Gate gate, long tile,
                               float *m, long step, float *sum) {
  const void *pixels[MOST_PIXELS], *outputs[MOST_PIXELS];
  const uint8_t *maxima[MOST_PIXELS];
  long places[MOST_PIXELS], O = plan->O;
  int n = gate.maxima ? plan->size / 2 : plan->size;
  find(plan, gate.maxima != NULL, tile, 0, n, places);
  locate(plan, gradient, O, n, places, pixels);
  if (gate.maxima) {
    locate_maxima(plan, gate.maxima, O, n, places, maxima);
    FOR_KIND_OF(plan, transform_output_gradient, O, pixels, NULL, maxima, m, step, sum);
  } else {
    locate(plan, gate.outputs, O, n, places, outputs);
    FOR_KIND_OF(plan, transform_output_gradient, O, pixels, outputs, NULL, m, step, sum);
  }
}

/* The maximum of the four pixels of a pooling square, and in `mask` the bits of the pixels that have
   it. */
static INLINE vec maximum_of(const vec *s, int_vec *mask) {
  vec most = s[0];
  /* The comparisons, here and below, are written in the directions that let a NaN through. */
#pragma GCC unroll 3
  for (int i = 1; i < 4; i++) most = choose((s[i] > most) | (s[i] != s[i]), s[i], most);
  *mask = ((s[0] == most) & 1) | ((s[1] == most) & 2) | ((s[2] == most) & 4) | ((s[3] == most) & 8);
  return most;
}

/* s = A' m A + bias, the tile's output pixels, for each of O channels. Writes max(s, least) for each
   pixel: a ReLU if `least` is 0, and s itself if it is -INFINITY. With `maxima`, which needs tiles of
   2x2, writes only the largest of the four, and sets the bits of the pixels that have it; none if it
   is not above `least`, because then ReLU lets no gradient through. */
static INLINE void transform_back(long O, const float *m, long step, const void *bias, float least,
                                  void **y, uint8_t *maxima, int size, int bf16) {
  const int side = size + 2;
  const vec bound = (vec){0} + least;
  for (long o = 0; o < O; o += LANES) {
    long n = min(O - o, LANES);
    vec t[24], s[16], line[6], b = read_pixels(bias, o, 1, n, bf16);
#pragma GCC unroll 6
    for (int j = 0; j < side; j++) {
#pragma GCC unroll 6
      for (int i = 0; i < side; i++) line[i] = *(const vec *)(m + (i * side + j) * step + o);
      line_from_m(line, t + j, side, size);
    }
#pragma GCC unroll 4
    for (int i = 0; i < size; i++) line_from_m(t + i * side, s + i * size, 1, size);
#pragma GCC unroll 16
    for (int i = 0; i < size * size; i++) s[i] = round_to_pixels(s[i] + b, bf16);
    if (maxima) {
      int_vec mask;
      vec most = maximum_of(s, &mask);
      write_pixels(y[0], o, n, choose(most < bound, bound, most), bf16);
      write_bytes(maxima + o, n, __builtin_convertvector(mask & (most > bound), byte_vec));
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < size * size; i++)
        write_pixels(y[i], o, n, choose(s[i] < bound, bound, s[i]), bf16);
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

/* Writes a tile's output for the n channels from `from` on, or its maximum if pooling follows. Pixels
   outside of the image are written to `nowhere`. */
static void transform_output(const Plan *plan, const float *m, long step, const Output *output,
                             long tile, long from, long n, void *nowhere) {
  const void *bias = pixel(plan, output->bias, from);
  float least = output->least;
  if (output->maxima) {
    long at = tile * plan->O + from; /* A tile is a square. */
    void *y[1] = {(void *)pixel(plan, output->y, at)};
    if (plan->bf16)
      transform_back(n, m, step, bias, least, y, output->maxima + at, 2, 1);
    else
      transform_back(n, m, step, bias, least, y, output->maxima + at, 2, 0);
  } else {
    long places[MOST_PIXELS];
    void *y[MOST_PIXELS];
    find(plan, 0, tile, 0, plan->size, places);
    for (int i = 0; i < plan->size * plan->size; i++) {
      long at = places[i] * plan->O + from;
      y[i] = places[i] == OUTSIDE ? nowhere : (void *)pixel(plan, output->y, at);
    }
    FOR_KIND_OF(plan, transform_back, n, m, step, bias, least, y, NULL);
  }
}
