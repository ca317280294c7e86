// All layers of a dense decoder for one token, in one persistent kernel.
//
// A decode step reads every weight once, and nothing else of size: it is as fast as weights arrive.
// One block runs on each multiprocessor. Four producer warps stream this block's share of all weights,
// in the order of use, through a ring in shared memory by bulk copies; they depend on nothing
// that the step computes. While the ring is full they go on into the L2 cache, at the pace of the memory,
// so that memory never rests. The other WARPS warps consume: each takes the same slices of the inner dimension
// of all tiles of 16 weight rows, brings its part of the token for them, and multiplies on tensor cores (the
// tile is the m16 operand, the token its columns); the slices of a few tiles are added through shared memory at once.
// While it waits for the token it already holds its first HELD slices of weights in registers.
//
// Between blocks, activations travel in 8-byte words of two bfloat16 and a tag: readers poll the very
// words that they need, so there is no barrier and no fence, and one trip to the L2 cache (NCCL's LL
// protocol). A tag is never used twice. Nothing is overwritten too early: whoever writes version l + 1
// of a buffer has, through what it read, waited for all who read version l.
//
// The fragments' inner index is permuted: a thread takes 16 consecutive bytes of a weight row, and they are the
// four registers of a fragment, where mma would have two far pairs of each of two rows. The sum is the same, if the token is
// permuted likewise: see `Slice`.
//
// Macros: HID QSIZE QKVN INTER VOCAB NL HEADS KVH HD BLOCK_SIZE WINDOW TABLE_WIDTH FP8 QKNORM QKV_BIAS O_BIAS GRID WARPS
// MOST_SLICES (of a chunk) FLIGHT (chunks of weights under way to the ring) LEAD (chunks
// in the L2 cache ahead of it) PACE (cycles a chunk) MAXS (most splits of a context) CHUNK (fewest
// tokens in a split) LONGEST (most tokens in one of few splits) PLACES (of tokens or KV blocks, that are looked up once) TOGETHER, GATED_TOGETHER (tiles between two meetings of the warps; of gate
// and up) ASK (cycles from a meeting until the next op's input should be there; 0: nobody knows) COUNTS (whether `decode` counts the step, and not `finish`).

#include "common.cuh"
#include "ring.cuh"
#include "persistent.cuh"
#if FP8
typedef unsigned char W;
#else
typedef u16 W;
#endif

constexpr int SW = 64 / sizeof(W);          // inner indices in a slice: 16 bytes of each of 4 lanes
constexpr int HELD = 8;                     // slices of weights that a warp holds in registers
constexpr int QUADS = SW / 4;               // of the token in a slice: four values, two words
constexpr int OWN = 2048 / HD;              // tokens of a context that a warp asks for together
constexpr int PASS = NW * OWN;              // that a block does
constexpr int FEW = 4;                      // splits that the reader merges
constexpr int PART = HD / 2 + 2;            // words of a head's split
constexpr int COLS = divisor(GROUP, 8);     // query heads of one KV head that a block does together in far contexts: columns of a product
constexpr int TEAMS = HEADS / COLS;
constexpr int MOST = cmax(1, cmin(MAXS, GRID / TEAMS));   // splits of a far context: as many as blocks suffice for at once

constexpr int chunk_of(int k) { return divisor(k / SW, MOST_SLICES) * SW; }
// A warp's part of a tile, in slices: so many of a chunk and of the tile; so many wait in registers at most; in whole batches.
constexpr int each_of(int inner) { return cdiv(chunk_of(inner) / SW, NW); }
constexpr int turns_of(int inner) { return inner / chunk_of(inner) * each_of(inner); }
constexpr int batch_of(int inner) { return cmax(1, cmin(turns_of(inner), cmax(1, HELD / each_of(inner)) * each_of(inner))); }
constexpr int room_of(int inner) { return cdiv(turns_of(inner), batch_of(inner)) * batch_of(inner); }
constexpr int halves_of(int k) { return turns_of(k / 2) + room_of(k / 2); }
constexpr int stride_of(int ck) { return apart(ck * (int)sizeof(W)); }

// A product of the step. A tile is 16 rows of weights; or eight rows of gate and the same of up; or the
// first halves of eight rows and then their second halves, where that leaves the busiest block fewer rows.
template <int K_, int N_, bool GATED_> struct Op {
    static constexpr bool GATED = GATED_;
    static constexpr int MEET = GATED ? GATED_TOGETHER : TOGETHER;   // tiles between two meetings of the warps
    static constexpr int K = K_, N = N_;
    static constexpr bool HALVED = !GATED && K / 2 % SW == 0 && cdiv(N / 8, GRID) * 8 < cdiv(N / 16, GRID) * 16;
    static constexpr int ROWS = GATED || HALVED ? 8 : 16, TILES = N / ROWS;
    static constexpr int INNER = HALVED ? K / 2 : K, CK = chunk_of(INNER), CHUNKS = INNER / CK, STRIDE = stride_of(CK);
    // A warp's part of a tile: EACH slices of each chunk, one after the other. It brings its own part of the token for that.
    static constexpr int SLICES = CK / SW, EACH = each_of(INNER), TURNS = turns_of(INNER), BATCH = batch_of(INNER), BATCHES = cdiv(TURNS, BATCH);
    static constexpr int KEPT = TURNS * (HALVED ? 2 : 1);   // slices of the token that a warp keeps
    static constexpr long long SECOND = GATED ? (long long)N * K : HALVED ? K / 2 : 0;   // from a tile's row 0 to its row 8
};
using Qkv = Op<HID, QKVN, false>;
using Output = Op<QSIZE, HID, false>;
using GateUp = Op<HID, INTER, true>;
using Down = Op<INTER, HID, false>;
using Head = Op<HID, VOCAB, false>;

constexpr int STAGE = 16 * cmax(stride_of(chunk_of(HID)), cmax(stride_of(chunk_of(QSIZE)), stride_of(chunk_of(INTER))));
constexpr int X_ROOM = cmax(cmax(cmax(room_of(HID), halves_of(HID)), cmax(room_of(QSIZE), halves_of(QSIZE))), cmax(room_of(INTER), halves_of(INTER)));
constexpr int X_WARP = X_ROOM * SW * 2;               // bytes of the token that a warp has room for
constexpr int X_BYTES = NW * X_WARP;
constexpr int RED = cmax(TOGETHER, GATED_TOGETHER) * NW * 16;   // floats in one reduction buffer
constexpr int ATT = NW * HD + (NW + 2) / 2 * 4;       // floats for merging warps in attention
constexpr int FIXED = X_BYTES + (2 * RED + ATT) * 4 + 2 * NW * 4 + HD * 4 + (COLS + 2) * HD * 2 + PLACES * 4;
constexpr int STAGES = (227 * 1024 - FIXED) / (STAGE + 16);
static_assert(STAGES > FLIGHT, "the ring does not fit");
static_assert(16 * TOGETHER <= NT && 16 * GATED_TOGETHER <= NT, "a thread for each result of the tiles");
static_assert(HID % SW == 0 && QSIZE % SW == 0 && INTER % SW == 0, "whole slices");
static_assert(QKVN % 16 == 0 && HID % 16 == 0 && INTER % 8 == 0 && VOCAB % 16 == 0, "whole tiles");
static_assert((COLS + 2) * DL <= NT && LONGEST % CHUNK == 0 && LONGEST <= PLACES, "lanes for each vector of a new token; whole splits, that are known");
static_assert(32 % MAXS == 0, "a far context's splits side by side in a warp");
static_assert(HD == 64 || HD == 128, "head dimensions that lanes share evenly");

