/* Arm with the dot-product instructions (Armv8.2 and later, every Apple chip): sdot sums four bytes into an int32 lane.
 *
 * Decoding is the algebra that x86.h explains, with slabs of 128 columns. For prompts a level, up to 255, becomes two
 * signed bytes: level = 2 high + low, |high| <= 127, |low| <= 1.
 *
 * An activation of 16 bits is two signed bytes as well, 256 high + low: all sums are taken twice then, which is exact.
 */
#include "decoder.h"

#include <arm_neon.h>

static void quantize(const float *x, const float *col_scale, size_t cols, size_t block, int bits, int16_t *values,
                     float *scales) {
    billm_quantize_token(x, col_scale, cols, block, bits, values, scales);
}

/* acc + scale * sum, two roundings. */
static inline float32x4_t step(float32x4_t acc, float scale, int32x4_t sum) {
    return vaddq_f32(acc, vmulq_n_f32(vcvtq_f32_s32(sum), scale));
}

/* The digit of sixteen activations: high byte or low, signed, with 256 high + low = x. */
static inline int8x16_t low_digit(const int16_t *x) {
    return vreinterpretq_s8_u8(vuzp1q_u8(vreinterpretq_u8_s16(vld1q_s16(x)), vreinterpretq_u8_s16(vld1q_s16(x + 8))));
}

static inline int8x16_t high_digit(const int16_t *x) {
    /* What the low byte, if negative, borrowed: (x + 128) >> 8. */
    int16x8_t half = vdupq_n_s16(128), a = vqaddq_s16(vld1q_s16(x), half), b = vqaddq_s16(vld1q_s16(x + 8), half);
    return vreinterpretq_s8_u8(vuzp2q_u8(vreinterpretq_u8_s16(a), vreinterpretq_u8_s16(b)));
}

/* The four magnitudes (bytes of each 32-bit lane) from alpha_c, alpha_s, alpha_o, alpha_r. */
static inline uint8x16_t magnitudes_of(uint32x4_t scales) {
    static const uint8_t repeat_o[16] = {0, 1, 2, 2, 4, 5, 6, 6, 8, 9, 10, 10, 12, 13, 14, 14};
    uint32x4_t residual = vandq_u32(scales, vdupq_n_u32(0xff000000u));
    uint8x16_t sum =
        vqaddq_u8(vqtbl1q_u8(vreinterpretq_u8_u32(scales), vld1q_u8(repeat_o)), vreinterpretq_u8_u32(residual));
    return vqsubq_u8(sum, vreinterpretq_u8_u32(vshrq_n_u32(residual, 8)));
}

/* r[i] lane j -> r[j] lane i. */
static inline void transpose4(int32x4_t r[4]) {
    int32x4_t a = vtrn1q_s32(r[0], r[1]), b = vtrn2q_s32(r[0], r[1]);
    int32x4_t c = vtrn1q_s32(r[2], r[3]), d = vtrn2q_s32(r[2], r[3]);
    r[0] = vcombine_s32(vget_low_s32(a), vget_low_s32(c));
    r[1] = vcombine_s32(vget_low_s32(b), vget_low_s32(d));
    r[2] = vcombine_s32(vget_high_s32(a), vget_high_s32(c));
    r[3] = vcombine_s32(vget_high_s32(b), vget_high_s32(d));
}

/* ---- decoding ---- */

enum { SLAB_COLS = 128, SLAB_UNITS = 4 };

struct slab {
    int8_t plain[8][16], salient[8][16]; /* 0 where a column is of the other class */
    uint8_t not_salient[16];
    int32_t plain_sums[4], salient_sums[4]; /* per unit */
};

static size_t slabs_of(const struct billm_weight *w) {
    return (w->cols + SLAB_COLS - 1) / SLAB_COLS;
}

