// DLPack's C layout: how torch and numpy lend a tensor without either's headers.
#pragma once

#include <stdint.h>

namespace loratrf {
namespace dlpack {

constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kIntCode = 0, kFloatCode = 2, kBFloatCode = 4;

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null for contiguous
  uint64_t byte_offset;
};

// What a capsule named "dltensor" holds.
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor* self);
};

}  // namespace dlpack
}  // namespace loratrf
