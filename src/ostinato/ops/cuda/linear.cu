// One product of a small step, out = x W^T, with what stands around it: at most 128 rows of x.
//
// The rows of weights are the large operand of Hopper's warp-group products (m64), the rows of x the
// small one (n8 to n128). Two threads copy tiles of weights and of x into rings in shared memory (TMA, 128-byte
// swizzle). Weights depend on nothing that a step computes: with dependent launch their ring is full before
// the kernel in front has ended. Half of a multiprocessor's shared memory at most, where the next
// product's blocks are to find room and fill theirs.
//
// While the kernel in front still runs they are asked for at the pace of memory, and afterwards only FLIGHT
// stages at a time: a long queue in front of memory would delay the few bytes that a step waits for. The
// kernel behind is launched when LEAD stages are left to ask for.
//
// A narrow output has too few tiles for the multiprocessors. Then SPLIT blocks of a cluster share a tile's
// inner dimension. Each finishes some of the tokens: the others send it their parts through distributed
// shared memory, and it adds them in order.
//
// All blocks read x, with 64 rows as many bytes as of weights. So SHARE neighbouring tiles
// are in a cluster, and each of their blocks copies a part of x into the memory of all (multicast). With
// LAG a warp copies x for its own block, past the queue of tensor copies.
//
// RMS norm in two halves: whoever writes the residual stream x also writes x times the next norm's weight
// (`y`) and each token's sum of squares over its 64 columns; the product with y is multiplied by
// the norm's factor at the end. Squares: [width / 64, rows] float32.
//
// Greedy steps need no logits: BEST leaves each block's largest, and where it is. WIDE, too, leaves the largest
// beside the logits, where somebody asks.
//
// FP8: weights are E4M3 bytes with a float32 scale for each row; 128 bytes of a tile's row are 128 inner indices of weights, 64 of x. Each
// warp takes its rows into registers, widens them to bfloat16 while products of the ones before are under way, and multiplies from there.
//
// Macros: FP8, KIND (0 store, 1 add to the residual, 2 gate and up with SiLU, 3 float32, 4 the best of it), TOK (8, 16, 32, 64, 128: rows
// of x at most), MW (warp groups: 64 rows of weights each), LINES (rows of weights in a tile: fewer, where that shares them out evenly),
// SPLIT, SHARE (a cluster is their product), KA (64 inner indices each, of a stage), XA (the same, of a stage of x: KA, or with FP8 a part of
// it), STAGES (of weights), X_STAGES (of x), LAG (stages of x that are asked for before the first of them is said to be there; 0: tensor
// copies), FLIGHT, LEAD, PACE (cycles a stage), ROTATE (stages from tile to tile).

#include "common.cuh"
#include "ring.cuh"
#include "tiles.cuh"

enum { STORE, ADD, ACT, WIDE, BEST };
constexpr int ROWS = 64 * MW;               // of weights in a tile, at most
constexpr int WIDE_UNIT = FP8 ? 128 : 64;   // inner indices of weights that lie in 128 bytes
constexpr int WA = KA * 64 / WIDE_UNIT;     // of them, of a stage
constexpr int COPIED = LINES * 128;         // bytes of a unit of a tile
constexpr int W_BYTES = ROWS * 128;         // the same in a ring; what stands in rows that a tile lacks does not matter
constexpr int X_BYTES = TOK * 128;
constexpr int CONSUMERS = MW * 128;         // threads; then a warp that copies weights, one for x, and those for the norm's factors
constexpr int NORMERS = TOK < 64 ? 1 : 2;
constexpr int THREADS = CONSUMERS + 64 + NORMERS * 32;
constexpr bool GATHERED = KIND == STORE || KIND == ADD;   // parts go through shared memory; one tile a cluster
constexpr bool HEAD = KIND == WIDE || KIND == BEST;
constexpr int NOWHERE = 0x7fffffff;
constexpr int OWN = TOK / SPLIT;            // tokens that a block finishes
constexpr int SLICE = TOK / SHARE;          // tokens of x that a block copies, for all that share them
constexpr int CLUSTER = SPLIT * SHARE;
static_assert(FP8 ? KA % 2 == 0 && KA % XA == 0 : KA == XA, "whole units");
static_assert(TOK % SPLIT == 0, "tokens are shared out evenly");
static_assert(SHARE == 1 || SLICE % 8 == 0, "swizzled by eight rows");
static_assert(GATHERED || SPLIT == 1, "gate and up, and the head, have tiles enough");
static_assert(LINES == ROWS || (HEAD && LINES < ROWS), "whole tiles where sums or pairs are by 64 rows");
static_assert(!LAG || (SHARE == 1 && LAG + FP8 < X_STAGES && LAG <= 3), "a tile of x for one block; with FP8 two are held");

