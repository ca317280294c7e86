// The QKV product of a small step and attention behind it: products, head norm, rotary embedding, KV write, attention over a
// paged cache. bfloat16, one new token of each row, at most TOK rows.
//
// Attention of a KV head depends on the rows of weights of its group alone. So BLOCKS blocks have a KV head. Each multiplies x by a part of the
// head's rows of weights (SECTIONS) and of the inner dimension (SPLIT), which lies whole in shared memory before the kernel in front has ended.
// It sends each row's parts to the block that has this row, adds what it is sent for its own rows, in order, and does their attention. Keys and
// values then take the place of weights and x.
//
// Parts go through memory, and stay in the L2 cache: blocks of large clusters find no room side by side. A cell is empty, a NaN
// that no product makes, until it is written; its only reader empties it again, so the next launch finds it so. All blocks must fit at once.
//
// One warp looks up for all what a row is, and the factors of the norm (as in linear.cu): with each warp for itself thousands of loads meet in a few lines.
//
// A row of more than LONG tokens is cut into splits; how, depends on its length alone. Its own block has the first, and leaves the
// queries, and the new token's key and value, in memory for whoever has others: warps of the same KV head take these in turn when they are
// through with their own rows. The last one to finish merges them, in order.
//
// Macros: HD GROUP KVH BLOCK_SIZE WINDOW TABLE_WIDTH NORM LONG MOST TILES PIECES as in attention.cu, HID (inner dimension), TOK (32, 64: rows at most), TPW (tiles
// of a warp group), PACE (cycles a tile of 8 KB, while the kernel in front runs), BOUND (threads that registers must suffice for: more than there are leave
// room for blocks of others).

#include "common.cuh"
#include "heads.cuh"
#include "ring.cuh"
#include "tiles.cuh"

constexpr int BLOCKS = 16, SPLIT = 8, SECTIONS = BLOCKS / SPLIT;
constexpr int NT = (GROUP + 2) * HD / 64;   // tiles of a head, 64 rows of weights each
constexpr int MT = NT / SECTIONS;           // of a block
constexpr int KC = HID / SPLIT / 64;        // chunks of 64 inner indices
constexpr int GROUPS = MT / TPW;            // warp groups
constexpr int WARPS = GROUPS * 4, CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 64;
constexpr int X_BYTES = TOK * 128, W_BYTES = MT * KC * 8192;
constexpr int R = TOK / BLOCKS;             // rows that a block finishes
constexpr int WPI = WARPS / R;              // warps of a row
constexpr int NVEC = NT * 32;               // cells of two tokens and a split: four numbers each
static_assert(NT % SECTIONS == 0 && MT % TPW == 0 && HID % (SPLIT * 64) == 0 && R % 2 == 0 && WARPS % R == 0, "shared out evenly");

constexpr u32 EMPTY = ~0u;
constexpr int SPINS = 1 << 22;           // looks at a word that never comes, before it is an error

struct Params {
    const u16 *bias;               // [QKV] or null
    const float *squares;          // [sums, S]
    const int *positions, *slots;  // [S]
    const float *rope;             // [positions, 2, HALF]
    const u16 *q_norm, *k_norm;    // [HD], or null
    u16 *keys, *values;            // [blocks, BLOCK_SIZE, KVH, HD]
    const int *table;              // [R, TABLE_WIDTH]
    const int *rows, *lens;        // [S]
    u16 *out;                      // [S, HEADS * HD]
    float *cells;                  // [KVH, TOK / 2, SPLIT, NVEC, 4], empty before and after
    u16 *tokens;                   // [TOK, KVH, GROUP + 2, HD]: queries, key and value of rows with several splits; empty before and after
    float *parts;                  // of such a row: [HEADS, MOST, HD], then (maximum, sum) [HEADS, MOST, 2]
    u32 *semaphores;               // [S, KVH], zero before and after
    float eps, scale;              // the scale for a softmax in powers of two
    int num_seqs, sums, blocks, angles, table_rows;
    int pad[7];
    Map weight_map, x_map;
};

