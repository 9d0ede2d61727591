/* AVX-512 with VNNI: vpdpbusd sums four bytes straight into an int32 lane, vpdpwssd a pair of int16.
 * Decoding stays at 256 bits, where slabs and tails are those of AVX2: memory is the limit there, not arithmetic. */
#include "avx512.h"

void billm_avx512_quantize(const float *x, const float *col_scale, size_t cols, size_t block, int bits, int16_t *values,
                     float *scales) {
    billm_quantize_token(x, col_scale, cols, block, bits, values, scales);
}

/* ---- decoding: four rows side by side, one in each 128-bit lane, in slabs of 128 columns ----
 *
 * The 16 bytes of a slab's plane meet its activations without moving a bit: vector k holds the activations of bit k of
 * each byte. Bit k of the sign plane chooses between an activation and its negative (each has digits of its own, as the
 * negative of -128 is no signed byte), bit k of q = second ^ (salient & ~sign) between two magnitudes, which a shuffle
 * looks up in a table of the lane: so every row brings its own. vpdpbusd multiplies magnitudes (unsigned) and digits.
 *
 * An index of that table, for blocks of at least 128 columns: the salient bit as bit 3, q as any one of bits 0 to 2, so
 * that three vectors of q pass before it must be shifted. Smaller blocks need the room for their units: bits 2 and 3
 * number the unit, bit 1 is the salient bit, bit 0 is q.
 *
 * A last slab of at most 64 columns (widths like 576) would waste half of it all: there two rows share a lane, 8 bytes
 * each, and the activations lie there twice. Its index: the second row as bit 3, the salient bit as bit 2, q as bit 0 or
 * 1. */
enum { MINUS_LOW = DIGITS, MINUS_HIGH, SIGNED_DIGITS };

struct slab {
    int8_t digits[SIGNED_DIGITS][8][SLAB_BYTES];
    uint8_t index[8][SLAB_BYTES]; /* with q = 0 */
    uint8_t salient[SLAB_BYTES];
    uint8_t unused[48]; /* a whole number of cache lines */
};

static void prepare_slab(const int16_t *values, const uint8_t *plane, int small_blocks, struct slab *slab) {
    __m512i x[4], minus[4];
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_loadu_si512(values + 32 * i);
        minus[i] = _mm512_sub_epi16(_mm512_setzero_si512(), x[i]);
    }
    store_digits(x, slab->digits[LOW], slab->digits[HIGH]);
    store_digits(minus, slab->digits[MINUS_LOW], slab->digits[MINUS_HIGH]);
    __m128i salient = _mm_loadu_si128((const void *)plane), unit = _mm_setzero_si128();
    if (small_blocks)
        unit = _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    _mm_store_si128((void *)slab->salient, salient);
    for (int k = 0; k < 8; k++) {
        __m128i bit = _mm_and_si128(_mm_srli_epi16(salient, k), _mm_set1_epi8(1));
        _mm_store_si128((void *)slab->index[k], _mm_or_si128(unit, _mm_slli_epi16(bit, small_blocks ? 1 : 3)));
    }
}

/* Make room for a second row in every lane. */
static void halve_slab(struct slab *slab) {
    enum { HALF = SLAB_BYTES / 2 };
    for (size_t k = 0; k < 8; k++) {
        for (size_t digit = 0; digit < SIGNED_DIGITS; digit++)
            memcpy(slab->digits[digit][k] + HALF, slab->digits[digit][k], HALF);
        for (size_t i = 0; i < HALF; i++) {
            slab->index[k][i] = slab->index[k][i] >> 1; /* the salient bit, so far bit 3 */
            slab->index[k][HALF + i] = slab->index[k][i] | 8;
        }
    }
    memcpy(slab->salient + HALF, slab->salient, HALF);
}

