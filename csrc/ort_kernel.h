// A node of an ONNX Runtime session: made with the session, run with its tensors. Every fault becomes an OrtStatus.
#pragma once

#include "dispatch.h"
#include "ort_c_api.h"

namespace loratrf {
namespace ort {

enum class Device { kCpu, kCuda };

// One operator for one device and type, as ort_library.cc registers it.
struct CustomOp : OrtCustomOp {
  const OrtApi* api;
  Op op;
  Device device;
  Type type;
  int element_type;
};

inline const CustomOp& Of(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

// OrtCustomOp's CreateKernelV2, KernelComputeV2 and KernelDestroy.
OrtStatus* CreateKernel(const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** out);
OrtStatus* Compute(void* self, OrtKernelContext* context);
void DestroyKernel(void* kernel);

}  // namespace ort
}  // namespace loratrf
