/* SAME 3x3 convolutions on a CPU by Winograd's F(2x2, 3x3), as XLA custom calls. README.md beside
   this file derives the formulas; Lavin & Gray (arXiv:1509.09308) introduced them.

   A tile is a square of 2x2 output pixels, with the 4x4 input pixels that they depend on. With d
   the input of a tile in one channel and g the 3x3 kernel of that channel,

     output = A' [(G g G') * (B' d B)] A,    ' the transpose, * the product element by element,

          [1  0 -1  0]        [ 1    0    0 ]
     B' = [0  1  1  0]    G = [1/2  1/2  1/2]    A' = [1  1  1  0]
          [0 -1  1  0]        [1/2 -1/2  1/2]         [0  1 -1 -1]
          [0  1  0 -1]        [ 0    0    1 ]

   Summed over the input channels, each of the 16 elements of the bracket is a matrix product of
   its own, [tiles, C] by [C, O]. That takes 16 multiplications where a direct convolution takes
   36, and rounds about as a direct convolution does. The gradients take the same matrices:

     input gradient  = the convolution of the output's gradient with the kernel rotated by 180
                       degrees, its input and output channels exchanged;
     kernel gradient = G' [sum over tiles of (B' d B) * (A e A')] G, e the tile's 2x2 pixels of the
                       output's gradient.

   The 2x2 output pixels of a tile are also a square of the 2x2 max pooling. So a convolution with
   pooling behind it writes only the maximum of each square, never the four pixels. For the
   gradient it also writes a byte that says which of the four were the maximum. The gradient of the
   four pixels is never written, either: it is computed wherever it is read, from this byte and the
   pooled gradient, divided among the maxima.

   Arrays are float32 and dense: images [B, H, W, C], kernels [3, 3, C, O]. The tiles are processed
   in chunks that fit the cache, on XLA's own threads. A result does not depend on which thread
   computed what, but on the number of threads, because the sum of a kernel's gradient is split into
   as many pieces. Always splitting it alike would cost a buffer of the transformed kernel's size,
   4 MB, for each of as many pieces as a large processor has threads. */

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

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

/* A thread transforms this many floats (1 MiB) of tiles before it multiplies them, so that they are
   still in the cache then; and at least MIN_CHUNK tiles. */
#define CHUNK_FLOATS (256 * 1024)
#define MIN_CHUNK (4 * ROWS)

#define INLINE inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

static long min(long a, long b) { return a < b ? a : b; }
static long max(long a, long b) { return a > b ? a : b; }
static long round_up(long n, long to) { return (n + to - 1) / to * to; }

/* ---- Memory. Buffers are kept for the next call, because fresh pages cost the system as much time
   as the computation takes. */

#define KEPT 16
static struct {
  size_t size;
  float *data;
} kept[KEPT];
static atomic_flag kept_lock = ATOMIC_FLAG_INIT;

static void lock(void) {
  while (atomic_flag_test_and_set_explicit(&kept_lock, memory_order_acquire)) sched_yield();
}
static void unlock(void) { atomic_flag_clear_explicit(&kept_lock, memory_order_release); }

/* Returns a buffer: the smallest kept one that is large enough, unless it is far too large (some 16
   times); or else a new one, which replaces the largest of those that are a little too small (by up
   to 16 times). NULL if memory has run out. */
static float *borrow(size_t floats, size_t *size) {
  float *data = NULL, *too_small = NULL;
  int fits = -1, nearly = -1;
  *size = floats;
  lock();
  for (int i = 0; i < KEPT; i++) {
    if (!kept[i].data) continue;
    if (kept[i].size >= floats && (fits < 0 || kept[i].size < kept[fits].size)) fits = i;
    if (kept[i].size < floats && (nearly < 0 || kept[i].size > kept[nearly].size)) nearly = i;
  }
  if (fits >= 0 && kept[fits].size <= 16 * floats + 65536) {
    data = kept[fits].data;
    *size = kept[fits].size;
    kept[fits].data = NULL;
  } else if (nearly >= 0 && kept[nearly].size >= floats / 16) {
    too_small = kept[nearly].data;
    kept[nearly].data = NULL;
  }
  unlock();
  free(too_small);
  if (!data && posix_memalign((void **)&data, 64, floats * sizeof(float))) data = NULL;
  return data;
}

