/* Plain C: runs everywhere, and says in the plainest way what every other file must compute. */
#include "decoder.h"

/* Write the levels of columns col .. col + count (within one block) of a row; col is a multiple of 32. */
static void decode_block(const struct billm_weight *w, size_t row, size_t col, size_t count, int16_t *out) {
    const uint8_t *a = w->scales + 4 * (row * w->blocks + col / w->block);
    int differ = a[2] > a[3] ? a[2] - a[3] : 0, agree = a[2] + a[3] > 255 ? 255 : a[2] + a[3];
    /* Index: 4 salient + 2 second + sign. */
    const int level[8] = {-a[0], a[0], -a[1], a[1], -agree, differ, -differ, agree};
    const uint8_t *sign = w->sign + row * w->stride + col / 8;
    const uint8_t *second = w->second + row * w->stride + col / 8;
    const uint8_t *salient = w->salient + col / 8;
    for (size_t j = 0; j < count; j++) {
        unsigned index = (unsigned)(salient[j / 8] >> j % 8 & 1) << 2 | (unsigned)(second[j / 8] >> j % 8 & 1) << 1 |
                         (unsigned)(sign[j / 8] >> j % 8 & 1);
        out[j] = (int16_t)level[index];
    }
}

static void quantize(const float *x, const float *col_scale, size_t cols, size_t block, int bits, int16_t *values,
                     float *scales) {
    billm_quantize_token(x, col_scale, cols, block, bits, values, scales);
}

static size_t prepared_bytes(const struct billm_weight *w) {
    return w->cols * sizeof(int16_t);
}

static void prepare(const struct billm_weight *w, const int16_t *x, void *prepared) {
    memcpy(prepared, x, w->cols * sizeof *x);
}

static void binary_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale,
                                size_t row, size_t end, float *acc) {
    const int16_t *x = prepared;
    (void)bits;
    for (; row < end; row++) {
        float total = 0.0f;
        for (size_t b = 0, col = 0; col < w->cols; b++, col += w->block) {
            int16_t level[BILLM_MAX_BLOCK];
            size_t n = billm_min(w->block, w->cols - col);
            decode_block(w, row, col, n, level);
            int32_t sum = 0;
            for (size_t j = 0; j < n; j++)
                sum += level[j] * x[col + j];
            total += x_scale[b] * (float)sum;
        }
        *acc++ = total;
    }
}

static void int8_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale,
                              size_t row, size_t end, float *acc) {
    const int16_t *x = prepared;
    (void)bits;
    for (; row < end; row++) {
        const int8_t *values = w->values + row * w->stride;
        float total = 0.0f;
        for (size_t b = 0, col = 0; col < w->cols; b++, col += w->block) {
            size_t stop = billm_min(col + w->block, w->cols);
            int32_t sum = 0;
            for (size_t j = col; j < stop; j++)
                sum += values[j] * x[j];
            total += x_scale[b] * (float)sum;
        }
        *acc++ = total;
    }
}

/* Write the levels of the unit that begins with column col. */
static void decode_nibbles(const struct billm_weight *w, size_t row, size_t col, int16_t out[BILLM_UNIT]) {
    const uint8_t *nibbles = w->nibbles + row * w->stride + col / 2;
    const int step = w->steps[col / BILLM_UNIT * w->rows + row];
    for (size_t i = 0; i < BILLM_UNIT / 2; i++) {
        out[i] = (int16_t)(((nibbles[i] & 15) - 8) * step);
        out[BILLM_UNIT / 2 + i] = (int16_t)(((nibbles[i] >> 4) - 8) * step);
    }
}

static void int4_gemv(const struct billm_weight *w, const void *prepared, int bits, const float *x_scale, size_t row,
                      size_t end, float *acc) {
    const int16_t *x = prepared;
    (void)bits;
    for (; row < end; row++) {
        float total = 0.0f;
        for (size_t b = 0, col = 0; col < w->cols; b++, col += BILLM_UNIT) {
            int16_t level[BILLM_UNIT];
            int32_t sum = 0;
            decode_nibbles(w, row, col, level);
            for (size_t j = 0; j < billm_min(BILLM_UNIT, w->cols - col); j++)
                sum += level[j] * x[col + j];
            total += x_scale[b] * (float)sum;
        }
        *acc++ = total;
    }
}

/* A tile is int16 [TILE_ROWS][BILLM_TILE_COLS], a packed token int16 [cols]. */
enum { TILE_ROWS = 4 };

static void binary_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    int16_t *out = tile;
    memset(out, 0, TILE_ROWS * BILLM_TILE_COLS * sizeof *out);
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < cols; j += w->block)
            decode_block(w, row + r, col + j, billm_min(w->block, cols - j), out + r * BILLM_TILE_COLS + j);
}

static void int8_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    int16_t *out = tile;
    memset(out, 0, TILE_ROWS * BILLM_TILE_COLS * sizeof *out);
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < cols; j++)
            out[r * BILLM_TILE_COLS + j] = w->values[(row + r) * w->stride + col + j];
}

static void int4_tile(const struct billm_weight *w, size_t row, size_t rows, size_t col, size_t cols, void *tile) {
    int16_t *out = tile;
    memset(out, 0, TILE_ROWS * BILLM_TILE_COLS * sizeof *out);
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < cols; j += BILLM_UNIT)
            decode_nibbles(w, row + r, col + j, out + r * BILLM_TILE_COLS + j);
}

static void pack(const int16_t *x, size_t cols, void *panel, size_t stride, size_t token) {
    void *packed = (uint8_t *)panel + token * stride;
    memset(packed, 0, billm_round_up(cols, BILLM_UNIT) * sizeof *x);
    memcpy(packed, x, cols * sizeof *x);
}

static void multiply(const struct billm_weight *w, const void *tile, size_t col, size_t cols, const void *panel,
                     size_t stride, int bits, const float *x_scale, size_t scale_stride, size_t tokens, float *acc) {
    const uint8_t *x = (const uint8_t *)panel + col * sizeof(int16_t);
    (void)bits;
    for (size_t t = 0; t < tokens; t++, acc += TILE_ROWS) {
        const int16_t *activation = (const void *)(x + t * stride);
        for (size_t r = 0; r < TILE_ROWS; r++) {
            const int16_t *level = (const int16_t *)tile + r * BILLM_TILE_COLS;
            const float *scale = x_scale + t * scale_stride;
            for (size_t at = 0; at < cols; at += w->block) {
                size_t stop = billm_min(at + w->block, cols);
                int32_t sum = 0;
                for (size_t j = at; j < stop; j++)
                    sum += level[j] * activation[j];
                acc[r] += *scale++ * (float)sum;
            }
        }
    }
}

size_t billm_sixteen_rows(size_t cols) {
    (void)cols;
    return 16;
}

const struct billm_isa billm_portable = {
    .name = "portable",
    .tile_rows = TILE_ROWS,
    .token_step = 1,
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
    .floats = &billm_float_portable,
};
