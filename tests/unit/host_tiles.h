// What linear.cu, attend.cu and chain.cu need besides host_grid.h: copies of tiles (TMA), products of warp groups, and what blocks of a
// cluster send each other. All of it is done at a random time between the moment when it is asked for and the one when somebody
// must wait for it: bytes of a copy arrive before the barrier counts them, and a product reads its operands as late as its wait.
//
// Needs: HOST_CLUSTER, blocks of a cluster. The source stands in a namespace, where it may have names that host_grid.h has too.
#undef WARPS
#undef __align__
#define __align__(n) alignas(n)
#define gridDim (Dim{(u32)GRID})
#include "host_heads.h"

static int ended[GRID];   // threads that have
struct Task { virtual void go() = 0; };
template <typename Body> struct TaskOf : Task {
    Body body;
    TaskOf(const Body &body) : body(body) {}
    void go() override { body(); }
};
static std::vector<Task *> under_way;
static std::vector<int> before_the_wait;   // threads that wait for the kernel in front
template <typename Body> static void later(const Body &body) { under_way.push_back(new TaskOf<Body>(body)); }
static bool go_on() {
    if (!before_the_wait.empty() && (under_way.empty() || chosen() % 64 == 0) && (ready.empty() || chosen() % 16 == 0)) {
        show(&Written::after);
        for (int fiber : before_the_wait) wake(fiber);
        before_the_wait.clear();
        progress();
        return true;
    }
    if (under_way.empty()) return false;
    std::swap(under_way[chosen() * (u64)under_way.size() >> 24], under_way.back());
    Task *task = under_way.back();
    under_way.pop_back();
    task->go();
    delete task;
    progress();
    return true;
}
// Shared memory of any block.
static unsigned char *of_block(int block, u32 at, u32 bytes) {
    if (block < 0 || block >= GRID || at % bytes || at + bytes > SHARED) failed("no place in shared memory");
    if (ended[block] == HOST_THREADS) failed("the shared memory of a block that has ended");
    return memory + ((long long)block - blockIdx.x) * SHARED + at;
}
static void copied(int block, u32 bar, long long bytes) {
    if (ended[block] == HOST_THREADS) failed("a barrier of a block that has ended");
    Bar &b = bars[block].at(bar);
    b.bytes -= bytes;
    settle(b);
}
// `held`: this thread's part of A, in registers that are read as late as the product; what they held then is `part`.
struct Product { float *d; u64 a, b; bool more; int group; const u32 *held; u32 part[4]; };
struct Sum { float *d; int cols; float numbers[144]; };
struct Pipe { std::vector<Product> products; std::vector<Sum> sums; int groups; bool begun, late; };
static Pipe pipes[FIBERS];
// Eight numbers of a row of an operand, 128 bytes a row, swizzled.
static void eight(float *to, u64 operand, int row, int half) {
    if (operand >> 62 != 1 || (operand >> 49 & 7)) failed("an operand that is not swizzled as it should be");
    u32 at = (operand & 0x3fff) << 4;
    at += row / 8 * (u32)((operand >> 32 & 0x3fff) << 4) + row % 8 * 128 + half * 16;
    at ^= (at >> 7 & 7) << 4;
    const u16 *from = (const u16 *)shared(at, 16);
    for (int i = 0; i < 8; ++i) to[i] = from_bf16(from[i]);
}
static void execute(Sum &sum, const Product &p) {
    const int row = threadIdx.x / 32 % 4 * 16 + lane() / 4, t = lane() % 4;
    float a[2][16], b[16];
    if (p.held)
        for (int i = 0; i < 2; ++i) {
            const u32 own[2] = {p.part[i], p.part[2 + i]};
            post(2, own);
            for (int k = 0; k < 16; ++k) {
                const u32 pair = of(lane() / 4 * 4 + k % 8 / 2, k / 8);
                a[i][k] = from_bf16(k % 2 ? pair >> 16 : pair & 0xffff);
            }
        }
    else
        for (int i = 0; i < 4; ++i) eight(a[i / 2] + i % 2 * 8, p.a, row + i / 2 * 8, i % 2);
    for (int n = 0; n < sum.cols / 4; ++n) {
        for (int i = 0; i < 2; ++i) eight(b + i * 8, p.b, n / 2 * 8 + 2 * t + n % 2, i);
        for (int i = 0; i < 2; ++i) {
            float &to = sum.numbers[n / 2 * 4 + i * 2 + n % 2];
            double all = p.more ? to : 0.;
            for (int k = 0; k < 16; ++k) all += (double)a[i][k] * b[k];
            to = (float)all;
        }
    }
}
template <typename Body> static bool run_tiles(u32 seed, const Body &body) {
    for (int f = 0; f < FIBERS; ++f) {
        pipes[f] = Pipe{};
        groups[f] = 0;
    }
    std::fill(ended, ended + GRID, 0);
    machine = go_on;
    machine_rests = 1 << seed % 7;
    const bool well = run_grid(seed, [&] { body(); ++ended[blockIdx.x]; });
    if (!well) return false;
    bool left = !under_way.empty();
    for (int f = 0; f < FIBERS; ++f) left |= !copies[f].empty() || !pipes[f].products.empty();
    if (left) std::fprintf(stderr, "threads have ended before their copies or products\n");
    return !left;
}