static void prepare_slab(const int8_t *x, const uint8_t *salient_plane, struct slab *slab) {
    int8x16x4_t low = vld4q_s8(x), high = vld4q_s8(x + 64);
    uint8x16_t plane = vld1q_u8(salient_plane);
    int32x4_t plain_sum = vdupq_n_s32(0), salient_sum = plain_sum;
    vst1q_u8(slab->not_salient, vmvnq_u8(plane));
    for (int k = 0; k < 8; k++) {
        int8x16_t values = k < 4 ? vuzp1q_s8(low.val[k], high.val[k]) : vuzp2q_s8(low.val[k - 4], high.val[k - 4]);
        int8x16_t mask = vreinterpretq_s8_u8(vtstq_u8(plane, vdupq_n_u8((uint8_t)(1 << k))));
        int8x16_t plain = vbicq_s8(values, mask), salient = vandq_s8(values, mask);
        vst1q_s8(slab->plain[k], plain);
        vst1q_s8(slab->salient[k], salient);
        plain_sum = vdotq_s32(plain_sum, vdupq_n_s8(1), plain);
        salient_sum = vdotq_s32(salient_sum, vdupq_n_s8(1), salient);
    }
    vst1q_s32(slab->plain_sums, plain_sum);
    vst1q_s32(slab->salient_sums, salient_sum);
}

/* The slabs of the low digits, then those of the high ones. */
static void prepare_binary(const struct billm_weight *w, const int16_t *x, struct slab *slab) {
    for (size_t col = 0; col < w->cols; col += SLAB_COLS, slab++) {
        int16_t values[SLAB_COLS] = {0};
        int8_t low[SLAB_COLS], high[SLAB_COLS];
        uint8_t salient[SLAB_COLS / 8] = {0};
        memcpy(values, x + col, billm_min(SLAB_COLS, w->cols - col) * sizeof *x);
        memcpy(salient, w->salient + col / 8, billm_min(SLAB_COLS / 8, w->stride - col / 8));
        for (size_t j = 0; j < SLAB_COLS; j += 16) {
            vst1q_s8(low + j, low_digit(values + j));
            vst1q_s8(high + j, high_digit(values + j));
        }
        prepare_slab(low, salient, slab);
        prepare_slab(high, salient, slab + slabs_of(w));
    }
}

/* sum(level * x) of each unit of a slab, from 16 bytes of both planes and the magnitudes of each unit's block. */
static inline int32x4_t unit_sums(uint8x16_t s, uint8x16_t second, const struct slab *x, uint8x16_t magnitudes) {
    const uint8x16_t one = vdupq_n_u8(1);
    const uint32x4_t byte = vdupq_n_u32(0xff);
    uint8x16_t q = veorq_u8(second, vbicq_u8(vld1q_u8(x->not_salient), s));
    int32x4_t sp = vdupq_n_s32(0), ss = sp, qp = sp, qs = sp;
    for (int k = 0; k < 8; k++) {
        int8x16_t plain = vld1q_s8(x->plain[k]), salient = vld1q_s8(x->salient[k]);
        int8x16_t s_bit = vreinterpretq_s8_u8(vandq_u8(s, one)), q_bit = vreinterpretq_s8_u8(vandq_u8(q, one));
        s = vshrq_n_u8(s, 1);
        q = vshrq_n_u8(q, 1);
        sp = vdotq_s32(sp, s_bit, plain);
        ss = vdotq_s32(ss, s_bit, salient);
        qp = vdotq_s32(qp, q_bit, plain);
        qs = vdotq_s32(qs, q_bit, salient);
    }
    uint32x4_t m = vreinterpretq_u32_u8(magnitudes);
    int32x4_t m0 = vreinterpretq_s32_u32(vandq_u32(m, byte));
    int32x4_t m1 = vreinterpretq_s32_u32(vandq_u32(vshrq_n_u32(m, 8), byte));
    int32x4_t m2 = vreinterpretq_s32_u32(vandq_u32(vshrq_n_u32(m, 16), byte));
    int32x4_t m3 = vreinterpretq_s32_u32(vshrq_n_u32(m, 24));
    int32x4_t sum = vmulq_s32(sp, vaddq_s32(m0, m1));
    sum = vmlaq_s32(sum, qp, vsubq_s32(m1, m0));
    sum = vmlaq_s32(sum, ss, vaddq_s32(m2, m3));
    sum = vmlaq_s32(sum, qs, vsubq_s32(m3, m2));
    sum = vmlsq_s32(sum, m1, vld1q_s32(x->plain_sums));
    return vmlsq_s32(sum, m3, vld1q_s32(x->salient_sums));
}

