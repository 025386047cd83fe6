/* The attention of one key head for one element type of queries. native.c includes this twice:
 *   BF16 0: a word is a float;  BF16 1: a word is a pair of bfloat16, multiplied by vdpbf16ps into floats.
 * Scores, softmax and sums are float. A panel is PW columns of a matrix, its words row by row.
 */
#if BF16
#define WORD uint32_t
#define WORDS vi
#define PER_WORD 2
#define FMA(acc, a, b) ((vf)_mm512_dpbf16_ps((__m512)(acc), (__m512bh)_mm512_set1_epi32((int)(a)), (__m512bh)(b)))
#else
#define WORD float
#define WORDS vf
#define PER_WORD 1
#define FMA(acc, a, b) ((acc) + (a) * (b))
#endif

/* c[r] = alpha[r] c[r] + a[r] b for `rows` rows and the first `vectors` of a panel b (constants both); alpha NULL:
 * c[r] = a[r] b. */
static inline __attribute__((always_inline)) void NAME(tile)(
    int rows, int vectors, const WORD *const *a, const WORD *b, int64_t words, float *const *c, int64_t column,
    const float *alpha)
{
    vf acc[MR][NV];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) acc[r][j] = alpha ? load(c[r] + column + j * VL) * alpha[r] : splat(0);
    for (int64_t p = 0; p < words; p++) {
        WORDS column_words[NV];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) memcpy(&column_words[j], b + p * PW + j * VL, sizeof(WORDS));
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) acc[r][j] = FMA(acc[r][j], a[r][p], column_words[j]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) store(c[r] + column + j * VL, acc[r][j]);
}

/* The same for any rows and `panels` panels, `stride` words apart. */
static inline __attribute__((always_inline)) void NAME(panels)(
    int vectors, int64_t rows, const WORD *const *a, const WORD *b, int64_t panels, int64_t stride, int64_t words,
    float *const *c, const float *alpha)
{
    for (int64_t n = 0; n < panels; n++, b += stride) {
        int64_t r = 0, column = n * PW;
        for (; r + MR <= rows; r += MR)
            NAME(tile)(MR, vectors, a + r, b, words, c + r, column, alpha ? alpha + r : NULL);
        const float *rest = alpha ? alpha + r : NULL;
        switch (rows - r) {
        case 5: NAME(tile)(5, vectors, a + r, b, words, c + r, column, rest); break;
        case 4: NAME(tile)(4, vectors, a + r, b, words, c + r, column, rest); break;
        case 3: NAME(tile)(3, vectors, a + r, b, words, c + r, column, rest); break;
        case 2: NAME(tile)(2, vectors, a + r, b, words, c + r, column, rest); break;
        case 1: NAME(tile)(1, vectors, a + r, b, words, c + r, column, rest); break;
        }
    }
}

static void NAME(gemm)(
    int64_t rows, const WORD *const *a, const WORD *b, int64_t panels, int64_t stride, int64_t words, float *const *c,
    const float *alpha)
{
    NAME(panels)(NV, rows, a, b, panels, stride, words, c, alpha);
}

/* Products with the first half of one panel. */
static void NAME(half)(int64_t rows, const WORD *const *a, const WORD *b, int64_t words, float *const *c)
{
    NAME(panels)(NV / 2, rows, a, b, 1, 0, words, c, NULL);
}

/* Element i of a row of floats or bfloat16, in this type's element. */
static inline __attribute__((always_inline)) WORD NAME(get)(const void *x, int x_bf16, int64_t i)
{
#if BF16
    return x_bf16 ? ((const uint16_t *)x)[i] : to_bf16(((const float *)x)[i]);
#else
    return x_bf16 ? from_bf16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
#endif
}

/* Elements i*PER_WORD.. of one row as a word (keys), or element i of PER_WORD rows (values; b NULL: zero). */
static inline __attribute__((always_inline)) WORD NAME(join)(const void *a, int64_t i, const void *b, int64_t j, int x_bf16)
{
#if BF16
    return NAME(get)(a, x_bf16, i) | (b ? NAME(get)(b, x_bf16, j) << 16 : 0);
#else
    (void)b, (void)j;
    return NAME(get)(a, x_bf16, i);
#endif
}

