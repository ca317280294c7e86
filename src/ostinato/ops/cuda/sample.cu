// Temperature, top-k, top-p and min-p, and the draw, in one launch: a cluster of blocks for each row, which
// keeps the row in shared memory. What the blocks find out they exchange through each other's shared memory.
//
// Meaning, integers and random numbers are those of ostinato/sampling.py. A threshold is found by counting,
// never by sorting. Tokens are ordered by a 64-bit key: the depth (m - x) / temperature in 2^-26ths, then
// the logit itself from above. First 512 bins of a sixteenth of depth count tokens; that says in which one the k-th
// lies, and bounds each bin's weight, so that two or three remain for top-p. Those are cut into 128 with
// exact weights; then the few tokens of one such bin are compared with each other. Were they too many, their bin
// would be cut again. Tokens in those two or three are noted when their weights are added, and only they are looked at again. Sums are of integers: no order of additions, and no cut of the row, shows in a token.
//
// Loops stay loops: in a decode step this code runs once, from a cold cache, where every line of it costs time.
//
// Macros: VOCAB CLUSTER THREADS EACH (logits of a thread, a multiple of 4)

#include "common.cuh"

constexpr int T = THREADS;
constexpr int SLICE = EACH * T;
constexpr int COARSE = 512, FINE_BITS = 7, FINE = 1 << FINE_BITS;
constexpr int LIST = T / CLUSTER;   // most tokens of a bin that a block may contribute
constexpr int UNROLL = 2;
constexpr int NEAR = 2048;          // tokens that a block notes, at most
constexpr int PART_BITS = 15;       // of a weight: sums of a block in 32 bits
constexpr int UNIT_BITS = 26, COARSE_BITS = UNIT_BITS - 4;   // of a depth in 2^-26ths; a sixteenth
constexpr float BOTTOM = 31.f;                               // exp(-31) * 2^44 < 1
constexpr float WEIGHT_OF_ONE = 17592186044416.f, BOUND_OF_ONE = 1099511627776.f;   // 2^44, 2^40
static_assert(CLUSTER * SLICE >= VOCAB && EACH % 4 == 0, "the row fits");
static_assert(T >= COARSE && T <= 1024 && CLUSTER % (T / COARSE * 2) == 0, "a thread for each bin");
static_assert(SLICE < 1 << 16 && SLICE <= 1 << (32 - PART_BITS) && 3 * PART_BITS > 44, "parts of weights add up");

struct Params {
    const float *logits;       // [S, VOCAB]
    const int *rows;           // [S]
    const int *positions;      // [S]
    const float *temperature, *min_p, *top_p;   // by row
    const int *top_k, *seed;   // by row; seed [R, 2]
    int *out;                  // [S]
    const float *largest;      // [S, parts]: of parts of each row, or null
    int seed_stride, parts;
};

struct Shared {
    float row[SLICE];                        // logit j of thread t at [j * T + t]
    u64 fine[FINE];                          // this block's, for the cluster to read
    u64 above_of[CLUSTER], all_of[CLUSTER], total_of[CLUSTER];
    u64 amount_of[CLUSTER * LIST], amount[CLUSTER * LIST];   // by block, and one behind the other
    u64 sums[6][32];
    u64 kept;
    u32 own[COARSE], coarse[COARSE / 2], coarse_all[COARSE];   // this block's; the same, two in a word; the cluster's
    u32 part[3][FINE], count[FINE];
    u32 image_of[CLUSTER * LIST], image[CLUSTER * LIST], length_of[CLUSTER];
    u32 words[3][32];
    u32 peak_of[CLUSTER], where_of[CLUSTER];
    u32 slot, notes;
    unsigned short note[NEAR];              // places in `row`
};

static_assert(sizeof(Shared) <= 4 * SLICE + 24 * T + 16384, "what ops/cuda/sample.py asks for");

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
__device__ __forceinline__ u64 remote64(const u64 *p, u32 rank) {
    u64 v;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(v) : "r"(shared_of(p, rank)) : "memory");
    return v;
}
__device__ __forceinline__ void push32(u32 *p, u32 rank, u32 v) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(shared_of(p, rank)), "r"(v) : "memory");
}
__device__ __forceinline__ void push64(u64 *p, u32 rank, u64 v) {
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(shared_of(p, rank)), "l"(v) : "memory");
}
__device__ __forceinline__ void cluster_arrives() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_waits() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_meets() { cluster_arrives(); cluster_waits(); }
// The order in which a block goes through the others: not all ask the same one at once.
__device__ __forceinline__ u32 peer(u32 rank, int i) { return (rank + i) % CLUSTER; }

