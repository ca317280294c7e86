// All layers of a dense decoder for up to eight tokens, one of each sequence, in one persistent kernel.
//
// A decode step reads every weight once, and nothing else of size: it is as fast as weights arrive.
// One block runs on each multiprocessor. Four producer warps stream this block's share of all weights,
// in the order of use, through a ring in shared memory by bulk copies; they depend on nothing
// that the step computes. While the ring is full they go on into the L2 cache, at the pace of the memory,
// so that memory never rests. The other WARPS warps consume: each takes slices of the inner dimension
// of a tile of 16 weight rows and multiplies them on tensor cores (the tile is the m16 operand, tokens
// are n8); the slices are added through shared memory.
//
// Between blocks, activations travel in 8-byte words of two bfloat16 and a tag: readers poll the very
// words that they need, so there is no barrier and no fence, and one trip to the L2 cache (NCCL's LL
// protocol). A tag is never used twice. Nothing is overwritten too early: whoever writes version l + 1
// of a buffer has, through what it read, waited for all who read version l.
//
// The fragments' inner index is permuted: a thread takes 16 consecutive bytes of a weight row, and
// the same inner indices of a token, where mma would give it two far pairs. The sum is the same.
//
// Macros: HID QSIZE QKVN INTER VOCAB NL HEADS KVH HD BLOCK_SIZE WINDOW TABLE_WIDTH TOKENS (at most)
// FP8 QKNORM QKV_BIAS O_BIAS GRID WARPS MOST_SLICES (of a chunk) FLIGHT (chunks of weights under way to the ring) LEAD (chunks
// in the L2 cache ahead of it) PACE (cycles a chunk) MAXS (most splits of a context) CHUNK (fewest
// tokens in a split) QG (query heads of an
// item of attention; they share a KV head) COUNTS (whether `decode` counts the step, and not `finish`).

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
// Bytes from row to row in shared memory: an odd number of half lines, so that two rows share no bank.
constexpr int apart(int bytes) { return bytes / 64 % 2 ? bytes : bytes + 64; }

constexpr int NW = WARPS;                   // consumer warps
constexpr int NT = NW * 32;                 // consumer threads
constexpr int PW = 4;                       // producer warps: a bulk copy takes its warp about 35 cycles to issue
constexpr int SW = 64 / sizeof(W);          // inner indices in a slice: 16 bytes of each of 4 lanes
constexpr int XR = FP8 ? 2 : 1;             // uint4 of a token in a slice, for each lane
constexpr int GROUP = HEADS / KVH;           // query heads of a KV head
constexpr int UNITS = HEADS / QG;            // groups of QG query heads, each an item of its own
constexpr int HALF = HD / 2;
constexpr int DL = HD / 8;                  // lanes that share a head: 8 dimensions each
constexpr int TPI = 32 / DL;                // tokens that a warp looks at together
constexpr int U = QG == 1 && HD == 64 ? 8 : 4;         // such groups that it looks at together
constexpr int FEW = 4;                      // splits that the reader merges
constexpr int KEPT = 4;                     // items of attention that a block remembers

constexpr int chunk_of(int k) { return divisor(k / SW, MOST_SLICES) * SW; }
constexpr int stride_of(int ck) { return apart(ck * (int)sizeof(W)); }
constexpr int STAGE = 16 * cmax(stride_of(chunk_of(HID)), cmax(stride_of(chunk_of(QSIZE)), stride_of(chunk_of(INTER))));
constexpr int X_STRIDE = apart(cmax(HID, cmax(QSIZE, INTER)) * 2);
constexpr int RED = NW * 16 * TOKENS;                 // floats in one reduction buffer
constexpr int ATT = NW * QG * (HD + 2);            // floats for merging warps in attention
constexpr int FIXED = TOKENS * X_STRIDE + cmax(2 * RED, ATT) * 4 + NW * TOKENS * 4 + (QG + 3) * HD * 4 + CHUNK * 4 + KEPT * 32 + 256;
constexpr int STAGES = (227 * 1024 - FIXED) / (STAGE + 16);
static_assert(STAGES > FLIGHT, "the ring does not fit");
static_assert(16 * TOKENS <= NT, "a thread for each result of a tile");
static_assert(HID % SW == 0 && QSIZE % SW == 0 && INTER % SW == 0, "whole slices");
static_assert(QKVN % 16 == 0 && HID % 16 == 0 && INTER % 8 == 0 && VOCAB % 16 == 0, "whole tiles");
static_assert(GROUP % QG == 0, "an item has one KV head");
static_assert(QG + 2 <= NW * TPI, "a group of lanes for each vector of a new token");
static_assert(HD == 64 || HD == 128, "head dimensions that lanes share evenly");

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
    const int *ids;            // [B]
    u64 *x, *qkv, *attn, *act; // tagged pairs: [B, HID / 2], [B, QKVN / 2], [B, QSIZE / 2], [B, INTER / 2]
    u64 *parts;                // [B, HEADS, MAXS, HD + 2] float32 with a tag each
    u32 *semaphores;           // [B, UNITS], zero before and after
    u32 *steps;                // steps so far; `finish` counts where this kernel cannot
    float *logits;             // [B, VOCAB], or null: only the best
    float *best;               // [B, GRID]
    int *best_at;              // [B, GRID]
    const int *positions, *slots, *rows, *lens, *table;
    float eps, scale;
    int num_seqs;
};