static inline __attribute__((always_inline)) void NAME(keys_of)(
    WORD *dst, const char *x, int x_bf16, int64_t stride, int64_t count, int64_t padded, int64_t D)
{
    int64_t words = D / PER_WORD;
    for (int64_t key = 0; key < padded; key++) {
        WORD *to = dst + key / PW * words * PW + key % PW;
        const char *row = x + key * stride * (x_bf16 ? 2 : 4);
        for (int64_t p = 0; p < words; p++)
            to[p * PW] = key < count ? NAME(join)(row, p * PER_WORD, row, p * PER_WORD + 1, x_bf16) : 0;
    }
}

/* Rows of keys become columns: dst[panel][word of D][key]. Keys from `count` to `padded` are zero. */
static void NAME(pack_keys)(
    WORD *dst, const void *x, int x_bf16, int64_t stride, int64_t count, int64_t padded, int64_t D)
{
    int64_t words = D / PER_WORD;
    (void)words;
#if BF16
    if (x_bf16 && words % 16 == 0) {
        for (int64_t key = 0; key < padded; key += 16) {
            WORD *to = dst + key / PW * words * PW + key % PW;
            for (int64_t p = 0; p < words; p += 16)
                transpose16(to + p * PW, PW, (const uint16_t *)x + key * stride + 2 * p, stride, count - key);
        }
        return;
    }
#endif
    if (x_bf16) NAME(keys_of)(dst, x, 1, stride, count, padded, D);
    else NAME(keys_of)(dst, x, 0, stride, count, padded, D);
}

static inline __attribute__((always_inline)) void NAME(values_of)(
    WORD *dst, const char *x, int x_bf16, int64_t stride, int64_t count, int64_t padded, int64_t Dv, int64_t panels)
{
    int64_t words = padded / PER_WORD, row_bytes = stride * (x_bf16 ? 2 : 4);
    for (int64_t p = 0; p < words; p++) {
        int64_t key = p * PER_WORD;
        const char *row = x + key * row_bytes;
        for (int64_t n = 0; n < panels; n++) {
            WORD *to = dst + (n * words + p) * PW;
            int64_t from = n * PW, width = key < count ? smaller(Dv - from, PW) : 0;
            if (key + 1 < count)
                for (int64_t i = 0; i < width; i++) to[i] = NAME(join)(row, from + i, row + row_bytes, from + i, x_bf16);
            else
                for (int64_t i = 0; i < width; i++) to[i] = NAME(join)(row, from + i, NULL, 0, x_bf16);
            for (int64_t i = width; i < PW; i++) to[i] = 0;
        }
    }
}

/* Rows of values stay rows: dst[panel][word of keys][column]; zero beyond `count` keys and Dv columns. */
static void NAME(pack_values)(
    WORD *dst, const void *x, int x_bf16, int64_t stride, int64_t count, int64_t padded, int64_t Dv, int64_t panels)
{
    if (x_bf16) NAME(values_of)(dst, x, 1, stride, count, padded, Dv, panels);
    else NAME(values_of)(dst, x, 0, stride, count, padded, Dv, panels);
}

/* s = 2^(s * scale - m) for n scores (a multiple of VL), and as words in p. Returns the sums by lane. */
static inline vf NAME(exponentials)(float *s, int64_t n, float scale, float m, WORD *p)
{
    vf sum = splat(0);
    for (int64_t i = 0; i < n; i += VL) {
        vf e = exp2v(load(s + i) * scale - m);
        sum += e;
        store(s + i, e);
#if BF16
        __m256bh half = _mm512_cvtneps_pbh((__m512)e);
        memcpy((uint16_t *)p + i, &half, sizeof half);
#else
        store(p + i, e);
#endif
    }
    return sum;
}

