// Everything between the QKV projection and the output projection for one new token of each row: head norm,
// rotary embedding, KV write, attention over a paged cache. bfloat16.
//
// It is as fast as keys and values arrive. A block of WARPS warps has one item: a row, a KV head, and a split of the
// row's context. Its warps take steps of TILES tiles of 16 tokens in turn, each for itself; they meet once, at the end, to merge
// their results. A warp has a ring of PIECES pieces in shared memory: a step's keys, or its values, asynchronously
// copied. As soon as a piece is used up, the next one is asked for in its place.
//
// The ring is filled before griddepcontrol.wait, from places that follow from the row's length, its row in the
// block table and what stands there. A step writes all of that, so each is looked up again behind the wait, and if
// one differs, keys and values are asked for again. What old tokens have in the cache, no kernel of a step writes: it was
// complete before the step's first kernel began, which is never launched early. The new token's key and value, and
// the queries, are read behind the wait: each warp takes all of its KV head's queries, and turns them, for itself.
//
// Tokens are the rows of both products. S^T = K Q^T: the tile is 16 tokens, the columns are up to 8 query
// heads that share the KV head. O^T = V^T P^T: the tile is 16 dimensions. Both take the cache's operand by `ldmatrix`;
// P^T is S^T transposed by `movmatrix`. So no lane (g = lane / 4, t = lane % 4) asks another for anything but the largest score.
//
// How a row is cut (`cut`) depends on its own length and on the number of rows, padding included: SPLITS parts, of at
// least CHUNK tokens; more, up to MOST, where they would be longer than LONG. The first p.primary blocks have a split
// each. Those of a row and a KV head are a cluster (CLUSTER), and its first block merges what the others send into its shared
// memory. Blocks after them share what rows have beyond SPLITS; such a row's splits are merged by the last block to
// finish, through memory. Always in order.
//
// Macros: HD GROUP (query heads of a KV head) KVH BLOCK_SIZE WINDOW TABLE_WIDTH NORM CHUNK LONG MOST WARPS TILES PIECES
// SPLITS CLUSTER BLOCKS (of a multiprocessor; fewer registers let the kernels in front and behind in beside them).

#include "common.cuh"
#include "heads.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int QKV = (HEADS + 2 * KVH) * HD;
constexpr int LOOKS = ALIGNED ? 1 : (PIECES + 1) / 2;   // into the block table, for the first pieces
constexpr int LOOPED = ALIGNED ? 1 : PIECES;   // one code for all pieces, where no array of them is kept
static_assert(CHUNK % (WARPS * WHOLE) == 0, "whole steps of all warps");
static_assert(32 % TILES == 0 && (ALIGNED || WHOLE <= 32), "lanes for a step's tiles, or for its tokens where they lie apart");

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
    int table_rows;                // R
};

struct Cut { int first, base, chunk, count; };   // first visible token; where splits start; tokens a split; splits

struct Shared {
    alignas(128) u16 ring[WARPS][PIECES][PIECE];   // keys and values in turn
    alignas(16) float rope[WARPS][HD];             // cosines, sines of the new token
    alignas(16) u16 gains[NORM ? WARPS : 1][2][HD];   // of the norms of queries, keys
    alignas(16) u16 k[HD];         // of the new token
    alignas(16) u16 v[HD];
    float2 stats[WARPS][8];        // (maximum, sum)
    u32 last;
    float2 parts[CLUSTER ? SPLITS : 1][GROUP][HD / 2];   // a cluster's, in its first block
    float2 part_stats[CLUSTER ? SPLITS : 1][GROUP];
    // A warp's result, in the place of its ring.
    __device__ __forceinline__ float *o(int warp, int head) { return (float *)ring[warp][0] + head * O_STRIDE; }
};
static_assert(PIECES * PIECE * 2 >= GROUP * O_STRIDE * 4, "room for a warp's result");

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
    c.count = seen > c.chunk ? (seen + c.chunk - 1) / c.chunk : 1;
    return c;
}

// Where a warp's tokens lie in the cache. Its step i begins at token start + (warp + WARPS * i) * WHOLE.
struct Walk {
    const int *table;
    int blocks;              // of the cache
    int row;                 // in the table
    int first, newest, end;  // tokens: the row's first visible one and its last; behind the split's last
    int start;               // this warp's first token
    int at;                  // first token of the step to be loaded
    int turn;                // tiles in front of it
    int entry;               // ALIGNED: block of tile (turn & ~31) + lane; else slot of token at + lane

