// The operators as an ONNX Runtime custom-op library: domain com.loratrf, version 1, float32, float16 and bfloat16.
//
// Reports every fault as an OrtStatus with the operator's name and the offending shapes; no exception leaves this file.
#include <stdlib.h>

#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "check.h"
#include "ort_c_api.h"
#include "packed_memory.h"

namespace loratrf {
namespace {

using ort::OrtApi;
using ort::OrtCustomOp;
using ort::OrtKernelContext;
using ort::OrtKernelInfo;
using ort::OrtShapeInferContext;
using ort::OrtStatus;
using ort::OrtTensorTypeAndShapeInfo;
using ort::OrtValue;

constexpr char kDomain[] = "com.loratrf";
constexpr int kOpVersion = 1;

OrtStatus* Error(const OrtApi* api, const std::string& message) {
  return ort::CreateStatus(api)(ort::kInvalidArgument, message.c_str());
}

// A failed call of ONNX Runtime's own, on its way out of a function that returns an OrtStatus.
struct Failed {
  OrtStatus* status;
};

void Check(OrtStatus* status) {
  if (status) throw Failed{status};
}

// Runs body and turns whatever it throws into a status.
template <class Body>
OrtStatus* Guard(const OrtApi* api, Body&& body) noexcept {
  try {
    return body();
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::bad_alloc&) {
    return ort::CreateStatus(api)(ort::kFail, "loratrf: out of memory");
  } catch (const std::exception& error) {
    return ort::CreateStatus(api)(ort::kFail, error.what());
  } catch (...) {
    return ort::CreateStatus(api)(ort::kFail, "loratrf: unknown error");
  }
}

Shape ShapeOf(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info) {
  size_t count = 0;
  Check(ort::GetDimensionsCount(api)(info, &count));
  Shape shape(count);
  if (count) Check(ort::GetDimensions(api)(info, shape.data(), count));
  return shape;
}

// A tensor's shape and, where element_type is given, its type.
Shape ShapeOf(const OrtApi* api, const OrtValue* value, int* element_type = nullptr) {
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  Check(ort::GetTensorTypeAndShape(api)(value, &raw));
  const auto release = ort::ReleaseTensorTypeAndShapeInfo(api);
  std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> info(raw, release);
  if (element_type) Check(ort::GetTensorElementType(api)(raw, element_type));
  return ShapeOf(api, info.get());
}

void* DataOf(const OrtApi* api, const OrtValue* value) {
  void* data = nullptr;
  Check(ort::GetTensorMutableData(api)(const_cast<OrtValue*>(value), &data));
  return data;
}

enum class Device { kCpu, kCuda };
#ifdef LORATRF_WITH_CUDA
constexpr Device kDevices[] = {Device::kCpu, Device::kCuda};
#else
constexpr Device kDevices[] = {Device::kCpu};
#endif

struct CustomOp : OrtCustomOp {
  const OrtApi* api;
  Op op;
  Device device;
  Type type;
  int element_type;
};

const CustomOp& Of(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

// A node of a session. On the CPU constant weights are packed once, at its creation; others are read anew in every run.
// Nothing changes afterwards: any number of threads may compute at once.
struct Kernel {
  const OrtApi* api;
  Op op;
  Device device;
  Type type;
  int element_type;
  FilterInput filter_input = FilterInput::kAdapted;
  const Isa* isa = nullptr;
  std::vector<std::shared_ptr<float>> packed;  // per input; null where it isn't a constant weight
  std::vector<Shape> packed_shapes;
};

void PackConstants(Kernel* kernel, const OrtKernelInfo* info) {
  const std::vector<const char*>& inputs = InfoOf(kernel->op).inputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!IsWeight(inputs[i])) continue;
    int is_constant = 0;
    const OrtValue* value = nullptr;
    Check(ort::KernelInfoGetConstantInput_tensor(kernel->api)(info, i, &is_constant, &value));
    if (!is_constant || !value) continue;
    int element_type = 0;
    const Shape shape = ShapeOf(kernel->api, value, &element_type);
    // What doesn't fit is reported by the first run, which knows every shape.
    if (element_type != kernel->element_type || shape.size() != 2 || shape[0] < 1 || shape[1] < 1) continue;
    std::shared_ptr<float> packed = TakePackedMemory(PackedSize(kernel->isa, shape[0], shape[1]));
    const Status status = Pack(kernel->isa, kernel->type, shape[0], shape[1], DataOf(kernel->api, value), packed.get());
    if (status != Status::kOk) continue;
    kernel->packed[i] = std::move(packed);
    kernel->packed_shapes[i] = shape;
  }
}

// The string attribute, or its default where the node has none.
std::string StringAttribute(const OrtApi* api, const OrtKernelInfo* info, const char* name, const char* fallback) {
  size_t size = 0;
  if (OrtStatus* absent = ort::KernelInfoGetAttribute_string(api)(info, name, nullptr, &size)) {
    ort::ReleaseStatus(api)(absent);
    // Absent, or of another type: a number in its place is a fault of the model, not a default.
    int64_t integer = 0;
    float real = 0;
    OrtStatus* no_integer = ort::KernelInfoGetAttribute_int64(api)(info, name, &integer);
    OrtStatus* no_float = ort::KernelInfoGetAttribute_float(api)(info, name, &real);
    const bool number = !no_integer || !no_float;
    if (no_integer) ort::ReleaseStatus(api)(no_integer);
    if (no_float) ort::ReleaseStatus(api)(no_float);
    return number ? "a number" : fallback;
  }
  std::vector<char> text(size + 1);
  Check(ort::KernelInfoGetAttribute_string(api)(info, name, text.data(), &size));
  return std::string(text.data(), size ? size - 1 : 0);  // size counts the end, and what is inside may hold a zero
}

OrtStatus* CreateKernel(const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** out) {
  return Guard(api, [&]() -> OrtStatus* {
    const CustomOp& custom = Of(self);
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->op = custom.op;
    kernel->device = custom.device;
    kernel->type = custom.type;
    kernel->element_type = custom.element_type;
    std::string error = ChooseIsa(&kernel->isa);
    if (error.empty() && HasFilterInput(custom.op)) {
      error = ParseFilterInput(custom.op, StringAttribute(api, info, "filter_input", "adapted"), &kernel->filter_input);
    }
    if (!error.empty()) return Error(api, error);
    kernel->packed.resize(InfoOf(custom.op).inputs.size());
    kernel->packed_shapes.resize(kernel->packed.size());
    if (custom.device == Device::kCpu) PackConstants(kernel.get(), info);
    *out = kernel.release();
    return nullptr;
  });
}

// ONNX Runtime's own thread pool as a ParallelFor.
struct HostThreads {
  const OrtApi* api;
  const OrtKernelContext* context;
  OrtStatus* status = nullptr;

