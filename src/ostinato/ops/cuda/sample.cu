// Temperature, top-k, top-p and min-p, and the draw, in one launch: a cluster of blocks for each row. What
// the blocks find out they exchange through each other's shared memory.
//
// Meaning, integers and random numbers are those of ostinato/sampling.py. A threshold is found by adding, never by sorting. Tokens are
// ordered by a 64-bit key: the depth (m - x) / temperature in 2^-26ths, then the logit itself from above. Each block adds its tokens' weights, or
// counts them, exactly, in 2048 bins of a 64th of depth; blocks tell each other the sums of each 32 bins, and fetch those 32 among which the threshold lies.
// The tokens of its bin go to all blocks, which find it by themselves: in 128 bins of those tokens, then by comparing what is in one of these with each other.
// Were they too many, their bin would be cut again. Sums are of integers: no order of additions, and no cut of the row, shows in a token.
//
// Loops stay loops: in a decode step this code runs once, from a cold cache, where every line of it costs time.
//
// Macros: VOCAB CLUSTER THREADS EACH (logits of a thread, a multiple of 4; of 8 without KEEP) KEEP (whether a block keeps its logits in shared
// memory; it reads them again otherwise)

#include "common.cuh"

constexpr int T = THREADS, NW = T / 32;
constexpr int SLICE = EACH * T;
constexpr int GROUPS = 64, GROUP = 32, BINS = GROUPS * GROUP, BIN_BITS = 11;
constexpr int FINE_BITS = 7, FINE = 1 << FINE_BITS;
constexpr int LIST = 4096 / CLUSTER;   // most tokens of a bin that a block may contribute
constexpr int PARTS = NW / CLUSTER;    // warps for what a block has sent
constexpr int LOW_BITS = 13;           // of a scaled weight of 25: sums of a block in 32 bits
constexpr int AHEAD = KEEP ? 1 : 2;    // loads of four logits at once
constexpr int UNIT_BITS = 26, BIN_SHIFT = UNIT_BITS - 6;   // of a depth in 2^-26ths; a 64th
constexpr float BOTTOM = 31.f;                             // exp(-31) * 2^44 < 1
constexpr float WEIGHT_OF_ONE = 17592186044416.f;          // 2^44
static_assert(CLUSTER * SLICE >= VOCAB && EACH % (4 * AHEAD) == 0, "the row fits");
static_assert(!KEEP || EACH <= 64, "a bit for each logit");
static_assert(T >= FINE && T <= 1024 && NW % CLUSTER == 0 && GROUPS % NW == 0 && GROUP % NW == 0, "warps for each block, and for each bin");
static_assert((int)BOTTOM * 64 + 32 <= BINS, "bins for all depths");
static_assert(SLICE <= 1 << (32 - LOW_BITS) && SLICE <= 1 << (32 - (25 - LOW_BITS)), "parts of weights add up");

struct Params {
    const float *logits;       // [S, VOCAB]
    const int *rows;           // [S]
    const int *positions;      // [S]
    const float *temperature, *min_p, *top_p;   // by row
    const int *top_k, *seed;   // by row; seed [R, 2]
    int *out;                  // [S]
    const float *largest;      // [S, parts]: of parts of each row, or null
    int seed_stride, parts, num_rows;
};

struct Few { u64 weight[T]; u32 image[T]; unsigned char owner[T]; };   // tokens that are compared with each other
struct Bins { u32 low[BINS], high[BINS]; };                            // this block's sums, for the cluster to read
struct Shared {
    float4 row[KEEP ? SLICE / 4 : 1];        // this block's logits
    union { Bins bins; Few few; };           // when the cluster has read the bins
    u32 fine_low[FINE], fine_high[FINE];
    u64 group_of[CLUSTER][GROUPS + 1], bin_of[CLUSTER][GROUP + 1];   // by block; one more, so that blocks are in other banks
    u64 group_all[GROUPS], bin_all[GROUP];
    u64 kept_of[NW], total_of[CLUSTER];
    u64 sums[2][32];
    float list_of[CLUSTER][LIST], list[LIST];
    u32 length_of[CLUSTER], peak_of[CLUSTER], where_of[CLUSTER];
    u32 words[2][32];
    u32 slot, few_slot;
    u64 sums_are_here, lists_are_here;       // barriers
};

