// All layers of a dense decoder for up to eight tokens, one of each sequence, in one persistent kernel.
//
// The sibling of decode.cu, which serves one token; what is said there of the stream of weights holds here
// too: one block on each multiprocessor, four producer warps that bring this block's share of all weights
// through a ring in shared memory and depend on nothing that the step computes, WARPS warps that consume.
// A tile of 16 weight rows is the m16 operand of the tensor cores' product, the tokens are the columns of n8.
//
// A warp has the same slices of the inner dimension in all tiles of an op. So a token's values go straight from
// the L2 cache into registers, as the fragments that the product takes, and stay there for the whole op; only
// where there are more slices than registers (down) they are fetched along with the weights. Shared memory
// belongs to the ring.
//
// Between blocks, activations travel as what they are, bfloat16, without tag, counter or fence: every word
// (two neighbouring outputs of a token) is EMPTY before it is written, a pair of NaNs that no
// conversion makes, and readers poll the very words that they need until none is. Each layer has words of its own, in two
// versions: a step uses one and empties the other, which the step before used and the next one will. So
// nothing is ever overwritten that anybody may still read, and launches keep them apart.
//
// Words lie as fragments want them: [K / 32][8 tokens][32], so that a warp reads a slice as 512 bytes in a row.
//
// Macros: HID QSIZE QKVN INTER VOCAB NL HEADS KVH HD BLOCK_SIZE WINDOW TABLE_WIDTH QKNORM GRID WARPS MOST_SLICES (of a
// chunk) FLIGHT (chunks of weights under way to the ring) LEAD (chunks in the L2 cache ahead of it) PACE (cycles a
// chunk) CHUNK (fewest tokens in a split of a context) TOGETHER (tiles between two meetings of the warps) MOST_KEPT (slices of
// the tokens that a warp keeps in registers) SPINS (looks at a word that never comes, before it is an error).

#include "common.cuh"
#include "ring.cuh"
#include "persistent.cuh"
typedef u16 W;

constexpr int SW = 32;                      // inner indices in a slice: 16 bytes of each of 4 lanes
constexpr int SEGS = HD / 32;               // 64-byte pieces of a head
constexpr int WIDE = HD / 64;               // 128-byte pieces of a head
constexpr int ROW = KVH * HD;               // from token to token in a cache block
constexpr int STEP = 16;                    // tokens that a warp looks at together
constexpr int U = HD == 64 ? 2 : 1;         // such groups that it asks for together
constexpr int Q_STRIDE = HD + 32;           // of queries in shared memory: rows of a pair share no bank
constexpr int O_STRIDE = HD + 4;
constexpr int PLACES = 128;                 // groups of tokens whose places are looked up once a step
constexpr u32 EMPTY = 0xffffffffu;

constexpr int chunk_of(int k) { return divisor(k / SW, MOST_SLICES) * SW; }
constexpr int stride_of(int ck) { return apart(ck * 2); }

// A product of the step. A tile is 16 rows of weights; or eight rows of gate and the same of up; or the
// first halves of eight rows and then their second halves, where that leaves the busiest block fewer rows.
template <int K_, int N_, bool GATED_> struct Op {
    static constexpr bool GATED = GATED_;
    static constexpr int K = K_, N = N_;
    static constexpr bool HALVED = !GATED && K / 2 % SW == 0 && cdiv(N / 8, GRID) * 8 < cdiv(N / 16, GRID) * 16;
    static constexpr int ROWS = GATED || HALVED ? 8 : 16, TILES = N / ROWS;
    static constexpr int INNER = HALVED ? K / 2 : K, CK = chunk_of(INNER), CHUNKS = INNER / CK, STRIDE = stride_of(CK);
    static constexpr long long SECOND = GATED ? (long long)N * K : HALVED ? K / 2 : 0;   // from a tile's row 0 to its row 8
    // Of a chunk: slices, and how many of them a warp has; how many there are of it for all of a tile.
    static constexpr int SLICES = CK / SW, J = cdiv(SLICES, NW), PARTS = HALVED ? 2 : 1, COUNT = CHUNKS * J * PARTS;
    static constexpr bool KEPT = COUNT <= MOST_KEPT;
    static constexpr int AHEAD = KEPT ? CHUNKS : divisor(CHUNKS, cmax(1, MOST_KEPT / (J * PARTS)));   // chunks whose tokens are in registers
};
using Qkv = Op<HID, QKVN, false>;
using Output = Op<QSIZE, HID, false>;
using GateUp = Op<HID, INTER, true>;
using Down = Op<INTER, HID, false>;
using Head = Op<HID, VOCAB, false>;