  static void Run(void* self, size_t count, void (*body)(void*, size_t), void* argument) {
    auto* host = static_cast<HostThreads*>(self);
    if (host->status) return;
    host->status = ort::KernelContext_ParallelFor(host->api)(host->context, body, count, 0, argument);
  }
};

#ifdef LORATRF_WITH_CUDA
// Scratch on the device of the tensor `like`, from ONNX Runtime's arena and bound to the run's stream: given back when
// the launches are queued, it is lent again only behind them.
struct DeviceScratch {
  const OrtApi* api;
  const OrtKernelContext* context;
  const OrtValue* like;
  const ort::OrtMemoryInfo* info = nullptr;
  void* memory = nullptr;

  DeviceScratch(const OrtApi* a, const OrtKernelContext* c, const OrtValue* l) : api(a), context(c), like(l) {}
  DeviceScratch(const DeviceScratch&) = delete;

  static void* Take(void* self, size_t bytes) {
    auto* scratch = static_cast<DeviceScratch*>(self);
    Check(ort::GetTensorMemoryInfo(scratch->api)(scratch->like, &scratch->info));
    Check(ort::KernelContext_GetScratchBuffer(scratch->api)(scratch->context, scratch->info, bytes, &scratch->memory));
    return scratch->memory;
  }

