// How an op is cut into tasks, and the threads and the scratch memory these get.

#pragma once

#include <cstdlib>

#include "problem.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr Index COLUMNS_PER_TASK = 512;
constexpr Index TASKS_PER_THREAD = 4;               // wanted, so that no thread waits long for the others
constexpr Index LEAST_ROWS_PER_TASK = 7;            // whose windows overlap with those of other tasks
constexpr Index PIXELS_PER_TASK = 448;              // where the kernel is generated: the taps of one group stay in the second-level cache
[[maybe_unused]] constexpr Index SERIAL_WORK = 1 << 15;              // multiply-adds below which a second thread costs more than it gives

// Threads that an op is worth.
inline Index threads_for([[maybe_unused]] const Problem& p) {
#if defined(_OPENMP)
  const Index outputs = p.output[0] * p.output[1] * p.output[2];
  if (most(1, p.images) * p.batch * p.groups * p.channels * outputs * taps_of(p) > SERIAL_WORK) return omp_get_max_threads();
#endif
  return 1;
}

// How one op is cut: into batch x depths x blocks of rows x blocks of columns x blocks of groups. Images that share vectors are one.
struct Tasks {
  Index depths, rows, columns, groups;                      // extents
  Index row_blocks, column_blocks, group_blocks, count;     // how many
  Tasks(const Problem& p, const Index* size, Index threads) : depths(size[0]), rows(size[1]), columns(size[2]), groups(p.groups) {
    column_blocks = ceil_div(columns, COLUMNS_PER_TASK);
    const Index wanted_blocks = ceil_div(TASKS_PER_THREAD * threads, most(1, p.batch * depths * column_blocks));
    const Index rows_of_pixels = p.weight ? most(1, PIXELS_PER_TASK / ceil_div(columns, column_blocks)) : 1;
    row_blocks = least(rows, p.weight ? ceil_div(rows, rows_of_pixels) : most(1, least(wanted_blocks, rows / LEAST_ROWS_PER_TASK)));
    // Few tasks are dealt out by group, too; given taps less often, as they suffer when they are not read in order.
    const Index tasks = p.batch * depths * row_blocks * column_blocks, wanted = (p.weight ? 4 : 2) * threads;
    // The gradient of the features is a sum over groups, so these stay together there.
    group_blocks = tasks >= wanted || p.grad_weight ? 1 : least(groups, ceil_div(wanted, most(1, tasks)));
    count = tasks * group_blocks;
  }
};

inline Range part(Index size, Index blocks, Index block) { return {size * block / blocks, size * (block + 1) / blocks}; }

struct Task {
  Index batch, depth;
  Range rows, columns, groups;
  Task(const Tasks& all, Index index) {
    groups = part(all.groups, all.group_blocks, index % all.group_blocks), index /= all.group_blocks;
    columns = part(all.columns, all.column_blocks, index % all.column_blocks), index /= all.column_blocks;
    rows = part(all.rows, all.row_blocks, index % all.row_blocks), index /= all.row_blocks;
    depth = index % all.depths, batch = index / all.depths;
  }
};

// Scratch memory of one thread, carved into aligned pieces. The first pass, without memory, measures.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(Index count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ = count >= TOO_MUCH / 8 ? TOO_MUCH : used_ + ((count * Index(sizeof(T)) + 63) & ~Index(63));
    return piece;
  }
  Index used() const { return least(used_, TOO_MUCH); }

 private:
  char* base_;
  Index used_ = 0;
};

// Scratch of a calling thread, kept for its next call: fresh memory costs a page fault for every 4 KiB.
class Kept {
 public:
  ~Kept() { std::free(memory_); }
  char* at_least(Index bytes) {
    if (bytes > size_) {
      std::free(memory_);
      memory_ = static_cast<char*>(std::aligned_alloc(4096, std::size_t(bytes)));
      size_ = memory_ == nullptr ? 0 : bytes;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  Index size_ = 0;
};

enum class Use { TASKS, CALL };
template <Use>
Kept& kept() {
  static thread_local Kept kept;
  return kept;
}

// Calls body(pieces(arena)) on scratch of the calling thread that its tasks leave alone. Returns what body does, or 1 if there is none.
template <class Pieces, class Body>
int with_scratch(const Pieces& pieces, const Body& body) {
  Arena measure(nullptr);
  pieces(measure);
  char* memory = kept<Use::CALL>().at_least((measure.used() + 4095) & ~Index(4095));
  if (memory == nullptr) return 1;
  Arena arena(memory);
  return body(pieces(arena));
}

// How the tasks of an op are dealt out: in lots of consecutive ones, here each alone. `begin` and `finish` are for sums over tasks.
struct Alone {
  Index lots(Index tasks) const { return tasks; }
  void begin(Index) const {}
  void finish(Index) const {}
};

// An op on a problem: its tasks in lots, and the scratch that a thread needs for them.
class Plan {
 public:
  const Index threads;  // wanted
  Index lots = 0, scratch = 0;
  virtual void run(Index lot, char* memory) const = 0;
  virtual void finish() const = 0;

 protected:
  explicit Plan(Index wanted) : threads(wanted) {}
  ~Plan() = default;
};

template <class Op>
class PlanOf final : public Plan {
 public:
  PlanOf(const Problem& p, const Index* size) : Plan(threads_for(p)), tasks_(p, size, threads), op_(p, tasks_) {
    lots = op_.lots(tasks_.count);
    Arena measure(nullptr);
    op_.scratch(measure);
    scratch = (most(1, measure.used()) + 4095) & ~Index(4095);
  }
  void run(Index lot, char* memory) const override {
    Arena arena(memory);
    const auto pieces = op_.scratch(arena);
    const Range tasks = part(tasks_.count, lots, lot);
    op_.begin(lot);
    for (Index index = tasks.from; index < tasks.to; ++index) op_.run(Task(tasks_, index), pieces, lot);
  }
  void finish() const override { op_.finish(lots); }

 private:
  const Tasks tasks_;
  const Op op_;
};

// Runs one op, or two in turns, with the same share of both done at any time, on torch's threads. Returns 0, or 1 if there is no memory
// for the scratch.
inline int run_plans(const Plan& plan, const Plan* other = nullptr) {
  const Index turns = plan.lots + (other ? other->lots : 0);
  const Index threads = most(plan.threads, other ? other->threads : 1), bytes = most(plan.scratch, other ? other->scratch : 1);
  if (times(bytes, threads) >= TOO_MUCH) return 1;
  char* memory = kept<Use::TASKS>().at_least(bytes * threads);
  if (memory == nullptr) return 1;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(threads)) if (threads > 1)
#endif
  for (Index turn = 0; turn < turns; ++turn) {
    Index thread = 0;
#if defined(_OPENMP)
    thread = omp_get_thread_num();
#endif
    const Index begun = ceil_div(turn * plan.lots, turns);  // lots of the first op
    const bool first = ceil_div((turn + 1) * plan.lots, turns) > begun;
    (first ? plan : *other).run(first ? begun : turn - begun, memory + bytes * thread);
  }
  plan.finish();
  if (other) other->finish();
  return 0;
}

}  // namespace
