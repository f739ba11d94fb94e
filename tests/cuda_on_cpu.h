// CUDA's language and run-time library, as far as csrc/kernels/cuda uses them, on a CPU: for tests only.
//
//   g++ -include tests/cuda_on_cpu.h -x c++ csrc/kernels/cuda/loratrf_cuda.cu tests/cuda_emulation.cc
//
// Every CUDA thread is a fiber that runs until it waits: a warp runs to the block's barrier before the next one starts,
// and a block of a cooperative launch to the grid's, first to last or last to first, so that a missing barrier shows as
// a wrong result in one of the two orders. Blocks of other launches run one after the other. A barrier that some thread
// never reaches, and a launch of more cooperative blocks than the pretended GPU holds, are errors.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__ static
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16), may_alias));

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_on_cpu {

// The pretended GPU, and what tests set and read.
struct Gpu {
  int multiprocessors = 2;
  bool backwards = false;  // the last warp first
  bool refuse_cooperative = false;
  int error = 0;                       // of an earlier call, as a sticky one
  int device = 0, tensors_device = 0;  // the current one, and the one that all memory is on
  int launched_on = -1;
  int asked = 0, loaded = 0;  // how often for the occupancy, and for a kernel's attributes
  int launches = 0;
  std::map<const void*, size_t> shared;  // what each kernel has asked for beyond 48 KiB
  // Where kernels run elsewhere: the kernel, grid and block, shared memory, its parameter, whether it is cooperative.
  void (*elsewhere)(void* kernel, unsigned grid, unsigned block, size_t shared, const void* parameter,
                    int together) = nullptr;
};
inline Gpu g_gpu;

struct Barrier {
  int waiting = 0;
  int64_t round = 0;
};

struct Warp {
  Barrier barrier;
  float fragments[2][32][6];  // by round, so that one round's readers don't meet the next one's writers
};

struct Block {
  unsigned index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<float> shared;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned index;
  Block* block;
  const Barrier* waits = nullptr;
  int64_t round = 0;
  bool done = false;

  bool Ready() const { return !done && (!waits || waits->round != round); }
};

inline ucontext_t g_scheduler;
inline Thread* g_thread;
inline Barrier g_grid_barrier;
inline dim3 g_grid, g_block;
inline void (*g_call)(void*);
inline void* g_argument;

inline void Fatal(const char* what) {
  fprintf(stderr, "cuda_on_cpu: %s\n", what);
  abort();
}

inline void Wait(Barrier* barrier, int threads) {
  if (++barrier->waiting == threads) {
    barrier->waiting = 0;
    ++barrier->round;
    return;
  }
  g_thread->waits = barrier;
  g_thread->round = barrier->round;
  swapcontext(&g_thread->context, &g_scheduler);
  g_thread->waits = nullptr;
}

inline Warp& CurrentWarp() { return g_thread->block->warps[g_thread->index / 32]; }

// Hands every lane's values to all lanes of its warp.
template <int kCount>
const float (*Exchange(const float (&values)[kCount]))[6] {
  Warp& warp = CurrentWarp();
  auto* slots = warp.fragments[warp.barrier.round % 2];
  memcpy(slots[g_thread->index % 32], values, sizeof(values));
  Wait(&warp.barrier, 32);
  return slots;
}

inline void ThreadMain() {
  g_call(g_argument);
  g_thread->done = true;
  swapcontext(&g_thread->context, &g_scheduler);
}

inline void Prepare(ucontext_t* context, char* stack, size_t size) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = size;
  context->uc_link = nullptr;
  makecontext(context, ThreadMain, 0);
}

