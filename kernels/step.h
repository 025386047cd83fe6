/* A decode step: one token through every layer of a model in one call.
 *
 * Reading the weights bounds a step (134 MB for the built-in model), so operations of microseconds must not wait for one
 * another more than they have to. Threads claim chunks of each phase and go on when all its chunks are done, whoever did
 * them: a thread that another program holds up is not waited for, unless in the middle of a chunk.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define CHUNK_BYTES 32768 /* weights per claim: some 3 us */
#define SPINS 4000        /* looks at a counter before the core is offered to others */
#define SUMS 4            /* vectors of a row summed side by side */
#define AHEAD 2048        /* bytes of weights asked for ahead of use */

enum { FLOAT32, BFLOAT16, INT8 };
enum { Q, K, V, GATES, O, GATE, UP, DOWN, MAPS };

/* y = (W x) * scale + bias, W of `rows` x `columns`; scale and bias may be NULL. */
typedef struct {
    const void *weight;
    const float *scale, *bias;
    int64_t rows, columns, type;
} nsa_map;

typedef struct {
    nsa_map map[MAPS];
    const float *attn_norm, *mlp_norm;
    char *k, *v;
    const char *k_cmp, *v_cmp;
} nsa_layer;

typedef struct {
    int64_t layers, hidden, heads, threads, q_bf16; /* q_bf16: attention's products in bfloat16 */
    int64_t plain_cmp;                              /* the compressed branch takes queries before their rotation */
    double eps;
    nsa_call call; /* what all layers share */
    const nsa_layer *layer;
    nsa_map vocabulary;
    const float *norm, *cos, *sin;
    float *x;      /* in: the token's embedding; out: the last hidden state before its norm */
    float *logits; /* out */
} nsa_step;

/* Buffers that the threads share, and what is claimed and done of each phase. */
typedef struct {
    const nsa_step *step;
    float *inputs, *o, *inner; /* q k v gates; attention's result; gate * up */
    char *q, *q_cmp, *gates, *out;
    int32_t *chosen;
    int64_t scratch; /* floats a thread needs for itself */
    atomic_llong *claimed, *done;
    atomic_int failed;
} team;

static inline __attribute__((always_inline)) vf weights_at(const void *w, int64_t i, int type)
{
    /* loops, which the compiler turns into one widening instruction; from __builtin_convertvector it made 16 */
    vi wide;
    if (type == INT8) {
        for (int j = 0; j < VL; j++) wide[j] = ((const int8_t *)w + i)[j];
        return __builtin_convertvector(wide, vf);
    }
    if (type == BFLOAT16) {
        for (int j = 0; j < VL; j++) wide[j] = ((const uint16_t *)w + i)[j];
        return (vf)(wide << 16);
    }
    return load((const float *)w + i);
}

static inline __attribute__((always_inline)) float weight_at(const void *w, int64_t i, int type)
{
    return type == INT8 ? ((const int8_t *)w)[i] : type == BFLOAT16 ? from_bf16(((const uint16_t *)w)[i]) : ((const float *)w)[i];
}

/* Rows from..to-1 of W times x, one after the other: as one stream with prefetches one core read int8 weights at 16
 * GB/s, four rows side by side at 11 (576 columns; memory gives 27). */
static inline __attribute__((always_inline)) void typed_product(
    const nsa_map *m, int64_t from, int64_t to, const float *x, float *y, int type)
{
    const int64_t size = type == INT8 ? 1 : type == BFLOAT16 ? 2 : 4;
    int64_t n = m->columns, whole = n / (SUMS * VL) * (SUMS * VL);
    for (int64_t r = from; r < to; r++) {
        const char *w = (const char *)m->weight + r * n * size;
        vf sum[SUMS];
        for (int j = 0; j < SUMS; j++) sum[j] = splat(0);
        for (int64_t i = 0; i < whole; i += SUMS * VL) {
            for (int64_t line = 0; line < SUMS * VL * size; line += 64) __builtin_prefetch(w + i * size + line + AHEAD);
#pragma GCC unroll 4
            for (int j = 0; j < SUMS; j++) sum[j] += weights_at(w, i + j * VL, type) * load(x + i + j * VL);
        }
        float s = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
        for (int64_t i = whole; i < n; i++) s += weight_at(w, i, type) * x[i];
        y[r - from] = s * (m->scale ? m->scale[r] : 1) + (m->bias ? m->bias[r] : 0);
    }
}

/* y = rows from..to-1 of the map of x. */
static void product(const nsa_map *m, int64_t from, int64_t to, const float *x, float *y)
{
    if (m->type == INT8) typed_product(m, from, to, x, y, INT8);
    else if (m->type == BFLOAT16) typed_product(m, from, to, x, y, BFLOAT16);
    else typed_product(m, from, to, x, y, FLOAT32);
}

