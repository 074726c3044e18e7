/* SAME 3x3 convolutions on a CPU by Winograd's F(2x2, 3x3), as XLA custom calls.

   Two by two output pixels and the four by four input pixels that they see are a tile. A tile
   is transformed to 16 numbers a channel; there the convolution is a product by the transformed
   kernel, one matrix product for each of the 16 (Lavin & Gray, arXiv:1509.09308). That is 2.25
   times fewer multiplications, and rounds about as a direct convolution does. The input's
   gradient is the convolution with the turned kernel, and the kernel's gradient is a sum over
   tiles of products in the same 16 numbers.

   The two by two output pixels of a tile are a square of the pooling, too. So a convolution with
   pooling behind it never writes what is pooled: only the maxima, and for the gradient a byte that
   says which of the four they were. The gradient of what is pooled is never written, either: it is
   made, where it is read, from these bytes and the share of the gradient that each maximum gets.

   Arrays are float32 and dense: images [B, H, W, C], kernels [3, 3, C, O]. Tiles go through
   in chunks that stay in the cache, spread over XLA's own threads. A result does not depend on
   which thread computed what, but on their number: it is the number of pieces into which the sum
   of a kernel's gradient is split. Splitting it always alike would cost a buffer of the kernel's
   size, 4 MB, for each of as many pieces as a large processor has threads. */

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

/* The matrix product keeps ROWS x COLUMNS sums in registers. */
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

/* Floats of transformed tiles that a thread works on at a time, and tiles at the least. */
#define CHUNK_FLOATS (256 * 1024)
#define MIN_CHUNK (4 * ROWS)

#define INLINE inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

static long min(long a, long b) { return a < b ? a : b; }
static long max(long a, long b) { return a > b ? a : b; }
static long round_up(long n, long to) { return (n + to - 1) / to * to; }

/* ---- Memory: buffers are kept for the next call, because fresh pages cost as much as the work. */

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

/* A buffer: the smallest kept one that will do, or else a new one instead of the largest that is
   a little too small. NULL where there is no memory. */
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

/* ---- Threads: tasks are taken by whoever is free; the caller never waits for one not begun. */

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

/* c[r][n] = or += sum over d of a[r, d] b[d][n], for ROWS x COLUMNS. */
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

/* M is a multiple of ROWS, N of COLUMNS; b comes in panels of COLUMNS columns. */
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
  long O_up;       /* O, rounded up to whole panels */
  long chunk;      /* tiles at a time, a multiple of ROWS */
  long chunks;
  long v_step;     /* from one of the 16 to the next, in floats: transformed input, */
  long m_step;     /* transformed output, */
  long u_step;     /* transformed kernel */
  const float *zeros;
  atomic_int failed; /* for want of memory */
} Plan;

/* Convolutions from C to O channels of images [B, H, W, any]. Of an odd number of rows or columns
   the last is in no square of a pooling. */
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
  /* The odd 16: or the 16 streams would fall on the same lines of the cache. */
  plan->v_step = plan->chunk * plan->C + ROWS + 16;
  plan->m_step = plan->chunk * plan->O_up + 16;
  plan->u_step = plan->C * plan->O_up + 16;
  plan->zeros = zeros;
  atomic_init(&plan->failed, 0);
}

/* Where the tile's pixels lie: rows and columns `from` to `from` + n - 1 of the tile. */
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

/* What a gradient passed on its way here, the other being NULL: a ReLU with these outputs, or after
   it a pooling with these maxima, a byte a square. */
typedef struct {
  const float *outputs;
  const uint8_t *maxima;
} Passed;

/* A pixel of a pooled gradient: the square's share, if the pixel is one of the square's maxima. The
   value is read in any case, here and below, or the compiler would make a jump of the condition. */
static INLINE float share_of(const float *share, const uint8_t *maxima, int pixel, long c) {
  float value = share[c];
  return maxima[c] >> pixel & 1 ? value : 0;
}

/* A pixel of the gradient of a ReLU, whose output was y. */
static INLINE float through_relu(const float *gradient, const float *y, long c) {
  float value = gradient[c];
  return y[c] > 0 ? value : 0;
}

/* v = B' d B for each channel, d the tile's 4x4 pixels; of a ReLU's gradient, if `outputs` is not
   NULL; or if `maxima` is not NULL, parts of the 3x3 squares `d` of a pooled gradient. */
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
        a = share_of(d[k], maxima[k], 2 + right, c);
        b = share_of(d[3 + k], maxima[3 + k], right, c);
        e = share_of(d[3 + k], maxima[3 + k], 2 + right, c);
        f = share_of(d[6 + k], maxima[6 + k], right, c);
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