static void prepare_binary(const struct billm_weight *w, const int16_t *x, struct slab *slab) {
    for (size_t col = 0; col < w->cols; col += SLAB_COLS, slab++) {
        const int16_t *values = x + col;
        const uint8_t *salient = w->salient + col / 8;
        int16_t short_values[SLAB_COLS] = {0};
        uint8_t short_salient[SLAB_BYTES] = {0};
        if (w->cols - col < SLAB_COLS) {
            memcpy(short_values, values, (w->cols - col) * sizeof *values);
            memcpy(short_salient, salient, w->stride - col / 8);
            values = short_values;
            salient = short_salient;
        }
        prepare_slab(values, salient, w->block < SLAB_COLS, slab);
    }
    if (ends_with_half(w))
        halve_slab(slab - 1);
}

/* Which of the magnitudes of four blocks make the table of a slab, the first of whose blocks is number `block`. */
static inline __m512i table_of(size_t block, size_t block_cols) {
    const __m128i one_block = _mm_setr_epi8(0, 1, 1, 0, 1, 0, 0, 0, 2, 3, 3, 0, 3, 0, 0, 0);
    const __m128i two_blocks = _mm_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7);
    const __m128i four_blocks = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m128i table = block_cols >= SLAB_COLS ? one_block : block_cols == 64 ? two_blocks : four_blocks;
    return _mm512_broadcast_i32x4(_mm_add_epi8(table, _mm_set1_epi8((char)(4 * (block % 4)))));
}

/* sums[a], lane l, 32-bit lane u: row 4 l + a, unit u of the slab. */
BILLM_INLINE void slab_sums(const __m512i sign[4], const __m512i second[4], const __m512i table[4],
                            const struct slab *x, int small_blocks, int bits, __m512i sums[4]) {
    __m512i q[4], low[4], high[4];
    const __m512i salient = broadcast(x->salient);
#pragma GCC unroll 4
    for (int a = 0; a < 4; a++) {
        q[a] = _mm512_ternarylogic_epi64(second[a], salient, sign[a], 0xb4); /* second ^ (salient & ~sign) */
        low[a] = high[a] = _mm512_setzero_si512();
    }
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        const int shift = small_blocks ? k > 0 : k == 3 || k == 6 ? 3 : 0;
        const __m512i bit = _mm512_set1_epi8((char)(1 << k));
        const __m512i q_bit = _mm512_set1_epi8((char)(small_blocks ? 1 : 1 << k % 3));
        const __m512i index = broadcast(x->index[k]);
        const __m512i plus_low = broadcast(x->digits[LOW][k]), minus_low = broadcast(x->digits[MINUS_LOW][k]);
        const __m512i plus_high = broadcast(x->digits[HIGH][k]), minus_high = broadcast(x->digits[MINUS_HIGH][k]);
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) {
            if (shift)
                q[a] = _mm512_srli_epi16(q[a], shift);
            __m512i magnitude = _mm512_shuffle_epi8(table[a], _mm512_ternarylogic_epi64(q[a], q_bit, index, 0xea));
            __mmask64 plus = _mm512_test_epi8_mask(sign[a], bit);
            low[a] = _mm512_dpbusd_epi32(low[a], magnitude, _mm512_mask_blend_epi8(plus, minus_low, plus_low));
            if (bits != 8)
                high[a] = _mm512_dpbusd_epi32(high[a], magnitude, _mm512_mask_blend_epi8(plus, minus_high, plus_high));
        }
    }
#pragma GCC unroll 4
    for (int a = 0; a < 4; a++)
        sums[a] = bits == 8 ? low[a] : _mm512_add_epi32(low[a], _mm512_slli_epi32(high[a], 8));
}

