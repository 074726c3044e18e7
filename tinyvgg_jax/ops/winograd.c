/* SAME 3x3 convolutions on a CPU by Winograd's F(2x2, 3x3) and F(4x4, 3x3), as XLA custom calls.
   README.md beside this file derives the formulas; Lavin & Gray (arXiv:1509.09308) introduced them.

   A tile is a square of n x n output pixels, with the (n + 2)^2 input pixels that they depend on; n
   is 2, or in gradients 4 (tiles.h says why). With d the input of a tile in one channel and g the 3x3 kernel of that channel,

     output = A' [(G g G') * (B' d B)] A,    ' the transpose, * the product element by element.

   For n = 2,

          [1  0 -1  0]        [ 1    0    0 ]
     B' = [0  1  1  0]    G = [1/2  1/2  1/2]    A' = [1  1  1  0]
          [0 -1  1  0]        [1/2 -1/2  1/2]         [0  1 -1 -1]
          [0  1  0 -1]        [ 0    0    1 ]

   Summed over the input channels, each of the (n + 2)^2 elements of the bracket is a matrix product
   of its own, [tiles, C] by [C, O]. That takes 16 multiplications for 4 pixels, or 36 for 16, where
   a direct convolution takes 9 for each. The gradients take the same matrices:

     input gradient  = the convolution of the output's gradient with the kernel rotated by 180
                       degrees, its input and output channels exchanged;
     kernel gradient = G' [sum over tiles of (B' d B) * (A e A')] G, e the tile's n x n pixels of the
                       output's gradient.

   The n x n output pixels of a tile are also one square, or four, of the 2x2 max pooling. So a
   convolution with pooling behind it writes only the maximum of each square, never the four pixels.
   For the gradient it also writes a byte that says which of the four were the maximum. The gradient
   of the four pixels is never written, either: it is computed wherever it is read, from this byte
   and the pooled gradient, divided among the maxima.

   Arrays are dense: images [B, H, W, C], kernels [3, 3, C, O], all float32 or all bfloat16. The
   tiles are processed in chunks that fit the cache, on XLA's own threads. A result does not depend
   on which thread computed what, but on the number of threads, because the sum of a kernel's
   gradient is split into as many pieces. Always splitting it alike would cost a buffer of the
   transformed kernel's size, 9 MB, for each of as many pieces as a large processor has threads. */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#include "buffers.h"
#include "numbers.h"
#include "lines.h"
#include "product.h"
#include "threads.h"
#include "tiles.h"

/* ---- The convolution */

/* The product of so many tiles with so many panels of output channels is transformed back while it
   is in the cache. */
#define STRIP ROWS
#define WIDTH 4

typedef struct {
  Plan plan;
  const void *x, *kernel;
  Gate gate; /* where x, if it is a gradient, goes through */
  Output output;
  long depth;  /* elements of a transformed tile: C, or half as many pairs */
  long groups; /* groups of panels: more tasks where there are fewer chunks than threads */
  float *u;    /* NULL if each task transforms the panels that it needs */
  /* Distance in floats from one of a tile's elements to the next. The 16 floats more keep these
     streams from falling into the same sets of the cache. */
  long v_step, m_step, u_step;
  /* How this convolution reads the kernel [3, 3, in, out]: the offset of its first element, and the
     strides. A rotated kernel begins at the last of the nine and has a negative stride. */
  long first, tap, in, out;
} Forward;

/* u = G g G' for one input channel and O output channels. */
static INLINE void transform_taps(const void *g, long tap, long out, long O, float *u, long step,
                                  int size, int bf16) {
  const int side = size + 2;
  for (long o = 0; o < O; o += LANES) {
    long n = min(O - o, LANES);
    vec t[18], line[6];
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) {
#pragma GCC unroll 3
      for (int i = 0; i < 3; i++)
        line[i] = read_pixels(g, o * out + (3 * i + j) * tap, out, n, bf16);
      line_to_u(line, t + j, 3, size);
    }
#pragma GCC unroll 6
    for (int i = 0; i < side; i++) {
      line_to_u(t + 3 * i, line, 1, size);
      write_elements(u + i * side * step + o, step, line, side);
    }
  }
}

