// Queries, keys and values of a small step, and what follows from them alone: head norm, rotary embedding, KV write and
// attention over a paged cache. bfloat16, one new token of each row, at most 64 rows.
//
// Attention of a KV head depends on the rows of weights of its group alone. So BLOCKS blocks have a KV head: each multiplies a part of the
// head's rows of weights (SECTIONS) by a part of the inner dimension (SPLIT), which lies whole in shared memory before the kernel in front has
// ended. Then it sends each row's parts to the block that finishes this row, adds what it is sent itself, in order, and does the attention
// of its rows. Where weights were, keys and values have come meanwhile: memory does not rest while blocks wait for each other.
//
// Parts go through memory (cells in the L2 cache), as blocks of large clusters do not find room side by side. A cell is empty, a NaN that no
// product makes, until it is written; its only reader empties it again, so the next launch finds it so.
//
// Macros: HD GROUP KVH BLOCK_SIZE WINDOW TABLE_WIDTH NORM as in attention.cu, HID (inner dimension), TOK (32, 64: rows at most), TPW (tiles of a warp
// group), AW (warps that do attention), TILES PIECES (of a warp's ring), XS (stages of x), PACE (cycles a tile of 8 KB), BOUND (threads that
// registers must suffice for), LET (when the successor is launched), EARLY (pieces asked for before the sums), KEEP (cells in the L2 cache).

#include "common.cuh"
#include "ring.cuh"
#include "tiles.cuh"

#ifndef SPLIT
#define SPLIT 8
#endif
#ifdef TRACE
#define mark(k) do { u64 t_; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t_)); p.trace[blockIdx.x * 32 + k] = t_; p.trace[blockIdx.x * 32 + 16 + k] = clock64(); } while (0)
#else
#define mark(k) do {} while (0)
#endif

constexpr int BLOCKS = 16, SECTIONS = BLOCKS / SPLIT;
constexpr int NT = (GROUP + 2) * HD / 64;   // tiles of a head, 64 rows of weights each
constexpr int MT = NT / SECTIONS;           // of a block
constexpr int KC = HID / SPLIT / 64;        // chunks of 64 inner indices
constexpr int GROUPS = MT / TPW;            // warp groups
constexpr int WARPS = GROUPS * 4, CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 64;
constexpr int X_BYTES = TOK * 128, W_BYTES = MT * KC * 8192;
constexpr int R = TOK / BLOCKS;             // rows that a block finishes
constexpr int WPI = AW / R;                 // warps of a row
constexpr int NVEC = NT * 32;               // cells of two tokens and a split: four numbers each
static_assert(NT % SECTIONS == 0 && MT % TPW == 0 && HID % (SPLIT * 64) == 0 && R % 2 == 0 && AW % R == 0 && AW <= WARPS, "shared out evenly");

constexpr int STEP = 16, WHOLE = TILES * STEP;
constexpr int HEADS = GROUP * KVH, HALF = HD / 2, EACH = HALF / 32, INNER = HD / 16;
constexpr int PIECE = WHOLE * HD, LANES = HD / 8, ROUNDS = STEP * HD / 256, ROW = KVH * HD;
constexpr int O_STRIDE = HD + 4;
constexpr bool ALIGNED = BLOCK_SIZE % STEP == 0;
constexpr u32 EMPTY = ~0u;

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
    u64 *trace;
    const u16 *x;
    float eps, scale;              // the scale for a softmax in powers of two
    int num_seqs, sums, blocks, angles, table_rows;
    int pad[9];
    Map weight_map, x_map;
};

struct Misc {
    alignas(16) float rope[R][HD];
    alignas(16) u16 gains[2][HD];
    alignas(16) u16 qkv[R][NT * 64];
    alignas(16) u16 k[R][HD];
    alignas(16) float2 stats[AW][8];
};
constexpr int RING = AW * PIECES * PIECE * 2;
constexpr int W_X = W_BYTES + XS * X_BYTES, LATER = RING + (int)sizeof(Misc);
constexpr int BARS = ((W_X > LATER ? W_X : LATER) + 15) / 16 * 16;
// What one warp looks up for all: of rows in turn, and the cache's blocks of their first tokens.
struct Looked { int length[R], row[R], position[R], slot[R]; float factor[R]; int entries[R][32]; };
constexpr int SHARED = BARS + (KC + 2 * XS + 2) * 8 + (int)sizeof(Looked);
static_assert(SHARED <= 116736, "beside a block of a product");
static_assert(PIECES * PIECE * 2 >= GROUP * O_STRIDE * 4, "room for a warp's result");
static_assert(EARLY <= PIECES, "places");

