// What lies between the Linears of a decoder layer: norms, rotary embedding and cache, activation functions.
#include "common.cuh"

// s = x + delta (delta may be null), out = norm(s); x = s where `keep`. A thread block a token. bias null: RMSNorm, else
// LayerNorm. out may be x.
__global__ void __launch_bounds__(256) normalize(
    float* x, const float* delta, const float* weight, const float* bias, float* out, int width, float eps, int keep
) {
    DYNAMIC_SHARED(memory);
    float* scratch = reinterpret_cast<float*>(memory);
    size_t start = size_t(blockIdx.x) * width;
    float* sums = (keep ? x : out) + start; // each thread reads only what it wrote itself
    float total = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float value = x[start + i] + (delta ? delta[start + i] : 0.0f);
        sums[i] = value;
        total += value;
    }
    float mean = bias ? block_sum(total, scratch) / width : 0.0f;
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (sums[i] - mean) * (sums[i] - mean);
    float factor = rsqrtf(block_sum(squares, scratch) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        out[start + i] = (sums[i] - mean) * factor * weight[i] + (bias ? bias[i] : 0.0f);
    }
}

// binary16 for the cache: what is beyond its range becomes the largest number, not infinity.
__device__ __forceinline__ u16 clamped_half(float value) {
    return float_to_half(fminf(fmaxf(value, -65504.0f), 65504.0f));
}

// qkv [tokens, (heads + 2 kv_heads) * width]: query heads are normed (q_norm may be null) and turned where they are (cos
// and sin [positions, width / 2], may be null), keys likewise on their way into the cache, values as they are: as binary16
// (u16), or as whole numbers up to 127 (i8) times a scale. Of several texts, each has `per_text` tokens and a cache. A warp
// a head; blockIdx.y is the token.
template <class Element>
__global__ void rotate_and_store(
    float* qkv, const float* q_norm, const float* k_norm, const float* cos, const float* sin, const Cache* caches,
    int per_text, int heads, int kv_heads, int width, int padded, float eps
) {
    int lane = threadIdx.x % WARP, head = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, token = blockIdx.y;
    int all = heads + 2 * kv_heads;
    if (head >= all) return;
    float* from = qkv + (size_t(token) * all + head) * width;
    bool is_query = head < heads, is_value = head >= heads + kv_heads;
    Cache cache = caches[token / per_text];
    int position = *cache.past + token % per_text, half = width / 2;
    const float* weight = is_query ? q_norm : is_value ? nullptr : k_norm;
    float factor = 1;
    if (weight) {
        float squares = 0;
        for (int i = lane; i < width; i += WARP) squares += from[i] * from[i];
        factor = rsqrtf(warp_sum(squares) / width + eps);
    }
    auto value = [&](int i) { return weight ? from[i] * factor * weight[i] : from[i]; };
    auto turn = [&](auto use) { // use(i, element i) of those that the lane takes care of
        if (cos && !is_value) {
            for (int i = lane; i < half; i += WARP) {
                float c = cos[size_t(position) * half + i], s = sin[size_t(position) * half + i];
                float first = value(i), second = value(i + half);
                use(i, first * c - second * s);
                use(i + half, second * c + first * s);
            }
        } else {
            for (int i = lane; i < width; i += WARP) use(i, value(i));
        }
    };
    if (is_query) {
        turn([&](int i, float number) { from[i] = number; });
        return;
    }
    size_t row = size_t(is_value ? head - heads - kv_heads : head - heads) * cache.capacity + position;
    Element* cached = static_cast<Element*>(is_value ? cache.values : cache.keys) + row * padded;
    if constexpr (sizeof(Element) == 2) {
        turn([&](int i, float number) { cached[i] = clamped_half(number); });
    } else {
        float largest = 0;
        turn([&](int, float number) { largest = fmaxf(largest, fabsf(number)); });
        float scale = warp_max(largest) * (1.0f / 127);
        // A head of zeros keeps scale 0 and codes 0: dividing by the smallest float instead of 0 sees to that.
        float by = fmaxf(scale, 1.17549435e-38f);
        turn([&](int i, float number) { cached[i] = Element(fminf(fmaxf(rintf(number / by), -127.0f), 127.0f)); });
        if (lane == 0) (is_value ? cache.value_scale : cache.key_scale)[row] = scale;
    }
}

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

__device__ __forceinline__ float activation(float x, int function) {
    if (function == SILU) return x / (1 + expf(-x));
    if (function == GELU) return 0.5f * x * (1 + erff(x * 0.70710678f));
    if (function == GELU_TANH) return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    return fmaxf(x, 0.0f);
}

// out [tokens, width] = activation(gate) * up of both [tokens, 2 width], gate first; not `gated`: activation(both), both
// [tokens, width].
__global__ void activate(const float* both, float* out, int tokens, int width, int function, int gated) {
    size_t index = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= size_t(tokens) * width) return;
    size_t token = index / width, column = index % width;
    const float* row = both + token * width * (gated ? 2 : 1);
    out[index] = activation(row[column], function) * (gated ? row[width + column] : 1.0f);
}

// x += y, elementwise.
__global__ void add(float* x, const float* y, u64 count) {
    u64 index = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index < count) x[index] += y[index];
}