constexpr int STAGE = 16 * cmax(stride_of(chunk_of(HID)), cmax(stride_of(chunk_of(QSIZE)), stride_of(chunk_of(INTER))));
constexpr int TOKEN = 20;                             // floats from token to token of a tile's results: no bank is shared
constexpr int RED = TOGETHER * NW * 8 * TOKEN;        // floats in one reduction buffer
constexpr int ATT = NW * GROUP * O_STRIDE + NW * 8 * 2;   // floats for merging warps in attention
constexpr int RED_BYTES = cmax(2 * RED, ATT) * 4;
constexpr int FIXED = RED_BYTES + NW * 8 * 4 + HD * 4 + (8 * Q_STRIDE + 2 * HD) * 2 + PLACES * 4 + 32;
constexpr int STAGES = (227 * 1024 - FIXED) / (STAGE + 16);
static_assert(STAGES > FLIGHT, "the ring does not fit");
static_assert(128 * TOGETHER <= NT, "a thread for each result of the tiles");
static_assert(HID % SW == 0 && QSIZE % SW == 0 && INTER % SW == 0, "whole slices");
static_assert(QKVN % 32 == 0 && HID % 16 == 0 && INTER % 8 == 0 && VOCAB % 16 == 0, "whole tiles");
static_assert((GROUP + 2) * DL <= NT && BLOCK_SIZE % STEP == 0, "lanes for each vector of a new token; 16 tokens lie side by side");
static_assert(HD == 64 || HD == 128, "head dimensions that lanes share evenly");
static_assert(GROUP >= 1 && GROUP <= 8, "query heads are the eight columns of a tile");

// Shared memory, all of it at places known when this is compiled: first the ring's stages.
constexpr int RED_AT = STAGES * STAGE, SQUARES_AT = RED_AT + RED_BYTES, ANGLES_AT = SQUARES_AT + NW * 8 * 4;
constexpr int FRESH_AT = ANGLES_AT + HD * 4, PLACES_AT = FRESH_AT + (8 * Q_STRIDE + 2 * HD) * 2, ITEM_AT = PLACES_AT + PLACES * 4;
constexpr int FULL_AT = ITEM_AT + 32, EMPTY_AT = FULL_AT + STAGES * 8;
static_assert(EMPTY_AT + STAGES * 8 <= 227 * 1024 && FRESH_AT % 16 == 0 && FULL_AT % 8 == 0, "the layout");

// What blocks tell each other of a layer, in values: [size / 32][8][32] each.
constexpr int QKV_AT = 0, ATTN_AT = QKV_AT + QKVN * 8, MID_AT = ATTN_AT + QSIZE * 8, ACT_AT = MID_AT + HID * 8;
constexpr int OUT_AT = ACT_AT + INTER * 8, LAYER = OUT_AT + HID * 8;
__device__ __forceinline__ int place(int n, int token) { return (n >> 5) * 256 + token * 32 + (n & 31); }

struct Layer {
    const u16 *input_norm, *q_norm, *k_norm, *mlp_norm;
    const u16 *qkv, *output, *gate_up, *down;
    u16 *keys, *values;
};
struct Params {
    Layer layer[NL];
    const u16 *final_norm;
    const u16 *head;
    const float *rope;         // [positions, 2, HALF]
    const u16 *embedding;      // [VOCAB, HID]
    const int *ids;            // [tokens], as all that follows of the step
    u16 *words;                // [2, NL, LAYER], EMPTY
    u64 *parts;                // [GRID, GROUP, HD + 2] float32 with a tag each
    u32 *steps;                // [GRID], steps so far: each block counts for itself
    float *logits;             // [tokens, VOCAB], or null: only the best
    float *best;               // [GRID, 8], as is what follows
    int *best_at;
    const int *positions, *slots, *rows, *lens, *table;
    float eps, scale;          // the scale for a softmax in powers of two
    int tokens, splits;        // columns in use; blocks for each (row, KV head)
};

