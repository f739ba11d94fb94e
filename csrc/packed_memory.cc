#include "packed_memory.h"

#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <mutex>
#include <new>

namespace loratrf {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kAlignment = 64;

size_t RoundUp(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// What new blocks are taken from: alive as long as a block of it is.
struct Current {
  std::mutex mutex;
  std::weak_ptr<char> chunk;
  size_t size = 0, used = 0;
};

Current& TheCurrent() {
  static Current* current = new Current;  // outlives every session, whatever the order of destruction
  return *current;
}

}  // namespace

std::shared_ptr<float> TakePackedMemory(size_t bytes) {
  Current& current = TheCurrent();
  const std::lock_guard<std::mutex> lock(current.mutex);
  bytes = RoundUp(bytes, kAlignment);
  std::shared_ptr<char> chunk = current.chunk.lock();
  if (!chunk || current.size - current.used < bytes) {
    const size_t size = RoundUp(bytes, kHugePage);
    char* memory = static_cast<char*>(aligned_alloc(kHugePage, size));
    if (!memory) throw std::bad_alloc();
#ifdef __linux__
    madvise(memory, size, MADV_HUGEPAGE);  // a wish: without huge pages it is slower, no more
#endif
    chunk.reset(memory, free);
    current.chunk = chunk;
    current.size = size, current.used = 0;
  }
  float* block = reinterpret_cast<float*>(chunk.get() + current.used);
  current.used += bytes;
  return {chunk, block};
}

}  // namespace loratrf