struct Misc {
    alignas(16) float rope[R][HD];
    alignas(16) u16 gains[2][HD];
    alignas(16) u16 qkv[R][NT * 64];
    alignas(16) u16 k[R][HD];
    alignas(16) float2 stats[WARPS][8];
    u32 last[R];
};
constexpr int RING = WARPS * PIECES * PIECE * 2;
constexpr int W_X = W_BYTES + KC * X_BYTES, LATER = RING + (int)sizeof(Misc);
constexpr int BARS = ((W_X > LATER ? W_X : LATER) + 15) / 16 * 16;
// What one warp looks up for all: of all rows length, row in the table, splits beyond the first; of its own the rest, and the cache's blocks of
// their first tokens.
struct Looked { int lengths[TOK], rows[TOK], more[TOK], position[R], slot[R]; float factor[R]; int entries[R][32], any; };
constexpr int SHARED = BARS + (2 * KC + 2) * 8 + (int)sizeof(Looked);
static_assert(SHARED <= 116736, "beside a block of a product");
static_assert(PIECES * PIECE * 2 >= GROUP * O_STRIDE * 4, "room for a warp's result");

__device__ __forceinline__ uint4 ld_cell(const void *p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u64 keeping() {
    u64 p;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
    return p;
}
__device__ __forceinline__ void st_cell(void *p, u32 a, u32 b, u32 c, u32 d, u64 hint) {
    asm volatile("st.relaxed.gpu.global.L2::cache_hint.v4.u32 [%0], {%1,%2,%3,%4}, %5;" ::"l"(p), "r"(a), "r"(b), "r"(c), "r"(d), "l"(hint) : "memory");
}
__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }
__device__ __forceinline__ void row_meets(int item) { asm volatile("bar.sync %0, %1;" ::"r"(2 + item), "n"(WPI * 32) : "memory"); }
__device__ __forceinline__ void st_empty(void *p, u64 hint) { st_cell(p, EMPTY, EMPTY, EMPTY, EMPTY, hint); }
__device__ __forceinline__ bool full(const uint4 &v) { return v.x != EMPTY && v.y != EMPTY && v.z != EMPTY && v.w != EMPTY; }
// How a row is cut: one split up to LONG tokens, then more.
struct Cut { int first, base, chunk, count; };   // first visible token; where splits start; tokens a split; splits
__device__ __forceinline__ Cut cut(int length) {
    Cut c;
    c.first = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
    c.base = c.first / STEP * STEP;
    const int seen = max(length - c.base, 1), parts = min(MOST, (seen + LONG - 1) / LONG);
    c.chunk = ((seen + parts - 1) / parts + WPI * WHOLE - 1) / (WPI * WHOLE) * (WPI * WHOLE);
    c.count = (seen + c.chunk - 1) / c.chunk;
    return c;
}

// Where a warp's tokens lie in the cache: as in attention.cu, a row's steps shared out to WPI warps.
struct Walk {
    const int *table, *entries;   // all rows'; the row's first ones
    int near;                     // of these
    int blocks, row, first, newest, end, start, at, turn, entry;

