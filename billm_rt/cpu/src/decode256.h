/* Decoding in vectors of 256 bits, for the file that defines dot(sum, a, b): the sums of pairs of int16 products. */
#include "x86.h"

/* And for narrow levels (see below) such a file defines narrow_words(x): of the activations of one bit of sixteen bytes,
 * those that a product takes as its first vector (64-bit lanes 0 and 2) and as its second one (1 and 3);
 * add_narrow(sums, levels, x): add the products of 32 levels with these two vectors; and narrow_total(sums). For codes of 4
 * bits, nibble_products(first, last, x): the sums of the products of codes with two vectors of digits. */

/* ---- binarized rows, blocks of at least 128 columns ----
 *
 * Two rows at a time, one in each 128-bit lane, in slabs of 128 columns. As in avx512.c, the 16 bytes of a plane meet
 * their activations without moving a bit: a vector of levels is about one bit of every byte. The bits of a column, its
 * sign, its second and whether it is salient, number one of eight levels: four bits, so that a byte has room for two
 * columns, of bits k and k + 4, and shuffles look both up without a mask (bit 7, which would give zero, never is set).
 *
 * Levels of seven bits fit a byte, raised by 128; what that adds to a sum is the same for every row. Others take two
 * tables, of the low and of the high byte. */
enum { WORD_COLS = 128, WORD_BYTES = WORD_COLS / 8, GROUP_ROWS = 8 };

struct words {
    uint8_t x[8][2][32];    /* activations of bit 0, 4, 2, 6, 1, 5, 3, 7: two vectors as the product wants them, in both lanes */
    uint8_t salient[4][32]; /* 4 where the column of the first of two such bits is salient, plus 64 where that of the second is */
    int32_t offset[8];      /* narrow levels: 128 times the sum of the slab's activations, in every lane */
};

static inline size_t word_slabs(const struct billm_weight *w) {
    return (w->cols + WORD_COLS - 1) / WORD_COLS;
}

/* A last slab of at most 64 columns (widths like 576) would waste half of it all: with narrow levels two rows share a
 * lane there, and the activations lie there twice. */
static inline int ends_with_half(const struct billm_weight *w) {
    return billm_is_narrow(w) && w->cols % WORD_COLS && w->cols % WORD_COLS <= WORD_COLS / 2;
}

/* Lane i of v[k] of each half becomes lane k of v[i]: 16-bit lanes. */
static inline void transpose8_words(__m256i v[8]) {
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            b[4 * i + 2 * j] = _mm256_unpacklo_epi32(a[4 * i + j], a[4 * i + j + 2]);
            b[4 * i + 2 * j + 1] = _mm256_unpackhi_epi32(a[4 * i + j], a[4 * i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        v[2 * i] = _mm256_unpacklo_epi64(b[i], b[i + 4]);
        v[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 4]);
    }
}

/* `values` [128] and `plane` [16] are padded with zeros; with `half` their first half counts, for both rows of a lane. */
static void prepare_slab(const int16_t *values, const uint8_t *plane, int narrow, int half, struct words *slab) {
    static const uint8_t place[8] = {0, 4, 2, 6, 1, 5, 3, 7}; /* of bit k */
    __m128i salient = _mm_loadu_si128((const void *)plane);
    __m256i v[8], sum = _mm256_setzero_si256();
    if (half)
        salient = _mm_unpacklo_epi64(salient, salient);
    for (size_t i = 0; i < 8; i++) {
        __m128i low = _mm_loadu_si128((const void *)(values + 8 * i));
        __m128i high = half ? low : _mm_loadu_si128((const void *)(values + 64 + 8 * i));
        v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(v[i], _mm256_set1_epi16(half ? 64 : 128)));
    }
    transpose8_words(v);
    for (size_t k = 0; k < 8; k++) {
        const __m256i x = narrow ? narrow_words(v[k]) : _mm256_permute4x64_epi64(v[k], 0xd8);
        _mm256_store_si256((void *)slab->x[place[k]][0], _mm256_permute4x64_epi64(x, 0x88));
        _mm256_store_si256((void *)slab->x[place[k]][1], _mm256_permute4x64_epi64(x, 0xdd));
    }
    for (int k = 0; k < 4; k++) {
        const __m128i both = _mm_slli_epi16(_mm_and_si128(_mm_srli_epi16(salient, k), _mm_set1_epi8(0x11)), 2);
        _mm256_store_si256((void *)slab->salient[place[k] / 2], _mm256_broadcastsi128_si256(both));
    }
    sum = _mm256_hadd_epi32(sum, sum);
    sum = _mm256_hadd_epi32(sum, sum);
    sum = _mm256_add_epi32(sum, _mm256_permute2x128_si256(sum, sum, 0x01));
    _mm256_store_si256((void *)slab->offset, sum);
}

