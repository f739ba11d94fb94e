#include "parallel.h"

#ifdef _WIN32
#include <process.h>
#else
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace loratrf {
namespace {

struct Job {
  void (*body)(void*, size_t);
  void* argument;
  size_t count;
  std::atomic<size_t> next{0};

  void Work() {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(argument, i);
  }
};

class Pool {
 public:
  void Run(int threads, size_t count, void (*body)(void*, size_t), void* argument) {
    Job job{body, argument, count};
    const size_t helpers = std::min(static_cast<size_t>(threads), count) - 1;
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (helpers == 0 || !turn.owns_lock()) return job.Work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Start(helpers);
      job_ = &job;
      places_ = std::min(helpers, started_);
    }
    wake_.notify_all();
    job.Work();
    std::unique_lock<std::mutex> lock(mutex_);
    places_ = 0;  // who has not come yet needn't
    idle_.wait(lock, [this] { return busy_ == 0; });
    job_ = nullptr;
  }

 private:
  void Start(size_t wanted) {
    try {
      for (; started_ < wanted; ++started_) std::thread(&Pool::Serve, this).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: fewer helpers do.
    }
  }

  void Serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return places_ > 0; });
      --places_;
      ++busy_;
      Job* job = job_;
      lock.unlock();
      job->Work();
      lock.lock();
      if (--busy_ == 0) idle_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  size_t started_ = 0, places_ = 0, busy_ = 0;
};

// Never destroyed, since its detached workers may outlive static destruction. A fork leaves the child none of the
// workers and perhaps a locked mutex, so the child gets a pool of its own.
Pool& ProcessPool() {
  static std::atomic<Pool*> pool{nullptr};
  static std::atomic<int> owner{0};
  static std::mutex creation;
  const int process = getpid();
  if (owner.load(std::memory_order_acquire) != process) {
    std::lock_guard<std::mutex> lock(creation);
    if (owner.load(std::memory_order_relaxed) != process) {
      pool.store(new Pool, std::memory_order_relaxed);
      owner.store(process, std::memory_order_release);
    }
  }
  return *pool.load(std::memory_order_relaxed);
}

}  // namespace

ParallelFor Threads(const int* threads) {
  return {[](void* self, size_t count, void (*body)(void*, size_t), void* argument) {
            const int wanted = std::max(1, *static_cast<const int*>(self));
            ProcessPool().Run(wanted, count, body, argument);
          },
          const_cast<int*>(threads)};
}

}  // namespace loratrf
