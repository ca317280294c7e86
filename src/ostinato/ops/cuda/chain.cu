// What stands between two attentions, in one kernel: output projection, gate and up, down, and the next layer's queries,
// keys and values, for at most 128 rows of x.
//
// Tiles of weights and of x come by TMA into two rings, as in linear.cu. But one thread walks this block's tiles of all four products
// through one ring and never stops between them, as weights depend on nothing: while blocks wait for each other's results, memory goes on.
// And x is the large operand of warp-group products (m64), the rows of weights the small one, of which a tile may have any multiple of eight.
//
// Teams of TEAM blocks. Output, down and QKV share a tile's inner dimension in a team: each block finishes some of the tokens, the
// others send it their parts (st.async), and it adds them in order. Gate and up give each block a tile of its own, and x to all blocks of
// a team by multicast. A cluster is one team or TEAMS of them, whose blocks at the same place in their teams read the same x in
// output, down and QKV: each copies a part of every tile for all (multicast). As many clusters run as fit at once (30 of four, 15 of eight on an H200); rows
// of weights are shared out so that all teams have equally many.
//
// Between products there is no barrier but a word in memory for each part of the output that somebody reads: whoever has
// written arrives there, whoever needs it polls. Words count on from launch to launch, and how many launches there have been is a word
// too (`EPOCH`), which the first block advances at its end, when all have read it. All blocks must fit at once.
//
// Nothing is overwritten that anyone may still read:
//   y, squares   are written by output, read by gate and up, written again by down. A tile of down is finished with parts of all blocks of
//                a team, which together have seen that all blocks are through with gate and up.
//   act          is written once in a launch. x: each number is read and written by one thread alone.
//   parts        lie where tiles of x do. They are sent when all blocks of the team have multiplied; the next tiles of x are
//                copied when all blocks have said that they have read theirs, or in a second turn when those of the cluster have (`read`).
//   tiles of x   by multicast: whoever copies first in gate and up has seen that all blocks are through with output; in down,
//                where others than in gate and up share a tile, that those of the cluster are through with that (`read`).
// Nobody arrives at a block that has ended: it ends when all parts have come, they are sent after all other arrivals, and the last
// tiles of x, which no others follow, are not given back.
//
// Macros: HID QSIZE QKVN INTER, TOK (16, 32, 64, 128: rows of x at most), TEAM, TEAMS, CLUSTERS, STAGES (of weights), X_STAGES (of 64 inner
// indices of x), FLIGHT (stages of weights under way), HOLD (the same of down's, until its x has been asked for), PACE (cycles a stage, while
// the kernel in front runs), LEAD (stages left to ask for when the successor is launched), SPINS (looks at a word that never comes, before it
// is an error), BOUND (threads that registers must suffice for: more than there are leave room for blocks of the successor).

#include "common.cuh"
#include "ring.cuh"
#include "tiles.cuh"

enum { STORE, ADD, ACT };
constexpr int cmax(int a, int b) { return a > b ? a : b; }
constexpr int up(int a, int unit) { return (a + unit - 1) / unit * unit; }
constexpr int CLUSTER = TEAM * TEAMS, ALL_TEAMS = CLUSTERS * TEAMS, BLOCKS = CLUSTERS * CLUSTER;
constexpr int MOST_ROWS = 144;              // of weights in a tile
constexpr int WARPS = 8, CONSUMERS = WARPS * 32;
constexpr int THREADS = CONSUMERS + 128;    // a warp for weights, one for x, two for the norm's factors
constexpr int X_BYTES = TOK * 128;          // of 64 inner indices
constexpr int OWN = TOK / TEAM;             // tokens of a tile that a block finishes
constexpr int COPIERS = TOK / 8 < TEAM ? TOK / 8 : TEAM;    // blocks of a team that copy a part of x for all of it
constexpr int SLICE = TOK / COPIERS;        // of so many tokens
constexpr int SHARE = TOK / TEAMS;          // tokens of x that a block copies for those at its place in all teams of a cluster
static_assert(TOK % TEAM == 0 && SLICE % 8 == 0 && SHARE % 8 == 0 && BOUND >= THREADS, "how tokens are shared out");

