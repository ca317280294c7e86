// What kernels of Hopper's warp-group products share: tiles copied by TMA, the products, and what blocks of a cluster tell each other.

// --- Launches, and copies of a thread
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_successor_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// All but so many groups of copies that this thread has asked for are there.
template <int LEFT> __device__ __forceinline__ void copies_left() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// --- Copies of tiles
struct __align__(64) Map { u64 words[16]; };
__device__ __forceinline__ void prepare(const Map *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
__device__ __forceinline__ u64 policy(bool first) {
    u64 p;
    if (first) asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
    else asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(p));
    return p;
}
__device__ __forceinline__ void copy2(u32 to, const Map *map, int a, int b, u32 bar, u64 hint) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;"
        ::"r"(to), "l"(map), "r"(bar), "r"(a), "r"(b), "l"(hint) : "memory");
}
// To the same place in all blocks of `mask`, whose barriers count it too.
__device__ __forceinline__ void copy2(u32 to, const Map *map, int a, int b, u32 bar, u64 hint, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %6, %5;"
        ::"r"(to), "l"(map), "r"(bar), "r"(a), "r"(b), "l"(hint), "h"(mask) : "memory");
}
__device__ __forceinline__ void copy4(u32 to, const Map *map, int a, int d, u32 bar, u64 hint) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %4, %5}], [%2], %6;"
        ::"r"(to), "l"(map), "r"(bar), "r"(a), "r"(0), "r"(d), "l"(hint) : "memory");
}
// --- Products of a warp group
// Shared-memory operand: rows of 128 bytes, swizzled, eight rows a kilobyte.
__device__ __forceinline__ u64 operand(u32 at) {
    return (u64)(at >> 4 & 0x3fff) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}
// d (+)= A B^T over 16 inner indices, 64 rows by COLS; `more`: added to what d holds.
#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define P1 F4(0)
#define P2 P1, F4(4)
#define P3 P2, F4(8)
#define P4 P3, F4(12)
#define P5 P4, F4(16)
#define P6 P5, F4(20)
#define P7 P6, F4(24)
#define P8 P7, F4(28)
#define P9 P8, F4(32)
#define P10 P9, F4(36)
#define P11 P10, F4(40)
#define P12 P11, F4(44)
#define P13 P12, F4(48)
#define P14 P13, F4(52)
#define P15 P14, F4(56)
#define P16 P15, F4(60)
#define P17 P16, F4(64)
#define P18 P17, F4(68)
#define N1 "%0,%1,%2,%3"
#define N2 N1 ",%4,%5,%6,%7"
#define N3 N2 ",%8,%9,%10,%11"
#define N4 N3 ",%12,%13,%14,%15"
#define N5 N4 ",%16,%17,%18,%19"
#define N6 N5 ",%20,%21,%22,%23"
#define N7 N6 ",%24,%25,%26,%27"
#define N8 N7 ",%28,%29,%30,%31"
#define N9 N8 ",%32,%33,%34,%35"
#define N10 N9 ",%36,%37,%38,%39"
#define N11 N10 ",%40,%41,%42,%43"
#define N12 N11 ",%44,%45,%46,%47"
#define N13 N12 ",%48,%49,%50,%51"
#define N14 N13 ",%52,%53,%54,%55"
#define N15 N14 ",%56,%57,%58,%59"
#define N16 N15 ",%60,%61,%62,%63"
#define N17 N16 ",%64,%65,%66,%67"
#define N18 N17 ",%68,%69,%70,%71"
#define PRODUCT(cols, numbers, registers, a_, b_, more_) \
    if constexpr (COLS == cols) \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " more_ ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #cols "k16.f32.bf16.bf16 {" numbers "}, " a_ ", " b_ ", p, 1, 1, 0, 0;\n}" \
                     : registers : "l"(a), "l"(b), "r"(more));
template <int COLS> __device__ __forceinline__ void multiply(float *d, u64 a, u64 b, u32 more) {
    PRODUCT(8, N1, P1, "%4", "%5", "%6")
    PRODUCT(16, N2, P2, "%8", "%9", "%10")
    PRODUCT(24, N3, P3, "%12", "%13", "%14")
    PRODUCT(32, N4, P4, "%16", "%17", "%18")
    PRODUCT(40, N5, P5, "%20", "%21", "%22")
    PRODUCT(48, N6, P6, "%24", "%25", "%26")
    PRODUCT(56, N7, P7, "%28", "%29", "%30")
    PRODUCT(64, N8, P8, "%32", "%33", "%34")
    PRODUCT(72, N9, P9, "%36", "%37", "%38")
    PRODUCT(80, N10, P10, "%40", "%41", "%42")
    PRODUCT(88, N11, P11, "%44", "%45", "%46")
    PRODUCT(96, N12, P12, "%48", "%49", "%50")
    PRODUCT(104, N13, P13, "%52", "%53", "%54")
    PRODUCT(112, N14, P14, "%56", "%57", "%58")
    PRODUCT(120, N15, P15, "%60", "%61", "%62")
    PRODUCT(128, N16, P16, "%64", "%65", "%66")
    PRODUCT(136, N17, P17, "%68", "%69", "%70")
    PRODUCT(144, N18, P18, "%72", "%73", "%74")
}
// The same with a warp's 16 rows of A in registers, as fragments of four; nobody may write them before the product is waited for.
#define HELD_PRODUCT(cols, numbers, registers, a0_, a1_, a2_, a3_, b_, more_) \
    if constexpr (COLS == cols) \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " more_ ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #cols "k16.f32.bf16.bf16 {" numbers "}, {" a0_ "," a1_ "," a2_ "," a3_ "}, " b_ ", p, 1, 1, 0;\n}" \
                     : registers : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
template <int COLS> __device__ __forceinline__ void multiply_held(float *d, const u32 *a, u64 b, u32 more) {
    HELD_PRODUCT(8, N1, P1, "%4", "%5", "%6", "%7", "%8", "%9")
    HELD_PRODUCT(16, N2, P2, "%8", "%9", "%10", "%11", "%12", "%13")
    HELD_PRODUCT(32, N4, P4, "%16", "%17", "%18", "%19", "%20", "%21")
    HELD_PRODUCT(64, N8, P8, "%32", "%33", "%34", "%35", "%36", "%37")
    HELD_PRODUCT(128, N16, P16, "%64", "%65", "%66", "%67", "%68", "%69")
}
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int COLS, int PENDING> __device__ __forceinline__ void await_products(float *d) {
#pragma unroll
    for (int i = 0; i < (PENDING ? 0 : COLS / 2); ++i) asm volatile("" : "+f"(d[i])::"memory");
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int i = 0; i < (PENDING ? 0 : COLS / 2); ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// --- Blocks of a cluster
__device__ __forceinline__ void barriers_are_there() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ u32 there(u32 at, int block) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at), "r"(block));
    return r;
}
// Sends numbers to another block of the cluster, which waits for their bytes.
__device__ __forceinline__ void send4(u32 to, u32 bar, float a, float b, float c, float d) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(to), "r"(__float_as_uint(a)), "r"(__float_as_uint(b)), "r"(__float_as_uint(c)), "r"(__float_as_uint(d)), "r"(bar) : "memory");
}
__device__ __forceinline__ void send2(u32 to, u32 bar, float a, float b) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];"
                 ::"r"(to), "r"(__float_as_uint(a)), "r"(__float_as_uint(b)), "r"(bar) : "memory");
}
__device__ __forceinline__ void arrive_there(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void meet() {
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ bool come(u32 bar, u32 parity) {
    u32 yes;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(yes) : "r"(bar), "r"(parity) : "memory");
    return yes;
}
