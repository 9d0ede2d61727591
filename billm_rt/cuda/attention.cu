// Softmax attention over the cache, float32 but for keys and values [kv_heads, capacity, padded], padded being the head's
// width rounded up to 8, the rest zeros. They are binary16 (u16), or whole numbers (i8) with a scale each [kv_heads,
// capacity], which goes to the scores and to the weights. A query at position p sees keys max(0, p - window + 1) to p.
// Of several texts, each has `per_text` tokens and a cache.
#include "common.cuh"

__device__ __forceinline__ int first_key(int position, int window) {
    return window > 0 ? max(0, position - window + 1) : 0;
}

__device__ __forceinline__ float as_float(u16 element) { return half_to_float(element); }
__device__ __forceinline__ float as_float(i8 element) { return float(element); }

template <int COUNT, class Element> __device__ __forceinline__ void load(float (&out)[COUNT], const Element* from) {
    struct alignas(COUNT * sizeof(Element)) Vector {
        Element values[COUNT];
    } vector = *reinterpret_cast<const Vector*>(from);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) out[i] = as_float(vector.values[i]);
}

// Two neighbours as a pair of binary16, which holds every i8.
__device__ __forceinline__ u32 load_pair(const u16* from) { return *reinterpret_cast<const u32*>(from); }
__device__ __forceinline__ u32 load_pair(const i8* from) {
    return float_to_half(float(from[0])) | u32(float_to_half(float(from[1]))) << 16;
}

// A softmax under way: the largest score, the sum of exponentials relative to it, the weighted sum of values.
template <int COUNT> struct Running {
    float largest = -infinity(), total = 0, mixed[COUNT] = {};

    // What the sums so far must be multiplied by now that `score` may be the largest.
    __device__ __forceinline__ float rescale(float score) {
        float before = largest;
        largest = fmaxf(largest, score);
        return before == largest ? 1.0f : expf(before - largest);
    }
    __device__ __forceinline__ void merge(const Running& other) {
        if (other.total == 0) return;
        float ours = rescale(other.largest), theirs = expf(other.largest - largest);
        total = total * ours + other.total * theirs;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) mixed[i] = mixed[i] * ours + other.mixed[i] * theirs;
    }
};

