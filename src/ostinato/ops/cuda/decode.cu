// All layers of a dense decoder for one token, in one persistent kernel.
//
// A decode step reads every weight once, and nothing else of size: it is as fast as weights arrive.
// One block runs on each multiprocessor. Four producer warps stream this block's share of all weights,
// in the order of use, through a ring in shared memory by bulk copies; they depend on nothing
// that the step computes. While the ring is full they go on into the L2 cache, at the pace of the memory,
// so that memory never rests. The other WARPS warps consume: each takes slices of the inner dimension
// of a tile of 16 weight rows and multiplies them on tensor cores (the tile is the m16 operand, the token
// a column of n8); the slices of a few tiles are added through shared memory at once.
//
// Between blocks, activations travel in 8-byte words of two bfloat16 and a tag: readers poll the very
// words that they need, so there is no barrier and no fence, and one trip to the L2 cache (NCCL's LL
// protocol). A tag is never used twice. Nothing is overwritten too early: whoever writes version l + 1
// of a buffer has, through what it read, waited for all who read version l.
//
// The fragments' inner index is permuted: a thread takes 16 consecutive bytes of a weight row, and
// the same inner indices of the token, where mma would give it two far pairs. The sum is the same.
//
// Macros: HID QSIZE QKVN INTER VOCAB NL HEADS KVH HD BLOCK_SIZE WINDOW TABLE_WIDTH FP8 QKNORM QKV_BIAS O_BIAS GRID WARPS
// MOST_SLICES (of a chunk) FLIGHT (chunks of weights under way to the ring) LEAD (chunks
// in the L2 cache ahead of it) PACE (cycles a chunk) MAXS (most splits of a context) CHUNK (fewest
// tokens in a split) LONGEST (most tokens in one of few splits) TOGETHER (tiles between two meetings of the warps) COUNTS (whether `decode` counts the step, and not `finish`).

#include "common.cuh"
#include "ring.cuh"
#if FP8
typedef unsigned char W;
#else
typedef u16 W;
#endif

constexpr int divisor(int n, int most) {    // the largest divisor of n up to most
    for (int d = most; d > 1; --d) if (n % d == 0) return d;
    return 1;
}
constexpr int cmax(int a, int b) { return a > b ? a : b; }
constexpr int cdiv(int a, int b) { return (a + b - 1) / b; }
// Bytes from row to row in shared memory: an odd number of half lines, so that two rows share no bank.
constexpr int apart(int bytes) { return bytes / 64 % 2 ? bytes : bytes + 64; }

constexpr int NW = WARPS;                   // consumer warps
constexpr int NT = NW * 32;                 // consumer threads
constexpr int PW = 4;                       // producer warps: a bulk copy takes its warp about 35 cycles to issue
constexpr int SW = 64 / sizeof(W);          // inner indices in a slice: 16 bytes of each of 4 lanes
constexpr int XW = FP8 ? 8 : 4;             // words of the token in a slice, for each of 4 lanes
constexpr int BATCH = 4;                    // slices that a warp loads together
constexpr int GROUP = HEADS / KVH;          // query heads of a KV head
constexpr int HALF = HD / 2;
constexpr int DL = HD / 8;                  // lanes that share a head: 8 dimensions each
constexpr int TPI = 32 / DL;                // tokens that a warp looks at together
constexpr int U = 8;                        // such groups that it asks for together
constexpr int PASS = NW * TPI * U;          // tokens that a block asks for together
constexpr int FEW = 4;                      // splits that the reader merges
constexpr int PART = HD / 2 + 2;            // words of a head's split

constexpr int chunk_of(int k) { return divisor(k / SW, MOST_SLICES) * SW; }
constexpr int stride_of(int ck) { return apart(ck * (int)sizeof(W)); }

// A product of the step. A tile is 16 rows of weights; or eight rows of gate and the same of up; or the
// first halves of eight rows and then their second halves, where that leaves the busiest block fewer rows.
template <int K_, int N_, bool GATED_> struct Op {
    static constexpr bool GATED = GATED_;
    static constexpr int K = K_, N = N_;
    static constexpr bool HALVED = !GATED && K / 2 % SW == 0 && cdiv(N / 8, GRID) * 8 < cdiv(N / 16, GRID) * 16;
    static constexpr int ROWS = GATED || HALVED ? 8 : 16, TILES = N / ROWS;
    static constexpr int INNER = HALVED ? K / 2 : K, CK = chunk_of(INNER), CHUNKS = INNER / CK, STRIDE = stride_of(CK);
    // A warp's part of a tile: EACH slices of each chunk, one after the other. What it needs of the token it keeps in
    // registers, SIDE slices in a set of XW: lane 4 * i + t has the t-th quarter of slice i, which makes it column i of the product.
    static constexpr int SLICES = CK / SW, EACH = cdiv(SLICES, NW), TURNS = CHUNKS * EACH;
    static constexpr int COLUMNS = HALVED ? 4 : 8, SIDE = EACH > COLUMNS ? COLUMNS : COLUMNS / EACH * EACH, SETS = cdiv(TURNS, SIDE);
    static __device__ __forceinline__ int column(int g) { return HALVED ? g & 3 : g; }
    static constexpr long long SECOND = GATED ? (long long)N * K : HALVED ? K / 2 : 0;   // from a tile's row 0 to its row 8
};
using Qkv = Op<HID, QKVN, false>;
using Output = Op<QSIZE, HID, false>;
using GateUp = Op<HID, INTER, true>;
using Down = Op<INTER, HID, false>;
using Head = Op<HID, VOCAB, false>;