// Shared memory, all of it at places known when this is compiled: first the ring's stages.
constexpr int X_AT = STAGES * STAGE, RED_AT = X_AT + X_BYTES, ATT_AT = RED_AT + 2 * RED * 4;
constexpr int SQUARES_AT = ATT_AT + ATT * 4, ANGLES_AT = SQUARES_AT + 2 * NW * 4, SLOTS_AT = ANGLES_AT + HD * 4;
constexpr int FRESH_AT = SLOTS_AT + PLACES * 4, FULL_AT = FRESH_AT + (COLS + 2) * HD * 2, EMPTY_AT = FULL_AT + STAGES * 8;
static_assert(EMPTY_AT + STAGES * 8 <= 227 * 1024 && FRESH_AT % 16 == 0 && FULL_AT % 8 == 0, "the layout");
SHARED(float, reduced, RED_AT)       // [2][TOGETHER or GATED_TOGETHER][16][NW]
SHARED(float, gathered, ATT_AT)      // attention's parts: [NW][HD], then [NW + 1] of (largest, sum)
SHARED(float, sums, SQUARES_AT)      // [2][NW] of squares
SHARED(float, angles, ANGLES_AT)     // [HD]
SHARED(int, places, SLOTS_AT)        // [PLACES], where tokens of this block's split lie in the cache; if it is far, KV blocks
SHARED(u16, fresh_token, FRESH_AT)   // [COLS + 2][HD]: a query, or COLS, key and value of the new token

struct Layer {
    const u16 *input_norm, *q_norm, *k_norm, *mlp_norm;
    const W *qkv, *output, *gate_up, *down;
    const u16 *qkv_bias, *output_bias;
    const float *qkv_scale, *output_scale, *gate_up_scale, *down_scale;
    u16 *keys, *values;
};
struct Params {
    Layer layer[NL];
    const u16 *final_norm;
    const W *head;
    const float *head_scale;
    const float *rope;         // [positions, 2, HALF]
    const u16 *embedding;      // [VOCAB, HID]
    const int *ids;            // [1], as all that follows of the step
    u64 *x, *qkv, *attn, *act; // tagged pairs: [HID / 2], [QKVN / 2], [QSIZE / 2], [INTER / 2]
    u64 *parts;                // [HEADS, MAXS, HD / 2 + 2]: tagged pairs, then the logarithm of their weight, float32
    u32 *steps;                // steps so far; `finish` counts where this kernel cannot
    float *logits;             // [VOCAB], or null: only the best
    float *best;               // [GRID]
    int *best_at;              // [GRID]
    const int *positions, *slots, *rows, *lens, *table;
    float eps, scale;
};

