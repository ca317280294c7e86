// Clusters of blocks, and what else sample.cu needs besides host_grid.h.
#define __align__(n)
struct Arrivals { int arrived, turn; };
static Arrivals meetings[GRID / CLUSTER];
static int turn_at_arrival[FIBERS];
static void cluster_arrives() {
    Arrivals &m = meetings[blockIdx.x / CLUSTER];
    turn_at_arrival[current] = m.turn;
    if (++m.arrived == CLUSTER * HOST_THREADS) { m.arrived = 0; ++m.turn; }
}
static void cluster_waits() {
    while (meetings[blockIdx.x / CLUSTER].turn == turn_at_arrival[current]) yield();
}
static u32 rank_in_cluster() { return blockIdx.x % CLUSTER; }
template <typename V> static V *of_block(V *p, u32 rank) {
    if ((unsigned char *)p < memory || (unsigned char *)p >= memory + SHARED || rank >= CLUSTER) failed("not in shared memory of the cluster");
    return (V *)((unsigned char *)p + ((long long)rank - rank_in_cluster()) * SHARED);
}
static u32 remote32(u32 *p, u32 rank) { return *of_block(p, rank); }
static void push32(u32 *p, u32 rank, u32 v) { *of_block(p, rank) = v; }
static void push64(u64 *p, u32 rank, u64 v) { *of_block(p, rank) = v; }
// Barriers by their place; what is sent is there at once.
static std::map<u64 *, Bar> barriers;
static void barrier_init(u64 *barrier, u32 count) { barriers[barrier] = Bar{(int)count, (int)count, 0, 0, {}}; }
static void barriers_are_there() {}
static void barrier_expects(u64 *barrier, u32 rank, u32 bytes) {
    Bar &b = barriers.at(of_block(barrier, rank));
    b.bytes += bytes;
    --b.pending;
    settle(b);
}
static void barrier_waits(u64 *barrier, u32 parity) { while (barriers.at(barrier).phase == parity) settled(barriers.at(barrier)); }
template <typename V> static void send(V *p, u32 rank, V v, u64 *barrier) {
    *of_block(p, rank) = v;
    Bar &b = barriers.at(of_block(barrier, rank));
    b.bytes -= sizeof(V);
    settle(b);
}
static void send32(u32 *p, u32 rank, u32 v, u64 *barrier) { send(p, rank, v, barrier); }
static void send64(u64 *p, u32 rank, u64 v, u64 *barrier) { send(p, rank, v, barrier); }
static void copy_four(float4 *to, const float *from) { aligned(from, 16); *to = *(const float4 *)from; }
static void copied() {}

static int __popc(u32 v) { return __builtin_popcount(v); }
static int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
static int __ffsll(unsigned long long v) { return __builtin_ffsll(v); }
static u32 __umulhi(u32 a, u32 b) { return (u64)a * b >> 32; }
static void add_shared(u32 *p, u32 v) { *p += v; }
static u32 take_shared(u32 *p, u32 count) { u32 before = *p; *p += count; return before; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static long long __float2ll_rz(float v) { return (long long)v; }
static float __ldcg(const float *p) { return *p; }
static float4 __ldcg(const float4 *p) { aligned(p, 16); return *p; }
