/* What the parts of the native library share.
 *
 * The meaning of every product, the same on every instruction set, bit for bit:
 *
 *   isum[t, r, b] = sum over the columns j of block b of level[r, j] * x[t, j]      exact in int32
 *   acc           = 0; for b = 0, 1, ...: acc = acc + x_scale[t, b] * (float)isum     float32, two roundings a step
 *   out[t, r]     = acc * row_scale[r] (+ bias[r])
 *
 * |isum| <= 256 * 255 * 8191 < 2^31, and 32 * 1024 * 8191 at 4 bits; its conversion to float32 rounds to nearest, halves
 * to even. No fused multiply-add and one fixed order: results do not depend on the instruction set, the number of threads, or how many tokens are
 * computed together.
 *
 * Activations are int16, of 8 bits (|x| <= 127) or of 16, of which they use 14 (|x| <= 8191): so four of them add up in 16
 * bits, and x = 256 * high + low with both bytes signed, which holds of -x too.
 */
#ifndef BILLM_KERNELS_H
#define BILLM_KERNELS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    BILLM_UNIT = 32, /* every block is a whole number of units of 32 columns (4 bytes of a bit plane) */
    BILLM_MAX_BLOCK = 256,
    BILLM_ISAS = 6,        /* most instruction sets that one machine supports */
    BILLM_TILE_ROWS = 32,  /* most rows of a decoded tile */
    BILLM_TILE_COLS = 256, /* most columns of one: a whole number of blocks, and 16 KiB of int16 stay in the L1 cache */
    BILLM_PACK_COLS = 64   /* a packed token has room for a whole number of so many columns */
};

/* A copy of a weight's planes and scales in the order in which decoding reads them; at first zeros. */
struct billm_arranged {
    void *memory;
    size_t bytes;
    struct billm_chunk *chunk;   /* of which the memory is a part */
    const struct billm_isa *isa; /* in whose order */
};

/* A weight [rows, cols] in the file's layout: either the planes and scales, `values`, or `nibbles` and `steps` are set. */
struct billm_weight {
    size_t rows, cols, block, blocks;
    size_t stride;          /* bytes from one row to the next, of a plane, of `values` or of `nibbles` */
    const uint8_t *sign;    /* [rows, stride], bit j % 8 of byte j / 8; 1: + */
    const uint8_t *second;  /* [rows, stride]; salient column: residual sign, else group flag */
    const uint8_t *salient; /* [stride] */
    const uint8_t *scales;  /* [rows, blocks, 4]: alpha_c, alpha_s, alpha_o, alpha_r */
    const int8_t *values;   /* [rows, cols] */
    const uint8_t *nibbles; /* [rows, 16 * blocks], the block being a unit: its columns i and 16 + i are byte i */
    const int8_t *steps;    /* [blocks, rows]: level = (nibble - 8) * step */
    struct billm_arranged *arranged; /* of planes */
};

/* Quantized activations of `count` tokens. */
struct billm_tokens {
    const int16_t *values; /* [count, cols], at most billm_top(bits) and at least its negative */
    const float *scales;   /* [count, blocks] */
    size_t count;
    int bits; /* 8 or 16 */
};

/* What turns acc into out. */
struct billm_epilogue {
    const uint8_t *scale; /* [rows], float16 or float32, any alignment */
    int scale_is_half;
    const uint8_t *bias; /* [rows] float32, any alignment, or NULL */
};

/* One weight of several that multiply the same tokens. */
struct billm_product {
    const struct billm_weight *weight;
    struct billm_epilogue epilogue;
    float *out;
    size_t out_stride; /* floats from one token's row of `out` to the next */
    int accumulate;    /* add to what `out` holds (one more rounding) instead of replacing it */
};

struct billm_float_ops;

/* One instruction set. Pointers without a stated alignment have none. */
struct billm_isa {
    const char *name;
    size_t tile_rows;    /* rows of a tile, at most BILLM_TILE_ROWS */
    size_t token_step;   /* `multiply` takes tokens by so many, a power of 2 */
    size_t packed_bytes; /* bytes of a packed activation */
    size_t few_tokens;   /* up to so many are decoded one by one: making tiles for them would take longer */