static void prepare_words(const struct billm_weight *w, const int16_t *x, struct words *slab) {
    for (size_t col = 0; col < w->cols; col += WORD_COLS, slab++) {
        const size_t cols = w->cols - col;
        int16_t values[WORD_COLS] = {0};
        uint8_t salient[WORD_BYTES] = {0};
        if (cols >= WORD_COLS) {
            prepare_slab(x + col, w->salient + col / 8, w->narrow, 0, slab);
        } else {
            memcpy(values, x + col, cols * sizeof *x);
            memcpy(salient, w->salient + col / 8, w->stride - col / 8);
            prepare_slab(values, salient, w->narrow, ends_with_half(w), slab);
        }
    }
}

static void prepare(const struct billm_weight *w, const int16_t *x, void *prepared) {
    if (!w->sign)
        billm_avx2_prepare_table(w, x, prepared);
    else if (w->block < WORD_COLS)
        billm_prepare_binary(w, x, prepared);
    else
        prepare_words(w, x, prepared);
}

/* The four vectors of codes of a slab: two bits, sign and second, in the low half of a byte and in the high one. */
BILLM_INLINE void split_codes(__m256i sign, __m256i second, __m256i codes[4]) {
    const __m256i even = _mm256_set1_epi8(0x55), mask = _mm256_set1_epi8(0x33);
    const __m256i evens = _mm256_or_si256(_mm256_and_si256(sign, even),
                                          _mm256_andnot_si256(even, _mm256_slli_epi16(second, 1)));
    const __m256i odds = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(sign, 1), even),
                                         _mm256_andnot_si256(even, second));
    codes[0] = _mm256_and_si256(evens, mask);
    codes[1] = _mm256_and_si256(_mm256_srli_epi16(evens, 2), mask);
    codes[2] = _mm256_and_si256(odds, mask);
    codes[3] = _mm256_and_si256(_mm256_srli_epi16(odds, 2), mask);
}

BILLM_INLINE __m256i vector_at(const void *address) {
    return _mm256_load_si256(address);
}

/* The sums of a slab over narrow levels, spread over the lanes, of two vectors of rows: their work fills the gaps of each
 * other. `second_row`: 8 in bytes that take the table's upper half, or NULL. */
BILLM_INLINE void narrow_sums(const struct words *x, const __m256i sign[2], const __m256i second[2],
                              const __m256i table[2], const __m256i *second_row, __m256i out[2]) {
    __m256i codes[2][4], sums[2][2];
#pragma GCC unroll 2
    for (size_t i = 0; i < 2; i++) {
        split_codes(sign[i], second[i], codes[i]);
        sums[i][0] = sums[i][1] = _mm256_setzero_si256();
    }
#pragma GCC unroll 4
    for (size_t n = 0; n < 4; n++)
#pragma GCC unroll 2
        for (size_t i = 0; i < 2; i++) {
            __m256i low = _mm256_or_si256(codes[i][n], vector_at(x->salient[n])), high = _mm256_srli_epi16(low, 4);
            if (second_row) {
                low = _mm256_or_si256(low, *second_row);
                high = _mm256_or_si256(high, *second_row);
            }
            add_narrow(sums[i], _mm256_shuffle_epi8(table[i], low), x->x[2 * n]);
            add_narrow(sums[i], _mm256_shuffle_epi8(table[i], high), x->x[2 * n + 1]);
        }
    out[0] = narrow_total(sums[0]);
    out[1] = narrow_total(sums[1]);
}

/* The same over levels of nine bits, by tables of their low and of their high bytes. */
BILLM_INLINE __m256i wide_sums(const struct words *x, __m256i sign, __m256i second, __m256i low_table,
                               __m256i high_table) {
    __m256i codes[4], sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    split_codes(sign, second, codes);
#pragma GCC unroll 8
    for (size_t n = 0; n < 8; n++) {
        __m256i code = _mm256_or_si256(codes[n / 2], vector_at(x->salient[n / 2]));
        code = n % 2 ? _mm256_srli_epi16(code, 4) : code;
        __m256i low = _mm256_shuffle_epi8(low_table, code), high = _mm256_shuffle_epi8(high_table, code);
        sums[0] = dot(sums[0], _mm256_unpacklo_epi8(low, high), vector_at(x->x[n][0]));
        sums[1] = dot(sums[1], _mm256_unpackhi_epi8(low, high), vector_at(x->x[n][1]));
    }
    return _mm256_add_epi32(sums[0], sums[1]);
}