// A product of N rows of weights, which are shared out in units to all teams or blocks, in one turn or more. A tile
// has R rows, of which the last ones may be the next tile's: they are copied, and not looked at.
template <int KIND_, int N_, int K_> struct Op {
    static constexpr int KIND = KIND_, N = N_, K = K_;
    static constexpr bool SPLIT = KIND != ACT;
    static constexpr int OWNERS = SPLIT ? ALL_TEAMS : BLOCKS, UNIT = SPLIT ? 8 : 16, UNITS = N / UNIT;
    static constexpr int turns(int n) { return (UNITS + OWNERS * n - 1) / (OWNERS * n) * UNIT <= MOST_ROWS ? n : turns(n + 1); }
    static constexpr int TURNS = turns(1), TILES = OWNERS * TURNS;
    static constexpr int R = (UNITS + TILES - 1) / TILES * UNIT;
    static constexpr int begin(int tile) { return (int)((long long)tile * UNITS / TILES) * UNIT; }
    static constexpr int INNER = SPLIT ? K / TEAM : K, CHUNKS = INNER / 128;     // of a block
    // Warp groups: up to 64 tokens each has about half of the rows, where the second one begins at SECOND; else half of the tokens.
    static constexpr int SECOND = TOK <= 64 ? R / 2 / 16 * 16 : 0, COLS = R - SECOND;
    static constexpr int APART = up(R, 16) / 16 % 2 ? up(R, 16) : up(R, 16) + 16;   // floats from token to token of a part
    static_assert(N % UNIT == 0 && K % 128 == 0 && INNER % 128 == 0, "whole tiles");
    static_assert(UNITS >= TILES, "everybody has a tile");
    static_assert(TOK > 64 || SECOND > 0, "rows for both groups");
    static_assert(KIND != ADD || TURNS == 1, "one tile a team: sums stay in registers");
};
using Output = Op<ADD, HID, QSIZE>;
using GateUp = Op<ACT, 2 * INTER, HID>;
using Down = Op<ADD, HID, INTER>;
using Qkv = Op<STORE, QKVN, HID>;
constexpr int W_BYTES = cmax(cmax(Output::R, GateUp::R), Qkv::R) * 128;     // of a stage
template <class O> constexpr int PIECES = O::R * 256 <= W_BYTES ? 2 : 1;   // of 64 inner indices in a stage
static_assert(GateUp::UNITS % TEAM == 0, "a part of the activations is whole tiles");
// Words: launches so far; and for each thing that is waited for, output, down and the parts of the activations.
constexpr int EPOCH = 0, OUT_WORD = 1, DOWN_WORD = 2, ACT_WORD = 3, LINE = 32;

struct Params {
    u16 *x, *y, *act, *qkv;             // [rows, HID] twice, [rows, INTER], [rows, QKVN]
    const u16 *out_bias, *qkv_bias;     // or null
    const u16 *mlp_norm, *next_norm;    // [HID]
    float *squares;                     // [ALL_TEAMS, rows]
    u32 *words;                         // [3 + TEAM][LINE]
    int rows, ops;                      // three without QKV
    float eps, unused[7];
    Map out_map, gate_map, down_map, qkv_map;   // weights
    Map attn_map, act_map, y_map, slice_map;    // x; the last one of y for multicast
};

__device__ __forceinline__ void arrive_often(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "n"(TEAM) : "memory");
}
template <int N> __device__ __forceinline__ void arrive_often_there(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0], %1;" ::"r"(bar), "n"(N) : "memory");
}
__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }
// For all consumers, who have written and met.
__device__ __forceinline__ void announce(u32 *word) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(word) : "memory");
}
// Until `each` arrivals of each launch up to this one have been counted.
__device__ __forceinline__ void poll(const u32 *words, int word, u32 launch, u32 each) {
    u32 v, spins = 0;
    for (;;) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(words + word * LINE) : "memory");
        if ((int)(v - launch * each) >= 0) return;
        if (++spins == SPINS) __trap();
    }
}
__device__ __forceinline__ u32 this_launch(const u32 *words) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(words + EPOCH * LINE) : "memory");
    return v + 1;
}
__device__ __forceinline__ void count_launch(u32 *words) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(words + EPOCH * LINE) : "memory");
}
__device__ __forceinline__ void others_wrote() { asm volatile("fence.proxy.async;" ::: "memory"); }

