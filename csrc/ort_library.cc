// The operators as an ONNX Runtime custom-op library: domain com.loratrf, version 1, float32, float16 and bfloat16.
//
// Reports every fault as an OrtStatus with the operator's name and the offending shapes; no exception leaves it.
#include <stdlib.h>
#ifdef _WIN32
#include <windows.h>
#elif !defined(__linux__)
#include <dlfcn.h>
#endif

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "export.h"
#include "ort_kernel.h"
#include "ort_status.h"

namespace loratrf {
namespace ort {
namespace {

constexpr char kDomain[] = "com.loratrf";
constexpr int kOpVersion = 1;

#ifdef LORATRF_WITH_CUDA
constexpr Device kDevices[] = {Device::kCpu, Device::kCuda};
#else
constexpr Device kDevices[] = {Device::kCpu};
#endif

// y has input 0's shape, symbols included; a shape that is not known yet is left open.
OrtStatus* InferShape(const OrtCustomOp* self, OrtShapeInferContext* context) {
  const OrtApi* api = Of(self).api;
  return Guard(api, [&]() -> OrtStatus* {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
    if (OrtStatus* unknown = ShapeInferContext_GetInputTypeShape(api)(context, 0, &info)) {
      ReleaseStatus(api)(unknown);
      return nullptr;
    }
    size_t rank = 0;
    Check(GetDimensionsCount(api)(info, &rank));
    // An unknown rank reads as 0, which no valid input has.
    return rank ? ShapeInferContext_SetOutputTypeShape(api)(context, 0, info) : nullptr;
  });
}

// y may take input 0's buffer: the kernels read a token's base before they write its y.
size_t MayInplace(int** inputs, int** outputs) {
  *inputs = static_cast<int*>(malloc(sizeof(int)));
  *outputs = static_cast<int*>(malloc(sizeof(int)));
  if (!*inputs || !*outputs) return 0;
  **inputs = **outputs = 0;
  return 1;
}

void ReleaseMayInplace(int* inputs, int* outputs) {
  free(inputs);
  free(outputs);
}

CustomOp MakeOp(const OrtApi* api, Op op, Device device, Type type, int element_type) {
  CustomOp custom{};
  custom.version = kApiVersion;
  custom.api = api;
  custom.op = op;
  custom.device = device;
  custom.type = type;
  custom.element_type = element_type;
  custom.GetName = [](const OrtCustomOp* self) { return InfoOf(Of(self).op).name; };
  custom.GetExecutionProviderType = [](const OrtCustomOp* self) -> const char* {
    return Of(self).device == Device::kCuda ? "CUDAExecutionProvider" : nullptr;  // null is the CPU's
  };
  custom.GetInputTypeCount = [](const OrtCustomOp* self) { return InfoOf(Of(self).op).inputs.size(); };
  custom.GetInputType = [](const OrtCustomOp* self, size_t index) {
    return IsAdapterIds(InfoOf(Of(self).op).inputs[index]) ? kInt64 : Of(self).element_type;
  };
  custom.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  custom.GetOutputType = [](const OrtCustomOp* self, size_t) { return Of(self).element_type; };
  custom.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return kRequired; };
  custom.GetOutputCharacteristic = custom.GetInputCharacteristic;
  custom.GetInputMemoryType = [](const OrtCustomOp* self, size_t index) {
    const bool on_host = Of(self).device == Device::kCuda && IsAdapterIds(InfoOf(Of(self).op).inputs[index]);
    return on_host ? kMemCpuInput : kMemDefault;
  };
  custom.GetStartVersion = [](const OrtCustomOp*) { return kOpVersion; };
  custom.GetEndVersion = custom.GetStartVersion;
  custom.CreateKernelV2 = CreateKernel;
  custom.KernelComputeV2 = Compute;
  custom.KernelDestroy = DestroyKernel;
  custom.InferOutputShapeFn = InferShape;
  custom.GetMayInplace = MayInplace;
  custom.ReleaseMayInplace = ReleaseMayInplace;
  return custom;
}

// What one ONNX Runtime was given. A process may hold several of them (onnxruntime-genai brings its own); sessions read
// the operators for as long as they live, so these are kept until the process ends.
struct Registration {
  const OrtApi* api;
  OrtCustomOpDomain* domain = nullptr;
  std::vector<CustomOp> ops;
};

// ONNX Runtime closes the library with the last session; its operators, and its threads, are to stay. On Linux the
// linker's -z nodelete says so.
void Stay() {
#ifdef _WIN32
  HMODULE self = nullptr;
  GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_PIN,
                     reinterpret_cast<LPCSTR>(&Stay), &self);
#elif !defined(__linux__)
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&Stay), &self)) dlopen(self.dli_fname, RTLD_LAZY | RTLD_NODELETE);
#endif
}

Registration* RegistrationOf(const OrtApi* api) {
  static std::mutex mutex;
  static auto* registrations = new std::vector<std::unique_ptr<Registration>>;
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto& known : *registrations) {
    if (known->api == api) return known.get();
  }
  Stay();
  auto made = std::make_unique<Registration>();
  made->api = api;
  for (Device device : kDevices) {
    for (Op op : kOps) {
      made->ops.push_back(MakeOp(api, op, device, Type::kFloat32, kFloat));
      made->ops.push_back(MakeOp(api, op, device, Type::kFloat16, kFloat16));
      made->ops.push_back(MakeOp(api, op, device, Type::kBFloat16, kBFloat16));
    }
  }
  Check(CreateCustomOpDomain(api)(kDomain, &made->domain));
  for (const CustomOp& op : made->ops) {
    if (OrtStatus* status = CustomOpDomain_Add(api)(made->domain, &op)) {
      ReleaseCustomOpDomain(api)(made->domain);
      throw Failed{status};
    }
  }
  registrations->push_back(std::move(made));
  return registrations->back().get();
}

}  // namespace
}  // namespace ort
}  // namespace loratrf

// ONNX Runtime calls it when a session's options name this library.
LORATRF_EXPORT loratrf::ort::OrtStatus* RegisterCustomOps(loratrf::ort::OrtSessionOptions* options,
                                                          const loratrf::ort::OrtApiBase* base) {
  using namespace loratrf::ort;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (!api) {
    // Any version's table can make a status: its first entry never moves.
    api = base->GetApi(1);
    if (!api) return nullptr;
    return Guard(api, [&] {
      return Error(api, {loratrf::Status::kBadSetting, "loratrf needs ONNX Runtime 1." + std::to_string(kApiVersion) +
                                                           " or newer, this is " + base->GetVersionString() + "."});
    });
  }
  return Guard(api, [&] { return AddCustomOpDomain(api)(options, RegistrationOf(api)->domain); });
}
