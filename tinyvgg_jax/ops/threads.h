/* A parallel loop on XLA's own threads. Each free thread takes the next task. The caller takes tasks
   too and waits only for tasks that have begun, so that it cannot deadlock when all of XLA's threads
   are busy. */

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

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