constexpr int STAGE = 16 * cmax(stride_of(chunk_of(HID)), cmax(stride_of(chunk_of(QSIZE)), stride_of(chunk_of(INTER))));
constexpr int RED = TOGETHER * NW * 64;               // floats in one reduction buffer
constexpr int ATT = NW * HD + (NW + 2) / 2 * 4;       // floats for merging warps in attention
constexpr int FIXED = (2 * RED + ATT) * 4 + 2 * NW * 4 + HD * 4 + 3 * HD * 2 + LONGEST * 4 + 16;
constexpr int STAGES = (227 * 1024 - FIXED) / (STAGE + 16);
static_assert(STAGES > FLIGHT, "the ring does not fit");
static_assert(16 * TOGETHER <= NT, "a thread for each result of the tiles");
static_assert(HID % SW == 0 && QSIZE % SW == 0 && INTER % SW == 0, "whole slices");
static_assert(QKVN % 16 == 0 && HID % 16 == 0 && INTER % 8 == 0 && VOCAB % 16 == 0, "whole tiles");
static_assert(3 * DL <= NT && LONGEST % CHUNK == 0, "lanes for each vector of a new token; whole splits");
static_assert(HD == 64 || HD == 128, "head dimensions that lanes share evenly");

// Shared memory, all of it at places known when this is compiled.
extern __shared__ __align__(128) unsigned char memory[];   // first the ring's stages
constexpr int RED_AT = STAGES * STAGE, ATT_AT = RED_AT + 2 * RED * 4, SQUARES_AT = ATT_AT + ATT * 4;
constexpr int ANGLES_AT = SQUARES_AT + 2 * NW * 4, SLOTS_AT = ANGLES_AT + HD * 4, FLAG_AT = SLOTS_AT + LONGEST * 4;
constexpr int FRESH_AT = FLAG_AT + 16, FULL_AT = FRESH_AT + 3 * HD * 2, EMPTY_AT = FULL_AT + STAGES * 8;
static_assert(EMPTY_AT + STAGES * 8 <= 227 * 1024 && FRESH_AT % 16 == 0 && FULL_AT % 8 == 0, "the layout");
#define SHARED(type, name, place) __device__ __forceinline__ type *name() { return (type *)(memory + place); }
SHARED(float, reduced, RED_AT)       // [2][TOGETHER][NW][16 rows][4 lanes]
SHARED(float, gathered, ATT_AT)      // attention's parts: [NW][HD], then [NW + 1] of (largest, sum)
SHARED(float, sums, SQUARES_AT)      // [2][NW] of squares
SHARED(float, angles, ANGLES_AT)     // [HD]
SHARED(int, places, SLOTS_AT)        // [LONGEST], where tokens of this block's split lie in the cache
SHARED(u32, flag, FLAG_AT)
SHARED(u16, fresh_token, FRESH_AT)   // [3][HD]: query, key and value of the new token

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
    u32 *semaphores;           // [HEADS], zero before and after
    u32 *steps;                // steps so far; `finish` counts where this kernel cannot
    float *logits;             // [VOCAB], or null: only the best
    float *best;               // [GRID]
    int *best_at;              // [GRID]
    const int *positions, *slots, *rows, *lens, *table;
    float eps, scale;
};

__device__ __forceinline__ float widen(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ float ldcg(const float *p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ uint4 lds(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}
// Read anew by each op: what follows from it would otherwise be kept in registers for all of them at once.
__device__ __forceinline__ int thread() {
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}
__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(NT) : "memory"); }
__device__ __forceinline__ void bulk_copy(u32 to, const void *from, u32 bytes, u32 bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}
__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
struct Pair { u64 a, b; };
__device__ __forceinline__ Pair ld_pair(const u64 *p) {
    Pair v;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(v.a), "=l"(v.b) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u64 ld_cell(const u64 *p) {
    u64 v;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ bool fresh(const Pair &v, u32 tag) { return (u32)(v.a >> 32) == tag && (u32)(v.b >> 32) == tag; }
__device__ __forceinline__ void rest() { asm volatile("nanosleep.u32 32;"); }
// What was asked for early, now for certain.
__device__ __forceinline__ void insist(Pair &v, const u64 *p, u32 tag) {
    u32 spins = 0;
    while (!fresh(v, tag)) {
        if (++spins == 1u << 24) __trap();   // many seconds: an error instead of a hang
        rest();
        v = ld_pair(p);
    }
}
__device__ __forceinline__ void st_cell(u64 *p, u32 value, u32 tag) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"((u64)tag << 32 | value) : "memory");
}
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
    if ((threadIdx.x & 31) == 0) insist(p, tag);
    __syncwarp();
}
#if FP8
// E4M3 bytes to bfloat16 by moving their bits to where bfloat16 has them: that is the value times 2^-120,
// subnormals too. Tokens are multiplied by 2^100 instead, and the result by 2^20. Of four bytes, `even`
// takes the first and the third, `odd` the others; tokens lie in shared memory in the same order.
constexpr float TOKEN_FACTOR = 1.2676506002282294e30f, RESULT_FACTOR = 1048576.f;
__device__ __forceinline__ u32 even(u32 v) { return (v << 8 & 0x80008000u) | (v << 4 & 0x07f007f0u); }
__device__ __forceinline__ u32 odd(u32 v) { return (v & 0x80008000u) | (v >> 4 & 0x07f007f0u); }
#endif

