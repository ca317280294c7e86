// Enough of CUDA to run decode.cu, rows.cu, with host_cluster.h sample.cu, and with host_tiles.h linear.cu, attend.cu and chain.cu, on a CPU, all
// blocks at once.
#ifndef HOST_THREADS
#define HOST_THREADS (WARPS * 32 + 128)
#endif
constexpr int CONSUMERS = WARPS * 32, FIBERS = GRID * HOST_THREADS, STACK = 1 << 15;
#include "host_threads.h"

#include <map>

#define threadIdx (Dim{(u32)(current % HOST_THREADS)})
#define blockIdx (Dim{(u32)(current / HOST_THREADS)})

static Meeting block_meeting[GRID], consumers_meeting[GRID];
static void __syncthreads() { block_meeting[blockIdx.x].wait(HOST_THREADS); }
static void consumers_meet() {
    if (threadIdx.x >= CONSUMERS) failed("no consumer");
    consumers_meeting[blockIdx.x].wait(CONSUMERS);
}
// A warp asks as one: what lane 0 sees counts.
static u32 first_lane(u32 v) { return take(v, 0); }
// Each look takes as long as a chunk's pace: whoever has looked in vain goes on into the L2 cache.
static long long clock64() { static long long now; return (long long)first_lane((u32)(now += 1000)); }
static u32 now() { static u32 cycles; return cycles += 100; }

static float lo(u32 v) { return from_bf16(v & 0xffff); }
static float hi(u32 v) { return from_bf16(v >> 16); }
static float infinity() { return INFINITY; }
static float rounded(float a) { return lo(pack(a, 0.f)); }
template <typename V> static V ldcg(const V *p) { return *p; }

// Shared memory, filled with NaN, and barriers in it.
constexpr int SHARED = 227 * 1024;
static std::vector<unsigned char> shared_memory((size_t)GRID * SHARED + 128);
#define memory (shared_memory.data() + (128 - (size_t)shared_memory.data() % 128) % 128 + (size_t)blockIdx.x * ::SHARED)
static u32 shared_at(const void *p) { return (u32)((const unsigned char *)p - memory); }
static unsigned char *shared(u32 at, u32 bytes) {
    if (at % bytes || at + bytes > SHARED) failed("no place in shared memory");
    return memory + at;
}
static uint4 lds(u32 at) { return *(const uint4 *)shared(at, 16); }
static uint2 lds2(u32 at) { return *(const uint2 *)shared(at, 8); }
static void sts(u32 at, u32 v) { *(u32 *)shared(at, 4) = v; }
struct Bar { int count, pending; long long bytes; u32 phase; std::vector<int> waiting; };
static std::map<u32, Bar> bars[GRID];
static void settle(Bar &b) {
    if (b.pending || b.bytes) return;
    b.pending = b.count;
    b.phase ^= 1;
    for (int fiber : b.waiting) wake(fiber);
    b.waiting.clear();
    progress();
}
static void settled(Bar &b) {
    b.waiting.push_back(current);
    suspend();
}
static void mbar_init(u32 bar, u32 count) { bars[blockIdx.x][bar] = Bar{(int)count, (int)count, 0, 0, {}}; }
static void mbar_fence() {}
static void mbar_arrive(u32 bar) { Bar &b = bars[blockIdx.x].at(bar); --b.pending; settle(b); }
static void give_back(u32 bar, u32) { mbar_arrive(bar); }
static void mbar_expect(u32 bar, u32 bytes) { Bar &b = bars[blockIdx.x].at(bar); b.bytes += bytes; --b.pending; settle(b); }
static bool mbar_test(u32 bar, u32 parity) {
    Bar &b = bars[blockIdx.x].at(bar);
    const bool yes = first_lane(b.phase != parity);
    if (!yes && b.phase == parity) settled(b);   // nothing new to be seen before
    return yes;
}
static void mbar_wait(u32 bar, u32 parity) {
    Bar &b = bars[blockIdx.x].at(bar);
    while (b.phase == parity) settled(b);
}
static u64 evict_first() { return 0; }
static void bulk_copy(u32 to, const void *from, u32 bytes, u32 bar, u64) {
    aligned(from, 16);
    if (to % 16 || bytes % 16 || to + bytes > SHARED) failed("no place for a copy");
    std::memcpy(memory + to, from, bytes);
    Bar &b = bars[blockIdx.x].at(bar);
    b.bytes -= bytes;
    settle(b);
}
static void prefetch(const void *p) { (void)*(volatile const char *)p; }
static void bulk_prefetch(const void *from, u32 bytes) {
    aligned(from, 16);
    prefetch(from);
    prefetch((const char *)from + bytes - 1);
}
static int thread() { return (int)threadIdx.x; }
static uint4 ld_words(const u16 *p) { aligned(p, 16); return *(const uint4 *)p; }
static u32 ld_word(const u16 *p) { aligned(p, 4); return *(const u32 *)p; }
static void st_word(u16 *p, u32 v) {
    aligned(p, 4);
    if (*(u32 *)p != 0xffffffffu) failed("a word is written twice");
    *(u32 *)p = v;
    progress();
}
struct Pair { u64 a, b; };
static u64 ld_cell(const u64 *p) { aligned(p, 8); return *p; }
static Pair ld_pair(const u64 *p) { aligned(p, 16); return {p[0], p[1]}; }
static void st_cell(u64 *p, u32 value, u32 tag) {
    aligned(p, 8);
    *p = (u64)tag << 32 | value;
    progress();
}
static u32 count_round(u32 *p, u32 most) {
    const u32 before = *p;
    *p = before >= most ? 0 : before + 1;
    return before;
}
static void let_successor_start() {}
static int waiting_for_predecessor;
// It ends when all that computes waits. What fetches weights never needs it.
static void wait_for_predecessor() {
    if (written.empty() || threadIdx.x >= CONSUMERS) return;
    if (++waiting_for_predecessor == GRID * CONSUMERS) show(&Written::after);
    while (!waited) yield();
}
static void rest() { yield(); }
static void rest(u32 &) { yield(); }