static int __popc(u32 v) { return __builtin_popcount(v); }
static bool __any_sync(u32, bool v) { return __ballot_sync(~0u, v); }
static int __reduce_min_sync(u32, int v) { return (int)joined_by((u32)v, [](u32 a, u32 b) { return (u32)min((int)a, (int)b); }); }
static u32 __cvta_generic_to_shared(const void *p) { return ::shared_at(p); }
static unsigned char *__cvta_shared_to_generic(u32 at) { return memory + at; }

namespace kernel {
static long long clock64() { static long long now; return now += chosen() % 512; }
static void wait_for_predecessor() {
    if (waited) return;
    before_the_wait.push_back(current);
    suspend();
}
static void prepare(const void *) {}
static void barriers_are_there() {}
static u64 policy(bool) { return 0; }
static u64 keeping() { return 0; }
static Meeting cluster_meeting[GRID / HOST_CLUSTER], named_meeting[GRID][16];
static void meet() { cluster_meeting[blockIdx.x / HOST_CLUSTER].wait(HOST_CLUSTER * HOST_THREADS); }
static bool come(u32 bar, u32 parity) {
    yield();
    return bars[blockIdx.x].at(bar).phase != parity;
}

// Copies of a thread.
template <int LEFT> static void copies_left() { arrived(LEFT); }
static void copy_or_zero(u32 to, const u16 *from, u32 bytes) {
    alignas(16) static const u16 zeros[8] = {};
    if (bytes && bytes != 16) failed("a copy of other sizes");
    copy16(shared(to, 16), bytes ? from : zeros);
}
static void commit_copies() { commit(); }
static void copies_are_seen() {}

// A map: address, dimensions, sizes, strides in bytes of all but the first, box. Its rows, of 64 numbers or 128 bytes, are 128 bytes of
// shared memory.
template <class Map> static void copy_box(u32 to, const Map *map, const int (&from)[4], u32 bar, int block) {
    const u64 *w = map->words, *sizes = w + 2, *strides = w + 6, *box = w + 9;
    const int rank = (int)w[1];
    const long long size = 128 / (long long)box[0];
    if (to % 128 || (size != 1 && size != 2)) failed("a tile that is not of rows of 128 bytes");
    int rows = 1;
    for (int i = 1; i < rank; ++i) rows *= (int)box[i];
    later([=] {
        for (int r = 0; r < rows; ++r) {
            const char *row = (const char *)w[0];
            bool inside = true;
            for (int i = 1, rest = r; i < rank; rest /= (int)box[i++]) {
                const long long at = from[i] + rest % (int)box[i];
                inside &= at >= 0 && at < (long long)sizes[i];
                row += at * (long long)strides[i - 1];
            }
            for (int c = 0; c < 8; ++c) {
                u32 at = to + r * 128 + c * 16;
                at ^= (at >> 7 & 7) << 4;
                unsigned char *piece = of_block(block, at, 16);
                for (int i = 0; i < 16; ++i) {
                    const long long byte = from[0] * size + c * 16 + i;
                    piece[i] = inside && byte >= 0 && byte < (long long)sizes[0] * size ? row[byte] : 0;
                }
            }
        }
        later([=] { ::copied(block, bar, rows * 128); });
    });
}
static int of_cluster(int rank) {
    if (rank < 0 || rank >= HOST_CLUSTER) failed("no block of the cluster");
    return (int)blockIdx.x / HOST_CLUSTER * HOST_CLUSTER + rank;
}
template <class Map> static void copy2(u32 to, const Map *map, int a, int b, u32 bar, u64) {
    copy_box(to, map, {a, b, 0, 0}, bar, blockIdx.x);
}
template <class Map> static void copy2(u32 to, const Map *map, int a, int b, u32 bar, u64, u16 mask) {
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) copy_box(to, map, {a, b, 0, 0}, bar, of_cluster(i));
}
template <class Map> static void copy4(u32 to, const Map *map, int a, int d, u32 bar, u64) {
    copy_box(to, map, {a, 0, 0, d}, bar, blockIdx.x);
}

static u32 two_at(u32 at) { return *(const u16 *)shared(at, 2); }
static u32 widened(u32 two) {
    u32 r[2];
    unpack(two, r[0], r[1]);
    return pack(from_f16(r[0] & 0xffff), from_f16(r[0] >> 16));
}