// Runs blocks [first, first + count) together.
inline void RunBlocks(unsigned first, unsigned count, size_t shared_bytes) {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Thread> threads(size_t{count} * g_block.x);
  static std::vector<std::unique_ptr<char[]>> stacks;
  constexpr size_t kStack = 64 * 1024;
  for (unsigned b = 0; b < count; ++b) {
    blocks.push_back(std::make_unique<Block>());
    Block& block = *blocks.back();
    block.index = first + b;
    block.warps.resize(g_block.x / 32);
    block.shared.assign(shared_bytes / sizeof(float) + 1, NAN);
    block.shared.back() = 1234.5f;
    for (unsigned t = 0; t < g_block.x; ++t) {
      Thread& thread = threads[size_t{b} * g_block.x + t];
      if (stacks.empty()) stacks.emplace_back(new char[kStack]);
      thread.stack = std::move(stacks.back());
      stacks.pop_back();
      thread.index = t, thread.block = &block;
      Prepare(&thread.context, thread.stack.get(), kStack);
    }
  }
  g_grid_barrier = {};
  const size_t warps = g_block.x / 32;
  const auto ordered = [](size_t i, size_t size) { return g_gpu.backwards ? size - 1 - i : i; };
  // As far as it gets: a lane that waits lets the next one run, a warp the next warp, a block the next block.
  const auto run_warp = [&](Thread* lanes) {
    bool moved = false;
    for (int lane = 0; lane < 32; ++lane) {
      if (!lanes[lane].Ready()) continue;
      g_thread = &lanes[lane];
      swapcontext(&g_scheduler, &lanes[lane].context);
      moved = true;
    }
    return moved;
  };
  const auto run_block = [&](Thread* members) {
    bool moved = false;
    for (bool again = true; again; moved = moved || again) {
      again = false;
      for (size_t i = 0; i < warps; ++i) {
        while (run_warp(members + 32 * ordered(i, warps))) again = true;
      }
    }
    return moved;
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = 0; i < count; ++i) moved = run_block(&threads[ordered(i, count) * g_block.x]) || moved;
  }
  for (const Thread& thread : threads) {
    if (!thread.done) Fatal("a barrier that not every thread reaches");
  }
  for (const auto& block : blocks) {
    if (block->shared.back() != 1234.5f) Fatal("a write beyond the shared memory");
  }
  for (Thread& thread : threads) stacks.push_back(std::move(thread.stack));
}

template <class Argument>
int Launch(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t shared, bool together) {
  struct Bound {
    void (*kernel)(Argument);
    Argument* argument;
  } bound{kernel, static_cast<Argument*>(arguments[0])};
  const auto asked = g_gpu.shared.find(reinterpret_cast<const void*>(kernel));
  if (shared > 48 * 1024 && (asked == g_gpu.shared.end() || shared > asked->second)) {
    Fatal("more shared memory than the kernel asked for");
  }
  g_grid = grid, g_block = block;
  g_call = [](void* b) { static_cast<Bound*>(b)->kernel(*static_cast<Bound*>(b)->argument); };
  g_argument = &bound;
  ++g_gpu.launches;
  g_gpu.launched_on = g_gpu.device;
  if (g_gpu.elsewhere) {
    g_gpu.elsewhere(reinterpret_cast<void*>(kernel), grid.x, block.x, shared, arguments[0], together);
  } else if (together) {
    RunBlocks(0, grid.x, shared);
  } else {
    for (unsigned b = 0; b < grid.x; ++b) RunBlocks(b, 1, shared);
  }
  return 0;
}

// A tensor core's sum, cut off towards zero: as the A100 is taken to work, four products and the sum so far are lined
// up at the largest one's exponent, with one bit more than a float has.
inline float CutOffSum(const double (&terms)[5]) {
  double largest = 0, sum = 0;
  for (double term : terms) largest = fmax(largest, fabs(term)), sum += term;
  if (!(largest > 0) || !(largest < INFINITY)) return static_cast<float>(sum);
  const double unit = ldexp(1, ilogb(largest) - 24);
  sum = 0;
  for (double term : terms) sum += trunc(term / unit) * unit;
  const float rounded = static_cast<float>(sum);
  return fabs(static_cast<double>(rounded)) > fabs(sum) ? nextafterf(rounded, 0) : rounded;
}

