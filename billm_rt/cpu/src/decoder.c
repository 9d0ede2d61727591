/* The loop over the decoder layers: products, and between them what float_ops.h computes. */
#include "decoder.h"

#include <stdlib.h>

/* What a run of `tokens` tokens computes on the way, cut from the decoder's scratch. */
struct work {
    struct billm_decoder *decoder;
    const struct billm_float_ops *ops;
    size_t tokens, start;
    const float *cos, *sin;
    float *x;           /* [tokens, hidden]: the caller's */
    float *normed;      /* [tokens, hidden] */
    float *query;       /* [tokens, heads, width]; then what attention makes of it */
    float *mixed;       /* the same shape */
    float *key, *value; /* [tokens, kv_heads, width] */
    float *gate, *up;   /* [tokens, intermediate] */
    int16_t *values;    /* quantized activations [tokens, widest input] */
    float *scales;
    const struct billm_cache *cache;
    const struct billm_norm *norm; /* of a norm task, */
    const float *norm_from;        /* its input */
    float *norm_to;
    const struct billm_layer *layer;
    struct billm_attention attention;
    size_t tasks_per_head;
};

static size_t larger_of(size_t a, size_t b) {
    return a > b ? a : b;
}

/* Cut `count` elements of `size` bytes from the scratch; with `base` NULL only add up what is needed. */
static void *cut(char *base, size_t *used, size_t count, size_t size) {
    void *part = base ? base + *used : NULL;
    *used += billm_round_up(count * size, 64);
    return part;
}

static size_t lay_out(struct work *w, char *base) {
    const struct billm_decoder *d = w->decoder;
    const size_t tokens = w->tokens, query = d->heads * d->width, kv = d->kv_heads * d->width;
    const size_t widest = larger_of(larger_of(d->hidden, d->intermediate), query);
    size_t used = 0;
    w->normed = cut(base, &used, tokens * d->hidden, sizeof(float));
    w->query = cut(base, &used, tokens * query, sizeof(float));
    w->mixed = cut(base, &used, tokens * query, sizeof(float));
    w->key = cut(base, &used, tokens * kv, sizeof(float));
    w->value = cut(base, &used, tokens * kv, sizeof(float));
    w->gate = cut(base, &used, tokens * d->intermediate, sizeof(float));
    w->up = cut(base, &used, d->gated ? tokens * d->intermediate : 0, sizeof(float));
    w->values = cut(base, &used, tokens * widest, sizeof(int16_t));
    w->scales = cut(base, &used, tokens * (widest / BILLM_UNIT + 1), sizeof(float));
    return used;
}

static int make_room(struct work *w) {
    struct billm_decoder *d = w->decoder;
    size_t needed = lay_out(w, NULL);
    if (needed > d->scratch_size) {
        free(d->scratch);
        d->scratch = aligned_alloc(64, billm_round_up(needed, 64));
        d->scratch_size = d->scratch ? needed : 0;
        if (!d->scratch)
            return -1;
    }
    lay_out(w, d->scratch);
    return 0;
}

/* ---- the steps of a layer: tasks of one token each ---- */

static void norm_task(void *context, size_t token) {
    const struct work *w = context;
    const size_t n = w->decoder->hidden;
    w->ops->norm(w->norm_from + token * n, w->norm->weight, w->norm->bias, w->decoder->norm_eps, n,
                 w->norm_to + token * n);
}

static void run_norm(struct work *w, const struct billm_norm *norm, const float *from, float *to) {
    w->norm = norm;
    w->norm_from = from;
    w->norm_to = to;
    billm_pool_run(norm_task, w, w->tokens);
}

static int run_group(struct work *w, const struct billm_group *group, const float *x, float *const outs[3],
                     int accumulate) {
    for (size_t i = 0; i < group->count; i++) {
        const struct billm_input *input = &group->inputs[i];
        const size_t cols = input->products[0].weight->cols;
        struct billm_product products[3];
        for (size_t j = 0; j < input->count; j++) {
            products[j] = input->products[j];
            products[j].out = outs[input->place[j]];
            products[j].out_stride = products[j].weight->rows;
            products[j].accumulate = accumulate;
        }
        const struct billm_tokens tokens = {w->values, w->scales, w->tokens, w->decoder->activation_bits};
        billm_quantize_in_turn(x, input->col_scale, w->tokens, cols, input->block, tokens.bits, w->values, w->scales);
        if (billm_products_in_turn(products, input->count, &tokens))
            return -1;
    }
    return 0;
}