/* Sums of a half slab: lane i is row i. Rows 4 l + a and 4 l + a + 2 share lane l of vector a. */
BILLM_INLINE __m512i half_sums(const __m512i sign[4], const __m512i second[4], const __m512i magnitudes[4],
                               size_t block, const struct slab *x, int bits) {
    const char m = (char)(4 * (block % 4)), none = -1;
    const __m128i eight = _mm_setr_epi8(m, m + 1, m + 1, none, m + 2, m + 3, m + 3, none, none, none, none, none, none,
                                        none, none, none);
    const __m512i first = _mm512_broadcast_i32x4(eight);
    const __m512i other = _mm512_broadcast_i32x4(_mm_shuffle_epi32(eight, 0x4e)); /* the halves exchanged */
    const __m512i salient = broadcast(x->salient);
    __m512i s[2], q[2], table[2], low[2], high[2];
#pragma GCC unroll 2
    for (int a = 0; a < 2; a++) {
        s[a] = _mm512_unpacklo_epi64(sign[a], sign[a + 2]);
        q[a] = _mm512_ternarylogic_epi64(_mm512_unpacklo_epi64(second[a], second[a + 2]), salient, s[a], 0xb4);
        table[a] = _mm512_or_si512(_mm512_shuffle_epi8(magnitudes[a], first),
                                   _mm512_shuffle_epi8(magnitudes[a + 2], other));
        low[a] = high[a] = _mm512_setzero_si512();
    }
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        const __m512i bit = _mm512_set1_epi8((char)(1 << k)), q_bit = _mm512_set1_epi8((char)(1 << k % 2));
        const __m512i index = broadcast(x->index[k]);
        const __m512i plus_low = broadcast(x->digits[LOW][k]), minus_low = broadcast(x->digits[MINUS_LOW][k]);
        const __m512i plus_high = broadcast(x->digits[HIGH][k]), minus_high = broadcast(x->digits[MINUS_HIGH][k]);
#pragma GCC unroll 2
        for (int a = 0; a < 2; a++) {
            if (k && k % 2 == 0)
                q[a] = _mm512_srli_epi16(q[a], 2);
            __m512i magnitude = _mm512_shuffle_epi8(table[a], _mm512_ternarylogic_epi64(q[a], q_bit, index, 0xea));
            __mmask64 plus = _mm512_test_epi8_mask(s[a], bit);
            low[a] = _mm512_dpbusd_epi32(low[a], magnitude, _mm512_mask_blend_epi8(plus, minus_low, plus_low));
            if (bits != 8)
                high[a] = _mm512_dpbusd_epi32(high[a], magnitude, _mm512_mask_blend_epi8(plus, minus_high, plus_high));
        }
    }
#pragma GCC unroll 2
    for (int a = 0; a < 2 && bits != 8; a++)
        low[a] = _mm512_add_epi32(low[a], _mm512_slli_epi32(high[a], 8));
    __m512i rows01 = _mm512_unpacklo_epi32(low[0], low[1]), rows23 = _mm512_unpackhi_epi32(low[0], low[1]);
    return _mm512_add_epi32(_mm512_unpacklo_epi64(rows01, rows23), _mm512_unpackhi_epi64(rows01, rows23));
}

