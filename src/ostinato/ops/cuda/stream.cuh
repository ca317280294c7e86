// The stream of weights through a persistent kernel: a ring of chunks in shared memory, and the warps that fill it.
//
// Needs: W (a weight), the ops Qkv, Output, GateUp, Down and Head, Params, NT and PW (consumer threads, producer warps), GRID, NL,
// `memory`, STAGES of STAGE bytes at its begin, their barriers at FULL_AT and EMPTY_AT, FLIGHT, LEAD and PACE.

// --- Instructions. A test on the CPU has its own of these.
__device__ __forceinline__ u64 evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void bulk_copy(u32 to, const void *from, u32 bytes, u32 bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}
__device__ __forceinline__ void bulk_prefetch(const void *from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool mbar_test(u32 bar, u32 parity) {
    u32 yes;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(yes) : "r"(bar), "r"(parity) : "memory");
    return yes;
}
// An arrival does not wait for loads in front of it, and other loads may hold those up for long: this one needs what they loaded.
__device__ __forceinline__ void give_back(u32 bar, u32 loaded) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0x9e3779b9;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
        "@!p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(bar), "r"(loaded) : "memory");
}
// --- End of instructions.

struct Ring {
    int stage;
    u32 parity;
    __device__ __forceinline__ u32 data() const { return shared_at(memory) + stage * STAGE; }
    __device__ __forceinline__ u32 full() const { return shared_at(memory) + FULL_AT + stage * 8; }
    __device__ __forceinline__ u32 empty() const { return shared_at(memory) + EMPTY_AT + stage * 8; }
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) { stage = 0; parity ^= 1; }
    }
    __device__ __forceinline__ bool free() const { return mbar_test(empty(), parity ^ 1); }
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

__device__ __forceinline__ int tile_row() { return (((int)threadIdx.x - NT) >> 5) * (16 / PW) + (threadIdx.x & (16 / PW - 1)); }

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
    const u64 policy = evict_first();
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
            if (lane < 16 / PW) bulk_prefetch(ahead.at(), ahead.bytes);
            __syncwarp();
            ahead.next(p);
            ++lead;
        }
    }
}
