/* AVX-512 with VNNI, decoding: binarized rows whose levels have seven bits, in blocks of at least 128 columns.
 *
 * Rows, slabs and the order of bits are those of avx512.c, but a level fits a byte with its sign, raised by 128; what that
 * adds to a sum is the same for every row, and sums begin with its negative. So a shuffle looks up whole levels by the
 * four bits that number a column's level: its sign, its second, whether it is salient, and 0. A byte has room for the
 * numbers of two columns, of bits k and k + 4; bit 7, which would make the shuffle give 0, is never set.
 *
 * In a last slab of at most 64 columns two rows share a lane, and bit 3 says which. */
#include "avx512.h"

struct slab {
    int8_t digits[DIGITS][8][SLAB_BYTES];
    uint8_t salient[4][SLAB_BYTES]; /* of bits n and n + 4 */
    int32_t start[4];               /* of a unit's sum: -128 times the sum of its activations */
    uint8_t unused[48];             /* a whole number of cache lines */
};

size_t billm_avx512_narrow_bytes(const struct billm_weight *w) {
    return slabs_of(w) * sizeof(struct slab);
}

static void prepare_slab(const int16_t *values, const uint8_t *plane, struct slab *slab) {
    __m512i x[4];
    for (int i = 0; i < 4; i++)
        x[i] = _mm512_loadu_si512(values + 32 * i);
    store_digits(x, slab->digits[LOW], slab->digits[HIGH]);
    const __m128i salient = _mm_loadu_si128((const void *)plane);
    for (int n = 0; n < 4; n++) {
        const __m128i both = _mm_and_si128(_mm_srli_epi16(salient, n), _mm_set1_epi8(0x11));
        _mm_store_si128((void *)slab->salient[n], _mm_slli_epi16(both, 2));
    }
    for (size_t unit = 0; unit < 4; unit++) {
        int32_t sum = 0;
        for (size_t j = 0; j < BILLM_UNIT; j++)
            sum += values[BILLM_UNIT * unit + j];
        slab->start[unit] = -128 * sum;
    }
}

/* Make room for a second row in every lane. */
static void halve_slab(struct slab *slab) {
    enum { HALF = SLAB_BYTES / 2 };
    for (size_t k = 0; k < 8; k++)
        for (size_t digit = 0; digit < DIGITS; digit++)
            memcpy(slab->digits[digit][k] + HALF, slab->digits[digit][k], HALF);
    for (size_t n = 0; n < 4; n++)
        memcpy(slab->salient[n] + HALF, slab->salient[n], HALF);
    memcpy(slab->start + 2, slab->start, 2 * sizeof *slab->start);
}

void billm_avx512_prepare_narrow(const struct billm_weight *w, const int16_t *x, void *prepared) {
    struct slab *slab = prepared;
    for (size_t col = 0; col < w->cols; col += SLAB_COLS, slab++) {
        int16_t values[SLAB_COLS] = {0};
        uint8_t salient[SLAB_BYTES] = {0};
        memcpy(values, x + col, billm_min(SLAB_COLS, w->cols - col) * sizeof *values);
        memcpy(salient, w->salient + col / 8, billm_min(SLAB_BYTES, w->stride - col / 8));
        prepare_slab(values, salient, slab);
    }
    if (ends_with_half(w))
        halve_slab(slab - 1);
}

/* The table of a block's levels, raised by 128: those of a sign of 0 are the negative. The second of a salient column says
 * whether its signs agree, so there the magnitudes change places with the sign. */
BILLM_INLINE __m512i levels_of(__m512i magnitudes, size_t block) {
    const __m128i order = _mm_setr_epi8(0, 0, 1, 1, 3, 2, 2, 3, 0, 0, 1, 1, 3, 2, 2, 3);
    const __m512i control = _mm512_broadcast_i32x4(_mm_add_epi8(order, _mm_set1_epi8((char)(4 * (block % 4)))));
    const __m512i magnitude = _mm512_shuffle_epi8(magnitudes, control), raise = _mm512_set1_epi8((char)128);
    return _mm512_mask_blend_epi8(0x5555555555555555u, _mm512_xor_si512(magnitude, raise),
                                  _mm512_subs_epu8(raise, magnitude));
}

/* Add what `count` vectors of rows have in the columns of one bit, numbered in the low halves of `index`. */
BILLM_INLINE void add_bit(const __m512i *table, const __m512i *index, const int count, const struct slab *x, size_t k,
                          int bits, __m512i *low, __m512i *high) {
    const __m512i low_digits = broadcast(x->digits[LOW][k]), high_digits = broadcast(x->digits[HIGH][k]);
#pragma GCC unroll 4
    for (int a = 0; a < count; a++) {
        const __m512i level = _mm512_shuffle_epi8(table[a], index[a]);
        low[a] = _mm512_dpbusd_epi32(low[a], level, low_digits);
        if (bits != 8)
            high[a] = _mm512_dpbusd_epi32(high[a], level, high_digits);
    }
}