// --- Instructions. A test on the CPU has its own of these.
__device__ __forceinline__ uint4 ld_words(const u16 *p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u32 ld_word(const u16 *p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void st_word(u16 *p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
__device__ __forceinline__ void rest(u32 &spins) {
    if (++spins == SPINS) __trap();
    asm volatile("nanosleep.u32 32;");
}
// --- End of instructions.

SHARED(float, reduced, RED_AT)       // [2][TOGETHER][NW][8][TOKEN], or attention's parts: [NW][GROUP][O_STRIDE], then [NW][8] of (largest, sum)
SHARED(float, sums, SQUARES_AT)      // [NW][8] of squares
SHARED(float, angles, ANGLES_AT)     // [HD], of this block's row
SHARED(u16, fresh_token, FRESH_AT)   // [8][Q_STRIDE] queries, then key and value of the new token
SHARED(int, places, PLACES_AT)       // [PLACES], where groups of tokens of this block's split lie in the cache

__device__ __forceinline__ bool stale(const uint4 &v) { return max(max(v.x, v.y), max(v.z, v.w)) == EMPTY; }
__device__ __forceinline__ uint4 nothing() { return make_uint4(0, 0, 0, 0); }
__device__ __forceinline__ u32 insist(u32 v, const u16 *p) {
    for (u32 spins = 0; v == EMPTY; v = ld_word(p)) rest(spins);
    return v;
}
__device__ __forceinline__ u32 insist(const u64 *p, u32 tag) {
    u64 v = ld_cell(p);
    for (u32 spins = 0; (u32)(v >> 32) != tag; v = ld_cell(p)) rest(spins);
    return (u32)v;
}
// One lane looks while the others rest: a crowd at the same few lines would be in the writers' way.
__device__ __forceinline__ void look_out(const u16 *p) {
    if ((threadIdx.x & 31) == 0) insist(ld_word(p), p);
    __syncwarp();
}

#include "stream.cuh"

enum { STORE, ADD, ACT, BEST };

// The lowest index wins ties.
__device__ __forceinline__ void better(float &best, int &best_at, float v, int at) {
    if (v > best || (v == best && at < best_at)) { best = v; best_at = at; }
}

// A slice of a tile's 16 rows times the tokens' (or of their first halves and second halves).
// Returns something that is there only when all that it loaded is.
template <int PARTS>
__device__ __forceinline__ u32 multiply(float (&acc)[2][4], u32 at, int stride, const uint4 *x) {
    const int lane = threadIdx.x & 31;
    const u32 own = at + (lane >> 2) * stride + (lane & 3) * 16;
    const uint4 a = lds(own), b = lds(own + 8 * stride);
    if (PARTS == 1) {
        mma(acc[0], a.x, b.x, a.y, b.y, x[0].x, x[0].y);
        mma(acc[1], a.z, b.z, a.w, b.w, x[0].z, x[0].w);
    } else {   // of the one, rows 0 to 7 count, of the other rows 8 to 15
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            mma(acc[h], a.x, b.x, a.y, b.y, x[h].x, x[h].y);
            mma(acc[h], a.z, b.z, a.w, b.w, x[h].z, x[h].w);
        }
    }
    return a.x ^ b.x;
}

// out (+)= op(x): this block's tiles. `x` null: the embedding. `old`: what the sum of ADD is added to, null: the embedding.
template <typename O, bool NORM, int KIND>
__device__ __forceinline__ void consume(Ring &ring, Share &share, const Params &p, const u16 *x, const u16 *norm, u16 *out, const u16 *old) {
    constexpr int J = O::J, PARTS = O::PARTS, AHEAD = O::AHEAD, HELD = AHEAD * J * PARTS;
    static_assert(O::KEPT || !NORM, "a norm needs all of a token before the first product");
    const int tid = thread(), warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
    int tile = share.first();
    share.pass(O::TILES);
    if (tile >= O::TILES) return;
    const bool here = g < p.tokens;
    // Of chunk c the warp's j-th slice, in the first or second part of the inner dimension; whether there is one.
    const auto slice = [&](int c, int j, int part) { return part * (O::INNER / SW) + c * O::SLICES + warp + NW * j; };
    const auto there = [&](int j) { return O::SLICES % NW == 0 || warp + NW * j < O::SLICES; };
    const u16 *const own = x + lane * 8;
    uint4 v[AHEAD][J][PARTS];
    const auto ask = [&](int c, int into) {
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
            for (int h = 0; h < PARTS; ++h)
                v[into][j][h] = here && there(j) ? ld_words(own + slice(c, j, h) * 256) : nothing();
    };
    uint4 gain[NORM && HELD <= 8 ? HELD : 1];
    const auto weights = [&](int i) { return there(i / PARTS % J) ? *(const uint4 *)(norm + slice(i / (J * PARTS), i / PARTS % J, i % PARTS) * SW + t * 8) : nothing(); };
    if (NORM && HELD <= 8)
#pragma unroll
        for (int i = 0; i < HELD; ++i) gain[i] = weights(i);
    if (NORM && !x) {
        const u16 *from = p.embedding + (here ? (long long)p.ids[g] * HID : 0) + t * 8;
#pragma unroll
        for (int c = 0; c < AHEAD; ++c)
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
                for (int h = 0; h < PARTS; ++h)
                    v[c][j][h] = here && there(j) ? *(const uint4 *)(from + slice(c, j, h) * SW) : nothing();
    } else if (O::KEPT) {
        if (there(0)) look_out(x + slice(0, 0, 0) * 256);
#pragma unroll
        for (int c = 0; c < AHEAD; ++c) ask(c, c);
        bool again = true;
#pragma unroll 1
        for (u32 spins = 0; again;) {
            again = false;
#pragma unroll
            for (int c = 0; c < AHEAD; ++c)
#pragma unroll
                for (int j = 0; j < J; ++j)
#pragma unroll
                    for (int h = 0; h < PARTS; ++h)
                        if (stale(v[c][j][h])) { v[c][j][h] = ld_words(own + slice(c, j, h) * 256); again = true; }
            if (again) rest(spins);
        }
        __syncwarp();
    }
    if (NORM) {
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            uint4 &w = v[i / (J * PARTS)][i / PARTS % J][i % PARTS];
            float f[8], s[8];
            spread(f, w);
            spread(s, HELD <= 8 ? gain[HELD <= 8 ? i : 0] : weights(i));
#pragma unroll
            for (int e = 0; e < 8; ++e) { squares += f[e] * f[e]; f[e] *= s[e]; }
            w = make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
        }
        squares += __shfl_xor_sync(~0u, squares, 1);
        squares += __shfl_xor_sync(~0u, squares, 2);
        if (t == 0) sums()[warp * 8 + g] = squares;
    }
    const int turn = tid >> 7, token = tid >> 4 & 7, row = tid & 15;   // the result that this thread finishes
    int buffer = 0, best_at = -1;
    float factor = 0.f, best = -infinity();
#pragma unroll 1
    for (; tile < O::TILES; tile += TOGETHER * GRID) {
        const int n = (tile + turn * GRID) * O::ROWS + row;
        const bool mine = turn < TOGETHER && row < O::ROWS && n < O::N && token < p.tokens;
        const u16 *const before = old + place(n & ~1, token);
        u32 pair = 0;
        if (KIND == ADD && mine) pair = old ? ld_word(before) : *(const u32 *)(p.embedding + (long long)p.ids[token] * HID + (n & ~1));
        float *red = reduced() + buffer * RED + (warp * 8 + 2 * t) * TOKEN + g;
#pragma unroll 1
        for (int i = 0; i < TOGETHER && tile + i * GRID < O::TILES; ++i, red += NW * 8 * TOKEN) {
            float acc[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
            if (!O::KEPT) {
                if (there(0)) look_out(x + slice(0, 0, 0) * 256);
#pragma unroll
                for (int c = 0; c < AHEAD; ++c) ask(c, c);
            }
#pragma unroll 1
            for (int c0 = 0; c0 < O::CHUNKS; c0 += AHEAD) {
#pragma unroll
                for (int c = 0; c < AHEAD; ++c) {
                    if (!O::KEPT) {
#pragma unroll
                        for (int j = 0; j < J; ++j)
#pragma unroll
                            for (int h = 0; h < PARTS; ++h)
                                for (u32 spins = 0; stale(v[c][j][h]); v[c][j][h] = ld_words(own + slice(c0 + c, j, h) * 256)) rest(spins);
                        __syncwarp();
                    }
                    mbar_wait(ring.full(), ring.parity);
                    const u32 at = ring.data();
                    u32 loaded = 0;
#pragma unroll
                    for (int j = 0; j < J; ++j)
                        if (there(j)) loaded ^= multiply<PARTS>(acc, at + (warp + NW * j) * 64, O::STRIDE, v[c][j]);
                    __syncwarp();
                    if (lane == 0) give_back(ring.empty(), loaded);
                    ring.next();
                    if (!O::KEPT && c0 + c + AHEAD < O::CHUNKS) ask(c0 + c + AHEAD, c);
                }
            }
            if (O::HALVED) {
                red[0] = acc[0][0] + acc[1][2];
                red[TOKEN] = acc[0][1] + acc[1][3];
            } else {
                red[0] = acc[0][0] + acc[1][0];
                red[TOKEN] = acc[0][1] + acc[1][1];
                red[8] = acc[0][2] + acc[1][2];
                red[TOKEN + 8] = acc[0][3] + acc[1][3];
            }
        }
        consumers_meet();
        if (NORM && factor == 0.f) {   // only now are all squares there
            float squares = 0.f;
#pragma unroll
            for (int w = 0; w < NW; ++w) squares += sums()[w * 8 + token];
            factor = rsqrtf(squares / O::K + p.eps);
        }
        float a = 0.f, b = 0.f;
        if (mine) {
            const float *part = reduced() + buffer * RED + (turn * NW * 8 + token) * TOKEN + row;
#pragma unroll
            for (int w = 0; w < NW; ++w) {
                a += part[w * 8 * TOKEN];
                if (KIND == ACT) b += part[w * 8 * TOKEN + 8];
            }
            if (NORM) { a *= factor; b *= factor; }
            if (KIND == ADD) {
                if (old) pair = insist(pair, before);
                a += row & 1 ? hi(pair) : lo(pair);
            }
            if (KIND == ACT) {
                a = rounded(a);
                a = rounded(a / (1.f + exp2_(-1.4426950408889634f * a))) * rounded(b);
            }
            if (KIND == BEST) {
                if (p.logits) p.logits[(long long)token * VOCAB + n] = a;
                if (a > best || best_at < 0) { best = fmaxf(a, best); best_at = n; }   // NaN is less than any number
            }
        }
        if (KIND != BEST) {
            __syncwarp();
            const float other = __shfl_xor_sync(~0u, a, 1);
            if (mine && (row & 1) == 0) st_word(out + place(n, token), pack(a, other));
        }
        buffer ^= 1;
    }
    if (KIND == BEST) {
        if (best_at < 0) best_at = 0x7fffffff;
#pragma unroll
        for (int d = 8; d; d >>= 1) {
            const float v = __shfl_xor_sync(~0u, best, d);
            better(best, best_at, v, __shfl_xor_sync(~0u, best_at, d));
        }
        float *tops = reduced() + buffer * RED;   // nobody reads this one any more
        if (row == 0 && turn < TOGETHER) { tops[turn * 16 + token * 2] = best; tops[turn * 16 + token * 2 + 1] = __int_as_float(best_at); }
        consumers_meet();
        if (tid < p.tokens) {
            best = tops[tid * 2];
            best_at = __float_as_int(tops[tid * 2 + 1]);
            for (int i = 1; i < TOGETHER; ++i) better(best, best_at, tops[i * 16 + tid * 2], __float_as_int(tops[i * 16 + tid * 2 + 1]));
            p.best[blockIdx.x * 8 + tid] = best;
            p.best_at[blockIdx.x * 8 + tid] = best_at;
        }
    }
    consumers_meet();   // before the next op writes what this one reads
}

// What this block has of attention, the same in every layer: one split of a row and KV head.
struct Item { int row, kv, split, count, length, first, start, end; };
__device__ __forceinline__ Item &item() { return *(Item *)(memory + ITEM_AT); }

// How a context is cut: depends on its length and the step's padded rows alone.
__device__ __forceinline__ void find_item(const Params &p) {
    const int pairs = p.tokens * KVH, pair = (int)blockIdx.x % pairs;
    Item i;
    i.row = pair / KVH; i.kv = pair % KVH; i.split = (int)blockIdx.x / pairs;
    i.length = p.lens[i.row];
    i.first = WINDOW > 0 && i.length > WINDOW ? i.length - WINDOW : 0;
    const int base = i.first / STEP * STEP, seen = max(i.length - base, 1);
    constexpr int UNIT = NW * STEP;
    const int wanted = max(1, min(p.splits, seen / CHUNK)), chunk = cdiv(cdiv(seen, wanted), UNIT) * UNIT;
    i.count = cdiv(seen, chunk);
    i.start = base + i.split * chunk;
    i.end = min(i.start + chunk, i.length);
    if (i.split >= i.count) i.count = 0;   // nothing to do
    item() = i;
}
__device__ __forceinline__ int look_up(const Params &p, const Item &i, int group) {
    const int token = i.start + group * STEP;
    return p.table[(long long)max(p.rows[i.row], 0) * TABLE_WIDTH + token / BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE;
}
__device__ __forceinline__ int groups_of(const Item &i) { return i.count ? cdiv(max(i.end - i.start, 0), STEP) : 0; }

// Old keys and values of a layer on their way to the L2 cache.
__device__ __forceinline__ void expect_context(const Layer &layer) {
    const Item &i = item();
    constexpr int LINES = HD * 2 / 128;
    const int old = min(groups_of(i), PLACES) * STEP;
#pragma unroll 1
    for (int at = threadIdx.x; at < old * LINES; at += NT) {
        const int token = at / LINES;
        const long long from = (long long)(places()[token / STEP] + token % STEP) * ROW + i.kv * HD + at % LINES * 64;
        prefetch(layer.keys + from);
        prefetch(layer.values + from);
    }
}

// Queries, and in the last split key and value, of the new token: to shared memory and to the cache.
// Normed where the model does, rotated, rounded; a lane has eight dimensions of one of them.
__device__ __forceinline__ void prepare(const Params &p, const Layer &layer, const Item &it, const u16 *qkv, bool last) {
    const int vector = threadIdx.x / DL, dl = threadIdx.x % DL, vectors = GROUP + (last ? 2 : 0);
    if (vector / (32 / DL) * (32 / DL) >= vectors) return;   // none of the warp
    const bool is_v = vector == GROUP + 1, mine = vector < vectors;
    const int head = vector < GROUP ? it.kv * GROUP + vector : HEADS + (vector - GROUP) * KVH + it.kv;
    const u16 *const from = qkv + (mine ? place(head * HD + dl * 8, it.row) : 0);
    uint4 raw = mine ? ld_words(from) : nothing();
#if QKNORM
    float gain[8];
    spread(gain, *(const uint4 *)((vector < GROUP ? layer.q_norm : layer.k_norm) + dl * 8));
#endif
    const float *turns = angles() + dl % (DL / 2) * 8;
    float f[8], cos[8], sin[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) { cos[i] = turns[i]; sin[i] = turns[HALF + i]; }
    for (u32 spins = 0; stale(raw); raw = ld_words(from)) rest(spins);
    __syncwarp();
    spread(f, raw);
#if QKNORM
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) s += f[i] * f[i];
#pragma unroll
    for (int d = 1; d < DL; d <<= 1) s += __shfl_xor_sync(~0u, s, d);
    const float factor = rsqrtf(s / HD + p.eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = rounded(gain[i] * rounded(f[i] * factor));
#endif
    const float sign = dl < DL / 2 ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = f[i] * cos[i] + sign * __shfl_xor_sync(~0u, f[i], DL / 2) * sin[i];
    if (!mine) return;
    const uint4 packed = is_v ? raw : make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
    u16 *const to = fresh_token() + (vector < GROUP ? vector * Q_STRIDE : 8 * Q_STRIDE + (vector - GROUP) * HD);
    *(uint4 *)(to + dl * 8) = packed;
    if (vector >= GROUP) *(uint4 *)((is_v ? layer.values : layer.keys) + (long long)p.slots[it.row] * ROW + it.kv * HD + dl * 8) = packed;
}

// Tokens of a group, for this lane: as in attention.cu.
struct Keys { uint4 at[2][SEGS]; };
struct Values { uint4 at[WIDE][4]; };
// What this warp has seen: of heads 2t and 2t + 1.
struct State { float best[2], total[2], acc[WIDE * 4][4]; };

__device__ __forceinline__ uint4 keep(bool yes, uint4 v) { return yes ? v : nothing(); }

// Scores, softmax and values of 16 tokens.
__device__ __forceinline__ void look_at(State &o, Keys &k, Values &v, const uint4 (&q)[SEGS], int at, int first, int newest, float scale) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const bool ragged = at + STEP > newest || at < first;   // has the new token, or others to be left out
    const u16 *const key = fresh_token() + 8 * Q_STRIDE, *const value = key + HD;
    if (ragged) {
#pragma unroll
        for (int b = 0; b < 2; ++b)
            if (at + g + 8 * b == newest)
#pragma unroll
                for (int s = 0; s < SEGS; ++s) k.at[b][s] = *(const uint4 *)(key + s * 32 + t * 8);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int token = at + 2 * t + j / 2 * 8 + j % 2;
#pragma unroll
            for (int w = 0; w < WIDE; ++w) {
                v.at[w][j] = keep(token >= first && token < newest, v.at[w][j]);   // 0 times NaN is NaN
                if (token == newest) v.at[w][j] = *(const uint4 *)(value + w * 64 + g * 8);
            }
        }
        __syncwarp();
    }
    float c[4] = {0.f, 0.f, 0.f, 0.f}, d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int s = 0; s < SEGS; ++s) {
        mma(c, k.at[0][s].x, k.at[1][s].x, k.at[0][s].y, k.at[1][s].y, q[s].x, q[s].y);
        mma(d, k.at[0][s].z, k.at[1][s].z, k.at[0][s].w, k.at[1][s].w, q[s].z, q[s].w);
    }
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
        const float above = fmaxf(o.best[i], top[i]);   // finite: a group has a token that is seen
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
}