/* Writes u for input channel c and one panel of output channels; zeros beyond the last of either. */
static void transform_row(const Forward *f, long panel, long c, float *u, long step) {
  long columns = min(f->plan.O - panel * COLUMNS, COLUMNS);
  if (columns < COLUMNS || c >= f->plan.C)
    for (int k = 0; k < f->plan.elements; k++) memset(u + k * step, 0, COLUMNS * sizeof(float));
  if (c >= f->plan.C) return;
  const void *g = pixel(&f->plan, f->kernel, f->first + c * f->in + panel * COLUMNS * f->out);
  FOR_KIND_OF(&f->plan, transform_taps, g, f->tap, f->out, columns, u, step);
}

/* u = G g G' for one panel of output channels: [depth, COLUMNS] for each of a tile's elements. */
static void transform_panel(const Forward *f, long panel, float *u, long step) {
  float rows[2][MOST_PIXELS * COLUMNS];
  for (long d = 0; d < f->depth; d++, u += COLUMNS)
    if (f->plan.pairs) {
      for (int i = 0; i < 2; i++) transform_row(f, panel, 2 * d + i, rows[i], COLUMNS);
      for (int k = 0; k < f->plan.elements; k++)
        pack_rows(rows[0] + k * COLUMNS, rows[1] + k * COLUMNS, COLUMNS, u + k * step);
    } else {
      transform_row(f, panel, d, u, step);
    }
}

static void transform_kernel(void *argument, long panel) {
  const Forward *f = argument;
  transform_panel(f, panel, f->u + panel * f->depth * COLUMNS, f->u_step);
}

/* v = B' d B for n tiles: [n, depth] for each of a tile's elements. `scratch` is needed for pairs. */
static void transform_tiles(const Forward *f, long first, long n, float *v, float *scratch) {
  long C = f->plan.C, step = round_up(C, 32);
  if (f->plan.pairs) memset(scratch, 0, f->plan.elements * step * sizeof(float));
  for (long t = 0; t < n; t++, v += f->depth)
    if (f->plan.pairs) {
      transform_input(&f->plan, f->x, f->gate, first + t, scratch, step);
      for (int k = 0; k < f->plan.elements; k++)
        pack_neighbours(scratch + k * step, C, v + k * f->v_step);
    } else {
      transform_input(&f->plan, f->x, f->gate, first + t, v, f->v_step);
    }
}

/* Multiplies n tiles by panels `panel` to `end` - 1 of the kernel, m = v u for each of a tile's
   elements, and transforms back. */
static INLINE void multiply_tiles(const Forward *f, long first, long n, const float *v, long panel,
                                  long end, const float *u, long u_step, float *m, float *nowhere,
                                  int pairs) {
  long from = panel * COLUMNS, columns = min(end * COLUMNS, f->plan.O) - from;
  long m_row = (end - panel) * COLUMNS;
  for (long t = 0; t < n; t += STRIP) {
    long tiles = min(n - t, STRIP);
    for (int k = 0; k < f->plan.elements; k++)
      for (long p = 0; p < end - panel; p++)
        product(round_up(tiles, ROWS), f->depth, v + k * f->v_step + t * f->depth, f->depth, 1,
                u + k * u_step + p * f->depth * COLUMNS, COLUMNS,
                m + k * f->m_step + p * COLUMNS, m_row, 0, pairs);
    for (long i = 0; i < tiles; i++)
      transform_output(&f->plan, m + i * m_row, f->m_step, &f->output, first + t + i, from, columns,
                       nowhere);
  }
}

