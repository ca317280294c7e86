// What `heads.cuh` has in assembler: copies to a warp's ring, and matrices of shared memory.
static float2 ldcg2(const float *p) { return *(const float2 *)p; }
static u32 count_up(u32 *p, u32 most) {
    u32 before = *p;
    *p = before >= most ? 0 : before + 1;
    return before;
}
// Copies that have been asked for, by thread, and how many groups there are: made when they are waited for, no sooner; with
// host_tiles.h some of them at once.
struct Copy { void *to; const void *from; int group; };
static std::vector<Copy> copies[FIBERS];
static int groups[FIBERS];
static void copy16(void *to, const void *from) {
    aligned(to, 16);
    aligned(from, 16);
    if (machine && chosen() % 4 == 0) std::memcpy(to, from, 16);
    else copies[current].push_back({to, from, groups[current]});
}
static void commit() { ++groups[current]; }
static void arrived(int pending) {
    std::vector<Copy> left;
    for (const Copy &c : copies[current])
        if (c.group < groups[current] - pending) std::memcpy(c.to, c.from, 16);
        else left.push_back(c);
    copies[current] = left;
}
#ifdef PIECES
static void one_arrived() { arrived(PIECES - 1); }
static void two_arrived() { arrived(PIECES - 2); }
#endif
static void all_arrived() { arrived(0); }
// Four matrices of 8 x 8, a row from each lane's address: of a lane, two neighbours of row g; `over`: of column g.
static void matrices(u32 (&r)[4], const u16 *p, bool over) {
    aligned(p, 16);
    const u32 address[2] = {(u32)(size_t)p, (u32)((size_t)p >> 32)};
    post(2, address);
    const int g = lane() / 4, t = lane() % 4;
    u32 own[4];
    for (int m = 0; m < 4; ++m) {
        auto at = [&](int row) { return (const u16 *)((size_t)of(m * 8 + row, 0) | (size_t)of(m * 8 + row, 1) << 32); };
        own[m] = over ? at(2 * t)[g] | (u32)at(2 * t + 1)[g] << 16 : at(g)[2 * t] | (u32)at(g)[2 * t + 1] << 16;
    }
    std::memcpy(r, own, 16);
}
static void matrices(u32 (&r)[4], const u16 *p) { matrices(r, p, false); }
static void transposed(u32 (&r)[4], const u16 *p) { matrices(r, p, true); }
