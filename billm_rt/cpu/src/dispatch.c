/* Which instruction set runs, and how a product is cut into tasks. */
#include "decoder.h"

#include <stdlib.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

enum {
    PANEL_TOKENS = 256,        /* most tokens packed at a time: bounds the scratch of long prompts */
    GEMV_ROWS = 256,           /* rows whose sums lie on the stack at a time */
    PANEL_BYTES = 4 << 20,     /* and the same in bytes, where columns are many */
    WEIGHTS_PER_TASK = 1 << 15 /* about a microsecond of work: handing out less costs more than it gains */
};

/* ---- selection ---- */

#if defined(__x86_64__) || defined(BILLM_SIMDE)
static int has_avx2(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); /* asks the processor and, through xgetbv, the system */
#else
    return 1;
#endif
}

static int has_avx512(void) {
#if defined(BILLM_SIMDE)
    return 1;
#else
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#endif
}
#endif

#if defined(__aarch64__)
static int has_dot_product(void) {
#if defined(__APPLE__)
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, NULL, 0) && value;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0; /* HWCAP_ASIMDDP */
#else
    return 0;
#endif
}
#endif

static size_t candidates(const struct billm_isa *found[4]) {
    size_t count = 0;
#if defined(__x86_64__) || defined(BILLM_SIMDE)
    if (has_avx512())
        found[count++] = &billm_avx512;
    if (has_avx2())
        found[count++] = &billm_avx2;
#endif
#if defined(__aarch64__)
    if (has_dot_product())
        found[count++] = &billm_neon;
#endif
    found[count++] = &billm_portable;
    return count;
}

static const struct billm_isa *selected; /* guarded by the pool's turn */

const struct billm_isa *billm_isa_in_turn(void) {
    const struct billm_isa *found[4];
    if (!selected) {
        candidates(found);
        selected = found[0];
    }
    return selected;
}

size_t billm_supported(const char *names[4]) {
    const struct billm_isa *found[4];
    size_t count = candidates(found);
    for (size_t i = 0; i < count; i++)
        names[i] = found[i]->name;
    return count;
}

int billm_select(const char *name) {
    const struct billm_isa *found[4];
    size_t count = candidates(found);
    for (size_t i = 0; i < count; i++)
        if (!strcmp(found[i]->name, name)) {
            billm_pool_lock();
            selected = found[i];
            billm_pool_unlock();
            return 0;
        }
    return -1;
}

const char *billm_selected(void) {
    billm_pool_lock();
    const char *name = billm_isa_in_turn()->name;
    billm_pool_unlock();
    return name;
}

/* ---- scratch: one buffer that grows to the largest need, guarded by the pool's turn ---- */

static void *scratch;
static size_t scratch_size;

static void *scratch_of(size_t size) {
    if (size > scratch_size) {
        free(scratch);
        scratch_size = 0;
        scratch = aligned_alloc(64, billm_round_up(size, 4096));
        if (scratch)
            scratch_size = billm_round_up(size, 4096);
    }
    return scratch;
}

/* ---- tasks ---- */

struct job {
    const struct billm_isa *isa;
    const struct billm_product *products;
    size_t count;
    const struct billm_tokens *x;
    size_t first_task[BILLM_MAX_PRODUCTS + 1]; /* where the tasks of each product begin */
    size_t rows_per_task;
    /* decoding: the one token, prepared for each product */
    const void *prepared[BILLM_MAX_PRODUCTS];
    /* prompts: the packed panel of tokens first_token .. first_token + tokens, padded to padded_tokens */
    const uint8_t *panel;
    const float *panel_scales;
    size_t panel_stride, first_token, tokens, padded_tokens;
};

/* Cut the rows of all products into tasks of `rows`; return how many. */
static size_t cut_rows(struct job *job, size_t rows) {
    job->rows_per_task = rows;
    for (size_t i = 0; i < job->count; i++)
        job->first_task[i + 1] = job->first_task[i] + (job->products[i].weight->rows + rows - 1) / rows;
    return job->first_task[job->count];
}

/* Return the product that a task belongs to, and its first row there. */
static size_t product_of(const struct job *job, size_t task, size_t *row) {
    size_t i = 0;
    while (task >= job->first_task[i + 1])
        i++;
    *row = (task - job->first_task[i]) * job->rows_per_task;
    return i;
}