    __device__ __forceinline__ int found(int at) const {
        const int lane = threadIdx.x & 31;
        const int away = ALIGNED ? lane / TILES * (WPI * WHOLE) + lane % TILES * STEP : lane % WHOLE;
        const int token = ALIGNED ? at + away : max(min(max(at + away, first), newest), 0);
        const int place = min(token / BLOCK_SIZE, TABLE_WIDTH - 1);
        int block = 0;
        if (place < near) block = entries[place];
        else if (token < end) block = ldcg(table + row * TABLE_WIDTH + place);
        block = min((u32)block, (u32)blocks - 1);
        return ALIGNED ? block : block * BLOCK_SIZE + token % BLOCK_SIZE;
    }
    __device__ __forceinline__ void next() {
        at += WPI * WHOLE;
        turn += TILES;
        if (at < end && (!ALIGNED || (turn & 31) == 0)) entry = found(at);
    }
    __device__ __forceinline__ int place(int j) const {
        if (!ALIGNED) return entry;
        return __shfl_sync(~0u, entry, (turn + j) & 31) * (BLOCK_SIZE / STEP) + (at + j * STEP) % BLOCK_SIZE / STEP;
    }
};
__device__ __forceinline__ Query query_in(const u16 *p) {
    const int t = threadIdx.x & 3;
    Query q;
#pragma unroll
    for (int i = 0; i < INNER; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) q.at[i][j] = *(const u32 *)(p + i * 16 + j * 8 + t * 2);
    return q;
}
// The new token's key: dimensions lane * EACH + e of both halves.
__device__ __forceinline__ void rotate_key(u16 *to, const u16 *from, const u16 *norm, const float *rope, float eps) {
    const int own = (threadIdx.x & 31) * EACH;
    float low[EACH], high[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) { low[e] = widen(from[own + e]); high[e] = widen(from[HALF + own + e]); }
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
        to[own + e] = narrow(low[e] * cos - high[e] * sin);
        to[HALF + own + e] = narrow(high[e] * cos + low[e] * sin);
    }
}

