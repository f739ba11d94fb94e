// The part of ONNX Runtime's C ABI that the custom-op library uses, declared from its layout.
//
// ONNX Runtime's wheels ship no headers. Its ABI only grows at the end: an OrtApi is a table of function pointers in a
// fixed order, an OrtCustomOp a struct to which versions append. tests/ort_abi_check.cc holds both against the official
// header where one is installed.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace loratrf {
namespace ort {

struct OrtApi;  // a table of function pointers
struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtCustomOp;

// The API version asked for: the lowest one that has what is used here (GetMayInplace is the newest).
constexpr uint32_t kApiVersion = 18;

// OrtErrorCode
constexpr int kFail = 1, kInvalidArgument = 2;
// ONNXTensorElementDataType
constexpr int kFloat = 1, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16;
// OrtCustomOpInputOutputCharacteristic
constexpr int kRequired = 0;
// OrtMemType
constexpr int kMemDefault = 0, kMemCpuInput = -2;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// X(name, index in OrtApi, result, parameters)
#define LORATRF_ORT_API(X)                                                                                         \
  X(CreateStatus, 0, OrtStatus*, (int code, const char* message))                                                  \
  X(CreateCustomOpDomain, 26, OrtStatus*, (const char* name, OrtCustomOpDomain** out))                             \
  X(CustomOpDomain_Add, 27, OrtStatus*, (OrtCustomOpDomain * domain, const OrtCustomOp* op))                       \
  X(AddCustomOpDomain, 28, OrtStatus*, (OrtSessionOptions * options, OrtCustomOpDomain * domain))                  \
  X(GetTensorMutableData, 51, OrtStatus*, (OrtValue * value, void** out))                                          \
  X(GetTensorElementType, 60, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, int* out))                       \
  X(GetDimensionsCount, 61, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, size_t* out))                      \
  X(GetDimensions, 62, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count))            \
  X(GetTensorTypeAndShape, 65, OrtStatus*, (const OrtValue* value, OrtTensorTypeAndShapeInfo** out))               \
  X(AllocatorFree, 76, OrtStatus*, (OrtAllocator * allocator, void* memory))                                       \
  X(KernelInfoGetAttribute_float, 85, OrtStatus*, (const OrtKernelInfo* info, const char* name, float* out))       \
  X(KernelInfoGetAttribute_int64, 86, OrtStatus*, (const OrtKernelInfo* info, const char* name, int64_t* out))     \
  X(KernelInfoGetAttribute_string, 87, OrtStatus*,                                                                 \
    (const OrtKernelInfo* info, const char* name, char* out, size_t* size))                                        \
  X(KernelContext_GetInput, 90, OrtStatus*, (const OrtKernelContext* context, size_t index, const OrtValue** out)) \
  X(KernelContext_GetOutput, 91, OrtStatus*,                                                                       \
    (OrtKernelContext * context, size_t index, const int64_t* dims, size_t count, OrtValue** out))                 \
  X(ReleaseStatus, 93, void, (OrtStatus * status))                                                                 \
  X(ReleaseTensorTypeAndShapeInfo, 99, void, (OrtTensorTypeAndShapeInfo * info))                                   \
  X(ReleaseCustomOpDomain, 101, void, (OrtCustomOpDomain * domain))                                                \
  X(ReleaseAllocator, 132, void, (OrtAllocator * allocator))                                                       \
  X(KernelContext_GetGPUComputeStream, 193, OrtStatus*, (const OrtKernelContext* context, void** out))             \
  X(GetTensorMemoryInfo, 194, OrtStatus*, (const OrtValue* value, const OrtMemoryInfo** out))                      \
  X(KernelInfoGetConstantInput_tensor, 249, OrtStatus*,                                                            \
    (const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** out))                             \
  X(KernelContext_GetAllocator, 253, OrtStatus*,                                                                   \
    (const OrtKernelContext* context, const OrtMemoryInfo* memory, OrtAllocator** out))                            \
  X(ShapeInferContext_GetInputTypeShape, 268, OrtStatus*,                                                          \
    (const OrtShapeInferContext* context, size_t index, OrtTensorTypeAndShapeInfo** out))                          \
  X(ShapeInferContext_SetOutputTypeShape, 270, OrtStatus*,                                                         \
    (const OrtShapeInferContext* context, size_t index, const OrtTensorTypeAndShapeInfo* info))                    \
  X(KernelContext_ParallelFor, 274, OrtStatus*,                                                                    \
    (const OrtKernelContext* context, void (*body)(void*, size_t), size_t total, size_t batches, void* argument))  \
  X(KernelContext_GetScratchBuffer, 277, OrtStatus*,                                                               \
    (const OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes, void** out))

// name(api): the function of that name.
#define LORATRF_ORT_ACCESSOR(name, index, result, parameters)                      \
  inline auto name(const OrtApi* api) {                                            \
    using Function = result(*) parameters;                                         \
    return reinterpret_cast<Function>(reinterpret_cast<void* const*>(api)[index]); \
  }
LORATRF_ORT_API(LORATRF_ORT_ACCESSOR)
#undef LORATRF_ORT_ACCESSOR

// An operator as ONNX Runtime reads it, up to `version`. Unused callbacks stay null.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info);
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  int (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  int (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  void (*KernelCompute)(void* kernel, OrtKernelContext* context);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
  size_t (*GetMayInplace)(int** input_index, int** output_index);
  void (*ReleaseMayInplace)(int* input_index, int* output_index);
  size_t (*GetAliasMap)(int** input_index, int** output_index);
  void (*ReleaseAliasMap)(int* input_index, int* output_index);
};

}  // namespace ort
}  // namespace loratrf