/* Sixteen rows at a time, so that a lane of the running sums is a row. */
BILLM_INLINE void gemv(const struct billm_weight *w, const struct slab *x, int small_blocks, int bits,
                       const float *x_scale, size_t row, size_t end, float *acc) {
    const size_t slabs = slabs_of(w), units_per_block = w->block / BILLM_UNIT;
    const size_t whole = slabs - (size_t)(!small_blocks && ends_with_half(w)); /* slabs that are no half ones */
    const size_t scale_bytes = GROUP_ROWS * 4 * SLAB_COLS / w->block;
    for (; row < end; row += GROUP_ROWS) {
        const size_t count = billm_min(GROUP_ROWS, end - row);
        const struct rows sign_rows = find_rows(w->sign, w->stride, row, count, w->rows);
        const struct rows second_rows = find_rows(w->second, w->stride, row, count, w->rows);
        const struct rows scale_rows = find_rows(w->scales, 4 * w->blocks, row, count, w->rows);
        __m512 total = _mm512_setzero_ps();
        __m512i sum = _mm512_setzero_si512(), magnitudes[4];
        for (size_t slab = 0, block = 0, loaded = 0; slab < slabs; slab++) {
            __m512i sign[4], second[4], table[4], sums[4];
            load_rows(&sign_rows, slab * SLAB_BYTES, sign);
            load_rows(&second_rows, slab * SLAB_BYTES, second);
            prefetch(&sign_rows, slab * PLANE_BYTES, PLANE_BYTES);
            prefetch(&second_rows, slab * PLANE_BYTES, PLANE_BYTES);
            prefetch(&scale_rows, slab * scale_bytes, scale_bytes);
            if (block >= loaded) {
                load_rows(&scale_rows, 4 * block, magnitudes);
#pragma GCC unroll 4
                for (int a = 0; a < 4; a++)
                    magnitudes[a] = billm_magnitudes512(magnitudes[a]);
                loaded = block + 4;
            }
            if (slab >= whole) {
                sum = _mm512_add_epi32(sum, half_sums(sign, second, magnitudes, block, x + slab, bits));
                total = step(total, x_scale[block], sum);
                break;
            }
            const __m512i control = table_of(block, w->block);
#pragma GCC unroll 4
            for (int a = 0; a < 4; a++)
                table[a] = _mm512_shuffle_epi8(magnitudes[a], control);
            slab_sums(sign, second, table, x + slab, small_blocks, bits, sums);
            transpose4(sums);
            if (small_blocks) {
                for (size_t unit = 0; unit < 4 && block < w->blocks; unit++) {
                    sum = _mm512_add_epi32(sum, sums[unit]);
                    if ((unit + 1) % units_per_block == 0) {
                        total = step(total, x_scale[block++], sum);
                        sum = _mm512_setzero_si512();
                    }
                }
            } else {
                sum = _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]),
                                                             _mm512_add_epi32(sums[2], sums[3])));
                if (w->block == SLAB_COLS || slab % 2 || slab + 1 == slabs) {
                    total = step(total, x_scale[block++], sum);
                    sum = _mm512_setzero_si512();
                }
            }
        }
        float result[GROUP_ROWS];
        _mm512_storeu_ps(result, total);
        memcpy(acc, result, count * sizeof *acc);
        acc += count;
    }
}

void billm_avx512_binary_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                        size_t end, float *acc) {
    if (billm_is_narrow(w)) {
        billm_avx512_narrow_gemv(w, prepared, bits, x_scale, row, end, acc);
    } else if (w->block < SLAB_COLS) {
        if (bits == 8)
            gemv(w, prepared, 1, 8, x_scale, row, end, acc);
        else
            gemv(w, prepared, 1, 16, x_scale, row, end, acc);
    } else if (bits == 8)
        gemv(w, prepared, 0, 8, x_scale, row, end, acc);
    else
        gemv(w, prepared, 0, 16, x_scale, row, end, acc);
}

size_t billm_avx512_prepared_bytes(const struct billm_weight *w) {
    if (billm_is_narrow(w))
        return billm_avx512_narrow_bytes(w);
    return w->sign ? slabs_of(w) * sizeof(struct slab) : billm_avx512_table_bytes(w);
}

void billm_avx512_prepare(const struct billm_weight *w, const int16_t *x, void *prepared) {
    if (billm_is_narrow(w))
        billm_avx512_prepare_narrow(w, x, prepared);
    else if (w->sign)
        prepare_binary(w, x, prepared);
    else
        billm_avx512_prepare_table(w, x, prepared);
}

/* ---- prompts ---- */

/* A tile is two of AVX2's, of sixteen rows each. */
enum { TILE_ROWS = 32, HALF_TILE = 16 * BILLM_TILE_COLS * sizeof(int16_t) };

typedef void make_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile);

static inline void two_tiles(make_tile *make, const struct billm_weight *w, size_t row, size_t rows, size_t col,
                             size_t cols, void *tile) {
    make(w, row, billm_min(rows, 16), col, cols, tile);
    if (rows > 16)
        make(w, row + 16, rows - 16, col, cols, (uint8_t *)tile + HALF_TILE);
    else /* sums that nobody reads must not overflow either */
        memset((uint8_t *)tile + HALF_TILE, 0, HALF_TILE);
}

static void binary_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    two_tiles(billm_avx2_binary_tile, w, row, rows, col, cols, tile);
}

