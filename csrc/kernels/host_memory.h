// Host memory: one block, handed out in 64-byte aligned pieces and given back as a whole.
//
// In an unnamed namespace, so that each instruction set has its own copy (see lanes.h).
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

namespace loratrf {
namespace {

class HostMemory {
 public:
  // Room for pieces whose Sizes sum up to `bytes`; false as a bool where there is none to be had. No bytes are null.
  explicit HostMemory(int64_t bytes, int64_t alignment = kPiece) : size_(RoundUp(bytes, alignment)) {
    const auto boundary = static_cast<size_t>(alignment), bytes_taken = static_cast<size_t>(size_);
#ifdef _WIN32
    if (size_) memory_ = static_cast<char*>(_aligned_malloc(bytes_taken, boundary));
#else
    if (size_) memory_ = static_cast<char*>(aligned_alloc(boundary, bytes_taken));
#endif
  }
  ~HostMemory() {
#ifdef _WIN32
    _aligned_free(memory_);
#else
    free(memory_);
#endif
  }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  explicit operator bool() const { return memory_ || size_ == 0; }
  void* data() const { return memory_; }
  int64_t size() const { return size_; }
  int64_t left() const { return size_ - taken_; }

  // Bytes of a piece of `count` elements, up to the next piece.
  template <class E>
  static int64_t Size(int64_t count) {
    return RoundUp(count * static_cast<int64_t>(sizeof(E)), kPiece);
  }

  // The next piece, uninitialised.
  template <class E>
  E* Take(int64_t count) {
    E* piece = reinterpret_cast<E*>(memory_ + taken_);
    taken_ += Size<E>(count);
    return piece;
  }

 private:
  static constexpr int64_t kPiece = 64;
  static int64_t RoundUp(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

  int64_t size_, taken_ = 0;
  char* memory_ = nullptr;
};

}  // namespace
}  // namespace loratrf
