// What kernels begin with that run a whole model in one block on each multiprocessor: sizes, threads, shared memory, small instructions.
//
// Needs: WARPS, HEADS, KVH, HD. `stream.cuh` goes on from here, once the ops are known.

constexpr int divisor(int n, int most) {    // the largest divisor of n up to most
    for (int d = most; d > 1; --d) if (n % d == 0) return d;
    return 1;
}
constexpr int cmax(int a, int b) { return a > b ? a : b; }
constexpr int cmin(int a, int b) { return a < b ? a : b; }
constexpr int cdiv(int a, int b) { return (a + b - 1) / b; }
// Bytes from row to row in shared memory: an odd number of half lines, so that two rows share no bank.
constexpr int apart(int bytes) { return bytes / 64 % 2 ? bytes : bytes + 64; }

constexpr int NW = WARPS;                   // consumer warps
constexpr int NT = NW * 32;                 // consumer threads
constexpr int PW = 4;                       // producer warps: a bulk copy takes its warp about 35 cycles to issue
constexpr int GROUP = HEADS / KVH;          // query heads of a KV head
constexpr int HALF = HD / 2;
constexpr int DL = HD / 8;                  // lanes that share a head: 8 dimensions each

// --- Instructions. A test on the CPU has its own of these.
extern __shared__ __align__(128) unsigned char memory[];
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
__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ __forceinline__ u64 ld_cell(const u64 *p) {
    u64 v;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void st_cell(u64 *p, u32 value, u32 tag) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"((u64)tag << 32 | value) : "memory");
}
__device__ __forceinline__ void mbar_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void let_successor_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// --- End of instructions.

// Shared memory at places known when this is compiled.
#define SHARED(type, name, place) __device__ __forceinline__ type *name() { return (type *)(memory + place); }

__device__ __forceinline__ float widen(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ void spread(float (&f)[8], uint4 v) {
    f[0] = lo(v.x); f[1] = hi(v.x); f[2] = lo(v.y); f[3] = hi(v.y);
    f[4] = lo(v.z); f[5] = hi(v.z); f[6] = lo(v.w); f[7] = hi(v.w);
}
