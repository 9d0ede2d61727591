/* Which instruction set runs, and how a product is cut into tasks. */
#include "kernels.h"

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
    PANEL_BYTES = 4 << 20,     /* and the same in bytes, where columns are many */
    WEIGHTS_PER_TASK = 1 << 15 /* about a microsecond of work: handing out less costs more than it gains */
};

/* ---- selection ---- */

#if defined(__x86_64__) || defined(BILLM_SIMDE)
static int has_avx2(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2"); /* asks the processor and, through xgetbv, the system */
#else
    return 1;
#endif
}

static int has_avx512(void) {
#if defined(BILLM_SIMDE)
    return 1;
#else
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
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

static const struct billm_isa *current(void) {
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
    const char *name = current()->name;
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
    const struct billm_weight *weight;
    const struct billm_tokens *x;
    const struct billm_epilogue *epilogue;
    float *out;
    size_t rows_per_task;
    /* decoding: the one token, prepared */
    const void *prepared;
    /* prompts: the packed panel of tokens first_token .. first_token + tokens, padded to padded_tokens */
    const uint8_t *panel;
    const float *panel_scales;
    size_t panel_stride, first_token, tokens, padded_tokens;
};

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

static void gemv_task(void *context, size_t index) {
    const struct job *job = context;
    const struct billm_weight *w = job->weight;
    size_t row = index * job->rows_per_task, end = billm_min(row + job->rows_per_task, w->rows);
    if (w->values)
        job->isa->int8_gemv(w, job->x->values, job->x->scales, row, end, job->out + row);
    else
        job->isa->binary_gemv(w, job->prepared, job->x->scales, row, end, job->out + row);
    for (; row < end; row++) {
        float value = job->out[row] * row_scale(job->epilogue, row);
        job->out[row] = job->epilogue->bias ? value + row_bias(job->epilogue, row) : value;
    }
}

/* Multiply a tile of rows with the whole panel, a stretch of columns at a time. */
static void gemm_task(void *context, size_t index) {
    const struct job *job = context;
    const struct billm_weight *w = job->weight;
    const struct billm_isa *isa = job->isa;
    _Alignas(64) int16_t tile[BILLM_TILE_ROWS * BILLM_TILE_COLS];
    _Alignas(64) float acc[PANEL_TOKENS * BILLM_TILE_ROWS];
    size_t row = index * isa->tile_rows, rows = billm_min(isa->tile_rows, w->rows - row);
    memset(acc, 0, job->padded_tokens * isa->tile_rows * sizeof *acc);
    for (size_t col = 0; col < w->cols; col += BILLM_TILE_COLS) {
        size_t cols = billm_min(BILLM_TILE_COLS, w->cols - col);
        (w->values ? isa->int8_tile : isa->binary_tile)(w, row, rows, col, cols, tile);
        isa->multiply(tile, cols, w->block, job->panel + col * isa->packed_bytes, job->panel_stride,
                      job->panel_scales + col / w->block, w->blocks, job->padded_tokens, acc);
    }
    float scale[BILLM_TILE_ROWS], bias[BILLM_TILE_ROWS];
    for (size_t r = 0; r < rows; r++) {
        scale[r] = row_scale(job->epilogue, row + r);
        bias[r] = row_bias(job->epilogue, row + r);
    }
    for (size_t t = 0; t < job->tokens; t++) {
        float *out = job->out + (job->first_token + t) * w->rows + row;
        const float *sum = acc + t * isa->tile_rows;
        for (size_t r = 0; r < rows; r++)
            out[r] = job->epilogue->bias ? sum[r] * scale[r] + bias[r] : sum[r] * scale[r];
    }
}

static int run_gemv(struct job *job) {
    const struct billm_weight *w = job->weight;
    if (!w->values) {
        void *prepared = scratch_of(job->isa->prepared_bytes(w));
        if (!prepared)
            return -1;
        job->isa->prepare(w, job->x->values, prepared);
        job->prepared = prepared;
    }
    /* Eight tasks a thread even out what else the machine does. */
    size_t shares = 8 * (size_t)billm_pool_threads();
    size_t rows = (w->rows + shares - 1) / shares, fewest = (WEIGHTS_PER_TASK + w->cols - 1) / w->cols;
    job->rows_per_task = billm_round_up(rows > fewest ? rows : fewest, 8);
    billm_pool_run(gemv_task, job, (w->rows + job->rows_per_task - 1) / job->rows_per_task);
    return 0;
}

static int run_gemm(struct job *job) {
    const struct billm_weight *w = job->weight;
    const struct billm_tokens *x = job->x;
    job->panel_stride = billm_round_up(w->cols, BILLM_UNIT) * job->isa->packed_bytes;
    size_t most = billm_min(PANEL_TOKENS, PANEL_BYTES / job->panel_stride / BILLM_TOKEN_STEP * BILLM_TOKEN_STEP);
    most = billm_min(most ? most : BILLM_TOKEN_STEP, billm_round_up(x->count, BILLM_TOKEN_STEP));
    uint8_t *panel = scratch_of(most * (job->panel_stride + w->blocks * sizeof(float)));
    if (!panel)
        return -1;
    float *scales = (void *)(panel + most * job->panel_stride);
    job->panel = panel;
    job->panel_scales = scales;
    for (size_t first = 0; first < x->count; first += most) {
        job->first_token = first;
        job->tokens = billm_min(most, x->count - first);
        job->padded_tokens = billm_round_up(job->tokens, BILLM_TOKEN_STEP);
        memset(panel + job->tokens * job->panel_stride, 0, (job->padded_tokens - job->tokens) * job->panel_stride);
        memset(scales, 0, job->padded_tokens * w->blocks * sizeof *scales);
        memcpy(scales, x->scales + first * w->blocks, job->tokens * w->blocks * sizeof *scales);
        for (size_t t = 0; t < job->tokens; t++)
            job->isa->pack(x->values + (first + t) * w->cols, w->cols, panel + t * job->panel_stride);
        billm_pool_run(gemm_task, job, (w->rows + job->isa->tile_rows - 1) / job->isa->tile_rows);
    }
    return 0;
}

int billm_linear(const struct billm_weight *weight, const struct billm_tokens *x, const struct billm_epilogue *epilogue,
                 float *out) {
    struct job job = {.weight = weight, .x = x, .epilogue = epilogue, .out = out};
    if (!x->count || !weight->rows)
        return 0;
    billm_pool_lock();
    job.isa = current();
    int failed = x->count == 1 ? run_gemv(&job) : run_gemm(&job);
    billm_pool_unlock();
    return failed;
}

struct quantize_job {
    const struct billm_isa *isa;
    const float *x, *col_scale;
    size_t tokens, tokens_per_task, cols, block, blocks;
    int8_t *values;
    float *scales;
};

static void quantize_task(void *context, size_t index) {
    const struct quantize_job *job = context;
    size_t token = index * job->tokens_per_task, end = billm_min(token + job->tokens_per_task, job->tokens);
    for (; token < end; token++)
        job->isa->quantize(job->x + token * job->cols, job->col_scale, job->cols, job->block,
                           job->values + token * job->cols, job->scales + token * job->blocks);
}

int billm_quantize(const float *x, const float *col_scale, size_t tokens, size_t cols, size_t block, int8_t *values,
                   float *scales) {
    struct quantize_job job = {NULL, x,     col_scale, tokens, 1 + (WEIGHTS_PER_TASK - 1) / cols,
                               cols, block, 0,         values, scales};
    job.blocks = (cols + block - 1) / block;
    billm_pool_lock();
    job.isa = current();
    billm_pool_run(quantize_task, &job, (tokens + job.tokens_per_task - 1) / job.tokens_per_task);
    billm_pool_unlock();
    return 0;
}