static inline uint8x16_t load_words(const uint8_t *from, size_t words) {
    uint8_t bytes[16] = {0};
    if (words >= 4)
        return vld1q_u8(from);
    memcpy(bytes, from, 4 * words);
    return vld1q_u8(bytes);
}

static inline int32x4_t row_sums(const struct billm_weight *w, size_t row, size_t unit, const struct slab *low,
                                 const struct slab *high, int bits) {
    const uint8_t *scales = w->scales + 4 * row * w->blocks;
    const size_t units_per_block = w->block / BILLM_UNIT, left = w->stride / 4 - unit;
    uint32_t words[SLAB_UNITS];
    for (size_t i = 0; i < SLAB_UNITS; i++)
        words[i] = billm_load32(scales + 4 * billm_min((unit + i) / units_per_block, w->blocks - 1));
    size_t at = row * w->stride + 4 * unit;
    uint8x16_t sign = load_words(w->sign + at, left), second = load_words(w->second + at, left);
    uint8x16_t magnitudes = magnitudes_of(vld1q_u32(words));
    int32x4_t sums = unit_sums(sign, second, low, magnitudes);
    if (bits == 8)
        return sums;
    return vaddq_s32(sums, vshlq_n_s32(unit_sums(sign, second, high, magnitudes), 8));
}

/* Four rows at a time, so that a lane of the running sums is a row. */
static void binary_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                        size_t end, float *acc) {
    const size_t units_per_block = w->block / BILLM_UNIT, units = w->stride / 4;
    for (; row < end; row += 4) {
        size_t rows = billm_min(4, end - row), unit = 0, block = 0;
        float32x4_t total = vdupq_n_f32(0.0f);
        int32x4_t sum = vdupq_n_s32(0);
        for (const struct slab *low = prepared, *high = low + slabs_of(w); unit < units; low++, high++) {
            int32x4_t sums[4];
            for (size_t r = 0; r < 4; r++) /* a short group repeats its last row */
                sums[r] = row_sums(w, row + billm_min(r, rows - 1), unit, low, high, bits);
            transpose4(sums);
            for (size_t i = 0, left = units - unit; i < billm_min(SLAB_UNITS, left); i++) {
                sum = vaddq_s32(sum, sums[i]);
                if (++unit % units_per_block == 0 || unit == units) {
                    total = step(total, x_scale[block++], sum);
                    sum = vdupq_n_s32(0);
                }
            }
        }
        float result[4];
        vst1q_f32(result, total);
        memcpy(acc, result, rows * sizeof *acc);
        acc += rows;
    }
}

static int8x16_t load_start(const int8_t *from, size_t count) {
    int8_t values[16] = {0};
    memcpy(values, from, count);
    return vld1q_s8(values);
}

/* The low digits, padded with zeros to whole vectors, then the high ones. */
static void prepare_table(const int16_t *x, size_t cols, size_t padded, int8_t *out) {
    for (size_t j = 0; j < padded; j += 16) {
        int16_t values[16] = {0};
        if (j < cols)
            memcpy(values, x + j, billm_min(16, cols - j) * sizeof *x);
        vst1q_s8(out + j, low_digit(values));
        vst1q_s8(out + padded + j, high_digit(values));
    }
}

/* The sums of columns col .. stop of a row, spread over the lanes. */
static inline int32x4_t int8_sums(const int8_t *values, const int8_t *low, const int8_t *high, size_t col, size_t stop,
                                  int bits) {
    int32x4_t sum = vdupq_n_s32(0), high_sum = sum;
    for (size_t j = col; j < stop; j += 16) {
        int8x16_t value = stop - j >= 16 ? vld1q_s8(values + j) : load_start(values + j, stop - j);
        sum = vdotq_s32(sum, value, vld1q_s8(low + j));
        if (bits != 8)
            high_sum = vdotq_s32(high_sum, value, vld1q_s8(high + j));
    }
    return vaddq_s32(sum, vshlq_n_s32(high_sum, 8));
}