template <int N> struct Turn {
    int at = 0;
    u32 parity = 0;
    __device__ __forceinline__ void next() {
        if (++at == N) { at = 0; parity ^= 1; }
    }
};
// Where things are in shared memory.
struct Shared {
    u32 w_ring, x_ring, bars;       // parts lie where tiles of x do
    float *factors;
    __device__ __forceinline__ u32 w_full(int i) const { return bars + i * 8; }
    __device__ __forceinline__ u32 w_empty(int i) const { return bars + (STAGES + i) * 8; }
    __device__ __forceinline__ u32 x_full(int i) const { return bars + (2 * STAGES + i) * 8; }
    __device__ __forceinline__ u32 x_empty(int i) const { return bars + (2 * STAGES + X_STAGES + i) * 8; }
    __device__ __forceinline__ u32 go() const { return bars + (2 * STAGES + 2 * X_STAGES) * 8; }
    __device__ __forceinline__ u32 normed() const { return go() + 8; }
    __device__ __forceinline__ u32 sent() const { return go() + 16; }
    __device__ __forceinline__ u32 free() const { return go() + 24; }
    __device__ __forceinline__ u32 read() const { return go() + 32; }
    __device__ __forceinline__ u32 asked() const { return go() + 40; }
};
constexpr int BARS = 2 * STAGES + 2 * X_STAGES + 6;

__device__ __forceinline__ int cluster() { return blockIdx.x / CLUSTER; }
__device__ __forceinline__ int team() { return blockIdx.x / TEAM; }
__device__ __forceinline__ int rank() { return blockIdx.x % TEAM; }
// Of the cluster's blocks: one of this team, and the one at this place in another.
__device__ __forceinline__ int mate(int i) { return blockIdx.x % CLUSTER - rank() + i; }
__device__ __forceinline__ int counterpart(int i) { return i * TEAM + rank(); }
// Blocks begin at different inner indices: rows of weights lie a power of two apart, and the same
// index of all of them would meet in few channels of memory.
__device__ __forceinline__ int turned(int turn, int chunks) { return (cluster() + turn) % chunks; }

// --- The stream of weights: this block's share of the products, in the order of use.
struct Cursor {
    int op, turn, turns, n, at, slots, chunks, tile, owners, rows, per, begin, row;
    const Map *map;
    bool gate, done;

    template <class O> __device__ __forceinline__ void set(const Map *m) {
        map = m; gate = O::KIND == ACT; rows = O::R; per = PIECES<O>; chunks = O::CHUNKS; slots = O::CHUNKS * 2 / PIECES<O>;
        begin = O::SPLIT ? rank() * O::INNER : 0; turns = O::TURNS; owners = O::OWNERS;
        tile = O::SPLIT ? team() : blockIdx.x;
    }
    __device__ __forceinline__ void start() {
        n = 0; at = turned(turn, chunks) * (2 / per);
        switch (op) {
            case 0: row = Output::begin(tile); break;
            case 2: row = Down::begin(tile); break;
            case 3: row = Qkv::begin(tile); break;
            default: row = GateUp::begin(tile) / 16;
        }
    }
    __device__ __forceinline__ void open(const Params &p) {
        if (op == p.ops) { done = true; return; }
        turn = 0;
        switch (op) {
            case 0: set<Output>(&p.out_map); break;
            case 1: set<GateUp>(&p.gate_map); break;
            case 2: set<Down>(&p.down_map); break;
            default: set<Qkv>(&p.qkv_map);
        }
        start();
    }
    __device__ __forceinline__ void next(const Params &p) {
        if (++at == slots) at = 0;
        if (++n < slots) return;
        tile += owners;
        if (++turn < turns) start();
        else { ++op; open(p); }
    }
    __device__ __forceinline__ int bytes() const { return rows * 128 * per; }
    __device__ __forceinline__ int inner() const { return begin + at * per * 64; }
};