struct Ring {
    int stage;
    u32 parity;
    __device__ __forceinline__ u32 data() const { return shared_at(memory) + stage * STAGE; }
    __device__ __forceinline__ u32 full() const { return shared_at(memory) + FULL_AT + stage * 8; }
    __device__ __forceinline__ u32 empty() const { return shared_at(memory) + EMPTY_AT + stage * 8; }
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) { stage = 0; parity ^= 1; }
    }
    __device__ __forceinline__ bool free() const {
        u32 yes;
        asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(yes) : "r"(empty()), "r"(parity ^ 1) : "memory");
        return yes;
    }
    // Deep queues in front of memory would delay all that the step waits for: a chunk is asked for
    // only when the one FLIGHT before it has come.
    __device__ __forceinline__ void throttle() const {
        int at = stage - FLIGHT;
        mbar_wait(full() + (at < 0 ? STAGES - FLIGHT : -FLIGHT) * 8, at < 0 ? parity ^ 1 : parity);
    }
};

// Tiles of an op go round the blocks, and the next op goes on where it stopped: all get equally much.
struct Share {
    int offset;
    __device__ __forceinline__ int first() const {
        int t = (int)blockIdx.x - offset;
        return t < 0 ? t + GRID : t;
    }
    __device__ __forceinline__ void pass(int tiles) { offset = (offset + tiles) % GRID; }
};

__device__ __forceinline__ int tile_row() { return ((int)threadIdx.x - NT >> 5) * (16 / PW) + (threadIdx.x & (16 / PW - 1)); }

// Where a producer warp is in this block's share of all weights. Each of its lanes 0 to 3 looks after one
// of the 16 rows of a tile.
struct Cursor {
    Share share;
    int op, tile, tiles, rows, chunk, chunks, bytes, stride;   // op: four a layer, then the head; bytes of a row's chunk
    const W *weight, *from;
    long long k, second;
    int layer;
    bool done;

    template <typename O>
    __device__ __forceinline__ void set(const W *w) {
        weight = w; tiles = O::TILES; rows = O::ROWS; k = O::K; second = O::SECOND;
        chunks = O::CHUNKS; bytes = O::CK * sizeof(W); stride = O::STRIDE;
    }
    __device__ __forceinline__ void open(const Params &p) {
        for (;;) {
            if (layer == NL) set<Head>(p.head);
            else if (op == 0) set<Qkv>(p.layer[layer].qkv);
            else if (op == 1) set<Output>(p.layer[layer].output);
            else if (op == 2) set<GateUp>(p.layer[layer].gate_up);
            else set<Down>(p.layer[layer].down);
            tile = share.first();
            if (tile < tiles) break;
            if (leave()) return;
        }
        row();
    }
    __device__ __forceinline__ bool leave() {
        share.pass(tiles);
        if (layer == NL) return done = true;
        if (++op == 4) { op = 0; ++layer; }
        return false;
    }
    __device__ __forceinline__ void row() {
        int own = tile_row();
        from = weight + (tile * rows + (own & (rows - 1))) * k + (own >> 3) * second;
        chunk = 0;
    }
    __device__ __forceinline__ void next(const Params &p) {
        if (++chunk < chunks) return;
        tile += GRID;
        if (tile < tiles) row();
        else if (!leave()) open(p);
    }
    __device__ __forceinline__ const void *at() const { return (const char *)from + chunk * bytes; }
};

__device__ __forceinline__ void produce(const Params &p, Ring ring) {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    const int lane = threadIdx.x & 31;
    Cursor now;
    now.share.offset = 0; now.op = now.layer = 0; now.done = false;
    now.open(p);
    Cursor ahead = now;
    int started = 0, lead = 0;
    long long last = clock64();
    while (!now.done) {
        if (ring.free()) {
            if (started >= FLIGHT) ring.throttle(); else ++started;
            const u32 full = ring.full();
            if (threadIdx.x == NT) mbar_expect(full, 16 * now.bytes);
            __syncwarp();
            if (lane < 16 / PW) bulk_copy(ring.data() + tile_row() * now.stride, now.at(), now.bytes, full, policy);
            ring.next();
            now.next(p);
            if (lead > 0) --lead; else ahead.next(p);
            last = clock64();
        } else if (lead < LEAD && !ahead.done && clock64() - last > PACE) {
            last = clock64();
            if (lane < 16 / PW) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(ahead.at()), "r"(ahead.bytes) : "memory");
            __syncwarp();
            ahead.next(p);
            ++lead;
        }
    }
}

// How a context is cut, and what this block has of it: items blockIdx.x, + GRID, ...; all heads of a split stand side by side.
struct Context {
    int length, first, chunk, splits;
    __device__ __forceinline__ int start(int item) const { return first + item / HEADS * chunk; }
    __device__ __forceinline__ int end(int item) const { return min(start(item) + chunk, length); }
    __device__ __forceinline__ int items() const { return splits * HEADS; }
    // Whether the places of all old tokens that it looks at fit into shared memory.
    __device__ __forceinline__ bool known() const { return (int)blockIdx.x + GRID >= items() && chunk <= LONGEST; }
};

__device__ __forceinline__ Context context_of(int length) {
    Context c;
    c.length = length;
    c.first = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
    const int seen = length - c.first;
    // Few splits, which readers merge, as long as they are short; then as many as there may be.
    c.chunk = min(cdiv(max(seen, 1), FEW * CHUNK), LONGEST / CHUNK) * CHUNK;
    if (seen > MAXS * c.chunk) c.chunk = cdiv(seen, MAXS * CHUNK) * CHUNK;
    c.splits = max(1, cdiv(seen, c.chunk));
    return c;
}

__device__ __forceinline__ void look_up(const Params &p, int from, int to) {
    const int *table = p.table + (long long)max(p.rows[0], 0) * TABLE_WIDTH;
#pragma unroll 1
    for (int i = threadIdx.x; i < to - from; i += NT) places()[i] = table[(from + i) / BLOCK_SIZE] * BLOCK_SIZE + (from + i) % BLOCK_SIZE;
}

