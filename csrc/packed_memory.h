// Memory for packed weights: blocks side by side in huge pages.
//
// A token's weights are read once and come straight from memory. In pages of 4 KiB half of that time goes into finding
// the pages: the adapters of a whole language model take a thousand of them, the caches of address translations fewer.
#pragma once

#include <stddef.h>

#include <memory>

namespace loratrf {

// `floats` of memory, 64-byte aligned; a chunk is freed when its last block is. Throws std::bad_alloc. Any thread.
std::shared_ptr<float> TakePackedMemory(size_t floats);

}  // namespace loratrf