static void int8_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                      size_t end, float *acc) {
    const int8_t *low = prepared, *high = low + billm_round_up(w->cols, 16);
    for (; row < end; row += 4) {
        size_t rows = billm_min(4, end - row);
        float32x4_t total = vdupq_n_f32(0.0f);
        for (size_t b = 0, col = 0; col < w->cols; b++, col += w->block) {
            int32x4_t sums[4];
            for (size_t r = 0; r < 4; r++)
                sums[r] = int8_sums(w->values + (row + billm_min(r, rows - 1)) * w->stride, low, high, col,
                                    billm_min(col + w->block, w->cols), bits);
            total = step(total, x_scale[b],
                         vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3])));
        }
        float result[4];
        vst1q_f32(result, total);
        memcpy(acc, result, rows * sizeof *acc);
        acc += rows;
    }
}

/* The codes of a unit, less their offset: of its first sixteen columns, of the others. */
static inline int8x16x2_t codes_of(const uint8_t *from) {
    const uint8x16_t bytes = vld1q_u8(from);
    const int8x16_t offset = vdupq_n_s8(8);
    return (int8x16x2_t){{vsubq_s8(vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), offset),
                          vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)), offset)}};
}

/* sum(code * x) of a unit, spread over the lanes. */
static inline int32x4_t code_sums(const uint8_t *from, const int8_t *low, const int8_t *high, int bits) {
    const int8x16x2_t codes = codes_of(from);
    int32x4_t sum = vdotq_s32(vdupq_n_s32(0), codes.val[0], vld1q_s8(low)), high_sum = vdupq_n_s32(0);
    sum = vdotq_s32(sum, codes.val[1], vld1q_s8(low + 16));
    if (bits != 8) {
        high_sum = vdotq_s32(high_sum, codes.val[0], vld1q_s8(high));
        high_sum = vdotq_s32(high_sum, codes.val[1], vld1q_s8(high + 16));
    }
    return vaddq_s32(sum, vshlq_n_s32(high_sum, 8));
}

/* The steps of `rows` (at most 4) rows of a block. */
static inline int32x4_t steps_of(const struct billm_weight *w, size_t block, size_t row, size_t rows) {
    int32_t steps[4] = {0};
    for (size_t r = 0; r < rows; r++)
        steps[r] = w->steps[block * w->rows + row + r];
    return vld1q_s32(steps);
}

static void int4_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                      size_t end, float *acc) {
    const int8_t *low = prepared, *high = low + w->blocks * BILLM_UNIT;
    for (size_t rows; row < end; row += rows) {
        float32x4_t total = vdupq_n_f32(0.0f);
        rows = billm_min(4, end - row);
        for (size_t b = 0; b < w->blocks; b++) {
            int32x4_t sums[4];
            for (size_t r = 0; r < 4; r++)
                sums[r] = code_sums(w->nibbles + (row + billm_min(r, rows - 1)) * w->stride + 16 * b,
                                    low + BILLM_UNIT * b, high + BILLM_UNIT * b, bits);
            int32x4_t sum = vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
            total = step(total, x_scale[b], vmulq_s32(sum, steps_of(w, b, row, rows)));
        }
        float result[4];
        vst1q_f32(result, total);
        memcpy(acc, result, rows * sizeof *acc);
        acc += rows;
    }
}

static size_t padded_cols(const struct billm_weight *w) {
    return billm_round_up(w->cols, w->nibbles ? BILLM_UNIT : 16);
}

static size_t prepared_bytes(const struct billm_weight *w) {
    return w->sign ? 2 * slabs_of(w) * sizeof(struct slab) : 2 * padded_cols(w);
}

