// Everything between the QKV projection and the output projection for one new token of each row: head norm,
// rotary embedding, KV write, attention over a paged cache. bfloat16.
//
// It is as fast as keys and values arrive, so they go from memory into registers and from there into
// tensor cores. A block of WARPS warps has one item: a row, a KV head, and a split of the row's context. Its
// warps take 16 tokens in turn; their results are merged in shared memory, those of splits by the last
// block to finish, always in order. Keys of the next 16 tokens are asked for as soon as the present ones are
// used up, values likewise; many warps on a multiprocessor do the rest.
//
// Tokens are the rows of both products. S^T = K Q^T: the tile is 16 tokens, the columns are up to 8 query
// heads that share the KV head. A lane (g = lane / 4, t = lane % 4) takes 16 consecutive bytes of tokens g and
// g + 8, where mma would give it far pairs; queries are taken the same way, and the sum is the same. O^T = V^T P^T:
// the tile is 16 dimensions; a lane takes 8 consecutive dimensions of tokens 2t, 2t + 1, 2t + 8 and
// 2t + 9, and pairs them up by moving bytes. P^T is S^T transposed by `movmatrix`. So no lane asks another
// for anything but the largest score.
//
// How a row is cut (`cut`) depends on its own length and on the number of rows, padding included:
// `splits` parts, of at least CHUNK tokens; more, up to MOST, where they would be longer than LONG. The first
// p.primary blocks have a split each, in order of splits, so that those without work come last. Blocks after them
// share what rows have beyond p.splits.
//
// Macros: HD GROUP (query heads of a KV head) KVH BLOCK_SIZE WINDOW TABLE_WIDTH NORM CHUNK LONG MOST WARPS.

#include "common.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int STEP = 16;                    // tokens that a warp looks at together
constexpr int HEADS = GROUP * KVH;
constexpr int HALF = HD / 2, EACH = HALF / 32;   // dimensions of a half in a lane, for rotating
constexpr int SEGS = HD / 32;               // 64-byte pieces of a head
constexpr int WIDE = HD / 64;               // 128-byte pieces of a head
constexpr int ROW = KVH * HD;               // from token to token in a cache block
constexpr int QKV = (HEADS + 2 * KVH) * HD;
constexpr int Q_STRIDE = HD + 32;           // of queries in shared memory: rows of a pair share no bank
constexpr int O_STRIDE = HD + 4;
constexpr int VECTORS = (GROUP + 2 + WARPS - 1) / WARPS;   // heads that a warp rotates
constexpr int BLOCKS = (HD == 64 ? 20 : 12) / WARPS;         // of a multiprocessor
constexpr bool ALIGNED = BLOCK_SIZE % STEP == 0;           // 16 tokens lie side by side
static_assert(HD == 64 || HD == 128, "head dimensions that lanes share evenly");
static_assert(GROUP >= 1 && GROUP <= 8, "query heads are the eight columns of a tile");
static_assert(CHUNK % (WARPS * STEP) == 0, "whole steps of all warps");

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
    int num_seqs, splits, primary;
};

struct Cut { int first, base, chunk, count; };   // first visible token; where splits start; tokens a split; splits

struct Shared {
    alignas(16) u16 q[8 * Q_STRIDE];
    alignas(16) u16 k[HD];
    alignas(16) u16 v[HD];
    alignas(16) float o[WARPS][GROUP][O_STRIDE];
    float2 stats[WARPS][8];        // (maximum, sum)
    u32 last;
};

// Tokens of a step, for this lane.
struct Keys { uint4 at[2][SEGS]; };
struct Values { uint4 at[WIDE][4]; };

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

__device__ __forceinline__ Cut cut(int length, int splits) {
    Cut c;
    c.first = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
    c.base = c.first / STEP * STEP;
    const int seen = length - c.base;
    c.chunk = ((seen + splits - 1) / splits + CHUNK - 1) / CHUNK * CHUNK;
    if (c.chunk > LONG) {
        const int parts = min(MOST, (seen + LONG - 1) / LONG);
        c.chunk = ((seen + parts - 1) / parts + CHUNK - 1) / CHUNK * CHUNK;
    }
    c.chunk = max(c.chunk, CHUNK);
    c.count = max((seen + c.chunk - 1) / c.chunk, 1);
    return c;
}