__device__ __forceinline__ void bring_weights(const Params &p, const Shared &s) {
    const u64 hint = policy(true);
    Cursor now;
    now.op = 0; now.done = false;
    now.open(p);
    // Stages to ask for.
    constexpr int FIRST = (Output::CHUNKS / PIECES<Output> + GateUp::TURNS * GateUp::CHUNKS / PIECES<GateUp> + Down::CHUNKS / PIECES<Down>) * 2;
    const int total = FIRST + (p.ops == 4 ? Qkv::TURNS * Qkv::CHUNKS * 2 / PIECES<Qkv> : 0);
    if (total <= LEAD) let_successor_start();
    bool gone = false, asked = false;
    int i = 0;
    Turn<STAGES> w;
    long long last = clock64() - PACE;
    while (!now.done) {
        if (!gone) gone = come(s.go(), 0);
        const bool paced = clock64() - last >= PACE;
        if (i < STAGES ? paced || gone : come(s.w_empty(w.at), w.parity ^ 1)) {
            if ((i >= STAGES || gone) && i >= FLIGHT) {
                if (HOLD < FLIGHT && now.op == 2 && !asked) asked = come(s.asked(), 0);
                const int before = w.at - (HOLD < FLIGHT && now.op == 2 && !asked ? HOLD : FLIGHT);
                mbar_wait(s.w_full(before < 0 ? before + STAGES : before), before < 0 ? w.parity ^ 1 : w.parity);
            }
            last = clock64();
            const u32 bar = s.w_full(w.at), to = s.w_ring + w.at * W_BYTES;
            mbar_expect(bar, now.bytes());
            for (int a = 0; a < now.per; ++a) {
                if (now.gate) copy4(to + a * now.rows * 128, now.map, now.inner() + a * 64, now.row, bar, hint);
                else copy2(to + a * now.rows * 128, now.map, now.inner() + a * 64, now.row, bar, hint);
            }
            if (i == total - LEAD) let_successor_start();
            now.next(p);
            ++i;
            w.next();
        }
    }
}

// --- x
constexpr u32 counterparts(int n) { return n ? counterparts(n - 1) << TEAM | 1 : 0; }
template <class O> __device__ __forceinline__ void bring_x(const Shared &s, const Map *map, int &i, Turn<X_STAGES> &x, u64 hint, u32 asked = 0) {
    const int first = O::SPLIT ? blockIdx.x % CLUSTER / TEAM * SHARE : rank() * SLICE;
    const u16 mask = O::SPLIT ? counterparts(TEAMS) << rank() : (1 << TEAM) - 1 << mate(0);
    for (int turn = 0; turn < O::TURNS; ++turn) {
        if (O::SPLIT && turn > 0) mbar_wait(s.read(), turn - (TEAMS == 1) & 1);     // parts lie where x does
        int at = turned(turn, O::CHUNKS);
        for (int n = 0; n < O::CHUNKS; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h, ++i) {
                if (i >= X_STAGES) mbar_wait(s.x_empty(x.at), x.parity ^ 1);
                const u32 bar = s.x_full(x.at), to = s.x_ring + x.at * X_BYTES;
                const int inner = (O::SPLIT ? rank() * O::INNER : 0) + at * 128 + h * 64;
                mbar_expect(bar, X_BYTES);
                if (O::SPLIT && TEAMS == 1) copy2(to, map, inner, 0, bar, hint);
                else if (O::SPLIT || rank() < COPIERS) copy2(to + first * 128, map, inner, first, bar, hint, mask);
                if (asked && turn == 0 && n == 1 && h == 0) mbar_arrive(asked);
                x.next();
            }
            if (++at == O::CHUNKS) at = 0;
        }
    }
}

