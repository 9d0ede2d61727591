/* The decoder layers: products, and between them what float_ops.h computes. Many tokens go step by step, each step a run
 * of the pool; a single one, whose steps are short, goes through all layers in one run, where threads do for themselves
 * what takes less time than handing it on. */
#include "decoder.h"

#include <stdlib.h>

/* The steps of a layer that a single token takes, each with all threads. */
enum { QKV, ATTEND, OUT, UP, DOWN, STEPS, HEAD = STEPS, ALL_STEPS };

/* What a run of `tokens` tokens computes on the way, cut from the decoder's scratch. */
struct work {
    struct billm_decoder *decoder;
    const struct billm_float_ops *ops;
    size_t tokens;
    struct billm_texts texts;
    const float *cos, *sin;
    float *x;           /* [tokens, hidden]: the caller's */
    float *logits;      /* the caller's, or NULL */
    float *normed;      /* [tokens, hidden] */
    float *query;       /* [tokens, heads, width]; then what attention makes of it */
    float *mixed;       /* the same shape */
    float *key, *value; /* [tokens, kv_heads, width] */
    float *gate, *up;   /* [tokens, intermediate] */
    int16_t *values;    /* quantized activations [tokens, widest input] */
    float *scales;
    const struct billm_cache *cache; /* the layer's, one for each text */
    const struct billm_norm *norm;   /* of a norm task, */
    const float *norm_from;          /* its input */
    float *norm_to;
    const struct billm_layer *layer;
    struct billm_attention attention;
    size_t tasks_per_head;
    /* a single token: */
    int in_one_run;
    const struct billm_isa *isa;
    size_t first, layers;
    char *own;                      /* a struct own and its memory for each thread */
    size_t own_size, prepared_size;
    size_t rows_per_task[ALL_STEPS], part_count;
    struct billm_product parts[3];  /* of the step's group, by their places */
};

/* What a thread made of the input of a step. */
struct own {
    float *normed;
    int16_t *values;
    float *scales[3];          /* of each input of a group */
    char *prepared;
    const void *prepared_of[3]; /* of each part, */
    const float *scales_of[3];  /* and its activation's scales */
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
    w->own = cut(base, &used, w->in_one_run ? (size_t)billm_pool_threads() : 0, w->own_size);
    return used;
}

/* Cut a thread's part; with `base` NULL only add up what is needed. */
static size_t lay_out_own(const struct work *w, char *base) {
    const struct billm_decoder *d = w->decoder;
    const size_t widest = larger_of(larger_of(d->hidden, d->intermediate), d->heads * d->width);
    size_t used = 0;
    struct own parts, *own = cut(base, &used, 1, sizeof *own);
    own = base ? own : &parts;
    own->normed = cut(base, &used, d->hidden, sizeof(float));
    own->values = cut(base, &used, widest, sizeof(int16_t));
    for (size_t i = 0; i < 3; i++)
        own->scales[i] = cut(base, &used, widest / BILLM_UNIT + 1, sizeof(float));
    own->prepared = cut(base, &used, w->prepared_size, 1);
    return used;
}

static struct own *own_of(const struct work *w, size_t thread) {
    return (void *)(w->own + thread * w->own_size);
}

struct needs {
    const struct billm_isa *isa;
    size_t group, of_group, most; /* bytes that the products of one group want prepared */
};

static int arrange_weight(void *context, const struct billm_weight *weight, size_t group) {
    struct needs *needs = context;
    if (billm_arrange_in_turn(weight))
        return -1;
    const size_t size = billm_round_up(needs->isa->prepared_bytes(weight), 64);
    needs->of_group = group == needs->group ? needs->of_group + size : size;
    needs->group = group;
    needs->most = larger_of(needs->most, needs->of_group);
    return 0;
}

static int arrange_weights(struct work *w) {
    struct needs needs = {w->isa, (size_t)-1, 0, w->logits ? w->isa->prepared_bytes(&w->decoder->head.table) : 0};
    if (billm_each_weight(w->decoder, w->first, w->layers, arrange_weight, &needs))
        return -1;
    w->prepared_size = needs.most;
    return 0;
}