extern "C" __global__ void __launch_bounds__(BOUND > THREADS ? BOUND : THREADS) attend(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
    const int h = blockIdx.x / BLOCKS, unit = blockIdx.x % BLOCKS, sec = unit % SECTIONS, split = unit / SECTIONS;
    const u32 w_at = shared_at(memory), x_at = w_at + W_BYTES;
    const u32 w_full = w_at + BARS, x_full = w_full + KC * 8, go = x_full + KC * 8, told = go + 8;
    Looked &looked = *(Looked *)(memory + BARS + (2 * KC + 2) * 8);
    if (lane == 0 && warp >= WARPS)
        prepare(warp == WARPS ? &p.weight_map : &p.x_map);
    if (tid == WARPS * 32) {
        if (w_at & 1023) __trap();
        for (int i = 0; i < 2 * KC; ++i) mbar_init(w_full + i * 8, 1);
        mbar_init(go, 1);
        mbar_init(told, 1);
        barriers_are_there();
    }
    __syncthreads();
    if (warp == WARPS) {
        if (lane) return;
        const u64 hint = policy(true);
        bool gone = false;
        long long last = clock64() - PACE;
        for (int c = 0; c < KC; ++c) {
            mbar_expect(w_full + c * 8, MT * 8192);
#pragma unroll 1
            for (int m = 0; m < MT; ++m) {
                while (!gone && clock64() - last < PACE) gone = come(go, 0);
                last = clock64();
                const int tile = (sec * MT + m) * 64;
                const int row = tile < GROUP * HD ? h * GROUP * HD + tile
                              : tile < (GROUP + 1) * HD ? (HEADS + h) * HD + tile - GROUP * HD
                                                        : (HEADS + KVH + h) * HD + tile - (GROUP + 1) * HD;
                copy2(w_at + (m * KC + c) * 8192, &p.weight_map, (split * KC + c) * 64, row, w_full + c * 8, hint);
            }
        }
        return;
    }
    if (warp == WARPS + 1) {
        // x; and, once for all warps, as many blocks ask for the same few lines: what attention of this block's rows will need, and the
        // factors of the norm.
        const int s = min(unit * R + lane % R, p.num_seqs - 1);
        auto row_of = [&](int s) { return min(max(ldcg(p.rows + min(s, p.num_seqs - 1)), 0), p.table_rows - 1); };
        const int guess = row_of(s);   // looked at again behind the wait
        wait_for_predecessor();
        if (lane == 0) {
            const u64 hint = policy(false);
            mbar_arrive(go);
#pragma unroll
            for (int c = 0; c < KC; ++c) {
                mbar_expect(x_full + c * 8, X_BYTES);
                copy2(x_at + c * X_BYTES, &p.x_map, (split * KC + c) * 64, 0, x_full + c * 8, hint);
            }
        }
        __syncwarp();
        int lengths[TOK / 32], rows[TOK / 32];
#pragma unroll
        for (int i = 0; i < TOK / 32; ++i) {
            lengths[i] = i * 32 + lane < p.num_seqs ? min(ldcg(p.lens + i * 32 + lane), TABLE_WIDTH * BLOCK_SIZE) : 0;
            rows[i] = row_of(i * 32 + lane);
        }
        const int row = row_of(s), position = ldcg(p.positions + s), slot = ldcg(p.slots + s);
        float factors[R];
#pragma unroll
        for (int i = 0; i < R; ++i)
            factors[i] = lane < p.sums ? ldcg(p.squares + lane * p.num_seqs + min(unit * R + i, p.num_seqs - 1)) : 0.f;
        int entries[R];
        auto find = [&](int row) {
#pragma unroll
            for (int i = 0; i < R; ++i) entries[i] = ldcg(p.table + __shfl_sync(~0u, row, i) * TABLE_WIDTH + min(lane, TABLE_WIDTH - 1));
        };
        find(guess);
        if (!__all_sync(~0u, row == guess)) find(row);
#pragma unroll
        for (int i = 0; i < R; ++i) looked.entries[i][lane] = entries[i];
        bool any = false;
#pragma unroll
        for (int i = 0; i < TOK / 32; ++i) {
            const int more = cut(lengths[i]).count - 1;
            looked.lengths[i * 32 + lane] = lengths[i];
            looked.rows[i * 32 + lane] = rows[i];
            looked.more[i * 32 + lane] = more;
            any |= more > 0;
        }
        any = __any_sync(~0u, any);
        if (lane == 0) looked.any = any;
        if (lane < R) {
            looked.position[lane] = min(max(position, 0), p.angles - 1);
            looked.slot[lane] = slot;
        }
#pragma unroll
        for (int i = 0; i < R; ++i) {
            for (int j = lane + 32; j < p.sums; j += 32) factors[i] += ldcg(p.squares + j * p.num_seqs + min(unit * R + i, p.num_seqs - 1));
#pragma unroll
            for (int far = 16; far; far >>= 1) factors[i] += __shfl_xor_sync(~0u, factors[i], far);
            if (lane == 0) looked.factor[i] = rsqrtf(factors[i] / HID + p.eps);
        }
        __syncwarp();
        if (lane == 0) mbar_arrive(told);
        return;
    }

    // --- Products
    const int group = warp >> 2;
    float d[TPW][TOK / 2];
#pragma unroll
    for (int c = 0; c < KC; ++c) {
        mbar_wait(w_full + c * 8, 0);
        mbar_wait(x_full + c * 8, 0);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int j = 0; j < TPW; ++j)
                multiply<TOK>(d[j], operand(w_at + ((group * TPW + j) * KC + c) * 8192) + k * 2, operand(x_at + c * X_BYTES) + k * 2, c || k);
        commit_products();
    }
#pragma unroll
    for (int j = 0; j < TPW; ++j) await_products<TOK, 0>(d[j]);
    wait_for_predecessor();

    // --- Parts to whoever adds them
    const u64 hint = keeping();
    auto cell = [&](int pair, int split, int vec) { return p.cells + ((u64)((h * (TOK / 2) + pair) * SPLIT + split) * NVEC + vec) * 4; };
#pragma unroll
    for (int j = 0; j < TPW; ++j)
