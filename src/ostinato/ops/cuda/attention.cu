// Everything between the QKV projection and the output projection for one new token of each row: head norm,
// rotary embedding, KV write, attention over a paged cache. bfloat16.
//
// It is as fast as keys and values arrive, so they go from memory into registers and from there into
// tensor cores. A block of WARPS warps has one item: a row, a KV head, and a split of the row's context. Its
// warps take TILES tiles of 16 tokens in turn; their results are merged in shared memory. Keys of the next tiles are
// asked for as soon as the present ones are used up, values likewise; many warps on a multiprocessor do the rest.
//
// The first tiles are asked for before griddepcontrol.wait, at places that follow from the row's length, its row in the
// block table and what stands there. A step writes all of that, so each is looked up again behind the wait, and if
// one differs, keys and values are asked for again. What old tokens have in the cache, no kernel of a step writes: it was
// complete before the step's first kernel began, which is never launched early. The new token's key and value, and
// the queries, are read behind the wait.
//
// Tokens are the rows of both products. S^T = K Q^T: the tile is 16 tokens, the columns are up to 8 query
// heads that share the KV head. A lane (g = lane / 4, t = lane % 4) takes 16 consecutive bytes of tokens g and
// g + 8, where mma would give it far pairs; queries are taken the same way, and the sum is the same. O^T = V^T P^T:
// the tile is 16 dimensions; a lane takes 8 consecutive dimensions of tokens 2t, 2t + 1, 2t + 8 and
// 2t + 9, and pairs them up by moving bytes. P^T is S^T transposed by `movmatrix`. So no lane asks another
// for anything but the largest score.
//
// How a row is cut (`cut`) depends on its own length and on the number of rows, padding included: SPLITS parts, of at
// least CHUNK tokens; more, up to MOST, where they would be longer than LONG. The first p.primary blocks have a split
// each. Those of a row and a KV head are a cluster (CLUSTER), and its first block merges what the others send into its shared
// memory. Blocks after them share what rows have beyond SPLITS; such a row's splits are merged by the last block to
// finish, through memory. Always in order.
//
// Macros: HD GROUP (query heads of a KV head) KVH BLOCK_SIZE WINDOW TABLE_WIDTH NORM CHUNK LONG MOST WARPS TILES SPLITS
// CLUSTER BLOCKS (of a multiprocessor; fewer registers let the kernels in front and behind in beside them).

#include "common.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int STEP = 16;                    // tokens of a tile
constexpr int WHOLE = TILES * STEP;         // tokens that a warp looks at together
constexpr int HEADS = GROUP * KVH;
constexpr int HALF = HD / 2, EACH = HALF / 32;   // dimensions of a half in a lane, for rotating
constexpr int SEGS = HD / 32;               // 64-byte pieces of a head
constexpr int WIDE = HD / 64;               // 128-byte pieces of a head
constexpr int ROW = KVH * HD;               // from token to token in a cache block
constexpr int QKV = (HEADS + 2 * KVH) * HD;
constexpr int Q_STRIDE = HD + 32;           // of queries in shared memory: rows of a pair share no bank
constexpr int O_STRIDE = HD + 4;
constexpr int VECTORS = (GROUP + 2 + WARPS - 1) / WARPS;   // heads that a warp rotates
constexpr bool ALIGNED = BLOCK_SIZE % STEP == 0;           // 16 tokens lie side by side
static_assert(HD == 64 || HD == 128, "head dimensions that lanes share evenly");
static_assert(GROUP >= 1 && GROUP <= 8, "query heads are the eight columns of a tile");
static_assert(CHUNK % (WARPS * WHOLE) == 0, "whole steps of all warps");

