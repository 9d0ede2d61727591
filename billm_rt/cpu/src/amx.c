/* AMX: tiles of bytes for prompts; the rest is AVX-512's with VBMI.
 *
 * One instruction multiplies 16 tokens by 16 rows over 64 columns, both sides in bytes. So a level becomes two unsigned
 * parts, of which one is zero, and an activation two signed digits, 256 * high + low = x; an accumulator for each of the
 * four combinations:
 *
 *   sum(level * x) = 256 * (sum(positive * high) - sum(negative * high)) + sum(positive * low) - sum(negative * low)
 */
#include "x86.h"

enum {
    TOKENS = 16,           /* rows of an accumulator */
    ROWS = 16,             /* its columns */
    TILE_ROWS = 2 * ROWS,  /* rows of a decoded tile */
    STEP = 64,             /* columns at a time; 32 where blocks are no larger */
    QUAD_BYTES = 4 * ROWS, /* four columns of sixteen rows, the row's side by side */
    PART_BYTES = BILLM_TILE_COLS / 4 * QUAD_BYTES,
    HALF_BYTES = 2 * PART_BYTES /* sixteen rows: the positive part, the negative part */
};

enum { LOW, HIGH, DIGITS };

/* ---- the tile of a weight ---- */

static inline __m512i row_offsets(size_t rows, size_t stride) {
    int32_t offsets[ROWS];
    for (size_t r = 0; r < ROWS; r++)
        offsets[r] = (int32_t)(billm_min(r, rows - 1) * stride); /* a short group repeats its last row */
    return _mm512_loadu_si512(offsets);
}

/* 32 columns of sixteen rows, a row's signs and choices of magnitude in each 32-bit lane. */
static inline void decode_unit(__m512i sign, __m512i q, uint32_t salient, __m512i magnitudes, uint8_t *out) {
    const __m512i rows = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    for (unsigned quad = 0; quad < 8; quad++, out += QUAD_BYTES) {
        const __m512i byte = _mm512_add_epi8(rows, _mm512_set1_epi8((char)(quad / 2)));
        const __m512i bits = _mm512_set1_epi32(quad % 2 ? (int)0x80402010u : 0x08040201);
        const uint32_t class = (salient >> 4 * quad & 15) * 0x00204081u & 0x01010101u; /* a bit to each byte */
        const __m512i index = _mm512_add_epi8(rows, _mm512_set1_epi32((int)(2 * class)));
        __mmask64 plus = _mm512_test_epi8_mask(_mm512_shuffle_epi8(sign, byte), bits);
        __mmask64 one = _mm512_test_epi8_mask(_mm512_shuffle_epi8(q, byte), bits);
        __m512i chosen = _mm512_mask_add_epi8(index, one, index, _mm512_set1_epi8(1));
        __m512i magnitude = _mm512_shuffle_epi8(magnitudes, chosen);
        __m512i positive = _mm512_maskz_mov_epi8(plus, magnitude);
        _mm512_store_si512(out, positive);
        _mm512_store_si512(out + PART_BYTES, _mm512_sub_epi8(magnitude, positive));
    }
}

/* Sixteen rows. */
static void binary_half(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, uint8_t *out) {
    const __m512i plane_rows = row_offsets(rows, w->stride), scale_rows = row_offsets(rows, 4 * w->blocks);
    const uint8_t *sign = w->sign + row * w->stride, *second = w->second + row * w->stride;
    const uint8_t *scales = w->scales + 4 * row * w->blocks;
    __m512i magnitudes = _mm512_setzero_si512();
    for (size_t j = col; j < col + cols; j += BILLM_UNIT, out += 8 * QUAD_BYTES) {
        if (j % w->block == 0)
            magnitudes = billm_magnitudes512(_mm512_i32gather_epi32(scale_rows, scales + 4 * (j / w->block), 1));
        const uint32_t salient = billm_load32(w->salient + j / 8);
        __m512i s = _mm512_i32gather_epi32(plane_rows, sign + j / 8, 1);
        __m512i t = _mm512_i32gather_epi32(plane_rows, second + j / 8, 1);
        __m512i q = _mm512_xor_si512(t, _mm512_andnot_si512(s, _mm512_set1_epi32((int)salient)));
        decode_unit(s, q, salient, magnitudes, out);
    }
}

static void int8_half(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, uint8_t *out) {
    const __m512i copy_rows = row_offsets(ROWS, STEP);
    for (size_t j = 0; j < cols; j += STEP) {
        const __mmask64 mask = ~(__mmask64)0 >> (STEP - billm_min(STEP, cols - j));
        _Alignas(64) int8_t copy[ROWS][STEP];
        for (size_t r = 0; r < ROWS; r++) {
            const int8_t *from = w->values + (row + billm_min(r, rows - 1)) * w->stride + col + j;
            _mm512_store_si512(copy[r], _mm512_maskz_loadu_epi8(mask, from));
        }
        for (size_t quad = 0; quad < STEP / 4; quad++, out += QUAD_BYTES) {
            __m512i value = _mm512_i32gather_epi32(copy_rows, copy[0] + 4 * quad, 1);
            __m512i positive = _mm512_max_epi8(value, _mm512_setzero_si512());
            _mm512_store_si512(out, positive);
            _mm512_store_si512(out + PART_BYTES, _mm512_sub_epi8(positive, value));
        }
    }
}