// --- Instructions. A test on the CPU has its own of these.
struct Pair { u64 a, b; };
__device__ __forceinline__ Pair ld_pair(const u64 *p) {
    Pair v;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(v.a), "=l"(v.b) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void rest() { asm volatile("nanosleep.u32 32;"); }
__device__ __forceinline__ u32 now() {
    u32 t;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(t));
    return t;
}
__device__ __forceinline__ uint2 lds2(u32 at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
}
__device__ __forceinline__ void sts(u32 at, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
#if FP8
// Two E4M3 bytes to float16, which has all their values.
__device__ __forceinline__ void unpack(u32 v, u32 &first, u32 &second) {
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}" : "=r"(first), "=r"(second) : "r"(v));
}
__device__ __forceinline__ u32 pack_f16(float high, float low) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ void mma_f16(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif
// --- End of instructions.

__device__ __forceinline__ bool fresh(const Pair &v, u32 tag) { return (u32)(v.a >> 32) == tag && (u32)(v.b >> 32) == tag; }
__device__ __forceinline__ u32 insist(const u64 *p, u32 tag) {
    u64 v = ld_cell(p);
    for (u32 spins = 0; (u32)(v >> 32) != tag; v = ld_cell(p)) {
        if (++spins == 1u << 24) __trap();
        rest();
    }
    return (u32)v;
}
// One lane looks while the others rest: a crowd at the same few lines would be in the writers' way.
__device__ __forceinline__ void look_out(const u64 *p, u32 tag) {
    if ((thread() & 31) == 0) insist(p, tag);
    __syncwarp();
}

#include "stream.cuh"

// How a context is cut, and what this block has of it: items blockIdx.x, + GRID, ...; all heads, or all teams of heads, of a split
// stand side by side.
struct Context {
    int length, first, chunk, splits;
    // More than FEW splits of LONGEST: items are of teams of heads, and all blocks merge them.
    __device__ __forceinline__ bool far() const { return length - first > FEW * LONGEST; }
    __device__ __forceinline__ int start(int item) const { return first + (far() ? item / TEAMS : item / HEADS) * chunk; }
    __device__ __forceinline__ int end(int item) const { return min(start(item) + chunk, length); }
    __device__ __forceinline__ int items() const { return splits * (far() ? TEAMS : HEADS); }
    // Whether the places of all old tokens that it looks at fit into shared memory.
    __device__ __forceinline__ bool known() const {
        return (int)blockIdx.x + GRID >= items() && chunk <= (far() ? (PLACES - 1) * BLOCK_SIZE : LONGEST);
    }
    // Of a token of the item that begins at `start`, where they are known.
    __device__ __forceinline__ int place(int token, int start) const {
        return far() ? places()[token / BLOCK_SIZE - start / BLOCK_SIZE] + token % BLOCK_SIZE : places()[token - start];
    }
};

__device__ __forceinline__ Context context_of(int length) {
    Context c;
    c.length = length;
    c.first = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
    const int seen = length - c.first;
    // Few splits, which readers merge, as long as they are short; then as many as there may be.
    c.chunk = min(cdiv(max(seen, 1), FEW * CHUNK), LONGEST / CHUNK) * CHUNK;
    if (c.far()) c.chunk = cdiv(seen, MOST * CHUNK) * CHUNK;
    c.splits = max(1, cdiv(seen, c.chunk));
    return c;
}

// The places of an item's old tokens.
__device__ __forceinline__ void look_up(const Params &p, const Context &c, int item) {
    const int *table = p.table + (long long)max(p.rows[0], 0) * TABLE_WIDTH;
    const int from = c.start(item), to = min(c.end(item), c.length - 1);
    if (c.far()) {
        const int first = from / BLOCK_SIZE;
#pragma unroll 1
        for (int i = thread(); i < cdiv(to, BLOCK_SIZE) - first; i += NT) places()[i] = table[first + i] * BLOCK_SIZE;
    } else {
#pragma unroll 1
        for (int i = thread(); i < to - from; i += NT) places()[i] = table[(from + i) / BLOCK_SIZE] * BLOCK_SIZE + (from + i) % BLOCK_SIZE;
    }
}

// Old keys and values of a layer on their way to the L2 cache.
template <bool FAR> __device__ __forceinline__ void expect_context(const u16 *keys, const u16 *values, const Context &c) {
    const int item = blockIdx.x;
    if (item >= c.items() || !c.known()) return;
    constexpr int LINES = HD * 2 / 128;
    const int kv = (FAR ? item % TEAMS * COLS : item % HEADS) / GROUP, start = c.start(item), tokens = min(c.end(item), c.length - 1) - start;
#pragma unroll 1
    for (int i = thread(); i < tokens * LINES; i += NT) {
        const long long place = (long long)c.place(start + i / LINES, start) * (KVH * HD) + kv * HD + i % LINES * 64;
        prefetch(keys + place);
        prefetch(values + place);
    }
}

enum { STORE, ADD, ACT, BEST };
enum { CELLS, ATTENTION };
// Which buffer the warps' sums go to: there are two, so that one meeting is enough for each. Another two for squares.
struct Turn {
    u32 bits;  // of sums, of squares
    __device__ __forceinline__ int sums() const { return bits & 1; }
    __device__ __forceinline__ int squares() const { return bits >> 1; }
    u32 met;   // when the warps met last
};

// Whether STEP slices side by side of what each warp keeps are of one head, wherever a half, a chunk or a warp's part begins.
template <typename O, int STEP> constexpr bool of_one_head() {
    for (int warp = 0; warp < NW; ++warp)
        for (int kept = 0; kept < O::KEPT; ++kept) {
            int head[2] = {};
            for (int i = 0; i < 2; ++i) {
                const int which = i ? kept : kept / STEP * STEP, at = which % O::TURNS;
                head[i] = (which / O::TURNS * O::INNER + at / O::EACH * O::CK + (warp * O::EACH + at % O::EACH) * SW) / HD;
            }
            if (head[0] != head[1] && warp * O::EACH + kept % O::TURNS % O::EACH < O::SLICES) return false;
        }
    return O::KEPT % STEP == 0;
}

// Brings what a warp needs of an op's input to its part of shared memory, times the norm's weights where there is a norm.
// Tag 0: the embedding. Returns this lane's sum of squares, and `inverse` of what FP8's token is multiplied by.
template <typename O, bool NORM, int FROM>
__device__ __forceinline__ float stage(const Params &p, const Context &context, const u64 *x, const u16 *norm, u32 tag, float &inverse, u32 met) {
    constexpr int COUNT = O::KEPT * QUADS, PER = cdiv(COUNT, 32);   // of four values; for a lane
    const int tid = thread(), warp = tid >> 5, lane = tid & 31;
    inverse = 1.f;
    if (O::SLICES % NW && warp * O::EACH >= O::SLICES) return 0.f;
    // Where in the token a lane's values are, and whether there are any.
    const auto slice = [&](int u) { return (lane + 32 * u) / QUADS % O::TURNS; };
    const auto inner = [&](int u) {
        const int half = O::HALVED ? (lane + 32 * u) / QUADS / O::TURNS : 0;
        return half * O::INNER + slice(u) / O::EACH * O::CK + (warp * O::EACH + slice(u) % O::EACH) * SW + lane % QUADS * 4;
    };
    const auto there = [&](int u) {
        return (COUNT % 32 == 0 || lane + 32 * u < COUNT) && (O::SLICES % NW == 0 || warp * O::EACH + slice(u) % O::EACH < O::SLICES);
    };
    uint2 w[PER];
#pragma unroll
    for (int u = 0; u < PER; ++u) w[u] = make_uint2(0, 0);
    float squares = 0.f;
    if (FROM == ATTENTION && context.splits > 1 && !context.far()) {
        // Lanes look out for each split of each of the heads, at the word that is written last: asking in vain for all is dear. They do so
        // together: each by itself they would take what the L2 cache can deliver. The shares of the splits stand where the token will be.
        // STEP slices side by side are of one head: one only where a half, a chunk or a warp's part of it begins within what would be two heads.
        constexpr int RUN = O::EACH * SW, PIECE = cmin(RUN, HD), STEP = O::INNER % PIECE || O::CK % PIECE || cmax(RUN, HD) % PIECE ? 1 : PIECE / SW;
        constexpr int UNITS = O::KEPT / STEP;
        constexpr int LOOKS = cdiv(UNITS * FEW, 32), AT_ONCE = 2;
        static_assert(FROM != ATTENTION || UNITS * FEW * 4 <= X_WARP, "room");
        static_assert(FROM != ATTENTION || of_one_head<O, STEP>(), "a share is a head's");
        float *const shares = (float *)(memory + X_AT + warp * X_WARP);   // [UNITS][FEW]
        float log[LOOKS];
#pragma unroll
        for (int k = 0; k < LOOKS; ++k) {
            const int i = lane + 32 * k, first = i / FEW * STEP, side = first / O::TURNS, at = first % O::TURNS, own = warp * O::EACH + at % O::EACH;
            const bool wanted = i < UNITS * FEW && i % FEW < context.splits && (O::SLICES % NW == 0 || own < O::SLICES);
            const u64 *from = p.parts + ((long long)((side * O::INNER + at / O::EACH * O::CK + own * SW) / HD) * MAXS + i % FEW) * PART + HD / 2;
            u64 found = (u64)tag << 32 | 0xff800000u;
            if (wanted) found = ld_cell(from);
#pragma unroll 1
            for (u32 spins = 0; !__all_sync(~0u, (u32)(found >> 32) == tag);) {
                if (++spins == 1u << 24) __trap();
                rest();
                if ((u32)(found >> 32) != tag) found = ld_cell(from);
            }
            log[k] = __uint_as_float((u32)found);
        }
        Pair v[AT_ONCE][FEW];
        const auto ask = [&](int first, bool anew) {
#pragma unroll
            for (int a = 0; a < AT_ONCE; ++a)
#pragma unroll
                for (int j = 0; j < FEW; ++j)
                    if (first + a < PER && j < context.splits && there(first + a)) {
                        const int at = inner(first + a);
                        if (anew || !fresh(v[a][j], tag)) v[a][j] = ld_pair(p.parts + ((long long)(at / HD) * MAXS + j) * PART + at % HD / 2);
                    } else if (anew) v[a][j] = Pair{(u64)tag << 32, (u64)tag << 32};
        };
#pragma unroll
        for (int first = 0; first < PER; first += AT_ONCE) {
            ask(first, true);
            if (first == 0) {   // meanwhile
#pragma unroll
                for (int k = 0; k < LOOKS; ++k) {
                    const float two = fmaxf(log[k], __shfl_xor_sync(~0u, log[k], 1)), above = fmaxf(two, __shfl_xor_sync(~0u, two, 2));
                    const float share = exp2_(log[k] - above), sum = share + __shfl_xor_sync(~0u, share, 1), all = sum + __shfl_xor_sync(~0u, sum, 2);
                    if (lane + 32 * k < UNITS * FEW) shares[lane + 32 * k] = __fdividef(share, all);
                }
                __syncwarp();
            }
#pragma unroll 1
            for (u32 spins = 0;;) {
                bool all = true;
#pragma unroll
                for (int a = 0; a < AT_ONCE; ++a)
#pragma unroll
                    for (int j = 0; j < FEW; ++j) all = all && fresh(v[a][j], tag);
                if (all) break;
                if (++spins == 1u << 24) __trap();
                rest();
                ask(first, false);
            }
#pragma unroll
            for (int a = 0; a < AT_ONCE; ++a) {
                if (first + a >= PER || !there(first + a)) continue;
                const float4 own = *(const float4 *)(shares + (lane + 32 * (first + a)) / QUADS / STEP * FEW);
                const float share[FEW] = {own.x, own.y, own.z, own.w};
                float f[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int j = 0; j < FEW; ++j) {
                    f[0] += lo((u32)v[a][j].a) * share[j]; f[1] += hi((u32)v[a][j].a) * share[j];
                    f[2] += lo((u32)v[a][j].b) * share[j]; f[3] += hi((u32)v[a][j].b) * share[j];
                }
                w[first + a] = make_uint2(pack(f[0], f[1]), pack(f[2], f[3]));
            }
        }
        __syncwarp();   // all have read what the token overwrites
        if (O::SLICES % NW) {   // slices that a warp lacks keep what stood there, and it must be numbers: a head without lanes has no share
#pragma unroll
            for (int k = 0; k < LOOKS; ++k)
                if (lane + 32 * k < UNITS * FEW) shares[lane + 32 * k] = 0.f;
            __syncwarp();
        }
    } else {
        Pair v[PER] = {};
        uint2 gain[NORM ? PER : 1];
        if (NORM) {
#pragma unroll
            for (int u = 0; u < PER; ++u) gain[u] = there(u) ? *(const uint2 *)(norm + inner(u)) : make_uint2(0, 0);
        }
        if (NORM && tag == 0) {
            const u16 *own = p.embedding + (long long)p.ids[0] * HID;
#pragma unroll
            for (int u = 0; u < PER; ++u)
                if (there(u)) { const uint2 e = *(const uint2 *)(own + inner(u)); v[u].a = e.x; v[u].b = e.y; }
        } else {
            bool all = false;
            // Where it is known how long the others take, all words are asked for at once, at a time when they should be there.
            if (ASK) {
                while (now() - met < ASK) {}
#pragma unroll
                for (int u = 0; u < PER; ++u)
                    if (there(u)) v[u] = ld_pair(x + inner(u) / 2);
                all = true;
#pragma unroll
                for (int u = 0; u < PER; ++u) all = all && (!there(u) || fresh(v[u], tag));
                all = __all_sync(~0u, all);
            }
            if (!all) look_out(x + inner(0) / 2, tag);
#pragma unroll 1
            for (u32 spins = 0; !all; ++spins) {
                if (spins == 1u << 24) __trap();
                if (spins) rest();
#pragma unroll
                for (int u = 0; u < PER; ++u)
                    if (there(u) && !fresh(v[u], tag)) v[u] = ld_pair(x + inner(u) / 2);
                all = true;
#pragma unroll
                for (int u = 0; u < PER; ++u) all = all && (!there(u) || fresh(v[u], tag));
            }
        }
#pragma unroll
        for (int u = 0; u < PER; ++u) {
            if (!there(u)) continue;
            w[u] = make_uint2((u32)v[u].a, (u32)v[u].b);
            if (NORM) {
                const float a = lo(w[u].x), b = hi(w[u].x), c = lo(w[u].y), d = hi(w[u].y);
                squares += a * a + b * b + c * c + d * d;
                w[u] = make_uint2(pack(a * lo(gain[u].x), b * hi(gain[u].x)), pack(c * lo(gain[u].y), d * hi(gain[u].y)));
            }
        }
    }
#if FP8
    // To float16, times a power of two that puts the warp's largest value below 2^15: what is 2^29 times smaller loses digits.
    u32 most = 0;
#pragma unroll
    for (int u = 0; u < PER; ++u)
        most = max(most, max(max(w[u].x << 16 & 0x7fff0000u, w[u].x & 0x7fff0000u), max(w[u].y << 16 & 0x7fff0000u, w[u].y & 0x7fff0000u)));
    const u32 exponent = max(__reduce_max_sync(~0u, most) >> 23, 15u);
    const float power = __uint_as_float((268u - exponent) << 23);
    inverse = __uint_as_float((exponent - 14u) << 23);
#pragma unroll
    for (int u = 0; u < PER; ++u) {
        w[u].x = pack_f16(hi(w[u].x) * power, lo(w[u].x) * power);
        w[u].y = pack_f16(hi(w[u].y) * power, lo(w[u].y) * power);
    }
#endif
    // Of a lane's part of a slice even pairs first, then odd ones: they are in other columns of the product.
    const u32 to = shared_at(memory) + X_AT + warp * X_WARP + lane / QUADS * (SW * 2) + lane % QUADS / (QUADS / 4) * (SW / 2) + lane % (QUADS / 4) * 4;
#pragma unroll
    for (int u = 0; u < PER; ++u) {
        if (!there(u)) continue;
        sts(to + u * (32 / QUADS * SW * 2), w[u].x);
        sts(to + u * (32 / QUADS * SW * 2) + SW / 4, w[u].y);
    }
    __syncwarp();
    return squares;
}

// Rows g and g + 8 of a slice: 16 bytes of each. The registers of one row are the fragment of a product of their own, whose rows
// g and g + 8 have even and odd pairs of inner indices; so has the token in its even and odd columns. Then nothing moves.
struct Slice { uint4 a, b; };
#if FP8
struct Token { uint4 x; };
__device__ __forceinline__ Token token(u32 at) { return {lds(at)}; }
__device__ __forceinline__ void multiply(float (&acc)[2][4], const uint4 &a, const Token &v) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u32 r0, r1, r2, r3;
        unpack(i ? a.z : a.x, r0, r1);
        unpack(i ? a.w : a.y, r2, r3);
        mma_f16(acc[i], r0, r1, r2, r3, i ? v.x.z : v.x.x, i ? v.x.w : v.x.y);
    }
}
#else
struct Token { u32 x, y; };
__device__ __forceinline__ Token token(u32 at) {
    const uint2 v = lds2(at);
    return {v.x, v.y};
}
#endif

