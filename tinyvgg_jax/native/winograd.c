/* SAME 3x3 convolutions on a CPU by Winograd's F(2x2, 3x3), as XLA custom calls.

   Two by two output pixels and the four by four input pixels that they see are a tile. A tile
   is transformed to 16 numbers a channel; there the convolution is a product by the transformed
   kernel, one matrix product for each of the 16 (Lavin & Gray, arXiv:1509.09308). That is 2.25
   times fewer multiplications, and rounds about as a direct convolution does. The input's
   gradient is the convolution with the turned kernel, and the kernel's gradient is a sum over
   tiles of products in the same 16 numbers.

   Arrays are float32 and dense: images [B, H, W, C], kernels [3, 3, C, O]. Tiles go through
   in chunks that stay in the cache, spread over XLA's own threads. A result does not depend on
   which thread computed what. */

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
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

/* A buffer, the smallest kept one that will do; NULL where there is no memory. */
static float *borrow(size_t floats, size_t *size) {
  float *data = NULL;
  int best = -1;
  *size = floats;
  lock();
  for (int i = 0; i < KEPT; i++)
    if (kept[i].data && kept[i].size >= floats && (best < 0 || kept[i].size < kept[best].size))
      best = i;
  if (best >= 0 && kept[best].size <= 16 * floats + 65536) {
    data = kept[best].data;
    *size = kept[best].size;
    kept[best].data = NULL;
  }
  unlock();
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
static inline __attribute__((always_inline)) void product_block(
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

static void make_plan(Plan *plan, const int64_t *images, long O, const float *zeros) {
  plan->B = images[0], plan->H = images[1], plan->W = images[2], plan->C = images[3];
  plan->O = O;
  plan->O_up = round_up(O, COLUMNS);
  plan->tiles_h = (plan->H + 1) / 2;
  plan->tiles_w = (plan->W + 1) / 2;
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

/* v = B' d B for each channel, d the tile's 4x4 pixels. */
static void transform_input(const Plan *plan, const float *x, long tile, float *v) {
  const float *d[16];
  locate(plan, x, plan->C, tile, -1, 4, d);
  long step = plan->v_step;
#pragma omp simd
  for (long c = 0; c < plan->C; c++) {
    float t[16];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      float a = d[j][c], b = d[4 + j][c], e = d[8 + j][c], f = d[12 + j][c];
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

/* m = A y A' for each channel, y the gradient of the tile's 2x2 output pixels. */
static void transform_gradient(const Plan *plan, const float *gradient, long tile, float *m) {
  const float *y[4];
  locate(plan, gradient, plan->O, tile, 0, 2, y);
  long step = plan->m_step;
#pragma omp simd
  for (long o = 0; o < plan->O; o++) {
    float t[8];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      float a = y[j][o], b = y[2 + j][o];
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

/* The tile's 2x2 output pixels, A' m A for each channel of `from` to `to` - 1, plus the bias, and
   no less than `least`; those outside of the image go nowhere. */
static void transform_output(const Plan *plan, const float *m, long tile, const float *bias,
                             float least, long from, long to, float *y, float *nowhere) {
  const float *pixels[4];
  locate(plan, y, plan->O, tile, 0, 2, pixels);
  float *out[4];
  for (int i = 0; i < 4; i++) out[i] = pixels[i] == plan->zeros ? nowhere : y + (pixels[i] - y);
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
    /* In this order a NaN stays one. */
#pragma GCC unroll 4
    for (int i = 3; i >= 0; i--) out[i][o] = s[i] < least ? least : s[i];
  }
}

/* ---- The convolution */

typedef struct {
  Plan plan;
  const float *x, *kernel, *bias;
  float least; /* of the output: 0 for a ReLU */
  float *u, *y; /* u is NULL where each task transforms its own panels. */
  long groups; /* of panels, for threads that would have no chunk */
  /* The kernel [3, 3, in, out] as seen by this convolution: where it begins, and strides. */
  long first, tap, in, out;
} Forward;

/* u = G g G' for one panel of output channels, [C, COLUMNS] for each of the 16. */
static inline __attribute__((always_inline)) void transform_kernel_panel(
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
  for (long t = 0; t < n; t++) transform_input(plan, f->x, first + t, v + t * plan->C);
  for (long p = panel; p < end; p = f->u ? end : p + 1) {
    const float *u = f->u ? f->u + p * plan->C * COLUMNS : one_panel;
    if (!f->u) transform_panel(f, p, one_panel, u_step);
    for (int k = 0; k < 16; k++)
      product(round_up(n, ROWS), f->u ? (end - p) * COLUMNS : COLUMNS, plan->C,
              v + k * plan->v_step, plan->C, 1, u + k * u_step, plan->C * COLUMNS, COLUMNS,
              m + k * plan->m_step + p * COLUMNS, plan->O_up, 0);
  }
  for (long t = 0; t < n; t++)
    transform_output(plan, m + t * plan->O_up, first + t, f->bias, f->least, from, to, f->y,
                     nowhere);
  give_back(v, size);
}

/* ---- The kernel's gradient */

typedef struct {
  Plan plan;
  const float *x, *gradient;
  float *sums; /* [pieces, 16, C rounded up to ROWS, O_up] */
  float *result;
  long pieces, C_up;
} KernelGradient;

/* The sum over one piece of the tiles; the pieces are the same whoever computes them. */
static void sum_piece(void *argument, long index) {
  KernelGradient *f = argument;
  Plan *plan = &f->plan;
  size_t size;
  float *v = borrow(16 * (plan->v_step + plan->m_step), &size);
  if (!v) {
    atomic_store(&plan->failed, 1);
    return;
  }
  float *m = v + 16 * plan->v_step;
  long step = f->C_up * plan->O_up + 16;
  float *sums = f->sums + index * 16 * step;
  long begin = plan->tiles * index / f->pieces, end = plan->tiles * (index + 1) / f->pieces;
  memset(v, 0, 16 * plan->v_step * sizeof(float));
  for (long first = begin; first < end; first += plan->chunk) {
    long n = min(plan->chunk, end - first);
    for (long t = 0; t < n; t++) {
      transform_input(plan, f->x, first + t, v + t * plan->C);
      transform_gradient(plan, f->gradient, first + t, m + t * plan->O_up);
    }
    for (int k = 0; k < 16; k++)
      product(f->C_up, plan->O_up, n, v + k * plan->v_step, 1, plan->C, m + k * plan->m_step,
              COLUMNS, plan->O_up, sums + k * step, plan->O_up, first > begin);
  }
  give_back(v, size);
}

/* G' s G for one input channel, s the sum of the pieces. */
static void transform_sums(void *argument, long c) {
  KernelGradient *f = argument;
  long O = f->plan.O, step = f->C_up * f->plan.O_up + 16, tap = f->plan.C * O;
  const float *sums = f->sums + c * f->plan.O_up;
  float *to = f->result + c * O;
#pragma omp simd
  for (long o = 0; o < O; o++) {
    float s[16], t[12];
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) s[k] = 0;
    for (long piece = 0; piece < f->pieces; piece++)
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++) s[k] += sums[(piece * 16 + k) * step + o];
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

/* ---- What XLA calls */

static const XLA_FFI_Buffer *argument(const XLA_FFI_CallFrame *frame, int i) {
  return frame->args.args[i];
}

static const XLA_FFI_Buffer *result(const XLA_FFI_CallFrame *frame) { return frame->rets.rets[0]; }

/* Answers XLA's question of what this handler was compiled for. */
static int describes_itself(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Extension_Base *extension = frame->extension_start;
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

/* The convolution with the kernel or the turned one; then bias and ReLU if there is a bias. */
static XLA_FFI_Error *convolve(const XLA_FFI_CallFrame *frame, const float *bias, int turned) {
  const XLA_FFI_Buffer *x = argument(frame, 0), *kernel = argument(frame, 1);
  const int64_t *dims = kernel->dims; /* [3, 3, C, O] */
  Forward f = {.x = x->data, .kernel = kernel->data, .y = result(frame)->data};
  f.tap = turned ? -dims[2] * dims[3] : dims[2] * dims[3];
  f.first = turned ? 8 * dims[2] * dims[3] : 0;
  f.in = turned ? 1 : dims[3];
  f.out = turned ? dims[3] : 1;
  long O = turned ? dims[2] : dims[3], threads = num_threads(frame);
  size_t u_size, zeros_size;
  float *zeros = borrow(max(x->dims[3], O), &zeros_size);
  make_plan(&f.plan, x->dims, O, zeros);
  f.bias = bias ? bias : zeros;
  f.least = bias ? 0 : -INFINITY;
  f.groups = min(f.plan.O_up / COLUMNS, (threads + f.plan.chunks - 1) / f.plan.chunks);
  int shared = f.plan.chunks > 1;
  f.u = shared ? borrow(16 * f.plan.u_step, &u_size) : NULL;
  if (zeros && (f.u || !shared)) {
    memset(zeros, 0, max(x->dims[3], O) * sizeof(float));
    if (shared) parallel_for(frame, f.plan.O_up / COLUMNS, transform_kernel, &f);
    parallel_for(frame, f.plan.chunks * f.groups, convolve_chunk, &f);
  }
  int failed = !zeros || (shared && !f.u) || atomic_load(&f.plan.failed);
  give_back(zeros, zeros_size);
  if (shared) give_back(f.u, u_size);
  return failed ? out_of_memory(frame) : NULL;
}

/* relu(convolution + bias): (images [B, H, W, C], kernel [3, 3, C, O], bias [O]) -> [B, H, W, O] */
XLA_FFI_Error *tinyvgg_convolution_relu(XLA_FFI_CallFrame *frame) {
  return describes_itself(frame) ? NULL : convolve(frame, argument(frame, 2)->data, 0);
}

/* (gradient [B, H, W, O], kernel [3, 3, C, O]) -> [B, H, W, C] */
XLA_FFI_Error *tinyvgg_input_gradient(XLA_FFI_CallFrame *frame) {
  return describes_itself(frame) ? NULL : convolve(frame, NULL, 1);
}

/* (images [B, H, W, C], gradient [B, H, W, O]) -> [3, 3, C, O] */
XLA_FFI_Error *tinyvgg_kernel_gradient(XLA_FFI_CallFrame *frame) {
  if (describes_itself(frame)) return NULL;
  const XLA_FFI_Buffer *x = argument(frame, 0), *gradient = argument(frame, 1);
  KernelGradient f = {.x = x->data, .gradient = gradient->data, .result = result(frame)->data};
  long channels = max(x->dims[3], gradient->dims[3]);
  size_t sums_size, zeros_size;
  float *zeros = borrow(channels, &zeros_size);
  make_plan(&f.plan, x->dims, gradient->dims[3], zeros);
  f.C_up = round_up(f.plan.C, ROWS);
  f.pieces = min(num_threads(frame), f.plan.chunks);
  f.sums = borrow(f.pieces * 16 * (f.C_up * f.plan.O_up + 16), &sums_size);
  if (zeros && f.sums) {
    memset(zeros, 0, channels * sizeof(float));
    parallel_for(frame, f.pieces, sum_piece, &f);
    parallel_for(frame, f.plan.C, transform_sums, &f);
  }
  int failed = !zeros || !f.sums || atomic_load(&f.plan.failed);
  give_back(zeros, zeros_size);
  give_back(f.sums, sums_size);
  return failed ? out_of_memory(frame) : NULL;
}
