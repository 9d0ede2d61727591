/* AVX2: what takes two instructions for a sum of products, maddubs or madd and an addition. */
#include "x86.h"

void billm_avx2_quantize(const float *x, const float *col_scale, size_t cols, size_t block, int bits, int16_t *values,
                     float *scales) {
    billm_quantize_token(x, col_scale, cols, block, bits, values, scales);
}

static inline __m256i dot(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

BILLM_INLINE __m256i nibble_products(__m256i first, __m256i last, const int8_t x[2][32]) {
    __m256i sum = _mm256_maddubs_epi16(first, _mm256_load_si256((const void *)x[0])); /* at most 2 * 15 * 128 */
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(last, _mm256_load_si256((const void *)x[1])));
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

#include "decode256.h"

size_t billm_avx2_prepared_bytes(const struct billm_weight *w) {
    if (w->sign)
        return billm_lookup_prepared_bytes(w);
    return w->nibbles ? w->blocks * sizeof(struct billm_nibble_input) : billm_round_up(w->cols, 16) * sizeof(int16_t);
}

void billm_avx2_prepare(const struct billm_weight *w, const int16_t *x, void *prepared) {
    struct billm_nibble_input *unit = prepared;
    if (w->sign) {
        billm_lookup_prepare(w, x, prepared);
        return;
    }
    memset(prepared, 0, billm_avx2_prepared_bytes(w));
    if (w->values)
        memcpy(prepared, x, w->cols * sizeof *x);
    for (size_t j = 0; w->nibbles && j < w->cols; j++) {
        struct billm_nibble_input *to = unit + j / BILLM_UNIT;
        const size_t half = j % BILLM_UNIT / 16, i = j % 16;
        to->low[half][i] = to->low[half][16 + i] = (int8_t)(x[j] & 0xff);
        to->high[half][i] = to->high[half][16 + i] = (int8_t)((x[j] + 128) >> 8);
        to->offset += 8 * x[j];
    }
}

/* ---- tiles: int16 [cols / 2][16 rows][2]: a 32-bit lane is a row, madd_epi16 sums a pair of columns ---- */

enum { TILE_ROWS = BILLM_AVX2_TILE_ROWS, TOKEN_STEP = BILLM_AVX2_TOKEN_STEP };

/* Offsets of eight rows from the first; a short group repeats its last row. */
static __m256i row_offsets(size_t rows, size_t stride) {
    int32_t offsets[8];
    for (size_t r = 0; r < 8; r++)
        offsets[r] = (int32_t)(billm_min(r, rows - 1) * stride);
    return _mm256_loadu_si256((const __m256i *)offsets);
}

/* Per class of a pair of columns (bit 0: first column salient, bit 1: second): the magnitude where the chosen bit is 0,
 * and what is added where it is 1, as int16 pairs. */
struct levels {
    __m256i base[4], step[4];
};

static void pair_levels(__m256i magnitudes, struct levels *out) {
    const __m256i lanes =
        _mm256_setr_epi32(0, 0x00040004, 0x00080008, 0x000c000c, 0, 0x00040004, 0x00080008, 0x000c000c);
    for (int class = 0; class < 4; class++) {
        int pick = (int)0x80008000u | (class & 1) << 1 | (class & 2) << 16;
        __m256i control = _mm256_or_si256(_mm256_set1_epi32(pick), lanes);
        __m256i with_one = _mm256_shuffle_epi8(magnitudes, _mm256_or_si256(control, _mm256_set1_epi32(0x00010001)));
        out->base[class] = _mm256_shuffle_epi8(magnitudes, control);
        out->step[class] = _mm256_sub_epi16(with_one, out->base[class]);
    }
}

/* Bits 2p and 2p + 1 of half of a 32-bit lane to bit 2p of its low and of its high 16 bits. */
static inline __m256i first_half(__m256i word) {
    return _mm256_blend_epi16(word, _mm256_slli_epi32(word, 15), 0xaa);
}

static inline __m256i second_half(__m256i word) {
    return _mm256_blend_epi16(_mm256_srli_epi32(word, 16), _mm256_srli_epi32(word, 1), 0xaa);
}

/* Sixteen columns of eight rows; `chosen` picks the magnitude, `negative` the sign. */
static inline void decode16(__m256i chosen, __m256i negative, uint32_t salient, const struct levels *levels,
                            __m256i *out) {
    const __m256i one = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int p = 0; p < 8; p++) {
        unsigned class = salient >> 2 * p & 3;
        __m256i mask = _mm256_srai_epi16(_mm256_slli_epi16(chosen, 15 - 2 * p), 15);
        __m256i level = _mm256_add_epi16(levels->base[class], _mm256_and_si256(mask, levels->step[class]));
        __m256i sign = _mm256_or_si256(_mm256_slli_epi16(negative, 15 - 2 * p), one);
        _mm256_store_si256(out + 2 * p, _mm256_sign_epi16(level, sign));
    }
}