static void transform_pooled_gradient(const Plan *plan, const float *share, const uint8_t *maxima,
                                      long tile, float *v) {
  const float *shares[9];
  const uint8_t *which[9];
  long H = plan->H / 2, W = plan->W / 2;
  long column = tile % plan->tiles_w, row = tile / plan->tiles_w % plan->tiles_h;
  long image = tile / (plan->tiles_w * plan->tiles_h);
  for (int i = 0; i < 3; i++)
    for (int j = 0; j < 3; j++) {
      long h = row - 1 + i, w = column - 1 + j, at = ((image * H + h) * W + w) * plan->C;
      int inside = 0 <= h && h < H && 0 <= w && w < W;
      shares[3 * i + j] = inside ? share + at : plan->zeros;
      which[3 * i + j] = inside ? maxima + at : (const uint8_t *)plan->zeros;
    }
  transform_4x4(plan, shares, NULL, which, v);
}

/* m = A g A' for each channel, g the gradient of the tile's 2x2 output pixels: of the ReLU whose
   outputs these are; or if `maxima` is not NULL, of a pooling, g[0] being the square's. */
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
        a = share_of(g[0], maxima, j, o), b = share_of(g[0], maxima, 2 + j, o);
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

static void transform_gradient(const Plan *plan, const float *gradient, Passed passed, long tile,
                               float *m) {
  const float *pixels[4] = {gradient + tile * plan->O}, *outputs[4];
  if (passed.maxima) {
    transform_2x2(plan, pixels, NULL, passed.maxima + tile * plan->O, m);
  } else {
    locate(plan, gradient, plan->O, tile, 0, 2, pixels);
    locate(plan, passed.outputs, plan->O, tile, 0, 2, outputs);
    transform_2x2(plan, pixels, outputs, NULL, m);
  }
}

/* s = A' m A + bias, the tile's 2x2 output pixels, for each channel of `from` to `to` - 1. They
   become no less than `least`; or if `maxima` is not NULL, their maximum does. */
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
    /* In these orders a NaN stays one. */
    if (maxima) {
      float most = s[0];
#pragma GCC unroll 3
      for (int i = 1; i < 4; i++) most = (s[i] > most) | (s[i] != s[i]) ? s[i] : most;
      int which = (s[0] == most) | (s[1] == most) << 1 | (s[2] == most) << 2 | (s[3] == most) << 3;
      y[0][o] = most < least ? least : most;
      maxima[o] = most > least ? which : 0;
    } else {
#pragma GCC unroll 4
      for (int i = 3; i >= 0; i--) y[i][o] = s[i] < least ? least : s[i];
    }
  }
}

/* Pixels outside of the image go nowhere. */
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
  Passed x_passed; /* of a gradient */
  float least;  /* of the output: 0 for a ReLU */
  float *u, *y; /* u is NULL where each task transforms its own panels. */
  uint8_t *maxima; /* of the pooling, NULL where none follows */
  long groups; /* of panels, for threads that would have no chunk */
  /* The kernel [3, 3, in, out] as seen by this convolution: where it begins, and strides. */
  long first, tap, in, out;
} Forward;

/* u = G g G' for one panel of output channels, [C, COLUMNS] for each of the 16. */
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

/* One chunk of the tiles, and one group of the panels of output channels. */
static void convolve_chunk(void *argument, long index) {
  Forward *f = argument;
  Plan *plan = &f->plan;
  /* The transformed kernel: of all panels, or where nobody else needs it, of one at a time. */
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
    if (f->x_passed.maxima)
      transform_pooled_gradient(plan, f->x, f->x_passed.maxima, first + t, v + t * plan->C);
    else if (f->x_passed.outputs)
      transform_relu_gradient(plan, f->x, f->x_passed.outputs, first + t, v + t * plan->C);
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
  Passed passed; /* by the gradient */
  float *sums; /* of each piece [16, C rounded up to ROWS, O_up], and of the gradient [O_up] */
  float *of_kernel, *of_bias;
  long pieces, C_up, product_size, piece_size; /* in floats */
} ParameterGradient;

/* The gradient's sum over some tiles, to `total` or added to it. Of the 16 numbers of a tile, the
   sixth is the sum of its pixels. */
static void sum_gradient(const Plan *plan, const float *m, long tiles, float *sum, float *total,
                         int add) {
  memset(sum, 0, plan->O_up * sizeof(float));
  for (long t = 0; t < tiles; t++)
#pragma omp simd
    for (long o = 0; o < plan->O_up; o++) sum[o] += m[5 * plan->m_step + t * plan->O_up + o];
#pragma omp simd
  for (long o = 0; o < plan->O_up; o++) total[o] = add ? total[o] + sum[o] : sum[o];
}