// Few queries: the context is split over blocks (blockIdx.x) and warps; a lane holds COUNT elements of a head, a warp
// QUERIES query heads of one group, which share each key. blockIdx.y: group of QUERIES heads, blockIdx.z: token.
// partial [tokens, heads, splits, padded + 2]: mixed values, largest, total; `combine` makes them one.
template <int COUNT, int QUERIES, class Element>
__global__ void __launch_bounds__(128) attend_few(
    const float* query, const Cache* caches, float* partial, int per_text, int heads, int kv_heads, int width,
    int padded, int query_stride, int window
) {
    constexpr bool SCALED = sizeof(Element) == 1;
    constexpr int KEYS = 4; // at a time, so that their sums across lanes overlap
    DYNAMIC_SHARED(memory);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP, at = lane * COUNT;
    int per_kv = heads / kv_heads, sets = (per_kv + QUERIES - 1) / QUERIES;
    int kv_head = blockIdx.y / sets, in_group = blockIdx.y % sets * QUERIES, token = blockIdx.z;
    Cache cache = caches[token / per_text];
    int position = *cache.past + token % per_text, begin = first_key(position, window), seen = position + 1 - begin;
    int each = (seen + gridDim.x - 1) / gridDim.x;
    int first = begin + blockIdx.x * each, last = min(first + each, position + 1);
    size_t of_head = size_t(kv_head) * cache.capacity;
    const Element* our_keys = static_cast<const Element*>(cache.keys) + of_head * padded;
    const Element* our_values = static_cast<const Element*>(cache.values) + of_head * padded;
    float q[QUERIES][COUNT];
    float root = rsqrtf(float(width));
    for (int i = 0; i < QUERIES; ++i) {
        int head = kv_head * per_kv + min(in_group + i, per_kv - 1);
        const float* from = query + size_t(token) * query_stride + size_t(head) * width;
        for (int j = 0; j < COUNT; ++j) q[i][j] = at + j < width ? from[at + j] * root : 0.0f;
    }
    Running<COUNT> running[QUERIES];
    for (int key = first + warp * KEYS; key < last; key += warps * KEYS) {
        float score[KEYS][QUERIES], value[KEYS][COUNT];
#pragma unroll
        for (int k = 0; k < KEYS; ++k) {
            int at_key = min(key + k, last - 1);
            size_t row = size_t(at_key) * padded;
            float element[COUNT] = {};
            for (int j = 0; j < COUNT; ++j) value[k][j] = 0;
            if (at < padded) {
                load(element, our_keys + row + at);
                load(value[k], our_values + row + at);
            }
            float scale = 1;
            if constexpr (SCALED) {
                scale = cache.key_scale[of_head + at_key];
                for (int j = 0; j < COUNT; ++j) value[k][j] *= cache.value_scale[of_head + at_key];
            }
            for (int i = 0; i < QUERIES; ++i) {
                float sum = 0;
                for (int j = 0; j < COUNT; ++j) sum += q[i][j] * element[j];
                sum = warp_sum(sum) * scale;
                score[k][i] = key + k < last ? sum : -infinity();
            }
        }
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
            Running<COUNT>& r = running[i];
            float highest = score[0][i];
            for (int k = 1; k < KEYS; ++k) highest = fmaxf(highest, score[k][i]);
            float factor = r.rescale(highest);
            r.total *= factor;
            for (int j = 0; j < COUNT; ++j) r.mixed[j] *= factor;
            for (int k = 0; k < KEYS; ++k) {
                float weight = expf(score[k][i] - r.largest);
                r.total += weight;
                for (int j = 0; j < COUNT; ++j) r.mixed[j] += weight * value[k][j];
            }
        }
    }
    auto* shared = reinterpret_cast<Running<COUNT>*>(memory); // [warps, QUERIES, lanes]
    for (int i = 0; i < QUERIES; ++i) shared[(warp * QUERIES + i) * WARP + lane] = running[i];
    __syncthreads();
    for (int i = warp; i < QUERIES && in_group + i < per_kv; i += warps) {
        Running<COUNT> sum = shared[i * WARP + lane];
        for (int other = 1; other < warps; ++other) sum.merge(shared[(other * QUERIES + i) * WARP + lane]);
        int head = kv_head * per_kv + in_group + i;
        float* out = partial + ((size_t(token) * heads + head) * gridDim.x + blockIdx.x) * (padded + 2);
        for (int j = 0; j < COUNT; ++j) {
            if (at + j < padded) out[at + j] = sum.mixed[j];
        }
        if (lane == 0) out[padded] = sum.largest, out[padded + 1] = sum.total;
    }
}

// out [tokens, heads * width] from the partial sums; blockIdx.x: head, blockIdx.y: token, a thread an element.
__global__ void combine(const float* partial, float* out, int heads, int width, int padded, int splits) {
    int head = blockIdx.x, token = blockIdx.y;
    const float* parts = partial + (size_t(token) * heads + head) * splits * (padded + 2);
    float largest = -infinity();
    for (int i = 0; i < splits; ++i) largest = fmaxf(largest, parts[i * (padded + 2) + padded]);
    for (int element = threadIdx.x; element < width; element += blockDim.x) {
        float total = 0, mixed = 0;
        for (int i = 0; i < splits; ++i) {
            const float* part = parts + i * (padded + 2);
            if (part[padded + 1] == 0) continue; // a split that saw no key
            float factor = expf(part[padded] - largest);
            total += part[padded + 1] * factor;
            mixed += part[element] * factor;
        }
        out[(size_t(token) * heads + head) * width + element] = mixed / total;
    }
}

