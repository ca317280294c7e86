// What kernels of decode attention share: copies to a warp's ring, rotation of queries, a step's scores and values. Macros as in attention.cu.

constexpr int STEP = 16;                    // tokens of a tile
constexpr int WHOLE = TILES * STEP;         // tokens that a warp looks at together
constexpr int HEADS = GROUP * KVH;
constexpr int HALF = HD / 2, EACH = HALF / 32;   // dimensions of a half in a lane, for rotating
constexpr int INNER = HD / 16;              // products' inner steps of a head
constexpr int PIECE = WHOLE * HD;           // keys, or values, of a step
constexpr int LANES = HD / 8;               // that copy a token
constexpr int ROUNDS = STEP * HD / 256;     // copies of a tile
constexpr int ROW = KVH * HD;               // from token to token in a cache block
constexpr int O_STRIDE = HD + 4;
constexpr bool ALIGNED = BLOCK_SIZE % STEP == 0;           // 16 tokens lie side by side
static_assert(HD == 64 || HD == 128, "head dimensions that lanes share evenly");
static_assert(GROUP >= 1 && GROUP <= 8, "query heads are the eight columns of a tile");

__device__ __forceinline__ void copy16(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// The oldest piece is there; the oldest two; all.
__device__ __forceinline__ void one_arrived() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PIECES - 1) : "memory");
}
__device__ __forceinline__ void two_arrived() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PIECES - 2) : "memory");
}
__device__ __forceinline__ void all_arrived() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
__device__ __forceinline__ void matrices(u32 (&r)[4], const u16 *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((u32)__cvta_generic_to_shared(p)) : "memory");
}
__device__ __forceinline__ void transposed(u32 (&r)[4], const u16 *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((u32)__cvta_generic_to_shared(p)) : "memory");
}
// Of 16 bytes of a token in a piece; eight tokens share no bank.
__device__ __forceinline__ int spot(int token, int chunk) { return token * HD + ((chunk ^ (token & 7)) * 8); }

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

// Keys or values of the step to be loaded, to a place in the ring. `from`: this lane's part of the cache's first token.
template <class Walk> __device__ __forceinline__ void fetch(u16 *to, const u16 *from, const Walk &w) {
    constexpr int AT_ONCE = 32 / LANES;   // tokens
    const int lane = threadIdx.x & 31, r = lane / LANES, own = spot(r, lane % LANES);
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        if (w.at + j * STEP >= w.end) break;
        const int place = w.place(j);
        const u16 *tile = ALIGNED ? from + (u64)(u32)place * (STEP * ROW) : from;
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) {
            // Of token r + i * AT_ONCE: spot(), whose exclusive or is that of the token's bits.
            u16 *at = to + (own ^ (i * AT_ONCE & 7) * 8) + (j * STEP + i * AT_ONCE) * HD;
            copy16(at, ALIGNED ? tile + i * AT_ONCE * ROW
                               : from + (long long)(__shfl_sync(~0u, place, j * STEP + i * AT_ONCE + r) - r) * ROW);
        }
    }
}

// Query head g as the products want it: dimensions i * 16 + j * 8 + 2t and the next. Those of the other half, which it is
// rotated with, are this lane's too.
struct Query { u32 at[INNER][2]; };

// Norm and rotation, rounded where a model that keeps its activations in bfloat16 rounds.
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

// What this warp has seen: of heads 2t and 2t + 1. Largest scores are not yet scaled.
struct State { float best[2], total[2], acc[INNER][4]; };

// Scores of a step's tokens, from its keys.
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

// Softmax and values of a step.
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
        const float above = fmaxf(o.best[i], top[i]);   // finite: a step has a token that is seen
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
    one_arrived();   // the values, too
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

// All steps of a warp, APART tokens from one to the next. The next ones are asked for in the place of what was used. `keys_from`, `values_from`: this
// lane's part of the cache's first token; the new token's own come from shared memory. `asked` is called after each step. The state is no
// result: copied out of the loop it cost 3 % of a layer with heads of 128.
template <int APART, class Walk, class Asked>
__device__ __forceinline__ void look(State &o, u16 *ring, Walk &walk, const Query &q, const u16 *keys_from,
                                     const u16 *values_from, const u16 *new_key, const u16 *new_value, float scale,
                                     const Asked &asked) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 2; ++i) { o.best[i] = -infinity(); o.total[i] = 0.f; }
#pragma unroll
    for (int i = 0; i < INNER; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) o.acc[i][j] = 0.f;
    int turn = 0;   // slot of the step's keys
#pragma unroll 1
    for (int at = walk.start; at < walk.end; at += APART) {
        const int after = turn + 1 == PIECES ? 0 : turn + 1;
        u16 *keys = ring + turn * PIECE, *values = ring + after * PIECE;
        const bool ragged = at + WHOLE > walk.newest || at < walk.first;   // has the new token, or others to be left out
        one_arrived();
        if (ragged) {
            two_arrived();
            __syncwarp();
#pragma unroll 1
            for (int i = lane; i < WHOLE * LANES; i += 32) {
                const int token = at + i / LANES, d = i % LANES;
                uint4 *to = (uint4 *)(values + spot(i / LANES, d));
                if (token < walk.first || token > walk.newest) *to = make_uint4(0, 0, 0, 0);   // 0 times NaN is NaN
                if (token == walk.newest) {
                    *to = *(const uint4 *)(new_value + d * 8);
                    *(uint4 *)(keys + spot(i / LANES, d)) = *(const uint4 *)(new_key + d * 8);
                }
            }
        }
        __syncwarp();
        float c[TILES][4];
        scores(c, keys, q);
        __syncwarp();
        // With an odd number of pieces values follow where keys were.
        if (walk.at < walk.end) fetch(keys, PIECES % 2 ? values_from : keys_from, walk);
        commit();
        if (PIECES % 2) walk.next();
        weigh(o, c, values, ragged, at, walk.first, walk.newest, scale);
        __syncwarp();
        if (walk.at < walk.end) fetch(values, PIECES % 2 ? keys_from : values_from, walk);
        commit();
        if (PIECES % 2 == 0) walk.next();
        turn = after + 1 == PIECES ? 0 : after + 1;
        asked();
    }
    all_arrived();
    __syncwarp();
}

// This warp's part to shared memory: a lane has dimensions g, g + 8, ... of heads 2t and 2t + 1.
__device__ __forceinline__ void leave(State &o, float *part, float2 *stats, float scale) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int far = 4; far < 32; far *= 2)
#pragma unroll
        for (int i = 0; i < 2; ++i) o.total[i] += __shfl_xor_sync(~0u, o.total[i], far);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int head = 2 * t + i;
        if (head >= GROUP) continue;
        if (g == 0) stats[head] = make_float2(o.best[i] * scale, o.total[i]);
        float *to = part + head * O_STRIDE + g;
#pragma unroll
        for (int j = 0; j < INNER; ++j) { to[j * 16] = o.acc[j][i]; to[j * 16 + 8] = o.acc[j][i + 2]; }
    }
}