// The same order as the logits, never 0.
__device__ __forceinline__ u32 image(float x) {
    u32 bits = __float_as_uint(x);
    return bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
}
__device__ __forceinline__ float logit_of(u32 image) {
    return __uint_as_float(image & 0x80000000u ? image ^ 0x80000000u : ~image);
}

struct Row {
    float largest, inverse, min_p;
    // Each step rounds by itself: a larger logit is never deeper.
    __device__ __forceinline__ float depth(float x) const { return __fmul_rn(__fsub_rn(largest, x), inverse); }
    __device__ __forceinline__ u64 weight(float depth) const {
        float e = exp2_(__fmul_rn(-depth, 1.4426950408889634f));
        return e >= min_p ? (u64)__float2ll_rz(e * WEIGHT_OF_ONE) : 0;
    }
};
__device__ __forceinline__ u32 units(float depth) { return (u32)(depth * (float)(1 << UNIT_BITS)); }

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
struct Sums { u64 a, b, all_a, all_b; };
// Sums of a number, or TWO, over the threads up to this one, and over all. `space`: a row for each.
template <bool TWO>
__device__ __noinline__ Sums block_up_to(u64 a, u64 b, u64 (*space)[32]) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Sums own = {warp_up_to(a), TWO ? warp_up_to(b) : 0, 0, 0};
    if (lane == 31) {
        space[0][warp] = own.a;
        if (TWO) space[1][warp] = own.b;
    }
    __syncthreads();
    a = lane < T / 32 ? space[0][lane] : 0;
    own.all_a = warp_sum(a);
    own.a += warp_sum(lane < warp ? a : 0);
    if (TWO) {
        b = lane < T / 32 ? space[1][lane] : 0;
        own.all_b = warp_sum(b);
        own.b += warp_sum(lane < warp ? b : 0);
    }
    return own;
}

// Counts that begin at zero.
__device__ __forceinline__ void clear(Shared &sh) {
    const int tid = threadIdx.x;
    if (tid < COARSE) sh.own[tid] = sh.coarse_all[tid] = 0;
    if (tid < FINE) sh.part[0][tid] = sh.part[1][tid] = sh.part[2][tid] = sh.count[tid] = 0;
    if (tid == 0) sh.slot = sh.notes = 0;
}
__device__ __forceinline__ void count(Shared &sh, float depth) {
    const u32 bin = units(depth) >> COARSE_BITS;
    if (depth < BOTTOM) atomicAdd(&sh.own[bin], 1u);   // of equal places, and of one: the fast instruction
}

