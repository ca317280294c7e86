// Threads of CUDA on a CPU, whichever kernel they run: each is a fiber, and one runs at a time until it waits. A warp's collective
// operations wait until all its lanes are there. Instructions that sources write in assembler are written out here, from the PTX
// manual's tables of fragments.
//
// Needs: FIBERS, all threads that run at once; STACK, bytes that one may have.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
using std::max;
using std::min;

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { u32 x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
struct Dim { u32 x; };

// Fibers that can go on are in `ready`, the others in the lists of what they wait for.
static int current, running;
static u32 chance = 1, calm;
struct Fiber { jmp_buf at; ucontext_t first; bool begun, done; };
static std::vector<Fiber> fibers(FIBERS);
static std::vector<int> ready;
static ucontext_t home;
// Now and then a few of them rest, however many switches the others need meanwhile.
static int resting_from, resting_to;
static long long switches, rest_ends, last_progress;
constexpr long long FOR_EVER = 40000000;

static u32 chosen() { return (chance = chance * 1664525u + 1013904223u) >> 8; }
static void progress() { last_progress = switches; }
static bool fail;
// Ends all threads; a program that has failed is of no use any more.
static void failed(const char *why) {
    std::fprintf(stderr, "%s: thread %d of %d, %d have not ended\n", why, current, FIBERS, running);
    fail = true;
    setcontext(&home);
}
static void __trap() { failed("a trap"); }
static void wake(int fiber) { ready.push_back(fiber); }
static size_t any_ready() { return chosen() * (u64)ready.size() >> 24; }
// Mostly the one that was woken last, so that a warp goes on for a while; now and then any.
static int next_fiber() {
    for (int tries = 0;; ++tries) {
        const size_t i = tries || chosen() % calm == 0 ? any_ready() : ready.size() - 1;
        const int fiber = ready[i];
        if (fiber >= resting_from && fiber < resting_to && tries < 64) continue;
        ready[i] = ready.back();
        ready.pop_back();
        return fiber;
    }
}
// What goes on beside the threads, as copies do: makes a step, if there is one.
static bool (*machine)();
static u32 machine_rests = 1;
// Lets others run until somebody wakes this one.
static void suspend() {
    if (!running) setcontext(&home);
    while (machine && (ready.empty() || chosen() % machine_rests == 0) && machine()) {}
    if (ready.empty()) failed("all wait for each other");
    if (++switches - last_progress > FOR_EVER) failed("threads wait for ever");
    if (switches >= rest_ends) {
        const int many = 32 << chosen() % 5;
        resting_from = chosen() % 2 ? FIBERS : (int)(chosen() % FIBERS) / many * many;
        resting_to = resting_from + many;
        rest_ends = switches + (256 << chosen() % 10);
    }
    Fiber &from = fibers[current];
    const int to = next_fiber();
    if (to == current) return;
    if (!from.done && _setjmp(from.at)) return;
    current = to;
    if (fibers[to].begun) _longjmp(fibers[to].at, 1);
    fibers[to].begun = true;
    setcontext(&fibers[to].first);
}
static void yield() {
    wake(current);
    std::swap(ready.back(), ready[any_ready()]);
    suspend();
}
// Whether all went well.
template <typename Body> static bool run_fibers(const Body &body) {
    static Body const *now;
    constexpr size_t APART = STACK + 7 * 64;   // no power of two: of all stacks the same lines are in use
    // Given back at the end: a library that was opened stays, and each case has one.
    const std::unique_ptr<char[]> stacks(new char[FIBERS * APART]);
    now = &body;
    running = FIBERS;
    calm = 4 << chosen() % 5;
    ready.clear();
    switches = rest_ends = last_progress = 0;
    for (int f = 0; f < FIBERS; ++f) {
        Fiber &fiber = fibers[f];
        fiber.begun = fiber.done = false;
        getcontext(&fiber.first);
        fiber.first.uc_stack.ss_sp = stacks.get() + f * APART;
        fiber.first.uc_stack.ss_size = STACK;
        fiber.first.uc_link = &home;
        void (*entry)() = [] { (*now)(); fibers[current].done = true; --running; progress(); suspend(); };
        makecontext(&fiber.first, entry, 0);
        if (f) wake(f);
    }
    current = 0;
    fibers[0].begun = true;
    if (!fail) swapcontext(&home, &fibers[0].first);
    return !fail;
}

struct Meeting {
    std::vector<int> waiting;
    void wait(int size) {
        if ((int)waiting.size() + 1 < size) {
            waiting.push_back(current);
            suspend();
            return;
        }
        for (int fiber : waiting) wake(fiber);
        waiting.clear();
        if (size > 32) progress();
    }
};
static Meeting warp_meeting[FIBERS / 32];
// What lanes tell each other, in two places in turn: who is at the next operation has read what was told at this one.
static u32 posted[FIBERS / 32][2][32][2];
static bool side[FIBERS];

static int lane() { return current % 32; }
static void __syncwarp() { warp_meeting[current / 32].wait(32); }
static void post(int n, const void *words) {
    side[current] = !side[current];
    std::memcpy(posted[current / 32][side[current]][lane()], words, 4 * n);
    __syncwarp();
}
static u32 of(int lane, int n) { return posted[current / 32][side[current]][lane][n]; }

template <typename T> static T take(T v, int from) {
    constexpr int N = sizeof(T) / 4;
    u32 words[N];
    post(N, &v);
    for (int i = 0; i < N; ++i) words[i] = of(from & 31, i);
    std::memcpy(&v, words, sizeof(T));
    return v;
}
template <typename T> static T __shfl_sync(u32, T v, int from) { return take(v, from); }
template <typename T> static T __shfl_xor_sync(u32, T v, int far) { return take(v, lane() ^ far); }
template <typename T> static T __shfl_up_sync(u32, T v, int far) { return take(v, lane() < far ? lane() : lane() - far); }
template <typename Join> static u32 joined_by(u32 v, const Join &join) {
    post(1, &v);
    u32 all = of(0, 0);
    for (int i = 1; i < 32; ++i) all = join(all, of(i, 0));
    return all;
}
static u32 __reduce_max_sync(u32, u32 v) { return joined_by(v, [](u32 a, u32 b) { return max(a, b); }); }
static u32 __reduce_add_sync(u32, u32 v) { return joined_by(v, [](u32 a, u32 b) { return a + b; }); }
static u32 __ballot_sync(u32, bool v) { return joined_by((u32)v << lane(), [](u32 a, u32 b) { return a | b; }); }
static bool __all_sync(u32, bool v) { return __ballot_sync(~0u, v) == ~0u; }
static int __ffs(u32 v) { return __builtin_ffs((int)v); }
static float __uint_as_float(u32 v) { float f; std::memcpy(&f, &v, 4); return f; }
static float __int_as_float(int v) { return __uint_as_float((u32)v); }
static int __float_as_int(float v) { int i; std::memcpy(&i, &v, 4); return i; }
static u32 __float_as_uint(float v) { u32 u; std::memcpy(&u, &v, 4); return u; }
static float rsqrtf(float v) { return 1.f / std::sqrt(v); }
static float __fdividef(float a, float b) { return a / b; }
#define __log2f(v) std::log2((float)(v))
static float exp2_(float v) { return std::exp2(v); }
static u32 __byte_perm(u32 a, u32 b, u32 select) {
    u64 both = (u64)b << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; ++i) r |= (u32)(both >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}
static u32 to_bf16(float v) {
    u32 bits = __float_as_uint(v);
    if (v != v) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static u32 pack(float a, float b) { return to_bf16(a) | to_bf16(b) << 16; }
static float from_bf16(u32 v) { return __uint_as_float(v << 16); }
static void aligned(const void *p, size_t to) { if ((size_t)p % to) failed("an address is not aligned"); }
static uint4 ldcg4(const u16 *p) { aligned(p, 16); return *(const uint4 *)p; }

// What a kernel in front writes: `before` until all threads wait for it, then `after`.
struct Written { char *at; const char *before, *after; size_t bytes; };
static std::vector<Written> written;
static bool waited;
static void show(const char *Written::*which) {
    for (const Written &w : written) std::memcpy(w.at, w.*which, w.bytes);
    waited = which == &Written::after;
}
extern "C" void write_at_the_wait(void *at, const void *before, const void *after, size_t bytes) {
    written.push_back({(char *)at, (const char *)before, (const char *)after, bytes});
}
extern "C" void forget() { written.clear(); }

// m16n8k16: a0 a1 are rows g, g + 8 of inner indices 2t, 2t + 1; a2 a3 and b1 of those 8 further on.
static float factors[FIBERS / 32][2][24][16];   // of a warp: rows of the larger operand, then columns of the smaller one
template <typename Number> static void product(float *c, const u32 (&own)[6], const Number &number) {
    side[current] = !side[current];
    float (&f)[24][16] = factors[current / 32][side[current]];
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 6; ++i) {
        float *to = &f[i < 4 ? g + i % 2 * 8 : 16 + g][(i < 4 ? i / 2 : i - 4) * 8 + 2 * t];
        to[0] = number(own[i] & 0xffff);
        to[1] = number(own[i] >> 16);
    }
    __syncwarp();
    const float *up = f[g], *low = f[g + 8], *left = f[16 + 2 * t], *right = left + 16;
    double sum[4] = {c[0], c[1], c[2], c[3]};
    for (int k = 0; k < 16; ++k) {
        sum[0] += up[k] * left[k];   // exact
        sum[1] += up[k] * right[k];
        sum[2] += low[k] * left[k];
        sum[3] += low[k] * right[k];
    }
    for (int i = 0; i < 4; ++i) c[i] = (float)sum[i];
}
static void mma(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { product(c, {a0, a1, a2, a3, b0, b1}, from_bf16); }
static u32 transpose(u32 a) {
    post(1, &a);
    const int g = lane() / 4, t = lane() % 4;
    u32 low = of(2 * t * 4 + g / 2, 0), high = of((2 * t + 1) * 4 + g / 2, 0);
    return (low >> g % 2 * 16 & 0xffff) | (high >> g % 2 * 16 & 0xffff) << 16;
}