#pragma unroll
        for (int i = 0; i < TOK / 8; ++i) {
            const int pair = i * 4 + t;
            float *v = d[j] + i * 4;
            if (pair * 2 < p.num_seqs)
                st_cell(cell(pair, split, (sec * MT + group * TPW + j) * 32 + (warp & 3) * 8 + g), __float_as_uint(v[0]), __float_as_uint(v[1]),
                        __float_as_uint(v[2]), __float_as_uint(v[3]), hint);
        }
    consumers_meet();   // nobody reads weights or x there any more

    // --- Keys and values
    Misc &sh = *(Misc *)(memory + RING);
    u16 *ring = (u16 *)memory + warp * PIECES * PIECE;
    const int own = (lane / LANES) * ROW + h * HD + lane % LANES * 8;
    mbar_wait(told, 0);
    const int item = warp / WPI % R, sub = warp % WPI;
    int s = unit * R + item;   // its row
    const int length = looked.lengths[s];
    const Cut c = cut(length);
    const int start = c.base + sub * WHOLE;
    Walk walk = {p.table, looked.entries[item], 32, p.blocks, looked.rows[s], c.first, length - 1, max(min(c.base + c.chunk, length), 0), start, start, 0, 0};
    if (start < walk.end) walk.entry = walk.found(start);
    const bool works = length > 0;
    auto let = [&] { if (walk.at >= walk.end) let_successor_start(); };
    auto ask = [&] {
#pragma unroll 1
        for (int i = 0; i < PIECES; ++i) {
            if (walk.at < walk.end) fetch(ring + i * PIECE, (i % 2 ? p.values : p.keys) + own, walk);
            commit();
            if (i % 2) walk.next();
        }
    };
    if (works) {
        if (sub == 0) {
            const float *rope = p.rope + (long long)looked.position[item] * HD;
            if (lane < HD / 4) copy16(sh.rope[item] + lane * 4, rope + lane * 4);
            if (NORM && lane < HD / 4)
                copy16(sh.gains[0] + lane * 8, (lane < HD / 8 ? p.q_norm : p.k_norm - HD) + lane * 8);
        }
        commit();
    }

    // --- Sums of this block's rows
    static_assert(R / 2 * 2 * NVEC % CONSUMERS == 0 && 2 * NVEC % CONSUMERS == 0 && SPLIT % 2 == 0, "all threads add");
#pragma unroll
    for (int n = 0; n < R / 2 * 2 * NVEC / CONSUMERS; ++n) {
        const int pair = n * CONSUMERS / (2 * NVEC), at = n * CONSUMERS % (2 * NVEC) + tid, half = at % 2, vec = at / 2;
        if (unit * R + pair * 2 >= p.num_seqs) break;
        float *from = cell(unit * (R / 2) + pair, half * (SPLIT / 2), vec);
        uint4 v[SPLIT / 2];
        u32 missing = (1u << SPLIT / 2) - 1;
#pragma unroll 1
        for (int spins = 0; missing; ++spins) {
            if (spins == SPINS) __trap();
#pragma unroll
            for (int i = 0; i < SPLIT / 2; ++i)
                if (missing >> i & 1) v[i] = ld_cell(from + i * NVEC * 4);
#pragma unroll
            for (int i = 0; i < SPLIT / 2; ++i)
                if (full(v[i])) missing &= ~(1u << i);
        }
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < SPLIT / 2; ++i) {
            sum[0] += __uint_as_float(v[i].x); sum[1] += __uint_as_float(v[i].y);
            sum[2] += __uint_as_float(v[i].z); sum[3] += __uint_as_float(v[i].w);
            st_empty(from + i * NVEC * 4, hint);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
        const float factor = looked.factor[pair * 2 + half];
        const int column = vec / 32 * 64 + vec / 8 % 4 * 16 + vec % 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int to = column + i * 8;
            float r = (half ? sum[i * 2 + 1] : sum[i * 2]) * factor;
            if (p.bias) r += widen(p.bias[to < GROUP * HD ? h * GROUP * HD + to
                                        : to < (GROUP + 1) * HD ? (HEADS + h) * HD + to - GROUP * HD
                                                                : (HEADS + KVH + h) * HD + to - (GROUP + 1) * HD]);
            sh.qkv[pair * 2 + half][to] = narrow(r);
        }
    }
    if (works) {
        ask();   // not earlier: what queues up in front of memory would delay the parts
        copies_left<PIECES>();   // cosines, sines, norms
    }
    consumers_meet();

    // --- Attention
    auto out = [&](int i) -> u32 & { return ((u32 *)p.out)[(s * KVH + h) * (GROUP * HD / 2) + i]; };   // two dimensions
    auto together = [&] { row_meets(item); };   // this row's warps
    if (s < p.num_seqs && length <= 0)
