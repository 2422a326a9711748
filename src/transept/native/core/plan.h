// Plans: a flat list of records over weights, caches and activation buffers, run by one call per step.
#pragma once
#include "layout.h"
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace transept {

enum Op : int32_t { EMBED, ANGLES, LINEAR, NORM, ROTARY, APPEND, ATTEND, ELEMENT, ROUTE, EXPERTS, GATHER, POOL, UNFOLD, OPS };
enum Element : int32_t { COPY, ADD, MULTIPLY, GATE, SOFTCAP };

struct Weight {
    int32_t kind, n, k;
    const uint8_t *data;
};

struct View { // columns `at`, `at` + 1, ... of a buffer; buffer -1: none
    int32_t buffer, at;
};

struct Record { // the meaning of i and f is each op's own, see binding.py
    int32_t op, rows;
    View a, b, c, y;
    int32_t w[4];
    int32_t i[12];
    float f[4];
};

struct Rows { // one set of rows of a step: 0 tokens, 1 selected, 2 sequences, 3 another set (a strided stem's output)
    int32_t n;
    const int32_t *sequence, *position; // per row
    const int32_t *starts;              // per sequence + 1, rows of a sequence lie together; or null
};

struct Space { // which pages hold a sequence's keys: 0 its own, 1 its memory
    const int32_t *table;
    int32_t stride;
    const int32_t *length; // per sequence
};

struct Batch {
    Rows rows[4];
    const int32_t *ids, *segments; // per token
    const int32_t *select;         // per selected row: the token's row
    Space space[2];
    int32_t sequences;
};

struct Ahead { const uint8_t *from = nullptr, *to = nullptr; }; // what a thread reads next: fetched while it waits for the others

class Team { // the calling thread and n - 1 others, which spin a bounded time and then sleep
  public:
    explicit Team(int n);
    ~Team();
    using Work = void (*)(void *, int);
    bool run(Work work, void *arg); // false in a forked child, where the threads are gone
    void barrier(Ahead *ahead = nullptr);
    const int size;
    std::mutex busy;

  private:
    void loop(int id);
    std::vector<std::thread> threads;
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<uint32_t> round{0}, arrived{0}, turn{0}, done{0};
    std::atomic<bool> stop{false};
    Work work = nullptr;
    void *arg = nullptr;
    int process;
};

constexpr int ROWS = 128;   // most rows that share one pass over a panel
constexpr int COUNTERS = 5; // work counters of one record, one per phase

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// An odd number of cache lines, so that the rows that meet one block do not fall upon each other in the nearest cache.
inline int64_t qrow_bytes(int k) { int64_t p = round_up(k, KB); return round_up(3 * p + p / 2, 128) + 64; }
inline bool quantised(const Weight &w) { return w.kind != VECTOR && layout(w.kind).bits > 0; }

struct Zeroed { // memory that reads as zeros and takes no room before it is written; begins at a cache line
    explicit Zeroed(size_t bytes = 0) : size(bytes), base(std::calloc(bytes + 64, 1), std::free) {
        if (!base) throw std::bad_alloc();
    }
    template <class T = uint8_t> T *data() const { return reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(base.get()) + 63) & ~uintptr_t{63}); }
    size_t size;
    std::unique_ptr<void, void (*)(void *)> base;
};

struct Own { // one thread's scratch
    std::vector<float> sums, scores, tile, o, parts, normed;
    std::vector<const float *> x, residual;
    std::vector<float *> y;
    std::vector<QRow> q;
    std::vector<uint8_t> quants;
    Ahead ahead;
};

struct Run; // a step under way

class Plan {
  public:
    std::string build(); // checks every record against every size; "" or what is wrong
    std::string step(const Batch &batch, double *seconds);
    float *buffer(int i, int64_t *stride) const;

    std::vector<Record> records;
    std::vector<Weight> weights;
    std::vector<Cache> caches;
    std::vector<int32_t> widths;
    int32_t max_rows = 0;
    Team *team = nullptr;
    const Kernels *kernels = nullptr;

  private:
    friend struct Run;
    std::string check(const Record &r) const;
    std::string check_pages(const Batch &b, const Record &r) const;
    void allocate();
    void join();
    std::string check_batch(const Batch &b) const;
    std::vector<Zeroed> storage;
    Zeroed shared;                        // quantised rows, expert slots, attention parts
    std::vector<Own> own;
    std::vector<std::atomic<int>> next;    // COUNTERS per record
    std::vector<size_t> past, following;   // per record: the end of its run of records that look at one row alone; the next linear
    std::vector<bool> fused;               // norms that each thread works out for itself where rows are few
};

const Kernels *kernels_named(const char *name); // null or "": the best that this machine runs
int64_t raw_row_bytes(int kind, int k);
void pack(int kind, int n, int k, const uint8_t *raw, uint8_t *out, int64_t stride);
} // namespace transept