// Attention of this block's item.
__device__ __forceinline__ void attend(const Params &p, const Layer &layer, const u16 *qkv, u16 *attn, u32 tag) {
    const int tid = thread(), warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
    const Item &it = item();
    if (it.count == 0) return;
    const int groups = groups_of(it), newest = it.length - 1;
    const bool last = it.split == it.count - 1 && it.length > 0;
    // A word of the result: two dimensions of a head.
    const auto put = [&](int i, float a, float b) {
        const int n = (it.kv * GROUP + i / (HD / 2)) * HD + i % (HD / 2) * 2;
        st_word(attn + place(n, it.row), pack(a, b));
    };
    if (it.length <= 0) {
#pragma unroll 1
        for (int i = tid; i < GROUP * HD / 2; i += NT) put(i, 0.f, 0.f);
        return;
    }
    Keys k[U];
    Values v[U];
    const auto fetch = [&](int from) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int group = from + u * NW;
            const bool any = group < groups;
            const int slot = any ? group < PLACES ? places()[group] : look_up(p, it, group) : 0;
            const u16 *keys = layer.keys + (long long)(slot + g) * ROW + it.kv * HD + t * 8;
            const u16 *values = layer.values + (long long)(slot + 2 * t) * ROW + it.kv * HD + g * 8;
#pragma unroll
            for (int b = 0; b < 2; ++b)
#pragma unroll
                for (int s = 0; s < SEGS; ++s) k[u].at[b][s] = any ? ldcg4(keys + b * 8 * ROW + s * 32) : nothing();
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int w = 0; w < WIDE; ++w) v[u].at[w][j] = any ? ldcg4(values + (j / 2 * 8 + j % 2) * ROW + w * 64) : nothing();
        }
    };
    fetch(warp);
    prepare(p, layer, it, qkv, last);   // the new token, while the old ones are on their way
    consumers_meet();
    State o;
