/* Which instruction set runs, and how a product is cut into tasks. */
#include "decoder.h"

#include <stdlib.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(BILLM_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

enum {
    PANEL_TOKENS = 256,        /* most tokens packed at a time: bounds the scratch of long prompts */
    PANEL_BYTES = 4 << 20,     /* and the same in bytes, where columns are many */
    WEIGHTS_PER_TASK = 1 << 15, /* about a microsecond of work: handing out less costs more than it gains */
    TOKENS_PER_TASK = 16,       /* packed by one task */
    FEW_TOKENS_WEIGHTS = 1 << 18, /* what one of few tokens has read is read by the others while it is still near */
    FINISH_AHEAD = 16,           /* tokens */
    MAX_ROWS = 256,             /* rows whose sums wait together for their epilogue */
    TASKS_PER_THREAD = 4        /* most of them in decoding: each costs a turn of a cache line between the threads */
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

static int has_avx512vbmi(void) {
#if defined(BILLM_SIMDE)
    return 1;
#else
    return has_avx512() && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
#endif
}
#endif

#if defined(BILLM_AVXVNNI)
static int has_avxvnni(void) {
#if defined(BILLM_SIMDE)
    return has_avx2();
#else
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
}
#endif

#if defined(BILLM_AMX)
/* The system hands out the tile registers on request only; it may refuse, or not know them. */
static int has_amx(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    if (!has_avx512vbmi() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1))
        return 0;
    return !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
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

static size_t candidates(const struct billm_isa *found[BILLM_ISAS]) {
    size_t count = 0;
#if defined(__x86_64__) || defined(BILLM_SIMDE)
#if defined(BILLM_AMX)
    if (has_amx())
        found[count++] = &billm_amx;
#endif
    if (has_avx512vbmi())
        found[count++] = &billm_avx512vbmi;
    if (has_avx512())
        found[count++] = &billm_avx512;
#if defined(BILLM_AVXVNNI)
    if (has_avxvnni())
        found[count++] = &billm_avxvnni;
#endif
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
    const struct billm_isa *found[BILLM_ISAS];
    if (!selected) {
        candidates(found);
        selected = found[0];
    }
    return selected;
}

size_t billm_supported(const char *names[BILLM_ISAS]) {
    const struct billm_isa *found[BILLM_ISAS];
    size_t count = candidates(found);
    for (size_t i = 0; i < count; i++)
        names[i] = found[i]->name;
    return count;
}

int billm_select(const char *name) {
    const struct billm_isa *found[BILLM_ISAS];
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

size_t billm_few_tokens(void) {
    billm_pool_lock();
    const struct billm_isa *isa = billm_isa_in_turn();
    billm_pool_unlock();
    return isa->arrange ? isa->few_tokens : 0;
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

/* ---- tasks: each a stretch of rows of one product ---- */

struct job {
    const struct billm_isa *isa;
    const struct billm_product *products;
    size_t count, cols, block, blocks;
    const struct billm_tokens *x;
    size_t rows_per_task, *first_task; /* of each product, and the number of all tasks */
    /* decoding: each token prepared for each product, [tokens, count] */
    void **prepared;
    /* prompts: the packed panel of tokens first_token .. first_token + tokens, padded to padded_tokens */
    uint8_t *panel;
    float *panel_scales;
    size_t panel_stride, first_token, tokens, padded_tokens;
};

/* The rows of a task. */
struct share {
    const struct billm_product *product;
    size_t index, row, end;
};

static struct share share_of(const struct job *job, size_t task) {
    struct share share = {NULL, 0, 0, 0};
    while (job->first_task[share.index + 1] <= task)
        share.index++;
    share.product = &job->products[share.index];
    share.row = (task - job->first_task[share.index]) * job->rows_per_task;
    share.end = billm_min(share.row + job->rows_per_task, share.product->weight->rows);
    return share;
}

/* The exponent moves by a product with a power of two, which is exact and needs no branch for subnormal numbers; only
 * infinities and NaN need one more step of it. */
static void halves_to_floats(const uint8_t *restrict from, size_t count, float *restrict to) {
    uint16_t halves[MAX_ROWS];
    memcpy(halves, from, count * sizeof *halves);
    for (size_t i = 0; i < count; i++) {
        union {
            uint32_t bits;
            float number;
        } value = {(halves[i] & 0x7fffu) << 13};
        const uint32_t beyond = value.bits >= 31u << 23 ? 255u << 23 : 0, sign = (halves[i] & 0x8000u) << 16;
        value.number *= 5.192296858534828e33f; /* 2^112 */
        value.bits |= beyond | sign;
        to[i] = value.number;
    }
}

static void row_scales(const struct billm_epilogue *e, size_t row, size_t rows, float *out) {
    if (e->scale_is_half)
        halves_to_floats(e->scale + 2 * row, rows, out);
    else
        memcpy(out, e->scale + 4 * row, rows * sizeof *out);
}

/* What the rows row .. row + rows make of their sums: `stride` floats from one token's to the next. */
static void finish(const struct billm_product *product, size_t row, size_t rows, const float *acc, size_t stride,
                   size_t tokens, float *out) {
    const struct billm_epilogue *e = &product->epilogue;
    float scale[MAX_ROWS], bias[MAX_ROWS];
    row_scales(e, row, rows, scale);
    if (e->bias)
        memcpy(bias, e->bias + 4 * row, rows * sizeof *bias);
    for (size_t t = 0; t < tokens; t++, out += product->out_stride, acc += stride) {
        for (size_t r = 0; r < rows && t + FINISH_AHEAD < tokens; r += 16) /* no stream that a processor would foresee */
            __builtin_prefetch(out + FINISH_AHEAD * product->out_stride + row + r, 1);
        for (size_t r = 0; r < rows; r++) {
            float value = e->bias ? acc[r] * scale[r] + bias[r] : acc[r] * scale[r];
            out[row + r] = product->accumulate ? out[row + r] + value : value;
        }
    }
}

void billm_decode_rows(const struct billm_isa *isa, const struct billm_product *product, const void *prepared, int bits,
                       const float *x_scale, size_t row, size_t end) {
    const struct billm_weight *w = product->weight;
    void (*const gemv)(const struct billm_weight *, const void *, int, const float *, size_t, size_t, float *) =
        w->nibbles ? isa->int4_gemv : w->values ? isa->int8_gemv : isa->binary_gemv;
    for (size_t next; row < end; row = next) {
        float acc[MAX_ROWS];
        next = billm_min(row + MAX_ROWS, end);
        gemv(w, prepared, bits, x_scale, row, next, acc);
        finish(product, row, next - row, acc, 0, 1, product->out);
    }
}

static void prepare_task(void *context, size_t index) {
    const struct job *job = context;
    job->isa->prepare(job->products[index % job->count].weight, job->x->values + index / job->count * job->cols,
                      job->prepared[index]);
}

static void gemv_task(void *context, size_t index) {
    const struct job *job = context;
    struct share share = share_of(job, index);
    const size_t few = billm_round_up(1 + (FEW_TOKENS_WEIGHTS - 1) / job->cols, job->isa->row_step(job->cols));
    const size_t rows = job->x->count == 1 ? share.end - share.row : few;
    for (size_t row = share.row; row < share.end; row += rows)
        for (size_t token = 0; token < job->x->count; token++) {
            struct billm_product product = *share.product;
            product.out += token * product.out_stride;
            billm_decode_rows(job->isa, &product, job->prepared[token * job->count + share.index], job->x->bits,
                              job->x->scales + token * job->blocks, row, billm_min(row + rows, share.end));
        }
}

static void pack_task(void *context, size_t index) {
    const struct job *job = context;
    size_t token = index * TOKENS_PER_TASK, end = billm_min(token + TOKENS_PER_TASK, job->tokens);
    for (; token < end; token++)
        job->isa->pack(job->x->values + (job->first_token + token) * job->cols, job->cols, job->panel,
                       job->panel_stride, token);
}

/* Multiply a tile of rows with the whole panel, a stretch of columns at a time. */
static void gemm_task(void *context, size_t index) {
    const struct job *job = context;
    struct share share = share_of(job, index);
    const struct billm_weight *w = share.product->weight;
    const struct billm_isa *isa = job->isa;
    _Alignas(64) int16_t tile[BILLM_TILE_ROWS * BILLM_TILE_COLS];
    _Alignas(64) float acc[PANEL_TOKENS * BILLM_TILE_ROWS];
    void (*const make_tile)(const struct billm_weight *, size_t, size_t, size_t, size_t, void *) =
        w->nibbles ? isa->int4_tile : w->values ? isa->int8_tile : isa->binary_tile;
    size_t rows = share.end - share.row;
    memset(acc, 0, job->padded_tokens * isa->tile_rows * sizeof *acc);
    for (size_t col = 0; col < w->cols; col += BILLM_TILE_COLS) {
        size_t cols = billm_min(BILLM_TILE_COLS, w->cols - col);
        make_tile(w, share.row, rows, col, cols, tile);
        isa->multiply(w, tile, col, cols, job->panel, job->panel_stride, job->x->bits,
                      job->panel_scales + col / w->block, w->blocks, job->padded_tokens, acc);
    }
    finish(share.product, share.row, rows, acc, isa->tile_rows, job->tokens,
           share.product->out + job->first_token * share.product->out_stride);
}

/* ---- products ---- */

/* Number the tasks; returns how many there are. */
static size_t cut_tasks(struct job *job, size_t rows_per_task) {
    size_t tasks = 0;
    job->rows_per_task = rows_per_task;
    for (size_t i = 0; i < job->count; i++) {
        job->first_task[i] = tasks;
        tasks += ((uint32_t)job->products[i].weight->rows + (uint32_t)rows_per_task - 1) / (uint32_t)rows_per_task;
    }
    job->first_task[job->count] = tasks;
    return tasks;
}

size_t billm_rows_per_task(const size_t *rows, size_t count, size_t cols) {
    const uint32_t threads = (uint32_t)billm_pool_threads();
    const size_t step = billm_isa_in_turn()->row_step(cols);
    const size_t fewest = billm_round_up((WEIGHTS_PER_TASK + cols - 1) / cols, step);
    size_t all = 0, best = 0, least = (size_t)-1;
    for (size_t i = 0; i < count; i++)
        all += rows[i];
    if (threads == 1)
        return billm_round_up(all, step);
    for (uint32_t each = 1; each <= TASKS_PER_THREAD; each++) {
        const size_t even = billm_round_up(((uint32_t)all + each * threads - 1) / (each * threads), step);
        const size_t size = even > fewest ? even : fewest;
        uint32_t tasks = 0;
        for (size_t i = 0; i < count; i++)
            tasks += ((uint32_t)rows[i] + (uint32_t)size - 1) / (uint32_t)size;
        const size_t longest = (tasks + threads - 1) / threads * size;
        if (longest <= least) { /* of equals the smaller tasks, which even out what else the machine does */
            least = longest;
            best = size;
        }
    }
    return best;
}

/* Scratch for the tables of a job, and `size` bytes more, aligned to 64; NULL if memory runs out. */
static uint8_t *job_scratch(struct job *job, size_t size) {
    const size_t prepared = job->count * job->x->count * sizeof *job->prepared;
    size_t tables = billm_round_up((job->count + 1) * sizeof *job->first_task + prepared, 64);
    uint8_t *memory = scratch_of(tables + size);
    if (!memory)
        return NULL;
    job->first_task = (void *)memory;
    job->prepared = (void *)(memory + (job->count + 1) * sizeof *job->first_task);
    return memory + tables;
}

static int run_gemv(struct job *job) {
    size_t size = 0, rows[3];
    for (size_t i = 0; i < job->count; i++) {
        size += billm_round_up(job->isa->prepared_bytes(job->products[i].weight), 64);
        rows[i] = job->products[i].weight->rows;
    }
    uint8_t *prepared = job_scratch(job, job->x->count * size);
    if (!prepared)
        return -1;
    const size_t count = job->x->count * job->count;
    for (size_t i = 0; i < count; i++) {
        job->prepared[i] = prepared;
        prepared += billm_round_up(job->isa->prepared_bytes(job->products[i % job->count].weight), 64);
    }
    if (job->x->count == 1) /* less work than handing it out */
        for (size_t i = 0; i < count; i++)
            prepare_task(job, i);
    else
        billm_pool_run(prepare_task, job, count);
    billm_pool_run(gemv_task, job, cut_tasks(job, billm_rows_per_task(rows, job->count, job->cols)));
    return 0;
}

static int run_gemm(struct job *job) {
    const struct billm_tokens *x = job->x;
    job->panel_stride = billm_round_up(job->cols, BILLM_PACK_COLS) * job->isa->packed_bytes;
    const size_t step = job->isa->token_step;
    size_t most = billm_min(PANEL_TOKENS, PANEL_BYTES / job->panel_stride / step * step);
    most = billm_min(most ? most : step, billm_round_up(x->count, step));
    job->panel = job_scratch(job, most * (job->panel_stride + job->blocks * sizeof(float)));
    if (!job->panel)
        return -1;
    job->panel_scales = (void *)(job->panel + most * job->panel_stride);
    for (job->first_token = 0; job->first_token < x->count; job->first_token += most) {
        job->tokens = billm_min(most, x->count - job->first_token);
        job->padded_tokens = billm_round_up(job->tokens, step);
        size_t whole = job->tokens / step * step; /* the last step may be short of tokens */
        memset(job->panel + whole * job->panel_stride, 0, (job->padded_tokens - whole) * job->panel_stride);
        memset(job->panel_scales, 0, job->padded_tokens * job->blocks * sizeof(float));
        memcpy(job->panel_scales, x->scales + job->first_token * job->blocks,
               job->tokens * job->blocks * sizeof(float));
        billm_pool_run(pack_task, job, (job->tokens + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK);
        billm_pool_run(gemm_task, job, cut_tasks(job, job->isa->tile_rows));
    }
    return 0;
}

int billm_products_in_turn(const struct billm_product *products, size_t count, const struct billm_tokens *x) {
    if (!x->count || !count)
        return 0;
    const struct billm_weight *w = products->weight;
    struct job job = {.isa = billm_isa_in_turn(), .products = products, .count = count, .x = x};
    job.cols = w->cols;
    job.block = w->block;
    job.blocks = w->blocks;
    int few = x->count <= job.isa->few_tokens;
    for (size_t i = 0; few && i < count; i++)
        few = !billm_arrange_in_turn(products[i].weight); /* else as many tokens, from the planes as they are */
    return few ? run_gemv(&job) : run_gemm(&job);
}

int billm_products(const struct billm_product *products, size_t count, const struct billm_tokens *x) {
    billm_pool_lock();
    int failed = billm_products_in_turn(products, count, x);
    billm_pool_unlock();
    return failed;
}

/* ---- activations ---- */

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
    job.bits = bits;
    job.values = values;
    job.scales = scales;
    job.blocks = (cols + block - 1) / block;
    billm_pool_run(quantize_task, &job, (tokens + job.tokens_per_task - 1) / job.tokens_per_task);
}

void billm_quantize(const float *x, const float *col_scale, size_t tokens, size_t cols, size_t block, int bits,
                   int16_t *values, float *scales) {
    billm_pool_lock();
    billm_quantize_in_turn(x, col_scale, tokens, cols, block, bits, values, scales);
    billm_pool_unlock();
}