// out (+)= op(x): this block's tiles. `tag` is of the input, `out_tag` of what is written, and for ADD
// `old_tag` of what the sum is added to (0: the embedding).
template <typename O, bool NORM, int KIND, int FROM>
__device__ __forceinline__ void consume(Ring &ring, Share &share, Turn &use, const Params &p, const Context &context, const u64 *x,
                                        u32 tag, const u16 *norm, const float *scale, const u16 *bias, u64 *out, u32 out_tag,
                                        u32 old_tag) {
    // Weights wait in registers, a batch of slices: a few tiles, or one, or a part of one.
    constexpr int EACH = O::EACH, TURNS = O::TURNS, BATCH = O::BATCH, BATCHES = O::BATCHES;
    constexpr int MEET = O::MEET;
    constexpr bool ALL = MEET > TOGETHER || TURNS * MEET <= HELD;   // the tiles between two meetings wait; more than TOGETHER only where they can
    constexpr int TILES_HELD = ALL ? MEET : 1;
    static_assert(!ALL || BATCHES == 1, "tiles that wait do so whole");
    const int tid = thread(), warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3, row = tid & 15;
    int tile = share.first();
    share.pass(O::TILES);
    if (tile >= O::TILES) return;
    Slice held[TILES_HELD][BATCH];
    const u32 into = g * O::STRIDE + warp * EACH * 64 + t * 16;
    const auto load = [&](int i, int batch) {
        u32 bar = 0, loaded = 0;   // of the chunk before, which is given back when its weights have come: one behind, so that nobody waits for them
#pragma unroll
        for (int c = 0; c < BATCH / EACH; ++c) {
#pragma unroll
            for (int j = 0; j < EACH; ++j) held[i][c * EACH + j] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
            if (TURNS % BATCH && batch * (BATCH / EACH) + c >= O::CHUNKS) continue;
            mbar_wait(ring.full(), ring.parity);
            const u32 at = ring.data() + into;
#pragma unroll
            for (int j = 0; j < EACH; ++j)
                if (O::SLICES % NW == 0 || warp * EACH + j < O::SLICES)
                    held[i][c * EACH + j] = {lds(at + j * 64), lds(at + j * 64 + 8 * O::STRIDE)};
            __syncwarp();
            if (c > 0 && lane == 0) give_back(bar, loaded);
            bar = ring.empty();
            loaded = 0;
#pragma unroll
            for (int j = 0; j < EACH; ++j) loaded ^= held[i][c * EACH + j].a.x ^ held[i][c * EACH + j].b.x;
            ring.next();
        }
        if (lane == 0) give_back(bar, loaded);
    };
    const auto load_first = [&](int tile) {
#pragma unroll
        for (int i = 0; i < TILES_HELD; ++i)
            if (i == 0 || tile + i * GRID < O::TILES) load(i, 0);
            else
#pragma unroll
                for (int u = 0; u < BATCH; ++u) held[i][u] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};   // else it would be kept from layer to layer
    };
    load_first(tile);   // no result is needed for that
    float inverse;
    float squares = stage<O, NORM, FROM>(p, context, x, norm, tag, inverse, use.met);
    if (NORM) use.bits ^= 2;
    const u32 own_x = shared_at(memory) + X_AT + warp * X_WARP + t * (SW / 2) + (g & 1) * (SW / 4);
    int turn = tid >> 4, best_at = 0;   // which tile's results are this thread's to finish
    float best = -infinity();
    const int begin = tile;