    // Of no more than the cache's blocks, whatever stands in the table.
    __device__ __forceinline__ int found(int at) const {
        const int lane = threadIdx.x & 31;
        const int away = ALIGNED ? lane / TILES * (WARPS * WHOLE) + lane % TILES * STEP : lane % WHOLE;
        const int token = ALIGNED ? at + away : max(min(max(at + away, first), newest), 0);
        const int block = min((u32)ldcg(table + row * TABLE_WIDTH + min(token / BLOCK_SIZE, TABLE_WIDTH - 1)), (u32)blocks - 1);
        return ALIGNED ? block : block * BLOCK_SIZE + token % BLOCK_SIZE;
    }
    __device__ __forceinline__ void next() {
        at += WARPS * WHOLE;
        turn += TILES;
        if (!ALIGNED || (turn & 31) == 0) entry = found(at);
    }
    // Of the step's tile j, in tiles; where they are not ALIGNED, of its tokens, in lanes j * STEP and on.
    __device__ __forceinline__ int place(int j) const {
        if (!ALIGNED) return entry;
        return __shfl_sync(~0u, entry, (turn + j) & 31) * (BLOCK_SIZE / STEP) + (at + j * STEP) % BLOCK_SIZE / STEP;
    }
};

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
__device__ __forceinline__ void rotate(Head &h, const u16 *norm, const float *rope, float eps) {
    const int own = (threadIdx.x & 31) * EACH;
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
            low[e] = rounded(widen(norm[own + e]) * rounded(low[e] * factor));
            high[e] = rounded(widen(norm[HALF + own + e]) * rounded(high[e] * factor));
        }
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        const float cos = rope[own + e], sin = rope[HALF + own + e];
        h.low[e] = narrow(low[e] * cos - high[e] * sin);
        h.high[e] = narrow(high[e] * cos + low[e] * sin);
    }
}

__device__ __forceinline__ void put(u16 *to, const Head &h) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int e = 0; e < EACH; ++e) { to[lane * EACH + e] = h.low[e]; to[HALF + lane * EACH + e] = h.high[e]; }
}