/* Keeps a buffer for the next call; if all places are taken, the smallest one kept is freed. */
static void give_back(float *data, size_t size) {
  if (!data) return;
  lock();
  int slot = 0;
  for (int i = 0; i < KEPT; i++) {
    if (!kept[i].data) {
      slot = i;
      break;
    }
    if (kept[i].size < kept[slot].size) slot = i;
  }
  float *dropped = kept[slot].data;
  kept[slot].data = data;
  kept[slot].size = size;
  unlock();
  free(dropped);
}

/* ---- Threads. Each free thread takes the next task. The caller takes tasks too and waits only for
   tasks that have begun, so that it cannot deadlock when all of XLA's threads are busy. */

typedef void Task(void *argument, long index);
typedef struct {
  atomic_long next, finished, users;
  long count;
  Task *task;
  void *argument;
} Loop;

static void take_tasks(Loop *loop) {
  for (long i; (i = atomic_fetch_add(&loop->next, 1)) < loop->count;) {
    loop->task(loop->argument, i);
    atomic_fetch_add(&loop->finished, 1);
  }
}

/* The last to leave frees the loop: a helper may start only after the caller has returned. */
static void leave(Loop *loop) {
  if (atomic_fetch_sub(&loop->users, 1) == 1) free(loop);
}

static void help(void *loop) {
  take_tasks(loop);
  leave(loop);
}

static long num_threads(const XLA_FFI_CallFrame *frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
      .ctx = frame->ctx,
      .num_threads = &threads};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&args);
  if (error) {
    XLA_FFI_Error_Destroy_Args destroy = {
        .struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
    frame->api->XLA_FFI_Error_Destroy(&destroy);
    return 1;
  }
  return max(threads, 1);
}

/* Calls task(argument, i) for i = 0 to count - 1 on XLA's threads and waits for all. */
static void parallel_for(const XLA_FFI_CallFrame *frame, long count, Task *task, void *argument) {
  long helpers = min(num_threads(frame), count) - 1;
  Loop *loop = helpers > 0 ? malloc(sizeof *loop) : NULL;
  if (!loop) {
    for (long i = 0; i < count; i++) task(argument, i);
    return;
  }
  atomic_init(&loop->next, 0);
  atomic_init(&loop->finished, 0);
  atomic_init(&loop->users, helpers + 1);
  loop->count = count;
  loop->task = task;
  loop->argument = argument;
  for (long i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {
        .struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
        .ctx = frame->ctx,
        .task = help,
        .data = loop};
    if (frame->api->XLA_FFI_ThreadPool_Schedule(&args)) leave(loop);
  }
  take_tasks(loop);
  while (atomic_load(&loop->finished) < count) sched_yield();
  leave(loop);
}

/* ---- Matrix product */

/* c[r][n] = sum over d of a[r][d] b[d][n], or += with `add`, for ROWS x COLUMNS elements. */
static INLINE void product_block(
    long depth, const float *a, long a_row, long a_depth, const float *b, long b_depth, float *c,
    long c_row, int add) {
  vec sum[ROWS][2];
  for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = (vec){0};
  for (long d = 0; d < depth; d++) {
    vec left = *(const vec *)(b + d * b_depth), right = *(const vec *)(b + d * b_depth + LANES);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
      float factor = a[r * a_row + d * a_depth];
      sum[r][0] += factor * left;
      sum[r][1] += factor * right;
    }
  }
  for (int r = 0; r < ROWS; r++) {
    vec *to = (vec *)(c + r * c_row), *to_right = (vec *)(c + r * c_row + LANES);
    *to = add ? *to + sum[r][0] : sum[r][0];
    *to_right = add ? *to_right + sum[r][1] : sum[r][1];
  }
}

/* c = or += a b for a [M, K] and b [K, N]. M is a multiple of ROWS, N of COLUMNS; b is stored in
   panels of COLUMNS columns. */
static void product(long M, long N, long K, const float *a, long a_row, long a_depth,
                    const float *b, long b_panel, long b_depth, float *c, long c_row, int add) {
  for (long n = 0; n < N; n += COLUMNS)
    for (long m = 0; m < M; m += ROWS)
      product_block(K, a + m * a_row, a_row, a_depth, b + n / COLUMNS * b_panel, b_depth,
                    c + m * c_row + n, c_row, add);
}

/* ---- Tiles */

typedef struct {
  long B, H, W, C, O;
  long tiles_h, tiles_w, tiles;
  long O_up;   /* O, rounded up to whole panels */
  long chunk;  /* tiles in a chunk, a multiple of ROWS */
  long chunks; /* number of chunks */
  /* Distance in floats from one of a tile's 16 elements to the next: */
  long v_step;        /* in v, the transformed input */
  long m_step;        /* in m, the transformed output or its gradient */
  long u_step;        /* in u, the transformed kernel */
  const float *zeros; /* stands for the pixels outside of an image */
  atomic_int failed;  /* whether memory ran out */
} Plan;

