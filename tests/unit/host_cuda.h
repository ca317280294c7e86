// Enough of CUDA to run attention.cu on a CPU, a block at a time: each thread is a fiber, a warp's collective
// operations wait until all its lanes are there. Instructions that the source writes in assembler are
// written out here, from the PTX manual's tables of fragments.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
using std::max;
using std::min;

typedef unsigned short u16;
typedef unsigned int u32;
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { u32 x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

struct Dim { u32 x; };
static Dim blockIdx, gridDim;
constexpr int FIBERS = WARPS * 32;
static int current;
static ucontext_t fibers[FIBERS], home;
static bool done[FIBERS];
#define threadIdx (Dim{(u32)current})

static void yield() {
    int from = current, to = from;
    do to = (to + 1) % FIBERS;
    while (done[to] && to != from);
    if (to == from) {
        if (done[from]) setcontext(&home);
        std::fprintf(stderr, "a thread waits for threads that have ended\n");
        std::abort();
    }
    current = to;
    swapcontext(&fibers[from], &fibers[to]);
}

struct Meeting {
    int arrived = 0, turn = 0;
    void wait(int size) {
        int now = turn;
        if (++arrived == size) { arrived = 0; ++turn; return; }
        while (turn == now) yield();
    }
};
static Meeting block_meeting, warp_meeting[FIBERS / 32];
static u32 posted[FIBERS / 32][32][6];
static int votes;

static int lane() { return current % 32; }
static void post(int n, const u32 *values) {
    std::memcpy(posted[current / 32][lane()], values, 4 * n);
    warp_meeting[current / 32].wait(32);
}
static u32 of(int lane, int n) { return posted[current / 32][lane][n]; }
static void leave_post() { warp_meeting[current / 32].wait(32); }

static void __syncwarp() { warp_meeting[current / 32].wait(32); }
static void __syncthreads() { block_meeting.wait(FIBERS); }
static int __syncthreads_or(int v) {
    votes |= v;
    block_meeting.wait(FIBERS);
    int all = votes;
    block_meeting.wait(FIBERS);
    votes = 0;
    block_meeting.wait(FIBERS);
    return all;
}
template <typename T> static T take(T v, int from) {
    u32 bits;
    std::memcpy(&bits, &v, 4);
    post(1, &bits);
    bits = of(from & 31, 0);
    leave_post();
    std::memcpy(&v, &bits, 4);
    return v;
}
template <typename T> static T __shfl_sync(u32, T v, int from) { return take(v, from); }
template <typename T> static T __shfl_xor_sync(u32, T v, int far) { return take(v, lane() ^ far); }
template <typename T> static T __shfl_up_sync(u32, T v, int far) {
    T other = take(v, lane() - far);
    return lane() < far ? v : other;
}
static u32 __ballot_sync(u32, bool v) {
    u32 bit = v, all = 0;
    post(1, &bit);
    for (int i = 0; i < 32; ++i) all |= of(i, 0) << i;
    leave_post();
    return all;
}
static bool __all_sync(u32, bool v) { return __ballot_sync(~0u, v) == ~0u; }
static bool __syncthreads_and(bool v) { return !__syncthreads_or(!v); }
static int __ffs(u32 v) { return __builtin_ffs((int)v); }
static float __uint_as_float(u32 v) { float f; std::memcpy(&f, &v, 4); return f; }
static float __int_as_float(int v) { return __uint_as_float((u32)v); }
static float rsqrtf(float v) { return 1.f / std::sqrt(v); }
static float __fdividef(float a, float b) { return a / b; }
static u32 __byte_perm(u32 a, u32 b, u32 select) {
    unsigned long long both = (unsigned long long)b << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; ++i) r |= (u32)(both >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}

static u32 to_bf16(float v) {
    u32 bits;
    std::memcpy(&bits, &v, 4);
    if (v != v) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static u32 pack(float a, float b) { return to_bf16(a) | to_bf16(b) << 16; }
static float half_of(u32 pair, int high) { return __uint_as_float(high ? pair & 0xffff0000u : pair << 16); }
static float exp2_(float v) { return std::exp2(v); }
static uint4 ldcg4(const u16 *p) {
    if ((size_t)p % 16) std::abort();
    return *(const uint4 *)p;
}
static u16 ldcg(const u16 *p) { return *p; }
static int seen(const int *p);
static int ldcg(const int *p) { return seen(p); }
static float2 ldcg2(const float *p) { return *(const float2 *)p; }
static u32 count_up(u32 *p, u32 most) {
    u32 before = *p;
    *p = before >= most ? 0 : before + 1;
    return before;
}
// Copies that have been asked for, by thread, and how many groups there are: made when they are waited for, no sooner.
struct Copy { void *to; const void *from; int group; };
static std::vector<Copy> copies[FIBERS];
static int groups[FIBERS];
static void copy16(void *to, const void *from) {
    if ((size_t)to % 16 || (size_t)from % 16) std::abort();
    copies[current].push_back({to, from, groups[current]});
}
static void commit() { ++groups[current]; }
static void arrived(int pending) {
    std::vector<Copy> left;
    for (const Copy &c : copies[current])
        if (c.group < groups[current] - pending) std::memcpy(c.to, c.from, 16);
        else left.push_back(c);
    copies[current] = left;
}
static void one_arrived() { arrived(PIECES - 1); }
static void two_arrived() { arrived(PIECES - 2); }
static void all_arrived() { arrived(0); }
// Four matrices of 8 x 8, a row from each lane's address: of a lane, two neighbours of row g; `over`: of column g.
static void matrices(u32 (&r)[4], const u16 *p, bool over) {
    if ((size_t)p % 16) std::abort();
    const u32 address[2] = {(u32)(size_t)p, (u32)((size_t)p >> 32)};
    post(2, address);
    const int g = lane() / 4, t = lane() % 4;
    u32 own[4];
    for (int m = 0; m < 4; ++m) {
        auto at = [&](int row) { return (const u16 *)((size_t)of(m * 8 + row, 0) | (size_t)of(m * 8 + row, 1) << 32); };
        own[m] = over ? at(2 * t)[g] | (u32)at(2 * t + 1)[g] << 16 : at(g)[2 * t] | (u32)at(g)[2 * t + 1] << 16;
    }
    leave_post();
    std::memcpy(r, own, 16);
}
static void matrices(u32 (&r)[4], const u16 *p) { matrices(r, p, false); }
static void transposed(u32 (&r)[4], const u16 *p) { matrices(r, p, true); }
static void let_successor_start() {}
static void send(float2 *to, float2 v) { *to = v; }   // blocks of a cluster run one after the other, the first one last
static void arrive() {}
static void meet() { block_meeting.wait(FIBERS); }
// What a kernel in front writes: `before` until all threads of a block wait, then `after`. It may write at any time until
// then, so of two warps, or of two loads, one may see it earlier.
struct Written { char *at; const char *before, *after; size_t bytes; };
static std::vector<Written> written;
static bool waited;
static u32 loads[FIBERS];
static void show(const char *Written::*which) {
    for (const Written &w : written) std::memcpy(w.at, w.*which, w.bytes);
    waited = which == &Written::after;
}
static int seen(const int *p) {
    if (!waited) {
        const u32 coin = (blockIdx.x * 977 + current / 32 * 61 + loads[current]++) * 0x9e3779b9u >> 30;   // alike in a warp
        for (const Written &w : written)
            if (coin == 0 && (const char *)p >= w.at && (const char *)p < w.at + w.bytes)
                return *(const int *)(w.after + ((const char *)p - w.at));
    }
    return *p;
}
static void wait_for_predecessor() {
    block_meeting.wait(FIBERS);
    if (current == 0) show(&Written::after);
    block_meeting.wait(FIBERS);
}
// m16n8k16: a0 a1 are rows g, g + 8 of inner indices 2t, 2t + 1; a2 a3 and b1 of those 8 further on.
static void mma(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 own[6] = {a0, a1, a2, a3, b0, b1};
    post(6, own);
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k)
            sum += (double)half_of(of(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2), k % 2) *
                   half_of(of(column * 4 + k % 8 / 2, 4 + k / 8), k % 2);
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

template <typename Body> static void run_blocks(int blocks, bool backwards, const Body &body) {
    static Body const *now;
    static std::vector<char> stacks((size_t)FIBERS << 17);
    now = &body;
    gridDim.x = blocks;
    for (int i = 0; i < blocks; ++i) {
        show(&Written::before);
        const int cluster = i / SPLITS;
        blockIdx.x = (backwards ? blocks / SPLITS - 1 - cluster : cluster) * SPLITS + SPLITS - 1 - i % SPLITS;
        for (int f = 0; f < FIBERS; ++f) {
            done[f] = false;
            if (!copies[f].empty()) std::abort();   // a thread has ended before its copies
            groups[f] = 0;
            getcontext(&fibers[f]);
            fibers[f].uc_stack.ss_sp = stacks.data() + ((size_t)f << 17);
            fibers[f].uc_stack.ss_size = 1 << 17;
            fibers[f].uc_link = &home;
            void (*entry)() = [] { (*now)(); done[current] = true; yield(); };
            makecontext(&fibers[f], entry, 0);
        }
        current = 0;
        swapcontext(&home, &fibers[0]);
    }
}