// Old keys and values of a layer on their way to the L2 cache.
__device__ __forceinline__ void expect_context(const Layer &layer, const Context &c) {
    const int item = blockIdx.x;
    if (item >= c.items() || !c.known()) return;
    constexpr int LINES = HD * 2 / 128;
    const int kv = item % HEADS / GROUP, tokens = min(c.end(item), c.length - 1) - c.start(item);
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens * LINES; i += NT) {
        const long long place = (long long)places()[i / LINES] * (KVH * HD) + kv * HD + i % LINES * 64;
        prefetch(layer.keys + place);
        prefetch(layer.values + place);
    }
}

__device__ __forceinline__ void spread(float (&f)[8], uint4 v) {
    f[0] = lo(v.x); f[1] = hi(v.x); f[2] = lo(v.y); f[3] = hi(v.y);
    f[4] = lo(v.z); f[5] = hi(v.z); f[6] = lo(v.w); f[7] = hi(v.w);
}

enum { STORE, ADD, ACT, BEST };
enum { CELLS, ATTENTION };

// What a warp needs of an op's input: from the words to its registers, times the norm's weights where there is a norm.
// Tag 0: the embedding. Returns this lane's sum of squares.
template <typename O, bool NORM, int FROM>
__device__ __forceinline__ float stage(const Params &p, const Context &context, const u64 *x, const u16 *norm, u32 tag,
                                       u32 (&kept)[O::SETS * XW]) {
    constexpr int PAIRS = XW / 2;   // of words, in a set
    const int tid = thread(), warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < O::SETS * XW; ++i) kept[i] = 0;
    if (O::SLICES % NW && warp * O::EACH >= O::SLICES) return 0.f;
    // Where this lane's values of a set begin, and whether there are any.
    const auto turn = [&](int set) { return set * O::SIDE + O::column(g); };
    const auto inner = [&](int set) {
        return (O::HALVED ? g / 4 * O::INNER : 0) + turn(set) / O::EACH * O::CK + (warp * O::EACH + turn(set) % O::EACH) * SW + t * (SW / 4);
    };
    const auto there = [&](int set) {
        return (O::SIDE == O::COLUMNS || O::column(g) < O::SIDE) && (O::TURNS % O::SIDE == 0 || turn(set) < O::TURNS) && (O::SLICES % NW == 0 || warp * O::EACH + turn(set) % O::EACH < O::SLICES);
    };
    const auto keep = [&](int set, int pair, u32 a, u32 b) {
        u32 *to = kept + set * XW + pair * 2;
#if FP8
        to[0] = pack(lo(a) * TOKEN_FACTOR, lo(b) * TOKEN_FACTOR);
        to[1] = pack(hi(a) * TOKEN_FACTOR, hi(b) * TOKEN_FACTOR);
#else
        to[0] = a;
        to[1] = b;
#endif
    };
    if (FROM == ATTENTION && context.splits > 1 && context.splits <= FEW) {
        // A lane looks out for each split, at the word that is written last.
        const auto part = [&](int head, int split) { return p.parts + ((long long)head * MAXS + split) * PART; };
        if (lane < context.splits) insist(part(warp * O::EACH * SW / HD, lane) + HD / 2, tag);
        __syncwarp();
        constexpr int AT_ONCE = O::SETS > 1 && !FP8 ? 2 : 1;
#pragma unroll
        for (int set = 0; set < O::SETS; set += AT_ONCE) {
            Pair v[AT_ONCE][FEW][PAIRS];
            u64 weight[AT_ONCE][FEW];
            bool all = false;
#pragma unroll 1
            for (u32 spins = 0; !all; ++spins) {
                if (spins == 1u << 24) __trap();
                if (spins) rest();
#pragma unroll
                for (int a = 0; a < AT_ONCE; ++a)
#pragma unroll
                    for (int j = 0; j < FEW; ++j)
                        if (j < context.splits && set + a < O::SETS && there(set + a)) {
                            const u64 *own = part(inner(set + a) / HD, j);
                            weight[a][j] = ld_cell(own + HD / 2);
#pragma unroll
                            for (int q = 0; q < PAIRS; ++q) v[a][j][q] = ld_pair(own + inner(set + a) % HD / 2 + q * 2);
                        } else {   // otherwise their registers would be kept from layer to layer
                            weight[a][j] = (u64)tag << 32;
#pragma unroll
                            for (int q = 0; q < PAIRS; ++q) v[a][j][q] = Pair{(u64)tag << 32, (u64)tag << 32};
                        }
                all = true;
#pragma unroll
                for (int a = 0; a < AT_ONCE; ++a)
#pragma unroll
                    for (int j = 0; j < FEW; ++j) {
                        all = all && (u32)(weight[a][j] >> 32) == tag;
#pragma unroll
                        for (int q = 0; q < PAIRS; ++q) all = all && fresh(v[a][j][q], tag);
                    }
            }
#pragma unroll
            for (int a = 0; a < AT_ONCE; ++a) {
                if (set + a >= O::SETS) break;
                float above = -infinity(), w[FEW], total = 0.f;
#pragma unroll
                for (int j = 0; j < FEW; ++j)
                    if (j < context.splits) above = fmaxf(above, __uint_as_float((u32)weight[a][j]));
#pragma unroll
                for (int j = 0; j < FEW; ++j) {
                    w[j] = j < context.splits ? exp2_(__uint_as_float((u32)weight[a][j]) - above) : 0.f;
                    total += w[j];
                }
                const float factor = 1.f / total;
#pragma unroll
                for (int q = 0; q < PAIRS; ++q) {
                    float f[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                    for (int j = 0; j < FEW; ++j) {
                        f[0] += lo((u32)v[a][j][q].a) * w[j]; f[1] += hi((u32)v[a][j][q].a) * w[j];
                        f[2] += lo((u32)v[a][j][q].b) * w[j]; f[3] += hi((u32)v[a][j][q].b) * w[j];
                    }
                    keep(set + a, q, pack(f[0] * factor, f[1] * factor), pack(f[2] * factor, f[3] * factor));
                }
            }
        }
        return 0.f;
    }
    uint4 gain[NORM ? O::SETS * XW / 4 : 1];
    if (NORM) {
#pragma unroll
        for (int i = 0; i < O::SETS * XW / 4; ++i) {
            const int set = i / (XW / 4);
            gain[i] = there(set) ? *(const uint4 *)(norm + inner(set) + i % (XW / 4) * 8) : make_uint4(0, 0, 0, 0);
        }
    }
    Pair v[O::SETS][PAIRS] = {};
    const bool embedding = NORM && tag == 0;
    if (embedding) {
        const u16 *own = p.embedding + (long long)p.ids[0] * HID;
#pragma unroll
        for (int set = 0; set < O::SETS; ++set)
            if (there(set))
#pragma unroll
                for (int q = 0; q < PAIRS; ++q) {
                    const uint2 w = *(const uint2 *)(own + inner(set) + q * 4);
                    v[set][q].a = w.x; v[set][q].b = w.y;
                }
    } else {
        look_out(x + inner(0) / 2, tag);
#pragma unroll
        for (int set = 0; set < O::SETS; ++set)
            if (there(set))
#pragma unroll
                for (int q = 0; q < PAIRS; ++q) v[set][q] = ld_pair(x + inner(set) / 2 + q * 2);
    }
    float squares = 0.f;
#pragma unroll
    for (int set = 0; set < O::SETS; ++set) {
        if (!there(set)) break;
#pragma unroll
        for (int q = 0; q < PAIRS; ++q) {
            if (!embedding) insist(v[set][q], x + inner(set) / 2 + q * 2, tag);
            u32 one = (u32)v[set][q].a, two = (u32)v[set][q].b;
            if (NORM) {
                const float a = lo(one), b = hi(one), c = lo(two), d = hi(two);
                const u32 *more = &gain[set * (XW / 4) + q / 2].x + q % 2 * 2;
                squares += a * a + b * b + c * c + d * d;
                one = pack(a * lo(more[0]), b * hi(more[0]));
                two = pack(c * lo(more[1]), d * hi(more[1]));
            }
            keep(set, q, one, two);
        }
    }
    return squares;
}