// --- The norm's factors, by two warps.
__device__ __forceinline__ void norm(const Params &p, const Shared &s, int warp, int lane) {
    constexpr int LANES = TOK < 64 ? 64 / TOK : 1;      // that share a token
    constexpr int EACH = (ALL_TEAMS + LANES - 1) / LANES, BATCH = EACH <= 16 ? EACH : (EACH + 1) / 2;    // squares; asked for at once
    for (int c = warp * (32 / LANES) + lane % (32 / LANES); c < TOK; c += 64 / LANES) {
        float sum = 0.f;
        for (int i = lane / (32 / LANES) * EACH, k = 0; k < EACH; k += BATCH) {
            float v[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) v[b] = c < p.rows && k + b < EACH && i + k + b < ALL_TEAMS ? ldcg(p.squares + (i + k + b) * p.rows + c) : 0.f;
#pragma unroll
            for (int b = 0; b < BATCH; ++b) sum += v[b];
        }
#pragma unroll
        for (int d = 16; d >= 32 / LANES; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
        if (lane < 32 / LANES) s.factors[c] = rsqrtf(sum / HID + p.eps);
    }
    __syncwarp();
    if (lane == 0) mbar_arrive(s.normed());
}

// --- Consumers.
struct Consumer {
    Turn<STAGES> w;
    Turn<X_STAGES> x;
    int exchanges = 0;
};
// Sums of a tile: so many lanes have a token, each of them two columns at a time.
constexpr int lanes(int most) { return most >= 32 ? 32 : most >= 16 ? 16 : 8; }
constexpr int LANES = lanes(CONSUMERS / OWN), MOST = (Output::R + 2 * LANES - 1) / (2 * LANES);
constexpr bool KEPT = MOST <= 5;        // from output to down, in registers
static_assert(LANES * OWN <= CONSUMERS, "one token a thread");

template <class O> __device__ __forceinline__ void give_back_x(const Shared &s, int at, int lane) {
    // A tile of x is free when all that share it have read it.
    if (O::SPLIT && TEAMS == 1) { if (lane == 0) arrive_often(s.x_empty(at)); }
    else if (O::SPLIT) { if (lane < TEAMS) arrive_often_there<TEAM>(there(s.x_empty(at), counterpart(lane))); }
    else if (lane < TEAM) arrive_often_there<TEAMS>(there(s.x_empty(at), mate(lane)));
}
// `last`: no tile of x comes behind these.
template <class O> __device__ __forceinline__ void products(const Shared &s, Consumer &c, float *d, bool last, int warp, int lane) {
    const int group = warp >> 2;
    int w_old = -1, x_old = -1;     // stages that products under way still read
    for (int n = 0; n < O::CHUNKS; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (PIECES<O> == 1 || h == 0) mbar_wait(s.w_full(c.w.at), c.w.parity);
            mbar_wait(s.x_full(c.x.at), c.x.parity);
            const u64 a = operand(s.x_ring + c.x.at * X_BYTES + (TOK > 64 ? group * 8192 : 0));
            const u64 b = operand(s.w_ring + c.w.at * W_BYTES + (h % PIECES<O> * O::R + group * O::SECOND) * 128);
            begin_products();
#pragma unroll
            for (int k = 0; k < 4; ++k) multiply<O::COLS>(d, a + k * 2, b + k * 2, n || h || k);
            commit_products();
            await_products<O::COLS, 1>(d);
            if (w_old >= 0 && lane == 0) mbar_arrive(s.w_empty(w_old));
            if (x_old >= 0 && !(last && n * 2 + h - 1 + X_STAGES >= O::CHUNKS * 2)) give_back_x<O>(s, x_old, lane);
            w_old = -1;
            if (PIECES<O> == 1 || h == 1) {
                w_old = c.w.at;
                c.w.next();
            }
            x_old = c.x.at;
            c.x.next();
            __syncwarp();
        }
    }
    await_products<O::COLS, 0>(d);
    if (lane == 0) mbar_arrive(s.w_empty(w_old));
    if (!last) give_back_x<O>(s, x_old, lane);
    __syncwarp();
}