// Products. Until they are waited for their results are NaN.
static void begin_products() { pipes[current].begun = true; pipes[current].late = chosen() % 2; }
static void commit_products() { ++pipes[current].groups; }
template <int COLS> static void multiply(float *d, u64 a, u64 b, u32 more, const u32 *held = nullptr) {
    Pipe &pipe = pipes[current];
    if (!pipe.begun) failed("a product without a fence in front");
    auto sum = std::find_if(pipe.sums.begin(), pipe.sums.end(), [&](const Sum &s) { return s.d == d; });
    if (sum == pipe.sums.end()) {
        pipe.sums.push_back({d, COLS, {}});
        sum = pipe.sums.end() - 1;
        std::copy(d, d + COLS / 2, sum->numbers);
        std::fill(d, d + COLS / 2, NAN);
    }
    Product product{d, a, b, more != 0, pipe.groups, held, {}};
    if (held) {
        // A warp's threads read each other's parts, so that all of them do it now or none.
        pipe.late = take((u32)pipe.late, 0);
        std::copy(held, held + 4, product.part);
    }
    if (pipe.products.empty() && !pipe.late) execute(*sum, product);
    else pipe.products.push_back(product);
}
template <int COLS> static void multiply_held(float *d, const u32 *a, u64 b, u32 more) { multiply<COLS>(d, 0, b, more, a); }
template <int COLS, int PENDING> static void await_products(float *) {
    Pipe &pipe = pipes[current];
    for (int n = pipe.late ? 1 << chosen() % 6 : 0; n; --n) yield();   // others go on meanwhile
    std::vector<Product> left;
    for (Product &p : pipe.products) {
        if (p.held) std::copy(p.held, p.held + 4, p.part);
        Sum &sum = *std::find_if(pipe.sums.begin(), pipe.sums.end(), [&](const Sum &s) { return s.d == p.d; });
        if (p.group < pipe.groups - PENDING) execute(sum, p);
        else left.push_back(p);
    }
    pipe.products = left;
    if (PENDING == 0 && left.empty()) {
        for (const Sum &sum : pipe.sums) std::copy(sum.numbers, sum.numbers + sum.cols / 2, sum.d);
        pipe.sums.clear();
        pipe.begun = false;
    }
    __syncwarp();
}

// Blocks of a cluster: a place in another one has its number on top.
static u32 there(u32 at, int rank) { return (u32)(of_cluster(rank) + 1) << 18 | at; }
static void send4(u32 to, u32 bar, float a, float b, float c, float d) {
    const float4 v{a, b, c, d};
    const int block = (int)(to >> 18) - 1, place = to & 0x3ffff;
    if (bar >> 18 != to >> 18) failed("numbers and their barrier are apart");
    later([=] {
        *(float4 *)of_block(block, place, 16) = v;
        later([=] { ::copied(block, bar & 0x3ffff, 16); });
    });
}
static void send2(u32 to, u32 bar, float a, float b) {
    const float2 v{a, b};
    const int block = (int)(to >> 18) - 1, place = to & 0x3ffff;
    if (bar >> 18 != to >> 18) failed("numbers and their barrier are apart");
    later([=] {
        *(float2 *)of_block(block, place, 8) = v;
        later([=] { ::copied(block, bar & 0x3ffff, 8); });
    });
}
template <int N> static void arrive_often_there(u32 bar) {
    const int block = (int)(bar >> 18) - 1;
    later([=] {
        if (ended[block] == HOST_THREADS) failed("a barrier of a block that has ended");
        Bar &b = bars[block].at(bar & 0x3ffff);
        b.pending -= N;
        settle(b);
    });
}
static void arrive_there(u32 bar) { arrive_often_there<1>(bar); }

// Cells of memory, whose words come one by one.
static uint4 ld_cell(const void *p) {
    aligned(p, 16);
    if (chosen() % 4 == 0) yield();
    return *(const uint4 *)p;
}
static void st_cell(void *p, u32 a, u32 b, u32 c, u32 d, u64) {
    aligned(p, 16);
    const u32 v[4] = {a, b, c, d}, first = chosen();
    volatile u32 *to = (volatile u32 *)p;
    const bool torn = chosen() % 16 == 0;
    for (int i = 0; i < 4; ++i) {
        const int at = (first + i) % 4;
        if (v[at] != ~0u && to[at] != ~0u) failed("a word is written twice");
        to[at] = v[at];
        if (torn && i == first / 4 % 3) yield();
    }
    progress();
}
#ifdef HD
static void row_meets(int item) { named_meeting[blockIdx.x][2 + item].wait(HOST_ROW_THREADS); }
#endif

// Words of memory that count on, 32 from one to the next.
#ifdef TEAM
static void arrive_often(u32 bar) {
    Bar &b = bars[blockIdx.x].at(bar);
    b.pending -= TEAM;
    settle(b);
}
static void announce(u32 *word) { ++*word; progress(); }
static void poll(const u32 *words, int word, u32 launch, u32 each) {
    while ((int)(*(volatile const u32 *)(words + word * 32) - launch * each) < 0) yield();
}
static u32 this_launch(const u32 *words) { return *words + 1; }
static void count_launch(u32 *words) { ++*words; }
static void others_wrote() {}
#endif
