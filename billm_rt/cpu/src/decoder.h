/* The decoder layers: what is float32 in them, and the loop around the products.
 *
 * Results do not depend on the number of threads, nor on how a text is cut into calls: every sum has one order, that of a
 * single token read alone. Instruction sets differ in the last bits, because only some of them multiply and add at once.
 */
#ifndef BILLM_DECODER_H
#define BILLM_DECODER_H

#include "kernels.h"

enum {
    BILLM_KEY_GROUP = 16,  /* keys that lie interleaved in the cache: [capacity / 16, width, 16] */
    BILLM_MAX_WIDTH = 256, /* widest head: what an attention task keeps on its stack grows with it */
    BILLM_QUERY_ROWS = 32  /* (token, head) pairs of one attention task, all reading the same keys */
};

enum billm_activation { BILLM_SILU, BILLM_GELU, BILLM_GELU_TANH, BILLM_RELU };

/* Keys and values of one layer: int8 or int16, with a float32 scale per token and head. Capacity is a multiple of
 * BILLM_KEY_GROUP. */
struct billm_cache {
    void *keys;   /* [kv_heads, capacity / 16, width, 16] */
    void *values; /* [kv_heads, capacity, width] */
    float *key_scale, *value_scale; /* [kv_heads, capacity] */
    size_t capacity;
    int bits; /* of an element: 8 or 16 */
};

/* Where element `place` of the keys or the values lies. */
static inline void *billm_cache_element(const struct billm_cache *cache, void *base, size_t place) {
    return (char *)base + place * (size_t)(cache->bits / 8);
}

struct billm_attention {
    const float *query; /* [tokens, heads, width], already divided by sqrt(width) */
    float *out;         /* [tokens, heads, width] */
    const struct billm_cache *cache;
    size_t tokens, heads, kv_heads, width;
    size_t past;   /* position of the first query */
    size_t window; /* a query sees itself and the window - 1 tokens before it; 0: all of them */
};

/* The float32 operations, compiled once per instruction set from float_ops.h. */
struct billm_float_ops {
    /* out [n] = RMSNorm (bias NULL) or LayerNorm of x [n]; out may be x. */
    void (*norm)(const float *x, const float *weight, const float *bias, float eps, size_t n, float *out);
    /* Turn one head [2 * half] in place by cos, sin [half], and multiply it by `factor`. */
    void (*rotate)(float *x, const float *cos, const float *sin, size_t half, float factor);
    /* gate [n] = function(gate) (* up, unless NULL). */
    void (*activate)(float *gate, const float *up, size_t n, enum billm_activation function);
    /* x [n] to integers of `bits` bits, elements of `to` being `stride` apart; returns the scale. */
    float (*store)(const float *x, size_t n, int bits, void *to, size_t stride);
    /* Queries `row` .. `row` + `rows` (at most BILLM_QUERY_ROWS) of one key and value head; query r is head
     * r % (heads / kv_heads) of the group, of token r / (heads / kv_heads). */
    void (*attend)(const struct billm_attention *a, size_t kv_head, size_t row, size_t rows);
};

extern const struct billm_float_ops billm_float_portable;
#if defined(__x86_64__)
extern const struct billm_float_ops billm_float_avx2, billm_float_avx512;
#elif defined(__aarch64__)
extern const struct billm_float_ops billm_float_neon;
#endif

/* Linears that read one input. Those of an `input` share the quantized activations. */
struct billm_input {
    size_t block;
    const float *col_scale; /* [cols] or NULL */
    size_t count;
    struct billm_product products[3]; /* weight and epilogue; `out` is set for each run */
    size_t place[3];                  /* which of the group's outputs: q, k, v or gate, up */
};

struct billm_group {
    size_t count;
    struct billm_input inputs[3];
};

struct billm_norm {
    const float *weight, *bias; /* [hidden]; bias NULL: RMSNorm */
};

struct billm_layer {
    struct billm_norm attn_norm, mlp_norm;
    const float *q_norm, *k_norm; /* [width] or NULL */
    struct billm_group qkv, o, up, down;
};

/* What makes logits of the last layer's output: a norm (weight NULL: none) and the table of 4 or 8 bits. */
struct billm_head {
    struct billm_norm norm;
    struct billm_weight table;
    struct billm_epilogue epilogue;
};

struct billm_decoder {
    size_t hidden, intermediate, heads, kv_heads, width, window;
    float norm_eps;
    int post_norm; /* x = norm(x + f(x)) instead of x + f(norm(x)) */
    int gated;
    int activation_bits;
    enum billm_activation activation;
    size_t layer_count;
    struct billm_layer *layers;
    struct billm_head head; /* rows of the table 0: none */
    void *scratch; /* grows to what the longest run needs */
    size_t scratch_size;
};

/* Where tokens are read: all behind one text, or one behind each of several, `count` being as many as there are tokens. */
struct billm_texts {
    size_t count;
    const size_t *starts;             /* [count] positions of the first token of each */
    const struct billm_cache *caches; /* [layers, count], with room for what comes */
};

/* Run layers first .. first + count on x [tokens, hidden] in place; the caches are those of the layers from `first` on.
 * cos, sin [tokens, width / 2], or NULL where positions are not rotary.
 * logits [tokens, rows of the table] of the result, or NULL. Takes the pool's turn. Returns -1 when memory runs out. */
int billm_decode(struct billm_decoder *decoder, float *x, size_t tokens, struct billm_texts texts, const float *cos,
                 const float *sin, size_t first, size_t count, float *logits);

/* Tell `each` of every weight of the layers first .. first + count, group by group (`group` counts them), until it returns
 * something else than 0; returns -1 then. */
int billm_each_weight(const struct billm_decoder *decoder, size_t first, size_t count,
                      int (*each)(void *context, const struct billm_weight *weight, size_t group), void *context);

/* What the weights take that were arranged (billm_arrange_in_turn). Takes the pool's turn. */
size_t billm_copied_bytes(const struct billm_decoder *decoder);

#endif
