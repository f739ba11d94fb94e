#include "ort_kernel.h"

#include <memory>
#include <new>
#include <string>
#include <vector>

#include "kernels/cuda/loratrf_cuda.h"
#include "ort_status.h"
#include "packed_memory.h"

namespace loratrf {
namespace ort {
namespace {

// A tensor's shape and type.
Shape ShapeOf(const OrtApi* api, const OrtValue* value, int* element_type) {
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  Check(GetTensorTypeAndShape(api)(value, &raw));
  const auto release = ReleaseTensorTypeAndShapeInfo(api);
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> info(raw, release);
  size_t count = 0;
  Check(GetTensorElementType(api)(raw, element_type));
  Check(GetDimensionsCount(api)(raw, &count));
  Shape shape(count);
  if (count) Check(GetDimensions(api)(raw, shape.data(), count));
  return shape;
}

void* DataOf(const OrtApi* api, const OrtValue* value) {
  void* data = nullptr;
  Check(GetTensorMutableData(api)(const_cast<OrtValue*>(value), &data));
  return data;
}

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
    Check(KernelInfoGetConstantInput_tensor(kernel->api)(info, i, &is_constant, &value));
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
  if (OrtStatus* absent = KernelInfoGetAttribute_string(api)(info, name, nullptr, &size)) {
    ReleaseStatus(api)(absent);
    // Absent, or of another type: a number in its place is a fault of the model, not a default.
    int64_t integer = 0;
    float real = 0;
    OrtStatus* no_integer = KernelInfoGetAttribute_int64(api)(info, name, &integer);
    OrtStatus* no_float = KernelInfoGetAttribute_float(api)(info, name, &real);
    const bool number = !no_integer || !no_float;
    if (no_integer) ReleaseStatus(api)(no_integer);
    if (no_float) ReleaseStatus(api)(no_float);
    return number ? "a number" : fallback;
  }
  std::vector<char> text(size + 1);
  Check(KernelInfoGetAttribute_string(api)(info, name, text.data(), &size));
  return std::string(text.data(), size ? size - 1 : 0);  // size counts the end, and what is inside may hold a zero
}

// ONNX Runtime's own thread pool as a ParallelFor.
struct HostThreads {
  const OrtApi* api;
  const OrtKernelContext* context;
  OrtStatus* status = nullptr;

  static void Run(void* self, size_t count, void (*body)(void*, size_t), void* argument) {
    auto* host = static_cast<HostThreads*>(self);
    if (host->status) return;
    host->status = KernelContext_ParallelFor(host->api)(host->context, body, count, 0, argument);
  }
};

#ifdef LORATRF_WITH_CUDA
// Scratch on the device of the tensor `like`, from ONNX Runtime's arena and bound to the run's stream: given back when
// the launches are queued, it is lent again only behind them.
class DeviceScratch {
 public:
  DeviceScratch(const OrtApi* api, const OrtKernelContext* context, const OrtValue* like, size_t bytes)
      : api_(api), context_(context) {
    if (!bytes) return;
    Check(GetTensorMemoryInfo(api)(like, &info_));
    Check(KernelContext_GetScratchBuffer(api)(context, info_, bytes, &memory_));
    if (!memory_) throw std::bad_alloc();
  }
  DeviceScratch(const DeviceScratch&) = delete;
  ~DeviceScratch() {
    OrtAllocator* allocator = nullptr;
    if (!memory_) return;
    OrtStatus* status = KernelContext_GetAllocator(api_)(context_, info_, &allocator);
    if (!status) status = AllocatorFree(api_)(allocator, memory_);
    if (status) ReleaseStatus(api_)(status);
    if (allocator) ReleaseAllocator(api_)(allocator);
  }

  void* data() const { return memory_; }

