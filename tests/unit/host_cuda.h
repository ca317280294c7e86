// Enough of CUDA to run attention.cu on a CPU, a block at a time.
constexpr int FIBERS = WARPS * 32, STACK = 1 << 17;
#include "host_threads.h"

#define __shared__ static
static Dim blockIdx, gridDim;
#define threadIdx (Dim{(u32)current})

static Meeting block_meeting;
static int votes;

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
static bool __syncthreads_and(bool v) { return !__syncthreads_or(!v); }
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
    aligned(to, 16);
    aligned(from, 16);
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
    aligned(p, 16);
    const u32 address[2] = {(u32)(size_t)p, (u32)((size_t)p >> 32)};
    post(2, address);
    const int g = lane() / 4, t = lane() % 4;
    u32 own[4];
    for (int m = 0; m < 4; ++m) {
        auto at = [&](int row) { return (const u16 *)((size_t)of(m * 8 + row, 0) | (size_t)of(m * 8 + row, 1) << 32); };
        own[m] = over ? at(2 * t)[g] | (u32)at(2 * t + 1)[g] << 16 : at(g)[2 * t] | (u32)at(g)[2 * t + 1] << 16;
    }
    std::memcpy(r, own, 16);
}
static void matrices(u32 (&r)[4], const u16 *p) { matrices(r, p, false); }
static void transposed(u32 (&r)[4], const u16 *p) { matrices(r, p, true); }
static void let_successor_start() {}
static void send(float2 *to, float2 v) { *to = v; }   // blocks of a cluster run one after the other, the first one last
static void arrive() {}
static void meet() { block_meeting.wait(FIBERS); }
// A kernel in front may write at any time until it is waited for, so of two warps, or of two loads, one may see it earlier.
static u32 loads[FIBERS];
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
template <typename Body> static bool run_blocks(int blocks, bool backwards, const Body &body) {
    gridDim.x = blocks;
    for (int i = 0; i < blocks; ++i) {
        show(&Written::before);
        const int cluster = i / SPLITS;
        blockIdx.x = (backwards ? blocks / SPLITS - 1 - cluster : cluster) * SPLITS + SPLITS - 1 - i % SPLITS;
        for (int f = 0; f < FIBERS; ++f) {
            if (!copies[f].empty()) failed("a thread has ended before its copies");
            groups[f] = 0;
        }
        if (!run_fibers(body)) return false;
    }
    return true;
}