__device__ __forceinline__ float widen(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ u16 narrow(float a) { return (u16)pack(a, 0.f); }
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
    u32 data, full, empty;   // shared addresses: stages, and two barriers each
    int stage;
    u32 parity;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) { stage = 0; parity ^= 1; }
    }
    __device__ __forceinline__ bool free() const {
        u32 yes;
        asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(yes) : "r"(empty + stage * 8), "r"(parity ^ 1) : "memory");
        return yes;
    }
    // Deep queues in front of memory would delay all that the step waits for: a chunk is asked for
    // only when the one FLIGHT before it has come.
    __device__ __forceinline__ void throttle() const {
        int at = stage - FLIGHT;
        mbar_wait(full + (at < 0 ? at + STAGES : at) * 8, at < 0 ? parity ^ 1 : parity);
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
    int op, tile, tiles, chunk, chunks, bytes, stride;   // op: four a layer, then the head; bytes of a row's chunk
    const W *weight, *from;
    long long k;
    int layer;
    bool done;

    template <int K>
    __device__ __forceinline__ void set(const W *w, int n) {
        weight = w; tiles = n; k = K;
        chunks = K / chunk_of(K); bytes = chunk_of(K) * sizeof(W); stride = stride_of(chunk_of(K));
    }
    __device__ __forceinline__ void open(const Params &p) {
        for (;;) {
            if (layer == NL) set<HID>(p.head, VOCAB / 16);
            else if (op == 0) set<HID>(p.layer[layer].qkv, QKVN / 16);
            else if (op == 1) set<QSIZE>(p.layer[layer].output, HID / 16);
            else if (op == 2) set<HID>(p.layer[layer].gate_up, INTER / 8);
            else set<INTER>(p.layer[layer].down, HID / 16);
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
        long long at = op == 2 && layer < NL ? (own < 8 ? tile * 8 + own : INTER + tile * 8 + own - 8) : tile * 16 + own;
        from = weight + at * k;
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
            u32 full = ring.full + ring.stage * 8;
            if (threadIdx.x == NT) mbar_expect(full, 16 * now.bytes);
            __syncwarp();
            if (lane < 16 / PW) bulk_copy(ring.data + ring.stage * STAGE + tile_row() * now.stride, now.at(), now.bytes, full, policy);
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

struct Item { int b, h, split, splits, first, chunk, length; };

struct Shared {
    u32 x;           // shared address: activations, TOKENS rows X_STRIDE bytes apart
    float *red;      // [2][NW][TOKENS][16], or attention's
    float *squares;  // [NW][TOKENS]
    float *angles;   // [HD], of the first item of attention
    float *fresh;    // [QG + 2, HD]: queries, key and value of an item's new token
    int *slots;      // [CHUNK], where its tokens lie in the cache
    Item *items;     // [KEPT]
    int *count;      // items, or KEPT + 1 where there are more
    u32 *flag;
};

__device__ __forceinline__ int splits_of(int length, int &first, int &chunk) {
    first = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
    int seen = length - first;
    chunk = (seen + MAXS * CHUNK - 1) / (MAXS * CHUNK) * CHUNK;
    if (chunk < CHUNK) chunk = CHUNK;
    int n = (seen + chunk - 1) / chunk;
    return n < 1 ? 1 : n;
}


// The item-th piece of attention: all units of a split stand side by side. False behind the last.
__device__ __forceinline__ bool find(Item &it, const Params &p, int item) {
    for (int b = 0; b < p.num_seqs; ++b) {
        int length = p.lens[b], first, chunk, n = splits_of(length, first, chunk);
        if (item < n * UNITS) {
            it.b = b; it.h = item % UNITS; it.split = item / UNITS; it.splits = n;
            it.first = first; it.chunk = chunk; it.length = length;
            return true;
        }
        item -= n * UNITS;
    }
    return false;
}

// Which items are this block's, and what of them does not change from layer to layer.
__device__ __forceinline__ void remember(const Params &p, const Shared &sh) {
    if (threadIdx.x == 0) {
        int n = 0;
        Item it;
        for (int item = blockIdx.x; find(it, p, item); item += GRID) {
            if (n == KEPT) { ++n; break; }
            sh.items[n++] = it;
        }
        *sh.count = n;
    }
    consumers_meet();
    if (*sh.count == 0 || sh.items[0].length == 0) return;
    Item it = sh.items[0];
    const int start = it.first + it.split * it.chunk, end = min(start + min(it.chunk, CHUNK), it.length);
    const int *table = p.table + (long long)p.rows[it.b] * TABLE_WIDTH;
    for (int i = threadIdx.x; i < end - start; i += NT)
        sh.slots[i] = table[(start + i) / BLOCK_SIZE] * BLOCK_SIZE + (start + i) % BLOCK_SIZE;
    const float *angles = p.rope + (long long)p.positions[it.b] * HD;
    for (int i = threadIdx.x; i < HD; i += NT) sh.angles[i] = angles[i];
    consumers_meet();
}

__device__ __forceinline__ bool item_at(Item &it, const Params &p, const Shared &sh, int i) {
    if (i < KEPT) {
        if (i >= *sh.count) return false;
        it = sh.items[i];
        return true;
    }
    return *sh.count > KEPT && find(it, p, blockIdx.x + i * GRID);
}

__device__ __forceinline__ long long kv_place(const int *table, int position, int h) {
    int block = table[position / BLOCK_SIZE];
    return ((long long)block * BLOCK_SIZE + position % BLOCK_SIZE) * (KVH * HD) + h * HD;
}

__device__ __forceinline__ void spread(float (&f)[8], uint4 v) {
    f[0] = lo(v.x); f[1] = hi(v.x); f[2] = lo(v.y); f[3] = hi(v.y);
    f[4] = lo(v.z); f[5] = hi(v.z); f[6] = lo(v.w); f[7] = hi(v.w);
}


enum { STORE, ADD, ACT, BEST };
enum { EMBEDDING, CELLS, ATTENTION };

// Four values of attention's result that readers merge from splits.
__device__ __forceinline__ uint2 merge(const Params &p, int n, int at, int splits, u32 tag) {
    const u64 *space = p.parts + ((long long)n * HEADS + at / HD) * MAXS * (HD + 2);
    Pair a[FEW], b[FEW], m[FEW];
#pragma unroll
    for (int j = 0; j < FEW; ++j)
        if (j < splits) {
            const u64 *own = space + j * (HD + 2);
            a[j] = ld_pair(own + at % HD); b[j] = ld_pair(own + at % HD + 2); m[j] = ld_pair(own + HD);
        }
    float above = -__int_as_float(0x7f800000);
#pragma unroll
    for (int j = 0; j < FEW; ++j)
        if (j < splits) {
            const u64 *own = space + j * (HD + 2);
            insist(a[j], own + at % HD, tag); insist(b[j], own + at % HD + 2, tag); insist(m[j], own + HD, tag);
            above = fmaxf(above, __uint_as_float((u32)m[j].a));
        }
    float total = 0.f, v[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int j = 0; j < FEW; ++j)
        if (j < splits) {
            float weight = exp2_(__uint_as_float((u32)m[j].a) - above);
            total += __uint_as_float((u32)m[j].b) * weight;
            v[0] += __uint_as_float((u32)a[j].a) * weight; v[1] += __uint_as_float((u32)a[j].b) * weight;
            v[2] += __uint_as_float((u32)b[j].a) * weight; v[3] += __uint_as_float((u32)b[j].b) * weight;
        }
    return make_uint2(pack(v[0] / total, v[1] / total), pack(v[2] / total, v[3] / total));
}

// Brings an op's input to shared memory, times the norm's weights where there is a norm.
template <int K, bool NORM, int FROM>
__device__ __forceinline__ void stage(const Params &p, const Shared &sh, const u64 *x, const u16 *norm, u32 tag) {
    constexpr int UNITS = K / 4, PER = (UNITS + NT - 1) / NT;         // a unit: four values, two words
    constexpr int ROWS = PER >= 8 ? 1 : cmax(1, 8 / PER) < TOKENS ? cmax(1, 8 / PER) : TOKENS;   // asked for together
    const int tid = threadIdx.x, B = p.num_seqs;
    uint2 gain[NORM ? PER : 1];
    if (NORM) {
#pragma unroll
        for (int u = 0; u < PER; ++u)
            if (UNITS % NT == 0 || (tid + u * NT) * 4 < K) gain[u] = *(const uint2 *)(norm + (tid + u * NT) * 4);
    }
    if (FROM == CELLS) look_out(x + min(tid & ~31, UNITS - 1) * 2, tag);
    if (FROM == ATTENTION) {
        int first, chunk, splits = splits_of(p.lens[0], first, chunk), at = min(tid & ~31, UNITS - 1) * 4;
        bool merged = splits > 1 && splits <= FEW;
        look_out(merged ? p.parts + (long long)(at / HD) * MAXS * (HD + 2) + at % HD : x + at / 2, tag);
    }
    for (int n0 = 0; n0 < B; n0 += ROWS) {
        Pair v[ROWS][PER];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int u = 0; u < PER; ++u) {
                int n = n0 + r, at = (tid + u * NT) * 4;
                if (FROM != EMBEDDING && n < B && (UNITS % NT == 0 || at < K)) v[r][u] = ld_pair(x + ((long long)n * K + at) / 2);
            }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            int n = n0 + r;
            if (n >= B) break;
            float squares = 0.f;
            int splits = 1;
            if (FROM == ATTENTION) { int first, chunk; splits = splits_of(p.lens[n], first, chunk); }
#pragma unroll
            for (int u = 0; u < PER; ++u) {
                int at = (tid + u * NT) * 4;
                if (UNITS % NT != 0 && at >= K) break;
                uint2 w;
                if (FROM == EMBEDDING) {
                    w = *(const uint2 *)(p.embedding + (long long)p.ids[n] * HID + at);
                } else if (FROM == ATTENTION && splits > 1 && splits <= FEW) {
                    w = merge(p, n, at, splits, tag);
                } else {
                    insist(v[r][u], x + ((long long)n * K + at) / 2, tag);
                    w = make_uint2((u32)v[r][u].a, (u32)v[r][u].b);
                }
                if (NORM) {
                    float a = lo(w.x), b = hi(w.x), c = lo(w.y), d = hi(w.y);
                    squares += a * a + b * b + c * c + d * d;
                    w = make_uint2(pack(a * lo(gain[u].x), b * hi(gain[u].x)), pack(c * lo(gain[u].y), d * hi(gain[u].y)));
                }
#if FP8
                w = make_uint2(pack(lo(w.x) * TOKEN_FACTOR, lo(w.y) * TOKEN_FACTOR), pack(hi(w.x) * TOKEN_FACTOR, hi(w.y) * TOKEN_FACTOR));
#endif
                asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(sh.x + n * X_STRIDE + at * 2), "r"(w.x), "r"(w.y) : "memory");
            }
            if (NORM) {
#pragma unroll
                for (int d = 16; d; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
                if ((tid & 31) == 0) sh.squares[(tid >> 5) * TOKENS + n] = squares;
            }
        }
    }
    consumers_meet();
}

__device__ __forceinline__ void multiply(float (&acc)[2][4], u32 at, int stride, u32 x, bool here) {
    const int lane = threadIdx.x & 31;
    u32 own = at + (lane >> 2) * stride + (lane & 3) * 16;
    uint4 a = lds(own), b = lds(own + 8 * stride);
    uint4 v[XR];
#pragma unroll
    for (int r = 0; r < XR; ++r) v[r] = here ? lds(x + r * 16) : make_uint4(0, 0, 0, 0);
#if FP8
    const u32 *pa = &a.x, *pb = &b.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 a0 = even(pa[i]), a2 = odd(pa[i]), b0 = even(pb[i]), b2 = odd(pb[i]);
        const u32 *px = &v[i / 2].x + (i % 2) * 2;
        mma(acc[i % 2], a0, b0, a2, b2, px[0], px[1]);
    }
#else
    mma(acc[0], a.x, b.x, a.y, b.y, v[0].x, v[0].y);
    mma(acc[1], a.z, b.z, a.w, b.w, v[0].z, v[0].w);
#endif
}

