// The CUDA operators' host side: its own limits, who does which tokens and columns, launches.
#include <limits.h>

#include <map>
#include <mutex>
#include <tuple>

#include "../check_call.h"
#include "fused.cuh"
#include "loratrf_cuda.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace loratrf {
namespace {

// A failed call of the CUDA runtime, as a Status. What can be forgotten is, so that the next call has a chance.
Status Failed(cudaError_t error, Detail* detail) {
  cudaGetLastError();
  detail->message = cudaGetErrorString(error);
  return Status::kDevice;
}

#define LORATRF_CUDA_CHECK(call)                                                              \
  do {                                                                                        \
    if (const cudaError_t error = (call); error != cudaSuccess) return Failed(error, detail); \
  } while (0)

// What a call must be here, besides what it must be anywhere.
Status CheckCudaCall(const Call& call, Detail* detail) {
  if (Status status = CheckCall(call, kMaxCudaRank, detail); status != Status::kOk) return status;
  // Columns are ints on the device, with room for a last chunk beyond the end.
  const int64_t most = INT_MAX / 2;
  if (call.N > most || call.K > most) return Status::kBadSize;
  // A block for each tile.
  return RowTokens(call) > INT_MAX / kRows * kTile ? Status::kBadSize : Status::kOk;
}

size_t SharedBytes(const Work& work) { return SharedFloats(work.r_size, work.v_size) * sizeof(float); }

// Beyond 48 KiB, which only ranks over 200 need, a kernel has to ask. It asks for the most that it can need: what it
// asked for is the function's, not the call's, and another thread must not take it back before this one's launch.
template <class Kernel>
cudaError_t AskForShared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  const int rank = RoundUp(kMaxCudaRank, 8);
  const int most = SharedFloats(rank, kMoments + rank) * static_cast<int>(sizeof(float));
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// Makes the device that `tensor` is on the current one, until it goes: a runtime's worker threads have the first one
// as theirs, whatever the session's. What is no device's memory leaves the current one.
class OnDeviceOf {
 public:
  OnDeviceOf() = default;
  OnDeviceOf(const OnDeviceOf&) = delete;
  ~OnDeviceOf() {
    if (before_ >= 0) cudaSetDevice(before_);
  }

  cudaError_t Set(const void* tensor) {
    cudaPointerAttributes attributes = {};
    if (cudaError_t error = cudaPointerGetAttributes(&attributes, tensor); error != cudaSuccess) return error;
    int current = 0;
    if (cudaError_t error = cudaGetDevice(&current); error != cudaSuccess) return error;
    const bool is_devices = attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
    if (!is_devices || attributes.device == current) return cudaSuccess;
    const cudaError_t error = cudaSetDevice(attributes.device);
    if (error == cudaSuccess) before_ = current;
    return error;
  }

 private:
  int before_ = -1;
};

// The most blocks of `kernel` that a launch of blocks which wait for each other may have: one a multiprocessor, which
// leaves room for what else runs there. Each device is asked once for each size of shared memory.
struct Residency {
  std::mutex mutex;
  std::map<std::tuple<int, const void*, size_t>, int64_t> blocks;
};
Residency g_residency;

template <class Kernel>
cudaError_t ResidentBlocks(Kernel kernel, size_t shared_bytes, int64_t* blocks) {
  int device = 0, multiprocessors = 0, per_multiprocessor = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::tuple<int, const void*, size_t> key(device, reinterpret_cast<const void*>(kernel), shared_bytes);
  const std::lock_guard<std::mutex> lock(g_residency.mutex);
  if (const auto known = g_residency.blocks.find(key); known != g_residency.blocks.end()) {
    *blocks = known->second;
    return cudaSuccess;
  }
  if (cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess) {
    return error;
  }
  if (cudaError_t error = AskForShared(kernel, shared_bytes); error != cudaSuccess) return error;
  const cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, shared_bytes);
  *blocks = per_multiprocessor > 0 ? multiprocessors : 0;
  if (error == cudaSuccess) g_residency.blocks[key] = *blocks;
  return error;
}

// Loads the kernels for E into the current device, which CUDA otherwise does when they first run.
template <class E>
cudaError_t Load() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, Tiles<E>);
  return error == cudaSuccess ? cudaFuncGetAttributes(&attributes, Split<E>) : error;
}

int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// The launch of batch rows [first, first + rows), without its scratch. Fewer tiles than half of the blocks that the
// device holds are cut into pieces of at least a chunk for each warp.
template <class E>
Status MakeWork(const Call& call, int64_t first, int64_t rows, Work* work, Detail* detail) {
  const auto at = [](const void* data, int64_t elements) -> const void* {
    return data ? static_cast<const E*>(data) + elements : nullptr;
  };
  const int64_t tokens = RowTokens(call);
  work->base = at(call.base, first * tokens * call.N);
  work->x = at(call.x, first * tokens * call.K);
  work->A = call.A.data, work->B = call.B.data, work->tau = call.tau, work->C = call.C.data, work->D = call.D.data;
  work->y = const_cast<void*>(at(call.y, first * tokens * call.N));
  work->tokens = tokens;
  work->tiles_per_row = (tokens + kTile - 1) / kTile;
  work->tiles = rows * work->tiles_per_row;
  work->K = static_cast<int>(call.K), work->N = static_cast<int>(call.N);
  work->R = static_cast<int>(call.S ? call.R : 0), work->F = static_cast<int>(call.S ? call.F : 0);
  work->r_size = RoundUp(work->R, 8);
  work->v_size = work->F ? kMoments + RoundUp(work->F, 8) : 0;
  work->filter_base = call.filter_input == FilterInput::kBase;
  work->steps = (work->R ? kReduce : 0) | (work->F ? kForward : 0) | kApply;
  for (int64_t row = 0; row < rows; ++row) {
    work->slots[row] = call.adapter_ids ? static_cast<int32_t>(call.adapter_ids[first + row]) : 0;
  }
  work->pieces = 1;
  int64_t blocks = 0;
  LORATRF_CUDA_CHECK(ResidentBlocks(Split<E>, SharedBytes(*work), &blocks));
  const int64_t width = kWarps * kChunk<E>;
  const int64_t most = CeilDiv(call.K > call.N && call.R ? call.K : call.N, width);
  const int64_t share = blocks / work->tiles;
  if (work->steps != kApply && share > 1 && most > 1) work->pieces = static_cast<int>(share < most ? share : most);
  work->k_piece = RoundUp(CeilDiv(call.K, work->pieces), kChunk<E>);
  work->n_piece = RoundUp(CeilDiv(call.N, work->pieces), kChunk<E>);
  return Status::kOk;
}