    /* One token: x [cols] (times col_scale [cols] if not NULL) to values [cols], scales [blocks]. */
    void (*quantize)(const float *x, const float *col_scale, size_t cols, size_t block, int bits, int16_t *values,
                     float *scales);

    size_t (*row_step)(size_t cols); /* decoding takes rows by so many */

    /* What decoding reads instead of the planes, where not NULL: so many bytes (64-byte aligned), begun once, then filled
     * by steps of rows. */
    size_t (*arranged_bytes)(const struct billm_weight *weight);
    void (*arrange_begin)(const struct billm_weight *weight, void *arranged);
    void (*arrange)(const struct billm_weight *weight, size_t step, void *arranged);

    /* Decoding: one token, written once in the form that the weight's product wants (64-byte aligned), then rows at
     * will, from a whole step on. */
    size_t (*prepared_bytes)(const struct billm_weight *weight);
    void (*prepare)(const struct billm_weight *weight, const int16_t *x, void *prepared);
    void (*binary_gemv)(const struct billm_weight *weight, const void *prepared, int bits, const float *x_scale,
                        size_t row, size_t end, float *acc);
    void (*int8_gemv)(const struct billm_weight *weight, const void *prepared, int bits, const float *x_scale,
                      size_t row, size_t end, float *acc);
    void (*int4_gemv)(const struct billm_weight *weight, const void *prepared, int bits, const float *x_scale,
                      size_t row, size_t end, float *acc);

    /* Prompts: `rows` (1..tile_rows) rows of `cols` (1..BILLM_TILE_COLS) columns from `col` (a multiple of that) become
     * a tile (64-byte aligned, BILLM_TILE_ROWS * BILLM_TILE_COLS * 2 bytes), padded to a whole unit; what a tile and a
     * packed token look like inside is the instruction set's own affair. */
    void (*binary_tile)(const struct billm_weight *weight, size_t row, size_t rows, size_t col, size_t cols,
                        void *tile);
    void (*int8_tile)(const struct billm_weight *weight, size_t row, size_t rows, size_t col, size_t cols, void *tile);
    void (*int4_tile)(const struct billm_weight *weight, size_t row, size_t rows, size_t col, size_t cols, void *tile);
    /* Token number `token` of a panel (64-byte aligned) that has `stride` bytes for each, a multiple of BILLM_PACK_COLS
     * * packed_bytes; padded with zeros to a whole unit. Where a token lies in the panel is the instruction set's own
     * affair, but token_step tokens fill their room of it. */
    void (*pack)(const int16_t *x, size_t cols, void *panel, size_t stride, size_t token);

    /* acc[t][0..tile_rows) continues over the columns of a tile of the weight, which are those from `col` on of the
     * panel, t < tokens (a multiple of token_step). Scales of tokens lie scale_stride floats apart. */
    void (*multiply)(const struct billm_weight *weight, const void *tile, size_t col, size_t cols, const void *panel,
                     size_t stride, int bits, const float *x_scale, size_t scale_stride, size_t tokens, float *acc);

    const struct billm_float_ops *floats; /* decoder.h */
};

extern const struct billm_isa billm_portable;
size_t billm_sixteen_rows(size_t cols); /* a `row_step` */
#if defined(__x86_64__) || defined(BILLM_SIMDE)
extern const struct billm_isa billm_avx2, billm_avxvnni, billm_avx512, billm_avx512vbmi, billm_amx;
/* What AVX-512 takes over from AVX2, done once per many tokens, and what AVX-VNNI does. */
enum { BILLM_AVX2_TILE_ROWS = 16, BILLM_AVX2_TOKEN_STEP = 4 };
/* lookup.c: decoding with AVX2, `weight->arranged` being there */
enum { BILLM_LOOKUP_ROWS = 32, BILLM_LOOKUP_TOKENS = 8 };
size_t billm_lookup_step(size_t cols);
size_t billm_lookup_bytes(const struct billm_weight *weight);
void billm_lookup_begin(const struct billm_weight *weight, void *arranged);
void billm_lookup_arrange(const struct billm_weight *weight, size_t tile, void *arranged);
size_t billm_lookup_prepared_bytes(const struct billm_weight *weight);
void billm_lookup_prepare(const struct billm_weight *weight, const int16_t *x, void *prepared);
void billm_lookup_gemv(const struct billm_weight *weight, const void *prepared, int bits, const float *x_scale,
                       size_t row, size_t end, float *acc);