static void prepare(const struct billm_weight *w, const int16_t *x, void *prepared) {
    if (w->sign)
        prepare_binary(w, x, prepared);
    else
        prepare_table(x, w->cols, padded_cols(w), prepared);
}

/* ---- prompts: a tile is int8 [cols / 4][high, low][8 rows][4], a packed token int8 [cols / 16][low, high][16] ---- */

enum { TOKEN_STEP = 4, TILE_ROWS = 8, QUAD_BYTES = 2 * TILE_ROWS * 4, STEPS_AT = BILLM_TILE_COLS / 4 * QUAD_BYTES };

static inline uint32x4_t load_rows(const uint8_t *from, size_t stride, size_t rows) {
    uint32_t words[4];
    for (size_t r = 0; r < 4; r++)
        words[r] = billm_load32(from + billm_min(r, rows - 1) * stride);
    return vld1q_u32(words);
}

static inline int8x16_t negate_where(uint8x16_t mask, uint8x16_t value) {
    return vreinterpretq_s8_u8(vsubq_u8(veorq_u8(value, mask), mask));
}

/* 32 columns of four rows. */
static inline void decode_unit(uint32x4_t sign, uint32x4_t second, uint32_t salient, const uint8x16_t m[4],
                               int8_t *out) {
    static const uint8_t first_byte[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    uint32x4_t minus = vmvnq_u32(sign), salient4 = vdupq_n_u32(salient);
    uint8x16_t negative = vreinterpretq_u8_u32(minus), classes = vreinterpretq_u8_u32(salient4);
    uint8x16_t chosen = vreinterpretq_u8_u32(veorq_u32(second, vandq_u32(minus, salient4)));
    for (unsigned byte = 0; byte < 4; byte++) {
        uint8x16_t index = vaddq_u8(vld1q_u8(first_byte), vdupq_n_u8((uint8_t)byte));
        uint8x16_t c = vqtbl1q_u8(chosen, index), n = vqtbl1q_u8(negative, index), s = vqtbl1q_u8(classes, index);
        for (unsigned nibble = 0; nibble < 2; nibble++, out += QUAD_BYTES) {
            uint8x16_t bits = vreinterpretq_u8_u32(vdupq_n_u32(nibble ? 0x80402010u : 0x08040201u));
            uint8x16_t is_salient = vtstq_u8(s, bits), minus_mask = vtstq_u8(n, bits);
            uint8x16_t level =
                vbslq_u8(vtstq_u8(c, bits), vbslq_u8(is_salient, m[3], m[1]), vbslq_u8(is_salient, m[2], m[0]));
            vst1q_s8(out, negate_where(minus_mask, vshrq_n_u8(level, 1)));
            vst1q_s8(out + TILE_ROWS * 4, negate_where(minus_mask, vandq_u8(level, vdupq_n_u8(1))));
        }
    }
}

static void binary_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    for (size_t half = 0; half < 2; half++) {
        size_t first = row + billm_min(4 * half, rows - 1), count = rows > 4 * half ? billm_min(4, rows - 4 * half) : 1;
        const uint8_t *sign = w->sign + first * w->stride, *second = w->second + first * w->stride;
        const uint8_t *scales = w->scales + 4 * first * w->blocks;
        int8_t *out = (int8_t *)tile + 16 * half;
        uint8x16_t m[4];
        for (size_t j = col; j < col + cols; j += BILLM_UNIT, out += 8 * QUAD_BYTES) {
            if (j % w->block == 0) {
                uint8x16_t all = magnitudes_of(load_rows(scales + 4 * (j / w->block), 4 * w->blocks, count));
                uint32x4_t word = vreinterpretq_u32_u8(all);
                for (int i = 0; i < 4; i++, word = vshrq_n_u32(word, 8))
                    m[i] = vreinterpretq_u8_u32(vmulq_n_u32(vandq_u32(word, vdupq_n_u32(0xff)), 0x01010101u));
            }
            decode_unit(load_rows(sign + j / 8, w->stride, count), load_rows(second + j / 8, w->stride, count),
                        billm_load32(w->salient + j / 8), m, out);
        }
    }
}

