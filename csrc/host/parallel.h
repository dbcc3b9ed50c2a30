// Threads for the input side: a small pool that outlives calls, because starting threads costs as much as drawing the
// boxes of a batch. Reused by box sampling and pixels.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace scrl_fast::host {

// One job at a time. Threads are started when first asked for, sleep between jobs and are never joined: the pool lives
// as long as the process. A worker that wakes after the job's last piece was taken finds nothing and sleeps on, so a
// late wake-up costs the caller nothing.
class Pool {
 public:
  using Piece = void (*)(void* body, int64_t begin, int64_t end);

  // The process's pool. After a fork (a loader's worker process) the parent's threads are gone: the child starts anew.
  static Pool& instance() {
    static std::atomic<Pool*> current{nullptr};
    static std::once_flag once;
    std::call_once(once, [] {
      current = new Pool;
#if defined(__unix__) || defined(__APPLE__)
      pthread_atfork(nullptr, nullptr, [] { current = new Pool; });
#endif
    });
    return *current;
  }

  // Calls piece(body, begin, end) over [0, count) in steps of `grain`, on `threads` threads at most, the caller's among
  // them. Returns when all is done and throws what the first failing piece threw. Where another thread is using the
  // pool, the caller does the work alone: loader threads that call at the same time already fill the machine.
  void run(int64_t count, int64_t grain, int threads, Piece piece, void* body) {
    grain = std::max<int64_t>(grain, 1);
    const int64_t pieces = (count + grain - 1) / grain;
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (pieces < 2 || threads < 2 || !turn.try_lock()) {
      if (count > 0) piece(body, 0, count);
      return;
    }
    const int helpers = static_cast<int>(std::min<int64_t>(pieces, threads)) - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (started_ < helpers) {
        std::thread([this] { work(); }).detach();
        ++started_;
      }
      piece_ = piece, body_ = body, count_ = count, grain_ = grain, error_ = nullptr;
      next_.store(0, std::memory_order_relaxed);
      open_ = helpers;
    }
    helpers == 1 ? wake_.notify_one() : wake_.notify_all();
    take_pieces();
    std::unique_lock<std::mutex> lock(mutex_);
    open_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return open_ > 0; });
      --open_, ++active_;
      lock.unlock();
      take_pieces();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  void take_pieces() {
    for (;;) {
      const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= count_) return;
      try {
        piece_(body_, begin, std::min(begin + grain_, count_));
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
        next_.store(count_, std::memory_order_relaxed);
      }
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int64_t> next_{0};
  Piece piece_ = nullptr;
  void* body_ = nullptr;
  int64_t count_ = 0, grain_ = 1;
  int started_ = 0, open_ = 0, active_ = 0;
  std::exception_ptr error_;
};

// body(begin, end) over [0, count) in pieces of `grain`; see Pool::run. Call it without the GIL.
template <class Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  Pool::instance().run(
      count, grain, threads,
      [](void* erased, int64_t begin, int64_t end) { (*static_cast<const Body*>(erased))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace scrl_fast::host
