#include "dispatch.h"

#include <stdlib.h>

#include "kernels/cuda/loratrf_cuda.h"

namespace loratrf {
namespace {

// What a kernel reported, in words.
std::string Word(Op op, const Call& call, Status status, const Detail& detail) {
  const std::string name = std::string(InfoOf(op).name) + ": ";
  switch (status) {
    case Status::kOk:
      return "";
    case Status::kBadSize:
      return name + "a dimension is out of range.";
    case Status::kRankTooHigh:
      return name + "a rank is over " + std::to_string(kMaxRank) + ".";
    case Status::kNullPointer:
      return name + "a tensor has no data.";
    case Status::kOutOfMemory:
      return name + "no memory for scratch.";
    case Status::kBadAdapterId:
      return name + "adapter_ids[" + std::to_string(detail.bad_row) + "] is " +
             std::to_string(call.adapter_ids[detail.bad_row]) + ", expected -1 (base alone) to " +
             std::to_string(call.S - 1) + " (" + std::to_string(call.S) + " slots).";
    case Status::kDevice:
      return name + "CUDA reports \"" + detail.message + "\", of this launch or of work queued before it.";
    case Status::kBadSetting:
      break;  // no kernel's
  }
  return name + "unknown status.";
}

Fault FaultOf(Op op, const Call& call, Status status, const Detail& detail) {
  if (status == Status::kOk) return {};
  return {status, Word(op, call, status, detail)};
}

}  // namespace

Fault ChooseIsa(const Isa** isa) {
  const char* wanted = getenv("LORATRF_ISA");
  *isa = FindIsa(wanted);
  if (*isa) return {};
  return {Status::kBadSetting, std::string("LORATRF_ISA is \"") + wanted +
                                   "\", which this build or this CPU lacks; unset it for \"" +
                                   IsaName(FindIsa(nullptr)) + "\", the best one here."};
}

Fault FillCall(Op op, const std::vector<Input>& inputs, int64_t max_rank, Call* call) {
  if (Fault fault = CheckShapes(op, inputs, max_rank, call)) return fault;
  const auto weight = [&](size_t i) { return Weight{inputs[i].data, inputs[i].packed}; };
  call->base = inputs[0].data;
  if (op != Op::kTaskFilter) call->x = inputs[1].data, call->A = weight(2), call->B = weight(3);
  if (op != Op::kLowRank) {
    const size_t tau = TauOf(op);
    call->tau = inputs[tau].data, call->C = weight(tau + 1), call->D = weight(tau + 2);
  }
  if (op == Op::kGroupedLoraTrf) {
    call->adapter_ids = static_cast<const int64_t*>(inputs[7].data);
    // Without ids the call would be one of a single adapter.
    if (call->batch && !call->adapter_ids) return {Status::kNullPointer, "GroupedLoraTrf: adapter_ids has no data."};
  }
  return {};
}

Fault Run(Op op, const Isa* isa, ParallelFor parallel, const Call& call) {
  Detail detail;
  const Status status = Run(isa, parallel, call, &detail);
  return FaultOf(op, call, status, detail);
}

#ifdef LORATRF_WITH_CUDA
Fault LoadOnCuda(Op op, Type type) {
  Detail detail;
  return FaultOf(op, Call(), CudaLoad(type, &detail), detail);
}

Fault ScratchOnCuda(Op op, const Call& call, size_t* bytes) {
  Detail detail;
  const Status status = CudaScratchSize(call, bytes, &detail);
  return FaultOf(op, call, status, detail);
}

Fault RunOnCuda(Op op, const Call& call, void* scratch, void* stream) {
  Detail detail;
  const Status status = CudaRun(call, scratch, stream, &detail);
  return FaultOf(op, call, status, detail);
}
#endif

}  // namespace loratrf
