// The operators as plain C functions, for who has tensors and no ONNX Runtime: loratrf_deploy/ops/kernels.py calls them
// through ctypes. Nothing here is Python's, so one library serves every Python.
//
// `tensors`: for each of the operator's inputs in order, and then for y: address, number of dimensions, dimensions. All
// are contiguous and of one Type, adapter_ids int64. Which exception a status becomes is the caller's; its words are
// loratrf_message(). No C++ exception leaves.
#include <algorithm>
#include <exception>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "export.h"
#include "kernels/cuda/loratrf_cuda.h"
#include "parallel.h"

namespace loratrf {
namespace {

thread_local std::string t_message;

// The status of body(), whose words are kept.
template <class Body>
int Guard(Body body) {
  try {
    const Fault fault = body();
    t_message = fault.message;
    return static_cast<int>(fault.status);
  } catch (const std::bad_alloc&) {
    t_message.clear();
    return static_cast<int>(Status::kOutOfMemory);
  } catch (const std::exception& error) {
    t_message = error.what();
    return static_cast<int>(Status::kDevice);
  }
}

// The next tensor of `tensors`, which moves on.
Input Next(const int64_t** tensors) {
  const int64_t* numbers = *tensors;
  *tensors += 2 + numbers[1];
  return {Shape(numbers + 2, *tensors), reinterpret_cast<const void*>(static_cast<uintptr_t>(numbers[0])), nullptr};
}

Fault Fill(Op op, int type, const int64_t* tensors, const char* filter_input, int64_t max_rank, Call* call) {
  std::vector<Input> inputs;
  for (size_t i = 0; i < InfoOf(op).inputs.size(); ++i) inputs.push_back(Next(&tensors));
  const Input y = Next(&tensors);
  call->type = static_cast<Type>(type);
  call->y = const_cast<void*>(y.data);
  if (Fault fault = FillCall(op, inputs, max_rank, call)) return fault;
  if (y.shape != inputs[0].shape) {
    return {Status::kBadSize, std::string(InfoOf(op).name) + ": out is " + Describe(y.shape) + ", expected " +
                                  Describe(inputs[0].shape) + "."};
  }
  return ParseFilterInput(op, filter_input, &call->filter_input);
}

// Packs the call's weights, as a session does with constant ones. Returns where they are now.
std::vector<std::vector<float>> PackWeights(const Isa* isa, Call* call) {
  const struct {
    Weight* weight;
    int64_t rows, cols;
  } all[] = {{&call->A, call->R, call->K},
             {&call->B, call->N, call->R},
             {&call->C, call->F, call->N},
             {&call->D, call->N, call->F}};
  std::vector<std::vector<float>> memory;
  for (const auto& [weight, rows, cols] : all) {
    if (!weight->data) continue;
    memory.emplace_back(PackedSize(isa, rows, cols));
    Pack(isa, call->type, rows, cols, weight->data, memory.back().data());
    weight->packed = memory.back().data();
  }
  return memory;
}

Fault Choose(const char* name, const Isa** isa) {
  if (!*name) return ChooseIsa(isa);
  *isa = FindIsa(name);
  if (*isa) return {};
  return {Status::kBadSetting,
          std::string("Instruction set \"") + name + "\" is not in this build or not in this CPU."};
}

}  // namespace
}  // namespace loratrf

using namespace loratrf;

// Why this thread's last call failed; empty where memory was too short for words.
LORATRF_EXPORT const char* loratrf_message() { return t_message.c_str(); }

// The operators, one a line: its name and its inputs. Their order is what `op` below counts.
LORATRF_EXPORT const char* loratrf_operators() {
  static const std::string* const lines = [] {
    auto* text = new std::string;
    for (Op op : kOps) {
      *text += InfoOf(op).name;
      for (const char* input : InfoOf(op).inputs) *text += std::string(" ") + input;
      *text += "\n";
    }
    return text;
  }();
  return lines->c_str();
}

// The highest rank; on CUDA 0 in a build without it.
LORATRF_EXPORT int64_t loratrf_max_rank(int on_cuda) {
#ifdef LORATRF_WITH_CUDA
  if (on_cuda) return kMaxCudaRank;
#endif
  return on_cuda ? 0 : kMaxRank;
}

// The name of the instruction set that `name` stands for ("": LORATRF_ISA's or the best one); null for one that this
// build or this CPU lacks.
LORATRF_EXPORT const char* loratrf_isa(const char* name) {
  const Isa* isa = nullptr;
  return Guard([&] { return Choose(name, &isa); }) ? nullptr : IsaName(isa);
}

// Computes `op` on the CPU, with the instruction set that `isa` stands for; threads < 1 stands for all of the
// machine's.
LORATRF_EXPORT int loratrf_run(int op, int type, const int64_t* tensors, const char* filter_input, const char* isa,
                               int threads, int prepack) {
  return Guard([&]() -> Fault {
    const Isa* chosen = nullptr;
    if (Fault fault = Choose(isa, &chosen)) return fault;
    Call call;
    if (Fault fault = Fill(kOps[op], type, tensors, filter_input, kMaxRank, &call)) return fault;
    if (threads < 1) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    std::vector<std::vector<float>> memory;
    if (prepack) memory = PackWeights(chosen, &call);
    return Run(kOps[op], chosen, Threads(&threads), call);
  });
}

#ifdef LORATRF_WITH_CUDA
// Queues `op` on `stream` of CUDA's current device, where all tensors but adapter_ids are. With scratch null, and
// *bytes the size that it needs, nothing is queued where that isn't 0.
LORATRF_EXPORT int loratrf_run_on_cuda(int op, int type, const int64_t* tensors, const char* filter_input,
                                       void* scratch, void* stream, size_t* bytes) {
  return Guard([&]() -> Fault {
    Call call;
    if (Fault fault = Fill(kOps[op], type, tensors, filter_input, kMaxCudaRank, &call)) return fault;
    if (Fault fault = ScratchOnCuda(kOps[op], call, bytes)) return fault;
    if (*bytes && !scratch) return {};
    return RunOnCuda(kOps[op], call, scratch, stream);
  });
}
#endif