// Where a warp's tokens lie in the cache. Its step i begins at token start + (warp + WARPS * i) * STEP.
struct Walk {
    const int *table;   // the row's
    int at;             // first token of the step to be loaded
    int turn;           // that step's number
    int entry;          // ALIGNED: of the block table, for step (turn & ~31) + lane

    __device__ __forceinline__ void look_up() {
        if (ALIGNED) {
            const int lane = threadIdx.x & 31;
            entry = ldcg(table + min((at + lane * (WARPS * STEP)) / BLOCK_SIZE, TABLE_WIDTH - 1));
        }
    }
    __device__ __forceinline__ void next() {
        at += WARPS * STEP;
        if ((++turn & 31) == 0) look_up();
    }
};

// Slots of a step's tokens: the first one's, or with blocks of odd sizes those of lanes 0 to 15, one each.
__device__ __forceinline__ int slots_of(const Walk &w, int first, int newest) {
    if (ALIGNED) {
        const int block = __shfl_sync(~0u, w.entry, w.turn & 31);
        return block * (BLOCK_SIZE / STEP) + w.at % BLOCK_SIZE / STEP;   // in units of a step
    }
    const int token = min(max(w.at + (int)(threadIdx.x & 15), first), newest);
    return ldcg(w.table + token / BLOCK_SIZE) * BLOCK_SIZE + token % BLOCK_SIZE;
}

__device__ __forceinline__ void load(Keys &k, const u16 *keys, int slots) {
    const int g = (threadIdx.x & 31) >> 2;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        const u16 *from = ALIGNED ? keys + (long long)slots * (STEP * ROW) + b * 8 * ROW
                                  : keys + (long long)__shfl_sync(~0u, slots, g + 8 * b) * ROW;
#pragma unroll
        for (int s = 0; s < SEGS; ++s) k.at[b][s] = ldcg4(from + s * 32);
    }
}

__device__ __forceinline__ void load(Values &v, const u16 *values, int slots) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const u16 *from = ALIGNED ? values + (long long)slots * (STEP * ROW) + (j / 2 * 8 + j % 2) * ROW
                                  : values + (long long)__shfl_sync(~0u, slots, 2 * t + j / 2 * 8 + j % 2) * ROW;
#pragma unroll
        for (int w = 0; w < WIDE; ++w) v.at[w][j] = ldcg4(from + w * 64);
    }
}

// A head of the new token in a warp, two halves: dimensions lane * EACH + e of each.
struct Head { u16 low[EACH], high[EACH]; };

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
__device__ __forceinline__ void rotate(Head &h, const u16 *norm, const float *cos, const float *sin, float eps) {
    const int lane = threadIdx.x & 31;
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
            low[e] = rounded(widen(norm[lane * EACH + e]) * rounded(low[e] * factor));
            high[e] = rounded(widen(norm[HALF + lane * EACH + e]) * rounded(high[e] * factor));
        }
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        h.low[e] = narrow(low[e] * cos[e] - high[e] * sin[e]);
        h.high[e] = narrow(high[e] * cos[e] + low[e] * sin[e]);
    }
}

__device__ __forceinline__ void put(u16 *to, const Head &h) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int e = 0; e < EACH; ++e) { to[lane * EACH + e] = h.low[e]; to[HALF + lane * EACH + e] = h.high[e]; }
}