// Where numbers of rows n and n + 1 stand, and beside them, in a thread that multiplied, those of n + 8 and n + 9.
template <class O> __device__ __forceinline__ int place(int split, int token, int n) {
    return (split * OWN + token) * O::APART + n / 16 * 16 + n % 8 / 2 * 4 + n / 8 % 2 * 2;
}
// Every block sends parts to those who finish their tokens, and has soon those of its own.
template <class O> __device__ __forceinline__ void send_parts(const Shared &s, Consumer &c, const float *d, int warp, int lane) {
    const int group = warp >> 2, g = lane >> 2, t = lane & 3;
    const int token = TOK > 64 ? warp * 16 + g : (warp & 3) * 16 + g;
    if (threadIdx.x == 0) mbar_expect(s.sent(), TOK * O::R * 4);
    if (lane < TEAM) arrive_there(there(s.free(), mate(lane)));
    mbar_wait(s.free(), c.exchanges & 1);
    if (token - g < TOK) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int own = (token + i * 8) % OWN, to = (token + i * 8) / OWN;
            const u32 bar = there(s.sent(), mate(to)), at = there(s.x_ring + place<O>(rank(), own, 2 * t) * 4, mate(to));
            const int from = group * O::SECOND;
#pragma unroll
            for (int j = 0; j < O::COLS / 8; j += 2) {
                if (O::SECOND && group == 0 && j * 8 >= O::SECOND) continue;     // the other group has these too
                const u32 there_ = at + (from + j * 8) * 4;
                if (j + 1 < O::COLS / 8) send4(there_, bar, d[j * 4 + i * 2], d[j * 4 + i * 2 + 1], d[j * 4 + 4 + i * 2], d[j * 4 + 5 + i * 2]);
                else send2(there_, bar, d[j * 4 + i * 2], d[j * 4 + i * 2 + 1]);
            }
        }
    }
}
__device__ __forceinline__ void await_parts(const Shared &s, Consumer &c) {
    mbar_wait(s.sent(), c.exchanges & 1);
    ++c.exchanges;
}
template <class O> __device__ __forceinline__ float2 total(const Shared &s, int token, int row) {
    const float *from = (const float *)__cvta_shared_to_generic(s.x_ring);
    float a = 0.f, b = 0.f;
#pragma unroll
    for (int i = 0; i < TEAM; ++i) {
        const float2 v = *(const float2 *)(from + place<O>(i, token, row));
        a += v.x;
        b += v.y;
    }
    return make_float2(a, b);
}

// Tiles of x that others of the cluster copy may come.
__device__ __forceinline__ void let_copy(const Shared &s, int lane) {
    __syncwarp();
    if (lane < CLUSTER) arrive_there(there(s.read(), lane));
}

// This thread's numbers of x.
__device__ __forceinline__ void get_old(const Params &p, u32 (&old)[MOST], int lane) {
    const int begin = Output::begin(team()), rows = Output::begin(team() + 1) - begin;
    const int own = threadIdx.x / LANES, token = rank() * OWN + own;
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        const int row = (lane % LANES + i * LANES) * 2;
        old[i] = own < OWN && token < p.rows && row < rows ? *(const u32 *)(p.x + (long long)token * HID + begin + row) : 0;
    }
}
// x += W attn or W act, and what the next norm needs.
template <class O> __device__ __forceinline__ void add(const Params &p, const Shared &s, Consumer &c, u32 (&old)[MOST], const u16 *bias,
                                                       const u16 *gain, u32 *word, bool last, int warp, int lane) {
    float d[O::COLS / 2];
    products<O>(s, c, d, last, warp, lane);
    send_parts<O>(s, c, d, warp, lane);
    const int begin = O::begin(team()), rows = O::begin(team() + 1) - begin;
    const int own = threadIdx.x / LANES, token = rank() * OWN + own, at = token * HID + begin;
    if (!KEPT) get_old(p, old, lane);
    u32 gains[MOST], biases[MOST] = {};
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        const int row = (lane % LANES + i * LANES) * 2;
        gains[i] = row < rows ? *(const u32 *)(gain + begin + row) : 0;
        if (bias && row < rows) biases[i] = *(const u32 *)(bias + begin + row);
    }
    await_parts(s, c);
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        const int row = (lane % LANES + i * LANES) * 2;
        if (own >= OWN || token >= p.rows || row >= rows) continue;
        const float2 v = total<O>(s, own, row);
        const u32 both = pack(v.x + lo(biases[i]) + lo(old[i]), v.y + hi(biases[i]) + hi(old[i]));
        old[i] = both;
        *(u32 *)(p.x + at + row) = both;
        *(u32 *)(p.y + at + row) = pack(lo(both) * lo(gains[i]), hi(both) * hi(gains[i]));
        squares += lo(both) * lo(both) + hi(both) * hi(both);
    }
