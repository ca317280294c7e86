// Temperature, top-k, top-p and min-p, and the draw, in one launch: a cluster of blocks for each row, which
// keeps the row in registers. What the blocks find out they exchange through each other's shared memory.
//
// Meaning, integers and random numbers are those of ostinato/sampling.py. A threshold is found by counting,
// never by sorting. Tokens are ordered by a 64-bit key: the depth (m - x) / temperature in 2^-26ths, then
// the logit itself from above. First 512 bins of a sixteenth of depth count tokens; that says in which one the k-th
// lies, and bounds each bin's weight, so that two or three remain for top-p. Those are cut into 256 with
// exact weights; then the few tokens of one such bin are compared with each other. Were they too many, their bin
// would be cut again. Sums are of integers: no order of additions, and no cut of the row, shows in a token.
//
// Macros: VOCAB CLUSTER THREADS EACH (logits of a thread, a multiple of 4)

#include "common.cuh"

constexpr int T = THREADS;
constexpr int SLICE = EACH * T;
constexpr int COARSE = 512, FINE = 256, LIST = T;
constexpr int UNIT_BITS = 26, COARSE_BITS = UNIT_BITS - 4;   // of a depth in 2^-26ths; a sixteenth
constexpr float BOTTOM = 31.f;                               // exp(-31) * 2^44 < 1
constexpr float WEIGHT_OF_ONE = 17592186044416.f, BOUND_OF_ONE = 1099511627776.f;   // 2^44, 2^40
static_assert(CLUSTER * SLICE >= VOCAB && EACH % 4 == 0, "the row fits");
static_assert(T >= COARSE && T <= 1024 && CLUSTER % (T / COARSE) == 0, "a thread for each bin");

struct Params {
    const float *logits;       // [S, VOCAB]
    const int *rows;           // [S]
    const int *positions;      // [S]
    const float *temperature, *min_p, *top_p;   // by row
    const int *top_k, *seed;   // by row; seed [R, 2]
    int *out;                  // [S]
    int seed_stride;
};

struct Shared {
    u64 fine[FINE], fine_all[FINE];          // this block's, the cluster's
    u64 above, all;                          // this block's; for the cluster to read
    u64 above_of[CLUSTER], all_of[CLUSTER];
    u64 total_of[CLUSTER];
    u64 list_amount[LIST], got_amount[LIST];
    u64 sums[4][32];
    u64 kept;
    u32 coarse[COARSE], coarse_all[COARSE];
    u32 count[FINE], count_all[FINE];
    u32 list_image[LIST], got_image[LIST];
    u32 list_n, list_of[CLUSTER];
    u32 found_n;
    u32 words[4][32];
    u32 peak_of[CLUSTER], where_of[CLUSTER];
};

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
__device__ __forceinline__ void cluster_meets() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

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
// Sum of v over the threads up to this one, and over all.
__device__ __forceinline__ u64 block_up_to(u64 v, u64 *space, u64 &total) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    v = warp_up_to(v);
    if (lane == 31) space[warp] = v;
    __syncthreads();
    u64 warps = warp_up_to(lane < T / 32 ? space[lane] : 0);
    total = __shfl_sync(~0u, warps, 31);
    u64 before = __shfl_sync(~0u, warps, warp ? warp - 1 : 0);
    return warp ? v + before : v;
}