void billm_avx2_binary_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols,
                            void *tile) {
    for (size_t half = 0; half < 2; half++) {
        size_t first = row + billm_min(8 * half, rows - 1), count = rows > 8 * half ? billm_min(8, rows - 8 * half) : 1;
        const __m256i plane_rows = row_offsets(count, w->stride), scale_rows = row_offsets(count, 4 * w->blocks);
        const uint8_t *sign = w->sign + first * w->stride, *second = w->second + first * w->stride;
        const uint8_t *scales = w->scales + 4 * first * w->blocks;
        __m256i *out = (__m256i *)tile + half;
        struct levels levels;
        for (size_t j = col; j < col + cols; j += BILLM_UNIT, out += 32) {
            if (j % w->block == 0)
                pair_levels(billm_magnitudes(_mm256_i32gather_epi32(
                                (const int *)(const void *)(scales + 4 * (j / w->block)), scale_rows, 1)),
                            &levels);
            uint32_t salient = billm_load32(w->salient + j / 8);
            __m256i s = _mm256_i32gather_epi32((const int *)(const void *)(sign + j / 8), plane_rows, 1);
            __m256i t = _mm256_i32gather_epi32((const int *)(const void *)(second + j / 8), plane_rows, 1);
            __m256i negative = _mm256_xor_si256(s, _mm256_set1_epi32(-1));
            __m256i chosen = _mm256_xor_si256(t, _mm256_and_si256(negative, _mm256_set1_epi32((int)salient)));
            decode16(first_half(chosen), first_half(negative), salient, &levels, out);
            decode16(second_half(chosen), second_half(negative), salient >> 16, &levels, out + 16);
        }
    }
}

/* Sixteen columns of a row, `left` of which are there, as int16. */
typedef __m256i columns16(const struct billm_weight *w, size_t row, size_t col, size_t left);

BILLM_INLINE __m256i int8_columns(const struct billm_weight *w, size_t row, size_t col, size_t left) {
    const int8_t *from = w->values + row * w->stride + col;
    return left < 16 ? widen_start(from, left) : widen(from);
}

BILLM_INLINE __m256i int4_columns(const struct billm_weight *w, size_t row, size_t col, size_t left) {
    const uint8_t *from = w->nibbles + row * w->stride + col / BILLM_UNIT * 16;
    __m128i bytes = _mm_loadu_si128((const void *)from);
    (void)left; /* rows are whole units; what is too many meets zeros */
    __m128i codes = _mm_and_si128(col / 16 % 2 ? _mm_srli_epi16(bytes, 4) : bytes, _mm_set1_epi8(15));
    __m256i levels = _mm256_sub_epi16(_mm256_cvtepu8_epi16(codes), _mm256_set1_epi16(8));
    return _mm256_mullo_epi16(levels, _mm256_set1_epi16(w->steps[col / BILLM_UNIT * w->rows + row]));
}

BILLM_INLINE void table_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols,
                             void *tile, columns16 *columns) {
    for (size_t half = 0; half < 2; half++) {
        __m256i *out = (__m256i *)tile + half;
        for (size_t j = 0; j < billm_round_up(cols, BILLM_UNIT); j += 16, out += 16) {
            __m256i values[8];
            for (size_t r = 0; r < 8; r++)
                values[r] = columns(w, row + billm_min(8 * half + r, rows - 1), col + j, j < cols ? cols - j : 0);
            billm_transpose8(values);
            for (size_t p = 0; p < 8; p++)
                _mm256_store_si256(out + 2 * p, values[p]);
        }
    }
}

void billm_avx2_int8_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    table_tile(w, row, rows, col, cols, tile, int8_columns);
}

void billm_avx2_int4_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    table_tile(w, row, rows, col, cols, tile, int4_columns);
}

void billm_avx2_pack(const int16_t *x, size_t cols, void *panel, size_t stride, size_t token) {
    void *packed = (uint8_t *)panel + token * stride;
    memset((int16_t *)packed + cols, 0, (billm_round_up(cols, BILLM_UNIT) - cols) * sizeof *x);
    memcpy(packed, x, cols * sizeof *x);
}