__device__ __forceinline__ void copy16(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void left() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
__device__ __forceinline__ void matrices(u32 (&r)[4], const u16 *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((u32)__cvta_generic_to_shared(p)) : "memory");
}
__device__ __forceinline__ void transposed(u32 (&r)[4], const u16 *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((u32)__cvta_generic_to_shared(p)) : "memory");
}
__device__ __forceinline__ int spot(int token, int chunk) { return token * HD + ((chunk ^ (token & 7)) * 8); }
__device__ __forceinline__ float widen(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ u16 narrow(float a) { return (u16)pack(a, 0.f); }
__device__ __forceinline__ uint4 ld_cell(const float *p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u64 keeping() {
    u64 p;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
    return p;
}
__device__ __forceinline__ void st_cell(float *p, u32 a, u32 b, u32 c, u32 d, u64 hint) {
    asm volatile("st.relaxed.gpu.global.L2::cache_hint.v4.u32 [%0], {%1,%2,%3,%4}, %5;" ::"l"(p), "r"(a), "r"(b), "r"(c), "r"(d), "l"(hint) : "memory");
}

// Where a warp's tokens lie in the cache: as in attention.cu, a row's steps shared out to WPI warps.
struct Walk {
    const int *table, *entries;   // all rows'; the row's first ones
    int blocks, row, first, newest, end, start, at, turn, entry;

    __device__ __forceinline__ int found(int at) const {
        const int lane = threadIdx.x & 31;
        const int away = ALIGNED ? lane / TILES * (WPI * WHOLE) + lane % TILES * STEP : lane % WHOLE;
        const int token = ALIGNED ? at + away : max(min(max(at + away, first), newest), 0);
        const int place = min(token / BLOCK_SIZE, TABLE_WIDTH - 1);
        int block = 0;
        if (place < 32) block = entries[place];
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
__device__ __forceinline__ void fetch(u16 *to, const u16 *from, const Walk &w) {
    constexpr int AT_ONCE = 32 / LANES;
    const int lane = threadIdx.x & 31, r = lane / LANES, own = spot(r, lane % LANES);
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        if (w.at + j * STEP >= w.end) break;
        const int place = w.place(j);
        const u16 *tile = ALIGNED ? from + (u64)(u32)place * (STEP * ROW) : from;
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) {
            u16 *at = to + (own ^ (i * AT_ONCE & 7) * 8) + (j * STEP + i * AT_ONCE) * HD;
            copy16(at, ALIGNED ? tile + i * AT_ONCE * ROW
                               : from + (long long)(__shfl_sync(~0u, place, j * STEP + i * AT_ONCE + r) - r) * ROW);
        }
    }
}

struct Query { u32 at[INNER][2]; };
__device__ __forceinline__ Query query_in(const u16 *p) {
    const int t = threadIdx.x & 3;
    Query q;
#pragma unroll
    for (int i = 0; i < INNER; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) q.at[i][j] = *(const u32 *)(p + i * 16 + j * 8 + t * 2);
    return q;
}
__device__ __forceinline__ void rotate(Query &q, const u16 *norm, const float *rope, float eps) {
    const int t = threadIdx.x & 3;
    float factor = 0.f;
    if (NORM) {
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < INNER; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) squares += lo(q.at[i][j]) * lo(q.at[i][j]) + hi(q.at[i][j]) * hi(q.at[i][j]);
#pragma unroll
        for (int d = 1; d < 4; d *= 2) squares += __shfl_xor_sync(~0u, squares, d);
        factor = rsqrtf(squares / HD + eps);
    }
#pragma unroll
    for (int i = 0; i < INNER / 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int d = i * 16 + j * 8 + t * 2;
            const u32 low = q.at[i][j], high = q.at[i + INNER / 2][j];
            float2 x = make_float2(lo(low), hi(low)), y = make_float2(lo(high), hi(high));
            if (NORM) {
                const u32 u = *(const u32 *)(norm + d), w = *(const u32 *)(norm + HALF + d);
                x = make_float2(rounded(lo(u) * rounded(x.x * factor)), rounded(hi(u) * rounded(x.y * factor)));
                y = make_float2(rounded(lo(w) * rounded(y.x * factor)), rounded(hi(w) * rounded(y.y * factor)));
            }
            const float2 cos = *(const float2 *)(rope + d), sin = *(const float2 *)(rope + HALF + d);
            q.at[i][j] = pack(x.x * cos.x - y.x * sin.x, x.y * cos.y - y.y * sin.y);
            q.at[i + INNER / 2][j] = pack(y.x * cos.x + x.x * sin.x, y.y * cos.y + x.y * sin.y);
        }
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

struct State { float best[2], total[2], acc[INNER][4]; };
__device__ __forceinline__ void scores(float (&c)[TILES][4], const u16 *keys, const Query &q) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = 0.f;
#pragma unroll
        for (int s = 0; s < INNER; ++s) {
            u32 a[4];
            matrices(a, keys + n * STEP * HD + spot(lane & 15, 2 * s + (lane >> 4)));
            mma(s % 2 ? d : c[n], a[0], a[1], a[2], a[3], q.at[s][0], q.at[s][1]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] += d[i];
    }
}
__device__ __forceinline__ void weigh(State &o, float (&c)[TILES][4], const u16 *values, bool ragged, int at, int first,
                                      int newest, float scale) {
    const int lane = threadIdx.x & 31, g = lane >> 2;
    float top[2] = {-infinity(), -infinity()}, fade[2];
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = at + n * STEP + g + i / 2 * 8;
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
        const float above = fmaxf(o.best[i], top[i]);
        fade[i] = exp2_((o.best[i] - above) * scale);
        o.best[i] = above;
        top[i] = above * scale;
        o.total[i] *= fade[i];
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = exp2_(c[n][i] * scale - top[i % 2]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            o.total[i] += c[n][i] + c[n][i + 2];
            b[n][i] = transpose(pack(c[n][2 * i], c[n][2 * i + 1]));
        }
    }
#pragma unroll
    for (int i = 0; i < INNER; ++i) {
        float *acc = o.acc[i];
        acc[0] *= fade[0]; acc[1] *= fade[1]; acc[2] *= fade[0]; acc[3] *= fade[1];
    }
    left<PIECES - 1>();
    __syncwarp();
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int i = 0; i < INNER; ++i) {
            u32 a[4];
            transposed(a, values + n * STEP * HD + spot((lane & 7) + (lane >> 4) * 8, 2 * i + (lane >> 3 & 1)));
            mma(o.acc[i], a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
        }
}