// The image of the least likely token that a filter keeps: the largest at which what is there or above, tokens
// (BY_WEIGHT false) or their weight, reaches `k` or the share of all. 0: it keeps everything.
template <bool BY_WEIGHT>
__device__ __forceinline__ u32 threshold(Shared &sh, const Row &row, const float (&x)[EACH], u32 rank, u64 k, float share) {
    const int tid = threadIdx.x;
    if (tid < COARSE) sh.coarse[tid] = sh.coarse_all[tid] = 0;
    if (tid < FINE) { sh.fine[tid] = 0; sh.count[tid] = 0; }
    if (tid == 0) sh.list_n = 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        float d = row.depth(x[j]);
        if (d < BOTTOM) atomicAdd(&sh.coarse[units(d) >> COARSE_BITS], 1u);
    }
    cluster_meets();
    {
        constexpr int PARTS = T / COARSE;
        const int bin = tid % COARSE, part = tid / COARSE;
        u32 n = 0;
#pragma unroll
        for (int r = 0; r < CLUSTER / PARTS; ++r) n += remote32(&sh.coarse[bin], part * (CLUSTER / PARTS) + r);
        atomicAdd(&sh.coarse_all[bin], n);
    }
    __syncthreads();
    const bool has = tid < COARSE;
    const u64 n = has ? sh.coarse_all[tid] : 0;
    int first, last;
    if (BY_WEIGHT) {
        // Bounds of the bin's weight, in 2^40ths of the most likely token's. A thousandth covers exp.
        const float most_each = __expf(-tid * 0.0625f) * 1.001f, least_each = __expf(-(tid + 1) * 0.0625f) * 0.999f;
        const u64 most = most_each < row.min_p ? 0 : n * ((u64)(most_each * BOUND_OF_ONE) + 1);
        const u64 least = least_each < row.min_p ? 0 : n * (u64)(least_each * BOUND_OF_ONE);
        u64 most_all, least_all;
        const u64 most_above = block_up_to(most, sh.sums[0], most_all), least_above = block_up_to(least, sh.sums[1], least_all);
        // The threshold is the first at which above * (1 - share) >= below * share.
        const float rest = 1.f - share;
        const bool never = (float)most_above * rest < (float)(least_all - least_above) * share;
        const bool surely = (float)least_above * rest >= (float)(most_all - most_above) * share;
        first = min(__syncthreads_count(has && never), COARSE - 1);
        last = max(first, min(__syncthreads_count(has && !surely), COARSE - 1));
    } else {
        u64 all;
        const u64 up_to = block_up_to(n, sh.sums[0], all);
        if (all < k) return 0;
        first = last = __syncthreads_count(has && up_to < k);
    }

    // Cut what is left of the order of keys, until its tokens fit the list.
    u64 base = (u64)((u32)first << COARSE_BITS) << 32;
    int shift = 32 + COARSE_BITS - 8 + (32 - __clz(last - first));
    u64 kept, target = k;
    int found;
    for (;;) {
        u64 above = 0, all = 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            float d = row.depth(x[j]);
            if (!(d < BOTTOM)) continue;
            u64 amount = BY_WEIGHT ? row.weight(d) : 1;
            u64 key = (u64)units(d) << 32 | (u32)~image(x[j]);
            if (BY_WEIGHT) all += amount;
            if (key < base) { above += amount; continue; }
            u64 bin = (key - base) >> shift;
            if (bin < FINE) { atomicAdd(&sh.count[bin], 1u); atomicAdd(&sh.fine[bin], amount); }
        }
        u64 sum;
        block_up_to(above, sh.sums[0], sum);
        if (tid == 0) sh.above = sum;
        if (BY_WEIGHT) {
            block_up_to(all, sh.sums[1], sum);
            if (tid == 0) sh.all = sum;
        }
        cluster_meets();
        if (tid < FINE) {
            u64 v = 0;
#pragma unroll
            for (int r = 0; r < CLUSTER; ++r) v += remote64(&sh.fine[tid], r);
            sh.fine_all[tid] = v;
        } else if (tid < 2 * FINE) {
            u32 v = 0;
#pragma unroll
            for (int r = 0; r < CLUSTER; ++r) v += remote32(&sh.count[tid - FINE], r);
            sh.count_all[tid - FINE] = v;
        }
        if (tid < CLUSTER) {
            sh.above_of[tid] = remote64(&sh.above, tid);
            if (BY_WEIGHT) sh.all_of[tid] = remote64(&sh.all, tid);
        }
        __syncthreads();
        u64 before = 0;
#pragma unroll
        for (int r = 0; r < CLUSTER; ++r) before += sh.above_of[r];
        if (BY_WEIGHT) {
            u64 whole = 0;
#pragma unroll
            for (int r = 0; r < CLUSTER; ++r) whole += sh.all_of[r];
            target = (u64)((double)share * (double)whole);
            if (target == 0) target = 1;
        }
        const u64 here = tid < FINE ? sh.fine_all[tid] : 0;
        u64 unused;
        const u64 up_to = before + block_up_to(here, sh.sums[2], unused);
        found = min(__syncthreads_count(tid < FINE && up_to < target), FINE - 1);
        if (tid == found) { sh.kept = up_to - here; sh.found_n = sh.count_all[found]; }
        __syncthreads();
        kept = sh.kept;
        if (sh.found_n <= LIST) break;
        base += (u64)found << shift;
        if (shift == 0) return ~(u32)base;   // all of them are the same logit
        shift = max(shift - 8, 0);
        cluster_meets();
        if (tid < FINE) { sh.fine[tid] = 0; sh.count[tid] = 0; }
        __syncthreads();
    }

#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        float d = row.depth(x[j]);
        if (!(d < BOTTOM)) continue;
        u64 key = (u64)units(d) << 32 | (u32)~image(x[j]);
        if (key >= base && (key - base) >> shift == (u64)found) {
            u32 slot = atomicAdd(&sh.list_n, 1u);
            sh.list_image[slot] = image(x[j]);
            sh.list_amount[slot] = BY_WEIGHT ? row.weight(d) : 1;
        }
    }
    cluster_meets();
    if (tid < CLUSTER) sh.list_of[tid] = remote32(&sh.list_n, tid);
    __syncthreads();
    int at = tid, length = 0, owner = -1;
    for (int r = 0; r < CLUSTER; ++r) {
        int theirs = sh.list_of[r];
        if (owner < 0) { if (at < theirs) owner = r; else at -= theirs; }
        length += theirs;
    }
    u32 own = 0;
    if (owner >= 0) {
        own = sh.got_image[tid] = remote32(&sh.list_image[at], owner);
        sh.got_amount[tid] = remote64(&sh.list_amount[at], owner);
    }
    __syncthreads();
    if (owner >= 0) {
        u64 sum = kept;
        for (int i = 0; i < length; ++i) sum += sh.got_image[i] >= own ? sh.got_amount[i] : 0;
        if (sum < target) own = 0;
    }
    return block_max(own, sh.words[2]);
}