static int make_room(struct work *w) {
    struct billm_decoder *d = w->decoder;
    /* A norm behind a step replaces what the step adds to, which threads cannot do each for itself. */
    w->in_one_run = w->tokens == 1 && !d->post_norm && !arrange_weights(w);
    if (w->in_one_run)
        w->own_size = lay_out_own(w, NULL);
    size_t needed = lay_out(w, NULL);
    if (needed > d->scratch_size) {
        free(d->scratch);
        d->scratch = aligned_alloc(64, billm_round_up(needed, 64));
        d->scratch_size = d->scratch ? needed : 0;
        if (!d->scratch)
            return -1;
    }
    lay_out(w, d->scratch);
    for (size_t i = 0; w->in_one_run && i < (size_t)billm_pool_threads(); i++)
        lay_out_own(w, w->own + i * w->own_size);
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

/* Which of the texts a token is of, and where it stands in it. */
static size_t text_of(const struct work *w, size_t token) {
    return w->texts.count > 1 ? token : 0;
}

static size_t position_of(const struct work *w, size_t token) {
    return w->texts.count > 1 ? w->texts.starts[token] : w->texts.starts[0] + token;
}

/* Norm, turn and scale what a token has of a key and value head and of the queries that read it; put its key and value
 * into the cache. */
static void place_head(const struct work *w, size_t token, size_t head) {
    const struct billm_decoder *d = w->decoder;
    const struct billm_float_ops *ops = w->ops;
    const struct billm_cache *cache = w->cache + text_of(w, token);
    const size_t width = d->width, half = width / 2, position = position_of(w, token), readers = d->heads / d->kv_heads;
    const float *cos = w->cos ? w->cos + token * half : NULL, *sin = w->sin ? w->sin + token * half : NULL;
    const float factor = 1.0f / sqrtf((float)width);
    for (size_t reader = head * readers; reader < (head + 1) * readers; reader++) {
        float *query = w->query + (token * d->heads + reader) * width;
        if (w->layer->q_norm)
            ops->norm(query, w->layer->q_norm, NULL, d->norm_eps, width, query);
        if (cos)
            ops->rotate(query, cos, sin, half, factor);
        else
            for (size_t i = 0; i < width; i++)
                query[i] *= factor;
    }
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

static void place_task(void *context, size_t token) {
    const struct work *w = context;
    for (size_t head = 0; head < w->decoder->kv_heads; head++)
        place_head(w, token, head);
}

/* Several texts have a token each: then a task is one of a single text. */
static void attention_task(void *context, size_t index) {
    const struct work *w = context;
    const size_t per_text = w->attention.kv_heads * w->tasks_per_head, text = index / per_text;
    const size_t skipped = text * w->attention.heads * w->attention.width;
    struct billm_attention a = w->attention;
    a.query += skipped;
    a.out += skipped;
    a.cache += text;
    a.past = w->texts.starts[text];
    const size_t task = index % per_text, rows = a.tokens * (a.heads / a.kv_heads);
    const size_t first = task % w->tasks_per_head * BILLM_QUERY_ROWS;
    w->ops->attend(&a, task / w->tasks_per_head, first, billm_min(BILLM_QUERY_ROWS, rows - first));
}

static void activate_task(void *context, size_t token) {
    const struct work *w = context;
    const size_t n = w->decoder->intermediate;
    w->ops->activate(w->gate + token * n, w->decoder->gated ? w->up + token * n : NULL, n, w->decoder->activation);
}

static void prepare_attention(struct work *w) {
    const struct billm_decoder *d = w->decoder;
    const size_t tokens = w->tokens / w->texts.count, rows = tokens * (d->heads / d->kv_heads);
    w->attention = (struct billm_attention){w->query,    w->mixed, w->cache,           tokens, d->heads,
                                            d->kv_heads, d->width, w->texts.starts[0], d->window};
    w->tasks_per_head = (rows + BILLM_QUERY_ROWS - 1) / BILLM_QUERY_ROWS;
}

static int run_attention(struct work *w, const float *x) {
    const struct billm_decoder *d = w->decoder;
    float *const heads[3] = {w->query, w->key, w->value}, *const out[3] = {w->x};
    if (run_group(w, &w->layer->qkv, x, heads, 0))
        return -1;
    billm_pool_run(place_task, w, w->tokens);
    prepare_attention(w);
    billm_pool_run(attention_task, w, w->texts.count * d->kv_heads * w->tasks_per_head);
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

static int run_head(struct work *w) {
    const struct billm_head *head = &w->decoder->head;
    const struct billm_product product = {&head->table, head->epilogue, w->logits, head->table.rows, 0};
    const struct billm_tokens tokens = {w->values, w->scales, w->tokens, w->decoder->activation_bits};
    if (head->norm.weight)
        run_norm(w, &head->norm, w->x, w->normed);
    billm_quantize_in_turn(head->norm.weight ? w->normed : w->x, NULL, w->tokens, head->table.cols, head->table.block,
                           tokens.bits, w->values, w->scales);
    return billm_products_in_turn(&product, 1, &tokens);
}

/* ---- a single token: every step of every layer is a stage of one run ---- */

/* Name the group's products by their places; returns how many tasks they make. */
static size_t open_group(struct work *w, const struct billm_group *group, float *const outs[3], int accumulate,
                         size_t step) {
    const size_t size = w->rows_per_task[step];
    size_t tasks = 0;
    w->part_count = 0;
    for (size_t i = 0; i < group->count; i++)
        for (size_t j = 0; j < group->inputs[i].count; j++, w->part_count++) {
            const size_t place = group->inputs[i].place[j];
            w->parts[place] = group->inputs[i].products[j];
            w->parts[place].out = outs[place];
            w->parts[place].accumulate = accumulate;
            tasks += (w->parts[place].weight->rows + size - 1) / size;
        }
    return tasks;
}

static size_t open_head(struct work *w) {
    const struct billm_head *head = &w->decoder->head;
    const size_t size = w->rows_per_task[HEAD];
    w->parts[0] = (struct billm_product){&head->table, head->epilogue, w->logits, head->table.rows, 0};
    return (head->table.rows + size - 1) / size;
}

/* The step of a stage; behind all layers comes the head. */
static size_t step_of(const struct work *w, size_t stage) {
    return stage / STEPS < w->layers ? stage % STEPS : HEAD;
}

static size_t open_step(void *context, size_t stage) {
    struct work *w = context;
    float *const heads[3] = {w->query, w->key, w->value}, *const gated[3] = {w->gate, w->up}, *const x[3] = {w->x};
    size_t tasks;
    if (step_of(w, stage) == HEAD)
        return open_head(w);
    w->layer = &w->decoder->layers[w->first + stage / STEPS];
    w->cache = &w->texts.caches[stage / STEPS];
    switch (stage % STEPS) {
    case QKV: return open_group(w, &w->layer->qkv, heads, 0, QKV);
    case ATTEND: prepare_attention(w); return w->decoder->kv_heads;
    case OUT: return open_group(w, &w->layer->o, x, 1, OUT);
    case UP: tasks = open_group(w, &w->layer->up, gated, 0, UP); return tasks / w->part_count; /* one: rows of both */
    default: return open_group(w, &w->layer->down, x, 1, DOWN);
    }
}

/* Quantize and prepare what the group reads. */
static void read_input(const struct work *w, const struct billm_group *group, const float *x, struct own *own) {
    char *prepared = own->prepared;
    for (size_t i = 0; i < group->count; i++) {
        const struct billm_input *input = &group->inputs[i];
        w->isa->quantize(x, input->col_scale, input->products[0].weight->cols, input->block, w->decoder->activation_bits,
                         own->values, own->scales[i]);
        for (size_t j = 0; j < input->count; j++) {
            const struct billm_weight *weight = input->products[j].weight;
            w->isa->prepare(weight, own->values, prepared);
            own->prepared_of[input->place[j]] = prepared;
            own->scales_of[input->place[j]] = own->scales[i];
            prepared += billm_round_up(w->isa->prepared_bytes(weight), 64);
        }
    }
}

static const float *normed(const struct work *w, const struct billm_norm *norm, struct own *own) {
    const struct billm_decoder *d = w->decoder;
    w->ops->norm(w->x, norm->weight, norm->bias, d->norm_eps, d->hidden, own->normed);
    return own->normed;
}

static void read_head_input(const struct work *w, struct own *own) {
    const struct billm_head *head = &w->decoder->head;
    const float *x = head->norm.weight ? normed(w, &head->norm, own) : w->x;
    w->isa->quantize(x, NULL, head->table.cols, head->table.block, w->decoder->activation_bits, own->values,
                     own->scales[0]);
    w->isa->prepare(&head->table, own->values, own->prepared);
    own->prepared_of[0] = own->prepared;
    own->scales_of[0] = own->scales[0];
}

static void enter_step(void *context, size_t stage, size_t thread) {
    const struct work *w = context;
    const struct billm_layer *layer = w->layer;
    struct own *own = own_of(w, thread);
    switch (step_of(w, stage)) {
    case HEAD: read_head_input(w, own); break;
    case QKV: read_input(w, &layer->qkv, normed(w, &layer->attn_norm, own), own); break;
    case ATTEND: break;
    case OUT: read_input(w, &layer->o, w->mixed, own); break;
    case UP: read_input(w, &layer->up, normed(w, &layer->mlp_norm, own), own); break;
    default: read_input(w, &layer->down, w->gate, own);
    }
}

static void part_rows(const struct work *w, const struct own *own, size_t part, size_t row, size_t end) {
    billm_decode_rows(w->isa, &w->parts[part], own->prepared_of[part], w->decoder->activation_bits,
                      own->scales_of[part], row, end);
}

static void up_rows(const struct work *w, const struct own *own, size_t row, size_t end) {
    for (size_t part = 0; part < w->part_count; part++)
        part_rows(w, own, part, row, end);
    w->ops->activate(w->gate + row, w->decoder->gated ? w->up + row : NULL, end - row, w->decoder->activation);
}

static void attend_head(const struct work *w, size_t head) {
    const size_t readers = w->decoder->heads / w->decoder->kv_heads;
    place_head(w, 0, head);
    for (size_t row = 0; row < readers; row += BILLM_QUERY_ROWS)
        w->ops->attend(&w->attention, head, row, billm_min(BILLM_QUERY_ROWS, readers - row));
}

static void step_task(void *context, size_t stage, size_t index, size_t thread) {
    const struct work *w = context;
    const struct own *own = own_of(w, thread);
    const size_t step = step_of(w, stage), size = w->rows_per_task[step];
    if (step == ATTEND) {
        attend_head(w, index);
        return;
    }
    size_t part = 0;
    if (step != UP)
        for (size_t tasks; index >= (tasks = (w->parts[part].weight->rows + size - 1) / size); part++)
            index -= tasks;
    const size_t row = index * size, end = billm_min(row + size, w->parts[part].weight->rows);
    if (step == UP)
        up_rows(w, own, row, end);
    else
        part_rows(w, own, part, row, end);
}

static void run_token(struct work *w) {
    const struct billm_decoder *d = w->decoder;
    const size_t query = d->heads * d->width, kv = d->kv_heads * d->width, qkv[3] = {query, kv, kv};
    const struct billm_stages stages = {w->layers * STEPS + (w->logits ? 1 : 0), open_step, enter_step, step_task};
    w->rows_per_task[QKV] = billm_rows_per_task(qkv, 3, d->hidden);
    w->rows_per_task[OUT] = billm_rows_per_task(&d->hidden, 1, query);
    w->rows_per_task[UP] = billm_rows_per_task(&d->intermediate, 1, (d->gated ? 2 : 1) * d->hidden);
    w->rows_per_task[DOWN] = billm_rows_per_task(&d->hidden, 1, d->intermediate);
    w->rows_per_task[HEAD] = w->logits ? billm_rows_per_task(&d->head.table.rows, 1, d->hidden) : 0;
    billm_pool_run_stages(&stages, w);
}

static int run_layers(struct work *w) {
    for (size_t i = 0; i < w->layers; i++) {
        w->layer = &w->decoder->layers[w->first + i];
        w->cache = &w->texts.caches[i * w->texts.count];
        if (run_layer(w))
            return -1;
    }
    return w->logits ? run_head(w) : 0;
}

int billm_decode(struct billm_decoder *decoder, float *x, size_t tokens, struct billm_texts texts, const float *cos,
                 const float *sin, size_t first, size_t count, float *logits) {
    struct work w = {.decoder = decoder, .tokens = tokens, .texts = texts, .cos = cos, .sin = sin, .x = x};
    w.first = first;
    w.layers = count;
    w.logits = logits;
    billm_pool_lock();
    w.isa = billm_isa_in_turn();
    w.ops = w.isa->floats;
    int failed = make_room(&w);
    if (!failed && w.in_one_run)
        run_token(&w);
    else if (!failed)
        failed = run_layers(&w);
    billm_pool_unlock();
    return failed;
}