// out (+)= op(x): this block's tiles. `tag` is of the input, `out_tag` of what is written, and for ADD
// `old_tag` of what the sum is added to (0: the embedding).
template <int K, bool NORM, int KIND, int FROM>
__device__ __forceinline__ void consume(Ring &ring, Share &share, const Shared &sh, const Params &p, const u64 *x, u32 tag,
                                        const u16 *norm, int tiles, int N, const float *scale, const u16 *bias, u64 *out,
                                        u32 out_tag, u32 old_tag) {
    constexpr int CK = chunk_of(K), STRIDE = stride_of(CK), CHUNKS = K / CK, SLICES = CK / SW, J = (SLICES + NW - 1) / NW;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3, row = tid & 15;
    const int B = p.num_seqs;
    int tile = share.first();
    share.pass(tiles);
    if (tile >= tiles) return;
    stage<K, NORM, FROM>(p, sh, x, norm, tag);
    const bool here = g < B;
    const u32 own_x = sh.x + g * X_STRIDE + t * (SW / 4) * 2;
    int col = tid >> 4, buffer = 0, best_at = 0;
    float best = -__int_as_float(0x7f800000);
    for (; tile < tiles; tile += GRID) {
        const bool mine = col < B && (KIND != ACT || row < 8);
        const int n = tile * (KIND == ACT ? 8 : 16) + row;
        u64 old = 0;
#if FP8
        float factor_v = 0.f, factor_u = 0.f;   // asked for before the weights come
        if (mine) {
            factor_v = scale[n] * RESULT_FACTOR;
            if (KIND == ACT) factor_u = scale[INTER + n] * RESULT_FACTOR;
        }
#endif
        if (KIND == ADD && mine && old_tag) old = ld_cell(out + ((long long)col * N + n) / 2);
        float acc[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
        for (int c = 0; c < CHUNKS; ++c) {
            mbar_wait(ring.full + ring.stage * 8, ring.parity);
            u32 at = ring.data + ring.stage * STAGE;
#pragma unroll
            for (int j = 0; j < J; ++j) {
                int slice = warp + NW * j;
                if (SLICES % NW == 0 || slice < SLICES)
                    multiply(acc, at + slice * 64, STRIDE, own_x + (c * CK + slice * SW) * 2, here);
            }
            __syncwarp();
            if (lane == 0) mbar_arrive(ring.empty + ring.stage * 8);
            ring.next();
        }
        float *red = sh.red + buffer * RED + warp * (16 * TOKENS) + 2 * t * 16 + g;
        if (2 * t < B) { red[0] = acc[0][0] + acc[1][0]; red[8] = acc[0][2] + acc[1][2]; }
        if (2 * t + 1 < B) { red[16] = acc[0][1] + acc[1][1]; red[24] = acc[0][3] + acc[1][3]; }
        consumers_meet();
        float v = 0.f, u = 0.f;
        if (mine) {
            const float *part = sh.red + buffer * RED + col * 16 + row;
            float squares = 0.f;
#pragma unroll
            for (int w = 0; w < NW; ++w) {
                v += part[w * (16 * TOKENS)];
                if (KIND == ACT) u += part[w * (16 * TOKENS) + 8];
                if (NORM) squares += sh.squares[w * TOKENS + col];
            }
            if (NORM) { float factor = rsqrtf(squares / K + p.eps); v *= factor; u *= factor; }
#if FP8
            v *= factor_v;
            u *= factor_u;
#endif
            if (KIND != BEST && bias) v += widen(bias[n]);
            if (KIND == ADD) {
                if (old_tag == 0) v += widen(p.embedding[(long long)p.ids[col] * HID + n]);
                else {
                    u32 pair = (u32)(old >> 32) == old_tag ? (u32)old : insist(out + ((long long)col * N + n) / 2, old_tag);
                    v += row & 1 ? hi(pair) : lo(pair);
                }
            }
            if (KIND == ACT) {
                v = rounded(v);
                v = rounded(v / (1.f + exp2_(-1.4426950408889634f * v))) * rounded(u);
            }
            if (KIND == BEST) {
                if (p.logits) p.logits[(long long)col * N + n] = v;
                if (v > best) { best = v; best_at = n; }
            }
        }
        if (KIND != BEST) {
            // The next tile's results are the next warp's, while this one still adds.
            float other = __shfl_xor_sync(~0u, v, 1);
            if (mine && (row & 1) == 0) st_cell(out + ((long long)col * N + n) / 2, pack(v, other), out_tag);
            col = (col + NT / 16 - 2) % (NT / 16);
        }
        buffer ^= 1;
    }
    if (KIND == BEST) {
        // The sixteen rows of a token lie in one half of a warp; the lowest index wins ties.
#pragma unroll
        for (int d = 8; d; d >>= 1) {
            float v = __shfl_xor_sync(~0u, best, d);
            int at = __shfl_xor_sync(~0u, best_at, d);
            if (v > best || (v == best && at < best_at)) { best = v; best_at = at; }
        }
        if (row == 0 && col < B) {
            p.best[col * GRID + blockIdx.x] = best;
            p.best_at[col * GRID + blockIdx.x] = best_at;
        }
    }
    consumers_meet();   // before the next op writes what this one reads
}

struct Eight { Pair a, b; };
__device__ __forceinline__ Eight ask(const u64 *p) { return {ld_pair(p), ld_pair(p + 2)}; }
__device__ __forceinline__ uint4 get(Eight &v, const u64 *p, u32 tag) {
    insist(v.a, p, tag);
    insist(v.b, p + 2, tag);
    return make_uint4((u32)v.a.a, (u32)v.a.b, (u32)v.b.a, (u32)v.b.b);
}

// Eight dimensions of a head: normed where the model does, rotated, rounded.
__device__ __forceinline__ void rotate(float (&f)[8], uint4 raw, const u16 *norm, const float *angles, int dl, float eps) {
    spread(f, raw);
#if QKNORM
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) s += f[i] * f[i];
#pragma unroll
    for (int d = 1; d < DL; d <<= 1) s += __shfl_xor_sync(~0u, s, d);
    float r = rsqrtf(s / HD + eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = rounded(widen(norm[dl * 8 + i]) * rounded(f[i] * r));
#endif
    float sign = dl < DL / 2 ? -1.f : 1.f;
    int at = (dl % (DL / 2)) * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float other = __shfl_xor_sync(~0u, f[i], DL / 2);
        f[i] = rounded(f[i] * angles[at + i] + sign * other * angles[HALF + at + i]);
    }
}