extern "C" __global__ void __launch_bounds__(BOUND > THREADS ? BOUND : THREADS) attend(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
    const int h = blockIdx.x / BLOCKS, unit = blockIdx.x % BLOCKS, sec = unit % SECTIONS, split = unit / SECTIONS;
    const u32 w_at = shared_at(memory), x_at = w_at + W_BYTES;
    const u32 w_full = w_at + BARS, x_full = w_full + KC * 8, x_empty = x_full + XS * 8, go = x_empty + XS * 8, told = go + 8;
    Looked &looked = *(Looked *)(memory + BARS + (KC + 2 * XS + 2) * 8);
    if (tid == 0) mark(0);
    if (LET == 0) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (lane == 0 && warp >= WARPS)
        asm volatile("prefetch.tensormap [%0];" ::"l"(warp == WARPS ? &p.weight_map : &p.x_map) : "memory");
    if (tid == WARPS * 32) {
        if (w_at & 1023) __trap();
        for (int i = 0; i < KC; ++i) mbar_init(w_full + i * 8, 1);
        for (int i = 0; i < XS; ++i) { mbar_init(x_full + i * 8, 1); mbar_init(x_empty + i * 8, WARPS); }
        mbar_init(go, 1);
        mbar_init(told, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp == WARPS) {
        const u64 hint = policy(true);
        bool gone = false;
        if (lane == 0) {
        long long last = clock64() - PACE;
        for (int i = 0; i < KC; ++i) {
            const int c = ROT ? (i + h + sec) % KC : i;
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
        mark(10);
#ifdef TRACE
        u32 sm_; asm volatile("mov.u32 %0, %smid;" : "=r"(sm_)); p.trace[blockIdx.x * 32 + 12] = sm_;
        mbar_wait(w_full, 0); mark(13);
        for (int c = 1; c < KC; ++c) mbar_wait(w_full + c * 8, 0);
        mark(14);
#endif
        }
        if (PF) {
            // Keys and values to the L2 cache, at a pace that lets others through.
            int entries[R], lengths[R];
#pragma unroll
            for (int i = 0; i < R; ++i) {
                const int s = min(unit * R + i, p.num_seqs - 1);
                lengths[i] = ldcg(p.lens + s);
                entries[i] = ldcg(p.table + min(max(ldcg(p.rows + s), 0), p.table_rows - 1) * TABLE_WIDTH + min(lane * 16 / BLOCK_SIZE, TABLE_WIDTH - 1));
            }
            __syncwarp();
            if (PF == 2) asm volatile("griddepcontrol.wait;" ::: "memory");
            long long last = clock64() - PFPACE;
#pragma unroll 1
            for (int tile = 0; tile < PFTILES; ++tile)
#pragma unroll
                for (int i = 0; i < R; ++i) {
                    const int token = tile * 16 + lane % 16, block = min((u32)__shfl_sync(~0u, entries[i], tile), (u32)p.blocks - 1);
                    if (tile * 16 >= lengths[i]) continue;
                    while (clock64() - last < PFPACE) {}
                    last = clock64();
                    const u16 *at = (lane < 16 ? p.keys : p.values) + ((u64)block * BLOCK_SIZE + token % BLOCK_SIZE) * ROW + h * HD;
                    if (token < lengths[i])
#pragma unroll
                        for (int j = 0; j < HD / 64; ++j) asm volatile("prefetch.global.L2 [%0];" ::"l"(at + j * 64));
                }
        }
        return;
    }
    if (warp == WARPS + 1) {
        // x; and, once for all warps, as many blocks ask for the same few lines: what attention of this block's rows will need, and the
        // factors of the norm.
        const u64 hint = policy(false);
        auto copy = [&](int c) {
            mbar_expect(x_full + c % XS * 8, X_BYTES);
            copy2(x_at + c % XS * X_BYTES, &p.x_map, (split * KC + c) * 64, 0, x_full + c % XS * 8, hint);
        };
        const int s = min(unit * R + lane % R, p.num_seqs - 1);
        auto row_of = [&] { return min(max(ldcg(p.rows + s), 0), p.table_rows - 1); };
        const int guess = row_of();   // looked at again behind the wait
        asm volatile("griddepcontrol.wait;" ::: "memory");
        if (lane == 0) {
            mbar_arrive(go);
            mark(1);
#pragma unroll
            for (int c = 0; c < XS; ++c) copy(c);
        }
        __syncwarp();
        const int length = ldcg(p.lens + s), row = row_of(), position = ldcg(p.positions + s), slot = ldcg(p.slots + s);
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
        if (lane < R) {
            looked.length[lane] = unit * R + lane < p.num_seqs ? min(length, TABLE_WIDTH * BLOCK_SIZE) : 0;
            looked.row[lane] = row;
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
        if (lane) return;
        mbar_arrive(told);
        for (int c = XS; c < KC; ++c) {
            mbar_wait(x_empty + c % XS * 8, (c / XS - 1) & 1);
            copy(c);
        }
#ifdef TRACE
        mbar_wait(x_full + (KC - 1) % XS * 8, (KC - 1) / XS & 1); mark(15);
#endif
        return;
    }

    // --- Products
    const int group = warp >> 2;
    float d[TPW][TOK / 2];
#pragma unroll
    for (int i = 0; i < KC; ++i) {
        const int c = ROT ? (i + h + sec) % KC : i;
        mbar_wait(w_full + c * 8, 0);
        mbar_wait(x_full + c % XS * 8, c / XS & 1);
        if (i == 0 && tid == 0) mark(2);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int j = 0; j < TPW; ++j)
                multiply<TOK>(d[j], operand(w_at + ((group * TPW + j) * KC + c) * 8192) + k * 2, operand(x_at + c % XS * X_BYTES) + k * 2, i || k);
        commit_products();
        if (KC > XS) {
#pragma unroll
            for (int j = 0; j < TPW; ++j) await_products<TOK, 0>(d[j]);
            if (lane == 0 && c + XS < KC) mbar_arrive(x_empty + c % XS * 8);
        }
    }
#pragma unroll
    for (int j = 0; j < TPW; ++j) await_products<TOK, 0>(d[j]);
    if (tid == 0) mark(3);
    asm volatile("griddepcontrol.wait;" ::: "memory");

    // --- Parts to whoever adds them
    const u64 hint = KEEP ? keeping() : policy(false);
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
    if (tid == 0) mark(4);
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");   // nobody reads weights or x there any more

    // --- Keys and values
    Misc &sh = *(Misc *)(memory + RING);
    u16 *ring = (u16 *)memory + warp * PIECES * PIECE;
    const int own = (lane / LANES) * ROW + h * HD + lane % LANES * 8;
    mbar_wait(told, 0);
    const int item = warp / WPI % R, sub = warp % WPI, s = unit * R + item;
    const bool mine = s < p.num_seqs;
    const int length = looked.length[item], first = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0, start = first / STEP * STEP + sub * WHOLE;
    Walk walk = {p.table, looked.entries[item], p.blocks, looked.row[item], first, length - 1, max(length, 0), start, start, 0, 0};
    if (start < length) walk.entry = walk.found(start);
    const bool works = warp < AW && length > 0;
    auto let = [&] { if (LET == 1 && walk.at >= walk.end) asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); };
    auto ask = [&](int from, int to) {
#pragma unroll 1
        for (int i = from; i < to; ++i) {
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
        ask(0, EARLY);
    }
    if (LET == 2) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (tid == 0) mark(5);

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
            if (spins == 1 << 22) __trap();
#pragma unroll
            for (int i = 0; i < SPLIT / 2; ++i)
                if (missing >> i & 1) v[i] = ld_cell(from + i * NVEC * 4);
#pragma unroll
            for (int i = 0; i < SPLIT / 2; ++i)
                if (v[i].x != EMPTY && v[i].y != EMPTY && v[i].z != EMPTY && v[i].w != EMPTY) missing &= ~(1u << i);
        }
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < SPLIT / 2; ++i) {
            sum[0] += __uint_as_float(v[i].x); sum[1] += __uint_as_float(v[i].y);
            sum[2] += __uint_as_float(v[i].z); sum[3] += __uint_as_float(v[i].w);
            st_cell(from + i * NVEC * 4, EMPTY, EMPTY, EMPTY, EMPTY, hint);
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
    if (tid == 0) mark(6);
    if (works) left<EARLY>();   // cosines, sines, norms
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    if (tid == 0) mark(7);
    if (warp >= AW || !mine) return;
    if (works && EARLY < PIECES) ask(EARLY, PIECES);

    // --- Attention
    auto out = [&](int i) -> u32 & { return ((u32 *)p.out)[(s * KVH + h) * (GROUP * HD / 2) + i]; };   // two dimensions
    if (length <= 0) {
#pragma unroll 1
        for (int i = sub * 32 + lane; i < GROUP * HD / 2; i += WPI * 32) out(i) = 0;
        return;
    }
    Query q = query_in(sh.qkv[item] + min(g, GROUP - 1) * HD);
    rotate(q, sh.gains[0], sh.rope[item], p.eps);
    if (g >= GROUP)
#pragma unroll
        for (int i = 0; i < INNER; ++i) q.at[i][0] = q.at[i][1] = 0;
    const u16 *new_value = sh.qkv[item] + (GROUP + 1) * HD;
    if ((walk.newest - walk.start + WPI * WHOLE) / WHOLE % WPI == 0) {
        rotate_key(sh.k[item], sh.qkv[item] + GROUP * HD, sh.gains[1], sh.rope[item], p.eps);
        __syncwarp();
        if (lane < HD / 4) {
            const int d = lane % (HD / 8) * 8;
            *(uint4 *)((lane < HD / 8 ? p.keys : p.values) + (long long)looked.slot[item] * ROW + h * HD + d) =
                *(const uint4 *)((lane < HD / 8 ? sh.k[item] : new_value) + d);
        }
    }
    let();
    State o;
#pragma unroll
    for (int i = 0; i < 2; ++i) { o.best[i] = -infinity(); o.total[i] = 0.f; }
#pragma unroll
    for (int i = 0; i < INNER; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) o.acc[i][j] = 0.f;
    int turn = 0;
#pragma unroll 1
    for (int at = walk.start; at < walk.end; at += WPI * WHOLE) {
        const int after = turn + 1 == PIECES ? 0 : turn + 1;
        u16 *keys = ring + turn * PIECE, *values = ring + after * PIECE;
        const bool ragged = at + WHOLE > walk.newest || at < walk.first;
        left<PIECES - 1>();
        if (ragged) {
            left<PIECES - 2>();
            __syncwarp();
#pragma unroll 1
            for (int i = lane; i < WHOLE * LANES; i += 32) {
                const int token = at + i / LANES, d = i % LANES;
                uint4 *to = (uint4 *)(values + spot(i / LANES, d));
                if (token < walk.first || token > walk.newest) *to = make_uint4(0, 0, 0, 0);
                if (token == walk.newest) {
                    *to = *(const uint4 *)(new_value + d * 8);
                    *(uint4 *)(keys + spot(i / LANES, d)) = *(const uint4 *)(sh.k[item] + d * 8);
                }
            }
        }
        __syncwarp();
        if (tid == 0 && at == walk.start) mark(8);
        float c[TILES][4];
        scores(c, keys, q);
        __syncwarp();
        if (PIECES % 2) {
            if (walk.at < walk.end) fetch(keys, p.values + own, walk);
            commit();
            walk.next();
        } else {
            if (walk.at < walk.end) fetch(keys, p.keys + own, walk);
            commit();
        }
        weigh(o, c, values, ragged, at, walk.first, walk.newest, p.scale);
        __syncwarp();
        if (PIECES % 2) {
            if (walk.at < walk.end) fetch(values, p.keys + own, walk);
            commit();
        } else {
            if (walk.at < walk.end) fetch(values, p.values + own, walk);
            commit();
            walk.next();
        }
        turn = after + 1 == PIECES ? 0 : after + 1;
        let();
    }
    left<0>();
    __syncwarp();
    if (tid == 0) mark(9);
    // This warp's part in the place of its ring: a lane has dimensions g, g + 8, ... of heads 2t and 2t + 1.
#pragma unroll
    for (int far = 4; far < 32; far *= 2)
#pragma unroll
        for (int i = 0; i < 2; ++i) o.total[i] += __shfl_xor_sync(~0u, o.total[i], far);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int head = 2 * t + i;
        if (head >= GROUP) continue;
        if (g == 0) sh.stats[warp][head] = make_float2(o.best[i] * p.scale, o.total[i]);
        float *to = (float *)ring + head * O_STRIDE + g;
#pragma unroll
        for (int j = 0; j < INNER; ++j) { to[j * 16] = o.acc[j][i]; to[j * 16 + 8] = o.acc[j][i + 2]; }
    }
    asm volatile("bar.sync %0, %1;" ::"r"(2 + item), "n"(WPI * 32) : "memory");
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
        const float factor = __fdividef(1.f, total);
        *(uint2 *)&out(i * 2) = make_uint2(pack(sum.x * factor, sum.y * factor), pack(sum.z * factor, sum.w * factor));
    }
    if (tid == 0) mark(11);
}