static void rms_norm(const float *x, const float *weight, int64_t n, double eps, float *y)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    float inverse = (float)(1 / sqrt(sum / n + eps));
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * inverse * weight[i];
}

static int64_t chunk_rows(const nsa_map *m)
{
    static const int64_t size[] = {4, 2, 1};
    return larger(1, CHUNK_BYTES / (m->columns * size[m->type]));
}

static int64_t chunks_of(const nsa_map *m) { return (m->rows + chunk_rows(m) - 1) / chunk_rows(m); }

/* Rows of chunk `index` of a map. */
static void chunk_of(const nsa_map *m, int64_t index, int64_t *from, int64_t *to)
{
    *from = index * chunk_rows(m);
    *to = smaller(*from + chunk_rows(m), m->rows);
}

/* The phases of a layer. `index` counts chunks; h is the phase's input, own to the thread. */
static void project(team *t, const nsa_layer *layer, int64_t index, float *h)
{
    float *y = t->inputs;
    const nsa_map *m = layer->map;
    for (; index >= chunks_of(m); m++) {
        index -= chunks_of(m);
        y += m->rows;
    }
    int64_t from, to;
    chunk_of(m, index, &from, &to);
    product(m, from, to, h, y + from);
}

static void rotate(float *x, const float *cosine, const float *sine, int64_t half)
{
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

static void put(char *to, int64_t at, const float *x, int64_t n, int64_t bf16)
{
    for (int64_t i = 0; i < n; i++)
        if (bf16) ((uint16_t *)to)[at + i] = to_bf16(x[i]);
        else ((float *)to)[at + i] = x[i];
}

/* One key head: rotations, its key and value into the cache, all branches. */
static void attend_head(team *t, const nsa_layer *layer, int64_t head, float *h)
{
    (void)h;
    const nsa_step *s = t->step;
    nsa_call call = s->call;
    int64_t D = call.D, Dv = call.Dv, G = call.G, first = head * G, bf16 = s->q_bf16;
    const nsa_map *m = layer->map;
    float *q = t->inputs + first * D, *k = t->inputs + m[Q].rows + head * D;
    float *v = t->inputs + m[Q].rows + m[K].rows + head * Dv, *g = v - head * Dv + m[V].rows + first * 3;
    if (s->plain_cmp) put(t->q_cmp, first * D, q, G * D, bf16);
    for (int64_t i = 0; i < G; i++) rotate(q + i * D, s->cos, s->sin, D / 2);
    rotate(k, s->cos, s->sin, D / 2);
    put(layer->k, head * call.k_head + call.offset * call.k_stride, k, D, call.kv_bf16);
    put(layer->v, head * call.v_head + call.offset * call.v_stride, v, Dv, call.kv_bf16);
    for (int64_t i = 0; i < 3 * G; i++) g[i] = 1 / (1 + expf(-g[i]));
    put(t->q, first * D, q, G * D, bf16);
    put(t->gates, first * 3, g, 3 * G, bf16);
    call.q = t->q;
    call.q_cmp = s->plain_cmp ? t->q_cmp : t->q;
    call.gates = t->gates;
    call.out = t->out;
    call.k = call.k_swa = layer->k;
    call.v = call.v_swa = layer->v;
    call.k_cmp = layer->k_cmp;
    call.v_cmp = layer->v_cmp;
    call.chosen = t->chosen;
    int failed = 0;
#if defined(__AVX512BF16__)
    if (bf16) failed = nsa_attention_bf16(&call, head, 0, 1);
    else
#endif
        failed = nsa_attention_f32(&call, head, 0, 1);
    if (failed) atomic_store(&t->failed, 1);
    for (int64_t i = first * Dv; i < (first + G) * Dv; i++)
        t->o[i] = bf16 ? from_bf16(((uint16_t *)t->out)[i]) : ((float *)t->out)[i];
}

/* x += the map of y. */
static void add(team *t, const nsa_map *m, int64_t index, const float *y)
{
    int64_t from, to;
    chunk_of(m, index, &from, &to);
    for (int64_t r = from; r < to; r++) {
        float part;
        product(m, r, r + 1, y, &part);
        t->step->x[r] += part;
    }
}

static void add_attention(team *t, const nsa_layer *layer, int64_t index, float *h)
{
    (void)h;
    add(t, &layer->map[O], index, t->o);
}

static void widen(team *t, const nsa_layer *layer, int64_t index, float *h)
{
    int64_t from, to;
    chunk_of(&layer->map[GATE], index, &from, &to);
    float *up = h + t->step->hidden;
    product(&layer->map[GATE], from, to, h, t->inner + from);
    product(&layer->map[UP], from, to, h, up);
    for (int64_t r = from; r < to; r++) t->inner[r] *= up[r - from] / (1 + expf(-t->inner[r]));
}

static void add_mlp(team *t, const nsa_layer *layer, int64_t index, float *h)
{
    (void)h;
    add(t, &layer->map[DOWN], index, t->inner);
}

static void vocabulary(team *t, const nsa_layer *layer, int64_t index, float *h)
{
    (void)layer;
    int64_t from, to;
    chunk_of(&t->step->vocabulary, index, &from, &to);
    product(&t->step->vocabulary, from, to, h, t->step->logits + from);
}

typedef void (*work)(team *, const nsa_layer *, int64_t, float *);

/* Claim chunks until none is left, then wait until all are done. */
static void phase(team *t, int64_t *index, work run, const nsa_layer *layer, int64_t chunks, float *h)
{
    atomic_llong *claimed = t->claimed + *index, *done = t->done + (*index)++;
    for (int64_t c; (c = atomic_fetch_add(claimed, 1)) < chunks;) {
        run(t, layer, c, h);
        atomic_fetch_add(done, 1);
    }
    for (int64_t spins = 0; atomic_load(done) < chunks; spins++)
        if (spins >= SPINS) sched_yield();
}

#define PHASES 5 /* a layer's */

/* What every thread does. A late one finds nothing to claim, and what it then reads of x goes nowhere. */
static void *walk(void *argument)
{
    team *t = argument;
    const nsa_step *s = t->step;
    float *h = malloc(t->scratch * sizeof(float));
    if (!h) {
        atomic_fetch_add(&t->failed, 1);
        return NULL;
    }
    int64_t index = 0;
    for (const nsa_layer *layer = s->layer; layer < s->layer + s->layers; layer++) {
        const nsa_map *m = layer->map;
        int64_t inputs = chunks_of(&m[Q]) + chunks_of(&m[K]) + chunks_of(&m[V]) + chunks_of(&m[GATES]);
        rms_norm(s->x, layer->attn_norm, s->hidden, s->eps, h);
        phase(t, &index, project, layer, inputs, h);
        phase(t, &index, attend_head, layer, s->heads, h);
        phase(t, &index, add_attention, layer, chunks_of(&m[O]), h);
        rms_norm(s->x, layer->mlp_norm, s->hidden, s->eps, h);
        phase(t, &index, widen, layer, chunks_of(&m[GATE]), h);
        phase(t, &index, add_mlp, layer, chunks_of(&m[DOWN]), h);
    }
    rms_norm(s->x, s->norm, s->hidden, s->eps, h);
    phase(t, &index, vocabulary, NULL, chunks_of(&s->vocabulary), h);
    free(h);
    return NULL;
}

/* Returns 0, or -1 if there is no memory. */
int nsa_decode_step(const nsa_step *s)
{
    const nsa_map *m = s->layer->map;
    arena memory = {{0}, 0, 0};
    int64_t phases = PHASES * s->layers + 1, threads = larger(1, smaller(s->threads, 64));
    team t = {.step = s, .scratch = s->hidden + chunk_rows(&m[GATE])};
    t.inputs = take(&memory, (m[Q].rows + m[K].rows + m[V].rows + m[GATES].rows) * sizeof(float));
    t.o = take(&memory, m[O].columns * sizeof(float));
    t.inner = take(&memory, m[GATE].rows * sizeof(float));
    t.q = take(&memory, m[Q].rows * sizeof(float));
    t.q_cmp = take(&memory, m[Q].rows * sizeof(float));
    t.gates = take(&memory, m[GATES].rows * sizeof(float));
    t.out = take(&memory, m[O].columns * sizeof(float));
    t.chosen = take(&memory, s->heads * s->call.n * sizeof(int32_t));
    t.claimed = take(&memory, phases * sizeof(atomic_llong));
    t.done = take(&memory, phases * sizeof(atomic_llong));
    if (!memory.failed) {
        pthread_t others[64];
        int64_t started = 0;
        for (int64_t i = 0; i < phases; i++) {
            atomic_init(t.claimed + i, 0);
            atomic_init(t.done + i, 0);
        }
        while (started < threads - 1 && !pthread_create(&others[started], NULL, walk, &t)) started++;
        walk(&t);
        while (started) pthread_join(others[--started], NULL);
    }
    for (int i = 0; i < memory.used; i++) free(memory.block[i]);
    return memory.failed || t.failed ? -1 : 0;
}