#pragma unroll 1
        for (int i = sub * 32 + lane; i < GROUP * HD / 2; i += WPI * 32) out(i) = 0;
    // Of a row with several splits, what others need: this lane's words of the queries, key and value.
    auto token = [&](int i) { return p.tokens + (s * KVH + h) * ((GROUP + 2) * HD) + i * 8; };
    constexpr int KEY = GROUP * HD / 8, VALUE = KEY + HD / 8, WORDS = VALUE + HD / 8;   // of 16 bytes
    auto word = [&](int i) { return i * (GROUP * 4) + lane; };
    u16 *new_value = sh.qkv[item] + (GROUP + 1) * HD;
    Query q = {};
    int share = 0, count = c.count, job = 0;
    if (works) {
        q = query_in(sh.qkv[item] + min(g, GROUP - 1) * HD);
        rotate(q, sh.gains[0], sh.rope[item], p.eps);
        if (g >= GROUP)
#pragma unroll
            for (int i = 0; i < INNER; ++i) q.at[i][0] = q.at[i][1] = 0;
        if (count > 1 ? sub == 0 : (walk.newest - walk.start + WPI * WHOLE) / WHOLE % WPI == 0) {
            rotate_key(sh.k[item], sh.qkv[item] + GROUP * HD, sh.gains[1], sh.rope[item], p.eps);
            __syncwarp();
            if (lane < HD / 4) {
                const int d = lane % (HD / 8) * 8;
                const uint4 v = *(const uint4 *)((lane < HD / 8 ? sh.k[item] : new_value) + d);
                *(uint4 *)((lane < HD / 8 ? p.keys : p.values) + (long long)looked.slot[item] * ROW + h * HD + d) = v;
                if (count > 1) st_cell(token(KEY + lane), v.x, v.y, v.z, v.w, hint);
            }
            if (count > 1 && g < GROUP)
#pragma unroll
                for (int i = 0; i < INNER / 2; ++i) st_cell(token(word(i)), q.at[2 * i][0], q.at[2 * i][1], q.at[2 * i + 1][0], q.at[2 * i + 1][1], hint);
        }
        let();
    }