#pragma unroll
    for (int i = 0; i < 2; ++i) { o.best[i] = -infinity(); o.total[i] = 0.f; }
#pragma unroll
    for (int i = 0; i < WIDE * 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) o.acc[i][j] = 0.f;
    uint4 q[SEGS];
#pragma unroll
    for (int i = 0; i < SEGS; ++i) q[i] = *(const uint4 *)(fresh_token() + g * Q_STRIDE + i * 32 + t * 8);
#pragma unroll 1
    for (int group = warp; group < groups; group += NW * U) {
#pragma unroll
        for (int u = 0; u < U; ++u)
            if (group + u * NW < groups) look_at(o, k[u], v[u], q, it.start + (group + u * NW) * STEP, it.first, newest, p.scale);
        if (group + NW * U < groups) fetch(group + NW * U);
    }
    // This warp's part to shared memory: a lane has dimensions 8g to 8g + 7 of heads 2t and 2t + 1.
    float *const parts = reduced();
    float2 *const stats = (float2 *)(parts + NW * GROUP * O_STRIDE);
#pragma unroll
    for (int far = 4; far < 32; far *= 2)
#pragma unroll
        for (int i = 0; i < 2; ++i) o.total[i] += __shfl_xor_sync(~0u, o.total[i], far);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int head = 2 * t + i;
        if (head >= GROUP) continue;
        if (g == 0) stats[warp * 8 + head] = make_float2(o.best[i], o.total[i]);