  ~DeviceScratch() {
    ort::OrtAllocator* allocator = nullptr;
    if (!memory) return;
    OrtStatus* status = ort::KernelContext_GetAllocator(api)(context, info, &allocator);
    if (!status) status = ort::AllocatorFree(api)(allocator, memory);
    if (status) ort::ReleaseStatus(api)(status);
    if (allocator) ort::ReleaseAllocator(api)(allocator);
  }
};

// Queues op on the stream of the run. tensors: on the device of `base`, adapter_ids on the host.
Status ComputeOnCuda(const Kernel& kernel, const OrtKernelContext* context, const OrtValue* base, const Dims& dims,
                     const void* const* tensors, void* y, std::string* fault) {
  void* stream = nullptr;
  Check(ort::KernelContext_GetGPUComputeStream(kernel.api)(context, &stream));
  DeviceScratch scratch(kernel.api, context, base);
  return RunOnCuda(kernel.op, kernel.type, dims, kernel.filter_input, tensors, y, {DeviceScratch::Take, &scratch},
                   stream, fault);
}
#endif

OrtStatus* Compute(void* self, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  const OrtApi* api = kernel.api;
  return Guard(api, [&]() -> OrtStatus* {
    const OpInfo& info = InfoOf(kernel.op);
    const size_t count = info.inputs.size();
    std::vector<const void*> tensors(count);
    std::vector<const float*> packed(count);
    std::vector<Shape> shapes(count);
    std::vector<const OrtValue*> values(count);
    for (size_t i = 0; i < count; ++i) {
      if (kernel.packed[i]) {  // a constant: everything about it is known
        packed[i] = kernel.packed[i].get();
        shapes[i] = kernel.packed_shapes[i];
        continue;
      }
      Check(ort::KernelContext_GetInput(api)(context, i, &values[i]));
      const OrtValue* value = values[i];
      if (!value) return Error(api, std::string(info.name) + ": input " + info.inputs[i] + " is missing.");
      int element_type = 0;
      shapes[i] = ShapeOf(api, value, &element_type);
      const int expected = IsAdapterIds(info.inputs[i]) ? ort::kInt64 : kernel.element_type;
      if (element_type != expected) {
        return Error(api, std::string(info.name) + ": " + info.inputs[i] + " has ONNX type " +
                              std::to_string(element_type) + ", expected " + std::to_string(expected) + ".");
      }
      tensors[i] = DataOf(api, value);
    }
    Dims dims;
    const int64_t max_rank = kernel.device == Device::kCuda ? kMaxCudaRank : kMaxRank;
    const std::string error = CheckShapes(kernel.op, shapes, &dims, max_rank);
    if (!error.empty()) return Error(api, error);
    OrtValue* output = nullptr;
    Check(ort::KernelContext_GetOutput(api)(context, 0, shapes[0].data(), shapes[0].size(), &output));
    if (!output) return nullptr;
    std::string fault;
#ifdef LORATRF_WITH_CUDA
    if (kernel.device == Device::kCuda) {
      const Status status =
          ComputeOnCuda(kernel, context, values[0], dims, tensors.data(), DataOf(api, output), &fault);
      return status == Status::kOk ? nullptr : Error(api, fault);
    }
#endif
    HostThreads host{api, context};
    const Status status = Run(kernel.op, kernel.isa, {HostThreads::Run, &host}, kernel.type, dims, kernel.filter_input,
                              tensors.data(), packed.data(), DataOf(api, output), &fault);
    Check(host.status);
    return status == Status::kOk ? nullptr : Error(api, fault);
  });
}

void DestroyKernel(void* kernel) { delete static_cast<Kernel*>(kernel); }

// y has input 0's shape, symbols included; a shape that is not known yet is left open.
OrtStatus* InferShape(const OrtCustomOp* self, OrtShapeInferContext* context) {
  const OrtApi* api = Of(self).api;
  return Guard(api, [&]() -> OrtStatus* {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
    if (OrtStatus* unknown = ort::ShapeInferContext_GetInputTypeShape(api)(context, 0, &info)) {
      ort::ReleaseStatus(api)(unknown);
      return nullptr;
    }
    size_t rank = 0;
    Check(ort::GetDimensionsCount(api)(info, &rank));
    // An unknown rank reads as 0, which no valid input has.
    return rank ? ort::ShapeInferContext_SetOutputTypeShape(api)(context, 0, info) : nullptr;
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
  custom.version = ort::kApiVersion;
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
    return IsAdapterIds(InfoOf(Of(self).op).inputs[index]) ? ort::kInt64 : Of(self).element_type;
  };
  custom.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  custom.GetOutputType = [](const OrtCustomOp* self, size_t) { return Of(self).element_type; };
  custom.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
  custom.GetOutputCharacteristic = custom.GetInputCharacteristic;
  custom.GetInputMemoryType = [](const OrtCustomOp* self, size_t index) {
    const bool on_host = Of(self).device == Device::kCuda && IsAdapterIds(InfoOf(Of(self).op).inputs[index]);
    return on_host ? ort::kMemCpuInput : ort::kMemDefault;
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
  ort::OrtCustomOpDomain* domain = nullptr;
  std::vector<CustomOp> ops;
};

Registration* RegistrationOf(const OrtApi* api) {
  static std::mutex mutex;
  static auto* registrations = new std::vector<std::unique_ptr<Registration>>;
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto& known : *registrations) {
    if (known->api == api) return known.get();
  }
  auto made = std::make_unique<Registration>();
  made->api = api;
  for (Device device : kDevices) {
    for (Op op : kOps) {
      made->ops.push_back(MakeOp(api, op, device, Type::kFloat32, ort::kFloat));
      made->ops.push_back(MakeOp(api, op, device, Type::kFloat16, ort::kFloat16));
      made->ops.push_back(MakeOp(api, op, device, Type::kBFloat16, ort::kBFloat16));
    }
  }
  Check(ort::CreateCustomOpDomain(api)(kDomain, &made->domain));
  for (const CustomOp& op : made->ops) {
    if (OrtStatus* status = ort::CustomOpDomain_Add(api)(made->domain, &op)) {
      ort::ReleaseCustomOpDomain(api)(made->domain);
      throw Failed{status};
    }
  }
  registrations->push_back(std::move(made));
  return registrations->back().get();
}

}  // namespace
}  // namespace loratrf

// The only exported symbol; ONNX Runtime calls it when a session's options name this library.
extern "C" __attribute__((visibility("default"))) loratrf::ort::OrtStatus* RegisterCustomOps(
    loratrf::ort::OrtSessionOptions* options, const loratrf::ort::OrtApiBase* base) {
  using namespace loratrf;
  const OrtApi* api = base->GetApi(ort::kApiVersion);
  if (!api) {
    // Any version's table can make a status: its first entry never moves.
    api = base->GetApi(1);
    if (!api) return nullptr;
    return Guard(api, [&] {
      return Error(api, "loratrf needs ONNX Runtime 1." + std::to_string(ort::kApiVersion) + " or newer, this is " +
                            base->GetVersionString() + ".");
    });
  }
  return Guard(api, [&] { return ort::AddCustomOpDomain(api)(options, RegistrationOf(api)->domain); });
}