#pragma unroll 1
    for (bool has = works;; has = true) {
        if (has) {
            State o;
            look<WPI * WHOLE>(o, ring, walk, q, p.keys + own, p.values + own, sh.k[item], new_value, p.scale, let);
            leave(o, (float *)ring, sh.stats[warp], p.scale);   // where its ring was
            together();
            float *space = p.parts + (long long)s * (HEADS * MOST * (HD + 2)), *space_stats = space + HEADS * MOST * HD;
#pragma unroll 1
            for (int i = sub * 32 + lane; i < GROUP * HD / 4; i += WPI * 32) {
                const int head = i / (HD / 4), dim = i % (HD / 4) * 4;
                float best = -infinity(), total = 0.f;
                float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
                for (int w = 0; w < WPI; ++w) best = fmaxf(best, sh.stats[item * WPI + w][head].x);
#pragma unroll
                for (int w = 0; w < WPI; ++w) {
                    const float2 stats = sh.stats[item * WPI + w][head];
                    const float weight = exp2_(stats.x - best);
                    const float4 part = *(const float4 *)((const float *)((u16 *)memory + (item * WPI + w) * PIECES * PIECE) + head * O_STRIDE + dim);
                    total += stats.y * weight;
                    sum.x += part.x * weight;
                    sum.y += part.y * weight;
                    sum.z += part.z * weight;
                    sum.w += part.w * weight;
                }
                if (count > 1) {
                    const int at = (h * GROUP + head) * MOST + share;
                    *(float4 *)(space + at * HD + dim) = sum;
                    if (dim == 0) *(float2 *)(space_stats + at * 2) = make_float2(best, total);
                    continue;
                }
                const float factor = __fdividef(1.f, total);
                *(uint2 *)&out(i * 2) = make_uint2(pack(sum.x * factor, sum.y * factor), pack(sum.z * factor, sum.w * factor));
            }
            if (count > 1) {
                together();   // every thread's part is stored before the count goes up
                if (sub == 0 && lane == 0) sh.last[item] = count_up(p.semaphores + s * KVH + h, count - 1) == (u32)count - 1;
                together();
                if (sh.last[item]) {
                    // All splits are there, and nobody needs the row's queries any more.
                    for (int i = sub * 32 + lane; i < WORDS; i += WPI * 32) st_empty(token(i), hint);
#pragma unroll 1
                    for (int i = sub * 32 + lane; i < GROUP * HD / 2; i += WPI * 32) {
                        const int head = h * GROUP + i / (HD / 2), dim = i % (HD / 2) * 2;
                        float best = -infinity(), total = 0.f;
                        float2 sum = make_float2(0.f, 0.f);
#pragma unroll 1
                        for (int j = 0; j < count; ++j) {
                            const float2 m = ldcg2(space_stats + (head * MOST + j) * 2), v = ldcg2(space + (head * MOST + j) * HD + dim);
                            const float above = fmaxf(best, m.x), fade = exp2_(best - above), weight = exp2_(m.x - above);
                            best = above;
                            total = total * fade + m.y * weight;
                            sum.x = sum.x * fade + v.x * weight;
                            sum.y = sum.y * fade + v.y * weight;
                        }
                        out(i) = pack(sum.x / total, sum.y / total);
                    }
                }
            }
        }
        // Splits beyond the first ones, in turn; first to those whose own rows are short.
        if (!looked.any) return;
        if (job == 0) {
            const int at = unit * R + item, own = looked.lengths[at];
#pragma unroll
            for (int i = 0; i < TOK / 32; ++i) {
                const int other = looked.lengths[i * 32 + lane];
                job += __popc(__ballot_sync(~0u, other < own || (other == own && i * 32 + lane < at)));
            }
        }
        int skip = job;
        job += TOK;
        for (s = 0; s < p.num_seqs && skip >= looked.more[s]; ++s) skip -= looked.more[s];
        if (s >= p.num_seqs) return;
        share = skip + 1;
        together();   // nobody reads the rings any more
        const int length = looked.lengths[s];
        const Cut c = cut(length);
        count = c.count;
        const int start = c.base + share * c.chunk + sub * WHOLE;
        walk = {p.table, nullptr, 0, p.blocks, looked.rows[s], c.first, length - 1, min(c.base + (share + 1) * c.chunk, length), start, start, 0, 0};
        walk.entry = walk.found(start);
        ask();
        // From the block that has the row's first split.
        auto wait_for = [&](int i) {
            uint4 v;
            for (int spins = 0; !full(v = ld_cell(token(i))); ++spins)
                if (spins == SPINS) __trap();
            return v;
        };
        if (g < GROUP)
#pragma unroll
            for (int i = 0; i < INNER / 2; ++i) {
                const uint4 v = wait_for(word(i));
                q.at[2 * i][0] = v.x; q.at[2 * i][1] = v.y; q.at[2 * i + 1][0] = v.z; q.at[2 * i + 1][1] = v.w;
            }
        if (g >= GROUP)
#pragma unroll
            for (int i = 0; i < INNER; ++i) q.at[i][0] = q.at[i][1] = 0;
        if (share == count - 1) {   // has the new token
            if (sub == 0 && lane < HD / 4) *(uint4 *)((lane < HD / 8 ? sh.k[item] : new_value) + lane % (HD / 8) * 8) = wait_for(KEY + lane);
            together();
        }
    }
}