static_assert(sizeof(Few) <= sizeof(Bins), "one in place of the other");
static_assert(sizeof(Shared) <= (KEEP ? 4 * SLICE : 16) + 49664, "what ops/cuda/sample.py asks for");

// --- Instructions. A test on the CPU has its own of these.
__device__ __forceinline__ u32 shared_of(const void *p, u32 rank) {
    u32 mine, theirs;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(mine) : "l"(p));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(mine), "r"(rank));
    return theirs;
}
__device__ __forceinline__ u32 remote32(const u32 *p, u32 rank) {
    u32 v;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(shared_of(p, rank)) : "memory");
    return v;
}
__device__ __forceinline__ void send32(u32 *p, u32 rank, u32 v, u64 *barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 ::"r"(shared_of(p, rank)), "r"(v), "r"(shared_of(barrier, rank)) : "memory");
}
__device__ __forceinline__ void send64(u64 *p, u32 rank, u64 v, u64 *barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];"
                 ::"r"(shared_of(p, rank)), "l"(v), "r"(shared_of(barrier, rank)) : "memory");
}
__device__ __forceinline__ void barrier_init(u64 *barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"((u32)__cvta_generic_to_shared(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barriers_are_there() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and says how many bytes are sent.
__device__ __forceinline__ void barrier_expects(u64 *barrier, u32 rank, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(shared_of(barrier, rank)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_waits(u64 *barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}"
        ::"r"((u32)__cvta_generic_to_shared(barrier)), "r"(parity) : "memory");
}
__device__ __forceinline__ void push32(u32 *p, u32 rank, u32 v) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(shared_of(p, rank)), "r"(v) : "memory");
}
__device__ __forceinline__ void push64(u64 *p, u32 rank, u64 v) {
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(shared_of(p, rank)), "l"(v) : "memory");
}
__device__ __forceinline__ void cluster_arrives() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_waits() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void add_shared(u32 *p, u32 v) {
    asm volatile("red.shared.add.u32 [%0], %1;" ::"r"((u32)__cvta_generic_to_shared(p)), "r"(v) : "memory");
}
__device__ __forceinline__ u32 take_shared(u32 *p, u32 count) {
    u32 before;
    asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"((u32)__cvta_generic_to_shared(p)), "r"(count) : "memory");
    return before;
}
__device__ __forceinline__ void let_successor_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ __forceinline__ u32 rank_in_cluster() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void copy_four(float4 *to, const float *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copied() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// --- End of instructions.
__device__ __forceinline__ void cluster_meets() { cluster_arrives(); cluster_waits(); }

// The same order as the logits, never 0; -0.0 and 0.0 tie.
__device__ __forceinline__ u32 image(float x) {
    u32 bits = __float_as_uint(__fadd_rn(x, 0.f));
    return bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
}
__device__ __forceinline__ float logit_of(u32 image) {
    return __uint_as_float(image & 0x80000000u ? image ^ 0x80000000u : ~image);
}

struct Row {
    float largest, inverse, min_p;
    // Each step rounds by itself: a larger logit is never deeper.
    __device__ __forceinline__ float depth(float x) const { return __fmul_rn(__fsub_rn(largest, x), inverse); }
    __device__ __forceinline__ float share(float depth) const {   // of the most likely token's weight
        const float e = exp2_(__fmul_rn(-depth, 1.4426950408889634f));
        return e >= min_p ? e : 0.f;
    }
    __device__ __forceinline__ u64 weight(float depth) const { return (u64)__float2ll_rz(share(depth) * WEIGHT_OF_ONE); }
    // A weight in 2^shift: a whole number below 2^25, where the token is in the bin that `shift` is of.
    __device__ __forceinline__ u32 scaled(float depth, int shift) const {
        return (u32)(share(depth) * __uint_as_float((u32)(127 + 44 - shift) << 23));
    }
};
__device__ __forceinline__ u32 units(float depth) { return (u32)(depth * (float)(1 << UNIT_BITS)); }
__device__ __forceinline__ u64 key(float x, float depth) { return (u64)units(depth) << 32 | (u32)~image(x); }
// Weights have 24 bits, and within a bin hardly differ: all of them are multiples of 2^shift. 2^-20ths of log2(e) / 64, a little more.
__device__ __forceinline__ int shift_of(u32 bin) { return max(20 - (int)((bin + 1) * 23638u + 1024u >> 20), 0); }
__device__ __forceinline__ u64 joined(u32 low, u32 high, int shift) { return ((u64)high << LOW_BITS) + low << shift; }

// For all threads, through shared memory that nothing else uses meanwhile.
__device__ __forceinline__ u32 block_max(u32 v, u32 *space) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u32 best = __reduce_max_sync(~0u, v);
    if (lane == 0) space[warp] = best;
    __syncthreads();
    return __reduce_max_sync(~0u, lane < T / 32 ? space[lane] : 0);
}
__device__ __forceinline__ u64 warp_up_to(u64 v) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        u64 other = __shfl_up_sync(~0u, v, d);
        if (lane >= d) v += other;
    }
    return v;
}
// Below 2^64 in all, each below 2^62.
__device__ __forceinline__ u64 warp_sum(u64 v) {
    constexpr u32 MASK = (1 << 22) - 1;
    return __reduce_add_sync(~0u, (u32)v & MASK) + ((u64)__reduce_add_sync(~0u, (u32)(v >> 22) & MASK) << 22)
         + ((u64)__reduce_add_sync(~0u, (u32)(v >> 44)) << 44);
}
// The sum over the threads up to this one.
__device__ __forceinline__ u64 block_up_to(u64 v, u64 *space) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u64 own = warp_up_to(v);
    if (lane == 31) space[warp] = own;
    __syncthreads();
    return own + warp_sum(lane < warp ? space[lane] : 0);
}
__device__ __forceinline__ u64 lane_of(u64 v, int lane) { return __shfl_sync(~0u, v, lane); }
// COUNT sums of all blocks from those of each; as many threads as there are share a sum, of a warp at most.
template <int COUNT> __device__ __forceinline__ void add_blocks(const u64 (&of_block)[CLUSTER][COUNT + 1], u64 (&all)[COUNT]) {
    constexpr int LANES = T / COUNT < 32 ? T / COUNT : 32;
    const int tid = threadIdx.x, lane = tid & 31, n = tid / LANES;
    u64 sum = 0;
#pragma unroll
    for (int i = 0; i < CLUSTER; i += LANES)
        if (i + lane % LANES < CLUSTER) sum += of_block[i + lane % LANES][n];
#pragma unroll
    for (int d = 1; d < LANES; d <<= 1) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane % LANES == 0) all[n] = sum;
}