/* Plans a convolution of images [B, H, W, any] from C to O channels. `only_squares` leaves out an
   odd last row or column, which belongs to no square of the pooling. */
static void make_plan(Plan *plan, const int64_t *images, long C, long O, int only_squares,
                      const float *zeros) {
  plan->B = images[0], plan->H = images[1], plan->W = images[2];
  plan->C = C;
  plan->O = O;
  plan->O_up = round_up(O, COLUMNS);
  plan->tiles_h = (plan->H + !only_squares) / 2;
  plan->tiles_w = (plan->W + !only_squares) / 2;
  plan->tiles = plan->B * plan->tiles_h * plan->tiles_w;
  plan->chunk = max(CHUNK_FLOATS / (16 * (plan->C + plan->O_up)), MIN_CHUNK);
  plan->chunks = (plan->tiles + plan->chunk - 1) / plan->chunk;
  plan->chunk = round_up((plan->tiles + plan->chunks - 1) / plan->chunks, ROWS);
  plan->chunks = (plan->tiles + plan->chunk - 1) / plan->chunk;
  /* The extra 16 floats keep the 16 streams from falling into the same sets of the cache. */
  plan->v_step = plan->chunk * plan->C + ROWS + 16;
  plan->m_step = plan->chunk * plan->O_up + 16;
  plan->u_step = plan->C * plan->O_up + 16;
  plan->zeros = zeros;
  atomic_init(&plan->failed, 0);
}

/* Finds the tile's pixels: the n x n addresses of rows and columns `from` to `from` + n - 1,
   counted from the tile's first output pixel. Pixels outside of the image lie in `zeros`. */
static void locate(const Plan *plan, const float *x, long channels, long tile, int from, int n,
                   const float **pixels) {
  long column = tile % plan->tiles_w, row = tile / plan->tiles_w % plan->tiles_h;
  const float *image = x + tile / (plan->tiles_w * plan->tiles_h) * plan->H * plan->W * channels;
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++) {
      long h = 2 * row + from + i, w = 2 * column + from + j;
      int inside = 0 <= h && h < plan->H && 0 <= w && w < plan->W;
      pixels[i * n + j] = inside ? image + (h * plan->W + w) * channels : plan->zeros;
    }
}

/* Where a gradient goes through; one of the two is NULL:
     `outputs`, those of the ReLU, let it through where they are positive;
     `maxima`, a byte for each pooling square, let it through to pixel (i, j) if bit 2i + j is 1. */
typedef struct {
  const float *outputs;
  const uint8_t *maxima;
} Gate;

/* The gradient of one pixel of a pooling square: `gradient_share`, the square's gradient divided by
   its number of maxima, if the pixel is one of them. The value is read in any case, here and below,
   because the compiler would turn a conditional read into a jump. */
static INLINE float through_pooling(const float *gradient_share, const uint8_t *maxima, int pixel,
                                    long c) {
  float value = gradient_share[c];
  return maxima[c] >> pixel & 1 ? value : 0;
}

/* The gradient of one pixel before a ReLU, whose output was y. */
static INLINE float through_relu(const float *gradient, const float *y, long c) {
  float value = gradient[c];
  return y[c] > 0 ? value : 0;
}

/* v = B' d B for each channel, d being the 4x4 pixels of a tile:
     with neither `outputs` nor `maxima`, the pixels themselves;
     with `outputs`, a gradient behind a ReLU, let through where the outputs are positive;
     with `maxima`, a pooled gradient, of which `d` holds the 3x3 squares that the 4x4 pixels lie in
     (the tile's own square, and one row or column of each of its neighbours). */