#pragma unroll
        for (int w = 0; w < WIDE; ++w) {
            float *to = parts + (warp * GROUP + head) * O_STRIDE + w * 64 + g * 8;
            const float(*a)[4] = o.acc + w * 4;
            *(float4 *)to = make_float4(a[0][i], a[0][i + 2], a[1][i], a[1][i + 2]);
            *(float4 *)(to + 4) = make_float4(a[2][i], a[2][i + 2], a[3][i], a[3][i + 2]);
        }
    }
    consumers_meet();
    // Warps, then splits, always in the same order.
#pragma unroll 1
    for (int i = tid; i < GROUP * HD / 2; i += NT) {
        const int head = i / (HD / 2), d = i % (HD / 2) * 2;
        float best = -infinity(), total = 0.f;
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll
        for (int w = 0; w < NW; ++w) best = fmaxf(best, stats[w * 8 + head].x);
#pragma unroll
        for (int w = 0; w < NW; ++w) {
            const float2 own = stats[w * 8 + head], part = *(const float2 *)(parts + (w * GROUP + head) * O_STRIDE + d);
            const float weight = exp2_(own.x - best);
            total += own.y * weight;
            sum.x += part.x * weight;
            sum.y += part.y * weight;
        }
        if (it.split > 0) {
            u64 *space = p.parts + ((long long)blockIdx.x * GROUP + head) * (HD + 2);
            st_cell(space + d, __float_as_uint(sum.x), tag);
            st_cell(space + d + 1, __float_as_uint(sum.y), tag);
            if (d == 0) { st_cell(space + HD, __float_as_uint(best), tag); st_cell(space + HD + 1, __float_as_uint(total), tag); }
            continue;
        }
#pragma unroll 1
        for (int j = 1; j < it.count; ++j) {
            const u64 *space = p.parts + ((long long)(blockIdx.x + j * p.tokens * KVH) * GROUP + head) * (HD + 2);
            const float here = __uint_as_float(insist(space + HD, tag)), above = fmaxf(best, here);
            const float fade = exp2_(best - above), weight = exp2_(here - above);
            best = above;
            total = total * fade + __uint_as_float(insist(space + HD + 1, tag)) * weight;
            sum.x = sum.x * fade + __uint_as_float(insist(space + d, tag)) * weight;
            sum.y = sum.y * fade + __uint_as_float(insist(space + d + 1, tag)) * weight;
        }
        put(i, sum.x / total, sum.y / total);
    }
    consumers_meet();   // before the next op writes what this one reads
}