// Eight tokens or more are finished by the threads that hold a part of them, each the same numbers of its warp's tile.
constexpr bool STRAIGHT = GATHERED && OWN % 8 == 0;
constexpr int EIGHTS = STRAIGHT ? OWN / 8 : 1;
constexpr int PAIRED = OWN > 1 ? OWN : 2;       // tokens that a block is sent; a neighbour's where it finishes a single one
// Where a number of a tile's parts lies: the four that a thread holds side by side, two tokens of rows r and r + 8.
constexpr int APART = ROWS * 2 + ROWS / 4;      // floats from two tokens to the next two
__device__ __forceinline__ int place(int split, int token, int row) {
    return (split * PAIRED / 2 + token / 2) * APART + row / 16 * 36 + row % 8 * 4 + row / 8 % 2 * 2 + token % 2;
}

struct Params {
    const u16 *weight, *x;      // as in the maps
    void *out;                  // [rows, n] bfloat16, float32 for WIDE; ADD: the residual stream
    const u16 *bias;            // [n] or null
    const float *squares;       // [sums, rows] or null: x is y, times the factor of this norm
    const u16 *gain;            // ADD: [n], the next norm's weight, or null
    u16 *y;                     // [rows, n] with gain
    float *next_squares;        // [n / 64, rows] with gain
    float *best;                // [rows, blocks] BEST, and WIDE or null: the largest of each block's outputs
    int *best_at;               // [rows, blocks] BEST: the first of them that has it
#if FP8
    const float *scale;         // [n], of ACT [2 n]: what finished sums are multiplied by
#endif
    int rows, n, k, tiles, chunks;
    float eps;
    int sums;                   // of a token's squares
    Map weight_map, x_map;
};

