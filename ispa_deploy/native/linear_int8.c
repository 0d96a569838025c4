/* Product of int8 codes, x (rows, features) times w (columns, features) transposed, for CPUs without an instruction that
 * adds up bytes: codes are widened to 16 bits, where pairs of products add up exactly in int32.
 *
 * Weights are packed once, byte for byte, as (columns / WIDTH, features / 2, WIDTH, 2); rows are widened block by block.
 * A panel of WIDTH columns, FEATURES deep and widened, stays in the first cache while TALL rows at a time walk past it.
 */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"

#define TALL 6
#define WIDTH (2 * LANES)
#define FEATURES 768 /* of a panel in the first cache: 24 KiB */
#define BLOCK 96     /* rows of a task */
#define CHUNK 16     /* panels of a task */
#define STEP 8       /* features per turn of the innermost loop */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  const int8_t *x, *w;
  const float *row, *column, *bias; /* bias may be NULL */
  void *y;
  int64_t rows, features, columns;
  int64_t form; /* of y: 0 bfloat16, 1 float32, 2 int32 without scales and bias */
} Product;

static inline int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
static inline int64_t parts(int64_t x, int64_t of) { return (x + of - 1) / of; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
/* The length of equal parts, none longer than `most`, in multiples of `unit`. */
static inline int64_t share(int64_t x, int64_t most, int64_t unit) { return up(parts(x, parts(x, most)), unit); }

/* codes (rows, features) -> wide (depth / FEATURES blocks, BLOCK, FEATURES): zeros fill up what is missing. */
static void widen_rows(const Product *p, int64_t first, int64_t count, int64_t depth, int16_t *wide) {
  for (int64_t from = 0; from < p->features; from += depth, wide += BLOCK * FEATURES) {
    const int64_t length = least(depth, p->features - from);
    for (int64_t r = 0; r < up(count, TALL); r++) {
      int16_t *to = wide + r * FEATURES;
      int64_t k = 0;
      if (r < count) {
        const int8_t *x = p->x + (first + r) * p->features + from;
        for (; k + WIDTH <= length; k += WIDTH) _mm256_storeu_si256((__m256i *)(to + k), load_wide(x + k));
        for (; k < length; k++) to[k] = x[k];
      }
      if (k < up(length, STEP)) memset(to + k, 0, (up(length, STEP) - k) * sizeof *to);
    }
  }
}

/* w of `length` features of a panel, (length / 2, WIDTH, 2) -> the same in 16 bits, zeros up to a multiple of STEP. */
static void widen_panel(const int8_t *w, int64_t length, int16_t *wide) {
  const int64_t count = up(length, 2) * WIDTH, all = up(length, STEP) * WIDTH;
  for (int64_t i = 0; i < count; i += WIDTH) _mm256_store_si256((__m256i *)(wide + i), load_wide(w + i));
  memset(wide + count, 0, (all - count) * sizeof *wide);
}

/* sum + products of neighbours. As intrinsics gcc moves sums to memory and back in the innermost loop: sixteen registers
 * hold 12 sums, 2 of weights, 1 of x and 1 product, and none is left. */
INLINE Ints dot_here(Ints sum, Ints w, Ints x) {
  Ints product;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(w), "x"(x));
  return sum;
}

/* sums (TALL, WIDTH) of x (TALL, FEATURES) and w (length / 2, WIDTH, 2), added to what is there if `more`. */
INLINE void tile(const int16_t *x, const int16_t *w, int64_t length, int more, int32_t *sums) {
  Ints sum[TALL][2];
  for (int r = 0; r < TALL; r++)
    for (int c = 0; c < 2; c++)
      sum[r][c] = more ? _mm256_load_si256((__m256i *)(sums + r * WIDTH) + c) : _mm256_setzero_si256();
  for (int64_t k = 0; k < length; k += STEP, x += STEP, w += STEP * WIDTH) {
#pragma GCC unroll 4
    for (int j = 0; j < STEP; j += 2) {
      const Ints left = _mm256_load_si256((const __m256i *)(w + j * WIDTH));
      const Ints right = _mm256_load_si256((const __m256i *)(w + j * WIDTH) + 1);
#pragma GCC unroll 6
      for (int r = 0; r < TALL; r++) {
        int32_t pair;
        memcpy(&pair, x + r * FEATURES + j, sizeof pair);
        const Ints both = every_int(pair);
        sum[r][0] = dot_here(sum[r][0], left, both);
        sum[r][1] = dot_here(sum[r][1], right, both);
      }
    }
  }
  for (int r = 0; r < TALL; r++)
    for (int c = 0; c < 2; c++) _mm256_store_si256((__m256i *)(sums + r * WIDTH) + c, sum[r][c]);
}