struct Params {
    const u16 *qkv;                // [S, QKV]
    const int *positions, *slots;  // [S]
    const float *rope;             // [positions, 2, HALF]
    const u16 *q_norm, *k_norm;    // [HD], or null
    u16 *keys, *values;            // [blocks, BLOCK_SIZE, KVH, HD]
    const int *table;              // [R, TABLE_WIDTH]
    const int *rows, *lens;        // [S]
    float *parts;                  // of a row: [HEADS, MOST, HD], then (maximum, sum) [HEADS, MOST, 2]
    u32 *semaphores;               // [S, KVH], zero before and after
    u16 *out;                      // [S, HEADS * HD]
    float eps, scale;              // the scale for a softmax in powers of two
    int num_seqs, primary;
    int blocks, angles;            // of the cache, rows of `rope`: what a guess may point to
};

struct Cut { int first, base, chunk, count; };   // first visible token; where splits start; tokens a split; splits

struct Shared {
    alignas(16) u16 q[8 * Q_STRIDE];
    alignas(16) u16 k[HD];
    alignas(16) u16 v[HD];
    alignas(16) float o[WARPS][GROUP][O_STRIDE];
    float2 stats[WARPS][8];        // (maximum, sum)
    u32 last;
    float2 parts[CLUSTER ? SPLITS : 1][GROUP][HD / 2];   // a cluster's, in its first block
    float2 part_stats[CLUSTER ? SPLITS : 1][GROUP];
};

// Tokens of a step, for this lane, tile by tile. Places in the cache are counted in 16 bytes, of 64 GiB at most.
struct Keys { uint4 at[TILES][2][SEGS]; };
struct Values { uint4 at[TILES][WIDE][4]; };

__device__ __forceinline__ float widen(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ u16 narrow(float a) { return (u16)pack(a, 0.f); }
__device__ __forceinline__ float2 ldcg2(const float *p) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
    return v;
}
// What was there; after `most` comes zero.
__device__ __forceinline__ u32 count_up(u32 *p, u32 most) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(most) : "memory");
    return before;
}
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// To the same place in the first block of the cluster.
__device__ __forceinline__ void send(float2 *to, float2 v) {
    u32 at;
    #if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(at) : "r"((u32)__cvta_generic_to_shared(to)));
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(v.x), "f"(v.y) : "memory");
#endif
}
// A cluster's barrier: blocks that have ended count as arrived.
__device__ __forceinline__ void arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void meet() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ Cut cut(int length) {
    Cut c;
    c.first = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
    c.base = c.first / STEP * STEP;
    const int seen = length - c.base;
    c.chunk = ((seen + SPLITS - 1) / SPLITS + CHUNK - 1) / CHUNK * CHUNK;
    if (c.chunk > LONG) {
        const int parts = min(MOST, (seen + LONG - 1) / LONG);
        c.chunk = ((seen + parts - 1) / parts + CHUNK - 1) / CHUNK * CHUNK;
    }
    c.chunk = max(c.chunk, CHUNK);
    c.count = max((seen + c.chunk - 1) / c.chunk, 1);
    return c;
}

// Where a warp's tokens lie in the cache. Its step i begins at token start + (warp + WARPS * i) * WHOLE.
struct Walk {
    const int *table;
    int blocks;              // of the cache
    int head, row;           // KV head; in the table
    int first, newest, end;  // tokens: the row's first visible one and its last; behind the split's last
    int at;                  // first token of the step to be loaded
    int turn;                // tiles in front of it
    int entry;               // ALIGNED: block of tile (turn & ~31) + lane; else slot of token at + lane