// Sends numbers to another block of the cluster, which waits for their bytes.
__device__ __forceinline__ void send4(u32 to, u32 bar, int block, const float *v) {
    send4(there(to, block), there(bar, block), v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }
// Sixteen bytes, or zeros.
__device__ __forceinline__ void copy_or_zero(u32 to, const u16 *from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// Two neighbours of shared memory, and what they are in bfloat16: exactly, but for NaN, which weights have none of. Sign, exponent and
// mantissa move to their places; the product corrects the exponent's bias, with subnormal numbers too.
__device__ __forceinline__ u32 two_at(u32 at) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ u32 widened(u32 two) {
    u32 r;
    asm("{\n.reg .b32 a;\nprmt.b32 a, %1, 0, 0x9180;\nshl.b32 a, a, 4;\nand.b32 a, a, 0x87f087f0;\nmul.rn.bf16x2 %0, a, %2;\n}"
        : "=r"(r) : "r"(two), "r"(0x7b807b80));     // 2^120
    return r;
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copies_are_seen() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

struct Yes { static constexpr bool is = true; };
struct No { static constexpr bool is = false; };

extern "C" __global__ void __launch_bounds__(THREADS, MW > 2 || TOK * MW > 128 ? 1 : 2) linear(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) u64 bars[2 * STAGES + 2 * X_STAGES + 3];
    __shared__ float factors[TOK];
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
    const u32 w_ring = (shared_at(memory) + 1023) & ~1023u, x_ring = w_ring + STAGES * WA * W_BYTES;
    const u32 parts = x_ring + X_STAGES * XA * X_BYTES;
    const u32 w_full = shared_at(bars), w_empty = w_full + STAGES * 8, x_full = w_empty + STAGES * 8, x_empty = x_full + X_STAGES * 8;
    const u32 go = x_empty + X_STAGES * 8, normed = go + 8, sent = normed + 8;
    // Blocks of a cluster: splits side by side, then tiles.
    const int split = blockIdx.x % SPLIT, share = blockIdx.x / SPLIT % SHARE;
    const int start = blockIdx.x / CLUSTER * SHARE, first = start + share, step = gridDim.x / SPLIT;
    const int begin = p.chunks * split / SPLIT, count = p.chunks * (split + 1) / SPLIT - begin;
    const int stages = (p.tiles - start + step - 1) / step * count;     // that pass through the rings
    constexpr int PER = KA / XA;        // stages of x for one of weights
    const int x_stages = stages * PER;
    // Blocks begin at different inner indices: rows of weights lie a power of two apart, and the same
    // index of all of them would meet in few channels of memory.
    auto turned = [&](int tile) { return tile / SHARE * ROTATE % count; };
    if (stages <= LEAD) let_successor_start();
    if (lane == 0 && (warp == CONSUMERS / 32 || warp == CONSUMERS / 32 + 1))
        prepare(warp == CONSUMERS / 32 ? &p.weight_map : &p.x_map);
    if (tid == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbar_init(w_full + i * 8, 1);
            mbar_init(w_empty + i * 8, MW * 4);
        }
        for (int i = 0; i < X_STAGES; ++i) {
            mbar_init(x_full + i * 8, 1);
            mbar_init(x_empty + i * 8, SHARE * MW * 4);
        }
        mbar_init(go, 1);
        mbar_init(normed, NORMERS);
        mbar_init(sent, 1);
        barriers_are_there();
        if (STRAIGHT && SPLIT > 1) mbar_expect(sent, (SPLIT - 1) * EIGHTS * CONSUMERS * 16);
        if (GATHERED && !STRAIGHT) mbar_expect(sent, SPLIT * PAIRED * ROWS * 4);
    }
    __syncwarp();
    if (CLUSTER > 1) meet();
    else __syncthreads();

    if (warp == CONSUMERS / 32) {
        if (lane) return;
        const u64 hint = policy(true);
        bool gone = false;
        long long last = clock64() - PACE;
        int i = 0, stage = 0, parity = 1;
        for (int tile = start; tile < p.tiles; tile += step) {
            int at = turned(tile);
            for (int n = 0; n < count; ++n, ++i) {
                if (i >= STAGES) mbar_wait(w_empty + stage * 8, parity);
                else while (!gone && clock64() - last < PACE) gone = come(go, 0);
                if ((i >= STAGES || gone) && i >= FLIGHT) {
                    const int before = stage - FLIGHT;
                    mbar_wait(w_full + (before < 0 ? before + STAGES : before) * 8, before < 0 ? parity : parity ^ 1);
                }
                last = clock64();
                const u32 bar = w_full + stage * 8, to = w_ring + stage * WA * W_BYTES;
                const int inner = (begin + at) * KA * 64;
                mbar_expect(bar, WA * COPIED);
#pragma unroll
                for (int a = 0; a < WA; ++a) {
                    if (KIND == ACT) copy4(to + a * W_BYTES, &p.weight_map, inner + a * WIDE_UNIT, (tile + share) * (ROWS / 16), bar, hint);
                    else copy2(to + a * W_BYTES, &p.weight_map, inner + a * WIDE_UNIT, (tile + share) * LINES, bar, hint);
                }
                if (i == stages - LEAD) let_successor_start();
                if (++at == count) at = 0;
                if (++stage == STAGES) { stage = 0; parity ^= 1; }
            }
        }
        return;
    }
    if (LAG && warp == CONSUMERS / 32 + 1) {
        wait_for_predecessor();
        if (lane == 0) mbar_arrive(go);
        const int piece = lane % 8;     // of 16 bytes
        int tile = start, n = 0, at = turned(tile) * PER, stage = 0, parity = 1, told = 0;
        auto tell = [&]() {
            copies_are_seen();
            __syncwarp();
            if (lane == 0) mbar_arrive(x_full + told * 8);
            if (++told == X_STAGES) told = 0;
        };
        for (int i = 0; i < x_stages; ++i) {
            if (i >= X_STAGES) mbar_wait(x_empty + stage * 8, parity);
            const int inner = (begin * PER + at) * XA * 64 + piece * 8;
#pragma unroll
            for (int a = 0; a < XA; ++a) {
                const u32 bytes = inner + a * 64 < p.k ? 16 : 0;
                const u16 *from = p.x + (bytes ? inner + a * 64 : 0);
                const u32 to = x_ring + (stage * XA + a) * X_BYTES;
#pragma unroll 8
                for (int c = lane / 8; c < TOK; c += 4)
                    copy_or_zero(to + c * 128 + (piece ^ c % 8) * 16, from + (long long)min(c, p.rows - 1) * p.k, bytes);
            }
            commit_copies();
            if (i >= LAG) {
                copies_left<LAG>();
                tell();
            }
            if (++at == count * PER) at = 0;
            if (++n == count * PER) { n = 0; at = turned(tile += step) * PER; }
            if (++stage == X_STAGES) { stage = 0; parity ^= 1; }
        }
        // What is left of them, in order.
        if (LAG > 2 && x_stages > 2) { copies_left<2>(); tell(); }
        if (LAG > 1 && x_stages > 1) { copies_left<1>(); tell(); }
        if (x_stages > 0) { copies_left<0>(); tell(); }
        return;
    }
    if (warp == CONSUMERS / 32 + 1) {
        if (lane) return;
        const u64 hint = policy(false);
        u16 sharing = 0;
        for (int i = 0; i < SHARE; ++i) sharing |= 1 << (split + i * SPLIT);
        wait_for_predecessor();
        mbar_arrive(go);
        int i = 0, stage = 0, parity = 1;
        for (int tile = start; tile < p.tiles; tile += step) {
            int at = turned(tile) * PER;
            for (int n = 0; n < count * PER; ++n, ++i) {
                if (i >= X_STAGES) mbar_wait(x_empty + stage * 8, parity);
                const u32 bar = x_full + stage * 8, to = x_ring + stage * XA * X_BYTES + share * SLICE * 128;
                const int inner = (begin * PER + at) * XA * 64;
                mbar_expect(bar, XA * X_BYTES);
#pragma unroll
                for (int a = 0; a < XA; ++a)
                    if (SHARE == 1) copy2(to + a * X_BYTES, &p.x_map, inner + a * 64, 0, bar, hint);
                    else copy2(to + a * X_BYTES, &p.x_map, inner + a * 64, share * SLICE, bar, hint, sharing);
                if (++at == count * PER) at = 0;
                if (++stage == X_STAGES) { stage = 0; parity ^= 1; }
            }
        }
        return;
    }
    if (warp > CONSUMERS / 32) {
        wait_for_predecessor();
        constexpr int LANES = TOK < 32 ? 32 / TOK : 1;     // that share a token
        constexpr int BATCH = 32 / LANES;                  // loads under way
        const int sums = p.squares ? p.sums : 0;
        for (int c = (warp - CONSUMERS / 32 - 2) * 32 + lane % (32 / LANES); c < TOK; c += NORMERS * 32 / LANES) {
            float sum = 0.f;
            for (int i = lane / (32 / LANES); i < sums; i += BATCH * LANES) {
                float v[BATCH];
#pragma unroll
                for (int b = 0; b < BATCH; ++b)
                    v[b] = c < p.rows && i + b * LANES < sums ? p.squares[(i + b * LANES) * p.rows + c] : 0.f;
#pragma unroll
                for (int b = 0; b < BATCH; ++b) sum += v[b];
            }
#pragma unroll
            for (int d = 16; d >= 32 / LANES; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
            if (lane < 32 / LANES) factors[c] = p.squares ? rsqrtf(sum / p.k + p.eps) : 1.f;
        }
        __syncwarp();
        if (lane == 0) mbar_arrive(normed);
        return;
    }

    const int group = warp >> 2, g = lane >> 2, t = lane & 3;
    // What is added to the results. STRAIGHT: of a thread's two rows of the tile, or, as it lies in memory, two columns of a
    // token. Else of a warp's token and 64 columns.
    const int row = first * ROWS + warp * 16 + g;
    u32 before[EIGHTS * 2] = {};
    float biases[2] = {}, gains[2] = {};
    auto pair_at = [&](int eight, int h) -> long long {     // in the output, or -1
        const int c = split * OWN + eight * 8 + g, n = first * ROWS + warp * 16 + h * 8 + t * 2;
        return c < p.rows && n < p.n ? (long long)c * p.n + n : -1;
    };
    const int half = warp % MW, own = warp / MW, column = (first * MW + half) * 64 + lane * 2;
    u32 old = 0, bias = 0, gain = 0;
    if (STRAIGHT) {
        wait_for_predecessor();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const bool inside = row + h * 8 < p.n;
            if (p.bias && inside) biases[h] = lo(p.bias[row + h * 8]);
            if (KIND == ADD && p.gain && inside) gains[h] = lo(p.gain[row + h * 8]);
#pragma unroll
            for (int e = 0; e < EIGHTS; ++e)
                if (KIND == ADD && pair_at(e, h) >= 0) before[e * 2 + h] = *(const u32 *)((const u16 *)p.out + pair_at(e, h));
        }
    } else if (GATHERED) {
        wait_for_predecessor();
        if (column < p.n) {
            const int c = split * OWN + own;
            if (p.bias) bias = *(const u32 *)(p.bias + column);
            if (KIND == ADD && p.gain) gain = *(const u32 *)(p.gain + column);
            if (KIND == ADD && own < OWN && c < p.rows) old = *(const u32 *)((const u16 *)p.out + (long long)c * p.n + column);
        }
    }
#if FP8
    float scales[2] = {};       // of this thread's two rows of a tile, or, where a warp has a token, of its two columns
    auto rescale = [&](int a, int b, int most) {
        scales[0] = a < most ? p.scale[a] : 0.f;
        scales[1] = b < most ? p.scale[b] : 0.f;
    };
    if (STRAIGHT) rescale(row, row + 8, p.n);
    else if (GATHERED) rescale(column, column + 1, p.n);
#else
    constexpr float scales[2] = {1.f, 1.f};
#endif
    float d[TOK / 2];
    // The largest of what this thread has of each token, and which it was: two a tile, two tokens a word.
    float top[HEAD ? TOK / 4 : 1];
    u32 which[KIND == BEST ? TOK / 8 : 1];
    if (HEAD)
#pragma unroll
        for (int j = 0; j < TOK / 4; ++j) top[j] = -infinity();
    if (KIND == BEST)
#pragma unroll
        for (int j = 0; j < TOK / 8; ++j) which[j] = ~0u;
    int i = 0, w = 0, w_parity = 0, x = 0, x_parity = 0;
#if FP8
    // Steps of 16 inner indices, GROUP of them in a group of products. While PENDING groups are under way another one is widened, AHEAD steps
    // before its turn, in the room of one that is done; what is widened LATER steps behind it is loaded, or, with none, itself just before.
    constexpr int STEPS = KA * 4, OF_X = XA * 4;    // of a stage, and of one of x
    constexpr int GROUP = TOK == 128 && !GATHERED ? 1 : TOK * MW < 128 ? 4 : 2;
    constexpr int SLOTS = TOK * MW < 128 ? 8 : 4, PENDING = GROUP == 1 ? 2 : 1, AHEAD = SLOTS - PENDING * GROUP;
    constexpr int LATER = GROUP == 1 ? 2 : MW == 1 && !GATHERED ? GROUP : 0, LOADED = LATER ? LATER : GROUP;
    static_assert(SLOTS <= STEPS && PENDING * GROUP <= OF_X, "no more than one stage in advance");
    u32 loaded[LOADED][4], held[SLOTS][4];
    const u32 mine_at = w_ring + group * 8192 + (warp % 4 * 16 + g) * 128 + g * 16 + t * 2;
    auto load = [&](int stage, int k) {
        const u32 at = (mine_at + (stage * WA + k / 8) * W_BYTES) ^ k % 8 * 16;
        u32 *to = loaded[k % LOADED];
        to[0] = two_at(at);
        to[1] = two_at(at + 1024);
        to[2] = two_at(at + 8);
        to[3] = two_at(at + 1032);
    };
    auto widen = [&](int k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) held[k % SLOTS][i] = widened(loaded[k % LOADED][i]);
    };
    int x_read = 0;
    auto x_is_read = [&]() {    // the stage before this one
        const int stage = (x ? x : X_STAGES) - 1;
        if (lane < SHARE && x_read + X_STAGES < x_stages) {
            if (SHARE == 1) mbar_arrive(x_empty + stage * 8);
            else arrive_there(there(x_empty + stage * 8, split + lane * SPLIT));
        }
        __syncwarp();
        ++x_read;
    };
    // A stage of weights; `first` of all: as much as there is room for is widened already. `begins` a tile.
    auto multiply_stage = [&](auto first, bool begins) {
        const int next = w + 1 == STAGES ? 0 : w + 1;
        const u32 next_parity = w_parity ^ (next == 0);
        const bool more = i + 1 < stages;
        // Where there is no next stage what is loaded is of no use, and does no harm.
        auto load_group = [&](int k) {
            if (k == STEPS) mbar_wait(w_full + (more ? next : w) * 8, more ? next_parity : w_parity);
#pragma unroll
            for (int j = k; j < k + GROUP; ++j) load(j < STEPS ? w : next, j % STEPS);
        };
#pragma unroll
        for (int k = 0; k < STEPS; k += GROUP) {
            if (k % OF_X == 0) mbar_wait(x_full + x * 8, x_parity);
            begin_products();
#pragma unroll
            for (int j = k; j < k + GROUP; ++j)
                multiply_held<TOK>(d, held[j % SLOTS], operand(x_ring + (x * XA + j % OF_X / 4) * X_BYTES) + j % 4 * 2, 1);
            commit_products();
            await_products<TOK, PENDING>(d);
            const int done = k + GROUP - PENDING * GROUP;   // steps
            if (done % OF_X == 0 && (done > 0 || !begins)) x_is_read();
            if ((k + GROUP) % OF_X == 0 && ++x == X_STAGES) { x = 0; x_parity ^= 1; }
            if (first.is && k < PENDING * GROUP) continue;
            if (!LATER) load_group(k + AHEAD);
#pragma unroll
            for (int j = k; j < k + GROUP; ++j) widen((j + AHEAD) % STEPS);
            if (LATER) load_group(k + AHEAD + LATER);
        }
        // Its numbers have been loaded, as they have been multiplied.
        if (lane == 0) mbar_arrive(w_empty + w * 8);
        __syncwarp();
        w = next;
        w_parity = next_parity;
        ++i;
    };
    auto clear = [&]() {    // cheaper than products that do not add
#pragma unroll
        for (int j = 0; j < TOK / 2; ++j) d[j] = 0.f;
    };
    clear();
    mbar_wait(w_full, 0);
#pragma unroll
    for (int k = 0; k < SLOTS; ++k) {
        load(0, k);
        widen(k);
    }
    if (LATER && SLOTS == STEPS) mbar_wait(w_full + (stages > 1) * 8, 0);
#pragma unroll
    for (int k = SLOTS; k < SLOTS + LATER; ++k) load(k / STEPS, k % STEPS);
    multiply_stage(Yes(), true);
    if (KIND == ACT) await_products<TOK, 0>(d);     // else the compiler waits for every single product
#endif
    for (int from = start; from < p.tiles; from += step) {
        const int tile = from + share;
#if FP8
        if (KIND == ACT) {
            const int n = tile * (ROWS / 2) + warp * 8 + g;
            rescale(n, p.n + n, n < p.n ? 2 * p.n : 0);
        } else if (HEAD) rescale(tile * LINES + warp * 16 + g, tile * LINES + warp * 16 + g + 8, p.n);
        for (int n = from == start; n < count; ++n) multiply_stage(No(), n == 0);
        await_products<TOK, 0>(d);
        x_is_read();
#else
        for (int n = 0; n < count; ++n, ++i) {
            mbar_wait(w_full + w * 8, w_parity);
            mbar_wait(x_full + x * 8, x_parity);
            const u64 a = operand(w_ring + w * KA * W_BYTES + group * 8192), b = operand(x_ring + x * KA * X_BYTES);
            begin_products();
#pragma unroll
            for (int k = 0; k < KA * 4; ++k)
                multiply<TOK>(d, a + (k / 4 * W_BYTES + k % 4 * 32) / 16, b + (k / 4 * X_BYTES + k % 4 * 32) / 16, n || k);
            commit_products();
            await_products<TOK, 0>(d);
            // Tiles of x are free when all that share them have read them. Nobody waits for the last ones.
            if (lane == 0) mbar_arrive(w_empty + w * 8);
            if (lane < SHARE && i + X_STAGES < stages) {
                if (SHARE == 1) mbar_arrive(x_empty + x * 8);
                else arrive_there(there(x_empty + x * 8, split + lane * SPLIT));
            }
            __syncwarp();
            if (++w == STAGES) { w = 0; w_parity ^= 1; }
            if (++x == X_STAGES) { x = 0; x_parity ^= 1; }
        }
        await_products<TOK, 0>(d);
#endif
        if (from == start) mbar_wait(normed, 0);
        if (GATHERED) break;
        const u32 pair = (u32)(from - start) / step * 2;
#pragma unroll
        for (int j = 0; j < TOK / 8; ++j) {
            float r[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int c = j * 8 + 2 * t + i, n = tile * LINES + warp * 16 + g;
                const bool inside = n < p.n && warp * 16 + g < LINES, inside8 = n + 8 < p.n && warp * 16 + g + 8 < LINES;
                const float v = d[j * 4 + i] * factors[c] * scales[0], u = d[j * 4 + 2 + i] * factors[c] * scales[1];
                if (KIND == ACT) {
                    const float gate = rounded(v);
                    r[i] = rounded(__fdividef(gate, 1.f + exp2_(-1.4426950408889634f * gate))) * rounded(u);
                } else {
                    if (KIND == WIDE && c < p.rows) {
                        float *row = (float *)p.out + (long long)c * p.n;
                        if (inside) row[n] = v;
                        if (inside8) row[n + 8] = u;
                    }
                    // NaN is larger than nothing; of equals the first stays.
                    auto keep = [&](float x, bool inside, u32 number) {
                        if (!inside || !(x > top[j * 2 + i])) return;
                        top[j * 2 + i] = x;
                        if (KIND == BEST) which[j] = __byte_perm(which[j], number, i ? 0x5410 : 0x3254);
                    };
                    keep(v, inside, pair);
                    keep(u, inside8, pair + 1);
                }
            }
            if (KIND == ACT) {      // two outputs of a token for each thread, instead of one of two tokens
                const u32 both = transpose(pack(r[0], r[1]));
                const int c = j * 8 + g, n = tile * (ROWS / 2) + warp * 8 + t * 2;
                if (c < p.rows && n < p.n) *(u32 *)((u16 *)p.out + (long long)c * p.n + n) = both;
            }
        }
#if FP8
        clear();
#endif
    }
    if (HEAD && p.best) {
        // What each token's threads found, side by side in the ring of weights; then a warp looks at a token.
        constexpr int FOUND = MW * 32, APART = FOUND + 4;
        static_assert(!HEAD || TOK * APART * 8 <= STAGES * KA * W_BYTES, "the ring has room for it");
        float *tops = (float *)(memory + (w_ring - shared_at(memory)));
        int *places = (int *)(tops + TOK * APART);
        consumers_meet();    // nobody reads weights there any more
#pragma unroll
        for (int j = 0; j < TOK / 4; ++j) {
            const int to = (j / 2 * 8 + 2 * t + j % 2) * APART + warp * 8 + g;
            tops[to] = top[j];
            if (KIND == BEST) {
                const u32 number = which[j / 2] >> j % 2 * 16 & 0xffff;
                places[to] = number == 0xffff ? NOWHERE : ((int)(number / 2) * step + first) * LINES + warp * 16 + g + number % 2 * 8;
            }
        }
        consumers_meet();
#pragma unroll 1
        for (int c = warp; c < p.rows; c += CONSUMERS / 32) {
            float largest = -infinity();
            int at = NOWHERE;
#pragma unroll
            for (int i = lane; i < FOUND; i += 32) {
                const float x = tops[c * APART + i];
                const int here = KIND == BEST ? places[c * APART + i] : NOWHERE;
                if (x > largest || (x == largest && here < at)) at = here;
                largest = fmaxf(largest, x);
            }
            u32 order = __float_as_uint(largest + 0.f);     // -0.0 and 0.0 tie
            order ^= (u32)((int)order >> 31) | 0x80000000u;
            const u32 most = __reduce_max_sync(~0u, order);
            const int lowest = __reduce_min_sync(~0u, order == most ? at : NOWHERE);
            if (order != most || at != lowest) continue;
            p.best[(long long)c * gridDim.x + blockIdx.x] = largest;
            if (KIND == BEST) p.best_at[(long long)c * gridDim.x + blockIdx.x] = at == NOWHERE ? first * LINES : at;
        }
    }
    if (!GATHERED) return;
    if (STRAIGHT) {
        float mine[EIGHTS * 4];
        // Parts lie as their threads hold them, in order of their blocks without the owner.
        auto slot = [&](int from, int owner, int eight) { return ((from - (from > owner)) * EIGHTS + eight) * CONSUMERS + tid; };
#pragma unroll
        for (int j = 0; j < TOK / 8; ++j)
            if (j / EIGHTS == split)
#pragma unroll
                for (int q = 0; q < 4; ++q) mine[j % EIGHTS * 4 + q] = d[j * 4 + q];
            else send4(parts + slot(split, j / EIGHTS, j % EIGHTS) * 16, sent, j / EIGHTS + share * SPLIT, d + j * 4);
        if (SPLIT > 1) {
            mbar_wait(sent, 0);
            const float4 *from = (const float4 *)__cvta_shared_to_generic(parts);
            float4 part[EIGHTS][SPLIT];
#pragma unroll
            for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
                for (int s = 0; s < SPLIT; ++s)
                    part[e][s] = s == split ? *(float4 *)(mine + e * 4) : from[slot(s, split, e)];
#pragma unroll
            for (int e = 0; e < EIGHTS; ++e) {
                float4 sum = {};
#pragma unroll
                for (int s = 0; s < SPLIT; ++s) {
                    sum.x += part[e][s].x; sum.y += part[e][s].y;
                    sum.z += part[e][s].z; sum.w += part[e][s].w;
                }
                *(float4 *)(mine + e * 4) = sum;
            }
        }
        float squares[EIGHTS * 2];
#pragma unroll
        for (int e = 0; e < EIGHTS; ++e) {
            const int c = split * OWN + e * 8 + 2 * t;
            squares[e * 2] = squares[e * 2 + 1] = 0.f;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float a = mine[e * 4 + h * 2] * factors[c] * scales[h] + biases[h], b = mine[e * 4 + h * 2 + 1] * factors[c + 1] * scales[h] + biases[h];
                if (KIND == ADD) {
                    const u32 turned = transpose(before[e * 2 + h]);
                    a += lo(turned); b += hi(turned);
                }
                const u32 both = pack(a, b);
                const long long to = pair_at(e, h);
                const u32 across = transpose(both);
                if (to >= 0) *(u32 *)((u16 *)p.out + to) = across;
                if (KIND == ADD && p.gain) {
                    a = lo(both); b = hi(both);
                    const u32 scaled = transpose(pack(a * gains[h], b * gains[h]));
                    if (to >= 0) *(u32 *)(p.y + to) = scaled;
                    squares[e * 2] += a * a;
                    squares[e * 2 + 1] += b * b;
                }
            }
        }
        if (KIND != ADD || !p.gain) return;
#pragma unroll
        for (int s = 4; s < 32; s <<= 1)
#pragma unroll
            for (int i = 0; i < EIGHTS * 2; ++i) squares[i] += __shfl_xor_sync(~0u, squares[i], s);
        // Where a warp's own rows of weights were: nobody else reads there.
        auto squared = [&](int warp) { return (float *)(memory + (w_ring - shared_at(memory)) + warp * 2048); };
        if (g == 0)
#pragma unroll
            for (int i = 0; i < EIGHTS * 2; ++i) squared(warp)[i / 2 * 8 + 2 * t + i % 2] = squares[i];
        consumers_meet();
        for (int i = tid; i < MW * OWN; i += CONSUMERS) {
            const int c = split * OWN + i % OWN, h = i / OWN;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < 4; ++w) sum += squared(h * 4 + w)[i % OWN];
            if (c < p.rows && (first * MW + h) * 64 < p.n) p.next_squares[(first * MW + h) * p.rows + c] = sum;
        }
        return;
    }
    // Fewer: a warp has a token's 64 columns.