#pragma unroll
    for (int k = LANES / 2; k; k >>= 1) squares += __shfl_xor_sync(~0u, squares, k);
    if (lane % LANES == 0 && own < OWN && token < p.rows) p.squares[team() * p.rows + token] = squares;
    consumers_meet();
    if (threadIdx.x == 0) announce(word);
}

__device__ __forceinline__ void gate_up(const Params &p, const Shared &s, Consumer &c, int warp, int lane) {
    using O = GateUp;
    const int group = warp >> 2, g = lane >> 2, t = lane & 3;
    for (int tile = blockIdx.x; tile < O::TILES; tile += O::OWNERS) {
        const int begin = O::begin(tile), rows = O::begin(tile + 1) - begin;
        float d[O::COLS / 2];
        products<O>(s, c, d, false, warp, lane);
        if (TEAMS > 1 && tile + O::OWNERS >= O::TILES) let_copy(s, lane);
        if (tile < O::OWNERS) mbar_wait(s.normed(), 0);
        const int from = group * O::SECOND, until = O::SECOND && group == 0 ? O::SECOND : rows;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = (TOK > 64 ? warp : warp & 3) * 16 + g + i * 8;
            if (token >= p.rows) continue;
            const float factor = s.factors[token];
            u16 *to = p.act + (long long)token * INTER + (begin + from) / 2 + t * 2;
#pragma unroll
            for (int j = 0; j < O::COLS / 8; j += 2) {
                if (from + j * 8 >= until) continue;
                float r[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float gate = rounded(d[j * 4 + i * 2 + e] * factor), up = rounded(d[j * 4 + 4 + i * 2 + e] * factor);
                    r[e] = rounded(__fdividef(gate, 1.f + exp2_(-1.4426950408889634f * gate))) * up;
                }
                *(u32 *)(to + j * 4) = pack(r[0], r[1]);
            }
        }
        consumers_meet();
        if (threadIdx.x == 0) announce(p.words + (ACT_WORD + tile / (O::TILES / TEAM)) * LINE);
    }
}

__device__ __forceinline__ void queries(const Params &p, const Shared &s, Consumer &c, int warp, int lane) {
    using O = Qkv;
    constexpr int PAIRS = O::R / 2;
    for (int tile = team(); tile < O::TILES; tile += O::OWNERS) {
        const int begin = O::begin(tile), rows = O::begin(tile + 1) - begin;
        float d[O::COLS / 2];
        products<O>(s, c, d, tile + O::OWNERS >= O::TILES, warp, lane);
        send_parts<O>(s, c, d, warp, lane);
        if (tile < O::OWNERS) mbar_wait(s.normed(), 1);
        await_parts(s, c);
#pragma unroll
        for (int i = 0; i < (OWN * PAIRS + CONSUMERS - 1) / CONSUMERS; ++i) {
            const int at = threadIdx.x + i * CONSUMERS, own = at / PAIRS, row = at % PAIRS * 2, token = rank() * OWN + own;
            if (own >= OWN || row >= rows || token >= p.rows) continue;
            const float2 v = total<O>(s, own, row);
            const u32 bias = p.qkv_bias ? *(const u32 *)(p.qkv_bias + begin + row) : 0;
            const float factor = s.factors[token];
            *(u32 *)(p.qkv + (long long)token * QKVN + begin + row) = pack(v.x * factor + lo(bias), v.y * factor + hi(bias));
        }
        if (tile + O::OWNERS < O::TILES) let_copy(s, lane);
    }
}