// Queries, and in a row's last split key and value, of the new token: to shared memory.
__device__ __forceinline__ void new_token(const Params &p, Shared &sh, int s, int h, int position, bool last) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u16 *row = p.qkv + (long long)s * QKV;
    const float *angles = p.rope + (long long)position * HD;
    Head heads[VECTORS];
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int i = warp + n * WARPS;
        if (i < GROUP + (last ? 2 : 0))
            heads[n] = head_at(row + (i < GROUP ? h * GROUP + i : HEADS + (i - GROUP) * KVH + h) * HD);
    }
    float cos[EACH], sin[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) { cos[e] = angles[lane * EACH + e]; sin[e] = angles[HALF + lane * EACH + e]; }
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int i = warp + n * WARPS;
        if (i >= GROUP + (last ? 2 : 0)) continue;
        if (i <= GROUP) rotate(heads[n], i < GROUP ? p.q_norm : p.k_norm, cos, sin, p.eps);
        put(i < GROUP ? sh.q + i * Q_STRIDE : i == GROUP ? sh.k : sh.v, heads[n]);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < (8 - GROUP) * HD / 2; i += THREADS)   // columns of the tile without a head
        *(u32 *)(sh.q + (GROUP + i / (HD / 2)) * Q_STRIDE + i % (HD / 2) * 2) = 0;
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
    const bool ragged = at + STEP > newest || at < first;   // has the new token, or others to be left out
    if (ragged) {
#pragma unroll
        for (int b = 0; b < 2; ++b)
            if (at + g + 8 * b == newest)
#pragma unroll
                for (int s = 0; s < SEGS; ++s) k.at[b][s] = *(const uint4 *)(sh.k + s * 32 + t * 8);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int token = at + 2 * t + j / 2 * 8 + j % 2;
#pragma unroll
            for (int w = 0; w < WIDE; ++w) {
                v.at[w][j] = keep(token >= first && token < newest, v.at[w][j]);   // 0 times NaN is NaN
                if (token == newest) v.at[w][j] = *(const uint4 *)(sh.v + w * 64 + g * 8);
            }
        }
    }
    float c[4] = {0.f, 0.f, 0.f, 0.f}, d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int s = 0; s < SEGS; ++s) {
        mma(c, k.at[0][s].x, k.at[1][s].x, k.at[0][s].y, k.at[1][s].y, q[s].x, q[s].y);
        mma(d, k.at[0][s].z, k.at[1][s].z, k.at[0][s].w, k.at[1][s].w, q[s].z, q[s].w);
    }
    refill_keys();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = at + g + i / 2 * 8;
        c[i] = (c[i] + d[i]) * scale;
        if (ragged && (token < first || token > newest)) c[i] = -infinity();
    }
    float top[2] = {fmaxf(c[0], c[2]), fmaxf(c[1], c[3])}, fade[2];
#pragma unroll
    for (int far = 4; far < 32; far *= 2)
#pragma unroll
        for (int i = 0; i < 2; ++i) top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], far));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float above = fmaxf(o.best[i], top[i]);   // finite: a step has a token that is seen
        fade[i] = exp2_(o.best[i] - above);
        o.best[i] = above;
        c[i] = exp2_(c[i] - above);
        c[i + 2] = exp2_(c[i + 2] - above);
        o.total[i] = o.total[i] * fade[i] + (c[i] + c[i + 2]);
    }
    const u32 b0 = transpose(pack(c[0], c[1])), b1 = transpose(pack(c[2], c[3]));
#pragma unroll
    for (int w = 0; w < WIDE; ++w)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float *acc = o.acc[w * 4 + i];
            const u32 x0 = (&v.at[w][0].x)[i], x1 = (&v.at[w][1].x)[i], x2 = (&v.at[w][2].x)[i], x3 = (&v.at[w][3].x)[i];
            acc[0] *= fade[0]; acc[1] *= fade[1]; acc[2] *= fade[0]; acc[3] *= fade[1];
            mma(acc, __byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632), __byte_perm(x2, x3, 0x5410),
                __byte_perm(x2, x3, 0x7632), b0, b1);
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

// The k-th (row, KV head, split) beyond p.splits; false behind the last. Every warp looks for itself.
__device__ __forceinline__ bool beyond(const Params &p, int k, int &s, int &h, int &split) {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int at = 0; at < p.num_seqs; at += 32) {
        const int length = at + lane < p.num_seqs ? ldcg(p.lens + at + lane) : 0;
        const int own = max(cut(length, p.splits).count - p.splits, 0) * KVH;
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
            s = at + who; h = k % KVH; split = p.splits + k / KVH;
            return true;
        }
        k -= all;
    }
    return false;
}