#pragma unroll
    for (int j = 0; j < TOK / 8; ++j) {
        const int c = j * 8 + 2 * t;
#pragma unroll
        for (int o = 0; o < PAIRED / OWN; ++o)
            send4(parts + place(split, c % PAIRED, warp * 16 + g) * 4, sent, c / OWN + o + share * SPLIT, d + j * 4);
    }
    mbar_wait(sent, 0);
    const int c = split * OWN + own;
    if (own >= OWN || c >= p.rows) return;
    float a = 0.f, b = 0.f;
    if (column < p.n) {
        const float *from = (const float *)__cvta_shared_to_generic(parts);
#pragma unroll
        for (int s = 0; s < SPLIT; ++s) {
            a += from[place(s, c % PAIRED, half * 64 + lane * 2)];
            b += from[place(s, c % PAIRED, half * 64 + lane * 2 + 1)];
        }
        const float factor = factors[c];
        a = a * factor * scales[0] + lo(bias);
        b = b * factor * scales[1] + hi(bias);
        if (KIND == ADD) { a += lo(old); b += hi(old); }
        const u32 both = pack(a, b);
        *(u32 *)((u16 *)p.out + (long long)c * p.n + column) = both;
        a = lo(both); b = hi(both);
        if (KIND == ADD && p.gain) *(u32 *)(p.y + (long long)c * p.n + column) = pack(a * lo(gain), b * hi(gain));
    }
    if (KIND == ADD && p.gain) {
        float squares = a * a + b * b;
#pragma unroll
        for (int s = 16; s; s >>= 1) squares += __shfl_xor_sync(~0u, squares, s);
        if (lane == 0 && (first * MW + half) * 64 < p.n) p.next_squares[(first * MW + half) * p.rows + c] = squares;
    }
}