__device__ __forceinline__ Query query_at(const u16 *p) {
    const int t = threadIdx.x & 3;
    Query q;
#pragma unroll
    for (int i = 0; i < INNER; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) q.at[i][j] = ldcg((const int *)(p + i * 16 + j * 8 + t * 2));
    return q;
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

// What this block has seen of one of several splits: to whoever merges them, or merged if it is this block.
__device__ __forceinline__ void merge_splits(const Params &p, Shared &sh, int s, int h, int split, int count) {
    const int tid = threadIdx.x;
    auto out = [&](int i) -> u32 & { return ((u32 *)p.out)[(s * KVH + h) * (GROUP * HD / 2) + i]; };   // two dimensions
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
            const float2 part = *(const float2 *)(sh.o(w, head) + d);
            total += sh.stats[w][head].y * weight;
            sum.x += part.x * weight;
            sum.y += part.y * weight;
        }
        if (CLUSTER && count <= SPLITS) {
            send(&sh.parts[split][head][d / 2], sum);
            if (d == 0) send(&sh.part_stats[split][head], make_float2(best, total));
        } else {
            const int own = (h * GROUP + head) * MOST + split;
            *(float2 *)(space + own * HD + d) = sum;
            if (d == 0) *(float2 *)(stats + own * 2) = make_float2(best, total);
        }
    }
    if (CLUSTER && count > 1 && count <= SPLITS) {
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
                if (j < count) best = fmaxf(best, sh.part_stats[j][head].x);
#pragma unroll
            for (int j = 0; j < SPLITS; ++j)
                if (j < count) {
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
    __syncthreads();   // every thread's part is stored before the count goes up
    if (tid == 0) {
        sh.last = count_up(p.semaphores + s * KVH + h, count - 1) == (u32)count - 1;
    }
    __syncthreads();
    if (!sh.last) return;
#pragma unroll 1
    for (int i = tid; i < GROUP * HD / 2; i += THREADS) {
        const int head = h * GROUP + i / (HD / 2), d = i % (HD / 2) * 2;
        const float2 r = merge(space + head * MOST * HD + d, stats + head * MOST * 2, count);
        out(i) = pack(r.x, r.y);
    }
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
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2;
    u16 *ring = sh.ring[warp][0];
    auto out = [&](int i) -> u32 & { return ((u32 *)p.out)[(s * KVH + h) * (GROUP * HD / 2) + i]; };   // two dimensions
    // Read before the wait, looked at again behind it. The first time all but the table's entry is a guess of where that is.
    int length = 0, row = min(s, p.table_rows - 1), position = 0, seen[LOOKS] = {};
    Cut c = {};
    Walk walk = {p.table, p.blocks, row, 0, 1 << 30, 0, warp * WHOLE, 0, 0, 0};
    const int own = (lane / LANES) * ROW + h * HD + lane % LANES * 8;   // this lane's part of a tile
    auto has_work = [&] { return length > 0 && split < c.count; };
    // The new token. Each warp takes all query heads for itself.
    Query q = {};
    Head key = {}, value = {};
    int slot = 0;
#pragma unroll 1
    for (bool waited = false;; waited = true) {
        const int new_length = min(ldcg(p.lens + s), TABLE_WIDTH * BLOCK_SIZE), new_row = max(ldcg(p.rows + s), 0);
        const int new_position = ldcg(p.positions + s);
        int place[LOOKS];
#pragma unroll
        for (int i = 0; i < LOOKS; ++i) place[i] = walk.found(walk.start + i * WARPS * WHOLE);
        if (waited) {
            const u16 *token = p.qkv + (long long)s * QKV;
            q = query_at(token + (h * GROUP + min(g, GROUP - 1)) * HD);
            key = head_at(token + (HEADS + h) * HD);
            value = head_at(token + (HEADS + KVH + h) * HD);
            slot = ldcg(p.slots + s);
        }
        // Each warp looks for itself: what it saw before the wait need not be what others saw.
        bool same = waited & (new_length == length) & (new_row == row) & (new_position == position);
#pragma unroll
        for (int i = 0; i < LOOKS; ++i) same &= place[i] == seen[i];
        if (!__all_sync(~0u, same)) {
            all_arrived();
            length = new_length;
            position = new_position;
            c = cut(max(length, 0));
            const int start = c.base + split * c.chunk;
            const bool elsewhere = !ALIGNED || row != new_row || walk.start != start + warp * WHOLE;
            walk.row = row = new_row;
            walk.first = c.first;
            walk.newest = length - 1;
            walk.end = min(start + c.chunk, length);
            walk.start = walk.at = start + warp * WHOLE;
            walk.turn = 0;
            if (elsewhere) place[0] = walk.found(walk.start);
            walk.entry = place[0];
#pragma unroll
            for (int i = 0; i < LOOKS; ++i) seen[i] = place[0];
            if (has_work()) {
                const float *rope = p.rope + (long long)min(max(position, 0), p.angles - 1) * HD;
                if (lane < HD / 4) copy16(sh.rope[warp] + lane * 4, rope + lane * 4);
                if (NORM && lane < HD / 4)
                    copy16(sh.gains[NORM ? warp : 0][0] + lane * 8, (lane < HD / 8 ? p.q_norm : p.k_norm - HD) + lane * 8);
#pragma unroll (LOOPED)
                for (int i = 0; i < PIECES; ++i) {
                    if (i / 2 < LOOKS) seen[i / 2] = walk.entry;
                    if (walk.at < walk.end) fetch(ring + i * PIECE, (i % 2 ? p.values : p.keys) + own, walk);
                    commit();
                    if (i % 2) walk.next();
                }
            }
        }
        if (waited) break;
        if (CLUSTER && clustered) meet();   // all of its blocks have begun
        wait_for_predecessor();
    }
    if (!has_work()) {
        if (length <= 0 && split == 0)
#pragma unroll 1
            for (int i = tid; i < GROUP * HD / 2; i += THREADS) out(i) = 0;
        return;
    }
    one_arrived();   // with it cosines, sines and norms
    __syncwarp();
    rotate(q, sh.gains[NORM ? warp : 0][0], sh.rope[warp], p.eps);
    if (g >= GROUP)   // a column of the tile without a head
#pragma unroll
        for (int i = 0; i < INNER; ++i) q.at[i][0] = q.at[i][1] = 0;
    // Whose tokens the new one is among, needs its key and value, and keeps them.
    if (walk.newest < walk.end && (walk.newest - walk.start + WARPS * WHOLE) / WHOLE % WARPS == 0) {
        rotate(key, sh.gains[NORM ? warp : 0][1], sh.rope[warp], p.eps);
        put(sh.k, key);
        put(sh.v, value);
        __syncwarp();
        if (lane < HD / 4) {
            const int d = lane % (HD / 8) * 8;
            *(uint4 *)((lane < HD / 8 ? p.keys : p.values) + (long long)slot * ROW + h * HD + d) =
                *(const uint4 *)((lane < HD / 8 ? sh.k : sh.v) + d);
        }
    }
    // What the kernel behind asks for would delay what this one still has to ask for.
    auto let = [&] { if (walk.at >= walk.end) let_successor_start(); };
    let();
    State o;
    look<WARPS * WHOLE>(o, ring, walk, q, p.keys + own, p.values + own, sh.k, sh.v, p.scale, let);
    leave(o, sh.o(warp, 0), sh.stats[warp], p.scale);
    if (WARPS > 1) __syncthreads();
    else __syncwarp();
    if (c.count > 1) {
        merge_splits(p, sh, s, h, split, c.count);
        return;
    }
#pragma unroll
    for (int n = 0; n < (GROUP * HD / 4 + THREADS - 1) / THREADS; ++n) {
        const int i = n * THREADS + tid, head = i / (HD / 4), d = i % (HD / 4) * 4;
        if (GROUP * HD / 4 % THREADS && i >= GROUP * HD / 4) break;
        float best = sh.stats[0][head].x, total = 0.f;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 1; w < WARPS; ++w) best = fmaxf(best, sh.stats[w][head].x);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float2 stats = sh.stats[w][head];
            const float weight = WARPS > 1 ? exp2_(stats.x - best) : 1.f;
            const float4 part = *(const float4 *)(sh.o(w, head) + d);
            total += stats.y * weight;
            sum.x += part.x * weight;
            sum.y += part.y * weight;
            sum.z += part.z * weight;
            sum.w += part.w * weight;
        }
        const float factor = __fdividef(1.f, total);
        *(uint2 *)&out(i * 2) = make_uint2(pack(sum.x * factor, sum.y * factor), pack(sum.z * factor, sum.w * factor));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared &sh = *(Shared *)memory;
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
