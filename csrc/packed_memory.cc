#include "packed_memory.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <mutex>
#include <new>

#include "kernels/host_memory.h"

namespace loratrf {
namespace {

constexpr int64_t kHugePage = 2 << 20;

// What new blocks are taken from: alive as long as a block of it is.
struct Current {
  std::mutex mutex;
  std::weak_ptr<HostMemory> chunk;
};

Current& TheCurrent() {
  static Current* current = new Current;  // outlives every session, whatever the order of destruction
  return *current;
}

}  // namespace

std::shared_ptr<float> TakePackedMemory(size_t floats) {
  Current& current = TheCurrent();
  const std::lock_guard<std::mutex> lock(current.mutex);
  const auto count = static_cast<int64_t>(floats);
  const int64_t bytes = HostMemory::Size<float>(count);
  std::shared_ptr<HostMemory> chunk = current.chunk.lock();
  if (!chunk || chunk->left() < bytes) {
    chunk = std::make_shared<HostMemory>(bytes, kHugePage);
    if (!*chunk) throw std::bad_alloc();
#ifdef __linux__
    // A wish: without huge pages it is slower, no more.
    madvise(chunk->data(), static_cast<size_t>(chunk->size()), MADV_HUGEPAGE);
#endif
    current.chunk = chunk;
  }
  return {chunk, chunk->Take<float>(count)};
}

}  // namespace loratrf