// 16 rows times a slice of the token, as one column of the product; the others get nothing. Columns are added at the end.
template <typename O>
__device__ __forceinline__ void multiply(float (&acc)[4][4], const uint4 &a, const uint4 &b, const u32 (&kept)[O::SETS * XW], int turn, int g) {
    const bool here = O::column(g) == turn % O::SIDE;
    u32 x[XW];
#pragma unroll
    for (int i = 0; i < XW; ++i) x[i] = here ? kept[turn / O::SIDE * XW + i] : 0;
#if FP8
    const u32 *pa = &a.x, *pb = &b.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 a0 = even(pa[i]), a2 = odd(pa[i]), b0 = even(pb[i]), b2 = odd(pb[i]);
        mma(acc[i], a0, b0, a2, b2, x[2 * i], x[2 * i + 1]);
    }
#else
    mma(acc[turn % 2 * 2], a.x, b.x, a.y, b.y, x[0], x[1]);
    mma(acc[turn % 2 * 2 + 1], a.z, b.z, a.w, b.w, x[2], x[3]);
#endif
}

// Which buffer the warps' sums go to: there are two, so that one meeting is enough for each. Another two for squares.
struct Turn { int sums, squares; };

// out (+)= op(x): this block's tiles. `tag` is of the input, `out_tag` of what is written, and for ADD
// `old_tag` of what the sum is added to (0: the embedding).
template <typename O, bool NORM, int KIND, int FROM>
__device__ __forceinline__ void consume(Ring &ring, Share &share, Turn &use, const Params &p, const Context &context, const u64 *x,
                                        u32 tag, const u16 *norm, const float *scale, const u16 *bias, u64 *out, u32 out_tag,
                                        u32 old_tag) {
    constexpr int EACH = O::EACH, LUMP = cmax(1, BATCH / EACH);   // chunks that are waited for together
    constexpr int ROUNDS = O::SETS > 2 && EACH <= O::COLUMNS ? O::SETS : 1;   // a loop over sets of inputs instead of more code
    constexpr int CHUNKS = ROUNDS > 1 ? O::SIDE / EACH : O::CHUNKS;           // in each round; the last one may have fewer
    const int tid = thread(), warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3, row = tid & 15;
    int tile = share.first();
    share.pass(O::TILES);
    if (tile >= O::TILES) return;
    u32 kept[O::SETS * XW];
    float squares = stage<O, NORM, FROM>(p, context, x, norm, tag, kept);
    if (NORM) use.squares ^= 1;
    int turn = tid >> 4, best_at = 0;   // which tile's results are this thread's to finish
    float best = -infinity();
    const int begin = tile;
    for (; tile < O::TILES; tile += TOGETHER * GRID) {
        const int n = (tile + turn * GRID) * O::ROWS + row;
        const bool mine = turn < TOGETHER && row < O::ROWS && n < O::N;
        u64 old = 0;
#if FP8
        float factor_v = 0.f, factor_u = 0.f;   // asked for before the weights come, not looked at before they have
        if (mine) {
            factor_v = ldcg(scale + n);
            if (KIND == ACT) factor_u = ldcg(scale + O::N + n);
        }
#endif
        if (KIND == ADD && mine && old_tag) old = ld_cell(out + n / 2);
        float *red = reduced() + use.sums * RED + warp * 64 + lane;
#pragma unroll 1
        for (int i = 0; i < TOGETHER && tile + i * GRID < O::TILES; ++i, red += NW * 64) {
            float acc[4][4] = {};
            int column = g;
#pragma unroll 1
            for (int round = 0; round < ROUNDS; ++round) {
#pragma unroll
                for (int c = 0; c < CHUNKS; c += LUMP) {
                    asm volatile("" : "+r"(column));   // else every column's inputs would be kept in registers from tile to tile
                    uint4 a[LUMP * EACH], b[LUMP * EACH];
                    u32 empty[LUMP];
#pragma unroll
                    for (int k = 0; k < LUMP; ++k) {
                        if (c + k >= CHUNKS) break;
#pragma unroll
                        for (int j = 0; j < EACH; ++j) a[k * EACH + j] = b[k * EACH + j] = make_uint4(0, 0, 0, 0);
                        empty[k] = 0;
                        if (CHUNKS * ROUNDS > O::CHUNKS && round * CHUNKS + c + k >= O::CHUNKS) continue;
                        mbar_wait(ring.full(), ring.parity);
                        const u32 at = ring.data() + g * O::STRIDE + warp * EACH * 64 + t * 16;
#pragma unroll
                        for (int j = 0; j < EACH; ++j) {
                            if (O::SLICES % NW == 0 || warp * EACH + j < O::SLICES) {
                                a[k * EACH + j] = lds(at + j * 64);
                                b[k * EACH + j] = lds(at + j * 64 + 8 * O::STRIDE);
                            }
                        }
                        empty[k] = ring.empty();
                        ring.next();
                    }
#pragma unroll
                    for (int k = 0; k < LUMP; ++k) {
                        if (c + k >= CHUNKS) break;
#pragma unroll
                        for (int j = 0; j < EACH; ++j) multiply<O>(acc, a[k * EACH + j], b[k * EACH + j], kept, (c + k) * EACH + j, column);
                    }
                    __syncwarp();
#pragma unroll
                    for (int k = 0; k < LUMP; ++k)
                        if (c + k < CHUNKS && lane == 0 && (CHUNKS * ROUNDS == O::CHUNKS || empty[k])) mbar_arrive(empty[k]);
                }
                if (ROUNDS > 1) {   // the next set's turn
                    u32 used[XW];
#pragma unroll
                    for (int w = 0; w < XW; ++w) used[w] = kept[w];
#pragma unroll
                    for (int w = 0; w < O::SETS * XW; ++w) kept[w] = w < (O::SETS - 1) * XW ? kept[w + XW] : used[w - (O::SETS - 1) * XW];
                }
            }
#pragma unroll
            for (int q = 0; q < 4; ++q) acc[0][q] = acc[0][q] + acc[1][q] + (acc[2][q] + acc[3][q]);
            const float first = acc[0][0] + acc[0][1], second = acc[0][2] + acc[0][3];
            if (O::HALVED) red[0] = t < 2 ? first : second;
            else { red[0] = first; red[32] = second; }
        }
        if (NORM && tile == begin) {
#pragma unroll
            for (int d = 16; d; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
            if (lane == 0) sums()[use.squares * NW + warp] = squares;
        }
        consumers_meet();
        float v = 0.f, u = 0.f;
        if (mine) {
            const float *part = reduced() + use.sums * RED + turn * (NW * 64) + row * 4;
            float all = 0.f;
            const auto sum = [](const float4 &f) { return f.x + f.y + (f.z + f.w); };
#pragma unroll
            for (int w = 0; w < NW; ++w) {
                v += sum(*(const float4 *)(part + w * 64));
                if (KIND == ACT) u += sum(*(const float4 *)(part + w * 64 + 32));
                if (NORM) all += sums()[use.squares * NW + w];
            }
            if (NORM) { float factor = rsqrtf(all / O::K + p.eps); v *= factor; u *= factor; }
#if FP8
            v *= factor_v * RESULT_FACTOR;
            u *= factor_u * RESULT_FACTOR;
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
                v = rounded(v / (1.f + exp2_(-1.4426950408889634f * v))) * rounded(u);
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
            turn = (turn + NT / 16 - cmax(2, TOGETHER)) % (NT / 16);
        }
        use.sums ^= 1;
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
        float *tops = reduced() + use.sums * RED;   // nobody reads this one any more
        if (lane == 0 && warp < (TOGETHER + 1) / 2) { tops[2 * warp] = best; tops[2 * warp + 1] = __int_as_float(best_at); }
        consumers_meet();
        if (tid == 0) {
            for (int w = 1; w < (TOGETHER + 1) / 2; ++w) better(tops[2 * w], __float_as_int(tops[2 * w + 1]));
            p.best[blockIdx.x] = best;
            p.best_at[blockIdx.x] = best_at;
        }
    }
}

struct Eight { Pair a, b; };
__device__ __forceinline__ Eight ask(const u64 *p) { return {ld_pair(p), ld_pair(p + 2)}; }
__device__ __forceinline__ uint4 get(Eight &v, const u64 *p, u32 tag) {
    insist(v.a, p, tag);
    insist(v.b, p + 2, tag);
    return make_uint4((u32)v.a.a, (u32)v.a.b, (u32)v.b.a, (u32)v.b.b);
}

// Query, and in the last split key and value, of the new token: to shared memory and to the cache.
// Normed where the model does, rotated, rounded; a lane has eight dimensions of one of them.
__device__ __forceinline__ void prepare(const Params &p, const Layer &layer, int head, bool last, u32 tag) {
    const int vector = threadIdx.x / DL, dl = threadIdx.x % DL, kv = head / GROUP;
    if (vector / (32 / DL) * (32 / DL) > 2) return;   // none of the warp
    const bool is_v = vector == 2;
    const u64 *cells = p.qkv + ((vector == 0 ? head : (is_v ? HEADS + KVH : HEADS) + kv) * HD + dl * 8) / 2;
    Eight asked = ask(cells);
#if QKNORM
    float gain[8];
    spread(gain, *(const uint4 *)((vector == 0 ? layer.q_norm : layer.k_norm) + dl * 8));
#endif
    const float *turns = angles() + dl % (DL / 2) * 8;
    float f[8], cos[8], sin[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) { cos[i] = turns[i]; sin[i] = turns[HALF + i]; }
    const uint4 raw = get(asked, cells, tag);
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
    if (vector > 2) return;
    const uint4 packed = is_v ? raw : make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
    *(uint4 *)(fresh_token() + vector * HD + dl * 8) = packed;
    if (vector > 0 && last && head % GROUP == 0)
        *(uint4 *)((is_v ? layer.values : layer.keys) + (long long)p.slots[0] * (KVH * HD) + kv * HD + dl * 8) = packed;
}

// Attention of this block's items. A split's tokens are shared by the warps; the new token is a part of its own.
__device__ __forceinline__ void attend(const Params &p, const Layer &layer, const Context &c, u32 tag) {
    const int tid = thread(), warp = tid >> 5, lane = tid & 31, dl = lane % DL, sub = lane / DL;
    float *const parts = gathered();
    float2 *const stats = (float2 *)(parts + NW * HD);
#pragma unroll 1
    for (int item = blockIdx.x; item < c.items(); item += GRID) {
        const int head = item % HEADS, split = item / HEADS, kv = head / GROUP;
        const int start = c.start(item), end = c.end(item), old = min(end, c.length - 1);   // up to `old` they are in the cache
        const bool last = end == c.length && c.length > 0, known = c.known();
        const int *table = p.table + (long long)max(p.rows[0], 0) * TABLE_WIDTH;
        // Where this lane's piece of a token is; behind the last old token: of that one again.
        const auto piece = [&](int at, int u) {
            const int token = min(at + u * TPI + sub, old - 1);
            const int slot = known ? places()[token - start] : table[token / BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE;
            return (long long)slot * (KVH * HD) + kv * HD + dl * 8;
        };
        uint4 kr[U], vr[U];
        const int begin = start + warp * (TPI * U);
#pragma unroll
        for (int u = 0; u < U; ++u) kr[u] = vr[u] = make_uint4(0, 0, 0, 0);   // else their registers would be kept from layer to layer
        if (begin < old)
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const long long from = piece(begin, u);
                kr[u] = ldcg4(layer.keys + from);
                vr[u] = ldcg4(layer.values + from);
            }
        prepare(p, layer, head, last, tag);   // the new token, while the old ones are on their way
        consumers_meet();
        float q[8], acc[8], top = -infinity(), sum = 0.f;
        spread(q, *(const uint4 *)(fresh_token() + dl * 8));
#pragma unroll
        for (int i = 0; i < 8; ++i) { q[i] *= p.scale; acc[i] = 0.f; }
#pragma unroll 1
        for (int at = begin; at < old; at += PASS) {
            float s[U];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                float k[8], a = 0.f;
                spread(k, kr[u]);
#pragma unroll
                for (int i = 0; i < 8; ++i) a += q[i] * k[i];
#pragma unroll
                for (int d = 1; d < DL; d <<= 1) a += __shfl_xor_sync(~0u, a, d);
                s[u] = at + u * TPI + sub < old ? a : -infinity();
            }
            const bool more = at + PASS < old;
            if (more)
#pragma unroll
                for (int u = 0; u < U; ++u) kr[u] = ldcg4(layer.keys + piece(at + PASS, u));
            float above = top;
#pragma unroll
            for (int u = 0; u < U; ++u) above = fmaxf(above, s[u]);
            const float base = above == -infinity() ? 0.f : above, fade = exp2_(top - base);
            top = above;
            sum *= fade;
#pragma unroll
            for (int i = 0; i < 8; ++i) acc[i] *= fade;
#pragma unroll
            for (int u = 0; u < U; ++u) {
                float v[8];
                spread(v, vr[u]);
                s[u] = exp2_(s[u] - base);
                sum += s[u];
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[i] += s[u] * v[i];
            }
            if (more)
#pragma unroll
                for (int u = 0; u < U; ++u) vr[u] = ldcg4(layer.values + piece(at + PASS, u));
        }
        // Lanes of a warp, then warps, always in the same order.
#pragma unroll
        for (int d = DL; d < 32; d <<= 1) {
            const float other = __shfl_xor_sync(~0u, top, d), above = fmaxf(top, other), base = above == -infinity() ? 0.f : above;
            const float ours = exp2_(top - base), theirs = exp2_(other - base);
            sum = sum * ours + __shfl_xor_sync(~0u, sum, d) * theirs;
#pragma unroll
            for (int i = 0; i < 8; ++i) acc[i] = acc[i] * ours + __shfl_xor_sync(~0u, acc[i], d) * theirs;
            top = above;
        }
        if (sub == 0) {
            float *own = parts + warp * HD + dl * 8;
            *(float4 *)own = make_float4(acc[0], acc[1], acc[2], acc[3]);
            *(float4 *)(own + 4) = make_float4(acc[4], acc[5], acc[6], acc[7]);
            if (dl == 0) stats[warp] = make_float2(top, sum);
        }
        const u16 *const key = fresh_token() + HD, *const value = key + HD;
        if (warp == NW - 1) {   // it has the fewest old tokens
            float score = 0.f;
#pragma unroll
            for (int i = lane * 2; i < HD; i += 64) {
                const u32 a = *(const u32 *)(fresh_token() + i), b = *(const u32 *)(key + i);
                score += lo(a) * lo(b) + hi(a) * hi(b);
            }
#pragma unroll
            for (int d = 16; d; d >>= 1) score += __shfl_xor_sync(~0u, score, d);
            if (lane == 0) stats[NW] = last ? make_float2(score * p.scale, 1.f) : make_float2(-infinity(), 0.f);
        }
        consumers_meet();
        u64 *const out = p.attn + head * HD / 2;
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
            result = c.length > 0 ? result / total : 0.f;
            const float other = __shfl_xor_sync(~0u, result, 1);
            u64 *const space = p.parts + ((long long)head * MAXS + split) * PART;
            if ((tid & 1) == 0) st_cell((c.splits == 1 ? out : space) + tid / 2, pack(result, other), tag);
            if (tid == 0 && c.splits > 1) st_cell(space + HD / 2, __float_as_uint(above + __log2f(total)), tag);
        }
        if (c.splits > FEW) {
            consumers_meet();
            if (tid == 0) {
                u32 before;
                // Zero again by itself behind the last split.
                asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                             : "=r"(before) : "l"(p.semaphores + head), "r"((u32)c.splits - 1) : "memory");
                *flag() = before == (u32)c.splits - 1;
            }
            consumers_meet();
            if (*flag() && tid < HD) {
                const u64 *space = p.parts + (long long)head * MAXS * PART;
                float above = -infinity(), total = 0.f, result = 0.f;
#pragma unroll 1
                for (int j = 0; j < c.splits; ++j) {
                    const u64 *own = space + j * PART;
                    const float here = __uint_as_float(insist(own + HD / 2, tag)), next = fmaxf(above, here);
                    const float fade = exp2_(above - next), weight = exp2_(here - next);
                    const u32 two = insist(own + tid / 2, tag);
                    total = total * fade + weight;
                    result = result * fade + (tid & 1 ? hi(two) : lo(two)) * weight;
                    above = next;
                }
                result /= total;
                const float other = __shfl_xor_sync(~0u, result, 1);
                if ((tid & 1) == 0) st_cell(out + tid / 2, pack(result, other), tag);
            }
        }
        // Before the next item writes what this one reads. Otherwise the warps meet in between, in the MLP at the latest.
        if (GateUp::TILES < GRID || item + GRID < c.items()) consumers_meet();
    }
}