/* At 4 bits the codes, less their offset, are signed bytes in the place of the positive part; in that of the negative part
 * lie the steps, int32 [blocks][16 rows]. */
static void int4_half(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, uint8_t *out) {
    const __m512i offsets = row_offsets(rows, w->stride), low_half = _mm512_set1_epi8(15);
    const uint8_t *from = w->nibbles + row * w->stride + col / 2;
    int32_t *steps = (int32_t *)(void *)(out + PART_BYTES);
    for (size_t j = 0; j < cols; j += BILLM_UNIT, from += 16, out += 8 * QUAD_BYTES, steps += ROWS) {
        for (size_t quad = 0; quad < 4; quad++) {
            __m512i codes = _mm512_i32gather_epi32(offsets, from + 4 * quad, 1);
            __m512i first = _mm512_and_si512(codes, low_half);
            __m512i last = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_half);
            _mm512_store_si512(out + quad * QUAD_BYTES, _mm512_sub_epi8(first, _mm512_set1_epi8(8)));
            _mm512_store_si512(out + (4 + quad) * QUAD_BYTES, _mm512_sub_epi8(last, _mm512_set1_epi8(8)));
        }
        for (size_t r = 0; r < ROWS; r++)
            steps[r] = w->steps[(col + j) / BILLM_UNIT * w->rows + row + billm_min(r, rows - 1)];
    }
}

static void binary_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    for (size_t first = 0; first < rows; first += ROWS) /* what is not written has sums that are not used */
        binary_half(w, row + first, billm_min(ROWS, rows - first), col, cols,
                    (uint8_t *)tile + first / ROWS * HALF_BYTES);
}

static void int8_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    for (size_t first = 0; first < rows; first += ROWS)
        int8_half(w, row + first, billm_min(ROWS, rows - first), col, cols,
                  (uint8_t *)tile + first / ROWS * HALF_BYTES);
}

static void int4_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    for (size_t first = 0; first < rows; first += ROWS)
        int4_half(w, row + first, billm_min(ROWS, rows - first), col, cols,
                  (uint8_t *)tile + first / ROWS * HALF_BYTES);
}

/* ---- activations: sixteen tokens together, int8 [cols / 64][DIGITS][16 tokens][64] ---- */

enum { DIGIT_BYTES = TOKENS * STEP, STEP_BYTES = DIGITS * DIGIT_BYTES };

static void pack(const int16_t *x, size_t cols, void *panel, size_t stride, size_t token) {
    const __m512i half = _mm512_set1_epi16(128);
    int8_t *out = (int8_t *)panel + token / TOKENS * TOKENS * stride + token % TOKENS * STEP;
    for (size_t j = 0; j < cols; j += STEP, out += STEP_BYTES)
        for (size_t i = 0; i < STEP; i += 32) {
            int16_t values[32] = {0};
            if (j + i < cols)
                memcpy(values, x + j + i, billm_min(32, cols - j - i) * sizeof *x);
            __m512i value = _mm512_loadu_si512(values);
            __m512i high = _mm512_srai_epi16(_mm512_add_epi16(value, half), 8);
            _mm256_storeu_si256((__m256i *)(out + LOW * DIGIT_BYTES + i), _mm512_cvtepi16_epi8(value));
            _mm256_storeu_si256((__m256i *)(out + HIGH * DIGIT_BYTES + i), _mm512_cvtepi16_epi8(high));
        }
}

/* ---- products ---- */

struct config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Registers 0 to 3 are accumulators, 4 and 5 the parts of a weight, 6 and 7 the digits of activations. */
static void configure(size_t step) {
    struct config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = i == 4 || i == 5 ? (uint8_t)(step / 4) : TOKENS;
        config.row_bytes[i] = i >= 6 ? (uint16_t)step : 64;
    }
    /* GCC 12 tells its optimizer of the first eight bytes alone: the others must be in memory by now. */
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

/* One block, 16 tokens by 16 rows: the low digit's sums with both parts, then the high one's. */
static inline void multiply_block(const uint8_t *level, size_t cols, size_t step, const int8_t *x, int bits,
                                  int32_t sums[4][TOKENS][ROWS]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t col = 0; col < cols; col += step) {
        _tile_loadd(4, level, QUAD_BYTES);
        _tile_loadd(5, level + PART_BYTES, QUAD_BYTES);
        _tile_loadd(6, x + LOW * DIGIT_BYTES, STEP);
        _tile_dpbsud(0, 6, 4);
        _tile_dpbsud(1, 6, 5);
        if (bits != 8) {
            _tile_loadd(7, x + HIGH * DIGIT_BYTES, STEP);
            _tile_dpbsud(2, 7, 4);
            _tile_dpbsud(3, 7, 5);
        }
        level += STEP / 4 * QUAD_BYTES; /* a block narrower than that takes one step */
        x += STEP_BYTES;
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (bits != 8) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
}