// The image of the least likely token that a filter keeps: the largest at which what is there or above, tokens or,
// `by_weight`, their weight, reaches `k` or the share of all. 0: it keeps everything. `counted`: tokens by depth are there.
// Also the weight of what it keeps of this thread's tokens; ~0: not known.
struct Kept { u64 own; u32 lowest; };
__device__ __noinline__ Kept threshold(Shared &sh, const Row row, u32 rank, bool by_weight, u64 k, float share, bool counted) {
    const int tid = threadIdx.x;
    if (!counted) {
        clear(sh);
        __syncthreads();
#pragma unroll UNROLL
        for (int j = 0; j < EACH; ++j) count(sh, row.depth(sh.row[j * T + tid]));
    }
    __syncthreads();
    if (tid < COARSE / 2) sh.coarse[tid] = sh.own[2 * tid] | sh.own[2 * tid + 1] << 16;
    cluster_meets();
    {
        constexpr int PARTS = T / (COARSE / 2), SHARE = CLUSTER / PARTS;
        const int word = tid % (COARSE / 2), part = tid / (COARSE / 2);
        u32 even = 0, odd = 0;
#pragma unroll 4
        for (int i = 0; i < SHARE; ++i) {
            u32 two = remote32(&sh.coarse[word], peer(rank, part * SHARE + i));
            even += two & 0xffff;
            odd += two >> 16;
        }
        atomicAdd(&sh.coarse_all[2 * word], even);
        atomicAdd(&sh.coarse_all[2 * word + 1], odd);
    }
    __syncthreads();
    const bool has = tid < COARSE;
    const u64 n = has ? sh.coarse_all[tid] : 0;
    int first, last;
    if (by_weight) {
        // Bounds of the bin's weight, in 2^40ths of the most likely token's. A thousandth covers exp.
        const float most_each = __expf(-tid * 0.0625f) * 1.001f, least_each = __expf(-(tid + 1) * 0.0625f) * 0.999f;
        // At most and at least: up to this bin, and of all.
        const Sums up_to = block_up_to<true>(most_each < row.min_p ? 0 : n * ((u64)(most_each * BOUND_OF_ONE) + 1),
                                       least_each < row.min_p ? 0 : n * (u64)(least_each * BOUND_OF_ONE), sh.sums);
        // The threshold is the first at which above * (1 - share) >= below * share.
        const float rest = 1.f - share;
        const bool never = (float)up_to.a * rest < (float)(up_to.all_b - up_to.b) * share;
        const bool surely = (float)up_to.b * rest >= (float)(up_to.all_a - up_to.a) * share;
        first = min(__syncthreads_count(has && never), COARSE - 1);
        last = max(first, min(__syncthreads_count(has && !surely), COARSE - 1));
    } else {
        const Sums up_to = block_up_to<false>(n, 0, sh.sums);
        if (up_to.all_a < k) {
            cluster_meets();   // all have read what the next call clears
            return {~0ull, 0};
        }
        first = last = __syncthreads_count(has && up_to.a < k);
    }

    // Cut what is left of the order of keys, until the tokens of a bin are few.
    const int wide = 32 - __clz(last - first);
    const float begins = first * 0.0625f, ends = begins + (1 << wide) * 0.0625f;   // where the bins below do
    u64 base = (u64)((u32)first << COARSE_BITS) << 32, kept, target = k;
    int shift = 32 + COARSE_BITS - FINE_BITS + wide, found;
    auto bin_of = [&](float d, float logit) -> u64 {   // huge for those before it
        u64 key = (u64)units(d) << 32 | (u32)~image(logit);
        return key < base ? ~0ull : key - base >> shift;
    };
    auto put = [&](float d, u64 bin) {
        atomicAdd(&sh.count[bin], 1u);
        if (!by_weight) return;
        const u64 amount = row.weight(d);
#pragma unroll
        for (int i = 0; i < 3; ++i) atomicAdd(&sh.part[i][bin], (u32)(amount >> (i * PART_BITS)) & ((1u << PART_BITS) - 1));
    };
    u64 firsts = 0;
    u32 notes, looks;
    bool noted;
    for (bool again = false;; again = true) {
        u64 before = 0, whole = 0;
        if (!again)
#pragma unroll UNROLL
            for (int j = 0; j < EACH; ++j) {
                const float d = row.depth(sh.row[j * T + tid]);
                if (!(d < BOTTOM)) continue;
                const u64 amount = by_weight ? row.weight(d) : 1;
                whole += amount;
                if (d < begins) before += amount;
                else if (d < ends) {
                    const u32 at = atomicAdd(&sh.notes, 1u);
                    if (at < NEAR) sh.note[at] = j * T + tid;
                }
            }
        else
#pragma unroll 1
            for (int j = 0; j < EACH; ++j) {
                const float x = sh.row[j * T + tid], d = row.depth(x);
                if (!(d < BOTTOM)) continue;
                const u64 amount = by_weight ? row.weight(d) : 1;
                whole += amount;
                if (bin_of(d, x) == ~0ull) before += amount;
            }
        if (!again) firsts = before;
        before = warp_sum(before);
        whole = warp_sum(whole);
        if (tid % 32 == 0) { sh.sums[2][tid / 32] = before; sh.sums[3][tid / 32] = whole; }
        __syncthreads();
        if (tid < 32) {
            before = warp_sum(tid < T / 32 ? sh.sums[2][tid] : 0);
            whole = warp_sum(tid < T / 32 ? sh.sums[3][tid] : 0);
            if (tid < CLUSTER) {
                push64(&sh.above_of[rank], tid, before);
                push64(&sh.all_of[rank], tid, whole);
            }
        }
        // Those noted, or all where there was no room.
        notes = sh.notes;
        noted = notes <= NEAR;
        looks = noted ? notes : SLICE;
#pragma unroll 1
        for (u32 i = tid; i < looks; i += T) {
            const float x = sh.row[noted ? sh.note[i] : i], d = row.depth(x);
            if (!(d < BOTTOM)) continue;
            const u64 bin = bin_of(d, x);
            if (bin < FINE) put(d, bin);
        }
        __syncthreads();
        if (tid < FINE)
            sh.fine[tid] = by_weight ? sh.part[0][tid] + ((u64)sh.part[1][tid] << PART_BITS) + ((u64)sh.part[2][tid] << 2 * PART_BITS)
                                     : sh.count[tid];
        cluster_meets();
        u64 here = 0;
        if (tid < FINE)
#pragma unroll 4
            for (int i = 0; i < CLUSTER; ++i) here += remote64(&sh.fine[tid], peer(rank, i));
        before = whole = 0;
#pragma unroll 1
        for (int i = 0; i < CLUSTER; ++i) {
            before += sh.above_of[i];
            whole += sh.all_of[i];
        }
        if (by_weight) {
            target = (u64)((double)share * (double)whole);
            if (target == 0) target = 1;
        }
        const u64 up_to = before + block_up_to<false>(here, 0, sh.sums).a;
        found = min(__syncthreads_count(tid < FINE && up_to < target), FINE - 1);
        if (tid == found) sh.kept = up_to - here;
        const u32 own = sh.count[found];
        if (own <= LIST && own > 0) {
#pragma unroll 1
            for (u32 i = tid; i < looks; i += T) {
                const float x = sh.row[noted ? sh.note[i] : i], d = row.depth(x);
                if (!(d < BOTTOM) || bin_of(d, x) != (u64)found) continue;
                u32 at = atomicAdd(&sh.slot, 1u);
                sh.image[at] = image(x);
                sh.amount[at] = by_weight ? row.weight(d) : 1;
            }
            __syncthreads();
            if (tid / CLUSTER < own) {   // to each block by a thread of its own
                push32(&sh.image_of[rank * LIST + tid / CLUSTER], tid % CLUSTER, sh.image[tid / CLUSTER]);
                push64(&sh.amount_of[rank * LIST + tid / CLUSTER], tid % CLUSTER, sh.amount[tid / CLUSTER]);
            }
        }
        if (tid < CLUSTER) push32(&sh.length_of[rank], tid, own);
        cluster_meets();
        kept = sh.kept;
        u32 longest = 0;
#pragma unroll 1
        for (int i = 0; i < CLUSTER; ++i) longest = max(longest, sh.length_of[i]);
        if (longest <= LIST) break;
        base += (u64)found << shift;
        if (shift == 0) return {~0ull, ~(u32)base};   // all of them are the same logit
        shift = max(shift - FINE_BITS, 0);
        if (tid < FINE) sh.part[0][tid] = sh.part[1][tid] = sh.part[2][tid] = sh.count[tid] = 0;
        if (tid == 0) sh.slot = 0;
        cluster_meets();   // all have read the lengths
    }

    // Each token of the bin with each.
    u32 length = 0, at = 0;
#pragma unroll 1
    for (int i = 0; i < CLUSTER; ++i) {
        if (i == tid / LIST) at = length;
        length += sh.length_of[i];
    }
    if (tid % LIST < sh.length_of[tid / LIST]) {
        sh.image[at + tid % LIST] = sh.image_of[tid];
        sh.amount[at + tid % LIST] = sh.amount_of[tid];
    }
    __syncthreads();
    u32 lowest = 0;
#pragma unroll 1
    for (u32 of = tid / 32 * 8; of < length; of += T / 4) {     // four lanes for each
        const u32 e = of + tid % 32 / 4, own = e < length ? sh.image[e] : 0;
        u64 sum = tid % 4 ? 0 : kept;
#pragma unroll 2
        for (u32 i = tid % 4; i < length; i += 4) sum += sh.image[i] >= own ? sh.amount[i] : 0;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (e < length && sum >= target) lowest = max(lowest, own);
    }
    lowest = block_max(lowest, sh.words[2]);
    // What a thread keeps: its tokens before the bins, and those noted that reach the threshold.
    if (!by_weight || !noted || !lowest) return {~0ull, lowest};
    u64 *weights = sh.amount_of;    // nobody needs it any more
    static_assert(CLUSTER * LIST == T, "one for each thread");
    weights[tid] = 0;
    __syncthreads();
#pragma unroll 1
    for (u32 i = tid; i < notes; i += T) {
        const u32 at = sh.note[i];
        const float x = sh.row[at];
        if (image(x) >= lowest) atomicAdd(&weights[at % T], row.weight(row.depth(x)));
    }
    __syncthreads();
    return {firsts + weights[tid], lowest};
}