// This block's share of `bytes` on their way to the L2 cache.
__device__ __forceinline__ void expect_share(const void *from, int bytes) {
#pragma unroll 1
    for (int i = (threadIdx.x * GRID + blockIdx.x) * 128; i < bytes; i += NT * GRID * 128) prefetch((const char *)from + i);
}
// This block's share of a layer's words, for the next step.
__device__ __forceinline__ void empty(u16 *words) {
#pragma unroll 1
    for (int i = threadIdx.x * GRID + blockIdx.x; i < LAYER / 8; i += NT * GRID) *(uint4 *)(words + i * 8) = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY);
}

extern "C" __global__ void __launch_bounds__(NT + PW * 32, 1) decode_rows(const __grid_constant__ Params p) {
    Ring ring = {0, 0};
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < STAGES; ++i) {
            mbar_init(shared_at(memory) + FULL_AT + i * 8, 1);
            mbar_init(shared_at(memory) + EMPTY_AT + i * 8, NW);
        }
        mbar_fence();
    }
    __syncthreads();
    let_successor_start();
    if (threadIdx.x >= NT) {
        produce(p, ring);
        wait_for_predecessor();
        return;
    }
    wait_for_predecessor();
    Share share = {0};
    const u32 step = p.steps[blockIdx.x];
    u16 *words = p.words + (step & 1) * ((long long)NL * LAYER), *others = p.words + (~step & 1) * ((long long)NL * LAYER);
    expect_share(words, LAYER * 2);
    if (threadIdx.x == 0) find_item(p);