/* Scores below -inf's reach: exp2v gives 2^-126 for them, so the few masked ones of a row are cleared by hand. */
static inline void NAME(clear)(float *s, WORD *p, int64_t from, int64_t to)
{
    for (int64_t i = from; i < to; i++) {
        s[i] = 0;
#if BF16
        ((uint16_t *)p)[i] = 0;
#else
        p[i] = 0;
#endif
    }
}

/* Softmax state of T * G rows: o = sum 2^(s - m) v (width columns), l = sum 2^(s - m) by lane, m = max s, in log2. */
typedef struct {
    float *o, *l, *m;
} NAME(state);

/* Buffers for one batch of rows. */
typedef struct {
    float *s, *alpha, **c, **o;
    WORD *p, *keys, *values;
    const WORD **a, **pa;
} NAME(batch);

static NAME(batch) NAME(new_batch)(arena *memory, int64_t rows, int64_t keys, int64_t D, int64_t width)
{
    NAME(batch) b;
    b.s = take(memory, rows * keys * sizeof(float));
    b.p = take(memory, rows * keys * sizeof(WORD) / PER_WORD);
    b.keys = take(memory, keys * D / PER_WORD * sizeof(WORD));
    b.values = take(memory, keys * width / PER_WORD * sizeof(WORD));
    b.alpha = take(memory, rows * sizeof(float));
    b.c = take(memory, rows * sizeof(float *));
    b.o = take(memory, rows * sizeof(float *));
    b.a = take(memory, rows * sizeof(WORD *));
    b.pa = take(memory, rows * sizeof(WORD *));
    return b;
}

static NAME(state) NAME(new_state)(arena *memory, int64_t rows, int64_t width)
{
    NAME(state) state = {
        take(memory, rows * width * sizeof(float)),
        take(memory, rows * VL * sizeof(float)),
        take(memory, rows * sizeof(float)),
    };
    return state;
}

static void NAME(reset)(NAME(state) *state, int64_t rows, int64_t width)
{
    memset(state->o, 0, rows * width * sizeof(float));
    memset(state->l, 0, rows * VL * sizeof(float));
    for (int64_t r = 0; r < rows; r++) state->m[r] = -INFINITY;
}

/* Softmax of a row of scores over the keys lo..hi-1, the running state brought up to date. Returns its rescaling. */
static inline float NAME(update)(
    float *s, WORD *p, int64_t lo, int64_t hi, int64_t padded, float scale, float *l, float *m)
{
    for (int64_t x = 0; x < lo; x++) s[x] = -INFINITY;
    for (int64_t x = hi; x < padded; x++) s[x] = -INFINITY;
    float highest = maximum(s, padded) * scale, alpha = 1;
    if (highest > *m) {
        alpha = exp2f(*m - highest);
        *m = highest;
    }
    vf sum = NAME(exponentials)(s, padded, scale, *m, p);
    if (lo > 0 || hi < padded) {
        NAME(clear)(s, p, 0, lo);
        NAME(clear)(s, p, hi, padded);
    }
    store(l, load(l) * alpha + sum);
    return alpha;
}