// Attention of this block's (sequence, query heads, split) items; a split's tokens are shared by the warps.
__device__ __forceinline__ void attend(const Params &p, const Layer &layer, const Shared &sh, u32 tag) {
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, dl = lane % DL, sub = lane / DL;
    const float none = -__int_as_float(0x7f800000);
    Item it;
    for (int i_item = 0; item_at(it, p, sh, i_item); ++i_item) {
        u64 *out = p.attn + ((long long)it.b * QSIZE + it.h * (QG * HD)) / 2;
        const int start = it.first + it.split * it.chunk, end = min(start + it.chunk, it.length), newest = it.length - 1;
        const int kv = it.h * QG / GROUP;
        const bool kept = i_item == 0 && it.chunk <= CHUNK;
        const int *table = p.table + (long long)max(p.rows[it.b], 0) * TABLE_WIDTH;
        uint4 kr[U], vr[U];
        auto fetch = [&](int at) {
#pragma unroll
            for (int u = 0; u < U; ++u) {
                int token = at + u * TPI + sub;
                kr[u] = vr[u] = make_uint4(0, 0, 0, 0);
                if (token < end && token != newest) {
                    long long place = kept ? (long long)sh.slots[token - start] * (KVH * HD) + kv * HD : kv_place(table, token, kv);
                    kr[u] = ldcg4(layer.keys + place + dl * 8);
                    vr[u] = ldcg4(layer.values + place + dl * 8);
                }
            }
        };
        const int begin = start + warp * TPI * U;
        fetch(begin);
        // Queries, key and value of the new token: a vector for each group of lanes, then for all.
        const int vector = warp * TPI + sub;
        const bool is_q = vector < QG, is_k = vector == QG, is_v = vector == QG + 1;
        const int head = is_q ? it.h * QG + vector : is_k ? HEADS + kv : HEADS + KVH + kv;
        const u64 *cells = p.qkv + ((long long)it.b * QKVN + head * HD + dl * 8) / 2;
        if (warp * TPI < QG + 2) {
            Eight asked = ask(cells);
            uint4 raw = get(asked, cells, tag);
            float f[8], plain[8];
            rotate(f, raw, is_q ? layer.q_norm : layer.k_norm,
                   i_item == 0 ? sh.angles : p.rope + (long long)p.positions[it.b] * HD, dl, p.eps);
            spread(plain, raw);
            if (is_k || is_v) {
                uint4 packed = make_uint4(pack(f[0], f[1]), pack(f[2], f[3]), pack(f[4], f[5]), pack(f[6], f[7]));
                if (end == it.length && it.length > 0 && it.h * QG % GROUP == 0)
                    *(uint4 *)((is_k ? layer.keys : layer.values) + (long long)p.slots[it.b] * (KVH * HD) + kv * HD + dl * 8) =
                        is_k ? packed : raw;
            }
            if (vector < QG + 2)
#pragma unroll
                for (int i = 0; i < 8; ++i) sh.fresh[vector * HD + dl * 8 + i] = is_v ? plain[i] : is_q ? f[i] * p.scale : f[i];
        }
        consumers_meet();
        if (it.length == 0) {   // not live; it has waited all the same, see the head of this file
            for (int i = tid; i < QG * HALF; i += NT) st_cell(out + i, 0, tag);
            consumers_meet();
            continue;
        }
        float q[QG][8];
#pragma unroll
        for (int g = 0; g < QG; ++g)
#pragma unroll
            for (int i = 0; i < 8; ++i) q[g][i] = sh.fresh[g * HD + dl * 8 + i];
        float top[QG], sum[QG], acc[QG][8];
#pragma unroll
        for (int g = 0; g < QG; ++g) {
            top[g] = none; sum[g] = 0.f;
#pragma unroll
            for (int i = 0; i < 8; ++i) acc[g][i] = 0.f;
        }
        for (int at = begin; at < end; at += NW * TPI * U) {
            if (at != begin) fetch(at);
            float s[U][QG];
            if (newest >= at && newest < at + U * TPI) {
#pragma unroll
                for (int u = 0; u < U; ++u)
                    if (at + u * TPI + sub == newest) {
                        const float *k = sh.fresh + QG * HD + dl * 8, *v = k + HD;
                        kr[u] = make_uint4(pack(k[0], k[1]), pack(k[2], k[3]), pack(k[4], k[5]), pack(k[6], k[7]));
                        vr[u] = make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
                    }
            }
#pragma unroll
            for (int u = 0; u < U; ++u) {
                int token = at + u * TPI + sub;
                float k[8];
                spread(k, kr[u]);
#pragma unroll
                for (int g = 0; g < QG; ++g) {
                    float a = 0.f;
#pragma unroll
                    for (int i = 0; i < 8; ++i) a += q[g][i] * k[i];
#pragma unroll
                    for (int d = 1; d < DL; d <<= 1) a += __shfl_xor_sync(~0u, a, d);
                    s[u][g] = token < end ? a : none;
                }
            }
#pragma unroll
            for (int g = 0; g < QG; ++g) {
                float above = top[g];
#pragma unroll
                for (int u = 0; u < U; ++u) above = fmaxf(above, s[u][g]);
                float base = above == none ? 0.f : above, fade = exp2_(top[g] - base);
                sum[g] *= fade;
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[g][i] *= fade;
#pragma unroll
                for (int u = 0; u < U; ++u) {
                    s[u][g] = exp2_(s[u][g] - base);
                    sum[g] += s[u][g];
                }
                top[g] = above;
            }
#pragma unroll
            for (int u = 0; u < U; ++u) {
                float v[8];
                spread(v, vr[u]);
#pragma unroll
                for (int g = 0; g < QG; ++g)
#pragma unroll
                    for (int i = 0; i < 8; ++i) acc[g][i] += s[u][g] * v[i];
            }
        }
        // Lanes of a warp, then warps, always in the same order.
#pragma unroll
        for (int g = 0; g < QG; ++g) {
#pragma unroll
            for (int d = DL; d < 32; d <<= 1) {
                float other = __shfl_xor_sync(~0u, top[g], d), above = fmaxf(top[g], other), base = above == none ? 0.f : above;
                float ours = exp2_(top[g] - base), theirs = exp2_(other - base);
                sum[g] = sum[g] * ours + __shfl_xor_sync(~0u, sum[g], d) * theirs;
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[g][i] = acc[g][i] * ours + __shfl_xor_sync(~0u, acc[g][i], d) * theirs;
                top[g] = above;
            }
            if (sub == 0) {
                float *own = sh.red + (warp * QG + g) * (HD + 2);
#pragma unroll
                for (int i = 0; i < 8; ++i) own[dl * 8 + i] = acc[g][i];
                if (dl == 0) { own[HD] = top[g]; own[HD + 1] = sum[g]; }
            }
        }
        consumers_meet();
        for (int i = tid; i < QG * HD; i += NT) {
            int g = i / HD, d = i % HD;
            float above = none, total = 0.f, value = 0.f;
#pragma unroll
            for (int w = 0; w < NW; ++w) above = fmaxf(above, sh.red[(w * QG + g) * (HD + 2) + HD]);
#pragma unroll
            for (int w = 0; w < NW; ++w) {
                const float *own = sh.red + (w * QG + g) * (HD + 2);
                float weight = exp2_(own[HD] - above);
                total += own[HD + 1] * weight;
                value += own[d] * weight;
            }
            if (it.splits == 1) {
                value /= total;
                float other = __shfl_xor_sync(~0u, value, 1);
                if ((d & 1) == 0) st_cell(out + i / 2, pack(value, other), tag);
            } else {
                u64 *space = p.parts + (((long long)it.b * HEADS + it.h * QG + g) * MAXS + it.split) * (HD + 2);
                st_cell(space + d, __float_as_uint(value), tag);
                if (d == 0) { st_cell(space + HD, __float_as_uint(above), tag); st_cell(space + HD + 1, __float_as_uint(total), tag); }
            }
        }
        if (it.splits > FEW) {
            consumers_meet();
            if (tid == 0) {
                u32 *mine = p.semaphores + it.b * UNITS + it.h;
                u32 before;
                // Zero again by itself behind the last split.
                asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                             : "=r"(before) : "l"(mine), "r"((u32)it.splits - 1) : "memory");
                *sh.flag = before == (u32)it.splits - 1;
            }
            consumers_meet();
            if (*sh.flag) {
                for (int i = tid; i < QG * HD; i += NT) {
                    int g = i / HD, d = i % HD;
                    const u64 *space = p.parts + ((long long)it.b * HEADS + it.h * QG + g) * MAXS * (HD + 2);
                    float above = none, total = 0.f, value = 0.f;
                    for (int j = 0; j < it.splits; ++j) {
                        const u64 *own = space + j * (HD + 2);
                        float here = __uint_as_float(insist(own + HD, tag)), next = fmaxf(above, here);
                        float fade = exp2_(above - next), weight = exp2_(here - next);
                        total = total * fade + __uint_as_float(insist(own + HD + 1, tag)) * weight;
                        value = value * fade + __uint_as_float(insist(own + d, tag)) * weight;
                        above = next;
                    }
                    value /= total;
                    float other = __shfl_xor_sync(~0u, value, 1);
                    if ((d & 1) == 0) st_cell(out + i / 2, pack(value, other), tag);
                }
            }
        }
        consumers_meet();   // before the next item writes what this one reads
    }
}

