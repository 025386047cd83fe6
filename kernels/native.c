/* NSA on a CPU: the three branches of one key head for a run of queries, in one pass over the keys.
 *
 * Compiled by native.py for the machine it runs on. Products run on panels that fit the first-level cache; scores and
 * probabilities never leave it. Vectors are the compiler's own (GCC and Clang), so that the same source serves
 * AVX-512, AVX2 and NEON; only bfloat16 products and a transposition name instructions.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define VL 16 /* floats per vector */
#define NV 4  /* vectors per panel: with MR rows, 24 accumulators of 32 registers */
#define MR 6
#elif defined(__AVX__)
#define VL 8
#define NV 2
#define MR 6
#else
#define VL 4
#define NV 4
#define MR 6
#endif
#define PW (NV * VL)     /* columns of a panel */
#define BATCH_ROWS 24    /* rows at a time: scores, probabilities and one block's panels take 25 KB */
#define BLOCKS 48        /* buffers of one call: 4, and per branch at most 12 */

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));

/* A call. X_stride counts elements from one token to the next, X_head from one key head to the next; a token's query
 * heads are contiguous. Within a task the pointers, T and offset are those of one key head and a run of queries. */
typedef struct {
    int64_t T, offset, S, G, D, Dv;              /* queries, position of the first, keys, sizes */
    int64_t NC, l, d;                            /* compressed keys, their block and stride */
    int64_t block, n, initial, local, window;    /* selection blocks, window */
    int64_t chunk;                               /* blocks per merge step of a streamed top-k, 0 = exact */
    int64_t weight_first, weights;               /* eq. 9: offset of weight[0], how many */
    int64_t q_stride, q_cmp_stride, gates_stride, out_stride, chosen_stride;
    int64_t k_stride, v_stride, k_cmp_stride, v_cmp_stride, k_swa_stride, v_swa_stride;
    int64_t k_head, v_head, k_cmp_head, v_cmp_head, k_swa_head, v_swa_head;
    int64_t kv_bf16, cmp_bf16;                   /* element types of keys and values; queries' is the call's */
    double scale;                                /* softmax scale times log2 e */
    const char *q, *q_cmp, *k, *v, *k_cmp, *v_cmp, *k_swa, *v_swa, *gates;
    const float *weight;
    char *out;
    int32_t *chosen;
} nsa_call;

/* Memory of one call, freed together. */
typedef struct {
    void *block[BLOCKS];
    int used, failed;
} arena;

static void *take(arena *memory, int64_t bytes)
{
    void *p = memory->used < BLOCKS ? aligned_alloc(64, (bytes + 127) / 64 * 64) : NULL;
    if (!p) {
        memory->failed = 1;
        return NULL;
    }
    return memory->block[memory->used++] = p;
}

static inline vf load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
static inline void store(float *p, vf x) { memcpy(p, &x, sizeof x); }
static inline vf splat(float x) { return x - (vf){0}; }
static inline vf choose_by(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

static inline float float_of(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
static inline float from_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }

static inline uint16_t to_bf16(float x) /* round to nearest, ties to even */
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline float total(vf x)
{
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int i = 0; i < VL; i++) sum += x[i];
    return sum;
#endif
}

static inline float maximum(const float *x, int64_t n) /* n a multiple of VL */
{
    vf top = load(x);
    for (int64_t i = VL; i < n; i += VL) {
        vf y = load(x + i);
        top = choose_by(y > top, y, top);
    }
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)top);
#else
    float m = top[0];
    for (int i = 1; i < VL; i++) m = top[i] > m ? top[i] : m;
    return m;
#endif
}

static inline uint32_t lanes(vi mask) /* bit i: lane i, which is 0 or -1 */
{
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < VL; i++) bits |= (uint32_t)(mask[i] & 1) << i;
    return bits;
#endif
}

/* 2^x for x <= 0, 2^-126 below: x = n + f with |f| <= 1/2, Taylor's series of 2^f to f^6 (1.2e-7), n in the exponent. */
static inline vf exp2v(vf x)
{
    x = choose_by(x > -126.0f, x, splat(-126.0f));
    vf magic = x + 12582912.0f, n = magic - 12582912.0f, f = x - n; /* 1.5 * 2^23 rounds to an integer */
    vf y = 1.54035304e-4f * f + 1.33335581e-3f;
    y = y * f + 9.61812911e-3f;
    y = y * f + 5.55041087e-2f;
    y = y * f + 2.40226507e-1f;
    y = y * f + 6.93147181e-1f;
    y = y * f + 1.0f;
    return (vf)((vi)y + ((vi)magic << 23));
}

