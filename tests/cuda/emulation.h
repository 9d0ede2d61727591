// CUDA on the CPU, as much of it as the kernels use: stands in for intrinsics.cuh. A block's threads are fibers that run
// in turn until each waits at a barrier; warps meet at shuffles and tensor core products as on the device. Shared memory
// starts as NaN, and what is written behind its end, what waits for threads that never come and what is not aligned ends
// the launch with an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* name = emulated::shared_memory.data()

constexpr unsigned ALL_LANES = 0xffffffffu;

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };

using std::size_t;
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline u32 atomicAdd(u32* address, u32 value) { // fibers give way at barriers alone
    u32 before = *address;
    *address = before + value;
    return before;
}
inline u32 __float_as_uint(float x) { return bits_as<u32>(x); }
inline float __uint_as_float(u32 x) { return bits_as<float>(x); }

inline u16 float_to_half(float value) { return bits_as<u16>(static_cast<_Float16>(value)); }
inline float half_to_float(u16 bits) {
    static const std::vector<float> table = [] {
        std::vector<float> all(65536);
        for (u32 i = 0; i < 65536; ++i) all[i] = static_cast<float>(bits_as<_Float16>(u16(i)));
        return all;
    }();
    return table[bits];
}

namespace emulated {

constexpr size_t STACK = 64 << 10, CANARY = 64;
constexpr unsigned LANES = 32;

struct Registers { u32 a[4], b[2]; };

struct Warp {
    unsigned arrived = 0, generation = 0;
    Registers slots[2][LANES]; // by parity: nobody is two meetings ahead
};

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    bool started = false, done = false, blocked = false;
    dim3 thread{};
    Warp* warp = nullptr;
};

inline dim3 grid, block, block_index;
inline std::vector<unsigned char> shared_memory;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<char> stacks;
inline Fiber* current;
inline jmp_buf scheduler;
inline const char* failure;
inline void (*body)(void**);
inline void** arguments;

[[noreturn]] inline void leave() { _longjmp(scheduler, 1); }
inline void yield() {
    if (!_setjmp(current->resume)) leave();
}
inline void fail(const char* why) {
    failure = why;
    leave();
}
inline void entry() {
    body(arguments);
    current->done = true;
    leave();
}
inline void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

// Wait until all lanes of the warp are here; returns the parity of the meeting.
inline unsigned meet() {
    Warp& warp = *current->warp;
    unsigned generation = warp.generation;
    if (++warp.arrived == LANES) {
        warp.arrived = 0;
        ++warp.generation;
    } else {
        while (warp.generation == generation) yield();
    }
    return generation % 2;
}
inline unsigned lane() { return current->thread.x % LANES; }

// Run a warp until every lane is at the block's barrier or at its end.
inline void run_warp(Fiber* lanes, Warp& warp) {
    for (;;) {
        bool alive = false;
        unsigned generation = warp.generation, arrived = warp.arrived;
        bool moved = false;
        for (unsigned i = 0; i < LANES && !failure; ++i) {
            if (lanes[i].done || lanes[i].blocked) continue;
            resume(lanes[i]);
            alive = true;
            moved |= lanes[i].done || lanes[i].blocked;
        }
        if (!alive || failure) return;
        if (!moved && warp.generation == generation && warp.arrived == arrived) {
            failure = "lanes of a warp wait for others that do not come";
        }
    }
}

inline void run_block(size_t shared_bytes) {
    unsigned threads = block.x * block.y * block.z;
    shared_memory.assign(shared_bytes + CANARY, 0xff);
    fibers.assign(threads, Fiber());
    warps.assign(threads / LANES, Warp());
    stacks.resize(threads * STACK);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        fiber.warp = &warps[i / LANES];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks.data() + i * STACK;
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, entry, 0);
    }
    for (bool alive = true; alive && !failure;) {
        for (unsigned i = 0; i < warps.size() && !failure; ++i) run_warp(&fibers[i * LANES], warps[i]);
        alive = false;
        for (Fiber& fiber : fibers) alive |= !fiber.done, fiber.blocked = false;
    }
    for (size_t i = 0; i < CANARY && !failure; ++i) {
        if (shared_memory[shared_bytes + i] != 0xff) failure = "a write behind the end of shared memory";
    }
}

template <class... P, size_t... I>
inline void call(void (*kernel)(P...), void** values, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(values[I])...);
}
template <class... P> inline void unpack(void (*kernel)(P...), void** values) {
    call(kernel, values, std::index_sequence_for<P...>());
}

// Returns null or what went wrong.
inline const char* launch(void (*kernel)(void**), const unsigned* g, const unsigned* b, size_t shared, void** values) {
    grid = {g[0], g[1], g[2]}, block = {b[0], b[1], b[2]};
    body = kernel, arguments = values, failure = nullptr;
    if (block.x % LANES) return "blocks are whole warps";
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x && !failure; ++x) {
                block_index = {x, y, z};
                run_block(shared);
            }
    return failure;
}

template <class T> inline T checked_load(const T* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("a load that is not aligned");
    return *address;
}

} // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block)
#define gridDim (emulated::grid)

inline void __syncthreads() {
    emulated::current->blocked = true;
    emulated::yield();
}
inline void __syncwarp() { emulated::meet(); }

template <class T> inline T __shfl_xor_sync(unsigned, T value, int mask) {
    static_assert(sizeof(T) == 4);
    emulated::Warp& warp = *emulated::current->warp;
    warp.slots[warp.generation % 2][emulated::lane()].a[0] = bits_as<u32>(value);
    unsigned parity = emulated::meet();
    return bits_as<T>(warp.slots[parity][emulated::lane() ^ mask].a[0]);
}

inline void mma_16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    emulated::Warp& warp = *emulated::current->warp;
    unsigned lane = emulated::lane();
    warp.slots[warp.generation % 2][lane] = {{a0, a1, a2, a3}, {b0, b1}};
    const emulated::Registers* all = warp.slots[emulated::meet()];
    auto half = [](u32 pair, int upper) { return half_to_float(u16(pair >> 16 * upper)); };
    for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k) {
            u32 a = all[row % 8 * 4 + k % 8 / 2].a[k / 8 * 2 + row / 8];
            u32 b = all[column * 4 + k % 8 / 2].b[k / 8];
            sum += double(half(a, k % 2)) * half(b, k % 2);
        }
        c[i] = float(sum);
    }
}

inline u32 load_once(const u32* address) { return emulated::checked_load(address); }
inline uint2 load_once(const uint2* address) { return emulated::checked_load(address); }
inline uint4 load_once(const uint4* address) { return emulated::checked_load(address); }