static void int8_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    for (size_t half = 0; half < 2; half++) {
        int8_t *out = (int8_t *)tile + 16 * half;
        for (size_t j = 0; j < billm_round_up(cols, BILLM_UNIT); j += 16, out += 4 * QUAD_BYTES) {
            int32x4_t values[4];
            for (size_t r = 0; r < 4; r++) {
                const int8_t *from = w->values + (row + billm_min(4 * half + r, rows - 1)) * w->stride + col + j;
                size_t left = j < cols ? cols - j : 0;
                values[r] = vreinterpretq_s32_s8(left >= 16 ? vld1q_s8(from) : load_start(from, left));
            }
            transpose4(values);
            for (size_t q = 0; q < 4; q++) {
                int8x16_t value = vreinterpretq_s8_s32(values[q]);
                vst1q_s8(out + q * QUAD_BYTES, vshrq_n_s8(value, 1));
                vst1q_s8(out + q * QUAD_BYTES + TILE_ROWS * 4, vandq_s8(value, vdupq_n_s8(1)));
            }
        }
    }
}

/* Codes take the place of the low part; behind the tile lie the steps, int32 [blocks][8 rows]. */
static void int4_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    int32_t *steps = (void *)((int8_t *)tile + STEPS_AT);
    for (size_t half = 0; half < 2; half++) {
        const size_t first = row + billm_min(4 * half, rows - 1), count = rows > 4 * half ? billm_min(4, rows - 4 * half) : 1;
        int8_t *out = (int8_t *)tile + 16 * half;
        for (size_t j = 0; j < cols; j += BILLM_UNIT, out += 8 * QUAD_BYTES) {
            int32x4_t codes[2][4];
            for (size_t r = 0; r < 4; r++) {
                const size_t at = (first + billm_min(r, count - 1)) * w->stride + (col + j) / 2;
                int8x16x2_t row_codes = codes_of(w->nibbles + at);
                codes[0][r] = vreinterpretq_s32_s8(row_codes.val[0]);
                codes[1][r] = vreinterpretq_s32_s8(row_codes.val[1]);
            }
            for (size_t i = 0; i < 2; i++) {
                transpose4(codes[i]);
                for (size_t q = 0; q < 4; q++) {
                    vst1q_s8(out + (4 * i + q) * QUAD_BYTES, vdupq_n_s8(0));
                    vst1q_s8(out + (4 * i + q) * QUAD_BYTES + TILE_ROWS * 4, vreinterpretq_s8_s32(codes[i][q]));
                }
            }
            vst1q_s32(steps + j / BILLM_UNIT * TILE_ROWS + 4 * half,
                      steps_of(w, (col + j) / BILLM_UNIT, first, count));
        }
    }
}

static void pack(const int16_t *x, size_t cols, void *panel, size_t stride, size_t token) {
    void *packed = (uint8_t *)panel + token * stride;
    int8_t *out = packed;
    for (size_t j = 0; j < billm_round_up(cols, BILLM_UNIT); j += 16, out += 32) {
        int16_t values[16] = {0};
        if (j < cols)
            memcpy(values, x + j, billm_min(16, cols - j) * sizeof *x);
        vst1q_s8(out, low_digit(values));
        vst1q_s8(out + 16, high_digit(values));
    }
}

/* One quad of columns, four tokens: high (h) and low (l) sums of rows 0..3 (0) and 4..7 (1). */
#define QUAD(q)                                                                                                        \
    do {                                                                                                               \
        int8x16_t high0 = vld1q_s8(tile + (q) * QUAD_BYTES), high1 = vld1q_s8(tile + (q) * QUAD_BYTES + 16);           \
        int8x16_t low0 = vld1q_s8(tile + (q) * QUAD_BYTES + 32), low1 = vld1q_s8(tile + (q) * QUAD_BYTES + 48);        \
        for (int t = 0; t < TOKEN_STEP; t++) {                                                                   \
            h0[t] = vdotq_laneq_s32(h0[t], high0, value[t], q);                                                        \
            h1[t] = vdotq_laneq_s32(h1[t], high1, value[t], q);                                                        \
            l0[t] = vdotq_laneq_s32(l0[t], low0, value[t], q);                                                         \
            l1[t] = vdotq_laneq_s32(l1[t], low1, value[t], q);                                                         \
        }                                                                                                              \
    } while (0)