 private:
  const OrtApi* api_;
  const OrtKernelContext* context_;
  const OrtMemoryInfo* info_ = nullptr;
  void* memory_ = nullptr;
};

// Queues the call on the stream of the run, with scratch on the device of its base.
Fault ComputeOnCuda(const Kernel& kernel, const OrtKernelContext* context, const Call& call) {
  const OrtValue* base = nullptr;
  void* stream = nullptr;
  Check(KernelContext_GetInput(kernel.api)(context, 0, &base));
  Check(KernelContext_GetGPUComputeStream(kernel.api)(context, &stream));
  size_t bytes = 0;
  if (Fault fault = ScratchOnCuda(kernel.op, call, &bytes)) return fault;
  const DeviceScratch scratch(kernel.api, context, base, bytes);
  return RunOnCuda(kernel.op, call, scratch.data(), stream);
}
#endif

Fault ComputeOnCpu(const Kernel& kernel, const OrtKernelContext* context, const Call& call) {
  HostThreads host{kernel.api, context};
  Fault fault = Run(kernel.op, kernel.isa, {HostThreads::Run, &host}, call);
  Check(host.status);
  return fault;
}

// Input i of the run. Of a constant weight the kernel knows everything.
Fault TakeInput(const Kernel& kernel, const OrtKernelContext* context, size_t i, Input* input) {
  if (kernel.packed[i]) {
    input->shape = kernel.packed_shapes[i];
    input->packed = kernel.packed[i].get();
    return {};
  }
  const OrtApi* api = kernel.api;
  const OpInfo& info = InfoOf(kernel.op);
  const OrtValue* value = nullptr;
  Check(KernelContext_GetInput(api)(context, i, &value));
  if (!value) return {Status::kNullPointer, std::string(info.name) + ": input " + info.inputs[i] + " is missing."};
  int element_type = 0;
  input->shape = ShapeOf(api, value, &element_type);
  const int expected = IsAdapterIds(info.inputs[i]) ? kInt64 : kernel.element_type;
  if (element_type != expected) {
    return {Status::kBadSetting, std::string(info.name) + ": " + info.inputs[i] + " has ONNX type " +
                                     std::to_string(element_type) + ", expected " + std::to_string(expected) + "."};
  }
  input->data = DataOf(api, value);
  return {};
}

}  // namespace

OrtStatus* CreateKernel(const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** out) {
  return Guard(api, [&]() -> OrtStatus* {
    const CustomOp& custom = Of(self);
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->op = custom.op;
    kernel->device = custom.device;
    kernel->type = custom.type;
    kernel->element_type = custom.element_type;
    if (Fault fault = ChooseIsa(&kernel->isa)) return Error(api, fault);
    if (HasFilterInput(custom.op)) {
      const std::string text = StringAttribute(api, info, "filter_input", "adapted");
      if (Fault fault = ParseFilterInput(custom.op, text, &kernel->filter_input)) return Error(api, fault);
    }
    kernel->packed.resize(InfoOf(custom.op).inputs.size());
    kernel->packed_shapes.resize(kernel->packed.size());
    if (custom.device == Device::kCpu) PackConstants(kernel.get(), info);
#ifdef LORATRF_WITH_CUDA
    if (custom.device == Device::kCuda) {
      if (Fault fault = LoadOnCuda(custom.op, custom.type)) return Error(api, fault);
    }
#endif
    *out = kernel.release();
    return nullptr;
  });
}

OrtStatus* Compute(void* self, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  const OrtApi* api = kernel.api;
  return Guard(api, [&]() -> OrtStatus* {
    std::vector<Input> inputs(InfoOf(kernel.op).inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (Fault fault = TakeInput(kernel, context, i, &inputs[i])) return Error(api, fault);
    }
    Call call;
    call.type = kernel.type, call.filter_input = kernel.filter_input;
    const bool on_cuda = kernel.device == Device::kCuda;
    if (Fault fault = FillCall(kernel.op, inputs, on_cuda ? kMaxCudaRank : kMaxRank, &call)) return Error(api, fault);
    const Shape& shape = inputs[0].shape;
    OrtValue* output = nullptr;
    Check(KernelContext_GetOutput(api)(context, 0, shape.data(), shape.size(), &output));
    if (!output) return nullptr;
    call.y = DataOf(api, output);
#ifdef LORATRF_WITH_CUDA
    if (on_cuda) return Error(api, ComputeOnCuda(kernel, context, call));
#endif
    return Error(api, ComputeOnCpu(kernel, context, call));
  });
}

void DestroyKernel(void* kernel) { delete static_cast<Kernel*>(kernel); }

}  // namespace ort
}  // namespace loratrf