    // Of no more than the cache's blocks, whatever stands in the table.
    __device__ __forceinline__ int found() const {
        const int lane = threadIdx.x & 31;
        const int away = ALIGNED ? lane / TILES * (WARPS * WHOLE) + lane % TILES * STEP : lane % WHOLE;
        const int token = ALIGNED ? at + away : max(min(max(at + away, first), newest), 0);
        const int block = min((u32)ldcg(table + row * TABLE_WIDTH + min(token / BLOCK_SIZE, TABLE_WIDTH - 1)), (u32)blocks - 1);
        return ALIGNED ? block : block * BLOCK_SIZE + token % BLOCK_SIZE;
    }
    __device__ __forceinline__ void next() {
        at += WARPS * WHOLE;
        turn += TILES;
        if (!ALIGNED || (turn & 31) == 0) entry = found();
    }
    // Of the step's tile j, in tiles; where they are not ALIGNED, of its tokens, in lanes j * STEP and on.
    __device__ __forceinline__ int place(int j) const {
        if (!ALIGNED) return entry;
        return __shfl_sync(~0u, entry, (turn + j) & 31) * (BLOCK_SIZE / STEP) + (at + j * STEP) % BLOCK_SIZE / STEP;
    }
};

__device__ __forceinline__ void load(Keys &k, const Params &p, const Walk &w) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const u32 own = w.head * (HD / 8) + t;
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        if (w.at + j * STEP >= w.end) break;
        const int place = w.place(j);
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const u32 at = ALIGNED ? place * (STEP * ROW / 8) + g * (ROW / 8)
                                   : __shfl_sync(~0u, place, j * STEP + g + 8 * b) * (ROW / 8);
            const u16 *from = p.keys + (u64)(at + own) * 8 + (ALIGNED ? b * 8 * ROW : 0);
#pragma unroll
            for (int s = 0; s < SEGS; ++s) k.at[j][b][s] = ldcg4(from + s * 32);
        }
    }
}

__device__ __forceinline__ void load(Values &v, const Params &p, const Walk &w) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const u32 own = w.head * (HD / 8) + g;
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        if (w.at + j * STEP >= w.end) break;
        const int place = w.place(j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 at = ALIGNED ? place * (STEP * ROW / 8) + t * (2 * ROW / 8)
                                   : __shfl_sync(~0u, place, j * STEP + 2 * t + i / 2 * 8 + i % 2) * (ROW / 8);
            const u16 *from = p.values + (u64)(at + own) * 8 + (ALIGNED ? (i / 2 * 8 + i % 2) * ROW : 0);
#pragma unroll
            for (int w = 0; w < WIDE; ++w) v.at[j][w][i] = ldcg4(from + w * 64);
        }
    }
}

// A head of the new token in a warp, two halves: dimensions lane * EACH + e of each.
struct Head { u16 low[EACH], high[EACH]; };
struct Angles { float cos[EACH], sin[EACH]; };

__device__ __forceinline__ Angles angles_at(const float *p) {
    const int lane = threadIdx.x & 31;
    Angles a;
#pragma unroll
    for (int e = 0; e < EACH; ++e) { a.cos[e] = p[lane * EACH + e]; a.sin[e] = p[HALF + lane * EACH + e]; }
    return a;
}

__device__ __forceinline__ Head head_at(const u16 *p) {
    const int lane = threadIdx.x & 31;
    Head h;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        h.low[e] = ldcg(p + lane * EACH + e);
        h.high[e] = ldcg(p + HALF + lane * EACH + e);
    }
    return h;
}

// Norm and rotation, rounded where a model that keeps its activations in bfloat16 rounds.
__device__ __forceinline__ void rotate(Head &h, const Head &norm, const Angles &a, float eps) {
    float low[EACH], high[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) { low[e] = widen(h.low[e]); high[e] = widen(h.high[e]); }
    if (NORM) {
        float squares = 0.f;
#pragma unroll
        for (int e = 0; e < EACH; ++e) squares += low[e] * low[e] + high[e] * high[e];
#pragma unroll
        for (int d = 16; d; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
        const float factor = rsqrtf(squares / HD + eps);
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            low[e] = rounded(widen(norm.low[e]) * rounded(low[e] * factor));
            high[e] = rounded(widen(norm.high[e]) * rounded(high[e] * factor));
        }
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        h.low[e] = narrow(low[e] * a.cos[e] - high[e] * a.sin[e]);
        h.high[e] = narrow(high[e] * a.cos[e] + low[e] * a.sin[e]);
    }
}