// 53 random bits: Philox4x32-10 of the counter (position, 0, 0, 0).
__device__ __forceinline__ double uniform(u32 k0, u32 k1, u32 position) {
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
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    cluster_arrives();
    clear(sh);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    const int s = blockIdx.x / CLUSTER, tid = threadIdx.x;
    const float none = -__int_as_float(0x7f800000);
    const int begin = rank * SLICE + tid * EACH;   // a thread's logits stand side by side: sums go in their order
    const float *from = p.logits + (long long)s * VOCAB + begin;
    // The first two are on their way while the row's parameters are.
    auto load = [&](int j) {
        float4 v = make_float4(none, none, none, none);
        if constexpr (VOCAB % 4 == 0) {
            if (begin + j < VOCAB) v = __ldcg((const float4 *)(from + j));
        } else {
            if (begin + j < VOCAB) v.x = __ldcg(from + j);
            if (begin + j + 1 < VOCAB) v.y = __ldcg(from + j + 1);
            if (begin + j + 2 < VOCAB) v.z = __ldcg(from + j + 2);
            if (begin + j + 3 < VOCAB) v.w = __ldcg(from + j + 3);
        }
        return v;
    };
    float4 one = load(0), two = EACH > 4 ? load(4) : one;
    const int r = p.rows[s], position = p.positions[s];
    if (r < 0) {
        if (rank == 0 && tid == 0) p.out[s] = 0;
        return;
    }
    const float temperature = p.temperature[r], share = p.top_p[r], min_p = p.min_p[r];
    const int k = p.top_k[r];
    const int *seed = p.seed + (long long)r * p.seed_stride;
    const double u = uniform(seed[0], seed[1], position);
    // With the parts' largest known, blocks need not tell each other theirs, and count tokens as they come.
    u32 top = tid < p.parts ? image(__ldcg(p.largest + (long long)s * p.parts + tid) + 0.f) : 0;
    const bool known = p.parts > 0, by_count = k > 0 && k < VOCAB, by_weight = share < 1.f;
    Row row = {0.f, fminf(__fdiv_rn(1.f, temperature), 1e30f), min_p};
    if (known) {
        top = block_max(top, sh.words[0]);
        row.largest = logit_of(top);
    }
    auto keep = [&](int j, float x) {
        x = x != x ? none : x + 0.f;   // NaN is -inf; -0.0 and 0.0 tie
        sh.row[j * T + tid] = x;
        if (!known) top = max(top, image(x));
        else if (by_count || by_weight) count(sh, row.depth(x));
    };
#pragma unroll 1
    for (int j = 0; j < EACH; j += 4) {
        float4 now = one;
        one = two;
        if (EACH > 8 && j + 8 < EACH) two = load(j + 8);
        keep(j, now.x);
        keep(j + 1, now.y);
        keep(j + 2, now.z);
        keep(j + 3, now.w);
    }
    cluster_waits();   // every block runs: its memory may be written
    if (!known) {
        top = block_max(top, sh.words[0]);
        if (tid < CLUSTER) push32(&sh.peak_of[rank], tid, top);
        cluster_meets();
#pragma unroll 1
        for (int i = 0; i < CLUSTER; ++i) top = max(top, sh.peak_of[i]);
        row.largest = logit_of(top);
    }

    if (!(temperature > 0.f && row.largest > none && row.largest < -none)) {   // the best, the first of equals
        u32 last = 0;
#pragma unroll 1
        for (int j = EACH - 1; j >= 0; --j)
            if (image(sh.row[j * T + tid]) == top) last = ~(u32)(begin + j);
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
    // First the tokens, then their weight; the second starts from what the first has kept.
    bool counted = known;
    Kept kept = {~0ull, 0};
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        if (!(i ? by_weight : by_count)) continue;
        kept = threshold(sh, row, rank, i, k, share, counted);
        counted = false;
        if (i == 0 && by_weight)
#pragma unroll UNROLL
            for (int j = 0; j < EACH; ++j)
                if (image(sh.row[j * T + tid]) < kept.lowest) sh.row[j * T + tid] = none;
    }
    const float lowest = kept.lowest ? logit_of(kept.lowest) : none;
    auto weight = [&](int j) -> u64 {
        const float x = sh.row[j * T + tid];
        return row.weight(x >= lowest ? row.depth(x) : infinity());
    };

    // The first token at which the running sum of weights exceeds the target.
    u64 own = kept.own, total = 0;
    if (own == ~0ull) {
        own = 0;
#pragma unroll UNROLL
        for (int j = 0; j < EACH; ++j) own += weight(j);
    }
    const Sums sums = block_up_to<false>(own, 0, sh.sums + 4);
    u64 before = sums.a - own;
    if (tid < CLUSTER) push64(&sh.total_of[rank], tid, sums.all_a);
    cluster_meets();
#pragma unroll 1
    for (int i = 0; i < CLUSTER; ++i) {
        if (i < (int)rank) before += sh.total_of[i];
        total += sh.total_of[i];
    }
    u64 target = (u64)(u * (double)total);
    if (target >= total) target = total - 1;
    if (before <= target && target < before + own) {
        int chosen = 0;
#pragma unroll UNROLL
        for (int j = 0; j < EACH; ++j) {
            before += weight(j);
            chosen += before <= target;
        }
        p.out[s] = begin + chosen;
    }
}