#pragma unroll 1
    for (; tile < O::TILES; tile += MEET * GRID) {
        const int n = (tile + turn * GRID) * O::ROWS + row;
        const bool mine = turn < MEET && row < O::ROWS && n < O::N;
        u64 old = 0;
#if FP8
        float factor_v = 0.f, factor_u = 0.f;   // asked for before the weights come, not looked at before they have
        if (mine) {
            factor_v = ldcg(scale + n);
            if (KIND == ACT) factor_u = ldcg(scale + O::N + n);
        }
#endif
        if (KIND == ADD && mine && old_tag) old = ld_cell(out + n / 2);
        float *red = reduced() + use.sums() * RED + g * NW + warp;
        const auto multiply_held = [&](float (&up)[2][4], float (&low)[2][4], int i, u32 from) {
#pragma unroll
            for (int u = 0; u < BATCH; ++u) {
                const Token v = token(from + u * (SW * 2)), w = O::HALVED ? token(from + (TURNS + u) * (SW * 2)) : v;
#if FP8
                multiply(up, held[i][u].a, v);
                multiply(low, held[i][u].b, w);
#else
                const uint4 a = held[i][u].a, b = held[i][u].b;
                mma(up[u % 2], a.x, a.y, a.z, a.w, v.x, v.y);
                mma(low[u % 2], b.x, b.y, b.z, b.w, w.x, w.y);
#endif
            }
        };
        const auto leave = [&](float (&up)[2][4], float (&low)[2][4], int i) {
            float first = up[0][0] + up[1][0] + (up[0][3] + up[1][3]), second = low[0][0] + low[1][0] + (low[0][3] + low[1][3]);
            if (O::HALVED) first += second;
#if FP8
            first *= inverse;
            second *= inverse;
#endif
            if (t == 0) {
                red[i * (NW * 16)] = first;
                if (!O::HALVED) red[i * (NW * 16) + 8 * NW] = second;
            }
        };
        if (ALL) {
#pragma unroll
            for (int i = 0; i < MEET; ++i) {
                if (i > 0 && tile + i * GRID >= O::TILES) break;
                float up[2][4] = {}, low[2][4] = {};
                multiply_held(up, low, i % TILES_HELD, own_x);
                leave(up, low, i);
            }
            if (tile + MEET * GRID < O::TILES) load_first(tile + MEET * GRID);
        } else {
#pragma unroll 1
            for (int i = 0; i < MEET && tile + i * GRID < O::TILES; ++i) {
                float up[2][4] = {}, low[2][4] = {};
#pragma unroll 1
                for (int batch = 0; batch < BATCHES; ++batch) {
                    multiply_held(up, low, 0, own_x + batch * BATCH * (SW * 2));
                    if (batch + 1 < BATCHES) load(0, batch + 1);
                    else if (tile + (i + 1) * GRID < O::TILES) load(0, 0);
                }
                leave(up, low, i);
            }
        }
        if (NORM && tile == begin) {
#pragma unroll
            for (int d = 16; d; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
            if (lane == 0) sums()[use.squares() * NW + warp] = squares;
        }
        consumers_meet();
        if (ASK) use.met = now();
        float v = 0.f, u = 0.f;
        if (mine) {
            const auto sum = [](const float *from) {
                const float4 one = *(const float4 *)from, two = *(const float4 *)(from + 4);
                return one.x + one.y + (one.z + one.w) + (two.x + two.y + (two.z + two.w));
            };
            const float *part = reduced() + use.sums() * RED + turn * (NW * 16) + row * NW;
            v = sum(part);
            if (KIND == ACT) u = sum(part + 8 * NW);
            if (NORM) { const float factor = rsqrtf(sum(sums() + use.squares() * NW) / O::K + p.eps); v *= factor; u *= factor; }
#if FP8
            v *= factor_v;
            u *= factor_u;
#endif
            if (KIND != BEST && bias) v += widen(bias[n]);
            if (KIND == ADD) {
                if (old_tag == 0) v += widen(p.embedding[(long long)p.ids[0] * HID + n]);
                else {
                    u32 pair = (u32)(old >> 32) == old_tag ? (u32)old : insist(out + n / 2, old_tag);
                    v += row & 1 ? hi(pair) : lo(pair);
                }
            }
            if (KIND == ACT) {
                v = rounded(v);
                v = rounded(__fdividef(v, 1.f + exp2_(-1.4426950408889634f * v))) * rounded(u);
            }
            if (KIND == BEST) {
                if (p.logits) p.logits[n] = v;
                if (v > best) { best = v; best_at = n; }
            }
        }
        if (KIND != BEST) {
            float other = __shfl_xor_sync(~0u, v, 1);
            if (mine && (row & 1) == 0) st_cell(out + n / 2, pack(v, other), out_tag);
            // The next tiles' results are the next warps', while these still add.
            turn = (turn + NT / 16 - cdiv(MEET, 2) * 2) % (NT / 16);
        }
        use.bits ^= 1;
    }
    if (KIND == BEST) {
        // The lowest index wins ties.
        const auto better = [&](float v, int at) {
            if (v > best || (v == best && at < best_at)) { best = v; best_at = at; }
        };
#pragma unroll
        for (int d = 16; d; d >>= 1) {
            float v = __shfl_xor_sync(~0u, best, d);
            better(v, __shfl_xor_sync(~0u, best_at, d));
        }
        float *tops = reduced() + use.sums() * RED;   // nobody reads this one any more
        if (lane == 0 && warp < (MEET + 1) / 2) { tops[2 * warp] = best; tops[2 * warp + 1] = __int_as_float(best_at); }
        consumers_meet();
        if (tid == 0) {
            for (int w = 1; w < (MEET + 1) / 2; ++w) better(tops[2 * w], __float_as_int(tops[2 * w + 1]));
            p.best[blockIdx.x] = best;
            p.best_at[blockIdx.x] = best_at;
        }
    }
}