// PTX's mma.m16n8k8 on tf32: from the lanes' fragments to the matrices, as the PTX manual lays them out. Operands with
// more bits than a tensor core reads are a fault of the caller.
inline void Mma(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  const float values[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  for (float value : values) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (isfinite(value) && (bits & 0x1fff)) Fatal("an operand of mma that is no tf32");
  }
  const float (*lanes)[6] = Exchange(values);
  const int lane = static_cast<int>(g_thread->index % 32), group = lane >> 2, in_group = lane & 3;
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    for (int high = 0; high < 2; ++high) {
      const int a_register = (row >= 8 ? 1 : 0) + 2 * high, b_register = 4 + high;
      double terms[5] = {c[i]};
      for (int k = 0; k < 4; ++k) {
        terms[k + 1] = static_cast<double>(lanes[(row % 8) * 4 + k][a_register]) * lanes[column * 4 + k][b_register];
      }
      c[i] = CutOffSum(terms);
    }
  }
}

}  // namespace cuda_on_cpu

// The language.
#define threadIdx (dim3(cuda_on_cpu::g_thread->index, 0, 0))
#define blockIdx (dim3(cuda_on_cpu::g_thread->block->index, 0, 0))
#define gridDim (cuda_on_cpu::g_grid)

inline float* SharedMemory() { return cuda_on_cpu::g_thread->block->shared.data(); }
inline void __syncthreads() {
  cuda_on_cpu::Wait(&cuda_on_cpu::g_thread->block->barrier, static_cast<int>(cuda_on_cpu::g_block.x));
}
inline float __shfl_sync(unsigned, float value, int lane) { return cuda_on_cpu::Exchange({value})[lane][0]; }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return cuda_on_cpu::Exchange({value})[(cuda_on_cpu::g_thread->index % 32) ^ static_cast<unsigned>(mask)][0];
}
#ifdef LORATRF_MMA_ON_CPU
inline void MmaOnCpu(float (&c)[4], const float (&a)[4], const float (&b)[2]) { cuda_on_cpu::Mma(c, a, b); }
#endif

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
using __half = _Float16;
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) {
  __half value;
  memcpy(&value, &bits, 2);
  return value;
}
inline uint16_t __half_as_ushort(__half value) {
  uint16_t bits;
  memcpy(&bits, &value, 2);
  return bits;
}
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

namespace cooperative_groups {
struct Grid {
  void sync() const {
    cuda_on_cpu::Wait(&cuda_on_cpu::g_grid_barrier, static_cast<int>(cuda_on_cpu::g_grid.x * cuda_on_cpu::g_block.x));
  }
};
inline Grid this_grid() { return {}; }
}  // namespace cooperative_groups

// The run-time library.
using cudaError_t = int;
using cudaStream_t = struct CudaStream*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorCooperativeLaunchTooLarge = 720, cudaErrorNotSupported = 801;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge ? "too many blocks in cooperative launch" : "an illegal access";
}
inline cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::g_gpu.error; }
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::g_gpu.error, 0); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::g_gpu.device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  cuda_on_cpu::g_gpu.device = device;
  return cudaSuccess;
}
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  *attributes = {cudaMemoryTypeDevice, cuda_on_cpu::g_gpu.tensors_device};
  return cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  ++cuda_on_cpu::g_gpu.loaded;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_on_cpu::g_gpu.multiprocessors;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  cuda_on_cpu::g_gpu.shared[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return bytes <= 64 * 1024 ? cudaSuccess : 1;  // sm_75 has no more
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  ++cuda_on_cpu::g_gpu.asked;
  *blocks = 2;
  return cudaSuccess;
}
template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return cuda_on_cpu::Launch<Argument>(kernel, grid, block, arguments, shared, false);
}
template <class Argument>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments,
                                        size_t shared, cudaStream_t) {
  using cuda_on_cpu::g_gpu;
  if (g_gpu.refuse_cooperative) return g_gpu.error = cudaErrorCooperativeLaunchTooLarge;
  if (grid.x > static_cast<unsigned>(g_gpu.multiprocessors)) return g_gpu.error = cudaErrorCooperativeLaunchTooLarge;
  return cuda_on_cpu::Launch<Argument>(kernel, grid, block, arguments, shared, true);
}