/* sums[a], lane l, 32-bit lane u: row 4 l + a, unit u of the slab; with `second_row` (8 in its bytes, else zeros) the
 * lane has two rows of two units. */
BILLM_INLINE void slab_sums(const __m512i *sign, const __m512i *second, const __m512i *table, const int count,
                            const __m512i *second_row, const struct slab *x, int bits, __m512i *sums) {
    const __m512i even = _mm512_set1_epi8(0x55), code = _mm512_set1_epi8(0x33);
    __m512i codes[2][4], low[4], high[4];
#pragma GCC unroll 4
    for (int a = 0; a < count; a++) { /* 0xac: of the third where the first has a bit, else of the second */
        codes[0][a] = _mm512_ternarylogic_epi64(even, _mm512_slli_epi16(second[a], 1), sign[a], 0xac);
        codes[1][a] = _mm512_ternarylogic_epi64(even, second[a], _mm512_srli_epi16(sign[a], 1), 0xac);
        low[a] = broadcast(x->start);
        high[a] = _mm512_setzero_si512();
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) { /* bits 0 and 4, 1 and 5, ... */
        const __m512i salient = broadcast(x->salient[n]);
        __m512i index[4];
#pragma GCC unroll 4
        for (int a = 0; a < count; a++) {
            __m512i *from = &codes[n % 2][a];
            if (n >= 2)
                *from = _mm512_srli_epi16(*from, 2);
            index[a] = _mm512_ternarylogic_epi64(*from, code, salient, 0xea);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i chosen[4];
#pragma GCC unroll 4
            for (int a = 0; a < count; a++) {
                chosen[a] = half ? _mm512_srli_epi16(index[a], 4) : index[a];
                if (second_row)
                    chosen[a] = _mm512_or_si512(chosen[a], *second_row);
            }
            add_bit(table, chosen, count, x, (size_t)(n + 4 * half), bits, low, high);
        }
    }
#pragma GCC unroll 4
    for (int a = 0; a < count; a++)
        sums[a] = bits == 8 ? low[a] : _mm512_add_epi32(low[a], _mm512_slli_epi32(high[a], 8));
}

/* Sums of a half slab: lane i is row i. Rows 4 l + a and 4 l + a + 2 share lane l of vector a. */
BILLM_INLINE __m512i half_sums(const __m512i sign[4], const __m512i second[4], const __m512i table[4],
                               const struct slab *x, int bits) {
    const __m512i second_row = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8));
    __m512i s[2], t[2], tables[2], sums[2];
#pragma GCC unroll 2
    for (int a = 0; a < 2; a++) {
        s[a] = _mm512_unpacklo_epi64(sign[a], sign[a + 2]);
        t[a] = _mm512_unpacklo_epi64(second[a], second[a + 2]);
        tables[a] = _mm512_unpacklo_epi64(table[a], table[a + 2]);
    }
    slab_sums(s, t, tables, 2, &second_row, x, bits, sums);
    const __m512i rows01 = _mm512_unpacklo_epi32(sums[0], sums[1]), rows23 = _mm512_unpackhi_epi32(sums[0], sums[1]);
    return _mm512_add_epi32(_mm512_unpacklo_epi64(rows01, rows23), _mm512_unpackhi_epi64(rows01, rows23));
}

/* Sixteen rows at a time, so that a lane of the running sums is a row. */
BILLM_INLINE void gemv(const struct billm_weight *w, const struct slab *x, int bits, const float *x_scale, size_t row,
                       size_t end, float *acc) {
    const size_t slabs = slabs_of(w), whole = slabs - (size_t)ends_with_half(w);
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
#pragma GCC unroll 4
            for (int a = 0; a < 4; a++)
                table[a] = levels_of(magnitudes[a], block);
            if (slab >= whole) {
                sum = _mm512_add_epi32(sum, half_sums(sign, second, table, x + slab, bits));
                total = step(total, x_scale[block], sum);
                break;
            }
            slab_sums(sign, second, table, 4, NULL, x + slab, bits, sums);
            transpose4(sums);
            sum = _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]),
                                                         _mm512_add_epi32(sums[2], sums[3])));
            if (w->block == SLAB_COLS || slab % 2 || slab + 1 == slabs) {
                total = step(total, x_scale[block++], sum);
                sum = _mm512_setzero_si512();
            }
        }
        float result[GROUP_ROWS];
        _mm512_storeu_ps(result, total);
        memcpy(acc, result, count * sizeof *acc);
        acc += count;
    }
}

void billm_avx512_narrow_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale,
                              size_t row, size_t end, float *acc) {
    if (bits == 8)
        gemv(w, prepared, 8, x_scale, row, end, acc);
    else
        gemv(w, prepared, 16, x_scale, row, end, acc);
}