/* Where the first of eight rows begins, and how far apart they are: 0 for eight times the same. */
struct group {
    const uint8_t *sign, *second, *scales;
    size_t stride, scale_stride;
};

BILLM_INLINE struct group find_group(const struct billm_weight *w, size_t row, size_t step) {
    return (struct group){w->sign + row * w->stride, w->second + row * w->stride, w->scales + 4 * row * w->blocks,
                          step * w->stride, step * 4 * w->blocks};
}

/* The magnitudes of a block: row r in 32-bit lane r. */
BILLM_INLINE __m256i group_magnitudes(struct group group, size_t block) {
    int code[GROUP_ROWS];
#pragma GCC unroll 8
    for (size_t r = 0; r < GROUP_ROWS; r++)
        code[r] = (int)billm_load32(group.scales + r * group.scale_stride + 4 * block);
    return billm_magnitudes(
        _mm256_setr_epi32(code[0], code[1], code[2], code[3], code[4], code[5], code[6], code[7]));
}

/* The bytes of two rows, side by side: the tables of rows r and r + 4 from those of 2 * (r / 2) and the next one. */
BILLM_INLINE __m256i one_row_table(__m256i pair, size_t r) {
    return r % 2 ? _mm256_unpackhi_epi64(pair, pair) : pair;
}

/* Levels of magnitudes where the sign bit is 0: the salient ones change places, as second then says that signs agree. */
BILLM_INLINE __m256i of_minus_signs(__m256i magnitudes) {
    return _mm256_shuffle_epi8(
        magnitudes,
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 3, 2, 4, 5, 7, 6, 8, 9, 11, 10, 12, 13, 15, 14)));
}

/* 16 bytes of a row and of the row four further, side by side, or the `words` 32-bit words that are there. */
BILLM_INLINE __m256i load_two(const uint8_t *from, size_t stride, size_t words) {
    if (words < 4)
        return billm_load_pair(from, from + 4 * stride, words);
    __m128i low = _mm_loadu_si128((const void *)from), high = _mm_loadu_si128((const void *)(from + 4 * stride));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

/* 8 bytes, or with one word 4, of two rows and of the two four further. */
BILLM_INLINE __m256i load_four(const uint8_t *from, size_t stride, size_t words) {
    int64_t part[4];
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
        const uint8_t *row = from + (i % 2 + i / 2 * 4) * stride;
        part[i] = words == 2 ? (int64_t)billm_load64(row) : (int64_t)billm_load32(row);
    }
    return _mm256_setr_epi64x(part[0], part[1], part[2], part[3]);
}

/* Sums of eight rows over a slab, a row in each lane. */
BILLM_INLINE __m256i narrow_group(struct group group, size_t slab, size_t words, int half, __m256i magnitudes,
                                  const struct words *x) {
    const __m256i raise = _mm256_set1_epi8((char)128), offset = vector_at(x->offset);
    const __m256i plus = _mm256_xor_si256(magnitudes, raise), minus = _mm256_sub_epi8(raise, of_minus_signs(magnitudes));
    const __m256i pairs[2] = {_mm256_unpacklo_epi8(minus, plus), _mm256_unpackhi_epi8(minus, plus)};
    const uint8_t *sign = group.sign + WORD_BYTES * slab, *second = group.second + WORD_BYTES * slab;
    const size_t stride = group.stride;
    __m256i s[2], t[2], sums[4];
    if (half) {
        const __m256i second_row = _mm256_setr_epi64x(0, 0x0808080808080808, 0, 0x0808080808080808);
        for (size_t r = 0; r < 2; r++) {
            s[r] = load_four(sign + 2 * r * stride, stride, words);
            t[r] = load_four(second + 2 * r * stride, stride, words);
        }
        narrow_sums(x, s, t, pairs, &second_row, sums);
        return _mm256_sub_epi32(_mm256_hadd_epi32(sums[0], sums[1]), offset);
    }
#pragma GCC unroll 2
    for (size_t pair = 0; pair < 2; pair++) {
        const __m256i table[2] = {pairs[pair], _mm256_unpackhi_epi64(pairs[pair], pairs[pair])};
#pragma GCC unroll 2
        for (size_t r = 0; r < 2; r++, sign += stride, second += stride) {
            s[r] = load_two(sign, stride, words);
            t[r] = load_two(second, stride, words);
        }
        narrow_sums(x, s, t, table, NULL, sums + 2 * pair);
        __asm__("" : "+r"(x)); /* or activations are kept from row to row, on the stack for want of registers */
    }
    return _mm256_sub_epi32(
        _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3])), offset);
}