// A norm's weights on their way to the L2 cache.
__device__ __forceinline__ void expect(const void *from, int bytes) {
    for (int i = threadIdx.x * 128; i < bytes; i += NT * 128) prefetch((const char *)from + i);
}

extern "C" __global__ void __launch_bounds__(NT + PW * 32, 1) decode(const __grid_constant__ Params p) {
    Ring ring = {0, 0};
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < STAGES; ++i) {
            mbar_init(shared_at(memory) + FULL_AT + i * 8, 1);
            mbar_init(shared_at(memory) + EMPTY_AT + i * 8, NW);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (threadIdx.x >= NT) {
        produce(p, ring);
        asm volatile("griddepcontrol.wait;" ::: "memory");
        return;
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    Share share = {0};
    Turn use = {0, 0};
    const Context c = context_of(p.lens[0]);
    if (c.length > 0) {
        const float *turns = p.rope + (long long)p.positions[0] * HD;
        for (int i = threadIdx.x; i < HD; i += NT) angles()[i] = turns[i];
        if ((int)blockIdx.x < c.items() && c.known()) look_up(p, c.start(blockIdx.x), min(c.end(blockIdx.x), c.length - 1));
    }
    consumers_meet();
    // Two versions of x a layer, one of all else. Starts again before it wraps: zero means the embedding.
    u32 tag = *(volatile u32 *)p.steps % (0xffffffffu / (2 * NL)) * (2 * NL), last = 0;
    for (int l = 0; l < NL; ++l) {
        const Layer &w = p.layer[l];
        const u32 one = tag + 1, two = tag + 2;
        expect_context(w, c);
        if (blockIdx.x == GRID - 1) {
            expect(w.mlp_norm, HID * 2);
            expect(l + 1 < NL ? p.layer[l + 1].input_norm : p.final_norm, HID * 2);
        }
        consume<Qkv, true, STORE, CELLS>(ring, share, use, p, c, p.x, last, w.input_norm, w.qkv_scale, QKV_BIAS ? w.qkv_bias : nullptr,
                                         p.qkv, one, 0);
        attend(p, w, c, one);
        consume<Output, false, ADD, ATTENTION>(ring, share, use, p, c, p.attn, one, nullptr, w.output_scale,
                                               O_BIAS ? w.output_bias : nullptr, p.x, one, last);
        consume<GateUp, true, ACT, CELLS>(ring, share, use, p, c, p.x, one, w.mlp_norm, w.gate_up_scale, nullptr, p.act, one, 0);
        consume<Down, false, ADD, CELLS>(ring, share, use, p, c, p.act, one, nullptr, w.down_scale, nullptr, p.x, two, one);
        last = two;
        tag = two;
    }
    consume<Head, true, BEST, CELLS>(ring, share, use, p, c, p.x, last, p.final_norm, p.head_scale, nullptr, nullptr, 0, 0);
    // It has read what each block made, so all have read `steps`.
    if (COUNTS && blockIdx.x == 0 && threadIdx.x == 0) *p.steps = *(volatile u32 *)p.steps + 1;
}

// Behind `decode`: counts the step if that is left to do, and finds the best token among the blocks' (token may be null).
struct FinishParams {
    const float *best;
    const int *best_at;
    int *token;
    u32 *steps;
};
extern "C" __global__ void __launch_bounds__(32) finish(const __grid_constant__ FinishParams p) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int lane = threadIdx.x;
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
