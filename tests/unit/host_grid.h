// Enough of CUDA to run rows.cu, and with host_cluster.h sample.cu, on a CPU, all blocks at once: each thread is a fiber, and whoever waits lets the
// others run. Instructions that the source writes in assembler are written out here.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
using std::max;
using std::min;

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { u32 x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

struct Dim { u32 x; };
#ifndef HOST_THREADS
#define HOST_THREADS (WARPS * 32 + 128)
#endif
constexpr int CONSUMERS = WARPS * 32, FIBERS = GRID * HOST_THREADS;
static int current, running;
static u32 chance = 1;
struct Fiber { jmp_buf at; ucontext_t first; bool begun, done; };
static std::vector<Fiber> fibers(FIBERS);
static ucontext_t home;
#define threadIdx (Dim{(u32)(current % HOST_THREADS)})
#define blockIdx (Dim{(u32)(current / HOST_THREADS)})

static u32 chosen() { return (chance = chance * 1664525u + 1013904223u) >> 8; }
static void yield() {
    if (!running) setcontext(&home);
    Fiber &from = fibers[current];
    int to = chosen() % 4096 ? current + 1 : (int)(chosen() % FIBERS);   // now and then out of order
    for (to %= FIBERS; fibers[to].done;) to = (to + 1) % FIBERS;
    if (to == current) return;
    if (!from.done && _setjmp(from.at)) return;
    current = to;
    if (fibers[to].begun) _longjmp(fibers[to].at, 1);
    fibers[to].begun = true;
    setcontext(&fibers[to].first);
}

struct Meeting {
    int arrived = 0, turn = 0;
    void wait(int size) {
        int now = turn;
        if (++arrived == size) { arrived = 0; ++turn; return; }
        while (turn == now) yield();
    }
};
static Meeting block_meeting[GRID], consumers_meeting[GRID], warp_meeting[FIBERS / 32];
static u32 posted[FIBERS / 32][32][6];

static int lane() { return current % 32; }
static void post(int n, const u32 *values) {
    std::memcpy(posted[current / 32][lane()], values, 4 * n);
    warp_meeting[current / 32].wait(32);
}
static u32 of(int lane, int n) { return posted[current / 32][lane][n]; }
static void leave_post() { warp_meeting[current / 32].wait(32); }
static void __syncwarp() { warp_meeting[current / 32].wait(32); }
static void __syncthreads() { block_meeting[blockIdx.x].wait(HOST_THREADS); }
static void consumers_meet() {
    if (threadIdx.x >= CONSUMERS) std::abort();
    consumers_meeting[blockIdx.x].wait(CONSUMERS);
}
template <typename T> static T __shfl_xor_sync(u32, T v, int far) {
    u32 bits;
    std::memcpy(&bits, &v, 4);
    post(1, &bits);
    bits = of(lane() ^ far, 0);
    leave_post();
    std::memcpy(&v, &bits, 4);
    return v;
}
static float __uint_as_float(u32 v) { float f; std::memcpy(&f, &v, 4); return f; }
static float __int_as_float(int v) { return __uint_as_float((u32)v); }
static int __float_as_int(float v) { int i; std::memcpy(&i, &v, 4); return i; }
static u32 __float_as_uint(float v) { u32 u; std::memcpy(&u, &v, 4); return u; }
static float rsqrtf(float v) { return 1.f / std::sqrt(v); }
static u32 __byte_perm(u32 a, u32 b, u32 select) {
    u64 both = (u64)b << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; ++i) r |= (u32)(both >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}
// A warp asks as one: what lane 0 sees counts.
static u32 first_lane(u32 v) {
    post(1, &v);
    v = of(0, 0);
    leave_post();
    return v;
}
static long long clock64() { static u32 now; return first_lane(now += 10); }

static float lo(u32 v) { return __uint_as_float(v << 16); }
static float hi(u32 v) { return __uint_as_float(v & 0xffff0000u); }
static u32 to_bf16(float v) {
    u32 bits = __float_as_uint(v);
    if (v != v) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static u32 pack(float a, float b) { return to_bf16(a) | to_bf16(b) << 16; }
static float infinity() { return INFINITY; }
static float rounded(float a) { return lo(pack(a, 0.f)); }
static float exp2_(float v) { return std::exp2(v); }
static void aligned(const void *p, size_t to) { if ((size_t)p % to) std::abort(); }
static uint4 ldcg4(const u16 *p) { aligned(p, 16); return *(const uint4 *)p; }

// Shared memory, filled with NaN, and barriers in it.
constexpr int SHARED = 227 * 1024;
static std::vector<unsigned char> shared_memory((size_t)GRID * SHARED + 128);
#define memory (shared_memory.data() + (128 - (size_t)shared_memory.data() % 128) % 128 + (size_t)blockIdx.x * SHARED)
static u32 shared_at(const void *p) { return (u32)((const unsigned char *)p - memory); }
static uint4 lds(u32 at) {
    if (at % 16 || at + 16 > SHARED) std::abort();
    return *(const uint4 *)(memory + at);
}
struct Bar { int count, pending; long long bytes; u32 phase; };
static std::map<u32, Bar> bars[GRID];
static void settle(Bar &b) { if (b.pending == 0 && b.bytes == 0) { b.pending = b.count; b.phase ^= 1; } }
static void mbar_init(u32 bar, u32 count) { bars[blockIdx.x][bar] = Bar{(int)count, (int)count, 0, 0}; }
static void mbar_arrive(u32 bar) { Bar &b = bars[blockIdx.x].at(bar); --b.pending; settle(b); }
static void give_back(u32 bar, u32) { mbar_arrive(bar); }
static void mbar_expect(u32 bar, u32 bytes) { Bar &b = bars[blockIdx.x].at(bar); b.bytes += bytes; --b.pending; settle(b); }
static bool mbar_test(u32 bar, u32 parity) {
    const bool yes = first_lane(bars[blockIdx.x].at(bar).phase != parity);
    if (!yes) yield();
    return yes;
}
static void mbar_wait(u32 bar, u32 parity) { while (!mbar_test(bar, parity)) {} }
static void mbar_fence() {}
static u64 evict_first() { return 0; }
static void bulk_copy(u32 to, const void *from, u32 bytes, u32 bar, u64) {
    aligned(from, 16);
    if (to % 16 || bytes % 16) std::abort();
    std::memcpy(memory + to, from, bytes);
    Bar &b = bars[blockIdx.x].at(bar);
    b.bytes -= bytes;
    settle(b);
}
static void bulk_prefetch(const void *, u32) {}
static void prefetch(const void *) {}
static int thread() { return (int)threadIdx.x; }
static uint4 ld_words(const u16 *p) { aligned(p, 16); return *(const uint4 *)p; }
static u32 ld_word(const u16 *p) { aligned(p, 4); return *(const u32 *)p; }
static void st_word(u16 *p, u32 v) {
    aligned(p, 4);
    if (*(u32 *)p != 0xffffffffu) { std::fprintf(stderr, "a word is written twice\n"); std::abort(); }
    *(u32 *)p = v;
}
static u64 ld_cell(const u64 *p) { return *p; }
static void st_cell(u64 *p, u32 value, u32 tag) { *p = (u64)tag << 32 | value; }
static void let_successor_start() {}
static void wait_for_predecessor() {}
static void rest(u32 &spins) {
    if (++spins == SPINS) { std::fprintf(stderr, "block %u thread %u waits for ever\n", blockIdx.x, threadIdx.x); std::abort(); }
    yield();
}
// m16n8k16: a0 a1 are rows g, g + 8 of inner indices 2t, 2t + 1; a2 a3 and b1 of those 8 further on.
static void mma(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 own[6] = {a0, a1, a2, a3, b0, b1};
    post(6, own);
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k) {
            const u32 a = of(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2), b = of(column * 4 + k % 8 / 2, 4 + k / 8);
            sum += (double)(k % 2 ? hi(a) : lo(a)) * (k % 2 ? hi(b) : lo(b));
        }
        c[i] = (float)sum;
    }
    leave_post();
}
static u32 transpose(u32 a) {
    post(1, &a);
    const int g = lane() / 4, t = lane() % 4;
    u32 low = of(2 * t * 4 + g / 2, 0), high = of((2 * t + 1) * 4 + g / 2, 0);
    leave_post();
    return (low >> g % 2 * 16 & 0xffff) | (high >> g % 2 * 16 & 0xffff) << 16;
}

template <typename Body> static void run_grid(u32 seed, const Body &body) {
    static Body const *now;
    static std::vector<char> stacks((size_t)FIBERS << 15);
    now = &body;
    chance = seed;
    running = FIBERS;
    std::fill(shared_memory.begin(), shared_memory.end(), 0xff);
    for (int f = 0; f < FIBERS; ++f) {
        Fiber &fiber = fibers[f];
        fiber.begun = fiber.done = false;
        getcontext(&fiber.first);
        fiber.first.uc_stack.ss_sp = stacks.data() + ((size_t)f << 15);
        fiber.first.uc_stack.ss_size = 1 << 15;
        fiber.first.uc_link = &home;
        void (*entry)() = [] { (*now)(); fibers[current].done = true; --running; yield(); };
        makecontext(&fiber.first, entry, 0);
    }
    current = 0;
    fibers[0].begun = true;
    swapcontext(&home, &fibers[0].first);
}