BILLM_INLINE __m256i wide_group(struct group group, size_t slab, size_t words, __m256i magnitudes,
                                const struct words *x) {
    const __m256i zero = _mm256_setzero_si256(), minus = _mm256_sub_epi8(zero, of_minus_signs(magnitudes));
    const __m256i minus_high = _mm256_andnot_si256(_mm256_cmpeq_epi8(minus, zero), _mm256_set1_epi8(-1));
    const __m256i low[2] = {_mm256_unpacklo_epi8(minus, magnitudes), _mm256_unpackhi_epi8(minus, magnitudes)};
    const __m256i high[2] = {_mm256_unpacklo_epi8(minus_high, zero), _mm256_unpackhi_epi8(minus_high, zero)};
    const uint8_t *sign = group.sign + WORD_BYTES * slab, *second = group.second + WORD_BYTES * slab;
    const size_t stride = group.stride;
    __m256i sums[4];
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; r++) {
        sums[r] = wide_sums(x, load_two(sign, stride, words), load_two(second, stride, words),
                            one_row_table(low[r / 2], r), one_row_table(high[r / 2], r));
        sign += stride;
        second += stride;
        __asm__("" : "+r"(x)); /* as above */
    }
    return _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
}

/* Fetch what a later group of rows has in a slab, where rows are too long for the processor to guess so. */
BILLM_INLINE void prefetch_group(const struct billm_weight *w, size_t row, size_t slab) {
    enum { SLAB_BYTES = GROUP_ROWS * WORD_BYTES, SCALE_BYTES = GROUP_ROWS * 4, SHORT = 128 };
    const size_t at = (row + 2 * GROUP_ROWS) * w->stride + slab * SLAB_BYTES;
    if (w->stride <= SHORT)
        return;
    for (size_t line = 0; line < SLAB_BYTES; line += 64) {
        _mm_prefetch((const char *)w->sign + at + line, _MM_HINT_T0);
        _mm_prefetch((const char *)w->second + at + line, _MM_HINT_T0);
    }
    _mm_prefetch((const char *)w->scales + (row + 2 * GROUP_ROWS) * 4 * w->blocks + slab * SCALE_BYTES, _MM_HINT_T0);
}

BILLM_INLINE void word_gemv(const struct billm_weight *w, const int narrow, const struct words *x, const float *x_scale,
                            size_t row, size_t end, float *acc) {
    const size_t slabs = word_slabs(w), slabs_per_block = w->block / WORD_COLS;
    const size_t whole = slabs - (size_t)ends_with_half(w);
    for (size_t rows; row < end; row += rows, acc += rows) {
        /* A short group begins earlier; where eight rows are too many, one is taken eight times. */
        const size_t first = end < GROUP_ROWS ? row : billm_min(row, end - GROUP_ROWS);
        const struct group group = find_group(w, first, end >= GROUP_ROWS);
        __m256 total = _mm256_setzero_ps();
        rows = end < GROUP_ROWS ? 1 : billm_min(GROUP_ROWS, end - row);
        for (size_t slab = 0, block = 0; block < w->blocks; block++) {
            const __m256i magnitudes = group_magnitudes(group, block);
            __m256i sum = _mm256_setzero_si256();
            for (size_t i = 0; i < slabs_per_block && slab < slabs; i++, slab++) {
                const size_t words = billm_min(4, w->stride / 4 - 4 * slab);
                prefetch_group(w, first, slab);
                sum = _mm256_add_epi32(sum, narrow ? narrow_group(group, slab, words, slab >= whole, magnitudes, x + slab)
                                                   : wide_group(group, slab, words, magnitudes, x + slab));
            }
            total = billm_step(total, x_scale[block], sum);
        }
        float result[GROUP_ROWS];
        _mm256_storeu_ps(result, total);
        memcpy(acc, result + (row - first), rows * sizeof *acc);
    }
}

static void binary_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                        size_t end, float *acc) {
    if (w->block < WORD_COLS)
        billm_avx2_binary_gemv_small(w, prepared, bits, x_scale, row, end, acc);
    else if (w->narrow) /* of 8 bits or 16, an activation is a word */
        word_gemv(w, 1, prepared, x_scale, row, end, acc);
    else
        word_gemv(w, 0, prepared, x_scale, row, end, acc);
}

/* ---- decoding, int8 rows: both sides widened to int16, which madd_epi16 multiplies and sums exactly ---- */

static inline __m256i widen(const int8_t *from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
}

/* The last columns, fewer than 16. */
static __m256i widen_start(const int8_t *from, size_t count) {
    int8_t values[16] = {0};
    memcpy(values, from, count);
    return widen(values);
}