// Old keys and values on their way to the L2 cache while the new ones are still being computed.
__device__ __forceinline__ void expect(const void *from, int bytes) {
    for (int i = threadIdx.x * 128; i < bytes; i += NT * 128) prefetch((const char *)from + i);
}

__device__ __forceinline__ void expect_context(const Params &p, const Layer &layer, const Shared &sh) {
    Item it;
    for (int i_item = 0; item_at(it, p, sh, i_item); ++i_item) {
        if (it.length == 0) continue;
        const int from = it.first + it.split * it.chunk, end = min(from + it.chunk, it.length - 1);
        const int start = from + NW * TPI * U;   // what stands before is asked for straight away
        if (start >= end) continue;
        const int *table = p.table + (long long)p.rows[it.b] * TABLE_WIDTH;
        const int kv = it.h * QG / GROUP;
                constexpr int LINES = HD * 2 / 128 ? HD * 2 / 128 : 1;
        for (int i = threadIdx.x; i < (end - start) * LINES; i += NT) {
            int at = i / LINES;
            long long place = kv_place(table, start + at, kv);
            place += i % LINES * 64;
            prefetch(layer.keys + place);
            prefetch(layer.values + place);
        }
    }
}

extern "C" __global__ void __launch_bounds__(NT + PW * 32, 1) decode(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char memory[];
    Ring ring;
    ring.data = shared_at(memory);
    unsigned char *rest = memory + STAGES * STAGE;
    Shared sh;
    sh.x = shared_at(rest);
    sh.red = (float *)(rest + TOKENS * X_STRIDE);
    sh.squares = sh.red + cmax(2 * RED, ATT);
    sh.angles = sh.squares + NW * TOKENS;
    sh.fresh = sh.angles + HD;
    sh.slots = (int *)(sh.fresh + (QG + 2) * HD);
    sh.items = (Item *)(sh.slots + CHUNK);
    sh.count = (int *)(sh.items + KEPT);
    sh.flag = (u32 *)(sh.count + 1);
    u64 *bars = (u64 *)(sh.flag + 3);
    ring.full = (shared_at(bars) + 7) & ~7u;
    ring.empty = ring.full + STAGES * 8;
    ring.stage = 0;
    ring.parity = 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbar_init(ring.full + i * 8, 1);
            mbar_init(ring.empty + i * 8, NW);
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
    remember(p, sh);
    // Two versions of x a layer, one of all else. Starts again before it wraps: zero means the embedding.
    u32 tag = *(volatile u32 *)p.steps % (0xffffffffu / (2 * NL)) * (2 * NL), last = 0;
    for (int l = 0; l < NL; ++l) {
        const Layer &w = p.layer[l];
        const u32 one = tag + 1, two = tag + 2;
        expect_context(p, w, sh);
        if (blockIdx.x == GRID - 1) {
            expect(w.mlp_norm, HID * 2);
            expect(l + 1 < NL ? p.layer[l + 1].input_norm : p.final_norm, HID * 2);
        }
        if (l == 0)
            consume<HID, true, STORE, EMBEDDING>(ring, share, sh, p, nullptr, 0, w.input_norm, QKVN / 16, QKVN, w.qkv_scale,
                                                 QKV_BIAS ? w.qkv_bias : nullptr, p.qkv, one, 0);
        else
            consume<HID, true, STORE, CELLS>(ring, share, sh, p, p.x, last, w.input_norm, QKVN / 16, QKVN, w.qkv_scale,
                                             QKV_BIAS ? w.qkv_bias : nullptr, p.qkv, one, 0);
        attend(p, w, sh, one);
        consume<QSIZE, false, ADD, ATTENTION>(ring, share, sh, p, p.attn, one, nullptr, HID / 16, HID, w.output_scale,
                                              O_BIAS ? w.output_bias : nullptr, p.x, one, last);
        consume<HID, true, ACT, CELLS>(ring, share, sh, p, p.x, one, w.mlp_norm, INTER / 8, INTER, w.gate_up_scale, nullptr,
                                       p.act, one, 0);
        consume<INTER, false, ADD, CELLS>(ring, share, sh, p, p.act, one, nullptr, HID / 16, HID, w.down_scale, nullptr, p.x, two,
                                          one);
        last = two;
        tag = two;
    }
    consume<HID, true, BEST, CELLS>(ring, share, sh, p, p.x, last, p.final_norm, VOCAB / 16, VOCAB, p.head_scale, nullptr, nullptr,
                                    0, 0);
    // It has read what each block made, so all have read `steps`.
    if (COUNTS && blockIdx.x == 0 && threadIdx.x == 0) *p.steps = *(volatile u32 *)p.steps + 1;
}

// Behind `decode`: counts the step if that is left to do, and finds each token's best among the blocks' (tokens may be null).
struct FinishParams {
    const float *best;
    const int *best_at;
    int *tokens;
    u32 *steps;
    int num_seqs;
};
extern "C" __global__ void __launch_bounds__(256) finish(const __grid_constant__ FinishParams p) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (!COUNTS && threadIdx.x == 0) *p.steps += 1;
    if (!p.tokens || warp >= p.num_seqs) return;
    float best = -__int_as_float(0x7f800000);
    int at = 0x7fffffff;
    for (int i = lane; i < GRID; i += 32) {
        float v = p.best[warp * GRID + i];
        int n = p.best_at[warp * GRID + i];
        if (v > best || (v == best && n < at)) { best = v; at = n; }
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        float v = __shfl_xor_sync(~0u, best, d);
        int n = __shfl_xor_sync(~0u, at, d);
        if (v > best || (v == best && n < at)) { best = v; at = n; }
    }
    if (lane == 0) p.tokens[warp] = at;
}