__device__ __forceinline__ void put(u16 *to, const Head &h) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int e = 0; e < EACH; ++e) { to[lane * EACH + e] = h.low[e]; to[HALF + lane * EACH + e] = h.high[e]; }
}

__device__ __forceinline__ uint4 keep(bool yes, uint4 v) {
    return yes ? v : make_uint4(0, 0, 0, 0);
}

// What this warp has seen: of heads 2t and 2t + 1.
struct State { float best[2], total[2], acc[WIDE * 4][4]; };

// One step: scores, softmax, values. `refill_keys` and `refill_values` ask for the next step's where there is one.
template <typename A, typename B>
__device__ __forceinline__ void attend(State &o, Keys &k, Values &v, const uint4 (&q)[SEGS], const Shared &sh, int at, int first,
                                       int newest, float scale, A refill_keys, B refill_values) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const bool ragged = at + WHOLE > newest || at < first;   // has the new token, or others to be left out
    if (ragged) {
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int b = 0; b < 2; ++b)
                if (at + n * STEP + g + 8 * b == newest)
#pragma unroll
                    for (int s = 0; s < SEGS; ++s) k.at[n][b][s] = *(const uint4 *)(sh.k + s * 32 + t * 8);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int token = at + n * STEP + 2 * t + j / 2 * 8 + j % 2;
#pragma unroll
                for (int w = 0; w < WIDE; ++w) {
                    v.at[n][w][j] = keep(token >= first && token < newest, v.at[n][w][j]);   // 0 times NaN is NaN
                    if (token == newest) v.at[n][w][j] = *(const uint4 *)(sh.v + w * 64 + g * 8);
                }
            }
        }
    }
    float c[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = 0.f;
#pragma unroll
        for (int s = 0; s < SEGS; ++s) {
            mma(c[n], k.at[n][0][s].x, k.at[n][1][s].x, k.at[n][0][s].y, k.at[n][1][s].y, q[s].x, q[s].y);
            mma(d, k.at[n][0][s].z, k.at[n][1][s].z, k.at[n][0][s].w, k.at[n][1][s].w, q[s].z, q[s].w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] += d[i];
    }
    refill_keys();
    float top[2] = {-infinity(), -infinity()}, fade[2];
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = at + n * STEP + g + i / 2 * 8;
            c[n][i] *= scale;
            if (ragged && (token < first || token > newest)) c[n][i] = -infinity();
            top[i % 2] = fmaxf(top[i % 2], c[n][i]);
        }
#pragma unroll
    for (int far = 4; far < 32; far *= 2)
#pragma unroll
        for (int i = 0; i < 2; ++i) top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], far));
    u32 b[TILES][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float above = fmaxf(o.best[i], top[i]);   // finite: a step has a token that is seen
        fade[i] = exp2_(o.best[i] - above);
        o.best[i] = above;
        o.total[i] *= fade[i];
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = exp2_(c[n][i] - o.best[i % 2]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            o.total[i] += c[n][i] + c[n][i + 2];
            b[n][i] = transpose(pack(c[n][2 * i], c[n][2 * i + 1]));
        }
    }
#pragma unroll
    for (int w = 0; w < WIDE; ++w)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float *acc = o.acc[w * 4 + i];
            acc[0] *= fade[0]; acc[1] *= fade[1]; acc[2] *= fade[0]; acc[3] *= fade[1];
        }
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int w = 0; w < WIDE; ++w)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 x0 = (&v.at[n][w][0].x)[i], x1 = (&v.at[n][w][1].x)[i];
                const u32 x2 = (&v.at[n][w][2].x)[i], x3 = (&v.at[n][w][3].x)[i];
                mma(o.acc[w * 4 + i], __byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632), __byte_perm(x2, x3, 0x5410),
                    __byte_perm(x2, x3, 0x7632), b[n][0], b[n][1]);
            }
    refill_values();
}