void billm_avx2_quantize(const float *x, const float *col_scale, size_t cols, size_t block, int bits, int16_t *values,
                         float *scales);
size_t billm_avx2_prepared_bytes(const struct billm_weight *weight);
void billm_avx2_prepare(const struct billm_weight *weight, const int16_t *x, void *prepared);
void billm_avx2_multiply(const struct billm_weight *weight, const void *tile, size_t col, size_t cols,
                         const void *panel, size_t stride, int bits, const float *x_scale, size_t scale_stride,
                         size_t tokens, float *acc);
void billm_avx2_binary_tile(const struct billm_weight *weight, size_t row, size_t rows, size_t col, size_t cols,
                            void *tile);
void billm_avx2_int8_tile(const struct billm_weight *weight, size_t row, size_t rows, size_t col, size_t cols,
                          void *tile);
void billm_avx2_int4_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols,
                          void *tile);
void billm_avx2_pack(const int16_t *x, size_t cols, void *panel, size_t stride, size_t token);
#endif
#if defined(__x86_64__) || defined(BILLM_SIMDE)
/* What AMX takes over from AVX-512 with VBMI: all but prompts. */
void billm_avx512_quantize(const float *x, const float *col_scale, size_t cols, size_t block, int bits, int16_t *values,
                           float *scales);
size_t billm_avx512vbmi_prepared_bytes(const struct billm_weight *weight);
void billm_avx512vbmi_prepare(const struct billm_weight *weight, const int16_t *x, void *prepared);
/* avx512_lookup.c */
enum { BILLM_AVX512_LOOKUP_TOKENS = 24 };
size_t billm_avx512_lookup_step(size_t cols);
size_t billm_avx512_lookup_bytes(const struct billm_weight *weight);
void billm_avx512_lookup_begin(const struct billm_weight *weight, void *arranged);
void billm_avx512_lookup_arrange(const struct billm_weight *weight, size_t tile, void *arranged);
size_t billm_avx512_lookup_prepared_bytes(const struct billm_weight *weight);
void billm_avx512_lookup_prepare(const struct billm_weight *weight, const int16_t *x, void *prepared);
void billm_avx512_lookup_gemv(const struct billm_weight *weight, const void *prepared, int bits, const float *x_scale,
                              size_t row, size_t end, float *acc);
/* avx512_table.c */
size_t billm_avx512_table_bytes(const struct billm_weight *weight);
void billm_avx512_prepare_table(const struct billm_weight *weight, const int16_t *x, void *prepared);
void billm_avx512_int8_gemv(const struct billm_weight *weight, const void *prepared, int bits, const float *x_scale,
                            size_t row, size_t end, float *acc);
void billm_avx512_int4_gemv(const struct billm_weight *weight, const void *prepared, int bits, const float *x_scale,
                            size_t row, size_t end, float *acc);
#endif
#if defined(__aarch64__)
extern const struct billm_isa billm_neon;
#endif

/* dispatch.c; what arranges, arrange.c. `supported` fills names, best first, and returns how many; `select` returns -1 for one not supported.
 * `products` multiplies tokens by one to three weights of the same cols and block, in one run of the pool. It returns -1
 * when memory runs out. All may be called from several threads; they take turns, except those whose caller holds the
 * pool's turn already. */
size_t billm_supported(const char *names[BILLM_ISAS]);
int billm_select(const char *name);
const char *billm_selected(void);
size_t billm_few_tokens(void); /* the most tokens at once that are read from arranged weights; 0 where none are */
const struct billm_isa *billm_isa_in_turn(void);
void billm_quantize(const float *x, const float *col_scale, size_t tokens, size_t cols, size_t block, int bits,
                    int16_t *values, float *scales);
void billm_quantize_in_turn(const float *x, const float *col_scale, size_t tokens, size_t cols, size_t block, int bits,
                            int16_t *values, float *scales);
int billm_products(const struct billm_product *products, size_t count, const struct billm_tokens *x);
int billm_products_in_turn(const struct billm_product *products, size_t count, const struct billm_tokens *x);
/* Memory for a copy, in whole lines; -1 where there is none, and the copy then is as it was. To give it back is up to the
 * copy's owner. */