// Sums that begin at zero.
__device__ __forceinline__ void clear(Shared &sh) {
    const int tid = threadIdx.x;
#pragma unroll 1
    for (int i = tid; i < 2 * BINS / 4; i += T) ((uint4 *)&sh.bins)[i] = make_uint4(0, 0, 0, 0);
    if (tid < FINE) sh.fine_low[tid] = sh.fine_high[tid] = 0;
    if (tid == 0) sh.slot = sh.few_slot = 0;
}

// 53 random bits: Philox4x32-10 of the counter (position, 0, 0, 0).
__device__ __noinline__ double uniform(u32 k0, u32 k1, u32 position) {
    u32 c0 = position, c1 = 0, c2 = 0, c3 = 0;
#pragma unroll 2
    for (int i = 0; i < 10; ++i) {
        u32 high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        u32 high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ k0; c1 = low1;
        c2 = high0 ^ c3 ^ k1; c3 = low0;
        k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
    return (double)(((u64)(c0 >> 5) << 26) + (c1 >> 6)) * 1.1102230246251565e-16;
}

extern "C" __global__ void __launch_bounds__(T, 1024 / T) sample(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &sh = *(Shared *)memory;
    let_successor_start();
    if (threadIdx.x == 0) {
        barrier_init(&sh.sums_are_here, 1);
        barrier_init(&sh.lists_are_here, CLUSTER);
        barriers_are_there();
    }
    cluster_arrives();
    const u32 rank = rank_in_cluster();
    const int s = blockIdx.x / CLUSTER, tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
    const float none = -infinity();
    const int begin = rank * SLICE;   // of this block's logits; a warp's stand side by side
    const int guess = min(s, p.num_rows - 1);
    clear(sh);
    if (tid == 0) {   // on their way to the L2 cache; loaded behind the wait
        prefetch(p.temperature + guess);
        prefetch(p.min_p + guess);
        prefetch(p.top_p + guess);
        prefetch(p.top_k + guess);
        prefetch(p.seed + (long long)guess * p.seed_stride);
        // Of these it is the place that counts, which has to be looked up.
        prefetch(p.logits + (long long)s * VOCAB + min(begin, VOCAB - 1));
        prefetch(p.rows + s);
        prefetch(p.positions + s);
        if (p.parts) prefetch(p.largest + (long long)s * p.parts);
    }
    wait_for_predecessor();
    const float *const from = p.logits + (long long)s * VOCAB + begin;
    const auto place = [&](int c) { return warp * (32 * EACH) + c * 128 + lane * 4; };   // of a thread's four, in this block's logits
    const auto fetch = [&](int at) {
        float4 v = make_float4(none, none, none, none);
        if constexpr (VOCAB % 4 == 0) {
            if (begin + at < VOCAB) v = __ldcg((const float4 *)(from + at));
        } else {
            if (begin + at < VOCAB) v.x = ldcg(from + at);
            if (begin + at + 1 < VOCAB) v.y = ldcg(from + at + 1);
            if (begin + at + 2 < VOCAB) v.z = ldcg(from + at + 2);
            if (begin + at + 3 < VOCAB) v.w = ldcg(from + at + 3);
        }
        return v;
    };
    if (KEEP)
#pragma unroll 1
        for (int c = 0; c < EACH / 4; ++c) {
            const int at = place(c);
            if (VOCAB % 4 == 0 && begin + at < VOCAB) copy_four(sh.row + at / 4, from + at);
            else sh.row[at / 4] = fetch(at);
        }
    const auto kept_logit = [&](int j) { return ((const float *)sh.row)[place(j / 4) + j % 4]; };   // of this thread
    const auto four = [&](int c) { return KEEP ? sh.row[place(c) / 4] : fetch(place(c)); };
    // The row's parameters: those of the row that it probably is, at once.
    int r = guess;
    float temperature, min_p, share;
    int k, seed0, seed1;
    const auto ask = [&] {
        temperature = ldcg(p.temperature + r);
        min_p = ldcg(p.min_p + r);
        share = ldcg(p.top_p + r);
        k = ldcg(p.top_k + r);
        seed0 = ldcg(p.seed + (long long)r * p.seed_stride);
        seed1 = ldcg(p.seed + (long long)r * p.seed_stride + 1);
    };
    const float *const largest = p.largest + (long long)s * p.parts;
    float most = tid < p.parts ? ldcg(largest + tid) : none;
    const int position = ldcg(p.positions + s), row_of = ldcg(p.rows + s);
    ask();
    if (row_of < 0) {
        if (rank == 0 && tid == 0) p.out[s] = 0;
        copied();
        return;
    }
    if (row_of != guess) {
        r = row_of;
        ask();
    }
#pragma unroll 1
    for (int i = tid + T; i < p.parts; i += T) most = fmaxf(most, ldcg(largest + i));
    // With the parts' largest known, blocks need not tell each other theirs.
    const bool known = p.parts > 0, by_count = k > 0 && k < VOCAB, by_weight = share < 1.f;
    u32 top = known ? image(most) : 0;
    copied();   // each thread reads what it has asked for itself
    // All of this thread's logits, four at a time, but those that a filter has taken, and NaN: they are -inf.
    float lowest = none;
    const auto each = [&](const auto &body) {
#pragma unroll 1
        for (int c = 0; c < EACH / 4; c += AHEAD) {
            float4 v[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) v[a] = four(c + a);
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                float x[4] = {v[a].x, v[a].y, v[a].z, v[a].w};
#pragma unroll
                for (int i = 0; i < 4; ++i) x[i] = x[i] >= lowest ? x[i] : none;
                body(x, c + a);
            }
        }
    };
    if (!known)
        each([&](const float (&x)[4], int) {
#pragma unroll
            for (int i = 0; i < 4; ++i) top = max(top, image(x[i]));
        });
    top = block_max(top, sh.words[0]);
    cluster_waits();   // every block runs: its memory may be written
    if (!known) {
        if (tid < CLUSTER) push32(&sh.peak_of[rank], tid, top);
        cluster_meets();
        top = __reduce_max_sync(~0u, lane < CLUSTER ? sh.peak_of[lane] : 0);
    }
    Row row = {logit_of(top), fminf(__fdiv_rn(1.f, temperature), 1e30f), min_p};

    if (!(temperature > 0.f && row.largest > none && row.largest < -none)) {   // the best, the first of equals
        u32 last = 0;
        each([&](const float (&x)[4], int c) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (image(x[i]) == top) last = max(last, ~(u32)(begin + place(c) + i));
        });
        last = block_max(last, sh.words[1]);
        if (tid == 0) push32(&sh.where_of[rank], 0, last);
        cluster_meets();
        if (rank == 0 && tid == 0) {
#pragma unroll 1
            for (int i = 0; i < CLUSTER; ++i) last = max(last, sh.where_of[i]);
            p.out[s] = ~last;
        }
        return;
    }

    // Thresholds: the logit of the least likely token that a filter keeps, the largest at which what is there or above, tokens or their weight,
    // reaches k or the share of all. First the tokens, then their weight; the second starts from what the first has kept.
    u64 own = 0;               // the weight of what this thread keeps
    u64 totals = 0;            // of what block `lane` keeps
    u64 marked = 0;   // this thread's tokens in the threshold's bin
    double u = 0.;
    u32 sums_parity = 0, lists_parity = 0;
    bool known_totals = false, known_own = false, cleared = true;
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter) {
        if (!(filter ? by_weight : by_count)) continue;
        const bool weights = filter;
        u64 base = 0, before = 0, target = k, above = 0;   // keys from `base` on; weight of those before, in all blocks and in this warp's
        int shift = 32 + BIN_SHIFT, scale = 0;
        u32 image_of_lowest = 0;
        known_totals = false;
#pragma unroll 1
        for (bool first = true;; first = false) {
            if (!cleared) {
                __syncthreads();
                clear(sh);
                __syncthreads();
            }
            cleared = false;
            if (tid == 0) barrier_expects(&sh.sums_are_here, rank, CLUSTER * GROUPS * 8);
            const auto add = [](u32 *low, u32 *high, u32 amount) {
                add_shared(low, amount & (1u << LOW_BITS) - 1);
                add_shared(high, amount >> LOW_BITS);
            };
            // Without a branch, so that four are on their way; those that count nothing do not meet in a bin.
            const auto bin_of = [&](float d) { return d < BOTTOM ? units(d) >> BIN_SHIFT : (int)BOTTOM * 64 + lane; };
            if (first && weights)
                each([&](const float (&x)[4], int) {
                    u32 bin[4], amount[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float d = fminf(row.depth(x[i]), BOTTOM);
                        bin[i] = bin_of(d);
                        amount[i] = row.scaled(d, shift_of(bin[i]));
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) add(sh.bins.low + bin[i], sh.bins.high + bin[i], amount[i]);
                });
            else if (first)
                each([&](const float (&x)[4], int) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float d = fminf(row.depth(x[i]), BOTTOM);
                        add_shared(&sh.bins.low[bin_of(d)], d < BOTTOM);
                    }
                });
            else
                each([&](const float (&x)[4], int) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float d = row.depth(x[i]);
                        const u64 all = d < BOTTOM ? key(x[i], d) : ~0ull;
                        if (all < base || all - base >> shift >= BINS) continue;
                        const u32 bin = all - base >> shift;
                        add(sh.bins.low + bin, sh.bins.high + bin, weights ? row.scaled(d, scale) : 1);
                    }
                });
            __syncthreads();
            const auto scale_of = [&](u32 bin) { return !weights ? 0 : first ? shift_of(bin) : scale; };
            {
                constexpr int PER = BINS / T, LANES = GROUP / PER;   // bins of a thread; threads of a group
                u64 sum = 0;
#pragma unroll
                for (int i = 0; i < PER; i += 2) {
                    const uint2 low = *(const uint2 *)(sh.bins.low + tid * PER + i), high = *(const uint2 *)(sh.bins.high + tid * PER + i);
                    sum += joined(low.x, high.x, scale_of(tid * PER + i)) + joined(low.y, high.y, scale_of(tid * PER + i + 1));
                }
#pragma unroll
                for (int d = 1; d < LANES; d <<= 1) sum += __shfl_xor_sync(~0u, sum, d);
#pragma unroll
                for (int i = 0; i < CLUSTER; i += LANES)
                    if (i + lane % LANES < CLUSTER) send64(&sh.group_of[rank][tid / LANES], i + lane % LANES, sum, &sh.sums_are_here);
            }
            if (weights && first) u = uniform(seed0, seed1, position);   // while the others' come
            barrier_waits(&sh.sums_are_here, sums_parity);
            sums_parity ^= 1;
            // All blocks' sums, a few groups for each warp; then each warp looks for the group in which the threshold is.
            add_blocks<GROUPS>(sh.group_of, sh.group_all);
            __syncthreads();
            const u64 one = sh.group_all[2 * lane], two = sh.group_all[2 * lane + 1];
            const u64 up_to_two = before + warp_up_to(one + two), up_to_one = up_to_two - two;
            if (first) {
                const u64 whole = lane_of(up_to_two, 31);
                if (weights) target = max((u64)((double)share * (double)whole), (u64)1);
                else if (whole < k) {
                    cluster_meets();   // all have read what comes next
                    break;
                }
            }
            const int group = min(__popc(__ballot_sync(~0u, up_to_one < target)) + __popc(__ballot_sync(~0u, up_to_two < target)), GROUPS - 1);
            before = lane_of(group % 2 ? up_to_one : up_to_one - one, group / 2);
            if (warp < CLUSTER) {
                const u32 bin = group * GROUP + lane;
                sh.bin_of[warp][lane] = joined(remote32(&sh.bins.low[bin], warp), remote32(&sh.bins.high[bin], warp), scale_of(bin));
            }
            __syncthreads();
            add_blocks<GROUP>(sh.bin_of, sh.bin_all);
            __syncthreads();
            const u64 here = sh.bin_all[lane], up_to = before + warp_up_to(here);
            const int within = min(__popc(__ballot_sync(~0u, up_to < target)), GROUP - 1);
            before = lane_of(up_to - here, within);
            const u32 found = group * GROUP + within;
            if (weights && warp < CLUSTER)
                above += warp_sum((2 * lane < group ? sh.group_of[warp][2 * lane] : 0) + (2 * lane + 1 < group ? sh.group_of[warp][2 * lane + 1] : 0)
                                  + (lane < within ? sh.bin_of[warp][lane] : 0));
            if (first) scale = scale_of(found);

            // The tokens of the bin, to all blocks.
            const float begins = found * (1.f / 64), ends = (found + 1) * (1.f / 64);
            const u64 from_key = base + ((u64)found << shift);
            marked = 0;
            const auto in_bin = [&](float x) {
                const float d = row.depth(x);
                const u64 all = d < BOTTOM ? key(x, d) : ~0ull;
                return all >= from_key && all - from_key >> shift == 0;
            };
            if (KEEP) {   // marked first: few threads have any
                if (first)
                    each([&](const float (&x)[4], int c) {
                        u32 hits = 0;
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const float d = row.depth(x[i]);
                            hits |= (u32)(d >= begins & d < ends) << i;
                        }
                        marked |= (u64)hits << 4 * c;
                    });
                else
                    each([&](const float (&x)[4], int c) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) marked |= (u64)in_bin(x[i]) << 4 * c + i;
                    });
                u32 to = marked ? take_shared(&sh.slot, __popcll(marked)) : 0;