// This warp's part to shared memory: a lane has dimensions 8g to 8g + 7 of heads 2t and 2t + 1.
__device__ __forceinline__ void leave(State &o, Shared &sh) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int far = 4; far < 32; far *= 2)
#pragma unroll
        for (int i = 0; i < 2; ++i) o.total[i] += __shfl_xor_sync(~0u, o.total[i], far);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int head = 2 * t + i;
        if (head >= GROUP) continue;
        if (g == 0) sh.stats[warp][head] = make_float2(o.best[i], o.total[i]);
#pragma unroll
        for (int w = 0; w < WIDE; ++w) {
            float *to = sh.o[warp][head] + w * 64 + g * 8;
            const float(*a)[4] = o.acc + w * 4;
            *(float4 *)to = make_float4(a[0][i], a[0][i + 2], a[1][i], a[1][i + 2]);
            *(float4 *)(to + 4) = make_float4(a[2][i], a[2][i + 2], a[3][i], a[3][i + 2]);
        }
    }
}

// Of the splits of two dimensions of a head, in order; four are asked for at a time.
__device__ __forceinline__ float2 merge(const float *part, const float *stats, int count) {
    float best = -infinity(), total = 0.f;
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll 1
    for (int j0 = 0; j0 < count; j0 += 4) {
        float2 m[4], v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int own = min(j0 + j, count - 1);
            m[j] = ldcg2(stats + own * 2);
            v[j] = ldcg2(part + own * HD);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (j0 + j >= count) break;
            const float above = fmaxf(best, m[j].x), fade = exp2_(best - above), weight = exp2_(m[j].x - above);
            best = above;
            total = total * fade + m[j].y * weight;
            sum.x = sum.x * fade + v[j].x * weight;
            sum.y = sum.y * fade + v[j].y * weight;
        }
    }
    return make_float2(sum.x / total, sum.y / total);
}

// The k-th (row, KV head, split) beyond SPLITS; false behind the last. Every warp looks for itself.
__device__ __forceinline__ bool beyond(const Params &p, int k, int &s, int &h, int &split) {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int at = 0; at < p.num_seqs; at += 32) {
        const int length = at + lane < p.num_seqs ? ldcg(p.lens + at + lane) : 0;
        const int own = max(cut(length).count - SPLITS, 0) * KVH;
        int end = own;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int other = __shfl_up_sync(~0u, end, d);
            if (lane >= d) end += other;
        }
        const int all = __shfl_sync(~0u, end, 31);
        if (k < all) {
            const int who = __ffs(__ballot_sync(~0u, k < end)) - 1;
            k -= __shfl_sync(~0u, end - own, who);
            s = at + who; h = k % KVH; split = SPLITS + k / KVH;
            return true;
        }
        k -= all;
    }
    return false;
}