/* `count` keys from key0 on against the queries list[0..n). */
static void NAME(attend)(
    const nsa_call *h, const NAME(batch) *b, NAME(state) *state, int64_t width, int64_t key0, int64_t count,
    const void *k, int64_t k_stride, const void *v, int64_t v_stride, const int32_t *list, int64_t n, int64_t window)
{
    int64_t G = h->G, words = h->D / PER_WORD, padded = round_up(count, PW), at_once = larger(1, BATCH_ROWS / G);
    int64_t live = round_up(count, VL); /* a block of half a panel takes half the exponentials and value products */
    size_t size = h->kv_bf16 ? 2 : 4;
    NAME(pack_keys)(b->keys, (const char *)k + key0 * k_stride * size, h->kv_bf16, k_stride, count, padded, h->D);
    NAME(pack_values)(
        b->values, (const char *)v + key0 * v_stride * size, h->kv_bf16, v_stride, count, live, h->Dv, width / PW);
    for (int64_t start = 0; start < n; start += at_once) {
        int64_t queries = smaller(n - start, at_once), rows = queries * G;
        for (int64_t r = 0; r < rows; r++) {
            int64_t t = list[start + r / G];
            b->a[r] = (const WORD *)h->q + t * h->q_stride / PER_WORD + r % G * words;
            b->c[r] = b->s + r * padded;
            b->pa[r] = b->p + r * padded / PER_WORD;
            b->o[r] = state->o + (t * G + r % G) * width;
        }
        if (live <= PW / 2) NAME(half)(rows, b->a, b->keys, words, b->c);
        else NAME(gemm)(rows, b->a, b->keys, padded / PW, words * PW, words, b->c, NULL);
        for (int64_t r = 0; r < rows; r++) {
            int64_t t = list[start + r / G], row = t * G + r % G;
            int64_t end = h->offset + t - key0 + 1, lo = window ? larger(0, end - window) : 0;
            b->alpha[r] = NAME(update)(
                b->c[r], (WORD *)b->pa[r], lo, smaller(end, count), live, h->scale, state->l + row * VL,
                state->m + row);
        }
        NAME(gemm)(rows, b->pa, b->values, width / PW, live / PER_WORD * PW, live / PER_WORD, b->o, b->alpha);
    }
}

static inline float NAME(gate)(const nsa_call *h, int64_t row, int which)
{
    int64_t at = row / h->G * h->gates_stride + row % h->G * 3 + which;
#if BF16
    return from_bf16(((const uint16_t *)h->gates)[at]);
#else
    return ((const float *)h->gates)[at];
#endif
}

/* Whether a branch counts for query t: a gate of 2^-20 moves a sum by 1/2048 of what bfloat16 rounds off. */
static inline int NAME(open)(const nsa_call *h, int64_t t, int which)
{
    const float closed = BF16 ? 0x1p-20f : 0;
    for (int64_t r = t * h->G; r < (t + 1) * h->G; r++)
        if (!(NAME(gate)(h, r, which) <= closed)) return 1;
    return 0;
}

/* Whether a branch counts for any of `count` queries. */
static int NAME(any_open)(const nsa_call *h, int64_t first, int64_t count, int which)
{
    for (int64_t t = first; t < first + count; t++)
        if (NAME(open)(h, t, which)) return 1;
    return 0;
}

/* acc += gate * o / l for every row of an open branch. */
static void NAME(add_branch)(const nsa_call *h, const NAME(state) *state, int64_t width, int which, float *acc)
{
    for (int64_t r = 0; r < h->T * h->G; r++) {
        if (!NAME(open)(h, r / h->G, which)) continue;
        float weight = NAME(gate)(h, r, which) / total(load(state->l + r * VL));
        for (int64_t i = r * width; i < (r + 1) * width; i += VL) store(acc + i, load(acc + i) + load(state->o + i) * weight);
    }
}