#if defined(__AVX512BF16__)
/* 16 rows of 16 words (bfloat16 pairs) into 16 columns of dst; rows from `left` on are zero. */
static void transpose16(uint32_t *dst, int64_t dst_stride, const uint16_t *src, int64_t stride, int64_t left)
{
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++)
        a[i] = i < left ? _mm512_loadu_si512(src + i * stride) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
        }
    for (int j = 0; j < 4; j++) { /* a[4i + j] holds words j, j+4, j+8, j+12 of rows 4i .. 4i+3 */
        __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        b[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
        b[j + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        b[j + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        b[j + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(dst + i * dst_stride, b[i]);
}
#endif

/* Compressed keys wholly in the past of a query. */
static int64_t visible(const nsa_call *h, int64_t position)
{
    int64_t n = position + 1 < h->l ? 0 : (position + 1 - h->l) / h->d + 1;
    return smaller(n, h->NC);
}

/* How many of `count` scores are larger than x; VL more can be read. */
static int64_t larger_than(float x, const float *score, int64_t count)
{
    vi found = {0}, lane;
    int64_t j = 0, sum = 0;
    for (; j + VL <= count; j += VL) found -= load(score + j) > x;
    for (int i = 0; i < VL; i++) lane[i] = i;
    found -= (load(score + j) > x) & (lane < (int32_t)(count - j));
    for (int i = 0; i < VL; i++) sum += found[i];
    return sum;
}

/* The n of `count` blocks with the largest scores, ascending from block `first` on; of those that tie the first. Returns
 * how many. Non-negative floats order as their bits do: the n-th largest is bisected in some 15 passes without a branch
 * to guess wrong. */
static int64_t top(const float *score, int64_t count, int64_t n, int64_t first, int32_t *chosen)
{
    int32_t few = 0x7f800000, many = -1; /* fewer than n scores are larger than the first, at least n than the second */
    int64_t above = 0, found = 0;
    if (count <= n) {
        for (; found < count; found++) chosen[found] = (int32_t)(first + found);
        return found;
    }
    while (above < n && few - many > 1) {
        int32_t middle = many + (few - many) / 2;
        int64_t larger = larger_than(float_of(middle), score, count);
        if (larger > n) many = middle;
        else few = middle, above = larger;
    }
    float least = float_of(few);
    int64_t ties = n - above;
    for (int64_t j = 0; j < count; j += VL) {
        uint32_t kept = lanes(load(score + j) >= least) & (uint32_t)((1ull << smaller(VL, count - j)) - 1);
        for (; kept; kept &= kept - 1) {
            int64_t i = j + __builtin_ctz(kept);
            if (score[i] > least || ties-- > 0) chosen[found++] = (int32_t)(first + i);
        }
    }
    return found;
}

/* Eq. 9, 11 and 12 for one query: group[c] is its heads' probability of compressed key c. */
static void choose(const nsa_call *h, int64_t t, const float *group, int64_t keys, float *mapped)
{
    int64_t current = (h->offset + t) / h->block, ratio = h->block / h->d, n = h->n, found;
    int32_t *chosen = h->chosen + t * h->chosen_stride;
    for (int64_t c = 0; c < keys; c += VL) {
        vf sum = splat(0);
        for (int64_t i = 0; i < h->weights; i++) sum += load(group + c + h->weight_first + i) * h->weight[i];
        store(mapped + c, sum);
    }
    float *score = mapped; /* block j's score is written where key j's was: never ahead of what is read */
    for (int64_t j = 1; j <= current; j++) score[j] = mapped[j * ratio];
    for (int64_t j = 0; j < smaller(h->initial, current + 1); j++) score[j] = INFINITY;
    for (int64_t j = larger(0, current - h->local + 1); j <= current; j++) score[j] = INFINITY;
    if (h->chunk) {
        int64_t own = current / h->chunk * h->chunk;
        found = top(score, own, n / 2, 0, chosen);
        found += top(score + own, current + 1 - own, n / 2, own, chosen + found);
    } else {
        found = top(score, current + 1, n, 0, chosen);
    }
    for (int64_t i = found; i < n; i++) chosen[i] = -1;
}

#define BF16 0
#define NAME(x) x##_f32
#include "native.h"
#undef BF16
#undef NAME
#if defined(__AVX512BF16__)
#define BF16 1
#define NAME(x) x##_bf16
#include "native.h"
#endif

#include "step.h"

int nsa_has_bf16(void)
{
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}