__device__ __forceinline__ void item(const Params &p, Shared &sh, int s, int h, int split, bool clustered) {
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
    auto out = [&](int i) -> u32 & { return ((u32 *)p.out)[(s * KVH + h) * (GROUP * HD / 2) + i]; };   // two dimensions
    int length, row, position;
    Cut c;
    Walk walk;
    walk.table = p.table;
    walk.blocks = p.blocks;
    walk.head = h;
    auto look_up = [&] {
        length = min(ldcg(p.lens + s), TABLE_WIDTH * BLOCK_SIZE);
        row = max(ldcg(p.rows + s), 0);
        position = ldcg(p.positions + s);
        c = cut(max(length, 0));
        const int start = c.base + split * c.chunk;
        walk.row = row;
        walk.first = c.first;
        walk.newest = length - 1;
        walk.end = min(start + c.chunk, length);
        walk.at = start + warp * WHOLE;
        walk.turn = 0;
        walk.entry = walk.found();
    };
    Keys k = {};   // zero: what is filled under a condition only would be alive from the start
    Values v = {};
    Angles angles = {};
    auto ask = [&] {
        angles = angles_at(p.rope + (long long)min(max(position, 0), p.angles - 1) * HD);
        load(k, p, walk);
        load(v, p, walk);
    };
    auto has_work = [&] { return length > 0 && split < c.count; };
    look_up();
    if (has_work()) ask();
    Head norms[2] = {};
    if (NORM) { norms[0] = head_at(p.q_norm); norms[1] = head_at(p.k_norm); }
#pragma unroll 1
    for (int i = tid; i < (8 - GROUP) * HD / 2; i += THREADS)   // columns of the tile without a head
        *(u32 *)(sh.q + (GROUP + i / (HD / 2)) * Q_STRIDE + i % (HD / 2) * 2) = 0;
    if (CLUSTER && clustered) meet();   // all of its blocks have begun
    wait_for_predecessor();

    int slot = 0;
#pragma unroll 1
    for (bool same = true;;) {
        if (!same) {
            look_up();
            if (has_work()) ask();
        }
        // Heads of the new token, to shared memory: queries, key, value.
        Head heads[VECTORS];
#pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            const int i = min(warp + n * WARPS, GROUP + 1);
            heads[n] = head_at(p.qkv + (long long)s * QKV + (i < GROUP ? h * GROUP + i : HEADS + (i - GROUP) * KVH + h) * HD);
        }
        // Each warp looks for itself: what it saw before the wait need not be what others saw.
        same = (walk.found() == walk.entry) & (min(ldcg(p.lens + s), TABLE_WIDTH * BLOCK_SIZE) == length) &
               (max(ldcg(p.rows + s), 0) == row) & (ldcg(p.positions + s) == position);
        if (warp == WARPS - 1) slot = ldcg(p.slots + s);   // it has the fewest heads
#pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            const int i = warp + n * WARPS;
            if (i >= GROUP + 2) continue;
            if (i < GROUP) rotate(heads[n], norms[0], angles, p.eps);
            if (i == GROUP) rotate(heads[n], norms[1], angles, p.eps);
            put(i < GROUP ? sh.q + i * Q_STRIDE : i == GROUP ? sh.k : sh.v, heads[n]);
        }
        same = __syncthreads_and(same);
        if (same) break;
    }
    if (!has_work()) {
        if (length <= 0 && split == 0)
#pragma unroll 1
            for (int i = tid; i < GROUP * HD / 2; i += THREADS) out(i) = 0;
        return;
    }
    if (warp == WARPS - 1 && lane < HD / 4 && split == c.count - 1) {
        const bool key = lane < HD / 8;
        const int d = lane % (HD / 8) * 8;
        *(uint4 *)((key ? p.keys : p.values) + (long long)slot * ROW + h * HD + d) = *(const uint4 *)((key ? sh.k : sh.v) + d);
    }
    State o;
#pragma unroll
    for (int i = 0; i < 2; ++i) { o.best[i] = -infinity(); o.total[i] = 0.f; }
#pragma unroll
    for (int i = 0; i < WIDE * 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) o.acc[i][j] = 0.f;
    uint4 q[SEGS];
#pragma unroll
    for (int i = 0; i < SEGS; ++i) q[i] = *(const uint4 *)(sh.q + g * Q_STRIDE + i * 32 + t * 8);
#pragma unroll 1
    for (int at = walk.at; at < walk.end; at = walk.at) {
        walk.next();
        // Something that the whole warp does makes this a branch, and loads in front of it cannot sink below the softmax.
        attend(o, k, v, q, sh, at, walk.first, walk.newest, p.scale,
               [&] { __syncwarp(); load(k, p, walk); }, [&] { load(v, p, walk); });
    }
    leave(o, sh);
    __syncthreads();
    float *space = p.parts + (long long)s * (HEADS * MOST * (HD + 2));
    float *stats = space + HEADS * MOST * HD;