/* Convolves one chunk of the tiles for one group of the panels of output channels. */
static void convolve_chunk(void *argument, long index) {
  Forward *f = argument;
  Plan *plan = &f->plan;
  /* With one chunk no other task needs the transformed panels, so only one at a time is kept. */
  long u_step = f->u ? f->u_step : f->depth * COLUMNS + 16;
  long v_size = plan->elements * f->v_step, m_size = plan->elements * f->m_step;
  long one_size = f->u ? 0 : plan->elements * u_step;
  long scratch_size = plan->pairs ? plan->elements * round_up(plan->C, 32) : 0;
  size_t size;
  float *v = borrow(v_size + m_size + scratch_size + one_size + WIDTH * COLUMNS, &size);
  if (!v) {
    atomic_store(&plan->failed, 1);
    return;
  }
  float *m = v + v_size, *scratch = m + m_size, *one = scratch + scratch_size;
  float *nowhere = one + one_size;
  long panels = plan->O_up / COLUMNS, group = index % f->groups;
  long first = index / f->groups * plan->chunk, n = min(plan->chunk, plan->tiles - first);
  transform_tiles(f, first, n, v, scratch);
  long panel = panels * group / f->groups, last = panels * (group + 1) / f->groups;
  for (long end; panel < last; panel = end) {
    end = f->u ? min(panel + WIDTH, last) : panel + 1;
    const float *u = f->u ? f->u + panel * f->depth * COLUMNS : one;
    if (!f->u) transform_panel(f, panel, one, u_step);
    if (plan->pairs)
      multiply_tiles(f, first, n, v, panel, end, u, u_step, m, nowhere, 1);
    else
      multiply_tiles(f, first, n, v, panel, end, u, u_step, m, nowhere, 0);
  }
  give_back(v, size);
}

/* ---- The gradient of kernel and bias */

typedef struct {
  Plan plan;
  const void *x, *gradient;
  Gate gate;   /* where the gradient goes through */
  float *sums; /* for each piece, v' m [elements, C_up, O_up] and the gradient's sum [O_up] */
  void *of_kernel, *of_bias;
  long pieces;
  long C_up; /* C, rounded up to a multiple of ROWS; nobody reads the sums of the rows from C on */
  long product_size, piece_size; /* in elements */
  /* Distance in elements from one tile, or pair of tiles, to the next, and from one of its
     elements to the next. */
  long v_row, m_row, v_step, m_step;
} ParameterGradient;

/* Transforms one tile: v = B' d B, m = A e A'. Adds the gradient's pixels to `sum`. */
static void transform_tile(const ParameterGradient *f, long tile, float *v, long v_step, float *m,
                           long m_step, float *sum) {
  transform_input(&f->plan, f->x, (Gate){0}, tile, v, v_step);
  transform_gradient(&f->plan, f->gradient, f->gate, tile, m, m_step, sum);
}

/* Transforms n tiles: v and m, [n, channels] for each of a tile's elements. */
static void transform_floats(const ParameterGradient *f, long first, long n, float *v, float *m,
                             float *sum) {
  long O = f->plan.O, rest = f->plan.O_up - O;
  for (long t = 0; t < n; t++, v += f->v_row, m += f->m_row) {
    transform_tile(f, first + t, v, f->v_step, m, f->m_step, sum);
    for (int k = 0; k < f->plan.elements; k++)
      memset(m + k * f->m_step + O, 0, rest * sizeof(float));
  }
}

/* The same in pairs of tiles; without a second tile, the last pair's other half is zero. */
static void transform_pairs(const ParameterGradient *f, long first, long n, float *v, float *m,
                            float *sum, float *scratch) {
  long v_step = round_up(f->plan.C, 16), m_step = f->plan.O_up, elements = f->plan.elements;
  long half = elements * (v_step + m_step);
  float *to_v[2] = {scratch, scratch + half};
  float *to_m[2] = {scratch + elements * v_step, scratch + half + elements * v_step};
  memset(scratch, 0, 2 * half * sizeof(float));
  for (long t = 0; t < n; t += 2, v += f->v_row, m += f->m_row) {
    if (t + 1 == n) memset(scratch + half, 0, half * sizeof(float));
    for (int i = 0; i < 2 && t + i < n; i++)
      transform_tile(f, first + t + i, to_v[i], v_step, to_m[i], m_step, sum);
    for (int k = 0; k < f->plan.elements; k++) {
      pack_rows(to_v[0] + k * v_step, to_v[1] + k * v_step, v_step, v + k * f->v_step);
      pack_rows(to_m[0] + k * m_step, to_m[1] + k * m_step, m_step, m + k * f->m_step);
    }
  }
}

/* Takes the products v' m of n tiles, [C, tiles] by [tiles, O], into the sums. */
static INLINE void multiply_transformed(const ParameterGradient *f, long n, const float *v,
                                        const float *m, float *sums, int add, int pairs) {
  for (int k = 0; k < f->plan.elements; k++)
    for (long o = 0; o < f->plan.O_up; o += COLUMNS)
      product(f->C_up, pairs ? (n + 1) / 2 : n, v + k * f->v_step, 1, f->v_row,
              m + k * f->m_step + o, f->m_row, sums + k * f->product_size + o, f->plan.O_up, add,
              pairs);
}