/* The sums of a row over `blocks` blocks from column `col` on, spread over the lanes: block b's to sums[8 b]. `x` is padded
 * with zeros to a whole vector. */
BILLM_INLINE void int8_row(const struct billm_weight *w, const int8_t *values, const int16_t *x, size_t col,
                           size_t blocks, __m256i *sums) {
    const size_t whole = w->cols / 16 * 16;
    for (size_t b = 0; b < blocks; b++, sums += 8) {
        const size_t end = billm_min(col + w->block, w->cols), stop = billm_min(end, whole);
        __m256i sum = _mm256_setzero_si256();
        for (; col < stop; col += 16)
            sum = dot(sum, widen(values + col), _mm256_load_si256((const void *)(x + col)));
        if (col < end)
            sum = dot(sum, widen_start(values + col, end - col), _mm256_load_si256((const void *)(x + col)));
        *sums = sum;
        col = end;
    }
}

/* Eight rows, one after the other, so that the memory sees one stream, which is fetched two rows ahead. */
static void int8_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                      size_t end, float *acc) {
    enum { BLOCKS = 16, AHEAD = 2 };
    (void)bits;
    for (size_t rows; row < end; row += rows) {
        __m256 total = _mm256_setzero_ps();
        rows = billm_min(8, end - row);
        for (size_t block = 0; block < w->blocks; block += BLOCKS) {
            const size_t blocks = billm_min(BLOCKS, w->blocks - block), col = block * w->block;
            __m256i sums[BLOCKS][8];
            for (size_t r = 0; r < 8; r++) {
                const int8_t *values = w->values + (row + billm_min(r, rows - 1)) * w->stride;
                for (size_t j = col; j < billm_min(col + BLOCKS * w->block, w->cols); j += 64)
                    _mm_prefetch((const char *)values + AHEAD * w->stride + j, _MM_HINT_T0);
                int8_row(w, values, prepared, col, blocks, &sums[0][r]);
            }
            for (size_t b = 0; b < blocks; b++)
                total = billm_step(total, x_scale[block + b], billm_sum8(sums[b]));
        }
        float result[8];
        _mm256_storeu_ps(result, total);
        memcpy(acc, result, rows * sizeof *acc);
        acc += rows;
    }
}

/* ---- decoding, 4-bit rows: codes are unsigned bytes, activations two signed digits ----
 *
 * Eight rows at a time, two in a vector. The offset of the codes is taken off the sum of a block. */

/* sum(code * x) of a unit of two rows, spread over the lanes of each. */
BILLM_INLINE __m256i nibble_sums(const uint8_t *from, size_t stride, const struct billm_nibble_input *x) {
    const __m256i low_half = _mm256_set1_epi8(15), bytes = load_two(from, stride, 4);
    const __m256i first = _mm256_and_si256(bytes, low_half);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half);
    return _mm256_add_epi32(nibble_products(first, last, x->low),
                            _mm256_slli_epi32(nibble_products(first, last, x->high), 8));
}

static void int4_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                      size_t end, float *acc) {
    const struct billm_nibble_input *x = prepared;
    (void)bits;
    for (size_t rows; row < end; row += rows, acc += rows) {
        /* As in word_gemv. */
        const size_t first = end < GROUP_ROWS ? row : billm_min(row, end - GROUP_ROWS);
        const size_t stride = end < GROUP_ROWS ? 0 : w->stride;
        const uint8_t *from = w->nibbles + first * w->stride;
        __m256 total = _mm256_setzero_ps();
        rows = end < GROUP_ROWS ? 1 : billm_min(GROUP_ROWS, end - row);
        for (size_t b = 0; b < w->blocks; b++, from += BILLM_UNIT / 2) {
            const int8_t *steps = w->steps + b * w->rows + first;
            const char *next = (const char *)w->nibbles + (first + 2 * GROUP_ROWS) * w->stride + 128 * b;
            __m256i sums[4], step;
            _mm_prefetch(next, _MM_HINT_T0);
            _mm_prefetch(next + 64, _MM_HINT_T0);
#pragma GCC unroll 4
            for (size_t r = 0; r < 4; r++)
                sums[r] = nibble_sums(from + r * stride, stride, x + b);
            __m256i sum = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
            sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(x[b].offset));
            step = stride ? _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)steps)) : _mm256_set1_epi32(*steps);
            total = billm_step(total, x_scale[b], _mm256_mullo_epi32(sum, step));
        }
        float result[GROUP_ROWS];
        _mm256_storeu_ps(result, total);
        memcpy(acc, result + (row - first), rows * sizeof *acc);
    }
}