#pragma unroll 1
    for (int i = threadIdx.x; i < (8 * Q_STRIDE + 2 * HD) / 2; i += NT) ((u32 *)fresh_token())[i] = 0;   // columns without a head
    consumers_meet();
    if (item().count && item().length > 0) {
        const float *turns = p.rope + (long long)p.positions[item().row] * HD;
        for (int i = threadIdx.x; i < HD; i += NT) angles()[i] = turns[i];
        const int groups = min(groups_of(item()), PLACES);
        for (int i = threadIdx.x; i < groups; i += NT) places()[i] = look_up(p, item(), i);
    }
    consumers_meet();
    u32 tag = step % (0xffffffffu / NL) * NL;
    const u16 *x = nullptr;
#pragma unroll 1
    for (int l = 0; l < NL; ++l) {
        const Layer &w = p.layer[l];
        if (l + 1 < NL) expect_share(words + LAYER, LAYER * 2);
        empty(others);
        if (item().length > 0) expect_context(w);
        if (blockIdx.x == GRID - 1) {
            for (int i = threadIdx.x * 128; i < HID * 2; i += NT * 128) {
                prefetch((const char *)w.mlp_norm + i);
                prefetch((const char *)(l + 1 < NL ? p.layer[l + 1].input_norm : p.final_norm) + i);
            }
        }
        ++tag;
        consume<Qkv, true, STORE>(ring, share, p, x, w.input_norm, words + QKV_AT, nullptr);
        attend(p, w, words + QKV_AT, words + ATTN_AT, tag);
        consume<Output, false, ADD>(ring, share, p, words + ATTN_AT, nullptr, words + MID_AT, x);
        consume<GateUp, true, ACT>(ring, share, p, words + MID_AT, w.mlp_norm, words + ACT_AT, nullptr);
        consume<Down, false, ADD>(ring, share, p, words + ACT_AT, nullptr, words + OUT_AT, words + MID_AT);
        x = words + OUT_AT;
        words += LAYER;
        others += LAYER;
    }
    consume<Head, true, BEST>(ring, share, p, x, p.final_norm, nullptr, nullptr);
    if (threadIdx.x == 0) p.steps[blockIdx.x] = step + 1;
}

// Behind `decode_rows`: the best token of each row among the blocks'.
struct FinishParams {
    const float *best;
    const int *best_at;
    int *tokens;
    int count;
};
extern "C" __global__ void __launch_bounds__(256) finish_rows(const __grid_constant__ FinishParams p) {
    let_successor_start();
    wait_for_predecessor();
    const int lane = threadIdx.x & 31, token = threadIdx.x >> 5;
    if (token >= p.count) return;
    float best = -infinity();
    int at = 0x7fffffff;
    for (int i = lane; i < GRID; i += 32) better(best, at, p.best[i * 8 + token], p.best_at[i * 8 + token]);
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        const float v = __shfl_xor_sync(~0u, best, d);
        better(best, at, v, __shfl_xor_sync(~0u, at, d));
    }
    if (lane == 0) p.tokens[token] = at;
}