// 53 random bits: Philox4x32-10 of the counter (position, 0, 0, 0).
__device__ __forceinline__ double uniform(u32 k0, u32 k1, u32 position) {
    u32 c0 = position, c1 = 0, c2 = 0, c3 = 0;
#pragma unroll
    for (int i = 0; i < 10; ++i) {
        u32 high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        u32 high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ k0; c1 = low1;
        c2 = high0 ^ c3 ^ k1; c3 = low0;
        k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
    return (double)(((u64)(c0 >> 5) << 26) + (c1 >> 6)) * 1.1102230246251565e-16;
}

extern "C" __global__ void __launch_bounds__(T, 1) sample(const __grid_constant__ Params p) {
    __shared__ Shared sh;
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    const int s = blockIdx.x / CLUSTER, tid = threadIdx.x;
    const int r = p.rows[s];
    if (r < 0) {
        if (rank == 0 && tid == 0) p.out[s] = 0;
        return;
    }
    const float none = -__int_as_float(0x7f800000);
    const int begin = rank * SLICE + tid * EACH;   // a thread's logits stand side by side: sums go in their order
    const float *from = p.logits + (long long)s * VOCAB + begin;
    float x[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j += 4) {
        if (VOCAB % 4 == 0) {
            float4 v = begin + j < VOCAB ? __ldcg((const float4 *)(from + j)) : make_float4(none, none, none, none);
            x[j] = v.x; x[j + 1] = v.y; x[j + 2] = v.z; x[j + 3] = v.w;
        } else
#pragma unroll
            for (int i = 0; i < 4; ++i) x[j + i] = begin + j + i < VOCAB ? __ldcg(from + j + i) : none;
    }
    const float temperature = p.temperature[r], share = p.top_p[r];
    const int k = p.top_k[r];
    u32 top = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        x[j] = x[j] != x[j] ? none : x[j] + 0.f;   // NaN is -inf; -0.0 and 0.0 tie
        top = max(top, image(x[j]));
    }
    top = block_max(top, sh.words[0]);
    cluster_meets();   // every block runs: its memory may be written
    if (tid < CLUSTER) push32(&sh.peak_of[rank], tid, top);
    cluster_meets();
#pragma unroll
    for (int i = 0; i < CLUSTER; ++i) top = max(top, sh.peak_of[i]);

    Row row;
    row.largest = logit_of(top);
    if (!(temperature > 0.f && row.largest > none && row.largest < -none)) {   // the best, the first of equals
        u32 last = 0;
#pragma unroll
        for (int j = EACH - 1; j >= 0; --j)
            if (image(x[j]) == top) last = ~(u32)(begin + j);
        last = block_max(last, sh.words[1]);
        if (tid == 0) push32(&sh.where_of[rank], 0, last);
        cluster_meets();
        if (rank == 0 && tid == 0) {
            for (int i = 0; i < CLUSTER; ++i) last = max(last, sh.where_of[i]);
            p.out[s] = ~last;
        }
        return;
    }
    row.inverse = fminf(__fdiv_rn(1.f, temperature), 1e30f);
    row.min_p = p.min_p[r];
    const bool by_count = k > 0 && k < VOCAB, by_weight = share < 1.f;
    if (by_count) {
        u32 lowest = threshold<false>(sh, row, x, rank, k, 0.f);
#pragma unroll
        for (int j = 0; j < EACH; ++j) if (image(x[j]) < lowest) x[j] = none;
        if (by_weight) cluster_meets();   // all have read what is cleared next
    }
    if (by_weight) {
        u32 lowest = threshold<true>(sh, row, x, rank, 0, share);
#pragma unroll
        for (int j = 0; j < EACH; ++j) if (image(x[j]) < lowest) x[j] = none;
    }

    // The first token at which the running sum of weights exceeds the target.
    u64 own = 0, total;
#pragma unroll
    for (int j = 0; j < EACH; ++j) own += row.weight(row.depth(x[j]));
    u64 before = block_up_to(own, sh.sums[3], total) - own;
    if (tid < CLUSTER) push64(&sh.total_of[rank], tid, total);
    cluster_meets();
    total = 0;
#pragma unroll
    for (int i = 0; i < CLUSTER; ++i) {
        if (i < (int)rank) before += sh.total_of[i];
        total += sh.total_of[i];
    }
    const int *seed = p.seed + (long long)r * p.seed_stride;
    u64 target = (u64)(uniform(seed[0], seed[1], p.positions[s]) * (double)total);
    if (target >= total) target = total - 1;
    if (before <= target && target < before + own) {
        int chosen = 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            before += row.weight(row.depth(x[j]));
            chosen += before <= target;
        }
        p.out[s] = begin + chosen;
    }
}
