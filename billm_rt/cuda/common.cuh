// Types and sums that all kernels share. Words as in format/SPEC.md: rows, cols, block, plane, salient.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#include "intrinsics.cuh"

constexpr int WARP = 32;

// How activations lie in memory; the numbers are those of `Dtype` in launch.py.
enum Dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

__device__ __forceinline__ float load_as_float(const void* base, size_t index, int dtype) {
    if (dtype == FLOAT32) return static_cast<const float*>(base)[index];
    u16 bits = static_cast<const u16*>(base)[index];
    return dtype == FLOAT16 ? half_to_float(bits) : __uint_as_float(u32(bits) << 16);
}

__device__ __forceinline__ void store_float(void* base, size_t index, int dtype, float value) {
    if (dtype == FLOAT32) {
        static_cast<float*>(base)[index] = value;
    } else if (dtype == FLOAT16) {
        static_cast<u16*>(base)[index] = float_to_half(value);
    } else {
        u32 bits = __float_as_uint(value);
        // Round to nearest, ties to even; a NaN stays one (rounding could carry its payload into an infinity).
        bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        static_cast<u16*>(base)[index] = u16(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
}

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ float warp_sum(float value) {
    for (int lane = WARP / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(ALL_LANES, value, lane);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (int lane = WARP / 2; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, lane));
    return value;
}

// The power of two that brings `largest` to [2^7, 2^8), and its inverse: with it a binary16 neither overflows nor loses
// the digits of what is much smaller. 1 for 0.
struct Scaling {
    float scale, undo;
};
__device__ __forceinline__ Scaling scaling(float largest) {
    int exponent = int(__float_as_uint(largest) >> 23) - 127;
    int shift = largest > 0 ? min(7 - exponent, 126) : 0;
    return {__uint_as_float(u32(shift + 127) << 23), __uint_as_float(u32(127 - shift) << 23)};
}

// The sum over all threads of the block; `scratch` holds a float per warp and may be used again after the call.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    int warps = blockDim.x / WARP;
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    value = 0;
    for (int warp = 0; warp < warps; ++warp) value += scratch[warp];
    return value;
}

// A binarized Linear in device memory, as `LINEAR` in launch.py lays it out.
struct Linear {
    const u32* sign;      // [rows, row_words], 32 columns a word
    const u32* second;    // [rows, row_words]
    const u32* salient;   // [row_words]
    const u32* scales;    // [rows, num_blocks]: alpha_c, alpha_s, alpha_o, alpha_r, lowest byte first
    const u16* row_scale; // [rows], binary16
    const u16* col_scale; // [cols], binary16, or null
    const float* bias;    // [rows] or null
    int rows, cols;
    int first_row; // of this Linear in the output that its group shares
    int first_cta, ctas; // the thread blocks that work on it
    int padding;
};

// The keys and values that one layer holds of one text, as `CACHE` in launch.py lays it out: [kv_heads, capacity, padded]
// of the kernel's Element, and the scale of each, float [kv_heads, capacity], where that is i8.
struct Cache {
    void *keys, *values;
    float *key_scale, *value_scale; // null for binary16
    const int* past;                // how many tokens the text has, those of this step apart
    int capacity;                   // tokens
    int padding;
};