// What attention in a layer needs.
struct Attention {
    const u16 *q_norm, *k_norm;
    u16 *keys, *values;
    const u64 *qkv;
    u64 *parts, *attn;
    const int *table, *rows, *slots;
    float eps, scale;
};

struct Eight { Pair a, b; };
__device__ __forceinline__ Eight ask(const u64 *p) { return {ld_pair(p), ld_pair(p + 2)}; }
__device__ __forceinline__ uint4 get(Eight &v, const u64 *p, u32 tag) {
#pragma unroll 1
    for (u32 spins = 0; !(fresh(v.a, tag) && fresh(v.b, tag)); ++spins) {
        if (spins == 1u << 24) __trap();
        rest();
        v = ask(p);
    }
    return make_uint4((u32)v.a.a, (u32)v.a.b, (u32)v.b.a, (u32)v.b.b);
}

// Queries of heads from `head` on, and in the last split key and value, of the new token: to shared memory and to the cache.
// Normed where the model does, rotated, rounded; a lane has eight dimensions of one of them.
template <int QUERIES> __device__ __forceinline__ void prepare(const Attention &a, int head, bool last, u32 tag) {
    const int vector = thread() / DL, dl = thread() % DL, kv = head / GROUP;
    if (vector / (32 / DL) * (32 / DL) > QUERIES + 1) return;   // none of the warp
    const bool is_q = vector < QUERIES, is_v = vector == QUERIES + 1;
    const u64 *cells = a.qkv + ((is_q ? head + vector : (is_v ? HEADS + KVH : HEADS) + kv) * HD + dl * 8) / 2;
    Eight asked = ask(cells);
#if QKNORM
    const uint4 gains = *(const uint4 *)((is_q ? a.q_norm : a.k_norm) + dl * 8);
#endif
    const float *turns = angles() + dl % (DL / 2) * 8;
    float f[8];
    const uint4 raw = get(asked, cells, tag);
    spread(f, raw);
#if QKNORM
    float s = 0.f, gain[8];
    spread(gain, gains);
#pragma unroll
    for (int i = 0; i < 8; ++i) s += f[i] * f[i];
#pragma unroll
    for (int d = 1; d < DL; d <<= 1) s += __shfl_xor_sync(~0u, s, d);
    const float factor = rsqrtf(s / HD + a.eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = rounded(gain[i] * rounded(f[i] * factor));
#endif
    const float sign = dl < DL / 2 ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = f[i] * turns[i] + sign * __shfl_xor_sync(~0u, f[i], DL / 2) * turns[HALF + i];
    if (vector > QUERIES + 1) return;
    const uint4 packed = is_v ? raw : make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
    *(uint4 *)(fresh_token() + vector * HD + dl * 8) = packed;
    if (!is_q && last && head % GROUP == 0)
        *(uint4 *)((is_v ? a.values : a.keys) + (long long)a.slots[0] * (KVH * HD) + kv * HD + dl * 8) = packed;
}

// A far context's splits: this block's share of all pairs of numbers, in order, the splits of a pair side by side in a warp.
__device__ __forceinline__ void merge(const Attention &a, const Context &c, u32 tag) {
    constexpr int PAIRS = HEADS * HD / 2, SHARE = cdiv(PAIRS, GRID), AT_ONCE = NT / MAXS;
    const int split = thread() % MAXS;
#pragma unroll 1
    for (int i = thread() / MAXS; i < cdiv(SHARE, AT_ONCE) * AT_ONCE; i += AT_ONCE) {
        const int pair = blockIdx.x * SHARE + i;
        const bool mine = i < SHARE && pair < PAIRS;
        const u64 *const space = a.parts + ((long long)(mine ? pair / (HD / 2) : 0) * MAXS + split) * PART;
        u64 two = (u64)tag << 32, log = two | 0xff800000u;   // of no weight
        bool asks = mine && split < c.splits;
#pragma unroll 1
        for (u32 spins = 0; !__all_sync(~0u, !asks); ++spins) {
            if (spins == 1u << 24) __trap();
            if (spins) rest();
            if (!asks) continue;
            two = ld_cell(space + pair % (HD / 2));
            log = ld_cell(space + HD / 2);
            asks = (u32)(two >> 32) != tag || (u32)(log >> 32) != tag;
        }
        const float own = __uint_as_float((u32)log);
        float above = own;
#pragma unroll
        for (int d = MAXS / 2; d; d >>= 1) above = fmaxf(above, __shfl_xor_sync(~0u, above, d));
        const float weight = mine ? exp2_(own - above) : 0.f;
        float total = weight, first = lo((u32)two) * weight, second = hi((u32)two) * weight;
#pragma unroll
        for (int d = MAXS / 2; d; d >>= 1) {
            total += __shfl_xor_sync(~0u, total, d);
            first += __shfl_xor_sync(~0u, first, d);
            second += __shfl_xor_sync(~0u, second, d);
        }
        if (mine && split == 0) st_cell(a.attn + pair, pack(__fdividef(first, total), __fdividef(second, total)), tag);
    }
}

// Attention of this block's items. A split's tokens are shared by the warps, 16 at a time the rows of a product on tensor cores;
// the new token is a part of its own. Columns are the query, all of them, or the queries of a team of heads.
template <bool FAR> __device__ __forceinline__ void attend(const Attention &a, const Context &c, u32 tag) {
    const int tid = thread(), warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
    constexpr int QUERIES = FAR ? COLS : 1, OF_A_LANE = QUERIES > 1 ? 2 : 1;   // a lane has two columns
    float *const parts = gathered();
    float2 *const stats = (float2 *)(parts + NW * HD);
#pragma unroll 1
    for (int item = blockIdx.x; item < c.items(); item += GRID) {
        const int head = item % (HEADS / QUERIES) * QUERIES, split = item / (HEADS / QUERIES), kv = head / GROUP;
        const int start = c.start(item), end = c.end(item), old = min(end, c.length - 1);   // up to `old` they are in the cache
        const bool last = end == c.length && c.length > 0, known = c.known();
        const u16 *const keys = a.keys + kv * HD + t * 8;
        const long long apart = a.values - a.keys;   // in numbers
        // Rows of a tile are tokens, and eight of their numbers stand side by side in a lane: of 32 each the t-th eight.
        // Loaded in any case: what is loaded under a condition would be kept in registers from layer to layer.
        uint4 kr[OWN / 8][HD / 32], vr[OWN / 8][HD / 32];
        const auto load = [&](int at) {
            int slot[OWN / 8];
            if (known) {   // all of them before the first load, behind which they would wait
#pragma unroll
                for (int i = 0; i < OWN / 8; ++i) slot[i] = old <= start ? 0 : c.place(min(at + i * 8 + g, old - 1), start);
            } else {
                const int *table = a.table + (long long)max(a.rows[0], 0) * TABLE_WIDTH;
#pragma unroll
                for (int i = 0; i < OWN / 8; ++i) {
                    const int token = min(at + i * 8 + g, old - 1);
                    slot[i] = old <= start ? 0 : table[token / BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE;
                }
            }
#pragma unroll
            for (int i = 0; i < OWN / 8; ++i) {
                const u16 *from = keys + (long long)slot[i] * (KVH * HD);
#pragma unroll
                for (int s = 0; s < HD / 32; ++s) {
                    kr[i][s] = ldcg4(from + s * 32);
                    vr[i][s] = ldcg4(from + apart + s * 32);
                }
            }
        };
        const int begin = start + warp * OWN;
        load(begin);
        prepare<QUERIES>(a, head, last, tag);   // the new token, while the old ones are on their way
        consumers_meet();
        float acc[HD / 16][4] = {}, top[2] = {-infinity(), -infinity()}, sum[2] = {};
        const u32 queries = shared_at(memory) + FRESH_AT + (QUERIES > 1 ? min(g, QUERIES - 1) * HD : 0) * 2 + t * 16;
        const auto add = [&](int at) {
            float score[OWN / 8][2], above[2] = {top[0], top[1]};
#pragma unroll
            for (int i = 0; i < OWN / 8; i += 2) {
                float one[4] = {}, two[4] = {};
#pragma unroll
                for (int s = 0; s < HD / 32; ++s) {
                    const uint4 a = kr[i][s], b = kr[i + 1][s], q = lds(queries + s * 64);
                    mma(one, a.x, b.x, a.y, b.y, q.x, q.y);
                    mma(two, a.z, b.z, a.w, b.w, q.z, q.w);
                }
#pragma unroll
                for (int h = 0; h < OF_A_LANE; ++h) {
                    score[i][h] = at + i * 8 + g < old ? (one[h] + two[h]) * a.scale : -infinity();
                    score[i + 1][h] = at + i * 8 + 8 + g < old ? (one[2 + h] + two[2 + h]) * a.scale : -infinity();
                    above[h] = fmaxf(above[h], fmaxf(score[i][h], score[i + 1][h]));
                }
            }
#pragma unroll
            for (int h = 0; h < OF_A_LANE; ++h) {
#pragma unroll
                for (int d = 4; d < 32; d <<= 1) above[h] = fmaxf(above[h], __shfl_xor_sync(~0u, above[h], d));
                if (at != begin) {
                    const float fade = exp2_(top[h] - above[h]);
                    sum[h] *= fade;
#pragma unroll
                    for (int i = 0; i < HD / 16; ++i) { acc[i][h] *= fade; acc[i][2 + h] *= fade; }
                }
                top[h] = above[h];
            }
#pragma unroll
            for (int i = 0; i < OWN / 8; i += 2) {
                float w0[2], w1[2];
#pragma unroll
                for (int h = 0; h < OF_A_LANE; ++h) {
                    w0[h] = rounded(exp2_(score[i][h] - above[h]));
                    w1[h] = rounded(exp2_(score[i + 1][h] - above[h]));
                    sum[h] += w0[h] + w1[h];
                }
                // A lane has the weights of tokens g and g + 8; as the product's inner index it needs 2 t, 2 t + 1, and those behind eight.
                const u32 b0 = QUERIES > 1 ? transpose(pack(w0[0], w0[1])) : pack(__shfl_sync(~0u, w0[0], t * 8), __shfl_sync(~0u, w0[0], t * 8 + 4));
                const u32 b1 = QUERIES > 1 ? transpose(pack(w1[0], w1[1])) : pack(__shfl_sync(~0u, w1[0], t * 8), __shfl_sync(~0u, w1[0], t * 8 + 4));
#pragma unroll
                for (int s = 0; s < HD / 32; ++s) {
                    const uint4 a = vr[i][s], b = vr[i + 1][s];
                    mma(acc[2 * s], transpose(a.x), transpose(a.y), transpose(b.x), transpose(b.y), b0, b1);
                    mma(acc[2 * s + 1], transpose(a.z), transpose(a.w), transpose(b.z), transpose(b.w), b0, b1);
                }
            }
        };
        if (begin < old) add(begin);
#pragma unroll 1
        for (int at = begin + PASS; at < old; at += PASS) {
            load(at);
            add(at);
        }
        // Warps in order, a head at a time. Register r of slice s has, of row g, number 32 s + 8 (g / 2) + 2 r + g % 2.
#pragma unroll
        for (int h = 0; h < OF_A_LANE; ++h)
#pragma unroll
            for (int d = 4; d < 32; d <<= 1) sum[h] += __shfl_xor_sync(~0u, sum[h], d);
        const u16 *const key = fresh_token() + QUERIES * HD, *const value = key + HD;
#pragma unroll 1
        for (int two = 0; two < QUERIES; two += 2)
#pragma unroll
        for (int h = 0; h < OF_A_LANE; ++h) {
            const int q = two + h;
            if (q == QUERIES) break;
            if (q) consumers_meet();
            if (t == q / 2) {
                float *own = parts + warp * HD + g / 2 * 8 + g % 2;
#pragma unroll
                for (int i = 0; i < HD / 16; ++i) {
                    own[i / 2 * 32 + i % 2 * 4] = acc[i][h];
                    own[i / 2 * 32 + i % 2 * 4 + 2] = acc[i][2 + h];
                }
                if (g == 0) stats[warp] = make_float2(top[h], sum[h]);
            }
            if (warp == NW - 1 && !last && lane == 0) stats[NW] = make_float2(-infinity(), 0.f);
            if (warp == NW - 1 && last) {   // it has the fewest old tokens
                float score = 0.f;
#pragma unroll
                for (int i = lane * 2; i < HD; i += 64) {
                    const u32 a = *(const u32 *)(fresh_token() + q * HD + i), b = *(const u32 *)(key + i);
                    score += lo(a) * lo(b) + hi(a) * hi(b);
                }
#pragma unroll
                for (int d = 16; d; d >>= 1) score += __shfl_xor_sync(~0u, score, d);
                if (lane == 0) stats[NW] = make_float2(score * a.scale, 1.f);
            }
            consumers_meet();
            if (tid < HD) {
                float above = -infinity(), total = 0.f, result = 0.f;
#pragma unroll
                for (int w = 0; w <= NW; ++w) above = fmaxf(above, stats[w].x);
                const float base = c.length > 0 ? above : 0.f;   // a sequence that is not live has no token
#pragma unroll
                for (int w = 0; w <= NW; ++w) {
                    const float weight = exp2_(stats[w].x - base);
                    total += stats[w].y * weight;
                    result += w < NW ? parts[w * HD + tid] * weight : last ? widen(value[tid]) * weight : 0.f;
                }
                result = c.length > 0 ? __fdividef(result, total) : 0.f;
                const float other = __shfl_xor_sync(~0u, result, 1);
                const bool whole = !FAR && c.splits == 1;
                u64 *const space = a.parts + ((long long)(head + q) * MAXS + split) * PART;
                if ((tid & 1) == 0) st_cell((whole ? a.attn + (head + q) * HD / 2 : space) + tid / 2, pack(result, other), tag);
                if (tid == 0 && !whole) st_cell(space + HD / 2, __float_as_uint(above + __log2f(total)), tag);
            }
        }
        // Before the next item writes what this one reads. Otherwise the warps meet in between, in the MLP at the latest.
        if (GateUp::TILES < GRID || item + GRID < c.items()) consumers_meet();
    }
    if (FAR) merge(a, c, tag);
}

// Functions of their own: as a part of the kernel they took registers from all that is near, 2 to 4 us a step. By value, as what a
// kernel is launched with comes slowly by reference.
__device__ __noinline__ void expect_far(const u16 *keys, const u16 *values, Context c) { expect_context<true>(keys, values, c); }
__device__ __noinline__ void attend_far(Attention a, Context c, u32 tag) { attend<true>(a, c, tag); }

// A norm's weights on their way to the L2 cache.
__device__ __forceinline__ void expect(const void *from, int bytes) {
    for (int i = thread() * 128; i < bytes; i += NT * 128) prefetch((const char *)from + i);
}

extern "C" __global__ void __launch_bounds__(NT + PW * 32, 1) decode(const __grid_constant__ Params p) {
    Ring ring = {0, 0};
    if (thread() == 0) {
#pragma unroll 1
        for (int i = 0; i < STAGES; ++i) {
            mbar_init(shared_at(memory) + FULL_AT + i * 8, 1);
            mbar_init(shared_at(memory) + EMPTY_AT + i * 8, NW);
        }
        mbar_fence();
    }
    __syncthreads();
    let_successor_start();
    if (thread() >= NT) {
        produce(p, ring);
        wait_for_predecessor();
        return;
    }
    // What a warp lacks of a token counts nothing, as long as there are numbers.
    for (int i = thread() * 16; i < X_BYTES; i += NT * 16) *(uint4 *)(memory + X_AT + i) = make_uint4(0, 0, 0, 0);
    wait_for_predecessor();
    Share share = {0};
    Turn use = {0, now()};
    const Context c = context_of(p.lens[0]);
    if (c.length > 0) {
        const float *turns = p.rope + (long long)p.positions[0] * HD;
        for (int i = thread(); i < HD; i += NT) angles()[i] = turns[i];
        if ((int)blockIdx.x < c.items() && c.known()) look_up(p, c, blockIdx.x);
    }
    consumers_meet();
    // Two versions of x a layer, one of all else. Starts again before it wraps: zero means the embedding.
    u32 tag = *(volatile u32 *)p.steps % (0xffffffffu / (2 * NL)) * (2 * NL);
    for (int l = 0; l < NL; ++l) {
        const Layer &w = p.layer[l];
        const u32 one = tag + 1, last = l ? tag : 0;
        if (c.far()) expect_far(w.keys, w.values, c);
        else expect_context<false>(w.keys, w.values, c);
        if (blockIdx.x == GRID - 1) {
            expect(w.mlp_norm, HID * 2);
            expect(l + 1 < NL ? p.layer[l + 1].input_norm : p.final_norm, HID * 2);
        }
        consume<Qkv, true, STORE, CELLS>(ring, share, use, p, c, p.x, last, w.input_norm, w.qkv_scale, QKV_BIAS ? w.qkv_bias : nullptr,
                                         p.qkv, one, 0);
        const Attention a = {w.q_norm, w.k_norm, w.keys, w.values, p.qkv, p.parts, p.attn, p.table, p.rows, p.slots, p.eps, p.scale};
        if (c.far()) attend_far(a, c, one);
        else attend<false>(a, c, one);
        consume<Output, false, ADD, ATTENTION>(ring, share, use, p, c, p.attn, one, nullptr, w.output_scale,
                                               O_BIAS ? w.output_bias : nullptr, p.x, one, last);
        consume<GateUp, true, ACT, CELLS>(ring, share, use, p, c, p.x, one, w.mlp_norm, w.gate_up_scale, nullptr, p.act, one, 0);
        consume<Down, false, ADD, CELLS>(ring, share, use, p, c, p.act, one, nullptr, w.down_scale, nullptr, p.x, tag + 2, one);
        tag += 2;
    }
    consume<Head, true, BEST, CELLS>(ring, share, use, p, c, p.x, tag, p.final_norm, p.head_scale, nullptr, nullptr, 0, 0);
    // It has read what each block made, so all have read `steps`.
    if (COUNTS && blockIdx.x == 0 && thread() == 0) *p.steps = *(volatile u32 *)p.steps + 1;
}

// Behind `decode`: counts the step if that is left to do, and finds the best token among the blocks' (token may be null).
struct FinishParams {
    const float *best;
    const int *best_at;
    int *token;
    u32 *steps;
};
extern "C" __global__ void __launch_bounds__(32) finish(const __grid_constant__ FinishParams p) {
    let_successor_start();
    wait_for_predecessor();
    const int lane = thread();
    if (!COUNTS && lane == 0) *p.steps += 1;
    if (!p.token) return;
    float best = -infinity();
    int at = 0x7fffffff;
    for (int i = lane; i < GRID; i += 32) {
        float v = p.best[i];
        int n = p.best_at[i];
        if (v > best || (v == best && n < at)) { best = v; at = n; }
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        float v = __shfl_xor_sync(~0u, best, d);
        int n = __shfl_xor_sync(~0u, at, d);
        if (v > best || (v == best && n < at)) { best = v; at = n; }
    }
    if (lane == 0) *p.token = at;
}