static INLINE void transform_4x4(const Plan *plan, const float **d, const float **outputs,
                                 const uint8_t **maxima, float *v) {
  long step = plan->v_step;
#pragma omp simd
  for (long c = 0; c < plan->C; c++) {
    float t[16];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      float a, b, e, f;
      if (maxima) {
        int k = (j + 1) / 2, right = (j + 1) % 2;
        a = through_pooling(d[k], maxima[k], 2 + right, c);
        b = through_pooling(d[3 + k], maxima[3 + k], right, c);
        e = through_pooling(d[3 + k], maxima[3 + k], 2 + right, c);
        f = through_pooling(d[6 + k], maxima[6 + k], right, c);
      } else if (outputs) {
        a = through_relu(d[j], outputs[j], c);
        b = through_relu(d[4 + j], outputs[4 + j], c);
        e = through_relu(d[8 + j], outputs[8 + j], c);
        f = through_relu(d[12 + j], outputs[12 + j], c);
      } else {
        a = d[j][c], b = d[4 + j][c], e = d[8 + j][c], f = d[12 + j][c];
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

static void transform_input(const Plan *plan, const float *x, long tile, float *v) {
  const float *pixels[16];
  locate(plan, x, plan->C, tile, -1, 4, pixels);
  transform_4x4(plan, pixels, NULL, NULL, v);
}

static void transform_relu_gradient(const Plan *plan, const float *gradient, const float *y,
                                    long tile, float *v) {
  const float *pixels[16], *outputs[16];
  locate(plan, gradient, plan->C, tile, -1, 4, pixels);
  locate(plan, y, plan->C, tile, -1, 4, outputs);
  transform_4x4(plan, pixels, outputs, NULL, v);
}

static void transform_pooled_gradient(const Plan *plan, const float *gradient_share,
                                      const uint8_t *maxima, long tile, float *v) {
  const float *shares[9];
  const uint8_t *masks[9];
  long H = plan->H / 2, W = plan->W / 2;
  long column = tile % plan->tiles_w, row = tile / plan->tiles_w % plan->tiles_h;
  long image = tile / (plan->tiles_w * plan->tiles_h);
  for (int i = 0; i < 3; i++)
    for (int j = 0; j < 3; j++) {
      long h = row - 1 + i, w = column - 1 + j, at = ((image * H + h) * W + w) * plan->C;
      int inside = 0 <= h && h < H && 0 <= w && w < W;
      shares[3 * i + j] = inside ? gradient_share + at : plan->zeros;
      masks[3 * i + j] = inside ? maxima + at : (const uint8_t *)plan->zeros;
    }
  transform_4x4(plan, shares, NULL, masks, v);
}

/* m = A e A' for each channel, e being the gradient of the tile's 2x2 output pixels: `g`, let
   through where the ReLU's `outputs` are positive; or with `maxima`, the square's `g[0]`, let
   through to the maxima. */
static INLINE void transform_2x2(const Plan *plan, const float **g, const float **outputs,
                                 const uint8_t *maxima, float *m) {
  long step = plan->m_step;
#pragma omp simd
  for (long o = 0; o < plan->O; o++) {
    float t[8];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      float a, b;
      if (maxima)
        a = through_pooling(g[0], maxima, j, o), b = through_pooling(g[0], maxima, 2 + j, o);
      else
        a = through_relu(g[j], outputs[j], o), b = through_relu(g[2 + j], outputs[2 + j], o);
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
  for (int k = 0; k < 16; k++)
    for (long o = plan->O; o < plan->O_up; o++) m[k * step + o] = 0;
}

static void transform_gradient(const Plan *plan, const float *gradient, Gate gate, long tile,
                               float *m) {
  const float *pixels[4] = {gradient + tile * plan->O}, *outputs[4];
  if (gate.maxima) {
    transform_2x2(plan, pixels, NULL, gate.maxima + tile * plan->O, m);
  } else {
    locate(plan, gradient, plan->O, tile, 0, 2, pixels);
    locate(plan, gate.outputs, plan->O, tile, 0, 2, outputs);
    transform_2x2(plan, pixels, outputs, NULL, m);
  }
}

/* s = A' m A + bias, the tile's 2x2 output pixels, for each channel from `from` to `to` - 1. Writes
   max(s, least) for each pixel: a ReLU if `least` is 0, and s itself if it is -INFINITY. With
   `maxima`, writes only the largest of the four, and sets the bits of the pixels that have it; none
   if it is not above `least`, because then ReLU lets no gradient through. */
static INLINE void transform_back(const Plan *plan, const float *m, const float *bias, float least,
                                  long from, long to, float **y, uint8_t *maxima) {
  long step = plan->m_step;
#pragma omp simd
  for (long o = from; o < to; o++) {
    float t[8], s[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      float a = m[j * step + o], b = m[(4 + j) * step + o], e = m[(8 + j) * step + o],
            f = m[(12 + j) * step + o];
      t[j] = a + b + e, t[4 + j] = b - e - f;
    }
    s[0] = t[0] + t[1] + t[2] + bias[o], s[1] = t[1] - t[2] - t[3] + bias[o];
    s[2] = t[4] + t[5] + t[6] + bias[o], s[3] = t[5] - t[6] - t[7] + bias[o];
    /* The comparisons are written in the directions that let a NaN through to the output. */
    if (maxima) {
      float most = s[0];
#pragma GCC unroll 3
      for (int i = 1; i < 4; i++) most = (s[i] > most) | (s[i] != s[i]) ? s[i] : most;
      int mask = (s[0] == most) | (s[1] == most) << 1 | (s[2] == most) << 2 | (s[3] == most) << 3;
      y[0][o] = most < least ? least : most;
      maxima[o] = most > least ? mask : 0;
    } else {
#pragma GCC unroll 4
      for (int i = 3; i >= 0; i--) y[i][o] = s[i] < least ? least : s[i];
    }
  }
}

/* Writes the pixels of a tile; those outside of the image are written to `nowhere`. */
static void transform_output(const Plan *plan, const float *m, long tile, const float *bias,
                             float least, long from, long to, float *y, float *nowhere) {
  const float *pixels[4];
  locate(plan, y, plan->O, tile, 0, 2, pixels);
  float *out[4];
  for (int i = 0; i < 4; i++) out[i] = pixels[i] == plan->zeros ? nowhere : y + (pixels[i] - y);
  transform_back(plan, m, bias, least, from, to, out, NULL);
}

static void transform_and_pool(const Plan *plan, const float *m, const float *bias, float least,
                               long from, long to, float *y, uint8_t *maxima) {
  transform_back(plan, m, bias, least, from, to, &y, maxima);
}

/* ---- The convolution */

typedef struct {
  Plan plan;
  const float *x, *kernel, *bias;
  Gate x_gate;     /* where x, if it is a gradient, goes through */
  float least;     /* lower bound of the output: 0 for a ReLU */
  float *u, *y;    /* u is NULL if each task transforms the panels that it needs */
  uint8_t *maxima; /* of the pooling; NULL if none follows */
  long groups;     /* groups of panels: more tasks where there are fewer chunks than threads */
  /* How this convolution reads the kernel [3, 3, in, out]: the offset of its first element, and the
     strides. A rotated kernel begins at the last of the nine and has a negative stride. */
  long first, tap, in, out;
} Forward;

/* u = G g G' for one panel of output channels: [C, COLUMNS] for each of the 16 elements. */
static INLINE void transform_kernel_panel(
    const Forward *f, long panel, long out, float *u, long step) {
  long columns = min(f->plan.O - panel * COLUMNS, COLUMNS), tap = f->tap;
  for (long c = 0; c < f->plan.C; c++, u += COLUMNS) {
    const float *g = f->kernel + f->first + c * f->in + panel * COLUMNS * out;
    if (columns < COLUMNS)
      for (int k = 0; k < 16; k++) memset(u + k * step, 0, COLUMNS * sizeof(float));
#pragma omp simd
    for (long n = 0; n < columns; n++) {
      float t[12];
#pragma GCC unroll 3
      for (int j = 0; j < 3; j++) {
        float a = g[n * out + j * tap], b = g[n * out + (3 + j) * tap],
              e = g[n * out + (6 + j) * tap];
        t[j] = a, t[9 + j] = e;
        t[3 + j] = 0.5f * (a + e + b), t[6 + j] = 0.5f * (a + e - b);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        float a = t[3 * i], b = t[3 * i + 1], e = t[3 * i + 2];
        u[(4 * i) * step + n] = a;
        u[(4 * i + 1) * step + n] = 0.5f * (a + e + b);
        u[(4 * i + 2) * step + n] = 0.5f * (a + e - b);
        u[(4 * i + 3) * step + n] = e;
      }
    }
  }
}

/* With the stride 1 as a constant, the compiler reads whole vectors of the kernel. */
static void transform_panel(const Forward *f, long panel, float *u, long step) {
  if (f->out == 1)
    transform_kernel_panel(f, panel, 1, u, step);
  else
    transform_kernel_panel(f, panel, f->out, u, step);
}

static void transform_kernel(void *argument, long panel) {
  const Forward *f = argument;
  transform_panel(f, panel, f->u + panel * f->plan.C * COLUMNS, f->plan.u_step);
}

/* Convolves one chunk of the tiles for one group of the panels of output channels: transforms the
   input, takes the 16 matrix products m = v u, and transforms back. */
static void convolve_chunk(void *argument, long index) {
  Forward *f = argument;
  Plan *plan = &f->plan;
  /* With one chunk no other task needs the transformed panels, so only one at a time is kept. */
  long u_step = f->u ? plan->u_step : plan->C * COLUMNS + 16;
  size_t size;
  float *v = borrow(16 * (plan->v_step + plan->m_step + (f->u ? 0 : u_step)) + plan->O, &size);
  if (!v) {
    atomic_store(&plan->failed, 1);
    return;
  }
  float *m = v + 16 * plan->v_step, *one_panel = m + 16 * plan->m_step;
  float *nowhere = one_panel + (f->u ? 0 : 16 * u_step);
  long panels = plan->O_up / COLUMNS, group = index % f->groups;
  long panel = panels * group / f->groups, end = panels * (group + 1) / f->groups;
  long first = index / f->groups * plan->chunk, n = min(plan->chunk, plan->tiles - first);
  long from = panel * COLUMNS, to = min(end * COLUMNS, plan->O);
  for (long t = 0; t < n; t++)
    if (f->x_gate.maxima)
      transform_pooled_gradient(plan, f->x, f->x_gate.maxima, first + t, v + t * plan->C);
    else if (f->x_gate.outputs)
      transform_relu_gradient(plan, f->x, f->x_gate.outputs, first + t, v + t * plan->C);
    else
      transform_input(plan, f->x, first + t, v + t * plan->C);
  for (long p = panel; p < end; p = f->u ? end : p + 1) {
    const float *u = f->u ? f->u + p * plan->C * COLUMNS : one_panel;
    if (!f->u) transform_panel(f, p, one_panel, u_step);
    for (int k = 0; k < 16; k++)
      product(round_up(n, ROWS), f->u ? (end - p) * COLUMNS : COLUMNS, plan->C,
              v + k * plan->v_step, plan->C, 1, u + k * u_step, plan->C * COLUMNS, COLUMNS,
              m + k * plan->m_step + p * COLUMNS, plan->O_up, 0);
  }
  for (long t = 0; t < n; t++)
    if (f->maxima)
      transform_and_pool(plan, m + t * plan->O_up, f->bias, f->least, from, to,
                         f->y + (first + t) * plan->O, f->maxima + (first + t) * plan->O);
    else
      transform_output(plan, m + t * plan->O_up, first + t, f->bias, f->least, from, to, f->y,
                       nowhere);
  give_back(v, size);
}

/* ---- The gradient of kernel and bias */

typedef struct {
  Plan plan;
  const float *x, *gradient;
  Gate gate;   /* where the gradient goes through */
  float *sums; /* for each piece, v' m [16, C_up, O_up] and the gradient's sum [O_up] */
  float *of_kernel, *of_bias;
  long pieces, C_up;             /* C_up: C, rounded up to a multiple of ROWS */
  long product_size, piece_size; /* in floats */
} ParameterGradient;

/* Writes the gradient's sum over some tiles to `total`, or adds it. Element (1, 1) of A e A', the
   sixth of the 16, is the sum of the tile's four pixels, because row 1 of A is [1, 1]. */
static void sum_gradient(const Plan *plan, const float *m, long tiles, float *sum, float *total,
                         int add) {
  memset(sum, 0, plan->O_up * sizeof(float));
  for (long t = 0; t < tiles; t++)
#pragma omp simd
    for (long o = 0; o < plan->O_up; o++) sum[o] += m[5 * plan->m_step + t * plan->O_up + o];
#pragma omp simd
  for (long o = 0; o < plan->O_up; o++) total[o] = add ? total[o] + sum[o] : sum[o];
}

/* Sums v' m over one piece of the tiles: for each of the 16 elements [C, tiles] by [tiles, O], v
   being B' d B and m being A e A'. Where a piece begins and ends does not depend on the thread that
   computes it, so that the sum is the same in every run. */
static void sum_piece(void *argument, long index) {
  ParameterGradient *f = argument;
  Plan *plan = &f->plan;
  size_t size;
  float *v = borrow(16 * (plan->v_step + plan->m_step) + plan->O_up, &size);
  if (!v) {
    atomic_store(&plan->failed, 1);
    return;
  }
  float *m = v + 16 * plan->v_step;
  float *sums = f->sums + index * f->piece_size;
  long begin = plan->tiles * index / f->pieces, end = plan->tiles * (index + 1) / f->pieces;
  memset(v, 0, 16 * plan->v_step * sizeof(float));
  for (long first = begin; first < end; first += plan->chunk) {
    long n = min(plan->chunk, end - first);
    for (long t = 0; t < n; t++) {
      transform_input(plan, f->x, first + t, v + t * plan->C);
      transform_gradient(plan, f->gradient, f->gate, first + t, m + t * plan->O_up);
    }
    for (int k = 0; k < 16; k++)
      product(f->C_up, plan->O_up, n, v + k * plan->v_step, 1, plan->C, m + k * plan->m_step,
              COLUMNS, plan->O_up, sums + k * f->product_size, plan->O_up, first > begin);
    sum_gradient(plan, m, n, m + 16 * plan->m_step, sums + 16 * f->product_size, first > begin);
  }
  give_back(v, size);
}

/* The kernel's gradient G' s G for one input channel, s being the sum of all pieces. */
static void transform_sums(void *argument, long c) {
  ParameterGradient *f = argument;
  long O = f->plan.O, tap = f->plan.C * O;
  float *to = f->of_kernel + c * O;
#pragma omp simd
  for (long o = 0; o < O; o++) {
    float s[16], t[12];
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) s[k] = 0;
    for (long piece = 0; piece < f->pieces; piece++) {
      const float *sums = f->sums + piece * f->piece_size + c * f->plan.O_up + o;
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++) s[k] += sums[k * f->product_size];
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      float a = s[j], b = 0.5f * (s[4 + j] + s[8 + j]), e = 0.5f * (s[4 + j] - s[8 + j]);
      t[j] = a + b, t[4 + j] = e, t[8 + j] = b + s[12 + j];
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
      float a = t[4 * i], b = 0.5f * (t[4 * i + 1] + t[4 * i + 2]),
            e = 0.5f * (t[4 * i + 1] - t[4 * i + 2]);
      to[(3 * i) * tap + o] = a + b;
      to[(3 * i + 1) * tap + o] = e;
      to[(3 * i + 2) * tap + o] = b + t[4 * i + 3];
    }
  }
}

/* The bias's gradient: the output's gradient, summed over all pixels. */
static void sum_bias(const ParameterGradient *f) {
  for (long o = 0; o < f->plan.O; o++) {
    f->of_bias[o] = 0;
    for (long piece = 0; piece < f->pieces; piece++)
      f->of_bias[o] += f->sums[piece * f->piece_size + 16 * f->product_size + o];
  }
}

/* ---- The functions that XLA calls */

static const XLA_FFI_Buffer *argument(const XLA_FFI_CallFrame *frame, int i) {
  return frame->args.args[i];
}

static const XLA_FFI_Buffer *result(const XLA_FFI_CallFrame *frame, int i) {
  return frame->rets.rets[i];
}

/* XLA first calls a handler to ask for its interface's version. Answers, and returns 1 then. */
static int answers_metadata_query(XLA_FFI_CallFrame *frame) {
  /* The extension's type is named XLA_FFI_Extension_Base up to jax 0.10, and
     XLA_FFI_InternalExtension after. */
  __auto_type extension = frame->extension_start;
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return 1;
}

static XLA_FFI_Error *out_of_memory(const XLA_FFI_CallFrame *frame) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = "no memory left for a convolution",
                                    .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return frame->api->XLA_FFI_Error_Create(&args);
}

/* Runs the convolution that `f` describes, but for its plan and its view of the kernel, which are
   made here. `rotated` rotates the kernel by 180 degrees and exchanges its channels. */
static XLA_FFI_Error *convolve(const XLA_FFI_CallFrame *frame, Forward *f, const int64_t *images,
                               const XLA_FFI_Buffer *kernel, int rotated) {
  const int64_t *dims = kernel->dims; /* [3, 3, C, O] */
  f->kernel = kernel->data;
  f->tap = rotated ? -dims[2] * dims[3] : dims[2] * dims[3];
  f->first = rotated ? 8 * dims[2] * dims[3] : 0;
  f->in = rotated ? 1 : dims[3];
  f->out = rotated ? dims[3] : 1;
  long C = dims[rotated ? 3 : 2], O = dims[rotated ? 2 : 3], threads = num_threads(frame);
  size_t u_size, zeros_size;
  float *zeros = borrow(max(C, O), &zeros_size);
  make_plan(&f->plan, images, C, O, f->maxima != NULL, zeros);
  if (!f->bias) f->bias = zeros;
  f->groups = min(f->plan.O_up / COLUMNS, (threads + f->plan.chunks - 1) / f->plan.chunks);
  int shared = f->plan.chunks > 1;
  f->u = shared ? borrow(16 * f->plan.u_step, &u_size) : NULL;
  if (zeros && (f->u || !shared)) {
    memset(zeros, 0, max(C, O) * sizeof(float));
    if (shared) parallel_for(frame, f->plan.O_up / COLUMNS, transform_kernel, f);
    parallel_for(frame, f->plan.chunks * f->groups, convolve_chunk, f);
  }
  int failed = !zeros || (shared && !f->u) || atomic_load(&f->plan.failed);
  give_back(zeros, zeros_size);
  if (shared) give_back(f->u, u_size);
  return failed ? out_of_memory(frame) : NULL;
}

/* relu(convolution + bias): (images [B, H, W, C], kernel [3, 3, C, O], bias [O]) -> [B, H, W, O] */
XLA_FFI_Error *tinyvgg_convolution_relu(XLA_FFI_CallFrame *frame) {
  if (answers_metadata_query(frame)) return NULL;
  const XLA_FFI_Buffer *x = argument(frame, 0);
  Forward f = {.x = x->data, .bias = argument(frame, 2)->data, .y = result(frame, 0)->data};
  return convolve(frame, &f, x->dims, argument(frame, 1), 0);
}

/* The same with 2x2 max pooling -> [B, H / 2, W / 2, O], and the maxima, uint8 of the same shape */
XLA_FFI_Error *tinyvgg_convolution_relu_pool(XLA_FFI_CallFrame *frame) {
  if (answers_metadata_query(frame)) return NULL;
  const XLA_FFI_Buffer *x = argument(frame, 0);
  Forward f = {.x = x->data,
               .bias = argument(frame, 2)->data,
               .y = result(frame, 0)->data,
               .maxima = result(frame, 1)->data};
  return convolve(frame, &f, x->dims, argument(frame, 1), 0);
}

/* Reads the gate of a gradient of the same shape: float32, the outputs of the ReLU; or uint8, the
   maxima of the pooling, where the gradient is already divided by their number. */
static Gate gate_of(const XLA_FFI_Buffer *buffer) {
  if (buffer->dtype == XLA_FFI_DataType_U8) return (Gate){.maxima = buffer->data};
  return (Gate){.outputs = buffer->data};
}

/* The gradient of the images: (gradient [B, h, w, O], gate [B, h, w, O], kernel [3, 3, C, O]) ->
   [B, H, W, C] */
XLA_FFI_Error *tinyvgg_input_gradient(XLA_FFI_CallFrame *frame) {
  if (answers_metadata_query(frame)) return NULL;
  const XLA_FFI_Buffer *y = result(frame, 0);
  Forward f = {.x = argument(frame, 0)->data,
               .x_gate = gate_of(argument(frame, 1)),
               .least = -INFINITY,
               .y = y->data};
  return convolve(frame, &f, y->dims, argument(frame, 2), 1);
}

/* The gradients of kernel and bias: (images [B, H, W, C], gradient [B, h, w, O], gate [B, h, w, O])
   -> [3, 3, C, O], [O] */
XLA_FFI_Error *tinyvgg_parameter_gradient(XLA_FFI_CallFrame *frame) {
  if (answers_metadata_query(frame)) return NULL;
  const XLA_FFI_Buffer *x = argument(frame, 0), *gradient = argument(frame, 1);
  ParameterGradient f = {.x = x->data,
                         .gradient = gradient->data,
                         .gate = gate_of(argument(frame, 2)),
                         .of_kernel = result(frame, 0)->data,
                         .of_bias = result(frame, 1)->data};
  long C = x->dims[3], O = gradient->dims[3], channels = max(C, O);
  size_t sums_size, zeros_size;
  float *zeros = borrow(channels, &zeros_size);
  make_plan(&f.plan, x->dims, C, O, f.gate.maxima != NULL, zeros);
  f.C_up = round_up(f.plan.C, ROWS);
  f.pieces = min(num_threads(frame), f.plan.chunks);
  f.product_size = f.C_up * f.plan.O_up + 16;
  f.piece_size = 16 * f.product_size + f.plan.O_up;
  f.sums = borrow(f.pieces * f.piece_size, &sums_size);
  if (zeros && f.sums) {
    memset(zeros, 0, channels * sizeof(float));
    parallel_for(frame, f.pieces, sum_piece, &f);
    parallel_for(frame, f.plan.C, transform_sums, &f);
    sum_bias(&f);
  }
  int failed = !zeros || !f.sums || atomic_load(&f.plan.failed);
  give_back(zeros, zeros_size);
  give_back(f.sums, sums_size);
  return failed ? out_of_memory(frame) : NULL;
}