static float half_to_float(unsigned half) {
    uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    float value;
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24, exact */
        value = (float)mantissa * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float row_scale(const struct billm_epilogue *e, size_t row) {
    if (e->scale_is_half)
        return half_to_float(e->scale[2 * row] | (unsigned)e->scale[2 * row + 1] << 8);
    float value;
    memcpy(&value, e->scale + 4 * row, sizeof value);
    return value;
}

static float row_bias(const struct billm_epilogue *e, size_t row) {
    float value = 0.0f;
    if (e->bias)
        memcpy(&value, e->bias + 4 * row, sizeof value);
    return value;
}

/* The scales and biases of a few rows as float32. */
struct ends {
    float scale[BILLM_TILE_ROWS], bias[BILLM_TILE_ROWS];
};

static void read_ends(const struct billm_epilogue *e, size_t row, size_t rows, struct ends *ends) {
    for (size_t r = 0; r < rows; r++) {
        ends->scale[r] = row_scale(e, row + r);
        ends->bias[r] = row_bias(e, row + r);
    }
}

/* Turn the sums of a few rows into results. Without a bias nothing is added, not even a zero: -0 stays what it is. */
static void finish(const struct billm_product *p, const struct ends *ends, size_t rows, const float *acc, float *out) {
    for (size_t r = 0; r < rows; r++) {
        float value = acc[r] * ends->scale[r];
        value = p->epilogue.bias ? value + ends->bias[r] : value;
        out[r] = p->accumulate ? out[r] + value : value;
    }
}

static void gemv_task(void *context, size_t index) {
    const struct job *job = context;
    size_t row, i = product_of(job, index, &row);
    const struct billm_product *p = &job->products[i];
    const struct billm_weight *w = p->weight;
    const size_t end = billm_min(row + job->rows_per_task, w->rows);
    float acc[GEMV_ROWS];
    for (size_t stop; row < end; row = stop) {
        stop = billm_min(row + GEMV_ROWS, end);
        if (w->values)
            job->isa->int8_gemv(w, job->x->values, job->x->scales, row, stop, acc);
        else
            job->isa->binary_gemv(w, job->prepared[i], job->x->bits, job->x->scales, row, stop, acc);
        for (size_t r = row; r < stop; r += BILLM_TILE_ROWS) {
            const size_t rows = billm_min(BILLM_TILE_ROWS, stop - r);
            struct ends ends;
            read_ends(&p->epilogue, r, rows, &ends);
            finish(p, &ends, rows, acc + (r - row), p->out + r);
        }
    }
}

/* Multiply a tile of rows with the whole panel, a stretch of columns at a time. */
static void gemm_task(void *context, size_t index) {
    const struct job *job = context;
    size_t row, i = product_of(job, index, &row);
    const struct billm_product *p = &job->products[i];
    const struct billm_weight *w = p->weight;
    const struct billm_isa *isa = job->isa;
    _Alignas(64) int16_t tile[BILLM_TILE_ROWS * BILLM_TILE_COLS];
    _Alignas(64) float acc[PANEL_TOKENS * BILLM_TILE_ROWS];
    size_t rows = billm_min(isa->tile_rows, w->rows - row);
    memset(acc, 0, job->padded_tokens * isa->tile_rows * sizeof *acc);
    for (size_t col = 0; col < w->cols; col += BILLM_TILE_COLS) {
        size_t cols = billm_min(BILLM_TILE_COLS, w->cols - col);
        (w->values ? isa->int8_tile : isa->binary_tile)(w, row, rows, col, cols, tile);
        isa->multiply(tile, cols, w->block, job->panel + col * sizeof(int16_t), job->panel_stride, job->x->bits,
                      job->panel_scales + col / w->block, w->blocks, job->padded_tokens, acc);
    }
    struct ends ends;
    read_ends(&p->epilogue, row, rows, &ends);
    for (size_t t = 0; t < job->tokens; t++)
        finish(p, &ends, rows, acc + t * isa->tile_rows, p->out + (job->first_token + t) * p->out_stride + row);
}

static int run_gemv(struct job *job) {
    size_t sizes[BILLM_MAX_PRODUCTS], bytes = 0, rows = 0;
    for (size_t i = 0; i < job->count; i++) {
        const struct billm_weight *w = job->products[i].weight;
        sizes[i] = w->values ? 0 : billm_round_up(job->isa->prepared_bytes(w), 64);
        bytes += sizes[i];
        rows += w->rows;
    }
    uint8_t *prepared = bytes ? scratch_of(bytes) : NULL;
    if (bytes && !prepared)
        return -1;
    for (size_t i = 0; i < job->count; prepared += sizes[i++])
        if (sizes[i]) {
            job->isa->prepare(job->products[i].weight, job->x->values, job->x->bits, prepared);
            job->prepared[i] = prepared;
        }
    /* Eight tasks a thread even out what else the machine does. */
    const size_t cols = job->products[0].weight->cols, shares = 8 * (size_t)billm_pool_threads();
    const size_t share = (rows + shares - 1) / shares, fewest = (WEIGHTS_PER_TASK + cols - 1) / cols;
    billm_pool_run(gemv_task, job, cut_rows(job, billm_round_up(share > fewest ? share : fewest, 8)));
    return 0;
}

/* Pack `count` tokens from job->first_token on. */
static void pack_panel(struct job *job, size_t count, uint8_t *panel, float *scales) {
    const struct billm_weight *w = job->products[0].weight;
    const struct billm_tokens *x = job->x;
    job->tokens = count;
    job->padded_tokens = billm_round_up(count, BILLM_TOKEN_STEP);
    memset(panel + count * job->panel_stride, 0, (job->padded_tokens - count) * job->panel_stride);
    memset(scales, 0, job->padded_tokens * w->blocks * sizeof *scales);
    memcpy(scales, x->scales + job->first_token * w->blocks, count * w->blocks * sizeof *scales);
    for (size_t t = 0; t < count; t++)
        job->isa->pack(x->values + (job->first_token + t) * w->cols, w->cols, panel + t * job->panel_stride);
}

static int run_gemm(struct job *job) {
    const struct billm_weight *w = job->products[0].weight;
    const size_t count = job->x->count;
    job->panel_stride = billm_round_up(w->cols, BILLM_UNIT) * sizeof(int16_t);
    size_t most = billm_min(PANEL_TOKENS, PANEL_BYTES / job->panel_stride / BILLM_TOKEN_STEP * BILLM_TOKEN_STEP);
    most = billm_min(most ? most : BILLM_TOKEN_STEP, billm_round_up(count, BILLM_TOKEN_STEP));
    uint8_t *panel = scratch_of(most * (job->panel_stride + w->blocks * sizeof(float)));
    if (!panel)
        return -1;
    float *scales = (void *)(panel + most * job->panel_stride);
    job->panel = panel;
    job->panel_scales = scales;
    const size_t tasks = cut_rows(job, job->isa->tile_rows);
    for (; job->first_token < count; job->first_token += job->tokens) {
        pack_panel(job, billm_min(most, count - job->first_token), panel, scales);
        billm_pool_run(gemm_task, job, tasks);
    }
    return 0;
}

int billm_products_in_turn(const struct billm_product *products, size_t count, const struct billm_tokens *x) {
    struct job job = {.isa = billm_isa_in_turn(), .products = products, .count = count, .x = x};
    if (!x->count)
        return 0;
    return x->count == 1 ? run_gemv(&job) : run_gemm(&job);
}

int billm_products(const struct billm_product *products, size_t count, const struct billm_tokens *x) {
    billm_pool_lock();
    int failed = billm_products_in_turn(products, count, x);
    billm_pool_unlock();
    return failed;
}

struct quantize_job {
    const struct billm_isa *isa;
    const float *x, *col_scale;
    size_t tokens, tokens_per_task, cols, block, blocks;
    int bits;
    int16_t *values;
    float *scales;
};

static void quantize_task(void *context, size_t index) {
    const struct quantize_job *job = context;
    size_t token = index * job->tokens_per_task, end = billm_min(token + job->tokens_per_task, job->tokens);
    for (; token < end; token++)
        job->isa->quantize(job->x + token * job->cols, job->col_scale, job->cols, job->block, job->bits,
                           job->values + token * job->cols, job->scales + token * job->blocks);
}

void billm_quantize_in_turn(const float *x, const float *col_scale, size_t tokens, size_t cols, size_t block, int bits,
                            int16_t *values, float *scales) {
    struct quantize_job job = {.isa = billm_isa_in_turn(), .x = x, .col_scale = col_scale, .tokens = tokens};
    job.tokens_per_task = 1 + (WEIGHTS_PER_TASK - 1) / cols;
    job.cols = cols;
    job.block = block;
    job.blocks = (cols + block - 1) / block;
    job.bits = bits;
    job.values = values;
    job.scales = scales;
    billm_pool_run(quantize_task, &job, (tokens + job.tokens_per_task - 1) / job.tokens_per_task);
}

void billm_quantize(const float *x, const float *col_scale, size_t tokens, size_t cols, size_t block, int bits,
                    int16_t *values, float *scales) {
    billm_pool_lock();
    billm_quantize_in_turn(x, col_scale, tokens, cols, block, bits, values, scales);
    billm_pool_unlock();
}