/* Rounds half to even; NaN stays. */
static inline void store_bf16(uint16_t *y, Floats x) {
  const Ints bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), every_int(1));
  Ints rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, every_int(0x7fff))), 16);
  rounded = _mm256_blendv_epi8(rounded, every_int(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);
  _mm_storeu_si128((__m128i *)y, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

/* One row of a panel's sums to y, of which `count` columns exist. */
static void finish(const Product *p, const int32_t *sums, int64_t row, int64_t column, int64_t count) {
  const int64_t size = p->form ? 4 : 2;
  char *y = (char *)p->y + (row * p->columns + column) * size;
  float factors[WIDTH], biases[WIDTH], values[WIDTH];
  if (p->form == 2) {
    memcpy(y, sums, count * size);
    return;
  }
  const float *factor = p->column + column, *bias = p->bias ? p->bias + column : NULL;
  if (count < WIDTH) {
    factor = memcpy(factors, factor, count * sizeof *factor);
    if (bias) bias = memcpy(biases, bias, count * sizeof *bias);
  }
  for (int c = 0; c < WIDTH; c += LANES) {
    Floats value = mul(as_floats(_mm256_load_si256((const __m256i *)(sums + c))), load(factor + c));
    value = mul(value, every(p->row[row]));
    if (bias) value = add(value, load(bias + c));
    char *to = count < WIDTH ? (char *)values : y;
    if (p->form) store((float *)to + c, value);
    else store_bf16((uint16_t *)to + c, value);
  }
  if (count < WIDTH) memcpy(y, values, count * size);
}

/* Rows [first, first + count) times panels [panel, last). */
static void task(const Product *p, int64_t first, int64_t count, int64_t panel, int64_t last, int64_t depth, char *room) {
  int32_t *sums = (int32_t *)room;
  int16_t *w = (int16_t *)(sums + BLOCK * WIDTH), *x = w + FEATURES * WIDTH;
  widen_rows(p, first, count, depth, x);
  for (; panel < last; panel++) {
    const int8_t *packed = p->w + panel * up(p->features, 2) * WIDTH;
    const int16_t *block = x;
    for (int64_t from = 0; from < p->features; from += depth, block += BLOCK * FEATURES) {
      const int64_t length = least(depth, p->features - from);
      widen_panel(packed + from * WIDTH, length, w);
      for (int64_t r = 0; r < count; r += TALL)
        tile(block + r * FEATURES, w, up(length, STEP), from > 0, sums + r * WIDTH);
    }
    for (int64_t r = 0; r < count; r++)
      finish(p, sums + r * WIDTH, first + r, panel * WIDTH, least(WIDTH, p->columns - panel * WIDTH));
  }
}

static int64_t own_room(int64_t features) {
  return BLOCK * WIDTH * sizeof(int32_t) + (FEATURES * WIDTH + parts(features, FEATURES) * BLOCK * FEATURES) * sizeof(int16_t);
}

/* Bytes that `ispa_linear_int8` needs beside its operands. */
int64_t ispa_linear_int8_room(int64_t features) { return own_room(features) * omp_get_max_threads() + 64; }

void ispa_linear_int8(const Product *p, char *room) {
  const int64_t depth = share(p->features, FEATURES, STEP), height = share(p->rows, BLOCK, TALL);
  const int64_t panels = parts(p->columns, WIDTH), across = parts(panels, CHUNK), tasks = parts(p->rows, height) * across;
  room += -(uintptr_t)room % 64;
#pragma omp parallel for schedule(dynamic)
  for (int64_t t = 0; t < tasks; t++) {
    const int64_t first = t / across * height, panel = t % across * CHUNK;
    task(p, first, least(height, p->rows - first), panel, least(panel + CHUNK, panels), depth,
         room + omp_get_thread_num() * own_room(p->features));
  }
}