/* Branch 1 and the choice of blocks: acc = g_cmp o_cmp, h->chosen. Some queries at a time against all their keys. */
static void NAME(compressed)(const nsa_call *h, float *acc, int64_t width, arena *memory)
{
    int64_t G = h->G, words = h->D / PER_WORD, at_once = larger(1, BATCH_ROWS / G);
    int64_t NC = visible(h, h->offset + h->T - 1), padded = larger(PW, round_up(NC, PW));
    int64_t NB = (h->offset + h->T - 1) / h->block + 1;
    int64_t mapped_keys = round_up(larger(padded, NB * (h->block / h->d)), VL);
    int64_t margin = round_up(larger(labs(h->weight_first), h->weight_first + h->weights), VL) + VL;
    NAME(batch) b = NAME(new_batch)(memory, at_once * G, padded, h->D, width);
    float *group = take(memory, (mapped_keys + 2 * margin) * sizeof(float));
    float *mapped = take(memory, (mapped_keys + VL) * sizeof(float));
    if (memory->failed) return;
    memset(group, 0, (mapped_keys + 2 * margin) * sizeof(float));
    group += margin;
    NAME(pack_keys)(b.keys, h->k_cmp, h->cmp_bf16, h->k_cmp_stride, NC, padded, h->D);
    if (NAME(any_open)(h, 0, h->T, 0))
        NAME(pack_values)(b.values, h->v_cmp, h->cmp_bf16, h->v_cmp_stride, NC, padded, h->Dv, width / PW);
    for (int64_t start = 0; start < h->T; start += at_once) {
        int64_t queries = smaller(h->T - start, at_once), rows = queries * G;
        int64_t most = round_up(visible(h, h->offset + start + queries - 1), PW); /* that any of them sees */
        for (int64_t r = 0; r < rows; r++) {
            b.a[r] = (const WORD *)h->q_cmp + (start + r / G) * h->q_cmp_stride / PER_WORD + r % G * words;
            b.c[r] = b.s + r * padded;
            b.pa[r] = b.p + r * padded / PER_WORD;
            b.o[r] = acc + (start * G + r) * width;
        }
        NAME(gemm)(rows, b.a, b.keys, most / PW, words * PW, words, b.c, NULL);
        for (int64_t i = 0; i < queries; i++) {
            int64_t n = visible(h, h->offset + start + i);
            memset(group, 0, most * sizeof(float));
            for (int64_t r = i * G; r < (i + 1) * G; r++) {
                float l[VL] = {0}, m = -INFINITY, inverse = 0;
                if (n) {
                    NAME(update)(b.c[r], (WORD *)b.pa[r], 0, n, most, h->scale, l, &m);
                    inverse = 1 / total(load(l));
                    for (int64_t x = 0; x < most; x += VL) store(group + x, load(group + x) + load(b.c[r] + x) * inverse);
                } else {
                    NAME(clear)(b.c[r], (WORD *)b.pa[r], 0, most);
                }
                b.alpha[r] = NAME(gate)(h, start * G + r, 0) * inverse;
            }
            choose(h, start + i, group, round_up(((h->offset + start + i) / h->block + 1) * (h->block / h->d), VL), mapped);
        }
        if (!NAME(any_open)(h, start, queries, 0)) {
            memset(acc + start * G * width, 0, rows * width * sizeof(float));
            continue;
        }
        NAME(gemm)(rows, b.pa, b.values, width / PW, padded / PER_WORD * PW, most / PER_WORD, b.o, NULL);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < width; i += VL) store(b.o[r] + i, load(b.o[r] + i) * b.alpha[r]);
    }
}

/* Branch 2: every block once, for all queries that chose it and let it count. */
static void NAME(selected)(const nsa_call *h, NAME(state) *state, int64_t width, arena *memory)
{
    int64_t NB = (h->offset + h->T - 1) / h->block + 1;
    int64_t *stop = take(memory, (NB + 1) * sizeof(int64_t));
    int32_t *list = take(memory, h->T * h->n * sizeof(int32_t));
    NAME(batch) b = NAME(new_batch)(
        memory, larger(1, BATCH_ROWS / h->G) * h->G, round_up(h->block, PW), h->D, width);
    if (memory->failed) return;
    memset(stop, 0, (NB + 1) * sizeof(int64_t));
    for (int64_t t = 0; t < h->T; t++)
        for (int64_t i = 0; i < h->n && NAME(open)(h, t, 1); i++)
            stop[h->chosen[t * h->chosen_stride + i] + 1]++; /* -1 lands in stop[0] */
    stop[0] = 0;
    for (int64_t j = 1; j <= NB; j++) stop[j] += stop[j - 1];
    for (int64_t t = 0; t < h->T; t++) /* stop[j] is block j's first place, and its end when all are placed */
        for (int64_t i = 0; i < h->n && NAME(open)(h, t, 1); i++) {
            int32_t j = h->chosen[t * h->chosen_stride + i];
            if (j >= 0) list[stop[j]++] = (int32_t)t;
        }
    for (int64_t j = 0, start = 0; j < NB; start = stop[j++])
        if (stop[j] > start)
            NAME(attend)(
                h, &b, state, width, j * h->block, smaller(h->block, h->S - j * h->block), h->k, h->k_stride, h->v,
                h->v_stride, list + start, stop[j] - start, 0);
}