/* Sums over `pairs` pairs of columns: sums[i][half] for token i and eight rows. */
static void multiply_block(const __m256i *level, size_t pairs, const int16_t *const x[TOKEN_STEP],
                           __m256i sums[TOKEN_STEP][2]) {
    const int16_t *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
    __m256i a0 = _mm256_setzero_si256(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    for (size_t pair = 0; pair < pairs; pair++) {
        __m256i low = _mm256_load_si256(level + 2 * pair), high = _mm256_load_si256(level + 2 * pair + 1);
        __m256i value = _mm256_set1_epi32((int)billm_load32(x0 + 2 * pair));
        a0 = _mm256_add_epi32(a0, _mm256_madd_epi16(low, value));
        b0 = _mm256_add_epi32(b0, _mm256_madd_epi16(high, value));
        value = _mm256_set1_epi32((int)billm_load32(x1 + 2 * pair));
        a1 = _mm256_add_epi32(a1, _mm256_madd_epi16(low, value));
        b1 = _mm256_add_epi32(b1, _mm256_madd_epi16(high, value));
        value = _mm256_set1_epi32((int)billm_load32(x2 + 2 * pair));
        a2 = _mm256_add_epi32(a2, _mm256_madd_epi16(low, value));
        b2 = _mm256_add_epi32(b2, _mm256_madd_epi16(high, value));
        value = _mm256_set1_epi32((int)billm_load32(x3 + 2 * pair));
        a3 = _mm256_add_epi32(a3, _mm256_madd_epi16(low, value));
        b3 = _mm256_add_epi32(b3, _mm256_madd_epi16(high, value));
    }
    const __m256i result[TOKEN_STEP][2] = {{a0, b0}, {a1, b1}, {a2, b2}, {a3, b3}};
    memcpy(sums, result, sizeof result);
}

void billm_avx2_multiply(const struct billm_weight *w, const void *tile, size_t col, size_t cols, const void *panel,
                     size_t stride, int bits, const float *x_scale, size_t scale_stride, size_t tokens, float *acc) {
    const size_t block = w->block;
    const uint8_t *x = (const uint8_t *)panel + col * sizeof(int16_t);
    (void)bits;
    for (size_t t = 0; t < tokens; t += TOKEN_STEP, acc += TOKEN_STEP * TILE_ROWS) {
        for (size_t b = 0, at = 0; at < cols; b++, at += block) {
            const int16_t *values[TOKEN_STEP];
            __m256i sums[TOKEN_STEP][2];
            for (size_t i = 0; i < TOKEN_STEP; i++)
                values[i] = (const int16_t *)(const void *)(x + (t + i) * stride) + at;
            multiply_block((const __m256i *)tile + at, (billm_min(block, cols - at) + 1) / 2, values, sums);
            for (size_t i = 0; i < TOKEN_STEP; i++) {
                float scale = x_scale[(t + i) * scale_stride + b], *to = acc + i * TILE_ROWS;
                _mm256_storeu_ps(to, billm_step(_mm256_loadu_ps(to), scale, sums[i][0]));
                _mm256_storeu_ps(to + 8, billm_step(_mm256_loadu_ps(to + 8), scale, sums[i][1]));
            }
        }
    }
}

const struct billm_isa billm_avx2 = {
    .name = "avx2",
    .tile_rows = TILE_ROWS,
    .token_step = TOKEN_STEP,
    .packed_bytes = sizeof(int16_t),
    .row_step = billm_lookup_step,
    .few_tokens = BILLM_LOOKUP_TOKENS,
    .quantize = billm_avx2_quantize,
    .arranged_bytes = billm_lookup_bytes,
    .arrange_begin = billm_lookup_begin,
    .arrange = billm_lookup_arrange,
    .prepared_bytes = billm_avx2_prepared_bytes,
    .prepare = billm_avx2_prepare,
    .binary_gemv = billm_lookup_gemv,
    .int8_gemv = int8_gemv,
    .int4_gemv = int4_gemv,
    .binary_tile = billm_avx2_binary_tile,
    .int8_tile = billm_avx2_int8_tile,
    .int4_tile = billm_avx2_int4_tile,
    .pack = billm_avx2_pack,
    .multiply = billm_avx2_multiply,
    .floats = &billm_float_avx2,
};