/* Sums v' m over one piece of the tiles. Where a piece begins and ends does not depend on the thread
   that computes it, so that the sum is the same in every run. */
static void sum_piece(void *argument, long index) {
  ParameterGradient *f = argument;
  Plan *plan = &f->plan;
  long O_up = plan->O_up, elements = plan->elements;
  long scratch_size = plan->pairs ? 2 * elements * (round_up(plan->C, 16) + O_up) : 0;
  size_t size;
  float *v = borrow(elements * (f->v_step + f->m_step) + O_up + scratch_size, &size);
  if (!v) {
    atomic_store(&plan->failed, 1);
    return;
  }
  float *m = v + elements * f->v_step, *sum = m + elements * f->m_step, *scratch = sum + O_up;
  float *sums = f->sums + index * f->piece_size, *total = sums + elements * f->product_size;
  long begin = plan->tiles * index / f->pieces, end = plan->tiles * (index + 1) / f->pieces;
  for (long first = begin; first < end; first += plan->chunk) {
    long n = min(plan->chunk, end - first);
    int add = first > begin;
    memset(sum, 0, O_up * sizeof(float));
    if (plan->pairs) {
      transform_pairs(f, first, n, v, m, sum, scratch);
      multiply_transformed(f, n, v, m, sums, add, 1);
    } else {
      transform_floats(f, first, n, v, m, sum);
      multiply_transformed(f, n, v, m, sums, add, 0);
    }
    for (long o = 0; o < O_up; o++) total[o] = add ? total[o] + sum[o] : sum[o];
  }
  give_back(v, size);
}

/* The sum over the pieces of what lies at `s` in the first. */
static INLINE vec sum_of_pieces(const ParameterGradient *f, const float *s) {
  vec sum = *(const vec *)s;
  for (long piece = 1; piece < f->pieces; piece++) sum += *(const vec *)(s + piece * f->piece_size);
  return sum;
}

/* The kernel's gradient G' s G for one input channel, s being the sum of all pieces. */
static INLINE void transform_sums_of(const ParameterGradient *f, long c, int size, int bf16) {
  const int side = size + 2;
  long O = f->plan.O, tap = f->plan.C * O;
  void *to = (void *)pixel(&f->plan, f->of_kernel, c * O);
  for (long o = 0; o < O; o += LANES) {
    long n = min(O - o, LANES);
    vec t[18], line[6];
#pragma GCC unroll 6
    for (int j = 0; j < side; j++) {
#pragma GCC unroll 6
      for (int i = 0; i < side; i++) {
        const float *s = f->sums + (i * side + j) * f->product_size + c * f->plan.O_up + o;
        line[i] = sum_of_pieces(f, s);
      }
      line_from_sums(line, t + j, side, size);
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
      line_from_sums(t + i * side, line, 1, size);
#pragma GCC unroll 3
      for (int j = 0; j < 3; j++)
        write_pixels(to, (3 * i + j) * tap + o, n, round_to_pixels(line[j], bf16), bf16);
    }
  }
}

static void transform_sums(void *argument, long c) {
  ParameterGradient *f = argument;
  FOR_KIND_OF(&f->plan, transform_sums_of, f, c);
}