int billm_take_memory(struct billm_arranged *copy, size_t bytes);
void billm_give_memory_back(struct billm_arranged *copy);
/* See to it that the weight lies as decoding reads it, for which `arranged` takes memory. -1 where there is
 * none, or none allowed: then products are made as for prompts. */
int billm_arrange_in_turn(const struct billm_weight *weight);
void billm_allow_copies(int allowed); /* from now on; at first they are */

/* Decoding by parts: rows row .. end of a product, from the token that the instruction set prepared for its weight; and
 * how many rows make a task, so that threads which are equally quick are done at the same time, or nearly (nine tasks
 * keep one of two waiting), where a task is of one of `count` matrices with so many rows and `cols` columns. */
void billm_decode_rows(const struct billm_isa *isa, const struct billm_product *product, const void *prepared, int bits,
                       const float *x_scale, size_t row, size_t end);
size_t billm_rows_per_task(const size_t *rows, size_t count, size_t cols);

/* What threads do together, stage after stage: every task of a stage is done before the next stage opens. */
struct billm_stages {
    size_t count;
    size_t (*open)(void *context, size_t stage); /* how many tasks it has; called while no task runs */
    /* What a thread prepares for itself before its first task of a stage; may be NULL. Threads are numbered from 0. */
    void (*enter)(void *context, size_t stage, size_t thread);
    void (*task)(void *context, size_t stage, size_t index, size_t thread);
};

/* pool.c. A turn (lock .. unlock) owns the pool; run calls task(context, i) once for every i < count. */
void billm_pool_lock(void);
void billm_pool_unlock(void);
void billm_pool_run(void (*task)(void *context, size_t index), void *context, size_t count);
void billm_pool_run_stages(const struct billm_stages *stages, void *context);
void billm_pool_set_threads(int threads); /* takes a turn itself */
int billm_pool_threads(void);

static inline size_t billm_round_up(size_t value, size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

static inline size_t billm_min(size_t a, size_t b) {
    return a < b ? a : b;
}

static inline uint32_t billm_load32(const void *address) {
    uint32_t value;
    memcpy(&value, address, sizeof value);
    return value;
}

static inline uint64_t billm_load64(const void *address) {
    uint64_t value;
    memcpy(&value, address, sizeof value);
    return value;
}

/* The largest value of an activation. */
static inline int32_t billm_top(int bits) {
    return bits == 8 ? 127 : 8191;
}

/* Quantize one token; every instruction set compiles its own copy. A union views a float's bits; loops are plain enough
 * for compilers to vectorize. A block that holds a NaN or an infinity gets the scale NaN, which products inherit. */
static inline void billm_quantize_token(const float *restrict x, const float *restrict col_scale, size_t cols,
                                        size_t block, int bits, int16_t *restrict values,
                                        float *restrict scales) {
    const int32_t top = billm_top(bits);
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, halves to even */
    union {
        float number[BILLM_MAX_BLOCK];
        uint32_t bits[BILLM_MAX_BLOCK];
    } scaled;
    union {
        uint32_t bits;
        float number;
    } absmax;
    for (size_t start = 0; start < cols; start += block) {
        size_t n = billm_min(block, cols - start);
        if (col_scale)
            for (size_t j = 0; j < n; j++)
                scaled.number[j] = x[start + j] * col_scale[start + j];
        else
            memcpy(scaled.number, x + start, n * sizeof *x);
        absmax.bits = 0;
        for (size_t j = 0; j < n; j++) {
            uint32_t bits = scaled.bits[j] & 0x7fffffffu;
            absmax.bits = bits > absmax.bits ? bits : absmax.bits;
        }
        float scale = absmax.bits < 0x7f800000u ? absmax.number / (float)top : NAN;
        *scales++ = scale;
        if (!(scale > 0.0f)) {
            memset(values + start, 0, n * sizeof *values);
            continue;
        }
        for (size_t j = 0; j < n; j++)
            scaled.number[j] = scaled.number[j] / scale + to_integer;
        for (size_t j = 0; j < n; j++) {
            int32_t value = (int32_t)scaled.bits[j] - 0x4b400000; /* the bits of to_integer */
            value = value > top ? top : value; /* a subnormal scale is too coarse for so many steps */
            values[start + j] = (int16_t)(value < -top ? -top : value);
        }
    }
}

#endif