static void int8_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    two_tiles(billm_avx2_int8_tile, w, row, rows, col, cols, tile);
}

static void int4_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    two_tiles(billm_avx2_int4_tile, w, row, rows, col, cols, tile);
}

/* Sums over `pairs` pairs of columns, eight tokens by 32 rows: two loads of the tile and eight of activations feed
 * sixteen multiplications. Names instead of arrays: GCC keeps these in registers. */
static void multiply_block(const uint8_t *level, size_t pairs, const uint8_t *const x[8], __m512i sums[8][2]) {
    const uint8_t *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *x4 = x[4], *x5 = x[5], *x6 = x[6], *x7 = x[7];
    __m512i a0 = _mm512_setzero_si512(), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0;
    __m512i b0 = a0, b1 = a0, b2 = a0, b3 = a0, b4 = a0, b5 = a0, b6 = a0, b7 = a0;
#define TOKEN(t)                                                                                                       \
    pair = _mm512_set1_epi32((int)billm_load32(x##t + 4 * i));                                                         \
    a##t = _mm512_dpwssd_epi32(a##t, low, pair);                                                                       \
    b##t = _mm512_dpwssd_epi32(b##t, high, pair)
    for (size_t i = 0; i < pairs; i++) {
        __m512i low = _mm512_load_si512(level + 64 * i), high = _mm512_load_si512(level + 64 * i + HALF_TILE), pair;
        TOKEN(0);
        TOKEN(1);
        TOKEN(2);
        TOKEN(3);
        TOKEN(4);
        TOKEN(5);
        TOKEN(6);
        TOKEN(7);
    }
#undef TOKEN
    const __m512i result[8][2] = {{a0, b0}, {a1, b1}, {a2, b2}, {a3, b3}, {a4, b4}, {a5, b5}, {a6, b6}, {a7, b7}};
    memcpy(sums, result, sizeof result);
}

static void multiply(const struct billm_weight *w, const void *tile, size_t col, size_t cols, const void *panel,
                     size_t stride, int bits, const float *x_scale, size_t scale_stride, size_t tokens, float *acc) {
    const size_t block = w->block;
    const uint8_t *x = (const uint8_t *)panel + col * sizeof(int16_t);
    (void)bits;
    for (size_t t = 0; t < tokens; t += 8) {
        const size_t count = billm_min(8, tokens - t); /* a short step repeats its last token */
        for (size_t b = 0, at = 0; at < cols; b++, at += block) {
            const uint8_t *values[8];
            __m512i sums[8][2];
            for (size_t i = 0; i < 8; i++)
                values[i] = x + (t + billm_min(i, count - 1)) * stride + 2 * at;
            multiply_block((const uint8_t *)tile + 32 * at, (billm_min(block, cols - at) + 1) / 2, values, sums);
            for (size_t i = 0; i < count; i++) {
                float scale = x_scale[(t + i) * scale_stride + b], *to = acc + (t + i) * TILE_ROWS;
                _mm512_storeu_ps(to, step(_mm512_loadu_ps(to), scale, sums[i][0]));
                _mm512_storeu_ps(to + 16, step(_mm512_loadu_ps(to + 16), scale, sums[i][1]));
            }
        }
    }
}

const struct billm_isa billm_avx512 = {
    .name = "avx512-vnni",
    .tile_rows = TILE_ROWS,
    .token_step = 4,
    .packed_bytes = sizeof(int16_t),
    .row_step = 16,
    .few_tokens = 1,
    .quantize = billm_avx512_quantize,
    .prepared_bytes = billm_avx512_prepared_bytes,
    .prepare = billm_avx512_prepare,
    .binary_gemv = billm_avx512_binary_gemv,
    .int8_gemv = billm_avx512_int8_gemv,
    .int4_gemv = billm_avx512_int4_gemv,
    .binary_tile = binary_tile,
    .int8_tile = int8_tile,
    .int4_tile = int4_tile,
    .pack = billm_avx2_pack,
    .multiply = multiply,
    .floats = &billm_float_avx512,
};