__device__ __forceinline__ void item(const Params &p, Shared &sh, int s, int h, int split, int likely) {
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
    const int length = ldcg(p.lens + s), row = ldcg(p.rows + s), position = ldcg(p.positions + s), slot = ldcg(p.slots + s);
    // Looked up together with the length: a guess at the row, and at where the split starts, right for short contexts.
    const int guess = split * CHUNK;
    Walk walk = {p.table + (long long)likely * TABLE_WIDTH, guess + warp * STEP, 0, 0};
    walk.look_up();
    u16 *out = p.out + (long long)s * (HEADS * HD) + h * (GROUP * HD);
    if (length <= 0) {
        if (split == 0)
    #pragma unroll 1
        for (int i = tid; i < GROUP * HD / 2; i += THREADS) ((u32 *)out)[i] = 0;
        return;
    }
    const Cut c = cut(length, p.splits);
    if (split >= c.count) return;
    const int newest = length - 1, start = c.base + split * c.chunk, end = min(start + c.chunk, length);
    const bool last = split == c.count - 1;

    if (start != guess || row != likely) {
        walk.table = p.table + (long long)row * TABLE_WIDTH;
        walk.at = start + warp * STEP;
        walk.look_up();
    }
    const u16 *keys = p.keys + h * HD + t * 8 + (ALIGNED ? g * ROW : 0);
    const u16 *values = p.values + h * HD + g * 8 + (ALIGNED ? 2 * t * ROW : 0);
    Keys k;
    Values v;
    if (walk.at < end) {
        const int slots = slots_of(walk, c.first, newest);
        load(k, keys, slots);
        load(v, values, slots);
    }
    new_token(p, sh, s, h, position, last);
    __syncthreads();
    if (last && tid < HD / 4) {
        const bool key = tid < HD / 8;
        const int d = tid % (HD / 8) * 8;
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
    for (int at = walk.at; at < end; at = walk.at) {
        walk.next();
        const bool more = walk.at < end;
        const int slots = more ? slots_of(walk, c.first, newest) : 0;
        // Something that the whole warp does makes this a branch, and loads in front of it cannot sink below the softmax.
        attend(o, k, v, q, sh, at, c.first, newest, p.scale,
               [&] { if (more) { __syncwarp(); load(k, keys, slots); } }, [&] { if (more) load(v, values, slots); });
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
            *(u32 *)(out + head * HD + d) = pack(sum.x / total, sum.y / total);
        } else {
            const int own = (h * GROUP + head) * MOST + split;
            *(float2 *)(space + own * HD + d) = sum;
            if (d == 0) *(float2 *)(stats + own * 2) = make_float2(best, total);
        }
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
        *(u32 *)(out + i * 2) = pack(r.x, r.y);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention(const __grid_constant__ Params p) {
    __shared__ Shared sh;
    let_successor_start();
    const int pairs = p.num_seqs * KVH;
    if ((int)blockIdx.x < p.primary) {
        const int split = blockIdx.x / pairs, pair = blockIdx.x % pairs, s = pair / KVH;
        const int likely = max(ldcg(p.rows + s), 0);   // before the wait, so no more than likely
        wait_for_predecessor();
        item(p, sh, s, pair % KVH, split, likely);
        return;
    }
    wait_for_predecessor();
    bool any = false;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.num_seqs; i += THREADS) any |= cut(ldcg(p.lens + i), p.splits).count > p.splits;
    if (!__syncthreads_or(any)) return;
    int s, h, split;
    for (int k = blockIdx.x - p.primary; beyond(p, k, s, h, split); k += gridDim.x - p.primary) {
        item(p, sh, s, h, split, max(ldcg(p.rows + s), 0));
        __syncthreads();   // before the next item writes what this one reads
    }
}