size_t ScratchBytes(const Work& work) {
  if (work.pieces == 1) return 0;
  return static_cast<size_t>(work.tiles) * work.pieces * kTile * (work.r_size + work.v_size) * sizeof(float);
}

template <class E>
Status Launch(Work work, cudaStream_t stream, Detail* detail) {
  void* arguments[] = {&work};
  const size_t shared = SharedBytes(work);
  const dim3 grid(static_cast<unsigned>(work.tiles * work.pieces));
  if (work.pieces == 1) {
    LORATRF_CUDA_CHECK(AskForShared(Tiles<E>, shared));
    LORATRF_CUDA_CHECK(cudaLaunchKernel(Tiles<E>, grid, dim3(kThreads), arguments, shared, stream));
    return Status::kOk;
  }
  const cudaError_t error = cudaLaunchCooperativeKernel(Split<E>, grid, dim3(kThreads), arguments, shared, stream);
  if (error == cudaSuccess) return Status::kOk;
  if (error != cudaErrorCooperativeLaunchTooLarge && error != cudaErrorNotSupported) return Failed(error, detail);
  // Part of the device is taken (by MPS, say): the barriers become the ends of launches.
  cudaGetLastError();
  const int steps = work.steps;
  for (int step = kReduce; step <= kApply; step *= 2) {
    work.steps = steps & step;
    if (!work.steps) continue;
    LORATRF_CUDA_CHECK(cudaLaunchKernel(Split<E>, grid, dim3(kThreads), arguments, shared, stream));
  }
  return Status::kOk;
}

int64_t RowsOf(const Call& call, int64_t first) { return call.batch - first < kRows ? call.batch - first : kRows; }

template <class E>
Status ScratchSizeOf(const Call& call, size_t* bytes, Detail* detail) {
  // The first launch has the most rows; a last one of few rows may be cut into more pieces.
  const int64_t last = (call.batch - 1) / kRows * kRows;
  for (int64_t first : {int64_t{0}, last}) {
    Work work;
    const Status status = MakeWork<E>(call, first, RowsOf(call, first), &work, detail);
    if (status != Status::kOk) return status;
    if (ScratchBytes(work) > *bytes) *bytes = ScratchBytes(work);
  }
  return Status::kOk;
}

template <class E>
Status RunTyped(const Call& call, void* scratch, cudaStream_t stream, Detail* detail) {
  LORATRF_CUDA_CHECK(cudaPeekAtLastError());
  for (int64_t first = 0; first < call.batch; first += kRows) {
    Work work;
    Status status = MakeWork<E>(call, first, RowsOf(call, first), &work, detail);
    if (status != Status::kOk) return status;
    if (ScratchBytes(work) && !scratch) return Status::kNullPointer;
    work.scratch = static_cast<float*>(scratch);
    status = Launch<E>(work, stream, detail);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

}  // namespace

Status CudaLoad(Type type, Detail* detail) {
  switch (type) {
    case Type::kFloat32:
      LORATRF_CUDA_CHECK(Load<float>());
      return Status::kOk;
    case Type::kFloat16:
      LORATRF_CUDA_CHECK(Load<Half>());
      return Status::kOk;
    default:
      LORATRF_CUDA_CHECK(Load<BFloat16>());
      return Status::kOk;
  }
}

Status CudaScratchSize(const Call& call, size_t* bytes, Detail* detail) {
  *bytes = 0;
  if (Status status = CheckCudaCall(call, detail); status != Status::kOk) return status;
  if (call.T == 0) return Status::kOk;
  OnDeviceOf device;
  LORATRF_CUDA_CHECK(device.Set(call.base));
  switch (call.type) {
    case Type::kFloat32:
      return ScratchSizeOf<float>(call, bytes, detail);
    case Type::kFloat16:
      return ScratchSizeOf<Half>(call, bytes, detail);
    default:
      return ScratchSizeOf<BFloat16>(call, bytes, detail);
  }
}

Status CudaRun(const Call& call, void* scratch, void* stream, Detail* detail) {
  if (Status status = CheckCudaCall(call, detail); status != Status::kOk) return status;
  if (call.T == 0) return Status::kOk;
  if (Status status = CheckTensors(call, false); status != Status::kOk) return status;
  OnDeviceOf device;
  LORATRF_CUDA_CHECK(device.Set(call.base));
  switch (call.type) {
    case Type::kFloat32:
      return RunTyped<float>(call, scratch, static_cast<cudaStream_t>(stream), detail);
    case Type::kFloat16:
      return RunTyped<Half>(call, scratch, static_cast<cudaStream_t>(stream), detail);
    default:
      return RunTyped<BFloat16>(call, scratch, static_cast<cudaStream_t>(stream), detail);
  }
}

}  // namespace loratrf