extern "C" __global__ void __launch_bounds__(BOUND, 1) chain(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) u64 bars[BARS];
    __shared__ float factors[TOK];
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
    Shared s;
    s.w_ring = (shared_at(memory) + 1023) & ~1023u;
    s.x_ring = s.w_ring + STAGES * W_BYTES;
    s.bars = shared_at(bars);
    s.factors = factors;
    if (tid == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbar_init(s.w_full(i), 1);
            mbar_init(s.w_empty(i), WARPS);
        }
        for (int i = 0; i < X_STAGES; ++i) {
            mbar_init(s.x_full(i), 1);
            mbar_init(s.x_empty(i), CLUSTER * WARPS);
        }
        mbar_init(s.go(), 1);
        mbar_init(s.normed(), 2);
        mbar_init(s.sent(), 1);
        mbar_init(s.free(), TEAM * WARPS);
        mbar_init(s.read(), CLUSTER * WARPS);
        mbar_init(s.asked(), 1);
        barriers_are_there();
    }
    if (tid >= CONSUMERS && tid < CONSUMERS + 8) prepare(&p.out_map + (tid - CONSUMERS));
    __syncwarp();
    meet();

    if (warp == WARPS) {
        if (lane == 0) bring_weights(p, s);
        return;
    }
    if (warp == WARPS + 1) {
        if (lane) return;
        const u64 hint = policy(false);
        Turn<X_STAGES> x;
        int i = 0;
        wait_for_predecessor();
        mbar_arrive(s.go());
        bring_x<Output>(s, &p.attn_map, i, x, hint);
        const u32 launch = this_launch(p.words);
        poll(p.words, OUT_WORD, launch, BLOCKS);
        others_wrote();
        bring_x<GateUp>(s, &p.slice_map, i, x, hint);
        poll(p.words, ACT_WORD + rank(), launch, GateUp::TILES / TEAM);
        others_wrote();
        if (TEAMS > 1) mbar_wait(s.read(), 0);
        bring_x<Down>(s, &p.act_map, i, x, hint, s.asked());
        if (p.ops < 4) return;
        poll(p.words, DOWN_WORD, launch, BLOCKS);
        others_wrote();
        bring_x<Qkv>(s, &p.y_map, i, x, hint);
        return;
    }
    if (warp > WARPS) {
        wait_for_predecessor();
        const u32 launch = this_launch(p.words);
        if (lane == 0) poll(p.words, OUT_WORD, launch, BLOCKS);
        __syncwarp();
        norm(p, s, warp - WARPS - 2, lane);
        if (p.ops < 4) return;
        // The squares stand in the same place: they are down's when all of it is there.
        if (lane == 0) poll(p.words, DOWN_WORD, launch, BLOCKS);
        __syncwarp();
        norm(p, s, warp - WARPS - 2, lane);
        return;
    }

    wait_for_predecessor();
    u32 old[MOST] = {};
    if (KEPT) get_old(p, old, lane);
    Consumer c;
    add<Output>(p, s, c, old, p.out_bias, p.mlp_norm, p.words + OUT_WORD * LINE, false, warp, lane);
    gate_up(p, s, c, warp, lane);
    add<Down>(p, s, c, old, nullptr, p.next_norm, p.words + DOWN_WORD * LINE, p.ops == 3, warp, lane);
    if (p.ops == 4) queries(p, s, c, warp, lane);
    // All have read it before they were through with gate and up.
    if (blockIdx.x == 0 && tid == 0) count_launch(p.words);
}