#pragma unroll 1
    for (int i = tid; i < GROUP * HD / 2; i += THREADS) {
        const int head = i / (HD / 2), d = i % (HD / 2) * 2;
        float best = -infinity(), total = 0.f;
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) best = fmaxf(best, sh.stats[w][head].x);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float weight = exp2_(sh.stats[w][head].x - best);
            const float2 part = *(const float2 *)(sh.o[w][head] + d);
            total += sh.stats[w][head].y * weight;
            sum.x += part.x * weight;
            sum.y += part.y * weight;
        }
        if (c.count == 1) {
            const float factor = __fdividef(1.f, total);
            out(i) = pack(sum.x * factor, sum.y * factor);
        } else if (CLUSTER && c.count <= SPLITS) {
            send(&sh.parts[split][head][d / 2], sum);
            if (d == 0) send(&sh.part_stats[split][head], make_float2(best, total));
        } else {
            const int own = (h * GROUP + head) * MOST + split;
            *(float2 *)(space + own * HD + d) = sum;
            if (d == 0) *(float2 *)(stats + own * 2) = make_float2(best, total);
        }
    }
    if (CLUSTER && c.count > 1 && c.count <= SPLITS) {
        __syncwarp();
        arrive();
        if (split) return;
        meet();
#pragma unroll 1
        for (int i = tid; i < GROUP * HD / 2; i += THREADS) {
            const int head = i / (HD / 2), d = i % (HD / 2);
            float best = -infinity(), total = 0.f;
            float2 sum = make_float2(0.f, 0.f);
#pragma unroll
            for (int j = 0; j < SPLITS; ++j)
                if (j < c.count) best = fmaxf(best, sh.part_stats[j][head].x);
#pragma unroll
            for (int j = 0; j < SPLITS; ++j)
                if (j < c.count) {
                    const float2 part = sh.parts[j][head][d], stats = sh.part_stats[j][head];
                    const float weight = exp2_(stats.x - best);
                    total += stats.y * weight;
                    sum.x += part.x * weight;
                    sum.y += part.y * weight;
                }
            const float factor = __fdividef(1.f, total);
            out(i) = pack(sum.x * factor, sum.y * factor);
        }
        return;
    }
    if (c.count == 1) return;
    __syncthreads();   // every thread's part is stored before the count goes up
    if (tid == 0) {
        sh.last = count_up(p.semaphores + s * KVH + h, c.count - 1) == (u32)c.count - 1;
    }
    __syncthreads();
    if (!sh.last) return;
#pragma unroll 1
    for (int i = tid; i < GROUP * HD / 2; i += THREADS) {
        const int head = h * GROUP + i / (HD / 2), d = i % (HD / 2) * 2;
        const float2 r = merge(space + head * MOST * HD + d, stats + head * MOST * 2, c.count);
        out(i) = pack(r.x, r.y);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention(const __grid_constant__ Params p) {
    __shared__ Shared sh;
    let_successor_start();
    const int first = blockIdx.x, pair = first / SPLITS;
    int s = pair / KVH, h = pair % KVH, split = first % SPLITS;
    const bool primary = first < p.primary;
    if (CLUSTER && primary) arrive();
    if (!primary) {
        wait_for_predecessor();
        bool any = false;
#pragma unroll 1
        for (int i = threadIdx.x; i < p.num_seqs; i += THREADS) any |= cut(ldcg(p.lens + i)).count > SPLITS;
        if (!__syncthreads_or(any)) return;
    }
#pragma unroll 1
    for (int k = first - p.primary; primary || beyond(p, k, s, h, split); k += gridDim.x - p.primary) {
        item(p, sh, s, h, split, primary);
        if (primary) return;
        __syncthreads();   // before the next item writes what this one reads
    }
}
