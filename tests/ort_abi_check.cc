// Holds csrc/ort_c_api.h against ONNX Runtime's own header, at compile time:
//
//   g++ -std=c++17 -fsyntax-only -I/usr/include/onnxruntime tests/ort_abi_check.cc
#include <onnxruntime_c_api.h>

#include <cstddef>

#include "../csrc/ort_c_api.h"

#define LORATRF_CHECK_INDEX(name, index, result, parameters) \
  static_assert(offsetof(::OrtApi, name) == (index) * sizeof(void*), #name);
LORATRF_ORT_API(LORATRF_CHECK_INDEX)

#define LORATRF_CHECK_FIELD(name) \
  static_assert(offsetof(::OrtCustomOp, name) == offsetof(loratrf::ort::OrtCustomOp, name), #name);
LORATRF_CHECK_FIELD(version)
LORATRF_CHECK_FIELD(CreateKernel)
LORATRF_CHECK_FIELD(GetName)
LORATRF_CHECK_FIELD(GetExecutionProviderType)
LORATRF_CHECK_FIELD(GetInputType)
LORATRF_CHECK_FIELD(GetInputTypeCount)
LORATRF_CHECK_FIELD(GetOutputType)
LORATRF_CHECK_FIELD(GetOutputTypeCount)
LORATRF_CHECK_FIELD(KernelCompute)
LORATRF_CHECK_FIELD(KernelDestroy)
LORATRF_CHECK_FIELD(GetInputCharacteristic)
LORATRF_CHECK_FIELD(GetOutputCharacteristic)
LORATRF_CHECK_FIELD(GetInputMemoryType)
LORATRF_CHECK_FIELD(GetVariadicInputMinArity)
LORATRF_CHECK_FIELD(GetVariadicInputHomogeneity)
LORATRF_CHECK_FIELD(GetVariadicOutputMinArity)
LORATRF_CHECK_FIELD(GetVariadicOutputHomogeneity)
LORATRF_CHECK_FIELD(CreateKernelV2)
LORATRF_CHECK_FIELD(KernelComputeV2)
LORATRF_CHECK_FIELD(InferOutputShapeFn)
LORATRF_CHECK_FIELD(GetStartVersion)
LORATRF_CHECK_FIELD(GetEndVersion)
LORATRF_CHECK_FIELD(GetMayInplace)
LORATRF_CHECK_FIELD(ReleaseMayInplace)
LORATRF_CHECK_FIELD(GetAliasMap)
LORATRF_CHECK_FIELD(ReleaseAliasMap)

using namespace loratrf::ort;
static_assert(kFail == ORT_FAIL && kInvalidArgument == ORT_INVALID_ARGUMENT);
static_assert(kFloat == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && kFloat16 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
static_assert(kBFloat16 == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 && kInt64 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
static_assert(kRequired == INPUT_OUTPUT_REQUIRED && kMemDefault == OrtMemTypeDefault);
static_assert(kMemCpuInput == OrtMemTypeCPUInput);
static_assert(offsetof(::OrtApiBase, GetApi) == 0 && offsetof(::OrtApiBase, GetVersionString) == sizeof(void*));
static_assert(kApiVersion <= ORT_API_VERSION);