/* The sum over one piece of the tiles; the pieces are the same whoever computes them. */
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
      transform_gradient(plan, f->gradient, f->passed, first + t, m + t * plan->O_up);
    }
    for (int k = 0; k < 16; k++)
      product(f->C_up, plan->O_up, n, v + k * plan->v_step, 1, plan->C, m + k * plan->m_step,
              COLUMNS, plan->O_up, sums + k * f->product_size, plan->O_up, first > begin);
    sum_gradient(plan, m, n, m + 16 * plan->m_step, sums + 16 * f->product_size, first > begin);
  }
  give_back(v, size);
}

/* G' s G for one input channel, s the sum of the pieces. */
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

static void sum_bias(const ParameterGradient *f) {
  for (long o = 0; o < f->plan.O; o++) {
    f->of_bias[o] = 0;
    for (long piece = 0; piece < f->pieces; piece++)
      f->of_bias[o] += f->sums[piece * f->piece_size + 16 * f->product_size + o];
  }
}

/* ---- What XLA calls */

static const XLA_FFI_Buffer *argument(const XLA_FFI_CallFrame *frame, int i) {
  return frame->args.args[i];
}

static const XLA_FFI_Buffer *result(const XLA_FFI_CallFrame *frame, int i) {
  return frame->rets.rets[i];
}

/* Answers XLA's question of what this handler was compiled for. */
static int describes_itself(XLA_FFI_CallFrame *frame) {
  /* Its type is XLA_FFI_Extension_Base up to jax 0.10 and XLA_FFI_InternalExtension after. */
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

/* Computes what is described but for its plan: convolutions of images [B, H, W, any]. */
static XLA_FFI_Error *convolve(const XLA_FFI_CallFrame *frame, Forward *f, const int64_t *images,
                               const XLA_FFI_Buffer *kernel, int turned) {
  const int64_t *dims = kernel->dims; /* [3, 3, C, O] */
  f->kernel = kernel->data;
  f->tap = turned ? -dims[2] * dims[3] : dims[2] * dims[3];
  f->first = turned ? 8 * dims[2] * dims[3] : 0;
  f->in = turned ? 1 : dims[3];
  f->out = turned ? dims[3] : 1;
  long C = dims[turned ? 3 : 2], O = dims[turned ? 2 : 3], threads = num_threads(frame);
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
  if (describes_itself(frame)) return NULL;
  const XLA_FFI_Buffer *x = argument(frame, 0);
  Forward f = {.x = x->data, .bias = argument(frame, 2)->data, .y = result(frame, 0)->data};
  return convolve(frame, &f, x->dims, argument(frame, 1), 0);
}

/* The same, pooled -> [B, H / 2, W / 2, O], and the maxima of the same shape, uint8 */
XLA_FFI_Error *tinyvgg_convolution_relu_pool(XLA_FFI_CallFrame *frame) {
  if (describes_itself(frame)) return NULL;
  const XLA_FFI_Buffer *x = argument(frame, 0);
  Forward f = {.x = x->data,
               .bias = argument(frame, 2)->data,
               .y = result(frame, 0)->data,
               .maxima = result(frame, 1)->data};
  return convolve(frame, &f, x->dims, argument(frame, 1), 0);
}

/* What says which of a gradient counts: float32 and of its shape, the outputs of the ReLU before
   it; or uint8, the maxima of the pooling before it, of which the gradient holds the shares. */
static Passed passed_by(const XLA_FFI_Buffer *buffer) {
  if (buffer->dtype == XLA_FFI_DataType_U8) return (Passed){.maxima = buffer->data};
  return (Passed){.outputs = buffer->data};
}

/* (gradient [B, h, w, O], what it passed, kernel [3, 3, C, O]) -> [B, H, W, C] */
XLA_FFI_Error *tinyvgg_input_gradient(XLA_FFI_CallFrame *frame) {
  if (describes_itself(frame)) return NULL;
  const XLA_FFI_Buffer *y = result(frame, 0);
  Forward f = {.x = argument(frame, 0)->data,
               .x_passed = passed_by(argument(frame, 1)),
               .least = -INFINITY,
               .y = y->data};
  return convolve(frame, &f, y->dims, argument(frame, 2), 1);
}

/* (images [B, H, W, C], gradient [B, h, w, O], what it passed) -> [3, 3, C, O], [O] */
XLA_FFI_Error *tinyvgg_parameter_gradient(XLA_FFI_CallFrame *frame) {
  if (describes_itself(frame)) return NULL;
  const XLA_FFI_Buffer *x = argument(frame, 0), *gradient = argument(frame, 1);
  ParameterGradient f = {.x = x->data,
                         .gradient = gradient->data,
                         .passed = passed_by(argument(frame, 2)),
                         .of_kernel = result(frame, 0)->data,
                         .of_bias = result(frame, 1)->data};
  long C = x->dims[3], O = gradient->dims[3], channels = max(C, O);
  size_t sums_size, zeros_size;
  float *zeros = borrow(channels, &zeros_size);
  make_plan(&f.plan, x->dims, C, O, f.passed.maxima != NULL, zeros);
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
