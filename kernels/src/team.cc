#include "team.h"

#include <chrono>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "system.h"

namespace edgelm {

namespace {

constexpr size_t kLine = 64;
constexpr std::chrono::microseconds kAwake{1000};
// How many times a waiting thread looks before it reads the clock or lets others run.
constexpr int kLooks = 1024;
// Lines that a thread prefetches for the next operator, in all and between two looks.
constexpr int kLinesAhead = 2048, kLinesAtOnce = 4;

// Prefetches memory little by little while a thread waits.
class LookAhead {
 public:
  LookAhead() = default;
  explicit LookAhead(const char* begin) : next_(begin), left_(begin == nullptr ? 0 : kLinesAhead) {}

  void look() {
    if (left_ == 0) return relax();
    for (int i = 0; i < kLinesAtOnce; i++, next_ += kLine) __builtin_prefetch(next_, 0, 2);
    left_ -= kLinesAtOnce;
  }

 private:
  const char* next_ = nullptr;
  int left_ = 0;
};

struct Job {
  int count = 0;
  void (*work)(void*, int) = nullptr;
  void* data = nullptr;
  std::shared_ptr<Successor> successor;
};

class Team {
 public:
  void run(Job job, const Reads& reads);

 private:
  // A bit of door_, beside the number of threads inside: no more threads may come in.
  static constexpr int kClosed = 1 << 30;

  void start(int index);
  void wait_for_jobs(int index);
  LookAhead take_part(int index);

  int threads_ = 0;
  // Written while the door is closed and no thread is inside.
  Job job_;
  alignas(kLine) std::atomic<int> jobs_{0};
  alignas(kLine) std::atomic<int> door_{kClosed};
  alignas(kLine) std::atomic<uint64_t> taken_{0};
};

LookAhead Team::take_part(int index) {
  for (int i = 0; i < job_.count; i++) {
    const int own = (index + i) % job_.count;
    const uint64_t bit = uint64_t{1} << own;
    if ((taken_.load(std::memory_order_relaxed) & bit) == 0 && (taken_.fetch_or(bit) & bit) == 0)
      job_.work(job_.data, own);
  }
  return LookAhead(job_.successor == nullptr ? nullptr : job_.successor->begin(index));
}

void Team::wait_for_jobs(int index) {
  LookAhead ahead;
  for (int seen = 0;; seen = jobs_.load(std::memory_order_acquire)) {
    const auto asleep = std::chrono::steady_clock::now() + kAwake;
    for (int look = 1; jobs_.load(std::memory_order_acquire) == seen; look++) {
      ahead.look();
      if (look % kLooks == 0 && std::chrono::steady_clock::now() > asleep) sleep_while(jobs_, seen);
    }
    if ((door_.fetch_add(1) & kClosed) == 0 && index < job_.count) ahead = take_part(index);
    door_.fetch_sub(1);
  }
}

void Team::start(int index) {
  try {
    std::thread([this, index] { wait_for_jobs(index); }).detach();
  } catch (const std::system_error& error) {
    throw std::runtime_error(std::string("no more threads can be started here (") + error.what() +
                             "): allow this user more, or load with fewer threads");
  }
}

void Team::run(Job job, const Reads& reads) {
  for (; threads_ < job.count - 1; threads_++) start(threads_ + 1);
  if (job_.successor != nullptr) job_.successor->learn(reads);
  job_ = std::move(job);
  taken_.store(0);
  door_.fetch_and(~kClosed);
  jobs_.fetch_add(1);
  wake_all(jobs_);
  LookAhead ahead = take_part(0);
  door_.fetch_or(kClosed);
  for (int look = 1; door_.load(std::memory_order_acquire) != kClosed; look++) {
    ahead.look();
    if (look % kLooks == 0) std::this_thread::yield();
  }
}

// A team that no other call uses, until this is destroyed.
class Borrowed {
 public:
  Borrowed() {
    const std::lock_guard guard(idle().lock);
    if (idle().teams.empty()) {
      idle().teams.reserve(idle().made + 1);
      team_ = new Team;
      idle().made++;
    } else {
      team_ = idle().teams.back();
      idle().teams.pop_back();
    }
  }
  ~Borrowed() {
    const std::lock_guard guard(idle().lock);
    idle().teams.push_back(team_);
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;

  Team* operator->() const { return team_; }

 private:
  struct Idle {
    std::mutex lock;
    std::vector<Team*> teams;
    size_t made = 0;  // `teams` has room for all of them: giving one back allocates nothing
  };
  // Never destroyed: threads wait in teams until the process ends.
  static Idle& idle() {
    static Idle* const teams = new Idle;
    return *teams;
  }

  Team* team_;
};

}  // namespace

void together(int count, void (*work)(void*, int), void* data, const Reads& reads,
              const std::shared_ptr<Successor>& successor) {
  const Borrowed team;
  team->run({count, work, data, successor}, reads);
}

Runs::Runs(int count, int workers) : workers_(workers) {
  for (int i = 0; i < workers; i++) {
    runs_[i].next.store(static_cast<int>(int64_t{count} * i / workers), std::memory_order_relaxed);
    runs_[i].end = static_cast<int>(int64_t{count} * (i + 1) / workers);
  }
}

int Runs::take(int worker) {
  for (int i = 0; i < workers_; i++) {
    Run& run = runs_[(worker + i) % workers_];
    if (run.next.load(std::memory_order_relaxed) >= run.end) continue;
    const int task = run.next.fetch_add(1, std::memory_order_relaxed);
    if (task < run.end) return task;
  }
  return -1;
}

}  // namespace edgelm