/* Branch 3: every run of PW keys once, for the queries whose window reaches it and counts. */
static void NAME(windowed)(const nsa_call *h, NAME(state) *state, int64_t width, arena *memory)
{
    NAME(batch) b = NAME(new_batch)(memory, larger(1, BATCH_ROWS / h->G) * h->G, PW, h->D, width);
    int32_t *list = take(memory, h->T * sizeof(int32_t));
    if (memory->failed) return;
    int64_t n = 0, first = 0, end = 0;
    for (int64_t t = 0; t < h->T; t++)
        if (NAME(open)(h, t, 2)) list[n++] = (int32_t)t;
    for (int64_t key = larger(0, h->offset - h->window + 1) / PW * PW; key < h->offset + h->T; key += PW) {
        while (first < n && h->offset + list[first] < key) first++;
        while (end < n && h->offset + list[end] < key + PW + h->window - 1) end++;
        if (first < end)
            NAME(attend)(
                h, &b, state, width, key, smaller(PW, h->S - key), h->k_swa, h->k_swa_stride, h->v_swa, h->v_swa_stride,
                list + first, end - first, h->window);
    }
}

/* The part of a call that is queries first..first+T-1 of one key head. */
static nsa_call NAME(task)(const nsa_call *call, int64_t head, int64_t first, int64_t T)
{
    nsa_call h = *call;
    int64_t size = BF16 ? 2 : 4, kv = h.kv_bf16 ? 2 : 4, cmp = h.cmp_bf16 ? 2 : 4, group = head * h.G;
    h.T = T;
    h.offset += first;
    h.q += (first * h.q_stride + group * h.D) * size;
    h.q_cmp += (first * h.q_cmp_stride + group * h.D) * size;
    h.gates += (first * h.gates_stride + group * 3) * size;
    h.out += (first * h.out_stride + group * h.Dv) * size;
    h.chosen += first * h.chosen_stride + head * h.n;
    h.k += head * h.k_head * kv;
    h.v += head * h.v_head * kv;
    h.k_swa += head * h.k_swa_head * kv;
    h.v_swa += head * h.v_swa_head * kv;
    h.k_cmp += head * h.k_cmp_head * cmp;
    h.v_cmp += head * h.v_cmp_head * cmp;
    return h;
}

/* All branches of one key head for queries first..first+T-1 of a call. Returns 0, or -1 if there is no memory. */
int NAME(nsa_attention)(const nsa_call *call, int64_t head, int64_t first, int64_t T)
{
    nsa_call task = NAME(task)(call, head, first, T), *h = &task;
    arena memory = {{0}, 0, 0};
    int64_t rows = h->T * h->G, width = round_up(h->Dv, PW);
    float *acc = take(&memory, rows * width * sizeof(float));
    NAME(state) state = NAME(new_state)(&memory, rows, width);
    if (!memory.failed) NAME(compressed)(h, acc, width, &memory);
    if (!memory.failed) {
        NAME(reset)(&state, rows, width);
        NAME(selected)(h, &state, width, &memory);
    }
    if (!memory.failed) NAME(add_branch)(h, &state, width, 1, acc);
    if (!memory.failed && h->window) {
        NAME(reset)(&state, rows, width);
        NAME(windowed)(h, &state, width, &memory);
        if (!memory.failed) NAME(add_branch)(h, &state, width, 2, acc);
    }
    for (int64_t r = 0; r < (memory.failed ? 0 : rows); r++)
        for (int64_t i = 0; i < h->Dv; i++) {
            int64_t to = r / h->G * h->out_stride + r % h->G * h->Dv + i;
#if BF16
            ((uint16_t *)h->out)[to] = to_bf16(acc[r * width + i]);
#else
            ((float *)h->out)[to] = acc[r * width + i];
#endif
        }
    for (int i = 0; i < memory.used; i++) free(memory.block[i]);
    return memory.failed ? -1 : 0;
}

#undef WORD
#undef WORDS
#undef PER_WORD
#undef FMA