// Float16, and E4M3, all of whose values it has.
static float from_f16(u32 v) {
    const u32 sign = (v & 0x8000) << 16, exponent = v >> 10 & 31, rest = v & 1023;
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint(std::ldexp((float)rest, -24)));
    return __uint_as_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | rest << 13);
}
static u32 to_f16(float v) {
    const u32 sign = __float_as_uint(v) >> 16 & 0x8000;
    const float size = std::fabs(v);
    if (!(size < 65520.f)) return v != v ? 0x7fff : sign | 0x7c00;
    const int exponent = size < std::ldexp(1.f, -14) ? -14 : std::ilogb(size);
    const u32 steps = (u32)std::nearbyint(std::ldexp(size, 10 - exponent));   // to even
    return sign | (((u32)(exponent + 14) << 10) + steps);
}
static u32 pack_f16(float high, float low) { return to_f16(high) << 16 | to_f16(low); }
static u32 from_e4m3(u32 v) {
    const u32 sign = (v & 128) << 8, exponent = v >> 3 & 15, rest = v & 7;
    if ((v & 127) == 127) return 0x7fff;
    return sign | to_f16(exponent ? std::ldexp((float)(8 + rest), (int)exponent - 10) : std::ldexp((float)rest, -9));
}
static void unpack(u32 v, u32 &first, u32 &second) {
    static const std::vector<u32> table = [] {
        std::vector<u32> t(256);
        for (u32 i = 0; i < 256; ++i) t[i] = from_e4m3(i);
        return t;
    }();
    first = table[v & 255] | table[v >> 8 & 255] << 16;
    second = table[v >> 16 & 255] | table[v >> 24] << 16;
}
static void mma_f16(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { product(c, {a0, a1, a2, a3, b0, b1}, from_f16); }

template <typename Body> static bool run_grid(u32 seed, const Body &body) {
    chance = seed;
    std::fill(shared_memory.begin(), shared_memory.end(), 0xff);
    waiting_for_predecessor = 0;
    show(&Written::before);
    return run_fibers(body);
}