// Many queries of one text: a block takes 4 warps * 4 consecutive tokens of one head (blockIdx.y) through tiles of 32 keys in shared
// memory. For scores a lane is a key, for the values it holds COUNT pairs of elements.
template <int COUNT, class Element>
__global__ void __launch_bounds__(128) attend_many(
    const float* query, const Cache* caches, float* out, int tokens, int heads, int kv_heads, int width, int padded,
    int query_stride, int window
) {
    constexpr bool SCALED = sizeof(Element) == 1;
    constexpr int QUERIES = 4, TILE = WARP;
    DYNAMIC_SHARED(memory);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP, pairs = padded / 2;
    int head = blockIdx.y, kv_head = head / (heads / kv_heads), of_block = warps * QUERIES;
    int first_token = blockIdx.x * of_block, mine = first_token + warp * QUERIES;
    const Cache& cache = *caches; // read anew for every tile: in registers it would push others out
    int past = *cache.past;
    size_t of_head = size_t(kv_head) * cache.capacity;
    float* q = reinterpret_cast<float*>(memory);             // [of_block, padded]
    float* weights = q + of_block * padded;                  // [warps, TILE, QUERIES]
    u32* tile = reinterpret_cast<u32*>(weights + of_block * TILE); // [TILE, pairs + 1]: keys, then values
    int stride = pairs | 1;                                  // odd: 32 keys lie in 32 banks
    float root = rsqrtf(float(width));
    for (int i = threadIdx.x; i < of_block * padded; i += blockDim.x) {
        int token = min(first_token + i / padded, tokens - 1), element = i % padded;
        const float* from = query + size_t(token) * query_stride + size_t(head) * width;
        q[i] = element < width ? from[element] * root : 0.0f;
    }
    auto load_tile = [&](const void* from, int key, int end) {
        __syncthreads(); // what was there has been read
        for (int i = threadIdx.x; i < TILE * pairs; i += blockDim.x) {
            size_t row = of_head + min(key + i / pairs, end - 1);
            tile[i / pairs * stride + i % pairs] =
                load_pair(static_cast<const Element*>(from) + row * padded + 2 * (i % pairs));
        }
        __syncthreads();
    };
    Running<2 * COUNT> running[QUERIES];
    int begin = first_key(past + first_token, window), end = past + min(first_token + of_block, tokens);
    for (int key = begin; key < end; key += TILE) {
        load_tile(cache.keys, key, end);
        float score[QUERIES] = {};
        for (int pair = 0; pair < pairs; ++pair) {
            u32 both = tile[lane * stride + pair];
            float low = half_to_float(u16(both)), high = half_to_float(u16(both >> 16));
#pragma unroll
            for (int i = 0; i < QUERIES; ++i) {
                float2 x = *reinterpret_cast<const float2*>(q + (warp * QUERIES + i) * padded + 2 * pair);
                score[i] += x.x * low + x.y * high;
            }
        }
        float factor[QUERIES], of_value = 1;
        if constexpr (SCALED) {
            size_t of_key = of_head + min(key + lane, end - 1);
            of_value = cache.value_scale[of_key];
            for (int i = 0; i < QUERIES; ++i) score[i] *= cache.key_scale[of_key];
        }
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
            int position = past + mine + i, at = key + lane;
            bool seen = at < end && at <= position && at >= first_key(position, window);
            float highest = warp_max(seen ? score[i] : -infinity());
            factor[i] = running[i].rescale(highest);
            float weight = seen ? expf(score[i] - running[i].largest) : 0.0f;
            running[i].total = running[i].total * factor[i] + warp_sum(weight);
            weights[(warp * TILE + lane) * QUERIES + i] = weight * of_value;
        }
        load_tile(cache.values, key, end); // its barriers show the weights to the warp as well
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
            for (int j = 0; j < 2 * COUNT; ++j) running[i].mixed[j] *= factor[i];
        }
        for (int k = 0; k < TILE; ++k) {
            float4 weight = *reinterpret_cast<const float4*>(weights + (warp * TILE + k) * QUERIES);
#pragma unroll
            for (int j = 0; j < COUNT; ++j) {
                int pair = lane + WARP * j;
                u32 both = pair < pairs ? tile[k * stride + pair] : 0;
                float low = half_to_float(u16(both)), high = half_to_float(u16(both >> 16));
                running[0].mixed[2 * j] += weight.x * low, running[0].mixed[2 * j + 1] += weight.x * high;
                running[1].mixed[2 * j] += weight.y * low, running[1].mixed[2 * j + 1] += weight.y * high;
                running[2].mixed[2 * j] += weight.z * low, running[2].mixed[2 * j + 1] += weight.z * high;
                running[3].mixed[2 * j] += weight.w * low, running[3].mixed[2 * j + 1] += weight.w * high;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < QUERIES; ++i) {
        if (mine + i >= tokens) continue;
        float* to = out + (size_t(mine + i) * heads + head) * width;
        for (int j = 0; j < COUNT; ++j) {
            int element = 2 * (lane + WARP * j);
            if (element < width) to[element] = running[i].mixed[2 * j] / running[i].total;
            if (element + 1 < width) to[element + 1] = running[i].mixed[2 * j + 1] / running[i].total;
        }
    }
}