/* The sums of one digit, which `x` points to. */
static void multiply_block(const int8_t *tile, size_t cols, const int8_t *x, size_t x_stride,
                           int32x4_t sums[TOKEN_STEP][2]) {
    int32x4_t h0[TOKEN_STEP], h1[TOKEN_STEP], l0[TOKEN_STEP], l1[TOKEN_STEP];
    for (int t = 0; t < TOKEN_STEP; t++)
        h0[t] = h1[t] = l0[t] = l1[t] = vdupq_n_s32(0);
    for (size_t j = 0; j < cols; j += 16, tile += 4 * QUAD_BYTES) {
        int8x16_t value[TOKEN_STEP];
        for (size_t t = 0; t < TOKEN_STEP; t++)
            value[t] = vld1q_s8(x + t * x_stride + 2 * j);
        QUAD(0);
        QUAD(1);
        QUAD(2);
        QUAD(3);
    }
    for (int t = 0; t < TOKEN_STEP; t++) {
        sums[t][0] = vaddq_s32(vshlq_n_s32(h0[t], 1), l0[t]);
        sums[t][1] = vaddq_s32(vshlq_n_s32(h1[t], 1), l1[t]);
    }
}

static void multiply(const struct billm_weight *w, const void *tile, size_t col, size_t cols, const void *panel,
                     size_t stride, int bits, const float *x_scale, size_t scale_stride, size_t tokens, float *acc) {
    const size_t block = w->block;
    const int32_t *steps = (const void *)((const int8_t *)tile + STEPS_AT);
    const uint8_t *x = (const uint8_t *)panel + col * sizeof(int16_t);
    for (size_t t = 0; t < tokens; t += TOKEN_STEP, acc += TOKEN_STEP * TILE_ROWS) {
        for (size_t b = 0, at = 0; at < cols; b++, at += block) {
            int32x4_t low[TOKEN_STEP][2], high[TOKEN_STEP][2] = {{vdupq_n_s32(0)}};
            const int8_t *level = (const int8_t *)tile + at / 4 * QUAD_BYTES;
            const int8_t *values = (const int8_t *)x + t * stride + 2 * at;
            const size_t count = billm_min(block, cols - at);
            multiply_block(level, count, values, stride, low);
            if (bits != 8)
                multiply_block(level, count, values + 16, stride, high);
            for (size_t i = 0; i < TOKEN_STEP; i++) {
                float scale = x_scale[(t + i) * scale_stride + b], *to = acc + i * TILE_ROWS;
                for (size_t half = 0; half < 2; half++) {
                    int32x4_t sum = vaddq_s32(low[i][half], vshlq_n_s32(high[i][half], 8));
                    if (w->nibbles)
                        sum = vmulq_s32(sum, vld1q_s32(steps + b * TILE_ROWS + 4 * half));
                    vst1q_f32(to + 4 * half, step(vld1q_f32(to + 4 * half), scale, sum));
                }
            }
        }
    }
}

const struct billm_isa billm_neon = {
    .name = "neon-dotprod",
    .tile_rows = TILE_ROWS,
    .token_step = TOKEN_STEP,
    .packed_bytes = sizeof(int16_t),
    .row_step = billm_sixteen_rows,
    .few_tokens = 1,
    .quantize = quantize,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .binary_gemv = binary_gemv,
    .int8_gemv = int8_gemv,
    .int4_gemv = int4_gemv,
    .binary_tile = binary_tile,
    .int8_tile = int8_tile,
    .int4_tile = int4_tile,
    .pack = pack,
    .multiply = multiply,
    .floats = &billm_float_neon,
};