/* The same with codes of 4 bits, whose blocks are a unit: the digits' sums. */
static inline void multiply_codes(const uint8_t *codes, const int8_t *x, int bits, int32_t sums[4][TOKENS][ROWS]) {
    _tile_zero(0);
    _tile_zero(2);
    _tile_loadd(4, codes, QUAD_BYTES);
    _tile_loadd(6, x + LOW * DIGIT_BYTES, STEP);
    _tile_dpbssd(0, 6, 4);
    if (bits != 8) {
        _tile_loadd(7, x + HIGH * DIGIT_BYTES, STEP);
        _tile_dpbssd(2, 7, 4);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(2, sums[2], 64);
}

/* acc = acc + scale * step * (sum of both digits) for each token. */
static inline void step_codes(int32_t sums[4][TOKENS][ROWS], const int32_t *steps, const float *scale,
                              size_t scale_stride, float *acc) {
    const __m512i step = _mm512_load_si512(steps);
    for (size_t t = 0; t < TOKENS; t++, acc += TILE_ROWS) {
        __m512i high = _mm512_slli_epi32(_mm512_load_si512(sums[2][t]), 8);
        __m512i sum = _mm512_mullo_epi32(_mm512_add_epi32(_mm512_load_si512(sums[0][t]), high), step);
        __m512 product = _mm512_mul_ps(_mm512_set1_ps(scale[t * scale_stride]), _mm512_cvtepi32_ps(sum));
        _mm512_storeu_ps(acc, _mm512_add_ps(_mm512_loadu_ps(acc), product));
    }
}

/* acc = acc + scale * sum for each token, two roundings. */
static inline void step_tokens(int32_t sums[4][TOKENS][ROWS], const float *scale, size_t scale_stride, int bits,
                               float *acc) {
    for (size_t t = 0; t < TOKENS; t++, acc += TILE_ROWS) {
        __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums[0][t]), _mm512_load_si512(sums[1][t]));
        if (bits != 8) {
            __m512i high = _mm512_sub_epi32(_mm512_load_si512(sums[2][t]), _mm512_load_si512(sums[3][t]));
            sum = _mm512_add_epi32(sum, _mm512_slli_epi32(high, 8));
        }
        __m512 product = _mm512_mul_ps(_mm512_set1_ps(scale[t * scale_stride]), _mm512_cvtepi32_ps(sum));
        _mm512_storeu_ps(acc, _mm512_add_ps(_mm512_loadu_ps(acc), product));
    }
}

static void multiply(const struct billm_weight *w, const void *tile, size_t col, size_t cols, const void *panel,
                     size_t stride, int bits, const float *x_scale, size_t scale_stride, size_t tokens, float *acc) {
    const size_t block = w->block, step = billm_min(block, STEP);
    _Alignas(64) int32_t sums[4][TOKENS][ROWS];
    configure(step);
    for (size_t t = 0; t < tokens; t += TOKENS)
        for (size_t b = 0, at = 0; at < cols; b++, at += block) {
            const int8_t *x = (const int8_t *)panel + t * stride + (col + at) / STEP * STEP_BYTES + at % STEP;
            for (size_t half = 0; half < 2; half++) {
                const uint8_t *level = (const uint8_t *)tile + half * HALF_BYTES + at / 4 * QUAD_BYTES;
                const float *scale = x_scale + t * scale_stride + b;
                float *to = acc + t * TILE_ROWS + half * ROWS;
                if (w->nibbles) {
                    const void *steps = (const uint8_t *)tile + half * HALF_BYTES + PART_BYTES;
                    multiply_codes(level, x, bits, sums);
                    step_codes(sums, (const int32_t *)steps + b * ROWS, scale, scale_stride, to);
                } else {
                    multiply_block(level, billm_min(block, cols - at), step, x, bits, sums);
                    step_tokens(sums, scale, scale_stride, bits, to);
                }
            }
        }
    _tile_release();
}

const struct billm_isa billm_amx = {
    .name = "amx-int8",
    .tile_rows = TILE_ROWS,
    .token_step = TOKENS,
    .packed_bytes = DIGITS,
    .row_step = billm_avx512_lookup_step,
    .few_tokens = 1,
    .quantize = billm_avx512_quantize,
    .arranged_bytes = billm_avx512_lookup_bytes,
    .arrange_begin = billm_avx512_lookup_begin,
    .arrange = billm_avx512_lookup_arrange,
    .prepared_bytes = billm_avx512vbmi_prepared_bytes,
    .prepare = billm_avx512vbmi_prepare,
    .binary_gemv = billm_avx512_lookup_gemv,
    .int8_gemv = billm_avx512_int8_gemv,
    .int4_gemv = billm_avx512_int4_gemv,
    .binary_tile = binary_tile,
    .int8_tile = int8_tile,
    .int4_tile = int4_tile,
    .pack = pack,
    .multiply = multiply,
    .floats = &billm_float_avx512,
};