/* Norm, turn and scale the heads of a token, and put its keys and values into the cache. */
static void place_task(void *context, size_t token) {
    const struct work *w = context;
    const struct billm_decoder *d = w->decoder;
    const struct billm_float_ops *ops = w->ops;
    const size_t width = d->width, half = width / 2, position = w->start + token;
    const float *cos = w->cos ? w->cos + token * half : NULL, *sin = w->sin ? w->sin + token * half : NULL;
    const float factor = 1.0f / sqrtf((float)width);
    for (size_t head = 0; head < d->heads; head++) {
        float *query = w->query + (token * d->heads + head) * width;
        if (w->layer->q_norm)
            ops->norm(query, w->layer->q_norm, NULL, d->norm_eps, width, query);
        if (cos)
            ops->rotate(query, cos, sin, half, factor);
        else
            for (size_t i = 0; i < width; i++)
                query[i] *= factor;
    }
    for (size_t head = 0; head < d->kv_heads; head++) {
        const struct billm_cache *cache = w->cache;
        const size_t first = head * cache->capacity, place = first + position;
        float *key = w->key + (token * d->kv_heads + head) * width;
        if (w->layer->k_norm)
            ops->norm(key, w->layer->k_norm, NULL, d->norm_eps, width, key);
        if (cos)
            ops->rotate(key, cos, sin, half, 1.0f);
        const size_t group = (first + position / BILLM_KEY_GROUP * BILLM_KEY_GROUP) * width;
        void *keys = billm_cache_element(cache, cache->keys, group + position % BILLM_KEY_GROUP);
        void *values = billm_cache_element(cache, cache->values, place * width);
        const float *value = w->value + (token * d->kv_heads + head) * width;
        cache->key_scale[place] = ops->store(key, width, cache->bits, keys, BILLM_KEY_GROUP);
        cache->value_scale[place] = ops->store(value, width, cache->bits, values, 1);
    }
}

static void attention_task(void *context, size_t index) {
    const struct work *w = context;
    const struct billm_attention *a = &w->attention;
    const size_t rows = a->tokens * (a->heads / a->kv_heads);
    const size_t first = index % w->tasks_per_head * BILLM_QUERY_ROWS;
    w->ops->attend(a, index / w->tasks_per_head, first, billm_min(BILLM_QUERY_ROWS, rows - first));
}

static void activate_task(void *context, size_t token) {
    const struct work *w = context;
    const size_t n = w->decoder->intermediate;
    w->ops->activate(w->gate + token * n, w->decoder->gated ? w->up + token * n : NULL, n, w->decoder->activation);
}

static int run_attention(struct work *w, const float *x) {
    const struct billm_decoder *d = w->decoder;
    float *const heads[3] = {w->query, w->key, w->value}, *const out[3] = {w->x};
    if (run_group(w, &w->layer->qkv, x, heads, 0))
        return -1;
    billm_pool_run(place_task, w, w->tokens);
    w->attention = (struct billm_attention){w->query,    w->mixed, w->cache, w->tokens, d->heads,
                                            d->kv_heads, d->width, w->start, d->window};
    const size_t rows = w->tokens * (d->heads / d->kv_heads);
    w->tasks_per_head = (rows + BILLM_QUERY_ROWS - 1) / BILLM_QUERY_ROWS;
    billm_pool_run(attention_task, w, d->kv_heads * w->tasks_per_head);
    return run_group(w, &w->layer->o, w->mixed, out, 1);
}

static int run_mlp(struct work *w, const float *x) {
    float *const gated[3] = {w->gate, w->up}, *const out[3] = {w->x};
    if (run_group(w, &w->layer->up, x, gated, 0))
        return -1;
    billm_pool_run(activate_task, w, w->tokens);
    return run_group(w, &w->layer->down, w->gate, out, 1);
}

static int run_layer(struct work *w) {
    const struct billm_layer *layer = w->layer;
    if (w->decoder->post_norm) {
        if (run_attention(w, w->x))
            return -1;
        run_norm(w, &layer->attn_norm, w->x, w->x);
        if (run_mlp(w, w->x))
            return -1;
        run_norm(w, &layer->mlp_norm, w->x, w->x);
        return 0;
    }
    run_norm(w, &layer->attn_norm, w->x, w->normed);
    if (run_attention(w, w->normed))
        return -1;
    run_norm(w, &layer->mlp_norm, w->x, w->normed);
    return run_mlp(w, w->normed);
}

int billm_decode(struct billm_decoder *decoder, float *x, size_t tokens, size_t start, const float *cos, const float *sin,
                 size_t first, size_t count, const struct billm_cache *caches) {
    struct work w = {.decoder = decoder, .tokens = tokens, .start = start, .cos = cos, .sin = sin, .x = x};
    billm_pool_lock();
    w.ops = billm_isa_in_turn()->floats;
    int failed = make_room(&w);
    for (size_t i = 0; i < count && !failed; i++) {
        w.layer = &decoder->layers[first + i];
        w.cache = &caches[i];
        failed = run_layer(&w);
    }
    billm_pool_unlock();
    return failed;
}
