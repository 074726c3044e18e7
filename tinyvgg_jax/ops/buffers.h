/* Buffers for the calls of winograd.c. They are kept for the next call, because fresh pages cost the
   system as much time as the computation takes. */

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

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