/* The bias's gradient: the output's gradient, summed over all pixels. */
static void sum_bias(const ParameterGradient *f) {
  int bf16 = f->plan.bf16;
  for (long o = 0; o < f->plan.O; o += LANES) {
    vec sum = sum_of_pieces(f, f->sums + f->plan.elements * f->product_size + o);
    write_pixels(f->of_bias, o, min(f->plan.O - o, LANES), round_to_pixels(sum, bf16), bf16);
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

/* Plans chunks, tasks and the layout of the buffers of a convolution. */
static void plan_convolution(Forward *f, const XLA_FFI_Buffer *images, long C, long O, long threads,
                             const float *zeros) {
  Plan *plan = &f->plan;
  f->depth = takes_pairs(images) ? (C + 1) / 2 : C;
  /* With few input channels a chunk of that size would be all tiles, and leave no other tasks. */
  int gradient = f->gate.outputs || f->gate.maxima, only_squares = f->output.maxima != NULL;
  make_plan(plan, images, C, O, gradient, only_squares, max(f->depth, 32), zeros);
  f->groups = min(plan->O_up / COLUMNS, (threads + plan->chunks - 1) / plan->chunks);
  f->v_step = plan->chunk * f->depth + ROWS + 16;
  f->m_step = STRIP * WIDTH * COLUMNS + 16;
  f->u_step = f->depth * plan->O_up + 16;
  if (!f->output.bias) f->output.bias = zeros;
}

/* Runs the convolution that `f` describes, but for its plan and its view of the kernel, which are
   made here. `rotated` rotates the kernel by 180 degrees and exchanges its channels. */
static XLA_FFI_Error *convolve(const XLA_FFI_CallFrame *frame, Forward *f,
                               const XLA_FFI_Buffer *images, const XLA_FFI_Buffer *kernel,
                               int rotated) {
  const int64_t *dims = kernel->dims; /* [3, 3, C, O] */
  f->kernel = kernel->data;
  f->tap = rotated ? -dims[2] * dims[3] : dims[2] * dims[3];
  f->first = rotated ? 8 * dims[2] * dims[3] : 0;
  f->in = rotated ? 1 : dims[3];
  f->out = rotated ? dims[3] : 1;
  long C = dims[rotated ? 3 : 2], O = dims[rotated ? 2 : 3];
  size_t u_size, zeros_size;
  float *zeros = borrow(max(C, O), &zeros_size);
  plan_convolution(f, images, C, O, num_threads(frame), zeros);
  int shared = f->plan.chunks > 1;
  f->u = shared ? borrow(f->plan.elements * f->u_step, &u_size) : NULL;
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
  Output output = {.bias = argument(frame, 2)->data, .y = result(frame, 0)->data};
  Forward f = {.x = x->data, .output = output};
  return convolve(frame, &f, x, argument(frame, 1), 0);
}

/* The same with 2x2 max pooling -> [B, H / 2, W / 2, O], and the maxima, uint8 of the same shape */
XLA_FFI_Error *tinyvgg_convolution_relu_pool(XLA_FFI_CallFrame *frame) {
  if (answers_metadata_query(frame)) return NULL;
  const XLA_FFI_Buffer *x = argument(frame, 0);
  Output output = {.bias = argument(frame, 2)->data,
                   .y = result(frame, 0)->data,
                   .maxima = result(frame, 1)->data};
  Forward f = {.x = x->data, .output = output};
  return convolve(frame, &f, x, argument(frame, 1), 0);
}

/* Reads the gate of a gradient of the same shape: uint8, the maxima of the pooling, where the
   gradient is already divided by their number; else the outputs of the ReLU. */
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
               .gate = gate_of(argument(frame, 1)),
               .output = {.least = -INFINITY, .y = y->data}};
  return convolve(frame, &f, y, argument(frame, 2), 1);
}

/* Plans chunks, pieces and the layout of the buffers of a kernel's gradient. */
static void plan_sums(ParameterGradient *f, const XLA_FFI_Buffer *images, long C, long O,
                      long threads, const float *zeros) {
  Plan *plan = &f->plan;
  int tiles_in_row = takes_pairs(images) ? 2 : 1;
  make_plan(plan, images, C, O, 1, f->gate.maxima != NULL,
            (C + round_up(O, COLUMNS)) / tiles_in_row, zeros);
  /* The 16 floats more keep rows, and the streams, from falling into the same sets of the
     cache. */
  f->v_row = round_up(C, 16) + 16;
  f->m_row = plan->O_up + 16;
  long rows = (plan->chunk + tiles_in_row - 1) / tiles_in_row;
  f->v_step = rows * f->v_row + 16;
  f->m_step = rows * f->m_row + 16;
  f->C_up = round_up(C, ROWS);
  f->pieces = min(threads, plan->chunks);
  f->product_size = f->C_up * plan->O_up + 16;
  f->piece_size = plan->elements * f->product_size + plan->O_up;
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
  plan_sums(&f, x, C, O, num_threads(frame), zeros);
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