#pragma unroll 1
                for (u64 left = marked; left; left &= left - 1, ++to)
                    if (to < LIST) sh.list[to] = kept_logit(__ffsll(left) - 1);
            } else
                each([&](const float (&x)[4], int) {
                    u32 hits = 0;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float d = row.depth(x[i]);
                        hits |= (u32)(first ? d >= begins & d < ends : in_bin(x[i])) << i;
                    }
                    if (!hits) return;
                    u32 to = take_shared(&sh.slot, __popc(hits));
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (hits >> i & 1) {
                            if (to < LIST) sh.list[to] = x[i];
                            ++to;
                        }
                });
            __syncthreads();
            const u32 mine = sh.slot;
            const int other = warp % CLUSTER, turn = warp / CLUSTER;
            const u32 sent = mine <= LIST ? mine : 0;
            if (turn == 0 && lane == 0) {
                barrier_expects(&sh.lists_are_here, other, 4 * sent + 4);
                send32(&sh.length_of[rank], other, mine, &sh.lists_are_here);
            }
#pragma unroll 1
            for (u32 i = turn * 32 + lane; i < sent; i += PARTS * 32)
                send32((u32 *)&sh.list_of[rank][i], other, __float_as_uint(sh.list[i]), &sh.lists_are_here);
            // While the others come: the weight of those in front of the bin.
            known_own = KEEP && first && weights;
            if (known_own) {
                own = 0;
                each([&](const float (&x)[4], int) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float d = row.depth(x[i]);
                        own += row.weight(d < begins ? d : infinity());
                    }
                });
            }
            barrier_waits(&sh.lists_are_here, lists_parity);
            lists_parity ^= 1;
            const u32 longest = __reduce_max_sync(~0u, lane < CLUSTER ? sh.length_of[lane] : 0);
            if (longest <= LIST) {
                const u32 length = sh.length_of[other];
                const int local = max(shift - FINE_BITS, 0);
                const auto fine = [&](float x, float d) {
                    return first ? (units(d) >> BIN_SHIFT - FINE_BITS) - (found << FINE_BITS) : (u32)(key(x, d) - from_key >> local);
                };
                const auto listed = [&](const auto &body) {
#pragma unroll 1
                    for (u32 i = turn * 32 + lane; i < length; i += PARTS * 32) {
                        const float x = sh.list_of[other][i], d = row.depth(x);
                        body(x, fine(x, d), weights ? row.scaled(d, scale) : 1);
                    }
                };
                listed([&](float, u32 bin, u32 amount) { add(sh.fine_low + bin, sh.fine_high + bin, amount); });
                __syncthreads();
                const uint4 low = ((const uint4 *)sh.fine_low)[lane], high = ((const uint4 *)sh.fine_high)[lane];
                const u64 f0 = joined(low.x, high.x, scale), f1 = f0 + joined(low.y, high.y, scale), f2 = f1 + joined(low.z, high.z, scale);
                const u64 f3 = f2 + joined(low.w, high.w, scale), from_four = before + warp_up_to(f3) - f3;
                const u32 bin = min(__popc(__ballot_sync(~0u, from_four + f0 < target)) + __popc(__ballot_sync(~0u, from_four + f1 < target))
                                    + __popc(__ballot_sync(~0u, from_four + f2 < target)) + __popc(__ballot_sync(~0u, from_four + f3 < target)), FINE - 1);
                const u64 sure = lane_of(from_four + (bin % 4 == 0 ? 0 : bin % 4 == 1 ? f0 : bin % 4 == 2 ? f1 : f2), bin / 4);
                u64 kept = 0;
                listed([&](float x, u32 in, u32 amount) {
                    if (in < bin) kept += (u64)amount << scale;
                    if (in != bin) return;
                    const u32 to = take_shared(&sh.few_slot, 1);
                    if (to >= T) return;
                    sh.few.weight[to] = (u64)amount << scale;
                    sh.few.image[to] = image(x);
                    sh.few.owner[to] = other;
                });
                kept = warp_sum(kept);
                if (lane == 0) sh.kept_of[warp] = above + kept;
                __syncthreads();
                const u32 few = sh.few_slot;
                if (few <= T) {   // each with each
                    const auto above_or_at = [&](u32 image) {
                        u64 sum = sure;
#pragma unroll 4
                        for (u32 i = 0; i < few; ++i) sum += sh.few.image[i] >= image ? sh.few.weight[i] : 0;
                        return sum;
                    };
                    if (few <= 32) {   // by each warp
                        const u32 image = lane < few ? sh.few.image[lane] : 0;
                        image_of_lowest = __reduce_max_sync(~0u, above_or_at(image) >= target ? image : 0);
                    } else {
                        const u32 image = tid < few ? sh.few.image[tid] : 0;
                        image_of_lowest = block_max(image && above_or_at(image) >= target ? image : 0, sh.words[0]);
                    }
                    if (weights) {
                        known_totals = true;
                        totals = 0;
                        if (lane < CLUSTER) {
#pragma unroll
                            for (int i = 0; i < PARTS; ++i) totals += sh.kept_of[i * CLUSTER + lane];
                        }
#pragma unroll 1
                        for (u32 i = 0; i < few; i += 4)
#pragma unroll
                            for (u32 j = i; j < i + 4; ++j)
                                totals += (j < few) & (sh.few.owner[j] == lane) & (sh.few.image[j] >= image_of_lowest) ? sh.few.weight[j] : 0;
                    }
                    break;
                }
            }
            base = from_key;
            if (shift == 0) {   // all of them are the same logit
                image_of_lowest = ~(u32)base;
                break;
            }
            shift = max(shift - BIN_BITS, 0);
        }
        if (image_of_lowest) lowest = logit_of(image_of_lowest);
    }
    const auto weight = [&](float x) { return row.weight(x >= lowest ? row.depth(x) : infinity()); };

    // The first token at which the running sum of weights exceeds the target: its block, its thread, and it.
    const auto weigh_all = [&] {
        own = 0;
        each([&](const float (&x)[4], int) {
#pragma unroll
            for (int i = 0; i < 4; ++i) own += weight(x[i]);
        });
    };
    if (!known_totals) {
        weigh_all();
        const u64 sum = warp_sum(own);
        if (lane == 0) sh.kept_of[warp] = sum;
        __syncthreads();
        const u64 all = warp_sum(lane < NW ? sh.kept_of[lane] : 0);
        if (tid < CLUSTER) push64(&sh.total_of[rank], tid, all);
        cluster_arrives();
    }
    if (!known_totals) {
        u = uniform(seed0, seed1, position);
        cluster_waits();
        totals = lane < CLUSTER ? sh.total_of[lane] : 0;
    }
    const u64 up_to = warp_up_to(totals), total = lane_of(up_to, 31);
    u64 target = (u64)(u * (double)total);
    if (target >= total) target = total - 1;
    const int block = __popc(__ballot_sync(~0u, up_to <= target));
    if (block != (int)rank) return;
    u64 before = lane_of(up_to - totals, block);
    if (known_totals) {
        if (!known_own) weigh_all();
        else
#pragma unroll 1
            for (; marked; marked &= marked - 1)
                own += weight(kept_logit(__ffsll(marked) - 1));
    }
    own = warp_sum(own);
    if (lane == 0) sh.sums[1][warp] = own;
    __syncthreads();
    own = lane < NW ? sh.sums[1][lane] : 0;
    const u64 up_to_warp = before + warp_up_to(own);
    const int chosen = __popc(__ballot_sync(~0u, up_to_warp <= target && lane < NW));
    before = lane_of(up_to_warp - own, chosen);
    // All threads for its logits.
    constexpr int SHARE = (32 * EACH + T - 1) / T;
    const auto of_warp = [&](int i) {
        const int at = chosen * (32 * EACH) + i;
        return weight(i >= 32 * EACH ? none : KEEP ? ((const float *)sh.row)[at] : begin + at < VOCAB ? ldcg(from + at) : none);
    };
    own = 0;
#pragma unroll 1
    for (int i = 0; i < SHARE; ++i) own += of_warp(tid * SHARE + i);
    before += block_up_to(own, sh.sums[0]) - own;
    if (before <= target && target < before + own) {
        int i = tid * SHARE;
#pragma unroll 1
        for (int more = SHARE - 1; more; --more, ++i) {
            before += of_warp(i);
            if (before > target) break;
        }
        p.out[s] = begin + chosen * (32 * EACH) + i;
    }
}
