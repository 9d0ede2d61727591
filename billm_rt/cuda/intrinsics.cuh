// What plain C++ cannot say, each in one tiny function. The tests replace this file by a twin that does the same on the
// CPU, so that everything else is one source for both.
#pragma once

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

constexpr unsigned ALL_LANES = 0xffffffffu;

// Nearest binary16, ties to even; beyond its range: infinity.
__device__ __forceinline__ u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// c += a b on the tensor cores: a [16, 16] and b [16, 8] of binary16, c [16, 8] of float32. With g = lane / 4 and
// t = lane % 4 a lane holds, as pairs of neighbours in k,
//   a: (row g, k 2t), (row g + 8, k 2t), (row g, k 2t + 8), (row g + 8, k 2t + 8)
//   b: (k 2t, column g), (k 2t + 8, column g)
//   c: (row g, columns 2t and 2t + 1), (row g + 8, the same columns)
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Loads of what is read once: they leave the first-level cache to what is read again.
__device__ __forceinline__ u32 load_once(const u32* address) { return __ldcs(address); }
__device__ __forceinline__ uint2 load_once(const uint2* address) { return __ldcs(address); }
__device__ __forceinline__ uint4 load_once(const uint4* address) { return __ldcs(address); }
